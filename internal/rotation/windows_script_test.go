package rotation

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// windowsScripts are all that run on Windows workers, by name.
func windowsScripts() map[string]string {
	return map[string]string{
		"look": psLook, "facts": psFacts, "started": psStarted, "back-up": psBackup, "stage": psStage, "place": psPlace,
		"placed": psPlaced, "restart": psRestart, "lock": psLock, "release": psRelease, "clean": psClean,
	}
}

// TestWindowsScriptsAreAsReviewed: nobody here can run them, so a change of one is
// to be seen as what it is.
func TestWindowsScriptsAreAsReviewed(t *testing.T) {
	for name, text := range windowsScripts() {
		path := filepath.Join("testdata", "windows", name+".ps1")
		if *update {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(want) != text {
			t.Errorf("%s is another script than %s: read both, then go test -update", name, path)
		}
	}
}

// code is a script without what is quoted.
func code(t *testing.T, name, text string) string {
	t.Helper()
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case '\'', '"':
			end := strings.IndexByte(text[i+1:], c)
			if end < 0 {
				t.Fatalf("%s: a quote at %d has no end", name, i)
			}
			if i > 0 && text[i-1] == '@' {
				t.Errorf("%s: a here-string at %d", name, i)
			}
			if strings.Contains(text[i+1:i+1+end], "\n") {
				t.Errorf("%s: a string over lines at %d", name, i)
			}
			out.WriteString("''")
			i += end + 1
		case '`':
			t.Errorf("%s: an escape at %d", name, i)
		case '#':
			t.Errorf("%s: a comment at %d, and comments stand in the Go file", name, i)
		default:
			out.WriteByte(c)
		}
	}
	return out.String()
}

// TestWindowsScriptsAreWellFormed looks at what can be told without a PowerShell.
func TestWindowsScriptsAreWellFormed(t *testing.T) {
	known := []string{
		"Get-Acl", "Get-ChildItem", "Get-FileHash", "Get-Item", "Get-Process", "Get-Service", "Out-Null", "Select-Object",
		"Sort-Object", "Start-Service", "Start-Sleep", "Stop-Service", "Where-Object",
	}
	closes := map[rune]rune{')': '(', '}': '{', ']': '['}
	for name, text := range windowsScripts() {
		bare := code(t, name, text)
		var open []rune
		for _, r := range bare {
			switch r {
			case '(', '{', '[':
				open = append(open, r)
			case ')', '}', ']':
				if len(open) == 0 || open[len(open)-1] != closes[r] {
					t.Fatalf("%s: %q closes what is not open", name, r)
				}
				open = open[:len(open)-1]
			}
		}
		if len(open) > 0 {
			t.Errorf("%s: %q stays open", name, open)
		}
		var own []string
		for _, m := range regexp.MustCompile(`function ([A-Za-z]+-[A-Za-z]+)`).FindAllStringSubmatch(bare, -1) {
			own = append(own, m[1])
		}
		for _, verb := range regexp.MustCompile(`\b[A-Z][a-z]+-[A-Z][A-Za-z]+\b`).FindAllString(bare, -1) {
			if !slices.Contains(known, verb) && !slices.Contains(own, verb) {
				t.Errorf("%s: %s is neither ours nor a cmdlet that we know", name, verb)
			}
		}
		for _, never := range []string{"Invoke-Expression", "windowsnodereset", "Hns", "$args", "$input", "$env:", "exit "} {
			if strings.Contains(bare, never) {
				t.Errorf("%s: has %s", name, never)
			}
		}
	}
}

// TestWindowsScriptsStandBehindTheFence: one that changes something asks for the
// holder first, and again before each change.
func TestWindowsScriptsStandBehindTheFence(t *testing.T) {
	for name, text := range windowsScripts() {
		changes := !slices.Contains([]string{"look", "facts", "started", "placed", "release", "lock"}, name)
		if strings.HasPrefix(text, psFence) != changes {
			t.Errorf("%s: behind the fence is not %t", name, changes)
		}
		body := strings.TrimPrefix(text, psFence)
		if changes && name != "clean" && !strings.Contains(body, "Assert-Holder") {
			t.Errorf("%s: does not look at the holder before each change", name)
		}
	}
	for _, write := range []string{"Write-Whole", "Delete(", "Move(", "Replace($new", "-Service -Name"} {
		for _, name := range []string{"look", "facts", "started", "placed"} {
			if strings.Contains(windowsScripts()[name], write) {
				t.Errorf("%s: only looks, and has %s", name, write)
			}
		}
	}
}
