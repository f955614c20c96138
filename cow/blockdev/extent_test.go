// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// part is a part of a device: where it ends, and whether it is a hole.
type part struct {
	end  int64
	hole bool
}

func partsOf(t *testing.T, d *Device) (all []part) {
	t.Helper()
	for at := int64(0); at < d.Size(); {
		end, hole := d.Extent(at)
		if end <= at {
			t.Fatalf("what begins at byte %d ends at %d", at, end)
		}
		if again, same := d.Extent(end - 1); again != end || same != hole {
			t.Fatalf("from %d to %d, hole %v, but from the last byte to %d, hole %v", at, end, hole, again, same)
		}
		all = append(all, part{end, hole})
		at = end
	}
	return all
}

func TestExtent(t *testing.T) {
	const block, size = 64 << 10, 10*64<<10 + 100
	f, _ := randomFile(t, size)
	d, err := Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	check := func(when string, want ...part) {
		t.Helper()
		if got := partsOf(t, d); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", when, got, want)
		}
	}
	check("without holes", part{size, false})
	punch := func(first, end int64) {
		t.Helper()
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, first, end-first); err != nil {
			t.Fatal(err)
		}
	}
	punch(2*block, 5*block)
	check("a hole", part{2 * block, false}, part{5 * block, true}, part{size, false})
	punch(0, block)
	punch(9*block, 11*block)
	check("holes", part{block, true}, part{2 * block, false}, part{5 * block, true}, part{9 * block, false}, part{size, true})
	// What was cut off is not zeros, and a read of it fails.
	if err := f.Truncate(7 * block); err != nil {
		t.Fatal(err)
	}
	if end, hole := d.Extent(8 * block); end != size || hole {
		t.Errorf("after the end of a file that was cut off: to %d, hole %v", end, hole)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	punch(0, 11*block)
	check("all a hole", part{size, true})

	l, err := dm.NewLoop(f, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	onLoop, err := Open(l.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer onLoop.Close()
	if got := partsOf(t, onLoop); len(got) != 1 || got[0].hole {
		t.Errorf("a block device: %v", got)
	}
	proc, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	raw, err := proc.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if got := partsOf(t, &Device{file: proc, raw: raw, size: 100}); len(got) != 1 || got[0].hole {
		t.Errorf("where the file system tells no holes: %v", got)
	}
}

// What a file holds between its holes is found from any byte.
func TestNextData(t *testing.T) {
	const block = 64 << 10
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{block, 5 * block, 6 * block} {
		if _, err := f.WriteAt(make([]byte, block), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(9 * block); err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int64][2]int64{
		0: {block, 2 * block}, block + 5: {block + 5, 2 * block}, 2 * block: {5 * block, 7 * block}, 7 * block: {9 * block, 9 * block}, 9 * block: {9 * block, 9 * block},
	} {
		if begin, end, err := NextData(f, off); err != nil || ([2]int64{begin, end}) != want {
			t.Errorf("from byte %d: %d to %d, %v, want %v", off, begin, end, err, want)
		}
	}
}
