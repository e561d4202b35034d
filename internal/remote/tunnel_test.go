package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// listen is a server that only the jump host is asked to reach.
func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().String()
}

func TestDialContextEchoes(t *testing.T) {
	j := newBed(t).dial()
	address := listen(t, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		_ = c.Close()
	})
	ctx, cancel := context.WithCancel(t.Context())
	c, err := j.DialContext(ctx, "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel() // ends the dialling only
	if c.RemoteAddr().String() != address || c.RemoteAddr().Network() != "tcp" {
		t.Errorf("it leads to %v", c.RemoteAddr())
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Fatalf("%q, %v", buf, err)
	}
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	_, _ = c.Write([]byte("again"))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "again" {
		t.Errorf("a deadline is not the end: %q, %v", buf, err)
	}
}

func TestDialContextEndsWhenTheOtherSideDoes(t *testing.T) {
	j := newBed(t).dial()
	gone := make(chan struct{})
	address := listen(t, func(c net.Conn) {
		_, _ = c.Write([]byte("bye"))
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
		gone <- struct{}{}
	})
	c, err := j.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "bye" {
		t.Fatalf("%q, %v", buf, err)
	}
	_ = c.Close()
	<-gone // the other side is told

	c, err = j.DialContext(t.Context(), "tcp", listen(t, func(c net.Conn) {
		_, _ = c.Write([]byte("all of it"))
		_ = c.Close()
	}))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "all of it" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDialContextCarriesHTTPS(t *testing.T) {
	b := newBed(t)
	j := b.dial()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ready") }))
	defer server.Close()
	client := server.Client()
	client.Transport.(*http.Transport).DialContext = j.DialContext
	client.Timeout = time.Minute
	get := func() {
		t.Helper()
		resp, err := client.Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ready" {
			t.Fatalf("%q, %v", body, err)
		}
	}
	get()
	b.toJump.Cut()
	client.CloseIdleConnections()
	get() // dialled again
}

func TestDialContextThatFails(t *testing.T) {
	b := newBed(t)
	j := b.dial()
	_, err := j.DialContext(t.Context(), "tcp", "127.0.0.1:1")
	want(t, err, fault.Unavailable, "127.0.0.1:1", "onnection refused")
	_, err = j.DialContext(t.Context(), "udp", "127.0.0.1:1")
	want(t, err, fault.Invalid, "TCP only")

	b.toJump.Freeze(true)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := j.DialContext(ctx, "tcp", b.target.Address); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 30*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}
