package connector

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// known is a row of the catalogue of errors of Service Connector on AKS.
type known struct {
	number int
	said   string   // how Azure says it
	codes  []string // what it is called here
	tests  []string // that bring it about, "PACKAGE TEST[/SUBTEST]"
	never  string   // why it cannot be as it is there
}

// errorCatalogue has every row. It is also how people find what an error of Azure's
// is called here: docs/service-connector.md has it in prose.
var errorCatalogue = []known{
	{
		1, "Unable to get a response from the agent in time",
		[]string{"NoManager", "ManagerSilent", "ClusterNotReady", "APIServerUnreachable"},
		[]string{
			"internal/connector TestQuestion", "internal/connector TestFindings/silent manager", "internal/cluster TestObservations",
			"internal/scextension TestDiagnose/the API server is away", "internal/helm TestRelease/an API server that does not answer",
		},
		"",
	},
	{
		2, `Extension pods can't be scheduled if all the node pools in the cluster are "CriticalAddonsOnly" tainted`,
		[]string{"OnlyCriticalAddonsNodes", "Unschedulable"},
		[]string{"internal/helm TestRelease/nodes that only take critical add-ons", "internal/helm TestWorkload", "internal/helm TestPods/another taint"},
		"",
	},
	{
		3, "Timed out waiting for resource readiness",
		[]string{"TimedOutWaitingForReadiness", "JobFailed", "QuotaExceeded", "PodSecurityRefused"},
		[]string{
			"internal/helm TestRelease/no scheduler", "internal/helm TestRelease/a job fails, and the next try goes on from there", "internal/helm TestRelease/a quota",
			"internal/helm TestRelease/pods that violate the Pod Security Standard", "internal/helm TestExtension/the job fails", "internal/scextension TestDiagnose/the job fails",
		},
		"",
	},
	{
		4, "Unable to download the Helm chart from the repo URL",
		[]string{"ChartUnavailable"},
		[]string{"internal/helm TestChartsThatCannotBeRead/absent"},
		"the chart of the extension is part of keyfleet-connector; a chart of the add-on is a file, which can be missing",
	},
	{
		5, "Helm chart rendering failed with given values",
		[]string{"RenderingFailed"},
		[]string{"internal/helm TestRelease/values that the schema does not allow", "internal/helm TestRelease/templates that cannot be rendered", "internal/helm TestExtension/the schema refuses wrong values"},
		"",
	},
	{
		6, "Resource already exists in your cluster",
		[]string{"ResourceExists"},
		[]string{"internal/helm TestRelease/an object of others is in the way", "internal/scextension TestApply/an object of others is never taken over", "internal/scextension TestOperator/a foreign Secret goes"},
		"",
	},
	{7, "Operation is already in progress for Helm", []string{"HelmOperationInProgress"}, []string{"internal/helm TestRelease/a release that others work on is left alone", "internal/connector TestFindings/pending"}, ""},
	{
		8, "Operation returned an invalid status code: Conflict",
		[]string{"Conflict", "MissingSubscriptionRegistration"},
		[]string{"internal/connector TestFailIfBusy", "internal/connector TestFindings/busy", "internal/connector TestCallersPermission"},
		"",
	},
	{
		9, "You do not have permission to perform ... If access was recently granted, please refresh your credentials",
		[]string{"AuthorizationFailed", "PermissionMissing"},
		[]string{
			"internal/connector TestPlanOfPermissions", "internal/connector TestCallersPermission", "internal/helm TestRelease/permissions that are missing", "internal/scextension TestProblems/weak",
			"internal/scextension TestDiagnose/a rule of the role is missing",
		},
		"",
	},
	{
		10, "The subscription is not registered to use namespace 'Microsoft.KubernetesConfiguration'",
		[]string{"MissingSubscriptionRegistration"},
		[]string{"internal/subscription TestRequire/a provider that was unregistered", "internal/connector TestCallersPermission"},
		"",
	},
	{
		11, "ExtensionOperationFailed: The extension operation failed with the following error: ...",
		[]string{"JobFailed"},
		[]string{"internal/connector TestExtensionOfFirstConnection"},
		"nothing is wrapped: statuses and errorInfo of the extension have the inner code and message",
	},
	{
		12, "configmaps 'extension-immutable-values' not found",
		[]string{"DesiredStateMissing"},
		[]string{"internal/scextension TestApply/a desired state is deleted by hand", "internal/connector TestFindings/not brought"},
		"the cluster holds no state that is not also the server's: what is deleted there is written again",
	},
	{
		13, "the object has been modified",
		[]string{"ObjectAltered"},
		[]string{"internal/scextension TestOperator/jobs beside the operator", "internal/scextension TestApply/a kind that does not have all the fields"},
		"who finds that an object was changed meanwhile reads it again and goes on; an object that others change each time is said to be altered",
	},
	{14, "Failed to resolve the extension version from the given values.", []string{"ExtensionVersionNotFound"}, []string{"internal/scextension TestPinned"}, ""},
	{15, "ExtensionTypeRegistrationGetFailed: Extension type X is not registered in region Y", []string{"ExtensionTypeRegistrationGetFailed"}, []string{"internal/connector TestExtensionsThatAreRefused"}, ""},
	{16, "ExtensionNotFound: The Resource ... could not be found!", []string{"ExtensionNotFound"}, []string{"internal/connector TestExtensionsThatAreRefused", "internal/connector TestQuestionAboutTheExtension"}, ""},
	{
		17, "When --scope is 'cluster', --target-namespace must not be given. / To pin to specific version, auto-upgrade-minor-version must be set to 'false'.",
		[]string{"InvalidArgument"},
		[]string{"internal/azureapi/servicelinker TestWhatTheSurfaceRefuses/an extension for one namespace", "internal/connector TestExtensionsThatAreRefused"},
		"",
	},
	{
		18, "ImagePull: failed to resolve reference ...: not found / failed to fetch anonymous token ... 401 Unauthorized",
		[]string{"ImagePullFailed"},
		[]string{"internal/helm TestRelease/an image that cannot be pulled", "internal/helm TestPods/registry refuses", "internal/scextension TestDiagnose/the job fails", "internal/connector TestFindings/job's image"},
		"",
	},
	{
		19, "a connection that stays Failed or Accepted with an old sc-extension",
		[]string{"ImageNotConfigured"},
		[]string{"internal/connector TestReportedProblems"},
		"the image is the one that manager or server were started with; a connection says the extension's problem, and goes on when that is mended",
	},
	{
		20, "TargetTypeNotSupported: Target resource type ... is not supported.",
		[]string{"TargetTypeNotSupported"},
		[]string{"internal/azureapi/servicelinker TestWhatTheSurfaceRefuses/a server without a database", "internal/connector TestWhatIsRefused/no target"},
		"",
	},
	{
		21, "dry run: ResourceNotFound, InvalidDbSecret, InvalidArgument, permissionsMissing",
		[]string{"ResourceNotFound", "InvalidDbSecret", "InvalidArgument", "AuthorizationFailed"},
		[]string{"internal/connector TestPlanForesees", "internal/connector TestPlanNamesAll", "internal/connector TestPlanOfPermissions", "internal/target TestConformance"},
		"",
	},
	{
		22, "command line: Only one auth info is needed; Required keys missing for parameter; --vault-id must be provided to use secret-name; ...",
		[]string{"Usage", "InvalidArgument"},
		[]string{"internal/cli TestScripts/connection", "internal/azureapi/servicelinker TestWhatTheSurfaceRefuses/a secret of a vault that is not named"},
		"",
	},
	{23, "portal: Unknown resource type, Unsupported resource", nil, nil, "there is no page on which connections are made"},
}

// TestErrorCatalogue: every row of the catalogue has a code of ours that the program
// can say, and a test that brings it about; or a reason why it cannot be.
func TestErrorCatalogue(t *testing.T) {
	const rows = 23
	said := literalsOf(t, "../../internal", func(name string) bool { return !strings.HasSuffix(name, "_test.go") })
	tests := map[string]map[string]map[string]bool{} // package -> test -> its literals
	for i, row := range errorCatalogue {
		if row.number != i+1 || row.said == "" {
			t.Fatalf("row %d is not there", i+1)
		}
		if (len(row.codes) == 0 || len(row.tests) == 0) && row.never == "" {
			t.Errorf("E%d: it says neither what brings it about nor why nothing does", row.number)
		}
		for _, code := range row.codes {
			if !said[code] {
				t.Errorf("E%d: nothing in the program says %s", row.number, code)
			}
		}
		for _, name := range row.tests {
			folder, test, _ := strings.Cut(name, " ")
			test, sub, nested := strings.Cut(test, "/")
			if tests[folder] == nil {
				tests[folder] = testsOf(t, "../../"+folder)
			}
			literals, ok := tests[folder][test]
			if !ok {
				t.Errorf("E%d: there is no test %s", row.number, name)
				continue
			}
			_, err := os.Stat(fmt.Sprintf("../../%s/testdata/double/%s.txt", folder, sub)) // a script is a subtest
			if nested && !literals[sub] && err != nil {
				t.Errorf("E%d: %s has no case %q", row.number, test, sub)
			}
		}
	}
	if len(errorCatalogue) != rows {
		t.Errorf("there are %d rows, the catalogue has %d", len(errorCatalogue), rows)
	}
}

// literalsOf collects the strings in the Go files of a folder and below that are taken.
func literalsOf(t *testing.T, root string, taken func(name string) bool) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || !taken(path) {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		literals(f, all)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func literals(n ast.Node, into map[string]bool) {
	ast.Inspect(n, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				into[s] = true
			}
		}
		return true
	})
}

// testsOf finds the tests of a package, and the strings in each.
func testsOf(t *testing.T, folder string) map[string]map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]bool{}
	for _, path := range files {
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				out[fn.Name.Name] = map[string]bool{}
				literals(fn, out[fn.Name.Name])
			}
		}
	}
	return out
}
