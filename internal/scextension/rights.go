package scextension

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	authorization "k8s.io/api/authorization/v1"
	rbac "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
	"keyfleet.dev/keyfleet/deploy"
)

// right is one thing that deploy/manager-role.yaml lets a manager do.
type right struct {
	namespace                   string // empty: in all
	verb, group, resource, name string
	path                        string // instead of a resource
}

// rightsOf reads the rights that the roles of a file give, in its order.
func rightsOf(roles []byte) ([]right, error) {
	var all []right
	for dec := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(roles), 4096); ; {
		var role struct {
			Metadata metav1.ObjectMeta
			Rules    []rbac.PolicyRule
		}
		err := dec.Decode(&role)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the roles: %w", err)
		}
		for _, rule := range role.Rules {
			all = append(all, rightsOfRule(rule, role.Metadata.Namespace)...)
		}
	}
}

func rightsOfRule(rule rbac.PolicyRule, namespace string) (all []right) {
	names := rule.ResourceNames
	if len(names) == 0 {
		names = []string{""}
	}
	for _, verb := range rule.Verbs {
		for _, path := range rule.NonResourceURLs {
			all = append(all, right{verb: verb, path: path})
		}
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				for _, name := range names {
					all = append(all, right{namespace: namespace, verb: verb, group: group, resource: resource, name: name})
				}
			}
		}
	}
	return all
}

// permissions finds the rights of the shipped role that the manager does not have.
// One review lists all that it has in a namespace; where the cluster cannot list
// them (it says so), each right is asked for.
func (l looker) permissions(ctx context.Context, s *wire.Sight) error {
	all, err := rightsOf(deploy.ManagerRole())
	if err != nil {
		return err
	}
	elsewhere := l.Namespace
	if elsewhere == "" {
		elsewhere = metav1.NamespaceDefault // rights in all namespaces are rights there
	}
	has := map[string]*authorization.SubjectRulesReviewStatus{}
	for _, ns := range []string{Namespace, elsewhere} {
		r, err := l.api.AuthorizationV1().SelfSubjectRulesReviews().Create(ctx, &authorization.SelfSubjectRulesReview{
			Spec: authorization.SelfSubjectRulesReviewSpec{Namespace: ns},
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("asking for the own permissions: %w", err)
		}
		has[ns] = &r.Status
	}
	missing := map[string][]string{} // verbs, by what they are missing on
	var order []string
	for _, r := range all {
		ns := r.namespace
		if ns == "" {
			ns = elsewhere
		}
		granted := r.in(has[ns])
		if !granted && has[ns].Incomplete {
			if granted, err = l.may(ctx, r, ns); err != nil {
				return err
			}
		}
		if !granted {
			on := r.on()
			if missing[on] == nil {
				order = append(order, on)
			}
			missing[on] = append(missing[on], r.verb)
		}
	}
	for _, on := range order {
		s.Missing = append(s.Missing, strings.Join(missing[on], ", ")+" "+on)
	}
	return nil
}

// on is what a right is a right on, "jobs.batch in sc-system".
func (r right) on() string {
	out := r.resource + r.path
	if r.group != "" {
		out += "." + r.group
	}
	if r.name != "" {
		out += " " + r.name
	}
	if r.namespace != "" {
		out += " in " + r.namespace
	}
	return out
}

// in reports whether rules give the right.
func (r right) in(rules *authorization.SubjectRulesReviewStatus) bool {
	has := func(list []string, one string) bool { return slices.Contains(list, one) || slices.Contains(list, "*") }
	if r.path != "" {
		return slices.ContainsFunc(rules.NonResourceRules, func(n authorization.NonResourceRule) bool {
			return has(n.Verbs, r.verb) && slices.ContainsFunc(n.NonResourceURLs, func(u string) bool {
				prefix, open := strings.CutSuffix(u, "*")
				return u == r.path || open && strings.HasPrefix(r.path, prefix)
			})
		})
	}
	return slices.ContainsFunc(rules.ResourceRules, func(n authorization.ResourceRule) bool {
		return has(n.Verbs, r.verb) && has(n.APIGroups, r.group) && has(n.Resources, r.resource) && (len(n.ResourceNames) == 0 || slices.Contains(n.ResourceNames, r.name))
	})
}

// may asks for one right.
func (l looker) may(ctx context.Context, r right, namespace string) (bool, error) {
	spec := authorization.SelfSubjectAccessReviewSpec{}
	if r.path != "" {
		spec.NonResourceAttributes = &authorization.NonResourceAttributes{Path: r.path, Verb: r.verb}
	} else {
		resource, sub, _ := strings.Cut(r.resource, "/")
		spec.ResourceAttributes = &authorization.ResourceAttributes{Namespace: namespace, Verb: r.verb, Group: r.group, Resource: resource, Subresource: sub, Name: r.name}
	}
	review, err := l.api.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorization.SelfSubjectAccessReview{Spec: spec}, metav1.CreateOptions{})
	if err != nil {
		return false, fmt.Errorf("asking for the own permissions: %w", err)
	}
	return review.Status.Allowed, nil
}
