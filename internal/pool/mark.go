package pool

import (
	"cmp"
	"crypto/x509"
	"maps"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/store"
)

// Mark is an object whose use is its store revision: it is written in the same
// transaction as a change that matters to goal states, and never else. Pools
// and nodes themselves will not do for that, their status moves all the time.
//
//	pool/POOL   the pool's part of the goal state changed
//	node/NODE   the node's own part changed (or a registered host's)
type Mark struct {
	Pool      string            `json:"pool,omitempty"`      // of a node: the store id of its pool
	Node      string            `json:"node,omitempty"`      // of a host: the node that it is now
	URLs      []string          `json:"urls,omitempty"`      // of a pool: the observed secrets, as written
	Packages  map[string]string `json:"packages,omitempty"`  // of a pool: extension -> "VERSION SHA256" last told to nodes
	Protected map[string]string `json:"protected,omitempty"` // of a node: extension -> base64 CMS, made once so that the goal state stays the same
	Count     int64             `json:"count"`               // how often it was written
}

var marks = store.NewCollection[Mark, struct{}]("goals")

func poolMark(key string) string { return "pool/" + key }
func nodeMark(id string) string  { return "node/" + id }

// touch writes a mark, new or again, after change has had its way with it.
func touch(tx *store.Tx, id string, change func(*Mark)) error {
	m, err := marks.Lookup(tx, id)
	if err != nil {
		return err
	}
	if m == nil {
		m = &store.Object[Mark, struct{}]{}
		m.ID = id
		change(&m.Spec)
		m.Spec.Count = 1
		return marks.Insert(tx, m)
	}
	change(&m.Spec)
	m.Spec.Count++
	return marks.Put(tx, m)
}

// markPool notes that the pool's part of the goal states changed.
func (f *Fleet) markPool(tx *store.Tx, p *Pool) error {
	urls := f.observedURLs(&p.Spec)
	packages := f.packages(&p.Spec)
	return touch(tx, poolMark(p.ID), func(m *Mark) { m.URLs, m.Packages = urls, packages })
}

// markNode notes that the node's own part changed: it came to be, or enrolled.
func (f *Fleet) markNode(tx *store.Tx, n *Node) error {
	sealed := map[string]string{}
	if n.Status.Transport != "" {
		p, err := f.get(tx, n.Spec.Pool)
		if err != nil {
			return err
		}
		cert, err := transportCertificate(n.Status.Transport)
		if err != nil {
			return err
		}
		if sealed, err = protect(&p.Spec, cert); err != nil {
			return err
		}
	}
	return touch(tx, nodeMark(n.ID), func(m *Mark) { m.Pool, m.Protected = n.Spec.Pool, sealed })
}

// protect encrypts the protected settings of every extension that has some.
func protect(s *Spec, cert *x509.Certificate) (map[string]string, error) {
	out := map[string]string{}
	for _, e := range s.Properties.Deployment.VM.Extensions {
		if e.Protected.Empty() {
			continue
		}
		text, err := e.Protected.encryptFor(cert)
		if err != nil {
			return nil, err
		}
		out[e.Name] = text
	}
	return out, nil
}

// observedURLs lists the secret URLs that the pool's extensions observe.
func (f *Fleet) observedURLs(s *Spec) []string {
	var urls []string
	for _, e := range s.Properties.Deployment.VM.Extensions {
		set, _ := f.cfg.Settings(e.Publisher, e.Type, e.TypeHandlerVersion, e.Settings)
		for _, o := range set.Observed {
			urls = append(urls, o.URL)
		}
	}
	slices.Sort(urls)
	return slices.Compact(urls)
}

// packages says which package each extension gets now.
func (f *Fleet) packages(s *Spec) map[string]string {
	out := map[string]string{}
	for _, e := range s.Properties.Deployment.VM.Extensions {
		version, pkg, err := f.cfg.Packages.Find(e.Publisher, e.Type, e.TypeHandlerVersion, e.AutoUpgradeMinor != nil && *e.AutoUpgradeMinor)
		if err != nil {
			out[e.Name] = ""
			continue
		}
		out[e.Name] = version + " " + pkg.SHA256
	}
	return out
}

// refreshPackages touches the pool's mark when the packages that this server
// has are others than those its nodes were told of.
func (f *Fleet) refreshPackages(tx *store.Tx, p *Pool) error {
	m, err := marks.Lookup(tx, poolMark(p.ID))
	if err != nil || (m != nil && maps.Equal(m.Spec.Packages, f.packages(&p.Spec))) {
		return err
	}
	return f.markPool(tx, p)
}

// secretRef is a secret of a vault that is hosted here.
type secretRef struct{ vault, secret string }

// unpinned returns the secrets behind the URLs that follow the newest version.
func unpinned(ch SecretChanges, urls []string) []secretRef {
	if ch == nil {
		return nil
	}
	var refs []secretRef
	for _, u := range urls {
		vault, secret, version, ok := ch.Resolve(u)
		if ok && version == "" {
			refs = append(refs, secretRef{strings.ToLower(vault), strings.ToLower(secret)})
		}
	}
	slices.SortFunc(refs, func(a, b secretRef) int {
		return cmp.Or(strings.Compare(a.vault, b.vault), strings.Compare(a.secret, b.secret))
	})
	return slices.Compact(refs)
}

// secretsRevision is the newest revision of the secrets.
func secretsRevision(ch SecretChanges, refs []secretRef) int64 {
	var rev int64
	for _, r := range refs {
		rev = max(rev, ch.Revision(r.vault, r.secret))
	}
	return rev
}
