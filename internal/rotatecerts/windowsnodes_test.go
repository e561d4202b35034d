package rotatecerts

import (
	"testing"

	"keyfleet.dev/keyfleet/internal/apimodel"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote"
	"keyfleet.dev/keyfleet/internal/rotation"
)

func TestWindowsNodesThatCannotBeReachedAreRefused(t *testing.T) {
	nodes := []rotation.Node{{Name: "master-0", OS: "linux", Master: true}, {Name: "win-0", OS: "windows"}}
	aks := rotation.AKSEngine(1, "azureuser")
	for _, tc := range []struct {
		reason string
		s      session
		nodes  []rotation.Node
		code   string
	}{
		{"the layout knows none", session{layout: rotation.Kubeadm()}, nodes, "WindowsNode"},
		{"they do not listen for SSH", session{layout: aks, model: &apimodel.Model{}}, nodes, "WindowsSSH"},
		{"they do", session{layout: aks, model: &apimodel.Model{WindowsSSH: true}}, nodes, ""},
		{"there are none", session{layout: aks, model: &apimodel.Model{}}, nodes[:1], ""},
	} {
		err := tc.s.checkWindows(tc.nodes)
		if tc.code == "" && err != nil || tc.code != "" && (fault.From(err).Code != tc.code || fault.From(err).Fix == "") {
			t.Errorf("%s: %v, want %q with a way out", tc.reason, err, tc.code)
		}
	}
}

func TestWindowsLoginIsThatOfTheModel(t *testing.T) {
	var cfg remote.Config
	(&session{}).windowsLogin(&cfg)
	if cfg.WindowsUser != "" || cfg.WindowsPassword != "" {
		t.Error("without a model there is a login")
	}
	(&session{model: &apimodel.Model{WindowsUser: "winuser", WindowsPassword: "hush"}}).windowsLogin(&cfg)
	if cfg.WindowsUser != "winuser" || cfg.WindowsPassword != "hush" {
		t.Errorf("logs in as %q", cfg.WindowsUser)
	}
}
