package keyfleet

import "time"

// Deliveries is the answer of GET /keyfleet/v1/vaults/{vault}/certificates/{name}/deliveries:
// where a certificate is.
type Deliveries struct {
	Vault       string     `json:"vault"`
	Certificate string     `json:"certificate"`
	Version     string     `json:"version"` // newest
	Issued      time.Time  `json:"issued"`  // when that version was stored
	Nodes       []Delivery `json:"nodes"`
}

// Delivery is a certificate's version on a node.
type Delivery struct {
	Pool      string    `json:"pool"` // resource id
	Node      string    `json:"node"`
	Extension string    `json:"extension"`
	Secret    string    `json:"secret"` // URL, as the extension's settings write it
	Version   string    `json:"version"`
	Path      string    `json:"path"`              // link that consumers read
	Since     time.Time `json:"since"`             // when the link was switched, by the node's clock
	Problem   string    `json:"problem,omitempty"` // why the last fetch failed
	Seconds   float64   `json:"seconds,omitempty"` // from Issued to Since, where the node has the newest version
}
