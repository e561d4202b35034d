package arm

import "time"

// These are the types of Keyfleet's own administration API, under
// /keyfleet/v1 on the ARM host. It has no api-version parameter.

// Application is an application: a client that has secrets.
//
//	GET    /keyfleet/v1/applications               -> List[Application]
//	POST   /keyfleet/v1/applications               NewApplication -> CreatedApplication
//	GET    /keyfleet/v1/applications/APPID         -> Application
//	DELETE /keyfleet/v1/applications/APPID
type Application struct {
	AppID       string              `json:"appId"` // client id
	ID          string              `json:"id"`    // object id
	DisplayName string              `json:"displayName"`
	TenantID    string              `json:"tenantId"`
	Secrets     []ApplicationSecret `json:"secrets"`
}

// ApplicationSecret describes a client secret without showing it.
type ApplicationSecret struct {
	KeyID   string    `json:"keyId"`
	Hint    string    `json:"hint"` // its first characters
	Created time.Time `json:"startDateTime"`
	Expires time.Time `json:"endDateTime,omitzero"` // zero: never
}

// NewApplication says what application to make.
type NewApplication struct {
	DisplayName string    `json:"displayName"`
	AppID       string    `json:"appId,omitempty"`      // GUID; empty: a new one
	Expires     time.Time `json:"endDateTime,omitzero"` // of its secret; zero: never
}

// CreatedApplication is an application and its secret, which is shown here only.
type CreatedApplication struct {
	Application
	Secret string `json:"secretText"`
}

// NewSecret asks for a further secret of an application.
//
//	POST   /keyfleet/v1/applications/APPID/secrets          NewSecret -> CreatedSecret
//	DELETE /keyfleet/v1/applications/APPID/secrets/KEYID
type NewSecret struct {
	Expires time.Time `json:"endDateTime,omitzero"` // zero: never
}

// CreatedSecret is a new secret, which is shown here only.
type CreatedSecret struct {
	ApplicationSecret
	Secret string `json:"secretText"`
}

// NewSubscription makes a subscription with a chosen id.
//
//	POST /keyfleet/v1/subscriptions   NewSubscription -> Subscription
type NewSubscription struct {
	SubscriptionID string `json:"subscriptionId"`
	DisplayName    string `json:"displayName,omitempty"`
}

// AuditEntry is one line of the audit file.
//
//	GET /keyfleet/v1/audit?since=&until=&principal=&action=&resource=&outcome=&request=&limit=  -> List[AuditEntry], oldest first
type AuditEntry struct {
	Seq           int64     `json:"seq"`
	Time          time.Time `json:"time"`
	Outcome       string    `json:"outcome"` // "allowed" or "denied"
	Reason        string    `json:"reason,omitempty"`
	PrincipalKind string    `json:"principalKind,omitempty"`
	ObjectID      string    `json:"objectId,omitempty"`
	ClientID      string    `json:"clientId,omitempty"`
	Name          string    `json:"name,omitempty"`
	Action        string    `json:"action"`
	Resource      string    `json:"resource"`
	Detail        string    `json:"detail,omitempty"`
	RequestID     string    `json:"requestId,omitempty"`
	CorrelationID string    `json:"correlationId,omitempty"`
	RemoteAddr    string    `json:"remoteAddr,omitempty"`
	Hash          string    `json:"hash"`
}
