package azureapi

import (
	"errors"
	"io"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// MaxBody is the largest request body that is read, in bytes.
const MaxBody = 1 << 20

// Raw returns the request body; fault.TooLarge beyond [MaxBody].
func (r *Request) Raw() ([]byte, error) {
	b, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, MaxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, fault.New(fault.TooLarge, "RequestContentTooLarge", "The request body is larger than %d bytes.", MaxBody)
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "InvalidRequestContent", "The request body could not be read.").Because(err)
	}
	return b, nil
}

// Decode decodes the JSON body into v, strictly (package jsonstrict).
func (r *Request) Decode(v any) error {
	b, err := r.Raw()
	if err != nil {
		return err
	}
	return jsonstrict.Decode(b, v)
}

// DecodeLoose is Decode, but ignores members that v does not know: for bodies
// in which clients send read-only members back.
func (r *Request) DecodeLoose(v any) error {
	b, err := r.Raw()
	if err != nil {
		return err
	}
	return jsonstrict.DecodeLoose(b, v)
}

// Query returns a query parameter; names are matched case-insensitively, as ARM does.
func (r *Request) Query(name string) string {
	for k, v := range r.URL.Query() {
		if strings.EqualFold(k, name) && len(v) > 0 {
			return v[0]
		}
	}
	return ""
}

// Path returns the path as the client wrote it, without a surface prefix and trailing slash.
func (r *Request) Path() string { return strings.TrimRight(r.path, "/") }

// BaseURL is the URL of the surface's root as the client addressed it, without
// a trailing slash: for links in answers.
func (r *Request) BaseURL() string { return "https://" + r.Request.Host + r.Host.prefix }

// Scope is what the path of a management request names, for role decisions:
// the path itself, since an assignment above a resource is above its verbs too;
// the scope of an extension resource; "/" for Keyfleet's own that are about no resource.
func (r *Request) Scope() string {
	if scope := r.params["scope"]; scope != "" {
		return scope
	}
	own, isOwn := strings.CutPrefix(r.Path(), "/keyfleet/v1")
	switch {
	case isOwn && strings.HasPrefix(strings.ToLower(own), "/subscriptions/"):
		return own
	case isOwn:
		return "/"
	}
	return r.Path()
}

// Endpoints returns the server's names.
func (r *Request) Endpoints() Endpoints { return r.endpoints }

func resourceID(r *Request) (arm.ID, error) {
	id, err := arm.ParseID(r.Path())
	if err != nil {
		return id, fault.New(fault.Invalid, "InvalidResourceID", "The path is not a resource id: %s.", err)
	}
	return id, nil
}

// Accepted answers 202: the client polls location after some seconds.
func Accepted(location string, retryAfter string) *Reply {
	return Status(http.StatusAccepted).With("Location", location).With("Retry-After", retryAfter)
}
