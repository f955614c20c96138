// SPDX-License-Identifier: GPL-2.0-or-later

package kernel

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/testdata/harness"
)

// A sealed delta that is cut anywhere, or has a wrong bit, is said to be at fault,
// whichever way it comes, and nothing is written, except by a way that writes before it
// knows.
func TestFaultOfTheDelta(t *testing.T) {
	t.Parallel()
	const c, count = harness.ChunkBytes, 40
	before, after := make([]byte, count*c), make([]byte, count*c)
	for i := range after {
		after[i] = byte(i*7 + i/c)
		if i/c%3 == 0 {
			after[i] = before[i]
		}
	}
	// Thousands of merges, each of which flushes.
	dir, err := os.MkdirTemp("/dev/shm", "ddsfs-test-")
	harness.Must(t, err)
	defer os.RemoveAll(dir)
	target, path := filepath.Join(dir, "target"), filepath.Join(dir, "delta")
	harness.Sealed(t, path, cow.SealOptions{New: "new", BaseContent: bytes.NewReader(before)}, after, harness.Changed(before, after))
	good, err := os.ReadFile(path)
	harness.Must(t, err)
	opened, err := cow.Open(bytes.NewReader(good))
	harness.Must(t, err)
	o := apply.Options{StateDir: filepath.Join(dir, "state"), SpoolDir: dir}
	dry, stream, undo := o, o, o
	dry.DryRun, stream.Stream, undo.Undo = true, true, filepath.Join(dir, "undo")
	simulatedKernel := func() Options {
		k := newSimulated(&harness.Storage{At: 1 << 30})
		ko := Options{Options: o, Name: "simulated"}
		ko.Storage, ko.devices, ko.poll = k.storage, k, 1
		return ko
	}
	ctx := context.Background()
	inFile := func(do func() error) func([]byte) error {
		return func(b []byte) error {
			harness.Must(t, os.WriteFile(path, b, 0o600))
			return do()
		}
	}
	inPipe := func(do func(r *os.File) error) func([]byte) error {
		return func(b []byte) error {
			r := harness.Feed(t, b)
			defer r.Close()
			return do(r)
		}
	}
	verified := func(v apply.Verification, err error) error { return errors.Join(err, v.Err()) }
	done := func(_ apply.Result, err error) error { return err }
	ways := map[string]func(b []byte) error{
		"apply":         inFile(func() error { return done(apply.File(ctx, path, target, o)) }),
		"dry run":       inFile(func() error { return done(apply.File(ctx, path, target, dry)) }),
		"undo":          inFile(func() error { return done(apply.File(ctx, path, target, undo)) }),
		"verify":        inFile(func() error { return verified(apply.VerifyFile(ctx, path, "", o)) }),
		"kernel":        inFile(func() error { return done(File(ctx, path, target, simulatedKernel())) }),
		"pipe":          inPipe(func(r *os.File) error { return done(apply.Pipe(ctx, r, target, o)) }),
		"stream":        inPipe(func(r *os.File) error { return done(apply.Pipe(ctx, r, target, stream)) }),
		"verify a pipe": inPipe(func(r *os.File) error { return verified(apply.VerifyPipe(ctx, r, "", o)) }),
		"kernel, pipe":  inPipe(func(r *os.File) error { return done(Pipe(ctx, r, target, simulatedKernel())) }),
	}
	body := int(opened.Seal.BodyBytes)
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
			harness.Must(t, os.WriteFile(target, before, 0o600))
			err := read(bad)
			if !errors.Is(err, cow.ErrBadData) {
				t.Fatalf("%s at byte %d, %s: %v", what, at, way, err)
			}
			var refused *apply.RefusedError
			if errors.As(err, &refused) {
				t.Errorf("%s at byte %d, %s: a refusal: %v", what, at, way, err)
			}
			now, readErr := os.ReadFile(target)
			harness.Must(t, readErr)
			if half := strings.Contains(err.Error(), "HALF MERGED"); half == bytes.Equal(now, before) || half && way != "stream" {
				t.Errorf("%s at byte %d, %s: %v", what, at, way, err)
			}
			if way == "stream" {
				harness.Must(t, os.RemoveAll(o.StateDir))
			}
		}
		left, err := filepath.Glob(filepath.Join(dir, "[^td]*")) // but target and delta
		harness.Must(t, err)
		if left = slices.DeleteFunc(left, func(name string) bool { return name == o.StateDir }); len(left) > 0 {
			t.Fatalf("%s at byte %d: left %v", what, at, left)
		}
		if records, err := apply.Status(o.StateDir); err != nil || len(records) > 0 {
			t.Fatalf("%s at byte %d: recorded: %v, %v", what, at, records, err)
		}
	}
	for at := range bytes.TrimRight(good, "\x00") { // what follows the footer does not count
		bad := slices.Clone(good)
		bad[at] ^= 1 << (at % 8)
		try("a bit", at, bad)
		try("cut", at, good[:at])
	}
	for way, read := range ways {
		harness.Must(t, os.WriteFile(target, before, 0o600))
		if err := read(good); err != nil {
			t.Errorf("%s of the good one: %v", way, err)
		}
		harness.Must(t, os.RemoveAll(o.StateDir))
		harness.Must(t, os.RemoveAll(undo.Undo))
	}
}
