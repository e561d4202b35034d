package pool

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Limits of resizeTimeout in the Batch reference.
const (
	minResizeTimeout = 5 * time.Minute
	maxResizeTimeout = 7 * 24 * time.Hour
)

// ParseDuration reads an ISO 8601 duration of weeks, days, hours, minutes and
// seconds: "PT15M", "P1DT12H", "PT1.5S". Years and months have no fixed length
// and are refused, as are signs and blanks.
func ParseDuration(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is not an ISO 8601 duration such as PT15M", s)
	rest, ok := strings.CutPrefix(s, "P")
	if !ok || rest == "" || len(s) > 64 {
		return 0, bad
	}
	date, clock, hasClock := strings.Cut(rest, "T")
	if hasClock && clock == "" {
		return 0, bad
	}
	var total time.Duration
	for _, part := range []struct {
		text  string
		units string
		size  []time.Duration
	}{
		{date, "WD", []time.Duration{7 * 24 * time.Hour, 24 * time.Hour}},
		{clock, "HMS", []time.Duration{time.Hour, time.Minute, time.Second}},
	} {
		d, err := designators(part.text, part.units, part.size)
		if err != nil || total+d < total {
			return 0, bad
		}
		total += d
	}
	return total, nil
}

// designators reads numbers with units, each unit at most once and in order.
func designators(s, units string, size []time.Duration) (time.Duration, error) {
	var total time.Duration
	next := 0
	for s != "" {
		i := strings.IndexFunc(s, func(c rune) bool { return (c < '0' || c > '9') && c != '.' })
		if i <= 0 {
			return 0, strconv.ErrSyntax
		}
		u := strings.IndexByte(units, s[i])
		if u < next {
			return 0, strconv.ErrSyntax
		}
		if strings.Contains(s[:i], ".") && s[i] != 'S' {
			return 0, strconv.ErrSyntax
		}
		n, err := strconv.ParseFloat(s[:i], 64)
		if err != nil || n*float64(size[u]) > float64(1<<62) {
			return 0, strconv.ErrRange
		}
		total += time.Duration(n * float64(size[u]))
		if total < 0 {
			return 0, strconv.ErrRange
		}
		next, s = u+1, s[i+1:]
	}
	return total, nil
}

// resizeTimeout is the timeout of a stored resize.
func resizeTimeout(s string) time.Duration {
	d, err := ParseDuration(s)
	if err != nil {
		d, _ = ParseDuration(defaultResizeTimeout)
	}
	return d
}

// checkResizeTimeout says what is wrong with a resizeTimeout; nil if nothing is.
func checkResizeTimeout(path, s string) *Problem {
	const fix = "write an ISO 8601 duration from PT5M to P7D, for instance PT15M"
	d, err := ParseDuration(s)
	if err != nil {
		p := value(path, fix, "%q is not an ISO 8601 duration.", s)
		return &p
	}
	if d < minResizeTimeout || d > maxResizeTimeout {
		p := value(path, fix, "%s is not between 5 minutes and 7 days.", s)
		return &p
	}
	return nil
}

func timeoutFault(p *Problem) error {
	return fault.New(fault.Invalid, p.Code, "%s", p.Reason).At(p.Path).WithFix("%s", p.Fix)
}
