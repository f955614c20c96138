// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
	"ddsfs/cow/wayout"
)

// sealed is the sealed delta of a whole volume.
func sealed(t *testing.T, volume layer.Volume, volumeBytes int64) *cow.Sealed {
	t.Helper()
	var all chunks.Builder
	all.AddRange(0, uint64(volumeBytes/4096))
	d, err := cow.Encode(layer.Layer{Changed: all.Set(), ChunkBytes: 4096, VolumeBytes: volumeBytes, Content: volume})
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// throughPipe is the other end of a pipe into which r is written.
func throughPipe(t *testing.T, r io.Reader) *os.File {
	t.Helper()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The reader may stop early.
		_, _ = io.Copy(in, r)
		in.Close()
	}()
	t.Cleanup(func() {
		out.Close()
		<-done
	})
	return out
}

// A sealed delta says at its beginning how much room it takes: what does not fit is
// refused while the rest of it has not been sent.
func TestSpoolTooSmallForASealedDelta(t *testing.T) {
	volume := bytes.Repeat([]byte("x"), 1<<20)
	s := sealed(t, bytes.NewReader(volume), int64(len(volume)))
	first := make([]byte, cow.SectorBytes)
	if _, err := s.ReadAt(first, 0); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.Write(first); err != nil {
		t.Fatal(err)
	}
	before := make([]byte, len(volume))
	target := newFile(t, "target", before)
	dir := smallFileSystem(t, 64<<10)
	_, err = apply.Pipe(context.Background(), r, target, apply.Options{StateDir: t.TempDir(), SpoolDir: dir})
	if err == nil {
		t.Fatal("no error")
	}
	for _, says := range []string{fmt.Sprint(s.Size()), dir, string(wayout.OtherSpool), string(wayout.StreamInstead)} {
		if !strings.Contains(fmt.Sprint(err, wayout.From(err)), says) {
			t.Errorf("no %q in %q", says, err)
		}
	}
	mustHold(t, target, before)
}

// deceivedFileSystem is the root of a file system that believes that it has more room
// than its disk.
func deceivedFileSystem(t *testing.T, diskBytes, believedBytes int64) string {
	t.Helper()
	disk := smallFileSystem(t, diskBytes) + "/disk"
	sparse(t, disk, believedBytes)
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-O", "^has_journal", disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	return mounted(t, "ext4", map[string]string{"source": loopDevice(t, disk)})
}

// A disk may take what is spooled, and not be able to keep it. What is read from there
// is then worth nothing, wherever it came from.
func TestSpoolThatIsNotKept(t *testing.T) {
	const volumeBytes = 32 << 20
	dir := deceivedFileSystem(t, 16<<20, 256<<20)
	s := sealed(t, repeated{}, volumeBytes)
	whole := io.NewSectionReader(s, 0, s.Size())
	target := newFile(t, "target", make([]byte, volumeBytes))
	writing := false
	o := apply.Options{StateDir: t.TempDir(), SpoolDir: dir, Progress: func(stage apply.Stage, _, _ int64) {
		if writing || stage != apply.Writing {
			return
		}
		writing = true
		root, err := os.Open(dir)
		if err != nil {
			t.Error(err)
			return
		}
		defer root.Close()
		// That it fails is what the test is about.
		_ = unix.Syncfs(int(root.Fd()))
	}}
	_, err := apply.Pipe(context.Background(), throughPipe(t, whole), target, o)
	if !writing {
		t.Error("nothing was written")
	}
	for _, says := range []string{"spool", "could not be kept", "HALF MERGED", "again"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("no %q in %v", says, err)
		}
	}
	o.SpoolDir = t.TempDir()
	if _, err := apply.Pipe(context.Background(), throughPipe(t, io.NewSectionReader(s, 0, s.Size())), target, o); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, volumeBytes)
	if _, err := (repeated{}).ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	mustHold(t, target, want)
}

// The data of a delta that is not sealed may lie in any order, so a part of the spool
// that was passed over is still to be read.
func TestSpoolInAnyOrder(t *testing.T) {
	const chunkBytes, chunks = 4096, 10240
	var olds []int64
	for i := range int64(chunks) {
		olds = append(olds, i)
	}
	s := store{chunkBytes: chunkBytes, exceptions: inOrder(chunkBytes/16, olds...)}
	// The halves change places.
	for i := range s.exceptions[:chunks/2] {
		a, b := &s.exceptions[i], &s.exceptions[i+chunks/2]
		a.new, b.new = b.new, a.new
	}
	delta, base := s.bytes(), make([]byte, chunks*chunkBytes)
	want, _ := merge(delta, s, base, int64(len(delta)))
	target := newFile(t, "target", base)
	undo := t.TempDir() + "/undo"
	o := apply.Options{StateDir: t.TempDir(), SpoolDir: t.TempDir(), Undo: undo}
	if _, err := applyPipe(delta, target, o); err != nil {
		t.Fatal(err)
	}
	mustHold(t, target, want)
	o.Undo = ""
	if _, err := apply.File(context.Background(), undo, target, o); err != nil {
		t.Fatal(err)
	}
	mustHold(t, target, base)
}

// A target's disk may take what is written, and not be able to keep it.
func TestTargetThatIsNotKept(t *testing.T) {
	const volumeBytes = 96 << 20
	target := deceivedFileSystem(t, 48<<20, 512<<20) + "/target"
	sparse(t, target, volumeBytes)
	s := sealed(t, repeated{}, volumeBytes)
	_, err := apply.Pipe(context.Background(), throughPipe(t, io.NewSectionReader(s, 0, s.Size())), target, apply.Options{StateDir: t.TempDir(), Stream: true})
	for _, says := range []string{"flush: ", "HALF MERGED"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("no %q in %v", says, err)
		}
	}
}

// The error of a bad delta does not depend on the way that it came.
func TestDamageIsToldInTheSameWords(t *testing.T) {
	const volumeBytes = 3 << 20
	s := sealed(t, repeated{}, volumeBytes)
	intact, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	target := newFile(t, "target", make([]byte, volumeBytes))
	for name, at := range map[string]int{
		"data": 1<<20 + 5, "last data": int(s.Seal().BodyBytes) - 1, "list": 4096 + 8, "digest": int(s.Seal().BodyBytes) + 40, "footer": bytes.LastIndex(intact, []byte("ddsftail")) + 40,
	} {
		delta := bytes.Clone(intact)
		delta[at] ^= 1
		file := newFile(t, "delta", delta)
		_, fromFile := apply.File(context.Background(), file, target, apply.Options{StateDir: t.TempDir()})
		pipe := throughPipe(t, bytes.NewReader(delta))
		_, fromPipe := apply.Pipe(context.Background(), pipe, target, apply.Options{StateDir: t.TempDir(), SpoolDir: t.TempDir()})
		if !errors.Is(fromFile, cow.ErrMismatch) || fromPipe == nil ||
			strings.TrimPrefix(fromFile.Error(), file) != strings.TrimPrefix(fromPipe.Error(), pipe.Name()) {
			t.Errorf("%s:\n%v\n%v", name, fromFile, fromPipe)
		}
	}
	mustHold(t, target, make([]byte, volumeBytes))
}
