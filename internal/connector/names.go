package connector

import (
	"regexp"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// secretKey is Kubernetes' rule for the keys of a Secret.
var secretKey = regexp.MustCompile(`^[-._a-zA-Z0-9]{1,253}$`)

// Azure's rule for names of connections, and Kubernetes' for names of Secrets and
// namespaces (RFC 1123 subdomain and label).
var (
	connectionName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,59}$`)
	objectName     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	namespaceName  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

// SecretName is the name of the Secret that a connection makes: "sc-", the letters
// and digits of the connection's name, "-secret". It is Azure's rule, so that
// manifests written for Azure fit; names that differ in other characters only
// make the same.
func SecretName(connection string) string {
	return "sc-" + alphanumeric(connection) + "-secret"
}

// ProviderClassName is the name of the SecretProviderClass of a connection to a key
// vault through the Secrets Store CSI driver.
func ProviderClassName(connection string) string {
	return "sc-" + alphanumeric(connection) + "-secretprovider"
}

// AccountName is the name of the ServiceAccount for a managed identity. All
// connections of one identity in one namespace share it.
func AccountName(clientID string) string { return "sc-account-" + clientID }

func alphanumeric(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return -1
	}, s)
}

// CheckName fails unless a connection can have the name on a cluster. Capitals are
// refused, for Kubernetes refuses the Secret that they would lead to.
func CheckName(connection string) error {
	if connectionName.MatchString(connection) && objectName.MatchString(SecretName(connection)) && alphanumeric(connection) != "" {
		return nil
	}
	return fault.New(fault.Invalid, "InvalidResourceName",
		"The connection name '%.100s' is not valid: 1 to 60 lower-case letters, digits, '.', '_' and '-', the first a letter or digit.", connection).
		At("name").WithFix("its Secret would be named %.100s, and Kubernetes takes small letters only", SecretName(connection))
}

// CheckNamespace fails unless the text can be the name of a namespace.
func CheckNamespace(namespace string) error {
	if namespaceName.MatchString(namespace) {
		return nil
	}
	return fault.New(fault.Invalid, "InvalidArgument", "'%.100s' cannot be the name of a Kubernetes namespace.", namespace).At("properties.scope")
}

// Placed is where a connection's Secret is.
type Placed struct{ Connection, Namespace string }

// CheckCollision fails if a new connection's Secret would be that of another one:
// "a-b" and "ab" lead to the same name.
func CheckCollision(want Placed, others []Placed) error {
	for _, o := range others {
		if o.Connection != want.Connection && o.Namespace == want.Namespace && SecretName(o.Connection) == SecretName(want.Connection) {
			return fault.New(fault.Conflict, "SecretNameCollision",
				"The connection '%s' would write the Secret %s/%s, which is that of the connection '%s'.", want.Connection, want.Namespace, SecretName(want.Connection), o.Connection).
				At("name").WithFix("choose a name that differs in letters or digits, or another namespace")
		}
	}
	return nil
}
