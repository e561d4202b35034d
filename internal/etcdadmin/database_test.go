package etcdadmin

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"keyfleet.dev/keyfleet/internal/fault"
)

// TestValuesOfADatabaseFile reads the file of a real member that has ended: what
// was changed and deleted is as it was last.
func TestValuesOfADatabaseFile(t *testing.T) {
	c := start(t, 1, nil)
	e := c.open(t)
	for _, kv := range [][2]string{{"/registry/minions/a", "1"}, {"/registry/minions/b", "2"}, {"/registry/minions/a", "3"}, {"/registry/pods/x", "4"}} {
		if err := e.Put(t.Context(), map[string][]byte{kv[0]: []byte(kv[1])}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.members[0].Server.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("/registry/minions/b")}); err != nil {
		t.Fatal(err)
	}
	c.stop[0]()
	f, err := os.Open(filepath.Join(c.dir, "m0", "member", "snap", "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := NewDatabase()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := io.Copy(d, f); err != nil {
		t.Fatal(err)
	}
	for range 2 { // reading does not use it up
		values, err := d.Values("/registry/minions/")
		if err != nil || len(values) != 1 || string(values["/registry/minions/a"]) != "3" {
			t.Errorf("values %v, %v", values, err)
		}
	}
}

func TestDamagedDatabaseFile(t *testing.T) {
	for _, text := range []string{"", "this is no database", string(make([]byte, 1<<16))} {
		d, err := NewDatabase()
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if _, err := io.WriteString(d, text); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Values("/"); fault.From(err).Code != "BadDatabase" {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
}
