package arm

import (
	"slices"
	"strings"
	"testing"
)

func TestParseID(t *testing.T) {
	cases := []struct {
		reason, in string
		want       string // printed form; empty: refused
	}{
		{"a pool", "/subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts/a/pools/p", "/subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts/a/pools/p"},
		{"fixed words in another casing", "/SUBSCRIPTIONS/S/resourcegroups/Gg/PROVIDERS/microsoft.batch/batchaccounts/A", "/subscriptions/S/resourceGroups/Gg/providers/microsoft.batch/batchaccounts/A"},
		{"a trailing slash", "/subscriptions/S/", "/subscriptions/S"},
		{"a group", "/subscriptions/S/resourceGroups/G", "/subscriptions/S/resourceGroups/G"},
		{"a resource of the subscription", "/subscriptions/S/providers/Microsoft.KeyVault/deletedVaults/v", "/subscriptions/S/providers/Microsoft.KeyVault/deletedVaults/v"},
		{"the documented identity", "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools", "/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools"},
		{"a client id", "885b1a3d-f13c-4030-afcf-922f05044d78", ""},
		{"an empty part", "/subscriptions//resourceGroups/G", ""},
		{"a type without a name", "/subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts", ""},
		{"a name without a type below", "/subscriptions/S/resourceGroups/G/providers/Microsoft.Batch/batchAccounts/a/pools", ""},
		{"a group without a name", "/subscriptions/S/resourceGroups", ""},
		{"no subscription", "/resourceGroups/G", ""},
		{"nothing", "", ""},
		{"a slash", "/", ""},
		{"too long", "/subscriptions/" + strings.Repeat("s", 2048), ""},
	}
	for _, c := range cases {
		id, err := ParseID(c.in)
		if (err == nil) != (c.want != "") || err == nil && id.String() != c.want {
			t.Errorf("%s: %q, %v", c.reason, id.String(), err)
		}
	}
}

func TestIsGUID(t *testing.T) {
	for s, want := range map[string]bool{
		"042998e4-36dc-4b7d-8ce3-a7a2c4877d33": true, "042998E4-36DC-4B7D-8CE3-A7A2C4877D33": true,
		"885b1a3d-f13c-4030-afcf-922f05044d78dc": false, "{042998e4-36dc-4b7d-8ce3-a7a2c4877d33}": false,
		"042998e4-36dc-4b7d-8ce3-a7a2c4877d3g": false, "042998e4+36dc-4b7d-8ce3-a7a2c4877d33": false, "": false,
	} {
		if IsGUID(s) != want {
			t.Errorf("%q: %t", s, !want)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("/subscriptions/042998e4-36dc-4b7d-8ce3-a7a2c4877d33/resourceGroups/ACR/providers/Microsoft.ManagedIdentity/userAssignedIdentities/testumaforpools")
	f.Add("/subscriptions/S/resourcegroups/G/providers/Microsoft.Batch/batchAccounts/a/pools/p/")
	f.Add("/subscriptions/S/providers/Microsoft.KeyVault/deletedVaults/v")
	f.Add("/subscriptions/S/resourceGroups/G/providers/x/y/..")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			return
		}
		again, err := ParseID(id.String())
		if err != nil || again.String() != id.String() || !slices.Equal(again.Names, id.Names) {
			t.Errorf("%q prints as %q, which parses to %q, %v", s, id, again, err)
		}
		if len(id.Types) != len(id.Names) || id.Subscription == "" || id.Name() == "" {
			t.Errorf("%q parses to %+v", s, id)
		}
		if id.Key() != strings.ToLower(id.String()) || strings.Contains(id.StoreKey(), "//") && id.ResourceGroup != "" {
			t.Errorf("%q: key %q, store key %q", s, id.Key(), id.StoreKey())
		}
	})
}
