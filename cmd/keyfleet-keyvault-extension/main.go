// Command keyfleet-keyvault-extension is the Key Vault extension handler: the
// commands that an agent runs by the VM extension handler contract, and the
// service that they start. See docs/keyvault-extension.md.
//
//	install, enable, update, disable, uninstall   run by the agent, in the package's folder
//	run --base DIR --sequence N                   the service
//	version
package main

import (
	"flag"
	"fmt"
	"os"

	"keyfleet.dev/keyfleet/internal/keyvaultext"
)

// version is set by the linker.
var version = "development"

func main() { os.Exit(dispatch(os.Args[1:])) }

func dispatch(args []string) int {
	if len(args) == 0 {
		return usage()
	}
	commands := map[string]func(*keyvaultext.Handler) int{
		"install":   (*keyvaultext.Handler).Install,
		"enable":    (*keyvaultext.Handler).Enable,
		"update":    (*keyvaultext.Handler).Update,
		"disable":   (*keyvaultext.Handler).Disable,
		"uninstall": (*keyvaultext.Handler).Uninstall,
	}
	if command, ok := commands[args[0]]; ok {
		h, err := keyvaultext.NewHandler(os.Stdout)
		if err != nil {
			return failed(err)
		}
		return command(h)
	}
	switch args[0] {
	case "run":
		return run(args[1:])
	case "version":
		fmt.Println("keyfleet-keyvault-extension", version)
		return keyvaultext.ExitSuccess
	}
	return usage()
}

func run(args []string) int {
	var o keyvaultext.RunOptions
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	flags.StringVar(&o.Base, "base", "", "the package's `folder`, with HandlerEnvironment.json")
	flags.StringVar(&o.Sequence, "sequence", "0", "`number` of the settings file")
	flags.StringVar(&o.Key, "key", "", "set by the enable command")
	flags.BoolVar(&o.HandedOver, "handed-over", false, "set by the enable command")
	if err := flags.Parse(args); err != nil || o.Base == "" {
		return usage()
	}
	if err := keyvaultext.Run(o); err != nil {
		return failed(err)
	}
	return keyvaultext.ExitSuccess
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "keyfleet-keyvault-extension:", err)
	return keyvaultext.ExitFailure
}

func usage() int {
	fmt.Fprintln(os.Stderr, "usage: keyfleet-keyvault-extension install | enable | update | disable | uninstall | run --base DIR [--sequence N] | version")
	return keyvaultext.ExitUsage
}
