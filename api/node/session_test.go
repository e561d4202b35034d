package node_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"keyfleet.dev/keyfleet/api/node"
)

// TestFrames: what is written is read, in order, and an end between frames is a clean one.
func TestFrames(t *testing.T) {
	frames := []struct {
		kind    node.FrameKind
		payload []byte
	}{
		{node.FrameStart, []byte(`{"terminal":true}`)},
		{node.FrameInput, bytes.Repeat([]byte("x"), node.MaxFrame)},
		{node.FrameEnd, nil},
		{node.FrameResize, node.ResizePayload(132, 43)},
		{node.FrameExit, node.ExitPayload(130)},
	}
	var stream bytes.Buffer
	for _, f := range frames {
		if err := node.WriteFrame(&stream, f.kind, f.payload); err != nil {
			t.Fatal(err)
		}
	}
	var buf []byte
	for _, f := range frames {
		kind, payload, err := node.ReadFrame(&stream, &buf)
		if err != nil || kind != f.kind || !bytes.Equal(payload, f.payload) {
			t.Errorf("frame of kind %d came back as kind %d with %d bytes, %v", f.kind, kind, len(payload), err)
		}
	}
	if _, _, err := node.ReadFrame(&stream, &buf); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if c, r, err := node.ParseResize(node.ResizePayload(132, 43)); c != 132 || r != 43 || err != nil {
		t.Errorf("the size came back as %d, %d, %v", c, r, err)
	}
	if s, err := node.ParseExit(node.ExitPayload(130)); s != 130 || err != nil {
		t.Errorf("the exit status came back as %d, %v", s, err)
	}
}

// TestBadFrames: a stream that is cut off or lies about its length is an error, not a wait or an allocation.
func TestBadFrames(t *testing.T) {
	for _, c := range []struct {
		reason string
		bytes  []byte
		want   error // nil: any
	}{
		{"cut off in the head", []byte{2, 0}, io.ErrUnexpectedEOF},
		{"cut off before the payload", []byte{2, 0, 0, 0, 5}, io.ErrUnexpectedEOF},
		{"cut off in the payload", []byte{2, 0, 0, 0, 5, 'a'}, io.ErrUnexpectedEOF},
		{"a length of 4 GiB", []byte{2, 255, 255, 255, 255}, nil},
	} {
		var buf []byte
		if _, _, err := node.ReadFrame(bytes.NewReader(c.bytes), &buf); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.reason, err)
		}
	}
	if err := node.WriteFrame(io.Discard, node.FrameInput, make([]byte, node.MaxFrame+1)); err == nil {
		t.Error("a frame over the limit was written")
	}
	if _, _, err := node.ParseResize([]byte{1}); err == nil {
		t.Error("half a size was read")
	}
	if _, err := node.ParseExit(nil); err == nil {
		t.Error("no exit status was read")
	}
}

// FuzzReadFrame: any bytes are frames or an error, and frames read are frames written.
func FuzzReadFrame(f *testing.F) {
	var seed bytes.Buffer
	_ = node.WriteFrame(&seed, node.FrameStart, []byte(`{"command":["cat","/var/lib/waagent/x"]}`))
	_ = node.WriteFrame(&seed, node.FrameResize, node.ResizePayload(80, 24))
	f.Add(seed.Bytes())
	f.Add([]byte{7, 0, 0, 0, 4, 0, 0, 0, 130})
	f.Add([]byte{2, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, in []byte) {
		var buf []byte
		var out bytes.Buffer
		r := bytes.NewReader(in)
		for {
			kind, payload, err := node.ReadFrame(r, &buf)
			if err != nil {
				break
			}
			if err := node.WriteFrame(&out, kind, payload); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(in, out.Bytes()) {
			t.Error("what was read is not what was there")
		}
	})
}
