// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow/files"
	"ddsfs/cow/snapshots"
	"ddsfs/testdata/lab/dm"
)

// stateDir is where ddsfs writes down that it holds a metadata snapshot, unless it is told
// otherwise.
const stateDir = "/var/lib/ddsfs"

// notes are the notes in the state directory about metadata snapshots that are held.
func notes(t *testing.T) []string {
	t.Helper()
	notes, err := filepath.Glob(filepath.Join(stateDir, "*.held"))
	if err != nil {
		t.Fatal(err)
	}
	return notes
}

// wantHeld checks what the pool holds, - for nothing, and that there is no note about it.
func (p *plainPool) wantHeld(t *testing.T, what, want string) {
	t.Helper()
	if held := p.held(t); held != want {
		t.Errorf("%s: the pool holds %s, want %s", what, held, want)
	}
	if left := notes(t); len(left) > 0 {
		t.Errorf("%s: left %q", what, left)
	}
}

// newBusyPool makes a pool with a pair in it.
func newBusyPool(t *testing.T) *plainPool {
	t.Helper()
	p := newPlainPool(t, 128, 16384)
	p.write(t, "base", 0, 2048)
	p.snapshot(t, "base")
	p.write(t, "new", 100, 400)
	p.write(t, "new", 9000, 8)
	p.snapshot(t, "new")
	return p
}

// keepsBusy writes to the volume and discards that again, and commits each time, until it
// is halted.
func (p *plainPool) keepsBusy(t *testing.T) (halt func()) {
	t.Helper()
	file, err := os.OpenFile(p.volume.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan error)
	go func() {
		for at := int64(0); ; at++ {
			select {
			case <-stop:
				ended <- file.Close()
				return
			default:
			}
			sector := 10240 + at%32*128
			_, err := file.WriteAt(dm.Fill("busy", sector, 8), sector*dm.SectorSize)
			if err = errors.Join(err, file.Sync()); err == nil && at%3 > 0 {
				err = errors.Join(discard(file, sector*dm.SectorSize, 64<<10), file.Sync())
			}
			if err != nil {
				ended <- errors.Join(err, file.Close())
				return
			}
		}
	}()
	return func() {
		close(stop)
		if err := <-ended; err != nil {
			t.Errorf("the writer: %v", err)
		}
	}
}

// The delta is the same however much the pool is written to, whether its metadata is read
// with a metadata snapshot or without.
func TestPoolBusy(t *testing.T) {
	p := newBusyPool(t)
	want := deltaOf(t, openPair(t, pairOf("base", "new")))
	halt := p.keepsBusy(t)
	defer halt()
	// It goes on until a run found the pool too busy.
	for i, tooBusy := 0, false; i < 15 || !tooBusy; i++ {
		o := pairOf("base", "new")
		o.UnheldTries = []int{0, 1, -1}[i%3]
		storage := new(killing) // which only counts
		o.Storage = storage
		pair, err := snapshots.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if o.UnheldTries >= 0 && storage.steps > 0 {
			tooBusy = true
		}
		dm.Equal(t, "the delta of a busy pool", deltaOf(t, pair), want)
		if err := pair.Close(); err != nil {
			t.Error(err)
		}
		p.wantHeld(t, "a busy pool", "-")
	}
}

// What was written a moment ago is in no tree on disk before the kernel commits it.
func TestPoolUncommitted(t *testing.T) {
	p := newBusyPool(t)
	content := file(t, dm.Fill("uncommitted", 0, 8))
	o := pairOf("base", "data")
	o.AllowLiveOrigin = true
	for block := uint64(96); block < 104; block++ {
		dm.Run(t, "dd", "if="+content, "of="+p.volume.Path, "bs=4096", fmt.Sprint("seek=", block*16), "oflag=direct", "conv=notrunc", "status=none")
		if pair := openPair(t, o); !pair.Delta.Body().Layer().Changed.Contains(block) {
			t.Errorf("block %d, which was just written to, is missing", block)
		}
	}
}

// A metadata snapshot of somebody else's is neither used nor released.
func TestPoolHeldByOthers(t *testing.T) {
	p := newBusyPool(t)
	want := deltaOf(t, openPair(t, pairOf("base", "new")))
	p.Message(t, "reserve_metadata_snap")
	held := p.held(t)
	out := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", plainPath("base"), plainPath("new"), "-o", out)
	dm.Holds(t, "the delta of a quiet pool", out, want)
	p.wantHeld(t, "a quiet pool", held)
	o := pairOf("base", "new")
	o.UnheldTries = -1
	_, err := snapshots.Open(o)
	for _, words := range []string{"thin pool pool", "too busy", "somebody else holds", "dmsetup message pool 0 release_metadata_snap"} {
		if err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("a busy pool: %v, want %q", err, words)
		}
	}
	p.wantHeld(t, "a busy pool", held)
	p.Message(t, "release_metadata_snap")
	dm.Equal(t, "the delta of a pool that nobody holds", deltaOf(t, openPair(t, o)), want)
	p.wantHeld(t, "a pool that nobody holds", "-")
}

// killAtEnv has the test binary read a pair, and kill itself at a step of what it does in
// the state directory.
const killAtEnv = "DDSFS_LAB_KILL_AT"

// killing is a storage whose process is killed at a step.
type killing struct {
	files.Disk
	at, steps int
}

func (k *killing) step() {
	if k.steps++; k.steps == k.at {
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			panic(err)
		}
		select {}
	}
}

func (k *killing) Create(path string) (files.File, error) {
	k.step()
	defer k.step()
	return k.Disk.Create(path)
}

func (k *killing) Name(f files.File, path string) error {
	k.step()
	defer k.step()
	return k.Disk.Name(f, path)
}

func (k *killing) NameNew(f files.File, path string) error {
	k.step()
	defer k.step()
	return k.Disk.NameNew(f, path)
}

func (k *killing) Remove(path string) error {
	k.step()
	defer k.step()
	return k.Disk.Remove(path)
}

func (k *killing) SyncDir(path string) error {
	k.step()
	defer k.step()
	return k.Disk.SyncDir(path)
}

// readAndDie is what the test binary does as a process that is killed.
func readAndDie(at string) (exitCode int) {
	n, err := strconv.Atoi(at)
	o := pairOf("base", "new")
	o.UnheldTries, o.Storage = -1, &killing{at: n}
	var pair *snapshots.Pair
	if err == nil {
		pair, err = snapshots.Open(o)
	}
	if err == nil {
		err = pair.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// kill -9 at every step: the next run ends what it left, and nothing of anybody else's.
func TestPoolKilled(t *testing.T) {
	p := newBusyPool(t)
	want := deltaOf(t, openPair(t, pairOf("base", "new")))
	next := func() []byte {
		t.Helper()
		pair, err := snapshots.Open(pairOf("base", "new"))
		if err != nil {
			t.Fatal(err)
		}
		defer pair.Close()
		return deltaOf(t, pair)
	}
	run := func(at int) (killed bool) {
		t.Helper()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprint(killAtEnv, "=", at))
		said, err := cmd.CombinedOutput()
		killed = cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
		if err != nil && !killed {
			t.Fatalf("%v\n%s", err, said)
		}
		return killed
	}
	var held, noted int
	for at := 1; run(at); at++ {
		if p.held(t) != "-" {
			held++
		}
		if len(notes(t)) > 0 {
			noted++
		}
		dm.Equal(t, "the delta after a kill", next(), want)
		p.wantHeld(t, fmt.Sprintf("after a kill at step %d", at), "-")

		// By then, somebody else holds one.
		run(at)
		if p.held(t) != "-" {
			p.Message(t, "release_metadata_snap")
		}
		p.Message(t, fmt.Sprintf("set_transaction_id %d %d", at-1, at))
		p.Message(t, "reserve_metadata_snap")
		theirs := p.held(t)
		next()
		p.wantHeld(t, fmt.Sprintf("held by others after a kill at step %d", at), theirs)
		p.Message(t, "release_metadata_snap")
	}
	p.wantHeld(t, "a run that survived", "-")
	if held < 5 || noted < held {
		t.Errorf("a precondition: of the kills, %d left a metadata snapshot and %d a note", held, noted)
	}
}

// A signal ends the reading at once, and what it holds.
func TestPoolSignal(t *testing.T) {
	p := newBusyPool(t)
	halt := p.keepsBusy(t)
	defer halt()
	// Each reading of the metadata takes so long that the pool changes meanwhile.
	p.breaks(t, p.Metadata, fmt.Sprintf("delay %s 0 250 %[1]s 0 0", p.disks[0]))
	for _, signal := range []os.Signal{unix.SIGTERM, unix.SIGINT} {
		dir := t.TempDir()
		r := start(t, "extract", plainPath("base"), plainPath("new"), "-o", filepath.Join(dir, "delta"))
		r.until(t, "the note is written", func() bool { return len(notes(t)) > 0 })
		if err := r.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if out := r.end(t, 1); !strings.Contains(out, "stopped by a signal") {
			t.Errorf("%s: %s", signal, out)
		}
		p.wantHeld(t, fmt.Sprint(signal), "-")
		if left := list(t, dir); len(left) > 0 {
			t.Errorf("%s: left %q", signal, left)
		}
	}
	p.heals(t, p.Metadata)
}
