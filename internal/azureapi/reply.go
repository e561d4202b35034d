package azureapi

import (
	"bufio"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strconv"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
)

// statusOf is the one table from kinds of failure to HTTP statuses.
var statusOf = map[fault.Kind]int{
	fault.Internal:        http.StatusInternalServerError,
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

// StatusOf is the HTTP status of a kind of failure.
func StatusOf(k fault.Kind) int { return statusOf[k] }

// codeOf is the code of an error that has none of its own, by surface.
var codeOf = map[Surface]map[fault.Kind]string{
	ARM: {
		fault.Internal: "InternalServerError", fault.Invalid: "InvalidRequestContent", fault.Unauthenticated: "AuthenticationFailed",
		fault.Denied: "AuthorizationFailed", fault.NotFound: "ResourceNotFound", fault.Conflict: "Conflict", fault.Precondition: "PreconditionFailed",
		fault.TooLarge: "RequestContentTooLarge", fault.TooMany: "TooManyRequests", fault.Unavailable: "ServiceUnavailable", fault.Timeout: "GatewayTimeout",
	},
	Vault: {
		fault.Internal: "InternalError", fault.Invalid: "BadParameter", fault.Unauthenticated: "Unauthorized", fault.Denied: "Forbidden",
		fault.NotFound: "NotFound", fault.Conflict: "Conflict", fault.Precondition: "PreconditionFailed", fault.TooLarge: "RequestTooLarge",
		fault.TooMany: "Throttled", fault.Unavailable: "ServiceUnavailable", fault.Timeout: "Timeout",
	},
	Batch: {
		fault.Internal: "InternalError", fault.Invalid: "InvalidRequestBody", fault.Unauthenticated: "AuthenticationFailed",
		fault.Denied: "InsufficientAccountPermissions", fault.NotFound: "ResourceNotFound", fault.Conflict: "OperationInvalidForCurrentState",
		fault.Precondition: "ConditionNotMet", fault.TooLarge: "RequestBodyTooLarge", fault.TooMany: "ServerBusy", fault.Unavailable: "ServerBusy",
		fault.Timeout: "OperationTimedOut",
	},
}

// commonHeaders are on every answer.
func (x *exchange) commonHeaders(h http.Header, r *http.Request) {
	h.Set("Cache-Control", "no-cache")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
	if x.host.Surface == Batch {
		h.Set("request-id", x.id)
		h.Set("DataServiceVersion", "3.0")
		if id := r.Header.Get("client-request-id"); id != "" && len(id) <= 64 {
			h.Set("client-request-id", id)
		}
		return
	}
	h.Set("x-ms-request-id", x.id)
	h.Set("x-ms-correlation-request-id", x.correlation)
	if id := r.Header.Get("x-ms-client-request-id"); id != "" && len(id) <= 64 {
		h.Set("x-ms-client-request-id", id)
	}
	if x.host.Surface == ARM {
		h.Set("x-ms-ratelimit-remaining-subscription-reads", "11999")
		h.Set("x-ms-ratelimit-remaining-subscription-writes", "1199")
	}
}

func contentType(s Surface) string {
	if s == Batch {
		return "application/json; odata=minimalmetadata"
	}
	return "application/json; charset=utf-8"
}

func (a *API) writeReply(w http.ResponseWriter, r *http.Request, x *exchange, reply *Reply) {
	if reply.Upgrade != nil {
		a.upgrade(w, r, x, reply)
		return
	}
	for k, v := range reply.Header {
		w.Header()[k] = v
	}
	x.status = reply.Status
	if x.status == 0 {
		x.status = http.StatusOK
	}
	if reply.Body == nil {
		w.WriteHeader(x.status)
		return
	}
	body, err := json.Marshal(reply.Body)
	if err != nil {
		x.status = 0
		a.writeError(w, r, x, err)
		return
	}
	a.writeBody(w, r, x, body)
}

func (a *API) writeBody(w http.ResponseWriter, r *http.Request, x *exchange, body []byte) {
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", contentType(x.host.Surface))
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(x.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client went away; nothing to do about it
	}
}

// upgrade answers 101 and hands the connection to the reply's function.
func (a *API) upgrade(w http.ResponseWriter, r *http.Request, x *exchange, reply *Reply) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		a.writeError(w, r, x, fault.New(fault.Invalid, "UpgradeRequired", "This path needs an HTTP/1.1 connection that can be upgraded.").Because(err))
		return
	}
	defer conn.Close()
	x.status = http.StatusSwitchingProtocols
	_ = conn.SetDeadline(time.Time{})
	if _, err := conn.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + reply.Protocol + "\r\n\r\n")); err != nil {
		return
	}
	reply.Upgrade(&bufferedConn{Conn: conn, r: rw.Reader})
}

// writeError writes an error in the form of the surface.
func (a *API) writeError(w http.ResponseWriter, r *http.Request, x *exchange, err error) {
	e := *fault.From(err)
	x.status = statusOf[e.Kind]
	if e.Code == "MethodNotAllowed" {
		x.status = http.StatusMethodNotAllowed
	}
	table := codeOf[x.host.Surface]
	if table == nil {
		table = codeOf[ARM]
	}
	if e.Code == "" {
		e.Code = table[e.Kind]
	}
	if x.status >= 500 {
		a.cfg.Log.Error("request failed", "request", x.id, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if e.Kind == fault.Internal {
		e.Message, e.Target, e.Fix = "The server met an unexpected condition. Its log has the details under request id "+x.id+".", "", ""
	}
	var ch *challengeError
	if errors.As(err, &ch) {
		w.Header().Set("WWW-Authenticate", ch.header)
	}
	if e.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(e.RetryAfter.Round(time.Second)/time.Second))))
	}
	body, merr := json.Marshal(errorBody(x, &e))
	if merr != nil {
		body = []byte(`{}`)
	}
	if x.host.Surface != Batch {
		w.Header().Set("x-ms-error-code", e.Code)
	}
	a.writeBody(w, r, x, body)
}

// batchError is the error body of the Batch data plane.
type batchError struct {
	Metadata string       `json:"odata.metadata"`
	Code     string       `json:"code"`
	Message  batchMessage `json:"message"`
	Values   []batchValue `json:"values,omitempty"`
}

type batchMessage struct {
	Lang  string `json:"lang"`
	Value string `json:"value"`
}

type batchValue struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

func errorBody(x *exchange, e *fault.Error) any {
	if x.host.Surface == Batch {
		b := batchError{
			Metadata: "https://" + x.host.Name + "." + x.host.Region + "." + x.host.Suffix + "/$metadata#Microsoft.Azure.Batch.Protocol.Entities.Container.errors/@Element",
			Code:     e.Code,
			Message:  batchMessage{"en-US", e.Message + "\nRequestId:" + x.id + "\nTime:" + x.start.UTC().Format("2006-01-02T15:04:05.0000000Z")},
		}
		for _, d := range e.Details {
			b.Values = append(b.Values, batchValue{d.Code, d.Message})
		}
		if e.Target != "" && len(e.Details) == 0 {
			b.Values = append(b.Values, batchValue{"PropertyName", e.Target})
		}
		if e.Fix != "" {
			b.Values = append(b.Values, batchValue{"Fix", e.Fix})
		}
		return b
	}
	b := arm.ErrorBody{Error: arm.Error{Code: e.Code, Message: e.Message, Target: e.Target}}
	for _, d := range e.Details {
		b.Error.Details = append(b.Error.Details, arm.Error{Code: d.Code, Message: d.Message, Target: d.Target})
	}
	if e.Fix != "" {
		b.Error.Details = append(b.Error.Details, arm.Error{Code: "Fix", Message: e.Fix})
	}
	if e.Inner != "" {
		b.Error.InnerError = &arm.InnerError{Code: e.Inner}
	}
	return b
}

// bufferedConn is a hijacked connection whose first bytes may still be buffered.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }
