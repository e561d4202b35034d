package remotetest

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unicode/utf16"

	"golang.org/x/crypto/ssh"
)

// WindowsCall is one command that a [WindowsServer] was asked for.
type WindowsCall struct {
	User  string
	How   string // it logged in: "publickey" or "password"
	Line  string // the command line
	Stdin []byte
}

// Program is what the command was told on its standard input.
func (c WindowsCall) Program() string {
	lines := strings.Split(string(c.Stdin), "\n")
	if len(lines) < 2 {
		return ""
	}
	text, _ := base64.StdEncoding.DecodeString(lines[1])
	return string(text)
}

// Bootstrap is the program in the command line.
func (c WindowsCall) Bootstrap() string {
	_, encoded, _ := strings.Cut(c.Line, "-EncodedCommand ")
	text, _ := base64.StdEncoding.DecodeString(encoded)
	units := make([]uint16, len(text)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(text[2*i:])
	}
	return string(utf16.Decode(units))
}

// WindowsAnswer is what a [WindowsServer] does with a command.
type WindowsAnswer struct {
	Stdout, Stderr string
	Status         uint32
	Silent         bool // the program did not run: nothing of ours is printed
	Cut            bool // the connection is lost, after the output
}

// WindowsServer stands for OpenSSH for Windows: it lets in by key or password,
// records what it is asked to run, and answers what the test says. It runs nothing.
// It passes connections on, so that a test needs no other jump host.
type WindowsServer struct {
	Address string
	HostKey ssh.PublicKey

	t      testing.TB
	answer func(n int, c WindowsCall) WindowsAnswer
	mu     sync.Mutex
	calls  []WindowsCall
}

// StartWindows starts one that ends with the test. answer is called with the
// number of the command, from 0.
func StartWindows(t testing.TB, authorized ssh.PublicKey, user, password string, answer func(n int, c WindowsCall) WindowsAnswer) *WindowsServer {
	t.Helper()
	key := NewKey(t, "ed25519")
	signer, err := ssh.ParsePrivateKey(key.PEM)
	must(t, err)
	cfg := &ssh.ServerConfig{
		PublicKeyCallback: func(c ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
			if c.User() == user && authorized != nil && bytes.Equal(k.Marshal(), authorized.Marshal()) {
				return &ssh.Permissions{Extensions: map[string]string{"how": "publickey"}}, nil
			}
			return nil, fmt.Errorf("the key is not known")
		},
		PasswordCallback: func(c ssh.ConnMetadata, p []byte) (*ssh.Permissions, error) {
			if c.User() == user && password != "" && string(p) == password {
				return &ssh.Permissions{Extensions: map[string]string{"how": "password"}}, nil
			}
			return nil, fmt.Errorf("the password is not right")
		},
	}
	cfg.AddHostKey(signer)
	l, err := net.Listen("tcp", "127.0.0.3:0")
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	s := &WindowsServer{Address: l.Addr().String(), HostKey: key.Public, t: t, answer: answer}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(conn, cfg)
		}
	}()
	return s
}

// Calls are the commands up to now.
func (s *WindowsServer) Calls() []WindowsCall {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]WindowsCall(nil), s.calls...)
}

// KnownHosts adds the server's key to a known_hosts file.
func (s *WindowsServer) KnownHosts(path string) {
	s.t.Helper()
	line := (&Server{HostKey: s.HostKey, t: s.t}).KnownHostsLine(s.Address)
	old, err := os.ReadFile(filepath.Clean(path))
	must(s.t, err)
	must(s.t, os.WriteFile(path, append(old, line...), 0o600))
}

func (s *WindowsServer) serve(conn net.Conn, cfg *ssh.ServerConfig) {
	defer conn.Close()
	c, channels, requests, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for nc := range channels {
		if nc.ChannelType() == "direct-tcpip" {
			go pass(nc)
			continue
		}
		if nc.ChannelType() != "session" {
			_ = nc.Reject(ssh.UnknownChannelType, "only sessions and connections")
			continue
		}
		channel, asked, err := nc.Accept()
		if err != nil {
			return
		}
		go s.session(conn, c, channel, asked)
	}
}

// pass passes a connection on.
func pass(nc ssh.NewChannel) {
	var to struct {
		Host string
		Port uint32
		From string
		By   uint32
	}
	if err := ssh.Unmarshal(nc.ExtraData(), &to); err != nil {
		_ = nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	conn, err := net.Dial("tcp", net.JoinHostPort(to.Host, fmt.Sprint(to.Port)))
	if err != nil {
		_ = nc.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	defer conn.Close()
	channel, requests, err := nc.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	go ssh.DiscardRequests(requests)
	go func() { _, _ = io.Copy(conn, channel); _ = conn.Close() }()
	_, _ = io.Copy(channel, conn)
}

func (s *WindowsServer) session(conn net.Conn, c *ssh.ServerConn, channel ssh.Channel, asked <-chan *ssh.Request) {
	defer channel.Close()
	for r := range asked {
		var line struct{ Text string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &line) != nil {
			_ = r.Reply(false, nil)
			continue
		}
		_ = r.Reply(true, nil)
		stdin, _ := io.ReadAll(channel)
		call := WindowsCall{User: c.User(), How: c.Permissions.Extensions["how"], Line: line.Text, Stdin: stdin}
		s.mu.Lock()
		n := len(s.calls)
		s.calls = append(s.calls, call)
		s.mu.Unlock()
		a := s.answer(n, call)
		if !a.Silent { // what the program prints first
			_, rest, _ := strings.Cut(call.Program(), "Write('")
			mark, _, _ := strings.Cut(rest, "'")
			a.Stdout, a.Stderr = mark+"\n"+a.Stdout, mark+"\n"+a.Stderr
		}
		_, _ = io.WriteString(channel, a.Stdout)
		_, _ = io.WriteString(channel.Stderr(), a.Stderr)
		if a.Cut {
			_ = conn.Close()
			return
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{a.Status}))
		return
	}
}
