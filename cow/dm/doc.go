// SPDX-License-Identifier: GPL-2.0-or-later

// Package dm makes the calls of the device mapper and of the loop driver. It reads the
// tables and the status of mapped devices, makes, changes and removes such devices, and
// shows files as loop devices. The kernel shows and merges deltas through such devices.
//
// The package knows a device by its number, its name or its uuid, and nothing more about
// it. Package blockdev finds out what a device is, what it lies on and which processes
// use it, and asks this package for tables.
package dm
