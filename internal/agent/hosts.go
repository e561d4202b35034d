package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/effect"
)

// The marks of the agent's block in a hosts file; what is outside is not touched.
const (
	hostsBegin = "# BEGIN keyfleet-agent (written by the agent; changes here are lost)"
	hostsEnd   = "# END keyfleet-agent"
)

var hostName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)

// writeHosts keeps the block that leads names to the server.
func (a *Agent) writeHosts(names []string) error {
	ip, err := a.serverIP()
	if err != nil {
		return err
	}
	old, err := readIfThere(a.cfg.HostsFile)
	if err != nil {
		return fmt.Errorf("reading the hosts file: %w", err)
	}
	text := hostsBlock(string(old), ip, names)
	if text == string(old) {
		return nil
	}
	err = writeFile("hosts file", a.cfg.HostsFile, []byte(text), 0o644)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// A hosts file that is mounted by itself cannot be replaced, only written.
	return effect.Do("write hosts file in place", func() error { return os.WriteFile(a.cfg.HostsFile, []byte(text), 0o644) })
}

// serverIP is the address that the server's names should lead to.
func (a *Agent) serverIP() (string, error) {
	if a.cfg.Address != "" {
		host, _, err := net.SplitHostPort(a.cfg.Address)
		return host, err
	}
	u, err := url.Parse(a.cfg.Server)
	if err != nil {
		return "", err
	}
	ips, err := net.LookupHost(u.Hostname())
	if err != nil || len(ips) == 0 {
		return "", fmt.Errorf("looking up the server: %w", err)
	}
	return ips[0], nil
}

// hostsBlock returns the hosts file old with the block for names replaced, or
// appended if there is none; without names the block is taken out.
func hostsBlock(old, ip string, names []string) string {
	before, rest, found := strings.Cut(old, hostsBegin)
	after := ""
	if found {
		_, after, _ = strings.Cut(rest, hostsEnd)
		after = strings.TrimPrefix(after, "\n")
	}
	if before != "" && !strings.HasSuffix(before, "\n") {
		before += "\n"
	}
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !hostName.MatchString(n) })
	if len(names) == 0 {
		return before + after
	}
	slices.Sort(names)
	var b strings.Builder
	b.WriteString(before + hostsBegin + "\n")
	for _, n := range slices.Compact(names) {
		b.WriteString(ip + " " + n + "\n")
	}
	b.WriteString(hostsEnd + "\n" + after)
	return b.String()
}

// trustName is the file in LibDir that handler commands get as SSL_CERT_FILE.
const trustName = "keyfleet-ca.pem"

// systemRoots are where distributions keep the roots that their programs trust.
var systemRoots = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem",
}

// writeTrust writes the system's roots and the server's CA into one file.
func (a *Agent) writeTrust(ca []byte) error {
	var text []byte
	for _, p := range systemRoots {
		if b, err := os.ReadFile(p); err == nil {
			text = append(bytes.TrimRight(b, "\n"), '\n')
			break
		}
	}
	text = append(text, ca...)
	path := filepath.Join(a.cfg.LibDir, trustName)
	if old, _ := os.ReadFile(path); bytes.Equal(old, text) {
		return nil
	}
	return writeFile("trust file", path, text, 0o644)
}
