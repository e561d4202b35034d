package keyvaultext

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/internal/effect"
)

// Install prepares the service's folders. Installing again changes nothing.
func (h *Handler) Install() int {
	if err := os.MkdirAll(h.state(), 0o700); err != nil {
		fmt.Fprintln(h.Out, "creating state folder:", err)
		return ExitFailure
	}
	if err := os.MkdirAll(h.logFolder(), 0o755); err != nil {
		fmt.Fprintln(h.Out, "creating log folder:", err)
		return ExitFailure
	}
	fmt.Fprintln(h.Out, filepath.Base(h.Base), "is installed")
	return ExitSuccess
}

// updatingName is a mark in the state folder that an update is going on: the
// old version's uninstall, which is part of it, then leaves the notes alone.
const updatingName = "updating"

// Update prepares the new version; the agent has disabled the old one, and
// uninstalls it before it installs and enables the new one. Notes and
// certificates stay where they are.
func (h *Handler) Update() int {
	if code := h.Install(); code != ExitSuccess {
		return code
	}
	err := effect.Do("mark update", func() error {
		return os.WriteFile(filepath.Join(h.state(), updatingName), []byte(filepath.Base(h.Base)+"\n"), 0o600)
	})
	if err != nil {
		fmt.Fprintln(h.Out, "marking the update:", err)
		return ExitFailure
	}
	return ExitSuccess
}

// endUpdate removes the mark of an update.
func (h *Handler) endUpdate() error {
	mark := filepath.Join(h.state(), updatingName)
	if _, err := os.Stat(mark); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := effect.Do("end update", func() error { return os.Remove(mark) }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("ending the update: %w", err)
	}
	return nil
}

// Enable makes the service run with the newest settings: it starts it,
// restarts it if settings, binary or environment have changed, and leaves it
// alone otherwise. It returns when polling has started; what the service finds
// goes into the status file. Wrong settings leave a running service as it is.
func (h *Handler) Enable() int {
	seq, err := h.newest()
	if err != nil {
		fmt.Fprintln(h.Out, err)
		return ExitFailure
	}
	_, raw, err := h.settings(seq)
	if err != nil {
		return h.fail(seq, ExitSettings, settingsMessage(err))
	}
	if err := os.MkdirAll(h.state(), 0o700); err != nil {
		return h.fail(seq, ExitFailure, "Cannot create the state folder: "+err.Error())
	}
	if err := h.endUpdate(); err != nil {
		return h.fail(seq, ExitFailure, "Cannot start Key Vault extension service: "+err.Error())
	}
	key, err := serviceKey(h.Executable, string(seq), raw, h.folders.StatusFolder, h.folders.LogFolder,
		os.Getenv(extension.HintSocketVariable), os.Getenv("SSL_CERT_FILE"), os.Getenv(TimeScaleVariable))
	if err != nil {
		return h.fail(seq, ExitFailure, "Cannot start Key Vault extension service: "+err.Error())
	}
	id, ok, err := runningService(h.state())
	if err != nil {
		return h.fail(seq, ExitFailure, "Cannot start Key Vault extension service: "+err.Error())
	}
	if ok && id.Key == key && h.hasStatus(seq) {
		fmt.Fprintln(h.Out, "the service runs with these settings already, process", id.PID)
		return ExitSuccess
	}
	if err := stopService(h.state()); err != nil {
		return h.fail(seq, ExitFailure, "Cannot restart Key Vault extension service: "+err.Error())
	}
	lock, err := takeLock(h.state(), time.Now().Add(stopGrace))
	if err != nil {
		return h.fail(seq, ExitFailure, "Cannot start Key Vault extension service: "+err.Error())
	}
	args := []string{"run", "--base", h.Base, "--sequence", string(seq), "--key", key, "--handed-over"}
	if err := startService(h.Executable, args, os.Environ(), lock, filepath.Join(h.logFolder(), "akvvm_service.stderr")); err != nil {
		return h.fail(seq, ExitFailure, "Cannot start Key Vault extension service: "+err.Error())
	}
	fmt.Fprintln(h.Out, "the service has started with the settings of sequence", string(seq))
	return ExitSuccess
}

func (h *Handler) hasStatus(s sequence) bool {
	_, err := os.Stat(h.statusFile(s))
	return err == nil
}

// Disable stops the service. Files and links stay.
func (h *Handler) Disable() int {
	if err := stopService(h.state()); err != nil {
		fmt.Fprintln(h.Out, err)
		return ExitFailure
	}
	fmt.Fprintln(h.Out, "the service is stopped")
	return ExitSuccess
}

// Uninstall stops the service and removes its notes. Certificates stay: that
// is how the extension is documented, and what their readers need.
func (h *Handler) Uninstall() int {
	if code := h.Disable(); code != ExitSuccess {
		return code
	}
	if _, err := os.Stat(filepath.Join(h.state(), updatingName)); err == nil {
		fmt.Fprintln(h.Out, "an update is going on: the notes stay for the new version")
		return ExitSuccess
	}
	err := effect.Do("remove state folder", func() error { return os.RemoveAll(h.state()) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintln(h.Out, "removing state folder:", err)
		return ExitFailure
	}
	return ExitSuccess
}

// RunOptions are the arguments of the run command.
type RunOptions struct {
	Base       string
	Sequence   string
	Key        string // of the enable command that started us
	HandedOver bool   // that command hands over the files readyFile and lockFile
}

// Run is the service: it holds the lock and delivers until SIGTERM or SIGINT.
func Run(o RunOptions) error {
	tuneMemory()
	ready, lock := func() {}, (*os.File)(nil)
	if o.HandedOver {
		ready, lock = handedOver()
	}
	data, err := os.ReadFile(filepath.Join(o.Base, "HandlerEnvironment.json"))
	if err != nil {
		return fmt.Errorf("reading handler environment: %w", err)
	}
	env, err := extension.ParseHandlerEnvironment(data)
	if err != nil {
		return err
	}
	h := &Handler{Base: o.Base, folders: env.Folders}
	settings, _, err := h.settings(sequence(o.Sequence))
	if err != nil {
		return errors.New(settingsMessage(err))
	}
	if err := os.MkdirAll(h.state(), 0o700); err != nil {
		return fmt.Errorf("creating state folder: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	if lock == nil {
		if lock, err = takeLock(h.state(), time.Now().Add(stopGrace)); err != nil {
			return err
		}
	}
	if err := sign(lock, o.Key); err != nil {
		return err
	}
	defer runtime.KeepAlive(lock) // the lock ends with the process, not before: who gets it next must be alone
	log, file := newLogger(h.logFolder())
	defer file.Close()
	return Service{
		Settings: settings, Package: filepath.Base(h.Base), StatusFile: h.statusFile(sequence(o.Sequence)), State: h.state(),
		HintSocket: os.Getenv(extension.HintSocketVariable), Timing: TimingFromEnvironment(), Log: log, Ready: ready,
	}.Run(ctx)
}

// tuneMemory trades a little processor time for memory: the service is idle
// nearly always and sits on every node. GOGC in the environment overrules it.
func tuneMemory() {
	if _, err := strconv.Atoi(os.Getenv("GOGC")); err == nil {
		return
	}
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(10 << 20)
}
