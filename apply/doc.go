// Package apply merges a delta into a target: a block device or a regular file
// that holds what the delta's base held.
//
// Nothing is written before everything that can be checked was: that the target
// is nobody else's at the moment, that the delta is whole, and that it fits. A
// delta from a pipe can't be checked before it has arrived, so it is put into a
// spool file first, unless the caller asks to write it as it comes.
//
// The way of a chunk is: pipe, spool, [cow.Decoder], checks, target.
package apply
