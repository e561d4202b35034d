package connector

import (
	"fmt"
	"strings"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// useLabel is what the webhook of workload identity looks for on pods.
const useLabel = `azure.workload.identity/use: "true"`

// consumers says what is wrong with the workloads that use a connection. With
// workload identity a pod needs three things, and each is forgotten easily: the
// label, on the pod; the ServiceAccount; and a webhook.
func consumers(o observation) []wire.Finding {
	const name = "Consumers"
	if o.connection == nil || !o.inCluster() {
		return nil
	}
	if f := o.unseen(name, wire.PartConsumers); f != nil {
		return f
	}
	var out []wire.Finding
	if account := o.connection.Objects().ServiceAccount; o.connection.Auth.Type == WorkloadIdentity {
		out = append(out, o.webhook()...)
		for _, u := range o.sight.Consumers {
			if f, wrong := misuse(u, account, o.sight.Webhook); wrong {
				out = append(out, f)
			}
		}
	}
	for _, c := range o.old {
		out = append(out, found("Pod "+c.Pod, wire.Warning, wire.Problem{
			Code: "OldCredential", Layer: "cluster", Object: "Pod " + c.Pod, Message: "It was started before the credential last changed, and uses the old one, which ends as soon as no pod does.",
			Fix: "kubectl rollout restart what it belongs to",
		})...)
	}
	if len(out) > 0 {
		return out
	}
	n := len(o.sight.Consumers) + o.sight.MoreConsumers
	if n == 0 {
		return good(name, "cluster", "", "No workload and no Pod of the namespace names the connection's Secret or ServiceAccount.")
	}
	return good(name, "cluster", "", "%d workloads and Pods use the connection, and nothing about them is wrong.", n)
}

// webhook says whether there is one; nil: there is.
func (o observation) webhook() []wire.Finding {
	const name = "Webhook"
	if f := o.unseen(name, wire.PartWebhook); f != nil || o.sight.Webhook {
		return f
	}
	result := wire.Warning
	if len(o.sight.Consumers) > 0 {
		result = wire.Failure
	}
	return found(name, result, wire.Problem{
		Code: "WebhookMissing", Layer: "cluster", Object: "MutatingWebhookConfiguration", Message: "The cluster has no webhook of workload identity: pods get neither token nor variables.",
		Fix: "keyfleet extension update " + ExtensionName + " --cluster " + o.name + " --configuration-settings webhook.enabled=true",
	})
}

// misuse says what is wrong with a workload of a connection with workload identity.
func misuse(u wire.Use, account string, webhook bool) (f wire.Finding, wrong bool) {
	object := u.Kind + " " + u.Namespace + "/" + u.Name
	f = wire.Finding{Name: object, Result: wire.Failure, Problem: wire.Problem{Layer: "cluster", Object: object}}
	where, again := "spec.template.metadata.labels", "make it anew: kubectl replace --force -f FILE"
	switch u.Kind {
	case "Deployment", "StatefulSet", "DaemonSet":
		again = labelPods(u, `{"spec":{"template":{"metadata":{"labels":%s}}}}`)
	case "CronJob":
		where, again = "spec.jobTemplate.spec.template.metadata.labels", labelPods(u, `{"spec":{"jobTemplate":{"spec":{"template":{"metadata":{"labels":%s}}}}}}`)
	case "Pod":
		where = "metadata.labels"
	}
	switch {
	case u.Label && !u.PodLabel:
		f.Code = "LabelMisplaced"
		f.Message = fmt.Sprintf("%s has the label %s on itself and not on its pods, where the webhook looks for it: its pods get neither token nor variables.", object, useLabel)
		f.Fix = fmt.Sprintf("put %s under %s; %s", useLabel, where, again)
	case u.Account == account && !u.PodLabel:
		f.Code = "LabelMissing"
		f.Message = fmt.Sprintf("%s uses the ServiceAccount %s, and its pods do not have the label %s: they get neither token nor variables.", object, account, useLabel)
		f.Fix = fmt.Sprintf("put %s under %s; %s", useLabel, where, again)
	case u.PodLabel && u.Account != account:
		f.Code = "AccountNotUsed"
		f.Message = fmt.Sprintf("%s uses the Secret and has the label, and its pods run as the ServiceAccount %s.", object, orDefault(u.Account))
		f.Fix = "put serviceAccountName: " + account + " into the spec of its pods, and make them anew"
	case u.Account != account:
		f.Code, f.Result = "AccountNotUsed", wire.Warning
		f.Message = fmt.Sprintf("%s reads the variables, and its pods run as the ServiceAccount %s without the label: they get no token.", object, orDefault(u.Account))
		f.Fix = fmt.Sprintf("put serviceAccountName: %s into the spec of its pods, and %s under %s", account, useLabel, where)
	case u.Kind == "Pod" && webhook && !u.Token:
		f.Code = "TokenMissing"
		f.Message = object + " has label and ServiceAccount and no token: it was made while there was no webhook."
		f.Fix = "make it anew: kubectl rollout restart what it belongs to, or delete it"
	default:
		return f, false
	}
	return f, true
}

// labelPods is the command that puts the label on the pods of a workload.
func labelPods(u wire.Use, patch string) string {
	return fmt.Sprintf(`kubectl -n %s patch %s %s --type merge -p '%s'`, u.Namespace, strings.ToLower(u.Kind), u.Name, fmt.Sprintf(patch, `{"azure.workload.identity/use":"true"}`))
}

func orDefault(account string) string {
	if account == "" {
		return "default"
	}
	return account
}
