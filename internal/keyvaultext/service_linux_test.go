package keyvaultext_test

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/keyvaultext"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

const link = "testkvchinanorth2s." + secret

func quoted(s string) string { return strconv.Quote(s) }

func TestDeliversAsDocumented(t *testing.T) {
	for _, form := range []string{keyvaulttest.PEM, keyvaulttest.PKCS12} {
		t.Run(form, func(t *testing.T) {
			vault := keyvaulttest.Start(t)
			v := vault.Renew(host, secret, form)
			n := newNode(t, vault, binary(t, ""))
			n.settings(true, "", quoted(urlOf))
			n.enable()
			n.delivers(link, v)
			n.eventually("success", func() bool { return n.status().Status.Status == extension.StatusSuccess })

			checkStatusBytes(t, n)
			checkLayout(t, n, v)
			checkOrder(t, n, v)
			if !strings.Contains(n.logs(), "certificate file name") {
				t.Errorf("the log lacks the words people search for: %s", n.logs())
			}
			checkNoSecret(t, n, v)
		})
	}
}

// checkStatusBytes compares with the file that the product's documentation shows, but for the time.
func checkStatusBytes(t *testing.T, n *node) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(n.base, "status", "1.status"))
	must(t, err)
	stamp := regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
	golden := `[{"status":{"code":0,"formattedMessage":{"lang":"en","message":"Successfully started Key Vault extension service. 2021-03-03T23:12:23Z"},"operation":"Service start.","status":"success"},"timestampUTC":"2021-03-03T23:12:23Z","version":"1.0"}]`
	if want := stamp.ReplaceAllString(golden, "TIME"); stamp.ReplaceAllString(string(got), "TIME") != want {
		t.Errorf("status file\n got %s\nwant %s", got, want)
	}
}

func checkLayout(t *testing.T, n *node, v keyvaulttest.Version) {
	t.Helper()
	name := fmt.Sprintf("%s.%s.%d.%d.PEM", link, v.ID, v.Leaf.NotBefore.Unix(), v.Leaf.NotAfter.Unix())
	if got, want := n.target(link), filepath.Join(n.store, name); got != want {
		t.Errorf("link target %s, want the absolute %s", got, want)
	}
	for path, mode := range map[string]os.FileMode{n.store: 0o700 | os.ModeDir, filepath.Join(n.store, name): 0o600} {
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode() != mode || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
			t.Errorf("%s has mode %v, want %v and our own user", path, info.Mode(), mode)
		}
	}
}

// checkOrder wants leaf, intermediate, root, key, whatever order the vault gave.
func checkOrder(t *testing.T, n *node, v keyvaulttest.Version) {
	t.Helper()
	rest, err := os.ReadFile(filepath.Join(n.store, link))
	must(t, err)
	var order []string
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			key, err := x509.ParsePKCS8PrivateKey(b.Bytes)
			must(t, err)
			if !key.(*ecdsa.PrivateKey).PublicKey.Equal(v.Leaf.PublicKey) {
				t.Error("the key is not the leaf's")
			}
			order = append(order, b.Type)
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		must(t, err)
		order = append(order, c.Subject.CommonName)
	}
	if got, want := strings.Join(order, ", "), secret+".example, Intermediate CA, Double CA, PRIVATE KEY"; got != want {
		t.Errorf("order in the file: %s, want %s", got, want)
	}
}

// checkNoSecret looks for pieces of the private key in everything but the certificate directory.
func checkNoSecret(t *testing.T, n *node, v keyvaulttest.Version) {
	t.Helper()
	file, err := os.ReadFile(filepath.Join(n.store, link))
	must(t, err)
	_, text, _ := strings.Cut(string(file), "-----BEGIN PRIVATE KEY-----\n")
	key, _ := pem.Decode([]byte("-----BEGIN PRIVATE KEY-----\n" + text))
	d := key.Bytes[36:60] // inside the private scalar
	canaries := []string{string(d), hex.EncodeToString(d), base64.StdEncoding.EncodeToString(d), strings.SplitN(text, "\n", 2)[0], "token.", v.Value[200:240]}
	must(t, filepath.WalkDir(n.dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasPrefix(path, n.store) || strings.HasPrefix(path, filepath.Join(n.base, "bin")) {
			return err
		}
		data, _ := os.ReadFile(path)
		for _, c := range canaries {
			if bytes.Contains(data, []byte(c)) {
				t.Errorf("%s holds a secret", path)
			}
		}
		return nil
	}))
	if pid := n.servicePID(); pid != 0 {
		argv, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		for _, c := range canaries {
			if bytes.Contains(argv, []byte(c)) {
				t.Error("the arguments of the service hold a secret")
			}
		}
	}
}

func TestDocumentedBodies(t *testing.T) {
	// The settings of the documented request bodies, with our directory and identity endpoint.
	for _, file := range []string{"000-put-pool-linux.json", "001-put-pool-linux.json"} {
		t.Run(file, func(t *testing.T) {
			settings := settingsIn(t, file)
			vault := keyvaulttest.Start(t)
			n := newNode(t, vault, binary(t, ""))
			text := strings.NewReplacer("/var/lib/waagent/Microsoft.Azure.KeyVault", n.store, "http://169.254.169.254/metadata/identity", vault.Identity(),
				"885b1a3d-f13c-4030-afcf-9f05044d78dc", keyvaulttest.ClientID).Replace(string(settings))
			parsed, err := extension.ParseKeyVaultSettings([]byte(text))
			must(t, err)
			c := parsed.Certificates[0]
			n.raw(text)
			n.enable()
			n.eventually("the missing certificate named as the body wrote it", func() bool {
				s := n.status().Status
				return s.Status == extension.StatusTransitioning && strings.Contains(s.FormattedMessage.Message, c.URL) &&
					strings.Contains(s.FormattedMessage.Message, "HTTP 404") && strings.Contains(s.FormattedMessage.Message, "SecretNotFound")
			})
			if c.Version != "" {
				if !strings.Contains(n.logs(), "never renewed") {
					t.Error("the log does not warn of the pinned version")
				}
				return // the double makes its own versions
			}
			v := vault.Renew(c.Host, c.Secret, keyvaulttest.PEM)
			n.delivers(c.LinkName(), v)
			n.eventually("success", func() bool { return n.status().Status.Status == extension.StatusSuccess })
		})
	}
}

func TestRenewalByPolling(t *testing.T) {
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	n := newNode(t, vault, binary(t, ""))
	n.settings(false, `,"keepVersions":2`, quoted(urlOf))
	n.enable()
	n.delivers(link, v)
	stop := n.reader(link)
	first := n.target(link)
	before, err := os.Stat(first)
	must(t, err)
	asked := len(vault.Requests())
	n.eventually("three more polls", func() bool { return len(vault.Requests()) >= asked+3 })
	if after, err := os.Stat(first); err != nil || !after.ModTime().Equal(before.ModTime()) || n.target(link) != first {
		t.Error("something was rewritten although nothing had changed")
	}
	var last keyvaulttest.Version
	for range 3 {
		last = vault.Renew(host, secret, keyvaulttest.PEM)
		n.delivers(link, last)
	}
	n.eventually("the newest two files, and only those", func() bool {
		files, _ := filepath.Glob(filepath.Join(n.store, "*.PEM"))
		return len(files) == 2
	})
	if _, err := os.Stat(first); err == nil {
		t.Error("the oldest file is still there")
	}
	stop()
	must(t, os.Remove(n.target(link)))
	n.eventually("a file that someone removed comes back", func() bool {
		_, err := os.Stat(filepath.Join(n.store, link))
		return err == nil
	})
}

func TestHintMovesTheLinkAtOnce(t *testing.T) {
	vault := keyvaulttest.Start(t)
	vault.Renew(host, secret, keyvaulttest.PEM)
	n := newNode(t, vault, binary(t, ""))
	socket := filepath.Join(n.dir, "hint.sock")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	defer listener.Close()
	n.settings(true, "", quoted(urlOf))
	n.raw(strings.Replace(string(publicSettings(t, n)), `"5"`, `"86400"`, 1)) // no poll will come
	n.env = append(n.env, extension.HintSocketVariable+"="+socket, keyvaultext.TimeScaleVariable+"=1")
	n.enable()

	conn, err := listener.Accept()
	must(t, err)
	defer func() { conn.Close() }()
	lines := bufio.NewScanner(conn)
	fmt.Fprint(conn, "hint 1\n")
	deliveryOf := func(version string) extension.Delivery {
		t.Helper()
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		for lines.Scan() {
			d, err := extension.ParseDelivery(lines.Bytes())
			must(t, err)
			if d.Version == version {
				return d
			}
		}
		t.Fatalf("no delivery of %s was reported: %v\n%s", version, lines.Err(), n.logs())
		return extension.Delivery{}
	}
	asked := func() int { return strings.Count(strings.Join(vault.Requests(), "\n"), "vault ") }
	n.eventually("the first hint to be followed", func() bool { return asked() >= 3 }) // challenge, start, hint
	var worst time.Duration
	for i := range 20 {
		v := vault.Renew(host, secret, keyvaulttest.PEM)
		start := time.Now()
		fmt.Fprintf(conn, "hint %d\n", i+2)
		d := deliveryOf(v.ID)
		worst = max(worst, d.Since.Sub(start))
		if d.Path != filepath.Join(n.store, link) || d.Secret != urlOf || !strings.Contains(n.target(link), v.ID) {
			t.Fatalf("reported %+v, link %s", d, n.target(link))
		}
	}
	t.Logf("from hint to link, 20 renewals: worst %s", worst)
	if worst > 2*time.Second {
		t.Errorf("the slowest took %s", worst)
	}

	conn.Close() // the agent restarts: the extension comes back and says everything again
	conn, err = listener.Accept()
	must(t, err)
	lines = bufio.NewScanner(conn)
	vault.OnVault(func(w http.ResponseWriter, _ *http.Request) bool {
		keyvaulttest.Error(w, http.StatusForbidden, "Forbidden", "AccessDenied", "no")
		return true
	})
	fmt.Fprint(conn, "hint lost\n")
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for lines.Scan() {
		d, err := extension.ParseDelivery(lines.Bytes())
		must(t, err)
		if strings.Contains(d.Problem, "HTTP 403 (AccessDenied)") {
			if d.Version == "" || n.status().Status.Status != extension.StatusSuccess {
				t.Errorf("lost access must keep the last good files and the status: %+v", d)
			}
			return
		}
	}
	t.Errorf("the lost access was not reported: %v", lines.Err())
}

func publicSettings(t testing.TB, n *node) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.base, "config", strconv.Itoa(n.seq)+".settings"))
	must(t, err)
	s, err := extension.ParseHandlerSettings(data)
	must(t, err)
	return s.PublicSettings
}

func TestInitialSyncGivesUpAndStillHeals(t *testing.T) {
	vault := keyvaulttest.Start(t)
	n := newNode(t, vault, binary(t, ""))
	n.env = append(n.env, keyvaultext.TimeScaleVariable+"=0.001")
	n.settings(true, "", quoted(urlOf), quoted("https://other.vault.azure.cn/secrets/there"))
	vault.Renew("other.vault.azure.cn", "there", keyvaulttest.PEM)
	n.enable()
	n.eventually("error", func() bool { return n.status().Status.Status == extension.StatusError })
	message := n.status().Status.FormattedMessage.Message
	for _, part := range []string{"after 25 tries", "1 of 2 certificates", urlOf + ": SecretNotFound: HTTP 404: ", "Fix: create certificate " + secret} {
		if !strings.Contains(message, part) {
			t.Errorf("the error does not say %q: %s", part, message)
		}
	}
	if n.status().Status.Code == 0 {
		t.Error("an error has code 0")
	}
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	n.delivers(link, v)
	n.eventually("success after all", func() bool { return n.status().Status.Status == extension.StatusSuccess })
}

func TestWithoutInitialSyncStartIsSuccess(t *testing.T) {
	vault := keyvaulttest.Start(t)
	n := newNode(t, vault, binary(t, ""))
	n.settings(false, "", quoted(urlOf))
	n.enable()
	if s := n.status().Status; s.Status != extension.StatusSuccess {
		t.Errorf("status after enable: %+v", s)
	}
	n.eventually("the reason in the log", func() bool { return strings.Contains(n.logs(), "SecretNotFound") })
}

func TestWrongSettingsAreListed(t *testing.T) {
	n := newNode(t, keyvaulttest.Start(t), binary(t, ""))
	n.raw(`{"secretsManagementSettings":{"observedCertificates":["http://v.vault.azure.cn/secrets/a"],"authenticationSettings":{"msiClientId":"x"}}}`)
	code, out := n.command("enable")
	s := n.status().Status
	if code != keyvaultext.ExitSettings || s.Status != extension.StatusError || s.FormattedMessage.Message != strings.TrimSpace(out) {
		t.Errorf("exit code %d, output %s, status %+v", code, out, s)
	}
	for _, part := range []string{"Failed to parse the configuration settings", "secretsManagementSettings.authenticationSettings", "observedCertificates[0]"} {
		if !strings.Contains(out, part) {
			t.Errorf("the message lacks %q: %s", part, out)
		}
	}
}

func TestLifeOfTheService(t *testing.T) {
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	n := newNode(t, vault, binary(t, ""))
	run := func(name string) {
		t.Helper()
		if code, out := n.command(name); code != 0 {
			t.Fatalf("%s: exit code %d: %s", name, code, out)
		}
	}
	run("install")
	n.settings(false, "", quoted(urlOf))
	run("enable")
	pid := n.servicePID()
	if sid, err := syscall.Getpgid(pid); pid == 0 || err != nil || sid != pid {
		t.Fatalf("the service %d is not in a session of its own (%d, %v)", pid, sid, err)
	}
	n.delivers(link, v)
	run("enable")
	if n.servicePID() != pid {
		t.Error("enable with nothing new restarted the service")
	}
	n.settings(true, "", quoted(urlOf))
	run("enable")
	if again := n.servicePID(); again == pid || again == 0 {
		t.Errorf("a new sequence did not restart the service: %d, then %d", pid, again)
	}
	must(t, syscall.Kill(n.servicePID(), syscall.SIGKILL))
	n.eventually("the killed service to be gone", func() bool { return n.servicePID() == 0 })
	run("enable")
	if n.servicePID() == 0 {
		t.Error("enable did not start a killed service again")
	}
	second := exec.Command(n.program, "run", "--base", n.base, "--sequence", "2")
	second.Env = n.env
	must(t, second.Start())
	time.AfterFunc(500*time.Millisecond, func() { _ = second.Process.Signal(syscall.SIGKILL) })
	if err := second.Wait(); err == nil || n.servicePID() == second.Process.Pid {
		t.Error("two services ran at a time")
	}
	run("update")
	run("uninstall") // as the old version's, within an update
	run("install")
	run("enable")
	if _, err := os.Stat(filepath.Join(n.dir, "lib", keyvaultext.HandlerName+".state", "updating")); err == nil || n.servicePID() == 0 {
		t.Error("enable did not end the update")
	}
	run("disable")
	if n.servicePID() != 0 {
		t.Error("the service still runs after disable")
	}
	run("uninstall")
	if _, err := os.Stat(filepath.Join(n.store, link)); err != nil {
		t.Errorf("uninstall removed certificates: %v", err)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "lib", keyvaultext.HandlerName+".state")); err == nil {
		t.Error("uninstall left the state folder")
	}
}

func hooked(n *node, argv ...string) string {
	for i := range argv {
		argv[i] = quoted(argv[i])
	}
	return fmt.Sprintf(`{"url":%q,"customSymbolicLinkName":"web.pem","reloadHook":{"argv":[%s],"timeoutInS":60}}`, urlOf, strings.Join(argv, ","))
}

func TestReloadHook(t *testing.T) {
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	n := newNode(t, vault, binary(t, ""))
	trace := filepath.Join(n.dir, "trace")
	n.settings(false, "", hooked(n, "/bin/sh", "-c", "readlink "+n.store+"/web.pem >> "+trace+"; echo $0; exit 3", "x y"))
	n.enable()
	n.eventually("the hook's result", func() bool {
		s := n.status().Status
		return len(s.Substatus) == 1 && s.Substatus[0].Status == extension.StatusError
	})
	s := n.status().Status
	if s.Status != extension.StatusSuccess || s.Substatus[0].Code != 3 || s.Substatus[0].Name != "reloadHook/web.pem" ||
		!strings.Contains(s.Substatus[0].FormattedMessage.Message, "It said: x y") || !strings.Contains(s.Substatus[0].FormattedMessage.Message, v.ID) {
		t.Errorf("status %+v", s)
	}
	if _, err := os.Lstat(filepath.Join(n.store, link)); err == nil {
		t.Error("customSymbolicLinkName must replace the default link")
	}
	want := n.target("web.pem") + "\n"
	for range 2 {
		v = vault.Renew(host, secret, keyvaulttest.PEM)
		n.delivers("web.pem", v)
		want += n.target("web.pem") + "\n"
		n.eventually("the hook after the switch, once", func() bool {
			got, _ := os.ReadFile(trace)
			return string(got) == want
		})
	}

	n.settings(false, "", strings.Replace(hooked(n, "/bin/sh", "-c", "sleep 60 & echo PRIVATE KEY; wait"), `"timeoutInS":60`, `"timeoutInS":1`, 1))
	n.enable()
	v = vault.Renew(host, secret, keyvaulttest.PEM)
	n.delivers("web.pem", v)
	n.eventually("the timeout", func() bool {
		s := n.status().Status.Substatus
		return len(s) == 1 && strings.Contains(s[0].FormattedMessage.Message, "was killed after 1s. Its output holds a private key and is not shown.")
	})
	if got, _ := os.ReadFile(trace); string(got) != want {
		t.Errorf("the hook's runs: %s, want %s", got, want)
	}
}

func TestAccessControlLists(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("left out: giving another user access needs root")
	}
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	n := newNode(t, vault, binary(t, ""))
	for d := n.dir; d != "/"; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err == nil && info.Mode()&0o001 == 0 {
			must(t, os.Chmod(d, info.Mode()|0o011)) // our own temporary folders: let the reader pass
		}
	}
	object := fmt.Sprintf(`{"url":%q,"acls":[{"user":"nobody","group":"daemon"}]}`, urlOf)
	n.settings(true, `,"aclEnabled":true`, object)
	n.enable()
	n.delivers(link, v)
	readAs := func(uid, gid uint32) error {
		cmd := exec.Command("/bin/cat", filepath.Join(n.store, link))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		return cmd.Run()
	}
	if err := readAs(65534, 65534); err != nil {
		t.Errorf("user nobody cannot read: %v", err)
	}
	if err := readAs(12345, 1); err != nil {
		t.Errorf("group daemon cannot read: %v", err)
	}
	if err := readAs(12345, 12345); err == nil {
		t.Error("a stranger can read")
	}
	n.settings(true, "", object)
	n.enable()
	n.eventually("access taken back with aclEnabled off", func() bool { return readAs(65534, 65534) != nil })

	n.settings(false, `,"aclEnabled":true`, fmt.Sprintf(`{"url":%q,"acls":[{"user":"no-such-user"}]}`, urlOf))
	n.enable()
	n.eventually("an unknown user is an error of this node", func() bool {
		s := n.status().Status
		return s.Status == extension.StatusError && strings.Contains(s.FormattedMessage.Message, `There is no user "no-such-user" on this node. (settings.secretsManagementSettings.observedCertificates[0].acls[0].user)`)
	})
}

func TestUnsafePlacesAreRefused(t *testing.T) {
	vault := keyvaulttest.Start(t)
	v := vault.Renew(host, secret, keyvaulttest.PEM)
	cases := []struct{ name, why, want string }{
		{"writable", "whoever may write to the directory could swap keys", "UnsafeDirectory"},
		{"foreign", "whoever owns a folder above could swap the directory", "UnsafeDirectory"},
		{"file", "a plain file under the link's name belongs to someone", "LinkIsFile"},
		{"planted", "a link planted under the temporary name must not lead the key elsewhere", ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, vault, binary(t, ""))
			if c.name == "foreign" {
				if os.Geteuid() != 0 {
					t.Skip("left out: giving a folder to another user needs root")
				}
				home := filepath.Join(n.dir, "home")
				must(t, os.Mkdir(home, 0o755))
				must(t, os.Chown(home, 65534, 65534))
				n.store = filepath.Join(home, "certificates")
			}
			must(t, os.Mkdir(n.store, 0o700))
			victim := filepath.Join(n.dir, "victim")
			switch c.name {
			case "writable":
				must(t, os.Chmod(n.store, 0o777))
			case "file":
				must(t, os.WriteFile(filepath.Join(n.store, link), []byte("mine"), 0o600))
			case "planted":
				name := fmt.Sprintf(".keyfleet-%s.%s.%d.%d.PEM", link, v.ID, v.Leaf.NotBefore.Unix(), v.Leaf.NotAfter.Unix())
				must(t, os.Symlink(victim, filepath.Join(n.store, name)))
			}
			n.settings(true, "", quoted(urlOf))
			n.enable()
			if c.want == "" {
				n.delivers(link, v)
				if _, err := os.Stat(victim); err == nil {
					t.Error(c.why)
				}
				return
			}
			n.eventually(c.why, func() bool { return strings.Contains(n.status().Status.FormattedMessage.Message, c.want) })
		})
	}
}
