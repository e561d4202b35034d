package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/api/keyvault"
	"keyfleet.dev/keyfleet/api/msi"
)

// PutIdentity creates a managed identity by its resource id. clientID, where
// not empty, is the client id it shall have (administrators only).
func (c *Client) PutIdentity(ctx context.Context, resourceID, location, clientID string) (msi.Identity, error) {
	return call[msi.Identity](ctx, c, http.MethodPut, c.ARM(resourceID), VersionIdentities,
		msi.Identity{Location: location, Properties: msi.IdentityProperties{ClientID: clientID}})
}

// PutVault creates or changes a vault by its resource id.
func (c *Client) PutVault(ctx context.Context, resourceID string, body keyvault.PutVault) (keyvault.Vault, error) {
	return call[keyvault.Vault](ctx, c, http.MethodPut, c.ARM(resourceID), VersionVaults, body)
}

// AddAccessPolicy adds permissions to those that the principal has in a vault.
func (c *Client) AddAccessPolicy(ctx context.Context, vaultID string, entry keyvault.AccessPolicyEntry) (keyvault.AccessPolicies, error) {
	return call[keyvault.AccessPolicies](ctx, c, http.MethodPut, c.ARM(vaultID+"/accessPolicies/add"), VersionVaults,
		keyvault.AccessPolicies{Properties: keyvault.AccessPoliciesProperties{AccessPolicies: []keyvault.AccessPolicyEntry{entry}}})
}

// SetSecret writes a new version of a secret.
func (c *Client) SetSecret(ctx context.Context, vault, name string, body keyvault.SetSecret) (keyvault.Secret, error) {
	return call[keyvault.Secret](ctx, c, http.MethodPut, c.Vault(vault, "/secrets/"+url.PathEscape(name)), VersionVaultData, body)
}

// Secret reads a secret; version empty: the newest.
func (c *Client) Secret(ctx context.Context, vault, name, version string) (keyvault.Secret, error) {
	return call[keyvault.Secret](ctx, c, http.MethodGet, c.Vault(vault, "/secrets/"+url.PathEscape(name)+"/"+url.PathEscape(version)), VersionVaultData, nil)
}

// CreateCertificate starts the making of a certificate; see [Client.AwaitCertificate].
func (c *Client) CreateCertificate(ctx context.Context, vault, name string, body keyvault.CreateCertificate) (keyvault.CertificateOperation, error) {
	return call[keyvault.CertificateOperation](ctx, c, http.MethodPost, c.Vault(vault, "/certificates/"+url.PathEscape(name)+"/create"), VersionVaultData, body)
}

// pollCertificate is the pause between looks at a pending certificate.
const pollCertificate = 100 * time.Millisecond

// AwaitCertificate waits until a certificate's operation is over, and returns
// the certificate. An operation that failed is an *[Error] with its code.
func (c *Client) AwaitCertificate(ctx context.Context, vault, name string) (keyvault.Certificate, error) {
	pending := c.Vault(vault, "/certificates/"+url.PathEscape(name)+"/pending")
	err := c.Poll(ctx, pollCertificate, func(ctx context.Context) (bool, error) {
		op, err := call[keyvault.CertificateOperation](ctx, c, http.MethodGet, pending, VersionVaultData, nil)
		switch {
		case err != nil || op.Status == "inProgress":
			return false, err
		case op.Status == "completed":
			return true, nil
		}
		e := &Error{Status: http.StatusConflict, Code: "CertificateFailed", Message: "The certificate's operation ended as " + op.Status + "."}
		if op.Error != nil {
			e.Code, e.Message = op.Error.Code, op.Error.Message
		}
		return false, e
	})
	if err != nil {
		return keyvault.Certificate{}, err
	}
	return c.Certificate(ctx, vault, name, "")
}

// Certificate reads a certificate; version empty: the newest.
func (c *Client) Certificate(ctx context.Context, vault, name, version string) (keyvault.Certificate, error) {
	return call[keyvault.Certificate](ctx, c, http.MethodGet, c.Vault(vault, "/certificates/"+url.PathEscape(name)+"/"+url.PathEscape(version)), VersionVaultData, nil)
}

// Renewal says how a certificate's renewal stands.
func (c *Client) Renewal(ctx context.Context, vault, name string) (keyvault.Renewal, error) {
	return call[keyvault.Renewal](ctx, c, http.MethodGet, c.ARM("/keyfleet/v1/vaults/"+url.PathEscape(vault)+"/certificates/"+url.PathEscape(name)), "", nil)
}

// Deliveries says which version of a certificate each node has.
func (c *Client) Deliveries(ctx context.Context, vault, name string) (keyfleet.Deliveries, error) {
	return call[keyfleet.Deliveries](ctx, c, http.MethodGet, c.ARM("/keyfleet/v1/vaults/"+url.PathEscape(vault)+"/certificates/"+url.PathEscape(name)+"/deliveries"), "", nil)
}

// AdvanceClock moves policy time ahead, on a server that was started with --dev.
func (c *Client) AdvanceClock(ctx context.Context, d time.Duration) (keyvault.Clock, error) {
	return call[keyvault.Clock](ctx, c, http.MethodPost, c.ARM("/keyfleet/v1/dev/clock"), "", keyvault.AdvanceClock{Advance: d.String()})
}
