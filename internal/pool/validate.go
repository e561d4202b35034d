package pool

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
)

// Facts is what validation needs to know besides the pool itself.
type Facts struct {
	Identities map[string]IdentityFact // by lower-case resource id
	Types      []ExtensionType         // the types that pools may name
	Settings   SettingsReader          // nil: settings are only looked at for their form
}

// IdentityFact is what is known about an identity of the pool.
type IdentityFact struct {
	Identity Identity
	Err      *fault.Error // why it cannot be used; nil: it can
}

const (
	pathVM         = "properties.deploymentConfiguration.virtualMachineConfiguration"
	pathFixed      = "properties.scaleSettings.fixedScale"
	pathIdentities = "identity.userAssignedIdentities"

	identityType = "Microsoft.ManagedIdentity/userAssignedIdentities"

	maxNodes       = 10_000
	maxTaskSlots   = 256
	poolExtensions = 32
)

var (
	versionForm   = regexp.MustCompile(`^\d{1,9}(\.\d{1,9}){0,3}$`)
	extensionForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$`)
)

// Validate lists everything that is wrong with a pool and stays wrong whatever
// the world around it does. It reads nothing but its arguments.
func Validate(s *Spec, facts Facts) []Problem {
	var ps []Problem
	ps = append(ps, validateMachine(s)...)
	ps = append(ps, validateScale(s.Properties.Scale.Fixed)...)
	ps = append(ps, validateChoices(&s.Properties)...)
	ps = append(ps, validateIdentity(s.Identity, facts)...)
	ps = append(ps, validateExtensions(s, facts)...)
	return ps
}

func validateMachine(s *Spec) []Problem {
	var ps []Problem
	if s.Properties.VMSize == "" {
		ps = append(ps, missing("properties.vmSize", "name a VM size, for instance STANDARD_DS2_V2; providers of Keyfleet keep it as a label"))
	}
	vm := s.Properties.Deployment.VM
	if vm.NodeAgentSKU == "" && vm.Image == (Image{}) && len(vm.Extensions) == 0 {
		return append(ps, missing(pathVM, "describe the nodes with imageReference and nodeAgentSkuId"))
	}
	if vm.Image.ID == "" && (vm.Image.Publisher == "" || vm.Image.Offer == "" || vm.Image.SKU == "") {
		ps = append(ps, missing(pathVM+".imageReference", "give publisher, offer and sku, or the id of an image"))
	}
	if vm.NodeAgentSKU == "" {
		ps = append(ps, missing(pathVM+".nodeAgentSkuId", `name the node agent of the image, for instance "batch.node.ubuntu 20.04"`))
	}
	return ps
}

func validateScale(x Fixed) []Problem {
	var ps []Problem
	if x.Dedicated < 0 || x.Dedicated > maxNodes {
		ps = append(ps, value(pathFixed+".targetDedicatedNodes", fmt.Sprintf("choose a number from 0 to %d", maxNodes),
			"%d is not a number of nodes that a pool can have.", x.Dedicated))
	}
	if x.LowPriority != 0 {
		ps = append(ps, value(pathFixed+".targetLowPriorityNodes", "write 0, or leave it out, and use targetDedicatedNodes",
			"There are no spot nodes here: no provider takes nodes back."))
	}
	if p := checkResizeTimeout(pathFixed+".resizeTimeout", x.ResizeTimeout); p != nil {
		ps = append(ps, *p)
	}
	return append(ps, oneOf(pathFixed+".nodeDeallocationOption", x.Deallocation, "Requeue", "Terminate", "TaskCompletion", "RetainedData")...)
}

func validateChoices(p *Properties) []Problem {
	ps := oneOf("properties.interNodeCommunication", p.InterNode, "Enabled", "Disabled")
	ps = append(ps, oneOf("properties.taskSchedulingPolicy.nodeFillType", p.Scheduling.NodeFillType, "Pack", "Spread")...)
	ps = append(ps, oneOf("properties.targetNodeCommunicationMode", p.TargetCommunication, "Default", "Classic", "Simplified")...)
	if p.TaskSlots < 0 || p.TaskSlots > maxTaskSlots {
		ps = append(ps, value("properties.taskSlotsPerNode", fmt.Sprintf("choose a number from 1 to %d", maxTaskSlots), "%d is not a number of task slots.", p.TaskSlots))
	}
	if len(p.DisplayName) > 1024 {
		ps = append(ps, value("properties.displayName", "shorten it", "It is longer than 1024 characters."))
	}
	for i, m := range p.Metadata {
		if m.Name == "" {
			ps = append(ps, missing(fmt.Sprintf("properties.metadata[%d].name", i), "name the item, or remove it"))
		}
	}
	return ps
}

// oneOf checks an enumeration; casing does not matter, absence is allowed.
func oneOf(path, got string, allowed ...string) []Problem {
	if got == "" || slices.ContainsFunc(allowed, func(a string) bool { return strings.EqualFold(a, got) }) {
		return nil
	}
	return []Problem{value(path, "write one of "+strings.Join(allowed, ", "), "%q is not a value of this property.", got)}
}

func validateIdentity(id Identified, facts Facts) []Problem {
	ps := oneOf("identity.type", id.Type, "UserAssigned", "None")
	assigned := strings.EqualFold(id.Type, "UserAssigned")
	switch {
	case assigned && len(id.IDs) == 0:
		ps = append(ps, missing(pathIdentities, "name at least one user-assigned identity, or write type None"))
	case !assigned && len(id.IDs) > 0 && len(ps) == 0:
		ps = append(ps, value("identity.type", `write "type": "UserAssigned"`, "Identities are named, but the type is %q.", id.Type))
	}
	for _, key := range sortedKeys(id.IDs) {
		path := pathIdentities + "['" + key + "']"
		parsed, err := arm.ParseID(key)
		if err != nil || !parsed.Is(identityType) || parsed.ResourceGroup == "" {
			ps = append(ps, value(path, "write /subscriptions/S/resourceGroups/G/providers/"+identityType+"/NAME", "It is not the resource id of a user-assigned identity."))
			continue
		}
		fact, ok := facts.Identities[strings.ToLower(key)]
		if !ok || fact.Err == nil {
			continue
		}
		ps = append(ps, identityProblem(path, parsed, fact.Err))
	}
	return ps
}

func identityProblem(path string, id arm.ID, e *fault.Error) Problem {
	p := Problem{Code: "InvalidPropertyValue", Path: path, Reason: e.Message, Fix: e.Fix}
	switch e.Kind {
	case fault.NotFound:
		p.Reason = fmt.Sprintf("The identity %q does not exist.", id.Name())
		p.Fix = fmt.Sprintf("create it: keyfleet identity create -g %s %s", id.ResourceGroup, id.Name())
	case fault.Denied:
		if p.Fix == "" {
			p.Fix = "use an identity of the pool's own tenant that you may assign"
		}
	}
	return p
}

func sortedKeys(m map[string]Identity) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func extensionPath(i int) string { return pathVM + ".extensions[" + strconv.Itoa(i) + "]" }

func validateExtensions(s *Spec, facts Facts) []Problem {
	var ps []Problem
	all := s.Properties.Deployment.VM.Extensions
	if len(all) > poolExtensions {
		return []Problem{value(pathVM+".extensions", fmt.Sprintf("keep at most %d", poolExtensions), "A pool can have at most %d extensions.", poolExtensions)}
	}
	first := map[string]int{}
	for i, e := range all {
		at := extensionPath(i)
		if j, twice := first[strings.ToLower(e.Name)]; twice && e.Name != "" {
			ps = append(ps, value(at+".name", "give it another name", "The name %q is also that of extensions[%d]; names are compared without case.", e.Name, j))
		} else {
			first[strings.ToLower(e.Name)] = i
		}
		ps = append(ps, validateExtension(at, e, s.OS(), facts)...)
		ps = append(ps, validateSettings(at, e, s.Identity, facts)...)
	}
	return append(ps, validateOrder(all)...)
}

func validateExtension(at string, e Extension, os string, facts Facts) []Problem {
	var ps []Problem
	switch {
	case e.Name == "":
		ps = append(ps, missing(at+".name", "name the extension; its instance view is found under this name"))
	case !extensionForm.MatchString(e.Name):
		ps = append(ps, value(at+".name", "use 1 to 80 letters, digits, dots, hyphens and underscores", "%q is not a name of an extension.", e.Name))
	case strings.EqualFold(e.Name, reservedExtension):
		ps = append(ps, value(at+".name", "give it another name", "%q is the name of the Batch service's own extension.", e.Name))
	}
	if e.Publisher == "" {
		ps = append(ps, missing(at+".publisher", "name the publisher of the extension handler"))
	}
	if e.Type == "" {
		ps = append(ps, missing(at+".type", "name the type of the extension"))
	}
	if e.Publisher != "" && e.Type != "" {
		ps = append(ps, validateType(at, e, os, facts.Types)...)
	}
	if e.TypeHandlerVersion != "" && !versionForm.MatchString(e.TypeHandlerVersion) {
		ps = append(ps, value(at+".typeHandlerVersion", `write major and minor version, for instance "3.0"`, "%q is not a version.", e.TypeHandlerVersion))
	}
	return ps
}

func validateType(at string, e Extension, os string, known []ExtensionType) []Problem {
	if reserved(e.Publisher, e.Type) {
		return []Problem{value(at+".type", "use an extension of your own type; what a script should do at the start of a node belongs into such an extension",
			"CustomScript is reserved for the Batch service and cannot be overridden.")}
	}
	i := slices.IndexFunc(known, func(t ExtensionType) bool { return e.Is(t.Publisher, t.Type) })
	if i < 0 {
		return []Problem{unknownType(at+".type", e, known)}
	}
	if known[i].OS != "" && known[i].OS != os {
		return []Problem{value(at+".type", "use the type for "+os+", or another image", "%s is an extension for %s, and the image is one of %s.", e.Type, known[i].OS, os)}
	}
	return nil
}

// validateSettings checks the form of the settings, what the type's reader finds,
// and that the identity that the extension uses is one of the pool's.
func validateSettings(at string, e Extension, id Identified, facts Facts) []Problem {
	var ps []Problem
	if k := jsonKind(json.RawMessage(e.Protected)); k != "" && k != "object" {
		ps = append(ps, value(at+".protectedSettings", "write a JSON object", "%s was found where an object was expected.", article(k)))
	}
	if k := jsonKind(e.Settings); k != "" && k != "object" {
		fix := "write a JSON object"
		if k == "string" {
			fix = "write the object itself, not its text in quotes (no jsonencode, no escaped quotes)"
		}
		return append(ps, value(at+".settings", fix, "%s was found where an object was expected.", article(k)))
	}
	if facts.Settings == nil {
		return ps
	}
	set, found := facts.Settings(e.Publisher, e.Type, e.TypeHandlerVersion, e.Settings)
	for _, p := range found {
		if p.Code == "" {
			p.Code = "InvalidPropertyValue"
		}
		p.Path = at + "." + p.Path
		ps = append(ps, p)
	}
	if set.NeedsIdentity {
		ps = append(ps, validateUse(at, set, id, facts, len(found) > 0)...)
	}
	return ps
}

const clientIDPath = ".settings.authenticationSettings.msiClientId"

// validateUse checks that the identity whose client id the settings name is on
// the pool. unread means that the settings had problems of their own.
func validateUse(at string, set Settings, id Identified, facts Facts, unread bool) []Problem {
	if len(id.IDs) == 0 {
		return []Problem{{
			Code: "InvalidPropertyValue", Path: "identity",
			Reason: fmt.Sprintf("The extension of %s reads secrets as a managed identity, and the pool has none.", at),
			Fix:    `add "identity": {"type": "UserAssigned", "userAssignedIdentities": {"RESOURCE ID": {}}} beside "properties"`,
		}}
	}
	var ids []string
	for _, key := range sortedKeys(id.IDs) {
		fact, ok := facts.Identities[strings.ToLower(key)]
		if !ok || fact.Err != nil {
			return nil // reported there; which client ids there are is not known
		}
		if strings.EqualFold(fact.Identity.ClientID, set.ClientID) {
			return nil
		}
		ids = append(ids, fact.Identity.ClientID+" ("+fact.Identity.Name+")")
	}
	switch {
	case unread:
		return nil
	case set.ClientID == "" && len(ids) == 1:
		return nil
	case set.ClientID == "":
		return []Problem{missing(at+clientIDPath, "the pool has several identities; name one by its client id: "+strings.Join(ids, ", "))}
	}
	return []Problem{value(at+clientIDPath, "write the client id of an identity of the pool: "+strings.Join(ids, ", ")+"; or add the identity that has this client id to the pool",
		"No identity of the pool has the client id %s.", set.ClientID)}
}

// validateOrder checks provisionAfterExtensions: names that are there, no circles.
func validateOrder(all []Extension) []Problem {
	var ps []Problem
	index := map[string]int{}
	for i, e := range all {
		index[strings.ToLower(e.Name)] = i
	}
	for i, e := range all {
		for j, name := range e.After {
			if _, ok := index[strings.ToLower(name)]; !ok {
				ps = append(ps, value(fmt.Sprintf("%s.provisionAfterExtensions[%d]", extensionPath(i), j), "name an extension of this pool, or remove it",
					"The pool has no extension %q.", name))
			}
		}
	}
	if circle := findCircle(all, index); circle != nil {
		ps = append(ps, value(extensionPath(index[strings.ToLower(circle[0])])+".provisionAfterExtensions", "remove one of these dependencies",
			"The extensions wait for each other: %s.", strings.Join(circle, " after ")))
	}
	return ps
}

// findCircle returns the names along a circle of dependencies, first and last
// the same, or nil.
func findCircle(all []Extension, index map[string]int) []string {
	const walking, done = 1, 2
	state := make([]int, len(all))
	var path []string
	var visit func(i int) []string
	visit = func(i int) []string {
		state[i] = walking
		path = append(path, all[i].Name)
		for _, name := range all[i].After {
			j, ok := index[strings.ToLower(name)]
			switch {
			case !ok || state[j] == done:
			case state[j] == walking:
				k := slices.IndexFunc(path, func(n string) bool { return strings.EqualFold(n, all[j].Name) })
				return append(slices.Clone(path[k:]), all[j].Name)
			default:
				if c := visit(j); c != nil {
					return c
				}
			}
		}
		path = path[:len(path)-1]
		state[i] = done
		return nil
	}
	for i := range all {
		if state[i] == 0 {
			if c := visit(i); c != nil {
				return c
			}
		}
	}
	return nil
}

// jsonKind names the kind of a JSON value; empty for absence and null.
func jsonKind(raw json.RawMessage) string {
	s := strings.TrimSpace(string(raw))
	if s == "" || s == "null" {
		return ""
	}
	switch s[0] {
	case '{':
		return "object"
	case '[':
		return "array"
	case '"':
		return "string"
	case 't', 'f':
		return "boolean"
	}
	return "number"
}

func article(kind string) string {
	if strings.HasPrefix(kind, "a") || strings.HasPrefix(kind, "o") {
		return "An " + kind
	}
	return "A " + kind
}
