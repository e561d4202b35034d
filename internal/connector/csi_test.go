package connector

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
)

// mounted is a connection to a vault through the CSI driver.
func mounted(name string, objects map[string]string) Put {
	return Put{Connection: Connection{
		ID: testCluster + "/providers/Microsoft.ServiceLinker/linkers/" + name, Namespace: "shop", Target: TargetService{Word: "keyvault", ID: testGroup + "/providers/Microsoft.KeyVault/vaults/certs", Objects: objects},
		Auth: Authentication{Type: CSIAddOn},
	}}
}

// addonWork is what a manager of the cluster is told of the add-on; nil: nothing.
func (w *world) addonWork() *wire.ExtensionWork {
	w.t.Helper()
	_, work, err := w.Work(w.system())
	if err != nil {
		w.t.Fatal(err)
	}
	all := work[strings.ToLower(testCluster)]
	i := slices.IndexFunc(all, func(e wire.ExtensionWork) bool { return e.Name == wire.AddonRelease })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// addonIs reports what a manager saw of the add-on.
func (w *world) addonIs(r wire.ExtensionReport) {
	w.t.Helper()
	if err := w.ReportExtension(w.system(), w.clusterID(), wire.AddonRelease, r); err != nil {
		w.t.Fatal(err)
	}
}

// look lets the controller look at a connection and returns what it says.
func (w *world) look(id string) *Object {
	w.t.Helper()
	for range 3 {
		w.turn(id)
	}
	o, err := Connections.Get(w.store.View(w.t.Context()), id)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

// TestProviderClass: what the cluster gets is what the provider for Azure reads, for
// the identity of the node and for a workload identity, for a vault of Azure and for
// one of this server.
func TestProviderClass(t *testing.T) {
	objects := map[string]string{"DB_PASSWORD": "db", "AGAIN": "db", "tls.pem": "1e3"}
	for _, c := range []struct {
		name string
		auth Authentication
		ours bool
		want map[string]string
	}{
		{"node", Authentication{Type: CSIAddOn, TenantID: "t"}, false, map[string]string{"useVMManagedIdentity": "true"}},
		{"workload", Authentication{Type: CSIAddOn, TenantID: "t", Identity: "/i", ClientID: "c"}, false, map[string]string{"clientID": "c"}},
		{"ours", Authentication{Type: CSIAddOn, TenantID: "t", Identity: "/i", ClientID: "c"}, true, map[string]string{"clientID": "c", "cloudName": "AzureStackCloud"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Connection{ID: testCluster + "/providers/Microsoft.ServiceLinker/linkers/a-b", Target: TargetService{Objects: objects}, Auth: c.auth}.class("certs", c.ours)
			if err != nil || got.Name != "sc-ab-secretprovider" {
				t.Fatalf("%+v, %v", got, err)
			}
			var spec providerClass
			if err := json.Unmarshal(got.Spec, &spec); err != nil {
				t.Fatal(err)
			}
			// As the provider reads it: an array of texts, each of them YAML again.
			var list struct{ Array []string }
			if err := yaml.Unmarshal([]byte(spec.Parameters["objects"]), &list); err != nil {
				t.Fatal(err)
			}
			var named []string
			for _, text := range list.Array {
				var o struct{ ObjectName, ObjectType string }
				if err := yaml.UnmarshalStrict([]byte(text), &o); err != nil {
					t.Fatal(err)
				}
				named = append(named, o.ObjectType+" "+o.ObjectName)
			}
			if fmt.Sprint(named) != "[secret 1e3 secret db]" {
				t.Errorf("the objects are %v", named)
			}
			delete(spec.Parameters, "objects")
			want := map[string]string{"usePodIdentity": "false", "keyvaultName": "certs", "tenantID": "t"}
			for name, v := range c.want {
				want[name] = v
			}
			if spec.Provider != "azure" || fmt.Sprint(spec.Parameters) != fmt.Sprint(want) {
				t.Errorf("the parameters are %v, want %v", spec.Parameters, want)
			}
			if s := fmt.Sprint(spec.Secrets); s != "[{sc-ab-secret Opaque [{db AGAIN} {db DB_PASSWORD} {1e3 tls.pem}]}]" {
				t.Errorf("the Secret is %s", s)
			}
		})
	}
}

// TestAddonIsNotThere: a connection through the driver says at once that the driver
// is not there and what to do, goes on by itself when it is seen, and leaves it where
// it is when it goes.
func TestAddonIsNotThere(t *testing.T) {
	w := newWorld(t)
	if w.addonWork() != nil {
		t.Fatal("the add-on is wanted by nobody")
	}
	id := w.put(mounted("certs", map[string]string{"tls.pem": "web"})).ID
	work := w.addonWork()
	if o := w.look(id); work == nil || o.Status.State != "Accepted" || !strings.Contains(o.Status.Waiting, wire.KeyVaultAddon) {
		t.Fatalf("nobody has looked: %+v, %+v", work, o.Status)
	}
	w.addonIs(wire.ExtensionReport{Revision: work.Revision, Problem: &wire.Problem{Code: "AddonNotInstalled", Layer: "cluster", Message: "m", Fix: "keyfleet-connector manager --addon-chart"}})
	o := w.look(id)
	if p := o.Status.Problem; o.Status.State != "Failed" || p == nil || p.Code != "AddonNotInstalled" || !strings.Contains(p.Fix, "--addon-chart") {
		t.Errorf("it is not there: %+v", o.Status)
	}
	if v, err := w.Validate(w.system(), o.Spec.ID); err != nil || !slices.ContainsFunc(v.Findings, func(f Finding) bool { return f.Name == "Addon" && f.Code == "AddonNotInstalled" }) {
		t.Errorf("validation: %+v, %v", v, err)
	}
	if w.desiredOf(o).ProviderClass == nil {
		t.Error("the cluster is not told of the connection, so it will not be there as soon as the add-on is")
	}

	// The manager says that it is there; the cluster's own state follows a moment later.
	w.addonIs(wire.ExtensionReport{Revision: work.Revision, Release: &wire.Release{Status: "deployed"}})
	if o := w.look(id); o.Status.Problem != nil || o.Status.State == "Succeeded" {
		t.Errorf("nobody has seen the cluster with it: %+v", o.Status)
	}
	w.cluster.Addon = true
	if o := w.settle(id); o.Status.State != "Succeeded" {
		t.Errorf("%+v", o.Status)
	}

	second := w.put(mounted("more", nil)).ID
	w.settle(second)
	w.leaves(t, id, "SecretProviderClass shop/sc-certs-secretprovider")
	if w.addonWork() == nil {
		t.Error("the other connection needs the add-on still")
	}
	w.leaves(t, second, "Secret shop/sc-more-secret")
	if left, err := addons.List(w.store.View(t.Context()), ""); w.addonWork() != nil || err != nil || len(left) != 0 {
		t.Errorf("nobody needs the add-on any more: %v, %v", left, err)
	}
	if err := w.ReportExtension(w.system(), w.clusterID(), wire.AddonRelease, wire.ExtensionReport{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a report that nobody asked for: %v", err)
	}
}

func (w *world) desiredOf(o *Object) wire.Desired {
	w.t.Helper()
	d, err := w.Desired(w.system(), o.Spec.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// leaves deletes a connection and looks at the report.
func (w *world) leaves(t *testing.T, id, object string) {
	t.Helper()
	o := w.look(id)
	deleted, err := w.Delete(w.system(), o.Spec.ID, false)
	if err != nil || w.settle(id) != nil {
		t.Fatalf("it stays: %v", err)
	}
	op, err := w.Operation(w.system(), OpDelete, o.Spec.ID, deleted.UID, 0)
	if err != nil || op.Removal == nil || fmt.Sprint(op.Removal.Removed) != "["+object+"]" ||
		len(op.Removal.Kept) != 1 || !strings.Contains(op.Removal.Kept[0], "release kube-system/azure-keyvault-secrets-provider") {
		t.Errorf("the report: %+v, %v", op.Removal, err)
	}
}

// TestUnnamedObjects: a connection that names no objects gets the variables from
// which a SecretProviderClass is written by hand, as in Azure; when it names some,
// the Secret is the driver's.
func TestUnnamedObjects(t *testing.T) {
	w := newWorld(t)
	w.cluster.Addon = true
	id := w.put(mounted("certs", nil)).ID
	d := w.desiredOf(w.settle(id))
	if d.ProviderClass != nil || d.Secret.Data["AZURE_KEYVAULT_NAME"] != "certs" || d.Secret.Data["AZURE_KEYVAULT_TENANTID"] != "tenant" || len(d.Secret.Data) != 3 {
		t.Errorf("%+v", d)
	}
	w.put(mounted("certs", map[string]string{"tls.pem": "web"}))
	o := w.settle(id)
	if d := w.desiredOf(o); d.Secret != nil || d.ProviderClass == nil || d.ServiceAccount != nil {
		t.Errorf("%+v", d)
	}
	if env, err := w.Environment(w.system(), o.Spec.ID); err != nil || len(env) != 1 || env[0].Name != "tls.pem" || !env[0].Secret {
		t.Errorf("%+v, %v", env, err)
	}
}

// TestMountedAsIdentity: with an identity the driver acts as the workload, which
// needs its account, its trust and its permission.
func TestMountedAsIdentity(t *testing.T) {
	w := newWorld(t)
	w.cluster.Addon = true
	p := mounted("certs", map[string]string{"tls.pem": "web"})
	p.Auth.ClientID = "client"
	id := w.put(p).ID
	o := w.settle(id)
	if d := w.desiredOf(o); d.ServiceAccount == nil || d.ServiceAccount.Name != "sc-account-client" || !strings.Contains(string(d.ProviderClass.Spec), `"clientID":"client"`) {
		t.Errorf("%+v", d)
	}
	if len(o.Status.Grants) != 1 || o.Status.Grants[0].To != "system:serviceaccount:shop:sc-account-client" {
		t.Errorf("the grants are %+v", o.Status.Grants)
	}
	if _, err := w.Delete(w.system(), o.Spec.ID, false); err != nil || w.settle(id) != nil || len(w.granted) != 0 {
		t.Errorf("left: %v, %v", w.granted, err)
	}
}

// TestMountedThatAreRefused: before anything is touched, with what would do.
func TestMountedThatAreRefused(t *testing.T) {
	many := map[string]string{}
	for i := range maxVaultObjects + 1 {
		many[fmt.Sprint("k", i)] = "o"
	}
	for _, c := range []struct {
		name   string
		change func(p *Put)
		code   string
		says   string
	}{
		{"other target", func(p *Put) { p.Target.Word, p.Target.Objects = "redis", nil }, "InvalidArgument", "csi-addon-identity is not supported by target resource redis"},
		{"objects without the driver", func(p *Put) { p.Auth = Authentication{Type: WorkloadIdentity, ClientID: "client"} }, "InvalidArgument", "only for the CSI driver"},
		{"key", func(p *Put) { p.Target.Objects = map[string]string{"a b": "x"} }, "InvalidArgument", "'a b' cannot be a key"},
		{"object", func(p *Put) { p.Target.Objects = map[string]string{"a": "x\n      objectType: key"} }, "InvalidArgument", "cannot be the name of a secret"},
		{"too many", func(p *Put) { p.Target.Objects = many }, "InvalidArgument", "101 objects"},
		{"renamed", func(p *Put) { p.Keys = map[string]string{"AZURE_KEYVAULT_NAME": "V"} }, "InvalidCustomizedKey", "no variables that could be renamed"},
		{"no vault", func(p *Put) { p.Target.ID = "" }, "MissingTargetValue", "vault"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			p := mounted("certs", map[string]string{"a": "x"})
			c.change(&p)
			_, _, err := w.Put(w.system(), p)
			if e := fault.From(err); e.Code != c.code || !strings.Contains(e.Message, c.says) {
				t.Errorf("%v", err)
			}
		})
	}
}
