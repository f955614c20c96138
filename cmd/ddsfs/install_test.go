// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// runMake runs make as somebody would at the top of the repository, with files of
// its own. The first build on a machine takes its time.
func runMake(t *testing.T, arguments ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "make", args("-C", "../..", arguments)...)
	// Not with the flags of a make that runs this test.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS=") })
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make %q: %v\n%s", arguments, err, out)
	}
}

// tree lists what is below a directory and is no directory.
func tree(t *testing.T, dir string) (all []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, strings.TrimPrefix(path, dir))
		}
		return err
	}))
	return all
}

// manualPages are the names of all pages of section 8.
func manualPages(t *testing.T) []string {
	t.Helper()
	names := []string{"dds", "ddsfs", "ddsfs-replicate", "mount.ddsfs"}
	for _, command := range commandNames(t) {
		names = append(names, "ddsfs-"+command)
	}
	slices.Sort(names)
	return names
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	to := filepath.Join(dir, "root")
	variables := []string{"BIN=" + filepath.Join(dir, "bin"), "DESTDIR=" + to, "PREFIX=/opt"}
	runMake(t, args("install", variables)...)
	want := []string{
		"/sbin/mount.ddsfs", "/sbin/mount.fuse.ddsfs", "/opt/sbin/dds", "/opt/sbin/ddsfs", "/opt/sbin/ddsfs-replicate",
		"/opt/share/bash-completion/completions/ddsfs",
		"/opt/share/fish/vendor_completions.d/ddsfs.fish",
		"/opt/share/man/man5/ddsfs-delta.5.gz", "/opt/share/man/man7/ddsfs-safety.7.gz",
		"/opt/share/zsh/site-functions/_ddsfs",
		"/opt/lib/systemd/system/ddsfs-replicate@.service",
		"/opt/lib/systemd/system/ddsfs-replicate@.timer",
	}
	for _, page := range manualPages(t) {
		want = append(want, "/opt/share/man/man8/"+page+".8.gz")
	}
	want = append(want, "/opt/share/man/man8/mount.fuse.ddsfs.8.gz")
	slices.Sort(want)
	if got := tree(t, to); !slices.Equal(got, want) {
		t.Errorf("installed %q, want %q", got, want)
	}
	for link, want := range map[string]string{"/opt/sbin/dds": "ddsfs", "/sbin/mount.ddsfs": "/opt/sbin/ddsfs", "/sbin/mount.fuse.ddsfs": "/opt/sbin/ddsfs", "/opt/share/man/man8/mount.fuse.ddsfs.8.gz": "mount.ddsfs.8.gz"} {
		if got, err := os.Readlink(to + link); err != nil || got != want {
			t.Errorf("%s is a link to %s, %v", link, got, err)
		}
	}
	if got := string(read(t, to, "opt/lib/systemd/system/ddsfs-replicate@.service")); !strings.Contains(got, "\nExecStart=/opt/sbin/ddsfs-replicate %i\n") {
		t.Errorf("the service does not start what was installed:\n%s", got)
	}
	first, _, _ := strings.Cut(ddsfs(t, "--version").ok(), "\n")
	if got, want := run(t, to+"/opt/sbin/ddsfs", "--version").ok(), first+"\ncommit "; !strings.HasPrefix(got, want) {
		t.Errorf("installed %s, want %s", got, want)
	}

	// The configuration survives another installation, and the removal.
	conf := filepath.Join(to, "etc/ddsfs/data.conf")
	must(t, os.WriteFile(conf, nil, 0o600))
	runMake(t, args("install", variables)...)
	runMake(t, args("uninstall", variables)...)
	if got := tree(t, to); !slices.Equal(got, []string{"/etc/ddsfs/data.conf"}) {
		t.Errorf("uninstall left %q", got)
	}
	runMake(t, args("uninstall", variables)...)
}

// shownPage is what man shows of a page, which both of the programs that show pages
// must understand.
func shownPage(t *testing.T, page string) string {
	t.Helper()
	if r := run(t, "mandoc", "-T", "lint", "-W", "warning", page); r.code != 0 || r.stdout != "" {
		t.Errorf("mandoc on %s: %s%s", page, r.stdout, r.stderr)
	}
	shown := runWith(t, func(c *exec.Cmd) {
		c.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANWIDTH=80", "MANROFFSEQ=", "PAGER=cat")
	}, "man", "--warnings", "--no-hyphenation", "--no-justification", "--local-file", page).ok()
	name := strings.TrimSuffix(filepath.Base(page), ".gz")
	name = strings.TrimSuffix(name, filepath.Ext(name))
	for _, part := range []string{"\nNAME\n       " + name + " - ", "\nDESCRIPTION\n", "\nSEE ALSO\n", "2023-11-14"} {
		if !strings.Contains(shown, part) {
			t.Errorf("%s has no %q:\n%s", page, part, shown)
		}
	}
	// Markup that was not understood.
	for _, mark := range []string{"**", "\\", "`", "<no value>"} {
		if strings.Contains(shown, mark) {
			t.Errorf("%s has %q:\n%s", page, mark, shown)
		}
	}
	return shown
}

// Each page is shown, and has what the command's help says.
func TestManualPages(t *testing.T) {
	bin := t.TempDir()
	runMake(t, "documentation", "BIN="+bin, "SOURCE_DATE_EPOCH=1700000000")
	for _, page := range []string{"ddsfs-delta.5.gz", "ddsfs-safety.7.gz"} {
		if shown := shownPage(t, filepath.Join(bin, "doc", page)); strings.Contains(shown, "{") {
			t.Errorf("%s has a place that was not filled:\n%s", page, shown)
		}
	}
	pages := manualPages(t)
	for _, name := range pages {
		shown := shownPage(t, filepath.Join(bin, "doc", name+".8.gz"))
		if !strings.Contains(shown, "\nSYNOPSIS\n") {
			t.Errorf("%s has no synopsis:\n%s", name, shown)
		}
		for _, other := range pages {
			if other != name && !strings.Contains(shown, other+"(8)") {
				t.Errorf("%s does not see %s", name, other)
			}
		}
		command, ok := strings.CutPrefix(name, "ddsfs-")
		if !ok || command == "replicate" {
			continue
		}
		for _, flag := range flagNames(t, command) {
			if !strings.Contains(shown, "\n       "+flag) && !strings.Contains(shown, ", "+flag) {
				t.Errorf("%s does not list %s:\n%s", name, flag, shown)
			}
		}
		words := strings.Join(strings.Fields(shown), " ")
		_, help, _ := strings.Cut(ddsfs(t, command, "--help").ok(), "\n\n")
		help, _, _ = strings.Cut(help, "\n\nFlags:\n")
		for paragraph := range strings.SplitSeq(help, "\n\n") {
			if strings.HasPrefix(paragraph, "  ") {
				continue // a table, whose columns it sets otherwise
			}
			if want := strings.Join(strings.Fields(paragraph), " "); !strings.Contains(words, want) {
				t.Errorf("%s does not say %q:\n%s", name, want, shown)
			}
		}
	}
	page := run(t, "mandoc", filepath.Join(bin, "doc", "mount.ddsfs.8.gz")).ok()
	for _, option := range []string{"new=", "cow=", "full", "base_check", "mode=", "allow_other"} {
		// As on a line printer: bold is struck twice.
		var bold strings.Builder
		for _, r := range option {
			fmt.Fprintf(&bold, "%c\b%c", r, r)
		}
		if !strings.Contains(page, "\n       "+bold.String()) {
			t.Errorf("mount.ddsfs does not list %s:\n%s", option, page)
		}
	}
}

func TestDocumentationHasNoClock(t *testing.T) {
	writeDocumentation(t, t.TempDir(), "").fails(1, "SOURCE_DATE_EPOCH")
}

// A package is installed, checked, removed and purged, in a directory in place of
// the machine.
func TestPackage(t *testing.T) {
	dir := t.TempDir()
	build := func(name string) string {
		t.Helper()
		bin := filepath.Join(dir, name)
		runMake(t, "deb", "BIN="+bin, "SOURCE_DATE_EPOCH=1700000000", "MAINTAINER=Test <test@example.org>")
		found, err := filepath.Glob(filepath.Join(bin, "*.deb"))
		if err != nil || len(found) != 1 {
			t.Fatalf("built %q, %v", found, err)
		}
		return found[0]
	}
	deb := build("bin")
	if !bytes.Equal(read(t, deb), read(t, build("again"))) {
		t.Error("another build has other bytes")
	}
	version, _, _ := strings.Cut(strings.TrimPrefix(ddsfs(t, "--version").ok(), "ddsfs "), "\n")
	arch := strings.TrimSpace(run(t, "dpkg", "--print-architecture").ok())
	if got, want := run(t, "dpkg-deb", "-f", deb, "Package", "Version", "Architecture", "Depends", "Section").ok(),
		fmt.Sprintf("Package: ddsfs\nVersion: %s\nArchitecture: %s\nSection: admin\n", version, arch); got != want {
		t.Errorf("control:\n%swant\n%s", got, want)
	}

	to := filepath.Join(dir, "root")
	state := filepath.Join(to, "var/lib/ddsfs/record")
	for _, d := range []string{"var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/ddsfs", "etc/systemd/system/timers.target.wants"} {
		must(t, os.MkdirAll(filepath.Join(to, d), 0o755))
	}
	for _, file := range []string{state, filepath.Join(to, "var/lib/dpkg/status")} {
		must(t, os.WriteFile(file, nil, 0o600))
	}
	dpkg := func(arguments ...string) string {
		t.Helper()
		r := run(t, args("dpkg", "--root="+to, "--log="+filepath.Join(dir, "log"), "--force-script-chrootless", arguments)...)
		// It knows of no package that has /etc as well.
		r.stderr = strings.ReplaceAll(r.stderr, "dpkg: warning: while removing ddsfs, directory '/etc' not empty so not removed\n", "")
		return r.ok()
	}
	installed := func() (found []string) {
		return slices.DeleteFunc(tree(t, to), func(path string) bool { return strings.HasPrefix(path, "/var/lib/dpkg/") })
	}
	before := installed()
	dpkg("--install", deb)
	if got := dpkg("--verify", "ddsfs"); got != "" {
		t.Errorf("dpkg misses %s", got)
	}
	for _, path := range []string{"ddsfs", "dds", "mount.ddsfs", "mount.fuse.ddsfs"} {
		// The helpers say how they are called, but they are there and run.
		if r := run(t, filepath.Join(to, "usr/sbin", path), "--version"); !strings.Contains(r.stdout+r.stderr, "ddsfs") {
			t.Errorf("%s: %q, %q", path, r.stdout, r.stderr)
		}
	}
	for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb).ok()) {
		if fields := strings.Fields(line); fields[1] != "root/root" || fields[3] != "2023-11-14" && fields[3] != "2023-11-15" {
			t.Errorf("in the package: %s", line)
		}
	}
	wants := filepath.Join(to, "etc/systemd/system/timers.target.wants/ddsfs-replicate@data.timer")
	must(t, os.Symlink("/usr/lib/systemd/system/ddsfs-replicate@.timer", wants))
	dpkg("--install", deb) // an upgrade
	dpkg("--remove", "ddsfs")
	if got, want := installed(), append([]string{strings.TrimPrefix(wants, to)}, before...); !slices.Equal(got, want) {
		t.Errorf("removed, it leaves %q, want %q", got, want)
	}
	dpkg("--purge", "ddsfs")
	if got := installed(); !slices.Equal(got, before) {
		t.Errorf("purged, it leaves %q, want %q", got, before)
	}
	read(t, state)
}

// Each library in the binary is named with its license.
func TestCopyright(t *testing.T) {
	info, err := buildinfo.ReadFile(executable)
	must(t, err)
	text := string(read(t, "debian/copyright"))
	if len(info.Deps) == 0 {
		t.Error("the binary tells of no modules")
	}
	for _, module := range info.Deps {
		if !strings.Contains(strings.ReplaceAll(text, "\n", " "), " "+module.Path+" ") {
			t.Errorf("nothing on %s", module.Path)
		}
	}
}
