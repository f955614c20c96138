// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ddsfs/cow/snapshots"
	"ddsfs/testdata/lab/dm"
)

// plainPool is a thin pool without LVM, so that what lies below it can be replaced. Its
// first volume, with the id 0, is data.
type plainPool struct {
	*dm.Pool
	disks   [2]string // of metadata and data
	volume  *dm.Device
	sectors int64 // of the volume
	lastID  int
}

// The sizes of a plainPool.
const (
	plainMetaSectors = 4 << 20 / dm.SectorSize
	plainDataSectors = 48 << 20 / dm.SectorSize
)

func newPlainPool(t *testing.T, blockSectors, sectors int64) *plainPool {
	t.Helper()
	p := &plainPool{disks: [2]string{dm.Blank(t, plainMetaSectors), dm.Blank(t, plainDataSectors)}, sectors: sectors}
	p.Pool = dm.NewPool(t, p.disks[0], plainMetaSectors, plainDataSectors, blockSectors)
	p.heals(t, p.Data)
	p.Message(t, "create_thin 0")
	p.volume = p.device(t, "data", 0)
	return p
}

// breaks replaces what lies below the pool's metadata or data.
func (p *plainPool) breaks(t *testing.T, device *dm.Device, target string) {
	t.Helper()
	size := int64(plainDataSectors)
	if device == p.Metadata {
		size = plainMetaSectors
	}
	device.Load(t, fmt.Sprintf("0 %d %s", size, target))
}

func (p *plainPool) heals(t *testing.T, device *dm.Device) {
	t.Helper()
	disk := p.disks[1]
	if device == p.Metadata {
		disk = p.disks[0]
	}
	p.breaks(t, device, "linear "+disk+" 0")
}

func (p *plainPool) device(t *testing.T, name string, id int, options ...string) *dm.Device {
	t.Helper()
	return dm.Create(t, "plain-"+name, p.sectors, fmt.Sprintf("thin %s %d", p.Path, id), append(options, "--uuid", "lab-thin-"+name)...)
}

// snapshot makes a read-only snapshot of the volume, whose ids count from 1.
func (p *plainPool) snapshot(t *testing.T, name string) {
	t.Helper()
	p.lastID++
	p.Snapshot(t, p.lastID, p.volume, 0)
	p.device(t, name, p.lastID, "--readonly")
}

func plainPath(name string) string { return "/dev/mapper/plain-" + name }

func (p *plainPool) write(t *testing.T, what string, sector, count int64) {
	t.Helper()
	writeTo(t, p.volume.Path, what, sector, count)
}

// held is the pool's metadata snapshot as its status has it, - for none.
func (p *plainPool) held(t *testing.T) string {
	t.Helper()
	return strings.Fields(p.Status(t))[3]
}

// discard discards a part of a device, in bytes.
func discard(file *os.File, offset, length int64) error {
	part := [2]uint64{uint64(offset), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&part))); errno != 0 {
		return errno
	}
	return nil
}

// discard discards a part of the volume, in sectors.
func (p *plainPool) discard(t *testing.T, sector, count int64) {
	t.Helper()
	file, err := os.OpenFile(p.volume.Path, os.O_WRONLY, 0)
	if err == nil {
		err = errors.Join(discard(file, sector*dm.SectorSize, count*dm.SectorSize), file.Sync(), file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// resize makes the volume larger or smaller.
func (p *plainPool) resize(t *testing.T, sectors int64) {
	t.Helper()
	p.sectors = sectors
	p.volume.Load(t, fmt.Sprintf("0 %d thin %s 0", sectors, p.Path))
}

// pairOf are the options for a pair of plain snapshots.
func pairOf(base, new string) snapshots.Options {
	return snapshots.Options{Base: plainPath(base), Source: plainPath(new), StateDir: stateDir}
}

// openPair opens a pair.
func openPair(t *testing.T, o snapshots.Options) *snapshots.Pair {
	t.Helper()
	p, err := snapshots.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// deltaOf reads the delta of a pair.
func deltaOf(t *testing.T, p *snapshots.Pair) []byte {
	t.Helper()
	delta, err := io.ReadAll(io.NewSectionReader(p.Delta, 0, p.Delta.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return delta
}

// Blocks of any size, of which the last one is cut off by the volume's end, as the last
// chunk is. New ones have what others left there, as the pool does not zero them.
func TestPoolBlocks(t *testing.T) {
	for _, block := range []int64{64 << 10, 192 << 10, 1 << 20} {
		t.Run(fmt.Sprint(block>>10), func(t *testing.T) {
			block, chunks := block/dm.SectorSize, int(block>>16) // of a block
			p := newPlainPool(t, block, 10*block+block/2+73)
			p.write(t, "of others", 0, p.sectors)
			p.discard(t, 0, p.sectors)
			for _, b := range []int64{0, 1, 3, 4, 5, 6, 8, 9} {
				p.write(t, "base", b*block+16, 8)
			}
			p.snapshot(t, "base")
			base := dm.Read(t, plainPath("base"), true)
			if !bytes.Contains(base, []byte("of others")) {
				t.Error("a precondition: a new block has what was there before")
			}
			p.write(t, "new", block+16, 8)     // a mapped block
			p.write(t, "new", 2*block+32, 8)   // a new one
			p.write(t, "base", 9*block+16, 8)  // with what it has already
			p.discard(t, 4*block, 2*block)     // whole blocks
			p.discard(t, 8*block+8, block/2)   // a part of one
			p.write(t, "last", p.sectors-1, 1) // the partial one
			p.snapshot(t, "new")
			delta := deliver(t, plainPath("base"), plainPath("new"), "--base-check")
			if n, all := infoOf(t, delta).Exceptions, int(p.sectors/128+1); n < 5*chunks || n > all-3*chunks {
				t.Errorf("%d of %d chunks", n, all)
			}
			// The target proves that it is the base, or does not.
			other := bytes.Clone(base)
			other[(block+16)*dm.SectorSize]++
			target := file(t, other)
			dm.Fails(t, nil, 3, []string{target, "refused"}, "apply", "--state-dir", t.TempDir(), delta, target)
			dm.Holds(t, "what is not the base", target, other)
			target = file(t, base)
			dm.Ddsfs(t, "apply", "--state-dir", t.TempDir(), delta, target)
			dm.Holds(t, "the target of the base check", target, dm.Read(t, plainPath("new"), true))
			full(t, plainPath("new"))

			p.resize(t, p.sectors+3*block+5)
			p.write(t, "grown", 12*block+8, 8)
			p.snapshot(t, "grown")
			deliver(t, plainPath("new"), plainPath("grown"))
		})
	}
}

// A volume that was reduced and grew again shows what its end held before, as lvreduce
// leaves the mappings. Both snapshots have them, and only the newer one is large enough to
// show them.
func TestPoolRegrown(t *testing.T) {
	p := newPlainPool(t, 128, 16384)
	p.write(t, "old", 0, 8)
	p.write(t, "old", 12288, 256)
	p.resize(t, 8192)
	p.snapshot(t, "base")
	p.resize(t, 14336)
	p.write(t, "new", 10240, 8)
	p.snapshot(t, "new")
	deliver(t, plainPath("base"), plainPath("new"))
	if !bytes.HasPrefix(dm.Read(t, plainPath("new"), true)[12288*dm.SectorSize:], []byte("old")) {
		t.Error("a precondition: the volume shows again what it held")
	}
}

// thinDelta are the blocks that thin_delta calls different, of a copy of the metadata.
func thinDelta(t *testing.T, metadata string, a, b int) map[int64]bool {
	t.Helper()
	type part struct {
		Begin  int64 `xml:"begin,attr"`
		Length int64 `xml:"length,attr"`
	}
	var said struct {
		Diff struct {
			Different []part `xml:"different"`
			LeftOnly  []part `xml:"left_only"`
			RightOnly []part `xml:"right_only"`
		} `xml:"diff"`
	}
	text := dm.Run(t, "thin_delta", "--snap1", fmt.Sprint(a), "--snap2", fmt.Sprint(b), metadata)
	if err := xml.Unmarshal([]byte(text), &said); err != nil {
		t.Fatalf("thin_delta: %v\n%s", err, text)
	}
	blocks := make(map[int64]bool)
	for _, p := range slices.Concat(said.Diff.Different, said.Diff.LeftOnly, said.Diff.RightOnly) {
		for b := range p.Length {
			blocks[p.Begin+b] = true
		}
	}
	return blocks
}

// Any two snapshots of a volume that was written to and discarded at random: the delta has
// the blocks that thin_delta calls different, and no others, and makes one of the other.
func TestPoolAgainstThinDelta(t *testing.T) {
	const chunk = 64 << 10
	for _, c := range []struct{ blockSectors, sectors int64 }{{128, 16384 + 77}, {384, 40001}} {
		t.Run(fmt.Sprint(c.blockSectors), func(t *testing.T) {
			p := newPlainPool(t, c.blockSectors, c.sectors)
			r := rand.New(rand.NewPCG(13, uint64(c.blockSectors)))
			file, err := os.OpenFile(p.volume.Path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			var names []string
			var images [][]byte
			for round := range 4 {
				for i := range 4 + r.IntN(12) {
					at := r.Int64N(c.sectors)
					count := min(1+r.Int64N(1<<r.IntN(11)), c.sectors-at)
					if r.IntN(3) == 0 {
						err = discard(file, at*dm.SectorSize, count*dm.SectorSize)
					} else {
						_, err = file.WriteAt(dm.Fill(fmt.Sprint("round ", round, i), at, count), at*dm.SectorSize)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := file.Sync(); err != nil {
					t.Fatal(err)
				}
				name := fmt.Sprint("snapshot-", round)
				p.snapshot(t, name)
				names, images = append(names, name), append(images, dm.Read(t, plainPath(name), true))
			}
			p.Status(t) // commits
			metadata := dm.Blank(t, plainMetaSectors)
			dm.Run(t, "dd", "if="+p.Metadata.Path, "of="+metadata, "bs=1M", "iflag=direct", "oflag=direct", "status=none")
			for a := range names {
				for b := range names {
					if a == b {
						continue
					}
					o := pairOf(names[a], names[b])
					o.NewWasWritten = true // the order is any
					pair := openPair(t, o)
					blocks := thinDelta(t, metadata, a+1, b+1)
					l := pair.Delta.Body().Layer()
					image := bytes.Clone(images[a])
					for run := range l.Changed.Runs {
						for n := run.Chunk; n < run.End(); n++ {
							offset := int64(n) * chunk
							if block := offset / (c.blockSectors * dm.SectorSize); !blocks[block] {
								t.Errorf("%s to %s: chunk %d in block %d is not tight", names[a], names[b], n, block)
							}
							part := image[offset:min(offset+chunk, int64(len(image)))]
							if _, err := l.Content.ReadAt(part, offset); err != nil && err != io.EOF {
								t.Fatal(err)
							}
						}
					}
					for run := range l.Zeros.Runs {
						if part := images[b][run.Chunk*chunk : min(run.End()*chunk, uint64(len(image)))]; len(bytes.Trim(part, "\x00")) > 0 {
							t.Errorf("%s to %s: chunks %d to %d are no zeros", names[a], names[b], run.Chunk, run.End())
						}
					}
					for block := range blocks {
						if offset := block * c.blockSectors * dm.SectorSize; !l.Changed.Contains(uint64(offset / chunk)) {
							t.Errorf("%s to %s: block %d is missing", names[a], names[b], block)
						}
					}
					dm.Equal(t, names[a]+" to "+names[b], image, images[b])
				}
			}
		})
	}
}

// A pool that fails while NEW is read, or before: an error, and never a delta that looks
// good.
func TestPoolFails(t *testing.T) {
	for _, c := range []struct {
		name       string
		do         func(t *testing.T, p *plainPool, fails func(words ...string))
		unreadable bool // NEW, after that
	}{
		{"its data", func(t *testing.T, p *plainPool, fails func(words ...string)) {
			p.breaks(t, p.Data, "error")
			fails("plain-new", "input/output error")
		}, true},
		{"a commit", func(t *testing.T, p *plainPool, fails func(words ...string)) {
			p.Metadata.Load(t, fmt.Sprintf("0 8 linear %s 0", p.disks[0]), fmt.Sprintf("8 %d flakey %s 8 0 60 1 error_writes", plainMetaSectors-8, p.disks[0]))
			p.Status(t) // commits
			p.heals(t, p.Metadata)
			if status := p.Status(t); !strings.Contains(status, " ro ") || !strings.Contains(status, "needs_check") {
				t.Errorf("a precondition: the pool is %q", status)
			}
			fails("thin pool pool", "needs a check")
		}, false},
		{"its metadata", func(t *testing.T, p *plainPool, fails func(words ...string)) {
			p.breaks(t, p.Metadata, "error")
			fails("thin pool pool", "has failed")
			fails("plain-new", "pool has failed")
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newBusyPool(t)
			want := deltaOf(t, openPair(t, pairOf("base", "new")))
			m := t.TempDir()
			dm.Ddsfs(t, "mount", plainPath("base"), plainPath("new"), m)
			out := filepath.Join(t.TempDir(), "delta")
			c.do(t, p, func(words ...string) {
				t.Helper()
				dm.Fails(t, nil, 1, words, "extract", plainPath("base"), plainPath("new"), "-o", out)
			})
			if left := list(t, filepath.Dir(out)); len(left) > 0 {
				t.Errorf("extract left %q", left)
			}
			content, err := os.ReadFile(filepath.Join(m, "delta.cow"))
			if (err != nil) != c.unreadable {
				t.Errorf("the mounted delta: %v", err)
			}
			if err == nil {
				dm.Equal(t, "the mounted delta", content, want)
			}
			p.heals(t, p.Metadata)
			p.heals(t, p.Data)
			dm.Ddsfs(t, "unmount", m)
		})
	}
}
