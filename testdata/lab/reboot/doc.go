// Package reboot holds the scenarios that go on in a second boot, in which disks have
// changed places. Each test runs in both boots and asks dm.Boot which one it is in;
// what it keeps for the second one lies in dm.State. See TestReboot of the lab for the
// disks.
package reboot
