package helm

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"helm.sh/helm/v4/pkg/release/common"
	v1 "helm.sh/helm/v4/pkg/release/v1"

	"keyfleet.dev/keyfleet/internal/fault"
)

const (
	markLabel = "keyfleet.dev/operation" // on records: REVISION.RUNNER.END, see mark

	grace       = time.Minute      // by which clocks may differ
	foreignTime = 15 * time.Minute // that an operation of somebody else may take; Helm's default is 5 for each wait
)

// mark is what a record says of the operation that made it. Helm copies labels from
// one revision to the next, also when others upgrade, so a mark counts for the
// revision only that it names.
type mark struct {
	revision int
	runner   string // hash of its name
	end      time.Time
}

func (m mark) String() string { return fmt.Sprintf("%d.%s.%d", m.revision, m.runner, m.end.Unix()) }

// parseMark reads a mark; ok is false for what is none.
func parseMark(text string) (m mark, ok bool) {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return m, false
	}
	revision, err := strconv.Atoi(parts[0])
	end, err2 := strconv.ParseInt(parts[2], 10, 64)
	return mark{revision, parts[1], time.Unix(end, 0)}, err == nil && err2 == nil
}

// runner is the hash of the name of who works here.
func (c *Client) runner() string {
	sum := sha256.Sum256([]byte(c.Runner))
	return hex.EncodeToString(sum[:8])
}

// mark makes the labels of the record of a revision.
func (o *operation) mark(revision int) map[string]string {
	end, _ := o.ctx.Deadline()
	return map[string]string{markLabel: mark{revision, o.runner(), end}.String()}
}

// settle brings the release into a state that can be applied on, and returns its last
// record; nil: there is none.
func (o *operation) settle() (*v1.Release, error) {
	last, err := o.last()
	if err != nil || last == nil {
		return nil, err
	}
	switch {
	case last.Info.Status.IsPending():
		return last, o.takeOver(last, time.Now())
	case last.Info.Status == common.StatusUninstalling, last.Info.Status == common.StatusUninstalled:
		return nil, o.remove()
	}
	return last, nil
}

// takeOver marks a pending release as failed whose runner died: it was this one, or
// its time is over.
func (o *operation) takeOver(last *v1.Release, now time.Time) error {
	since := last.Info.LastDeployed
	end := since.Add(foreignTime)
	m, ok := parseMark(last.Labels[markLabel])
	ok = ok && m.revision == last.Version
	if ok {
		end = m.end.Add(grace)
	}
	if ours := ok && o.Runner != "" && m.runner == o.runner(); !ours && now.Before(end) {
		return o.inProgress(last, end.Sub(now))
	}
	was := last.Info.Status
	last.SetStatus(common.StatusFailed, fmt.Sprintf("It was %s since %s, and who worked on it has ended. It was taken over.", was, since.UTC().Format(time.RFC3339)))
	if err := o.cfg.Releases.Update(last); err != nil {
		return o.explain("marking the release as failed", err)
	}
	o.log.Warn("a release was taken over from a runner that has ended", "release", o.name, "revision", last.Version, "status", string(was), "since", since)
	return nil
}

// inProgress is the error for a release that somebody works on, for at most the time
// that is left.
func (o *operation) inProgress(r *v1.Release, left time.Duration) error {
	left = cmp.Or(left.Round(time.Second), time.Second)
	return fault.New(fault.Conflict, "HelmOperationInProgress",
		"Operation is already in progress for Helm: the release %s is %s since %s.", o.name, r.Info.Status, r.Info.LastDeployed.UTC().Format(time.RFC3339)).
		At(o.target()).After(left).
		WithFix("wait; if nobody works on it any more, it is taken over in %s. See: helm history %s -n %s", left, o.name, o.namespace)
}
