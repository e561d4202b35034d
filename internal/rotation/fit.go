package rotation

import (
	"slices"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
)

// fit refuses clusters that are not ready for a rotation.
func fit(o Observation, s Scope) error {
	if s == (Scope{}) {
		return fault.New(fault.Invalid, "NothingToRotate", "Nothing is to be rotated.").WithFix("leave --only out, or name one of %s", strings.Join(ScopeWords(), ", "))
	}
	if len(o.masters()) == 0 {
		return fault.New(fault.Invalid, "NoMasters", "No node has a control plane.")
	}
	for _, m := range o.Machines {
		if m.OS == windowsOS {
			if err := fitWindows(m); err != nil {
				return err
			}
		}
		for _, tool := range []string{"openssl", "sha256sum", "base64", "tar", "curl"} {
			if m.OS != windowsOS && !m.Facts.has(tool) && (m.Master || tool != "curl") {
				return fault.New(fault.Precondition, "MissingProgram", "%s has no program %s.", m.Name, tool).WithFix("install it there")
			}
		}
		if m.Facts.FreeKiB < 64<<10 {
			return fault.New(fault.Precondition, "DiskFull", "%s has %d KiB free on /var or /etc, and 64 MiB are needed.", m.Name, m.Facts.FreeKiB).WithFix("make room there")
		}
		if skew := m.Facts.Now.Sub(o.At).Abs(); skew > 5*time.Minute {
			return fault.New(fault.Precondition, "ClockSkew", "The clock of %s is %s off ours.", m.Name, skew.Round(time.Second)).WithFix("set it right: certificates would not be valid there yet, or no longer")
		}
		if len(m.Facts.Runs) > 0 { // near its end a rotation has no file any more that only a rotation has
			run := m.Facts.Runs[0]
			return fault.New(fault.Conflict, "UnfinishedRotation", "%s has the files of rotation %s, which is not finished.", m.Name, run).
				WithFix("finish it or roll it back: put %s/%s/journal of that machine into DIR/%s/journal and go on with --run-dir DIR", baseDir, run, run)
		}
		for _, f := range o.Layout.on(m.Node).of(m.Master) {
			if s.Cluster && f.Holds == Manifest && strings.Contains(string(m.Files[f.Path].Content), "--kubelet-certificate-authority=") {
				if err := kubeletsVerified(o, s, m); err != nil {
					return err
				}
			}
			if m.Files[f.Path].Absent && !f.Optional && !f.Added {
				return fault.New(fault.Precondition, "MissingFile", "%s has no %s, which the layout %s has.", m.Name, f.Path, o.Layout.Name).
					WithFix("an external CA or another layout is not supported")
			}
			if f.Added && !m.Files[f.Path].Absent {
				return fault.New(fault.Conflict, "UnfinishedRotation", "%s has %s, which only a rotation under way has.", m.Name, f.Path).
					WithFix("finish or roll back that rotation: keyfleet rotate-certs status")
			}
		}
	}
	return nil
}

// kubeletsVerified refuses a rotation of the cluster CA where an API server verifies
// the certificates of kubelets, and would not follow: it reads the CA for that
// only when it starts.
func kubeletsVerified(o Observation, s Scope, master Machine) error {
	if !s.Apart && !s.Etcd && !s.Tokens {
		return fault.New(fault.Precondition, "KubeletsVerified", "The API server of %s verifies the certificates of kubelets, and would not restart when the old CA retires: logs and exec would fail.", master.Name).
			WithFix("rotate the keys of service accounts with it (--only cluster-ca,service-account-keys), or everything")
	}
	for _, m := range o.Machines {
		if !slices.ContainsFunc(o.Layout.on(m.Node).of(m.Master), func(f File) bool { return f.Served && !m.Files[f.Path].Absent }) {
			return fault.New(fault.Precondition, "KubeletsVerified", "The API server of %s verifies the certificates of kubelets, and that of %s has none that we know how to renew.", master.Name, m.Name).
				WithFix("let its kubelet ask for one (serverTLSBootstrap), or take --kubelet-certificate-authority out for the rotation")
		}
	}
	return nil
}
