package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/fault"
)

// explain turns an error of client-go into what the caller can act on. ctx is the caller's.
func (a *api) explain(ctx context.Context, verb string, err error) error {
	var known *fault.Error
	if errors.As(err, &known) {
		return err
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%s: %w", verb, ctx.Err())
	}
	var lost *unanswered
	if errors.As(err, &lost) {
		return a.lost(verb, lost.cause)
	}
	var refusal apierrors.APIStatus
	if errors.As(err, &refusal) {
		return a.refused(verb, refusal.Status(), err)
	}
	// Not the answer of a Kubernetes API, or one that came too late.
	return fault.New(fault.Unavailable, "", "The API server %s gave no answer that can be used.", a.server).Because(fmt.Errorf("%s: %w", verb, err))
}

// lost explains why there is no answer. errors.As finds the cause, which is of
// package x509 for a certificate that is not trusted.
func (a *api) lost(verb string, cause error) error {
	wrapped := fmt.Errorf("%s: %w", verb, cause)
	var untrusted *tls.CertificateVerificationError
	if errors.As(cause, &untrusted) {
		return fault.New(fault.Unavailable, "", "The certificate of the API server %s is not trusted.", a.server).Because(wrapped)
	}
	return fault.New(fault.Unavailable, "", "The API server %s does not answer.", a.server).
		WithFix("check that it runs and can be reached").Because(wrapped)
}

// refused explains an answer that is a Status.
func (a *api) refused(verb string, s metav1.Status, err error) error {
	kind, does := fault.Internal, "refuses"
	switch code := int(s.Code); {
	case code >= 500, code >= 300 && code < 400: // a component behind it, or something else at this address
		kind, does = fault.Unavailable, "fails at"
	case code == http.StatusUnauthorized:
		kind = fault.Unauthenticated
	case code == http.StatusForbidden:
		kind = fault.Denied
	case code == http.StatusNotFound:
		kind = fault.NotFound
	case code == http.StatusConflict, code == http.StatusGone:
		kind = fault.Conflict
	case code == http.StatusTooManyRequests:
		kind = fault.TooMany
	case code == http.StatusRequestEntityTooLarge:
		kind = fault.TooLarge
	case code == http.StatusBadRequest, code == http.StatusUnprocessableEntity:
		kind = fault.Invalid
	}
	f := fault.New(kind, "", "The API server %s %s %s: %s.", a.server, does, verb, s.Message).Because(err)
	if s.Details != nil && s.Details.RetryAfterSeconds > 0 {
		f = f.After(time.Duration(s.Details.RetryAfterSeconds) * time.Second)
	}
	return f
}
