// Package nodes is the part of the REST edge that brings a person to a node:
// a shell on it, its extensions' logs, and why it is not idle. It is
// Keyfleet's own, on the arm host, under the resource id of the pool.
//
//	POST /keyfleet/v1/{pool id}/nodes/{node}/shell      101: frames of api/node, see node.SessionProtocol
//	GET  /keyfleet/v1/{pool id}/nodes/{node}/logs       ?extension=NAME
//	GET  /keyfleet/v1/{pool id}/nodes/{node}/explain
//
// Idea: the caller is checked and recorded against the pool; then the node's
// agent is called over the connection that it holds anyway. Nothing listens on
// a node, and no key of a node is handed out.
//
// Invariant: who gets a shell is decided by the role assignments on the pool,
// before the node hears of it; the record names caller, pool and node.
//
// Consequence for the operator: revoking a role ends the way in. The built-in
// roles other than Owner have none: a shell on a node sees its certificates.
package nodes

import (
	"context"
	"net"
	"net/http"
	"reflect"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Config is what the routes need. Gate and AgentOf must be set.
type Config struct {
	Gate *access.Gate
	// AgentOf returns the name under which a node's agent is connected: the
	// node's own id, or the id of the joined host that is the node. A
	// fault.NotFound means that the pool has no such node.
	AgentOf  func(ctx context.Context, poolID, nodeID string) (string, error)
	Sessions Sessions // nil: there are no shells
	Logs     Logs     // nil: no logs are kept
	// AskLogs tells an agent to send its logs now; false: it is not connected. nil: never asked.
	AskLogs func(agentID string) bool
	// Explain says why a node is as it is; it checks and records by itself. nil: there is none.
	Explain func(ctx context.Context, poolID, nodeID string) (any, error)
}

// Sessions opens sessions with agents.
type Sessions interface {
	// Open returns a function that passes bytes between the caller and the
	// agent until one of them ends, once the agent has come.
	Open(ctx context.Context, agentID, kind string) (join func(caller net.Conn), err error)
}

// Logs has what agents have sent of their logs.
type Logs interface {
	// List returns the last part of the logs of one extension, or of all for "".
	List(ctx context.Context, agentID, extension string) ([]node.LogUpload, error)
}

const prefix = "/keyfleet/v1/subscriptions/{subscription}/resourcegroups/{group}/providers/microsoft.batch/batchaccounts/{account}/pools/{pool}/nodes/{node}"

// Routes returns the rows of the route table.
func Routes(cfg Config) []azureapi.Route {
	e := &edge{cfg: cfg}
	return []azureapi.Route{
		{Surface: azureapi.ARM, Method: http.MethodPost, Path: prefix + "/shell", Action: "Keyfleet/nodes/shell/action", Handle: e.shell},
		{Surface: azureapi.ARM, Method: http.MethodGet, Path: prefix + "/logs", Action: "Keyfleet/nodes/logs/read", Handle: e.logs},
		{Surface: azureapi.ARM, Method: http.MethodGet, Path: prefix + "/explain", Action: "Microsoft.Batch/batchAccounts/pools/read", Handle: e.explain},
	}
}

type edge struct{ cfg Config }

// target takes pool and node from the path.
func target(r *azureapi.Request) (poolID, nodeID string) {
	poolID = "/subscriptions/" + r.Param("subscription") + "/resourceGroups/" + r.Param("group") +
		"/providers/Microsoft.Batch/batchAccounts/" + r.Param("account") + "/pools/" + r.Param("pool")
	return poolID, strings.ToLower(r.Param("node"))
}

// agent checks and records the caller, then finds the node's agent.
func (e *edge) agent(r *azureapi.Request, action string) (string, error) {
	poolID, nodeID := target(r)
	err := e.cfg.Gate.Read(r.Context(), access.Op{Action: action, Resource: poolID, Detail: "node " + nodeID})
	if err != nil {
		return "", err
	}
	return e.cfg.AgentOf(r.Context(), poolID, nodeID)
}

func (e *edge) shell(r *azureapi.Request) (*azureapi.Reply, error) {
	agentID, err := e.agent(r, "Keyfleet/nodes/shell/action")
	if err != nil {
		return nil, err
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), node.SessionProtocol) || r.ProtoMajor != 1 {
		return nil, fault.New(fault.Invalid, "UpgradeRequired", "A shell needs an HTTP/1.1 request with the headers Connection: Upgrade and Upgrade: %s.", node.SessionProtocol).
			WithFix("keyfleet node shell POOL NODE")
	}
	if e.cfg.Sessions == nil {
		return nil, fault.New(fault.Unavailable, "NoSessions", "This server offers no shells on nodes.")
	}
	join, err := e.cfg.Sessions.Open(r.Context(), agentID, "shell")
	if err != nil {
		return nil, err
	}
	return &azureapi.Reply{Protocol: node.SessionProtocol, Upgrade: join}, nil
}

// The wait for logs that an agent was asked for.
const (
	logsWait = 1500 * time.Millisecond // at most: what is kept is answered when nothing newer came
	logsLook = 50 * time.Millisecond   // between looks
)

// logList is the answer of the logs route.
type logList struct {
	Value []node.LogUpload `json:"value"`
}

func (e *edge) logs(r *azureapi.Request) (*azureapi.Reply, error) {
	agentID, err := e.agent(r, "Keyfleet/nodes/logs/read")
	if err != nil {
		return nil, err
	}
	answer := logList{Value: []node.LogUpload{}}
	if e.cfg.Logs == nil {
		return azureapi.OK(answer), nil
	}
	extension := r.URL.Query().Get("extension")
	kept, err := e.cfg.Logs.List(r.Context(), agentID, extension)
	if err != nil {
		return nil, err
	}
	if e.cfg.AskLogs != nil && e.cfg.AskLogs(agentID) {
		if kept, err = e.newer(r.Context(), agentID, extension, kept); err != nil {
			return nil, err
		}
	}
	answer.Value = append(answer.Value, kept...)
	return azureapi.OK(answer), nil
}

// newer looks until the kept logs differ from old, or the wait is over.
func (e *edge) newer(ctx context.Context, agentID, extension string, old []node.LogUpload) ([]node.LogUpload, error) {
	look := time.NewTicker(logsLook)
	defer look.Stop()
	for late := time.After(logsWait); ; {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-late:
			return old, nil
		case <-look.C:
		}
		now, err := e.cfg.Logs.List(ctx, agentID, extension)
		if err != nil || !reflect.DeepEqual(now, old) {
			return now, err
		}
	}
}

func (e *edge) explain(r *azureapi.Request) (*azureapi.Reply, error) {
	poolID, nodeID := target(r)
	if e.cfg.Explain == nil {
		return nil, fault.New(fault.Unavailable, "NoExplanation", "This server explains no nodes.")
	}
	why, err := e.cfg.Explain(r.Context(), poolID, nodeID)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(why), nil
}
