package login

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/identity"
)

const (
	maxForm       = 64 << 10 // bytes of a token request
	maxFormFields = 64

	// assertionType is the one type of client assertions (RFC 7523, section 2.2).
	assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
)

// tokenV2 is the answer of the v2 endpoint.
type tokenV2 struct {
	TokenType    string `json:"token_type"`
	ExpiresIn    int64  `json:"expires_in"`
	ExtExpiresIn int64  `json:"ext_expires_in"`
	AccessToken  string `json:"access_token"`
}

// tokenV1 is the answer of the v1 endpoint; its numbers are strings.
type tokenV1 struct {
	TokenType    string `json:"token_type"`
	ExpiresIn    string `json:"expires_in"`
	ExtExpiresIn string `json:"ext_expires_in"`
	ExpiresOn    string `json:"expires_on"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	AccessToken  string `json:"access_token"`
}

func (l login) token(v identity.Version) func(*azureapi.Request) (*azureapi.Reply, error) {
	return func(r *azureapi.Request) (*azureapi.Reply, error) {
		c, err := credentials(r, v)
		if err != nil {
			return refuse(r, err)
		}
		t, err := l.identity.ClientCredentials(r.Context(), c)
		if err != nil {
			return refuse(r, err)
		}
		var body any
		seconds := int64(t.Lifetime/time.Second) - 1 // as Entra ID does: whoever counts from receipt is never late
		// AD FS answers with numbers, and az adds to them.
		if v == identity.V2 || strings.EqualFold(c.Tenant, "adfs") {
			body = tokenV2{TokenType: "Bearer", ExpiresIn: seconds, ExtExpiresIn: seconds, AccessToken: t.Value.Reveal()}
		} else {
			s := strconv.FormatInt(seconds, 10)
			body = tokenV1{
				TokenType: "Bearer", ExpiresIn: s, ExtExpiresIn: s,
				ExpiresOn: strconv.FormatInt(t.Expires.Unix(), 10), NotBefore: strconv.FormatInt(t.NotBefore.Unix(), 10),
				Resource: t.Resource, AccessToken: t.Value.Reveal(),
			}
		}
		return azureapi.OK(body).With("Cache-Control", "no-store").With("Pragma", "no-cache"), nil
	}
}

// credentials reads a client credentials request (RFC 6749, section 4.4).
func credentials(r *azureapi.Request, v identity.Version) (identity.Credentials, error) {
	none := identity.Credentials{}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/x-www-form-urlencoded" {
		return none, oauth("invalid_request", 900144, "The request body must be of content type application/x-www-form-urlencoded.")
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxForm+1))
	if err != nil {
		return none, oauth("invalid_request", 900144, "The request body could not be read.")
	}
	form, err := parseForm(body)
	if err != nil {
		return none, oauth("invalid_request", 900144, "%s.", err)
	}
	c := identity.Credentials{Tenant: r.Param("tenant"), Version: v, ClientID: form["client_id"], Secret: form["client_secret"], Assertion: form["client_assertion"]}
	if user, password, ok := r.BasicAuth(); ok {
		if c.Secret != "" {
			return none, oauth("invalid_request", 900144, "The client authenticates twice, by header and by body.")
		}
		// RFC 6749, section 2.3.1: both parts are form-encoded first.
		if c.ClientID, err = url.QueryUnescape(user); err != nil {
			return none, oauth("invalid_client", 7000215, "The client id in the Authorization header is not form-encoded.")
		}
		if c.Secret, err = url.QueryUnescape(password); err != nil {
			return none, oauth("invalid_client", 7000215, "The secret in the Authorization header is not form-encoded.")
		}
	}
	if g := form["grant_type"]; g != "client_credentials" {
		if g == "" {
			return none, missing("grant_type")
		}
		return none, oauth("unsupported_grant_type", 70003, "The app requested an unsupported grant type '%.64s'. This server knows client_credentials.", g)
	}
	switch {
	case c.ClientID == "":
		return none, missing("client_id")
	case c.Assertion != "" && c.Secret != "":
		return none, oauth("invalid_request", 900144, "The client authenticates twice, by secret and by assertion.")
	case c.Assertion != "" && form["client_assertion_type"] != assertionType:
		return none, oauth("invalid_request", 900144, "The parameter 'client_assertion_type' must be '%s'.", assertionType)
	case c.Assertion == "" && c.Secret == "":
		return none, oauth("invalid_client", 7000216, "'client_assertion', 'client_secret' or 'request' is required for the 'client_credentials' grant type.")
	}
	switch {
	case v == identity.V2 && form["scope"] == "":
		return none, missing("scope")
	case v == identity.V2:
		c.Resource, err = identity.ResourceOfScope(form["scope"])
	case form["resource"] != "":
		c.Resource = form["resource"]
	case form["scope"] != "": // some clients post a scope to the v1 endpoint
		c.Resource, err = identity.ResourceOfScope(form["scope"])
	default:
		return none, missing("resource")
	}
	return c, err
}

// parseForm parses a form. A name that stands twice is an error (RFC 6749,
// section 3.2), for two readers could take two values.
func parseForm(body []byte) (map[string]string, error) {
	if len(body) > maxForm {
		return nil, fmt.Errorf("the request body is larger than %d bytes", maxForm)
	}
	if strings.Count(string(body), "&") >= maxFormFields {
		return nil, fmt.Errorf("the request body has more than %d parameters", maxFormFields)
	}
	values, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, errors.New("the request body is not a valid form")
	}
	form := make(map[string]string, len(values))
	for k, v := range values {
		if len(v) > 1 {
			return nil, fmt.Errorf("the parameter '%.64s' stands twice", k)
		}
		form[k] = v[0]
	}
	return form, nil
}

func missing(parameter string) *fault.Error {
	return oauth("invalid_request", 900144, "The request body must contain the following parameter: '%s'.", parameter)
}

func unknownTenant(tenant string) *fault.Error {
	return oauth("invalid_tenant", 90002, "Tenant '%.64s' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud.", tenant)
}

// oauth makes an error with OAuth's word and the AADSTS number.
func oauth(code string, aadsts int, format string, args ...any) *fault.Error {
	kind := fault.Invalid
	if code == "invalid_client" {
		kind = fault.Unauthenticated
	}
	return fault.New(kind, code, format, args...).WithInner("AADSTS" + strconv.Itoa(aadsts))
}

// oauthError is the error body of the token surface (RFC 6749, section 5.2,
// with the members of Microsoft Entra ID).
type oauthError struct {
	Error         string `json:"error"`
	Description   string `json:"error_description"`
	Codes         []int  `json:"error_codes,omitempty"`
	Timestamp     string `json:"timestamp"`
	TraceID       string `json:"trace_id"`
	CorrelationID string `json:"correlation_id"`
}

// refuse answers with an OAuth error. What has no OAuth code is not the
// client's doing: it goes to the common error path, which logs it.
func refuse(r *azureapi.Request, err error) (*azureapi.Reply, error) {
	e := fault.From(err)
	status := http.StatusBadRequest
	switch {
	case e.Kind == fault.Unavailable:
		if !strings.HasPrefix(e.Inner, "AADSTS") {
			e = oauth("temporarily_unavailable", 90033, "%s", e.Message)
		}
		e, status = e.After(max(e.RetryAfter, time.Second)), http.StatusServiceUnavailable
	case !strings.HasPrefix(e.Inner, "AADSTS"):
		return nil, err
	case e.Kind == fault.Unauthenticated:
		status = http.StatusUnauthorized
	}
	correlation := r.Header.Get("client-request-id")
	if correlation == "" || len(correlation) > 64 {
		correlation = r.ID
	}
	now := time.Now().UTC().Format("2006-01-02 15:04:05Z")
	body := oauthError{
		Error: e.Code, Timestamp: now, TraceID: r.ID, CorrelationID: correlation,
		Description: fmt.Sprintf("%s: %s Trace ID: %s Correlation ID: %s Timestamp: %s", e.Inner, e.Message, r.ID, correlation, now),
	}
	if e.Fix != "" {
		body.Description += " Fix: " + e.Fix
	}
	if n, err := strconv.Atoi(strings.TrimPrefix(e.Inner, "AADSTS")); err == nil {
		body.Codes = []int{n}
	}
	reply := (&azureapi.Reply{Status: status, Body: body}).With("Cache-Control", "no-store")
	if status == http.StatusUnauthorized {
		reply = reply.With("WWW-Authenticate", `Basic realm="keyfleet"`)
	}
	if e.RetryAfter > 0 {
		reply = reply.With("Retry-After", strconv.Itoa(int(e.RetryAfter/time.Second)))
	}
	return reply, nil
}
