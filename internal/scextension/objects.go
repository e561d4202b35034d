package scextension

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// kind is a kind of object that connections have.
type kind struct {
	name     string
	resource schema.GroupVersionResource
	content  string // the field that is wholly the connection's; empty: only annotations are
}

var (
	secretKind  = kind{"Secret", core.SchemeGroupVersion.WithResource("secrets"), "data"}
	accountKind = kind{"ServiceAccount", core.SchemeGroupVersion.WithResource("serviceaccounts"), ""}
	classKind   = kind{"SecretProviderClass", schema.GroupVersionResource{Group: "secrets-store.csi.x-k8s.io", Version: "v1", Resource: "secretproviderclasses"}, "spec"}

	kinds = []kind{secretKind, classKind, accountKind} // in the order in which they are removed
)

// Annotations of the objects that are made; annotationPause is other people's.
const (
	annotationChanged  = "keyfleet.dev/changed"     // when a Secret's data last changed
	annotationRepaired = "keyfleet.dev/repaired"    // KEY:N, the last repair was the N-th of connection KEY
	annotationPause    = "keyfleet.dev/pause-until" // RFC 3339: the object may be different until then
)

// pauseLimit is how far ahead a pause may end.
const pauseLimit = 24 * time.Hour

// object names an object.
type object struct {
	kind            kind
	namespace, name string
}

func (o object) String() string { return o.kind.name + " " + o.namespace + "/" + o.name }

// fromWire is an object as Applied has it; ok is false for a kind that is not known.
func fromWire(a wire.AppliedObject) (o object, ok bool) {
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == a.Kind })
	if i < 0 {
		return o, false
	}
	return object{kinds[i], a.Namespace, a.Name}, true
}

// wanted is an object as a connection wants it.
type wanted struct {
	object
	content     map[string]any    // of the field kind.content
	annotations map[string]string // those of the connection; other people's stay
	hash        string            // of content, or of the annotations if there is no content
}

// named lists the objects that a desired state names, in the order in which they
// are made: with the Secret, all is there.
func named(d wire.Desired) []object {
	var all []object
	if d.ServiceAccount != nil {
		all = append(all, object{accountKind, d.Namespace, d.ServiceAccount.Name})
	}
	if d.ProviderClass != nil {
		all = append(all, object{classKind, d.Namespace, d.ProviderClass.Name})
	}
	if d.Secret != nil {
		all = append(all, object{secretKind, d.Namespace, d.Secret.Name})
	}
	return all
}

// want says how a named object shall be. Others are the desired states that name it
// too: a ServiceAccount has the annotations of all of them.
func want(d wire.Desired, o object, others []wire.Desired) (wanted, *wire.Problem) {
	w := wanted{object: o, annotations: map[string]string{}}
	switch o.kind {
	case secretKind:
		w.annotations[annotationLinker] = d.ID
		w.content = make(map[string]any, len(d.Secret.Data))
		for name, value := range d.Secret.Data {
			w.content[name] = base64.StdEncoding.EncodeToString([]byte(value))
		}
		w.hash = wire.SecretHash(d.Secret.Data)
	case classKind:
		w.annotations[annotationLinker] = d.ID
		if err := utiljson.Unmarshal(d.ProviderClass.Spec, &w.content); err != nil {
			return w, unreadable(o.String(), "its spec is no JSON object")
		}
		w.hash, _ = d.ProviderClass.Hash() // it was JSON
	default:
		w.annotations = maps.Clone(d.ServiceAccount.Annotations)
		for _, other := range others {
			for name, value := range other.ServiceAccount.Annotations {
				if mine, ok := w.annotations[name]; ok && mine != value {
					return w, contradiction(o, name, d, other)
				}
				if w.annotations == nil {
					w.annotations = map[string]string{}
				}
				w.annotations[name] = value
			}
		}
		w.hash = wire.SecretHash(w.annotations)
	}
	return w, nil
}

// fresh is a wanted object that is not there yet.
func (w wanted) fresh(key string) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{}}
	u.SetGroupVersionKind(w.kind.resource.GroupVersion().WithKind(w.kind.name))
	u.SetNamespace(w.namespace)
	u.SetName(w.name)
	if w.kind == secretKind {
		u.Object["type"] = string(core.SecretTypeOpaque)
	}
	return w.impose(u, key)
}

// impose returns the object with what the connection wants, and everything else as
// it is. What it returns is equal to what it got if and only if nothing is to be done.
func (w wanted) impose(live *unstructured.Unstructured, key string) *unstructured.Unstructured {
	u := live.DeepCopy()
	labels, annotations := u.GetLabels(), u.GetAnnotations()
	if labels == nil {
		labels = map[string]string{}
	}
	labels[labelManagedBy], labels[labelConnection] = Extension, key
	u.SetLabels(labels)
	if annotations == nil {
		annotations = map[string]string{}
	}
	for _, name := range imposedAnnotations(live) {
		if _, ok := w.annotations[name]; !ok && name != annotationRepaired {
			delete(annotations, name)
		}
	}
	maps.Copy(annotations, w.annotations)
	if len(annotations) > 0 {
		u.SetAnnotations(annotations)
	} else if live.GetAnnotations() != nil {
		u.SetAnnotations(nil)
	}
	switch {
	case w.kind.content == "":
	case len(w.content) > 0:
		u.Object[w.kind.content] = w.content
	default:
		delete(u.Object, w.kind.content)
	}
	return u
}

// replaced reports whether an object is such that it cannot be changed to what is
// wanted, and has to be made anew.
func (w wanted) replaced(live *unstructured.Unstructured) bool {
	if w.kind != secretKind {
		return false
	}
	immutable, _, _ := unstructured.NestedBool(live.Object, "immutable")
	return immutable || live.Object["type"] != string(core.SecretTypeOpaque)
}

// holds reports whether an object has the wanted content.
func (w wanted) holds(live *unstructured.Unstructured) bool {
	content, _ := live.Object[w.kind.content].(map[string]any)
	return len(content) == 0 && len(w.content) == 0 || equality.Semantic.DeepEqual(content, w.content)
}

// imposedAnnotations names the annotations that the API server knows as set by us.
func imposedAnnotations(live *unstructured.Unstructured) []string {
	var names []string
	for _, entry := range live.GetManagedFields() {
		if entry.Manager != Extension || entry.FieldsV1 == nil {
			continue
		}
		var fields struct {
			Metadata struct {
				Annotations map[string]json.RawMessage `json:"f:annotations"`
			} `json:"f:metadata"`
		}
		if json.Unmarshal(entry.FieldsV1.GetRawBytes(), &fields) != nil {
			continue
		}
		for field := range fields.Metadata.Annotations {
			if name, ok := strings.CutPrefix(field, "f:"); ok {
				names = append(names, name)
			}
		}
	}
	return names
}

// changedAt reads when a Secret's data last changed; zero: it does not say.
func changedAt(live *unstructured.Unstructured) time.Time {
	at, err := time.Parse(time.RFC3339, live.GetAnnotations()[annotationChanged])
	if err != nil {
		return time.Time{}
	}
	return at.UTC()
}

// repairs reads the number of a connection's last repair off an object; zero: the
// last one was not that connection's.
func repairs(live *unstructured.Unstructured, key string) int {
	number, ok := strings.CutPrefix(live.GetAnnotations()[annotationRepaired], key+":")
	n, err := strconv.Atoi(number)
	if !ok || err != nil {
		return 0
	}
	return max(n, 0)
}

// countRepair writes it.
func countRepair(u *unstructured.Unstructured, key string, n int) {
	annotations := u.GetAnnotations()
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[annotationRepaired] = fmt.Sprintf("%s:%d", key, n)
	u.SetAnnotations(annotations)
}

// pausedUntil reads until when an object may be different; zero: it may not. A
// pause that is too long is none.
func pausedUntil(live *unstructured.Unstructured, now time.Time) time.Time {
	until, err := time.Parse(time.RFC3339, live.GetAnnotations()[annotationPause])
	if err != nil || !until.After(now) || until.After(now.Add(pauseLimit)) {
		return time.Time{}
	}
	return until.UTC()
}
