package pool

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

func TestWhatDiffersInMeaning(t *testing.T) {
	e0 := func(s *Spec) *Extension { return &s.Properties.Deployment.VM.Extensions[0] }
	no := false
	tests := []struct {
		why    string
		change func(old, new *Spec)
		paths  []string // empty: no difference
	}{
		{"the same", func(_, _ *Spec) {}, nil},
		{"casing of names that Azure compares without", func(_, n *Spec) {
			n.Properties.VMSize, n.Properties.Scheduling.NodeFillType = "standard_ds2_v2", "spread"
			n.Properties.Deployment.VM.Image.Publisher, e0(n).Publisher, e0(n).Name = "Canonical", "microsoft.azure.keyvault", "KVEXTENSIONS"
			n.Identity.Type = "userAssigned"
		}, nil},
		{"casing of an identity's id", func(_, n *Spec) {
			n.Identity.IDs = map[string]Identity{strings.ToUpper(testIdentity): {ClientID: "resolved"}}
		}, nil},
		{"false and absence", func(_, n *Spec) { e0(n).EnableAutomaticUpgrade = &no }, nil},
		{"true and absence", func(_, n *Spec) { e0(n).AutoUpgradeMinor = nil }, []string{ext0 + ".autoUpgradeMinorVersion"}},
		{"protected settings that are not given", func(o, _ *Spec) { e0(o).Protected = Protected(`{"key":"v"}`) }, nil},
		{"protected settings given empty", func(o, n *Spec) { e0(o).Protected, e0(n).Protected = Protected(`{"key":"v"}`), Protected(`{}`) }, nil},
		{"the same protected settings", func(o, n *Spec) {
			e0(o).Protected, e0(n).Protected = Protected(`{"a":1,"b":2}`), Protected(`{ "b":2, "a":1 }`)
		}, nil},
		{"other protected settings", func(o, n *Spec) {
			e0(o).Protected, e0(n).Protected = Protected(`{"key":"v"}`), Protected(`{"key":"w"}`)
		}, []string{ext0 + ".protectedSettings"}},
		{"numbers as strings and the order of certificates", func(o, n *Spec) {
			e0(o).Settings = raw(`{"secretsManagementSettings":{"pollingIntervalInS":"300","observedCertificates":["https://a.vault.example/secrets/x","https://a.vault.example/secrets/y"]}}`)
			e0(n).Settings = raw(`{"secretsManagementSettings":{"pollingIntervalInS":300,"observedCertificates":["https://a.vault.example/secrets/y",{"url":"https://a.vault.example/secrets/x"}]}}`)
		}, nil},
		{"numbers as strings in settings of any type", func(o, n *Spec) {
			e0(o).Type, e0(n).Type = "Other", "Other"
			e0(o).Settings, e0(n).Settings = raw(`{"n":"5","on":"true","list":[1,2]}`), raw(`{"n":5,"on":true,"list":[1,2],"empty":{}}`)
		}, nil},
		{"the order of a list that we know nothing about", func(o, n *Spec) {
			e0(o).Settings, e0(n).Settings = raw(`{"list":[1,2]}`), raw(`{"list":[2,1]}`)
		}, []string{ext0 + ".settings.list[0]", ext0 + ".settings.list[1]"}},
		{"a setting", func(_, n *Spec) {
			e0(n).Settings = raw(strings.Replace(string(e0(n).Settings), `"300"`, `"60"`, 1))
		}, []string{ext0 + ".settings.secretsManagementSettings.pollingIntervalInS"}},
		{"false against absence in settings of a handler that we know nothing about", func(o, n *Spec) {
			e0(o).Settings, e0(n).Settings = raw(`{"x":1}`), raw(`{"x":1,"y":false}`)
		}, []string{ext0 + ".settings.y"}},
		{"an image version", func(_, n *Spec) { n.Properties.Deployment.VM.Image.Version = "1" }, []string{pathVM + ".imageReference.version"}},
		{"an extension more", func(_, n *Spec) {
			n.Properties.Deployment.VM.Extensions = append(slices.Clone(n.Properties.Deployment.VM.Extensions), Extension{Name: "b"})
		}, []string{pathVM + ".extensions[1]"}},
		{"an extension less", func(_, n *Spec) { n.Properties.Deployment.VM.Extensions = nil }, []string{ext0}},
		{"the order of extensions", func(o, n *Spec) {
			o.Properties.Deployment.VM.Extensions = append(slices.Clone(o.Properties.Deployment.VM.Extensions), Extension{Name: "b"})
			n.Properties.Deployment.VM.Extensions = []Extension{{Name: "B"}, *e0(n)}
		}, nil},
		{"the order of dependencies", func(o, n *Spec) { e0(o).After, e0(n).After = []string{"a", "b"}, []string{"B", "a"} }, nil},
		{"the same timeout, written otherwise", func(_, n *Spec) { n.Properties.Scale.Fixed.ResizeTimeout = "PT900S" }, nil},
		{"the number of nodes", func(_, n *Spec) { n.Properties.Scale.Fixed.Dedicated = 7 }, []string{pathFixed + ".targetDedicatedNodes"}},
		{"raw parts by meaning", func(o, n *Spec) {
			o.Properties.Deployment.VM.OSDisk = raw(`{"ephemeralOSDiskSettings": {"placement":"CacheDisk"}}`)
			n.Properties.Deployment.VM.OSDisk = raw(`{"ephemeralOSDiskSettings":{"placement":"cachedisk"},"caching":null}`)
		}, nil},
		{"a raw part that is gone", func(o, _ *Spec) {
			o.Properties.Deployment.VM.OSDisk = raw(`{"ephemeralOSDiskSettings":{"placement":"CacheDisk"}}`)
		}, []string{pathVM + ".osDisk.ephemeralOSDiskSettings.placement"}},
		{"an identity more", func(_, n *Spec) { n.Identity.IDs = map[string]Identity{testIdentity: {}, other: {}} }, []string{"identity.userAssignedIdentities." + strings.ToLower(other)}},
	}
	w := &world{t: t}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			a, b := w.spec(1), w.spec(1)
			tt.change(&a, &b)
			var got []string
			for _, c := range Diff(&a, &b) {
				got = append(got, c.Path)
				if strings.Contains(c.Old+c.New, `"w"`) {
					t.Errorf("a protected value is shown: %+v", c)
				}
			}
			if !slices.Equal(got, tt.paths) {
				t.Errorf("differences %v, want %v", got, tt.paths)
			}
		})
	}
}

func TestTheSamePutTwiceIsNoError(t *testing.T) {
	w := newWorld(t)
	first := w.put(w.spec(1))
	rev := first.Pool.ETag(w.store)
	out := w.put(w.spec(1))
	if len(out.Changes) != 0 || out.Created || out.Pool.ETag(w.store) != rev {
		t.Errorf("the second PUT: %+v", out)
	}
}

func TestPropertyCannotBeUpdatedHasTheShapeThatClientsKnow(t *testing.T) {
	w := newWorld(t)
	w.put(w.spec(1))
	s := w.spec(1)
	e := &s.Properties.Deployment.VM.Extensions[0]
	e.Settings = json.RawMessage(strings.Replace(string(e.Settings), "secrets/web", "secrets/api", 1))
	_, err := w.fleet.Put(w.ctx, write(s))
	f := fault.From(err)
	if f.Kind != fault.Invalid || f.Code != "PropertyCannotBeUpdated" || f.Target != "BatchAccount" || len(f.Details) != 3 {
		t.Fatalf("got %+v", f)
	}
	want := []string{"Reason", "PropertyName", "PropertyPath"}
	for i, d := range f.Details {
		if d.Code != want[i] {
			t.Errorf("detail %d is %s", i, d.Code)
		}
	}
	if f.Details[1].Message != "deploymentConfiguration" || f.Details[2].Message != ext0+".settings.secretsManagementSettings.observedCertificates[0]" {
		t.Errorf("name %q, path %q", f.Details[1].Message, f.Details[2].Message)
	}
}

func TestPreconditions(t *testing.T) {
	w := newWorld(t)
	etag := w.put(w.spec(0)).Pool.ETag(w.store)
	tests := []struct {
		why  string
		w    Write
		kind fault.Kind
	}{
		{"another ETag", Write{IfMatch: "0x1"}, fault.Precondition},
		{"only if new", Write{IfNoneMatch: "*"}, fault.Precondition},
		{"data-plane add", Write{MustBeNew: true}, fault.Conflict},
	}
	for _, tt := range tests {
		x := write(w.spec(0))
		x.IfMatch, x.IfNoneMatch, x.MustBeNew = tt.w.IfMatch, tt.w.IfNoneMatch, tt.w.MustBeNew
		if _, err := w.fleet.Put(w.ctx, x); fault.KindOf(err) != tt.kind {
			t.Errorf("%s: %v", tt.why, err)
		}
	}
	x := write(w.spec(0))
	x.IfMatch = etag
	if _, err := w.fleet.Put(w.ctx, x); err != nil {
		t.Error(err)
	}
	absent := write(w.spec(0))
	absent.ID = testPool
	absent.ID.Names = []string{"acct1", "none"}
	absent.MustExist = true
	if _, err := w.fleet.Put(w.ctx, absent); fault.From(err).Code != "PoolNotFound" {
		t.Errorf("PATCH of an absent pool: %v", err)
	}
}
