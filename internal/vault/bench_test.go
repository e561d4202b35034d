package vault

import (
	"context"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/store"
)

// BenchmarkSecretGet is the read of a 2 KiB secret: decision, record, three reads.
func BenchmarkSecretGet(b *testing.B) {
	e := newEnv(b)
	_, err := e.vaults.SetSecret(e.owner, "prod1", "s", NewSecret(strings.Repeat("x", 2048)), Change{})
	e.ok(err)
	for b.Loop() {
		s, err := e.vaults.Secret(e.owner, "prod1", "s", "", "")
		if err != nil || s.Value.Len() != 2048 {
			b.Fatal(err)
		}
	}
}

// BenchmarkSecretSet adds a version of 2 KiB.
func BenchmarkSecretSet(b *testing.B) {
	e := newEnv(b)
	value := NewSecret(strings.Repeat("x", 2048))
	for b.Loop() {
		if _, err := e.vaults.SetSecret(e.owner, "prod1", "s", value, Change{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIssue makes and stores the next version of a P-256 certificate;
// BenchmarkSignOnly is the part of it that no server can avoid.
func BenchmarkIssue(b *testing.B) {
	e := newEnv(b)
	_, err := e.vaults.CreateCertificate(e.owner, "prod1", "web", testPolicy(), Change{})
	e.ok(err)
	for b.Loop() {
		var obj *certificateObject
		e.ok(e.store.Update(e.owner, func(tx *store.Tx) (err error) {
			obj, err = certificates.Get(tx, "prod1/web")
			return err
		}))
		if err := e.vaults.issue(access.AsSystem(e.owner, certificateController), e.store, obj); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignOnly(b *testing.B) {
	e := newEnv(b)
	p := testPolicy()
	for b.Loop() {
		key, err := pki.NewKey(p.kind())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := e.vaults.chain(context.Background(), p.Issuer, p.template(time.Now(), time.Now().Add(time.Hour)), key); err != nil {
			b.Fatal(err)
		}
	}
}
