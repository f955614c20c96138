// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// A loop device that a user may not open says nothing of the user's own file, unless
// it shows that.
func TestApplyAsAUserBesideALoopDevice(t *testing.T) {
	u := newUsers(t, "")
	others := filepath.Join(t.TempDir(), "others")
	must(t, os.WriteFile(others, make([]byte, 1<<20), 0o600))
	loop(t, others)

	delta := filepath.Join(u.dir, "delta")
	u.as(owner, args(executable, "extract", pair("chunk512"), "-o", delta)...).ok()
	target := filepath.Join(u.dir, "target")
	must(t, os.WriteFile(target, read(t, fixtures, "chunk512", "base"), 0o600))
	must(t, os.Chown(target, owner, owner))
	apply := args(executable, "apply", "--assume-base", "--state-dir", u.dir, delta, target)

	t.Run("of another file", func(t *testing.T) {
		u.t = t
		if r := u.as(owner, apply...); r.code != 0 {
			t.Fatal(r.stderr)
		}
		if !bytes.Equal(read(t, target), read(t, fixtures, "chunk512", "new")) {
			t.Error("it is not the new state")
		}
	})
	t.Run("of that file", func(t *testing.T) {
		u.t = t
		device := loop(t, target)
		u.as(owner, apply...).fails(3, device)
	})
}
