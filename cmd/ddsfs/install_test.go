package main_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// makeIn runs make in the repository's root, with everything that it builds
// elsewhere.
func makeIn(t *testing.T, bin string, arguments ...string) {
	t.Helper()
	cmd := exec.Command("make", append([]string{"-C", "../..", "BIN=" + bin}, arguments...)...)
	// Not what the make that runs this test was told.
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=", "MAINTAINER=Somebody <somebody@example.org>")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make %q: %v\n%s", arguments, err, out)
	}
}

// filesBelow are the files and links below a directory, but not the directories.
func filesBelow(t *testing.T, dir string) (files []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			name, _ := filepath.Rel(dir, path) // below dir it always has one
			files = append(files, name)
		}
		return err
	}))
	return files
}

var installed = []string{
	"share/bash-completion/completions/ddsfs", "share/fish/vendor_completions.d/ddsfs.fish",
	"lib/systemd/system/ddsfs-replicate@.service", "lib/systemd/system/ddsfs-replicate@.timer",
	"sbin/ddsfs", "sbin/dds", "sbin/ddsfs-replicate",
	"share/man/man8/ddsfs.8.gz", "share/man/man8/ddsfs-apply.8.gz", "share/man/man8/dds.8.gz",
	"share/man/man8/mount.ddsfs.8.gz", "share/man/man8/ddsfs-replicate.8.gz",
}

func TestInstall(t *testing.T) {
	bin, dest := t.TempDir(), t.TempDir()
	makeIn(t, bin, "install", "DESTDIR="+dest, "PREFIX=/opt/ddsfs")
	got := filesBelow(t, dest)
	for _, name := range installed {
		if !slices.Contains(got, "opt/ddsfs/"+name) {
			t.Errorf("%s is not installed", name)
		}
	}
	if to, err := os.Readlink(filepath.Join(dest, "sbin/mount.ddsfs")); to != "/opt/ddsfs/sbin/ddsfs" {
		t.Errorf("mount.ddsfs is a link to %q, %v", to, err)
	}
	if unit := string(read(t, dest, "opt/ddsfs/lib/systemd/system/ddsfs-replicate@.service")); !strings.Contains(unit, "ExecStart=/opt/ddsfs/sbin/ddsfs-replicate %i\n") {
		t.Errorf("the unit starts something else:\n%s", unit)
	}
	if got := run(t, filepath.Join(dest, "opt/ddsfs/sbin/dds"), "--version").ok(); !strings.HasPrefix(got, "dds (ddsfs ") {
		t.Errorf("dds --version: %q", got)
	}
	pages, err := filepath.Glob(filepath.Join(dest, "opt/ddsfs/share/man/man8/*"))
	must(t, err)
	for _, page := range pages {
		if r := run(t, "mandoc", "-T", "lint", "-W", "error", page); r.code != 0 {
			t.Errorf("%s:\n%s", page, r.stdout)
		}
	}
	makeIn(t, bin, "uninstall", "DESTDIR="+dest, "PREFIX=/opt/ddsfs")
	if left := filesBelow(t, dest); len(left) > 0 {
		t.Errorf("uninstall left %q", left)
	}
}

// The package is installed below a directory of its own, as dpkg can.
func TestPackage(t *testing.T) {
	bin, root := t.TempDir(), t.TempDir()
	makeIn(t, bin, "deb")
	debs, err := filepath.Glob(filepath.Join(bin, "*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("packages: %q, %v", debs, err)
	}
	admin := filepath.Join(root, "var/lib/dpkg")
	for _, dir := range []string{"info", "updates", "triggers"} {
		must(t, os.MkdirAll(filepath.Join(admin, dir), 0o755))
	}
	for _, name := range []string{"status", "available"} {
		must(t, os.WriteFile(filepath.Join(admin, name), nil, 0o644))
	}
	dpkg := func(arguments ...string) {
		t.Helper()
		run(t, append([]string{"dpkg", "--root=" + root, "--force-script-chrootless", "--log=/dev/null"}, arguments...)...).ok()
	}
	dpkg("-i", debs[0])
	got := filesBelow(t, root)
	for _, name := range append(installed, "sbin/mount.ddsfs", "share/doc/ddsfs/copyright") {
		if !slices.Contains(got, "usr/"+name) {
			t.Errorf("%s is not installed", name)
		}
	}
	if got := run(t, filepath.Join(root, "usr/sbin/ddsfs"), "--version").ok(); !strings.HasPrefix(got, "ddsfs ") {
		t.Errorf("--version: %q", got)
	}
	// What targets hold outlives the package.
	record := filepath.Join(root, "var/lib/ddsfs/record.json")
	must(t, os.MkdirAll(filepath.Dir(record), 0o700))
	must(t, os.WriteFile(record, nil, 0o600))
	dpkg("--purge", "ddsfs")
	for _, name := range filesBelow(t, root) {
		if !strings.HasPrefix(name, "var/lib/dpkg/") && name != "var/lib/ddsfs/record.json" {
			t.Errorf("purge left %s", name)
		}
	}
	if _, err := os.Stat(record); err != nil {
		t.Error(err)
	}
}
