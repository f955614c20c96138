// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// thinVolume is a thin volume, data, in a pool, pool, of a volume group of its own.
type thinVolume struct{ group string }

// newThin makes a pool and a volume of these sizes, in words of lvcreate's. The extents
// of the group have 4 KiB, so that no volume needs to end where a block does.
func newThin(t *testing.T, group, poolSize, volumeSize string, options ...string) *thinVolume {
	t.Helper()
	dm.Run(t, "vgcreate", "-s", "4k", group, dm.Blank(t, 128<<20/dm.SectorSize))
	removeGroup(t, group)
	args := []string{"-y", "-T", group + "/pool", "-L", poolSize, "-V", volumeSize, "-n", "data", "--poolmetadatasize", "2M", "--poolmetadataspare", "n"}
	dm.Run(t, "lvcreate", append(args, options...)...)
	return &thinVolume{group}
}

func (v *thinVolume) lv(name string) string   { return v.group + "/" + name }
func (v *thinVolume) path(name string) string { return "/dev/" + v.lv(name) }

func (v *thinVolume) read(t *testing.T, name string) []byte {
	t.Helper()
	return dm.Read(t, v.path(name), true)
}

func (v *thinVolume) write(t *testing.T, what string, sector, count int64) {
	t.Helper()
	writeTo(t, v.path("data"), what, sector, count)
}

// discard discards a part of the volume, in KiB.
func (v *thinVolume) discard(t *testing.T, offset, length int64) {
	t.Helper()
	dm.Run(t, "blkdiscard", "-o", fmt.Sprint(offset<<10), "-l", fmt.Sprint(length<<10), v.path("data"))
}

// snapshot makes an active read-only snapshot of the volume.
func (v *thinVolume) snapshot(t *testing.T, name string) {
	t.Helper()
	dm.Run(t, "lvcreate", "-s", "-pr", "-ay", "-K", "-n", name, v.lv("data"))
}

// poolStatus is what the kernel says about the pool.
func (v *thinVolume) poolStatus(t *testing.T) []string {
	t.Helper()
	return strings.Fields(dm.Run(t, "dmsetup", "status", v.group+"-pool-tpool"))
}

// deliver makes the delta of a pair, and checks that it makes what new holds of what base
// holds.
func (v *thinVolume) deliver(t *testing.T, base, new string) (delta string) {
	t.Helper()
	return deliver(t, v.path(base), v.path(new))
}

func (v *thinVolume) delivered(t *testing.T, delta string, base []byte, new string) {
	t.Helper()
	delivered(t, delta, base, v.path(new))
}

func deliver(t *testing.T, base, new string, args ...string) (delta string) {
	t.Helper()
	delta = filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, append(append([]string{"extract"}, args...), base, new, "-o", delta)...)
	delivered(t, delta, dm.Read(t, base, true), new)
	return delta
}

// delivered checks that a delta makes what new holds of what base holds. Where new is
// larger, the target holds anything.
func delivered(t *testing.T, delta string, base []byte, new string) {
	t.Helper()
	want := dm.Read(t, new, true)
	base = append(base, bytes.Repeat([]byte("?"), max(0, len(want)-len(base)))...)
	target := file(t, base)
	dm.Ddsfs(t, "apply", "--assume-base", "--state-dir", t.TempDir(), delta, target)
	dm.Holds(t, "the target of "+new, target, want)
}

// full checks a full delta of a volume, and returns the number of its chunks.
func full(t *testing.T, path string) (chunks int) {
	t.Helper()
	delta := filepath.Join(t.TempDir(), "full")
	dm.Ddsfs(t, "extract", "--full", path, "-o", delta)
	delivered(t, delta, bytes.Repeat([]byte("?"), len(dm.Read(t, path, true))), path)
	return infoOf(t, delta).Exceptions
}

// Replication from a file system in use, which is trimmed in between: the base rotates,
// and at last the volume grows.
func TestThinRounds(t *testing.T) {
	v := newThin(t, "trounds", "48M", "24M", "-c", "64k")
	r := &rounds{group: v.group, volume: "data", base: "base", target: file(t, make([]byte, 24<<20)), dir: t.TempDir()}
	dm.Run(t, "mkfs.ext4", "-q", v.path("data"))
	dm.Run(t, "mount", "-t", "ext4", v.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
	r.work(t)
	v.snapshot(t, "base")
	full := r.delta(t, "--full", v.lv("base"))
	if n := infoOf(t, full).Exceptions; n == 0 || n > 24<<20/(64<<10)/2 {
		t.Errorf("%d chunks of a volume that is mostly empty", n)
	}
	dm.Ddsfs(t, "apply", full, r.target)
	dm.Holds(t, "the target after the first sync", r.target, v.read(t, "base"))
	for range 2 {
		r.work(t)
		dm.Run(t, "fstrim", r.dir)
		v.snapshot(t, "new")
		dm.Ddsfs(t, "apply", r.delta(t, v.lv("base"), v.lv("new")), r.target)
		r.rotate(t)
	}

	dm.Run(t, "lvextend", "-L", "+4100k", v.lv("data"))
	v.write(t, "grown", 28<<20/dm.SectorSize-64, 64)
	r.work(t)
	v.snapshot(t, "new")
	delta := filepath.Join(t.TempDir(), "delta")
	_, warning, code := dm.Try(t, nil, "extract", v.lv("base"), v.lv("new"), "-o", delta)
	if code != 0 || !strings.Contains(warning, "grew from 25165824 to 29364224 bytes") {
		t.Errorf("an extended volume: exit code %d, %q", code, warning)
	}
	dm.Fails(t, nil, 3, []string{r.target, "29364224", "extend it first"}, "apply", delta, r.target)
	if err := os.Truncate(r.target, 29364224); err != nil {
		t.Fatal(err)
	}
	dm.Ddsfs(t, "apply", delta, r.target)
	r.rotate(t)
}

// Where a volume with an external origin maps nothing, it shows the origin.
func TestThinExternal(t *testing.T) {
	v := newThin(t, "text", "33M", "4M", "-c", "192k")
	for _, name := range []string{"one", "two"} {
		dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "4M", "-n", name, v.group)
		writeTo(t, v.path(name), name, 0, 4<<20/dm.SectorSize)
		dm.Run(t, "lvchange", "-pr", "-an", v.lv(name))
		dm.Run(t, "lvcreate", "-s", "--thinpool", v.lv("pool"), "-n", "of-"+name, v.lv(name))
	}
	write := func(what string, sector int64) { writeTo(t, v.path("of-one"), what, sector, 8) }
	snapshot := func(name, of string) { dm.Run(t, "lvcreate", "-s", "-pr", "-ay", "-K", "-n", name, v.lv(of)) }
	write("base", 16)
	write("base", 8*384)
	write("base", 12*384)
	snapshot("base", "of-one")
	write("new", 24)
	write("new", 4*384)
	dm.Run(t, "blkdiscard", "-o", fmt.Sprint(8*192<<10), "-l", fmt.Sprint(2*192<<10), v.path("of-one"))
	snapshot("new", "of-one")
	if new := v.read(t, "new"); bytes.Equal(new[8*192<<10:][:4096], v.read(t, "base")[8*192<<10:][:4096]) || !bytes.HasPrefix(new[8*192<<10:], []byte("one")) {
		t.Errorf("a precondition: a discard shows the origin again, and not %.16q", new[8*192<<10:])
	}
	delta := v.deliver(t, "base", "new")
	if n := infoOf(t, delta).Exceptions; n < 3*3 || n > 4*3 {
		t.Errorf("%d chunks", n)
	}
	if n := full(t, v.path("new")); n != 64 {
		t.Errorf("a full delta has %d chunks, want all 64", n)
	}
	snapshot("other", "of-two")
	failsBoth(t, []string{"text-other", "text-new", "different external origins"}, v.lv("other"), v.lv("new"))
	failsBoth(t, []string{"text-of--one", "the volume itself"}, v.lv("base"), v.lv("of-one"))
	failsBoth(t, []string{"text-of--one", "can be written to"}, v.lv("of-one"), v.lv("new"))
}

// deltaInfo is what ddsfs info says of a delta.
type deltaInfo struct {
	Exceptions        int
	Base, New, Origin string
}

func infoOf(t *testing.T, delta string) (i deltaInfo) {
	t.Helper()
	if err := json.Unmarshal([]byte(dm.Ddsfs(t, "info", "--json", delta)), &i); err != nil {
		t.Fatal(err)
	}
	return i
}
