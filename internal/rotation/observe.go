package rotation

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// Observation is what a look at a cluster found. It holds no secret.
type Observation struct {
	At       time.Time
	Layout   Layout
	Machines []Machine // masters first, by name
}

// Machine is a node and what is on it.
type Machine struct {
	Node
	Files map[string]FileState
	Facts Facts
}

// FileState is a file as it was found.
type FileState struct {
	Path    string
	Absent  bool
	Link    string // what it leads to, of a link
	Mode    string // octal
	Owner   string // uid:gid
	Changed int64  // seconds since 1970
	Hash    string // SHA-256, in hex
	Content []byte // of files without secrets; kubeconfigs without their key
}

// Facts are what a machine can do.
type Facts struct {
	Now       time.Time
	Forward   bool // it forwards packets
	Tools     []string
	FreeKiB   int64
	Addresses []string
	Runs      []string // rotations that are not finished: their files and a copy of their journal are there
}

// has reports whether a program is there.
func (f Facts) has(tool string) bool { return slices.Contains(f.Tools, tool) }

// masters returns the machines with a control plane.
func (o Observation) masters() []Machine {
	var out []Machine
	for _, m := range o.Machines {
		if m.Master {
			out = append(out, m)
		}
	}
	return out
}

// authorities returns the PKIs that the cluster has, in order.
func (o Observation) authorities() []Authority {
	var out []Authority
	for _, f := range o.Layout.Files {
		if f.Holds == Roots && !o.masters()[0].Files[f.Path].Absent {
			out = append(out, f.Authority)
		}
	}
	return out
}

// machine finds a machine by name.
func (o Observation) machine(name string) Machine {
	for _, m := range o.Machines {
		if m.Name == name {
			return m
		}
	}
	return Machine{}
}

// Detect tells which layout a master has.
func Detect(ctx context.Context, h Host, layouts []Layout) (Layout, error) {
	for _, l := range layouts {
		found, err := look(ctx, h, l.dialect(Node{}), l.Marks, func(string) string { return "none" })
		if err != nil {
			return Layout{}, err
		}
		there := true
		for _, m := range l.Marks {
			there = there && !found[m].Absent
		}
		if there {
			return l, nil
		}
	}
	var known []string
	for _, l := range layouts {
		known = append(known, fmt.Sprintf("%s (%s)", l.Name, strings.Join(l.Marks, ", ")))
	}
	return Layout{}, fault.New(fault.NotFound, "UnknownLayout", "%s is not a control plane node of a layout that we know: %s.", h.Name(), strings.Join(known, "; ")).
		WithFix("give a control plane node as --ssh-host")
}

// Observe looks at every machine.
func Observe(ctx context.Context, l Layout, nodes []Node, hosts map[string]Host, now time.Time) (Observation, error) {
	o := Observation{At: now, Layout: l}
	if err := CheckWindows(l, nodes); err != nil {
		return o, err
	}
	for _, n := range nodes {
		h := hosts[n.Name]
		if h == nil {
			return o, fault.New(fault.Unavailable, "", "Node %s cannot be reached.", n.Name)
		}
		m, err := observe(ctx, l, n, h)
		if err != nil {
			return o, fmt.Errorf("looking at %s: %w", n.Name, err)
		}
		o.Machines = append(o.Machines, m)
	}
	slices.SortStableFunc(o.Machines, func(a, b Machine) int {
		if a.Master != b.Master {
			if a.Master {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return o, nil
}

func observe(ctx context.Context, l Layout, n Node, h Host) (Machine, error) {
	m := Machine{Node: n}
	l = l.on(n)
	d := l.dialect(n)
	facts, err := h.Run(ctx, Script{Name: "look at the machine", Text: d.facts, Args: []string{d.dir}, Quiet: true})
	if err != nil {
		return m, err
	}
	m.Facts = parseFacts(string(facts))
	var paths []string
	for _, f := range l.of(n.Master) {
		paths = append(paths, f.Path)
	}
	if m.Files, err = look(ctx, h, d, paths, func(p string) string { return howToLook(l.file(p)) }); err != nil {
		return m, err
	}
	for path, f := range m.Files {
		if l.file(path).Holds == Kubeconfig && !f.Absent {
			if f.Content, err = withoutKey(f.Content); err != nil {
				return m, fmt.Errorf("reading %s: %w", path, err)
			}
			m.Files[path] = f
		}
	}
	if n.Master {
		m.Endpoint = net.JoinHostPort(n.Address, apiPort(m.Files[l.component("kube-apiserver").Pod].Content))
	}
	return m, nil
}

// withoutKey makes sure that a kubeconfig has lost its key, however it was
// written: what is observed is kept in clear.
func withoutKey(text []byte) ([]byte, error) {
	k, err := parseKubeconfig(text)
	if err != nil {
		return nil, err
	}
	user, err := k.part("users", "user")
	if err != nil {
		return nil, err
	}
	if key, _ := user["client-key-data"].(string); key == "" {
		return text, nil
	}
	user["client-key-data"] = ""
	return yaml.Marshal(k.doc)
}

// howToLook says how lookScript shows a file.
func howToLook(f File) string {
	switch f.Holds {
	case Roots, IssuerCert, LeafCert, SelfCert, TokenPublic, Manifest:
		return "plain"
	case KubeletPair, Renewed:
		if f.Pair == "" {
			return "cert"
		}
	case Kubeconfig:
		return "config"
	}
	return "none"
}

func look(ctx context.Context, h Host, d dialect, paths []string, how func(string) string) (map[string]FileState, error) {
	args := make([]string, len(paths))
	for i, p := range paths {
		args[i] = how(p) + ":" + p
	}
	out, err := h.Run(ctx, Script{Name: "look at files", Text: d.look, Args: args, Quiet: true})
	if err != nil {
		return nil, err
	}
	return parseLook(string(out))
}

// parseLook reads what lookScript printed.
func parseLook(out string) (map[string]FileState, error) {
	files := map[string]FileState{}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		f := strings.Split(line, "|")
		if len(f) != 9 {
			return nil, fmt.Errorf("looking at files: %q is not a line of the script", line)
		}
		s := FileState{Path: f[0], Absent: f[1] == "-", Mode: f[2], Owner: f[3], Link: f[4], Hash: f[6]}
		if s.Absent {
			files[s.Path] = s
			continue
		}
		var err error
		if s.Changed, err = strconv.ParseInt(f[5], 10, 64); err != nil {
			return nil, fmt.Errorf("looking at %s: %w", s.Path, err)
		}
		if s.Content, err = base64.StdEncoding.DecodeString(f[7]); err != nil {
			return nil, fmt.Errorf("looking at %s: %w", s.Path, err)
		}
		files[s.Path] = s
	}
	return files, nil
}

func parseFacts(out string) Facts {
	var f Facts
	for _, line := range strings.Split(out, "\n") {
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "now":
			if n, err := strconv.ParseInt(value, 10, 64); err == nil {
				f.Now = time.Unix(n, 0)
			}
		case "forward":
			f.Forward = value == "1"
		case "tool":
			f.Tools = append(f.Tools, value)
		case "free":
			f.FreeKiB, _ = strconv.ParseInt(value, 10, 64)
		case "addresses":
			f.Addresses = strings.Fields(value)
		case "run":
			f.Runs = append(f.Runs, value)
		}
	}
	return f
}

// certificate returns the certificate that a file carries: the first of a PEM
// text, or the client's of a kubeconfig; nil if it carries none.
func (l Layout) certificate(f FileState) (*x509.Certificate, error) {
	text := f.Content
	if l.file(f.Path).Holds == Kubeconfig {
		k, err := parseKubeconfig(f.Content)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", f.Path, err)
		}
		if text = k.clientCert; text == nil {
			return nil, nil
		}
	}
	chain, err := pki.ParseChain(text)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", f.Path, err)
	}
	return chain[0], nil
}

// kubeconfig is a kubeconfig with one cluster and one user, as kubeadm writes them.
type kubeconfig struct {
	doc        map[string]any
	server     string
	ca         []byte // PEM
	clientCert []byte // PEM; nil: it names a file instead
}

func parseKubeconfig(text []byte) (kubeconfig, error) {
	var k kubeconfig
	if err := yaml.Unmarshal(text, &k.doc); err != nil {
		return k, fmt.Errorf("it is not YAML: %w", err)
	}
	cluster, err := k.part("clusters", "cluster")
	if err != nil {
		return k, err
	}
	user, err := k.part("users", "user")
	if err != nil {
		return k, err
	}
	for _, secret := range []string{"token", "password", "exec", "auth-provider"} {
		if _, has := user[secret]; has {
			return k, fmt.Errorf("its user logs in by %s, and we know kubeconfigs with certificates", secret)
		}
	}
	k.server, _ = cluster["server"].(string)
	if k.ca, err = base64.StdEncoding.DecodeString(text64(cluster["certificate-authority-data"])); err != nil {
		return k, fmt.Errorf("certificate-authority-data: %w", err)
	}
	if data := text64(user["client-certificate-data"]); data != "" {
		if k.clientCert, err = base64.StdEncoding.DecodeString(data); err != nil {
			return k, fmt.Errorf("client-certificate-data: %w", err)
		}
	}
	return k, nil
}

func text64(v any) string { s, _ := v.(string); return s }

// part returns the one element of a list of named things.
func (k kubeconfig) part(list, inner string) (map[string]any, error) {
	all, _ := k.doc[list].([]any)
	if len(all) != 1 {
		return nil, fmt.Errorf("it has %d %s, and we know kubeconfigs with one", len(all), list)
	}
	named, _ := all[0].(map[string]any)
	part, ok := named[inner].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("%s[0] has no %s", list, inner)
	}
	return part, nil
}

// with returns the kubeconfig with another CA and, where it embeds one, another
// client certificate; without a key, that is left to be filled in on the machine.
func (k kubeconfig) with(ca, clientCert, clientKey []byte) ([]byte, error) {
	cluster, err := k.part("clusters", "cluster")
	if err != nil {
		return nil, err
	}
	cluster["certificate-authority-data"] = base64.StdEncoding.EncodeToString(ca)
	if k.clientCert != nil {
		user, err := k.part("users", "user")
		if err != nil {
			return nil, err
		}
		user["client-certificate-data"] = base64.StdEncoding.EncodeToString(clientCert)
		user["client-key-data"] = base64.StdEncoding.EncodeToString(clientKey)
	}
	return yaml.Marshal(k.doc)
}

// parseInfo reads the kubeconfig of cluster-info, which has a cluster and no user.
func parseInfo(text []byte) (kubeconfig, error) {
	var k kubeconfig
	if err := yaml.Unmarshal(text, &k.doc); err != nil {
		return k, fmt.Errorf("reading cluster-info: it is not YAML: %w", err)
	}
	_, err := k.part("clusters", "cluster")
	return k, err
}
