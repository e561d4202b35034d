package vault

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

func TestSecretNeverPrints(t *testing.T) {
	s := NewSecret("canary")
	var b strings.Builder
	log := slog.New(slog.NewJSONHandler(&b, nil))
	type holder struct {
		S Secret
		P *Secret
		V SecretVersion
	}
	h := holder{s, &s, SecretVersion{Value: s}}
	log.Info("x", "s", s, "h", h, "p", &s)
	j, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	stored, cert := storedSecret{Value: "canary"}, storedCertificate{Key: []byte("canary")}
	for _, out := range []string{
		fmt.Sprint(s, h), fmt.Sprintf("%s %v %+v %#v %q %x %d", s, s, s, s, s, s, s), fmt.Sprintf("%+v %#v", h, h), b.String(), string(j),
		fmt.Sprintf("%v %+v %#v %s", stored, &stored, stored, stored), fmt.Sprintf("%v %+v %#v %x", cert, cert, &cert, cert),
	} {
		if strings.Contains(out, "canary") || strings.Contains(out, "63616e617279") {
			t.Errorf("the value shows in %s", out)
		}
	}
}

func TestVaultNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"prod1": true, "a-b": true, "Abc": true, "abcdefghijklmnopqrstuvwx": true,
		"ab": false, "1abc": false, "abc-": false, "a--b": false, "a_b": false, "abcdefghijklmnopqrstuvwxy": false, "": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
	}
}

func TestPutVaultRefuses(t *testing.T) {
	e := newEnv(t)
	pol := func(p access.Policy) *[]access.Policy { return &[]access.Policy{p} }
	for _, c := range []struct {
		reason string
		name   string
		spec   VaultSpec
		code   string
		target string
	}{
		{"access by roles is not offered", "new1", VaultSpec{RBAC: ptr(true)}, "BadRequest", "properties.enableRbacAuthorization"},
		{"soft delete cannot be off", "new1", VaultSpec{SoftDelete: ptr(false)}, "BadRequest", "properties.enableSoftDelete"},
		{"retention is 7 to 90", "new1", VaultSpec{RetentionDays: ptr(6)}, "BadRequest", "properties.softDeleteRetentionInDays"},
		{"retention is fixed", "prod1", VaultSpec{RetentionDays: ptr(7)}, "BadRequest", "properties.softDeleteRetentionInDays"},
		{"an unknown SKU", "new1", VaultSpec{SKU: ptr("gold")}, "BadRequest", "properties.sku.name"},
		{"a name that cannot be", "1new", VaultSpec{}, "VaultNameNotValid", "name"},
		{"another tenant", "new1", VaultSpec{Tenant: ptr("00000000-0000-0000-0000-000000000000")}, "BadRequest", "properties.tenantId"},
		{"a policy of another tenant", "new1", VaultSpec{Policies: pol(access.Policy{Tenant: "other", ObjectID: "o"})}, "BadRequest", "properties.accessPolicies.tenantId"},
		{"an unknown permission", "new1", VaultSpec{Policies: pol(access.Policy{Tenant: tenant, ObjectID: "o", Secrets: []string{"fetch"}})}, "BadRequest", "properties.accessPolicies.permissions.secrets"},
		{"a policy for nobody", "new1", VaultSpec{Policies: pol(access.Policy{Tenant: tenant})}, "BadRequest", "properties.accessPolicies.objectId"},
		{"a principal twice", "new1", VaultSpec{Policies: &[]access.Policy{{Tenant: tenant, ObjectID: "o"}, {Tenant: tenant, ObjectID: "O"}}}, "BadRequest", "properties.accessPolicies"},
		{"another location", "prod1", VaultSpec{Location: ptr("westus")}, "InvalidResourceLocation", "location"},
		{"too many tags", "new1", VaultSpec{Tags: manyTags(16)}, "InvalidTags", "tags"},
		{"nothing to recover", "new1", VaultSpec{Recover: true}, "DeletedVaultNotFound", ""},
	} {
		if c.spec.Location == nil {
			c.spec.Location = ptr("East US")
		}
		_, _, err := e.vaults.PutVault(e.owner, vaultID(c.name), c.spec)
		if f := fault.From(err); err == nil || f.Code != c.code || f.Target != c.target {
			t.Errorf("%s: got %v, want %s at %s", c.reason, err, c.code, c.target)
		}
	}
	if _, _, err := e.vaults.PutVault(e.owner, vaultID("new1"), VaultSpec{}); fault.From(err).Code != "LocationRequired" {
		t.Errorf("without a location: %v", err)
	}
}

func manyTags(n int) map[string]string {
	out := map[string]string{}
	for i := range n {
		out[fmt.Sprint("t", i)] = "x"
	}
	return out
}

// TestVaultLife follows a vault through update, deletion, recovery and purge.
func TestVaultLife(t *testing.T) {
	e := newEnv(t)
	vt := e.putVault("prod1", VaultSpec{Tags: map[string]string{"a": "b"}})
	if len(vt.Policies) != 1 || vt.Tags["a"] != "b" || vt.RetentionDays != 90 {
		t.Errorf("a PUT without policies leaves %+v", vt)
	}
	other := vaultID("PROD1")
	other.ResourceGroup = "Rg2"
	_, _, err := e.vaults.PutVault(e.owner, other, VaultSpec{Location: ptr("eastus")})
	e.refused("the name in another group", err, fault.Conflict, "VaultAlreadyExists")
	_, err = e.vaults.Vault(e.owner, other)
	e.refused("the id in another group", err, fault.NotFound, "ResourceNotFound")
	_, err = e.vaults.SetSecret(e.owner, "prod1", "s", NewSecret("x"), Change{})
	e.ok(err)

	found, err := e.vaults.DeleteVault(e.owner, vaultID("prod1"))
	if err != nil || !found {
		t.Fatal(found, err)
	}
	if found, err = e.vaults.DeleteVault(e.owner, vaultID("prod1")); err != nil || found {
		t.Errorf("deleting again: %v, %v", found, err)
	}
	_, err = e.vaults.Secret(e.owner, "prod1", "s", "", "")
	e.refused("a secret of a deleted vault", err, fault.NotFound, "VaultNotFound")
	_, _, err = e.vaults.PutVault(e.owner, vaultID("prod1"), VaultSpec{Location: ptr("eastus")})
	e.refused("creating over a deleted vault", err, fault.Conflict, "ConflictError")
	list, err := e.vaults.DeletedVaults(e.owner, strings.ToUpper(subID))
	if err != nil || len(list) != 1 || list[0].Deleted.PurgeAt.Sub(list[0].Deleted.At) < 89*24*time.Hour {
		t.Errorf("deleted vaults: %+v, %v", list, err)
	}
	reason, err := e.vaults.NameAvailable(e.owner, subID, "Prod1")
	if err != nil || reason == nil {
		t.Errorf("the name of a deleted vault is available: %v, %v", reason, err)
	}
	e.putVault("prod1", VaultSpec{Recover: true})
	s, err := e.vaults.Secret(e.owner, "prod1", "s", "", "")
	if err != nil || s.Value.Reveal() != "x" {
		t.Errorf("after recovery: %v", err)
	}

	_, err = e.vaults.PatchVault(e.owner, vaultID("prod1"), VaultSpec{PurgeProtection: ptr(true)})
	e.ok(err)
	_, err = e.vaults.PatchVault(e.owner, vaultID("prod1"), VaultSpec{PurgeProtection: ptr(false)})
	e.refused("purge protection is for good", err, fault.Invalid, "BadRequest")
	_, err = e.vaults.DeleteVault(e.owner, vaultID("prod1"))
	e.ok(err)
	e.refused("purging a protected vault", e.vaults.PurgeVault(e.owner, subID, "East US", "prod1"), fault.Denied, "OperationNotAllowed")
	e.refused("purging in another location", e.vaults.PurgeVault(e.owner, subID, "westus", "prod1"), fault.NotFound, "DeletedVaultNotFound")
}

// TestGrantNeverExceedsTheGranter: somebody who may write vaults but not access
// policies gives away only what they hold in the vault.
func TestGrantNeverExceedsTheGranter(t *testing.T) {
	e := newEnv(t)
	e.assign("contributor", access.Contributor.ID, "/subscriptions/"+subID)
	contributor := as("contributor")
	one := func(oid string, secrets ...string) *[]access.Policy {
		return &[]access.Policy{{Tenant: tenant, ObjectID: oid, Secrets: secrets}}
	}
	_, _, err := e.vaults.PutVault(contributor, vaultID("mine1"), VaultSpec{Location: ptr("eastus"), Policies: one("contributor", "get")})
	e.refused("a new vault with a grant to oneself", err, fault.Denied, "AuthorizationFailed")
	_, _, err = e.vaults.PutVault(contributor, vaultID("mine1"), VaultSpec{Location: ptr("eastus")})
	e.ok(err)
	_, err = e.vaults.ChangePolicies(contributor, vaultID("mine1"), AddPolicies, *one("contributor", "get"))
	e.refused("a grant to oneself", err, fault.Denied, "AuthorizationFailed")
	_, err = e.vaults.ChangePolicies(e.owner, vaultID("mine1"), AddPolicies, *one("contributor", "get", "list"))
	e.ok(err)
	_, err = e.vaults.ChangePolicies(contributor, vaultID("mine1"), AddPolicies, *one("friend", "get"))
	e.ok(err)
	_, err = e.vaults.ChangePolicies(contributor, vaultID("mine1"), AddPolicies, *one("friend", "set"))
	e.refused("a permission not held", err, fault.Denied, "AuthorizationFailed")
	_, err = e.vaults.ChangePolicies(contributor, vaultID("mine1"), AddPolicies, *one("friend", "all"))
	e.refused("all, which is more than held", err, fault.Denied, "AuthorizationFailed")
	_, err = e.vaults.PatchVault(contributor, vaultID("mine1"), VaultSpec{Tags: map[string]string{"a": "b"}})
	e.ok(err)
	_, err = e.vaults.ChangePolicies(as("friend"), vaultID("mine1"), AddPolicies, *one("friend", "get"))
	e.refused("without the right to write the vault", err, fault.Denied, "AuthorizationFailed")
}

// TestGrantsByRandomSteps: whatever a contributor does, nobody ever holds a
// permission that the owner did not give to somebody the contributor is.
func TestGrantsByRandomSteps(t *testing.T) {
	perms := []string{"get", "list", "set", "delete", "all"}
	rapid.Check(t, func(rt *rapid.T) {
		e := newEnv(t)
		e.assign("contributor", access.Contributor.ID, "/")
		given := rapid.SliceOfDistinct(rapid.SampledFrom(perms), rapid.ID[string]).Draw(rt, "given")
		_, err := e.vaults.ChangePolicies(e.owner, vaultID("prod1"), ReplacePolicies, []access.Policy{{Tenant: tenant, ObjectID: "contributor", Secrets: given}})
		e.ok(err)
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			kind := rapid.SampledFrom([]PolicyChange{AddPolicies, ReplacePolicies, RemovePolicies}).Draw(rt, "kind")
			who := rapid.SampledFrom([]string{"contributor", "friend", "enemy"}).Draw(rt, "who")
			what := rapid.SliceOfDistinct(rapid.SampledFrom(perms), rapid.ID[string]).Draw(rt, "what")
			_, _ = e.vaults.ChangePolicies(as("contributor"), vaultID("prod1"), kind, []access.Policy{{Tenant: tenant, ObjectID: who, Secrets: what}})
		}
		vt, err := e.vaults.Vault(e.owner, vaultID("prod1"))
		e.ok(err)
		for _, p := range vt.Policies {
			for _, s := range p.Secrets {
				if p.ObjectID != "owner" && !slices.Contains(given, s) && !slices.Contains(given, "all") {
					rt.Fatalf("%s holds %s; the contributor was given %v", p.ObjectID, s, given)
				}
			}
		}
	})
}

// TestSecretLife follows a secret through versions, attributes, deletion,
// recovery and purge.
func TestSecretLife(t *testing.T) {
	e := newEnv(t)
	v := e.vaults
	first, err := v.SetSecret(e.owner, "Prod1", "Db", NewSecret("one"), Change{ContentType: ptr("text/plain"), Tags: map[string]string{"a": "b"}})
	e.ok(err)
	second, err := v.SetSecret(e.owner, "prod1", "db", NewSecret("two"), Change{Expires: ptr(time.Unix(1, 0))})
	e.ok(err)
	got, err := v.Secret(e.owner, "prod1", "DB", "", "")
	e.ok(err)
	if got.Value.Reveal() != "two" || got.Version != second.Version || got.Name != "Db" || got.Vault != "prod1" || got.Managed {
		t.Errorf("the newest is %+v; an expired secret can still be read", got)
	}
	got, err = v.Secret(e.owner, "prod1", "db", strings.ToUpper(first.Version), "")
	e.ok(err)
	if got.Value.Reveal() != "one" || got.ContentType != "text/plain" || got.Tags["a"] != "b" || got.Attributes.RecoveryLevel != "Recoverable+Purgeable" {
		t.Errorf("the first is %+v", got)
	}
	_, err = v.UpdateSecret(e.owner, "prod1", "db", first.Version, Change{Enabled: ptr(false)})
	e.ok(err)
	_, err = v.Secret(e.owner, "prod1", "db", first.Version, "")
	e.refused("a disabled version", err, fault.Denied, "SecretDisabled")
	_, err = v.Secret(e.owner, "prod1", "db", strings.Repeat("0", 32), "")
	e.refused("no such version", err, fault.NotFound, "SecretNotFound")
	_, err = v.Secret(e.owner, "prod1", "db", "x", "")
	e.refused("no version at all", err, fault.NotFound, "SecretNotFound")
	list, _, err := v.SecretVersions(e.owner, "prod1", "db", Page{})
	if err != nil || len(list) != 2 || list[0].Value.Len() != 0 {
		t.Errorf("versions: %d, %v", len(list), err)
	}

	deleted, err := v.DeleteSecret(e.owner, "prod1", "db")
	e.ok(err)
	if deleted.Deleted == nil || deleted.Value.Len() != 0 {
		t.Errorf("deleted: %+v", deleted)
	}
	_, err = v.Secret(e.owner, "prod1", "db", "", "")
	e.refused("a deleted secret", err, fault.NotFound, "SecretNotFound")
	_, err = v.SetSecret(e.owner, "prod1", "db", NewSecret("three"), Change{})
	e.refused("the name of a deleted secret", err, fault.Conflict, "ObjectIsDeletedButRecoverable")
	_, err = v.CreateCertificate(e.owner, "prod1", "db", testPolicy(), Change{})
	e.refused("a certificate of that name", err, fault.Conflict, "ObjectIsDeletedButRecoverable")
	if list, _, err = v.DeletedSecrets(e.owner, "prod1", Page{}); err != nil || len(list) != 1 {
		t.Errorf("deleted secrets: %d, %v", len(list), err)
	}
	_, err = v.RecoverSecret(e.owner, "prod1", "db")
	e.ok(err)
	if got, err = v.Secret(e.owner, "prod1", "db", "", ""); err != nil || got.Value.Reveal() != "two" {
		t.Errorf("recovered: %v", err)
	}
	_, err = v.CreateCertificate(e.owner, "prod1", "db", testPolicy(), Change{})
	e.refused("a certificate beside a secret", err, fault.Conflict, "Conflict")
	e.refused("purging what is not deleted", v.PurgeSecret(e.owner, "prod1", "db"), fault.NotFound, "SecretNotFound")
	_, err = v.DeleteSecret(e.owner, "prod1", "db")
	e.ok(err)
	e.ok(v.PurgeSecret(e.owner, "prod1", "db"))
	e.gone("prod1/db")
	_, err = v.SetSecret(e.owner, "prod1", "db", NewSecret("four"), Change{})
	e.ok(err)
}

func TestSecretLimits(t *testing.T) {
	e := newEnv(t)
	set := func(name, value string, c Change) error {
		_, err := e.vaults.SetSecret(e.owner, "prod1", name, NewSecret(value), c)
		return err
	}
	e.ok(set("a", strings.Repeat("x", 25<<10), Change{Tags: manyTags(15)}))
	for reason, err := range map[string]error{
		"over 25 KB":            set("a", strings.Repeat("x", 25<<10+1), Change{}),
		"a name with a dot":     set("a.b", "x", Change{}),
		"a name of 128":         set(strings.Repeat("x", 128), "x", Change{}),
		"an empty name":         set("", "x", Change{}),
		"16 tags":               set("a", "x", Change{Tags: manyTags(16)}),
		"a long tag":            set("a", "x", Change{Tags: map[string]string{"a": strings.Repeat("x", 257)}}),
		"a long content type":   set("a", "x", Change{ContentType: ptr(strings.Repeat("x", 256))}),
		"an end before a start": set("a", "x", Change{NotBefore: ptr(time.Unix(2, 0)), Expires: ptr(time.Unix(1, 0))}),
	} {
		e.refused(reason, err, fault.Invalid, "BadParameter")
	}
}

func TestListsComeInPages(t *testing.T) {
	e := newEnv(t)
	want := 60
	for i := range want {
		_, err := e.vaults.SetSecret(e.owner, "prod1", fmt.Sprintf("s%02d", i), NewSecret("x"), Change{})
		e.ok(err)
	}
	for _, size := range []int{0, 1, 7, 25, 1000} {
		var names []string
		for p := (Page{Max: size}); ; {
			list, next, err := e.vaults.Secrets(e.owner, "prod1", p)
			e.ok(err)
			if len(list) > 25 {
				t.Fatalf("a page has %d items", len(list))
			}
			for _, s := range list {
				names = append(names, s.Name)
			}
			if next == "" {
				break
			}
			p.After = next
		}
		if len(names) != want || !slices.IsSorted(names) {
			t.Errorf("pages of %d give %d names", size, len(names))
		}
	}
}

// TestEveryOperationAsksForItsPermission: with all permissions but one, only the
// operations of that one are refused, and each refusal is on record.
func TestEveryOperationAsksForItsPermission(t *testing.T) {
	ops := map[string][]func(v *Vaults, c Change) error{
		"secrets/get":    {func(v *Vaults, _ Change) error { _, err := v.Secret(as("u"), "prod1", "s", "", ""); return err }},
		"secrets/list":   {func(v *Vaults, _ Change) error { _, _, err := v.Secrets(as("u"), "prod1", Page{}); return err }},
		"secrets/set":    {func(v *Vaults, c Change) error { _, err := v.UpdateSecret(as("u"), "prod1", "s", "", c); return err }},
		"secrets/delete": {func(v *Vaults, _ Change) error { _, err := v.DeleteSecret(as("u"), "prod1", "s"); return err }},
		"secrets/recover": {func(v *Vaults, _ Change) error {
			_, err := v.RecoverSecret(as("u"), "prod1", "s")
			return err
		}},
		"secrets/purge": {func(v *Vaults, _ Change) error { return v.PurgeSecret(as("u"), "prod1", "s") }},
		"certificates/create": {
			func(v *Vaults, c Change) error {
				_, err := v.CreateCertificate(as("u"), "prod1", "c", testPolicy(), c)
				return err
			},
			func(v *Vaults, _ Change) error { _, err := v.RenewNow(as("u"), "prod1", "c"); return err },
		},
		"certificates/get": {
			func(v *Vaults, _ Change) error { _, err := v.Certificate(as("u"), "prod1", "c", ""); return err },
			func(v *Vaults, _ Change) error { _, err := v.CertificatePolicy(as("u"), "prod1", "c"); return err },
			func(v *Vaults, _ Change) error { _, err := v.Pending(as("u"), "prod1", "c", ""); return err },
			func(v *Vaults, _ Change) error { _, err := v.Renewal(as("u"), "prod1", "c"); return err },
			func(v *Vaults, _ Change) error { _, err := v.DeletedCertificate(as("u"), "prod1", "c"); return err },
		},
		"certificates/list": {
			func(v *Vaults, _ Change) error {
				_, _, err := v.ListCertificates(as("u"), "prod1", true, Page{})
				return err
			},
			func(v *Vaults, _ Change) error {
				_, _, err := v.CertificateVersions(as("u"), "prod1", "c", Page{})
				return err
			},
			func(v *Vaults, _ Change) error {
				_, _, err := v.DeletedCertificates(as("u"), "prod1", Page{})
				return err
			},
		},
		"certificates/update": {
			func(v *Vaults, c Change) error {
				_, err := v.UpdateCertificate(as("u"), "prod1", "c", "", c, nil)
				return err
			},
			func(v *Vaults, _ Change) error {
				_, err := v.UpdatePolicy(as("u"), "prod1", "c", func(*Policy) {})
				return err
			},
			func(v *Vaults, _ Change) error { _, err := v.CancelPending(as("u"), "prod1", "c"); return err },
			func(v *Vaults, _ Change) error { _, err := v.DeletePending(as("u"), "prod1", "c"); return err },
		},
		"certificates/delete": {func(v *Vaults, _ Change) error { _, err := v.DeleteCertificate(as("u"), "prod1", "c"); return err }},
		"certificates/recover": {func(v *Vaults, _ Change) error {
			_, err := v.RecoverCertificate(as("u"), "prod1", "c")
			return err
		}},
		"certificates/purge": {func(v *Vaults, _ Change) error { return v.PurgeCertificate(as("u"), "prod1", "c") }},
		"certificates/managecontacts": {
			func(v *Vaults, _ Change) error { _, err := v.Contacts(as("u"), "prod1"); return err },
			func(v *Vaults, _ Change) error {
				return v.SetContacts(as("u"), "prod1", []Contact{{Email: "a@example.org"}})
			},
			func(v *Vaults, _ Change) error { _, err := v.DeleteContacts(as("u"), "prod1"); return err },
		},
		"certificates/listissuers": {func(v *Vaults, _ Change) error { _, err := v.Issuers(as("u"), "prod1"); return err }},
		"certificates/getissuers":  {func(v *Vaults, _ Change) error { _, err := v.Issuer(as("u"), "prod1", "Self"); return err }},
	}
	for left := range ops {
		e := newEnv(t)
		p := access.Policy{Tenant: tenant, ObjectID: "u"}
		for action := range ops {
			kind, perm, _ := strings.Cut(action, "/")
			if action != left {
				list := lists(&p)[kind]
				*list = append(*list, perm)
			}
		}
		_, err := e.vaults.ChangePolicies(e.owner, vaultID("prod1"), AddPolicies, []access.Policy{p})
		e.ok(err)
		for action, calls := range ops {
			for i, call := range calls {
				denied := fault.From(call(e.vaults, Change{}))
				isDenied := denied != nil && denied.Inner == "AccessDenied"
				if isDenied != (action == left) {
					t.Errorf("without %s: operation %d of %s: %v", left, i, action, denied)
				}
			}
		}
		if n := e.journal.count(left, "denied"); n != len(ops[left]) {
			t.Errorf("%d refusals of %s are on record, want %d", n, left, len(ops[left]))
		}
	}
}

func TestCheck(t *testing.T) {
	e := newEnv(t)
	_, err := e.vaults.SetSecret(e.owner, "prod1", "s", NewSecret("x"), Change{})
	e.ok(err)
	off, err := e.vaults.SetSecret(e.owner, "prod1", "off", NewSecret("x"), Change{Enabled: ptr(false)})
	e.ok(err)
	identity := access.Principal{Kind: access.ManagedIdentity, Tenant: tenant, ObjectID: "pool", ClientID: "c"}
	check := func(vault, name, version string) string {
		v := e.vaults.Check(t.Context(), identity, vault, name, version)
		if v.Answer == No && (v.Message == "" || (v.Fix == "" && v.Code != "SecretNotFound")) {
			t.Errorf("%s/%s: the answer no has no reason or no fix: %+v", vault, name, v)
		}
		return v.Answer + " " + v.Code
	}
	if got := check("prod1", "s", ""); got != "no Forbidden" {
		t.Errorf("without a policy: %s", got)
	}
	_, err = e.vaults.ChangePolicies(e.owner, vaultID("prod1"), AddPolicies, []access.Policy{{Tenant: tenant, ObjectID: "pool", Secrets: []string{"get"}}})
	e.ok(err)
	for _, c := range []struct{ vault, name, version, want, reason string }{
		{"prod1", "s", "", "yes ", "the newest"},
		{"PROD1", "S", "", "yes ", "names in any casing"},
		{"nowhere", "s", "", "no VaultNotFound", "no such vault"},
		{"prod1", "t", "", "no SecretNotFound", "no such secret"},
		{"prod1", "s", strings.Repeat("a", 32), "no SecretNotFound", "no such version"},
		{"prod1", "off", off.Version, "no SecretDisabled", "a disabled version"},
		{"prod1", "a.b", "", "no BadParameter", "a name that cannot be"},
	} {
		if got := check(c.vault, c.name, c.version); got != c.want {
			t.Errorf("%s: %q, want %q", c.reason, got, c.want)
		}
	}
	e.backend.Close()
	if got := check("prod1", "s", ""); got != "unknown Unavailable" {
		t.Errorf("with the store away: %s", got)
	}
}

var testSuffixes = []string{"vault.keyfleet.internal", "vault.azure.cn"}

func TestParseSecretURL(t *testing.T) {
	const version = "8f5f3f491afd48cb99286ba2aacd39af"
	for _, c := range []struct {
		raw    string
		want   SecretURL
		code   string // of the error; empty: none
		reason string
	}{
		{"https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/" + version, SecretURL{"testkvchinanorth2s", "authcertforumatesting", version}, "", "the documented one"},
		{"https://Prod1.vault.keyfleet.internal:8443/secrets/Web", SecretURL{"prod1", "Web", ""}, "", "with a port, no version"},
		{"https://prod1.vault.keyfleet.internal/secrets/web/", SecretURL{"prod1", "web", ""}, "", "a trailing slash"},
		{"HTTPS://prod1.vault.azure.cn/Secrets/web", SecretURL{"prod1", "web", ""}, "", "other casings"},
		{"https://prod1.vault.azure.net/secrets/web", SecretURL{}, "VaultNotHosted", "a vault elsewhere"},
		{"https://a.prod1.vault.azure.cn/secrets/web", SecretURL{}, "VaultNotHosted", "a host too deep"},
		{"http://prod1.vault.azure.cn/secrets/web", SecretURL{}, "InvalidSecretURL", "no TLS"},
		{"https://prod1.vault.azure.cn/certificates/web", SecretURL{}, "InvalidSecretURL", "the certificate, which has no key"},
		{"https://prod1.vault.azure.cn/secrets", SecretURL{}, "InvalidSecretURL", "no name"},
		{"https://prod1.vault.azure.cn/secrets/web/v1", SecretURL{}, "InvalidSecretURL", "no version has this form"},
		{"https://prod1.vault.azure.cn/secrets/web/" + version + "/x", SecretURL{}, "InvalidSecretURL", "too long a path"},
		{"https://prod1.vault.azure.cn/secrets/we%2Fb", SecretURL{}, "InvalidSecretURL", "a name that cannot be"},
		{"https://u:p@prod1.vault.azure.cn/secrets/web", SecretURL{}, "InvalidSecretURL", "a user"},
		{"https://prod1.vault.azure.cn/secrets/web?x=%s", SecretURL{}, "InvalidSecretURL", "a query"},
		{"", SecretURL{}, "InvalidSecretURL", "nothing"},
		{"prod1/web", SecretURL{}, "InvalidSecretURL", "no URL"},
	} {
		got, err := ParseSecretURL(c.raw, testSuffixes)
		if c.code != "" {
			if f := fault.From(err); err == nil || f.Code != c.code || f.Fix == "" || strings.Contains(f.Message, "%!") {
				t.Errorf("%s: %v, want %s", c.reason, err, c.code)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", c.reason, got, err)
		}
	}
}

func FuzzParseSecretURL(f *testing.F) {
	for _, s := range []string{
		"https://testkvchinanorth2s.vault.azure.cn/secrets/authcertforumatesting/8f5f3f491afd48cb99286ba2aacd39af",
		"https://prod1.vault.keyfleet.internal:8443/secrets/web/", "https://[::1]/secrets/x", "https://a.vault.azure.cn/%73ecrets/x", "%", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		u, err := ParseSecretURL(raw, testSuffixes)
		if err != nil {
			if fault.KindOf(err) == fault.Internal {
				t.Errorf("an error without a reason: %v", err)
			}
			return
		}
		if CheckName(u.Vault) != nil && !strings.Contains(u.Vault, "--") || !itemName.MatchString(u.Name) || (u.Version != "" && len(u.Version) != 32) {
			t.Errorf("ParseSecretURL(%q) = %+v", raw, u)
		}
	})
}

func TestPolicyValidation(t *testing.T) {
	for _, c := range []struct {
		reason string
		edit   func(*Policy)
		target string // empty: valid
	}{
		{"as it is", func(p *Policy) {}, ""},
		{"RSA 4096", func(p *Policy) { p.KeyType, p.KeySize, p.Curve = RSA, 4096, "" }, ""},
		{"RSA 1024", func(p *Policy) { p.KeyType, p.KeySize, p.Curve = RSA, 1024, "" }, "policy.key_props.key_size"},
		{"RSA on a curve", func(p *Policy) { p.KeyType, p.KeySize = RSA, 2048 }, "policy.key_props.crv"},
		{"RSA-HSM", func(p *Policy) { p.KeyType, p.KeySize, p.Curve = RSAHSM, 2048, "" }, "policy.key_props.kty"},
		{"EC-HSM", func(p *Policy) { p.KeyType = ECHSM }, "policy.key_props.kty"},
		{"oct", func(p *Policy) { p.KeyType = "oct" }, "policy.key_props.kty"},
		{"P-256K", func(p *Policy) { p.Curve = "P-256K" }, "policy.key_props.crv"},
		{"a size that is not the curve's", func(p *Policy) { p.KeySize = 384 }, "policy.key_props.key_size"},
		{"an unknown content type", func(p *Policy) { p.ContentType = "text/plain" }, "policy.secret_props.contentType"},
		{"no subject, with names", func(p *Policy) { p.Subject = "" }, ""},
		{"no names at all", func(p *Policy) { p.Subject, p.DNSNames = "", nil }, "policy.x509_props.subject"},
		{"a subject that is no name", func(p *Policy) { p.Subject = "web" }, "policy.x509_props.subject"},
		{"a wildcard", func(p *Policy) { p.DNSNames = []string{"*.example.org"} }, ""},
		{"a wildcard inside", func(p *Policy) { p.DNSNames = []string{"a.example.org", "a.*.org"} }, "policy.x509_props.sans.dns_names[1]"},
		{"a bad address", func(p *Policy) { p.Emails = []string{"Bob <b@example.org>"} }, "policy.x509_props.sans.emails[0]"},
		{"a bad principal name", func(p *Policy) { p.UPNs = []string{"bob"} }, "policy.x509_props.sans.upns[0]"},
		{"a bad usage", func(p *Policy) { p.KeyUsage = []string{"digitalSignature", "all"} }, "policy.x509_props.key_usage[1]"},
		{"a CA's usage, as the default policy of az has it", func(p *Policy) { p.KeyUsage = []string{"keyCertSign"} }, ""},
		{"a bad OID", func(p *Policy) { p.EKUs = []string{"serverAuth"} }, "policy.x509_props.ekus[0]"},
		{"no validity", func(p *Policy) { p.ValidityMonths = 0 }, "policy.x509_props.validity_months"},
		{"36 months, 972 days before", func(p *Policy) { p.ValidityMonths, p.Actions[0].Trigger = 36, pki.Trigger{DaysBeforeExpiry: 972} }, ""},
		{"36 months, 973 days before", func(p *Policy) { p.ValidityMonths, p.Actions[0].Trigger = 36, pki.Trigger{DaysBeforeExpiry: 973} }, "policy.lifetime_actions[0].trigger.days_before_expiry"},
		{"1 %", func(p *Policy) { p.Actions[0].Trigger.LifetimePercentage = 1 }, ""},
		{"100 %", func(p *Policy) { p.Actions[0].Trigger.LifetimePercentage = 100 }, "policy.lifetime_actions[0].trigger.lifetime_percentage"},
		{"two triggers", func(p *Policy) { p.Actions[0].Trigger.DaysBeforeExpiry = 1 }, "policy.lifetime_actions[0].trigger"},
		{"no trigger", func(p *Policy) { p.Actions[0].Trigger = pki.Trigger{} }, "policy.lifetime_actions[0].trigger"},
		{"an unknown action", func(p *Policy) { p.Actions[0].Type = "Renew" }, "policy.lifetime_actions[0].action.action_type"},
		{"an action twice", func(p *Policy) { p.Actions = append(p.Actions, p.Actions[0]) }, "policy.lifetime_actions[1].action.action_type"},
		{"no issuer", func(p *Policy) { p.Issuer = "" }, "policy.issuer.name"},
		{"the issuer Unknown", func(p *Policy) { p.Issuer = "Unknown" }, "policy.issuer.name"},
		{"an issuer that is not there", func(p *Policy) { p.Issuer = "DigiCert" }, "policy.issuer.name"},
	} {
		p := testPolicy()
		c.edit(p)
		err := p.Validate(true)
		if c.target == "" && err != nil || c.target != "" && (fault.From(err) == nil || fault.From(err).Target != c.target) {
			t.Errorf("%s: %v, want %q", c.reason, err, c.target)
		}
	}
	p := testPolicy()
	if f := fault.From(p.Validate(false)); f == nil || f.Target != "policy.issuer.name" || f.Fix != "use Self" {
		t.Errorf("the built-in issuer on a server without it: %v", f)
	}
}

func TestDecide(t *testing.T) {
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	renew := Action{Type: AutoRenew, Trigger: pki.Trigger{DaysBeforeExpiry: 10}}
	mail := Action{Type: EmailContacts, Trigger: pki.Trigger{DaysBeforeExpiry: 20}}
	status := func(life time.Duration) certificateStatus {
		return certificateStatus{Current: "v1", Start: now, NotAfter: now.Add(life)}
	}
	for _, c := range []struct {
		reason    string
		spec      certificate
		status    certificateStatus
		policyNow time.Time
		do        todo
		after     time.Duration
	}{
		{
			"a request comes first",
			certificate{Request: request{ID: "r"}, Policy: Policy{Actions: []Action{renew}}},
			certificateStatus{Current: "v1", Operation: Operation{RequestID: "r", Status: InProgress}},
			now, toIssue, 0,
		},
		{"a finished request is over", certificate{Request: request{ID: "r"}}, certificateStatus{Operation: Operation{RequestID: "r", Status: Failed}}, now, nothing, 0},
		{"not due", certificate{Policy: Policy{Actions: []Action{renew}}}, status(30 * day), now, nothing, 20 * day},
		{"due to the second", certificate{Policy: Policy{Actions: []Action{renew}}}, status(30 * day), now.Add(20 * day), toRenew, 0},
		{"overdue", certificate{Policy: Policy{Actions: []Action{renew}}}, status(30 * day), now.Add(50 * day), toRenew, 0},
		{"the nearer of two actions", certificate{Policy: Policy{Actions: []Action{renew, mail}}}, status(30 * day), now, nothing, 10 * day},
		{"mail is due, renewal is not", certificate{Policy: Policy{Actions: []Action{renew, mail}}}, status(30 * day), now.Add(10 * day), toNote, 10 * day},
		{"no action", certificate{}, status(30 * day), now.Add(50 * day), nothing, 0},
		{"no version", certificate{Policy: Policy{Actions: []Action{renew}}}, certificateStatus{}, now, nothing, 0},
		{"deleted: nothing is renewed, and retention is real time", certificate{Policy: Policy{Actions: []Action{renew}}, Deleted: &Deletion{PurgeAt: now.Add(day)}}, status(30 * day), now.Add(50 * day), nothing, day},
		{"deleted, retention over", certificate{Deleted: &Deletion{PurgeAt: now}}, status(30 * day), now, toPurge, 0},
		{"a purge goes on", certificate{Deleted: &Deletion{PurgeAt: now.Add(day)}, Purging: true}, status(30 * day), now, toPurge, 0},
	} {
		do, after := decide(&c.spec, &c.status, now, c.policyNow)
		if do != c.do || after != c.after {
			t.Errorf("%s: %q after %s, want %q after %s", c.reason, do, after, c.do, c.after)
		}
	}
}
