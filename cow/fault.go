// SPDX-License-Identifier: GPL-2.0-or-later

package cow

import (
	"errors"
	"fmt"
	"io"

	"ddsfs/cow/layer"
)

// ErrBadData says that the data is at fault: a delta or a store that is empty, cut,
// damaged or something else, or content that does not match its digests. errors.Is
// finds it in each error of this package that is about what was read, [ErrMismatch]
// among them, and in none that is about the reading, such as that of a failing disk.
var ErrBadData = errors.New("the data is at fault")

// ErrMismatch says that data does not match its digests. It is an [ErrBadData].
var ErrMismatch error = mismatch{}

type mismatch struct{}

func (mismatch) Error() string { return "does not match its digests" }

func (mismatch) Is(target error) bool { return target == ErrBadData }

// formatError says which field of an exception store is wrong, with its value
// and its offset in bytes from the start of the store.
type formatError struct {
	Field  string
	Value  uint64
	Offset int64
	Reason string
}

func (e *formatError) Error() string {
	value := fmt.Sprint(e.Value)
	if e.Field == "magic" {
		value = fmt.Sprintf("0x%08x", e.Value)
	}
	return fmt.Sprintf("exception store: %s %s at byte %d: %s", e.Field, value, e.Offset, e.Reason)
}

// Is tells errors.Is that the data is at fault.
func (e *formatError) Is(target error) bool { return target == ErrBadData }

// cutError says that a delta or a store ends too early. It is an
// io.ErrUnexpectedEOF as well.
type cutError struct {
	// EndBytes is how many bytes there are, and TotalBytes how many there must be, 0
	// if that is not known.
	EndBytes, TotalBytes int64
}

func (e *cutError) Error() string {
	switch {
	case e.EndBytes == 0:
		return "it is empty: nothing arrived: look at what the sender said"
	case e.TotalBytes == 0:
		return fmt.Sprintf("it ends after %d bytes, too early: copy it again", e.EndBytes)
	}
	return fmt.Sprintf("it ends after %d of %d bytes: copy it again", e.EndBytes, e.TotalBytes)
}

// Is makes errors.Is find both errors that it is.
func (e *cutError) Is(target error) bool {
	return target == ErrBadData || target == io.ErrUnexpectedEOF
}

// readAt fills p from v, which holds a delta or a store, or fails. There must be totalBytes
// of it, 0 if that is not known.
func readAt(v layer.Volume, totalBytes int64, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := v.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return &cutError{min(off+int64(n), v.Size()), totalBytes}
	}
	return fmt.Errorf("%d bytes at byte %d: %w", len(p), off, err)
}
