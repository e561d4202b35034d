package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// Kind is a sort of key that Keyfleet makes.
type Kind string

// The kinds of keys.
const (
	RSA2048 Kind = "RSA-2048"
	RSA3072 Kind = "RSA-3072"
	RSA4096 Kind = "RSA-4096"
	P256    Kind = "P-256"
	P384    Kind = "P-384"
	P521    Kind = "P-521"
)

// maxPEM bounds the PEM input that the parsers look at.
const maxPEM = 1 << 20

// NewKey makes a key pair. An RSA key takes tenths of a second to seconds, an EC key microseconds.
func NewKey(k Kind) (crypto.Signer, error) {
	switch k {
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA3072:
		return rsa.GenerateKey(rand.Reader, 3072)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	case P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case P521:
		return ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	}
	return nil, fmt.Errorf("pki: %q is not a kind of key", k)
}

// KindOf returns the kind of a public key, or an error for one that we would not make.
func KindOf(pub crypto.PublicKey) (Kind, error) {
	switch p := pub.(type) {
	case *rsa.PublicKey:
		switch p.N.BitLen() {
		case 2048, 3072, 4096:
			return Kind(fmt.Sprintf("RSA-%d", p.N.BitLen())), nil
		}
		return "", fmt.Errorf("an RSA key of %d bits is not accepted; use 2048, 3072 or 4096", p.N.BitLen())
	case *ecdsa.PublicKey:
		switch p.Curve {
		case elliptic.P256():
			return P256, nil
		case elliptic.P384():
			return P384, nil
		case elliptic.P521():
			return P521, nil
		}
		return "", fmt.Errorf("the elliptic curve %s is not accepted; use P-256, P-384 or P-521", p.Params().Name)
	}
	return "", fmt.Errorf("a key of type %T is not accepted; use RSA or EC", pub)
}

// EncodeKey renders a private key as PKCS#8 in PEM ("PRIVATE KEY", RFC 5958).
func EncodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseKey reads the first private key of a PEM text: PKCS#8, PKCS#1 or SEC 1.
// Errors never contain the input.
func ParseKey(text []byte) (crypto.Signer, error) {
	if len(text) > maxPEM {
		return nil, errors.New("reading private key: the PEM text is over 1 MiB")
	}
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return nil, errors.New("reading private key: there is no PEM block with a private key")
		}
		switch b.Type {
		case "PRIVATE KEY":
			return ParsePKCS8(b.Bytes)
		case "RSA PRIVATE KEY":
			return checked(x509.ParsePKCS1PrivateKey(b.Bytes))
		case "EC PRIVATE KEY":
			return checked(x509.ParseECPrivateKey(b.Bytes))
		}
	}
}

// ParsePKCS8 reads a private key in DER.
func ParsePKCS8(der []byte) (crypto.Signer, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	s, ok := k.(crypto.Signer)
	if err == nil && !ok {
		err = errors.New("it is not a signing key")
	}
	return checked(s, err)
}

// checked refuses keys of kinds that we would not make.
func checked[K crypto.Signer](k K, err error) (crypto.Signer, error) {
	if err != nil {
		return nil, fmt.Errorf("reading private key: %w", err)
	}
	if _, err := KindOf(k.Public()); err != nil {
		return nil, fmt.Errorf("reading private key: %w", err)
	}
	return k, nil
}
