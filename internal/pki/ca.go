package pki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"
)

// caLife is how long a CA made by [NewCA] is valid.
const caLife = 10 * 365 * 24 * time.Hour

// Extended key usages of the certificates that servers and clients show each other (RFC 5280, 4.2.1.12).
const (
	ServerAuth = "1.3.6.1.5.5.7.3.1"
	ClientAuth = "1.3.6.1.5.5.7.3.2"
)

// CA is a certificate authority: a certificate and its private key. It holds
// no state and is safe for concurrent use. Make it with [NewCA] or [LoadCA].
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewCA makes a self-signed root with a P-256 key, valid for ten years, that
// signs end-entity certificates only.
func NewCA(name string, now time.Time) (*CA, error) {
	key, err := NewKey(P256)
	if err != nil {
		return nil, err
	}
	t, err := Template{
		Subject: "CN=" + EscapeSubject(name), NotBefore: now.Add(-Backdate), NotAfter: now.Add(caLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}.x509()
	if err != nil {
		return nil, err
	}
	t.IsCA, t.MaxPathLenZero = true, true
	der, err := create(t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading the new CA certificate: %w", err)
	}
	return &CA{cert: cert, key: key}, nil
}

// LoadCA reads a CA from PEM and checks that it may sign and that the key is its own.
func LoadCA(certPEM, keyPEM []byte) (*CA, error) {
	chain, err := ParseChain(certPEM)
	if err != nil {
		return nil, err
	}
	key, err := ParseKey(keyPEM)
	if err != nil {
		return nil, err
	}
	cert := chain[0]
	if !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("loading CA: the certificate of %q may not sign certificates", cert.Subject)
	}
	if !Matches(cert, key) {
		return nil, fmt.Errorf("loading CA: the private key does not belong to the certificate of %q", cert.Subject)
	}
	return &CA{cert: cert, key: key}, nil
}

// PEM is the CA's certificate.
func (ca *CA) PEM() []byte { return EncodeChain(ca.cert.Raw) }

// KeyPEM is the CA's private key in PKCS#8.
func (ca *CA) KeyPEM() ([]byte, error) { return EncodeKey(ca.key) }

// Certificate is the CA's certificate; it must not be changed.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Pool is a set of roots that holds this CA only.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.cert)
	return p
}

// Hash pins the CA's public key: "sha256:" and the hex SHA-256 of its
// SubjectPublicKeyInfo, as kubeadm writes it. It stays when the certificate is
// renewed with the same key.
func (ca *CA) Hash() string { return PublicKeyHash(ca.cert) }

// PublicKeyHash is [CA.Hash] for any certificate.
func PublicKeyHash(c *x509.Certificate) string {
	h := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return "sha256:" + hex.EncodeToString(h[:])
}

// Issue signs an end-entity certificate for the public key and returns the
// chain in DER, leaf first, with the CA's certificate at its end. NotAfter is
// cut to the CA's own; a CA that has ended is an error.
func (ca *CA) Issue(t Template, pub crypto.PublicKey) ([][]byte, error) {
	if t.NotAfter.After(ca.cert.NotAfter) {
		t.NotAfter = ca.cert.NotAfter
	}
	if !t.NotAfter.After(t.NotBefore) {
		return nil, fmt.Errorf("issuing: the CA %q is valid only until %s", ca.cert.Subject, ca.cert.NotAfter.Format(time.RFC3339))
	}
	tmpl, err := t.x509()
	if err != nil {
		return nil, err
	}
	der, err := create(tmpl, ca.cert, pub, ca.key)
	if err != nil {
		return nil, err
	}
	return [][]byte{der, ca.cert.Raw}, nil
}

// IssueServer signs a TLS server certificate for host names and IP addresses
// and returns the chain in PEM. The common name is the first host where it fits.
func (ca *CA) IssueServer(hosts []string, pub crypto.PublicKey, now time.Time, life time.Duration) ([]byte, error) {
	t := Template{EKUs: []string{ServerAuth}, KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: now.Add(-Backdate), NotAfter: now.Add(life)}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPs = append(t.IPs, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	if len(hosts) > 0 && len(hosts[0]) <= 64 { // the limit of CN in RFC 5280
		t.Subject = "CN=" + EscapeSubject(hosts[0])
	}
	return pemChain(ca.Issue(t, pub))
}

// IssueClient signs a TLS client certificate for the key of a checked request
// and returns the chain in PEM. The names in the request are ignored: the
// issuer decides who the holder is.
func (ca *CA) IssueClient(commonName string, uris []*url.URL, csr *x509.CertificateRequest, now time.Time, life time.Duration) ([]byte, error) {
	return pemChain(ca.Issue(Template{
		Subject: "CN=" + EscapeSubject(commonName), URIs: uris, EKUs: []string{ClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: now.Add(-Backdate), NotAfter: now.Add(life),
	}, csr.PublicKey))
}

// SelfSign makes a certificate signed by its own key, in DER.
func SelfSign(t Template, key crypto.Signer) ([]byte, error) {
	if !t.NotAfter.After(t.NotBefore) {
		return nil, errors.New("issuing: the certificate would end before it starts")
	}
	tmpl, err := t.x509()
	if err != nil {
		return nil, err
	}
	return create(tmpl, tmpl, key.Public(), key)
}

// create signs the template. The parent is the template itself for a self-signed certificate.
func create(t, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("signing certificate: %w", err)
	}
	return der, nil
}

func pemChain(chain [][]byte, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return EncodeChain(chain...), nil
}

// Matches reports whether the private key belongs to the certificate.
func Matches(c *x509.Certificate, key crypto.Signer) bool {
	a, err := x509.MarshalPKIXPublicKey(key.Public())
	return err == nil && bytes.Equal(a, c.RawSubjectPublicKeyInfo)
}
