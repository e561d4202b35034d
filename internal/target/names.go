package target

import (
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// nameRule leaves nothing that any of the servers would want quoted; names are quoted all the same.
var nameRule = regexp.MustCompile(`^[a-z][a-z0-9_]{0,62}$`)

// longest is how many characters a login's name has at most. MySQL's limit is the
// lowest one.
func longest(k Kind) int {
	if k == MySQL {
		return 32
	}
	return 63
}

// Slots returns the names of the two logins of a role.
func Slots(role string) [2]string { return [2]string{role + "_a", role + "_b"} }

// checkRole refuses names that cannot be, and a user that is no login of the role.
func checkRole(s Server, role, user string) error {
	slots := Slots(role)
	switch limit := longest(s.Kind); {
	case !nameRule.MatchString(role) || len(slots[0]) > limit:
		return invalid("role", "'%.100s' is no name of a role: 1 to %d lower-case letters, digits and '_', the first one a letter.", role, limit-2)
	case !slices.Contains(slots[:], user):
		return invalid("user", "'%.100s' is no login of the role '%s': they are '%s' and '%s'.", user, role, slots[0], slots[1])
	case s.Admin.User == role || slices.Contains(slots[:], s.Admin.User):
		return invalid("role", "The name '%s' belongs to the administrator.", s.Admin.User)
	}
	return nil
}

// checkPassword refuses passwords that servers or clients may read differently
// from us: they would have to be normalised, escaped or cut.
func checkPassword(p Secret) error {
	v := p.Reveal()
	if len(v) < 8 || len(v) > 128 || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return invalid("password", "A password has 8 to 128 characters of ASCII, without spaces.")
	}
	return nil
}

func (s Server) check() error {
	switch {
	case s.Host == "" || strings.ContainsAny(s.Host, " /@?#\t\r\n\x00") || len(s.Host) > 253:
		return invalid("host", "'%.100s' is no host name or address.", s.Host)
	case s.Port < 1 || s.Port > 65535:
		return invalid("port", "%d is no port.", s.Port)
	case strings.ContainsRune(s.Database, 0) || len(s.Database) > 255:
		return invalid("database", "'%.100q' is no name of a database.", s.Database)
	}
	if n, err := strconv.Atoi(s.Database); s.Kind == Redis && s.Database != "" && (err != nil || n < 0) {
		return invalid("database", "'%.50s' is no number of a database.", s.Database)
	}
	if s.Kind == RabbitMQ {
		if u, err := url.Parse(s.Management); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil {
			return invalid("management", "The URL of RabbitMQ's management API is missing or wrong.").WithFix("https://HOST:15671")
		}
	}
	return nil
}

func (s Server) address() string { return net.JoinHostPort(s.Host, strconv.Itoa(s.Port)) }

// at names the server in errors.
func (s Server) at() string { return string(s.Kind) + "://" + s.address() }

func invalid(at, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, codeInvalid, format, args...).At(at)
}
