// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	root  = 0
	owner = 65534
	other = 65533
)

// users is a mount namespace in which /dev/fuse is everybody's, as udev makes it,
// and fuse.conf says what a test needs.
type users struct {
	t   *testing.T
	ns  string // the namespace
	dir string // of the owner
}

func newUsers(t *testing.T, fuseConf string) *users {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(executable), "user-")
	must(t, err)
	device, conf := filepath.Join(dir, "fuse"), filepath.Join(dir, "fuse.conf")
	must(t, unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))))
	must(t, os.WriteFile(conf, []byte(fuseConf), 0o644))
	// Past this process's umask.
	for path, mode := range map[string]os.FileMode{dir: 0o755, device: 0o666, conf: 0o644} {
		must(t, os.Chmod(path, mode))
	}
	must(t, os.Chown(dir, owner, owner))
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-euc",
		`mount --bind "$0" /dev/fuse; mount --bind "$1" /etc/fuse.conf; echo ready; exec cat`, device, conf)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		must(t, cmd.Wait())
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return &users{t, fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid), dir}
}

// as runs a command as a user.
func (u *users) as(uid int, command ...string) result {
	u.t.Helper()
	id := fmt.Sprint(uid)
	return run(u.t, args("nsenter", "--mount="+u.ns, "setpriv", "--reuid", id, "--regid", id, "--clear-groups", command)...)
}

// mountpoint is a new directory of the owner.
func (u *users) mountpoint() string {
	u.t.Helper()
	dir, err := os.MkdirTemp(u.dir, "m-")
	must(u.t, err)
	must(u.t, os.Chown(dir, owner, owner))
	u.t.Cleanup(func() {
		// It may be mounted there or not.
		if err := exec.Command("nsenter", "--mount="+u.ns, "umount", "-l", dir).Run(); err == nil && !u.t.Failed() {
			u.t.Errorf("%s was left mounted", dir)
		}
	})
	return dir
}

func TestMountAsAUser(t *testing.T) {
	u := newUsers(t, "")
	for _, end := range ends {
		t.Run(end.name, func(t *testing.T) {
			u.t = t
			m := u.mountpoint()
			u.as(owner, args(executable, "mount", pair("chunk512"), m)...).ok()
			p := server(t, m)
			delta := []byte(u.as(owner, "cat", m+"/delta.cow").ok())
			checkDelta(t, delta, buildDelta(t, read(t, fixtures, "chunk512", "cow"), read(t, fixtures, "chunk512", "new")))
			if got := u.as(owner, "stat", "-c", "%u %g %a", m, m+"/report").ok(); got != "65534 65534 500\n65534 65534 400\n" {
				t.Errorf("owner, group and mode: %s", got)
			}
			for _, uid := range []int{other, root} {
				if r := u.as(uid, "cat", m+"/delta.cow"); r.code == 0 || r.stdout != "" {
					t.Errorf("user %d reads it", uid)
				}
			}
			if r := u.as(owner, "sh", "-c", `echo x > "$0"/new`, m); r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
				t.Errorf("write: %d, %s", r.code, r.stderr)
			}
			u.as(other, executable, "unmount", m).fails(1, m)
			if p.endsWithin(t, 0) {
				t.Fatal("another user ended it")
			}
			if end.signal != 0 {
				p.signal(t, end.signal)
			} else {
				u.as(owner, end.command(m)...).ok()
			}
			p.ended(t)
			if got := u.as(root, "cat", "/proc/self/mounts").ok(); strings.Contains(got, m) {
				t.Errorf("still mounted: %s", got)
			}
		})
	}
}

func TestWhatAUserMayNot(t *testing.T) {
	u := newUsers(t, "")
	m := u.mountpoint()
	for _, test := range []struct {
		flags []string
		on    string
		says  string
	}{
		{args(pair("empty"), "--allow-other"), m, "user_allow_other"},
		{args(pair("empty"), "--mode", "0000"), m, "mode"},
		{args(pair("empty"), "--uid", "0"), m, "owner"},
		{pair("empty"), fixtures + "/empty", "not empty"},
	} {
		r := u.as(owner, args(executable, "mount", test.flags, test.on)...)
		// fusermount3 has a line of its own.
		if lines := strings.SplitAfter(r.stderr, "\n"); len(lines) > 2 && !strings.HasPrefix(lines[0], "ddsfs: ") {
			r.stderr = strings.Join(lines[1:], "")
		}
		r.fails(1, test.says)
		if got := u.as(root, "cat", "/proc/self/mounts").ok(); strings.Contains(got, m) {
			t.Fatalf("%q left it mounted", test.flags)
		}
	}
}

func TestWhoMayRead(t *testing.T) {
	u := newUsers(t, "user_allow_other\n")
	for _, test := range []struct {
		by    int
		flags []string
		may   []int
		attrs string
	}{
		{root, nil, []int{root}, "0 0 400"},
		{root, []string{"--mode", "0444"}, []int{root}, "0 0 444"},
		{root, []string{"--allow-other"}, []int{root}, "0 0 400"},
		{root, []string{"--allow-other", "--mode", "0444"}, []int{root, owner, other}, "0 0 444"},
		{root, []string{"--allow-other", "--uid", "65533", "--gid", "7"}, []int{root, other}, "65533 7 400"},
		{root, []string{"--allow-other", "--gid", "65534", "--mode=440"}, []int{root, owner}, "0 65534 440"},
		{owner, []string{"--allow-other", "--mode", "0444"}, []int{root, owner, other}, "65534 65534 444"},
	} {
		m := u.mountpoint()
		u.as(test.by, args(executable, "mount", pair("empty"), test.flags, m)...).ok()
		for _, uid := range []int{root, owner, other} {
			want := 1
			for _, may := range test.may {
				if may == uid {
					want = 0
				}
			}
			if r := u.as(uid, "cat", m+"/delta.cow"); r.code != want {
				t.Errorf("%q by %d: cat as %d: exit code %d, %s", test.flags, test.by, uid, r.code, r.stderr)
			}
		}
		if got := u.as(test.may[0], "stat", "-c", "%u %g %a", m+"/delta.cow").ok(); got != test.attrs+"\n" {
			t.Errorf("%q by %d: %s, want %s", test.flags, test.by, got, test.attrs)
		}
		u.as(test.by, executable, "unmount", m).ok()
	}
}
