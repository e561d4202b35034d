package scextension

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	admission "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

const (
	identityLabel = "azure.workload.identity/use" // of pods that get tokens and variables
	pageSize      = 500
)

// connect opens the API of a cluster. Nothing is sent yet.
func connect(kubeconfig []byte, timeout time.Duration) (kubernetes.Interface, error) {
	cfg, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	cfg.Timeout, cfg.UserAgent = timeout, "keyfleet-connector"
	cfg.QPS, cfg.Burst = 200, 400 // the server has its own limits, and says so
	api, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	return api, nil
}

// look looks at a cluster. What the kubeconfig does not allow to be seen is in
// Missing; an error means that the cluster could not be looked at.
func look(ctx context.Context, api kubernetes.Interface) (wire.Observation, error) {
	var o wire.Observation
	version, err := api.Discovery().ServerVersion()
	if err != nil {
		return o, fmt.Errorf("asking for the version: %w", err)
	}
	o.Version = version.GitVersion
	for _, part := range []struct {
		permission string
		see        func(context.Context, kubernetes.Interface, *wire.Observation) error
	}{
		{"list nodes", seeNodes},
		{"get /.well-known/openid-configuration and /openid/v1/jwks", seeIssuer},
		{"get csidrivers.storage.k8s.io", seeDriver},
		{"list mutatingwebhookconfigurations.admissionregistration.k8s.io", seeWebhook},
	} {
		err := part.see(ctx, api, &o)
		switch {
		case apierrors.IsForbidden(err):
			o.Missing = append(o.Missing, part.permission)
		case err != nil:
			return o, err
		}
	}
	return o, nil
}

func seeNodes(ctx context.Context, api kubernetes.Interface, o *wire.Observation) error {
	for next := ""; ; {
		page, err := api.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: pageSize, Continue: next})
		if err != nil {
			return fmt.Errorf("listing the nodes: %w", err)
		}
		for _, n := range page.Items {
			o.Nodes++
			for _, c := range n.Status.Conditions {
				if c.Type == core.NodeReady && c.Status == core.ConditionTrue {
					o.Ready++
				}
			}
		}
		if next = page.Continue; next == "" {
			return nil
		}
	}
}

// seeIssuer reads the discovery document and the keys from the API server itself:
// their URLs are mostly such that only the cluster can use them.
func seeIssuer(ctx context.Context, api kubernetes.Interface, o *wire.Observation) error {
	text, err := api.Discovery().RESTClient().Get().AbsPath("/.well-known/openid-configuration").DoRaw(ctx)
	if apierrors.IsNotFound(err) { // the issuer is no URL
		return nil
	}
	if err != nil {
		return fmt.Errorf("asking for the discovery document: %w", err)
	}
	var document struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		return fmt.Errorf("reading the discovery document: %w", err)
	}
	keys, err := api.Discovery().RESTClient().Get().AbsPath("/openid/v1/jwks").DoRaw(ctx)
	if err != nil {
		return fmt.Errorf("asking for the keys of the issuer: %w", err)
	}
	o.Issuer, o.KeySet = document.Issuer, keys
	return nil
}

func seeDriver(ctx context.Context, api kubernetes.Interface, o *wire.Observation) error {
	missing, err := addonMissing(ctx, api)
	o.CSIDriver = err == nil && missing == ""
	return err
}

func seeWebhook(ctx context.Context, api kubernetes.Interface, o *wire.Observation) error {
	all, err := api.AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing the webhooks: %w", err)
	}
	for _, c := range all.Items {
		for _, w := range c.Webhooks {
			o.Webhook = o.Webhook || injects(w)
		}
	}
	return nil
}

// injects reports whether a webhook is for pods that ask for workload identity.
func injects(w admission.MutatingWebhook) bool {
	return w.ObjectSelector != nil && w.ObjectSelector.MatchLabels[identityLabel] == "true"
}
