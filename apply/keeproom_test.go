// SPDX-License-Identifier: GPL-2.0-or-later

package apply_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/apply"
)

// An undo file and what is kept are two files on two file systems, which must have room
// before anything is written.
func TestKeepOnAnotherFileSystem(t *testing.T) {
	const volumeBytes = 1 << 20
	s := sealed(t, bytes.NewReader(make([]byte, volumeBytes)), volumeBytes)
	b, err := io.ReadAll(io.NewSectionReader(s, 0, s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	delta := newFile(t, "delta", b)
	small := smallFileSystem(t, 3*volumeBytes)
	base := bytes.Repeat([]byte("x"), volumeBytes)
	try := func(target string) (dir string, err error) {
		dir = filepath.Join(small, "points")
		_, err = apply.File(context.Background(), delta, target, apply.Options{StateDir: t.TempDir(), Keep: dir, Undo: t.TempDir() + "/undo"})
		return dir, err
	}
	target := newFile(t, "target", base)
	dir, err := try(target)
	if err != nil {
		t.Fatal(err)
	}
	mustHold(t, target, make([]byte, volumeBytes))
	kept, err := filepath.Glob(filepath.Join(dir, "*.cow"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("%v, %v", kept, err)
	}
	if _, err := apply.File(context.Background(), kept[0], target, apply.Options{StateDir: t.TempDir(), AssumeBase: true}); err != nil {
		t.Error(err)
	}
	mustHold(t, target, base)

	base = bytes.Repeat([]byte("y"), volumeBytes)
	writeFile(t, target, base)
	writeFile(t, filepath.Join(small, "fills"), make([]byte, volumeBytes+volumeBytes/2))
	if _, err = try(target); err == nil || !strings.Contains(err.Error(), "no room in "+dir) || !strings.Contains(err.Error(), "nothing was written") {
		t.Errorf("error %v", err)
	}
	mustHold(t, target, base)
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
}
