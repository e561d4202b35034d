package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"
	"unicode/utf8"

	jmespath "github.com/jmespath-community/go-jmespath"
	"sigs.k8s.io/yaml"
)

// outputs are the forms of -o.
var outputs = []string{"table", "json", "yaml", "tsv", "name", "none"}

// column is one column of a table, and one line of the view of a single object.
type column[T any] struct {
	head   string
	cell   func(v T) string
	detail bool // only in the view of a single object
}

// view says how objects of a kind are shown to people.
type view[T any] struct {
	name    func(v T) string // what -o name prints
	columns []column[T]
}

// one prints an object.
func one[T any](t *tool, v T, vw view[T]) error {
	switch t.form() {
	case "table":
		return writeOne(t.out, v, vw.columns)
	case "tsv":
		return many(t, []T{v}, vw)
	case "name":
		_, err := fmt.Fprintln(t.out, clean(vw.name(v)))
		return err
	}
	return t.data(v)
}

// writeOne prints a line for each column that is not empty.
func writeOne[T any](w io.Writer, v T, columns []column[T]) error {
	var heads, cells []string
	width := 0
	for _, c := range columns {
		if s := c.cell(v); s != "" {
			heads, cells = append(heads, c.head), append(cells, clean(s))
			width = max(width, len(c.head))
		}
	}
	for i := range heads {
		if _, err := fmt.Fprintf(w, "%-*s  %s\n", width, heads[i], strings.ReplaceAll(cells[i], "\n", "\n"+strings.Repeat(" ", width+2))); err != nil {
			return err
		}
	}
	return nil
}

// many prints a list of objects.
func many[T any](t *tool, vs []T, vw view[T]) error {
	form := t.form()
	if form == "name" {
		for _, v := range vs {
			fmt.Fprintln(t.out, clean(vw.name(v)))
		}
		return nil
	}
	if form != "table" && form != "tsv" {
		if vs == nil {
			vs = []T{}
		}
		return t.data(vs)
	}
	var head []string
	var columns []column[T]
	for _, c := range vw.columns {
		if !c.detail {
			head, columns = append(head, strings.ToUpper(c.head)), append(columns, c)
		}
	}
	rows := make([][]string, 0, len(vs))
	for _, v := range vs {
		row := make([]string, len(columns))
		for i, c := range columns {
			row[i] = c.cell(v)
		}
		rows = append(rows, row)
	}
	if form == "tsv" {
		return writeTSV(t.out, rows)
	}
	return writeTable(t.out, head, rows)
}

// form is the output form in force. A query in table form is answered by data.
func (t *tool) form() string {
	if t.flags.query != "" && t.flags.output != "none" {
		return "query"
	}
	return t.flags.output
}

// data prints v in one of the forms for programs, after --query.
func (t *tool) data(v any) error {
	if t.flags.output == "none" {
		return nil
	}
	doc := v // keeps the API's order of names
	if t.flags.query != "" {
		var err error
		if doc, err = search(t.flags.query, v); err != nil {
			return err
		}
	}
	switch t.flags.output {
	case "json":
		enc := json.NewEncoder(t.out)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(doc)
	case "yaml":
		b, err := yaml.Marshal(doc)
		if err != nil {
			return fmt.Errorf("writing YAML: %w", err)
		}
		_, err = t.out.Write(b)
		return err
	case "table":
		return writeGenericTable(t.out, doc)
	}
	return writeTSV(t.out, genericRows(doc))
}

// search applies a JMESPath expression.
func search(query string, v any) (any, error) {
	q, err := jmespath.Compile(query)
	if err != nil {
		return nil, usagef("--query is not a JMESPath expression: %v", err)
	}
	doc, err := generic(v)
	if err != nil {
		return nil, err
	}
	if doc, err = q.Search(doc); err != nil {
		return nil, usagef("--query cannot be applied to this answer: %v", err)
	}
	return doc, nil
}

// generic turns v into maps, slices and scalars, as its JSON form has them.
func generic(v any) (any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("writing JSON: %w", err)
	}
	var doc any
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("writing JSON: %w", err)
	}
	return doc, nil
}

// writeTable prints aligned columns, two spaces apart.
func writeTable(w io.Writer, head []string, rows [][]string) error {
	width := make([]int, len(head))
	all := append([][]string{head}, rows...)
	for _, row := range all {
		for i := range row {
			row[i] = strings.Join(strings.Fields(clean(row[i])), " ")
			width[i] = max(width[i], utf8.RuneCountInString(row[i]))
		}
	}
	for _, row := range all {
		var b strings.Builder
		for i, s := range row {
			b.WriteString(s)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-utf8.RuneCountInString(s)+2))
			}
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(b.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

var tsvEscapes = strings.NewReplacer("\\", `\\`, "\t", `\t`, "\n", `\n`, "\r", `\r`)

// writeTSV prints rows without a head. Tab, line break and backslash are
// escaped, so a row is always one line; a row of one field is printed as it is.
func writeTSV(w io.Writer, rows [][]string) error {
	for _, row := range rows {
		if len(row) == 1 {
			if _, err := fmt.Fprintln(w, row[0]); err != nil {
				return err
			}
			continue
		}
		esc := make([]string, len(row))
		for i, s := range row {
			esc[i] = tsvEscapes.Replace(s)
		}
		if _, err := fmt.Fprintln(w, strings.Join(esc, "\t")); err != nil {
			return err
		}
	}
	return nil
}

// genericRows lays out the result of a query: a scalar is one row, a list a row
// for each element, an object its values in the order of their names.
func genericRows(doc any) [][]string {
	switch d := doc.(type) {
	case nil:
		return nil
	case []any:
		var rows [][]string
		for _, e := range d {
			switch x := e.(type) {
			case []any:
				row := make([]string, len(x))
				for i := range x {
					row[i] = scalar(x[i])
				}
				rows = append(rows, row)
			case map[string]any:
				rows = append(rows, values(x, keys(x)))
			default:
				rows = append(rows, []string{scalar(x)})
			}
		}
		return rows
	case map[string]any:
		return [][]string{values(d, keys(d))}
	}
	return [][]string{{scalar(doc)}}
}

// writeGenericTable prints the result of a query as a table: a column for each
// name that an element has, in the order of the names.
func writeGenericTable(w io.Writer, doc any) error {
	list, ok := doc.([]any)
	if obj, isObj := doc.(map[string]any); isObj {
		list, ok = []any{obj}, true
	}
	var head []string
	for _, e := range list {
		m, isMap := e.(map[string]any)
		if !isMap {
			ok = false
			break
		}
		for k := range m {
			if !slices.Contains(head, k) {
				head = append(head, k)
			}
		}
	}
	if !ok || len(list) == 0 {
		return writeTSV(w, genericRows(doc))
	}
	sort.Strings(head)
	rows := make([][]string, len(list))
	for i, e := range list {
		rows[i] = values(e.(map[string]any), head)
	}
	upper := make([]string, len(head))
	for i := range head {
		upper[i] = strings.ToUpper(head[i])
	}
	return writeTable(w, upper, rows)
}

func keys(m map[string]any) []string {
	ks := make([]string, 0, len(m))
	for k := range m {
		ks = append(ks, k)
	}
	sort.Strings(ks)
	return ks
}

func values(m map[string]any, names []string) []string {
	row := make([]string, len(names))
	for i, k := range names {
		row[i] = scalar(m[k])
	}
	return row
}

func scalar(v any) string {
	switch x := v.(type) {
	case nil:
		return ""
	case string:
		return x
	}
	b, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(b)
}

// when prints a time for a table: local time on a terminal, UTC elsewhere, empty for the zero time.
func (t *tool) when(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	if t.outTTY && t.flags.output == "table" {
		return at.Local().Format("2006-01-02 15:04 MST")
	}
	return at.UTC().Format(time.RFC3339)
}

// age prints a duration with one or two units: 3d4h, 5m, 12s.
func age(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < 0:
		return "-" + age(-d)
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%ds", int(d.Seconds()))
}
