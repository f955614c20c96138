// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// days are states of a volume with deltas between them: target holds the last, undo files
// lead back, and full.cow is the first.
type days struct {
	*replica
	states [][]byte
}

func newDays(t *testing.T, states ...[]byte) *days {
	d := &days{&replica{t: t, dir: t.TempDir()}, states}
	d.target = d.path("target")
	must(t, os.WriteFile(d.target, make([]byte, len(states[len(states)-1])+4096), 0o600))
	must(t, os.Mkdir(d.path("points"), 0o700))
	d.apply("-q", d.full(0), d.target).ok()
	for i := range states[1:] {
		d.apply("-q", "--undo", d.path(fmt.Sprintf("points/%d.cow", i)), d.next(i), d.target).ok()
	}
	return d
}

func (d *days) image(day int) string {
	d.t.Helper()
	path := d.path(fmt.Sprint("state", day))
	must(d.t, os.WriteFile(path, d.states[day], 0o600))
	return path
}

// full is a full delta of a day.
func (d *days) full(day int) string {
	d.t.Helper()
	return d.delta(fmt.Sprintf("full%d.cow", day), "--full", d.image(day), "--new-id", fmt.Sprint("day", day))
}

// next is a delta from a day to the next one.
func (d *days) next(day int) string {
	d.t.Helper()
	old, new := d.states[day], d.states[day+1]
	var changed []uint64
	for chunk := range (len(new) + 4095) / 4096 {
		at, end := chunk*4096, min((chunk+1)*4096, len(new))
		if end > len(old) || !bytes.Equal(old[at:end], new[at:end]) {
			changed = append(changed, uint64(chunk))
		}
	}
	cow := d.path(fmt.Sprintf("cow%d", day))
	must(d.t, os.WriteFile(cow, buildStore(4096, changed, new), 0o600))
	return d.delta(fmt.Sprintf("day%d.cow", day+1), "--cow", cow, "--source", d.image(day+1), "--base-id", fmt.Sprint("day", day), "--new-id", fmt.Sprint("day", day+1))
}

func (d *days) browse(arguments ...string) (m string) {
	d.t.Helper()
	m = mountpoint(d.t)
	ddsfs(d.t, args("browse", "--state-dir", d.path("state"), arguments, m)...).ok()
	return m
}

// shows compares all images with the days that they should show.
func (d *days) shows(m string, images map[string]int) {
	d.t.Helper()
	var want []string
	for name, day := range images {
		want = append(want, name)
		if got := read(d.t, m, name); !bytes.Equal(got, d.states[day]) {
			d.t.Errorf("%s, of %d bytes, is not day %d", name, len(got), day)
		}
	}
	slices.Sort(want)
	if got := names(d.t, m); !slices.Equal(got, want) {
		d.t.Errorf("%q are shown, want %q", got, want)
	}
}

// fiveDays are states of a volume, with growth.
func fiveDays() (states [][]byte) {
	r := rand.New(rand.NewPCG(4, 2))
	noise := func(p []byte) {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	}
	volume := make([]byte, 3<<20+512)
	noise(volume[:1<<20])
	for day := range 5 {
		states = append(states, bytes.Clone(volume))
		if day == 2 {
			volume = append(volume, make([]byte, 100<<10)...)
		}
		for range 30 {
			at := r.IntN(len(volume))
			noise(volume[at:min(len(volume), at+r.IntN(20_000))])
		}
	}
	return states
}

// Undo files lead back from a target, deltas forward from a full one, and from an image of
// which the user says what it holds, in any order.
func TestBrowse(t *testing.T) {
	states := fiveDays()[:3]
	d := newDays(t, states...)
	m := d.browse(d.target, d.path("points"))
	d.shows(m, map[string]int{"now.img": 2, "1.img": 1, "0.img": 0})
	if comm := string(read(t, fmt.Sprintf("/proc/%d/comm", server(t, m).pid))); comm != "ddsfs browse\n" {
		t.Errorf("ps calls it %q", comm)
	}
	d.apply(d.full(0), d.target).fails(3, d.target, "ddsfs browse (process ", "has it open")
	p := server(t, m)
	unmount(t, m)
	p.ended(t)

	m = d.browse(d.path("full0.cow"), d.path("day2.cow"), d.path("day1.cow"))
	d.shows(m, map[string]int{"full0.img": 0, "day1.img": 1, "day2.img": 2})
	d.apply(d.path("points/1.cow"), d.target).ok() // which a full delta as the image leaves free
	unmount(t, m)

	m = d.browse("--image-id", "day0", d.image(0), d.path("day2.cow"), d.path("points"), d.path("day1.cow"))
	d.shows(m, map[string]int{"now.img": 0, "1.img": 1, "day2.img": 2})
}

// What apply keeps is shown under its names, in the order of the days.
func TestBrowseKept(t *testing.T) {
	d := newDays(t, fiveDays()...)
	must(t, os.Truncate(d.target, 0))
	must(t, os.Truncate(d.target, int64(len(d.states[4]))+4096))
	d.apply("-q", d.path("full0.cow"), d.target).ok()
	for day := range 4 {
		d.apply("-q", "--keep", d.path("kept"), d.path(fmt.Sprintf("day%d.cow", day+1)), d.target).ok()
	}
	images := map[string]int{"now.img": 4}
	for day, name := range names(t, d.path("kept")) {
		images[strings.TrimSuffix(name, ".cow")+".img"] = day
	}
	d.shows(d.browse(d.target, d.path("kept")), images)
	text := ddsfs(t, "info", d.path("kept")).ok()
	if strings.Count(text, " UTC ") != 4 || !strings.Contains(text, "no delta here leads to day4") {
		t.Error(text)
	}
}

// A target whose state nobody can vouch for is refused, as apply would.
func TestBrowseRefuses(t *testing.T) {
	d := newDays(t, fiveDays()[:2]...)
	browse := func(arguments ...string) result {
		m := mountpoint(t)
		r := ddsfs(t, args("browse", "--state-dir", d.path("state"), arguments, m)...)
		if r.code == 0 || mounted(t, m) {
			t.Errorf("%q: exit code %d, mounted %v", arguments, r.code, mounted(t, m))
		}
		return r
	}
	points, lost := d.path("points"), d.path("day2.cow")
	must(t, os.Rename(d.delta("lost", "--cow", d.path("cow0"), "--source", d.image(1), "--base-id", "x", "--new-id", "y"), lost))
	browse(d.image(0), points).fails(3, "nothing is recorded", "--image-id")
	browse("--image-id", "day0", d.target, points).fails(3, "recorded to hold day1")
	browse("--image-id", "day0", d.path("full0.cow"), points).fails(2, "--image-id")
	browse(d.path("day1.cow"), points).fails(1, "day1.cow", "not a full one")
	browse(d.target, points, lost).fails(1, lost, "leads nowhere", "x")
	browse(d.target, d.path("missing")).fails(1, d.path("missing"))
	browse(d.path("missing"), points).fails(1, d.path("missing"))
	browse(d.target, d.path("cow0")).fails(1, "cow0", "not sealed")
	must(t, os.WriteFile(d.path("noise.cow"), bytes.Repeat([]byte("noise"), 1000), 0o600))
	browse(d.target, d.path("noise.cow")).fails(4, "noise.cow")

	// What is found in a directory is only warned of.
	must(t, os.Rename(lost, filepath.Join(points, "lost.cow")))
	m := mountpoint(t)
	r := ddsfs(t, "browse", "--state-dir", d.path("state"), d.target, points, m)
	if r.code != 0 || !strings.Contains(r.stderr, "warning: left out") || !strings.Contains(r.stderr, "lost.cow") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	d.shows(m, map[string]int{"now.img": 1, "0.img": 0})
	browse(d.target, points).fails(3, "ddsfs browse (process ")
	device := loop(t, d.image(1))
	browse(d.image(1), points).fails(3, device)
	unmount(t, m)

	f, err := os.OpenFile(d.target, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("x"), 3)
	must(t, err)
	must(t, f.Close())
	browse(d.target, points).fails(3, "not as the last merge left it")
}

// States without names are found by what the target's record knows of them.
func TestBrowseNameless(t *testing.T) {
	d := &days{&replica{t: t, dir: t.TempDir()}, fiveDays()[:2]}
	d.target = d.path("target")
	must(t, os.WriteFile(d.target, d.states[0], 0o600))
	d.next(0)
	delta := d.delta("delta", "--cow", d.path("cow0"), "--source", d.image(1))
	d.apply("-q", d.delta("full", "--full", d.image(0)), d.target).ok()
	if r := d.apply("-q", "--assume-base", "--undo", d.path("undo.cow"), delta, d.target); r.code != 0 {
		t.Fatal(r.stderr)
	}
	d.shows(d.browse(d.target, d.path("undo.cow")), map[string]int{"now.img": 1, "undo.img": 0})
}

// A damaged MiB of a delta is an error for those who read it, and the log says where;
// everything else is right, for many readers at once.
func TestBrowseDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	old := make([]byte, 6<<20)
	new := bytes.Clone(old)
	for i := range new[:4<<20] {
		new[i] = byte(r.Uint32())
	}
	d := newDays(t, old, new)
	undamaged := read(t, d.path("day1.cow"))
	bad := bytes.Clone(undamaged)
	bad[1<<20+5000]++
	must(t, os.WriteFile(d.path("day1.cow"), bad, 0o600))
	ddsfs(t, "browse", "--verify", d.path("full0.cow"), d.path("day1.cow"), mountpoint(t)).fails(4, "day1.cow: 1 MiB of it")
	whole := d.browse("--verify", d.path("full0.cow"))
	d.shows(whole, map[string]int{"full0.img": 0})
	log := d.path("log")
	m := d.browse("--log", log, d.path("full0.cow"), d.path("day1.cow"))
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			f, err := os.Open(filepath.Join(m, "day1.img"))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			failed := 0
			for off := 0; off < len(new); off += 4096 {
				p := make([]byte, 4096)
				if _, err := f.ReadAt(p, int64(off)); err != nil {
					failed++
				} else if !bytes.Equal(p, new[off:off+4096]) {
					t.Errorf("wrong bytes at byte %d", off)
					return
				}
			}
			// The kernel reads ahead, but asks again for what a reader wants.
			if failed < 200 || failed > 256 {
				t.Errorf("%d of 256 chunks can't be read", failed)
			}
		})
	}
	readers.Wait()
	if text := string(read(t, log)); !strings.Contains(text, "day1.img: ") || !strings.Contains(text, d.path("day1.cow")+": ") || !strings.Contains(text, "MiB 1: does not match") {
		t.Errorf("the log says %q", text)
	}
}

// The images are file systems that can be mounted and checked, and a disk with partitions
// can be looked into.
func TestBrowseImagesAreUsable(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	tool := func(command ...string) string { return run(t, command...).stdout }
	must(t, os.WriteFile(path("disk"), make([]byte, 24<<20), 0o600))
	tool("mkfs.ext4", "-q", "-F", path("disk"))
	var states [][]byte
	for day := range 3 {
		states = append(states, read(t, path("disk")))
		must(t, os.WriteFile(path("file"), fmt.Appendf(nil, "of day %d", day+1), 0o600))
		tool("debugfs", "-w", "-R", "rm file", path("disk"))
		tool("debugfs", "-w", "-R", "write "+path("file")+" file", path("disk"))
	}
	d := newDays(t, states...)
	m := d.browse(d.target, d.path("points"))
	run(t, "e2fsck", "-fn", filepath.Join(m, "1.img"))
	for image, want := range map[string]string{"1.img": "of day 1", "now.img": "of day 2"} {
		at := mountpoint(t)
		run(t, "mount", "-o", "ro,loop,norecovery", filepath.Join(m, image), at).ok()
		if got := string(read(t, at, "file")); got != want {
			t.Errorf("%s has a file %q, want %q", image, got, want)
		}
		run(t, "umount", at).ok()
	}
	copied := path("copy")
	run(t, "cp", "--sparse=always", filepath.Join(m, "0.img"), copied).ok()
	if !bytes.Equal(read(t, copied), states[0]) {
		t.Error("a sparse copy differs")
	}
	if out, err := exec.Command("e2fsck", "-fn", copied).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// A volume that grows is shown with the size that it had.
func TestBrowseGrowth(t *testing.T) {
	d := &days{&replica{t: t, dir: t.TempDir()}, fiveDays()}
	paths := []string{d.full(0)}
	images := map[string]int{"full0.img": 0}
	for day := range len(d.states) - 1 {
		paths = append(paths, d.next(day))
		images[fmt.Sprintf("day%d.img", day+1)] = day + 1
	}
	d.shows(d.browse(paths...), images)

	// Backward, the seals of undo files may say more than the volume had.
	d = newDays(t, d.states...)
	d.shows(d.browse(d.target, d.path("points")), map[string]int{"now.img": 4, "3.img": 3, "2.img": 2, "1.img": 1, "0.img": 0})
}

// What neither a full delta of a file with holes nor a later one has are holes of the
// images, which copies keep.
func TestBrowseHoles(t *testing.T) {
	old := make([]byte, 40<<20)
	copy(old[10<<20:], bytes.Repeat([]byte("old"), 1<<20))
	new := bytes.Clone(old)
	copy(new[30<<20:], bytes.Repeat([]byte("new"), 1<<20))
	d := &days{&replica{t: t, dir: t.TempDir()}, [][]byte{old, new}}
	run(t, "cp", "--sparse=always", d.image(0), d.path("holes")).ok()
	full := d.delta("full.cow", "--full", d.path("holes"), "--new-id", "day0")
	if size := len(read(t, full)); size > 5<<20 {
		t.Fatalf("the full delta has %d bytes", size)
	}
	m := d.browse(full, d.next(0))
	d.shows(m, map[string]int{"full.img": 0, "day1.img": 1})
	for name, most := range map[string]int64{"full.img": 4 << 20, "day1.img": 7 << 20} {
		copied := d.path("copied " + name)
		run(t, "cp", "--sparse=auto", filepath.Join(m, name), copied).ok()
		var of, st unix.Stat_t
		must(t, unix.Stat(filepath.Join(m, name), &of))
		must(t, unix.Stat(copied, &st))
		if !bytes.Equal(read(t, copied), read(t, m, name)) || st.Blocks*512 > most || of.Blocks*512 > most {
			t.Errorf("%s has %d blocks, and its copy %d", name, of.Blocks, st.Blocks)
		}
	}
}

// A device that is browsed is claimed: nobody else can mount it or merge into it.
func TestBrowseDevice(t *testing.T) {
	d := &days{&replica{t: t, dir: t.TempDir()}, fiveDays()[:2]}
	disk := d.path("disk")
	must(t, os.WriteFile(disk, make([]byte, 4<<20), 0o600))
	d.target = loop(t, disk)
	d.apply("-q", d.full(0), d.target).ok()
	d.apply("-q", "--undo", d.path("0.cow"), d.next(0), d.target).ok()
	m := d.browse(d.target, d.path("0.cow"))
	d.shows(m, map[string]int{"now.img": 1, "0.img": 0})
	d.apply(d.path("0.cow"), d.target).fails(3, d.target, "browse that shows it in "+m)
	if r := run(t, "mount", d.target, mountpoint(t)); r.code == 0 {
		t.Error("it can be mounted")
	}
	unmount(t, m)
	d.apply("-q", d.path("0.cow"), d.target).ok()
}

// Info shows deltas as a chain, and what is missing in it.
func TestInfoOfAChain(t *testing.T) {
	d := newDays(t, fiveDays()[:4]...)
	text := ddsfs(t, "info", d.path("points"), d.full(0)).ok()
	var lines [][]string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.Fields(line))
	}
	if len(lines) != 6 || !slices.Equal(lines[0][:2], []string{"FILE", "LEADS"}) || !strings.HasPrefix(lines[5][0], "no") {
		t.Fatal(text)
	}
	for i, want := range [][]string{{"2.cow", "day2", "day3"}, {"1.cow", "day1", "day2"}, {"0.cow", "day0", "day1"}, {"full0.cow", "day0", "any"}} {
		if got := lines[1+i]; !slices.Equal(got[:3], want) || got[3] != "-" {
			t.Errorf("line %d is %q, want %q", 1+i, got, want)
		}
	}
	if !strings.Contains(text, "no delta here leads to day3, from which these start: 2.cow\n") {
		t.Error(text)
	}
	dated := d.path("points/20261124T030007Z-2.cow")
	must(t, os.Rename(d.path("points/1.cow"), dated))
	var got struct {
		Deltas []struct {
			File, Since, Base, New string
			Full                   bool
			Exceptions             int
			VolumeBytes            int `json:"volume_bytes"`
		}
		Missing []struct {
			State string
			Files []string
		}
	}
	must(t, json.Unmarshal([]byte(ddsfs(t, "info", "--json", d.path("points")).ok()), &got))
	if len(got.Deltas) != 3 || got.Deltas[1].File != dated || got.Deltas[1].Since != "2026-11-24T03:00:07Z" || got.Deltas[1].New != "day1" ||
		got.Deltas[1].VolumeBytes != len(d.states[1]) || got.Deltas[0].Since != "" {
		t.Errorf("%+v", got.Deltas)
	}
	if len(got.Missing) != 1 || got.Missing[0].State != "day3" || !slices.Equal(got.Missing[0].Files, []string{d.path("points/2.cow")}) {
		t.Errorf("%+v", got.Missing)
	}
	empty := t.TempDir()
	ddsfs(t, "info", empty).fails(1, empty, "no deltas")
	ddsfs(t, "info", dated, d.path("cow0")).fails(1, "cow0", "not sealed")
}
