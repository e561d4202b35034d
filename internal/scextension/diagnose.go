package scextension

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/helm"
)

// Looking for the answer to a question. The server knows what a cluster shall have
// and cannot look; a manager can look and judges nothing: it reports what it saw,
// and the server says what that means (package connector, findings.go). A part that
// cannot be looked at does not keep the others from being seen.

const (
	diagnoseTime = 12 * time.Second // for one answer: the server waits for 20 s
	mostUses     = 50               // workloads that are reported; the others are counted
	jobName      = "sc-job"
	logLines     = 20
	logBytes     = 4000
)

// answer looks for the answer to a question and reports it, unless it has done so.
func (m *Manager) answer(ctx context.Context, c connection, q wire.Question) {
	m.lock.Lock()
	defer m.lock.Unlock()
	if m.asked[q.UID] {
		return
	}
	m.asked[q.UID] = true
	m.work.Go(func() {
		looking, cancel := context.WithTimeout(ctx, diagnoseTime)
		defer cancel()
		sight := diagnose(looking, c.api, c.releases, q)
		if err := m.call(ctx, http.MethodPut, "/keyfleet/v1"+q.ID+"/sight", sight, nil); err != nil {
			m.Log.Error("the answer to a question cannot be reported", "about", q.ID, "error", err)
			m.lock.Lock()
			defer m.lock.Unlock()
			delete(m.asked, q.UID) // it is tried again while the question is open
		}
	})
}

// diagnose looks at everything that a question is about.
func diagnose(ctx context.Context, api kubernetes.Interface, r Releases, q wire.Question) wire.Sight {
	s := wire.Sight{UID: q.UID, Unseen: map[wire.Part]string{}, Namespaces: map[string]string{}}
	l := looker{api, r, q}
	if _, err := api.Discovery().ServerVersion(); err != nil {
		s.Unseen[wire.PartServer] = clip(err.Error())
		return s
	}
	for _, p := range []struct {
		part wire.Part
		see  func(context.Context, *wire.Sight) error
	}{
		{wire.PartNamespaces, l.namespaces},
		{wire.PartRelease, l.release},
		{wire.PartJob, l.job},
		{wire.PartOperator, l.operator},
		{wire.PartPermissions, l.permissions},
		{wire.PartDesired, l.desired},
		{wire.PartObjects, l.objects},
		{wire.PartConsumers, l.consumers},
		{wire.PartWebhook, l.webhook},
	} {
		if err := p.see(ctx, &s); err != nil {
			s.Unseen[p.part] = clip(err.Error())
		}
	}
	return s
}

// looker looks at one cluster for one question.
type looker struct {
	api      kubernetes.Interface
	releases Releases // nil: the manager does not install
	wire.Question
}

func (l looker) namespaces(ctx context.Context, s *wire.Sight) error {
	for _, name := range []string{Namespace, l.Namespace} {
		if name == "" {
			continue
		}
		ns, err := l.api.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		s.Namespaces[name] = string(ns.Status.Phase)
	}
	return nil
}

func (l looker) release(ctx context.Context, s *wire.Sight) (err error) {
	if l.releases == nil {
		return errors.New("the manager installs nothing, and does not look at releases")
	}
	s.Release, err = l.releases.Get(ctx, Extension)
	if s.Release != nil {
		s.Release.Description = clip(s.Release.Description)
	}
	return err
}

func (l looker) job(ctx context.Context, s *wire.Sight) (err error) {
	s.Job, err = helm.Workload(ctx, l.api, "Job", Namespace, jobName)
	if err != nil || s.Job == nil {
		return err
	}
	s.JobLog, err = l.jobLog(ctx)
	return err
}

// jobLog is the end of the log of the job's last pod; empty: it has said nothing.
func (l looker) jobLog(ctx context.Context) (string, error) {
	pods, err := l.api.CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{LabelSelector: batch.JobNameLabel + "=" + jobName})
	if err != nil || len(pods.Items) == 0 {
		return "", err
	}
	last := slices.MaxFunc(pods.Items, func(a, b core.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	if last.Spec.NodeName == "" { // it never ran
		return "", nil
	}
	lines, limit := int64(logLines), int64(64<<10)
	text, err := l.api.CoreV1().Pods(Namespace).GetLogs(last.Name, &core.PodLogOptions{TailLines: &lines, LimitBytes: &limit}).DoRaw(ctx)
	if err != nil {
		return "", fmt.Errorf("reading the log of the pod %s: %w", last.Name, err)
	}
	text = bytes.TrimSpace(text)
	return strings.ToValidUTF8(string(text[max(0, len(text)-logBytes):]), ""), nil
}

func (l looker) operator(ctx context.Context, s *wire.Sight) (err error) {
	s.Works = operatorWorks(ctx, l.api)
	s.Operator, err = helm.Workload(ctx, l.api, "Deployment", Namespace, "sc-operator")
	return err
}

func (l looker) desired(ctx context.Context, s *wire.Sight) error {
	if l.Namespace == "" {
		return nil
	}
	secret, err := l.api.CoreV1().Secrets(Namespace).Get(ctx, desiredName(Key(l.ID)), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	d, err := readDesired(secret)
	s.Desired = d.Revision
	return err
}

func (l looker) objects(ctx context.Context, s *wire.Sight) error {
	for _, o := range []struct {
		kind, name string
		hash       func(context.Context) (string, error)
	}{
		{"Secret", l.Secret, l.secretHash},
		{"ServiceAccount", l.ServiceAccount, l.accountHash},
		{"SecretProviderClass", l.ProviderClass, l.classThere},
	} {
		if o.name == "" {
			continue
		}
		hash, err := o.hash(ctx)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		s.Objects = append(s.Objects, wire.AppliedObject{Kind: o.kind, Namespace: l.Namespace, Name: o.name, Hash: hash})
	}
	return nil
}

func (l looker) secretHash(ctx context.Context) (string, error) {
	secret, err := l.api.CoreV1().Secrets(l.Namespace).Get(ctx, l.Secret, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	data := make(map[string]string, len(secret.Data))
	for name, value := range secret.Data {
		data[name] = string(value)
	}
	return wire.SecretHash(data), nil
}

// accountHash is of the two annotations that connections set; the others are people's.
func (l looker) accountHash(ctx context.Context) (string, error) {
	account, err := l.api.CoreV1().ServiceAccounts(l.Namespace).Get(ctx, l.ServiceAccount, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	set := map[string]string{}
	for _, name := range []string{identityClient, identityTenant} {
		if value, ok := account.Annotations[name]; ok {
			set[name] = value
		}
	}
	return wire.SecretHash(set), nil
}

func (l looker) classThere(ctx context.Context) (string, error) {
	r := classKind.resource
	return "", l.api.Discovery().RESTClient().Get().AbsPath("/apis", r.Group, r.Version, "namespaces", l.Namespace, r.Resource, l.ProviderClass).Do(ctx).Error()
}

func (l looker) webhook(ctx context.Context, s *wire.Sight) error {
	var o wire.Observation
	err := seeWebhook(ctx, l.api, &o)
	s.Webhook = o.Webhook
	return err
}
