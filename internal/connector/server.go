package connector

import (
	"context"
	"crypto/x509"
	"net/url"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Server is the spec of a registered server: one on which Keyfleet makes logins
// for connections. How Keyfleet itself logs in is stored apart.
type Server struct {
	ID            string            `json:"id"` // ARM id, the creator's casing
	Kind          string            `json:"kind"`
	Location      string            `json:"location"`
	Tags          map[string]string `json:"tags,omitempty"`
	Host          string            `json:"host"` // as workloads reach it
	Port          int               `json:"port"`
	Reach         string            `json:"reach,omitempty"` // host:port for Keyfleet, where that differs
	Management    string            `json:"management,omitempty"`
	Plain         bool              `json:"plain,omitempty"` // no TLS
	CA            string            `json:"ca,omitempty"`    // PEM; empty: the trust roots of this machine
	Administrator string            `json:"administrator"`
}

// ServerStatus is what was seen of a server when it was last looked at, which is at
// every PUT. A server that did not let Keyfleet in then is not registered.
type ServerStatus struct {
	Checked  time.Time `json:"checked,omitzero"`
	Warnings []string  `json:"warnings,omitempty"`
}

// ServerObject is a stored server.
type ServerObject = store.Object[Server, ServerStatus]

// Servers is the collection of registered servers; ids are "TYPE/SUBSCRIPTION/GROUP/NAME".
var Servers = store.NewCollection[Server, ServerStatus]("servers")

// administrator is how Keyfleet logs in to a server.
type administrator struct {
	Password string `json:"password"`
}

var administrators = store.NewCollection[administrator, struct{}]("server-administrators")

// ServerType is a resource type of servers.
type ServerType struct {
	Type  string // "Microsoft.DBforPostgreSQL/flexibleServers"
	Kind  string // as in Target.Makes
	Port  int    // default
	Plain int    // default port without TLS
}

// ServerTypes are the resource types of servers, RabbitMQ's of Keyfleet's own.
func ServerTypes() []ServerType {
	return []ServerType{
		{"Microsoft.DBforPostgreSQL/flexibleServers", "postgres", 5432, 5432},
		{"Microsoft.DBforMySQL/flexibleServers", "mysql", 3306, 3306},
		{"Microsoft.Cache/redis", "redis", 6380, 6379},
		{"Keyfleet.Messaging/rabbitmq", "rabbitmq", 5671, 5672},
	}
}

func serverType(id arm.ID) (ServerType, bool) {
	for _, t := range ServerTypes() {
		if id.Is(t.Type) {
			return t, true
		}
	}
	return ServerType{}, false
}

// serverKey is the store id of a server.
func serverKey(id arm.ID) string { return strings.ToLower(id.Type()) + "/" + id.StoreKey() }

// ServerRegistration is what a PUT asks for.
type ServerRegistration struct {
	Server
	Password string // empty: as it is; a new server needs one
}

// PutServer registers a server, or changes it. It is looked at first: a server
// that does not let Keyfleet in is not registered.
func (s *Service) PutServer(ctx context.Context, want ServerRegistration) (out *ServerObject, created bool, err error) {
	id, t, err := parseServer(want.ID)
	if err != nil {
		return nil, false, err
	}
	want.ID, want.Kind = id.String(), t.Kind
	op := access.Op{Action: t.Type + "/write", Resource: id.String(), Detail: want.Host}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return nil, false, s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	tx := s.cfg.Store.View(ctx)
	if want.Password == "" {
		old, err := administrators.Lookup(tx, serverKey(id))
		if err != nil {
			return nil, false, err
		}
		if old == nil {
			return nil, false, fault.New(fault.Invalid, "MissingPassword", "A server is registered with the login of an administrator; Keyfleet makes no servers.").
				At("properties.administratorLoginPassword").WithFix("keyfleet server register %s %s --host HOST --admin USER --password-file FILE", t.Kind, id.Name())
		}
		want.Password = old.Spec.Password
	}
	if err := want.check(t); err != nil {
		return nil, false, err
	}
	warnings, err := s.cfg.Maker.Check(ctx, reach(want.Server, want.Password, ""))
	if err != nil {
		return nil, false, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if s.cfg.Place != nil {
			if err := s.cfg.Place(tx, id.Subscription, id.ResourceGroup, id.Provider); err != nil {
				return err
			}
		}
		if out, err = Servers.Lookup(tx, serverKey(id)); err != nil {
			return err
		}
		status := ServerStatus{Checked: s.cfg.Now().UTC(), Warnings: warnings}
		if created = out == nil; created {
			out = &ServerObject{Meta: store.Meta{ID: serverKey(id)}, Spec: want.Server, Status: status}
			if err := Servers.Insert(tx, out); err != nil {
				return err
			}
			return administrators.Insert(tx, &store.Object[administrator, struct{}]{Meta: store.Meta{ID: out.ID}, Spec: administrator{want.Password}})
		}
		if want.Location != out.Spec.Location {
			return fault.New(fault.Conflict, "InvalidResourceLocation",
				"The resource '%s' already exists in location '%s'. A resource with the same name cannot be created in location '%s'.", out.Spec.ID, out.Spec.Location, want.Location).At("location")
		}
		want.Server.ID = out.Spec.ID
		out.Spec, out.Status = want.Server, status
		admin, err := administrators.Get(tx, out.ID)
		if err != nil {
			return err
		}
		admin.Spec.Password = want.Password
		if err := administrators.Put(tx, admin); err != nil {
			return err
		}
		return Servers.Put(tx, out)
	})
	return out, created, err
}

// check looks at a registration and fills in the defaults.
func (r *ServerRegistration) check(t ServerType) error {
	bad := func(at, why string, args ...any) error {
		return fault.New(fault.Invalid, "InvalidServer", "The server cannot be registered: "+why+".", args...).At("properties." + at)
	}
	switch {
	case r.Host == "" || strings.ContainsAny(r.Host, "/@:? \t\n") && !strings.Contains(r.Host, "::") || len(r.Host) > 253:
		return bad("fullyQualifiedDomainName", "'%.100s' is no host name or address", r.Host)
	case r.Port < 0 || r.Port > 65535:
		return bad("port", "%d is no port", r.Port)
	case r.Administrator == "":
		return bad("administratorLogin", "it says no administrator")
	case r.CA != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(r.CA)):
		return bad("certificateAuthority", "there is no certificate in it")
	case r.Kind == "rabbitmq" && r.Management == "":
		return bad("managementEndpoint", "users of RabbitMQ are made through its management API")
	}
	if r.Management != "" {
		u, err := url.Parse(r.Management)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil {
			return bad("managementEndpoint", "'%.200s' is not the URL of a management API", r.Management)
		}
	}
	if r.Port == 0 {
		r.Port = t.Port
		if r.Plain {
			r.Port = t.Plain
		}
	}
	return nil
}

// Server returns a registered server, fault.NotFound if there is none.
func (s *Service) Server(ctx context.Context, resourceID string) (*ServerObject, error) {
	id, t, err := parseServer(resourceID)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: t.Type + "/read", Resource: id.String()}); err != nil {
		return nil, err
	}
	return lookupServer(s.cfg.Store.View(ctx), id)
}

// ListServers returns the servers of a type in a subscription, of one group only if group is not empty.
func (s *Service) ListServers(ctx context.Context, typ, subscription, group string) ([]*ServerObject, error) {
	scope := arm.ID{Subscription: subscription, ResourceGroup: group}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: typ + "/read", Resource: scope.String()}); err != nil {
		return nil, err
	}
	return serversIn(s.cfg.Store.View(ctx), typ, subscription, group)
}

// ServersIn returns the servers of all types without a decision, as [Service.In] does.
func (s *Service) ServersIn(ctx context.Context, subscription, group string) ([]*ServerObject, error) {
	var out []*ServerObject
	for _, t := range ServerTypes() {
		list, err := serversIn(s.cfg.Store.View(ctx), t.Type, subscription, group)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}

func serversIn(tx *store.Tx, typ, subscription, group string) ([]*ServerObject, error) {
	prefix := typ + "/" + subscription + "/"
	if group != "" {
		prefix += group + "/"
	}
	return Servers.List(tx, strings.ToLower(prefix))
}

// DeleteServer forgets a server; nothing on it is touched. While a connection has
// a login there it is refused: nobody could take the login back.
func (s *Service) DeleteServer(ctx context.Context, resourceID string) (existed bool, err error) {
	id, t, err := parseServer(resourceID)
	if err != nil {
		return false, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, access.Op{Action: t.Type + "/delete", Resource: id.String()}, func(tx *store.Tx) error {
		o, err := Servers.Lookup(tx, serverKey(id))
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		users, err := connectionsTo(tx, id)
		if err != nil {
			return err
		}
		if len(users) > 0 {
			return fault.New(fault.Conflict, "ServerInUse", "The server '%s' has logins of the connections %s.", o.Spec.ID, strings.Join(users, ", ")).
				WithFix("delete the connections first")
		}
		if err := administrators.Delete(tx, o.ID); err != nil {
			return err
		}
		return Servers.Delete(tx, o.ID)
	})
	return existed, err
}

// connectionsTo returns the ids of the connections with a login that Keyfleet made on a server.
func connectionsTo(tx *store.Tx, server arm.ID) ([]string, error) {
	all, err := Connections.List(tx, "")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, c := range all {
		if id, ok := serverOf(c.Spec.Target.ID); ok && id.Key() == server.Key() && c.Spec.Auth.Type == Secret && c.Spec.Auth.Given == nil {
			out = append(out, c.Spec.ID)
		}
	}
	return out, nil
}

// serverOf is the id of the server that a target is on: the target itself, or what it is part of.
func serverOf(target string) (arm.ID, bool) {
	id, err := arm.ParseID(target)
	if err != nil || id.ResourceGroup == "" || len(id.Types) == 0 {
		return id, false
	}
	id.Types, id.Names = id.Types[:1], id.Names[:1]
	_, ok := serverType(id)
	return id, ok
}

func lookupServer(tx *store.Tx, id arm.ID) (*ServerObject, error) {
	o, err := Servers.Lookup(tx, serverKey(id))
	if err == nil && o == nil {
		t, _ := serverType(id)
		err = fault.New(fault.NotFound, "ResourceNotFound", "The Resource '%s/%s' under resource group '%s' was not found.", id.Type(), id.Name(), id.ResourceGroup).
			WithFix("keyfleet server register %s %s --group %s --host HOST --admin USER --password-file FILE", t.Kind, id.Name(), id.ResourceGroup)
	}
	return o, err
}

func parseServer(s string) (arm.ID, ServerType, error) {
	id, err := arm.ParseID(s)
	if err == nil && id.ResourceGroup != "" {
		if t, ok := serverType(id); ok {
			id.Provider, id.Types = splitType(t.Type)
			return id, t, nil
		}
	}
	var known []string
	for _, t := range ServerTypes() {
		known = append(known, t.Type)
	}
	slices.Sort(known)
	return id, ServerType{}, fault.New(fault.Invalid, "LinkedInvalidPropertyId", "'%.300s' is not the resource id of a server.", s).
		WithFix("/subscriptions/ID/resourceGroups/GROUP/providers/TYPE/NAME, where TYPE is one of %s", strings.Join(known, ", "))
}

func splitType(t string) (provider string, types []string) {
	provider, rest, _ := strings.Cut(t, "/")
	return provider, strings.Split(rest, "/")
}
