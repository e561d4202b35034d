package rotation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Who still comes with a certificate of the old CA is in the audit log of the API
// servers, if they keep one: since Kubernetes 1.32 it names the certificate of a
// caller by its SHA-256 ("authentication.kubernetes.io/credential-id"). All that
// is not one of the new is an old one.

// seenFor is how long a client counts as one that uses the old after it did. One that
// calls more seldom is not noticed.
const seenFor = time.Minute

var auditPath = regexp.MustCompile(`--audit-log-path=([^\s"',\]]+)`)

// auditLog is where an API server keeps its audit log, by its manifest; "" if nowhere.
func auditLog(manifest []byte) string {
	if m := auditPath.FindSubmatch(manifest); m != nil && string(m[1]) != "-" {
		return string(m[1])
	}
	return ""
}

// sighting is when somebody was last seen with a certificate.
type sighting struct {
	user string
	at   time.Time
}

// parseAudit reads what auditScript printed: by the hash of the certificate.
func parseAudit(out string) (map[string]sighting, error) {
	seen := map[string]sighting{}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if line == "" {
			continue
		}
		hash, rest, _ := strings.Cut(line, "|")
		user, when, ok := strings.Cut(rest, "|")
		if !ok {
			return nil, fmt.Errorf("reading the audit log: %q is not a line of the script", line)
		}
		at, err := time.Parse(time.RFC3339Nano, when)
		if err != nil {
			return nil, fmt.Errorf("reading the audit log: %w", err)
		}
		if at.After(seen[hash].at) {
			seen[hash] = sighting{user, at}
		}
	}
	return seen, nil
}

// audited reports whether any API server keeps an audit log.
func (o Observation) audited() bool {
	return slices.ContainsFunc(o.masters(), func(m Machine) bool { return auditLog(o.manifest(m)) != "" })
}

func (o Observation) manifest(m Machine) []byte {
	return m.Files[o.Layout.component("kube-apiserver").Pod].Content
}

// oldClients names those who were seen with a certificate of the old CA since a moment.
func (e *Engine) oldClients(ctx context.Context, api API, since time.Time) ([]string, error) {
	if !e.Plan.Scope.Cluster || !e.Observed.audited() {
		return nil, nil
	}
	fresh, err := e.freshCerts(ctx, api)
	if err != nil {
		return nil, err
	}
	users := map[string]bool{}
	for _, m := range e.Observed.masters() {
		path := auditLog(e.Observed.manifest(m))
		if path == "" {
			continue
		}
		out, err := e.Hosts[m.Name].Run(ctx, Script{Name: "look at the audit log", Text: auditScript, Args: []string{path}, Quiet: true})
		if err != nil {
			return nil, err
		}
		seen, err := parseAudit(string(out))
		if err != nil {
			return nil, err
		}
		for hash, s := range seen {
			if !fresh[hash] && s.at.After(since) && s.user != us && s.user != canaryName {
				users[s.user+" (a client certificate)"] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(users)), nil
}

// freshCerts are the hashes of the certificates that are on the machines now, of
// those that the controller manager has signed lately, and of those that were renewed
// for others.
func (e *Engine) freshCerts(ctx context.Context, api API) (map[string]bool, error) {
	fresh := map[string]bool{}
	add := func(der []byte) {
		sum := sha256.Sum256(der)
		fresh[hex.EncodeToString(sum[:])] = true
	}
	now, err := Observe(ctx, e.Layout, e.Plan.Nodes, e.Hosts, e.Now())
	if err != nil {
		return nil, err
	}
	for _, m := range now.Machines {
		l := e.Layout.on(m.Node)
		for _, f := range l.of(m.Master) {
			if m.Files[f.Path].Absent || f.Holds != LeafCert && f.Holds != Kubeconfig && f.Holds != KubeletPair {
				continue
			}
			cert, err := l.certificate(m.Files[f.Path])
			if err != nil {
				return nil, err
			}
			if cert != nil {
				add(cert.Raw)
			}
		}
	}
	var others [][]byte
	if _, err := e.Journal.Get(renewedValue, &others); err != nil {
		return nil, err
	}
	for _, der := range others {
		add(der)
	}
	signed, err := api.Signed(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range signed {
		if b, _ := pem.Decode(s.PEM); b != nil && s.At.After(e.material.Made) {
			add(b.Bytes)
		}
	}
	return fresh, nil
}
