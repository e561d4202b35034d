//go:build linux

package bed

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAKSEngine brings up the smallest cluster of the layout and looks at what is
// its own.
func TestAKSEngine(t *testing.T) {
	cfg := testBed(t)
	cfg.Layout, cfg.Workers = LayoutAKSEngine, 0
	c, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(c.Dir, "kubectl"), "get", "--raw", "/readyz").CombinedOutput()
	if err != nil || string(out) != "ok" {
		t.Errorf("the API as the administrator: %q, %v", out, err)
	}
	checkOnMaster(t, c)
	checkAPIModel(t, c)
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, cfg)
}

// checkOnMaster runs scripts that print what they should.
func checkOnMaster(t *testing.T, c *Cluster) {
	const etcd = `cd /etc/kubernetes/certs
etcd() { etcdctl --cacert=ca.crt --cert=etcdclient.crt --key=etcdclient.key "$@"; }
`
	for _, check := range []struct{ what, script, want string }{
		{
			"the kubelet's own certificate", "openssl x509 -noout -subject -in /var/lib/kubelet/pki/kubelet-client-current.pem",
			"subject=O = system:nodes, CN = system:node:master-0\n",
		},
		{
			"keys in etcd", etcd + "etcd get --prefix /proxycerts/ --keys-only | grep .",
			"/proxycerts/proxy-client-cert-file\n/proxycerts/proxy-client-key-file\n/proxycerts/requestheader-client-ca-file\n",
		},
		{
			"the front proxy's key, in etcd and as a file",
			etcd + `[ "$(etcd get --print-value-only /proxycerts/proxy-client-key-file)" = " $(cat proxy.key)" ] && echo same`, "same\n",
		},
		{
			"etcd's processes, user and key", "ps -o user= -C etcd; systemctl show --property=MainPID --value etcd | xargs ps -o comm= -p; stat -c %U:%a /etc/kubernetes/certs/etcdserver.key",
			"etcd\netcd\netcd:600\n",
		},
		{
			"an administrator's kubeconfig", "stat -c %U:%a /home/azureuser/.kube/config; ls /etc/kubernetes/admin.conf 2>/dev/null || echo none",
			"azureuser:600\nnone\n",
		},
		{
			"a request without a name", "curl -sk -o /dev/null -w '%{http_code}\\n' https://127.0.0.1:6443/readyz",
			"401\n",
		},
		{
			"the API server as a client of the kubelet", "kubectl logs --namespace=kube-system kube-scheduler-master-0 | grep -c . >/dev/null && echo printed",
			"printed\n",
		},
	} {
		out, err := c.Exec(t.Context(), "master-0", check.script)
		if err != nil || out != check.want {
			t.Errorf("%s: got %q, %v; want %q", check.what, out, err, check.want)
		}
	}
}

// checkAPIModel: the model holds the certificates that the cluster has.
func checkAPIModel(t *testing.T, c *Cluster) {
	text, err := os.ReadFile(c.APIModel)
	if err != nil {
		t.Fatal(err)
	}
	var model struct {
		Properties struct {
			MasterProfile      struct{ Count int }
			AgentPoolProfiles  []any
			CertificateProfile struct {
				CACertificate, APIServerPrivateKey        string
				EtcdPeerCertificates, EtcdPeerPrivateKeys []string
			}
		}
	}
	if err := json.Unmarshal(text, &model); err != nil {
		t.Fatal(err)
	}
	p := model.Properties
	if p.MasterProfile.Count != 1 || len(p.AgentPoolProfiles) != 0 || len(p.CertificateProfile.EtcdPeerPrivateKeys) != 1 {
		t.Errorf("the API model is of another cluster: %d masters, %d pools", p.MasterProfile.Count, len(p.AgentPoolProfiles))
	}
	for file, want := range map[string]string{
		"ca.crt": p.CertificateProfile.CACertificate, "apiserver.key": p.CertificateProfile.APIServerPrivateKey,
		"etcdpeer0.crt": strings.Join(p.CertificateProfile.EtcdPeerCertificates, ""),
	} {
		got, err := c.Exec(t.Context(), "master-0", "cat "+aksCertificateDir+"/"+file)
		if err != nil || got != want || want == "" {
			t.Errorf("%s is not as in the API model: %v", file, err)
		}
	}
	if info, err := os.Stat(c.APIModel); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the API model: %v, %v; want mode 0600", info, err)
	}
}

// TestAKSCertificates: every pair fits, is issued by whom the layout says, and
// the API model that holds them can be read.
func TestAKSCertificates(t *testing.T) {
	cache, err := OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	b, err := plan(Config{Layout: LayoutAKSEngine, Workers: 1}, cache)
	if err != nil {
		t.Fatal(err)
	}
	c, err := makeAKSCertificates(b)
	if err != nil {
		t.Fatal(err)
	}
	master, worker := c.files(b.Nodes[0]), c.files(b.Nodes[3])
	if len(master) != 21 || len(worker) != 5 {
		t.Errorf("a master has %d files, a worker %d; want 21 and 5", len(master), len(worker))
	}
	if worker["ca.key"] != "" || worker["client.key"] == "" {
		t.Error("a worker has the client's key, and not the CA's")
	}
	for name, cert := range master {
		base, ok := strings.CutSuffix(name, ".crt")
		if !ok || base == "proxy-ca" { // whose key is forgotten
			continue
		}
		key := master[base+".key"]
		if !strings.HasPrefix(key, "-----BEGIN RSA PRIVATE KEY-----\n") {
			t.Errorf("the key of %s is not PKCS #1", base)
		}
		checkPair(t, c, base, cert, key)
	}
	if err := c.apiServer.parsed.VerifyHostname(balancerIP); err != nil {
		t.Error(err)
	}
	profile, err := c.profile()
	if err != nil {
		t.Fatal(err)
	}
	s := b.scene(b.Nodes[0])
	s.AKS.CertificateProfile = profile
	model, err := render("aks-apimodel.json", s)
	if err != nil || !json.Valid([]byte(model)) {
		t.Errorf("the API model is not JSON: %v\n%s", err, model)
	}
}

func checkPair(t *testing.T, c *aksCertificates, name, cert, key string) {
	t.Helper()
	p, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	issuer := c.ca.parsed
	switch name {
	case "proxy":
		issuer = c.proxyCA.parsed
	case "kubeletserver":
		issuer = p.Leaf // self-signed
	}
	roots := x509.NewCertPool()
	roots.AddCert(issuer)
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	if _, err := p.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: usages}); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	if p.Leaf.NotBefore.After(time.Now().Add(-30 * time.Minute)) {
		t.Errorf("%s is not valid before %s", name, p.Leaf.NotBefore)
	}
}
