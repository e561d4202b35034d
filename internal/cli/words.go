package cli

import (
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// wordFlags are flags that take any number of words of the form NAME=VALUE, as
// those of az do: --secret name=app secret-file=pw.txt. The parser of flags gives
// such a flag nothing and leaves the words among the arguments; which of them are
// whose is known from how many arguments came before each flag.
type wordFlags struct {
	set   *pflag.FlagSet
	order []*words // as they were given
	from  []int    // how many arguments came before each of order
}

// words is one of them. It is a pflag.Value.
type words struct {
	of    *wordFlags
	name  string
	given bool
	list  []string
}

// noWord is what a flag is set to that has no value of its own ("--secret", not "--secret=name=app").
const noWord = "..."

func (w *words) String() string { return "" }

func (w *words) Type() string { return "words" }

// Set is called when the flag is met.
func (w *words) Set(s string) error {
	w.given = true
	if s != noWord {
		w.list = append(w.list, s)
	}
	w.of.order = append(w.of.order, w)
	w.of.from = append(w.of.from, w.of.set.NArg())
	return nil
}

func (f *wordFlags) add(name, usage string) *words {
	w := &words{of: f, name: name}
	f.set.Var(w, name, usage)
	f.set.Lookup(name).NoOptDefVal = noWord
	return w
}

// sort hands the arguments with an equals sign to the flags before them, and returns the only other one.
func (f *wordFlags) sort(args []string) (target string, err error) {
	for i, arg := range args {
		owner := -1
		for owner+1 < len(f.from) && f.from[owner+1] <= i {
			owner++
		}
		switch {
		case strings.Contains(arg, "=") && owner >= 0:
			f.order[owner].list = append(f.order[owner].list, arg)
		case strings.Contains(arg, "="):
			name, _, _ := strings.Cut(arg, "=") // what follows may be a secret
			return "", usagef("the word %s= stands after no flag that takes it", name).withFix("put it after --secret, --service-principal, --enable-csi, --customized-keys or --value")
		case target != "":
			return "", usagef("there are words beside the target %s", target). // not said: one may be a secret
												withFix("give one target; words after a flag have the form NAME=VALUE")
		default:
			target = arg
		}
	}
	if target == "" {
		return "", usagef("the target is missing").withFix("keyfleet connection create postgres-flexible, or another word")
	}
	return target, nil
}

// fields splits the words. Where names are given, there are no others.
func (w *words) fields(names ...string) (map[string]string, error) {
	if w.given && len(w.list) == 0 && len(names) == 0 {
		return nil, usagef("--%s says nothing", w.name).withFix("add NAME=VALUE after it")
	}
	out := map[string]string{}
	for _, word := range w.list {
		name, value, ok := strings.Cut(word, "=")
		switch _, twice := out[name]; {
		case !ok || name == "" || value == "" && len(names) > 0:
			return nil, usagef("a word after --%s is not of the form NAME=VALUE", w.name).withFix("NAME=VALUE, as in --%s NAME=VALUE", w.name)
		case len(names) > 0 && !slices.Contains(names, name):
			return nil, usagef("--%s knows no %s=", w.name, name).withFix("use %s", strings.Join(names, ", "))
		case twice:
			return nil, usagef("--%s says %s= twice", w.name, name).withFix("give it once")
		}
		out[name] = value
	}
	return out, nil
}
