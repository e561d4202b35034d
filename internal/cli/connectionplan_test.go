package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/api/servicelinker"
)

// TestPlanForPeople shows the server's own golden answer, with nothing missing and
// with all that can be; the conversation with a server is tested with a real one.
func TestPlanForPeople(t *testing.T) {
	text, err := os.ReadFile("../azureapi/servicelinker/testdata/dryrun.json")
	if err != nil {
		t.Fatal(err)
	}
	var d servicelinker.Dryrun
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	show := func() string {
		var out bytes.Buffer
		if err := newTool(Streams{In: strings.NewReader(""), Out: &out, Err: &out}).showPlan("shop-db", d.Properties); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	want := `Connection shop-db: it would be made. Nothing was changed.

WHAT HAPPENS  KIND          NAME                                   ABOUT
create        extension     sc-extension                           installed by the cluster's first connection
create        vault         sc-prod                                for the credentials of the cluster's connections
create        vault secret  sc-prod/sc-shopdb-0cb5d942aa425b3d
create        login         kf_shopdb_0cb5d942aa_a                 role kf_shopdb_0cb5d942aa on main: it connects to the database shop, makes what it likes in the schema public, and reads and writes the tables there that the administrator may hand on; it makes no databases and no roles
create        Secret        shop/sc-shopdb-secret
create        Secret        sc-system/connection-0cb5d942aa425b3d

VARIABLE                   VALUE
AZURE_POSTGRESQL_HOST      db.example.org
AZURE_POSTGRESQL_NAME      shop
AZURE_POSTGRESQL_PASSWORD  (a credential)
AZURE_POSTGRESQL_PORT      5432
AZURE_POSTGRESQL_USER      kf_shopdb_0cb5d942aa_a
`
	if d := cmp.Diff(want, show()); d != "" {
		t.Errorf("nothing is missing (-want +got):\n%s", d)
	}
	d.Properties.PrerequisiteResults = []servicelinker.PrerequisiteResult{
		{Type: "basicError", Code: "SecretNameCollision", Message: "It would write another one's Secret.", Target: "name", Fix: "choose another name"},
		{Type: "permissionsMissing", Scope: "/s", Permissions: []string{"A/read"}, RecommendedRole: "Reader"}, // as Azure says it
	}
	d.Properties.Plan = &servicelinker.Plan{
		Change: servicelinker.Modify, Cluster: servicelinker.PlannedCluster{Busy: "a rotation of its certificates"},
		Grants:  []servicelinker.PlannedGrant{{Kind: "access policy", On: "/v/certs", To: "o", Change: servicelinker.Unchanged, Shared: true}},
		Restart: servicelinker.Restart{Needed: true, Consumers: []kubernetes.Consumer{{Pod: "shop/web-1", Since: time.Unix(0, 0)}}},
	}
	want = `Connection shop-db: it cannot be made so, for 2 reasons. Nothing was changed.
The cluster is being changed, and would be waited for: a rotation of its certificates.

  SecretNameCollision: It would write another one's Secret.
    Where  name
    Fix    choose another name

  permissionsMissing: A/read over /s; the role Reader has it

WHAT HAPPENS  KIND           NAME   ABOUT
unchanged     access policy  certs  shared with other connections

To be started anew, for they have older values: shop/web-1.
`
	if d := cmp.Diff(want, show()); d != "" {
		t.Errorf("things are missing (-want +got):\n%s", d)
	}
}
