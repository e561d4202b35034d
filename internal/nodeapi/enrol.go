package nodeapi

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/api/node"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/pki"
)

// bodyLimit is the most that enrolments, renewals and token requests may weigh.
const bodyLimit = 64 << 10

// ca answers with the CA in PEM. It is open: an agent that joins compares it
// with the hash it was given before it trusts it.
func (e *Edge) ca(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/x-pem-file")
	_, _ = w.Write(e.cfg.Authority.PEM())
}

// enrol spends a join token and answers with a certificate for the key of the CSR.
func (e *Edge) enrol(w http.ResponseWriter, r *http.Request) error {
	if !e.enrols.Allow() {
		return tooMany("Too many enrolments at once.", 10)
	}
	var req node.EnrolRequest
	if err := decode(w, r, bodyLimit, &req); err != nil {
		return err
	}
	if req.Token == "" {
		return fault.New(fault.Unauthenticated, "JoinTokenMissing", "An enrolment needs a join token.").At("token").
			WithFix("make one: keyfleet node token --pool POOL")
	}
	csr, hash, err := parseCSR(req.CSR)
	if err != nil {
		return err
	}
	if err := checkTransport(req.Transport); err != nil {
		return err
	}
	id, err := e.cfg.Nodes.Enrol(r.Context(), req, hash)
	if err != nil {
		return err
	}
	if !nodeName(id) {
		return fault.New(fault.Internal, "", "").Because(errBadNodeID(id))
	}
	chain, err := e.issue(id, csr)
	if err != nil {
		return err
	}
	e.cfg.Log.Info("node enrolled", "node", id, "hostname", req.Hostname, "os", req.OS, "agent", req.Agent)
	answer(w, http.StatusOK, node.EnrolResponse{Node: id, Certificate: chain, CA: string(e.cfg.Authority.PEM())})
	return nil
}

// renew answers with the next certificate of the node that asks.
func (e *Edge) renew(w http.ResponseWriter, r *http.Request, id string) error {
	if !e.enrols.Allow() {
		return tooMany("Too many renewals at once.", 60)
	}
	var req node.RenewRequest
	if err := decode(w, r, bodyLimit, &req); err != nil {
		return err
	}
	csr, hash, err := parseCSR(req.CSR)
	if err != nil {
		return err
	}
	if err := e.cfg.Nodes.Renew(r.Context(), id, hash); err != nil {
		return err
	}
	chain, err := e.issue(id, csr)
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, node.RenewResponse{Certificate: chain, CA: string(e.cfg.Authority.PEM())})
	return nil
}

// issue signs a client certificate that names the node, for the key of csr.
func (e *Edge) issue(id string, csr *x509.CertificateRequest) (string, error) {
	uri := &url.URL{Scheme: "keyfleet", Host: "node", Path: "/" + id}
	chain, err := e.cfg.Authority.IssueClient(id, []*url.URL{uri}, csr, e.cfg.Now(), e.cfg.Life)
	return string(chain), err
}

// parseCSR checks a CSR: signed with its own key, which is an EC key. Its
// subject and extensions are ignored; the server names the node. It also
// returns the hex SHA-256 of the public key.
func parseCSR(text string) (*x509.CertificateRequest, string, error) {
	csr, err := pki.ParseCSR([]byte(text))
	if err != nil {
		return nil, "", fault.New(fault.Invalid, "InvalidCSR", "The CSR is not usable: %s.", err).At("csr")
	}
	if _, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok {
		return nil, "", fault.New(fault.Invalid, "InvalidCSR", "The CSR's key must be an EC key of curve P-256, P-384 or P-521.").At("csr")
	}
	sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	return csr, hex.EncodeToString(sum[:]), nil
}

// checkTransport checks the certificate that protected settings are encrypted to; it may be absent.
func checkTransport(text string) error {
	if text == "" {
		return nil
	}
	bad := fault.New(fault.Invalid, "InvalidTransportCertificate",
		"The transport certificate must be one PEM certificate with an RSA key of 2048 to 8192 bits.").At("transport")
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || strings.TrimSpace(string(rest)) != "" {
		return bad
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return bad
	}
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < 2048 || key.N.BitLen() > 8192 {
		return bad
	}
	return nil
}

// tooMany asks the caller to come back within the next seconds; the time is
// drawn at random, so that callers refused together do not return together.
func tooMany(message string, within int) error {
	wait := time.Duration(1+rand.IntN(within)) * time.Second
	return fault.New(fault.TooMany, "TooManyRequests", "%s", message).After(wait).WithFix("try again in %s", wait)
}

// errBadNodeID is the cause when a capability hands out an id that cannot stand in a certificate.
type errBadNodeID string

func (e errBadNodeID) Error() string { return "enrolment gave the unusable node id " + string(e) }
