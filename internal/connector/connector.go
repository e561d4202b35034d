// Package connector makes service connections: what a workload on a cluster needs
// so that it can reach a service, under the names that it expects.
//
// Idea: a connection is described by a target, an authentication, a client type and
// some values; all else follows from a catalogue, which is data (catalogue.yaml).
// The names of variables and objects are those of Azure Service Connector, so
// that applications and manifests written for it work unchanged. A controller makes
// the credential and the grants, and computes a desired state for the cluster; a
// manager brings it there and reports what it saw.
//
//	target + authentication + client ──catalogue──> templates ──values──> variables
//	connection name ──> sc-NAME-secret            client id ──> sc-account-CLIENTID
//
//	credential ──> vault ──┐
//	grants                 ├──> desired state ──manager──> cluster ──> report ──> login with it ──> Succeeded
//	variables ─────────────┘
//
// Invariant: Succeeded is said of what was seen: the hash of the cluster's Secret is
// that of what the vault has, and a login with it worked. A password is in the
// vault before it is on the server. A login is ended only when no pod is left that
// was started with it. What a connection was given is noted before it is given, so
// that its deletion finds all of it; what others share stays. Connections have no
// object in common but the ServiceAccount of an identity.
//
// Consequence for the operator: what is wrong with a connection is said before
// anything is touched, with what would do instead; a server that died in the middle
// goes on where it was; a rotation takes as long as the slowest workload.
package connector
