// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// A target that is in use is refused, and is not written to.
func TestTargetInUse(t *testing.T) {
	m := newMerges(t)
	disk := dm.Blank(t, mergeSectors)
	target := dm.Create(t, "used", mergeSectors, "linear "+disk+" 0", "--uuid", "lab-used")
	m.apply(t, m.Full, target.Path)
	refused := func(what, path string, words ...string) {
		t.Helper()
		before := dm.Read(t, path, true)
		dm.Fails(t, nil, 3, append([]string{path, "refused"}, words...), m.args(m.Forth, path)...)
		dm.Holds(t, what, path, before)
	}

	// As a virtual machine: it claims nothing, and writes nothing for now.
	file, err := os.OpenFile(target.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused("the target that a process has open", target.Path, fmt.Sprintf("process %d", os.Getpid()))
	// Where that process can't be seen, the device mapper still counts it.
	out, err := exec.Command("unshare", append([]string{"--pid", "--fork", "--mount", "--mount-proc", "ddsfs"}, m.args(m.Forth, target.Path)...)...).CombinedOutput()
	if exit := (&exec.ExitError{}); !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(string(out), "the device mapper counts 1 other") {
		t.Errorf("apply where the process that has the target open is not to be seen: %v\n%s", err, out)
	}
	dm.Holds(t, "the target that a hidden process has open", target.Path, m.Base)
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}

	stacked := dm.Create(t, "stacked", mergeSectors, "linear "+target.Path+" 0")
	refused("the target that a device lies on", target.Path, "stacked on it")
	refused("what is below the target", disk, "stacked on it")
	stacked.Remove(t)

	withFS := dm.Create(t, "with-fs", mergeSectors, "linear "+dm.Blank(t, mergeSectors)+" 0")
	dm.Run(t, "mkfs.ext4", "-q", "-O", "^has_journal", withFS.Path)
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "ext4", "-o", "ro", withFS.Path, dir)
	refused("the mounted target", withFS.Path, "mounted on "+dir)
	dm.Run(t, "umount", dir)

	// It was for their use alone that it was refused.
	m.apply(t, m.Forth, target.Path)
	dm.Holds(t, "the target that nobody uses", target.Path, m.New)
}

// A read-only target is refused before anything is kept of the delta or of it, by the
// kernel's merge as well.
func TestReadOnlyTarget(t *testing.T) {
	m := newMerges(t)
	target := dm.Create(t, "read-only", mergeSectors, "linear "+dm.Blank(t, mergeSectors)+" 0", "--readonly")
	state, spool := filepath.Join(t.TempDir(), "state"), t.TempDir()
	for _, args := range [][]string{{m.Full}, {"-"}, {"--stream", "-"}, {"--kernel", m.Full}, {"--kernel", "-"}} {
		args = append([]string{"apply", "--state-dir", state, "--spool", spool}, args...)
		dm.Fails(t, dm.Read(t, m.Full, false), 3, []string{target.Path, "refused", "read-only"}, append(args, target.Path)...)
	}
	if records, err := filepath.Glob(state + "/*.json"); err != nil || len(records) > 0 {
		t.Errorf("recorded %q, %v", records, err)
	}
	if left := list(t, spool); len(left) > 0 {
		t.Errorf("spooled %q", left)
	}
}
