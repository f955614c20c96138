package apply

// windowBytes is how much is written to a file before the kernel is told to get going
// with it.
const windowBytes = 16 << 20

// trail follows who writes to a file, so that the disk works while more is written,
// the flush at the end has little left to do, and the file takes two windows of the
// page cache and not all of it: what else the host has there is of more use than what
// nobody reads again.
//
// Where it waits, it hears of what could not be written, and the flush then does not
// any more: the kernel says so once to each who has the file open. So an error here
// is that of a flush that failed, and ends what is going on just the same.
type trail struct {
	file        cached
	windowBytes int64
	// bytes is how much of the window that is being filled was written.
	bytes int64
	// Where the parts lie that were written in this window, and in the one before,
	// whose writing back was started.
	filling, started span
}

// span is a part of a file.
type span struct{ off, end int64 }

func (s span) bytes() int64 { return s.end - s.off }

// add makes it reach over another one as well.
func (s *span) add(off, end int64) {
	if s.bytes() == 0 {
		s.off = off
	}
	s.off, s.end = min(s.off, off), max(s.end, end)
}

// passed notes that so many bytes at off were written, or read, and are not needed
// any more.
func (t *trail) passed(off, bytes int64) error {
	t.filling.add(off, off+bytes)
	if t.bytes += bytes; t.bytes < t.windowBytes {
		return nil
	}
	if err := t.file.startWriteback(t.filling.off, t.filling.bytes()); err != nil {
		return err
	}
	before := t.started
	t.started, t.filling, t.bytes = t.filling, span{}, 0
	return t.drop(before)
}

// flushed notes that the file was flushed.
func (t *trail) flushed() error {
	t.started.add(t.filling.off, t.filling.end)
	all := t.started
	t.started, t.filling, t.bytes = span{}, span{}, 0
	return t.drop(all)
}

func (t *trail) drop(s span) error {
	if s.bytes() == 0 {
		return nil
	}
	return t.file.dropCached(s.off, s.bytes())
}
