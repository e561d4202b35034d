package apimodel

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// Requirements are what a profile must be good for.
type Requirements struct {
	Now   time.Time
	Peers int // members of etcd
	// Served are the names that clients use now, by the entry of the certificate:
	// those in the certificate that is served.
	Served map[string]ServedNames
}

// ServedNames are the names in a certificate, as package x509 has them.
type ServedNames struct {
	DNS []string
	IPs []net.IP
}

// Check tells whether a cluster can be given the profile. The error is a
// fault.Invalid that says all that is wrong, with a detail for each fault whose
// Target is the entry. It holds no key.
func Check(p Profile, want Requirements) error {
	c := &check{profile: p, want: want}
	c.completeness()
	c.ca()
	for _, name := range Names(want.Peers) {
		if keyOf(name) != "" {
			c.pair(name)
		}
	}
	if len(c.problems) == 0 {
		return nil
	}
	lines := make([]string, len(c.problems))
	for i, d := range c.problems {
		lines[i] = "\n  " + d.Target + ": " + d.Message
	}
	e := fault.New(fault.Invalid, "CertificateProfileNotUsable", "The certificate profile cannot be used; nothing was changed:%s", strings.Join(lines, "")).
		WithFix("correct these entries, or leave --certificate-profile out to have new ones made")
	e.Details = c.problems
	return e
}

// check is one look at a profile.
type check struct {
	profile   Profile
	want      Requirements
	authority *x509.Certificate // nil: there is none that could be used
	problems  []fault.Detail
}

func (c *check) problem(entry, format string, args ...any) {
	c.problems = append(c.problems, fault.Detail{Code: "BadEntry", Target: entry, Message: fmt.Sprintf(format, args...)})
}

// completeness: every entry is there, and no other.
func (c *check) completeness() {
	names := Names(c.want.Peers)
	for _, name := range names {
		if len(c.profile[name]) == 0 {
			c.problem(name, "it is missing")
		}
	}
	var others []string
	for name := range c.profile {
		if !slices.Contains(names, name) {
			others = append(others, name)
		}
	}
	slices.Sort(others)
	for _, name := range others {
		if _, i, ok := split(name); ok {
			c.problem(name, "there are only %d members of etcd, the first of them 0: element %d is one too many", c.want.Peers, i)
			continue
		}
		c.problem(clip(name), "it is not an entry of a profile")
	}
}

// ca looks at the CA, which everything else is compared with.
func (c *check) ca() {
	const name = "caCertificate"
	certs := c.certificates(name)
	switch {
	case certs == nil:
		return
	case len(certs) > 1:
		c.problem(name, "it holds %d certificates: give one, that of the CA", len(certs))
		return
	}
	ca := certs[0]
	if !ca.BasicConstraintsValid || !ca.IsCA || ca.KeyUsage != 0 && ca.KeyUsage&x509.KeyUsageCertSign == 0 {
		c.problem(name, "it is not the certificate of a CA (basic constraint CA, key usage certSign)")
		return
	}
	c.authority = ca
}

// pair looks at a certificate and its key.
func (c *check) pair(name string) {
	key := c.key(keyOf(name))
	certs := c.certificates(name)
	if certs == nil {
		return
	}
	leaf := certs[0]
	if key != nil && !key.PublicKey.Equal(leaf.PublicKey) {
		c.problem(keyOf(name), "it is not the key of %s", name)
	}
	c.validity(name, certs)
	if name == "caCertificate" {
		return
	}
	c.issuer(name, certs)
	c.usages(name, leaf)
	c.names(name, leaf)
}

// certificates reads an entry; nil if there are none.
func (c *check) certificates(name string) []*x509.Certificate {
	text := c.profile[name]
	if len(text) == 0 {
		return nil
	}
	certs, err := pki.ParseChain(text)
	if err != nil && !slices.ContainsFunc(c.problems, func(d fault.Detail) bool { return d.Target == name }) {
		c.problem(name, "it is not a certificate in PEM: %s", err)
	}
	return certs
}

// key reads a private key; nil if it is none that aks-engine reads.
func (c *check) key(name string) *rsa.PrivateKey {
	text := c.profile[name]
	if len(text) == 0 {
		return nil
	}
	block := keyBlock(text)
	if block == nil {
		c.problem(name, "it holds no private key in PEM")
		return nil
	}
	if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
		c.problem(name, "the key has a passphrase: remove it with openssl rsa -traditional -in KEY -out NEW")
		return nil
	}
	parsed, err := pki.ParseKey(pem.EncodeToMemory(block))
	if err != nil {
		c.problem(name, "it is not a key: %s", err)
		return nil
	}
	key, ok := parsed.(*rsa.PrivateKey)
	switch {
	case !ok:
		c.problem(name, "it is not an RSA key, and aks-engine reads no other: make the certificate with one")
	case block.Type != "RSA PRIVATE KEY":
		c.problem(name, "it is in PKCS#8, which aks-engine does not read: convert it with openssl rsa -traditional -in KEY -out NEW")
	}
	return key
}

// keyBlock is the first private key of a PEM text.
func keyBlock(text []byte) *pem.Block {
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil || strings.HasSuffix(b.Type, "PRIVATE KEY") {
			return b
		}
	}
}

func (c *check) validity(name string, certs []*x509.Certificate) {
	for _, cert := range certs {
		switch {
		case c.want.Now.Before(cert.NotBefore):
			c.problem(name, "%s is not valid before %s", cert.Subject, cert.NotBefore.UTC().Format(time.RFC3339))
		case c.want.Now.After(cert.NotAfter):
			c.problem(name, "%s has expired on %s", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339))
		}
	}
}

// issuer: it comes from the CA of the profile. Whether it has expired is said elsewhere.
func (c *check) issuer(name string, certs []*x509.Certificate) {
	if c.authority == nil {
		return
	}
	if certs[0].Equal(c.authority) {
		c.problem(name, "it is the certificate of the CA")
		return
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(c.authority)
	for _, cert := range certs[1:] {
		between.AddCert(cert)
	}
	_, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: c.want.Now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if invalid, ok := err.(x509.CertificateInvalidError); ok && invalid.Reason == x509.Expired {
		return
	}
	if err != nil {
		c.problem(name, "it does not come from the CA in caCertificate: %s", err)
	}
}

// usages: a server of etcd is a client, too: of itself.
func (c *check) usages(name string, leaf *x509.Certificate) {
	needed := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	switch name {
	case "apiServerCertificate":
		needed = needed[:1]
	case "clientCertificate", "kubeConfigCertificate", "etcdClientCertificate":
		needed = needed[1:]
	}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 || slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return
	}
	for _, usage := range needed {
		if !slices.Contains(leaf.ExtKeyUsage, usage) {
			c.problem(name, "its extended key usages are without %s", usage)
		}
	}
}

// names: who reaches a server by a name today reaches it tomorrow.
func (c *check) names(name string, leaf *x509.Certificate) {
	served := c.want.Served[name]
	var missing []string
	for _, dns := range served.DNS {
		same := func(s string) bool { return strings.EqualFold(s, dns) }
		if !slices.ContainsFunc(leaf.DNSNames, same) && leaf.VerifyHostname(dns) != nil {
			missing = append(missing, dns)
		}
	}
	for _, ip := range served.IPs {
		if !slices.ContainsFunc(leaf.IPAddresses, ip.Equal) {
			missing = append(missing, ip.String())
		}
	}
	if len(missing) > 0 {
		c.problem(name, "it is without %s, which the certificate in use has", strings.Join(missing, ", "))
	}
}
