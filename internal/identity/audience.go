package identity

import (
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// ResourceOfScope takes the resource out of the scope parameter of a v2 token
// request: of all its words that are not OpenID's own there must be exactly
// one, and it must end in "/.default" (client credentials know no other). Only
// one "/.default" is taken off: "https://batch.X//.default" asks for "https://batch.X/".
func ResourceOfScope(scope string) (string, error) {
	resource := ""
	for _, word := range strings.Fields(scope) {
		switch strings.ToLower(word) {
		case "openid", "offline_access", "profile", "email":
			continue
		}
		r, ok := strings.CutSuffix(word, "/.default")
		if !ok || r == "" || resource != "" {
			return "", badScope(scope)
		}
		resource = r
	}
	if resource == "" {
		return "", badScope(scope)
	}
	return resource, nil
}

func badScope(scope string) error {
	return fault.New(fault.Invalid, "invalid_scope",
		"The provided value for scope %.200s is not valid. Client credential flows must have a scope value with /.default suffixed to the resource identifier (application ID URI).", scope).
		WithInner("AADSTS1002012")
}

// normalize makes two writings of a resource comparable: lower case, without
// "/.default" and trailing slashes.
func normalize(resource string) string {
	return strings.TrimRight(strings.ToLower(strings.TrimSuffix(strings.TrimSpace(resource), "/.default")), "/")
}

// canonical returns the canonical form of a resource; ok is false for one that
// this server does not know.
func (s *Service) canonical(resource string) (string, bool) {
	c, ok := s.cfg.Audiences[normalize(resource)]
	return c, ok
}

// requireAudience returns what the aud claim is to be: the resource as it was
// asked for, for some clients compare it.
func (s *Service) requireAudience(resource string) (string, error) {
	if _, ok := s.canonical(resource); !ok || len(resource) > 256 {
		return "", fault.New(fault.Invalid, "invalid_resource",
			"The resource principal named %.200s was not found in the tenant named Keyfleet.", resource).
			WithInner("AADSTS500011").WithFix("ask for a resource of this server: its names are at /metadata/endpoints; --host-alias adds further ones")
	}
	return strings.TrimSuffix(resource, "/.default"), nil
}
