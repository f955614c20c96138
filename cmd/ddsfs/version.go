// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"

	"ddsfs/cow"
	"ddsfs/cow/dm"
)

// version is the version in the first line of --version.
const version = "0.1.0"

// printVersion prints what this program is and what it finds on this machine. Each line
// begins with a word for scripts.
func printVersion(out io.Writer) {
	info, _ := debug.ReadBuildInfo()
	kernel := "unknown"
	var name unix.Utsname
	if err := unix.Uname(&name); err == nil {
		kernel = unix.ByteSliceToString(name.Release[:])
	}
	fmt.Fprintf(out, "ddsfs %s\ncommit %s\nseal %d\nkernel %s\nfuse %s\ndevice-mapper %s\n",
		version, commitOf(info), cow.SealVersion, kernel, fuseFound(), mapperFound(dm.Versions()))
}

// commitOf returns the commit that a program was built from, and when that was made.
func commitOf(info *debug.BuildInfo) string {
	settings := map[string]string{}
	if info != nil {
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
	}
	commit := settings["vcs.revision"]
	if commit == "" {
		return "unknown: it was not built in a repository"
	}
	if at := settings["vcs.time"]; at != "" {
		commit += " " + at
	}
	if settings["vcs.modified"] == "true" {
		commit += " and changes to it"
	}
	return commit
}

// fuseFound says whether this user can mount.
func fuseFound() string {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		f.Close()
		return "yes"
	}
	return "no: " + strings.TrimPrefix(err.Error(), "open ")
}

// mapperFound says which versions the device mapper and those of its targets have that
// ddsfs uses and that are loaded.
func mapperFound(mapper dm.Version, targets map[string]dm.Version, err error) string {
	if err != nil {
		return fmt.Sprintf("no: %v", err)
	}
	parts := []string{mapper.String()}
	for _, kind := range []string{dm.KindSnapshot, dm.KindOrigin, dm.KindMerge, dm.KindThin, "thin-pool"} {
		if v, loaded := targets[kind]; loaded {
			parts = append(parts, fmt.Sprintf("%s %s", kind, v))
		}
	}
	return strings.Join(parts, ", ")
}
