// SPDX-License-Identifier: GPL-2.0-or-later

package snapshots

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/chunks"
	"ddsfs/cow/wayout"
)

const kib = 1 << 10

func store(chunkBytes int64, list ...uint64) *cow.Store {
	var b chunks.Builder
	for _, c := range list {
		b.Add(c)
	}
	return &cow.Store{Header: cow.Header{Valid: true, ChunkBytes: chunkBytes}, Changed: b.Set()}
}

func list(s *chunks.Set) (chunks []uint64) {
	for i := range s.Len() {
		chunks = append(chunks, s.Chunk(i))
	}
	return chunks
}

func TestUnion(t *testing.T) {
	const base, new = "vg/base", "vg/new"
	for _, c := range []struct {
		name                   string
		base, new              *cow.Store
		baseBytes, volumeBytes int64
		readOnly               bool

		chunks                         []uint64
		extended, newOnly, unexplained int64
		order                          string // a part of what is said of it
		refused                        bool
	}{
		{name: "no snapshot", base: store(4*kib, 1, 5), baseBytes: 64 * kib, volumeBytes: 64 * kib, chunks: []uint64{1, 5}},
		{name: "unwritten", base: store(4*kib, 1, 5), new: store(4*kib, 5), baseBytes: 64 * kib, volumeBytes: 64 * kib, chunks: []uint64{1, 5}},
		{name: "nothing in either", base: store(4 * kib), new: store(4 * kib), baseBytes: 64 * kib, volumeBytes: 64 * kib},
		{name: "written", base: store(4*kib, 1, 5), new: store(4*kib, 5, 6), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{1, 5, 6}, newOnly: 1, unexplained: 1, order: "was written to"},
		{name: "written, of an idle volume", base: store(4 * kib), new: store(4*kib, 6), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{6}, newOnly: 1, unexplained: 1, order: "was written to"},
		{name: "older, read-only", base: store(4 * kib), new: store(4*kib, 6), baseBytes: 64 * kib, volumeBytes: 64 * kib, readOnly: true,
			chunks: []uint64{6}, newOnly: 1, unexplained: 1, order: "nobody can write to it", refused: true},
		{name: "older", base: store(4*kib, 7), new: store(4*kib, 6, 7), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{6, 7}, newOnly: 1, unexplained: 1, order: "all that the base's has", refused: true},
		{name: "extended", base: store(4*kib, 1), new: store(4 * kib), baseBytes: 32 * kib, volumeBytes: 44 * kib,
			chunks: []uint64{1, 8, 9, 10}, extended: 3},
		{name: "extended from within a chunk", base: store(4*kib, 1), baseBytes: 30 * kib, volumeBytes: 41 * kib,
			chunks: []uint64{1, 7, 8, 9, 10}, extended: 4},
		{name: "extended from within a changed chunk", base: store(4*kib, 7), baseBytes: 30 * kib, volumeBytes: 33 * kib,
			chunks: []uint64{7, 8}, extended: 1},
		{name: "extended, and used there", base: store(4*kib, 1), new: store(4*kib, 9), baseBytes: 32 * kib, volumeBytes: 44 * kib, readOnly: true,
			chunks: []uint64{1, 8, 9, 10}, extended: 3},
		{name: "larger chunks of an unwritten one", base: store(4*kib, 5), new: store(16*kib, 1), baseBytes: 64 * kib, volumeBytes: 64 * kib, readOnly: true,
			chunks: []uint64{5}},
		{name: "larger chunks, perhaps written", base: store(4*kib, 5), new: store(16*kib, 1), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{4, 5, 6, 7}, newOnly: 3},
		{name: "larger chunks, written", base: store(4*kib, 5), new: store(16*kib, 0), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{0, 1, 2, 3, 5}, newOnly: 4, unexplained: 1, order: "was written to"},
		{name: "smaller chunks", base: store(16*kib, 1), new: store(4*kib, 5, 6), baseBytes: 64 * kib, volumeBytes: 64 * kib, readOnly: true,
			chunks: []uint64{1}},
		{name: "smaller chunks, written", base: store(16*kib, 1), new: store(4*kib, 5, 8), baseBytes: 64 * kib, volumeBytes: 64 * kib,
			chunks: []uint64{1, 2}, newOnly: 1, unexplained: 1, order: "all that the base's has", refused: true},
		{name: "a partial last chunk", base: store(4*kib, 0), new: store(16*kib, 1), baseBytes: 18 * kib, volumeBytes: 18 * kib,
			chunks: []uint64{0, 4}, newOnly: 1, unexplained: 1, order: "was written to"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := union(c.base, c.new, c.baseBytes, c.volumeBytes, c.readOnly)
			if !slices.Equal(list(got.chunks), c.chunks) || got.extended != c.extended || got.newOnly != c.newOnly || got.unexplained != c.unexplained {
				t.Errorf("%v, %+v", list(got.chunks), got)
			}
			m := members{
				base: &blockdev.Snapshot{Info: blockdev.Info{Path: base}},
				new:  &blockdev.Snapshot{Info: blockdev.Info{Path: new}},
			}
			for _, o := range []Options{{}, {NewWasWritten: true}} {
				warning, err := m.checkOrder(got, c.readOnly, o)
				said := warning
				if err != nil {
					said = err.Error()
				}
				switch {
				case (err != nil) != (c.refused && !o.NewWasWritten):
					t.Errorf("%+v: %v", o, err)
				case c.order == "" && said != "", c.order != "" && !strings.Contains(said, base):
					t.Errorf("%+v: says %q", o, said)
				case !o.NewWasWritten && !strings.Contains(said, c.order):
					t.Errorf("says %q, want %q", said, c.order)
				}
			}
		})
	}
}

// The advice depends on which of the two snapshots is gone, and why.
func TestGone(t *testing.T) {
	overflow := fmt.Errorf("some: %w", &blockdev.SnapshotError{Path: "vg/x", Status: "Overflow"})
	merging := &blockdev.SnapshotError{Path: "vg/x"}
	other := errors.New("other")
	for _, c := range []struct {
		err  error
		says []string
	}{
		{baseGone(overflow), []string{"vg/x", `"Overflow"`, "it overflowed", "first sync", "larger"}},
		{newGone(overflow), []string{"vg/x", `"Overflow"`, "it overflowed", "take another one, larger", "the base is as good as before"}},
		{baseGone(merging), []string{"vg/x", "merged into its origin", "when that has ended", "take new snapshots", "first sync"}},
		{newGone(merging), []string{"vg/x", "merged into its origin", "take another snapshot when that has ended"}},
	} {
		for _, want := range c.says {
			if !strings.Contains(fmt.Sprint(c.err, wayout.From(c.err)), want) {
				t.Errorf("says %q, and not %q", c.err, want)
			}
		}
		if gone := new(blockdev.SnapshotError); !errors.As(c.err, &gone) {
			t.Errorf("%v hides what was wrong", c.err)
		}
	}
	for _, err := range []error{baseGone(nil), newGone(nil)} {
		if err != nil {
			t.Error(err)
		}
	}
	if baseGone(other) != other || newGone(other) != other {
		t.Error("another error is not as it was")
	}
}
