package servicelinker

import "keyfleet.dev/keyfleet/api/kubernetes"

// DryrunType is the resource type of dry runs.
const DryrunType = "Microsoft.ServiceLinker/dryruns"

// Dryrun says what the PUT of a connection would do (DryrunResource). It is kept
// for a day.
type Dryrun struct {
	ID         string           `json:"id,omitempty"`
	Name       string           `json:"name,omitempty"`
	Type       string           `json:"type,omitempty"`
	Properties DryrunProperties `json:"properties"`
}

// DryrunProperties are what was asked and what was found.
type DryrunProperties struct {
	Parameters          DryrunParameters     `json:"parameters"`
	ProvisioningState   string               `json:"provisioningState,omitempty"` // read-only
	PrerequisiteResults []PrerequisiteResult `json:"prerequisiteResults"`         // read-only: what is missing; empty: nothing
	OperationPreviews   []OperationPreview   `json:"operationPreviews"`           // read-only: what would be done
	Plan                *Plan                `json:"plan,omitempty"`              // own, read-only
}

// DryrunParameters are the connection that is asked about. What is shown of them has
// no secret.
type DryrunParameters struct {
	ActionName string `json:"actionName"` // createOrUpdate
	// LinkerName is own: the name of the connection; empty: that of the dry run.
	LinkerName string `json:"linkerName,omitempty"`
	LinkerProperties
}

// PrerequisiteResult is one reason for which the PUT would be refused, or would not
// succeed.
type PrerequisiteResult struct {
	Type    string `json:"type"` // basicError, permissionsMissing
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	// Scope, Permissions and RecommendedRole are those of permissionsMissing.
	Scope           string   `json:"scope,omitempty"`
	Permissions     []string `json:"permissions,omitempty"`
	RecommendedRole string   `json:"recommendedRole,omitempty"`
	// What follows is own: what it is about, what mends it, and the HTTP status of
	// such a refusal; permissionsMissing has code and message too.
	Target string `json:"target,omitempty"`
	Fix    string `json:"fix,omitempty"`
	Status int    `json:"status,omitempty"`
}

// OperationPreview is one thing that the PUT would do.
type OperationPreview struct {
	Name          string `json:"name"`
	OperationType string `json:"operationType"` // configConnection, configAuth
	Description   string `json:"description"`
	Action        string `json:"action"` // that one has to be allowed
	Scope         string `json:"scope"`
}

// Plan is all that would become of the connection. It is Keyfleet's own.
type Plan struct {
	Connection  string          `json:"connection"` // resource id
	Change      Change          `json:"change"`
	Cluster     PlannedCluster  `json:"cluster"`
	Extension   string          `json:"extension,omitempty"` // install, present
	Objects     []PlannedObject `json:"objects,omitempty"`
	Environment []PlannedKey    `json:"environment,omitempty"`
	Login       *PlannedLogin   `json:"login,omitempty"`
	Secret      *PlannedSecret  `json:"secret,omitempty"`
	Grants      []PlannedGrant  `json:"grants,omitempty"`
	Restart     Restart         `json:"restart"`
}

// Change says what becomes of something.
type Change string

// The changes.
const (
	Create    Change = "create"
	Modify    Change = "change"
	Unchanged Change = "unchanged"
)

// PlannedCluster is the cluster as it is now.
type PlannedCluster struct {
	Answers bool   `json:"answers"`
	Managed bool   `json:"managed"`          // a manager looks after it
	Reason  string `json:"reason,omitempty"` // why it does not answer
	Busy    string `json:"busy,omitempty"`   // what changes it; the connection waits for its end
}

// PlannedObject is an object of the cluster.
type PlannedObject struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Change    Change `json:"change"`
	Shared    bool   `json:"shared,omitempty"` // with other connections
}

// PlannedKey is a variable of the workload.
type PlannedKey struct {
	Name   string `json:"name"`
	Secret bool   `json:"secret"`
	Value  string `json:"value,omitempty"` // of a secret: never
}

// PlannedLogin is a login that Keyfleet makes on a server.
type PlannedLogin struct {
	Server     string `json:"server"` // resource id
	Role       string `json:"role"`
	User       string `json:"user"`
	Privileges string `json:"privileges"` // in words
	Change     Change `json:"change"`
}

// PlannedSecret is where the credential is kept.
type PlannedSecret struct {
	Vault       string `json:"keyVaultId"`
	VaultChange Change `json:"keyVaultChange"` // create: Keyfleet makes the vault
	Name        string `json:"keyVaultSecretName"`
	Change      Change `json:"change"` // change: a new version
}

// PlannedGrant is something that the connection is given in Keyfleet itself.
type PlannedGrant struct {
	Kind   string `json:"kind"` // federated credential, access policy
	On     string `json:"on"`   // resource id
	To     string `json:"to"`   // subject, or object id
	Change Change `json:"change"`
	Shared bool   `json:"shared,omitempty"` // another connection has it too
}

// Restart says whether workloads have to be started anew to see the change.
type Restart struct {
	Needed bool `json:"needed"`
	// Consumers are the pods with older values that were last reported.
	Consumers []kubernetes.Consumer `json:"consumers,omitempty"`
}

// GenerateConfigurations is the body of generateConfigurations (ConfigurationInfo).
type GenerateConfigurations struct {
	DeleteOrUpdateBehavior   string            `json:"deleteOrUpdateBehavior,omitempty"` // of no meaning: nothing is changed
	Action                   string            `json:"action,omitempty"`
	CustomizedKeys           map[string]string `json:"customizedKeys,omitempty"`
	AdditionalConfigurations map[string]string `json:"additionalConfigurations,omitempty"`
}
