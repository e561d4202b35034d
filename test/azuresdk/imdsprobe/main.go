// Command imdsprobe runs on a node and reads a secret as a managed identity
// with Microsoft's SDK, all its checks on. It is told the secret and the
// identity, and nothing of the server: names come from the node's hosts file,
// tokens from 169.254.169.254, trust from SSL_CERT_FILE.
//
//	imdsprobe VAULT-URL SECRET [CLIENT-ID | default]
//
// It prints the secret's value. "default" uses DefaultAzureCredential.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
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
	if len(args) < 2 || len(args) > 3 {
		return fmt.Errorf("usage: imdsprobe VAULT-URL SECRET [CLIENT-ID | default]")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cred, err := credential(args[2:])
	if err != nil {
		return fmt.Errorf("making the credential: %w", err)
	}
	secrets, err := azsecrets.NewClient(args[0], cred, nil)
	if err != nil {
		return fmt.Errorf("making the client: %w", err)
	}
	got, err := secrets.GetSecret(ctx, args[1], "", nil)
	if err != nil {
		return fmt.Errorf("reading the secret: %w", err)
	}
	fmt.Println(*got.Value)
	return nil
}

func credential(who []string) (azcore.TokenCredential, error) {
	if len(who) == 0 {
		return azidentity.NewManagedIdentityCredential(nil)
	}
	if who[0] == "default" {
		return azidentity.NewDefaultAzureCredential(nil)
	}
	return azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{ID: azidentity.ClientID(who[0])})
}
