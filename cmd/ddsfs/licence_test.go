// SPDX-License-Identifier: GPL-2.0-or-later

package main_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each source file says its licence in its first lines, as the README does.
func TestSourcesSayTheirLicence(t *testing.T) {
	const licence = "SPDX-License-Identifier: GPL-2.0-or-later"
	if !bytes.Contains(read(t, "../../README.md"), []byte("GPL-2.0-or-later")) {
		t.Error("README.md does not say the licence")
	}
	sources := 0
	must(t, filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "bin"):
			return fs.SkipDir
		case entry.IsDir():
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		isSource := strings.HasSuffix(path, ".go") || bytes.HasPrefix(b, []byte("#!")) || filepath.Base(path) == "Makefile"
		if !isSource {
			return nil
		}
		sources++
		if begin, _, _ := bytes.Cut(b, []byte("\n\n")); !bytes.Contains(begin, []byte(licence)) {
			t.Errorf("%s does not say %s", path, licence)
		}
		return nil
	}))
	if sources < 200 {
		t.Errorf("only %d sources were found", sources)
	}
}
