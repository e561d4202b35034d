package nodeapi

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// statuses maps the kinds of faults to HTTP statuses; a kind that is not here is a 500.
var statuses = map[fault.Kind]int{
	fault.Invalid:         http.StatusBadRequest,
	fault.Unauthenticated: http.StatusUnauthorized,
	fault.Denied:          http.StatusForbidden,
	fault.NotFound:        http.StatusNotFound,
	fault.Conflict:        http.StatusConflict,
	fault.Precondition:    http.StatusPreconditionFailed,
	fault.TooLarge:        http.StatusRequestEntityTooLarge,
	fault.TooMany:         http.StatusTooManyRequests,
	fault.Unavailable:     http.StatusServiceUnavailable,
	fault.Timeout:         http.StatusGatewayTimeout,
}

// fail answers with an error; causes go to the log only.
func (e *Edge) fail(w http.ResponseWriter, r *http.Request, err error) {
	f := fault.From(err)
	status, ok := statuses[f.Kind]
	body := node.Error{Code: f.Code, Message: f.Message, Fix: f.Fix}
	if !ok {
		status = http.StatusInternalServerError
		body = node.Error{Code: "InternalError", Message: "The server failed; its log has the cause under this request id: " + w.Header().Get("X-Request-Id")}
	}
	if body.Code == "" {
		body.Code = http.StatusText(status)
	}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(f.RetryAfter.Seconds()+0.999))))
	}
	if !ok || f.Err != nil {
		call, _ := access.From(r.Context())
		e.cfg.Log.Warn("node request failed", "path", r.URL.Path, "node", call.Principal.Node, "request", call.RequestID, "error", err)
	}
	answer(w, status, body)
}

// recover turns a panic of one request into one 500.
func (e *Edge) recover(w http.ResponseWriter, r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(p)
	}
	e.cfg.Log.Error("node request panicked", "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	e.fail(w, r, fault.New(fault.Internal, "", ""))
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client went away: nobody to tell
}

// decode reads a JSON body of at most limit bytes. Members of later agents are ignored.
func decode(w http.ResponseWriter, r *http.Request, limit int64, v any) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return fault.New(fault.TooLarge, "BodyTooLarge", "The body is over %d bytes.", limit)
	}
	if err != nil {
		return fault.New(fault.Invalid, "BodyUnreadable", "The body could not be read to its end.").Because(err)
	}
	return jsonstrict.DecodeLoose(body, v)
}

// requestID makes an id for the request and puts it into the answer.
func requestID(w http.ResponseWriter) string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	id := hex.EncodeToString(b[:])
	w.Header().Set("X-Request-Id", id)
	return id
}
