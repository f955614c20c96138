// SPDX-License-Identifier: GPL-2.0-or-later

package lab

import (
	"flag"
	"strings"
	"testing"
)

// The scenarios run in several guests, three at a time, as each waits a quarter of its time
// for disks. They take about as long as each other: the longer the longest, the longer a
// processor has nothing to do at the end.
const (
	replicationTests = "^Test(Replicate|OpenSVC|DDS)"
	deviceTests      = "^Test(Attach|Mapped|Udev|Rounds)"
	kernelTests      = "^TestKernel"
	targetTests      = "^TestTarget"
	thinTests        = "^TestThin"
	poolTests        = "^TestPool"
	// A test that watches what ddsfs does, and acts in the middle of it, needs a
	// processor of its own.
	observingTests = "^TestKilled$"
)

// TestTwoProcessors runs the tests that need more than user-mode-linux's one processor,
// with ddsfs and the kernel at work at the same time. It takes the longest, and so begins
// first.
func TestTwoProcessors(t *testing.T) {
	some(t, QEMU, observingTests+"|^Test(GrowingStore|KernelMergeServes|Attach|LVM)$")
}

// TestScenarios boots a guest for all tests that no other guest runs, or for any tests
// that go test -run names below it: TestScenarios/TestPair/chunk=512.
func TestScenarios(t *testing.T) {
	t.Parallel()
	cfg := guest("guest")
	cfg.Skip = strings.Join([]string{replicationTests, deviceTests, kernelTests, targetTests, thinTests, poolTests, observingTests}, "|")
	Boots(t, named(cfg))
}

func TestReplication(t *testing.T) { some(t, UML, replicationTests) }
func TestDevices(t *testing.T)     { some(t, UML, deviceTests) }
func TestKernel(t *testing.T)      { some(t, UML, kernelTests) }
func TestTargets(t *testing.T)     { some(t, UML, targetTests) }
func TestThin(t *testing.T)        { some(t, UML, thinTests) }
func TestPool(t *testing.T)        { some(t, UML, poolTests) }

func some(t *testing.T, kernel Kernel, tests string) {
	t.Parallel()
	cfg := guest("guest")
	cfg.Kernel, cfg.Run = kernel, tests
	Boots(t, named(cfg))
}

// TestReboot boots two guests, one after the other. In the second one, disks have changed
// places. The tests of the first one end with a power cut.
func TestReboot(t *testing.T) {
	t.Parallel()
	state, inPlace := BlankDisk(t, "state", 128<<20), BlankDisk(t, "in-place", 16<<20)
	twin1, twin2 := BlankDisk(t, "twin-1", 16<<20), BlankDisk(t, "twin-2", 16<<20)
	serial, volumes := BlankDisk(t, "named", 16<<20), BlankDisk(t, "volumes", 64<<20)
	serial.Serial = "labnamed"
	first := named(guest("reboot"))
	second := first
	first.Disks = []Disk{state, inPlace, twin1, twin2, serial, volumes}
	second.Disks = []Disk{state, inPlace, twin2, twin1, volumes, serial}
	Boots(t, first, second)
}

// TestPowerCut kills a guest in which merges are under way, and looks with another
// one at what is left of them.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	plain := BlankDisk(t, "plain", 2<<20)
	plain.Serial = "plain"
	before := guest("powercut")
	before.Disks = []Disk{BlankDisk(t, "targets", 32<<20), BlankDisk(t, "states", 128<<20), BlankDisk(t, "deltas", 32<<20), plain}
	after := before
	before.Run, after.Run = "^TestBefore$", "^TestAfter$"
	Boots(t, before, after)
}

// guest is a guest for the tests of a package of the lab.
func guest(name string) Config {
	return Config{
		Package:  "ddsfs/testdata/lab/" + name,
		Binaries: map[string]string{"ddsfs": "ddsfs/cmd/ddsfs"},
		Scripts:  []string{"../../cmd/ddsfs-replicate/ddsfs-replicate"},
		Links:    map[string]string{"dds": "ddsfs"},
	}
}

// named has the guest run what go test -run names below the test that boots it.
func named(cfg Config) Config {
	if _, below, named := strings.Cut(flag.Lookup("test.run").Value.String(), "/"); named {
		cfg.Run, cfg.Skip = below, ""
	}
	return cfg
}
