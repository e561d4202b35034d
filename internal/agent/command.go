package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/effect"
)

// The handler contract's environment of a command.
const (
	envPath         = "AZURE_GUEST_AGENT_EXTENSION_PATH"
	envVersion      = "AZURE_GUEST_AGENT_EXTENSION_VERSION"
	envWire         = "AZURE_GUEST_AGENT_WIRE_PROTOCOL_ADDRESS"
	envUninstall    = "AZURE_GUEST_AGENT_UNINSTALL_CMD_EXIT_CODE"
	envDisable      = "AZURE_GUEST_AGENT_DISABLE_CMD_EXIT_CODE"
	envUpdatingFrom = "AZURE_GUEST_AGENT_UPDATING_FROM_VERSION"
	envFeatures     = "AZURE_GUEST_AGENT_EXTENSION_SUPPORTED_FEATURES"
	envSequence     = "ConfigSequenceNumber"
	envExtension    = "ConfigExtensionName"
	envNewVersion   = "VERSION"

	notRun   = "NOT_RUN"
	features = `[{"Key": "ExtensionTelemetryPipeline", "Value": "1.0"}]`
)

// commandLog is the file in a handler's log folder that gets what its commands print.
const commandLog = "CommandExecution.log"

// commandLogLimit is the size in bytes at which the log is put aside as CommandExecution.log.1 and begun anew.
const commandLogLimit = 4 << 20

// command is one run of a handler's command.
type command struct {
	operation string // install, enable, ...
	line      string // path in the package, with arguments
	timeout   time.Duration
	env       map[string]string
}

// outcome is what came of a command.
type outcome struct {
	exit int      // exit status; -1 if it was killed or could not be started
	log  []string // the last lines it printed
	err  error    // nil if it ended with status 0
}

// run runs a command as the contract says: /bin/sh -c in the package's folder,
// in a session of its own, output to a real file (background processes keep it
// open), and after a timeout SIGKILL for the whole process group. What a
// command leaves running in the background after it ended is left alone.
//
// When ctx ends, the agent is being stopped: run returns and the command goes on.
func (a *Agent) run(ctx context.Context, h *handler, c command) outcome {
	log, start, err := openCommandLog(h, c)
	if err != nil {
		return outcome{exit: -1, err: err}
	}
	defer log.Close()
	cmd := shellCommand(filepath.Join(h.dir, strings.TrimLeft(c.line, "/")))
	cmd.Dir = h.dir
	cmd.Env = a.environment(h, c)
	cmd.Stdout, cmd.Stderr = log, log
	inSession(cmd)
	began := time.Now()
	var out outcome
	_ = effect.Do("run "+c.operation+" command", func() error { // the outcome has the error
		out = a.wait(ctx, cmd, c)
		return out.err
	})
	fmt.Fprintf(log, "-- %s %s ended: %s (%s)\n", time.Now().UTC().Format(time.RFC3339), c.operation, describe(out.err), time.Since(began).Round(time.Millisecond))
	if out.err != nil {
		out.log = tailLines(log.Name(), start, logLines)
	}
	a.cfg.Log.Info("handler command", "handler", h.name, "version", h.version, "command", c.operation, "result", describe(out.err))
	return out
}

func describe(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// openCommandLog opens the log that the command's output is appended to, and returns its length.
func openCommandLog(h *handler, c command) (*os.File, int64, error) {
	path := filepath.Join(h.logDir, commandLog)
	if fi, err := os.Stat(path); err == nil && fi.Size() > commandLogLimit {
		_ = os.Rename(path, path+".1") // a failure only lets it grow
	}
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return nil, 0, fmt.Errorf("opening command log: %w", err)
	}
	fi, err := log.Stat()
	if err != nil {
		log.Close()
		return nil, 0, fmt.Errorf("opening command log: %w", err)
	}
	fmt.Fprintf(log, "-- %s %s %s: %s\n", time.Now().UTC().Format(time.RFC3339), h.version, c.operation, c.line)
	return log, fi.Size(), nil
}

// wait starts the command and waits for it, for its timeout, or for ctx.
func (a *Agent) wait(ctx context.Context, cmd *exec.Cmd, c command) outcome {
	if err := cmd.Start(); err != nil {
		return outcome{exit: -1, err: fmt.Errorf("the command could not be started: %w", err)}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the command
	timer := time.NewTimer(c.timeout)
	defer timer.Stop()
	select {
	case err := <-ended:
		return ending(err)
	case <-timer.C:
		killGroup(cmd)
		<-ended
		return outcome{exit: -1, err: fmt.Errorf("the command did not end within %s and was killed", c.timeout)}
	case <-ctx.Done():
		return outcome{exit: -1, err: ctx.Err()}
	}
}

func ending(err error) outcome {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return outcome{exit: exit.ExitCode(), err: errors.New(exit.String())}
	}
	if err != nil {
		return outcome{exit: -1, err: err}
	}
	return outcome{}
}

// environment is the agent's own, without what is not for handlers, and the contract's variables.
func (a *Agent) environment(h *handler, c command) []string {
	env := map[string]string{
		envPath: h.dir, envVersion: h.version, envWire: a.serverName(), envFeatures: features,
		envUninstall: notRun, envDisable: notRun,
		"SSL_CERT_FILE": filepath.Join(a.cfg.LibDir, trustName),
	}
	for k, v := range c.env {
		env[k] = v
	}
	var out []string
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		if _, ours := env[k]; !ours && !notForHandlers(k) {
			out = append(out, kv)
		}
	}
	for k, v := range env {
		out = append(out, k+"="+v)
	}
	return out
}

// notForHandlers are variables that speak to the agent: what systemd gave it,
// its own settings.
func notForHandlers(name string) bool {
	switch name {
	case "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "INVOCATION_ID", extension.HintSocketVariable:
		return true
	}
	return strings.HasPrefix(name, "KEYFLEET_") && !effect.Variable(name)
}

// instanceEnv are the variables about one extension's settings.
func (a *Agent) instanceEnv(h *handler, name string, sequence int) map[string]string {
	env := map[string]string{envSequence: strconv.Itoa(sequence)}
	if n := h.instanceName(name); n != "" {
		env[envExtension] = n
	}
	if p := a.hints.path(name); p != "" {
		env[extension.HintSocketVariable] = p
	}
	return env
}

// The bounds of kept log lines.
const (
	logLines  = 40        // lines of a failing command or log kept for the report
	logLine   = 1 << 10   // bytes of such a line
	tailBytes = 256 << 10 // bytes of a log that are looked at or uploaded
)

// tailLines returns the last n lines of a file after offset from.
func tailLines(path string, from int64, n int) []string {
	text, err := tail(path, from)
	if err != nil {
		return nil
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		lines[i] = strings.ToValidUTF8(l[:min(len(l), logLine)], "�")
	}
	return lines
}

// tail returns what a file has after offset from, at most the last 256 KiB, beginning with a whole line.
func tail(path string, from int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if from > fi.Size() {
		from = 0 // it was begun anew
	}
	cut := fi.Size()-from > tailBytes
	if cut {
		from = fi.Size() - tailBytes
	}
	b, err := io.ReadAll(io.NewSectionReader(f, from, tailBytes))
	if err != nil {
		return nil, err
	}
	if cut {
		if _, whole, ok := strings.Cut(string(b), "\n"); ok {
			b = []byte(whole)
		}
	}
	return b, nil
}
