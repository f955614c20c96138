package reboot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ddsfs/testdata/lab/dm"
)

func TestMain(m *testing.M) { dm.Main(m) }

// Two disks that nothing tells apart but what is on them change names.
func TestDisksChangePlaces(t *testing.T) {
	twins := []string{"twin-1", "twin-2"}
	for _, name := range twins {
		sys := filepath.Join("/sys/block", filepath.Base(dm.Disk(t, name)))
		for _, file := range []string{"serial", "wwid", "device/serial", "device/wwid"} {
			// Of some drives, the kernel cannot read it.
			if id, err := os.ReadFile(filepath.Join(sys, file)); err == nil && strings.TrimSpace(string(id)) != "" {
				t.Errorf("a precondition, a disk without a name of its own: %s has %s %q", name, file, id)
			}
		}
	}
	record := filepath.Join(dm.State(t), "where-twin-1-is")
	if dm.Boot(t) == 1 {
		for _, name := range twins {
			if err := os.WriteFile(dm.Disk(t, name), dm.Fill(name, 0, 8), 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(record, []byte(dm.Disk(t, "twin-1")), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	was, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	dm.Equal(t, "the disk under twin-1's old name", dm.ReadPart(t, string(was), 0, 4096), dm.Fill("twin-2", 0, 8))
	for _, name := range twins {
		dm.Equal(t, name, dm.ReadPart(t, dm.Disk(t, name), 0, 4096), dm.Fill(name, 0, 8))
	}
}
