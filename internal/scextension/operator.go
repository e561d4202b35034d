package scextension

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Operator keeps the objects of all connections of a cluster as they shall be. It
// acts on what is there and not on what happened, so it may be ended at any moment
// and started again; then it writes nothing that has not changed. Of several, one
// works and the others wait. Its zero value is not usable.
type Operator struct {
	Cluster  *Cluster
	Identity string        // tells the replicas from each other: the name of the pod
	Lease    time.Duration // for how long the working one may be silent; zero: 15 s
	Probes   string        // address for /healthz and /readyz; empty: none
	Log      *slog.Logger

	ready atomic.Bool
}

const (
	leaseName = "sc-operator"
	workers   = 8 // connections side by side

	retryFirst = 200 * time.Millisecond
	retryLast  = 30 * time.Second

	// repairPause is between two repairs of one connection: somebody else may want
	// the object different as often.
	repairPause = time.Second
)

// Run works, or waits for its turn, until ctx ends, and then returns nil. It fails
// when it lost the lease: the process is to be started again.
func (o *Operator) Run(ctx context.Context) error {
	stopProbes, err := serveProbes(o.Probes, o.ready.Load)
	if err != nil {
		return err
	}
	defer stopProbes()
	if o.Lease <= 0 {
		o.Lease = 15 * time.Second
	}
	// The lease is given back only after the work has ended.
	electing, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var leads atomic.Bool
	ended := make(chan struct{}) // closed when the work has
	defer context.AfterFunc(ctx, func() {
		if !leads.Load() {
			stop()
		}
	})()
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Namespace: Namespace, Name: leaseName}, Client: o.Cluster.api.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: o.Identity},
		},
		LeaseDuration: o.Lease, RenewDeadline: o.Lease * 2 / 3, RetryPeriod: o.Lease / 8, ReleaseOnCancel: true, Name: leaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) {
				leads.Store(true)
				defer close(ended)
				defer stop()
				leading, end := context.WithCancel(leading)
				defer end()
				defer context.AfterFunc(ctx, end)()
				if err := o.lead(leading); err != nil {
					o.Log.Error("the operator cannot work", "error", err)
				}
			},
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				o.Log.Info("an operator works", "identity", identity, "itself", identity == o.Identity)
			},
		},
	})
	if err != nil {
		return fmt.Errorf("preparing for the lease %s: %w", leaseName, err)
	}
	o.ready.Store(true) // to take over
	elector.Run(electing)
	if leads.Load() {
		<-ended
	}
	if ctx.Err() == nil {
		return errors.New("the lease " + leaseName + " was lost; another operator may work now")
	}
	return nil
}

// lead works until ctx ends.
func (o *Operator) lead(ctx context.Context) error {
	o.ready.Store(false)
	queue := workqueue.NewTypedDelayingQueue[string]()
	defer queue.ShutDown()
	watch, err := newWatch(o.Cluster, func(key string) {
		if key != "" {
			queue.Add(key)
		}
	})
	if err != nil {
		return err
	}
	events := record.NewBroadcaster(record.WithContext(ctx))
	events.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: o.Cluster.api.CoreV1().Events("")})
	recorder := events.NewRecorder(scheme.Scheme, core.EventSource{Component: Extension})
	a := &applier{cluster: o.Cluster, view: watch, now: time.Now, repaired: func(ob object, connection string) {
		o.Log.Info("repaired", "object", ob.String(), "connection", connection)
		recorder.Eventf(&core.ObjectReference{
			APIVersion: ob.kind.resource.GroupVersion().String(), Kind: ob.kind.name, Namespace: ob.namespace, Name: ob.name,
		}, core.EventTypeWarning, "Repaired", "It was changed or deleted by somebody else, and is again as the connection %s wants it.", connection)
	}}
	if !watch.run(ctx) {
		return nil
	}
	o.ready.Store(true)
	o.Log.Info("the operator works", "connections", len(watch.desired.GetStore().ListKeys()))
	retries := workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryLast)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for o.next(ctx, queue, retries, a) {
			}
		})
	}
	<-ctx.Done()
	queue.ShutDown()
	all.Wait()
	return nil
}

// next looks after the next connection that is due; false: there will be none.
func (o *Operator) next(ctx context.Context, queue workqueue.TypedDelayingInterface[string], retries workqueue.TypedRateLimiter[string], a *applier) bool {
	key, end := queue.Get()
	if end {
		return false
	}
	defer queue.Done(key)
	if ctx.Err() != nil {
		return true // until the queue is empty
	}
	again, err := o.look(ctx, a, key)
	if ctx.Err() != nil {
		return true
	}
	if err != nil {
		o.Log.Warn("a connection is tried again", "connection", key, "tries", retries.NumRequeues(key)+1, "reason", err)
	}
	if err != nil || again < 0 {
		again = retries.When(key)
	} else {
		retries.Forget(key)
	}
	if again > 0 {
		queue.AddAfter(key, jitter(again))
	}
	return true
}

// jitter makes a time up to a quarter longer, so that many do not come back at once.
func jitter(d time.Duration) time.Duration { return d + rand.N(d/4+1) }

// look looks after one connection. It returns when to do so again; zero: when
// something changes, negative: soon, for it has a Problem.
func (o *Operator) look(ctx context.Context, a *applier, key string) (time.Duration, error) {
	s, err := o.Cluster.api.CoreV1().Secrets(Namespace).Get(ctx, desiredName(key), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("reading the desired state: %w", err)
	}
	before, err := readApplied(s)
	if err == nil && before != nil && s.DeletionTimestamp == nil {
		if wait := time.Until(before.RepairedAt.Add(repairPause)); wait > 0 && wait <= repairPause {
			return wait, nil
		}
	}
	v, err := a.visit(ctx, s)
	if errors.Is(err, errAgain) {
		return retryFirst, nil
	}
	if err != nil {
		return 0, err
	}
	o.report(s, v, before)
	if v.applied.Problem != nil {
		return -1, nil
	}
	return v.again, nil
}

// report logs what was done.
func (o *Operator) report(s *core.Secret, v visit, before *wire.Applied) {
	log := o.Log.With("linker", s.Annotations[annotationLinker])
	for _, d := range v.did {
		if d.what != "unchanged" && d.what != "problem" {
			log.Info(d.what, "object", d.object.String())
		}
	}
	if p := v.applied.Problem; p != nil && (before == nil || before.Problem == nil || *before.Problem != *p) {
		log.Warn("the connection has a problem", "code", p.Code, "layer", p.Layer, "object", p.Object, "message", p.Message, "fix", p.Fix)
	}
	if v.gone {
		log.Info("the connection is gone", "order", s.Annotations[annotationRemove])
	}
}

// serveProbes answers /healthz and /readyz until the function that it returns is called.
func serveProbes(address string, ready func() bool) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for probes: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
		}
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = s.Serve(l) }()
	return func() { _ = s.Close() }, nil
}
