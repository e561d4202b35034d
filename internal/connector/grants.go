package connector

import (
	"context"
	"slices"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Kinds of grants.
const (
	federatedCredential = "federated credential"
	accessPolicy        = "access policy"
)

// grant gives the connection what it needs in Keyfleet itself: the identity trusts
// the ServiceAccount, and may read the vault. Each is noted before it is given, so
// that a crash leaves none that nobody takes back.
func (c controller) grant(ctx context.Context, o *Object, cluster arm.ID, state ClusterState) error {
	if !o.Spec.Auth.actsAs() {
		return nil
	}
	if err := o.Spec.trusted(state); err != nil {
		return err
	}
	want, err := c.grants(ctx, o, cluster)
	if err != nil {
		return err
	}
	if !slices.Equal(want, o.Status.Grants) {
		o.Status.Grants = want
		return errRecord
	}
	for _, g := range want {
		switch g.Kind {
		case federatedCredential:
			err = c.cfg.Identities.Trust(ctx, g.On, g.Name, cluster.String(), g.To)
		case accessPolicy:
			err = c.cfg.Vaults.Grant(ctx, g.On, g.To)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// trusted fails where an identity would have to trust a cluster whose issuer was not seen.
func (c Connection) trusted(state ClusterState) error {
	if !c.Auth.actsAs() || state.Issuer != "" {
		return nil
	}
	return fault.New(fault.Unavailable, "OIDCIssuerNotSeen", "The issuer of the cluster's tokens was not seen: the API server publishes none, or the kubeconfig may not read it.").
		At(state.ID).WithFix("start kube-apiserver with --service-account-issuer=https://..., and grant what deploy/manager-role.yaml grants")
}

// grants are what the connection gives, or shares with another one that gave it. A
// permission that was there before all connections is none of them.
func (c controller) grants(ctx context.Context, o *Object, cluster arm.ID) ([]Grant, error) {
	subject := "system:serviceaccount:" + o.Spec.Namespace + ":" + AccountName(o.Spec.Auth.ClientID)
	out := []Grant{{Kind: federatedCredential, On: o.Spec.Auth.Identity, To: subject, Name: "sc-" + shortHash(cluster.Key()+" "+subject)}}
	if _, ok := c.cfg.Vaults.Endpoint(ctx, o.Spec.Target.ID); !ok {
		return out, nil
	}
	policy := Grant{Kind: accessPolicy, On: o.Spec.Target.ID, To: o.Spec.Auth.ObjectID}
	ours := slices.Contains(o.Status.Grants, policy)
	if !ours {
		shared, err := sharedGrant(c.cfg.Store.View(ctx), o.ID, policy)
		if err != nil {
			return nil, err
		}
		there, err := c.cfg.Vaults.Granted(ctx, policy.On, policy.To)
		if err != nil {
			return nil, err
		}
		ours = shared || !there
	}
	if ours {
		out = append(out, policy)
	}
	return out, nil
}

// sharedGrant reports whether a connection other than id has the grant too.
func sharedGrant(tx *store.Tx, id string, g Grant) (bool, error) {
	all, err := Connections.List(tx, "")
	if err != nil {
		return false, err
	}
	for _, o := range all {
		if o.ID != id && slices.Contains(o.Status.Grants, g) {
			return true, nil
		}
	}
	return false, nil
}

// revoke takes grants back that no other connection shares, and says which.
func (c controller) revoke(ctx context.Context, o *Object) (removed []string, err error) {
	for _, g := range o.Status.Grants {
		shared, err := sharedGrant(c.cfg.Store.View(ctx), o.ID, g)
		if err != nil {
			return removed, err
		}
		if shared {
			continue
		}
		switch g.Kind {
		case federatedCredential:
			err = c.cfg.Identities.Distrust(ctx, g.On, g.Name)
		case accessPolicy:
			err = c.cfg.Vaults.Revoke(ctx, g.On, g.To)
		}
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return removed, err
		}
		removed = append(removed, g.Kind+" of "+g.To+" on "+g.On)
	}
	return removed, nil
}
