//go:build !killpoints

package server

// nodeEnvironment is what local nodes get besides their own environment: nothing.
func nodeEnvironment() []string { return nil }
