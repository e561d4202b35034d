package pki

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxSubject bounds a distinguished name, in bytes.
const maxSubject = 4096

// attributeTypes are the short names of RFC 4514 section 3 and those that Windows and OpenSSL add.
var attributeTypes = map[string]asn1.ObjectIdentifier{
	"CN": {2, 5, 4, 3}, "SN": {2, 5, 4, 4}, "SERIALNUMBER": {2, 5, 4, 5}, "C": {2, 5, 4, 6}, "L": {2, 5, 4, 7},
	"ST": {2, 5, 4, 8}, "S": {2, 5, 4, 8}, "STREET": {2, 5, 4, 9}, "O": {2, 5, 4, 10}, "OU": {2, 5, 4, 11},
	"T": {2, 5, 4, 12}, "TITLE": {2, 5, 4, 12}, "POSTALCODE": {2, 5, 4, 17}, "G": {2, 5, 4, 42}, "GN": {2, 5, 4, 42},
	"I": {2, 5, 4, 43}, "INITIALS": {2, 5, 4, 43}, "DNQUALIFIER": {2, 5, 4, 46},
	"DC": {0, 9, 2342, 19200300, 100, 1, 25}, "UID": {0, 9, 2342, 19200300, 100, 1, 1},
	"E": oidEmail, "EMAIL": oidEmail, "EMAILADDRESS": oidEmail,
}

var (
	oidEmail   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}
	oidDC      = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}
	oidAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidUPN     = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 20, 2, 3}
)

// ParseSubject turns a distinguished name as people write it ("CN=www, O=A\,B",
// "O=\"A, B\"", "2.5.4.3=x") into DER. As in RFC 4514 the text starts with the
// most specific part, which is the last one of the encoding.
func ParseSubject(s string) ([]byte, error) {
	if len(s) > maxSubject || !utf8.ValidString(s) {
		return nil, fmt.Errorf("the subject is over %d bytes or not UTF-8", maxSubject)
	}
	var rdns pkix.RDNSequence
	for i := 0; ; {
		set, next, err := parseRDN(s, i)
		if err != nil {
			return nil, fmt.Errorf("the subject %q is not a distinguished name: %w", s, err)
		}
		rdns = append(rdns, set)
		if next >= len(s) {
			break
		}
		i = next + 1 // the comma or semicolon
	}
	slices.Reverse(rdns)
	der, err := asn1.Marshal(rdns)
	if err != nil {
		return nil, fmt.Errorf("encoding the subject %q: %w", s, err)
	}
	return der, nil
}

// parseRDN reads "TYPE=value[+TYPE=value]" from s[i:] and returns the place of
// the separator behind it, or len(s).
func parseRDN(s string, i int) (pkix.RelativeDistinguishedNameSET, int, error) {
	var set pkix.RelativeDistinguishedNameSET
	for {
		eq := strings.IndexByte(s[i:], '=')
		if eq < 0 {
			return nil, 0, fmt.Errorf("expected TYPE=value at character %d", i+1)
		}
		name := strings.TrimSpace(s[i : i+eq])
		oid, ok := attributeTypes[strings.ToUpper(name)]
		if !ok {
			var err error
			if oid, err = ParseOID(strings.TrimPrefix(strings.ToUpper(name), "OID.")); err != nil {
				return nil, 0, fmt.Errorf("there is no attribute type %q", name)
			}
		}
		value, next, err := parseValue(s, i+eq+1)
		if err != nil {
			return nil, 0, err
		}
		if value == "" {
			return nil, 0, fmt.Errorf("the value of %s is empty", name)
		}
		av, err := attribute(oid, value)
		if err != nil {
			return nil, 0, err
		}
		set = append(set, av)
		if next >= len(s) || s[next] != '+' {
			return set, next, nil
		}
		i = next + 1
	}
}

// parseValue reads an attribute value, quoted or escaped, from s[i:] and
// returns the place of the separator behind it, or len(s).
func parseValue(s string, i int) (string, int, error) {
	for i < len(s) && s[i] == ' ' {
		i++
	}
	var b strings.Builder
	quoted := i < len(s) && s[i] == '"'
	if quoted {
		i++
	}
	keep := 0 // length up to the last character that is no unescaped trailing space
	for ; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\':
			v, n := unescape(s[i+1:])
			if n == 0 {
				return "", 0, fmt.Errorf("a backslash at character %d escapes nothing", i+1)
			}
			b.WriteString(v)
			i += n
			keep = b.Len()
		case quoted && c == '"':
			next := i + 1
			for next < len(s) && s[next] == ' ' {
				next++
			}
			if next < len(s) && !strings.ContainsRune(",;+", rune(s[next])) {
				return "", 0, fmt.Errorf("expected a comma at character %d", next+1)
			}
			return validValue(b.String(), next)
		case !quoted && (c == ',' || c == ';' || c == '+'):
			return validValue(b.String()[:keep], i)
		case !quoted && c == '"':
			return "", 0, fmt.Errorf("a quote stands inside the value at character %d", i+1)
		default:
			b.WriteByte(c)
			if c != ' ' {
				keep = b.Len()
			}
		}
	}
	if quoted {
		return "", 0, fmt.Errorf("a closing quote is missing")
	}
	return validValue(b.String()[:keep], i)
}

func validValue(v string, next int) (string, int, error) {
	if !utf8.ValidString(v) {
		return "", 0, fmt.Errorf("a value is not UTF-8")
	}
	return v, next, nil
}

// unescape reads what follows a backslash: two hex digits or one character. n is how much was read, 0 for nothing.
func unescape(s string) (v string, n int) {
	if len(s) >= 2 {
		if b, err := hex.DecodeString(s[:2]); err == nil {
			return string(b), 2
		}
	}
	if len(s) == 0 {
		return "", 0
	}
	_, n = utf8.DecodeRuneInString(s)
	return s[:n], n
}

// attribute encodes the value as RFC 5280 wants it: IA5String for e-mail and
// domain component, PrintableString or UTF8String for the rest.
func attribute(oid asn1.ObjectIdentifier, value string) (pkix.AttributeTypeAndValue, error) {
	if !oid.Equal(oidEmail) && !oid.Equal(oidDC) {
		return pkix.AttributeTypeAndValue{Type: oid, Value: value}, nil
	}
	for i := range len(value) {
		if value[i] >= utf8.RuneSelf {
			return pkix.AttributeTypeAndValue{}, fmt.Errorf("the value %q must be ASCII", value)
		}
	}
	return pkix.AttributeTypeAndValue{Type: oid, Value: asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(value)}}, nil
}

// EscapeSubject escapes a value for use in a distinguished name (RFC 4514, 2.4).
func EscapeSubject(v string) string {
	var b strings.Builder
	for i, r := range v {
		if strings.ContainsRune(`,+"\<>;=`, r) || (i == 0 && (r == '#' || r == ' ')) || (i == len(v)-1 && r == ' ') {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}

// ParseOID reads a dotted object identifier.
func ParseOID(s string) (asn1.ObjectIdentifier, error) {
	parts := strings.Split(s, ".")
	if len(s) > 128 || len(parts) < 2 {
		return nil, fmt.Errorf("%q is not an object identifier such as %s", s, ServerAuth)
	}
	oid := make(asn1.ObjectIdentifier, len(parts))
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 31)
		if err != nil || (len(p) > 1 && p[0] == '0') {
			return nil, fmt.Errorf("%q is not an object identifier such as %s", s, ServerAuth)
		}
		oid[i] = int(n)
	}
	if oid[0] > 2 || (oid[0] < 2 && oid[1] > 39) {
		return nil, fmt.Errorf("%q is not an object identifier: no such arc", s)
	}
	return oid, nil
}

// extKeyUsage finds the standard library's name of a usage, so that it verifies by it.
func extKeyUsage(oid asn1.ObjectIdentifier) (x509.ExtKeyUsage, bool) {
	switch oid.String() {
	case "2.5.29.37.0":
		return x509.ExtKeyUsageAny, true
	case ServerAuth:
		return x509.ExtKeyUsageServerAuth, true
	case ClientAuth:
		return x509.ExtKeyUsageClientAuth, true
	case "1.3.6.1.5.5.7.3.3":
		return x509.ExtKeyUsageCodeSigning, true
	case "1.3.6.1.5.5.7.3.4":
		return x509.ExtKeyUsageEmailProtection, true
	case "1.3.6.1.5.5.7.3.8":
		return x509.ExtKeyUsageTimeStamping, true
	case "1.3.6.1.5.5.7.3.9":
		return x509.ExtKeyUsageOCSPSigning, true
	}
	return 0, false
}

// altNames encodes all subject alternative names (RFC 5280, 4.2.1.6): needed
// where there are user principal names, which crypto/x509 does not write.
func (t Template) altNames() (pkix.Extension, error) {
	var names []asn1.RawValue
	add := func(tag int, v []byte) {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: v})
	}
	for _, u := range t.UPNs {
		type otherName struct {
			Type  asn1.ObjectIdentifier
			Value string `asn1:"utf8,explicit,tag:0"`
		}
		der, err := asn1.MarshalWithParams(otherName{oidUPN, u}, "tag:0")
		if err != nil {
			return pkix.Extension{}, fmt.Errorf("encoding user principal name %q: %w", u, err)
		}
		names = append(names, asn1.RawValue{FullBytes: der})
	}
	for _, e := range t.Emails {
		add(1, []byte(e))
	}
	for _, d := range t.DNSNames {
		add(2, []byte(d))
	}
	for _, u := range t.URIs {
		add(6, []byte(u.String()))
	}
	for _, ip := range t.IPs {
		if v4 := ip.To4(); v4 != nil {
			ip = v4
		}
		if len(ip) != net.IPv4len && len(ip) != net.IPv6len {
			return pkix.Extension{}, fmt.Errorf("encoding IP address %v: it is none", ip)
		}
		add(7, ip)
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("encoding subject alternative names: %w", err)
	}
	return pkix.Extension{Id: oidAltName, Critical: t.Subject == "", Value: der}, nil
}
