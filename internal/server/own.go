package server

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"time"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/internal/azureapi"
)

// ownHandler answers what is no protocol of Azure's: health and metrics.
// Metrics hold names of vaults and certificates, so they are for this machine
// only; a collector elsewhere goes through a proxy here.
func (s *Server) ownHandler() http.Handler {
	mux := http.NewServeMux()
	metrics := s.metrics.handler()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		if !fromHere(r) {
			http.Error(w, "metrics are answered to callers on the server's own machine only", http.StatusForbidden)
			return
		}
		metrics.ServeHTTP(w, r)
	})
	mux.HandleFunc("GET /healthz", s.health)
	return mux
}

// fromHere reports whether the caller is on this machine. A caller without an
// address comes through the socket of local nodes, which stand for other machines.
func fromHere(r *http.Request) bool {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	return err == nil && net.ParseIP(host).IsLoopback()
}

// health reads through the store: 200 when it answers, 503 with the reason otherwise.
func (s *Server) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	out := map[string]any{"status": "ok"}
	w.Header().Set("Content-Type", "application/json")
	if err := s.backend.Health(ctx); err != nil {
		s.log.Error("not healthy", "error", err)
		out["status"], out["reason"] = "unavailable", "the store does not answer; the server's log says why"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(out)
}

// whoami is the answer of /keyfleet/v1/whoami.
type whoami struct {
	Kind     string `json:"kind"`
	Tenant   string `json:"tenantId"`
	ObjectID string `json:"objectId"`
	ClientID string `json:"clientId"`
	Name     string `json:"name"`
}

// ownRoutes are rows of the route table that belong to no single capability.
func (s *Server) ownRoutes() []azureapi.Route {
	return []azureapi.Route{
		{
			Surface: azureapi.ARM, Method: http.MethodGet, Path: "/keyfleet/v1/whoami", Action: azureapi.Authenticated,
			Handle: func(r *azureapi.Request) (*azureapi.Reply, error) {
				c := r.Caller
				return azureapi.OK(whoami{string(c.Kind), c.Tenant, c.ObjectID, c.ClientID, c.Name}), nil
			},
		},
		{
			Surface: azureapi.ARM, Method: http.MethodGet, Action: "certificates/get",
			Path: "/keyfleet/v1/vaults/{vault}/certificates/{name}/deliveries", Handle: s.deliveries,
		},
	}
}

// deliveries says where a certificate is: which version each node has, and how
// long after the newest version was stored the node had it.
func (s *Server) deliveries(r *azureapi.Request) (*azureapi.Reply, error) {
	vaultName, name := r.Param("vault"), r.Param("name")
	cert, err := s.vaults.Renewal(r.Context(), vaultName, name) // decides and records
	if err != nil {
		return nil, err
	}
	list, err := s.fleet.Deliveries(r.Context(), vaultName, name)
	if err != nil {
		return nil, err
	}
	out := keyfleet.Deliveries{Vault: vaultName, Certificate: name, Version: cert.Version, Issued: cert.Issued, Nodes: []keyfleet.Delivery{}}
	for _, d := range list {
		w := keyfleet.Delivery{Pool: d.Pool, Node: d.Node, Extension: d.Extension, Secret: d.Secret, Version: d.Version, Path: d.Path, Since: d.Since, Problem: d.Problem}
		if d.Version == cert.Version && d.Since.After(cert.Issued) {
			w.Seconds = d.Since.Sub(cert.Issued).Seconds()
		}
		out.Nodes = append(out.Nodes, w)
	}
	return azureapi.OK(out), nil
}
