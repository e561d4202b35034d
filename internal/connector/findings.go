package connector

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// observation is all that a diagnosis knows: first what the server knows itself, then
// what a manager saw in the cluster.
type observation struct {
	name             string   // of the cluster
	namespaces       []string // of resource providers
	unregistered     []wire.Problem
	refused          []wire.Problem // what the caller may not do
	cluster          ClusterState
	extension        string // state; empty: there is none
	extensionProblem *wire.Problem

	connection *Connection // nil: the question is about the extension
	status     Status
	desired    *wire.Desired
	undesired  *wire.Problem   // why there is none
	old        []wire.Consumer // pods with values from before the last change
	paused     time.Time       // until then an object may be different, by somebody's order

	sight *wire.Sight // nil: no manager has answered
}

// findings say what is wrong, in the order of the documentation's list, which is that
// in which it is to be mended: what comes later often follows from what comes first.
func findings(o observation) []wire.Finding {
	var out []wire.Finding
	for _, check := range []func(observation) []wire.Finding{
		registration, permission, clusterState, manager, extension,
		apiServer, systemNamespace, release, job, operator, managerPermissions,
		desiredState, namespace, objects, connection, consumers,
	} {
		out = append(out, check(o)...)
	}
	for i := range out {
		out[i].Raw = clipText(out[i].Raw)
	}
	return out
}

// clipText bounds the text of another layer. What is at its end says most.
func clipText(text string) string {
	const most = 4000
	return strings.ToValidUTF8(text[max(0, len(text)-most):], "")
}

// good is a finding that there is nothing to mend.
func good(name, layer, object, format string, args ...any) []wire.Finding {
	return []wire.Finding{{Name: name, Result: wire.Success, Problem: wire.Problem{Layer: layer, Object: object, Message: fmt.Sprintf(format, args...)}}}
}

func found(name, result string, all ...wire.Problem) []wire.Finding {
	out := make([]wire.Finding, len(all))
	for i, p := range all {
		out[i] = wire.Finding{Name: name, Result: result, Problem: p}
	}
	return out
}

// unseen is the finding that a part could not be looked at; nil: it was.
func (o observation) unseen(name string, part wire.Part) []wire.Finding {
	text, ok := o.sight.Unseen[part]
	if !ok {
		return nil
	}
	return found(name, wire.Unknown, wire.Problem{
		Code: "NotSeen", Layer: "cluster", Object: string(part), Message: "The manager could not look at it.", Raw: text,
		Fix: "see what the manager may not do: kubectl apply -f deploy/manager-role.yaml",
	})
}

// inCluster reports whether a manager has looked into the cluster.
func (o observation) inCluster() bool {
	if o.sight == nil {
		return false
	}
	_, away := o.sight.Unseen[wire.PartServer]
	return !away
}

func registration(o observation) []wire.Finding {
	const name = "Registration"
	if len(o.unregistered) > 0 {
		return found(name, wire.Failure, o.unregistered...)
	}
	return good(name, "keyfleet", "", "The subscription is registered to use %s.", strings.Join(o.namespaces, " and "))
}

func permission(o observation) []wire.Finding {
	const name = "Permission"
	switch {
	case o.connection == nil:
		return nil
	case len(o.refused) > 0 && o.status.State == "Succeeded": // somebody else could
		return found(name, wire.Warning, o.refused...)
	case len(o.refused) > 0:
		return found(name, wire.Failure, o.refused...)
	}
	return good(name, "keyfleet", o.connection.ID, "You may make the connection, and let it do what it needs to.")
}

func (o observation) showCluster() string { return "keyfleet cluster show " + o.name }

func clusterState(o observation) []wire.Finding {
	const name = "Cluster"
	c := o.cluster
	switch {
	case !c.Managed:
		return found(name, wire.Unknown, wire.Problem{Code: "ClusterNotSeen", Layer: "cluster", Object: c.ID, Message: "Nobody looks at the cluster: what state it is in is not known.", Raw: c.Reason, Fix: o.showCluster()})
	case c.State != "Succeeded":
		return found(name, wire.Failure, wire.Problem{
			Code: "ClusterNotReady", Layer: "cluster", Object: c.ID, Message: fmt.Sprintf("The cluster is %s.", c.State), Raw: c.Reason,
			Fix: "see that its API server can be reached from where keyfleet-connector runs, with the kubeconfig that was registered: " + o.showCluster(),
		})
	case c.Busy != "":
		return found(name, wire.Warning, wire.Problem{
			Code: "Conflict", Layer: "cluster", Object: c.ID, Message: fmt.Sprintf("The cluster is being updated: %s is running. What changes a connection waits for its end.", c.Busy), Fix: o.showCluster(),
		})
	}
	return good(name, "cluster", c.ID, "The cluster is Succeeded.")
}

func manager(o observation) []wire.Finding {
	const name = "Manager"
	switch {
	case !o.cluster.Managed:
		return found(name, wire.Failure, wire.Problem{
			Code: "NoManager", Layer: "cluster", Object: o.cluster.ID, Message: "No manager looks after the cluster: nothing is brought there, and nobody looked for what follows.", Raw: o.cluster.Reason,
			Fix: "see that keyfleet-connector runs, and what it logs; to run one anywhere near the cluster: keyfleet cluster manager create connector --to-dir DIR",
		})
	case o.sight == nil:
		return found(name, wire.Warning, wire.Problem{
			Code: "ManagerSilent", Layer: "cluster", Object: o.cluster.ID, Message: fmt.Sprintf("A manager looks after the cluster, and has not answered in %s: what follows was not looked at.", questionTime),
			Fix: "ask again; if it lasts, see what keyfleet-connector logs, and that it is of this version",
		})
	}
	return good(name, "cluster", o.cluster.ID, "A manager looks after the cluster, and has answered.")
}

func extension(o observation) []wire.Finding {
	const name = "Extension"
	object, show := "extension "+ExtensionName, "keyfleet extension show "+ExtensionName+" --cluster "+o.name
	switch {
	case o.extension == "":
		return found(name, wire.Failure, wire.Problem{
			Code: "ExtensionNotFound", Layer: "keyfleet", Object: object, Message: "The cluster shall not have the extension: nothing makes the objects of connections there.",
			Fix: "keyfleet extension update " + ExtensionName + " --cluster " + o.name,
		})
	case o.extensionProblem != nil:
		return found(name, wire.Failure, *o.extensionProblem)
	case o.extension == "Succeeded":
		return good(name, "keyfleet", object, "The extension is Succeeded.")
	}
	return found(name, wire.Warning, wire.Problem{
		Code: "ExtensionInProgress", Layer: "keyfleet", Object: object, Message: fmt.Sprintf("The extension is %s.", o.extension), Fix: "wait until it is Succeeded: " + show,
	})
}

func apiServer(o observation) []wire.Finding {
	if o.sight == nil || o.inCluster() {
		return nil
	}
	return found("API server", wire.Failure, wire.Problem{
		Code: "APIServerUnreachable", Layer: "kubernetes", Object: o.cluster.ID, Message: "The API server of the cluster does not answer the manager.", Raw: o.sight.Unseen[wire.PartServer],
		Fix: "see that it runs, and that it can be reached from where keyfleet-connector runs: kubectl get --raw /readyz",
	})
}

const systemName = "sc-system" // namespace of the extension

func systemNamespace(o observation) []wire.Finding {
	return o.namespaceOf(systemName, "kubectl apply -f deploy/manager-role.yaml makes it")
}

func namespace(o observation) []wire.Finding {
	if o.connection == nil || o.connection.Namespace == systemName {
		return nil
	}
	return o.namespaceOf(o.connection.Namespace, "kubectl create namespace "+o.connection.Namespace)
}

func (o observation) namespaceOf(ns, fix string) []wire.Finding {
	if !o.inCluster() {
		return nil
	}
	name, object := "Namespace "+ns, "Namespace "+ns
	if f := o.unseen(name, wire.PartNamespaces); f != nil {
		return f
	}
	switch phase := o.sight.Namespaces[ns]; phase {
	case "":
		return found(name, wire.Failure, wire.Problem{Code: "NamespaceNotFound", Layer: "cluster", Object: object, Message: fmt.Sprintf("The namespace %s does not exist.", ns), Fix: fix})
	case "Terminating":
		return found(name, wire.Failure, wire.Problem{
			Code: "NamespaceTerminating", Layer: "cluster", Object: object, Message: fmt.Sprintf("The namespace %s is being deleted; nothing can be made in it.", ns), Fix: "wait until it is gone, then: " + fix,
		})
	}
	return good(name, "cluster", object, "The namespace is there.")
}

func release(o observation) []wire.Finding {
	const name = "Helm release"
	if !o.inCluster() {
		return nil
	}
	if f := o.unseen(name, wire.PartRelease); f != nil {
		return f
	}
	object, r := "release "+systemName+"/"+ExtensionName, o.sight.Release
	history := "helm history " + ExtensionName + " -n " + systemName
	switch {
	case r == nil && o.sight.Works:
		return found(name, wire.Warning, wire.Problem{
			Code: "ReleaseNotFound", Layer: "helm", Object: object, Message: "There is no release; an operator is at work that was installed otherwise.", Fix: "nothing, if that is intended; see: helm list -n " + systemName,
		})
	case r == nil:
		return found(name, wire.Failure, wire.Problem{
			Code: "ReleaseNotFound", Layer: "helm", Object: object, Message: "There is no release of the extension.", Fix: "see why it was not installed: keyfleet extension show " + ExtensionName + " --cluster " + o.name,
		})
	case r.Status == "deployed":
		return good(name, "helm", object, "Revision %d (%s) is deployed.", r.Revision, r.Chart)
	case strings.HasPrefix(r.Status, "pending") || r.Status == "uninstalling":
		return found(name, wire.Warning, wire.Problem{
			Code: "HelmOperationInProgress", Layer: "helm", Object: object, Message: fmt.Sprintf("Operation is already in progress for Helm: revision %d is %s.", r.Revision, r.Status), Raw: r.Description, Fix: "wait; see: " + history,
		})
	}
	return found(name, wire.Failure, wire.Problem{
		Code: "HelmFailed", Layer: "helm", Object: object, Message: fmt.Sprintf("Revision %d is %s.", r.Revision, r.Status), Raw: r.Description, Fix: "see what follows, and: " + history,
	})
}

func job(o observation) []wire.Finding {
	const name = "Job sc-job"
	if !o.inCluster() {
		return nil
	}
	if f := o.unseen(name, wire.PartJob); f != nil && o.sight.Job == nil {
		return f
	}
	object, j := "Job "+systemName+"/sc-job", o.sight.Job
	logs := "kubectl logs job/sc-job -n " + systemName
	switch {
	case j == nil && o.sight.Release == nil:
		return found(name, wire.Unknown, wire.Problem{Code: "JobNotFound", Layer: "job", Object: object, Message: "The job is not there; without a release it has not run.", Fix: "see the release"})
	case j == nil:
		return good(name, "job", object, "The job is not there: it succeeded, and was removed.")
	case j.State == wire.WorkloadReady:
		return good(name, "job", object, "The job is complete; Helm removes it.")
	}
	p := wire.Problem{Code: "JobRunning", Layer: "job", Object: object, Message: sentence(j.Message), Raw: o.sight.JobLog, Fix: "wait; see: kubectl describe job/sc-job -n " + systemName}
	result := wire.Warning
	if j.State == wire.WorkloadFailed {
		result, p.Code, p.Fix = wire.Failure, "JobFailed", logs
	}
	return found(name, caused(&p, j.Causes, result), p)
}

// caused lets a problem say the first of its causes, and returns its result: what
// does not start is a failure also before somebody gives up waiting.
func caused(p *wire.Problem, causes []wire.Problem, result string) string {
	if len(causes) == 0 {
		return result
	}
	first := causes[0]
	p.Message += " " + first.Message
	if first.Code == "NotReady" || first.Code == "NotScheduled" { // it may take a moment
		return result
	}
	if first.Code != "ContainerFailed" {
		p.Code, p.Fix = first.Code, first.Fix
	}
	return wire.Failure
}

func sentence(text string) string { return strings.TrimSuffix(text, ".") + "." }

func operator(o observation) []wire.Finding {
	const name = "Operator"
	if !o.inCluster() {
		return nil
	}
	object, d := "Deployment "+systemName+"/sc-operator", o.sight.Operator
	if f := o.unseen(name, wire.PartOperator); f != nil && !o.sight.Works {
		return f
	}
	switch {
	case d == nil && o.sight.Works:
		return good(name, "operator", object, "An operator is at work.")
	case d == nil:
		return found(name, wire.Failure, wire.Problem{
			Code: "OperatorNotFound", Layer: "operator", Object: object, Message: "There is no operator: nothing makes and repairs the objects of connections.",
			Fix: "see why it was not installed: keyfleet extension show " + ExtensionName + " --cluster " + o.name,
		})
	case d.State == wire.WorkloadReady:
		return good(name, "operator", object, "The operator is ready.")
	}
	p := wire.Problem{Code: "OperatorNotReady", Layer: "operator", Object: object, Message: sentence(d.Message), Fix: "kubectl -n " + systemName + " describe deployment sc-operator"}
	result := caused(&p, d.Causes, wire.Failure)
	if o.sight.Works {
		result = wire.Warning // another replica is at work
	}
	return found(name, result, p)
}

func managerPermissions(o observation) []wire.Finding {
	const name = "Manager's permissions"
	if !o.inCluster() {
		return nil
	}
	if f := o.unseen(name, wire.PartPermissions); f != nil {
		return f
	}
	if len(o.sight.Missing) == 0 {
		return good(name, "kubernetes", "", "The manager may do what it needs to.")
	}
	result := wire.Failure
	if o.extension == "Succeeded" && (o.connection == nil || o.status.State == "Succeeded") {
		result = wire.Warning // it works without
	}
	return found(name, result, wire.Problem{
		Code: "PermissionMissing", Layer: "kubernetes", Object: "ClusterRole keyfleet-manager",
		Message: "The manager does not have permission to perform " + strings.Join(o.sight.Missing, "; ") + ".", Fix: "kubectl apply -f deploy/manager-role.yaml",
	})
}

func desiredState(o observation) []wire.Finding {
	const name = "Desired state"
	if o.connection == nil || !o.inCluster() {
		return nil
	}
	if f := o.unseen(name, wire.PartDesired); f != nil {
		return f
	}
	object := "Secret of " + systemName
	switch have := o.sight.Desired; {
	case o.status.Desired == "":
		return found(name, wire.Unknown, wire.Problem{
			Code: "NothingDesired", Layer: "keyfleet", Object: object, Message: "There is nothing to bring to the cluster yet: " + cmp.Or(o.status.Waiting, "see Connection") + ".", Fix: "see Connection",
		})
	case have == "":
		return found(name, wire.Failure, wire.Problem{
			Code: "DesiredStateMissing", Layer: "cluster", Object: object, Message: "The cluster does not have the connection's desired state: the manager did not bring it.", Fix: "see Manager's permissions, and what keyfleet-connector logs",
		})
	case have != o.status.Desired:
		return found(name, wire.Warning, wire.Problem{Code: "DesiredStateOld", Layer: "cluster", Object: object, Message: "The cluster has an earlier desired state; the manager brings the new one.", Fix: "ask again in a moment"})
	}
	return good(name, "cluster", object, "The cluster has the connection's desired state.")
}

// objects compares what is there with what shall be there.
func objects(o observation) []wire.Finding {
	if o.connection == nil || !o.inCluster() {
		return nil
	}
	if f := o.unseen("Objects", wire.PartObjects); f != nil {
		return f
	}
	names := o.connection.Objects()
	want := map[string]string{} // hashes by kind; none: it is not known, or not the connection's
	if d := o.desired; d != nil {
		if d.Secret != nil {
			want["Secret"] = wire.SecretHash(d.Secret.Data)
		}
		if d.ServiceAccount != nil {
			want["ServiceAccount"] = wire.SecretHash(d.ServiceAccount.Annotations)
		}
	}
	var out []wire.Finding
	for _, k := range []struct{ kind, name string }{{"ServiceAccount", names.ServiceAccount}, {"SecretProviderClass", names.ProviderClass}, {"Secret", names.Secret}} {
		if k.name == "" || k.kind == "Secret" && names.ProviderClass != "" { // that one is the driver's
			continue
		}
		out = append(out, o.object(k.kind, k.name, want[k.kind])...)
	}
	return out
}

func (o observation) object(kind, name, hash string) []wire.Finding {
	object := kind + " " + o.connection.Namespace + "/" + name
	i := slices.IndexFunc(o.sight.Objects, func(s wire.AppliedObject) bool { return s.Kind == kind && s.Name == name })
	see := "see Operator and Connection; kubectl -n " + systemName + " logs deployment/sc-operator"
	switch {
	case i < 0:
		return found(kind, wire.Failure, wire.Problem{Code: "ObjectMissing", Layer: "operator", Object: object, Message: object + " is not there.", Fix: see})
	case hash == "" && kind != "SecretProviderClass":
		p := wire.Problem{Code: "NothingDesired", Layer: "keyfleet", Message: "What it shall hold is not known."}
		if o.undesired != nil {
			p = *o.undesired
		}
		p.Object = object
		return found(kind, wire.Unknown, p)
	case hash != "" && o.sight.Objects[i].Hash != hash && !o.paused.IsZero():
		return found(kind, wire.Warning, wire.Problem{
			Code: "ObjectPaused", Layer: "operator", Object: object, Message: fmt.Sprintf("%s is not as it shall be, and stays so until %s, as somebody ordered.", object, o.paused.UTC().Format(time.RFC3339)),
			Fix: "take the annotation keyfleet.dev/pause-until away to end that",
		})
	case hash != "" && o.sight.Objects[i].Hash != hash:
		return found(kind, wire.Failure, wire.Problem{Code: "ObjectDiffers", Layer: "operator", Object: object, Message: object + " is not as it shall be.", Fix: see})
	}
	return good(kind, "operator", object, "%s is as it shall be.", object)
}

func connection(o observation) []wire.Finding {
	const name = "Connection"
	if o.connection == nil {
		return nil
	}
	id, st := o.connection.ID, o.status
	switch {
	case st.Problem != nil && st.State == "Succeeded":
		return found(name, wire.Warning, *st.Problem)
	case st.Problem != nil:
		return found(name, wire.Failure, *st.Problem)
	case st.State != "Succeeded" || st.Waiting != "":
		return found(name, wire.Warning, wire.Problem{
			Code: "Waiting", Layer: "keyfleet", Object: id, Message: fmt.Sprintf("The connection is %s, and waits for %s.", cmp.Or(st.State, "Accepted"), cmp.Or(st.Waiting, "its turn")),
			Fix: "keyfleet connection show " + o.connection.Name() + " --cluster " + o.name,
		})
	}
	return good(name, "keyfleet", id, "The connection is Succeeded.")
}
