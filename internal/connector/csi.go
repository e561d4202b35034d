package connector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// A key vault through the Secrets Store CSI driver: the cluster gets a
// SecretProviderClass, and with the first pod that mounts it the driver makes the
// Secret, which is the driver's. A connection that names no objects of the vault
// gets the variables from which somebody writes a SecretProviderClass by hand.

// What an object of a vault can be named, and how many one class may have.
var vaultObject = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)

const maxVaultObjects = 100

// checkObjects looks at the objects of the vault that the driver shall bring.
func (c Connection) checkObjects() error {
	const at = "properties.targetService.resourceProperties.objects"
	all := c.Target.Objects
	switch {
	case len(all) == 0:
		return nil
	case c.Auth.Type != CSIAddOn:
		return fault.New(fault.Invalid, "InvalidArgument", "Objects of a vault are named only for the CSI driver.").At(at).WithFix("add --enable-csi, or leave them out")
	case len(all) > maxVaultObjects:
		return fault.New(fault.Invalid, "InvalidArgument", "The connection names %d objects of the vault, of at most %d.", len(all), maxVaultObjects).At(at).WithFix("make several connections")
	case len(c.Keys) > 0:
		return fault.New(fault.Invalid, "InvalidCustomizedKey", "A connection that names objects of the vault has no variables that could be renamed.").
			At("properties.configurationInfo.customizedKeys").WithFix("the keys are those before the objects: --enable-csi KEY=OBJECT")
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !secretKey.MatchString(name) {
			return fault.New(fault.Invalid, "InvalidArgument", "'%.100s' cannot be a key of a Secret: letters, digits, '-', '_' and '.', at most 253.", name).At(at)
		}
		if !vaultObject.MatchString(all[name]) {
			return fault.New(fault.Invalid, "InvalidArgument", "'%.150s' cannot be the name of a secret or certificate of a vault: letters, digits and '-', at most 127.", all[name]).At(at + "." + name)
		}
	}
	return nil
}

// actsAs reports whether the workload acts as a managed identity, by a token of its
// ServiceAccount. Through the driver it does if one was named; else the driver acts
// as the identity of the node.
func (a Authentication) actsAs() bool {
	return a.Type == WorkloadIdentity || a.Type == CSIAddOn && (a.Identity != "" || a.ClientID != "")
}

// mounted reports whether the connection is delivered by the driver.
func (c Connection) mounted() bool { return c.Auth.Type == CSIAddOn && len(c.Target.Objects) > 0 }

// mountedKeys are the keys of the Secret that the driver makes.
func (c Connection) mountedKeys() []Variable {
	var all []Variable
	for _, name := range slices.Sorted(maps.Keys(c.Target.Objects)) {
		all = append(all, Variable{Name: name, Default: name, Secret: true})
	}
	return all
}

// providerClass is the spec of a SecretProviderClass of the provider for Azure.
type providerClass struct {
	Provider   string            `json:"provider"`
	Parameters map[string]string `json:"parameters"`
	Secrets    []syncedSecret    `json:"secretObjects"`
}

type syncedSecret struct {
	Name string      `json:"secretName"`
	Type string      `json:"type"`
	Data []syncedKey `json:"data"`
}

type syncedKey struct {
	Object string `json:"objectName"`
	Key    string `json:"key"`
}

// class is the SecretProviderClass of a connection to a vault. The vaults of this
// server are in none of Azure's clouds: the provider reads where they are from the
// file that AZURE_ENVIRONMENT_FILEPATH names in its pods.
func (c Connection) class(vault string, ours bool) (*wire.ProviderObject, error) {
	parameters := map[string]string{
		"usePodIdentity": "false", "keyvaultName": vault, "tenantID": c.Auth.TenantID, "objects": vaultObjects(c.Target.Objects),
	}
	if c.Auth.actsAs() {
		parameters["clientID"] = c.Auth.ClientID
	} else {
		parameters["useVMManagedIdentity"] = "true"
	}
	if ours {
		parameters["cloudName"] = "AzureStackCloud" // the provider's word for a cloud of that file
	}
	synced := syncedSecret{Name: SecretName(c.Name()), Type: "Opaque"}
	for _, key := range slices.Sorted(maps.Keys(c.Target.Objects)) {
		synced.Data = append(synced.Data, syncedKey{Object: c.Target.Objects[key], Key: key})
	}
	text, err := json.Marshal(providerClass{Provider: "azure", Parameters: parameters, Secrets: []syncedSecret{synced}})
	if err != nil {
		return nil, fmt.Errorf("encoding the SecretProviderClass: %w", err)
	}
	return &wire.ProviderObject{Name: ProviderClassName(c.Name()), Spec: text}, nil
}

// vaultObjects is the list of objects as the provider reads it: YAML in YAML. All are
// secrets, for the secret of a certificate is its key and its chain.
func vaultObjects(objects map[string]string) string {
	var b strings.Builder
	b.WriteString("array:\n")
	for _, name := range slices.Compact(slices.Sorted(maps.Values(objects))) {
		fmt.Fprintf(&b, "  - |\n    objectName: %q\n    objectType: secret\n", name)
	}
	return b.String()
}

// vault is the name of the vault that a connection is to.
func (c Connection) vault() string {
	if name := c.Target.Values["vault"]; name != "" {
		return name
	}
	id, err := arm.ParseID(c.Target.ID)
	if err != nil {
		return ""
	}
	return id.Name()
}

// addons are what managers reported of the add-on, by cluster ("SUBSCRIPTION/GROUP/CLUSTER").
// One is kept for as long as the cluster has connections that need the add-on.
var addons = store.NewCollection[wire.ExtensionReport, struct{}]("connection-addons")

func addonKey(cluster arm.ID) string { return strings.ToLower(cluster.StoreKey()) }

// needingAddon are the connections of a cluster that need the add-on.
func needingAddon(tx *store.Tx, addonKey string) ([]*Object, error) {
	all, err := Connections.List(tx, addonKey+"/")
	return slices.DeleteFunc(all, func(o *Object) bool { return o.Spec.Auth.Type != CSIAddOn }), err
}

// addonWork asks a manager to look for the add-on, and to install it if it can.
func addonWork() wire.ExtensionWork {
	return wire.ExtensionWork{Name: wire.AddonRelease, Revision: "1"}
}

// reportAddon takes what a manager saw of the add-on.
func (s *Service) reportAddon(ctx context.Context, cluster arm.ID, r wire.ExtensionReport) error {
	return s.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		need, err := needingAddon(tx, addonKey(cluster))
		if err != nil {
			return err
		}
		if len(need) == 0 {
			return extensionNotFound(cluster, wire.AddonRelease)
		}
		o, err := addons.Lookup(tx, addonKey(cluster))
		switch {
		case err != nil:
			return err
		case o == nil:
			return addons.Insert(tx, &store.Object[wire.ExtensionReport, struct{}]{Meta: store.Meta{ID: addonKey(cluster)}, Spec: r})
		case reflect.DeepEqual(o.Spec, r):
			return nil
		}
		o.Spec = r
		return addons.Put(tx, o)
	})
}

// addonReported looks at the connections that need the add-on when a manager has
// reported something of it.
func addonReported(ctx context.Context, s *store.Store, enqueue func(id string)) error {
	return addons.Follow(ctx, s, "", func(c store.Change[wire.ExtensionReport, struct{}]) error {
		if c.ID == "" {
			return nil
		}
		need, err := needingAddon(s.View(ctx), c.ID)
		for _, o := range need {
			enqueue(o.ID)
		}
		return err
	})
}

// addon fails unless the driver was seen in the cluster of a connection that needs
// it. Until a manager has looked for it, that is waited for.
func (s *Service) addon(ctx context.Context, o *Object, cluster arm.ID, state ClusterState) error {
	if o.Spec.Auth.Type != CSIAddOn || state.Addon {
		return nil
	}
	seen, err := addons.Lookup(s.cfg.Store.View(ctx), addonKey(cluster))
	switch {
	case err != nil:
		return err
	case seen != nil && seen.Spec.Problem != nil:
		return &problemError{*seen.Spec.Problem}
	case state.State != "Succeeded":
		return notReady(o, state)
	case seen == nil:
		return waiting{"a manager to look for the add-on " + wire.KeyVaultAddon + ", and to install it if it can", 5 * time.Second}
	}
	return waiting{"the cluster to be looked at again: the add-on " + wire.KeyVaultAddon + " is there", 5 * time.Second}
}

// addonFinding is addon for somebody who does not wait.
func (s *Service) addonFinding(ctx context.Context, o *Object, cluster arm.ID, state ClusterState) error {
	err := s.addon(ctx, o, cluster, state)
	var w waiting
	if errors.As(err, &w) {
		return fault.New(fault.Unavailable, "AddonNotInstalled", "The add-on %s was not seen in the cluster: waiting for %s.", wire.KeyVaultAddon, w.what).At(state.ID).WithFix("look again in a minute")
	}
	return err
}

// leaveAddon keeps the add-on, for others may use it, and says so where Keyfleet
// has installed it.
func (c controller) leaveAddon(ctx context.Context, o *Object, note func(removed, kept []string) error) error {
	if o.Spec.Auth.Type != CSIAddOn {
		return nil
	}
	cluster, _, err := parseLinker(o.Spec.ID)
	if err != nil {
		return err
	}
	seen, err := addons.Lookup(c.cfg.Store.View(ctx), addonKey(cluster))
	if err != nil || seen == nil {
		return err
	}
	if seen.Spec.Release != nil {
		kept := fmt.Sprintf("add-on %s, release %s/%s (others may use it)", wire.KeyVaultAddon, wire.AddonNamespace, wire.AddonRelease)
		if err := note(nil, []string{kept}); err != nil {
			return err
		}
	}
	return c.cfg.Store.Update(ctx, func(tx *store.Tx) error {
		need, err := needingAddon(tx, addonKey(cluster))
		if err != nil || slices.ContainsFunc(need, func(other *Object) bool { return other.ID != o.ID }) {
			return err
		}
		return addons.Delete(tx, addonKey(cluster))
	})
}
