package helm

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/internal/fault"
)

// nowhere is an operation on a cluster that does not answer.
func nowhere(t testing.TB) *operation {
	t.Helper()
	kubeconfig := []byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"c"}}],
		"clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}],"users":[{"name":"c","user":{}}]}`)
	o := must(must(New(kubeconfig, "sc-system", slog.New(slog.DiscardHandler)))(t).begin(t.Context(), "sc-extension", long))(t)
	t.Cleanup(o.end)
	return o
}

// TestHelmTexts has what Helm says, as it says it, and what it means. Most of these
// are also brought about for real in TestRelease.
func TestHelmTexts(t *testing.T) {
	o := nowhere(t)
	for text, want := range map[string][]string{
		"another operation (install/upgrade/rollback) is in progress":         {"HelmOperationInProgress", "Operation is already in progress for Helm"},
		"release name check failed: cannot reuse a name that is still in use": {"HelmOperationInProgress", "Operation is already in progress for Helm"},
		`unable to continue with install: Secret "x" in namespace "a" exists and cannot be imported into the current release: invalid ownership metadata; label validation error`: {
			"ResourceExists", "Resource already exists in your cluster: the Secret a/x",
		},
		`execution error at (small/templates/x.yaml:1:3): give .Values.x`:               {"RenderingFailed", "Helm chart rendering failed with given values: give .Values.x"},
		`template: small/templates/x.yaml:3: function "x" not defined`:                  {"RenderingFailed", `function "x" not defined`},
		`parse error at (small/templates/x.yaml:1): unclosed action`:                    {"RenderingFailed", "unclosed action"},
		"chart requires kubeVersion: >=2 which is incompatible with Kubernetes v1.36.0": {"RenderingFailed", "kubeVersion: >=2"},
		`unable to build kubernetes objects from release manifest: resource mapping not found for name: "x" namespace: "" from "": no matches for kind "X" in version "e.com/v1"`: {"KindNotInstalled", "the kind X (e.com/v1)"},
		`deployments.apps is forbidden: User "u" cannot create resource "deployments" in API group "apps" in the namespace "n"`: {
			"PermissionMissing", "You do not have permission to perform create on deployments.apps in the namespace n as u. If access was recently granted, please refresh your credentials.",
		},
		`clusterroles.rbac.authorization.k8s.io "x" is forbidden: user "u" (groups=["g"]) is attempting to grant RBAC permissions not currently held:` + "\n" + `{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}`: {
			"PermissionMissing", `u does not have itself: {APIGroups:[""], Resources:["secrets"], Verbs:["get"]}`,
		},
		`admission webhook "policy.example.com" denied the request: no`:                                {"AdmissionRefused", `admission webhook "policy.example.com"`},
		`Internal error occurred: failed calling webhook "w.example.com": failed to call`:              {"AdmissionUnavailable", `webhook "w.example.com"`},
		`pods "x" is forbidden: exceeded quota: few, requested: pods=1, used: pods=0, limited: pods=0`: {"QuotaExceeded", "The quota few"},
		"kubernetes cluster unreachable: Get":                                                          {"APIServerUnreachable", "does not answer"},
		"something new":                                                                                {"HelmFailed", "Helm failed at applying it"},
	} {
		f := fault.From(o.explain("applying it", errors.New(text)))
		if f.Code != want[0] || !strings.Contains(f.Message, want[1]) || f.Fix == "" || f.Target == "" || f.Err == nil || !strings.Contains(f.Err.Error(), text) {
			t.Errorf("%s\n  means %v", text, f)
		}
	}
}

// TestReasonInTheLogOnly: Helm says "failed to delete release", and why to its log.
func TestReasonInTheLogOnly(t *testing.T) {
	o := nowhere(t)
	o.cfg.Logger().With("a", "b").WithGroup("g").Debug("failed", slog.Any("error", []error{errors.New(`secrets "x" is forbidden: User "u" cannot delete resource "secrets" in API group "" in the namespace "n"`)}))
	f := fault.From(o.explain("uninstalling it", errors.New("failed to delete release: x")))
	if f.Code != "PermissionMissing" || !strings.Contains(f.Message, "delete on secrets") {
		t.Errorf("it means %v", f)
	}
}

func FuzzExplain(f *testing.F) {
	for _, text := range []string{
		"", "execution error at (x): \xff", `A "b" in namespace "" exists and cannot be imported into the current release`, `no matches for kind "" in version "v1"`,
		"don't meet the specifications of the schema(s)\n- at '/a/b': x\n- at '': y", `User "" cannot x resource "a/b" in API group "g"`, strings.Repeat("template: x ", 1000),
	} {
		f.Add(text)
	}
	o := nowhere(f)
	f.Fuzz(func(t *testing.T, text string) {
		e := fault.From(o.explain("applying it", errors.New(text)))
		if e.Code == "" || e.Message == "" || e.Fix == "" || !utf8.ValidString(e.Message) && utf8.ValidString(text) {
			t.Errorf("%q means %+v", text, e)
		}
	})
}

func FuzzMark(f *testing.F) {
	f.Add(mark{3, "abc", time.Unix(1, 0)}.String())
	f.Add("1.2.")
	f.Fuzz(func(t *testing.T, text string) {
		if m, ok := parseMark(text); ok {
			if again, ok := parseMark(m.String()); !ok || again != m {
				t.Errorf("%q is %v, and again %v", text, m, again)
			}
		}
	})
}

// TestPods has pods as schedulers and kubelets leave them, and what is said of them.
func TestPods(t *testing.T) {
	waiting := func(reason, message string) core.ContainerState {
		return core.ContainerState{Waiting: &core.ContainerStateWaiting{Reason: reason, Message: message}}
	}
	ended := func(code int32, reason string) core.ContainerState {
		return core.ContainerState{Terminated: &core.ContainerStateTerminated{ExitCode: code, Reason: reason}}
	}
	unplaced := func(message string) []core.PodCondition {
		return []core.PodCondition{{Type: core.PodScheduled, Status: core.ConditionFalse, Reason: "Unschedulable", Message: message}}
	}
	one := func(s core.ContainerStatus) []core.ContainerStatus { s.Name = "main"; return []core.ContainerStatus{s} }
	for name, test := range map[string]struct {
		status core.PodStatus
		events []core.Event
		code   string
		says   string
	}{
		"ready":               {core.PodStatus{Phase: core.PodRunning, Conditions: []core.PodCondition{{Type: core.PodReady, Status: core.ConditionTrue}}}, nil, "", ""},
		"succeeded":           {core.PodStatus{Phase: core.PodSucceeded}, nil, "", ""},
		"critical only":       {core.PodStatus{Conditions: unplaced(`0/1 nodes are available: 1 node(s) had untolerated taint {CriticalAddonsOnly: true}.`)}, nil, "OnlyCriticalAddonsNodes", "CriticalAddonsOnly"},
		"critical only, new":  {core.PodStatus{Conditions: unplaced(`0/1 nodes are available: 1 node(s) had untolerated taint(s) {CriticalAddonsOnly: true}.`)}, nil, "OnlyCriticalAddonsNodes", "CriticalAddonsOnly"},
		"no room":             {core.PodStatus{Conditions: unplaced(`0/1 nodes are available: 1 Insufficient memory.`)}, nil, "Unschedulable", "Insufficient memory"},
		"another taint":       {core.PodStatus{Conditions: unplaced(`0/1 nodes are available: 1 node(s) had untolerated taint {x: true}.`)}, nil, "Unschedulable", "{x: true}"},
		"image not there":     {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("ErrImagePull", `failed to resolve reference "r/x:1": not found`)})}, nil, "ImagePullFailed", "The image r/x:1 cannot be pulled (ErrImagePull): failed to resolve"},
		"registry refuses":    {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("ErrImagePull", `failed to fetch anonymous token: unexpected status: 401 Unauthorized`)})}, nil, "ImagePullFailed", "401 Unauthorized"},
		"image in an init":    {core.PodStatus{InitContainerStatuses: one(core.ContainerStatus{State: waiting("InvalidImageName", "x")})}, nil, "ImagePullFailed", "InvalidImageName"},
		"pull, said by event": {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("ImagePullBackOff", `Back-off pulling image "r/x:1"`)})}, []core.Event{{Reason: "Failed", Message: `Failed to pull image "r/x:1": not found`}}, "ImagePullFailed", "not found"},
		"a key is missing":    {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("CreateContainerConfigError", `secret "x" not found`)})}, nil, "ContainerCannotStart", `secret "x" not found`},
		"volume":              {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("ContainerCreating", "")})}, []core.Event{{Reason: "FailedMount", Message: "MountVolume.SetUp failed"}}, "PodCannotStart", "MountVolume.SetUp failed"},
		"crashes":             {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: waiting("CrashLoopBackOff", ""), LastTerminationState: ended(2, "Error")})}, nil, "ContainerFailed", "status 2 (Error)"},
		"out of memory":       {core.PodStatus{ContainerStatuses: one(core.ContainerStatus{State: ended(137, "OOMKilled")})}, nil, "OutOfMemory", "OOMKilled"},
		"failed":              {core.PodStatus{Phase: core.PodFailed, ContainerStatuses: one(core.ContainerStatus{State: ended(1, "Error")})}, nil, "ContainerFailed", "status 1 (Error)"},
		"nobody looked":       {core.PodStatus{Phase: core.PodPending}, nil, "NotScheduled", "waits for a node"},
	} {
		pod := &core.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", UID: "u"}, Status: test.status,
			Spec: core.PodSpec{Containers: []core.Container{{Name: "main", Image: "r/x:1"}}},
		}
		l := &look{operation: nowhere(t), ctx: t.Context(), events: map[types.UID][]core.Event{"u": test.events}}
		l.pod(pod)
		if test.code == "" {
			if len(l.causes) > 0 {
				t.Errorf("%s: %+v", name, l.causes)
			}
			continue
		}
		if len(l.causes) != 1 || l.causes[0].code != test.code || !strings.Contains(l.causes[0].message, test.says) || rank(test.code) < 0 || l.causes[0].fix == "" || l.causes[0].object != "Pod n/p" {
			t.Errorf("%s: %+v, want %s with %q", name, l.causes, test.code, test.says)
		}
	}
}
