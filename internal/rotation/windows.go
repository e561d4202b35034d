package rotation

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Windows workers.
//
// Idea: a Windows node is a machine like any other, with other files and another
// shell. The files and what reads them are data of the layout (Layout.Windows);
// [Layout.on] is the layout as such a node sees it, so that planner and stages
// need no second rule. The shell is a dialect: scripts with the arguments and
// the answers of those for Linux, so that the steps of the engine are the same.
//
//	Linux     /bin/sh, systemd, openssl    keys are made there, trees come as a tar
//	Windows   PowerShell 5.1, services     all keys come along, trees come as lines of text
//
// What the kubelet made for itself (Renewed) is not replaced but moved away, and
// the kubelet asks for another. It is moved and not copied: one of these files is
// a link, and the kubelet refuses a file in its place.
//
// Nothing here resets the network of the node. That its kubelet may do so when it
// starts is in the hands of aks-engine's own kubeletstart.ps1: see the warnings.

// windowsOS is Node.OS of a Windows node.
const windowsOS = "windows"

// Windows is what a layout has on its Windows workers.
type Windows struct {
	Dir        string // private folder of all rotations; its parent is there
	Files      []File
	Components []Component // Name is that of the process, Unit that of the service
}

// on returns the layout as a node sees it. The files of a control plane stay in
// it: they tell which certificates can be issued anew.
func (l Layout) on(n Node) Layout {
	if n.OS != windowsOS || l.Windows == nil {
		return l
	}
	files := slices.Clone(l.Files)
	for i := range files {
		files[i].On = Masters
	}
	l.Files, l.Components = append(files, l.Windows.Files...), l.Windows.Components
	return l
}

// workerPrograms are the components that every node of the kind has.
func (l Layout) workerPrograms() []string {
	var out []string
	for _, c := range l.Components {
		if c.On == Everywhere {
			out = append(out, c.Name)
		}
	}
	return out
}

// CheckWindows refuses Windows nodes where the layout does not know them.
func CheckWindows(l Layout, nodes []Node) error {
	for _, n := range nodes {
		if n.OS != windowsOS {
			continue
		}
		if l.Windows == nil {
			return fault.New(fault.Invalid, "WindowsNode", "Node %s runs Windows, which is not known in clusters of the layout %s: it would be lost when the old CA retires.", n.Name, l.Name).
				WithFix("take it out of the cluster for the rotation, and let it join again afterwards")
		}
		if n.Master {
			return fault.New(fault.Invalid, "WindowsNode", "Node %s runs Windows and has a control plane, which cannot be.", n.Name)
		}
	}
	return nil
}

// fitWindows refuses a Windows node on which our scripts would fail.
func fitWindows(m Machine) error {
	for _, need := range []struct{ fact, what, fix string }{
		{"powershell-5.1", "runs a PowerShell older than 5.1", "install Windows Management Framework 5.1 there"},
		{"administrator", "lets us in, but not as an administrator", "log in as a user who is in its group Administrators"},
		{"icacls", "has no program icacls", "repair that Windows"},
	} {
		if !m.Facts.has(need.fact) {
			return fault.New(fault.Precondition, "MissingProgram", "%s %s.", m.Name, need.what).WithFix("%s", need.fix)
		}
	}
	return nil
}

// windows warns of what Windows nodes mean.
func (b *planner) windows() {
	var names []string
	for _, m := range b.o.Machines {
		if m.OS == windowsOS {
			names = append(names, m.Name)
		}
	}
	if len(names) == 0 {
		return
	}
	b.warn("Windows nodes: the steps there are untested.")
	b.warn("Windows nodes: aks-engine's own start script of the kubelet ends the containers of the node and makes its network anew each time the kubelet restarts, on %s, one after the other: keep replicas of their pods elsewhere.", words(names))
}

// dialect is how the machines of one operating system are spoken to. Its scripts
// take the same arguments and print the same lines in each.
type dialect struct {
	dir       string // of all rotations
	separator string

	facts, look, backUp, stage, place, placed, started, lock, release, clean string
}

// dialect is that of a node of the layout.
func (l Layout) dialect(n Node) dialect {
	if n.OS == windowsOS && l.Windows != nil {
		return dialect{
			dir: l.Windows.Dir, separator: `\`, facts: psFacts, look: psLook, backUp: psBackup, stage: psStage,
			place: psPlace, placed: psPlaced, started: psStarted, lock: psLock, release: psRelease, clean: psClean,
		}
	}
	return dialect{
		dir: baseDir, separator: "/", facts: factsScript, look: lookScript, backUp: backupScript, stage: stageScript,
		place: placeScript, placed: placedScript, started: startedScript, lock: lockScript, release: releaseScript, clean: cleanScript,
	}
}

// node finds a node of the plan.
func (e *Engine) node(name string) Node {
	for _, n := range e.Plan.Nodes {
		if n.Name == name {
			return n
		}
	}
	return Node{}
}

// on is the dialect of a machine, layoutOn the layout as it sees it.
func (e *Engine) on(node string) dialect      { return e.Layout.dialect(e.node(node)) }
func (e *Engine) layoutOn(node string) Layout { return e.Layout.on(e.node(node)) }

// dirOn is the folder of this rotation on a machine.
func (e *Engine) dirOn(node string) string {
	d := e.on(node)
	return d.dir + d.separator + e.Plan.Run
}

// packed is the input of the dialect's stage script.
func (e *Engine) packed(node string, t *trees) ([]byte, error) {
	if e.node(node).OS == windowsOS {
		return t.lines()
	}
	return t.tar.Bytes(), nil
}

// lines are the trees as lines of STAGE|PATH|CONTENT, in base64: a shell of
// Windows takes text from its standard input, and no bytes.
func (t *trees) lines() ([]byte, error) {
	if len(t.verbs) > 0 {
		return nil, fmt.Errorf("packing files for Windows: %q asks for a key that is made there", t.verbs[0])
	}
	var out bytes.Buffer
	for r := tar.NewReader(&t.tar); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out.Bytes(), nil
		}
		if err != nil {
			return nil, fmt.Errorf("packing files for Windows: %w", err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return nil, fmt.Errorf("packing files for Windows: %w", err)
		}
		stage, path := cutStage(h.Name)
		fmt.Fprintf(&out, "%s|%s|%s\n", stage, path, base64.StdEncoding.EncodeToString(content))
	}
}

// cutStage parts the name of a file in a tree, which begins with its stage.
func cutStage(name string) (stage, path string) {
	for _, s := range []Stage{Trusted, Switched, Retired} {
		if path, ok := strings.CutPrefix(name, s.String()); ok {
			return s.String(), path
		}
	}
	return "", name
}

// kept are the files that are backed up before anything changes: what is moved away
// is its own backup.
func (l Layout) kept(m Machine) []string {
	var out []string
	for _, f := range l.of(m.Master) {
		if !m.Files[f.Path].Absent && f.Holds != Renewed {
			out = append(out, f.Path)
		}
	}
	return out
}

// readOnce are the files that a component reads at its start and does not make.
func (l Layout) readOnce(c Component) []string {
	var out []string
	for _, p := range c.Once {
		if l.file(p).Holds != Renewed {
			out = append(out, p)
		}
	}
	return out
}

// restartServices restarts services of a Windows node one after the other. It does not
// finish when the connection is lost, as package remote cannot do that there.
func (e *Engine) restartServices(ctx context.Context, s Step) error {
	var services []string
	for _, name := range s.Components {
		c := e.layoutOn(s.Node).component(name)
		services = append(services, c.Name+":"+c.Unit)
	}
	limit := time.Duration(len(services)) * restartLimit
	_, err := e.change(ctx, s.Node, Script{Name: s.what(), Text: psRestart, Args: services, Timeout: limit})
	return err
}

// restartLimit is how long a service may take until it runs again. The script gives
// up at four fifths of it, so that its reason is heard.
const restartLimit = 5 * time.Minute
