package vault

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// minLife is the least time in policy time between issue and the next renewal.
// An issuer that gives less (a CA near its end) would be asked again and again.
const minLife = time.Hour

// errSuperseded ends an issue whose reason went away while it was signed.
var errSuperseded = errors.New("vault: the certificate was changed meanwhile")

// issued is a version that is signed and not yet stored.
type issued struct {
	version string
	cert    storedCertificate
	secret  storedSecret
}

// issue makes the next version of a certificate and stores it. With a request
// in progress the version is the answer to it; otherwise it is the renewal of
// the newest version. If the certificate was changed meanwhile, nothing is
// stored and the change will bring the certificate here again.
func (v *Vaults) issue(ctx context.Context, s *store.Store, obj *certificateObject) error {
	policyNow, err := v.policyNow(ctx)
	if err != nil {
		return err
	}
	previous, err := v.newest(ctx, s, obj)
	if err != nil {
		return err
	}
	next, err := v.sign(ctx, obj, previous, policyNow)
	if err != nil {
		return err
	}
	requested := obj.Status.Operation.Status == InProgress
	action := "certificates/renew"
	if requested {
		action = "certificates/issue"
	}
	op := access.Op{Action: action, Resource: resourceOf(obj.ID), Policies: []access.Policy{}, Detail: next.version}
	fresh := obj
	err = v.gate.Change(ctx, s, op, func(tx *store.Tx) (err error) {
		if fresh, err = unchanged(tx, obj); err != nil {
			return err
		}
		v.finish(fresh, next, requested)
		return next.put(tx, fresh)
	})
	if errors.Is(err, errSuperseded) {
		return nil
	}
	if err == nil {
		obj.Status, obj.Conditions = fresh.Status, fresh.Conditions
		v.cfg.Log.Info("certificate issued", "certificate", obj.ID, "version", next.version, "notAfter", next.cert.Expires, "renewal", !requested)
	}
	return err
}

// resourceOf turns a certificate's store id into the resource of an audit record.
func resourceOf(id string) string {
	vault, name := splitID(id)
	return vault + "/certificates/" + name
}

// newest returns the newest version, nil if there is none.
func (v *Vaults) newest(ctx context.Context, s *store.Store, obj *certificateObject) (*certificateVersion, error) {
	if obj.Status.Current == "" {
		return nil, nil
	}
	return certificateVersions.Get(s.View(ctx), obj.ID+"/"+obj.Status.Current)
}

// sign makes key, certificate and secret of the next version.
func (v *Vaults) sign(ctx context.Context, obj *certificateObject, previous *certificateVersion, policyNow time.Time) (*issued, error) {
	p, now := &obj.Spec.Policy, v.now()
	key, err := nextKey(p, previous)
	if err != nil {
		return nil, err
	}
	t := p.template(now.Add(-pki.Backdate), policyNow.AddDate(0, p.ValidityMonths, 0).Truncate(time.Second))
	chain, err := v.chain(ctx, p.Issuer, t, key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	start := policyNow.Add(-pki.Backdate).Truncate(time.Second)
	if a, ok := p.action(AutoRenew); ok && pki.RenewAt(start, leaf.NotAfter, a.Trigger).Before(policyNow.Add(minLife)) {
		return nil, fault.New(fault.Unavailable, "IssuerEnding",
			"The issuer %s gives certificates until %s only, so the next renewal would be due at once.", p.Issuer, leaf.NotAfter.Format(time.RFC3339)).
			WithFix("give the issuer a new CA certificate")
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	value, err := secretValue(p, key, chain)
	if err != nil {
		return nil, err
	}
	thumb := pki.Thumbprint(chain[0])
	out := &issued{
		version: newVersion(),
		cert: storedCertificate{
			Chain: chain, Key: der, NotBefore: leaf.NotBefore, Expires: leaf.NotAfter, Start: start, Thumbprint: thumb[:], Created: now, Updated: now,
		},
		secret: storedSecret{Value: value, ContentType: p.ContentType, NotBefore: leaf.NotBefore, Expires: leaf.NotAfter, Created: now, Updated: now, Managed: true},
	}
	if obj.Status.Operation.Status == InProgress {
		out.cert.Tags, out.cert.Disabled = obj.Spec.Request.Tags, obj.Spec.Request.Disabled
	} else if previous != nil {
		out.cert.Tags, out.cert.Disabled = previous.Spec.Tags, previous.Spec.Disabled
	}
	if previous != nil {
		out.secret.Previous = versionOf(previous.ID)
	}
	out.secret.Tags, out.secret.Disabled = out.cert.Tags, out.cert.Disabled
	return out, nil
}

// nextKey returns the key of the next version: that of the one before, if the
// policy says so and it still fits the policy, or a new one.
func nextKey(p *Policy, previous *certificateVersion) (crypto.Signer, error) {
	if p.ReuseKey && previous != nil {
		key, err := pki.ParsePKCS8(previous.Spec.Key)
		if err != nil {
			return nil, err
		}
		if kind, err := pki.KindOf(key.Public()); err == nil && kind == p.kind() {
			return key, nil
		}
	}
	return pki.NewKey(p.kind())
}

// chain asks the issuer.
func (v *Vaults) chain(ctx context.Context, issuer string, t pki.Template, key crypto.Signer) ([][]byte, error) {
	switch {
	case issuer == SelfIssuer:
		der, err := pki.SelfSign(t, key)
		return [][]byte{der}, err
	case issuer == BuiltInIssuer && v.cfg.Issuer != nil:
		return v.cfg.Issuer(ctx, t, key.Public())
	}
	return nil, fault.New(fault.Invalid, "IssuerNotFound", "There is no issuer '%s' on this server.", issuer).At("policy.issuer.name")
}

// secretValue is what readers of the secret get: key and chain, or the chain
// alone where the key is not exportable.
func secretValue(p *Policy, key crypto.Signer, chain [][]byte) (string, error) {
	if !p.Exportable {
		key = nil
	}
	if p.ContentType == PFX {
		pfx, err := pki.EncodePFX(key, chain)
		return base64.StdEncoding.EncodeToString(pfx), err
	}
	var text []byte
	if key != nil {
		var err error
		if text, err = pki.EncodeKey(key); err != nil {
			return "", err
		}
	}
	return string(append(text, pki.EncodeChain(chain...)...)), nil
}

// unchanged reads the certificate and its vault in the transaction of an issue
// and finds out whether the reason for it still stands. This is what makes a
// renewal happen once: the version it follows must still be the newest.
func unchanged(tx *store.Tx, obj *certificateObject) (*certificateObject, error) {
	fresh, err := certificates.Lookup(tx, obj.ID)
	if err != nil {
		return nil, err
	}
	same := fresh != nil && fresh.UID == obj.UID && fresh.Generation == obj.Generation && fresh.Status.Current == obj.Status.Current &&
		fresh.Status.Operation.RequestID == obj.Status.Operation.RequestID && fresh.Status.Operation.Status == obj.Status.Operation.Status
	if !same {
		return nil, errSuperseded
	}
	open, err := inUse(tx, obj.ID)
	if err == nil && !open {
		err = errSuperseded
	}
	return fresh, err
}

// inUse reports whether the vault of an object can be written to.
func inUse(tx *store.Tx, id string) (bool, error) {
	vault, _ := splitID(id)
	vt, err := vaults.Lookup(tx, vault)
	return vt != nil && vt.Spec.Deleted == nil && vt.Deleting.IsZero(), err
}

// finish writes the new version into the certificate's status.
func (v *Vaults) finish(obj *certificateObject, next *issued, requested bool) {
	st, now := &obj.Status, v.now()
	if !requested {
		st.Operation = Operation{RequestID: newVersion(), Started: now, Issuer: obj.Spec.Policy.Issuer}
	}
	op := &st.Operation
	op.Status, op.Version, op.Ended, op.Details, op.Code, op.Message = Completed, next.version, now, "", "", ""
	st.Current, st.Start, st.NotBefore, st.NotAfter = next.version, next.cert.Start, next.cert.NotBefore, next.cert.Expires
	st.Thumbprint, st.MailDue = next.cert.Thumbprint, time.Time{}
	// The same words as the runtime's, so it has nothing left to write.
	for _, c := range []store.Condition{
		{Type: reconcile.Ready, Status: true, Reason: "Reconciled"},
		{Type: reconcile.Reconciling, Reason: "Reconciled"},
		{Type: reconcile.Stalled, Reason: "Reconciled"},
	} {
		obj.SetCondition(c, now)
	}
}

// put writes version, secret, the secret's head and the certificate's status.
func (next *issued) put(tx *store.Tx, obj *certificateObject) error {
	cert := &certificateVersion{Spec: next.cert}
	cert.ID = obj.ID + "/" + next.version
	if err := certificateVersions.Insert(tx, cert); err != nil {
		return err
	}
	secret := &secretVersion{Spec: next.secret}
	secret.ID = cert.ID
	if err := secretVersions.Insert(tx, secret); err != nil {
		return err
	}
	h, err := secrets.Lookup(tx, obj.ID)
	if err != nil {
		return err
	}
	if h == nil {
		h = &secretHead{Spec: head{Name: obj.Spec.Name, Managed: true}}
		h.ID = obj.ID
	}
	if !h.Spec.Managed || h.Spec.Deleted != nil {
		return fault.New(fault.Conflict, "Conflict", "A secret %s is in the way of the certificate's.", h.Spec.Name)
	}
	h.Spec.Current = next.version
	if err := putHead(tx, h); err != nil {
		return err
	}
	return certificates.PutStatus(tx, obj)
}
