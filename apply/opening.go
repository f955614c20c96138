package apply

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
)

// notOpened is the error of a target that could not be opened for a reason of its own.
func notOpened(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &absentError{path: path, err: err}
	}
	// Some drivers let nobody open it for writing, others let writes fail.
	if info, err := blockdev.Lookup(path); err == nil && info.Block && info.ReadOnly() {
		return &RefusedError{path, readOnly}
	}
	return fmt.Errorf("target: %w", err)
}

const readOnly = "it is read-only: make it writable (lvchange -prw, blockdev --setrw), or name another one"

// checkWritable refuses a block device that is read-only, also for those whose writes
// are the kernel's.
func (t *target) checkWritable() error {
	if t.info.Block && t.info.ReadOnly() {
		return t.refused(readOnly)
	}
	return nil
}

// absentError says that there is no target, and how there can be one.
type absentError struct {
	path string
	err  error
	// volumeBytes is the size that it needs, 0 if that is not known.
	volumeBytes int64
}

func (a *absentError) Unwrap() error { return a.err }

func (a *absentError) Error() string { return fmt.Sprintf("target: %v: %s", a.err, a.help()) }

func (a *absentError) help() string {
	if path, err := blockdev.Find(a.path); err == nil {
		return "name it by its path, " + path
	}
	if path, err := filepath.Abs(a.path); err == nil && strings.HasPrefix(path, "/dev/") {
		return "check its name, and that its volume is active (lvchange -ay)"
	}
	if a.volumeBytes == 0 {
		return fmt.Sprintf("make a file first, of the volume's size in bytes (blockdev --getsize64 says it): truncate -s SIZE %s", a.path)
	}
	return fmt.Sprintf("make a file of the volume's size first: truncate -s %d %s", a.volumeBytes, a.path)
}

// sizedFor adds to an error of a target that is not there the size of the volume, if
// the delta says it.
func sizedFor(in *blockdev.Device, err error) error {
	var absent *absentError
	if !errors.As(err, &absent) {
		return err
	}
	first := make([]byte, cow.SectorBytes)
	if n, err := in.ReadAt(first, 0); n == len(first) || err == io.EOF {
		if _, seal, err := cow.ParseFirst(first[:n]); err == nil && seal != nil {
			absent.volumeBytes = seal.VolumeBytes
		}
	}
	return err
}
