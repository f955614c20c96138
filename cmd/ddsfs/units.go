// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"fmt"
	"time"
)

// bytesText formats a number of bytes for people, in the largest unit of which there is
// at least one.
func bytesText(bytes int64) string {
	const units = "KMGTPE"
	if bytes < 1024 {
		return fmt.Sprintf("%d B", bytes)
	}
	v, unit := float64(bytes)/1024, 0
	// A number that would be rounded to 1024.0 is one of the next unit.
	for v >= 1023.95 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[unit])
}

// rateText formats the time that a number of bytes took, and how many that is in a
// second.
func rateText(bytes int64, took time.Duration) string {
	text := took.Round(time.Second).String()
	if took < time.Minute {
		text = fmt.Sprintf("%.1f s", took.Seconds())
	}
	if bytes == 0 || took <= 0 {
		return text
	}
	return fmt.Sprintf("%s (%s/s)", text, bytesText(int64(float64(bytes)/took.Seconds())))
}
