// Package apimodel reads and changes the API model (apimodel.json) of a cluster
// made by aks-engine, and the profile of certificates in it.
//
// Idea: the file belongs to another tool, which refuses a file with a member
// that it does not know. So it is never decoded and written again: the few
// fields that a rotation needs are read, and a new certificate profile takes the
// place of the old one's bytes.
//
//	text ── Parse ──> Model ── With(profile) ──> text, every other byte as it was
//	JSON ── ParseProfile ──> Profile, References ── Check ──> may be used
//
// Invariant: Model.With(Model.Profile) reads as the same model, and differs from
// the text in the value of properties.certificateProfile only. No error and no
// printed form of a Model or Profile holds a key. Check finds everything that
// is wrong with a profile before anything is touched, and says all of it at once.
//
// Consequence for the operator: after a rotation aks-engine's other commands
// (upgrade, scale) find the file as they left it, with the new certificates.
package apimodel

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/jsonstrict"
)

const (
	maxText    = 8 << 20 // bytes of a model or a profile
	maxMasters = 99      // aks-engine makes 1, 3 or 5
)

// Model is what a rotation needs of an API model. Make it with [Parse].
type Model struct {
	Location  string
	DNSPrefix string
	Masters   int // at least 1
	// FirstIP is the address of the first master; the zero Addr if the file has none.
	FirstIP netip.Addr
	// AvailabilityProfile is that of the masters: "AvailabilitySet" (also where
	// the file says nothing) or "VirtualMachineScaleSets".
	AvailabilityProfile string
	AdminUser           string // login of the Linux nodes
	AgentPools          []AgentPool
	WindowsSSH          bool // there is a Windows profile, and its nodes listen for SSH
	WindowsUser         string
	WindowsPassword     string // secret; empty: the file has none
	// Profile holds the entries that the file has as text, and only those.
	Profile Profile
	// References are the entries that the file has as the address of a secret.
	References References

	step     int    // addresses from one master to the next
	text     []byte // the whole file
	from, to int    // where the value of properties.certificateProfile is; to is 0 if it is missing
	keep     []member
	refs     map[string]jsontext.Value // the text of References
}

// AgentPool is a set of workers.
type AgentPool struct {
	Name  string
	Count int
	OS    string // "Linux" or "Windows"
}

// member is one name and value of an object.
type member struct {
	name  string
	value jsontext.Value
}

// file are the parts of an API model that are read.
type file struct {
	Location   string `json:"location"`
	Properties *struct {
		Orchestrator struct {
			Type string `json:"orchestratorType"`
		} `json:"orchestratorProfile"`
		Master *struct {
			Count        int    `json:"count"`
			DNSPrefix    string `json:"dnsPrefix"`
			FirstIP      string `json:"firstConsecutiveStaticIP"`
			Addresses    int    `json:"ipAddressCount"`
			Availability string `json:"availabilityProfile"`
		} `json:"masterProfile"`
		Pools []struct {
			Name  string `json:"name"`
			Count int    `json:"count"`
			OS    string `json:"osType"`
		} `json:"agentPoolProfiles"`
		Linux struct {
			AdminUser string `json:"adminUsername"`
		} `json:"linuxProfile"`
		Windows *struct {
			AdminUser string `json:"adminUsername"`
			Password  string `json:"adminPassword"`
			SSH       *bool  `json:"sshEnabled"`
		} `json:"windowsProfile"`
	} `json:"properties"`
}

// Parse reads an API model. Members that it does not know are none of its
// business. The text is kept, and must not be changed afterwards.
func Parse(text []byte) (*Model, error) {
	var f file
	body, err := bodyOf(text)
	if err == nil {
		err = jsonstrict.DecodeLoose(body, &f)
	}
	if err != nil {
		return nil, named(err, "APIModelNotReadable", "API model")
	}
	m, err := f.model()
	if err != nil {
		return nil, err
	}
	m.text = text
	from, to, err := span(body, "properties", "certificateProfile")
	if err != nil {
		return nil, named(err, "APIModelNotReadable", "API model")
	}
	if to == 0 {
		m.Profile, m.References = Profile{}, References{}
		return m, nil
	}
	r := reading{at: "properties.certificateProfile.", lenient: true}
	if err := r.object(body[from:to]); err != nil {
		return nil, err
	}
	m.Profile, m.References, m.keep, m.refs = r.profile, r.references, r.unknown, r.raw
	offset := len(text) - len(body)
	m.from, m.to = offset+from, offset+to
	return m, nil
}

// model checks what was read.
func (f file) model() (*Model, error) {
	if f.Properties == nil {
		return nil, bad("properties", "it has no properties").
			WithFix("give the apimodel.json that aks-engine wrote, for instance _output/DNSPREFIX/apimodel.json")
	}
	p := f.Properties
	if t := p.Orchestrator.Type; t != "" && !strings.EqualFold(t, "Kubernetes") {
		return nil, bad("properties.orchestratorProfile.orchestratorType", "it is of a cluster of type %q", clip(t)).
			WithFix("only clusters of type Kubernetes have certificates to rotate")
	}
	if p.Master == nil {
		return nil, bad("properties.masterProfile", "it names no masters").
			WithFix("give the apimodel.json of a cluster with masters of its own")
	}
	if n := p.Master.Count; n < 1 || n > maxMasters {
		return nil, bad("properties.masterProfile.count", "it has %d masters", n).WithFix("aks-engine makes 1, 3 or 5: correct the count")
	}
	m := &Model{
		Location: f.Location, DNSPrefix: p.Master.DNSPrefix, Masters: p.Master.Count,
		AvailabilityProfile: p.Master.Availability, AdminUser: p.Linux.AdminUser, step: 1,
	}
	if m.AvailabilityProfile == "" {
		m.AvailabilityProfile = "AvailabilitySet"
	}
	if m.AvailabilityProfile == "VirtualMachineScaleSets" && p.Master.Addresses > 1 {
		m.step = min(p.Master.Addresses, 256) // each instance of a scale set takes the addresses of its pods, too
	}
	if s := p.Master.FirstIP; s != "" {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return nil, bad("properties.masterProfile.firstConsecutiveStaticIP", "%q is not an IP address", clip(s)).
				WithFix("write the address of the first master, for instance 10.240.255.5")
		}
		m.FirstIP = ip
	}
	for _, pool := range p.Pools {
		if pool.OS == "" {
			pool.OS = "Linux"
		}
		m.AgentPools = append(m.AgentPools, AgentPool(pool))
	}
	if w := p.Windows; w != nil {
		m.WindowsUser, m.WindowsPassword, m.WindowsSSH = w.AdminUser, w.Password, w.SSH == nil || *w.SSH
	}
	return m, nil
}

// MasterAddresses are the addresses of the masters, in order; none if the file
// does not name the first.
func (m *Model) MasterAddresses() []string {
	var all []string
	for ip := m.FirstIP; ip.IsValid() && len(all) < m.Masters; {
		all = append(all, ip.String())
		for range m.step {
			ip = ip.Next()
		}
	}
	return all
}

// Format writes what the model is about, for every verb, and never a key.
func (m Model) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "API model of %s in %s, %d masters, %v", m.DNSPrefix, m.Location, m.Masters, m.Profile)
}

// bodyOf leaves out the mark that editors on Windows put first.
func bodyOf(text []byte) ([]byte, error) {
	if len(text) > maxText {
		return nil, fault.New(fault.TooLarge, "InvalidRequestContent", "The request body is %d bytes long, over %d.", len(text), maxText).
			WithFix("give the right file")
	}
	return bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")), nil
}

// named makes an error of package jsonstrict, which speaks of request bodies,
// speak of a file.
func named(err error, code, what string) error {
	var e *fault.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("reading the %s: %w", what, err)
	}
	if e.Code != "InvalidRequestContent" {
		return err
	}
	c := *e
	c.Code = code
	c.Message = strings.ReplaceAll(c.Message, "request body", what)
	c.Fix = strings.Replace(c.Fix, "the body at", "the file at", 1)
	if c.Fix == "" {
		c.Fix = "correct the file at that place, or make it again with aks-engine"
	}
	return &c
}

// bad is an error about a field of the model.
func bad(field, format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "APIModelNotUsable", "The API model cannot be used: %s.", fmt.Sprintf(format, args...)).At(field)
}

// clip shortens what a file says where a name was expected: it may be a whole key.
func clip(s string) string {
	if len(s) > 40 {
		return strings.ToValidUTF8(s[:40], "") + "…"
	}
	return s
}
