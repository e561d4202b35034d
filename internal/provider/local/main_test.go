package local_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/provider/local"
	"keyfleet.dev/keyfleet/internal/provider/local/namespace"
)

// The test program is also the first process of the nodes it starts, the agent
// inside them, and a server process that can be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "local-init":
			os.Exit(namespace.Init(os.Args[2:]))
		case "test-agent":
			testAgent()
		case "test-server":
			os.Exit(testServer(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

// port is the server's port in these tests; nothing listens on it outside of nodes.
const port = "8443"

// order is what a test asks of an agent in a node; reply is its answer.
type order struct {
	Shell string // command for /bin/sh
	Get   string // URL to get
	Exit  int    // exit status to end with; 0: go on
}

type reply struct {
	Out  string
	Fail bool
}

// testAgent connects to the server as an agent would, says which node it is,
// and does what it is told until the connection ends; then it connects again.
// On the identity endpoint's address it answers the host name.
func testAgent() {
	name, _ := os.Hostname()
	if l, err := net.Listen("tcp", namespace.Address+":80"); err == nil {
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) }))
	}
	for {
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			fmt.Fprintln(c, name)
			obey(c)
			c.Close()
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func obey(c net.Conn) {
	dec, enc := json.NewDecoder(c), json.NewEncoder(c)
	for {
		var o order
		if dec.Decode(&o) != nil {
			return
		}
		var r reply
		switch {
		case o.Exit != 0:
			os.Exit(o.Exit)
		case o.Get != "":
			resp, err := http.Get(o.Get)
			if r.Fail = err != nil; !r.Fail {
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				r.Out = string(b)
			}
		default:
			out, err := exec.Command("/bin/sh", "-c", o.Shell).CombinedOutput()
			r = reply{Out: strings.TrimSpace(string(out)), Fail: err != nil}
		}
		if enc.Encode(r) != nil {
			return
		}
	}
}

// testServer does one operation of the provider in a process of its own:
// DIR OPERATION NODE.
func testServer(args []string) int {
	p, err := newProvider(args[0])
	if err == nil {
		err = operate(context.Background(), p, args[1], args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func operate(ctx context.Context, p *local.Provider, operation, id string) error {
	spec := pool.NodeSpec{ID: id, OS: "linux", Token: "token-" + pool.Token(id), Hosts: []string{"node.keyfleet.internal"}}
	switch operation {
	case "start":
		return p.Start(ctx, spec)
	case "restart":
		return p.Restart(ctx, id)
	case "reimage":
		return p.Reimage(ctx, spec)
	case "stop":
		return p.Stop(ctx, id)
	}
	return errors.New("no such operation: " + operation)
}

func newProvider(dir string) (*local.Provider, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return local.New(local.Config{
		Dir: dir, Agent: self, AgentArgs: []string{"test-agent"}, Server: "https://node.keyfleet.internal:" + port, CA: []byte("CA"),
		InitEnv: initEnv(),
	})
}

// world is a data directory with a server's socket and a provider.
type world struct {
	*local.Provider
	t      *testing.T
	dir    string
	agents chan *remote
}

// remote is an agent that has connected.
type remote struct {
	t    *testing.T
	node string
	conn net.Conn
	dec  *json.Decoder
}

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

func newWorld(t *testing.T, dir string) *world {
	t.Helper()
	p, err := newProvider(dir)
	if err != nil {
		t.Fatal(err)
	}
	skipIfForbidden(t, p)
	w := &world{Provider: p, t: t, dir: dir, agents: make(chan *remote, 64)}
	w.listen()
	t.Cleanup(func() {
		if err := p.StopAll(context.Background()); err != nil {
			t.Errorf("stopping all nodes: %v", err)
		}
		nothingLeft(t, dir)
	})
	return w
}

// skipIfForbidden ends a test where this machine forbids what it is about, and says why.
func skipIfForbidden(t *testing.T, p *local.Provider) {
	t.Helper()
	check.Do(func() { checked = p.Check(context.Background()) })
	if e := fault.From(checked); e != nil && e.Code == "LocalNodesForbidden" {
		t.Skip(e)
	}
}

// One check is enough: the machine's rules do not change during the tests.
var (
	check   sync.Once
	checked error
)

// listen serves the socket until the test ends or the returned function is called.
func (w *world) listen() (stop func()) {
	w.t.Helper()
	l, err := local.ListenUnix(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	go func() { // ends when the listener is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				r := bufio.NewReader(c)
				name, err := r.ReadString('\n')
				if err != nil {
					c.Close()
					return
				}
				w.agents <- &remote{t: w.t, node: strings.TrimSpace(name), conn: c, dec: json.NewDecoder(r)}
			}()
		}
	}()
	w.t.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

// agent waits for the next connection of a node's agent.
func (w *world) agent(id string) *remote {
	w.t.Helper()
	late := time.After(patience)
	for {
		select {
		case r := <-w.agents:
			if r.node == id {
				return r
			}
			r.conn.Close() // of another node: it comes again
		case <-late:
			b, _ := os.ReadFile(filepath.Join(w.dir, "nodes", id, "console.log"))
			w.t.Fatalf("the agent of %s did not connect; its console:\n%s", id, b)
		}
	}
}

func (w *world) start(id string) *remote {
	w.t.Helper()
	if err := operate(w.t.Context(), w.Provider, "start", id); err != nil {
		w.t.Fatal(err)
	}
	return w.agent(id)
}

func (r *remote) ask(o order) (reply, error) {
	r.conn.SetDeadline(time.Now().Add(patience))
	if err := json.NewEncoder(r.conn).Encode(o); err != nil {
		return reply{}, err
	}
	var a reply
	err := r.dec.Decode(&a)
	return a, err
}

// sh runs a command in the node, which must succeed, and returns what it printed.
func (r *remote) sh(command string) string {
	r.t.Helper()
	a, err := r.ask(order{Shell: command})
	if err != nil || a.Fail {
		r.t.Fatalf("%s in the node: %v\n%s", command, err, a.Out)
	}
	return a.Out
}

// initPID is the number of a node's first process on this machine.
func (w *world) initPID(id string) int {
	w.t.Helper()
	pid, err := namespace.Folder(filepath.Join(w.dir, "nodes", id)).PID()
	if err != nil {
		w.t.Fatal(err)
	}
	return pid
}

// nothingLeft fails the test if a process or a mount of this machine knows the directory.
func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		cmdline, _ := os.ReadFile(p + "/cmdline")
		if strings.Contains(string(cmdline), dir+"/nodes/") {
			t.Errorf("%s is left: %q", p, cmdline)
		}
		mounts, _ := os.ReadFile(p + "/mountinfo")
		if strings.Contains(string(mounts), dir+"/nodes/") {
			t.Errorf("%s still has mounts of %s", p, dir)
		}
	}
	if left, _ := filepath.Glob(dir + "/nodes/*"); len(left) > 0 {
		t.Errorf("files are left: %v", left)
	}
}
