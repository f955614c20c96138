// SPDX-License-Identifier: GPL-2.0-or-later

// Package apply merges a delta into a target: a block device or a regular file
// that holds what the delta's base held.
//
// The chunks that a full delta may leave out, because they hold zeros, become zeros on the
// target in the same order, and are part of what follows as if they were listed.
//
// The way of a chunk is: pipe, spool, [cow.Decoder], checks, target. Nothing is
// written to the target before everything that can be checked was. A delta from a
// pipe can't be checked before it has arrived, so it is put into a spool file first,
// unless the caller asks to write it as it comes. Its digests are taken on the way
// there: no other process can change what is in the spool.
//
// # What is durable before what
//
// A merge can be stopped at any moment, and what was not flushed may be lost then.
// So the order is
//
//  1. the undo file, if one is asked for or kept, complete and under its name;
//  2. the set of all chunks that will have been written since a state that the
//     target held, under a name of its own;
//  3. the record, which names that state, that set and the merge;
//  4. the target's chunks, flushed now and then;
//  5. after each flush, the record with how many chunks it covers;
//  6. after the last, the record with what the target holds now, the evidence for
//     it, and what is kept: see [ddsfs/apply/record];
//  7. what of that is older than asked for is gone, and the record without it.
//
// A file that was kept by a merge that was stopped between 1 and 3 is on no record. The
// same merge finds it by its name and its content. No record of another target lists it.
//
// A file is replaced by another one, which is written and flushed before it gets the name,
// and the directory is flushed then. Every such operation goes through Options.Storage, where the tests stop
// or fail each one in turn.
//
// At every moment the target holds what that state held, except in the chunks of
// that set. Hence the same merge can go on, a delta from the same state that has all
// of these chunks can be merged instead, and any other is refused: see
// [record.Decide].
//
// # The files, from the bottom up
//
// ahead.go (decoding ahead of the writing), ours.go and nextdoor.go (the other users of a
// device), target.go (and what the system knows of one), options.go, zeros.go (what of a
// target is not zeros), input.go and spool.go (where a delta is read from), verify.go and
// status.go (commands of their own), merger.go (a target that is held), check.go (a delta,
// and whether the target may take it), writer.go and merge.go (the writing), known.go (a
// record, and whether the target is still like that), opening.go, undo.go, keep.go (restore
// points), save.go (what goes before a merge), journal.go (what is durable before what),
// apply.go (a merge from its beginning). Each uses those before it.
package apply
