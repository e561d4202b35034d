package batch

import (
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/api/batch"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
	"keyfleet.dev/keyfleet/internal/pool"
)

// documented is the api-version that the page on extensions gives for the data
// plane. The service never had it; scripts that follow the page send it.
const documented = "2010-01-01"

// dataVersions are the api-versions of the data plane. They share one form
// until they differ for what Keyfleet answers.
func dataVersions() []string {
	return []string{documented, "2021-06-01.14.0", "2022-10-01.16.0", "2023-05-01.17.0", "2024-07-01.20.0"}
}

func (e *edge) dataRoutes() []azureapi.Route {
	const read, write, del = "Microsoft.Batch/batchAccounts/pools/read", "Microsoft.Batch/batchAccounts/pools/write", "Microsoft.Batch/batchAccounts/pools/delete"
	row := func(method, path, action string, handle func(*azureapi.Request) (*azureapi.Reply, error)) azureapi.Route {
		return azureapi.Route{Surface: azureapi.Batch, Method: method, Path: path, Versions: dataVersions(), Action: action, Handle: handle}
	}
	const one, nodes, node = "/pools/{pool}", "/pools/{pool}/nodes", "/pools/{pool}/nodes/{node}"
	return []azureapi.Route{
		row(http.MethodGet, "/pools", read, e.dataListPools),
		row(http.MethodPost, "/pools", write, e.dataAddPool),
		row(http.MethodGet, one, read, e.dataGetPool),
		row(http.MethodHead, one, read, e.dataHeadPool),
		row(http.MethodPatch, one, write, e.dataPatchPool),
		row(http.MethodDelete, one, del, e.dataDeletePool),
		row(http.MethodPost, one+"/resize", write, e.dataResize),
		row(http.MethodPost, one+"/stopresize", write, e.dataStopResize),
		row(http.MethodPost, one+"/disableautoscale", write, e.dataDisableAutoScale),
		row(http.MethodPost, one+"/enableautoscale", write, e.dataEnableAutoScale),
		row(http.MethodPost, one+"/removenodes", write, e.dataRemoveNodes),
		row(http.MethodGet, nodes, read, e.listNodes),
		row(http.MethodGet, node, read, e.getNode),
		row(http.MethodPost, node+"/reboot", write, e.orderNode("reboot")),
		row(http.MethodPost, node+"/reimage", write, e.orderNode("reimage")),
		row(http.MethodPost, node+"/enablescheduling", write, e.schedule(true)),
		row(http.MethodPost, node+"/disablescheduling", write, e.schedule(false)),
		row(http.MethodGet, node+"/extensions", read, e.listExtensions),
		row(http.MethodGet, node+"/extensions/{extension}", read, e.getExtension),
	}
}

// dataPool is the pool that a data-plane request names: the account by its
// host, the pool by its path.
func (e *edge) dataPool(r *azureapi.Request) (arm.ID, error) {
	account, err := e.cfg.Fleet.AccountAt(r.Context(), r.Host.Name, r.Host.Region)
	if err != nil {
		return arm.ID{}, err
	}
	return poolIn(account, r.Param("pool")), nil
}

// metadata is the odata.metadata member of an answer.
func metadata(r *azureapi.Request, kind string) string {
	return r.BaseURL() + "/$metadata#" + kind
}

// tagged sets the headers that the data plane answers with: an unquoted ETag,
// Last-Modified and DataServiceId.
func (e *edge) tagged(r *azureapi.Request, reply *azureapi.Reply, p *pool.Pool) *azureapi.Reply {
	return reply.With("ETag", e.cfg.Fleet.ETag(p)).
		With("Last-Modified", p.Changed.UTC().Format(http.TimeFormat)).
		With("DataServiceId", r.BaseURL()+"/pools/"+p.Spec.Name())
}

func (e *edge) dataListPools(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	account, err := fleet.AccountAt(ctx, r.Host.Name, r.Host.Region)
	if err != nil {
		return nil, err
	}
	all, err := fleet.ListPools(ctx, account)
	if err != nil {
		return nil, err
	}
	p, err := cut(r, all, func(p *pool.Pool) string { return p.ID })
	if err != nil {
		return nil, err
	}
	out := batch.DataList[*batch.DataPool]{OData: metadata(r, "pools"), Value: []*batch.DataPool{}, NextLink: nextLink(r, p.next)}
	for _, p := range p.items {
		out.Value = append(out.Value, e.encodeDataPool(r, p))
	}
	return azureapi.OK(out), nil
}

func (e *edge) dataGetPool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	p, err := fleet.GetPool(ctx, id)
	if err != nil {
		return nil, err
	}
	if etagOf(r.Header.Get("If-None-Match")) == fleet.ETag(p) {
		return e.tagged(r, azureapi.Status(http.StatusNotModified), p), nil
	}
	w := e.encodeDataPool(r, p)
	w.OData = metadata(r, "pools/@Element")
	return e.tagged(r, azureapi.OK(w), p), nil
}

func (e *edge) dataHeadPool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	p, err := fleet.GetPool(ctx, id)
	if err != nil {
		return nil, err
	}
	return e.tagged(r, azureapi.Status(http.StatusOK), p), nil
}

func (e *edge) dataAddPool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	account, err := fleet.AccountAt(ctx, r.Host.Name, r.Host.Region)
	if err != nil {
		return nil, err
	}
	var w batch.DataPool
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	if w.ID == "" {
		return nil, fault.New(fault.Invalid, "MissingRequiredProperty", "The pool has no id.").At("id").WithFix("name the pool")
	}
	out, err := fleet.Put(ctx, pool.Write{
		ID: poolIn(account, w.ID), MustBeNew: true, Strict: strict(r),
		Change: func(*pool.Spec) (pool.Spec, []pool.Problem, error) { s, ps := decodeDataPool(&w); return s, ps, nil },
	})
	if err != nil {
		return nil, dataPaths(err)
	}
	return warn(e.tagged(r, azureapi.Status(http.StatusCreated), out.Pool).With("Location", r.BaseURL()+"/pools/"+w.ID), out.Warnings), nil
}

// dataPaths turns paths of the management plane into those of the data plane,
// and details into its pairs of PropertyName and Reason.
func dataPaths(err error) error {
	e := *fault.From(err)
	replace := strings.NewReplacer(
		"properties.deploymentConfiguration.", "", "properties.scaleSettings.fixedScale.", "", "properties.", "",
		"imageReference.id", "imageReference.virtualMachineImageId", "nodeAgentSkuId", "nodeAgentSKUId",
	)
	e.Target = replace.Replace(e.Target)
	var values []fault.Detail
	for _, d := range e.Details {
		if d.Target == "" {
			values = append(values, fault.Detail{Code: d.Code, Message: replace.Replace(d.Message)})
			continue
		}
		values = append(values, fault.Detail{Code: "PropertyName", Message: replace.Replace(d.Target)}, fault.Detail{Code: "Reason", Message: d.Message})
	}
	e.Details = values
	return &e
}

func (e *edge) dataPatchPool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	var w batch.PoolPatch
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	out, err := fleet.Put(ctx, pool.Write{
		ID: id, MustExist: true, IfMatch: etagOf(r.Header.Get("If-Match")), Strict: strict(r),
		Change: func(old *pool.Spec) (pool.Spec, []pool.Problem, error) {
			s, ps := mergePatch(*old, &w)
			return s, ps, nil
		},
	})
	if err != nil {
		return nil, dataPaths(err)
	}
	return warn(e.tagged(r, azureapi.Status(http.StatusOK), out.Pool), out.Warnings), nil
}

func (e *edge) dataDeletePool(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	uid, err := fleet.DeletePool(ctx, id, etagOf(r.Header.Get("If-Match")))
	if err == nil && uid == "" {
		err = fault.New(fault.NotFound, "PoolNotFound", "The pool %q does not exist.", id.Name())
	}
	if err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusAccepted), nil
}

func (e *edge) dataResize(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	var w batch.ResizeRequest
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	p, err := fleet.Resize(ctx, pool.ResizeRequest{
		ID: id, IfMatch: etagOf(r.Header.Get("If-Match")), Dedicated: (*int)(w.TargetDedicatedNodes), LowPriority: (*int)(w.TargetLowPriorityNodes),
		Timeout: w.ResizeTimeout, Deallocation: w.NodeDeallocationOption,
	})
	if err != nil {
		return nil, dataPaths(err)
	}
	return e.tagged(r, azureapi.Status(http.StatusAccepted), p), nil
}

func (e *edge) dataStopResize(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	p, err := fleet.StopResize(ctx, id, etagOf(r.Header.Get("If-Match")))
	if err != nil {
		return nil, err
	}
	return e.tagged(r, azureapi.Status(http.StatusAccepted), p), nil
}

func (e *edge) dataDisableAutoScale(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	p, err := fleet.DisableAutoScale(ctx, id)
	if err != nil {
		return nil, err
	}
	return e.tagged(r, azureapi.Status(http.StatusOK), p), nil
}

// dataEnableAutoScale says that there is none.
func (e *edge) dataEnableAutoScale(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	if _, err := fleet.DisableAutoScale(ctx, id); err != nil { // the same right, the same 404
		return nil, err
	}
	return nil, fault.New(fault.Invalid, "InvalidPropertyValue", autoScaleReason).At("autoScaleFormula").WithFix("resize the pool: az batch pool resize")
}

func (e *edge) dataRemoveNodes(r *azureapi.Request) (*azureapi.Reply, error) {
	fleet, ctx := e.fleet(r)
	id, err := e.dataPool(r)
	if err != nil {
		return nil, err
	}
	var w batch.RemoveNodesRequest
	if err := r.Decode(&w); err != nil {
		return nil, err
	}
	p, err := fleet.RemoveNodes(ctx, id, w.NodeList, w.ResizeTimeout, etagOf(r.Header.Get("If-Match")))
	if err != nil {
		return nil, err
	}
	return e.tagged(r, azureapi.Status(http.StatusAccepted), p), nil
}

// decodeBody reads a body that may be absent.
func decodeBody(r *azureapi.Request, v any) error {
	raw, err := r.Raw()
	if err != nil || len(strings.TrimSpace(string(raw))) == 0 {
		return err
	}
	return jsonstrict.Decode(raw, v)
}
