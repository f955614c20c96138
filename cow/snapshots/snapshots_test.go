// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/report"
)

const storesDir = "../../testdata/stores"

// image unpacks an image of a store in testdata.
func image(t *testing.T, store, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join(storesDir, store, name+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// file writes a file, and returns its path.
func file(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// copyOf are the options for a copy of a store in testdata, with the new volume as its
// source.
func copyOf(t *testing.T, store string) Options {
	t.Helper()
	return Options{COW: file(t, image(t, store, "cow")), Source: file(t, image(t, store, "new"))}
}

func mustOpen(t *testing.T, o Options) *Pair {
	t.Helper()
	p, err := Open(o)
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

// content reads all of a delta.
func content(t *testing.T, r io.ReaderAt, bytes int64) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(r, 0, bytes))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// exceptions are the old and new chunks that a store lists, read without the package
// that is tested.
func exceptions(store []byte) (chunkBytes uint64, list [][2]uint64) {
	le := binary.LittleEndian
	chunkBytes = 512 * uint64(le.Uint32(store[12:]))
	perArea := chunkBytes / 16
	for area := uint64(0); ; area++ {
		entries := store[(1+area*(perArea+1))*chunkBytes:][:chunkBytes]
		for ; len(entries) > 0; entries = entries[16:] {
			e := [2]uint64{le.Uint64(entries), le.Uint64(entries[8:])}
			if e[1] == 0 {
				return chunkBytes, list
			}
			list = append(list, e)
		}
	}
}

// merged is the volume with the chunks of a store in it.
func merged(volume, store []byte) []byte {
	volume = bytes.Clone(volume)
	chunkBytes, list := exceptions(store)
	for _, e := range list {
		copy(volume[e[0]*chunkBytes:], store[e[1]*chunkBytes:][:chunkBytes])
	}
	return volume
}

var goodStores = []string{"plain-4k", "fullarea-4k", "chunk512", "chunk64k-partial", "empty", "reused-4k"}

// A copy of a store makes a delta that turns the base into the new volume.
func TestOpenCopy(t *testing.T) {
	for _, store := range goodStores {
		t.Run(store, func(t *testing.T) {
			base, new := image(t, store, "base"), image(t, store, "new")
			o := copyOf(t, store)
			o.BaseID, o.NewID = "the-base", "the-new"
			var progress int64
			o.Progress = func(n int64) { progress = n }
			p := mustOpen(t, o)
			delta := content(t, p.Delta, p.Delta.Size())
			if !bytes.Equal(merged(base, delta), new) {
				t.Error("the delta does not make the new volume of the base")
			}
			unsealed := content(t, p.Unsealed, p.Unsealed.Size())
			if !bytes.Equal(merged(base, unsealed), new) {
				t.Error("nor does the unsealed one")
			}
			_, list := exceptions(image(t, store, "cow"))
			seal := p.Delta.Seal()
			if want := (cow.Seal{
				VolumeBytes: int64(len(new)), Exceptions: int64(len(list)), BodyBytes: int64(len(unsealed)), Base: "the-base", New: "the-new",
			}); seal != want {
				t.Errorf("the seal says %+v, want %+v", seal, want)
			}
			if progress != int64(len(list)) {
				t.Errorf("told of %d exceptions of %d", progress, len(list))
			}
			if len(p.Warnings) > 0 {
				t.Errorf("warns %q", p.Warnings)
			}
			if p.cow != nil {
				t.Error("the COW device is still open")
			}
			if err := p.CheckSource(); err != nil {
				t.Error(err)
			}
			for path, want := range map[string]bool{o.COW: true, o.Source: true, file(t, nil): false} {
				info, err := blockdev.Lookup(path)
				if err != nil {
					t.Fatal(err)
				}
				if got := p.IsMadeOf(info); got != want {
					t.Errorf("made of %s: %v", path, got)
				}
			}
		})
	}
}

// A full delta makes the volume of anything, whatever its last chunk has.
func TestOpenFull(t *testing.T) {
	for _, volumeBytes := range []int{1, 512, fullChunkBytes, fullChunkBytes + 1, 3*fullChunkBytes - 512} {
		volume := bytes.Repeat([]byte("volume "), volumeBytes/7+1)[:volumeBytes]
		p := mustOpen(t, Options{Full: true, Source: file(t, volume)})
		delta := content(t, p.Delta, p.Delta.Size())
		if got := merged(make([]byte, volumeBytes), delta); !bytes.Equal(got, volume) {
			t.Errorf("%d bytes: the delta makes another volume", volumeBytes)
		}
		if seal := p.Delta.Seal(); !seal.IsFull(fullChunkBytes) || seal.Base != "" || seal.New != "" {
			t.Errorf("%d bytes: the seal says %+v", volumeBytes, seal)
		}
		if text := p.ReportText(); !strings.Contains(text, "\nBase none, the whole volume\n") {
			t.Errorf("%d bytes: reported is\n%s", volumeBytes, text)
		}
	}
}

func TestFullChunkSize(t *testing.T) {
	const tib = 1 << 40
	for volumeBytes, want := range map[int64]int64{
		1:                   64 * kib,
		16*tib - 1:          64 * kib,
		16 * tib:            128 * kib,
		32*tib - 1:          128 * kib,
		32 * tib:            256 * kib,
		maxFullChunks << 21: 4 << 20,
	} {
		if got := fullChunkSize(volumeBytes); got != want {
			t.Errorf("%d bytes: chunks of %d, want %d", volumeBytes, got, want)
		}
	}
}

// The second list of digests is that of the delta that the same pair makes of the base.
func TestBaseCheckOfACopy(t *testing.T) {
	for _, store := range goodStores {
		t.Run(store, func(t *testing.T) {
			o := copyOf(t, store)
			o.BaseCheck = true
			p := mustOpen(t, o)
			if p.cow == nil {
				t.Error("the COW device, which has the base's data, is closed")
			}
			delta, seal := content(t, p.Delta, p.Delta.Size()), p.Delta.Seal()
			if !seal.BaseCheck {
				t.Fatalf("the seal says %+v", seal)
			}
			opened, err := cow.Open(bytes.NewReader(delta))
			if err == nil {
				err = opened.ReadList()
			}
			if err != nil {
				t.Fatal(err)
			}
			for list, held := range map[cow.List]string{cow.OfNew: o.Source, cow.OfBase: file(t, image(t, store, "base"))} {
				b, err := os.ReadFile(held)
				if err != nil {
					t.Fatal(err)
				}
				err = opened.VerifyVolume(t.Context(), bytes.NewReader(b), list, func(block int64) { t.Errorf("list %d: block %d differs", list, block) }, func(int64) {})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// There is no base check of chunks that a copy of a store does not hold.
func TestNoBaseCheck(t *testing.T) {
	o := copyOf(t, "plain-4k")
	o.BaseCheck = true
	p := mustOpen(t, o)
	if _, err := p.baseContent(nil, changes{newOnly: 3}); err == nil || !strings.Contains(err.Error(), o.COW+": what the base held in the 3 chunks") {
		t.Errorf("chunks that only the new snapshot's store has: %v", err)
	}
	p.members.base = &blockdev.Snapshot{Info: blockdev.Info{Path: "vg/base"}}
	if _, err := p.baseContent(nil, changes{extended: 1}); err == nil || !strings.Contains(err.Error(), "vg/base ends before the new snapshot does") {
		t.Errorf("a volume that grew: %v", err)
	}
}

func TestIdentities(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, c := range []struct{ base, new, wantBase, wantNew string }{
		{"", "", "", ""}, // files say nothing of themselves
		{"a", "b", "a", "b"},
		{"", "b", "", "b"},
		{"a", "", "a", ""},
		{long, "with a blank", cow.Identity(long), cow.Identity("with a blank")},
	} {
		o := copyOf(t, "empty")
		o.BaseID, o.NewID = c.base, c.new
		if seal := mustOpen(t, o).Delta.Seal(); seal.Base != c.wantBase || seal.New != c.wantNew || seal.Origin != "" {
			t.Errorf("%q and %q: the seal says %+v", c.base, c.new, seal)
		}
	}
}

func TestTexts(t *testing.T) {
	o := copyOf(t, "plain-4k")
	o.BaseID, o.NewID = "a", "b"
	p := mustOpen(t, o)
	p.Warnings = []string{"mind the gap"}
	p.extended = 7
	if want := "magic 0x70416e53\nversion 1\nvalid yes\nchunk_size 4 KB\n"; p.HeaderText() != want {
		t.Errorf("the header is\n%s\nwant\n%s", p.HeaderText(), want)
	}
	text := p.ReportText()
	if !strings.HasPrefix(text, "Exception chunks 2\nExceptions 320\n") {
		t.Errorf("reported is\n%s", text)
	}
	end := fmt.Sprintf("Base %s a\nNew %s b\nExtended by 7\nSealed size %s\nWarning: mind the gap\n", o.COW, o.Source, report.SizeText(p.Delta.Size()))
	if !strings.HasSuffix(text, end) {
		t.Errorf("reported is\n%s\nwant at its end\n%s", text, end)
	}
}

// Each error says what it is about.
func TestOpenErrors(t *testing.T) {
	good := copyOf(t, "plain-4k")
	none, dir, empty, short := filepath.Join(t.TempDir(), "none"), t.TempDir(), file(t, nil), file(t, make([]byte, 4096))
	cut := file(t, image(t, "plain-4k", "cow")[:64<<10])
	for name, c := range map[string]struct {
		o        Options
		says     []string
		is       error
		notAPair bool // it fails before there is a pair to blame
	}{
		"no source":                 {Options{COW: good.COW, Source: none}, []string{"source: ", none}, fs.ErrNotExist, true},
		"a directory for source":    {Options{COW: good.COW, Source: dir}, []string{"source: ", dir}, nil, true},
		"an empty source":           {Options{COW: good.COW, Source: empty}, []string{"source: " + empty + ": it is empty"}, nil, false},
		"an empty source, full":     {Options{Full: true, Source: empty}, []string{"source: " + empty + ": it is empty"}, nil, false},
		"no COW device":             {Options{COW: none, Source: good.Source}, []string{"COW device: ", none}, fs.ErrNotExist, false},
		"an empty COW device":       {Options{COW: empty, Source: good.Source}, []string{"base: ", empty}, nil, false},
		"zeros for a COW device":    {Options{COW: short, Source: good.Source}, []string{"base: ", short}, cow.ErrBadData, false},
		"a volume for a COW device": {Options{COW: good.Source, Source: good.Source}, []string{"base: ", good.Source}, cow.ErrBadData, false},
		"a COW device cut off":      {Options{COW: cut, Source: good.Source}, []string{"base: ", cut}, cow.ErrBadData, false},
		"a source too small":        {Options{COW: good.COW, Source: short}, []string{"base: ", good.COW}, cow.ErrBadData, false},
		"base and new the same":     {Options{COW: good.COW, Source: good.Source, BaseID: "x", NewID: "x"}, []string{"base and new are the same: x"}, nil, false},
		"an overflow":               {copyOf(t, "overflow"), []string{"base: "}, cow.ErrBadData, false},
		"a file for base":           {Options{Base: good.COW, Source: good.Source}, []string{"base: " + good.COW + " is no snapshot"}, nil, false},
		"no base":                   {Options{Base: none, Source: good.Source}, []string{"base: ", none}, fs.ErrNotExist, false},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Open(c.o)
			if err == nil {
				p.Close()
				t.Fatal("it is taken")
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it says %q, and not %q", err, want)
				}
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%q is no %q", err, c.is)
			}
			if pair := new(OpenError); errors.As(err, &pair) == c.notAPair {
				t.Errorf("%q is that of a pair: %v", err, !c.notAPair)
			}
		})
	}
}

func TestReadStore(t *testing.T) {
	for _, name := range goodStores {
		t.Run(name, func(t *testing.T) {
			path := file(t, image(t, name, "cow"))
			store, err := ReadStore(path, cow.StoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			chunkBytes, list := exceptions(image(t, name, "cow"))
			if store.ChunkBytes != int64(chunkBytes) || store.Changed.Len() != int64(len(list)) || !store.Valid || store.Seal != nil || store.Name != nil {
				t.Errorf("%+v, with %d chunks, want %d of %d bytes", store, store.Changed.Len(), len(list), chunkBytes)
			}
			for _, e := range list {
				if !store.Changed.Contains(e[0]) {
					t.Errorf("chunk %d is not in it", e[0])
				}
			}
			device, err := openStore(path)
			if err != nil {
				t.Fatal(err)
			}
			defer device.Close()
			if found := device.Info().Path; found != path {
				t.Errorf("its store is on %q", found)
			}
		})
	}
}

// The store of a sealed delta has the seal and the name, and its trailer is checked.
func TestReadStoreOfADelta(t *testing.T) {
	o := copyOf(t, "plain-4k")
	o.BaseID, o.NewID = "a", "b"
	p := mustOpen(t, o)
	delta := content(t, p.Delta, p.Delta.Size())
	store, err := ReadStore(file(t, delta), cow.StoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name, err := p.Delta.Name()
	if err != nil {
		t.Fatal(err)
	}
	if store.Seal == nil || *store.Seal != p.Delta.Seal() || store.Name == nil || *store.Name != name {
		t.Errorf("the seal is %+v, and the name %v; want %+v and %v", store.Seal, store.Name, p.Delta.Seal(), name)
	}

	body := p.Delta.Seal().BodyBytes
	damaged := bytes.Clone(delta)
	damaged[body+3] ^= 1
	for name, b := range map[string][]byte{"the trailer cut off": delta[:body], "the end of its footer cut off": delta[:bytes.LastIndex(delta, []byte("ddsftail"))+63], "a damaged digest": damaged} {
		path := file(t, b)
		if _, err := ReadStore(path, cow.StoreOptions{}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadStoreErrors(t *testing.T) {
	none, empty := filepath.Join(t.TempDir(), "none"), file(t, nil)
	overflow := file(t, image(t, "overflow", "cow"))
	if _, err := ReadStore(none, cow.StoreOptions{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), none) {
		t.Errorf("nothing there: %v", err)
	}
	if _, err := ReadStore(empty, cow.StoreOptions{}); err == nil || !strings.Contains(err.Error(), empty) {
		t.Errorf("an empty file: %v", err)
	}
	if _, err := ReadStore(overflow, cow.StoreOptions{}); !errors.Is(err, cow.ErrBadData) || !strings.Contains(err.Error(), overflow) {
		t.Errorf("an overflow: %v", err)
	}
}

// It is no error if the device mapper refuses to answer; other failures are errors.
func TestNotToBeAsked(t *testing.T) {
	for err, want := range map[error]bool{fs.ErrPermission: true, dm.ErrNoMapper: true, fs.ErrNotExist: false, io.ErrUnexpectedEOF: false} {
		if got := notToBeAsked(fmt.Errorf("some: %w", err)); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// A copy of the base's store may be older than the new snapshot, so a wrong order is a
// warning and no error.
func TestOrderOfACopy(t *testing.T) {
	m := members{new: &blockdev.Snapshot{Info: blockdev.Info{Path: "vg/new"}}}
	for _, readOnly := range []bool{false, true} {
		c := union(store(4*kib, 1), store(4*kib, 1, 2, 3), 64*kib, 64*kib, readOnly)
		warning, err := m.checkOrder(c, readOnly, Options{})
		if err != nil || !strings.Contains(warning, "vg/new has 2 chunks that the base's does not") {
			t.Errorf("read-only %v: %q, %v", readOnly, warning, err)
		}
	}
}

// A device that is written to while it is read gives no trailer.
func TestWrittenSource(t *testing.T) {
	o := copyOf(t, "plain-4k")
	f, err := os.OpenFile(o.Source, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := dm.NewLoop(f, true)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o.Source = l.Name()
	p := mustOpen(t, o)
	body := content(t, p.Delta, p.Delta.Seal().BodyBytes)
	if err := p.CheckSource(); err != nil {
		t.Error(err)
	}
	if _, err := l.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	want := "source " + l.Name() + ": it was written to while it was read"
	if err := p.CheckSource(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("says %v, want %q", err, want)
	}
	if n, err := p.Delta.ReadAt(make([]byte, 512), int64(len(body))); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("the trailer: %d bytes, %v, want %q", n, err, want)
	}
}
