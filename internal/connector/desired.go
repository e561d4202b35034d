package connector

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"strconv"

	"keyfleet.dev/keyfleet/api/arm"
	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/internal/access"
)

// values are the variables of a connection with a login. What a value is comes, the
// later the stronger, from the names in the target's id, its registered server,
// its vault, and what the user gave.
func (s *Service) values(ctx context.Context, c Connection, login Login) ([]Variable, error) {
	t, err := s.cfg.Catalogue.Target(c.Target.Word)
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	if id, err := arm.ParseID(c.Target.ID); err == nil {
		for i, name := range t.IDs {
			if i < len(id.Names) {
				values[name] = id.Names[i]
			}
		}
		if id.Is("Microsoft.KeyVault/vaults") {
			if url, ok := s.cfg.Vaults.Endpoint(ctx, c.Target.ID); ok {
				values["endpoint"] = url
			}
		}
	}
	if id, ok := serverOf(c.Target.ID); ok {
		o, err := Servers.Lookup(s.cfg.Store.View(ctx), serverKey(id))
		if err != nil {
			return nil, err
		}
		if o != nil {
			values["host"], values["port"], values["tls"] = o.Spec.Host, strconv.Itoa(o.Spec.Port), strconv.FormatBool(!o.Spec.Plain)
		}
	}
	for name, v := range c.Target.Values {
		values[name] = v
	}
	values["user"] = login.User
	if c.Auth.Type != WorkloadIdentity {
		for _, name := range t.Secrets {
			if (name == "clientSecret") == (c.Auth.Type == ServicePrincipal) {
				values[name] = login.Password
			}
		}
	}
	values["clientId"], values["tenantId"], values["principalId"], values["targetId"] = c.Auth.ClientID, c.Auth.TenantID, c.Auth.ObjectID, c.Target.ID
	all, err := s.cfg.Catalogue.Variables(Request{Target: c.Target.Word, Auth: c.Auth.Type, Client: c.Client, Values: values, Rename: c.Keys})
	if err == nil && c.mounted() {
		return c.mountedKeys(), nil
	}
	return all, err
}

// login is what is to be delivered: it reads the credential from the vault as the
// context's caller.
func (s *Service) login(ctx context.Context, o *Object) (Login, error) {
	ref := o.Status.Credential.Secret
	if ref.Name == "" {
		return Login{}, nil
	}
	password, err := s.cfg.Vaults.Get(ctx, ref)
	return Login{User: o.Status.Credential.User, Password: password}, err
}

// desired is what the connection shall be in its cluster, now.
func (s *Service) desired(ctx context.Context, o *Object) (wire.Desired, error) {
	login, err := s.login(access.AsSystem(ctx, controllerName), o)
	if err != nil {
		return wire.Desired{}, err
	}
	return s.desiredWith(ctx, o.Spec, login)
}

func (s *Service) desiredWith(ctx context.Context, c Connection, login Login) (wire.Desired, error) {
	env, err := s.values(ctx, c, login)
	if err != nil {
		return wire.Desired{}, err
	}
	names := c.Objects()
	d := wire.Desired{ID: c.ID, Name: c.Name(), Namespace: c.Namespace}
	if names.ProviderClass != "" {
		_, ours := s.cfg.Vaults.Endpoint(ctx, c.Target.ID)
		if d.ProviderClass, err = c.class(c.vault(), ours); err != nil {
			return d, err
		}
	} else {
		d.Secret = &wire.SecretObject{Name: names.Secret, Data: map[string]string{}}
		for _, v := range env {
			d.Secret.Data[v.Name] = v.Value
		}
	}
	if names.ServiceAccount != "" {
		d.ServiceAccount = &wire.AccountObject{Name: names.ServiceAccount, Annotations: map[string]string{
			"azure.workload.identity/client-id": c.Auth.ClientID, "azure.workload.identity/tenant-id": c.Auth.TenantID,
		}}
	}
	d.Revision, err = revision(d)
	return d, err
}

// revision names a desired state by its content. That holds credentials of high
// entropy, or such as somebody gave: the name is long enough to tell states apart
// and is shown to managers only.
func revision(d wire.Desired) (string, error) {
	d.Revision = ""
	text, err := json.Marshal(d)
	if err != nil {
		return "", fmt.Errorf("encoding the desired state: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8]), nil
}

// reach is how Keyfleet gets at a server as its administrator.
func reach(srv Server, password, database string) Reach {
	r := Reach{
		Kind: srv.Kind, Host: srv.Host, Port: srv.Port, Database: database, Plain: srv.Plain, CA: srv.CA, Name: srv.Host, Management: srv.Management,
		Login: Login{User: srv.Administrator, Password: password},
	}
	if host, port, err := net.SplitHostPort(srv.Reach); err == nil {
		if n, err := strconv.Atoi(port); err == nil {
			r.Host, r.Port = host, n
		}
	}
	return r
}

// reachTarget is reach for the target of a connection; ok is false where it is on
// no registered server.
func (s *Service) reachTarget(ctx context.Context, c Connection) (r Reach, ok bool, err error) {
	id, isServer := serverOf(c.Target.ID)
	if !isServer {
		return r, false, nil
	}
	tx := s.cfg.Store.View(ctx)
	o, err := Servers.Lookup(tx, serverKey(id))
	if err != nil || o == nil {
		return r, false, err
	}
	admin, err := administrators.Get(tx, o.ID)
	if err != nil {
		return r, false, err
	}
	database := c.Target.Values["database"]
	if database == "" {
		database = c.Target.Values["vhost"]
	}
	if full, err := arm.ParseID(c.Target.ID); err == nil && len(full.Names) > 1 && database == "" {
		database = full.Names[1]
	}
	return reach(o.Spec, admin.Spec.Password, database), true, nil
}
