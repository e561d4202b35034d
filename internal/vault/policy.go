package vault

import (
	"crypto/x509"
	"fmt"
	"net/mail"
	"regexp"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// Key types that a policy may name. Only the first two are made.
const (
	RSA    = "RSA"
	EC     = "EC"
	RSAHSM = "RSA-HSM"
	ECHSM  = "EC-HSM"
	oct    = "oct"
)

// Actions at a certificate's lifetime trigger.
const (
	AutoRenew     = "AutoRenew"     // issue the next version
	EmailContacts = "EmailContacts" // recorded as due; Keyfleet sends no mail
)

// Policy says how the versions of a certificate are made.
type Policy struct {
	KeyType        string    `json:"kty"`
	KeySize        int       `json:"keySize,omitempty"` // RSA
	Curve          string    `json:"crv,omitempty"`     // EC
	Exportable     bool      `json:"exportable"`
	ReuseKey       bool      `json:"reuseKey,omitempty"`
	ContentType    string    `json:"contentType"`
	Subject        string    `json:"subject,omitempty"`
	DNSNames       []string  `json:"dnsNames,omitempty"`
	Emails         []string  `json:"emails,omitempty"`
	UPNs           []string  `json:"upns,omitempty"`
	EKUs           []string  `json:"ekus,omitempty"`
	KeyUsage       []string  `json:"keyUsage,omitempty"`
	ValidityMonths int       `json:"validityMonths"`
	Actions        []Action  `json:"actions,omitempty"`
	Issuer         string    `json:"issuer"`
	IssuerType     string    `json:"issuerType,omitempty"`   // cty: kept, of no effect with the issuers there are
	Transparency   *bool     `json:"transparency,omitempty"` // cert_transparency: kept, of no effect
	Created        time.Time `json:"created,omitzero"`       // set by the server
	Updated        time.Time `json:"updated,omitzero"`       // set by the server
}

// Action is a lifetime action: what to do when the trigger is due.
type Action struct {
	Type    string      `json:"type"`
	Trigger pki.Trigger `json:"trigger"`
}

// DefaultPolicy is what holds where a new certificate's policy says nothing.
// Subject and issuer have no default.
func DefaultPolicy() Policy {
	return Policy{
		KeyType: RSA, KeySize: 2048, Exportable: true, ContentType: PFX, ValidityMonths: 12,
		EKUs:     []string{pki.ServerAuth, pki.ClientAuth},
		KeyUsage: []string{"digitalSignature", "keyEncipherment"},
		Actions:  []Action{{Type: EmailContacts, Trigger: pki.Trigger{LifetimePercentage: 80}}},
	}
}

// The key usages by their names in policies (RFC 5280, 4.2.1.3). The two of a CA
// are accepted, because the default policy of az names them, and left out of the
// certificate, because verifiers may refuse them on one that is no CA.
var keyUsages = []struct {
	name string
	bit  x509.KeyUsage
}{
	{"digitalSignature", x509.KeyUsageDigitalSignature},
	{"nonRepudiation", x509.KeyUsageContentCommitment},
	{"keyEncipherment", x509.KeyUsageKeyEncipherment},
	{"dataEncipherment", x509.KeyUsageDataEncipherment},
	{"keyAgreement", x509.KeyUsageKeyAgreement},
	{"keyCertSign", 0},
	{"cRLSign", 0},
	{"encipherOnly", x509.KeyUsageEncipherOnly},
	{"decipherOnly", x509.KeyUsageDecipherOnly},
}

const (
	maxValidityMonths = 1200
	maxNames          = 100 // subject alternative names of one kind
)

func bad(path, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "BadParameter", format, args...).At("policy." + path)
}

// Validate returns what is wrong with the policy, with the field's path as it
// stands in the request body; nil if certificates can be made by it. builtIn
// tells whether the issuer Keyfleet is there.
func (p *Policy) Validate(builtIn bool) error {
	for _, check := range []func() error{p.validateKey, p.validateSecret, p.validateNames, p.validateUsages, p.validateLife} {
		if err := check(); err != nil {
			return err
		}
	}
	return p.validateIssuer(builtIn)
}

func (p *Policy) validateKey() error {
	switch p.KeyType {
	case RSA:
		if !slices.Contains([]int{2048, 3072, 4096}, p.KeySize) {
			return bad("key_props.key_size", "An RSA key has 2048, 3072 or 4096 bits; %d was asked for.", p.KeySize)
		}
		if p.Curve != "" {
			return bad("key_props.crv", "An RSA key has no curve.").WithFix("leave crv out, or set kty to EC")
		}
	case EC:
		if !slices.Contains([]string{"P-256", "P-384", "P-521"}, p.Curve) {
			return bad("key_props.crv", "An EC key is on the curve P-256, P-384 or P-521; '%s' was asked for.", p.Curve)
		}
		if n := curveBits[p.Curve]; p.KeySize != 0 && p.KeySize != n {
			return bad("key_props.key_size", "A key on the curve %s has %d bits; %d was asked for.", p.Curve, n, p.KeySize).WithFix("leave key_size out")
		}
	case RSAHSM, ECHSM:
		return bad("key_props.kty", "The key type %s needs a hardware security module, and this server has none.", p.KeyType).WithFix("use %s", strings.TrimSuffix(p.KeyType, "-HSM"))
	case oct:
		return bad("key_props.kty", "A certificate needs a key pair; oct is a symmetric key.").WithFix("use RSA or EC")
	default:
		return bad("key_props.kty", "There is no key type '%s'.", p.KeyType).WithFix("use RSA or EC")
	}
	return nil
}

var curveBits = map[string]int{"P-256": 256, "P-384": 384, "P-521": 521}

func (p *Policy) validateSecret() error {
	if p.ContentType != PFX && p.ContentType != PEM {
		return bad("secret_props.contentType", "The secret of a certificate is '%s' or '%s'; '%s' was asked for.", PFX, PEM, p.ContentType)
	}
	return nil
}

var dnsName = regexp.MustCompile(`^(\*\.)?([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?\.)*[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?$`)

func (p *Policy) validateNames() error {
	if p.Subject == "" && len(p.DNSNames)+len(p.Emails)+len(p.UPNs) == 0 {
		return bad("x509_props.subject", "The certificate would name nobody.").WithFix(`set subject ("CN=www.example.org") or sans`)
	}
	if p.Subject != "" {
		if _, err := pki.ParseSubject(p.Subject); err != nil {
			return bad("x509_props.subject", "%s", sentence(err)).WithFix(`write it like "CN=www.example.org, O=Example"`)
		}
	}
	for _, l := range []struct {
		path string
		list []string
		ok   func(string) bool
		like string
	}{
		{"dns_names", p.DNSNames, func(s string) bool { return len(s) <= 253 && dnsName.MatchString(s) }, "www.example.org or *.example.org"},
		{"emails", p.Emails, mailAddress, "name@example.org"},
		{"upns", p.UPNs, func(s string) bool {
			return strings.Count(s, "@") == 1 && len(s) <= 320 && !strings.ContainsAny(s, "\x00\r\n")
		}, "name@example.org"},
	} {
		if len(l.list) > maxNames {
			return bad("x509_props.sans."+l.path, "There are at most %d names of a kind; these are %d.", maxNames, len(l.list))
		}
		for i, s := range l.list {
			if !l.ok(s) {
				return bad(fmt.Sprintf("x509_props.sans.%s[%d]", l.path, i), "'%s' is not a name of this kind.", s).WithFix("write it like %s", l.like)
			}
		}
	}
	return nil
}

func mailAddress(s string) bool {
	a, err := mail.ParseAddress(s)
	if err != nil || a.Address != s || a.Name != "" || len(s) > 320 {
		return false
	}
	for i := range len(s) {
		if s[i] >= 0x80 { // an IA5String holds ASCII only
			return false
		}
	}
	return true
}

func (p *Policy) validateUsages() error {
	if len(p.EKUs) > maxNames {
		return bad("x509_props.ekus", "There are at most %d extended key usages.", maxNames)
	}
	for i, s := range p.EKUs {
		if _, err := pki.ParseOID(s); err != nil {
			return bad(fmt.Sprintf("x509_props.ekus[%d]", i), "%s", sentence(err))
		}
	}
	for i, s := range p.KeyUsage {
		if _, ok := keyUsage(s); !ok {
			names := make([]string, len(keyUsages))
			for j, u := range keyUsages {
				names[j] = u.name
			}
			return bad(fmt.Sprintf("x509_props.key_usage[%d]", i), "There is no key usage '%s'. There are: %s.", s, strings.Join(names, ", "))
		}
	}
	return nil
}

func keyUsage(name string) (x509.KeyUsage, bool) {
	for _, u := range keyUsages {
		if u.name == name {
			return u.bit, true
		}
	}
	return 0, false
}

func (p *Policy) validateLife() error {
	if p.ValidityMonths < 1 || p.ValidityMonths > maxValidityMonths {
		return bad("x509_props.validity_months", "The validity is 1 to %d months; %d was asked for.", maxValidityMonths, p.ValidityMonths)
	}
	seen := map[string]bool{}
	for i, a := range p.Actions {
		path := fmt.Sprintf("lifetime_actions[%d]", i)
		days, percent := a.Trigger.DaysBeforeExpiry, a.Trigger.LifetimePercentage
		switch {
		case a.Type != AutoRenew && a.Type != EmailContacts:
			return bad(path+".action.action_type", "There is no lifetime action '%s'.", a.Type).WithFix("use AutoRenew or EmailContacts")
		case seen[a.Type]:
			return bad(path+".action.action_type", "The lifetime action %s stands twice.", a.Type)
		case days != 0 && percent != 0:
			return bad(path+".trigger", "A trigger has days_before_expiry or lifetime_percentage, not both.")
		case days == 0 && percent == 0:
			return bad(path+".trigger", "The trigger is missing.").WithFix("set days_before_expiry or lifetime_percentage")
		case percent != 0 && (percent < 1 || percent > 99):
			return bad(path+".trigger.lifetime_percentage", "The percentage is 1 to 99; %d was asked for.", percent)
		case days != 0 && (days < 1 || days > p.ValidityMonths*27):
			return bad(path+".trigger.days_before_expiry", "With a validity of %d months the days are 1 to %d; %d was asked for.", p.ValidityMonths, p.ValidityMonths*27, days)
		}
		seen[a.Type] = true
	}
	return nil
}

func (p *Policy) validateIssuer(builtIn bool) error {
	known := SelfIssuer
	if builtIn {
		known += " or " + BuiltInIssuer
	}
	switch {
	case p.Issuer == SelfIssuer, p.Issuer == BuiltInIssuer && builtIn:
		return nil
	case p.Issuer == "":
		return bad("issuer.name", "The issuer is missing.").WithFix("use %s", known)
	case p.Issuer == "Unknown":
		return bad("issuer.name", "The issuer Unknown, a request to be signed elsewhere and merged, is not offered.").WithFix("use %s", known)
	}
	return bad("issuer.name", "There is no issuer '%s'.", p.Issuer).WithFix("use %s", known)
}

// kind is the kind of key that the policy asks for. The policy is valid.
func (p *Policy) kind() pki.Kind {
	if p.KeyType == EC {
		return pki.Kind(p.Curve)
	}
	return pki.Kind(fmt.Sprintf("RSA-%d", p.KeySize))
}

// template is the certificate that the policy asks for.
func (p *Policy) template(notBefore, notAfter time.Time) pki.Template {
	t := pki.Template{
		Subject: p.Subject, DNSNames: p.DNSNames, Emails: p.Emails, UPNs: p.UPNs, EKUs: p.EKUs, NotBefore: notBefore, NotAfter: notAfter,
	}
	for _, name := range p.KeyUsage {
		bit, _ := keyUsage(name)
		t.KeyUsage |= bit
	}
	return t
}

// action returns the policy's action of a type.
func (p *Policy) action(typ string) (Action, bool) {
	for _, a := range p.Actions {
		if a.Type == typ {
			return a, true
		}
	}
	return Action{}, false
}

// sentence makes an error's text a sentence.
func sentence(err error) string {
	s := err.Error()
	return strings.ToUpper(s[:1]) + s[1:] + "."
}
