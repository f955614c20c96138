// SPDX-License-Identifier: GPL-2.0-or-later

//go:build 386 || arm || mips || mipsle

package cow

// Offsets and counts of chunks are ints in many places, and files and devices are
// larger than 32 bits can express.
var _ int = "ddsfs needs a machine of 64 bits"
