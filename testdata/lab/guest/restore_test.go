// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// Five rounds of changes to a file system, each of which keeps the state before it. Every
// state can then be opened from the target, and has the files that it had at the time.
func TestTargetRestorePoints(t *testing.T) {
	l := newLogical(t, "points")
	target := newLogical(t, "pointsto")
	r := &rounds{group: "points", volume: "data", base: "base", target: target.path("data"), dir: t.TempDir()}
	dm.Run(t, "mkfs.ext4", "-q", l.path("data"))
	dm.Run(t, "mount", "-t", "ext4", l.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
	var were []map[string]string // the files of each state
	take := func(name string) {
		t.Helper()
		r.work(t)
		r.snapshot(t, name, "12M")
		were = append(were, filesIn(t, r.dir))
	}
	take("base")
	dm.Ddsfs(t, "apply", r.delta(t, "--full", r.lv("base")), r.target)
	kept := filepath.Join(t.TempDir(), "kept")
	for range 5 {
		take("new")
		dm.Ddsfs(t, "apply", "--keep", kept, r.delta(t, r.lv("base"), r.lv("new")), r.target)
		r.rotate(t)
	}
	names := list(t, kept)
	if len(names) != len(were)-1 {
		t.Fatalf("kept are %q, want %d", names, len(were)-1)
	}

	images := t.TempDir()
	dm.Ddsfs(t, "browse", r.target, kept, images)
	dm.Fails(t, nil, 3, []string{r.target, "browse"}, "apply", filepath.Join(kept, names[len(names)-1]), r.target)
	for i, files := range were {
		image := "now.img"
		if i < len(names) {
			image = strings.TrimSuffix(names[i], ".cow") + ".img"
		}
		t.Run(fmt.Sprint("state ", i), func(t *testing.T) { holdsFiles(t, filepath.Join(images, image), files) })
	}
	dm.Ddsfs(t, "unmount", images)
	dm.Ddsfs(t, "apply", filepath.Join(kept, names[len(names)-1]), r.target)
}

// holdsFiles checks the file system in an image, and its files.
func holdsFiles(t *testing.T, image string, want map[string]string) {
	t.Helper()
	loop := strings.TrimSpace(dm.Run(t, "losetup", "-f", "-r", "--show", image))
	defer dm.Run(t, "losetup", "-d", loop)
	if out, err := exec.Command("e2fsck", "-fn", loop).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "ext4", "-o", "ro,norecovery", loop, dir)
	defer dm.Run(t, "umount", dir)
	if got := filesIn(t, dir); !maps.Equal(got, want) {
		t.Errorf("it has %d files, which are not the %d that it had", len(got), len(want))
	}
}

// filesIn returns the contents of the files in a directory by their names.
func filesIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for _, name := range list(t, dir) {
		if name == "lost+found" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(content)
	}
	return files
}
