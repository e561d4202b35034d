package scextension

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

const (
	// ours selects the objects of connections; their desired states have the labels too.
	ours = labelManagedBy + "=" + Extension + "," + labelConnection + ",!" + labelDesired

	byObject    = "object"    // desired states, by the objects that they name
	byNamespace = "namespace" // desired states, by the namespace of their objects
	byKey       = "key"       // objects, by the connection of their label

	resync       = 10 * time.Minute // everything is looked at again, whatever was missed
	classesEvery = 5 * time.Second  // how often the SecretProviderClass is looked for until it is there
)

// watch knows the desired states and the objects with our labels. It holds no value
// of a Secret: of objects only the metadata, of desired states everything else.
// That an object changed shows by its metadata; the one who looks then reads it.
type watch struct {
	cluster    *Cluster
	changed    func(key string) // told of a connection that has to be looked at
	desired    cache.SharedIndexInformer
	objects    map[kind]cache.SharedIndexInformer
	namespaces cache.SharedIndexInformer
}

func newWatch(c *Cluster, changed func(key string)) (*watch, error) {
	w := &watch{cluster: c, changed: changed, objects: map[kind]cache.SharedIndexInformer{}}
	w.desired = coreinformers.NewFilteredSecretInformer(c.api, Namespace, resync, cache.Indexers{byObject: indexObjects, byNamespace: indexNamespace},
		func(o *metav1.ListOptions) { o.LabelSelector = labelDesired + "=true" })
	err := w.follow(w.desired, withoutValues, func(o metav1.Object) { changed(o.GetLabels()[labelConnection]) })
	if err != nil {
		return nil, err
	}
	w.namespaces = w.metadata(core.SchemeGroupVersion.WithResource("namespaces"), "", nil)
	err = w.follow(w.namespaces, bare, func(o metav1.Object) { w.all(byNamespace, o.GetName()) })
	if err != nil {
		return nil, err
	}
	for _, k := range kinds {
		w.objects[k] = w.metadata(k.resource, ours, cache.Indexers{byKey: indexKey})
		err = w.follow(w.objects[k], bare, func(o metav1.Object) {
			w.changed(o.GetLabels()[labelConnection])
			w.all(byObject, object{k, o.GetNamespace(), o.GetName()}.String())
		})
		if err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *watch) metadata(r schema.GroupVersionResource, selector string, by cache.Indexers) cache.SharedIndexInformer {
	return metadatainformer.NewFilteredMetadataInformer(w.cluster.meta, r, "", resync, by, func(o *metav1.ListOptions) { o.LabelSelector = selector }).Informer()
}

// follow tells of every change, before it and after it: an object that has lost its
// label is told of with the label that it had.
func (w *watch) follow(i cache.SharedIndexInformer, keep cache.TransformFunc, tell func(metav1.Object)) error {
	if err := i.SetTransform(keep); err != nil {
		return fmt.Errorf("preparing a watch: %w", err)
	}
	each := func(all ...any) {
		for _, o := range all {
			if unknown, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = unknown.Obj
			}
			if m, ok := o.(metav1.Object); ok {
				tell(m)
			}
		}
	}
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { each(o) }, UpdateFunc: func(old, o any) { each(old, o) }, DeleteFunc: func(o any) { each(o) },
	})
	if err != nil {
		return fmt.Errorf("preparing a watch: %w", err)
	}
	return nil
}

// run watches until ctx ends. It returns when everything is known that is there; the
// kind SecretProviderClass may come later.
func (w *watch) run(ctx context.Context) bool {
	for k, i := range w.objects {
		if k != classKind {
			go i.RunWithContext(ctx)
		}
	}
	go w.desired.RunWithContext(ctx)
	go w.namespaces.RunWithContext(ctx)
	go w.awaitClasses(ctx)
	return cache.WaitForCacheSync(ctx.Done(), w.desired.HasSynced, w.namespaces.HasSynced, w.objects[secretKind].HasSynced, w.objects[accountKind].HasSynced)
}

// awaitClasses starts to watch objects of the kind SecretProviderClass when the
// cluster knows it, and has all connections looked at that want one.
func (w *watch) awaitClasses(ctx context.Context) {
	for {
		if served, err := classesServed(w.cluster.api); err == nil && served {
			go w.objects[classKind].RunWithContext(ctx)
			for _, s := range w.desired.GetStore().List() {
				w.changed(s.(*core.Secret).Labels[labelConnection])
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(classesEvery):
		}
	}
}

// all tells of the connections that an index has under a name.
func (w *watch) all(index, name string) {
	found, err := w.desired.GetIndexer().ByIndex(index, name)
	if err != nil {
		return // there is such an index
	}
	for _, s := range found {
		w.changed(s.(*core.Secret).Labels[labelConnection])
	}
}

// naming implements view.
func (w *watch) naming(o object) ([]wire.Desired, error) {
	found, err := w.desired.GetIndexer().ByIndex(byObject, o.String())
	if err != nil {
		return nil, fmt.Errorf("looking for who names it: %w", err)
	}
	var all []wire.Desired
	for _, s := range found {
		if d, err := readDesired(s.(*core.Secret)); err == nil {
			all = append(all, d)
		}
	}
	return all, nil
}

// labelled implements view.
func (w *watch) labelled(key string) []object {
	var all []object
	for k, i := range w.objects {
		found, err := i.GetIndexer().ByIndex(byKey, key)
		if err != nil {
			continue // there is such an index
		}
		for _, o := range found {
			m := o.(*metav1.PartialObjectMetadata)
			all = append(all, object{k, m.Namespace, m.Name})
		}
	}
	return all
}

func indexObjects(o any) ([]string, error) {
	s := o.(*core.Secret)
	d, err := readDesired(s)
	if err != nil || !wants(s) {
		return nil, nil
	}
	var names []string
	for _, o := range named(d) {
		names = append(names, o.String())
	}
	return names, nil
}

func indexNamespace(o any) ([]string, error) {
	d, err := readDesired(o.(*core.Secret))
	if err != nil {
		return nil, nil
	}
	return []string{d.Namespace}, nil
}

func indexKey(o any) ([]string, error) {
	return []string{o.(*metav1.PartialObjectMetadata).Labels[labelConnection]}, nil
}

// withoutValues takes the values out of a desired state before it is kept.
func withoutValues(o any) (any, error) {
	s, ok := o.(*core.Secret)
	if !ok {
		return o, nil
	}
	s.ManagedFields = nil
	d, err := readDesired(s)
	s.Data = nil
	if err != nil {
		return s, nil
	}
	if d.Secret != nil {
		for name := range d.Secret.Data {
			d.Secret.Data[name] = ""
		}
	}
	text, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encoding a desired state without its values: %w", err)
	}
	s.Data = map[string][]byte{desiredKey: text}
	return s, nil
}

// bare takes everything out of an object's metadata that is not looked at.
func bare(o any) (any, error) {
	if m, ok := o.(*metav1.PartialObjectMetadata); ok {
		m.ManagedFields, m.Annotations, m.OwnerReferences = nil, nil, nil
	}
	return o, nil
}
