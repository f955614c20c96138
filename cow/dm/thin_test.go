// SPDX-License-Identifier: GPL-2.0-or-later

package dm

import "testing"

func TestThin(t *testing.T) {
	for params, want := range map[string]Thin{
		"254:2 1":             {Pool: Number{254, 2}, ID: 1},
		"254:2 16777215 7:12": {Pool: Number{254, 2}, ID: 1<<24 - 1, External: Number{7, 12}},
	} {
		if got, err := (Target{Params: params}).Thin(); err != nil || got != want {
			t.Errorf("%q: %+v, %v", params, got, err)
		}
	}
	for _, params := range []string{"", "Fail", "254:2", "x 1", "254:2 -1", "254:2 16777216", "254:2 1 /dev/x"} {
		if got, err := (Target{Params: params}).Thin(); err == nil {
			t.Errorf("%q: %+v", params, got)
		}
	}
}

func TestPool(t *testing.T) {
	for params, want := range map[string]Pool{
		"254:0 254:1 128 0 1 skip_block_zeroing": {Number{254, 0}, Number{254, 1}, 64 << 10, true},
		"254:0 254:1 384 100 0":                  {Number{254, 0}, Number{254, 1}, 192 << 10, false},
		"254:0 254:1 2097152 0 0":                {Number{254, 0}, Number{254, 1}, 1 << 30, false},
	} {
		if got, err := (Target{Params: params}).Pool(); err != nil || got != want {
			t.Errorf("%q: %+v, %v", params, got, err)
		}
	}
	for _, params := range []string{"", "254:0 254:1", "x 254:1 128", "254:0 x 128", "254:0 254:1 0", "254:0 254:1 64", "254:0 254:1 200", "254:0 254:1 2097280", "254:0 254:1 -128"} {
		if got, err := (Target{Params: params}).Pool(); err == nil {
			t.Errorf("%q: %+v", params, got)
		}
	}
}

func TestPoolStatus(t *testing.T) {
	for params, want := range map[string]PoolStatus{
		"1 214/2048 0/1600 - rw discard_passdown queue_if_no_space - 1024":                              {},
		"3 214/2048 8/1600 77 rw discard_passdown queue_if_no_space - 1024":                             {HeldBlock: 77},
		"3 214/2048 8/8 - out_of_data_space discard_passdown error_if_no_space - 1024":                  {OutOfDataSpace: true},
		"3 214/2048 8/8 18446744073709551615 ro no_discard_passdown error_if_no_space needs_check 1024": {HeldBlock: 1<<64 - 1, NeedsCheck: true},
		"1 214/2048 0/1600 - rw no_discard_passdown":                                                    {},
		"Fail":  {Failed: true},
		"Error": {Failed: true},
	} {
		if got, err := (Target{Params: params}).PoolStatus(); err != nil || got != want {
			t.Errorf("%q: %+v, %v", params, got, err)
		}
	}
	for _, params := range []string{"", "1 214/2048 0/1600 -", "1 214/2048 0/1600 x rw discard_passdown"} {
		if got, err := (Target{Params: params}).PoolStatus(); err == nil {
			t.Errorf("%q: %+v", params, got)
		}
	}
}
