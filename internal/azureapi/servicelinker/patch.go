package servicelinker

import (
	"strings"

	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
)

// patch changes a connection by what is different, and goes on as put does. A secret
// that was given earlier stays, though nobody can read it back.
func (s surface) patch(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Connections.Connection(r.Context(), linkerID(r))
	if err != nil {
		return nil, err
	}
	base, err := s.toWire(r, o)
	if err != nil {
		return nil, err
	}
	var body wire.Linker
	if err := patched(r, asGiven(base, o), &body); err != nil {
		return nil, err
	}
	want, err := s.fromWire(linkerID(r), body.Properties)
	if err != nil {
		return nil, err
	}
	want.Of = o
	want.FailIfBusy = strings.EqualFold(r.Query("ifBusy"), "fail")
	return s.change(r, want)
}

// asGiven is a connection as a PUT would have to say it: without what only the server
// says, and with a secret that was given as one whose value is not said again.
func asGiven(l wire.Linker, o *connector.Object) wire.Linker {
	p := l.Properties
	out := wire.Linker{Properties: wire.LinkerProperties{
		TargetService: p.TargetService, AuthInfo: p.AuthInfo, ClientType: p.ClientType, Scope: p.Scope, SecretStore: p.SecretStore, ConfigurationInfo: p.ConfigurationInfo,
	}}
	if o.Spec.Auth.Type == connector.Secret && o.Spec.Auth.Given != nil {
		out.Properties.AuthInfo.SecretInfo = &wire.SecretInfo{SecretType: "rawValue"}
	}
	return out
}
