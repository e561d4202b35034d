package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/client"
)

// This file holds the verbs that secrets and certificates share. kind is the
// part of their URLs, "secrets" or "certificates"; what is the word for one.

func (t *tool) objectList(kind, short string, vw func() view[object]) *cobra.Command {
	c := t.verb("list VAULT", short, "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, c.Vault(args[0], "/"+kind), client.VersionVaultData)
		if err != nil {
			return err
		}
		return many(t, all, vw())
	})
	c.ValidArgsFunction = t.completeVaults
	return c
}

func (t *tool) objectVersions(kind, short string, vw func() view[object]) *cobra.Command {
	return t.verb("versions VAULT NAME", short, "", cobra.RangeArgs(1, 2), func(ctx context.Context, args []string) error {
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, v.url(kind, "versions"), client.VersionVaultData)
		if err != nil {
			return err
		}
		return many(t, all, vw())
	})
}

func (t *tool) objectDelete(kind, what string) *cobra.Command {
	return t.verb("delete VAULT NAME", "Delete a "+what+"; it can be recovered until the vault's retention is over", "", cobra.RangeArgs(1, 2),
		func(ctx context.Context, args []string) error {
			v, err := t.objectArgs(ctx, args)
			if err != nil {
				return err
			}
			o, err := t.call(ctx, request(http.MethodDelete, v.base+"/"+kind+"/"+url.PathEscape(v.name), client.VersionVaultData, nil))
			if err != nil {
				return err
			}
			if t.form() != "table" {
				return one(t, o, t.deletedView())
			}
			t.say("To get it back: keyfleet %s recover %s %s", what, v.vault, v.name)
			return t.done("The %s %s is deleted; it will be purged %s.", what, v, t.when(o.time("scheduledPurgeDate")))
		})
}

func (t *tool) deletedView() view[object] {
	return view[object]{
		name: func(o object) string { return nameOf(o, "id") },
		columns: []column[object]{
			derived("Name", func(o object) string { return nameOf(o, "id") }),
			t.timeAt("Deleted", "deletedDate"), t.timeAt("Purged", "scheduledPurgeDate"), field("Recovery id", "recoveryId"),
		},
	}
}

func (t *tool) objectDeleted(kind string) *cobra.Command {
	c := t.verb("list-deleted VAULT", "List the deleted "+kind+" that can be recovered", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		c, err := t.connect(ctx)
		if err != nil {
			return err
		}
		all, err := t.list(ctx, c.Vault(args[0], "/deleted"+kind), client.VersionVaultData)
		if err != nil {
			return err
		}
		return many(t, all, t.deletedView())
	})
	c.ValidArgsFunction = t.completeVaults
	return c
}

func (t *tool) objectRecover(kind, what string) *cobra.Command {
	return t.verb("recover VAULT NAME", "Get a deleted "+what+" back with all its versions", "", cobra.RangeArgs(1, 2), func(ctx context.Context, args []string) error {
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		if _, err := t.call(ctx, request(http.MethodPost, v.url("deleted"+kind, "recover"), client.VersionVaultData, nil)); err != nil {
			return err
		}
		err = t.waiting(ctx, time.Minute, "keyfleet "+what+" show "+v.vault+" "+v.name, func(ctx context.Context, _ *progress) error {
			return t.client.Poll(ctx, 200*time.Millisecond, func(ctx context.Context) (bool, error) {
				_, err := t.client.Do(ctx, request(http.MethodGet, v.url(kind, "versions"), client.VersionVaultData, nil))
				if client.IsNotFound(err) {
					return false, nil
				}
				return err == nil, err
			})
		})
		if err != nil {
			return err
		}
		return t.done("The %s %s is back.", what, v)
	})
}

func (t *tool) objectPurge(kind, what string) *cobra.Command {
	var yes bool
	c := t.verb("purge VAULT NAME", "Destroy a deleted "+what+" and all its versions", "", cobra.RangeArgs(1, 2), func(ctx context.Context, args []string) error {
		v, err := t.objectArgs(ctx, args)
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "The %s %s and all its versions will be destroyed", what, v); err != nil {
			return err
		}
		if _, err := t.client.Do(ctx, request(http.MethodDelete, v.url("deleted"+kind), client.VersionVaultData, nil)); err != nil {
			return err
		}
		return t.done("The %s %s is destroyed.", what, v)
	})
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// newFile writes a file that did not exist, for its owner only.
func (t *tool) newFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return usagef("%s exists already", path).withFix("remove it, or name another file")
	}
	if err != nil {
		return fmt.Errorf("writing the file: %w", err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("writing the file: %w", err)
	}
	return t.done("Wrote %s (%s).", path, plural(len(b), "byte"))
}

// lines joins texts, one a line, without empty ones.
func lines(ss ...string) string {
	var out []string
	for _, s := range ss {
		if s != "" {
			out = append(out, s)
		}
	}
	return strings.Join(out, "\n")
}

// rfc3339 prints seconds since 1970.
func rfc3339(sec int64) string { return time.Unix(sec, 0).UTC().Format(time.RFC3339) }
