package rotatecerts

import (
	"slices"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/remote"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// windowsLogin says how to log in to Windows nodes: as the API model has it, since
// aks-engine lets its user in with a password. The password stays in memory.
func (s *session) windowsLogin(cfg *remote.Config) {
	if s.model != nil {
		cfg.WindowsUser, cfg.WindowsPassword = s.model.WindowsUser, s.model.WindowsPassword
	}
}

// checkWindows refuses Windows nodes that cannot be rotated, before they are dialled.
func (s *session) checkWindows(nodes []rotation.Node) error {
	if err := rotation.CheckWindows(s.layout, nodes); err != nil {
		return err
	}
	i := slices.IndexFunc(nodes, func(n rotation.Node) bool { return n.OS == "windows" })
	if i < 0 || s.model == nil || s.model.WindowsSSH {
		return nil
	}
	return fault.New(fault.Precondition, "WindowsSSH", "Node %s runs Windows, and the API model says that its nodes do not listen for SSH.", nodes[i].Name).
		At("properties.windowsProfile.sshEnabled").WithFix("install OpenSSH on the Windows nodes, and set sshEnabled in the API model to true")
}
