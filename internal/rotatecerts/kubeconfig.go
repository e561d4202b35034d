package rotatecerts

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/kube"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// A kubeconfig from before a rotation trusts the old CA and holds a certificate of it,
// or a token of the old key. Its successor is the same somebody: never more than what
// the kubeconfig could do before.

func (c *command) kubeconfigCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "kubeconfig", Short: "Bring a kubeconfig from before a rotation up to date", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.renewKubeconfig(cmd.Context(), path) },
	}
	cmd.Flags().StringVar(&path, "kubeconfig", "", "path of the kubeconfig; its current context is renewed in place, for the same user (required)")
	_ = cmd.MarkFlagRequired("kubeconfig")
	return cmd
}

// kubeconfig is one whose current context can be changed in place; everything else in
// the file stays.
type kubeconfig struct {
	doc           map[string]any
	cluster, user map[string]any // of the current context, inside doc
}

// parseKubeconfig reads a kubeconfig, YAML or JSON.
func parseKubeconfig(text []byte) (*kubeconfig, error) {
	k := &kubeconfig{}
	if err := yaml.Unmarshal(text, &k.doc); err != nil {
		return nil, badKubeconfig("it cannot be read as one: %s", err)
	}
	current, _ := k.doc["current-context"].(string)
	about := named(k.doc, "contexts", "context", current)
	cluster, _ := about["cluster"].(string)
	user, _ := about["user"].(string)
	if k.cluster, k.user = named(k.doc, "clusters", "cluster", cluster), named(k.doc, "users", "user", user); k.cluster == nil || k.user == nil {
		return nil, badKubeconfig("its current context %q names no cluster and user that are there", current)
	}
	return k, nil
}

// named finds a member of one of the lists of a kubeconfig.
func named(doc map[string]any, list, inner, name string) map[string]any {
	all, _ := doc[list].([]any)
	for _, one := range all {
		if outer, _ := one.(map[string]any); outer["name"] == name {
			found, _ := outer[inner].(map[string]any)
			return found
		}
	}
	return nil
}

func badKubeconfig(why string, args ...any) error {
	return fault.New(fault.Invalid, "BadKubeconfig", "The kubeconfig cannot be used: "+why+".", args...).At("--kubeconfig").
		WithFix("kubectl config view --raw --flatten --minify > FILE")
}

// bytesIn returns a member that is base64; absent or no base64: nil.
func bytesIn(part map[string]any, member string) []byte {
	text, _ := part[member].(string)
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(b) == 0 {
		return nil
	}
	return b
}

// credential is who the kubeconfig is.
func (k *kubeconfig) credential() rotation.Credential {
	token, _ := k.user["token"].(string)
	return rotation.Credential{
		Roots: bytesIn(k.cluster, "certificate-authority-data"), Cert: bytesIn(k.user, "client-certificate-data"), Key: bytesIn(k.user, "client-key-data"), Token: token,
	}
}

// take puts a credential into the kubeconfig, and reports whether that changes it.
func (k *kubeconfig) take(c rotation.Credential) (changed bool) {
	set := func(part map[string]any, member, value string) {
		if was, _ := part[member].(string); was != value && value != "" {
			part[member], changed = value, true
		}
	}
	if len(bytesIn(k.cluster, "certificate-authority-data")) > 0 { // else whoever connects trusts others
		set(k.cluster, "certificate-authority-data", base64.StdEncoding.EncodeToString(c.Roots))
	}
	set(k.user, "client-certificate-data", base64.StdEncoding.EncodeToString(c.Cert))
	set(k.user, "client-key-data", base64.StdEncoding.EncodeToString(c.Key))
	set(k.user, "token", c.Token)
	return changed
}

// server is where the kubeconfig leads: the address, and the name in the certificate.
func (k *kubeconfig) server() (address, name string, err error) {
	text, _ := k.cluster["server"].(string)
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return "", "", badKubeconfig("its server is not the https URL of an API server")
	}
	name, _ = k.cluster["tls-server-name"].(string)
	port := cmp.Or(u.Port(), "443")
	return net.JoinHostPort(u.Hostname(), port), net.JoinHostPort(cmp.Or(name, u.Hostname()), port), nil
}

// claims are what a token of a service account says of itself: one that was asked
// for, or one out of a Secret, which has no end.
type claims struct {
	Subject   string          `json:"sub"`
	Issued    int64           `json:"iat"`
	Expires   int64           `json:"exp"`
	Audience  json.RawMessage `json:"aud"` // a word or a list
	Bound     bound           `json:"kubernetes.io"`
	Namespace string          `json:"kubernetes.io/serviceaccount/namespace"`
	Secret    string          `json:"kubernetes.io/serviceaccount/secret.name"`
}

type bound struct {
	Namespace      string `json:"namespace"`
	ServiceAccount struct {
		Name string `json:"name"`
	} `json:"serviceaccount"`
}

func (c claims) audiences() []string {
	var all []string
	if json.Unmarshal(c.Audience, &all) != nil {
		var one string
		if json.Unmarshal(c.Audience, &one) == nil {
			all = []string{one}
		}
	}
	return all
}

// parseToken reads a token without verifying it; false: it is none of a service account.
func parseToken(token string) (c claims, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, false
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(text, &c) != nil {
		return claims{}, false
	}
	return c, c.Bound.ServiceAccount.Name != "" && c.Expires > c.Issued || c.Secret != ""
}

// Renewed is the answer of "rotate-certs kubeconfig".
type Renewed struct {
	User    string `json:"user,omitempty"` // as the API server knows it; empty: it may not ask
	Changed bool   `json:"changed"`
}

// renewKubeconfig brings a kubeconfig from before a rotation up to date, and writes
// it only after an API server has accepted it.
func (c *command) renewKubeconfig(ctx context.Context, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fault.New(fault.Invalid, "BadKubeconfig", "The kubeconfig cannot be read: %s.", err).At("--kubeconfig")
	}
	k, err := parseKubeconfig(text)
	if err != nil {
		return err
	}
	s, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	_, j, err := c.unfinished()
	if err != nil {
		return err
	}
	if j != nil {
		defer j.Close()
	}
	host := s.jump.Host(theHost)
	renewal, err := rotation.RenewFrom(ctx, host, s.layout, j, s.sealer.Open)
	if err != nil {
		return err
	}
	r := renewer{Renewal: renewal, jump: s.jump}
	if r.endpoints, err = rotation.Endpoints(ctx, host, s.layout); err != nil {
		return err
	}
	out, err := r.renew(ctx, k)
	if err != nil {
		return err
	}
	if out.Changed {
		next, err := yaml.Marshal(k.doc)
		if err != nil {
			return fmt.Errorf("writing the kubeconfig: %w", err)
		}
		if err := apimodel.WriteFile(path, next); err != nil {
			return err
		}
	}
	if c.o.output == "json" {
		return c.json(out)
	}
	what := "is as it was"
	if out.Changed {
		what = "is renewed"
	}
	fmt.Fprintf(c.Out, "%s %s; the API server knows it as %s.\n", path, what, cmp.Or(out.User, "somebody who may not ask who they are"))
	return nil
}

type renewer struct {
	*rotation.Renewal
	jump      rotation.Dialer
	endpoints []string // of the SSH host's API server
}

// renew changes a kubeconfig to what outlives the rotation.
func (r renewer) renew(ctx context.Context, k *kubeconfig) (Renewed, error) {
	was := k.credential()
	now := was
	now.Roots = r.Roots()
	user, err := r.successor(ctx, k, &now)
	if err != nil {
		return Renewed{}, err
	}
	known, err := r.ask(ctx, k, now)
	if err != nil {
		return Renewed{}, fault.New(fault.Unavailable, "KubeconfigNotAccepted", "No API server was seen to accept the renewed kubeconfig.").Because(err).
			WithFix("see why; then run the same command again, or make another kubeconfig")
	}
	if user != "" && known != "" && known != user {
		return Renewed{}, fmt.Errorf("the renewed kubeconfig is %s, and the former one was %s", known, user)
	}
	return Renewed{User: known, Changed: k.take(now)}, nil
}

// successor puts the next certificate or token into a credential, where the present
// one does not last, and returns whose it is; "" if that is not known.
func (r renewer) successor(ctx context.Context, k *kubeconfig, c *rotation.Credential) (user string, err error) {
	if len(c.Cert) > 0 {
		pair, err := tls.X509KeyPair(c.Cert, c.Key)
		if err != nil {
			return "", badKubeconfig("its certificate and key do not fit each other, or are none")
		}
		user = pair.Leaf.Subject.CommonName
		if r.Lasts(pair.Leaf) {
			c.Cert = pki.EncodeChain(pair.Leaf.Raw) // what the overlap needed beside it ends with that
			return user, nil
		}
		return user, r.certificate(ctx, k, c, pair.Leaf)
	}
	t, ok := parseToken(c.Token)
	if !r.Overlap || !ok { // once the old is refused it shows; another token is not ours to renew
		if _, err := r.ask(ctx, k, *c); err == nil || !ok || !errors.Is(err, fault.Unauthenticated) {
			return t.Subject, err
		}
	}
	c.Token, err = r.token(ctx, t)
	return t.Subject, err
}

// certificate renews a client certificate, unless another CA than the cluster's made
// it: that one is accepted still.
func (r renewer) certificate(ctx context.Context, k *kubeconfig, c *rotation.Credential, like *x509.Certificate) (err error) {
	if !r.Overlap {
		if _, err := r.ask(ctx, k, *c); err == nil || !errors.Is(err, fault.Unauthenticated) {
			return err
		}
	}
	c.Cert, c.Key, err = r.Certificate(like, time.Now())
	return err
}

// tokens is what package kube offers beside what a rotation asks for.
type tokens interface {
	NewToken(ctx context.Context, namespace, name string, audiences []string, life time.Duration) (string, error)
}

// token makes, or finds, the token that follows another one.
func (r renewer) token(ctx context.Context, t claims) (string, error) {
	as, err := r.Administrator(time.Now())
	if err != nil {
		return "", err
	}
	var why error
	for _, endpoint := range r.endpoints {
		api, err := kube.Connector(r.jump)(endpoint, as)
		if err != nil {
			return "", err
		}
		token, err := newToken(ctx, api, t)
		if err == nil {
			return token, nil
		}
		why = errors.Join(why, fmt.Errorf("%s: %w", endpoint, err))
	}
	return "", fault.New(fault.Unavailable, "TokenNotMade", "The token of %s could not be made.", t.Subject).Because(why)
}

func newToken(ctx context.Context, api rotation.API, t claims) (string, error) {
	if t.Secret == "" {
		return api.(tokens).NewToken(ctx, t.Bound.Namespace, t.Bound.ServiceAccount.Name, t.audiences(), time.Duration(t.Expires-t.Issued)*time.Second)
	}
	all, err := api.TokenSecrets(ctx)
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.Namespace == t.Namespace && s.Name == t.Secret && s.Token != "" {
			return s.Token, nil
		}
	}
	return "", fault.New(fault.NotFound, "NoTokenSecret", "The Secret %s/%s of the token is not there any more.", t.Namespace, t.Secret)
}

// ask asks an API server who a credential is: the server that the kubeconfig names,
// by way of the SSH host or from here, or else the SSH host's own.
func (r renewer) ask(ctx context.Context, k *kubeconfig, c rotation.Credential) (user string, err error) {
	address, name, err := k.server()
	if err != nil {
		return "", err
	}
	type way struct {
		dial rotation.Dialer
		name string
	}
	ways := []way{{fixed{r.jump, address}, name}, {fixed{new(net.Dialer), address}, name}}
	for _, endpoint := range r.endpoints {
		ways = append(ways, way{r.jump, endpoint})
	}
	var why error
	for _, w := range ways {
		api, err := kube.Connector(w.dial)(w.name, c)
		if err != nil {
			return "", err
		}
		user, err := api.WhoAmI(ctx)
		switch {
		case err == nil:
			return user, nil
		case errors.Is(err, fault.Denied): // known, but may not ask
			return "", nil
		case errors.Is(err, fault.Unauthenticated):
			return "", err
		}
		why = errors.Join(why, err)
	}
	return "", why
}

// fixed dials one address, whatever the name in its certificate.
type fixed struct {
	rotation.Dialer
	address string
}

func (f fixed) DialContext(ctx context.Context, network, _ string) (net.Conn, error) {
	return f.Dialer.DialContext(ctx, network, f.address)
}
