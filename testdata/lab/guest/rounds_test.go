// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// rounds is a replication by hand, as the README has it: from a file system in use
// to a second volume.
type rounds struct {
	group, volume, base string
	target              string
	dir                 string // where the volume is mounted
	round               int
}

func (r *rounds) lv(name string) string { return r.group + "/" + name }

// work makes files, changes some and deletes some.
func (r *rounds) work(t *testing.T) {
	t.Helper()
	r.round++
	name := func(round, i int) string { return filepath.Join(r.dir, fmt.Sprintf("%d-%d", round, i)) }
	for i := range 8 {
		content := bytes.Repeat(fmt.Appendf(nil, "round %d, file %d\n", r.round, i), 1500)
		if err := os.WriteFile(name(r.round, i), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 && r.round > 1 {
			if err := os.Remove(name(r.round-1, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	dm.Run(t, "sync")
}

func (r *rounds) snapshot(t *testing.T, name, size string) {
	t.Helper()
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", size, "-n", name, r.lv(r.volume))
}

// delta mounts a pair and copies its delta.
func (r *rounds) delta(t *testing.T, args ...string) string {
	t.Helper()
	m := t.TempDir()
	dm.Ddsfs(t, append(append([]string{"mount"}, args...), m)...)
	delta := copied(t, filepath.Join(m, "delta.cow"))
	dm.Ddsfs(t, "unmount", m)
	return delta
}

func (r *rounds) rotate(t *testing.T) {
	t.Helper()
	dm.Run(t, "lvremove", "-f", r.lv(r.base))
	dm.Run(t, "lvrename", r.group, "new", r.base)
	dm.Holds(t, fmt.Sprintf("round %d: the target", r.round), r.target, dm.Read(t, "/dev/"+r.lv(r.base), true))
	if out, err := exec.Command("e2fsck", "-fn", r.target).CombinedOutput(); err != nil {
		t.Errorf("round %d: the target's file system: %v\n%s", r.round, err, out)
	}
}

func TestRounds(t *testing.T) {
	l := newLogical(t, "rounds")
	target := newLogical(t, "second")
	r := &rounds{group: "rounds", volume: "data", base: "base", target: target.path("data"), dir: t.TempDir()}
	dm.Run(t, "mkfs.ext4", "-q", l.path("data"))
	dm.Run(t, "mount", "-t", "ext4", l.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
	r.work(t)
	r.snapshot(t, "base", "12M")
	dm.Ddsfs(t, "apply", r.delta(t, "--full", "rounds/base"), r.target)

	for range 3 {
		r.work(t)
		r.snapshot(t, "new", "12M")
		dm.Ddsfs(t, "apply", r.delta(t, r.lv("base"), r.lv("new")), r.target)
		r.rotate(t)
	}

	// Names change, and what the target holds does not.
	dm.Run(t, "lvrename", "rounds", "base", "the-old-one")
	dm.Run(t, "lvrename", "rounds", "data", "the-data")
	dm.Run(t, "lvrename", "second", "data", "the-copy")
	r.volume, r.base, r.target = "the-data", "the-old-one", "/dev/second/the-copy"
	r.work(t)
	r.snapshot(t, "new", "12M")
	dm.Ddsfs(t, "apply", r.delta(t, r.lv(r.base), r.lv("new")), r.target)
	r.rotate(t)

	// The volume grows, and what the base's store can't know is sent.
	dm.Run(t, "umount", r.dir)
	dm.Run(t, "lvchange", "-an", r.lv(r.volume))
	dm.Run(t, "lvextend", "-L", "+4M", r.lv(r.volume))
	dm.Run(t, "lvchange", "-ay", r.lv(r.volume))
	dm.Run(t, "mount", "-t", "ext4", "/dev/"+r.lv(r.volume), r.dir)
	writeTo(t, "/dev/"+r.lv(r.volume), "grown", 20<<20/dm.SectorSize-64, 64)
	r.work(t)
	r.snapshot(t, "new", "12M")
	delta := filepath.Join(t.TempDir(), "delta")
	_, warning, code := dm.Try(t, nil, "extract", r.lv(r.base), r.lv("new"), "-o", delta)
	if code != 0 || !strings.Contains(warning, "grew from 16777216 to 20971520 bytes") {
		t.Errorf("an extended volume: exit code %d, %q", code, warning)
	}
	dm.Fails(t, nil, 3, []string{r.target, "20971520", "extend it first"}, "apply", delta, r.target)
	dm.Run(t, "lvextend", "-L", "+4M", "second/the-copy")
	dm.Ddsfs(t, "apply", delta, r.target)
	r.rotate(t)

	// The base overflows: there is no way but a first sync.
	dm.Run(t, "lvremove", "-f", r.lv(r.base))
	r.base = "base"
	r.snapshot(t, "base", "4M")
	dm.Ddsfs(t, "apply", r.delta(t, "--full", r.lv("base")), r.target)
	for s := int64(0); s < 8<<20/dm.SectorSize; s += 1024 {
		writeTo(t, "/dev/"+r.lv(r.volume), "too much", 12<<20/dm.SectorSize+s, 1024)
	}
	r.snapshot(t, "new", "12M")
	for _, pair := range [][]string{{"rounds/base", "rounds/new"}, {"--cow", "/dev/mapper/rounds-base-cow", "--source", "/dev/rounds/new"}} {
		failsBoth(t, []string{"rounds-base", "Invalid"}, pair...)
	}
	dm.Run(t, "lvremove", "-f", r.lv("base"))
	dm.Run(t, "lvrename", "rounds", "new", "base")
	dm.Ddsfs(t, "apply", r.delta(t, "--full", r.lv("base")), r.target)
	r.work(t)
	r.snapshot(t, "new", "12M")
	dm.Ddsfs(t, "apply", r.delta(t, r.lv("base"), r.lv("new")), r.target)
	dm.Run(t, "lvremove", "-f", r.lv("base"))
	dm.Holds(t, "the target after an overflow", r.target, dm.Read(t, "/dev/rounds/new", true))
}
