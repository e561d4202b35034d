package kubernetes

import "time"

// Question asks a manager to look at a cluster for what the documentation's list of
// troubleshooting names. Namespace and what follows are of a connection; they are
// empty where the question is about the extension alone.
type Question struct {
	ID             string `json:"id"`  // of the linker, or of the extension
	UID            string `json:"uid"` // of the question
	Namespace      string `json:"namespace,omitempty"`
	Secret         string `json:"secret,omitempty"`
	ServiceAccount string `json:"serviceAccount,omitempty"`
	ProviderClass  string `json:"secretProviderClass,omitempty"`
}

// Part is a part of a cluster that is looked at.
type Part string

// The parts.
const (
	PartServer      Part = "API server"
	PartNamespaces  Part = "namespaces"
	PartRelease     Part = "Helm release"
	PartJob         Part = "job"
	PartOperator    Part = "operator"
	PartPermissions Part = "permissions"
	PartDesired     Part = "desired state"
	PartObjects     Part = "objects"
	PartConsumers   Part = "consumers"
	PartWebhook     Part = "webhook"
)

// Sight is what a manager saw when it looked for an answer. No value of a Secret is
// in it, but for hashes.
type Sight struct {
	UID string `json:"uid"` // of the question
	// Unseen says why a part could not be looked at; what is said of it here does not
	// count. Without PartServer nothing was seen.
	Unseen map[Part]string `json:"unseen,omitempty"`
	// Namespaces are the phases, "Active" or "Terminating", of sc-system and of the
	// connection's namespace; one that is not there has none.
	Namespaces map[string]string `json:"namespaces,omitempty"`
	Release    *Release          `json:"release,omitempty"`  // nil: there is none
	Job        *Workload         `json:"job,omitempty"`      // nil: sc-job is not there
	JobLog     string            `json:"jobLog,omitempty"`   // its last lines
	Operator   *Workload         `json:"operator,omitempty"` // nil: the Deployment is not there
	Works      bool              `json:"works,omitempty"`    // an operator is at work, by its lease
	Missing    []string          `json:"missing,omitempty"`  // permissions of the manager: "list jobs.batch"
	// Desired is the revision of the connection's desired state; empty: it is not there.
	Desired string          `json:"desired,omitempty"`
	Objects []AppliedObject `json:"objects,omitempty"` // that are there, of those that the question names
	// Consumers are those of the namespace's workloads that name the connection's
	// Secret or ServiceAccount; MoreConsumers counts those beyond them.
	Consumers     []Use `json:"consumers,omitempty"`
	MoreConsumers int   `json:"moreConsumers,omitempty"`
	// Webhook: pods that ask for workload identity get tokens and variables.
	Webhook bool `json:"webhook,omitempty"`
}

// States of workloads.
const (
	WorkloadReady    = "ready" // or, of a Job, complete
	WorkloadNotReady = "not ready"
	WorkloadFailed   = "failed"
)

// Workload is a Deployment or a Job as it was seen.
type Workload struct {
	State   string    `json:"state"`
	Message string    `json:"message,omitempty"` // "Deployment a/b has 0 of 1 pods ready"
	Causes  []Problem `json:"causes,omitempty"`  // why its pods do not start or run, the first one first
}

// Use is a Pod, or a workload that makes Pods, which names a Secret or a ServiceAccount of a
// connection. The label is azure.workload.identity/use: "true".
type Use struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Secret    bool   `json:"secret,omitempty"`  // it names the Secret
	Account   string `json:"account,omitempty"` // serviceAccountName of its pods
	Label     bool   `json:"label,omitempty"`   // on itself
	PodLabel  bool   `json:"podLabel,omitempty"`
	// Owned is set on a Pod that a controller made; Token on one that has the token.
	Owned bool `json:"owned,omitempty"`
	Token bool `json:"token,omitempty"`
}

// Results of findings.
const (
	Success = "success"
	Warning = "warning"
	Failure = "failure"
	Unknown = "unknown" // it could not be looked at
)

// Finding is one line of a diagnosis. Of a success only Layer, Object and Message are set.
type Finding struct {
	Name   string `json:"name"` // of what was looked at: "Helm release"
	Result string `json:"result"`
	Problem
}

// Diagnosis is what was found, in the order in which it is to be mended.
type Diagnosis struct {
	ID       string    `json:"resourceId"`
	Asked    time.Time `json:"asked"`
	Answered time.Time `json:"answered,omitzero"` // by a manager; zero: none did
	Findings []Finding `json:"findings"`
}
