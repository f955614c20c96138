// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// newHost is a mount namespace in which mount(8) finds mount.ddsfs, and fstab may be
// written to.
func newHost(t *testing.T) *users {
	t.Helper()
	u := newUsers(t, "")
	sbin, err := filepath.EvalSymlinks("/sbin")
	must(t, err)
	script := `
		mount -t tmpfs tmpfs "$1"
		mkdir "$1/sbin" "$1/etc" "$1/work-sbin" "$1/work-etc"
		ln -s "$2" "$1/sbin/mount.ddsfs"
		ln -s "$2" "$1/sbin/mount.fuse.ddsfs"
		mount -t overlay -o "lowerdir=$0,upperdir=$1/sbin,workdir=$1/work-sbin" overlay "$0"
		mount -t overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/work-etc" overlay /etc`
	over := filepath.Join(t.TempDir(), "over")
	must(t, os.Mkdir(over, 0o755))
	u.as(root, "sh", "-euc", script, sbin, over, executable).ok()
	return u
}

// mounts are the mounts on a directory: their type, device and options.
func (u *users) mounts(dir string) (all [][]string) {
	u.t.Helper()
	r := u.as(root, "findmnt", "--noheadings", "--list", "--output", "FSTYPE,SOURCE,OPTIONS", "--mountpoint", dir)
	for line := range strings.Lines(r.stdout) {
		all = append(all, strings.Fields(line))
	}
	return all
}

// umount unmounts it with umount(8), and expects its server to end.
func (u *users) umount(by int, dir string) {
	u.t.Helper()
	p := server(u.t, dir)
	u.as(by, "umount", dir).ok()
	p.ended(u.t)
	if left := u.mounts(dir); len(left) > 0 {
		u.t.Errorf("still mounted: %q", left)
	}
}

func TestMountType(t *testing.T) {
	u := newHost(t)
	dir := filepath.Join(fixtures, "plain-4k")
	cow, source := filepath.Join(dir, "cow"), filepath.Join(dir, "new")
	for _, test := range []struct {
		options []string
		extract []string
		stat    string
	}{
		{[]string{"-o", "cow=" + cow}, pair("plain-4k"), "0 0 400"},
		{[]string{"-o", "full"}, []string{"--full", source}, "0 0 400"},
		{[]string{"-o", "full", "-o", "rw,noatime,x-systemd.automount,comment=a,,nofail"}, []string{"--full", source}, "0 0 400"},
		{[]string{"-r", "-o", "cow=" + cow + ",base_id=a,new_id=b,base_check,allow_other,uid=7,gid=8,mode=0440"},
			args(pair("plain-4k"), "--base-id", "a", "--new-id", "b", "--base-check"), "7 8 440"},
		{[]string{"-s", "-o", "full,bogus,bogus=1"}, []string{"--full", source}, "0 0 400"},
	} {
		m := u.mountpoint()
		u.as(root, args("mount", "-t", "ddsfs", source, m, test.options)...).ok()
		if got := u.as(root, "cat", m+"/delta.cow").ok(); got != ddsfs(t, args("extract", test.extract)...).ok() {
			t.Errorf("%q: delta.cow is not what extract writes", test.options)
		}
		if got := u.as(root, "stat", "-c", "%u %g %a", m+"/delta.cow").ok(); got != test.stat+"\n" {
			t.Errorf("%q: owner, group and mode: %s", test.options, got)
		}
		shown := u.mounts(m)
		if len(shown) != 1 || shown[0][0] != "fuse.ddsfs" || shown[0][1] != source {
			t.Fatalf("%q: shown as %q", test.options, shown)
		}
		for _, option := range []string{"ro", "nosuid", "nodev", "noexec"} {
			if !slices.Contains(strings.Split(shown[0][2], ","), option) {
				t.Errorf("%q: mounted %s", test.options, shown[0][2])
			}
		}
		u.umount(root, m)
	}
}

func TestMountTypeRefuses(t *testing.T) {
	u := newHost(t)
	m := u.mountpoint()
	dir := filepath.Join(fixtures, "plain-4k")
	cow, source := filepath.Join(dir, "cow"), filepath.Join(dir, "new")
	const helper, command = "mount.ddsfs", "ddsfs"
	for _, test := range []struct {
		options string
		code    int
		program string // that finds it
		says    string
	}{
		{"full,bogus", 1, helper, `unknown option "bogus"`},
		{"full,foreground", 1, helper, `unknown option "foreground"`},
		{"full,ready_fd=3", 1, helper, `unknown option "ready_fd=3"`},
		{"full,log", 1, helper, "log needs a value"},
		{"full,mode=", 1, helper, "mode needs a value"},
		{"full,allow_other=1", 1, helper, "allow_other takes no value"},
		{"full=1", 1, helper, "full takes no value"},
		{"new", 1, helper, "new needs a value"},
		{"full,uid=-1", 1, command, "--uid"},
		{"full,mode=0600", 1, command, "written"},
		{"defaults", 1, helper, "new=NEW"},
		{"full,cow=" + cow, 1, helper, "new=NEW"},
		{"full,base_id=a", 1, command, "--full"},
		{"cow=" + cow + "x", 32, command, "no such file"},
		{"cow=" + source, 32, command, "no COW device"},
	} {
		r := u.as(root, "mount", "-t", "ddsfs", source, m, "-o", test.options)
		r.program = test.program
		r.fails(test.code, test.says)
		if got := u.mounts(m); len(got) > 0 {
			t.Fatalf("%s: mounted %q", test.options, got)
		}
	}
	called := func(arguments ...string) result {
		r := u.as(root, args("/sbin/mount.ddsfs", arguments)...)
		r.program = helper
		return r
	}
	called().fails(1, "mountpoint")
	called(source).fails(1, "mountpoint")
	called(source, m, "--bogus").fails(1, "--bogus")
	called(source, m, "-o", "full", "-N", m+"/missing").fails(2, "namespace")
	called(source, m, "-fnv", "-o", "full,bogus").fails(1, "bogus")
	for _, command := range [][]string{
		{"/sbin/mount.ddsfs", source, m, "-f", "-n", "-v", "-o", "full", "-t", "fuse.ddsfs"},
		{"mount", "--fake", "-t", "ddsfs", source, m, "-o", "full"},
	} {
		u.as(root, command...).ok()
		if got := u.mounts(m); len(got) > 0 {
			t.Errorf("%q mounted %q", command, got)
		}
	}
	if got := called(source, m, "-v", "-o", "full").ok(); got != fmt.Sprintf("mount.ddsfs: %s mounted on %s\n", source, m) {
		t.Errorf("-v says %q", got)
	}
	u.umount(root, m)
}

func TestFstab(t *testing.T) {
	dir := filepath.Join(fixtures, "plain-4k")
	cow, source := filepath.Join(dir, "cow"), filepath.Join(dir, "new")
	// A name that mount(8) resolves.
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(source, link))
	u := newHost(t)
	auto, noauto := u.mountpoint(), u.mountpoint()
	u.as(root, "sh", "-euc", `printf '%s\n' "$@" > /etc/fstab`, "sh",
		link+" "+auto+" ddsfs defaults,nofail,_netdev,x-systemd.requires=/dev/vg/new,cow="+cow+" 0 0",
		link+" "+noauto+" ddsfs noauto,user,full 0 0").ok()

	// The second time everything is mounted already.
	for range 2 {
		u.as(root, "mount", "-a").ok()
		if got := u.mounts(auto); len(got) != 1 || got[0][1] != source {
			t.Fatalf("mount -a mounted %q", got)
		}
	}
	if got := u.mounts(noauto); len(got) > 0 {
		t.Errorf("mount -a mounted %q", got)
	}
	if r := u.as(root, "mount", auto); r.code == 0 || len(u.mounts(auto)) != 1 {
		t.Errorf("mounted over itself: %d, %s", r.code, r.stderr)
	}
	u.umount(root, auto)
	u.as(root, "mount", auto).ok()
	want := []byte(ddsfs(t, args("extract", pair("plain-4k"))...).ok())
	if got := []byte(u.as(root, "cat", auto+"/delta.cow").ok()); !bytes.Equal(got, want) {
		t.Errorf("%d bytes, which are not the %d of the delta", len(got), len(want))
	}
	u.umount(root, auto)

	u.as(owner, "mount", noauto).ok()
	if got := u.as(owner, "stat", "-c", "%u", noauto+"/delta.cow").ok(); got != fmt.Sprintln(owner) {
		t.Errorf("the user's mount is %s", got)
	}
	u.umount(owner, noauto)
}

// A mount has the type fuse.ddsfs in all lists, and mount(8) takes that type as well.
func TestMountTypeOfTheLists(t *testing.T) {
	u := newHost(t)
	source := filepath.Join(fixtures, "empty", "new")
	m := u.mountpoint()
	u.as(root, "mount", "-t", "fuse.ddsfs", "-o", "full", source, m).ok()
	if got := u.mounts(m); len(got) != 1 || got[0][0] != "fuse.ddsfs" || got[0][1] != source {
		t.Errorf("shown as %q", got)
	}
	u.umount(root, m)
	r := u.as(root, "mount", "-t", "fuse.ddsfs", "-o", "full,bogus", source, m)
	r.program = "mount.ddsfs"
	r.fails(1, `unknown option "bogus"`)
}

func TestRemount(t *testing.T) {
	u := newHost(t)
	source := filepath.Join(fixtures, "empty", "new")
	m, listed := u.mountpoint(), u.mountpoint()
	u.as(root, "sh", "-euc", `echo "$0" > /etc/fstab`, source+" "+listed+" ddsfs noauto,nofail,full 0 0").ok()
	u.as(root, "mount", "-t", "ddsfs", "-o", "full,allow_other", source, m).ok()
	u.as(root, "mount", listed).ok()
	for _, command := range [][]string{
		{"mount", "-o", "remount", m},
		{"mount", "-o", "remount,rw,noatime", m},
		{"mount", "-o", "remount,allow_other", m},
		{"mount", "-o", "remount", listed},
		{"mount", "-t", "ddsfs", "-o", "remount,full", source, m},
	} {
		before := u.mounts(command[len(command)-1])
		u.as(root, command...).ok()
		if after := u.mounts(command[len(command)-1]); !reflect.DeepEqual(after, before) {
			t.Errorf("%q: mounted %q, and before %q", command, after, before)
		}
	}
	for options, says := range map[string]string{"mode=0444": "mode=0444", "bogus": "bogus", "uid=7,noatime": "uid=7"} {
		r := u.as(root, "mount", "-o", "remount,"+options, m)
		r.program = "mount.ddsfs"
		r.fails(1, "remount "+m, says, "unmount it")
	}
	u.umount(root, m)
	u.umount(root, listed)
	r := u.as(root, "/sbin/mount.fuse.ddsfs", source, m, "-o", "remount")
	r.program = "mount.ddsfs"
	r.fails(1, "remount "+m, "no ddsfs")
}

// nofail is for devices that are not there, and for nothing else.
func TestNofail(t *testing.T) {
	u := newHost(t)
	m := u.mountpoint()
	dir := filepath.Join(fixtures, "plain-4k")
	cow, source, missing := filepath.Join(dir, "cow"), filepath.Join(dir, "new"), filepath.Join(dir, "missing")
	u.as(root, "sh", "-euc", `echo "$0" > /etc/fstab`, missing+" "+m+" ddsfs nofail,full 0 0").ok()
	for _, command := range [][]string{
		{"mount", "-a"},
		{"mount", m},
		{"mount", "-t", "ddsfs", missing, m, "-o", "full,nofail"},
		{"mount", "-t", "ddsfs", source, m, "-o", "nofail,cow=" + missing},
		{"mount", "-t", "ddsfs", source, m, "-o", "nofail,new=vg/missing"},
	} {
		u.as(root, command...).ok()
		if got := u.mounts(m); len(got) > 0 {
			t.Fatalf("%q mounted %q", command, got)
		}
	}
	if got := u.as(root, "/sbin/mount.ddsfs", missing, m, "-v", "-o", "full,nofail").ok(); got != fmt.Sprintf("mount.ddsfs: %s %s is not there: not mounted on %s\n", missing, missing, m) {
		t.Errorf("-v says %q", got)
	}
	u.as(root, "mount", "-t", "ddsfs", missing, m, "-o", "full").fails(32, missing, "no such file")
	u.as(root, "mount", "-t", "ddsfs", source, m, "-o", "nofail,cow="+source).fails(32, source)
	r := u.as(root, "mount", "-t", "ddsfs", missing, m, "-o", "nofail,full,bogus")
	r.program = "mount.ddsfs"
	r.fails(1, "bogus")
	u.as(root, "mount", "-t", "ddsfs", source, m, "-o", "nofail,cow="+cow).ok()
	u.umount(root, m)
}

// A kernel without SELinux knows none of its options. mount(8) passes them only if it is
// in use; other callers of the helper may not check that.
func TestMountTypeWithSELinuxOptions(t *testing.T) {
	u := newHost(t)
	m := u.mountpoint()
	source := filepath.Join(fixtures, "empty", "new")
	context := `"system_u:object_r:tmp_t:s0:c127,c456"`
	for _, command := range [][]string{
		{"mount", "-t", "ddsfs", source, m, "-o"},
		{"/sbin/mount.ddsfs", source, m, "-o"},
	} {
		u.as(root, args(command, "context="+context+",fscontext="+context+",defcontext=system_u:object_r:tmp_t:s0,full,rootcontext="+context+",seclabel")...).ok()
		if got := u.mounts(m); len(got) != 1 {
			t.Errorf("%q mounted %q", command, got)
		}
		u.umount(root, m)
	}
}

func TestMountTypeInANamespace(t *testing.T) {
	here, there := newHost(t), newUsers(t, "")
	m := there.mountpoint()
	here.as(root, "mount", "--namespace", there.ns, "-t", "ddsfs", filepath.Join(fixtures, "empty", "new"), m, "-o", "full").ok()
	if got := here.mounts(m); len(got) > 0 {
		t.Errorf("mounted here: %q", got)
	}
	there.umount(root, m)
}
