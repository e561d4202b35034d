//go:build linux

package bed

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// Reach lets a loopback port of this machine lead to an address in the bed's
// network, whose host may be a node's name, and returns it as host:port. The port
// stays until the bed goes down. A connection to it is closed at once when
// nothing listens at the other end.
func (c *Cluster) Reach(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	if n, err := c.Node(host); err == nil {
		host = n.IP
	}
	if net.ParseIP(host) == nil { // haproxy would look the name up in this machine's network
		return "", fmt.Errorf("reaching into bed %s: %q is neither an address nor a node", c.Name, host)
	}
	local, err := c.reach("", net.JoinHostPort(host, port))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", local), nil
}

// reach is Reach with a name for the process, and returns the port.
func (c *Cluster) reach(name, addr string) (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	if name == "" {
		name = fmt.Sprintf("reach-%d", port)
	}
	return port, c.passage(name, l, addr+" namespace "+namespace(c.Name, fabric))
}

// Expose lets the bed's network have what listens on a loopback port of this
// machine, and returns the address, host:port with the same port, at which nodes
// and pods reach it. It stays until the bed goes down. A connection to it is
// closed at once when nothing listens at the other end.
func (c *Cluster) Expose(port int) (string, error) {
	addr := fmt.Sprintf("%s:%d", balancerIP, port)
	var l net.Listener
	err := c.inside(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("exposing port %d in bed %s: %w", port, c.Name, err)
	}
	return addr, c.passage(fmt.Sprintf("expose-%d", port), l, fmt.Sprintf("127.0.0.1:%d", port))
}

// passage hands the listener over to a haproxy that leads its connections to the
// server. The listener is open already: nobody else can have the port, and who
// connects before haproxy runs waits for it.
func (c *Cluster) passage(name string, l net.Listener, server string) error {
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer socket.Close()
	s := c.scene(Node{})
	s.PassageTo = server
	config := c.path(name + ".cfg")
	if err := renderTo(config, "passage.cfg", s); err != nil {
		return err
	}
	return c.start(fabric, name, []string{"haproxy", "-db", "-f", config}, nil, socket)
}

// HostKubeconfig returns the path of a kubeconfig of the administrator for
// processes of this machine: its server is a loopback port that leads to the load
// balancer, and the API servers' certificate is valid for it. Only beds with
// Services have that certificate.
func (c *Cluster) HostKubeconfig() (string, error) {
	if !c.Services {
		return "", fmt.Errorf("bed %s has no Services: its API servers' certificate is not valid for a loopback address", c.Name)
	}
	path := c.path("kubeconfig.host")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	inside, err := os.ReadFile(c.Kubeconfig)
	if err != nil {
		return "", err
	}
	addr, err := c.Reach(c.LoadBalancer)
	if err != nil {
		return "", err
	}
	outside := strings.Replace(string(inside), "https://"+c.LoadBalancer+"\n", "https://"+addr+"\n", 1)
	if outside == string(inside) {
		return "", fmt.Errorf("%s does not name the load balancer %s", filepath.Base(c.Kubeconfig), c.LoadBalancer)
	}
	return path, writeFile(path, outside, 0o600)
}
