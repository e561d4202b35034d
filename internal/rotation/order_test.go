package rotation

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// bare is a host that has all programs and no file.
type bare string

func (b bare) Name() string { return string(b) }

func (b bare) Run(_ context.Context, s Script) ([]byte, error) {
	if s.Text == factsScript {
		return []byte("now=1700000000\nforward=1\nfree=1000000\ntool=openssl\ntool=sha256sum\ntool=base64\ntool=tar\ntool=curl\ntool=iptables\n"), nil
	}
	var out strings.Builder
	for _, arg := range s.Args {
		_, path, _ := strings.Cut(arg, ":")
		fmt.Fprintf(&out, "%s|-|||||||\n", path)
	}
	return []byte(out.String()), nil
}

func (b bare) Put(context.Context, string, io.Reader, fs.FileMode) error { return nil }

// TestOrderOfNodesIsOurs: in whatever order the API lists the nodes, a plan goes
// through them in the same: masters before workers, by name.
func TestOrderOfNodesIsOurs(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	nodes := threeMastersOf(t)
	hosts := map[string]Host{}
	for _, n := range nodes {
		hosts[n.Name] = bare(n.Name)
	}
	var want Plan
	orders := 0
	permute(nodes, func(order []Node) {
		o, err := Observe(t.Context(), Kubeadm(), order, hosts, now)
		if err != nil {
			t.Fatal(err)
		}
		for i := range o.Machines { // what the hosts of this test do not have
			for p, f := range o.Machines[i].Files {
				l := Kubeadm().file(p)
				f.Absent = l.Added || l.Optional
				o.Machines[i].Files[p] = f
			}
		}
		p, err := MakePlan(o, Everything(), "run1")
		if err != nil {
			t.Fatal(err)
		}
		if orders++; orders == 1 {
			want = p
		}
		if !reflect.DeepEqual(p, want) {
			t.Errorf("listed as %v, the plan is another", names(order))
		}
	})
	if got := names(want.Nodes); orders != 24 || !slices.Equal(got, []string{"master-0", "master-1", "master-2", "worker-0"}) {
		t.Errorf("of %d orders the plan's is %v", orders, got)
	}
}

// threeMastersOf are the nodes of threeMasters.
func threeMastersOf(t *testing.T) []Node {
	t.Helper()
	var out []Node
	for _, m := range threeMasters(t).Machines {
		out = append(out, m.Node)
	}
	return out
}

func names(nodes []Node) []string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return out
}

// permute calls f with every order of the nodes.
func permute(nodes []Node, f func([]Node)) {
	var place func(done, left []Node)
	place = func(done, left []Node) {
		if len(left) == 0 {
			f(slices.Clone(done))
		}
		for i := range left {
			place(append(slices.Clone(done), left[i]), append(slices.Clone(left[:i]), left[i+1:]...))
		}
	}
	place(nil, nodes)
}
