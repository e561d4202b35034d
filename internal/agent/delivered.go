package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/api/extension"
	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/effect"
)

// delivered takes an extension's word that a certificate is on disk, or why
// not. It is reported, and the place is remembered, so that a released host
// can be wiped of it.
func (a *Agent) delivered(name string, d extension.Delivery) {
	a.mu.Lock()
	defer a.mu.Unlock()
	in := a.instances[name]
	if in == nil || d.Version == "" && d.Problem == "" {
		return
	}
	key := d.Secret + "\n" + d.Path // one secret may be delivered to several places
	old, known := in.certs[key]
	c := node.Certificate{Secret: d.Secret, Version: d.Version, Path: d.Path, Since: d.Since, Problem: d.Problem}
	if old == c || !known && len(in.certs) >= maxCertificate {
		return
	}
	in.certs[key] = c
	if c.Problem == "" { // what stood in the way of the secret is over
		delete(in.certs, d.Secret+"\n")
		in.certs[key] = c
	}
	signal(a.news)
	if c.Version != "" && filepath.IsAbs(c.Path) && !slices.Contains(a.links, c.Path) {
		a.links = append(a.links, c.Path)
		if err := a.keepLinks(); err != nil {
			a.cfg.Log.Error("delivered certificates could not be remembered", "error", err)
		}
	}
}

// keepLinks writes delivered.json; a.mu is held.
func (a *Agent) keepLinks() error {
	text, err := json.Marshal(a.links)
	if err != nil {
		return err
	}
	return writeFile("delivered certificates", a.statePath(deliveredFile), text, 0o600)
}

// loadLinks reads delivered.json.
func (a *Agent) loadLinks() error {
	text, err := readIfThere(a.statePath(deliveredFile))
	if err != nil || text == nil {
		return err
	}
	if err := json.Unmarshal(text, &a.links); err != nil {
		a.cfg.Log.Warn("the list of delivered certificates is not usable", "error", err)
	}
	return nil
}

// wipe removes every certificate that was delivered here: the links and the
// files of all their versions, and folders that are empty then.
func (a *Agent) wipe() error {
	a.mu.Lock()
	links := slices.Clone(a.links)
	a.mu.Unlock()
	var errs []error
	for _, link := range links {
		errs = append(errs, effect.Do("remove delivered certificate", func() error { return removeDelivered(link) }))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.links = nil
	return a.keepLinks()
}

// removeDelivered removes a link and the files of its versions: those beside
// it whose names are its target's name with another version. The link goes
// last, so that a crash leaves something to start from.
func removeDelivered(link string) error {
	dir := filepath.Dir(link)
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	name := filepath.Base(link)
	target, err := root.Readlink(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && filepath.Dir(filepath.Join("/", target)) != "" {
		stem := certificateStem(filepath.Base(target))
		entries, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Type().IsRegular() && stem != "" && certificateStem(e.Name()) == stem {
				if err := root.Remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
		}
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_ = os.Remove(dir) // only if it is empty
	return nil
}

// certificateStem is what the files of all versions of a certificate begin
// with: VAULT.NAME of VAULT.NAME.VERSION[.NUMBER.NUMBER.PEM]. "" for other names.
func certificateStem(file string) string {
	parts := strings.Split(file, ".")
	for i := len(parts) - 1; i > 0; i-- {
		if len(parts[i]) == 32 && strings.Trim(strings.ToLower(parts[i]), "0123456789abcdef") == "" {
			return strings.Join(parts[:i], ".")
		}
	}
	return ""
}
