package extension_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/extension"
)

// documented returns the settings in a documented request body.
func documented(t testing.TB, file string) json.RawMessage {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "testdata", "requests", file))
	if err != nil {
		t.Fatal(err)
	}
	var body struct {
		Properties struct {
			DeploymentConfiguration struct {
				VirtualMachineConfiguration struct {
					Extensions []struct{ Settings json.RawMessage }
				}
			}
		}
	}
	if err := json.Unmarshal(data, &body); err != nil {
		t.Fatal(err)
	}
	return body.Properties.DeploymentConfiguration.VirtualMachineConfiguration.Extensions[0].Settings
}

const (
	windowsObjects = `{"secretsManagementSettings":{"pollingIntervalInS":"300","requireInitialSync":true,"linkOnRenewal":"true","observedCertificates":[
		{"url":"https://testkvchinanorth2s.vault.azure.cn/secrets/a","certificateStoreLocation":"LocalMachine","certificateStoreName":"MY","keyExportable":"false","accounts":["Network Service"]}]},
		"authenticationSettings":{"msiEndpoint":"http://169.254.169.254/metadata/identity","msiClientId":"b9f6dd56-d2d6-4967-99d7-8062d56fd84c"}}`
	linuxObjects = `{"loggingSettings":{"logger":"fluentd","endpoint":"tcp://localhost:24224","format":"forward","servicename":"akvvm_service"},
		"secretsManagementSettings":{"pollingIntervalInS":3600,"requireInitialSync":"True","aclEnabled":true,"keepVersions":"5","observedCertificates":[
		{"url":"https://KV.vault.azure.net/secrets/Web-1","certificateStoreLocation":"/etc/tls","customSymbolicLinkName":"web.pem",
		 "acls":[{"user":"www-data","group":"ssl-cert"},{"user":"app"}],"reloadHook":{"argv":["/usr/bin/systemctl","reload","nginx"],"timeoutInS":"5"}},
		"https://kv.vault.azure.net:8443/secrets/two/"]},
		"authenticationSettings":{"msiEndpoint":"http://localhost:40342/metadata/identity/oauth2/token"}}`
)

func TestDocumentedSettings(t *testing.T) {
	base := extension.KeyVaultSettings{
		PollingInterval: 5 * time.Minute, RequireInitialSync: true, KeepVersions: 3,
		MSIEndpoint: "http://169.254.169.254/metadata/identity/oauth2/token", MSIClientID: "b9f6dd56-d2d6-4967-99d7-8062d56fd84c",
	}
	seed := base
	seed.Certificates = []extension.ObservedCertificate{{
		Path: "settings.secretsManagementSettings.observedCertificates[0]",
		URL:  "https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af",
		Host: "testkvchinanorth2s.vault.azure.cn", Vault: "testkvchinanorth2s", Secret: "authcertforumatesting", Version: "8f5f3f491afd48cb99286ba2aacd39af",
		StoreLocation: "/var/lib/waagent/Microsoft.Azure.KeyVault",
	}}
	windows := base
	windows.LinkOnRenewal = true
	windows.Certificates = []extension.ObservedCertificate{{
		Path: "settings.secretsManagementSettings.observedCertificates[0]", URL: "https://testkvchinanorth2s.vault.azure.cn/secrets/a",
		Host: "testkvchinanorth2s.vault.azure.cn", Vault: "testkvchinanorth2s", Secret: "a",
		StoreLocation: "LocalMachine", StoreName: "MY", Accounts: []string{"Network Service"},
	}}
	linux := extension.KeyVaultSettings{
		PollingInterval: time.Hour, RequireInitialSync: true, ACLEnabled: true, KeepVersions: 5,
		MSIEndpoint: "http://localhost:40342/metadata/identity/oauth2/token",
		Logging:     extension.Logging{Logger: "fluentd", Endpoint: "tcp://localhost:24224", Format: "forward", ServiceName: "akvvm_service"},
		Certificates: []extension.ObservedCertificate{
			{
				Path: "settings.secretsManagementSettings.observedCertificates[0]", URL: "https://KV.vault.azure.net/secrets/Web-1",
				Host: "KV.vault.azure.net", Vault: "KV", Secret: "Web-1", StoreLocation: "/etc/tls", CustomSymbolicLinkName: "web.pem",
				ACLs:       []extension.ACL{{User: "www-data", Group: "ssl-cert"}, {User: "app"}},
				ReloadHook: &extension.ReloadHook{Argv: []string{"/usr/bin/systemctl", "reload", "nginx"}, Timeout: 5 * time.Second},
			},
			{
				Path: "settings.secretsManagementSettings.observedCertificates[1]", URL: "https://kv.vault.azure.net:8443/secrets/two/",
				Host: "kv.vault.azure.net:8443", Vault: "kv", Secret: "two",
			},
		},
	}
	cases := []struct {
		why  string
		raw  json.RawMessage
		want extension.KeyVaultSettings
	}{
		{"strings, with the handler of version 3, and the number as a string", documented(t, "000-put-pool-linux.json"), seed},
		{"the Windows handler of version 3", json.RawMessage(windowsObjects), windows},
		{"everything that version 3 for Linux has, and our additions", json.RawMessage(linuxObjects), linux},
	}
	for _, c := range cases {
		got, err := extension.ParseKeyVaultSettings(c.raw)
		if err != nil {
			t.Errorf("%s: %v", c.why, err)
			continue
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: (-want +got)\n%s", c.why, d)
		}
	}
	got, err := extension.ParseKeyVaultSettings(documented(t, "001-put-pool-linux.json"))
	if err != nil || got.Certificates[0].LinkName() != "testkvwestus2.authsecreat" || got.Certificates[0].Directory() != "/var/lib/waagent/Microsoft.Azure.KeyVault" {
		t.Errorf("the second documented body: %v, %+v", err, got)
	}
}

func TestDirectory(t *testing.T) {
	for location, want := range map[string]string{
		"":             "/var/lib/waagent/Microsoft.Azure.KeyVault.Store",
		"LocalMachine": "/var/lib/waagent/Microsoft.Azure.KeyVault.Store",
		"/etc/tls/":    "/etc/tls",
	} {
		if got := (extension.ObservedCertificate{StoreLocation: location}).Directory(); got != want {
			t.Errorf("%q: %s, want %s", location, got, want)
		}
	}
}

func TestSettingsProblems(t *testing.T) {
	const ok = `"secretsManagementSettings":{"observedCertificates":["https://v.vault.azure.net/secrets/a"]}`
	observed := func(s string) string { return `{"secretsManagementSettings":{"observedCertificates":[` + s + `]}}` }
	management := func(s string) string {
		return `{"secretsManagementSettings":{` + s + `,"observedCertificates":["https://v.vault.azure.net/secrets/a"]}}`
	}
	const first = "settings.secretsManagementSettings.observedCertificates[0]"
	cases := []struct {
		why, raw  string
		path, say string // of the first problem; say is in reason or fix
	}{
		{"no settings", ``, "settings", "no settings"},
		{"null", `null`, "settings", "no settings"},
		{"settings as an escaped string", `"{\"a\":1}"`, "settings", "not a string that holds JSON"},
		{"a list", `[]`, "settings", "a list was found"},
		{"nothing to observe", `{}`, "settings.secretsManagementSettings", "missing"},
		{"no list", `{"secretsManagementSettings":{}}`, "settings.secretsManagementSettings.observedCertificates", "missing"},
		{"an empty list", observed(``), "settings.secretsManagementSettings.observedCertificates", "empty"},
		{"authentication inside management", management(`"authenticationSettings":{}`), "settings.secretsManagementSettings.authenticationSettings", "move it to settings"},
		{"management's member at the top", `{"requireInitialSync":true,` + ok + `}`, "settings.requireInitialSync", "move it to settings.secretsManagementSettings"},
		{"client id beside the objects", `{"msiClientId":"x",` + ok + `}`, "settings.msiClientId", "move it to settings.authenticationSettings"},
		{"a hook for all certificates", management(`"reloadHook":{"argv":["/bin/true"]}`), "settings.secretsManagementSettings.reloadHook", "an element of"},
		{"a resource id as client id", `{` + ok + `,"authenticationSettings":{"msiClientId":"/subscriptions/042998e4/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/x"}}`, "settings.authenticationSettings.msiClientId", "resource id"},
		{"an object as client id", `{` + ok + `,"authenticationSettings":{"msiClientId":{"clientId":"x"}}}`, "settings.authenticationSettings.msiClientId", "an object was found"},
		{"a name as client id", `{` + ok + `,"authenticationSettings":{"msiClientId":"my-identity"}}`, "settings.authenticationSettings.msiClientId", "not a GUID"},
		{"another identity path", `{` + ok + `,"authenticationSettings":{"msiEndpoint":"http://169.254.169.254/latest"}}`, "settings.authenticationSettings.msiEndpoint", "/metadata/identity"},
		{"an identity endpoint without host", `{` + ok + `,"authenticationSettings":{"msiEndpoint":"metadata/identity"}}`, "settings.authenticationSettings.msiEndpoint", "not the URL"},
		{"the certificate's URL", observed(`"https://v.vault.azure.net/certificates/a/8f5f3f491afd48cb99286ba2aacd39af"`), first, "write https://v.vault.azure.net/secrets/a/8f5f3f491afd48cb99286ba2aacd39af"},
		{"the key's URL", observed(`"https://v.vault.azure.net/keys/a"`), first, "only /secrets/ returns the certificate with its private key"},
		{"no TLS", observed(`"http://v.vault.azure.net/secrets/a"`), first, "TLS only"},
		{"no URL", observed(`"authcert"`), first, "not a secret identifier"},
		{"a URL with a query", observed(`"https://v.vault.azure.net/secrets/a?api-version=7.4"`), first, "without query"},
		{"a URL with a password", observed(`"https://u:p@v.vault.azure.net/secrets/a"`), first, "without query and user"},
		{"a path that leaves the directory", observed(`"https://v.vault.azure.net/secrets/..%2f..%2fetc"`), first, "secret identifier"},
		{"a short version", observed(`"https://v.vault.azure.net/secrets/a/1234"`), first, "32 hexadecimal digits"},
		{"an empty URL", observed(`""`), first, "empty"},
		{"an object without url", observed(`{"certificateStoreLocation":"/x"}`), first + ".url", "missing"},
		{"a number as certificate", observed(`7`), first, "a number was found"},
		{"a null certificate", observed(`null`), first, "null was found"},
		{"another casing", observed(`{"URL":"https://v.vault.azure.net/secrets/a"}`), first + ".URL", "write url"},
		{"a typing error", management(`"pollingIntervalInSec":5`), "settings.secretsManagementSettings.pollingIntervalInSec", "write pollingIntervalInS"},
		{"something unknown", `{"xyz":1,` + ok + `}`, "settings.xyz", "known here: authenticationSettings, loggingSettings, secretsManagementSettings"},
		{"the same name twice", `{"secretsManagementSettings":{"requireInitialSync":true,"requireInitialSync":false,"observedCertificates":["https://v.vault.azure.net/secrets/a"]}}`, "settings.secretsManagementSettings.requireInitialSync", "twice"},
		{"a polling interval in words", management(`"pollingIntervalInS":"5m"`), "settings.secretsManagementSettings.pollingIntervalInS", "whole number of seconds"},
		{"no polling interval", management(`"pollingIntervalInS":0`), "settings.secretsManagementSettings.pollingIntervalInS", "between 1"},
		{"half a second", management(`"pollingIntervalInS":0.5`), "settings.secretsManagementSettings.pollingIntervalInS", "whole number"},
		{"a boolean in words", management(`"requireInitialSync":"yes"`), "settings.secretsManagementSettings.requireInitialSync", "true or false"},
		{"one file only", management(`"keepVersions":1`), "settings.secretsManagementSettings.keepVersions", "between 2 and 100"},
		{"a relative directory", management(`"certificateStoreLocation":"certs"`), "settings.secretsManagementSettings.certificateStoreLocation", "absolute path"},
		{"the root directory", management(`"certificateStoreLocation":"/"`), "settings.secretsManagementSettings.certificateStoreLocation", "directory of its own"},
		{"a directory with ..", management(`"certificateStoreLocation":"/a/../etc"`), "settings.secretsManagementSettings.certificateStoreLocation", "without .."},
		{"a store in another casing", management(`"certificateStoreLocation":"localmachine"`), "settings.secretsManagementSettings.certificateStoreLocation", "case-sensitive"},
		{"a link name that is a path", observed(`{"url":"https://v.vault.azure.net/secrets/a","customSymbolicLinkName":"../x"}`), first + ".customSymbolicLinkName", "not a file name"},
		{"an acl without user", observed(`{"url":"https://v.vault.azure.net/secrets/a","acls":[{"group":"g"}]}`), first + ".acls[0].user", "missing"},
		{"a hook for a shell", observed(`{"url":"https://v.vault.azure.net/secrets/a","reloadHook":{"argv":["nginx -s reload"]}}`), first + ".reloadHook.argv", "no shell"},
		{"a hook as a string", observed(`{"url":"https://v.vault.azure.net/secrets/a","reloadHook":"systemctl reload nginx"}`), first + ".reloadHook", "an object was expected"},
		{"two certificates with one link", observed(`"https://v.vault.azure.net/secrets/a",{"url":"https://v.vault.azure.cn/secrets/a"}`), "settings.secretsManagementSettings.observedCertificates[1]", "the same link, v.a, as " + first},
	}
	for _, c := range cases {
		_, err := extension.ParseKeyVaultSettings(json.RawMessage(c.raw))
		var all extension.SettingsErrors
		if !errors.As(err, &all) || len(all) == 0 {
			t.Errorf("%s: accepted, or another error: %v", c.why, err)
			continue
		}
		if all[0].Path != c.path || !strings.Contains(all[0].Reason+" "+all[0].Fix, c.say) || all[0].Fix == "" {
			t.Errorf("%s: %+v, want %s ... %s", c.why, all[0], c.path, c.say)
		}
	}
}

func TestAllProblemsAreListed(t *testing.T) {
	_, err := extension.ParseKeyVaultSettings(json.RawMessage(`{"secretsManagementSettings":{"pollingIntervalInS":"x","observedCertificates":["http://a.b/secrets/c","https://a.b/certificates/c"]},"authenticationSettings":{"msiClientId":"me"}}`))
	var all extension.SettingsErrors
	if !errors.As(err, &all) || len(all) != 4 {
		t.Fatalf("want 4 problems: %v", err)
	}
	if text := err.Error(); strings.Count(text, " Fix: ") != 4 {
		t.Errorf("rendered: %s", text)
	}
}

func FuzzKeyVaultSettings(f *testing.F) {
	f.Add([]byte(documented(f, "000-put-pool-linux.json")))
	f.Add([]byte(documented(f, "001-put-pool-linux.json")))
	f.Add([]byte(windowsObjects))
	f.Add([]byte(linuxObjects))
	for _, file := range []string{"000-put-pool-windows.json", "001-put-pool-windows.json"} {
		data, err := os.ReadFile(filepath.Join("..", "..", "testdata", "requests", file))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := extension.ParseKeyVaultSettings(data)
		if err != nil {
			var all extension.SettingsErrors
			if !errors.As(err, &all) || len(all) == 0 {
				t.Fatalf("an error without problems: %v", err)
			}
			for _, p := range all {
				if !strings.HasPrefix(p.Path, "settings") || p.Reason == "" || p.Fix == "" {
					t.Errorf("an unexplained problem: %+v", p)
				}
			}
			return
		}
		if len(s.Certificates) == 0 || s.PollingInterval < time.Second || s.MSIEndpoint == "" || s.KeepVersions < 2 {
			t.Errorf("accepted: %+v", s)
		}
		for _, c := range s.Certificates {
			if strings.ContainsAny(c.LinkName(), "/\x00") || !strings.HasPrefix(c.URL, "https://") && !strings.HasPrefix(strings.ToLower(c.URL), "https://") || !filepath.IsAbs(c.Directory()) {
				t.Errorf("accepted: %+v", c)
			}
		}
	})
}
