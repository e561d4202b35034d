//go:build linux

package connector

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"

	"keyfleet.dev/keyfleet/test/bed"
	"keyfleet.dev/keyfleet/test/stack"
)

func (w *world) enableWebhook(t *testing.T) {
	w.says(t, "keyfleet extension update sc-extension --cluster prod --configuration-settings webhook.enabled=true",
		w.keyfleet(t, "extension", "update", "sc-extension", "--cluster", "prod", "--configuration-settings", "webhook.enabled=true"), "Succeeded")
	w.says(t, "kubectl get deployment -n sc-system", w.kube(t, "get", "deployment", "-n", "sc-system"), "sc-webhook")

	w.keyfleet(t, "identity", "create", "web")
	w.keyfleet(t, "vault", "create", "shopvault")
	w.keyfleet(t, "secret", "set", "shopvault", "greeting", "--file", w.file(t, "greeting", "hello from the vault"))
	id := strings.TrimSpace(w.keyfleet(t, "vault", "show", "shopvault", "--query", "id", "-o", "tsv"))
	w.says(t, "keyfleet connection create keyvault", w.keyfleet(t, "connection", "create", "keyvault", "--connection", "kv", "--cluster", "prod",
		"--target-id", id, "--workload-identity", "web", "--client-type", "python"), "Succeeded", "sc-kv-secret", "sc-account-")
}

// account is the name of the ServiceAccount that the connection kv made.
func (w *world) account(t *testing.T) string {
	t.Helper()
	return "sc-account-" + w.environment(t, "sc-kv-secret")["AZURE_KEYVAULT_CLIENTID"]
}

// identityJob is the second one of the documentation, with the names replaced. The
// label is where the documentation has it: on the Job.
const identityJob = `
apiVersion: batch/v1
kind: Job
metadata:
  namespace: default
  name: sc-sample-job
  labels:
    azure.workload.identity/use: "true"
spec:
  template:
    spec:
      serviceAccountName: ACCOUNT
      containers:
      - name: raw-linux
        image: alpine
        command: ['printenv']
        envFrom:
        - secretRef:
            name: sc-kv-secret
      restartPolicy: OnFailure
`

// corrected is a Job whose pod template has the label too.
func corrected(job string) string {
	return strings.Replace(job, "  template:\n    spec:\n", "  template:\n    metadata:\n      labels: {azure.workload.identity/use: \"true\"}\n    spec:\n", 1)
}

// injected are the variables that the webhook gives to pods.
var injected = []string{"AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_AUTHORITY_HOST"}

func (w *world) secondSampleJob(t *testing.T) {
	log := w.runJob(t, strings.ReplaceAll(identityJob, "ACCOUNT", w.account(t)))
	w.says(t, "kubectl logs job/sc-sample-job", masked(log), "AZURE_KEYVAULT_CLIENTID=", "AZURE_KEYVAULT_RESOURCEENDPOINT=https://shopvault.vault.")
	for _, name := range injected {
		if strings.Contains(log, name+"=") {
			t.Errorf("it has %s, though its pod has no label", name)
		}
	}
	w.refused(t, []string{"connection", "diagnose", "kv", "--cluster", "prod"}, "LabelMisplaced", "Job default/sc-sample-job", "spec.template.metadata.labels")
}

func (w *world) correctedSampleJob(t *testing.T) {
	log := w.runJob(t, corrected(strings.ReplaceAll(identityJob, "ACCOUNT", w.account(t))))
	_, port, _ := net.SplitHostPort(w.Listen)
	w.says(t, "kubectl logs job/sc-sample-job", masked(log), "AZURE_KEYVAULT_CLIENTID=", "AZURE_CLIENT_ID="+strings.TrimPrefix(w.account(t), "sc-account-"),
		"AZURE_TENANT_ID=", "AZURE_FEDERATED_TOKEN_FILE=/var/run/secrets/azure/wi/", "AZURE_AUTHORITY_HOST=https://login.keyfleet.internal:"+port+"/")
}

// probe is the image of a program with Microsoft's SDK.
const probe = "registry.bed.internal/podprobe:1"

// vaultJob runs it. The names of the server are the cluster's to know, and its CA is
// the pod's to trust: the documentation says how.
const vaultJob = `
apiVersion: batch/v1
kind: Job
metadata:
  namespace: default
  name: sc-sample-job
spec:
  backoffLimit: 2
  template:
    spec:
      serviceAccountName: ACCOUNT
      hostAliases:
      - ip: ADDRESS
        hostnames: [login.keyfleet.internal, shopvault.vault.keyfleet.internal]
      containers:
      - name: app
        image: ` + probe + `
        args: [greeting]
        env:
        - {name: SSL_CERT_FILE, value: /keyfleet/ca.crt}
        envFrom:
        - secretRef:
            name: sc-kv-secret
        volumeMounts:
        - {name: ca, mountPath: /keyfleet}
      volumes:
      - name: ca
        configMap: {name: keyfleet-ca}
      restartPolicy: Never
`

func (w *world) readVaultInPod(t *testing.T) {
	program := filepath.Join(t.TempDir(), "podprobe")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./podprobe")
	build.Dir, build.Env = filepath.Join(stack.Root(t), "test/azuresdk"), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v\n%s", err, out)
	}
	if err := w.bed.PushImage(w.ctx, bed.Image{Ref: probe, Files: map[string]string{"/podprobe": program}, Entrypoint: []string{"/podprobe"}}); err != nil {
		t.Fatal(err)
	}
	w.kube(t, "create", "configmap", "keyfleet-ca", "--from-file=ca.crt="+filepath.Join(w.Dir, "ca.crt"))
	w.expose(t, w.Listen)
	job := corrected(strings.NewReplacer("ACCOUNT", w.account(t), "ADDRESS", insideIP).Replace(vaultJob))
	w.says(t, "kubectl logs job/sc-sample-job", w.runJob(t, job), "hello from the vault")

	var pods core.PodList
	if err := json.Unmarshal([]byte(w.kube(t, "get", "pods", "-l", "job-name=sc-sample-job", "-o", "json")), &pods); err != nil {
		t.Fatal(err)
	}
	tokens := 0
	for _, v := range pods.Items[0].Spec.Volumes {
		if v.Projected != nil && v.Projected.Sources[0].ServiceAccountToken != nil && v.Projected.Sources[0].ServiceAccountToken.Audience == "api://AzureADTokenExchange" {
			tokens++
		}
	}
	if tokens != 1 {
		t.Errorf("the pod has %d projected tokens for the exchange", tokens)
	}
}
