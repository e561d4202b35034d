package scextension

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

var give = identity{tenant: "tenant-default", authority: "https://login.example/"}

func account(annotations map[string]string) *core.ServiceAccount {
	return &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Annotations: annotations}}
}

func onePod(change func(*core.Pod)) *core.Pod {
	p := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: core.PodSpec{Containers: []core.Container{{Name: "c"}}}}
	if change != nil {
		change(p)
	}
	return p
}

func TestInject(t *testing.T) {
	all := map[string]string{
		"AZURE_CLIENT_ID": "client", "AZURE_TENANT_ID": "tenant-default", "AZURE_AUTHORITY_HOST": "https://login.example/",
		"AZURE_FEDERATED_TOKEN_FILE": "/var/run/secrets/azure/wi/token/azure-identity-token",
	}
	with := func(name, value string) map[string]string {
		m := map[string]string{}
		for k, v := range all {
			m[k] = v
		}
		if m[name] = value; value == "" {
			delete(m, name)
		}
		return m
	}
	client := map[string]string{identityClient: "client"}
	cases := []struct {
		name    string
		pod     *core.Pod
		account map[string]string
		give    identity
		want    map[string]map[string]string // variables, by container
		life    int64
	}{
		{name: "a plain pod", pod: onePod(nil), account: client, give: give, want: map[string]map[string]string{"c": all}, life: 3600},
		{
			name: "the account's tenant counts more", pod: onePod(nil), account: map[string]string{identityClient: "client", identityTenant: "own"}, give: give,
			want: map[string]map[string]string{"c": with("AZURE_TENANT_ID", "own")}, life: 3600,
		},
		{
			name: "what has no value is left out", pod: onePod(nil), give: identity{tenant: "tenant-default", authority: "https://login.example/"},
			want: map[string]map[string]string{"c": with("AZURE_CLIENT_ID", "")}, life: 3600,
		},
		{
			name: "what is set stays", account: client, give: give, life: 3600, want: map[string]map[string]string{"c": with("AZURE_CLIENT_ID", "mine")},
			pod: onePod(func(p *core.Pod) { p.Spec.Containers[0].Env = []core.EnvVar{{Name: "AZURE_CLIENT_ID", Value: "mine"}} }),
		},
		{
			name: "what is set to nothing stays", account: client, give: give, life: 3600, want: map[string]map[string]string{"c": {
				"AZURE_CLIENT_ID": "client", "AZURE_TENANT_ID": "", "AZURE_AUTHORITY_HOST": all["AZURE_AUTHORITY_HOST"], "AZURE_FEDERATED_TOKEN_FILE": all["AZURE_FEDERATED_TOKEN_FILE"],
			}},
			pod: onePod(func(p *core.Pod) { p.Spec.Containers[0].Env = []core.EnvVar{{Name: "AZURE_TENANT_ID"}} }),
		},
		{
			name: "init containers too, and not those that are left out", account: client, give: give, life: 3600,
			want: map[string]map[string]string{"c": all, "init": all, "proxy": nil, "init-proxy": nil},
			pod: onePod(func(p *core.Pod) {
				p.Annotations = map[string]string{identitySkip: "proxy; init-proxy;"}
				p.Spec.Containers = append(p.Spec.Containers, core.Container{Name: "proxy"})
				p.Spec.InitContainers = []core.Container{{Name: "init"}, {Name: "init-proxy"}}
			}),
		},
		{
			name: "the pod's lifetime counts more", account: map[string]string{identityClient: "client", identityLifetime: "7200"}, give: give, life: 86400,
			want: map[string]map[string]string{"c": all}, pod: onePod(func(p *core.Pod) { p.Annotations = map[string]string{identityLifetime: "86400"} }),
		},
		{name: "the account's lifetime", pod: onePod(nil), account: map[string]string{identityClient: "client", identityLifetime: "7200"}, give: give, life: 7200, want: map[string]map[string]string{"c": all}},
	}
	for _, c := range cases {
		operations, err := inject(c.pod, account(c.account), c.give)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		pod := patched(t, c.pod, operations)
		for _, k := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			have := map[string]string{}
			for _, e := range k.Env {
				have[e.Name] = e.Value
			}
			if len(have)+len(c.want[k.Name]) > 0 && !reflect.DeepEqual(have, c.want[k.Name]) {
				t.Errorf("%s: %s has %v, want %v", c.name, k.Name, have, c.want[k.Name])
			}
			if mounted := len(k.VolumeMounts) == 1 && k.VolumeMounts[0].MountPath == tokenFolder && k.VolumeMounts[0].ReadOnly; mounted != (c.want[k.Name] != nil) {
				t.Errorf("%s: %s has the mounts %v", c.name, k.Name, k.VolumeMounts)
			}
		}
		token := pod.Spec.Volumes[len(pod.Spec.Volumes)-1].Projected.Sources[0].ServiceAccountToken
		if token.Audience != "api://AzureADTokenExchange" || *token.ExpirationSeconds != c.life || token.Path != tokenPath {
			t.Errorf("%s: the token is %+v", c.name, token)
		}
		if again, err := inject(pod, account(c.account), c.give); err != nil || len(again) > 0 {
			t.Errorf("%s: a second time adds %v, %v", c.name, again, err)
		}
	}
	for text, says := range map[string]string{"3599": "token expiration 3599 not valid. Expected value to be between 3600 and 86400", "86401": "between 3600 and 86400", "1h": `"1h"`} {
		if _, err := inject(onePod(nil), account(map[string]string{identityLifetime: text}), give); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("lifetime %s: %v", text, err)
		}
	}
}

// patched is a pod with the additions, made on its JSON as the API server does it.
func patched(t testing.TB, pod *core.Pod, operations []operation) *core.Pod {
	t.Helper()
	var tree map[string]any
	text, err := json.Marshal(pod)
	if err == nil {
		err = json.Unmarshal(text, &tree)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range operations {
		var value any
		text, _ := json.Marshal(o)
		var plain struct {
			Op, Path string
			Value    any
		}
		if err := json.Unmarshal(text, &plain); err != nil || plain.Op != "add" {
			t.Fatalf("%s is no addition", text)
		}
		value = plain.Value
		steps := strings.Split(strings.TrimPrefix(plain.Path, "/"), "/")
		if err := add(tree, steps, value); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	var out core.Pod
	text, err = json.Marshal(tree)
	if err == nil {
		err = json.Unmarshal(text, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return &out
}

// add adds at a path of RFC 6901 below a map; it never replaces a list that has elements.
func add(in map[string]any, steps []string, value any) error {
	name := steps[0]
	if len(steps) == 1 {
		if old, ok := in[name].([]any); ok && len(old) > 0 {
			return fmt.Errorf("%s is there and would be replaced", name)
		}
		in[name] = value
		return nil
	}
	switch next := in[name].(type) {
	case map[string]any:
		return add(next, steps[1:], value)
	case []any:
		if steps[1] == "-" {
			in[name] = append(next, value)
			return nil
		}
		var i int
		if _, err := fmt.Sscan(steps[1], &i); err != nil || i >= len(next) {
			return fmt.Errorf("there is no element %s of %s", steps[1], name)
		}
		return add(next[i].(map[string]any), steps[2:], value)
	}
	return fmt.Errorf("there is no %s", name)
}

// FuzzInject: for any pod and account, nothing that is set is changed, and a second
// time adds nothing.
func FuzzInject(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"p"},"spec":{"containers":[{"name":"c"}]}}`), []byte(`{"metadata":{"annotations":{"azure.workload.identity/client-id":"x"}}}`))
	f.Add([]byte(`{"metadata":{"generateName":"p-","annotations":{"azure.workload.identity/skip-containers":"a;b"}},"spec":{"volumes":[{"name":"v"}],"initContainers":[{"name":"a"}],"containers":[{"name":"c","env":[{"name":"AZURE_CLIENT_ID"}],"volumeMounts":[{"name":"v","mountPath":"/v"}]}]}}`), []byte(`{}`))
	f.Add([]byte(`{"metadata":{"annotations":{"azure.workload.identity/service-account-token-expiration":"1"}}}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, podText, accountText []byte) {
		var pod core.Pod
		var a core.ServiceAccount
		if json.Unmarshal(podText, &pod) != nil || json.Unmarshal(accountText, &a) != nil {
			return
		}
		operations, err := inject(&pod, &a, give)
		if err != nil {
			return
		}
		after := patched(t, &pod, operations)
		for i, c := range pod.Spec.Containers {
			now := after.Spec.Containers[i]
			if len(now.Env) < len(c.Env) || len(c.Env) > 0 && !reflect.DeepEqual(now.Env[:len(c.Env)], c.Env) {
				t.Fatalf("variables were changed: %v, then %v", c.Env, now.Env)
			}
			if len(now.VolumeMounts) < len(c.VolumeMounts) {
				t.Fatalf("mounts were lost")
			}
		}
		if again, err := inject(after, &a, give); err != nil || len(again) > 0 {
			t.Fatalf("a second time adds %v, %v", again, err)
		}
	})
}

// FuzzReadDesired: what is read is written as the same again, and an error shows nothing of it.
func FuzzReadDesired(f *testing.F) {
	for _, d := range []wire.Desired{
		{},
		{ID: "/x", Name: "x", Namespace: "n", Secret: &wire.SecretObject{Name: "s", Data: map[string]string{"K": "v"}}},
		{ID: "/x", ServiceAccount: &wire.AccountObject{Name: "a"}, ProviderClass: &wire.ProviderObject{Name: "p", Spec: json.RawMessage(`{"provider":"azure"}`)}},
	} {
		text, _ := json.Marshal(d)
		f.Add(text, Key(d.ID))
	}
	f.Add([]byte(`{"id":"canary","id":"y"}`), "")
	f.Fuzz(func(t *testing.T, text []byte, key string) {
		s := &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: "n", Namespace: Namespace, Labels: map[string]string{labelConnection: key}}, Data: map[string][]byte{desiredKey: text}}
		d, err := readDesired(s)
		if err != nil {
			if strings.Contains(err.Error(), "canary") {
				t.Fatalf("the error shows what was read: %v", err)
			}
			return
		}
		again, err := desiredSecret(d)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := readDesired(again); err != nil || len(named(back)) != len(named(d)) || Key(back.ID) != Key(d.ID) {
			t.Fatalf("%+v became %+v, %v", d, back, err)
		}
		for _, o := range named(d) {
			_, _ = want(d, o, nil)
		}
	})
}
