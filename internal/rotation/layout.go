package rotation

// Layout says where a kind of cluster keeps its keys and certificates and what
// reads them: all that the engine knows of kubeadm, aks-engine or another. It is
// data; a further layout needs no change of the engine.
type Layout struct {
	Name string
	// Marks are paths whose presence on a master tells the layout.
	Marks []string
	// Files are those that a rotation may change.
	Files []File
	// Components read the files.
	Components []Component
	// AdminKubeconfig is where the first master keeps an administrator's kubeconfig.
	AdminKubeconfig string
	// APIPort is that of the API servers.
	APIPort string
	// EtcdPort is that of etcd's clients.
	EtcdPort string
}

// Authority names a PKI of the cluster.
type Authority string

// The PKIs. The keys of service accounts are not certified by anybody.
const (
	ClusterCA    Authority = "cluster"
	EtcdCA       Authority = "etcd"
	FrontProxyCA Authority = "front-proxy"
)

// Holds is what a file holds.
type Holds int

// What files hold, and what becomes of them:
//
//	              old    trusted    switched     retired
//	Roots         old    old+new    old+new      new
//	RootKey       old    old        old          new
//	IssuerCert    -      old        new          -          (exactly one certificate)
//	IssuerKey     -      old        new          -
//	LeafCert      old    old        new+cross    new
//	LeafKey       old    old        new          new
//	TokenKey      old    old        new          new
//	TokenPublic   old    old+new    old+new      new
//	Kubeconfig    old    old        new, trusts  new, trusts
//	                                old+new      new
//	KubeletPair   old    old        new          new        (a link to a dated file)
//	Manifest      old    marked     marked       marked     (of a static pod)
const (
	Roots Holds = iota
	RootKey
	IssuerCert
	IssuerKey
	LeafCert
	LeafKey
	TokenKey
	TokenPublic
	Kubeconfig
	KubeletPair
	Manifest
)

// Role is a sort of machine.
type Role int

// The roles.
const (
	Everywhere Role = iota
	Masters
)

// File is a file of a layout.
type File struct {
	Path  string
	Holds Holds
	// Authority is the PKI that the file belongs to: of Roots and RootKey the
	// authority itself, of leaves and kubeconfigs the issuer.
	Authority Authority
	On        Role
	Optional  bool
	// Pair is the certificate's file, of a LeafKey or IssuerKey.
	Pair string
	// Added says that the file is not there before and after a rotation.
	Added bool
}

// Component is a program of a node that reads the files.
type Component struct {
	Name    string // "kube-apiserver": also the name of its process
	On      Role
	Unit    string // of systemd; empty: a static pod
	Pod     string // path of the static pod's manifest; empty: a unit
	Once    []string
	Port    string            // where it serves, on the node's address; empty: it is not asked
	Serves  string            // the certificate that it presents there
	Issuer  map[string]string // flags that are led to other files while old and new CA overlap: flag -> path
	Drained bool              // clients are led to a neighbour while it restarts
}

// Kubeadm is the layout of clusters made by kubeadm, with stacked etcd.
func Kubeadm() Layout {
	const pki, etc, manifests = "/etc/kubernetes/pki/", "/etc/kubernetes/", "/etc/kubernetes/manifests/"
	const kubelet = "/var/lib/kubelet/pki/kubelet-client-current.pem"
	l := Layout{
		Name: "kubeadm", Marks: []string{pki + "ca.crt", manifests + "kube-apiserver.yaml"},
		AdminKubeconfig: etc + "admin.conf", APIPort: "6443", EtcdPort: "2379",
		Files: []File{
			{Path: pki + "ca.crt", Holds: Roots, Authority: ClusterCA},
			{Path: pki + "ca.key", Holds: RootKey, Authority: ClusterCA, On: Masters},
			{Path: pki + "etcd/ca.crt", Holds: Roots, Authority: EtcdCA, On: Masters},
			{Path: pki + "etcd/ca.key", Holds: RootKey, Authority: EtcdCA, On: Masters},
			{Path: pki + "front-proxy-ca.crt", Holds: Roots, Authority: FrontProxyCA, On: Masters},
			{Path: pki + "front-proxy-ca.key", Holds: RootKey, Authority: FrontProxyCA, On: Masters},
			{Path: pki + "ca-issuing.crt", Holds: IssuerCert, Authority: ClusterCA, On: Masters, Added: true},
			{Path: pki + "ca-issuing.key", Holds: IssuerKey, Authority: ClusterCA, On: Masters, Added: true, Pair: pki + "ca-issuing.crt"},
			{Path: pki + "sa.key", Holds: TokenKey, On: Masters},
			{Path: pki + "sa.pub", Holds: TokenPublic, On: Masters},
			{Path: etc + "admin.conf", Holds: Kubeconfig, Authority: ClusterCA, On: Masters},
			{Path: etc + "super-admin.conf", Holds: Kubeconfig, Authority: ClusterCA, On: Masters, Optional: true},
			{Path: etc + "controller-manager.conf", Holds: Kubeconfig, Authority: ClusterCA, On: Masters},
			{Path: etc + "scheduler.conf", Holds: Kubeconfig, Authority: ClusterCA, On: Masters},
			{Path: etc + "kubelet.conf", Holds: Kubeconfig, Authority: ClusterCA},
			{Path: kubelet, Holds: KubeletPair, Authority: ClusterCA},
			{Path: manifests + "etcd.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-apiserver.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-controller-manager.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-scheduler.yaml", Holds: Manifest, On: Masters},
		},
		// What a program reads only when it starts; it follows changes of all others by itself.
		Components: []Component{
			{
				Name: "etcd", On: Masters, Pod: manifests + "etcd.yaml", Port: "2379", Serves: pki + "etcd/server.crt", Drained: true,
				Once: []string{pki + "etcd/ca.crt"},
			},
			{
				Name: "kube-apiserver", On: Masters, Pod: manifests + "kube-apiserver.yaml", Port: "6443", Serves: pki + "apiserver.crt", Drained: true,
				Once: []string{pki + "etcd/ca.crt", pki + "sa.pub", pki + "sa.key"},
			},
			{
				Name: "kube-controller-manager", On: Masters, Pod: manifests + "kube-controller-manager.yaml",
				Once:   []string{pki + "ca.crt", pki + "sa.key", etc + "controller-manager.conf"},
				Issuer: map[string]string{"--cluster-signing-cert-file": pki + "ca-issuing.crt", "--cluster-signing-key-file": pki + "ca-issuing.key"},
			},
			{Name: "kube-scheduler", On: Masters, Pod: manifests + "kube-scheduler.yaml", Once: []string{etc + "scheduler.conf"}},
			{Name: "kubelet", Unit: "kubelet", Once: []string{etc + "kubelet.conf", kubelet}},
		},
	}
	for _, leaf := range []struct {
		name string
		by   Authority
	}{
		{"apiserver", ClusterCA},
		{"apiserver-kubelet-client", ClusterCA},
		{"apiserver-etcd-client", EtcdCA},
		{"front-proxy-client", FrontProxyCA},
		{"etcd/server", EtcdCA},
		{"etcd/peer", EtcdCA},
		{"etcd/healthcheck-client", EtcdCA},
	} {
		l.Files = append(l.Files,
			File{Path: pki + leaf.name + ".key", Holds: LeafKey, Authority: leaf.by, On: Masters, Pair: pki + leaf.name + ".crt"},
			File{Path: pki + leaf.name + ".crt", Holds: LeafCert, Authority: leaf.by, On: Masters})
	}
	return l
}

// file returns the layout's file of a path.
func (l Layout) file(path string) File {
	for _, f := range l.Files {
		if f.Path == path {
			return f
		}
	}
	return File{}
}

// of returns the files that are on a machine.
func (l Layout) of(master bool) []File {
	var out []File
	for _, f := range l.Files {
		if f.On == Everywhere || master {
			out = append(out, f)
		}
	}
	return out
}

// paths returns those of the files on a machine that hold one of the kinds.
func (l Layout) paths(master bool, kinds ...Holds) []string {
	var out []string
	for _, f := range l.of(master) {
		for _, k := range kinds {
			if f.Holds == k {
				out = append(out, f.Path)
			}
		}
	}
	return out
}

// authorities returns the PKIs of the layout, in order.
func (l Layout) authorities() []Authority {
	var out []Authority
	for _, f := range l.Files {
		if f.Holds == Roots {
			out = append(out, f.Authority)
		}
	}
	return out
}

// component returns the layout's component of a name.
func (l Layout) component(name string) Component {
	for _, c := range l.Components {
		if c.Name == name {
			return c
		}
	}
	return Component{}
}

// rootFile and rootKey are the files of an authority.
func (l Layout) rootFile(a Authority) string { return l.find(Roots, a) }
func (l Layout) rootKey(a Authority) string  { return l.find(RootKey, a) }

func (l Layout) find(h Holds, a Authority) string {
	for _, f := range l.Files {
		if f.Holds == h && f.Authority == a {
			return f.Path
		}
	}
	return ""
}
