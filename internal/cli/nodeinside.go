package cli

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

// This file holds what leads inside a node: a shell, logs, why it is as it is,
// and the token with which a machine becomes one. These are Keyfleet's own,
// under the pool's resource id.

// ownPool is the path of a pool under /keyfleet/v1, and the pool's and the node's ids.
func (t *tool) ownNode(ctx context.Context, account string, args []string) (poolID, nodeID string, err error) {
	if poolID, err = t.poolID(ctx, account, args[0]); err != nil {
		return "", "", err
	}
	rid, err := arm.ParseID(poolID)
	if err != nil {
		return "", "", usagef("%v", err)
	}
	base, err := t.poolURL(ctx, rid)
	if err != nil {
		return "", "", err
	}
	nodeID, err = t.nodeID(ctx, base, args[1])
	return poolID, nodeID, err
}

func (t *tool) nodeShell() *cobra.Command {
	var noTTY bool
	c := t.verb("shell POOL NODE [-- COMMAND...]", "Log in to a node, or run a command on it", `
keyfleet node shell sim 000001
keyfleet node shell sim 000001 -- cat /var/log/azure/Microsoft.Azure.KeyVault.KeyVaultForLinux/akvvm_service.log`, cobra.MinimumNArgs(2), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		poolID, nodeID, err := t.ownNode(ctx, *account, args)
		if err != nil {
			return err
		}
		tm := client.Terminal{Command: args[2:], In: t.in, Out: t.out, Err: t.err}
		in, isFile := t.in.(*os.File)
		if isFile && !noTTY && term.IsTerminal(int(in.Fd())) && t.outTTY {
			restore, err := t.rawTerminal(in, &tm)
			if err != nil {
				return err
			}
			defer restore()
		}
		code, err := t.client.Shell(ctx, poolID, nodeID, tm)
		if err != nil {
			return err
		}
		if code != 0 {
			return exitStatus(code)
		}
		return nil
	}
	c.Flags().BoolVarP(&noTTY, "no-tty", "T", false, "no terminal on the node, also when there is one here")
	c.ValidArgsFunction = t.completeNodes
	return c
}

// rawTerminal hands our terminal to the node; restore gives it back.
func (t *tool) rawTerminal(in *os.File, tm *client.Terminal) (restore func(), err error) {
	fd := int(in.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("preparing the terminal: %w", err)
	}
	tm.TTY, tm.Term = true, t.env("TERM")
	tm.Size = windowSize(fd)
	sizes, stop := watchWindow(fd)
	tm.Resized = sizes
	return func() {
		stop()
		_ = term.Restore(fd, old)
	}, nil
}

func windowSize(fd int) client.WindowSize {
	w, h, err := term.GetSize(fd)
	if err != nil {
		w, h = 80, 24
	}
	return client.WindowSize{Columns: uint16(min(w, 1<<16-1)), Rows: uint16(min(h, 1<<16-1))}
}

func (t *tool) nodeLogs() *cobra.Command {
	var extension string
	c := t.verb("logs POOL NODE", "Show the last part of the logs of a node's extensions", "keyfleet node logs sim 000001 --extension KVExtensions", cobra.ExactArgs(2), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		poolID, nodeID, err := t.ownNode(ctx, *account, args)
		if err != nil {
			return err
		}
		req := request(http.MethodGet, t.client.ARM("/keyfleet/v1"+poolID+"/nodes/"+url.PathEscape(nodeID)+"/logs"), "", nil)
		if extension != "" {
			req.Query = url.Values{"extension": {extension}}
		}
		logs, err := client.List[object](ctx, t.client, req)
		if err != nil {
			return err
		}
		if t.form() != "table" {
			return many(t, logs, view[object]{
				name:    func(o object) string { return o.str("file") },
				columns: []column[object]{field("Extension", "extension"), field("File", "file"), field("Tail", "tail")},
			})
		}
		if len(logs) == 0 {
			t.say("The node has sent no logs yet.")
		}
		for i, l := range logs {
			if len(logs) > 1 {
				if i > 0 {
					fmt.Fprintln(t.out)
				}
				fmt.Fprintf(t.out, "==> %s  %s <==\n", clean(l.str("extension")), clean(l.str("file")))
			}
			fmt.Fprintln(t.out, strings.TrimRight(clean(l.str("tail")), "\n"))
		}
		return nil
	}
	c.Flags().StringVar(&extension, "extension", "", "only of this extension")
	c.ValidArgsFunction = t.completeNodes
	return c
}

func (t *tool) nodeExplain() *cobra.Command {
	c := t.verb("explain POOL NODE", "Say why a node is not idle: the first failing link of the chain on top", "keyfleet node explain sim 000001", cobra.ExactArgs(2), nil)
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		poolID, nodeID, err := t.ownNode(ctx, *account, args)
		if err != nil {
			return err
		}
		o, err := t.call(ctx, request(http.MethodGet, t.client.ARM("/keyfleet/v1"+poolID+"/nodes/"+url.PathEscape(nodeID)+"/explain"), "", nil))
		if err != nil {
			return err
		}
		if t.form() != "table" {
			return t.data(o)
		}
		t.explanation(o)
		return nil
	}
	c.ValidArgsFunction = t.completeNodes
	return c
}

func (t *tool) nodeJoinToken() *cobra.Command {
	var life time.Duration
	var pool, toFile string
	c := t.verb("join-token", "Make a one-use token with which a machine joins a pool", "keyfleet node join-token --pool sim\nkeyfleet node join-token --pool sim --expires-in 24h", cobra.NoArgs, nil)
	c.Aliases = []string{"token"}
	account := accountFlag(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		id, err := t.poolID(ctx, *account, pool)
		if err != nil {
			return err
		}
		body := map[string]string{"pool": id}
		if life != 0 {
			body["expiresIn"] = life.String()
		}
		o, err := t.call(ctx, request(http.MethodPost, t.client.ARM("/keyfleet/v1/jointokens"), "", body))
		if err != nil {
			return err
		}
		if toFile != "" {
			return t.newFile(toFile, []byte(o.str("token")+"\n"))
		}
		if t.form() != "table" {
			return one(t, o, view[object]{name: func(o object) string { return o.str("token") }, columns: []column[object]{
				field("Token", "token"), t.timeAt("Expires", "expires"),
			}})
		}
		t.say("Run this as root on the machine. The token counts once, until %s.", t.when(o.time("expires")))
		_, err = fmt.Fprintln(t.out, clean(t.joinCommand(o)))
		return err
	}
	c.Flags().StringVar(&pool, "pool", "", "pool that the machine joins")
	c.Flags().DurationVar(&life, "expires-in", 0, "how long it counts, at most 24h (default 1h)")
	c.Flags().StringVar(&toFile, "to-file", "", "write the token into a new file with mode 0600 instead of showing it")
	_ = c.MarkFlagRequired("pool")
	return c
}

// joinCommand is what is typed on the machine. The token is in the environment,
// where other users do not see it; the pin is of the CA that we trust ourselves.
func (t *tool) joinCommand(o object) string {
	pin := caPin(t.target.CA)
	if pin == "" {
		pin = o.str("caHash")
	}
	cmd := fmt.Sprintf("KEYFLEET_TOKEN=%s keyfleet-agent join --server %s --ca-hash %s --pool %s", o.str("token"), o.str("server"), pin, o.str("pool"))
	if host, _, err := net.SplitHostPort(t.target.Endpoints.Listen); err == nil && !net.ParseIP(host).IsLoopback() {
		cmd += " --address " + t.target.Endpoints.Listen
	}
	return cmd
}

// caPin is the hash by which an agent recognises the CA: SHA-256 of its public key.
func caPin(ca string) string {
	block, _ := pem.Decode([]byte(ca))
	if block == nil {
		return ""
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("sha256:%x", sha256.Sum256(cert.RawSubjectPublicKeyInfo))
}

// parsedSettings turns an extension's settings, which the data plane gives as a
// string, into something that can be read.
func parsedSettings(s string) string {
	var v any
	if json.Unmarshal([]byte(s), &v) != nil {
		return s
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return s
	}
	return string(b)
}
