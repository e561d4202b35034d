package target

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"slices"

	amqp "github.com/rabbitmq/amqp091-go"

	"keyfleet.dev/keyfleet/internal/fault"
)

// rabbitmq makes credentials on RabbitMQ. Users are made through the management
// API, with all permissions on one virtual host and no tags; a login is proven by AMQP.
type rabbitmq struct {
	Server
	config *tls.Config
}

// vhost is the virtual host.
func (r rabbitmq) vhost() string {
	if r.Database == "" {
		return "/"
	}
	return r.Database
}

func (r rabbitmq) prove(ctx context.Context, login Login) error {
	dial := func(network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		deadline, _ := ctx.Deadline()
		if err := conn.SetDeadline(deadline); err != nil {
			_ = conn.Close()
			return nil, err
		}
		context.AfterFunc(ctx, func() { _ = conn.Close() }) // our context ends with the call
		return conn, nil
	}
	scheme := "amqp://"
	if r.config != nil {
		scheme = "amqps://"
	}
	conn, err := amqp.DialConfig(scheme+r.address(), amqp.Config{
		SASL:  []amqp.Authentication{&amqp.PlainAuth{Username: login.User, Password: login.Password.Reveal()}},
		Vhost: r.vhost(), TLSClientConfig: r.config, Dial: dial, Heartbeat: connectTimeout,
		Properties: amqp.Table{"product": "keyfleet"},
	})
	if err != nil {
		return r.explain("connecting", err)
	}
	defer conn.Close()
	if _, err := conn.Channel(); err != nil {
		return r.explain("opening a channel", err)
	}
	return nil
}

// explain turns an error of AMQP into one that people see.
func (r rabbitmq) explain(doing string, err error) error {
	var answer *amqp.Error
	switch {
	case errors.Is(err, amqp.ErrCredentials):
		return r.loginRefused(err)
	case errors.As(err, &answer) && answer.Code == amqp.AccessRefused:
		return r.loginRefused(err)
	case errors.Is(err, amqp.ErrVhost), errors.As(err, &answer) && answer.Code == amqp.NotAllowed:
		return r.notFound("virtual host for the login,", err)
	}
	if f := r.unanswered(err); f != nil {
		return f
	}
	if errors.As(err, &answer) && answer.Server {
		return r.failed(doing, err)
	}
	return r.unreachable("the connection was lost", err)
}

// user and permission are bodies of the management API.
type (
	rabbitUser struct {
		Name      string `json:"name,omitempty"`
		Hash      string `json:"password_hash,omitempty"`
		Algorithm string `json:"hashing_algorithm,omitempty"`
		Tags      any    `json:"tags"` // written as text, read as text or list
	}
	rabbitPermission struct {
		Configure string `json:"configure"`
		Write     string `json:"write"`
		Read      string `json:"read"`
	}
	rabbitConnection struct {
		Name string `json:"name"`
		User string `json:"user"`
	}
)

// tagged tells whether a user has tags: those of ours have none.
func (u rabbitUser) tagged() bool {
	switch tags := u.Tags.(type) {
	case string:
		return tags != ""
	case []any:
		return len(tags) > 0
	}
	return false
}

func (r rabbitmq) check(ctx context.Context) ([]string, error) {
	if err := r.capable(ctx); err != nil {
		return nil, err
	}
	var warnings []string
	if u, _ := url.Parse(r.Management); u.Scheme == "http" && !r.TLS.Disable {
		warnings = append(warnings, "The management API is not encrypted: the administrator's password crosses the network in clear.")
	}
	return warnings, nil
}

// capable fails unless the administrator may manage users, and the virtual host is there.
func (r rabbitmq) capable(ctx context.Context) error {
	var me rabbitUser
	if err := r.call(ctx, http.MethodGet, nil, &me, "whoami"); err != nil {
		return err
	}
	tags, _ := me.Tags.([]any)
	if !slices.Contains(tags, any("administrator")) && me.Tags != any("administrator") {
		return r.permissions(r.administrator())
	}
	if r.Database == "" {
		return nil
	}
	err := r.call(ctx, http.MethodGet, nil, nil, "vhosts", r.vhost())
	if errors.Is(err, fault.NotFound) {
		return r.notFound("virtual host", err)
	}
	return err
}

// administrator is the one privilege that it takes.
func (r rabbitmq) administrator() []missing {
	return []missing{{"the tag administrator", "rabbitmqctl set_user_tags " + r.Admin.User + " administrator"}}
}

func (r rabbitmq) ensure(ctx context.Context, _ string, login Login) error {
	if err := r.capable(ctx); err != nil {
		return err
	}
	if _, err := r.look(ctx, login.User); err != nil {
		return err
	}
	body := rabbitUser{Hash: rabbitHash(login.Password, randomBytes(4)), Algorithm: "rabbit_password_hashing_sha256", Tags: ""}
	if err := r.call(ctx, http.MethodPut, body, nil, "users", login.User); err != nil {
		return err
	}
	return r.call(ctx, http.MethodPut, rabbitPermission{".*", ".*", ".*"}, nil, "permissions", r.vhost(), login.User)
}

// look tells whether there is a user, and refuses one that cannot be ours.
func (r rabbitmq) look(ctx context.Context, user string) (bool, error) {
	var u rabbitUser
	err := r.call(ctx, http.MethodGet, nil, &u, "users", user)
	switch {
	case errors.Is(err, fault.NotFound):
		return false, nil
	case err != nil:
		return false, err
	case u.tagged():
		return false, r.nameTaken("user", user, "it has tags")
	}
	return true, nil
}

func (r rabbitmq) logins(ctx context.Context, role string) ([]string, error) {
	var usable []string
	for _, user := range Slots(role) {
		there, err := r.look(ctx, user)
		if err != nil {
			return nil, err
		}
		if there {
			usable = append(usable, user)
		}
	}
	return usable, nil
}

func (r rabbitmq) revoke(ctx context.Context, _, user string) error {
	_, err := r.end(ctx, user)
	return err
}

func (r rabbitmq) remove(ctx context.Context, role string) (removed []string, err error) {
	for _, user := range Slots(role) {
		there, err := r.end(ctx, user)
		if err != nil {
			return removed, err
		}
		if there {
			removed = append(removed, "user "+user)
		}
	}
	return removed, nil
}

// end deletes a user and closes its connections. It tells whether there was one.
func (r rabbitmq) end(ctx context.Context, user string) (there bool, err error) {
	if there, err = r.look(ctx, user); err != nil {
		return false, err
	}
	if there {
		if err := r.call(ctx, http.MethodDelete, nil, nil, "users", user); err != nil && !errors.Is(err, fault.NotFound) {
			return there, err
		}
	}
	return there, until(ctx, func() (bool, error) { return r.closeConnections(ctx, user) })
}

// closeConnections closes the connections of a user, and tells whether there were none.
func (r rabbitmq) closeConnections(ctx context.Context, user string) (none bool, err error) {
	var all []rabbitConnection
	if err := r.call(ctx, http.MethodGet, nil, &all, "connections"); err != nil {
		return false, err
	}
	none = true
	for _, c := range all {
		if c.User != user {
			continue
		}
		none = false
		if err := r.call(ctx, http.MethodDelete, nil, nil, "connections", c.Name); err != nil && !errors.Is(err, fault.NotFound) {
			return false, err
		}
	}
	return none, nil
}
