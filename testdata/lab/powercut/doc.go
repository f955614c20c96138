// SPDX-License-Identifier: GPL-2.0-or-later

// Package powercut tests what happens when the power fails during a merge, in two boots
// of the lab's guest. TestBefore holds merges at chosen moments and never ends, so that
// the host kills it. TestAfter finds the disks as they are then: what only the first
// guest's page cache had is lost.
package powercut
