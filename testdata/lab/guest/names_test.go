// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// dmNode is the kernel's own path of a mapped device.
func dmNode(t *testing.T, name string) string {
	t.Helper()
	return "/dev/" + strings.TrimSpace(dm.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name))
}

func lvUUID(t *testing.T, volume string) string {
	t.Helper()
	return strings.TrimSpace(dm.Run(t, "lvs", "--noheadings", "-o", "lv_uuid", volume))
}

// The same delta comes of each name that a pair can have; LVM doubles the dashes in
// the device mapper's names.
func TestNames(t *testing.T) {
	l := newLogical(t, "dash-es-")
	l.write(t, "base", 0, 1024)
	l.snapshot(t, "ba-se", "8M")
	l.write(t, "new", 512, 1024)
	l.snapshot(t, "n--ew", "8M")
	const base, new = "dash--es---ba--se", "dash--es---n----ew"

	extract := func(args ...string) []byte {
		t.Helper()
		to := filepath.Join(t.TempDir(), "delta")
		dm.Ddsfs(t, append([]string{"extract", "-o", to}, args...)...)
		return dm.Read(t, to, false)
	}
	want := extract("--cow", "/dev/mapper/"+base+"-cow", "--source", "/dev/mapper/"+new)
	for _, c := range []struct{ base, new string }{
		{"dash-es-/ba-se", "dash-es-/n--ew"},
		{"/dev/dash-es-/ba-se", "/dev/dash-es-/n--ew"},
		{"/dev/mapper/" + base, "/dev/mapper/" + new},
		{dmNode(t, base), dmNode(t, new)},
		{lvUUID(t, "dash-es-/ba-se"), lvUUID(t, "dash-es-/n--ew")},
	} {
		dm.Equal(t, "the delta of "+c.base, extract(c.base, c.new), want)
		if got, want := dm.Ddsfs(t, "info", c.base), dm.Ddsfs(t, "info", "/dev/mapper/"+base+"-cow"); got != want {
			t.Errorf("info %s:\n%s\nand of its COW device:\n%s", c.base, got, want)
		}
	}
	dm.Fails(t, nil, 1, []string{"dash--es---data", "name one"}, "info", "dash-es-/data")
	dm.Fails(t, nil, 1, []string{"dash-es-/none", "active logical volume"}, "info", "dash-es-/none")
	dm.Equal(t, "a full delta by name", extract("--full", "dash-es-/n--ew"), extract("--full", "/dev/mapper/"+new))

	// The delta can't be written to a device that it is made of.
	for _, path := range []string{"/dev/dash-es-/n--ew", dmNode(t, base), dmNode(t, base+"-cow")} {
		before := dm.Read(t, path, true)
		dm.Fails(t, nil, 1, []string{path, "what the delta is made of"}, "extract", "dash-es-/ba-se", "dash-es-/n--ew", "-o", path)
		dm.Holds(t, path, path, before)
	}

	// No program but ddsfs is needed, nor a name in /dev but the devices' own.
	m := t.TempDir()
	ddsfs := strings.TrimSpace(dm.Run(t, "which", "ddsfs"))
	dm.Run(t, "env", "-i", ddsfs, "mount", dmNode(t, base), dmNode(t, new), m)
	if names := list(t, m); len(names) != 4 {
		t.Errorf("mounted without a PATH: %q", names)
	}
	report, err := os.ReadFile(filepath.Join(m, "report"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ba-se", "n--ew", "data"} {
		if id := mapperUUID(t, "dash--es--"+"-"+strings.ReplaceAll(name, "-", "--")); !strings.Contains(string(report), id) {
			t.Errorf("the report has no %s, which is %s:\n%s", id, name, report)
		}
	}
	dm.Ddsfs(t, "unmount", m)

	// As mount(8) calls it. mount -a looks for the name of BASE among what is mounted.
	helper := filepath.Join(t.TempDir(), "mount.ddsfs")
	if err := os.Symlink(ddsfs, helper); err != nil {
		t.Fatal(err)
	}
	dm.Run(t, helper, "/dev/dash-es-/ba-se", m, "-o", "rw,nofail,new=/dev/dash-es-/n--ew")
	dm.Equal(t, "the delta of mount.ddsfs", dm.Read(t, filepath.Join(m, "delta.cow"), false), want)
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if line := "/dev/dash-es-/ba-se " + m + " fuse.ddsfs ro,"; !strings.Contains(string(mounts), line) {
		t.Errorf("no line %q in\n%s", line, mounts)
	}
	dm.Ddsfs(t, "unmount", m)
}

// Plain device-mapper snapshots, whose devices have other names and places.
func TestPlainNames(t *testing.T) {
	p := newPair(t, 16384, 8, 100)
	for _, args := range [][]string{{p.base.Path, p.new.Path}, {dmNode(t, p.base.Name), dmNode(t, p.new.Name)}} {
		m := t.TempDir()
		dm.Ddsfs(t, append(append([]string{"mount"}, args...), m)...)
		delta := copied(t, filepath.Join(m, "delta.cow"))
		dm.Ddsfs(t, "unmount", m)
		p.apply(t, delta)
	}
}

// The names in a seal are the dm uuids of plain snapshots as well, and of what they
// are snapshots of.
func TestPlainIdentities(t *testing.T) {
	const sectors = 8192
	create := func(name, target string) *dm.Device {
		return dm.Create(t, "plain-"+name, sectors, target, "--uuid", "lab-plain-"+name)
	}
	real := create("real", "linear "+dm.Blank(t, sectors)+" 0")
	snapshot := func(name string) *dm.Device {
		return create(name, fmt.Sprintf("snapshot %s %s P 8", real.Path, dm.Blank(t, dm.CowSectors(sectors, 8))))
	}
	volume := create("volume", "snapshot-origin "+real.Path)
	base := snapshot("base")
	writeTo(t, volume.Path, "new", 1024, 64)
	new := snapshot("new")
	delta := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", base.Path, new.Path, "-o", delta)
	info := dm.Ddsfs(t, "info", "--json", delta)
	for _, want := range []string{`"base":"lab-plain-base"`, `"new":"lab-plain-new"`, `"origin":"lab-plain-real"`} {
		if !strings.Contains(info, want) {
			t.Errorf("info says %s, want %s", info, want)
		}
	}
	for _, target := range []*dm.Device{volume, base, new} {
		before := dm.Read(t, target.Path, true)
		dm.Fails(t, nil, 3, []string{target.Path, "refused", "taken from"}, "apply", "--assume-base", "--state-dir", t.TempDir(), delta, target.Path)
		dm.Holds(t, "the refused target", target.Path, before)
	}
}

// failsBoth runs mount and extract with a pair that both must refuse.
func failsBoth(t *testing.T, words []string, pair ...string) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "delta")
	dm.Fails(t, nil, 1, words, append([]string{"extract", "-o", out}, pair...)...)
	dir := t.TempDir()
	dm.Fails(t, nil, 1, words, append(append([]string{"mount"}, pair...), dir)...)
	if isMounted(t, dir) {
		t.Errorf("%q is mounted", pair)
		dm.Run(t, "umount", dir)
	}
	if left := list(t, filepath.Dir(out)); len(left) > 0 {
		t.Errorf("extract left %q", left)
	}
}

// forms are the two ways to name a pair.
func forms(base, cow, new string) [][]string {
	return [][]string{{base, new}, {"--cow", cow, "--source", new}}
}

// Devices that make no pair are refused with the reason, in each form of their names.
func TestNoPair(t *testing.T) {
	l := newLogical(t, "no")
	l.write(t, "base", 0, 1024)
	l.snapshot(t, "base", "8M")
	l.write(t, "new", 512, 1024)
	l.snapshot(t, "new", "8M")
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "other", "no")
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "4M", "-n", "others", "no/other")
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "linear", "no")

	each := func(what, base, cow, new string, words ...string) {
		t.Run(what, func(t *testing.T) {
			for _, pair := range forms(base, cow, new) {
				failsBoth(t, words, pair...)
			}
		})
	}
	const cow = "/dev/mapper/no-base-cow"
	each("base itself", "no/base", cow, "no/base", "base and new are the same")
	each("the volume itself", "no/base", cow, "no/data", "/dev/mapper/no-data", "the volume itself", "--allow-live-origin")
	each("the hidden volume", "no/base", cow, "/dev/mapper/no-data-real", "the volume itself")
	each("a snapshot of another volume", "no/base", cow, "no/others", "no-others", "no snapshot of the volume")
	each("another volume", "no/base", cow, "no/linear", "no-linear", "no snapshot of the volume")
	each("another volume that has snapshots", "no/base", cow, "no/other", "the volume itself")
	each("the wrong order", "no/new", "/dev/mapper/no-new-cow", "no/base", "wrong order", "no-base", "no-new")
	t.Run("what is no base", func(t *testing.T) {
		failsBoth(t, []string{"no-data", "not one of them"}, "no/data", "no/new")
		failsBoth(t, []string{"no-linear", "no snapshot"}, "no/linear", "no/new")
		failsBoth(t, []string{"no/gone", "neither a file nor an active logical volume"}, "no/gone", "no/new")
		failsBoth(t, []string{"no/gone", "neither a file nor an active logical volume"}, "no/base", "no/gone")
		failsBoth(t, []string{"000000"}, "000000-0000-0000-0000-0000-0000-000000", "no/new")
		failsBoth(t, []string{"/dev/no/base", "name it without --cow"}, "--cow", "/dev/no/base", "--source", "/dev/no/new")
		failsBoth(t, []string{"/dev/null"}, "/dev/null", "no/new")
	})
	t.Run("a full one of the volume itself", func(t *testing.T) {
		failsBoth(t, []string{"no-data", "the volume itself"}, "--full", "no/data")
	})

	t.Run("the volume itself, allowed", func(t *testing.T) {
		delta := filepath.Join(t.TempDir(), "delta")
		_, warning, code := dm.Try(t, nil, "extract", "--allow-live-origin", "no/base", "no/data", "-o", delta)
		if code != 0 || !strings.Contains(warning, "can be written to") {
			t.Fatalf("exit code %d, %q", code, warning)
		}
		target := file(t, dm.Read(t, "/dev/no/base", true))
		dm.Ddsfs(t, "apply", "--assume-base", "--state-dir", t.TempDir(), delta, target)
		dm.Holds(t, "the target", target, dm.Read(t, "/dev/no/data", true))

		// A write meanwhile spoils the delta.
		m := t.TempDir()
		dm.Ddsfs(t, "mount", "--allow-live-origin", "no/base", "no/data", m)
		l.write(t, "later", 4096, 8)
		dm.Fails(t, nil, 1, []string{"input/output error"}, "verify", filepath.Join(m, "delta.cow"))
		dm.Ddsfs(t, "unmount", m)
	})
}

// Writes to the new snapshot, such as the replay of a journal, are part of the new state.
func TestNewWasWritten(t *testing.T) {
	for _, chunk := range []string{"4k", "64k"} {
		t.Run("chunk="+chunk, func(t *testing.T) {
			l := newLogical(t, "written")
			l.write(t, "base", 0, 8192)
			l.snapshot(t, "base", "24M")
			state := t.TempDir()
			target := file(t, make([]byte, 16<<20))
			full := filepath.Join(t.TempDir(), "full")
			dm.Ddsfs(t, "extract", "--full", "written/base", "-o", full)
			dm.Ddsfs(t, "apply", "--state-dir", state, full, target)
			l.write(t, "new", 512, 64)
			dm.Run(t, "lvcreate", "-s", "-c", chunk, "-L", "24M", "-n", "new", "written/data")
			writeTo(t, l.path("new"), "to the snapshot", 4096, 64)
			l.write(t, "later", 12000, 64)

			delta := filepath.Join(t.TempDir(), "delta")
			_, warning, code := dm.Try(t, nil, "extract", "-v", "written/base", "written/new", "-o", delta)
			if code != 0 || !strings.Contains(warning, "was written to") || !strings.Contains(warning, "\nWritten to new ") {
				t.Fatalf("exit code %d, %q", code, warning)
			}
			dm.Ddsfs(t, "apply", "--state-dir", state, delta, target)
			dm.Holds(t, "the target", target, dm.Read(t, l.path("new"), true))

			// A write while it is read spoils the delta, and is noticed.
			m := t.TempDir()
			dm.Ddsfs(t, "mount", "written/base", "written/new", m)
			writeTo(t, l.path("new"), "too late", 6000, 8)
			dm.Fails(t, nil, 1, []string{"input/output error"}, "verify", filepath.Join(m, "delta.cow"))
			dm.Ddsfs(t, "unmount", m)
		})
	}
}

// A writable snapshot that is the older one, by what the stores say.
func TestWrongOrder(t *testing.T) {
	l := newLogical(t, "order")
	for _, name := range []string{"older", "newer"} {
		dm.Run(t, "lvcreate", "-s", "-L", "8M", "-n", name, "order/data")
		l.write(t, name, 1024, 8)
		l.write(t, name, map[string]int64{"older": 2048, "newer": 4096}[name], 8)
	}
	for _, pair := range forms("order/newer", "/dev/mapper/order-newer-cow", "order/older") {
		failsBoth(t, []string{"wrong order", "order-older is older than base", "order-newer"}, pair...)
	}
	out := filepath.Join(t.TempDir(), "delta")
	_, warning, code := dm.Try(t, nil, "extract", "--new-was-written", "order/newer", "order/older", "-o", out)
	if code != 0 || !strings.Contains(warning, "older") {
		t.Errorf("exit code %d, %q", code, warning)
	}
	dm.Ddsfs(t, "verify", out, "/dev/order/older")
	_, warning, code = dm.Try(t, nil, "extract", "order/older", "order/newer", "-o", out)
	if code != 0 || warning != "" {
		t.Errorf("the right order: exit code %d, %q", code, warning)
	}
}

// A snapshot that is being merged loses what it lists.
func TestMerging(t *testing.T) {
	p := newPair(t, 16384, 8, 100)
	p.base.Remove(t)
	merging := dm.Create(t, "merging", p.volume.Sectors, fmt.Sprintf("snapshot-merge %s %s P 8", dm.Blank(t, p.volume.Sectors), p.base.COW.Path))
	failsBoth(t, []string{"merg", "take new snapshots"}, "--cow", p.base.COW.Path, "--source", p.new.Path)
	failsBoth(t, []string{"merg", "take new snapshots"}, merging.Path, p.new.Path)
}

// A volume that is smaller than the base was is no delta of it.
func TestReduced(t *testing.T) {
	p := newPair(t, 16384, 8, 100)
	smaller := dm.Create(t, "smaller", p.volume.Sectors-64,
		fmt.Sprintf("snapshot %s %s P 8", p.volume.Path+"-real", dm.Cow(t, "smaller", dm.CowSectors(p.volume.Sectors, 8)).Path))
	for _, pair := range forms(p.base.Path, p.base.COW.Path, smaller.Path) {
		failsBoth(t, []string{smaller.Path, "reduced"}, pair...)
	}
}

// A snapshot with a store in memory can't be a base, and as the new one only if
// nobody can have written to it.
func TestStoreInMemory(t *testing.T) {
	p := newPair(t, 16384, 8, 100)
	inMemory := func(name string, options ...string) *dm.Device {
		return dm.Create(t, name, p.volume.Sectors,
			fmt.Sprintf("snapshot %s-real %s N 8", p.volume.Path, dm.Blank(t, 4096)), options...)
	}
	writable := inMemory("writable")
	failsBoth(t, []string{writable.Path, "in memory"}, writable.Path, p.new.Path)
	failsBoth(t, []string{writable.Path, "in memory"}, p.base.Path, writable.Path)
	writable.Remove(t)
	readOnly := inMemory("read-only")
	dm.Run(t, "blockdev", "--setro", readOnly.Path)
	delta := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", p.base.Path, readOnly.Path, "-o", delta)
	p.apply(t, delta)
}
