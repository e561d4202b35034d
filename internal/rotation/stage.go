package rotation

import (
	"slices"
	"strings"
)

// Stage is how far a file is. Each machine holds, in its private folder, a tree
// of files for each stage; to go forward is to copy from the tree of the next
// stage, to go back is to copy from the one before.
type Stage int

// The stages.
const (
	Old Stage = iota
	Trusted
	Switched
	Retired
)

// String is the name of the stage's tree.
func (s Stage) String() string { return [...]string{"old", "trusted", "switched", "retired"}[s] }

// Scope is what a rotation replaces.
type Scope struct {
	Cluster    bool `json:"cluster"`    // the cluster CA, and with it all that it certified
	Etcd       bool `json:"etcd"`       // the CA of etcd
	FrontProxy bool `json:"frontProxy"` // the CA of the front proxy
	Tokens     bool `json:"tokens"`     // the keys of service account tokens
	Leaves     bool `json:"leaves"`     // every certificate, under its present CA unless that is replaced
	// Apart says that the old does not work any more: nothing overlaps, and everything restarts.
	Apart bool `json:"apart,omitempty"`
}

// Everything replaces all there is.
func Everything() Scope {
	return Scope{Cluster: true, Etcd: true, FrontProxy: true, Tokens: true, Leaves: true}
}

// With adds what another scope has.
func (s Scope) With(t Scope) Scope {
	return Scope{s.Cluster || t.Cluster, s.Etcd || t.Etcd, s.FrontProxy || t.FrontProxy, s.Tokens || t.Tokens, s.Leaves || t.Leaves, s.Apart || t.Apart}
}

// ParseScope reads the words of --only; none means everything.
func ParseScope(words []string) (Scope, []string) {
	if len(words) == 0 {
		return Everything(), nil
	}
	var s Scope
	var unknown []string
	for _, w := range words {
		switch strings.ToLower(w) {
		case "cluster-ca":
			s.Cluster = true
		case "etcd-ca":
			s.Etcd = true
		case "front-proxy-ca":
			s.FrontProxy = true
		case "service-account-keys":
			s.Tokens = true
		case "leaves":
			s.Leaves = true
		default:
			unknown = append(unknown, w)
		}
	}
	return s, unknown
}

// ScopeWords returns the words that ParseScope knows.
func ScopeWords() []string {
	return []string{"cluster-ca", "etcd-ca", "front-proxy-ca", "service-account-keys", "leaves"}
}

// String lists what is replaced.
func (s Scope) String() string {
	var out []string
	for i, in := range []bool{s.Cluster, s.Etcd, s.FrontProxy, s.Tokens, s.Leaves} {
		if in {
			out = append(out, ScopeWords()[i])
		}
	}
	return strings.Join(out, ", ")
}

// renews reports whether the authority gets a successor.
func (s Scope) renews(a Authority) bool {
	switch a {
	case ClusterCA:
		return s.Cluster
	case EtcdCA:
		return s.Etcd
	case FrontProxyCA:
		return s.FrontProxy
	}
	return false
}

// reissues reports whether a certificate is issued anew. One whose CA has no key
// any more is renewed only with its CA.
func (l Layout) reissues(s Scope, f File) bool {
	switch {
	case f.Authority == "": // signed by its own key
		return s.Leaves || s.Cluster
	case s.renews(f.Authority):
		return true
	case l.rootKey(f.Authority) == "":
		return false
	case f.Holds == LeafCert && l.keyOf(f.Path).Holds == LeafTokenKey:
		return s.Leaves || s.Tokens
	}
	return s.Leaves
}

// stages returns at which stages the content of a file differs from the stage
// before, given the scope: the table of [Holds]. A manifest changes when its
// component restarts: see stagesOf.
func (l Layout) stages(s Scope, f File) []Stage {
	ca := s.renews(f.Authority)
	when := func(is bool, stages ...Stage) []Stage {
		if !is {
			return nil
		}
		return stages
	}
	switch f.Holds {
	case Roots:
		return when(ca, Trusted, Retired)
	case RootKey:
		return when(ca, Retired)
	case IssuerCert, IssuerKey:
		return when(ca, Trusted, Switched, Retired)
	case LeafCert, Kubeconfig:
		if ca {
			return []Stage{Switched, Retired} // retired: without the cross certificate, and without the old root
		}
		return when(l.reissues(s, f), Switched)
	case LeafKey, SelfCert, KubeletPair, Renewed:
		return when(l.reissues(s, f), Switched)
	case TokenKey:
		return when(s.Tokens, Switched)
	case TokenPublic:
		return when(s.Tokens, Trusted, Retired)
	case LeafTokenKey: // without new token keys, the new certificate is for the present key
		return when(s.Tokens, Trusted, Switched, Retired)
	}
	return nil
}

// changes reports whether the file differs at the stage from the one before.
func (l Layout) changes(s Scope, f File, at Stage) bool { return slices.Contains(l.stages(s, f), at) }

// restarts returns the components that must restart at a stage, on a machine:
// those that read at their start a file that changed, or whose flags change.
// Etcd's roots may wait: until the old ones retire, every certificate comes with
// the new CA certified by the old, so one restart is enough.
func (l Layout) restarts(s Scope, at Stage, master bool) []Component {
	var out []Component
	for _, c := range l.Components {
		if c.On == Masters && !master {
			continue
		}
		if l.restart(s, c, at) {
			out = append(out, c)
		}
	}
	return out
}

func (l Layout) restart(s Scope, c Component, at Stage) bool {
	if len(c.Issuer) > 0 && s.Cluster && (at == Trusted || at == Retired) {
		return true // its flags change
	}
	if c.Signs != "" && at == Switched && l.changes(s, l.file(c.Signs), at) {
		return true
	}
	for _, path := range c.Once {
		f := l.file(path)
		switch {
		case !l.changes(s, f, at),
			f.Holds == Roots && at != Retired,
			f.Holds == LeafCert && at == Retired: // which only loses the cross certificate
			continue
		}
		return true
	}
	return false
}
