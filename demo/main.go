// Command demo shows the main job of Keyfleet on this machine, with nothing
// prepared: a server, three real nodes, a certificate that reaches them and is
// replaced there by its successor.
//
// Everything goes through the public REST surface. The pool is the documented
// request body for Linux nodes; only names, secret URL, client id and node
// count are replaced. On a terminal the demo stays up until Ctrl-C; without
// one it ends by itself. Its exit status is 0 only if every node was seen with
// the successor of the certificate.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"keyfleet.dev/keyfleet/client"
)

const (
	nodes       = 3
	location    = "westus2"
	group       = "demo"
	vaultName   = "demovault"
	certificate = "web"
	account     = "demobatch"
	poolName    = "sim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{out: os.Stdout, start: time.Now(), terminal: term.IsTerminal(int(os.Stdout.Fd()))}
	err := d.run(ctx)
	if cerr := d.cleanUp(); err == nil {
		err = cerr
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

// demo is one run.
type demo struct {
	out      io.Writer
	start    time.Time
	terminal bool

	bin, dir string
	server   *exec.Cmd
	ended    chan error
	client   *client.Client
}

// say prints a line of progress with the time since the start.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%6.1fs  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	if err := d.startServer(ctx); err != nil {
		return err
	}
	shown, err := d.mainJob(ctx)
	if err != nil {
		if tail := d.serverLog(); tail != "" {
			fmt.Fprintf(os.Stderr, "The end of the server's log (%s):\n%s\n", filepath.Join(d.dir, "server.log"), tail)
		}
		return err
	}
	d.whereToLook(shown)
	if d.terminal {
		fmt.Fprintln(d.out, "\nEverything stays up until you press Ctrl-C.")
		select {
		case <-ctx.Done():
		case err := <-d.ended:
			return fmt.Errorf("the server ended: %w", err)
		}
	}
	return nil
}

// startServer starts keyfleet-server on a free port and waits for its ready line.
func (d *demo) startServer(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	d.bin = filepath.Dir(exe)
	if d.dir, err = os.MkdirTemp("", "keyfleet-demo-"); err != nil {
		return err
	}
	listen, err := freeAddress()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(d.dir, "server.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d.server = exec.Command(filepath.Join(d.bin, "keyfleet-server"), "--data-dir", filepath.Join(d.dir, "data"), "--listen", listen, "--dev")
	d.server.Stderr = log
	d.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo, which then stops the server in order
	stdout, err := d.server.StdoutPipe()
	if err != nil {
		return err
	}
	if err := d.server.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	ready := make(chan string, 1)
	d.ended = make(chan error, 1)
	go func() { // ends with the server
		buf := make([]byte, 4096)
		n, _ := stdout.Read(buf)
		ready <- strings.TrimSpace(string(buf[:n]))
		_, _ = io.Copy(io.Discard, stdout)
		d.ended <- d.server.Wait()
	}()
	select {
	case line := <-ready:
		if line == "" {
			return fmt.Errorf("the server did not start: %s", d.serverLog())
		}
		d.say("%s", line)
	case <-time.After(30 * time.Second):
		return errors.New("the server was not ready within 30 s")
	case <-ctx.Done():
		return ctx.Err()
	}
	cfg, err := client.FromAdmin(filepath.Join(d.dir, "data"))
	if err != nil {
		return err
	}
	d.client, err = client.New(cfg)
	return err
}

// cleanUp ends the server, which ends the local nodes of a --dev server, and
// removes what the demo made.
func (d *demo) cleanUp() error {
	if d.server == nil || d.server.Process == nil {
		return nil
	}
	_ = d.server.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		_ = d.server.Process.Kill()
		return fmt.Errorf("the server did not stop within 30 s; its files are in %s", d.dir)
	}
	d.say("stopped: the server and its nodes are gone")
	return os.RemoveAll(d.dir)
}

// serverLog returns the end of the server's log.
func (d *demo) serverLog() string {
	b, err := os.ReadFile(filepath.Join(d.dir, "server.log"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b[max(0, len(b)-4000):]))
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// workingDir returns the working directory, or nothing.
func workingDir() string {
	wd, err := os.Getwd()
	if err != nil {
		return ""
	}
	return wd
}
