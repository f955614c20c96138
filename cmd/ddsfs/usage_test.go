// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHelp(t *testing.T) {
	help := ddsfs(t, "help").ok()
	for _, same := range []string{"--help", "-h"} {
		if got := ddsfs(t, same).ok(); got != help {
			t.Errorf("%s is not help:\n%s", same, got)
		}
	}
	_, list, _ := strings.Cut(help, "Commands:\n")
	commands := regexp.MustCompile(`(?m)^  ([a-z]+)  `).FindAllStringSubmatch(list, -1)
	seen := map[string]bool{}
	for _, c := range commands {
		name := c[1]
		seen[name] = true
		got := ddsfs(t, name, "--help").ok()
		for _, part := range []string{"Usage: ddsfs " + name + " ", "\nFlags:\n", "\nExample:\n  ", "ddsfs " + name, "--help"} {
			if !strings.Contains(got, part) {
				t.Errorf("help of %s has no %q:\n%s", name, part, got)
			}
		}
		for _, same := range [][]string{{"help", name}, {name, "-h"}} {
			if other := ddsfs(t, same...).ok(); other != got {
				t.Errorf("%q is not %s --help", same, name)
			}
		}
		if strings.Contains(got, "--selinux") {
			t.Errorf("help of %s shows what is not for people", name)
		}
	}
	for _, name := range []string{"mount", "unmount", "extract", "apply", "attach", "detach", "browse", "verify", "squash", "status", "info"} {
		if !seen[name] {
			t.Errorf("help does not list %s", name)
		}
	}
	for _, code := range []string{"0  done", "1  failed", "2  wrong usage", "3  refused", "ddsfs mount"} {
		if !strings.Contains(help, code) {
			t.Errorf("help has no %q", code)
		}
	}
}

func TestVersion(t *testing.T) {
	var name unix.Utsname
	must(t, unix.Uname(&name))
	fuse := "yes"
	if _, err := os.Stat("/dev/fuse"); err != nil {
		fuse = "no: .*"
	}
	want := `ddsfs \d+\.\d+\.\d+\S*
commit ([0-9a-f]{40} \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ( and changes to it)?|unknown: .*)
seal 1
kernel ` + regexp.QuoteMeta(unix.ByteSliceToString(name.Release[:])) + `
fuse ` + fuse + `
device-mapper (no: .*|\d+\.\d+\.\d+(, [a-z-]+ \d+\.\d+\.\d+)*)
`
	if got := ddsfs(t, "--version").ok(); !regexp.MustCompile("^" + want + "$").MatchString(got) {
		t.Errorf("--version says\n%swant\n%s", got, want)
	}
}

func TestWrongUsage(t *testing.T) {
	volume := filepath.Join(fixtures, "empty", "new")
	for _, test := range []struct {
		args []string
		says string
	}{
		{nil, "ddsfs --help"},
		{[]string{"umount"}, `unknown command "umount": did you mean mount or unmount? (see ddsfs --help)`},
		{[]string{"aply", "--kernel", "-n", "a", "b"}, `unknown command "aply": did you mean apply?`},
		{[]string{"nothing"}, `unknown command "nothing" (see`},
		{[]string{"help", "nothing"}, `unknown command "nothing"`},
		{[]string{"-nq", "apply", "a", "b"}, "in -nq (see ddsfs --help)"},
		{[]string{"--json", "status"}, "--json (see ddsfs --help)"},
		{[]string{"umount", "--lazy", "m"}, `unknown command "umount"`},
		{[]string{"--", "nothing"}, `unknown command "nothing"`},
		{[]string{"documentation", "d"}, `unknown command "documentation"`},
		{[]string{"completion", "bash"}, `unknown command "completion"`},
		{[]string{"--bogus"}, "--bogus"},
		{[]string{"mount"}, "BASE and NEW, or --cow and --source, or"},
		{[]string{"mount", "a"}, "BASE and NEW"},
		{[]string{"mount", "a", "b"}, "mountpoint"},
		{[]string{"extract", "a", "b", "c"}, `"c"`},
		{[]string{"mount", "--bogus"}, "ddsfs mount --help"},
		{[]string{"mount", "--cow"}, "--cow"},
		{[]string{"mount", "--cow", "x", "m"}, "--source"},
		{[]string{"mount", "--full"}, "needs"},
		{[]string{"mount", "--full", volume}, "mountpoint"},
		{[]string{"mount", "--full", volume, "a", "b"}, "mountpoint"},
		{[]string{"mount", "--full", "--cow", "x", volume, "m"}, "--full"},
		{[]string{"mount", "--full", volume, "--mode", "0600", "m"}, "written"},
		{[]string{"mount", "--full", volume, "--mode", "1444", "m"}, "0777"},
		{[]string{"mount", "--full", volume, "--mode", "r--", "m"}, "octal"},
		{[]string{"mount", "--full", volume, "--uid", "root", "m"}, "--uid"},
		{[]string{"unmount"}, "mountpoint"},
		{[]string{"unmount", "a", "b"}, "mountpoint"},
		{[]string{"extract"}, "--cow"},
		{[]string{"extract", "--full", volume, "b"}, `"b"`},
		{[]string{"info"}, "a snapshot, or files"},
		{[]string{"apply", "a"}, "target"},
		{[]string{"apply", "--stream", "a", "b"}, "--stream"},
		{[]string{"apply", "--stream", "--keep", "d", "-", "b"}, "--keep"},
		{[]string{"apply", "--keep-last", "3", "a", "b"}, "--keep-last goes with --keep"},
		{[]string{"apply", "--keep", "d", "--keep-last", "0", "a", "b"}, "from 1 to 2048"},
		{[]string{"apply", "--keep", "d", "--keep-last", "2049", "a", "b"}, "from 1 to 2048"},
		{[]string{"apply", "--kernel", "--resume", "--keep", "d", "b"}, "nothing else"},
		{[]string{"apply", "--resume", "b"}, "--kernel"},
		{[]string{"apply", "--consume", "a", "b"}, "--kernel"},
		{[]string{"apply", "--name", "n", "a", "b"}, "--kernel"},
		{[]string{"apply", "--kernel", "a"}, "target"},
		{[]string{"apply", "--kernel", "--resume"}, "target"},
		{[]string{"apply", "--kernel", "--resume", "a", "b"}, "nothing else"},
		{[]string{"apply", "--kernel", "--resume", "--undo", "u", "b"}, "nothing else"},
		{[]string{"apply", "--kernel", "--resume", "--dry-run", "b"}, "nothing else"},
		{[]string{"apply", "--kernel", "--stream", "-", "b"}, "--stream"},
		{[]string{"apply", "--kernel", "--consume", "-", "b"}, "--consume"},
		{[]string{"apply", "--kernel", "--name", "a/b", "a", "b"}, "a/b"},
		{[]string{"apply", "--kernel", "a", "target name"}, "--name"},
		{[]string{"squash", "a"}, "two deltas or more"},
		{[]string{"squash", "-o", "c", "a"}, "two deltas or more"},
		{[]string{"attach", "a", "b"}, "name"},
		{[]string{"attach", "-", "b", "c"}, "stdin"},
		{[]string{"attach", "a", "b", "c/d"}, "c/d"},
		{[]string{"attach", "a", "b", "control"}, "control"},
		{[]string{"detach"}, "name"},
		{[]string{"browse", "a"}, "mountpoint"},
		{[]string{"browse", "--mode", "0600", "a", "b", "c"}, "written"},
	} {
		r := ddsfs(t, test.args...)
		r.fails(2, test.says)
		if r.stdout != "" {
			t.Errorf("%q: %q on stdout", test.args, r.stdout)
		}
	}
}

// Failures are one line with what and where, and come soon: a pipe in the place
// of a device must not be waited for.
func TestFailures(t *testing.T) {
	dir := t.TempDir()
	path := func(name string, content []byte) string {
		must(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
		return filepath.Join(dir, name)
	}
	cow, volume := filepath.Join(fixtures, "plain-4k", "cow"), filepath.Join(fixtures, "plain-4k", "new")
	store := read(t, cow)
	pipe := filepath.Join(dir, "pipe")
	must(t, unix.Mkfifo(pipe, 0o600))
	t.Cleanup(func() {
		// A command that waits for a writer of the pipe would outlive the test.
		if fd, err := unix.Open(pipe, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			unix.Close(fd)
		}
	})
	missing := filepath.Join(dir, "missing")
	zeros, empty, short := path("zeros", make([]byte, 1<<20)), path("empty", nil), path("short", store[:len(store)/4])
	small := path("small", make([]byte, 4096))
	for _, test := range []struct {
		name, cow, source string
		says              []string
	}{
		{"COW missing", missing, volume, []string{missing, "no such file"}},
		{"source missing", cow, missing, []string{missing, "no such file"}},
		{"COW a directory", dir, volume, []string{dir, "neither"}},
		{"source a directory", cow, dir, []string{dir, "neither"}},
		{"COW a pipe", pipe, volume, []string{pipe, "neither"}},
		{"source a pipe", cow, pipe, []string{pipe, "neither"}},
		{"COW a character device", "/dev/zero", volume, []string{"/dev/zero", "neither"}},
		{"source a character device", cow, "/dev/zero", []string{"/dev/zero", "neither"}},
		{"COW of zeros", zeros, volume, []string{zeros, "magic"}},
		{"COW empty", empty, volume, []string{empty, "it is empty"}},
		{"COW cut off", short, volume, []string{short, "copy it again"}},
		{"COW no store", volume, volume, []string{volume, "no COW device"}},
		{"source empty", cow, empty, []string{empty, "empty"}},
		{"source too small", cow, small, []string{"old_chunk", " at byte "}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := mountpoint(t)
			ddsfs(t, "mount", "--cow", test.cow, "--source", test.source, m).fails(1, test.says...)
			if mounted(t, m) {
				t.Error("mounted")
			}
			out := filepath.Join(m, "out")
			ddsfs(t, "extract", "--cow", test.cow, "--source", test.source, "-o", out).fails(1, test.says...)
			if left := names(t, m); len(left) > 0 {
				t.Errorf("left %q", left)
			}
			if test.source == volume && test.cow != dir { // of a directory, info lists the deltas
				code := 1
				if strings.HasPrefix(test.cow, dir+"/") && test.cow != missing && test.cow != pipe || test.cow == volume {
					code = 4 // it can be read, and is no store
				}
				r := ddsfs(t, "info", test.cow)
				r.fails(code, test.says...)
				if r.stdout != "" {
					t.Errorf("info: %q", r.stdout)
				}
			}
		})
	}
	m := mountpoint(t)
	ddsfs(t, "mount", "--full", volume, "--log", filepath.Join(missing, "log"), m).fails(1, missing)
	ddsfs(t, "mount", "--full", volume, missing).fails(1, missing, "create it first")
	ddsfs(t, "mount", "--full", volume, small).fails(1, small, "not a directory")
	ddsfs(t, "mount", "--full", volume, pipe).fails(1, pipe, "not a directory")
	ddsfs(t, "mount", "--full", volume, dir).fails(1, dir, "not empty")
	ddsfs(t, "unmount", m).fails(1, m, "no ddsfs file system")
	ddsfs(t, "unmount", missing).fails(1, missing, "no ddsfs file system")
}
