package target

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

// TestHashes: what is sent to the servers in the place of passwords, against published examples.
func TestHashes(t *testing.T) {
	if got, want := nativeHash(NewSecret("password")), "*2470C0C06DEE42FD1618BB99005ADCA2EC9D1E19"; got != want {
		t.Errorf("mysql_native_password: %s, want %s", got, want)
	}
	if got, want := rabbitHash(NewSecret("test12"), []byte{0x90, 0x8D, 0xC6, 0x0A}), "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"; got != want {
		t.Errorf("RabbitMQ: %s, want %s", got, want)
	}
	if got, want := redisHash(NewSecret("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; got != want {
		t.Errorf("Redis: %s, want %s", got, want)
	}
}

// TestScramVerifier: the server key signs the exchange of RFC 7677, section 3, as printed there.
func TestScramVerifier(t *testing.T) {
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := scramVerifier(NewSecret("pencil"), salt)
	if err != nil {
		t.Fatal(err)
	}
	head, keys, _ := strings.Cut(verifier, "==$")
	if head != "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ" {
		t.Errorf("it begins with %q", head)
	}
	_, serverKey, _ := strings.Cut(keys, ":")
	key, err := base64.StdEncoding.DecodeString(serverKey)
	if err != nil {
		t.Fatal(err)
	}
	const nonce = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
	exchange := "n=user,r=rOprNGfwEbeRWgbNEkqO," + nonce + ",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws," + nonce
	h := hmac.New(sha256.New, key)
	h.Write([]byte(exchange))
	if got, want := base64.StdEncoding.EncodeToString(h.Sum(nil)), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="; got != want {
		t.Errorf("the signature is %s, want %s", got, want)
	}
}

// TestNames: names that would have to be quoted, that a server would cut, or that
// belong to others are refused before a server is asked.
func TestNames(t *testing.T) {
	server := func(k Kind) Server {
		return Server{Kind: k, Host: "192.0.2.1", Port: 1, Database: "0", Management: "https://192.0.2.1", Admin: Login{User: "root_a"}}
	}
	password := NewSecret("a-good-password")
	for _, c := range []struct {
		name       string
		role, user string
		password   Secret
		at         string
	}{
		{"empty", "", "_a", password, "role"},
		{"quotes", `a"; DROP ROLE x; --`, `a"; DROP ROLE x; --_a`, password, "role"},
		{"apostrophe", "a'b", "a'b_a", password, "role"},
		{"backtick", "a`b", "a`b_a", password, "role"},
		{"upper case", "App", "App_a", password, "role"},
		{"line", "app\n", "app\n_a", password, "role"},
		{"zero byte", "app\x00", "app\x00_a", password, "role"},
		{"path", "../app", "../app_a", password, "role"},
		{"wildcard", "app%", "app%_a", password, "role"},
		{"first a digit", "1app", "1app_a", password, "role"},
		{"other letters", "äpp", "äpp_a", password, "role"},
		{"too long", strings.Repeat("a", 62), strings.Repeat("a", 62) + "_a", password, "role"},
		{"another role's login", "app", "other_a", password, "user"},
		{"no login of a role", "app", "app_c", password, "user"},
		{"the administrator", "root", "root_b", password, "role"},
		{"short password", "app", "app_a", NewSecret("1234567"), "password"},
		{"password with a line", "app", "app_a", NewSecret("12345678\n9"), "password"},
		{"password with other letters", "app", "app_a", NewSecret("pässword-pässword"), "password"},
	} {
		for _, kind := range []Kind{Postgres, MySQL, Redis, RabbitMQ} {
			err := Ensure(t.Context(), server(kind), c.role, Login{User: c.user, Password: c.password})
			f := fault.From(err)
			if f == nil || f.Code != codeInvalid || f.Target != c.at {
				t.Errorf("%s, %s: %v, want an error at %s", c.name, kind, err, c.at)
			}
		}
	}
}

// TestServersThatCannotBe are refused before anything is dialled.
func TestServersThatCannotBe(t *testing.T) {
	good := Server{Kind: Postgres, Host: "192.0.2.1", Port: 1}
	for name, change := range map[string]func(*Server){
		"kind":       func(s *Server) { s.Kind = "oracle" },
		"host":       func(s *Server) { s.Host = "a b" },
		"port":       func(s *Server) { s.Port = 70000 },
		"database":   func(s *Server) { s.Database = "a\x00b" },
		"ca":         func(s *Server) { s.TLS.CA = "no certificate" },
		"management": func(s *Server) { s.Kind, s.Management = RabbitMQ, "https://user:password@host" },
	} {
		s := good
		change(&s)
		if _, err := Check(t.Context(), s); fault.From(err) == nil || fault.From(err).Code != codeInvalid || fault.From(err).Target != name {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSecretIsNotSeen however it is printed.
func TestSecretIsNotSeen(t *testing.T) {
	s := Server{Admin: Login{User: "u", Password: NewSecret("hidden-password")}}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprintf("%v %+v %#v %s %q", s, s, s, s.Admin.Password, s.Admin.Password), string(b)} {
		if strings.Contains(text, "hidden") || !strings.Contains(text, "[redacted]") {
			t.Errorf("it shows as %s", text)
		}
	}
}

// TestGrantedDatabase: in GRANT, '_' and '%' stand for other databases as well.
func TestGrantedDatabase(t *testing.T) {
	for name, want := range map[string]string{"app": "`app`", "app_data": "`app\\_data`", "100%": "`100\\%`", "a`b": "`a``b`", `a\b`: "`a\\\\b`"} {
		if got := grantedDatabase(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}
