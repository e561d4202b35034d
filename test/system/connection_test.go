package system

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/target/targettest"
	"keyfleet.dev/keyfleet/test/stack"
)

const linkerVersion = "2024-04-01"

// connected is a registered cluster with an operator in it (a process of this
// machine, as the account that the chart has), and a PostgreSQL server.
type connected struct {
	*registered
	group    string
	postgres *targettest.Server
}

func newConnected(t *testing.T) *connected {
	t.Helper()
	postgres := targettest.Postgres(t)
	c := newCluster(t)
	c.postgres = postgres
	admin, err := pgx.Connect(c.ctx, c.adminURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(c.ctx)
	if _, err := admin.Exec(c.ctx, "CREATE DATABASE shop"); err != nil {
		t.Fatal(err)
	}
	c.register(t, "postgres", c.postgres)
	return c
}

// newCluster is one without a server to connect to; it has the namespace shop.
func newCluster(t *testing.T) *connected {
	t.Helper()
	c := &connected{registered: &registered{kube: kubetest.Start(t), home: t.TempDir()}}
	c.system = start(t, stack.Config{Args: []string{"--log-level", "debug"}}) // so that its log has all that it can have
	c.connect(t)
	c.group = c.registered.group("rg")
	c.keyfleet(t, 0, "cluster", "register", "prod", "--kubeconfig", c.file(t, "kubeconfig", string(c.kube.TokenKubeconfig(t, c.managerAccount(t)))))
	c.manage(t)
	c.operate(t)
	c.becomes(t, "Succeeded", "")
	if _, err := c.api.CoreV1().Namespaces().Create(c.ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return c
}

// file writes a file for the command line and returns its path.
func (c *connected) file(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(c.home, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// register registers a server with the name main by the command line; a wrong
// password is refused. The right one stays in the file KIND-password.
func (c *connected) register(t *testing.T, kind string, s *targettest.Server) {
	t.Helper()
	args := []string{
		"server", "register", kind, "main", "--host", s.Host, "--port", strconv.Itoa(s.Port), "--admin", s.AdminUser, "--ca-file", c.file(t, "ca.pem", s.CA),
	}
	if s.Management != "" {
		args = append(args, "--management", s.Management)
	}
	if out := c.keyfleet(t, 1, append(args, "--password-file", c.file(t, "wrong", "wrong-password"))...); !strings.Contains(out, "InvalidDbSecret") {
		t.Errorf("a wrong password: %s", out)
	}
	t.Log(c.keyfleet(t, 0, append(args, "--password-file", c.file(t, kind+"-password", s.AdminPassword))...))
}

// administrator is the password of a server's administrator, which belongs into the
// file that the command line read.
func (c *connected) administrator(kind string, s *targettest.Server) hidden {
	return hidden{"the password of the administrator of " + kind, s.AdminPassword, []string{filepath.Join(c.home, kind+"-password")}}
}

func (c *connected) adminURL(database string) string {
	return fmt.Sprintf("host=%s port=%d dbname=%s user=%s password=%s sslmode=require", c.postgres.Host, c.postgres.Port, database, c.postgres.AdminUser, c.postgres.AdminPassword)
}

func (c *connected) server() string {
	return c.group + "/providers/Microsoft.DBforPostgreSQL/flexibleServers/main"
}

func (c *connected) linker(name string) string {
	return c.group + "/providers/Microsoft.ContainerService/managedClusters/prod/providers/Microsoft.ServiceLinker/linkers/" + name
}

// operate runs the operator until the test ends.
func (c *connected) operate(t *testing.T) {
	t.Helper()
	kubeconfig := filepath.Join(c.home, "operator.kubeconfig")
	if err := os.WriteFile(kubeconfig, c.kube.Kubeconfig(t), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(c.Bin, "keyfleet-connector"), "operator", "--kubeconfig", kubeconfig, "--probes", "")
	log, err := os.Create(filepath.Join(c.home, "operator.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the operator ended with %v", err)
		}
		text, err := os.ReadFile(log.Name())
		_ = log.Close()
		if err != nil || t.Failed() {
			t.Logf("the operator's log (%v):\n%s", err, text)
		}
	})
}

// create makes a connection and waits for its end.
func (c *connected) create(t *testing.T, name string, properties map[string]any) error {
	t.Helper()
	resp, err := c.Client.Do(c.ctx, client.Request{Method: http.MethodPut, URL: c.Client.ARM(c.linker(name)), Version: linkerVersion, Body: map[string]any{"properties": properties}})
	if err != nil {
		return err
	}
	_, err = c.Client.Wait(c.ctx, resp, nil)
	return err
}

// postgresBody is what the command line of Azure sends for a database, but for the
// secret: Keyfleet makes it.
func (c *connected) postgresBody() map[string]any {
	return map[string]any{
		"targetService": map[string]any{"type": "AzureResource", "id": c.server() + "/databases/shop"},
		"authInfo":      map[string]any{"authType": "secret"}, "clientType": "go", "scope": "shop",
		"secretStore": map[string]any{}, "publicNetworkSolution": map[string]any{}, "configurationInfo": map[string]any{},
	}
}

// environment is what the cluster's Secret has.
func (c *connected) environment(ctx context.Context, name string) (map[string]string, error) {
	s, err := c.api.CoreV1().Secrets("shop").Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for k, v := range s.Data {
		out[k] = string(v)
	}
	return out, nil
}

// use logs in with what the cluster has, as an application does, and writes.
func (c *connected) use(ctx context.Context) error {
	env, err := c.environment(ctx, "sc-db-secret")
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, env["AZURE_POSTGRESQL_CONNECTIONSTRING"])
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS orders (n int); INSERT INTO orders VALUES (1)")
	return err
}

// TestConnectionToPostgres: a connection is made with a login that Keyfleet makes;
// a client connects with nothing but what the cluster got; drift is repaired; the
// credential is rotated under load; the deletion leaves nothing but the data.
func TestConnectionToPostgres(t *testing.T) {
	c := newConnected(t)
	before := c.inventory(t)
	t.Log(c.keyfleet(t, 0, "connection", "create", "postgres-flexible", "--connection", "db", "--cluster", "prod", "--server", "main", "--database", "shop",
		"--kube-namespace", "shop", "--client-type", "go"))
	if err := c.use(c.ctx); err != nil {
		t.Fatal(err)
	}
	first, err := c.environment(c.ctx, "sc-db-secret")
	if err != nil {
		t.Fatal(err)
	}
	shown := c.text(t, http.MethodGet, c.linker("db"))
	for _, want := range []string{`"provisioningState":"Succeeded"`, `"secret":"sc-db-secret"`, `"made":true`, `"proven":"2`} {
		if !strings.Contains(shown, want) {
			t.Errorf("the connection does not say %s:\n%s", want, shown)
		}
	}
	listed := c.text(t, http.MethodPost, c.linker("db")+"/listConfigurations")
	if password := passwordOf(t, first); strings.Contains(shown+listed, password) || !strings.Contains(listed, "AZURE_POSTGRESQL_CONNECTIONSTRING") {
		t.Errorf("a credential shows, or a name does not: %s", listed)
	}
	if v := c.text(t, http.MethodPost, c.linker("db")+"/validateLinker"); !strings.Contains(v, `"isConnectionAvailable":true`) || strings.Count(v, `"success"`) != 5 {
		t.Errorf("validation: %s", v)
	}

	// Names that lead to the same Secret are refused before anything is made.
	if err := c.create(t, "d-b", c.postgresBody()); err == nil || !strings.Contains(err.Error(), "SecretNameCollision") {
		t.Errorf("d-b beside db: %v", err)
	}

	// Somebody changes the Secret by hand.
	patch := []byte(`{"stringData":{"AZURE_POSTGRESQL_CONNECTIONSTRING":"host=elsewhere","MORE":"x"}}`)
	if _, err := c.api.CoreV1().Secrets("shop").Patch(c.ctx, "sc-db-secret", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, 2*time.Minute, "the Secret is put back", func(ctx context.Context) error {
		if env, err := c.environment(ctx, "sc-db-secret"); err != nil || len(env) != len(first) || env["AZURE_POSTGRESQL_CONNECTIONSTRING"] != first["AZURE_POSTGRESQL_CONNECTIONSTRING"] {
			return fmt.Errorf("%d names, %v", len(env), err)
		}
		return nil
	})
	c.rotateUnderLoad(t, "db", c.use)
	if conn, err := pgx.Connect(c.ctx, first["AZURE_POSTGRESQL_CONNECTIONSTRING"]); err == nil {
		_ = conn.Close(c.ctx)
		t.Error("the old credential still works")
	}
	for _, args := range [][]string{{"list"}, {"show", "db"}, {"validate", "db"}, {"list-configuration", "db"}} {
		t.Logf("keyfleet connection %s\n%s", strings.Join(args, " "), c.keyfleet(t, 0, append(append([]string{"connection"}, args...), "--cluster", "prod")...))
	}
	last, err := c.environment(c.ctx, "sc-db-secret")
	if err != nil {
		t.Fatal(err)
	}
	delivered := hidden{"the last password", passwordOf(t, last), c.inCluster(t, "db")}
	c.noSecretIn(t, []hidden{c.administrator("postgres", c.postgres), {name: "the first password", value: passwordOf(t, first)}, delivered})
	c.deleteAll(t)
	c.unchanged(t, before)
	delivered.in = nil
	c.noSecretIn(t, []hidden{c.administrator("postgres", c.postgres), {name: "the first password", value: passwordOf(t, first)}, delivered})
}

// inCluster are the two objects in which the credential of a connection belongs: its
// desired state, and the Secret that the workloads name.
func (c *connected) inCluster(t *testing.T, name string) []string {
	t.Helper()
	in := []string{"secrets shop/sc-" + name + "-secret"}
	all, err := c.api.CoreV1().Secrets("sc-system").List(c.ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all.Items {
		if bytes.Contains(s.Data["desired"], []byte("/linkers/"+name+`"`)) {
			in = append(in, "secrets sc-system/"+s.Name)
		}
	}
	if len(in) != 2 {
		t.Fatalf("%s has %d desired states", name, len(in)-1)
	}
	return in
}

// passwordOf takes the password out of a connection string.
func passwordOf(t *testing.T, env map[string]string) string {
	t.Helper()
	cfg, err := pgx.ParseConfig(env["AZURE_POSTGRESQL_CONNECTIONSTRING"])
	if err != nil || len(cfg.Password) < 20 {
		t.Fatalf("the connection string has no password worth the name: %v", err)
	}
	return cfg.Password
}

// load are clients that log in again and again until they are told to stop.
type load struct {
	logins, failed, overtaken atomic.Int64
	clients                   errgroup.Group
}

// start starts a client. Its login has failed if it is refused while the Secret is the one
// that it has read; where the Secret has changed meanwhile it was overtaken, as
// no pod is: those that were started with the old values are waited for.
func (l *load) start(ctx context.Context, version func() (string, error), use func() error) {
	l.clients.Go(func() (problem error) {
		for ctx.Err() == nil {
			before, err := version()
			if err == nil {
				err = use()
			}
			l.logins.Add(1)
			if err == nil {
				continue
			}
			if after, unread := version(); unread == nil && after != before {
				l.overtaken.Add(1)
				continue
			}
			l.failed.Add(1)
			problem = errors.Join(problem, err)
		}
		return problem
	})
}

// rotateUnderLoad rotates the credential of a connection while clients log in, by use,
// with what the cluster has at that moment.
func (c *connected) rotateUnderLoad(t *testing.T, name string, use func(context.Context) error) {
	t.Helper()
	ctx, stop := context.WithCancel(c.ctx)
	defer stop()
	version := func() (string, error) {
		s, err := c.api.CoreV1().Secrets("shop").Get(c.ctx, "sc-"+name+"-secret", metav1.GetOptions{})
		return s.ResourceVersion, err
	}
	var l load
	for range 3 {
		l.start(ctx, version, func() error { return use(c.ctx) })
	}
	atLeast := func(n int64) {
		t.Helper()
		stack.Eventually(t, time.Minute, "logins", func(context.Context) error {
			if l.logins.Load() < n {
				return fmt.Errorf("%d of %d", l.logins.Load(), n)
			}
			return nil
		})
	}
	atLeast(10)
	before := l.logins.Load()
	resp := c.do(client.Request{Method: http.MethodPost, URL: c.Client.ARM(c.linker(name) + "/rotate"), Version: linkerVersion})
	if _, err := c.Client.Wait(c.ctx, resp, nil); err != nil {
		t.Errorf("rotating: %v", err)
	}
	during := l.logins.Load() - before
	atLeast(l.logins.Load() + 10)
	stop()
	if problem := l.clients.Wait(); problem != nil {
		t.Errorf("%d of %d logins failed: %v", l.failed.Load(), l.logins.Load(), problem)
	}
	t.Logf("a rotation under load: %d logins, %d of them while it went on, %d failed, %d were overtaken", l.logins.Load(), during, l.failed.Load(), l.overtaken.Load())
}

// deleteAll deletes the connection, and looks that nothing is left of it.
func (c *connected) deleteAll(t *testing.T) {
	t.Helper()
	out := c.keyfleet(t, 0, "connection", "delete", "db", "--cluster", "prod", "--yes")
	for _, want := range []string{"Secret shop/sc-db-secret", "role kf_db_", "secret sc-db-"} {
		if !strings.Contains(out, want) {
			t.Errorf("the report of the deletion does not say %q:\n%s", want, out)
		}
	}
	t.Log(out)
	if _, err := c.environment(c.ctx, "sc-db-secret"); !apierrors.IsNotFound(err) {
		t.Errorf("the Secret is still there: %v", err)
	}
	secrets, err := c.api.CoreV1().Secrets("sc-system").List(c.ctx, metav1.ListOptions{})
	if err != nil || len(secrets.Items) != 0 {
		t.Errorf("%d desired states are left, %v", len(secrets.Items), err)
	}
	admin, err := pgx.Connect(c.ctx, c.adminURL("shop"))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(c.ctx)
	var roles, rows int
	if err := admin.QueryRow(c.ctx, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'kf\\_%'").Scan(&roles); err != nil || roles != 0 {
		t.Errorf("%d roles are left, %v", roles, err)
	}
	if err := admin.QueryRow(c.ctx, "SELECT count(*) FROM orders").Scan(&rows); err != nil || rows == 0 {
		t.Errorf("the data is gone: %d rows, %v", rows, err)
	}
	if err := c.Client.Call(c.ctx, client.Request{Method: http.MethodGet, URL: c.Client.ARM(c.linker("db")), Version: linkerVersion}, nil); err == nil || !strings.Contains(err.Error(), "ResourceNotFound") {
		t.Errorf("the connection is still there: %v", err)
	}
}

// text makes a call and returns the answer as it is.
func (c *connected) text(t *testing.T, method, path string) string {
	t.Helper()
	var raw json.RawMessage
	c.call(method, c.Client.ARM(path), linkerVersion, nil, &raw)
	return string(raw)
}

// TestConnectionToVault: a workload identity gets a ServiceAccount and a policy at
// Keyfleet's own vault; with the token of a pod of that account a secret is read,
// by nothing but what the cluster got. The deletion takes both back.
func TestConnectionToVault(t *testing.T) {
	c := newConnected(t)
	identityID, clientID, _ := c.identity(c.group, "web")
	c.vault(c.group, "clustervault")
	c.putSecret(t, "clustervault", "db", "s3cret")
	body := map[string]any{
		"targetService": map[string]any{"type": "AzureResource", "id": c.group + "/providers/Microsoft.KeyVault/vaults/clustervault"},
		"authInfo":      map[string]any{"authType": "userAssignedIdentity", "identity": identityID}, "clientType": "python", "scope": "shop",
	}
	if err := c.create(t, "kv", body); err != nil {
		t.Fatal(err)
	}
	env, err := c.environment(c.ctx, "sc-kv-secret")
	if err != nil || env["AZURE_KEYVAULT_CLIENTID"] != clientID || !strings.Contains(env["AZURE_KEYVAULT_RESOURCEENDPOINT"], "clustervault.vault.") {
		t.Errorf("the environment: %v, %v", env, err)
	}
	account, err := c.api.CoreV1().ServiceAccounts("shop").Get(c.ctx, "sc-account-"+clientID, metav1.GetOptions{})
	if err != nil || account.Annotations["azure.workload.identity/client-id"] != clientID {
		t.Fatalf("the ServiceAccount: %v, %v", account.Annotations, err)
	}
	if got, err := c.readAs(t, env["AZURE_KEYVAULT_CLIENTID"], c.podToken(t, "shop", account.Name, "api://AzureADTokenExchange")); err != nil || got != "s3cret" {
		t.Errorf("the pod reads %q, %v", got, err)
	}
	// A second connection of the same identity shares the account, which stays until the last one goes.
	if err := c.create(t, "kv2", body); err != nil {
		t.Fatal(err)
	}
	remove := func(name string, flags ...string) {
		t.Helper()
		c.keyfleet(t, 0, append([]string{"connection", "delete", name, "--cluster", "prod", "--yes"}, flags...)...)
	}
	token := c.podToken(t, "shop", account.Name, "api://AzureADTokenExchange")
	remove("kv")
	if got, err := c.readAs(t, clientID, token); err != nil || got != "s3cret" {
		t.Errorf("the other connection of the identity lost its access: %q, %v", got, err)
	}
	remove("kv2", "--keep")
	if kept, err := c.environment(c.ctx, "sc-kv2-secret"); err != nil || kept["AZURE_KEYVAULT_CLIENTID"] != clientID {
		t.Errorf("what was to be kept: %v, %v", kept, err)
	}
	if _, err := c.api.CoreV1().ServiceAccounts("shop").Get(c.ctx, account.Name, metav1.GetOptions{}); err != nil {
		t.Errorf("the account that was to be kept: %v", err)
	}
	if _, err := c.readAs(t, clientID, token); err == nil {
		t.Error("the identity is still trusted")
	}
	if err := c.create(t, "kv3", body); err == nil || !strings.Contains(err.Error(), "ResourceExists") {
		t.Errorf("the account is nobody's now, and is taken over: %v", err)
	}
	if err := c.api.CoreV1().ServiceAccounts("shop").Delete(c.ctx, account.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, 2*time.Minute, "the connection goes on without being asked", func(context.Context) error {
		if shown := c.text(t, http.MethodGet, c.linker("kv3")); !strings.Contains(shown, `"provisioningState":"Succeeded"`) {
			return errors.New(shown)
		}
		return nil
	})
	remove("kv3")
	if _, err := c.api.CoreV1().ServiceAccounts("shop").Get(c.ctx, account.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the ServiceAccount is still there: %v", err)
	}
	if _, err := c.readAs(t, clientID, token); err == nil {
		t.Error("the identity is still trusted")
	}
}

// TestManyConnections: fifty are made at once on one cluster, and deleted at once.
func TestManyConnections(t *testing.T) {
	const many = 50
	c := newConnected(t)
	atOnce := func(what func(name string) error) {
		t.Helper()
		var all errgroup.Group
		for i := range many {
			all.Go(func() error { return what(fmt.Sprintf("c%02d", i)) })
		}
		if err := all.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	atOnce(func(name string) error { return c.create(t, name, c.postgresBody()) })
	took := time.Since(began)
	secrets, err := c.api.CoreV1().Secrets("shop").List(c.ctx, metav1.ListOptions{})
	if err != nil || len(secrets.Items) != many {
		t.Fatalf("%d Secrets, %v", len(secrets.Items), err)
	}
	users := map[string]bool{}
	for _, s := range secrets.Items {
		text := string(s.Data["AZURE_POSTGRESQL_CONNECTIONSTRING"])
		conn, err := pgx.Connect(c.ctx, text)
		if err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
		users[conn.Config().User] = true
		_ = conn.Close(c.ctx)
	}
	if len(users) != many {
		t.Errorf("%d logins for %d connections", len(users), many)
	}
	atOnce(func(name string) error {
		resp, err := c.Client.Do(c.ctx, client.Request{Method: http.MethodDelete, URL: c.Client.ARM(c.linker(name)), Version: linkerVersion})
		if err == nil {
			_, err = c.Client.Wait(c.ctx, resp, nil)
		}
		return err
	})
	if secrets, err = c.api.CoreV1().Secrets("").List(c.ctx, metav1.ListOptions{}); err != nil || len(secrets.Items) != 0 {
		t.Errorf("%d Secrets are left, %v", len(secrets.Items), err)
	}
	t.Logf("%d connections at once, each with a login of its own: all there after %s", many, took.Round(100*time.Millisecond))
}
