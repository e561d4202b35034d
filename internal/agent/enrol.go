package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/pki"
)

// trustedCA returns the server's CA: kept from the enrolment, from the
// configuration's file, or fetched and compared with the pin.
func (a *Agent) trustedCA(ctx context.Context) ([]byte, error) {
	if ca, err := readIfThere(a.statePath(caFile)); err != nil || ca != nil {
		return ca, err
	}
	if a.cfg.CAFile != "" {
		ca, err := os.ReadFile(a.cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading the server's CA: %w", err)
		}
		if a.cfg.CAHash != "" {
			return ca, checkCA(ca, a.cfg.CAHash)
		}
		return ca, nil
	}
	if a.cfg.CAHash == "" {
		return nil, errors.New("the server's CA is not known: give its hash (--ca-hash) or its file (--ca)")
	}
	ca, err := fetchCA(ctx, a.cfg.Server, a.cfg.Address)
	if err != nil {
		return nil, err
	}
	return ca, checkCA(ca, a.cfg.CAHash)
}

// connect makes a.srv, and enrols if that has not happened. It tries until ctx
// ends, except where trying again cannot help.
func (a *Agent) connect(ctx context.Context) error {
	for n := 0; ; n++ {
		err := a.connectOnce(ctx)
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if final(err) {
			return err
		}
		wait := retryAfter(n, time.Second, time.Minute, 0.5+spread()/2)
		var ans *answerError
		if errors.As(err, &ans) && ans.RetryAfter > 0 {
			wait = ans.RetryAfter
		}
		a.cfg.Log.Warn("cannot enrol yet", "error", err, "next", wait.Round(time.Millisecond))
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
	}
}

func (a *Agent) connectOnce(ctx context.Context) error {
	ca, err := a.trustedCA(ctx)
	if err != nil {
		return err
	}
	if a.srv == nil {
		if a.srv, err = newServer(a.cfg.Server, a.cfg.Address, ca); err != nil {
			return err
		}
	}
	id, err := a.loadIdentity()
	if err != nil {
		return err
	}
	if id == nil {
		if id, err = a.enrol(ctx); err != nil {
			return err
		}
	}
	a.srv.use(id) // if it has run out, renewLoop says so and tries; the node goes on meanwhile
	return nil
}

// final reports whether an enrolment failed for good: the token or the pin is wrong.
func final(err error) bool {
	var ans *answerError
	if errors.As(err, &ans) {
		return ans.Status == http.StatusUnauthorized || ans.Status == http.StatusForbidden || ans.Status == http.StatusBadRequest
	}
	return errors.Is(err, errNoToken)
}

var errNoToken = errors.New("this machine is not enrolled and there is no join token; make one (keyfleet node token --pool POOL) and run keyfleet-agent join")

// enrol spends the join token. A crash at any point is mended by calling it
// again: the key is kept, and the server answers the same token with the same key again.
func (a *Agent) enrol(ctx context.Context) (*identity, error) {
	token, err := a.cfg.token()
	if err != nil {
		return nil, err
	}
	if token == "" {
		if exists(a.statePath(agentFile)) {
			return nil, errExpired
		}
		return nil, errNoToken
	}
	key, err := a.nextKey()
	if err != nil {
		return nil, err
	}
	csr, err := pki.NewCSR(key, pki.Template{})
	if err != nil {
		return nil, err
	}
	transport, _, err := a.transport()
	if err != nil {
		return nil, err
	}
	req := node.EnrolRequest{
		Token: string(token), Hostname: a.cfg.Hostname, CSR: string(csr), Transport: string(transport), OS: runtime.GOOS, Agent: a.cfg.Version,
	}
	a.srv.use(nil) // an expired certificate would be refused before the request is read
	var resp node.EnrolResponse
	err = effect.Do("enrol", func() error {
		_, err := a.srv.do(ctx, http.MethodPost, "/v1/enrol", nil, req, &resp)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("enrolling: %w", err)
	}
	if err := a.takeCA(resp.CA); err != nil {
		return nil, err
	}
	id, err := a.saveIdentity(resp.Node, key, resp.Certificate)
	if err != nil {
		return nil, err
	}
	a.forgetToken()
	a.cfg.Log.Info("enrolled", "node", id.Node, "server", a.cfg.Server, "until", id.leaf().NotAfter)
	return id, nil
}

// forgetToken removes what only the enrolment needed: the key, which is in
// agent.pem now, and a token file in the state directory. What is left by a
// crash does no harm: the token is spent.
func (a *Agent) forgetToken() {
	_ = effect.Do("remove enrolment key", func() error { return os.Remove(a.statePath(nextKeyFile)) })
	if a.cfg.TokenFile != "" && filepath.Dir(a.cfg.TokenFile) == filepath.Clean(a.cfg.StateDir) {
		_ = effect.Do("remove join token", func() error { return os.Remove(a.cfg.TokenFile) })
	}
}

// takeCA keeps the CA that a trusted server named, and writes the trust file.
// A server whose CA is replaced names old and new for a while.
func (a *Agent) takeCA(ca string) error {
	if _, err := pki.ParseChain([]byte(ca)); err != nil {
		return fmt.Errorf("taking the server's CA: %w", err)
	}
	if old, _ := os.ReadFile(a.statePath(caFile)); string(old) != ca {
		if err := writeFile("CA", a.statePath(caFile), []byte(ca), 0o644); err != nil {
			return err
		}
	}
	return a.writeTrust([]byte(ca))
}

// renewLoop renews the agent's certificate at half of its life until ctx ends.
// A renewal that fails is tried again, at most an hour later, until the
// certificate has run out; then a join token is the only way.
func (a *Agent) renewLoop(ctx context.Context) {
	draw, failures := spread(), 0
	for {
		id := a.srv.id.Load()
		wait := time.Until(renewAt(id.leaf(), draw))
		if failures > 0 {
			wait = renewRetry(failures, time.Until(id.leaf().NotAfter), 0.5+spread()/2)
		}
		if !sleep(ctx, min(max(wait, 0), time.Hour)) {
			return
		}
		if failures == 0 && time.Now().Before(renewAt(id.leaf(), draw)) {
			continue // an hour has passed, or the clock was set
		}
		err := a.renew(ctx, id)
		if err == nil {
			draw, failures = spread(), 0
			continue
		}
		if ctx.Err() != nil {
			return
		}
		failures++
		if failures&(failures-1) == 0 { // ever more seldom
			a.cfg.Log.Warn("the agent's certificate could not be renewed", "error", err, "until", id.leaf().NotAfter, "failures", failures)
		}
	}
}

// renewRetry is how long to wait after a failed renewal when the certificate is
// good for left: up to a tenth of that, an hour at most, and five minutes once it has run out.
func renewRetry(failures int, left time.Duration, spread float64) time.Duration {
	limit := 5 * time.Minute
	if left > 0 {
		limit = min(time.Hour, max(left/10, 5*time.Second))
	}
	return retryAfter(failures, 2*time.Second, limit, spread)
}

// renew gets the next certificate, for a new key, and uses it from the next handshake on.
func (a *Agent) renew(ctx context.Context, id *identity) error {
	if !time.Now().Before(id.leaf().NotAfter) {
		next, err := a.enrol(ctx)
		if err != nil {
			a.srv.use(id)
			return err
		}
		a.srv.use(next)
		return nil
	}
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(key, pki.Template{})
	if err != nil {
		return err
	}
	var resp node.RenewResponse
	err = effect.Do("renew agent certificate", func() error {
		_, err := a.srv.do(ctx, http.MethodPost, "/v1/renew", nil, node.RenewRequest{CSR: string(csr)}, &resp)
		return err
	})
	if err != nil {
		return fmt.Errorf("renewing the agent's certificate: %w", err)
	}
	if err := a.takeCA(resp.CA); err != nil {
		return err
	}
	next, err := a.saveIdentity(id.Node, key, resp.Certificate)
	if err != nil {
		return err
	}
	a.srv.use(next)
	a.cfg.Log.Info("agent certificate renewed", "node", next.Node, "until", next.leaf().NotAfter)
	return nil
}

// sleep waits for d; false: ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
