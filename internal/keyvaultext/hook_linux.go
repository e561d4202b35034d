package keyvaultext

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/effect"
)

func hookNoteName(link string) string {
	sum := sha256.Sum256([]byte(link))
	return "hook-" + hex.EncodeToString(sum[:8]) + ".json"
}

func writeHookNote(state *os.Root, n hookNote) error {
	data, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("encoding reload hook note: %w", err)
	}
	return replaceFile(state, hookNoteName(n.Link), "reload hook note", data, nil)
}

// readHookNote returns the note about link; the zero note if there is none or
// it cannot be read.
func readHookNote(state *os.Root, link string) hookNote {
	var n hookNote
	data, err := state.ReadFile(hookNoteName(link))
	if err != nil || json.Unmarshal(data, &n) != nil || n.Link != link {
		return hookNote{}
	}
	return n
}

// runHook runs the command in a process group of its own, without a shell, and
// kills the group when the time is over or ctx ends.
func runHook(ctx context.Context, h extension.ReloadHook) (exitCode int, message string, err error) {
	output, err := os.CreateTemp("", "keyfleet-hook-")
	if err != nil {
		return -1, "", fmt.Errorf("creating a file for the hook's output: %w", err)
	}
	defer output.Close()
	_ = os.Remove(output.Name()) // it lives as long as it is open

	ctx, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Argv[0], h.Argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	cmd.Stdout, cmd.Stderr = output, output // a file: a daemon that the hook starts must not hold us
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }

	started := time.Now()
	err = effect.Do("run reload hook", cmd.Run)
	took := time.Since(started).Round(time.Millisecond)
	command := strings.Join(h.Argv, " ")
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, fmt.Sprintf("%s succeeded in %s.", command, took), nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return -1, fmt.Sprintf("%s was killed after %s.%s", command, h.Timeout, lastWords(output)), nil
	case ctx.Err() != nil:
		return -1, "", fmt.Errorf("running reload hook: %w", context.Cause(ctx))
	case errors.As(err, &exit):
		return exit.ExitCode(), fmt.Sprintf("%s failed with exit code %d.%s", command, exit.ExitCode(), lastWords(output)), nil
	}
	return -1, fmt.Sprintf("%s could not be started: %s.", command, oneLine(err.Error())), nil
}

// lastWords quotes the end of a failed hook's output, unless it shows a key.
func lastWords(output *os.File) string {
	const limit = 512
	size, err := output.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		return ""
	}
	whole := make([]byte, min(size, 64<<10))
	n, _ := output.ReadAt(whole, size-int64(len(whole)))
	if strings.Contains(string(whole[:n]), "PRIVATE KEY") {
		return " Its output holds a private key and is not shown."
	}
	return " It said: " + oneLine(string(whole[max(0, n-limit):n]))
}
