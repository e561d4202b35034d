package connector

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// ExtensionType is the ARM type of extensions of clusters.
const ExtensionType = "Microsoft.KubernetesConfiguration/extensions"

// The only extension that there is, and what Azure calls its kind.
const (
	ExtensionName = "sc-extension"
	extensionKind = "microsoft.servicelinker.connection"
)

// Extension is the spec of sc-extension on a cluster: that a manager shall install it.
type Extension struct {
	ID          string `json:"id"`
	Cluster     string `json:"cluster"`
	Train       string `json:"train"`
	Version     string `json:"version,omitempty"` // pinned; empty: the manager's own
	AutoUpgrade bool   `json:"autoUpgrade"`
	// Settings are values of the chart: "operator.replicas" -> "2".
	Settings map[string]string `json:"settings,omitempty"`
}

// ExtensionStatus is what a manager reported of the release.
type ExtensionStatus struct {
	Report wire.ExtensionReport `json:"report,omitzero"`
	Time   time.Time            `json:"time,omitzero"`
}

// ExtensionObject is a stored extension.
type ExtensionObject = store.Object[Extension, ExtensionStatus]

// Extensions is the collection of extensions; ids are "SUBSCRIPTION/GROUP/CLUSTER/NAME".
// An extension that is being removed has a finalizer, until a manager has seen that it is gone.
var Extensions = store.NewCollection[Extension, ExtensionStatus]("extensions")

const (
	extensionFinalizer    = "release"
	actionExtensionRead   = ExtensionType + "/read"
	actionExtensionWrite  = ExtensionType + "/write"
	actionExtensionDelete = ExtensionType + "/delete"
)

func extensionID(cluster arm.ID) string {
	return cluster.String() + "/providers/" + ExtensionType + "/" + ExtensionName
}

func extensionNotFound(cluster arm.ID, name string) error {
	return fault.New(fault.NotFound, "ExtensionNotFound", "The Resource Microsoft.ContainerService/managedClusters/%s/Microsoft.KubernetesConfiguration/extensions/%.60s could not be found!", cluster.Name(), name).
		WithFix("the first connection of the cluster installs %s", ExtensionName)
}

// PutExtension installs sc-extension, or changes its settings.
func (s *Service) PutExtension(ctx context.Context, cluster arm.ID, name, kind string, want Extension) (out *ExtensionObject, created bool, err error) {
	if !strings.EqualFold(kind, extensionKind) {
		return nil, false, fault.New(fault.Invalid, "ExtensionTypeRegistrationGetFailed", "Extension type %.100s is not registered here.", kind).
			At("properties.extensionType").WithFix("the only one is %s", extensionKind)
	}
	if !strings.EqualFold(name, ExtensionName) {
		return nil, false, fault.New(fault.Invalid, "InvalidResourceName", "The extension %s has the name %s.", extensionKind, ExtensionName).At("name")
	}
	if want.Version != "" && want.AutoUpgrade {
		return nil, false, fault.New(fault.Invalid, "InvalidArgument", "To pin to specific version, auto-upgrade-minor-version must be set to 'false'.").At("properties.autoUpgradeMinorVersion")
	}
	want.ID, want.Cluster, want.Train = extensionID(cluster), cluster.String(), cmp.Or(want.Train, "Stable")
	op := access.Op{Action: actionExtensionWrite, Resource: want.ID}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return nil, false, s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	if _, err := s.cfg.Clusters.State(ctx, cluster); err != nil {
		return nil, false, err
	}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if err := s.place(tx, cluster); err != nil {
			return err
		}
		if out, err = Extensions.Lookup(tx, key(cluster, ExtensionName)); err != nil {
			return err
		}
		if created = out == nil; created {
			out = newExtension(cluster, want)
			return Extensions.Insert(tx, out)
		}
		if !out.Deleting.IsZero() {
			return fault.New(fault.Conflict, "Conflict", "The extension is being removed.").At(want.ID).WithFix("wait until it is gone").After(10 * time.Second)
		}
		out.Spec = want
		return Extensions.Put(tx, out)
	})
	return out, created, err
}

func newExtension(cluster arm.ID, want Extension) *ExtensionObject {
	return &ExtensionObject{Meta: store.Meta{ID: key(cluster, ExtensionName), Finalizers: []string{extensionFinalizer}}, Spec: want}
}

// wantExtension makes the extension be wanted, in the transaction that makes a
// cluster's connection.
func wantExtension(tx *store.Tx, cluster arm.ID) error {
	o, err := Extensions.Lookup(tx, key(cluster, ExtensionName))
	switch {
	case err != nil:
		return err
	case o == nil:
		return Extensions.Insert(tx, newExtension(cluster, Extension{ID: extensionID(cluster), Cluster: cluster.String(), Train: "prod", AutoUpgrade: true}))
	case !o.Deleting.IsZero():
		return extensionGoing(o)
	}
	return nil
}

func extensionGoing(o *ExtensionObject) error {
	return fault.New(fault.Conflict, "Conflict", "The extension %s of the cluster is being removed.", ExtensionName).At(o.Spec.ID).WithFix("wait until it is gone").After(10 * time.Second)
}

// ExtensionOf returns an extension of a cluster.
func (s *Service) ExtensionOf(ctx context.Context, cluster arm.ID, name string) (*ExtensionObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionExtensionRead, Resource: cluster.String() + "/providers/" + ExtensionType + "/" + name}); err != nil {
		return nil, err
	}
	o, err := Extensions.Lookup(s.cfg.Store.View(ctx), key(cluster, name))
	if err == nil && o == nil {
		err = extensionNotFound(cluster, name)
	}
	return o, err
}

// ExtensionsOf returns the extensions of a cluster.
func (s *Service) ExtensionsOf(ctx context.Context, cluster arm.ID) ([]*ExtensionObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionExtensionRead, Resource: cluster.String()}); err != nil {
		return nil, err
	}
	return Extensions.List(s.cfg.Store.View(ctx), strings.ToLower(cluster.StoreKey())+"/")
}

// DeleteExtension removes the extension. All connections of the cluster go with it,
// so it is refused while there are any, with their names; with disconnect they are
// deleted, and the extension after them.
func (s *Service) DeleteExtension(ctx context.Context, cluster arm.ID, name string, disconnect bool) (existed bool, err error) {
	op := access.Op{Action: actionExtensionDelete, Resource: cluster.String() + "/providers/" + ExtensionType + "/" + name}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := Extensions.Lookup(tx, key(cluster, name))
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		all, err := Connections.List(tx, strings.ToLower(cluster.StoreKey())+"/")
		if err != nil {
			return err
		}
		var names []string
		for _, c := range all {
			names = append(names, c.Spec.Name())
		}
		if len(names) > 0 && !disconnect {
			slices.Sort(names)
			return fault.New(fault.Conflict, "ExtensionInUse", "Without the extension the connections %s of the cluster would end.", strings.Join(names, ", ")).
				At(o.Spec.ID).WithFix("delete them first, or with the extension: keyfleet extension delete sc-extension --cluster %s --disconnect", cluster.Name())
		}
		for _, c := range all {
			if err := Connections.Delete(tx, c.ID); err != nil {
				return err
			}
		}
		return Extensions.Delete(tx, o.ID)
	})
	return existed, err
}

// extensionWork is what a manager has to do about the extensions, by cluster. One
// that is being removed waits for the connections.
func (s *Service) extensionWork(tx *store.Tx, connected map[string][]wire.ConnectionWork) (map[string][]wire.ExtensionWork, error) {
	all, err := Extensions.List(tx, "")
	if err != nil {
		return nil, err
	}
	out := map[string][]wire.ExtensionWork{}
	for _, o := range all {
		cluster := strings.ToLower(o.Spec.Cluster)
		w := wire.ExtensionWork{Name: ExtensionName, Revision: shortHash(o.UID + o.Changed.String()), Settings: o.Spec.Settings, Version: o.Spec.Version, Remove: !o.Deleting.IsZero()}
		if w.Remove && len(connected[cluster]) > 0 {
			w.Remove = false
		}
		out[cluster] = append(out[cluster], w)
	}
	return out, nil
}

// ReportExtension takes what a manager saw of the release. Gone ends a removal.
func (s *Service) ReportExtension(ctx context.Context, cluster arm.ID, name string, r wire.ExtensionReport) error {
	op := access.Op{Action: actionManage, Resource: cluster.String()}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	if err := checkReport(wire.ConnectionReport{Problem: r.Problem}); err != nil {
		return err
	}
	if strings.EqualFold(name, wire.AddonRelease) {
		return s.reportAddon(ctx, cluster, r)
	}
	return s.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		o, err := Extensions.Lookup(tx, key(cluster, name))
		switch {
		case err != nil:
			return err
		case o == nil:
			return extensionNotFound(cluster, name)
		case r.Gone && !o.Deleting.IsZero():
			return Extensions.RemoveFinalizer(tx, o.ID, extensionFinalizer)
		}
		o.Status = ExtensionStatus{Report: r, Time: s.cfg.Now().UTC()}
		return Extensions.PutStatus(tx, o)
	})
}

// ExtensionState is the provisioning state of an extension, by what was reported.
func ExtensionState(o *ExtensionObject) string {
	r := o.Status.Report
	switch {
	case !o.Deleting.IsZero():
		return "Deleting"
	case r.Revision == "":
		return "Creating"
	case r.Revision != shortHash(o.UID+o.Changed.String()):
		return "Updating"
	case r.Problem != nil:
		return "Failed"
	case r.Release == nil || r.Release.Status != "deployed":
		return "Creating"
	}
	return "Succeeded"
}
