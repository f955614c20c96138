// Package blockdev opens block devices, and regular files in their place, so
// that what is read is what is on them now.
//
// A buffered read of a block device is answered from the device's page cache.
// The kernel's snapshot code writes the COW device beneath that cache, and a
// mounted file system may write a volume beneath it, so that a buffered read can
// return what was there at the first read ever: changes are missed, silently.
// Hence a block device is read with O_DIRECT, which also leaves the page cache to
// whoever has a use for it. A regular file's cache is coherent, and some file systems
// refuse O_DIRECT.
//
// What a device is, is read from sysfs, by its major and minor number.
//
// It also makes the device-mapper and loop devices through which the kernel shows
// a delta and merges it, with the kernel's own calls.
package blockdev
