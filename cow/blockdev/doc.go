// SPDX-License-Identifier: GPL-2.0-or-later

// Package blockdev opens block devices, or regular files in their place, as volumes
// whose reads return what is on them now ([Device]). It also tells what a device is,
// what it lies on, and which processes use it ([Info]).
//
// A buffered read of a block device is answered from the device's page cache. The
// kernel's snapshot code writes to the COW device beneath that cache, and a mounted
// file system may write to a volume beneath it. So a buffered read can return old data,
// and changes would be missed silently. Hence block devices are read with O_DIRECT,
// which also leaves the page cache to others. The cache of a regular file is coherent,
// and some file systems have no O_DIRECT.
//
// An Info comes from sysfs, by the device's number. The structure of a mapped device is
// in its table, which package dm reads.
package blockdev
