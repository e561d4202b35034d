package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"time"

	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/deploy"
	"keyfleet.dev/keyfleet/internal/helm"
	"keyfleet.dev/keyfleet/internal/scextension"
)

// releases are those of one chart, in one cluster.
type releases struct {
	client *helm.Client
	chart  *helm.Chart
}

// opener opens clusters for installations by a manager.
type opener struct {
	// runner names the manager over its restarts, so that it goes on at once with what it left.
	runner string
	log    *slog.Logger
}

// extension opens clusters for the chart that this program carries.
func (o opener) extension() (func(kubeconfig []byte) (scextension.Releases, error), error) {
	chart, err := helm.ReadChart(deploy.Extension())
	if err != nil {
		return nil, fmt.Errorf("reading the chart of sc-extension: %w", err)
	}
	return o.open(scextension.Namespace, chart), nil
}

// addon opens clusters for the chart of the add-on at a path; nil without one.
func (o opener) addon(path string) (func(kubeconfig []byte) (scextension.Releases, error), error) {
	if path == "" {
		return nil, nil
	}
	chart, err := helm.LoadChart(path)
	if err != nil {
		return nil, err
	}
	return o.open(kubernetes.AddonNamespace, chart), nil
}

func (o opener) open(namespace string, chart *helm.Chart) func(kubeconfig []byte) (scextension.Releases, error) {
	return func(kubeconfig []byte) (scextension.Releases, error) {
		c, err := helm.New(kubeconfig, namespace, o.log)
		if err != nil {
			return nil, err
		}
		c.Runner = o.runner
		return releases{c, chart}, nil
	}
}

// Install implements scextension.Releases. A release that is as it shall be is left
// alone: an upgrade would run sc-job again.
func (r releases) Install(ctx context.Context, name string, values map[string]any, timeout time.Duration) (kubernetes.Release, error) {
	last, err := r.client.Get(ctx, name)
	if err != nil {
		return kubernetes.Release{}, err
	}
	if last != nil && last.Status == "deployed" && last.Version == r.chart.Version && sameValues(last.Values, values) {
		return last.Release, nil
	}
	done, err := r.client.Apply(ctx, helm.Request{Name: name, Chart: r.chart, Values: values, Timeout: timeout})
	return done.Release, err
}

// sameValues compares values as they are stored.
func sameValues(stored, wanted map[string]any) bool {
	if len(stored) == 0 && len(wanted) == 0 {
		return true
	}
	var a, b any
	for from, to := range map[*map[string]any]*any{&stored: &a, &wanted: &b} {
		text, err := json.Marshal(*from)
		if err != nil || json.Unmarshal(text, to) != nil {
			return false
		}
	}
	return reflect.DeepEqual(a, b)
}

// Get implements scextension.Releases.
func (r releases) Get(ctx context.Context, name string) (*kubernetes.Release, error) {
	last, err := r.client.Get(ctx, name)
	if err != nil || last == nil {
		return nil, err
	}
	return &last.Release, nil
}

// Remove implements scextension.Releases.
func (r releases) Remove(ctx context.Context, name string, timeout time.Duration) error {
	return r.client.Remove(ctx, name, timeout)
}
