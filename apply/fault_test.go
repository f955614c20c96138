package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// feed is the other end of a pipe, into which b is written. What is left of it is not
// waited for.
func feed(t *testing.T, b []byte) *os.File {
	t.Helper()
	out, in, err := os.Pipe()
	must(t, err)
	go func() {
		_, _ = in.Write(b) // fails where the reader has enough
		in.Close()
	}()
	return out
}

// Wherever a sealed delta is cut, or a bit of it is another, and whichever way it
// comes: its data is what is said to be at fault, and nothing is written, but by what
// writes before it knows.
func TestFaultOfTheDelta(t *testing.T) {
	t.Parallel()
	const c, count = 512, 40
	before, after := make([]byte, count*c), make([]byte, count*c)
	for i := range after {
		after[i] = byte(i*7 + i/c)
		if i/c%3 == 0 {
			after[i] = before[i]
		}
	}
	var changed chunks.Builder
	for i := range uint64(count) {
		if i%3 != 0 {
			changed.Add(i)
		}
	}
	d, err := cow.Encode(layer.Layer{Changed: changed.Set(), ChunkBytes: c, VolumeBytes: count * c, Content: bytes.NewReader(after)})
	must(t, err)
	s, err := cow.NewSealed(d, cow.SealOptions{New: "new", BaseContent: bytes.NewReader(before)})
	must(t, err)
	good, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	must(t, err)

	// Thousands of merges, each of which flushes.
	dir, err := os.MkdirTemp("/dev/shm", "ddsfs-test-")
	must(t, err)
	defer os.RemoveAll(dir)
	target, path := filepath.Join(dir, "target"), filepath.Join(dir, "delta")
	o := Options{StateDir: filepath.Join(dir, "state"), SpoolDir: dir}
	dry, stream, undo := o, o, o
	dry.DryRun, stream.Stream, undo.Undo = true, true, filepath.Join(dir, "undo")
	kernel := func() KernelOptions {
		k := newSimulated(&faulty{at: 1 << 30})
		ko := KernelOptions{Options: o, Name: "simulated"}
		ko.storage, ko.devices, ko.poll = k.storage, k, 1
		return ko
	}
	ctx := context.Background()
	inFile := func(do func() error) func([]byte) error {
		return func(b []byte) error {
			must(t, os.WriteFile(path, b, 0o600))
			return do()
		}
	}
	inPipe := func(do func(r *os.File) error) func([]byte) error {
		return func(b []byte) error {
			r := feed(t, b)
			defer r.Close()
			return do(r)
		}
	}
	verified := func(v Verification, err error) error { return errors.Join(err, v.Err()) }
	done := func(_ Result, err error) error { return err }
	ways := map[string]func(b []byte) error{
		"apply":         inFile(func() error { return done(File(ctx, path, target, o)) }),
		"dry run":       inFile(func() error { return done(File(ctx, path, target, dry)) }),
		"undo":          inFile(func() error { return done(File(ctx, path, target, undo)) }),
		"verify":        inFile(func() error { return verified(VerifyFile(ctx, path, "", o)) }),
		"kernel":        inFile(func() error { return done(KernelFile(ctx, path, target, kernel())) }),
		"pipe":          inPipe(func(r *os.File) error { return done(Pipe(ctx, r, target, o)) }),
		"stream":        inPipe(func(r *os.File) error { return done(Pipe(ctx, r, target, stream)) }),
		"verify a pipe": inPipe(func(r *os.File) error { return verified(VerifyPipe(ctx, r, "", o)) }),
		"kernel, pipe":  inPipe(func(r *os.File) error { return done(KernelPipe(ctx, r, target, kernel())) }),
	}
	body := int(s.Seal().BodyBytes)
	try := func(what string, at int, bad []byte) {
		t.Helper()
		for way, read := range ways {
			// Package cow tries every bit. What opens a target is slow.
			every := map[string]int{"verify": 1, "verify a pipe": 1, "apply": 5, "pipe": 5}[way]
			if every == 0 {
				every = 23
			}
			if at >= 1024 && at < body {
				every *= 53
			}
			if at%every > 0 {
				continue
			}
			must(t, os.WriteFile(target, before, 0o600))
			err := read(bad)
			if !errors.Is(err, cow.ErrBadData) {
				t.Fatalf("%s at byte %d, %s: %v", what, at, way, err)
			}
			var refused *RefusedError
			if errors.As(err, &refused) {
				t.Errorf("%s at byte %d, %s: a refusal: %v", what, at, way, err)
			}
			now, readErr := os.ReadFile(target)
			must(t, readErr)
			if half := strings.Contains(err.Error(), "HALF MERGED"); half == bytes.Equal(now, before) || half && way != "stream" {
				t.Errorf("%s at byte %d, %s: %v", what, at, way, err)
			}
			if way == "stream" {
				must(t, os.RemoveAll(o.StateDir))
			}
		}
		left, err := filepath.Glob(filepath.Join(dir, "[^td]*")) // but target and delta
		must(t, err)
		if left = slices.DeleteFunc(left, func(name string) bool { return name == o.StateDir }); len(left) > 0 {
			t.Fatalf("%s at byte %d: left %v", what, at, left)
		}
		if records, err := Status(o.StateDir); err != nil || len(records) > 0 {
			t.Fatalf("%s at byte %d: recorded: %v, %v", what, at, records, err)
		}
	}
	for at := range good {
		bad := slices.Clone(good)
		bad[at] ^= 1 << (at % 8)
		try("a bit", at, bad)
		try("cut", at, good[:at])
	}
	for way, read := range ways {
		must(t, os.WriteFile(target, before, 0o600))
		if err := read(good); err != nil {
			t.Errorf("%s of the good one: %v", way, err)
		}
		must(t, os.RemoveAll(o.StateDir))
		must(t, os.RemoveAll(undo.Undo))
	}
}

// A stream that breaks off leaves the target half merged, and says both: that, and
// where it broke off.
func TestStreamThatBreaksOff(t *testing.T) {
	const volumeBytes = 4 << 20
	var all chunks.Builder
	all.AddRange(0, volumeBytes/4096)
	d, err := cow.Encode(layer.Layer{Changed: all.Set(), ChunkBytes: 4096, VolumeBytes: volumeBytes, Content: bytes.NewReader(bytes.Repeat([]byte("x"), volumeBytes))})
	must(t, err)
	s, err := cow.NewSealed(d, cow.SealOptions{New: "new"})
	must(t, err)
	good, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	must(t, err)
	half := len(good) / 2
	in := feed(t, good[:half])
	defer in.Close()
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	must(t, os.WriteFile(target, make([]byte, volumeBytes), 0o600))
	o := Options{StateDir: filepath.Join(dir, "state"), Stream: true}
	_, err = Pipe(context.Background(), in, target, o)
	if !errors.Is(err, cow.ErrBadData) || !strings.Contains(err.Error(), "HALF MERGED") ||
		!strings.Contains(err.Error(), fmt.Sprintf("it ends after %d of %d bytes: copy it again", half, len(good))) {
		t.Error(err)
	}
}

// What is no delta is refused while its sender still has much to say.
func TestForeignIsNotSpooled(t *testing.T) {
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	defer out.Close() // so it goes on
	_, err = out.Write(append([]byte("\x28\xb5\x2f\xfd"), make([]byte, cow.SectorBytes)...))
	must(t, err)
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	must(t, os.WriteFile(target, make([]byte, 4096), 0o600))
	_, err = Pipe(context.Background(), in, target, Options{StateDir: filepath.Join(dir, "state"), SpoolDir: dir})
	if !errors.Is(err, cow.ErrBadData) || !strings.Contains(err.Error(), "zstd -dc") {
		t.Error(err)
	}
}
