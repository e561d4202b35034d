package main

// localCommands are the sub-commands that the local provider runs.
func localCommands() []command { return nil }
