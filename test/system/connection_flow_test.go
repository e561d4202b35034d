package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

// flow is one connection to PostgreSQL and one of a workload identity, from making
// them to removing them, on a line whose server or manager may die.
type flow struct {
	*line
	t      *testing.T
	at     killPoint
	db, kv string
	first  shownLinker // the connection to PostgreSQL before the rotation
	url    string      // what logged in then
}

// flow goes through all of it once, with names of its own, and one death at the
// point, unless that is zero. It returns whether the program came to the point.
func (l *line) flow(t *testing.T, at killPoint) (died bool) {
	t.Helper()
	l.flows++
	f := &flow{line: l, t: t, at: at, db: fmt.Sprintf("%sdb%d", l.name, l.flows), kv: fmt.Sprintf("%skv%d", l.name, l.flows)}
	done := f.watchRoles()
	defer done()
	f.give()
	f.create()
	f.rotate()
	f.remove()
	f.nothingLeft()
	died = f.take()
	f.dropVault()
	return died
}

// give gives the order to die. Where nobody shall, it begins a new list of effects.
func (f *flow) give() {
	f.t.Helper()
	if f.at.program == "" {
		for _, program := range []string{theServer, theManager} {
			if err := os.Truncate(f.effects(program), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				f.t.Fatal(err)
			}
		}
		return
	}
	file := f.order(f.at.program)
	if err := errors.Join(os.WriteFile(file+".next", []byte(f.at.String()), 0o600), os.Rename(file+".next", file)); err != nil {
		f.t.Fatal(err)
	}
}

// take takes the order back and returns whether it was obeyed. Where there was
// none, it reads the list.
func (f *flow) take() (died bool) {
	f.t.Helper()
	if f.at.program == "" {
		for _, program := range []string{theServer, theManager} {
			f.seen[program] = readEffects(f.t, f.effects(program))
		}
		return false
	}
	file := f.order(f.at.program)
	if err := os.Remove(file); err == nil {
		return false
	}
	if err := os.Remove(file + ".done"); err != nil {
		f.t.Fatalf("the order to die is gone, and was not obeyed: %v", err)
	}
	return true
}

// again repeats a call while the server is away or coming back.
func (f *flow) again(what string, call func(ctx context.Context) error) {
	f.t.Helper()
	stack.Eventually(f.t, 2*time.Minute, what, func(ctx context.Context) error {
		err := call(ctx)
		var e *client.Error
		if errors.As(err, &e) && e.Status >= 400 && e.Status < 500 && e.Status != http.StatusConflict && e.Status != http.StatusTooManyRequests {
			f.t.Fatalf("%s: refused: %v", what, err)
		}
		return err
	})
}

func (f *flow) ask(ctx context.Context, method, path, version string, in, out any) error {
	return f.Client.Call(ctx, client.Request{Method: method, URL: f.Client.ARM(path), Version: version, Body: in}, out)
}

// shownLinker is what a flow looks at in a connection.
type shownLinker struct {
	Properties struct {
		ProvisioningState, Waiting string
		Problem                    json.RawMessage
		Credential                 struct{ User, KeyVaultID, KeyVaultSecretName string }
	}
}

func (f *flow) show(ctx context.Context, name string) (out shownLinker, err error) {
	err = f.ask(ctx, http.MethodGet, f.linker(name), linkerVersion, nil, &out)
	return out, err
}

// succeeds returns a connection that is what it shall be.
func (f *flow) succeeds(ctx context.Context, name string) (shownLinker, error) {
	out, err := f.show(ctx, name)
	if p := out.Properties; err == nil && p.ProvisioningState != "Succeeded" {
		err = fmt.Errorf("%s is %s, waiting for %q: %s", name, p.ProvisioningState, p.Waiting, p.Problem)
	}
	return out, err
}

// create makes both connections and uses what the cluster got.
func (f *flow) create() {
	f.t.Helper()
	postgres := f.postgresBody()
	postgres["scope"] = f.name
	vault := map[string]any{
		"targetService": map[string]any{"type": "AzureResource", "id": f.group + "/providers/Microsoft.KeyVault/vaults/clustervault"},
		"authInfo":      map[string]any{"authType": "userAssignedIdentity", "identity": f.identity.id}, "clientType": "python", "scope": f.name,
	}
	for name, properties := range map[string]any{f.db: postgres, f.kv: vault} {
		f.again("making "+name, func(ctx context.Context) error {
			return f.ask(ctx, http.MethodPut, f.linker(name), linkerVersion, map[string]any{"properties": properties}, nil)
		})
	}
	f.again("both connections", func(ctx context.Context) (err error) {
		if f.first, err = f.succeeds(ctx, f.db); err == nil {
			_, err = f.succeeds(ctx, f.kv)
		}
		return err
	})
	if role := strings.TrimSuffix(f.first.Properties.Credential.User, "_a"); role == f.first.Properties.Credential.User {
		f.t.Errorf("the first login is %q", role)
	}
	f.deliveredIs(f.first.Properties.Credential.User)
	f.again("the identity reads the vault", func(context.Context) error {
		got, err := f.readAs(f.t, f.identity.client, f.podToken(f.t, f.name, "sc-account-"+f.identity.client, "api://AzureADTokenExchange"))
		if err == nil && got != "s3cret" {
			err = fmt.Errorf("it reads %q", got)
		}
		return err
	})
	f.granted(1)
	f.versions(1)
}

// deliveredIs looks that the cluster has one Secret for each connection, that the
// one's login is the user, and that nobody else is left of the role.
func (f *flow) deliveredIs(user string) {
	f.t.Helper()
	secrets, err := f.api.CoreV1().Secrets(f.name).List(f.t.Context(), metav1.ListOptions{})
	if err != nil || len(secrets.Items) != 2 {
		f.t.Fatalf("%d Secrets for two connections, %v", len(secrets.Items), err)
	}
	accounts, err := f.api.CoreV1().ServiceAccounts(f.name).List(f.t.Context(), metav1.ListOptions{})
	if err != nil || len(accounts.Items) != 1 || accounts.Items[0].Annotations["azure.workload.identity/client-id"] != f.identity.client {
		f.t.Errorf("ServiceAccounts: %+v, %v", accounts.Items, err)
	}
	for _, s := range secrets.Items {
		switch s.Name {
		case "sc-" + f.db + "-secret":
			f.url = string(s.Data["AZURE_POSTGRESQL_CONNECTIONSTRING"])
		case "sc-" + f.kv + "-secret":
			if string(s.Data["AZURE_KEYVAULT_CLIENTID"]) != f.identity.client {
				f.t.Errorf("the Secret of the identity has the client %q", s.Data["AZURE_KEYVAULT_CLIENTID"])
			}
		default:
			f.t.Errorf("the Secret %s is nobody's", s.Name)
		}
	}
	conn, err := pgx.Connect(f.t.Context(), f.url)
	if err != nil {
		f.t.Fatalf("logging in with what the cluster has: %v", err)
	}
	defer conn.Close(f.t.Context())
	if conn.Config().User != user {
		f.t.Errorf("the cluster has the login %s, the connection %s", conn.Config().User, user)
	}
	if got, want := strings.Join(f.roles(conn), " "), user[:len(user)-2]+" "+user; got != want {
		f.t.Errorf("the roles are %s, want %s", got, want)
	}
	if states := f.desired(); states != 2 {
		f.t.Errorf("%d desired states of two connections", states)
	}
}

// roles are those of the flow on PostgreSQL.
func (f *flow) roles(conn *pgx.Conn) []string {
	f.t.Helper()
	rows, _ := conn.Query(f.t.Context(), "SELECT rolname FROM pg_roles WHERE starts_with(rolname, $1) ORDER BY 1", "kf_"+f.db+"_")
	out, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		f.t.Fatalf("listing the roles: %v", err)
	}
	return out
}

// watchRoles looks all the time that there are never more than a role and two
// logins, until the function that it returns is called.
func (f *flow) watchRoles() (done func()) {
	f.t.Helper()
	conn, err := pgx.Connect(f.t.Context(), f.adminURL("postgres"))
	if err != nil {
		f.t.Fatal(err)
	}
	stop, looks := make(chan struct{}), 0
	var watching sync.WaitGroup
	watching.Go(func() { // ends with the flow
		defer conn.Close(context.Background())
		for {
			var roles, logins int
			err := conn.QueryRow(context.Background(), "SELECT count(*), count(*) FILTER (WHERE rolcanlogin) FROM pg_roles WHERE starts_with(rolname, $1)", "kf_"+f.db+"_").Scan(&roles, &logins)
			if err != nil || roles > 3 || logins > 2 {
				f.t.Errorf("%d roles, %d of them logins, %v", roles, logins, err)
				return
			}
			looks++
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	return func() {
		close(stop)
		watching.Wait()
		if looks < 10 {
			f.t.Errorf("the roles were looked at %d times only", looks)
		}
	}
}

// granted counts what the identity has in Keyfleet itself.
func (f *flow) granted(want int) {
	f.t.Helper()
	f.again(fmt.Sprintf("%d grants of each kind", want), func(ctx context.Context) error {
		trusted, err := client.List[json.RawMessage](ctx, f.Client, client.Request{Method: http.MethodGet, URL: f.Client.ARM(f.identity.id + "/federatedIdentityCredentials"), Version: "2023-01-31"})
		if err != nil {
			return err
		}
		var vault struct {
			Properties struct{ AccessPolicies []struct{ ObjectID string } }
		}
		if err := f.ask(ctx, http.MethodGet, f.group+"/providers/Microsoft.KeyVault/vaults/clustervault", "2023-07-01", nil, &vault); err != nil {
			return err
		}
		policies := 0
		for _, p := range vault.Properties.AccessPolicies {
			if p.ObjectID == f.identity.object {
				policies++
			}
		}
		if len(trusted) != want || policies != want {
			f.t.Errorf("%d federated credentials and %d access policies, want %d", len(trusted), policies, want)
		}
		return nil
	})
}

// versions counts those of the login's secret. A server that dies between the vault
// and its own record leaves one that nobody names and that opens nothing.
func (f *flow) versions(want int) {
	f.t.Helper()
	id := f.first.Properties.Credential.KeyVaultID
	vault, secret := id[strings.LastIndexByte(id, '/')+1:], f.first.Properties.Credential.KeyVaultSecretName
	f.again("the administrator may read the vault", func(ctx context.Context) error {
		policy := map[string]any{"tenantId": f.me.TenantID, "objectId": f.me.ObjectID, "permissions": map[string]any{"secrets": []string{"all"}}}
		return f.ask(ctx, http.MethodPut, id+"/accessPolicies/add", "2023-07-01", map[string]any{"properties": map[string]any{"accessPolicies": []any{policy}}}, nil)
	})
	f.again("the versions of the secret", func(ctx context.Context) error {
		all, err := client.List[json.RawMessage](ctx, f.Client, client.Request{Method: http.MethodGet, URL: f.Client.Vault(vault, "/secrets/"+secret+"/versions"), Version: client.VersionVaultData})
		if err == nil && len(all) != want && (f.at.program != theServer || len(all) != want+1) {
			f.t.Errorf("%d versions of the secret %s, want %d", len(all), secret, want)
		}
		return err
	})
}

// rotate asks for a new login, and not again when it has begun.
func (f *flow) rotate() {
	f.t.Helper()
	old := f.first.Properties.Credential.User
	f.again("asking for a rotation", func(ctx context.Context) error {
		if shown, err := f.show(ctx, f.db); err != nil || shown.Properties.Credential.User != old {
			return err
		}
		return f.ask(ctx, http.MethodPost, f.linker(f.db)+"/rotate", linkerVersion, nil, nil)
	})
	next := strings.TrimSuffix(old, "_a") + "_b"
	f.again("the rotation", func(ctx context.Context) error {
		shown, err := f.succeeds(ctx, f.db)
		if err == nil && shown.Properties.Credential.User != next {
			err = fmt.Errorf("the login is %s", shown.Properties.Credential.User)
		}
		if err != nil {
			return err
		}
		conn, err := pgx.Connect(ctx, f.url) // the old one
		if err == nil {
			_ = conn.Close(ctx)
			return errors.New("the old login still works")
		}
		return nil
	})
	f.deliveredIs(next)
	f.granted(1)
	f.versions(2)
}

// remove deletes both connections. Where the answer to that arrived, the report of
// the deletion says everything once.
func (f *flow) remove() {
	f.t.Helper()
	operations := map[string]string{}
	for _, name := range []string{f.db, f.kv} {
		f.again("deleting "+name, func(ctx context.Context) error {
			reply, err := f.Client.Do(ctx, client.Request{Method: http.MethodDelete, URL: f.Client.ARM(f.linker(name)), Version: linkerVersion})
			if err == nil {
				operations[name] = reply.Header.Get("Azure-AsyncOperation")
			}
			return err
		})
	}
	for _, name := range []string{f.db, f.kv} {
		f.again(name+" is gone", func(ctx context.Context) error {
			shown, err := f.show(ctx, name)
			switch p := shown.Properties; {
			case client.IsNotFound(err):
				return nil
			case err != nil:
				return err
			default:
				return fmt.Errorf("it is %s, waiting for %q: %s", p.ProvisioningState, p.Waiting, p.Problem)
			}
		})
	}
	account := "ServiceAccount " + f.name + "/sc-account-" + f.identity.client
	f.reported(operations[f.db], "Secret "+f.name+"/sc-"+f.db+"-secret", strings.TrimSuffix(f.first.Properties.Credential.User, "_a")+"_b", "secret "+f.first.Properties.Credential.KeyVaultSecretName)
	f.reported(operations[f.kv], "Secret "+f.name+"/sc-"+f.kv+"-secret", account, "federated credential", "access policy")
}

// reported looks that the report of a deletion has a line with each text, and one only.
func (f *flow) reported(operation string, texts ...string) {
	f.t.Helper()
	if operation == "" {
		return // the connection went before the answer came
	}
	f.again("the report of the deletion", func(ctx context.Context) error {
		var op struct {
			Status     string
			Properties struct{ Removed, Kept []string }
		}
		if err := f.Client.Call(ctx, client.Request{Method: http.MethodGet, URL: operation}, &op); err != nil {
			return err
		}
		for _, text := range texts {
			n := 0
			for _, line := range op.Properties.Removed {
				if strings.Contains(line, text) {
					n++
				}
			}
			if n != 1 {
				f.t.Errorf("%d lines of the report say %q: %q", n, text, op.Properties.Removed)
			}
		}
		if op.Status != "Succeeded" || len(op.Properties.Kept) > 0 {
			f.t.Errorf("the deletion is %s and kept %q", op.Status, op.Properties.Kept)
		}
		return nil
	})
}

// desired counts the desired states of the flow's connections.
func (f *flow) desired() (n int) {
	f.t.Helper()
	states, err := f.api.CoreV1().Secrets("sc-system").List(f.t.Context(), metav1.ListOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, s := range states.Items {
		for _, name := range []string{f.db, f.kv} {
			for _, data := range s.Data {
				if strings.Contains(string(data), f.linker(name)+`"`) {
					n++
				}
			}
		}
	}
	return n
}

// nothingLeft looks everywhere for what the connections have left.
func (f *flow) nothingLeft() {
	f.t.Helper()
	secrets, err := f.api.CoreV1().Secrets(f.name).List(f.t.Context(), metav1.ListOptions{})
	if err != nil || len(secrets.Items) != 0 {
		f.t.Errorf("%d Secrets are left, %v", len(secrets.Items), err)
	}
	accounts, err := f.api.CoreV1().ServiceAccounts(f.name).List(f.t.Context(), metav1.ListOptions{})
	if err != nil || len(accounts.Items) != 0 {
		f.t.Errorf("%d ServiceAccounts are left, %v", len(accounts.Items), err)
	}
	if n := f.desired(); n != 0 {
		f.t.Errorf("%d desired states are left", n)
	}
	admin, err := pgx.Connect(f.t.Context(), f.adminURL("postgres"))
	if err != nil {
		f.t.Fatal(err)
	}
	defer admin.Close(f.t.Context())
	if left := f.roles(admin); len(left) != 0 {
		f.t.Errorf("roles are left: %v", left)
	}
	f.granted(0)
	id := f.first.Properties.Credential.KeyVaultID
	for path, want := range map[string]int{"/secrets": 0, "/deletedsecrets": 1} {
		f.again("the vault's "+path, func(ctx context.Context) error {
			all, err := client.List[json.RawMessage](ctx, f.Client, client.Request{Method: http.MethodGet, URL: f.Client.Vault(id[strings.LastIndexByte(id, '/')+1:], path), Version: client.VersionVaultData})
			if err == nil && len(all) != want {
				f.t.Errorf("the vault has %d %s, want %d", len(all), path, want)
			}
			return err
		})
	}
}

// dropVault removes the vault of the cluster's credentials, so that the next flow
// makes it anew.
func (f *flow) dropVault() {
	f.t.Helper()
	id := f.first.Properties.Credential.KeyVaultID
	deleted := "/subscriptions/" + f.Client.Subscription() + "/providers/Microsoft.KeyVault/locations/westus2/deletedVaults/" + id[strings.LastIndexByte(id, '/')+1:]
	for _, call := range []struct{ method, path string }{{http.MethodDelete, id}, {http.MethodPost, deleted + "/purge"}} {
		f.again("dropping the vault", func(ctx context.Context) error {
			err := f.ask(ctx, call.method, call.path, "2023-07-01", nil, nil)
			if client.IsNotFound(err) {
				return nil
			}
			return err
		})
	}
	f.again("the vault is purged", func(ctx context.Context) error {
		err := f.ask(ctx, http.MethodGet, deleted, "2023-07-01", nil, nil)
		if client.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is still there"), err)
	})
}
