// SPDX-License-Identifier: GPL-2.0-or-later

// Package harness is what the tests of apply and of apply/kernel share: a storage that stops
// at any operation and knows what a power cut would leave, and targets with deltas.
package harness
