package scextension

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// whole is a connection with everything.
func whole(name, namespace string, data map[string]string) wire.Desired {
	d := linker(name, namespace, data)
	d.ServiceAccount = &wire.AccountObject{Name: "sc-account-1", Annotations: map[string]string{identityClient: "client-1"}}
	d.ProviderClass = &wire.ProviderObject{Name: "sc-" + name + "-class", Spec: json.RawMessage(`{"provider":"azure","parameters":{"keyvaultName":"v"}}`)}
	return revised(d)
}

func TestApply(t *testing.T) {
	b := newBed(t)
	b.install(t)
	b.classes(t)
	for name, test := range map[string]func(*testing.T, *bed){
		"a connection is made once": makes, "an object of others is never taken over": foreign, "a connection changes": changes,
		"what others changed is put back": puts, "a pause is kept": pauses, "connections share a ServiceAccount": shares,
		"an object goes over to another connection": hands, "a connection is removed": removes, "a connection is removed and its objects stay": keeps,
		"a desired state is deleted by hand": byHand, "a removal is held up": heldUp, "a desired state that cannot be read": garbage,
		"pods with old values": oldPods, "a kind that does not have all the fields": alters, "a repair that was not noted is counted once": counted,
	} {
		t.Run(name, func(t *testing.T) { test(t, b) })
		b.clean(t)
	}
}

// clean takes all connections away, so that the next test is alone.
func (b *bed) clean(t *testing.T) {
	t.Helper()
	none := []byte(`{"metadata":{"finalizers":null}}`)
	for _, s := range must(b.admin.desiredStates(t.Context()))(t) {
		must(b.api.CoreV1().Secrets(Namespace).Patch(t.Context(), s.Name, types.MergePatchType, none, metav1.PatchOptions{}))(t)
		_ = b.api.CoreV1().Secrets(Namespace).Delete(t.Context(), s.Name, metav1.DeleteOptions{})
	}
}

func makes(t *testing.T, b *bed) {
	b.namespace(t, "makes")
	d := whole("makes", "makes", map[string]string{"AZURE_POSTGRESQL_PASSWORD": "pässword-1", "EMPTY": ""})
	b.order(t, d)
	out, err := b.work(t)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, line := range []string{"created   Secret makes/sc-makes-secret", "created   ServiceAccount makes/sc-account-1", "created   SecretProviderClass makes/sc-makes-class", "1 connections, 0 with a problem; objects: 3 created"} {
		if !strings.Contains(out, line) {
			t.Errorf("the job did not print %q:\n%s", line, out)
		}
	}
	if strings.Contains(out, "pässword") {
		t.Error("the job printed a value")
	}
	if !b.holds(t, secretOf(d), d.Secret.Data) {
		t.Error("the Secret is not as it shall be")
	}
	if u := b.live(t, accountOf(d)); u.GetAnnotations()[identityClient] != "client-1" {
		t.Errorf("the annotations of the ServiceAccount are %v", u.GetAnnotations())
	}
	for _, o := range named(d) {
		u := b.live(t, o)
		if l := u.GetLabels(); l[labelManagedBy] != Extension || l[labelConnection] != Key(d.ID) {
			t.Errorf("%s has the labels %v", o, l)
		}
		for _, f := range u.GetManagedFields() {
			if f.Manager != Extension {
				t.Errorf("%s was written by %s", o, f.Manager)
			}
		}
	}
	a := b.applied(t, d)
	if a.Revision != d.Revision || a.Problem != nil || len(a.Objects) != 3 || a.Repaired != 0 || a.Objects[2].Hash != wire.SecretHash(d.Secret.Data) || a.Objects[2].Changed.IsZero() {
		t.Errorf("noted: %+v", a)
	}
	if strings.Contains(b.state(t, d).Annotations[annotationApplied], "pässword") {
		t.Error("a value was noted")
	}
	unwritten(t, b, d, func() {
		if out, err := b.work(t); err != nil || !strings.Contains(out, "3 unchanged") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// unwritten fails the test if something writes the objects of a connection or its desired state.
func unwritten(t *testing.T, b *bed, d wire.Desired, do func()) {
	t.Helper()
	versions := func() map[string]string {
		all := map[string]string{"the desired state": b.state(t, d).ResourceVersion}
		for _, o := range named(d) {
			all[o.String()] = b.live(t, o).GetResourceVersion()
		}
		return all
	}
	before := versions()
	do()
	if after := versions(); !maps.Equal(before, after) {
		t.Errorf("something was written: before %v, after %v", before, after)
	}
}

func foreign(t *testing.T, b *bed) {
	b.namespace(t, "foreign")
	d := whole("foreign", "foreign", map[string]string{"K": "ours"})
	theirs := &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: d.Secret.Name}, StringData: map[string]string{"K": "theirs"}}
	made := must(b.api.CoreV1().Secrets(d.Namespace).Create(t.Context(), theirs, metav1.CreateOptions{}))(t)
	b.order(t, d)
	out, err := b.work(t)
	if err == nil || !strings.Contains(out, "Resource already exists in your cluster: Secret foreign/sc-foreign-secret") {
		t.Errorf("%v\n%s", err, out)
	}
	a := b.applied(t, d)
	says(t, a.Problem, "ResourceExists", "Secret foreign/sc-foreign-secret", "kubectl -n foreign delete secrets sc-foreign-secret")
	if b.live(t, secretOf(d)).GetResourceVersion() != made.ResourceVersion {
		t.Error("the Secret of others was written")
	}
	if len(a.Objects) != 2 || b.live(t, accountOf(d)) == nil {
		t.Errorf("what is not in the way was not made: %+v", a.Objects)
	}
	b.edit(t, secretOf(d), `{"metadata":{"labels":{"app.kubernetes.io/managed-by":"sc-extension"}}}`) // as the fix says
	if out, err := b.work(t); err != nil || !b.holds(t, secretOf(d), d.Secret.Data) || b.applied(t, d).Problem != nil {
		t.Errorf("the Secret was given to the connection: %v\n%s", err, out)
	}
}

func changes(t *testing.T, b *bed) {
	b.namespace(t, "changes")
	b.namespace(t, "changes-2")
	d := whole("changes", "changes", map[string]string{"A": "1", "B": "2"})
	b.order(t, d)
	must(b.work(t))(t)
	first := b.applied(t, d).Objects[2].Changed

	d.Secret.Data = map[string]string{"A": "1", "C": "3"}
	d.ServiceAccount.Annotations = map[string]string{identityTenant: "t"}
	d.ProviderClass.Spec = json.RawMessage(`{"provider":"azure","parameters":{"keyvaultName":"w"}}`)
	d = revised(d)
	b.edit(t, accountOf(d), `{"metadata":{"annotations":{"others":"stay"},"labels":{"team":"x"}}}`)
	b.order(t, d)
	must(b.work(t))(t)
	u := b.live(t, accountOf(d))
	if a := u.GetAnnotations(); len(a) != 2 || a[identityTenant] != "t" || a["others"] != "stay" || u.GetLabels()["team"] != "x" {
		t.Errorf("the ServiceAccount has %v, %v", a, u.GetLabels())
	}
	a := b.applied(t, d)
	if !b.holds(t, secretOf(d), d.Secret.Data) || a.Repaired != 0 || a.Revision != d.Revision || !a.Objects[2].Changed.After(first) {
		t.Errorf("noted: %+v", a)
	}
	if name := b.live(t, classOf(d)).Object["spec"].(map[string]any)["parameters"].(map[string]any)["keyvaultName"]; name != "w" {
		t.Errorf("the SecretProviderClass names the vault %v", name)
	}

	old := named(d) // everything moves
	d.Namespace, d.Secret.Name, d.ServiceAccount.Name, d.ProviderClass = "changes-2", "sc-other-secret", "sc-account-2", nil
	d = revised(d)
	b.order(t, d)
	if out, err := b.work(t); err != nil || !strings.Contains(out, "2 created 0 updated 0 repaired 3 removed") {
		t.Errorf("%v\n%s", err, out)
	}
	for _, o := range old {
		if b.live(t, o) != nil {
			t.Errorf("%s is still there", o)
		}
	}
	if a := b.applied(t, d); len(a.Objects) != 2 || a.Repaired != 0 {
		t.Errorf("noted: %+v", a)
	}
}

func puts(t *testing.T, b *bed) {
	b.namespace(t, "puts")
	d := whole("puts", "puts", map[string]string{"A": "1"})
	b.order(t, d)
	must(b.work(t))(t)
	changed := b.applied(t, d).Objects[2].Changed
	secret := secretOf(d)
	repaired := 0
	for what, edit := range map[string]func(){
		"a key is added":              func() { b.edit(t, secret, `{"stringData":{"X":"x"}}`) },
		"a value is changed":          func() { b.edit(t, secret, `{"stringData":{"A":"x"}}`) },
		"a key is removed":            func() { b.edit(t, secret, `{"data":{"A":null}}`) },
		"all data is removed":         func() { b.edit(t, secret, `{"data":null}`) },
		"the label of the connection": func() { b.edit(t, secret, `{"metadata":{"labels":{"keyfleet.dev/connection":null}}}`) },
		"the label of the manager":    func() { b.edit(t, secret, `{"metadata":{"labels":{"app.kubernetes.io/managed-by":"me"}}}`) },
		"the time of the last change": func() {
			b.edit(t, secret, `{"metadata":{"annotations":{"keyfleet.dev/changed":"2001-01-01T00:00:00Z"}}}`)
		},
		"it can be changed no more":     func() { b.edit(t, secret, `{"immutable":true,"stringData":{"X":"x"}}`) },
		"the Secret is deleted":         func() { b.discard(t, secret) },
		"the ServiceAccount is deleted": func() { b.discard(t, accountOf(d)) },
		"an annotation is changed": func() {
			b.edit(t, accountOf(d), `{"metadata":{"annotations":{"azure.workload.identity/client-id":"x"}}}`)
		},
		"a parameter is added":           func() { b.edit(t, classOf(d), `{"spec":{"parameters":{"x":"y"}}}`) },
		"the class is deleted":           func() { b.discard(t, classOf(d)) },
		"Secret and account are deleted": func() { b.discard(t, secret); b.discard(t, accountOf(d)); repaired++ },
	} {
		edit()
		repaired++
		out, err := b.work(t)
		if err != nil || !b.holds(t, secret, d.Secret.Data) || !strings.Contains(out, "repaired") {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
		if a := b.applied(t, d); a.Repaired != repaired || a.RepairedAt.IsZero() || len(a.Objects) != 3 || !a.Objects[2].Changed.Equal(changed) {
			t.Errorf("%s, repair %d: noted %+v", what, repaired, a)
		}
		unwritten(t, b, d, func() { must(b.work(t))(t) })
	}
	b.edit(t, secret, `{"metadata":{"annotations":{"note":"mine"},"labels":{"team":"x"}}}`) // that is no drift
	unwritten(t, b, d, func() { must(b.work(t))(t) })
}

func pauses(t *testing.T, b *bed) {
	b.namespace(t, "pauses")
	d := linker("pauses", "pauses", map[string]string{"A": "1"})
	b.order(t, d)
	must(b.work(t))(t)
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	pause := func(at time.Time) {
		b.edit(t, secretOf(d), `{"stringData":{"A":"by hand"},"metadata":{"annotations":{"keyfleet.dev/pause-until":"`+at.Format(time.RFC3339)+`"}}}`)
	}
	pause(until)
	out := must(b.work(t))(t)
	if a := b.applied(t, d); !a.PausedUntil.Equal(until) || a.Repaired != 0 || !strings.Contains(out, "1 paused") || !b.holds(t, secretOf(d), map[string]string{"A": "by hand"}) {
		t.Errorf("noted: %+v\n%s", a, out)
	}
	d.Secret.Data["A"] = "2" // a change that was ordered is made also during a pause
	d = revised(d)
	b.order(t, d)
	must(b.work(t))(t)
	if !b.holds(t, secretOf(d), d.Secret.Data) || !b.applied(t, d).PausedUntil.IsZero() {
		t.Error("an ordered change was held up by a pause")
	}
	for _, at := range []time.Time{time.Now().Add(-time.Minute), time.Now().Add(25 * time.Hour)} { // over, or too long
		pause(at)
		must(b.work(t))(t)
		if !b.holds(t, secretOf(d), d.Secret.Data) {
			t.Errorf("a pause until %s was kept", at)
		}
	}
}

func shares(t *testing.T, b *bed) {
	b.namespace(t, "shares")
	one, two := whole("shares-1", "shares", nil), whole("shares-2", "shares", nil)
	two.ServiceAccount.Annotations = map[string]string{identityClient: "client-1", identityTenant: "t"}
	two = revised(two)
	b.order(t, one)
	b.order(t, two)
	must(b.work(t))(t)
	want := func(annotations ...string) {
		t.Helper()
		u := b.live(t, accountOf(one))
		if u == nil || len(u.GetAnnotations()) != len(annotations) {
			t.Fatalf("the ServiceAccount is %v", u)
		}
		for _, name := range annotations {
			if u.GetAnnotations()[name] == "" {
				t.Errorf("the ServiceAccount has no annotation %s", name)
			}
		}
	}
	want(identityClient, identityTenant)
	unwritten(t, b, one, func() { unwritten(t, b, two, func() { must(b.work(t))(t) }) })

	b.cancel(t, one, wire.RemoveDelete) // whose label it has
	must(b.work(t))(t)
	if b.state(t, one) != nil || b.live(t, secretOf(one)) != nil {
		t.Error("the first connection is still there")
	}
	want(identityClient, identityTenant)
	if label := b.live(t, accountOf(two)).GetLabels()[labelConnection]; label != Key(two.ID) {
		must(b.work(t))(t)
		if label = b.live(t, accountOf(two)).GetLabels()[labelConnection]; label != Key(two.ID) {
			t.Errorf("the ServiceAccount has the label of %s", label)
		}
	}

	b.order(t, one)
	two.ServiceAccount.Annotations = map[string]string{identityClient: "client-2"}
	two = revised(two)
	b.order(t, two)
	if _, err := b.work(t); err == nil {
		t.Error("two connections contradict each other, and the job says nothing")
	}
	for _, d := range []wire.Desired{one, two} {
		says(t, b.applied(t, d).Problem, "ServiceAccountConflict", "shares-1", "shares-2", identityClient)
	}
	b.cancel(t, one, wire.RemoveKeep)
	_, _ = b.work(t)
	must(b.work(t))(t)
	if got := b.live(t, accountOf(two)).GetAnnotations()[identityClient]; got != "client-2" {
		t.Errorf("the one that is left has %s", got)
	}
	b.cancel(t, two, wire.RemoveDelete)
	must(b.work(t))(t)
	if b.live(t, accountOf(two)) != nil {
		t.Error("the last one is gone and the ServiceAccount is not")
	}
}

func hands(t *testing.T, b *bed) {
	b.namespace(t, "hands")
	one, two := linker("hands-1", "hands", map[string]string{"K": "1"}), linker("hands-2", "hands", map[string]string{"K": "2"})
	two.Secret.Name = one.Secret.Name
	two = revised(two)
	b.order(t, one)
	must(b.work(t))(t)
	b.order(t, two)
	if _, err := b.work(t); err == nil || !b.holds(t, secretOf(one), one.Secret.Data) {
		t.Error("a Secret was taken from another connection")
	}
	says(t, b.applied(t, two).Problem, "ResourceExists", one.ID)
	b.cancel(t, one, wire.RemoveDelete)
	_, _ = b.work(t)
	must(b.work(t))(t)
	if b.state(t, one) != nil || !b.holds(t, secretOf(two), two.Secret.Data) {
		t.Error("the Secret did not go over to the connection that wants it")
	}
}

func removes(t *testing.T, b *bed) {
	b.namespace(t, "removes")
	d := whole("removes", "removes", map[string]string{"K": "v"})
	b.order(t, d)
	must(b.work(t))(t)
	b.cancel(t, d, wire.RemoveDelete)
	out, err := b.work(t)
	if err != nil || b.state(t, d) != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	last := -1
	for _, kind := range []string{"Secret ", "SecretProviderClass ", "ServiceAccount "} { // in this order
		at := strings.Index(out, "removed   "+kind)
		if at <= last {
			t.Errorf("%s was not removed in its turn:\n%s", kind, out)
		}
		last = at
	}
	for _, o := range named(d) {
		if b.live(t, o) != nil {
			t.Errorf("%s is still there", o)
		}
	}
}

func keeps(t *testing.T, b *bed) {
	b.namespace(t, "keeps")
	d := whole("keeps", "keeps", map[string]string{"K": "v"})
	b.order(t, d)
	must(b.work(t))(t)
	b.edit(t, secretOf(d), `{"metadata":{"labels":{"team":"x"},"annotations":{"note":"mine"}}}`)
	b.cancel(t, d, wire.RemoveKeep)
	if out, err := b.work(t); err != nil || b.state(t, d) != nil || !strings.Contains(out, "3 released") {
		t.Errorf("%v\n%s", err, out)
	}
	if !b.holds(t, secretOf(d), d.Secret.Data) {
		t.Error("the Secret did not stay")
	}
	for _, o := range named(d) {
		u := b.live(t, o)
		text := string(must(u.MarshalJSON())(t))
		if strings.Contains(text, "keyfleet.dev/") || strings.Contains(text, Extension) {
			t.Errorf("%s still says that it is ours: %s", o, text)
		}
	}
	if u := b.live(t, secretOf(d)); u.GetLabels()["team"] != "x" || u.GetAnnotations()["note"] != "mine" {
		t.Error("what others said of the Secret is gone")
	}
	if b.live(t, accountOf(d)).GetAnnotations()[identityClient] == "" {
		t.Error("the ServiceAccount is not usable any more")
	}
}

func byHand(t *testing.T, b *bed) {
	b.namespace(t, "byhand")
	d := whole("byhand", "byhand", map[string]string{"K": "v"})
	b.order(t, d)
	must(b.work(t))(t)
	before := b.live(t, secretOf(d)).GetResourceVersion()
	b.cancel(t, d, "")
	must(b.work(t))(t)
	if b.state(t, d) != nil || b.live(t, secretOf(d)).GetResourceVersion() != before {
		t.Error("the objects of a desired state that was deleted by hand were touched")
	}
	b.order(t, d) // the manager writes it anew
	if out, err := b.work(t); err != nil || !strings.Contains(out, "3 unchanged") {
		t.Errorf("%v\n%s", err, out)
	}
}

func heldUp(t *testing.T, b *bed) {
	b.namespace(t, "heldup")
	d := whole("heldup", "heldup", map[string]string{"K": "v"})
	b.order(t, d)
	must(b.work(t))(t)
	b.edit(t, secretOf(d), `{"metadata":{"finalizers":["example.com/backup"]}}`)
	b.cancel(t, d, wire.RemoveDelete)
	if _, err := b.work(t); err == nil {
		t.Error("the job says nothing of a removal that is held up")
	}
	says(t, b.applied(t, d).Problem, "ObjectTerminating", "example.com/backup")
	if b.live(t, accountOf(d)) == nil {
		t.Error("the ServiceAccount went before the Secret")
	}
	b.edit(t, secretOf(d), `{"metadata":{"finalizers":null}}`)
	must(b.work(t))(t)
	if b.state(t, d) != nil || b.live(t, accountOf(d)) != nil {
		t.Error("the removal did not go on")
	}
}

func garbage(t *testing.T, b *bed) {
	d := linker("garbage", "garbage", map[string]string{"K": "v"})
	s := must(desiredSecret(d))(t)
	s.Data[desiredKey] = []byte(`{"id": "x", "future": "canary-garbage"}`)
	must(b.api.CoreV1().Secrets(Namespace).Create(t.Context(), s, metav1.CreateOptions{}))(t)
	if out, err := b.work(t); err == nil || strings.Contains(out, "canary") {
		t.Errorf("%v\n%s", err, out)
	}
	says(t, b.applied(t, d).Problem, "DesiredStateInvalid")
	b.cancel(t, d, wire.RemoveDelete)
	must(b.work(t))(t)
	if b.state(t, d) != nil {
		t.Error("it cannot be removed")
	}
}

// counted: the process dies after a repair and before it can note it.
func counted(t *testing.T, b *bed) {
	b.namespace(t, "counted")
	d := whole("counted", "counted", map[string]string{"K": "v"})
	b.order(t, d)
	must(b.work(t))(t)
	before := b.state(t, d).Annotations[annotationApplied]
	b.discard(t, secretOf(d))
	must(b.work(t))(t)
	patch := must(json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{annotationApplied: before}}}))(t)
	must(b.api.CoreV1().Secrets(Namespace).Patch(t.Context(), desiredName(Key(d.ID)), types.MergePatchType, patch, metav1.PatchOptions{}))(t)
	must(b.work(t))(t)
	if a := b.applied(t, d); a.Repaired != 1 {
		t.Errorf("noted: %+v", a)
	}
	b.discard(t, accountOf(d))
	must(b.work(t))(t)
	if a := b.applied(t, d); a.Repaired != 2 {
		t.Errorf("noted: %+v", a)
	}
}

// alters: the API server takes the object and leaves out what it does not know. That is
// said, and is no drift that is repaired for ever.
func alters(t *testing.T, b *bed) {
	b.namespace(t, "alters")
	d := whole("alters", "alters", map[string]string{"K": "v"})
	d.ProviderClass.Spec = json.RawMessage(`{"provider":"azure","unknown":"x"}`)
	d = revised(d)
	b.order(t, d)
	for range 3 {
		if out, err := b.work(t); err == nil {
			t.Errorf("the job says nothing:\n%s", out)
		}
		a := b.applied(t, d)
		if says(t, a.Problem, "ObjectAltered", "SecretProviderClass alters/"); a.Repaired != 0 || len(a.Objects) != 3 {
			t.Errorf("noted: %+v", a)
		}
	}
	unwritten(t, b, d, func() { _, _ = b.work(t) })
}
