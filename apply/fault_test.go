// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// A stream that breaks off leaves the target half merged, and says both: that, and
// where it broke off.
func TestStreamThatBreaksOff(t *testing.T) {
	const volumeBytes = 4 << 20
	var all chunks.Builder
	all.AddRange(0, volumeBytes/4096)
	d, err := cow.Encode(layer.Layer{Changed: all.Set(), ChunkBytes: 4096, VolumeBytes: volumeBytes, Content: bytes.NewReader(bytes.Repeat([]byte("x"), volumeBytes))})
	must(t, err)
	s, err := cow.NewSealed(d, cow.SealOptions{New: "new"})
	must(t, err)
	good, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	must(t, err)
	half := len(good) / 2
	in := harness.Feed(t, good[:half])
	defer in.Close()
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	must(t, os.WriteFile(target, make([]byte, volumeBytes), 0o600))
	o := Options{StateDir: filepath.Join(dir, "state"), Stream: true}
	_, err = Pipe(context.Background(), in, target, o)
	if !errors.Is(err, cow.ErrBadData) || !strings.Contains(err.Error(), "HALF MERGED") ||
		!strings.Contains(err.Error(), fmt.Sprintf("it ends after %d of %d bytes: copy it again", half, len(good))) {
		t.Error(err)
	}
}

// Bytes that are no delta are refused while their sender still has much to say.
func TestForeignIsNotSpooled(t *testing.T) {
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	defer out.Close() // so it goes on
	_, err = out.Write(append([]byte("\x28\xb5\x2f\xfd"), make([]byte, cow.SectorBytes)...))
	must(t, err)
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	must(t, os.WriteFile(target, make([]byte, 4096), 0o600))
	_, err = Pipe(context.Background(), in, target, Options{StateDir: filepath.Join(dir, "state"), SpoolDir: dir})
	if !errors.Is(err, cow.ErrBadData) || !slices.Contains(wayout.From(err), wayout.Unpack.Of("zstd -dc")) {
		t.Error(err)
	}
}
