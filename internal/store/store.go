// Package store keeps everything Keyfleet knows: typed resources in
// collections, changed by transactions, followed by watches.
//
// Idea: a [Backend] is a small ordered key-value contract (etcd, or memory for
// tests); [Store] adds optimistic transactions over any number of keys; a
// [Collection] adds types, generations and finalizers. A transaction remembers
// the revision of every key it read and commits only if none of them moved, so
// a function given to [Store.Update] may read and write freely and is simply
// run again when somebody else was faster.
//
// Invariant: a committed transaction is all there or not there at all, and it
// saw the state it was decided on. Object ids are lower case; revisions are
// the backend's and only grow.
//
//	/vaults/prod1                          one object: JSON of Meta, Spec and Status,
//	/secrets/prod1/web/8f5f...             sealed by package seal before it reaches the backend
//	/leader/controllers                    keys of elections, not sealed
//
// Consequence for the operator: one place to back up, one revision to speak of.
package store

import (
	"context"
	"errors"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// MaxValue is the largest value of a key, in bytes. A commit with a larger one
// fails with fault.TooLarge.
const MaxValue = 1 << 20

// maxStored is what a backend must take: MaxValue and what sealing adds.
const maxStored = MaxValue + 1024

// ErrConflict is returned by Backend.Commit when a guard did not hold.
var ErrConflict = errors.New("store: a key was changed by somebody else")

// ErrCompacted is the error of a watch whose start revision is no longer kept.
// [Collection.Follow] handles it by listing again.
var ErrCompacted = errors.New("store: revision is compacted")

// ErrFenced is returned by Commit when the fence of a deposed leader no longer holds.
var ErrFenced = errors.New("store: no longer the leader")

// ErrCorrupt is the error of a stored value that cannot be read: it was tampered
// with, its key is missing, or it is not what its collection holds. Trying again
// does not help; the error around it names the key.
var ErrCorrupt = errors.New("store: a stored value cannot be read")

// Entry is one stored key. ModRev and CreateRev are 0 for an absent key.
type Entry struct {
	Key       string
	Value     []byte
	CreateRev int64 // revision of the key's creation
	ModRev    int64 // revision of its last change
}

// Guard is a condition of a commit: Key must have exactly this ModRev (0: be
// absent) or, when CreateRev is set instead, this CreateRev (a fence).
type Guard struct {
	Key       string
	ModRev    int64
	CreateRev int64
}

// Write is one change of a commit. TTL, if positive, removes the key by itself
// after about that time (resolution one second); Delete removes it now. KeepTTL
// changes the value of a key that exists and leaves its time to live as it is.
type Write struct {
	Key     string
	Value   []byte
	Delete  bool
	TTL     time.Duration
	KeepTTL bool
}

// Event is a change seen by a watch. Value is nil when Deleted.
type Event struct {
	Key     string
	Value   []byte
	ModRev  int64
	Deleted bool
}

// Batch is the events of one revision range, in order. Err ends the watch.
type Batch struct {
	Events []Event
	Err    error
}

// Backend is what storage must offer. Every backend passes package storetest.
// Implementations are safe for concurrent use.
type Backend interface {
	// Get reads keys at one revision, which it also returns. Absent keys come
	// back with ModRev 0, in the order asked for.
	Get(ctx context.Context, keys ...string) ([]Entry, int64, error)
	// List reads all keys with the prefix, in key order, at one revision.
	List(ctx context.Context, prefix string) ([]Entry, int64, error)
	// Commit applies all writes if all guards hold, and returns the new
	// revision; otherwise it changes nothing and returns ErrConflict. Each key
	// is written at most once. A value that [CheckSize] refuses is
	// fault.TooLarge. After fault.Unavailable, fault.Timeout or the end of ctx
	// the writes may have been applied or not.
	Commit(ctx context.Context, guards []Guard, writes []Write) (int64, error)
	// Watch delivers all changes under prefix after the revision, in order,
	// until ctx ends (then the channel is closed) or a Batch with Err. What a
	// Batch tells is there: a read that starts after it never shows less.
	Watch(ctx context.Context, prefix string, after int64) <-chan Batch
	// Close releases what the backend holds. Calls after Close fail.
	Close() error
}

// CheckSize refuses writes that no backend takes; backends call it first.
func CheckSize(writes []Write) error { return checkSize(writes, maxStored) }

func checkSize(writes []Write, limit int) error {
	for _, w := range writes {
		if len(w.Value) > limit {
			return fault.New(fault.TooLarge, "", "The object is too large to be stored: %d bytes, and the limit is %d.", len(w.Value), MaxValue).At(w.Key)
		}
	}
	return nil
}

// Fence ties writes to a leadership: they commit only while the key still has
// the CreateRev it had when the election was won.
type Fence struct {
	Key       string
	CreateRev int64
}

// Store runs transactions on a Backend. The zero value is not usable; see [New].
type Store struct {
	backend     Backend
	fence       *Fence
	incarnation string
}

// IncarnationKey holds the incarnation; a backup leaves it out.
const IncarnationKey = "/meta/incarnation"

// New opens a store on a backend. On a new backend it writes the incarnation,
// a random name that a backup leaves out, so that an ETag from before the
// restore never matches after it.
func New(ctx context.Context, b Backend) (*Store, error) {
	s := &Store{backend: b}
	err := s.Update(ctx, func(tx *Tx) error {
		e, err := tx.get(IncarnationKey)
		if err != nil {
			return err
		}
		if e.ModRev == 0 {
			s.incarnation = newID()[:8]
			tx.put(IncarnationKey, []byte(s.incarnation), 0)
			return nil
		}
		s.incarnation = string(e.Value)
		return nil
	})
	return s, err
}

// Incarnation names this life of the store; ETags contain it.
func (s *Store) Incarnation() string { return s.incarnation }

// Fenced returns a view of the store whose commits hold only while f does.
// Controllers write through it, so a deposed leader cannot.
func (s *Store) Fenced(f Fence) *Store { c := *s; c.fence = &f; return &c }
