package pool

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"sync"

	"github.com/smallstep/pkcs7"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Protected is an extension's protectedSettings: a JSON object that callers
// write and never read. It prints as [redacted]; only its JSON form, which
// goes into the sealed store, holds the value.
type Protected json.RawMessage

// String hides the value.
func (Protected) String() string { return "[redacted]" }

// Format hides the value from every verb.
func (Protected) Format(s fmt.State, _ rune) { fmt.Fprint(s, "[redacted]") }

// LogValue hides the value from slog.
func (Protected) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// MarshalJSON is for the store.
func (p Protected) MarshalJSON() ([]byte, error) {
	if len(p) == 0 {
		return []byte("null"), nil
	}
	return p, nil
}

// UnmarshalJSON is for the store.
func (p *Protected) UnmarshalJSON(b []byte) error {
	if bytes.Equal(b, []byte("null")) {
		*p = nil
		return nil
	}
	*p = append((*p)[:0:0], b...)
	return nil
}

// Empty reports whether nothing is protected: absent, null and {} mean the same.
func (p Protected) Empty() bool {
	switch string(bytes.Join(bytes.Fields(p), nil)) {
	case "", "null", "{}":
		return true
	}
	return false
}

// transportCertificate parses the certificate to which a node's protected
// settings are encrypted.
func transportCertificate(text string) (*x509.Certificate, error) {
	bad := fault.New(fault.Invalid, "InvalidPropertyValue", "The transport certificate must be a PEM block with an RSA certificate.").At("transport")
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, bad
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, bad.Because(err)
	}
	if cert.PublicKeyAlgorithm != x509.RSA {
		return nil, bad
	}
	return cert, nil
}

// useAES256 turns the library away from its default, DES. The library has only
// this process-wide switch.
var useAES256 = sync.OnceFunc(func() { pkcs7.ContentEncryptionAlgorithm = pkcs7.EncryptionAlgorithmAES256CBC })

// encryptFor returns the base64 of a CMS EnvelopedData (RFC 5652, AES-256-CBC,
// which `openssl cms -decrypt` and so existing handlers read) of the protected
// settings, for the certificate's key only.
func (p Protected) encryptFor(cert *x509.Certificate) (string, error) {
	useAES256()
	der, err := pkcs7.Encrypt(p, []*x509.Certificate{cert})
	if err != nil {
		return "", fmt.Errorf("encrypting protected settings: %w", err)
	}
	return base64.StdEncoding.EncodeToString(der), nil
}
