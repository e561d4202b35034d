package agent

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha1" //nolint:gosec // the handler contract names keys by SHA-1 thumbprint
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/pki"
)

// What the agent is, in files of its state directory. Key and certificate are
// one file, so that no crash can leave a pair that does not match.
//
//	next.key       key that a certificate is being asked for; only while enrolling
//	agent.pem      the agent's key and certificate chain
//	ca.pem         the server's CA
//	node.json      the node's id and server
//	transport.pem  RSA key and certificate to which protected settings are encrypted
//	goal.json      the last goal state
//	action.json    the last action: asked for, being done, done
//	delivered.json certificates that extensions said they delivered
const (
	nextKeyFile   = "next.key"
	agentFile     = "agent.pem"
	caFile        = "ca.pem"
	nodeFile      = "node.json"
	transportFile = "transport.pem"
	goalFile      = "goal.json"
	actionFile    = "action.json"
	deliveredFile = "delivered.json"
)

// identity is what an enrolled agent proves itself with.
type identity struct {
	Node string
	Cert tls.Certificate
}

// leaf is the agent's certificate.
func (id *identity) leaf() *x509.Certificate { return id.Cert.Leaf }

// membership is node.json.
type membership struct {
	Node   string `json:"node"`
	Server string `json:"server"`
}

// openState makes the agent's directories and removes what a crash left unfinished.
func (a *Agent) openState() error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{a.cfg.LibDir, 0o755}, {a.cfg.LogDir, 0o755}, {a.cfg.StateDir, 0o700}} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("making the agent's directories: %w", err)
		}
	}
	if err := os.Chmod(a.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("making the state directory private: %w", err)
	}
	removeLeftovers(a.cfg.StateDir)
	removeLeftovers(a.cfg.LibDir)
	removeLeft(a.cfg.HostsFile + ".*" + tmpSuffix)
	return nil
}

func (a *Agent) statePath(name string) string { return filepath.Join(a.cfg.StateDir, name) }

// loadIdentity returns what an earlier enrolment left, or nil. Files that do
// not fit together count as not enrolled: enrolling again is the way out.
func (a *Agent) loadIdentity() (*identity, error) {
	text, err := readIfThere(a.statePath(agentFile))
	if err != nil || text == nil {
		return nil, err
	}
	var m membership
	about, err := readIfThere(a.statePath(nodeFile))
	if err != nil {
		return nil, err
	}
	if about == nil || json.Unmarshal(about, &m) != nil || m.Node == "" {
		return nil, nil
	}
	id, err := parseIdentity(m.Node, text)
	if err != nil {
		a.cfg.Log.Warn("the agent's key and certificate are not usable; enrolling again", "error", err)
		return nil, nil
	}
	return id, nil
}

// parseIdentity reads agent.pem.
func parseIdentity(node string, text []byte) (*identity, error) {
	cert, err := tls.X509KeyPair(text, text)
	if err != nil {
		return nil, fmt.Errorf("reading the agent's certificate: %w", err)
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, fmt.Errorf("reading the agent's certificate: %w", err)
		}
	}
	return &identity{Node: node, Cert: cert}, nil
}

// saveIdentity keeps a new key and chain. node.json goes first: agent.pem is what makes the agent enrolled.
func (a *Agent) saveIdentity(node string, key crypto.Signer, chain string) (*identity, error) {
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		return nil, err
	}
	text := append(keyPEM, chain...)
	id, err := parseIdentity(node, text)
	if err != nil {
		return nil, err
	}
	about, err := json.Marshal(membership{Node: node, Server: a.cfg.Server})
	if err != nil {
		return nil, err
	}
	if err := writeFile("node id", a.statePath(nodeFile), about, 0o600); err != nil {
		return nil, err
	}
	if err := writeFile("agent certificate", a.statePath(agentFile), text, 0o600); err != nil {
		return nil, err
	}
	return id, nil
}

// nextKey returns the key to enrol with. It is on disk before it is used: when
// the answer is lost, the same token is accepted again for the same key.
func (a *Agent) nextKey() (*ecdsa.PrivateKey, error) {
	text, err := readIfThere(a.statePath(nextKeyFile))
	if err != nil {
		return nil, err
	}
	if text != nil {
		if k, err := pki.ParseKey(text); err == nil {
			if ec, ok := k.(*ecdsa.PrivateKey); ok {
				return ec, nil
			}
		}
	}
	k, err := pki.NewKey(pki.P256)
	if err != nil {
		return nil, err
	}
	if text, err = pki.EncodeKey(k); err != nil {
		return nil, err
	}
	if err := writeFile("enrolment key", a.statePath(nextKeyFile), text, 0o600); err != nil {
		return nil, err
	}
	return k.(*ecdsa.PrivateKey), nil
}

// transport returns the certificate to which protected settings are encrypted,
// in PEM, and its thumbprint. Key and certificate also stand where handlers
// look for them: LibDir/THUMBPRINT.prv and .crt.
func (a *Agent) transport() (certPEM []byte, thumbprint string, err error) {
	text, err := readIfThere(a.statePath(transportFile))
	if err != nil {
		return nil, "", err
	}
	if text == nil {
		if text, err = newTransport(time.Now()); err != nil {
			return nil, "", err
		}
		if err := writeFile("transport key", a.statePath(transportFile), text, 0o600); err != nil {
			return nil, "", err
		}
	}
	key, err := pki.ParseKey(text)
	if err != nil {
		return nil, "", err
	}
	chain, err := pki.ParseChain(text)
	if err != nil {
		return nil, "", err
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		return nil, "", err
	}
	certPEM = pki.EncodeChain(chain[0].Raw)
	sum := sha1.Sum(chain[0].Raw) //nolint:gosec // see the import
	thumbprint = strings.ToUpper(hex.EncodeToString(sum[:]))
	for ext, data := range map[string][]byte{".prv": keyPEM, ".crt": certPEM} {
		path := filepath.Join(a.cfg.LibDir, thumbprint+ext)
		if old, _ := os.ReadFile(path); bytes.Equal(old, data) {
			continue
		}
		if err := writeFile("transport "+ext[1:], path, data, 0o600); err != nil {
			return nil, "", err
		}
	}
	return certPEM, thumbprint, nil
}

// newTransport makes an RSA key, which CMS key transport needs, and its self-signed certificate.
func newTransport(now time.Time) ([]byte, error) {
	key, err := pki.NewKey(pki.RSA2048)
	if err != nil {
		return nil, err
	}
	cert, err := pki.SelfSign(pki.Template{
		Subject: "CN=Keyfleet node transport", KeyUsage: x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment,
		NotBefore: now.Add(-pki.Backdate), NotAfter: now.AddDate(10, 0, 0),
	}, key)
	if err != nil {
		return nil, err
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		return nil, err
	}
	return append(keyPEM, pki.EncodeChain(cert)...), nil
}

// checkCA compares a CA certificate with a pin: the SHA-256 of its public key,
// as the server prints it, or of the whole certificate, as openssl prints it.
func checkCA(ca []byte, pin string) error {
	chain, err := pki.ParseChain(ca)
	if err != nil {
		return err
	}
	pin = strings.ToLower(strings.TrimSpace(pin))
	whole := sha256.Sum256(chain[0].Raw)
	if pin != pki.PublicKeyHash(chain[0]) && pin != "sha256:"+hex.EncodeToString(whole[:]) {
		return fmt.Errorf("the server's CA has the hash %s, and %s was expected: this is another server, or somebody is in between", pki.PublicKeyHash(chain[0]), pin)
	}
	return nil
}

// renewAt is when to ask for the next certificate: after half of the life, plus
// or minus a tenth of it, drawn by spread in [0, 1), so that nodes that enrolled
// together do not renew together. The life begins when the certificate was
// issued; it is valid from a little before.
func renewAt(cert *x509.Certificate, spread float64) time.Time {
	issued := cert.NotBefore.Add(pki.Backdate)
	life := cert.NotAfter.Sub(issued)
	return issued.Add(time.Duration(float64(life) * (0.4 + 0.2*spread)))
}

// retryAfter is how long to wait before the n-th retry (from 0): full jitter
// (drawn by spread in [0, 1)) under a bound that doubles from base to limit.
func retryAfter(n int, base, limit time.Duration, spread float64) time.Duration {
	bound := limit
	if n < 20 && base<<n < limit {
		bound = base << n
	}
	return time.Duration(float64(bound) * spread)
}

// spread draws a number in [0, 1).
func spread() float64 { return rand.Float64() }

// errExpired is the end of an agent that was away longer than its certificate lived.
var errExpired = errors.New("the agent's certificate has run out and there is no usable join token; " +
	"make a token (keyfleet node token --pool POOL) and run keyfleet-agent join again, or reimage the node; extensions keep their last state")
