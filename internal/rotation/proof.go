package rotation

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// canaryName is whom a canary credential names. It has no rights; to be known by
// this name is the proof. Statuses would mislead: where anonymous access is on, a
// certificate that is not trusted makes an anonymous caller of one.
const canaryName = "keyfleet-canary"

// until looks again and again, until it is so or the time is over. A look that the
// end of the time has broken off says nothing; the reason is then that of the one before.
func until(ctx context.Context, within time.Duration, look func(ctx context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var why error
	for {
		err := look(limited)
		if err == nil {
			return nil
		}
		if why == nil || limited.Err() == nil || ctx.Err() != nil {
			why = err
		}
		if sleep(limited, 500*time.Millisecond) != nil {
			return why
		}
	}
}

// gate is a proof that needs an API server. Told to, we go on without where none answers.
func (e *Engine) gate(proof func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		err := proof(ctx)
		if err == nil || !e.Force || !errors.Is(err, fault.Unavailable) {
			return err
		}
		if _, none := e.anyAPI(ctx); none == nil {
			return err
		}
		e.note("not proven, as no API server answers (--force): %v", err)
		return nil
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
	for _, m := range e.Observed.masters() {
		if err := until(ctx, time.Minute, func(ctx context.Context) error { return e.accepted(ctx, m) }); err != nil {
			return fault.New(fault.Precondition, "NotTrusted", "%s does not accept the new material yet: %s.", m.Name, err).Because(err)
		}
	}
	return e.kubelets(ctx, true, true)
}

// kubelets proves that every kubelet knows, or does not know, the owner of a
// certificate of the new or old cluster CA.
func (e *Engine) kubelets(ctx context.Context, fresh, want bool) error {
	s := e.material.Authorities[ClusterCA]
	if !s.renewed() {
		return nil
	}
	c, err := s.credential(fresh, pkix.Name{CommonName: canaryName}, e.Now())
	if err != nil {
		return err
	}
	for _, n := range e.Plan.Nodes {
		err := until(ctx, time.Minute, func(ctx context.Context) error {
			who, err := e.Kubelet(ctx, net.JoinHostPort(n.Address, kubeletPort), c)
			if errors.Is(err, fault.Precondition) { // it lets everybody in, which is not ours to judge
				e.note("%v", err)
				return nil
			}
			if err == nil && (who == canaryName) != want {
				err = fmt.Errorf("it takes the owner of such a certificate for %q", who)
			}
			return err
		})
		if err != nil {
			which := map[bool]string{true: "does not accept certificates of the new CA yet", false: "still accepts certificates of the old CA"}[fresh]
			return fault.New(fault.Precondition, "KubeletTrust", "The kubelet of %s %s: %s.", n.Name, which, err).Because(err).
				WithFix("look at its clientCAFile, then run the same command again")
		}
	}
	return nil
}

// kubeletPort is where kubelets serve.
const kubeletPort = "10250"

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
	s := e.material.Authorities[e.Layout.EtcdBy]
	if !s.renewed() {
		return nil
	}
	c, err := s.credential(true, pkix.Name{CommonName: us}, e.Now())
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
	f := e.Layout.leafOf(FrontProxyCA)
	if c, err := e.Layout.certificate(e.Observed.masters()[0].Files[f.Path]); err == nil && c != nil {
		return c.Subject
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
	for _, m := range e.Observed.masters() {
		for _, c := range e.Layout.Components {
			if c.Serves == "" {
				continue
			}
			address := net.JoinHostPort(m.Address, e.Layout.EtcdPort)
			if c.Name == "kube-apiserver" {
				address = m.Endpoint
			}
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

// refused proves on every master that the old is not accepted any more.
func (e *Engine) refused(ctx context.Context) error {
	for _, m := range e.Observed.masters() {
		if err := until(ctx, time.Minute, func(ctx context.Context) error { return e.refuses(ctx, m) }); err != nil {
			return fault.New(fault.Precondition, "StillAccepted", "%s still accepts the old: %s.", m.Name, err).Because(err)
		}
	}
	if err := e.kubelets(ctx, false, false); err != nil {
		return err
	}
	return e.proven()
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
	s := e.material.Authorities[e.Layout.EtcdBy]
	if !s.renewed() {
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
