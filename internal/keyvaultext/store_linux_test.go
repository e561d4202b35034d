package keyvaultext

import (
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"keyfleet.dev/keyfleet/api/extension"
)

// TestStoreUnderReadersAndAStranger switches between versions while four
// readers open the link and another user tries to write, rename and remove in
// the directory: no reader sees a mixed or missing file, nothing foreign arrives.
func TestStoreUnderReadersAndAStranger(t *testing.T) {
	home := t.TempDir()
	dir := filepath.Join(home, "store")
	c := extension.ObservedCertificate{Vault: "kv", Secret: "web", StoreLocation: dir}
	s, err := openStore(c, extension.KeyVaultSettings{KeepVersions: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var bundles []bundle
	for n := 1; n <= 4; n++ {
		certs, key := chainOf(t, n)
		bundles = append(bundles, bundle{leaf: certs[0], chain: certs[1:], key: key})
	}
	nothing := func() error { return nil }
	if _, err := s.put(fmt.Sprintf("%032x", 0), bundles[0], nothing); err != nil {
		t.Fatal(err)
	}
	stranger := annoy(t, home, dir)
	done := make(chan struct{})
	var reads atomic.Int64
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				data, err := os.ReadFile(filepath.Join(dir, "kv.web"))
				if err == nil {
					_, err = tls.X509KeyPair(data, data)
				}
				if err != nil {
					t.Errorf("a reader saw %v", err)
					return
				}
				reads.Add(1)
			}
		})
	}
	switches := 120
	if testing.Short() {
		switches = 30
	}
	for i := 1; i <= switches; i++ {
		done, err := s.put(fmt.Sprintf("%032x", i), bundles[i%len(bundles)], nothing)
		if err != nil || !done.switched {
			t.Fatalf("switch %d: %+v, %v", i, done, err)
		}
	}
	close(done)
	readers.Wait()
	stranger()
	names, err := namesIn(s.root)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if len(names) != 4 || names[0] != "kv.web" || slices.ContainsFunc(names[1:], func(n string) bool { return !storedName.MatchString(n) }) {
		t.Errorf("the directory holds %v, want the link and three files", names)
	}
	t.Logf("%d switches, %d reads, each complete", switches, reads.Load())
}

// annoy runs another user's attempts on the directory until the returned function is called.
func annoy(t *testing.T, home, dir string) (stop func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Log("left out: another user's attempts need root")
		return func() {}
	}
	for d := home; d != "/"; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err == nil && info.Mode()&0o001 == 0 {
			if err := os.Chmod(d, info.Mode()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
	script := strings.ReplaceAll(`while :; do
		for i in 0 1 2 3 4 5 6 7 8 9; do : > D/x; mv D/kv.web D/y; ln -s /etc/passwd D/.keyfleet-kv.web; rm -f D/kv.web; mv D D2; cat D/kv.web; done
		sleep 0.02
	done 2>/dev/null`, "D", dir)
	seen, err := os.Create(filepath.Join(home, "seen"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Stdout = seen
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if info, err := seen.Stat(); err != nil || info.Size() > 0 {
			t.Errorf("the stranger could read the key: %v", err)
		}
		seen.Close()
	}
}

func TestPutTwiceChangesNothing(t *testing.T) {
	c := extension.ObservedCertificate{Vault: "kv", Secret: "web", StoreLocation: filepath.Join(t.TempDir(), "store"), CustomSymbolicLinkName: "web.pem"}
	s, err := openStore(c, extension.KeyVaultSettings{KeepVersions: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	certs, key := chainOf(t, 2)
	b := bundle{leaf: certs[0], chain: certs[1:], key: key}
	asked := 0
	var first, second stored
	for i, out := range []*stored{&first, &second} {
		if *out, err = s.put(strings.Repeat("a", 32), b, func() error { asked++; return nil }); err != nil {
			t.Fatalf("put %d: %v", i+1, err)
		}
	}
	if !first.switched || second.switched || asked != 1 || second.file != first.file || second.link != filepath.Join(c.StoreLocation, "web.pem") {
		t.Errorf("first %+v, second %+v, %d switches announced", first, second, asked)
	}
}
