package target

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
)

// scramIterations is PostgreSQL's own default.
const scramIterations = 4096

// scramVerifier is what PostgreSQL stores of a password (RFC 5802, RFC 7677): it
// can check a login with it, and nobody can log in with it.
func scramVerifier(password Secret, salt []byte) (string, error) {
	salted, err := pbkdf2.Key(sha256.New, password.Reveal(), salt, scramIterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("deriving a SCRAM key: %w", err)
	}
	stored := sha256.Sum256(mac(salted, "Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", scramIterations, b64(salt), b64(stored[:]), b64(mac(salted, "Server Key"))), nil
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

// nativeHash is what MariaDB and MySQL store of a password with mysql_native_password.
func nativeHash(password Secret) string {
	once := sha1.Sum([]byte(password.Reveal()))
	twice := sha1.Sum(once[:])
	return "*" + strings.ToUpper(hex.EncodeToString(twice[:]))
}

// redisHash is what Redis stores of a password.
func redisHash(password Secret) string {
	sum := sha256.Sum256([]byte(password.Reveal()))
	return hex.EncodeToString(sum[:])
}

// rabbitHash is what RabbitMQ stores of a password; the salt has four bytes.
func rabbitHash(password Secret, salt []byte) string {
	sum := sha256.Sum256(append(append([]byte(nil), salt...), password.Reveal()...))
	return base64.StdEncoding.EncodeToString(append(append([]byte(nil), salt...), sum[:]...))
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
