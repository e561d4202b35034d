package cli

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"keyfleet.dev/keyfleet/api/keyfleet"
)

// double is a server that answers what a script's file says, over TLS and
// under all of the server's names. What this package is tested for with it is
// its output, its exit codes and the requests it sends; whether a server takes
// them is tested with a real one.
//
// The file holds blocks; the host is the first label of the name. The same
// block head several times answers in turn, the last one for ever:
//
//	== GET arm /subscriptions
//	200 Retry-After=1
//	{"value":[]}
type double struct {
	srv     *httptest.Server
	ca      []byte
	mu      sync.Mutex
	replies map[string][]reply
	asked   []string
}

type reply struct {
	status int
	header http.Header
	body   string
}

const (
	doubleSubscription = "11111111-2222-3333-4444-555555555555"
	doubleSecret       = "kf_canary-client-secret"
	doubleToken        = "canary-token"
)

func newDouble(tb fataler, text string) *double {
	tb.Helper()
	d := &double{replies: map[string][]reply{}}
	d.parse(tb, text)
	d.srv = httptest.NewUnstartedServer(d)
	d.srv.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are part of the tests
	d.srv.TLS = &tls.Config{GetCertificate: d.certificates(tb)}
	d.srv.StartTLS()
	return d
}

func (d *double) parse(tb fataler, text string) {
	var key string
	var rep *reply
	flush := func() {
		if rep != nil {
			rep.body = strings.TrimSpace(rep.body)
			d.replies[key] = append(d.replies[key], *rep)
		}
	}
	sc := bufio.NewScanner(strings.NewReader(text))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "== "):
			flush()
			key, rep = strings.TrimSpace(line[3:]), nil
		case rep == nil && strings.TrimSpace(line) == "":
		case rep == nil:
			f := strings.Fields(line)
			rep = &reply{header: http.Header{}}
			if _, err := fmt.Sscan(f[0], &rep.status); err != nil {
				tb.Fatalf("the double's file: %q is no status", line)
			}
			for _, h := range f[1:] {
				k, v, _ := strings.Cut(h, "=")
				rep.header.Set(k, strings.ReplaceAll(v, "~", " "))
			}
		default:
			rep.body += line + "\n"
		}
	}
	flush()
}

// certificates makes a certificate for every name that is asked for.
func (d *double) certificates(tb fataler) func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "double"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0), KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	d.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	return func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(2), DNSNames: []string{hello.ServerName}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, key)
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
	}
}

// endpoints are the names of the double.
func (d *double) endpoints() keyfleet.Endpoints {
	e := d.names()
	e.Listen = d.srv.Listener.Addr().String()
	return e
}

func (d *double) names() keyfleet.Endpoints {
	return keyfleet.Endpoints{
		ResourceManager: "https://arm.kf.test:8443", Login: "https://login.kf.test:8443", Node: "https://node.kf.test:8443",
		VaultSuffix: "vault.kf.test:8443", BatchSuffix: "batch.kf.test:8443",
	}
}

// writeAdmin writes admin.json and ca.crt as a server does.
func (d *double) writeAdmin(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(keyfleet.Admin{
		Endpoints: d.endpoints(), Tenant: "tenant-1", Subscription: doubleSubscription, ClientID: "client-1", ClientSecret: doubleSecret, CAFile: "ca.crt",
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), d.ca, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "admin.json"), b, 0o600)
}

func (d *double) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	host, _, _ := strings.Cut(r.Host, ".")
	w.Header().Set("x-ms-request-id", "req-1")
	w.Header().Set("request-id", "req-1")
	if host == "login" {
		d.token(w, body)
		return
	}
	query := r.URL.Query()
	query.Del("api-version")
	key := r.Method + " " + host + " " + r.URL.Path
	d.mu.Lock()
	var compact bytes.Buffer
	if json.Compact(&compact, body) != nil {
		compact.Reset()
		compact.Write(body)
	}
	line := key
	if len(query) > 0 {
		line += "?" + query.Encode()
	}
	for _, h := range []string{"Prefer", "If-Match", "If-None-Match"} {
		if v := r.Header.Get(h); v != "" {
			line += " " + h + ":" + v
		}
	}
	d.asked = append(d.asked, strings.TrimSpace(line+" "+compact.String()))
	list := d.replies[key]
	if len(list) > 1 {
		d.replies[key] = list[1:]
	}
	d.mu.Unlock()
	if len(list) == 0 {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"error":{"code":"NotInDouble","message":"The double has no answer to %s."}}`, key)
		return
	}
	for k, v := range list[0].header {
		w.Header()[k] = v
	}
	w.WriteHeader(list[0].status)
	_, _ = io.WriteString(w, list[0].body)
}

func (d *double) token(w http.ResponseWriter, body []byte) {
	if !bytes.Contains(body, []byte("client_secret="+doubleSecret)) {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret provided."}`)
		return
	}
	fmt.Fprintf(w, `{"token_type":"Bearer","expires_in":3600,"access_token":%q}`, doubleToken)
}

// The commands of scripts. "double FILE" starts a server and puts its data
// directory into $DATA; "requests" prints what it was asked and forgets it;
// "asked WORDS" waits until it was asked something.
type doubles struct {
	mu sync.Mutex
	of map[string]*double // by the script's directory
}

func (ds *doubles) commands() map[string]func(ts *testscript.TestScript, neg bool, args []string) {
	return map[string]func(ts *testscript.TestScript, neg bool, args []string){
		"double":   ds.start,
		"requests": ds.requests,
		"asked":    ds.asked,
		"mode":     mode,
	}
}

func (ds *doubles) start(ts *testscript.TestScript, _ bool, args []string) {
	d := newDouble(scriptTB{ts}, ts.ReadFile(args[0]))
	ts.Defer(d.srv.Close)
	dir := ts.MkAbs("data")
	ts.Check(d.writeAdmin(dir))
	ts.Setenv("DATA", dir)
	ts.Setenv("ADDRESS", d.srv.Listener.Addr().String())
	ds.mu.Lock()
	ds.of[ts.MkAbs(".")] = d
	ds.mu.Unlock()
}

func (ds *doubles) requests(ts *testscript.TestScript, _ bool, _ []string) {
	ds.mu.Lock()
	d := ds.of[ts.MkAbs(".")]
	ds.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintln(ts.Stdout(), strings.Join(d.asked, "\n"))
	d.asked = nil
}

// asked WORDS waits until a request that holds the words has come.
func (ds *doubles) asked(ts *testscript.TestScript, _ bool, args []string) {
	ds.mu.Lock()
	d := ds.of[ts.MkAbs(".")]
	ds.mu.Unlock()
	words := strings.Join(args, " ")
	for deadline := time.Now().Add(10 * time.Second); ; {
		d.mu.Lock()
		for _, line := range d.asked {
			if strings.Contains(line, words) {
				d.mu.Unlock()
				return
			}
		}
		d.mu.Unlock()
		if time.Now().After(deadline) {
			ts.Fatalf("nobody asked for %q", words)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// mode FILE PERM checks a file's permissions.
func mode(ts *testscript.TestScript, neg bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); (got == args[1]) == neg {
		ts.Fatalf("%s has mode %s", args[0], got)
	}
}

// fataler is what the double needs of a test.
type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// scriptTB makes a script's end look like a test's.
type scriptTB struct{ ts *testscript.TestScript }

func (s scriptTB) Fatal(args ...any)            { s.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (s scriptTB) Fatalf(f string, args ...any) { s.ts.Fatalf(f, args...) }
func (s scriptTB) Helper()                      {}
