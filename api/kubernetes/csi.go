package kubernetes

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// The Helm release by which a manager installs the add-on [KeyVaultAddon], and its
// namespace. An ExtensionWork of that name asks for the add-on, which is there as
// soon as the driver and its kind are, whoever installed them.
const (
	AddonRelease   = "azure-keyvault-secrets-provider"
	AddonNamespace = "kube-system"
)

// Hash is the hash of what a SecretProviderClass holds, as AppliedObject has it. The
// order of members does not count.
func (p ProviderObject) Hash() (string, error) {
	var content map[string]any
	if err := json.Unmarshal(p.Spec, &content); err != nil {
		return "", fmt.Errorf("reading the SecretProviderClass %s: %w", p.Name, err)
	}
	text, err := json.Marshal(content)
	if err != nil {
		return "", fmt.Errorf("encoding the SecretProviderClass %s: %w", p.Name, err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}
