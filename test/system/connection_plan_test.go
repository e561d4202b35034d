package system

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/client"
)

// TestConnectionPlan: a dry run says what a create then makes, and changes nothing. What
// a create is refused for, it says beforehand, with the command that mends it; the
// commands are run and mend it.
func TestConnectionPlan(t *testing.T) {
	c := newConnected(t)
	create := []string{
		"connection", "create", "postgres-flexible", "--connection", "db", "--cluster", "prod", "--server", "main", "--database", "shop",
		"--kube-namespace", "shop", "--client-type", "django",
	}
	dry := func(exit int, more ...string) servicelinker.Dryrun {
		t.Helper()
		return c.dryrun(t, c.keyfleet(t, exit, slices.Concat(create, []string{"--dry-run", "-o", "json"}, more)...))
	}
	t.Log(c.keyfleet(t, 0, append(create, "--dry-run")...))
	plan := dry(0).Properties.Plan
	c.nothingMade(t)

	c.keyfleet(t, 0, create...)
	env, err := c.environment(c.ctx, plan.Objects[0].Name)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range plan.Objects {
		if _, err := c.api.CoreV1().Secrets(o.Namespace).Get(c.ctx, o.Name, metav1.GetOptions{}); err != nil || o.Kind != "Secret" {
			t.Errorf("the plan said %+v: %v", o, err)
		}
	}
	for _, k := range plan.Environment {
		if v, there := env[k.Name]; !there || !k.Secret && v != k.Value {
			t.Errorf("the plan said %+v, and the cluster has %q", k, v)
		}
	}
	if len(env) != len(plan.Environment) || env["AZURE_POSTGRESQL_USER"] != plan.Login.User {
		t.Errorf("the plan said %+v, and the cluster has %d variables", plan, len(env))
	}
	if shown := c.text(t, http.MethodGet, c.linker("db")); !strings.Contains(shown, plan.Secret.Name) || !strings.Contains(shown, plan.Secret.Vault) {
		t.Errorf("the secret is not where the plan said it would be (%+v): %s", plan.Secret, shown)
	}
	if p := dry(0).Properties.Plan; p.Change != servicelinker.Unchanged || p.Objects[0].Change != servicelinker.Unchanged || p.Login.Change != servicelinker.Unchanged || p.Extension != "present" {
		t.Errorf("it is there, and the plan says %+v", p)
	}
	if p := dry(0, "--client-type", "go").Properties.Plan; p.Change != servicelinker.Modify || p.Objects[0].Change != servicelinker.Modify || !p.Restart.Needed {
		t.Errorf("another client type: %+v", p)
	}
	if d := dry(6, "--connection", "d-b").Properties; d.PrerequisiteResults[0].Code != "SecretNameCollision" {
		t.Errorf("d-b beside db: %+v", d.PrerequisiteResults)
	}

	// A PATCH says what is different; the login stays.
	resp := c.do(client.Request{Method: http.MethodPatch, URL: c.Client.ARM(c.linker("db")), Version: linkerVersion, Body: map[string]any{
		"properties": map[string]any{"configurationInfo": map[string]any{"customizedKeys": map[string]string{"AZURE_POSTGRESQL_HOST": "DB_HOST"}}},
	}})
	if _, err := c.Client.Wait(c.ctx, resp, nil); err != nil {
		t.Fatal(err)
	}
	after, err := c.environment(c.ctx, "sc-db-secret")
	if err != nil || after["DB_HOST"] != env["AZURE_POSTGRESQL_HOST"] || after["AZURE_POSTGRESQL_USER"] != env["AZURE_POSTGRESQL_USER"] || after["AZURE_POSTGRESQL_HOST"] != "" {
		t.Errorf("after the PATCH the cluster has the names %v, %v", names(after), err)
	}
	if out := c.text(t, http.MethodPost, c.linker("db")+"/generateConfigurations"); !strings.Contains(out, `"DB_HOST"`) {
		t.Errorf("generateConfigurations: %s", out)
	}
	for _, namespace := range []string{"Microsoft.KubernetesConfiguration", "Microsoft.ServiceLinker"} {
		c.unregistered(t, namespace, slices.Concat(create, []string{"--connection", "second"}))
	}
	c.unprivileged(t)
}

func names(env map[string]string) []string {
	var out []string
	for name := range env {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// dryrun reads what --dry-run -o json has printed.
func (c *connected) dryrun(t *testing.T, out string) servicelinker.Dryrun {
	t.Helper()
	var d servicelinker.Dryrun
	if err := json.Unmarshal([]byte(out), &d); err != nil || d.Properties.Plan == nil {
		t.Fatalf("%v in %s", err, out)
	}
	return d
}

// nothingMade looks that there is no connection, no object, no login and no dry run.
func (c *connected) nothingMade(t *testing.T) {
	t.Helper()
	for _, typ := range []string{"linkers", "dryruns"} {
		all := strings.TrimSuffix(c.linker(""), "linkers/") + typ
		if got := c.text(t, http.MethodGet, all); got != `{"value":[]}` {
			t.Errorf("%s: %s", typ, got)
		}
	}
	secrets, err := c.api.CoreV1().Secrets("shop").List(c.ctx, metav1.ListOptions{})
	if err != nil || len(secrets.Items) != 0 {
		t.Errorf("%d Secrets, %v", len(secrets.Items), err)
	}
	admin, err := pgx.Connect(c.ctx, c.adminURL("shop"))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(c.ctx)
	var roles int
	if err := admin.QueryRow(c.ctx, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'kf\\_%'").Scan(&roles); err != nil || roles != 0 {
		t.Errorf("%d roles, %v", roles, err)
	}
}

// fix types a command that an error or a plan told into a shell, and expects it to succeed.
func (c *connected) fix(t *testing.T, command string) {
	t.Helper()
	cmd := exec.CommandContext(c.ctx, "sh", "-c", command)
	cmd.Env = append(os.Environ(), "PATH="+c.Bin+":"+os.Getenv("PATH"), "HOME="+c.home, "KEYFLEET_FROM="+c.Dir, "KEYFLEET_GROUP=rg")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(command, "keyfleet ") {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// unregistered: the page's sentence, by the command line and by a raw request, and
// the command that mends it.
func (c *connected) unregistered(t *testing.T, namespace string, create []string) {
	t.Helper()
	sentence := "The subscription is not registered to use namespace '" + namespace + "'"
	c.keyfleet(t, 0, "provider", "unregister", namespace)
	if out := c.keyfleet(t, 0, "provider", "list"); !strings.Contains(out, "NotRegistered") {
		t.Errorf("provider list: %s", out)
	}
	if out := c.keyfleet(t, 6, create...); !strings.Contains(out, "MissingSubscriptionRegistration: "+sentence) || !strings.Contains(out, "keyfleet provider register "+namespace) {
		t.Errorf("create says: %s", out)
	}
	d := c.dryrun(t, c.keyfleet(t, 6, append(create, "--dry-run", "-o", "json")...)).Properties
	if len(d.PrerequisiteResults) != 1 || !strings.HasPrefix(d.PrerequisiteResults[0].Message, sentence) {
		t.Fatalf("the plan says %+v", d.PrerequisiteResults)
	}
	e := c.refused(t, c.Client, "second", c.postgresBody())
	if e.Code != "MissingSubscriptionRegistration" || e.Status != http.StatusConflict || !strings.HasPrefix(e.Message, sentence) || e.Fix != d.PrerequisiteResults[0].Fix {
		t.Errorf("a raw request: %+v", e)
	}
	c.fix(t, e.Fix)
	if d := c.dryrun(t, c.keyfleet(t, 0, append(create, "--dry-run", "-o", "json")...)).Properties; len(d.PrerequisiteResults) != 0 {
		t.Errorf("%q did not mend it: %+v", e.Fix, d.PrerequisiteResults)
	}
}

// refused makes a raw PUT that has to be refused.
func (c *connected) refused(t *testing.T, as *client.Client, name string, properties map[string]any) *client.Error {
	t.Helper()
	_, err := as.Do(c.ctx, client.Request{Method: http.MethodPut, URL: as.ARM(c.linker(name)), Version: linkerVersion, Body: map[string]any{"properties": properties}})
	e, ok := err.(*client.Error)
	if !ok {
		t.Fatalf("%s is not refused: %v", name, err)
	}
	return e
}

// unprivileged: an application with rights at the cluster only is told by name each
// permission that it lacks, all at once; the commands that it is told mend it.
func (c *connected) unprivileged(t *testing.T) {
	t.Helper()
	const clientID = "0b6f3f0e-59a4-4b5e-9d51-3f6c0d0a1c11"
	identityID, _, _ := c.identity(c.group, "web")
	c.vault(c.group, "clustervault")
	cluster := c.group + "/providers/Microsoft.ContainerService/managedClusters/prod"
	secret := filepath.Join(c.home, "app-secret")
	c.keyfleet(t, 0, "application", "create", "ci", "--client-id", clientID, "--to-file", secret)
	var app struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal([]byte(c.keyfleet(t, 0, "application", "show", clientID, "-o", "json")), &app); err != nil {
		t.Fatal(err)
	}
	c.keyfleet(t, 0, "role", "assign", "--object-id", app.ID, "--role", "Contributor", "--scope", cluster)

	admin, err := client.ReadAdmin(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	run := func(exit int, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(c.ctx, filepath.Join(c.Bin, "keyfleet"), args...)
		cmd.Env = append(os.Environ(), "HOME="+c.home, "KEYFLEET_CONFIG="+filepath.Join(c.home, "ci.yaml"), "KEYFLEET_FROM=", "KEYFLEET_GROUP=rg")
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != exit {
			t.Fatalf("keyfleet %s: exit status %d, want %d:\n%s", strings.Join(args, " "), got, exit, out)
		}
		return string(out)
	}
	run(0, "login", "--server", admin.Endpoints.ResourceManager, "--address", c.Listen, "--ca", admin.CAFile, "--client-id", clientID, "--client-secret-file", secret)
	vault := c.group + "/providers/Microsoft.KeyVault/vaults/clustervault"
	create := []string{"connection", "create", "keyvault", "--connection", "kv", "--source-id", cluster, "--target-id", vault, "--workload-identity", identityID, "--kube-namespace", "shop", "--vault-id", vault}
	lacks := map[string]string{"Microsoft.KeyVault/vaults/accessPolicies/write": vault, "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action": identityID, "secrets/set": vault}
	if out := run(5, create...); !strings.Contains(out, permissionSentence("Microsoft.KeyVault/vaults/accessPolicies/write", vault)) {
		t.Errorf("create says: %s", out)
	}
	out := run(5, append(create, "--dry-run", "-o", "json")...)
	missing := c.dryrun(t, out).Properties.PrerequisiteResults
	if len(missing) != len(lacks) {
		t.Fatalf("the plan says %+v", missing)
	}
	for _, m := range missing {
		if m.Type != "permissionsMissing" || len(m.Permissions) != 1 || !strings.EqualFold(lacks[m.Permissions[0]], m.Scope) || m.Message != permissionSentence(m.Permissions[0], m.Scope) || (m.RecommendedRole == "") != (m.Permissions[0] == "secrets/set") {
			t.Errorf("%+v", m)
		}
		c.fix(t, m.Fix) // by somebody who may
	}
	t.Log(run(0, append(create, "--dry-run")...))
	run(0, create...)
	// Without any right at the cluster the request itself is refused, in ARM's own words.
	c.keyfleet(t, 0, "role", "remove", "--object-id", app.ID, "--role", "Contributor", "--scope", cluster)
	for _, more := range [][]string{nil, {"--dry-run"}} {
		if out := run(5, append(create, more...)...); !strings.Contains(out, "AuthorizationFailed") || !strings.Contains(out, "keyfleet role assign --object-id "+app.ID) {
			t.Errorf("without a role: %s", out)
		}
	}
}

func permissionSentence(action, scope string) string {
	return "You do not have permission to perform action '" + action + "' over scope '" + scope + "'. If access was recently granted, please refresh your credentials."
}
