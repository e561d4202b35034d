// Command podprobe runs in a pod and reads a secret of a vault with Microsoft's SDK.
// It is told the name of the secret; all else it has from the pod's environment: the
// vault from the Secret that a service connection made, identity and token from the
// webhook of workload identity, trust from SSL_CERT_FILE.
//
//	podprobe SECRET
//
// It prints the secret's value.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: podprobe SECRET")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// A pod without a way to the internet cannot ask Microsoft whether the authority is one.
	cred, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{DisableInstanceDiscovery: true})
	if err != nil {
		return fmt.Errorf("making the credential: %w", err)
	}
	secrets, err := azsecrets.NewClient(os.Getenv("AZURE_KEYVAULT_RESOURCEENDPOINT"), cred, nil)
	if err != nil {
		return fmt.Errorf("making the client: %w", err)
	}
	got, err := secrets.GetSecret(ctx, args[0], "", nil)
	if err != nil {
		return fmt.Errorf("reading the secret: %w", err)
	}
	fmt.Println(*got.Value)
	return nil
}
