package vault

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"regexp"
	"sort"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Limits of what is in a vault (Key Vault, service limits).
const (
	maxSecret      = 25 << 10 // bytes of a secret's value
	maxContentType = 255
	maxTags        = 15
	maxPage        = 25 // items on a page of a list
)

// none is the status of collections that have none.
type none struct{}

// Attributes are the attributes of a version, with the recovery level of its vault.
type Attributes struct {
	Enabled         bool
	NotBefore       time.Time // zero: none
	Expires         time.Time // zero: none
	Created         time.Time
	Updated         time.Time
	RecoveryLevel   string
	RecoverableDays int
}

// Change is what a caller sets on a version. A nil field stays as it is.
type Change struct {
	Enabled     *bool
	NotBefore   *time.Time
	Expires     *time.Time
	ContentType *string
	Tags        map[string]string // nil: not sent
}

// Page asks for a part of a list.
type Page struct {
	After string // cursor of the page before; empty: from the start
	Max   int    // items; zero or more than 25: 25
}

// head is what stands above the versions of a secret.
type head struct {
	Name    string    `json:"name"`              // as first written
	Current string    `json:"current,omitempty"` // newest version
	Managed bool      `json:"managed,omitempty"` // belongs to the certificate of the same name
	Deleted *Deletion `json:"deleted,omitempty"`
	Purging bool      `json:"purging,omitempty"` // on its way out for good
}

var itemName = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)

var itemVersion = regexp.MustCompile(`^[0-9a-f]{32}$`)

// itemID checks an object's name and returns the store id of its head.
func itemID(vault, kind, name string) (string, error) {
	if !itemName.MatchString(name) {
		return "", fault.New(fault.Invalid, "BadParameter", "The request URI contains an invalid name: %s. A name has 1 to 127 letters, digits and hyphens.", name).At(kind + "-name").WithFix("use another name")
	}
	return lower(vault) + "/" + lower(name), nil
}

// newVersion returns 32 random hex digits.
func newVersion() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// check refuses attributes and tags that cannot be.
func (c *Change) check(prefix string) error {
	if c.ContentType != nil && len(*c.ContentType) > maxContentType {
		return fault.New(fault.Invalid, "BadParameter", "The content type has more than %d characters.", maxContentType).At(prefix + "contentType")
	}
	if len(c.Tags) > maxTags {
		return fault.New(fault.Invalid, "BadParameter", "There are at most %d tags; these are %d.", maxTags, len(c.Tags)).At(prefix + "tags")
	}
	for k, val := range c.Tags {
		if len(k) > maxTagLength || len(val) > maxTagLength {
			return fault.New(fault.Invalid, "BadParameter", "A tag's name and value have at most %d characters.", maxTagLength).At(prefix + "tags." + k)
		}
	}
	return nil
}

// checkTimes refuses an expiry that is not after the start.
func checkTimes(notBefore, expires time.Time) error {
	if !notBefore.IsZero() && !expires.IsZero() && !expires.After(notBefore) {
		return fault.New(fault.Invalid, "BadParameter", "The expiry (exp) is not after the start (nbf).").At("attributes.exp")
	}
	return nil
}

// notFound is the answer for an object or a version that is not there.
func notFound(kind, name, version string) error {
	code := map[string]string{"secret": "SecretNotFound", "certificate": "CertificateNotFound"}[kind]
	id := name
	if version != "" {
		id += "/" + version
	}
	return fault.New(fault.NotFound, code, "A %s with (name/id) %s was not found in this key vault.", kind, id)
}

// inTheWay is the answer where a deleted object still has the name.
func inTheWay(kind, name string, purging bool) error {
	if purging {
		return fault.New(fault.Conflict, "Conflict", "The %s %s is being purged; its name comes free in a moment.", kind, name).WithInner("ObjectIsBeingDeleted").After(time.Second)
	}
	return fault.New(fault.Conflict, "Conflict",
		"%s %s is currently in a deleted but recoverable state, and its name cannot be reused; in this state, the %s can only be recovered or purged.",
		title(kind), name, kind).WithInner("ObjectIsDeletedButRecoverable").WithFix("keyfleet %s recover %s, or keyfleet %s purge %s", kind, name, kind, name)
}

func title(kind string) string {
	if kind == "secret" {
		return "Secret"
	}
	return "Certificate"
}

// purgeForbidden is the answer of a vault with purge protection.
func purgeForbidden(vault string) error {
	return fault.New(fault.Denied, "Forbidden", "Operation \"purge\" is not allowed because purge protection is enabled for the vault '%s'.", vault).WithInner("ForbiddenByPolicy")
}

// page cuts a page out of a sorted list. key is the cursor of an item; next is
// empty on the last page.
func page[T any](list []T, p Page, key func(T) string) (items []T, next string) {
	n := p.Max
	if n <= 0 || n > maxPage {
		n = maxPage
	}
	start := 0
	if p.After != "" {
		start = sort.Search(len(list), func(i int) bool { return key(list[i]) > p.After })
	}
	list = list[start:]
	if len(list) <= n {
		return list, ""
	}
	return list[:n], key(list[n-1])
}

// removeAll removes all objects under a prefix, in transactions small enough
// for every backend (etcd allows 128 operations). A crash in between leaves less
// to do for the next call.
func removeAll[S, T any](ctx context.Context, s *store.Store, c store.Collection[S, T], prefix string) error {
	const chunk = 60
	list, err := c.List(s.View(ctx), prefix)
	if err != nil {
		return err
	}
	for len(list) > 0 {
		part := list[:min(chunk, len(list))]
		list = list[len(part):]
		err := s.Update(ctx, func(tx *store.Tx) error {
			for _, o := range part {
				if err := c.Delete(tx, o.ID); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
