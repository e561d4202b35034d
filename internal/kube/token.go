package kube

import (
	"context"
	"time"

	authentication "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NewToken makes a token of a service account; no audiences: the API server's own.
// The server may give it a shorter life.
func (a *api) NewToken(ctx context.Context, namespace, name string, audiences []string, life time.Duration) (string, error) {
	seconds := int64(life / time.Second)
	return ask(ctx, a, "making a token of "+namespace+"/"+name, func(ctx context.Context) (string, error) {
		want := &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{Audiences: audiences, ExpirationSeconds: &seconds}}
		got, err := a.typed.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, want, metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		return got.Status.Token, nil
	})
}
