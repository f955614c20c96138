// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/dm"
	"ddsfs/cow/wayout"
)

// Options say how the kernel is to merge.
type Options struct {
	apply.Options
	// Name is that of the device that shows the new state meanwhile. To resume a
	// merge, "" is the name that it had.
	Name string
	// Consume has the kernel use up the delta itself, and not a copy of it.
	Consume bool

	// For tests.
	devices devices
	poll    time.Duration
}

// pollInterval is how often the kernel is asked how far it is, and so how long a
// write to the device may go unrecorded.
const pollInterval = 200 * time.Millisecond

// complete fills in what was left out of the options.
func (o Options) complete() Options {
	o.Options = o.Options.Complete()
	o.devices = cmp.Or[devices](o.devices, system{})
	o.poll = cmp.Or(o.poll, pollInterval)
	return o
}

// merger holds the target that the kernel is to use.
type merger struct {
	*apply.Merger
	o Options // complete
}

// sectors is how many sectors the target has, which must be whole ones for the
// kernel to show it.
func (k *merger) sectors() (int64, error) {
	if size := k.Target.Size(); size%cow.SectorBytes != 0 {
		return 0, wayout.Add(fmt.Errorf("target %s: it has %d bytes, which are not whole sectors of %d: the kernel can't show its end", k.Target.Path, size, cow.SectorBytes), wayout.WithoutKernel)
	}
	return k.Target.Size() / cow.SectorBytes, nil
}

// checkRest refuses a sparse delta for a target that holds something where that says zeros:
// the kernel knows of nothing but its list.
func (k *merger) checkRest(ctx context.Context, d *cow.Store) error {
	others, err := k.NotZeros(ctx, d)
	if err == nil && others.Len() > 0 {
		err = wayout.Add(k.Target.Refused("it holds something in %d chunks that the delta leaves out because they hold zeros, the first one chunk %d of the volume, and the kernel can't make them zeros", others.Len(), others.Chunk(0)), wayout.WithoutKernel)
	}
	return err
}

// load makes a device with a table that lies on the target. Before it is resumed, it
// can't be opened, and the kernel writes nothing.
func (k *merger) load(l *lower, name, uuid string, readOnly bool, table ...dm.Target) (mapped, error) {
	// The kernel reads and writes beneath the page cache.
	if err := k.Target.Sync(); err != nil {
		return nil, fmt.Errorf("target %s: flush: %w", k.Target.Path, err)
	}
	before, err := k.Evidence(nil, nil, record.Stale)
	if err != nil {
		return nil, err
	}
	d, err := k.o.devices.create(name, uuid)
	if err != nil {
		return nil, err
	}
	if err := k.handOver(l, d, before, readOnly, table); err != nil {
		return nil, errors.Join(err, d.Remove())
	}
	return d, nil
}

// handOver gives the target to the device mapper.
//
// The device mapper claims what its tables lie on, so our own claim has to go first. A
// process may come in between: so once the device mapper has the target, it is checked
// that no other process has it open, and that it is what it was.
func (k *merger) handOver(l *lower, d mapped, before *record.Evidence, readOnly bool, table []dm.Target) error {
	if err := k.Target.Release(); err != nil {
		return err
	}
	err := d.Load(readOnly, table...)
	if errors.Is(err, syscall.EBUSY) {
		return k.Target.Refused("it, or the delta's device, is in use: unmount it, and close what is stacked on it")
	}
	if err != nil {
		return err
	}
	// Ourselves and the table.
	if err := k.Target.CheckUnused(apply.Own{Opens: 2, Loops: l.loops, Mapped: d.Info()}); err != nil {
		return err
	}
	if err := k.Target.Sync(); err != nil {
		return fmt.Errorf("target %s: flush: %w", k.Target.Path, err)
	}
	why, err := k.Touched(before, nil)
	if err != nil {
		return err
	}
	if why != "" {
		return k.Target.Refused("somebody wrote to it just now: %s", why)
	}
	if err := k.CheckUnchanged(); err != nil {
		return err
	}
	status, err := d.LoadedStatus()
	if err != nil {
		return err
	}
	return checkHealthy(d.Path(), status)
}

// unfinished is the error of a merge that has begun and is not done.
func (k *merger) unfinished(err error) error {
	return wayout.Add(fmt.Errorf("target %s: HALF MERGED: %w", k.Target.Path, apply.BrokenOff(err)), wayout.ResumeKernel.Of(k.Target.Path))
}
