package target

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// tls returns the configuration for connections to the server, nil for none.
func (s Server) tls() (*tls.Config, error) {
	if s.TLS.Disable {
		return nil, nil
	}
	c := &tls.Config{ServerName: s.TLS.Name, MinVersion: tls.VersionTLS12}
	if c.ServerName == "" {
		c.ServerName = s.Host
	}
	if s.TLS.CA != "" {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM([]byte(s.TLS.CA)) {
			return nil, invalid("ca", "There is no certificate in the server's CA.")
		}
	}
	return c, nil
}

// unanswered explains an error that the server did not send: of the network or of
// TLS. It returns nil for any other.
func (s Server) unanswered(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err // explained
	}
	if why, fix := badTLS(err); why != "" {
		return fault.New(fault.Unavailable, codeTLS, "No trusted connection to '%s': %s.", s.address(), why).At(s.at()).WithFix("%s", fix).Because(err)
	}
	var op net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return s.unreachable("it does not answer in time", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return s.unreachable("nothing listens there", err)
	case errors.As(err, new(*net.DNSError)):
		return s.unreachable("the name cannot be resolved", err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return s.unreachable("the connection was lost", err)
	case errors.As(err, &op):
		return s.unreachable("the network does not lead there", err)
	}
	return nil
}

func (s Server) unreachable(why string, err error) error {
	return fault.New(fault.Unavailable, codeUnreachable, "The server '%s' cannot be reached: %s.", s.address(), why).At(s.at()).
		WithFix("look whether the server runs and whether Keyfleet's machine may connect to it").Because(err)
}

func badTLS(err error) (why, fix string) {
	var host x509.HostnameError
	var invalidCert x509.CertificateInvalidError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "its certificate is signed by an unknown authority", "register the server with the certificate of the CA that signed it"
	case errors.As(err, &host):
		names := append([]string(nil), host.Certificate.DNSNames...)
		for _, ip := range host.Certificate.IPAddresses {
			names = append(names, ip.String())
		}
		return "its certificate is for other names", "register the server under a name in its certificate: " + strings.Join(names, ", ")
	case errors.As(err, &invalidCert):
		return "its certificate does not count", "renew the server's certificate"
	case errors.As(err, new(*tls.CertificateVerificationError)), errors.As(err, new(tls.AlertError)):
		return "TLS could not be agreed on", "look at the server's TLS settings"
	case errors.As(err, new(tls.RecordHeaderError)):
		return "it does not speak TLS at this port", "turn on TLS at the server, or register it with TLS disabled"
	}
	return "", ""
}

// loginRefused is the one error for a login that a server does not take.
func (s Server) loginRefused(err error) error {
	return fault.New(fault.Invalid, codeLogin, "Error in username or password.").At(s.at()).Because(err)
}

func (s Server) failed(doing string, err error) error {
	return fault.New(fault.Unavailable, codeFailed, "The server '%s' refused: %s.", s.address(), doing).At(s.at()).Because(err)
}

func (s Server) notFound(what string, err error) error {
	return fault.New(fault.Invalid, codeNotFound, "There is no %s '%.255s' on the server '%s'.", what, s.Database, s.address()).At(s.at()).Because(err)
}

func (s Server) nameTaken(what, name, why string) error {
	return fault.New(fault.Conflict, codeNameTaken, "The %s '%s' on the server '%s' was not made by Keyfleet: %s.", what, name, s.address(), why).At(s.at()).
		WithFix("rename it, or give the connection another name")
}

// missing is a privilege that the administrator lacks, and the statement that grants it.
type missing struct{ privilege, grant string }

func (s Server) permissions(lack []missing) error {
	if len(lack) == 0 {
		return nil
	}
	var privileges, grants []string
	for _, m := range lack {
		privileges, grants = append(privileges, m.privilege), append(grants, m.grant)
	}
	return fault.New(fault.Conflict, codePermissions, "The administrator '%s' lacks: %s.", s.Admin.User, strings.Join(privileges, "; ")).At(s.at()).
		WithFix("%s", strings.Join(grants, " "))
}

// denied is a statement that the server did not allow.
func (s Server) denied(doing string, err error) error {
	return fault.New(fault.Conflict, codePermissions, "The administrator '%s' may not do what is needed for %s.", s.Admin.User, doing).At(s.at()).
		WithFix("the server's own words name the object").Because(err)
}

// until calls done until it is true, within the context.
func until(ctx context.Context, done func() (bool, error)) error {
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollInterval):
		}
	}
}
