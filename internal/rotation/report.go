package rotation

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Certificate is one that was in use, as a report names it.
type Certificate struct {
	Serial   string    `json:"serial"` // in hex
	Issuer   string    `json:"issuer"` // its common name
	NotAfter time.Time `json:"notAfter"`
}

// Change is what became of the certificate of one file.
type Change struct {
	Node   string       `json:"node"`
	File   string       `json:"file"`
	Before *Certificate `json:"before,omitempty"`
	After  *Certificate `json:"after,omitempty"`
}

// Same reports whether the certificate is the one from before.
func (c Change) Same() bool {
	return c.Before != nil && c.After != nil && c.Before.Serial == c.After.Serial && c.Before.Issuer == c.After.Issuer
}

// Compare lists the certificates of all machines before and after.
func Compare(before, after Observation) ([]Change, error) {
	var out []Change
	for _, m := range before.Machines {
		now := after.machine(m.Name)
		l := before.Layout.on(m.Node)
		for _, f := range l.of(m.Master) {
			switch {
			case slices.Contains([]Holds{Roots, LeafCert, SelfCert, Kubeconfig, KubeletPair}, f.Holds), f.Holds == Renewed && f.Pair == "":
			default:
				continue
			}
			c := Change{Node: m.Name, File: f.Path}
			var err error
			if c.Before, err = l.describe(m.Files[f.Path]); err != nil {
				return nil, err
			}
			if c.After, err = l.describe(now.Files[f.Path]); err != nil {
				return nil, err
			}
			if c.Before != nil || c.After != nil {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

// describe returns what a file carries; nil if that is no certificate.
func (l Layout) describe(f FileState) (*Certificate, error) {
	if f.Absent || f.Path == "" {
		return nil, nil
	}
	cert, err := l.certificate(f)
	if err != nil || cert == nil {
		return nil, err
	}
	return &Certificate{Serial: serial(cert), Issuer: cert.Issuer.CommonName, NotAfter: cert.NotAfter}, nil
}

func serial(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }

// Proofs returns what a run has proven to be refused.
func (e *Engine) Proofs() ([]string, error) {
	var out []string
	_, err := e.Journal.Get(proofsValue, &out)
	return out, err
}

// proven keeps what the step that proves refusals has shown.
func (e *Engine) proven() error {
	var masters, all []string
	for _, m := range e.Observed.masters() {
		masters = append(masters, m.Name)
	}
	for _, n := range e.Plan.Nodes {
		all = append(all, n.Name)
	}
	renewed := func(a Authority) bool { s := e.material.Authorities[a]; return s != nil && s.renewed() }
	var out []string
	if renewed(ClusterCA) {
		out = append(out,
			"a certificate of the old cluster CA is refused by the API servers of "+strings.Join(masters, ", "),
			"a certificate of the old cluster CA is refused by the kubelets of "+strings.Join(all, ", "))
	}
	if renewed(FrontProxyCA) {
		out = append(out, "a front proxy with a certificate of the old CA is refused by the API servers of "+strings.Join(masters, ", "))
	}
	if renewed(e.Layout.EtcdBy) {
		out = append(out, "a client with a certificate of the old CA is refused by etcd on "+strings.Join(masters, ", "))
	}
	if e.Plan.Scope.Tokens {
		out = append(out, "a token signed with the old key is refused by the API servers of "+strings.Join(masters, ", "))
	}
	return e.Journal.Set(proofsValue, out)
}
