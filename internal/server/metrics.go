package server

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/reconcile"
)

// metrics is what /metrics shows. Certificates go under the names that
// x509-certificate-exporter made common, so that existing dashboards and
// alerts read them.
type metrics struct {
	server      *Server
	registry    *prometheus.Registry
	controllers *reconcile.Metrics
	requests    *prometheus.HistogramVec

	notBefore, notAfter, expired, readErrors, renewAt, failing, watches *prometheus.Desc
}

func newMetrics(s *Server) *metrics {
	labels := []string{"vault", "secret_name", "version"}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	m := &metrics{
		server: s, registry: prometheus.NewRegistry(), controllers: reconcile.NewMetrics(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyfleet_request_seconds", Help: "Time to answer requests.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10},
		}, []string{"surface", "method", "route", "status"}),
		notBefore:  desc("x509_cert_not_before", "Start of validity of the newest version, in seconds since the epoch.", labels...),
		notAfter:   desc("x509_cert_not_after", "End of validity of the newest version, in seconds since the epoch.", labels...),
		expired:    desc("x509_cert_expired", "1 if the newest version has expired.", labels...),
		readErrors: desc("x509_read_errors", "1 if the certificates could not be read for this scrape."),
		renewAt:    desc("keyfleet_certificate_renew_at", "When the next version is due, in policy time, in seconds since the epoch.", labels[:2]...),
		failing:    desc("keyfleet_certificate_renewal_failing", "1 if the last attempt to issue the next version failed.", labels[:2]...),
		watches:    desc("keyfleet_node_watches", "Node agents that hold a watch on this server."),
	}
	m.registry.MustRegister(m, m.controllers, m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) observe(surface azureapi.Surface, method string, status int, took time.Duration, route string) {
	m.requests.WithLabelValues(string(surface), method, route, strconv.Itoa(status)).Observe(took.Seconds())
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.notBefore, m.notAfter, m.expired, m.readErrors, m.renewAt, m.failing, m.watches} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(m.watches, float64(m.server.edge.Watching()))
	ca := m.server.ca.Certificate()
	gauge(m.notBefore, seconds(ca.NotBefore), "", "ca.crt", "")
	gauge(m.notAfter, seconds(ca.NotAfter), "", "ca.crt", "")

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	list, err := m.server.vaults.Certificates(ctx)
	gauge(m.readErrors, flag(err != nil))
	now := time.Now()
	for _, c := range list {
		gauge(m.failing, flag(c.Failing), c.Vault, c.Name)
		if !c.Next.IsZero() {
			gauge(m.renewAt, seconds(c.Next), c.Vault, c.Name)
		}
		if c.Version == "" {
			continue
		}
		gauge(m.notBefore, seconds(c.NotBefore), c.Vault, c.Name, c.Version)
		gauge(m.notAfter, seconds(c.NotAfter), c.Vault, c.Name, c.Version)
		gauge(m.expired, flag(now.After(c.NotAfter)), c.Vault, c.Name, c.Version)
	}
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
