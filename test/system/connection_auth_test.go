package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/test/stack"
)

// TestConnectionAuthentications: targets that Keyfleet has no server of, with each
// authentication. The cluster gets the variables that an application expects; a
// secret that was given is kept in the vault and shows nowhere else; the deletion
// takes all of it back.
func TestConnectionAuthentications(t *testing.T) {
	c := newCluster(t)
	admin, err := client.ReadAdmin(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	_, clientID, _ := c.identity(c.group, "web")
	c.vault(c.group, "clustervault")
	const principal = "6f1f2c1e-9d2b-4c57-9b0e-0a4c3d7b6a11"
	azure := "/subscriptions/" + c.Client.Subscription() + "/resourceGroups/elsewhere/providers/"
	mongo := azure + "Microsoft.DocumentDB/databaseAccounts/orders/mongodbDatabases/shop"
	cases := []struct {
		name   string
		args   []string
		given  string // secret, in the file that the command line is given
		env    map[string]string
		acting bool // as the identity
	}{
		{"storage-blob by service principal", []string{"storage-blob", "--value", "account=files", "--service-principal", "client-id=" + principal}, "blobCanarySecretThatIsLong;'\"", map[string]string{
			"AZURE_STORAGEBLOB_RESOURCEENDPOINT": "https://files.blob.core.windows.net/", "AZURE_STORAGEBLOB_CLIENTID": principal,
			"AZURE_STORAGEBLOB_TENANTID": admin.Tenant, "AZURE_STORAGEBLOB_CLIENTSECRET": "blobCanarySecretThatIsLong;'\"",
		}, false},
		{"keyvault by service principal", []string{"keyvault", "--target-id", c.group + "/providers/Microsoft.KeyVault/vaults/clustervault", "--service-principal", "client-id=" + principal}, "vaultCanarySecretThatIsLong", map[string]string{
			"AZURE_KEYVAULT_SCOPE": "https://management.azure.com/.default", "AZURE_KEYVAULT_RESOURCEENDPOINT": c.Client.Vault("clustervault", "/"), "AZURE_KEYVAULT_CLIENTID": principal,
			"AZURE_KEYVAULT_TENANTID": admin.Tenant, "AZURE_KEYVAULT_CLIENTSECRET": "vaultCanarySecretThatIsLong",
		}, false},
		{"servicebus by service principal, with names of one's own", []string{
			"servicebus", "--value", "namespace=bus", "--customized-keys", "AZURE_SERVICEBUS_CLIENTSECRET=BUS_SECRET", "--service-principal", "client-id=" + principal,
		}, "busCanarySecretThatIsLong", map[string]string{
			"AZURE_SERVICEBUS_FULLYQUALIFIEDNAMESPACE": "bus.servicebus.windows.net", "AZURE_SERVICEBUS_CLIENTID": principal, "AZURE_SERVICEBUS_TENANTID": admin.Tenant, "BUS_SECRET": "busCanarySecretThatIsLong",
		}, false},
		{"storage-blob by workload identity", []string{"storage-blob", "--value", "endpoint=https://files.example.org/", "--workload-identity", "web"}, "", map[string]string{
			"AZURE_STORAGEBLOB_RESOURCEENDPOINT": "https://files.example.org/", "AZURE_STORAGEBLOB_CLIENTID": clientID,
		}, true},
		{"keyvault elsewhere by workload identity", []string{"keyvault", "--value", "endpoint=https://certs.vault.azure.cn/", "scope=https://vault.azure.cn/.default", "--workload-identity", "web"}, "", map[string]string{
			"AZURE_KEYVAULT_RESOURCEENDPOINT": "https://certs.vault.azure.cn/", "AZURE_KEYVAULT_SCOPE": "https://vault.azure.cn/.default", "AZURE_KEYVAULT_CLIENTID": clientID,
		}, true},
		{"cosmos-mongo by workload identity", []string{"cosmos-mongo", "--target-id", mongo, "--workload-identity", "web"}, "", map[string]string{
			"AZURE_COSMOS_LISTCONNECTIONSTRINGURL": "https://management.azure.com" + mongo + "/listConnectionStrings?api-version=2021-04-15", "AZURE_COSMOS_SCOPE": "https://management.azure.com/.default",
			"AZURE_COSMOS_RESOURCEENDPOINT": "https://orders.documents.azure.com:443/", "AZURE_COSMOS_CLIENTID": clientID,
		}, true},
		{"sql by secret", []string{"sql", "--value", "host=db.example.org", "database=shop", "--secret", "name=app"}, "sqlCanarySecretThatIsLong;\"", map[string]string{
			"AZURE_SQL_CONNECTIONSTRING": `server=db.example.org;port=1433;database=shop;user id=app;password="sqlCanarySecretThatIsLong;""";`,
		}, false},
		{"cosmos-mongo by secret", []string{"cosmos-mongo", "--target-id", mongo, "--secret"}, "mongoCanarySecretThatIsLong/+==", map[string]string{
			"AZURE_COSMOS_CONNECTIONSTRING": "mongodb://orders:mongoCanarySecretThatIsLong%2F%2B%3D%3D@orders.mongo.cosmos.azure.com:10255/?ssl=true&replicaSet=globaldb&retrywrites=false&maxIdleTimeMS=120000&appName=@orders@",
		}, false},
		{"servicebus by secret", []string{"servicebus", "--value", "namespace=bus", "keyName=send", "--secret"}, "busCanaryKeyThatIsLong==", map[string]string{
			"AZURE_SERVICEBUS_CONNECTIONSTRING": "Endpoint=sb://bus.servicebus.windows.net/;SharedAccessKeyName=send;SharedAccessKey=busCanaryKeyThatIsLong==",
		}, false},
	}
	var secrets []hidden
	for i, k := range cases {
		t.Run(k.name, func(t *testing.T) {
			name, clientType := fmt.Sprint("c", i), "go"
			if k.args[0] == "keyvault" {
				clientType = "python"
			}
			args := append([]string{"connection", "create"}, k.args...)
			if k.given != "" {
				args = append(args, "secret-file="+c.file(t, name+".secret", k.given)) // after --secret or --service-principal
			}
			c.keyfleet(t, 0, append(args, "--connection", name, "--cluster", "prod", "--kube-namespace", "shop", "--client-type", clientType)...)
			env, err := c.environment(c.ctx, "sc-"+name+"-secret")
			if err != nil || !maps.Equal(env, k.env) {
				t.Errorf("the environment is %v, %v; want %v", env, err, k.env)
			}
			account, err := c.api.CoreV1().ServiceAccounts("shop").Get(c.ctx, "sc-account-"+clientID, metav1.GetOptions{})
			if k.acting && (err != nil || account.Annotations["azure.workload.identity/client-id"] != clientID || account.Annotations["azure.workload.identity/tenant-id"] != admin.Tenant) {
				t.Errorf("the account: %v, %v", account.Annotations, err)
			}
			if v := c.text(t, http.MethodPost, c.linker(name)+"/validateLinker"); !strings.Contains(v, `"isConnectionAvailable":true`) {
				t.Errorf("validation: %s", v)
			}
			if plain := alphanumeric.FindString(k.given); plain != "" { // what every way to quote it leaves as it is
				secrets = append(secrets, hidden{name + "'s secret", plain, append(c.inCluster(t, name), filepath.Join(c.home, name+".secret"))})
			}
		})
	}
	c.drift(t, "sc-c0-secret")
	c.noSecretIn(t, secrets)
	var said strings.Builder
	for i, k := range cases {
		name := fmt.Sprint("c", i)
		out := c.keyfleet(t, 0, "connection", "delete", name, "--cluster", "prod", "--yes")
		if !strings.Contains(out, "removed  Secret shop/sc-"+name+"-secret") || (k.given != "") != strings.Contains(out, "removed  secret sc-"+name+"-") {
			t.Errorf("the report of the deletion:\n%s", out)
		}
		said.WriteString(out)
	}
	if n := strings.Count(said.String(), "removed  federated credential of"); n != 1 {
		t.Errorf("the identity was trusted once for all of its connections, and %d times it was taken back:\n%s", n, said.String())
	}
	left, err := c.api.CoreV1().Secrets("").List(c.ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/managed-by=sc-extension"})
	if err != nil || len(left.Items) != 0 {
		t.Errorf("%d Secrets are left, %v", len(left.Items), err)
	}
	if _, err := c.api.CoreV1().ServiceAccounts("shop").Get(c.ctx, "sc-account-"+clientID, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the account is still there: %v", err)
	}
}

// alphanumeric finds letters and digits.
var alphanumeric = regexp.MustCompile(`^[0-9A-Za-z]+`)

// drift deletes a Secret by hand and waits until it is back.
func (c *connected) drift(t *testing.T, name string) {
	t.Helper()
	before, err := c.environment(c.ctx, name)
	if err == nil {
		err = c.api.CoreV1().Secrets("shop").Delete(c.ctx, name, metav1.DeleteOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, time.Minute, "the Secret and its event are there", func(ctx context.Context) error {
		events, err := c.api.CoreV1().Events("shop").List(ctx, metav1.ListOptions{})
		if err == nil && len(events.Items) == 0 {
			err = errors.New("no event")
		}
		if env, eerr := c.environment(ctx, name); err == nil && (eerr != nil || !maps.Equal(env, before)) {
			err = fmt.Errorf("it has %d names, %v", len(env), eerr)
		}
		return err
	})
}

// classes is the kind that the Secrets Store CSI driver reads.
var classes = schema.GroupVersionResource{Group: "secrets-store.csi.x-k8s.io", Version: "v1", Resource: "secretproviderclasses"}

// TestKeyVaultByCSIDriver: without the driver a connection says so, and what to do. A
// manager with the driver's chart installs it, with the rights that are shipped for
// it; the connection goes on by itself, is repaired, and goes without the driver.
// The chart is a stand-in that has no driver: that something is mounted is not tested.
func TestKeyVaultByCSIDriver(t *testing.T) {
	c := &connected{registered: &registered{kube: kubetest.Start(t), home: t.TempDir()}}
	c.system = start(t, stack.Config{})
	c.connect(t)
	c.group = c.registered.group("rg")
	objects := c.dynamic(t)
	if _, err := c.api.CoreV1().Namespaces().Create(c.ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.keyfleet(t, 0, "cluster", "register", "prod", "--kubeconfig", c.file(t, "kubeconfig", string(c.kube.TokenKubeconfig(t, c.managerAccount(t)))))
	c.keyfleet(t, 0, "cluster", "manager", "create", "connector", "--to-dir", filepath.Join(c.home, "connector"))
	without := c.managed(t)
	c.operate(t)
	c.becomes(t, "Succeeded", "")
	_, clientID, _ := c.identity(c.group, "web")
	c.vault(c.group, "clustervault")
	vault := c.group + "/providers/Microsoft.KeyVault/vaults/clustervault"
	create := func(name string, more ...string) {
		t.Helper()
		c.keyfleet(t, 0, append([]string{"connection", "create", "keyvault", "--connection", name, "--cluster", "prod", "--kube-namespace", "shop", "--target-id", vault, "--no-wait"}, more...)...)
	}
	create("certs", "--enable-csi", "DB_PASSWORD=db", "tls.pem=web", "--workload-identity", "web")
	c.connectionSays(t, "certs", "Failed", "AddonNotInstalled", "--addon-chart", "helm install azure-keyvault-secrets-provider")
	c.addonEnabled(t, false)

	// Another manager, with the chart and with the rights for it.
	without()
	c.applyFile(t, "manager-addon-role.yaml")
	c.managed(t, "--addon-chart", filepath.Join(stack.Root(t), "test", "system", "testdata", "addon"))
	c.connectionSays(t, "certs", "Succeeded")
	c.addonEnabled(t, true)
	if n := c.addonReleases(t); n != 1 {
		t.Errorf("Helm has %d records of the release", n)
	}
	wanted := c.class(t, objects, "sc-certs-secretprovider")
	parameters, _, _ := unstructured.NestedStringMap(wanted, "parameters")
	if parameters["keyvaultName"] != "clustervault" || parameters["clientID"] != clientID || parameters["cloudName"] != "AzureStackCloud" || !strings.Contains(parameters["objects"], `objectName: "web"`) {
		t.Errorf("the parameters are %v", parameters)
	}
	if text, err := json.Marshal(wanted["secretObjects"]); err != nil || string(text) !=
		`[{"data":[{"key":"DB_PASSWORD","objectName":"db"},{"key":"tls.pem","objectName":"web"}],"secretName":"sc-certs-secret","type":"Opaque"}]` {
		t.Errorf("the Secret is %s, %v", text, err)
	}
	if _, err := c.api.CoreV1().Secrets("shop").Get(c.ctx, "sc-certs-secret", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the Secret is the driver's to make: %v", err)
	}
	c.repairs(t, objects, wanted)
	if v := c.text(t, http.MethodPost, c.linker("certs")+"/validateLinker"); !strings.Contains(v, `"isConnectionAvailable":true`) || !strings.Contains(v, `"Addon"`) {
		t.Errorf("validation: %s", v)
	}
	t.Log(c.keyfleet(t, 0, "connection", "show", "certs", "--cluster", "prod"))

	// As Azure's own command line asks for it: no objects, no identity.
	create("plain", "--enable-csi")
	c.connectionSays(t, "plain", "Succeeded")
	if env, err := c.environment(c.ctx, "sc-plain-secret"); err != nil || len(env) != 3 || env["AZURE_KEYVAULT_NAME"] != "clustervault" {
		t.Errorf("the variables are %v, %v", env, err)
	}

	// The add-on stays when they go.
	for name, gone := range map[string]string{"certs": "SecretProviderClass shop/sc-certs-secretprovider", "plain": "Secret shop/sc-plain-secret"} {
		out := c.keyfleet(t, 0, "connection", "delete", name, "--cluster", "prod", "--yes")
		if !strings.Contains(out, "removed  "+gone) || !strings.Contains(out, "kept     add-on azureKeyvaultSecretsProvider, release kube-system/azure-keyvault-secrets-provider") {
			t.Errorf("the report of the deletion:\n%s", out)
		}
		t.Log(out)
	}
	if left, err := objects.Resource(classes).List(c.ctx, metav1.ListOptions{}); err != nil || len(left.Items) != 0 {
		t.Errorf("%d classes are left, %v", len(left.Items), err)
	}
	if n := c.addonReleases(t); n != 1 {
		t.Errorf("Helm has %d records of the release", n)
	}
	c.addonEnabled(t, true)
}

// managed runs a manager with more flags, until the test ends or stop is called.
func (c *connected) managed(t *testing.T, more ...string) (stop func()) {
	t.Helper()
	log, err := os.CreateTemp(c.home, "manager-*.log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(c.Bin, "keyfleet-connector"), append([]string{"manager", "--from", filepath.Join(c.home, "connector"), "--interval", "500ms"}, more...)...)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		err := errors.Join(cmd.Process.Signal(os.Interrupt), cmd.Wait())
		text, rerr := os.ReadFile(log.Name())
		if err := errors.Join(err, rerr, log.Close()); err != nil {
			t.Errorf("the manager ended with %v", err)
		}
		if t.Failed() {
			t.Logf("the manager's log:\n%s", text)
		}
	}
	t.Cleanup(stop)
	return stop
}

func (c *connected) dynamic(t *testing.T) dynamic.Interface {
	t.Helper()
	cfg, err := clientcmd.RESTConfigFromKubeConfig(c.kube.Kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// connectionSays waits until a connection has a state, and its problem is said in these words.
func (c *connected) connectionSays(t *testing.T, name, state string, words ...string) {
	t.Helper()
	stack.Eventually(t, 2*time.Minute, name+" is "+state, func(context.Context) error {
		shown := c.text(t, http.MethodGet, c.linker(name))
		missing := slices.DeleteFunc(append(words, `"provisioningState":"`+state+`"`), func(w string) bool { return strings.Contains(shown, w) })
		if len(missing) > 0 {
			return fmt.Errorf("it does not say %v: %s", missing, shown)
		}
		return nil
	})
}

// addonEnabled looks at what the cluster says of the add-on.
func (c *connected) addonEnabled(t *testing.T, enabled bool) {
	t.Helper()
	want := fmt.Sprintf(`"azureKeyvaultSecretsProvider":{"enabled":%t}`, enabled)
	var shown json.RawMessage
	c.call(http.MethodGet, c.Client.ARM(c.group+"/providers/Microsoft.ContainerService/managedClusters/prod"), "2024-02-01", nil, &shown)
	if !strings.Contains(string(shown), want) {
		t.Errorf("the cluster does not say %s: %s", want, shown)
	}
}

// addonReleases counts Helm's records of the add-on.
func (c *connected) addonReleases(t *testing.T) int {
	t.Helper()
	all, err := c.api.CoreV1().Secrets("kube-system").List(c.ctx, metav1.ListOptions{LabelSelector: "owner=helm,name=azure-keyvault-secrets-provider"})
	if err != nil {
		t.Fatal(err)
	}
	return len(all.Items)
}

// class returns the spec of a SecretProviderClass.
func (c *connected) class(t *testing.T, objects dynamic.Interface, name string) map[string]any {
	t.Helper()
	u, err := objects.Resource(classes).Namespace("shop").Get(c.ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	spec, _, err := unstructured.NestedMap(u.Object, "spec")
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// repairs changes and deletes the class by hand, and waits until it is again as wanted.
func (c *connected) repairs(t *testing.T, objects dynamic.Interface, wanted map[string]any) {
	t.Helper()
	shop, name := objects.Resource(classes).Namespace("shop"), "sc-certs-secretprovider"
	for n, change := range []func() error{
		func() error {
			_, err := shop.Patch(c.ctx, name, "application/merge-patch+json", []byte(`{"spec":{"parameters":{"keyvaultName":"elsewhere"}}}`), metav1.PatchOptions{})
			return err
		},
		func() error { return shop.Delete(c.ctx, name, metav1.DeleteOptions{}) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		stack.Eventually(t, time.Minute, "the class is put back", func(ctx context.Context) error {
			u, err := shop.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if spec, _, _ := unstructured.NestedMap(u.Object, "spec"); fmt.Sprint(spec) != fmt.Sprint(wanted) {
				return fmt.Errorf("it is %v", spec)
			}
			return nil
		})
		c.connectionSays(t, "certs", "Succeeded", fmt.Sprintf(`"repaired":%d`, n+1))
	}
}
