// Package keyvaulttest is a Key Vault and a managed identity endpoint for
// tests of the extension: real TLS, real certificates, and every way to
// misbehave that a test asks for.
//
// Idea: the extension under test is a separate process with the documented
// URLs in its settings. So the double answers for every host name, behind an
// HTTPS proxy that leads all names to it, with certificates of its own CA.
//
// Invariant: it gives a secret only for a token that its identity endpoint
// issued for the resource of its challenge.
//
// Consequence for the operator: none; only tests import it.
package keyvaulttest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	pkcs12 "software.sslmate.com/src/go-pkcs12"
)

// Forms of a certificate's secret.
const (
	PEM    = "application/x-pem-file"
	PKCS12 = "application/x-pkcs12"
)

// ClientID is the only identity that the identity endpoint knows.
const ClientID = "b9f6dd56-d2d6-4967-99d7-8062d56fd84c"

// Server is the double. Its methods are safe for several goroutines.
type Server struct {
	t     testing.TB
	ca    *x509.Certificate
	key   *ecdsa.PrivateKey
	front *httptest.Server // identity endpoint and proxy
	vault *httptest.Server

	mu        sync.Mutex
	names     map[string]*tls.Certificate
	secrets   map[string][]Version // by "host/name", newest last
	tokens    map[string]string    // resource by token
	vaultHook func(w http.ResponseWriter, r *http.Request) bool
	imdsHook  func(w http.ResponseWriter, r *http.Request) bool
	resource  string
	log       []string
}

// Version is one version of a secret.
type Version struct {
	ID          string // 32 hex digits
	Leaf        *x509.Certificate
	Value       string
	ContentType string
}

// Start starts the double; it ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, names: map[string]*tls.Certificate{}, secrets: map[string][]Version{}, tokens: map[string]string{}}
	s.ca, s.key = s.Issue("Double CA", nil, nil, time.Hour)
	s.front = httptest.NewServer(http.HandlerFunc(s.serveFront))
	t.Cleanup(s.front.Close)
	s.vault = httptest.NewUnstartedServer(http.HandlerFunc(s.serveVault))
	s.vault.TLS = &tls.Config{GetCertificate: s.certificateFor}
	s.vault.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up are part of the tests
	s.vault.StartTLS()
	t.Cleanup(s.vault.Close)
	return s
}

// Issue makes a P-256 certificate, signed by parent or, with nil, by itself.
func (s *Server) Issue(name string, parent *x509.Certificate, parentKey crypto.Signer, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey) {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IsCA: strings.HasSuffix(name, " CA"),
	}
	if template.IsCA {
		template.KeyUsage, template.DNSNames = x509.KeyUsageCertSign, nil
	}
	signer := parentKey
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	return cert, key
}

func (s *Server) certificateFor(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.names[hello.ServerName]; ok {
		return c, nil
	}
	leaf, key := s.Issue(hello.ServerName, s.ca, s.key, time.Hour)
	s.names[hello.ServerName] = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
	return s.names[hello.ServerName], nil
}

// Environment is what a process needs to reach the double: its proxy and its CA.
func (s *Server) Environment() []string {
	file := filepath.Join(s.t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Raw}), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return []string{"HTTPS_PROXY=" + s.front.URL, "SSL_CERT_FILE=" + file}
}

// Client is an HTTP client that reaches the vault under every name.
func (s *Server) Client() *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(s.ca)
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, s.vault.Listener.Addr().String())
		},
	}}
}

// Identity is the base of the identity endpoint, for msiEndpoint.
func (s *Server) Identity() string { return s.front.URL + "/metadata/identity" }

// Put adds a version with the given value.
func (s *Server) Put(host, name, contentType, value string, leaf *x509.Certificate) Version {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	v := Version{ID: hex.EncodeToString(id), Leaf: leaf, Value: value, ContentType: contentType}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets[host+"/"+name] = append(s.secrets[host+"/"+name], v)
	return v
}

// Renew adds a version with a new certificate: leaf, intermediate, root, in a
// shuffled order, as PEM or PKCS12.
func (s *Server) Renew(host, name, form string) Version {
	s.t.Helper()
	middle, middleKey := s.Issue("Intermediate CA", s.ca, s.key, time.Hour)
	leaf, key := s.Issue(name+".example", middle, middleKey, time.Hour)
	value := ""
	if form == PKCS12 {
		pfx, err := pkcs12.Modern2023.Encode(key, leaf, []*x509.Certificate{s.ca, middle}, "")
		if err != nil {
			s.t.Fatal(err)
		}
		value = base64.StdEncoding.EncodeToString(pfx)
	} else {
		der, _ := x509.MarshalPKCS8PrivateKey(key)
		value = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		for _, c := range []*x509.Certificate{s.ca, leaf, middle} {
			value += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
		}
	}
	return s.Put(host, name, form, value, leaf)
}

// OnVault is asked before every answer of the vault, OnIdentity before every
// answer of the identity endpoint; returning true means that it has answered.
func (s *Server) OnVault(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vaultHook = f
}

// OnIdentity is described at OnVault.
func (s *Server) OnIdentity(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.imdsHook = f
}

// ChallengeResource sets the resource of the vault's challenge; empty: the right one.
func (s *Server) ChallengeResource(resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resource = resource
}

// Requests returns what was asked so far: "identity QUERY" and "vault HOST PATH".
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.log...)
}

func (s *Server) serveFront(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		s.tunnel(w)
		return
	}
	s.mu.Lock()
	s.log = append(s.log, "identity "+r.URL.RawQuery)
	hook := s.imdsHook
	s.mu.Unlock()
	if hook != nil && hook(w, r) {
		return
	}
	q := r.URL.Query()
	switch {
	case r.URL.Path != "/metadata/identity/oauth2/token":
		http.NotFound(w, r)
	case r.Header.Get("Metadata") != "true" || r.Header.Get("X-Forwarded-For") != "" || q.Get("api-version") == "" || q.Get("resource") == "":
		identityError(w, http.StatusBadRequest, "invalid_request", "Required metadata header not specified or incorrect")
	case q.Get("client_id") != ClientID && q.Get("client_id") != "":
		identityError(w, http.StatusBadRequest, "invalid_request", "Identity not found")
	default:
		raw := make([]byte, 24)
		_, _ = rand.Read(raw)
		token := "token." + hex.EncodeToString(raw)
		s.mu.Lock()
		s.tokens[token] = q.Get("resource")
		s.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":%q,"client_id":%q,"expires_in":"3600","expires_on":"%d","ext_expires_in":"3600","not_before":"%d","resource":%q,"token_type":"Bearer"}`,
			token, ClientID, time.Now().Add(time.Hour).Unix(), time.Now().Unix(), q.Get("resource"))
	}
}

func identityError(w http.ResponseWriter, status int, code, text string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": code, "error_description": text})
}

// tunnel leads every CONNECT to the vault.
func (s *Server) tunnel(w http.ResponseWriter) {
	client, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer client.Close()
	vault, err := net.Dial("tcp", s.vault.Listener.Addr().String())
	if err != nil {
		return
	}
	defer vault.Close()
	fmt.Fprint(client, "HTTP/1.1 200 Connection established\r\n\r\n")
	go func() {
		_, _ = io.Copy(vault, client)
		vault.Close()
	}()
	_, _ = io.Copy(client, vault)
}

func (s *Server) serveVault(w http.ResponseWriter, r *http.Request) {
	host, _, _ := strings.Cut(r.Host, ":")
	s.mu.Lock()
	s.log = append(s.log, "vault "+host+" "+r.URL.Path)
	hook, resource := s.vaultHook, s.resource
	granted, known := s.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
	s.mu.Unlock()
	if resource == "" {
		_, suffix, _ := strings.Cut(r.Host, ".")
		resource = "https://" + suffix
	}
	if !known || granted != resource {
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.example/tenant", resource="`+resource+`"`)
		Error(w, http.StatusUnauthorized, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token.")
		return
	}
	if hook != nil && hook(w, r) {
		return
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if r.URL.Query().Get("api-version") != "7.4" || len(parts) < 2 || parts[0] != "secrets" {
		Error(w, http.StatusBadRequest, "BadParameter", "", "bad request "+r.URL.String())
		return
	}
	v, ok := s.find(host, parts)
	if !ok {
		Error(w, http.StatusNotFound, "SecretNotFound", "", "A secret with (name/id) "+strings.Join(parts[1:], "/")+" was not found in this key vault.")
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"value": v.Value, "contentType": v.ContentType, "id": "https://" + r.Host + "/secrets/" + parts[1] + "/" + v.ID,
		"managed": true, "attributes": map[string]any{"enabled": true}, "kid": "https://" + r.Host + "/keys/" + parts[1] + "/" + v.ID,
	})
}

func (s *Server) find(host string, parts []string) (Version, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	versions := s.secrets[host+"/"+parts[1]]
	if len(parts) == 2 && len(versions) > 0 {
		return versions[len(versions)-1], true
	}
	for _, v := range versions {
		if len(parts) == 3 && v.ID == parts[2] {
			return v, true
		}
	}
	return Version{}, false
}

// Error answers as Key Vault does.
func Error(w http.ResponseWriter, status int, code, inner, message string) {
	body := map[string]any{"code": code, "message": message}
	if inner != "" {
		body["innererror"] = map[string]string{"code": inner}
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": body})
}
