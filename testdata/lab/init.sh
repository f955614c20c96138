#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The guest's process 1: loads the modules, runs the tests on the second serial
# port, where no kernel message gets between their lines, and powers off. Its
# arguments are the tests', from after the -- of the kernel's command line. In this
# shell, all programs are busybox's.

/bin/busybox mkdir -p /busybox /proc /sys /dev /tmp /run /root /var
/bin/busybox --install -s /busybox
export PATH=/bin:/busybox HOME=/root LD_LIBRARY_PATH=/lib
export DM_DISABLE_UDEV=1 DDSFS_LAB=guest

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmpfs /tmp
mount -t tmpfs tmpfs /run
ln -s /tmp /var/tmp
while read -r module; do
	insmod "/modules.d/$module" || echo "lab: cannot load $module"
done </modules

stty -F /dev/ttyS1 raw
cd /tmp
/bin/guest.test "$@" >/dev/ttyS1 2>&1 </dev/null
echo "lab: exit $?" >/dev/ttyS1
poweroff -f
