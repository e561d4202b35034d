package server

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

// authoritySpec is a CA of this installation; its key is sealed like everything in the store.
type authoritySpec struct {
	Certificate string `json:"certificate"` // PEM
	Key         string `json:"privateKey"`  // PEM
}

// authorities holds two: "transport" signs the certificates of the server's
// names and of the agents; "issuer" is the vault's built-in issuer.
var authorities = store.NewCollection[authoritySpec, struct{}]("authorities")

// loadAuthority returns the CA of that id, made on first use.
func loadAuthority(ctx context.Context, s *store.Store, id, commonName string) (*pki.CA, error) {
	var ca *pki.CA
	err := s.Update(ctx, func(tx *store.Tx) error {
		o, err := authorities.Lookup(tx, id)
		if err != nil {
			return err
		}
		if o != nil {
			ca, err = pki.LoadCA([]byte(o.Spec.Certificate), []byte(o.Spec.Key))
			return err
		}
		if ca, err = pki.NewCA(commonName, time.Now()); err != nil {
			return err
		}
		key, err := ca.KeyPEM()
		if err != nil {
			return err
		}
		return authorities.Insert(tx, &store.Object[authoritySpec, struct{}]{
			Meta: store.Meta{ID: id}, Spec: authoritySpec{Certificate: string(ca.PEM()), Key: string(key)},
		})
	})
	if err != nil {
		return nil, fmt.Errorf("loading the %s authority: %w", id, err)
	}
	return ca, nil
}

const (
	serverCertificateLife = 7 * 24 * time.Hour
	maxServerNames        = 4096 // certificates kept; beyond it the oldest names are made anew on use
)

// minter makes server certificates for the names that clients ask for, one a
// name, all for one key of this process. Names outside the configured
// suffixes get the certificate of the listen address.
type minter struct {
	ca     *pki.CA
	key    crypto.Signer
	serves func(host string) bool
	local  []string // names and addresses of the listen socket

	mu    sync.Mutex // guards certs
	certs map[string]*tls.Certificate
}

func newMinter(ca *pki.CA, serves func(string) bool, listen string) (*minter, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the server's key: %w", err)
	}
	m := &minter{ca: ca, key: key, serves: serves, certs: map[string]*tls.Certificate{}, local: []string{"localhost", "127.0.0.1", "::1"}}
	if host, _, err := net.SplitHostPort(listen); err == nil && host != "" && net.ParseIP(host) != nil && !net.ParseIP(host).IsUnspecified() {
		m.local = append(m.local, host)
	}
	return m, nil
}

// certificate implements tls.Config.GetCertificate.
func (m *minter) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
	hosts := []string{name}
	if name == "" || !m.serves(name) {
		name, hosts = "", m.local
	}
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.certs[name]; c != nil && now.Before(c.Leaf.NotAfter.Add(-serverCertificateLife/2)) {
		return c, nil
	}
	if len(m.certs) >= maxServerNames {
		clear(m.certs)
	}
	text, err := m.ca.IssueServer(hosts, m.key.Public(), now, serverCertificateLife)
	if err != nil {
		return nil, fault.New(fault.Internal, "", "no certificate for %q", name).Because(err)
	}
	chain, err := pki.ParseChain(text)
	if err != nil {
		return nil, fmt.Errorf("reading back a server certificate: %w", err)
	}
	c := &tls.Certificate{PrivateKey: m.key, Leaf: chain[0]}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	m.certs[name] = c
	return c, nil
}
