// SPDX-License-Identifier: GPL-2.0-or-later

package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow/dm"
)

// randomFile is a file of that size on a disk.
func randomFile(t testing.TB, bytes int64) (f *os.File, content []byte) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "ddsfs-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	content = make([]byte, bytes)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return f, content
}

// devices are the ways to have the file as a device: from its page cache, not in there,
// where the page cache can't be asked, and through a loop device, also where the kernel
// can't do many at once, and when only few pieces were asked for.
func devices(t testing.TB, f *os.File) map[string]*Device {
	t.Helper()
	l, err := dm.NewLoop(f, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	all := make(map[string]*Device)
	for name, path := range map[string]string{
		"file": f.Name(), "cold": f.Name(), "waits, cold": f.Name(),
		"loop": l.Name(), "unable loop": l.Name(), "few, loop": l.Name(),
	} {
		d, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		d.waits.Store(strings.HasPrefix(name, "waits"))
		if d.batches != nil {
			d.batches.unable = strings.HasPrefix(name, "unable")
			if d.batches.asked.Store(piecesWorthABatch); strings.HasPrefix(name, "few") {
				d.batches.asked.Store(-1 << 40)
			}
		}
		all[name] = d
	}
	return all
}

// somePieces are pieces of a file of that size, at any place, or all aligned, also in
// memory.
func somePieces(r *rand.Rand, fileBytes, count int64, aligned bool) (pieces [][]byte, offsets []int64) {
	for range count {
		unit := int64(1)
		if aligned {
			unit = 512
		}
		bytes := unit * (1 + r.Int64N(20<<10/unit))
		pieces = append(pieces, *alignedBuffer(bytes, unit))
		offsets = append(offsets, r.Int64N((fileBytes-bytes)/unit+1)*unit)
	}
	return pieces, offsets
}

func TestReadPieces(t *testing.T) {
	const fileBytes = 4 << 20
	f, content := randomFile(t, fileBytes)
	for name, d := range devices(t, f) {
		t.Run(name, func(t *testing.T) {
			var wg sync.WaitGroup
			for reader := range maxBatches + 2 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(reader), 1))
					for range 5 {
						if strings.HasSuffix(name, "cold") {
							_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
						}
						pieces, offsets := somePieces(r, fileBytes, r.Int64N(3*piecesAtOnce), r.IntN(2) == 0)
						n, err := d.ReadPieces(pieces, offsets)
						if n != len(pieces) || err != nil {
							t.Errorf("%d of %d pieces: %v", n, len(pieces), err)
							return
						}
						for i, p := range pieces {
							if !bytes.Equal(p, content[offsets[i]:][:len(p)]) {
								t.Errorf("piece %d of %d: %d bytes at byte %d differ", i, len(pieces), len(p), offsets[i])
								return
							}
						}
					}
				})
			}
			wg.Wait()
			if d.batches != nil && d.batches.unable != strings.HasPrefix(name, "unable") {
				t.Errorf("many at once: %v", !d.batches.unable)
			}
			if d.waits.Load() != strings.HasPrefix(name, "waits") {
				t.Errorf("the page cache is not asked: %v", d.waits.Load())
			}
		})
	}
}

// The first piece that can't be read is named, with all before it read.
func TestReadPiecesErrors(t *testing.T) {
	const fileBytes = 4 << 20
	f, content := randomFile(t, fileBytes)
	for name, d := range devices(t, f) {
		for _, bad := range []int{0, 1, 5, piecesAtOnce, 2*piecesAtOnce - 1} {
			pieces, offsets := somePieces(rand.New(rand.NewPCG(2, uint64(bad))), fileBytes, 2*piecesAtOnce, true)
			offsets[bad] = fileBytes - 512
			pieces[bad] = *alignedBuffer(1024, 512)
			n, err := d.ReadPieces(pieces, offsets)
			where := fmt.Sprintf("%s: read 1024 bytes at byte %d: ", d.file.Name(), offsets[bad])
			if n != bad || !errors.Is(err, io.ErrUnexpectedEOF) || !strings.HasPrefix(err.Error(), where) {
				t.Errorf("%s: %d pieces, %v, want %d, and %s", name, n, err, bad, where)
				continue
			}
			for i, p := range pieces[:n] {
				if !bytes.Equal(p, content[offsets[i]:][:len(p)]) {
					t.Errorf("%s: piece %d differs", name, i)
				}
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		pieces, offsets := somePieces(rand.New(rand.NewPCG(2, 3)), fileBytes, 10, true)
		if n, err := d.ReadPieces(pieces, offsets); n != 0 || !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: closed: %d pieces, %v", name, n, err)
		}
	}
}

// A machine may have no room for more.
func TestReadPiecesWithoutABatch(t *testing.T) {
	f, content := randomFile(t, 1<<20)
	d := devices(t, f)["loop"]
	b, err := newBatch()
	if err != nil {
		t.Fatal(err)
	}
	b.destroy() // the kernel does not know it any more
	b.context = 1
	d.batches.idle = []*batch{b}
	pieces, offsets := somePieces(rand.New(rand.NewPCG(4, 5)), 1<<20, 100, true)
	if n, err := d.ReadPieces(pieces, offsets); n != len(pieces) || err != nil {
		t.Fatalf("%d pieces, %v", n, err)
	}
	for i, p := range pieces {
		if !bytes.Equal(p, content[offsets[i]:][:len(p)]) {
			t.Fatalf("piece %d differs", i)
		}
	}
	if !d.batches.unable {
		t.Error("it is tried again and again")
	}
}

// contexts is how many contexts of the kernel's asynchronous I/O this process has.
func contexts(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(maps), "[aio]")
}

// Many pieces are read together, and closing gives back what the machine has only so
// many of.
func TestBatchesComeAndGo(t *testing.T) {
	f, _ := randomFile(t, 1<<20)
	d := devices(t, f)["few, loop"]
	d.batches.asked.Store(0)
	before := contexts(t)
	buf, pieces, offsets := make([]byte, 1<<20), make([][]byte, piecesAtOnce), make([]int64, piecesAtOnce)
	for i := range pieces {
		pieces[i], offsets[i] = buf[i*4096:][:4096], int64(len(pieces)-1-i)*4096
	}
	for read := int64(0); read <= piecesWorthABatch; read += piecesAtOnce {
		if contexts(t) != before {
			t.Errorf("few pieces, %d, are read with what costs time to give back", read)
		}
		if _, err := d.ReadPieces(pieces, offsets); err != nil {
			t.Fatal(err)
		}
	}
	if made := contexts(t) - before; made == 0 {
		t.Error("many pieces are read one by one")
	}
	for range 2 * maxBatches {
		if _, err := d.ReadPieces(pieces, offsets); err != nil {
			t.Fatal(err)
		}
	}
	if made := contexts(t) - before; made != 1 {
		t.Errorf("one reader has %d contexts", made)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if after := contexts(t); after != before {
		t.Errorf("%d contexts, and %d before", after, before)
	}
}

// A batch that is in use when the device is closed is freed afterwards.
func TestBatchInUseAtClose(t *testing.T) {
	f, _ := randomFile(t, 1<<20)
	d := devices(t, f)["loop"]
	before := contexts(t)
	b := d.batches.take()
	if made := contexts(t) - before; b == nil || made != 1 {
		t.Fatalf("%d contexts", made)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d.batches.giveBack(b)
	if after := contexts(t); after != before {
		t.Errorf("%d contexts, and %d before", after, before)
	}
}

// The disk is asked for all that is not in the page cache before the first piece is
// waited for.
func TestReadCachedAsksForAll(t *testing.T) {
	const pieceBytes = 4096
	f, content := randomFile(t, 8<<20)
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	d, err := Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var pieces [][]byte
	var offsets []int64
	for i := range int64(piecesAtOnce) {
		// Backwards, as the kernel would read ahead of what looks like a sequence.
		pieces, offsets = append(pieces, make([]byte, pieceBytes)), append(offsets, (piecesAtOnce-1-i)*7*pieceBytes)
	}
	var done pieceSet
	d.readCached(pieces, offsets, &done)
	for i, p := range pieces {
		if done[i] && !bytes.Equal(p, content[offsets[i]:][:pieceBytes]) {
			t.Errorf("piece %d differs", i)
		}
		var c unix.Cachestat_t
		err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(offsets[i]), Len: pieceBytes}, &c, 0)
		if err != nil || c.Cache == 0 {
			t.Errorf("piece %d at byte %d: not in the page cache, and not on its way there: %v", i, offsets[i], err)
		}
	}
}

// Some file systems can't read without a wait.
func TestReadCachedUnable(t *testing.T) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := &Device{file: f}
	if d.raw, err = f.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	var done pieceSet
	d.readCached([][]byte{make([]byte, 8), make([]byte, 8)}, []int64{0, 8}, &done)
	if done != (pieceSet{}) {
		t.Error("pieces are said to be read")
	}
	if !d.waits.Load() {
		t.Error("it is asked again each time")
	}
}

func BenchmarkReadPieces(b *testing.B) {
	const fileBytes, pieceBytes = 64 << 20, 4096
	f, _ := randomFile(b, fileBytes)
	for _, name := range []string{"file", "loop"} {
		d := devices(b, f)[name]
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, piecesAtOnce*pieceBytes)
			pieces, offsets := make([][]byte, piecesAtOnce), make([]int64, piecesAtOnce)
			at := int64(0)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				for i := range pieces {
					pieces[i], offsets[i] = buf[i*pieceBytes:][:pieceBytes], at
					at = (at + 4*pieceBytes) % fileBytes
				}
				if _, err := d.ReadPieces(pieces, offsets); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
