// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// pair is a volume with a base snapshot, and a new one of what came after.
type pair struct {
	volume    *dm.Volume
	base, new *dm.Snapshot
	random    *rand.Rand
}

// newPair makes the base snapshot, changes so many chunks of the volume, and
// makes the new one. The first and the last chunk are among the changed ones,
// the last by its last sector alone.
func newPair(t *testing.T, sectors, chunk int64, changed int) *pair {
	t.Helper()
	p := withBase(t, sectors, chunk, dm.Cow(t, "base", dm.CowSectors(sectors, chunk)))
	if changed > 0 {
		last := (sectors - 1) / chunk
		p.volume.Write(t, "new", sectors-1, 1)
		p.change(t, "new", 0)
		middle := p.random.Perm(int(last) - 1)
		for _, c := range middle[:changed-2] {
			p.change(t, "new", int64(c)+1)
		}
	}
	p.addNew(t)
	return p
}

func withBase(t *testing.T, sectors, chunk int64, cow *dm.Device) *pair {
	t.Helper()
	p := &pair{volume: dm.NewVolume(t, sectors), random: rand.New(rand.NewPCG(1, 2))}
	p.base = p.volume.Snapshot(t, "base", cow, chunk)
	return p
}

func (p *pair) addNew(t *testing.T) {
	t.Helper()
	chunk := p.base.Chunk
	p.new = p.volume.Snapshot(t, "new", dm.Cow(t, "new", dm.CowSectors(p.volume.Sectors, chunk)), chunk)
}

// change overwrites a part of a chunk.
func (p *pair) change(t *testing.T, what string, chunk int64) {
	t.Helper()
	start := chunk * p.base.Chunk
	length := min(p.base.Chunk, p.volume.Sectors-start)
	skip := p.random.Int64N(length)
	p.volume.Write(t, what, start+skip, length-skip)
}

// apply applies a delta to a copy of the base.
func (p *pair) apply(t *testing.T, delta string) {
	t.Helper()
	target := file(t, p.base.Image)
	dm.Ddsfs(t, "apply", delta, target)
	dm.Holds(t, "the target", target, p.new.Image)
}

// deliver applies a delta to a copy of the base in every way there is.
func (p *pair) deliver(t *testing.T, delta string) {
	t.Helper()
	content := dm.Read(t, delta, false)
	for kind, target := range map[string]func(*testing.T, []byte) string{"a file": file, "a block device": block} {
		path := target(t, p.base.Image)
		dm.Ddsfs(t, "apply", delta, path)
		dm.Holds(t, "applied to "+kind, path, p.new.Image)

		path = target(t, p.base.Image)
		if stdout, stderr, code := dm.Try(t, content, "apply", "-", path); code != 0 {
			t.Fatalf("apply - to %s: exit code %d\n%s%s", kind, code, stdout, stderr)
		}
		dm.Holds(t, "applied from a pipe to "+kind, path, p.new.Image)
	}
}

// The main job: the pair is mounted, the delta copied, and a copy of the base
// becomes the new state. The base goes on growing after the new snapshot.
func TestPair(t *testing.T) {
	for _, c := range []struct {
		sectors, chunk int64
		changed        int
	}{
		{4096, 1, 150},
		{16384, 8, 150},
		{16384, 128, 60},
		{16384, 1024, 8},
		{20485, 8, 100}, // the last chunk is partial
		{20485, 128, 30},
		{20485, 1024, 8},
	} {
		t.Run(fmt.Sprintf("chunk=%d volume=%d", c.chunk*dm.SectorSize, c.sectors*dm.SectorSize), func(t *testing.T) {
			p := newPair(t, c.sectors, c.chunk, c.changed)
			later := func() {
				for range 5 {
					p.change(t, "later", p.random.Int64N(c.sectors/c.chunk))
				}
			}
			later()
			m := mount(t, p.base.COW.Path, p.new.Path)
			later()
			if got, want := list(t, m.dir), []string{"delta.cow", "exceptions", "header", "report"}; !slices.Equal(got, want) {
				t.Fatalf("the mounted directory holds %q, want %q", got, want)
			}
			byCat := copied(t, m.delta())
			later()
			extracted := filepath.Join(t.TempDir(), "extracted")
			dm.Ddsfs(t, "extract", "--cow", p.base.COW.Path, "--source", p.new.Path, "-o", extracted)
			dm.Ddsfs(t, "info", p.base.COW.Path)

			// The mount needs the base no more: while it held the COW device,
			// LVM would remove one half of the snapshot.
			p.base.Remove(t)
			p.base.COW.Remove(t)
			byCp := filepath.Join(t.TempDir(), "copy")
			dm.Run(t, "cp", m.delta(), byCp)
			dm.Holds(t, "the copy made by cp", byCp, dm.Read(t, byCat, false))
			m.unmount(t)
			dm.Holds(t, "the new snapshot", p.new.Path, p.new.Image)
			// At once: nothing may hold it any more.
			p.new.Remove(t)

			dm.Ddsfs(t, "info", byCat)
			p.deliver(t, byCat)
			p.apply(t, byCp)
			// It was read later, from a base that had grown.
			p.apply(t, extracted)
		})
	}
}

// The kernel writes the store beneath the page cache, which still holds what
// somebody read there before.
func TestStaleCache(t *testing.T) {
	p := withBase(t, 16384, 8, dm.Cow(t, "base", dm.CowSectors(16384, 8)))
	cow := p.base.COW.Path
	before := dm.Read(t, cow, false)
	for c := range int64(11) {
		p.change(t, "new", 100*c)
	}
	p.addNew(t)
	dm.Equal(t, "a precondition, the cached store", dm.Read(t, cow, false), before)

	m := mount(t, cow, p.new.Path)
	p.apply(t, copied(t, m.delta()))
	m.unmount(t)
	extracted := filepath.Join(t.TempDir(), "extracted")
	dm.Ddsfs(t, "extract", "--cow", cow, "--source", p.new.Path, "-o", extracted)
	p.apply(t, extracted)
}

// A device that held an older store: after the live areas the old entries are still
// there, whole areas of them.
func TestReusedStore(t *testing.T) {
	for _, live := range []int{100, 256, 300} {
		t.Run(fmt.Sprintf("live=%d", live), func(t *testing.T) {
			const sectors, chunk = 16384, 8
			cow := dm.Cow(t, "base", dm.CowSectors(sectors, chunk))
			p := withBase(t, sectors, chunk, cow)
			p.volume.Write(t, "older", 0, 1000*chunk)
			p.base.Remove(t)
			dm.Wipe(t, cow)

			p.base = p.volume.Snapshot(t, "base", cow, chunk)
			for _, c := range p.random.Perm(sectors / chunk)[:live] {
				p.change(t, "new", int64(c))
			}
			p.addNew(t)
			m := mount(t, cow.Path, p.new.Path)
			delta := copied(t, m.delta())
			lines, err := os.ReadFile(filepath.Join(m.dir, "exceptions"))
			if err != nil {
				t.Fatal(err)
			}
			if got := countLines(lines); got != live {
				t.Errorf("the delta has %d exceptions, want %d", got, live)
			}
			p.apply(t, delta)
		})
	}
}

func countLines(text []byte) int {
	n := 0
	for _, b := range text {
		if b == '\n' {
			n++
		}
	}
	return n
}

// The base's store grows while it is read.
func TestGrowingStore(t *testing.T) {
	const sectors, chunk, rounds = 65536, 8, 3
	p := newPair(t, sectors, chunk, 100)
	order := p.random.Perm(sectors / chunk)
	var deltas []string
	for part := range slices.Chunk(order, len(order)/rounds+1) {
		before := p.base.Status(t)
		halt := p.keepWriting(t, part)
		m := mount(t, p.base.COW.Path, p.new.Path)
		if after := p.base.Status(t); before == after {
			t.Errorf("a precondition: the store did not grow while it was mounted, it is %s", after)
		}
		deltas = append(deltas, copied(t, m.delta()))
		m.unmount(t)
		halt()
	}
	for _, delta := range deltas {
		p.apply(t, delta)
	}
}

// keepWriting writes to chunks of the volume, until all are written or the caller
// halts it.
func (p *pair) keepWriting(t *testing.T, chunks []int) (halt func()) {
	t.Helper()
	stop, stopped := make(chan struct{}), make(chan error, 1)
	started := make(chan struct{})
	go func() {
		for i, c := range chunks {
			if err := p.volume.TryWrite("later", int64(c)*p.base.Chunk, p.base.Chunk); err != nil {
				stopped <- err
				return
			}
			if i == 0 {
				close(started)
			}
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
		}
		stopped <- nil
	}()
	// The writer ends before the volume does, however the test ends.
	halt = sync.OnceFunc(func() {
		close(stop)
		if err := <-stopped; err != nil {
			t.Errorf("the writer: %v", err)
		}
	})
	t.Cleanup(halt)
	select {
	case <-started:
	case err := <-stopped:
		t.Fatalf("the writer: %v", err)
	}
	return halt
}

// A store that overflowed misses changes: nothing can be made of it.
func TestOverflow(t *testing.T) {
	p := withBase(t, 8192, 8, dm.Cow(t, "base", 512))
	for c := range int64(100) {
		p.change(t, "new", c)
	}
	if status := p.base.Status(t); status != "Invalid" {
		t.Fatalf("a precondition: the snapshot is %q, want an overflowed one", status)
	}
	p.addNew(t)

	dir := t.TempDir()
	_, stderr, code := dm.Try(t, nil, "mount", "--cow", p.base.COW.Path, "--source", p.new.Path, dir)
	refused(t, "mount", stderr, code)
	if isMounted(t, dir) {
		t.Error("mount left something mounted")
		dm.Run(t, "umount", dir)
	}
	if names := list(t, dir); len(names) != 0 {
		t.Errorf("mount left %q in the mountpoint", names)
	}

	extracted := filepath.Join(t.TempDir(), "extracted")
	_, stderr, code = dm.Try(t, nil, "extract", "--cow", p.base.COW.Path, "--source", p.new.Path, "-o", extracted)
	refused(t, "extract", stderr, code)
	if info, err := os.Stat(extracted); err == nil && info.Size() > 0 {
		t.Errorf("extract left a delta of %d bytes", info.Size())
	}
	failsBoth(t, []string{p.base.Path, "it overflowed", "only a first sync helps (--full)", "larger"}, p.base.Path, p.new.Path)
	// The refused devices are not left open.
	p.new.Remove(t)
	p.base.Remove(t)
}

// refused checks that a store was refused as one that overflowed.
func refused(t *testing.T, command, stderr string, code int) {
	t.Helper()
	if code != 1 {
		t.Errorf("%s: exit code %d, want 1", command, code)
	}
	if strings.Count(stderr, "\n") != 1 || !regexp.MustCompile("(?i)invalid|overflow").MatchString(stderr) {
		t.Errorf("%s complains %q, want one line that says that the snapshot is invalid or overflowed", command, stderr)
	}
}
