package kubernetes

import (
	"time"

	"keyfleet.dev/keyfleet/api/arm"
)

// SSHAccess is how rotateClusterCertificates reaches the machines of a cluster. It is
// Keyfleet's own. PrivateKey and KnownHosts are write-only.
type SSHAccess struct {
	Host       string `json:"host"` // of a control plane node, "host" or "host:port"
	User       string `json:"user"`
	PrivateKey string `json:"privateKey,omitempty"` // PEM, without a passphrase
	KnownHosts string `json:"knownHosts,omitempty"` // as of OpenSSH; the host and every node
}

// RotationOptions is the body of rotateClusterCertificates, which Azure's has not. The
// zero value is Azure's: everything.
type RotationOptions struct {
	Only        []string `json:"only,omitempty"` // what to rotate, in the words of rotate-certs --only
	Soak        string   `json:"soak,omitempty"` // longest wait until the old is unused: "10m"
	RestartPods bool     `json:"restartPods,omitempty"`
	Complete    bool     `json:"complete,omitempty"` // retire the old although it is in use
}

// Rotation is the last rotation of a cluster's certificates. It is Keyfleet's own, a
// part of the cluster and of the operation.
type Rotation struct {
	State      string     `json:"state,omitempty"` // Running, Succeeded, Failed
	Started    time.Time  `json:"started,omitzero"`
	Ended      time.Time  `json:"ended,omitzero"`
	Run        string     `json:"run,omitempty"` // its name in the journal
	Phase      string     `json:"phase,omitempty"`
	Node       string     `json:"node,omitempty"`
	Step       string     `json:"step,omitempty"` // the last that is done
	Done       int        `json:"stepsDone"`
	Steps      int        `json:"steps"`
	Percent    int        `json:"percent"`
	Waiting    string     `json:"waiting,omitempty"`
	NoReturn   bool       `json:"noReturnPassed"`
	Kubeconfig string     `json:"kubeconfig,omitempty"` // "accepted", or why the registered one is not renewed
	Error      *arm.Error `json:"error,omitempty"`
}

// RotationOperation is the state of the operation.
type RotationOperation struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	ResourceID string     `json:"resourceId"`
	Status     string     `json:"status"` // InProgress, Succeeded, Failed
	StartTime  time.Time  `json:"startTime"`
	EndTime    time.Time  `json:"endTime,omitzero"`
	Percent    int        `json:"percentComplete"`
	Error      *arm.Error `json:"error,omitempty"`
	Properties Rotation   `json:"properties"`
}
