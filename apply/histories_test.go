// SPDX-License-Identifier: GPL-2.0-or-later

//go:build !race

package apply

// defaultHistories is how many random histories are made up by default.
const defaultHistories = 10000
