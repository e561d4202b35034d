package rotation

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// How the engine speaks to the cluster: with credentials of its own that live a
// day and are made from the CA, so that an expired administrator's kubeconfig is
// no obstacle.

// us is the name by which API servers know the engine.
const us = "keyfleet-rotate-certs"

// ownLife is how long our own credentials are good.
const ownLife = 24 * time.Hour

// retiring reports whether the old may be refused somewhere already.
func (e *Engine) retiring() bool {
	if e.Plan.Scope.Apart {
		return e.material != nil
	}
	state := e.Journal.State()
	for _, s := range e.Plan.Steps {
		if s.NoReturn {
			return state.Steps[s.Name()] != ""
		}
	}
	return false
}

// succession returns an authority; before the new material is made, as it is now.
func (e *Engine) succession(ctx context.Context, a Authority) (*Succession, error) {
	if e.material != nil {
		return e.material.Authorities[a], nil
	}
	first := e.Observed.masters()[0]
	key, err := e.read(ctx, first.Name, e.Layout.rootKey(a))
	if err != nil {
		return nil, err
	}
	root := first.Files[e.Layout.rootFile(a)].Content
	return &Succession{Old: root, OldKey: key, New: root, NewKey: key}, nil
}

// credential is a client certificate of an authority, new or old, that names
// somebody. It trusts old and new.
func (s *Succession) credential(fresh bool, name pkix.Name, now time.Time) (Credential, error) {
	rootPEM, keyPEM := s.Old, s.OldKey
	switch {
	case fresh:
		rootPEM, keyPEM = s.New, s.NewKey
	case keyPEM == nil && s.Holder != nil: // we can make none, but have one
		return Credential{Roots: s.both(), Cert: s.Holder.Cert, Key: s.Holder.Key}, nil
	}
	chain, err := pki.ParseChain(rootPEM)
	if err != nil {
		return Credential{}, err
	}
	issuer, err := pki.ParseKey(keyPEM)
	if err != nil {
		return Credential{}, err
	}
	subject, err := asn1.Marshal(name.ToRDNSequence())
	if err != nil {
		return Credential{}, err
	}
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		return Credential{}, err
	}
	like := &x509.Certificate{RawSubject: subject, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := pki.Reissue(like, key.Public(), chain[0], issuer, now, ownLife)
	if err != nil {
		return Credential{}, err
	}
	c := Credential{Roots: s.both(), Cert: pki.EncodeChain(der)}
	if fresh {
		c.Cert = join(c.Cert, s.Cross)
	}
	c.Key, err = pki.EncodeKey(key)
	return c, err
}

// api opens the API server of a master as administrator.
func (e *Engine) api(node string) (API, error) {
	return e.apiAs(node, e.retiring(), pkix.Name{CommonName: us, Organization: []string{"system:masters"}})
}

func (e *Engine) apiAs(node string, fresh bool, name pkix.Name) (API, error) {
	s, err := e.succession(context.Background(), ClusterCA)
	if err != nil {
		return nil, err
	}
	c, err := s.credential(fresh, name, e.Now())
	if err != nil {
		return nil, err
	}
	return e.Connect(e.Observed.machine(node).Endpoint, c)
}

// anyAPI opens an API server that is ready.
func (e *Engine) anyAPI(ctx context.Context) (API, error) {
	var why error
	for _, m := range e.Observed.masters() {
		api, err := e.api(m.Name)
		if err == nil {
			if err = api.Ready(ctx); err == nil {
				return api, nil
			}
		}
		why = errors.Join(why, fmt.Errorf("%s: %w", m.Name, err))
	}
	return nil, fault.New(fault.Unavailable, "NoAPIServer", "No API server is ready.").Because(why)
}

// openEtcd opens the cluster's etcd.
func (e *Engine) openEtcd(ctx context.Context) (Etcd, error) {
	s, err := e.succession(ctx, e.Layout.EtcdBy)
	if err != nil {
		return nil, err
	}
	c, err := s.credential(e.retiring(), pkix.Name{CommonName: us}, e.Now())
	if err != nil {
		return nil, err
	}
	var members []string
	for _, m := range e.Observed.masters() {
		members = append(members, net.JoinHostPort(m.Address, e.Layout.EtcdPort))
	}
	return e.Etcd(ctx, members, c)
}

// serves returns the certificates that a server presents to anybody.
func (e *Engine) serves(ctx context.Context, address string) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := e.Dial.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var chain []*x509.Certificate
	c := tls.Client(conn, &tls.Config{
		InsecureSkipVerify: true, // we only look at what is presented
		VerifyConnection:   func(s tls.ConnectionState) error { chain = s.PeerCertificates; return nil },
	})
	if err := c.HandshakeContext(ctx); err != nil && chain == nil { // one that asks for our certificate has shown its own
		return nil, err
	}
	return chain, nil
}

// signToken makes a token of a service account, as the API server would.
func signToken(keyPEM []byte, issuer, namespace, name, uid string, now time.Time) (string, error) {
	key, err := pki.ParseKey(keyPEM)
	if err != nil {
		return "", err
	}
	alg, err := algorithm(key.Public())
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, nil)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	claims := map[string]any{
		"iss": issuer, "aud": []string{issuer}, "sub": "system:serviceaccount:" + namespace + ":" + name,
		"iat": now.Add(-time.Minute).Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(10 * time.Minute).Unix(),
		"kubernetes.io": map[string]any{"namespace": namespace, "serviceaccount": map[string]any{"name": name, "uid": uid}},
	}
	return jwt.Signed(signer).Claims(claims).Serialize()
}

func algorithm(pub crypto.PublicKey) (jose.SignatureAlgorithm, error) {
	switch p := pub.(type) {
	case *rsa.PublicKey:
		return jose.RS256, nil
	case *ecdsa.PublicKey:
		switch p.Curve.Params().BitSize {
		case 256:
			return jose.ES256, nil
		case 384:
			return jose.ES384, nil
		case 521:
			return jose.ES512, nil
		}
	}
	return "", fmt.Errorf("tokens are not signed by keys of type %T", pub)
}
