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
	// EtcdPort is that of etcd's clients.
	EtcdPort string
	// EtcdData is the folder of etcd's database.
	EtcdData string
	// EtcdBy certifies etcd's members and clients.
	EtcdBy Authority
	// Login is a client certificate on every master, with its key beside it, as which
	// a script there asks the API server whether it is ready.
	Login string
	// Copies stand in etcd.
	Copies []Copy
	// Windows is what Windows workers have; nil: the layout has none.
	Windows *Windows
}

// Copy is a key of etcd that holds what a file holds.
type Copy struct {
	Key  string // in etcd
	Path string
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
//	SelfCert      old    old        new          new         (signed by its own key)
//	TokenKey      old    old        new          new
//	TokenPublic   old    old+new    old+new      new
//	LeafTokenKey  old    old+new    new+old      new         (the first serves and signs, all verify)
//	Kubeconfig    old    old        new, trusts  new, trusts
//	                                old+new      new
//	KubeletPair   old    old        new          new        (a link to a dated file)
//	Manifest      old    marked     marked       marked     (of a static pod)
//	Renewed       old    old        -            -          (moved away; its owner gets another)
const (
	Roots Holds = iota
	RootKey
	IssuerCert
	IssuerKey
	LeafCert
	LeafKey
	SelfCert
	TokenKey
	TokenPublic
	LeafTokenKey
	Kubeconfig
	KubeletPair
	Manifest
	Renewed
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
	// Pair is the certificate's file, of a LeafKey, LeafTokenKey, IssuerKey or Renewed key.
	Pair string
	// Served says that a KubeletPair is shown to clients, so that it comes with the
	// cross certificate; the kubelet drops that when it next renews the pair.
	Served bool
	// Shared says that all machines have the same: the key is made by the runner, and
	// not where it is used.
	Shared bool
	// Entry is its name in the certificate profile of the API model, KeyEntry that of
	// the private key of a kubeconfig; empty: it is not there.
	Entry, KeyEntry string
	// Same is the key file of the shared pair that a kubeconfig embeds; empty: it has its own.
	Same string
	// Added says that the file is not there before and after a rotation.
	Added bool
}

// Component is a program of a node that reads the files.
type Component struct {
	Name   string // "kube-apiserver": also the name of its process
	On     Role
	Unit   string            // of systemd; empty: a static pod
	Pod    string            // path of the static pod's manifest; empty: a unit
	Once   []string          // files that it reads only when it starts
	Signs  string            // the key with which it signs tokens, the first of its file; also read once
	Serves string            // the certificate that it presents; empty: it is not asked
	Issuer map[string]string // flags that are led to other files while old and new CA overlap: flag -> path
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

// leafOf returns the file of a certificate of an authority.
func (l Layout) leafOf(a Authority) File {
	for _, f := range l.Files {
		if f.Holds == LeafCert && f.Authority == a {
			return f
		}
	}
	return File{}
}

// tokenKeyFile is the file whose first key signs tokens.
func (l Layout) tokenKeyFile() string {
	for _, f := range l.Files {
		if f.Holds == TokenKey || f.Holds == LeafTokenKey {
			return f.Path
		}
	}
	return ""
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

// keyOf returns the key file of a certificate's file.
func (l Layout) keyOf(cert string) File {
	for _, f := range l.Files {
		if f.Pair == cert {
			return f
		}
	}
	return File{}
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
