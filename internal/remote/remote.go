// Package remote reaches the machines of a cluster over SSH, all of them through
// one jump host.
//
// Idea: a connection is only a means. Every call takes the one that is there or
// dials again, and a call whose connection was lost is made again where that
// cannot do harm. What runs on a machine is a shell program that this package
// writes: it travels on standard input, counted, and begins only when it has
// arrived whole with all that belongs to it.
//
//	runner ──ssh──> jump host ──direct-tcpip──> machine   (its own handshake and
//	                    │                                  host key, end to end)
//	                    └──direct-tcpip──> API server, etcd (DialContext)
//
// On a machine, below Config.WorkDir, all of it private to root:
//
//	run/UNIT/            a script that finishes, see unit.go
//	run/lock             held while one is begun or cleared away
//	run/pipes.XXXXXX/    from a running script to the log
//
// Invariant: no secret is in a command line, in the environment or in the log of
// a machine. A script or a file that arrived in part is not used. A host key is
// accepted only if somebody vouched for it under the machine's own address, and
// one that is known is never replaced.
//
// Consequence for the operator: a flaky line costs time and nothing else. Where
// it is not known whether something has run, the error says so, and the log of
// the machine has the answer.
package remote

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// Config says which machine to go through, as whom, and whom to trust.
type Config struct {
	Address string // of the jump host, as [ParseAddress] reads it. Required
	// User is the login user on all machines. A user in Address is that of the jump
	// host; it is also that of the others if User is empty. Not root: sudo must not
	// ask for a password.
	User string
	Key  []byte // private key, PEM. Required
	// Passphrase is asked if the key is encrypted. nil: an encrypted key is refused.
	Passphrase func() ([]byte, error)
	// KnownHosts are the files with the host keys that are trusted, in the format of
	// OpenSSH. New keys are appended to the first, which need not exist. Required
	KnownHosts []string
	// Confirm asks whether unknown host keys are right; once for the jump host, whose
	// key must be known before anything is seen through it, and once for all the
	// others. nil: they are refused, and the refusal names them all.
	Confirm func(unknown []Fingerprint) (bool, error)
	// WindowsUser and WindowsPassword log in to machines with Windows, the password where
	// the key is not known; empty: User, and the key alone.
	WindowsUser, WindowsPassword string

	Timeout time.Duration // of making one connection; zero: 15 s
	Log     string        // on the machines; empty: /var/log/azure/rotate-certs.log
	WorkDir string        // on the machines, only for root; empty: /var/lib/keyfleet/rotate-certs

	keepAlive time.Duration // between two signs of life; zero: 10 s
}

// Target is a machine to be reached through the jump host.
type Target struct {
	Name    string // of the node, as Kubernetes knows it
	Address string // as the jump host reaches it, in a form that [ParseAddress] reads. Its host key is known under it
	Windows bool   // it runs Windows: scripts are PowerShell, see windows.go
}

// Jump is a jump host, and the way to all that can be reached from it. It is safe
// for concurrent use.
type Jump struct {
	cfg     Config
	signer  ssh.Signer
	keys    *keyring
	machine machine
	link    *link

	mu      sync.Mutex // guards what follows
	hostKey ssh.PublicKey
	links   map[string]*link // by address
}

// machine is one end of an SSH connection.
type machine struct {
	name, address, user string // address: host:port
	windows             bool
}

// abreast is how many machines are dialled at the same time.
const abreast = 16

// Dial connects to the jump host. The connection is made again when it was lost,
// until Close.
func Dial(ctx context.Context, cfg Config) (*Jump, error) {
	j, err := newJump(cfg)
	if err != nil {
		return nil, err
	}
	_, err = j.link.get(ctx)
	var unknown *unknownKey
	if errors.As(err, &unknown) {
		if err = j.vouch([]Fingerprint{unknown.print}); err == nil {
			_, err = j.link.get(ctx)
		}
	}
	if err != nil {
		return nil, plain(err)
	}
	return j, nil
}

func newJump(cfg Config) (*Jump, error) {
	user, address, err := ParseAddress(cfg.Address)
	if err != nil {
		return nil, err
	}
	if cfg.User == "" {
		cfg.User = user
	}
	if user == "" {
		user = cfg.User
	}
	if user == "" {
		return nil, fault.New(fault.Invalid, "", "It is not said which user to log in as.").At("User").
			WithFix("name the user, for instance ssh://azureuser@%s", address)
	}
	if len(cfg.KnownHosts) == 0 {
		return nil, fault.New(fault.Invalid, "", "No known_hosts file is named, so no host could be trusted.").At("KnownHosts")
	}
	signer, err := parseKey(cfg.Key, cfg.Passphrase)
	if err != nil {
		return nil, err
	}
	for _, d := range []struct {
		value *string
		or    string
	}{{&cfg.Log, "/var/log/azure/rotate-certs.log"}, {&cfg.WorkDir, "/var/lib/keyfleet/rotate-certs"}} {
		if *d.value == "" {
			*d.value = d.or
		}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 15 * time.Second
	}
	if cfg.keepAlive == 0 {
		cfg.keepAlive = 10 * time.Second
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("reading the address of the jump host: %w", err)
	}
	j := &Jump{
		cfg: cfg, signer: signer, keys: &keyring{files: cfg.KnownHosts}, links: map[string]*link{},
		machine: machine{name: host, address: address, user: user},
	}
	j.link = newLink(j.machine, cfg, func(ctx context.Context) (*ssh.Client, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, unreachable(j.machine, err)
		}
		client, key, err := j.handshake(ctx, conn, j.machine)
		if err == nil {
			j.mu.Lock()
			j.hostKey = key
			j.mu.Unlock()
		}
		return client, err
	})
	return j, nil
}

// Host is the jump host itself as a machine of the cluster.
func (j *Jump) Host(name string) *Host { return newHost(name, j.link, j.cfg) }

// Hosts connects to machines through the jump host, in the order of targets.
// The jump host itself is found by its addresses and needs no second hop. If any
// of them cannot be reached the error names all that cannot, and nobody is asked
// about keys.
func (j *Jump) Hosts(ctx context.Context, targets []Target) ([]*Host, error) {
	own := j.addresses(ctx)
	links := make([]*link, len(targets))
	unknown, err := j.connect(ctx, targets, own, links)
	if err == nil && len(unknown) > 0 {
		if err = j.vouch(unknown); err != nil {
			return nil, err
		}
		// A key that is still unknown has been taken out of the file in between.
		unknown, err = j.connect(ctx, targets, own, links)
		if err == nil && len(unknown) > 0 {
			err = refusal(unknown, j.cfg.KnownHosts[0])
		}
	}
	if err != nil {
		return nil, err
	}
	hosts := make([]*Host, len(targets))
	for i, t := range targets {
		hosts[i] = newHost(t.Name, links[i], j.cfg)
	}
	return hosts, nil
}

// connect fills in the links that are nil, and returns the host keys that nobody
// has vouched for.
func (j *Jump) connect(ctx context.Context, targets []Target, own []string, links []*link) ([]Fingerprint, error) {
	unknown := make([]*unknownKey, len(targets))
	errs := make([]error, len(targets))
	var g errgroup.Group
	g.SetLimit(abreast)
	for i, t := range targets {
		if links[i] != nil {
			continue
		}
		l, err := j.to(t, own)
		g.Go(func() error {
			if err == nil {
				_, err = l.get(ctx)
			}
			if !errors.As(err, &unknown[i]) {
				links[i], errs[i] = l, plain(err)
			}
			return nil
		})
	}
	_ = g.Wait() // the errors are in errs
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var prints []Fingerprint
	for _, u := range unknown {
		if u != nil && !slices.ContainsFunc(prints, u.print.same) {
			prints = append(prints, u.print)
		}
	}
	return prints, nil
}

// to returns the link to a target, not yet dialled.
func (j *Jump) to(t Target, own []string) (*link, error) {
	user, address, err := ParseAddress(t.Address)
	if err != nil {
		return nil, err
	}
	if user == "" {
		user = j.cfg.User
		if t.Windows {
			user = cmp.Or(j.cfg.WindowsUser, user)
		}
	}
	m := machine{name: t.Name, address: address, user: user, windows: t.Windows}
	if self, err := j.isSelf(m, own); self && !m.windows || err != nil {
		return j.link, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if l := j.links[address]; l != nil {
		return l, nil
	}
	l := newLink(m, j.cfg, func(ctx context.Context) (*ssh.Client, error) {
		conn, err := j.tunnel(ctx, address)
		if errors.Is(err, fault.Unavailable) { // it may be restarting
			return nil, unreachable(m, err)
		}
		if err != nil {
			return nil, err
		}
		client, _, err := j.handshake(ctx, conn, m)
		return client, err
	})
	j.links[address] = l
	return l, nil
}

// isSelf reports whether a machine is the jump host. That the jump host says so
// is not enough, for then it could have the secrets of any machine sent to itself:
// its host key must be the one that is known for that address.
func (j *Jump) isSelf(m machine, own []string) (bool, error) {
	host, port, err := net.SplitHostPort(m.address)
	if err != nil || port != "22" || !slices.Contains(own, host) || m.user != j.machine.user {
		return false, nil
	}
	j.mu.Lock()
	key := j.hostKey
	j.mu.Unlock()
	err = j.keys.check(m, key)
	var unknown *unknownKey
	if errors.As(err, &unknown) {
		return false, err
	}
	return err == nil, nil
}

// addresses are those of the jump host. One that does not answer, or is made for
// nothing but passing through, has none: then each machine costs a second hop, also
// the jump host itself.
func (j *Jump) addresses(ctx context.Context) []string {
	var out *outcome
	err := persist(ctx, trials, true, func() (err error) {
		out, err = j.link.exec(ctx, command{text: "exec hostname -I", limit: 64 << 10, wait: j.cfg.Timeout})
		return err
	})
	if err != nil || out.status != 0 {
		return nil
	}
	return strings.Fields(string(out.stdout))
}

// vouch asks whether unknown keys are right and remembers them if so.
func (j *Jump) vouch(unknown []Fingerprint) error {
	if j.cfg.Confirm == nil {
		return refusal(unknown, j.cfg.KnownHosts[0])
	}
	yes, err := j.cfg.Confirm(unknown)
	if err != nil {
		return fmt.Errorf("asking about unknown host keys: %w", err)
	}
	if !yes {
		return fault.New(fault.Denied, "", "The host keys were not accepted; nothing was done.")
	}
	return j.keys.add(unknown)
}

// DialContext connects to an address as seen from the jump host. As with a
// [net.Dialer], ctx ends the dialling and not the connection. Deadlines work.
func (j *Jump) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if !strings.HasPrefix(network, "tcp") {
		return nil, fault.New(fault.Invalid, "", "The jump host passes on TCP only, not %s.", network)
	}
	var conn net.Conn
	err := persist(ctx, trials, true, func() error {
		attempt, cancel := context.WithTimeout(ctx, j.cfg.Timeout)
		defer cancel()
		var err error
		conn, err = j.tunnel(attempt, address)
		return err
	})
	if ctx.Err() != nil {
		return nil, ctx.Err() // a connection that came too late is closed by tunnel
	}
	if err != nil {
		return nil, plain(err)
	}
	return newTunnel(conn, address), nil
}

// tunnel opens a channel through the jump host. The error is a *lost if dialling
// the jump host again may help.
func (j *Jump) tunnel(ctx context.Context, address string) (net.Conn, error) {
	client, err := j.link.get(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := client.DialContext(ctx, "tcp", address)
	var refused *ssh.OpenChannelError
	switch {
	case err == nil:
		return conn, nil
	case errors.As(err, &refused) && refused.Reason == ssh.Prohibited:
		return nil, fault.New(fault.Denied, "", "The jump host %s does not pass connections on to %s.", j.machine.name, address).
			WithFix("set AllowTcpForwarding yes in its sshd_config").Because(err)
	case errors.As(err, &refused), ctx.Err() != nil:
		return nil, fault.New(fault.Unavailable, "", "%s does not answer the jump host %s.", address, j.machine.name).Because(err)
	}
	j.link.forget(client)
	return nil, &lost{m: j.machine, err: err}
}

// Close ends all connections. Scripts that finish go on.
func (j *Jump) Close() error {
	j.mu.Lock()
	links := j.links
	j.links = map[string]*link{}
	j.mu.Unlock()
	j.link.close() // first: then those through it have nobody to wait for
	for _, l := range links {
		l.close()
	}
	return nil
}

var (
	_ rotation.Host   = (*Host)(nil)
	_ rotation.Dialer = (*Jump)(nil)
)
