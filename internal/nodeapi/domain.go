package nodeapi

import (
	"context"
	"crypto/x509"
	"io"
	"net/http"
	"net/url"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// Nodes is what the edge needs of the pools. Every method but Enrol and
// FollowGoals is called with the node as the caller in ctx. Errors are
// *fault.Error; fault.NotFound means that there is no such node any more.
type Nodes interface {
	// Enrol spends a join token and returns the id of the node it enrols: the
	// node that the token was made for, or a new host of the token's pool.
	// keyHash is the hex SHA-256 of the CSR's public key (SubjectPublicKeyInfo).
	// A token that was spent with the same keyHash is accepted again within its
	// lifetime, with the same answer: the first answer may have been lost. With
	// another keyHash it is fault.Denied. req.CSR was checked already.
	Enrol(ctx context.Context, req node.EnrolRequest, keyHash string) (nodeID string, err error)
	// Renew returns nil if the node may have another certificate.
	Renew(ctx context.Context, nodeID, keyHash string) error
	// Goal returns the node's goal state; the revision changes whenever anything in it does.
	Goal(ctx context.Context, nodeID string) (node.GoalState, error)
	// FollowGoals calls fn, one call at a time, for every change of a node's
	// goal state until ctx ends. Calls may be merged; the last one counts.
	FollowGoals(ctx context.Context, fn func(nodeID string, revision int64)) error
	// Report takes what the node says of itself. It may be called with the same report again.
	Report(ctx context.Context, nodeID string, r node.StatusReport) error
}

// Authority is the CA that signs the certificates of agents; *pki.CA is one.
type Authority interface {
	// IssueClient returns the PEM chain, leaf first, of a client certificate for the key of csr.
	IssueClient(commonName string, uris []*url.URL, csr *x509.CertificateRequest, now time.Time, life time.Duration) ([]byte, error)
	// PEM is the CA's certificate. Agents trust it for every name of this server.
	PEM() []byte
}

// Tokens issues tokens of the identities of a node's pool.
type Tokens interface {
	// Token returns a token for the node's pool's identity that req names, or
	// the only one. The codes of its faults reach the agent: IdentityNotFound
	// and MultipleIdentities are answered to the caller in IMDS's words.
	Token(ctx context.Context, nodeID string, req node.TokenRequest) (node.TokenResponse, error)
}

// Packages opens extension packages.
type Packages interface {
	// Open returns the zip with this SHA-256 (lower-case hex), or fault.NotFound.
	Open(ctx context.Context, sha256 string) (io.ReadSeekCloser, error)
}

// Logs keeps the last part of extensions' logs.
type Logs interface {
	// Put replaces what is kept of this file.
	Put(ctx context.Context, nodeID string, up node.LogUpload) error
}

// Sessions is the node's end of interactive sessions.
type Sessions interface {
	// ServeNode upgrades the request of nodeID's agent to a byte stream for
	// session id, which must have been opened for that node.
	ServeNode(w http.ResponseWriter, r *http.Request, nodeID, id string) error
}
