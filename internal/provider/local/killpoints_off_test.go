//go:build !killpoints

package local_test

// initEnv is the environment of first processes: nothing, without kill points.
func initEnv() []string { return nil }
