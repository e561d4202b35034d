//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

// podClients is one workload that uses all servers: a pod with a container for each,
// which logs in anew four times a second. A container has nothing but the Secret of its
// connection. The workload is replaced as a rolling update does it: the new pod works
// before the old one is told to end, and that one works on for a while.
type podClients struct {
	*world
	secrets map[string]string   // is given all passwords
	before  map[string]bool     // what the cluster had without the connections
	running *podLog             // of the pod that shall run
	logins  map[target.Kind]int // of pods that have ended
}

// use is what one container uses.
type use struct {
	kind               target.Kind
	target, connection string
	place              []string // flags
}

func (c *podClients) uses() []use {
	return []use{
		{target.Postgres, "postgres-flexible", "podpg", []string{"--database", "shop"}},
		{target.MySQL, "mysql-flexible", "podmy", []string{"--database", "shop"}},
		{target.Redis, "redis", "podredis", []string{"--database", "0"}},
		{target.RabbitMQ, "rabbitmq", "podmq", []string{"--value", "vhost=/"}},
	}
}

// secret is the name of the Secret in the namespace default.
func (u use) secret() string { return "sc-" + u.connection + "-secret" }

// enough is how many logins show that a credential works.
const enough = 4

// podClient is the image of the program in podclient/.
const podClient = "registry.bed.internal/podclient:1"

// containers are those of a pod with the program, whose Secrets have the names that
// secret gives.
func (c *podClients) containers(secret func(use) string, more ...string) string {
	var all []core.Container
	for _, u := range c.uses() {
		all = append(all, core.Container{
			Name: string(u.kind), Image: podClient, Args: append([]string{string(u.kind)}, more...),
			EnvFrom: []core.EnvFromSource{{SecretRef: &core.SecretEnvSource{LocalObjectReference: core.LocalObjectReference{Name: secret(u)}}}},
		})
	}
	text, _ := json.Marshal(all) // plain data
	return string(text)
}

// start makes the connections and the workload.
func (c *podClients) start(t *testing.T) {
	c.before, c.logins = c.inventory(t), map[target.Kind]int{}
	c.pushClient(t)
	c.shopInMariaDB(t)
	var making []<-chan error
	for _, u := range c.uses() {
		args := append([]string{"connection", "create", u.target, "--connection", u.connection, "--cluster", "prod", "--server", "main", "--client-type", "go"}, u.place...)
		making = append(making, c.begin(args...))
	}
	c.succeed(t, making)
	c.apply(t, `
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: default, name: clients}
spec:
  replicas: 1
  minReadySeconds: 2
  strategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  selector: {matchLabels: {app: clients}}
  template:
    metadata: {labels: {app: clients}}
    spec: {containers: `+c.containers(use.secret)+`}
`)
	c.kube(t, "rollout", "status", "deployment/clients", "--timeout=180s")
	c.running = c.follow(t)
	c.logIn(t, c.running)
}

// pushClient gives the bed's registry the program as an image that trusts the CAs of
// the servers, as the images of an organisation trust its own.
func (c *podClients) pushClient(t *testing.T) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "podclient")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./test/connector/podclient")
	build.Dir, build.Env = stack.Root(t), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	var roots strings.Builder
	for _, s := range c.targets {
		roots.WriteString(s.CA)
	}
	err := c.bed.PushImage(c.ctx, bed.Image{
		Ref: podClient, Files: map[string]string{"/podclient": program, "/etc/ssl/certs/ca-certificates.crt": c.file(t, "roots.pem", roots.String())}, Entrypoint: []string{"/podclient"},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// succeed waits for commands.
func (c *podClients) succeed(t *testing.T, commands []<-chan error) {
	t.Helper()
	for _, ended := range commands {
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(4 * time.Minute):
			t.Fatal("a command does not end")
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// rotate replaces all four credentials while the pod works with them, and the pod when
// the rotations name it.
func (c *podClients) rotate(t *testing.T) {
	old := c.running
	c.keepSecrets(t)
	var rotations []<-chan error
	for _, u := range c.uses() {
		rotations = append(rotations, c.begin("connection", "rotate", u.connection, "--cluster", "prod"))
	}
	for _, u := range c.uses() {
		stack.Eventually(t, 2*time.Minute, "the rotation of "+u.connection+" names the pod", func(context.Context) error {
			if out := c.keyfleet(t, "connection", "show", u.connection, "--cluster", "prod"); !strings.Contains(out, "default/"+old.name) {
				return errors.New(out)
			}
			return nil
		})
	}
	c.logIn(t, old) // both credentials work while they wait
	c.kube(t, "rollout", "restart", "deployment/clients")
	c.kube(t, "rollout", "status", "deployment/clients", "--timeout=180s")
	c.running = c.follow(t)
	c.succeed(t, rotations)
	c.logIn(t, c.running) // the old ones are ended
	was, is := c.end(t, old), c.running.read(t)
	c.refusedInPod(t, was)
	for _, u := range c.uses() {
		before, after := was[u.kind], is[u.kind]
		if before.user == after.user {
			t.Errorf("%s: both pods log in as %s", u.connection, after.user)
		}
		if known := c.known(t, u); !slices.Contains(known, after.user) || slices.Contains(known, before.user) {
			t.Errorf("%s has %v; the login was %s and is %s", u.kind, known, before.user, after.user)
		}
	}
}

// generated is a password that Keyfleet made, in a variable.
var generated = regexp.MustCompile(`[A-Z2-7]{52}`)

// note adds the password that a connection's Secret has to those that nothing may show.
func (c *podClients) note(t *testing.T, which string, u use, env map[string]string) {
	t.Helper()
	for _, value := range env {
		if password := generated.FindString(value); password != "" {
			c.secrets["the "+which+" password of "+u.connection] = password
			return
		}
	}
	t.Errorf("%s holds no password", u.secret())
}

// kept is the name of a copy of a Secret.
func kept(u use) string { return "kept-" + string(u.kind) }

// keepSecrets copies the Secrets of the connections, as somebody does who keeps what was read.
func (c *podClients) keepSecrets(t *testing.T) {
	t.Helper()
	for _, u := range c.uses() {
		env := c.environment(t, u.secret())
		c.note(t, "first", u, env)
		text, err := json.Marshal(core.Secret{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: kept(u)}, StringData: env,
		})
		if err != nil {
			t.Fatal(err)
		}
		c.apply(t, string(text))
	}
}

// refusedInPod looks that the servers do not take what was kept.
func (c *podClients) refusedInPod(t *testing.T, was map[target.Kind]tally) {
	t.Helper()
	c.apply(t, `
apiVersion: v1
kind: Pod
metadata: {namespace: default, name: refused}
spec: {restartPolicy: Never, containers: `+c.containers(kept, "once")+`}
`)
	c.kube(t, "wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s", "pod/refused")
	log := c.kube(t, "logs", "refused", "--all-containers")
	t.Logf("with the old credentials:\n%s", log)
	now, _ := tallies(log)
	for _, u := range c.uses() {
		if want := (tally{user: was[u.kind].user, refused: 1, stopped: true}); now[u.kind] != want {
			t.Errorf("%s, with the old credential: %+v", u.kind, now[u.kind])
		}
	}
	gone := []string{"delete", "--wait", "pod/refused"}
	for _, u := range c.uses() {
		gone = append(gone, "secret/"+kept(u))
	}
	c.kube(t, gone...)
}

// remove ends the workload, and then the connections.
func (c *podClients) remove(t *testing.T) {
	c.kube(t, "delete", "deployment/clients", "--wait")
	c.end(t, c.running)
	var removals []<-chan error
	for _, u := range c.uses() {
		c.note(t, "last", u, c.environment(t, u.secret()))
		removals = append(removals, c.begin("connection", "delete", u.connection, "--cluster", "prod", "--yes"))
	}
	c.succeed(t, removals)
	c.nothingLeft(t, c.before)
	for _, u := range c.uses() {
		if known := c.known(t, u); len(known) > 0 {
			t.Errorf("left on %s: %v", u.kind, known)
		}
	}
	for kind, n := range c.written(t) {
		if n != c.logins[kind] {
			t.Errorf("%s has %d rows of %d logins", kind, n, c.logins[kind])
		}
	}
}
