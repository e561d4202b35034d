package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// settleFor is how long a report waits for further news of the same moment.
const settleFor = 20 * time.Millisecond

// reportLoop reports the node's state whenever it changed, and every 30 s,
// until ctx ends. A report that cannot be sent is not kept: the next one is newer.
func (a *Agent) reportLoop(ctx context.Context) {
	var last []byte
	var sent time.Time
	failures := 0
	for {
		wait := time.Until(sent.Add(a.cfg.Timeouts.Report))
		if failures > 0 {
			wait = retryAfter(failures-1, 500*time.Millisecond, 30*time.Second, 0.5+spread()/2)
		}
		t := time.NewTimer(max(wait, 0))
		select {
		case <-a.news:
			sleep(ctx, settleFor)
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
		r, text := a.report(time.Now())
		if r == nil {
			sent = time.Now()
			continue
		}
		if failures > 0 || !bytes.Equal(text, last) || time.Since(sent) >= a.cfg.Timeouts.Report {
			if err := a.sendReport(ctx, r); err != nil {
				failures++
				a.cfg.Log.Debug("the report could not be sent", "error", err, "failures", failures)
				continue
			}
			last, sent, failures = text, time.Now(), 0
		}
		a.upload(ctx)
	}
}

// report is the present state and its JSON; nil before there is a goal state.
func (a *Agent) report(now time.Time) (*node.StatusReport, []byte) {
	a.mu.Lock()
	g, action := a.goal, a.action
	a.mu.Unlock()
	if g == nil {
		return nil, nil
	}
	r := &node.StatusReport{Revision: g.Revision, Agent: a.cfg.Version, BootID: a.bootID, Booted: a.booted, Extensions: a.statuses(now)}
	if action.Done {
		r.Done = action.ID
	}
	text, err := json.Marshal(r)
	if err != nil {
		a.cfg.Log.Error("the report cannot be encoded", "error", err)
		return nil, nil
	}
	return r, text
}

func (a *Agent) sendReport(ctx context.Context, r *node.StatusReport) error {
	return effect.Do("send report", func() error {
		_, err := a.srv.do(ctx, http.MethodPost, "/v1/status", nil, r, nil)
		return err
	})
}

// maxLogFiles is how many files of an extension's log folder are uploaded.
const maxLogFiles = 8

// askUpload asks for the extension's logs to be uploaded after the next report.
func (a *Agent) askUpload(name string) {
	a.mu.Lock()
	a.uploads[name] = true
	a.mu.Unlock()
	signal(a.news)
}

// askLogs asks for the logs of all extensions to be uploaded now.
func (a *Agent) askLogs() {
	a.mu.Lock()
	for name := range a.instances {
		a.uploads[name] = true
	}
	a.mu.Unlock()
	signal(a.news)
}

// upload sends the last part of the logs that were asked for. What fails is
// left: the next failure or request brings it.
func (a *Agent) upload(ctx context.Context) {
	a.mu.Lock()
	dirs := map[string]string{}
	for name := range a.uploads {
		if in := a.instances[name]; in != nil && checkNames(in.ext) == nil {
			dirs[name] = a.handler(handlerName(in.ext), in.ext.Version).logDir
		}
	}
	clear(a.uploads)
	a.mu.Unlock()
	for name, dir := range dirs {
		for _, file := range logFiles(dir) {
			text, err := tail(filepath.Join(dir, file), 0)
			if err != nil || len(text) == 0 {
				continue
			}
			up := node.LogUpload{Extension: name, File: file, Tail: strings.ToValidUTF8(string(text), "?")}
			err = effect.Do("upload log", func() error {
				_, err := a.srv.do(ctx, http.MethodPost, "/v1/logs", nil, up, nil)
				return err
			})
			if err != nil {
				a.cfg.Log.Debug("a log could not be uploaded", "extension", name, "file", file, "error", err)
			}
		}
	}
}

// logForm is the form of names of log files that the server keeps.
var logForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._ -]{0,127}$`)

// logFiles are the plain files of a log folder: the extension's own first,
// newest first, and the log of its commands last.
func logFiles(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	type file struct {
		name string
		mod  time.Time
	}
	var files []file
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !fi.Mode().IsRegular() || !logForm.MatchString(e.Name()) || e.Name() == commandLog {
			continue
		}
		files = append(files, file{e.Name(), fi.ModTime()})
	}
	slices.SortFunc(files, func(x, y file) int { return y.mod.Compare(x.mod) })
	var out []string
	for _, f := range files[:min(len(files), maxLogFiles-1)] {
		out = append(out, f.name)
	}
	if exists(filepath.Join(dir, commandLog)) {
		out = append(out, commandLog)
	}
	return out
}
