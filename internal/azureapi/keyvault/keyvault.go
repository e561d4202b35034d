// Package keyvault is the Key Vault surface of the REST edge: the vaults of
// Microsoft.KeyVault on the management host, and what is in them on
// NAME.vault.DOMAIN.
//
// Idea: handlers translate. They read a wire body (package api/keyvault), call
// one operation of the capability (package vault), and write the answer; what is
// allowed, what is valid and what is stored is decided there. All data-plane
// api-versions share one translation, as do all management ones, until they differ.
//
//	wire body -> strict decoding -> vault.Change / vault.Policy -> vault.Vaults -> bundle
//
// Invariant: a policy that is read and written back unchanged stays the same;
// ids in answers carry the host by which the client called, so a client of an
// alias stays on it; a list's nextLink is absolute.
//
// Consequence for the operator: a wrong body is answered with the path of the
// member, what is wrong and what to write instead; the codes are Key Vault's own.
package keyvault

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"strconv"
	"time"

	wire "keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/vault"
)

// Config is what the surface needs.
type Config struct {
	Vaults *vault.Vaults // required
	Clock  *vault.Clock  // required
}

// Versions of the data plane that clients ask for.
var dataVersions = []string{"2016-10-01", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.6-preview.2", "2025-07-01", "2026-04-01"}

// Versions of the management plane. From 2026-02-01 on Azure's default for new
// vaults is access by role assignments, which is not offered; so that is not here.
var armVersions = []string{
	"2016-10-01", "2018-02-14", "2019-09-01", "2021-10-01", "2022-07-01", "2022-11-01", "2023-02-01", "2023-07-01", "2024-11-01", "2025-05-01",
}

type surface struct {
	vaults *vault.Vaults
	clock  *vault.Clock
}

type handler func(r *azureapi.Request) (*azureapi.Reply, error)

// Routes is the route table of the surface.
func Routes(cfg Config) []azureapi.Route {
	s := surface{cfg.Vaults, cfg.Clock}
	return append(append(s.management(), s.own()...), append(s.secrets(), s.certificates()...)...)
}

func (s surface) management() []azureapi.Route {
	row := func(method, path, action string, h handler) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: "/subscriptions/{subscription}" + path, Versions: armVersions, Action: action, Handle: h}
	}
	const (
		inGroup = "/resourcegroups/{group}/providers/microsoft.keyvault"
		inSub   = "/providers/microsoft.keyvault"
		one     = inGroup + "/vaults/{name}"
		deleted = inSub + "/locations/{location}/deletedvaults/{name}"
	)
	return []azureapi.Route{
		row(http.MethodPut, one, "Microsoft.KeyVault/vaults/write", s.putVault),
		row(http.MethodPatch, one, "Microsoft.KeyVault/vaults/write", s.patchVault),
		row(http.MethodGet, one, "Microsoft.KeyVault/vaults/read", s.getVault),
		row(http.MethodDelete, one, "Microsoft.KeyVault/vaults/delete", s.deleteVault),
		row(http.MethodPut, one+"/accesspolicies/{operation}", "Microsoft.KeyVault/vaults/write", s.putPolicies),
		row(http.MethodGet, inGroup+"/vaults", "Microsoft.KeyVault/vaults/read", s.listVaults),
		row(http.MethodGet, inSub+"/vaults", "Microsoft.KeyVault/vaults/read", s.listVaults),
		row(http.MethodGet, inGroup+"/managedhsms", "Microsoft.KeyVault/vaults/read", s.listHSMs),
		row(http.MethodGet, inSub+"/managedhsms", "Microsoft.KeyVault/vaults/read", s.listHSMs),
		row(http.MethodGet, inSub+"/deletedmanagedhsms", "Microsoft.KeyVault/vaults/read", s.listHSMs),
		row(http.MethodGet, inSub+"/deletedvaults", "Microsoft.KeyVault/deletedVaults/read", s.listDeletedVaults),
		row(http.MethodGet, deleted, "Microsoft.KeyVault/deletedVaults/read", s.getDeletedVault),
		row(http.MethodPost, deleted+"/purge", "Microsoft.KeyVault/locations/deletedVaults/purge/action", s.purgeVault),
		row(http.MethodGet, inSub+"/locations/{location}/operationresults/{name}", "Microsoft.KeyVault/deletedVaults/read", s.purgeResult),
		row(http.MethodPost, inSub+"/checknameavailability", "Microsoft.KeyVault/checkNameAvailability/read", s.checkName),
	}
}

// own are Keyfleet's own operations.
func (s surface) own() []azureapi.Route {
	row := func(method, path, action string, h handler) azureapi.Route {
		return azureapi.Route{Surface: azureapi.ARM, Method: method, Path: "/keyfleet/v1" + path, Action: action, Handle: h}
	}
	return []azureapi.Route{
		row(http.MethodGet, "/vaults/{vault}/certificates/{name}", "certificates/get", s.renewal),
		row(http.MethodPost, "/vaults/{vault}/certificates/{name}/renew", "certificates/create", s.renew),
		row(http.MethodGet, "/dev/clock", "Keyfleet/dev/clock/read", s.getClock),
		row(http.MethodPost, "/dev/clock", "Keyfleet/dev/clock/advance/action", s.advanceClock),
	}
}

func data(method, path, action string, h handler) azureapi.Route {
	return azureapi.Route{Surface: azureapi.Vault, Method: method, Path: path, Versions: dataVersions, Action: action, Handle: h}
}

func (s surface) secrets() []azureapi.Route {
	return []azureapi.Route{
		data(http.MethodGet, "/secrets", "secrets/list", s.listSecrets),
		data(http.MethodPut, "/secrets/{name}", "secrets/set", s.setSecret),
		data(http.MethodGet, "/secrets/{name}", "secrets/get", s.getSecret),
		data(http.MethodPatch, "/secrets/{name}", "secrets/set", s.updateSecret),
		data(http.MethodDelete, "/secrets/{name}", "secrets/delete", s.deleteSecret),
		data(http.MethodGet, "/secrets/{name}/versions", "secrets/list", s.listSecretVersions),
		data(http.MethodGet, "/secrets/{name}/{version}", "secrets/get", s.getSecret),
		data(http.MethodPatch, "/secrets/{name}/{version}", "secrets/set", s.updateSecret),
		data(http.MethodGet, "/deletedsecrets", "secrets/list", s.listDeletedSecrets),
		data(http.MethodGet, "/deletedsecrets/{name}", "secrets/get", s.getDeletedSecret),
		data(http.MethodDelete, "/deletedsecrets/{name}", "secrets/purge", s.purgeSecret),
		data(http.MethodPost, "/deletedsecrets/{name}/recover", "secrets/recover", s.recoverSecret),
	}
}

func (s surface) certificates() []azureapi.Route {
	const one = "/certificates/{name}"
	return []azureapi.Route{
		data(http.MethodGet, "/certificates", "certificates/list", s.listCertificates),
		data(http.MethodGet, "/certificates/contacts", "certificates/managecontacts", s.getContacts),
		data(http.MethodPut, "/certificates/contacts", "certificates/managecontacts", s.setContacts),
		data(http.MethodDelete, "/certificates/contacts", "certificates/managecontacts", s.deleteContacts),
		data(http.MethodGet, "/certificates/issuers", "certificates/listissuers", s.listIssuers),
		data(http.MethodGet, "/certificates/issuers/{name}", "certificates/getissuers", s.getIssuer),
		data(http.MethodGet, one, "certificates/get", s.getCertificate),
		data(http.MethodPatch, one, "certificates/update", s.updateCertificate),
		data(http.MethodDelete, one, "certificates/delete", s.deleteCertificate),
		data(http.MethodPost, one+"/create", "certificates/create", s.createCertificate),
		data(http.MethodGet, one+"/versions", "certificates/list", s.listCertificateVersions),
		data(http.MethodGet, one+"/policy", "certificates/get", s.getPolicy),
		data(http.MethodPatch, one+"/policy", "certificates/update", s.updatePolicy),
		data(http.MethodGet, one+"/pending", "certificates/get", s.getPending),
		data(http.MethodPatch, one+"/pending", "certificates/update", s.updatePending),
		data(http.MethodDelete, one+"/pending", "certificates/update", s.deletePending),
		data(http.MethodGet, one+"/{version}", "certificates/get", s.getCertificate),
		data(http.MethodPatch, one+"/{version}", "certificates/update", s.updateCertificate),
		data(http.MethodGet, "/deletedcertificates", "certificates/list", s.listDeletedCertificates),
		data(http.MethodGet, "/deletedcertificates/{name}", "certificates/get", s.getDeletedCertificate),
		data(http.MethodDelete, "/deletedcertificates/{name}", "certificates/purge", s.purgeCertificate),
		data(http.MethodPost, "/deletedcertificates/{name}/recover", "certificates/recover", s.recoverCertificate),
	}
}

// decode reads a body of the data plane, where a wrong body is a BadParameter.
func decode(r *azureapi.Request, v any) error {
	err := r.Decode(v)
	if f := fault.From(err); f != nil && f.Code == "InvalidRequestContent" {
		c := *f
		c.Code = "BadParameter"
		return &c
	}
	return err
}

// base is the vault's URL as the client called it.
func base(r *azureapi.Request) string { return "https://" + r.Host.Name + "." + r.Host.Suffix }

// paging reads maxresults and $skiptoken.
func paging(r *azureapi.Request) (vault.Page, error) {
	var p vault.Page
	if s := r.Query("maxresults"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 25 {
			return p, fault.New(fault.Invalid, "BadParameter", "maxresults is a number from 1 to 25, not '%s'.", s).At("maxresults")
		}
		p.Max = n
	}
	if s := r.Query("$skiptoken"); s != "" {
		b, err := base64.RawURLEncoding.DecodeString(s)
		if err != nil || len(b) > 512 {
			return p, fault.New(fault.Invalid, "BadParameter", "The $skiptoken is not one of this server.").At("$skiptoken").WithFix("start the list again, and follow nextLink as it is")
		}
		p.After = string(b)
	}
	return p, nil
}

// list is a page as clients get it; next is the cursor of the page after.
func list[T any](r *azureapi.Request, items []T, next string) *azureapi.Reply {
	out := wire.List[T]{Value: items}
	if items == nil {
		out.Value = []T{}
	}
	if next != "" {
		q := url.Values{"api-version": {r.Version}}
		for _, name := range []string{"maxresults", "includePending"} {
			if s := r.Query(name); s != "" {
				q.Set(name, s)
			}
		}
		out.NextLink = base(r) + r.Path() + "?" + q.Encode() + "&$skiptoken=" + base64.RawURLEncoding.EncodeToString([]byte(next))
	}
	return azureapi.OK(out)
}

// unix is a time as the data plane writes it; nil for none.
func unix(t time.Time) *int64 {
	if t.IsZero() {
		return nil
	}
	n := t.Unix()
	return &n
}

func fromUnix(n *int64) *time.Time {
	if n == nil {
		return nil
	}
	t := time.Unix(*n, 0).UTC()
	return &t
}

func attributes(a vault.Attributes) wire.Attributes {
	return wire.Attributes{
		Enabled: &a.Enabled, NotBefore: unix(a.NotBefore), Expires: unix(a.Expires), Created: unix(a.Created), Updated: unix(a.Updated),
		RecoveryLevel: a.RecoveryLevel, RecoverableDays: a.RecoverableDays,
	}
}

// change is what a body sets. Times beyond year 9999 cannot be written back and are refused.
func change(a *wire.Attributes, tags map[string]string, contentType *string) (vault.Change, error) {
	c := vault.Change{Tags: tags, ContentType: contentType}
	if a == nil {
		return c, nil
	}
	for path, n := range map[string]*int64{"attributes.nbf": a.NotBefore, "attributes.exp": a.Expires} {
		if n != nil && (*n < 0 || *n > 253402300799) {
			return c, fault.New(fault.Invalid, "BadParameter", "%d is not a time in seconds since 1970.", *n).At(path)
		}
	}
	c.Enabled, c.NotBefore, c.Expires = a.Enabled, fromUnix(a.NotBefore), fromUnix(a.Expires)
	return c, nil
}
