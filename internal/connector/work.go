package connector

import (
	"context"
	"fmt"
	"reflect"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Work returns, by the keys of clusters, the connections that a manager brings
// there, and the extensions that it installs. It decides nothing: the list of
// clusters that it goes with has decided.
func (s *Service) Work(ctx context.Context) (map[string][]wire.ConnectionWork, map[string][]wire.ExtensionWork, error) {
	tx := s.cfg.Store.View(ctx)
	all, err := Connections.List(tx, "")
	if err != nil {
		return nil, nil, err
	}
	out, needAddon := map[string][]wire.ConnectionWork{}, map[string]bool{}
	for _, o := range all {
		cluster, err := arm.ParseID(o.Spec.Cluster)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the cluster of %s: %w", o.ID, err)
		}
		if o.Spec.Auth.Type == CSIAddOn && o.Deleting.IsZero() {
			needAddon[cluster.Key()] = true
		}
		w := wire.ConnectionWork{ID: o.Spec.ID, Revision: o.Status.Desired}
		switch {
		case !o.Deleting.IsZero() && o.Spec.Keep:
			w.Remove = wire.RemoveKeep
		case !o.Deleting.IsZero():
			w.Remove = wire.RemoveDelete
		case w.Revision == "":
			continue // there is nothing to bring yet
		}
		out[cluster.Key()] = append(out[cluster.Key()], w)
	}
	extensions, err := s.extensionWork(tx, out)
	if err != nil {
		return nil, nil, err
	}
	for cluster := range needAddon {
		extensions[cluster] = append(extensions[cluster], addonWork())
	}
	return out, extensions, nil
}

// Desired returns what a connection shall be, credentials included, to a manager.
func (s *Service) Desired(ctx context.Context, linkerID string) (wire.Desired, error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return wire.Desired{}, err
	}
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionManage, Resource: LinkerID(cluster, name)}); err != nil {
		return wire.Desired{}, err
	}
	o, err := lookup(s.cfg.Store.View(ctx), cluster, name)
	if err != nil {
		return wire.Desired{}, err
	}
	if !o.Deleting.IsZero() || o.Status.Desired == "" {
		return wire.Desired{}, fault.New(fault.Conflict, "NothingDesired", "The connection '%s' has nothing for its cluster at the moment.", o.Spec.ID)
	}
	return s.desired(ctx, o)
}

// Most that a manager may report of one connection.
const (
	maxReported   = 100
	maxReportText = 2000
)

// Report takes what a manager saw of a connection.
func (s *Service) Report(ctx context.Context, linkerID string, r wire.ConnectionReport) error {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return err
	}
	if err := checkReport(r); err != nil {
		return err
	}
	op := access.Op{Action: actionManage, Resource: LinkerID(cluster, name)}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	return s.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		if _, err := lookup(tx, cluster, name); err != nil {
			return err
		}
		o, err := reports.Lookup(tx, key(cluster, name))
		if err != nil {
			return err
		}
		if o == nil {
			return reports.Insert(tx, &store.Object[wire.ConnectionReport, struct{}]{Meta: store.Meta{ID: key(cluster, name)}, Spec: r})
		}
		if reflect.DeepEqual(o.Spec, r) {
			return nil
		}
		o.Spec = r
		return reports.Put(tx, o)
	})
}

func checkReport(r wire.ConnectionReport) error {
	text := func(p *wire.Problem) int {
		if p == nil {
			return 0
		}
		return len(p.Code) + len(p.Layer) + len(p.Object) + len(p.Message) + len(p.Raw) + len(p.Fix)
	}
	size := text(r.Problem)
	if r.Applied != nil {
		size = max(size, text(r.Applied.Problem))
		if len(r.Applied.Objects) > maxReported || len(r.Applied.Consumers) > maxReported {
			return fault.New(fault.Invalid, "InvalidReport", "The report has more than %d objects or consumers.", maxReported).At("applied")
		}
	}
	if size > 3*maxReportText {
		return fault.New(fault.Invalid, "InvalidReport", "The problem is longer than %d characters.", 3*maxReportText).At("problem")
	}
	return nil
}

// Seen is what was last reported of a connection; nil: nothing.
func (s *Service) Seen(ctx context.Context, o *Object) (*wire.Applied, error) {
	r, err := reports.Lookup(s.cfg.Store.View(ctx), o.ID)
	if err != nil || r == nil {
		return nil, err
	}
	return r.Spec.Applied, nil
}

// Operation is the state of a long operation on a connection, found by looking.
type Operation struct {
	Status  string // Accepted, Updating, Deleting, Succeeded, Failed
	Problem *wire.Problem
	Removal *Removal // of a deletion that is done
}

// Kinds of operations.
const (
	OpPut    = "put"
	OpDelete = "delete"
	OpRotate = "rotate"
)

// Operation looks how far an operation on the connection with the uid is. n is the
// number of a rotation.
func (s *Service) Operation(ctx context.Context, kind, linkerID, uid string, n int64) (Operation, error) {
	cluster, name, err := parseLinker(linkerID)
	if err != nil {
		return Operation{}, err
	}
	if err := s.cfg.Gate.Can(ctx, access.Op{Action: actionRead, Resource: LinkerID(cluster, name)}); err != nil {
		return Operation{}, err
	}
	tx := s.cfg.Store.View(ctx)
	o, err := Connections.Lookup(tx, key(cluster, name))
	if err != nil {
		return Operation{}, err
	}
	if o == nil || o.UID != uid {
		r, err := removals.Lookup(tx, strings.ToLower(uid))
		switch {
		case err != nil:
			return Operation{}, err
		case r == nil:
			return Operation{}, fault.New(fault.NotFound, "OperationNotFound", "There is no such operation, or it ended long ago.")
		case kind != OpDelete:
			return Operation{Status: "Failed", Problem: &wire.Problem{Code: "ConnectionDeleted", Layer: "keyfleet", Message: "The connection was deleted meanwhile."}}, nil
		}
		return Operation{Status: "Succeeded", Removal: &r.Spec}, nil
	}
	op := Operation{Status: o.Status.State, Problem: o.Status.Problem}
	switch {
	case kind == OpDelete:
		op.Status = "Deleting"
	case o.Status.Looked < o.Generation:
		op = Operation{Status: under(o)} // what is known is of before
	case kind == OpRotate && o.Status.Rotated >= n:
		op.Status = "Succeeded"
	case kind == OpRotate && op.Status == "Succeeded":
		op.Status = "Updating"
	}
	return op, nil
}
