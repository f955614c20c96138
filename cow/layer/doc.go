// SPDX-License-Identifier: GPL-2.0-or-later

// Package layer has the idea that all of ddsfs rests on. A [Volume] is bytes with a
// size: a device, a file, or layers over another volume. A [Layer] is the chunks of a
// volume that changed between two states, and what they hold in the newer one. An
// exception store with the newer snapshot is a layer. So are a delta in a file, an undo
// file, and a list of chunks with a device.
//
// All that ddsfs does is a function of layers and volumes. A delta is the encoding of a
// layer (package cow). A merge writes a layer into a target (package apply). An
// [Overlay] is a volume with any number of layers over it, such as a target as it will
// be, or as it was.
//
// Functions that make a layer out of others, or that compare a volume with what it should
// hold, belong in this package. Each source that tells which chunks changed has a package
// beside it, and package fs shows volumes to users.
package layer
