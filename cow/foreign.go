// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"bytes"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"ddsfs/cow/wayout"
)

// foreignError says what something is that is neither a delta nor a store.
type foreignError struct{ what string }

func (e *foreignError) Error() string { return "it is " + e.what }

// Is tells errors.Is that the data is at fault.
func (e *foreignError) Is(target error) bool { return target == ErrBadData }

// packed are the formats that a delta may have been packed in on its way, with the
// command that unpacks each.
var packed = []struct{ begins, what, unpack string }{
	{"\x1f\x8b", "compressed with gzip", "gzip -dc"},
	{"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc"},
	{"\xfd7zXZ\x00", "compressed with xz", "xz -dc"},
	{"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc"},
	{"BZh", "compressed with bzip2", "bzip2 -dc"},
	{"LZIP", "compressed with lzip", "lzip -dc"},
	{"\x89LZO\x00", "compressed with lzop", "lzop -dc"},
	{"age-encryption.org/", "encrypted with age", "age -d -i KEY"},
	{"-----BEGIN AGE ENCRYPTED FILE-----", "encrypted with age", "age -d -i KEY"},
	{"-----BEGIN PGP MESSAGE-----", "encrypted with gpg", "gpg -d"},
	{"Salted__", "encrypted with openssl", "openssl enc -d"},
}

// quotedBytes is how much of a text is quoted.
const quotedBytes = 60

// identify returns an error that says what begins with b, which is not empty and not
// the beginning of a store. It is nil if that is not known.
func identify(b []byte) error {
	for _, p := range packed {
		if bytes.HasPrefix(b, []byte(p.begins)) {
			return wayout.Add(&foreignError{p.what}, wayout.Unpack.Of(p.unpack))
		}
	}
	switch {
	case isOpenPGP(b):
		return wayout.Add(&foreignError{"encrypted with gpg"}, wayout.Unpack.Of("gpg -d"))
	case !isText(b):
		return nil
	case isHTML(b):
		return &foreignError{"an HTML page: a server sent it in place of the delta, and says why in it"}
	}
	line, _, _ := bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	if len(line) > quotedBytes {
		line = line[:quotedBytes]
	}
	quoted := strings.ToValidUTF8(string(line), "")
	return &foreignError{fmt.Sprintf("text that begins with %q: no delta, and no COW device: if it was sent, this is what the sender or a login script said", quoted)}
}

// isOpenPGP reports whether b begins with the packet of a session key (RFC 4880, 5.1
// and 5.3), with which everything begins that gpg encrypts.
func isOpenPGP(b []byte) bool {
	if len(b) < 4 {
		return false
	}
	switch b[0] {
	case 0x84: // for a public key; the packet's length takes one byte
		return b[2] == 3
	case 0x85: // or two
		return b[3] == 3
	case 0x8c: // for a passphrase
		return b[2] == 4
	case 0xc1, 0xc3: // the same in the new form
		return b[2] == 3 || b[2] == 4 || b[2] == 6
	}
	return false
}

// isText reports whether b is text, whose last character may be cut.
func isText(b []byte) bool {
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 {
			return !utf8.FullRune(b)
		}
		if !unicode.IsPrint(r) && !unicode.IsSpace(r) && r != '\x1b' {
			return false
		}
		b = b[n:]
	}
	return true
}

func isHTML(b []byte) bool {
	text := strings.ToLower(string(bytes.TrimSpace(b)))
	return strings.HasPrefix(text, "<!doctype html") || strings.HasPrefix(text, "<html")
}
