// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ddsfs/cow/blockdev"
	"ddsfs/fs"
)

// mountHelperName is the name by which mount(8) calls the helper for the type ddsfs,
// and fuseHelperName that for fuse.ddsfs, which lists of mounts show as the type.
const (
	mountHelperName = "mount." + fs.TypeName
	fuseHelperName  = "mount.fuse." + fs.TypeName
)

// The exit codes of mount(8), and so of its helpers.
const (
	mountExitUsage  = 1
	mountExitSystem = 2
	mountExitFailed = 32
)

// mountHelper runs the command line that mount(8) calls its helpers with.
func mountHelper(args []string, out io.Writer) error {
	flags := pflag.NewFlagSet(mountHelperName, pflag.ContinueOnError)
	flags.Usage = func() {}
	options := flags.StringArrayP("options", "o", nil, "options of the mount, separated by commas")
	sloppy := flags.BoolP("sloppy", "s", false, "take no notice of unknown options")
	fake := flags.BoolP("fake", "f", false, "look at the options, and mount nothing")
	verbose := flags.BoolP("verbose", "v", false, "say what was mounted")
	namespace := flags.StringP("namespace", "N", "", "mount in the mount namespace that this file stands for")
	flags.BoolP("no-mtab", "n", false, "nothing: there is no mtab to write")
	flags.StringP("type", "t", "", "nothing: there is one type")
	if err := flags.Parse(args); err != nil && !errors.Is(err, pflag.ErrHelp) {
		return mountUsageError("%v", err)
	}
	if flags.NArg() != 2 {
		return mountUsageError("needs a device and a mountpoint, got %d arguments", flags.NArg())
	}
	h := helped{devices: flags.Args()[:1], mountpoint: flags.Arg(1)}
	all := splitOptions(strings.Join(*options, ","))
	remount := slices.Contains(all, "remount")
	if !remount {
		if err := h.parse(all, *sloppy); err != nil {
			return err
		}
	}
	if *fake {
		return nil
	}
	if *namespace != "" {
		if err := enterMountNamespace(*namespace); err != nil {
			return err
		}
	}
	if remount {
		return h.remount(all)
	}
	said := "mounted on"
	absent := slices.IndexFunc(h.devices, func(name string) bool {
		_, err := blockdev.Find(name)
		return errors.Is(err, os.ErrNotExist)
	})
	if h.nofail && absent >= 0 {
		said = h.devices[absent] + " is not there: not mounted on"
	} else if err := startInBackground(append([]string{"mount"}, h.arguments...)); err != nil {
		return err
	}
	if *verbose {
		fmt.Fprintf(out, "%s: %s %s %s\n", mountHelperName, h.devices[0], said, h.mountpoint)
	}
	return nil
}

// helped is a request of mount(8) to its helper.
type helped struct {
	devices    []string // the one that mount(8) names, and the pair's other one
	mountpoint string
	arguments  []string // of the command mount
	nofail     bool     // an absent device is no failure
}

// remount succeeds if it asks for options that the mount has already, and for the names
// of the pair, which mount(8) takes from fstab. It changes nothing, as no option of a
// mount can be changed.
func (h *helped) remount(options []string) error {
	mounted, err := fs.MountedWith(h.mountpoint)
	if err != nil {
		return fmt.Errorf("remount %s: %w", h.mountpoint, err)
	}
	if mounted == nil {
		return mountUsageError("remount %s: no %s file system is mounted there", h.mountpoint, fs.TypeName)
	}
	for _, option := range options {
		name, _, _ := strings.Cut(option, "=")
		switch {
		case name == "remount" || name == "nofail" || isGenericOption(name) || slices.Contains(pairOptions, name):
		case !slices.Contains(mounted, strings.ReplaceAll(option, `"`, "")):
			return mountUsageError("remount %s: option %s: what is mounted can't be changed: unmount it, and mount it again", h.mountpoint, option)
		}
	}
	return nil
}

// splitOptions splits a list of options at its commas, except those in quotes, which a
// context of SELinux may have.
func splitOptions(list string) []string {
	quoted := false
	return strings.FieldsFunc(list, func(r rune) bool {
		quoted = quoted != (r == '"')
		return r == ',' && !quoted
	})
}

func mountUsageError(format string, args ...any) error {
	return usageError("%s (see %s(8))", fmt.Sprintf(format, args...), mountHelperName)
}

func mountHelperExitCode(err error) int {
	_, said := errors.AsType[*reported](err)
	switch code := exitCode(err); {
	case code == exitDone:
		return exitDone
	case code == exitUsage:
		return mountExitUsage
	case said:
		return mountExitFailed
	}
	return mountExitSystem
}

// parse translates the device and the options of mount(8) into arguments of the command
// mount. In each form the mount's source is called what mount(8) calls the device, so
// that mount -a sees that it is mounted already.
func (h *helped) parse(options []string, sloppy bool) error {
	known, device := mountOptions(), h.devices[0]
	var pairs [][]string
	for _, option := range options {
		name, value, hasValue := strings.Cut(option, "=")
		flag, isPair := known.Lookup(name), slices.Contains(pairOptions, name)
		takesValue := isPair && name != "full" || flag != nil && flag.NoOptDefVal == ""
		switch {
		case name == "nofail":
			h.nofail = true
		case isGenericOption(name):
		case slices.Contains(selinuxOptions, name):
			if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
				h.arguments = append(h.arguments, "--"+selinuxFlag+"="+option)
			}
		case !isPair && flag == nil:
			if !sloppy {
				return mountUsageError("unknown option %q", option)
			}
		case takesValue && value == "":
			return mountUsageError("option %s needs a value", name)
		case !takesValue && hasValue:
			return mountUsageError("option %s takes no value", name)
		case flag != nil:
			h.arguments = append(h.arguments, "--"+strings.ReplaceAll(name, "_", "-")+strings.TrimPrefix(option, name))
		case name == "full":
			pairs = append(pairs, []string{"--full", "--", device, h.mountpoint})
		case name == "cow":
			h.devices = append(h.devices, value)
			pairs = append(pairs, []string{"--cow=" + value, "--source=" + device, "--", h.mountpoint})
		case name == "new":
			h.devices = append(h.devices, value)
			pairs = append(pairs, []string{"--", device, value, h.mountpoint})
		}
	}
	if len(pairs) != 1 {
		return mountUsageError("needs one of the options new=NEW, full and cow=COW, got %d", len(pairs))
	}
	h.arguments = append(h.arguments, pairs[0]...)
	return nil
}

// pairOptions name the devices, except the one that is an argument of mount(8).
var pairOptions = []string{"new", "full", "cow"}

// mountOptions are the flags of mount that are options of mount(8), spelled as the others
// of mount(8) are.
func mountOptions() *pflag.FlagSet {
	options := pflag.NewFlagSet("", pflag.ContinueOnError)
	mountCommand().Flags().VisitAll(func(f *pflag.Flag) {
		switch f.Name {
		case "cow", "source", "full", "foreground", "quiet", selinuxFlag:
		default:
			f.Name = strings.ReplaceAll(f.Name, "-", "_")
			options.AddFlag(f)
		}
	})
	return options
}

// isGenericOption reports whether an option is for mount(8), systemd or other readers of
// fstab, or makes no difference to a file system that is read-only, nosuid, nodev and
// noexec. It includes rw, which mount(8) passes by default.
func isGenericOption(name string) bool {
	return slices.Contains(genericOptions, name) || strings.HasPrefix(strings.ToLower(name), "x-")
}

var genericOptions = []string{
	"defaults", "ro", "rw", "auto", "noauto", "_netdev", "comment",
	"user", "users", "nouser", "owner", "group", "helper", "uhelper",
	"suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync",
	"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime",
	"strictatime", "nostrictatime", "lazytime", "nolazytime", "iversion",
	"noiversion", "mand", "nomand", "silent", "loud", "symfollow", "nosymfollow",
}

// selinuxOptions go to the kernel as they are. mount(8) leaves them out if SELinux is
// not in use; other callers of the helper may not.
var selinuxOptions = []string{"context", "fscontext", "defcontext", "rootcontext", "seclabel"}

// enterMountNamespace moves this thread, and so the processes that it starts, to a
// mount namespace.
func enterMountNamespace(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	defer ns.Close()
	runtime.LockOSThread()
	// The kernel refuses that while the working directory is shared with other threads.
	err = unix.Unshare(unix.CLONE_FS)
	if err == nil {
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
	}
	if err != nil {
		return fmt.Errorf("mount namespace %s: %w", path, err)
	}
	return nil
}
