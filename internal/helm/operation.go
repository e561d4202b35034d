package helm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	v1 "helm.sh/helm/v4/pkg/release/v1"
	"helm.sh/helm/v4/pkg/storage/driver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// operation is one piece of work on one release. Helm's configuration is made anew
// for each: it remembers which kinds the cluster knows, and that changes.
type operation struct {
	*Client
	name    string
	caller  context.Context // what the caller gave
	ctx     context.Context // the same, and ends with the time of the operation
	end     context.CancelFunc
	limit   time.Duration
	cfg     *action.Configuration
	witness *witness
}

// begin prepares an operation that may take limit. Helm's requests do not know a
// context: they end by themselves a little later than the operation.
func (c *Client) begin(ctx context.Context, name string, limit time.Duration) (*operation, error) {
	config := rest.CopyConfig(c.config)
	config.Timeout = limit + answerTime
	known, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("opening the API: %w", err)
	}
	o := &operation{Client: c, name: name, caller: ctx, limit: limit, witness: &witness{Handler: c.log.Handler(), seen: &seen{}}}
	o.cfg = action.NewConfiguration(action.ConfigurationSetLogger(o.witness))
	access := &access{config: config, known: memory.NewMemCacheClient(known), loader: clientcmd.NewDefaultClientConfig(c.kubeconfig,
		&clientcmd.ConfigOverrides{Context: clientcmdapi.Context{Namespace: c.namespace}})}
	if err := o.cfg.Init(access, c.namespace, "secret"); err != nil {
		return nil, fmt.Errorf("preparing Helm: %w", err)
	}
	o.ctx, o.end = context.WithTimeout(ctx, limit)
	return o, nil
}

func (o *operation) target() string { return "release " + o.namespace + "/" + o.name }

// last returns the last record of the release; nil: there is none.
func (o *operation) last() (*v1.Release, error) {
	all, err := o.history()
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[len(all)-1], nil
}

// history returns all records of the release, the last one at the end.
func (o *operation) history() ([]*v1.Release, error) {
	found, err := o.cfg.Releases.History(o.name)
	if errors.Is(err, driver.ErrReleaseNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, o.explain("reading the records", err)
	}
	all := records(found)
	slices.SortFunc(all, func(a, b *v1.Release) int { return a.Version - b.Version })
	return all, nil
}

// build turns a manifest into objects that can be asked for.
func (o *operation) build(manifest string) (kube.ResourceList, error) {
	return o.cfg.KubeClient.Build(strings.NewReader(manifest), false)
}

// access is how Helm reaches the cluster.
type access struct {
	config *rest.Config
	known  discovery.CachedDiscoveryInterface
	loader clientcmd.ClientConfig

	once   sync.Once
	mapper meta.ResettableRESTMapper
}

// ToRESTConfig returns a copy: Helm changes what it gets.
func (a *access) ToRESTConfig() (*rest.Config, error) { return rest.CopyConfig(a.config), nil }

func (a *access) ToDiscoveryClient() (discovery.CachedDiscoveryInterface, error) { return a.known, nil }

func (a *access) ToRESTMapper() (meta.RESTMapper, error) {
	a.once.Do(func() { a.mapper = restmapper.NewDeferredDiscoveryRESTMapper(a.known) })
	return a.mapper, nil
}

func (a *access) ToRawKubeConfigLoader() clientcmd.ClientConfig { return a.loader }

// witness passes on what Helm logs, and keeps the last error in it: in some places
// Helm tells the reason of a failure to its log and not to its caller.
type witness struct {
	slog.Handler
	seen *seen
}

type seen struct {
	mu  sync.Mutex
	err error
}

// Enabled is true for all levels: the errors are in records of the level debug.
func (w *witness) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (w *witness) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		switch v := a.Value.Any().(type) {
		case error:
			w.seen.keep(v)
		case []error:
			w.seen.keep(errors.Join(v...))
		}
		return true
	})
	if !w.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return w.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (w *witness) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &witness{w.Handler.WithAttrs(attrs), w.seen}
}

// WithGroup implements slog.Handler.
func (w *witness) WithGroup(name string) slog.Handler {
	return &witness{w.Handler.WithGroup(name), w.seen}
}

func (s *seen) keep(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *seen) last() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
