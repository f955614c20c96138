// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/wayout"
)

// Every length that a transfer can break off at.
func TestTruncated(t *testing.T) {
	atByte := regexp.MustCompile(`at byte \d+|after \d+ bytes|nothing arrived`)
	full := store{chunkBytes: 512, exceptions: inOrder(32, slices.Collect(numbers(32))...)}
	for _, test := range []struct {
		name string
		s    store
		from int
	}{
		{"small", store{chunkBytes: 512, exceptions: inOrder(32, 9, 3)}, 0},
		// Its last chunk is the empty metadata chunk.
		{"full area", full, 35*512 - 50},
		{"larger chunks", store{chunkBytes: 4096, exceptions: inOrder(256, 1, 3)}, 4*4096 - 50},
	} {
		delta := test.s.bytes()
		base := baseFor(test.s, 1)
		for _, way := range ways {
			t.Run(test.name+"/"+way.name, func(t *testing.T) {
				t.Parallel()
				dir := smallFileSystem(t, 1<<20)
				target := writeFile(t, dir+"/target", base)
				for length := test.from; length < len(delta); length++ {
					_, err := way.apply(dir, delta[:length], target)
					if err == nil {
						t.Fatalf("%d of %d bytes were accepted", length, len(delta))
					}
					if !atByte.MatchString(err.Error()) {
						t.Errorf("%d bytes: no offset in %q", length, err)
					}
					written := writtenBytes(t, err)
					if written > 0 && !way.stream {
						t.Errorf("%d bytes: %d were written before all was checked", length, written)
					}
					want, _ := merge(delta, test.s, base, written)
					mustHold(t, target, want)
					if t.Failed() {
						t.Fatalf("with %d bytes of the delta: %v", length, err)
					}
				}
				if _, err := way.apply(dir, delta, target); err != nil {
					t.Fatalf("all %d bytes: %v", len(delta), err)
				}
				want, _ := merge(delta, test.s, base, int64(len(delta)))
				mustHold(t, target, want)
			})
		}
	}
}

func numbers(n int64) func(yield func(int64) bool) {
	return func(yield func(int64) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

// A delta with one wrong byte in what is not data is either refused, or it is
// another delta, and then that one is merged: see readStore.
func TestCorruptedByte(t *testing.T) {
	// With a partial last chunk, so that the target's end is no round number.
	s := store{chunkBytes: 512, exceptions: []exception{{2, 2}, {3, 3}, {9, 5}, {40, 6}}, tail: noiseFor(3, 20*512)}
	intact := s.bytes()
	base := baseFor(store{chunkBytes: 512}, 1)
	metadata := slices.Collect(numbers(2 * s.chunkBytes))
	for _, way := range ways {
		if way.name == "pipe" {
			continue // once spooled, it goes the way of a file
		}
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			dir := smallFileSystem(t, 1<<20)
			var accepted, refused int
			for _, at := range metadata {
				flips := []byte{0xff}
				if intact[at/16*16] != 0 {
					flips = []byte{0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xff}
				}
				for _, flip := range flips {
					delta := slices.Clone(intact)
					delta[at] ^= flip
					target := writeFile(t, dir+"/target", base)
					_, err := way.apply(dir, delta, target)
					other, ok := readStore(delta, int64(len(base)))
					if ordered, _ := other.inPipeOrder(); ok && way.stream && !ordered {
						if !errors.Is(err, cow.ErrOutOfOrder) {
							t.Errorf("error %v, want ErrOutOfOrder", err)
						}
						ok = false
					}
					written := int64(len(delta))
					if ok != (err == nil) {
						t.Errorf("error %v, want one: %v", err, !ok)
					}
					if err == nil {
						accepted++
					} else {
						refused++
						written = writtenBytes(t, err)
						if written > 0 && !way.stream {
							t.Errorf("%d bytes were written before all was checked: %v", written, err)
						}
					}
					want, _ := merge(delta, other, base, written)
					mustHold(t, target, want)
					if t.Failed() {
						t.Fatalf("byte %d ^ %#x", at, flip)
					}
				}
			}
			// Either of them never happening would say nothing.
			if accepted == 0 || refused == 0 {
				t.Errorf("%d accepted, %d refused", accepted, refused)
			}
		})
	}
}

// A failed merge says how much it wrote.
func TestWriteError(t *testing.T) {
	const chunkBytes = 4096
	for _, test := range []struct {
		name    string
		chunks  []int64
		room    int64 // in the target's file system
		written int64
	}{
		{"within a run", slices.Collect(numbers(64)), 10 * chunkBytes, 10 * chunkBytes},
		{"at the second run", []int64{0, 1, 2, 20, 21, 40}, 3 * chunkBytes, 3 * chunkBytes},
		{"at the first byte", []int64{5, 6}, chunkBytes, 0},
	} {
		for _, way := range ways {
			t.Run(test.name+"/"+way.name, func(t *testing.T) {
				s := store{chunkBytes: chunkBytes, exceptions: inOrder(256, test.chunks...)}
				dir := smallFileSystem(t, max(test.room, chunkBytes))
				target := dir + "/target"
				base := make([]byte, 100*chunkBytes)
				sparse(t, target, int64(len(base)))
				if test.written == 0 {
					writeFile(t, dir+"/other", noiseFor(1, chunkBytes))
				}
				delta := s.bytes()
				_, err := way.apply(t.TempDir(), delta, target)
				if err == nil {
					t.Fatal("no error")
				}
				if n := writtenBytes(t, err); n != test.written {
					t.Errorf("error %q, want one that says that %d bytes were written", err, test.written)
				}
				want, _ := merge(delta, s, base, test.written)
				mustHold(t, target, want)
			})
		}
	}
}

func sparse(t *testing.T, path string, bytes int64) {
	t.Helper()
	writeFile(t, path, nil)
	if err := os.Truncate(path, bytes); err != nil {
		t.Fatal(err)
	}
}

// If the spool can't hold the delta, nothing is left of it, and the error has the ways
// out.
func TestSpoolError(t *testing.T) {
	s := store{chunkBytes: 4096, exceptions: inOrder(256, slices.Collect(numbers(64))...)}
	for name, dir := range map[string]func(t *testing.T) string{
		"full":     func(t *testing.T) string { return smallFileSystem(t, 16*4096) },
		"missing":  func(t *testing.T) string { return t.TempDir() + "/missing" },
		"a file":   func(t *testing.T) string { return newFile(t, "file", nil) },
		"no space": func(t *testing.T) string { return "/dev/full" },
	} {
		t.Run(name, func(t *testing.T) {
			spool, base := dir(t), baseFor(s, 1)
			target := newFile(t, "target", base)
			before := listing(t, spool)
			_, err := applyPipe(s.bytes(), target, apply.Options{StateDir: t.TempDir(), SpoolDir: spool})
			if err == nil {
				t.Fatal("no error")
			}
			for _, word := range []string{string(wayout.OtherSpool), string(wayout.StreamInstead), spool} {
				if !strings.Contains(fmt.Sprint(err, wayout.From(err)), word) {
					t.Errorf("no %s in %q", word, err)
				}
			}
			mustHold(t, target, base)
			if after := listing(t, spool); after != before {
				t.Errorf("left in the spool directory: %q", after)
			}
		})
	}
}

// The other end of a pipe may be a process that is killed: its pipe ends as if
// it had finished.
func TestWriterIsKilled(t *testing.T) {
	s := store{chunkBytes: 4096, exceptions: inOrder(256, slices.Collect(numbers(2000))...)}
	delta, base := s.bytes(), baseFor(s, 1)
	for _, test := range []struct {
		stream bool
		stage  apply.Stage // that the merge has reached when it happens
	}{
		{false, apply.Receiving},
		{true, apply.Writing},
	} {
		t.Run(string(test.stage), func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			writer := exec.Command("cat")
			writer.Stdout = w
			in, err := writer.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := writer.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			fed := make(chan struct{})
			go func() {
				defer close(fed)
				// It has more to say until it is killed.
				in.Write(delta[:len(delta)*3/4])
			}()
			target := newFile(t, "target", base)
			killed := false
			_, err = apply.Pipe(context.Background(), r, target, apply.Options{StateDir: t.TempDir(), Stream: test.stream, SpoolDir: t.TempDir(), Progress: func(stage apply.Stage, done, _ int64) {
				if stage == test.stage && !killed {
					killed = true
					if err := writer.Process.Kill(); err != nil {
						t.Error(err)
					}
				}
			}})
			<-fed
			in.Close()
			writer.Wait()
			if !killed {
				t.Errorf("never got to %s", test.stage)
			}
			if err == nil {
				t.Fatal("no error")
			}
			written := writtenBytes(t, err)
			if written > 0 != test.stream {
				t.Errorf("%d bytes were written: %v", written, err)
			}
			want, _ := merge(delta, s, base, written)
			mustHold(t, target, want)
		})
	}
}
