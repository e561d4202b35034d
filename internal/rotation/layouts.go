package rotation

import "fmt"

// The layouts that we know.

// Kubeadm is the layout of clusters made by kubeadm, with stacked etcd.
func Kubeadm() Layout {
	const pki, etc, manifests = "/etc/kubernetes/pki/", "/etc/kubernetes/", "/etc/kubernetes/manifests/"
	const kubelet, serving = "/var/lib/kubelet/pki/kubelet-client-current.pem", "/var/lib/kubelet/pki/kubelet"
	l := Layout{
		Name: "kubeadm", Marks: []string{pki + "ca.crt", manifests + "kube-apiserver.yaml"},
		EtcdPort: "2379", EtcdData: "/var/lib/etcd", EtcdBy: EtcdCA, Login: pki + "apiserver-kubelet-client.crt",
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
			{Path: serving + "-server-current.pem", Holds: KubeletPair, Authority: ClusterCA, Optional: true, Served: true}, // with serverTLSBootstrap
			{Path: serving + ".key", Holds: LeafKey, Pair: serving + ".crt", Optional: true},
			{Path: serving + ".crt", Holds: SelfCert, Optional: true},
			{Path: manifests + "etcd.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-apiserver.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-controller-manager.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-scheduler.yaml", Holds: Manifest, On: Masters},
		},
		// What a program reads only when it starts; it follows changes of all others by itself.
		Components: []Component{
			{
				Name: "etcd", On: Masters, Pod: manifests + "etcd.yaml", Serves: pki + "etcd/server.crt",
				Once: []string{pki + "etcd/ca.crt"},
			},
			{
				Name: "kube-apiserver", On: Masters, Pod: manifests + "kube-apiserver.yaml", Serves: pki + "apiserver.crt",
				Once: []string{pki + "etcd/ca.crt", pki + "sa.pub"}, Signs: pki + "sa.key",
			},
			{
				Name: "kube-controller-manager", On: Masters, Pod: manifests + "kube-controller-manager.yaml",
				Once: []string{pki + "ca.crt", etc + "controller-manager.conf"}, Signs: pki + "sa.key",
				Issuer: map[string]string{"--cluster-signing-cert-file": pki + "ca-issuing.crt", "--cluster-signing-key-file": pki + "ca-issuing.key"},
			},
			{Name: "kube-scheduler", On: Masters, Pod: manifests + "kube-scheduler.yaml", Once: []string{etc + "scheduler.conf"}},
			{Name: "kubelet", Unit: "kubelet", Once: []string{etc + "kubelet.conf", kubelet, serving + ".crt", serving + "-server-current.pem"}},
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

// AKSEngine is the layout of clusters made by AKS Engine: one CA for the cluster
// and for etcd, etcd as a unit of systemd, keys that all machines share and
// that the API model holds, and a front proxy whose CA has thrown its key away.
// masters is their number, admin the login user, who has the administrator's kubeconfig.
//
// The key of the API server's certificate also signs tokens. It is no matter to
// either that its file holds a second key while old and new overlap: a TLS server
// and a signer take the first, a verifier takes all.
func AKSEngine(masters int, admin string) Layout {
	const certs, manifests = "/etc/kubernetes/certs/", "/etc/kubernetes/manifests/"
	const kubelet = "/var/lib/kubelet/pki/kubelet-client-current.pem"
	l := Layout{
		Name: "aks-engine", Marks: []string{certs + "ca.crt", certs + "apiserver.crt", manifests + "kube-apiserver.yaml"},
		EtcdPort: "2379", EtcdData: "/var/lib/etcddisk", EtcdBy: ClusterCA, Login: certs + "client.crt",
		Files: []File{
			{Path: certs + "ca.crt", Holds: Roots, Authority: ClusterCA, Entry: "caCertificate"},
			{Path: certs + "ca.key", Holds: RootKey, Authority: ClusterCA, On: Masters, Entry: "caPrivateKey"},
			{Path: certs + "ca-issuing.crt", Holds: IssuerCert, Authority: ClusterCA, On: Masters, Added: true},
			{Path: certs + "ca-issuing.key", Holds: IssuerKey, Authority: ClusterCA, On: Masters, Added: true, Pair: certs + "ca-issuing.crt"},
			{Path: certs + "proxy-ca.crt", Holds: Roots, Authority: FrontProxyCA, On: Masters, Optional: true},
			{Path: "/home/" + admin + "/.kube/config", Holds: Kubeconfig, Authority: ClusterCA, On: Masters, Optional: true, Shared: true, Entry: "kubeConfigCertificate", KeyEntry: "kubeConfigPrivateKey"},
			{Path: kubelet, Holds: KubeletPair, Authority: ClusterCA, Optional: true},
			{Path: certs + "kubeletserver.key", Holds: LeafKey, Pair: certs + "kubeletserver.crt", Optional: true},
			{Path: certs + "kubeletserver.crt", Holds: SelfCert, Optional: true},
			{Path: manifests + "kube-apiserver.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-controller-manager.yaml", Holds: Manifest, On: Masters},
			{Path: manifests + "kube-scheduler.yaml", Holds: Manifest, On: Masters},
		},
		Components: []Component{
			{Name: "etcd", On: Masters, Unit: "etcd", Serves: certs + "etcdserver.crt", Once: []string{certs + "ca.crt"}},
			{
				Name: "kube-apiserver", On: Masters, Pod: manifests + "kube-apiserver.yaml", Serves: certs + "apiserver.crt",
				Once: []string{certs + "ca.crt", certs + "apiserver.key"}, Signs: certs + "apiserver.key",
			},
			{
				Name: "kube-controller-manager", On: Masters, Pod: manifests + "kube-controller-manager.yaml",
				Once: []string{certs + "ca.crt", certs + "client.crt"}, Signs: certs + "apiserver.key",
				Issuer: map[string]string{"--cluster-signing-cert-file": certs + "ca-issuing.crt", "--cluster-signing-key-file": certs + "ca-issuing.key"},
			},
			{Name: "kube-scheduler", On: Masters, Pod: manifests + "kube-scheduler.yaml", Once: []string{certs + "ca.crt", certs + "client.crt"}},
			{Name: "kubelet", Unit: "kubelet", Once: []string{certs + "ca.crt", certs + "client.crt", kubelet, certs + "kubeletserver.crt"}},
		},
		Copies: []Copy{
			{Key: "/proxycerts/requestheader-client-ca-file", Path: certs + "proxy-ca.crt"},
			{Key: "/proxycerts/proxy-client-cert-file", Path: certs + "proxy.crt"},
			{Key: "/proxycerts/proxy-client-key-file", Path: certs + "proxy.key"},
		},
		Windows: aksEngineWindows(certs + "client.key"),
	}
	pair := func(name string, on Role, by Authority, key Holds, entry, keyEntry string) {
		l.Files = append(l.Files,
			File{Path: certs + name + ".key", Holds: key, Authority: by, On: on, Pair: certs + name + ".crt", Shared: true, Entry: keyEntry, Optional: by == FrontProxyCA},
			File{Path: certs + name + ".crt", Holds: LeafCert, Authority: by, On: on, Shared: true, Entry: entry, Optional: by == FrontProxyCA})
	}
	pair("apiserver", Masters, ClusterCA, LeafTokenKey, "apiServerCertificate", "apiServerPrivateKey")
	pair("client", Everywhere, ClusterCA, LeafKey, "clientCertificate", "clientPrivateKey")
	pair("etcdserver", Masters, ClusterCA, LeafKey, "etcdServerCertificate", "etcdServerPrivateKey")
	pair("etcdclient", Masters, ClusterCA, LeafKey, "etcdClientCertificate", "etcdClientPrivateKey")
	for i := range masters {
		pair(fmt.Sprintf("etcdpeer%d", i), Masters, ClusterCA, LeafKey, fmt.Sprintf("etcdPeerCertificates/%d", i), fmt.Sprintf("etcdPeerPrivateKeys/%d", i))
	}
	pair("proxy", Masters, FrontProxyCA, LeafKey, "", "")
	return l
}

// aksEngineWindows is what its Windows workers have: the certificate that all machines
// share stands in one kubeconfig, for the kubelet and for kube-proxy.
func aksEngineWindows(client string) *Windows {
	const k, kubelet = `c:\k\`, `c:\var\lib\kubelet\pki\`
	return &Windows{
		Dir: k + "rotate-certs",
		Files: []File{
			{Path: k + "ca.crt", Holds: Roots, Authority: ClusterCA},
			{Path: k + "config", Holds: Kubeconfig, Authority: ClusterCA, Shared: true, Same: client},
			{Path: kubelet + "kubelet-client-current.pem", Holds: Renewed, Authority: ClusterCA, Optional: true},
			{Path: kubelet + "kubelet.key", Holds: Renewed, Pair: kubelet + "kubelet.crt", Optional: true},
			{Path: kubelet + "kubelet.crt", Holds: Renewed, Optional: true},
		},
		Components: []Component{
			{Name: "kubelet", Unit: "kubelet", Once: []string{k + "config", kubelet + "kubelet-client-current.pem", kubelet + "kubelet.key", kubelet + "kubelet.crt"}},
			{Name: "kube-proxy", Unit: "kubeproxy", Once: []string{k + "config"}},
		},
	}
}
