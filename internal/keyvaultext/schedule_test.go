package keyvaultext

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func TestTwentyFiveTriesTakeAQuarterOfAnHour(t *testing.T) {
	timing := DefaultTiming()
	var p progress
	now := noon
	last := time.Duration(0)
	for range timing.Tries {
		p = p.after(outcome{problem: fault.New(fault.Denied, "Forbidden", "no")}, now, time.Hour, timing, 0)
		wait := p.next.Sub(now)
		if wait < last {
			t.Errorf("try %d waits %s, the one before %s: the back-off must grow", p.failures, wait, last)
		}
		last, now = wait, p.next
	}
	if total := now.Sub(noon); total < 10*time.Minute || total > 20*time.Minute {
		t.Errorf("25 tries take %s", total)
	}
}

func TestProgress(t *testing.T) {
	timing := DefaultTiming()
	failed := fault.New(fault.Unavailable, "VaultError", "no")
	cases := []struct {
		why      string
		before   progress
		o        outcome
		interval time.Duration
		failures int
		wait     time.Duration
	}{
		{"success: the next poll is the interval", progress{failures: 9}, outcome{}, time.Hour, 0, time.Hour},
		{"the first failure is retried soon", progress{synced: true}, outcome{problem: failed}, time.Hour, 1, time.Second},
		{"retries are never further apart than polls", progress{failures: 30}, outcome{problem: failed}, 5 * time.Second, 31, 5 * time.Second},
		{"the server says when", progress{}, outcome{problem: failed.After(3 * time.Minute)}, time.Minute, 1, 3 * time.Minute},
		{"but not for ever", progress{}, outcome{problem: failed.After(5 * time.Hour)}, time.Hour, 1, 10 * time.Minute},
		{"tries caused by hints do not use up the 25", progress{failures: 7}, outcome{problem: failed, byHint: true}, time.Hour, 7, backoff(7, time.Second, time.Minute)},
	}
	for _, c := range cases {
		got := c.before.after(c.o, noon, c.interval, timing, 0)
		if got.failures != c.failures || got.next.Sub(noon) != c.wait {
			t.Errorf("%s: %d failures, wait %s; want %d, %s", c.why, got.failures, got.next.Sub(noon), c.failures, c.wait)
		}
	}
}

func TestIntervalIsAnUpperBoundAndSpread(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		jitter := rapid.Float64Range(0, 0.999).Draw(rt, "jitter")
		interval := time.Duration(rapid.Int64Range(int64(time.Second), int64(24*time.Hour)).Draw(rt, "interval"))
		wait := (progress{}).after(outcome{}, noon, interval, DefaultTiming(), jitter).next.Sub(noon)
		if wait > interval || wait < interval*9/10 {
			rt.Errorf("polls after %s of %s", wait, interval)
		}
	})
	early := (progress{}).after(outcome{}, noon, time.Hour, DefaultTiming(), 0.9).next
	late := (progress{}).after(outcome{}, noon, time.Hour, DefaultTiming(), 0.1).next
	if late.Sub(early) < time.Minute {
		t.Errorf("the spread is only %s", late.Sub(early))
	}
}

func TestOverallStatus(t *testing.T) {
	problem := fault.New(fault.NotFound, "SecretNotFound", "HTTP 404: none").WithFix("create it")
	local := fault.New(fault.Invalid, "NoSuchAccount", "no user").At("settings.x")
	two := extension.KeyVaultSettings{Certificates: []extension.ObservedCertificate{{URL: "https://a/secrets/A"}, {URL: "https://a/secrets/B"}}}
	wait := two
	wait.RequireInitialSync = true
	cases := []struct {
		why    string
		s      extension.KeyVaultSettings
		all    []progress
		status string
		says   string
	}{
		{"polling has begun: that is success", two, []progress{{}, {}}, "success", successMessage},
		{"what the vault refuses is in the log only", two, []progress{{problem: problem, failures: 99}, {}}, "success", successMessage},
		{"what this node cannot do is an error", two, []progress{{problem: local, local: true, failures: 1}, {synced: true}}, "error", "https://a/secrets/A: NoSuchAccount: no user (settings.x)"},
		{"a failure after the first delivery does not change the status", wait, []progress{{synced: true, problem: problem, failures: 40}, {synced: true}}, "success", successMessage},
		{"waiting says for what", wait, []progress{{synced: true}, {}}, "transitioning", "1 of 2 certificates are missing. https://a/secrets/B: not fetched yet."},
		{"waiting says why", wait, []progress{{problem: problem, failures: 2}, {synced: true}}, "transitioning", "try 3 of 25; 1 of 2 certificates are missing. https://a/secrets/A: SecretNotFound: HTTP 404: none Fix: create it."},
		{"25 tries are the end", wait, []progress{{problem: problem, failures: 25}, {synced: true}}, "error", "gave up the first synchronisation after 25 tries"},
	}
	for _, c := range cases {
		r := overall(c.s, c.all, DefaultTiming())
		if r.status != c.status || !strings.Contains(r.message, c.says) || (r.code != 0) != (c.status == "error") {
			t.Errorf("%s: %+v", c.why, r)
		}
		if len(r.substatus) != 0 {
			t.Errorf("%s: a substatus without a hook", c.why)
		}
	}
}

func TestLogIsRotatedAndBounded(t *testing.T) {
	dir := t.TempDir()
	at := noon
	w := &rotatingLog{folder: dir, limit: 100, now: func() time.Time { at = at.Add(time.Hour); return at }}
	defer w.Close()
	line := []byte(strings.Repeat("x", 59) + "\n")
	for range 40 {
		if _, err := w.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	files, _ := filepath.Glob(filepath.Join(dir, "akvvm_service_*.log"))
	if len(files) != maxLogFiles {
		t.Errorf("%d files, want %d: %v", len(files), maxLogFiles, files)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Size() > 100 {
			t.Errorf("%s is larger than the limit", f)
		}
	}
}
