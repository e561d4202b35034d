package connector

import (
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
)

func (w *world) clusterID() arm.ID {
	w.t.Helper()
	id, err := arm.ParseID(testCluster)
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

// extension is the stored one, and what a manager is told of it.
func (w *world) extension() (*ExtensionObject, *wire.ExtensionWork) {
	w.t.Helper()
	o, err := Extensions.Lookup(w.store.View(w.t.Context()), key(w.clusterID(), ExtensionName))
	if err != nil {
		w.t.Fatal(err)
	}
	_, work, err := w.Work(w.system())
	if err != nil {
		w.t.Fatal(err)
	}
	if all := work[strings.ToLower(testCluster)]; len(all) == 1 {
		return o, &all[0]
	}
	return o, nil
}

func (w *world) reportExtension(r wire.ExtensionReport) {
	w.t.Helper()
	if err := w.ReportExtension(w.system(), w.clusterID(), ExtensionName, r); err != nil {
		w.t.Fatal(err)
	}
}

// TestExtensionOfFirstConnection: the first connection makes the extension wanted;
// what state it is in follows from what is reported.
func TestExtensionOfFirstConnection(t *testing.T) {
	w := newWorld(t)
	w.register()
	if o, work := w.extension(); o != nil || work != nil {
		t.Fatal("there is an extension without a connection")
	}
	first := w.put(database("db"))
	o, work := w.extension()
	if o == nil || work == nil || work.Remove || ExtensionState(o) != "Creating" {
		t.Fatalf("%+v, %+v", o, work)
	}
	state := func(want string) {
		t.Helper()
		if o, _ := w.extension(); ExtensionState(o) != want {
			t.Errorf("it is %s, not %s", ExtensionState(o), want)
		}
	}
	w.reportExtension(wire.ExtensionReport{Revision: work.Revision, Problem: &wire.Problem{Code: "JobFailed", Message: "m"}})
	state("Failed")
	w.reportExtension(wire.ExtensionReport{Revision: work.Revision, Release: &wire.Release{Status: "deployed"}})
	state("Succeeded")
	if _, _, err := w.PutExtension(w.system(), w.clusterID(), ExtensionName, extensionKind, Extension{Settings: map[string]string{"operator.replicas": "2"}}); err != nil {
		t.Fatal(err)
	}
	state("Updating")

	// It is not removed while there are connections, unless that is said.
	_, err := w.DeleteExtension(w.system(), w.clusterID(), ExtensionName, false)
	if e := fault.From(err); e == nil || e.Code != "ExtensionInUse" || !strings.Contains(e.Message, "db") {
		t.Errorf("%v", err)
	}
	w.settle(first.ID)
	if existed, err := w.DeleteExtension(w.system(), w.clusterID(), ExtensionName, true); err != nil || !existed {
		t.Fatal(existed, err)
	}
	if _, work := w.extension(); work.Remove {
		t.Error("the extension goes before its connections")
	}
	w.settle(first.ID)
	if _, work := w.extension(); !work.Remove {
		t.Error("the connections are gone, and the extension stays")
	}
	if _, _, err := w.Put(w.system(), database("db2")); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a connection while the extension goes: %v", err)
	}
	w.reportExtension(wire.ExtensionReport{Gone: true})
	if o, _ := w.extension(); o != nil {
		t.Error("the extension is still there")
	}
}

// TestExtensionsThatAreRefused: in the words that people know.
func TestExtensionsThatAreRefused(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name, kind string
		want       Extension
		code, says string
	}{
		{ExtensionName, "microsoft.flux", Extension{}, "ExtensionTypeRegistrationGetFailed", "Extension type microsoft.flux is not registered"},
		{"other", extensionKind, Extension{}, "InvalidResourceName", ExtensionName},
		{ExtensionName, extensionKind, Extension{Version: "0.1.0", AutoUpgrade: true}, "InvalidArgument", "auto-upgrade-minor-version must be set to 'false'"},
	} {
		_, _, err := w.PutExtension(w.system(), w.clusterID(), c.name, c.kind, c.want)
		if e := fault.From(err); e == nil || e.Code != c.code || !strings.Contains(e.Message, c.says) {
			t.Errorf("%s %s: %v", c.name, c.kind, err)
		}
	}
	if _, err := w.ExtensionOf(w.system(), w.clusterID(), "none"); fault.From(err) == nil || fault.From(err).Code != "ExtensionNotFound" {
		t.Errorf("%v", err)
	}
}
