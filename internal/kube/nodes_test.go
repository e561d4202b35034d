package kube

import (
	"bytes"
	"testing"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// stored is a node as an API server writes it to etcd.
func stored(t testing.TB) []byte {
	t.Helper()
	n := &core.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: "master-0", Labels: map[string]string{"node-role.kubernetes.io/control-plane": ""}},
		Status: core.NodeStatus{
			NodeInfo:  core.NodeSystemInfo{OperatingSystem: "linux"},
			Addresses: []core.NodeAddress{{Type: core.NodeHostName, Address: "master-0"}, {Type: core.NodeInternalIP, Address: "10.0.0.10"}},
		},
	}
	scheme := runtime.NewScheme()
	if err := core.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := protobuf.NewSerializer(scheme, scheme).Encode(n, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestNodeInEtcd(t *testing.T) {
	n, err := ParseNode(stored(t))
	if err != nil || n.Name != "master-0" || !n.Master || n.Address != "10.0.0.10" || n.OS != "linux" {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestNodeThatIsEncrypted(t *testing.T) {
	if _, err := ParseNode([]byte("k8s:enc:aescbc:v1:key1:xxxx")); err == nil {
		t.Error("it is read")
	}
}

func FuzzNodeInEtcd(f *testing.F) {
	f.Add(stored(f))
	f.Add([]byte("k8s\x00"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := ParseNode(text); err != nil && len(err.Error()) > 2000 {
			t.Errorf("the error repeats the input: %d bytes", len(err.Error()))
		}
	})
}
