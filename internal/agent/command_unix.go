//go:build !windows

package agent

import (
	"os/exec"
	"syscall"
)

// shellCommand runs a command line as the contract says. line begins with the
// package's folder, whose name needs no quoting (handlerForm, versionForm).
func shellCommand(line string) *exec.Cmd { return exec.Command("/bin/sh", "-c", line) }

// inSession gives the command a session and so a process group of its own.
func inSession(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

// killGroup ends the command and everything in its process group.
func killGroup(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // it may have just ended
