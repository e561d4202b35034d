//go:build linux

package connector

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"

	"keyfleet.dev/keyfleet/test/stack"
)

// failingJob: the namespace of a connection allows no Secret. The connection says so
// at once; sc-job, which an upgrade of the extension runs, fails with it.
func (w *world) failingJob(t *testing.T, secrets map[string]string) {
	w.kube(t, "create", "namespace", "small")
	w.kube(t, "create", "quota", "few", "-n", "small", "--hard=count/secrets=0")
	w.refused(t, []string{
		"connection", "create", "postgres-flexible", "--connection", "tight", "--cluster", "prod", "--server", "main", "--database", "shop", "--client-type", "none", "--kube-namespace", "small",
	}, "QuotaExceeded", "kubectl -n small describe resourcequota few")
	w.refused(t, []string{"extension", "update", "sc-extension", "--cluster", "prod", "--configuration-settings", "job.backoffLimit=0"}, "JobFailed", "BackoffLimitExceeded")

	w.says(t, "kubectl get job -n sc-system", w.kube(t, "get", "job", "-n", "sc-system"), "sc-job", "Failed", "0/1")
	w.says(t, "kubectl describe job/sc-job -n sc-system", w.kube(t, "describe", "job/sc-job", "-n", "sc-system"), "1 Failed", "BackoffLimitExceeded")
	log := w.kube(t, "logs", "job/sc-job", "-n", "sc-system")
	w.says(t, "kubectl logs job/sc-job -n sc-system", log, "QuotaExceeded: The quota few of the namespace small", "linkers/tight", "to do:")
	if !strings.HasSuffix(strings.TrimSpace(log), "Error: 1 of 3 connections have a problem") {
		t.Error("the log does not end with how the job ended")
	}
	w.says(t, "helm list -n sc-system", w.tool(t, "helm", "", "list", "-n", "sc-system"), "sc-extension", "failed")
	s, text := w.extension(t)
	w.says(t, "keyfleet extension show sc-extension --cluster prod -o json", text, `"provisioningState": "Failed"`)
	if len(s.Statuses) != 1 || s.Statuses[0].Code != "JobFailed" || s.Statuses[0].Level != "Error" || s.Statuses[0].Time.IsZero() ||
		!strings.Contains(s.Statuses[0].Message, "QuotaExceeded") || !strings.Contains(s.Statuses[0].Message, "kubectl logs job/sc-job -n sc-system") {
		t.Errorf("statuses: %+v", s.Statuses)
	}
	w.says(t, "keyfleet extension show sc-extension --cluster prod", w.keyfleet(t, "extension", "show", "sc-extension", "--cluster", "prod"), "Failed", "JobFailed")

	// When the cause is mended, connection and extension recover by themselves.
	w.kube(t, "delete", "quota", "few", "-n", "small")
	began := time.Now()
	w.deployed(t)
	t.Logf("the extension has recovered %s after the quota went", time.Since(began).Round(time.Second))
	w.says(t, "kubectl get job -n sc-system", w.kube(t, "get", "job", "-n", "sc-system"), "No resources found")
	stack.Eventually(t, time.Minute, "the connection has recovered", func(context.Context) error {
		if out := w.keyfleet(t, "connection", "show", "tight", "--cluster", "prod"); !strings.Contains(out, "Succeeded") {
			return errors.New(out)
		}
		return nil
	})
	var tight core.Secret
	if err := json.Unmarshal([]byte(w.kube(t, "get", "secret", "sc-tight-secret", "-n", "small", "-o", "json")), &tight); err != nil {
		t.Fatal(err)
	}
	secrets["the password of the connection that waited"] = string(tight.Data[password])
	w.hides(t, "the log of sc-job", log, secrets)
}

// hides checks that a text has none of the secrets, as they are or in base64.
func (w *world) hides(t *testing.T, place, text string, secrets map[string]string) {
	t.Helper()
	for name, s := range secrets {
		if shows(text, s) {
			t.Errorf("%s is in %s", name, place)
		}
	}
}

func shows(text, secret string) bool {
	return strings.Contains(text, secret) || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte(secret)))
}

func (w *world) noSecretShows(t *testing.T, secrets map[string]string) {
	for name, s := range secrets {
		if len(s) < 16 {
			t.Fatalf("%s is no secret: %d bytes", name, len(s))
		}
	}
	places := map[string]string{
		"the values":                 w.tool(t, "helm", "", "get", "values", "sc-extension", "-n", "sc-system", "--all"),
		"the manifest":               w.tool(t, "helm", "", "get", "all", "sc-extension", "-n", "sc-system"),
		"the events":                 w.kube(t, "get", "events", "-A", "-o", "json"),
		"the operator's log":         w.kube(t, "logs", "-n", "sc-system", "deployment/sc-operator", "--all-containers"),
		"the webhook's log":          w.kube(t, "logs", "-n", "sc-system", "deployment/sc-webhook", "--all-containers"),
		"the server's log":           w.Log(), // and its manager's
		"Deployments, Jobs and pods": w.kube(t, "get", "deployments,jobs,pods", "-n", "sc-system", "-o", "json"),
	}
	records := 0
	var all core.SecretList
	if err := json.Unmarshal([]byte(w.kube(t, "get", "secrets", "-n", "sc-system", "-o", "json")), &all); err != nil {
		t.Fatal(err)
	}
	for _, s := range all.Items {
		if s.Type == "helm.sh/release.v1" {
			places["the release Secret "+s.Name] = unpacked(t, s.Data["release"])
			records++
		}
	}
	if records < 3 || !strings.Contains(places["the events"], "Repaired") {
		t.Errorf("there are %d records of the release; the search looks at too little", records)
	}
	for place, text := range places {
		if len(text) < 20 {
			t.Errorf("%s is empty, which proves nothing: %q", place, text)
		}
		w.hides(t, place, text, secrets)
	}
	// The search finds what is there.
	if have := w.kube(t, "get", "secret", "sc-db-secret", "-o", "json"); !shows(have, secrets["the second password"]) {
		t.Error("the search does not find the password in the Secret that has it")
	}
	t.Logf("searched %d places for %d secrets", len(places), len(secrets))
}

// unpacked is the record of a release: JSON, compressed, in base64.
func unpacked(t *testing.T, data []byte) string {
	t.Helper()
	packed, err := base64.StdEncoding.DecodeString(string(data))
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
