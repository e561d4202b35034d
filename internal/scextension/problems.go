package scextension

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Layers of problems.
const (
	layerCluster    = "cluster"    // something that the cluster has not
	layerKubernetes = "kubernetes" // the API server refuses
	layerOperator   = "operator"   // what operator and job have to work with
	layerHelm       = "helm"       // a release
)

// refusal is what the API server's errors of one sort mean. In message and fix
// OBJECT, RESOURCE, NAMESPACE and NAME stand for those of the object, and $1, $2, $3
// for what text found.
type refusal struct {
	code, layer  string
	is           func(error) bool // nil: text alone decides
	text         *regexp.Regexp   // on what the API server says; nil: is alone decides
	message, fix string
}

// refusals are tried in this order; the first that fits counts.
var refusals = []refusal{
	{
		code: "AddonNotInstalled", layer: layerCluster, is: noSuchKind,
		message: "The cluster does not know RESOURCE: the Secrets Store CSI driver (add-on azureKeyvaultSecretsProvider) is not installed.",
		fix:     addonWay + ". OBJECT is made as soon as it is there",
	},
	{
		code: "NamespaceTerminating", layer: layerCluster, is: func(err error) bool { return apierrors.HasStatusCause(err, core.NamespaceTerminatingCause) },
		message: "The namespace NAMESPACE is being deleted; nothing can be made in it.",
		fix:     "wait until it is gone and make it again (kubectl create namespace NAMESPACE), or update the connection to another namespace",
	},
	{
		code: "NamespaceNotFound", layer: layerCluster, is: apierrors.IsNotFound, text: regexp.MustCompile(`namespaces "[^"]*" not found`),
		message: "The namespace NAMESPACE does not exist.",
		fix:     "kubectl create namespace NAMESPACE",
	},
	{
		code: "QuotaExceeded", layer: layerKubernetes, is: apierrors.IsForbidden, text: regexp.MustCompile(`exceeded quota: ([^,]+)`),
		message: "The quota $1 of the namespace NAMESPACE does not allow another object: OBJECT.",
		fix:     "raise it or remove what is not needed: kubectl -n NAMESPACE describe resourcequota $1",
	},
	{
		code: "PermissionMissing", layer: layerKubernetes, is: apierrors.IsForbidden, text: regexp.MustCompile(`User "([^"]*)" cannot (\S+) resource "([^"]*)"`),
		message: "You do not have permission to perform $2 on $3 in the namespace NAMESPACE as $1: OBJECT.",
		fix:     "give the ClusterRole of sc-extension the verb $2 for $3; check with: kubectl auth can-i $2 $3 -n NAMESPACE --as=$1",
	},
	{
		code: "AdmissionRefused", layer: layerKubernetes, text: regexp.MustCompile(`admission webhook ("[^"]*") denied`),
		message: "The admission webhook $1 does not allow OBJECT.",
		fix:     "change the policy behind the webhook, or the namespace that the connection writes to",
	},
	{
		code: "AdmissionRefused", layer: layerKubernetes, text: regexp.MustCompile(`(ValidatingAdmissionPolicy '[^']*')`),
		message: "The $1 does not allow OBJECT.",
		fix:     "change the policy or its binding, or the namespace that the connection writes to",
	},
	{
		code: "AdmissionUnavailable", layer: layerKubernetes, text: regexp.MustCompile(`failed calling webhook ("[^"]*")`),
		message: "The admission webhook $1, which has to allow OBJECT, does not answer.",
		fix:     "see that the webhook runs: kubectl get mutatingwebhookconfigurations,validatingwebhookconfigurations",
	},
	{
		code: "RequestRefused", layer: layerKubernetes, is: apierrors.IsForbidden,
		message: "The API server does not allow OBJECT.",
		fix:     "see what it says; an admission plugin of the cluster has the reason",
	},
	{
		code: "ObjectTooLarge", layer: layerKubernetes, is: apierrors.IsRequestEntityTooLargeError,
		message: "OBJECT is larger than the API server takes.",
		fix:     "make the values of the connection smaller: a Secret holds at most 1 MiB",
	},
	{
		code: "ObjectTooLarge", layer: layerKubernetes, text: regexp.MustCompile(`Too long: |request is too large`),
		message: "OBJECT is larger than the API server takes.",
		fix:     "make the values of the connection smaller: a Secret holds at most 1 MiB",
	},
	{
		code: "ObjectInvalid", layer: layerKubernetes, is: func(err error) bool { return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) },
		message: "The API server does not take OBJECT as it shall be.",
		fix:     "correct the connection: names are lower-case DNS names, keys of a Secret letters, digits, '-', '_' and '.'",
	},
	{
		code: "LoginRefused", layer: layerKubernetes, is: apierrors.IsUnauthorized,
		message: "The API server does not know who asks; OBJECT was not touched.",
		fix:     "restart the pods of sc-system, so that they get new tokens: kubectl -n sc-system rollout restart deployment sc-operator",
	},
	{
		code: "APIServerBusy", layer: layerKubernetes,
		is: func(err error) bool {
			return apierrors.IsTooManyRequests(err) || apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err)
		},
		message: "The API server cannot do it at the moment: OBJECT.",
		fix:     "nothing, it is tried again; if it lasts, look at the API server and its etcd",
	},
	{
		code: "APIServerUnreachable", layer: layerKubernetes, is: unreachable,
		message: "The API server does not answer; OBJECT was not touched.",
		fix:     "nothing, it is tried again; if it lasts, look at the way from sc-system to the API server",
	},
}

const rawLimit = 1000 // bytes of a text of another layer that are kept

// explain says what an error of the API means for an object.
func explain(err error, o object) *wire.Problem {
	text := err.Error()
	for _, r := range refusals {
		if r.is != nil && !r.is(err) {
			continue
		}
		var found []string
		if r.text != nil {
			if found = r.text.FindStringSubmatch(text); found == nil {
				continue
			}
		}
		return &wire.Problem{Code: r.code, Layer: r.layer, Object: o.String(), Message: fill(r.message, o, found), Raw: text, Fix: fill(r.fix, o, found)}
	}
	return &wire.Problem{
		Code: "KubernetesError", Layer: layerKubernetes, Object: o.String(), Raw: text,
		Message: "The API server does not do what was asked of it: " + o.String() + ".", Fix: "see what it says; it is tried again",
	}
}

func fill(text string, o object, found []string) string {
	pairs := []string{"OBJECT", o.String(), "RESOURCE", o.kind.resource.GroupResource().String(), "NAMESPACE", o.namespace, "NAME", o.name}
	for i := 1; i < len(found); i++ {
		pairs = append(pairs, fmt.Sprintf("$%d", i), found[i])
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// noSuchKind: the API server has no such resource, which it says otherwise than that
// an object is not there.
func noSuchKind(err error) bool {
	var status apierrors.APIStatus
	if errors.As(err, &status) && apierrors.IsNotFound(err) {
		details := status.Status().Details
		return details == nil || details.Name == "" || strings.Contains(err.Error(), "the server could not find the requested resource")
	}
	return meta.IsNoMatchError(err)
}

func unreachable(err error) bool {
	var network net.Error
	return errors.As(err, &network)
}

// inTheWay is a Problem: an object of that name is somebody else's.
func inTheWay(o object) *wire.Problem {
	resource := o.kind.resource.Resource
	return &wire.Problem{
		Code: "ResourceExists", Layer: layerKubernetes, Object: o.String(),
		Message: fmt.Sprintf("Resource already exists in your cluster: %s was not made by a connection, and stays as it is.", o),
		Fix: fmt.Sprintf("remove it: kubectl -n %s delete %s %s; or let the connection have it, which replaces what it holds: kubectl -n %s label %s %s %s=%s",
			o.namespace, resource, o.name, o.namespace, resource, o.name, labelManagedBy, Extension),
	}
}

// taken is a Problem: the object belongs to another connection that still wants it.
func taken(o object, other wire.Desired) *wire.Problem {
	return &wire.Problem{
		Code: "ResourceExists", Layer: layerKubernetes, Object: o.String(),
		Message: fmt.Sprintf("Resource already exists in your cluster: %s belongs to the connection %s.", o, other.ID),
		Fix:     "give one of the two connections another name or namespace",
	}
}

// contradiction is a Problem: two connections share an object and want it different.
func contradiction(o object, annotation string, d, other wire.Desired) *wire.Problem {
	return &wire.Problem{
		Code: "ServiceAccountConflict", Layer: layerOperator, Object: o.String(),
		Message: fmt.Sprintf("The connections %s and %s share %s and want different values of its annotation %s; it stays as it is.", d.ID, other.ID, o, annotation),
		Fix:     "use the same identity and tenant for both, or another namespace for one of them",
	}
}

// unreadable is a Problem: there is no desired state to work on.
func unreadable(of, reason string) *wire.Problem {
	return &wire.Problem{
		Code: "DesiredStateInvalid", Layer: layerOperator, Object: of,
		Message: fmt.Sprintf("The desired state of %s cannot be used: %s.", of, reason),
		Fix:     "update the connection, so that its desired state is written anew; manager and sc-extension have to be of the same version",
	}
}

// lingering is a Problem: an object is being deleted and does not go.
func lingering(o object, finalizers []string) *wire.Problem {
	waits := "it is being deleted"
	if len(finalizers) > 0 {
		waits = "it is being deleted and waits for " + strings.Join(finalizers, ", ")
	}
	return &wire.Problem{
		Code: "ObjectTerminating", Layer: layerKubernetes, Object: o.String(),
		Message: fmt.Sprintf("%s cannot be made or removed: %s.", o, waits),
		Fix: fmt.Sprintf("see who put the finalizers there: kubectl -n %s get %s %s -o jsonpath={.metadata.finalizers}",
			o.namespace, o.kind.resource.Resource, o.name),
	}
}

// altered is a Problem: the API server took an object and made something else of it.
func altered(o object) *wire.Problem {
	return &wire.Problem{
		Code: "ObjectAltered", Layer: layerKubernetes, Object: o.String(),
		Message: fmt.Sprintf("%s is not as it was written: an admission webhook changed it, or its kind does not have all the fields.", o),
		Fix:     "compare it with the connection; for SecretProviderClass see that the CRD is that of the add-on",
	}
}

const (
	hidden   = "***"
	hideFrom = 4 // bytes; shorter values are words of any text
)

// hide takes the values of a connection out of the texts of a Problem, for policies
// of a cluster may repeat what they refuse, and then bounds the text of the other layer.
func hide(p *wire.Problem, d wire.Desired) *wire.Problem {
	if p == nil {
		return nil
	}
	var pairs []string
	if d.Secret != nil {
		for _, value := range d.Secret.Data {
			if len(value) < hideFrom {
				continue
			}
			quoted := strconv.Quote(value)
			for _, form := range []string{value, quoted[1 : len(quoted)-1], base64.StdEncoding.EncodeToString([]byte(value))} {
				pairs = append(pairs, form, hidden)
			}
		}
	}
	r := strings.NewReplacer(pairs...)
	c := *p
	c.Message, c.Raw, c.Fix = r.Replace(p.Message), r.Replace(p.Raw), r.Replace(p.Fix)
	c.Raw = strings.ToValidUTF8(c.Raw[:min(len(c.Raw), rawLimit)], "")
	return &c
}

// first keeps the Problem that was there first.
func first(have, next *wire.Problem) *wire.Problem { return cmp.Or(have, next) }
