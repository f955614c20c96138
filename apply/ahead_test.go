package apply

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"ddsfs/cow"
)

// asked is a file that notes what is read of it, and what was asked for before.
type asked struct {
	file
	wanted map[int64]int64
	reads  int
	t      *testing.T
}

func (a *asked) willRead(off, bytes int64) {
	if a.reads > 0 {
		a.t.Errorf("byte %d is asked for when %d reads were made", off, a.reads)
	}
	a.wanted[off] = bytes
	a.file.willRead(off, bytes)
}

func (a *asked) ReadAt(p []byte, off int64) (int, error) {
	a.reads++
	if a.wanted[off] != int64(len(p)) {
		a.t.Errorf("%d bytes at byte %d are read, and %d were asked for", len(p), off, a.wanted[off])
	}
	return a.file.ReadAt(p, off)
}

// All that a merge compares with the target is asked for before it waits for any of
// it, and nothing else is read.
func TestComparedIsAskedFor(t *testing.T) {
	const c, chunks = 4096, 120
	volume := make([]byte, 3*chunks*c-100)
	var changed cow.SetBuilder
	for chunk := 2; chunk < 3*chunks; chunk += 3 { // the last one is partial
		changed.Add(uint64(chunk))
		if chunk%2 == 0 {
			for i := chunk * c; i < min(len(volume), (chunk+1)*c); i++ {
				volume[i] = byte(i>>8) | 1
			}
		}
	}
	d, err := cow.NewDelta(changed.Set(), c, int64(len(volume)), bytes.NewReader(volume))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name      string
		done      int64
		all       bool
		wantReads int
	}{
		{"zeros", 0, false, chunks / 2},
		{"resumed", 50, false, 50 + (chunks-50)/2},
		{"zeros are written", 0, true, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "target")
			before := bytes.Clone(volume)
			for chunk := 2 + 3*int(test.done); chunk < 3*chunks; chunk += 3 {
				clear(before[chunk*c : min(len(before), (chunk+1)*c)])
			}
			if err := os.WriteFile(path, before, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := disk{}.openTarget(path, toWrite)
			if err != nil {
				t.Fatal(err)
			}
			watched := &asked{file: f, wanted: map[int64]int64{}, t: t}
			target, err := newTarget(watched, path)
			if err != nil {
				t.Fatal(err)
			}
			defer target.Close()
			decoder, err := cow.NewDecoderAt(d, d.Size())
			if err != nil {
				t.Fatal(err)
			}
			var result Result
			err = merge(context.Background(), decoder, func() {}, target, test.done, chunks, Options{WriteZeros: test.all}, &result, nil, func(int64) error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			if watched.reads != test.wantReads || len(watched.wanted) != test.wantReads {
				t.Errorf("%d reads of %d that were asked for, want %d", watched.reads, len(watched.wanted), test.wantReads)
			}
			if got, err := io.ReadAll(io.NewSectionReader(f, 0, int64(len(volume))+1)); err != nil || !bytes.Equal(got, volume) {
				t.Errorf("the target differs: %v", err)
			}
		})
	}
}
