// SPDX-License-Identifier: GPL-2.0-or-later

// Package kernel leaves to the kernel's device mapper what package apply does by itself:
// [Attach] shows a target as a delta will make it, and [File], [Pipe] and [Resume] merge a
// delta while the device that shows the new state is in use.
//
// The order of what becomes durable is that of package apply, except that the kernel
// writes to the target, and uses up the store that it merges from: a copy of the delta, or
// the delta itself. The record names that store before the kernel begins, and the store is
// there until the record says that the merge is done. The kernel takes chunks off the end
// of the store's list when the target has them, so the list says what is left.
//
// The claim on the target is ours until the device mapper has it, and ours again when no
// device has it any more. Whatever comes in between is found by checking again.
//
// The files, from the bottom up: devices.go (what the kernel is asked for, and what a
// table lies on), merger.go (the target, and how it is handed over), store.go (what the
// kernel merges from), shown.go (whether a device shows what it should), attach.go,
// follow.go (waiting, and the end), kernel.go (a merge from its beginning).
package kernel
