package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/client"
)

// object is an answer of the server as it came. The forms for programs print
// it unchanged, names that this version of the tool does not know included;
// tables take their columns from paths into it.
type object struct {
	raw json.RawMessage
	doc map[string]any
}

// UnmarshalJSON keeps the document and takes it apart.
func (o *object) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	o.doc = nil
	if err := d.Decode(&o.doc); err != nil {
		return err
	}
	o.raw = bytes.Clone(b)
	return nil
}

// MarshalJSON gives the document back as it came.
func (o object) MarshalJSON() ([]byte, error) {
	if o.raw == nil {
		return []byte("null"), nil
	}
	return o.raw, nil
}

// without returns a copy that lacks the named members.
func (o object) without(names ...string) object {
	c := object{doc: make(map[string]any, len(o.doc))}
	for k, v := range o.doc {
		c.doc[k] = v
	}
	for _, n := range names {
		delete(c.doc, n)
	}
	c.raw, _ = json.Marshal(c.doc) // of what was just decoded
	return c
}

// at returns what stands at a path of names ("properties.vaultUri"), nil if nothing.
func (o object) at(path string) any {
	var v any = o.doc
	for _, name := range strings.Split(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[name]
	}
	return v
}

// str returns the text of a scalar at a path, empty if there is none.
func (o object) str(path string) string {
	switch v := o.at(path).(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	case bool:
		return strconv.FormatBool(v)
	}
	return ""
}

// num returns a whole number at a path, 0 if there is none.
func (o object) num(path string) int64 {
	n, _ := strconv.ParseInt(o.str(path), 10, 64)
	return n
}

// objects returns the objects of a list at a path.
func (o object) objects(path string) []object {
	list, _ := o.at(path).([]any)
	var out []object
	for _, e := range list {
		if m, ok := e.(map[string]any); ok {
			raw, _ := json.Marshal(m) // of what was just decoded
			out = append(out, object{raw: raw, doc: m})
		}
	}
	return out
}

// strs returns the strings of a list at a path.
func (o object) strs(path string) []string {
	list, _ := o.at(path).([]any)
	var out []string
	for _, e := range list {
		if s, ok := e.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

// time returns a time at a path: RFC 3339 or seconds since 1970; zero if there is none.
func (o object) time(path string) time.Time {
	if n, ok := o.at(path).(json.Number); ok {
		if sec, err := n.Int64(); err == nil && sec != 0 {
			return time.Unix(sec, 0)
		}
		return time.Time{}
	}
	at, _ := time.Parse(time.RFC3339Nano, o.str(path))
	return at
}

// name is the last part of the object's name or id.
func (o object) name() string {
	if s := o.str("name"); s != "" {
		return s
	}
	id := strings.TrimRight(o.str("id"), "/")
	return id[strings.LastIndexByte(id, '/')+1:]
}

// group is the resource group of the object's id.
func (o object) group() string {
	id, err := arm.ParseID(o.str("id"))
	if err != nil {
		return ""
	}
	return id.ResourceGroup
}

// field is a column that shows what stands at a path.
func field(head, path string) column[object] {
	return column[object]{head: head, cell: func(o object) string { return o.str(path) }}
}

// derived is a column that is computed.
func derived(head string, cell func(o object) string) column[object] {
	return column[object]{head: head, cell: cell}
}

// timeAt is a column that shows a time.
func (t *tool) timeAt(head, path string) column[object] {
	return derived(head, func(o object) string { return t.when(o.time(path)) })
}

// only marks columns that are shown for a single object only.
func only(cs ...column[object]) []column[object] {
	for i := range cs {
		cs[i].detail = true
	}
	return cs
}

// objectView is a view of objects by their name.
func objectView(cs ...column[object]) view[object] {
	return view[object]{name: object.name, columns: cs}
}

// with adds columns to a view.
func (v view[T]) with(cs ...column[T]) view[T] {
	v.columns = append(append([]column[T](nil), v.columns...), cs...)
	return v
}

// call sends a request and decodes the object that is answered. Warnings go to standard error.
func (t *tool) call(ctx context.Context, req client.Request) (object, error) {
	o, _, err := t.callFull(ctx, req)
	return o, err
}

func (t *tool) callFull(ctx context.Context, req client.Request) (object, *client.Response, error) {
	var o object
	c, err := t.connect(ctx)
	if err != nil {
		return o, nil, err
	}
	resp, err := c.Do(ctx, req)
	if err != nil {
		return o, nil, err
	}
	t.warnings(resp)
	return o, resp, resp.Into(&o)
}

// list reads every page of a collection.
func (t *tool) list(ctx context.Context, url, version string) ([]object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return nil, err
	}
	return client.List[object](ctx, c, request(http.MethodGet, url, version, nil))
}

// find finds a resource of a subscription by its name, in the group that -g
// names or in the only group that has one.
//
// provider and typ are "Microsoft.KeyVault" and "vaults"; what is "vault".
func (t *tool) find(ctx context.Context, provider, typ, what, name, version string) (object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return object{}, err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return object{}, err
	}
	if t.flags.group != "" {
		return t.call(ctx, request(http.MethodGet, c.ARM(client.ResourceID(sub, t.flags.group, provider, typ, name)), version, nil))
	}
	all, err := t.list(ctx, c.ARM("/subscriptions/"+sub+"/providers/"+provider+"/"+typ), version)
	if err != nil {
		return object{}, err
	}
	var found []object
	for _, o := range all {
		if strings.EqualFold(o.name(), name) {
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return object{}, notFoundf("there is no %s %q in subscription %s", what, name, sub).withFix("keyfleet %s list", what)
	case 1:
		return found[0], nil
	}
	var groups []string
	for _, o := range found {
		groups = append(groups, o.group())
	}
	return object{}, usagef("there are %d of that name, in the groups %s", len(found), strings.Join(groups, ", ")).withFix("add --group NAME")
}

// listResources lists the resources of a type, in the group that -g names or in the subscription.
func (t *tool) listResources(ctx context.Context, provider, typ, version string) ([]object, error) {
	c, err := t.connect(ctx)
	if err != nil {
		return nil, err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return nil, err
	}
	scope := "/subscriptions/" + sub
	if t.flags.group != "" {
		scope = client.GroupID(sub, t.flags.group)
	}
	return t.list(ctx, c.ARM(scope+"/providers/"+provider+"/"+typ), version)
}

// newResource is the URL of a resource that is to be created, and the location
// it gets where none is named: its group's.
func (t *tool) newResource(ctx context.Context, location, provider, typ, name string) (url, loc string, err error) {
	c, err := t.connect(ctx)
	if err != nil {
		return "", "", err
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return "", "", err
	}
	group, err := t.createGroup(ctx)
	if err != nil {
		return "", "", err
	}
	if location == "" {
		g, err := t.call(ctx, request(http.MethodGet, c.ARM(client.GroupID(sub, group)), client.VersionResources, nil))
		if err != nil {
			return "", "", err
		}
		location = g.str("location")
	}
	return c.ARM(client.ResourceID(sub, group, provider, typ, name)), location, nil
}

// createGroup is the resource group in which something is created: -g, the
// context's, or the only one there is.
func (t *tool) createGroup(ctx context.Context) (string, error) {
	if t.target.Group != "" {
		return t.target.Group, nil
	}
	sub, err := t.subscription(ctx)
	if err != nil {
		return "", err
	}
	groups, err := t.client.Groups(ctx, sub)
	if err != nil {
		return "", err
	}
	switch len(groups) {
	case 0:
		return "", notFoundf("the subscription has no resource group yet").withFix("keyfleet group create rg1 --location local")
	case 1:
		return groups[0].Name, nil
	}
	return "", usagef("the subscription has %d resource groups; which one?", len(groups)).
		withFix("add --group NAME, or keyfleet context set --group NAME")
}

// tagsOf parses --tag NAME=VALUE.
func tagsOf(flags []string) (map[string]string, error) {
	if len(flags) == 0 {
		return nil, nil
	}
	tags := map[string]string{}
	for _, f := range flags {
		k, v, ok := strings.Cut(f, "=")
		if !ok || k == "" {
			return nil, usagef("--tag %s is not of the form NAME=VALUE", f)
		}
		tags[k] = v
	}
	return tags, nil
}

// seconds prints a time as Key Vault's number; nil where none is given.
func seconds(flag, value string) (*int64, error) {
	if value == "" {
		return nil, nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02"} {
		if at, err := time.Parse(layout, value); err == nil {
			sec := at.Unix()
			return &sec, nil
		}
	}
	return nil, usagef("--%s %s is no time", flag, value).withFix("--%s %s", flag, time.Unix(1893456000, 0).UTC().Format(time.RFC3339))
}

// plural prints a count with its word.
func plural(n int, word string) string {
	if n == 1 {
		return fmt.Sprintf("1 %s", word)
	}
	return fmt.Sprintf("%d %ss", n, word)
}
