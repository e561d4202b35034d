package scextension

import (
	"reflect"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

// TestValues: the manager's image and the server that pods log in at, unless a
// setting says otherwise; numbers and truth values are such.
func TestValues(t *testing.T) {
	type values = map[string]any
	m := Manager{Image: "registry/connector:1", Authority: "https://login.example.org/", Tenant: "t"}
	server := values{"authorityHost": "https://login.example.org/", "tenantID": "t"}
	for _, c := range []struct {
		name     string
		settings map[string]string
		want     values
	}{
		{"no settings", nil, values{"image": "registry/connector:1", "webhook": server}},
		{"beside what the manager gives", map[string]string{"webhook.enabled": "true", "operator.replicas": "2"}, values{
			"image": "registry/connector:1", "operator": values{"replicas": int64(2)},
			"webhook": values{"enabled": true, "authorityHost": "https://login.example.org/", "tenantID": "t"},
		}},
		{"instead of what the manager gives", map[string]string{"image": "mirror/connector:1", "webhook.authorityHost": "https://other/"}, values{
			"image": "mirror/connector:1", "webhook": values{"authorityHost": "https://other/", "tenantID": "t"},
		}},
	} {
		got, err := m.values(c.settings)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
	if got, err := (&Manager{Image: "i"}).values(nil); err != nil || !reflect.DeepEqual(got, values{"image": "i"}) {
		t.Errorf("a manager that knows no token endpoint: %v, %v", got, err)
	}
	if _, err := m.values(map[string]string{"operator": "x", "operator.replicas": "2"}); err == nil || fault.From(err).Code != "RenderingFailed" {
		t.Errorf("a setting within another one: %v", err)
	}
}

// TestReleaseProblemSaysEachCauseOnce: the pods of one Job fail for one reason, and
// the first cause is a part of the message already.
func TestReleaseProblemSaysEachCauseOnce(t *testing.T) {
	err := fault.New(fault.Unavailable, "JobFailed", "job failed. The pod a ended with: x").
		WithDetail("ContainerFailed", "The pod a ended with: x").WithDetail("ContainerFailed", "The pod b ended with: x").WithDetail("NotScheduled", "The pod c waits.")
	p := releaseProblem("sc-extension", err)
	if p.Code != "JobFailed" || strings.Count(p.Message, "ended with: x") != 1 || !strings.HasSuffix(p.Message, "NotScheduled: The pod c waits.") {
		t.Errorf("%q", p.Message)
	}
}
