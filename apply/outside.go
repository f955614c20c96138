package apply

import (
	"ddsfs/apply/record"
	"ddsfs/cow/blockdev"
)

// outside is what the system around a target knows of it: its names, what is counted
// of writes to it, and who else uses it. Tests have one of their own, with disks that
// change places and counters that begin anew.
type outside interface {
	// key is the name by which the target is known again, and aliases are its others.
	key(t *target) (string, error)
	aliases(t *target) ([]string, error)
	// subject is the target as evidence is taken from it, until done is called.
	subject(t *target) (s record.Subject, done func(), err error)
	// checkUnused refuses a target that somebody else uses without having claimed it.
	checkUnused(t *target, o ours) error
	// checkApart refuses a delta that is read from the target itself.
	checkApart(t *target, delta blockdev.Info) error
}

// system is the operating system.
type system struct{}

var _ outside = system{}

func (system) key(t *target) (string, error) { return t.info.Key() }

func (system) aliases(t *target) ([]string, error) { return t.info.KeyAliases() }

func (system) subject(t *target) (record.Subject, func(), error) { return t.subject() }

func (system) checkUnused(t *target, o ours) error { return t.checkUnused(o) }

func (system) checkApart(t *target, delta blockdev.Info) error { return t.checkApart(delta) }
