package rotation

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// What a cluster of AKS Engine has twice: certificates in the API model, for the
// tools that enlarge the cluster, and those of the front proxy in etcd, for masters
// that join. They follow the files.

// hasProfile reports whether the API model holds any of the layout's files.
func (l Layout) hasProfile() bool {
	for _, f := range l.Files {
		if f.Entry != "" {
			return true
		}
	}
	return false
}

// MatchProfile checks that an API model's certificate profile is that of the
// cluster: written over another's, or over what a newer rotation left, it would
// be lost.
func MatchProfile(o Observation, profile map[string][]byte) error {
	for _, f := range o.Layout.Files {
		if f.Holds != Roots || f.Entry == "" {
			continue
		}
		if first := o.masters()[0]; !sameCerts(profile[f.Entry], first.Files[f.Path].Content) {
			return fault.New(fault.Precondition, "OtherModel", "The CA of the API model is not that of %s (%s): it belongs to another cluster, or the CA was replaced without it.", first.Name, f.Path).
				At("properties.certificateProfile." + f.Entry).WithFix("give the API model of this cluster; if its certificates are older than the cluster's, copy the present ones into it first")
		}
	}
	return nil
}

// Entries are the certificates that are in use, by their entry in the API model's
// certificate profile.
func (o Observation) Entries() (map[string]*x509.Certificate, error) {
	out := map[string]*x509.Certificate{}
	for _, f := range o.Layout.Files {
		state := o.masters()[0].Files[f.Path]
		if f.Entry == "" || state.Absent || f.Holds != LeafCert && f.Holds != Kubeconfig {
			continue
		}
		cert, err := o.Layout.certificate(state)
		if err != nil {
			return nil, err
		}
		out[f.Entry] = cert
	}
	return out, nil
}

// SameSubject reports whether a new CA has the name of the present one.
func SameSubject(o Observation, ca []byte) (bool, error) {
	chain, err := pki.ParseChain(ca)
	if err != nil {
		return false, err
	}
	old, err := o.Layout.certificate(o.masters()[0].Files[o.Layout.rootFile(ClusterCA)])
	if err != nil {
		return false, err
	}
	return bytes.Equal(chain[0].RawSubject, old.RawSubject), nil
}

// newProfile are the entries of the API model once the new is in use.
func (e *Engine) newProfile() map[string][]byte {
	out := map[string][]byte{}
	for name, text := range e.material.Profile {
		out[name] = text
	}
	for _, f := range e.Layout.Files {
		ca := e.material.Authorities[f.Authority]
		pair, reissued := e.material.Shared[f.Path]
		switch {
		case f.Entry == "":
		case f.Holds == Roots:
			out[f.Entry] = ca.New
		case f.Holds == RootKey:
			out[f.Entry] = ca.NewKey
		case f.Holds == Kubeconfig && reissued:
			out[f.Entry], out[f.KeyEntry] = pair.Cert, pair.Key
		case reissued:
			out[f.Entry], out[e.Layout.file(f.Pair).Entry] = pair.Key, pair.Cert
		}
	}
	return out
}

// copies reads what stands in etcd.
func (e *Engine) copies(ctx context.Context) (map[string][]byte, error) {
	due := e.dueCopies()
	if len(due) == 0 || e.Plan.Scope.Apart {
		return nil, nil
	}
	etcd, err := e.openEtcd(ctx)
	if err != nil {
		return nil, err
	}
	defer etcd.Close()
	out := map[string][]byte{}
	for _, c := range due {
		text, err := etcd.Get(ctx, c.Key)
		switch {
		case err == nil:
			out[c.Key] = text
		case !errors.Is(err, fault.NotFound): // somebody may keep none there
			return nil, fmt.Errorf("reading %s in etcd: %w", c.Key, err)
		}
	}
	return out, nil
}

// dueCopies are those whose file the rotation changes.
func (e *Engine) dueCopies() []Copy {
	var out []Copy
	for _, c := range e.Layout.Copies {
		f := e.Layout.file(c.Path)
		if !e.Observed.masters()[0].Files[c.Path].Absent && len(e.Layout.stages(e.Plan.Scope, f)) > 0 {
			out = append(out, c)
		}
	}
	return out
}

// copyToEtcd makes the copies be as at a stage, all at once. It overwrites nothing
// that neither we nor the former owner put there.
func (e *Engine) copyToEtcd(ctx context.Context, at Stage) error {
	etcd, err := e.openEtcd(ctx)
	if err != nil {
		return err
	}
	defer etcd.Close()
	return e.writeCopies(ctx, etcd, at)
}

func (e *Engine) writeCopies(ctx context.Context, etcd Etcd, at Stage) error {
	pairs := map[string][]byte{}
	for _, c := range e.dueCopies() {
		now, err := etcd.Get(ctx, c.Key)
		switch {
		case errors.Is(err, fault.NotFound): // somebody may keep none there
			continue
		case err != nil:
			return fmt.Errorf("reading %s in etcd: %w", c.Key, err)
		}
		if !e.knowsCopy(c, now) {
			return fault.New(fault.Conflict, "CopyChanged", "The key %s of etcd was changed by somebody else since the rotation began.", c.Key).
				WithFix("find out who; put back what was there, or roll back")
		}
		// Its readers strip blanks, which the script that wrote it put around it.
		was, is := bytes.TrimSpace(now), bytes.TrimSpace(e.copyAt(c, at))
		pairs[c.Key] = bytes.Replace(now, was, is, 1)
	}
	return etcd.Put(ctx, pairs)
}

// knowsCopy reports whether we or the former owner wrote a copy. In a recovery we
// could not ask for what was there.
func (e *Engine) knowsCopy(c Copy, now []byte) bool {
	if e.Plan.Scope.Apart {
		return true
	}
	return slices.ContainsFunc([]Stage{Old, Trusted, Switched, Retired}, func(at Stage) bool { return bytes.Equal(bytes.TrimSpace(now), bytes.TrimSpace(e.copyAt(c, at))) })
}

// copyAt is what a copy holds at a stage.
func (e *Engine) copyAt(c Copy, at Stage) []byte {
	f := e.Layout.file(c.Path)
	ca := e.material.Authorities[f.Authority]
	from := e.Layout.from(e.Plan.Scope, f, at)
	switch {
	case from == Old.String():
		return e.material.Copies[c.Key]
	case f.Holds == Roots && from == Trusted.String():
		return ca.both()
	case f.Holds == Roots:
		return ca.New
	case f.Holds == LeafKey:
		return e.material.Shared[f.Path].Key
	}
	return e.material.Shared[e.Layout.keyOf(f.Path).Path].Cert
}
