package scextension

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	core "k8s.io/api/core/v1"
)

// The contract of azure-workload-identity: annotations of ServiceAccounts and pods,
// and what containers find.
const (
	identityClient   = "azure.workload.identity/client-id"
	identityTenant   = "azure.workload.identity/tenant-id"
	identityLifetime = "azure.workload.identity/service-account-token-expiration" // seconds; the pod's counts more than the account's
	identitySkip     = "azure.workload.identity/skip-containers"                  // names, with ';' between

	tokenAudience = "api://AzureADTokenExchange"
	tokenFolder   = "/var/run/secrets/azure/wi"
	tokenPath     = "token/azure-identity-token" // below tokenFolder

	shortestLife = 3600 // of a token, in seconds; also the default
	longestLife  = 86400
)

// identity is what the webhook gives to pods besides their token.
type identity struct {
	tenant    string // of accounts that name none
	authority string // URL of the token endpoint
}

// operation is one of a JSON patch (RFC 6902). There are none but additions.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// inject says what is added to a pod so that it can log in with its ServiceAccount:
// a token that the kubelet renews, and variables that say where it is and whom it is
// for. What a container has already is never replaced, so a second time adds nothing.
func inject(pod *core.Pod, account *core.ServiceAccount, give identity) ([]operation, error) {
	life, err := tokenLife(pod, account)
	if err != nil {
		return nil, err
	}
	tenant := account.Annotations[identityTenant]
	if tenant == "" {
		tenant = give.tenant
	}
	variables := []core.EnvVar{
		{Name: "AZURE_CLIENT_ID", Value: account.Annotations[identityClient]},
		{Name: "AZURE_TENANT_ID", Value: tenant},
		{Name: "AZURE_FEDERATED_TOKEN_FILE", Value: tokenFolder + "/" + tokenPath},
		{Name: "AZURE_AUTHORITY_HOST", Value: give.authority},
	}
	volume := tokenVolume(pod)
	var skip []string
	for name := range strings.SplitSeq(pod.Annotations[identitySkip], ";") {
		skip = append(skip, strings.TrimSpace(name))
	}
	var out []operation
	for list, all := range map[string][]core.Container{"containers": pod.Spec.Containers, "initContainers": pod.Spec.InitContainers} {
		for i, c := range all {
			if slices.Contains(skip, c.Name) {
				continue
			}
			at := fmt.Sprintf("/spec/%s/%d", list, i)
			out = append(out, addTo(at+"/env", c.Env, missing(c.Env, variables))...)
			if !slices.ContainsFunc(c.VolumeMounts, func(m core.VolumeMount) bool { return m.MountPath == tokenFolder || m.Name == volume }) {
				out = append(out, addTo(at+"/volumeMounts", c.VolumeMounts, []core.VolumeMount{{Name: volume, MountPath: tokenFolder, ReadOnly: true}})...)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b operation) int { return strings.Compare(a.Path, b.Path) })
	if len(out) > 0 && !slices.ContainsFunc(pod.Spec.Volumes, func(v core.Volume) bool { return v.Name == volume }) {
		out = append(out, addTo("/spec/volumes", pod.Spec.Volumes, []core.Volume{projectedToken(volume, life)})...)
	}
	return out, nil
}

// missing are the variables that have a value and are not set already.
func missing(have, all []core.EnvVar) []core.EnvVar {
	var out []core.EnvVar
	for _, v := range all {
		if v.Value != "" && !slices.ContainsFunc(have, func(h core.EnvVar) bool { return h.Name == v.Name }) {
			out = append(out, v)
		}
	}
	return out
}

// addTo adds to a list of a pod, which may not be there yet.
func addTo[T any](path string, have, more []T) []operation {
	if len(more) == 0 {
		return nil
	}
	if len(have) == 0 {
		return []operation{{"add", path, more}}
	}
	var out []operation
	for _, m := range more {
		out = append(out, operation{"add", path + "/-", m})
	}
	return out
}

// tokenLife is for how long a pod's tokens are valid, in seconds.
func tokenLife(pod *core.Pod, account *core.ServiceAccount) (int64, error) {
	for _, annotations := range []map[string]string{pod.Annotations, account.Annotations} {
		text := annotations[identityLifetime]
		if text == "" {
			continue
		}
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("token expiration %.40q of the annotation %s is not a number of seconds", text, identityLifetime)
		}
		if seconds < shortestLife || seconds > longestLife {
			return 0, fmt.Errorf("token expiration %d not valid. Expected value to be between %d and %d", seconds, shortestLife, longestLife)
		}
		return seconds, nil
	}
	return shortestLife, nil
}

// tokenVolume names the volume of a pod's token. The name depends on that of the
// pod, so that no template can have one of its own under it by chance.
func tokenVolume(pod *core.Pod) string {
	name := pod.Name
	if name == "" {
		name = pod.GenerateName
	}
	sum := sha256.Sum256([]byte(name))
	return "azure-workload-identity-reserved-" + hex.EncodeToString(sum[:4])
}

func projectedToken(name string, life int64) core.Volume {
	return core.Volume{Name: name, VolumeSource: core.VolumeSource{Projected: &core.ProjectedVolumeSource{Sources: []core.VolumeProjection{
		{ServiceAccountToken: &core.ServiceAccountTokenProjection{Audience: tokenAudience, ExpirationSeconds: &life, Path: tokenPath}},
	}}}}
}
