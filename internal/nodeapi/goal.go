package nodeapi

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
)

// statusLimit is the most that a status report may weigh, in bytes: 20 extensions with their kept log lines.
const statusLimit = 4 << 20

// goal answers with the node's goal state, or 304 when the agent has it.
func (e *Edge) goal(w http.ResponseWriter, r *http.Request, id string) error {
	g, err := e.cfg.Nodes.Goal(r.Context(), id)
	if err != nil {
		return err
	}
	etag := `"` + strconv.FormatInt(g.Revision, 10) + `"`
	w.Header().Set("ETag", etag)
	if match(r.Header.Get("If-None-Match"), etag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	body, err := json.Marshal(g)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
	return nil
}

// match reports whether one of the tags of an If-None-Match header is etag.
func match(header, etag string) bool {
	for tag := range strings.SplitSeq(header, ",") {
		if strings.TrimPrefix(strings.TrimSpace(tag), "W/") == etag {
			return true
		}
	}
	return false
}

// status takes a report.
func (e *Edge) status(w http.ResponseWriter, r *http.Request, id string) error {
	var rep node.StatusReport
	if err := decode(w, r, statusLimit, &rep); err != nil {
		return err
	}
	if err := e.cfg.Nodes.Report(r.Context(), id, rep); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// token answers with a token of one of the identities of the node's pool.
func (e *Edge) token(w http.ResponseWriter, r *http.Request, id string) error {
	if e.cfg.Tokens == nil {
		return fault.New(fault.Unavailable, "NoTokenIssuer", "This server issues no tokens.")
	}
	var req node.TokenRequest
	if err := decode(w, r, bodyLimit, &req); err != nil {
		return err
	}
	if req.Resource == "" {
		return fault.New(fault.Invalid, "ResourceMissing", "A token request names the resource it is for.").At("resource")
	}
	named := 0
	for _, s := range []string{req.ClientID, req.ObjectID, req.ResourceID} {
		if s != "" {
			named++
		}
	}
	if named > 1 {
		return fault.New(fault.Invalid, "IdentityAmbiguous", "A token request names its identity in one way only: clientId, objectId or resourceId.")
	}
	t, err := e.cfg.Tokens.Token(r.Context(), id, req)
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, t)
	return nil
}

// session hands the request to the sessions.
func (e *Edge) session(w http.ResponseWriter, r *http.Request, id string) error {
	if e.cfg.Sessions == nil {
		return fault.New(fault.NotFound, "SessionNotFound", "There is no such session.")
	}
	return e.cfg.Sessions.ServeNode(w, r, id, r.PathValue("id"))
}
