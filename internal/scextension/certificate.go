package scextension

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"keyfleet.dev/keyfleet/internal/effect"
	"keyfleet.dev/keyfleet/internal/pki"
)

// servingCertificate is the certificate that the webhook shows the API server.
//
// It is in the Secret sc-webhook-tls, for all replicas; whoever finds it absent or
// due makes the next one, with a CA of its own whose key is thrown away. Trust goes
// before use: the Secret's ca.crt has the new CA and the one before, it is written
// into the MutatingWebhookConfiguration, and only a little later each replica shows
// the new certificate.
type servingCertificate struct {
	cluster   *Cluster
	namespace string
	hosts     []string
	now       func() time.Time
	log       *slog.Logger

	current atomic.Pointer[tls.Certificate] // that is shown; nil: there is none yet
}

const (
	servingLife  = 90 * 24 * time.Hour
	servingDue   = 66               // percent of its life after which it is renewed
	servingEvery = 10 * time.Second // between two looks
	servingGrace = 3 * time.Second  // for all API servers to learn of a new CA

	caKey = "ca.crt" // beside the keys of a Secret of the type kubernetes.io/tls
)

// run keeps the certificate as it shall be until ctx ends.
func (s *servingCertificate) run(ctx context.Context) {
	for {
		wait := servingEvery
		if err := s.look(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("the certificate of the webhook is not as it shall be; it is tried again", "error", err)
			wait = time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// look makes, renews, publishes and shows the certificate, as it is due.
func (s *servingCertificate) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	secrets := s.cluster.api.CoreV1().Secrets(s.namespace)
	secret, err := secrets.Get(ctx, webhookTLS, metav1.GetOptions{})
	absent := apierrors.IsNotFound(err)
	if err != nil && !absent {
		return fmt.Errorf("reading the Secret %s: %w", webhookTLS, err)
	}
	if absent {
		secret = &core.Secret{ObjectMeta: metav1.ObjectMeta{Name: webhookTLS, Namespace: s.namespace}, Type: core.SecretTypeTLS}
	}
	pair, usable := s.usable(secret)
	if !usable || s.now().After(pki.RenewAt(pair.Leaf.NotBefore, pair.Leaf.NotAfter, pki.Trigger{LifetimePercentage: servingDue})) {
		if err := s.renew(secret); err != nil {
			return err
		}
		err := effect.Do("write the certificate of the webhook", func() (err error) {
			if absent {
				secret, err = secrets.Create(ctx, secret, metav1.CreateOptions{FieldManager: Extension})
			} else {
				secret, err = secrets.Update(ctx, secret, metav1.UpdateOptions{FieldManager: Extension})
			}
			return err
		})
		if err != nil { // also if another replica was faster: its one counts
			return fmt.Errorf("writing the Secret %s: %w", webhookTLS, err)
		}
		if pair, usable = s.usable(secret); !usable {
			return fmt.Errorf("the Secret %s does not hold the certificate that was written", webhookTLS)
		}
		s.log.Info("the certificate of the webhook is new", "until", pair.Leaf.NotAfter)
	}
	if err := s.publish(ctx, secret.Data[caKey]); err != nil {
		return err
	}
	if shown := s.current.Load(); shown != nil && !bytes.Equal(shown.Leaf.Raw, pair.Leaf.Raw) && s.now().Before(shown.Leaf.NotAfter) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(servingGrace):
		}
	}
	s.current.Store(pair)
	return nil
}

// usable reads the certificate of a Secret; false: there is none, it has ended, is
// for other names, or its CA is not beside it.
func (s *servingCertificate) usable(secret *core.Secret) (*tls.Certificate, bool) {
	pair, err := tls.X509KeyPair(secret.Data[core.TLSCertKey], secret.Data[core.TLSPrivateKeyKey])
	if err != nil {
		return nil, false
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(secret.Data[caKey])
	for _, host := range s.hosts {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: s.now()}); err != nil {
			return nil, false
		}
	}
	return &pair, true
}

// renew puts a new certificate into the Secret, and its CA beside the one before.
func (s *servingCertificate) renew(secret *core.Secret) error {
	now := s.now()
	ca, err := pki.NewCA(webhookName, now)
	if err != nil {
		return fmt.Errorf("making a CA: %w", err)
	}
	key, err := pki.NewKey(pki.P256)
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	chain, err := ca.IssueServer(s.hosts, key.Public(), now, servingLife)
	if err != nil {
		return fmt.Errorf("making the certificate of the webhook: %w", err)
	}
	text, err := pki.EncodeKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key: %w", err)
	}
	trusted := ca.PEM()
	if before, err := pki.ParseChain(secret.Data[caKey]); err == nil && len(before) > 0 {
		trusted = slices.Concat(trusted, pki.EncodeChain(before[0].Raw))
	}
	secret.Data = map[string][]byte{core.TLSCertKey: chain, core.TLSPrivateKeyKey: text, caKey: trusted}
	return nil
}

// publish has the API servers trust the CAs.
func (s *servingCertificate) publish(ctx context.Context, trusted []byte) error {
	all := s.cluster.api.AdmissionregistrationV1().MutatingWebhookConfigurations()
	c, err := all.Get(ctx, webhookName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading the MutatingWebhookConfiguration %s: %w", webhookName, err)
	}
	changed := false
	for i := range c.Webhooks {
		if at := &c.Webhooks[i].ClientConfig; !bytes.Equal(at.CABundle, trusted) {
			at.CABundle, changed = trusted, true
		}
	}
	if !changed {
		return nil
	}
	err = effect.Do("publish the CA of the webhook", func() error {
		_, err := all.Update(ctx, c, metav1.UpdateOptions{FieldManager: Extension})
		return err
	})
	if err != nil {
		return fmt.Errorf("writing the CA into the MutatingWebhookConfiguration %s: %w", webhookName, err)
	}
	return nil
}
