package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Error is a refusal of the server, or the failure to reach it (Status 0).
type Error struct {
	Status        int           // HTTP status; 0: there was no answer
	Code          string        // the protocol's word, for instance "SecretNotFound"
	Inner         string        // Key Vault's innererror code, for instance "AccessDenied"
	Message       string        // one or two sentences
	Target        string        // the field or resource it is about
	Fix           string        // what to do, where the server knows it
	Details       []Detail      // further facts
	RequestID     string        // under which the server's log and audit have the rest
	CorrelationID string        // of the chain of calls
	RetryAfter    time.Duration // zero: unknown
	Operation     string        // "GET https://arm.../..." without the query
	Err           error         // cause where there was no answer

	header  http.Header
	refused bool // the connection was not made
}

// Detail is one further fact about an error.
type Detail struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Target  string `json:"target,omitempty"`
}

// Error renders code and message.
func (e *Error) Error() string {
	s := e.Code + ": " + e.Message
	if e.Target != "" {
		s += " (" + e.Target + ")"
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// The exit codes of programs, as docs/cli.md lists them.
const (
	ExitFailed   = 1
	ExitUsage    = 2
	ExitNotFound = 3
	ExitLogin    = 4
	ExitDenied   = 5
	ExitConflict = 6
	ExitTimeout  = 7
)

// Exit is the exit code of a program that ends because of this error.
func (e *Error) Exit() int {
	switch e.Status {
	case http.StatusNotFound, http.StatusGone:
		return ExitNotFound
	case http.StatusUnauthorized:
		return ExitLogin
	case http.StatusForbidden:
		return ExitDenied
	case http.StatusConflict, http.StatusPreconditionFailed:
		return ExitConflict
	case http.StatusBadRequest:
		if oauthCodes[e.Code] {
			return ExitLogin
		}
	}
	return ExitFailed
}

// oauthCodes are the words of the token endpoint (RFC 6749, 5.2) that mean "this credential does not count".
var oauthCodes = map[string]bool{"invalid_client": true, "unauthorized_client": true, "invalid_grant": true}

// IsNotFound reports whether err says that the thing does not exist.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// errorBody covers the four forms of error bodies:
//
//	ARM, Key Vault   {"error":{"code","message","target","details":[...],"innererror":{"code"}}}
//	Batch            {"code","message":{"lang","value"},"values":[{"key","value"}]}
//	OAuth            {"error":"invalid_client","error_description":"AADSTS..."}
//	node edge        {"code","message","fix"}
type errorBody struct {
	Error       json.RawMessage `json:"error"`
	Description string          `json:"error_description"`
	Code        string          `json:"code"`
	Message     json.RawMessage `json:"message"`
	Fix         string          `json:"fix"`
	Values      []struct {
		Key   string `json:"key"`
		Value string `json:"value"`
	} `json:"values"`
}

type armError struct {
	Code       string   `json:"code"`
	Message    string   `json:"message"`
	Target     string   `json:"target"`
	Fix        string   `json:"fix"`
	Details    []Detail `json:"details"`
	InnerError struct {
		Code string `json:"code"`
	} `json:"innererror"`
}

// decodeError reads an answer other than 2xx. Whatever the body is, the result has a code and a message.
func decodeError(req *http.Request, resp *http.Response, body []byte) *Error {
	e := &Error{
		Status:        resp.StatusCode,
		RequestID:     firstHeader(resp.Header, "x-ms-request-id", "request-id"),
		CorrelationID: resp.Header.Get("x-ms-correlation-request-id"),
		RetryAfter:    retryAfter(resp.Header),
		Operation:     operation(req),
		header:        resp.Header,
	}
	e.decodeBody(body)
	if e.Code == "" {
		e.Code = resp.Header.Get("x-ms-error-code")
	}
	if e.Code == "" {
		e.Code = strings.ReplaceAll(http.StatusText(resp.StatusCode), " ", "")
	}
	if e.Code == "" {
		e.Code = "HTTP" + strconv.Itoa(resp.StatusCode)
	}
	if e.Message == "" {
		e.Message = fmt.Sprintf("%s was answered with status %d.", e.Operation, resp.StatusCode)
	}
	e.takeFix()
	return e
}

func (e *Error) decodeBody(body []byte) {
	var b errorBody
	if json.Unmarshal(body, &b) != nil {
		return
	}
	var inner armError
	if json.Unmarshal(b.Error, &inner) == nil && inner.Code != "" {
		e.Code, e.Message, e.Target, e.Fix = inner.Code, inner.Message, inner.Target, inner.Fix
		e.Details, e.Inner = inner.Details, inner.InnerError.Code
		return
	}
	var word string
	if json.Unmarshal(b.Error, &word) == nil && word != "" {
		e.Code, e.Message = word, b.Description
		return
	}
	e.Code, e.Fix = b.Code, b.Fix
	var odata struct {
		Value string `json:"value"`
	}
	if json.Unmarshal(b.Message, &e.Message) != nil && json.Unmarshal(b.Message, &odata) == nil {
		// The Batch data plane repeats the ids in its text; they have their own line here.
		e.Message, _, _ = strings.Cut(odata.Value, "\nRequestId:")
	}
	for _, v := range b.Values {
		if v.Key == "PropertyName" && e.Target == "" {
			e.Target = v.Value
			continue
		}
		e.Details = append(e.Details, Detail{Code: v.Key, Message: v.Value})
	}
}

// takeFix moves the detail that the server calls Fix to its own field.
func (e *Error) takeFix() {
	kept := e.Details[:0]
	for _, d := range e.Details {
		if strings.EqualFold(d.Code, "Fix") && e.Fix == "" {
			e.Fix = d.Message
			continue
		}
		kept = append(kept, d)
	}
	e.Details = kept
}

// unreachable is the error of a request that got no answer.
func (c *Client) unreachable(ctx context.Context, req *http.Request, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("waiting for an answer to %s: %w", operation(req), context.Cause(ctx))
	}
	e := &Error{Code: "ServerUnreachable", Operation: operation(req), Err: err}
	to := req.URL.Host
	if c.dial != "" {
		to = fmt.Sprintf("%s (dialled at %s)", to, c.dial)
	}
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		e.refused = true
		e.Message = fmt.Sprintf("No server listens at %s.", to)
		e.Fix = "start keyfleet-server, or log in to the one that runs: keyfleet login --from DIR"
	case errors.As(err, &dns):
		e.refused = true
		e.Message = fmt.Sprintf("The name %s does not resolve.", dns.Name)
		e.Fix = "keyfleet login --from DIR, or keyfleet login --server URL --address HOST:PORT"
	case strings.Contains(err.Error(), "x509:"), strings.Contains(err.Error(), "tls:"):
		e.refused = true
		e.Code = "ServerNotTrusted"
		e.Message = fmt.Sprintf("The certificate of %s is not trusted: %s.", to, rootCause(err))
		e.Fix = "keyfleet login --from DIR"
	case errors.As(err, &op) && op.Op == "dial":
		e.refused = true
		e.Message = fmt.Sprintf("The server at %s cannot be reached: %s.", to, rootCause(err))
	default:
		e.Message = fmt.Sprintf("The connection to %s broke: %s.", to, rootCause(err))
	}
	return e
}

func rootCause(err error) string {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err.Error()
		}
		err = next
	}
}

func operation(req *http.Request) string {
	return req.Method + " " + req.URL.Scheme + "://" + req.URL.Host + req.URL.EscapedPath()
}

func firstHeader(h http.Header, names ...string) string {
	for _, n := range names {
		if v := h.Get(n); v != "" {
			return v
		}
	}
	return ""
}

// retryAfter reads Retry-After: seconds or a date (RFC 9110, 10.2.3).
func retryAfter(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(t))
	}
	return 0
}
