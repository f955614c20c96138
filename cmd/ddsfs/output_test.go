// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/chunks"
	"ddsfs/cow/layer"
)

// What is known to be zeros becomes a hole of a new file, also at its end, and is written
// to what is there already.
func TestOutputWithHoles(t *testing.T) {
	const c, count = 64 << 10, 300
	var changed, zeros chunks.Builder
	changed.AddRange(0, count)
	zeros.AddRange(10, 100)
	zeros.AddRange(120, count)
	content := bytes.Repeat([]byte("data"), count*c/4)
	body, err := cow.Encode(layer.Layer{Changed: changed.Set(), Zeros: zeros.Set(), ChunkBytes: c, VolumeBytes: count * c, Content: bytes.NewReader(content)})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := cow.NewSealed(body, cow.SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]layer.Sparse{"sealed": sealed, "unsealed": body} {
		want, err := io.ReadAll(io.NewSectionReader(v, 0, v.Size()))
		if err != nil {
			t.Fatal(err)
		}
		write := func(out io.Writer) error {
			_, err := io.Copy(out, io.NewSectionReader(v, 0, v.Size()))
			return err
		}
		path := filepath.Join(t.TempDir(), "out")
		for range 2 { // the second time, it is replaced
			if err := writeOutput(path, v, write); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, or others than the %d, %v", name, len(got), len(want), err)
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > v.Size()-v.ZeroBytes()+16<<10 {
				t.Errorf("%s: %d bytes on disk, and all but %d of %d are zeros, %v", name, st.Blocks*512, v.Size()-v.ZeroBytes(), v.Size(), err)
			}
		}
		pipe := filepath.Join(t.TempDir(), "pipe")
		if err := unix.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		wrote := make(chan error, 1)
		go func() { wrote <- writeOutput(pipe, v, write) }()
		got, err := os.ReadFile(pipe)
		if err = errors.Join(err, <-wrote); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s, to a pipe: %d bytes, or others, %v", name, len(got), err)
		}
	}
}
