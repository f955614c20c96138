// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/testdata/lab/dm"
)

// openCount is how often a mapped device is open.
func openCount(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(dm.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "open", name))
}

// While a pair is mounted, all but NEW can be removed, snapshots are made, and the pool
// may run out of space. What only BASE maps is a hole of the delta.
func TestThinMounted(t *testing.T) {
	v := newThin(t, "tmounted", "9M", "16M", "-c", "64k", "--errorwhenfull", "y")
	const mib = 1 << 20 / dm.SectorSize
	v.write(t, "base", 0, 4*mib)
	v.write(t, "base", 6*mib, 2*mib)
	v.snapshot(t, "base")
	v.write(t, "new", 4*mib, 256)
	v.discard(t, 1<<10, 3<<10)
	v.snapshot(t, "new")
	base := v.read(t, "base")
	tmeta := openCount(t, "tmounted-pool_tmeta")

	m := &mounted{dir: t.TempDir()}
	dm.Ddsfs(t, "mount", v.lv("base"), v.lv("new"), m.dir)
	if now := openCount(t, "tmounted-pool_tmeta"); now != tmeta {
		t.Errorf("the pool's metadata is open %s times, before it was %s", now, tmeta)
	}
	v.write(t, "later", 4*mib, 8)
	v.snapshot(t, "next")
	copied := filepath.Join(t.TempDir(), "copy")
	dm.Run(t, "cp", m.delta(), copied)
	const metadata, zeros = 2 * 64 << 10, 48 * 64 << 10
	wantHole(t, m.delta(), metadata, metadata+zeros)
	wantHole(t, copied, metadata, metadata+zeros)
	fi, err := os.Stat(copied)
	if err != nil {
		t.Fatal(err)
	}
	if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > fi.Size()-zeros {
		t.Errorf("the copy of %d bytes takes %d", fi.Size(), used)
	}
	extracted := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", v.lv("base"), v.lv("new"), "-o", extracted)
	wantHole(t, extracted, metadata, metadata+zeros)
	dm.Run(t, "lvremove", "-f", v.lv("base"))
	_, complaint, code := shell(t, "lvremove -f "+v.lv("new"))
	if code == 0 || !strings.Contains(complaint, "in use") {
		t.Errorf("lvremove of NEW: exit code %d, %q", code, complaint)
	}
	dm.Equal(t, "the delta without its base", dm.Read(t, m.delta(), false), dm.Read(t, copied, false))
	v.delivered(t, copied, base, "new")

	// Another pair, as the first one's pages are in the page cache by now.
	dm.Ddsfs(t, "unmount", m.dir)
	new := v.read(t, "new")
	dm.Ddsfs(t, "mount", v.lv("new"), v.lv("next"), m.dir)
	file, err := os.OpenFile(v.path("data"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt(dm.Fill("too much", 8*mib, 8*mib), 8<<20)
	if err = errors.Join(err, file.Sync()); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		t.Errorf("a precondition: a write to a pool without space: %v", err)
	}
	file.Close() // the write has failed
	if status := v.poolStatus(t); status[7] != "out_of_data_space" {
		t.Errorf("a precondition: the pool is %q", status)
	}
	v.delivered(t, m.delta(), new, "next")
	dm.Ddsfs(t, "unmount", m.dir)
	out := filepath.Join(t.TempDir(), "delta")
	_, warning, code := dm.Try(t, nil, "extract", v.lv("new"), v.lv("next"), "-o", out)
	if code != 0 || !strings.Contains(warning, "out of data space") {
		t.Errorf("a pool without space: exit code %d, %q", code, warning)
	}
	v.delivered(t, out, new, "next")
}

// wantHole checks that a file has a hole there.
func wantHole(t *testing.T, path string, first, end int64) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// A hole may begin before it, and go on after it.
	hole, err := file.Seek(first, unix.SEEK_HOLE)
	if err != nil || hole != first {
		t.Errorf("%s: the hole is at %d, %v; want %d", path, hole, err, first)
	}
	data, err := file.Seek(first, unix.SEEK_DATA)
	if err != nil || data < end {
		t.Errorf("%s: the data is at %d, %v; want %d", path, data, err, end)
	}
}

// What makes no pair is refused with the reason; what is only odd is warned of, and its
// delta is right.
func TestThinChecks(t *testing.T) {
	v := newThin(t, "tchecks", "24M", "4M", "-c", "64k")
	lvcreate := func(args ...string) { dm.Run(t, "lvcreate", append(args, "-y")...) }
	v.write(t, "base", 0, 2048)
	v.snapshot(t, "base")
	v.write(t, "new", 512, 64)
	lvcreate("-s", "-pr", "-n", "idle", v.lv("data"))
	v.snapshot(t, "new")
	lvcreate("-s", "-ay", "-K", "-n", "rw", v.lv("data"))
	base, new := v.read(t, "base"), v.read(t, "new")
	out := filepath.Join(t.TempDir(), "delta")
	fails := func(t *testing.T, words []string, pair ...string) {
		t.Helper()
		dm.Fails(t, nil, 1, words, append([]string{"extract", "-o", filepath.Join(t.TempDir(), "none")}, pair...)...)
	}
	// The volume that a delta was taken from does not take it, nor do its snapshots.
	refused := func(t *testing.T, names ...string) {
		t.Helper()
		for _, name := range names {
			before := v.read(t, name)
			dm.Fails(t, nil, 3, []string{"tchecks-" + name, "refused"}, "apply", "--assume-base", "--state-dir", t.TempDir(), out, "/dev/mapper/tchecks-"+name)
			dm.Holds(t, "the refused target", v.path(name), before)
		}
	}

	t.Run("names and identities", func(t *testing.T) {
		var want []byte
		for _, pair := range [][2]string{
			{v.lv("base"), v.path("new")},
			{"/dev/mapper/tchecks-base", lvUUID(t, v.lv("new"))},
			{lvUUID(t, v.lv("base")), dmNode(t, "tchecks-new")},
		} {
			dm.Ddsfs(t, "extract", pair[0], pair[1], "-o", out)
			delta := dm.Read(t, out, false)
			if want == nil {
				want = delta
				v.delivered(t, out, base, "new")
			}
			dm.Equal(t, pair[0]+" "+pair[1], delta, want)
		}
		i := infoOf(t, out)
		for got, name := range map[string]string{i.Base: "base", i.New: "new", i.Origin: "data"} {
			if want := mapperUUID(t, "tchecks-"+name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		refused(t, "data", "base", "new", "rw")
		dm.Fails(t, nil, 1, []string{v.path("new"), "what the delta is made of"}, "extract", v.lv("base"), v.lv("new"), "-o", v.path("new"))
		dm.Fails(t, nil, 1, []string{"tchecks-new", "thin volume"}, "info", v.lv("new"))

		dm.Run(t, "lvchange", "-an", v.lv("base"))
		for _, name := range []string{v.lv("base"), "/dev/mapper/tchecks-base", lvUUID(t, v.lv("base"))} {
			dm.Ddsfs(t, "extract", name, v.lv("new"), "-o", out)
			dm.Equal(t, "of a base that is not active", dm.Read(t, out, false), want)
		}
		fails(t, []string{"tchecks/base", "not active", "base check", "lvchange -ay -K tchecks/base"}, "--base-check", v.lv("base"), v.lv("new"))
		dm.Run(t, "lvchange", "-ay", "-K", v.lv("base"))
	})
	t.Run("not active", func(t *testing.T) {
		failsBoth(t, []string{"source", "tchecks/idle is not active", "lvchange -ay -K tchecks/idle"}, v.lv("base"), v.lv("idle"))
		fails(t, []string{"tchecks/idle is not active"}, "--full", v.lv("idle"))
	})
	t.Run("no pair", func(t *testing.T) {
		lvcreate("-T", "tchecks/second", "-L", "4M", "-V", "4M", "-n", "elsewhere", "--poolmetadatasize", "2M", "--poolmetadataspare", "n")
		lvcreate("-Zn", "-L", "4M", "-n", "classic", "tchecks")
		lvcreate("-s", "-L", "4M", "-n", "of-classic", "tchecks/classic")
		fails(t, []string{"tchecks-elsewhere", "tchecks-new", "different thin pools"}, v.lv("elsewhere"), v.lv("new"))
		fails(t, []string{"tchecks-new is a thin volume", "of-classic is not"}, v.lv("of-classic"), v.lv("new"))
		fails(t, []string{"base /dev/mapper/tchecks-base is a thin volume", "of--classic is not"}, v.lv("base"), v.lv("of-classic"))
		fails(t, []string{"base and new are the same"}, v.lv("new"), v.path("new"))
		fails(t, []string{"tchecks-data", "can be written to, and no snapshot"}, v.lv("data"), v.lv("new"))
		failsBoth(t, []string{"wrong order", "tchecks-base was made before base /dev/mapper/tchecks-new", "--new-was-written"}, v.lv("new"), v.lv("base"))
		fails(t, []string{"tchecks-data", "the volume itself", "--allow-live-origin"}, v.lv("base"), v.lv("data"))
	})
	warns := func(t *testing.T, words string, args ...string) {
		t.Helper()
		_, warning, code := dm.Try(t, nil, append([]string{"extract", "-o", out}, args...)...)
		if code != 0 || !strings.Contains(warning, words) {
			t.Errorf("%q: exit code %d, %q, want %q", args, code, warning, words)
		}
	}
	t.Run("the older one", func(t *testing.T) {
		warns(t, "tchecks-base was made before base", "--new-was-written", v.lv("new"), v.lv("base"))
		v.delivered(t, out, new, "base")
	})
	t.Run("the volume itself", func(t *testing.T) {
		warns(t, "can be written to", "--allow-live-origin", v.lv("base"), v.lv("data"))
		v.delivered(t, out, base, "data")
		refused(t, "data", "rw")
		warns(t, "can be written to", "--full", v.lv("data"))
		refused(t, "data", "rw")
		if i := infoOf(t, out); i.New != "" {
			t.Errorf("what the volume holds now has the name %s", i.New)
		}
		m := t.TempDir()
		dm.Ddsfs(t, "mount", "--allow-live-origin", v.lv("base"), v.lv("data"), m)
		v.write(t, "later", 4096, 8)
		dm.Fails(t, nil, 1, []string{"input/output error"}, "verify", filepath.Join(m, "delta.cow"))
		dm.Ddsfs(t, "unmount", m)
	})
	t.Run("written to", func(t *testing.T) {
		warns(t, "tchecks-rw can be written to: make snapshots read-only", v.lv("base"), v.lv("rw"))
		v.delivered(t, out, base, "rw")
		writeTo(t, v.path("rw"), "written", 1024, 8)
		warns(t, "source /dev/mapper/tchecks-rw was written to since it was made", v.lv("base"), v.lv("rw"))
		v.delivered(t, out, base, "rw")
		rw := v.read(t, "rw")
		v.snapshot(t, "newer")
		warns(t, "base /dev/mapper/tchecks-rw was written to since it was made", v.lv("rw"), v.lv("newer"))
		v.delivered(t, out, rw, "newer")
	})
	t.Run("of another volume", func(t *testing.T) {
		lvcreate("-V", "4M", "-T", v.lv("pool"), "-n", "unrelated")
		writeTo(t, v.path("unrelated"), "unrelated", 0, 1024)
		lvcreate("-s", "-pr", "-ay", "-K", "-n", "stranger", v.lv("unrelated"))
		warns(t, "have no data in common, and may be different volumes", v.lv("new"), v.lv("stranger"))
		v.delivered(t, out, new, "stranger")
	})
	t.Run("reduced", func(t *testing.T) {
		dm.Run(t, "lvreduce", "-f", "-L", "3M", v.lv("data"))
		v.snapshot(t, "smaller")
		fails(t, []string{"tchecks-smaller", "reduced"}, v.lv("base"), v.lv("smaller"))
	})
	if bytes.Equal(base, new) {
		t.Error("a precondition: the snapshots differ")
	}
}

// A target that is a thin volume, and is rolled back by a snapshot of it, is not what the
// last merge made of it.
func TestTargetThinRolledBack(t *testing.T) {
	c := newChain(t, 3)
	v := newThin(t, "troll", "24M", "6M", "-c", "64k")
	target := v.path("data")
	lvm := func(args ...string) { dm.Run(t, args[0], args[1:]...) }
	c.First(t, target)
	lvm("lvcreate", "-s", "-n", "safe", v.lv("data"))
	c.Taken(t, "a thin volume that has a snapshot", target, 1)
	lvm("lvchange", "-an", v.lv("data"))
	lvm("lvconvert", "--merge", v.lv("safe"))
	lvm("lvchange", "-ay", v.lv("data"))
	c.Holds(t, "a precondition, a volume that was rolled back", target, 0)
	c.Refused(t, "a thin volume that was rolled back", target, 1, 2)
	c.TakenAfterFull(t, "a thin volume that was rolled back", target, 1)

	// A snapshot takes the place and the name of the volume.
	c.First(t, target)
	lvm("lvcreate", "-s", "-kn", "-n", "safe", v.lv("data"))
	c.Taken(t, "a thin volume that has a snapshot again", target, 1)
	lvm("lvremove", "-f", v.lv("data"))
	lvm("lvrename", "troll", "safe", "data")
	lvm("lvchange", "-ay", v.lv("data"))
	c.Holds(t, "a precondition, a snapshot in place of the volume", target, 0)
	for _, state := range []int{1, 2} {
		before := v.read(t, "data")
		dm.Fails(t, nil, 3, []string{target, "refused"}, c.Apply(c.Delta(state), target)...)
		dm.Holds(t, "the snapshot in place of the target", target, before)
	}
	c.TakenAfterFull(t, "a snapshot in place of the target", target, 2)
}

// The kernel shows and merges the delta of a thin pair as it does any other.
func TestPoolKernelMerge(t *testing.T) {
	p := newBusyPool(t)
	p.write(t, "last", 16376, 8)
	p.discard(t, 0, 512)
	p.snapshot(t, "newer")
	m := (&merges{}).onDisk(t)
	delta, full := filepath.Join(t.TempDir(), "delta"), filepath.Join(t.TempDir(), "full")
	dm.Ddsfs(t, "extract", "--full", plainPath("base"), "-o", full)
	dm.Ddsfs(t, "extract", plainPath("base"), plainPath("newer"), "-o", delta)
	target := dm.Create(t, "thin-target", p.sectors, "linear "+block(t, bytes.Repeat([]byte("?"), int(p.sectors*dm.SectorSize)))+" 0", "--uuid", "lab-thin-target")
	m.apply(t, full, target.Path)
	want := dm.Read(t, plainPath("newer"), true)
	m.attach(t, delta, target.Path, "thin-view")
	dm.Holds(t, "the attached view", "/dev/mapper/thin-view", want)
	dm.Ddsfs(t, "detach", "thin-view")
	dm.Ddsfs(t, m.kernelArgs(delta, target.Path)...)
	dm.Holds(t, "the target of the kernel's merge", target.Path, want)
}
