// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"math"
	"testing"
	"time"
)

func TestBytesText(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 1 << 20: "1.0 MiB",
		1023 << 10: "1023.0 KiB", 5 << 30: "5.0 GiB", 3 << 40: "3.0 TiB", math.MaxInt64: "8.0 EiB",
	} {
		if got := bytesText(bytes); got != want {
			t.Errorf("%d: %q, want %q", bytes, got, want)
		}
	}
}

func TestRateText(t *testing.T) {
	for _, c := range []struct {
		bytes int64
		took  time.Duration
		want  string
	}{
		{10 << 20, 2 * time.Second, "2.0 s (5.0 MiB/s)"},
		{3 << 30, 90 * time.Second, "1m30s (34.1 MiB/s)"},
		{0, 1500 * time.Millisecond, "1.5 s"},
		{1 << 20, 0, "0.0 s"},
	} {
		if got := rateText(c.bytes, c.took); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
