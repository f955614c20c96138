// SPDX-License-Identifier: GPL-2.0-or-later

// Package fs mounts a directory of read-only files, each of which shows a volume of
// package layer. A volume is not read before its file is. The package knows nothing
// about what the files hold: package snapshots and commands make the volumes. The
// parts that a volume knows to hold zeros are shown as holes of its file.
//
// The contents never change while they are mounted, so the kernel may cache them.
// Another mount may have other contents. So the times and the inode numbers of the files
// follow from the time of the mount, and backup tools see that a file is not
// yesterday's, though it has the same name and size.
package fs
