#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The main job, on a store that a kernel wrote: testdata/stores/plain-4k is a
# snapshot's COW device, with the volume as it was when the snapshot was made
# (base) and as a newer snapshot shows it (new).
set -eu

ddsfs=$(realpath "$1")
store=$(dirname "$(realpath "$0")")/stores/plain-4k
dir=$(mktemp -d)
cleanup() {
	mountpoint -q "$dir/mnt" && "$ddsfs" unmount "$dir/mnt"
	rm -rf "$dir"
}
trap cleanup EXIT

step() { printf '\n# %s\n' "$1"; }
# Shows a command with short names, and runs it.
run() {
	echo "\$ $*" | sed "s|$ddsfs|ddsfs|g; s|$dir/||g"
	"$@"
}

cd "$dir"
for image in cow base new; do
	gzip -dc "$store/$image.gz" >"$image"
done
mkdir mnt
cp base target

step "On the source host: what changed since the snapshot, as files. COW device and new snapshot are files here."
run "$ddsfs" mount --cow cow --source new --base-id monday --new-id tuesday --base-check mnt
run ls -l mnt

step "How much changed."
run cat mnt/report

step "Which chunks changed: chunk on the volume, chunk of delta.cow that holds it."
run head -n 4 mnt/exceptions

step "Copy the delta, with any tool; cat through ssh would do."
run cp mnt/delta.cow delta.copy
run "$ddsfs" unmount mnt

step "On the target host: a volume that holds what the base snapshot held."
run cmp -s target new && { echo "the target is not behind"; exit 1; }
echo "(target differs from new)"

step "Is the copy whole?"
run "$ddsfs" verify delta.copy

step "Merge the delta. It proves that the target holds its base, as nothing is recorded of it yet."
run "$ddsfs" apply --state-dir state --undo undo.cow delta.copy target

step "The target is the new snapshot, byte for byte."
run cmp target new
echo "(no difference)"
run "$ddsfs" status --state-dir state

step "And back: what was overwritten is a delta as well."
run "$ddsfs" apply --state-dir state undo.cow target
run cmp target base
echo "(no difference)"
