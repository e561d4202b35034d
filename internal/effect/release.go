//go:build !killpoints || windows

package effect

// Do performs one outside effect. The name says what it does, in the words of
// a log line: "commit connections", "rename certificate link".
func Do(_ string, fn func() error) error { return fn() }

// Variable reports whether an environment variable is this package's, and so
// goes on to child processes. In a release build there are none.
func Variable(string) bool { return false }
