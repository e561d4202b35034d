package rotation

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/pki"
)

// Whoever reached the cluster with a certificate or a token before a rotation needs
// another one: the same name under the new CA, a token of the new key. It can be had
// from the moment that all servers use the new, before the old is refused.

// Renewal makes the successors of credentials that a rotation ends. Make it with [RenewFrom].
type Renewal struct {
	ca  *Succession
	run *journal.Journal // of the unfinished run; nil: there is none
	// Overlap says that a run is unfinished: the old is accepted still.
	Overlap bool
}

// RenewFrom finds the CA that issues: the new one of the unfinished run in the
// journal, whose material open unseals, or without a journal the one on a master. A
// run that has not switched yet is a fault.Precondition.
func RenewFrom(ctx context.Context, h Host, l Layout, j *journal.Journal, open func(sealed []byte) ([]byte, error)) (*Renewal, error) {
	if j == nil {
		root, err := readFile(ctx, h, l.rootFile(ClusterCA))
		if err != nil {
			return nil, err
		}
		key, err := readFile(ctx, h, l.rootKey(ClusterCA))
		return &Renewal{ca: &Succession{Old: root, OldKey: key, New: root, NewKey: key}}, err
	}
	var switched time.Time
	var sealed []byte
	ok, err := j.Get(switchedValue, &switched)
	if err == nil && ok {
		ok, err = j.Get(materialValue, &sealed)
	}
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fault.New(fault.Precondition, "RotationUnfinished", "The unfinished rotation has not switched to the new certificates yet.").
			WithFix("go on with the rotation first")
	}
	plain, err := open(sealed)
	if err != nil {
		return nil, fmt.Errorf("opening the material of the rotation: %w", err)
	}
	var m Material
	if err := json.Unmarshal(plain, &m); err != nil {
		return nil, fmt.Errorf("reading the material of the rotation: %w", err)
	}
	return &Renewal{ca: m.Authorities[ClusterCA], run: j, Overlap: true}, nil
}

// Roots is what API servers are verified with: while old and new overlap, both.
func (r *Renewal) Roots() []byte { return r.ca.both() }

// Administrator is a credential for a day that may do everything.
func (r *Renewal) Administrator(now time.Time) (Credential, error) {
	return r.ca.credential(true, pkix.Name{CommonName: us, Organization: []string{"system:masters"}}, now)
}

// Lasts reports whether a client certificate is one of the CA that stays.
func (r *Renewal) Lasts(cert *x509.Certificate) bool {
	chain, err := pki.ParseChain(r.ca.New)
	return err == nil && cert.CheckSignatureFrom(chain[0]) == nil
}

// Certificate makes the certificate that follows another one, for the same time and
// with a key of its own, both in PEM.
func (r *Renewal) Certificate(like *x509.Certificate, now time.Time) (cert, key []byte, err error) {
	k, err := pki.NewKey(pki.P256)
	if err != nil {
		return nil, nil, err
	}
	if cert, err = r.ca.reissue(like, k.Public(), now); err != nil {
		return nil, nil, err
	}
	if r.run != nil {
		if err := renewed(r.run, cert); err != nil {
			return nil, nil, err
		}
		cert = join(cert, r.ca.Cross) // an API server that has not read the new CA yet accepts it by this one
	}
	key, err = pki.EncodeKey(k)
	return cert, key, err
}

// renewed notes a certificate in the run's journal, before anybody comes with it: so
// that the soak does not take it for an old one.
func renewed(j *journal.Journal, cert []byte) error {
	chain, err := pki.ParseChain(cert)
	if err != nil {
		return err
	}
	var all [][]byte
	if _, err := j.Get(renewedValue, &all); err != nil {
		return err
	}
	return j.Set(renewedValue, append(all, chain[0].Raw))
}
