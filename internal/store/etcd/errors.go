package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keyfleet.dev/keyfleet/internal/fault"
)

var errClosed = errors.New("etcd: the backend is closed")

// explain turns an error of etcd into what the caller can act on. ctx is the
// operation's own, made by limit.
func (b *Backend) explain(ctx context.Context, verb string, err error) error {
	cause := fmt.Errorf("%s: %w", verb, err)
	switch {
	case err == nil:
		return nil
	case b.closing.Err() != nil:
		return errClosed
	case errors.Is(err, rpctypes.ErrNoSpace):
		return b.full().Because(cause)
	case errors.Is(err, rpctypes.ErrRequestTooLarge), status.Code(err) == codes.ResourceExhausted:
		return fault.New(fault.TooLarge, "", "The change is too large to be stored at once.").Because(cause)
	case errors.Is(err, rpctypes.ErrTooManyOps):
		return fault.New(fault.TooLarge, "", "The change touches more objects than the store takes at once.").
			WithFix("start etcd with a larger --max-txn-ops, for instance %d", maxTxnOps).Because(cause)
	case errors.Is(err, rpctypes.ErrCorrupt):
		return b.alarmed("CORRUPT").Because(cause)
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case noAnswer(err):
		return fault.New(fault.Unavailable, "", "The store at %s does not answer, or has no quorum.", b.where).
			WithFix("check that more than half of the etcd members run and reach each other").After(2 * time.Second).Because(cause)
	}
	return cause
}

// full is the error of changes while the quota is used up.
func (b *Backend) full() *fault.Error {
	e := fault.New(fault.Unavailable, "", "The store at %s is full: changes are refused, reads go on.", b.where).After(time.Minute)
	if b.server == nil {
		return e.WithFix("compact and defragment etcd or raise its --quota-backend-bytes, then clear the alarm with 'etcdctl alarm disarm'")
	}
	return e.WithFix("start the server again, with a larger store quota if that is not enough: starting gives space of old revisions back")
}

// noAnswer reports whether the error is of the kind that passes when servers and
// network come back.
func noAnswer(err error) bool {
	for _, known := range []error{
		rpctypes.ErrNoLeader, rpctypes.ErrNotLeader, rpctypes.ErrLeaderChanged, rpctypes.ErrStopped, rpctypes.ErrTimeout,
		rpctypes.ErrTimeoutDueToLeaderFail, rpctypes.ErrTimeoutDueToConnectionLost, rpctypes.ErrUnhealthy, rpctypes.ErrTooManyRequests,
		context.DeadlineExceeded,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	var e rpctypes.EtcdError
	code := status.Code(err)
	if errors.As(err, &e) {
		code = e.Code()
	}
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}
