package scextension

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/deploy"
)

const managerUser = "system:serviceaccount:keyfleet:manager"

// shipped makes what deploy/manager-role.yaml makes. Of the rules those that are
// dropped are left out.
func (b *bed) shipped(t *testing.T, dropped func(rule map[string]any) bool) {
	t.Helper()
	for dec := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(deploy.ManagerRole()), 4096); ; {
		u := &unstructured.Unstructured{}
		err := dec.Decode(&u.Object)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if rules, ok := u.Object["rules"].([]any); ok {
			u.Object["rules"] = slices.DeleteFunc(rules, func(r any) bool { return dropped(r.(map[string]any)) })
		}
		group, version, _ := strings.Cut(u.GetAPIVersion(), "/")
		if version == "" {
			group, version = "", group
		}
		resource := b.admin.objects.Resource(schema.GroupVersionResource{Group: group, Version: version, Resource: strings.ToLower(u.GetKind()) + "s"})
		_, err = resource.Namespace(u.GetNamespace()).Create(t.Context(), u, metav1.CreateOptions{})
		if _, ok := u.Object["rules"]; ok && apierrors.IsAlreadyExists(err) {
			_, err = resource.Namespace(u.GetNamespace()).Update(t.Context(), u, metav1.UpdateOptions{})
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatalf("%s %s: %v", u.GetKind(), u.GetName(), err)
		}
	}
}

func nothing(map[string]any) bool { return false }

// about is the question about a connection.
func about(d wire.Desired) wire.Question {
	q := wire.Question{ID: d.ID, UID: "u", Namespace: d.Namespace, Secret: d.Secret.Name}
	if d.ServiceAccount != nil {
		q.ServiceAccount = d.ServiceAccount.Name
	}
	return q
}

// see has the manager look, with the rights of the shipped role and no others.
func (b *bed) see(t *testing.T, q wire.Question) wire.Sight {
	t.Helper()
	s := diagnose(t.Context(), b.as(t, managerUser).api, nil, q)
	if _, ok := s.Unseen[wire.PartRelease]; !ok || s.UID != "u" {
		t.Errorf("a manager without Helm has seen a release: %+v", s)
	}
	delete(s.Unseen, wire.PartRelease)
	return s
}

// TestDiagnose has a manager look at a real API server for what the documentation's
// list of troubleshooting names.
func TestDiagnose(t *testing.T) {
	b := newBed(t)
	b.StartControllers(t)
	b.shipped(t, nothing)
	b.namespace(t, "shop")
	d := linker("kv", "shop", map[string]string{"AZURE_KEYVAULT_CLIENTID": "client", "OTHER": "canary"})
	d.ServiceAccount = &wire.AccountObject{Name: "sc-account-client", Annotations: map[string]string{identityClient: "client", identityTenant: "tenant"}}
	d = revised(d)
	b.order(t, d)
	must(b.work(t))(t)
	eventually(t, "the manager has its rights", func() bool { return len(b.see(t, about(d)).Missing) == 0 })

	t.Run("a connection that is as it shall be", func(t *testing.T) {
		s := b.see(t, about(d))
		if len(s.Unseen) > 0 || len(s.Missing) > 0 || s.Namespaces["sc-system"] != "Active" || s.Namespaces["shop"] != "Active" || s.Desired != d.Revision || s.Job != nil || s.Operator != nil || s.Webhook {
			t.Errorf("%+v", s)
		}
		for kind, hash := range map[string]string{"Secret": wire.SecretHash(d.Secret.Data), "ServiceAccount": wire.SecretHash(d.ServiceAccount.Annotations)} {
			if !slices.ContainsFunc(s.Objects, func(o wire.AppliedObject) bool { return o.Kind == kind && o.Hash == hash }) {
				t.Errorf("the %s is not seen to be as it shall be: %+v", kind, s.Objects)
			}
		}
	})
	t.Run("workloads", func(t *testing.T) { b.workloads(t, d) })
	t.Run("a namespace that is not there", func(t *testing.T) {
		absent := linker("absent", "absent", map[string]string{"K": "v"})
		b.order(t, absent)
		if s := b.see(t, about(absent)); len(s.Unseen) > 0 || s.Namespaces["absent"] != "" || len(s.Objects) != 0 || s.Desired != absent.Revision {
			t.Errorf("%+v", s)
		}
	})
	t.Run("the job fails", b.jobFails)
	t.Run("a rule of the role is missing", func(t *testing.T) {
		b.shipped(t, func(rule map[string]any) bool {
			resources, _ := rule["resources"].([]any)
			return slices.Contains(resources, any("secrets")) || slices.Contains(resources, any("csidrivers"))
		})
		var s wire.Sight
		eventually(t, "the right is gone", func() bool { s = b.see(t, about(d)); return len(s.Missing) > 0 })
		all := strings.Join(s.Missing, "; ")
		if !strings.Contains(all, "get, list, watch, create, update, patch, delete secrets") || !strings.Contains(all, "get csidrivers.storage.k8s.io secrets-store.csi.k8s.io") || strings.Contains(all, "jobs") {
			t.Errorf("missing are %s", all)
		}
		if s.Unseen[wire.PartObjects] == "" || s.Unseen[wire.PartDesired] == "" || s.Unseen[wire.PartConsumers] != "" || !strings.Contains(s.Unseen[wire.PartDesired], "forbidden") {
			t.Errorf("unseen are %v", s.Unseen)
		}
	})
	t.Run("the API server is away", func(t *testing.T) {
		kubeconfig := strings.ReplaceAll(string(b.Kubeconfig(t)), ":"+b.Port, ":1")
		s := diagnose(t.Context(), must(connect([]byte(kubeconfig), lookTime))(t), nil, about(d))
		if len(s.Unseen) != 1 || s.Unseen[wire.PartServer] == "" {
			t.Errorf("%+v", s)
		}
	})
}

// workloads: the documentation's Job as written, and others with a mistake of their own.
func (b *bed) workloads(t *testing.T, d wire.Desired) {
	label := map[string]string{identityLabel: "true"}
	spec := func(account string) core.PodSpec {
		return core.PodSpec{ServiceAccountName: account, RestartPolicy: core.RestartPolicyOnFailure, Containers: []core.Container{{Name: "raw-linux", Image: "alpine", Command: []string{"printenv"}, EnvFrom: envFrom(d.Secret.Name)}}}
	}
	job := func(name string, self, pods map[string]string, spec core.PodSpec) {
		must(b.api.BatchV1().Jobs("shop").Create(t.Context(), &batch.Job{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: self},
			Spec:       batch.JobSpec{Template: core.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: pods}, Spec: spec}},
		}, metav1.CreateOptions{}))(t)
	}
	job("sc-sample-job", label, nil, spec(d.ServiceAccount.Name)) // as the documentation has it
	job("corrected", nil, label, spec(d.ServiceAccount.Name))
	job("variables", nil, nil, spec(""))
	job("others", label, nil, core.PodSpec{RestartPolicy: core.RestartPolicyNever, Containers: []core.Container{{Name: "c", Image: "i"}}})
	app := map[string]string{"app": "web"}
	mounts := spec(d.ServiceAccount.Name)
	mounts.RestartPolicy, mounts.Containers[0].EnvFrom = "", nil
	mounts.Volumes = []core.Volume{{Name: "v", VolumeSource: core.VolumeSource{Secret: &core.SecretVolumeSource{SecretName: d.Secret.Name}}}}
	must(b.api.AppsV1().Deployments("shop").Create(t.Context(), &apps.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: label},
		Spec:       apps.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: app}, Template: core.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: app}, Spec: mounts}},
	}, metav1.CreateOptions{}))(t)
	template := core.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: app}, Spec: mounts}
	must(b.api.AppsV1().StatefulSets("shop").Create(t.Context(), &apps.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "queue", Labels: label}, Spec: apps.StatefulSetSpec{Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template},
	}, metav1.CreateOptions{}))(t)
	must(b.api.AppsV1().DaemonSets("shop").Create(t.Context(), &apps.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "agent"}, Spec: apps.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template},
	}, metav1.CreateOptions{}))(t)
	nightly := must(b.api.BatchV1().CronJobs("shop").Create(t.Context(), &batch.CronJob{
		ObjectMeta: metav1.ObjectMeta{Name: "nightly", Labels: label},
		Spec:       batch.CronJobSpec{Schedule: "0 3 * * *", JobTemplate: batch.JobTemplateSpec{Spec: batch.JobSpec{Template: core.PodTemplateSpec{Spec: spec(d.ServiceAccount.Name)}}}},
	}, metav1.CreateOptions{}))(t)
	must(b.api.BatchV1().Jobs("shop").Create(t.Context(), &batch.Job{
		ObjectMeta: metav1.ObjectMeta{Name: "nightly-1", OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(nightly, batch.SchemeGroupVersion.WithKind("CronJob"))}},
		Spec:       batch.JobSpec{Template: core.PodTemplateSpec{Spec: spec(d.ServiceAccount.Name)}},
	}, metav1.CreateOptions{}))(t)
	eventually(t, "there is a default ServiceAccount", func() bool {
		_, err := b.api.CoreV1().ServiceAccounts("shop").Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	must(b.api.CoreV1().Pods("shop").Create(t.Context(), &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "bare", Labels: label}, Spec: spec(d.ServiceAccount.Name)}, metav1.CreateOptions{}))(t)
	want := map[string]wire.Use{
		"Job sc-sample-job": {Secret: true, Account: d.ServiceAccount.Name, Label: true},
		"Job corrected":     {Secret: true, Account: d.ServiceAccount.Name, Label: true, PodLabel: true}, // a Job without labels gets those of its pods
		"Job variables":     {Secret: true},
		"Deployment web":    {Secret: true, Account: d.ServiceAccount.Name, Label: true},
		"StatefulSet queue": {Secret: true, Account: d.ServiceAccount.Name, Label: true},
		"DaemonSet agent":   {Secret: true, Account: d.ServiceAccount.Name},
		"CronJob nightly":   {Secret: true, Account: d.ServiceAccount.Name, Label: true}, // and not its Job
		"Pod bare":          {Secret: true, Account: d.ServiceAccount.Name, PodLabel: true},
	}
	var s wire.Sight
	eventually(t, "the job's pod is there", func() bool {
		s = b.see(t, about(d))
		return slices.ContainsFunc(s.Consumers, func(u wire.Use) bool { return u.Owned }) // that of "corrected": label and no token
	})
	for _, u := range s.Consumers {
		if u.Owned {
			if !strings.HasPrefix(u.Name, "corrected-") || u.Token || !u.PodLabel {
				t.Errorf("%+v", u)
			}
			continue
		}
		name := u.Kind + " " + u.Name
		expected, ok := want[name]
		expected.Kind, expected.Namespace, expected.Name = u.Kind, "shop", u.Name
		if !ok || u != expected {
			t.Errorf("%s is %+v", name, u)
		}
		delete(want, name)
	}
	if len(want) > 0 || len(s.Unseen) > 0 {
		t.Errorf("not seen are %v, %v", want, s.Unseen)
	}
	must(b.api.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), &admissionv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "sc-webhook"}, Webhooks: []admissionv1.MutatingWebhook{{
			Name: "mutation.azure-workload-identity.io", AdmissionReviewVersions: []string{"v1"}, SideEffects: new(admissionv1.SideEffectClassNone),
			ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: Namespace, Name: "none"}}, ObjectSelector: &metav1.LabelSelector{MatchLabels: label},
		}},
	}, metav1.CreateOptions{}))(t)
	if s = b.see(t, about(d)); !s.Webhook {
		t.Error("the webhook is not seen")
	}
}

// jobFails: sc-job while its image is not there, and after it failed; the kubelet's
// words are written by the test.
func (b *bed) jobFails(t *testing.T) {
	once := int32(0)
	must(b.api.BatchV1().Jobs(Namespace).Create(t.Context(), &batch.Job{
		ObjectMeta: metav1.ObjectMeta{Name: jobName},
		Spec: batch.JobSpec{BackoffLimit: &once, Template: core.PodTemplateSpec{
			Spec: core.PodSpec{RestartPolicy: core.RestartPolicyNever, Containers: []core.Container{{Name: "job", Image: "x/y:none"}}},
		}},
	}, metav1.CreateOptions{}))(t)
	var pod core.Pod
	eventually(t, "the job has a pod", func() bool {
		pods := must(b.api.CoreV1().Pods(Namespace).List(t.Context(), metav1.ListOptions{LabelSelector: batch.JobNameLabel + "=" + jobName}))(t)
		if len(pods.Items) > 0 {
			pod = pods.Items[0]
		}
		return len(pods.Items) > 0
	})
	becomes := func(phase core.PodPhase, state core.ContainerState) {
		pod.Status = core.PodStatus{Phase: phase, ContainerStatuses: []core.ContainerStatus{{Name: "job", Image: "x/y:none", State: state}}}
		pod = *must(b.api.CoreV1().Pods(Namespace).UpdateStatus(t.Context(), &pod, metav1.UpdateOptions{}))(t)
	}
	q := wire.Question{ID: "x", UID: "u"} // about the extension
	const said = `failed to resolve reference "x/y:none": not found`
	becomes(core.PodPending, core.ContainerState{Waiting: &core.ContainerStateWaiting{Reason: "ErrImagePull", Message: said}})
	s := b.see(t, q)
	if s.Job == nil || s.Job.State != wire.WorkloadNotReady || len(s.Job.Causes) == 0 || s.Job.Causes[0].Code != "ImagePullFailed" || !strings.Contains(s.Job.Causes[0].Message, said) || len(s.Namespaces) != 1 {
		t.Errorf("%+v", s)
	}
	becomes(core.PodFailed, core.ContainerState{Terminated: &core.ContainerStateTerminated{ExitCode: 3, Reason: "Error", FinishedAt: metav1.NewTime(time.Now())}})
	eventually(t, "the job has failed", func() bool { s = b.see(t, q); return s.Job != nil && s.Job.State == wire.WorkloadFailed })
	if !strings.Contains(s.Job.Message, "BackoffLimitExceeded") || len(s.Job.Causes) == 0 || s.Job.Causes[0].Code != "ContainerFailed" || len(s.Unseen) > 0 {
		t.Errorf("%+v", s)
	}
}

// TestRightsOf: the shipped role is read as it is written.
func TestRightsOf(t *testing.T) {
	all, err := rightsOf(deploy.ManagerRole())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []right{
		{verb: "list", resource: "nodes"},
		{verb: "get", path: "/version"},
		{verb: "get", group: "storage.k8s.io", resource: "csidrivers", name: "secrets-store.csi.k8s.io"},
		{verb: "get", resource: "pods/log", namespace: Namespace},
	} {
		if !slices.Contains(all, r) {
			t.Errorf("%+v is not read", r)
		}
	}
}

func FuzzRightsOf(f *testing.F) {
	f.Add(deploy.ManagerRole())
	f.Add([]byte("rules:\n- verbs: [get]\n  nonResourceURLs: [/x]\n---\n{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := rightsOf(text)
		for _, r := range all {
			if err == nil && r.path == "" && r.on() == "" && r.resource != "" {
				t.Errorf("%q: %+v", text, r)
			}
		}
	})
}
