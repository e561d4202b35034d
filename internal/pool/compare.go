package pool

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Change is one difference between two specs, in the resource's terms.
type Change struct {
	Path     string `json:"path"` // of the new one where it is there, else of the old one
	Old, New string // JSON; empty: not there. Protected settings show as "[redacted]"
	Mutable  bool   // whether an existing pool may change so
}

// Diff lists what differs in meaning between two specs, in path order. These
// are no differences: the casing of names that Azure compares without case; the
// order of lists without an order; null, "", [], {}, 0 and false against
// absence (in extension settings only null, [] and {}); "300" against 300 and "true" against true in extension
// settings; protected settings that the new spec does not give, for nobody can
// read them to give them back.
func Diff(old, new *Spec) []Change {
	var out []Change
	d := differ{out: &out}
	a, b := tree(old), tree(new)
	d.compare("identity", a["identity"], b["identity"])
	d.compare("properties", a["properties"], b["properties"])
	slices.SortStableFunc(out, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return out
}

// caseless are the paths whose strings Azure compares without case.
var caseless = regexp.MustCompile(`^(identity\.type|properties\.(vmSize|interNodeCommunication|taskSchedulingPolicy\.nodeFillType|` +
	`targetNodeCommunicationMode|scaleSettings\.fixedScale\.nodeDeallocationOption|networkConfiguration\..*|applicationLicenses.*|` +
	`deploymentConfiguration\.virtualMachineConfiguration\.(imageReference\.\w+|nodeAgentSkuId|licenseType|` +
	`dataDisks.*|diskEncryptionConfiguration.*|nodePlacementConfiguration.*|osDisk.*|extensions\[\d+\]\.(name|publisher|type|provisionAfterExtensions.*))))$`)

// mutable are the paths that an existing pool may change.
var mutable = regexp.MustCompile(`^properties\.(scaleSettings|metadata|displayName|targetNodeCommunicationMode)(\W.*)?$`)

// settingsPath finds the part of a path inside an extension's settings.
var settingsPath = regexp.MustCompile(`\.extensions\[\d+\]\.settings(\W|$)`)

func tree(s *Spec) map[string]any {
	v, _ := decodeTree(must(json.Marshal(s))).(map[string]any)
	if id, ok := v["identity"].(map[string]any); ok { // only which identities, by lower-case id
		ids := map[string]any{}
		for k := range s.Identity.IDs {
			ids[strings.ToLower(k)] = "assigned"
		}
		id["userAssignedIdentities"] = ids
	}
	return v
}

// decodeTree decodes JSON and keeps numbers as written.
func decodeTree(b []byte) any {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var v any
	_ = dec.Decode(&v)
	return v
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err) // a Spec always encodes
	}
	return b
}

type differ struct{ out *[]Change }

func (d differ) add(path string, old, new any) {
	show := func(v any) string {
		if v == nil {
			return ""
		}
		if strings.Contains(path, ".protectedSettings") {
			return `"[redacted]"`
		}
		return string(must(json.Marshal(v)))
	}
	*d.out = append(*d.out, Change{Path: path, Old: show(old), New: show(new), Mutable: mutable.MatchString(path)})
}

func (d differ) compare(path string, old, new any) {
	inSettings := settingsPath.MatchString(path)
	switch {
	case strings.HasSuffix(path, ".protectedSettings") && empty(new, false):
		return
	case empty(old, inSettings) && empty(new, inSettings):
		return
	case strings.HasSuffix(path, ".settings") && sameKeyVault(old, new):
		return
	}
	switch a := old.(type) {
	case map[string]any:
		if b, ok := new.(map[string]any); ok {
			d.objects(path, a, b)
			return
		}
	case []any:
		if b, ok := new.([]any); ok {
			d.arrays(path, a, b)
			return
		}
	}
	if new == nil && !inSettings {
		d.removed(path, old)
		return
	}
	if !sameScalar(path, old, new, inSettings) {
		d.add(path, old, new)
	}
}

// removed reports what is gone by its members, so that the path is exact.
func (d differ) removed(path string, old any) {
	switch v := old.(type) {
	case map[string]any:
		d.objects(path, v, map[string]any{})
	case []any:
		d.arrays(path, v, nil)
	default:
		d.add(path, old, nil)
	}
}

func (d differ) objects(path string, a, b map[string]any) {
	if strings.HasSuffix(path, ".protectedSettings") {
		if !reflect.DeepEqual(a, b) {
			d.add(path, a, b)
		}
		return
	}
	for _, k := range slices.Sorted(keys(a, b)) {
		d.compare(path+"."+k, a[k], b[k])
	}
}

func keys(ms ...map[string]any) func(func(string) bool) {
	return func(yield func(string) bool) {
		seen := map[string]bool{}
		for _, m := range ms {
			for k := range m {
				if !seen[k] && !yield(k) {
					return
				}
				seen[k] = true
			}
		}
	}
}

// arrays compares lists: extensions and metadata by name, other lists outside
// of settings without regard to order, lists in settings element by element.
func (d differ) arrays(path string, a, b []any) {
	switch {
	case strings.HasSuffix(path, ".extensions") || strings.HasSuffix(path, ".metadata"):
		d.byName(path, a, b)
		return
	case !settingsPath.MatchString(path):
		sortTree(path, a)
		sortTree(path, b)
	}
	if len(a) != len(b) {
		d.add(path, a, b)
		return
	}
	for i := range a {
		d.compare(path+"["+strconv.Itoa(i)+"]", a[i], b[i])
	}
}

func sortTree(path string, list []any) {
	key := func(v any) string {
		s := string(must(json.Marshal(v)))
		if caseless.MatchString(path) {
			s = strings.ToLower(s)
		}
		return s
	}
	slices.SortFunc(list, func(a, b any) int { return cmp.Compare(key(a), key(b)) })
}

func (d differ) byName(path string, a, b []any) {
	name := func(v any) string {
		m, _ := v.(map[string]any)
		s, _ := m["name"].(string)
		return strings.ToLower(s)
	}
	old := map[string][]any{} // in order, for a name may stand there twice
	for _, v := range a {
		old[name(v)] = append(old[name(v)], v)
	}
	for i, v := range b {
		at := path + "[" + strconv.Itoa(i) + "]"
		if o := old[name(v)]; len(o) > 0 {
			d.compare(at, o[0], v)
			old[name(v)] = o[1:]
			continue
		}
		d.add(at, nil, v)
	}
	for i, v := range slices.Backward(a) { // what is left over of a name is its last
		if o := old[name(v)]; len(o) > 0 {
			d.add(path+"["+strconv.Itoa(i)+"]", v, nil)
			old[name(v)] = o[:len(o)-1]
		}
	}
}

// empty reports whether a value means the same as absence.
func empty(v any, inSettings bool) bool {
	switch v := v.(type) {
	case nil:
		return true
	case map[string]any:
		for _, e := range v {
			if !empty(e, inSettings) {
				return false
			}
		}
		return true
	case []any:
		return len(v) == 0
	case string:
		return v == "" && !inSettings
	case bool:
		return !v && !inSettings
	case json.Number:
		f, err := v.Float64()
		return err == nil && f == 0 && !inSettings
	}
	return false
}

func sameScalar(path string, a, b any, inSettings bool) bool {
	x, xs := scalar(a)
	y, ys := scalar(b)
	if !xs || !ys {
		return false
	}
	if !inSettings && fmt.Sprintf("%T", a) != fmt.Sprintf("%T", b) {
		return false
	}
	if x == y {
		return true
	}
	if caseless.MatchString(path) && strings.EqualFold(x, y) {
		return true
	}
	if strings.HasSuffix(path, ".resizeTimeout") {
		m, err1 := ParseDuration(x)
		n, err2 := ParseDuration(y)
		return err1 == nil && err2 == nil && m == n
	}
	f, err1 := strconv.ParseFloat(x, 64)
	g, err2 := strconv.ParseFloat(y, 64)
	return err1 == nil && err2 == nil && f == g && (inSettings || isNumber(a))
}

func isNumber(v any) bool { _, ok := v.(json.Number); return ok }

// scalar renders a string, number or boolean as its text.
func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case json.Number:
		return v.String(), true
	case bool:
		return strconv.FormatBool(v), true
	}
	return "", false
}

// sameKeyVault reports whether two settings documents mean the same to the Key
// Vault extension, whatever their form. The order of certificates means nothing.
func sameKeyVault(a, b any) bool {
	x, err1 := extension.ParseKeyVaultSettings(must(json.Marshal(a)))
	y, err2 := extension.ParseKeyVaultSettings(must(json.Marshal(b)))
	if err1 != nil || err2 != nil {
		return false
	}
	for _, s := range []*extension.KeyVaultSettings{&x, &y} {
		for i := range s.Certificates {
			s.Certificates[i].Path = ""
		}
		slices.SortFunc(s.Certificates, func(a, b extension.ObservedCertificate) int {
			return cmp.Compare(a.URL+a.StoreLocation+a.LinkName(), b.URL+b.StoreLocation+b.LinkName())
		})
	}
	return reflect.DeepEqual(x, y)
}

// cannotUpdate is the error for changes that an existing pool does not take, in
// the shape that Batch's clients know; nil if all changes are allowed.
func cannotUpdate(changes []Change) error {
	e := fault.New(fault.Invalid, "PropertyCannotBeUpdated", "A property that cannot be updated was specified as part of the request.").At("BatchAccount").
		WithFix("leave the property as it is, or create another pool: extensions and the rest of the deployment configuration are fixed when a pool is created")
	for _, c := range changes {
		if c.Mutable {
			continue
		}
		reason := "The property cannot be updated"
		switch {
		case c.Old == "":
			reason += "; the pool does not have it."
		case c.New == "":
			reason += fmt.Sprintf("; the pool has %s.", c.Old)
		default:
			reason += fmt.Sprintf("; the pool has %s, the request %s.", c.Old, c.New)
		}
		e = e.WithDetail("Reason", "%s", reason).WithDetail("PropertyName", "%s", propertyName(c.Path)).WithDetail("PropertyPath", "%s", c.Path)
	}
	if len(e.Details) == 0 {
		return nil
	}
	return e
}

// propertyName is the resource's property that a path leads into.
func propertyName(path string) string {
	parts := strings.FieldsFunc(path, func(c rune) bool { return c == '.' || c == '[' })
	if len(parts) > 1 && parts[0] == "properties" {
		return parts[1]
	}
	return parts[0]
}
