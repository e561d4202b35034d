// Package azuresdk runs Microsoft's Azure SDK for Go, unchanged and with its
// own checks switched on, against a running Keyfleet server over TLS.
//
// The only settings are those that every private cloud needs: where the
// management and login hosts are, that instance discovery at a public host is
// off, and the server's CA. Names are dialled at the server's address, since
// the machine's resolver is not the test's to change.
package azuresdk

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/arm"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/test/stack"
)

func TestMain(m *testing.M) {
	code := m.Run()
	stack.Clean()
	os.Exit(code)
}

// azure is a running server and what an SDK user has of it.
type azure struct {
	*stack.Stack
	admin   keyfleet.Admin
	options azcore.ClientOptions
	cred    azcore.TokenCredential
}

func start(t *testing.T, args ...string) *azure {
	t.Helper()
	return startAs(t, stack.Config{Args: args})
}

func startAs(t *testing.T, cfg stack.Config) *azure {
	t.Helper()
	s := stack.Start(t, cfg)
	admin, err := client.ReadAdmin(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	a := &azure{Stack: s, admin: admin}
	transport := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		TLSClientConfig:   s.Client.TLSConfig(),
		ForceAttemptHTTP2: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, s.Listen)
		},
	}}
	t.Cleanup(transport.CloseIdleConnections)
	a.options = azcore.ClientOptions{
		Cloud: cloud.Configuration{
			ActiveDirectoryAuthorityHost: admin.Endpoints.Login + "/",
			Services: map[cloud.ServiceName]cloud.ServiceConfiguration{
				cloud.ResourceManager: {Endpoint: admin.Endpoints.ResourceManager, Audience: admin.Endpoints.ResourceManager},
			},
		},
		Transport: transport,
		Retry:     policy.RetryOptions{MaxRetries: 1, RetryDelay: 50 * time.Millisecond},
	}
	a.cred, err = azidentity.NewClientSecretCredential(admin.Tenant, admin.ClientID, admin.ClientSecret.Reveal(),
		&azidentity.ClientSecretCredentialOptions{ClientOptions: a.options, DisableInstanceDiscovery: true})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *azure) arm() *arm.ClientOptions { return &arm.ClientOptions{ClientOptions: a.options} }

// armVersion is arm with a fixed api-version.
func (a *azure) armVersion(v string) *arm.ClientOptions {
	o := a.arm()
	o.APIVersion = v
	return o
}

func (a *azure) vaultURL(name string) string {
	return "https://" + name + "." + a.admin.Endpoints.VaultSuffix
}

func ok[T any](v T, err error) func(t *testing.T, what string) T {
	return func(t *testing.T, what string) T {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		return v
	}
}

// refused asserts that err is a refusal with the status and code.
func refused(t *testing.T, what string, err error, status int, code string) {
	t.Helper()
	var re *azcore.ResponseError
	if !errors.As(err, &re) || re.StatusCode != status || re.ErrorCode != code {
		t.Errorf("%s: got %v, want %d %s", what, err, status, code)
	}
}

func ptr[T any](v T) *T { return &v }

func background(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
