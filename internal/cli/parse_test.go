package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/client"
)

func TestExitCodesOfErrors(t *testing.T) {
	tests := []struct {
		reason string
		err    error
		code   string
		exit   int
	}{
		{"the tool's own", usagef("x"), "Usage", 2},
		{"wrapped", fmt.Errorf("doing: %w", notFoundf("x")), "NotFound", 3},
		{"a refusal of the server", &client.Error{Status: 403, Code: "Forbidden", Message: "No."}, "Forbidden", 5},
		{"a precondition", &client.Error{Status: 412, Code: "ConditionNotMet", Message: "No."}, "ConditionNotMet", 6},
		{"a bad credential", &client.Error{Status: 400, Code: "invalid_client", Message: "No."}, "invalid_client", 4},
		{"no server", &client.Error{Code: "ServerUnreachable", Message: "No."}, "ServerUnreachable", 1},
		{"Ctrl-C", context.Canceled, "Detached", 130},
		{"the time is over", errWaited, "WaitTimedOut", 7},
		{"anything else", errors.New("odd"), "Failed", 1},
	}
	for _, tt := range tests {
		r := reportOf(tt.err)
		if r.Code != tt.code || r.Exit != tt.exit {
			t.Errorf("%s: %s and %d, want %s and %d", tt.reason, r.Code, r.Exit, tt.code, tt.exit)
		}
	}
}

func TestTSVKeepsRowsOnOneLine(t *testing.T) {
	var b strings.Builder
	if err := writeTSV(&b, [][]string{{"a\tb", "c\nd\\"}, {"one\ntwo"}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("a\\tb\tc\\nd\\\\\none\ntwo\n", b.String()); diff != "" {
		t.Errorf("several fields are escaped, a single one is not: (-want +got)\n%s", diff)
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m1s", 25 * time.Hour: "25h0m", 50 * time.Hour: "2d2h", -time.Minute: "-1m0s",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%v) = %s, want %s", time.Duration(d), got, want)
		}
	}
}

func TestPolicyFlagsKeepWhatTheyDoNotName(t *testing.T) {
	old := map[string]any{
		"key_props": map[string]any{"kty": "RSA", "key_size": 4096.0, "reuse_key": true},
		"issuer":    map[string]any{"name": "keyfleet"},
	}
	f := policyFlags{curve: "P-384"}
	f.apply(old, "web", false)
	want := map[string]any{
		"key_props": map[string]any{"kty": "EC", "crv": "P-384", "reuse_key": true},
		"issuer":    map[string]any{"name": "keyfleet"}, "x509_props": map[string]any{}, "secret_props": map[string]any{},
	}
	if diff := cmp.Diff(want, old); diff != "" {
		t.Errorf("another curve means another type, and no size of the old one: (-want +got)\n%s", diff)
	}
}

func FuzzHostsBlock(f *testing.F) {
	f.Add("127.0.0.1 localhost\n", "127.0.0.1 arm.x")
	f.Add("no line break", "a b")
	f.Add(hostsBegin+"\nx\n"+hostsEnd+"\nrest", "a b")
	f.Fuzz(func(t *testing.T, text, line string) {
		if strings.ContainsAny(line, "\n\r") || strings.Contains(line, "keyfleet") {
			t.Skip("a line of ours has no line break and no mark")
		}
		with, err := hostsBlock(text, []string{line})
		if err != nil {
			return // marks in an order that was not expected: nothing is written
		}
		again, err := hostsBlock(with, []string{line})
		if err != nil || again != with {
			t.Fatalf("writing twice is not writing once: %q, then %q, %v", with, again, err)
		}
		out, err := hostsBlock(with, nil)
		if err != nil {
			t.Fatal(err)
		}
		without, err := hostsBlock(text, nil)
		if err != nil {
			t.Fatal(err)
		}
		if out != without && out != without+"\n" {
			t.Fatalf("what is not ours changed: %q became %q", without, out)
		}
	})
}

func FuzzAuditLine(f *testing.F) {
	f.Add([]byte(`{"seq":1,"prev":"0","record":{},"hash":"aa"}`))
	f.Add([]byte(`,"hash":""}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var a auditFiles
		if a.next(line) == nil && (a.Lines != 1 || a.Hash == "") {
			t.Errorf("%q was accepted and not counted", line)
		}
	})
}

func FuzzObjectArgs(f *testing.F) {
	for _, s := range []string{"prod1/web", "https://prod1.vault.azure.cn/secrets/web/8f5f3f491afd48cb99286ba2aacd39af", "https://x/", "a//b", "/"} {
		f.Add(s)
	}
	tl := newTool(Streams{})
	c, err := client.New(client.Config{
		Endpoints:   (&double{}).names(),
		TokenSource: func(context.Context, string) (client.Token, error) { return client.Token{}, errors.New("none") },
	})
	if err != nil {
		f.Fatal(err)
	}
	tl.client, tl.target = c, &target{}
	f.Fuzz(func(t *testing.T, arg string) {
		v, err := tl.objectArgs(t.Context(), []string{arg})
		if err == nil && (v.name == "" || !strings.HasSuffix(v.base, ".vault.kf.test:8443")) {
			t.Errorf("%q was taken for %+v: a secret would be asked of another host", arg, v)
		}
	})
}
