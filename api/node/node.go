// Package node holds the wire types between the server's node edge
// (https://node.DOMAIN, package nodeapi) and the node agent. It is Keyfleet's
// own protocol, over mutual TLS; everything in it is also documented in
// docs/node-protocol.md. It is a leaf.
//
//	GET  /v1/ca           the CA in PEM                   (no client certificate; compare with the hash you were given)
//	POST /v1/enrol        EnrolRequest -> EnrolResponse   (join token, no client certificate)
//	POST /v1/renew        RenewRequest -> RenewResponse
//	GET  /v1/watch        a stream of lines, one goroutine a node: "rev N", "session ID KIND", "logs"
//	                                                      (upload log tails now), "retry SECONDS" (spread the next
//	                                                      connect over so long), "ping"
//	GET  /v1/goal         GoalState (ETag = revision)
//	POST /v1/status       StatusReport -> 204
//	POST /v1/token        TokenRequest -> TokenResponse   (a token of one of the pool's identities)
//	GET  /v1/packages/SHA256                              (the zip)
//	POST /v1/logs         LogUpload -> 204
//	POST /v1/sessions/ID  upgraded to a byte stream: shell
package node

import (
	"encoding/json"
	"time"
)

// EnrolRequest asks for an agent certificate.
type EnrolRequest struct {
	Token     string `json:"token"`               // one-use join token; for pool nodes bound to one node, for hosts to a pool
	Hostname  string `json:"hostname"`            // what the machine calls itself
	CSR       string `json:"csr"`                 // PEM; its subject is ignored, the server decides the name
	Transport string `json:"transport,omitempty"` // PEM of a self-signed RSA certificate to which protected settings are encrypted
	OS        string `json:"os"`                  // "linux", "windows"
	Agent     string `json:"agent"`               // version of the agent
}

// EnrolResponse gives the agent its identity.
type EnrolResponse struct {
	Node        string `json:"node"`        // node id
	Certificate string `json:"certificate"` // PEM chain
	CA          string `json:"ca"`          // PEM of the CA that server and agent certificates come from
}

// RenewRequest asks for the next agent certificate, over the current one.
type RenewRequest struct {
	CSR string `json:"csr"`
}

// RenewResponse is the next certificate.
type RenewResponse struct {
	Certificate string `json:"certificate"`
	CA          string `json:"ca"`
}

// GoalState is what a node should be. It holds no secret in clear.
type GoalState struct {
	Revision   int64       `json:"revision"`             // grows with every change that matters to this node
	Node       string      `json:"node"`                 // node id
	Pool       string      `json:"pool"`                 // resource id; empty for a registered host that no pool uses
	Hosts      []string    `json:"hosts"`                // names that must resolve to the server inside the node
	Audiences  []string    `json:"audiences,omitempty"`  // resources that IMDS may ask tokens for; empty: the server decides
	Identities []Identity  `json:"identities,omitempty"` // the pool's user-assigned identities
	Extensions []Extension `json:"extensions"`           // in no particular order; see DependsOn
	Action     *Action     `json:"action,omitempty"`     // a reboot or reimage that was asked for
	Poll       int         `json:"poll"`                 // seconds between fetches when nothing is heard on the watch
}

// Identity is a managed identity of the pool.
type Identity struct {
	ResourceID string `json:"resourceId"`
	ClientID   string `json:"clientId"`
	ObjectID   string `json:"objectId"`
}

// Extension is one extension that the node must run.
type Extension struct {
	Name               string          `json:"name"`
	Publisher          string          `json:"publisher"`
	Type               string          `json:"type"`
	Version            string          `json:"version"`                     // the package's version, e.g. "3.0.1"
	TypeHandlerVersion string          `json:"typeHandlerVersion"`          // what the pool asked for, e.g. "3.0"
	Package            *Package        `json:"package,omitempty"`           // nil: the server has no such package; Problem says so
	Problem            string          `json:"problem,omitempty"`           // why it cannot be installed
	Settings           json.RawMessage `json:"settings,omitempty"`          // public settings; absent: none
	ProtectedSettings  string          `json:"protectedSettings,omitempty"` // base64 CMS, encrypted to the node's transport certificate
	Sequence           int             `json:"sequence"`                    // grows when the settings change
	DependsOn          []string        `json:"dependsOn,omitempty"`         // names of extensions that must succeed first
	Hint               string          `json:"hint,omitempty"`              // changes when something the extension observes has changed
}

// Package is an extension package to download.
type Package struct {
	SHA256 string `json:"sha256"` // lower-case hex; also its download name
	Size   int64  `json:"size"`
}

// Action is a one-time order; the agent reports its ID when done.
type Action struct {
	ID   string `json:"id"`
	Kind string `json:"kind"` // "reboot", "reimage", "release"
}

// StatusReport is what the agent sees.
type StatusReport struct {
	Revision   int64             `json:"revision"` // goal state that this report is about
	Agent      string            `json:"agent"`    // version
	BootID     string            `json:"bootId"`   // changes when the node starts anew
	Booted     time.Time         `json:"booted"`
	Done       string            `json:"done,omitempty"` // id of the last Action carried out
	Extensions []ExtensionStatus `json:"extensions"`
}

// Handler states, as the VM extension handler contract names them.
const (
	NotInstalled = "NotInstalled"
	Installed    = "Installed"
	Enabled      = "Enabled"
)

// ExtensionStatus is the state of one extension on the node.
type ExtensionStatus struct {
	Name         string        `json:"name"`
	Version      string        `json:"version"`
	Sequence     int           `json:"sequence"`
	HandlerState string        `json:"handlerState"`
	Status       string        `json:"status"`    // transitioning, warning, error, success: of the status file or the agent's own finding
	Code         int           `json:"code"`      // of the status file; for agent findings the contract's 1001..1010
	Message      string        `json:"message"`   // formattedMessage of the status file, or what the agent found
	Operation    string        `json:"operation"` // of the status file
	Time         time.Time     `json:"time"`      // timestampUTC of the status file
	Substatus    []Substatus   `json:"substatus,omitempty"`
	Skipped      string        `json:"skipped,omitempty"` // name of the failed extension because of which this one was not started
	Log          []string      `json:"log,omitempty"`     // last raw lines of the failing command or the extension's log, kept from before it gave up
	Certificates []Certificate `json:"certificates,omitempty"`
}

// Substatus is one substatus of a status file.
type Substatus struct {
	Name    string `json:"name"`
	Status  string `json:"status"`
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// Certificate is a certificate that the agent found delivered by an extension
// that reports it (Keyfleet's hint protocol); other extensions report none.
type Certificate struct {
	Secret  string    `json:"secret"`            // the observed secret URL, as in the settings
	Version string    `json:"version"`           // delivered version
	Path    string    `json:"path"`              // link that consumers read
	Since   time.Time `json:"since"`             // when the link was switched
	Problem string    `json:"problem,omitempty"` // why the last fetch failed; Version may be empty then
}

// TokenRequest asks for a token of one of the pool's identities.
type TokenRequest struct {
	Resource   string `json:"resource"`
	ClientID   string `json:"clientId,omitempty"`
	ObjectID   string `json:"objectId,omitempty"`
	ResourceID string `json:"resourceId,omitempty"`
}

// TokenResponse is the token.
type TokenResponse struct {
	AccessToken string    `json:"accessToken"`
	ClientID    string    `json:"clientId"`
	Resource    string    `json:"resource"`
	NotBefore   time.Time `json:"notBefore"`
	ExpiresOn   time.Time `json:"expiresOn"`
}

// LogUpload brings the last part of an extension's logs to the server.
type LogUpload struct {
	Extension string `json:"extension"`
	File      string `json:"file"`
	Tail      string `json:"tail"` // at most 256 KiB
}

// Error is the body of every error answer of the node edge.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
}
