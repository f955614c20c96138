// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// mapped is how many bytes of a thin volume have a block in the pool.
func (v *thinVolume) mapped(t *testing.T, name string) int64 {
	t.Helper()
	fields := strings.Fields(dm.Run(t, "dmsetup", "status", v.group+"-"+strings.ReplaceAll(name, "-", "--")))
	sectors, err := strconv.ParseInt(fields[3], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return sectors * dm.SectorSize
}

// What a sparse delta leaves out, and the zeros of a delta between two snapshots, leave
// the pool of a thin target, whatever lay there. Targets of other kinds get the same
// bytes.
func TestThinTarget(t *testing.T) {
	const size = 20 << 20
	source := newThin(t, "ttsource", "48M", "20M", "-c", "64k")
	for _, kib := range []int64{0, 3000, 7000, 15000, 20000} {
		source.write(t, "source", kib*2, 600)
	}
	source.snapshot(t, "base")
	full := filepath.Join(t.TempDir(), "full")
	dm.Ddsfs(t, "extract", "--full", source.lv("base"), "-o", full)
	source.discard(t, 2944, 1024)
	source.discard(t, 14976, 1024)
	source.write(t, "new", 9000*2, 600)
	source.snapshot(t, "new")
	delta := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", source.lv("base"), source.lv("new"), "-o", delta)
	base, new := source.read(t, "base"), source.read(t, "new")

	check := func(t *testing.T, target *thinVolume, name string, most int64) {
		path := target.path(name)
		before := target.read(t, name)
		undo, state := filepath.Join(t.TempDir(), "undo"), t.TempDir()
		apply := func(args ...string) { dm.Ddsfs(t, append([]string{"apply", "--state-dir", state}, args...)...) }
		small := func(when string, most int64) {
			if most == 0 {
				return
			}
			is := target.mapped(t, name)
			if t.Logf("%s, %d KiB are mapped", when, is>>10); is > most {
				t.Errorf("%s, %d bytes are mapped, and not %d at most", when, is, most)
			}
		}
		dm.Fails(t, nil, 3, []string{path, "zeros", "without --kernel"}, "attach", "--state-dir", state, full, path, "tttarget")
		apply("--undo", undo, full, path)
		dm.Holds(t, "the target after the first sync", path, base)
		small("after the first sync", most)
		dm.Ddsfs(t, "verify", full, path)
		apply(undo, path)
		dm.Holds(t, "the target, undone", path, before)
		apply(full, path)
		dm.Holds(t, "the target once more", path, base)
		apply("--undo", filepath.Join(t.TempDir(), "undo"), delta, path)
		dm.Holds(t, "the target after a delta", path, new)
		small("after a delta", most)
		dm.Ddsfs(t, "verify", delta, path)
	}
	for _, blockKiB := range []int64{64, 192} {
		t.Run(fmt.Sprint(blockKiB, "KiB"), func(t *testing.T) {
			target := newThin(t, "tttarget", "48M", "20M", "-c", fmt.Sprint(blockKiB, "k"))
			target.write(t, "what was there", 0, size/dm.SectorSize)
			// Five runs of 300 KiB, each in chunks of 64 KiB, and what the kernel cuts off.
			check(t, target, "data", 5*(300+64+2*blockKiB)<<10+2*2*blockKiB<<10)
		})
	}
	t.Run("external origin", func(t *testing.T) {
		target := newThin(t, "tttarget", "48M", "4M", "-c", "64k")
		dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "20M", "-n", "origin", target.group)
		writeTo(t, target.path("origin"), "origin", 0, size/2/dm.SectorSize)
		dm.Run(t, "lvchange", "-pr", "-an", target.lv("origin"))
		dm.Run(t, "lvcreate", "-s", "--thinpool", target.lv("pool"), "-n", "of-origin", target.lv("origin"))
		writeTo(t, target.path("of-origin"), "what was there", 100, 20000)
		check(t, target, "of-origin", 0)
	})
	t.Run("not thin", func(t *testing.T) {
		target := newThin(t, "tttarget", "8M", "4M", "-c", "64k")
		dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "20M", "-n", "plain", target.group)
		writeTo(t, target.path("plain"), "what was there", 100, 30000)
		if bytes.Equal(target.read(t, "plain"), base) {
			t.Error("a precondition: it holds something else")
		}
		check(t, target, "plain", 0)
	})
}

// A merge into a thin target that breaks off goes on: what it discarded is not taken for
// discards of others.
func TestThinTargetInterrupted(t *testing.T) {
	source := newThin(t, "tisource", "48M", "20M", "-c", "64k")
	source.write(t, "source", 0, 20<<20/dm.SectorSize)
	source.snapshot(t, "base")
	source.discard(t, 1024, 4096)
	source.write(t, "new", 20000, 10000)
	source.snapshot(t, "new")
	full, delta := filepath.Join(t.TempDir(), "full"), filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", "--full", source.lv("base"), "-o", full)
	dm.Ddsfs(t, "extract", source.lv("base"), source.lv("new"), "-o", delta)
	target, state := newThin(t, "titarget", "48M", "20M", "-c", "64k"), t.TempDir()
	path := target.path("data")
	dm.Ddsfs(t, "apply", "--state-dir", state, full, path)
	whole := target.mapped(t, "data")

	all, err := os.ReadFile(delta)
	if err != nil {
		t.Fatal(err)
	}
	dm.Fails(t, all[:len(all)*3/4], 4, []string{path, "HALF MERGED"}, "apply", "--stream", "--state-dir", state, "-", path)
	if is := target.mapped(t, "data"); is > whole-3<<20 {
		t.Errorf("a precondition: %d of %d bytes are mapped when the merge has broken off", is, whole)
	}
	dm.Ddsfs(t, "apply", "--state-dir", state, delta, path)
	dm.Holds(t, "the target", path, source.read(t, "new"))
}

// Where the pool does not clear new blocks, what was there before does not come into a
// target.
func TestThinTargetOfAPoolThatClearsNothing(t *testing.T) {
	source := newThin(t, "tzsource", "48M", "20M", "-c", "64k")
	for _, kib := range []int64{0, 3000, 7000, 15000, 20000} {
		source.write(t, "source", kib*2+8, 8)
	}
	source.snapshot(t, "base")
	source.write(t, "new", 9000*2, 8)
	source.snapshot(t, "new")
	full, delta := filepath.Join(t.TempDir(), "full"), filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", "--full", source.lv("base"), "-o", full)
	dm.Ddsfs(t, "extract", source.lv("base"), source.lv("new"), "-o", delta)
	target, state := newThin(t, "tztarget", "48M", "20M", "-c", "192k", "-Zn", "--discards", "nopassdown"), t.TempDir()
	path := target.path("data")
	// All of the pool holds what others wrote, as it takes blocks that were never in use first.
	dm.Run(t, "lvcreate", "-y", "-V", "48M", "-T", target.lv("pool"), "-n", "other")
	writeTo(t, target.path("other"), "of others", 0, 48<<20/dm.SectorSize)
	dm.Run(t, "lvremove", "-y", target.lv("other"))
	writeTo(t, path, "written", 0, 8)
	if !bytes.HasPrefix(target.read(t, "data")[4096:], []byte("of others")) {
		t.Error("a precondition: a new block has what was there before")
	}
	// Where the blocks of a volume below the target begin is not known.
	below := path
	var stacked []*dm.Device
	for _, name := range []string{"tzlinear", "tzabove"} {
		d := dm.Create(t, name, 20<<20/dm.SectorSize, "linear "+below+" 0")
		dm.Fails(t, nil, 3, []string{d.Path, "lies on /dev/mapper/tztarget-data", "does not clear new blocks", "lvchange -Zy"}, "apply", "--state-dir", state, full, d.Path)
		stacked, below = append(stacked, d), d.Path
	}
	for _, d := range slices.Backward(stacked) {
		d.Remove(t)
	}
	dm.Ddsfs(t, "apply", "--state-dir", state, full, path)
	dm.Holds(t, "the target after the first sync", path, source.read(t, "base"))
	if is := target.mapped(t, "data"); is > 10*192<<10 {
		t.Errorf("%d bytes are mapped", is)
	}
	dm.Fails(t, nil, 3, []string{path, "does not clear new blocks", "lvchange -Zy"}, "apply", "--state-dir", state, delta, path)
	dm.Run(t, "lvchange", "-Zy", target.lv("pool"))
	dm.Ddsfs(t, "apply", "--state-dir", state, delta, path)
	dm.Holds(t, "the target after a delta", path, source.read(t, "new"))
}
