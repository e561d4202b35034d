package servicelinker

import (
	"maps"
	"slices"
	"strings"

	wire "keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/connector"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// generate answers like configurations, with the names that the body asks for. It
// stores nothing: names that are to stay belong into the connection.
func (s surface) generate(r *azureapi.Request) (*azureapi.Reply, error) {
	raw, err := r.Raw()
	if err != nil {
		return nil, err
	}
	var ask wire.GenerateConfigurations
	if len(strings.TrimSpace(string(raw))) > 0 {
		if err := jsonstrict.Decode(raw, &ask); err != nil {
			return nil, err
		}
	}
	if ask.Action != "" && !strings.EqualFold(ask.Action, "enable") {
		return nil, fault.New(fault.Invalid, "InvalidArgument", "The action '%.60s' is not supported: a connection always has its variables.", ask.Action).At("action").WithFix("enable, or leave it out")
	}
	env, err := s.Connections.Generate(r.Context(), linkerID(r), ask.CustomizedKeys)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(ask.AdditionalConfigurations)) {
		if slices.ContainsFunc(env, func(v connector.Variable) bool { return v.Name == name }) {
			return nil, fault.New(fault.Invalid, "InvalidArgument", "The connection has a variable %.100s already.", name).At("additionalConfigurations." + name).WithFix("take another name, or rename the connection's with customizedKeys")
		}
		env = append(env, connector.Variable{Name: name, Value: ask.AdditionalConfigurations[name]})
	}
	return azureapi.OK(configurationsToWire(env)), nil
}

func configurationsToWire(env []connector.Variable) wire.SourceConfigurations {
	out := wire.SourceConfigurations{Configurations: []wire.SourceConfiguration{}}
	for _, v := range env {
		about := ""
		if v.Secret {
			about = "A credential: it is in the cluster's Secret and in the vault."
		}
		out.Configurations = append(out.Configurations, wire.SourceConfiguration{Name: v.Name, Value: v.Value, ConfigType: "Default", Description: about})
	}
	return out
}
