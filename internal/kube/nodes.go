package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	coordination "k8s.io/api/coordination/v1"
	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// defaultPort is where an API server listens that is not among the endpoints of
// the service "kubernetes", as one that is down.
const defaultPort = 6443

// Nodes implements rotation.API.
func (a *api) Nodes(ctx context.Context) ([]rotation.Node, error) {
	nodes, err := ask(ctx, a, "listing nodes", func(ctx context.Context) ([]core.Node, error) {
		return list(ctx, metav1.ListOptions{}, a.typed.CoreV1().Nodes().List, func(l *core.NodeList) []core.Node { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	ports, err := a.ports(ctx)
	if err != nil {
		return nil, err
	}
	leases, err := ask(ctx, a, "listing the leases of nodes", func(ctx context.Context) ([]coordination.Lease, error) {
		return list(ctx, metav1.ListOptions{}, a.typed.CoordinationV1().Leases(core.NamespaceNodeLease).List, func(l *coordination.LeaseList) []coordination.Lease { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	seen := map[string]time.Time{}
	for _, l := range leases {
		if l.Spec.RenewTime != nil {
			seen[l.Name] = l.Spec.RenewTime.Time
		}
	}
	var out []rotation.Node
	for i := range nodes {
		n := node(&nodes[i], ports)
		n.Seen = seen[n.Name]
		out = append(out, n)
	}
	return out, nil
}

// ReachKubelet implements rotation.API.
func (a *api) ReachKubelet(ctx context.Context, node string) error {
	_, err := ask(ctx, a, "asking the kubelet of "+node, func(ctx context.Context) ([]byte, error) {
		return a.typed.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix("healthz").Do(ctx).Raw()
	})
	return err
}

// ports says on which port each API server listens, by its IP.
func (a *api) ports(ctx context.Context) (map[string]int, error) {
	slices, err := ask(ctx, a, "listing the endpoints of the API servers", func(ctx context.Context) ([]discovery.EndpointSlice, error) {
		o := metav1.ListOptions{LabelSelector: discovery.LabelServiceName + "=kubernetes"}
		return list(ctx, o, a.typed.DiscoveryV1().EndpointSlices("default").List, func(l *discovery.EndpointSliceList) []discovery.EndpointSlice { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	ports := map[string]int{}
	for _, s := range slices {
		if len(s.Ports) == 0 || s.Ports[0].Port == nil {
			continue
		}
		for _, e := range s.Endpoints {
			for _, ip := range e.Addresses {
				ports[ip] = int(*s.Ports[0].Port)
			}
		}
	}
	return ports, nil
}

// ParseNode reads a node as the API server keeps it in etcd: in protobuf, inside
// an envelope, behind four bytes.
func ParseNode(stored []byte) (rotation.Node, error) {
	kind, wire := new(runtime.Unknown), []byte("k8s\x00")
	if !bytes.HasPrefix(stored, wire) {
		return rotation.Node{}, errors.New("reading a node in etcd: it is encrypted, or of a form that we do not know")
	}
	if err := kind.Unmarshal(stored[len(wire):]); err != nil {
		return rotation.Node{}, fmt.Errorf("reading a node in etcd: %w", err)
	}
	var n core.Node
	if err := n.Unmarshal(kind.Raw); err != nil {
		return rotation.Node{}, fmt.Errorf("reading a node in etcd: %w", err)
	}
	return node(&n, nil), nil
}

func node(n *core.Node, ports map[string]int) rotation.Node {
	out := rotation.Node{Name: n.Name, Master: master(n), OS: n.Status.NodeInfo.OperatingSystem, Version: n.Status.NodeInfo.KubeletVersion}
	if out.OS == "" { // its kubelet has not said anything yet
		out.OS = n.Labels[core.LabelOSStable]
	}
	for _, address := range n.Status.Addresses {
		if address.Type == core.NodeInternalIP {
			out.Address = address.Address
			break
		}
	}
	for _, c := range n.Status.Conditions {
		if c.Type == core.NodeReady {
			out.Ready = c.Status == core.ConditionTrue
		}
	}
	if out.Master && out.Address != "" {
		port, ok := ports[out.Address]
		if !ok {
			port = defaultPort
		}
		out.Endpoint = net.JoinHostPort(out.Address, strconv.Itoa(port))
	}
	return out
}

// master knows the labels of kubeadm, of its former versions, and the names that
// AKS Engine gives.
func master(n *core.Node) bool {
	_, now := n.Labels["node-role.kubernetes.io/control-plane"]
	_, formerly := n.Labels["node-role.kubernetes.io/master"]
	return now || formerly || strings.HasPrefix(n.Name, "k8s-master")
}
