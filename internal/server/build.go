package server

import (
	"context"
	"path/filepath"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/audit"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/azureapi/batch"
	"keyfleet.dev/keyfleet/internal/azureapi/clusters"
	"keyfleet.dev/keyfleet/internal/azureapi/keyvault"
	"keyfleet.dev/keyfleet/internal/azureapi/login"
	"keyfleet.dev/keyfleet/internal/azureapi/nodes"
	"keyfleet.dev/keyfleet/internal/azureapi/resources"
	"keyfleet.dev/keyfleet/internal/azureapi/servicelinker"
	"keyfleet.dev/keyfleet/internal/cluster"
	"keyfleet.dev/keyfleet/internal/identity"
	"keyfleet.dev/keyfleet/internal/issuer"
	"keyfleet.dev/keyfleet/internal/nodeapi"
	"keyfleet.dev/keyfleet/internal/packages"
	"keyfleet.dev/keyfleet/internal/pool"
	"keyfleet.dev/keyfleet/internal/provider/host"
	"keyfleet.dev/keyfleet/internal/provider/local"
	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/subscription"
	"keyfleet.dev/keyfleet/internal/vault"
)

// build makes the capabilities and the edges, and connects them.
func (s *Server) build(ctx context.Context) error {
	gate := access.NewGate(access.Config{Store: s.store, Recorder: s.audit, Principal: identity.RequirePrincipal})
	s.gate, s.metrics = gate, newMetrics(s)
	rotate := newRotateCerts(s.cfg.KeyfleetPath, s.cfg.DataDir)
	s.clusters = cluster.New(cluster.Config{
		Store: s.store, Gate: gate, CanRotate: rotate.ready, Place: func(tx *store.Tx, sub, group string) error {
			return subscription.Require(tx, sub, group, "Microsoft.ContainerService")
		},
	})
	if err := s.buildIdentity(ctx, gate); err != nil {
		return err
	}
	if err := s.buildVaults(ctx, gate); err != nil {
		return err
	}
	packs := packages.Open(s.cfg.PackageDir)
	if err := s.buildPools(gate, packs); err != nil {
		return err
	}
	if err := s.buildConnections(gate); err != nil {
		return err
	}
	s.subscriptions = subscription.New(subscription.Config{
		Store: s.store, Gate: gate, Tenant: s.identity.TenantID(),
		Contents: []subscription.Contents{
			connectionContents{s.connections}, accountContents{s.fleet}, serverContents{s.connections}, clusterContents{s.clusters}, vaultContents{s.vaults}, identityContents{s.identity},
		},
	})
	s.runnables = append(s.runnables,
		&audit.Exporter{Log: s.audit},
		identity.KeyRotation{Service: s.identity, Log: s.log},
		s.subscriptions.Controller(),
		s.fleet.PoolController(), s.fleet.NodeController(), s.connections.Controller(s.metrics.controllers),
	)
	s.runnables = append(s.runnables, cluster.Rotations{Service: s.clusters, Program: rotate, Log: s.log})
	s.runnables = append(s.runnables, s.vaults.Controllers(s.metrics.controllers)...)
	if !s.cfg.NoManager {
		s.runnables = append(s.runnables, clusterManager{program: s.cfg.ConnectorPath, image: s.cfg.Image, addonChart: s.cfg.AddonChart, login: s.managerLogin, log: s.log})
	}
	return s.buildEdges(gate, packs)
}

func (s *Server) buildIdentity(ctx context.Context, gate *access.Gate) (err error) {
	audiences := map[string]string{}
	for _, surface := range []azureapi.Surface{azureapi.ARM, azureapi.Vault, azureapi.Batch} {
		for _, a := range s.endpoints.Audiences(surface) {
			audiences[a] = "https://" + string(surface) + "." + s.cfg.Domain
		}
	}
	s.identity, err = identity.New(ctx, identity.Config{
		Store: s.store, Gate: gate, Login: s.endpoints.Login(), Audiences: audiences,
		Place: func(tx *store.Tx, sub, group string) error {
			return subscription.Require(tx, sub, group, "Microsoft.ManagedIdentity")
		},
		Issuers: issuer.New(issuer.Config{Published: s.clusters.KeySet}), ClusterIssuer: s.clusters.Issuer,
	})
	return err
}

func (s *Server) buildVaults(ctx context.Context, gate *access.Gate) error {
	authority, err := loadAuthority(ctx, s.store, "issuer", "Keyfleet Issuing CA")
	if err != nil {
		return err
	}
	s.clock = vault.NewClock(vault.ClockConfig{Store: s.store, Gate: gate, Dev: s.cfg.Dev})
	s.vaults = vault.New(vault.Config{
		Store: s.store, Gate: gate, Clock: s.clock, Issuer: vault.FromCA(authority), Log: s.log, Tenant: s.identity.TenantID(),
		Require: func(tx *store.Tx, sub, group string) error {
			return subscription.Require(tx, sub, group, "Microsoft.KeyVault")
		},
	})
	return nil
}

func (s *Server) buildPools(gate *access.Gate, packs *packages.Store) (err error) {
	s.local, err = local.New(local.Config{
		Dir: s.cfg.DataDir, Agent: s.cfg.AgentPath, Server: s.endpoints.Node(), CA: s.ca.PEM(), Log: s.log,
		AgentEnv: nodeEnvironment(), InitEnv: nodeEnvironment(),
	})
	if err != nil {
		return err
	}
	hosts := &host.Provider{}
	s.fleet = pool.New(pool.Config{
		Store: s.store, Gate: gate, Identities: identities{s.identity}, Packages: packs,
		Groups:  groups{s.store, "Microsoft.Batch"},
		Secrets: secretAccess{s.vaults, s.endpoints}, Changes: secretChanges{s.vaults.Feed(), s.endpoints},
		Names: names{s.endpoints}, Providers: []pool.Provider{s.local, hosts}, Log: s.log,
	})
	hosts.Records = s.fleet
	return nil
}

func (s *Server) buildEdges(gate *access.Gate, packs *packages.Store) (err error) {
	s.logs = nodeapi.LogDir(filepath.Join(s.cfg.DataDir, "node-logs"))
	sessions := nodeapi.NewSwitchboard(nodeapi.SwitchboardConfig{
		Announce: func(agent, session, kind string) bool { return s.edge.Announce(agent, session, kind) }, Log: s.log,
	})
	s.edge = nodeapi.New(nodeapi.Config{
		Nodes: s.fleet, Authority: s.ca, Tokens: nodeTokens{s.fleet, s.identity}, Packages: packs, Logs: s.logs, Sessions: sessions, Log: s.log,
	})
	var routes []azureapi.Route
	routes = append(routes, login.Routes(login.Config{Identity: s.identity})...)
	routes = append(routes, resources.Routes(resources.Config{
		Gate: gate, Identity: s.identity, Subscriptions: s.subscriptions, Audit: audit.Reader{Log: s.audit, Gate: gate},
		Table: func() []azureapi.Route { return s.api.Routes() },
	})...)
	routes = append(routes, keyvault.Routes(keyvault.Config{Vaults: s.vaults, Clock: s.clock})...)
	routes = append(routes, batch.Routes(batch.Config{Fleet: s.fleet, CAHash: s.ca.Hash()})...)
	routes = append(routes, nodes.Routes(nodes.Config{
		Gate: gate, AgentOf: s.agentOf, Sessions: sessions, Logs: s.logs, AskLogs: s.edge.AskLogs, Explain: s.explain,
	})...)
	routes = append(routes, servicelinker.Routes(servicelinker.Config{
		Catalogue: s.catalogue, Connections: s.connections, Locate: connectionVaults{s.vaults, s.endpoints}.Locate,
	})...)
	routes = append(routes, clusters.Routes(clusters.Config{Clusters: s.clusters, Connections: s.connections})...)
	routes = append(routes, s.ownRoutes()...)
	s.api, err = azureapi.New(azureapi.Config{
		Endpoints: s.endpoints, Routes: routes, Verifier: s.identity, Tenant: s.identity.TenantID(), Log: s.log, Observe: s.metrics.observe,
		Authorize: s.authorize,
	})
	return err
}

// agentOf finds the agent of a pool's node: the joined host that is the node, else the node itself.
func (s *Server) agentOf(ctx context.Context, poolID, nodeID string) (string, error) {
	id, err := arm.ParseID(poolID)
	if err != nil {
		return "", err
	}
	if _, err := s.fleet.GetNode(access.AsSystem(ctx, "nodes"), id, nodeID); err != nil {
		return "", err
	}
	h, err := s.fleet.HostOf(ctx, nodeID)
	if err != nil || h == nil {
		return nodeID, err
	}
	return h.ID, nil
}

// explain says why a node is as it is.
func (s *Server) explain(ctx context.Context, poolID, nodeID string) (any, error) {
	id, err := arm.ParseID(poolID)
	if err != nil {
		return nil, err
	}
	return s.fleet.Explain(ctx, id, nodeID)
}

// authorize decides early for the edge. What it allows the domain operation
// decides and records again; a refusal is recorded here.
func (s *Server) authorize(r *azureapi.Request, action string) error {
	ctx := r.Context()
	switch {
	case azureapi.ByPolicy(action) && r.Host.Surface == azureapi.Vault:
		return s.vaults.Authorize(ctx, r.Host.Name, action, strings.TrimPrefix(r.Path(), "/"))
	case azureapi.ByPolicy(action): // a vault's item on the management surface: its operation knows more ways to be allowed
		return nil
	case r.Host.Surface == azureapi.Batch:
		account, err := s.fleet.AccountAt(ctx, r.Host.Name, r.Host.Region)
		if err != nil {
			return err
		}
		return s.authorizeRole(ctx, access.Op{Action: action, Resource: account.String()})
	}
	return s.authorizeRole(ctx, access.Op{Action: action, Resource: r.Scope()})
}

func (s *Server) authorizeRole(ctx context.Context, op access.Op) error {
	if s.gate.Can(ctx, op) == nil {
		return nil
	}
	return s.gate.Read(ctx, op)
}
