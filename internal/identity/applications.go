package identity

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Application is the spec of an application: a client that has secrets.
type Application struct {
	Name     string         `json:"displayName"`
	ClientID string         `json:"appId"`
	ObjectID string         `json:"id"`
	Secrets  []ClientSecret `json:"secrets"`
}

// ClientSecret is what is stored of a client secret. The secret has 256 random
// bits, so one HMAC is enough: there is nothing to guess.
type ClientSecret struct {
	ID      string    `json:"keyId"`
	Hint    string    `json:"hint"` // its first characters, so that people can tell secrets apart
	Salt    []byte    `json:"salt"`
	MAC     []byte    `json:"mac"` // HMAC-SHA256(Salt, secret)
	Created time.Time `json:"startDateTime"`
	Expires time.Time `json:"endDateTime,omitzero"` // zero: never
}

// ApplicationObject is a stored application.
type ApplicationObject = store.Object[Application, struct{}]

// Applications is the collection of applications; ids are client ids.
var Applications = store.NewCollection[Application, struct{}]("applications")

const (
	actionApplicationRead   = "Keyfleet/applications/read"
	actionApplicationWrite  = "Keyfleet/applications/write"
	actionApplicationDelete = "Keyfleet/applications/delete"

	maxSecrets   = 10    // of one application
	secretPrefix = "kf_" // never a dash first, and easy to find in a leak
	secretSize   = 32    // bytes
	hintSize     = len(secretPrefix) + 3
)

// newSecret makes a client secret.
func newSecret() Secret {
	var b [secretSize]byte
	rand.Read(b[:])
	return Secret{secretPrefix + base64.RawURLEncoding.EncodeToString(b[:])}
}

// ParseSecret takes back a client secret that this package made: from the file
// that [Bootstrap.Keep] wrote. Others are refused, for they may be guessable.
func ParseSecret(text string) (Secret, error) {
	rest, ok := strings.CutPrefix(text, secretPrefix)
	b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if !ok || err != nil || len(b) != secretSize {
		return Secret{}, fault.New(fault.Invalid, "InvalidClientSecret", "This is not a client secret that was made here.")
	}
	return Secret{text}, nil
}

// stored makes what is kept of a secret.
func (s Secret) stored(now, expires time.Time) ClientSecret {
	salt := make([]byte, 16)
	rand.Read(salt)
	return ClientSecret{ID: newGUID(), Hint: s.value[:hintSize], Salt: salt, MAC: mac(salt, s.value), Created: now, Expires: expires}
}

func mac(salt []byte, secret string) []byte {
	h := hmac.New(sha256.New, salt)
	h.Write([]byte(secret))
	return h.Sum(nil)
}

// check compares a presented secret with all of the application's, in time that
// does not depend on them.
func (a Application) check(secret string, now time.Time) error {
	var found *ClientSecret
	for i, c := range a.Secrets {
		if hmac.Equal(mac(c.Salt, secret), c.MAC) {
			found = &a.Secrets[i]
		}
	}
	if found == nil {
		return fault.New(fault.Unauthenticated, "invalid_client",
			"Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID, for a secret added to app '%s'.", a.ClientID).
			WithInner("AADSTS7000215").WithFix("an administrator makes a new secret: keyfleet application secret add %s --to-file FILE", a.ClientID)
	}
	if !found.Expires.IsZero() && !now.Before(found.Expires) {
		return fault.New(fault.Unauthenticated, "invalid_client", "The provided client secret keys for app '%s' are expired.", a.ClientID).
			WithInner("AADSTS7000222").WithFix("an administrator makes a new secret: keyfleet application secret add %s --to-file FILE", a.ClientID)
	}
	return nil
}

// NewApplication says what application to make.
type NewApplication struct {
	Name     string
	ClientID string    // GUID; empty: a new one
	Expires  time.Time // of its first secret; zero: never
}

// CreateApplication makes an application and its first secret, which is
// returned here and never again.
func (s *Service) CreateApplication(ctx context.Context, n NewApplication) (*ApplicationObject, Secret, error) {
	if err := checkName(n.Name); err != nil {
		return nil, Secret{}, err
	}
	if n.ClientID == "" {
		n.ClientID = newGUID()
	}
	if !arm.IsGUID(n.ClientID) {
		return nil, Secret{}, fault.New(fault.Invalid, "InvalidClientId", "The client id '%.64s' is not a GUID.", n.ClientID).At("appId")
	}
	var (
		out    *ApplicationObject
		secret = newSecret()
		op     = access.Op{Action: actionApplicationWrite, Resource: "/", Detail: "create application " + n.ClientID}
	)
	err := s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) (err error) {
		out, err = s.insertApplication(tx, n, newGUID(), secret)
		return err
	})
	if err != nil {
		return nil, Secret{}, err
	}
	return out, secret, nil
}

func (s *Service) insertApplication(tx *store.Tx, n NewApplication, objectID string, secret Secret) (*ApplicationObject, error) {
	o := &ApplicationObject{Meta: store.Meta{ID: strings.ToLower(n.ClientID)}, Spec: Application{
		Name: n.Name, ClientID: n.ClientID, ObjectID: objectID,
		Secrets: []ClientSecret{secret.stored(s.cfg.Now().UTC(), n.Expires)},
	}}
	err := insertPrincipal(tx, objectID, Principal{Kind: access.Application, ClientID: n.ClientID, Name: n.Name, Ref: o.ID})
	if err != nil {
		return nil, err
	}
	return o, Applications.Insert(tx, o)
}

func checkName(name string) error {
	if name == "" || len(name) > 120 || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' }) {
		return fault.New(fault.Invalid, "InvalidDisplayName", "A display name has 1 to 120 characters without control characters.").At("displayName")
	}
	return nil
}

// ListApplications returns all applications, by client id.
func (s *Service) ListApplications(ctx context.Context) ([]*ApplicationObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionApplicationRead, Resource: "/"}); err != nil {
		return nil, err
	}
	return Applications.List(s.cfg.Store.View(ctx), "")
}

// Application returns an application by client id.
func (s *Service) Application(ctx context.Context, clientID string) (*ApplicationObject, error) {
	if err := s.cfg.Gate.Read(ctx, access.Op{Action: actionApplicationRead, Resource: "/", Detail: "application " + clip(clientID)}); err != nil {
		return nil, err
	}
	return lookupApplication(s.cfg.Store.View(ctx), clientID)
}

// DeleteApplication deletes an application with its role assignments; its
// tokens die within 5 seconds. It reports whether there was one. The last
// Owner at "/" cannot be deleted.
func (s *Service) DeleteApplication(ctx context.Context, clientID string) (existed bool, err error) {
	op := access.Op{Action: actionApplicationDelete, Resource: "/", Detail: "application " + clip(clientID)}
	err = s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := Applications.Lookup(tx, strings.ToLower(clientID))
		if existed = o != nil; err != nil || o == nil {
			return err
		}
		if err := s.removePrincipal(tx, o.Spec.ObjectID, o.Spec.ClientID); err != nil {
			return err
		}
		return Applications.Delete(tx, o.ID)
	})
	return existed, err
}

// AddSecret makes a further secret for an application; the zero expiry means
// never. The secret is returned here and never again.
func (s *Service) AddSecret(ctx context.Context, clientID string, expires time.Time) (ClientSecret, Secret, error) {
	secret := newSecret()
	stored := secret.stored(s.cfg.Now().UTC(), expires)
	op := access.Op{Action: actionApplicationWrite, Resource: "/", Detail: "add secret " + stored.ID + " to application " + clip(clientID)}
	err := s.changeApplication(ctx, op, clientID, func(a *Application) error {
		if len(a.Secrets) >= maxSecrets {
			return fault.New(fault.Conflict, "TooManySecrets", "The application has %d secrets already; more are not possible.", len(a.Secrets)).
				WithFix("remove one: keyfleet application secret remove %s SECRET-ID", a.ClientID)
		}
		a.Secrets = append(slices.Clone(a.Secrets), stored)
		return nil
	})
	if err != nil {
		return ClientSecret{}, Secret{}, err
	}
	return stored, secret, nil
}

// RemoveSecret removes a secret of an application; an absent one is no error.
// Tokens that were got with it live until they expire.
func (s *Service) RemoveSecret(ctx context.Context, clientID, keyID string) error {
	op := access.Op{Action: actionApplicationWrite, Resource: "/", Detail: "remove secret " + clip(keyID) + " of application " + clip(clientID)}
	return s.changeApplication(ctx, op, clientID, func(a *Application) error {
		a.Secrets = slices.DeleteFunc(slices.Clone(a.Secrets), func(c ClientSecret) bool { return strings.EqualFold(c.ID, keyID) })
		return nil
	})
}

func (s *Service) changeApplication(ctx context.Context, op access.Op, clientID string, change func(*Application) error) error {
	return s.cfg.Gate.Change(ctx, s.cfg.Store, op, func(tx *store.Tx) error {
		o, err := lookupApplication(tx, clientID)
		if err != nil {
			return err
		}
		if err := change(&o.Spec); err != nil {
			return err
		}
		return Applications.Put(tx, o)
	})
}

func lookupApplication(tx *store.Tx, clientID string) (*ApplicationObject, error) {
	o, err := Applications.Lookup(tx, strings.ToLower(clientID))
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fault.New(fault.NotFound, "ApplicationNotFound", "There is no application with client id '%s'.", clip(clientID))
	}
	return o, nil
}
