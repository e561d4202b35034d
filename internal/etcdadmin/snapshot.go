package etcdadmin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Snapshot implements rotation.Etcd. It writes what "etcdctl snapshot save"
// writes: the database and its SHA-256. After an error, what was written is not
// a snapshot and is to be thrown away.
func (a *admin) Snapshot(ctx context.Context, w io.Writer) error {
	from, err := a.source(ctx)
	if err != nil {
		return err
	}
	client, err := a.wire.client(from)
	if err != nil {
		return fmt.Errorf("connecting to etcd: %w", err)
	}
	defer func() { _ = client.Close() }()
	reading, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	stream, err := client.Snapshot(reading)
	if err != nil {
		return a.explain(ctx, "taking a snapshot", err, from)
	}
	defer func() { _ = stream.Close() }()
	s := &seal{sum: sha256.New()}
	out := &output{w: w}
	_, err = io.Copy(io.MultiWriter(out, s), impatient{stream, stallTime, func() { stop(errStalled) }})
	switch {
	case out.err != nil:
		return fmt.Errorf("writing the snapshot: %w", out.err)
	case errors.Is(context.Cause(reading), errStalled):
		return a.unanswered(from, fmt.Errorf("taking a snapshot: %w", errStalled), []string{from})
	case err != nil:
		return a.explain(ctx, "taking a snapshot", err, from)
	case !s.holds():
		return fault.New(fault.Unavailable, "", "The snapshot of etcd at %s arrived damaged: its digest is not that of what came before it.", from).WithFix("take it again")
	}
	return nil
}

// source is the endpoint of a member to take the snapshot of: a follower if one
// answers, since the leader has enough to do.
func (a *admin) source(ctx context.Context) (string, error) {
	var lead string
	var failures error
	for _, w := range a.ask(ctx, a.endpoints) {
		switch {
		case w.err != nil:
			failures = errors.Join(failures, w.err)
		case w.status.IsLearner:
		case w.status.Leader != w.status.Header.MemberId:
			return w.endpoint, nil
		default:
			lead = w.endpoint
		}
	}
	if lead == "" {
		return "", errors.Join(fault.New(fault.Unavailable, "", "No member of etcd answers that a snapshot could be taken of.").WithFix("when its members can be reached, run the same command again"), failures)
	}
	return lead, nil
}

var errStalled = fmt.Errorf("nothing came for %v", stallTime)

// impatient gives up if one read takes too long.
type impatient struct {
	r        io.Reader
	patience time.Duration
	giveUp   func()
}

// Read implements io.Reader.
func (i impatient) Read(p []byte) (int, error) {
	defer time.AfterFunc(i.patience, i.giveUp).Stop()
	return i.r.Read(p)
}

// output remembers an error of writing, to tell it from one of reading.
type output struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	o.err = err
	return n, err
}

// seal takes the digest of all that is written but the last bytes, which are to be that digest.
type seal struct {
	sum  hash.Hash
	last []byte // at most sha256.Size bytes
}

// Write implements io.Writer.
func (s *seal) Write(p []byte) (int, error) {
	s.last = append(s.last, p...)
	if over := len(s.last) - sha256.Size; over > 0 {
		s.sum.Write(s.last[:over])
		s.last = append(s.last[:0], s.last[over:]...)
	}
	return len(p), nil
}

// holds reports whether the last bytes are the digest of the others.
func (s *seal) holds() bool { return bytes.Equal(s.sum.Sum(nil), s.last) }
