package connector

import (
	"context"
	"regexp"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Dryrun is a plan that somebody asked for, as it was at that time.
type Dryrun struct {
	ID         string                         `json:"id"`         // ARM id
	Parameters servicelinker.DryrunParameters `json:"parameters"` // no secret
	Plan       Plan                           `json:"plan"`
}

// DryrunObject is a stored dry run.
type DryrunObject = store.Object[Dryrun, struct{}]

// dryruns are kept for a day; ids are "SUBSCRIPTION/GROUP/CLUSTER/NAME".
var dryruns = store.Collection[Dryrun, struct{}]{Kind: "connection-dryruns", TTL: 24 * time.Hour}

var dryrunName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}$`)

const (
	actionDryrunRead   = servicelinker.DryrunType + "/read"
	actionDryrunWrite  = servicelinker.DryrunType + "/write"
	actionDryrunDelete = servicelinker.DryrunType + "/delete"
)

// DryrunID is the resource id of a dry run on a cluster; of all of them for an empty name.
func DryrunID(cluster arm.ID, name string) string {
	return strings.TrimSuffix(cluster.String()+"/providers/"+servicelinker.DryrunType+"/"+name, "/")
}

// PutDryrun makes a plan, see [Service.Plan], and keeps it with what was asked for,
// but for secrets.
func (s *Service) PutDryrun(ctx context.Context, cluster arm.ID, name string, asked servicelinker.DryrunParameters, want Put, unclear ...error) (out *DryrunObject, created bool, err error) {
	if !dryrunName.MatchString(name) {
		return nil, false, fault.New(fault.Invalid, "InvalidResourceName", "The name '%.100s' of a dry run is not valid: 1 to 100 letters, digits, '.', '_' and '-', the first a letter or digit.", name).At("name")
	}
	op := access.Op{Action: actionDryrunWrite, Resource: DryrunID(cluster, name), Detail: want.detail()}
	if err := s.cfg.Gate.Can(ctx, op); err != nil {
		return nil, false, s.cfg.Gate.Read(ctx, op) // records the refusal
	}
	plan, err := s.Plan(ctx, want, unclear...)
	if err != nil {
		return nil, false, err
	}
	spec := Dryrun{ID: op.Resource, Parameters: s.withoutSecrets(asked, want.Target.Word, len(unclear) == 0), Plan: plan}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		if out, err = dryruns.Lookup(tx, key(cluster, name)); err != nil {
			return err
		}
		if created = out == nil; created {
			out = &DryrunObject{Meta: store.Meta{ID: key(cluster, name)}, Spec: spec}
			return dryruns.Insert(tx, out)
		}
		out.Spec = spec
		return dryruns.Put(tx, out)
	})
	return out, created, err
}

// withoutSecrets is what was asked for without what is, or in a request that was not
// understood could be, a secret; and without what only the server says.
func (s *Service) withoutSecrets(asked servicelinker.DryrunParameters, word string, understood bool) servicelinker.DryrunParameters {
	p := &asked.LinkerProperties
	p.AuthInfo.Secret = ""
	if i := p.AuthInfo.SecretInfo; i != nil {
		shown := *i
		if !understood || !strings.EqualFold(shown.SecretType, "keyVaultSecretUri") {
			shown.Value = ""
		}
		p.AuthInfo.SecretInfo = &shown
	}
	shown := map[string]string{}
	if t, err := s.cfg.Catalogue.Target(word); err == nil {
		for name, v := range p.TargetService.Values {
			if _, known := t.Values[name]; known {
				shown[name] = v
			}
		}
	}
	if p.TargetService.Values = shown; len(shown) == 0 {
		p.TargetService.Values = nil
	}
	p.ProvisioningState, p.KubernetesResourceName, p.Problem, p.Waiting, p.Credential, p.Delivered = "", nil, nil, "", nil, nil
	return asked
}

// Dryrun returns a dry run, fault.NotFound if there is none.
func (s *Service) Dryrun(ctx context.Context, cluster arm.ID, name string) (*DryrunObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionDryrunRead, Resource: DryrunID(cluster, name)}); err != nil {
		return nil, err
	}
	o, err := dryruns.Lookup(s.cfg.Store.View(ctx), key(cluster, name))
	if err == nil && o == nil {
		err = fault.New(fault.NotFound, "ResourceNotFound", "The dry run '%.100s' of the cluster '%s' was not found; it is kept for a day.", name, cluster.Name())
	}
	return o, err
}

// ListDryruns returns the dry runs of a cluster.
func (s *Service) ListDryruns(ctx context.Context, cluster arm.ID) ([]*DryrunObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionDryrunRead, Resource: DryrunID(cluster, "")}); err != nil {
		return nil, err
	}
	return dryruns.List(s.cfg.Store.View(ctx), strings.ToLower(cluster.StoreKey())+"/")
}

// DeleteDryrun forgets a dry run, and reports whether there was one.
func (s *Service) DeleteDryrun(ctx context.Context, cluster arm.ID, name string) (existed bool, err error) {
	op := access.Op{Action: actionDryrunDelete, Resource: DryrunID(cluster, name)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := dryruns.Lookup(tx, key(cluster, name))
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		return dryruns.Delete(tx, o.ID)
	})
	return existed, err
}
