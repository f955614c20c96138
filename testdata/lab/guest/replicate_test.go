package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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

// ssh runs the command here. Its host says whether the line breaks down.
const ssh = `#!/bin/sh
host=$1
shift
if [ "$host" = breaks ]; then head -c 100000 | sh -c "$*"; else exec sh -c "$*"; fi
`

func newReplication(t *testing.T, name string) *replication {
	t.Helper()
	r := &replication{volume: newLogical(t, name), dir: t.TempDir()}
	dm.Run(t, "mkfs.ext4", "-q", r.volume.path("data"))
	dm.Run(t, "mount", "-t", "ext4", r.volume.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
	r.target = newLogical(t, name+"-target").path("data")

	bin, config := t.TempDir(), t.TempDir()
	write := func(path, content string) {
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.steps = filepath.Join(bin, "steps")
	for _, program := range []string{"lvs", "lvcreate", "lvremove", "lvrename", "ddsfs"} {
		write(filepath.Join(bin, program), fmt.Sprintf(shim, r.steps, "/bin/"+program))
	}
	write(filepath.Join(bin, "ssh"), ssh)
	for _, host := range []string{"here", "breaks"} {
		write(filepath.Join(config, host+".conf"), fmt.Sprintf(
			"VOLUME=%s/data\nHOST=%s\nTARGET=%s\nSNAPSHOT_SIZE=12M\nSSH=%s/ssh\n", name, host, r.target, bin))
	}
	r.env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "DDSFS_CONFIG_DIR="+config)
	return r
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

// check compares the target with the snapshot that it should hold, and has its file
// system checked.
func (r *replication) check(t *testing.T, what string) {
	t.Helper()
	dm.Holds(t, what+": the target", r.target, dm.Read(t, r.volume.path("data-ddsfs-base"), true))
	if out, err := exec.Command("e2fsck", "-fn", r.target).CombinedOutput(); err != nil {
		t.Errorf("%s: the target's file system: %v\n%s", what, err, out)
	}
	if got := strings.Fields(dm.Run(t, "lvs", "--noheadings", "-o", "lv_name", r.volume.group)); len(got) != 2 {
		t.Errorf("%s: the volumes are %q", what, got)
	}
}

// Wherever the power fails, the next run finishes what was begun, with what changed
// alone.
func TestReplicate(t *testing.T) {
	r := newReplication(t, "replicate")
	if _, err := r.run(t, 0, "here"); err == nil || !strings.Contains(err.Error(), "--first") {
		t.Errorf("without a first sync: %v", err)
	}
	r.work(t, 0)
	if _, err := r.run(t, 0, "--first", "here"); err != nil {
		t.Fatal(err)
	}
	r.check(t, "after the first sync")
	r.work(t, 1)
	steps, err := r.run(t, 0, "here")
	if err != nil {
		t.Fatal(err)
	}
	r.check(t, "after a round")
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
		r.check(t, fmt.Sprintf("after the power failed before step %d", last))
	}

	r.work(t, 1)
	if _, err := r.run(t, 0, "breaks"); err == nil {
		t.Error("the line breaks down, and nothing is said")
	}
	if _, err := r.run(t, 0, "here"); err != nil {
		t.Fatal(err)
	}
	r.check(t, "after the line broke down")
}
