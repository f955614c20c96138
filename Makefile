# SPDX-License-Identifier: GPL-2.0-or-later
# ddsfs: see README.md. Apart from Go and make, a target installs what it needs from
# Debian if it runs as root, and names it otherwise.

GO         ?= go
BIN        ?= bin
STATICCHECK = $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The go command leaves folders named testdata out of ./...
PACKAGES = ./... ./testdata/lab/... ./testdata/bench ./testdata/harness

# The machines that ddsfs is built for. All have 64 bits; the last one is big-endian.
MACHINES = amd64 arm64 riscv64 ppc64le s390x

# Where to install, below DESTDIR.
PREFIX        ?= /usr/local
SBIN          ?= $(PREFIX)/sbin
MAN5          ?= $(PREFIX)/share/man/man5
MAN7          ?= $(PREFIX)/share/man/man7
MAN8          ?= $(PREFIX)/share/man/man8
BASH_COMPLETE ?= $(PREFIX)/share/bash-completion/completions
ZSH_COMPLETE  ?= $(PREFIX)/share/zsh/site-functions
FISH_COMPLETE ?= $(PREFIX)/share/fish/vendor_completions.d
UNITS         ?= $(PREFIX)/lib/systemd/system
CONFIG        ?= /etc/ddsfs
# mount(8) looks for its helpers here, and nowhere else.
MOUNT_HELPERS ?= /sbin

# Files are dated by the last commit, so that the same sources give the same files.
ifndef SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y go.mod)
endif
export SOURCE_DATE_EPOCH

.PHONY: all build documentation install uninstall deb demo test lint unit completions lab bench fuzz fixtures clean

all: build

build: $(BIN)/ddsfs

$(BIN)/ddsfs: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=auto -ldflags '$(GO_LDFLAGS)' -o $@ ./cmd/ddsfs

FORCE:

# Runs a program on this machine, even if ddsfs is built for another one.
HERE = env -u GOOS -u GOARCH CGO_ENABLED=0 $(GO)

# The manual pages and the completions, from the texts of --help.
documentation:
	@rm -rf $(BIN)/doc
	@$(HERE) run -tags documentation ./cmd/ddsfs $(BIN)/doc cmd/ddsfs-replicate/ddsfs-replicate
	@gzip -9n $(BIN)/doc/*.[578]

install: build documentation
	install -d $(addprefix $(DESTDIR),$(SBIN) $(MOUNT_HELPERS) $(MAN5) $(MAN7) $(MAN8) $(BASH_COMPLETE) $(ZSH_COMPLETE) $(FISH_COMPLETE) $(UNITS) $(CONFIG))
	install -m 755 $(BIN)/ddsfs cmd/ddsfs-replicate/ddsfs-replicate $(DESTDIR)$(SBIN)
	ln -sf ddsfs $(DESTDIR)$(SBIN)/dds
	for helper in mount.ddsfs mount.fuse.ddsfs; do \
	  ln -sf $(if $(filter $(SBIN),$(MOUNT_HELPERS)),,$(SBIN)/)ddsfs $(DESTDIR)$(MOUNT_HELPERS)/$$helper; done
	install -m 644 $(BIN)/doc/*.5.gz $(DESTDIR)$(MAN5)
	install -m 644 $(BIN)/doc/*.7.gz $(DESTDIR)$(MAN7)
	install -m 644 $(BIN)/doc/*.8.gz $(DESTDIR)$(MAN8)
	ln -sf mount.ddsfs.8.gz $(DESTDIR)$(MAN8)/mount.fuse.ddsfs.8.gz
	install -m 644 $(BIN)/doc/ddsfs $(DESTDIR)$(BASH_COMPLETE)
	install -m 644 $(BIN)/doc/_ddsfs $(DESTDIR)$(ZSH_COMPLETE)
	install -m 644 $(BIN)/doc/ddsfs.fish $(DESTDIR)$(FISH_COMPLETE)
	for unit in ddsfs-replicate@.service ddsfs-replicate@.timer; do \
	  sed 's|/usr/sbin|$(SBIN)|' cmd/ddsfs-replicate/$$unit | install -m 644 /dev/stdin $(DESTDIR)$(UNITS)/$$unit; done

# The configuration of ddsfs-replicate and the records of targets stay.
uninstall:
	rm -f $(addprefix $(DESTDIR)$(SBIN)/,ddsfs ddsfs-replicate dds) \
	  $(addprefix $(DESTDIR)$(MOUNT_HELPERS)/,mount.ddsfs mount.fuse.ddsfs) \
	  $(DESTDIR)$(MAN5)/ddsfs-delta.5.gz $(DESTDIR)$(MAN7)/ddsfs-safety.7.gz \
	  $(addprefix $(DESTDIR)$(MAN8)/,ddsfs.8.gz ddsfs-*.8.gz dds.8.gz mount.ddsfs.8.gz mount.fuse.ddsfs.8.gz) \
	  $(DESTDIR)$(BASH_COMPLETE)/ddsfs $(DESTDIR)$(ZSH_COMPLETE)/_ddsfs $(DESTDIR)$(FISH_COMPLETE)/ddsfs.fish \
	  $(addprefix $(DESTDIR)$(UNITS)/ddsfs-replicate@,.service .timer)
	[ ! -d $(DESTDIR)$(CONFIG) ] || rmdir --ignore-fail-on-non-empty $(DESTDIR)$(CONFIG)

# The package's maintainer is the author of the last commit, unless its builder names
# another.
MAINTAINER ?= $(shell git log -1 --format='%an <%ae>')

DEB = $(abspath $(BIN)/deb)

# Debian's names of the architectures are Go's, except for ppc64le.
deb:
	rm -rf $(DEB)
	$(MAKE) install GO_LDFLAGS='-s -w' DESTDIR=$(DEB) PREFIX=/usr MOUNT_HELPERS=/usr/sbin ZSH_COMPLETE=/usr/share/zsh/vendor-completions
	install -d $(DEB)/DEBIAN $(DEB)/usr/share/doc/ddsfs $(DEB)/usr/share/lintian/overrides
	install -m 644 README.md cmd/ddsfs/debian/copyright $(DEB)/usr/share/doc/ddsfs
	install -m 644 cmd/ddsfs/debian/lintian-overrides $(DEB)/usr/share/lintian/overrides/ddsfs
	install -m 755 cmd/ddsfs/debian/postinst cmd/ddsfs/debian/prerm cmd/ddsfs/debian/postrm $(DEB)/DEBIAN
	@set -e; version=$$($(HERE) run ./cmd/ddsfs --version | sed -n '1{s/^ddsfs //; s/-/~/; p}'); \
	fill() { sed -e "s/@VERSION@/$$version/" -e 's/@MAINTAINER@/$(MAINTAINER)/' "$$@"; }; \
	date=$$(LC_ALL=C date -Ru -d @$$SOURCE_DATE_EPOCH); \
	fill -e "s/@DATE@/$$date/" cmd/ddsfs/debian/changelog | gzip -9n >$(DEB)/usr/share/doc/ddsfs/changelog.gz; \
	chmod 644 $(DEB)/usr/share/doc/ddsfs/changelog.gz; \
	(cd $(DEB) && find usr -type f | LC_ALL=C sort | xargs -d '\n' md5sum) >$(DEB)/DEBIAN/md5sums; \
	arch=$$($(GO) env GOARCH | sed 's/le$$/el/'); \
	kib=$$(find $(DEB)/usr -type f -printf '%s\n' | awk '{kib += int(($$1 + 1023) / 1024)} END {print kib}'); \
	fill -e "s/@ARCH@/$$arch/" -e "s/@SIZE@/$$kib/" cmd/ddsfs/debian/control >$(DEB)/DEBIAN/control; \
	chmod 644 $(DEB)/DEBIAN/md5sums $(DEB)/DEBIAN/control
	dpkg-deb --root-owner-group -Zxz --build $(DEB) $(BIN)
	rm -r $(DEB)

# The main job on a store from testdata, in a temporary directory.
demo: build
	@sh testdata/demo.sh bin/ddsfs

# All tests, the kernel lab included. Beside each other, lint and the tests of the packages
# leave no processor idle; the lab has them for itself.
test:
	@$(MAKE) --jobs=2 lint unit
	@$(MAKE) completions lab

lint:
	@unformatted=$$(gofmt -l cmd cow fs apply testdata); \
	if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted"; exit 1; fi
	@set -e; for machine in $(MACHINES); do \
	  echo "build for $$machine"; export GOARCH=$$machine CGO_ENABLED=0; \
	  $(GO) build -o /dev/null ./cmd/ddsfs; done
	$(GO) vet -tags shells,documentation $(PACKAGES)
	$(STATICCHECK) -tags shells,documentation $(PACKAGES)

# The programs from Debian that tests need, as PROGRAM:PACKAGE.
need = @missing=; \
	for pair in $(1); do \
	  PATH=$$PATH:/usr/sbin:/sbin command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair\#*:}"; \
	done; \
	[ -z "$$missing" ] || { echo "installing$$missing"; \
	  { apt-get install -y --no-install-recommends $$missing || \
	    { apt-get update && apt-get install -y --no-install-recommends $$missing; }; } >/dev/null; }

# The timeout is for tests that hang, as a busy machine is slow. With the race detector,
# the tests of the second run try less.
unit:
	$(call need,rsync:rsync fusermount3:fuse3 mkfs.ext4:e2fsprogs losetup:mount gcc:gcc man:man-db mandoc:mandoc \
	  /usr/share/bash-completion/bash_completion:bash-completion)
	$(GO) test -race -count=1 -timeout 2h ./...
	$(GO) test -count=1 -timeout 2h -run '^Test(Histories|(Kernel)?StopAtEveryOperation|KernelUsersWrite)$$' ./apply ./apply/kernel

# The completions in shells that are not everywhere.
completions:
	$(call need,zsh:zsh fish:fish)
	$(GO) test -count=1 -tags shells -run '^Test(Fish|Zsh)Completion$$' ./cmd/ddsfs

# Boots kernels with a device mapper, and runs the tests of testdata/lab/guest,
# testdata/lab/reboot and testdata/lab/powercut there. The lab itself fetches what it
# needs, and ends guests that hang.
lab:
	$(GO) test -count=1 -v -parallel 3 -timeout 0 ./testdata/lab

# Speed as ratios, side by side with what a user would take instead.
bench: build
	$(call need,thin_delta:thin-provisioning-tools)
	$(GO) run ./testdata/bench bin/ddsfs
	$(GO) run ./testdata/bench -scale bin/ddsfs
	$(GO) run ./testdata/bench -pool bin/ddsfs
	$(GO) run ./testdata/bench -squash bin/ddsfs
	$(GO) run ./testdata/bench -browse bin/ddsfs

fuzz:
	for target in FuzzReadStore FuzzDecoder FuzzParseSeal; do \
	  $(GO) test ./cow -run '^$$' -fuzz "^$$target$$" -fuzztime 3m -fuzzminimizetime 2s || exit 1; done
	$(GO) test ./cow/thin -run '^$$' -fuzz FuzzChanged -fuzztime 3m -fuzzminimizetime 2s
	$(GO) test ./cow/chunks -run '^$$' -fuzz FuzzRead -fuzztime 3m -fuzzminimizetime 2s
	$(GO) test ./apply/record -run '^$$' -fuzz FuzzRecord -fuzztime 3m -fuzzminimizetime 2s

# Makes a kernel write the stores of testdata/stores again.
fixtures:
	$(GO) run ./testdata/lab/fixtures

clean:
	rm -rf $(BIN)
