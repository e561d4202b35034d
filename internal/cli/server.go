package cli

import (
	"context"
	"net"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/servicelinker"
)

// versionServers is the api-version of registered servers, whatever their kind.
const versionServers = "2024-08-01"

// serverKind is a kind of servers on which Keyfleet can make logins.
type serverKind struct {
	word      string // of this command line
	target    string // of connections to it
	provider  string
	typ       string
	databases bool // its resource ids may name a database
}

func serverKinds() []serverKind {
	return []serverKind{
		{"postgres", "postgres-flexible", "Microsoft.DBforPostgreSQL", "flexibleServers", true},
		{"mysql", "mysql-flexible", "Microsoft.DBforMySQL", "flexibleServers", true},
		{"redis", "redis", "Microsoft.Cache", "redis", true},
		{"rabbitmq", "rabbitmq", "Keyfleet.Messaging", "rabbitmq", false},
	}
}

// kindOf finds a kind by its word.
func kindOf(word string) (serverKind, error) {
	var words []string
	for _, k := range serverKinds() {
		if k.word == word {
			return k, nil
		}
		words = append(words, k.word)
	}
	return serverKind{}, usagef("%q is no kind of servers", word).withFix("use one of %s", strings.Join(words, ", "))
}

// targetKind is the kind of servers behind a target, on which Keyfleet makes logins.
func targetKind(target string) (serverKind, bool) {
	for _, k := range serverKinds() {
		if k.target == target {
			return k, true
		}
	}
	return serverKind{}, false
}

func (t *tool) serverView() view[object] {
	return objectView(
		field("Name", "name"), derived("Group", object.group),
		derived("Kind", func(o object) string {
			for _, k := range serverKinds() {
				if strings.EqualFold(o.str("type"), k.provider+"/"+k.typ) {
					return k.word
				}
			}
			return o.str("type")
		}),
		field("State", "properties.state"), field("Host", "properties.fullyQualifiedDomainName"), field("Port", "properties.port"),
	).with(only(
		derived("TLS", func(o object) string {
			if o.str("properties.disableTls") == "true" {
				return "no"
			}
			return "yes"
		}),
		field("Administrator", "properties.administratorLogin"), field("Reached at", "properties.keyfleetEndpoint"),
		field("Management", "properties.managementEndpoint"), t.timeAt("Checked", "properties.checked"),
		derived("Warnings", func(o object) string { return lines(o.strs("properties.warnings")...) }),
		field("Location", "location"), field("Id", "id"),
	)...)
}

// findServer finds a server of a kind by its name.
func (t *tool) findServer(ctx context.Context, k serverKind, name string) (object, error) {
	return t.find(ctx, k.provider, k.typ, "server", name, versionServers)
}

func (t *tool) serverCommand() *cobra.Command {
	list := t.verb("list [KIND]", "List the registered servers of the subscription", "keyfleet server list postgres", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) error {
			kinds := serverKinds()
			if len(args) > 0 {
				k, err := kindOf(args[0])
				if err != nil {
					return err
				}
				kinds = []serverKind{k}
			}
			var all []object
			for _, k := range kinds {
				some, err := t.listResources(ctx, k.provider, k.typ, versionServers)
				if err != nil {
					return err
				}
				all = append(all, some...)
			}
			return many(t, all, t.serverView())
		})
	show := t.verb("show KIND NAME", "Show how a server is reached, and what was last seen of it", "keyfleet server show postgres db1", cobra.ExactArgs(2),
		func(ctx context.Context, args []string) error {
			k, err := kindOf(args[0])
			if err != nil {
				return err
			}
			o, err := t.findServer(ctx, k, args[1])
			if err != nil {
				return err
			}
			return one(t, o, t.serverView())
		})
	var yes bool
	del := t.verb("delete KIND NAME", "Forget a server; nothing on it is touched", "", cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
		k, err := kindOf(args[0])
		if err != nil {
			return err
		}
		o, err := t.findServer(ctx, k, args[1])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Server %s will be forgotten, and the login of its administrator with it", o.name()); err != nil {
			return err
		}
		return t.deleteURL(ctx, t.client.ARM(o.str("id")), versionServers, true, "Server "+o.name(), "keyfleet server list "+k.word)
	})
	del.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c := t.noun("server", "Servers on which Keyfleet makes logins for connections", t.serverRegister(), list, show, del)
	for _, verb := range c.Commands() {
		verb.ValidArgsFunction = t.completeServers
	}
	return c
}

// completeServers completes the kind, and then the name.
func (t *tool) completeServers(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
	return t.completer(cmd, s, func(ctx context.Context) ([]string, error) {
		if len(args) == 0 {
			var words []string
			for _, k := range serverKinds() {
				words = append(words, k.word)
			}
			return words, nil
		}
		k, err := kindOf(args[0])
		if err != nil || len(args) > 1 {
			return nil, err
		}
		all, err := t.listResources(ctx, k.provider, k.typ, versionServers)
		return namesOf(all), err
	})
}

// serverFlags say how a server is reached.
type serverFlags struct {
	server       servicelinker.ServerProperties
	passwordFile string
	caFile       string
}

func (t *tool) serverRegister() *cobra.Command {
	var f serverFlags
	var location string
	c := t.verb("register KIND NAME", "Register a server that exists, or change how it is reached", `
keyfleet server register postgres db1 --host db1.example.net --admin postgres --password-file pw.txt --ca-file ca.pem
keyfleet server register redis cache --host 10.1.0.7 --admin default --password-file - --disable-tls
keyfleet server register rabbitmq mq --host mq.example.net --admin admin --password-file pw.txt --management https://mq.example.net:15671`,
		cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
			k, err := kindOf(args[0])
			if err != nil {
				return err
			}
			properties, err := t.serverProperties(k, f)
			if err != nil {
				return err
			}
			u, loc, err := t.newResource(ctx, location, k.provider, k.typ, args[1])
			if err != nil {
				return err
			}
			o, err := t.call(ctx, request(http.MethodPut, u, versionServers, servicelinker.Server{Location: loc, Properties: properties}))
			if err != nil {
				return err
			}
			for _, w := range o.strs("properties.warnings") {
				t.warn("%s", w)
			}
			return changed(t, o, t.serverView(), "Server %s is registered; it is %s.", args[1], o.str("properties.state"))
		})
	c.Long = `Register a server that exists, or change how it is reached. KIND is postgres,
mysql, redis or rabbitmq. Keyfleet logs in as the administrator to make, rotate
and remove the logins of connections; the password comes from a file or from
standard input, never from the command line, and line breaks at its end do not
count. A server that does not let Keyfleet in is not registered.`
	fs := c.Flags()
	fs.StringVar(&f.server.FQDN, "host", "", "host name or address, as workloads reach the server (required)")
	fs.IntVar(&f.server.Port, "port", 0, "port (default: that of the kind)")
	fs.StringVar(&f.server.Administrator, "admin", "", "user as whom Keyfleet makes logins (required)")
	fs.StringVar(&f.passwordFile, "password-file", "", "file that holds the administrator's password; - is standard input (required)")
	fs.StringVar(&f.caFile, "ca-file", "", "PEM file of the CA of the server's certificate (default: the roots of Keyfleet's machine)")
	fs.StringVar(&f.server.Reach, "reach", "", "HOST:PORT at which Keyfleet itself reaches the server, where that differs")
	fs.StringVar(&f.server.Management, "management", "", "URL of the management API, for rabbitmq")
	fs.BoolVar(&f.server.Plain, "disable-tls", false, "connect without TLS")
	fs.StringVarP(&location, "location", "l", "", "location (default: the group's)")
	for _, name := range []string{"host", "admin", "password-file"} {
		_ = c.MarkFlagRequired(name)
	}
	c.MarkFlagsMutuallyExclusive("ca-file", "disable-tls")
	return c
}

// serverProperties checks the flags against each other and reads the files.
func (t *tool) serverProperties(k serverKind, f serverFlags) (servicelinker.ServerProperties, error) {
	p := f.server
	switch {
	case k.word == "rabbitmq" && p.Management == "":
		return p, usagef("logins of RabbitMQ are made through its management API").withFix("add --management https://%s", net.JoinHostPort(p.FQDN, "15671"))
	case k.word != "rabbitmq" && p.Management != "":
		return p, usagef("--management is for rabbitmq, not for %s", k.word).withFix("leave it out")
	case f.passwordFile == "-" && f.caFile == "-":
		return p, usagef("--password-file and --ca-file cannot both be standard input").withFix("name a file in one of them")
	}
	if p.Reach != "" {
		if _, _, err := net.SplitHostPort(p.Reach); err != nil {
			return p, usagef("--reach %s is not of the form HOST:PORT", p.Reach).withFix("add the port")
		}
	}
	var err error
	if p.Password, err = t.readSecret(f.passwordFile); err != nil {
		return p, err
	}
	if f.caFile != "" {
		text, err := t.readBody(f.caFile)
		if err != nil {
			return p, err
		}
		p.CA = string(text)
	}
	return p, nil
}

// readSecret reads a password from a file, or from standard input for "-".
// Line breaks at its end are those of an editor.
func (t *tool) readSecret(file string) (string, error) {
	b, err := t.readBody(file)
	if err != nil {
		return "", err
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" {
		if file == "-" {
			file = "standard input"
		}
		return "", usagef("there is no secret in %s", file).withFix("write it into a file that only you can read, and name that")
	}
	return secret, nil
}
