package rotation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"net"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// The interfaces of this file are all that the engine knows of the outside:
// machines over SSH (package remote), the Kubernetes API (package kube) and the
// cluster's own etcd (package etcdadmin). Those packages satisfy them.

// Host is one machine of the cluster. All calls act as root there, or as an administrator. It is safe
// for concurrent use.
type Host interface {
	// Name is the name of the node, as Kubernetes knows it.
	Name() string
	// Run runs a script and returns what it printed on standard output. An exit
	// status other than 0 is a *ScriptError. If ctx ends or the connection is
	// lost, a script that Finishes goes on to its end on the machine. Where another
	// process waits for it, too, the later of the two may get [ErrResultTaken].
	Run(ctx context.Context, s Script) ([]byte, error)
	// Put writes a file with owner root and the mode, atomically: beside it,
	// synced, its hash compared, renamed. Missing folders are made with mode 0700.
	Put(ctx context.Context, path string, content io.Reader, mode fs.FileMode) error
}

// Script is a POSIX shell script, run with "set -eu"; on a machine with Windows it is
// PowerShell in strict mode, with $argv and $stdin, that ends when a command fails. An
// exception may have its exit status in Data['status'].
type Script struct {
	Name    string        // what it does, for the log of the machine and for errors: "restart etcd"
	Text    string        // never holds a secret; secrets come by Input
	Args    []string      // $1, $2, ...
	Input   []byte        // standard input
	Timeout time.Duration // on the machine; zero: a minute
	// Finishes says that the script must come to its end once begun: it runs as a
	// unit of systemd that a lost connection does not end, and Run with the same Unit
	// waits for one that is under way instead of beginning another.
	Finishes bool
	Unit     string // name of the unit, for Finishes: letters, digits and dashes
	// Quiet keeps the output out of the machine's log: for scripts that only look.
	Quiet bool
}

// ErrResultTaken says that a script has come to its end, and that another process,
// which waited for it too, knows how.
var ErrResultTaken = errors.New("another process has taken the result of the script")

// ScriptError is the failure of a script.
type ScriptError struct {
	Host   string
	Script string // its Name
	Status int    // exit status; -1: it was ended by its timeout
	Output string // last lines of standard error
}

func (e *ScriptError) Error() string {
	what := "failed"
	if e.Status < 0 {
		what = "was ended: it took too long"
	}
	msg := e.Script + " on " + e.Host + " " + what
	if e.Output != "" {
		msg += ": " + e.Output
	}
	return msg
}

// Dialer opens connections that come out inside the cluster's network.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// Credential is who speaks to an API server, and whom it trusts.
type Credential struct {
	Roots []byte // PEM; what the server's certificate is verified with
	Cert  []byte // PEM chain of a client certificate; empty: none
	Key   []byte // PEM
	Token string // bearer token; empty: none
	// As makes the caller a front proxy that says who the user is (X-Remote-User).
	As string
}

// TLS makes a server be verified with the credential's roots, always, and shows the
// client certificate, also to a server that did not name its issuer among those
// it accepts: it is for the server to refuse it.
func (c Credential) TLS() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	if !t.RootCAs.AppendCertsFromPEM(c.Roots) {
		return nil, fault.New(fault.Invalid, "", "The credential has no CA certificate to verify the server with.")
	}
	if len(c.Cert) == 0 {
		return t, nil
	}
	pair, err := tls.X509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, fault.New(fault.Invalid, "", "The credential's client certificate cannot be used.").Because(err)
	}
	t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	return t, nil
}

// Connect opens the API of one API server, "host:port", as somebody. It does not
// dial yet.
type Connect func(server string, as Credential) (API, error)

// AskKubelet returns the name by which a kubelet, "host:port", knows somebody
// without rights; "" if it does not know them. One that lets everybody in is
// fault.Precondition, one that does not answer fault.Unavailable.
type AskKubelet func(ctx context.Context, address string, as Credential) (string, error)

// API is the Kubernetes API as one API server answers it. Failures to reach
// the server and its refusals are errors that errors.Is finds as
// fault.Unavailable, fault.Unauthenticated, fault.Denied, fault.NotFound or fault.Conflict.
type API interface {
	// Ready asks /readyz.
	Ready(ctx context.Context) error
	// WhoAmI is the user name by which the server knows the caller (SelfSubjectReview).
	WhoAmI(ctx context.Context) (string, error)
	// ReviewToken reports whether the server accepts a service account's token.
	ReviewToken(ctx context.Context, token string) (bool, error)
	// ServiceAccount returns the UID of a service account.
	ServiceAccount(ctx context.Context, namespace, name string) (uid string, err error)
	// Issuer is the issuer and the key ids of service account tokens that the
	// server publishes (/.well-known/openid-configuration, /openid/v1/jwks).
	Issuer(ctx context.Context) (issuer string, kids []string, err error)

	Nodes(ctx context.Context) ([]Node, error)
	// ReachKubelet makes the API server ask the kubelet of a node for its health.
	ReachKubelet(ctx context.Context, node string) error
	Pods(ctx context.Context) ([]Pod, error)
	// RestartOwner makes the controller of a pod replace it: a new annotation in
	// the template of a Deployment, DaemonSet or StatefulSet; a pod with another
	// owner or none is evicted. Disruption budgets hold.
	RestartOwner(ctx context.Context, p Pod, mark string) error

	// Signed lists the certificates that certificate signing requests were given.
	Signed(ctx context.Context) ([]Signed, error)
	// RootCAs returns ca.crt of kube-root-ca.crt by namespace; namespaces without
	// the ConfigMap have "", unless they are being deleted.
	RootCAs(ctx context.Context) (map[string]string, error)
	ConfigMap(ctx context.Context, namespace, name string) (map[string]string, error)
	// PutConfigMap changes the named entries, if the ConfigMap is as it was read.
	PutConfigMap(ctx context.Context, namespace, name string, change func(data map[string]string) error) error
	DeleteConfigMap(ctx context.Context, namespace, name string) error
	// TokenSecrets lists the Secrets of type kubernetes.io/service-account-token.
	TokenSecrets(ctx context.Context) ([]TokenSecret, error)
	// BlankToken empties the token of such a Secret, so that the controller manager makes a new one.
	BlankToken(ctx context.Context, namespace, name string) error
	// CABundles lists every CA bundle of webhook configurations, APIServices and
	// conversion webhooks of custom resources.
	CABundles(ctx context.Context) ([]CABundle, error)
	// PutCABundle changes one; the present bundle must share a certificate with the
	// new one, or it is fault.Conflict.
	PutCABundle(ctx context.Context, b CABundle) error
}

// Node is a node of the cluster.
type Node struct {
	Name     string
	Address  string // internal IP
	Master   bool
	Ready    bool
	Seen     time.Time // last sign of life of its kubelet: its lease, renewed every ten seconds
	OS       string    // "linux" or "windows"
	Version  string    // of the kubelet
	Endpoint string    // host:port of its API server; empty on a worker
}

// Pod is what the engine asks about a pod.
type Pod struct {
	Namespace, Name, Node string
	Owner                 string // "Deployment/web"; empty: none
	Created               time.Time
	TokenTTL              time.Duration // the longest lifetime of its projected service account tokens; zero: it has none
	Mirror                bool          // a static pod: no token, no owner
}

// Signed is a certificate that the controller manager signed on request.
type Signed struct {
	PEM []byte
	At  time.Time // of the request
}

// TokenSecret is a Secret that holds a token of a service account.
type TokenSecret struct {
	Namespace, Name string
	Token           string // secret
	CA              string // ca.crt
}

// CABundle is one place in the API that names the CA of something called by an API server.
type CABundle struct {
	Kind  string // "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration", "APIService", "CustomResourceDefinition"
	Name  string
	Index int    // of the webhook; 0 otherwise
	PEM   []byte // decoded
}

// Etcd is the cluster's etcd, as an administrator speaks to it.
type Etcd interface {
	Members(ctx context.Context) ([]EtcdMember, error)
	// MoveLeader makes the member the leader; it asks the present one.
	MoveLeader(ctx context.Context, to uint64) error
	// Snapshot writes a snapshot of the database of one member.
	Snapshot(ctx context.Context, w io.Writer) error
	Get(ctx context.Context, key string) ([]byte, error)
	// Put writes several keys in one transaction.
	Put(ctx context.Context, pairs map[string][]byte) error
	Close() error
}

// EtcdMember is a member and how it is.
type EtcdMember struct {
	ID        uint64
	Name      string
	ClientURL string
	PeerURL   string
	Leader    bool
	Err       error // why it does not answer; nil: it does
}

// OpenEtcd connects to members, "host:port", with a client certificate.
type OpenEtcd func(ctx context.Context, members []string, as Credential) (Etcd, error)
