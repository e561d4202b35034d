package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// tokenSecrets renews the tokens of Secrets once the new key signs.
func (e *Engine) tokenSecrets(ctx context.Context) error {
	if err := e.Journal.Set(switchedValue, e.clusterNow()); err != nil {
		return err
	}
	return e.renewTokens(ctx)
}

// clusterNow is the time by the clock that is ahead, ours or a master's: pods are
// dated by theirs.
func (e *Engine) clusterNow() time.Time {
	ahead := time.Duration(0)
	for _, m := range e.Observed.masters() {
		ahead = max(ahead, m.Facts.Now.Sub(e.Observed.At))
	}
	return e.Now().Add(ahead)
}

// tokensBack waits, on the way back, until nobody uses tokens of the new key.
func (e *Engine) tokensBack(ctx context.Context) error {
	var was time.Time
	if ok, err := e.Journal.Get(switchedValue, &was); err != nil || !ok { // the new key has signed nothing
		return err
	}
	var back time.Time
	if ok, err := e.Journal.Get(backValue, &back); err != nil {
		return err
	} else if !ok {
		back = e.clusterNow()
		if err := e.Journal.Set(backValue, back); err != nil {
			return err
		}
	}
	if err := e.renewTokens(ctx); err != nil {
		return err
	}
	nobody := func(context.Context, API, time.Time) ([]string, error) { return nil, nil }
	return e.drainUsers(ctx, back, e.Plan.Run+"-back", nobody)
}

// renewTokens empties tokens of Secrets; the controller manager signs new ones.
func (e *Engine) renewTokens(ctx context.Context) error {
	api, err := e.anyAPI(ctx)
	if err != nil {
		return err
	}
	secrets, err := api.TokenSecrets(ctx)
	if err != nil {
		return err
	}
	before := map[string]string{}
	for _, s := range secrets {
		before[s.Namespace+"/"+s.Name] = s.Token
		if err := api.BlankToken(ctx, s.Namespace, s.Name); err != nil {
			return fmt.Errorf("the Secret %s/%s: %w", s.Namespace, s.Name, err)
		}
	}
	return until(ctx, 2*time.Minute, func(ctx context.Context) error {
		now, err := api.TokenSecrets(ctx)
		if err != nil {
			return err
		}
		for _, s := range now {
			old, known := before[s.Namespace+"/"+s.Name]
			if known && (s.Token == "" || s.Token == old) {
				return fault.New(fault.Precondition, "TokenNotRenewed", "The Secret %s/%s has no new token yet.", s.Namespace, s.Name)
			}
		}
		return nil
	})
}

// unused waits until nobody uses the old.
func (e *Engine) unused(ctx context.Context) error {
	var began time.Time
	ok, err := e.Journal.Get(switchedValue, &began)
	if err != nil {
		return err
	}
	if !ok { // no token was renewed, so this is the first moment that counts
		began = e.clusterNow()
		if err := e.Journal.Set(switchedValue, began); err != nil {
			return err
		}
	}
	if e.Complete {
		return nil
	}
	if e.UntilSoak {
		return &SoakError{}
	}
	return e.drainUsers(ctx, began, e.Plan.Run, e.oldClients)
}

// drainUsers waits until no pod holds a token from before a moment, and no client
// was seen lately that clients finds. The mark is that of restarts of pods' owners.
func (e *Engine) drainUsers(ctx context.Context, began time.Time, mark string, clients func(context.Context, API, time.Time) ([]string, error)) error {
	// The API tells when a pod began to the second: one that a restart makes from now
	// on must not look like one from before.
	wait := 2 * time.Second
	if e.Plan.Scope.Cluster && e.Observed.audited() { // nobody was seen who had no time to come
		wait = seenFor
	}
	if err := sleep(ctx, began.Add(wait).Sub(e.Now())); err != nil {
		return err
	}
	limit := e.Soak
	for {
		api, err := e.anyAPI(ctx)
		if err != nil {
			return err
		}
		users, longest, err := e.users(ctx, api, began, mark)
		if err != nil {
			return err
		}
		since := began
		if lately := e.Now().Add(-seenFor); lately.After(since) {
			since = lately
		}
		old, err := clients(ctx, api, since)
		if err != nil {
			return err
		}
		if users = append(users, old...); len(users) == 0 {
			return nil
		}
		if limit == 0 {
			limit = min(longest, time.Hour)
			if len(old) > 0 { // which have no end of their own
				limit = time.Hour
			}
		}
		left := began.Add(limit).Sub(e.Now())
		if left <= 0 {
			return &SoakError{Users: users}
		}
		e.note("in use by %s; waiting for up to %s", list(users), left.Round(time.Second))
		if err := sleep(ctx, min(left+time.Second, 5*time.Second)); err != nil {
			return err
		}
	}
}

func list(all []string) string {
	if len(all) > 5 {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:5], ", "), len(all)-5)
	}
	return strings.Join(all, ", ")
}

// users names the pods that may still hold a token of the old key: those that
// began before the switch, until their token's lifetime is over. If asked to, it
// restarts their owners, under a mark that makes that happen once.
func (e *Engine) users(ctx context.Context, api API, switched time.Time, mark string) (names []string, longest time.Duration, err error) {
	if !e.Plan.Scope.Tokens {
		return nil, 0, nil
	}
	pods, err := api.Pods(ctx)
	if err != nil {
		return nil, 0, err
	}
	slices.SortStableFunc(pods, func(a, b Pod) int { // kube-system first
		return strings.Compare(order(a), order(b))
	})
	for _, p := range pods {
		longest = max(longest, p.TokenTTL)
		if p.Mirror || p.TokenTTL == 0 || p.Created.After(switched) || e.Now().After(switched.Add(p.TokenTTL)) {
			continue
		}
		names = append(names, p.Namespace+"/"+p.Name)
		if e.RestartPods {
			if err := api.RestartOwner(ctx, p, mark); err != nil && !errors.Is(err, fault.TooMany) && !errors.Is(err, fault.NotFound) {
				return nil, 0, fmt.Errorf("restarting %s of %s/%s: %w", p.Owner, p.Namespace, p.Name, err)
			}
		}
	}
	return names, longest, nil
}

func order(p Pod) string {
	if p.Namespace == "kube-system" {
		return "0/" + p.Name
	}
	return "1/" + p.Namespace + "/" + p.Name
}
