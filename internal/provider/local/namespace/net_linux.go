package namespace

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// setUpLoopback brings lo up, which gives it 127.0.0.1, and adds the identity
// endpoint's address to it as a single address: an address of lo is reachable
// from inside this network namespace and from nowhere else.
func setUpLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a socket: %w", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("bringing lo up: %w", err)
	}
	// "lo:0" names a second address (netdevice(7)); its mask must be set
	// after it, else the whole 169.254.0.0/16 would be this node.
	for _, set := range []struct {
		request uint
		value   net.IP
	}{{unix.SIOCSIFADDR, net.ParseIP(Address).To4()}, {unix.SIOCSIFNETMASK, net.IPv4bcast.To4()}} {
		ifr, err := unix.NewIfreq("lo:0")
		if err != nil {
			return err
		}
		if err := ifr.SetInet4Addr(set.value); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, set.request, ifr); err != nil {
			return fmt.Errorf("adding %s to lo: %w", Address, err)
		}
	}
	return nil
}

// acceptPause is the pause after a failed accept: out of descriptors, most likely.
const acceptPause = 50 * time.Millisecond

// forward listens on 127.0.0.1:port and joins every connection to the server's
// socket, for as long as the node lives. A connection for which the server is
// away is closed at once; the agent's own back-off does the rest.
func forward(port int) error {
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("listening for the server's clients: %w", err)
	}
	go func() { // ends with the process: the listener is never closed
		for {
			c, err := l.Accept()
			if err != nil {
				time.Sleep(acceptPause)
				continue
			}
			go join(c.(*net.TCPConn))
		}
	}()
	return nil
}

// join copies bytes between a client inside the node and the server until both
// have said all they had to say. Half-closing is passed on: a shell session
// needs it. On Linux io.Copy moves the bytes inside the kernel.
func join(client *net.TCPConn) {
	defer client.Close()
	server, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socketPath, Net: "unix"})
	if err != nil {
		return
	}
	defer server.Close()
	var done sync.WaitGroup
	done.Go(func() {
		_, _ = io.Copy(server, client)
		_ = server.CloseWrite()
	})
	_, _ = io.Copy(client, server)
	_ = client.CloseWrite()
	done.Wait()
}
