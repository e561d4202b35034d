// Package access decides who may do what, and sees to it that every decision
// is on record before it has an effect.
//
// Idea: every domain operation's first line is a call of [Gate.Read] or
// [Gate.Change]. The gate takes the caller from the context, decides, and
// records. For a change the record is written in the same transaction as the
// change; for a read it is on disk before the call returns, so a secret never
// leaves unrecorded. There is no other way in: controllers act as a named
// system principal through the same calls.
//
// Invariant: default deny. No caller, an unknown action, a failing audit sink or
// an unreadable policy all mean "no". A grant never exceeds the granter.
//
// Consequence for the operator: whatever happened has one record with caller,
// action, resource, outcome and request id; whatever has no record did not happen.
package access

import (
	"context"
	"time"

	"keyfleet.dev/keyfleet/internal/store"
)

// PrincipalKind is the sort of a caller.
type PrincipalKind string

// The kinds of principals.
const (
	Application     PrincipalKind = "Application"     // a client with a secret
	ManagedIdentity PrincipalKind = "ManagedIdentity" // a token that a pool's node got
	Node            PrincipalKind = "Node"            // an agent, by its client certificate
	System          PrincipalKind = "System"          // a controller of this server
)

// Principal is an authenticated caller.
type Principal struct {
	Kind     PrincipalKind
	Tenant   string // tenant id; empty for Node and System
	ObjectID string // the oid claim: what role assignments and access policies name
	ClientID string // the appid claim
	Name     string // display name; for System the controller's name
	Pool     string // for Node: the pool's store id
	Node     string // for Node: the node's id
}

// SystemPrincipal is the principal of a controller.
func SystemPrincipal(name string) Principal {
	return Principal{Kind: System, ObjectID: "system:" + name, Name: name}
}

// Call is what the gate knows of the request besides its principal.
type Call struct {
	Principal     Principal
	RequestID     string
	CorrelationID string
	RemoteAddr    string
}

type callKey struct{}

// With puts the call into the context; the edge does this once a request.
func With(ctx context.Context, c Call) context.Context { return context.WithValue(ctx, callKey{}, c) }

// From returns the call of the context; ok is false where there is none.
func From(ctx context.Context) (Call, bool) { c, ok := ctx.Value(callKey{}).(Call); return c, ok }

// AsSystem returns a context that acts as the named controller.
func AsSystem(ctx context.Context, name string) context.Context {
	c, _ := From(ctx)
	c.Principal = SystemPrincipal(name)
	return With(ctx, c)
}

// Op says what the caller is about to do.
//
// With Policies nil the decision is by role assignments: Action is an Azure
// action such as "Microsoft.Batch/batchAccounts/pools/write" and Resource the
// ARM id it acts on. With Policies not nil it is by a vault's access policies:
// Action is "secrets/get", "certificates/create" and so on, and Resource the
// object's URL path with the vault's name ("prod1/secrets/web").
type Op struct {
	Action   string
	Resource string
	Policies []Policy
	Detail   string // further words for the record; no secret
}

// Policy is one entry of a vault's access policies. Permissions are lower case; "all" means every one.
type Policy struct {
	Tenant       string   `json:"tenantId"`
	ObjectID     string   `json:"objectId"`
	ClientID     string   `json:"applicationId,omitempty"` // if set, the caller's client id must match too
	Secrets      []string `json:"secrets,omitempty"`
	Certificates []string `json:"certificates,omitempty"`
	Keys         []string `json:"keys,omitempty"`
	Storage      []string `json:"storage,omitempty"`
}

// Record is one audit record.
type Record struct {
	Time          time.Time     `json:"time"`
	Outcome       string        `json:"outcome"` // "allowed", "denied"
	Reason        string        `json:"reason,omitempty"`
	Kind          PrincipalKind `json:"kind,omitempty"`
	ObjectID      string        `json:"objectId,omitempty"`
	ClientID      string        `json:"clientId,omitempty"`
	Name          string        `json:"name,omitempty"`
	Action        string        `json:"action"`
	Resource      string        `json:"resource"`
	Detail        string        `json:"detail,omitempty"`
	RequestID     string        `json:"requestId,omitempty"`
	CorrelationID string        `json:"correlationId,omitempty"`
	RemoteAddr    string        `json:"remoteAddr,omitempty"`
}

// Recorder keeps audit records; package audit has the one of the server.
type Recorder interface {
	// Append makes the record durable before it returns.
	Append(ctx context.Context, r Record) error
	// InTx writes the record as part of tx.
	InTx(tx *store.Tx, r Record) error
}

// Config is what a Gate needs.
type Config struct {
	Store    *store.Store     // where role assignments are
	Recorder Recorder         // must be set
	Now      func() time.Time // nil: time.Now

	// Principal fails if no principal has the object id (fault.NotFound), and
	// reads what it decides on through tx, so that a grant to somebody who is
	// being removed does not commit. Nil: not checked. Package identity has it.
	Principal func(tx *store.Tx, objectID string) error
}

// Gate decides and records. Make it with [NewGate].
type Gate struct{ cfg Config }

// NewGate returns a gate.
func NewGate(cfg Config) *Gate {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Gate{cfg: cfg}
}

// Can decides without recording: for what-if answers, never before an effect.
// It returns nil, a fault.Unauthenticated or fault.Denied error, or a failure to decide.
func (g *Gate) Can(ctx context.Context, op Op) error {
	c, _ := From(ctx)
	return g.decide(ctx, c.Principal, op)
}

// CanAs is Can for another principal.
func (g *Gate) CanAs(ctx context.Context, p Principal, op Op) error { return g.decide(ctx, p, op) }

// Read decides, and returns nil only after the record is durable. A refusal is recorded too.
func (g *Gate) Read(ctx context.Context, op Op) error {
	c, _ := From(ctx)
	err := g.decide(ctx, c.Principal, op)
	if rerr := g.cfg.Recorder.Append(ctx, g.record(c, op, err)); rerr != nil && err == nil {
		return rerr
	}
	return err
}

// Change decides, then runs fn in a transaction of s that also holds the
// record. A refusal is recorded and fn is not run. If fn fails, nothing is
// written; such an attempt changed nothing and leaves no record.
func (g *Gate) Change(ctx context.Context, s *store.Store, op Op, fn func(tx *store.Tx) error) error {
	c, _ := From(ctx)
	if err := g.decide(ctx, c.Principal, op); err != nil {
		_ = g.cfg.Recorder.Append(ctx, g.record(c, op, err))
		return err
	}
	return s.Update(ctx, func(tx *store.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		return g.cfg.Recorder.InTx(tx, g.record(c, op, nil))
	})
}

// Record keeps a record of a decision that was made elsewhere: a client that
// proved who it is and got a token, or did not (err). It returns err, or the
// recorder's failure: then the caller must not go on. p is who the record names.
func (g *Gate) Record(ctx context.Context, p Principal, op Op, err error) error {
	c, _ := From(ctx)
	c.Principal = p
	if rerr := g.cfg.Recorder.Append(ctx, g.record(c, op, err)); rerr != nil && err == nil {
		return rerr
	}
	return err
}

func (g *Gate) record(c Call, op Op, err error) Record {
	r := Record{
		Time: g.cfg.Now().UTC(), Outcome: "allowed", Kind: c.Principal.Kind, ObjectID: c.Principal.ObjectID,
		ClientID: c.Principal.ClientID, Name: c.Principal.Name, Action: op.Action, Resource: op.Resource,
		Detail: op.Detail, RequestID: c.RequestID, CorrelationID: c.CorrelationID, RemoteAddr: c.RemoteAddr,
	}
	if err != nil {
		r.Outcome, r.Reason = "denied", faultMessage(err)
	}
	return r
}
