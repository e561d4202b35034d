package vault

import (
	"regexp"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// ResourceType is the resource type of a vault.
const ResourceType = "Microsoft.KeyVault/vaults"

// Vault is a vault: who may do what in it, and for how long deleted things stay recoverable.
type Vault struct {
	Name                         string            `json:"name"`       // as first written; unique without regard to case
	ResourceID                   string            `json:"resourceId"` // as first written
	Location                     string            `json:"location"`
	Tags                         map[string]string `json:"tags,omitempty"`
	Tenant                       string            `json:"tenant"` // tenant id
	SKU                          string            `json:"sku"`    // "standard" or "premium"; without an HSM both are the same
	Policies                     []access.Policy   `json:"policies,omitempty"`
	EnabledForDeployment         bool              `json:"enabledForDeployment,omitempty"`
	EnabledForDiskEncryption     bool              `json:"enabledForDiskEncryption,omitempty"`
	EnabledForTemplateDeployment bool              `json:"enabledForTemplateDeployment,omitempty"`
	RetentionDays                int               `json:"retentionDays"` // 7 to 90: how long deleted things stay
	PurgeProtection              bool              `json:"purgeProtection,omitempty"`
	Deleted                      *Deletion         `json:"deleted,omitempty"` // nil: in use
}

// Deletion is a soft deletion, in real time.
type Deletion struct {
	At      time.Time `json:"at"`
	PurgeAt time.Time `json:"purgeAt"` // when it goes for good by itself
}

// vaultStatus holds nothing yet: the conditions say it all.
type vaultStatus struct{}

type vaultObject = store.Object[Vault, vaultStatus]

// vaults is the collection of vaults; the id is the name in lower case.
var vaults = store.NewCollection[Vault, vaultStatus]("vaults")

// Retention of deleted things, in days.
const (
	minRetention     = 7
	maxRetention     = 90
	maxVaultTags     = 15
	maxPolicies      = 1024
	maxTagLength     = 256
	defaultRetention = 90
)

var vaultName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9-]{1,22}[a-zA-Z0-9]$`)

// CheckName returns why a vault cannot have the name; nil if it can.
func CheckName(name string) error {
	if vaultName.MatchString(name) && !strings.Contains(name, "--") {
		return nil
	}
	return fault.New(fault.Invalid, "VaultNameNotValid",
		"The vault name '%s' is invalid. A vault's name must be between 3-24 alphanumeric characters. The name must begin with a letter, end with a letter or digit, and not contain consecutive hyphens.", name).At("name")
}

// recovery returns recoveryLevel and recoverableDays of what is in the vault (Key Vault, DeletionRecoveryLevel).
func (v *Vault) recovery() (level string, days int) {
	level = "Recoverable"
	if v.RetentionDays < maxRetention {
		level = "CustomizedRecoverable"
	}
	if !v.PurgeProtection {
		level += "+Purgeable"
	}
	return level, v.RetentionDays
}

// deletion returns the soft deletion of something in the vault that is deleted now.
func (v *Vault) deletion(now time.Time) *Deletion {
	return &Deletion{At: now, PurgeAt: now.AddDate(0, 0, v.RetentionDays)}
}

// scope returns subscription and resource group of the vault.
func (v *Vault) scope() (subscription, group string) {
	id, err := arm.ParseID(v.ResourceID)
	if err != nil {
		return "", ""
	}
	return id.Subscription, id.ResourceGroup
}

// The permissions that an access policy may hold, by kind (Key Vault, Permissions).
var permissions = map[string][]string{
	"secrets": {"all", "get", "list", "set", "delete", "backup", "restore", "recover", "purge"},
	"certificates": {
		"all", "get", "list", "delete", "create", "import", "update", "managecontacts", "getissuers", "listissuers",
		"setissuers", "deleteissuers", "manageissuers", "recover", "purge", "backup", "restore",
	},
	"keys": {
		"all", "encrypt", "decrypt", "wrapkey", "unwrapkey", "sign", "verify", "get", "list", "create", "update", "import",
		"delete", "backup", "restore", "recover", "purge", "release", "rotate", "getrotationpolicy", "setrotationpolicy",
	},
	"storage": {
		"all", "get", "list", "delete", "set", "update", "regeneratekey", "recover", "purge", "backup", "restore",
		"setsas", "listsas", "getsas", "deletesas",
	},
}

// lists returns the permission lists of a policy by kind.
func lists(p *access.Policy) map[string]*[]string {
	return map[string]*[]string{"secrets": &p.Secrets, "certificates": &p.Certificates, "keys": &p.Keys, "storage": &p.Storage}
}

var kinds = []string{"keys", "secrets", "certificates", "storage"}

// normalPolicies checks access policies and brings them into the stored form:
// lower-case permissions without repetition. Two entries for one principal are one error.
func normalPolicies(in []access.Policy) ([]access.Policy, error) {
	if len(in) > maxPolicies {
		return nil, fault.New(fault.Invalid, "BadRequest", "A vault has at most %d access policies; these are %d.", maxPolicies, len(in)).At("properties.accessPolicies")
	}
	out := make([]access.Policy, 0, len(in))
	seen := map[string]bool{}
	for _, p := range in {
		switch {
		case p.ObjectID == "":
			return nil, fault.New(fault.Invalid, "BadRequest", "An access policy names no principal.").At("properties.accessPolicies.objectId")
		case p.Tenant == "":
			return nil, fault.New(fault.Invalid, "BadRequest", "The access policy of '%s' names no tenant.", p.ObjectID).At("properties.accessPolicies.tenantId")
		}
		if who := principal(p); seen[who] {
			return nil, fault.New(fault.Invalid, "BadRequest", "The principal '%s' stands twice in the access policies.", p.ObjectID).
				At("properties.accessPolicies").WithFix("merge the two entries")
		} else {
			seen[who] = true
		}
		for _, kind := range kinds {
			list := lists(&p)[kind]
			var clean []string
			for _, s := range *list {
				s = strings.ToLower(s)
				if !slices.Contains(permissions[kind], s) {
					return nil, fault.New(fault.Invalid, "BadRequest", "There is no permission '%s' on %s. There are: %s.", s, kind, strings.Join(permissions[kind], ", ")).
						At("properties.accessPolicies.permissions." + kind)
				}
				if !slices.Contains(clean, s) {
					clean = append(clean, s)
				}
			}
			*list = clean
		}
		out = append(out, p)
	}
	return out, nil
}

// principal is what an access policy is for.
func principal(p access.Policy) string {
	return strings.ToLower(p.Tenant + "/" + p.ObjectID + "/" + p.ClientID)
}

// added returns the permissions that new gives and old does not, as actions
// ("secrets/get"), in a stable order.
func added(old, new []access.Policy) []string {
	had := map[string]bool{}
	for _, p := range old {
		for _, kind := range kinds {
			for _, perm := range *lists(&p)[kind] {
				had[principal(p)+" "+kind+"/"+perm] = true
			}
		}
	}
	var out []string
	for _, p := range new {
		for _, kind := range kinds {
			for _, perm := range *lists(&p)[kind] {
				who := principal(p) + " " + kind + "/"
				if had[who+perm] || had[who+"all"] || slices.Contains(out, kind+"/"+perm) {
					continue
				}
				out = append(out, kind+"/"+perm)
			}
		}
	}
	return out
}

// held reports whether the caller holds the permission by the policies. Where
// "all" is given away, only "all" counts.
func held(p access.Principal, policies []access.Policy, permission string) bool {
	kind, perm, _ := strings.Cut(permission, "/")
	for _, pol := range policies {
		if !strings.EqualFold(pol.ObjectID, p.ObjectID) || !strings.EqualFold(pol.Tenant, p.Tenant) ||
			(pol.ClientID != "" && !strings.EqualFold(pol.ClientID, p.ClientID)) {
			continue
		}
		list := *lists(&pol)[kind]
		if slices.Contains(list, perm) || slices.Contains(list, "all") {
			return true
		}
	}
	return false
}

// PolicyChange is how access policies are to be combined with those that are there.
type PolicyChange string

// The changes of access policies (Key Vault, AccessPolicyUpdateKind).
const (
	AddPolicies     PolicyChange = "add"
	ReplacePolicies PolicyChange = "replace"
	RemovePolicies  PolicyChange = "remove"
)

// combine applies a change: add gives permissions on top, replace sets those of
// the principals named, remove takes the named permissions away.
func combine(old, change []access.Policy, kind PolicyChange) []access.Policy {
	out := slices.Clone(old)
	for _, c := range change {
		i := slices.IndexFunc(out, func(p access.Policy) bool { return principal(p) == principal(c) })
		switch {
		case i < 0 && kind == RemovePolicies:
		case i < 0:
			out = append(out, c)
		case kind == ReplacePolicies:
			out[i] = c
		default:
			out[i] = mergePermissions(out[i], c, kind == RemovePolicies)
		}
	}
	return slices.DeleteFunc(out, func(p access.Policy) bool {
		return len(p.Secrets)+len(p.Certificates)+len(p.Keys)+len(p.Storage) == 0
	})
}

func mergePermissions(p, c access.Policy, remove bool) access.Policy {
	for _, kind := range kinds {
		mine, theirs := lists(&p)[kind], *lists(&c)[kind]
		merged := slices.Clone(*mine)
		for _, perm := range theirs {
			if remove {
				merged = slices.DeleteFunc(merged, func(m string) bool { return m == perm || perm == "all" })
			} else if !slices.Contains(merged, perm) {
				merged = append(merged, perm)
			}
		}
		*mine = merged
	}
	return p
}

func lower(s string) string { return strings.ToLower(s) }
