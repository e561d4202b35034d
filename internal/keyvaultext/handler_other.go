//go:build !linux

package keyvaultext

import (
	"errors"
	"fmt"
	"runtime"
)

// RunOptions are the arguments of the run command.
type RunOptions struct {
	Base       string
	Sequence   string
	Key        string
	HandedOver bool
}

var errUnsupported = errors.New("the Key Vault extension delivers certificates on Linux only; on " + runtime.GOOS + " it is not supported and not tested")

// Install succeeds, so that enable can say in the status file what is missing.
func (h *Handler) Install() int { return ExitSuccess }

// Update is Install.
func (h *Handler) Update() int { return ExitSuccess }

// Enable answers that this system is not supported: status error, exit code 51.
func (h *Handler) Enable() int {
	seq, err := h.newest()
	if err != nil {
		fmt.Fprintln(h.Out, err)
		return ExitFailure
	}
	if _, _, err := h.settings(seq); err != nil {
		return h.fail(seq, ExitSettings, settingsMessage(err))
	}
	return h.fail(seq, ExitUnsupported, errUnsupported.Error())
}

// Disable has nothing to stop.
func (h *Handler) Disable() int { return ExitSuccess }

// Uninstall has nothing to remove.
func (h *Handler) Uninstall() int { return ExitSuccess }

// Run answers that this system is not supported.
func Run(RunOptions) error { return errUnsupported }
