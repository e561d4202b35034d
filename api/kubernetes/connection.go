package kubernetes

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// ExtensionWork is an extension that a cluster shall have, or shall lose.
type ExtensionWork struct {
	Name string `json:"name"` // of the release, "sc-extension"
	// Revision changes with the settings; a manager that has reported it has nothing to do.
	Revision string            `json:"revision"`
	Version  string            `json:"version,omitempty"`  // of the chart; empty: the manager's own
	Settings map[string]string `json:"settings,omitempty"` // values of the chart: "operator.replicas" -> "2"
	Remove   bool              `json:"remove,omitempty"`
}

// ConnectionWork is a connection that a cluster shall have, or shall lose.
type ConnectionWork struct {
	ID       string `json:"id"`       // of the linker
	Revision string `json:"revision"` // of its Desired
	Remove   Remove `json:"remove,omitempty"`
}

// Remove says what becomes of the objects of a connection that goes.
type Remove string

// What a removal does with the objects.
const (
	RemoveDelete Remove = "delete"
	RemoveKeep   Remove = "keep" // they stay, without an owner
)

// Desired is what a connection shall be in a cluster: the objects in the user's
// namespace. A manager fetches it from the server and writes it, as JSON, into a
// Secret of sc-system; operator and sc-job read it there.
type Desired struct {
	ID             string          `json:"id"` // of the linker
	Name           string          `json:"name"`
	Revision       string          `json:"revision"`
	Namespace      string          `json:"namespace"`
	Secret         *SecretObject   `json:"secret,omitempty"`
	ServiceAccount *AccountObject  `json:"serviceAccount,omitempty"`
	ProviderClass  *ProviderObject `json:"secretProviderClass,omitempty"`
}

// SecretObject is a Secret with the environment of the workload.
type SecretObject struct {
	Name string            `json:"name"`
	Data map[string]string `json:"data"`
}

// AccountObject is a ServiceAccount; connections of one identity in one namespace share it.
type AccountObject struct {
	Name        string            `json:"name"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ProviderObject is a SecretProviderClass of the Secrets Store CSI driver.
type ProviderObject struct {
	Name string          `json:"name"`
	Spec json.RawMessage `json:"spec"`
}

// Applied is what became of a Desired, as the operator or sc-job saw it.
type Applied struct {
	Revision string          `json:"revision"` // of the Desired that was worked on
	Time     time.Time       `json:"time"`
	Objects  []AppliedObject `json:"objects,omitempty"` // that are there and are the connection's
	Problem  *Problem        `json:"problem,omitempty"` // why not all that shall be is there
	// Repaired counts how often an object was not as it shall be, by nobody's order.
	Repaired   int       `json:"repaired,omitempty"`
	RepairedAt time.Time `json:"repairedAt,omitzero"`
	// Consumers are pods that use the Secret and started before its last change.
	Consumers []Consumer `json:"consumers,omitempty"`
	// MoreConsumers is how many there are beyond those that are listed.
	MoreConsumers int `json:"moreConsumers,omitempty"`
	// PausedUntil is set while an object stays as somebody changed it, by their order.
	PausedUntil time.Time `json:"pausedUntil,omitzero"`
}

// AppliedObject is an object that is there.
type AppliedObject struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Hash is of what it holds: of a Secret's data, and of the annotations of a
	// ServiceAccount, see SecretHash; of a SecretProviderClass see ProviderObject.Hash.
	Hash string `json:"hash,omitempty"`
	// Changed is when a Secret's data last changed, in whole seconds.
	Changed time.Time `json:"changed,omitzero"`
}

// Consumer is a pod that was started with values that are old now.
type Consumer struct {
	Pod   string    `json:"pod"` // NAMESPACE/NAME
	Since time.Time `json:"since"`
}

// Problem says what is wrong, where, and what to do about it.
type Problem struct {
	Code    string `json:"code"`             // "NamespaceNotFound"
	Layer   string `json:"layer"`            // "cluster", "helm", "job", "operator", "kubernetes", "target", "vault", "identity"
	Object  string `json:"object,omitempty"` // "Secret default/sc-x-secret"
	Message string `json:"message"`
	Raw     string `json:"raw,omitempty"` // the text of the layer below
	Fix     string `json:"fix,omitempty"`
}

// ExtensionReport is what a manager knows of an extension's release.
type ExtensionReport struct {
	Revision string   `json:"revision,omitempty"` // of the ExtensionWork that was worked on
	Release  *Release `json:"release,omitempty"`
	Problem  *Problem `json:"problem,omitempty"`
	Gone     bool     `json:"gone,omitempty"` // a removal is done
}

// Release is a Helm release as it was seen.
type Release struct {
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	Revision  int       `json:"revision"`
	Status    string    `json:"status"` // "deployed", "failed", "pending-install"
	Chart     string    `json:"chart"`  // "sc-extension-0.1.0"
	Version   string    `json:"version"`
	Updated   time.Time `json:"updated"`
	// Description is Helm's, with the reason of a failure.
	Description string `json:"description,omitempty"`
}

// ConnectionReport is what a manager saw of a connection in the cluster.
type ConnectionReport struct {
	// Applied is what the operator or the job wrote; nil: nothing yet.
	Applied *Applied `json:"applied,omitempty"`
	Problem *Problem `json:"problem,omitempty"` // of the manager itself
	// Gone says that nothing of a connection that is removed is left, or that what
	// was to be kept has no owner any more.
	Gone bool `json:"gone,omitempty"`
}

// SecretHash is the hash of a Secret's data, without regard to order: what was
// delivered can be compared with what was sent, and nobody learns either.
func SecretHash(data map[string]string) string {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(data)) {
		fmt.Fprintf(h, "%d:%s%d:%s", len(name), name, len(data[name]), data[name])
	}
	return hex.EncodeToString(h.Sum(nil))
}
