//go:build linux

package connector

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/target"
	"keyfleet.dev/keyfleet/test/stack"
)

// TestDocumentedFlow is the life of the service connections of one cluster, as the
// documentation tells it, from the first one to the end of the extension. Each step
// stands on those before it.
func TestDocumentedFlow(t *testing.T) {
	w := newWorld(t, target.MySQL, target.Redis, target.RabbitMQ)
	stack.Eventually(t, time.Minute, "the cluster was seen", func(context.Context) error {
		if out := w.keyfleet(t, "cluster", "show", "prod"); !strings.Contains(out, "Succeeded") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	before := w.inventory(t)
	secrets := map[string]string{}
	for kind, s := range w.targets {
		secrets["the password of the administrator of "+string(kind)] = s.AdminPassword
	}
	clients := &podClients{world: w, secrets: secrets}
	for _, step := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"the first connection installs the extension", w.firstConnection},
		{"the first sample Job prints the environment", w.firstSampleJob},
		{"extension show prints what az k8s-extension show prints", w.showExtension},
		{"the webhook is a setting of the extension", w.enableWebhook},
		{"the second sample Job, as it is written, prints the environment and has no token", w.secondSampleJob},
		{"with the label on the pod template it has the token and the four variables", w.correctedSampleJob},
		{"the SDK in a pod reads a secret with nothing but that", w.readVaultInPod},
		{"a rotation names the pod with the old password, and ends the old login after its restart", func(t *testing.T) { w.rotateUnderConsumer(t, secrets) }},
		{"an operator that restarts touches neither workloads nor their Secret", w.restartOperator},
		{"a pod uses PostgreSQL, MariaDB, Redis and RabbitMQ with nothing but what the cluster has", clients.start},
		{"their credentials rotate under load, and no login fails", clients.rotate},
		{"without the connections nothing is left, in the cluster and on the servers", clients.remove},
		{"a job that fails says why, where people are told to look, and the extension recovers", func(t *testing.T) { w.failingJob(t, secrets) }},
		{"no secret is in values, releases, events or logs", func(t *testing.T) { w.noSecretShows(t, secrets) }},
		{"uninstalling the extension disconnects everything, and leaves nothing", func(t *testing.T) { w.uninstall(t, before) }},
	} {
		began := time.Now()
		if !t.Run(step.name, step.run) {
			t.FailNow()
		}
		t.Logf("%s: %s", step.name, time.Since(began).Round(100*time.Millisecond))
	}
}

func (w *world) firstConnection(t *testing.T) {
	w.says(t, "keyfleet connection create postgres-flexible", w.keyfleet(t, "connection", "create", "postgres-flexible", "--connection", "db", "--cluster", "prod",
		"--server", "main", "--database", "shop", "--client-type", "none"), "Succeeded", "sc-db-secret")
	w.says(t, "kubectl get ns", w.kube(t, "get", "ns"), "sc-system")
	w.deployed(t)
	w.says(t, "kubectl get job -n sc-system", w.kube(t, "get", "job", "-n", "sc-system"), "No resources found")
}

// deployed waits until Helm has the release as it shall be, and the server knows.
func (w *world) deployed(t *testing.T) {
	t.Helper()
	stack.Eventually(t, 4*time.Minute, "the release is deployed", func(context.Context) error {
		if out := w.keyfleet(t, "extension", "show", "sc-extension", "--cluster", "prod"); !strings.Contains(out, "Succeeded") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	w.says(t, "helm list -n sc-system", w.tool(t, "helm", "", "list", "-n", "sc-system"), "sc-extension", "deployed")
}

// sampleJob is the one of the documentation, with the name replaced.
const sampleJob = `
apiVersion: batch/v1
kind: Job
metadata:
  namespace: default
  name: sc-sample-job
spec:
  template:
    spec:
      containers:
      - name: raw-linux
        image: alpine
        command: ['printenv']
        envFrom:
        - secretRef:
            name: sc-db-secret
      restartPolicy: OnFailure
`

func (w *world) firstSampleJob(t *testing.T) {
	log := w.runJob(t, sampleJob)
	for _, want := range []string{"AZURE_POSTGRESQL_HOST=", "AZURE_POSTGRESQL_USERNAME=kf_db_", "AZURE_POSTGRESQL_PASSWORD=", "AZURE_POSTGRESQL_PORT=" + strconv.Itoa(w.postgres.Port)} {
		if !strings.Contains(log, want) {
			t.Errorf("the Job does not print %s", want)
		}
	}
	t.Logf("the Job prints\n%s", masked(log))
}

// runJob runs a Job with the name of the documentation's, and returns what it printed.
func (w *world) runJob(t *testing.T, manifest string) string {
	t.Helper()
	w.kube(t, "delete", "job", "sc-sample-job", "--ignore-not-found", "--wait")
	w.apply(t, manifest)
	w.kube(t, "wait", "--for=condition=Complete", "--timeout=120s", "job/sc-sample-job")
	return w.kube(t, "logs", "job/sc-sample-job")
}

// masked are the variables of connections and identities that a Job printed, without passwords.
func masked(log string) string {
	var out []string
	for line := range strings.Lines(log) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if !strings.HasPrefix(name, "AZURE_") {
			continue
		}
		if strings.Contains(name, "PASSWORD") {
			value = "..."
		}
		out = append(out, name+"="+value)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// shown is an extension as the command line prints it as JSON.
type shown struct {
	ID                string            `json:"id"`
	Name              string            `json:"name"`
	ResourceGroup     string            `json:"resourceGroup"`
	ExtensionType     string            `json:"extensionType"`
	CurrentVersion    string            `json:"currentVersion"`
	ProvisioningState string            `json:"provisioningState"`
	Settings          map[string]string `json:"configurationSettings"`
	Statuses          []struct {
		Code, DisplayStatus, Level, Message string
		Time                                time.Time
	} `json:"statuses"`
}

// extension returns the extension, decoded and as it was printed.
func (w *world) extension(t *testing.T) (s shown, text string) {
	t.Helper()
	text = w.keyfleet(t, "extension", "show", "sc-extension", "--cluster", "prod", "-o", "json")
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return s, text
}

func (w *world) showExtension(t *testing.T) {
	s, text := w.extension(t)
	// The members that az k8s-extension show prints.
	w.says(t, "keyfleet extension show sc-extension --cluster prod -o json", text,
		`"aksAssignedIdentity"`, `"autoUpgradeMinorVersion"`, `"configurationProtectedSettings": {}`, `"configurationSettings"`, `"currentVersion"`, `"customLocationSettings"`,
		`"errorInfo"`, `"extensionType"`, `"id"`, `"isSystemExtension"`, `"name"`, `"packageUri"`, `"provisioningState"`, `"releaseTrain"`, `"resourceGroup"`, `"scope"`, `"statuses"`, `"type"`)
	if s.ProvisioningState != "Succeeded" || s.ResourceGroup != "rg" || s.ExtensionType != "microsoft.servicelinker.connection" || len(s.Statuses) != 1 {
		t.Errorf("%+v", s)
	}
	w.says(t, "keyfleet extension list --cluster prod", w.keyfleet(t, "extension", "list", "--cluster", "prod"), "sc-extension", "Succeeded")
	w.refused(t, []string{"extension", "show", "other", "--cluster", "prod"}, "ExtensionNotFound")
	// Nothing that is secret goes through the extension: a protected setting is refused, so none can be shown.
	// Nor is it for whoever may write an extension to say what runs with the operator's rights.
	for member, says := range map[string]string{"configurationProtectedSettings": "no protected setting image", "configurationSettings": "is not a setting"} {
		err := w.Client.Call(w.ctx, client.Request{Method: http.MethodPut, URL: w.Client.ARM(s.ID), Version: "2023-05-01", Body: map[string]any{"properties": map[string]any{
			"extensionType": s.ExtensionType, member: map[string]string{"image": "canary-of-a-setting"},
		}}}, nil)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", member, err)
		}
	}
}
