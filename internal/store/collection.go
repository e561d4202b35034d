package store

import (
	"bytes"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	json "github.com/go-json-experiment/json/v1" // encoding/json with half the time a decode takes

	"keyfleet.dev/keyfleet/internal/fault"
)

// Meta is what the store keeps about every object.
type Meta struct {
	ID         string      `json:"id"`                   // key inside the collection; lower case, parts joined by "/"
	UID        string      `json:"uid"`                  // random; another object of the same ID has another UID
	Generation int64       `json:"generation"`           // counts changes of Spec, from 1
	Created    time.Time   `json:"created"`              // UTC
	Changed    time.Time   `json:"changed"`              // last change of Spec
	Deleting   time.Time   `json:"deleting,omitzero"`    // when deletion was asked for; zero: it was not
	Finalizers []string    `json:"finalizers,omitempty"` // who must clean up before the object goes
	Conditions []Condition `json:"conditions,omitempty"`
	Revision   int64       `json:"-"` // the store's revision of the last write, 0 for a new object
}

// Condition is one statement about an object, set by a controller that looked.
type Condition struct {
	Type               string    `json:"type"`   // "Ready", "Reconciling", "Stalled" or a capability's own
	Status             bool      `json:"status"` // whether the statement holds
	Reason             string    `json:"reason"` // one CamelCase word
	Message            string    `json:"message,omitempty"`
	ObservedGeneration int64     `json:"observedGeneration"`
	Since              time.Time `json:"since"`                // when Status last changed
	NextAttempt        time.Time `json:"nextAttempt,omitzero"` // after a failure: when it is tried again; zero on Stalled: when the spec changes
}

// SetCondition sets the condition of c.Type; Since moves only when Status does.
func (m *Meta) SetCondition(c Condition, now time.Time) {
	c.ObservedGeneration, c.Since = m.Generation, now
	for i, old := range m.Conditions {
		if old.Type == c.Type {
			if old.Status == c.Status {
				c.Since = old.Since
			}
			m.Conditions[i] = c
			return
		}
	}
	m.Conditions = append(m.Conditions, c)
}

// Condition returns the condition of the type; the zero Condition if there is none.
func (m *Meta) Condition(typ string) Condition {
	for _, c := range m.Conditions {
		if c.Type == typ {
			return c
		}
	}
	return Condition{}
}

// HasFinalizer reports whether name must clean up before the object goes.
func (m *Meta) HasFinalizer(name string) bool { return slices.Contains(m.Finalizers, name) }

// Object is a stored resource: what was asked for (Spec) and what is (Status).
type Object[S, T any] struct {
	Meta
	Spec   S `json:"spec"`
	Status T `json:"status"`
}

// ETag names this state of the Spec: store incarnation and generation. A status
// write does not change it and a restore does.
func (o *Object[S, T]) ETag(s *Store) string {
	return fmt.Sprintf("0x%s%s%X", strings.ToUpper(s.incarnation), strings.ToUpper(o.UID[:4]), o.Generation)
}

// Collection is the typed name of a set of objects. It holds no state; make it
// once as a package-level value or field with [NewCollection].
type Collection[S, T any] struct {
	Kind string        // first part of the key, for instance "vaults"
	TTL  time.Duration // objects vanish by themselves after this time; zero: never
}

// NewCollection names a collection.
func NewCollection[S, T any](kind string) Collection[S, T] { return Collection[S, T]{Kind: kind} }

// Key returns the backend key of an id.
func (c Collection[S, T]) Key(id string) string { return "/" + c.Kind + "/" + id }

// Get returns the object, or a fault.NotFound.
func (c Collection[S, T]) Get(tx *Tx, id string) (*Object[S, T], error) {
	e, err := tx.get(c.Key(id))
	if err != nil {
		return nil, err
	}
	if e.ModRev == 0 && e.Value == nil {
		return nil, fault.New(fault.NotFound, "", "%s %q does not exist.", strings.TrimSuffix(c.Kind, "s"), id)
	}
	return c.decode(e)
}

// Lookup is Get with absence as a nil object instead of an error.
func (c Collection[S, T]) Lookup(tx *Tx, id string) (*Object[S, T], error) {
	o, err := c.Get(tx, id)
	if err != nil && fault.KindOf(err) == fault.NotFound {
		return nil, nil
	}
	return o, err
}

// List returns the objects whose ids start with prefix ("" for all), by id.
func (c Collection[S, T]) List(tx *Tx, prefix string) ([]*Object[S, T], error) {
	es, err := tx.list(c.Key(prefix))
	if err != nil {
		return nil, err
	}
	out := make([]*Object[S, T], 0, len(es))
	for _, e := range es {
		o, err := c.decode(e)
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out, nil
}

// Insert adds a new object at generation 1. It fails with fault.Conflict if the
// id is taken.
func (c Collection[S, T]) Insert(tx *Tx, o *Object[S, T]) error {
	old, err := c.Lookup(tx, o.ID)
	if err != nil {
		return err
	}
	if old != nil {
		return fault.New(fault.Conflict, "", "%s %q exists already.", strings.TrimSuffix(c.Kind, "s"), o.ID)
	}
	now := time.Now().UTC()
	o.UID, o.Generation, o.Created, o.Changed = newID(), 1, now, now
	return c.write(tx, o)
}

// Put writes an object that was read in this Tx (or earlier: then a change in
// between fails with fault.Precondition). Generation grows when Spec differs
// from what is stored. The object must exist.
func (c Collection[S, T]) Put(tx *Tx, o *Object[S, T]) error {
	old, err := c.current(tx, o)
	if err != nil {
		return err
	}
	same, err := sameJSON(old.Spec, o.Spec)
	if err != nil {
		return err
	}
	if !same {
		o.Generation, o.Changed = old.Generation+1, time.Now().UTC()
	}
	return c.write(tx, o)
}

// PutStatus writes Status and Conditions of o, and nothing else, onto the stored
// object; Generation does not move. If neither differs from what is stored, it
// writes nothing. It fails as [Collection.Put] does.
func (c Collection[S, T]) PutStatus(tx *Tx, o *Object[S, T]) error {
	old, err := c.current(tx, o)
	if err != nil {
		return err
	}
	sameStatus, err := sameJSON(old.Status, o.Status)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", c.Key(o.ID), err)
	}
	sameConditions, err := sameJSON(old.Conditions, o.Conditions)
	if err != nil || sameStatus && sameConditions {
		return err
	}
	old.Status, old.Conditions = o.Status, o.Conditions
	return c.write(tx, old)
}

// current returns the stored state of o, if o was made from it.
func (c Collection[S, T]) current(tx *Tx, o *Object[S, T]) (*Object[S, T], error) {
	old, err := c.Get(tx, o.ID)
	if err != nil {
		return nil, err
	}
	if old.UID != o.UID || (o.Revision != 0 && old.Revision != o.Revision) {
		return nil, fault.New(fault.Precondition, "", "%s %q was changed by somebody else.", strings.TrimSuffix(c.Kind, "s"), o.ID)
	}
	return old, nil
}

// Delete asks for the object's deletion: with finalizers it marks the object
// (again and again without harm), without it removes it. An absent object is no error.
func (c Collection[S, T]) Delete(tx *Tx, id string) error {
	o, err := c.Lookup(tx, id)
	if err != nil || o == nil {
		return err
	}
	if len(o.Finalizers) == 0 {
		tx.remove(c.Key(id))
		return nil
	}
	if o.Deleting.IsZero() {
		o.Deleting = time.Now().UTC()
		o.Generation++
		return c.write(tx, o)
	}
	return nil
}

// RemoveFinalizer removes the name and, if the object is being deleted and it
// was the last, the object.
func (c Collection[S, T]) RemoveFinalizer(tx *Tx, id, name string) error {
	o, err := c.Lookup(tx, id)
	if err != nil || o == nil || !o.HasFinalizer(name) {
		return err
	}
	o.Finalizers = slices.DeleteFunc(o.Finalizers, func(f string) bool { return f == name })
	if len(o.Finalizers) == 0 && !o.Deleting.IsZero() {
		tx.remove(c.Key(id))
		return nil
	}
	return c.write(tx, o)
}

func (c Collection[S, T]) write(tx *Tx, o *Object[S, T]) error {
	if o.ID == "" || o.ID != strings.ToLower(o.ID) {
		return fmt.Errorf("store: bad id %q in %s: ids are lower case and not empty", o.ID, c.Kind)
	}
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", c.Key(o.ID), err)
	}
	tx.put(c.Key(o.ID), b, c.TTL)
	return nil
}

func (c Collection[S, T]) decode(e Entry) (*Object[S, T], error) {
	o := new(Object[S, T])
	if err := json.Unmarshal(e.Value, o); err != nil {
		return nil, fmt.Errorf("decoding %s: %w: %w", e.Key, ErrCorrupt, err)
	}
	o.Revision = e.ModRev
	return o, nil
}

func sameJSON(a, b any) (bool, error) {
	x, err := json.Marshal(a)
	if err != nil {
		return false, err
	}
	y, err := json.Marshal(b)
	return bytes.Equal(x, y), err
}
