package etcdadmin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"keyfleet.dev/keyfleet/internal/fault"
)

// explain turns an error of etcd into what the caller can act on. ctx is that of
// the call; members are those that it may have asked.
func (a *admin) explain(ctx context.Context, verb string, err error, members ...string) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%s: %w", verb, ctx.Err())
	}
	where := strings.Join(members, ", ")
	cause := fmt.Errorf("%s: %w", verb, err)
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return a.unanswered(where, cause, members)
	case codes.PermissionDenied:
		return fault.New(fault.Denied, "", "etcd at %s does not permit %s.", where, verb).Because(cause)
	case codes.Unauthenticated:
		return fault.New(fault.Unauthenticated, "", "etcd at %s does not accept who we are.", where).Because(cause)
	case codes.ResourceExhausted:
		if errors.Is(err, rpctypes.ErrNoSpace) {
			return fault.New(fault.Unavailable, "", "etcd at %s is full.", where).
				WithFix("compact and defragment it, then clear the alarm with 'etcdctl alarm disarm'").Because(cause)
		}
		return fault.New(fault.TooMany, "", "etcd at %s has too much to do.", where).After(time.Second).Because(cause)
	case codes.InvalidArgument:
		if errors.Is(err, rpctypes.ErrRequestTooLarge) || errors.Is(err, rpctypes.ErrTooManyOps) {
			return fault.New(fault.TooLarge, "", "etcd at %s does not take as much at once.", where).Because(cause)
		}
		return fault.New(fault.Invalid, "", "etcd at %s refuses %s.", where, verb).Because(cause)
	case codes.NotFound:
		return fault.New(fault.NotFound, "", "etcd at %s does not know what was asked for.", where).Because(cause)
	case codes.FailedPrecondition:
		return fault.New(fault.Conflict, "", "etcd at %s is in no state for %s.", where, verb).Because(cause)
	case codes.DataLoss:
		return fault.New(fault.Unavailable, "", "etcd at %s reports that its data is corrupt.", where).WithFix("replace the member, or restore a snapshot").Because(cause)
	}
	return cause
}

// unanswered explains why nobody answered, with what was seen on the wire.
func (a *admin) unanswered(where string, cause error, members []string) error {
	for _, m := range members {
		if seen := a.wire.failure(m); seen != nil {
			cause = fmt.Errorf("%w; connection to %s: %w", cause, m, seen)
		}
	}
	var untrusted *tls.CertificateVerificationError
	if errors.As(cause, &untrusted) {
		return fault.New(fault.Unavailable, "", "The certificate of etcd at %s is not trusted.", where).Because(cause)
	}
	if refused(cause) {
		return fault.New(fault.Unauthenticated, "", "etcd at %s does not accept our client certificate.", where).Because(cause)
	}
	return fault.New(fault.Unavailable, "", "etcd at %s does not answer, or has no quorum.", where).
		WithFix("check that more than half of the members run and reach each other").After(2 * time.Second).Because(cause)
}

// refused reports whether the other side has ended TLS with an alert that is about
// our certificate (bad, unknown authority, expired, required). Package tls has no
// type for it.
func refused(cause error) bool {
	var alert *net.OpError
	return errors.As(cause, &alert) && alert.Op == "remote error" && strings.Contains(alert.Err.Error(), "certificate")
}

// code is the gRPC code of an error, also of those that etcd's client has made its own.
func code(err error) codes.Code {
	var known rpctypes.EtcdError
	switch {
	case errors.Is(err, rpctypes.ErrNotLeader): // the leader has changed since we looked
		return codes.Unavailable
	case errors.As(err, &known):
		return known.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return status.Code(err)
}
