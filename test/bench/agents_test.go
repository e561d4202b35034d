//go:build bench

package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"keyfleet.dev/keyfleet/api/node"
)

// agent is a simulated node: the network side of keyfleet-agent and of the Key
// Vault extension in one, without processes. It enrols with a join token, holds
// a watch, fetches the goal state on "rev", fetches the observed secret with a
// token of its pool's identity, writes a file and flips a link.
type agent struct {
	sys    *bench
	dir    string
	id     string
	tls    *tls.Config
	client *http.Client // to the node host, with the certificate
	watch  net.Conn

	token   string
	hint    string
	flipped func(version string, at time.Time)
}

func (b *bench) newAgent(n int) (*agent, error) {
	a := &agent{sys: b, dir: filepath.Join(b.tmp, fmt.Sprintf("agent-%d", n))}
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return nil, err
	}
	return a, a.enrol()
}

func (a *agent) nodeURL(path string) string { return a.sys.Client.Endpoints().Node + path }

// transport dials the server for every name, with the agent's own certificate.
func (a *agent) transport(config *tls.Config) *http.Transport {
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"}
	return &http.Transport{TLSClientConfig: config, DialContext: a.sys.Client.DialContext, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute}
}

func (a *agent) enrol() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	var tok struct{ Token string }
	if err := a.sys.Client.Call(a.sys.ctx, post(a.sys.Client.ARM("/keyfleet/v1/jointokens"), map[string]any{"pool": a.sys.pool}), &tok); err != nil {
		return err
	}
	open := &http.Client{Transport: a.transport(a.sys.Client.TLSConfig())}
	defer open.CloseIdleConnections()
	body, err := json.Marshal(node.EnrolRequest{
		Token: tok.Token, Hostname: "sim", OS: "linux", Agent: "sim", CSR: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
	})
	if err != nil {
		return err
	}
	var answer node.EnrolResponse
	for { // enrolments are admitted at a rate
		resp, err := open.Post(a.nodeURL("/v1/enrol"), "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if resp.StatusCode == http.StatusTooManyRequests {
			time.Sleep(200 * time.Millisecond)
			continue
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("enrol: %s: %s", resp.Status, text)
		}
		if err := json.Unmarshal(text, &answer); err != nil {
			return err
		}
		break
	}
	a.id = answer.Node
	a.tls = a.sys.Client.TLSConfig().Clone()
	var chain [][]byte
	for rest := []byte(answer.Certificate); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		chain = append(chain, block.Bytes)
	}
	a.tls.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
	a.client = &http.Client{Transport: a.transport(a.tls), Timeout: 30 * time.Second}
	return nil
}

// hold opens the watch and follows it until the connection ends. ready is
// called when the watch is there.
func (a *agent) hold(ready func()) error {
	host := strings.TrimPrefix(a.sys.Client.Endpoints().Node, "https://")
	name, _, _ := strings.Cut(host, ":")
	config := a.tls.Clone()
	config.ServerName, config.NextProtos = name, []string{"http/1.1"}
	for {
		raw, err := a.sys.Client.DialContext(a.sys.ctx, "tcp", host)
		if err != nil {
			return err
		}
		conn := tls.Client(raw, config)
		if _, err := fmt.Fprintf(conn, "GET /v1/watch HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
			return err
		}
		r := bufio.NewReaderSize(conn, 512)
		status, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.Contains(status, " 429 ") {
			conn.Close()
			time.Sleep(300 * time.Millisecond)
			continue
		}
		if !strings.Contains(status, " 200 ") {
			return fmt.Errorf("watch: %s", status)
		}
		a.watch = conn
		ready()
		return a.follow(r)
	}
}

func (a *agent) follow(r *bufio.Reader) error {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil // closed at the end
		}
		if strings.HasPrefix(line, "rev ") && a.flipped != nil {
			if err := a.fetch(); err != nil {
				return err
			}
		}
	}
}

// fetch is what a node does when its goal state has changed.
func (a *agent) fetch() error {
	var goal node.GoalState
	if err := a.get(a.nodeURL("/v1/goal"), "", &goal); err != nil {
		return err
	}
	if len(goal.Extensions) == 0 || goal.Extensions[0].Hint == a.hint {
		return nil
	}
	a.hint = goal.Extensions[0].Hint
	if a.token == "" {
		body, err := json.Marshal(node.TokenRequest{Resource: "https://" + a.sys.Client.Endpoints().VaultSuffix})
		if err != nil {
			return err
		}
		var tok node.TokenResponse
		resp, err := a.client.Post(a.nodeURL("/v1/token"), "application/json", bytes.NewReader(body))
		if err != nil {
			return err
		}
		if err := decodeAnswer(resp, &tok); err != nil {
			return err
		}
		a.token = tok.AccessToken
	}
	var secret struct{ ID, Value string }
	if err := a.get(a.sys.Client.Vault(vaultName, "/secrets/web?api-version=7.4"), a.token, &secret); err != nil {
		return err
	}
	version := secret.ID[strings.LastIndexByte(secret.ID, '/')+1:]
	file := filepath.Join(a.dir, version)
	if err := os.WriteFile(file+".tmp", []byte(secret.Value), 0o600); err != nil {
		return err
	}
	if err := os.Rename(file+".tmp", file); err != nil {
		return err
	}
	if err := os.Symlink(file, filepath.Join(a.dir, "new")); err != nil && !os.IsExist(err) {
		return err
	}
	if err := os.Rename(filepath.Join(a.dir, "new"), filepath.Join(a.dir, "web")); err != nil {
		return err
	}
	a.flipped(version, time.Now())
	return nil
}

func (a *agent) get(url, token string, out any) error {
	req, err := http.NewRequestWithContext(a.sys.ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	return decodeAnswer(resp, out)
}

func decodeAnswer(resp *http.Response, out any) error {
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	return json.Unmarshal(text, out)
}

// flips collects when each agent had each version.
type flips struct {
	mu   sync.Mutex
	last map[string]time.Time // version -> the last flip so far
	n    map[string]int
}

func newFlips() *flips { return &flips{last: map[string]time.Time{}, n: map[string]int{}} }

func (f *flips) note(version string, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n[version]++
	if at.After(f.last[version]) {
		f.last[version] = at
	}
}

func (f *flips) wait(ctx context.Context, version string, n int) (time.Time, error) {
	for {
		f.mu.Lock()
		have, last := f.n[version], f.last[version]
		f.mu.Unlock()
		if have >= n {
			return last, nil
		}
		select {
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("%d of %d agents have version %s: %w", have, n, version, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}
