package rotation

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// canaryName is whom a canary credential names. It has no rights; to be known by
// this name is the proof. Statuses would mislead: where anonymous access is on, a
// certificate that is not trusted makes an anonymous caller of one.
const canaryName = "keyfleet-canary"

// until looks again and again, until it is so or the time is over.
func until(ctx context.Context, within time.Duration, look func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := look(ctx)
		if err == nil {
			return nil
		}
		if sleep(ctx, 500*time.Millisecond) != nil {
			return err
		}
	}
}

// sleep waits, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// canary proves on every master that the new is accepted: a certificate of the
// new cluster CA, one of the new front-proxy CA, a token of the new key, and a
// client of etcd.
func (e *Engine) canary(ctx context.Context) error {
	for _, m := range e.Observe.masters() {
		if err := until(ctx, time.Minute, func(ctx context.Context) error { return e.accepted(ctx, m) }); err != nil {
			return fault.New(fault.Precondition, "NotTrusted", "%s does not accept the new material yet: %s.", m.Name, err).Because(err)
		}
	}
	return nil
}

func (e *Engine) accepted(ctx context.Context, m Machine) error {
	if err := e.knows(ctx, m, true, true); err != nil {
		return err
	}
	if e.Plan.Scope.Tokens {
		ok, err := e.verifies(ctx, m, e.material.Tokens.NewKey)
		if err != nil {
			return err
		}
		if !ok {
			return errors.New("its API server refuses a token of the new key")
		}
	}
	if !e.Plan.Scope.Etcd {
		return nil
	}
	c, err := e.material.Authorities[EtcdCA].credential(true, pkix.Name{CommonName: us}, e.Now())
	if err != nil {
		return err
	}
	etcd, err := e.Etcd(ctx, []string{net.JoinHostPort(m.Address, e.Layout.EtcdPort)}, c)
	if err != nil {
		return fmt.Errorf("its etcd refuses a client of the new CA: %w", err)
	}
	defer etcd.Close()
	if _, err := etcd.Members(ctx); err != nil {
		return fmt.Errorf("its etcd refuses a client of the new CA: %w", err)
	}
	return nil
}

// knows asks the API server of a master who we are: with a certificate of the
// cluster CA and as a front proxy, of new or old CAs. want is whether it must know us.
func (e *Engine) knows(ctx context.Context, m Machine, fresh, want bool) error {
	which := map[bool]string{true: "new", false: "old"}[fresh]
	ask := func(what string, s *Succession, name pkix.Name, as string) error {
		c, err := s.credential(fresh, name, e.Now())
		if err != nil {
			return err
		}
		c.As, c.Roots = as, e.material.Authorities[ClusterCA].both()
		api, err := e.Connect(m.Endpoint, c)
		if err != nil {
			return err
		}
		who, err := api.WhoAmI(ctx)
		switch {
		case errors.Is(err, fault.Unauthenticated) || errors.Is(err, fault.Denied):
			who = ""
		case err != nil:
			return err
		}
		if (who == canaryName) != want {
			return fmt.Errorf("its API server takes the owner of a certificate of the %s %s CA for %q", which, what, who)
		}
		return nil
	}
	if s := e.material.Authorities[ClusterCA]; s.renewed() {
		if err := ask("cluster", s, pkix.Name{CommonName: canaryName}, ""); err != nil {
			return err
		}
	}
	s := e.material.Authorities[FrontProxyCA]
	if s == nil || !s.renewed() {
		return nil
	}
	return ask("front-proxy", s, e.proxyName(), canaryName)
}

// proxyName is the subject of the front proxy's certificate: API servers accept
// no other.
func (e *Engine) proxyName() pkix.Name {
	first := e.Observe.masters()[0]
	for _, f := range e.Layout.Files {
		if f.Holds == LeafCert && f.Authority == FrontProxyCA {
			if c, err := e.Layout.certificate(first.Files[f.Path]); err == nil && c != nil {
				return c.Subject
			}
		}
	}
	return pkix.Name{CommonName: "front-proxy-client"}
}

// verifies reports whether the API server of a master accepts a token signed by a key.
func (e *Engine) verifies(ctx context.Context, m Machine, key []byte) (bool, error) {
	api, err := e.api(m.Name)
	if err != nil {
		return false, err
	}
	issuer, _, err := api.Issuer(ctx)
	if err != nil {
		return false, err
	}
	const namespace, name = "kube-system", "default"
	uid, err := api.ServiceAccount(ctx, namespace, name)
	if err != nil {
		return false, err
	}
	token, err := signToken(key, issuer, namespace, name, uid, e.Now())
	if err != nil {
		return false, err
	}
	return api.ReviewToken(ctx, token)
}

// served proves that what serves presents the certificates that are in place.
func (e *Engine) served(ctx context.Context) error {
	for _, m := range e.Observe.masters() {
		for _, c := range e.Layout.Components {
			if c.Serves == "" {
				continue
			}
			address := net.JoinHostPort(m.Address, c.Port)
			err := until(ctx, 2*time.Minute, func(ctx context.Context) error { return e.presents(ctx, m.Name, address, c.Serves) })
			if err != nil {
				return fault.New(fault.Precondition, "NotServed", "%s of %s does not present its new certificate: %s.", c.Name, m.Name, err).Because(err)
			}
		}
	}
	return nil
}

// presents compares what a server presents with the file that it must present.
func (e *Engine) presents(ctx context.Context, node, address, file string) error {
	text, err := e.read(ctx, node, file)
	if err != nil {
		return err
	}
	want, err := pki.ParseChain(text)
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	chain, err := e.serves(ctx, address)
	if err != nil {
		return err
	}
	if len(chain) == 0 || !chain[0].Equal(want[0]) {
		return fmt.Errorf("it presents another than %s", file)
	}
	return nil
}

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

// published waits until every namespace has the roots of the stage.
func (e *Engine) published(ctx context.Context, at Stage) error {
	s := e.material.Authorities[ClusterCA]
	want := s.both()
	if at == Retired {
		want = s.New
	}
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
	roots := map[Stage][]byte{Old: s.Old, Trusted: s.both(), Retired: s.New}[min(max(at, Old), Retired)]
	if at == Switched {
		roots = s.both()
	}
	if err := e.clusterInfo(ctx, api, roots); err != nil {
		return err
	}
	bundles, err := api.CABundles(ctx)
	if err != nil {
		return err
	}
	for _, b := range bundles {
		next, ok := replaceRoots(b.PEM, s, roots)
		if !ok || sameCerts(next, b.PEM) {
			continue
		}
		b.PEM = next
		if err := api.PutCABundle(ctx, b); err != nil {
			return fmt.Errorf("the CA bundle of %s %s: %w", b.Kind, b.Name, err)
		}
	}
	if at != Retired {
		return nil
	}
	return e.rebuildTrust(ctx, api)
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
		text, err := k.with(roots, nil)
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

// rebuildTrust makes the API servers write anew what aggregated API servers
// trust: they only ever add to it.
func (e *Engine) rebuildTrust(ctx context.Context, api API) error {
	const namespace, name = "kube-system", "extension-apiserver-authentication"
	old := map[string][]byte{"client-ca-file": e.material.Authorities[ClusterCA].Old}
	if s := e.material.Authorities[FrontProxyCA]; s != nil && s.renewed() {
		old["requestheader-client-ca-file"] = s.Old
	}
	stale := func(ctx context.Context) (bool, error) {
		data, err := api.ConfigMap(ctx, namespace, name)
		if err != nil {
			return false, err
		}
		for entry, ca := range old {
			if holds([]byte(data[entry]), ca) {
				return true, nil
			}
		}
		return false, nil
	}
	is, err := stale(ctx)
	if err != nil && !errors.Is(err, fault.NotFound) {
		return err
	}
	if is {
		if err := api.DeleteConfigMap(ctx, namespace, name); err != nil && !errors.Is(err, fault.NotFound) {
			return err
		}
	}
	return until(ctx, 2*time.Minute, func(ctx context.Context) error {
		is, err := stale(ctx)
		if err == nil && is {
			err = fault.New(fault.Precondition, "StillTrusted", "The ConfigMap %s/%s still names an old CA.", namespace, name)
		}
		return err
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

// tokenSecrets renews the tokens of Secrets once the new key signs.
func (e *Engine) tokenSecrets(ctx context.Context) error {
	if err := e.Journal.Set(switchedValue, e.clusterNow()); err != nil {
		return err
	}
	return e.renewTokens(ctx)
}

// clusterNow is the time by the clock that is ahead, ours or a master's: pods are
// dated by theirs.
func (e *Engine) clusterNow() time.Time {
	ahead := time.Duration(0)
	for _, m := range e.Observe.masters() {
		ahead = max(ahead, m.Facts.Now.Sub(e.Observe.At))
	}
	return e.Now().Add(ahead)
}

// tokensBack waits, on the way back, until nobody uses tokens of the new key.
func (e *Engine) tokensBack(ctx context.Context) error {
	var was time.Time
	if ok, err := e.Journal.Get(switchedValue, &was); err != nil || !ok { // the new key has signed nothing
		return err
	}
	var back time.Time
	if ok, err := e.Journal.Get(backValue, &back); err != nil {
		return err
	} else if !ok {
		back = e.clusterNow()
		if err := e.Journal.Set(backValue, back); err != nil {
			return err
		}
	}
	if err := e.renewTokens(ctx); err != nil {
		return err
	}
	return e.drainUsers(ctx, back, e.Plan.Run+"-back")
}

// renewTokens empties tokens of Secrets; the controller manager signs new ones.
func (e *Engine) renewTokens(ctx context.Context) error {
	api, err := e.anyAPI(ctx)
	if err != nil {
		return err
	}
	secrets, err := api.TokenSecrets(ctx)
	if err != nil {
		return err
	}
	before := map[string]string{}
	for _, s := range secrets {
		before[s.Namespace+"/"+s.Name] = s.Token
		if err := api.BlankToken(ctx, s.Namespace, s.Name); err != nil {
			return fmt.Errorf("the Secret %s/%s: %w", s.Namespace, s.Name, err)
		}
	}
	return until(ctx, 2*time.Minute, func(ctx context.Context) error {
		now, err := api.TokenSecrets(ctx)
		if err != nil {
			return err
		}
		for _, s := range now {
			old, known := before[s.Namespace+"/"+s.Name]
			if known && (s.Token == "" || s.Token == old) {
				return fault.New(fault.Precondition, "TokenNotRenewed", "The Secret %s/%s has no new token yet.", s.Namespace, s.Name)
			}
		}
		return nil
	})
}

// unused waits until nobody uses the old.
func (e *Engine) unused(ctx context.Context) error {
	var began time.Time
	if ok, err := e.Journal.Get(switchedValue, &began); err != nil || !ok {
		began = e.Now()
	}
	if e.Complete {
		return nil
	}
	if e.UntilSoak {
		return &SoakError{}
	}
	return e.drainUsers(ctx, began, e.Plan.Run)
}

// drainUsers waits until no pod holds a token from before a moment. The mark is
// that of restarts of their owners.
func (e *Engine) drainUsers(ctx context.Context, began time.Time, mark string) error {
	// The API tells when a pod began to the second: one that a restart makes from now
	// on must not look like one from before.
	if err := sleep(ctx, began.Add(2*time.Second).Sub(e.Now())); err != nil {
		return err
	}
	limit := e.Soak
	for {
		users, longest, err := e.users(ctx, began, mark)
		if err != nil {
			return err
		}
		if len(users) == 0 {
			return nil
		}
		if limit == 0 {
			limit = min(longest, time.Hour)
		}
		left := began.Add(limit).Sub(e.Now())
		if left <= 0 {
			return &SoakError{Users: users}
		}
		e.note("in use by %s; waiting for up to %s", list(users), left.Round(time.Second))
		if err := sleep(ctx, min(left+time.Second, 5*time.Second)); err != nil {
			return err
		}
	}
}

func list(all []string) string {
	if len(all) > 5 {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:5], ", "), len(all)-5)
	}
	return strings.Join(all, ", ")
}

// users names the pods that may still hold a token of the old key: those that
// began before the switch, until their token's lifetime is over. If asked to, it
// restarts their owners, under a mark that makes that happen once.
func (e *Engine) users(ctx context.Context, switched time.Time, mark string) (names []string, longest time.Duration, err error) {
	if !e.Plan.Scope.Tokens {
		return nil, 0, nil
	}
	api, err := e.anyAPI(ctx)
	if err != nil {
		return nil, 0, err
	}
	pods, err := api.Pods(ctx)
	if err != nil {
		return nil, 0, err
	}
	slices.SortStableFunc(pods, func(a, b Pod) int { // kube-system first
		return strings.Compare(order(a), order(b))
	})
	for _, p := range pods {
		longest = max(longest, p.TokenTTL)
		if p.Mirror || p.TokenTTL == 0 || p.Created.After(switched) || e.Now().After(switched.Add(p.TokenTTL)) {
			continue
		}
		names = append(names, p.Namespace+"/"+p.Name)
		if e.RestartPods {
			if err := api.RestartOwner(ctx, p, mark); err != nil && !errors.Is(err, fault.TooMany) && !errors.Is(err, fault.NotFound) {
				return nil, 0, fmt.Errorf("restarting %s of %s/%s: %w", p.Owner, p.Namespace, p.Name, err)
			}
		}
	}
	return names, longest, nil
}

func order(p Pod) string {
	if p.Namespace == "kube-system" {
		return "0/" + p.Name
	}
	return "1/" + p.Namespace + "/" + p.Name
}

// refused proves on every master that the old is not accepted any more.
func (e *Engine) refused(ctx context.Context) error {
	for _, m := range e.Observe.masters() {
		if err := until(ctx, time.Minute, func(ctx context.Context) error { return e.refuses(ctx, m) }); err != nil {
			return fault.New(fault.Precondition, "StillAccepted", "%s still accepts the old: %s.", m.Name, err).Because(err)
		}
	}
	return nil
}

func (e *Engine) refuses(ctx context.Context, m Machine) error {
	if err := e.knows(ctx, m, false, false); err != nil {
		return err
	}
	if e.Plan.Scope.Tokens {
		ok, err := e.verifies(ctx, m, e.material.Tokens.OldKey)
		if err != nil {
			return err
		}
		if ok {
			return errors.New("its API server accepts a token of the old key")
		}
	}
	s := e.material.Authorities[EtcdCA]
	if s == nil || !s.renewed() {
		return nil
	}
	c, err := s.credential(false, pkix.Name{CommonName: us}, e.Now())
	if err != nil {
		return err
	}
	etcd, err := e.Etcd(ctx, []string{net.JoinHostPort(m.Address, e.Layout.EtcdPort)}, c)
	if err == nil {
		defer etcd.Close()
		_, err = etcd.Members(ctx)
	}
	switch {
	case err == nil:
		return errors.New("its etcd accepts a client of the old CA")
	case errors.Is(err, fault.Unauthenticated):
		return nil
	}
	return err // a silence is no refusal
}
