package system

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"software.sslmate.com/src/go-pkcs12"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/packages/build"
	"keyfleet.dev/keyfleet/test/stack"
)

// No secret where none belongs.
//
// The run uses everything that handles secrets, with values of its own, on
// paths that succeed and on paths that fail, and keeps every error that comes
// back. Then all places where a secret must not be are searched for every
// value, in every way in which it may be written. That the search finds what
// is there is tried too: with planted values, and with the few places where
// secrets belong.

// hunt is one run.
type hunt struct {
	*system
	http     *http.Client
	canaries []*canary
	places   map[string][]byte // by name; error answers are numbered
	errors   int
}

// nodeExtension shows that protected settings arrive: it decrypts them as handlers
// do and reports the SHA-256 of the password in them.
const nodeExtension = `#!/bin/sh
set -e
[ "$1" = enable ] || exit 0
settings=$(ls -t config/*.settings | head -n 1)
number=$(basename "$settings" .settings)
thumb=$(sed -n 's/.*"protectedSettingsCertThumbprint" *: *"\([^"]*\)".*/\1/p' "$settings")
sum=$(sed -n 's/.*"protectedSettings" *: *"\([^"]*\)".*/\1/p' "$settings" | base64 -d |
	openssl cms -decrypt -inform DER -recip "../$thumb.crt" -inkey "../$thumb.prv" |
	sed -n 's/.*"password" *: *"\([^"]*\)".*/\1/p' | tr -d '\n' | sha256sum | cut -d' ' -f1)
echo "enabled with $number"
printf '[{"version":"1.0","timestampUTC":"2026-01-01T00:00:00Z","status":{"operation":"enable","status":"success","code":0,"formattedMessage":{"lang":"en-US","message":"password %s"}}}]' "$sum" > "status/$number.status.tmp"
mv "status/$number.status.tmp" "status/$number.status"
`

// packagesWithOurs is a packages folder with the Key Vault extension and ours.
func packagesWithOurs(t *testing.T, bin string) string {
	t.Helper()
	dir := t.TempDir()
	own, err := filepath.Glob(filepath.Join(bin, "packages", "*.zip"))
	if err != nil || len(own) != 1 {
		t.Fatalf("packages of the build: %v %v", own, err)
	}
	if err := os.Symlink(own[0], filepath.Join(dir, filepath.Base(own[0]))); err != nil {
		t.Fatal(err)
	}
	var zip bytes.Buffer
	err = build.Write(&zip, []build.File{
		{Name: "handler.sh", Content: []byte(nodeExtension), Executable: true},
		{Name: build.ManifestName, Content: []byte(`[{"name":"Example.Canary.CanaryForLinux","version":1.0,"handlerManifest":{
			"installCommand":"handler.sh install","uninstallCommand":"handler.sh uninstall","updateCommand":"handler.sh update",
			"enableCommand":"handler.sh enable","disableCommand":"handler.sh disable","rebootAfterInstall":false,"reportHeartbeat":false}}]`)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "Example.Canary.CanaryForLinux-1.0.0.zip"), zip.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// invent makes a value that every encoding changes; inventWord one that fits everywhere.
func (h *hunt) invent(name string) string {
	h.T.Helper()
	return h.add(name, []byte(`q"<&é>\/+ `+rand.Text()), nil)
}

func (h *hunt) inventWord(name string) string {
	h.T.Helper()
	return h.add(name, []byte("kfcanary"+rand.Text()), nil)
}

func (h *hunt) add(name string, value []byte, allowed func(string) bool) string {
	h.canaries = append(h.canaries, &canary{name, value, allowed})
	return string(value)
}

// addToken adds the secret part of a signed token, its signature, and the whole.
func (h *hunt) addToken(name, jwt string) string {
	h.T.Helper()
	i := strings.LastIndexByte(jwt, '.')
	if strings.Count(jwt, ".") != 2 {
		h.T.Fatalf("%s is no token", name)
	}
	return h.add(name, []byte(jwt[i+1:]), nil) // other tokens share the rest
}

// addKey adds a private key: its number, in bytes and in decimal, and the lines that PEM makes of it.
func (h *hunt) addKey(name string, key any) {
	h.T.Helper()
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		h.T.Fatalf("%s is a %T", name, key)
	}
	d, err := k.Bytes()
	if err != nil {
		h.T.Fatal(err)
	}
	delivered := func(path string) bool {
		return strings.HasPrefix(path, "nodes/") && strings.Contains(path, "/waagent/Microsoft.Azure.KeyVault/")
	}
	h.add(name, d, delivered)
	h.add(name+", decimal", []byte(new(big.Int).SetBytes(d).String()), delivered)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		h.T.Fatal(err)
	}
	// A line is 48 bytes: the number's first bytes end one, the others begin the next.
	at := bytes.Index(der, d)
	text := base64.StdEncoding.EncodeToString(der)
	h.add(name+", PEM line 1", []byte(text[(at+2)/3*4:64]), delivered)
	h.add(name+", PEM line 2", []byte(text[64:(at+len(d))/3*4]), delivered)
}

// request is one call whose answer is kept when it is an error.
type request struct {
	why, method, url, body string
	header                 map[string]string
	want                   int
}

// token is for the host of the URL.
func (h *hunt) token(url string) string {
	h.T.Helper()
	e := h.Client.Endpoints()
	resource := e.ResourceManager
	switch host := strings.TrimPrefix(url, "https://"); {
	case strings.HasPrefix(url, e.Login), strings.HasPrefix(url, e.Node):
		return ""
	case strings.Contains(host, "."+e.VaultSuffix):
		resource = "https://" + e.VaultSuffix
	case strings.Contains(host, "."+e.BatchSuffix):
		resource = "https://" + e.BatchSuffix + "/"
	}
	tok, err := h.Client.Token(h.ctx, resource)
	if err != nil {
		h.T.Fatal(err)
	}
	return tok.Reveal()
}

// send makes the call, keeps the answer if it is an error, and checks the status.
func (h *hunt) send(r request) []byte {
	h.T.Helper()
	hr, err := http.NewRequestWithContext(h.ctx, r.method, r.url, strings.NewReader(r.body))
	if err != nil {
		h.T.Fatal(err)
	}
	hr.Header.Set("Content-Type", "application/json")
	if t := h.token(r.url); t != "" {
		hr.Header.Set("Authorization", "Bearer "+t)
	}
	for k, v := range r.header {
		hr.Header.Set(k, v)
	}
	resp, err := h.http.Do(hr)
	if err != nil {
		h.T.Fatalf("%s: %v", r.why, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		h.T.Fatalf("%s: %v", r.why, err)
	}
	if resp.StatusCode != r.want {
		h.T.Errorf("%s: got %d %s, want %d", r.why, resp.StatusCode, body, r.want)
	}
	if resp.StatusCode >= 400 {
		h.errors++
		var all bytes.Buffer
		fmt.Fprintf(&all, "%d\n", resp.StatusCode)
		_ = resp.Header.Write(&all)
		all.Write(body)
		h.places[fmt.Sprintf("error answer %d (%s)", h.errors, r.why)] = all.Bytes()
	}
	return body
}

// answer keeps an answer that is no error, but must not show secrets either.
func (h *hunt) answer(url string) {
	h.T.Helper()
	h.places["answer "+url] = h.send(request{why: "GET " + url, method: "GET", url: url, want: 200})
}

func quote(s string) string { b, _ := json.Marshal(s); return string(b) } // a string always encodes

// program runs one of ours against the data directory and returns its output.
func (h *hunt) program(name string, args ...string) []byte {
	h.T.Helper()
	cmd := exec.CommandContext(h.ctx, filepath.Join(h.Bin, name), args...)
	cmd.Env = append(os.Environ(), "KEYFLEET_FROM="+h.Dir)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		h.T.Fatalf("%s %s: %v\n%s", name, args[0], err, errs.Bytes())
	}
	return out
}

// TestNoSecretWhereNoneBelongs is the search described above.
func TestNoSecretWhereNoneBelongs(t *testing.T) {
	bin := stack.Build(t, "")
	h := &hunt{places: map[string][]byte{}}
	h.system = start(t, stack.Config{Bin: bin, Args: []string{"--packages", packagesWithOurs(t, bin), "--log-level", "debug", "--log-format", "json"}})
	h.http = &http.Client{Transport: &http.Transport{TLSClientConfig: h.Client.TLSConfig(), DialContext: h.Client.DialContext}}
	procs := watchProcesses()
	defer procs.stop()

	h.servers()
	group := h.group("rg")
	id, clientID, objectID := h.identity(group, "nodes")
	h.vault(group, "vault1", objectID)
	h.secrets()
	h.certificates()
	h.applications()
	h.account(group+"/providers/Microsoft.Batch/batchAccounts/acct1", "westus2")
	pool := group + "/providers/Microsoft.Batch/batchAccounts/acct1/pools/p1"
	node := h.pool(pool, id, clientID)
	h.inside(node, clientID)
	h.badRequests(pool)
	h.renew()
	h.look(pool, node)

	s := newScanner(t, h.canaries)
	planted := s.control(t, h.canaries)
	files, belong := h.searchAll(s, procs)
	t.Logf("searched %d canaries in %d forms (%d patterns) in %d places: log, %d files, %d processes (%d command lines and environments), %d error answers, others; %d MiB",
		len(h.canaries), len(s.forms), s.n, files+len(h.places), files, procs.seen(), procs.texts(), h.errors, s.bytes>>20)
	t.Logf("control: %d planted forms found; %d finds in files where secrets belong", planted, belong)
}

// servers adds what the server made for itself at its first start.
func (h *hunt) servers() {
	h.T.Helper()
	admin, err := client.ReadAdmin(h.Dir)
	if err != nil {
		h.T.Fatal(err)
	}
	h.add("administrator's secret", []byte(admin.ClientSecret.Reveal()), func(p string) bool { return p == "admin.json" })
	kek, err := os.ReadFile(filepath.Join(h.Dir, "kek"))
	if err != nil {
		h.T.Fatal(err)
	}
	lines := strings.Fields(string(kek))
	h.add("kek", []byte(lines[len(lines)-1]), func(p string) bool { return p == "kek" })
	e := h.Client.Endpoints()
	for name, url := range map[string]string{"ARM token": e.ResourceManager, "vault token": "https://x." + e.VaultSuffix, "Batch token": "https://x." + e.BatchSuffix} {
		h.addToken(name, h.token(url))
	}
}

func (h *hunt) secrets() {
	h.T.Helper()
	url := h.Client.Vault("vault1", "/secrets/")
	set := func(name, value string, want int) {
		h.T.Helper()
		h.send(request{why: "set secret " + name, method: "PUT", url: url + name + "?api-version=7.4", body: `{"value":` + quote(value) + `}`, want: want})
	}
	set("plain", h.invent("secret"), 200)
	set("plain", h.invent("second version of the secret"), 200)
	set("tagged", h.inventWord("secret of one word"), 200)
	set("gone", h.invent("deleted secret"), 200)
	h.send(request{why: "delete", method: "DELETE", url: url + "gone?api-version=7.4", want: 200})
	set("gone", h.invent("secret over a deleted one"), 409)
	set("long", strings.Repeat(h.invent("too long secret"), 1000), 400)
	h.send(request{why: "too large a body", method: "PUT", url: url + "big?api-version=7.4", body: `{"value":` + quote(strings.Repeat(h.invent("secret in too large a body"), 60000)) + `}`, want: 413})
	h.send(request{why: "missing secret", method: "GET", url: url + "nothere?api-version=7.4", want: 404})
	h.send(request{why: "no such vault", method: "PUT", url: h.Client.Vault("nosuchvault", "/secrets/a?api-version=7.4"), body: `{"value":` + quote(h.invent("secret for no vault")) + `}`, want: 404})
}

// secretOf reads a certificate's secret.
func (h *hunt) secretOf(name string) string {
	h.T.Helper()
	var out struct{ Value string }
	h.call(http.MethodGet, h.Client.Vault("vault1", "/secrets/"+name), "7.4", nil, &out)
	return out.Value
}

func (h *hunt) pemKey(name, value string) {
	h.T.Helper()
	for rest := []byte(value); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			h.T.Fatalf("%s: no private key in the secret", name)
		}
		if key, err := x509.ParsePKCS8PrivateKey(b.Bytes); err == nil {
			h.addKey(name, key)
			return
		}
	}
}

func (h *hunt) certificates() {
	h.T.Helper()
	h.certificate("vault1", "web", nil)
	h.pemKey("key of the certificate", h.secretOf("web"))
	h.certificate("vault1", "pfx", func(policy map[string]any) {
		policy["secret_props"] = map[string]any{"contentType": "application/x-pkcs12"}
	})
	value := h.secretOf("pfx")
	h.add("PFX", []byte(value[len(value)/3:len(value)/3+3*window]), nil)
	der, err := base64.StdEncoding.DecodeString(value)
	if err != nil {
		h.T.Fatal(err)
	}
	key, _, _, err := pkcs12.DecodeChain(der, "")
	if err != nil {
		h.T.Fatal(err)
	}
	h.addKey("key in the PFX", key)
}

// applications makes one, uses it where it may do nothing, and tries wrong secrets.
func (h *hunt) applications() {
	h.T.Helper()
	var app struct {
		AppID      string
		SecretText string
	}
	apps := h.Client.ARM("/keyfleet/v1/applications")
	h.call(http.MethodPost, apps, "", map[string]any{"displayName": "other"}, &app)
	h.add("client secret", []byte(app.SecretText), nil)
	var second struct{ SecretText string }
	h.call(http.MethodPost, apps+"/"+app.AppID+"/secrets", "", nil, &second)
	h.add("second client secret", []byte(second.SecretText), nil)

	e := h.Client.Endpoints()
	form := map[string]string{"Content-Type": "application/x-www-form-urlencoded"}
	body := func(secret string) string {
		return "grant_type=client_credentials&client_id=" + app.AppID + "&client_secret=" + secret + "&scope=https://" + e.VaultSuffix + "/.default"
	}
	var token struct {
		AccessToken string `json:"access_token"`
	}
	v2 := e.Login + "/common/oauth2/v2.0/token"
	if err := json.Unmarshal(h.send(request{why: "token", method: "POST", url: v2, header: form, body: body(second.SecretText), want: 200}), &token); err != nil {
		h.T.Fatal(err)
	}
	h.addToken("vault token of the other application", token.AccessToken)
	other := map[string]string{"Authorization": "Bearer " + token.AccessToken}
	url := h.Client.Vault("vault1", "/secrets/plain?api-version=7.4")
	h.send(request{why: "get what is forbidden", method: "GET", url: url, header: other, want: 403})
	h.send(request{why: "set what is forbidden", method: "PUT", url: url, header: other, body: `{"value":` + quote(h.invent("forbidden secret")) + `}`, want: 403})
	h.send(request{why: "vault token at ARM", method: "GET", url: h.Client.ARM("/subscriptions?api-version=2021-04-01"), header: other, want: 401})

	h.send(request{why: "wrong client secret", method: "POST", url: v2, header: form, body: body(h.inventWord("wrong client secret")), want: 401})
	h.send(request{why: "secret in the query", method: "POST", url: v2 + "?client_secret=" + h.inventWord("client secret in the query"), header: form, body: "grant_type=client_credentials", want: 400})
	h.send(request{why: "secret twice", method: "POST", url: v2, header: form, body: body("a") + "&client_secret=" + h.inventWord("client secret given twice"), want: 400})
	h.send(request{why: "broken form", method: "POST", url: v2, header: form, body: body(h.inventWord("client secret in a broken form")) + "&%zz", want: 400})
	h.send(request{why: "secret as a scope", method: "POST", url: v2, header: form, body: "grant_type=client_credentials&client_id=" + app.AppID + "&client_secret=" + h.inventWord("client secret with a bad scope"), want: 400})
	basic := base64.StdEncoding.EncodeToString([]byte(app.AppID + ":" + h.inventWord("client secret in the header")))
	h.send(request{
		why: "wrong secret in the header", method: "POST", url: v2, header: map[string]string{"Content-Type": form["Content-Type"], "Authorization": "Basic " + basic},
		body: "grant_type=client_credentials&scope=https://" + e.VaultSuffix + "/.default", want: 401,
	})
}

// pool makes a pool with the Key Vault extension and ours, and waits for its node.
func (h *hunt) pool(pool, identity, clientID string) (node string) {
	h.T.Helper()
	h.call(http.MethodPut, h.Client.ARM("/keyfleet/v1/extensiontypes/Example.Canary/CanaryForLinux"), "", map[string]any{"os": "linux"}, nil)
	password := h.inventWord("protected setting")
	h.put(pool, "2021-01-01", map[string]any{
		"identity": map[string]any{"type": "UserAssigned", "userAssignedIdentities": map[string]any{identity: map[string]any{}}},
		"properties": map[string]any{
			"vmSize": "STANDARD_DS2_V2", "scaleSettings": map[string]any{"fixedScale": map[string]any{"targetDedicatedNodes": 1}},
			"deploymentConfiguration": map[string]any{"virtualMachineConfiguration": map[string]any{
				"imageReference": map[string]any{"publisher": "canonical", "offer": "ubuntuserver", "sku": "20.04-lts", "version": "latest"},
				"nodeAgentSkuId": "batch.node.ubuntu 20.04",
				"extensions": []any{
					map[string]any{
						"name": "kv", "publisher": "Microsoft.Azure.KeyVault", "type": "KeyVaultForLinux", "typeHandlerVersion": "3.0", "autoUpgradeMinorVersion": true,
						"settings": map[string]any{
							"secretsManagementSettings": map[string]any{
								"pollingIntervalInS": "300", "certificateStoreLocation": "/var/lib/waagent/Microsoft.Azure.KeyVault", "requireInitialSync": true,
								"observedCertificates": []string{h.Client.Vault("vault1", "/secrets/web"), h.Client.Vault("vault1", "/secrets/pfx")},
							},
							"authenticationSettings": map[string]any{"msiEndpoint": "http://169.254.169.254/metadata/identity", "msiClientId": clientID},
						},
					},
					map[string]any{
						"name": "canary", "publisher": "Example.Canary", "type": "CanaryForLinux", "typeHandlerVersion": "1.0", "autoUpgradeMinorVersion": true,
						"settings": map[string]any{"public": "yes"}, "protectedSettings": map[string]any{"password": password},
					},
				},
			}},
		},
	}, nil)
	node = h.idle("acct1", "westus2", "p1", 1)[0]
	sum := sha256.Sum256([]byte(password))
	view := h.send(request{why: "the canary extension", method: "GET", url: h.batchURL("/pools/p1/nodes/" + node + "/extensions/canary"), want: 200})
	if !strings.Contains(string(view), hex.EncodeToString(sum[:])) {
		h.T.Errorf("the protected setting did not arrive at the extension: %s", view)
	}
	h.places["answer: canary extension"] = view
	return node
}

func (h *hunt) batchURL(path string) string {
	return h.Client.Batch("acct1.westus2."+h.Client.Endpoints().BatchSuffix, path) + "?api-version=2021-06-01.14.0"
}

// inside gets tokens where programs on a node get them.
func (h *hunt) inside(node, clientID string) {
	h.T.Helper()
	for name, resource := range map[string]string{"vault": "https://" + h.Client.Endpoints().VaultSuffix, "ARM": h.Client.Endpoints().ResourceManager} {
		out := h.program("keyfleet", "node", "shell", "--no-tty", "p1", node, "--", "curl", "-sS", "-H", "Metadata: true",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&client_id="+clientID+"&resource="+resource)
		var token struct {
			AccessToken string `json:"access_token"`
		}
		if err := json.Unmarshal(out, &token); err != nil {
			h.T.Fatalf("the node's metadata service: %v: %s", err, out)
		}
		h.addToken("node's token for "+name, token.AccessToken)
	}
}

// badRequests puts secrets where the server finds something to complain about.
func (h *hunt) badRequests(pool string) {
	h.T.Helper()
	secret := h.Client.Vault("vault1", "/secrets/bad?api-version=7.4")
	for why, format := range map[string]string{
		"no comma after a secret": `{"value":%s "tags":{}}`, "a list of secrets": `{"value":[%s]}`, "a secret for attributes": `{"value":"a","attributes":%s}`,
		"a secret after the end": `{"value":"a"} %s`, "a secret without its end": `{"value":%.20s`, "a secret alone": `%s`, "a secret for a time": `{"value":"a","attributes":{"exp":%s}}`,
	} {
		h.send(request{why: why, method: "PUT", url: secret, body: fmt.Sprintf(format, quote(h.inventWord(why))), want: 400})
	}
	arm := h.Client.ARM(pool+"2") + "?api-version=2021-01-01"
	extension := `{"properties":{"vmSize":"STANDARD_DS2_V2","deploymentConfiguration":{"virtualMachineConfiguration":{"imageReference":{"publisher":"canonical","offer":"ubuntuserver","sku":"20.04-lts"},
		"nodeAgentSkuId":"batch.node.ubuntu 20.04","extensions":[{"name":"c","publisher":"Example.Canary","type":"CanaryForLinux","typeHandlerVersion":"1.0","protectedSettings":%s}]}}}}`
	for why, protected := range map[string]string{
		"protected settings that are a string": `%s`, "protected settings that are a list": `[%s]`, "protected settings with a syntax error": `{"password":%s,}`,
	} {
		h.send(request{why: why, method: "PUT", url: arm, body: fmt.Sprintf(extension, fmt.Sprintf(protected, quote(h.inventWord(why)))), want: 400})
	}
	h.send(request{
		why: "import", method: "POST", url: h.Client.Vault("vault1", "/certificates/imported/import?api-version=7.4"),
		body: `{"value":` + quote(h.inventWord("imported value")) + `,"pwd":` + quote(h.inventWord("import password")) + `}`, want: 405,
	})
	for why, url := range map[string]string{"wrong token at ARM": arm, "wrong token at a vault": secret, "wrong token at Batch": h.batchURL("/pools")} {
		h.send(request{why: why, method: "GET", url: url, header: map[string]string{"Authorization": "Bearer " + h.inventWord(why)}, want: 401})
	}
	forged := h.token(arm)
	forged = forged[:strings.LastIndexByte(forged, '.')+1] + h.inventWord("forged signature")
	h.send(request{why: "forged token", method: "GET", url: arm, header: map[string]string{"Authorization": "Bearer " + forged}, want: 401})
	h.send(request{why: "another scheme", method: "GET", url: arm, header: map[string]string{"Authorization": "SharedKey acct1:" + h.inventWord("shared key")}, want: 401})
	h.send(request{why: "wrong join token", method: "POST", url: h.Client.Endpoints().Node + "/v1/enrol", body: `{"hostname":"m","csr":"x","token":` + quote(h.inventWord("wrong join token")) + `}`, want: 400})
	h.send(request{why: "no such page", method: "GET", url: h.Client.ARM("/nothing/here?sig=" + h.inventWord("signature in a query")), want: 404})
	var join struct{ Token string }
	h.call(http.MethodPost, h.Client.ARM("/keyfleet/v1/jointokens"), "", map[string]any{"pool": pool, "expiresIn": "1h"}, &join)
	h.add("join token", []byte(join.Token), nil)
}

// renew makes a further version, with a key of its own, and waits until the node has it.
func (h *hunt) renew() {
	h.T.Helper()
	h.call(http.MethodPost, h.Client.ARM("/keyfleet/v1/dev/clock"), "", map[string]any{"advance": (336 * 24 * time.Hour).String()}, nil)
	before := h.canaries
	stack.Eventually(h.T, 60*time.Second, "the renewed certificate is on the node", func(ctx context.Context) error {
		list, err := client.List[json.RawMessage](ctx, h.Client, client.Request{Method: http.MethodGet, URL: h.Client.Vault("vault1", "/certificates/web/versions"), Version: "7.4"})
		if err != nil || len(list) < 2 {
			return fmt.Errorf("%d versions: %w", len(list), err)
		}
		var d keyfleet.Deliveries
		err = h.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: h.Client.ARM("/keyfleet/v1/vaults/vault1/certificates/web/deliveries")}, &d)
		if err == nil && (len(d.Nodes) != 1 || d.Nodes[0].Version != d.Version) {
			err = fmt.Errorf("deliveries: %+v", d)
		}
		return err
	})
	h.pemKey("key of the renewed certificate", h.secretOf("web"))
	if slices.ContainsFunc(before, func(c *canary) bool { return bytes.Equal(c.value, h.canaries[len(before)].value) }) {
		h.T.Error("the renewed certificate has the old key")
	}
}

// look asks for everything that describes secrets without showing them.
func (h *hunt) look(pool, node string) {
	h.T.Helper()
	own := h.Client.ARM("/keyfleet/v1" + pool + "/nodes/" + node)
	stack.Eventually(h.T, 30*time.Second, "the logs of both extensions are kept", func(ctx context.Context) error {
		for _, extension := range []string{"kv", "canary"} {
			resp, err := h.Client.Do(ctx, client.Request{Method: http.MethodGet, URL: own + "/logs", Query: map[string][]string{"extension": {extension}}})
			if err != nil {
				return err
			}
			if !bytes.Contains(resp.Body, []byte(`"tail"`)) {
				return fmt.Errorf("%s: %s", extension, resp.Body)
			}
			h.places["answer: logs of "+extension] = resp.Body
		}
		return nil
	})
	e := h.Client.Endpoints()
	for _, url := range []string{
		h.Client.ARM(pool) + "?api-version=2021-01-01", own + "/explain", h.batchURL("/pools/p1"), h.batchURL("/pools/p1/nodes/" + node),
		h.batchURL("/pools/p1/nodes/" + node + "/extensions"), h.Client.Vault("vault1", "/secrets?api-version=7.4"), h.Client.Vault("vault1", "/certificates/web?api-version=7.4"),
		h.Client.Vault("vault1", "/deletedsecrets?api-version=7.4"), h.Client.ARM("/keyfleet/v1/applications"), h.Client.ARM("/keyfleet/v1/audit"), e.ResourceManager + "/metrics",
	} {
		h.answer(url)
	}
	if m := h.places["answer "+e.ResourceManager+"/metrics"]; !bytes.Contains(m, []byte("x509_cert_not_after")) {
		h.T.Errorf("no metrics: %s", m)
	}
	h.places["output of store dump"] = h.program("keyfleet-server", "store", "dump", "--data-dir", h.Dir)
	h.places["output of backup"] = h.program("keyfleet-server", "backup", "--data-dir", h.Dir, filepath.Join(h.Dir, "backup"))
	h.places["output of audit list"] = h.program("keyfleet", "audit", "list", "-o", "json")
	h.places["output of node explain"] = h.program("keyfleet", "node", "explain", "p1", node)
}
