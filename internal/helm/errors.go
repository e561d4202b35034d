package helm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strings"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"keyfleet.dev/keyfleet/internal/fault"
)

// meaning is what errors of one sort mean. Helm mostly passes on texts, of its own
// and of the API server, so the text decides where no type does.
type meaning struct {
	is   func(error) bool // nil: the text alone decides
	text *regexp.Regexp   // nil: is alone decides
	say  func(o *operation, found []string) *fault.Error
}

// meanings are tried in this order; the first that fits counts.
var meanings = []meaning{
	{text: regexp.MustCompile(`another operation \(install/upgrade/rollback\) is in progress|cannot reuse a name that is still in use|release: already exists`), say: (*operation).sayInProgress},
	{text: regexp.MustCompile(`(\S+) "([^"]+)" in namespace "([^"]*)" exists and cannot be imported into the current release`), say: (*operation).sayExists},
	{text: regexp.MustCompile(`no matches for kind "([^"]+)" in version "([^"]+)"`), say: (*operation).sayUnknownKind},
	{text: regexp.MustCompile(`(?s)user "([^"]*)".*is attempting to grant RBAC permissions not currently held:\s*(.*)`), say: (*operation).sayEscalation},
	{text: regexp.MustCompile(`User "([^"]*)" cannot (\S+) resource "([^"]*)" in API group "([^"]*)"(?: in the namespace "([^"]*)")?`), say: (*operation).sayForbidden},
	{text: regexp.MustCompile(`violates PodSecurity "([^"]*)": ([^\n]*)`), say: (*operation).sayPodSecurity},
	{text: regexp.MustCompile(`exceeded quota: ([^,\n]+)`), say: (*operation).sayQuota},
	{text: regexp.MustCompile(`(admission webhook "[^"]*") denied|(ValidatingAdmissionPolicy '[^']*')|failed calling (webhook "[^"]*")`), say: (*operation).sayAdmission},
	{is: func(err error) bool { return apierrors.HasStatusCause(err, core.NamespaceTerminatingCause) }, say: (*operation).sayTerminating},
	{text: regexp.MustCompile(`because it is being terminated`), say: (*operation).sayTerminating},
	{text: regexp.MustCompile(`(?s)don't meet the specifications of the schema\(s\)(.*)`), say: (*operation).sayValues},
	{
		text: regexp.MustCompile(`execution error at \([^)]*\): ([^\n]*)|(template: [^\n]*)|(parse error at \([^\n]*)|(YAML parse error on [^\n]*)|(error converting YAML to JSON[^\n]*)|` +
			`(error validating [^\n]*)|(chart requires kubeVersion[^\n]*)|(rendering template failed[^\n]*)|(unknown field "[^\n]*)|(\.\S+: field not declared in schema)|((?s)executing ".*)`),
		say: (*operation).sayRendering,
	},
	{
		is:   func(err error) bool { return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) },
		text: regexp.MustCompile(`([^\n]*)`), say: (*operation).sayRendering,
	},
	{is: apierrors.IsUnauthorized, say: (*operation).sayLogin},
	{is: unreachable, say: (*operation).sayUnreachable},
}

// explain turns an error of Helm, or of the API behind it, into what the caller can
// act on. If the caller has ended, that is the error.
func (o *operation) explain(doing string, err error) error {
	var known *fault.Error
	if errors.As(err, &known) {
		return err
	}
	if cause := context.Cause(o.caller); cause != nil {
		return fmt.Errorf("%s (%s): %w", doing, o.target(), cause)
	}
	for _, e := range []error{err, o.witness.seen.last()} {
		if e == nil {
			continue
		}
		if f := o.meaningOf(e); f != nil {
			return f.Because(fmt.Errorf("%s: %w", doing, errors.Join(err, other(e, err))))
		}
	}
	return fault.New(fault.Internal, "HelmFailed", "Helm failed at %s (%s).", doing, o.target()).
		At(o.target()).WithFix("see what it says, and: helm status %s -n %s", o.name, o.namespace).
		Because(fmt.Errorf("%s: %w", doing, errors.Join(err, other(o.witness.seen.last(), err))))
}

// other is an error unless it is, or is part of, another one.
func other(e, than error) error {
	if e == nil || errors.Is(than, e) || strings.Contains(than.Error(), e.Error()) {
		return nil
	}
	return e
}

func (o *operation) meaningOf(err error) *fault.Error {
	for _, m := range meanings {
		if m.is != nil && !m.is(err) {
			continue
		}
		var found []string
		if m.text != nil {
			if found = m.text.FindStringSubmatch(err.Error()); found == nil {
				continue
			}
		}
		f := m.say(o, found)
		if f.Target == "" {
			f = f.At(o.target())
		}
		return f
	}
	return nil
}

func (o *operation) sayInProgress([]string) *fault.Error {
	return fault.New(fault.Conflict, "HelmOperationInProgress", "Operation is already in progress for Helm: somebody else works on the release %s.", o.name).
		WithFix("wait and try again; see: helm history %s -n %s", o.name, o.namespace)
}

func (o *operation) sayExists(found []string) *fault.Error {
	kind, name, in := found[1], found[2], ""
	what := kind + " " + name
	if found[3] != "" {
		in, what = " -n "+found[3], kind+" "+found[3]+"/"+name
	}
	return fault.New(fault.Conflict, "ResourceExists", "Resource already exists in your cluster: the %s is not part of the release %s.", what, o.name).At(what).WithFix(
		"if it may go: kubectl delete %[1]s %[2]s%[3]s; to adopt it: kubectl label --overwrite %[1]s %[2]s%[3]s app.kubernetes.io/managed-by=Helm && "+
			"kubectl annotate --overwrite %[1]s %[2]s%[3]s meta.helm.sh/release-name=%[4]s meta.helm.sh/release-namespace=%[5]s", kind, name, in, o.name, o.namespace)
}

func (o *operation) sayUnknownKind(found []string) *fault.Error {
	group, _, grouped := strings.Cut(found[2], "/")
	if !grouped {
		group = ""
	}
	return fault.New(fault.Precondition, "KindNotInstalled", "The cluster does not know the kind %s (%s), which the chart needs.", found[1], found[2]).
		At(found[1]).WithFix("install the CustomResourceDefinition of %s, and see: kubectl api-resources --api-group=%s", found[1], group)
}

const (
	noPermission = "You do not have permission to perform "
	refresh      = " If access was recently granted, please refresh your credentials."
	grant        = "kubectl apply -f deploy/manager-role.yaml"
)

func (o *operation) sayForbidden(found []string) *fault.Error {
	user, verb, resource, namespace := found[1], found[2], found[3], found[5]
	if name, sub, ok := strings.Cut(resource, "/"); ok && found[4] != "" {
		resource = name + "." + found[4] + "/" + sub
	} else if found[4] != "" {
		resource += "." + found[4]
	}
	where, in := "in the whole cluster", ""
	if namespace != "" {
		where, in = "in the namespace "+namespace, " -n "+namespace
	}
	return fault.New(fault.Denied, "PermissionMissing", noPermission+"%s on %s %s as %s."+refresh, verb, resource, where, user).
		At(resource).WithFix("%s; check with: kubectl auth can-i %s %s%s --as=%s", grant, verb, resource, in, user)
}

func (o *operation) sayEscalation(found []string) *fault.Error {
	return fault.New(fault.Denied, "PermissionMissing", noPermission+"a grant of rights that %s does not have itself: %s."+refresh, found[1], short(found[2])).
		WithFix("%s; it has the rights of the operator for this reason", grant)
}

func (o *operation) sayPodSecurity(found []string) *fault.Error {
	return fault.New(fault.Denied, "PodSecurityRefused", "The namespace %s does not allow these pods: they violate the Pod Security Standard %s: %s.", o.namespace, found[1], short(found[2])).
		WithFix("correct the chart or its values, or: kubectl label --overwrite namespace %s pod-security.kubernetes.io/enforce=LEVEL", o.namespace)
}

func (o *operation) sayQuota(found []string) *fault.Error {
	return fault.New(fault.Denied, "QuotaExceeded", "The quota %s of the namespace %s does not allow it.", found[1], o.namespace).
		At("ResourceQuota "+o.namespace+"/"+found[1]).WithFix("raise it, or remove what is not needed: kubectl -n %s describe resourcequota %s", o.namespace, found[1])
}

func (o *operation) sayAdmission(found []string) *fault.Error {
	if found[3] != "" {
		return fault.New(fault.Unavailable, "AdmissionUnavailable", "The admission %s, which has to allow what the chart makes, does not answer.", found[3]).
			WithFix("see that it runs: kubectl get mutatingwebhookconfigurations,validatingwebhookconfigurations")
	}
	return fault.New(fault.Denied, "AdmissionRefused", "The %s does not allow what the chart makes.", found[1]+found[2]).
		WithFix("change the policy, or the values of the chart; see: kubectl get validatingadmissionpolicies,validatingwebhookconfigurations")
}

func (o *operation) sayTerminating([]string) *fault.Error {
	return fault.New(fault.Conflict, "NamespaceTerminating", "The namespace %s is being deleted; nothing can be made in it.", o.namespace).
		At("namespace "+o.namespace).WithFix("wait until it is gone and try again: kubectl get namespace %s", o.namespace)
}

const renderingFailed = "Helm chart rendering failed with given values: "

// violation is one of a schema: the path of a value, and what is wrong with it.
var violation = regexp.MustCompile(`(?m)^\s*- at '([^']*)': (.*)$`)

func (o *operation) sayValues(found []string) *fault.Error {
	f := fault.New(fault.Invalid, "RenderingFailed", renderingFailed+"they do not fit the chart's schema.").WithFix("correct the values; see: helm show values CHART")
	var all []string
	for _, v := range violation.FindAllStringSubmatch(found[1], 20) {
		path := strings.ReplaceAll(strings.TrimPrefix(v[1], "/"), "/", ".")
		says := path + ": " + short(v[2])
		if path == "" {
			path, says = "values", short(v[2])
		}
		if len(all) == 0 {
			f = f.At(path)
		}
		all = append(all, says)
		f = f.WithDetail("InvalidValue", "%s", short(v[2]))
		f.Details[len(f.Details)-1].Target = path
	}
	if len(all) > 0 {
		f.Message = renderingFailed + strings.Join(all, "; ") + "."
	}
	return f
}

func (o *operation) sayRendering(found []string) *fault.Error {
	return fault.New(fault.Invalid, "RenderingFailed", renderingFailed+"%s.", strings.TrimSuffix(short(strings.Join(found[1:], "")), ".")).
		WithFix("correct the values or the chart; see: helm template CHART --debug --values FILE")
}

func (o *operation) sayLogin([]string) *fault.Error {
	return fault.New(fault.Unauthenticated, "LoginRefused", "The API server does not accept the login of the kubeconfig.").
		WithFix("register the cluster again with a new token: kubectl -n keyfleet create token manager")
}

func (o *operation) sayUnreachable([]string) *fault.Error {
	return fault.New(fault.Unavailable, "APIServerUnreachable", "The API server of the cluster does not answer.").
		WithFix("see that it runs, and that it can be reached from where keyfleet-connector runs: kubectl get --raw /readyz")
}

// unreachable reports whether the API server cannot be reached, or is not the one
// that is trusted.
func unreachable(err error) bool {
	var trip *url.Error
	var way net.Error
	return errors.As(err, &trip) || errors.As(err, &way) && !waited(err) || strings.Contains(err.Error(), "kubernetes cluster unreachable")
}

const shortLimit = 400 // bytes of a text of another layer that a message shows

// short makes a text of another layer fit into a sentence.
func short(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "")), " ")
	if len(text) > shortLimit {
		text = strings.ToValidUTF8(text[:shortLimit], "") + "..."
	}
	return text
}
