package extension

import (
	"encoding/json"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"
)

// Defaults and limits of the Key Vault settings.
const (
	DefaultStoreDirectory  = "/var/lib/waagent/Microsoft.Azure.KeyVault.Store/"
	DefaultMSIEndpoint     = "http://169.254.169.254/metadata/identity/oauth2/token"
	DefaultPollingInterval = time.Hour
	DefaultKeepVersions    = 3
	DefaultHookTimeout     = 30 * time.Second

	maxPollingSeconds = 366 * 24 * 3600
	maxHookSeconds    = 900
	minKeepVersions   = 2 // the predecessor stays for readers that are just opening it
	maxKeepVersions   = 100
	maxObserved       = 1000
)

// KeyVaultSettings is the public settings document of the Key Vault extension,
// of handler versions 1 to 3 for Linux and of the Windows handler, in one form.
type KeyVaultSettings struct {
	PollingInterval    time.Duration // pollingIntervalInS; default one hour
	RequireInitialSync bool          // success only when every certificate is there
	LinkOnRenewal      bool          // Windows
	ACLEnabled         bool          // apply acls
	KeepVersions       int           // Keyfleet's addition: files kept per certificate, the current one among them; default 3
	Certificates       []ObservedCertificate
	MSIEndpoint        string // the token endpoint, always the long path form
	MSIClientID        string // lower case; empty: the only identity of the node
	Logging            Logging
}

// ObservedCertificate is one element of observedCertificates.
type ObservedCertificate struct {
	Path    string // of the element, for messages: settings.secretsManagementSettings.observedCertificates[0]
	URL     string // exactly as the settings write it
	Host    string // host, with the port if the URL has one
	Vault   string // first label of the host, in the URL's casing
	Secret  string // name of the secret, which is the certificate's name
	Version string // empty, unless the URL names a version; then it never renews

	StoreLocation          string // directory, or LocalMachine/CurrentUser; empty: the handler's default
	StoreName              string // Windows; default MY there, ignored on Linux
	CustomSymbolicLinkName string // empty: LinkName is VAULT.SECRET
	ACLs                   []ACL
	Accounts               []string // Windows: readers of the private key
	KeyExportable          bool     // Windows
	ReloadHook             *ReloadHook
}

// LinkName is the name of the link to the newest file.
func (c ObservedCertificate) LinkName() string {
	if c.CustomSymbolicLinkName != "" {
		return c.CustomSymbolicLinkName
	}
	return c.Vault + "." + c.Secret
}

// Directory is where the certificate's files go on Linux. The store locations
// of Windows, which early documents used for Linux too, mean the default.
func (c ObservedCertificate) Directory() string {
	if !strings.HasPrefix(c.StoreLocation, "/") {
		return path.Clean(DefaultStoreDirectory)
	}
	return path.Clean(c.StoreLocation)
}

// ACL gives a user, and a group if named, read access to a certificate's files.
type ACL struct {
	User  string
	Group string
}

// ReloadHook is Keyfleet's addition: a command that is run after a
// certificate's link was switched. There is no shell.
type ReloadHook struct {
	Argv    []string      // Argv[0] is an absolute path
	Timeout time.Duration // default 30 s; then the command's process group is killed
}

// Logging is loggingSettings, which names a fluentd to which logs also go.
// Keyfleet's handler reads and checks it, and logs to its folder only.
type Logging struct {
	Logger, Endpoint, Format, ServiceName string
}

var (
	guidForm    = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
	nameForm    = regexp.MustCompile(`^[0-9a-zA-Z-]{1,127}$`)
	versionForm = regexp.MustCompile(`^[0-9a-fA-F]{32}$`)
	accountForm = regexp.MustCompile(`^[^\s:/,]{1,256}$`)
)

// ParseKeyVaultSettings reads the value of an extension's "settings" member.
// The error is a [SettingsErrors] with every problem found, in document order.
func ParseKeyVaultSettings(raw json.RawMessage) (KeyVaultSettings, error) {
	p := &settingsParser{out: KeyVaultSettings{
		PollingInterval: DefaultPollingInterval,
		KeepVersions:    DefaultKeepVersions,
		MSIEndpoint:     DefaultMSIEndpoint,
	}}
	if len(strings.TrimSpace(string(raw))) == 0 || strings.TrimSpace(string(raw)) == "null" {
		p.problem("settings", "the Key Vault extension has no settings", `add "settings" with "secretsManagementSettings" and "authenticationSettings"`)
		return KeyVaultSettings{}, p.problems
	}
	p.document(value{path: "settings", raw: raw})
	p.duplicates()
	if len(p.problems) > 0 {
		return KeyVaultSettings{}, p.problems
	}
	return p.out, nil
}

type settingsParser struct {
	out      KeyVaultSettings
	problems SettingsErrors
	location string // top-level certificateStoreLocation
	store    string // top-level certificateStoreName
}

func (p *settingsParser) document(v value) {
	found := p.object(v, fields{
		"secretsManagementSettings": p.management,
		"authenticationSettings":    p.authentication,
		"loggingSettings":           p.logging,
	})
	if found != nil && !found["secretsManagementSettings"] {
		p.problem(v.path+".secretsManagementSettings", "it is missing, so there is nothing to observe", `add "secretsManagementSettings" with "observedCertificates"`)
	}
}

func (p *settingsParser) management(v value) {
	var observed *value
	found := p.object(v, fields{
		"pollingIntervalInS":       p.polling,
		"certificateStoreName":     func(v value) { p.store = p.text(v) },
		"certificateStoreLocation": func(v value) { p.location = p.storeLocation(v) },
		"linkOnRenewal":            func(v value) { p.out.LinkOnRenewal = p.boolean(v) },
		"requireInitialSync":       func(v value) { p.out.RequireInitialSync = p.boolean(v) },
		"aclEnabled":               func(v value) { p.out.ACLEnabled = p.boolean(v) },
		"keepVersions": func(v value) {
			p.out.KeepVersions = int(p.whole(v, minKeepVersions, maxKeepVersions, "files kept per certificate"))
		},
		"observedCertificates": func(v value) { observed = &v }, // after the rest: its elements take defaults from it
	})
	if found == nil {
		return
	}
	if observed == nil {
		p.problem(v.path+".observedCertificates", "it is missing, so there is nothing to observe", "list the secret identifiers of the certificates, https://VAULT/secrets/NAME")
		return
	}
	elements := p.array(*observed)
	if elements != nil && len(elements) == 0 {
		p.problem(observed.path, "the list is empty, so there is nothing to observe", "list the secret identifiers of the certificates, https://VAULT/secrets/NAME")
	}
	if len(elements) > maxObserved {
		p.problem(observed.path, "more than 1000 certificates are listed", "observe them with several pools or extensions")
		return
	}
	for _, e := range elements {
		p.certificate(e)
	}
}

func (p *settingsParser) polling(v value) {
	p.out.PollingInterval = time.Duration(p.whole(v, 1, maxPollingSeconds, "seconds")) * time.Second
}

func (p *settingsParser) certificate(v value) {
	c := ObservedCertificate{Path: v.path, StoreLocation: p.location, StoreName: p.store}
	if v.kind() == '"' {
		p.secretURL(v, &c)
		p.out.Certificates = append(p.out.Certificates, c)
		return
	}
	found := p.object(v, fields{
		"url":                      func(v value) { p.secretURL(v, &c) },
		"certificateStoreLocation": func(v value) { c.StoreLocation = p.storeLocation(v) },
		"certificateStoreName":     func(v value) { c.StoreName = p.text(v) },
		"customSymbolicLinkName":   func(v value) { c.CustomSymbolicLinkName = p.linkName(v) },
		"acls":                     func(v value) { c.ACLs = p.acls(v) },
		"accounts":                 func(v value) { c.Accounts = p.texts(v) },
		"keyExportable":            func(v value) { c.KeyExportable = p.boolean(v) },
		"reloadHook":               func(v value) { c.ReloadHook = p.reloadHook(v) },
	})
	if found != nil && !found["url"] {
		p.problem(v.path+".url", "it is missing", `add "url": "https://VAULT/secrets/NAME"`)
	}
	p.out.Certificates = append(p.out.Certificates, c)
}

// secretURL checks that v is https://VAULT/secrets/NAME[/VERSION] and fills in its parts.
func (p *settingsParser) secretURL(v value, c *ObservedCertificate) {
	c.URL = p.text(v)
	if c.URL == "" {
		if v.kind() == '"' {
			p.problem(v.path, "the URL is empty", "write the secret identifier, https://VAULT/secrets/NAME")
		}
		return
	}
	u, err := url.Parse(c.URL)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.ForceQuery {
		p.problem(v.path, "it is not a secret identifier", "write https://VAULT/secrets/NAME without query and user")
		return
	}
	if u.Scheme != "https" {
		p.problem(v.path, "the URL does not begin with https://, and secrets are fetched over TLS only", "write https://"+u.Host+u.Path)
		return
	}
	parts := strings.Split(strings.TrimSuffix(strings.TrimPrefix(u.Path, "/"), "/"), "/")
	collection := strings.ToLower(parts[0])
	if collection == "certificates" || collection == "keys" {
		fixed := *u
		fixed.Path = "/secrets/" + strings.Join(parts[1:], "/")
		p.problem(v.path, "the URL names /"+collection+"/, and only /secrets/ returns the certificate with its private key", "write "+fixed.String())
		return
	}
	if collection != "secrets" || len(parts) < 2 || len(parts) > 3 {
		p.problem(v.path, "the path is not /secrets/NAME or /secrets/NAME/VERSION", "copy the certificate's secret identifier")
		return
	}
	c.Host, c.Secret = u.Host, parts[1]
	c.Vault, _, _ = strings.Cut(u.Hostname(), ".")
	if !nameForm.MatchString(c.Secret) || !nameForm.MatchString(c.Vault) {
		p.problem(v.path, "vault and secret names consist of 1 to 127 letters, digits and hyphens", "copy the certificate's secret identifier")
		return
	}
	if len(parts) == 3 {
		if !versionForm.MatchString(parts[2]) {
			p.problem(v.path, "the version is not 32 hexadecimal digits", "write https://"+u.Host+"/secrets/"+c.Secret+" to follow the newest version")
			return
		}
		c.Version = strings.ToLower(parts[2])
	}
}

func (p *settingsParser) storeLocation(v value) string {
	s := p.text(v)
	switch {
	case s == "" || s == "LocalMachine" || s == "CurrentUser":
	case strings.EqualFold(s, "LocalMachine"), strings.EqualFold(s, "CurrentUser"):
		p.problem(v.path, "store locations are case-sensitive", "write LocalMachine or CurrentUser")
	case !strings.HasPrefix(s, "/"):
		p.problem(v.path, "it is neither an absolute path (Linux) nor LocalMachine or CurrentUser (Windows)", "write an absolute path, for instance "+DefaultStoreDirectory)
	case path.Clean(s) == "/" || strings.Contains("/"+s+"/", "/../") || strings.ContainsRune(s, 0):
		p.problem(v.path, "it is not a directory of its own", "write an absolute path without .., for instance "+DefaultStoreDirectory)
	}
	return s
}

func (p *settingsParser) linkName(v value) string {
	s := p.text(v)
	if s != "" && (strings.ContainsAny(s, "/\x00") || strings.HasPrefix(s, ".") || len(s) > 200) {
		p.problem(v.path, "it is not a file name (no /, no leading dot, at most 200 bytes)", "write a plain name, for instance web.pem")
	}
	return s
}

func (p *settingsParser) acls(v value) []ACL {
	var out []ACL
	for _, e := range p.array(v) {
		var a ACL
		found := p.object(e, fields{
			"user":  func(v value) { a.User = p.account(v) },
			"group": func(v value) { a.Group = p.account(v) },
		})
		if found != nil && !found["user"] {
			p.problem(e.path+".user", "it is missing", "name the user who may read the files")
		}
		out = append(out, a)
	}
	return out
}

func (p *settingsParser) account(v value) string {
	s := p.text(v)
	if v.kind() == '"' && !accountForm.MatchString(s) {
		p.problem(v.path, "it is not the name of a user or group", "write a name such as www-data")
	}
	return s
}

func (p *settingsParser) reloadHook(v value) *ReloadHook {
	h := &ReloadHook{Timeout: DefaultHookTimeout}
	found := p.object(v, fields{
		"argv":       func(v value) { h.Argv = p.texts(v) },
		"timeoutInS": func(v value) { h.Timeout = time.Duration(p.whole(v, 1, maxHookSeconds, "seconds")) * time.Second },
	})
	if found == nil {
		return nil
	}
	if len(h.Argv) == 0 || !strings.HasPrefix(h.Argv[0], "/") {
		p.problem(v.path+".argv", "the first element is not the absolute path of a program; there is no shell and no search path", `write for instance ["/usr/bin/systemctl", "reload", "nginx"]`)
	}
	for _, a := range h.Argv {
		if strings.ContainsRune(a, 0) {
			p.problem(v.path+".argv", "an element holds a NUL byte", "remove it")
		}
	}
	return h
}

func (p *settingsParser) authentication(v value) {
	p.object(v, fields{
		"msiEndpoint": p.msiEndpoint,
		"msiClientId": p.msiClientID,
	})
}

func (p *settingsParser) msiEndpoint(v value) {
	s := p.text(v)
	if s == "" {
		return
	}
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		p.problem(v.path, "it is not the URL of a managed identity endpoint", "write http://169.254.169.254/metadata/identity")
		return
	}
	switch strings.TrimSuffix(u.Path, "/") {
	case "/metadata/identity", "", "/metadata":
		u.Path = "/metadata/identity/oauth2/token"
	case "/metadata/identity/oauth2/token":
		u.Path = "/metadata/identity/oauth2/token"
	default:
		p.problem(v.path, "the path is neither /metadata/identity nor /metadata/identity/oauth2/token", "write http://169.254.169.254/metadata/identity")
		return
	}
	p.out.MSIEndpoint = u.String()
}

func (p *settingsParser) msiClientID(v value) {
	const fix = "write the identity's client id (a GUID): az identity show --query clientId"
	if v.kind() == '{' || v.kind() == '[' {
		p.problem(v.path, v.kindName()+" was found where the client id of a managed identity was expected", fix)
		return
	}
	s := p.text(v)
	switch {
	case s == "" || guidForm.MatchString(s):
		p.out.MSIClientID = strings.ToLower(s)
	case strings.HasPrefix(strings.ToLower(s), "/subscriptions/"):
		p.problem(v.path, "it is the identity's resource id, not its client id", fix)
	default:
		p.problem(v.path, "it is not a GUID", fix)
	}
}

func (p *settingsParser) logging(v value) {
	p.object(v, fields{
		"logger":      func(v value) { p.out.Logging.Logger = p.text(v) },
		"endpoint":    func(v value) { p.out.Logging.Endpoint = p.text(v) },
		"format":      func(v value) { p.out.Logging.Format = p.text(v) },
		"servicename": func(v value) { p.out.Logging.ServiceName = p.text(v) },
	})
}

// duplicates reports certificates that would share a link.
func (p *settingsParser) duplicates() {
	type place struct{ directory, store, link string }
	first := map[place]string{}
	for _, c := range p.out.Certificates {
		if c.Secret == "" {
			continue // its URL is a problem already
		}
		at := place{c.StoreLocation, c.StoreName, c.LinkName()}
		if strings.HasPrefix(c.StoreLocation, "/") {
			at.directory = path.Clean(c.StoreLocation)
		}
		if other, ok := first[at]; ok {
			p.problem(c.Path, "it would have the same link, "+c.LinkName()+", as "+other, "remove one, or give it its own certificateStoreLocation or customSymbolicLinkName")
			continue
		}
		first[at] = c.Path
	}
}
