package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/servicelinker"
	"keyfleet.dev/keyfleet/client"
)

// versionLinkers is the api-version of connections.
const versionLinkers = "2024-04-01"

func (t *tool) connectionView() view[object] {
	return objectView(
		field("Name", "name"), field("Target", "properties.targetService.target"), field("Namespace", "properties.scope"),
		field("State", "properties.provisioningState"), field("Problem", "properties.problem.code"),
	).with(only(
		field("Layer", "properties.problem.layer"), field("Object", "properties.problem.object"), field("Message", "properties.problem.message"),
		field("Said there", "properties.problem.raw"), field("Fix", "properties.problem.fix"), field("Waiting for", "properties.waiting"),
	)...).with(connectionObjects()...).with(only(
		derived("Credential", func(o object) string {
			switch o.str("properties.credential.made") {
			case "true":
				return "made by Keyfleet"
			case "false":
				return "given"
			}
			return ""
		}),
		field("User", "properties.credential.user"), field("Vault", "properties.credential.keyVaultId"),
		field("Vault secret", "properties.credential.keyVaultSecretName"), field("Version", "properties.credential.version"),
		t.timeAt("Created", "properties.credential.created"),
		each("Delivered", "properties.delivered.objects", func(d object) string { return d.str("kind") + " " + d.str("namespace") + "/" + d.str("name") }),
		field("Repaired", "properties.delivered.repaired"), t.timeAt("Seen", "properties.delivered.time"),
		each("Old values in", "properties.delivered.consumers", func(p object) string { return p.str("pod") + " since " + t.when(p.time("since")) }),
		derived("Proven", func(o object) string {
			at := o.time("properties.delivered.proven")
			if at.IsZero() {
				return ""
			}
			return fmt.Sprintf("%s by a login that took %d ms", t.when(at), o.num("properties.delivered.tookMilliseconds"))
		}),
		field("Id", "id"),
	)...)
}

// each is a column with a line for every object of a list.
func each(head, path string, line func(o object) string) column[object] {
	return derived(head, func(o object) string {
		var out []string
		for _, e := range o.objects(path) {
			out = append(out, line(e))
		}
		return lines(out...)
	})
}

// connectionObjects are the columns for what a workload names.
func connectionObjects() []column[object] {
	return only(
		field("Secret", "properties.kubernetesResourceName.secret"), field("Service account", "properties.kubernetesResourceName.serviceAccount"),
		field("Secret provider class", "properties.kubernetesResourceName.secretProviderClass"),
	)
}

// connectionURL is the URL of a connection of a cluster, or of all of them for an
// empty name. cluster is a name or a resource id.
func (t *tool) connectionURL(ctx context.Context, cluster, name string) (string, error) {
	if !strings.HasPrefix(cluster, "/") {
		o, err := t.findCluster(ctx, cluster)
		if err != nil {
			return "", err
		}
		cluster = o.str("id")
	}
	c, err := t.connect(ctx)
	if err != nil {
		return "", err
	}
	u := c.ARM(strings.TrimRight(cluster, "/") + "/providers/" + servicelinker.Type)
	if name != "" {
		u += "/" + url.PathEscape(name)
	}
	return u, nil
}

// clusterConnections are the connections of the cluster that --cluster names.
type clusterConnections struct {
	t       *tool
	cluster string
}

func (l *clusterConnections) url(ctx context.Context, name string) (string, error) {
	return l.t.connectionURL(ctx, l.cluster, name)
}

// call sends a request about a connection; path follows its URL.
func (l *clusterConnections) call(ctx context.Context, method, name, path string) (object, *client.Response, error) {
	u, err := l.url(ctx, name)
	if err != nil {
		return object{}, nil, err
	}
	return l.t.callFull(ctx, request(method, u+path, versionLinkers, nil))
}

// act starts an operation and waits for it.
func (l *clusterConnections) act(ctx context.Context, name, path string) (object, error) {
	_, resp, err := l.call(ctx, http.MethodPost, name, path)
	if err != nil {
		return object{}, err
	}
	return l.t.follow(ctx, resp, name, l.back(name))
}

// back is the command that shows a connection.
func (l *clusterConnections) back(name string) string {
	return "keyfleet connection show " + name + " --cluster " + l.cluster
}

func (t *tool) connectionCommand() *cobra.Command {
	l := &clusterConnections{t: t}
	list := t.verb("list", "List the connections of a cluster", "keyfleet connection list --cluster prod", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		u, err := l.url(ctx, "")
		if err != nil {
			return err
		}
		all, err := t.list(ctx, u, versionLinkers)
		if err != nil {
			return err
		}
		return many(t, all, t.connectionView())
	})
	show := t.verb("show NAME", "Show how a connection stands: what is wrong, its credential, what was delivered", "keyfleet connection show shop-db --cluster prod", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, _, err := l.call(ctx, http.MethodGet, args[0], "")
			if err != nil {
				return err
			}
			return one(t, o, t.connectionView())
		})
	configuration := t.verb("list-configuration NAME", "List the variables of a connection, without the values of credentials", "", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, _, err := l.call(ctx, http.MethodPost, args[0], "/listConfigurations")
			if err != nil {
				return err
			}
			return many(t, o.objects("configurations"), objectView(
				field("Name", "name"), field("Value", "value"), field("Type", "configType"), field("Description", "description")))
		})
	of := []*cobra.Command{list, show, t.connectionDelete(l), t.connectionRotate(l), t.connectionValidate(l), t.connectionDiagnose(l), configuration}
	for _, verb := range of {
		verb.Flags().StringVar(&l.cluster, "cluster", "", "name or resource id of the cluster (required)")
		_ = verb.MarkFlagRequired("cluster")
		_ = verb.RegisterFlagCompletionFunc("cluster", t.completeClusters)
	}
	return t.noun("connection", "What connects the workloads of a cluster with a service", append([]*cobra.Command{t.connectionCreate()}, of...)...)
}

func (t *tool) connectionRotate(l *clusterConnections) *cobra.Command {
	return t.verb("rotate NAME", "Replace the credential of a connection, without a gap", "keyfleet connection rotate shop-db --cluster prod", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			if _, err := l.act(ctx, args[0], "/rotate"); err != nil {
				return err
			}
			o, _, err := l.call(ctx, http.MethodGet, args[0], "")
			if err != nil {
				return err
			}
			return changed(t, o, t.connectionView(), "Connection %s has a new credential: user %s, version %s.", args[0],
				o.str("properties.credential.user"), o.str("properties.credential.version"))
		})
}

func (t *tool) completeClusters(cmd *cobra.Command, _ []string, s string) ([]string, cobra.ShellCompDirective) {
	return t.completeResources(cmd, nil, s, containerService, managedClusters, client.VersionClusters)
}

// follow waits for the operation that an answer speaks of, and returns its last
// state. back is the command that shows the connection.
func (t *tool) follow(ctx context.Context, resp *client.Response, name, back string) (o object, err error) {
	err = t.waiting(ctx, defaultWait, back, func(ctx context.Context, p *progress) error {
		last, err := t.client.Wait(ctx, resp, func(s string) { p.show("Connection %s: %s", name, s) })
		if err != nil {
			return err
		}
		return last.Into(&o)
	})
	if e := (*client.Error)(nil); errors.As(err, &e) && e.Fix == "" {
		e.Fix = back
	}
	return o, err
}

func (t *tool) connectionDelete(l *clusterConnections) *cobra.Command {
	var keep, yes bool
	c := t.verb("delete NAME", "Delete a connection with everything that it made", "keyfleet connection delete shop-db --cluster prod --keep", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		u, err := l.url(ctx, args[0])
		if err != nil {
			return err
		}
		req := request(http.MethodDelete, u, versionLinkers, nil)
		stay := "what it made in the cluster and on the server goes with it"
		if keep {
			req.Query = url.Values{"keep": {"true"}}
			stay = "its objects in the cluster stay, and nobody looks after them any more"
		}
		if err := t.confirm(yes, "Connection %s will be deleted; %s", args[0], stay); err != nil {
			return err
		}
		_, resp, err := t.callFull(ctx, req)
		if err != nil {
			return err
		}
		if resp.Status == http.StatusNoContent {
			return t.done("Connection %s does not exist; there is nothing to delete.", args[0])
		}
		o, err := t.follow(ctx, resp, args[0], l.back(args[0]))
		if err != nil {
			return err
		}
		told := []string{fmt.Sprintf("Connection %s is deleted.", args[0])}
		for _, r := range o.strs("properties.removed") {
			told = append(told, "  removed  "+r)
		}
		for _, k := range o.strs("properties.kept") {
			told = append(told, "  kept     "+k)
		}
		return changed(t, o, objectView(field("Name", "name"), field("State", "status")), "%s", lines(told...))
	})
	c.Flags().BoolVar(&keep, "keep", false, "leave the objects in the cluster")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func (t *tool) connectionValidate(l *clusterConnections) *cobra.Command {
	return t.verb("validate NAME", "Look at everything about a connection, down to a login; fails where something is wrong", "keyfleet connection validate shop-db --cluster prod",
		cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
			o, err := l.act(ctx, args[0], "/validateLinker")
			if err != nil {
				return err
			}
			found := o.objects("properties.validationDetail")
			if len(found) == 0 {
				return errors.New("the server answered without a result of the validation")
			}
			switch t.form() {
			case "table", "tsv", "name":
				err = many(t, found, objectView(field("Result", "result"), field("Name", "name"), derived("Message", func(f object) string {
					return orElse(f.str("errorMessage"), orElse(f.str("message"), f.str("description"))) // Azure's name for it, and Keyfleet's
				})))
			default:
				err = t.data(o)
			}
			if err == nil && slices.ContainsFunc(found, func(f object) bool { return f.str("result") == "failure" }) {
				err = exitStatus(client.ExitFailed)
			}
			return err
		})
}

// connectionFlags say what a connection is.
type connectionFlags struct {
	name, cluster, source                  string
	targetID, server, database             string
	namespace, clientType, vault, identity string
	busy                                   string
	dryRun                                 bool
	words                                  wordFlags
	secret, principal, keys, values, csi   *words
}

func (t *tool) connectionCreate() *cobra.Command {
	var f connectionFlags
	c := t.verb("create TARGET", "Connect the workloads of a namespace with a service, or change how", `
keyfleet connection create postgres-flexible -n shop-db --cluster prod --server db1 --database shop --kube-namespace shop --client-type python
keyfleet connection create redis -n cache --cluster prod --server cache --secret
keyfleet connection create keyvault -n certs --cluster prod --target-id ID --workload-identity shop
keyfleet connection create keyvault -n files --cluster prod --target-id ID --enable-csi DB_PASSWORD=db-password tls.pem=web
keyfleet connection create sql -n old-db --cluster prod --target-id ID --secret name=app secret-file=pw.txt
keyfleet connection create storage-blob -n files --cluster prod --target-id ID --service-principal client-id=ID secret-file=- --customized-keys AZURE_STORAGEBLOB_CLIENTID=CLIENT`,
		cobra.ArbitraryArgs, nil)
	c.Long = `Connect the workloads of a namespace with a service, or change how. TARGET is a
word such as postgres-flexible, redis, keyvault or storage-blob. --secret,
--service-principal, --customized-keys and --value take words of the form
NAME=VALUE, up to the next flag. For postgres-flexible, mysql-flexible, redis and
rabbitmq Keyfleet makes the login itself where no secret is given.`
	wait := waitFlags(c, true)
	f.declare(c)
	_ = c.RegisterFlagCompletionFunc("cluster", t.completeClusters)
	_ = c.RegisterFlagCompletionFunc("workload-identity", t.completeIdentities)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		return t.createConnection(cmd.Context(), &f, args, wait())
	}
	return c
}

func (f *connectionFlags) declare(c *cobra.Command) {
	fs := c.Flags()
	f.words.set = fs
	fs.StringVarP(&f.name, "connection", "n", "", "name of the connection (required)")
	fs.StringVar(&f.cluster, "cluster", "", "name or resource id of the cluster")
	fs.StringVar(&f.source, "source-id", "", "instead of --cluster: its resource id")
	fs.StringVar(&f.targetID, "target-id", "", "resource id of the service")
	fs.StringVar(&f.server, "server", "", "instead of an id: name of a registered server")
	fs.StringVar(&f.database, "database", "", "database on that server")
	fs.StringVar(&f.namespace, "kube-namespace", "default", "namespace of the workloads")
	fs.StringVar(&f.clientType, "client-type", "", "what the variables are named for: dotnet, java, python, go, nodejs, springBoot and so on (default: none)")
	fs.StringVar(&f.vault, "vault-id", "", "resource id of the vault for the credential (default: that of the cluster's connections)")
	fs.StringVar(&f.identity, "workload-identity", "", "name or resource id of the managed identity that the workloads act as")
	fs.StringVar(&f.busy, "if-busy", "wait", "what to do while the cluster is being changed: wait or fail")
	fs.BoolVar(&f.dryRun, "dry-run", false, "only say what would be made and what is missing")
	f.secret = f.words.add("secret", "a login by secret: name=USER with secret-file=FILE, secret=S, secret-uri=URL or secret-name=N; nothing: Keyfleet makes it")
	f.principal = f.words.add("service-principal", "client-id=ID [object-id=ID] with secret-file=FILE or secret=S")
	f.keys = f.words.add("customized-keys", "NAME=YOURS: variables that get another name")
	f.values = f.words.add("value", "NAME=VALUE: what the target is described by, where its id does not say it; no secrets")
	f.csi = f.words.add("enable-csi", "keyvault: by the Secrets Store CSI driver; KEY=OBJECT: a secret or certificate of the vault, and its key in the Secret; needs no other authentication")
	_ = c.MarkFlagRequired("connection")
	c.MarkFlagsOneRequired("cluster", "source-id")
	c.MarkFlagsMutuallyExclusive("cluster", "source-id")
	c.MarkFlagsOneRequired("target-id", "server", "value")
	c.MarkFlagsMutuallyExclusive("target-id", "server")
	c.MarkFlagsMutuallyExclusive("secret", "service-principal", "workload-identity")
	c.MarkFlagsMutuallyExclusive("secret", "service-principal", "enable-csi")
}

// query is what a request says beside its body.
func (f *connectionFlags) query() url.Values {
	if f.busy == "fail" {
		return url.Values{"ifBusy": {"fail"}}
	}
	return nil
}

func (t *tool) createConnection(ctx context.Context, f *connectionFlags, args []string, wait bool) error {
	target, err := f.words.sort(args)
	if err != nil {
		return err
	}
	if f.busy != "wait" && f.busy != "fail" {
		return usagef("--if-busy %s is not known", f.busy).withFix("use wait or fail")
	}
	l, err := t.linker(ctx, f, target)
	if err != nil {
		return err
	}
	if f.dryRun {
		return t.planConnection(ctx, f, l)
	}
	u, err := t.connectionURL(ctx, orElse(f.source, f.cluster), f.name)
	if err != nil {
		return err
	}
	req := request(http.MethodPut, u, versionLinkers, l)
	req.Query = f.query()
	o, resp, err := t.callFull(ctx, req)
	if err != nil {
		return err
	}
	back := "keyfleet connection show " + f.name + " --cluster " + orElse(f.source, f.cluster)
	if !wait {
		t.say("To see how it stands: %s", back)
		return changed(t, o, t.connectionView(), "Connection %s is accepted.", f.name)
	}
	if _, err := t.follow(ctx, resp, f.name, back); err != nil {
		return err
	}
	if o, err = t.call(ctx, request(http.MethodGet, u, versionLinkers, nil)); err != nil {
		return err
	}
	if t.form() != "table" {
		return one(t, o, t.connectionView())
	}
	if err := t.done("Connection %s is there; it is %s.", f.name, o.str("properties.provisioningState")); err != nil {
		return err
	}
	return writeOne(t.out, o, append(connectionObjects(), field("Namespace", "properties.scope"), derived("In a container", envFrom), derived("In its pod", csiVolume)))
}

// csiVolume is the part of a pod's specification by which the CSI driver makes the Secret.
func csiVolume(o object) string {
	class := o.str("properties.kubernetesResourceName.secretProviderClass")
	if class == "" {
		return ""
	}
	return "volumes:\n- name: vault\n  csi: {driver: secrets-store.csi.k8s.io, readOnly: true, volumeAttributes: {secretProviderClass: " + class + "}}"
}

// envFrom is the part of a container's specification that hands it the variables.
func envFrom(o object) string {
	secret := o.str("properties.kubernetesResourceName.secret")
	if secret == "" {
		return ""
	}
	return "envFrom:\n- secretRef: {name: " + secret + "}"
}

// linker is the body that the flags ask for.
func (t *tool) linker(ctx context.Context, f *connectionFlags, target string) (servicelinker.Linker, error) {
	var l servicelinker.Linker
	p := &l.Properties
	p.ClientType, p.Scope = f.clientType, f.namespace
	keys, err := f.keys.fields()
	if err != nil {
		return l, err
	}
	if len(keys) > 0 {
		p.ConfigurationInfo = &servicelinker.ConfigurationInfo{CustomizedKeys: keys}
	}
	if p.AuthInfo, err = t.authInfo(ctx, f, target); err != nil {
		return l, err
	}
	if f.vault != "" {
		p.SecretStore = &servicelinker.SecretStore{KeyVaultID: f.vault}
	}
	p.TargetService, err = t.targetService(ctx, f, target)
	return l, err
}

func (t *tool) targetService(ctx context.Context, f *connectionFlags, target string) (servicelinker.TargetService, error) {
	s := servicelinker.TargetService{Type: "SelfHostedServer", ID: f.targetID, Target: target}
	var err error
	if s.Values, err = f.values.fields(); err != nil {
		return s, err
	}
	if f.database != "" && f.server == "" {
		return s, usagef("--database is a database on a registered server").withFix("add --server NAME, or name the database in --target-id")
	}
	if f.server != "" {
		k, ok := targetKind(target)
		if !ok {
			return s, usagef("there are no registered servers for the target %s", target).withFix("give --target-id ID instead of --server")
		}
		if f.database != "" && !k.databases {
			return s, usagef("%s has virtual hosts, no databases", target).withFix("add --value vhost=%s instead", f.database)
		}
		o, err := t.findServer(ctx, k, f.server)
		if err != nil {
			return s, err
		}
		s.ID = o.str("id")
		if f.database != "" {
			s.ID += "/databases/" + f.database
		}
	}
	if s.ID != "" {
		s.Type = "AzureResource"
	}
	if f.csi.given {
		s.ResourceProperties, err = f.csiDriver(target)
	}
	return s, err
}

// csiDriver is what --enable-csi asks for.
func (f *connectionFlags) csiDriver(target string) (*servicelinker.ResourceProperties, error) {
	if !strings.EqualFold(target, "keyvault") {
		return nil, usagef("--enable-csi is for the target keyvault, not for %s", target).withFix("leave it out")
	}
	p := &servicelinker.ResourceProperties{Type: "KeyVault", ConnectAsKubernetesCSIDriver: true}
	if len(f.csi.list) == 0 {
		return p, nil
	}
	var err error
	p.Objects, err = f.csi.fields()
	return p, err
}

func (t *tool) authInfo(ctx context.Context, f *connectionFlags, target string) (servicelinker.AuthInfo, error) {
	switch {
	case f.identity != "":
		id := f.identity
		if !strings.HasPrefix(id, "/") {
			o, err := t.findIdentity(ctx, id)
			if err != nil {
				return servicelinker.AuthInfo{}, err
			}
			id = o.str("id")
		}
		return servicelinker.AuthInfo{AuthType: "userAssignedIdentity", Identity: id}, nil
	case f.csi.given:
		return servicelinker.AuthInfo{AuthType: "userAssignedIdentity"}, nil
	case f.principal.given:
		return t.principalInfo(f)
	}
	return t.secretInfo(f, target)
}

func (t *tool) principalInfo(f *connectionFlags) (servicelinker.AuthInfo, error) {
	a := servicelinker.AuthInfo{AuthType: "servicePrincipalSecret"}
	w, err := f.principal.fields("client-id", "object-id", "secret-file", "secret")
	if err != nil {
		return a, err
	}
	a.ClientID, a.PrincipalID = w["client-id"], w["object-id"]
	if a.ClientID == "" {
		return a, usagef("--service-principal says no client id").withFix("add client-id=ID after it")
	}
	if a.Secret, err = t.givenSecret(w); err != nil {
		return a, err
	}
	if a.Secret == "" {
		return a, usagef("--service-principal says no secret").withFix("add secret-file=FILE after it; - is standard input")
	}
	return a, nil
}

func (t *tool) secretInfo(f *connectionFlags, target string) (servicelinker.AuthInfo, error) {
	a := servicelinker.AuthInfo{AuthType: "secret"}
	w, err := f.secret.fields("name", "secret-file", "secret", "secret-uri", "secret-name")
	if err != nil {
		return a, err
	}
	if len(w) == 0 {
		if _, ok := targetKind(target); !ok {
			return a, usagef("Keyfleet makes no login for the target %s; how shall the workloads log in?", target).
				withFix("add --workload-identity NAME, --service-principal client-id=ID secret-file=FILE, or --secret secret-file=FILE")
		}
		return a, nil
	}
	a.Name = w["name"]
	var from []string
	for _, name := range []string{"secret-file", "secret", "secret-uri", "secret-name"} {
		if w[name] != "" {
			from = append(from, name)
		}
	}
	switch {
	case len(from) == 0:
		return a, usagef("--secret names a user and no secret").withFix("add secret-file=FILE after it, or leave the name out where Keyfleet shall make the login")
	case len(from) > 1:
		return a, usagef("--secret says %s, which are several secrets", strings.Join(from, " and ")).withFix("give one of them")
	case from[0] == "secret-uri":
		a.SecretInfo = &servicelinker.SecretInfo{SecretType: "keyVaultSecretUri", Value: w["secret-uri"]}
	case from[0] == "secret-name" && f.vault == "":
		return a, usagef("--secret secret-name=%s is a secret of which vault?", w["secret-name"]).withFix("add --vault-id ID, or give secret-uri=URL")
	case from[0] == "secret-name":
		a.SecretInfo = &servicelinker.SecretInfo{SecretType: "keyVaultSecretReference", Name: w["secret-name"]}
	default:
		value, err := t.givenSecret(w)
		if err != nil {
			return a, err
		}
		a.SecretInfo = &servicelinker.SecretInfo{SecretType: "rawValue", Value: value}
	}
	return a, nil
}

// givenSecret is the secret in secret-file or, with a warning, in secret; empty if there is neither.
func (t *tool) givenSecret(w map[string]string) (string, error) {
	file, secret := w["secret-file"], w["secret"]
	switch {
	case file != "" && secret != "":
		return "", usagef("--service-principal says secret-file and secret, which are two secrets").withFix("give one of them")
	case file != "":
		return t.readSecret(file)
	case secret != "":
		t.warn("Whoever lists the processes of this machine sees secret=; secret-file=FILE keeps it to yourself.")
		return secret, nil
	}
	return "", nil
}
