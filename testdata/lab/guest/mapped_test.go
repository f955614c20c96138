// SPDX-License-Identifier: GPL-2.0-or-later

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
	mapper "ddsfs/cow/dm"
	"ddsfs/testdata/lab/dm"
)

// The calls to the device mapper do what dmsetup says they did.
func TestMapped(t *testing.T) {
	const sectors = 2048
	image := dm.Fill("disk", 0, sectors)
	disk := info(t, block(t, image))
	linear := func(start, count, from int64) mapper.Target {
		return mapper.Target{StartSector: uint64(start), Sectors: uint64(count), Type: "linear", Params: fmt.Sprintf("%s %d", disk.Number, from)}
	}

	uuid := "DDSFS-" + strings.Repeat("u", 122)
	name := strings.Repeat("n", 127)
	m, err := mapper.Create(name, uuid)
	if err != nil {
		t.Fatal(err)
	}
	removed := false
	t.Cleanup(func() {
		if !removed {
			dm.Run(t, "dmsetup", "remove", name)
		}
	})
	if got := strings.TrimSpace(dm.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "uuid", name)); got != uuid {
		t.Errorf("the uuid is %q", got)
	}
	for what, use := range map[string][2]string{"name": {name, "another"}, "uuid": {"another", uuid}} {
		if _, err := mapper.Create(use[0], use[1]); !errors.Is(err, fs.ErrExist) {
			t.Errorf("another device of that %s: %v", what, err)
		}
	}
	byName, err := mapper.ByName(name)
	if err != nil || *byName != *m {
		t.Errorf("by name: %+v, %v; want %+v", byName, err, m)
	}
	byUUID, err := mapper.ByUUID(uuid)
	if err != nil || *byUUID != *m {
		t.Errorf("by uuid: %+v, %v; want %+v", byUUID, err, m)
	}

	// Two targets, exchanged; read-only.
	if err := m.Load(true, linear(0, 1000, 1048), linear(1000, 1048, 0)); err != nil {
		t.Fatal(err)
	}
	wantState := func(what string, want mapper.State) {
		t.Helper()
		if got, err := m.State(); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", what, got, err, want)
		}
	}
	wantState("loaded", mapper.State{Loaded: true})
	if targets, err := m.LoadedStatus(); err != nil || len(targets) != 2 {
		t.Errorf("the status of the table that was loaded: %+v, %v", targets, err)
	}
	if err := m.Resume(false); err != nil {
		t.Fatal(err)
	}
	if err := m.MakeNode(); err != nil {
		t.Fatal(err)
	}
	wantState("resumed", mapper.State{Active: true})
	dm.Holds(t, "the device", m.Path(), append(append([]byte(nil), image[1048*512:]...), image[:1048*512]...))
	if !info(t, m.Path()).ReadOnly() {
		t.Error("the device of a read-only table can be written to")
	}

	// Another table, while somebody has it open.
	if err := m.Load(false, linear(0, sectors, 0)); err != nil {
		t.Fatal(err)
	}
	wantState("loaded again", mapper.State{Active: true, Loaded: true})
	user, err := os.Open(m.Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Suspend(); err != nil {
		t.Fatal(err)
	}
	wantState("suspended", mapper.State{Suspended: true, Active: true, Loaded: true, OpenCount: 1})
	if err := m.Resume(false); err != nil {
		t.Fatal(err)
	}
	dm.Holds(t, "the device with another table", m.Path(), image)
	if table, err := m.Table(); err != nil || len(table) != 1 || table[0] != linear(0, sectors, 0) {
		t.Errorf("the table: %+v, %v", table, err)
	}
	if err := m.Remove(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("removed while it is open: %v", err)
	}
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(); err != nil {
		t.Fatal(err)
	}
	removed = true
	if _, err := os.Lstat(m.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its node: %v", err)
	}
	if _, err := mapper.ByUUID(uuid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("found when it is gone: %v", err)
	}
}

// info tells what a device is.
func info(t *testing.T, path string) blockdev.Info {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	i, err := blockdev.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// --version prints the version of the device mapper, and those of the loaded targets.
func TestVersion(t *testing.T) {
	newPair(t, 8192, 8, 10)
	if got := dm.Ddsfs(t, "--version"); !regexp.MustCompile(`(?m)^device-mapper 4\.\d+\.\d+, snapshot 1\.\d+\.\d+, snapshot-origin 1\.`).MatchString(got) {
		t.Errorf("it says\n%s", got)
	}
}
