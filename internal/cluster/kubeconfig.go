package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/url"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/fault"
)

// MaxKubeconfig is the largest kubeconfig that is read, in bytes.
const MaxKubeconfig = 256 << 10

// Kubeconfig is what a kubeconfig says of its current context, and nothing else:
// one cluster and one user, with all they need inside. Its JSON is a kubeconfig.
type Kubeconfig struct {
	Server     string // URL of the API server
	ServerName string // in its certificate, where it is not the URL's host
	CA         []byte // PEM; empty: the trust roots of whoever connects
	Cert, Key  []byte // PEM; empty: Token is there
	Token      string
	Namespace  string // default namespace; mostly empty
}

// The document (Kubernetes client configuration, v1). Members that are read only to be refused are of any type.
type (
	document struct {
		APIVersion     string         `json:"apiVersion,omitempty"`
		Kind           string         `json:"kind,omitempty"`
		Clusters       []namedCluster `json:"clusters"`
		Users          []namedUser    `json:"users"`
		Contexts       []namedContext `json:"contexts"`
		CurrentContext string         `json:"current-context"`
		Preferences    any            `json:"preferences,omitempty"`
		Extensions     any            `json:"extensions,omitempty"`
	}
	namedCluster struct {
		Name    string   `json:"name"`
		Cluster endpoint `json:"cluster"`
	}
	endpoint struct {
		Server     string `json:"server"`
		ServerName string `json:"tls-server-name,omitempty"`
		CA         []byte `json:"certificate-authority-data,omitempty"`
		CAFile     string `json:"certificate-authority,omitempty"`
		Insecure   bool   `json:"insecure-skip-tls-verify,omitempty"`
		Proxy      string `json:"proxy-url,omitempty"`
		Compress   any    `json:"disable-compression,omitempty"`
		Extensions any    `json:"extensions,omitempty"`
	}
	namedUser struct {
		Name string `json:"name"`
		User user   `json:"user"`
	}
	user struct {
		Cert      []byte `json:"client-certificate-data,omitempty"`
		Key       []byte `json:"client-key-data,omitempty"`
		Token     string `json:"token,omitempty"`
		CertFile  string `json:"client-certificate,omitempty"`
		KeyFile   string `json:"client-key,omitempty"`
		TokenFile string `json:"tokenFile,omitempty"`
		Exec      any    `json:"exec,omitempty"`
		Provider  any    `json:"auth-provider,omitempty"`
		Username  string `json:"username,omitempty"`
		Password  string `json:"password,omitempty"`
		As        string `json:"as,omitempty"`
		AsUID     string `json:"as-uid,omitempty"`
		AsGroups  any    `json:"as-groups,omitempty"`
		AsExtra   any    `json:"as-user-extra,omitempty"`
		Extension any    `json:"extensions,omitempty"`
	}
	namedContext struct {
		Name    string `json:"name"`
		Context struct {
			Cluster    string `json:"cluster"`
			User       string `json:"user"`
			Namespace  string `json:"namespace,omitempty"`
			Extensions any    `json:"extensions,omitempty"`
		} `json:"context"`
	}
)

// ParseKubeconfig reads a kubeconfig, JSON or YAML. It refuses all that would make
// whoever uses it run a program, read a file, or trust a server unseen; the errors
// name the member and how to get a kubeconfig that does without.
func ParseKubeconfig(text []byte, now time.Time) (Kubeconfig, error) {
	k := Kubeconfig{}
	if len(text) > MaxKubeconfig {
		return k, fault.New(fault.TooLarge, "InvalidKubeconfig", "The kubeconfig is larger than %d bytes.", MaxKubeconfig).At(atKubeconfig)
	}
	var d document
	if err := yaml.UnmarshalStrict(text, &d); err != nil {
		return k, badKubeconfig("", "it cannot be read as one").Because(err)
	}
	at := "contexts[" + d.CurrentContext + "]"
	for _, c := range d.Contexts {
		if c.Name != d.CurrentContext {
			continue
		}
		k.Namespace = c.Context.Namespace
		if err := k.takeCluster(d.Clusters, c.Context.Cluster); err != nil {
			return k, err
		}
		if err := k.takeUser(d.Users, c.Context.User); err != nil {
			return k, err
		}
		return k, k.check(now)
	}
	return k, badKubeconfig(at, "its current context %q is not there", d.CurrentContext).WithFix("kubectl config use-context NAME")
}

func (k *Kubeconfig) takeCluster(all []namedCluster, name string) error {
	for _, c := range all {
		if c.Name != name {
			continue
		}
		at, e := "clusters["+name+"].", c.Cluster
		switch {
		case e.CAFile != "":
			return refersToFile(at + "certificate-authority")
		case e.Insecure:
			return badKubeconfig(at+"insecure-skip-tls-verify", "it trusts any server").WithFix("put the cluster's CA into certificate-authority-data")
		case e.Proxy != "":
			return badKubeconfig(at+"proxy-url", "a proxy for one cluster is not offered").WithFix("set HTTPS_PROXY where keyfleet-connector runs")
		}
		k.Server, k.ServerName, k.CA = e.Server, e.ServerName, e.CA
		return nil
	}
	return badKubeconfig("clusters", "the cluster %q of its current context is not there", name)
}

func (k *Kubeconfig) takeUser(all []namedUser, name string) error {
	for _, n := range all {
		if n.Name != name {
			continue
		}
		at, u := "users["+name+"].", n.User
		switch {
		case u.Exec != nil:
			return badKubeconfig(at+"exec", "it runs a program to log in").WithFix(withAccount)
		case u.Provider != nil:
			return badKubeconfig(at+"auth-provider", "it asks another service to log in").WithFix(withAccount)
		case u.CertFile != "":
			return refersToFile(at + "client-certificate")
		case u.KeyFile != "":
			return refersToFile(at + "client-key")
		case u.TokenFile != "":
			return refersToFile(at + "tokenFile")
		case u.Username != "" || u.Password != "":
			return badKubeconfig(at+"username", "API servers take no passwords any more").WithFix(withAccount)
		case u.As != "" || u.AsUID != "" || u.AsGroups != nil || u.AsExtra != nil:
			return badKubeconfig(at+"as", "it acts in somebody else's name").WithFix("leave out as, as-uid, as-groups and as-user-extra")
		}
		k.Cert, k.Key, k.Token = u.Cert, u.Key, u.Token
		return nil
	}
	return badKubeconfig("users", "the user %q of its current context is not there", name)
}

// check looks at what was taken: the URL, the certificates, and that there is a credential.
func (k *Kubeconfig) check(now time.Time) error {
	u, err := url.Parse(k.Server)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return badKubeconfig("server", "'%.200s' is not the https URL of an API server", k.Server)
	}
	if len(k.CA) > 0 && !x509.NewCertPool().AppendCertsFromPEM(k.CA) {
		return badKubeconfig("certificate-authority-data", "there is no certificate in it")
	}
	if len(k.Cert) == 0 && len(k.Key) == 0 {
		if k.Token == "" {
			return badKubeconfig("users", "its user has neither a certificate nor a token").WithFix(withAccount)
		}
		return nil
	}
	pair, err := tls.X509KeyPair(k.Cert, k.Key)
	if err != nil {
		return badKubeconfig("client-certificate-data", "certificate and key do not fit each other, or are none").Because(err)
	}
	if pair.Leaf != nil && now.After(pair.Leaf.NotAfter) {
		return badKubeconfig("client-certificate-data", "the certificate ended at %s", pair.Leaf.NotAfter.UTC().Format(time.RFC3339)).
			WithFix("kubeadm certs renew admin.conf, or keyfleet rotate-certs where more has ended")
	}
	return nil
}

// Document is the kubeconfig as a file, whose only cluster, user and context have a name.
func (k Kubeconfig) Document(name string) ([]byte, error) {
	d := document{
		APIVersion: "v1", Kind: "Config", CurrentContext: name,
		Clusters: []namedCluster{{Name: name, Cluster: endpoint{Server: k.Server, ServerName: k.ServerName, CA: k.CA}}},
		Users:    []namedUser{{Name: name, User: user{Cert: k.Cert, Key: k.Key, Token: k.Token}}},
	}
	c := namedContext{Name: name}
	c.Context.Cluster, c.Context.User, c.Context.Namespace = name, name, k.Namespace
	d.Contexts = []namedContext{c}
	text, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return yaml.JSONToYAML(text)
}

const (
	atKubeconfig = "properties.kubeconfig"
	withAccount  = "make a service account with the role in deploy/manager-role.yaml, and give a kubeconfig with its token"
)

func badKubeconfig(at, why string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "InvalidKubeconfig", "The kubeconfig cannot be used: "+why+".", args...).At(strings.TrimSuffix(atKubeconfig+"."+at, "."))
}

func refersToFile(at string) error {
	return badKubeconfig(at, "it refers to a file of the machine where it was made").WithFix("kubectl config view --raw --flatten --minify > FILE")
}
