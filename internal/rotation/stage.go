package rotation

import "strings"

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
}

// Everything replaces all there is.
func Everything() Scope { return Scope{true, true, true, true, true} }

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

// stages returns at which stages the content of a file differs from the stage
// before, given the scope. marked says which components restart at a stage; a
// manifest changes with them.
func (s Scope) stages(f File) []Stage {
	ca := s.renews(f.Authority)
	leaf := ca || s.Leaves
	switch f.Holds {
	case Roots:
		if ca {
			return []Stage{Trusted, Retired}
		}
	case RootKey:
		if ca {
			return []Stage{Retired}
		}
	case IssuerCert, IssuerKey:
		if ca {
			return []Stage{Trusted, Switched, Retired}
		}
	case LeafCert:
		if ca {
			return []Stage{Switched, Retired} // retired: without the cross certificate
		}
		if leaf {
			return []Stage{Switched}
		}
	case LeafKey, KubeletPair:
		if leaf {
			return []Stage{Switched}
		}
	case Kubeconfig:
		if ca {
			return []Stage{Switched, Retired}
		}
		if leaf {
			return []Stage{Switched}
		}
	case TokenKey:
		if s.Tokens {
			return []Stage{Switched}
		}
	case TokenPublic:
		if s.Tokens {
			return []Stage{Trusted, Retired}
		}
	}
	return nil
}

// changes reports whether the file differs at the stage from the one before.
func (s Scope) changes(f File, at Stage) bool {
	for _, st := range s.stages(f) {
		if st == at {
			return true
		}
	}
	return false
}

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
		if s.restart(l, c, at) {
			out = append(out, c)
		}
	}
	return out
}

func (s Scope) restart(l Layout, c Component, at Stage) bool {
	if len(c.Issuer) > 0 && s.Cluster && (at == Trusted || at == Retired) {
		return true // its flags change
	}
	for _, path := range c.Once {
		f := l.file(path)
		if !s.changes(f, at) || f.Holds == Roots && at != Retired {
			continue
		}
		return true
	}
	return false
}
