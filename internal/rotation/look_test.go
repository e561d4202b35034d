package rotation

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLookShowsNoKey: whatever form a kubeconfig has, its key does not leave the machine.
func TestLookShowsNoKey(t *testing.T) {
	for form, text := range map[string]string{
		"yaml":         "clusters:\n- cluster:\n    server: https://a:6443\n    certificate-authority-data: QQ==\nusers:\n- user:\n    client-certificate-data: QQ==\n    client-key-data: c2VjcmV0\n",
		"quoted yaml":  "---\nclusters:\n- cluster:\n    server: \"https://a:6443\"\n    certificate-authority-data: \"QQ==\"\nusers:\n- user:\n    client-certificate-data: \"QQ==\"\n    client-key-data: \"c2VjcmV0\"\n",
		"json":         `{"clusters":[{"cluster":{"server":"https://a:6443","certificate-authority-data":"QQ=="}}],"users":[{"user":{"client-certificate-data":"QQ==","client-key-data":"c2VjcmV0"}}]}`,
		"json, pretty": "{\n  \"clusters\": [{\"cluster\": {\"server\": \"https://a:6443\", \"certificate-authority-data\": \"QQ==\"}}],\n  \"users\": [{\"user\": {\n \"client-certificate-data\": \"QQ==\",\n \"client-key-data\" : \"c2VjcmV0\" }}]\n}",
	} {
		path := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("/bin/sh", "-c", "set -eu\n"+lookScript, "sh", "config:"+path).Output()
		if err != nil {
			t.Fatal(err)
		}
		files, err := parseLook(string(out))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(files[path].Content, []byte("c2VjcmV0")) {
			t.Errorf("%s: the key is shown:\n%s", form, files[path].Content)
		}
		k, err := parseKubeconfig(files[path].Content)
		if err != nil || k.server != "https://a:6443" || k.clientCert == nil {
			t.Errorf("%s: read as %+v, %v", form, k, err)
		}
		kept, err := withoutKey([]byte(text)) // the second line of defence
		if err != nil || strings.Contains(string(kept), "c2VjcmV0") {
			t.Errorf("%s: kept with its key (%v)", form, err)
		}
	}
}
