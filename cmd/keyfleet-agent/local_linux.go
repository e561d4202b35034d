package main

import "keyfleet.dev/keyfleet/internal/provider/local/namespace"

// localCommands are the sub-commands that the local provider runs: the first
// process of a node that is made of namespaces.
func localCommands() []command {
	return []command{{name: "local-init", run: namespace.Init}}
}
