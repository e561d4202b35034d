package kube

import (
	"context"
	"encoding/json"
	"maps"

	signing "k8s.io/api/certificates/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/internal/rotation"
)

// Signed implements rotation.API.
func (a *api) Signed(ctx context.Context) ([]rotation.Signed, error) {
	requests, err := ask(ctx, a, "listing certificate signing requests", func(ctx context.Context) ([]signing.CertificateSigningRequest, error) {
		return list(ctx, metav1.ListOptions{}, a.typed.CertificatesV1().CertificateSigningRequests().List, func(l *signing.CertificateSigningRequestList) []signing.CertificateSigningRequest { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	var out []rotation.Signed
	for i := range requests {
		if text := requests[i].Status.Certificate; len(text) > 0 {
			out = append(out, rotation.Signed{PEM: text, At: requests[i].CreationTimestamp.Time})
		}
	}
	return out, nil
}

// rootCA is the ConfigMap that the controller manager keeps in every namespace.
const rootCA = "kube-root-ca.crt"

// RootCAs implements rotation.API. A namespace that is being deleted is left out
// unless it has the ConfigMap: nobody makes one there any more.
func (a *api) RootCAs(ctx context.Context) (map[string]string, error) {
	namespaces, err := ask(ctx, a, "listing namespaces", func(ctx context.Context) ([]core.Namespace, error) {
		return list(ctx, metav1.ListOptions{}, a.typed.CoreV1().Namespaces().List, func(l *core.NamespaceList) []core.Namespace { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	published, err := ask(ctx, a, "listing ConfigMaps "+rootCA, func(ctx context.Context) ([]core.ConfigMap, error) {
		o := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, rootCA).String()}
		return list(ctx, o, a.typed.CoreV1().ConfigMaps("").List, func(l *core.ConfigMapList) []core.ConfigMap { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	roots := map[string]string{}
	for _, n := range namespaces {
		if n.Status.Phase != core.NamespaceTerminating {
			roots[n.Name] = ""
		}
	}
	for _, m := range published {
		roots[m.Namespace] = m.Data[core.ServiceAccountRootCAKey]
	}
	return roots, nil
}

// ConfigMap implements rotation.API.
func (a *api) ConfigMap(ctx context.Context, namespace, name string) (map[string]string, error) {
	return ask(ctx, a, "reading ConfigMap "+namespace+"/"+name, func(ctx context.Context) (map[string]string, error) {
		m, err := a.typed.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return m.Data, nil
	})
}

// PutConfigMap implements rotation.API. change is called again with what is there
// now if somebody else has written in between; its own error is returned as it is.
func (a *api) PutConfigMap(ctx context.Context, namespace, name string, change func(data map[string]string) error) error {
	verb := "changing ConfigMap " + namespace + "/" + name
	for try := 1; ; try++ {
		m, err := ask(ctx, a, verb, func(ctx context.Context) (*core.ConfigMap, error) {
			return a.typed.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
		})
		if err != nil {
			return err
		}
		before := maps.Clone(m.Data)
		if m.Data == nil {
			m.Data = map[string]string{}
		}
		if err := change(m.Data); err != nil {
			return err
		}
		if maps.Equal(before, m.Data) {
			return nil
		}
		_, err = ask(ctx, a, verb, func(ctx context.Context) (*core.ConfigMap, error) {
			return a.typed.CoreV1().ConfigMaps(namespace).Update(ctx, m, metav1.UpdateOptions{FieldManager: manager})
		})
		if err == nil || try == races || !apierrors.IsConflict(err) {
			return err
		}
	}
}

// DeleteConfigMap implements rotation.API.
func (a *api) DeleteConfigMap(ctx context.Context, namespace, name string) error {
	_, err := ask(ctx, a, "deleting ConfigMap "+namespace+"/"+name, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, a.typed.CoreV1().ConfigMaps(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	})
	return err
}

// TokenSecrets implements rotation.API.
func (a *api) TokenSecrets(ctx context.Context) ([]rotation.TokenSecret, error) {
	secrets, err := ask(ctx, a, "listing token Secrets", func(ctx context.Context) ([]core.Secret, error) {
		o := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("type", string(core.SecretTypeServiceAccountToken)).String()}
		return list(ctx, o, a.typed.CoreV1().Secrets("").List, func(l *core.SecretList) []core.Secret { return l.Items })
	})
	if err != nil {
		return nil, err
	}
	var out []rotation.TokenSecret
	for _, s := range secrets {
		out = append(out, rotation.TokenSecret{
			Namespace: s.Namespace, Name: s.Name,
			Token: string(s.Data[core.ServiceAccountTokenKey]), CA: string(s.Data[core.ServiceAccountRootCAKey]),
		})
	}
	return out, nil
}

// BlankToken implements rotation.API. The type is in the patch so that the
// server refuses a Secret of another type: a type cannot be changed.
func (a *api) BlankToken(ctx context.Context, namespace, name string) error {
	patch, err := json.Marshal(map[string]any{
		"type": core.SecretTypeServiceAccountToken, "data": map[string]any{core.ServiceAccountTokenKey: nil},
	})
	if err != nil {
		return err
	}
	_, err = ask(ctx, a, "emptying the token of Secret "+namespace+"/"+name, func(ctx context.Context) (*core.Secret, error) {
		return a.typed.CoreV1().Secrets(namespace).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager})
	})
	return err
}
