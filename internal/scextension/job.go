package scextension

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	wire "keyfleet.dev/keyfleet/api/kubernetes"
)

// Job makes everything as it shall be, once, and says what it did. It goes the
// operator's way, also while the operator works. Its zero value is not usable.
type Job struct {
	Cluster *Cluster
	Out     io.Writer // a line for each object, a summary, and the problems; no values
}

// Run works through all connections of the cluster. It fails if one of them has a
// problem, or when ctx ends before it is through.
func (j *Job) Run(ctx context.Context) error {
	known, err := j.survey(ctx)
	if err != nil {
		return err
	}
	counts, problems := map[string]int{}, 0
	a := &applier{cluster: j.Cluster, view: known, now: time.Now}
	var texts strings.Builder
	for i := range known.states {
		s := &known.states[i]
		v, err := j.visit(ctx, a, s.Name)
		if ctx.Err() != nil {
			return fmt.Errorf("%d of %d connections were worked on when the time was over: %w", i, len(known.states), context.Cause(ctx))
		}
		for _, d := range v.did {
			counts[d.what]++
			fmt.Fprintf(j.Out, "%-9s %s\n", d.what, d.object)
		}
		p := v.applied.Problem
		if err != nil {
			p = hide(explain(err, object{secretKind, s.Namespace, s.Name}), wire.Desired{}) // our own note has no values
		}
		if p != nil {
			problems++
			describe(&texts, s, p)
		}
	}
	fmt.Fprintf(j.Out, "%d connections, %d with a problem; objects:", len(known.states), problems)
	for _, what := range []string{"created", "updated", "repaired", "removed", "released", "unchanged", "paused"} {
		fmt.Fprintf(j.Out, " %d %s", counts[what], what)
	}
	fmt.Fprintf(j.Out, "\n%s", texts.String())
	if problems > 0 {
		return fmt.Errorf("%d of %d connections have a problem", problems, len(known.states))
	}
	return nil
}

// visit does one connection, as it shall be now.
func (j *Job) visit(ctx context.Context, a *applier, name string) (visit, error) {
	for tries := 0; ; tries++ {
		s, err := j.Cluster.api.CoreV1().Secrets(Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return visit{gone: true}, nil
		}
		if err != nil {
			return visit{}, err
		}
		if v, err := a.visit(ctx, s); !errors.Is(err, errAgain) || tries == 5 {
			return v, err
		}
	}
}

func describe(to io.Writer, s *core.Secret, p *wire.Problem) {
	fmt.Fprintf(to, "\n%s: %s\n  connection: %s\n  layer:      %s\n  object:     %s\n", p.Code, p.Message, s.Annotations[annotationLinker], p.Layer, p.Object)
	if p.Raw != "" {
		fmt.Fprintf(to, "  said:       %s\n", p.Raw)
	}
	if p.Fix != "" {
		fmt.Fprintf(to, "  to do:      %s\n", p.Fix)
	}
}

// survey is what was there when the job started.
type survey struct {
	states  []core.Secret
	names   map[string][]wire.Desired // by the objects that they name
	objects map[string][]object       // by the connection of their label
}

func (j *Job) survey(ctx context.Context) (*survey, error) {
	states, err := j.Cluster.desiredStates(ctx)
	if err != nil {
		return nil, err
	}
	known := &survey{states, map[string][]wire.Desired{}, map[string][]object{}}
	for i := range states {
		if d, err := readDesired(&states[i]); err == nil && wants(&states[i]) {
			for _, o := range named(d) {
				known.names[o.String()] = append(known.names[o.String()], d)
			}
		}
	}
	for _, k := range kinds {
		for next := ""; ; {
			page, err := j.Cluster.meta.Resource(k.resource).List(ctx, metav1.ListOptions{LabelSelector: ours, Limit: pageSize, Continue: next})
			if noSuchKind(err) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("listing the objects of connections: %w", err)
			}
			for i := range page.Items {
				o := &page.Items[i]
				key := o.Labels[labelConnection]
				known.objects[key] = append(known.objects[key], object{k, o.Namespace, o.Name})
			}
			if next = page.Continue; next == "" {
				break
			}
		}
	}
	return known, nil
}

// naming implements view.
func (s *survey) naming(o object) ([]wire.Desired, error) {
	return slices.Clone(s.names[o.String()]), nil
}

// labelled implements view.
func (s *survey) labelled(key string) []object { return s.objects[key] }
