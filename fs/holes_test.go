// SPDX-License-Identifier: GPL-2.0-or-later

package fs_test

import (
	"bytes"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// sparseFiles are files with what is known to be zeros in some of them.
var sparseFiles = []specFile{
	{Name: "unknown", Size: 3*mib + 17, Seed: 1},
	{Name: "none", Size: 3 * mib, Seed: 2, Zeros: [][2]int64{}},
	{Name: "within", Size: 40*mib + 17, Seed: 3, Zeros: [][2]int64{{mib, 30 * mib}, {35*mib + 4096, 35*mib + 8192}}},
	{Name: "both ends", Size: 20*mib + 100, Seed: 4, Zeros: [][2]int64{{0, 5 * mib}, {7 * mib, 20*mib + 100}}},
	{Name: "all", Size: 9*mib + 1, Seed: 5, Zeros: [][2]int64{{0, 9*mib + 1}}},
	{Name: "empty", Zeros: [][2]int64{}},
	{Name: "huge", Size: 1 << 40, Seed: 6, Zeros: [][2]int64{{4096, 8192}}},
}

// dataBytes is how much of the file is not known to be zeros.
func (f specFile) dataBytes() int64 { return f.Size - sparse{served{f}}.ZeroBytes() }

// hole is the part of what is known to be zeros that has byte off.
func (f specFile) hole(off int64) (part [2]int64, ok bool) {
	for _, z := range f.Zeros {
		if z[0] <= off && off < z[1] {
			return z, true
		}
	}
	return part, false
}

// seek is what lseek must say.
func (f specFile) seek(off int64, whence int) (int64, error) {
	if off < 0 || off >= f.Size {
		return 0, unix.ENXIO
	}
	in, isHole := f.hole(off)
	switch {
	case isHole == (whence == unix.SEEK_HOLE):
		return off, nil
	case isHole && in[1] == f.Size:
		return 0, unix.ENXIO
	case isHole:
		return in[1], nil
	}
	for _, z := range f.Zeros {
		if z[0] > off {
			return z[0], nil
		}
	}
	return f.Size, nil
}

// Holes are found from everywhere, and each file has one after its last byte.
func TestSeekHoles(t *testing.T) {
	s := mustStart(t, spec{Files: sparseFiles})
	for _, f := range sparseFiles {
		file, err := os.Open(filepath.Join(s.dir, f.Name))
		must(t, err)
		defer file.Close()
		offsets := []int64{math.MinInt64, 0, 1, f.Size - mib/2, f.Size + mib, math.MaxInt64}
		for _, z := range append(f.Zeros, [2]int64{f.Size, f.Size}) {
			offsets = append(offsets, z[0]-1, z[0], z[0]+1, z[1]-1, z[1], z[1]+1)
		}
		for _, off := range offsets {
			for name, whence := range map[string]int{"data": unix.SEEK_DATA, "hole": unix.SEEK_HOLE} {
				want, wantErr := f.seek(off, whence)
				got, err := unix.Seek(int(file.Fd()), off, whence)
				if wantErr == nil && (err != nil || got != want) || wantErr != nil && !errors.Is(err, wantErr) {
					t.Errorf("%s: %s from byte %d: %d, %v, want %d, %v", f.Name, name, off, got, err, want, wantErr)
				}
			}
		}
		var st unix.Stat_t
		must(t, unix.Fstat(int(file.Fd()), &st))
		if st.Size != f.Size || st.Blocks != (f.dataBytes()+511)/512 {
			t.Errorf("%s: %d blocks of %d bytes, %d of them data", f.Name, st.Blocks, st.Size, f.dataBytes())
		}
	}
	s.end()
}

// Tools that keep holes keep these, and copy the bytes that they would copy without.
func TestToolsKeepHoles(t *testing.T) {
	s := mustStart(t, spec{Files: sparseFiles[:len(sparseFiles)-1]})
	for name, script := range map[string]string{
		"cp":    `cp --sparse=auto "$M"/* "$O/"`,
		"cat":   `cd "$M"; for f in *; do cat "$f" > "$O/$f"; done`,
		"tar":   `tar -C "$M" -S -cf - . | tar -C "$O" -xf -`,
		"rsync": `rsync -aS "$M/" "$O/"`,
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			c := exec.Command("sh", "-euc", script)
			c.Env = append(os.Environ(), "M="+s.dir, "O="+out)
			if said, err := c.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, said)
			}
			for _, f := range sparseFiles[:len(sparseFiles)-1] {
				got, err := os.ReadFile(filepath.Join(out, f.Name))
				if err != nil || !bytes.Equal(got, f.bytes(0, int(f.Size))) {
					t.Errorf("%s: %d bytes, or others, %v", f.Name, len(got), err)
				}
				var st unix.Stat_t
				must(t, unix.Stat(filepath.Join(out, f.Name), &st))
				if name != "cat" && st.Blocks*512 > f.dataBytes()+64<<10 {
					t.Errorf("%s: %d bytes on disk, and %d of its %d are data", f.Name, st.Blocks*512, f.dataBytes(), f.Size)
				}
			}
		})
	}
	s.end()
}
