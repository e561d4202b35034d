package scextension

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Cluster is the API of the cluster that operator, job and webhook work in. Make
// it with [OpenCluster].
type Cluster struct {
	api     kubernetes.Interface
	objects dynamic.Interface // what others know of an object survives our writes
	meta    metadata.Interface
}

// OpenCluster opens the API with a kubeconfig file, or, without one, as the
// ServiceAccount of the pod that this program runs in. What the Kubernetes client
// says of itself goes into log, for the whole process. Nothing is sent yet.
func OpenCluster(kubeconfig string, log *slog.Logger) (*Cluster, error) {
	klog.SetSlogLogger(log)
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("reading how to reach the cluster: %w", err)
	}
	return openCluster(cfg)
}

func openCluster(cfg *rest.Config) (*Cluster, error) {
	cfg.UserAgent = "keyfleet-connector"
	cfg.QPS, cfg.Burst = 200, 400 // the server has its own limits, and says so
	api, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	objects, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	meta, err := metadata.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	return &Cluster{api, objects, meta}, nil
}

// answerTime is how long one request may take.
const answerTime = 15 * time.Second

// desiredStates lists the Secrets that hold desired states.
func (c *Cluster) desiredStates(ctx context.Context) ([]core.Secret, error) {
	var all []core.Secret
	for next := ""; ; {
		page, err := c.api.CoreV1().Secrets(Namespace).List(ctx, metav1.ListOptions{LabelSelector: labelDesired + "=true", Limit: pageSize, Continue: next})
		if err != nil {
			return nil, fmt.Errorf("listing the desired states in %s: %w", Namespace, err)
		}
		all = append(all, page.Items...)
		if next = page.Continue; next == "" {
			return all, nil
		}
	}
}

// wants reports whether a desired state still wants its objects: one that is about
// to be removed with them does not.
func wants(s *core.Secret) bool {
	return s.DeletionTimestamp == nil || s.Annotations[annotationRemove] != string(wire.RemoveDelete)
}
