package azuresdk

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"keyfleet.dev/keyfleet/client"
)

// decodeClaims reads the claims of a token without checking it.
func decodeClaims(t *testing.T, token string, v any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatal("not a JWT")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// renewRequest asks the server to renew a certificate now.
func renewRequest(a *azure, vault, name string) client.Request {
	return client.Request{Method: http.MethodPost, URL: a.Client.ARM("/keyfleet/v1/vaults/" + vault + "/certificates/" + name + "/renew")}
}
