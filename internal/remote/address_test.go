package remote

import (
	"net"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh/knownhosts"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote/remotetest"
)

func TestParseAddress(t *testing.T) {
	for _, tc := range []struct{ in, user, address string }{
		{"my-cluster.westus2.cloudapp.azure.com", "", "my-cluster.westus2.cloudapp.azure.com:22"},
		{" 10.240.255.5 ", "", "10.240.255.5:22"},
		{"host:50001", "", "host:50001"},
		{"bob@host", "bob", "host:22"},
		{"bob@host:2222", "bob", "host:2222"},
		{"fd00::5", "", "[fd00::5]:22"},
		{"[fd00::5]", "", "[fd00::5]:22"},
		{"[fd00::5]:2222", "", "[fd00::5]:2222"},
		{"fe80::1%eth0", "", "[fe80::1%eth0]:22"},
		{"ssh://host", "", "host:22"},
		{"ssh://bob@host:2222", "bob", "host:2222"},
		{"SSH://bob@[fd00::5]:2222/", "bob", "[fd00::5]:2222"},
		{"ssh://[fd00::5]", "", "[fd00::5]:22"},
		// The URI of the API server says which machine, and not which port SSH has.
		{"https://my-cluster.westus2.cloudapp.azure.com", "", "my-cluster.westus2.cloudapp.azure.com:22"},
		{"https://10.0.0.1:6443/healthz", "", "10.0.0.1:22"},
		{"https://[fd00::5]:443", "", "[fd00::5]:22"},
	} {
		user, address, err := ParseAddress(tc.in)
		if err != nil || user != tc.user || address != tc.address {
			t.Errorf("%q: %q, %q, %v", tc.in, user, address, err)
		}
	}
	for in, why := range map[string]string{
		"": "host is missing", "ssh://": "host is missing", "bob@": "host is missing", "@host": "user is missing",
		"host:": "port", "host:ssh": "port", "host:0": "port", "host:65536": "port", "ssh://host:x": "not a URI",
		"a b": "not a name", "host\n": "", "a,b": "not a name", "*.example": "not a name", "[host]:22": "",
		"a:b:c": "not a name", "ssh://bob:pw@host": "password", "-oProxyCommand=x@host": "user is not a name",
		"#host": "not a name",
	} {
		_, _, err := ParseAddress(in)
		if in == "host\n" || in == "[host]:22" { // harmless
			if err != nil {
				t.Errorf("%q: %v", in, err)
			}
			continue
		}
		want(t, err, fault.Invalid, why, "Fix:")
		if strings.Contains(err.Error(), "pw") {
			t.Errorf("the password is shown: %v", err)
		}
	}
}

// What is accepted can be dialled, means the same when read again, and is found
// again in known_hosts.
func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"host", "bob@host:22", "ssh://bob@[fd00::5]:2222/", "https://h:6443", "fe80::1%eth0", "::", "[::1]:1", "a:b", "ssh://%41@h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		user, address, err := ParseAddress(s)
		if err != nil {
			return
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil || host == "" || port == "" || strings.ContainsAny(user+address, " \t\r\n,#*!") {
			t.Fatalf("%q became %q, %q: %v", s, user, address, err)
		}
		if user2, again, err := ParseAddress(address); err != nil || user2 != "" || again != address {
			t.Fatalf("%q, read again, is %q, %q: %v", address, user2, again, err)
		}
	})
}

func TestAddressesAreFoundAgainInKnownHosts(t *testing.T) {
	key := remotetest.NewKey(t, "ed25519").Public
	for _, address := range []string{"host:22", "host:2222", "10.0.0.1:22", "[fd00::5]:22", "[fd00::5]:2222", "[fe80::1%eth0]:22"} {
		file := t.TempDir() + "/new/known_hosts"
		k := &keyring{files: []string{file}}
		m := machine{name: "m", address: address}
		var unknown *unknownKey
		if err := k.check(m, key); !asUnknown(err, &unknown) {
			t.Fatal(err)
		}
		if err := k.add([]Fingerprint{unknown.print}); err != nil {
			t.Fatal(err)
		}
		if err := k.check(m, key); err != nil {
			t.Errorf("%s is not found as %q: %v", address, unknown.print.Line, err)
		}
		if _, err := knownhosts.New(file); err != nil {
			t.Error(err)
		}
	}
}
