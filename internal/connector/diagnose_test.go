package connector

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// healthy is a connection with workload identity that has nothing to mend.
func healthy() observation {
	d := wire.Desired{
		Revision: "r", Secret: &wire.SecretObject{Name: "sc-db-secret", Data: map[string]string{"K": "v"}},
		ServiceAccount: &wire.AccountObject{Name: "sc-account-client", Annotations: map[string]string{"a": "b"}},
	}
	return observation{
		name: "prod", namespaces: []string{"N"}, cluster: ClusterState{ID: testCluster, State: "Succeeded", Managed: true}, extension: "Succeeded",
		connection: &Connection{ID: testCluster + "/providers/Microsoft.ServiceLinker/linkers/db", Namespace: "shop", Auth: Authentication{Type: WorkloadIdentity, ClientID: "client"}},
		status:     Status{State: "Succeeded", Desired: "r"}, desired: &d,
		sight: &wire.Sight{
			Namespaces: map[string]string{"sc-system": "Active", "shop": "Active"}, Release: &wire.Release{Status: "deployed", Revision: 1}, Desired: "r", Webhook: true,
			Operator: &wire.Workload{State: wire.WorkloadReady}, Works: true,
			Objects: []wire.AppliedObject{
				{Kind: "Secret", Name: "sc-db-secret", Hash: wire.SecretHash(d.Secret.Data)}, {Kind: "ServiceAccount", Name: "sc-account-client", Hash: wire.SecretHash(d.ServiceAccount.Annotations)},
			},
			Consumers: []wire.Use{{Kind: "Deployment", Namespace: "shop", Name: "web", Secret: true, Account: "sc-account-client", PodLabel: true}},
		},
	}
}

// TestFindings: what each thing that can be wrong is called, what it names, and what
// is to be run; and that the first line that is not a success is that of the cause.
func TestFindings(t *testing.T) {
	problem := &wire.Problem{Code: "ItsOwn", Layer: "helm", Message: "m", Fix: "f"}
	for name, c := range map[string]struct {
		change                     func(*observation)
		finding, result, code, fix string // of the first that is no success; an empty finding: all are
	}{
		"nothing": {change: func(*observation) {}},
		"registration": {
			func(o *observation) {
				o.unregistered = []wire.Problem{{Code: "MissingSubscriptionRegistration", Fix: "az provider register -n X"}}
			}, "Registration", "failure", "MissingSubscriptionRegistration", "az provider register",
		},
		"permission": {func(o *observation) { o.refused, o.status.State = []wire.Problem{*problem}, "Failed" }, "Permission", "failure", "ItsOwn", "f"},
		"of others":  {func(o *observation) { o.refused = []wire.Problem{*problem} }, "Permission", "warning", "ItsOwn", "f"},
		"cluster":    {func(o *observation) { o.cluster.State, o.cluster.Reason = "Failed", "x509" }, "Cluster", "failure", "ClusterNotReady", "keyfleet cluster show prod"},
		"busy":       {func(o *observation) { o.cluster.Busy = "a rotation" }, "Cluster", "warning", "Conflict", "keyfleet cluster show prod"},
		"nobody looks": {
			func(o *observation) { o.cluster.Managed, o.cluster.State, o.sight = false, "Failed", nil }, "Cluster", "unknown", "ClusterNotSeen", "keyfleet cluster show",
		},
		"silent manager": {func(o *observation) { o.sight = nil }, "Manager", "warning", "ManagerSilent", "ask again"},
		"no extension":   {func(o *observation) { o.extension = "" }, "Extension", "failure", "ExtensionNotFound", "keyfleet extension update sc-extension --cluster prod"},
		"extension":      {func(o *observation) { o.extension, o.extensionProblem = "Failed", problem }, "Extension", "failure", "ItsOwn", "f"},
		"installing":     {func(o *observation) { o.extension = "Creating" }, "Extension", "warning", "ExtensionInProgress", "keyfleet extension show"},
		"API server": {
			func(o *observation) { o.sight = &wire.Sight{Unseen: map[wire.Part]string{wire.PartServer: "EOF"}} }, "API server", "failure", "APIServerUnreachable", "kubectl get --raw /readyz",
		},
		"sc-system":  {func(o *observation) { delete(o.sight.Namespaces, "sc-system") }, "Namespace sc-system", "failure", "NamespaceNotFound", "kubectl apply -f deploy/manager-role.yaml"},
		"going":      {func(o *observation) { o.sight.Namespaces["shop"] = "Terminating" }, "Namespace shop", "failure", "NamespaceTerminating", "wait"},
		"namespace":  {func(o *observation) { delete(o.sight.Namespaces, "shop") }, "Namespace shop", "failure", "NamespaceNotFound", "kubectl create namespace shop"},
		"unseen":     {func(o *observation) { o.sight.Unseen = map[wire.Part]string{wire.PartNamespaces: "no"} }, "Namespace sc-system", "unknown", "NotSeen", "manager-role.yaml"},
		"no release": {func(o *observation) { o.sight.Release, o.sight.Works = nil, false }, "Helm release", "failure", "ReleaseNotFound", "keyfleet extension show"},
		"by hand":    {func(o *observation) { o.sight.Release = nil }, "Helm release", "warning", "ReleaseNotFound", "helm list -n sc-system"},
		"pending":    {func(o *observation) { o.sight.Release.Status = "pending-upgrade" }, "Helm release", "warning", "HelmOperationInProgress", "helm history"},
		"release":    {func(o *observation) { o.sight.Release.Status = "failed" }, "Helm release", "failure", "HelmFailed", "helm history"},
		"job runs":   {func(o *observation) { o.sight.Job = &wire.Workload{State: wire.WorkloadNotReady} }, "Job sc-job", "warning", "JobRunning", "kubectl describe job/sc-job -n sc-system"},
		"job failed": {func(o *observation) { o.sight.Job = &wire.Workload{State: wire.WorkloadFailed} }, "Job sc-job", "failure", "JobFailed", "kubectl logs job/sc-job -n sc-system"},
		"job's image": {func(o *observation) {
			o.sight.Job = &wire.Workload{State: wire.WorkloadNotReady, Causes: []wire.Problem{{Code: "ImagePullFailed", Fix: "f"}}}
		}, "Job sc-job", "failure", "ImagePullFailed", "f"},
		"job crashed": {func(o *observation) {
			o.sight.Job = &wire.Workload{State: wire.WorkloadFailed, Causes: []wire.Problem{{Code: "ContainerFailed", Fix: "f"}}}
		}, "Job sc-job", "failure", "JobFailed", "kubectl logs"},
		"no operator": {func(o *observation) { o.sight.Operator, o.sight.Works = nil, false }, "Operator", "failure", "OperatorNotFound", "keyfleet extension show"},
		"operator": {func(o *observation) {
			o.sight.Operator, o.sight.Works = &wire.Workload{State: wire.WorkloadNotReady}, false
		}, "Operator", "failure", "OperatorNotReady", "kubectl"},
		"a replica":              {func(o *observation) { o.sight.Operator = &wire.Workload{State: wire.WorkloadNotReady} }, "Operator", "warning", "OperatorNotReady", "kubectl"},
		"rights":                 {func(o *observation) { o.sight.Missing, o.status.State = []string{"list jobs.batch"}, "Failed" }, "Manager's permissions", "failure", "PermissionMissing", "kubectl apply -f deploy/manager-role.yaml"},
		"few rights":             {func(o *observation) { o.sight.Missing = []string{"list jobs.batch"} }, "Manager's permissions", "warning", "PermissionMissing", "manager-role"},
		"not brought":            {func(o *observation) { o.sight.Desired = "" }, "Desired state", "failure", "DesiredStateMissing", "keyfleet-connector"},
		"on the way":             {func(o *observation) { o.sight.Desired = "q" }, "Desired state", "warning", "DesiredStateOld", "again"},
		"nothing yet":            {func(o *observation) { o.status.Desired, o.status.State = "", "Accepted" }, "Desired state", "unknown", "NothingDesired", "Connection"},
		"no Secret":              {func(o *observation) { o.sight.Objects = o.sight.Objects[1:] }, "Secret", "failure", "ObjectMissing", "kubectl"},
		"no account":             {func(o *observation) { o.sight.Objects = o.sight.Objects[:1] }, "ServiceAccount", "failure", "ObjectMissing", "kubectl"},
		"other data":             {func(o *observation) { o.sight.Objects[0].Hash = "x" }, "Secret", "failure", "ObjectDiffers", "kubectl"},
		"paused":                 {func(o *observation) { o.sight.Objects[0].Hash, o.paused = "x", time.Now() }, "Secret", "warning", "ObjectPaused", "pause-until"},
		"vault":                  {func(o *observation) { o.desired, o.undesired = nil, problem }, "ServiceAccount", "unknown", "ItsOwn", "f"},
		"problem":                {func(o *observation) { o.status.State, o.status.Problem = "Failed", problem }, "Connection", "failure", "ItsOwn", "f"},
		"waits":                  {func(o *observation) { o.status.State, o.status.Waiting = "Accepted", "x" }, "Connection", "warning", "Waiting", "keyfleet connection show db --cluster prod"},
		"no webhook":             {func(o *observation) { o.sight.Webhook = false }, "Webhook", "failure", "WebhookMissing", "webhook.enabled=true"},
		"nobody needs a webhook": {func(o *observation) { o.sight.Webhook, o.sight.Consumers = false, nil }, "Webhook", "warning", "WebhookMissing", "webhook.enabled=true"},
		"old pods":               {func(o *observation) { o.old = []wire.Consumer{{Pod: "shop/a"}} }, "Pod shop/a", "warning", "OldCredential", "kubectl rollout restart"},
	} {
		o := healthy()
		c.change(&o)
		all := findings(o)
		i := slices.IndexFunc(all, func(f wire.Finding) bool { return f.Result != wire.Success })
		if c.finding == "" {
			if i >= 0 || len(all) != 16 {
				t.Errorf("%s: %d findings, %+v", name, len(all), all)
			}
			continue
		}
		if i < 0 {
			t.Errorf("%s: nothing is wrong: %+v", name, all)
			continue
		}
		f := all[i]
		if f.Name != c.finding || f.Result != c.result || f.Code != c.code || !strings.Contains(f.Fix, c.fix) {
			t.Errorf("%s: %+v, want %s %s %s with %q", name, f, c.finding, c.result, c.code, c.fix)
		}
	}
}

// TestMisuse: what a workload with workload identity needs, and what is said of one
// that lacks it.
func TestMisuse(t *testing.T) {
	const account = "sc-account-client"
	for name, c := range map[string]struct {
		use          wire.Use
		code, result string
		says         []string
	}{
		"as it shall be":       {use: wire.Use{Kind: "Job", Secret: true, Account: account, PodLabel: true}},
		"label on both":        {use: wire.Use{Kind: "Job", Secret: true, Account: account, Label: true, PodLabel: true}},
		"the documentation's":  {wire.Use{Kind: "Job", Secret: true, Account: account, Label: true}, "LabelMisplaced", "failure", []string{"Job shop/x", "spec.template.metadata.labels", "kubectl replace --force"}},
		"on a Deployment":      {wire.Use{Kind: "Deployment", Account: account, Label: true}, "LabelMisplaced", "failure", []string{"kubectl -n shop patch deployment x"}},
		"on a StatefulSet":     {wire.Use{Kind: "StatefulSet", Account: account}, "LabelMissing", "failure", []string{"kubectl -n shop patch statefulset x"}},
		"on a CronJob":         {wire.Use{Kind: "CronJob", Account: account, Label: true}, "LabelMisplaced", "failure", []string{"under spec.jobTemplate.spec.template.metadata.labels", `{"spec":{"jobTemplate":{"spec":{"template":{"metadata":{"labels":{"azure.workload.identity/use":"true"}}}}}}}`}},
		"no label":             {wire.Use{Kind: "Job", Account: account}, "LabelMissing", "failure", []string{"spec.template.metadata.labels"}},
		"no label on a Pod":    {wire.Use{Kind: "Pod", Account: account}, "LabelMissing", "failure", []string{"under metadata.labels"}},
		"no account":           {wire.Use{Kind: "Job", Secret: true, PodLabel: true}, "AccountNotUsed", "failure", []string{"ServiceAccount default", "serviceAccountName: " + account}},
		"variables only":       {wire.Use{Kind: "Job", Secret: true, Account: "other"}, "AccountNotUsed", "warning", []string{"ServiceAccount other"}},
		"before the webhook":   {wire.Use{Kind: "Pod", Account: account, PodLabel: true}, "TokenMissing", "failure", []string{"make it anew"}},
		"a Pod with its token": {use: wire.Use{Kind: "Pod", Account: account, PodLabel: true, Token: true}},
	} {
		c.use.Namespace, c.use.Name = "shop", "x"
		f, wrong := misuse(c.use, account, true)
		if !wrong {
			if c.code != "" {
				t.Errorf("%s: nothing is wrong", name)
			}
			continue
		}
		if f.Code != c.code || f.Result != c.result {
			t.Errorf("%s: %+v", name, f)
		}
		for _, part := range c.says {
			if !strings.Contains(f.Message+f.Fix, part) {
				t.Errorf("%s does not say %q: %+v", name, part, f)
			}
		}
	}
}

// FuzzFindings: whatever a manager reports, each finding says what it is about, and
// each that is no success has a code and something to do.
func FuzzFindings(f *testing.F) {
	text, err := json.Marshal(healthy().sight)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"job":{"state":"failed","causes":[{"code":"x","fix":"y"}]},"jobLog":"\ufffd","consumers":[{"kind":"Job","label":true}]}`))
	f.Add([]byte(`{"unseen":{"job":"x","API server":"y"},"operator":{}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		o := healthy()
		o.sight = &wire.Sight{}
		if json.Unmarshal(text, o.sight) != nil {
			return
		}
		for _, f := range findings(o) {
			own := slices.Contains([]string{"Job sc-job", "Operator"}, f.Name) // causes are the manager's words
			if f.Name == "" || f.Result == "" || f.Message == "" || f.Result != wire.Success && !own && (f.Code == "" || f.Fix == "") || len(f.Raw) > 4000 {
				t.Errorf("%q: %+v", text, f)
			}
		}
	})
}

func (w *world) ask(id string) {
	w.t.Helper()
	if err := w.Ask(w.system(), id); err != nil {
		w.t.Fatal(err)
	}
}

// asked is what managers are asked about the cluster.
func (w *world) asked() []wire.Question {
	w.t.Helper()
	all, err := w.Questions(w.system())
	if err != nil {
		w.t.Fatal(err)
	}
	return all[strings.ToLower(testCluster)]
}

// TestQuestion: one is asked, and answered, or it answers itself; none stays.
func TestQuestion(t *testing.T) {
	w := newWorld(t)
	w.cluster.Managed = true
	w.register()
	o := w.put(database("db"))
	if _, _, err := w.Diagnosis(w.system(), o.Spec.ID); fault.KindOf(err) != fault.NotFound {
		t.Errorf("nobody has asked: %v", err)
	}
	w.ask(o.Spec.ID)
	w.ask(strings.ToUpper(o.Spec.ID)) // joins it
	q := w.asked()
	if len(q) != 1 || q[0].Secret != "sc-db-secret" || q[0].Namespace != "default" || q[0].UID == "" || q[0].ServiceAccount != "" {
		t.Fatalf("%+v", q)
	}
	if _, ok, err := w.Diagnosis(w.system(), o.Spec.ID); ok || err != nil {
		t.Errorf("nobody has answered: %v, %v", ok, err)
	}
	if err := w.Answer(w.system(), o.Spec.ID, wire.Sight{UID: "another"}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the answer to another question: %v", err)
	}
	sight := wire.Sight{UID: q[0].UID, Namespaces: map[string]string{"sc-system": "Active"}}
	if err := w.Answer(w.system(), o.Spec.ID, sight); err != nil {
		t.Fatal(err)
	}
	d, ok, err := w.Diagnosis(w.system(), o.Spec.ID)
	if err != nil || !ok || d.Answered.IsZero() || !slices.ContainsFunc(d.Findings, func(f wire.Finding) bool { return f.Name == "Namespace default" && f.Code == "NamespaceNotFound" }) {
		t.Errorf("%+v, %v, %v", d, ok, err)
	}
	if len(w.asked()) != 0 {
		t.Error("a question that was answered is asked again")
	}

	w.ask(o.Spec.ID) // anew, and nobody answers
	if _, ok, _ := w.Diagnosis(w.system(), o.Spec.ID); ok {
		t.Error("the old answer is that to the new question")
	}
	w.cluster.Managed, w.cluster.State, w.cluster.Reason = false, "Failed", "no manager has looked at the cluster"
	w.now = w.now.Add(questionTime)
	d, ok, err = w.Diagnosis(w.system(), o.Spec.ID)
	if err != nil || !ok || !d.Answered.IsZero() || !slices.ContainsFunc(d.Findings, func(f wire.Finding) bool { return f.Result == wire.Failure && f.Code == "NoManager" && f.Fix != "" }) {
		t.Errorf("%+v, %v, %v", d, ok, err)
	}
	if len(w.asked()) != 0 {
		t.Error("what was given up is still asked")
	}
	all, err := questions.List(w.store.View(t.Context()), "")
	if err != nil || len(all) != 1 || questions.TTL == 0 {
		t.Errorf("%d questions are kept, %v", len(all), err)
	}
}

// TestQuestionAboutTheExtension: it can be asked also where there is none.
func TestQuestionAboutTheExtension(t *testing.T) {
	w := newWorld(t)
	w.cluster.Managed = true
	id := extensionID(w.clusterID())
	w.ask(id)
	if q := w.asked(); len(q) != 1 || q[0].ID != id || q[0].Secret != "" {
		t.Fatalf("%+v", q)
	}
	if err := w.Answer(w.system(), id, wire.Sight{UID: w.asked()[0].UID}); err != nil {
		t.Fatal(err)
	}
	d, ok, err := w.Diagnosis(w.system(), id)
	if err != nil || !ok || d.ID != id || !slices.ContainsFunc(d.Findings, func(f wire.Finding) bool { return f.Code == "ExtensionNotFound" }) {
		t.Errorf("%+v, %v, %v", d, ok, err)
	}
}

// TestWhoMayAsk: nobody learns anything, and nobody answers, without the permission.
func TestWhoMayAsk(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.put(database("db"))
	stranger := access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, ObjectID: "stranger"}})
	for what, err := range map[string]error{
		"ask":      w.Ask(stranger, o.Spec.ID),
		"ask none": w.Ask(stranger, o.Spec.ID+"x"),
		"ask about an extension that is not there": w.Ask(stranger, testCluster+"/providers/"+ExtensionType+"/x"),
		"answer": w.Answer(stranger, o.Spec.ID, wire.Sight{}),
		"read":   func() error { _, _, err := w.Diagnosis(stranger, o.Spec.ID); return err }(),
	} {
		if fault.KindOf(err) != fault.Denied {
			t.Errorf("a stranger may %s: %v", what, err)
		}
	}
	if err := w.Ask(w.system(), o.Spec.ID+"x"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a connection that is not there: %v", err)
	}
	w.gone = true
	if err := w.Ask(w.system(), o.Spec.ID); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a cluster that is not there: %v", err)
	}
	w.gone = false
	w.ask(o.Spec.ID)
	long := wire.Sight{UID: w.asked()[0].UID, JobLog: strings.Repeat("x", mostSight)}
	if err := w.Answer(w.system(), o.Spec.ID, long); fault.KindOf(err) != fault.Invalid {
		t.Errorf("an answer that is too long: %v", err)
	}
}

// TestCallersPermission: what the caller lacks is said in the documentation's words.
func TestCallersPermission(t *testing.T) {
	w := newWorld(t)
	w.register()
	o := w.put(database("db"))
	var reader context.Context = access.With(t.Context(), access.Call{Principal: access.Principal{Kind: access.Application, ObjectID: "reader"}})
	of, err := parseSubject(o.Spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	known, err := w.observe(reader, of)
	if err != nil {
		t.Fatal(err)
	}
	if f := permission(known); f[0].Code != "AuthorizationFailed" || !strings.HasPrefix(f[0].Message, "You do not have permission to perform") {
		t.Errorf("%+v", f)
	}
	w.cfg.Place = func(_ *store.Tx, _, _, namespace string) error {
		if namespace != "Microsoft.KubernetesConfiguration" {
			return nil
		}
		return fault.New(fault.Conflict, "MissingSubscriptionRegistration", "The subscription is not registered to use namespace '%s'.", namespace).WithFix("az provider register -n %s", namespace)
	}
	if known, err = w.observe(w.system(), of); err != nil {
		t.Fatal(err)
	}
	if f := registration(known); len(f) != 1 || f[0].Result != wire.Failure || f[0].Fix != "az provider register -n Microsoft.KubernetesConfiguration" {
		t.Errorf("%+v", f)
	}
}

func FuzzParseSubject(f *testing.F) {
	f.Add(database("db").ID)
	f.Add(testCluster + "/providers/Microsoft.KubernetesConfiguration/extensions/sc-extension")
	f.Add("/providers/microsoft.kubernetesconfiguration/extensions/")
	f.Add("\xff\xff/providers/Microsoft.KubernetesConfiguration/extensions/x") // lower-casing makes it longer
	f.Add("\xff\xff/providers/Microsoft.ServiceLinker/linkers/x")
	f.Fuzz(func(t *testing.T, s string) {
		of, err := parseSubject(s)
		if err != nil {
			return
		}
		again, err := parseSubject(of.id)
		if err != nil || again.key() != of.key() || again.op().Action != of.op().Action || again.op().Resource != of.op().Resource {
			t.Errorf("%q became %+v, and again %+v, %v", s, of, again, err)
		}
	})
}
