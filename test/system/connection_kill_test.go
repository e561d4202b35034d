package system

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/internal/target/targettest"
	"keyfleet.dev/keyfleet/test/stack"
)

// Connections, with server and manager killed everywhere.
//
// One flow makes a connection to PostgreSQL, whose login Keyfleet makes, and one of
// a workload identity to a vault, rotates the first and deletes both. A first flow
// logs every outside effect of server and manager (package effect). Then, for each
// effect and for "before" and "after", the flow is gone through once more, the
// program in question kills itself with SIGKILL at that point and is started again;
// the client does what people do, it looks and asks again. Every flow must end in
// the same state, and at no time is there more than the role and its two logins.
//
// Flows follow each other on lines. A line is a server and a manager; the API
// server, the operator and PostgreSQL are those of all lines. Effects are counted by
// their names, from the beginning of a flow: what else goes on does not shift the points.

// lines is how many flows are under way at a time.
const lines = 4

// noise are effects that a flow has over and over, or that end what was before it:
// only so many of them are points.
var noise = map[string]int{
	"append audit lines": 3, "sync audit file": 3, "commit audit, auditanchors": 1, "report on cluster": 2, // looking
	"commit secrets": 0, "commit secretversions": 0, "commit deletedsecrets": 1, // the vault of the flow before is purged
}

// The programs that die.
const (
	theServer  = "server"
	theManager = "manager"
)

// killPoint is the k-th effect of a name in a flow, before or after it.
type killPoint struct {
	program, when, name string
	k                   int
}

func (p killPoint) String() string { return fmt.Sprintf("%s:%s#%d", p.when, p.name, p.k) }

// line is a server and a manager that may die, with a cluster.
type line struct {
	*connected
	name     string // of the cluster, and of the namespace
	identity struct{ id, client, object string }
	me       struct{ ObjectID, TenantID string }
	flows    int
	seen     map[string][]string // effects of the last flow without a death, by program
	stop     chan struct{}
	running  sync.WaitGroup
}

// TestConnectionsKilledEverywhere walks through every effect of the flow.
func TestConnectionsKilledEverywhere(t *testing.T) {
	if testing.Short() {
		t.Skip("SHORT: connections with server and manager killed at every effect take minutes")
	}
	bin, kube, postgres := stack.Build(t, "killpoints"), kubetest.Start(t), targettest.Postgres(t)
	var all []*line
	for i := range lines {
		all = append(all, newLine(t, bin, fmt.Sprintf("line%d", i), kube, postgres))
	}
	points := enumerateFlow(t, all)
	if t.Failed() {
		return
	}
	k := killing{left: points, killed: map[string]int{}}
	var running sync.WaitGroup
	for _, l := range all {
		running.Go(func() { // a line that failed is left as it is
			for p, ok := k.next(); ok && t.Run(p.program+" "+p.String(), func(t *testing.T) { k.note(p, l.flow(t, p)) }); p, ok = k.next() {
			}
		})
	}
	running.Wait()
	k.report(t, points)
}

// killing is how far the walk through all points is.
type killing struct {
	sync.Mutex
	left   []killPoint
	killed map[string]int // by program
	missed []string       // to which a program did not come
}

func (k *killing) next() (p killPoint, ok bool) {
	k.Lock()
	defer k.Unlock()
	if len(k.left) == 0 {
		return p, false
	}
	p, k.left = k.left[0], k.left[1:]
	return p, true
}

func (k *killing) note(p killPoint, died bool) {
	k.Lock()
	defer k.Unlock()
	if died {
		k.killed[p.program]++
	} else {
		k.missed = append(k.missed, p.program+" "+p.String())
	}
}

// report prints what was covered. Not every flow has the same repetitions of an
// effect, but nearly.
func (k *killing) report(t *testing.T, points []killPoint) {
	if len(k.missed) > len(points)/10 {
		t.Errorf("no program came to %d of %d points", len(k.missed), len(points))
	}
	t.Logf("points to which no program came: %q", k.missed)
	names := map[string][]string{}
	for _, p := range points {
		names[p.program] = append(names[p.program], p.name)
	}
	for program, all := range names {
		slices.Sort(all)
		names[program] = slices.Compact(all)
	}
	fmt.Printf("connections: the server was killed at %d points and the manager at %d points (names: %s; %s)\n",
		k.killed[theServer], k.killed[theManager], strings.Join(names[theServer], ", "), strings.Join(names[theManager], ", "))
}

// enumerateFlow returns the points of a flow: the effects that it has on every line.
func enumerateFlow(t *testing.T, all []*line) (points []killPoint) {
	t.Helper()
	var running sync.WaitGroup
	for _, l := range all {
		running.Go(func() {
			t.Run(l.name, func(t *testing.T) {
				l.flow(t, killPoint{}) // the first one makes what the next ones find
				began := time.Now()
				l.flow(t, killPoint{})
				t.Logf("a flow takes %s", time.Since(began))
			})
		})
	}
	running.Wait()
	for _, program := range []string{theServer, theManager} {
		least := map[string]int{}
		for i, l := range all {
			found := map[string]int{}
			for _, name := range l.seen[program] {
				found[name]++
			}
			if i == 0 {
				least = found
			}
			for name := range least {
				least[name] = min(least[name], found[name])
			}
		}
		for _, name := range slices.Sorted(maps.Keys(least)) {
			last := least[name]
			if n, ok := noise[name]; ok {
				last = min(last, n)
			}
			for k := 1; k <= last; k++ {
				points = append(points, killPoint{program, "before", name, k}, killPoint{program, "after", name, k})
			}
			t.Logf("%s: %d times %s", program, least[name], name)
		}
	}
	return points
}

// newLine starts server and manager, and registers the cluster and PostgreSQL there.
func newLine(t *testing.T, bin, name string, kube *kubetest.Cluster, postgres *targettest.Server) *line {
	t.Helper()
	l := &line{connected: &connected{registered: &registered{kube: kube, home: t.TempDir()}, postgres: postgres}, name: name, seen: map[string][]string{}, stop: make(chan struct{})}
	l.system = start(t, stack.Config{Bin: bin, Env: l.environ(theServer)})
	l.ctx = t.Context()
	l.connect(t)
	l.connected.group = l.registered.group("rg")
	l.identity.id, l.identity.client, l.identity.object = l.registered.identity(l.connected.group, "web")
	l.call(http.MethodGet, l.Client.ARM("/keyfleet/v1/whoami"), "", nil, &l.me)
	l.vault(l.connected.group, "clustervault")
	l.putSecret(t, "clustervault", "db", "s3cret")
	l.shared(t)
	if _, err := l.api.CoreV1().Namespaces().Create(l.ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(l.home, "kubeconfig")
	if err := os.WriteFile(kubeconfig, kube.TokenKubeconfig(t, l.podToken(t, "keyfleet", "manager", "https://kubernetes.default.svc")), 0o600); err != nil {
		t.Fatal(err)
	}
	l.keyfleet(t, 0, "cluster", "register", name, "--kubeconfig", kubeconfig)
	l.registerServer(t)
	l.keyfleet(t, 0, "cluster", "manager", "create", "connector", "--to-dir", filepath.Join(l.home, "connector"))
	l.supervise(t)
	return l
}

// registerServer registers PostgreSQL by the command line.
func (l *line) registerServer(t *testing.T) {
	t.Helper()
	ca, password := filepath.Join(l.home, "ca.pem"), filepath.Join(l.home, "password")
	if err := errors.Join(os.WriteFile(ca, []byte(l.postgres.CA), 0o600), os.WriteFile(password, []byte(l.postgres.AdminPassword), 0o600)); err != nil {
		t.Fatal(err)
	}
	l.keyfleet(t, 0, "server", "register", "postgres", "main", "--host", l.postgres.Host, "--port", strconv.Itoa(l.postgres.Port), "--admin", l.postgres.AdminUser,
		"--ca-file", ca, "--password-file", password)
}

// shared makes what all lines share, if it is not there yet: the account of the
// managers, the operator, and the database.
func (l *line) shared(t *testing.T) {
	t.Helper()
	if _, err := l.api.CoreV1().Namespaces().Get(l.ctx, "sc-system", metav1.GetOptions{}); err == nil {
		return
	}
	l.managerAccount(t)
	l.operate(t)
	admin, err := pgx.Connect(l.ctx, l.adminURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(l.ctx)
	if _, err := admin.Exec(l.ctx, "CREATE DATABASE shop"); err != nil {
		t.Fatal(err)
	}
}

// environ tells a program where to log its effects, and where to look for the order to die.
func (l *line) environ(program string) []string {
	return []string{"KEYFLEET_EFFECT_LOG=" + l.effects(program), "KEYFLEET_KILL_ORDER=" + l.order(program)}
}

func (l *line) effects(program string) string { return filepath.Join(l.home, program+".effects") }
func (l *line) order(program string) string   { return filepath.Join(l.home, program+".order") }

// supervise starts the manager, and both programs again whenever they have died,
// until the test ends.
func (l *line) supervise(t *testing.T) {
	log, err := os.Create(filepath.Join(l.home, "manager.log"))
	if err != nil {
		t.Fatal(err)
	}
	l.running.Go(func() { // ends with the test
		for {
			select {
			case <-l.stop:
				return
			case <-l.Ended():
				if err := l.Run(l.environ(theServer)...); err != nil {
					t.Errorf("starting the server of %s again: %v", l.name, err)
					return
				}
			}
		}
	})
	l.running.Go(func() { // ends with the test
		for l.manageOnce(t, log) {
		}
	})
	t.Cleanup(func() {
		close(l.stop)
		l.running.Wait()
		text, err := os.ReadFile(log.Name())
		_ = log.Close()
		if err != nil || t.Failed() {
			t.Logf("the log of the manager of %s (%v):\n%s", l.name, err, text[max(0, len(text)-8<<10):])
		}
	})
}

// manageOnce runs the manager until it dies, which returns true, or the test ends.
func (l *line) manageOnce(t *testing.T, log *os.File) bool {
	cmd := exec.Command(filepath.Join(l.Bin, "keyfleet-connector"), "manager", "--from", filepath.Join(l.home, "connector"), "--interval", "150ms")
	cmd.Env, cmd.Stderr = append(os.Environ(), l.environ(theManager)...), log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Errorf("starting the manager of %s: %v", l.name, err)
		return false
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the process
	select {
	case err := <-ended:
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return true
		}
		t.Errorf("the manager of %s ended by itself: %v", l.name, err)
	case <-l.stop:
		_ = cmd.Process.Signal(os.Interrupt)
		if err := <-ended; err != nil {
			t.Errorf("the manager of %s ended with %v", l.name, err)
		}
	}
	return false
}

func (l *line) cluster() string {
	return l.connected.group + "/providers/Microsoft.ContainerService/managedClusters/" + l.name
}

func (l *line) linker(name string) string {
	return l.cluster() + "/providers/Microsoft.ServiceLinker/linkers/" + name
}
