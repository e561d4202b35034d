package helm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	v1 "helm.sh/helm/v4/pkg/release/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"keyfleet.dev/keyfleet/internal/fault"
)

// waited reports whether Helm gave up waiting for something to become ready.
func waited(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), " not ready. status: ")
}

// why finds out why what a release made did not become ready.
func (o *operation) why(record *v1.Release, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(o.caller), lookTime)
	defer cancel()
	l := &look{operation: o, ctx: ctx}
	if lookErr := l.all(record); lookErr != nil {
		return o.explain("looking for why it is not ready", errors.Join(lookErr, err))
	}
	l.order()
	f := l.timedOut()
	if l.job != nil {
		f = l.jobFailed()
	}
	for _, c := range l.causes {
		f = f.WithDetail(c.code, "%s", c.message)
		f.Details[len(f.Details)-1].Target = c.object
	}
	return f.Because(fmt.Errorf("applying it: %w", err))
}

const causeLimit = 8 // that are reported

// order puts the causes into the order in which they are reported.
func (l *look) order() {
	slices.SortStableFunc(l.causes, func(a, b cause) int { return cmp.Compare(rank(a.code), rank(b.code)) })
	l.causes = l.causes[:min(len(l.causes), causeLimit)]
}

// rank orders causes: what keeps pods from being made, placed, pulled, started, ready.
// What follows from another cause comes after it.
func rank(code string) int {
	return slices.Index([]string{
		"PodSecurityRefused", "QuotaExceeded", "AdmissionRefused", "AdmissionUnavailable", "PodsRefused", "OnlyCriticalAddonsNodes", "Unschedulable",
		"ImagePullFailed", "ContainerCannotStart", "PodCannotStart", "OutOfMemory", "ContainerFailed", "NotScheduled", "NotReady",
	}, code)
}

// cause is one thing that keeps a release from becoming ready.
type cause struct {
	code, object, message, fix string
}

// look is a look at the workloads of a release.
type look struct {
	*operation
	ctx     context.Context
	events  map[types.UID][]core.Event // the warnings, by what they are about
	causes  []cause
	waiting string     // the first workload that is not ready, "Deployment a/b has 0 of 1 pods ready"
	object  string     // that one
	job     *batch.Job // that has failed
	reason  string     // why the API server says so
}

func (l *look) add(c cause) {
	if !slices.ContainsFunc(l.causes, func(k cause) bool { return k.code == c.code && k.message == c.message }) {
		l.causes = append(l.causes, c)
	}
}

func (l *look) timedOut() *fault.Error {
	f := fault.New(fault.Timeout, "TimedOutWaitingForReadiness", "Timed out waiting for resource readiness: %s.", cmp.Or(l.waiting, "Helm waited for "+l.limit.String())).
		At(cmp.Or(l.object, l.target())).WithFix("kubectl -n %s get pods,events; then apply it again", l.namespace)
	if len(l.causes) > 0 {
		f.Message += " " + l.causes[0].message
		f = f.WithInner(l.causes[0].code).WithFix("%s", l.causes[0].fix)
	}
	return f
}

func (l *look) jobFailed() *fault.Error {
	name := l.job.Namespace + "/" + l.job.Name
	f := fault.New(fault.Unavailable, "JobFailed", "job failed: %s. The job %s is kept, with its logs.", l.reason, name).
		At("Job "+name).WithFix("kubectl logs job/%s -n %s", l.job.Name, l.job.Namespace)
	if len(l.causes) > 0 {
		f.Message += " " + l.causes[0].message
		f = f.WithInner(l.causes[0].code)
		if l.causes[0].code != "ContainerFailed" {
			f = f.WithFix("%s", l.causes[0].fix)
		}
	}
	return f
}

// all looks at all workloads.
func (l *look) all(record *v1.Release) error {
	made, err := l.made([]*v1.Release{record})
	if err != nil {
		return err
	}
	if err := l.warnings(); err != nil {
		return err
	}
	for _, p := range made {
		if err := l.workload(p); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("looking at the %s: %w", p, err)
		}
	}
	return nil
}

// warnings reads the events that tell of something wrong.
func (l *look) warnings() error {
	warnings, err := l.api.CoreV1().Events("").List(l.ctx, metav1.ListOptions{FieldSelector: "type=Warning", Limit: 1000})
	if apierrors.IsForbidden(err) { // those of the namespace of the release are enough mostly
		warnings, err = l.api.CoreV1().Events(l.namespace).List(l.ctx, metav1.ListOptions{FieldSelector: "type=Warning", Limit: 1000})
	}
	if err != nil {
		return fmt.Errorf("listing the events: %w", err)
	}
	l.events = map[types.UID][]core.Event{}
	for _, e := range warnings.Items {
		l.events[e.InvolvedObject.UID] = append(l.events[e.InvolvedObject.UID], e)
	}
	return nil
}

// workload looks at one object, if it is one that has pods.
func (l *look) workload(p *product) error {
	var selector *metav1.LabelSelector
	var uid types.UID
	var want, ready int32
	get := metav1.GetOptions{}
	switch p.Mapping.GroupVersionKind.Kind {
	case "Deployment":
		d, err := l.api.AppsV1().Deployments(p.Namespace).Get(l.ctx, p.Name, get)
		if err != nil {
			return err
		}
		selector, uid, want, ready = d.Spec.Selector, d.UID, 1, min(d.Status.UpdatedReplicas, d.Status.AvailableReplicas)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		for _, c := range d.Status.Conditions {
			if c.Type == "ReplicaFailure" && c.Status == core.ConditionTrue {
				l.refused(p, c.Message)
			}
		}
	case "StatefulSet":
		s, err := l.api.AppsV1().StatefulSets(p.Namespace).Get(l.ctx, p.Name, get)
		if err != nil {
			return err
		}
		selector, uid, want, ready = s.Spec.Selector, s.UID, 1, s.Status.ReadyReplicas
		if s.Spec.Replicas != nil {
			want = *s.Spec.Replicas
		}
	case "DaemonSet":
		d, err := l.api.AppsV1().DaemonSets(p.Namespace).Get(l.ctx, p.Name, get)
		if err != nil {
			return err
		}
		selector, uid, want, ready = d.Spec.Selector, d.UID, d.Status.DesiredNumberScheduled, min(d.Status.NumberReady, d.Status.UpdatedNumberScheduled)
	case "Job":
		return l.oneJob(p)
	default:
		return nil
	}
	if ready >= want {
		return nil
	}
	l.notReady(p, fmt.Sprintf("%s has %d of %d pods ready", p, ready, want))
	l.refusals(p, uid)
	return l.pods(p.Namespace, selector)
}

func (l *look) oneJob(p *product) error {
	j, err := l.api.BatchV1().Jobs(p.Namespace).Get(l.ctx, p.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range j.Status.Conditions {
		if c.Status != core.ConditionTrue {
			continue
		}
		switch c.Type {
		case batch.JobComplete:
			return nil
		case batch.JobFailed:
			l.job, l.reason = j, c.Reason
		}
	}
	l.notReady(p, fmt.Sprintf("%s has not ended", p))
	l.refusals(p, j.UID)
	return l.pods(p.Namespace, j.Spec.Selector)
}

func (l *look) notReady(p *product, text string) {
	if l.waiting == "" {
		l.waiting, l.object = text, p.String()
	}
}

// refusals finds pods that were not allowed.
func (l *look) refusals(p *product, uid types.UID) {
	for _, e := range l.events[uid] {
		if e.Reason == "FailedCreate" {
			l.refused(p, e.Message)
		}
	}
}

// refused says why pods are not allowed.
func (l *look) refused(p *product, text string) {
	c := cause{"PodsRefused", p.String(), "Its pods cannot be made: " + short(text) + ".", "kubectl -n " + p.Namespace + " get events"}
	if f := l.meaningOf(errors.New(text)); f != nil && rank(f.Code) >= 0 {
		c.code, c.message, c.fix = f.Code, f.Message, f.Fix
	}
	l.add(c)
}

// pods looks at the pods of a workload.
func (l *look) pods(namespace string, selector *metav1.LabelSelector) error {
	text := metav1.FormatLabelSelector(selector)
	pods, err := l.api.CoreV1().Pods(namespace).List(l.ctx, metav1.ListOptions{LabelSelector: text, Limit: 100})
	if err != nil {
		return fmt.Errorf("listing the pods: %w", err)
	}
	// The newest first: the others may be of an earlier revision, or of an earlier try.
	slices.SortFunc(pods.Items, func(a, b core.Pod) int { return b.CreationTimestamp.Compare(a.CreationTimestamp.Time) })
	for i := range pods.Items {
		l.pod(&pods.Items[i])
	}
	return nil
}

// pod says why one pod does not run, or is not ready.
func (l *look) pod(pod *core.Pod) {
	if pod.Status.Phase == core.PodSucceeded || condition(pod, core.PodReady) == core.ConditionTrue {
		return
	}
	before := len(l.causes)
	for _, c := range pod.Status.Conditions {
		if c.Type == core.PodScheduled && c.Status == core.ConditionFalse {
			l.add(unschedulable(pod, c.Message))
		}
	}
	for _, s := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		l.container(pod, s)
	}
	describe := fmt.Sprintf("kubectl -n %s describe pod %s", pod.Namespace, pod.Name)
	for _, e := range l.events[pod.UID] {
		if slices.Contains([]string{"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}, e.Reason) {
			l.add(cause{"PodCannotStart", podName(pod), fmt.Sprintf("The pod %s cannot start: %s.", pod.Name, short(e.Message)), describe})
		}
	}
	switch {
	case len(l.causes) > before:
	case pod.Spec.NodeName == "":
		l.add(cause{"NotScheduled", podName(pod), fmt.Sprintf("The pod %s waits for a node, and no scheduler has said why.", pod.Name), "see that kube-scheduler runs; " + describe})
	case pod.Status.Phase != core.PodFailed:
		l.add(cause{"NotReady", podName(pod), fmt.Sprintf("The pod %s is %s on the node %s and not ready.%s", pod.Name, pod.Status.Phase, pod.Spec.NodeName, l.unhealthy(pod)), describe})
	}
}

// unhealthy is what the kubelet says of a pod's probes.
func (l *look) unhealthy(pod *core.Pod) string {
	for _, e := range l.events[pod.UID] {
		if e.Reason == "Unhealthy" {
			return " " + short(e.Message) + "."
		}
	}
	return ""
}

func podName(pod *core.Pod) string { return "Pod " + pod.Namespace + "/" + pod.Name }

func condition(pod *core.Pod, t core.PodConditionType) core.ConditionStatus {
	for _, c := range pod.Status.Conditions {
		if c.Type == t {
			return c.Status
		}
	}
	return core.ConditionUnknown
}

var criticalOnly = regexp.MustCompile(`untolerated taint\(?s?\)? ?\{CriticalAddonsOnly: ?(true)?\s*\}`)

// unschedulable says why no node takes a pod.
func unschedulable(pod *core.Pod, text string) cause {
	if criticalOnly.MatchString(text) {
		return cause{
			"OnlyCriticalAddonsNodes", podName(pod),
			"Extension pods can't be scheduled if all the node pools in the cluster are \"CriticalAddonsOnly\" tainted: " + short(text),
			"add a node pool without the taint, or: kubectl taint nodes NODE CriticalAddonsOnly-",
		}
	}
	return cause{
		"Unschedulable", podName(pod), fmt.Sprintf("No node takes the pod %s: %s", pod.Name, short(text)),
		fmt.Sprintf("make room, or change nodeSelector, tolerations or resources; kubectl -n %s describe pod %s", pod.Namespace, pod.Name),
	}
}

var pullReasons = []string{"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError", "SignatureValidationFailed"}

// container says why a container does not run.
func (l *look) container(pod *core.Pod, s core.ContainerStatus) {
	describe := fmt.Sprintf("kubectl -n %s describe pod %s", pod.Namespace, pod.Name)
	switch w := s.State.Waiting; {
	case w == nil:
	case slices.Contains(pullReasons, w.Reason):
		image := s.Image
		for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			if c.Name == s.Name {
				image = c.Image
			}
		}
		l.add(cause{
			"ImagePullFailed", podName(pod), fmt.Sprintf("The image %s cannot be pulled (%s): %s.", image, w.Reason, short(l.pullText(pod, w.Message))),
			"put the image where the nodes can pull it, or correct its name, tag, registry or imagePullSecrets; " + describe,
		})
		return
	case slices.Contains([]string{"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreStartHookError"}, w.Reason):
		l.add(cause{"ContainerCannotStart", podName(pod), fmt.Sprintf("The container %s of the pod %s cannot start (%s): %s.", s.Name, pod.Name, w.Reason, short(w.Message)), describe})
		return
	}
	ended, previous := s.State.Terminated, false
	if ended == nil {
		ended, previous = s.LastTerminationState.Terminated, true
	}
	if ended == nil || ended.ExitCode == 0 && ended.Reason == "Completed" {
		return
	}
	logs := fmt.Sprintf("kubectl -n %s logs %s -c %s", pod.Namespace, pod.Name, s.Name)
	if previous {
		logs += " --previous"
	}
	text, fix := l.tail(pod, s.Name, previous), logs
	code := "ContainerFailed"
	if ended.Reason == "OOMKilled" {
		code, fix = "OutOfMemory", "raise resources.limits.memory; "+logs
	}
	if text != "" {
		text = " Its log ends with: " + text
	}
	l.add(cause{code, podName(pod), fmt.Sprintf("The container %s of the pod %s ended with status %d (%s).%s", s.Name, pod.Name, ended.ExitCode, cmp.Or(ended.Reason, "Error"), text), fix})
}

// pullText is what the registry said: a container's status sometimes has only that
// it is tried again.
func (l *look) pullText(pod *core.Pod, text string) string {
	for _, e := range l.events[pod.UID] {
		if e.Reason == "Failed" && strings.Contains(e.Message, "ailed to pull") && !strings.Contains(text, "rror") {
			return e.Message
		}
	}
	return text
}

const (
	tailLines = 10
	tailBytes = 2000
)

// tail is the end of a container's log; empty: there is none, or it cannot be read.
func (l *look) tail(pod *core.Pod, container string, previous bool) string {
	lines, limit := int64(tailLines), int64(64<<10)
	text, err := l.api.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &core.PodLogOptions{
		Container: container, Previous: previous, TailLines: &lines, LimitBytes: &limit,
	}).DoRaw(l.ctx)
	if err != nil {
		l.log.Debug("the log of a container cannot be read", "pod", podName(pod), "container", container, "error", err)
		return ""
	}
	text = text[max(0, len(text)-tailBytes):]
	return strings.TrimSpace(strings.ToValidUTF8(string(text), ""))
}
