package scextension

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	admission "k8s.io/api/admission/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/fault"
)

// Webhook gives pods that are labelled azure.workload.identity/use=true what they
// need to log in as the identity of their ServiceAccount. The API server asks it for
// each such pod, over TLS with a certificate that it makes and renews itself. It
// keeps nothing; any number of replicas may run. Its zero value is not usable.
type Webhook struct {
	Cluster   *Cluster
	Listen    string   // address for the API server, ":9443"
	Probes    string   // address for /healthz and /readyz; empty: none
	Namespace string   // of the Service and the certificate; empty: sc-system
	Tenant    string   // of ServiceAccounts that name none; empty: the variable is left out
	Authority string   // URL of the token endpoint; empty: the variable is left out
	Hosts     []string // further names and addresses of the certificate
	Log       *slog.Logger
}

const (
	webhookName  = "sc-webhook" // Service and MutatingWebhookConfiguration
	webhookTLS   = "sc-webhook-tls"
	webhookPath  = "/mutate-v1-pod"
	reviewLimit  = 8 << 20 // bytes; a request to the API server has at most 3 MiB
	webhookClose = 5 * time.Second
)

// Run answers until ctx ends, and then returns nil.
func (w *Webhook) Run(ctx context.Context) error {
	if w.Namespace == "" {
		w.Namespace = Namespace
	}
	certificate := &servingCertificate{
		cluster: w.Cluster, namespace: w.Namespace, now: time.Now, log: w.Log,
		hosts: append([]string{webhookName + "." + w.Namespace + ".svc", webhookName + "." + w.Namespace + ".svc.cluster.local"}, w.Hosts...),
	}
	stopProbes, err := serveProbes(w.Probes, func() bool { return certificate.current.Load() != nil })
	if err != nil {
		return err
	}
	defer stopProbes()
	l, err := net.Listen("tcp", w.Listen)
	if err != nil {
		return fmt.Errorf("listening for the API server: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+webhookPath, w.serve)
	server := &http.Server{
		Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: 2 * time.Minute,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := certificate.current.Load(); c != nil {
				return c, nil
			}
			return nil, errors.New("the certificate is not made yet")
		}},
		ErrorLog: slog.NewLogLogger(w.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		ending, cancel := context.WithTimeout(context.Background(), webhookClose)
		defer cancel()
		_ = server.Shutdown(ending)
	})
	defer stop()
	go certificate.run(ctx)
	if err := server.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the API server: %w", err)
	}
	return nil
}

func (w *Webhook) serve(out http.ResponseWriter, in *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(out, in.Body, reviewLimit))
	if err != nil {
		http.Error(out, "the review cannot be read", http.StatusRequestEntityTooLarge)
		return
	}
	var review admission.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil || review.Request == nil {
		http.Error(out, "this is no AdmissionReview with a request", http.StatusBadRequest)
		return
	}
	response := w.review(in.Context(), review.Request)
	response.UID = review.Request.UID
	review.Request, review.Response = nil, response
	out.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(out).Encode(review); err != nil {
		w.Log.Warn("an answer could not be sent", "error", err)
	}
}

// review decides about one pod.
func (w *Webhook) review(ctx context.Context, r *admission.AdmissionRequest) *admission.AdmissionResponse {
	operations, err := w.operations(ctx, r)
	if err != nil {
		f := fault.From(err)
		code := int32(http.StatusInternalServerError)
		reason := metav1.StatusReasonInternalError
		if f.Kind == fault.Invalid {
			code, reason = http.StatusBadRequest, metav1.StatusReasonBadRequest
		}
		w.Log.Warn("a pod was refused", "namespace", r.Namespace, "pod", r.Name, "error", err)
		return &admission.AdmissionResponse{Result: &metav1.Status{Status: metav1.StatusFailure, Code: code, Reason: reason, Message: f.Message}}
	}
	response := &admission.AdmissionResponse{Allowed: true}
	if len(operations) > 0 {
		patch, err := json.Marshal(operations)
		if err != nil {
			return &admission.AdmissionResponse{Result: &metav1.Status{Status: metav1.StatusFailure, Code: http.StatusInternalServerError, Message: "encoding the patch failed"}}
		}
		kind := admission.PatchTypeJSONPatch
		response.Patch, response.PatchType = patch, &kind
	}
	return response
}

func (w *Webhook) operations(ctx context.Context, r *admission.AdmissionRequest) ([]operation, error) {
	var pod core.Pod
	if err := json.Unmarshal(r.Object.Raw, &pod); err != nil {
		return nil, fault.New(fault.Invalid, "BadRequest", "The object is no pod that can be read.").Because(err)
	}
	if pod.Labels[identityLabel] != "true" {
		return nil, nil
	}
	name := pod.Spec.ServiceAccountName
	if name == "" {
		name = "default"
	}
	// It is read from the API itself: a pod often comes right after its account.
	account, err := w.Cluster.api.CoreV1().ServiceAccounts(r.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fault.New(fault.Invalid, "BadRequest", "serviceaccounts %q not found in the namespace %s: a pod with the label %s needs it.", name, r.Namespace, identityLabel)
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, "", "The ServiceAccount %s/%s cannot be read: %s.", r.Namespace, name, apierrors.ReasonForError(err)).Because(err)
	}
	operations, err := inject(&pod, account, identity{w.Tenant, w.Authority})
	if err != nil {
		return nil, fault.New(fault.Invalid, "BadRequest", "%s", err.Error())
	}
	return operations, nil
}
