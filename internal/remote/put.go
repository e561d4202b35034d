package remote

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// maxHeld is how much content is held in memory to be sent again.
const maxHeld = 64 << 20

// Put writes a file; see [rotation.Host]. A symbolic link at the path is replaced
// and not followed; a folder there is an error. After a lost connection the content
// is sent again from its beginning: content that is no io.Seeker is held in memory
// for that, and may have 64 MiB.
func (h *Host) Put(ctx context.Context, file string, content io.Reader, mode fs.FileMode) error {
	if !path.IsAbs(file) || path.Clean(file) != file || strings.ContainsRune(file, 0) || mode&^fs.ModePerm != 0 {
		return fault.New(fault.Invalid, "", "%q with mode %v is not a file that can be put on a machine.", file, mode)
	}
	if h.link.machine.windows {
		return fault.New(fault.Invalid, "", "%s runs Windows, where files come with scripts: %s is not put there.", h.name, file)
	}
	again, size, hash, err := measure(content)
	if err != nil {
		return fmt.Errorf("reading what becomes %s on %s: %w", file, h.name, err)
	}
	// Even a slow line has 100 KiB a second.
	limit := time.Minute + time.Duration(size/(100<<10))*time.Second
	var out *outcome
	err = persist(ctx, trials, true, func() error {
		r, err := again()
		if err != nil {
			return fmt.Errorf("reading it again: %w", err)
		}
		program := assign("file", file, "folder", path.Dir(file), "mode", fmt.Sprintf("%04o", mode.Perm()),
			"size", fmt.Sprint(size), "hash", hash, "new", file+".keyfleet-new."+rand.Text(),
			"limit", fmt.Sprint(seconds(limit))) + putText
		out, err = h.root(ctx, command{text: program, stdin: io.LimitReader(r, size), wait: limit + grace})
		return err
	})
	if err != nil {
		return h.failed("writing "+file, true, err)
	}
	_, err = h.result(rotation.Script{Name: "writing " + file, Timeout: limit}, out)
	return err
}

// The content is read by the length that was said before, so one that was cut short
// is noticed and thrown away. Remains of attempts that the machine itself did not
// survive go when the next one begins; they have names of their own, so an attempt
// whose connection is gone but not yet noticed cannot disturb its successor.
const putText = `set -eu
umask 077
cd /
if [ -d "$file" ] && [ ! -L "$file" ]; then
	echo "$file is a folder" >&2
	exit 1
fi
mkdir -p -- "$folder"
rm -f -- "$file".keyfleet-new.*
trap 'rm -f -- "$new"' EXIT
trap 'exit 1' HUP INT TERM
set -C
timeout -k 5 "$limit" head -c "$size" >"$new"
set +C
got=$(sha256sum <"$new")
if [ "${got%% *}" != "$hash" ]; then
	echo "$(wc -c <"$new") of $size bytes arrived, or not the right ones" >&2
	exit 1
fi
chown 0:0 -- "$new"
chmod "$mode" -- "$new"
sync -- "$new"
mv -f -T -- "$new" "$file"
sync -- "$folder"
`

// measure returns how to read content from its beginning, as often as it takes, its
// size and its SHA-256 in hex.
func measure(content io.Reader) (again func() (io.Reader, error), size int64, hash string, err error) {
	sum := sha256.New()
	if s, ok := content.(io.Seeker); ok {
		start, err := s.Seek(0, io.SeekCurrent)
		if err == nil { // a pipe is an *os.File, too
			if size, err = io.Copy(sum, content); err != nil {
				return nil, 0, "", err
			}
			again = func() (io.Reader, error) {
				_, err := s.Seek(start, io.SeekStart)
				return content, err
			}
			return again, size, fmt.Sprintf("%x", sum.Sum(nil)), nil
		}
	}
	held, err := io.ReadAll(io.LimitReader(content, maxHeld+1))
	if err != nil {
		return nil, 0, "", err
	}
	if len(held) > maxHeld {
		return nil, 0, "", fault.New(fault.TooLarge, "", "It is larger than %d MiB and cannot be read twice.", maxHeld>>20).
			WithFix("give a file")
	}
	again = func() (io.Reader, error) { return bytes.NewReader(held), nil }
	return again, int64(len(held)), fmt.Sprintf("%x", sha256.Sum256(held)), nil
}
