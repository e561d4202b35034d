package cluster

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// What rotate-certs prints, and what its end means. Lines that are not known change
// nothing: they are for people.

var (
	runLine  = regexp.MustCompile(`^Rotation ([a-zA-Z0-9-]{1,64}), journal `)
	stepLine = regexp.MustCompile(`^ *[0-9.]+s +([0-9]{1,6})/([0-9]{1,6})  done +(.{1,400}) \([0-9.]+s\)$`)
	waitLine = regexp.MustCompile(`^ +(in use by .{1,1000})$`)
)

const noReturnLine = "---- point of no return ----"

// take reads one line, and reports whether it tells something new.
func (p *Progress) take(line string) bool {
	was := *p
	switch {
	case strings.TrimSpace(line) == noReturnLine:
		p.NoReturn = true
	case runLine.MatchString(line):
		p.Run = runLine.FindStringSubmatch(line)[1]
	case waitLine.MatchString(line):
		p.Waiting = waitLine.FindStringSubmatch(line)[1]
	case stepLine.MatchString(line):
		m := stepLine.FindStringSubmatch(line)
		number, _ := strconv.Atoi(m[1]) // digits
		of, _ := strconv.Atoi(m[2])
		if number >= 1 && number <= of {
			p.Done, p.Steps, p.Step, p.Waiting = number, of, m[3], ""
		}
	}
	return *p != was
}

// verdict is what the end of a child means.
type verdict int

const (
	failed    verdict = iota
	done              // everything
	inSoak            // the old is in use, or is to be kept
	wasKilled         // by somebody else
	busy              // a child that outlived its server is at work
)

// exitSoak is rotate-certs' status where the old is still in use.
const exitSoak = 11

func judge(e Exit) verdict {
	switch {
	case e.Status == 0:
		return done
	case e.Status == exitSoak:
		return inSoak
	case e.Status < 0:
		return wasKilled
	case strings.Contains(e.Stderr, "is in use by another process"):
		return busy
	}
	return failed
}

// problem says why a child has stopped, by its own words, and how to go on.
func (d *drive) problem(e Exit) *Problem {
	p := parseProblem(e.Stderr)
	switch {
	case e.Status == exitSoak:
		p.Code = "OldStillInUse"
		if p.Message == "" {
			p.Message = "The old certificates are still in use."
		}
		p.Fix = fmt.Sprintf("nothing is lost, old and new both work; when the users are gone: keyfleet cluster rotate-certs %s, or with --restart-pods to restart them, or with --complete to retire the old all the same", clusterName(d.was))
		return &p
	case e.Status < 0:
		p = Problem{Code: "RotationKilled", Message: "The program rotate-certs was killed again and again."}
	case p.Message == "":
		p.Message = fmt.Sprintf("The program rotate-certs ended with status %d and said nothing of use.", e.Status)
	}
	if p.Code == "" {
		p.Code = "RotationFailed"
	}
	if p.Fix != "" {
		p.Fix += "; then "
	}
	p.Fix += d.again()
	return &p
}

var (
	errorLine = regexp.MustCompile(`(?m)^Error(?: ([A-Za-z]{1,60}))?: (.*)$`)
	whyLine   = regexp.MustCompile(`(?m)^  Why   (.*)$`)
	fixLine   = regexp.MustCompile(`(?m)^  Fix   (.*)$`)
	soakLine  = regexp.MustCompile(`(?m)^(Stopped before retiring: .*)$`)
)

// maxWords is how much of what a child has said is kept, in bytes.
const maxWords = 2000

// parseProblem finds the error in what rotate-certs wrote on standard error.
func parseProblem(stderr string) Problem {
	var p Problem
	if m := last(soakLine, stderr); m != nil {
		p.Message = m[1]
	}
	if m := last(errorLine, stderr); m != nil {
		p.Code, p.Message = m[1], m[2]
		if why := last(whyLine, stderr); why != nil {
			p.Message += " (" + why[1] + ")"
		}
	}
	if m := last(fixLine, stderr); m != nil {
		p.Fix = clip(m[1])
	}
	p.Message = clip(p.Message)
	return p
}

func last(re *regexp.Regexp, text string) []string {
	all := re.FindAllStringSubmatch(text, -1)
	if len(all) == 0 {
		return nil
	}
	return all[len(all)-1]
}

func clip(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxWords)], "")
}
