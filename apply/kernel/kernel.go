// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
	"ddsfs/cow/wayout"
)

// ErrNoMerge says that there is no merge by the kernel to resume.
var ErrNoMerge = errors.New("no merge by the kernel is under way")

// DefaultName is the name of a target's device unless another one is asked for.
func DefaultName(targetPath string) string { return "ddsfs-" + filepath.Base(targetPath) }

// File has the kernel merge the delta in a file or a block device into the
// target. A merge of the same delta that was interrupted is resumed.
func File(ctx context.Context, path, targetPath string, o Options) (apply.Result, error) {
	in, err := blockdev.Open(path)
	if err != nil {
		return apply.Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	// The list of a delta that the kernel has begun to merge may be shorter by now.
	if result, underWay, err := resumeSame(ctx, path, func() (*cow.Store, error) { return cow.Open(in) }, targetPath, o); underWay || err != nil {
		return result, err
	}
	k, err := open(targetPath, o)
	if err != nil {
		return apply.Result{}, err
	}
	defer k.Close()
	if err := k.Take(in); err != nil {
		return apply.Result{}, err
	}
	// A delta that is refused or already merged is not copied first. Anything else that
	// is wrong with it comes out when all of it is checked.
	if d, err := cow.Open(in); err == nil && d.ReadList() == nil {
		if d.Seal == nil && o.Consume {
			return apply.Result{}, wayout.Add(fmt.Errorf("delta %s: it is not sealed, and half used up it would look like a good one", path), wayout.WithoutConsume)
		}
		taken, err := k.Decide(d)
		if err != nil {
			return apply.Result{}, err
		}
		if taken.How.Verdict == record.Done && !o.DryRun {
			// It may turn out not to be there any more.
			d, err := k.Check(ctx, path, in, nil)
			if err != nil {
				return apply.Result{}, err
			}
			if d.How.Verdict == record.Done {
				return k.AlreadyDone(ctx, d)
			}
		}
		if err := k.checkRest(ctx, d); err != nil {
			return apply.Result{}, err
		}
	}
	switch {
	case o.DryRun:
		k.Close()
		return apply.File(ctx, path, targetPath, o.Options)
	case o.Consume:
		return k.mergeIn(ctx, in)
	}
	return k.mergeCopy(ctx, path, io.NewSectionReader(in, 0, in.Size()), apply.Copying)
}

// Pipe is File for a delta that comes from r.
func Pipe(ctx context.Context, r *os.File, targetPath string, o Options) (apply.Result, error) {
	in := apply.Patient{Ctx: ctx, File: r}
	if result, underWay, err := resumeSame(ctx, r.Name(), func() (*cow.Store, error) { return cow.ReadStoreFrom(in) }, targetPath, o); underWay || err != nil {
		return result, err
	}
	k, err := open(targetPath, o)
	if err != nil {
		return apply.Result{}, err
	}
	defer k.Close()
	if info, err := blockdev.Stat(r); err == nil {
		if err := k.Target.CheckApart(info); err != nil {
			return apply.Result{}, err
		}
	}
	if o.DryRun {
		k.Close()
		o.SpoolDir = k.spoolDir()
		return apply.Pipe(ctx, r, targetPath, o.Options)
	}
	return k.mergeCopy(ctx, r.Name(), in, apply.Receiving)
}

// Resume finishes the merge that is recorded. It fails with ErrNoMerge if none is.
func Resume(ctx context.Context, targetPath string, o Options) (apply.Result, error) {
	m, err := apply.Watch(targetPath, o.Options)
	if err != nil {
		return apply.Result{}, err
	}
	k := &merger{m, o.complete()}
	defer k.Close()
	switch {
	case m.Known.Damaged != nil:
		return apply.Result{}, fmt.Errorf("target %s: %w", targetPath, m.Known.Damaged)
	case m.Known.Record == nil:
		return apply.Result{}, fmt.Errorf("target %s: nothing is recorded of it in %s", targetPath, o.StateDir)
	case m.Known.ByKernel() == nil:
		return apply.Result{}, fmt.Errorf("target %s: %w", targetPath, ErrNoMerge)
	}
	return k.resume(ctx)
}

// resumeSame resumes the merge into a target that the kernel has begun, if one is under
// way. It must be that of the delta, which is opened then. Errors call that by the name.
func resumeSame(ctx context.Context, name string, open func() (*cow.Store, error), targetPath string, o Options) (result apply.Result, underWay bool, err error) {
	info, err := blockdev.Lookup(targetPath)
	if err != nil {
		return result, false, nil // so nothing can be merged into it, and the rest says why
	}
	key, err := info.Key()
	if err != nil {
		return result, false, fmt.Errorf("target: %w", err)
	}
	// A record that can't be read is looked at again when the target is locked.
	r, _ := record.Dir{Path: o.StateDir}.Load(key)
	if r.ByKernel() == nil {
		return result, false, nil
	}
	d, err := open()
	if err != nil {
		return result, true, fmt.Errorf("%s: %w", name, err)
	}
	if !isNamed(d, r.Merging.New.Delta) {
		err := fmt.Errorf("the kernel has begun to merge another delta into it, from %s to %s", record.NameOf(r.Merging.Base), record.NameOf(r.Merging.New.Snapshot))
		return result, true, wayout.Add(&apply.RefusedError{Target: targetPath, Reason: err}, wayout.ResumeKernel.Of(targetPath))
	}
	o.Name = "" // the name that it has is kept, also where the device must be made again
	result, err = Resume(ctx, targetPath, o)
	return result, true, err
}

// open opens a target to have the kernel merge into it.
func open(targetPath string, o Options) (*merger, error) {
	o = o.complete()
	if err := o.devices.checkFree(o.Name); err != nil {
		return nil, err
	}
	m, err := apply.Open(targetPath, files.ToRead, o.Options)
	if err != nil {
		return nil, err
	}
	k := &merger{m, o}
	if err = k.Target.CheckWritable(); err == nil {
		_, err = k.sectors()
	}
	if err == nil && k.Known.ByKernel() != nil {
		err = k.Target.Refused("another apply has just begun to have the kernel merge into it")
	}
	if err != nil {
		k.Close()
		return nil, err
	}
	if release, old := oldKernel(); old {
		o.Warn(fmt.Sprintf("kernels before 5.11, and this is %s, don't flush the target before they drop a chunk from the delta: a power cut while it merges can lose chunks", release))
	}
	return k, nil
}

// oldKernel tells whether the kernel is one that takes a chunk off the store's list before
// it has flushed it to the target, and which one it is.
func oldKernel() (release string, old bool) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "unknown", false
	}
	release = unix.ByteSliceToString(name.Release[:])
	return release, before(release, 5, 11)
}

// before tells whether a kernel's release is older than a version.
func before(release string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a < major || a == major && b < minor
}

// mergeIn merges from the delta itself, which is used up.
func (k *merger) mergeIn(ctx context.Context, in *blockdev.Device) (apply.Result, error) {
	// By this name it is found again after a reboot. A link to a device is kept, as the
	// device can have another name by then.
	path, err := filepath.Abs(in.Info().Path)
	if err == nil && !in.Info().Block {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return apply.Result{}, fmt.Errorf("delta: %w", err)
	}
	d, err := k.Check(ctx, path, in, nil)
	if err != nil {
		return apply.Result{}, err
	}
	if _, bytes := pastEnd(d, k.Target.Size()); bytes > 0 {
		return apply.Result{}, wayout.Add(fmt.Errorf("delta %s: it would have to be changed first, as the kernel merges all of its last chunk, and the volume ends within that", path), wayout.WithoutConsume)
	}
	if err := checkShown(in); err != nil {
		return apply.Result{}, err
	}
	return k.merge(ctx, d, in, record.KernelMerge{Store: path, Consume: true})
}

// mergeCopy merges from a copy of the delta that comes from r.
func (k *merger) mergeCopy(ctx context.Context, name string, r io.Reader, stage apply.Stage) (apply.Result, error) {
	path, d, err := k.copy(ctx, name, r, stage)
	if err != nil {
		return apply.Result{}, err
	}
	store, err := blockdev.Open(path)
	if err == nil {
		defer store.Close()
		d.Store = d.At(store)
		err = k.Take(store)
	}
	if err == nil && d.How.Verdict == record.Done {
		result, err := k.AlreadyDone(ctx, d)
		return result, errors.Join(err, k.RemoveStore(path))
	}
	if err != nil {
		return apply.Result{}, errors.Join(err, k.RemoveStore(path))
	}
	return k.merge(ctx, d, store, record.KernelMerge{Store: path})
}

// merge has the kernel merge a delta that was checked from store, which is the delta or
// a copy of it.
func (k *merger) merge(ctx context.Context, d *apply.Checked, store *blockdev.Device, from record.KernelMerge) (apply.Result, error) {
	r, device, err := k.prepare(ctx, d, store, from)
	if _, refused := errors.AsType[*apply.RefusedError](err); refused {
		return apply.Result{}, err
	}
	if err != nil {
		return apply.Result{}, fmt.Errorf("target %s: nothing was written: %w", k.Target.Path, err)
	}
	return k.start(ctx, r, device)
}

// prepare does all that comes before the first write to the target: steps 2 and 3 of
// package apply's comment. If it fails, all is as it was.
func (k *merger) prepare(ctx context.Context, d *apply.Checked, store *blockdev.Device, from record.KernelMerge) (r *record.Record, device mapped, err error) {
	recorded := false
	defer func() {
		if err == nil {
			return
		}
		if recorded {
			// A file must not go before the record that names it.
			backErr := k.TakeBack()
			if err = errors.Join(err, backErr); backErr != nil {
				return
			}
			err = errors.Join(err, k.State.Tidy(k.Key, k.Known.Record))
		} else {
			err = errors.Join(err, k.DropKept())
		}
		if !from.Consume {
			err = errors.Join(err, k.RemoveStore(from.Store))
		}
	}()
	if err = cmp.Or(k.CheckBlocks(d, true), k.checkRest(ctx, d.Store)); err != nil {
		return nil, nil, err
	}
	job := record.Merging{Kernel: &from}
	if err = k.Undo(ctx, d, &job); err != nil {
		return nil, nil, err
	}
	if job.Changes, err = k.Changes(d); err != nil {
		return nil, nil, err
	}
	from.Name, from.UUID = k.o.Name, record.MergeUUIDPrefix+rand.Text()
	from.Sectors, from.ChunkSectors, from.Chunks = k.Target.Size()/cow.SectorBytes, d.ChunkBytes/cow.SectorBytes, d.Changed.Len()
	recorded = true
	if r, err = k.Begin(d, job); err != nil {
		return nil, nil, err
	}
	device, err = k.raise(ctx, &from, store)
	return r, device, err
}

// raise makes the device through which the kernel is to merge from the store. It does
// not begin before it is resumed.
func (k *merger) raise(ctx context.Context, from *record.KernelMerge, store *blockdev.Device) (mapped, error) {
	f, err := store.Reopen(os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	defer f.Close()
	// The kernel reads it beneath the page cache.
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("delta %s: flush: %w", from.Store, err)
	}
	l, err := newLower(k.o.devices, k.Target.OS(), f, true)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	chunkBytes := from.ChunkSectors * cow.SectorBytes
	if err := errors.Join(l.checkWritable(), l.checkChunk(chunkBytes)); err != nil {
		return nil, err
	}
	d, err := k.load(l, from.Name, from.UUID, false, snapshotOf(dm.KindMerge, from.Sectors, l.target, l.delta, "P", chunkBytes))
	if err == nil && ctx.Err() != nil {
		err = errors.Join(apply.ErrSignal, d.Remove())
	}
	return d, err
}

// start lets the kernel merge, and waits for it.
func (k *merger) start(ctx context.Context, r *record.Record, device mapped) (apply.Result, error) {
	// If that fails, the kernel has hardly begun, but it may have.
	if err := device.Resume(false); err != nil {
		return apply.Result{}, k.unfinished(err)
	}
	return k.follow(ctx, r, device)
}

// resume finishes what an earlier run has begun.
func (k *merger) resume(ctx context.Context) (apply.Result, error) {
	r := k.Known.Record
	from := r.Merging.Kernel
	device, err := k.o.devices.find(from.UUID)
	if err == nil {
		var goesOn bool
		if goesOn, err = k.adopt(r, device); err != nil {
			return apply.Result{}, err
		}
		if goesOn {
			return k.follow(ctx, r, device)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return apply.Result{}, err
	}
	if err := k.claim(); err != nil {
		return apply.Result{}, err
	}
	if from.Unwatched && r.Touched == "" {
		// The device counted whether it was written to, and is gone.
		r.Touched = from.TouchedBy()
		if err := k.State.Save(r); err != nil {
			return apply.Result{}, err
		}
	}
	store, err := k.openStore(r)
	if err != nil {
		return apply.Result{}, err
	}
	defer store.Close()
	from.Name = cmp.Or(k.o.Name, from.Name)
	// The kernel's writes from now on must not be taken for those of others.
	if r.Evidence, err = k.Evidence(r.Evidence, nil, k.Known.Written.MayHold); err != nil {
		return apply.Result{}, fmt.Errorf("target %s: %w", k.Target.Path, err)
	}
	if err := k.State.Save(r); err != nil {
		return apply.Result{}, err
	}
	device, err = k.raise(ctx, from, store)
	if _, refused := errors.AsType[*apply.RefusedError](err); refused {
		return apply.Result{}, err
	}
	if err != nil {
		return apply.Result{}, k.unfinished(err)
	}
	return k.start(ctx, r, device)
}

// adopt looks at the device of an earlier run. It removes one through which the
// kernel never began to merge, or can't go on.
func (k *merger) adopt(r *record.Record, device mapped) (goesOn bool, err error) {
	state, err := device.State()
	if err != nil {
		return false, err
	}
	if !state.Active {
		return false, device.Remove()
	}
	if state.Suspended {
		// The earlier run ended while it exchanged the table.
		if err := device.Resume(false); err != nil {
			return false, k.unfinished(err)
		}
	}
	if err := k.noteWrites(r, device); err != nil {
		return false, err
	}
	r.Merging.Kernel.Unwatched = false
	if err := k.State.Save(r); err != nil {
		return false, err
	}
	status, err := device.Status()
	if err != nil {
		return false, err
	}
	if unhealthy := checkHealthy(device.Path(), status); unhealthy != nil {
		// The kernel tries again when the device is made again.
		if err := device.Remove(); err != nil {
			return false, k.unfinished(fmt.Errorf("%w, and it can't be made again as long as it is in use (%w): %w", unhealthy, apply.InUse(device.Path()), err))
		}
		return false, nil
	}
	return true, nil
}

// claim claims a target that no device of ours holds any more.
func (k *merger) claim() error {
	if err := k.Claim(); err != nil {
		return err
	}
	t := k.Target
	from := k.Known.Merging.Kernel
	r := k.Known.Record
	writes := k.State.Writes(r, k.Known.Written)
	if r.TouchedByDevice() {
		writes.All = true // the kernel brings it what was written through the device
	}
	why, err := k.Touched(r.Evidence, writes)
	if err != nil {
		return fmt.Errorf("target %s: %w", t.Path, err)
	}
	if why != "" {
		return wayout.Add(t.Refused("it is not as the kernel left it (%s): somebody else wrote to it, or it is another one", why), wayout.FullDelta, wayout.AssumeTouched)
	}
	if t.Size() != from.Sectors*cow.SectorBytes {
		return t.Refused("the kernel merged into it when it had %d bytes, and it has %d: extend it when that is finished", from.Sectors*cow.SectorBytes, t.Size())
	}
	if release, old := oldKernel(); old {
		k.o.Warn(fmt.Sprintf("after a power cut, chunks that this kernel, %s, has merged may be missing", release), wayout.Compare.Of(t.Path))
	}
	return nil
}
