// SPDX-License-Identifier: GPL-2.0-or-later

package apply

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"
)

// A target is held in the state that is recorded, and no merge gets it meanwhile.
func TestHold(t *testing.T) {
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	r.mustApply(r.Delta, "")
	image, held, err := Hold(r.Target, "", r.options(""))
	must(t, err)
	got := make([]byte, len(r.After))
	must(t, layer.ReadFull(image.Volume, got, 0))
	if image.State != "new" || image.Volume.Size() != int64(len(r.After)) || !bytes.Equal(got, r.After) {
		t.Errorf("%s of %d bytes, equal %v", image.State, image.Volume.Size(), bytes.Equal(got, r.After))
	}
	if _, _, err := Hold(r.Target, "", r.options("")); !isRefused(err) {
		t.Errorf("it is held twice: %v", err)
	}
	must(t, held.Close())
	if _, held, err = Hold(r.Target, "new", r.options("")); err != nil {
		t.Fatalf("when it was let go: %v", err)
	}
	must(t, held.Close())
	if !r.TargetIs(r.After) {
		t.Error("it was written to")
	}
}

func isRefused(err error) bool {
	_, ok := errors.AsType[*RefusedError](err)
	return ok
}

// A target whose state nobody vouches for is refused, with the way out.
func TestHoldRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *rig)
		id     string
		way    wayout.Way
	}{
		"another state": {func(*rig) {}, "other", ""},
		"half merged": {func(r *rig) {
			if err := r.apply(&harness.Storage{At: 14}); err == nil {
				t.Error("merged")
			}
		}, "", wayout.MergeAgain},
		"touched": {func(r *rig) {
			f, err := os.OpenFile(r.Target, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("x"), 0)
			must(t, errors.Join(err, f.Close()))
		}, "base", ""},
		"damaged record": {func(r *rig) {
			names, err := filepath.Glob(filepath.Join(r.Dir, "state", "*.json"))
			must(t, err)
			r.Write(names[0], []byte("{"))
		}, "base", ""},
		"no record": {func(r *rig) { must(t, os.RemoveAll(filepath.Join(r.Dir, "state"))) }, "", wayout.NameImage},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rig{})
			defer os.RemoveAll(r.Dir)
			c.change(r)
			_, _, err := Hold(r.Target, c.id, r.options(""))
			if ways := wayout.From(err); !isRefused(err) || c.way != "" && !slices.Contains(ways, c.way) {
				t.Errorf("%v, ways %q", err, ways)
			}
		})
	}
	r := newRig(t, rig{})
	defer os.RemoveAll(r.Dir)
	must(t, os.RemoveAll(filepath.Join(r.Dir, "state")))
	image, held, err := Hold(r.Target, "what I say", r.options(""))
	must(t, err)
	defer held.Close()
	if image.State == "" || image.State == "what I say" {
		t.Errorf("an identity that a seal can't have is %q", image.State)
	}
}

// The holes of a file that is held are known.
func TestHoldKnowsHoles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	must(t, os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<20), 0o600))
	must(t, os.Truncate(path, 4<<20))
	image, held, err := Hold(path, "a", Options{StateDir: filepath.Join(dir, "state")})
	must(t, err)
	defer held.Close()
	volume := image.Volume.(layer.Sparse)
	if end, zeros := volume.Extent(0); end != 1<<20 || zeros {
		t.Errorf("data up to byte %d, %v", end, zeros)
	}
	if end, zeros := volume.Extent(1 << 20); end != 4<<20 || !zeros {
		t.Errorf("a hole up to byte %d, %v", end, zeros)
	}
	if got := volume.ZeroBytes(); got < 2<<20 || got > 3<<20 {
		t.Errorf("%d bytes of zeros", got)
	}
}
