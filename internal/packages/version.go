package packages

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// maxParts is how many numbers a version may have: 3.5.3041.185 has four.
const maxParts = 4

// Version is an extension's version: one to four numbers.
type Version []int

// ParseVersion reads "3.0" or "3.5.3041.185".
func ParseVersion(s string) (Version, error) {
	parts := strings.Split(s, ".")
	if len(parts) > maxParts {
		return nil, fmt.Errorf("a version has at most %d numbers, %q has more", maxParts, s)
	}
	v := make(Version, len(parts))
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 || p != strconv.Itoa(n) {
			return nil, fmt.Errorf("a version is numbers with dots between them, %q is not", s)
		}
		v[i] = n
	}
	return v, nil
}

// String renders the version as it is written in names.
func (v Version) String() string {
	parts := make([]string, len(v))
	for i, n := range v {
		parts[i] = strconv.Itoa(n)
	}
	return strings.Join(parts, ".")
}

// Compare orders versions number by number; a missing number counts as 0.
func (v Version) Compare(w Version) int {
	for i := range maxParts {
		if c := cmp.Compare(v.at(i), w.at(i)); c != 0 {
			return c
		}
	}
	return 0
}

func (v Version) at(i int) int {
	if i < len(v) {
		return v[i]
	}
	return 0
}

// Choose picks the version that a pool's typeHandlerVersion stands for. Without
// automatic upgrade that is the newest one that begins with the numbers asked
// for: "3.0" means 3.0.x. With it, the newest one of the same major version that
// is not older than what was asked for: "3.0" may mean 3.5.2, never 4.0.
// (Azure: autoUpgradeMinorVersion, "use a newer minor version if one is
// available at deployment time".)
func Choose(have []Version, want Version, autoUpgrade bool) (Version, bool) {
	var best Version
	for _, v := range have {
		if !v.serves(want, autoUpgrade) {
			continue
		}
		if best == nil || v.Compare(best) > 0 {
			best = v
		}
	}
	return best, best != nil
}

func (v Version) serves(want Version, autoUpgrade bool) bool {
	if len(want) == 0 || v.at(0) != want[0] {
		return false
	}
	if autoUpgrade {
		return v.Compare(want) >= 0
	}
	for i, n := range want {
		if v.at(i) != n {
			return false
		}
	}
	return true
}
