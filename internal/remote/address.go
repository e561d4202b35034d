package remote

import (
	"net"
	"net/url"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

// ParseAddress reads where an SSH server is: host, host:port, user@host,
// ssh://user@host:port, or the URI of something else on that machine
// (https://host:6443), of which only the host counts, since its port is not that
// of SSH. IPv6 addresses may stand in brackets. address is host:port, with port 22
// unless another is given; user is empty if none is given.
func ParseAddress(s string) (user, address string, err error) {
	rest, port := strings.TrimSpace(s), "22"
	if scheme, _, ok := strings.Cut(rest, "://"); ok {
		u, err := url.Parse(rest)
		if err != nil {
			return "", "", badAddress(s, "it is not a URI")
		}
		if _, has := u.User.Password(); has {
			return "", "", badAddress("(not shown)", "it holds a password; only keys are used").WithFix("leave the password out")
		}
		user, rest = u.User.Username(), u.Host
		if !strings.EqualFold(scheme, "ssh") {
			rest = u.Hostname()
		}
	} else if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		if user, rest = rest[:at], rest[at+1:]; user == "" {
			return "", "", badAddress(s, "the user is missing")
		}
	}
	host := rest
	switch h, p, err := net.SplitHostPort(rest); {
	case err == nil:
		host, port = h, p
	case strings.HasPrefix(rest, "[") && strings.HasSuffix(rest, "]"):
		host = rest[1 : len(rest)-1]
	case strings.Count(rest, ":") == 1: // more colons: an IPv6 address
		return "", "", badAddress(s, "its port is not a number")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", "", badAddress(s, "its port is not a number from 1 to 65535")
	}
	if !plausible(host) || strings.Contains(host, ":") && !isIP(host) {
		return "", "", badAddress(s, "the host is missing or is not a name")
	}
	if strings.HasPrefix(user, "-") || user != "" && !plausible(user) {
		return "", "", badAddress(s, "the user is not a name")
	}
	return user, net.JoinHostPort(host, port), nil
}

// plausible keeps out what can be no name of a host or a user, and what would have
// a meaning of its own in a line of known_hosts.
func plausible(s string) bool {
	for _, r := range s {
		if r <= ' ' || r == 0x7f || strings.ContainsRune(`/\@,*?!|#[]"'`, r) {
			return false
		}
	}
	return s != ""
}

func isIP(host string) bool {
	host, _, _ = strings.Cut(host, "%") // fe80::1%eth0
	return net.ParseIP(host) != nil
}

func badAddress(s, why string) *fault.Error {
	return fault.New(fault.Invalid, "", "%q is not the address of an SSH server: %s.", s, why).
		WithFix("write host, host:port or ssh://user@host:port")
}
