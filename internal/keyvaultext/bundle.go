package keyvaultext

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math"
	"math/big"
	"strings"

	pkcs12 "software.sslmate.com/src/go-pkcs12"

	"keyfleet.dev/keyfleet/internal/fault"
)

// bundle is a certificate with its chain and its private key.
type bundle struct {
	leaf  *x509.Certificate
	chain []*x509.Certificate // after the leaf, in issuing order (RFC 5246 7.4.2), root last if present
	key   crypto.Signer
}

// parseBundle reads a certificate's secret: PKCS#12 in base64 with an empty
// password, or PEM. The private key must be there and belong to one of the
// certificates, which is the leaf.
func parseBundle(contentType string, value secret) (bundle, error) {
	text := strings.TrimSpace(value.reveal())
	var certs []*x509.Certificate
	var key crypto.Signer
	var err error
	switch {
	case strings.Contains(text, "-----BEGIN "):
		certs, key, err = parsePEM([]byte(text))
	case text == "":
		err = notCertificate("the secret is empty")
	default:
		certs, key, err = parsePFX(text, contentType)
	}
	if err != nil {
		return bundle{}, err
	}
	if key == nil {
		return bundle{}, fault.New(fault.Invalid, "NoPrivateKey", "The secret holds a certificate without its private key.").
			WithFix("create the certificate with an exportable key (key_props.exportable true) and a secret content type of its policy")
	}
	return order(certs, key)
}

func notCertificate(reason string) error {
	return fault.New(fault.Invalid, "NotACertificate", "The secret is not a certificate: %s.", reason).
		WithFix("observe the secret identifier of a Key Vault certificate (PKCS#12 or PEM)")
}

func parsePFX(text, contentType string) ([]*x509.Certificate, crypto.Signer, error) {
	der, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, nil, notCertificate("it is neither PEM nor base64 (content type " + firstNonEmpty(oneLine(contentType), "not set") + ")")
	}
	if most := iterations(der, 0); most > maxIterations {
		return nil, nil, notCertificate(fmt.Sprintf("its PKCS#12 asks for %d iterations to open, more than %d", most, maxIterations))
	}
	k, leaf, rest, err := pkcs12.DecodeChain(der, "")
	if err != nil {
		return nil, nil, notCertificate("it does not open as PKCS#12 with an empty password")
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, nil, notCertificate("its private key is of an unknown type")
	}
	return append([]*x509.Certificate{leaf}, rest...), signer, nil
}

// maxIterations bounds the work that a PKCS#12 may ask for: seconds, not hours.
const maxIterations = 5_000_000

// iterations finds the largest iteration count in the readable parts of a
// PKCS#12. All its key derivations write salt and count one after the other:
// an OCTET STRING, then an INTEGER (RFC 7292 appendix C, RFC 8018 appendix A).
func iterations(der []byte, depth int) int64 {
	var most int64
	afterSalt := false
	for len(der) > 0 && depth < 32 {
		var v asn1.RawValue
		rest, err := asn1.Unmarshal(der, &v)
		if err != nil {
			break // not DER here: encrypted, or a value
		}
		der = rest
		switch {
		case v.IsCompound || v.Class == asn1.ClassUniversal && v.Tag == asn1.TagOctetString:
			most = max(most, iterations(v.Bytes, depth+1))
		case afterSalt && v.Class == asn1.ClassUniversal && v.Tag == asn1.TagInteger:
			n := new(big.Int).SetBytes(v.Bytes)
			if !n.IsInt64() {
				return math.MaxInt64
			}
			most = max(most, n.Int64())
		}
		afterSalt = v.Class == asn1.ClassUniversal && v.Tag == asn1.TagOctetString
	}
	return most
}

func parsePEM(text []byte) (certs []*x509.Certificate, key crypto.Signer, err error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		switch {
		case block.Type == "CERTIFICATE":
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, notCertificate("one of its certificates cannot be read")
			}
			certs = append(certs, c)
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			if key != nil {
				return nil, nil, notCertificate("it holds more than one private key")
			}
			if key, err = parseKey(block); err != nil {
				return nil, nil, err
			}
		}
	}
	if len(certs) == 0 {
		return nil, nil, notCertificate("it holds no certificate")
	}
	return certs, key, nil
}

func parseKey(block *pem.Block) (crypto.Signer, error) {
	var k any
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		k, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		k, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		k, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	signer, ok := k.(crypto.Signer)
	if err != nil || !ok {
		return nil, notCertificate("its private key cannot be read") // the parser's words could quote the key
	}
	return signer, nil
}

// order puts the certificate of the key first and its issuers behind it.
// Certificates that are no part of that chain follow in the given order.
func order(certs []*x509.Certificate, key crypto.Signer) (bundle, error) {
	b := bundle{key: key}
	rest := make([]*x509.Certificate, 0, len(certs))
	for _, c := range certs {
		if public, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); ok && b.leaf == nil && public.Equal(key.Public()) {
			b.leaf = c
			continue
		}
		rest = append(rest, c)
	}
	if b.leaf == nil {
		return bundle{}, fault.New(fault.Invalid, "KeyMismatch", "The secret's private key does not belong to any of its certificates.").
			WithFix("import the certificate again with its own key")
	}
	for at := b.leaf; !bytes.Equal(at.RawIssuer, at.RawSubject); {
		next := -1
		for i, c := range rest {
			if bytes.Equal(c.RawSubject, at.RawIssuer) && (next < 0 || at.CheckSignatureFrom(c) == nil) {
				next = i
			}
		}
		if next < 0 {
			break
		}
		at = rest[next]
		b.chain = append(b.chain, at)
		rest = append(rest[:next], rest[next+1:]...)
	}
	b.chain = append(b.chain, rest...)
	return b, nil
}

// encode renders the file: leaf, chain, private key last (PKCS#8).
func (b bundle) encode() (secret, error) {
	var out bytes.Buffer
	for _, c := range append([]*x509.Certificate{b.leaf}, b.chain...) {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer takes everything
	}
	der, err := x509.MarshalPKCS8PrivateKey(b.key)
	if err != nil {
		return secret{}, notCertificate("its private key is of an unknown type")
	}
	_ = pem.Encode(&out, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return newSecret(out.String()), nil
}
