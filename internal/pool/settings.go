package pool

import (
	"encoding/json"
	"errors"
	"strings"

	"keyfleet.dev/keyfleet/api/extension"
)

const keyVaultPublisher = "Microsoft.Azure.KeyVault"

// isKeyVault reports whether the type is the Key Vault extension of either system.
func isKeyVault(publisher, typ string) bool {
	return strings.EqualFold(publisher, keyVaultPublisher) &&
		(strings.EqualFold(typ, "KeyVaultForLinux") || strings.EqualFold(typ, "KeyVaultForWindows"))
}

// ReadSettings is the SettingsReader of the extension types that Keyfleet
// understands: the Key Vault extension. Of every other type it says nothing,
// for only the handler knows its settings.
func ReadSettings(publisher, typ, _ string, settings json.RawMessage) (Settings, []Problem) {
	if !isKeyVault(publisher, typ) {
		return Settings{}, nil
	}
	s, err := extension.ParseKeyVaultSettings(settings)
	if err != nil {
		var all extension.SettingsErrors
		if !errors.As(err, &all) {
			return Settings{NeedsIdentity: true}, []Problem{{Path: "settings", Reason: err.Error()}}
		}
		out := make([]Problem, len(all))
		for i, e := range all {
			out[i] = Problem{Path: e.Path, Reason: sentence(e.Reason), Fix: e.Fix}
		}
		return Settings{NeedsIdentity: true}, out
	}
	out := Settings{ClientID: s.MSIClientID, RequireInitialSync: s.RequireInitialSync, NeedsIdentity: true}
	for _, c := range s.Certificates {
		out.Observed = append(out.Observed, Observed{URL: c.URL, Path: c.Path})
	}
	return out, nil
}

// sentence turns a clause into a sentence: "it is not a GUID" -> "It is not a GUID."
func sentence(clause string) string {
	if clause == "" {
		return ""
	}
	s := strings.ToUpper(clause[:1]) + clause[1:]
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}
