// Package pki makes keys and certificates: key pairs, certificate requests,
// certificates signed by themselves or by a CA, chains, PEM and PKCS#12 files,
// and the arithmetic of when a certificate is due for renewal.
//
// Idea: everything is a function from values to values. A [Template] says what
// a certificate is to contain; [SelfSign] or [CA.Issue] turn it, with a public
// key, into DER. Time is always an argument. Nothing here reads or writes a
// file, keeps a global or starts a goroutine.
//
// Invariant: serial numbers are 127 random bits; NotBefore lies [Backdate]
// before the time of issue, so a node whose clock is a little slow accepts what
// it was just given; a certificate never outlives the CA that signed it; a key
// from a request is used only after the request's own signature was checked.
//
// Consequence for the operator: certificates are plain X.509 (RFC 5280) that
// any tool reads, private keys are PKCS#8, and the CA is one certificate and
// one key that can be replaced by the operator's own.
package pki

import (
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"
)

// Backdate is how long before the moment of issue a certificate starts to be
// valid: the clocks of a fleet disagree by minutes.
const Backdate = 5 * time.Minute

// Template says what a certificate or a certificate request contains besides its key.
type Template struct {
	Subject   string // RFC 4514, "CN=www.example.org,O=Example"; empty where there are names below
	DNSNames  []string
	Emails    []string
	UPNs      []string // user principal names (otherName 1.3.6.1.4.1.311.20.2.3)
	IPs       []net.IP
	URIs      []*url.URL
	EKUs      []string // extended key usages as dotted OIDs; empty: none
	KeyUsage  x509.KeyUsage
	NotBefore time.Time // not used in requests
	NotAfter  time.Time // not used in requests
}

// Thumbprint is the SHA-1 of a certificate's DER, which Key Vault calls x5t. It
// names a certificate and protects nothing.
func Thumbprint(der []byte) [20]byte {
	return sha1.Sum(der)
}

// newSerial returns a random positive serial number of at most 127 bits.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// errEmptyName is returned for a template that names nobody.
var errEmptyName = errors.New("the certificate names nobody: neither a subject nor a subject alternative name")

// x509 turns the template into the standard library's form. isRequest leaves out what only certificates have.
func (t Template) x509() (*x509.Certificate, error) {
	c := &x509.Certificate{
		DNSNames: t.DNSNames, EmailAddresses: t.Emails, IPAddresses: t.IPs, URIs: t.URIs,
		KeyUsage: t.KeyUsage, NotBefore: t.NotBefore.UTC(), NotAfter: t.NotAfter.UTC(), BasicConstraintsValid: true,
	}
	if t.Subject != "" {
		raw, err := ParseSubject(t.Subject)
		if err != nil {
			return nil, err
		}
		c.RawSubject = raw
	} else if len(t.DNSNames)+len(t.Emails)+len(t.UPNs)+len(t.IPs)+len(t.URIs) == 0 {
		return nil, errEmptyName
	}
	for _, s := range t.EKUs {
		oid, err := ParseOID(s)
		if err != nil {
			return nil, err
		}
		if eku, ok := extKeyUsage(oid); ok {
			c.ExtKeyUsage = append(c.ExtKeyUsage, eku)
		} else {
			c.UnknownExtKeyUsage = append(c.UnknownExtKeyUsage, oid)
		}
	}
	if len(t.UPNs) > 0 {
		ext, err := t.altNames()
		if err != nil {
			return nil, err
		}
		c.ExtraExtensions = append(c.ExtraExtensions, ext)
	}
	return c, nil
}
