package connector

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/journal"
	"keyfleet.dev/keyfleet/internal/store"
)

// A credential that Keyfleet makes is changed in two parts, each a journal: what
// is prepared before the cluster gets the new one, and what is retired when nobody
// uses the old one any more. Between them there is no step but waiting, so the old
// and the new login both work for as long as it takes.
//
//	prepare: new secret in the vault ─> login made ─> login proven ─> switched
//	waiting: delivered to the cluster, no pod left that started with the old one
//	retire:  old login revoked ─> seen to be refused

// making is how far the credential of a connection is. It is stored apart from the
// connection, for it is written in the middle of an attempt.
type making struct {
	Current  Credential `json:"current,omitzero"`
	Previous Credential `json:"previous,omitzero"` // still works; the zero value: there is none
	Phase    phase      `json:"phase,omitempty"`
	Journal  []string   `json:"journal,omitempty"` // of the phase
	Rotated  int64      `json:"rotated,omitempty"` // of Connection.Rotations, switched to
}

type phase string

const (
	atRest    phase = ""
	preparing phase = "prepare"
	retiring  phase = "retire"
)

type makingObject = store.Object[making, struct{}]

// makings is the collection of credentials that Keyfleet makes, by the ids of their connections.
var makings = store.NewCollection[making, struct{}]("connection-credentials")

// slots are the two logins of a role that take turns.
func slots(role string) [2]string { return [2]string{role + "_a", role + "_b"} }

// other is the login of the role that is not in use.
func other(role, user string) string {
	if s := slots(role); user == s[0] {
		return s[1]
	}
	return slots(role)[0]
}

// newPassword is a password of 256 bits in letters and digits, which need no
// quoting anywhere.
func newPassword() string { return rand.Text() + rand.Text() }

// maker makes the credential of one connection.
type maker struct {
	*Service
	store *store.Store // fenced
	conn  Connection
	reach Reach
	obj   *makingObject
}

// makerOf loads how far the credential of a connection is.
func (s *Service) makerOf(ctx context.Context, st *store.Store, o *Object, r Reach) (*maker, error) {
	m := &maker{Service: s, store: st, conn: o.Spec, reach: r}
	err := st.Update(ctx, func(tx *store.Tx) (err error) {
		if m.obj, err = makings.Lookup(tx, o.ID); err != nil || m.obj != nil {
			return err
		}
		m.obj = &makingObject{Meta: store.Meta{ID: o.ID}}
		return makings.Insert(tx, m.obj)
	})
	return m, err
}

// save writes what has changed. Nobody else writes it.
func (m *maker) save(ctx context.Context, change func(*making)) error {
	return m.store.Update(ctx, func(tx *store.Tx) error {
		o, err := makings.Get(tx, m.obj.ID)
		if err != nil {
			return err
		}
		change(&o.Spec)
		m.obj = o
		return makings.Put(tx, o)
	})
}

func (m *maker) open(ctx context.Context) (*journal.Journal, error) {
	return journal.Replay("of the credential of "+m.conn.ID, m.obj.Spec.Journal, func(line string) error {
		return m.save(ctx, func(s *making) { s.Journal = append(s.Journal, line) })
	})
}

// prepare makes the next credential, up to the switch. It is done again until it succeeds.
func (m *maker) prepare(ctx context.Context) error {
	if m.obj.Spec.Phase == atRest {
		if err := m.save(ctx, func(s *making) { s.Phase, s.Journal = preparing, nil }); err != nil {
			return err
		}
	}
	j, err := m.open(ctx)
	if err != nil {
		return err
	}
	role, next := m.conn.roleName(), Credential{}
	user := other(role, m.obj.Spec.Current.User)
	if _, err := j.Get("credential", &next); err != nil {
		return err
	}
	login := func() (Login, error) {
		password, err := m.cfg.Vaults.Get(ctx, next.Secret)
		return Login{User: next.User, Password: password}, err
	}
	steps := []journal.Step{
		{Name: "keep the new credential in the vault", Do: func(ctx context.Context) error {
			ref, err := m.keep(ctx, newPassword())
			if err != nil {
				return err
			}
			next = Credential{User: user, Role: role, Secret: ref, Created: m.cfg.Now().UTC()}
			return j.Set("credential", next) // a crash before it leaves a version that nobody names
		}},
		{Name: "make the login", Do: func(ctx context.Context) error {
			l, err := login()
			if err != nil {
				return err
			}
			return effect.Do("make login", func() error { return m.cfg.Maker.Ensure(ctx, m.reach, role, l) })
		}},
		{Name: "log in with it", Do: func(ctx context.Context) error {
			l, err := login()
			if err != nil {
				return err
			}
			_, err = m.cfg.Maker.Prove(ctx, m.reach, l)
			return err
		}},
	}
	if err := j.Run(ctx, steps, journal.Options{}); err != nil {
		return bare(err)
	}
	return m.save(ctx, func(s *making) {
		s.Phase, s.Journal, s.Previous, s.Current = retiring, nil, s.Current, next
		s.Rotated = m.conn.Rotations
		if s.Previous.User == "" { // the first one: there is nothing to retire
			s.Phase = atRest
		}
	})
}

// keep puts a password into the vault.
func (m *maker) keep(ctx context.Context, password string) (SecretRef, error) {
	ref, err := m.kept(ctx, m.conn)
	if err != nil {
		return ref, err
	}
	ref.Version, err = m.cfg.Vaults.Set(ctx, ref, password)
	return ref, err
}

// kept is where the credential of a connection is kept.
func (s *Service) kept(ctx context.Context, c Connection) (SecretRef, error) {
	ref := SecretRef{Vault: c.Vault, Name: c.secretName()}
	if ref.Vault != "" {
		return ref, nil
	}
	cluster, _, err := parseLinker(c.ID)
	if err != nil {
		return ref, err
	}
	state, err := s.cfg.Clusters.State(ctx, cluster)
	if err != nil {
		return ref, err
	}
	ref.Vault, err = s.cfg.Vaults.Ensure(ctx, cluster, state.Location)
	return ref, err
}

// retire ends the old login. The caller has seen that nobody uses it any more.
func (m *maker) retire(ctx context.Context) error {
	j, err := m.open(ctx)
	if err != nil {
		return err
	}
	old := m.obj.Spec.Previous
	err = j.Run(ctx, []journal.Step{
		{Name: "end the old login", NoReturn: true, Do: func(ctx context.Context) error {
			return effect.Do("end login", func() error { return m.cfg.Maker.Revoke(ctx, m.reach, old.Role, old.User) })
		}},
		{Name: "see that it is refused", Do: func(ctx context.Context) error {
			password, err := m.cfg.Vaults.Get(ctx, old.Secret)
			if err != nil {
				return err
			}
			return m.cfg.Maker.Refused(ctx, m.reach, Login{User: old.User, Password: password})
		}},
	}, journal.Options{})
	if err != nil {
		return bare(err)
	}
	return m.save(ctx, func(s *making) { s.Phase, s.Journal, s.Previous = atRest, nil, Credential{} })
}

// bare takes the record's own failure off an error, where there is a step's.
func bare(err error) error {
	if u, ok := errors.Unwrap(err).(interface{ Unwrap() []error }); ok && len(u.Unwrap()) > 0 {
		return fmt.Errorf("making the credential: %w", u.Unwrap()[0])
	}
	return err
}

// system is the context of the controller: it acts in its own name.
func system(ctx context.Context) context.Context { return access.AsSystem(ctx, controllerName) }

// proofEvery is how often a login with what was delivered is tried again.
const proofEvery = 10 * time.Minute
