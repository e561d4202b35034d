package kube

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

func namespace(t *testing.T, a *api, name string) {
	t.Helper()
	if _, err := a.typed.CoreV1().Namespaces().Create(t.Context(), &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func rootCAs(t *testing.T, c *cluster, a *api) {
	namespace(t, a, "ending")
	want := string(c.CA.PEM())
	var roots map[string]string
	read := func() map[string]string {
		var err error
		if roots, err = a.RootCAs(t.Context()); err != nil {
			t.Fatal(err)
		}
		return roots
	}
	eventually(t, "the CA is in every namespace", func() bool {
		return read()["ending"] == want && roots["default"] == want && roots["kube-system"] == want
	})
	// Nobody removes what is in the namespace, so that it stays as it is now.
	if err := a.typed.CoreV1().Namespaces().Delete(t.Context(), "ending", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if read()["ending"] != want {
		t.Error("a namespace that ends still has the CA")
	}
	if err := a.DeleteConfigMap(t.Context(), "ending", rootCA); err != nil {
		t.Fatal(err)
	}
	if ca, ok := read()["ending"]; ok {
		t.Errorf("nobody will publish a CA in a namespace that ends, and we would wait for it: %q", ca)
	}
}

func configMaps(t *testing.T, a *api) {
	maps := a.typed.CoreV1().ConfigMaps("default")
	created, err := maps.Create(t.Context(), &core.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Data: map[string]string{"kept": "1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	interfere := func(data map[string]string) {
		m, err := maps.Get(t.Context(), "m", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m.Data["others"] += "x"
		if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	err = a.PutConfigMap(t.Context(), "default", "m", func(data map[string]string) error {
		if calls++; calls == 1 {
			interfere(data)
		}
		data["ours"] = "2"
		return nil
	})
	data, readErr := a.ConfigMap(t.Context(), "default", "m")
	if err != nil || readErr != nil || calls != 2 || data["kept"] != "1" || data["others"] != "x" || data["ours"] != "2" {
		t.Errorf("after a lost race: %d calls, %v, %v, %v", calls, data, err, readErr)
	}
	calls = 0
	err = a.PutConfigMap(t.Context(), "default", "m", func(data map[string]string) error {
		calls++
		interfere(data)
		data["ours"] = "3"
		return nil
	})
	if !errors.Is(err, fault.Conflict) || calls != races {
		t.Errorf("somebody else writes all the time: %d calls, %v", calls, err)
	}
	before, _ := maps.Get(t.Context(), "m", metav1.GetOptions{})
	if err := a.PutConfigMap(t.Context(), "default", "m", func(map[string]string) error { return nil }); err != nil {
		t.Errorf("no change: %v", err)
	}
	refusal := errors.New("not so")
	if err := a.PutConfigMap(t.Context(), "default", "m", func(data map[string]string) error { data["ours"] = "4"; return refusal }); err != refusal {
		t.Errorf("the change itself refuses: %v", err)
	}
	if after, _ := maps.Get(t.Context(), "m", metav1.GetOptions{}); after.ResourceVersion != before.ResourceVersion || before.ResourceVersion == created.ResourceVersion {
		t.Error("it was written without a change")
	}
	if err := a.DeleteConfigMap(t.Context(), "default", "m"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ConfigMap(t.Context(), "default", "m"); !errors.Is(err, fault.NotFound) || !strings.Contains(err.Error(), "default/m") {
		t.Errorf("reading what is not there: %v", err)
	}
	if err := a.PutConfigMap(t.Context(), "default", "m", func(map[string]string) error { t.Error("called"); return nil }); !errors.Is(err, fault.NotFound) {
		t.Errorf("changing what is not there: %v", err)
	}
	if err := a.DeleteConfigMap(t.Context(), "default", "m"); !errors.Is(err, fault.NotFound) {
		t.Errorf("deleting what is not there: %v", err)
	}
	// A ConfigMap without any entry can get one.
	if _, err := maps.Create(t.Context(), &core.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "empty"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := a.PutConfigMap(t.Context(), "default", "empty", func(data map[string]string) error { data["a"] = "b"; return nil }); err != nil {
		t.Errorf("an empty ConfigMap: %v", err)
	}
}

func tokenSecrets(t *testing.T, c *cluster, a *api) {
	serviceToken(t, a, "old-style")
	secrets := a.typed.CoreV1().Secrets("default")
	for name, kind := range map[string]core.SecretType{"old-style-token": core.SecretTypeServiceAccountToken, "password": core.SecretTypeOpaque} {
		s := &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{core.ServiceAccountNameKey: "old-style"}}, Type: kind}
		if kind == core.SecretTypeOpaque {
			s.Data = map[string][]byte{core.ServiceAccountTokenKey: []byte("letmein")}
		}
		if _, err := secrets.Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	list := func() rotation.TokenSecret {
		all, err := a.TokenSecrets(t.Context())
		if err != nil || len(all) != 1 {
			t.Fatalf("%d token Secrets, %v", len(all), err)
		}
		return all[0]
	}
	eventually(t, "the Secret has a token", func() bool { return list().Token != "" })
	s := list()
	if ok, err := a.ReviewToken(t.Context(), s.Token); !ok || err != nil || s.Namespace != "default" || s.Name != "old-style-token" || s.CA != string(c.CA.PEM()) {
		t.Errorf("%s/%s, accepted: %v, %v", s.Namespace, s.Name, ok, err)
	}
	before, err := secrets.Get(t.Context(), s.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.BlankToken(t.Context(), s.Namespace, s.Name); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the controller manager has made a token", func() bool { return list().Token != "" })
	after, err := secrets.Get(t.Context(), s.Name, metav1.GetOptions{})
	if err != nil || after.ResourceVersion == before.ResourceVersion || after.UID != before.UID {
		t.Errorf("it is not the same Secret with a new token: %v", err)
	}
	if err := a.BlankToken(t.Context(), "default", "password"); !errors.Is(err, fault.Invalid) || strings.Contains(err.Error(), "letmein") {
		t.Errorf("a Secret of another type: %v", err)
	}
	if p, err := secrets.Get(t.Context(), "password", metav1.GetOptions{}); err != nil || string(p.Data[core.ServiceAccountTokenKey]) != "letmein" {
		t.Errorf("it was changed: %v, %v", p.Data, err)
	}
	if err := a.BlankToken(t.Context(), "default", "none"); !errors.Is(err, fault.NotFound) {
		t.Errorf("a Secret that is not there: %v", err)
	}
}

// create creates an object from JSON in the place of its kind.
func create(t *testing.T, a *api, kind, text string, values ...any) {
	t.Helper()
	for _, p := range places() {
		if p.kind != kind {
			continue
		}
		var object map[string]any
		if err := json.Unmarshal(fill(t, text, values...), &object); err != nil {
			t.Fatal(err)
		}
		object["kind"], object["apiVersion"] = kind, p.resource.GroupVersion().String()
		if _, err := a.dynamic.Resource(p.resource).Create(t.Context(), &unstructured.Unstructured{Object: object}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no place for a %s", kind)
}
