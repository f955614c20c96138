// SPDX-License-Identifier: GPL-2.0-or-later

// Package record knows what a target holds: from a record of what was merged into
// it, and from evidence that it still holds that.
//
// A record names the state that a target holds, and the chunks that were written
// since an earlier one ([Record]). It is kept in a directory ([Dir]), a file for each
// target, and it is only a claim: targets are rolled back, disks change places at a
// reboot, file systems are mounted. So it carries [Evidence], which is compared with
// the target before anything is built on the claim. Counters say that a target was
// touched, and never that it was not. Samples are digests of places all over the
// target, and of places that the last merges changed, so that a target which went
// back to an older state shows.
//
// While a merge writes, a [Page] in shared memory says how much it has written, and
// when. It outlives a process that is killed, so that writes of others show then as
// well.
//
// A delta is judged by one [Verdict], which [Decide] reaches from the record,
// from what the evidence came to, and from what the delta says of itself. It rests on
// one sentence that every step of a merge keeps true: the target holds what the state
// WrittenSince held, except in the chunks written since.
package record
