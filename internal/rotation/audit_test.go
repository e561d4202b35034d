package rotation

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// event is a line of an audit log as an API server writes it.
func event(user, hash, at string) string {
	return `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"x","stage":"ResponseComplete","requestURI":"/api/v1/pods","verb":"list","user":{"username":"` + user +
		`","groups":["g"],"extra":{"authentication.kubernetes.io/credential-id":["X509SHA256=` + hash + `"]}},"sourceIPs":["10.0.0.1"],"userAgent":"kubectl","responseStatus":{"code":200},"requestReceivedTimestamp":"` + at +
		`","stageTimestamp":"` + at + `"}` + "\n"
}

func TestAuditLogTellsWhoWasSeen(t *testing.T) {
	log := filepath.Join(t.TempDir(), "audit.log")
	text := event("alice", "aa11", "2026-11-28T10:00:00.000001Z") + event("alice", "aa11", "2026-11-28T10:00:05.5Z") + event("bob", "bb22", "2026-11-28T10:00:02Z") +
		`{"kind":"Event","user":{"username":"system:serviceaccount:a:b","extra":{"authentication.kubernetes.io/credential-id":["JTI=x"]}},"requestReceivedTimestamp":"2026-11-28T10:00:03Z"}` + "\n" +
		`{"kind":"Event","user":{"username":"cut off` // the last line may be half written
	if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("/bin/sh", "-c", "set -eu\n"+auditScript, "sh", log).Output()
	if err != nil {
		t.Fatal(err)
	}
	seen, err := parseAudit(string(out))
	if err != nil || len(seen) != 2 {
		t.Fatalf("seen %v, %v", seen, err)
	}
	if s := seen["aa11"]; s.user != "alice" || !s.at.Equal(time.Date(2026, 11, 28, 10, 0, 5, 5e8, time.UTC)) {
		t.Errorf("alice: %v", s)
	}
	if out, err := exec.Command("/bin/sh", "-c", "set -eu\n"+auditScript, "sh", log+".none").Output(); err != nil || len(out) > 0 {
		t.Errorf("a log that is not there: %q, %v", out, err)
	}
}

func TestWhereTheAuditLogIs(t *testing.T) {
	for manifest, want := range map[string]string{
		"    - --audit-log-path=/var/log/audit.log\n    - --x":      "/var/log/audit.log",
		`args: ["--a=b", "--audit-log-path=/var/log/a.log", "--c"]`: "/var/log/a.log",
		"- --audit-log-path=-\n":                                    "",
		"- --secure-port=6443\n":                                    "",
	} {
		if got := auditLog([]byte(manifest)); got != want {
			t.Errorf("%s: %q, want %q", manifest, got, want)
		}
	}
}

func FuzzAudit(f *testing.F) {
	f.Add("aa|alice|2026-11-28T10:00:00Z\n")
	f.Add("||")
	f.Fuzz(func(t *testing.T, out string) {
		seen, err := parseAudit(out)
		for _, s := range seen {
			if err == nil && s.at.IsZero() {
				t.Errorf("%q was seen at no time", s.user)
			}
		}
	})
}
