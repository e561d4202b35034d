// Package namespace is a node made of Linux namespaces, seen from both sides:
// [Start] begins one, [Init] is the first process in it, [Find] and [Kill] deal
// with one that is there.
//
// Idea: a node is a process tree in its own mount, PID, UTS, network and IPC
// namespaces (and, for an ordinary user, a user namespace), on a root made of
// this machine's programs, read-only, and of the node's own folders. So the
// documented paths (/var/lib/waagent, /var/log/azure) and the documented
// address (169.254.169.254) are there to the letter, without an image and
// without a daemon, and nothing of this machine's network is touched: bytes for
// the server leave through a Unix socket. What is written outside the folders
// below is in memory and lasts until the node's next start.
//
//	DIR/nodes/ID/lock        held (flock) exactly while the node's first process lives
//	            /pid         "PID STARTTIME\n" of that process, as this machine counts
//	            /node.json   what to start: [Node]
//	            /console.log what the first process and the agent print
//	            /waagent  -> /var/lib/waagent
//	            /log      -> /var/log/azure
//	            /tmp      -> /tmp
//	            /root        mount point of the node's root, empty for everybody else
//	DIR/run/server.sock      the server      -> /run/keyfleet/server/server.sock
//
// Invariant: the lock is taken before the first process exists and handed to
// it, so "lock free" means "no process of this node lives", whoever died when.
// Every step before that is repeatable; a node that was killed half-way is
// simply started again.
//
// Consequence for the operator: the server may die and come back, the nodes go
// on and are found again; `ls DIR/nodes` is the list of nodes. As root the
// namespaces keep nodes apart but are no jail: a node runs what its pool asks
// for, with most capabilities of this machine's root taken away.
package namespace

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"keyfleet.dev/keyfleet/internal/effect"
)

// Address is where a node's identity endpoint answers, inside the node only.
const Address = "169.254.169.254"

// SocketName is the name of the server's socket in [Node.SocketDir].
const SocketName = "server.sock"

// Paths inside a node.
const (
	agentPath  = "/run/keyfleet/keyfleet-agent"
	socketPath = "/run/keyfleet/server/" + SocketName
	bootIDPath = "/run/keyfleet/boot_id"
)

// Node is what a node is started from; it is kept as node.json so that a
// restart needs nobody's memory. It holds no secret.
type Node struct {
	ID        string   `json:"id"`                 // also the host name
	Agent     string   `json:"agent"`              // path of the keyfleet-agent program on this machine
	Args      []string `json:"args"`               // arguments of the agent inside the node
	Env       []string `json:"env,omitempty"`      // added to the agent's environment
	SocketDir string   `json:"socketDir"`          // folder of the server's socket, on this machine
	Ports     []int    `json:"ports"`              // ports of 127.0.0.1 inside the node that lead to the server
	Hosts     []string `json:"hosts"`              // names that lead to the server from the first moment
	HostRoot  bool     `json:"hostRoot,omitempty"` // made by root: no user namespace
}

// Folder is a node's folder on this machine, DIR/nodes/ID.
type Folder string

// The parts of a node's folder.
func (f Folder) path(name string) string { return filepath.Join(string(f), name) }

// WAAgent is what the node sees as /var/lib/waagent.
func (f Folder) WAAgent() string { return f.path("waagent") }

// Log is what the node sees as /var/log/azure.
func (f Folder) Log() string { return f.path("log") }

// Console is the file that the node's first process and its agent print to.
func (f Folder) Console() string { return f.path("console.log") }

// ID is the node's id, the folder's name.
func (f Folder) ID() string { return filepath.Base(string(f)) }

var idForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// ValidID reports whether id can be the name of a folder and of a host.
func ValidID(id string) bool { return idForm.MatchString(id) }

// Read returns what the node was last started from.
func (f Folder) Read() (Node, error) {
	var n Node
	b, err := os.ReadFile(f.path("node.json"))
	if err != nil {
		return n, fmt.Errorf("reading the node's description: %w", err)
	}
	if err := json.Unmarshal(b, &n); err != nil {
		return n, fmt.Errorf("reading %s: %w", f.path("node.json"), err)
	}
	return n, nil
}

// Prepare makes the folder and its parts, and writes node.json. It may be
// repeated at any time while the node is not running.
func (f Folder) Prepare(n Node) error {
	for _, d := range []struct {
		name string
		mode os.FileMode
	}{{"", 0o700}, {"waagent", 0o755}, {"log", 0o755}, {"tmp", 0o777 | os.ModeSticky}, {"root", 0o755}} {
		err := effect.Do("make node folder "+d.name, func() error {
			if err := os.MkdirAll(f.path(d.name), 0o700); err != nil {
				return err
			}
			return os.Chmod(f.path(d.name), d.mode)
		})
		if err != nil {
			return fmt.Errorf("making the node's folder: %w", err)
		}
	}
	b, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return fmt.Errorf("describing the node: %w", err)
	}
	return WriteFile(f.path("node.json"), b, 0o600)
}

// WriteFile replaces a file as a whole: readers see the old or the new content.
func WriteFile(path string, b []byte, mode os.FileMode) error {
	tmp := path + "." + rand.Text()[:8] + ".tmp"
	return effect.Do("write "+filepath.Base(path), func() error {
		if err := os.WriteFile(tmp, b, mode); err != nil {
			return err
		}
		if err := os.Rename(tmp, path); err != nil {
			_ = os.Remove(tmp)
			return err
		}
		return nil
	})
}
