package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// Kubelets asks kubelets over connections of d.
func Kubelets(d rotation.Dialer) rotation.AskKubelet {
	return func(ctx context.Context, address string, as rotation.Credential) (string, error) {
		return askKubelet(ctx, d, address, as)
	}
}

// forbidden is how a kubelet refuses somebody whom it knows.
var forbidden = regexp.MustCompile(`^Forbidden \(user=(.*), verb=`)

// askKubelet asks for something to which a caller without rights is refused, by
// name. Nobody vouches for the certificates of kubelets, so theirs is not verified:
// nothing secret is sent, and the answer is a name that we know.
func askKubelet(ctx context.Context, d rotation.Dialer, address string, as rotation.Credential) (string, error) {
	secure, err := as.TLS()
	if err != nil {
		return "", fmt.Errorf("asking the kubelet of %s: %w", address, err)
	}
	secure.InsecureSkipVerify = true
	trip := &http.Transport{DialContext: d.DialContext, TLSClientConfig: secure, DisableKeepAlives: true}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/configz", nil)
	if err != nil {
		return "", fmt.Errorf("asking the kubelet of %s: %w", address, err)
	}
	resp, err := trip.RoundTrip(r)
	if err != nil {
		return "", fault.New(fault.Unavailable, "", "The kubelet %s does not answer.", address).Because(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", fault.New(fault.Unavailable, "", "The kubelet %s does not answer.", address).Because(err)
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		return "", nil
	case http.StatusForbidden:
		if m := forbidden.FindSubmatch(text); m != nil {
			return string(m[1]), nil
		}
	}
	return "", fault.New(fault.Precondition, "", "The kubelet %s answers somebody without rights with status %d.", address, resp.StatusCode).
		WithFix("give it authorization by webhook: it shows its secrets to all that it knows")
}
