package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

// Main runs the command line with its arguments (without the program's name)
// and returns the exit code. ctx ends when the person presses Ctrl-C.
func Main(ctx context.Context, args []string, s Streams) int {
	t := newTool(s)
	root := t.root()
	root.SetArgs(args)
	root.SetIn(t.in)
	root.SetOut(t.out)
	root.SetErr(t.err)
	ran, err := root.ExecuteContextC(ctx)
	if t.client != nil {
		t.client.Close()
	}
	if err == nil {
		return 0
	}
	var quiet exitStatus
	if errors.As(err, &quiet) {
		return int(quiet)
	}
	if s := err.Error(); strings.HasPrefix(s, "required flag(s)") || strings.Contains(s, "flags in the group [") {
		err = usagef("%s", s).withFix("%s --help", ran.CommandPath()) // cobra has no type for these
	}
	return t.fail(err)
}

// exitStatus ends the run with an exit code and no message: the answer says it all.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// root builds the tree of commands.
func (t *tool) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyfleet",
		Short: "Issue, deliver, rotate and watch the credentials of a fleet",
		Long: `keyfleet is the command line of a Keyfleet server: vaults, certificates and
secrets, pools of machines that receive them, and the identities between.

Log in once with "keyfleet login --from DIR", where DIR is the server's data
directory; "keyfleet doctor" says whether everything is in order.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(outputs, t.flags.output) {
				bad := t.flags.output
				t.flags.output = "table" // so that the error itself has a form
				return usagef("-o %s is not known", bad).withFix("use one of %s", strings.Join(outputs, ", "))
			}
			return nil
		},
		RunE: t.nounOnly,
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	f := root.PersistentFlags()
	f.StringVarP(&t.flags.output, "output", "o", envOr(t.env, "KEYFLEET_OUTPUT", "table"), "form of the answer: "+strings.Join(outputs, ", "))
	f.StringVar(&t.flags.query, "query", "", "JMESPath expression that selects from the answer")
	f.StringVar(&t.flags.context, "context", t.env("KEYFLEET_CONTEXT"), "context to use instead of the current one")
	f.StringVar(&t.flags.subscription, "subscription", t.env("KEYFLEET_SUBSCRIPTION"), "subscription id; default: that of the context")
	f.StringVarP(&t.flags.group, "group", "g", t.env("KEYFLEET_GROUP"), "resource group; default: that of the context, or the one where the name is found")
	f.DurationVar(&t.flags.timeout, "timeout", 0, "longest time to wait (0: the command's own limit)")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usagef("%v", err).withFix("%s --help", c.CommandPath())
	})
	t.completeFlags(root)
	root.AddCommand(
		t.loginCommand(), t.logoutCommand(), t.contextCommand(),
		t.subscriptionCommand(), t.groupCommand(), t.providerCommand(), t.roleCommand(), t.applicationCommand(), t.identityCommand(),
		t.clusterCommand(), t.serverCommand(), t.connectionCommand(), t.vaultCommand(), t.secretCommand(), t.certificateCommand(),
		t.accountCommand(), t.poolCommand(), t.nodeCommand(), t.extensionCommand(), t.hostCommand(),
		t.hostsCommand(), t.devCommand(), t.auditCommand(), t.doctorCommand(), t.versionCommand(), t.docsCommand(), t.rotateCertsCommand(),
	)
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	return root
}

// rotateCertsCommand hands everything to the command rotate-certs: its flags are
// those of a documented tool, and some of them mean something else here.
func (t *tool) rotateCertsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rotate-certs", Short: "Replace every certificate, key and CA of a running Kubernetes cluster",
		Long: `Replace every certificate, key and CA of a running Kubernetes cluster, over SSH. It needs no server.
Its flags are its own: see "keyfleet rotate-certs --help" and docs/rotate-certs.md.`,
		DisableFlagParsing: true, DisableFlagsInUseLine: true,
		RunE: func(c *cobra.Command, args []string) error {
			if code := t.rotate(c.Context(), args); code != 0 {
				return exitStatus(code)
			}
			return nil
		},
	}
}

func envOr(env func(string) string, name, def string) string {
	if v := env(name); v != "" {
		return v
	}
	return def
}

// noun makes a command that only holds verbs.
func (t *tool) noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: t.nounOnly}
	c.AddCommand(verbs...)
	return c
}

// nounOnly answers a noun without a verb with its help, and one with an unknown verb with an error.
func (t *tool) nounOnly(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	e := usagef("%q is not a command of %s", args[0], c.CommandPath()).withFix("%s --help", c.CommandPath())
	c.SuggestionsMinimumDistance = 2
	if s := c.SuggestionsFor(args[0]); len(s) > 0 {
		e = e.withFix("%s %s", c.CommandPath(), s[0])
	}
	return e
}

// verb makes a command that does something. args says how many arguments it
// takes; example is shown in the help, one command a line.
func (t *tool) verb(use, short, example string, args cobra.PositionalArgs, run func(ctx context.Context, args []string) error) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, DisableFlagsInUseLine: true}
	if example != "" {
		c.Example = "  " + strings.ReplaceAll(strings.TrimSpace(example), "\n", "\n  ")
	}
	c.Args = func(c *cobra.Command, a []string) error {
		if err := args(c, a); err != nil {
			return usagef("%v; the form is: %s", err, c.UseLine()).withFix("%s --help", c.CommandPath())
		}
		return nil
	}
	c.RunE = func(c *cobra.Command, a []string) error { return run(c.Context(), a) }
	return c
}

// changed tells what is now so: the object in the forms for programs, a sentence for people.
func changed[T any](t *tool, v T, vw view[T], format string, args ...any) error {
	if t.form() == "table" {
		_, err := fmt.Fprintln(t.out, clean(fmt.Sprintf(format, args...)))
		return err
	}
	return one(t, v, vw)
}

// done tells what is now so where there is no object to show.
func (t *tool) done(format string, args ...any) error {
	if t.form() == "table" {
		_, err := fmt.Fprintln(t.out, clean(fmt.Sprintf(format, args...)))
		return err
	}
	return nil
}

// waitFlags adds --wait and --no-wait, and returns whether to wait.
func waitFlags(c *cobra.Command, def bool) func() bool {
	wait := c.Flags().Bool("wait", def, "wait until it is done")
	noWait := c.Flags().Bool("no-wait", false, "return as soon as the server has accepted it")
	c.MarkFlagsMutuallyExclusive("wait", "no-wait")
	return func() bool { return *wait && !*noWait }
}

// defaultWait bounds waits where --timeout is not given.
const defaultWait = 15 * time.Minute

// request is a short form of client.Request.
func request(method, url, version string, body any) client.Request {
	return client.Request{Method: method, URL: url, Version: version, Body: body}
}
