package pki

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"software.sslmate.com/src/go-pkcs12"
)

// maxPFX bounds the PKCS#12 input that [DecodePFX] looks at.
const maxPFX = 1 << 20

// EncodeChain renders certificates in PEM, in the order given.
func EncodeChain(ders ...[]byte) []byte {
	var out []byte
	for _, d := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
	}
	return out
}

// ParseChain reads all certificates of a PEM text, in order; other blocks (a
// private key) are passed over. At least one certificate must be there.
func ParseChain(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxPEM {
		return nil, errors.New("reading certificates: the PEM text is over 1 MiB")
	}
	var out []*x509.Certificate
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading certificate %d: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("reading certificates: there is no PEM block CERTIFICATE")
	}
	return out, nil
}

// EncodePFX renders a key and its chain (leaf first) as PKCS#12 (RFC 7292) with
// an empty password, as Key Vault does. With a nil key only the certificates
// are in it. AES-256 and SHA-256: OpenSSL 1.1, Java 8u301 and Windows Server
// 2019 and later read it.
func EncodePFX(key crypto.Signer, chain [][]byte) ([]byte, error) {
	certs := make([]*x509.Certificate, len(chain))
	for i, d := range chain {
		c, err := x509.ParseCertificate(d)
		if err != nil {
			return nil, fmt.Errorf("reading certificate %d: %w", i+1, err)
		}
		certs[i] = c
	}
	if len(certs) == 0 {
		return nil, errors.New("encoding PKCS#12: there is no certificate")
	}
	// With an empty password, rounds of key derivation cost time and protect nothing.
	enc := pkcs12.Modern2023.WithIterations(1)
	var (
		out []byte
		err error
	)
	if key == nil {
		out, err = enc.EncodeTrustStore(certs, "")
	} else {
		out, err = enc.Encode(key, certs[0], certs[1:], "")
	}
	if err != nil {
		return nil, fmt.Errorf("encoding PKCS#12: %w", err)
	}
	return out, nil
}

// DecodePFX reads a PKCS#12 file with one key and its chain, leaf first.
// Errors never contain the input. It is for files from a source that is trusted
// (a vault): the file itself says how many rounds of key derivation it takes.
func DecodePFX(data []byte, password string) (crypto.Signer, []*x509.Certificate, error) {
	if len(data) > maxPFX {
		return nil, nil, errors.New("reading PKCS#12: it is over 1 MiB")
	}
	k, leaf, cas, err := pkcs12.DecodeChain(data, password)
	if err != nil {
		return nil, nil, fmt.Errorf("reading PKCS#12: %w", err)
	}
	key, ok := k.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("reading PKCS#12: a key of type %T is not accepted", k)
	}
	return key, append([]*x509.Certificate{leaf}, cas...), nil
}
