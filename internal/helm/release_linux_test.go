package helm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"helm.sh/helm/v4/pkg/release/common"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/fault"
)

const (
	long  = time.Minute     // for what succeeds
	brief = 3 * time.Second // for what cannot
)

func TestRelease(t *testing.T) {
	b := newBed(t)
	for name, test := range map[string]func(*testing.T, *bed){
		"it is installed, upgraded and removed":       lives,
		"values that the schema does not allow":       schemas,
		"templates that cannot be rendered":           templates,
		"an object of others is in the way":           inTheWay,
		"a kind that the cluster does not know":       unknownKind,
		"permissions that are missing":                forbidden,
		"an image that cannot be pulled":              pull,
		"nodes that only take critical add-ons":       taint,
		"no scheduler":                                unlooked,
		"pods that violate the Pod Security Standard": podSecurity,
		"a quota": quota,
		"a job fails, and the next try goes on from there":     jobFails,
		"a release of a runner that died is taken over":        takenOver,
		"a runner is killed":                                   killed,
		"a release that others work on is left alone":          busy,
		"a removal that was ended in between":                  halfRemoved,
		"the caller ends":                                      canceled,
		"an object that does not go":                           lingers,
		"what others changed is changed back":                  changedBack,
		"what an earlier revision made is removed, too":        earlier,
		"the namespace is being deleted":                       terminating,
		"an API server that does not answer":                   silent,
		"what others made under a name of the release remains": kept,
	} {
		t.Run(name, func(t *testing.T) { test(t, b) })
	}
}

func lives(t *testing.T, b *bed) {
	c := b.client(t, "lives")
	if r, err := c.Get(t.Context(), "r"); r != nil || err != nil {
		t.Fatalf("there is no release, and Get says %v, %v", r, err)
	}
	b.fate("lives", "d", "ready")
	b.fate("lives", "j", "done")
	before := b.everything(t)
	small := chart(t, map[string]string{"d.yaml": deployment("d"), "j.yaml": job("j"), "c.yaml": configMap("c", "{{ .Values.v }}")})
	for revision, value := range []string{"one", "two"} {
		r, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Values: map[string]any{"v": value}, Timeout: long})
		if err != nil {
			t.Fatal(err)
		}
		if r.Revision != revision+1 || r.Status != "deployed" || r.Chart != "small-1.2.3" || r.Version != "1.2.3" || r.Namespace != "lives" || time.Since(r.Updated) > long {
			t.Errorf("the release is %+v", r)
		}
		got := must(c.Get(t.Context(), "r"))(t)
		if got == nil || got.Release != r.Release || got.Values["v"] != value {
			t.Errorf("Apply returned %+v, Get %+v", r, got)
		}
		if m := must(b.api.CoreV1().ConfigMaps("lives").Get(t.Context(), "c", metav1.GetOptions{}))(t); m.Data["k"] != value {
			t.Errorf("the ConfigMap holds %v", m.Data)
		}
		if jobs := must(b.api.BatchV1().Jobs("lives").List(t.Context(), metav1.ListOptions{}))(t); len(jobs.Items) != 0 {
			t.Error("the job succeeded and is still there")
		}
	}
	for range 2 { // the second time nothing is to be done
		if err := c.Remove(t.Context(), "r", long); err != nil {
			t.Fatal(err)
		}
	}
	b.same(t, before, "lives")
}

// same fails the test if there is more than before, but for the namespace.
func (b *bed) same(t *testing.T, before map[string]bool, namespace string) {
	t.Helper()
	before["Namespace /"+namespace] = true
	var more []string
	defer func() {
		if t.Failed() {
			t.Logf("left are %v", more)
		}
	}()
	eventually(t, "nothing is left", func() bool { // the pod of a hook job goes a little after the job
		more = nil
		for o := range b.everything(t) {
			if !before[o] {
				more = append(more, o)
			}
		}
		return len(more) == 0
	})
}

func schemas(t *testing.T, b *bed) {
	c := b.client(t, "schemas")
	small := chart(t, map[string]string{"c.yaml": configMap("c", "{{ .Values.v }}"), "values.schema.json": `{"properties":{"v":{"type":"object","additionalProperties":false,"properties":{"n":{"type":"integer"}}}}}`})
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Values: map[string]any{"v": map[string]any{"n": "x", "m": 1}}, Timeout: long})
	f := refused(t, err, "RenderingFailed", "Helm chart rendering failed with given values", "v.n", "want integer", "'m' not allowed", "helm show values")
	if f.Kind != fault.Invalid {
		t.Errorf("the kind is %v", f.Kind)
	}
	if r := must(c.Get(t.Context(), "r"))(t); r != nil {
		t.Errorf("there is a release: %+v", r)
	}
}

func templates(t *testing.T, b *bed) {
	c := b.client(t, "templates")
	for _, test := range []struct{ text, says string }{
		{`{{ required "give .Values.x" .Values.x }}`, "give .Values.x"},
		{`{{ fail "not like this" }}`, "not like this"},
		{`{{ .Values.a.b.c }}`, "nil pointer evaluating interface {}.b"},
		{`{{ if }}`, "missing value for if"},
		{"a: b\n c: d", "YAML parse error"},
		{"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndatum: {}\n", "datum"},
		{"apiVersion: v1\nkind: Service\nmetadata: {name: c}\nspec: {ports: [{port: 70000}]}\n", "70000"},
	} {
		_, err := c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"x.yaml": test.text}), Timeout: long})
		refused(t, err, "RenderingFailed", "Helm chart rendering failed with given values", test.says)
	}
	old := chart(t, map[string]string{"c.yaml": configMap("c", "")})
	old.files[0].Data = append(old.files[0].Data, []byte("kubeVersion: <1.20.0\n")...)
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: old, Timeout: long})
	refused(t, err, "RenderingFailed", "chart requires kubeVersion")
}

func inTheWay(t *testing.T, b *bed) {
	b.namespace(t, "in-the-way", nil)
	must(b.api.CoreV1().ConfigMaps("in-the-way").Create(t.Context(), &core.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}}, metav1.CreateOptions{}))(t)
	c := b.client(t, "in-the-way")
	r := Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "ours")}), Timeout: long}
	_, err := c.Apply(t.Context(), r)
	refused(t, err, "ResourceExists", "Resource already exists in your cluster: the ConfigMap in-the-way/c", "kubectl delete ConfigMap c -n in-the-way", "meta.helm.sh/release-name=r")
	adopt := `{"metadata":{"labels":{"app.kubernetes.io/managed-by":"Helm"},"annotations":{"meta.helm.sh/release-name":"r","meta.helm.sh/release-namespace":"in-the-way"}}}`
	must(b.api.CoreV1().ConfigMaps("in-the-way").Patch(t.Context(), "c", "application/merge-patch+json", []byte(adopt), metav1.PatchOptions{}))(t)
	if _, err := c.Apply(t.Context(), r); err != nil {
		t.Errorf("it was adopted as the fix says: %v", err)
	}
}

func unknownKind(t *testing.T, b *bed) {
	_, err := b.client(t, "unknown-kind").Apply(t.Context(), Request{Name: "r", Timeout: long, Chart: chart(t, map[string]string{
		"x.yaml": "apiVersion: secrets-store.csi.x-k8s.io/v1\nkind: SecretProviderClass\nmetadata: {name: x}\n",
	})})
	refused(t, err, "KindNotInstalled", "SecretProviderClass", "secrets-store.csi.x-k8s.io/v1", "kubectl api-resources --api-group=secrets-store.csi.x-k8s.io")
}

func pull(t *testing.T, b *bed) {
	b.fate("pull", "d", "pull")
	c := b.client(t, "pull")
	r := Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: brief}
	_, err := c.Apply(t.Context(), r)
	f := refused(t, err, "TimedOutWaitingForReadiness", "Timed out waiting for resource readiness", "Deployment pull/d has 0 of 1 pods ready",
		"ImagePullFailed: The image x/y:none cannot be pulled", "not found", "kubectl -n pull describe pod")
	if f.Inner != "ImagePullFailed" {
		t.Errorf("the cause is %q", f.Inner)
	}
	if got := must(c.Get(t.Context(), "r"))(t); got == nil || got.Status != "failed" || got.Description == "" {
		t.Errorf("the release that failed is %+v", got)
	}
	b.fate("pull", "d", "ready") // the image is there now
	r.Timeout = long
	if got, err := c.Apply(t.Context(), r); err != nil || got.Revision != 2 || got.Status != "deployed" {
		t.Errorf("the next time: %+v, %v", got, err)
	}
}

func taint(t *testing.T, b *bed) {
	b.fate("taint", "d", "taint")
	_, err := b.client(t, "taint").Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: brief})
	f := refused(t, err, "TimedOutWaitingForReadiness", `Extension pods can't be scheduled if all the node pools in the cluster are "CriticalAddonsOnly" tainted`,
		"untolerated taint {CriticalAddonsOnly: true}", "kubectl taint nodes NODE CriticalAddonsOnly-")
	if f.Inner != "OnlyCriticalAddonsNodes" {
		t.Errorf("the cause is %q", f.Inner)
	}
}

func unlooked(t *testing.T, b *bed) {
	_, err := b.client(t, "unlooked").Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: brief})
	refused(t, err, "TimedOutWaitingForReadiness", "NotScheduled: ", "waits for a node")
}

func podSecurity(t *testing.T, b *bed) {
	b.namespace(t, "restricted", map[string]string{"pod-security.kubernetes.io/enforce": "restricted"})
	c := b.client(t, "restricted")
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: brief})
	refused(t, err, "TimedOutWaitingForReadiness", "PodSecurityRefused: ", "restricted", "runAsNonRoot", "pod-security.kubernetes.io/enforce")
	_, err = c.Apply(t.Context(), Request{Name: "s", Chart: chart(t, map[string]string{"j.yaml": job("j")}), Timeout: brief})
	refused(t, err, "TimedOutWaitingForReadiness", "Job restricted/j has not ended", "PodSecurityRefused: ")
}

func quota(t *testing.T, b *bed) {
	b.namespace(t, "quota", nil)
	none := core.ResourceList{"pods": resource.MustParse("0"), "services": resource.MustParse("0")}
	must(b.api.CoreV1().ResourceQuotas("quota").Create(t.Context(), &core.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "few"}, Spec: core.ResourceQuotaSpec{Hard: none}}, metav1.CreateOptions{}))(t)
	eventually(t, "the quota counts", func() bool {
		q, err := b.api.CoreV1().ResourceQuotas("quota").Get(t.Context(), "few", metav1.GetOptions{})
		return err == nil && len(q.Status.Hard) == len(none) && len(q.Status.Used) == len(none)
	})
	c := b.client(t, "quota")
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: brief})
	refused(t, err, "TimedOutWaitingForReadiness", "QuotaExceeded: The quota few of the namespace quota", "kubectl -n quota describe resourcequota few")
	_, err = c.Apply(t.Context(), Request{Name: "s", Chart: chart(t, map[string]string{"s.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 80}]}\n"}), Timeout: brief})
	refused(t, err, "QuotaExceeded", "The quota few")
}

func jobFails(t *testing.T, b *bed) {
	b.fate("job-fails", "j", "failed")
	c := b.client(t, "job-fails")
	before := b.everything(t)
	r := Request{Name: "r", Chart: chart(t, map[string]string{"j.yaml": job("j")}), Timeout: long}
	_, err := c.Apply(t.Context(), r)
	f := refused(t, err, "JobFailed", "job failed: BackoffLimitExceeded", "job-fails/j", "kubectl logs job/j -n job-fails", "ended with status 3")
	if f.Inner == "" {
		t.Error("the cause is not named")
	}
	must(b.api.BatchV1().Jobs("job-fails").Get(t.Context(), "j", metav1.GetOptions{}))(t) // it is kept
	b.fate("job-fails", "j", "done")
	if got, err := c.Apply(t.Context(), r); err != nil || got.Status != "deployed" {
		t.Fatalf("the next time: %+v, %v", got, err)
	}
	b.fate("job-fails", "j", "failed")
	if _, err := c.Apply(t.Context(), r); err == nil {
		t.Fatal("the job failed, and no error")
	}
	if err := c.Remove(t.Context(), "r", long); err != nil {
		t.Fatal(err)
	}
	b.same(t, before, "job-fails")
}

// leave leaves a release as a runner that died does. The mark is that of a revision.
func leave(t *testing.T, c *Client, status common.Status, since time.Time, m mark) {
	t.Helper()
	o := must(c.begin(t.Context(), "r", long))(t)
	defer o.end()
	small := must(chart(t, nil).load())(t)
	err := o.cfg.Releases.Create(&v1.Release{
		Name: "r", Namespace: c.namespace, Version: 1, Chart: small, Manifest: configMap("old", ""), Labels: map[string]string{markLabel: m.String()}, ApplyMethod: "ssa",
		Info: &v1.Info{Status: status, FirstDeployed: since, LastDeployed: since},
	})
	if err != nil {
		t.Fatal(err)
	}
}

func takenOver(t *testing.T, b *bed) {
	b.namespace(t, "taken-over", nil)
	c := b.client(t, "taken-over")
	c.Runner = "me"
	small := chart(t, map[string]string{"c.yaml": configMap("c", "")})
	now := time.Now()
	for what, test := range map[string]struct {
		since time.Time
		mark  mark
	}{
		"of its own":                            {now, mark{1, c.runner(), now.Add(long)}},
		"of another, its time is over":          {now.Add(-long), mark{1, "another", now.Add(-grace - time.Second)}},
		"of somebody without a mark":            {now.Add(-foreignTime), mark{}},
		"the mark is that of a revision before": {now.Add(-foreignTime), mark{0, c.runner(), now.Add(long)}},
	} {
		for _, status := range []common.Status{common.StatusPendingInstall, common.StatusPendingUpgrade, common.StatusPendingRollback} {
			leave(t, c, status, test.since, test.mark)
			got, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Timeout: long})
			if err != nil || got.Revision != 2 || got.Status != "deployed" {
				t.Errorf("%s, %s: %+v, %v", what, status, got, err)
			}
			if err := c.Remove(t.Context(), "r", long); err != nil {
				t.Fatal(err)
			}
		}
		leave(t, c, common.StatusPendingUpgrade, test.since, test.mark)
		if err := c.Remove(t.Context(), "r", long); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

const childKubeconfig = "KEYFLEET_TEST_KUBECONFIG"

// killed has another process work on the release, and kills it.
func killed(t *testing.T, b *bed) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, b.Kubeconfig(t), 0o600); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestRunner$", "-test.timeout=2m")
	child.Env = append(os.Environ(), childKubeconfig+"="+path)
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()
	c := b.client(t, "killed")
	pending := func(status string) func() bool {
		return func() bool {
			r, err := c.Get(t.Context(), "r")
			return err == nil && r != nil && r.Status == status
		}
	}
	eventually(t, "the other process works on the release", pending("pending-install"))
	eventually(t, "it has made the Deployment", func() bool {
		_, err := b.api.AppsV1().Deployments("killed").Get(t.Context(), "d", metav1.GetOptions{})
		return err == nil
	})
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	r := Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d"), "j.yaml": job("j")}), Timeout: long}
	c.Runner = "another"
	_, err := c.Apply(t.Context(), r)
	refused(t, err, "HelmOperationInProgress")
	b.fate("killed", "d", "ready")
	b.fate("killed", "j", "done")
	c.Runner = "killed"
	if got, err := c.Apply(t.Context(), r); err != nil || got.Revision != 2 || got.Status != "deployed" {
		t.Errorf("the same runner, started again: %+v, %v", got, err)
	}
}

// TestRunner is the process that is killed.
func TestRunner(t *testing.T) {
	path := os.Getenv(childKubeconfig)
	if path == "" {
		t.Skip("it is part of TestRelease, which runs it as a process of its own")
	}
	c := must(New(must(os.ReadFile(path))(t), "killed", nil))(t)
	c.Runner = "killed"
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: long})
	t.Error("it was not killed; Apply returned ", err)
}

func busy(t *testing.T, b *bed) {
	b.namespace(t, "busy", nil)
	c := b.client(t, "busy")
	small := chart(t, map[string]string{"c.yaml": configMap("c", "")})
	now := time.Now()
	for what, test := range map[string]struct {
		since time.Time
		mark  mark
		left  time.Duration
	}{
		"of another":                                {now.Add(-long), mark{1, "another", now.Add(long)}, long + grace},
		"of somebody without a mark":                {now.Add(-foreignTime / 2), mark{}, foreignTime / 2},
		"its own mark is that of a revision before": {now, mark{0, c.runner(), now}, foreignTime},
	} {
		leave(t, c, common.StatusPendingUpgrade, test.since, test.mark)
		for _, c.Runner = range []string{"me", ""} {
			_, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Timeout: brief})
			f := refused(t, err, "HelmOperationInProgress", "Operation is already in progress for Helm", "pending-upgrade", "helm history r -n busy")
			if d := test.left - f.RetryAfter; d < 0 || d > 20*time.Second {
				t.Errorf("%s: try again after %v, want %v", what, f.RetryAfter, test.left)
			}
			refused(t, c.Remove(t.Context(), "r", brief), "HelmOperationInProgress")
		}
		if got := must(c.Get(t.Context(), "r"))(t); got.Revision != 1 || got.Status != "pending-upgrade" {
			t.Errorf("%s: the release is now %+v", what, got)
		}
		o := must(c.begin(t.Context(), "r", long))(t)
		must(o.cfg.Releases.Delete("r", 1))(t)
		o.end()
	}
	// Two that start at the same moment: one works, and the other one says so or comes after it.
	b.namespace(t, "busy-2", nil)
	b.fate("busy-2", "d", "ready")
	errs := make(chan error, 2)
	for _, one := range []*Client{b.client(t, "busy-2"), b.client(t, "busy-2")} {
		go func() {
			_, err := one.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: long})
			errs <- err
		}()
	}
	first, second := <-errs, <-errs
	if first != nil {
		first, second = second, first
	}
	if first != nil {
		t.Fatalf("none of two could work: %v; %v", first, second)
	}
	if second != nil {
		refused(t, second, "HelmOperationInProgress")
	}
}

func halfRemoved(t *testing.T, b *bed) {
	b.namespace(t, "half", nil)
	c := b.client(t, "half")
	r := Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "")}), Timeout: long}
	before := b.everything(t)
	for _, status := range []common.Status{common.StatusUninstalling, common.StatusUninstalled} {
		for _, again := range []func() error{
			func() error { return c.Remove(t.Context(), "r", long) },
			func() error {
				_, err := c.Apply(t.Context(), r)
				return errors.Join(err, c.Remove(t.Context(), "r", long))
			},
		} {
			must(c.Apply(t.Context(), r))(t)
			o := must(c.begin(t.Context(), "r", long))(t)
			last := must(o.last())(t)
			last.SetStatus(status, "")
			if err := o.cfg.Releases.Update(last); err != nil {
				t.Fatal(err)
			}
			o.end()
			if err := again(); err != nil {
				t.Errorf("%s: %v", status, err)
			}
			b.same(t, before, "half")
		}
	}
}

func canceled(t *testing.T, b *bed) {
	c := b.client(t, "canceled")
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("the manager ends")
	time.AfterFunc(brief, func() { cancel(stop) })
	start := time.Now()
	_, err := c.Apply(ctx, Request{Name: "r", Chart: chart(t, map[string]string{"d.yaml": deployment("d")}), Timeout: long})
	if !errors.Is(err, stop) || time.Since(start) > long/2 {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	if got := must(c.Get(t.Context(), "r"))(t); got == nil || got.Status != "failed" {
		t.Errorf("the release is %+v", got)
	}
}

func lingers(t *testing.T, b *bed) {
	c := b.client(t, "lingers")
	must(c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "")}), Timeout: long}))(t)
	hold := func(text string) {
		must(b.api.CoreV1().ConfigMaps("lingers").Patch(t.Context(), "c", "application/merge-patch+json", []byte(text), metav1.PatchOptions{}))(t)
	}
	hold(`{"metadata":{"finalizers":["example.com/hold"]}}`)
	f := fault.From(c.Remove(t.Context(), "r", brief))
	if f == nil || f.Code != "TimedOutWaitingForReadiness" || !strings.Contains(f.Message, "ConfigMap lingers/c") || len(f.Details) != 1 || !strings.Contains(f.Details[0].Message, "example.com/hold") {
		t.Errorf("the error is %v", f)
	}
	if r := must(c.Get(t.Context(), "r"))(t); r == nil {
		t.Error("the release was forgotten before its objects were gone")
	}
	hold(`{"metadata":{"finalizers":null}}`)
	if err := c.Remove(t.Context(), "r", long); err != nil {
		t.Error(err)
	}
}

func changedBack(t *testing.T, b *bed) {
	c := b.client(t, "changed-back")
	r := Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "ours")}), Timeout: long}
	must(c.Apply(t.Context(), r))(t)
	must(b.api.CoreV1().ConfigMaps("changed-back").Patch(t.Context(), "c", "application/merge-patch+json", []byte(`{"data":{"k":"theirs","more":"kept"}}`), metav1.PatchOptions{FieldManager: "kubectl-edit"}))(t)
	must(c.Apply(t.Context(), r))(t)
	m := must(b.api.CoreV1().ConfigMaps("changed-back").Get(t.Context(), "c", metav1.GetOptions{}))(t)
	if m.Data["k"] != "ours" || m.Data["more"] != "kept" {
		t.Errorf("the ConfigMap holds %v", m.Data)
	}
}

func earlier(t *testing.T, b *bed) {
	c := b.client(t, "earlier")
	before := b.everything(t)
	must(c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "")}), Timeout: long}))(t)
	// The upgrade fails before Helm deletes what it has no more.
	_, err := c.Apply(t.Context(), Request{Name: "r", Timeout: long, Chart: chart(t, map[string]string{
		"s.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {type: ExternalName}\n",
	})})
	refused(t, err, "RenderingFailed", "externalName")
	if err := c.Remove(t.Context(), "r", long); err != nil {
		t.Fatal(err)
	}
	b.same(t, before, "earlier")
}

func terminating(t *testing.T, b *bed) {
	b.namespace(t, "terminating", nil)
	held := &core.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "held", Finalizers: []string{"example.com/hold"}}}
	must(b.api.CoreV1().ConfigMaps("terminating").Create(t.Context(), held, metav1.CreateOptions{}))(t)
	if err := b.api.CoreV1().Namespaces().Delete(t.Context(), "terminating", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := b.client(t, "terminating").Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", "")}), Timeout: long})
	refused(t, err, "NamespaceTerminating", "kubectl get namespace terminating")
	must(b.api.CoreV1().ConfigMaps("terminating").Patch(t.Context(), "held", "application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}))(t)
}

func silent(t *testing.T, b *bed) {
	kubeconfig := strings.ReplaceAll(string(b.Kubeconfig(t)), ":"+b.Port, ":1")
	c := must(New([]byte(kubeconfig), "silent", nil))(t)
	small := chart(t, map[string]string{"c.yaml": configMap("c", "")})
	_, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Timeout: long})
	refused(t, err, "APIServerUnreachable")
	_, err = c.Get(t.Context(), "r")
	refused(t, err, "APIServerUnreachable")
	refused(t, c.Remove(t.Context(), "r", long), "APIServerUnreachable")
	c = must(New(b.TokenKubeconfig(t, "no-token"), "silent", nil))(t)
	_, err = c.Apply(t.Context(), Request{Name: "r", Chart: small, Timeout: long})
	refused(t, err, "LoginRefused")
}

func kept(t *testing.T, b *bed) {
	c := b.client(t, "kept")
	must(c.Apply(t.Context(), Request{Name: "r", Chart: chart(t, map[string]string{"c.yaml": configMap("c", ""), "d.yaml": configMap("d", "")}), Timeout: long}))(t)
	must(b.api.CoreV1().ConfigMaps("kept").Patch(t.Context(), "c", "application/merge-patch+json", []byte(`{"metadata":{"labels":{"app.kubernetes.io/managed-by":"me"}}}`), metav1.PatchOptions{}))(t)
	if err := c.Remove(t.Context(), "r", long); err != nil {
		t.Fatal(err)
	}
	left := must(b.api.CoreV1().ConfigMaps("kept").List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name!=kube-root-ca.crt"}))(t)
	if len(left.Items) != 1 || left.Items[0].Name != "c" {
		t.Errorf("left are %v", left.Items)
	}
}

func forbidden(t *testing.T, b *bed) {
	b.namespace(t, "forbidden", nil)
	must(b.api.CoreV1().ServiceAccounts("forbidden").Create(t.Context(), &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "weak"}}, metav1.CreateOptions{}))(t)
	c := must(New(b.TokenKubeconfig(t, b.token(t, "forbidden", "weak")), "forbidden", nil))(t)
	small := chart(t, map[string]string{"c.yaml": configMap("c", "")})
	apply := func() error {
		_, err := c.Apply(t.Context(), Request{Name: "r", Chart: small, Timeout: long})
		return err
	}
	refused(t, apply(), "PermissionMissing", "You do not have permission to perform get on namespaces", "If access was recently granted, please refresh your credentials", "kubectl apply -f deploy/manager-role.yaml")
	b.allow(t, "forbidden", "weak", rule("get", "", "namespaces"))
	refused(t, apply(), "PermissionMissing", "perform list on secrets in the namespace forbidden", "kubectl auth can-i list secrets -n forbidden --as=system:serviceaccount:forbidden:weak")
	records := rule("*", "", "secrets")
	b.allow(t, "forbidden", "weak", rule("get", "", "namespaces"), records)
	refused(t, apply(), "PermissionMissing", "perform get on configmaps")
	all := rule("*", "", "configmaps")
	b.allow(t, "forbidden", "weak", rule("get", "", "namespaces"), records, all)
	if err := apply(); err != nil {
		t.Fatal(err)
	}
	b.allow(t, "forbidden", "weak", records)
	refused(t, c.Remove(t.Context(), "r", long), "PermissionMissing", "perform get on configmaps")
	b.allow(t, "forbidden", "weak", records, rule("get", "", "configmaps"))
	refused(t, c.Remove(t.Context(), "r", long), "PermissionMissing", "perform delete on configmaps") // Helm tells that to its log only
	b.allow(t, "forbidden", "weak", records, all)
	if err := c.Remove(t.Context(), "r", long); err != nil {
		t.Error(err)
	}

	rights := []rbac.PolicyRule{records, rule("get", "", "namespaces")}
	for _, verb := range []string{"get", "create", "patch"} { // all but "escalate"
		rights = append(rights, rule(verb, "rbac.authorization.k8s.io", "clusterroles"))
	}
	b.allow(t, "forbidden", "weak", rights...)
	grants := chart(t, map[string]string{"r.yaml": "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: more}\nrules: [{apiGroups: [\"\"], resources: [nodes], verbs: [delete]}]\n"})
	_, err := c.Apply(t.Context(), Request{Name: "g", Chart: grants, Timeout: long})
	refused(t, err, "PermissionMissing", "a grant of rights that system:serviceaccount:forbidden:weak does not have itself", "nodes")
}
