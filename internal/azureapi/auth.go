package azureapi

import (
	"fmt"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
)

// challengeError is a 401 with a WWW-Authenticate header.
type challengeError struct {
	cause  *fault.Error
	header string
}

func (e *challengeError) Error() string { return e.cause.Error() }
func (e *challengeError) Unwrap() error { return e.cause }

// authenticate verifies the bearer token of the request.
func (a *API) authenticate(r *http.Request, host Host) (access.Principal, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimSpace(token)
	switch {
	case scheme == "" || token == "":
		return access.Principal{}, a.challenge(host, missing(host.Surface))
	case strings.EqualFold(scheme, "SharedKey"):
		return access.Principal{}, a.challenge(host, fault.New(fault.Unauthenticated, "AuthenticationFailed",
			"Shared keys are not supported; a bearer token is needed.").WithFix("az batch account login without --shared-key-auth"))
	case !strings.EqualFold(scheme, "Bearer"):
		return access.Principal{}, a.challenge(host, fault.New(fault.Unauthenticated, "AuthenticationFailed", "The authorization scheme %q is not supported; use Bearer.", scheme))
	}
	p, err := a.cfg.Verifier.Verify(r.Context(), token, a.cfg.Endpoints.Audiences(host.Surface))
	if err != nil && fault.KindOf(err) == fault.Unauthenticated {
		return p, a.challenge(host, fault.From(err))
	}
	return p, err
}

func missing(s Surface) *fault.Error {
	if s == Vault {
		return fault.New(fault.Unauthenticated, "Unauthorized", "AKV10000: Request is missing a Bearer or PoP token.")
	}
	return fault.New(fault.Unauthenticated, "AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing.").
		WithFix("log in first: keyfleet login --from DIR")
}

// challenge adds the WWW-Authenticate header. Key Vault clients take the
// authority from "authorization" (its fourth /-part is the tenant) and compare
// "resource" with the host they called, port included.
func (a *API) challenge(host Host, e *fault.Error) error {
	authority := a.cfg.Endpoints.Login() + "/" + a.cfg.Tenant
	switch host.Surface {
	case Vault:
		return &challengeError{e, fmt.Sprintf(`Bearer authorization="%s", resource="https://%s"`, authority, host.Suffix)}
	case Batch:
		return &challengeError{e, fmt.Sprintf(`Bearer authorization_uri="%s/oauth2/authorize", resource_id="https://%s/"`, authority, host.Suffix)}
	}
	return &challengeError{e, fmt.Sprintf(`Bearer authorization_uri="%s", error="invalid_token", error_description="%s"`, authority, strings.ReplaceAll(e.Message, `"`, "'"))}
}
