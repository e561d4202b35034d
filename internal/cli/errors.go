package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"keyfleet.dev/keyfleet/client"
)

// Exit codes beyond those of package client. docs/cli.md lists all of them.
const (
	exitPartly    = 9   // n of m are done
	exitChanges   = 10  // what-if found changes or problems, and --exit-code asked for this
	exitAttention = 11  // doctor found something
	exitDetached  = 130 // Ctrl-C
)

// errWaited is the cause of a wait that --timeout ended.
var errWaited = errors.New("the time to wait is over")

// cliError is an error of the command line's own.
type cliError struct {
	code    string
	message string
	why     []string
	fix     string
	exit    int
}

func (e *cliError) Error() string { return e.code + ": " + e.message }

func (e *cliError) withFix(format string, args ...any) *cliError {
	c := *e
	c.fix = fmt.Sprintf(format, args...)
	return &c
}

// usagef is an error in how the command was typed.
func usagef(format string, args ...any) *cliError {
	return &cliError{code: "Usage", message: sentence(fmt.Sprintf(format, args...)), exit: client.ExitUsage}
}

// notFoundf is a thing that is not there.
func notFoundf(format string, args ...any) *cliError {
	return &cliError{code: "NotFound", message: sentence(fmt.Sprintf(format, args...)), exit: client.ExitNotFound}
}

// sentence gives a message its capital and its full stop.
func sentence(s string) string {
	s = strings.TrimSpace(s)
	if s == "" {
		return s
	}
	if !strings.HasSuffix(s, ".") && !strings.HasSuffix(s, "?") {
		s += "."
	}
	if word, _, _ := strings.Cut(s, " "); strings.ContainsAny(word, ":/.") {
		return s // an address or a path stays as it is
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// report is an error as people and programs see it. The keys are the same in both forms.
type report struct {
	Code    string            `json:"code"`
	Message string            `json:"message"`
	Target  string            `json:"target,omitempty"`
	Why     []string          `json:"why,omitempty"`
	Fix     string            `json:"fix,omitempty"`
	IDs     map[string]string `json:"ids,omitempty"`
	Exit    int               `json:"exitCode"`
}

// reportOf turns any error into a report.
func reportOf(err error) report {
	var ce *cliError
	if errors.As(err, &ce) {
		return report{Code: ce.code, Message: ce.message, Why: ce.why, Fix: ce.fix, Exit: ce.exit}
	}
	var e *client.Error
	if errors.As(err, &e) {
		return reportOfServer(e)
	}
	switch {
	case errors.Is(err, errWaited), errors.Is(err, context.DeadlineExceeded):
		return report{Code: "WaitTimedOut", Message: "The server did not answer in the time that --timeout allows.", Exit: client.ExitTimeout}
	case errors.Is(err, context.Canceled):
		return report{Code: "Detached", Message: "Stopped.", Exit: exitDetached}
	}
	return report{Code: "Failed", Message: sentence(err.Error()), Exit: client.ExitFailed}
}

func reportOfServer(e *client.Error) report {
	r := report{Code: e.Code, Message: sentence(e.Message), Target: e.Target, Fix: e.Fix, Exit: e.Exit(), IDs: map[string]string{}}
	if e.Inner != "" {
		r.Why = append(r.Why, e.Inner)
	}
	for _, d := range e.Details {
		switch {
		case d.Message == "", strings.HasPrefix(d.Message, strings.TrimSuffix(e.Message, ".")) && (d.Target == "" || d.Target == e.Target):
			// said already
		case d.Target != "":
			r.Why = append(r.Why, d.Target+": "+d.Message)
		case d.Code == "" || strings.EqualFold(d.Code, "Reason"):
			r.Why = append(r.Why, d.Message)
		default:
			r.Why = append(r.Why, d.Code+": "+d.Message)
		}
	}
	if e.RequestID != "" {
		r.IDs["request"] = e.RequestID
	}
	if e.CorrelationID != "" && e.CorrelationID != e.RequestID {
		r.IDs["correlation"] = e.CorrelationID
	}
	if r.Fix == "" && r.Exit == client.ExitLogin {
		r.Fix = "keyfleet login --from DIR"
	}
	return r
}

// fail prints the error in its fixed form and returns the exit code:
//
//	Error SecretNotFound: A secret with (name/id) web was not found in this key vault.
//	  Where  properties.vmSize
//	  Why    ...
//	  Fix    keyfleet secret list prod1
//	  Ids    request 3c1f...
func (t *tool) fail(err error) int {
	r := reportOf(err)
	if t.flags.output == "json" {
		b, _ := json.MarshalIndent(map[string]report{"error": r}, "", "  ")
		fmt.Fprintln(t.err, string(b))
		return r.Exit
	}
	head := "Error"
	if r.Exit == exitDetached || r.Exit == client.ExitTimeout || r.Exit == exitAttention || r.Exit == exitChanges {
		head = "Note" // nothing failed
	}
	fmt.Fprintf(t.err, "%s %s: %s\n", t.colour("1;31", head), r.Code, clean(r.Message))
	row := func(name, text string) {
		text = strings.ReplaceAll(clean(text), "\n", "\n         ")
		fmt.Fprintf(t.err, "  %-6s %s\n", name, text)
	}
	if r.Target != "" {
		row("Where", r.Target)
	}
	for _, w := range r.Why {
		row("Why", w)
	}
	if r.Fix != "" {
		row("Fix", r.Fix)
	}
	if len(r.IDs) > 0 {
		var ids []string
		for _, k := range []string{"request", "correlation"} {
			if v := r.IDs[k]; v != "" {
				ids = append(ids, k+" "+v)
			}
		}
		row("Ids", strings.Join(ids, "  "))
	}
	return r.Exit
}
