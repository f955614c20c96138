package apply

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ddsfs/apply/record"
	"ddsfs/cow"
	"ddsfs/cow/blockdev"
	"ddsfs/cow/dm"
	"ddsfs/cow/files"
)

// KernelOptions say how the kernel is to merge.
type KernelOptions struct {
	Options
	// Name is that of the device that shows the new state meanwhile. To resume a
	// merge, "" is the name that it had.
	Name string
	// Consume has the kernel use up the delta itself, and not a copy of it.
	Consume bool
}

// ErrNoKernelMerge says that there is no merge by the kernel to resume.
var ErrNoKernelMerge = errors.New("no merge by the kernel is under way")

// DefaultName is what the device of a target is called where nobody says.
func DefaultName(targetPath string) string { return "ddsfs-" + filepath.Base(targetPath) }

// KernelFile has the kernel merge the delta in a file or a block device into the
// target. A merge of the same delta that was interrupted is resumed.
func KernelFile(ctx context.Context, path, targetPath string, o KernelOptions) (Result, error) {
	in, err := blockdev.Open(path)
	if err != nil {
		return Result{}, fmt.Errorf("delta: %w", err)
	}
	defer in.Close()
	if r, err := underWay(targetPath, o); err != nil {
		return Result{}, err
	} else if r != nil {
		// The kernel leaves the seal and the trailer as they are when it uses a
		// delta up.
		d, err := newDelta(input{Volume: in})
		if err != nil {
			return Result{}, fmt.Errorf("%s: %w", path, err)
		}
		return resumeSame(ctx, r, d.name(), targetPath, o)
	}
	k, err := openKernel(targetPath, o)
	if err != nil {
		return Result{}, err
	}
	defer k.close()
	if err := k.take(in); err != nil {
		return Result{}, err
	}
	// A delta that is refused or already merged is not copied first. What else is
	// wrong with it comes out when all of it is looked at.
	done := false
	if d, err := newDelta(input{Volume: in}); err == nil && d.ReadList() == nil {
		if d.Seal == nil && o.Consume {
			return Result{}, fmt.Errorf("delta %s: it is not sealed, and half used up it would look like a good one: do without --consume", path)
		}
		how, err := k.decide(d.facts(k.target.Size()), d)
		if err != nil {
			return Result{}, err
		}
		done = how.Verdict == record.Done
	}
	switch {
	case o.DryRun || done:
		return k.look(ctx, path, input{Volume: in})
	case o.Consume:
		return k.mergeIn(ctx, in)
	}
	return k.mergeCopy(ctx, path, io.NewSectionReader(in, 0, in.Size()), Copying)
}

// KernelPipe is KernelFile for a delta that comes from r.
func KernelPipe(ctx context.Context, r *os.File, targetPath string, o KernelOptions) (Result, error) {
	in := patient{ctx, r}
	if under, err := underWay(targetPath, o); err != nil {
		return Result{}, err
	} else if under != nil {
		store, err := cow.ReadStoreFrom(in)
		if err != nil {
			return Result{}, fmt.Errorf("%s: %w", r.Name(), err)
		}
		return resumeSame(ctx, under, store.Report().Digest, targetPath, o)
	}
	k, err := openKernel(targetPath, o)
	if err != nil {
		return Result{}, err
	}
	defer k.close()
	if info, err := blockdev.Stat(r); err == nil {
		if err := k.target.checkApart(info); err != nil {
			return Result{}, err
		}
	}
	if !o.DryRun {
		return k.mergeCopy(ctx, r.Name(), in, Receiving)
	}
	o.SpoolDir = k.spoolDir()
	s, err := spool(ctx, r.Name(), in, o.Options)
	if err != nil {
		return Result{}, err
	}
	defer s.Close()
	return k.look(ctx, r.Name(), s.input())
}

// KernelResume finishes the merge that is recorded, and is ErrNoKernelMerge if none
// is.
func KernelResume(ctx context.Context, targetPath string, o KernelOptions) (Result, error) {
	m, err := watch(targetPath, o.Options)
	if err != nil {
		return Result{}, err
	}
	k := &kernelMerger{m, o}
	defer k.close()
	switch {
	case m.known.Damaged != nil:
		return Result{}, fmt.Errorf("target %s: %w", targetPath, m.known.Damaged)
	case m.known.Record == nil:
		return Result{}, fmt.Errorf("target %s: nothing is recorded of it in %s", targetPath, o.StateDir)
	case m.known.ByKernel() == nil:
		return Result{}, fmt.Errorf("target %s: %w", targetPath, ErrNoKernelMerge)
	}
	return k.resume(ctx)
}

// underWay is the record of a target if the kernel has begun to merge into it and
// that is not finished.
func underWay(targetPath string, o KernelOptions) (*record.Record, error) {
	key, err := keyOf(targetPath)
	if err != nil {
		return nil, err
	}
	r, err := record.Dir{Path: o.StateDir}.Load(key)
	var damaged *record.DamagedError
	if r.ByKernel() == nil || errors.As(err, &damaged) {
		return nil, nil
	}
	return r, err
}

// resumeSame resumes a merge if it is that of the delta with the name.
func resumeSame(ctx context.Context, r *record.Record, name, targetPath string, o KernelOptions) (Result, error) {
	if name == "" || name != r.Merging.New.Delta {
		return Result{}, &RefusedError{targetPath, fmt.Sprintf("the kernel has begun to merge another delta into it, from %s to %s: %s; then apply this one",
			record.NameOf(r.Merging.Base), record.NameOf(r.Merging.New.Snapshot), record.ResumeWith(targetPath))}
	}
	o.Name = "" // the name that it has is kept, also where the device must be made again
	return KernelResume(ctx, targetPath, o)
}

// kernelMerger has the kernel merge a delta into a target that it has locked.
type kernelMerger struct {
	*merger
	o KernelOptions
}

// openKernel opens a target to have the kernel merge into it.
func openKernel(targetPath string, o KernelOptions) (*kernelMerger, error) {
	if err := o.kernel().checkFree(o.Name); err != nil {
		return nil, err
	}
	m, err := open(targetPath, files.ToRead, o.Options)
	if err != nil {
		return nil, err
	}
	if err = m.target.checkWritable(); err == nil {
		_, err = m.target.sectors()
	}
	if err == nil && m.known.Record != nil && m.known.ByKernel() != nil {
		err = m.target.refused("another apply has just begun to have the kernel merge into it")
	}
	if err != nil {
		m.close()
		return nil, err
	}
	if release, old := oldKernel(); old {
		o.warn(fmt.Sprintf("kernels before 5.11, and this is %s, don't flush the target before they drop a chunk from the delta: a power cut while it merges can lose chunks", release))
	}
	return &kernelMerger{m, o}, nil
}

// oldKernel tells whether the kernel is one that does not flush what it has merged
// before it forgets where it had it from, and which one it is.
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

// look looks through a delta, and does nothing else.
func (k *kernelMerger) look(ctx context.Context, name string, in input) (Result, error) {
	d, err := k.check(ctx, name, in)
	if err != nil {
		return Result{}, err
	}
	if d.how.Verdict == record.Done {
		return k.alreadyDone(ctx, d)
	}
	if _, err := k.undo(ctx, d); err != nil {
		return Result{}, err
	}
	result := k.newResult()
	result.Report = d.Report()
	return result, nil
}

// mergeIn merges from the delta itself, which is used up.
func (k *kernelMerger) mergeIn(ctx context.Context, in *blockdev.Device) (Result, error) {
	path, err := lastingPath(in.Info())
	if err != nil {
		return Result{}, fmt.Errorf("delta: %w", err)
	}
	d, err := k.check(ctx, path, input{Volume: in})
	if err != nil {
		return Result{}, err
	}
	if _, bytes := d.behind(k.target.Size()); bytes > 0 {
		return Result{}, fmt.Errorf("delta %s: it would have to be changed first, as its last chunk has what the target holds behind the volume's end: do without --consume", path)
	}
	if err := checkShown(in); err != nil {
		return Result{}, err
	}
	return k.merge(ctx, d, in, record.KernelMerge{Store: path, Consume: true})
}

// lastingPath is a name by which a file or a device is found again after a reboot.
// A link to a device is kept, as the device can have another name by then.
func lastingPath(info blockdev.Info) (string, error) {
	path, err := filepath.Abs(info.Path)
	if err != nil || info.Block {
		return path, err
	}
	return filepath.EvalSymlinks(path)
}

// mergeCopy merges from a copy of the delta that comes from r.
func (k *kernelMerger) mergeCopy(ctx context.Context, name string, r io.Reader, stage Stage) (Result, error) {
	path, d, err := k.copy(ctx, name, r, stage)
	if err != nil {
		return Result{}, err
	}
	store, err := blockdev.Open(path)
	if err == nil {
		defer store.Close()
		d.Store = d.At(store)
		err = k.take(store)
	}
	if err == nil && d.how.Verdict == record.Done {
		result, err := k.alreadyDone(ctx, d)
		return result, errors.Join(err, k.removeCopy(path))
	}
	if err != nil {
		return Result{}, errors.Join(err, k.removeCopy(path))
	}
	return k.merge(ctx, d, store, record.KernelMerge{Store: path})
}

// merge has the kernel merge a delta that was checked, and of which store is all or
// a copy.
func (k *kernelMerger) merge(ctx context.Context, d *checked, store *blockdev.Device, from record.KernelMerge) (Result, error) {
	r, device, err := k.prepare(ctx, d, store, from)
	var refused *RefusedError
	if errors.As(err, &refused) {
		return Result{}, err
	}
	if err != nil {
		return Result{}, fmt.Errorf("target %s: nothing was written: %w", k.target.path, err)
	}
	return k.start(ctx, r, device)
}

// prepare does all that comes before the first write to the target: steps 2 and 3 of
// the package's comment. If it fails, all is as it was.
func (k *kernelMerger) prepare(ctx context.Context, d *checked, store *blockdev.Device, from record.KernelMerge) (r *record.Record, device mapped, err error) {
	recorded := false
	defer func() {
		if err == nil {
			return
		}
		if recorded {
			// What the record names must be there until it does not name it any more.
			backErr := k.takeBack()
			if err = errors.Join(err, backErr); backErr != nil {
				return
			}
			err = errors.Join(err, k.state.Tidy(k.key, k.known.Record))
		}
		if !from.Consume {
			err = errors.Join(err, k.removeCopy(from.Store))
		}
	}()
	job := record.Merging{Kernel: &from}
	if job.Undo, err = k.undo(ctx, d); err != nil {
		return nil, nil, err
	}
	if job.Changes, err = k.changes(d); err != nil {
		return nil, nil, err
	}
	from.Name, from.UUID = k.o.Name, record.MergeUUIDPrefix+rand.Text()
	from.Sectors, from.ChunkSectors, from.Chunks = k.target.Size()/cow.SectorBytes, d.ChunkBytes/cow.SectorBytes, d.Changed.Len()
	recorded = true
	if r, err = k.begin(d.facts, d.how, job); err != nil {
		return nil, nil, err
	}
	if device, err = k.raise(&from, store); err != nil {
		return nil, nil, err
	}
	if ctx.Err() != nil {
		return nil, nil, errors.Join(errSignal, device.Remove())
	}
	return r, device, nil
}

// raise makes the device through which the kernel is to merge from the store, and
// does not let it begin.
func (k *kernelMerger) raise(from *record.KernelMerge, store *blockdev.Device) (mapped, error) {
	f, err := store.Reopen(os.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("delta: %w", err)
	}
	defer f.Close()
	// The kernel reads it beneath the page cache.
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("delta %s: flush: %w", from.Store, err)
	}
	l, err := newLower(k.o.kernel(), k.target.OS(), f, true)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	chunkBytes := from.ChunkSectors * cow.SectorBytes
	if err := errors.Join(l.checkWritable(), l.checkChunk(chunkBytes)); err != nil {
		return nil, err
	}
	return k.load(l, from.Name, from.UUID, false, snapshotOf(dm.KindMerge, from.Sectors, l.target, l.delta, "P", chunkBytes))
}

// start lets the kernel merge, and waits for it.
func (k *kernelMerger) start(ctx context.Context, r *record.Record, device mapped) (Result, error) {
	// If that fails, the kernel has hardly begun, but it may have.
	if err := device.Resume(false); err != nil {
		return Result{}, k.unfinished(err)
	}
	return k.follow(ctx, r, device)
}

// resume finishes what an earlier run has begun.
func (k *kernelMerger) resume(ctx context.Context) (Result, error) {
	r := k.known.Record
	from := r.Merging.Kernel
	device, err := k.o.kernel().find(from.UUID)
	if err == nil {
		var goesOn bool
		if goesOn, err = k.adopt(r, device); err != nil {
			return Result{}, err
		}
		if goesOn {
			return k.follow(ctx, r, device)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Result{}, err
	}
	if err := k.claim(); err != nil {
		return Result{}, err
	}
	if from.Unwatched {
		// Whether somebody wrote to it, is gone with the device.
		if err := k.touch(r); err != nil {
			return Result{}, err
		}
	}
	store, err := k.openStore(r)
	if err != nil {
		return Result{}, err
	}
	defer store.Close()
	if k.o.Name != "" {
		from.Name = k.o.Name
	}
	// What the kernel writes from now on is not to be taken for what others wrote.
	if r.Evidence, err = k.evidence(r.Evidence, nil, k.known.Written.MayHold); err != nil {
		return Result{}, fmt.Errorf("target %s: %w", k.target.path, err)
	}
	if err := k.state.Save(r); err != nil {
		return Result{}, err
	}
	if device, err = k.raise(from, store); err == nil && ctx.Err() != nil {
		err = errors.Join(errSignal, device.Remove())
	}
	var refused *RefusedError
	if errors.As(err, &refused) {
		return Result{}, err
	}
	if err != nil {
		return Result{}, k.unfinished(err)
	}
	return k.start(ctx, r, device)
}

// adopt looks at the device of an earlier run. It removes one through which the
// kernel never began to merge, or can't go on.
func (k *kernelMerger) adopt(r *record.Record, device mapped) (goesOn bool, err error) {
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
	if err := k.state.Save(r); err != nil {
		return false, err
	}
	status, err := device.Status()
	if err != nil {
		return false, err
	}
	if unhealthy := checkHealthy(device.Path(), status); unhealthy != nil {
		// The kernel tries again when the device is made again.
		if err := device.Remove(); err != nil {
			return false, k.unfinished(fmt.Errorf("%w, and it can't be made again as long as it is in use (%s): %w", unhealthy, inUse(device.Path()), err))
		}
		return false, nil
	}
	return true, nil
}

// claim claims a target that no device of ours holds any more.
func (k *kernelMerger) claim() error {
	was := k.target
	was.Close() // or it would be counted among the others that have it open
	t, err := openTarget(k.o.Options, was.path, files.ToRead)
	if err != nil {
		return err
	}
	k.target = t
	if !t.info.Same(was.info) {
		return fmt.Errorf("target %s: it is another one than a moment ago", t.path)
	}
	from := k.known.Merging.Kernel
	why, err := k.touchedItself()
	if err != nil {
		return fmt.Errorf("target %s: %w", t.path, err)
	}
	if why != "" {
		return t.refused("it is not as the kernel left it (%s): somebody else wrote to it, or it is another one: send a full delta (mount --full); apply --assume-base without --kernel takes your word that it is right", why)
	}
	if t.size != from.Sectors*cow.SectorBytes {
		return t.refused("the kernel merged into it when it had %d bytes, and it has %d: extend it when that is finished", from.Sectors*cow.SectorBytes, t.size)
	}
	if release, old := oldKernel(); old {
		k.o.warn(fmt.Sprintf("after a power cut, chunks that this kernel, %s, has merged may be missing: compare with ddsfs verify DELTA %s", release, t.path))
	}
	return nil
}

// touchedItself tells how a target shows that it was written to by itself, and not
// through the device of the merge, "" if it does not.
func (k *kernelMerger) touchedItself() (string, error) {
	r := k.known.Record
	writes := k.state.Writes(r, k.known.Written)
	if r.TouchedByDevice() {
		writes.All = true // the kernel brings it what was written through the device
	}
	return k.touched(r, writes)
}

// unfinished is the error of a merge that has begun and is not done.
func (k *kernelMerger) unfinished(err error) error {
	return fmt.Errorf("target %s: HALF MERGED: %w: %s", k.target.path, &brokenOff{err}, record.ResumeWith(k.target.path))
}
