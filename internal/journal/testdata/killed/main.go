// Command killed is a change of five steps on the files of a directory, run by
// the journal's own test under every possible kill.
//
//	killed DIR          do what is left to do
//	killed -back DIR    roll back
//
// With DIR/fail the fourth step fails; the third has no way back if DIR/noreturn exists.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/journal"
)

func main() {
	back := flag.Bool("back", false, "roll back")
	flag.Parse()
	if err := run(flag.Arg(0), *back); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(dir string, back bool) error {
	j, err := journal.Open(filepath.Join(dir, "journal"))
	if err != nil {
		return err
	}
	defer j.Close()
	if back {
		return j.Rollback(context.Background(), steps(dir, j), journal.Options{})
	}
	return j.Run(context.Background(), steps(dir, j), journal.Options{})
}

// steps replaces the file "old" by the file "new", in which there is a number that
// was drawn once.
func steps(dir string, j *journal.Journal) []journal.Step {
	at := func(name string) string { return filepath.Join(dir, name) }
	there := func(name string) bool { _, err := os.Stat(at(name)); return err == nil }
	check := func(name string, want bool) func(context.Context) (bool, error) {
		return func(context.Context) (bool, error) { return there(name) == want, nil }
	}
	remove := func(name string) func(context.Context) error {
		return func(context.Context) error {
			return effect.Do("remove "+name, func() error {
				if err := os.Remove(at(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
				return nil
			})
		}
	}
	write := func(name, text string) error {
		return effect.Do("write "+name, func() error { return os.WriteFile(at(name), []byte(text), 0o600) })
	}
	return []journal.Step{
		{
			Name: "draw a number", // only the record tells
			Do: func(context.Context) error {
				if ok, err := j.Get("number", new(int)); ok || err != nil {
					return err
				}
				return j.Set("number", 42)
			},
		},
		{Name: "make new", Check: check("new", true), Undo: remove("new"), Do: func(context.Context) error {
			n := 0
			if ok, err := j.Get("number", &n); !ok || err != nil {
				return fmt.Errorf("no number: %w", err)
			}
			return write("new", fmt.Sprint(n))
		}},
		{
			Name: "remove old", Check: check("old", false), Do: remove("old"), NoReturn: there("noreturn"),
			Undo: func(context.Context) error { return write("old", "before") },
		},
		{Name: "may fail", Do: func(context.Context) error {
			if there("fail") {
				return errors.New("told to fail")
			}
			return write("passed", "yes")
		}, Undo: remove("passed")},
		{Name: "make flag", Check: check("flag", true), Do: func(context.Context) error { return write("flag", "up") }, Undo: remove("flag")},
	}
}
