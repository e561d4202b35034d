package reconcile

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics measures controllers, each under the label "controller". It is a
// prometheus.Collector; make one for all controllers with [NewMetrics] and
// register it.
type Metrics struct {
	attempts *prometheus.CounterVec
	failures *prometheus.CounterVec
	duration *prometheus.HistogramVec

	depth, oldest, stalled, next *prometheus.Desc

	mu     sync.Mutex // guards queues
	queues map[string]*queue
}

// NewMetrics returns a collector without controllers.
func NewMetrics() *Metrics {
	label := []string{"controller"}
	return &Metrics{
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyfleet_reconcile_attempts_total", Help: "Attempts to reconcile an object.",
		}, label),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyfleet_reconcile_failures_total", Help: "Attempts that ended in an error.",
		}, label),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyfleet_reconcile_duration_seconds", Help: "Duration of an attempt.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 30},
		}, label),
		depth:   prometheus.NewDesc("keyfleet_reconcile_queue_depth", "Objects that are due and wait for a worker.", label, nil),
		oldest:  prometheus.NewDesc("keyfleet_reconcile_queue_oldest_seconds", "How long the object that is due longest has waited.", label, nil),
		stalled: prometheus.NewDesc("keyfleet_reconcile_stalled_objects", "Objects given up for now; their conditions say why.", label, nil),
		next:    prometheus.NewDesc("keyfleet_reconcile_next_scheduled_seconds", "Time until the next planned attempt; absent if none is planned.", label, nil),
		queues:  map[string]*queue{},
	}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.attempts.Describe(ch)
	m.failures.Describe(ch)
	m.duration.Describe(ch)
	for _, d := range []*prometheus.Desc{m.depth, m.oldest, m.stalled, m.next} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.attempts.Collect(ch)
	m.failures.Collect(ch)
	m.duration.Collect(ch)
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, q := range m.queues {
		g := q.gauges()
		gauge := func(d *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, name)
		}
		gauge(m.depth, float64(g.depth))
		gauge(m.oldest, g.oldest.Seconds())
		gauge(m.stalled, float64(g.stalled))
		if g.next >= 0 {
			gauge(m.next, g.next.Seconds())
		}
	}
}

// started shows the queue of a running controller, and returns the function that
// takes it away again. A nil Metrics does nothing.
func (m *Metrics) started(name string, q *queue) (stopped func()) {
	if m == nil {
		return func() {}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queues[name] = q
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.queues, name)
	}
}

// attempted counts one attempt. A nil Metrics does nothing.
func (m *Metrics) attempted(name string, took time.Duration, failed bool) {
	if m == nil {
		return
	}
	m.attempts.WithLabelValues(name).Inc()
	if failed {
		m.failures.WithLabelValues(name).Inc()
	}
	m.duration.WithLabelValues(name).Observe(took.Seconds())
}
