package resources

import (
	"encoding/base64"
	"net/http"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/azureapi"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/subscription"
)

func (s surface) groupRoutes() []azureapi.Route {
	const (
		all       = "/subscriptions/{subscription}/resourcegroups"
		one       = all + "/{group}"
		groupRead = "Microsoft.Resources/subscriptions/resourceGroups/read"
		write     = "Microsoft.Resources/subscriptions/resourceGroups/write"
	)
	return []azureapi.Route{
		row(http.MethodGet, all, resourceVersions, groupRead, s.listGroups),
		row(http.MethodGet, one, resourceVersions, groupRead, s.getGroup),
		row(http.MethodHead, one, resourceVersions, groupRead, s.headGroup),
		row(http.MethodPut, one, resourceVersions, write, s.putGroup),
		row(http.MethodPatch, one, resourceVersions, write, s.patchGroup),
		row(http.MethodDelete, one, resourceVersions, "Microsoft.Resources/subscriptions/resourceGroups/delete", s.deleteGroup),
		row(http.MethodGet, one+"/resources", resourceVersions, "Microsoft.Resources/subscriptions/resources/read", s.listResources),
		row(http.MethodGet, "/subscriptions/{subscription}/operationresults/{operation}", resourceVersions, "Microsoft.Resources/subscriptions/read", s.operationResult),
	}
}

func toGroup(o *subscription.GroupObject) arm.ResourceGroup {
	g := arm.ResourceGroup{
		ID: subscription.GroupScope(o.Spec.Subscription, o.Spec.Name), Name: o.Spec.Name, Type: "Microsoft.Resources/resourceGroups",
		Location: o.Spec.Location, ManagedBy: o.Spec.ManagedBy, Tags: o.Spec.Tags,
		Properties: arm.ResourceGroupProperties{ProvisioningState: "Succeeded"},
	}
	if !o.Deleting.IsZero() {
		g.Properties.ProvisioningState = "Deleting"
	}
	return g
}

func (s surface) listGroups(r *azureapi.Request) (*azureapi.Reply, error) {
	f, err := subscription.ParseFilter(r.Query("$filter"))
	if err != nil {
		return nil, err
	}
	all, err := s.Subscriptions.ListGroups(r.Context(), r.Param("subscription"))
	if err != nil {
		return nil, err
	}
	fit := make([]*subscription.GroupObject, 0, len(all))
	for _, o := range all {
		if f.Fits(subscription.Resource{Name: o.Spec.Name, Type: "Microsoft.Resources/resourceGroups", Group: o.Spec.Name, Location: o.Spec.Location, Tags: o.Spec.Tags}) {
			fit = append(fit, o)
		}
	}
	return list(fit, toGroup), nil
}

func (s surface) getGroup(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Subscriptions.Group(r.Context(), r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toGroup(o)), nil
}

// headGroup answers 204 where the group exists; the error path answers 404.
func (s surface) headGroup(r *azureapi.Request) (*azureapi.Reply, error) {
	if _, err := s.Subscriptions.Group(r.Context(), r.Param("subscription"), r.Param("group")); err != nil {
		return nil, err
	}
	return azureapi.Status(http.StatusNoContent), nil
}

func (s surface) putGroup(r *azureapi.Request) (*azureapi.Reply, error) {
	var body arm.ResourceGroup
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	o, isNew, err := s.Subscriptions.PutGroup(r.Context(), subscription.Group{
		Subscription: r.Param("subscription"), Name: r.Param("group"), Location: body.Location, Tags: body.Tags, ManagedBy: body.ManagedBy,
	})
	if err != nil {
		return nil, err
	}
	return created(isNew, toGroup(o)), nil
}

func (s surface) patchGroup(r *azureapi.Request) (*azureapi.Reply, error) {
	var body arm.TagsUpdate
	if err := r.DecodeLoose(&body); err != nil {
		return nil, err
	}
	o, err := s.Subscriptions.TagGroup(r.Context(), r.Param("subscription"), r.Param("group"), body.Tags)
	if err != nil {
		return nil, err
	}
	return azureapi.OK(toGroup(o)), nil
}

// deleteGroup answers 202 with a Location to poll. The location names the very
// group (its UID), so the answer to a poll is found by looking whether that
// group is still there: nothing has to be kept, and a restart changes nothing.
func (s surface) deleteGroup(r *azureapi.Request) (*azureapi.Reply, error) {
	o, err := s.Subscriptions.DeleteGroup(r.Context(), r.Param("subscription"), r.Param("group"))
	if err != nil {
		return nil, err
	}
	if o == nil {
		return nil, fault.New(fault.NotFound, "ResourceGroupNotFound", "Resource group '%s' could not be found.", r.Param("group"))
	}
	return azureapi.Accepted(location(r, deletion{group: o.Spec.Name, uid: o.UID}), "1"), nil
}

// deletion is what the id of an operation says.
type deletion struct{ group, uid string }

func location(r *azureapi.Request, d deletion) string {
	id := base64.RawURLEncoding.EncodeToString([]byte(d.uid + "/" + d.group))
	return r.BaseURL() + "/subscriptions/" + r.Param("subscription") + "/operationresults/" + id + "?api-version=" + r.Version
}

func parseDeletion(id string) (deletion, bool) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(id)
	if err != nil {
		return deletion{}, false
	}
	uid, group, ok := strings.Cut(string(b), "/")
	return deletion{group: group, uid: uid}, ok && uid != "" && group != ""
}

func (s surface) operationResult(r *azureapi.Request) (*azureapi.Reply, error) {
	d, ok := parseDeletion(r.Param("operation"))
	if !ok {
		return nil, fault.New(fault.NotFound, "OperationNotFound", "There is no operation '%.64s'.", r.Param("operation"))
	}
	gone, err := s.Subscriptions.GroupGone(r.Context(), r.Param("subscription"), d.group, d.uid)
	if err != nil {
		return nil, err
	}
	if gone {
		return azureapi.Status(http.StatusOK), nil
	}
	return azureapi.Accepted(location(r, d), "1"), nil
}
