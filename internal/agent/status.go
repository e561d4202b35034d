package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
)

// seenStatus is what a status file said when it was last looked at.
type seenStatus struct {
	path    string    // of the file looked at; a new sequence number has a new file
	stamp   fileStamp // to see that it changed
	status  extension.StatusFile
	there   bool      // the file was there and could be read at least once
	broken  string    // why it cannot be read now
	since   time.Time // when it was first found broken
	useless bool      // it is broken for so long that this is the extension's status
	beat    heartbeatSeen
	watched time.Time // when this file was first looked for
	log     []string  // last lines of the extension's log, from when its status became an error
}

// heartbeatSeen is what a heartbeat file said.
type heartbeatSeen struct {
	status, message string
	at              time.Time // modification time; zero: there is none
}

// fileStamp tells versions of a file apart without reading it.
type fileStamp struct {
	mod  time.Time
	size int64
	ino  any // the file's number, where the system has one: a replaced file may have the same time and size
}

// maxStatusRead bounds what is read of a status file, in bytes. Above
// extension.MaxStatusFile its texts are cut; above this it is not read at all.
const maxStatusRead = 4 << 20

// statusLoop looks at the status files of enabled extensions until ctx ends.
func (a *Agent) statusLoop(ctx context.Context) {
	for sleep(ctx, a.cfg.Timeouts.Poll) {
		if a.look(time.Now()) {
			signal(a.news)
			signal(a.work) // somebody may wait for this extension's success
		}
	}
}

// look reads the status files that changed; true: something did.
func (a *Agent) look(now time.Time) bool {
	type target struct {
		in         *instance
		path, beat string
		logDir     string
		seen       seenStatus
	}
	var targets []target
	a.mu.Lock()
	for _, in := range a.instances {
		if in.handler == nil {
			continue
		}
		t := target{in: in, path: in.handler.statusPath(in.ext.Name, in.ext.Sequence), logDir: in.handler.logDir, seen: in.file}
		if in.handler.commands.ReportHeartbeat {
			t.beat = in.handler.heartbeatPath()
		}
		targets = append(targets, t)
	}
	a.mu.Unlock()
	changed := false
	for _, t := range targets { // files are read without the lock
		next := lookAt(t.seen, t.path, now, a.cfg.Timeouts.Unreadable)
		next.beat = lookAtHeartbeat(t.beat, t.seen.beat)
		news := !sameSaying(t.seen, next)
		failed := news && next.status.Status.Status == extension.StatusError
		if failed {
			next.log = lastWords(t.logDir)
		}
		a.mu.Lock()
		t.in.file = next
		name := t.in.ext.Name
		a.mu.Unlock()
		changed = changed || news
		if failed {
			a.askUpload(name)
		}
	}
	return changed
}

// sameSaying reports whether two looks say the same to a reader.
func sameSaying(x, y seenStatus) bool {
	return x.path == y.path && x.there == y.there && x.useless == y.useless && x.beat.status == y.beat.status &&
		reflect.DeepEqual(x.status, y.status)
}

// lastWords are the last lines of the extension's own newest log, or else of its commands.
func lastWords(logDir string) []string {
	files := logFiles(logDir)
	if len(files) == 0 {
		return nil
	}
	return tailLines(filepath.Join(logDir, files[0]), 0, logLines)
}

// lookAt reads a status file if it changed since seen. A file that cannot be
// read may be half written: what it said before counts until patience is over.
func lookAt(seen seenStatus, path string, now time.Time, patience time.Duration) seenStatus {
	if seen.path != path {
		seen = seenStatus{path: path, watched: now}
	}
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return seen
	}
	if err == nil && stampOf(fi) == seen.stamp && (seen.broken == "" || seen.useless) {
		return seen
	}
	var s extension.StatusFile
	if err == nil {
		s, err = readStatus(path, fi)
	}
	if err != nil {
		seen.broken = err.Error()
		if seen.since.IsZero() {
			seen.since = now
		}
		if now.Sub(seen.since) > patience {
			seen.useless, seen.stamp = true, fileStamp{}
			if fi != nil {
				seen.stamp = stampOf(fi)
			}
		}
		return seen
	}
	seen.stamp, seen.status, seen.there, seen.broken, seen.since, seen.useless = stampOf(fi), s, true, "", time.Time{}, false
	return seen
}

// readStatus reads a status file, which must be a plain file: the agent reads as root what others write.
func readStatus(path string, fi fs.FileInfo) (extension.StatusFile, error) {
	if !fi.Mode().IsRegular() || fi.Size() > maxStatusRead {
		return extension.StatusFile{}, fmt.Errorf("it is no regular file, or over %d bytes", maxStatusRead)
	}
	f, err := os.Open(path)
	if err != nil {
		return extension.StatusFile{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStatusRead))
	if err != nil {
		return extension.StatusFile{}, err
	}
	return extension.ParseStatusFile(data)
}

func lookAtHeartbeat(path string, seen heartbeatSeen) heartbeatSeen {
	if path == "" {
		return heartbeatSeen{}
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > maxStatusRead {
		return heartbeatSeen{}
	}
	if fi.ModTime().Equal(seen.at) {
		return seen
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return seen
	}
	h, err := extension.ParseHeartbeat(data)
	if err != nil {
		return seen // half written: the next look has it whole
	}
	return heartbeatSeen{status: strings.ToLower(h.Status), message: h.Message, at: fi.ModTime()}
}

// statuses are the states of all extensions of the goal state, by name.
func (a *Agent) statuses(now time.Time) []node.ExtensionStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.goal == nil {
		return []node.ExtensionStatus{}
	}
	out := make([]node.ExtensionStatus, 0, len(a.goal.Extensions))
	for _, x := range a.goal.Extensions {
		out = append(out, a.statusOf(x, now))
	}
	slices.SortFunc(out, func(x, y node.ExtensionStatus) int { return strings.Compare(x.Name, y.Name) })
	return out
}

// statusOf is the state of one extension; a.mu is held. A goal state that the
// agent has not dealt with yet shows as transitioning, never as what was before it.
func (a *Agent) statusOf(x node.Extension, now time.Time) node.ExtensionStatus {
	s := node.ExtensionStatus{
		Name: x.Name, Version: x.Version, Sequence: x.Sequence, HandlerState: node.NotInstalled,
		Status: extension.StatusTransitioning, Operation: "Enable", Message: "The extension is not enabled yet.",
	}
	in := a.instances[x.Name]
	if in == nil || in.ext.Version != x.Version || in.ext.Sequence != x.Sequence {
		return s
	}
	if in.handler != nil {
		s.HandlerState = in.handler.state(in.handler.instanceName(x.Name))
	}
	for _, c := range in.certs {
		s.Certificates = append(s.Certificates, c)
	}
	slices.SortFunc(s.Certificates, func(x, y node.Certificate) int { return strings.Compare(x.Secret+"\n"+x.Path, y.Secret+"\n"+y.Path) })
	switch {
	case in.finding != nil:
		s.Status, s.Code, s.Operation, s.Message = extension.StatusError, in.finding.code, in.finding.operation, in.finding.message
		s.Time, s.Log = in.finding.at, in.finding.log
	case in.skipped != "":
		s.Status, s.Code, s.Skipped = extension.StatusError, codeGeneric, in.skipped
		s.Message = fmt.Sprintf("The extension was not started, because the extension %q, on which it depends, did not succeed.", in.skipped)
	case in.enabled != x.Sequence && in.waiting != "":
		s.Message = fmt.Sprintf("The extension waits for the extension %q to succeed.", in.waiting)
	case in.enabled != x.Sequence:
	default:
		fromFile(&s, in.file)
		unresponsive(&s, in, now)
		if s.Status == extension.StatusError {
			s.Log = in.file.log
		}
	}
	return s
}

// fromFile fills in what the status file says. A file that is not there yet
// is transitioning, one that stays unreadable an error.
func fromFile(s *node.ExtensionStatus, f seenStatus) {
	switch {
	case f.useless:
		s.Status, s.Code, s.Operation = extension.StatusError, codeGeneric, "Read status"
		s.Message = "The status file " + f.path + " cannot be used: " + f.broken + "."
	case !f.there:
		s.Status, s.Message = extension.StatusTransitioning, "The extension has not written its status yet ("+f.path+")."
	default:
		st := f.status.Status
		s.Status, s.Code, s.Operation, s.Message, s.Time = st.Status, int(st.Code), st.Operation, st.FormattedMessage.Message, f.status.Time()
		s.Substatus = nil
		for _, sub := range st.Substatus {
			s.Substatus = append(s.Substatus, node.Substatus{Name: sub.Name, Status: sub.Status, Code: int(sub.Code), Message: sub.FormattedMessage.Message})
		}
	}
}

// unresponsive puts the heartbeat over the status: a handler that reports
// heartbeats and has stopped is an error, one that says notready is not done.
func unresponsive(s *node.ExtensionStatus, in *instance, now time.Time) {
	if in.handler == nil || !in.handler.commands.ReportHeartbeat {
		return
	}
	b := in.file.beat
	last := b.at
	if last.Before(in.file.watched) {
		last = in.file.watched // an old file, or none yet
	}
	switch {
	case now.Sub(last) > heartbeatLife:
		s.Status, s.Code, s.Operation = extension.StatusError, codeGeneric, "Heartbeat"
		s.Message = fmt.Sprintf("The extension is unresponsive: no heartbeat since %s.", last.UTC().Format(time.RFC3339))
	case b.status == "notready" && s.Status == extension.StatusSuccess:
		s.Status, s.Message = extension.StatusTransitioning, "The extension is not ready: "+b.message
	}
}
