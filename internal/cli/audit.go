package cli

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

func (t *tool) auditView() view[object] {
	return view[object]{
		name: func(o object) string { return o.str("seq") },
		columns: []column[object]{
			t.timeAt("Time", "time"), field("Outcome", "outcome"),
			derived("Who", func(o object) string {
				return orElse(o.str("name"), orElse(o.str("clientId"), o.str("objectId")))
			}),
			field("Action", "action"), field("Resource", "resource"), field("Detail", "detail"), field("Reason", "reason"), field("Request", "requestId"),
		},
	}
}

func (t *tool) auditCommand() *cobra.Command {
	return t.noun("audit", "Who did what", t.auditList(), t.auditVerify())
}

func (t *tool) auditList() *cobra.Command {
	var since time.Duration
	var principal, action, resource, outcome, requestID string
	var limit int
	c := t.verb("list", "List audit records, the newest last", `
keyfleet audit list --since 1h --outcome denied
keyfleet audit list --resource prod1/secrets/web --action 'secrets/*'`, cobra.NoArgs, func(ctx context.Context, _ []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		q := url.Values{}
		for name, v := range map[string]string{"principal": principal, "action": action, "resource": resource, "outcome": outcome, "request": requestID} {
			if v != "" {
				q.Set(name, v)
			}
		}
		if since != 0 {
			q.Set("since", t.now().Add(-since).UTC().Format(time.RFC3339))
		}
		if limit != 0 {
			q.Set("limit", strconv.Itoa(limit))
		}
		req := request(http.MethodGet, c.ARM("/keyfleet/v1/audit"), "", nil)
		req.Query = q
		all, err := client.List[object](ctx, c, req)
		if err != nil {
			return err
		}
		return many(t, all, t.auditView())
	})
	f := c.Flags()
	f.DurationVar(&since, "since", 0, "only of this last time, for instance 1h")
	f.StringVar(&principal, "principal", "", "object id, client id or name")
	f.StringVar(&action, "action", "", "action; * stands for any run of characters")
	f.StringVar(&resource, "resource", "", "the resource, or what it lies under")
	f.StringVar(&outcome, "outcome", "", "allowed or denied")
	f.StringVar(&requestID, "request", "", "request or correlation id")
	f.IntVar(&limit, "limit", 0, "at most so many, the newest (default 100, at most 1000)")
	return c
}

// auditFiles checks audit files without a server and without its code: whoever
// doubts the server need not trust what it says of itself.
//
// A line is a JSON object that ends with its hash, the SHA-256 of the bytes
// before that member; "prev" is the hash of the line before:
//
//	{"seq":7,"prev":"9c...","record":{...},"hash":"41..."}
type auditFiles struct {
	First int64  `json:"first"` // number of the first line
	Last  int64  `json:"last"`
	Lines int64  `json:"lines"`
	Hash  string `json:"hash"` // of the last line
}

// hashMember is what stands before a line's hash.
const hashMember = `,"hash":"`

// next checks a line against the one before it.
func (a *auditFiles) next(line []byte) error {
	i := bytes.LastIndex(line, []byte(hashMember))
	if i < 0 || len(line) < i+len(hashMember)+len(`"}`) || !bytes.HasSuffix(line, []byte(`"}`)) {
		return errors.New("the line does not end with its hash")
	}
	hash := string(line[i+len(hashMember) : len(line)-2])
	if sum := sha256.Sum256(line[:i]); hash != hex.EncodeToString(sum[:]) {
		return errors.New("the line was altered: its hash does not fit")
	}
	var e struct {
		Seq  int64  `json:"seq"`
		Prev string `json:"prev"`
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return fmt.Errorf("the line is no JSON: %w", err)
	}
	switch {
	case a.Lines > 0 && e.Seq != a.Last+1:
		return fmt.Errorf("line %d follows line %d: lines are missing, doubled or out of order", e.Seq, a.Last)
	case a.Lines > 0 && e.Prev != a.Hash, e.Seq == 1 && strings.Trim(e.Prev, "0") != "":
		return fmt.Errorf("line %d does not continue the chain of the line before", e.Seq)
	}
	if a.Lines == 0 {
		a.First = e.Seq
	}
	a.Last, a.Hash, a.Lines = e.Seq, hash, a.Lines+1
	return nil
}

// maxAuditLine bounds one line of an audit file.
const maxAuditLine = 1 << 20

// read checks the lines of one file.
func (a *auditFiles) read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading the audit file: %w", err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxAuditLine)
	for n := 1; lines.Scan(); n++ {
		if err := a.next(lines.Bytes()); err != nil {
			return &cliError{
				code: "AuditChainBroken", message: fmt.Sprintf("%s, line %d: %s.", path, n, err), exit: client.ExitFailed,
				fix: "keep the files as they are and compare them with a backup",
			}
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading the audit file: %w", err)
	}
	return nil
}

func (t *tool) auditVerify() *cobra.Command {
	c := t.verb("verify FILE...", "Check that audit files are whole: no line altered, cut out or moved", "keyfleet audit verify DIR/audit*.jsonl", cobra.MinimumNArgs(1), func(_ context.Context, args []string) error {
		files := slices.Clone(args)
		slices.SortFunc(files, byFirstLine)
		var a auditFiles
		for _, f := range files {
			if err := a.read(f); err != nil {
				return err
			}
		}
		return changed(t, a, view[auditFiles]{
			name: func(a auditFiles) string { return a.Hash },
			columns: []column[auditFiles]{
				{head: "First", cell: func(a auditFiles) string { return strconv.FormatInt(a.First, 10) }},
				{head: "Last", cell: func(a auditFiles) string { return strconv.FormatInt(a.Last, 10) }},
				{head: "Hash", cell: func(a auditFiles) string { return a.Hash }},
			},
		}, "The chain is whole: %s, %d to %d; the last hash is %s.", plural(int(a.Lines), "line"), a.First, a.Last, a.Hash)
	})
	c.Long = `Check that audit files of a server are whole: no line altered, cut out or moved.
All files are named together, in any order. The check needs no server. A file that
was cut at its end cannot be told from a shorter one; compare the last line with
what "keyfleet audit list" shows.`
	return c
}

// byFirstLine orders audit files: full ones carry the number of their last line
// in their names, the live one has none and comes last.
func byFirstLine(a, b string) int {
	return cmp.Compare(lastLineOf(a), lastLineOf(b))
}

func lastLineOf(path string) int64 {
	name := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	n, err := strconv.ParseInt(name[strings.LastIndexByte(name, '-')+1:], 10, 64)
	if err != nil {
		return math.MaxInt64
	}
	return n
}
