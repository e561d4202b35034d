// Package keyvault holds the wire types of the Key Vault surface: what clients
// of a vault (https://NAME.vault.DOMAIN) and of Microsoft.KeyVault/vaults send
// and get. It is a leaf: plain structs with Azure's names.
//
//	PUT  /secrets/N               SetSecret          -> Secret
//	GET  /secrets/N[/V]                              -> Secret
//	POST /certificates/N/create   CreateCertificate  -> CertificateOperation (202)
//	GET  /certificates/N/pending                     -> CertificateOperation
//	GET  /certificates/N[/V]                         -> Certificate
//
// Times are seconds since 1970 in the data plane and RFC 3339 in the management
// plane. In requests a nil pointer, map or list was not sent, or sent as null.
// Keyfleet's own additions are in keyfleet.go.
package keyvault

// Attributes are the attributes of a secret or certificate version. Created,
// Updated, RecoveryLevel and RecoverableDays are the server's; in requests they
// are accepted and ignored.
type Attributes struct {
	Enabled         *bool  `json:"enabled,omitempty"`
	NotBefore       *int64 `json:"nbf,omitempty"`
	Expires         *int64 `json:"exp,omitempty"`
	Created         *int64 `json:"created,omitempty"`
	Updated         *int64 `json:"updated,omitempty"`
	RecoveryLevel   string `json:"recoveryLevel,omitempty"`
	RecoverableDays int    `json:"recoverableDays,omitempty"`
}

// SetSecret is the body of PUT /secrets/N.
type SetSecret struct {
	Value       *string           `json:"value"`
	ContentType *string           `json:"contentType,omitempty"`
	Attributes  *Attributes       `json:"attributes,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
}

// UpdateSecret is the body of PATCH /secrets/N/V.
type UpdateSecret struct {
	ContentType *string           `json:"contentType,omitempty"`
	Attributes  *Attributes       `json:"attributes,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
}

// Secret is a secret, in lists without Value and version, and after a deletion
// with the three last members.
type Secret struct {
	Value              *string           `json:"value,omitempty"`
	ID                 string            `json:"id"`
	ContentType        string            `json:"contentType,omitempty"`
	Attributes         Attributes        `json:"attributes"`
	Tags               map[string]string `json:"tags,omitempty"`
	KeyID              string            `json:"kid,omitempty"`     // of a certificate's secret
	Managed            bool              `json:"managed,omitempty"` // belongs to a certificate
	PreviousVersion    string            `json:"previousVersion,omitempty"`
	RecoveryID         string            `json:"recoveryId,omitempty"`
	DeletedDate        *int64            `json:"deletedDate,omitempty"`
	ScheduledPurgeDate *int64            `json:"scheduledPurgeDate,omitempty"`
}

// CreateCertificate is the body of POST /certificates/N/create.
type CreateCertificate struct {
	Policy            *CertificatePolicy `json:"policy,omitempty"`
	Attributes        *Attributes        `json:"attributes,omitempty"`
	Tags              map[string]string  `json:"tags,omitempty"`
	PreserveCertOrder *bool              `json:"preserveCertOrder,omitempty"` // chains are always leaf first
}

// UpdateCertificate is the body of PATCH /certificates/N/V.
type UpdateCertificate struct {
	Policy     *CertificatePolicy `json:"policy,omitempty"`
	Attributes *Attributes        `json:"attributes,omitempty"`
	Tags       map[string]string  `json:"tags,omitempty"`
}

// Certificate is a certificate, in lists without policy and version, and after
// a deletion with the three last members.
type Certificate struct {
	ID                 string             `json:"id"`
	KeyID              string             `json:"kid,omitempty"`
	SecretID           string             `json:"sid,omitempty"`
	Thumbprint         string             `json:"x5t,omitempty"` // base64url of the SHA-1
	CER                []byte             `json:"cer,omitempty"` // DER of the leaf, base64
	ContentType        string             `json:"contentType,omitempty"`
	Attributes         Attributes         `json:"attributes"`
	Policy             *CertificatePolicy `json:"policy,omitempty"`
	Pending            *PendingReference  `json:"pending,omitempty"`
	Tags               map[string]string  `json:"tags,omitempty"`
	RecoveryID         string             `json:"recoveryId,omitempty"`
	DeletedDate        *int64             `json:"deletedDate,omitempty"`
	ScheduledPurgeDate *int64             `json:"scheduledPurgeDate,omitempty"`
}

// PendingReference points at a certificate's operation.
type PendingReference struct {
	ID string `json:"id"`
}

// CertificatePolicy says how a certificate's versions are made.
type CertificatePolicy struct {
	ID              string            `json:"id,omitempty"`
	KeyProps        *KeyProps         `json:"key_props,omitempty"`
	SecretProps     *SecretProps      `json:"secret_props,omitempty"`
	X509Props       *X509Props        `json:"x509_props,omitempty"`
	LifetimeActions []LifetimeAction  `json:"lifetime_actions,omitzero"`
	Issuer          *IssuerParameters `json:"issuer,omitempty"`
	Attributes      *Attributes       `json:"attributes,omitempty"`
}

// KeyProps describes the key pair.
type KeyProps struct {
	Exportable *bool   `json:"exportable,omitempty"`
	KeyType    *string `json:"kty,omitempty"`
	KeySize    *int    `json:"key_size,omitempty"`
	ReuseKey   *bool   `json:"reuse_key,omitempty"`
	Curve      *string `json:"crv,omitempty"`
}

// SecretProps describes the certificate's secret.
type SecretProps struct {
	ContentType *string `json:"contentType,omitempty"`
}

// X509Props describes the certificate.
type X509Props struct {
	Subject        *string           `json:"subject,omitempty"`
	SANs           *AlternativeNames `json:"sans,omitempty"`
	EKUs           []string          `json:"ekus,omitzero"`
	KeyUsage       []string          `json:"key_usage,omitzero"`
	ValidityMonths *int              `json:"validity_months,omitempty"`
}

// AlternativeNames are the subject alternative names.
type AlternativeNames struct {
	DNSNames []string `json:"dns_names,omitempty"`
	Emails   []string `json:"emails,omitempty"`
	UPNs     []string `json:"upns,omitempty"`
}

// LifetimeAction is what to do when its trigger is due.
type LifetimeAction struct {
	Trigger *Trigger `json:"trigger,omitempty"`
	Action  *Action  `json:"action,omitempty"`
}

// Trigger says when, by one of its members.
type Trigger struct {
	LifetimePercentage *int `json:"lifetime_percentage,omitempty"`
	DaysBeforeExpiry   *int `json:"days_before_expiry,omitempty"`
}

// Action is AutoRenew or EmailContacts.
type Action struct {
	Type string `json:"action_type,omitempty"`
}

// IssuerParameters name who signs.
type IssuerParameters struct {
	Name            *string `json:"name,omitempty"`
	CertificateType *string `json:"cty,omitempty"`
	Transparency    *bool   `json:"cert_transparency,omitempty"`
}

// CertificateOperation is the making of a version.
type CertificateOperation struct {
	ID                    string            `json:"id"`
	Issuer                *IssuerParameters `json:"issuer,omitempty"`
	CSR                   []byte            `json:"csr,omitempty"`
	CancellationRequested bool              `json:"cancellation_requested"`
	Status                string            `json:"status"` // inProgress, completed, cancelled, failed
	StatusDetails         string            `json:"status_details,omitempty"`
	Error                 *OperationError   `json:"error,omitempty"`
	Target                string            `json:"target,omitempty"` // the certificate, once it is there
	RequestID             string            `json:"request_id,omitempty"`
}

// OperationError is why an operation failed.
type OperationError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// UpdateOperation is the body of PATCH /certificates/N/pending.
type UpdateOperation struct {
	CancellationRequested *bool `json:"cancellation_requested"`
}

// Contacts are the contacts of a vault.
type Contacts struct {
	ID       string    `json:"id,omitempty"`
	Contacts []Contact `json:"contacts"`
}

// Contact is one contact.
type Contact struct {
	Email string `json:"email"`
	Name  string `json:"name,omitempty"`
	Phone string `json:"phone,omitempty"`
}

// Issuer is an issuer of certificates.
type Issuer struct {
	ID         string      `json:"id"`
	Provider   string      `json:"provider"`
	Attributes *Attributes `json:"attributes,omitempty"`
}

// List is a page of a list.
type List[T any] struct {
	Value    []T    `json:"value"`
	NextLink string `json:"nextLink,omitempty"` // absolute; to be requested as it is
}
