package resources

import (
	"net/http"
	"strconv"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
)

func (s surface) adminRoutes() []azureapi.Route {
	const (
		apps    = "/keyfleet/v1/applications"
		app     = apps + "/{application}"
		secrets = app + "/secrets"
		read    = "Keyfleet/applications/read"
		write   = "Keyfleet/applications/write"
	)
	return []azureapi.Route{
		row(http.MethodGet, apps, nil, read, s.listApplications),
		row(http.MethodPost, apps, nil, write, s.createApplication),
		row(http.MethodGet, app, nil, read, s.getApplication),
		row(http.MethodDelete, app, nil, "Keyfleet/applications/delete", s.deleteApplication),
		row(http.MethodPost, secrets, nil, write, s.addSecret),
		row(http.MethodDelete, secrets+"/{key}", nil, write, s.removeSecret),
		row(http.MethodPost, "/keyfleet/v1/subscriptions", nil, "Keyfleet/subscriptions/write", s.createSubscription),
		row(http.MethodGet, "/keyfleet/v1/audit", nil, "Keyfleet/audit/read", s.searchAudit),
	}
}

func (s surface) toApplication(o *identity.ApplicationObject) arm.Application {
	a := arm.Application{
		AppID: o.Spec.ClientID, ID: o.Spec.ObjectID, DisplayName: o.Spec.Name, TenantID: s.Identity.TenantID(),
		Secrets: make([]arm.ApplicationSecret, 0, len(o.Spec.Secrets)),
	}
	for _, c := range o.Spec.Secrets {
		a.Secrets = append(a.Secrets, toSecret(c))
	}
	return a
}

func toSecret(c identity.ClientSecret) arm.ApplicationSecret {
	return arm.ApplicationSecret{KeyID: c.ID, Hint: c.Hint, Created: c.Created, Expires: c.Expires}
}

func (s surface) listApplications(r *azureapi.Request) (*azureapi.Reply, error) {
	all, err := s.Identity.ListApplications(r.Context())
	if err != nil {
		return nil, err
	}
	return list(all, s.toApplication), nil
}

func (s surface) createApplication(r *azureapi.Request) (*azureapi.Reply, error) {
	var body arm.NewApplication
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	if err := inFuture(body.Expires); err != nil {
		return nil, err
	}
	o, secret, err := s.Identity.CreateApplication(r.Context(), identity.NewApplication{Name: body.DisplayName, ClientID: body.AppID, Expires: body.Expires})
	if err != nil {
		return nil, err
	}
	return created(true, arm.CreatedApplication{Application: s.toApplication(o), Secret: secret.Reveal()}).With("Cache-Control", "no-store"), nil
}

func inFuture(t time.Time) error {
	if !t.IsZero() && time.Until(t) <= 0 {
		return fault.New(fault.Invalid, "InvalidEndDateTime", "The secret would have expired at %s already.", t.UTC().Format(time.RFC3339)).At("endDateTime")
	}
	return nil
}

func (s surface) getApplication(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Identity.Application(r.Context(), r.Param("application"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(s.toApplication(o)), nil
}

func (s surface) deleteApplication(r *azureapi.Request) (*azureapi.Reply, error) {
	existed, err := s.Identity.DeleteApplication(r.Context(), r.Param("application"))
	if err != nil {
		return nil, err
	}
	return deleted(existed), nil
}

func (s surface) addSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	var body arm.NewSecret
	if r.ContentLength != 0 { // the body may be left out
		if err := r.Decode(&body); err != nil {
			return nil, err
		}
	}
	if err := inFuture(body.Expires); err != nil {
		return nil, err
	}
	stored, secret, err := s.Identity.AddSecret(r.Context(), r.Param("application"), body.Expires)
	if err != nil {
		return nil, err
	}
	return created(true, arm.CreatedSecret{ApplicationSecret: toSecret(stored), Secret: secret.Reveal()}).With("Cache-Control", "no-store"), nil
}

func (s surface) removeSecret(r *azureapi.Request) (*azureapi.Reply, error) {
	if err := s.Identity.RemoveSecret(r.Context(), r.Param("application"), r.Param("key")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}

func (s surface) createSubscription(r *azureapi.Request) (*azureapi.Reply, error) {
	var body arm.NewSubscription
	if err := r.Decode(&body); err != nil {
		return nil, err
	}
	o, isNew, err := s.Subscriptions.Create(r.Context(), body.SubscriptionID, body.DisplayName)
	if err != nil {
		return nil, err
	}
	return created(isNew, toSubscription(o)), nil
}

func (s surface) searchAudit(r *azureapi.Request) (*azureapi.Reply, error) {
	q := audit.Query{
		Principal: r.Query("principal"), Action: r.Query("action"), Resource: r.Query("resource"),
		Outcome: r.Query("outcome"), RequestID: r.Query("request"),
	}
	for name, t := range map[string]*time.Time{"since": &q.Since, "until": &q.Until} {
		if v := r.Query(name); v != "" {
			parsed, err := time.Parse(time.RFC3339, v)
			if err != nil {
				return nil, fault.New(fault.Invalid, "InvalidQueryParameterValue", "'%.64s' is not a time.", v).At(name).WithFix("write it as 2026-11-21T08:00:00Z")
			}
			*t = parsed
		}
	}
	if v := r.Query("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > 1000 {
			return nil, fault.New(fault.Invalid, "InvalidQueryParameterValue", "'%.64s' is not a number from 1 to 1000.", v).At("limit")
		}
		q.Limit = n
	}
	entries, err := s.Audit.Search(r.Context(), q)
	if err != nil {
		return nil, err
	}
	return list(entries, func(e audit.Entry) arm.AuditEntry {
		return arm.AuditEntry{
			Seq: e.Seq, Time: e.Record.Time, Outcome: e.Record.Outcome, Reason: e.Record.Reason, PrincipalKind: string(e.Record.Kind),
			ObjectID: e.Record.ObjectID, ClientID: e.Record.ClientID, Name: e.Record.Name, Action: e.Record.Action, Resource: e.Record.Resource,
			Detail: e.Record.Detail, RequestID: e.Record.RequestID, CorrelationID: e.Record.CorrelationID, RemoteAddr: e.Record.RemoteAddr, Hash: e.Hash,
		}
	}), nil
}
