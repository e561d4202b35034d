package keyvault

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/vault"
)

// drawPolicy draws a valid policy.
func drawPolicy(t *rapid.T) vault.Policy {
	names := func(label, like string) []string {
		n := rapid.IntRange(0, 3).Draw(t, label)
		var out []string
		for i := range n {
			out = append(out, strings.ReplaceAll(like, "N", string(rune('a'+i))))
		}
		return out
	}
	p := vault.Policy{
		KeyType: vault.RSA, KeySize: rapid.SampledFrom([]int{2048, 3072, 4096}).Draw(t, "size"),
		Exportable: rapid.Bool().Draw(t, "exportable"), ReuseKey: rapid.Bool().Draw(t, "reuse"),
		ContentType: rapid.SampledFrom([]string{vault.PEM, vault.PFX}).Draw(t, "content"),
		Subject:     rapid.SampledFrom([]string{"", "CN=a", `CN=a, O="b, c"`}).Draw(t, "subject"),
		DNSNames:    append(names("dns", "N.example.org"), "x.example.org"), Emails: names("emails", "N@example.org"), UPNs: names("upns", "N@example.org"),
		EKUs:           rapid.SampledFrom([][]string{nil, {pki.ServerAuth}, {pki.ServerAuth, "1.2.3"}}).Draw(t, "ekus"),
		KeyUsage:       rapid.SampledFrom([][]string{nil, {"digitalSignature"}, {"keyCertSign", "keyAgreement"}}).Draw(t, "usage"),
		ValidityMonths: rapid.IntRange(1, 120).Draw(t, "months"), Issuer: rapid.SampledFrom([]string{vault.SelfIssuer, vault.BuiltInIssuer}).Draw(t, "issuer"),
		IssuerType: rapid.SampledFrom([]string{"", "OV-SSL"}).Draw(t, "cty"),
	}
	transparent := rapid.Bool().Draw(t, "ct")
	p.Transparency = &transparent
	if rapid.Bool().Draw(t, "ec") {
		p.KeyType, p.KeySize, p.Curve = vault.EC, 0, rapid.SampledFrom([]string{"P-256", "P-384", "P-521"}).Draw(t, "curve")
	}
	if rapid.Bool().Draw(t, "renew") {
		p.Actions = append(p.Actions, vault.Action{Type: vault.AutoRenew, Trigger: pki.Trigger{LifetimePercentage: rapid.IntRange(1, 99).Draw(t, "percent")}})
	}
	if rapid.Bool().Draw(t, "mail") {
		p.Actions = append(p.Actions, vault.Action{Type: vault.EmailContacts, Trigger: pki.Trigger{DaysBeforeExpiry: rapid.IntRange(1, p.ValidityMonths*27).Draw(t, "days")}})
	}
	return p
}

// TestPolicyComesBackFromTheWire: a policy that is written, read strictly and laid over
// any other one is the same again, except for the dates, which are the server's.
func TestPolicyComesBackFromTheWire(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, over := drawPolicy(t), drawPolicy(t)
		if err := p.Validate(true); err != nil {
			t.Fatalf("the test's policy is not valid: %v", err)
		}
		body, err := json.Marshal(policyOf(&p, "https://x/policy"))
		if err != nil {
			t.Fatal(err)
		}
		var w wire.CertificatePolicy
		if err := jsonstrict.Decode(body, &w); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
		// What the wire leaves out when empty stays as it was: that is what PATCH means.
		over.DNSNames, over.Emails, over.UPNs, over.IssuerType = nil, nil, nil, ""
		merge(&w, &over)
		if d := cmp.Diff(p, over); d != "" {
			t.Fatalf("%s\n%s", d, body)
		}
	})
}

func TestKeyPropertiesFollowEachOther(t *testing.T) {
	for _, c := range []struct {
		reason, sent string
		kty, crv     string
		size         int
	}{
		{"nothing: RSA 2048", `{}`, "RSA", "", 2048},
		{"EC alone: P-256", `{"kty":"EC"}`, "EC", "P-256", 0},
		{"EC by size", `{"kty":"EC","key_size":384}`, "EC", "P-384", 0},
		{"EC by curve", `{"kty":"EC","crv":"P-521"}`, "EC", "P-521", 0},
		{"EC by both", `{"kty":"EC","crv":"P-521","key_size":521}`, "EC", "P-521", 0},
		{"EC by both, and they differ: left for validation", `{"kty":"EC","crv":"P-521","key_size":256}`, "EC", "P-521", 256},
		{"RSA with a null curve, as az sends it", `{"kty":"RSA","key_size":4096,"crv":null}`, "RSA", "", 4096},
	} {
		var w wire.CertificatePolicy
		if err := jsonstrict.Decode([]byte(`{"key_props":`+c.sent+`}`), &w); err != nil {
			t.Fatal(err)
		}
		p := vault.DefaultPolicy()
		merge(&w, &p)
		if p.KeyType != c.kty || p.Curve != c.crv || p.KeySize != c.size {
			t.Errorf("%s: %s %q %d", c.reason, p.KeyType, p.Curve, p.KeySize)
		}
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`{"id":"x","issuer":{"cert_transparency":false,"name":"Self","cty":null},"key_props":{"crv":"P-256","exportable":true,"key_size":256,"kty":"EC"},
"lifetime_actions":[{"action":{"action_type":"AutoRenew"},"trigger":{"days_before_expiry":10,"lifetime_percentage":null}}],"secret_props":{"contentType":"application/x-pem-file"},
"x509_props":{"ekus":["1.3.6.1.5.5.7.3.1"],"key_usage":["digitalSignature"],"sans":{"dns_names":["www.example.org"],"emails":[],"upns":null},"subject":"CN=www","validity_months":12}}`))
	f.Add([]byte(`{"key_props":{"kty":"RSA","key_size":2048},"x509_props":{"subject":"CN=CLIGetDefaultPolicy","validity_months":12},"issuer":{"name":"Self"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var w wire.CertificatePolicy
		if jsonstrict.Decode(body, &w) != nil {
			return
		}
		p := vault.DefaultPolicy()
		merge(&w, &p)
		if p.Validate(true) != nil {
			return
		}
		// What is valid can be shown, read back and stays valid.
		shown, err := json.Marshal(policyOf(&p, ""))
		if err != nil {
			t.Fatal(err)
		}
		var again wire.CertificatePolicy
		if err := jsonstrict.Decode(shown, &again); err != nil {
			t.Fatalf("%v in %s", err, shown)
		}
		q := vault.DefaultPolicy()
		merge(&again, &q)
		if err := q.Validate(true); err != nil {
			t.Errorf("%s was valid and comes back as %s: %v", body, shown, err)
		}
	})
}
