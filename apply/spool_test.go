package apply_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"ddsfs/apply"
	"ddsfs/cow"
)

// A sealed delta says at its beginning how much room it takes: what does not fit is
// refused while the rest of it has not been sent.
func TestSpoolTooSmallForASealedDelta(t *testing.T) {
	volume := bytes.Repeat([]byte("x"), 1<<20)
	var all cow.SetBuilder
	all.AddRange(0, 256)
	d, err := cow.NewDelta(all.Set(), 4096, int64(len(volume)), bytes.NewReader(volume))
	if err != nil {
		t.Fatal(err)
	}
	s, err := cow.NewSealed(d, cow.SealOptions{})
	if err != nil {
		t.Fatal(err)
	}
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
	for _, says := range []string{fmt.Sprint(s.Size()), dir, "--spool", "--stream"} {
		if !strings.Contains(err.Error(), says) {
			t.Errorf("no %q in %q", says, err)
		}
	}
	mustHold(t, target, before)
}
