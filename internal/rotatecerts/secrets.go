package rotatecerts

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// Entries of a certificate profile may be in vaults: of Azure or of Keyfleet,
// which speak one protocol. They are read with the service principal of the
// flags, whose secret goes to the login host of the named cloud only.

// secrets reads the entries that are in vaults.
func (c *command) secrets(ctx context.Context, refs apimodel.References) (apimodel.Profile, error) {
	if len(refs) == 0 {
		return apimodel.Profile{}, nil
	}
	cfg, err := c.cloud(ctx)
	if err != nil {
		return nil, err
	}
	api, err := client.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("reading secrets: %w", err)
	}
	defer api.Close()
	return resolve(refs, cfg.Endpoints.VaultSuffix, func(url string) (string, error) {
		var secret struct{ Value string }
		err := api.Call(ctx, client.Request{Method: "GET", URL: url, Version: client.VersionVaultData}, &secret)
		return secret.Value, err
	})
}

// resolve reads each secret once: a certificate and its key may be in the same,
// and must then be of the same version.
func resolve(refs apimodel.References, suffix string, get func(url string) (string, error)) (apimodel.Profile, error) {
	p, values := apimodel.Profile{}, map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(refs)) {
		url, err := refs[name].URL(suffix)
		if err != nil {
			return nil, fault.New(fault.Invalid, "UnknownCloud", "The entry cannot be read: %s.", err).At(name).
				WithFix("write its address as https://VAULT/secrets/NAME, or name the cloud with --azure-env")
		}
		if _, ok := values[url]; !ok {
			if values[url], err = get(url); err != nil {
				return nil, notRead(name, url, err)
			}
		}
		if p[name], err = pick(name, values[url]); err != nil {
			return nil, fault.New(fault.Invalid, "SecretNotUsable", "The secret %s cannot be used: %s.", url, err).At(name).
				WithFix("put PEM (as it is or in base64) or a PKCS#12 without a password there")
		}
	}
	return p, nil
}

// notRead says why a secret could not be read. Errors of package client hold no
// credential.
func notRead(name, url string, err error) error {
	var e *client.Error
	if !errors.As(err, &e) {
		return fault.New(fault.Unavailable, "SecretNotRead", "The secret %s cannot be read.", url).At(name).Because(err)
	}
	kind, fix := fault.Invalid, e.Fix
	switch {
	case e.Status == 401 || e.Status == 403:
		kind = fault.Denied
	case e.Status == 404:
		kind = fault.NotFound
	case e.Status == 0 || e.Status >= 500:
		kind = fault.Unavailable
	}
	if fix == "" {
		fix = "check the address of the secret, and that the service principal may get secrets of the vault"
	}
	return fault.New(kind, "SecretNotRead", "The secret %s cannot be read: %s: %s", url, e.Code, e.Message).At(name).WithFix("%s", fix).Because(e.Err)
}

// pick takes out of a secret what an entry wants: the certificates, the one of
// the key first and without roots behind it, or the key, as aks-engine reads it.
func pick(name, value string) ([]byte, error) {
	text, err := unpack(value)
	if err != nil {
		return nil, err
	}
	key, noKey := pki.ParseKey(text)
	if strings.Contains(name, "PrivateKey") {
		if noKey != nil {
			return nil, noKey
		}
		if k, ok := key.(*rsa.PrivateKey); ok {
			return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}), nil
		}
		return pki.EncodeKey(key) // the check of the profile says why it cannot be used
	}
	chain, err := pki.ParseChain(text)
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return noKey == nil && pki.Matches(c, key) }); i > 0 {
		chain = slices.Concat(chain[i:i+1], chain[:i], chain[i+1:])
	}
	ders := [][]byte{chain[0].Raw}
	for _, c := range chain[1:] {
		if !bytes.Equal(c.RawIssuer, c.RawSubject) {
			ders = append(ders, c.Raw)
		}
	}
	return pki.EncodeChain(ders...), nil
}

// unpack makes PEM of what a secret holds: PEM, the same in base64, as aks-engine
// wants it, or the PKCS#12 that vaults make of certificates.
func unpack(value string) ([]byte, error) {
	if strings.Contains(value, "-----BEGIN ") {
		return []byte(value), nil
	}
	plain, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(value), ""))
	if err != nil || len(plain) == 0 {
		return nil, errors.New("it is neither PEM nor base64")
	}
	if bytes.Contains(plain, []byte("-----BEGIN ")) {
		return plain, nil
	}
	key, chain, err := pki.DecodePFX(plain, "")
	if err != nil {
		return nil, err
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		return nil, err
	}
	for _, c := range chain {
		text = append(text, pki.EncodeChain(c.Raw)...)
	}
	return text, nil
}

// cloud says where the service principal logs in and how.
func (c *command) cloud(ctx context.Context) (client.Config, error) {
	cfg, err := endpoints(c.o.azureEnv, c.Env)
	if err != nil {
		return cfg, err
	}
	if c.o.authMethod != "client_secret" || c.o.identitySystem != "azure_ad" {
		return cfg, fault.New(fault.Invalid, "LoginNotSupported", "Secrets of vaults are read with a client secret and azure_ad only, not with %s and %s.", c.o.authMethod, c.o.identitySystem).
			At("--certificate-profile").WithFix("use --auth-method client_secret, or put the PEM texts into the profile")
	}
	cfg.ClientID, cfg.ClientSecret, cfg.UserAgent = c.o.clientID, keyfleet.Secret(c.o.clientSecret), "keyfleet-rotate-certs"
	if tenant := c.Env("AZURE_TENANT_ID"); tenant != "" {
		cfg.Tenant = tenant
	}
	if cfg.Tenant == "" {
		cfg.Tenant = askTenant(ctx, cfg)
	}
	if cfg.Tenant == "" {
		return cfg, fault.New(fault.Invalid, "NoTenant", "The tenant of the service principal is not known.").At("--client-id").WithFix("set AZURE_TENANT_ID")
	}
	return cfg, nil
}

// askTenant asks the cloud without logging in; "" if it does not tell.
func askTenant(ctx context.Context, cfg client.Config) string {
	cfg.TokenSource = func(context.Context, string) (client.Token, error) {
		return client.Token{}, errors.New("nobody has logged in")
	}
	api, err := client.New(cfg)
	if err != nil {
		return ""
	}
	defer api.Close()
	return api.AskTenant(ctx)
}

// endpoints are the hosts of a cloud: of a Keyfleet server whose data directory
// is here (KEYFLEET_FROM), of one of Azure's clouds, or of one that a file
// describes (AZURE_ENVIRONMENT_FILEPATH), as Azure Stack's users have it.
func endpoints(cloud string, env func(string) string) (client.Config, error) {
	if dir := env("KEYFLEET_FROM"); dir != "" {
		return client.FromAdmin(dir)
	}
	at := func(arm, login, vaults string) client.Config {
		return client.Config{
			Endpoints: keyfleet.Endpoints{ResourceManager: strings.TrimRight(arm, "/"), Login: strings.TrimRight(login, "/"), VaultSuffix: strings.Trim(vaults, "./")},
			CAFile:    env("KEYFLEET_CA"), DialAddress: env("KEYFLEET_ADDRESS"),
		}
	}
	switch cloud {
	case "AzureCloud", "AzurePublicCloud":
		return at("https://management.azure.com", "https://login.microsoftonline.com", "vault.azure.net"), nil
	case "AzureChinaCloud":
		return at("https://management.chinacloudapi.cn", "https://login.chinacloudapi.cn", "vault.azure.cn"), nil
	case "AzureUSGovernment", "AzureUSGovernmentCloud":
		return at("https://management.usgovcloudapi.net", "https://login.microsoftonline.us", "vault.usgovcloudapi.net"), nil
	}
	path := env("AZURE_ENVIRONMENT_FILEPATH")
	if path == "" {
		return client.Config{}, fault.New(fault.Invalid, "UnknownCloud", "The endpoints of the cloud %s are not known.", cloud).At("--azure-env").
			WithFix("set AZURE_ENVIRONMENT_FILEPATH to the JSON file that describes it")
	}
	var file struct{ ResourceManagerEndpoint, ActiveDirectoryEndpoint, KeyVaultDNSSuffix string }
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")), &file)
	}
	if err == nil && (!strings.HasPrefix(file.ResourceManagerEndpoint, "https://") || !strings.HasPrefix(file.ActiveDirectoryEndpoint, "https://")) {
		err = errors.New("resourceManagerEndpoint or activeDirectoryEndpoint is missing or does not begin with https://")
	}
	if err != nil {
		return client.Config{}, fault.New(fault.Invalid, "BadCloud", "The description of the cloud in %s cannot be used: %s.", path, err).At("AZURE_ENVIRONMENT_FILEPATH").
			WithFix("correct the file; it is the one that aks-engine reads")
	}
	return at(file.ResourceManagerEndpoint, file.ActiveDirectoryEndpoint, file.KeyVaultDNSSuffix), nil
}
