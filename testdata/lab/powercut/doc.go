// Package powercut is what happens when the power fails during a merge, in two
// boots of the lab's guest: TestBefore has merges held at chosen moments and never
// ends, so that the host kills it, and TestAfter finds the disks as they are then:
// what only the first guest's page cache had is lost.
package powercut
