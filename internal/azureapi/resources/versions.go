package resources

import (
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/azureapi"
)

// Api-versions, oldest first. Those that known clients send: az 2.45 sends
// 2019-11-01 (subscriptions), 2021-04-01 (groups, providers), 2022-04-01 (role
// assignments) and 2022-01-31-preview (identities); az 2.74 2022-12-01,
// 2024-11-01, 2022-04-01 and 2023-01-31; both 2015-11-01 for /resources.
// armresources 1.2.0 sends 2021-04-01, armsubscriptions 2021-01-01, armmsi
// 1.3.0 2024-11-30, armauthorization 2022-04-01.
var (
	subscriptionVersions = []string{
		"2014-04-01", "2015-01-01", "2016-06-01", "2018-06-01", "2019-06-01", "2019-11-01", "2020-01-01", "2020-05-01",
		"2020-09-01", "2021-01-01", "2021-04-01", "2022-09-01", "2022-12-01", "2024-11-01",
	}
	resourceVersions = []string{
		"2014-04-01", "2015-01-01", "2015-11-01", "2016-02-01", "2016-06-01", "2016-07-01", "2016-09-01", "2017-05-10", "2018-02-01", "2018-05-01",
		"2019-03-01", "2019-05-01", "2019-05-10", "2019-07-01", "2019-08-01", "2019-10-01", "2020-06-01", "2020-08-01", "2020-10-01",
		"2021-01-01", "2021-04-01", "2022-09-01", "2023-07-01", "2024-03-01", "2024-07-01", "2024-11-01", "2025-03-01", "2025-04-01",
	}
	identityVersions = []string{
		"2015-08-31-preview", "2018-11-30", "2021-09-30-preview", "2022-01-31-preview", "2023-01-31", "2023-07-31-preview", "2024-11-30",
		"2025-01-31-preview",
	}
	federatedVersions     = identityVersions[3:] // they came with 2022-01-31-preview
	authorizationVersions = []string{
		"2015-07-01", "2018-01-01-preview", "2018-07-01", "2018-09-01-preview", "2020-03-01-preview", "2020-04-01-preview", "2020-08-01-preview",
		"2020-10-01-preview", "2022-04-01", "2022-05-01-preview",
	}
)

// versionsOf collects the api-versions of a resource type from a route table:
// those of all rows whose path names the type and goes on with a name.
func versionsOf(table []azureapi.Route, namespace, typ string) []string {
	want := strings.ToLower(namespace + "/" + typ)
	var out []string
	for _, rt := range table {
		if rt.Surface == azureapi.ARM && typeOfPath(rt.Path) == want {
			out = append(out, rt.Versions...)
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	slices.Reverse(out) // newest first, as Azure lists them
	return out
}

// typeOfPath returns the resource type that a route's path is about, "" if none. That
// of an extension resource stands last.
func typeOfPath(path string) string {
	i := strings.LastIndex(path, "/providers/")
	if i < 0 {
		return ""
	}
	rest := path[i+len("/providers/"):]
	parts := strings.Split(rest, "/")
	typ := parts[0]
	for i := 1; i < len(parts); i += 2 {
		if strings.HasPrefix(parts[i], "{") {
			return ""
		}
		typ += "/" + parts[i]
		if i+1 < len(parts) && !strings.HasPrefix(parts[i+1], "{") {
			return ""
		}
	}
	return typ
}
