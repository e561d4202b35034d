//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"

	"keyfleet.dev/keyfleet/test/stack"
)

// consumer is a workload that reads its password when it starts.
const consumer = `
apiVersion: apps/v1
kind: Deployment
metadata:
  namespace: default
  name: shop
spec:
  replicas: 1
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: app
        image: alpine
        command: ['sh', '-c', 'while true; do sleep 1; done']
        envFrom:
        - secretRef:
            name: sc-db-secret
`

// pod is the only pod of the consumer.
func (w *world) pod(t *testing.T) core.Pod {
	t.Helper()
	var all core.PodList
	stack.Eventually(t, time.Minute, "there is one pod of the consumer", func(context.Context) error {
		all = core.PodList{}
		if err := json.Unmarshal([]byte(w.kube(t, "get", "pods", "-l", "app=shop", "-o", "json")), &all); err != nil {
			return err
		}
		if len(all.Items) != 1 {
			return fmt.Errorf("%d", len(all.Items))
		}
		return nil
	})
	return all.Items[0]
}

// has is a variable of the consumer's container.
func (w *world) has(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(w.kube(t, "exec", w.pod(t).Name, "--", "printenv", name))
}

const user, password = "AZURE_POSTGRESQL_USERNAME", "AZURE_POSTGRESQL_PASSWORD"

func (w *world) rotateUnderConsumer(t *testing.T, secrets map[string]string) {
	w.apply(t, consumer)
	w.kube(t, "rollout", "status", "deployment/shop", "--timeout=120s")
	old, oldPod := w.environment(t, "sc-db-secret"), w.pod(t).Name
	secrets["the first password"] = old[password]
	if got := w.has(t, password); got != old[password] {
		t.Fatal("the consumer does not have the password of the Secret")
	}
	rotated := make(chan error, 1)
	go func() {
		out, err := w.try("connection", "rotate", "db", "--cluster", "prod")
		rotated <- errors.Join(err, errors.New(out))
	}()

	stack.Eventually(t, 2*time.Minute, "the pod with the old password is named", func(context.Context) error {
		out := w.keyfleet(t, "connection", "show", "db", "--cluster", "prod")
		if !strings.Contains(out, "default/"+oldPod) {
			return errors.New(out)
		}
		t.Logf("$ keyfleet connection show db --cluster prod\n%s", out)
		return nil
	})
	select {
	case said := <-rotated:
		t.Fatalf("the rotation has not waited for the pod: %v", said)
	default:
	}
	w.login(t, old[user], old[password], "shop").Close(w.ctx) // both logins work while it waits
	w.kube(t, "rollout", "restart", "deployment/shop")
	w.kube(t, "rollout", "status", "deployment/shop", "--timeout=120s")
	select {
	case said := <-rotated:
		w.says(t, "keyfleet connection rotate db --cluster prod", said.Error(), "has a new credential")
	case <-time.After(4 * time.Minute):
		t.Fatal("the rotation does not end")
	}
	fresh := w.environment(t, "sc-db-secret")
	secrets["the second password"] = fresh[password]
	if got := w.has(t, password); got != fresh[password] || got == old[password] {
		t.Error("the new pod does not have the new password")
	}
	w.login(t, fresh[user], fresh[password], "shop").Close(w.ctx)
	if conn, err := w.dial(old[user], old[password], "shop"); err == nil {
		_ = conn.Close(w.ctx)
		t.Error("the old login still works")
	}
}

// version is the resourceVersion of an object of the namespace default.
func (w *world) version(t *testing.T, kind, name string) string {
	t.Helper()
	return w.kube(t, "get", kind, name, "-o", "jsonpath={.metadata.resourceVersion}")
}

func (w *world) restartOperator(t *testing.T) {
	pod, secret := w.pod(t), w.version(t, "secret", "sc-db-secret")
	operator := w.kube(t, "get", "pods", "-n", "sc-system", "-l", "app.kubernetes.io/component=operator", "-o", "name")
	w.kube(t, "rollout", "restart", "deployment/sc-operator", "-n", "sc-system")
	w.kube(t, "rollout", "status", "deployment/sc-operator", "-n", "sc-system", "--timeout=120s")

	// The new one works: it repairs what is changed of another connection.
	w.kube(t, "patch", "secret", "sc-kv-secret", "--type=merge", "-p", `{"stringData":{"AZURE_KEYVAULT_CLIENTID":"changed"}}`)
	stack.Eventually(t, time.Minute, "the new operator repairs", func(context.Context) error {
		if w.environment(t, "sc-kv-secret")["AZURE_KEYVAULT_CLIENTID"] == "changed" {
			return errors.New("not yet")
		}
		return nil
	})
	if now := w.kube(t, "get", "pods", "-n", "sc-system", "-l", "app.kubernetes.io/component=operator", "-o", "name"); strings.Contains(now, strings.TrimSpace(operator)) {
		t.Errorf("the operator is still %s", operator)
	}
	after := w.pod(t)
	if after.UID != pod.UID || after.Status.ContainerStatuses[0].RestartCount != pod.Status.ContainerStatuses[0].RestartCount {
		t.Errorf("the consumer was restarted: %s %+v", after.UID, after.Status.ContainerStatuses)
	}
	if now := w.version(t, "secret", "sc-db-secret"); now != secret {
		t.Errorf("the Secret was written: resourceVersion %s, before %s", now, secret)
	}
	t.Logf("pod %s, uid %s, restarts %d; Secret sc-db-secret at resourceVersion %s, before and after", pod.Name, pod.UID, pod.Status.ContainerStatuses[0].RestartCount, secret)
}
