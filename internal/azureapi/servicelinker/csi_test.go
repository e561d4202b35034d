package servicelinker_test

import (
	"strings"
	"testing"
)

// TestCSIDriver: a connection through the CSI driver needs no authentication, shows
// what was asked for and what a workload names, can be sent back as it is shown, and
// takes no second authentication.
func TestCSIDriver(t *testing.T) {
	p := newPlanned(t)
	url := planCluster + "/providers/Microsoft.ServiceLinker/linkers/certs"
	target := `"targetService":{"type":"AzureResource","id":"` + planVault + `","resourceProperties":{"type":"KeyVault","connectAsKubernetesCsiDriver":true,"objects":{"tls.pem":"web"}}}`
	shown := p.call(201, "PUT", url, `{"properties":{`+target+`}}`).Body.String()
	for _, want := range []string{
		`"resourceProperties":{"type":"KeyVault","connectAsKubernetesCsiDriver":true,"objects":{"tls.pem":"web"}}`,
		`"kubernetesResourceName":{"secret":"sc-certs-secret","secretProviderClass":"sc-certs-secretprovider"}`, `"authType":"userAssignedIdentity"`, `"target":"keyvault"`,
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("it does not show %s:\n%s", want, shown)
		}
	}
	if again := p.call(200, "PUT", url, shown).Body.String(); again != shown {
		t.Errorf("what was shown cannot be sent back:\n%s\n%s", shown, again)
	}
	if listed := p.call(200, "POST", url+"/listConfigurations", "").Body.String(); !strings.Contains(listed, `"name":"tls.pem","value":""`) {
		t.Errorf("the names are %s", listed)
	}
	for _, typ := range []string{"secret", "servicePrincipalSecret"} {
		body := `{"properties":{` + target + `,"authInfo":{"authType":"` + typ + `"}}}`
		if refused := p.call(400, "PUT", url, body).Body.String(); !strings.Contains(refused, "Only one auth info is needed") {
			t.Errorf("%s beside the driver: %s", typ, refused)
		}
	}
	p.call(200, "PUT", url, `{"properties":{`+target+`,"authInfo":{"authType":"userAssignedIdentity"}}}`) // as the command line of Azure sends it
}
