package agent

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// clockTicks is the unit of times in /proc, a second's part; it is 100 on every
// architecture that Linux runs Go programs on.
const clockTicks = 100

// boot returns an id that changes when the node starts anew, and when that was.
// A node may be a namespace on a machine that runs on: so it is the machine's
// boot id and the start of the node's first process (proc_pid_stat(5), field 22).
func boot() (id string, booted time.Time) {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without /proc the id is empty and never changes
	id = strings.TrimSpace(string(b))
	ticks, ok := firstProcessStart()
	if !ok {
		return id, time.Time{}
	}
	up, _ := os.ReadFile("/proc/uptime")
	first, _, _ := strings.Cut(string(up), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return id, time.Time{}
	}
	started := float64(ticks) / clockTicks
	booted = time.Now().Add(-time.Duration((seconds - started) * float64(time.Second)))
	return id + "-" + strconv.FormatInt(ticks, 10), booted.UTC().Round(time.Millisecond)
}

// firstProcessStart is the start of process 1 in ticks since the machine's boot.
func firstProcessStart() (int64, bool) {
	stat, err := os.ReadFile("/proc/1/stat")
	if err != nil {
		return 0, false
	}
	// The command in field 2 may hold blanks and brackets; it ends at the last bracket.
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(f) < 20 {
		return 0, false
	}
	n, err := strconv.ParseInt(f[19], 10, 64)
	return n, err == nil
}
