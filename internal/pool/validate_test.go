package pool

import (
	"encoding/json"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

func raw(s string) json.RawMessage { return json.RawMessage(s) }

func facts() Facts {
	ok := Identity{ResourceID: testIdentity, ClientID: testClient, Name: "testumaforpools"}
	return Facts{Identities: map[string]IdentityFact{strings.ToLower(testIdentity): {Identity: ok}}, Types: BatchTypes(), Settings: ReadSettings}
}

const (
	ext0  = pathVM + ".extensions[0]"
	other = "/subscriptions/" + testSub + "/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/second"
)

func TestStaticFaults(t *testing.T) {
	e0 := func(s *Spec) *Extension { return &s.Properties.Deployment.VM.Extensions[0] }
	auth := func(s string) json.RawMessage {
		return raw(`{"secretsManagementSettings":{"observedCertificates":["` + testSecret + `"]},"authenticationSettings":{"msiClientId":"` + s + `"}}`)
	}
	tests := []struct {
		why    string
		change func(*Spec, *Facts)
		path   string
		reason string
		fix    string
	}{
		{"a size is required", func(s *Spec, _ *Facts) { s.Properties.VMSize = "" }, "properties.vmSize", "required", "STANDARD_DS2_V2"},
		{"nodes must be described", func(s *Spec, _ *Facts) { s.Properties.Deployment.VM = VirtualMachine{} }, pathVM, "required", "imageReference"},
		{"an image has three names", func(s *Spec, _ *Facts) { s.Properties.Deployment.VM.Image.SKU = "" }, pathVM + ".imageReference", "required", "sku"},
		{"an image has a node agent", func(s *Spec, _ *Facts) { s.Properties.Deployment.VM.NodeAgentSKU = "" }, pathVM + ".nodeAgentSkuId", "required", "batch.node"},
		{"a pool has no fewer nodes than none", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.Dedicated = -1 }, pathFixed + ".targetDedicatedNodes", "-1", "from 0"},
		{"nor more than the server can lead", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.Dedicated = maxNodes + 1 }, pathFixed + ".targetDedicatedNodes", "10001", "10000"},
		{"there are no spot nodes", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.LowPriority = 1 }, pathFixed + ".targetLowPriorityNodes", "spot", "targetDedicatedNodes"},
		{"a timeout is ISO 8601", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.ResizeTimeout = "15m" }, pathFixed + ".resizeTimeout", "ISO 8601", "PT5M"},
		{"a timeout is at least five minutes", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.ResizeTimeout = "PT4M59S" }, pathFixed + ".resizeTimeout", "between", "PT5M"},
		{"and at most seven days", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.ResizeTimeout = "P7DT1S" }, pathFixed + ".resizeTimeout", "between", "P7D"},
		{"an unknown word of an enumeration", func(s *Spec, _ *Facts) { s.Properties.Scale.Fixed.Deallocation = "kill" }, pathFixed + ".nodeDeallocationOption", "kill", "Requeue"},
		{"likewise", func(s *Spec, _ *Facts) { s.Properties.InterNode = "on" }, "properties.interNodeCommunication", "on", "Enabled"},
		{"likewise", func(s *Spec, _ *Facts) { s.Properties.Scheduling.NodeFillType = "Fill" }, "properties.taskSchedulingPolicy.nodeFillType", "Fill", "Spread"},
		{"likewise", func(s *Spec, _ *Facts) { s.Properties.TargetCommunication = "None" }, "properties.targetNodeCommunicationMode", "None", "Simplified"},
		{"task slots are bounded", func(s *Spec, _ *Facts) { s.Properties.TaskSlots = 257 }, "properties.taskSlotsPerNode", "257", "256"},
		{"metadata have names", func(s *Spec, _ *Facts) { s.Properties.Metadata = []Metadata{{}} }, "properties.metadata[0].name", "required", "name"},

		{"an identity type is one of two", func(s *Spec, _ *Facts) { s.Identity.Type = "SystemAssigned" }, "identity.type", "SystemAssigned", "UserAssigned"},
		{"UserAssigned names somebody", func(s *Spec, _ *Facts) { s.Identity.IDs, s.Properties.Deployment.VM.Extensions = nil, nil }, pathIdentities, "required", "None"},
		{"None names nobody", func(s *Spec, _ *Facts) { s.Identity.Type = "None" }, "identity.type", "None", "UserAssigned"},
		{"an identity is a resource id", func(s *Spec, _ *Facts) { s.Identity.IDs = map[string]Identity{testClient: {}} }, pathIdentities + "['" + testClient + "']", "resource id", "/subscriptions/S"},
		{"an identity exists", func(_ *Spec, f *Facts) {
			f.Identities[strings.ToLower(testIdentity)] = IdentityFact{Err: fault.New(fault.NotFound, "", "x")}
		}, pathIdentities + "['" + testIdentity + "']", "does not exist", "keyfleet identity create"},
		{"an identity is of the pool's tenant", func(_ *Spec, f *Facts) {
			f.Identities[strings.ToLower(testIdentity)] = IdentityFact{Err: fault.New(fault.Denied, "", "The identity belongs to another tenant.")}
		}, pathIdentities + "['" + testIdentity + "']", "another tenant", "own tenant"},

		{"an extension has a name", func(s *Spec, _ *Facts) { e0(s).Name = "" }, ext0 + ".name", "required", "name"},
		{"of letters and digits", func(s *Spec, _ *Facts) { e0(s).Name = "a b" }, ext0 + ".name", "a b", "letters"},
		{"and not the service's", func(s *Spec, _ *Facts) { e0(s).Name = "BatchNodeExtension" }, ext0 + ".name", "own extension", "another"},
		{"and not twice", func(s *Spec, _ *Facts) {
			e := *e0(s)
			e.Name = "kvextensions"
			s.Properties.Deployment.VM.Extensions = append(s.Properties.Deployment.VM.Extensions, e)
		}, pathVM + ".extensions[1].name", "extensions[0]", "another"},
		{"an extension has a publisher", func(s *Spec, _ *Facts) { e0(s).Publisher = "" }, ext0 + ".publisher", "required", "publisher"},
		{"and a type", func(s *Spec, _ *Facts) { e0(s).Type = "" }, ext0 + ".type", "required", "type"},
		{"CustomScript is reserved", func(s *Spec, _ *Facts) {
			*e0(s) = Extension{Name: "x", Publisher: "Microsoft.Azure.Extensions", Type: "CustomScript"}
		}, ext0 + ".type", "reserved", "own type"},
		{"under each of its names", func(s *Spec, _ *Facts) {
			*e0(s) = Extension{Name: "x", Publisher: "Microsoft.Compute", Type: "customscriptextension"}
		}, ext0 + ".type", "reserved", "own type"},
		{"an unknown type is answered with the known ones", func(s *Spec, _ *Facts) { *e0(s) = Extension{Name: "x", Publisher: "Contoso", Type: "Backup"} }, ext0 + ".type", "Microsoft.Azure.KeyVault/KeyVaultForLinux", "keyfleet extension type add Contoso Backup"},
		{"a type fits the image", func(s *Spec, _ *Facts) { e0(s).Type = "KeyVaultForWindows" }, ext0 + ".type", "extension for windows", "linux"},
		{"a version is numbers", func(s *Spec, _ *Facts) { e0(s).TypeHandlerVersion = "v3" }, ext0 + ".typeHandlerVersion", "v3", "3.0"},
		{"settings as an escaped string", func(s *Spec, _ *Facts) { e0(s).Settings = raw(`"{\"a\":1}"`) }, ext0 + ".settings", "A string", "quotes"},
		{"settings as a list", func(s *Spec, _ *Facts) { e0(s).Settings = raw(`[]`) }, ext0 + ".settings", "An array", "object"},
		{"protected settings as a string", func(s *Spec, _ *Facts) { e0(s).Protected = Protected(`"x"`) }, ext0 + ".protectedSettings", "A string", "object"},
		{"the Key Vault extension needs settings", func(s *Spec, _ *Facts) { e0(s).Settings = nil }, ext0 + ".settings", "no settings", "secretsManagementSettings"},
		{"authenticationSettings one level too deep", func(s *Spec, _ *Facts) {
			e0(s).Settings = raw(`{"secretsManagementSettings":{"observedCertificates":["` + testSecret + `"],"authenticationSettings":{"msiClientId":"` + testClient + `"}}}`)
		}, ext0 + ".settings.secretsManagementSettings.authenticationSettings", "", "settings"},
		{"a resource id for a client id", func(s *Spec, _ *Facts) { e0(s).Settings = auth(testIdentity) }, ext0 + clientIDPath, "resource id", "clientId"},
		{"a client id that is not on the pool", func(s *Spec, _ *Facts) { e0(s).Settings = auth("885b1a3d-f13c-4030-afcf-9f05044d78dc") }, ext0 + clientIDPath, "885b1a3d-f13c-4030-afcf-9f05044d78dc", testClient},
		{"no client id though there are several identities", func(s *Spec, f *Facts) {
			s.Identity.IDs[other] = Identity{}
			f.Identities[strings.ToLower(other)] = IdentityFact{Identity: Identity{ClientID: "c2", Name: "second"}}
			e0(s).Settings = auth("")
		}, ext0 + clientIDPath, "required", "second"},
		{"no identity though the extension needs one", func(s *Spec, _ *Facts) { s.Identity = Identified{Type: "None"} }, "identity", "has none", "userAssignedIdentities"},
		{"a secret URL of another kind", func(s *Spec, _ *Facts) {
			e0(s).Settings = raw(`{"secretsManagementSettings":{"observedCertificates":["https://prod1.vault.example/certificates/web"]}}`)
		}, ext0 + ".settings.secretsManagementSettings.observedCertificates[0]", "/secrets/", "/secrets/web"},
		{"a dependency that is not there", func(s *Spec, _ *Facts) { e0(s).After = []string{"gone"} }, ext0 + ".provisionAfterExtensions[0]", "gone", "remove"},
		{"extensions that wait for each other", func(s *Spec, _ *Facts) { e0(s).After = []string{"KVEXTENSIONS"} }, ext0 + ".provisionAfterExtensions", "KVExtensions after KVExtensions", "remove one"},
	}
	w := &world{t: t}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s, f := w.spec(1), facts()
			tt.change(&s, &f)
			got := Validate(&s, f)
			if len(got) != 1 {
				t.Fatalf("%d problems: %v", len(got), got)
			}
			p := got[0]
			if p.Path != tt.path || !strings.Contains(p.Reason, tt.reason) || !strings.Contains(p.Fix, tt.fix) || p.Fix == "" || p.Code == "" {
				t.Errorf("got %+v", p)
			}
		})
	}
}

func TestAllFaultsAreToldAtOnce(t *testing.T) {
	s := (&world{t: t}).spec(1)
	s.Properties.VMSize, s.Properties.Scale.Fixed.ResizeTimeout = "", "x"
	s.Properties.Deployment.VM.Extensions[0].TypeHandlerVersion = "x"
	e := fault.From(invalid(Validate(&s, facts())))
	if e.Kind != fault.Invalid || e.Code != "InvalidRequestBody" || len(e.Details) != 3 {
		t.Fatalf("%v with %d details", e, len(e.Details))
	}
	for _, d := range e.Details {
		if d.Target == "" || !strings.Contains(d.Message, "Fix: ") {
			t.Errorf("detail without place or fix: %+v", d)
		}
	}
}

func TestGoodPoolsHaveNoProblems(t *testing.T) {
	w := &world{t: t}
	for name, change := range map[string]func(*Spec){
		"as documented":  func(*Spec) {},
		"an image by id": func(s *Spec) { s.Properties.Deployment.VM.Image = Image{ID: "/subscriptions/x"} },
		"other casing":   func(s *Spec) { s.Properties.Scheduling.NodeFillType, s.Properties.InterNode = "pack", "ENABLED" },
		"one identity unnamed": func(s *Spec) {
			s.Properties.Deployment.VM.Extensions[0].Settings = raw(`{"secretsManagementSettings":{"observedCertificates":["` + testSecret + `"]}}`)
		},
		"a chain": func(s *Spec) {
			s.Properties.Deployment.VM.Extensions = append(s.Properties.Deployment.VM.Extensions,
				Extension{Name: "oms", Publisher: "Microsoft.EnterpriseCloud.Monitoring", Type: "OmsAgentForLinux", After: []string{"kvextensions"}})
		},
	} {
		s := w.spec(1)
		change(&s)
		if ps := Validate(&s, facts()); len(ps) > 0 {
			t.Errorf("%s: %v", name, ps)
		}
	}
}

func TestIdentityNeedsTheRightToAssignIt(t *testing.T) {
	w := newWorld(t)
	caller := w.as("contrib", "b24988ac-6180-42a0-ab88-20f7382dd24c", testAccount.String())
	_, err := w.fleet.Put(caller, write(w.spec(1)))
	if e := fault.From(err); e.Kind != fault.Denied || e.Code != "LinkedAuthorizationFailed" || !strings.Contains(e.Target, testIdentity) {
		t.Fatalf("got %v", err)
	}
	w.put(w.spec(1)) // an owner does
	s := w.spec(1)
	s.Properties.DisplayName = "changed"
	if _, err := w.fleet.Put(caller, write(s)); err != nil {
		t.Errorf("an identity that is on the pool already is not assigned again: %v", err)
	}
}

func TestAdministratorsAddTypes(t *testing.T) {
	w := newWorld(t)
	s := w.spec(1)
	s.Properties.Deployment.VM.Extensions = []Extension{{Name: "b", Publisher: "Contoso.Backup", Type: "BackupForLinux"}}
	if _, err := w.fleet.Put(w.ctx, write(s)); fault.KindOf(err) != fault.Invalid {
		t.Fatal(err)
	}
	if err := w.fleet.AddExtensionType(w.ctx, ExtensionType{Publisher: "Contoso.Backup", Type: "BackupForLinux", OS: "linux"}); err != nil {
		t.Fatal(err)
	}
	w.put(s)
	if err := w.fleet.RemoveExtensionType(w.ctx, "contoso.backup", "backupforlinux"); err != nil {
		t.Fatal(err)
	}
	if out := w.put(s); len(out.Changes) != 0 { // the pool that has it keeps it
		t.Error(out.Changes)
	}
	if err := w.fleet.AddExtensionType(w.ctx, ExtensionType{Publisher: "Microsoft.Azure.Extensions", Type: "CustomScript"}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a reserved type was added: %v", err)
	}
}
