//go:build !linux

package main

// localCommands are the sub-commands of the local provider, which needs Linux.
func localCommands() []command { return nil }
