// Package etcdadmin speaks to the etcd of a Kubernetes cluster as its
// administrator: who the members are and how they are, moving the leader, a
// snapshot, and a few keys.
//
// Idea: a rotation restarts members one after the other and must know of each
// whether it answers with the certificates it has now. So each look at the
// members makes new connections, one to each, and an error carries what went
// wrong on the wire (gRPC would say "unavailable"), with the errors of package
// x509 in its chain.
//
// Invariant: all connections come from the caller's dialer, verify the server
// and show the client certificate. A snapshot is reported as written only if the
// digest that etcd sends at its end is the digest of what was written. Several
// keys are written in one transaction or not at all.
//
// Consequence for the operator: a cluster without a quorum is still described,
// member by member; everything else needs a quorum and says within seconds that
// there is none.
package etcdadmin

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

const (
	statusTime = 5 * time.Second  // for one member to say how it is
	answerTime = 10 * time.Second // for the cluster to answer: longer than its own limit, so that it names the reason
	stallTime  = 30 * time.Second // for the next piece of a snapshot
)

// admin is a rotation.Etcd.
type admin struct {
	endpoints []string // host:port
	wire      *wire
	client    *clientv3.Client // of all endpoints
}

// Opener connects to etcd over connections of d, and returns when a member answers.
func Opener(d rotation.Dialer) rotation.OpenEtcd {
	return func(ctx context.Context, members []string, as rotation.Credential) (rotation.Etcd, error) {
		if len(members) == 0 {
			return nil, fault.New(fault.Invalid, "", "There is no member of etcd to connect to.")
		}
		w, err := newWire(d, as)
		if err != nil {
			return nil, fmt.Errorf("connecting to etcd: %w", err)
		}
		a := &admin{endpoints: slices.Clone(members), wire: w}
		if a.client, err = w.client(members...); err != nil {
			return nil, fmt.Errorf("connecting to etcd: %w", err)
		}
		ctx, cancel := context.WithTimeout(ctx, answerTime)
		defer cancel()
		if _, err := a.client.MemberList(ctx, clientv3.WithSerializable()); err != nil {
			return nil, errors.Join(a.explain(ctx, "connecting to etcd", err, members...), a.Close())
		}
		return a, nil
	}
}

// client makes a client of some members. It does not dial yet.
func (w *wire) client(members ...string) (*clientv3.Client, error) {
	var urls []string
	for _, m := range members {
		urls = append(urls, address(m))
	}
	return clientv3.New(clientv3.Config{
		Endpoints: urls, Logger: zap.NewNop(),
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
		MaxUnaryRetries: 5, // of reads, and of what was not sent; the next one asks another member
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(w.dial), grpc.WithTransportCredentials(w),
			grpc.WithChainUnaryInterceptor(failFast), grpc.WithChainStreamInterceptor(failFastStream),
			// Whoever asks again soon finds out soon; gRPC alone would try to connect every two minutes in the end.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: statusTime,
			}),
		},
	})
}

// failFast makes a call fail when there is no connection. etcd's client would
// wait for one until the call's time is over, and then know only that it is over.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, o ...grpc.CallOption) error {
	return call(ctx, method, req, reply, cc, append(o, grpc.WaitForReady(false))...)
}

// failFastStream is failFast for the stream of a snapshot.
func failFastStream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
	return open(ctx, desc, cc, method, append(o, grpc.WaitForReady(false))...)
}

// address is how etcd's client wants an endpoint that is to be verified.
func address(member string) string { return "https://" + member }

// Close implements rotation.Etcd.
func (a *admin) Close() error {
	if err := a.client.Close(); err != nil && !errors.Is(err, context.Canceled) { // the client's own context, which Close ends
		return fmt.Errorf("closing the connection to etcd: %w", err)
	}
	return nil
}

// Get implements rotation.Etcd. A key that is not there is a fault.NotFound.
func (a *admin) Get(ctx context.Context, key string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	r, err := a.client.Get(ctx, key)
	if err != nil {
		return nil, a.explain(ctx, "reading "+key, err, a.endpoints...)
	}
	if len(r.Kvs) == 0 {
		return nil, fault.New(fault.NotFound, "", "etcd has no key %s.", key)
	}
	return r.Kvs[0].Value, nil
}

// Put implements rotation.Etcd. It may be repeated after an error: then it is
// not known whether the transaction was made.
func (a *admin) Put(ctx context.Context, pairs map[string][]byte) error {
	if len(pairs) == 0 {
		return nil
	}
	var puts []clientv3.Op
	for _, key := range slices.Sorted(maps.Keys(pairs)) {
		puts = append(puts, clientv3.OpPut(key, string(pairs[key])))
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := a.client.Txn(ctx).Then(puts...).Commit(); err != nil {
		return a.explain(ctx, fmt.Sprintf("writing %d keys", len(pairs)), err, a.endpoints...)
	}
	return nil
}
