// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"ddsfs/cow/wayout"
)

// everyReader reads b in each way that a delta or a store is read.
func everyReader(b []byte) map[string]error {
	_, seal := Open(bytes.NewReader(b))
	_, store := ReadStore(bytes.NewReader(b), StoreOptions{})
	_, live := ReadStore(bytes.NewReader(b), StoreOptions{Live: true})
	_, piped := ReadStoreFrom(bytes.NewReader(b))
	_, decoder := NewDecoder(bytes.NewReader(b))
	_, decoderAt := decoderAt(bytes.NewReader(b))
	return map[string]error{"seal": seal, "store": store, "live": live, "piped": piped, "decoder": decoder, "decoder of a file": decoderAt}
}

// An error names what was given instead of a delta, and says what to do.
func TestForeign(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for name, c := range map[string]struct{ b, says string }{
		"empty":             {"", "nothing arrived"},
		"zeros":             {strings.Repeat("\x00", 5000), "never activated"},
		"a few zeros":       {"\x00\x00", "never activated"},
		"gzip":              {"\x1f\x8b\x08\x00\x00\x00" + long, "gzip -dc"},
		"zstd":              {"\x28\xb5\x2f\xfd\x04" + long, "compressed with zstd"},
		"no more than zstd": {"\x28\xb5\x2f\xfd", "unpack: zstd -dc"},
		"xz":                {"\xfd7zXZ\x00" + long, "xz -dc"},
		"lz4":               {"\x04\x22\x4d\x18" + long, "lz4 -dc"},
		"bzip2":             {"BZh91AY&SY" + long, "bzip2 -dc"},
		"age":               {"age-encryption.org/v1\n-> X25519 abc\n", "age -d"},
		"age, armoured":     {"-----BEGIN AGE ENCRYPTED FILE-----\n" + long, "age -d"},
		"gpg":               {"\x85\x02\x0c\x03" + long, "gpg -d"},
		"gpg, a passphrase": {"\x8c\x0d\x04\x09" + long, "gpg -d"},
		"gpg, armoured":     {"-----BEGIN PGP MESSAGE-----\n" + long, "gpg -d"},
		"html":              {"\n<!DOCTYPE HTML>\n<html>" + long, "HTML page"},
		"text":              {"Welcome to target!\nLast login" + long, `text that begins with "Welcome to target!"`},
		"a line":            {"x\n", `begins with "x"`},
		"text, cut in é":    {strings.Repeat("é", 300)[1:], "magic"},
		"a long line":       {long, `"` + strings.Repeat("x", 60) + `"`},
		"noise":             {string(randomBytes(5, 5000)), "magic"},
		"a byte of noise":   {"\x80", "magic"},
	} {
		for way, err := range everyReader([]byte(c.b)) {
			if !errors.Is(err, ErrBadData) || !strings.Contains(fmt.Sprint(err, wayout.From(err)), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s, %s: %v", name, way, err)
			}
		}
	}
	// A character that the end of what is looked at cuts is one.
	if err := identify([]byte(strings.Repeat("é", 300))[:511]); err == nil {
		t.Error("no text")
	}
}

// A failed read is not the data's fault, whatever was read before.
func TestReadErrorIsNotTheDatas(t *testing.T) {
	good := smallSealed(t)
	end := bytes.LastIndex(good, []byte(footerMagic)) + footerBytes
	for at := range end {
		broken := func() io.Reader {
			return io.MultiReader(bytes.NewReader(good[:at]), iotest.ErrReader(syscall.EIO))
		}
		d, err := NewDecoder(broken())
		if err == nil {
			_, err = decode(d, 5)
		}
		_, listErr := ReadStoreFrom(broken())
		file := &failing{volume: volume{data: good}, from: int64(at), end: int64(at) + 1, err: syscall.EIO}
		_, sealErr := Open(sized(file, int64(len(good))))
		for way, err := range map[string]error{"decoder": err, "list": listErr, "seal": sealErr} {
			if errors.Is(err, ErrBadData) || way != "seal" && !errors.Is(err, syscall.EIO) {
				t.Fatalf("%s at byte %d: %v", way, at, err)
			}
		}
	}
}
