// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"ddsfs/apply"
	"ddsfs/cow"
	"ddsfs/cow/report"
)

// volumeChunks is how many chunks a volume has at least, the last one cut.
const volumeChunks = 130

var (
	anyChunks = []int64{512, 4096, 65536}
	// An area of 64 KiB chunks is 256 MiB.
	smallChunks = []int64{512, 4096}
)

// layouts are the shapes that stores come in.
var layouts = []struct {
	name       string
	chunkBytes []int64
	exceptions func(perArea int64) []exception
	tail       []byte
}{
	{name: "ours", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return inOrder(perArea, 0, 1, 2, 7, 8, 63, 64, 65, 127)
	}},
	{name: "unsorted, as dds writes it", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return inOrder(perArea, 50, 100, 101, 102, 7, 127, 8, 0)
	}},
	{name: "data chunks that no entry names", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return []exception{{3, 3}, {4, 4}, {5, 9}, {80, 10}, {6, 12}, {7, 20}}
	}},
	{name: "data out of order", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return []exception{{10, 2}, {11, 9}, {12, 8}, {13, 3}, {99, 4}}
	}},
	{name: "data in another area's region", chunkBytes: smallChunks, exceptions: func(perArea int64) []exception {
		return []exception{{10, 2}, {11, perArea + 3}, {12, 3}, {13, perArea + 5}}
	}},
	{name: "data of the second area in the region of the first", chunkBytes: smallChunks, exceptions: func(perArea int64) []exception {
		var all []exception
		for i := range perArea - 1 {
			all = append(all, exception{i, i + 2})
		}
		return append(all, exception{perArea - 1, perArea + 3}, exception{perArea + 20, perArea + 1})
	}},
	{name: "one full area", chunkBytes: smallChunks, exceptions: func(perArea int64) []exception {
		var olds []int64
		for i := range perArea {
			olds = append(olds, i+i/7)
		}
		return inOrder(perArea, olds...)
	}},
	{name: "runs across areas", chunkBytes: smallChunks, exceptions: func(perArea int64) []exception {
		var olds []int64
		for i := range 2*perArea + 5 {
			olds = append(olds, i)
		}
		return inOrder(perArea, olds...)
	}},
	{name: "empty", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception { return nil }},
	{name: "other data behind it", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return inOrder(perArea, 0, 1, 127)
	}, tail: noiseFor(99, 10_000)},
	{name: "a last chunk that the volume's end cuts", chunkBytes: anyChunks, exceptions: func(perArea int64) []exception {
		return inOrder(perArea, 5, volumeChunks-2, volumeChunks-1)
	}},
}

// ways are those by which a delta gets to its target; dir is for what must be put
// into files.
var ways = []struct {
	name   string
	stream bool
	apply  func(dir string, delta []byte, target string) (apply.Result, error)
}{
	{"file", false, func(dir string, delta []byte, target string) (apply.Result, error) {
		path := filepath.Join(dir, "delta")
		if err := os.WriteFile(path, delta, 0o600); err != nil {
			return apply.Result{}, err
		}
		return apply.File(context.Background(), path, target, apply.Options{StateDir: filepath.Join(dir, "state"), AssumeBase: true})
	}},
	{"pipe", false, func(dir string, delta []byte, target string) (apply.Result, error) {
		return applyPipe(delta, target, apply.Options{StateDir: filepath.Join(dir, "state"), AssumeBase: true, SpoolDir: dir})
	}},
	{"stream", true, func(dir string, delta []byte, target string) (apply.Result, error) {
		return applyPipe(delta, target, apply.Options{StateDir: filepath.Join(dir, "state"), AssumeBase: true, Stream: true})
	}},
}

func applyPipe(delta []byte, target string, o apply.Options) (apply.Result, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return apply.Result{}, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Write(delta) // fails where the reader stops early, as it may
		w.Close()
	}()
	result, err := apply.Pipe(context.Background(), r, target, o)
	r.Close()
	<-done
	return result, err
}

// targets are what a delta is merged into: each returns the name to apply to.
var targets = []struct {
	name       string
	blockBytes int64 // its size is a multiple of
	of         func(t *testing.T, file string) string
}{
	{"file", 1, func(t *testing.T, file string) string { return file }},
	{"device", 512, loopDevice},
}

// baseFor is what a target held before, of volumeChunks chunks or as many as the
// store needs, the last of which is partial as far as the target can be.
func baseFor(s store, blockBytes int64) []byte {
	chunks := int64(volumeChunks)
	for _, e := range s.exceptions {
		chunks = max(chunks, e.old+1)
	}
	last := (s.chunkBytes/2 - 3 + blockBytes - 1) / blockBytes * blockBytes
	base := make([]byte, 0, chunks*s.chunkBytes)
	for i := range chunks {
		base = append(base, noiseFor(i, s.chunkBytes)...)
	}
	return base[:(chunks-1)*s.chunkBytes+last]
}

func TestMerge(t *testing.T) {
	for _, layout := range layouts {
		for _, chunkBytes := range layout.chunkBytes {
			s := store{chunkBytes: chunkBytes, tail: layout.tail}
			s.exceptions = layout.exceptions(s.perArea())
			delta := s.bytes()
			for _, target := range targets {
				base := baseFor(s, target.blockBytes)
				for _, way := range ways {
					t.Run(fmt.Sprintf("%s/%d/%s/%s", layout.name, chunkBytes, target.name, way.name), func(t *testing.T) {
						t.Parallel()
						file := newFile(t, "target", base)
						path := target.of(t, file)
						result, err := way.apply(t.TempDir(), delta, path)
						if ordered, areas := s.inPipeOrder(); way.stream && !ordered {
							mustStopOutOfOrder(t, err, file, delta, s, base, areas)
							return
						}
						if err != nil {
							t.Fatal(err)
						}
						want, written := merge(delta, s, base, int64(len(delta)))
						mustHold(t, file, want)
						mustHold(t, path, want)
						n := int64(len(s.exceptions))
						meta, data := (1+s.areas())*chunkBytes, n*chunkBytes
						wantResult := apply.Result{
							Report:       report.Report{ChunkBytes: chunkBytes, Valid: true, Areas: s.areas(), Exceptions: n, MetaBytes: meta, DataBytes: data, TotalBytes: meta + data},
							TargetBytes:  int64(len(base)),
							WrittenBytes: written,
						}
						if result != wantResult {
							t.Errorf("result %+v, want %+v", result, wantResult)
						}
					})
				}
			}
		}
	}
}

// mustStopOutOfOrder checks how a stream ended whose data is not in order, from
// the area on before which areas others were merged.
func mustStopOutOfOrder(t *testing.T, err error, file string, delta []byte, s store, base []byte, areas int64) {
	t.Helper()
	if err == nil {
		t.Fatal("accepted")
	}
	if areas == 0 && !errors.Is(err, cow.ErrOutOfOrder) {
		t.Errorf("error %q, want ErrOutOfOrder", err)
	}
	written := writtenBytes(t, err)
	if most := areas * s.perArea() * s.chunkBytes; written > most {
		t.Errorf("%d bytes were written, and only %d were in order", written, most)
	}
	want, _ := merge(delta, s, base, written)
	mustHold(t, file, want)
}

var halfMerged = regexp.MustCompile(`HALF MERGED, (\d+) bytes were written`)

// writtenBytes is how many bytes of a target an error says were written.
func writtenBytes(t *testing.T, err error) int64 {
	t.Helper()
	m := halfMerged.FindStringSubmatch(err.Error())
	if m == nil {
		return 0
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A redirected file is not at its first byte if somebody has read from it.
func TestStdinIsReadFromWhereItStands(t *testing.T) {
	s := store{chunkBytes: 4096, exceptions: inOrder(256, 1, 2, 9)}
	delta, base := s.bytes(), baseFor(s, 1)
	want, _ := merge(delta, s, base, int64(len(delta)))
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprintf("stream %v", stream), func(t *testing.T) {
			in, err := os.Open(newFile(t, "delta", append(bytes.Repeat([]byte("x"), 100), delta...)))
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			if _, err := in.Seek(100, 0); err != nil {
				t.Fatal(err)
			}
			target := newFile(t, "target", base)
			if _, err := apply.Pipe(context.Background(), in, target, apply.Options{StateDir: t.TempDir(), Stream: stream, SpoolDir: t.TempDir()}); err != nil {
				t.Fatal(err)
			}
			mustHold(t, target, want)
		})
	}
}

func BenchmarkMerge(b *testing.B) {
	const chunkBytes, volume = 4096, 64 << 20
	for _, pattern := range []struct {
		name     string
		run, per int64
	}{{"all", 1, 1}, {"runs of 16", 16, 64}, {"single", 1, 4}} {
		var olds []int64
		for at := int64(0); at < volume/chunkBytes; at += pattern.per {
			for i := range pattern.run {
				olds = append(olds, at+i)
			}
		}
		s := store{chunkBytes: chunkBytes, exceptions: inOrder(chunkBytes/16, olds...)}
		delta := s.bytes()
		for _, way := range ways {
			b.Run(pattern.name+"/"+way.name, func(b *testing.B) {
				dir := b.TempDir()
				target := filepath.Join(dir, "target")
				if err := os.WriteFile(target, make([]byte, volume), 0o600); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(olds)) * chunkBytes)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := way.apply(dir, delta, target); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
