package rotatecerts

import (
	"os"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
)

// readModel reads the API model and checks that it is of the cluster that the
// other flags are about. Its login user is used unless another was given.
func (o *options) readModel() (*apimodel.Model, error) {
	text, err := readFlag("--api-model", o.apiModel)
	if err != nil {
		return nil, err
	}
	m, err := apimodel.Parse(text)
	if err != nil {
		return nil, err
	}
	if o.userFromModel && m.AdminUser != "" {
		o.sshUser = m.AdminUser
	}
	return m, o.matchesModel(m)
}

// readProfile reads the file of new certificates.
func (o *options) readProfile() (apimodel.Profile, apimodel.References, error) {
	text, err := readFlag("--certificate-profile", o.profile)
	if err != nil {
		return nil, nil, err
	}
	return apimodel.ParseProfile(text)
}

// readFlag reads the file that a flag names.
func readFlag(flag, path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "NoFile", "The file cannot be read: %s.", err).At(flag).WithFix("name a file that is there and that you may read")
	}
	return text, nil
}
