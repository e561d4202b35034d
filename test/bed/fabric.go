//go:build linux

package bed

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// fabric is the machine, so to speak, that is the bed's switch, router and load
// balancer. It is a network namespace and no more.
const fabric = "fabric"

// namespaceDir is where ip(8) keeps named network namespaces.
const namespaceDir = "/run/netns"

// namespace is the name of the network namespace of a machine of a bed.
func namespace(bed, machine string) string { return "keyfleet-bed." + bed + "." + machine }

func namespacePath(bed, machine string) string {
	return filepath.Join(namespaceDir, namespace(bed, machine))
}

// makeNetwork makes the fabric, plugs every machine into it and starts the load
// balancer. The links are made inside the namespaces: the root namespace never
// sees them.
func (b *builder) makeNetwork(ctx context.Context) error {
	in := namespace(b.Name, fabric)
	if err := ip(ctx, "netns add "+in); err != nil {
		return err
	}
	script := []string{
		"link set lo up",
		"link add switch type bridge stp_state 0 forward_delay 0",
		"addr add " + balancerIP + "/24 dev switch",
		"link set switch up",
	}
	if !b.Services { // the load balancer stands in for kube-proxy
		script = append(script, "addr add "+serviceIP+"/32 dev lo")
	}
	if err := ipIn(ctx, in, script); err != nil {
		return err
	}
	for _, n := range b.Nodes {
		if err := b.plugIn(ctx, n); err != nil {
			return fmt.Errorf("connecting %s: %w", n.Name, err)
		}
	}
	if err := forwardPackets(ctx, in); err != nil {
		return err
	}
	config := b.path("balancer.cfg")
	if err := renderTo(config, "balancer.cfg", b.scene(Node{})); err != nil {
		return err
	}
	return b.startInside("balancer", []string{"haproxy", "-db", "-f", config})
}

// startInside starts a process of the fabric that has the bed's network.
func (b *builder) startInside(name string, argv []string, env ...string) error {
	return b.start(fabric, name, append([]string{"nsenter", "--net=" + namespacePath(b.Name, fabric)}, argv...), env)
}

// plugIn makes the network namespace of a machine and its cable, and leads the
// traffic for its pods to it.
func (b *builder) plugIn(ctx context.Context, n Node) error {
	fab, own := namespace(b.Name, fabric), namespace(b.Name, n.Name)
	if err := ip(ctx, "netns add "+own); err != nil {
		return err
	}
	err := ipIn(ctx, fab, []string{
		fmt.Sprintf("link add %s type veth peer name eth0 netns %s", n.Name, own),
		fmt.Sprintf("link set %s master switch up", n.Name),
		fmt.Sprintf("route add %s via %s", podSubnet(n), n.IP),
	})
	if err != nil {
		return err
	}
	err = ipIn(ctx, own, []string{
		"link set lo up",
		"addr add " + n.IP + "/24 dev eth0",
		"link set eth0 up",
		"route add default via " + balancerIP,
	})
	if err != nil {
		return err
	}
	return forwardPackets(ctx, own)
}

// forwardPackets makes the namespace a router, for the pods.
func forwardPackets(ctx context.Context, namespace string) error {
	cmd := exec.CommandContext(ctx, "ip", "netns", "exec", namespace, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("forwarding packets in %s: %w: %s", namespace, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ipIn runs commands of ip(8) in a network namespace.
func ipIn(ctx context.Context, namespace string, commands []string) error {
	cmd := exec.CommandContext(ctx, "ip", "-n", namespace, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("setting up the network %s: %w: %s", namespace, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func ip(ctx context.Context, command string) error {
	if out, err := exec.CommandContext(ctx, "ip", strings.Fields(command)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", command, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// openDoor lets a loopback port lead to the first master's sshd.
func (b *builder) openDoor(ctx context.Context) error {
	port, err := b.reach("door", b.Nodes[0].IP+":22")
	if err != nil {
		return err
	}
	b.SSHPort = port
	if err := renderTo(b.path("ssh_config"), "ssh_config", b.scene(Node{})); err != nil {
		return err
	}
	if err := b.knock(ctx); err != nil {
		log, _ := os.ReadFile(b.logFile("door"))
		return &StepError{Machine: fabric, Step: "ssh on a loopback port", Log: tail(string(log), 10), Err: err}
	}
	return b.writeKnownHosts()
}

// knock waits for the greeting of sshd behind the door.
func (b *builder) knock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		err := b.greeting(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for sshd behind port %d: %w", b.SSHPort, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (b *builder) greeting(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", b.SSHHost, b.SSHPort))
	if err != nil {
		return err
	}
	defer conn.Close()
	return readGreeting(conn)
}

func readGreeting(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second)) // a fresh connection takes a deadline
	buf := make([]byte, 4)
	if _, err := conn.Read(buf); err != nil {
		return fmt.Errorf("waiting for the greeting of sshd: %w", err)
	}
	if string(buf) != "SSH-" {
		return fmt.Errorf("sshd greets with %q", buf)
	}
	return nil
}
