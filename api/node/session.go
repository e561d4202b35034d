package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// SessionProtocol is the protocol that POST /v1/sessions/ID of the agent and
// the shell request of a caller are upgraded to: frames between the caller's
// program and the node's agent. The server passes them on without looking.
//
//	 0      1                  5
//	+------+------------------+-------------
//	| kind | length, 32 bits  | payload ...     length is big-endian, at most MaxFrame
//
// The caller sends one start frame, then input, resize and end-of-input frames;
// the agent sends output frames and, last, one exit or failure frame. Either
// side ends the session by closing the stream.
const SessionProtocol = "keyfleet-session"

// MaxFrame is the most bytes a frame's payload may have.
const MaxFrame = 64 << 10

// FrameKind says what a frame is.
type FrameKind byte

// The kinds of frames.
const (
	FrameStart   FrameKind = 1 // caller: JSON of SessionStart
	FrameInput   FrameKind = 2 // caller: bytes for the standard input
	FrameEnd     FrameKind = 3 // caller: the input has ended
	FrameResize  FrameKind = 4 // caller: columns and rows, 16 bits each
	FrameOutput  FrameKind = 5 // agent: bytes of the standard output, or of the terminal
	FrameErrors  FrameKind = 6 // agent: bytes of the standard error; none with a terminal
	FrameExit    FrameKind = 7 // agent: exit status, 32 bits; 128 + N for a command ended by signal N
	FrameFailure FrameKind = 8 // agent: why nothing was run, as text
)

// SessionStart says what to run.
type SessionStart struct {
	Command  []string `json:"command,omitempty"` // program and arguments; none: a login shell
	Terminal bool     `json:"terminal"`          // run it on a terminal
	Term     string   `json:"term,omitempty"`    // the caller's TERM
	Columns  uint16   `json:"columns,omitempty"`
	Rows     uint16   `json:"rows,omitempty"`
}

// WriteFrame writes one frame with one Write. Calls for one stream must not overlap.
func WriteFrame(w io.Writer, kind FrameKind, payload []byte) error {
	if len(payload) > MaxFrame {
		return fmt.Errorf("a frame of %d bytes is over the limit of %d", len(payload), MaxFrame)
	}
	b := make([]byte, 5, 5+len(payload))
	b[0] = byte(kind)
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	_, err := w.Write(append(b, payload...))
	return err
}

// ReadFrame reads one frame into buf, which it grows as needed; the payload is
// good until the next call with the same buf. At a clean end it is io.EOF.
func ReadFrame(r io.Reader, buf *[]byte) (FrameKind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("a frame of %d bytes is over the limit of %d", n, MaxFrame)
	}
	if cap(*buf) < int(n) {
		*buf = make([]byte, n)
	}
	payload := (*buf)[:n]
	if _, err := io.ReadFull(r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return FrameKind(head[0]), payload, nil
}

// ResizePayload is the payload of a resize frame.
func ResizePayload(columns, rows uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, columns), rows)
}

// ParseResize reads the payload of a resize frame.
func ParseResize(b []byte) (columns, rows uint16, err error) {
	if len(b) != 4 {
		return 0, 0, fmt.Errorf("a resize frame has 4 bytes, not %d", len(b))
	}
	return binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), nil
}

// ExitPayload is the payload of an exit frame.
func ExitPayload(status int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(status)) }

// ParseExit reads the payload of an exit frame.
func ParseExit(b []byte) (int, error) {
	if len(b) != 4 {
		return 0, fmt.Errorf("an exit frame has 4 bytes, not %d", len(b))
	}
	return int(int32(binary.BigEndian.Uint32(b))), nil
}
