package cli

import (
	"bytes"
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"keyfleet": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		os.Exit(Main(ctx, os.Args[1:], Streams{Version: "v0.0.0-test"}))
	}})
}

// The scripts in testdata/double say what the tool prints, sends and how it
// ends, against a server that answers what the script says.
func TestScripts(t *testing.T) {
	ds := &doubles{of: map[string]*double{}}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/double", Cmds: ds.commands(), RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error { return cleanEnv(e) },
	})
}

// cleanEnv keeps the environment of whoever runs the tests out of them.
func cleanEnv(e *testscript.Env) error {
	e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
	e.Setenv("XDG_CONFIG_HOME", "")
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "KEYFLEET_") {
			e.Setenv(name, "")
		}
	}
	return nil
}

// The scripts in testdata/script need a running server that was started with
// --dev; KEYFLEET_TEST_SERVER names its data directory.
func TestRealServer(t *testing.T) {
	dir := os.Getenv("KEYFLEET_TEST_SERVER")
	if dir == "" {
		t.Skip("KEYFLEET_TEST_SERVER does not name the data directory of a running server")
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("DATA", dir)
			return cleanEnv(e)
		},
	})
}

// testTool builds the tree of commands without an environment.
func testTool() *cobra.Command {
	return newTool(Streams{In: strings.NewReader(""), Out: &bytes.Buffer{}, Err: &bytes.Buffer{}, Env: func(string) string { return "" }}).root()
}

func TestReferenceIsCurrent(t *testing.T) {
	got := markdown(testTool())
	want, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Error("docs/cli.md is not what the commands say; write it anew: go run ./cmd/keyfleet docs markdown > docs/cli.md")
	}
}

func TestEveryCommandIsDescribed(t *testing.T) {
	walk(testTool(), func(c *cobra.Command) {
		if c.HasParent() && c.Parent().Name() == "completion" {
			return
		}
		if c.Short == "" || strings.HasSuffix(c.Short, ".") || c.Short[:1] != strings.ToUpper(c.Short[:1]) {
			t.Errorf("%s: the short description %q is no phrase that starts with a capital and has no full stop", c.CommandPath(), c.Short)
		}
		page := man(c, "v1")
		if !strings.HasPrefix(page, ".TH ") || !strings.Contains(page, ".SH SYNOPSIS") {
			t.Errorf("%s: the man page has no head", c.CommandPath())
		}
		for _, line := range strings.Split(unindent(c.Example), "\n") {
			if i := strings.Index(line, "keyfleet "); i >= 0 {
				checkCommand(t, "the example of "+c.CommandPath(), line[i:])
			}
		}
		// "connection create" takes a secret as az aks connection does, and warns; its values describe a target.
		for _, name := range []string{"value", "password", "client-secret", "secret"} {
			if c.Flags().Lookup(name) != nil && c.CommandPath() != "keyfleet connection create" {
				t.Errorf("%s has the flag --%s: secrets are never given on the command line", c.CommandPath(), name)
			}
		}
	})
}

// Every command that an error of the server or of this tool tells people to
// type must exist, with its flags.
func TestFixCommandsExist(t *testing.T) {
	found := 0
	for _, root := range []string{"../../internal", "../../client", "../../cmd", "../../api"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return nil // being written; its own package's build says so
			}
			ast.Inspect(f, func(n ast.Node) bool {
				lit, ok := n.(*ast.BasicLit)
				if !ok || lit.Kind != token.STRING {
					return true
				}
				s, err := strconv.Unquote(lit.Value)
				if err != nil || strings.Contains(s, "\n") {
					return true
				}
				for _, m := range typedCommand.FindAllString(s, -1) {
					found++
					checkCommand(t, path, m)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 20 {
		t.Errorf("only %d commands were found in the sources; the pattern no longer fits them", found)
	}
	t.Logf("%d commands checked", found)
}

// Every command line in the README and the pages must exist, with its flags.
func TestDocumentedCommandsExist(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			line = strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(line), "$ "), "bin/")
			if m := typedCommand.FindString(line); m != "" && strings.HasPrefix(line, m) && !strings.HasSuffix(page, "cli.md") {
				found++
				checkCommand(t, page, m)
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d command lines were found in the pages", found)
	}
}

// typedCommand finds commands in messages: from the program's name and a known
// noun to the end of the command.
var typedCommand = regexp.MustCompile(`keyfleet (?:account|application|audit|certificate|cluster|connection|context|dev|doctor|extension|group|host|hosts|identity|login|logout|node|pool|provider|role|secret|server|subscription|vault|version|%s)\b[^,;"()` + "`" + `]*`)

var hole = regexp.MustCompile(`%[a-z]`)

// checkCommand checks that a command line names an existing command with existing flags.
func checkCommand(t *testing.T, where, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, " # ")
	line, _, _ = strings.Cut(line, " | ")
	line, _, _ = strings.Cut(line, " > ")
	line, _, _ = strings.Cut(line, " shows ")
	words := strings.Fields(hole.ReplaceAllString(line, "X"))
	if words[1] == "X" || strings.HasPrefix(words[1], "%") { // the noun is filled in
		return
	}
	c, rest, err := testTool().Find(words[1:])
	if err != nil || !c.HasParent() {
		t.Errorf("%s: there is no command %q", where, line)
		return
	}
	if c.HasSubCommands() && !(len(rest) > 0 && rest[0] == "X") {
		t.Errorf("%s: %q is not a whole command", where, line)
	}
	for _, w := range rest {
		if name, ok := strings.CutPrefix(w, "--"); ok && name != "" && !strings.HasPrefix(name, "X") {
			name, _, _ = strings.Cut(strings.TrimRight(name, ".:"), "=")
			if c.Flag(name) == nil {
				t.Errorf("%s: %q: %s has no flag --%s", where, line, c.CommandPath(), name)
			}
		}
	}
}
