package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"strings"

	authentication "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Ready implements rotation.API.
func (a *api) Ready(ctx context.Context) error {
	var page []byte
	_, err := ask(ctx, a, "asking whether it is ready", func(ctx context.Context) (_ []byte, err error) {
		page, err = a.get(ctx, "/readyz")
		return page, err
	})
	if failed := failedChecks(page); err != nil && len(failed) > 0 {
		return fault.New(fault.Unavailable, "", "The API server %s is not ready: %s.", a.server, strings.Join(failed, ", ")).Because(err)
	}
	return err
}

// failedChecks are the names on the lines "[-]NAME failed: ..." of /readyz.
func failedChecks(page []byte) []string {
	var failed []string
	for lines := bufio.NewScanner(bytes.NewReader(page)); lines.Scan(); {
		if check, ok := strings.CutPrefix(lines.Text(), "[-]"); ok {
			name, _, _ := strings.Cut(check, " ")
			failed = append(failed, name)
		}
	}
	return failed
}

// WhoAmI implements rotation.API.
func (a *api) WhoAmI(ctx context.Context) (string, error) {
	r, err := ask(ctx, a, "asking who we are", func(ctx context.Context) (*authentication.SelfSubjectReview, error) {
		return a.typed.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authentication.SelfSubjectReview{}, metav1.CreateOptions{})
	})
	if err != nil {
		return "", err
	}
	return r.Status.UserInfo.Username, nil
}

// ReviewToken implements rotation.API. For ten seconds an API server remembers
// that it has accepted a token, and accepts it again without a look.
func (a *api) ReviewToken(ctx context.Context, token string) (bool, error) {
	r, err := ask(ctx, a, "reviewing a token", func(ctx context.Context) (*authentication.TokenReview, error) {
		review := &authentication.TokenReview{Spec: authentication.TokenReviewSpec{Token: token}}
		return a.typed.AuthenticationV1().TokenReviews().Create(ctx, review, metav1.CreateOptions{})
	})
	if err != nil {
		return false, err
	}
	return r.Status.Authenticated, nil
}

// ServiceAccount implements rotation.API.
func (a *api) ServiceAccount(ctx context.Context, namespace, name string) (uid string, err error) {
	return ask(ctx, a, "reading service account "+namespace+"/"+name, func(ctx context.Context) (string, error) {
		s, err := a.typed.CoreV1().ServiceAccounts(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		return string(s.UID), nil
	})
}

// Issuer implements rotation.API.
func (a *api) Issuer(ctx context.Context) (issuer string, kids []string, err error) {
	var about struct {
		Issuer string `json:"issuer"`
	}
	if err := a.document(ctx, "/.well-known/openid-configuration", &about); err != nil {
		return "", nil, err
	}
	var set struct {
		Keys []struct {
			ID string `json:"kid"`
		} `json:"keys"`
	}
	if err := a.document(ctx, "/openid/v1/jwks", &set); err != nil {
		return "", nil, err
	}
	for _, k := range set.Keys {
		kids = append(kids, k.ID)
	}
	return about.Issuer, kids, nil
}

// document reads JSON that is not an object of the API.
func (a *api) document(ctx context.Context, path string, into any) error {
	_, err := ask(ctx, a, "reading "+path, func(ctx context.Context) (struct{}, error) {
		text, err := a.get(ctx, path)
		if err == nil {
			err = json.Unmarshal(text, into)
		}
		return struct{}{}, err
	})
	return err
}

// get reads what is at a path, and returns it also beside an error.
func (a *api) get(ctx context.Context, path string) ([]byte, error) {
	return a.typed.CoreV1().RESTClient().Get().AbsPath(path).DoRaw(ctx)
}
