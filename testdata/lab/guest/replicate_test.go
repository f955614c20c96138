// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// replication is a volume with a file system in use, and one that ddsfs-replicate
// copies it to, on what stands for another host.
type replication struct {
	volume *logical
	target string
	dir    string // where the volume is mounted
	bin    string // stands in front of the programs that a run calls
	config string // the directory of the configurations
	env    []string
	steps  string // the file that counts the steps of a run
}

// shim stands in front of a program. It counts, and before the step whose number is
// in a file beside the count, the power fails on both hosts. Both ends of a pipe begin
// at once, and one may be killed while it counts.
const shim = `#!/bin/sh
exec 8>>%[1]s.lock
flock 8
n=$(($(cat %[1]s) + 1))
echo $n >%[1]s.next
mv %[1]s.next %[1]s
if [ $n = "$(cat %[1]s.last)" ]; then kill -9 0; fi
exec %[2]s "$@" 8>&-
`

// ssh runs the command here. Its host says whether the line breaks down, and whether
// anybody hears of that.
const ssh = `#!/bin/sh
host=$1
shift
case $host in
breaks) head -c 100000 | sh -c "$*" ;;
loses) head -c 100000 | sh -c "$*"; exit 0 ;;
*) exec sh -c "$*" ;;
esac
`

func newReplication(t *testing.T, name string) *replication {
	t.Helper()
	r := &replication{volume: newLogical(t, name), dir: t.TempDir()}
	dm.Run(t, "mkfs.ext4", "-q", r.volume.path("data"))
	dm.Run(t, "mount", "-t", "ext4", r.volume.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
	r.target = newLogical(t, name+"-target").path("data")

	r.bin, r.config = t.TempDir(), t.TempDir()
	r.steps = filepath.Join(r.bin, "steps")
	for _, program := range []string{"lvs", "lvcreate", "lvremove", "lvrename", "ddsfs"} {
		place(t, filepath.Join(r.bin, program), fmt.Sprintf(shim, r.steps, "/bin/"+program))
	}
	place(t, filepath.Join(r.bin, "ssh"), ssh)
	r.configure(t, "here", "here", r.target)
	r.env = append(os.Environ(), "PATH="+r.bin+":"+os.Getenv("PATH"), "DDSFS_CONFIG_DIR="+r.config)
	return r
}

func place(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// configure writes a configuration.
func (r *replication) configure(t *testing.T, name, host, target string) {
	t.Helper()
	place(t, filepath.Join(r.config, name+".conf"), fmt.Sprintf(
		"VOLUME=%s/data\nHOST=%s\nTARGET=%s\nSNAPSHOT_SIZE=12M\nSSH=%s/ssh\n", r.volume.group, host, target, r.bin))
}

// run runs ddsfs-replicate until it is done or, if last is not 0, the power fails
// before that step. It returns how many steps it took.
func (r *replication) run(t *testing.T, last int, args ...string) (steps int, err error) {
	t.Helper()
	for path, n := range map[string]int{r.steps: 0, r.steps + ".last": last} {
		if err := os.WriteFile(path, fmt.Appendln(nil, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// In a session of its own, which a shim can end as a whole; of its output the
	// end says that nobody is left.
	cmd := exec.Command("setsid", append([]string{"ddsfs-replicate"}, args...)...)
	cmd.Env = r.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("ddsfs-replicate %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	text, readErr := os.ReadFile(r.steps)
	if readErr != nil {
		t.Fatal(readErr)
	}
	if _, scanErr := fmt.Sscan(string(text), &steps); scanErr != nil {
		t.Fatal(scanErr)
	}
	return steps, err
}

// work uses the file system: files come, change and go.
func (r *replication) work(t *testing.T, round int) {
	t.Helper()
	for i := range 4 {
		content := bytes.Repeat(fmt.Appendf(nil, "round %d, file %d\n", round, i), 3000)
		if err := os.WriteFile(filepath.Join(r.dir, fmt.Sprintf("%d-%d", round%2, i)), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(r.dir, fmt.Sprintf("%d-%d", round%2, 3))); err != nil {
		t.Fatal(err)
	}
}

// check compares a configuration's target with the snapshot that it should hold, and
// has its file system checked.
func (r *replication) check(t *testing.T, what, name, target string) {
	t.Helper()
	dm.Holds(t, what+": the target", target, dm.Read(t, r.volume.path("data-ddsfs-"+name+"-base"), true))
	if out, err := exec.Command("e2fsck", "-fn", target).CombinedOutput(); err != nil {
		t.Errorf("%s: the target's file system: %v\n%s", what, err, out)
	}
}

// snapshots checks which snapshots there are.
func (r *replication) snapshots(t *testing.T, what string, want ...string) {
	t.Helper()
	got := strings.Fields(dm.Run(t, "lvs", "--noheadings", "-o", "lv_name", r.volume.group))
	slices.Sort(got)
	if want = append([]string{"data"}, want...); !slices.Equal(got, want) {
		t.Errorf("%s: the volumes are %q, want %q", what, got, want)
	}
}

// Wherever the power fails, the next run finishes what was begun, with what changed
// alone.
func TestReplicate(t *testing.T) {
	r := newReplication(t, "replicate")
	check := func(what string) {
		t.Helper()
		r.check(t, what, "here", r.target)
		r.snapshots(t, what, "data-ddsfs-here-base")
	}
	if _, err := r.run(t, 0, "here"); err == nil || !strings.Contains(err.Error(), "--first") {
		t.Errorf("without a first sync: %v", err)
	}
	r.work(t, 0)
	if _, err := r.run(t, 0, "--first", "here"); err != nil {
		t.Fatal(err)
	}
	check("after the first sync")
	r.work(t, 1)
	steps, err := r.run(t, 0, "here")
	if err != nil {
		t.Fatal(err)
	}
	check("after a round")
	for last := 1; last <= steps; last++ {
		r.work(t, 2*last)
		var exit *exec.ExitError
		if _, err := r.run(t, last, "here"); !errors.As(err, &exit) {
			t.Fatalf("a precondition, that the power fails before step %d of %d: %v", last, steps, err)
		}
		r.work(t, 2*last+1)
		if _, err := r.run(t, 0, "here"); err != nil {
			t.Fatalf("after the power failed before step %d: %v", last, err)
		}
		check(fmt.Sprintf("after the power failed before step %d", last))
	}

	for _, line := range []string{"breaks", "loses"} {
		r.work(t, 1)
		r.configure(t, "here", line, r.target)
		if _, err := r.run(t, 0, "here"); err == nil {
			t.Errorf("the line %s, and nothing is said", line)
		}
		r.snapshots(t, "after a run on a line that "+line, "data-ddsfs-here-base")
		r.configure(t, "here", "here", r.target)
		if _, err := r.run(t, 0, "here"); err != nil {
			t.Fatal(err)
		}
		check("after a line that " + line)
	}

	// A base by the name that it once had, and another replication of the volume.
	dm.Run(t, "lvrename", r.volume.group, "data-ddsfs-here-base", "data-ddsfs-base")
	other := newLogical(t, "replicate-other").path("data")
	r.configure(t, "there", "there", other)
	for _, args := range [][]string{{"--first", "there"}, {"here"}, {"there"}} {
		r.work(t, 0)
		if _, err := r.run(t, 0, args...); err != nil {
			t.Fatal(err)
		}
	}
	r.check(t, "of two", "here", r.target)
	r.check(t, "of two", "there", other)
	r.snapshots(t, "of two", "data-ddsfs-here-base", "data-ddsfs-there-base")
}
