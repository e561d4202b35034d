package pool

import (
	"fmt"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Problem is one thing that is wrong with a pool, and how to mend it.
type Problem struct {
	Code   string // InvalidPropertyValue, MissingRequiredProperty, or the vault's word for a fault of state
	Path   string // path in the resource: properties.deploymentConfiguration.virtualMachineConfiguration.extensions[0].type
	Reason string // one or two sentences
	Fix    string // what to do
}

// String renders the problem for people.
func (p Problem) String() string {
	s := p.Reason
	if p.Path != "" {
		s = p.Path + ": " + s
	}
	if p.Fix != "" {
		s += " Fix: " + p.Fix
		if s[len(s)-1] != '.' {
			s += "."
		}
	}
	return s
}

// invalid is the error that lists all problems: 400, each with its path as the
// target of a detail. One problem gives its own code, several InvalidRequestBody.
func invalid(problems []Problem) error {
	if len(problems) == 0 {
		return nil
	}
	first := problems[0]
	e := fault.New(fault.Invalid, first.Code, "%s", first.Reason).At(first.Path).WithFix("%s", first.Fix)
	if len(problems) > 1 {
		e = fault.New(fault.Invalid, "InvalidRequestBody", "The pool has %d problems; the first: %s", len(problems), first).At(first.Path)
	}
	for _, p := range problems {
		msg := p.Reason
		if p.Fix != "" {
			msg += " Fix: " + p.Fix
		}
		e.Details = append(e.Details, fault.Detail{Code: p.Code, Message: msg, Target: p.Path})
	}
	return e
}

func value(path, fix, format string, args ...any) Problem {
	return Problem{Code: "InvalidPropertyValue", Path: path, Reason: fmt.Sprintf(format, args...), Fix: fix}
}

func missing(path, fix string) Problem {
	return Problem{Code: "MissingRequiredProperty", Path: path, Reason: "It is required and not there.", Fix: fix}
}
