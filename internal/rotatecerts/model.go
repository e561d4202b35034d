package rotatecerts

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"syscall"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// model gives the engine what the API model and the certificate profile have.
func (c *command) model(ctx context.Context, s *session, e *rotation.Engine) error {
	if s.model != nil {
		e.Profile = s.model.Profile
		e.SaveProfile = func(_ context.Context, entries map[string][]byte) error {
			return saveModel(c.o.apiModel, s.model.Location, entries)
		}
	}
	made, err := rotation.Made(e.Journal)
	if err != nil || made { // what was given then is sealed in the journal
		return err
	}
	if err := c.checkGiven(ctx, s, e.Observed); err != nil {
		return err
	}
	e.Given, err = c.given(ctx)
	return err
}

// given reads the certificate profile that the operator gives, and what it names
// in a vault, once: a secret that is renewed in between is not used unchecked.
// It is nil if there is none.
func (c *command) given(ctx context.Context) (apimodel.Profile, error) {
	if c.o.profile == "" || c.profile != nil {
		return c.profile, nil
	}
	text, err := os.ReadFile(c.o.profile)
	if err != nil {
		return nil, fault.New(fault.Invalid, "NoCertificateProfile", "The certificate profile cannot be read: %s.", err).At("--certificate-profile")
	}
	p, refs, err := apimodel.ParseProfile(text)
	if err != nil {
		return nil, err
	}
	if len(refs) > 0 {
		more, err := c.secrets(ctx, refs)
		if err != nil {
			return nil, err
		}
		maps.Copy(p, more)
	}
	c.profile = p
	return p, nil
}

// checkGiven refuses a certificate profile that the cluster could not live with.
func (c *command) checkGiven(ctx context.Context, s *session, o rotation.Observation) error {
	p, err := c.given(ctx)
	if err != nil || p == nil {
		return err
	}
	if s.model == nil {
		return usage("--certificate-profile", "clusters of the layout %s make their keys where they are used, so that no profile can hold them", s.layout.Name)
	}
	if len(c.o.only) > 0 {
		return usage("--certificate-profile", "a profile replaces everything, so --only cannot be given with it")
	}
	served := map[string]apimodel.ServedNames{}
	certs, err := o.Entries()
	if err != nil {
		return err
	}
	for entry, cert := range certs {
		served[entry] = apimodel.ServedNames{DNS: cert.DNSNames, IPs: cert.IPAddresses}
	}
	if err := apimodel.Check(p, apimodel.Requirements{Now: o.At, Peers: s.model.Masters, Served: served}); err != nil {
		return err
	}
	if same, err := rotation.SameSubject(o, p["caCertificate"]); err != nil {
		return err
	} else if same {
		c.warn("Warning: the new CA has the name of the old one. Programs of the cluster accept both; clients with OpenSSL that know only the old CA are refused from the switch on.")
	}
	return nil
}

// saveModel changes entries of the API model's certificate profile, and the
// administrator's kubeconfig that is kept beside it, if there is one.
func saveModel(path, location string, entries map[string][]byte) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fault.New(fault.Unavailable, "NoAPIModel", "The API model cannot be read: %s.", err).At("--api-model")
	}
	m, err := apimodel.Parse(text)
	if err != nil {
		return err
	}
	profile := maps.Clone(m.Profile)
	maps.Copy(profile, entries)
	next, err := m.With(profile)
	if err != nil {
		return err
	}
	if err := apimodel.WriteFile(path, next); err != nil {
		return err
	}
	return saveKubeconfig(filepath.Join(filepath.Dir(path), "kubeconfig", "kubeconfig."+location+".json"), entries)
}

// saveKubeconfig gives the kubeconfig that aks-engine wrote, in JSON, the new
// administrator's certificate.
func saveKubeconfig(path string, entries map[string][]byte) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the kubeconfig beside the API model: %w", err)
	}
	var doc map[string]any
	if err := json.Unmarshal(text, &doc); err != nil {
		return fault.New(fault.Invalid, "BadKubeconfig", "%s is not the JSON that aks-engine writes: %s.", path, err).
			WithFix("move it away; the new one is on every master in ~/.kube/config")
	}
	set := func(list, inner string, values map[string][]byte) {
		all, _ := doc[list].([]any)
		for _, named := range all {
			outer, _ := named.(map[string]any)
			part, _ := outer[inner].(map[string]any)
			for field, value := range values {
				if _, has := part[field]; has && len(value) > 0 {
					part[field] = base64.StdEncoding.EncodeToString(value)
				}
			}
		}
	}
	set("clusters", "cluster", map[string][]byte{"certificate-authority-data": entries["caCertificate"]})
	set("users", "user", map[string][]byte{"client-certificate-data": entries["kubeConfigCertificate"], "client-key-data": entries["kubeConfigPrivateKey"]})
	next, err := json.MarshalIndent(doc, "", "    ")
	if err != nil {
		return fmt.Errorf("writing the kubeconfig beside the API model: %w", err)
	}
	return apimodel.WriteFile(path, append(next, '\n'))
}
