package servicelinker

import (
	"time"

	"keyfleet.dev/keyfleet/api/kubernetes"
)

// Type is the resource type of connections.
const Type = "Microsoft.ServiceLinker/linkers"

// Linker is a connection (LinkerResource).
type Linker struct {
	ID         string           `json:"id,omitempty"`
	Name       string           `json:"name,omitempty"`
	Type       string           `json:"type,omitempty"`
	Properties LinkerProperties `json:"properties"`
}

// LinkerProperties are what a connection is. Members that are Keyfleet's own say so.
type LinkerProperties struct {
	TargetService          TargetService       `json:"targetService"`
	AuthInfo               AuthInfo            `json:"authInfo"`
	ClientType             string              `json:"clientType,omitempty"` // empty: none
	Scope                  string              `json:"scope,omitempty"`      // namespace; empty: default
	SecretStore            *SecretStore        `json:"secretStore,omitempty"`
	PublicNetworkSolution  *NetworkSolution    `json:"publicNetworkSolution,omitempty"` // read and ignored
	ConfigurationInfo      *ConfigurationInfo  `json:"configurationInfo,omitempty"`
	ProvisioningState      string              `json:"provisioningState,omitempty"`      // read-only
	KubernetesResourceName *ResourceNames      `json:"kubernetesResourceName,omitempty"` // read-only, as the command line of Azure shows it
	Problem                *kubernetes.Problem `json:"problem,omitempty"`                // own, read-only: why the state is not Succeeded
	Waiting                string              `json:"waiting,omitempty"`                // own, read-only: for what
	Credential             *Credential         `json:"credential,omitempty"`             // own, read-only
	Delivered              *Delivered          `json:"delivered,omitempty"`              // own, read-only
}

// TargetService is what is connected to.
type TargetService struct {
	Type     string `json:"type"` // AzureResource, ConfluentBootstrapServer, ConfluentSchemaRegistry, SelfHostedServer
	ID       string `json:"id,omitempty"`
	Endpoint string `json:"endpoint,omitempty"`
	// ResourceProperties are those of Key Vault and App Configuration.
	ResourceProperties *ResourceProperties `json:"resourceProperties,omitempty"`
	// Target is own: the word of the command line, where the type of the id does not say it.
	Target string `json:"target,omitempty"`
	// Values are own: what the target is described by, where the id does not say it.
	Values map[string]string `json:"values,omitempty"`
}

// ResourceProperties ask for a way to connect.
type ResourceProperties struct {
	Type                           string `json:"type"`
	ConnectAsKubernetesCSIDriver   bool   `json:"connectAsKubernetesCsiDriver,omitempty"`
	ConnectWithKubernetesExtension bool   `json:"connectWithKubernetesExtension,omitempty"`
	// Objects are own: what the CSI driver brings, key of the Secret -> secret or certificate of the vault.
	Objects map[string]string `json:"objects,omitempty"`
}

// AuthInfo is how a workload proves itself. Secrets are write-only.
type AuthInfo struct {
	AuthType       string      `json:"authType"` // secret, servicePrincipalSecret, userAssignedIdentity
	AuthMode       string      `json:"authMode,omitempty"`
	Name           string      `json:"name,omitempty"`
	SecretInfo     *SecretInfo `json:"secretInfo,omitempty"`
	ClientID       string      `json:"clientId,omitempty"`
	PrincipalID    string      `json:"principalId,omitempty"`
	Secret         string      `json:"secret,omitempty"`
	SubscriptionID string      `json:"subscriptionId,omitempty"`
	Roles          []string    `json:"roles,omitempty"`
	UserName       string      `json:"userName,omitempty"`
	// Identity is own: the resource id of the managed identity, instead of its client id.
	Identity string `json:"identity,omitempty"`
}

// SecretInfo is a secret, or where it is. Nothing: Keyfleet makes it (own).
type SecretInfo struct {
	SecretType string `json:"secretType"` // rawValue, keyVaultSecretUri, keyVaultSecretReference
	Value      string `json:"value,omitempty"`
	Name       string `json:"name,omitempty"`
	Version    string `json:"version,omitempty"`
}

// SecretStore is the vault for the credential.
type SecretStore struct {
	KeyVaultID         string `json:"keyVaultId,omitempty"`
	KeyVaultSecretName string `json:"keyVaultSecretName,omitempty"`
}

// NetworkSolution is of no meaning here.
type NetworkSolution struct {
	DeleteOrUpdateBehavior string         `json:"deleteOrUpdateBehavior,omitempty"`
	Action                 string         `json:"action,omitempty"`
	FirewallRules          map[string]any `json:"firewallRules,omitempty"`
}

// ConfigurationInfo says how the variables are named.
type ConfigurationInfo struct {
	DeleteOrUpdateBehavior string            `json:"deleteOrUpdateBehavior,omitempty"`
	Action                 string            `json:"action,omitempty"`
	CustomizedKeys         map[string]string `json:"customizedKeys,omitempty"`
}

// ResourceNames are the objects of a connection in its namespace.
type ResourceNames struct {
	Secret              string `json:"secret,omitempty"`
	ServiceAccount      string `json:"serviceAccount,omitempty"`
	SecretProviderClass string `json:"secretProviderClass,omitempty"`
}

// Credential says which login was made or given, and where its secret is.
type Credential struct {
	User    string    `json:"user,omitempty"`
	Made    bool      `json:"made"`
	Vault   string    `json:"keyVaultId,omitempty"`
	Secret  string    `json:"keyVaultSecretName,omitempty"`
	Version string    `json:"version,omitempty"`
	Created time.Time `json:"created,omitzero"`
}

// Delivered says what is in the cluster, as it was seen.
type Delivered struct {
	Time      time.Time                  `json:"time,omitzero"`
	Objects   []kubernetes.AppliedObject `json:"objects,omitempty"`
	Repaired  int                        `json:"repaired,omitempty"`
	Consumers []kubernetes.Consumer      `json:"consumers,omitempty"` // that run with old values
	// Proven is when a login with what was delivered last succeeded, and Took how many milliseconds it took.
	Proven time.Time `json:"proven,omitzero"`
	Took   int64     `json:"tookMilliseconds,omitempty"`
}

// SourceConfigurations is the answer of listConfigurations.
type SourceConfigurations struct {
	Configurations []SourceConfiguration `json:"configurations"`
}

// SourceConfiguration is a variable. Values of credentials are empty.
type SourceConfiguration struct {
	Name        string `json:"name"`
	Value       string `json:"value"`
	ConfigType  string `json:"configType,omitempty"` // Default
	Description string `json:"description,omitempty"`
}

// OperationStatus is the state of a long operation.
type OperationStatus struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	ResourceID string    `json:"resourceId,omitempty"`
	Status     string    `json:"status"` // Accepted, Deleting, Succeeded, Failed
	StartTime  time.Time `json:"startTime,omitzero"`
	EndTime    time.Time `json:"endTime,omitzero"`
	Properties any       `json:"properties,omitempty"`
	Error      any       `json:"error,omitempty"`
}

// Server is a registered server: PostgreSQL and MySQL as flexible servers, Redis,
// and RabbitMQ as a type of Keyfleet's own.
type Server struct {
	ID         string            `json:"id,omitempty"`
	Name       string            `json:"name,omitempty"`
	Type       string            `json:"type,omitempty"`
	Location   string            `json:"location"`
	Tags       map[string]string `json:"tags,omitempty"`
	Properties ServerProperties  `json:"properties"`
}

// ServerProperties say how a server is reached.
type ServerProperties struct {
	FQDN          string `json:"fullyQualifiedDomainName"` // or an address, as workloads reach it
	Administrator string `json:"administratorLogin"`
	Password      string `json:"administratorLoginPassword,omitempty"` // write-only
	State         string `json:"state,omitempty"`                      // read-only: Ready, as it was at Checked
	// What follows is own.
	Port       int       `json:"port,omitempty"`
	Reach      string    `json:"keyfleetEndpoint,omitempty"` // host:port for Keyfleet, where that differs
	Management string    `json:"managementEndpoint,omitempty"`
	Plain      bool      `json:"disableTls,omitempty"`
	CA         string    `json:"certificateAuthority,omitempty"` // PEM
	Checked    time.Time `json:"checked,omitzero"`               // read-only
	Warnings   []string  `json:"warnings,omitempty"`             // read-only
}

// ValidateResult is the answer of validateLinker (ValidateOperationResult).
type ValidateResult struct {
	ResourceID string               `json:"resourceId"`
	Status     string               `json:"status"`
	Properties ValidationProperties `json:"properties"`
}

// ValidationProperties are what was found.
type ValidationProperties struct {
	LinkerName            string             `json:"linkerName"`
	IsConnectionAvailable bool               `json:"isConnectionAvailable"`
	ReportStartTimeUTC    time.Time          `json:"reportStartTimeUtc"`
	ReportEndTimeUTC      time.Time          `json:"reportEndTimeUtc"`
	SourceID              string             `json:"sourceId,omitempty"`
	ValidationDetail      []ValidationDetail `json:"validationDetail"`
}

// ValidationDetail is one finding.
type ValidationDetail struct {
	Name         string `json:"name"`
	Description  string `json:"description,omitempty"`
	Result       string `json:"result"` // success, failure, warning
	ErrorMessage string `json:"errorMessage,omitempty"`
	ErrorCode    string `json:"errorCode,omitempty"`
}
