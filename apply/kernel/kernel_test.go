// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ddsfs/apply"
	"ddsfs/cow/dm"
	"ddsfs/cow/wayout"
	"ddsfs/testdata/harness"

	"ddsfs/cow"
)

const errBusy = syscall.EBUSY

// rig is a rig whose delta a simulated kernel merges.
type rig struct {
	*harness.Rig
	keep string // the directory of restore points, "" to keep none
}

// wholeSectors is the size of a volume that the kernel can show all of.
const wholeSectors = 40 * harness.ChunkBytes

func newRig(t *testing.T, volumeBytes int) *rig {
	t.Helper()
	r := &rig{Rig: harness.New(t, volumeBytes)}
	harness.Must(t, r.apply(r.Full))
	return r
}

// apply merges a delta without the kernel.
func (r *rig) apply(delta string) error {
	_, err := apply.File(context.Background(), delta, r.Target, apply.Options{StateDir: r.StateDir()})
	return err
}

// options are those of a merge by a simulated kernel.
func (r *rig) options(k *simulated) Options {
	return Options{Options: apply.Options{StateDir: r.StateDir(), Storage: k.storage}, Name: "simulated", devices: k, poll: 1}
}

// kernelApply has a simulated kernel merge the rig's delta.
func (r *rig) kernelApply(k *simulated, consume bool) error {
	o := r.options(k)
	o.Consume, o.Keep = consume, r.keep
	_, err := File(context.Background(), r.Delta, r.Target, o)
	return err
}

// afterwards does the same without failures: a kernel with the devices of k, or a new one
// after a power cut.
func afterwards(k *simulated, powerCut bool) *simulated {
	next := newSimulated(&harness.Storage{At: 1 << 30})
	if !powerCut {
		next.loops, next.mapped = k.loops, k.mapped
		for _, d := range next.mapped {
			d.kernel = next
		}
	}
	return next
}

// checkClean checks that nothing is left of a merge that is done.
func (r *rig) checkClean(where string, k *simulated) {
	r.T.Helper()
	if len(k.mapped) > 0 {
		r.T.Errorf("%s: a device is left", where)
	}
	names, err := filepath.Glob(filepath.Join(r.Dir, "state", "*"))
	harness.Must(r.T, err)
	for _, name := range names {
		if ext := filepath.Ext(name); ext != ".json" && ext != ".lock" && ext != ".chunks" {
			r.T.Errorf("%s: %s is left", where, name)
		}
	}
	if record := r.Record(); record.Merging != nil {
		r.T.Errorf("%s: the record says %+v", where, record.Merging)
	}
}

// Wherever a merge by the kernel is stopped, and whatever had not become durable:
// the same command, and the one that resumes, finish it, and so does a merge
// without the kernel where the device is gone.
func TestKernelStopAtEveryOperation(t *testing.T) {
	for _, failure := range []struct {
		name     string
		fails    bool
		powerCut bool
		loss     harness.Loss
		seed     uint64
	}{
		{"killed", false, false, harness.LoseNothing, 0},
		{"power cut, nothing lost", false, true, harness.LoseNothing, 0},
		{"power cut, all lost", false, true, harness.LoseAll, 0},
		{"power cut, some lost 1", false, true, harness.LoseSome, 1},
		{"failed once", true, false, harness.LoseNothing, 0},
		{"failed once, power cut, all lost", true, true, harness.LoseAll, 0},
	} {
		for _, finish := range []string{"same", "resume", "plain", "consume", "keep"} {
			switch {
			case finish == "plain" && !failure.powerCut:
				continue // the device holds the target
			case failure.fails && (finish == "resume" || finish == "consume"):
				continue // little else than after a kill
			}
			t.Run(failure.name+"/"+finish, func(t *testing.T) {
				t.Parallel()
				for n := range harness.Operations {
					r := newRig(t, wholeSectors)
					if finish == "keep" {
						r.keep = filepath.Join(r.Dir, "points")
					}
					since := r.Record().Since
					good := r.MustReadAll(r.Delta)
					k := newSimulated(&harness.Storage{At: n, Fails: failure.fails})
					err := r.kernelApply(k, finish == "consume")
					where := fmt.Sprintf("operation %d (%v)", n, err)
					if k.storage.Count < n {
						if err != nil || !r.TargetIs(r.After) {
							t.Fatalf("without a failure: %v", err)
						}
						r.checkClean("without a failure", k)
						os.RemoveAll(r.Dir)
						if n < 60 {
							t.Fatalf("only %d operations", n)
						}
						return
					}
					for _, d := range k.mapped {
						if failure.fails && d.suspended && !d.resumeFailed {
							t.Fatalf("%s: the device is left suspended", where)
						}
					}
					harness.Must(t, k.storage.Crash(failure.loss, rand.New(rand.NewPCG(failure.seed, uint64(n)))))
					if record := r.Record(); record.ByKernel() == nil && !r.TargetIs(r.Base) && !r.TargetIs(r.After) {
						t.Fatalf("%s: half merged, and nothing of that is recorded", where)
					}
					r.finishKernel(where, afterwards(k, failure.powerCut), finish, good)
					if finish == "keep" {
						r.checkKept(where, since)
					}
					os.RemoveAll(r.Dir)
					if t.Failed() {
						return
					}
				}
			})
		}
	}
}

// checkKept checks that one file is kept, of the state since then, that it is whole, and
// that it is listed.
func (r *rig) checkKept(where string, since time.Time) {
	r.T.Helper()
	names, err := filepath.Glob(filepath.Join(r.keep, "*"))
	harness.Must(r.T, err)
	list := r.Record().Kept
	if len(names) != 1 || filepath.Base(names[0]) != since.Format("20060102T150405Z.cow") || len(list) != 1 || list[0].Path != names[0] || !list[0].Since.Equal(since) {
		r.T.Errorf("%s: there is %v, listed %+v", where, names, list)
		return
	}
	v, err := apply.VerifyFile(context.Background(), names[0], "", apply.Options{StateDir: r.StateDir()})
	if err != nil || v.Err() != nil || v.Delta != list[0].Delta || list[0].Snapshot != "base" {
		r.T.Errorf("%s: kept is %+v: %v", where, v, err)
	}
}

// A merge by the kernel removes what was kept before, if that is asked for, also when it was
// done already. One that was stopped before is kept once.
func TestKernelKeepsLast(t *testing.T) {
	r := newRig(t, wholeSectors)
	defer os.RemoveAll(r.Dir)
	next := filepath.Join(r.Dir, "next")
	harness.SealedFile(t, next, "new", "next", r.After, harness.Change(r.After, 5, 3))
	r.keep = filepath.Join(r.Dir, "points")
	harness.Must(t, r.kernelApply(newSimulated(&harness.Storage{At: 1 << 30}), false))
	o := r.options(newSimulated(&harness.Storage{At: 1 << 30}))
	o.Keep = r.keep
	stopping, stop := context.WithCancel(context.Background())
	stop()
	if _, err := File(stopping, next, r.Target, o); err == nil {
		t.Fatal("not stopped")
	}
	for _, last := range []int{0, 1, 1} {
		o.KeepLast = last
		_, err := File(context.Background(), next, r.Target, o)
		harness.Must(t, err)
		names, err := filepath.Glob(filepath.Join(r.keep, "*"))
		harness.Must(t, err)
		if list := r.Record().Kept; len(names) != 2-last || len(list) != 2-last || list[len(list)-1].Path != names[len(names)-1] {
			t.Errorf("the last %d: there is %v, listed %+v", last, names, list)
		}
	}
}

// isUnwatched tells whether a delta was refused because ddsfs had given up on a merge
// before the device went away.
func isUnwatched(err error) bool {
	var refused *apply.RefusedError
	return errors.As(err, &refused) && strings.Contains(err.Error(), "nobody watched")
}

// finishKernel finishes what was interrupted in that way.
func (r *rig) finishKernel(where string, k *simulated, finish string, good []byte) {
	r.T.Helper()
	var err error
	switch finish {
	case "same", "consume", "keep":
		if _, statErr := os.Stat(r.Delta); statErr != nil {
			// It was used up, and removed as the last thing.
			break
		}
		err = r.kernelApply(k, finish == "consume")
		if r.TargetIs(r.After) && err != nil && strings.Contains(err.Error(), "does not match its digests") {
			err = nil // as was this, but for the removal
		}
	case "resume":
		_, err = Resume(context.Background(), r.Target, r.options(k))
		if errors.Is(err, ErrNoMerge) {
			// Not begun, or done.
			err = r.kernelApply(k, false)
		}
	case "plain":
		err = r.apply(r.Delta)
		if isUnwatched(err) {
			_, err = Resume(context.Background(), r.Target, r.options(k))
		}
	}
	if err != nil {
		r.T.Errorf("%s: %s: %v", where, finish, err)
		return
	}
	if !r.TargetIs(r.After) {
		r.T.Errorf("%s: %s: the target is not the new state", where, finish)
	}
	if finish != "consume" && !bytes.Equal(r.MustReadAll(r.Delta), good) {
		r.T.Errorf("%s: the delta is not what it was", where)
	}
	// A device that could not be removed in the end is the target's plain view.
	for _, d := range k.mapped {
		if d.active == nil || d.active.Type != dm.KindLinear || d.suspended {
			r.T.Errorf("%s: %s: a device is left, with the table %+v", where, finish, d.active)
		}
	}
	clear(k.mapped)
	// The next state is taken from what the record says.
	next := filepath.Join(r.Dir, "next")
	harness.SealedFile(r.T, next, "new", "next", r.After, r.Base)
	err = r.apply(next)
	if isUnwatched(err) && r.Record().Touched != "" {
		harness.Must(r.T, r.apply(r.Full))
	} else if err != nil {
		r.T.Errorf("%s: the next delta: %v", where, err)
	}
	if !r.TargetIs(r.Base) {
		r.T.Errorf("%s: the target is not the next state", where)
	}
	r.checkClean(where, k)
}

// Data that users write to the device while the kernel merges is in the target at the
// end, wherever the merge is stopped, and the next delta is refused.
func TestKernelUsersWrite(t *testing.T) {
	const (
		untouched = 39
		// From the write on to the end of its record, a power cut takes the knowledge
		// with it: while the kernel merges a chunk, is asked for its count, and the
		// record is replaced.
		window = 4 + 1 + 5
	)
	for _, powerCut := range []bool{false, true} {
		for _, asked := range []int{1, 4, lastMoment} {
			t.Run(fmt.Sprintf("power cut %v, asked %d times", powerCut, asked), func(t *testing.T) {
				t.Parallel()
				for n := range harness.Operations {
					r := newRig(t, wholeSectors)
					changed := harness.Changed(r.Base, r.After)
					if slices.Contains(changed, untouched) {
						t.Fatal("a precondition, a chunk that is not in the delta")
					}
					chunks := []uint64{changed[0], changed[len(changed)-1], untouched}
					user := bytes.Repeat([]byte("user"), harness.ChunkBytes/4)
					want, wroteAt := slices.Clone(r.After), 0
					for _, c := range chunks {
						copy(want[c*harness.ChunkBytes:], user)
					}
					k := newSimulated(&harness.Storage{At: n})
					k.userAt, k.user = asked, func(d *simulatedDevice) error {
						err := d.userWrites(user, chunks...)
						if err == nil {
							wroteAt = d.kernel.storage.Count
						}
						return err
					}
					err := r.kernelApply(k, false)
					stopped := k.storage.Count >= n
					if !stopped && err != nil {
						t.Fatal(err)
					}
					if wroteAt == 0 {
						os.RemoveAll(r.Dir)
						continue // stopped before it, or within
					}
					where := fmt.Sprintf("operation %d (%v)", n, err)
					recorded := r.Record().Touched != ""
					next := afterwards(k, powerCut)
					if stopped {
						harness.Must(t, k.storage.Crash(harness.LoseNothing, nil))
						if _, err := Resume(context.Background(), r.Target, r.options(next)); err != nil && !errors.Is(err, ErrNoMerge) {
							t.Fatalf("%s: %v", where, err)
						}
					}
					if !r.TargetIs(want) {
						t.Fatalf("%s: the target is not the new state with what was written", where)
					}
					lost := powerCut && stopped && !recorded
					if lost && asked != lastMoment && n > wroteAt+window {
						t.Fatalf("%s: what was written at operation %d was not recorded", where, wroteAt)
					}
					if !lost {
						if r.Record().Touched == "" {
							t.Fatalf("%s: nothing is recorded of what was written", where)
						}
						later := filepath.Join(r.Dir, "later")
						harness.SealedFile(t, later, "new", "later", r.After, r.Base)
						var refused *apply.RefusedError
						if err := r.apply(later); !errors.As(err, &refused) || !strings.Contains(err.Error(), "written to through") {
							t.Fatalf("%s: the next delta: %v", where, err)
						}
					}
					os.RemoveAll(r.Dir)
					if !stopped {
						return
					}
				}
			})
		}
	}
}

// A process can come in between the claim that is given up and the device mapper's:
// that is found before anything is written, and all is as it was.
func TestKernelSomebodyCameIn(t *testing.T) {
	for name, comes := range map[string]func(t *testing.T, r *rig) (leave func()){
		"wrote": func(t *testing.T, r *rig) func() {
			f, err := os.OpenFile(r.Target, os.O_WRONLY, 0)
			harness.Must(t, err)
			_, err = f.WriteAt([]byte("x"), 5)
			harness.Must(t, errors.Join(err, f.Close()))
			return func() {}
		},
		"shows it": func(t *testing.T, r *rig) func() {
			f, err := os.OpenFile(r.Target, os.O_RDWR, 0)
			harness.Must(t, err)
			defer f.Close()
			_, l, err := system{}.loop(f, true)
			harness.Must(t, err)
			return func() { l.Close() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, wholeSectors)
			defer os.RemoveAll(r.Dir)
			k := newSimulated(&harness.Storage{At: 1 << 30})
			o := r.options(k)
			var leave func()
			o.devices = &intruded{simulated: k, comes: func() { leave = comes(t, r) }}
			_, err := File(context.Background(), r.Delta, r.Target, o)
			var refused *apply.RefusedError
			if !errors.As(err, &refused) || leave == nil {
				t.Fatalf("error %v", err)
			}
			leave()
			r.checkClean("refused", k)
			if record := r.Record(); record.Holds == nil || record.Holds.Snapshot != "base" {
				t.Errorf("the record says %+v", record)
			}
		})
	}
}

// intruded is a kernel that lets a process come in while it loads a table.
type intruded struct {
	*simulated
	comes func()
}

func (i *intruded) create(name, uuid string) (mapped, error) {
	d, err := i.simulated.create(name, uuid)
	return intrudedDevice{d, i.comes}, err
}

type intrudedDevice struct {
	mapped
	comes func()
}

func (d intrudedDevice) Load(readOnly bool, table ...dm.Target) error {
	d.comes()
	return d.mapped.Load(readOnly, table...)
}

// A device that is open stays as a view of the target, and a merge that
// failed is begun anew with another device.
func TestKernelBusyAndFailed(t *testing.T) {
	r := newRig(t, wholeSectors)
	defer os.RemoveAll(r.Dir)
	k := newSimulated(&harness.Storage{At: 1 << 30})
	k.userAt, k.user = 2, func(d *simulatedDevice) error {
		d.busy, d.failed = true, true
		return nil
	}
	err := r.kernelApply(k, false)
	for _, word := range []string{"HALF MERGED", "Merge failed", "resume kernel: " + r.Target} {
		if err == nil || !strings.Contains(fmt.Sprint(err, wayout.From(err)), word) {
			t.Errorf("error %v, want %q", err, word)
		}
	}
	k = afterwards(k, false)
	o := r.options(k)
	if _, err := Resume(context.Background(), r.Target, o); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("as long as it is open: %v", err)
	}
	for _, d := range k.mapped {
		d.busy = false
	}
	k.userAt, k.user = 1, func(d *simulatedDevice) error {
		d.busy = true
		return nil
	}
	result, err := Resume(context.Background(), r.Target, o)
	if err != nil || result.Device != "/dev/mapper/simulated" || result.Exceptions == 0 || result.Touched {
		t.Errorf("%+v, %v", result, err)
	}
	for _, d := range k.mapped {
		if d.active.Type != dm.KindLinear || d.suspended {
			t.Errorf("the device that stays: %+v", d)
		}
	}
	clear(k.mapped)
	r.checkClean("done", k)
	if !r.TargetIs(r.After) {
		t.Error("the target is not the new state")
	}
}

// After a signal writes to the device go unnoticed: if it goes with the power, the
// target counts as written to.
func TestKernelSignal(t *testing.T) {
	for _, powerCut := range []bool{false, true} {
		r := newRig(t, wholeSectors)
		defer os.RemoveAll(r.Dir)
		ctx, signal := context.WithCancel(context.Background())
		k := newSimulated(&harness.Storage{At: 1 << 30})
		k.userAt, k.user = 3, func(*simulatedDevice) error {
			signal()
			return nil
		}
		_, err := File(ctx, r.Delta, r.Target, r.options(k))
		for _, word := range []string{r.Target, "HALF MERGED", "the kernel goes on", "/dev/mapper/simulated", "resume kernel: " + r.Target} {
			if err == nil || !strings.Contains(fmt.Sprint(err, wayout.From(err)), word) {
				t.Errorf("error %v, want %q", err, word)
			}
		}
		if errors.Is(err, context.Canceled) {
			t.Error("it would be said in other words")
		}
		k = afterwards(k, powerCut)
		if powerCut {
			if err := r.apply(r.Delta); !isUnwatched(err) {
				t.Errorf("without the kernel: %v", err)
			}
		}
		result, err := Resume(context.Background(), r.Target, r.options(k))
		if err != nil || result.Touched != powerCut || !r.TargetIs(r.After) || result.ResumedBytes == 0 || result.WrittenBytes == 0 {
			t.Errorf("power cut %v: %+v, %v", powerCut, result, err)
		}
		r.checkClean("done", k)
	}
}

// A device that was suspended goes on when the merge is resumed, and one that
// says that it is done, and is not, is not believed.
func TestKernelSuspendedAndWrong(t *testing.T) {
	r := newRig(t, wholeSectors)
	defer os.RemoveAll(r.Dir)
	k := newSimulated(&harness.Storage{At: 1 << 30})
	k.done = true
	for range 2 {
		if err := r.kernelApply(k, false); err == nil || !strings.Contains(err.Error(), "still listed") || !strings.Contains(err.Error(), "HALF MERGED") {
			t.Fatalf("error %v", err)
		}
	}
	if r.Record().ByKernel() == nil {
		t.Error("recorded as done")
	}
	k.done = false
	for _, d := range k.mapped {
		d.suspended = true
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := Resume(ctx, r.Target, r.options(k)); err != nil || !r.TargetIs(r.After) {
		t.Errorf("resumed: %v", err)
	}
	r.checkClean("done", k)
}

// Where the last chunk goes on past the volume's end, the kernel gets what the target
// holds there.
func TestKernelBehindTheVolume(t *testing.T) {
	for name, seed := range map[string]int{"more than an area": 40, "one chunk": 1} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, wholeSectors+100)
			defer os.RemoveAll(r.Dir)
			behind := []byte(strings.Repeat("behind..", 1000))
			behind = behind[:len(behind)-(len(behind)+len(r.Base))%cow.SectorBytes]
			r.Write(r.Target, append(slices.Clone(r.Base), behind...))
			after := slices.Clone(r.Base)
			for c := range seed {
				after[len(after)-1-c*harness.ChunkBytes]++
			}
			harness.SealedFile(t, r.Delta, "base", "new", r.Base, after)
			k := newSimulated(&harness.Storage{At: 1 << 30})
			o := r.options(k)
			o.AssumeBase, o.Consume = true, true
			if _, err := File(context.Background(), r.Delta, r.Target, o); !slices.Contains(wayout.From(err), wayout.WithoutConsume) {
				t.Errorf("the delta itself: %v", err)
			}
			o.Consume = false
			if _, err := File(context.Background(), r.Delta, r.Target, o); err != nil {
				t.Fatal(err)
			}
			if got := r.MustReadAll(r.Target); string(got) != string(after)+string(behind) {
				t.Error("not the new volume with what was behind it")
			}
			r.checkClean("done", k)
		})
	}
}

// A delta that is recorded as merged, and is not there any more, is merged again where
// that needs no word of the user's.
func TestKernelMergedBeforeAndDamaged(t *testing.T) {
	for _, consume := range []bool{false, true} {
		r := newRig(t, wholeSectors)
		defer os.RemoveAll(r.Dir)
		r.Delta = r.Full
		damaged := slices.Clone(r.Base)
		damaged[5]++
		r.Write(r.Target, damaged)
		r.Blind()
		recorded := r.Record()
		recorded.Evidence.Samples = nil
		harness.Must(t, r.State().Save(recorded))
		k := newSimulated(&harness.Storage{At: 1 << 30})
		o := r.options(k)
		o.Consume = consume
		result, err := File(context.Background(), r.Delta, r.Target, o)
		if err != nil || result.WrittenBytes == 0 || !r.TargetIs(r.Base) {
			t.Errorf("consume %v: %+v, %v", consume, result, err)
		}
		r.checkClean("done", k)
	}
}

func TestKernelVersion(t *testing.T) {
	for release, old := range map[string]bool{
		"6.1.0-48-cloud-amd64": false, "5.11.0": false, "5.10.0-28-amd64": true, "4.19.0": true, "5.9": true, "10.0-rc1": false, "x": false, "": false,
	} {
		if before(release, 5, 11) != old {
			t.Errorf("%q: want %v", release, old)
		}
	}
}

// A sparse delta says zeros of what it does not list, which the kernel does not know: it
// merges it only where there are zeros already.
func TestKernelSparse(t *testing.T) {
	for _, zeros := range []bool{false, true} {
		r := newRig(t, wholeSectors)
		defer os.RemoveAll(r.Dir)
		clear(r.After[10*harness.ChunkBytes : 20*harness.ChunkBytes])
		left := r.After[11*harness.ChunkBytes : 19*harness.ChunkBytes]
		var list []uint64
		for c := range uint64(wholeSectors / harness.ChunkBytes) {
			if c < 11 || c >= 19 {
				list = append(list, c)
			}
		}
		harness.Sealed(t, r.Delta, cow.SealOptions{New: "new", Sparse: true}, r.After, list)
		if zeros {
			cleared := slices.Clone(r.Base)
			copy(cleared[11*harness.ChunkBytes:], left)
			r.Write(r.Target, cleared)
			r.Base = cleared
		}
		k := newSimulated(&harness.Storage{At: 1 << 30})
		err := r.kernelApply(k, false)
		var refused *apply.RefusedError
		switch {
		case zeros && (err != nil || !r.TargetIs(r.After)):
			t.Errorf("where there are zeros: %v", err)
		case !zeros && (!errors.As(err, &refused) || !slices.Contains(wayout.From(err), wayout.WithoutKernel) || !r.TargetIs(r.Base)):
			t.Errorf("where there is something: %v", err)
		}
		if !zeros {
			harness.Must(t, r.apply(r.Delta))
			if !r.TargetIs(r.After) {
				t.Error("without the kernel: not the new state")
			}
			continue
		}
		r.checkClean("sparse", k)
	}
}
