package agent

import (
	"os/exec"
	"syscall"
)

// shellCommand runs a command line with the system's shell.
func shellCommand(line string) *exec.Cmd { return exec.Command("cmd.exe", "/C", line) }

// inSession gives the command a process group of its own.
func inSession(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: syscall.CREATE_NEW_PROCESS_GROUP}
}

// killGroup ends the command. Windows has no signal for a group; a job object would be needed for its children.
func killGroup(cmd *exec.Cmd) { _ = cmd.Process.Kill() }
