package etcdadmin

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

func members(t *testing.T, e rotation.Etcd) []rotation.EtcdMember {
	t.Helper()
	all, err := e.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b rotation.EtcdMember) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func TestKeys(t *testing.T) {
	c := start(t, 1, func(c *embed.Config) { c.MaxTxnOps = 3 })
	e := c.open(t)
	if err := e.Put(t.Context(), nil); err != nil {
		t.Errorf("writing nothing: %v", err)
	}
	if err := e.Put(t.Context(), map[string][]byte{"/a": []byte("1"), "/b": {0, 255}}); err != nil {
		t.Fatal(err)
	}
	if v, err := e.Get(t.Context(), "/b"); err != nil || !bytes.Equal(v, []byte{0, 255}) {
		t.Errorf("read %q, %v", v, err)
	}
	if _, err := e.Get(t.Context(), "/none"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a key that is not there: %v", err)
	}
	if err := e.Put(t.Context(), map[string][]byte{"/1": nil, "/2": nil, "/3": nil, "/4": nil}); !errors.Is(err, fault.TooLarge) {
		t.Errorf("too many keys for one transaction: %v", err)
	}
	if _, err := e.Get(t.Context(), "/1"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a refused transaction left something: %v", err)
	}
	secret := strings.Repeat("secret", 1<<18)
	if err := e.Put(t.Context(), map[string][]byte{"/big": []byte(secret)}); !errors.Is(err, fault.TooLarge) || strings.Contains(err.Error(), "secretsecret") {
		t.Errorf("a value that is too large: %.300v", err)
	}
}

func TestCloseLeavesNoConnection(t *testing.T) {
	c := start(t, 1, nil)
	e, err := Opener(c.network)(t.Context(), endpoints(1), administrator(t, c.ca))
	if err != nil {
		t.Fatal(err)
	}
	members(t, e)
	if err := e.Snapshot(t.Context(), new(bytes.Buffer)); err != nil {
		t.Fatal(err)
	}
	if c.network.connections() == 0 {
		t.Fatal("the connections are not counted")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "no connection is left", func() bool { return c.network.connections() == 0 })
}

func TestThreeMembers(t *testing.T) {
	c := start(t, 3, nil)
	e := c.open(t)
	all := members(t, e)
	leaders := 0
	for i, m := range all {
		if m.Name != c.members[i].Config().Name || m.ID != uint64(c.members[i].Server.MemberID()) || m.Err != nil ||
			m.ClientURL != "https://"+host(i)+":2379" || m.PeerURL != c.peers[i] {
			t.Errorf("member %d: %+v", i, m)
		}
		if m.Leader {
			leaders++
		}
	}
	if len(all) != 3 || leaders != 1 {
		t.Fatalf("%d leaders among %+v", leaders, all)
	}
	for _, m := range all { // three moves at least two of which are real
		if err := e.MoveLeader(t.Context(), m.ID); err != nil {
			t.Fatalf("moving the leader to %s: %v", m.Name, err)
		}
		for i, now := range members(t, e) {
			if now.Leader != (now.ID == m.ID) {
				t.Errorf("after the move to %s: %+v", m.Name, now)
			}
			if lead := uint64(c.members[i].Server.Leader()); lead != m.ID {
				t.Errorf("%s itself says that %x leads, not %x", now.Name, lead, m.ID)
			}
		}
	}
	if err := e.MoveLeader(t.Context(), 12345); !errors.Is(err, fault.NotFound) {
		t.Errorf("moving the leader to nobody: %v", err)
	}
	// With one endpoint the others are found by their client URLs.
	one, err := Opener(c.network)(t.Context(), endpoints(1), administrator(t, c.ca))
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	for _, m := range members(t, one) {
		if m.Err != nil {
			t.Errorf("by its client URL: %+v", m)
		}
	}
	if err := one.MoveLeader(t.Context(), all[1].ID); err != nil || uint64(c.members[0].Server.Leader()) != all[1].ID {
		t.Errorf("moving from a member that was not given as an endpoint: %v", err)
	}
}

func TestMembersThatAreDown(t *testing.T) {
	c := start(t, 3, nil)
	e := c.open(t)
	if err := e.Put(t.Context(), map[string][]byte{"/k": []byte("v")}); err != nil {
		t.Fatal(err)
	}
	c.stop[2]()
	began := time.Now()
	all := members(t, e)
	if took := time.Since(began); took >= statusTime {
		t.Errorf("a member that refuses connections held the others up for %s", took)
	}
	if all[0].Err != nil || all[1].Err != nil || !errors.Is(all[2].Err, fault.Unavailable) || !strings.Contains(all[2].Err.Error(), "refused") {
		t.Errorf("one of three is down: %+v", all)
	}
	eventually(t, "there is a leader among two", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		v, err := e.Get(ctx, "/k")
		return err == nil && string(v) == "v"
	})
	if err := e.MoveLeader(t.Context(), all[2].ID); !errors.Is(err, fault.Unavailable) {
		t.Errorf("moving the leader to a member that is down: %v", err)
	}

	c.stop[1]() // no quorum
	all = members(t, e)
	if all[1].Err == nil || all[2].Err == nil || len(all) != 3 {
		t.Errorf("two of three are down: %+v", all)
	}
	if all[0].Err != nil && !strings.Contains(all[0].Err.Error(), "no leader") {
		t.Errorf("the one that is left: %v", all[0].Err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := e.Get(ctx, "/k"); !errors.Is(err, fault.Unavailable) {
		t.Errorf("reading without a quorum: %v", err)
	}
	if err := e.Put(ctx, map[string][]byte{"/k": nil}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("writing without a quorum: %v", err)
	}
	if err := e.Snapshot(t.Context(), new(bytes.Buffer)); err != nil {
		t.Errorf("a snapshot needs no quorum: %v", err)
	}
}

func TestLearnerIsNamed(t *testing.T) {
	c := start(t, 1, nil)
	e := c.open(t)
	c.peers = append(c.peers, "https://"+free(t))
	client, err := e.(*admin).wire.client(endpoints(1)...)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	added, err := client.MemberAddAsLearner(t.Context(), c.peers[1:])
	if err != nil {
		t.Fatal(err)
	}
	all := members(t, e) // the nameless one comes first
	if len(all) != 2 || !errors.Is(all[0].Err, fault.Unavailable) || !strings.Contains(all[0].Err.Error(), "not been started") || all[1].Err != nil {
		t.Errorf("a member that was not started: %+v", all)
	}
	c.run(t, 1, "existing", c.initial(2), nil)
	eventually(t, "the learner says that it is one", func() bool {
		all = members(t, e)
		return errors.Is(all[1].Err, fault.Conflict) && strings.Contains(all[1].Err.Error(), "m1 is a learner")
	})
	if err := e.MoveLeader(t.Context(), added.Member.ID); !errors.Is(err, fault.Conflict) {
		t.Errorf("a learner cannot lead: %v", err)
	}
}

func TestFullMember(t *testing.T) {
	c := start(t, 1, func(c *embed.Config) { c.QuotaBackendBytes = 1 << 20 })
	e := c.open(t)
	var err error
	eventually(t, "it is full", func() bool {
		err = e.Put(t.Context(), map[string][]byte{"/k": make([]byte, 100<<10)})
		return err != nil
	})
	if f := fault.From(err); !errors.Is(err, fault.Unavailable) || !strings.Contains(f.Message, "full") || f.Fix == "" {
		t.Errorf("writing to a full etcd: %v", err)
	}
	if all := members(t, e); all[0].Err == nil || !strings.Contains(all[0].Err.Error(), "NOSPACE") {
		t.Errorf("a full member: %+v", all)
	}
}

func TestTrust(t *testing.T) {
	c := start(t, 1, nil)
	good, other := administrator(t, c.ca), newCA(t, "other")
	foreign := administrator(t, other)
	c.network.set("10.0.0.99:2379", c.members[0].Clients[0].Addr().String())
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	for name, test := range map[string]struct {
		at   string
		as   rotation.Credential
		kind fault.Kind
		find any
		text string
	}{
		"server of an unknown CA":             {endpoints(1)[0], rotation.Credential{Roots: foreign.Roots, Cert: good.Cert, Key: good.Key}, fault.Unavailable, &authority, "not trusted"},
		"server with another name":            {"10.0.0.99:2379", good, fault.Unavailable, &hostname, "not trusted"},
		"client certificate of an unknown CA": {endpoints(1)[0], rotation.Credential{Roots: good.Roots, Cert: foreign.Cert, Key: foreign.Key}, fault.Unauthenticated, nil, "tls: "},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			_, err := Opener(c.network)(t.Context(), []string{test.at}, test.as)
			if !errors.Is(err, test.kind) || test.find != nil && !errors.As(err, test.find) || err == nil || !strings.Contains(err.Error(), test.text) {
				t.Errorf("%v", err)
			}
			if took := time.Since(began); took >= answerTime {
				t.Errorf("it took %s", took)
			}
		})
	}
	for name, as := range map[string]rotation.Credential{
		"no roots":       {Cert: good.Cert, Key: good.Key},
		"no certificate": {Roots: good.Roots},
		"another key":    {Roots: good.Roots, Cert: good.Cert, Key: foreign.Key},
	} {
		_, err := Opener(c.network)(t.Context(), endpoints(1), as)
		if !errors.Is(err, fault.Invalid) || strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Opener(c.network)(t.Context(), nil, good); !errors.Is(err, fault.Invalid) {
		t.Errorf("no members: %v", err)
	}
}

// A member that got a certificate of another CA is noticed although the
// connection that was made before goes on.
func TestMembersMakesNewConnections(t *testing.T) {
	c := start(t, 3, nil)
	e := c.open(t)
	c.certify(t, 1, newCA(t, "other"))
	var authority x509.UnknownAuthorityError
	if all := members(t, e); all[0].Err != nil || all[2].Err != nil || !errors.As(all[1].Err, &authority) {
		t.Errorf("%+v", all)
	}
	c.certify(t, 1, c.ca)
	for _, m := range members(t, e) {
		if m.Err != nil {
			t.Errorf("it is as before: %+v", m)
		}
	}
}

func TestConnectionComesBack(t *testing.T) {
	c := start(t, 1, nil)
	e := c.open(t)
	at := endpoints(1)[0]
	to := c.members[0].Clients[0].Addr().String()
	c.network.set(at, "")
	c.stop[0]()
	_, err := e.Get(t.Context(), "/k")
	if !errors.Is(err, fault.Unavailable) {
		t.Errorf("without a way to it: %v", err)
	}
	eventually(t, "the way that is missing is named", func() bool {
		_, err := e.Get(t.Context(), "/k")
		return err != nil && strings.Contains(err.Error(), "no way to "+at)
	})
	c.members, c.stop = nil, nil
	c.network.set(at, to)
	c.run(t, 0, "new", c.initial(1), nil)
	eventually(t, "it answers again", func() bool {
		_, err := e.Get(t.Context(), "/k")
		return errors.Is(err, fault.NotFound)
	})
	if w := e.(*admin).wire; w.failure(at) != nil {
		t.Errorf("a failure that is over is still remembered: %v", w.failure(at))
	}
}

func TestNobodyAnswers(t *testing.T) {
	as := administrator(t, newCA(t, "etcd"))
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	n := &network{to: map[string]string{"10.0.0.1:2379": silent.Addr().String(), "10.0.0.2:2379": free(t)}}
	began := time.Now()
	if _, err := Opener(n)(t.Context(), []string{"10.0.0.2:2379"}, as); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody listens: %v", err)
	}
	if took := time.Since(began); took >= answerTime {
		t.Errorf("nobody listens: it took %s", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := Opener(n)(ctx, []string{"10.0.0.1:2379"}, as); !errors.Is(err, fault.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a member that says nothing: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := Opener(n)(ctx, []string{"10.0.0.1:2379"}, as); !errors.Is(err, context.Canceled) || errors.Is(err, fault.Unavailable) {
		t.Errorf("the caller gave up: %v", err)
	}
	eventually(t, "no connection is left", func() bool { return n.connections() == 0 })
}
