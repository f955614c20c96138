// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// usable are the fixtures that a delta can be made of.
func usable(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(fixtures)
	must(t, err)
	for _, e := range entries {
		if e.Name() != "overflow" {
			names = append(names, e.Name())
		}
	}
	if len(names) < 6 {
		t.Fatalf("fixtures: %q", names)
	}
	return names
}

// Each fixture by every way to its delta, which must all be the same bytes.
func TestDelta(t *testing.T) {
	for _, name := range usable(t) {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(fixtures, name)
			store, base, volume := read(t, dir, "cow"), read(t, dir, "base"), read(t, dir, "new")
			want := buildDelta(t, store, volume)
			if !bytes.Equal(merge(t, want, base), volume) {
				t.Fatal("the fixture's delta does not lead from its base to its new")
			}
			m := mountOn(t, pair(name)...)
			delta := read(t, m, "delta.cow")
			checkDelta(t, delta, want)
			checkInfo(t, m, want)
			unmount(t, m)

			out := filepath.Join(t.TempDir(), "out")
			if s := ddsfs(t, args("extract", pair(name), "-o", out)...).ok(); s != "" {
				t.Errorf("extract -o: %d bytes on stdout", len(s))
			}
			file, err := os.Create(out + "-stdout")
			must(t, err)
			defer file.Close()
			runWith(t, func(c *exec.Cmd) { c.Stdout = file }, args(executable, "extract", pair(name))...).ok()
			for what, got := range map[string][]byte{
				"to a file":   read(t, out),
				"to stdout":   read(t, out+"-stdout"),
				"to a pipe":   []byte(ddsfs(t, args("extract", pair(name))...).ok()),
				"to a pipe -": []byte(ddsfs(t, args("extract", pair(name), "-o", "-", "-q")...).ok()),
			} {
				if !bytes.Equal(got, delta) {
					t.Errorf("extract %s: %d bytes, which are not the %d of the mount", what, len(got), len(delta))
				}
			}
			if left := names(t, filepath.Dir(out)); len(left) != 2 {
				t.Errorf("extract left %q", left)
			}
		})
	}
}

// checkInfo compares the texts of a mount, and what info says, with a delta
// built without a seal.
func checkInfo(t *testing.T, m string, delta []byte) {
	t.Helper()
	chunkBytes, exceptions := parseStore(t, delta)
	areas := len(exceptions)/(chunkBytes/16) + 1
	if got, want := string(read(t, m, "exceptions")), mapText(t, delta); got != want {
		t.Errorf("exceptions:\n%s\nwant\n%s", got, want)
	}
	size := func(n int) string {
		if n%1024 == 0 {
			return fmt.Sprintf("%d KB", n/1024)
		}
		return fmt.Sprintf("%d B", n)
	}
	header := "magic 0x70416e53\nversion 1\nvalid yes\nchunk_size " + size(chunkBytes) + "\n"
	if got := string(read(t, m, "header")); got != header {
		t.Errorf("header:\n%s\nwant\n%s", got, header)
	}
	report := fmt.Sprintf("Exception chunks %d\nExceptions %d\nOutput size meta %s\nOutput size data %s\nOutput size total %s\n", areas, len(exceptions),
		size((1+areas)*chunkBytes), size(len(exceptions)*chunkBytes), size((1+areas+len(exceptions))*chunkBytes))
	if got := string(read(t, m, "report")); !strings.HasPrefix(got, report) {
		t.Errorf("report:\n%s\nwant first\n%s", got, report)
	}

	cow, _ := cowOf(t, m)
	for _, from := range []string{cow, filepath.Join(m, "delta.cow")} {
		file, err := os.Open(from)
		must(t, err)
		defer file.Close()
		stdin := func(c *exec.Cmd) { c.Stdin = bytes.NewReader(read(t, from)) }
		text := ddsfs(t, "info", from).ok()
		if want := "Snapshot header:\n" + header + "Report:\n" + report; !strings.HasPrefix(text, want) {
			t.Errorf("info %s:\n%s\nwant\n%s", from, text, want)
		}
		if got := runWith(t, stdin, executable, "info", "-").ok(); got != text {
			t.Errorf("info of stdin:\n%s\nwant\n%s", got, text)
		}
		for _, object := range []string{
			ddsfs(t, "info", "--json", from).ok(),
			runWith(t, stdin, executable, "info", "--json", "-").ok(),
		} {
			var got map[string]any
			if err := json.Unmarshal([]byte(object), &got); err != nil || strings.Count(object, "\n") != 1 {
				t.Fatalf("%v: %s", err, object)
			}
			want := map[string]any{
				"valid":            true,
				"chunk_bytes":      float64(chunkBytes),
				"exception_chunks": float64(areas),
				"exceptions":       float64(len(exceptions)),
				"meta_bytes":       float64((1 + areas) * chunkBytes),
				"data_bytes":       float64(len(exceptions) * chunkBytes),
				"total_bytes":      float64((1 + areas + len(exceptions)) * chunkBytes),
			}
			maps.DeleteFunc(got, func(key string, _ any) bool { _, ok := want[key]; return !ok })
			if !maps.Equal(got, want) {
				t.Errorf("info --json %s: %v, want %v", from, got, want)
			}
		}
	}
}

// cowOf finds the devices of a mount on its server's command line.
func cowOf(t *testing.T, m string) (cow, source string) {
	t.Helper()
	line := strings.Split(string(read(t, fmt.Sprintf("/proc/%d/cmdline", server(t, m).pid))), "\x00")
	return line[slices.Index(line, "--cow")+1], line[slices.Index(line, "--source")+1]
}

func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestFull(t *testing.T) {
	volume := filepath.Join(fixtures, "chunk64k-partial", "new")
	want := buildFull(64<<10, read(t, volume))
	for _, form := range [][]string{{"--full", volume}, {"--full", "--source", volume}} {
		m := mountOn(t, form...)
		delta := read(t, m, "delta.cow")
		checkDelta(t, delta, want)
		if got, want := string(read(t, m, "exceptions")), mapText(t, want); got != want {
			t.Errorf("exceptions:\n%s", got)
		}
		unmount(t, m)
		if got := ddsfs(t, args("extract", form)...).ok(); got != string(delta) {
			t.Error("extract is not what was mounted")
		}
	}
}

func TestOverflowIsRefused(t *testing.T) {
	m := mountpoint(t)
	out := filepath.Join(t.TempDir(), "out")
	for _, command := range [][]string{args("mount", pair("overflow"), m), args("extract", pair("overflow"), "-o", out), args("extract", pair("overflow"))} {
		r := ddsfs(t, command...)
		r.fails(1, "overflow", "cow", "valid 0 at byte 4", "--full")
		if r.stdout != "" {
			t.Errorf("%d bytes on stdout", len(r.stdout))
		}
	}
	if mounted(t, m) || len(names(t, filepath.Dir(out))) != 0 {
		t.Error("something is left")
	}
	for _, of := range []string{filepath.Join(fixtures, "overflow", "cow"), "-"} {
		r := runWith(t, func(c *exec.Cmd) {
			c.Stdin = bytes.NewReader(read(t, fixtures, "overflow", "cow"))
		}, executable, "info", of)
		r.fails(4, "valid 0 at byte 4")
		if !strings.Contains(r.stdout, "valid no\nchunk_size 4 KB\n") {
			t.Errorf("info %s: %s", of, r.stdout)
		}
	}
}

// The process in the background has closed all files that it shared with its caller, and
// the COW device, as the snapshot can't be removed while that is open.
func TestBackground(t *testing.T) {
	m := mountpoint(t)
	lock := filepath.Join(t.TempDir(), "lock")
	run(t, args("sh", "-c", `exec 9>"$0" && exec "$@"`, lock, executable, "mount", pair("plain-4k"), m)...).ok()
	p := server(t, m)
	proc := fmt.Sprintf("/proc/%d", p.pid)
	fds, err := os.ReadDir(proc + "/fd")
	must(t, err)
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		must(t, err)
		if slices.Contains([]string{"0", "1", "2"}, fd.Name()) && to != os.DevNull {
			t.Errorf("fd %s is %s", fd.Name(), to)
		}
		if to == lock || strings.HasSuffix(to, "/cow") {
			t.Errorf("it has %s open", to)
		}
	}
	if cwd, err := os.Readlink(proc + "/cwd"); err != nil || cwd != "/" {
		t.Errorf("it stands in %s: %v", cwd, err)
	}
	if comm := string(read(t, proc, "comm")); comm != "ddsfs\n" {
		t.Errorf("ps calls it %q", comm)
	}
	sid, err := unix.Getsid(p.pid)
	if err != nil || sid != p.pid {
		t.Errorf("its session is %d, %v", sid, err)
	}
	unmount(t, m)
}

func TestOddMountpoints(t *testing.T) {
	for _, name := range []string{"with space", "with\nnewline", "comma,colon:", `back\040slash`, "-dash", strings.Repeat("x", 250) + "/" + strings.Repeat("y", 250)} {
		parent := t.TempDir()
		m := filepath.Join(parent, name)
		must(t, os.MkdirAll(m, 0o700))
		t.Cleanup(func() { unmountAll(t, m) })
		here := func(c *exec.Cmd) { c.Dir = parent }
		runWith(t, here, args(executable, "mount", "--full", filepath.Join(fixtures, "empty", "new"), "--", name)...).ok()
		if got := len(names(t, m)); got != 4 {
			t.Errorf("%q has %d files", name, got)
		}
		runWith(t, here, executable, "unmount", "--", name).ok()
		if got := len(names(t, m)); got != 0 {
			t.Errorf("%q has %d files after unmount", name, got)
		}
	}
}

func TestWithoutStandardFiles(t *testing.T) {
	m := mountpoint(t)
	run(t, args("sh", "-c", `exec "$@" <&- >&- 2>&-`, "sh", executable, "mount", pair("plain-4k"), m)...).ok()
	checkDelta(t, read(t, m, "delta.cow"), buildDelta(t, read(t, fixtures, "plain-4k", "cow"), read(t, fixtures, "plain-4k", "new")))
	unmount(t, m)
}

// The process in the background gets the command line however that is spelled.
func TestMountHoweverSpelled(t *testing.T) {
	source := filepath.Join(fixtures, "empty", "new")
	for _, spelled := range [][]string{
		{"--", "mount", "--full", source},
		{"mount", "--full", "--", source},
		{"mount", "--help=false", source, "--foreground=false", "--full"},
		{"mount", "-qf=false", "--full=true", source},
	} {
		m := mountpoint(t)
		ddsfs(t, args(spelled, m)...).ok()
		p := server(t, m)
		unmount(t, m)
		p.ended(t)
	}
}
