// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"bytes"
	"fmt"
	"math/rand/v2"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow/layer"
)

const (
	// comparedPlaces is how many places of a view are compared in the delta's chunks,
	// and as many all over the target.
	comparedPlaces = 64
	// comparedBytes is the size of a place.
	comparedBytes = 4096
)

// compare compares what the kernel shows with the target as it will be, at some places:
// the two must agree on what a delta means before anybody trusts a view.
func (k *merger) compare(d *apply.Checked, view mapped) error {
	delta, err := d.Layer()
	if err != nil {
		return fmt.Errorf("delta: %w", err)
	}
	target, done, err := k.Target.Content()
	if err != nil {
		return err
	}
	defer done()
	willBe, err := layer.NewOverlay(target.Size(), target, delta)
	if err != nil {
		return err
	}
	shown, err := k.o.devices.open(view.Info().Number.String())
	if err != nil {
		return err
	}
	defer shown.Close()

	random := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	var at []int64
	for _, i := range record.Spread(d.Changed.Len(), comparedPlaces, random) {
		at = append(at, int64(d.Changed.Chunk(i))*d.ChunkBytes)
	}
	for _, block := range record.Spread(target.Size()/comparedBytes, comparedPlaces, random) {
		at = append(at, block*comparedBytes)
	}
	var want, got [][]byte
	for _, off := range at {
		bytes := min(comparedBytes, target.Size()-off)
		want, got = append(want, make([]byte, bytes)), append(got, make([]byte, bytes))
	}
	// A place that can't be read, of a disk that fails, is not for this to judge.
	readable, _ := willBe.ReadPieces(want, at)
	n, _ := shown.ReadPieces(got[:readable], at[:readable])
	for i := range n {
		if !bytes.Equal(got[i], want[i]) {
			return fmt.Errorf("%s: the kernel shows something else at byte %d than the target with the delta over it", view.Path(), at[i])
		}
	}
	return nil
}
