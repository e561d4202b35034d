package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// actionState is action.json: how far the agent got with the last action.
type actionState struct {
	ID   string `json:"id"`
	Boot string `json:"boot"` // boot id when it was begun
	Done bool   `json:"done"`
}

// loadAction reads action.json.
func (a *Agent) loadAction() error {
	text, err := readIfThere(a.statePath(actionFile))
	if err != nil || text == nil {
		return err
	}
	if err := json.Unmarshal(text, &a.action); err != nil {
		a.cfg.Log.Warn("the record of the last action is not usable", "error", err)
	}
	return nil
}

func (a *Agent) saveAction(s actionState) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := writeFile("action", a.statePath(actionFile), text, 0o600); err != nil {
		return err
	}
	a.mu.Lock()
	a.action = s
	a.mu.Unlock()
	signal(a.news)
	return nil
}

// act carries out the goal state's action, once. What it does may be done
// again after a crash; the record that it is done is written last.
func (a *Agent) act(ctx context.Context, g *node.GoalState) error {
	if g.Action == nil {
		return nil
	}
	a.mu.Lock()
	s := a.action
	a.mu.Unlock()
	if s.ID == g.Action.ID && s.Done {
		return nil
	}
	switch g.Action.Kind {
	case "reboot":
		return a.reboot(s, g.Action.ID)
	case "release", "reimage":
		if err := a.reset(ctx); err != nil {
			if ctx.Err() == nil {
				a.cfg.Log.Error("the node could not be cleared; it is tried again", "action", g.Action.Kind, "error", err)
			}
			return nil
		}
	default:
		a.cfg.Log.Warn("this agent does not know the action", "action", g.Action.Kind, "id", g.Action.ID)
		return nil
	}
	if err := a.saveAction(actionState{ID: g.Action.ID, Boot: a.bootID, Done: true}); err != nil {
		a.cfg.Log.Error("an action could not be recorded as done", "error", err)
	}
	return nil
}

// reboot restarts the machine, and knows by the boot id that it happened.
func (a *Agent) reboot(s actionState, id string) error {
	if s.ID == id && s.Boot != a.bootID {
		s.Done = true
		return a.saveAction(s)
	}
	if s.ID != id {
		if err := a.saveAction(actionState{ID: id, Boot: a.bootID}); err != nil {
			a.cfg.Log.Error("a reboot could not be recorded, so it is not done", "error", err)
			return nil
		}
	}
	if len(a.cfg.RebootCommand) == 0 {
		return ErrReboot
	}
	a.cfg.Log.Info("rebooting, as the server asked", "action", id)
	err := effect.Do("reboot", func() error { return exec.Command(a.cfg.RebootCommand[0], a.cfg.RebootCommand[1:]...).Run() })
	if err != nil {
		a.cfg.Log.Error("the machine could not be rebooted", "command", a.cfg.RebootCommand[0], "error", err)
	}
	return nil
}

// reset takes from the node what pools gave it: extensions, certificates, tokens.
func (a *Agent) reset(ctx context.Context) error {
	a.cfg.Log.Info("removing all extensions and what they delivered")
	if _, err := a.removeUnwanted(ctx, &node.GoalState{}); err != nil {
		return fmt.Errorf("removing extensions: %w", err)
	}
	a.mu.Lock()
	for name, in := range a.instances { // a reimaged node gets them again
		fresh := newInstance()
		fresh.ext = in.ext
		a.instances[name] = fresh
		a.hints.close(name)
	}
	a.mu.Unlock()
	a.tokens.forget()
	return errors.Join(a.wipe(), ctx.Err())
}
