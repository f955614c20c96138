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
	size   string // the line of the configurations that says it, "" for a thin volume
	env    []string
	steps  string // the file that counts the steps of a run
	sent   int64  // how many bytes the last run says that it sent
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

// newReplication replicates a volume to a target, which need not be there yet.
func newReplication(t *testing.T, volume *logical, target string) *replication {
	t.Helper()
	r := &replication{volume: volume, target: target, bin: t.TempDir(), config: t.TempDir()}
	r.steps = filepath.Join(r.bin, "steps")
	for _, program := range []string{"lvs", "lvcreate", "lvchange", "lvremove", "lvrename", "ddsfs"} {
		place(t, filepath.Join(r.bin, program), fmt.Sprintf(shim, r.steps, "/bin/"+program))
	}
	place(t, filepath.Join(r.bin, "ssh"), ssh)
	r.configure(t, "here", "here", r.target)
	r.env = append(os.Environ(), "PATH="+r.bin+":"+os.Getenv("PATH"), "DDSFS_CONFIG_DIR="+r.config)
	return r
}

// mount makes the volume's file system, and mounts it.
func (r *replication) mount(t *testing.T) {
	t.Helper()
	r.dir = t.TempDir()
	dm.Run(t, "mkfs.ext4", "-q", r.volume.path("data"))
	dm.Run(t, "mount", "-t", "ext4", r.volume.path("data"), r.dir)
	t.Cleanup(func() { dm.Run(t, "umount", r.dir) })
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
		"VOLUME=%s/data\nHOST=%s\nTARGET=%s\n%sSSH=%s/ssh\n", r.volume.group, host, target, r.size, r.bin))
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
	r.sent = 0
	if _, said, ok := strings.Cut(string(out), r.volume.group+"/data, "); ok {
		_, said, _ = strings.Cut(said, ": ")
		fmt.Sscan(said, &r.sent)
	}
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

// trim discards what the file system does not use.
func (r *replication) trim(t *testing.T) {
	t.Helper()
	dm.Run(t, "busybox", "fstrim", r.dir)
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
	got = slices.DeleteFunc(got, func(name string) bool { return name == "pool" })
	if want = append([]string{"data"}, want...); !slices.Equal(got, want) {
		t.Errorf("%s: the volumes are %q, want %q", what, got, want)
	}
}

// Wherever the power fails, the next run finishes what was begun, with what changed
// alone.
func TestReplicate(t *testing.T) {
	r := newReplication(t, newLogical(t, "replicate"), newLogical(t, "replicate-target").path("data"))
	r.size = "SNAPSHOT_SIZE=12M\n"
	r.configure(t, "here", "here", r.target)
	r.mount(t)
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

// newThinLogical makes a thin volume of 16 MiB in a volume group of its own, whose pool has
// blocks of 64 KiB.
func newThinLogical(t *testing.T, group string) *logical {
	t.Helper()
	dm.Run(t, "vgcreate", group, dm.Blank(t, 128<<20/dm.SectorSize))
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", group) })
	dm.Run(t, "lvcreate", "-y", "-c", "64k", "-L", "64M", "-T", group+"/pool")
	dm.Run(t, "lvcreate", "-y", "-V", "16M", "-T", group+"/pool", "-n", "data")
	return &logical{group}
}

// reboot leaves the snapshots as a reboot does: not active.
func (r *replication) reboot(t *testing.T) {
	t.Helper()
	for _, name := range strings.Fields(dm.Run(t, "lvs", "--noheadings", "-o", "lv_name", r.volume.group)) {
		if strings.HasPrefix(name, "data-") {
			dm.Run(t, "lvchange", "-an", r.volume.group+"/"+name)
		}
	}
}

// Of a thin volume, a first sync sends what is mapped, and a round what changed, whatever
// the target held and wherever the power fails.
func TestReplicateThin(t *testing.T) {
	r := newReplication(t, newThinLogical(t, "thinly"), newLogical(t, "thinly-target").path("data"))
	writeTo(t, r.target, "of others", 0, 16<<20/dm.SectorSize)
	r.mount(t)
	check := func(what string) {
		t.Helper()
		dm.Run(t, "lvchange", "-ay", "-K", r.volume.group+"/data-ddsfs-here-base") // to be read here
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
	if r.sent == 0 || r.sent > 8<<20 {
		t.Errorf("the first sync has sent %d bytes", r.sent)
	}
	r.work(t, 1)
	r.reboot(t)
	steps, err := r.run(t, 0, "here")
	if err != nil {
		t.Fatal(err)
	}
	check("after a round and a reboot")
	r.trim(t)
	if _, err := r.run(t, 0, "here"); err != nil {
		t.Fatal(err)
	}
	check("after a discard")
	for last := 3; last <= steps; last += 4 {
		r.work(t, 2*last)
		var exit *exec.ExitError
		if _, err := r.run(t, last, "here"); !errors.As(err, &exit) {
			t.Fatalf("a precondition, that the power fails before step %d of %d: %v", last, steps, err)
		}
		r.reboot(t)
		r.work(t, 2*last+1)
		r.trim(t)
		if _, err := r.run(t, 0, "here"); err != nil {
			t.Fatalf("after the power failed before step %d: %v", last, err)
		}
		check(fmt.Sprintf("after the power failed before step %d", last))
	}
}

// A block that a snapshot alone maps is no part of a later delta from the same base. If the
// target is half merged with it, that snapshot is sent again.
func TestReplicateThinHalfMerged(t *testing.T) {
	dir := t.TempDir()
	dm.Run(t, "mount", "-t", "tmpfs", "-o", "size=2m", "none", dir)
	t.Cleanup(func() { dm.Run(t, "umount", dir) })
	target := filepath.Join(dir, "target")
	place(t, target, "")
	if err := os.Truncate(target, 16<<20); err != nil {
		t.Fatal(err)
	}
	r := newReplication(t, newThinLogical(t, "half"), target)
	holds := func(what string) {
		t.Helper()
		dm.Holds(t, what+": the target", target, dm.Read(t, r.volume.path("data-ddsfs-here-base"), true))
		r.snapshots(t, what, "data-ddsfs-here-base")
	}
	r.volume.write(t, "base", 1024, 128)
	if _, err := r.run(t, 0, "--first", "here"); err != nil {
		t.Fatal(err)
	}
	holds("after the first sync")

	r.volume.write(t, "new", 0, 128)
	r.volume.write(t, "new", 16384, 8192)
	if _, err := r.run(t, 0, "here"); err == nil || !strings.Contains(err.Error(), "HALF MERGED") {
		t.Fatalf("a precondition, that the target is full: %v", err)
	}
	r.snapshots(t, "half merged", "data-ddsfs-here-base", "data-ddsfs-here-new")
	dm.Run(t, "mount", "-o", "remount,size=32m", dir)
	dm.Run(t, "blkdiscard", "-o", "0", "-l", "65536", r.volume.path("data"))
	dm.Run(t, "lvcreate", "-s", "-pr", "-ay", "-K", "-n", "later", "half/data")
	delta := filepath.Join(t.TempDir(), "delta")
	dm.Ddsfs(t, "extract", "half/data-ddsfs-here-base", "half/later", "-o", delta)
	dm.Fails(t, nil, 3, []string{"half merged"}, "apply", delta, target)
	dm.Run(t, "lvremove", "-y", "half/later")

	r.reboot(t)
	if _, err := r.run(t, 0, "here"); err != nil {
		t.Fatal(err)
	}
	holds("after the next run")
	if _, err := r.run(t, 0, "here"); err != nil {
		t.Fatal(err)
	}
	holds("after a round")
	dm.Holds(t, "the target", target, dm.Read(t, r.volume.path("data"), true))
}
