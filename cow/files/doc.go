// SPDX-License-Identifier: GPL-2.0-or-later

// Package files changes files and devices in an order that survives a crash at any
// moment, and spares the host's page cache.
//
// All changes go through a [Storage], so that tests can stop or fail each of them in
// turn. [Replace] gives a file new contents or leaves it as it was. A [Trail] follows a
// writer or a reader: it keeps the disk busy, and drops from the page cache what nobody
// reads again. [ReadOnce] reads a volume that way.
package files
