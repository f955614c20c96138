// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// withUdev runs udev until the end of the test.
func withUdev(t *testing.T) {
	t.Helper()
	dm.Run(t, "systemd-udevd", "--daemon")
	t.Cleanup(func() {
		dm.Run(t, "udevadm", "control", "--exit")
		// Its rules leave links to what the tests remove by hand.
		if err := os.RemoveAll("/run/udev"); err != nil {
			t.Error(err)
		}
	})
	dm.Run(t, "udevadm", "settle")
}

// Where udev runs, it makes the names of devices, looks into what is new, and takes
// the names away.
func TestUdev(t *testing.T) {
	withUdev(t)
	base, new := ext4(t, true)
	m := newMergesOf(t, base, new, 4096).onDisk(t)
	slow := newSlowOver(t, "target", block(t, base), int64(len(base))/dm.SectorSize, 200)
	target := slow.Path
	m.apply(t, m.Full, target)
	dm.Run(t, "udevadm", "settle")
	before := kernelDevices(t)
	link := func(path string) {
		t.Helper()
		to, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(filepath.Base(to), "dm-") {
			t.Errorf("%s leads to %q, %v: it is not udev's", path, to, err)
		}
	}
	settled := func() {
		t.Helper()
		dm.Run(t, "udevadm", "settle")
		nothingLeft(t, before)
	}
	for range 3 {
		for _, options := range [][]string{nil, {"--writable"}} {
			m.attach(t, append(options, m.Forth, target, "view")...)
			link("/dev/mapper/view")
			dm.Holds(t, "the view", "/dev/mapper/view", new)
			dm.Ddsfs(t, "detach", "view")
			settled()
		}
	}

	// The merge does not end before somebody has its device open. It may not stand
	// still either: udev reads what is being merged, and waits for that.
	user := make(chan *os.File, 1)
	r := start(t, m.kernelArgs(m.Forth, target)...)
	dm.Until(t, "the device of the merge has its name", func() bool {
		f, err := os.Open(mergePath)
		if err != nil {
			return false
		}
		link(mergePath)
		user <- f
		return true
	})
	slow.faster(t)
	if out := r.end(t, 0); !strings.Contains(out, "stays") {
		t.Errorf("says %q", out)
	}
	link(mergePath)
	if err := (<-user).Close(); err != nil {
		t.Fatal(err)
	}
	dm.Ddsfs(t, "detach", "merge")
	settled()
	for _, delta := range []string{m.Back, m.Forth, m.Back} {
		dm.Ddsfs(t, m.kernelArgs(delta, target)...)
		settled()
	}
	dm.Holds(t, "the target", target, base)
}
