//go:build !linux

package etcdadmin

import (
	"os"

	"keyfleet.dev/keyfleet/internal/fault"
)

// memoryFile is not there: a file on disk would hold secrets in clear.
func memoryFile() (*os.File, error) {
	return nil, fault.New(fault.Unavailable, "NeedsLinux", "Without an API server the nodes are found in the database of etcd, and this machine cannot hold that in memory.").
		WithFix("run the command on a Linux machine")
}

func reopen(f *os.File) (*os.File, error) { return f, nil }
