// Package blockdev opens block devices, and regular files in their place, so that a
// read returns what is on them now, and tells what they are, what they lie on, and who
// uses them.
//
// A buffered read of a block device is answered from the device's page cache.
// The kernel's snapshot code writes the COW device beneath that cache, and a
// mounted file system may write a volume beneath it, so that a buffered read can
// return what was there at the first read ever: changes are missed, silently.
// Hence a block device is read with O_DIRECT, which also leaves the page cache to
// others. A regular file's cache is coherent, and some file systems refuse O_DIRECT.
//
// What a device is stands in sysfs, by its number, and what a mapped device is made of
// in its table, for which package dm is asked.
package blockdev
