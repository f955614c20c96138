// Package dm makes the calls of the device mapper and of the loop driver. It reads the
// tables and the status of mapped devices, makes, changes and removes such devices, and
// shows files as loop devices: through these the kernel shows a delta and merges it.
//
// It knows a device by its number, its name or its uuid, and no more of it. What a
// device is, what it lies on and who uses it is the matter of package blockdev, which
// asks this one.
package dm
