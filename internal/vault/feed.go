package vault

import (
	"context"
	"net/url"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/reconcile"
	"keyfleet.dev/keyfleet/internal/store"
)

// Feed tells others which secrets have a new newest version. It is a hint, not
// an authority: it carries no value, and whoever follows it reads the secret
// with an identity of its own.
type Feed struct {
	store *store.Store

	mu    sync.Mutex
	known map[string]seen // by head id; guarded by mu
}

// seen is the newest version of a secret, and the store's revision it came with.
type seen struct {
	version  string // empty: there is none, or it is deleted
	revision int64
}

// Follow calls fn for every secret there is, and then whenever the newest
// version of one changes, milliseconds after the commit, until ctx ends or fn
// fails. A secret that is deleted, or comes back, counts as changed. Names are
// in lower case. When fn is called, Revision answers that revision already.
func (f *Feed) Follow(ctx context.Context, fn func(vault, secret string, revision int64) error) error {
	told := map[string]string{} // by head id: the newest version that fn knows of
	return secrets.Follow(ctx, f.store, "", func(ch store.Change[head, none]) error {
		if ch.ID == "" {
			return nil
		}
		version := newestOf(ch.Object)
		old, ok := told[ch.ID]
		if ch.Object == nil {
			delete(told, ch.ID)
		} else {
			told[ch.ID] = version
		}
		if ok && old == version {
			return nil
		}
		f.note(ch.ID, version, ch.Revision)
		vault, secret := splitID(ch.ID)
		return fn(vault, secret, ch.Revision)
	})
}

// newestOf is the version that a reader without a version gets; empty if none.
func newestOf(h *secretHead) string {
	if h == nil || h.Spec.Deleted != nil {
		return ""
	}
	return h.Spec.Current
}

// note remembers a change, unless another follower was faster.
func (f *Feed) note(id, version string, revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.known[id]; revision > old.revision && (version != old.version || old.revision == 0) {
		f.known[id] = seen{version, revision}
	}
}

// Revision returns the store's revision at which the newest version of a secret
// last changed, as far as Follow has seen; 0 if the secret is not known.
func (f *Feed) Revision(vault, secret string) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.known[lower(vault)+"/"+lower(secret)].revision
}

// Answers to whether an identity can read a secret.
const (
	Yes     = "yes"
	No      = "no"
	Unknown = "unknown" // it could not be found out
)

// Verdict says whether an identity can read a secret now, and if not, why and what to do.
type Verdict struct {
	Answer  string
	Code    string
	Message string
	Fix     string
}

// Check finds out whether the identity can read a secret now; version "" is the
// newest. It leaves no audit record, for nothing is read.
func (v *Vaults) Check(ctx context.Context, identity access.Principal, vault, secret, version string) Verdict {
	err := v.check(ctx, identity, vault, secret, version)
	if err == nil {
		return Verdict{Answer: Yes}
	}
	f := fault.From(err)
	out := Verdict{Answer: No, Code: f.Code, Message: f.Message, Fix: f.Fix}
	switch f.Kind {
	case fault.NotFound, fault.Denied, fault.Invalid, fault.Unauthenticated:
	default:
		out.Answer, out.Code = Unknown, "Unavailable"
		if out.Message == "" {
			out.Message = "Whether the identity can read the secret could not be found out."
		}
	}
	return out
}

func (v *Vaults) check(ctx context.Context, identity access.Principal, vault, secret, version string) error {
	tx := v.store.View(ctx)
	vt, err := vaults.Lookup(tx, lower(vault))
	if err != nil {
		return err
	}
	if vt == nil || vt.Spec.Deleted != nil || !vt.Deleting.IsZero() {
		return fault.New(fault.NotFound, "VaultNotFound", "The vault '%s' does not exist.", vault).WithFix("keyfleet vault create %s", vault)
	}
	if err := v.gate.CanAs(ctx, identity, v.op(vt, "secrets/get", secretPath(secret, version), "")); err != nil {
		return err
	}
	h, obj, err := findSecret(tx, vt.ID, secret, version)
	if err != nil {
		return err
	}
	if obj.Spec.Disabled {
		return fault.New(fault.Denied, "SecretDisabled", "The secret %s is disabled.", h.Spec.Name).WithFix("keyfleet secret set-attributes %s --enabled true", h.Spec.Name)
	}
	return nil
}

// SecretURL is a secret's URL taken apart. Names are as written.
type SecretURL struct {
	Vault   string // lower case
	Name    string
	Version string // empty: the newest, whichever it is at the time
}

// ParseSecretURL takes the URL of a secret apart:
//
//	https://VAULT.SUFFIX/secrets/NAME[/VERSION]
//
// suffixes are the host suffixes of the vaults here, without port. A URL of
// another form is a fault.Invalid that says what is wrong; a well-formed URL of a vault
// elsewhere is a fault.NotFound with code VaultNotHosted.
func ParseSecretURL(raw string, suffixes []string) (SecretURL, error) {
	wrong := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "InvalidSecretURL", "'"+strings.ReplaceAll(short(raw), "%", "%%")+"' is not the URL of a secret: "+format+".", args...).
			WithFix("write it like https://VAULT.%s/secrets/NAME", firstOf(suffixes))
	}
	u, err := url.Parse(raw)
	switch {
	case len(raw) > 2048:
		return SecretURL{}, wrong("it has over 2048 characters")
	case err != nil:
		return SecretURL{}, wrong("it is not a URL")
	case !strings.EqualFold(u.Scheme, "https"):
		return SecretURL{}, wrong("it does not start with https://")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery:
		return SecretURL{}, wrong("it has more than host and path")
	}
	parts := strings.Split(strings.TrimSuffix(strings.TrimPrefix(u.Path, "/"), "/"), "/")
	switch {
	case len(parts) >= 1 && strings.EqualFold(parts[0], "certificates"):
		return SecretURL{}, wrong("the path /certificates holds no private key; the secret of the same name does")
	case len(parts) < 2 || len(parts) > 3 || !strings.EqualFold(parts[0], "secrets"):
		return SecretURL{}, wrong("the path is not /secrets/NAME or /secrets/NAME/VERSION")
	case !itemName.MatchString(parts[1]):
		return SecretURL{}, wrong("a name has 1 to 127 letters, digits and hyphens")
	}
	out := SecretURL{Name: parts[1]}
	if len(parts) == 3 {
		if out.Version = parts[2]; !itemVersion.MatchString(lower(out.Version)) {
			return SecretURL{}, wrong("a version has 32 hexadecimal digits")
		}
	}
	host := lower(u.Hostname())
	for _, suffix := range suffixes {
		if name, ok := strings.CutSuffix(host, "."+lower(suffix)); ok && vaultName.MatchString(name) {
			out.Vault = name
			return out, nil
		}
	}
	return out, fault.New(fault.NotFound, "VaultNotHosted", "The vault at '%s' is not one of this server.", short(host)).
		WithFix("use a vault under %s, or start the server with --host-alias SUFFIX=vault", firstOf(suffixes))
}

func short(s string) string {
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}

func firstOf(list []string) string {
	if len(list) == 0 {
		return "vault.DOMAIN"
	}
	return list[0]
}

// Renewal is how a certificate stands, for people and metrics. Next is in policy time.
type Renewal struct {
	Vault       string
	Name        string
	Version     string    // newest; empty: none yet
	Issued      time.Time // when that version was stored, in real time; of [Vaults.Renewal] only
	NotBefore   time.Time
	NotAfter    time.Time
	Next        time.Time // when the next version is due; zero: never by itself
	MailDue     time.Time // when EmailContacts became due; no mail was sent
	Failing     bool      // the last attempt failed
	Stalled     bool      // given up until NextAttempt, or until the policy changes
	Reason      string    // of the failure
	Message     string
	Since       time.Time // of the failure
	NextAttempt time.Time // zero: when the policy changes
}

// Certificates lists how all certificates in use stand. It is for the server's
// own metrics: it holds names and dates only, and is not recorded.
func (v *Vaults) Certificates(ctx context.Context) ([]Renewal, error) {
	open, err := v.list(ctx, func(vt *Vault) bool { return vt.Deleted == nil })
	if err != nil {
		return nil, err
	}
	inUse := make(map[string]bool, len(open))
	for _, vt := range open {
		inUse[lower(vt.Name)] = true
	}
	list, err := certificates.List(v.store.View(ctx), "")
	if err != nil {
		return nil, err
	}
	out := make([]Renewal, 0, len(list))
	for _, o := range list {
		if vault, _ := splitID(o.ID); o.Spec.Deleted == nil && inUse[vault] {
			out = append(out, renewalOf(o))
		}
	}
	return out, nil
}

// Renewal tells how a certificate stands to whoever may get it.
func (v *Vaults) Renewal(ctx context.Context, vault, name string) (Renewal, error) {
	vt, err := v.read(ctx, vault, "certificates/get", "certificates/"+lower(name))
	if err != nil {
		return Renewal{}, err
	}
	tx := v.store.View(ctx)
	obj, newest, err := findCertificate(tx, vt.ID, name, "")
	if err != nil {
		return Renewal{}, err
	}
	r := renewalOf(obj)
	if newest != nil {
		r.Issued = newest.Created
	}
	return r, nil
}

func renewalOf(o *certificateObject) Renewal {
	vault, _ := splitID(o.ID)
	r := Renewal{
		Vault: vault, Name: o.Spec.Name, Version: o.Status.Current, NotBefore: o.Status.NotBefore, NotAfter: o.Status.NotAfter,
		Next: renewAt(&o.Spec, &o.Status), MailDue: o.Status.MailDue,
	}
	ready, again, stalled := o.Condition(reconcile.Ready), o.Condition(reconcile.Reconciling), o.Condition(reconcile.Stalled)
	if ready.Type == "" || ready.Status {
		return r
	}
	r.Failing, r.Stalled, r.Reason, r.Message, r.Since, r.NextAttempt = true, stalled.Status, ready.Reason, ready.Message, ready.Since, again.NextAttempt
	if stalled.Status {
		r.NextAttempt = stalled.NextAttempt
	}
	return r
}
