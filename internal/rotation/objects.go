package rotation

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// allReady waits until every node is ready, and its kubelet has given a sign of
// life since: what an API server knew from before proves nothing.
func (e *Engine) allReady(ctx context.Context) error {
	began := e.clusterNow()
	return until(ctx, 5*time.Minute, func(ctx context.Context) error {
		api, err := e.anyAPI(ctx)
		if err != nil {
			return err
		}
		nodes, err := api.Nodes(ctx)
		if err != nil {
			return err
		}
		for _, want := range e.Plan.Nodes {
			i := slices.IndexFunc(nodes, func(n Node) bool { return n.Name == want.Name })
			if i < 0 || !nodes[i].Ready || nodes[i].Seen.Before(began) {
				return fault.New(fault.Unavailable, "NodeNotReady", "Node %s is not ready, or its kubelet has not been heard of since.", want.Name).
					WithFix("look at its kubelet: journalctl -u kubelet")
			}
		}
		return nil
	})
}

// reachKubelets makes every API server open new connections to the kubelets. Its
// client notices a new certificate when it makes a connection, and then closes all,
// that one too (client-go, transport/cert_rotation.go): the request that is lost
// is ours, and not somebody's "kubectl logs".
func (e *Engine) reachKubelets(ctx context.Context) error {
	for _, m := range e.Observed.masters() {
		api, err := e.api(m.Name)
		if err != nil {
			return err
		}
		for _, n := range e.Plan.Nodes {
			if err := until(ctx, time.Minute, func(ctx context.Context) error { return api.ReachKubelet(ctx, n.Name) }); err != nil {
				return fault.New(fault.Unavailable, "KubeletNotReached", "The API server of %s does not reach the kubelet of %s.", m.Name, n.Name).Because(err).
					WithFix("see whether kubectl logs works for a pod of that node, then run the same command again")
			}
		}
	}
	return nil
}

// published waits until every namespace has the roots of the stage.
func (e *Engine) published(ctx context.Context, at Stage) error {
	s := e.material.Authorities[ClusterCA]
	want := map[Stage][]byte{Old: s.Old, Trusted: s.both(), Switched: s.both(), Retired: s.New}[at]
	return until(ctx, 3*time.Minute, func(ctx context.Context) error {
		api, err := e.anyAPI(ctx)
		if err != nil {
			return err
		}
		all, err := api.RootCAs(ctx)
		if err != nil {
			return err
		}
		for namespace, text := range all {
			if !sameCerts([]byte(text), want) {
				return fault.New(fault.Precondition, "NotPublished", "kube-root-ca.crt of namespace %s is not as it must be.", namespace)
			}
		}
		return nil
	})
}

// sameCerts reports whether two PEM texts hold the same certificates, in any order.
func sameCerts(a, b []byte) bool {
	set := func(text []byte) map[string]bool {
		out := map[string]bool{}
		chain, err := pki.ParseChain(text)
		if err != nil {
			return nil
		}
		for _, c := range chain {
			out[string(c.Raw)] = true
		}
		return out
	}
	x, y := set(a), set(b)
	if len(x) != len(y) {
		return false
	}
	for c := range x {
		if !y[c] {
			return false
		}
	}
	return true
}

// objects leads objects of the API that name the cluster CA to a stage.
func (e *Engine) objects(ctx context.Context, at Stage) error {
	api, err := e.anyAPI(ctx)
	if err != nil {
		return err
	}
	s := e.material.Authorities[ClusterCA]
	roots := s.both()
	switch at {
	case Old:
		roots = s.Old
	case Retired:
		roots = s.New
	}
	if s.renewed() {
		if err := e.clusterInfo(ctx, api, roots); err != nil {
			return err
		}
		if err := bundles(ctx, api, s, roots); err != nil {
			return err
		}
	}
	if at != Retired {
		return nil
	}
	return e.rebuildTrust(ctx, api, func(s *Succession) []byte { return s.Old })
}

// bundles changes the CA bundles of webhooks and APIServices that hold the cluster's CA.
func bundles(ctx context.Context, api API, s *Succession, roots []byte) error {
	all, err := api.CABundles(ctx)
	if err != nil {
		return err
	}
	for _, b := range all {
		next, ok := replaceRoots(b.PEM, s, roots)
		if !ok || sameCerts(next, b.PEM) {
			continue
		}
		b.PEM = next
		if err := api.PutCABundle(ctx, b); err != nil {
			return fmt.Errorf("the CA bundle of %s %s: %w", b.Kind, b.Name, err)
		}
	}
	return nil
}

// replaceRoots replaces the cluster's CAs in a bundle; ok is false for a bundle of
// others.
func replaceRoots(bundle []byte, s *Succession, roots []byte) (next []byte, ok bool) {
	chain, err := pki.ParseChain(bundle)
	if err != nil {
		return nil, false
	}
	for _, c := range chain {
		text := pki.EncodeChain(c.Raw)
		if sameCerts(text, s.Old) || sameCerts(text, s.New) {
			ok = true
			continue
		}
		next = join(next, text)
	}
	return join(next, roots), ok
}

// clusterInfo changes the CA that joining nodes are told, if the cluster has it.
func (e *Engine) clusterInfo(ctx context.Context, api API, roots []byte) error {
	err := api.PutConfigMap(ctx, "kube-public", "cluster-info", func(data map[string]string) error {
		k, err := parseInfo([]byte(data["kubeconfig"]))
		if err != nil {
			return err
		}
		text, err := k.with(roots, nil, nil)
		if err != nil {
			return err
		}
		data["kubeconfig"] = string(text)
		return nil
	})
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// untrust takes the new CAs, on the way back, out of what aggregated API servers
// trust. Every API server has the old roots alone by then.
func (e *Engine) untrust(ctx context.Context) error {
	state := e.Journal.State()
	trusted := func(s Step) bool { return s.Phase == Trust && state.Steps[s.Name()] != "" }
	if e.material == nil || !slices.ContainsFunc(e.Plan.Steps, trusted) {
		return nil
	}
	api, err := e.anyAPI(ctx)
	if err != nil {
		return err
	}
	return e.rebuildTrust(ctx, api, func(s *Succession) []byte { return s.New })
}

// rebuildTrust makes the API servers write anew what aggregated API servers
// trust, without one CA of each authority: they only ever add to it. One that has
// not read its new roots yet adds the CA again; then it is done again.
func (e *Engine) rebuildTrust(ctx context.Context, api API, gone func(*Succession) []byte) error {
	const namespace, name = "kube-system", "extension-apiserver-authentication"
	leaves := map[string][]byte{}
	for entry, a := range map[string]Authority{"client-ca-file": ClusterCA, "requestheader-client-ca-file": FrontProxyCA} {
		if s := e.material.Authorities[a]; s != nil && s.renewed() {
			leaves[entry] = gone(s)
		}
	}
	return until(ctx, 2*time.Minute, func(ctx context.Context) error {
		data, err := api.ConfigMap(ctx, namespace, name)
		if err != nil {
			return err
		}
		for entry, ca := range leaves {
			if !holds([]byte(data[entry]), ca) {
				continue
			}
			if err := api.DeleteConfigMap(ctx, namespace, name); err != nil && !errors.Is(err, fault.NotFound) {
				return err
			}
			return fault.New(fault.Precondition, "StillTrusted", "The ConfigMap %s/%s still names a CA that has gone.", namespace, name)
		}
		return nil
	})
}

// holds reports whether a bundle holds a certificate.
func holds(bundle, cert []byte) bool {
	chain, err := pki.ParseChain(bundle)
	if err != nil {
		return false
	}
	one, err := pki.ParseChain(cert)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return bytes.Equal(c.Raw, one[0].Raw) })
}
