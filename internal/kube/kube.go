// Package kube speaks the Kubernetes API for a rotation: one API server at a
// time, as whoever the credential says, through whatever connection the caller's
// dialer makes.
//
// Idea: a rotation asks the same question of each API server and as several
// callers (the administrator's certificate, a service account's token, the front
// proxy), to learn which certificates and keys that server accepts. So an API is
// bound to one address and one [rotation.Credential], and shares no connection
// with another: what a call tells is true of this server, this credential and a
// handshake that is seconds old.
//
// Invariant: a call is sent once. A failure is reported at once and never waited
// for or tried again (client-go would, up to ten times), except for the two writes that
// compare a resource version and lose a race. Nothing depends on API discovery,
// which fails while an aggregated API is down. Errors hold no secret.
//
// Consequence for the operator: a message names the API server, what was asked
// of it and why it did not answer; a certificate that is not trusted is told
// apart from a server that is down. Every write can be repeated.
package kube

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

const (
	answerTime = 30 * time.Second // for one request, with its body
	idleTime   = 10 * time.Second // how long a connection is kept for the next one
	pageSize   = 500
	races      = 5 // how often a write that lost against another is made again

	manager = "keyfleet" // our name in managedFields
)

// api is a rotation.API. Connections that are idle end by themselves, so there
// is nothing to close.
type api struct {
	server  string // host:port
	typed   kubernetes.Interface
	dynamic dynamic.Interface
	meta    metadata.Interface
}

// Connector opens APIs over connections of d.
func Connector(d rotation.Dialer) rotation.Connect {
	return func(server string, as rotation.Credential) (rotation.API, error) {
		return connect(d, server, as, answerTime)
	}
}

func connect(d rotation.Dialer, server string, as rotation.Credential, timeout time.Duration) (*api, error) {
	if _, _, err := net.SplitHostPort(server); err != nil {
		return nil, fault.New(fault.Invalid, "", "%q is not the address of an API server.", server).WithFix("give HOST:PORT").Because(err)
	}
	trip, err := newCaller(d, as)
	if err != nil {
		return nil, fmt.Errorf("opening the API of %s: %w", server, err)
	}
	client := &http.Client{
		Transport: trip, Timeout: timeout,
		// A redirect would take the credential elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	config := &rest.Config{
		Host: "https://" + server, Timeout: timeout, UserAgent: manager, WarningHandler: rest.NoWarnings{},
		RateLimiter: flowcontrol.NewTokenBucketRateLimiter(50, 100),
	}
	a := &api{server: server}
	if a.typed, err = kubernetes.NewForConfigAndClient(config, client); err != nil {
		return nil, fmt.Errorf("opening the API of %s: %w", server, err)
	}
	if a.dynamic, err = dynamic.NewForConfigAndClient(config, client); err != nil {
		return nil, fmt.Errorf("opening the API of %s: %w", server, err)
	}
	if a.meta, err = metadata.NewForConfigAndClient(config, client); err != nil {
		return nil, fmt.Errorf("opening the API of %s: %w", server, err)
	}
	return a, nil
}

// ask makes one call, which verb describes, and explains its failure.
func ask[T any](ctx context.Context, a *api, verb string, call func(context.Context) (T, error)) (T, error) {
	answer, err := call(quiet(ctx))
	if err != nil {
		var none T
		return none, a.explain(ctx, verb, err)
	}
	return answer, nil
}

// quiet keeps client-go from writing to standard error what is in the error anyway.
func quiet(ctx context.Context) context.Context {
	return klog.NewContext(ctx, klog.Logger{})
}

// list reads a list page by page. A list that takes so long that the server has
// forgotten the revision of its first page is read again in one piece.
func list[L interface{ GetContinue() string }, T any](
	ctx context.Context, o metav1.ListOptions, page func(context.Context, metav1.ListOptions) (L, error), items func(L) []T,
) ([]T, error) {
	o.Limit = pageSize
	var all []T
	for {
		l, err := page(ctx, o)
		switch {
		case err != nil && o.Continue != "" && apierrors.IsResourceExpired(err):
			all, o.Limit, o.Continue = nil, 0, ""
			continue
		case err != nil:
			return nil, err
		}
		all = append(all, items(l)...)
		if o.Continue = l.GetContinue(); o.Continue == "" {
			return all, nil
		}
	}
}
