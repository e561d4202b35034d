package agent

import (
	"crypto/x509"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/nodeapi"
	"keyfleet.dev/keyfleet/internal/pki"
)

// TestEnrolAgainAfterLostAnswer: the server spent the token and the agent died
// before it had the answer. The next agent has the same key, so the token counts.
func TestEnrolAgainAfterLostAnswer(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	s.lost = 1
	cfg := s.config()
	first, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.connectOnce(t.Context()); !isAnswer(err, http.StatusServiceUnavailable, "AnswerLost") {
		t.Fatalf("connectOnce = %v", err)
	}
	if s.tokens["good"] == "" {
		t.Fatal("the test server should have spent the token")
	}
	second, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Enrol(t.Context()); err != nil {
		t.Fatal(err)
	}
	if second.Node() != "node1" {
		t.Errorf("enrolled as %q", second.Node())
	}
	for _, f := range []string{nextKeyFile} {
		if exists(second.statePath(f)) {
			t.Errorf("%s is left after the enrolment", f)
		}
	}
	if err := second.fetchGoal(t.Context()); err != nil {
		t.Errorf("the new identity is not used: %v", err)
	}
}

// TestEnrolmentsThatCannotSucceed end at once, with the reason.
func TestEnrolmentsThatCannotSucceed(t *testing.T) {
	other, err := pki.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name   string
		change func(c *Config, s *testServer)
		want   string
	}{
		{"no token", func(c *Config, _ *testServer) { c.Token = "" }, "no join token"},
		{"wrong token", func(c *Config, _ *testServer) { c.Token = "bad" }, "JoinTokenRefused"},
		{"token spent by another key", func(_ *Config, s *testServer) { s.tokens["good"] = "another" }, "JoinTokenRefused"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := newTestServer(t, nodeapi.Config{})
			cfg := s.config()
			c.change(&cfg, s)
			a, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Run = %v, want %q in it", err, c.want)
			}
		})
	}
	t.Run("another CA than the pinned one", func(t *testing.T) {
		s := newTestServer(t, nodeapi.Config{})
		cfg := s.config()
		cfg.CAHash = other.Hash()
		a, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.connectOnce(t.Context()); err == nil || !strings.Contains(err.Error(), "was expected") {
			t.Errorf("connectOnce = %v", err)
		}
		if s.tokens["good"] != "" {
			t.Error("the token was sent to a server that is not the pinned one")
		}
	})
}

// TestCAHash: both public forms of a pin are accepted, and nothing else.
func TestCAHash(t *testing.T) {
	ca, err := pki.NewCA("x", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := checkCA(ca.PEM(), strings.ToUpper(ca.Hash())); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "sha256:", "sha256:00", ca.Hash()[:20]} {
		if checkCA(ca.PEM(), bad) == nil {
			t.Errorf("the pin %q was accepted", bad)
		}
	}
}

// TestRenewal: with certificates that live seconds, the agent renews at half
// life and its requests use the new certificate without a break.
func TestRenewal(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{Life: 3 * time.Second})
	cfg := s.config()
	a, stop := startAgent(t, cfg)
	waitFor(t, "the certificate was renewed twice", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.renewals >= 2
	})
	if err := a.fetchGoal(t.Context()); err != nil {
		t.Errorf("after the renewals: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	id, err := a.loadIdentity()
	if err != nil || id == nil || time.Until(id.leaf().NotAfter) < 0 {
		t.Errorf("the renewed certificate is not on disk: %v, %v", id, err)
	}
}

// TestExpiredCertificate: an agent that was away too long keeps its extensions
// going, and enrols again when it is given a token.
func TestExpiredCertificate(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{Life: 1500 * time.Millisecond})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", s.addPackage(script(calls, succeed, "")))}
	a, stop := startAgent(t, cfg)
	s.waitStatus("one", "success")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	id := a.srv.id.Load()
	waitFor(t, "the certificate has run out", func() bool { return time.Now().After(id.leaf().NotAfter) })
	before := len(readLines(t, calls))

	again := s.config()
	again.LibDir, again.LogDir, again.Token, again.TokenFile = cfg.LibDir, cfg.LogDir, "", filepath.Join(cfg.LibDir, "keyfleet", "join-token")
	a, stop = startAgent(t, again)
	if _, err := a.enrol(t.Context()); !errors.Is(err, errExpired) {
		t.Errorf("enrol without a token = %v", err)
	}
	waitFor(t, "the extension is enabled from the kept goal state", func() bool { return len(readLines(t, calls)) > before })
	s.mu.Lock()
	s.tokens["second"] = ""
	s.reports = nil
	s.mu.Unlock()
	if err := os.WriteFile(again.TokenFile, []byte("second\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.waitStatus("one", "success")
	waitFor(t, "the spent token's file is removed", func() bool { return !exists(again.TokenFile) })
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestRenewAt(t *testing.T) {
	issued := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	cert := &x509.Certificate{NotBefore: issued.Add(-pki.Backdate), NotAfter: issued.Add(24 * time.Hour)}
	for _, c := range []struct {
		spread float64
		want   time.Duration
	}{{0, 9*time.Hour + 36*time.Minute}, {0.5, 12 * time.Hour}, {0.999999, 14*time.Hour + 24*time.Minute}} {
		if got := renewAt(cert, c.spread).Sub(issued); got.Round(time.Minute) != c.want {
			t.Errorf("spread %v: after %s, want %s", c.spread, got, c.want)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	for _, c := range []struct {
		n      int
		spread float64
		want   time.Duration
	}{
		{0, 1, time.Second},
		{1, 1, 2 * time.Second},
		{3, 0.5, 4 * time.Second},
		{6, 1, time.Minute},         // the bound stops at the limit
		{1000, 1, time.Minute},      // and nothing overflows
		{5, 0, 0},                   // full jitter: at once is possible
		{62, 0.5, 30 * time.Second}, // 1 s << 62 would be negative
	} {
		if got := retryAfter(c.n, time.Second, time.Minute, c.spread); got != c.want {
			t.Errorf("retryAfter(%d, spread %v) = %s, want %s", c.n, c.spread, got, c.want)
		}
	}
}

// TestServerAway: the agent goes on with what it has, and follows again when the server is back.
func TestServerAway(t *testing.T) {
	s := newTestServer(t, nodeapi.Config{})
	cfg := s.config()
	calls := filepath.Join(t.TempDir(), "calls")
	s.goal.Extensions = []node.Extension{ext("one", "Thing", "1.0", s.addPackage(script(calls, succeed, "")))}
	_, stop := startAgent(t, cfg)
	s.waitStatus("one", "success")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.gone = true // the server has forgotten the node, as one restored from an old backup would
	s.reports = nil
	s.mu.Unlock()
	again := s.config()
	again.LibDir, again.LogDir, again.Token = cfg.LibDir, cfg.LogDir, ""
	a, _ := startAgent(t, again)
	waitFor(t, "the extension is enabled without the server", func() bool { return len(readLines(t, calls)) == 3 })
	s.mu.Lock()
	s.gone = false
	s.mu.Unlock()
	s.change(func(g *node.GoalState) { g.Extensions[0].Sequence = 2 })
	waitFor(t, "the agent follows again", func() bool { return a.revision() == 2 })
	s.waitReport("sequence 2", func(r node.StatusReport) bool {
		return len(r.Extensions) == 1 && r.Extensions[0].Sequence == 2 && r.Extensions[0].Status == "success"
	})
}

// TestTokenPrintsNothing: a join token does not reach logs by accident.
func TestTokenPrintsNothing(t *testing.T) {
	c := Config{Token: "kft-very-secret"}
	for _, text := range []string{c.Token.String(), c.Token.GoString(), c.Token.LogValue().String()} {
		if strings.Contains(text, "secret") {
			t.Errorf("a token prints as %q", text)
		}
	}
}
