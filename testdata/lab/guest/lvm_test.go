package guest

import (
	"os"
	"testing"

	"ddsfs/testdata/lab/dm"
)

// What an administrator does, with LVM's names: two read-only snapshots of a
// logical volume and a delta; the older one goes as soon as its list is read.
func TestLVM(t *testing.T) {
	disk := dm.Blank(t, 256<<20/dm.SectorSize)
	dm.Run(t, "vgcreate", "vg", disk)
	t.Cleanup(func() { dm.Run(t, "vgremove", "-f", "vg") })
	dm.Run(t, "lvcreate", "-y", "-Zn", "-L", "16M", "-n", "data", "vg")
	write := func(what string, sector int64) {
		file, err := os.OpenFile("/dev/vg/data", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(dm.Fill(what, sector, 64), sector*dm.SectorSize); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for s := int64(0); s < 16<<20/dm.SectorSize; s += 128 {
		write("base", s)
	}
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "24M", "-n", "base", "vg/data")
	target := file(t, dm.Read(t, "/dev/vg/base", true))
	for _, s := range []int64{5000, 96, 97, 32704} {
		write("new", s)
	}
	dm.Run(t, "lvcreate", "-s", "-pr", "-L", "24M", "-n", "new", "vg/data")
	write("later", 12000)

	m := mount(t, "/dev/mapper/vg-base-cow", "/dev/vg/new")
	dm.Run(t, "lvremove", "-f", "vg/base")
	delta := copied(t, m.delta())
	m.unmount(t)
	dm.Run(t, "lvrename", "vg", "new", "base")

	ddsfs(t, "apply", delta, target)
	holds(t, "the target", target, dm.Read(t, "/dev/vg/base", true))
}
