package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
)

// firstStart makes the first administrator, once in the life of a store, and
// keeps admin.json's endpoints true when the listen address changes.
func (s *Server) firstStart(ctx context.Context) error {
	path := filepath.Join(s.cfg.DataDir, "admin.json")
	who, err := s.identity.Bootstrap(ctx, identity.Bootstrap{
		Keep: func(a identity.Admin) (identity.Admin, error) { return s.keepAdmin(path, a) },
		Subscribe: func(tx *store.Tx, tenant, sub string) error {
			_, _, err := subscription.Insert(tx, subscription.Subscription{ID: sub, Tenant: tenant, DisplayName: "Keyfleet"})
			return err
		},
	})
	if err != nil {
		return fmt.Errorf("making the first administrator: %w", err)
	}
	kept, err := readAdmin(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // its owner took the file away
	}
	if err != nil {
		return err
	}
	if kept.ClientID != who.ClientID { // another server of this store was first; this file never worked
		return os.Remove(path)
	}
	kept.Endpoints = s.adminEndpoints()
	return writeAdmin(path, kept)
}

// keepAdmin writes admin.json, or returns what an earlier start wrote there.
func (s *Server) keepAdmin(path string, a identity.Admin) (identity.Admin, error) {
	if kept, err := readAdmin(path); err == nil {
		secret, err := identity.ParseSecret(kept.ClientSecret.Reveal())
		if err != nil {
			return a, fmt.Errorf("reading %s: %w", path, err)
		}
		a.TenantID, a.ClientID, a.SubscriptionID, a.Secret = kept.Tenant, kept.ClientID, kept.Subscription, secret
		return a, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return a, err
	}
	return a, writeAdmin(path, keyfleet.Admin{
		Endpoints: s.adminEndpoints(), Tenant: a.TenantID, Subscription: a.SubscriptionID,
		ClientID: a.ClientID, ClientSecret: keyfleet.Secret(a.Secret.Reveal()), CAFile: "ca.crt",
	})
}

func (s *Server) adminEndpoints() keyfleet.Endpoints {
	return keyfleet.Endpoints{
		ResourceManager: s.endpoints.ARM(), Login: s.endpoints.Login(), Node: s.endpoints.Node(),
		VaultSuffix: s.endpoints.VaultSuffix(), BatchSuffix: s.endpoints.BatchSuffix(), Listen: dialable(s.cfg.Listen),
	}
}

// dialable turns a listen address into one that a client on this machine can dial.
func dialable(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

func readAdmin(path string) (keyfleet.Admin, error) {
	var a keyfleet.Admin
	b, err := os.ReadFile(path)
	if err != nil {
		return a, fmt.Errorf("reading admin.json: %w", err)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("reading %s: %w", path, err)
	}
	return a, nil
}

func writeAdmin(path string, a keyfleet.Admin) error {
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding admin.json: %w", err)
	}
	return writeFile(path, append(b, '\n'))
}
