package lab

import (
	"flag"
	"strings"
	"testing"
)

// deviceTests are about the devices that ddsfs makes, and some more, so that they and
// TestPowerCut take as long as the rest.
const deviceTests = "^Test(Attach|Kernel|Mapped|Udev|Rounds)"

// TestScenarios boots one guest for all of them but those of TestDevices, or for
// those below it that go test -run names: TestScenarios/TestPair/chunk=512.
func TestScenarios(t *testing.T) {
	t.Parallel()
	cfg := guest("guest")
	cfg.Skip = deviceTests
	Boots(t, named(cfg))
}

// TestDevices boots another one, at the same time.
func TestDevices(t *testing.T) {
	t.Parallel()
	cfg := guest("guest")
	cfg.Run = deviceTests
	Boots(t, named(cfg))
}

// smpTests are those in which ddsfs and the kernel are at the same thing at the same
// time, and one of everything else.
const smpTests = "^Test(GrowingStore|KernelMergeServes|KernelMergeSignal|Attach|LVM)$"

// TestTwoProcessors boots an emulated machine: user-mode-linux has one processor.
func TestTwoProcessors(t *testing.T) {
	t.Parallel()
	cfg := guest("guest")
	cfg.Kernel, cfg.Run = QEMU, smpTests
	Boots(t, named(cfg))
}

// TestReboot boots two, one after the other. In the second one, the twins have changed
// places.
func TestReboot(t *testing.T) {
	t.Parallel()
	state := BlankDisk(t, "state", 64<<20)
	twin1, twin2 := BlankDisk(t, "twin-1", 16<<20), BlankDisk(t, "twin-2", 16<<20)
	first := named(guest("reboot"))
	second := first
	first.Disks = []Disk{state, twin1, twin2}
	second.Disks = []Disk{state, twin2, twin1}
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
