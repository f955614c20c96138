// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// shell runs a script, and returns what it printed and its exit code, which is that
// of a pipeline's last command.
func shell(t *testing.T, script string) (stdout, stderr string, code int) {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := exec.Command("sh", "-c", script)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", script, err)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// openSVC replicates a logical volume with the command lines of OpenSVC's sync.dds
// driver. Only ssh is not there.
type openSVC struct {
	*logical
	dest string
}

func (o *openSVC) snapshotPath(name string) string { return o.path("data_osvc_" + name) }

func (o *openSVC) cowPath() string {
	return "/dev/mapper/" + strings.ReplaceAll(o.group, "-", "--") + "-data_osvc_snap1-cow"
}

func (o *openSVC) create(t *testing.T, name string) {
	t.Helper()
	dm.Run(t, "lvcreate", "-s", "-n", "data_osvc_"+name, "-L", "24M", o.path("data"))
}

// full is OpenSVC's full sync, which is not recorded.
func (o *openSVC) full(t *testing.T) {
	t.Helper()
	o.create(t, "snap1")
	script := fmt.Sprintf("dd if=%s bs=1M | sh -c 'dd bs=1M of=%s'", o.snapshotPath("snap1"), o.dest)
	if _, complaint, code := shell(t, script); code != 0 {
		t.Fatalf("%s: exit code %d\n%s", script, code, complaint)
	}
	o.holds(t, "snap1")
}

// update is its incremental sync, with a pipe that does more than it should where a
// test wants that.
func (o *openSVC) update(t *testing.T, pipe string) (stdout, stderr string, code int) {
	t.Helper()
	return shell(t, fmt.Sprintf("dds --extract --cow %s --source %s | dd bs=4096 %s| sh -c 'dds --merge --dest %s -v'", o.cowPath(), o.snapshotPath("snap2"), pipe, o.dest))
}

// rotate makes snap2 the snap1 of the next time.
func (o *openSVC) rotate(t *testing.T) {
	t.Helper()
	dm.Run(t, "lvremove", "-f", o.snapshotPath("snap1"))
	dm.Run(t, "lvrename", o.group, "data_osvc_snap2", "data_osvc_snap1")
}

func (o *openSVC) holds(t *testing.T, name string) {
	t.Helper()
	dm.Holds(t, "the target of "+name, o.dest, dm.Read(t, o.snapshotPath(name), true))
}

// OpenSVC's replication: a full sync with dd, and updates, some of which fail.
func TestOpenSVC(t *testing.T) {
	newLogical(t, "vg-drp")
	o := &openSVC{newLogical(t, "vg-prod"), "/dev/mapper/vg--drp-data"}
	for s := int64(0); s < 16<<20/dm.SectorSize; s += 256 {
		o.write(t, "base", s, 64)
	}
	o.full(t)
	for round, chunks := range []int{11, 256, 700} {
		// A buffered read of the list would return this again.
		dm.Read(t, o.cowPath(), false)
		for c := range int64(chunks) {
			o.write(t, fmt.Sprint("round ", round), 8*(c*3+int64(round)), 8)
		}
		o.create(t, "snap2")
		o.write(t, "later", 30000, 8)

		before := dm.Read(t, o.dest, true)
		if round == 1 {
			// As a virtual machine would.
			used, err := os.Open(o.dest)
			if err != nil {
				t.Fatal(err)
			}
			if _, complaint, code := o.update(t, ""); code != 3 || !strings.Contains(complaint, o.dest+": refused") {
				t.Errorf("a target in use: exit code %d, %s", code, complaint)
			}
			if err := used.Close(); err != nil {
				t.Fatal(err)
			}
			dm.Holds(t, "the target in use", o.dest, before)
		}
		if round == 2 {
			if _, complaint, code := o.update(t, "| head -c 1000000 "); code != 4 || !strings.Contains(complaint, "dds: /dev/stdin: ") {
				t.Errorf("a pipe that breaks: exit code %d, %s", code, complaint)
			}
			dm.Holds(t, "the target of a pipe that broke", o.dest, before)
		}

		stdout, stderr, code := o.update(t, "")
		report := fmt.Sprintf("Snapshot header:\n  magic             0x70416e53\n  version           1\n  valid             yes\n  chunk_size        4 KB\nReport:\n  Exception chunks  %d\n  Exceptions        ", 1+chunks/256)
		if code != 0 || !strings.HasPrefix(stdout, report) || strings.Contains(stderr, "dds:") {
			t.Fatalf("update %d: exit code %d\n%s%s", round, code, stdout, stderr)
		}
		o.holds(t, "snap2")
		o.rotate(t)
	}

	// Nobody told ddsfs what the target holds.
	next := filepath.Join(t.TempDir(), "next")
	o.create(t, "snap2")
	dm.Ddsfs(t, "extract", "--cow", o.cowPath(), "--source", o.snapshotPath("snap2"), "-o", next)
	dm.Fails(t, nil, 3, []string{o.dest, "a state without a name"}, "apply", next, o.dest)
	o.holds(t, "snap1")
}

// Nothing looks at extract's exit code. So it must show in the delta that the new
// snapshot has overflowed, even if all of it can still be read from the page cache.
func TestDDSOverflow(t *testing.T) {
	l := newLogical(t, "ddsover")
	l.snapshot(t, "base", "24M")
	l.write(t, "new", 0, 4096)
	l.snapshot(t, "new", "4M")
	// Closed, it would lose its cache.
	held, err := os.Open(l.path("new"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := io.Copy(io.Discard, held); err != nil {
		t.Fatal(err)
	}
	l.write(t, "later", 4096, 16384)
	if status := dm.Run(t, "dmsetup", "status", "ddsover-new"); !strings.HasSuffix(strings.TrimSpace(status), "Invalid") {
		t.Fatalf("a precondition: the snapshot is %q, want an overflowed one", status)
	}
	if got, want := dm.Read(t, l.path("new"), false)[:4096*dm.SectorSize], dm.Fill("new", 0, 4096); !bytes.Equal(got, want) {
		t.Fatal("a precondition: what was read before is not in the page cache")
	}

	target := file(t, make([]byte, 16<<20))
	_, stderr, code := shell(t, fmt.Sprintf("dds --extract --cow /dev/mapper/ddsover-base-cow --source %s | dds --merge --dest %s", l.path("new"), target))
	if said := regexp.MustCompile(`(?i)dds: .*(invalid|overflow)`); code != 4 || !said.MatchString(stderr) {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	dm.Holds(t, "the target", target, make([]byte, 16<<20))
}

// Stores of the kernel and deltas in dds's form are the same thing, for both.
func TestDDSAndTheKernel(t *testing.T) {
	for _, c := range []struct {
		name           string
		sectors, chunk int64
		changed        int
	}{
		{"two areas", 16384, 8, 300},
		{"full area", 16384, 8, 256},
		{"no exceptions", 16384, 8, 0},
		{"partial last chunk", 20485, 128, 20},
		{"chunk=512", 4096, 1, 100},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, c.sectors, c.chunk, c.changed)
			delta := filepath.Join(t.TempDir(), "delta")
			dm.Run(t, "dds", "--extract", "--cow", p.base.COW.Path, "--source", p.new.Path, "--dest", delta)
			target := block(t, p.base.Image)
			view := dm.Create(t, "view", c.sectors,
				fmt.Sprintf("snapshot %s %s P %d", target, dm.Loop(t, delta, true), c.chunk), "--readonly")
			dm.Holds(t, "what the kernel shows", view.Path, p.new.Image)
			if status := view.Status(t); !healthy.MatchString(status) {
				t.Errorf("the kernel says %q of the delta", status)
			}
			view.Remove(t)

			// And back, by what the kernel saved of the base.
			target = block(t, p.new.Image)
			dm.Run(t, "dds", "--merge", "--cow", p.base.COW.Path, "--dest", target)
			dm.Holds(t, "the target after the kernel's store", target, p.base.Image)
			target = file(t, p.new.Image)
			if stdout, stderr, code := shell(t, fmt.Sprintf("dd if=%s iflag=direct bs=1M | dds --merge --dest %s", p.base.COW.Path, target)); code != 0 {
				t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
			}
			dm.Holds(t, "the target after the kernel's store in a pipe", target, p.base.Image)
		})
	}
}
