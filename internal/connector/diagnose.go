package connector

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// A diagnosis of a connection, or of the extension of a cluster. This server does not
// reach clusters, so it asks: a question is kept in the store and listed with the work
// of managers; one of them looks in the cluster and reports what it saw, a sight. What
// that means is decided here, by findings, together with what the server knows itself.
//
//	Ask ──> question ──work──> manager ──looks──> sight ──> Diagnosis ──> findings
//	          └── 20 s without a sight ────────────────────────┘
//
// There is one question for each connection, the newest, and it goes by itself. Who
// asks while one is open joins it; who asked before another one gets the newer answer.
// Findings are made when they are asked for and not kept: they cannot be old.

const (
	questionTime = 20 * time.Second // for a manager's answer; then there are findings without one
	questionKept = 10 * time.Minute // for reading them
	mostSight    = 128 << 10        // bytes of a sight
)

// question is a question, and its answer. Ids are "SUBSCRIPTION/GROUP/CLUSTER/linkers/NAME",
// and with "extensions".
type question struct {
	wire.Question
	Cluster  string      `json:"cluster"` // ARM id
	Asked    time.Time   `json:"asked"`
	Answered time.Time   `json:"answered,omitzero"`
	Sight    *wire.Sight `json:"sight,omitempty"`
}

var questions = store.Collection[question, struct{}]{Kind: "connection-questions", TTL: questionKept}

// open reports whether a manager may still answer.
func (q question) open(now time.Time) bool {
	return q.Sight == nil && now.Sub(q.Asked) < questionTime
}

// subject is what a question is about.
type subject struct {
	id        string // ARM id
	cluster   arm.ID
	name      string
	extension bool // else it is a connection
}

// parseSubject reads the resource id of a connection, or of an extension, whether there
// is one or not.
func parseSubject(resourceID string) (subject, error) {
	on, name, ok := cutType(resourceID, ExtensionType)
	if !ok {
		cluster, name, err := parseLinker(resourceID)
		return subject{id: LinkerID(cluster, name), cluster: cluster, name: name}, err
	}
	cluster, err := arm.ParseID(on)
	if err != nil || !cluster.Is(wire.Type) || name == "" {
		return subject{}, extensionNotFound(cluster, name)
	}
	cluster.Provider, cluster.Types = "Microsoft.ContainerService", []string{"managedClusters"}
	return subject{id: cluster.String() + "/providers/" + ExtensionType + "/" + name, cluster: cluster, name: name, extension: true}, nil
}

func (of subject) key() string {
	if of.extension {
		return key(of.cluster, "extensions/"+of.name)
	}
	return key(of.cluster, "linkers/"+of.name)
}

// op is what the caller has to be allowed to do.
func (of subject) op() access.Op {
	if of.extension {
		return access.Op{Action: ExtensionType + "/diagnose/action", Resource: of.id}
	}
	return access.Op{Action: Type + "/diagnose/action", Resource: of.id}
}

// Ask asks what is wrong with a connection, or with the extension of a cluster, by its
// resource id. [Service.Diagnosis] has the answer, at the latest in 20 s.
func (s *Service) Ask(ctx context.Context, resourceID string) error {
	of, err := parseSubject(resourceID)
	if err != nil {
		return err
	}
	if err := s.cfg.Gate.Can(ctx, of.op()); err != nil {
		return s.cfg.Gate.Read(ctx, of.op()) // records the refusal
	}
	if _, err := s.cfg.Clusters.State(ctx, of.cluster); err != nil {
		return err
	}
	if of.extension && !strings.EqualFold(of.name, ExtensionName) {
		return extensionNotFound(of.cluster, of.name)
	}
	return s.cfg.Gate.Change(ctx, s.cfg.Store, of.op(), func(tx *store.Tx) error {
		q := question{Question: wire.Question{ID: of.id}, Cluster: of.cluster.String(), Asked: s.cfg.Now().UTC()}
		if !of.extension {
			o, err := lookup(tx, of.cluster, of.name)
			if err != nil {
				return err
			}
			names := o.Spec.Objects()
			q.Namespace, q.Secret, q.ServiceAccount, q.ProviderClass = o.Spec.Namespace, names.Secret, names.ServiceAccount, names.ProviderClass
		}
		old, err := questions.Lookup(tx, of.key())
		if err != nil || old != nil && old.Spec.open(s.cfg.Now()) {
			return err
		}
		if err := questions.Delete(tx, of.key()); err != nil {
			return err
		}
		return questions.Insert(tx, &store.Object[question, struct{}]{Meta: store.Meta{ID: of.key()}, Spec: q})
	})
}

// Questions returns, by the keys of clusters, what no manager has answered. It
// decides nothing, as [Service.Work].
func (s *Service) Questions(ctx context.Context) (map[string][]wire.Question, error) {
	all, err := questions.List(s.cfg.Store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	out := map[string][]wire.Question{}
	for _, o := range all {
		if o.Spec.open(s.cfg.Now()) {
			q := o.Spec.Question
			q.UID = o.UID
			cluster := strings.ToLower(o.Spec.Cluster)
			out[cluster] = append(out[cluster], q)
		}
	}
	return out, nil
}

// Answer takes what a manager saw. The first answer counts.
func (s *Service) Answer(ctx context.Context, resourceID string, sight wire.Sight) error {
	of, err := parseSubject(resourceID)
	if err != nil {
		return err
	}
	op := access.Op{Action: actionManage, Resource: of.id}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	text, err := json.Marshal(sight)
	if err != nil {
		return fmt.Errorf("encoding what was seen: %w", err)
	}
	if len(text) > mostSight {
		return fault.New(fault.Invalid, "InvalidReport", "What was seen is longer than %d bytes.", mostSight)
	}
	return s.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		o, err := questions.Lookup(tx, of.key())
		switch {
		case err != nil:
			return err
		case o == nil || o.UID != sight.UID:
			return fault.New(fault.NotFound, "QuestionNotFound", "Nobody asks that any more.")
		case o.Spec.Sight != nil:
			return nil
		}
		o.Spec.Sight, o.Spec.Answered = &sight, s.cfg.Now().UTC()
		return questions.Put(tx, o)
	})
}

// Diagnosis is the answer to what was asked last; ok is false while it is waited for.
func (s *Service) Diagnosis(ctx context.Context, resourceID string) (d wire.Diagnosis, ok bool, err error) {
	of, err := parseSubject(resourceID)
	if err != nil {
		return d, false, err
	}
	if err := s.cfg.Gate.Can(ctx, of.op()); err != nil {
		return d, false, err
	}
	q, err := questions.Lookup(s.cfg.Store.View(ctx), of.key())
	switch {
	case err != nil:
		return d, false, err
	case q == nil:
		return d, false, fault.New(fault.NotFound, "OperationNotFound", "There is no such operation, or it ended long ago.")
	case q.Spec.open(s.cfg.Now()):
		return d, false, nil
	}
	known, err := s.observe(ctx, of)
	if err != nil {
		return d, false, err
	}
	known.sight = q.Spec.Sight
	return wire.Diagnosis{ID: of.id, Asked: q.Spec.Asked, Answered: q.Spec.Answered, Findings: findings(known)}, true, nil
}

// observe gathers what the server knows itself.
func (s *Service) observe(ctx context.Context, of subject) (known observation, err error) {
	tx := s.cfg.Store.View(ctx)
	known = observation{name: of.cluster.Name(), namespaces: []string{"Microsoft.ServiceLinker", "Microsoft.KubernetesConfiguration"}}
	if known.cluster, err = s.cfg.Clusters.State(ctx, of.cluster); err != nil {
		return known, err
	}
	for _, err := range s.places(tx, of.cluster) {
		known.unregistered = append(known.unregistered, *problemOf(err))
	}
	ext, err := Extensions.Lookup(tx, key(of.cluster, ExtensionName))
	if err != nil {
		return known, err
	}
	if ext != nil {
		known.extension, known.extensionProblem = ExtensionState(ext), ext.Status.Report.Problem
	}
	if of.extension {
		return known, nil
	}
	o, err := lookup(tx, of.cluster, of.name)
	if err != nil {
		return known, err
	}
	known.connection = &o.Spec
	known.status = o.Status
	for _, err := range s.allowed(ctx, proposal{Put: Put{Connection: o.Spec}, cluster: of.cluster}) {
		known.refused = append(known.refused, *problemOf(err))
	}
	if d, err := s.desired(ctx, o); err == nil {
		known.desired = &d
	} else {
		known.undesired = problemOf(err)
	}
	r, err := reports.Lookup(tx, o.ID)
	if err == nil && r != nil && r.Spec.Applied != nil {
		known.old, known.paused = r.Spec.Applied.Consumers, r.Spec.Applied.PausedUntil
	}
	return known, err
}
