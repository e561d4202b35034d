package vault

import (
	"context"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Actions on policy time.
const (
	actionReadClock    = "Keyfleet/dev/clock/read"
	actionAdvanceClock = "Keyfleet/dev/clock/advance/action"
)

// maxOffset is how far policy time can be moved ahead: beyond it every
// certificate of the built-in CA has ended.
const maxOffset = 9 * 365 * 24 * time.Hour

// clockOffset is the stored difference of policy time to real time.
type clockOffset struct {
	Offset time.Duration `json:"offset"`
}

var clocks = store.NewCollection[clockOffset, none]("policyclock")

const clockID = "offset"

// ClockConfig is what a [Clock] needs.
type ClockConfig struct {
	Store *store.Store     // required
	Gate  *access.Gate     // required
	Dev   bool             // whether the clock may be moved; false: policy time is real time, whatever is stored
	Now   func() time.Time // real time; nil: time.Now
}

// Clock is policy time: real time plus a stored offset that people who try out
// renewals can move ahead. Only decisions on renewals go by it; TLS, tokens,
// retention and records stay on real time. The nil Clock is real time.
type Clock struct{ cfg ClockConfig }

// NewClock returns policy time.
func NewClock(cfg ClockConfig) *Clock {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Clock{cfg: cfg}
}

// offset reads the offset from the store, so that all servers agree on it.
func (c *Clock) offset(ctx context.Context) (time.Duration, error) {
	if c == nil || !c.cfg.Dev {
		return 0, nil
	}
	o, err := clocks.Lookup(c.cfg.Store.View(ctx), clockID)
	if err != nil || o == nil {
		return 0, err
	}
	return o.Spec.Offset, nil
}

// Read returns policy time and its offset to real time.
func (c *Clock) Read(ctx context.Context) (now time.Time, offset time.Duration, err error) {
	if err := c.cfg.Gate.Read(ctx, access.Op{Action: actionReadClock, Resource: "/"}); err != nil {
		return time.Time{}, 0, err
	}
	offset, err = c.offset(ctx)
	return c.cfg.Now().UTC().Add(offset), offset, err
}

// Advance moves policy time ahead, and returns it. Certificates whose lifetime
// action falls due by it are renewed at once.
func (c *Clock) Advance(ctx context.Context, d time.Duration) (now time.Time, offset time.Duration, err error) {
	if !c.cfg.Dev {
		return time.Time{}, 0, fault.New(fault.Denied, "DevelopmentOnly", "Policy time moves only on a server that was started for trying out.").WithFix("start keyfleet-server with --dev")
	}
	if d <= 0 || d > maxOffset {
		return time.Time{}, 0, fault.New(fault.Invalid, "InvalidRequestContent", "Policy time moves ahead by more than nothing and at most %s at once.", maxOffset).At("advance")
	}
	op := access.Op{Action: actionAdvanceClock, Resource: "/", Detail: d.String()}
	err = c.cfg.Gate.Change(ctx, c.cfg.Store, op, func(tx *store.Tx) error {
		o, err := clocks.Lookup(tx, clockID)
		if err != nil {
			return err
		}
		if o == nil {
			o = &store.Object[clockOffset, none]{}
			o.ID = clockID
		}
		if o.Spec.Offset+d > maxOffset {
			return fault.New(fault.Invalid, "InvalidRequestContent", "Policy time would be over %s ahead.", maxOffset).At("advance")
		}
		o.Spec.Offset += d
		offset = o.Spec.Offset
		if o.UID == "" {
			return clocks.Insert(tx, o)
		}
		return clocks.Put(tx, o)
	})
	return c.cfg.Now().UTC().Add(offset), offset, err
}
