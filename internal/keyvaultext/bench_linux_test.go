package keyvaultext_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/keyvaultext"
	"keyfleet.dev/keyfleet/internal/keyvaultext/keyvaulttest"
)

// residentGoal is what the service may take of a node's memory, in MiB.
const residentGoal = 15

// resident reads a process's resident memory in MiB; which part is VmRSS or RssAnon.
func resident(t testing.TB, pid int, part string) float64 {
	t.Helper()
	for line := range strings.Lines(readText(fmt.Sprintf("/proc/%d/status", pid))) {
		var kib float64
		if n, _ := fmt.Sscanf(line, part+": %f kB", &kib); n == 1 {
			return kib / 1024
		}
	}
	t.Fatalf("process %d has no %s", pid, part)
	return 0
}

// hinted starts a service that never polls and an agent's end of its hint socket.
func hinted(t testing.TB, certificates int) (*node, net.Conn, *bufio.Scanner) {
	t.Helper()
	vault := keyvaulttest.Start(t)
	n := newNode(t, vault, binary(t, ""))
	socket := filepath.Join(n.dir, "hint.sock")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	var observed []string
	for i := range certificates {
		name := fmt.Sprintf("certificate-%d", i)
		vault.Renew(host, name, keyvaulttest.PKCS12)
		observed = append(observed, quoted("https://"+host+"/secrets/"+name))
	}
	n.settings(true, "", observed...)
	n.raw(strings.Replace(string(publicSettings(t, n)), `"5"`, `"86400"`, 1))
	n.env = append(n.env, extension.HintSocketVariable+"="+socket, keyvaultext.TimeScaleVariable+"=1")
	n.enable()
	conn, err := listener.Accept()
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	n.eventually("success", func() bool { return n.status().Status.Status == extension.StatusSuccess })
	return n, conn, bufio.NewScanner(conn)
}

// awaitVersion reads delivery lines until one shows the version.
func awaitVersion(t testing.TB, conn net.Conn, lines *bufio.Scanner, version string) extension.Delivery {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for lines.Scan() {
		d, err := extension.ParseDelivery(lines.Bytes())
		must(t, err)
		if d.Version == version {
			return d
		}
	}
	t.Fatalf("no delivery of %s was reported: %v", version, lines.Err())
	return extension.Delivery{}
}

// TestServiceIsSmall measures the real service after a hundred renewals of ten certificates.
func TestServiceIsSmall(t *testing.T) {
	n, conn, lines := hinted(t, 10)
	for i := range 100 {
		v := n.vault.Renew(host, fmt.Sprintf("certificate-%d", i%10), keyvaulttest.PKCS12)
		fmt.Fprintf(conn, "hint %d\n", i)
		awaitVersion(t, conn, lines, v.ID)
	}
	rss, own := resident(t, n.servicePID(), "VmRSS"), resident(t, n.servicePID(), "RssAnon")
	t.Logf("resident after 100 renewals of 10 certificates: %.1f MiB, of which %.1f MiB are its own pages and the rest its binary", rss, own)
	if rss > residentGoal {
		t.Errorf("resident %.1f MiB, the goal is under %d", rss, residentGoal)
	}
}

// BenchmarkHintToLink measures from a hint to the moment the link is switched:
// fetch over TLS, PKCS#12, file, link.
func BenchmarkHintToLink(b *testing.B) {
	n, conn, lines := hinted(b, 1)
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		v := n.vault.Renew(host, "certificate-0", keyvaulttest.PEM)
		b.StartTimer()
		start := time.Now()
		fmt.Fprintf(conn, "hint %d\n", i)
		took = append(took, awaitVersion(b, conn, lines, v.ID).Since.Sub(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(resident(b, n.servicePID(), "VmRSS"), "resident-MiB")
	if pid := n.servicePID(); pid != 0 {
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		b.ReportMetric(float64(len(fds)), "open-files")
	}
}
