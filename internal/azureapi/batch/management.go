package batch

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// encodeAccount renders an account. There are no quotas here; the numbers are
// those that a client needs to see room.
func encodeAccount(r *azureapi.Request, a *pool.Account) *batch.Account {
	host := r.Endpoints()
	return &batch.Account{
		ID: a.Spec.ID, Name: a.Spec.Name(), Type: accountType, Location: a.Spec.Location, Tags: a.Spec.Tags,
		Identity: &batch.AccountIdentity{Type: "None"},
		Properties: &batch.AccountProperties{
			AccountEndpoint:               a.Spec.Name() + "." + a.Spec.Region() + "." + host.BatchSuffix(),
			NodeManagementEndpoint:        strings.TrimPrefix(host.Node(), "https://"),
			ProvisioningState:             "Succeeded",
			PoolAllocationMode:            "BatchService",
			PublicNetworkAccess:           "Enabled",
			DedicatedCoreQuota:            unlimited,
			DedicatedCoreQuotaPerVMFamily: []struct{}{},
			PoolQuota:                     unlimited,
			Encryption:                    &batch.EncryptionSettings{KeySource: "Microsoft.Batch"},
			AllowedAuthenticationModes:    []string{"AAD"},
		},
	}
}

const unlimited = 1_000_000

// decodeAccount reads the body of an account and refuses what is not offered.
func decodeAccount(r *azureapi.Request) (*batch.AccountRequest, error) {
	var w batch.AccountRequest
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	for _, name := range []string{"autoStorage", "keyVaultReference", "networkProfile"} {
		if said(w.Properties[name]) {
			return nil, fault.New(fault.Invalid, "InvalidPropertyValue", "Accounts have no %s here.", name).At("properties." + name).WithFix("remove it")
		}
	}
	if mode := text(w.Properties["poolAllocationMode"]); mode != "" && !strings.EqualFold(mode, "BatchService") {
		return nil, fault.New(fault.Invalid, "InvalidPropertyValue", "The pool allocation mode %q is not offered.", mode).At("properties.poolAllocationMode").WithFix("write BatchService, or remove it")
	}
	var modes []string
	if raw := w.Properties["allowedAuthenticationModes"]; said(raw) && (json.Unmarshal(raw, &modes) != nil || !slices.Contains(modes, "AAD")) {
		return nil, fault.New(fault.Invalid, "InvalidPropertyValue", "Callers authenticate with tokens only (AAD).").At("properties.allowedAuthenticationModes").WithFix(`write ["AAD"], or remove it`)
	}
	return &w, nil
}

func text(raw json.RawMessage) string {
	var s string
	_ = json.Unmarshal(raw, &s) // anything but a string says nothing here
	return s
}

// putAccount creates an account as Batch does: 202 with a Location that answers
// with the account when it is there. It is there at once; an account that
// exists is answered with 200.
func (e *edge) putAccount(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	w, err := decodeAccount(r)
	if err != nil {
		return nil, err
	}
	a, created, err := fleet.PutAccount(ctx, accountID(r), w.Location, w.Tags)
	if err != nil {
		return nil, err
	}
	if !created {
		return azureapi.OK(encodeAccount(r, a)), nil
	}
	return azureapi.Accepted(location(r, a.Spec.ID+"/operationResults/"+a.UID), "1"), nil
}

func (e *edge) patchAccount(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	w, err := decodeAccount(r)
	if err != nil {
		return nil, err
	}
	a, err := fleet.PatchAccount(ctx, accountID(r), w.Tags)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(encodeAccount(r, a)), nil
}

func (e *edge) getAccount(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	a, err := fleet.GetAccount(ctx, accountID(r))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(encodeAccount(r, a)), nil
}

func (e *edge) listAccounts(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	all, err := fleet.ListAccounts(ctx, arm.ID{Subscription: r.Param("subscription"), ResourceGroup: r.Param("group")})
	if err != nil {
		return nil, err
	}
	out := arm.List[*batch.Account]{Value: []*batch.Account{}}
	for _, a := range all {
		out.Value = append(out.Value, encodeAccount(r, a))
	}
	return azureapi.OK(out), nil
}

func (e *edge) deleteAccount(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	gone, err := fleet.DeleteAccount(ctx, accountID(r))
	if err != nil {
		return nil, err
	}
	if gone {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Status(http.StatusOK), nil
}

// listKeys says that there are no keys: shared-key authentication is not offered.
func (e *edge) listKeys(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	if _, err := fleet.GetAccount(ctx, accountID(r)); err != nil {
		return nil, err
	}
	return nil, fault.New(fault.Conflict, "SharedKeyNotAllowed", "The account has no keys: callers authenticate with tokens only.").
		WithFix("use a token: az batch account login without --shared-key-auth")
}

func (e *edge) listPools(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	all, err := fleet.ListPools(ctx, accountID(r))
	if err != nil {
		return nil, err
	}
	p, err := cut(r, all, func(p *pool.Pool) string { return p.ID })
	if err != nil {
		return nil, err
	}
	v := versionOf(r.Version)
	out := arm.List[*batch.Pool]{Value: []*batch.Pool{}, NextLink: nextLink(r, p.next)}
	for _, p := range p.items {
		out.Value = append(out.Value, v.Encode(p, fleet.ETag(p)))
	}
	return azureapi.OK(out), nil
}

// poolReply answers 200 with the pool and its ETag; never 201, which clients
// of this operation take for a failure.
func (e *edge) poolReply(r *azureapi.Request, p *pool.Pool) *azureapi.Reply {
	w := versionOf(r.Version).Encode(p, e.cfg.Fleet.ETag(p))
	return azureapi.OK(w).With("ETag", w.Etag)
}

func (e *edge) getPool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	p, err := fleet.GetPool(ctx, poolID(r))
	if err != nil {
		return nil, err
	}
	return e.poolReply(r, p), nil
}

// write makes the domain's Write of a request.
func (e *edge) write(r *azureapi.Request, id arm.ID, patch bool) (pool.Write, error) {
	body, err := r.Raw()
	if err != nil {
		return pool.Write{}, err
	}
	v := versionOf(r.Version)
	return pool.Write{
		ID: id, IfMatch: etagOf(r.Header.Get("If-Match")), IfNoneMatch: etagOf(r.Header.Get("If-None-Match")), MustExist: patch, Strict: strict(r),
		Change: func(old *pool.Spec) (pool.Spec, []pool.Problem, error) { return v.Decode(body, old, patch) },
	}, nil
}

func (e *edge) putPool(r *azureapi.Request) (*azureapi.Reply, error) { return e.changePool(r, false) }

func (e *edge) patchPool(r *azureapi.Request) (*azureapi.Reply, error) { return e.changePool(r, true) }

func (e *edge) changePool(r *azureapi.Request, patch bool) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	w, err := e.write(r, poolID(r), patch)
	if err != nil {
		return nil, err
	}
	out, err := fleet.Put(ctx, w)
	if err != nil {
		return nil, err
	}
	return warn(e.poolReply(r, out.Pool), out.Warnings), nil
}

// deletePool answers 202 with a Location to poll; 204 where there was no pool.
func (e *edge) deletePool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id := poolID(r)
	uid, err := fleet.DeletePool(ctx, id, etagOf(r.Header.Get("If-Match")))
	if err != nil {
		return nil, err
	}
	if uid == "" {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Accepted(location(r, accountID(r).String()+"/poolOperationResults/delete-"+id.Name()+"-"+uid), "1"), nil
}

// poolOperation answers the poller of a deletion: 202 until the pool is gone.
func (e *edge) poolOperation(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	name, ok := strings.CutPrefix(r.Param("operation"), "delete-")
	i := strings.LastIndexByte(name, '-')
	if !ok || i < 1 {
		return nil, fault.New(fault.NotFound, "ResourceNotFound", "There is no such operation.")
	}
	gone, err := fleet.PoolGone(ctx, poolIn(accountID(r), name[:i]), strings.ToLower(name[i+1:]))
	if err != nil {
		return nil, err
	}
	if gone {
		return azureapi.Status(http.StatusNoContent), nil
	}
	return azureapi.Accepted(location(r, r.Path()), "1"), nil
}

func (e *edge) stopResize(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	p, err := fleet.StopResize(ctx, poolID(r), etagOf(r.Header.Get("If-Match")))
	if err != nil {
		return nil, err
	}
	return e.poolReply(r, p), nil
}

// disableAutoScale answers 200: a pool here never has autoscale on.
func (e *edge) disableAutoScale(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	p, err := fleet.DisableAutoScale(ctx, poolID(r))
	if err != nil {
		return nil, err
	}
	return e.poolReply(r, p), nil
}
