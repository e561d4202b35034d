//go:build linux

package rotation

import (
	"encoding/base64"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"keyfleet.dev/keyfleet/internal/pki"
	"keyfleet.dev/keyfleet/internal/rotation"
	"keyfleet.dev/keyfleet/test/bed"
)

// lookAt prints a line for each file that Kubernetes keeps on a machine:
// path|type|mode|owner|target of a link|hash.
const lookAt = `cd /
find etc/kubernetes var/lib/kubelet/pki var/lib/kubelet/config.yaml var/lib/kubelet/kubeadm-flags.env -printf '%p|%y|%m|%U:%G|%l\n' | sort | while IFS= read -r line; do
  sum=
  case $line in *'|f|'*) sum=$(sha256sum <"/${line%%|*}" | cut -d' ' -f1) ;; esac
  echo "$line|$sum"
done`

// disk is what is on one machine, by path: content, and mode and owner.
type disk struct{ content, mode map[string]string }

func (c *cluster) disk(node string) disk {
	c.t.Helper()
	d := disk{map[string]string{}, map[string]string{}}
	for _, line := range strings.Split(strings.TrimSpace(c.sh(node, lookAt)), "\n") {
		f := strings.Split(line, "|")
		if len(f) != 6 {
			c.t.Fatalf("%q is not a line of the script", line)
		}
		d.content[f[0]], d.mode[f[0]] = f[1]+" "+f[4]+f[5], f[2]+" "+f[3]
	}
	return d
}

// disks are those of all machines.
func (c *cluster) disks() map[string]disk {
	c.t.Helper()
	out := map[string]disk{}
	for _, n := range c.Nodes {
		out[n.Name] = c.disk(n.Name)
	}
	return out
}

// difference names the paths of which two looks say different things.
func difference(before, after map[string]string) []string {
	var out []string
	for p, was := range before {
		if now, there := after[p]; !there {
			out = append(out, p+" is gone")
		} else if now != was {
			out = append(out, p+" was "+was+" and is "+now)
		}
	}
	for p := range after {
		if _, there := before[p]; !there {
			out = append(out, p+" is new")
		}
	}
	slices.Sort(out)
	return out
}

// asBefore checks that every file of every machine is byte for byte as it was,
// with its mode and owner, and that there is no other.
func (c *cluster) asBefore(t *testing.T, before map[string]disk) {
	t.Helper()
	for node, now := range c.in(t).disks() {
		if d := difference(before[node].content, now.content); len(d) > 0 {
			t.Errorf("%s is not as it was:\n%s", node, strings.Join(d, "\n"))
		}
		if d := difference(before[node].mode, now.mode); len(d) > 0 {
			t.Errorf("modes on %s are not as they were:\n%s", node, strings.Join(d, "\n"))
		}
	}
}

// modesAsBefore checks modes and owners alone. The kubelet's new pair and the run's
// name in its path are the only new file that a rotation leaves.
func (c *cluster) modesAsBefore(t *testing.T, before map[string]disk) {
	t.Helper()
	for node, now := range c.in(t).disks() {
		for _, d := range difference(before[node].mode, now.mode) {
			if !strings.HasSuffix(d, ".pem is new") || path.Dir(d) != "var/lib/kubelet/pki" {
				t.Errorf("on %s: %s", node, d)
			}
		}
	}
}

// leavesNothingAtWork checks that no rotation has left a rule of the packet filter,
// a unit, a half-written file or a lock on any machine.
func (c *cluster) leavesNothingAtWork(t *testing.T) {
	t.Helper()
	for _, n := range c.Nodes {
		out := c.in(t).sh(n.Name, `iptables-save 2>/dev/null | grep keyfleet || true
systemctl list-units --all --plain --no-legend 'keyfleet-*' || true
find / -xdev \( -name '*.keyfleet-new*' -o -name .keyfleet-manifest \) -not -path '/proc/*' 2>/dev/null || true
find /var/lib/keyfleet/rotate-certs \( -name holder -o -name who -o -path '*/run/*' -type d \) 2>/dev/null || true`)
		if out != "" {
			t.Errorf("left on %s:\n%s", n.Name, out)
		}
	}
}

// roots are the cluster's CAs as clients are told of them, by where they are told.
func (c *cluster) roots(t *testing.T) map[string]string {
	t.Helper()
	c = c.in(t)
	out := map[string]string{}
	for _, place := range []struct{ namespace, name, entry string }{
		{"default", "kube-root-ca.crt", "ca.crt"},
		{"kube-system", "kube-root-ca.crt", "ca.crt"},
		{"kube-system", "extension-apiserver-authentication", "client-ca-file"},
		{"kube-system", "extension-apiserver-authentication", "requestheader-client-ca-file"},
	} {
		out[place.namespace+"/"+place.name+" "+place.entry] = prints(t, c.sh("master-0", fmt.Sprintf("kubectl -n %s get configmap %s -o 'jsonpath={.data.%s}'", place.namespace, place.name, strings.ReplaceAll(place.entry, ".", `\.`))))
	}
	var info struct {
		Clusters []struct {
			Cluster struct {
				CA string `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
	}
	if err := yaml.Unmarshal([]byte(c.sh("master-0", `kubectl -n kube-public get configmap cluster-info -o 'jsonpath={.data.kubeconfig}'`)), &info); err != nil || len(info.Clusters) != 1 {
		t.Fatalf("reading cluster-info: %v", err)
	}
	ca, err := base64.StdEncoding.DecodeString(info.Clusters[0].Cluster.CA)
	if err != nil {
		t.Fatal(err)
	}
	out["kube-public/cluster-info"] = prints(t, string(ca))
	return out
}

// prints are the hashes of the public keys of the certificates in a PEM text.
func prints(t *testing.T, text string) string {
	t.Helper()
	chain, err := pki.ParseChain([]byte(text))
	if err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	set := map[string]bool{}
	for _, cert := range chain {
		set[pki.PublicKeyHash(cert)] = true
	}
	return strings.Join(slices.Sorted(maps.Keys(set)), " ")
}

// authorities are the CAs that a master trusts, by file.
func (c *cluster) authorities(t *testing.T, node string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, f := range []string{"ca.crt", "etcd/ca.crt", "front-proxy-ca.crt"} {
		out[f] = prints(t, c.in(t).sh(node, "cat /etc/kubernetes/pki/"+f))
	}
	return out
}

// worksFor checks that the cluster works for somebody who logs in as an administrator:
// the API answers through the load balancer, nodes are ready, and the API servers get
// on with the kubelets.
func (c *cluster) worksFor(t *testing.T, as *login) {
	t.Helper()
	c = c.in(t)
	c.reads(t, as)
	c.heardAgain(len(c.Nodes))
	c.sh("master-0", "kubectl rollout status deployment/probe --timeout=50s")
	c.sh("master-0", "kubectl logs deployment/probe >/dev/null") // API server to kubelet
}

// heardAgain waits until so many nodes are ready and their kubelets have been heard
// of since this call: what the API knew from before counts for nothing.
func (c *cluster) heardAgain(n int) {
	c.t.Helper()
	const leases = `timeout 20 kubectl -n kube-node-lease get leases -o 'jsonpath={range .items[*]}{.spec.renewTime}{"\n"}{end}' 2>/dev/null || true`
	for since, end := time.Now(), time.Now().Add(5*time.Minute); ; {
		heard := 0
		for _, line := range strings.Fields(c.sh("master-0", leases)) {
			if at, err := time.Parse(time.RFC3339, line); err == nil && at.After(since) {
				heard++
			}
		}
		out := c.sh("master-0", "timeout 20 kubectl get nodes --no-headers 2>&1 || true")
		if heard >= n && strings.Count(out, " Ready ") >= n {
			return
		}
		if time.Now().After(end) {
			c.t.Fatalf("%d nodes were heard of again:\n%s", heard, out)
		}
		time.Sleep(time.Second)
	}
}

// beganScript is a script that prints when a program began, $1, and when files that
// follow last changed, in seconds since 1970.
const beganScript = `for p in /proc/[0-9]*; do
  [ "$(basename "$(readlink "$p/exe" 2>/dev/null)" 2>/dev/null)" = "$1" ] || continue
  ticks=$(sed 's/^.*) //' "$p/stat" | cut -d' ' -f20)
  echo "$(date +%s.%N) $(cut -d' ' -f1 /proc/uptime) $ticks $(getconf CLK_TCK)" | awk '{printf "%.2f\n", $1 - $2 + $3 / $4}'
  break
done
shift
for f; do [ -e "$f" ] && stat -c '%.2Z %n' "$f"; done; true`

// runsWhatIsThere checks that no program goes on with files that are there no more,
// after a rotation that began at a moment and was taken back: each began before it,
// or after the last change of what it reads only then.
func (c *cluster) runsWhatIsThere(t *testing.T, rotated time.Time) {
	t.Helper()
	c = c.in(t)
	for _, n := range c.Nodes {
		for _, p := range rotation.Kubeadm().Components {
			if p.On == rotation.Masters && n.Role != bed.RoleMaster {
				continue
			}
			files := append(slices.Clone(p.Once), p.Pod, p.Signs)
			files = slices.DeleteFunc(files, func(f string) bool { return f == "" })
			lines := strings.Split(strings.TrimSpace(c.sh(n.Name, "set -- "+p.Name+" "+strings.Join(files, " ")+"\n"+beganScript)), "\n")
			start, err := strconv.ParseFloat(lines[0], 64)
			if err != nil {
				t.Errorf("%s on %s does not run: %q", p.Name, n.Name, lines)
				continue
			}
			for _, line := range lines[1:] {
				if start < float64(rotated.UnixNano())/1e9 {
					continue
				}
				at, file, _ := strings.Cut(line, " ")
				if changed, err := strconv.ParseFloat(at, 64); err != nil || changed > start+0.05 {
					t.Errorf("%s on %s began %.1f s before %s changed, and has not read it since (%v)", p.Name, n.Name, changed-start, file, err)
				}
			}
		}
	}
}
