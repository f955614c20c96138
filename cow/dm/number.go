// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Number is the number of a block device.
type Number struct{ Major, Minor uint32 }

// ParseNumber parses a number as the kernel writes it, such as 254:3.
func ParseNumber(text string) (Number, error) {
	major, minor, ok := strings.Cut(strings.TrimSpace(text), ":")
	ma, majorErr := strconv.ParseUint(major, 10, 32)
	mi, minorErr := strconv.ParseUint(minor, 10, 32)
	if !ok || majorErr != nil || minorErr != nil {
		return Number{}, fmt.Errorf("%q is no device number", text)
	}
	return Number{uint32(ma), uint32(mi)}, nil
}

// NumberOf returns the number in a dev_t, such as the Rdev of a stat.
func NumberOf(dev uint64) Number { return Number{unix.Major(dev), unix.Minor(dev)} }

// Dev returns the number as a dev_t.
func (n Number) Dev() uint64 { return unix.Mkdev(n.Major, n.Minor) }

// String returns the number as the kernel writes it.
func (n Number) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }
