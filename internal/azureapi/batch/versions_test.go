package batch

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pool"
)

// drawSpec draws any pool that the version can express.
func drawSpec(t *rapid.T, v version) pool.Spec {
	word := rapid.StringMatching(`[A-Za-z0-9][A-Za-z0-9_-]{0,8}`)
	maybe := func(label string) string { return rapid.OneOf(rapid.Just(""), word).Draw(t, label) }
	object := rapid.SampledFrom([]string{`{"a":1}`, `{"a":{"b":["x",2,true]}}`, `[{"lun":0,"diskSizeGB":5}]`})
	part := func(label string) json.RawMessage {
		if rapid.Bool().Draw(t, "has "+label) {
			return json.RawMessage(object.Draw(t, label))
		}
		return nil
	}
	flag := func(label string) *bool {
		b := rapid.Bool().Draw(t, label)
		return rapid.SampledFrom([]*bool{nil, &b}).Draw(t, "has "+label)
	}
	s := pool.Spec{Properties: pool.Properties{
		DisplayName: maybe("displayName"), VMSize: word.Draw(t, "vmSize"), InterNode: maybe("interNode"), TaskSlots: rapid.IntRange(0, 9).Draw(t, "slots"),
		Network: part("network"), Scheduling: pool.Scheduling{NodeFillType: maybe("fill")},
		Scale: pool.Scale{Fixed: pool.Fixed{
			Dedicated: rapid.IntRange(0, 9).Draw(t, "dedicated"), LowPriority: rapid.IntRange(0, 3).Draw(t, "low"), ResizeTimeout: maybe("timeout"), Deallocation: maybe("deallocation"),
		}},
	}}
	p := &s.Properties
	for range rapid.IntRange(0, 2).Draw(t, "metadata") {
		p.Metadata = append(p.Metadata, pool.Metadata{Name: word.Draw(t, "name"), Value: maybe("value")})
	}
	for range rapid.IntRange(0, 2).Draw(t, "licenses") {
		p.ApplicationLicenses = append(p.ApplicationLicenses, word.Draw(t, "license"))
	}
	p.Deployment.VM = pool.VirtualMachine{
		Image:        pool.Image{ID: maybe("id"), Publisher: maybe("publisher"), Offer: maybe("offer"), SKU: maybe("sku"), Version: maybe("version")},
		NodeAgentSKU: maybe("agent"), LicenseType: maybe("license"), DataDisks: part("disks"), DiskEncryption: part("encryption"), Placement: part("placement"), Windows: part("windows"),
	}
	for i := range rapid.IntRange(0, 2).Draw(t, "extensions") {
		e := pool.Extension{
			Name: strconv.Itoa(i) + word.Draw(t, "ext"), Publisher: word.Draw(t, "pub"), Type: word.Draw(t, "type"), TypeHandlerVersion: maybe("thv"),
			AutoUpgradeMinor: flag("minor"), Settings: part("settings"),
		}
		if rapid.Bool().Draw(t, "after") {
			e.After = []string{word.Draw(t, "first")}
		}
		if v.enableAutomaticUpgrade {
			e.EnableAutomaticUpgrade = flag("upgrade")
		}
		p.Deployment.VM.Extensions = append(p.Deployment.VM.Extensions, e)
	}
	if v.osDisk {
		p.Deployment.VM.OSDisk = part("os")
	}
	if v.communicationMode {
		p.TargetCommunication = maybe("communication")
	}
	for range rapid.IntRange(0, 2).Draw(t, "identities") {
		if s.Identity.IDs == nil {
			s.Identity = pool.Identified{Type: "UserAssigned", IDs: map[string]pool.Identity{}}
		}
		s.Identity.IDs["/subscriptions/"+word.Draw(t, "identity")] = pool.Identity{}
	}
	s.FillDefaults()
	return s
}

// TestRoundTrip: hub -> wire -> hub is the identity on all that a version can
// express. Protected settings are the exception: they are never answered.
func TestRoundTrip(t *testing.T) {
	for _, v := range versions() {
		t.Run(v.date, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				s := drawSpec(t, v)
				p := &pool.Pool{Spec: s}
				body, err := json.Marshal(v.Encode(p, "0x1"))
				if err != nil {
					t.Fatal(err)
				}
				got, problems, err := v.Decode(body, nil, false)
				if err != nil || len(problems) > 0 {
					t.Fatalf("%v %v\n%s", err, problems, body)
				}
				got.FillDefaults()
				if diff := cmp.Diff(s, got); diff != "" {
					t.Fatalf("%s\n%s", diff, body)
				}
				if changes := pool.Diff(&s, &got); len(changes) > 0 {
					t.Fatalf("differences after a round trip: %v", changes)
				}
			})
		})
	}
}

// TestAnOldClientKeepsWhatItCannotSay: a pool with everything, answered to an
// old version and sent back, is unchanged.
func TestAnOldClientKeepsWhatItCannotSay(t *testing.T) {
	all := versions()
	newest := all[len(all)-1]
	for _, v := range all {
		rapid.Check(t, func(t *rapid.T) {
			s := drawSpec(t, newest)
			body, err := json.Marshal(v.Encode(&pool.Pool{Spec: s}, "0x1"))
			if err != nil {
				t.Fatal(err)
			}
			for _, patch := range []bool{false, true} {
				got, problems, err := v.Decode(body, &s, patch)
				if err != nil || len(problems) > 0 {
					t.Fatal(err, problems)
				}
				got.FillDefaults()
				if changes := pool.Diff(&s, &got); len(changes) > 0 {
					t.Fatalf("%s, patch %v: %v", v.date, patch, changes)
				}
			}
		})
	}
}

func TestExamplesAreGood(t *testing.T) {
	for _, v := range versions() {
		s, problems, err := v.Decode([]byte(v.Example()), nil, false)
		if err != nil || len(problems) > 0 {
			t.Fatalf("%s: %v %v", v.date, err, problems)
		}
		s.FillDefaults()
		if ps := pool.Validate(&s, pool.Facts{Types: pool.BatchTypes(), Settings: pool.ReadSettings}); len(ps) > 0 {
			t.Errorf("%s: %v", v.date, ps)
		}
	}
}

func TestPreconditionHeaders(t *testing.T) {
	for in, want := range map[string]string{`W/"0xAB"`: "0xAB", `"0xAB"`: "0xAB", "0xAB": "0xAB", "*": "*", "": "", ` W/"0xAB" `: "0xAB"} {
		if got := etagOf(in); got != want {
			t.Errorf("%q is %q", in, got)
		}
	}
}

func TestWarningTextIsOneLineOfASCII(t *testing.T) {
	if got := quoted("a \"b\"\\ü\r\nX: y"); got != `"a \"b\"\\?  X: y"` {
		t.Errorf("got %s", got)
	}
}

func documentedBodies(f *testing.F) {
	dir := filepath.Join("..", "..", "..", "testdata", "requests")
	files, err := os.ReadDir(dir)
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range files {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	for _, v := range versions() {
		f.Add([]byte(v.Example()))
	}
}

// FuzzPoolBody: any body is either refused as Invalid, or understood the same
// way twice and never more than the version can say.
func FuzzPoolBody(f *testing.F) {
	documentedBodies(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, v := range versions() {
			s, problems, err := v.Decode(body, nil, false)
			if err != nil {
				if !errors.Is(err, fault.Invalid) {
					t.Fatalf("%s: %v", v.date, err)
				}
				continue
			}
			s.FillDefaults()
			_ = pool.Validate(&s, pool.Facts{Types: pool.BatchTypes(), Settings: pool.ReadSettings})
			if len(problems) > 0 {
				continue
			}
			out, err := json.Marshal(v.Encode(&pool.Pool{Spec: s}, "0x1"))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(out), "protectedSettings") {
				for _, e := range s.Properties.Deployment.VM.Extensions {
					if !strings.Contains(string(e.Settings), "protectedSettings") {
						t.Fatalf("protected settings are answered: %s", out)
					}
				}
			}
			again, _, err := v.Decode(out, nil, false)
			if err != nil {
				t.Fatalf("our own answer is refused: %v\n%s", err, out)
			}
			again.FillDefaults()
			if changes := pool.Diff(&s, &again); len(changes) > 0 {
				t.Fatalf("%v", changes)
			}
		}
	})
}
