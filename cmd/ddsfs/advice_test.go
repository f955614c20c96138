// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Failures that the user can do something about say what that is.

// limited runs ddsfs with so many open files at most.
func limited(t *testing.T, limit string, arguments ...string) result {
	t.Helper()
	return run(t, args("sh", "-c", "ulimit "+limit+` && exec "$@"`, "sh", executable, arguments)...)
}

func TestTooFewOpenFiles(t *testing.T) {
	m := mountpoint(t)
	for _, limit := range []string{"-n 8", "-n 31"} {
		for _, command := range [][]string{args("mount", pair("plain-4k"), m), args("extract", pair("plain-4k")), {"--help"}} {
			r := limited(t, limit, command...)
			r.fails(1, "open", "ulimit -n 32")
			if r.stdout != "" {
				t.Errorf("%q: %d bytes on stdout", command, len(r.stdout))
			}
		}
	}
	if mounted(t, m) {
		t.Error("mounted")
	}
	// The hard limit counts.
	dir := t.TempDir()
	target, delta := filepath.Join(dir, "target"), filepath.Join(dir, "delta")
	must(t, os.WriteFile(target, read(t, fixtures, "plain-4k", "base"), 0o600))
	for _, limit := range []string{"-n 32", "-Sn 8"} {
		limited(t, limit, args("mount", pair("plain-4k"), m)...).ok()
		must(t, os.WriteFile(delta, read(t, m, "delta.cow"), 0o600))
		limited(t, limit, "unmount", m).ok()
		limited(t, limit, "apply", "--quiet", "--zero=write", "--undo", filepath.Join(dir, "undo"+limit), "--assume-base", "--state-dir", filepath.Join(dir, "state"+limit), delta, target)
		if got, want := read(t, target), read(t, fixtures, "plain-4k", "new"); !bytes.Equal(got, want) {
			t.Errorf("ulimit %s: not merged", limit)
		}
		must(t, os.WriteFile(target, read(t, fixtures, "plain-4k", "base"), 0o600))
	}
}

// In a container root may not mount.
func TestWithoutTheCapabilityToMount(t *testing.T) {
	m := mountpoint(t)
	without := func(arguments ...string) result {
		t.Helper()
		return run(t, args("setpriv", "--bounding-set", "-sys_admin", executable, arguments)...)
	}
	without(args("mount", pair("plain-4k"), m)...).fails(1, m, "CAP_SYS_ADMIN", "ddsfs extract")
	if mounted(t, m) {
		t.Error("mounted")
	}
	if got, want := without(args("extract", pair("plain-4k"))...).ok(), ddsfs(t, args("extract", pair("plain-4k"))...).ok(); got != want {
		t.Error("extract writes something else")
	}
}

func TestMountOverAMount(t *testing.T) {
	source := filepath.Join(fixtures, "empty", "new")
	m := mountOn(t, "--full", source)
	ddsfs(t, "mount", "--full", source, m).fails(1, m, "ddsfs of "+source+" is mounted there already", "ddsfs unmount")
	unmount(t, m)
	if mounted(t, m) {
		t.Error("still mounted: there were two")
	}
}

// nothingIn expects that a directory was not made.
func nothingIn(t *testing.T, dir string) {
	t.Helper()
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("%s: %v", dir, err)
	}
}

func TestReadOnlyTarget(t *testing.T) {
	dir := t.TempDir()
	file, delta, state := filepath.Join(dir, "file"), filepath.Join(dir, "delta"), filepath.Join(dir, "state")
	must(t, os.WriteFile(file, read(t, fixtures, "plain-4k", "base"), 0o600))
	ddsfs(t, "extract", "--full", filepath.Join(fixtures, "plain-4k", "new"), "-o", delta).ok()
	for _, how := range []string{"losetup", "blockdev"} {
		attach := args("losetup", "--find", "--show")
		if how == "losetup" {
			attach = append(attach, "--read-only")
		}
		device := strings.TrimSpace(run(t, append(attach, file)...).ok())
		after := func(command ...string) {
			t.Cleanup(func() {
				if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
					t.Errorf("%q: %v\n%s", command, err, out)
				}
			})
		}
		after("losetup", "--detach", device)
		if how == "blockdev" {
			// It would stay so when another file is attached to it.
			after("blockdev", "--setrw", device)
			run(t, "blockdev", "--setro", device).ok()
		}
		says := []string{device, "refused", "read-only", "blockdev --setrw"}
		for _, flags := range [][]string{nil, {"--dry-run"}, {"--undo", filepath.Join(dir, "undo")}} {
			ddsfs(t, args("apply", "--state-dir", state, flags, delta, device)...).fails(3, says...)
		}
		for _, flags := range [][]string{{"--spool", filepath.Join(dir, "no spool")}, {"--stream"}} {
			r := runWith(t, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(read(t, delta)) }, args(executable, "apply", "--state-dir", state, flags, "-", device)...)
			r.fails(3, says...)
		}
		nothingIn(t, state)
		nothingIn(t, filepath.Join(dir, "undo"))
	}
}

func TestAbsentTarget(t *testing.T) {
	dir := t.TempDir()
	target, delta, state := filepath.Join(dir, "target"), filepath.Join(dir, "delta"), filepath.Join(dir, "state")
	volume := read(t, fixtures, "plain-4k", "new")
	ddsfs(t, "extract", "--full", filepath.Join(fixtures, "plain-4k", "new"), "-o", delta).ok()
	advice := fmt.Sprintf("truncate -s %d %s", len(volume), target)
	ddsfs(t, "apply", "--state-dir", state, delta, target).fails(1, target, "no such file", advice)
	runWith(t, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(read(t, delta)) }, executable, "apply", "--state-dir", state, "-", target).
		fails(1, target, "truncate -s SIZE "+target)
	unsealed := filepath.Join(dir, "unsealed")
	ddsfs(t, "extract", "--full", "--unsealed", filepath.Join(fixtures, "plain-4k", "new"), "-o", unsealed).ok()
	ddsfs(t, "apply", "--state-dir", state, unsealed, target).fails(1, target, "truncate -s SIZE "+target)
	r := ddsfs(t, "apply", "--state-dir", state, delta, "/dev/no/such")
	r.fails(1, "/dev/no/such", "lvchange -ay")
	if strings.Contains(r.stderr, "truncate") {
		t.Errorf("a file in /dev: %s", r.stderr)
	}
	nothingIn(t, state)

	// The message says what to do, and that works.
	run(t, "sh", "-c", advice).ok()
	ddsfs(t, "apply", "--quiet", "--state-dir", state, delta, target).ok()
	if !bytes.Equal(read(t, target), volume) {
		t.Error("the target is not the volume")
	}
}

// A chroot that has nothing but what is needed, and no /proc or an empty one.
func TestWithoutProc(t *testing.T) {
	for _, empty := range []bool{false, true} {
		dir := t.TempDir()
		for name, content := range map[string][]byte{"ddsfs": read(t, executable), "volume": read(t, fixtures, "plain-4k", "new"), "target": read(t, fixtures, "plain-4k", "base")} {
			must(t, os.WriteFile(filepath.Join(dir, name), content, 0o755))
		}
		for _, d := range []string{"m", "dev", "tmp"} {
			must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
		}
		if empty {
			must(t, os.Mkdir(filepath.Join(dir, "proc"), 0o755))
		}
		there := func(arguments ...string) result {
			t.Helper()
			return run(t, args("chroot", dir, "/ddsfs", arguments)...)
		}
		const help = "mount -t proc proc /proc"
		// Commands that need no /proc work.
		there("extract", "--full", "/volume", "-o", "/delta").ok()
		if got, want := read(t, dir, "delta"), ddsfs(t, "extract", "--full", filepath.Join(fixtures, "plain-4k", "new")).ok(); string(got) != want {
			t.Error("extract writes something else")
		}
		there("info", "/delta").ok()
		there("mount", "--full", "/volume", "/m").fails(1, help)
		there("unmount", "/m").fails(1, "/m", help)
		there("verify", "/delta", "/target").fails(1, help)
		there("apply", "--state-dir", "/state", "--undo", "/undo", "/delta", "/target").fails(1, "/target", help)
		runWith(t, func(c *exec.Cmd) { c.Stdin = bytes.NewReader(read(t, dir, "delta")) }, "chroot", dir, "/ddsfs", "apply", "--state-dir", "/state", "--spool", "/no spool", "-", "/target").
			fails(1, "/target", help)
		nothingIn(t, filepath.Join(dir, "state"))
		nothingIn(t, filepath.Join(dir, "undo"))
		parts, err := fs.Glob(os.DirFS(dir), ".*part*")
		if must(t, err); len(parts) > 0 {
			t.Errorf("extract left %q", parts)
		}
	}
}
