package system

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/target/targettest"
	"keyfleet.dev/keyfleet/test/stack"
)

// service is a server, with what an application and an administrator of it know.
type service struct {
	*targettest.Server
	kind, target string // words of the command line
	connection   string // name
	id           string // of what is connected to, from the provider on
	values       map[string]string
	place        []string // flags that say the same

	// clients are all client types of the target, with how an application of that type
	// reads its environment. The first one is rotated.
	clients []clientType
	// login logs in as an application does, and writes something.
	login func(ctx context.Context, e endpoint) error
	// refused tells whether that error says that the login is not taken.
	refused func(error) bool
	// ours are the users and permissions on the server that connections have made, and
	// count what was written.
	ours  func(t *testing.T) string
	count func(t *testing.T) int
	// open lets a user of the test's own do what an application does.
	open func(t *testing.T, user, password string)
}

type clientType struct {
	name string
	read func(env map[string]string) endpoint
}

// TestConnectionToTargets: connections to MariaDB, Redis and RabbitMQ. For every
// client type an application connects with nothing but what the cluster has; the
// credential is rotated under load; deletion leaves nothing but the data, in the
// cluster and on the server. Then everything is searched for the passwords.
func TestConnectionToTargets(t *testing.T) {
	services := []*service{mariadb(t), redisServer(t), rabbitmq(t)}
	c := newCluster(t)
	var cancel context.CancelFunc
	c.ctx, cancel = context.WithTimeout(context.Background(), 10*time.Minute) // three lives, one after the other
	t.Cleanup(cancel)
	for _, s := range services {
		c.register(t, s.kind, s.Server)
	}
	before := c.inventory(t)
	var secrets []hidden
	for _, s := range services {
		t.Run(s.target, func(t *testing.T) { secrets = append(secrets, c.lifeOf(t, s)...) })
	}
	c.unchanged(t, before)
	for _, s := range services {
		secrets = append(secrets, c.administrator(s.kind, s.Server))
	}
	t.Run("secrets", func(t *testing.T) { c.secretsInUse(t, services, secrets) })
}

// hasAllClients fails for a client type of the catalogue that the test leaves out.
func (s *service) hasAllClients(t *testing.T) {
	t.Helper()
	catalogue, err := connector.LoadCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	target, err := catalogue.Target(s.target)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range target.Auth {
		for _, some := range a.Clients {
			for _, name := range some.For {
				if a.Type == connector.Secret && !slices.ContainsFunc(s.clients, func(c clientType) bool { return c.name == name }) {
					t.Errorf("no application of the type %s connects to %s", name, s.target)
				}
			}
		}
	}
}

// createFor makes the connection, or changes its client type, and returns what the cluster got.
func (c *connected) createFor(t *testing.T, s *service, client string, more ...string) map[string]string {
	t.Helper()
	args := append([]string{"connection", "create", s.target, "--connection", s.connection, "--cluster", "prod", "--server", "main", "--kube-namespace", "shop", "--client-type", client}, s.place...)
	out := c.keyfleet(t, 0, append(args, more...)...)
	if !strings.Contains(out, "Connection "+s.connection+" is there; it is Succeeded.") {
		t.Errorf("creating says %q", out)
	}
	env, err := c.environment(c.ctx, "sc-"+s.connection+"-secret")
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// lifeOf is the life of a connection. It returns the passwords that were made.
func (c *connected) lifeOf(t *testing.T, s *service) []hidden {
	asked := map[string]any{
		"targetService": map[string]any{"type": "AzureResource", "id": c.group + "/providers/" + s.id, "values": s.values},
		"authInfo":      map[string]any{"authType": "secret"}, "clientType": s.clients[0].name, "scope": "shop",
	}
	if err := c.create(t, s.connection, asked); err != nil { // as other clients than the command line ask for it
		t.Fatal(err)
	}
	s.hasAllClients(t)
	for _, client := range slices.Backward(s.clients) { // changes the connection each time
		env := c.createFor(t, s, client.name)
		if err := s.login(c.ctx, client.read(env)); err != nil {
			t.Errorf("an application of the type %s, with %v: %v", client.name, slices.Sorted(maps.Keys(env)), err)
		}
	}
	client := s.clients[0]
	read := func(ctx context.Context) (endpoint, error) {
		env, err := c.environment(ctx, "sc-"+s.connection+"-secret")
		return client.read(env), err
	}
	first, err := read(c.ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.rotateUnderLoad(t, s.connection, func(ctx context.Context) error {
		now, err := read(ctx)
		if err != nil {
			return err
		}
		return s.login(ctx, now)
	})
	if err := s.login(c.ctx, first); err == nil || !s.refused(err) {
		t.Errorf("logging in with the old credential: %v", err)
	}
	last, err := read(c.ctx)
	if err != nil || last.password == first.password || last.user == first.user {
		t.Fatalf("the credential after the rotation is the one of before: user %s, %v", last.user, err)
	}
	out := c.keyfleet(t, 0, "connection", "validate", s.connection, "--cluster", "prod")
	if strings.Count(out, "success") != 5 || strings.Contains(out, "failure") {
		t.Errorf("validation:\n%s", out)
	}
	if ours := s.ours(t); !strings.Contains(ours, last.user) || strings.Contains(ours, first.user) {
		t.Errorf("on the server there are %q, and the login in use is %s", ours, last.user)
	}
	t.Logf("%s\n%s", out, c.keyfleet(t, 0, "connection", "delete", s.connection, "--cluster", "prod", "--yes"))
	if err := s.login(c.ctx, last); err == nil || !s.refused(err) {
		t.Errorf("logging in after the deletion: %v", err)
	}
	if ours := s.ours(t); ours != "" {
		t.Errorf("left on the server: %s", ours)
	}
	if n := s.count(t); n == 0 {
		t.Error("the data is gone")
	}
	return []hidden{{name: "the first password for " + s.kind, value: first.password}, {name: "the last password for " + s.kind, value: last.password}}
}

// given is a password that every form changes and that needs quoting almost everywhere.
const given = `g1v/en:"p@ss'&é%w\o=r{d}; `

// secretsInUse searches everything while connections are there: to each server one
// with a login that Keyfleet made and one with a login that was given, and with a
// release of Helm in the cluster.
func (c *connected) secretsInUse(t *testing.T, services []*service, secrets []hidden) {
	for _, s := range services {
		made, own := *s, *s
		made.connection, own.connection = s.connection+"made", s.connection+"given"
		env := c.createFor(t, &made, s.clients[0].name)
		secrets = append(secrets, hidden{"the password in use of " + s.kind, s.clients[0].read(env).password, c.inCluster(t, made.connection)})

		password := given + s.kind
		file := c.file(t, s.kind+"-given", password)
		s.open(t, "own_user", password)
		for _, client := range slices.Backward(s.clients) {
			env := c.createFor(t, &own, client.name, "--secret", "name=own_user", "secret-file="+file)
			if err := s.login(c.ctx, client.read(env)); err != nil {
				t.Errorf("an application of the type %s, with a password that was given: %v", client.name, err)
			}
		}
		if out := c.keyfleet(t, 0, "connection", "validate", own.connection, "--cluster", "prod"); strings.Count(out, "success") != 5 {
			t.Errorf("validation of a login that was given:\n%s", out)
		}
		secrets = append(secrets, hidden{"the given password of " + s.kind, password, append(c.inCluster(t, own.connection), file)})
	}
	c.repaired(t, "sc-"+services[0].connection+"made-secret")
	release := c.install(t)
	t.Logf("Helm keeps its release in %s", release)
	c.noSecretIn(t, secrets)
	for _, s := range services {
		for _, name := range []string{s.connection + "made", s.connection + "given"} {
			c.keyfleet(t, 0, "connection", "delete", name, "--cluster", "prod", "--yes")
		}
		if ours := s.ours(t); ours != "" {
			t.Errorf("left on the server: %s", ours)
		}
	}
}

// repaired changes a Secret by hand and waits until an event tells that it was put back.
func (c *connected) repaired(t *testing.T, name string) {
	t.Helper()
	if _, err := c.api.CoreV1().Secrets("shop").Patch(c.ctx, name, types.MergePatchType, []byte(`{"stringData":{"MORE":"x"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, time.Minute, "an event about the repair", func(context.Context) error {
		all, err := c.api.CoreV1().Events("").List(c.ctx, metav1.ListOptions{})
		for _, e := range all.Items {
			if strings.Contains(e.Message+e.InvolvedObject.Name, name) {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("there are %d others", len(all.Items)))
	})
}

// install lets a manager with an administrator's login install the extension, and returns
// the name of the Secret with Helm's release. There are no nodes, so no pod of it runs.
// The Lease of the operator that runs here is given to the release first.
func (c *connected) install(t *testing.T) string {
	t.Helper()
	adopt := `{"metadata":{"labels":{"app.kubernetes.io/managed-by":"Helm"},"annotations":{"meta.helm.sh/release-name":"sc-extension","meta.helm.sh/release-namespace":"sc-system"}}}`
	if _, err := c.api.CoordinationV1().Leases("sc-system").Patch(c.ctx, "sc-operator", types.MergePatchType, []byte(adopt), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	c.keyfleet(t, 0, "cluster", "register", "prod", "--kubeconfig", c.file(t, "admin.kubeconfig", string(c.kube.Kubeconfig(t))))
	cmd := exec.Command(filepath.Join(c.Bin, "keyfleet-connector"), "manager", "--from", filepath.Join(c.home, "connector"), "--image", "registry.example/keyfleet-connector:1")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // it waits for pods that will not come
		_ = cmd.Wait()
		if t.Failed() {
			var shown json.RawMessage
			err := c.Client.Call(c.ctx, client.Request{Method: http.MethodGet, URL: c.Client.ARM(c.extension()), Version: "2023-05-01"}, &shown)
			t.Logf("the manager that installs:\n%s\n%s %v", &log, shown, err)
		}
	}()
	var name string
	stack.Eventually(t, 2*time.Minute, "Helm makes a release", func(context.Context) error {
		all, err := c.api.CoreV1().Secrets("sc-system").List(c.ctx, metav1.ListOptions{FieldSelector: "type=helm.sh/release.v1"})
		if err != nil || len(all.Items) == 0 {
			return errors.Join(err, errors.New("there is none"))
		}
		name = all.Items[0].Name
		return holdsRelease(all.Items[0])
	})
	return name
}

func (c *connected) extension() string {
	return c.group + "/providers/Microsoft.ContainerService/managedClusters/prod/providers/Microsoft.KubernetesConfiguration/extensions/sc-extension"
}

// holdsRelease fails unless the search looks into a release.
func holdsRelease(s core.Secret) error {
	for _, inside := range unpacked(s.Data["release"], 3) {
		if strings.Contains(string(inside), "registry.example/keyfleet-connector") {
			return nil
		}
	}
	return fmt.Errorf("the search does not see the values in the release %s", s.Name)
}
