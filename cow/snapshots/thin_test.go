// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/thin"
	"ddsfs/cow/wayout"
)

func TestChunksOf(t *testing.T) {
	for _, test := range []struct {
		first, end              uint64
		blockBytes, volumeBytes int64
		wantFirst, wantEnd      uint64
	}{
		{0, 1, 64 * kib, 64 * kib, 0, 1},
		{3, 5, 64 * kib, 1 << 30, 3, 5},
		{3, 5, 192 * kib, 1 << 30, 9, 15},
		{0, 1, 192 * kib, 100 * kib, 0, 2},            // a partial block, and a partial chunk
		{1, 2, 192 * kib, 192*kib + 512, 3, 4},        // of which a sector is on the volume
		{1, 2, 192 * kib, 192 * kib, 3, 3},            // past the end
		{1 << 50, 1 << 51, 64 * kib, 1 << 20, 16, 16}, // far past it
		{0, 1 << 33, 1 << 30, 1<<62 + 1, 0, 1<<46 + 1},
	} {
		first, end := chunksOf(test.first, test.end, test.blockBytes, test.volumeBytes)
		if first != test.wantFirst || end != test.wantEnd {
			t.Errorf("%+v: %d to %d", test, first, end)
		}
	}
}

func runsOf(runs []thin.Run) iter.Seq2[thin.Run, error] {
	return func(yield func(thin.Run, error) bool) {
		for _, r := range runs {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// Two volumes, chunk by chunk: the delta has the chunks that differ and those after the
// base's end, and zeros where the new volume maps nothing.
func TestChangesOf(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 13))
			block := int64(thinChunkBytes) * (1 + r.Int64N(4))
			newBytes := 512 * (1 + r.Int64N(20*block/512))
			baseBytes := newBytes
			if r.IntN(2) == 0 {
				baseBytes = 512 * (1 + r.Int64N(newBytes/512))
			}
			external := r.IntN(4) == 0
			blocksIn := func(bytes int64) uint64 { return uint64((bytes-1)/block) + 1 }
			// What each of them maps a block to, 0 for nothing. The base may have been
			// larger before.
			var base, new [32]int
			mappedEnd, larger := uint64(0), r.IntN(3) == 0
			for b := range uint64(len(new)) {
				if b < blocksIn(baseBytes) || larger && b < blocksIn(newBytes) {
					base[b] = r.IntN(3)
				}
				if base[b] > 0 {
					mappedEnd = b + 1
				}
				if b < blocksIn(newBytes) {
					new[b] = r.IntN(3)
				}
			}
			var runs []thin.Run
			var inBase uint64
			for b := range uint64(len(new)) {
				if base[b] == new[b] {
					continue
				}
				run := thin.Run{First: b, End: b + 1, InA: base[b] > 0, InB: new[b] > 0}
				if run.InA {
					inBase++
					run.TimeA = uint32(b)
				}
				if last := len(runs) - 1; last >= 0 && runs[last].End == b && runs[last].InA == run.InA && runs[last].InB == run.InB {
					runs[last].End, runs[last].TimeA = b+1, run.TimeA
				} else {
					runs = append(runs, run)
				}
			}
			c, err := changesOf(runsOf(runs), block, baseBytes, newBytes, mappedEnd, external)
			if err != nil {
				t.Fatal(err)
			}
			var changed, zeros []uint64
			for chunk := range uint64(newBytes-1)/thinChunkBytes + 1 {
				b := chunk * thinChunkBytes / uint64(block)
				grown := baseBytes < newBytes && int64(chunk+1)*thinChunkBytes > baseBytes
				if base[b] == new[b] && !grown {
					continue
				}
				changed = append(changed, chunk)
				// In the block in which the base ends, the new volume may share what it
				// maps, and nothing is known without a look.
				if known := base[b] != new[b] || b >= max(mappedEnd, blocksIn(baseBytes)); known && new[b] == 0 {
					zeros = append(zeros, chunk)
				}
			}
			if got := list(c.changed); !slices.Equal(got, changed) {
				t.Errorf("changed are %v, want %v", got, changed)
			}
			switch {
			case external && c.zeros != nil:
				t.Error("what is not mapped is the origin's, and not zeros")
			case !external && !slices.Equal(list(c.zeros), zeros):
				t.Errorf("zeros are %v, want %v", list(c.zeros), zeros)
			}
			if c.inBase != inBase {
				t.Errorf("%d blocks are in the base, want %d", c.inBase, inBase)
			}
		})
	}
}

func TestChangesOfErrors(t *testing.T) {
	bad := errors.New("bad")
	failing := func(yield func(thin.Run, error) bool) {
		_ = yield(thin.Run{First: 1, End: 2, InB: true}, nil) && yield(thin.Run{}, bad)
	}
	if _, err := changesOf(failing, 64*kib, 1<<20, 1<<20, 0, false); !errors.Is(err, bad) {
		t.Errorf("a failure: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	endless := func(yield func(thin.Run, error) bool) {
		for b := uint64(0); yield(thin.Run{First: b, End: b + 1, InB: true}, nil); b++ {
		}
	}
	if _, err := changesOf(watched(ctx, endless, 1, nil), 64*kib, 1<<40, 1<<40, 0, false); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithCancel(context.Background())
	var last int64
	progress := func(chunks int64) {
		if last = chunks; chunks > 50_000 {
			cancel()
		}
	}
	if _, err := changesOf(watched(ctx, endless, 3, progress), 192*kib, 1<<40, 1<<40, 0, false); !errors.Is(err, context.Canceled) || last != 5*3<<12 {
		t.Errorf("cancelled after %d chunks: %v", last, err)
	}
}

func member(path string, change func(*thinMember)) *thinMember {
	m := &thinMember{
		info: blockdev.Info{Path: path, Block: true, Number: dm.Number{Major: 254, Minor: uint32(path[len(path)-1])}}, active: true, readOnly: true,
		sizeBytes: 1 << 20, uuid: "LVM-" + path, poolUUID: "LVM-pool-tpool", pool: dm.Number{Major: 254, Minor: 1}, known: true, origin: "LVM-data",
	}
	if change != nil {
		change(m)
	}
	return m
}

func TestCheckPair(t *testing.T) {
	other := dm.Number{Major: 254, Minor: 2}
	for name, test := range map[string]struct {
		base, new func(*thinMember)
		want      string // "" if they make a pair
	}{
		"snapshots of one volume": {},
		"base grew into new":      {new: func(m *thinMember) { m.sizeBytes *= 2 }},
		"reduced":                 {base: func(m *thinMember) { m.sizeBytes *= 2 }, want: "was reduced in between"},
		"the same":                {new: func(m *thinMember) { m.uuid = "LVM-vg/a" }, want: "are the same"},
		"other pools":             {new: func(m *thinMember) { m.pool = other }, want: "different thin pools"},
		"other external origins":  {new: func(m *thinMember) { m.external = other }, want: "different external origins"},
		"one external origin": {
			base: func(m *thinMember) { m.external = other }, new: func(m *thinMember) { m.external = other },
		},
		"base a volume":                 {base: func(m *thinMember) { m.readOnly, m.origin = false, "" }, want: "no snapshot"},
		"base a snapshot, and writable": {base: func(m *thinMember) { m.readOnly = false }},
		"base without LVM":              {base: func(m *thinMember) { m.readOnly, m.origin, m.known = false, "", false }},
		"base not active":               {base: func(m *thinMember) { m.active, m.pool = false, dm.Number{} }},
		"base not active, in another pool": {
			base: func(m *thinMember) { m.active, m.pool, m.poolUUID = false, dm.Number{}, "LVM-other" }, want: "different thin pools",
		},
		"base not active, of another volume": {
			base: func(m *thinMember) { m.active, m.pool, m.origin = false, dm.Number{}, "LVM-other" }, want: "is not active",
		},
		"base not active, new a snapshot of it": {
			base: func(m *thinMember) { m.active, m.pool, m.origin = false, dm.Number{}, "" },
			new:  func(m *thinMember) { m.origin = "LVM-vg/a" },
		},
	} {
		err := checkPair(member("vg/a", test.base), member("vg/b", test.new))
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

func TestCheckTimes(t *testing.T) {
	writable := func(m *thinMember) { m.readOnly = false }
	volume := func(m *thinMember) { m.readOnly, m.origin = false, "" }
	unknown := func(m *thinMember) { m.readOnly, m.known, m.origin = false, false, "" }
	stranger := func(m *thinMember) { m.origin = "LVM-other" }
	base := thin.Device{Created: 3, Snapshotted: 3, MappedBlocks: 10}
	for name, test := range map[string]struct {
		base, new func(*thinMember)
		device    thin.Device // the new one's
		c         blockChanges
		o         Options
		warnings  []string
		live      bool
		err       string
	}{
		"in order":           {device: thin.Device{Created: 5, Snapshotted: 5, MappedBlocks: 10}, c: blockChanges{inBase: 10}},
		"in the wrong order": {device: thin.Device{Created: 2, Snapshotted: 2}, err: "wrong order"},
		"in the wrong order, taken": {
			device: thin.Device{Created: 2, Snapshotted: 2}, o: Options{NewWasWritten: true}, warnings: []string{"was made before"},
		},
		"the volume": {new: volume, device: thin.Device{Created: 1, Snapshotted: 9}, err: "the volume itself", live: true},
		"the volume, taken": {
			new: volume, device: thin.Device{Created: 1, Snapshotted: 9}, o: Options{AllowLiveOrigin: true}, live: true,
		},
		"the volume, without LVM":        {new: unknown, base: unknown, device: thin.Device{Created: 1, Snapshotted: 3}, err: "the volume itself", live: true},
		"an older snapshot, without LVM": {new: unknown, base: unknown, device: thin.Device{Created: 1, Snapshotted: 2}, err: "wrong order"},
		"a snapshot of a volume that is gone": {
			new: volume, device: thin.Device{Created: 5, Snapshotted: 5}, err: "lvchange -pr", live: true,
		},
		"an older snapshot, of which another one was made later": {
			new: writable, device: thin.Device{Created: 2, Snapshotted: 9}, err: "wrong order",
		},
		"a snapshot of which the base is one": {
			base: func(m *thinMember) { m.origin = "LVM-vg/b" }, new: writable, device: thin.Device{Created: 2, Snapshotted: 3}, err: "the volume itself", live: true,
		},
		"a volume's snapshot of a snapshot": {
			new: func(m *thinMember) { m.origin = "LVM-vg/a" }, device: thin.Device{Created: 4, Snapshotted: 4, MappedBlocks: 10}, c: blockChanges{inBase: 10},
		},
		"written to": {
			device: thin.Device{Created: 5, Snapshotted: 5}, c: blockChanges{baseTime: 3, newTime: 5},
			warnings: []string{"base vg/a was written to", "source vg/b was written to"},
		},
		"not written to": {device: thin.Device{Created: 5, Snapshotted: 5}, c: blockChanges{baseTime: 2, newTime: 4}},
		"writable": {
			base: writable, new: writable, device: thin.Device{Created: 5, Snapshotted: 5},
			warnings: []string{"base vg/a can be written to", "source vg/b can be written to"},
		},
		"unrelated": {
			new: stranger, device: thin.Device{Created: 5, Snapshotted: 5, MappedBlocks: 1}, c: blockChanges{inBase: 10}, warnings: []string{"no data in common"},
		},
		"with data in common": {new: stranger, device: thin.Device{Created: 5, Snapshotted: 5, MappedBlocks: 1}, c: blockChanges{inBase: 9}},
	} {
		t.Run(name, func(t *testing.T) {
			b, n := member("vg/a", test.base), member("vg/b", test.new)
			warnings, live, err := test.c.checkTimes(b, n, base, test.device, test.o)
			if live != test.live {
				t.Errorf("live: %v", live)
			}
			if (err == nil) != (test.err == "") || err != nil && (!strings.Contains(err.Error(), test.err) || len(wayout.From(err)) == 0) {
				t.Errorf("%v, want %q with a way out", err, test.err)
			}
			if len(warnings) != len(test.warnings) {
				t.Fatalf("warnings %q, want %q", warnings, test.warnings)
			}
			for i, w := range warnings {
				if !strings.Contains(w, test.warnings[i]) {
					t.Errorf("warning %q, want %q", w, test.warnings[i])
				}
			}
		})
	}
}

// A file's holes are left out of a full delta, unless it is made as dds makes it.
func TestFullWithHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	image := make([]byte, 1<<20+512)
	for i := range 5000 {
		image[300_000+i] = 'x'
	}
	write := func(parts ...[2]int) {
		t.Helper()
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(int64(len(image))); err != nil {
			t.Fatal(err)
		}
		for _, part := range parts {
			if _, err := f.WriteAt(image[part[0]:part[1]], int64(part[0])); err != nil {
				t.Fatal(err)
			}
		}
	}
	write([2]int{300_000, 305_000})
	p := mustOpen(t, Options{Source: path, Full: true})
	if seal := p.Delta.Seal(); !seal.Sparse || seal.Exceptions != 1 || !seal.IsFull(64*kib) {
		t.Errorf("the seal is %+v", seal)
	}
	if l := p.Delta.Body().Layer(); !slices.Equal(list(l.Changed), []uint64{4}) {
		t.Errorf("it has the chunks %v", list(l.Changed))
	}
	if text := p.ReportText(); !strings.Contains(text, "\nLeft out zeros 983552 B\n") {
		t.Errorf("the report is\n%s", text)
	}
	if got := content(t, p.Unsealed, p.Unsealed.Size()); !bytes.Equal(merged(make([]byte, len(image)), got), image) || p.Unsealed.Layout().Exceptions() != 17 {
		t.Errorf("unsealed it has %d chunks, and is not the image", p.Unsealed.Layout().Exceptions())
	}

	write([2]int{0, len(image)})
	p = mustOpen(t, Options{Source: path, Full: true})
	if seal := p.Delta.Seal(); seal.Sparse || seal.Exceptions != 17 {
		t.Errorf("without holes, the seal is %+v", seal)
	}
	if strings.Contains(p.ReportText(), "zeros") {
		t.Errorf("without holes, the report is\n%s", p.ReportText())
	}
}
