package apimodel

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
)

var update = flag.Bool("update", false, "write the golden files")

func example(t testing.TB) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "apimodel.json"))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestParseReadsWhatARotationNeeds(t *testing.T) {
	for reason, text := range map[string][]byte{
		"as aks-engine writes it": example(t),
		"as Notepad saves it":     append([]byte("\xef\xbb\xbf"), bytes.ReplaceAll(example(t), []byte("\n"), []byte("\r\n"))...),
	} {
		m, err := Parse(text)
		if err != nil {
			t.Fatalf("%s: %v", reason, err)
		}
		got := strings.TrimSpace(fmt.Sprintln(m.Location, m.DNSPrefix, m.Masters, m.FirstIP, m.AvailabilityProfile, m.AdminUser, m.AgentPools, m.WindowsSSH, m.WindowsUser))
		want := "westus2 my-cluster 3 10.240.255.5 AvailabilitySet azureuser [{linuxpool 2 Linux} {winpool 1 Windows}] true winuser"
		if got != want {
			t.Errorf("%s:\n%s\nwant\n%s", reason, got, want)
		}
		if want := Names(3); !slices.Equal(slices.Sorted(maps.Keys(m.Profile)), slices.Sorted(slices.Values(want))) {
			t.Errorf("%s: the profile has %v, want %v", reason, m.Profile, want)
		}
		if got, want := string(m.Profile["etcdPeerPrivateKeys/2"]), "-----BEGIN RSA PRIVATE KEY-----\nOLDKEYpeer2\n-----END RSA PRIVATE KEY-----\n"; got != want {
			t.Errorf("%s: the third peer's key is %q", reason, got)
		}
	}
}

func TestMasterAddresses(t *testing.T) {
	for _, tc := range []struct{ reason, master, want string }{
		{"an availability set: consecutive", `"count":3,"firstConsecutiveStaticIP":"10.240.255.5"`, "10.240.255.5 10.240.255.6 10.240.255.7"},
		{"over the end of an octet", `"count":3,"firstConsecutiveStaticIP":"10.240.0.254"`, "10.240.0.254 10.240.0.255 10.240.1.0"},
		{"a scale set whose pods have addresses of the subnet", `"count":2,"firstConsecutiveStaticIP":"10.240.0.4","ipAddressCount":31,"availabilityProfile":"VirtualMachineScaleSets"`, "10.240.0.4 10.240.0.35"},
		{"an availability set does not count those", `"count":2,"firstConsecutiveStaticIP":"10.240.0.4","ipAddressCount":31`, "10.240.0.4 10.240.0.5"},
		{"the first is not known", `"count":3`, ""},
		{"the last address of all", `"count":3,"firstConsecutiveStaticIP":"255.255.255.255"`, "255.255.255.255"},
	} {
		m, err := Parse([]byte(`{"properties":{"masterProfile":{` + tc.master + `}}}`))
		if err != nil {
			t.Fatalf("%s: %v", tc.reason, err)
		}
		if got := strings.Join(m.MasterAddresses(), " "); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.reason, got, tc.want)
		}
	}
}

func TestWindowsNodesListenForSSHUnlessTheFileSaysNo(t *testing.T) {
	for windows, want := range map[string]bool{`"windowsProfile":{}`: true, `"windowsProfile":{"sshEnabled":false}`: false, `"windowsProfile":null`: false, `"x":1`: false} {
		m, err := Parse([]byte(`{"properties":{"masterProfile":{"count":1},` + windows + `}}`))
		if err != nil || m.WindowsSSH != want {
			t.Errorf("%s: %v %v, want %v", windows, m.WindowsSSH, err, want)
		}
	}
}

// TestThePasswordOfWindowsNodesIsRead, and no printed form of the model has it.
func TestThePasswordOfWindowsNodesIsRead(t *testing.T) {
	m, err := Parse([]byte(`{"properties":{"masterProfile":{"count":1},"windowsProfile":{"adminUsername":"winuser","adminPassword":"hush-hush"}}}`))
	if err != nil || m.WindowsUser != "winuser" || m.WindowsPassword != "hush-hush" {
		t.Fatalf("the login of Windows nodes is not read: %v", err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if text := fmt.Sprintf(verb, *m) + fmt.Sprintf(verb, m); strings.Contains(text, "hush") {
			t.Errorf("%s prints the password: %s", verb, text)
		}
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	const master = `"masterProfile":{"count":1}`
	for _, tc := range []struct{ reason, text, code, at, want string }{
		{"nothing", "", "APIModelNotReadable", "", "The API model is empty"},
		{"not JSON", "{\"location\": westus2}", "APIModelNotReadable", "location", "line 1, column 14"},
		{"cut off", `{"properties":{`, "APIModelNotReadable", "properties", "the end of the document"},
		{"a list", `[]`, "APIModelNotReadable", "", "an array was found where an object was expected"},
		{"a number as text", `{"properties":{"masterProfile":{"count":"3"}}}`, "APIModelNotReadable", "properties.masterProfile.count", "a string was found where a whole number"},
		{"a name twice", `{"properties":{},"properties":{}}`, "APIModelNotReadable", "properties", "appears twice"},
		{"some other file", `{"a":1}`, "APIModelNotUsable", "properties", "no properties"},
		{"no masters", `{"properties":{}}`, "APIModelNotUsable", "properties.masterProfile", "no masters"},
		{"no count", `{"properties":{"masterProfile":{}}}`, "APIModelNotUsable", "properties.masterProfile.count", "0 masters"},
		{"a wild count", `{"properties":{"masterProfile":{"count":1000000000}}}`, "APIModelNotUsable", "properties.masterProfile.count", "1000000000 masters"},
		{"no address", `{"properties":{"masterProfile":{"count":1,"firstConsecutiveStaticIP":"10.0.0"}}}`, "APIModelNotUsable", "properties.masterProfile.firstConsecutiveStaticIP", `"10.0.0" is not an IP address`},
		{"another orchestrator", `{"properties":{"orchestratorProfile":{"orchestratorType":"Swarm"},` + master + `}}`, "APIModelNotUsable", "properties.orchestratorProfile.orchestratorType", `"Swarm"`},
		{"peers are no list", `{"properties":{` + master + `,"certificateProfile":{"etcdPeerCertificates":"x"}}}`, "CertificateProfileNotUsable", "properties.certificateProfile.etcdPeerCertificates", "not a list"},
		{"the profile is no object", `{"properties":{` + master + `,"certificateProfile":[]}}`, "CertificateProfileNotUsable", "", "not an object"},
		{"too long", strings.Repeat(" ", maxText+1), "APIModelNotReadable", "", "The API model is 8388609 bytes long"},
	} {
		_, err := Parse([]byte(tc.text))
		var e *fault.Error
		if !errors.As(err, &e) || e.Code != tc.code || e.Target != tc.at || !strings.Contains(e.Message, tc.want) || e.Fix == "" {
			t.Errorf("%s: %v\nwant %s at %q with %q and a fix", tc.reason, err, tc.code, tc.at, tc.want)
		}
	}
}

func TestParseProfileTakesBothShapesAndEveryWayToName(t *testing.T) {
	entries := `"caCertificate":"\r\n -----BEGIN CERTIFICATE-----\r\nAAAA\r\n-----END CERTIFICATE-----",
		"caPrivateKey":"https://Prod1.vault.example:8443/secrets/ca-key/8f5f3f491afd48cb99286ba2aacd39af",
		"apiServerCertificate":" https://v.example/certificates/web/ ",
		"apiServerPrivateKey":"/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/KV1/secrets/key",
		"clientPrivateKey":{"vaultID":"/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/kv1","secretName":"key","version":"v2"},
		"clientCertificate":"", "kubeConfigCertificate":null,
		"etcdPeerPrivateKeys":[null,{"vaultID":"/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/kv1","secretName":"key","secretVersion":"v3"}]`
	wantProfile := Profile{"caCertificate": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")}
	wantReferences := References{
		"caPrivateKey":          {Host: "prod1.vault.example:8443", Kind: "secrets", Name: "ca-key", Version: "8f5f3f491afd48cb99286ba2aacd39af"},
		"apiServerCertificate":  {Host: "v.example", Kind: "certificates", Name: "web"},
		"apiServerPrivateKey":   {Vault: "kv1", Kind: "secrets", Name: "key"},
		"clientPrivateKey":      {Vault: "kv1", Kind: "secrets", Name: "key", Version: "v2"},
		"etcdPeerPrivateKeys/1": {Vault: "kv1", Kind: "secrets", Name: "key", Version: "v3"},
	}
	for reason, text := range map[string]string{"as documented": `{"certificateProfile":{` + entries + `}}`, "as aks-engine reads it": "\xef\xbb\xbf{" + entries + "}"} {
		p, refs, err := ParseProfile([]byte(text))
		if err != nil {
			t.Fatalf("%s: %v", reason, err)
		}
		if d := cmp.Diff(map[string][]byte(wantProfile), map[string][]byte(p)); d != "" {
			t.Errorf("%s: %s", reason, d)
		}
		if d := cmp.Diff(wantReferences, refs); d != "" {
			t.Errorf("%s: %s", reason, d)
		}
	}
	for ref, want := range map[Reference]string{
		wantReferences["caPrivateKey"]:         "https://prod1.vault.example:8443/secrets/ca-key/8f5f3f491afd48cb99286ba2aacd39af",
		wantReferences["apiServerCertificate"]: "https://v.example/secrets/web",
		wantReferences["apiServerPrivateKey"]:  "https://kv1.vault.azure.net/secrets/key",
	} {
		if got, err := ref.URL("vault.azure.net"); err != nil || got != want {
			t.Errorf("%+v is at %s %v, want %s", ref, got, err, want)
		}
	}
	if got, err := wantReferences["apiServerPrivateKey"].URL(""); err == nil || !strings.Contains(err.Error(), "in which cloud the vault kv1 is") {
		t.Errorf("in no cloud: %s %v", got, err)
	}
}

func TestParseProfileSaysWhatIsWrong(t *testing.T) {
	const vault = "/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/v"
	for _, tc := range []struct{ reason, text, at, want string }{
		{"a typing error", `{"caCertifcate":"x"}`, "caCertifcate", `"caCertifcate" is not an entry`},
		{"a typing error, wrapped", `{"certificateProfile":{"caCertifcate":"x"}}`, "certificateProfile.caCertifcate", `"caCertifcate" is not an entry`},
		{"something beside it", `{"certificateProfile":{},"note":1}`, "note", "nothing may stand beside"},
		{"something before it", `{"note":1,"certificateProfile":{}}`, "note", "nothing may stand beside"},
		{"the whole API model", string(example(t)), "properties", "this is an API model"},
		{"text that is no PEM", `{"caCertificate":"MIIB"}`, "caCertificate", "neither PEM nor the address"},
		{"a path", `{"caCertificate":"/etc/kubernetes/certs/ca.crt"}`, "caCertificate", "neither PEM nor the address"},
		{"a number", `{"caCertificate":1}`, "caCertificate", "neither text nor an object"},
		{"an unsafe URL", `{"caCertificate":"http://v.example/secrets/a"}`, "caCertificate", "begins with https://"},
		{"a URL with a password", `{"caCertificate":"https://u:hunter2@v.example/secrets/a"}`, "caCertificate", "no user"},
		{"a URL of something else", `{"caCertificate":"https://v.example/keys/a"}`, "caCertificate", "/secrets/NAME"},
		{"a URL that climbs", `{"caCertificate":"https://v.example/secrets/%2e%2e"}`, "caCertificate", "cannot be the name of a secret"},
		{"a host that is none", `{"caCertificate":"https://v@example/secrets/a"}`, "caCertificate", "no user"},
		{"an id of something else", `{"caCertificate":"/subscriptions/s/x"}`, "caCertificate", "/secrets/NAME"},
		{"an id of another provider", `{"caCertificate":"/subscriptions/s/resourceGroups/g/providers/Microsoft.Storage/vaults/v/secrets/a"}`, "caCertificate", "id of the vault"},
		{"a vault that leads elsewhere", `{"caCertificate":"/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/evil.example/secrets/a"}`, "caCertificate", "cannot be the name of a vault"},
		{"an object of another form", `{"caCertificate":{"vaultId":"` + vault + `","secretName":"a"}}`, "caCertificate", "vaultID, secretName and version"},
		{"an object without a name", `{"caCertificate":{"vaultID":"` + vault + `"}}`, "caCertificate", "cannot be the name of a secret"},
		{"a list in a list", `{"etcdPeerCertificates":[[]]}`, "etcdPeerCertificates/0", "neither text nor an object"},
		{"no list", `{"etcdPeerCertificates":{}}`, "etcdPeerCertificates", "not a list"},
		{"a long list", `{"etcdPeerCertificates":[` + strings.Repeat("null,", 99) + `null]}`, "etcdPeerCertificates", "100 elements"},
		{"no object", `"x"`, "", "not an object"},
		{"no JSON", `-----BEGIN CERTIFICATE-----`, "", "line 1, column"},
	} {
		_, _, err := ParseProfile([]byte(tc.text))
		var e *fault.Error
		if !errors.As(err, &e) || e.Kind != fault.Invalid || e.Target != tc.at || !strings.Contains(e.Message, tc.want) || e.Fix == "" {
			t.Errorf("%s: %v\nwant something at %q with %q and a fix", tc.reason, err, tc.at, tc.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the password is shown: %v", tc.reason, err)
		}
	}
}

// newProfile is a whole profile that is not the one of the example.
func newProfile(peers int) Profile {
	p := Profile{}
	for _, name := range Names(peers) {
		p[name] = []byte("-----BEGIN NEW-----\n" + name + "+/=\n-----END NEW-----\n")
	}
	return p
}

func TestWithChangesTheProfileOnly(t *testing.T) {
	m, err := Parse(example(t))
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.With(newProfile(3))
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "with.golden.json")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Error(d)
	}
	if same, err := m.With(m.Profile); err != nil || !bytes.Equal(same, example(t)) {
		t.Errorf("the profile of a file that aks-engine wrote is written otherwise (%v):\n%s", err, cmp.Diff(string(example(t)), string(same)))
	}
}

func TestWithRefuses(t *testing.T) {
	m, err := Parse([]byte(`{"properties":{"masterProfile":{"count":1}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.With(Profile{}); err == nil || !strings.Contains(err.Error(), "no certificate profile") {
		t.Errorf("a file without a profile: %v", err)
	}
	if m, err = Parse(example(t)); err != nil {
		t.Fatal(err)
	}
	for reason, p := range map[string]Profile{
		"an unknown entry":   {"frontProxyCertificate": []byte("x")},
		"a list as an entry": {"etcdPeerCertificates": []byte("x")},
		"a wild index":       {"etcdPeerCertificates/999999999": []byte("x")},
		"an odd index":       {"etcdPeerCertificates/01": []byte("x")},
		"not text":           {"caCertificate": []byte("\xffhunter2")},
	} {
		if _, err := m.With(p); fault.KindOf(err) != fault.Invalid || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", reason, err)
		}
	}
}

func TestPrintingShowsNoKey(t *testing.T) {
	m, err := Parse(example(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{m, *m, m.Profile, struct{ P Profile }{m.Profile}, []*Model{m}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			got := fmt.Sprintf(verb, v)
			if strings.Contains(got, "OLD") || strings.Contains(got, "4f4c44") || strings.Contains(got, "79 76 68") || strings.Contains(got, "not-a-real") {
				t.Errorf("%s of %T shows a key: %s", verb, v, got)
			}
		}
	}
	if got := m.Profile.GoString(); strings.Contains(got, "OLD") || !strings.Contains(got, "caPrivateKey") {
		t.Errorf("as Go: %s", got)
	}
}

// TestWithIsSeenNowhereElse is the promise of the package.
func TestWithIsSeenNowhereElse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text, before, after := drawModel(t)
		m, err := Parse([]byte(text))
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		p := m.Profile
		if rapid.Bool().Draw(t, "another") {
			p = drawProfile(t)
		}
		got, err := m.With(p)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(got), before) || !strings.HasSuffix(string(got), after) {
			t.Fatalf("something else changed:\n%s\n%s", text, got)
		}
		again, err := Parse(got)
		if err != nil {
			t.Fatalf("%v\n%s", err, got)
		}
		if d := cmp.Diff(map[string][]byte(p), map[string][]byte(again.Profile)); d != "" {
			t.Fatalf("another profile: %s\n%s", d, got)
		}
		for name, ref := range m.References {
			if _, replaced := p[name]; !replaced && again.References[name] != ref {
				t.Fatalf("the reference %s is lost:\n%s", name, got)
			}
		}
		if len(again.keep) != len(m.keep) {
			t.Fatalf("a member is lost:\n%s", got)
		}
		if twice, err := again.With(p); err != nil || !bytes.Equal(twice, got) {
			t.Fatalf("written again it is otherwise (%v):\n%s\n%s", err, got, twice)
		}
	})
}

// drawModel draws a file, and what stands before and after the profile in it.
func drawModel(t *rapid.T) (text, before, after string) {
	nl := rapid.SampledFrom([]string{"", "\n", "\r\n"}).Draw(t, "newline")
	unit := rapid.SampledFrom([]string{"", " ", "  ", "   ", "\t", "    "}).Draw(t, "unit")
	one, two := nl+unit, nl+unit+unit
	if nl == "" {
		one, two = unit, unit
	}
	decoy := `"certificateProfile":{"caCertificate":"decoy"},` + one
	before = rapid.SampledFrom([]string{"", "\xef\xbb\xbf"}).Draw(t, "mark") + "{" + one + `"location": "x", ` + rapid.SampledFrom([]string{"", decoy, `"a":{"properties":{` + decoy + `"b":1}},`}).Draw(t, "decoy") +
		`"properties":{` + two + `"masterProfile":{"count":3,"note":"` + rapid.SampledFrom([]string{"", `\"certificateProfile\":`, "ü", `}`}).Draw(t, "note") + `"},` + two + `"certificateProfile"` +
		rapid.SampledFrom([]string{":", ": ", " :" + two}).Draw(t, "colon")
	after = rapid.SampledFrom([]string{"", two + `,"featureFlags":{}`, `,` + two + `"z":[1,2]`}).Draw(t, "after") + one + "}" + nl + "}" + nl
	var members []string
	p := drawProfile(t)
	for _, name := range scalars() {
		switch rapid.IntRange(0, 3).Draw(t, name) {
		case 0:
		case 1:
			members = append(members, fmt.Sprintf(`"%s":"https://v.example/secrets/%s"`, name, name))
		default:
			members = append(members, fmt.Sprintf("%q: %q", name, p[name]))
		}
	}
	for _, list := range lists() {
		var items []string
		for i := range length(p, list) {
			items = append(items, fmt.Sprintf("%q", p[item(list, i)]))
		}
		members = append(members, fmt.Sprintf("%q:[%s]", list, strings.Join(items, ",")))
	}
	if rapid.Bool().Draw(t, "unknown") {
		members = append(members, `"later":{"a" : [1 , "ü"]}`)
	}
	members = rapid.Permutation(members).Draw(t, "order")
	return before + "{" + strings.Join(members, ",") + "}" + after, before, after
}

func drawProfile(t *rapid.T) Profile {
	p := Profile{}
	for _, name := range Names(rapid.IntRange(0, 3).Draw(t, "peers")) {
		if rapid.Bool().Draw(t, name) {
			p[name] = []byte("-----BEGIN X-----\n" + rapid.StringMatching(`[A-Za-z0-9+/=]{1,8}`).Draw(t, "body") + "\n-----END X-----\n")
		}
	}
	return p
}

func FuzzParse(f *testing.F) {
	f.Add(example(f))
	f.Add([]byte("\xef\xbb\xbf{\"properties\":{\"masterProfile\":{\"count\":1},\"certificateProfile\":{\"caCertificate\":1,\"x\":{}, \"etcdPeerCertificates\":[\"\",null]}}}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := Parse(text)
		if err != nil {
			if fault.KindOf(err) == fault.Internal {
				t.Fatalf("not an error for people: %v", err)
			}
			return
		}
		if len(m.MasterAddresses()) > maxMasters {
			t.Error("more masters than there can be")
		}
		if m.to == 0 {
			return
		}
		got, err := m.With(m.Profile)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(got)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v\n%s", err, got)
		}
		if d := cmp.Diff(map[string][]byte(m.Profile), map[string][]byte(again.Profile)); d != "" {
			t.Error(d)
		}
		if !bytes.Equal(got[:m.from], text[:m.from]) || !bytes.HasSuffix(got, text[m.to:]) {
			t.Error("something else changed")
		}
	})
}

func FuzzParseProfile(f *testing.F) {
	f.Add([]byte(`{"certificateProfile":{"caCertificate":"-----BEGIN CERTIFICATE-----\r\nA"}}`))
	f.Add([]byte(`{"caPrivateKey":"https://v.example/secrets/a/b","clientPrivateKey":{"vaultID":"/subscriptions/s/resourceGroups/g/providers/Microsoft.KeyVault/vaults/v","secretName":"n"},"etcdPeerCertificates":["/subscriptions/x",null]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, refs, err := ParseProfile(text)
		if err != nil {
			if fault.KindOf(err) == fault.Internal {
				t.Fatalf("not an error for people: %v", err)
			}
			return
		}
		for name := range p {
			if _, _, ok := split(name); !ok {
				t.Errorf("there is no entry %q", name)
			}
		}
		for _, r := range refs {
			u, err := r.URL("vault.example")
			if err != nil || !strings.HasPrefix(u, "https://") || strings.ContainsAny(u, "@?#% \\") {
				t.Errorf("%+v is at %q: %v", r, u, err)
			}
		}
	})
}
