// Package connector knows what a service connection is: what a workload on a
// cluster gets so that it can reach a service, under which names.
//
// Idea: a connection is described by a target, an authentication, a client type and
// some values; all else follows from a catalogue, which is data (catalogue.yaml).
// The names of variables and objects are those of Azure Service Connector, so
// that applications and manifests written for it work unchanged.
//
//	target + authentication + client ──catalogue──> templates ──values──> variables
//	connection name ──> sc-NAME-secret            client id ──> sc-account-CLIENTID
//
// Invariant: the rules here are pure. A connection that they accept has a name, a
// value for each variable, and no object in common with another connection but the
// ServiceAccount of an identity.
//
// Consequence for the operator: what is wrong with a connection is said before
// anything is touched, with what would do instead.
package connector
