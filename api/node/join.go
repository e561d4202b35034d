package node

// JoinFile is where an agent finds what to enrol with, below /var/lib/waagent.
// The agent removes it once it is enrolled; an enrolled agent that finds one
// tries its own certificate first.
const JoinFile = "keyfleet/join.json"

// Join is the content of JoinFile, mode 0600: it holds a secret.
type Join struct {
	Server string `json:"server"`           // URL of the node host, "https://node.keyfleet.internal:8443"
	CA     string `json:"ca,omitempty"`     // PEM of the CA that the server's certificate must come from
	CAHash string `json:"caHash,omitempty"` // hex SHA-256 of that CA's DER, where the PEM is not at hand
	Token  string `json:"token"`            // one-use join token
}
