"""Many copies at a time, or one reader of events: never both.

Why there has to be such a thing: while an event other than a fault is queued, the kernel refuses copies
(EAGAIN, ``mmap_changing`` in mm/userfaultfd.c). From the moment it is read they succeed again, and the app
goes on, for example to the discarding of pages that MADV_DONTNEED announced. A copy that was decided upon
before the reading, and made after it, would bring given-up contents back. So messages are read only while no
copy is under way or decided upon, and what they say is taken in before the next one is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A shared lock for copies and an exclusive one for reading events, which goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._copies = 0
        self._readers = 0
        self._reading = False

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Held while deciding upon a copy, making it, and writing down what it did."""
        with self._changed:
            while self._readers:
                self._changed.wait()
            self._copies += 1
        try:
            yield
        finally:
            with self._changed:
                self._copies -= 1
                if self._readers and not self._copies:
                    self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Held while reading messages and acting on those that change the layout."""
        with self._changed:
            self._readers += 1
            while self._copies or self._reading:
                self._changed.wait()
            self._reading = True
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._reading = False
                self._changed.notify_all()
