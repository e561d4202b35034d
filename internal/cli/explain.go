package cli

import (
	"fmt"
	"strings"
)

// explanation prints why a node is as it is: the cause, then the whole chain.
//
//	Node 9d... is unusable.
//	Cause  extension secretext: ...
//	Fix    keyfleet ...
//	  | raw lines that the node kept
//
//	  ok       provider     ...
//	  broken   extension    ...
//	  unknown  ...
func (t *tool) explanation(o object) {
	fmt.Fprintf(t.out, "Node %s is %s.\n", clean(o.str("node")), clean(o.str("state")))
	if o.str("cause.name") != "" {
		fmt.Fprintf(t.out, "Cause  %s: %s\n", clean(o.str("cause.name")), clean(o.str("cause.message")))
		if fix := o.str("cause.fix"); fix != "" {
			fmt.Fprintf(t.out, "Fix    %s\n", clean(fix))
		}
		for _, line := range o.strs("cause.log") {
			fmt.Fprintf(t.out, "  | %s\n", clean(line))
		}
	}
	fmt.Fprintln(t.out)
	chain := o.objects("chain")
	width := 0
	for _, l := range chain {
		width = max(width, len(l.str("name")))
	}
	for _, l := range chain {
		text := strings.ReplaceAll(clean(l.str("message")), "\n", " ")
		fmt.Fprintf(t.out, "  %-7s  %-*s  %s\n", l.str("state"), width, clean(l.str("name")), text)
	}
}
