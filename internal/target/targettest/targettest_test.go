//go:build linux

package targettest

import (
	"testing"

	"keyfleet.dev/keyfleet/internal/target"
)

// TestServersStart: each server takes the administrator's login over TLS, and no
// process of it is left when it was stopped.
func TestServersStart(t *testing.T) {
	for _, kind := range []target.Kind{target.Postgres, target.MySQL, target.Redis, target.RabbitMQ} {
		t.Run(string(kind), func(t *testing.T) {
			s := start(t, kind, nil)
			if _, err := target.Check(t.Context(), s.Target("")); err != nil {
				t.Fatal(err)
			}
			s.Stop()
			for _, p := range s.processes {
				if !p.ended() {
					t.Errorf("%s still runs", p.cmd.Path)
				}
			}
			if _, err := target.Check(t.Context(), s.Target("")); err == nil {
				t.Error("the server still answers")
			}
		})
	}
}
