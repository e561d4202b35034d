package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// build is what this binary is.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Time     string `json:"time,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
}

func (t *tool) versionCommand() *cobra.Command {
	return t.verb("version", "Show the version of this program", "keyfleet version -o json", cobra.NoArgs, func(context.Context, []string) error {
		b := build{Version: t.version}
		if bi, ok := debug.ReadBuildInfo(); ok {
			b.Go = bi.GoVersion
			for _, s := range bi.Settings {
				switch s.Key {
				case "vcs.revision":
					b.Revision = s.Value
				case "vcs.time":
					b.Time = s.Value
				case "vcs.modified":
					b.Modified = s.Value == "true"
				}
			}
		}
		return one(t, b, view[build]{
			name: func(b build) string { return b.Version },
			columns: []column[build]{
				{head: "Version", cell: func(b build) string { return b.Version }},
				{head: "Revision", cell: func(b build) string { return b.Revision }},
				{head: "Time", cell: func(b build) string { return b.Time }},
				{head: "Go", cell: func(b build) string { return b.Go }},
			},
		})
	})
}

// docsCommand writes the reference of the command line from the commands themselves.
func (t *tool) docsCommand() *cobra.Command {
	var dir string
	c := t.verb("docs FORMAT", "Write the reference of this command line: markdown or man", "keyfleet docs markdown > docs/cli.md\nkeyfleet docs man --dir man1",
		cobra.ExactArgs(1), func(_ context.Context, args []string) error {
			root := (&tool{env: func(string) string { return "" }, now: t.now, version: t.version}).root() // without the environment's defaults
			switch args[0] {
			case "markdown":
				_, err := fmt.Fprint(t.out, markdown(root))
				return err
			case "man":
				if dir == "" {
					return usagef("--dir is needed for man pages")
				}
				return writeMan(root, dir, t.version)
			}
			return usagef("%q is not a form of documentation", args[0]).withFix("keyfleet docs markdown")
		})
	c.Flags().StringVar(&dir, "dir", "", "directory for man pages")
	c.Hidden = true
	return c
}

// walk visits every command that people see, parents first.
func walk(c *cobra.Command, fn func(c *cobra.Command)) {
	if c.Hidden || c.Name() == "help" {
		return
	}
	fn(c)
	for _, sub := range c.Commands() {
		walk(sub, fn)
	}
}

// markdown renders docs/cli.md.
func markdown(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("# keyfleet: the command line\n\n<!-- Written by `keyfleet docs markdown`; a test compares. -->\n\n")
	b.WriteString(root.Long + "\n\n" + preface)
	b.WriteString("## Flags of every command\n\n")
	writeFlags(&b, root.PersistentFlags())
	walk(root, func(c *cobra.Command) {
		if c == root || c.Parent().Name() == "completion" {
			return
		}
		level := "##"
		if c.Parent() != root {
			level = "###"
		}
		fmt.Fprintf(&b, "%s %s\n\n", level, c.CommandPath())
		text := c.Long
		if text == "" {
			text = c.Short + "."
		}
		b.WriteString(text + "\n\n")
		if !c.HasSubCommands() {
			fmt.Fprintf(&b, "```\n%s\n```\n\n", c.UseLine())
		}
		if c.Example != "" {
			fmt.Fprintf(&b, "```sh\n%s\n```\n\n", unindent(c.Example))
		}
		writeFlags(&b, c.LocalNonPersistentFlags())
	})
	return strings.TrimRight(b.String(), "\n") + "\n"
}

const preface = `## Output

The answer goes to standard output, everything else to standard error. ` + "`-o`" + ` chooses the form:

| form | what it is |
|---|---|
| table | for people; the default, piped or not |
| json, yaml | the API's own names and values |
| tsv | the table's columns without a head, one line an object, tab, line break and backslash escaped; columns are only ever added at the end |
| name | names, one a line |
| none | nothing; the exit code tells |

` + "`--query`" + ` takes a JMESPath expression over the JSON form.

## Exit codes

| code | meaning |
|---|---|
| 0 | done, as wished |
| 1 | failed |
| 2 | wrong usage |
| 3 | not found |
| 4 | log in needed |
| 5 | not allowed |
| 6 | conflict or precondition: someone changed it, or its state forbids this now |
| 7 | the wait timed out; the operation goes on |
| 9 | partly done: some nodes of several |
| 10 | ` + "`pool what-if --exit-code`" + ` found changes or problems |
| 11 | attention needed: ` + "`doctor`" + ` found something |
| 130 | detached by Ctrl-C; the operation goes on |

## Errors

Errors have one form on standard error, and with ` + "`-o json`" + ` the same keys as JSON under ` + "`error`" + `:

` + "```" + `
Error CODE: what happened.
  Where  the field or resource it is about
  Why    what the server knows about the reason
  Fix    a command to type or a change to make
  Ids    request 3c1f...  (the server's log and audit have the rest)
` + "```" + `

## Environment

| variable | meaning |
|---|---|
| KEYFLEET_CONFIG | configuration file (default ` + "`~/.config/keyfleet/config.yaml`" + `, mode 0600) |
| KEYFLEET_CONTEXT | context, as ` + "`--context`" + ` |
| KEYFLEET_FROM | data directory of a server on this machine; no login is needed |
| KEYFLEET_SERVER, KEYFLEET_ADDRESS, KEYFLEET_CA, KEYFLEET_TENANT, KEYFLEET_CLIENT_ID, KEYFLEET_CLIENT_SECRET | a server without a context |
| KEYFLEET_SUBSCRIPTION, KEYFLEET_GROUP, KEYFLEET_ACCOUNT | defaults of the flags of these names |
| KEYFLEET_OUTPUT | default of ` + "`-o`" + ` |
| KEYFLEET_COMPLETION_LIMIT | how long completion waits for names of the server (300ms) |
| NO_COLOR | no colour |

`

func writeFlags(b *strings.Builder, fs *pflag.FlagSet) {
	any := false
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if !any {
			b.WriteString("| flag | meaning |\n|---|---|\n")
			any = true
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		fmt.Fprintf(b, "| `%s` | %s%s |\n", name, strings.ReplaceAll(f.Usage, "|", "\\|"), flagDefault(f))
	})
	if any {
		b.WriteString("\n")
	}
}

func flagDefault(f *pflag.Flag) string {
	switch f.DefValue {
	case "", "false", "[]", "0", "0s":
		return ""
	}
	return " (default " + f.DefValue + ")"
}

func unindent(s string) string {
	return strings.TrimPrefix(strings.ReplaceAll(s, "\n  ", "\n"), "  ")
}

// writeMan writes a man(1) page for every command.
func writeMan(root *cobra.Command, dir, version string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("writing man pages: %w", err)
	}
	var err error
	walk(root, func(c *cobra.Command) {
		if err == nil {
			name := strings.ReplaceAll(c.CommandPath(), " ", "-")
			err = os.WriteFile(filepath.Join(dir, name+".1"), []byte(man(c, version)), 0o644)
		}
	})
	if err != nil {
		return fmt.Errorf("writing man pages: %w", err)
	}
	return nil
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, "-", `\-`)

// roff escapes text: a dot or an apostrophe at the start of a line is a request otherwise.
func roff(s string) string {
	lines := strings.Split(roffEscapes.Replace(s), "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

// man renders a page of section 1 (man(7)).
func man(c *cobra.Command, version string) string {
	var b strings.Builder
	name := strings.ReplaceAll(c.CommandPath(), " ", "-")
	fmt.Fprintf(&b, ".TH %q 1 \"\" %q \"Keyfleet\"\n", strings.ToUpper(name), "keyfleet "+version)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n.SH SYNOPSIS\n.nf\n%s\n.fi\n", roff(name), roff(c.Short), roff(c.UseLine()))
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	fmt.Fprintf(&b, ".SH DESCRIPTION\n%s\n", strings.ReplaceAll(roff(text), "\n\n", "\n.PP\n"))
	manFlags(&b, "OPTIONS", c.LocalNonPersistentFlags())
	if c.HasParent() {
		manFlags(&b, "OPTIONS OF EVERY COMMAND", c.InheritedFlags())
	} else {
		manFlags(&b, "OPTIONS OF EVERY COMMAND", c.PersistentFlags())
	}
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(unindent(c.Example)))
	}
	var see []string
	for _, sub := range c.Commands() {
		if !sub.Hidden && sub.Name() != "help" {
			see = append(see, `\fB`+roff(strings.ReplaceAll(sub.CommandPath(), " ", "-"))+`\fR(1)`)
		}
	}
	if len(see) > 0 {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s\n", strings.Join(see, ", "))
	}
	return b.String()
}

func manFlags(b *strings.Builder, head string, fs *pflag.FlagSet) {
	first := true
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		if first {
			fmt.Fprintf(b, ".SH %s\n", head)
			first = false
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		fmt.Fprintf(b, ".TP\n\\fB%s\\fR\n%s\n", roff(name), roff(f.Usage+flagDefault(f)))
	})
}
