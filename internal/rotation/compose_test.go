package rotation

import (
	"archive/tar"
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/pki"
)

// pkiOf is a PKI of a cluster, as a test made it.
type pkiOf struct {
	roots, keys map[Authority][]byte
}

func newPKI(t *testing.T) pkiOf {
	t.Helper()
	p := pkiOf{map[Authority][]byte{}, map[Authority][]byte{}}
	for _, a := range []Authority{ClusterCA, EtcdCA, FrontProxyCA} {
		key, err := pki.NewKey(pki.P256)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: string(a)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		p.roots[a] = pki.EncodeChain(der)
		if p.keys[a], err = pki.EncodeKey(key); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// leaf is a certificate of an authority, and its key.
func (p pkiOf) leaf(t *testing.T, a Authority, name string) (cert, key []byte) {
	t.Helper()
	s := &Succession{Old: p.roots[a], OldKey: p.keys[a], New: p.roots[a], NewKey: p.keys[a]}
	c, err := s.credential(false, pkix.Name{CommonName: name, Organization: []string{"o"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return c.Cert, c.Key
}

// master is a machine with everything that the layout names.
func master(t *testing.T, l Layout, p pkiOf) Machine {
	t.Helper()
	m := Machine{Node: Node{Name: "master-0", Address: "10.0.0.10", Master: true, OS: "linux"}, Files: map[string]FileState{}}
	tokens, err := pki.NewKey(pki.RSA2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := encodePublic(tokens.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range l.of(true) {
		s := FileState{Path: f.Path, Absent: f.Added}
		switch f.Holds {
		case Roots:
			s.Content = p.roots[f.Authority]
		case SelfCert:
			s.Content, _ = p.leaf(t, ClusterCA, "worker") // who signed it is no matter
		case LeafCert:
			s.Content, _ = p.leaf(t, f.Authority, f.Path)
		case KubeletPair:
			s.Content, _ = p.leaf(t, f.Authority, "system:node:master-0")
			s.Link = "/var/lib/kubelet/pki/kubelet-client-2026.pem"
		case TokenPublic:
			s.Content = public
		case Kubeconfig:
			s.Content = kubeconfigText(t, p, f.Path)
		case Manifest:
			s.Content = []byte("apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\nspec:\n  containers:\n  - command:\n    - x\n    - --cluster-signing-cert-file=/etc/kubernetes/pki/ca.crt\n    - --cluster-signing-key-file=/etc/kubernetes/pki/ca.key\n    name: x\n")
		}
		m.Files[f.Path] = s
	}
	return m
}

// present is what a rotation reads of the PKI.
func (p pkiOf) present(t *testing.T, l Layout, s Scope, m Machine) present {
	t.Helper()
	_, tokens := p.leaf(t, ClusterCA, "tokens")
	was := present{roots: map[Authority][]byte{}, keys: map[Authority][]byte{}, holders: map[Authority]Pair{}, shared: map[string]*x509.Certificate{}, sharedKeys: map[string][]byte{}, tokenKey: tokens}
	was.tokenPublic = m.Files[l.find(TokenPublic, "")].Content
	for _, f := range l.Files {
		if f.Holds == Roots {
			was.roots[f.Authority] = p.roots[f.Authority]
		}
		if f.Holds == RootKey {
			was.keys[f.Authority] = p.keys[f.Authority]
		}
	}
	wants, err := l.keysOf(s, m, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wants {
		was.shared[w.file.Path] = w.like
		if w.file.Holds == LeafTokenKey && !s.Tokens {
			was.sharedKeys[w.file.Path] = tokens
		}
	}
	return was
}

// kubeconfigText is a kubeconfig as lookScript shows it: without the key. The
// kubelet's names a file.
func kubeconfigText(t *testing.T, p pkiOf, path string) []byte {
	t.Helper()
	text := "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: https://10.0.0.1:8443\n    certificate-authority-data: " +
		base64.StdEncoding.EncodeToString(p.roots[ClusterCA]) + "\nusers:\n- name: u\n  user:\n"
	if strings.HasSuffix(path, "kubelet.conf") {
		return []byte(text + "    client-certificate: /var/lib/kubelet/pki/kubelet-client-current.pem\n    client-key: /var/lib/kubelet/pki/kubelet-client-current.pem\n")
	}
	cert, _ := p.leaf(t, ClusterCA, "kubernetes-admin")
	return []byte(text + "    client-certificate-data: " + base64.StdEncoding.EncodeToString(cert) + "\n    client-key-data: \"\"\n")
}

// composed are the files of the trees of a master, by stage and path, and the
// private keys of the machine.
type composed struct {
	files map[string]string
	links map[string]string
	verbs []string
	mat   *Material
	keys  map[string]crypto.Signer
}

func composeMaster(t *testing.T, l Layout, s Scope) composed {
	t.Helper()
	p := newPKI(t)
	m := master(t, l, p)
	mat, err := makeMaterial(l, s, p.present(t, l, s, m), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	wants, err := l.keysOf(s, m, false)
	if err != nil {
		t.Fatal(err)
	}
	c := composed{files: map[string]string{}, links: map[string]string{}, mat: mat, keys: map[string]crypto.Signer{}}
	public := map[string]crypto.PublicKey{}
	for _, w := range wants {
		if c.keys[w.file.Path], err = pki.NewKey(w.kind); err != nil {
			t.Fatal(err)
		}
		public[w.name] = c.keys[w.file.Path].Public()
	}
	trees, err := compose(l, s, m, mat, public, "run1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c.verbs = trees.verbs
	for r := tar.NewReader(&trees.tar); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return c
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeSymlink {
			c.links[h.Name] = h.Linkname
		} else {
			c.files[h.Name] = string(content)
		}
	}
}

func TestTreesOfAMaster(t *testing.T) {
	c := composeMaster(t, Kubeadm(), Everything())
	const pkiDir = "/etc/kubernetes/pki/"
	for _, f := range Kubeadm().of(true) {
		for _, at := range Kubeadm().stagesOf(Everything(), f) {
			name := at.String() + f.Path
			_, file := c.files[name]
			_, link := c.links[name]
			made := false
			for _, v := range c.verbs {
				verb, rest, _ := strings.Cut(v, ":")
				made = made || (verb == "key" || strings.HasPrefix(verb, "self-")) && strings.HasPrefix(rest, at.String()+":"+f.Path+":")
			}
			if gone := f.Added && at == Retired; !gone && !file && !link && !made {
				t.Errorf("nothing makes %s", name)
			}
		}
	}
	certs := func(name string) int { return strings.Count(c.files[name], "BEGIN CERTIFICATE") }
	for name, want := range map[string]int{
		"trusted" + pkiDir + "ca.crt":         2,
		"retired" + pkiDir + "ca.crt":         1,
		"trusted" + pkiDir + "ca-issuing.crt": 1, // the controller manager takes no bundle
		"switched" + pkiDir + "apiserver.crt": 2, // with the cross certificate
		"retired" + pkiDir + "apiserver.crt":  1,
	} {
		if got := certs(name); got != want {
			t.Errorf("%s holds %d certificates, want %d", name, got, want)
		}
	}
	if c.files["trusted"+pkiDir+"ca-issuing.crt"] != string(c.mat.Authorities[ClusterCA].Old) || c.files["switched"+pkiDir+"ca-issuing.crt"] != string(c.mat.Authorities[ClusterCA].New) {
		t.Error("the issuing CA does not change with the switch")
	}
	if n := strings.Count(c.files["trusted"+pkiDir+"sa.pub"], "BEGIN PUBLIC KEY"); n != 2 {
		t.Errorf("sa.pub of the stage trusted holds %d keys", n)
	}
	if to := c.links["switched/var/lib/kubelet/pki/kubelet-client-current.pem"]; to != "/var/lib/kubelet/pki/kubelet-client-run1.pem" {
		t.Errorf("the kubelet's link leads to %q", to)
	}
	kcm := "/etc/kubernetes/manifests/kube-controller-manager.yaml"
	if !strings.Contains(c.files["trusted"+kcm], "--cluster-signing-cert-file=/etc/kubernetes/pki/ca-issuing.crt") || !strings.Contains(c.files["retired"+kcm], "--cluster-signing-cert-file=/etc/kubernetes/pki/ca.crt") {
		t.Errorf("flags of the controller manager:\n%s\n%s", c.files["trusted"+kcm], c.files["retired"+kcm])
	}
	for name, text := range c.files {
		if strings.Contains(text, "PRIVATE KEY") && !strings.HasSuffix(name, "ca.key") && !strings.HasSuffix(name, "sa.key") && !strings.HasSuffix(name, "ca-issuing.key") {
			t.Errorf("%s holds a private key that was not made on the machine", name)
		}
	}
}

// TestServedChainsAreAcceptedByOldAndNew is what the whole procedure stands on.
func TestServedChainsAreAcceptedByOldAndNew(t *testing.T) {
	c := composeMaster(t, Kubeadm(), Everything())
	for file, a := range map[string]Authority{"apiserver": ClusterCA, "etcd/server": EtcdCA, "etcd/peer": EtcdCA, "front-proxy-client": FrontProxyCA} {
		path := "/etc/kubernetes/pki/" + file
		keyPEM, err := pki.EncodeKey(c.keys[path+".key"])
		if err != nil {
			t.Fatal(err)
		}
		for _, tc := range []struct {
			stage string
			roots []byte
			want  bool
		}{
			{"switched", c.mat.Authorities[a].Old, true},
			{"switched", c.mat.Authorities[a].New, true},
			{"retired", c.mat.Authorities[a].New, true},
			{"retired", c.mat.Authorities[a].Old, false},
		} {
			pair, err := tls.X509KeyPair([]byte(c.files[tc.stage+path+".crt"]), keyPEM)
			if err != nil {
				t.Fatalf("%s of the stage %s: %v", file, tc.stage, err)
			}
			roots, chain := x509.NewCertPool(), x509.NewCertPool()
			roots.AppendCertsFromPEM(tc.roots)
			for _, der := range pair.Certificate[1:] {
				cross, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				chain.AddCert(cross)
			}
			_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: chain, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			if (err == nil) != tc.want {
				t.Errorf("%s of the stage %s: %v, want accepted %t", file, tc.stage, err, tc.want)
			}
		}
	}
}

func TestLeavesAlone(t *testing.T) {
	c := composeMaster(t, Kubeadm(), Scope{Leaves: true})
	for name := range c.files {
		if strings.HasPrefix(name, "trusted") || strings.HasPrefix(name, "retired") || strings.Contains(name, "ca.") || strings.Contains(name, "sa.") {
			t.Errorf("new certificates under the present CAs change %s", name)
		}
	}
	text := c.files["switched/etc/kubernetes/pki/apiserver.crt"]
	if n := strings.Count(text, "BEGIN CERTIFICATE"); n != 1 {
		t.Errorf("apiserver.crt holds %d certificates", n)
	}
}

// TestTreesOfAnAKSEngineMaster: one key file serves, signs and verifies, and all
// machines get the same pairs.
func TestTreesOfAnAKSEngineMaster(t *testing.T) {
	const certs = "/etc/kubernetes/certs/"
	l := AKSEngine(3, "azureuser")
	c := composeMaster(t, l, withoutEtcd(Everything()))
	keys := func(stage string) (out []string) {
		for _, part := range strings.SplitAfter(c.files[stage+certs+"apiserver.key"], "-----END PRIVATE KEY-----\n") {
			if part != "" {
				out = append(out, strings.TrimSpace(part))
			}
		}
		return out
	}
	old, fresh := strings.TrimSpace(string(c.mat.Tokens.OldKey)), strings.TrimSpace(string(c.mat.Tokens.NewKey))
	for stage, want := range map[string][]string{"trusted": {old, fresh}, "switched": {fresh, old}, "retired": {fresh}} {
		if got := keys(stage); !slices.Equal(got, want) {
			t.Errorf("apiserver.key of the stage %s holds %d keys, or in another order", stage, len(got))
		}
	}
	for _, stage := range []string{"switched", "retired"} {
		if _, err := tls.X509KeyPair([]byte(c.files[stage+certs+"apiserver.crt"]), []byte(c.files[stage+certs+"apiserver.key"])); err != nil {
			t.Errorf("the pair of the stage %s: %v", stage, err)
		}
	}
	for _, name := range []string{"client", "etcdserver", "etcdclient", "etcdpeer0", "etcdpeer2", "proxy"} {
		if _, err := tls.X509KeyPair([]byte(c.files["switched"+certs+name+".crt"]), []byte(c.files["switched"+certs+name+".key"])); err != nil {
			t.Errorf("the pair %s: %v", name, err)
		}
	}
	if text := c.files["switched"+certs+"proxy.crt"]; strings.Count(text, "BEGIN CERTIFICATE") != 1 {
		t.Error("a CA that has thrown its key away certified its successor")
	}
	if _, has := c.files["retired"+certs+"proxy-ca.key"]; has {
		t.Error("the key of the front proxy's CA is placed")
	}
	config, err := parseKubeconfig([]byte(c.files["switched/home/azureuser/.kube/config"]))
	if err != nil || strings.Count(string(config.ca), "BEGIN") != 2 || !bytes.Contains(config.clientCert, []byte("BEGIN")) {
		t.Errorf("the administrator's kubeconfig: %v", err)
	}
	if !slices.ContainsFunc(c.verbs, func(v string) bool { return strings.HasPrefix(v, "self-") }) {
		t.Error("the kubelet's serving certificate is not made")
	}
}

func withoutEtcd(s Scope) Scope {
	s.Etcd = false
	return s
}

// TestLeavesAloneKeepTheTokens: a new certificate for the API server must not
// cost every token its validity.
func TestLeavesAloneKeepTheTokens(t *testing.T) {
	c := composeMaster(t, AKSEngine(3, "azureuser"), Scope{Leaves: true})
	for name := range c.files {
		if strings.Contains(name, "apiserver.key") || strings.Contains(name, "proxy") || strings.Contains(name, "ca.") {
			t.Errorf("new certificates under the present CA change %s", name)
		}
	}
	if c.files["switched/etc/kubernetes/certs/apiserver.crt"] == "" || c.files["switched/etc/kubernetes/certs/client.key"] == "" {
		t.Error("leaves are not renewed")
	}
}

func TestMaterialIsRefusedWhereAKeyIsNotThatOfItsCA(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	p.keys[EtcdCA] = other.keys[EtcdCA]
	if _, err := makeMaterial(Kubeadm(), Everything(), present{roots: p.roots, keys: p.keys}, time.Now()); err == nil || !strings.Contains(err.Error(), "does not belong") {
		t.Errorf("a key of another CA: %v", err)
	}
	p = newPKI(t)
	p.roots[ClusterCA] = join(p.roots[ClusterCA], other.roots[ClusterCA])
	if _, err := makeMaterial(Kubeadm(), Everything(), present{roots: p.roots, keys: p.keys}, time.Now()); err == nil || !strings.Contains(err.Error(), "unfinished rotation") {
		t.Errorf("a bundle where one CA must be: %v", err)
	}
}

func TestKubeconfigsWithOtherLoginsAreRefused(t *testing.T) {
	for _, login := range []string{"token", "password", "exec", "auth-provider"} {
		text := "clusters: [{cluster: {}}]\nusers: [{user: {" + login + ": x}}]"
		if _, err := parseKubeconfig([]byte(text)); err == nil || !strings.Contains(err.Error(), login) {
			t.Errorf("a kubeconfig with %s: %v", login, err)
		}
	}
}

func TestCAThatHasEndedIsRefused(t *testing.T) {
	p := newPKI(t)
	if _, err := makeMaterial(Kubeadm(), Everything(), present{roots: p.roots, keys: p.keys}, time.Now().Add(2*time.Hour)); err == nil || !strings.Contains(err.Error(), "cannot overlap") {
		t.Errorf("CAs that have ended: %v", err)
	}
}

func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte("clusters:\n- cluster:\n    certificate-authority-data: QQ==\nusers:\n- user:\n    client-certificate-data: QQ==\n"))
	f.Add([]byte("clusters: [{cluster: {}}]\nusers: [{user: {}}]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := parseKubeconfig(text)
		if err != nil {
			return
		}
		out, err := k.with([]byte("ca"), []byte("cert"), nil)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := parseKubeconfig(out)
		if err != nil || !bytes.Equal(again.ca, []byte("ca")) || (again.clientCert != nil) != (k.clientCert != nil) {
			t.Errorf("written as\n%s\n%v", out, err)
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte("metadata:\n  name: x\nspec:\n  containers:\n  - command: [x, --cluster-signing-cert-file=a, --cluster-signing-key-file=b]\n"))
	f.Add([]byte("metadata: {annotations: {a: b}}\nspec: {}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		out, err := remark(text, Kubeadm(), Everything(), "/etc/kubernetes/manifests/kube-controller-manager.yaml", Trusted, "run1")
		if err == nil && (!bytes.Contains(out, []byte("run1-trusted")) || !bytes.Contains(out, []byte("ca-issuing.crt"))) {
			t.Errorf("written as\n%s", out)
		}
	})
}

func FuzzLook(f *testing.F) {
	f.Add("/etc/a|f|600|0:0||1700000000|abc|QQ==|\n/etc/b|-|||||||")
	f.Fuzz(func(t *testing.T, out string) {
		files, err := parseLook(out)
		for path, s := range files {
			if err == nil && s.Path != path {
				t.Errorf("%q is kept as %q", s.Path, path)
			}
		}
	})
}
