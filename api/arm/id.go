// Package arm holds the wire types of Azure Resource Manager that all
// resource providers share: resource ids, the error envelope, lists.
// It is a leaf: plain structs, no behaviour beyond parsing and printing.
package arm

import (
	"fmt"
	"strings"
)

// ID is a parsed resource id. Names keep the caller's casing; compare with
// [ID.Key], which is lower case.
//
//	/subscriptions/S/resourceGroups/G/providers/NS/TYPE/NAME[/TYPE/NAME...]
type ID struct {
	Subscription  string
	ResourceGroup string   // empty for subscription-level ids
	Provider      string   // "Microsoft.Batch"; empty for groups and subscriptions
	Types         []string // "batchAccounts", "pools"
	Names         []string // "acct1", "pool1"
}

// ParseID parses a resource id. The fixed words are matched case-insensitively;
// every part must be there and not empty.
func ParseID(s string) (ID, error) {
	var id ID
	if !strings.HasPrefix(s, "/") {
		return id, fmt.Errorf("resource id %q does not start with a slash", s)
	}
	if len(s) > 2048 {
		return id, fmt.Errorf("resource id is longer than 2048 characters")
	}
	parts := strings.Split(strings.TrimSuffix(s[1:], "/"), "/")
	for _, p := range parts {
		if p == "" {
			return id, fmt.Errorf("resource id %q has an empty part", s)
		}
	}
	if len(parts) < 2 || !strings.EqualFold(parts[0], "subscriptions") {
		return id, fmt.Errorf("resource id %q does not start with /subscriptions/ID", s)
	}
	id.Subscription = parts[1]
	parts = parts[2:]
	if len(parts) >= 2 && strings.EqualFold(parts[0], "resourceGroups") {
		id.ResourceGroup = parts[1]
		parts = parts[2:]
	}
	if len(parts) == 0 {
		return id, nil
	}
	if len(parts) < 4 || len(parts)%2 != 0 || !strings.EqualFold(parts[0], "providers") {
		return id, fmt.Errorf("resource id %q does not continue with /providers/NAMESPACE/TYPE/NAME", s)
	}
	id.Provider = parts[1]
	for i := 2; i < len(parts); i += 2 {
		id.Types = append(id.Types, parts[i])
		id.Names = append(id.Names, parts[i+1])
	}
	return id, nil
}

// String prints the id with the standard casing of the fixed words.
func (id ID) String() string {
	var b strings.Builder
	b.WriteString("/subscriptions/" + id.Subscription)
	if id.ResourceGroup != "" {
		b.WriteString("/resourceGroups/" + id.ResourceGroup)
	}
	if id.Provider != "" {
		b.WriteString("/providers/" + id.Provider)
		for i := range id.Types {
			b.WriteString("/" + id.Types[i] + "/" + id.Names[i])
		}
	}
	return b.String()
}

// Key is the id in lower case: two ids name the same resource when their keys are equal.
func (id ID) Key() string { return strings.ToLower(id.String()) }

// Name is the last name; the group's or the subscription's where there is no provider.
func (id ID) Name() string {
	switch {
	case len(id.Names) > 0:
		return id.Names[len(id.Names)-1]
	case id.ResourceGroup != "":
		return id.ResourceGroup
	}
	return id.Subscription
}

// Type is "NAMESPACE/TYPE[/TYPE...]".
func (id ID) Type() string { return id.Provider + "/" + strings.Join(id.Types, "/") }

// Is reports whether the id is of the type, case-insensitively.
func (id ID) Is(typ string) bool { return strings.EqualFold(id.Type(), typ) }

// StoreKey is the id as a store id: subscription, group and names, lower case, joined by "/".
func (id ID) StoreKey() string {
	return strings.ToLower(strings.Join(append([]string{id.Subscription, id.ResourceGroup}, id.Names...), "/"))
}

// ErrorBody is ARM's error envelope.
type ErrorBody struct {
	Error Error `json:"error"`
}

// Error is the inner part of the envelope.
type Error struct {
	Code       string      `json:"code"`
	Message    string      `json:"message"`
	Target     string      `json:"target,omitempty"`
	Details    []Error     `json:"details,omitempty"`
	InnerError *InnerError `json:"innererror,omitempty"`
}

// InnerError carries the code that Key Vault clients look at.
type InnerError struct {
	Code string `json:"code"`
}

// List is a page of a collection.
type List[T any] struct {
	Value    []T    `json:"value"`
	NextLink string `json:"nextLink,omitempty"`
}
