package system

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
)

// anObject is an object of a cluster, of whatever kind.
type anObject struct {
	kind string // "deployments.apps"
	name string // "NAMESPACE/NAME", or "NAME"
	text []byte // JSON, and what is in base64 there
}

// objects are all objects of all kinds in all API groups: what there is, and not what
// somebody thought of.
func (r *registered) objects(t *testing.T) []anObject {
	t.Helper()
	cfg, err := clientcmd.RESTConfigFromKubeConfig(r.kube.Kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1 // one request for each kind, at once
	api, err := dynamic.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := discovery.ServerPreferredResources(r.api.Discovery())
	if err != nil {
		t.Fatal(err)
	}
	var all []anObject
	for _, g := range groups {
		version, err := schema.ParseGroupVersion(g.GroupVersion)
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range g.APIResources {
			if slices.Contains(kind.Verbs, "list") {
				all = append(all, listed(t, r.ctx, api, version.WithResource(kind.Name))...)
			}
		}
	}
	return all
}

func listed(t *testing.T, ctx context.Context, api dynamic.Interface, kind schema.GroupVersionResource) []anObject {
	t.Helper()
	list, err := api.Resource(kind).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatalf("listing %s: %v", kind, err)
	}
	var all []anObject
	for _, o := range list.Items {
		text, err := json.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		text = append(append(text, '\n'), decoded(o.Object)...)
		all = append(all, anObject{kind.GroupResource().String(), strings.TrimPrefix(o.GetNamespace()+"/"+o.GetName(), "/"), text})
	}
	return all
}

// decoded is what texts hold that are base64, as the values of Secrets are: in them a
// password may be written in yet another way.
func decoded(v any) (all []byte) {
	switch v := v.(type) {
	case map[string]any:
		for _, inner := range v {
			all = append(all, decoded(inner)...)
		}
	case []any:
		for _, inner := range v {
			all = append(all, decoded(inner)...)
		}
	case string:
		if inside, err := base64.StdEncoding.DecodeString(v); err == nil {
			all = append(inside, '\n')
		}
	}
	return all
}

// ofKubernetes are kinds whose objects come and go without anybody's connection.
func ofKubernetes() map[string]string {
	return map[string]string{
		"events":                     "what happened stays told for an hour",
		"events.events.k8s.io":       "the same objects, by their other name",
		"leases.coordination.k8s.io": "API servers and operators renew theirs for as long as they run",
	}
}

// inventory names all objects but those of Kubernetes' own life.
func (r *registered) inventory(t *testing.T) map[string]bool {
	t.Helper()
	all, kinds := map[string]bool{}, map[string]bool{}
	for _, o := range r.objects(t) {
		kinds[o.kind] = true
		if ofKubernetes()[o.kind] == "" {
			all[o.kind+" "+o.name] = true
		}
	}
	for _, kind := range []string{"serviceaccounts", "namespaces", "roles.rbac.authorization.k8s.io", "leases.coordination.k8s.io"} {
		if !kinds[kind] {
			t.Errorf("control: the inventory has no %s", kind)
		}
	}
	return all
}

// unchanged fails for every object that is there and was not, and the other way round.
func (r *registered) unchanged(t *testing.T, before map[string]bool) {
	t.Helper()
	after := r.inventory(t)
	for o := range after {
		if !before[o] {
			t.Errorf("left in the cluster: %s", o)
		}
	}
	for o := range before {
		if !after[o] {
			t.Errorf("gone from the cluster, though it was there before: %s", o)
		}
	}
	t.Logf("nothing is left of the connections among %d objects", len(after))
}

// hidden is a secret, and the places where it belongs: there it must be found, and
// nowhere else.
type hidden struct {
	name, value string
	in          []string // "secrets NAMESPACE/NAME" of the cluster, or paths of files
}

// noSecretIn searches all objects of the cluster, the server's log, and all that
// server, manager and operator have left on disk (logs, audit, the store's files), in
// all forms and in what is compressed there.
func (c *connected) noSecretIn(t *testing.T, secrets []hidden) {
	t.Helper()
	var canaries []*canary
	for _, s := range secrets {
		canaries = append(canaries, &canary{name: s.name, value: []byte(s.value)})
	}
	s := newScanner(t, canaries)
	s.control(t, canaries)
	found := map[string]map[string]bool{} // by name of the secret: places
	for place, content := range c.places(t) {
		s.searchDeep(content, func(p pattern, _ int) {
			if found[p.canary.name] == nil {
				found[p.canary.name] = map[string]bool{}
			}
			if !found[p.canary.name][place] {
				found[p.canary.name][place] = true
				if i := slices.IndexFunc(secrets, func(s hidden) bool { return s.name == p.canary.name }); !slices.Contains(secrets[i].in, place) {
					t.Errorf("%s (as %s) is in %s", p.canary.name, p.form, place)
				}
			}
		})
	}
	for _, secret := range secrets {
		for _, place := range secret.in {
			if !found[secret.name][place] {
				t.Errorf("control: %s was not found in %s, where it belongs", secret.name, place)
			}
		}
	}
	t.Logf("searched %.1f MB for %d secrets in %d forms", float64(s.bytes)/1e6, len(secrets), len(s.forms))
}

// places is everything that is searched, by name.
func (c *connected) places(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{"the server's log": []byte(c.Log())}
	want := map[string]bool{"events": false, "manager.log": false, "operator.log": false, "audit": false, "etcd": false}
	for _, o := range c.objects(t) {
		all[o.kind+" "+o.name] = o.text
		if _, ok := want[o.kind]; ok {
			want[o.kind] = true
		}
	}
	for _, dir := range []string{c.home, c.Dir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if os.IsNotExist(err) || err == nil && !d.Type().IsRegular() {
				return nil // etcd removes files as it goes
			}
			if err != nil {
				return err
			}
			text, err := os.ReadFile(path)
			if os.IsNotExist(err) {
				return nil
			}
			all[path] = bytes.TrimRight(text, "\x00") // etcd makes its files longer than they are
			rel, _ := filepath.Rel(dir, path)         // it is below
			if first, _, _ := strings.Cut(rel, "/"); len(text) > 0 {
				if _, ok := want[first]; ok {
					want[first] = true
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for what, there := range want {
		if !there {
			t.Errorf("control: the search has not looked at any %s", what)
		}
	}
	return all
}
