package scextension

import (
	"strings"
	"testing"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// TestPinned: a version that this manager does not have is said, and not passed over.
func TestPinned(t *testing.T) {
	for version, code := range map[string]string{"": "", "0.1.0": "", "0.0.9": "ExtensionVersionNotFound", "latest": "ExtensionVersionNotFound"} {
		p := pinned(wire.ExtensionWork{Name: Extension, Version: version})
		switch {
		case p == nil && code != "":
			t.Errorf("%q is taken", version)
		case p != nil && (p.Code != code || p.Fix == "" || !strings.HasPrefix(p.Message, "Failed to resolve the extension version from the given values")):
			t.Errorf("%q: %+v", version, p)
		}
	}
}
