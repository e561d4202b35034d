package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// maxCSR bounds a certificate request: one with an RSA-4096 key and a dozen names has 2 KiB.
const maxCSR = 16 << 10

// NewCSR makes a certificate request (PKCS#10, RFC 2986) in PEM. Dates and key
// usages of the template are not part of it. A request may name nobody: the
// one who issues decides the name.
func NewCSR(key crypto.Signer, t Template) ([]byte, error) {
	r := &x509.CertificateRequest{DNSNames: t.DNSNames, EmailAddresses: t.Emails, IPAddresses: t.IPs, URIs: t.URIs}
	if t.Subject != "" {
		raw, err := ParseSubject(t.Subject)
		if err != nil {
			return nil, err
		}
		r.RawSubject = raw
	}
	if len(t.UPNs) > 0 {
		ext, err := t.altNames()
		if err != nil {
			return nil, err
		}
		r.ExtraExtensions = append(r.ExtraExtensions, ext)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		return nil, fmt.Errorf("making certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ParseCSR reads a certificate request from PEM. It checks the request's
// signature, so the sender holds the key, and the kind of the key.
func ParseCSR(text []byte) (*x509.CertificateRequest, error) {
	if len(text) > maxCSR {
		return nil, fmt.Errorf("reading certificate request: it has %d bytes, over the limit of %d", len(text), maxCSR)
	}
	b, _ := pem.Decode(text)
	if b == nil || (b.Type != "CERTIFICATE REQUEST" && b.Type != "NEW CERTIFICATE REQUEST") {
		return nil, errors.New("reading certificate request: there is no PEM block CERTIFICATE REQUEST")
	}
	r, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("reading certificate request: its signature is wrong: %w", err)
	}
	if _, err := KindOf(r.PublicKey); err != nil {
		return nil, fmt.Errorf("reading certificate request: %w", err)
	}
	return r, nil
}
