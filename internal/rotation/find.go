package rotation

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// The nodes of a cluster are found with nothing but one of its masters: its API
// server knows them, and where that does not answer, the database of its etcd.

var securePort = regexp.MustCompile(`--secure-port=(\d+)`)

// apiPort is where an API server listens, by its manifest.
func apiPort(manifest []byte) string {
	if m := securePort.FindSubmatch(manifest); m != nil {
		return string(m[1])
	}
	return "6443" // the API server's own default
}

// readFile returns a file of a machine, for our memory alone.
func readFile(ctx context.Context, h Host, path string) ([]byte, error) {
	return h.Run(ctx, Script{Name: "read " + path, Text: `cat "$1"`, Args: []string{path}, Quiet: true})
}

// FindNodes asks the API server of a master for the nodes, with a credential made
// from the CA on that master.
func FindNodes(ctx context.Context, h Host, l Layout, connect Connect, now time.Time) ([]Node, error) {
	as, err := administrator(ctx, h, l, now)
	if err != nil {
		return nil, err
	}
	endpoints, err := Endpoints(ctx, h, l)
	if err != nil {
		return nil, err
	}
	var why error
	for _, endpoint := range endpoints {
		api, err := connect(endpoint, as)
		if err != nil {
			return nil, err
		}
		nodes, err := api.Nodes(ctx)
		if err == nil {
			return nodes, nil
		}
		why = errors.Join(why, fmt.Errorf("%s: %w", endpoint, err))
	}
	return nil, fault.New(fault.Unavailable, "NoAPIServer", "The API server of the SSH host does not answer, or not with a certificate that its CA vouches for.").Because(why).
		WithFix("repair it; or, if certificates have ended, run the same command with --force: it needs no API server")
}

// Endpoints are the addresses, host:port, at which the API server of a master may answer.
func Endpoints(ctx context.Context, h Host, l Layout) ([]string, error) {
	manifest, err := readFile(ctx, h, l.component("kube-apiserver").Pod)
	if err != nil {
		return nil, err
	}
	facts, err := h.Run(ctx, Script{Name: "look at the machine", Text: factsScript, Args: []string{baseDir}, Quiet: true})
	if err != nil {
		return nil, err
	}
	var out []string
	for _, address := range parseFacts(string(facts)).Addresses {
		out = append(out, net.JoinHostPort(address, apiPort(manifest)))
	}
	return out, nil
}

// Alive names the masters whose API server answers.
func Alive(ctx context.Context, h Host, o Observation, connect Connect) ([]string, error) {
	as, err := administrator(ctx, h, o.Layout, o.At)
	if err != nil {
		return nil, err
	}
	var alive []string
	for _, m := range o.masters() {
		api, err := connect(m.Endpoint, as)
		if err != nil {
			return nil, err
		}
		within, cancel := context.WithTimeout(ctx, 5*time.Second)
		if api.Ready(within) == nil {
			alive = append(alive, m.Name)
		}
		cancel()
	}
	return alive, nil
}

// administrator is a credential made from the cluster CA on a master.
func administrator(ctx context.Context, h Host, l Layout, now time.Time) (Credential, error) {
	root, err := readFile(ctx, h, l.rootFile(ClusterCA))
	if err != nil {
		return Credential{}, err
	}
	key, err := readFile(ctx, h, l.rootKey(ClusterCA))
	if err != nil {
		return Credential{}, err
	}
	s := &Succession{Old: root, OldKey: key, New: root, NewKey: key}
	as, err := s.credential(false, pkix.Name{CommonName: us, Organization: []string{"system:masters"}}, now)
	if err != nil {
		return Credential{}, fault.New(fault.Invalid, "BadCA", "The cluster CA of the SSH host cannot be used: %s.", err)
	}
	return as, nil
}

// NodesInEtcd is where the nodes stand in the database of etcd.
const NodesInEtcd = "/registry/minions/"

const chunk = 4 << 20 // what a script prints at most is twice that

// CopyDatabase writes the database file of a master's etcd, which need not run.
// It holds secrets.
func CopyDatabase(ctx context.Context, h Host, l Layout, w io.Writer) error {
	path := l.EtcdData + "/member/snap/db"
	out, err := h.Run(ctx, Script{Name: "look at " + path, Text: `stat -c %s "$1"`, Args: []string{path}, Quiet: true})
	if err != nil {
		return err
	}
	size, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		return fmt.Errorf("looking at %s: %w", path, err)
	}
	for at := int64(0); at*chunk < size; at++ {
		part, err := h.Run(ctx, Script{
			Name: "read " + path, Text: `dd if="$1" bs="$2" skip="$3" count=1 2>/dev/null`,
			Args: []string{path, strconv.Itoa(chunk), strconv.FormatInt(at, 10)}, Quiet: true,
		})
		if err != nil {
			return err
		}
		if _, err := w.Write(part); err != nil {
			return fmt.Errorf("keeping a part of %s: %w", path, err)
		}
	}
	return nil
}
