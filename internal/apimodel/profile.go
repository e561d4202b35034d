package apimodel

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

// Profile are the certificates and keys of a cluster in PEM, by the names that
// [Names] lists. An entry that is missing has no key in the map. It is secret:
// printing it shows its names.
type Profile map[string][]byte

// Format writes the names of the entries, for every verb.
func (p Profile) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "certificate profile of %d entries: %s", len(p), strings.Join(slices.Sorted(maps.Keys(p)), ", "))
}

// GoString is Format, for packages that do not print through fmt.
func (p Profile) GoString() string { return fmt.Sprint(p) }

// scalars are the names of single entries, in the order of aks-engine.
func scalars() []string {
	var all []string
	for _, what := range []string{"ca", "apiServer", "client", "kubeConfig", "etcdServer", "etcdClient"} {
		all = append(all, what+"Certificate", what+"PrivateKey")
	}
	return all
}

// lists are the names of lists with an entry for each etcd member.
func lists() []string { return []string{"etcdPeerCertificates", "etcdPeerPrivateKeys"} }

// item names an entry of a list.
func item(list string, i int) string { return list + "/" + strconv.Itoa(i) }

// Names lists the entries of a whole profile, in order: caCertificate,
// caPrivateKey and the like, and for each etcd member etcdPeerCertificates/0,
// etcdPeerPrivateKeys/0 and so on.
func Names(peers int) []string {
	all := scalars()
	for _, list := range lists() {
		for i := range peers {
			all = append(all, item(list, i))
		}
	}
	return all
}

// keyOf names the entry of a certificate's key; "" if the name is not that of a certificate.
func keyOf(name string) string {
	list, i, _ := split(name)
	switch {
	case i >= 0 && list == "etcdPeerCertificates":
		return item("etcdPeerPrivateKeys", i)
	case i < 0 && strings.HasSuffix(name, "Certificate"):
		return strings.TrimSuffix(name, "Certificate") + "PrivateKey"
	}
	return ""
}

// split takes a name apart; index is -1 for single entries.
func split(name string) (list string, index int, ok bool) {
	if slices.Contains(scalars(), name) {
		return name, -1, true
	}
	list, n, _ := strings.Cut(name, "/")
	i, err := strconv.Atoi(n)
	if err != nil || i < 0 || i >= maxMasters || n != strconv.Itoa(i) || !slices.Contains(lists(), list) {
		return "", -1, false
	}
	return list, i, true
}

// length is one more than the last index of a list.
func length[V any](m map[string]V, list string) int {
	n := 0
	for name := range m {
		if l, i, ok := split(name); ok && l == list {
			n = max(n, i+1)
		}
	}
	return n
}

// ParseProfile reads a file of new certificates: the object of entries as it is
// or as the member "certificateProfile" of an object; documentation and program
// of aks-engine disagree about that. An entry is PEM or says in which vault it
// is; see [Reference].
func ParseProfile(text []byte) (Profile, References, error) {
	body, err := bodyOf(text)
	if err != nil {
		return nil, nil, named(err, "CertificateProfileNotReadable", "certificate profile")
	}
	members, err := membersOf(body)
	if err != nil {
		return nil, nil, named(err, "CertificateProfileNotReadable", "certificate profile")
	}
	r := reading{}
	switch i := slices.IndexFunc(members, func(m member) bool { return m.name == "certificateProfile" }); {
	case i >= 0 && len(members) > 1:
		return nil, nil, unusable(clip(members[1-min(i, 1)].name), "nothing may stand beside \"certificateProfile\"").WithFix("give a file with the profile only")
	case i >= 0:
		r.at = "certificateProfile."
		err = r.object(members[i].value)
	case slices.ContainsFunc(members, func(m member) bool { return m.name == "properties" }):
		return nil, nil, unusable("properties", "this is an API model").WithFix("take the profile out of it: jq .properties.certificateProfile apimodel.json > profile.json")
	default:
		err = r.members(members)
	}
	if err != nil {
		return nil, nil, err
	}
	return r.profile, r.references, nil
}

// membersOf takes an object apart.
func membersOf(text []byte) ([]member, error) {
	var whole jsontext.Value
	if err := jsonstrict.DecodeLoose(text, &whole); err != nil {
		return nil, err
	}
	dec := jsontext.NewDecoder(bytes.NewReader(whole))
	if t, err := dec.ReadToken(); err != nil || t.Kind() != '{' {
		return nil, unusable("", "it is not an object").WithFix("write {\"caCertificate\": \"-----BEGIN CERTIFICATE-----...\", ...}")
	}
	var all []member
	for dec.PeekKind() != '}' {
		name, err := dec.ReadToken()
		if err != nil {
			return nil, err
		}
		m := member{name: name.String()}
		v, err := dec.ReadValue()
		if err != nil {
			return nil, err
		}
		m.value = bytes.Clone(v)
		all = append(all, m)
	}
	return all, nil
}

// reading is a profile that is being read.
type reading struct {
	at      string // where in the file, for errors
	lenient bool   // of a model: unknown members and texts of any sort are left alone

	profile    Profile
	references References
	raw        map[string]jsontext.Value // the text of references, and of what is none and no text either
	unknown    []member
}

func (r *reading) object(text []byte) error {
	if bytes.Equal(text, []byte("null")) {
		text = []byte("{}")
	}
	all, err := membersOf(text)
	if err != nil {
		return named(err, "CertificateProfileNotReadable", "certificate profile")
	}
	return r.members(all)
}

func (r *reading) members(all []member) error {
	r.profile, r.references, r.raw = Profile{}, References{}, map[string]jsontext.Value{}
	for _, m := range all {
		var err error
		switch {
		case slices.Contains(scalars(), m.name):
			err = r.entry(m.name, m.value)
		case slices.Contains(lists(), m.name):
			err = r.list(m.name, m.value)
		case r.lenient:
			r.unknown = append(r.unknown, m)
		default:
			known := strings.Join(append(scalars(), lists()...), ", ")
			err = unusable(r.at+clip(m.name), "%q is not an entry", clip(m.name)).WithFix("remove it, or correct its spelling; the entries are %s", known)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *reading) list(name string, value jsontext.Value) error {
	if value.Kind() == 'n' {
		return nil
	}
	var items []jsontext.Value
	if value.Kind() != '[' {
		return unusable(r.at+name, "it is not a list").WithFix("write [\"...\", \"...\"], with an element for each master")
	}
	if err := json.Unmarshal(value, &items); err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	if len(items) > maxMasters {
		return unusable(r.at+name, "it has %d elements", len(items)).WithFix("give one for each master")
	}
	for i, v := range items {
		if err := r.entry(item(name, i), v); err != nil {
			return err
		}
	}
	return nil
}

// entry reads one: PEM, or where it is.
func (r *reading) entry(name string, value jsontext.Value) error {
	if value.Kind() == 'n' {
		return nil
	}
	ref, text, err := parseEntry(value)
	switch {
	case err != nil && r.lenient:
		r.raw[name] = value
	case err != nil:
		return unusable(r.at+name, "%s", err).WithFix("%s", howEntry)
	case ref != nil:
		r.references[name], r.raw[name] = *ref, value
	case text == "":
	case !r.lenient && !strings.Contains(text, "-----BEGIN "):
		return unusable(r.at+name, "it is neither PEM nor the address of a secret in a vault").WithFix("%s", howEntry)
	default:
		r.profile[name] = tidy(text)
	}
	return nil
}

const howEntry = `write the PEM text, or "https://VAULT/secrets/NAME", or "/subscriptions/SUBSCRIPTION/resourceGroups/GROUP/providers/Microsoft.KeyVault/vaults/VAULT/secrets/NAME"`

// tidy leaves out blanks around a PEM text and the carriage returns of Windows,
// which OpenSSL and Go pass over but a comparison of files does not.
func tidy(text string) []byte {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}

// unusable is an error about an entry of a profile.
func unusable(field, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "CertificateProfileNotUsable", "The certificate profile cannot be used: %s.", fmt.Sprintf(format, args...)).At(field)
}
