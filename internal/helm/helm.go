// Package helm installs, upgrades and removes releases of charts in a cluster.
//
// Idea: a release is Helm's own: its records are Secrets of its namespace, "helm list"
// shows it, and a person can go on from where this package stopped. What this package
// adds is that every failure says what it means and what to do, and that a runner may
// die at any moment.
//
//	Apply ──> none: install │ there: upgrade │ pending, its runner died: mark failed, upgrade
//	  └─ failed to come up ──> look at pods, jobs and events ──> the error says why
//	Remove ──> uninstall ──> wait until every object is gone ──> forget the records
//
// Invariant: a release that failed stays as it is, for a look, and the next Apply goes
// on from there; there is no rollback. A release that another runner works on is not
// touched. The records are forgotten only after the objects are gone, so a Remove that
// was ended in between can be repeated. Nothing runs on after a function has returned.
//
// Consequence for the operator: the codes of the errors are TimedOutWaitingForReadiness,
// JobFailed, ChartUnavailable, RenderingFailed, ResourceExists, HelmOperationInProgress,
// KindNotInstalled, PermissionMissing, AdmissionRefused, AdmissionUnavailable,
// PodSecurityRefused, QuotaExceeded, NamespaceTerminating, APIServerUnreachable,
// LoginRefused and HelmFailed. Of the first two, Inner is the code of the cause if it
// was found, and Details are all causes. What Helm said is the cause of the error.
package helm

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"helm.sh/helm/v4/pkg/release"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Client works on the releases of one namespace, and changes one at a time. Make it
// with [New].
type Client struct {
	// Runner names who works: nobody else who works at the same time has this name, and
	// the same one has it again after a restart. A release that is pending by this name
	// was left by it when it died, and is taken over at once. Empty: pending releases
	// are taken over when their time is over. Set it before the first operation.
	Runner string

	namespace  string
	kubeconfig clientcmdapi.Config
	config     *rest.Config
	api        kubernetes.Interface
	log        *slog.Logger

	mu sync.Mutex // held during a change
}

const (
	answerTime = 30 * time.Second // for one request of a short operation
	lookTime   = 20 * time.Second // for finding out why something failed
)

// New opens the cluster of a kubeconfig. Nothing is sent yet. Log gets what Helm says.
func New(kubeconfig []byte, namespace string, log *slog.Logger) (*Client, error) {
	loaded, err := clientcmd.Load(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config, err := clientcmd.NewDefaultClientConfig(*loaded, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config.UserAgent, config.WarningHandler = "keyfleet-connector", rest.NoWarnings{}
	config.QPS, config.Burst = 50, 100
	short := rest.CopyConfig(config)
	short.Timeout = answerTime
	api, err := kubernetes.NewForConfig(short)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	if log == nil {
		log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return &Client{namespace: namespace, kubeconfig: *loaded, config: config, api: api, log: log}, nil
}

// Release is a release as its last record shows it.
type Release struct {
	wire.Release
	Values map[string]any // that were given, without the chart's own
}

// Get returns a release; nil: there is none.
func (c *Client) Get(ctx context.Context, name string) (*Release, error) {
	o, err := c.begin(ctx, name, answerTime)
	if err != nil {
		return nil, err
	}
	defer o.end()
	last, err := o.last()
	if err != nil || last == nil {
		return nil, err
	}
	seen := see(last)
	return &seen, nil
}

func see(r *v1.Release) Release {
	out := Release{Release: wire.Release{Name: r.Name, Namespace: r.Namespace, Revision: r.Version}, Values: r.Config}
	if r.Info != nil {
		out.Status, out.Updated, out.Description = string(r.Info.Status), r.Info.LastDeployed.UTC(), r.Info.Description
	}
	if r.Chart != nil && r.Chart.Metadata != nil {
		out.Version = r.Chart.Metadata.Version
		out.Chart = r.Chart.Metadata.Name + "-" + out.Version
	}
	return out
}

// records turns what Helm's storage returns into what it is.
func records(all []release.Releaser) []*v1.Release {
	var out []*v1.Release
	for _, one := range all {
		if r, ok := one.(*v1.Release); ok && r.Info != nil {
			out = append(out, r)
		}
	}
	return out
}
