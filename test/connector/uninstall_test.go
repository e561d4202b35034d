//go:build linux

package connector

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/test/stack"
)

// inventory is every object of the cluster in every API group, but for events.
func (w *world) inventory(t *testing.T) map[string]bool {
	t.Helper()
	var kinds []string
	for _, kind := range strings.Fields(w.kube(t, "api-resources", "--verbs=list", "-o", "name")) {
		if !strings.HasPrefix(kind, "events") {
			kinds = append(kinds, kind)
		}
	}
	out := map[string]bool{}
	for line := range strings.Lines(w.kube(t, "get", strings.Join(kinds, ","), "-A", "--no-headers", "-o", "custom-columns=K:.kind,S:.metadata.namespace,N:.metadata.name")) {
		out[strings.Join(strings.Fields(line), " ")] = true
	}
	if len(out) < 50 {
		t.Fatalf("a cluster with %d objects", len(out))
	}
	return out
}

// nothingLeft waits until the cluster has no object that was not there before, but for those that stay.
func (w *world) nothingLeft(t *testing.T, before map[string]bool, stays ...string) {
	t.Helper()
	stack.Eventually(t, 2*time.Minute, "nothing is left in the cluster", func(context.Context) error {
		left := w.inventory(t)
		maps.DeleteFunc(left, func(o string, _ bool) bool { return before[o] || slices.Contains(stays, o) })
		if len(left) > 0 {
			return fmt.Errorf("%v", slices.Sorted(maps.Keys(left)))
		}
		return nil
	})
}

func (w *world) uninstall(t *testing.T, before map[string]bool) {
	w.refused(t, []string{"extension", "delete", "sc-extension", "--cluster", "prod", "--yes"}, "ExtensionInUse", "db, kv, tight", "keyfleet extension delete sc-extension --cluster prod --disconnect")
	w.says(t, "helm list -n sc-system", w.tool(t, "helm", "", "list", "-n", "sc-system"), "deployed")

	// The connections go first: the operator, which lets go of their objects, is a part of the release.
	w.says(t, "keyfleet extension delete sc-extension --cluster prod --disconnect --yes",
		w.keyfleet(t, "extension", "delete", "sc-extension", "--cluster", "prod", "--disconnect", "--yes"), "is removed, after all connections of the cluster")
	if out := w.tool(t, "helm", "", "list", "-n", "sc-system"); strings.Contains(out, "sc-extension") {
		t.Errorf("helm list -n sc-system:\n%s", out)
	}
	if out := w.keyfleet(t, "connection", "list", "--cluster", "prod", "-o", "name"); strings.TrimSpace(out) != "" {
		t.Errorf("connections are left:\n%s", out)
	}

	// What the test itself has made goes; what is left is Keyfleet's.
	w.kube(t, "delete", "deployment/shop", "job/sc-sample-job", "configmap/keyfleet-ca", "namespace/small", "--wait")
	w.nothingLeft(t, before, "Namespace <none> sc-system", "ServiceAccount sc-system default", "ConfigMap sc-system kube-root-ca.crt") // it may hold what is others'
	admin := w.login(t, w.postgres.AdminUser, w.postgres.AdminPassword, "shop")
	defer admin.Close(w.ctx)
	var roles int
	if err := admin.QueryRow(w.ctx, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'kf\\_%'").Scan(&roles); err != nil || roles != 0 {
		t.Errorf("%d roles are left on the server, %v", roles, err)
	}
	if out := w.keyfleet(t, "identity", "federated-credential", "list", "--identity", "web", "-o", "name"); strings.TrimSpace(out) != "" {
		t.Errorf("the identity still trusts:\n%s", out)
	}
}
