package rotation

import (
	"bytes"
	"context"
	"crypto/tls"
	"maps"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// engineOf is an engine of an aks-engine cluster that has its new material.
func engineOf(t *testing.T, s Scope, change func(*present)) *Engine {
	t.Helper()
	l, p := AKSEngine(3, "azureuser"), newPKI(t)
	m := master(t, l, p)
	was := p.present(t, l, s, m)
	if change != nil {
		change(&was)
	}
	mat, err := makeMaterial(l, s, was, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &Engine{Layout: l, Plan: Plan{Scope: s}, Observed: Observation{Layout: l, Machines: []Machine{m}}, material: mat}
}

func TestProfileHoldsWhatIsInUse(t *testing.T) {
	for _, s := range []Scope{withoutEtcd(Everything()), {Leaves: true}, {Cluster: true}} {
		e := engineOf(t, s, nil)
		e.material.Profile = map[string][]byte{"somethingElse": []byte("stays")}
		p := e.newProfile()
		if string(p["somethingElse"]) != "stays" {
			t.Error("an entry that is none of ours is lost")
		}
		if !bytes.Equal(p["caCertificate"], e.material.Authorities[ClusterCA].New) {
			t.Errorf("%s: the CA is not the one in use", s)
		}
		for _, pair := range [][2]string{
			{"apiServerCertificate", "apiServerPrivateKey"},
			{"clientCertificate", "clientPrivateKey"},
			{"kubeConfigCertificate", "kubeConfigPrivateKey"},
			{"etcdServerCertificate", "etcdServerPrivateKey"},
			{"etcdPeerCertificates/2", "etcdPeerPrivateKeys/2"},
		} {
			if _, err := tls.X509KeyPair(p[pair[0]], p[pair[1]]); err != nil {
				t.Errorf("%s: %s: %v", s, pair[0], err)
			}
			if n := bytes.Count(p[pair[0]], []byte("BEGIN CERTIFICATE")); n != 1 { // the cross certificate is no part of it
				t.Errorf("%s: %s holds %d certificates", s, pair[0], n)
			}
		}
	}
}

// TestGivenProfileIsWhatTheClusterGets: CA and pairs are the operator's, and the
// API server's key signs tokens from then on.
func TestGivenProfileIsWhatTheClusterGets(t *testing.T) {
	other := engineOf(t, withoutEtcd(Everything()), nil)
	given := other.newProfile()
	e := engineOf(t, withoutEtcd(Everything()), func(was *present) { was.given = given })
	now := e.newProfile()
	for entry, text := range given {
		if !bytes.Equal(now[entry], text) {
			t.Errorf("%s is not what was given", entry)
		}
	}
	if !bytes.Equal(e.material.Tokens.NewKey, given["apiServerPrivateKey"]) {
		t.Error("tokens are not signed by the given key")
	}
	if e.material.Authorities[ClusterCA].Cross == nil {
		t.Error("the old CA does not certify the given one")
	}
}

func TestModelOfAnotherClusterIsRefused(t *testing.T) {
	e, other := engineOf(t, Scope{Leaves: true}, nil), engineOf(t, Scope{Leaves: true}, nil)
	if err := MatchProfile(e.Observed, e.newProfile()); err != nil {
		t.Error(err)
	}
	for reason, p := range map[string]map[string][]byte{"another cluster's": other.newProfile(), "empty": {}} {
		if err := MatchProfile(e.Observed, p); fault.From(err).Code != "OtherModel" {
			t.Errorf("%s: %v", reason, err)
		}
	}
}

// shelf is an etcd that only keeps keys.
type shelf struct {
	Etcd
	keys map[string][]byte
	puts int
}

func (s *shelf) Get(_ context.Context, key string) ([]byte, error) {
	if v, ok := s.keys[key]; ok {
		return v, nil
	}
	return nil, fault.New(fault.NotFound, "", "no %s", key)
}

func (s *shelf) Put(_ context.Context, pairs map[string][]byte) error {
	s.puts++
	maps.Copy(s.keys, pairs)
	return nil
}

func (*shelf) Close() error { return nil }

func TestCopiesInEtcd(t *testing.T) {
	const root, cert, key = "/proxycerts/requestheader-client-ca-file", "/proxycerts/proxy-client-cert-file", "/proxycerts/proxy-client-key-file"
	s := withoutEtcd(Everything())
	e := engineOf(t, s, nil)
	kept := &shelf{keys: map[string][]byte{root: []byte(" old root\n"), cert: []byte(" old cert"), key: []byte(" old key")}}
	before := maps.Clone(kept.keys)
	e.material.Copies = before
	to := func(at Stage) {
		t.Helper()
		if err := e.writeCopies(t.Context(), kept, at); err != nil {
			t.Fatal(err)
		}
	}
	to(Trusted)
	if n := bytes.Count(kept.keys[root], []byte("BEGIN CERTIFICATE")); n != 2 || !bytes.HasPrefix(kept.keys[root], []byte(" ")) || string(kept.keys[cert]) != " old cert" {
		t.Errorf("at the stage trusted: %d roots, %q", n, kept.keys[cert])
	}
	to(Switched)
	if _, err := tls.X509KeyPair(bytes.TrimSpace(kept.keys[cert]), bytes.TrimSpace(kept.keys[key])); err != nil {
		t.Errorf("at the stage switched: %v", err)
	}
	to(Old)
	for k, v := range before {
		if !bytes.Equal(bytes.TrimSpace(kept.keys[k]), bytes.TrimSpace(v)) {
			t.Errorf("%s did not go back", k)
		}
	}
	kept.keys[key], kept.puts = []byte("somebody else's"), 0
	if err := e.writeCopies(t.Context(), kept, Switched); fault.From(err).Code != "CopyChanged" || kept.puts > 0 || strings.Contains(err.Error(), "else's") {
		t.Errorf("a copy that somebody else changed: %v", err)
	}
	delete(kept.keys, root)
	delete(kept.keys, cert)
	delete(kept.keys, key)
	if err := e.writeCopies(t.Context(), kept, Switched); err != nil || len(kept.keys) > 0 {
		t.Errorf("where nobody keeps copies: %v, %d keys", err, len(kept.keys))
	}
}

func TestReportNamesWhatChanged(t *testing.T) {
	e := engineOf(t, Scope{Leaves: true}, nil)
	after := e.Observed
	changed := after.Machines[0]
	changed.Files = maps.Clone(changed.Files)
	const path = "/etc/kubernetes/certs/client.crt"
	f := changed.Files[path]
	f.Content = e.newProfile()["clientCertificate"]
	changed.Files[path] = f
	after.Machines = []Machine{changed}
	all, err := Compare(e.Observed, after)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.Same() == (c.File == path) {
			t.Errorf("%s: %v to %v", c.File, c.Before, c.After)
		}
	}
	if len(all) < 10 {
		t.Errorf("%d certificates", len(all))
	}
}
