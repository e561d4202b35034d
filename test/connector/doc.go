// Package connector has the tests of service connections on a real cluster: the
// flows of the documentation as they are written, with the extension as a Helm
// release whose operator and job run on a kubelet, and a workload that uses real
// servers while its credentials rotate.
package connector
