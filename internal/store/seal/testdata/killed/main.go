// Command killed is what the tests of store/seal run under every possible kill.
//
//	killed DIR          open the sealed store in DIR, see to three objects, rotate, back up to DIR.backup
//	killed restore DIR  restore DIR.backup into DIR
//	killed dump DIR     print the objects and the number of sealing keys
package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"keyfleet.dev/keyfleet/internal/store"
	"keyfleet.dev/keyfleet/internal/store/etcd"
	"keyfleet.dev/keyfleet/internal/store/seal"
)

type spec struct {
	Text string `json:"text"`
}

var things = store.NewCollection[spec, spec]("things")

func main() {
	err := error(nil)
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "restore":
		err = restore(args[1])
	case len(args) == 2 && args[0] == "dump":
		err = with(args[1], func(_ *etcd.Backend, s *store.Store, k *seal.Keyset) error { return dump(s, k) })
	default:
		err = with(args[0], func(b *etcd.Backend, s *store.Store, k *seal.Keyset) error { return work(args[0], b, s, k) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// with opens the store of dir.
func with(dir string, fn func(*etcd.Backend, *store.Store, *seal.Keyset) error) error {
	b, err := etcd.Open(context.Background(), etcd.Config{Dir: dir, NoSync: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer b.Close()
	k, err := seal.OpenKeyset(dir, nil)
	if err != nil {
		return err
	}
	s, err := store.New(context.Background(), seal.Wrap(b, k))
	if err != nil {
		return err
	}
	return fn(b, s, k)
}

func work(dir string, b *etcd.Backend, s *store.Store, k *seal.Keyset) error {
	for i := range 3 {
		err := s.Update(context.Background(), func(tx *store.Tx) error {
			id := fmt.Sprint(i)
			if old, err := things.Lookup(tx, id); old != nil || err != nil {
				return err
			}
			o := &store.Object[spec, spec]{Spec: spec{"text " + id}}
			o.ID = id
			return things.Insert(tx, o)
		})
		if err != nil {
			return err
		}
	}
	if _, err := seal.Rotate(context.Background(), b, k); err != nil {
		return err
	}
	return k.Steady(func(wrapped []byte) error {
		var out bytes.Buffer
		kek, err := os.ReadFile(filepath.Join(dir, "kek"))
		if err != nil {
			return err
		}
		if _, err := etcd.Backup(context.Background(), b, &out, map[string][]byte{seal.KeysetFile: wrapped, "kek": kek}); err != nil {
			return err
		}
		return os.WriteFile(dir+".backup", out.Bytes(), 0o600)
	})
}

func restore(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "etcd")); err == nil {
		return nil // it is done
	}
	f, err := os.Open(dir + ".backup")
	if err != nil {
		return err
	}
	defer f.Close()
	_, _, err = etcd.Restore(context.Background(), f, dir, check(dir), slog.New(slog.DiscardHandler))
	return err
}

// check opens each value with the keyset of the backup; the KEK is in it too.
func check(dir string) etcd.Check {
	return func(h etcd.Header) (func(string, []byte) error, error) {
		path := dir + ".kek"
		if err := os.WriteFile(path, h.Files["kek"], 0o600); err != nil {
			return nil, err
		}
		kek, err := seal.FileKEK(path, false)
		if err != nil {
			return nil, err
		}
		k, err := seal.ParseKeyset(h.Files[seal.KeysetFile], kek)
		if err != nil {
			return nil, err
		}
		return func(key string, value []byte) error { _, err := k.Open(key, value); return err }, nil
	}
}

func dump(s *store.Store, k *seal.Keyset) error {
	list, err := things.List(s.View(context.Background()), "")
	if err != nil {
		return err
	}
	for _, o := range list {
		fmt.Printf("%s=%s generation %d\n", o.ID, o.Spec.Text, o.Generation)
	}
	fmt.Printf("%.17s\n", k.String())
	return nil
}
