package scextension

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// repairLimit tells a repair that an event has brought about from one by the look at
// everything, every ten minutes. How fast it is: make bench.
const repairLimit = time.Minute

func TestOperator(t *testing.T) {
	b := newBed(t)
	stop := b.operate(t, "one")
	b.namespace(t, "apps")
	d := linker("first", "apps", map[string]string{"PASSWORD": "canary-1"})
	d.ServiceAccount = &wire.AccountObject{Name: "account", Annotations: map[string]string{identityClient: "c"}}
	d = revised(d)
	b.order(t, d)
	eventually(t, "the connection is made", func() bool {
		a := b.applied(t, d)
		return a.Revision == d.Revision && a.Problem == nil && b.holds(t, secretOf(d), d.Secret.Data)
	})
	t.Run("drift is repaired", func(t *testing.T) { b.drift(t, d) })
	t.Run("a namespace appears", b.namespaceAppears)
	t.Run("the add-on appears", b.addonAppears)
	t.Run("a foreign Secret goes", b.foreignGoes)
	t.Run("fifty at once", b.fifty)
	t.Run("jobs beside the operator", b.besides)
	t.Run("a removal", func(t *testing.T) {
		r := linker("removed", "apps", map[string]string{"K": "v"})
		b.order(t, r)
		eventually(t, "it is made", func() bool { return b.holds(t, secretOf(r), r.Secret.Data) })
		b.cancel(t, r, wire.RemoveDelete)
		eventually(t, "it is gone", func() bool { return b.state(t, r) == nil && b.live(t, secretOf(r)) == nil })
	})
	t.Run("a restart writes nothing", func(t *testing.T) {
		b.settled(t)
		before := b.versions(t)
		stop()
		stop = b.operate(t, "two")
		b.settled(t)
		for name, version := range b.versions(t) {
			if before[name] != version {
				t.Errorf("%s was written", name)
			}
		}
	})
	t.Run("two replicas do not fight, and one takes over", func(t *testing.T) { b.replicas(t, d, stop) })
	if strings.Contains(b.log.String(), "canary") {
		t.Error("a value was logged")
	}
}

// drift: every repair is in time, counted, and told in an event.
func (b *bed) drift(t *testing.T, d wire.Desired) {
	var slowest time.Duration
	for i, edit := range []func(){
		func() { b.edit(t, secretOf(d), `{"stringData":{"PASSWORD":"x"}}`) },
		func() { b.discard(t, secretOf(d)) },
		func() { b.edit(t, secretOf(d), `{"stringData":{"X":"x"},"metadata":{"labels":null}}`) }, // it is nobody's now
		func() { b.edit(t, accountOf(d), `{"metadata":{"annotations":null}}`) },
	} {
		if i == 2 { // without labels it is not ours: said, and not touched, until somebody takes it away
			edit()
			eventually(t, "it is said", func() bool { p := b.applied(t, d).Problem; return p != nil && p.Code == "ResourceExists" })
			b.discard(t, secretOf(d))
			eventually(t, "it is made anew", func() bool { return b.applied(t, d).Problem == nil && b.holds(t, secretOf(d), d.Secret.Data) })
			continue
		}
		before := b.applied(t, d).Repaired
		began := time.Now()
		edit()
		eventually(t, fmt.Sprintf("repair %d", i), func() bool {
			return b.holds(t, secretOf(d), d.Secret.Data) && b.live(t, accountOf(d)).GetAnnotations()[identityClient] == "c"
		})
		took := time.Since(began)
		if slowest = max(slowest, took); took > repairLimit {
			t.Errorf("repair %d took %s", i, took)
		}
		eventually(t, "it is counted", func() bool { return b.applied(t, d).Repaired == before+1 })
	}
	t.Logf("the slowest repair took %s", slowest.Round(time.Millisecond))
	eventually(t, "there are events", func() bool {
		events := must(b.api.CoreV1().Events("apps").List(t.Context(), metav1.ListOptions{}))(t).Items
		for _, e := range events {
			if strings.Contains(fmt.Sprint(e), "canary") {
				t.Error("an event shows a value")
			}
		}
		return slices.ContainsFunc(events, func(e core.Event) bool {
			return e.Reason == "Repaired" && e.InvolvedObject.Kind == "Secret" && e.InvolvedObject.Name == d.Secret.Name
		}) && slices.ContainsFunc(events, func(e core.Event) bool { return e.Reason == "Repaired" && e.InvolvedObject.Kind == "ServiceAccount" })
	})
}

func (b *bed) namespaceAppears(t *testing.T) {
	d := linker("early", "late", map[string]string{"K": "v"})
	b.order(t, d)
	eventually(t, "it is said that the namespace is absent", func() bool { return b.applied(t, d).Problem != nil })
	says(t, b.applied(t, d).Problem, "NamespaceNotFound", "kubectl create namespace late")
	b.namespace(t, "late")
	began := time.Now()
	eventually(t, "the Secret is there", func() bool { return b.holds(t, secretOf(d), d.Secret.Data) })
	if took := time.Since(began); took > repairLimit {
		t.Errorf("it took %s after the namespace was made", took)
	}
	eventually(t, "the problem is over", func() bool { return b.applied(t, d).Problem == nil })
}

func (b *bed) addonAppears(t *testing.T) {
	d := linker("vault", "apps", map[string]string{"K": "v"})
	d.ProviderClass = &wire.ProviderObject{Name: "class", Spec: []byte(`{"provider":"azure","parameters":{"a":"b"}}`)}
	d = revised(d)
	b.order(t, d)
	eventually(t, "it is said that the add-on is absent", func() bool { return b.applied(t, d).Problem != nil })
	says(t, b.applied(t, d).Problem, "AddonNotInstalled")
	b.install(t)
	eventually(t, "the SecretProviderClass is there", func() bool { return b.applied(t, d).Problem == nil && len(b.applied(t, d).Objects) == 2 })
	// The watch on the new kind may need a moment; from then on drift is seen at once.
	b.edit(t, classOf(d), `{"spec":{"parameters":{"a":"x"}}}`)
	eventually(t, "it is repaired", func() bool { return b.applied(t, d).Repaired == 1 })
}

func (b *bed) foreignGoes(t *testing.T) {
	d := linker("blocked", "apps", map[string]string{"K": "v"})
	must(b.api.CoreV1().Secrets("apps").Create(t.Context(), &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: d.Secret.Name}}, metav1.CreateOptions{}))(t)
	b.order(t, d)
	eventually(t, "it is said", func() bool { return b.applied(t, d).Problem != nil })
	says(t, b.applied(t, d).Problem, "ResourceExists")
	b.discard(t, secretOf(d))
	eventually(t, "it is made", func() bool { return b.applied(t, d).Problem == nil && b.holds(t, secretOf(d), d.Secret.Data) })
}

// fifty connections at once, with one account that they share.
func (b *bed) fifty(t *testing.T) {
	b.namespace(t, "many")
	var all []wire.Desired
	for i := range 50 {
		d := linker(fmt.Sprintf("many%d", i), "many", map[string]string{"K": fmt.Sprint(i)})
		d.ServiceAccount = &wire.AccountObject{Name: "shared", Annotations: map[string]string{identityClient: "c"}}
		all = append(all, revised(d))
	}
	began := time.Now()
	for _, d := range all {
		b.order(t, d)
	}
	for _, d := range all {
		eventually(t, d.Name+" is made", func() bool { return b.holds(t, secretOf(d), d.Secret.Data) })
	}
	t.Logf("50 connections were made in %s", time.Since(began).Round(time.Millisecond))
	for _, d := range all {
		eventually(t, d.Name+" is noted", func() bool { a := b.applied(t, d); return a.Problem == nil && len(a.Objects) == 2 && a.Repaired == 0 })
	}
	for _, d := range all {
		b.cancel(t, d, wire.RemoveDelete)
	}
	for _, d := range all {
		eventually(t, d.Name+" is gone", func() bool { return b.state(t, d) == nil })
	}
	left := must(b.api.CoreV1().ServiceAccounts("many").List(t.Context(), metav1.ListOptions{LabelSelector: ours}))(t)
	secrets := must(b.api.CoreV1().Secrets("many").List(t.Context(), metav1.ListOptions{}))(t)
	if len(left.Items) != 0 || len(secrets.Items) != 0 {
		t.Errorf("%d accounts and %d Secrets are left", len(left.Items), len(secrets.Items))
	}
}

// besides: jobs do the same at the same time, and all converge with nothing counted as drift.
func (b *bed) besides(t *testing.T) {
	b.namespace(t, "besides")
	all := make([]wire.Desired, 10)
	for turn := range 3 {
		for i := range all {
			all[i] = whole(fmt.Sprintf("besides%d", i), "besides", map[string]string{"TURN": fmt.Sprint(turn)})
			b.order(t, all[i])
		}
		var jobs sync.WaitGroup
		for range 3 {
			jobs.Go(func() {
				if out, err := b.work(t); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
		jobs.Wait()
		for _, d := range all {
			if !b.holds(t, secretOf(d), d.Secret.Data) {
				t.Errorf("after the jobs %s is not as it shall be", d.Name)
			}
			eventually(t, "it is noted", func() bool {
				a := b.applied(t, d)
				return a.Revision == d.Revision && a.Problem == nil && len(a.Objects) == 3 && a.Repaired == 0
			})
		}
	}
	for _, d := range all {
		b.cancel(t, d, wire.RemoveDelete)
	}
	eventually(t, "all are gone", func() bool {
		return !slices.ContainsFunc(all, func(d wire.Desired) bool { return b.state(t, d) != nil || b.live(t, classOf(d)) != nil })
	})
}

// versions are the resource versions of everything that the operator may write, but for leases and events.
func (b *bed) versions(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, k := range kinds {
		for _, u := range must(b.admin.objects.Resource(k.resource).List(t.Context(), metav1.ListOptions{}))(t).Items {
			all[object{k, u.GetNamespace(), u.GetName()}.String()] = u.GetResourceVersion()
		}
	}
	return all
}

// settled waits until nothing was written for three seconds.
func (b *bed) settled(t *testing.T) {
	t.Helper()
	last, since := b.versions(t), time.Now()
	eventually(t, "nothing is written any more", func() bool {
		now := b.versions(t)
		if fmt.Sprint(now) != fmt.Sprint(last) {
			last, since = now, time.Now()
		}
		return time.Since(since) > 3*time.Second
	})
}

// replicas: the one that works is ended, and the other works.
func (b *bed) replicas(t *testing.T, d wire.Desired, stopFirst func()) {
	stopSecond := b.operate(t, "three")
	before := b.applied(t, d).Repaired
	b.discard(t, secretOf(d))
	eventually(t, "it is repaired", func() bool { return b.holds(t, secretOf(d), d.Secret.Data) })
	eventually(t, "it is counted", func() bool { return b.applied(t, d).Repaired > before })
	b.settled(t)
	if got := b.applied(t, d).Repaired; got != before+1 {
		t.Errorf("one repair is counted as %d", got-before)
	}
	stopFirst()
	began := time.Now()
	b.discard(t, secretOf(d))
	eventually(t, "the other replica repairs it", func() bool { return b.holds(t, secretOf(d), d.Secret.Data) })
	t.Logf("the other replica had taken over and repaired it after %s", time.Since(began).Round(time.Millisecond))
	stopSecond()
}
