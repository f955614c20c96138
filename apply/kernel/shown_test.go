// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"context"
	"os"
	"strings"
	"testing"

	"ddsfs/apply"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/testdata/harness"
)

// A view that does not show the target with the delta over it is found out, wherever it
// differs.
func TestViewIsCompared(t *testing.T) {
	for _, bytes := range []int{wholeSectors, wholeSectors - 700} { // also with a partial last chunk
		r := newRig(t, bytes)
		defer os.RemoveAll(r.Dir)
		s := newSimulated(&harness.Storage{At: 1 << 30})
		view := &simulatedDevice{kernel: s, name: "view"}
		s.loops[(dm.Number{Major: mappedMajor}).String()] = r.Target + ".view"
		o := r.options(s)
		m, err := apply.Open(r.Target, files.ToRead, o.Options)
		harness.Must(t, err)
		defer m.Close()
		k := &merger{m, o.complete()}
		in, err := blockdev.Open(r.Delta)
		harness.Must(t, err)
		defer in.Close()
		d, err := k.Check(context.Background(), r.Delta, in, nil)
		harness.Must(t, err)
		compare := func(shown []byte) error {
			r.Write(r.Target+".view", shown)
			return k.compare(d, view)
		}
		harness.Must(t, compare(r.After))
		for _, at := range []int{int(d.Changed.Chunk(0)) * harness.ChunkBytes, 3, bytes / 2} {
			wrong := append([]byte(nil), r.After...)
			wrong[at] ^= 1
			if err := compare(wrong); err == nil || !strings.Contains(err.Error(), "something else at byte") {
				t.Errorf("byte %d is wrong: %v", at, err)
			}
		}
	}
}
