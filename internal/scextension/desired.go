package scextension

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// Names in a cluster.
const (
	Namespace = "sc-system"    // of the extension
	Extension = "sc-extension" // Helm release, and field manager of all that operator and job apply

	labelManagedBy  = "app.kubernetes.io/managed-by" // Extension, on every object that is made
	labelConnection = "keyfleet.dev/connection"      // key of the connection, on its desired state and its objects
	labelDesired    = "keyfleet.dev/desired"         // "true" on desired states

	annotationLinker  = "keyfleet.dev/linker"  // resource id of the connection
	annotationApplied = "keyfleet.dev/applied" // JSON of Applied, written by operator and job
	annotationRemove  = "keyfleet.dev/remove"  // wire.Remove, set by the manager before it deletes a desired state

	finalizer   = "keyfleet.dev/objects" // the objects of a desired state are still there
	desiredType = core.SecretType("keyfleet.dev/connection")
	desiredKey  = "desired"
)

// Key names a connection in labels and in the name of its desired state.
func Key(linkerID string) string {
	sum := sha256.Sum256([]byte(strings.ToLower(linkerID)))
	return hex.EncodeToString(sum[:8])
}

// desiredName is the name of the Secret that holds a connection's desired state.
func desiredName(key string) string { return "connection-" + key }

// desiredSecret is the Secret of sc-system that holds what a connection shall be.
func desiredSecret(d wire.Desired) (*core.Secret, error) {
	text, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encoding the desired state of %s: %w", d.Name, err)
	}
	return &core.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Name: desiredName(Key(d.ID)), Namespace: Namespace, Finalizers: []string{finalizer},
			Labels:      map[string]string{labelManagedBy: Extension, labelConnection: Key(d.ID), labelDesired: "true"},
			Annotations: map[string]string{annotationLinker: d.ID},
		},
		Type: desiredType, Data: map[string][]byte{desiredKey: text},
	}, nil
}

// readDesired reads such a Secret. The error does not show its content.
func readDesired(s *core.Secret) (d wire.Desired, err error) {
	if err := jsonstrict.Decode(s.Data[desiredKey], &d); err != nil {
		return d, fmt.Errorf("the Secret %s/%s holds no desired state", s.Namespace, s.Name)
	}
	if Key(d.ID) != s.Labels[labelConnection] {
		return d, fmt.Errorf("the Secret %s/%s is labelled as that of another connection", s.Namespace, s.Name)
	}
	return d, nil
}

// readApplied reads what operator or job wrote; nil: nothing yet.
func readApplied(s *core.Secret) (*wire.Applied, error) {
	text := s.Annotations[annotationApplied]
	if text == "" {
		return nil, nil
	}
	var a wire.Applied
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		return nil, fmt.Errorf("reading the annotation %s of %s/%s: %w", annotationApplied, s.Namespace, s.Name, err)
	}
	return &a, nil
}
