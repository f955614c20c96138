// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// sparseDelta is a full delta of a volume that has those chunks, and zeros in all others.
func sparseDelta(t *testing.T, content layer.Volume, chunkBytes, volumeBytes int64, list ...uint64) []byte {
	t.Helper()
	d, err := cow.Encode(layer.Layer{Changed: chunks.Of(list...), ChunkBytes: chunkBytes, VolumeBytes: volumeBytes, Content: content})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{New: "new", Sparse: true})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// allocated is how much room a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		t.Fatal(err)
	}
	return s.Blocks * 512
}

// What a sparse delta does not list becomes zeros, up to the volume's end and not beyond
// it, and takes no room. Its undo brings back what was there.
func TestSparse(t *testing.T) {
	const volumeBytes, past = 3<<20 + 1536, 8192
	for _, list := range [][]uint64{
		nil, {0}, {3, 4, 9}, {1, 400, 768}, slices.Collect(func(yield func(uint64) bool) {
			for c := uint64(0); c <= volumeBytes/4096 && yield(c); c += 2 {
			}
		}),
	} {
		want := make([]byte, volumeBytes+past)
		for _, c := range list {
			copy(want[c*4096:min(int(c+1)*4096, volumeBytes)], noise[c:])
		}
		delta := sparseDelta(t, bytes.NewReader(want[:volumeBytes]), 4096, volumeBytes, list...)
		for name, held := range map[string][]span{
			"empty": nil, "a little": {{5000, 5010}, {2 << 20, 2<<20 + 1}, {volumeBytes - 1, volumeBytes + past}}, "full": {{0, volumeBytes + past}},
		} {
			before := make([]byte, volumeBytes+past)
			for _, h := range held {
				copy(before[h.begin:h.end], bytes.Repeat([]byte("old "), (h.end-h.begin)/4+1))
			}
			copy(want[volumeBytes:], before[volumeBytes:])
			for _, target := range targets {
				for _, way := range ways {
					t.Run(fmt.Sprintf("%d listed/%s/%s/%s", len(list), name, target.name, way.name), func(t *testing.T) {
						file := newFile(t, "target", nil)
						must(t, os.Truncate(file, volumeBytes+past))
						f, err := os.OpenFile(file, os.O_WRONLY, 0)
						must(t, err)
						for _, h := range held {
							_, err := f.WriteAt(before[h.begin:h.end], int64(h.begin))
							must(t, err)
						}
						must(t, f.Close())
						path, dir := target.of(t, file), t.TempDir()
						result, err := way.apply(dir, delta, path)
						must(t, err)
						mustHold(t, path, want)
						rest := int64(volumeBytes)
						for _, c := range list {
							rest -= int64(min((c+1)*4096, volumeBytes) - c*4096)
						}
						if result.RestBytes != rest {
							t.Errorf("rest %d, want %d", result.RestBytes, rest)
						}
						switch {
						case name == "empty" && result.ZeroedBytes > 0:
							t.Errorf("zeroed %d", result.ZeroedBytes)
						case name == "full" && result.ZeroedBytes != rest:
							t.Errorf("zeroed %d of %d", result.ZeroedBytes, rest)
						}
						if room := int64(len(list)+16) * 4096; len(list) < 10 && allocated(t, file) > room {
							t.Errorf("it takes %d bytes, and %d at most are needed", allocated(t, file), room)
						}
						if way.name != "file" || len(list) > 10 {
							return
						}
						undo := filepath.Join(dir, "undo")
						must(t, os.RemoveAll(filepath.Join(dir, "state")))
						o := apply.Options{StateDir: filepath.Join(dir, "state"), Undo: undo}
						writeTo(t, path, before)
						dry := o
						dry.DryRun = true
						would, err := apply.File(context.Background(), filepath.Join(dir, "delta"), path, dry)
						must(t, err)
						if would.RestBytes != rest || (would.ZeroedBytes > 0) != (name != "empty" && rest > 0) {
							t.Errorf("dry run: %+v", would)
						}
						_, err = apply.File(context.Background(), filepath.Join(dir, "delta"), path, o)
						must(t, err)
						mustHold(t, path, want)
						if name == "empty" && allocated(t, undo) > 64<<10 {
							t.Errorf("the undo of nothing takes %d bytes", allocated(t, undo))
						}
						o.Undo = ""
						_, err = apply.File(context.Background(), undo, path, o)
						must(t, err)
						mustHold(t, path, before)
					})
				}
			}
		}
	}
}

type span struct{ begin, end int }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writeTo writes to a file or a device.
func writeTo(t *testing.T, path string, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.Write(b)
	must(t, errors.Join(err, f.Sync(), f.Close()))
}

// A file of a TiB without anything in it costs nothing: to merge an empty volume into it,
// to save what it held, and to verify it.
func TestSparseTebibyte(t *testing.T) {
	const volumeBytes = 1 << 40
	dir := t.TempDir()
	delta := newFile(t, "delta", sparseDelta(t, bytes.NewReader(nil), 65536, volumeBytes))
	target := newFile(t, "target", nil)
	must(t, os.Truncate(target, volumeBytes))
	undo := filepath.Join(dir, "undo")
	o := apply.Options{StateDir: filepath.Join(dir, "state"), Undo: undo}
	result, err := apply.File(context.Background(), delta, target, o)
	must(t, err)
	if result.RestBytes != volumeBytes || result.ZeroedBytes != 0 || allocated(t, target) > 0 || allocated(t, undo) > 256<<10 {
		t.Errorf("%+v, allocated %d and %d", result, allocated(t, target), allocated(t, undo))
	}
	v, err := apply.VerifyFile(context.Background(), delta, target, o)
	if err != nil || v.Err() != nil || v.RestBytes != volumeBytes {
		t.Errorf("%+v, %v", v, err)
	}
	// Once more, it was merged before.
	result, err = apply.File(context.Background(), delta, target, o)
	if err != nil || result.RestBytes != volumeBytes {
		t.Errorf("again: %+v, %v", result, err)
	}

	f, err := os.OpenFile(target, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	for _, at := range []int64{7 * 65536, 8*65536 - 1, 9 * 65536, volumeBytes - 1} {
		_, err = f.WriteAt([]byte("x"), at)
		must(t, err)
	}
	v, err = apply.VerifyFile(context.Background(), delta, target, o)
	must(t, err)
	if want := []apply.ChunkRange{{FirstChunk: 7, LastChunk: 7}, {FirstChunk: 9, LastChunk: 9}, {FirstChunk: 1<<24 - 1, LastChunk: 1<<24 - 1}}; !slices.Equal(v.BadRest, want) || !errors.Is(v.Err(), cow.ErrMismatch) {
		t.Errorf("%+v, %v", v, v.Err())
	}
}

// A delta that was merged before is proved of what it does not list, too: what somebody
// wrote there is made zeros again.
func TestSparseDoneIsProved(t *testing.T) {
	content := append(bytes.Repeat([]byte("x"), 4096), make([]byte, 2<<20-4096)...)
	delta := newFile(t, "delta", sparseDelta(t, bytes.NewReader(content), 4096, 2<<20, 0))
	target := newFile(t, "target", make([]byte, 2<<20))
	o := apply.Options{StateDir: t.TempDir(), AnyBase: false}
	_, err := apply.File(context.Background(), delta, target, o)
	must(t, err)
	mustHold(t, target, content)
	// So that its times say nothing.
	var s unix.Stat_t
	must(t, unix.Stat(target, &s))
	f, err := os.OpenFile(target, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("y"), 1<<20+5)
	must(t, err)
	result, err := apply.File(context.Background(), delta, target, o)
	if err != nil || result.ZeroedBytes != 4096 {
		t.Errorf("%+v, %v", result, err)
	}
	mustHold(t, target, content)
}
