package pki

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"regexp"
	"time"
)

// Successor is a CA that takes the place of another.
type Successor struct {
	Key  crypto.Signer
	Root []byte // DER, self-signed
	// Cross is the same key and subject certified by the old CA, in DER: whoever
	// knows only the old CA accepts what the new one issued, if it comes with the
	// chain. It ends with the old CA, and is nil if that has ended.
	Cross []byte
}

// dated is the end of a subject's common name that a former Succeed wrote.
var dated = regexp.MustCompile(`-\d{8}-[0-9a-f]{8}$`)

// Succeed makes the successor of a CA: a key of the same kind, and a subject of
// its own, CN=NAME-YYYYMMDD-HASH. With the subject of the old CA, OpenSSL would
// take the old certificate for the new one's issuer and refuse the chain. Without
// the old CA's key there is no cross certificate.
func Succeed(old *x509.Certificate, oldKey crypto.Signer, now time.Time, life time.Duration) (*Successor, error) {
	kind, err := KindOf(old.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("succeeding %s: %w", old.Subject, err)
	}
	key, err := NewKey(kind)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding a public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	subject := pkix.Name{CommonName: dated.ReplaceAllString(old.Subject.CommonName, "") + now.UTC().Format("-20060102-") + hex.EncodeToString(sum[:4]), Organization: old.Subject.Organization}
	// The CA's names are those that verifiers look for in some of them (kubeadm's carry DNS:kubernetes).
	tmpl := &x509.Certificate{
		Subject: subject, SubjectKeyId: sum[:20], DNSNames: old.DNSNames,
		NotBefore: now.Add(-time.Hour).UTC(), NotAfter: now.Add(life).UTC(),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	s := &Successor{Key: key}
	if s.Root, err = create(tmpl, tmpl, key.Public(), key); err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(s.Root)
	if err != nil {
		return nil, fmt.Errorf("reading the new CA: %w", err)
	}
	s.Cross, err = Cross(root, old, oldKey, now)
	return s, err
}

// Cross certifies a new CA by the old: see [Successor]. It is nil where the old CA
// has ended, may have no CA below it, or has no key any more.
func Cross(root, old *x509.Certificate, oldKey crypto.Signer, now time.Time) ([]byte, error) {
	if oldKey == nil {
		return nil, nil
	}
	if !Matches(old, oldKey) {
		return nil, fmt.Errorf("succeeding %s: its private key does not belong to it", old.Subject)
	}
	if !now.Before(old.NotAfter) || old.MaxPathLenZero {
		return nil, nil
	}
	end := root.NotAfter
	if end.After(old.NotAfter) {
		end = old.NotAfter
	}
	cross, err := create(&x509.Certificate{
		RawSubject: root.RawSubject, SubjectKeyId: root.SubjectKeyId, DNSNames: root.DNSNames,
		NotBefore: root.NotBefore, NotAfter: end, KeyUsage: root.KeyUsage, BasicConstraintsValid: true, IsCA: true,
	}, old, root.PublicKey, oldKey)
	if err != nil {
		return nil, fmt.Errorf("certifying the new CA by the old: %w", err)
	}
	return cross, nil
}

// Reissue certifies a key as another certificate is certified: the same
// subject, names and usages; a serial number, validity and issuer of its own.
func Reissue(like *x509.Certificate, pub crypto.PublicKey, ca *x509.Certificate, caKey crypto.Signer, now time.Time, life time.Duration) ([]byte, error) {
	end := now.Add(life)
	if end.After(ca.NotAfter) {
		end = ca.NotAfter
	}
	return create(&x509.Certificate{
		RawSubject: like.RawSubject, DNSNames: like.DNSNames, IPAddresses: like.IPAddresses, URIs: like.URIs, EmailAddresses: like.EmailAddresses,
		KeyUsage: like.KeyUsage, ExtKeyUsage: like.ExtKeyUsage, UnknownExtKeyUsage: like.UnknownExtKeyUsage, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour).UTC(), NotAfter: end.UTC(),
	}, ca, pub, caKey)
}
