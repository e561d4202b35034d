package connector

import (
	"encoding/csv"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/internal/fault"
)

func load(t testing.TB) Catalogue {
	t.Helper()
	c, err := LoadCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// row is a line of Azure's table: one variable of one combination.
type row struct{ target, typ, auth, client, name, secret, value, clusters, known string }

// azure reads the table of the names that Azure emits (testdata/azure-names.csv).
func azure(t testing.TB) []row {
	t.Helper()
	f, err := os.Open("testdata/azure-names.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var rows []row
	for _, l := range lines[1:] {
		rows = append(rows, row{l[0], l[1], l[2], l[4], l[5], l[6], l[7], l[8], l[9]})
	}
	return rows
}

// combination is a target with an authentication and a client.
type combination struct {
	target string
	auth   AuthType
	client string
}

// combinations lists everything in the catalogue.
func (c Catalogue) combinations() map[combination]Clients {
	all := map[combination]Clients{}
	for _, t := range c.Targets {
		for _, a := range t.Auth {
			for _, cs := range a.Clients {
				for _, client := range cs.For {
					all[combination{t.Word, a.Type, client}] = cs
				}
			}
		}
	}
	return all
}

// TestNoRowIsMissing compares all combinations of target, authentication and client
// with Azure's table, in both directions.
func TestNoRowIsMissing(t *testing.T) {
	c := load(t)
	have := c.combinations()
	want := map[combination]map[string]row{}
	for _, r := range azure(t) {
		k := combination{r.target, AuthType(r.auth), r.client}
		if want[k] == nil {
			want[k] = map[string]row{}
		}
		want[k][r.name] = r
	}
	rows := 0
	for k, names := range want {
		cs, ok := have[k]
		if !ok {
			t.Errorf("%v is missing", k)
			continue
		}
		for name, r := range names {
			rows++
			_, plain := cs.Env[name]
			_, secret := cs.SecretEnv[name]
			if r.secret == "true" && !secret || r.secret == "false" && !plain {
				t.Errorf("%v: %s, a credential: %s, is missing", k, name, r.secret)
			}
		}
		for name := range cs.Env {
			if _, ok := names[name]; !ok {
				t.Errorf("%v: %s is not in Azure's table", k, name)
			}
		}
		for name := range cs.SecretEnv {
			if _, ok := names[name]; !ok {
				t.Errorf("%v: %s is not in Azure's table", k, name)
			}
		}
	}
	for k, cs := range have {
		if _, ok := want[k]; !ok && cs.From != "own" {
			t.Errorf("%v is not in Azure's table and not marked as our own", k)
		}
	}
	t.Logf("%d rows of %d combinations", rows, len(want))
}

// documented are values with which a target's variables come out as in Azure's
// table, whose placeholders stand in angle brackets.
func documented(target string) map[string]string {
	v := map[string]string{
		"server": "<server>", "database": "<db>", "user": "<user>", "password": "<password>", "clientId": "<client-ID>", "clientSecret": "<client-secret>", "tenantId": "<tenant-ID>",
		"account": "<account>", "key": "<key>", "targetId": "/subscriptions/s", "vault": "<vault>", "secret": "<secret>",
	}
	switch target {
	case "redis":
		v["server"], v["password"], v["database"], v["user"] = "<name>", "<key>", "0", ""
	case "cosmos-cassandra":
		v["keyspace"], v["key"] = "<keyspace>", "<password>" // its user is the account
	case "appconfig", "signalr", "webpubsub":
		v["name"], v["keyId"] = "<name>", "<ID>"
	case "eventhub", "servicebus":
		v["namespace"], v["keyName"] = "<ns>", "<name>"
	}
	return v
}

// TestValuesAreAsDocumented compares the values of the targets that are used most,
// where the table shows one whole.
func TestValuesAreAsDocumented(t *testing.T) {
	c := load(t)
	targets := []string{"postgres-flexible", "mysql-flexible", "redis", "keyvault", "storage-blob", "storage-queue", "storage-table", "cosmos-cassandra", "servicebus", "eventhub", "webpubsub"}
	// Where we say more than the table: a port that need not be the default, the user of a Redis ACL.
	more := strings.NewReplacer(" port=5432", "", "<Uri.EscapeDataString(password)>", "<password>", "%3C", "<", "%3E", ">")
	compared := 0
	for _, r := range azure(t) {
		if !slices.Contains(targets, r.target) || r.clusters == "no" || !strings.Contains(r.value, "<") || r.auth == string(CSIAddOn) {
			continue
		}
		all, err := c.Variables(Request{Target: r.target, Auth: AuthType(r.auth), Client: r.client, Values: documented(r.target)})
		if err != nil {
			t.Errorf("%s %s %s: %v", r.target, r.auth, r.client, err)
			continue
		}
		i := slices.IndexFunc(all, func(v Variable) bool { return v.Name == r.name })
		if r.name == "AZURE_COSMOS_USERNAME" {
			r.value = "<account>"
		}
		if got, want := more.Replace(all[i].Value), more.Replace(r.value); got != want {
			t.Errorf("%s %s %s: %s is\n%s, want\n%s", r.target, r.auth, r.client, r.name, got, want)
		}
		compared++
	}
	if compared < 100 {
		t.Errorf("only %d values were compared", compared)
	}
	t.Logf("%d values", compared)
}

// TestCatalogueIsSound: each template can be read, speaks only of values that the
// target or its identity has, and no credential is in what is not called one.
func TestCatalogueIsSound(t *testing.T) {
	identity := map[string]bool{"clientId": true, "tenantId": true, "principalId": true, "targetId": true}
	for _, target := range load(t).Targets {
		known := maps.Clone(identity)
		for name := range target.Values {
			known[name] = true
		}
		credential := map[string]bool{}
		for _, name := range target.Secrets {
			known[name], credential[name] = true, true
		}
		names := func(text string) map[string]bool {
			parsed, err := parseTemplate(text)
			if err != nil {
				t.Errorf("%s: %v", target.Word, err)
			}
			all := map[string]bool{}
			parsed.names(all)
			for name := range all {
				if !known[name] {
					t.Errorf("%s: the value %s of %q is not described", target.Word, name, text)
				}
			}
			return all
		}
		for _, text := range target.Values {
			if text == nil {
				continue
			}
			for name := range names(*text) {
				if credential[name] {
					t.Errorf("%s: the default %q holds a credential", target.Word, *text)
				}
			}
		}
		if _, err := target.fill(nil); err != nil {
			t.Error(err)
		}
		for _, a := range target.Auth {
			for _, cs := range a.Clients {
				for _, text := range cs.SecretEnv {
					names(text)
				}
				for variable, text := range cs.Env {
					for name := range names(text) {
						// Event Hubs, Service Bus and JAAS lines that Azure does not call credentials hold one all the same.
						if credential[name] && a.Type == ServicePrincipal {
							t.Errorf("%s: %s holds %s and is not called a credential", target.Word, variable, name)
						}
					}
				}
			}
		}
	}
}

func TestVariables(t *testing.T) {
	c := load(t)
	pg := map[string]string{"host": "db.shop.svc", "port": "15432", "database": "shop", "user": "sc_web_a", "password": "it's a secret"}
	with := func(kv ...string) map[string]string {
		m := maps.Clone(pg)
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	cases := []struct {
		reason string
		r      Request
		want   map[string]string
	}{
		{
			"postgres, the default authentication, no client",
			Request{Target: "postgres-flexible", Values: pg},
			map[string]string{
				"AZURE_POSTGRESQL_HOST": "db.shop.svc", "AZURE_POSTGRESQL_PORT": "15432", "AZURE_POSTGRESQL_DATABASE": "shop",
				"AZURE_POSTGRESQL_USERNAME": "sc_web_a", "AZURE_POSTGRESQL_PASSWORD": "it's a secret",
			},
		},
		{
			"a conninfo is quoted",
			Request{Target: "postgres-flexible", Client: "python", Values: with("tls", "false")},
			map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": `dbname=shop host=db.shop.svc port=15432 sslmode=disable user=sc_web_a password='it\'s a secret'`},
		},
		{
			"a URL is escaped",
			Request{Target: "postgres-flexible", Client: "java", Values: with("password", "a&b c")},
			map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "jdbc:postgresql://db.shop.svc:15432/shop?sslmode=require&user=sc_web_a&password=a%26b%20c"},
		},
		{
			"an IPv6 address in a URL",
			Request{Target: "postgres-flexible", Client: "java", Values: with("host", "fd00::5", "password", "p")},
			map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "jdbc:postgresql://[fd00::5]:15432/shop?sslmode=require&user=sc_web_a&password=p"},
		},
		{
			"an IPv6 address in a conninfo",
			Request{Target: "postgres-flexible", Client: "python", Values: with("host", "fd00::5", "password", "p")},
			map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": "dbname=shop host=fd00::5 port=15432 sslmode=require user=sc_web_a password=p"},
		},
		{
			"an IPv6 address in a DSN",
			Request{Target: "mysql-flexible", Client: "go", Values: with("host", "fd00::5", "port", "3306", "password", "p")},
			map[string]string{"AZURE_MYSQL_CONNECTIONSTRING": "sc_web_a:p@tcp([fd00::5]:3306)/shop?tls=true"},
		},
		{
			"ADO.NET is quoted",
			Request{Target: "postgres-flexible", Client: "dotnet", Values: with("password", `a;b"c`)},
			map[string]string{"AZURE_POSTGRESQL_CONNECTIONSTRING": `Server=db.shop.svc;Database=shop;Port=15432;Ssl Mode=Require;User Id=sc_web_a;Password="a;b""c";`},
		},
		{
			"renamed",
			Request{Target: "keyvault", Auth: WorkloadIdentity, Values: map[string]string{"endpoint": "https://v1.vault.keyfleet.internal/", "clientId": "c1", "scope": "s"}, Rename: map[string]string{"AZURE_KEYVAULT_RESOURCEENDPOINT": "VAULT_URL"}},
			map[string]string{"VAULT_URL": "https://v1.vault.keyfleet.internal/", "AZURE_KEYVAULT_CLIENTID": "c1", "AZURE_KEYVAULT_SCOPE": "s"},
		},
		{
			"Redis with a user of an ACL",
			Request{Target: "redis", Auth: Secret, Client: "dotnet", Values: map[string]string{"host": "r", "user": "web", "password": "p", "tls": "false"}},
			map[string]string{"AZURE_REDIS_CONNECTIONSTRING": "r:6380,user=web,password=p,ssl=False,defaultDatabase=0"},
		},
		{
			"a variable of our own",
			Request{Target: "redis", Auth: Secret, Client: "springBoot", Values: map[string]string{"host": "r", "user": "web", "password": "p"}},
			map[string]string{
				"spring.redis.host": "r", "spring.redis.port": "6380", "spring.redis.database": "0", "spring.redis.ssl": "true", "spring.redis.password": "p",
				"spring.redis.username": "web",
			},
		},
		{
			"a target of our own",
			Request{Target: "rabbitmq", Values: map[string]string{"host": "q", "user": "web", "password": "p/q"}},
			map[string]string{
				"RABBITMQ_HOST": "q", "RABBITMQ_PORT": "5671", "RABBITMQ_USERNAME": "web", "RABBITMQ_PASSWORD": "p/q", "RABBITMQ_VHOST": "/", "RABBITMQ_SSL": "true",
				"RABBITMQ_CONNECTIONSTRING": "amqps://web:p%2Fq@q:5671/%2F",
			},
		},
	}
	for _, tc := range cases {
		all, err := c.Variables(tc.r)
		if err != nil {
			t.Errorf("%s: %v", tc.reason, err)
			continue
		}
		got := map[string]string{}
		for _, v := range all {
			got[v.Name] = v.Value
		}
		if !maps.Equal(got, tc.want) {
			t.Errorf("%s:\n%v, want\n%v", tc.reason, got, tc.want)
		}
	}
}

func TestRefusals(t *testing.T) {
	c := load(t)
	pg := map[string]string{"host": "h", "database": "d", "user": "u", "password": "p"}
	cases := []struct {
		reason string
		r      Request
		code   string
		says   string
	}{
		{"an unknown target", Request{Target: "oracle"}, "TargetTypeNotSupported", "postgres-flexible"},
		{"an authentication that the target has not", Request{Target: "storage-file", Auth: WorkloadIdentity}, "InvalidArgument", "are secret"},
		{"an authentication that clusters have not", Request{Target: "keyvault", Auth: SystemIdentity}, "InvalidArgument", "workload-identity, service-principal, csi-addon-identity"},
		{"a client that the target has not", Request{Target: "keyvault", Client: "django"}, "InvalidArgument", "Supported client types are dotnet, java"},
		{"no host", Request{Target: "postgres-flexible", Values: map[string]string{"database": "d", "user": "u", "password": "p"}}, "MissingTargetValue", "needs the values host"},
		{"nothing", Request{Target: "postgres-flexible"}, "MissingTargetValue", "database, host, password, user"},
		{"an empty value", Request{Target: "rabbitmq", Values: map[string]string{"host": "", "user": "u", "password": "p"}}, "MissingTargetValue", "host"},
		{"renaming what is not there", Request{Target: "postgres-flexible", Values: pg, Rename: map[string]string{"PGHOST": "X"}}, "InvalidCustomizedKey", "it has AZURE_POSTGRESQL_DATABASE"},
		{"renaming to what is there", Request{Target: "postgres-flexible", Values: pg, Rename: map[string]string{"AZURE_POSTGRESQL_HOST": "AZURE_POSTGRESQL_PORT"}}, "InvalidCustomizedKey", "would both be named"},
		{"renaming to what Kubernetes refuses", Request{Target: "postgres-flexible", Values: pg, Rename: map[string]string{"AZURE_POSTGRESQL_HOST": "A B"}}, "InvalidCustomizedKey", "letters, digits"},
	}
	for _, tc := range cases {
		_, err := c.Variables(tc.r)
		e := fault.From(err)
		if e == nil || e.Code != tc.code || !strings.Contains(e.Message+" "+e.Fix, tc.says) {
			t.Errorf("%s: %v, want %s that says %q", tc.reason, err, tc.code, tc.says)
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]string{"web": "sc-web-secret", "a-b": "sc-ab-secret", "ab": "sc-ab-secret", "conn_1.x": "sc-conn1x-secret"} {
		if got := SecretName(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		if err := CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "Web", "-", ".-_", "a b", "ä", strings.Repeat("a", 61)} {
		if err := CheckName(name); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%q: %v", name, err)
		}
	}
	there := []Placed{{"a-b", "default"}, {"web", "default"}}
	for _, tc := range []struct {
		want Placed
		ok   bool
	}{
		{Placed{"ab", "default"}, false},
		{Placed{"a.b", "default"}, false},
		{Placed{"ab", "shop"}, true},
		{Placed{"a-b", "default"}, true}, // itself
		{Placed{"abc", "default"}, true},
	} {
		if err := CheckCollision(tc.want, there); (err == nil) != tc.ok {
			t.Errorf("%v: %v", tc.want, err)
		}
	}
}

// FuzzTemplate: any text is a template or an error, and what stands outside of
// placeholders comes out as it was.
func FuzzTemplate(f *testing.F) {
	for _, r := range []string{"{host}:{port}", "{tls?a{host}:b}", "{password:url}", "{", "{a?b}", "{a:}", "}{", "{a?{b?c:d}:e}"} {
		f.Add(r)
	}
	f.Fuzz(func(t *testing.T, text string) {
		parsed, err := parseTemplate(text)
		if err != nil {
			return
		}
		got := parsed.expand(nil, map[string]bool{})
		if !strings.Contains(text, "{") && got != text {
			t.Errorf("%q becomes %q", text, got)
		}
	})
}
