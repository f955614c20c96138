// Package layer has the idea that all of ddsfs rests on. A [Volume] is bytes with a
// size. A [Layer] is the chunks of a volume that changed between two states, and what
// they hold: an exception store with the newer snapshot is one, so are a delta in a
// file, an undo file, and a list of chunks with a device.
//
// Whatever is asked for is a function of the two. A delta is the encoding of a layer
// (package cow), a merge writes one into a target (package apply), and [Overlay] is a
// volume with any number of layers over it: a target as it will be, or as it was.
package layer
