// SPDX-License-Identifier: GPL-2.0-or-later

package lab

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// wanted are the Debian packages that the guests are made of. QEMU's kernel is
// named by its meta package, so that it is whatever version Debian has now.
func wanted() []string {
	return []string{
		"user-mode-linux", "linux-image-cloud-amd64",
		"busybox-static", "coreutils", "dash", "dmsetup", "e2fsprogs", "fdisk", "lvm2", "mount", "thin-provisioning-tools", "udev", "util-linux",
	}
}

// packages returns the directory below which the wanted packages and the
// libraries they depend on are unpacked. The first call on a machine fetches
// them; they are never installed. Remove ddsfs-lab from the user's cache
// directory to get newer ones.
func packages() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place to keep the guest's packages: %w", err)
	}
	// Another list of packages is another directory: an old cache is never
	// taken for a whole one.
	name := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(wanted(), " "))))[:12]
	dir := filepath.Join(cache, "ddsfs-lab", name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("no place to keep the guest's packages: %w", err)
	}
	temp, err := os.MkdirTemp(filepath.Dir(dir), "fetch-")
	if err != nil {
		return "", fmt.Errorf("no place to keep the guest's packages: %w", err)
	}
	defer os.RemoveAll(temp)
	root := filepath.Join(temp, "root")
	if err := fetch(temp, root); err != nil {
		return "", err
	}
	// The rename makes a cache that is there a whole one. It fails when
	// another process was faster, which is as good.
	if err := os.Rename(root, dir); err != nil {
		if _, statErr := os.Stat(dir); statErr != nil {
			return "", fmt.Errorf("keep the guest's packages: %w", err)
		}
	}
	return dir, nil
}

// fetch downloads the packages into temp and unpacks them into root.
func fetch(temp, root string) error {
	err := download(temp)
	if err != nil && os.Geteuid() == 0 {
		// A machine that never ran it has no list of packages, and an old
		// list names versions that are gone.
		if _, updateErr := command("", "apt-get", "update"); updateErr != nil {
			return fmt.Errorf("the guest's packages cannot be had: %w", errors.Join(err, updateErr))
		}
		err = download(temp)
	}
	if err != nil {
		return fmt.Errorf("the guest's packages cannot be had: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(temp, "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range debs {
		if _, err := command("", "dpkg", "-x", deb, root); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
		}
	}
	return nil
}

// download follows the dependencies of the wanted packages by name: to the
// libraries, and from the kernel's meta package to the kernel. Everything else
// they depend on is there to install and start them, which nobody does here.
func download(dir string) error {
	names := wanted()
	for next := names; len(next) > 0; {
		out, err := command("", "apt-cache", append([]string{"depends", "--important"}, next...)...)
		if err != nil {
			return err
		}
		next = nil
		lines := bufio.NewScanner(bytes.NewReader(out))
		for lines.Scan() {
			kind, name, _ := strings.Cut(strings.TrimLeft(lines.Text(), " |"), ": ")
			if kind != "Depends" && kind != "PreDepends" || slices.Contains(names, name) {
				continue
			}
			if strings.HasPrefix(name, "lib") || strings.HasPrefix(name, "linux-image-") {
				names, next = append(names, name), append(next, name)
			}
		}
	}
	// Without the option, apt complains that its unprivileged user can't write
	// into a private directory, and goes on as root.
	_, err := command(dir, "apt-get", append([]string{"download", "-o", "APT::Sandbox::User=root"}, names...)...)
	return err
}

// command runs a program to its end and returns what it printed; an error
// carries what it complained about.
func command(dir, name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "CGO_ENABLED=0")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
