package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// startWait is how long the caller of a session may take to say what to run.
const startWait = 10 * time.Second

// ServeSession opens the session that the server announced and runs what its
// caller asks for, on this node, as the agent's user. It returns when the
// session is over. It is what [Config.Session] is for.
func ServeSession(ctx context.Context, a *Agent, id, kind string) {
	if kind != "shell" {
		return // of a newer server
	}
	stream, err := a.Upgrade(ctx, "/v1/sessions/"+id, node.SessionProtocol)
	if err != nil {
		a.cfg.Log.Warn("session could not be opened", "session", id, "error", err)
		return
	}
	a.cfg.Log.Info("session opened", "session", id)
	if err := serveSession(ctx, stream); err != nil {
		a.cfg.Log.Warn("session failed", "session", id, "error", err)
		return
	}
	a.cfg.Log.Info("session ended", "session", id)
}

// session is the node's end of a session: one goroutine reads frames, one or
// two write output, and all end with the stream.
type session struct {
	stream io.ReadWriteCloser
	write  sync.Mutex // frames go out one at a time
}

// serveSession runs one session on a stream, which it closes. The error is for the log.
func serveSession(ctx context.Context, stream io.ReadWriteCloser) error {
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { _ = stream.Close() })()
	s := &session{stream: stream}
	start, err := s.readStart()
	if err != nil {
		return err
	}
	p, err := startProcess(start)
	if err != nil {
		_ = s.send(node.FrameFailure, []byte(err.Error()))
		return err
	}
	go s.listen(p) // ends when the stream is closed, at the latest on our return
	var outputs sync.WaitGroup
	for kind, r := range p.outputs {
		outputs.Go(func() { s.copyOutput(kind, r) })
	}
	status := p.wait(&outputs)
	return s.send(node.FrameExit, node.ExitPayload(status))
}

func (s *session) readStart() (node.SessionStart, error) {
	var start node.SessionStart
	late := time.AfterFunc(startWait, func() { _ = s.stream.Close() })
	defer late.Stop()
	var buf []byte
	kind, payload, err := node.ReadFrame(s.stream, &buf)
	if err != nil {
		return start, fmt.Errorf("reading what to run: %w", err)
	}
	if kind != node.FrameStart {
		return start, fmt.Errorf("the session begins with a frame of kind %d", kind)
	}
	if err := json.Unmarshal(payload, &start); err != nil {
		return start, fmt.Errorf("reading what to run: %w", err)
	}
	return start, nil
}

func (s *session) send(kind node.FrameKind, payload []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	return node.WriteFrame(s.stream, kind, payload)
}

// listen acts on the caller's frames. When the caller is gone, the process is told to go too.
func (s *session) listen(p *process) {
	defer p.hangUp()
	var buf []byte
	for {
		kind, payload, err := node.ReadFrame(s.stream, &buf)
		if err != nil {
			return
		}
		switch kind {
		case node.FrameInput:
			_, _ = p.input.Write(payload) // a process that reads no more: its end is what counts
		case node.FrameEnd:
			p.endInput()
		case node.FrameResize:
			if columns, rows, err := node.ParseResize(payload); err == nil {
				p.resize(columns, rows)
			}
		}
	}
}

// copyOutput sends what the process writes. When it cannot be sent any more the
// file is closed, so that the process meets the same as with any closed terminal or pipe.
func (s *session) copyOutput(kind node.FrameKind, r *os.File) {
	defer r.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 && s.send(kind, buf[:n]) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// outputWait is how long output is still read after the process has ended, when
// something it left behind holds its terminal or its pipes open.
const outputWait = 300 * time.Millisecond

// process is what a session runs.
type process struct {
	cmd     *exec.Cmd
	input   io.WriteCloser
	outputs map[node.FrameKind]*os.File
	resize  func(columns, rows uint16)
	// endInput tells the process that no more input comes.
	endInput func()
	ended    chan struct{} // closed when the process has been waited for
}

// wait waits for the process, then for its output, and returns the exit status.
func (p *process) wait(outputs *sync.WaitGroup) int {
	err := p.cmd.Wait()
	close(p.ended)
	late := time.AfterFunc(outputWait, func() {
		for _, f := range p.outputs {
			_ = f.SetReadDeadline(time.Unix(1, 0))
		}
	})
	outputs.Wait()
	late.Stop()
	for _, f := range p.outputs {
		_ = f.Close()
	}
	_ = p.input.Close()
	return exitStatus(p.cmd.ProcessState, err)
}

// sessionPath is where a session's programs are looked for.
const sessionPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is what a session's process finds around it.
func environment(start node.SessionStart, shell string) []string {
	env := []string{
		"PATH=" + sessionPath, "HOME=" + home(), "USER=root", "LOGNAME=root",
		"LANG=C.UTF-8", "SHELL=" + shell,
	}
	if start.Terminal {
		term := start.Term
		if term == "" {
			term = "dumb"
		}
		// bash takes its own prompt from its start-up files; this is for a plain sh.
		env = append(env, "TERM="+term, `PS1=root@$(hostname):$PWD# `)
	}
	for _, name := range []string{"SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// home is the folder that a session starts in.
func home() string {
	if fi, err := os.Stat("/root"); err == nil && fi.IsDir() {
		return "/root"
	}
	return "/"
}

// shellOf finds the shell of a login: bash where there is one.
func shellOf() (string, error) {
	for _, shell := range []string{"/bin/bash", "/bin/sh"} {
		if _, err := os.Stat(shell); err == nil {
			return shell, nil
		}
	}
	return "", errors.New("this node has neither /bin/bash nor /bin/sh")
}
