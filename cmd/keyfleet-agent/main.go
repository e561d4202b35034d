// Command keyfleet-agent makes a machine a node of a Keyfleet pool: it enrols,
// fetches its goal state and runs the extensions in it.
//
//	keyfleet-agent run --config FILE     run with the configuration of FILE
//	keyfleet-agent join --server URL ... enrol this machine with a join token, then run
//	keyfleet-agent version
//
// Exit statuses: 0 stopped by a signal, 1 failed, 2 wrong usage, 75 the server
// asked for a reboot of the node (who started the agent restarts it).
package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
)

// The exit statuses that have a meaning beyond "failed".
const (
	exitUsage  = 2
	exitReboot = 75
)

// command is a sub-command: it gets the arguments after its name and returns the exit status.
type command struct {
	name string
	help string // one line; empty: not listed
	run  func(args []string) int
}

func main() { os.Exit(dispatch(os.Args[1:])) }

func dispatch(args []string) int {
	commands := append([]command{
		{"run", "run the agent with a configuration file", runAgent},
		{"join", "enrol this machine with a join token, then run the agent", join},
		{"version", "print the version", func([]string) int { fmt.Println(version()); return 0 }},
	}, localCommands()...)
	if len(args) > 0 {
		for _, c := range commands {
			if c.name == args[0] {
				return c.run(args[1:])
			}
		}
		if args[0] == "help" || args[0] == "--help" || args[0] == "-h" {
			usage(os.Stdout, commands)
			return 0
		}
		fmt.Fprintf(os.Stderr, "keyfleet-agent: there is no command %q\n", args[0])
	}
	usage(os.Stderr, commands)
	return exitUsage
}

func usage(w io.Writer, commands []command) {
	fmt.Fprintln(w, "usage: keyfleet-agent COMMAND [--flags]")
	for _, c := range commands {
		if c.help != "" {
			fmt.Fprintf(w, "  %-10s %s\n", c.name, c.help)
		}
	}
}

// version is the module's version or the commit this program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return info.Main.Version
}
