package lab

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPowerCut kills a guest in which merges are under way, and looks with another
// one at what is left of them.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var disks []Disk
	for name, bytes := range map[string]int64{"targets": 32 << 20, "states": 128 << 20, "plain": 2 << 20, "deltas": 32 << 20} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, bytes); err != nil {
			t.Fatal(err)
		}
		disks = append(disks, Disk{Name: name, Path: path})
	}
	config := Config{
		Package:  "ddsfs/testdata/lab/powercut",
		Run:      "TestBefore",
		Binaries: map[string]string{"ddsfs": "ddsfs/cmd/ddsfs"},
		Disks:    disks,
	}
	before := Boot(t, config)
	if err := before.WaitFor("powercut: now"); err != nil {
		before.Wait().Report(t)
		t.Fatal(err)
	}
	before.Kill()

	config.Run = "TestAfter"
	Boot(t, config).Wait().Report(t)
}
