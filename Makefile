# ddsfs: see README.md. Everything that a target needs beside Go and make on a
# Debian machine, it installs (as root) or names.

GO         ?= go
PREFIX     ?= /usr/local
STATICCHECK = $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The go command leaves folders named testdata out of ./...
PACKAGES = ./... ./testdata/lab/... ./testdata/bench

.PHONY: all build demo test lint unit lab bench fuzz fixtures clean tools

all: build

build: bin/ddsfs

bin/ddsfs: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/ddsfs

FORCE:

# The main job on a store from testdata, in a temporary directory.
demo: build
	@sh testdata/demo.sh bin/ddsfs

# All tests, the kernel lab included.
test: lint unit lab

lint:
	@unformatted=$$(gofmt -l cmd cow fs apply testdata); \
	if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted"; exit 1; fi
	$(GO) vet $(PACKAGES)
	$(STATICCHECK) $(PACKAGES)
	CGO_ENABLED=0 $(GO) build -o /dev/null ./cmd/ddsfs

unit: tools
	$(GO) test -race -count=1 -timeout 15m ./...

# Boots Debian's kernel in QEMU with a device mapper, and runs the tests of
# testdata/lab/guest and testdata/lab/powercut there.
lab:
	$(GO) test -count=1 -v -timeout 20m ./testdata/lab

# Speed as ratios, side by side with what a user would take instead.
bench: build
	$(GO) run ./testdata/bench bin/ddsfs

fuzz:
	for target in FuzzReadStore FuzzDecoder FuzzParseSeal FuzzReadSet; do \
	  $(GO) test ./cow -run '^$$' -fuzz "^$$target$$" -fuzztime 3m -fuzzminimizetime 2s || exit 1; done
	$(GO) test ./apply -run '^$$' -fuzz FuzzRecord -fuzztime 3m -fuzzminimizetime 2s

# Has a kernel write the stores of testdata/stores again.
fixtures:
	$(GO) run ./testdata/lab/fixtures

# What the tests take from Debian: the real tools that they run on the mount, and
# the C compiler that the race detector needs.
tools:
	@missing=; \
	for pair in rsync:rsync fusermount3:fuse3 mkfs.ext4:e2fsprogs losetup:mount gcc:gcc; do \
	  PATH=$$PATH:/usr/sbin:/sbin command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	[ -z "$$missing" ] || { echo "installing$$missing"; \
	  { apt-get install -y --no-install-recommends $$missing || \
	    { apt-get update && apt-get install -y --no-install-recommends $$missing; }; } >/dev/null; }

clean:
	rm -rf bin
