package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) hostsCommand() *cobra.Command {
	return t.noun("hosts", "The names of the server in this machine's hosts file", t.hostsSync())
}

// The marks around our lines in the hosts file. What is outside is never touched.
const (
	hostsBegin = "# BEGIN keyfleet (written by: keyfleet hosts sync)"
	hostsEnd   = "# END keyfleet"
)

func (t *tool) hostsSync() *cobra.Command {
	var file, address string
	var print, remove bool
	c := t.verb("sync", "Write the names of the server, its vaults and accounts into the hosts file", `
sudo keyfleet hosts sync
keyfleet hosts sync --print`, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if remove {
			return t.writeHosts(file, nil)
		}
		names, err := t.serverNames(ctx)
		if err != nil {
			return err
		}
		if address == "" {
			if address, err = t.serverAddress(); err != nil {
				return err
			}
		}
		var block []string
		for _, n := range names {
			block = append(block, address+" "+n)
		}
		if print {
			_, err := fmt.Fprintln(t.out, strings.Join(append(append([]string{hostsBegin}, block...), hostsEnd), "\n"))
			return err
		}
		return t.writeHosts(file, block)
	})
	c.Long = `Write the names of the server, its vaults and its Batch accounts into the hosts
file, in a marked block that is replaced as a whole. az, SDKs and browsers then
find them. This program itself does not need it.`
	c.Flags().StringVar(&file, "file", hostsPath(), "hosts file")
	c.Flags().StringVar(&address, "address", "", "address of the server (default: that of the context)")
	c.Flags().BoolVar(&print, "print", false, "print the block and change nothing")
	c.Flags().BoolVar(&remove, "remove", false, "remove the block")
	return c
}

func hostsPath() string {
	if runtime.GOOS == "windows" {
		return `C:\Windows\System32\drivers\etc\hosts`
	}
	return "/etc/hosts"
}

// serverNames lists the host names under which the server answers now.
func (t *tool) serverNames(ctx context.Context) ([]string, error) {
	if _, err := t.connect(ctx); err != nil {
		return nil, err
	}
	ep := t.target.Endpoints
	urls := []string{ep.ResourceManager, ep.Login}
	if ep.Node != "" {
		urls = append(urls, ep.Node)
	}
	subs, err := t.client.Subscriptions(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range subs {
		vs, err := t.list(ctx, t.client.ARM(s.ID+"/providers/"+keyVault+"/"+vaults), client.VersionVaults)
		if err != nil {
			return nil, err
		}
		for _, v := range vs {
			urls = append(urls, v.str("properties.vaultUri"))
		}
		as, err := t.list(ctx, t.client.ARM(s.ID+"/providers/"+batch+"/"+batchAccounts), client.VersionBatch)
		if err != nil {
			return nil, err
		}
		for _, a := range as {
			urls = append(urls, "https://"+a.str("properties.accountEndpoint"))
		}
	}
	var names []string
	for _, s := range urls {
		if u, err := url.Parse(s); err == nil && u.Hostname() != "" {
			names = append(names, strings.ToLower(u.Hostname()))
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// serverAddress is the IP address at which the server is dialled.
func (t *tool) serverAddress() (string, error) {
	host, _, err := net.SplitHostPort(t.target.Endpoints.Listen)
	if err != nil {
		return "", usagef("the context does not say where the server is").withFix("keyfleet hosts sync --address ADDRESS")
	}
	ip := net.ParseIP(host)
	if host == "" || (ip != nil && ip.IsUnspecified()) {
		return "127.0.0.1", nil
	}
	if ip == nil {
		return "", usagef("the context dials the server at %q, which is a name", host).withFix("keyfleet hosts sync --address ADDRESS")
	}
	return host, nil
}

// hostsBlock replaces our block in the text of a hosts file; nil removes it.
func hostsBlock(text string, block []string) (string, error) {
	var keep []string
	inside := false
	for line := range strings.Lines(text) {
		switch bare := strings.TrimSpace(line); {
		case bare == hostsBegin:
			if inside {
				return "", errors.New("the block begins twice")
			}
			inside = true
		case bare == hostsEnd:
			if !inside {
				return "", errors.New("the block ends without a beginning")
			}
			inside = false
		case !inside:
			keep = append(keep, line)
		}
	}
	if inside {
		return "", errors.New("the block has no end")
	}
	out := strings.Join(keep, "")
	if block == nil {
		return out, nil
	}
	if out != "" && !strings.HasSuffix(out, "\n") {
		out += "\n"
	}
	return out + strings.Join(append(append([]string{hostsBegin}, block...), hostsEnd), "\n") + "\n", nil
}

func (t *tool) writeHosts(file string, block []string) error {
	info, err := os.Stat(file)
	if err != nil {
		return fmt.Errorf("reading the hosts file: %w", err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the hosts file: %w", err)
	}
	text, err := hostsBlock(string(b), block)
	if err != nil {
		return &cliError{code: "HostsFileOdd", message: fmt.Sprintf("%s has our marks in an order that was not expected: %v.", file, err), fix: "correct the lines marked keyfleet by hand", exit: client.ExitFailed}
	}
	if text != string(b) {
		if err := replaceHosts(file, []byte(text), info.Mode().Perm()); err != nil {
			if errors.Is(err, fs.ErrPermission) {
				return &cliError{code: "NotWritable", message: fmt.Sprintf("%s may not be written by you.", file), fix: "sudo -E keyfleet hosts sync", exit: client.ExitDenied}
			}
			return fmt.Errorf("writing the hosts file: %w", err)
		}
	}
	if block == nil {
		return t.done("%s has no block of ours.", file)
	}
	return t.done("%s has %s of the server.", file, plural(len(block), "name"))
}

// replaceHosts replaces the file at once; where it is a mount point of its own
// (containers), which cannot be renamed over, it is written in place.
func replaceHosts(file string, b []byte, mode os.FileMode) error {
	err := replaceFile(file, b, mode)
	var le *os.LinkError
	if errors.As(err, &le) {
		return os.WriteFile(file, b, mode)
	}
	return err
}
