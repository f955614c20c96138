// SPDX-License-Identifier: GPL-2.0-or-later

// Package reboot holds the scenarios that go on in a second boot, in which disks have
// changed places. Each test runs in both boots and asks dm.Boot which one it is in;
// what it keeps for the second one lies in dm.State. The test that cuts the power, and
// so ends the first boot, is the last one: those after it would not run there. See
// TestReboot of the lab for the disks.
package reboot
