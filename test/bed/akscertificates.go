//go:build linux

package bed

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"time"
)

// aksCertificates are all certificates of a cluster of the layout aks-engine.
// One CA signs everything but the front proxy's pair.
type aksCertificates struct {
	ca         pair
	apiServer  pair // its key also signs the tokens of service accounts
	client     pair // of the API servers as clients of kubelets, and in the kubeconfig of every node
	kubeConfig pair // of the administrator
	etcdServer pair
	etcdClient pair
	etcdPeers  []pair // in the order of the masters
	proxyCA    pair   // its key signs once and is forgotten
	proxy      pair
	kubelets   map[string]*pair // kubelets as servers, by node: self-signed
}

// pair is a certificate and its key as aks-engine has them: PEM, the key RSA as PKCS #1.
type pair struct {
	cert, key string
	parsed    *x509.Certificate
	private   *rsa.PrivateKey
}

// makeAKSCertificates makes all of them. aks-engine's keys have 4096 bits; 2048
// are made ten times faster, and to a rotation it is the same.
func makeAKSCertificates(b *builder) (*aksCertificates, error) {
	c := &aksCertificates{etcdPeers: make([]pair, len(b.masters())), kubelets: map[string]*pair{}}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	server, client := both[:1], both[1:]
	var members []net.IP
	for _, m := range b.masters() {
		members = append(members, net.ParseIP(m.IP))
	}
	members = append(members, net.IPv4(127, 0, 0, 1))
	wanted := []wish{
		{&c.ca, nil, authority("ca")},
		{&c.apiServer, &c.ca, apiServerLeaf(b.Name, members, server)},
		{&c.client, &c.ca, leaf("client", "system:masters", nil, client)},
		{&c.kubeConfig, &c.ca, leaf("client", "system:masters", nil, client)},
		{&c.etcdServer, &c.ca, leaf("etcdserver", "", members, both)},
		{&c.etcdClient, &c.ca, leaf("etcdclient", "", members, both)},
		{&c.proxyCA, nil, authority("proxyClientCA")},
		{&c.proxy, &c.proxyCA, leaf("aggregator", "system:masters", nil, client)},
	}
	for i := range c.etcdPeers {
		wanted = append(wanted, wish{&c.etcdPeers[i], &c.ca, leaf("etcdpeer", "", members, both)})
	}
	for _, n := range b.Nodes {
		c.kubelets[n.Name] = &pair{}
		wanted = append(wanted, wish{c.kubelets[n.Name], nil, leaf(n.Name, "", nil, server)})
	}
	for _, w := range wanted {
		if err := w.fulfil(); err != nil {
			return nil, fmt.Errorf("making the certificate %s: %w", w.is.Subject, err)
		}
	}
	return c, nil
}

// wish is a pair to be made.
type wish struct {
	to     *pair
	issuer *pair // nil: the pair itself
	is     *x509.Certificate
}

func authority(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature,
	}
}

func leaf(name, organization string, ips []net.IP, usage []x509.ExtKeyUsage) *x509.Certificate {
	c := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
		IPAddresses:           ips,
	}
	if organization != "" {
		c.Subject.Organization = []string{organization}
	}
	return c
}

// apiServerLeaf names the API servers in every way in which they are called.
func apiServerLeaf(bed string, members []net.IP, usage []x509.ExtKeyUsage) *x509.Certificate {
	ips := append([]net.IP{net.ParseIP(balancerIP), net.ParseIP(serviceIP)}, members...)
	c := leaf("apiserver", "", ips, usage)
	c.DNSNames = []string{
		bed + ".local.cloudapp.azure.com", "localhost",
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		"kubernetes.kube-system", "kubernetes.kube-system.svc", "kubernetes.kube-system.svc.cluster.local",
	}
	return c
}

func (w wish) fulfil() error {
	const life = 30 * 365 * 24 * time.Hour
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	now := time.Now()
	w.is.SerialNumber, w.is.NotBefore, w.is.NotAfter = serial, now.Add(-time.Hour), now.Add(life)
	issuer, signer := w.is, key
	if w.issuer != nil {
		issuer, signer = w.issuer.parsed, w.issuer.private
	}
	der, err := x509.CreateCertificate(rand.Reader, w.is, issuer, &key.PublicKey, signer)
	if err != nil {
		return err
	}
	w.to.private = key
	w.to.cert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	w.to.key = string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	w.to.parsed, err = x509.ParseCertificate(der)
	return err
}

// files are the names and contents below /etc/kubernetes/certs of a node.
func (c *aksCertificates) files(n Node) map[string]string {
	files := map[string]string{"ca.crt": c.ca.cert}
	put := func(name string, p *pair) { files[name+".crt"], files[name+".key"] = p.cert, p.key }
	put("client", &c.client)
	put("kubeletserver", c.kubelets[n.Name])
	if n.Role != RoleMaster {
		return files
	}
	put("ca", &c.ca)
	put("apiserver", &c.apiServer)
	put("etcdserver", &c.etcdServer)
	put("etcdclient", &c.etcdClient)
	for i := range c.etcdPeers {
		put(fmt.Sprintf("etcdpeer%d", i), &c.etcdPeers[i])
	}
	put("proxy", &c.proxy)
	files["proxy-ca.crt"] = c.proxyCA.cert
	return files
}

// profile is the certificateProfile of an API model, as JSON.
func (c *aksCertificates) profile() (string, error) {
	p := map[string]any{}
	put := func(name string, of pair) { p[name+"Certificate"], p[name+"PrivateKey"] = of.cert, of.key }
	put("ca", c.ca)
	put("apiServer", c.apiServer)
	put("client", c.client)
	put("kubeConfig", c.kubeConfig)
	put("etcdServer", c.etcdServer)
	put("etcdClient", c.etcdClient)
	var certs, keys []string
	for _, peer := range c.etcdPeers {
		certs, keys = append(certs, peer.cert), append(keys, peer.key)
	}
	p["etcdPeerCertificates"], p["etcdPeerPrivateKeys"] = certs, keys
	text, err := json.MarshalIndent(p, "    ", "  ")
	return string(text), err
}

// inKubeconfig is PEM as kubeconfigs hold it.
func inKubeconfig(pem string) string { return base64.StdEncoding.EncodeToString([]byte(pem)) }
