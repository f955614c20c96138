// SPDX-License-Identifier: GPL-2.0-or-later

package main

import (
	"slices"
	"strings"

	"ddsfs/cow/wayout"
)

// taken says how each way out of an error is taken, with what it is of in the place of %s.
var taken = map[wayout.Way]string{
	wayout.FirstSync:       "only a first sync helps (--full)",
	wayout.FullDelta:       "send a full delta (mount --full)",
	wayout.BaseCheck:       "or one that proves its base where nothing is recorded (mount --base-check)",
	wayout.MakeWithNames:   "make it with names (mount --base-id, --new-id)",
	wayout.PairByCOW:       "a COW device, or a copy of one, makes a pair with --cow and --source",
	wayout.BaseByName:      "name it without --cow",
	wayout.AllowLiveOrigin: "if nobody writes to it, --allow-live-origin takes it",
	wayout.NewWasWritten:   "name the older snapshot first; if it is the newer one and was written to, --new-was-written takes it",
	wayout.CopyAgain:       "copy it again (ddsfs verify says which)",
	wayout.Unpack:          "%s FILE | ddsfs apply - TARGET unpacks it on its way",

	wayout.AssumeBase:     "--assume-base takes your word that the target holds %s, and ruins it if not",
	wayout.AssumeNameless: "--assume-base takes your word that it is right, and what the target then holds has no name",
	wayout.AssumeCovered:  "--assume-base takes your word that it has all that was written, and ruins the target if not",
	wayout.AssumeTouched:  "apply --assume-base without --kernel takes your word that it is right",
	wayout.WriteAgain:     "--assume-base writes the delta once more, and a full delta all there is",
	wayout.NameImage:      "if you know which state that is, name it (--image-id)",
	wayout.DeltasBetween:  "apply the deltas between them first, or send a full one",
	wayout.MergeAgain:     "apply that one again to finish it",
	wayout.Undo:           "or apply %s to undo it",
	wayout.Compare:        "compare with ddsfs verify DELTA %s",
	wayout.WithoutStream:  "without --stream, apply compares the two",
	wayout.StreamInstead:  "copy the delta to a file and apply that; or write without a spool (ddsfs apply --stream)",
	wayout.OtherSpool:     "name another directory (--spool)",
	wayout.OtherOverlay:   "name another directory (--overlay)",
	wayout.OtherStateDir:  "name another directory (--state-dir)",
	wayout.Detach:         "ddsfs detach %s first",
	wayout.ResumeKernel:   "ddsfs apply --kernel --resume %s finishes it",
	wayout.FindMerge:      "ddsfs apply --kernel --resume TARGET finishes it, and ddsfs status names TARGET",
	wayout.RestoreStore:   "bring it back, or apply the same delta without --kernel, or a full one",
	wayout.WithoutKernel:  "ddsfs apply without --kernel can merge it",
	wayout.Consume:        "or have the kernel use up the delta itself (--consume)",
	wayout.WithoutKeep:    "do without --keep",
	wayout.WithoutConsume: "do without --consume",
	wayout.Unmount:        "unmount it first (ddsfs unmount %s)",
}

// withAdvice is a text followed by what can be done about it.
func withAdvice(text string, ways []wayout.Way) string {
	var advice []string
	for _, way := range ways {
		kind, what := way.Cut()
		if said := strings.ReplaceAll(taken[kind], "%s", what); !slices.Contains(advice, said) {
			advice = append(advice, said)
		}
	}
	if len(advice) == 0 {
		return text
	}
	return text + ": " + strings.Join(advice, "; ")
}
