package keyvault

import (
	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/vault"
)

// The key sizes that clients see beside a curve.
var curves = []struct {
	name string
	bits int
}{{"P-256", 256}, {"P-384", 384}, {"P-521", 521}}

// merge lays what a wire policy says over a policy; what it does not say stays.
func merge(w *wire.CertificatePolicy, p *vault.Policy) {
	if w == nil {
		return
	}
	if w.KeyProps != nil {
		mergeKey(w.KeyProps, p)
	}
	if w.SecretProps != nil {
		take(&p.ContentType, w.SecretProps.ContentType)
	}
	if x := w.X509Props; x != nil {
		take(&p.Subject, x.Subject)
		take(&p.ValidityMonths, x.ValidityMonths)
		takeList(&p.EKUs, x.EKUs)
		takeList(&p.KeyUsage, x.KeyUsage)
		if x.SANs != nil {
			takeList(&p.DNSNames, x.SANs.DNSNames)
			takeList(&p.Emails, x.SANs.Emails)
			takeList(&p.UPNs, x.SANs.UPNs)
		}
	}
	if w.LifetimeActions != nil {
		p.Actions = nil
		for _, a := range w.LifetimeActions {
			p.Actions = append(p.Actions, action(a))
		}
	}
	if i := w.Issuer; i != nil {
		take(&p.Issuer, i.Name)
		take(&p.IssuerType, i.CertificateType)
		if i.Transparency != nil {
			p.Transparency = i.Transparency
		}
	}
}

// mergeKey takes the key's properties. Another key type starts from that
// type's defaults; for EC the size follows from the curve, and the other way round.
func mergeKey(k *wire.KeyProps, p *vault.Policy) {
	if k.KeyType != nil && *k.KeyType != p.KeyType {
		p.KeyType, p.KeySize, p.Curve = *k.KeyType, 0, ""
		switch *k.KeyType {
		case vault.RSA:
			p.KeySize = 2048
		case vault.EC:
			if k.Curve == nil && k.KeySize == nil {
				p.Curve = "P-256"
			}
		}
	}
	take(&p.KeySize, k.KeySize)
	take(&p.Curve, k.Curve)
	take(&p.Exportable, k.Exportable)
	take(&p.ReuseKey, k.ReuseKey)
	if p.KeyType != vault.EC {
		return
	}
	for _, c := range curves {
		if p.KeySize == c.bits && (k.Curve == nil || p.Curve == c.name) {
			p.Curve, p.KeySize = c.name, 0
		}
	}
	if k.Curve != nil && k.KeySize == nil {
		p.KeySize = 0
	}
}

func action(a wire.LifetimeAction) vault.Action {
	var out vault.Action
	if a.Action != nil {
		out.Type = a.Action.Type
	}
	if a.Trigger != nil {
		out.Trigger = pki.Trigger{DaysBeforeExpiry: value(a.Trigger.DaysBeforeExpiry), LifetimePercentage: value(a.Trigger.LifetimePercentage)}
	}
	return out
}

func take[T any](field *T, sent *T) {
	if sent != nil {
		*field = *sent
	}
}

// takeList takes a list that was sent; an empty one empties the field.
func takeList(field *[]string, sent []string) {
	switch {
	case sent == nil:
	case len(sent) == 0:
		*field = nil
	default:
		*field = sent
	}
}

func value(n *int) int {
	if n == nil {
		return 0
	}
	return *n
}

// policyOf is a policy as clients get it.
func policyOf(p *vault.Policy, id string) *wire.CertificatePolicy {
	enabled, transparency := true, false
	if p.Transparency != nil {
		transparency = *p.Transparency
	}
	w := &wire.CertificatePolicy{
		ID:          id,
		KeyProps:    &wire.KeyProps{Exportable: &p.Exportable, KeyType: &p.KeyType, ReuseKey: &p.ReuseKey},
		SecretProps: &wire.SecretProps{ContentType: &p.ContentType},
		X509Props: &wire.X509Props{
			Subject: &p.Subject, EKUs: emptyList(p.EKUs), KeyUsage: emptyList(p.KeyUsage), ValidityMonths: &p.ValidityMonths,
		},
		LifetimeActions: []wire.LifetimeAction{},
		Issuer:          &wire.IssuerParameters{Name: &p.Issuer, Transparency: &transparency},
		Attributes:      &wire.Attributes{Enabled: &enabled, Created: unix(p.Created), Updated: unix(p.Updated)},
	}
	if p.IssuerType != "" {
		w.Issuer.CertificateType = &p.IssuerType
	}
	if p.Curve != "" {
		w.KeyProps.Curve = &p.Curve
	}
	size := p.KeySize
	for _, c := range curves {
		if p.Curve == c.name {
			size = c.bits
		}
	}
	if size != 0 {
		w.KeyProps.KeySize = &size
	}
	if len(p.DNSNames)+len(p.Emails)+len(p.UPNs) > 0 {
		w.X509Props.SANs = &wire.AlternativeNames{DNSNames: p.DNSNames, Emails: p.Emails, UPNs: p.UPNs}
	}
	for _, a := range p.Actions {
		t := &wire.Trigger{}
		if n := a.Trigger.DaysBeforeExpiry; n != 0 {
			t.DaysBeforeExpiry = &n
		}
		if n := a.Trigger.LifetimePercentage; n != 0 {
			t.LifetimePercentage = &n
		}
		w.LifetimeActions = append(w.LifetimeActions, wire.LifetimeAction{Trigger: t, Action: &wire.Action{Type: a.Type}})
	}
	return w
}

func emptyList(l []string) []string {
	if l == nil {
		return []string{}
	}
	return l
}
