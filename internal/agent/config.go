package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Config is what an agent needs to know. It can be read from a JSON file with
// [ReadConfig]; the fields without a JSON name are for programs.
type Config struct {
	// Server is the URL of the node host: https://node.keyfleet.internal:8443. Must be set.
	Server string `json:"server"`
	// Address is where the server is dialled, "IP" or "IP:PORT", when its name
	// does not resolve yet; it is also what the hosts block points to. Empty: Server's name is resolved.
	Address string `json:"address,omitempty"`
	// CAFile is a file with the CA certificate in PEM, CAHash the hash of its
	// public key or of the whole certificate, "sha256:HEX". One of the two must be set until the node is enrolled;
	// with the hash alone the CA is fetched from the server and compared.
	CAFile string `json:"caFile,omitempty"`
	CAHash string `json:"caHash,omitempty"`
	// Token is the join token, TokenFile a file that holds it. It is needed
	// until the node is enrolled, and again if its certificate ran out.
	Token     Token  `json:"token,omitempty"`
	TokenFile string `json:"tokenFile,omitempty"`
	// Pool is the pool that the token was made for, as a resource id or its
	// last part; the goal state must agree. Empty: whatever the server says.
	Pool string `json:"pool,omitempty"`
	// Hostname is what the machine calls itself; empty: what the kernel says.
	Hostname string `json:"hostname,omitempty"`

	LibDir   string `json:"libDir,omitempty"`   // packages and keys; empty: /var/lib/waagent
	LogDir   string `json:"logDir,omitempty"`   // logs of extensions; empty: /var/log/azure
	StateDir string `json:"stateDir,omitempty"` // the agent's own; empty: LibDir/keyfleet

	// IMDS is where the identity endpoint listens; empty: 169.254.169.254:80, "off": nowhere.
	IMDS string `json:"imds,omitempty"`
	// ClaimIMDS puts the address of IMDS on the loopback device if the machine
	// does not have it; refused on machines of a cloud, where it leads to the cloud's own.
	ClaimIMDS bool `json:"claimImds,omitempty"`
	// ManageHosts keeps a marked block in HostsFile (empty: /etc/hosts), so that the server's names resolve.
	ManageHosts bool   `json:"manageHosts,omitempty"`
	HostsFile   string `json:"hostsFile,omitempty"`
	// RebootCommand restarts the machine when the server asks for it; empty:
	// Run returns [ErrReboot], and who started the agent restarts the node.
	RebootCommand []string `json:"rebootCommand,omitempty"`

	Version    string       `json:"-"` // of the agent, for reports
	Log        *slog.Logger `json:"-"` // nil: discarded
	IMDSListen net.Listener `json:"-"` // instead of IMDS
	Timeouts   Timeouts     `json:"-"` // zero: those of the handler contract
	// Session opens an interactive session that the server announced and
	// returns when it is over: [ServeSession]. Nil: announcements are ignored.
	Session func(ctx context.Context, a *Agent, id, kind string) `json:"-"`
}

// Timeouts are the handler contract's; a zero field is its default.
type Timeouts struct {
	Install    time.Duration // install, update, disable; 15 min
	Enable     time.Duration // enable, uninstall; 5 min
	Dependency time.Duration // until an extension that others depend on succeeds; 90 min
	Retry      time.Duration // before a failed extension is tried again, doubled up to 180 times as much; 5 s
	Poll       time.Duration // between looks at status files; 250 ms
	Report     time.Duration // between reports without news; 30 s
	Unreadable time.Duration // how long a status file may be half written; 10 s
}

// Token is a join token. It prints as [redacted].
type Token string

// String hides the token from logs and messages.
func (Token) String() string { return "[redacted]" }

// GoString hides the token from %#v.
func (Token) GoString() string { return "[redacted]" }

// LogValue hides the token from log attributes.
func (Token) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// ReadConfig reads a configuration file. Unknown members are an error: a typing
// error must not become a default.
func ReadConfig(path string) (Config, error) {
	var c Config
	f, err := os.Open(path)
	if err != nil {
		return c, fmt.Errorf("reading configuration: %w", err)
	}
	defer f.Close()
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return c, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return c, nil
}

// complete checks the configuration and fills in the defaults.
func (c *Config) complete() error {
	u, err := url.Parse(c.Server)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("the server must be given as https://NAME[:PORT], not %q", c.Server)
	}
	if _, err := netip.ParseAddr(u.Hostname()); err == nil {
		return fmt.Errorf("the server %q is an address; give the name of its node host as server and this address as address", c.Server)
	}
	c.Server = "https://" + u.Host
	if c.Address != "" {
		if c.Address, err = hostPort(c.Address, u.Port()); err != nil {
			return err
		}
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.LibDir, "/var/lib/waagent")
	def(&c.LogDir, "/var/log/azure")
	def(&c.StateDir, filepath.Join(c.LibDir, "keyfleet"))
	def(&c.IMDS, "169.254.169.254:80")
	def(&c.HostsFile, "/etc/hosts")
	def(&c.Version, "dev")
	if c.Hostname == "" {
		c.Hostname, _ = os.Hostname() // empty is answered by the server, which only shows it
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Timeouts.complete()
	return nil
}

func (t *Timeouts) complete() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&t.Install, 15*time.Minute)
	def(&t.Enable, 5*time.Minute)
	def(&t.Dependency, 90*time.Minute)
	def(&t.Retry, 5*time.Second)
	def(&t.Poll, 250*time.Millisecond)
	def(&t.Report, 30*time.Second)
	def(&t.Unreadable, 10*time.Second)
}

// hostPort completes "IP" or "IP:PORT" with a port ("" means 443).
func hostPort(address, port string) (string, error) {
	if ap, err := netip.ParseAddrPort(address); err == nil {
		return ap.String(), nil
	}
	ip, err := netip.ParseAddr(strings.Trim(address, "[]"))
	if err != nil {
		return "", fmt.Errorf("the address must be IP or IP:PORT, not %q", address)
	}
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(ip.String(), port), nil
}

// token returns the join token, or "" when there is none.
func (c *Config) token() (Token, error) {
	if c.Token != "" || c.TokenFile == "" {
		return c.Token, nil
	}
	b, err := os.ReadFile(c.TokenFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("reading join token: %w", err)
	}
	return Token(strings.TrimSpace(string(b))), nil
}
