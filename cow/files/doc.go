// Package files changes files in an order that no crash can break, and with care for
// what else the host has in its page cache.
//
// All changes go through a [Storage], where tests stop or fail each one in turn.
// [Replace] gives a file new contents or leaves it as it was. A [Trail] follows a
// writer or a reader, so that the disk works meanwhile and nothing stays cached that
// nobody reads again; [Once] is a reading of that kind.
package files
