// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"regexp"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// The kernel takes a delta for a store of its own: it shows the new state
// through one that it may not write to, and merges another into the target.
func TestKernelReadsDelta(t *testing.T) {
	for _, c := range []struct {
		name           string
		sectors, chunk int64
		changed        int
	}{
		{"some", 16384, 8, 100},
		{"full area", 16384, 8, 256},
		{"two areas", 16384, 8, 300},
		{"no exceptions", 16384, 8, 0},
		{"partial last chunk", 20485, 128, 20},
		{"chunk=512", 4096, 1, 100},
		{"chunk=512K", 32768, 1024, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, c.sectors, c.chunk, c.changed)
			m := mount(t, p.base.COW.Path, p.new.Path)
			delta := copied(t, m.delta())
			m.unmount(t)

			target := block(t, p.base.Image)
			view := dm.Create(t, "view", c.sectors,
				fmt.Sprintf("snapshot %s %s P %d", target, dm.Loop(t, delta, true), c.chunk), "--readonly")
			dm.Holds(t, "what the kernel shows", view.Path, p.new.Image)
			if status := view.Status(t); !healthy.MatchString(status) {
				t.Errorf("the kernel says %q of the delta", status)
			}
			view.Remove(t)
			dm.Holds(t, "the target, untouched", target, p.base.Image)

			store := dm.Loop(t, copied(t, delta), false)
			merge := dm.Create(t, "merge", c.sectors,
				fmt.Sprintf("snapshot-merge %s %s P %d", target, store, c.chunk))
			waitMerged(t, merge)
			dm.Holds(t, "what the kernel shows after the merge", merge.Path, p.new.Image)
			merge.Remove(t)
			dm.Holds(t, "the target after the merge", target, p.new.Image)
		})
	}
}

// healthy is the status of a store that the kernel has no complaint about:
// sectors in use, of how many, and sectors of metadata.
var healthy = regexp.MustCompile(`^(\d+)/\d+ (\d+)$`)

// waitMerged waits until all that the store still has is metadata.
func waitMerged(t *testing.T, merge *dm.Device) {
	t.Helper()
	dm.Until(t, "all is merged", func() bool {
		status := merge.Status(t)
		part := healthy.FindStringSubmatch(status)
		if part == nil {
			t.Fatalf("the kernel says %q of the merge", status)
		}
		return part[1] == part[2]
	})
}
