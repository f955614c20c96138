// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/report"
)

// follow waits until the kernel has merged, and brings it to its end.
func (k *merger) follow(ctx context.Context, r *record.Record, device mapped) (apply.Result, error) {
	from := r.Merging.Kernel
	if err := device.MakeNode(); err != nil {
		k.o.Warn(fmt.Sprintf("the kernel merges, and its device has no name: %v", err))
	}
	result := apply.Result{TargetBytes: k.Target.Size()}
	c := from.ChunkSectors * cow.SectorBytes
	if layout, err := cow.NewLayout(c, uint64(from.Chunks)); err == nil {
		result.Report = report.New(cow.Header{Valid: true, ChunkBytes: c}, layout.Areas(), from.Chunks)
	}
	new := r.Merging.New
	result.VolumeBytes, result.Base, result.New, result.Digest = new.VolumeBytes, r.Merging.Base, new.Snapshot, new.Delta
	began := time.Now()
	before, err := k.wait(ctx, r, device)
	var done *record.Record
	if err == nil {
		run := record.NewRun(began)
		run.Chunks, run.DataBytes, run.WrittenBytes = from.Chunks, from.Chunks*c, (from.Chunks-before)*c
		done, err = k.settle(r, device, run)
	}
	if err != nil {
		// From now on writes to the device go unnoticed.
		from.Unwatched = true
		return apply.Result{}, errors.Join(k.unfinished(err), k.State.Save(r))
	}
	result.ResumedBytes = before * c
	result.WrittenBytes = result.DataBytes - result.ResumedBytes
	result.Touched = r.Touched != ""
	err = device.Remove()
	if errors.Is(err, syscall.EBUSY) {
		result.Device, err = device.Path(), nil
	}
	// The store goes last, as a merge would go on from it until here. It is not in use
	// any more: the device shows the target, or is gone.
	return result, errors.Join(err, k.removeUsedUp(r), k.State.Tidy(k.Key, done), k.Prune(done))
}

// wait waits until the kernel has merged all. It returns how many chunks it had
// merged before.
func (k *merger) wait(ctx context.Context, r *record.Record, device mapped) (before int64, err error) {
	from := r.Merging.Kernel
	before = -1
	poll := time.NewTicker(k.o.poll)
	defer poll.Stop()
	for {
		status, err := device.Status()
		if err != nil {
			return 0, err
		}
		if len(status) == 1 && status[0].Type == dm.KindLinear {
			return from.Chunks, nil // an earlier run saw that it was done
		}
		if len(status) != 1 || status[0].Type != dm.KindMerge {
			return 0, fmt.Errorf("%s: somebody has given it another table", device.Path())
		}
		if err := k.noteWrites(r, device); err != nil {
			return 0, err
		}
		usage, err := status[0].Usage()
		if err != nil {
			return 0, fmt.Errorf("%s: %w (its log may say why)", device.Path(), err)
		}
		left := min(from.Chunks, max(0, usage.Used-usage.Metadata)/from.ChunkSectors)
		if before < 0 {
			before = from.Chunks - left
		}
		c := from.ChunkSectors * cow.SectorBytes
		k.o.Progress(apply.Merging, (from.Chunks-left)*c, from.Chunks*c)
		if usage.Used == usage.Metadata {
			return before, nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("stopped by a signal, and the kernel goes on: %s shows the new state meanwhile", device.Path())
		}
	}
}

// noteWrites records durably that somebody wrote to the device, as soon as that
// shows. The target then holds more than the delta says.
func (k *merger) noteWrites(r *record.Record, device mapped) error {
	was := r.Touched
	if err := checkWrites(r, device); err != nil || r.Touched == was {
		return err
	}
	return k.State.Save(r)
}

// checkWrites has the record say whether somebody wrote to the device.
func checkWrites(r *record.Record, device mapped) error {
	counter, err := device.Counter()
	if err == nil && r.Touched == "" && (counter.WrittenSectors > 0 || counter.DiscardedSectors > 0) {
		r.Touched = r.Merging.Kernel.TouchedBy()
	}
	return err
}

// settle takes the store out of use when the kernel has merged all of it, and
// records that the target holds the new state. The order is
//
//  1. the store's list, on its disk, is empty: so the kernel has flushed every
//     chunk to the target before it took it off;
//  2. the target is flushed once more, and what the page cache has of it is
//     forgotten, as the kernel wrote beneath it;
//  3. the device gets a table that is the target and nothing else, and while it is
//     suspended for that, nothing writes to it: the record gets what the target
//     looks like then, and the last count of the device's writes;
//  4. the record says that it is done.
//
// A run after one that stopped before 4 finds the same: the store is still there, and
// empty.
func (k *merger) settle(r *record.Record, device mapped, run record.Run) (*record.Record, error) {
	table, err := device.Table()
	merging := err == nil && apply.IsMerging(table)
	if merging {
		err = k.checkUsedUp(table[0])
	}
	if err != nil {
		return nil, err
	}
	if err := k.Target.Sync(); err != nil {
		return nil, fmt.Errorf("flush: %w", err)
	}
	if merging {
		below, _, _ := strings.Cut(table[0].Params, " ")
		err = device.Load(false, dm.Target{Sectors: table[0].Sectors, Type: dm.KindLinear, Params: below + " 0"})
	}
	if err == nil {
		err = device.Suspend()
	}
	if err != nil {
		return nil, err
	}
	evidence, err := k.still(r, device)
	if err := errors.Join(err, device.Resume(false)); err != nil {
		return nil, err
	}
	done := *r
	done.Finish(time.Now(), run, evidence)
	if err := k.State.Save(&done); err != nil {
		return nil, fmt.Errorf("it is merged, but that could not be recorded: %w", err)
	}
	return &done, nil
}

// still is what the target looks like while nobody can write to it.
func (k *merger) still(r *record.Record, device mapped) (*record.Evidence, error) {
	if err := checkWrites(r, device); err != nil {
		return nil, err
	}
	if err := blockdev.DropCache(k.Target.OS()); err != nil {
		return nil, err
	}
	return k.Evidence(r.Evidence, r.Merging.Changes, record.Stale)
}
