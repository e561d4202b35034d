package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/kube/kubetest"
	"keyfleet.dev/keyfleet/test/stack"
)

// registered is a server with a real cluster (API server and etcd) that is
// registered there by the command line, and a manager that looks after it.
type registered struct {
	*system
	kube *kubetest.Cluster
	api  kubernetes.Interface
	home string
}

// TestRegisteredCluster: a cluster is registered with a kubeconfig of the role that
// is shipped, seen by a manager, and a pod's token gets a secret of the vault, by
// nothing but what the cluster publishes.
func TestRegisteredCluster(t *testing.T) {
	r := &registered{kube: kubetest.Start(t), home: t.TempDir()}
	r.system = start(t, stack.Config{})
	r.connect(t)
	group := r.group("rg")
	_, clientID, objectID := r.identity(group, "shop")
	r.vault(group, "clustervault", objectID)
	r.putSecret(t, "clustervault", "db", "s3cret")

	kubeconfig := filepath.Join(r.home, "kubeconfig")
	if err := os.WriteFile(kubeconfig, r.kube.TokenKubeconfig(t, r.managerAccount(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := r.keyfleet(t, 0, "cluster", "register", "prod", "--kubeconfig", kubeconfig); !strings.Contains(out, "Cluster prod is registered; it is Creating.") {
		t.Errorf("registering says %q", out)
	}
	if out := r.keyfleet(t, 6, "identity", "federated-credential", "create", "web", "--identity", "shop", "--cluster", "prod", "--subject", "system:serviceaccount:shop:web"); !strings.Contains(out, "IssuerNotSeen") {
		t.Errorf("trusting a cluster that nobody has seen says %q", out)
	}
	r.manage(t)
	r.becomes(t, "Succeeded", "")
	shown := r.keyfleet(t, 0, "cluster", "show", "prod")
	for _, want := range []string{"https://kubernetes.default.svc", "v1.", "0/0"} {
		if !strings.Contains(strings.ReplaceAll(shown, "1.", "v1."), want) {
			t.Errorf("show does not say %q:\n%s", want, shown)
		}
	}
	if strings.Contains(shown, "Missing permissions  list") {
		t.Errorf("the role that is shipped does not suffice:\n%s", shown)
	}

	r.keyfleet(t, 0, "identity", "federated-credential", "create", "web", "--identity", "shop", "--cluster", "prod", "--subject", "system:serviceaccount:shop:web")
	r.account(t, "shop", "web")
	token := r.podToken(t, "shop", "web", "api://AzureADTokenExchange")
	if got, err := r.readAs(t, clientID, token); err != nil || got != "s3cret" {
		t.Errorf("the pod reads %q, %v", got, err)
	}
	r.account(t, "shop", "db")
	if _, err := r.readAs(t, clientID, r.podToken(t, "shop", "db", "api://AzureADTokenExchange")); err == nil || !strings.Contains(err.Error(), "AADSTS700213") {
		t.Errorf("another service account: %v", err)
	}
	if _, err := r.readAs(t, clientID, r.podToken(t, "shop", "web", "https://elsewhere")); err == nil || !strings.Contains(err.Error(), "AADSTS700212") {
		t.Errorf("a token for somebody else: %v", err)
	}

	// What it may not see is told; then the cluster does not answer any more.
	if err := r.api.RbacV1().ClusterRoleBindings().Delete(r.ctx, "keyfleet-manager", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stack.Eventually(t, time.Minute, "the missing permissions show", func(context.Context) error {
		if out := r.keyfleet(t, 0, "cluster", "show", "prod"); !strings.Contains(out, "list nodes") {
			return errors.New(out)
		}
		return nil
	})
	r.kube.Stop()
	r.becomes(t, "Failed", "connection refused")

	r.keyfleet(t, 0, "cluster", "delete", "prod", "--yes")
	if _, err := r.readAs(t, clientID, token); err == nil || !strings.Contains(err.Error(), "AADSTS90061") {
		t.Errorf("the cluster is forgotten, and its tokens: %v", err)
	}
}

func (r *registered) connect(t *testing.T) {
	t.Helper()
	cfg, err := clientcmd.RESTConfigFromKubeConfig(r.kube.Kubeconfig(t))
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1 // tests ask as often as they like
	if r.api, err = kubernetes.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
}

// keyfleet runs the command line and returns all that it said.
func (r *registered) keyfleet(t *testing.T, exit int, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(r.ctx, filepath.Join(r.Bin, "keyfleet"), args...)
	cmd.Env = append(os.Environ(), "HOME="+r.home, "KEYFLEET_FROM="+r.Dir, "KEYFLEET_GROUP=rg")
	out, _ := cmd.CombinedOutput()
	if got := cmd.ProcessState.ExitCode(); got != exit {
		t.Fatalf("keyfleet %s: exit status %d, want %d:\n%s", strings.Join(args, " "), got, exit, out)
	}
	return string(out)
}

// putSecret puts a secret into a vault.
func (r *registered) putSecret(t *testing.T, vault, name, value string) {
	t.Helper()
	r.call(http.MethodPut, r.Client.Vault(vault, "/secrets/"+name), client.VersionVaultData, map[string]string{"value": value}, nil)
}

// managerAccount applies the role that is shipped and returns a token of its account.
func (r *registered) managerAccount(t *testing.T) string {
	t.Helper()
	r.applyFile(t, "manager-role.yaml")
	return r.podToken(t, "keyfleet", "manager", "https://kubernetes.default.svc")
}

// applyFile makes what a file of the folder deploy says.
func (r *registered) applyFile(t *testing.T, name string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(stack.Root(t), "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(string(text), "\n---\n") {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(part), &kind); err != nil {
			t.Fatal(err)
		}
		if err := r.apply(kind.Kind, []byte(part)); err != nil {
			t.Fatalf("%s: %v", kind.Kind, err)
		}
	}
}

func (r *registered) apply(kind string, text []byte) error {
	create := metav1.CreateOptions{FieldValidation: "Strict"}
	switch kind {
	case "Namespace":
		var o core.Namespace
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.CoreV1().Namespaces().Create(r.ctx, &o, create)
		return err
	case "ServiceAccount":
		var o core.ServiceAccount
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.CoreV1().ServiceAccounts(o.Namespace).Create(r.ctx, &o, create)
		return err
	case "Role":
		var o rbac.Role
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.RbacV1().Roles(o.Namespace).Create(r.ctx, &o, create)
		return err
	case "RoleBinding":
		var o rbac.RoleBinding
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.RbacV1().RoleBindings(o.Namespace).Create(r.ctx, &o, create)
		return err
	case "ClusterRole":
		var o rbac.ClusterRole
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.RbacV1().ClusterRoles().Create(r.ctx, &o, create)
		return err
	case "ClusterRoleBinding":
		var o rbac.ClusterRoleBinding
		if err := yaml.UnmarshalStrict(text, &o); err != nil {
			return err
		}
		_, err := r.api.RbacV1().ClusterRoleBindings().Create(r.ctx, &o, create)
		return err
	}
	return fmt.Errorf("the test knows no %q", kind)
}

// account makes a service account, and its namespace if it is not there.
func (r *registered) account(t *testing.T, namespace, name string) {
	t.Helper()
	_, _ = r.api.CoreV1().Namespaces().Create(r.ctx, &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if _, err := r.api.CoreV1().ServiceAccounts(namespace).Create(r.ctx, &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// podToken is a token of a service account, as the kubelet gets it for a pod.
func (r *registered) podToken(t *testing.T, namespace, name, audience string) string {
	t.Helper()
	seconds := int64(3600)
	got, err := r.api.CoreV1().ServiceAccounts(namespace).CreateToken(r.ctx, name,
		&authentication.TokenRequest{Spec: authentication.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got.Status.Token
}

// manage runs a manager with a login that the command line makes.
func (r *registered) manage(t *testing.T) {
	t.Helper()
	dir := filepath.Join(r.home, "connector")
	r.keyfleet(t, 0, "cluster", "manager", "create", "connector", "--to-dir", dir)
	log, err := os.Create(filepath.Join(r.home, "manager.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(r.Bin, "keyfleet-connector"), "manager", "--from", dir, "--interval", "500ms")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the manager ended with %v", err)
		}
		text, err := os.ReadFile(log.Name())
		_ = log.Close()
		if err != nil || strings.Contains(string(text), "eyJ") {
			t.Errorf("the manager's log cannot be read or has a token: %v", err)
		}
		if t.Failed() {
			t.Logf("the manager's log:\n%s", text)
		}
	})
}

// becomes waits until the cluster has a state, for a reason.
func (r *registered) becomes(t *testing.T, state, reason string) {
	t.Helper()
	stack.Eventually(t, time.Minute, "the cluster is "+state, func(context.Context) error {
		var o struct {
			Properties struct {
				ProvisioningState string
				Observed          struct{ Reason string }
			}
		}
		if err := json.Unmarshal([]byte(r.keyfleet(t, 0, "cluster", "show", "prod", "-o", "json")), &o); err != nil {
			return err
		}
		if p := o.Properties; p.ProvisioningState != state || !strings.Contains(p.Observed.Reason, reason) {
			return fmt.Errorf("it is %s: %s", p.ProvisioningState, p.Observed.Reason)
		}
		return nil
	})
}

// readAs reads the secret as a pod does: its token for one of the identity, and
// that to the vault.
func (r *registered) readAs(t *testing.T, clientID, assertion string) (string, error) {
	t.Helper()
	admin, err := client.ReadAdmin(r.Dir)
	if err != nil {
		t.Fatal(err)
	}
	plain := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: r.Client.TLSConfig(), DialContext: r.Client.DialContext, ForceAttemptHTTP2: true}}
	defer plain.CloseIdleConnections()
	pod, err := client.New(client.Config{
		Endpoints: admin.Endpoints, CAFile: admin.CAFile, TokenSource: func(ctx context.Context, resource string) (client.Token, error) {
			reply, err := plain.PostForm(admin.Endpoints.Login+"/"+admin.Tenant+"/oauth2/v2.0/token", url.Values{
				"grant_type": {"client_credentials"}, "client_id": {clientID}, "scope": {strings.TrimSuffix(resource, "/") + "/.default"},
				"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}, "client_assertion": {assertion},
			})
			if err != nil {
				return client.Token{}, err
			}
			defer reply.Body.Close()
			text, err := io.ReadAll(reply.Body)
			if err != nil {
				return client.Token{}, err
			}
			var got struct {
				Token   keyfleet.Secret `json:"access_token"`
				Problem string          `json:"error_description"`
			}
			if err := json.Unmarshal(text, &got); err != nil || got.Token == "" {
				return client.Token{}, fmt.Errorf("%s: %s", reply.Status, got.Problem)
			}
			return client.Token{Value: got.Token, Expires: time.Now().Add(time.Hour)}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	var secret struct{ Value string }
	err = pod.Call(r.ctx, client.Request{Method: http.MethodGet, URL: pod.Vault("clustervault", "/secrets/db"), Version: client.VersionVaultData}, &secret)
	return secret.Value, err
}
