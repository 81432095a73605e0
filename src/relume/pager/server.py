"""The pager proper: one loop over sockets and userfaultfds, from the job to the last page.

The loop reads all messages and serves the faults whose pages are at hand; those that need the disk or a hash
go to a few threads, so that one slow read holds up nobody else. Replay and fill are threads of their own
(background.py). Any error in any of them ends the process on the spot: the holder then kills the instance.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relume.errors import PagerError, RelumeError, Untrusted
from relume.images.files import read_image
from relume.images.integrity import Verifier
from relume.images.pagemap import Pagemap, read_pagemap, read_wiped_on_fork
from relume.pager import background, lazy_socket, mapped_files, working_set
from relume.pager.holder import Board
from relume.pager.job import CRIU_ENDED, Job
from relume.pager.keepsake import Keepsake
from relume.pager.ranges import Range, RangeMap
from relume.pager.source import FileSource, NoPages, PageSource
from relume.pager.space import AddressSpace, Counters, Served
from relume.pager.whole import Whole
from relume.pager.working_set import Piece, Run, WorkingSet

if TYPE_CHECKING:
    from relume.pager.remote import RemoteImages

log = logging.getLogger(__name__)

UNTRUSTED = "untrusted: "
"""How the reason of a failure begins that is about wrong bytes, between pager and holder."""

STOPPED = "stopped"
"""The reason of an end that was asked for."""

_RETRY_SECONDS = 0.001
_PROBE_SECONDS = 1.0
_TIDY_SECONDS = 0.02
_DEMAND_THREADS = 3
_NOTING_SECONDS = 2.0
_SAMPLES = 16
"""Pieces of the working set that are looked at to see whether the images are in memory."""


class Pager:
    """Serves one restore. ``emit`` gets the events (job.py), ``control`` gives the commands that come meanwhile."""

    def __init__(
        self,
        job: Job,
        board: Board,
        emit: Callable[[dict[str, Any]], None],
        control: socket.socket | None,
        keepsake: Keepsake | None = None,
    ) -> None:
        self._job = job
        self._board = board
        self._emit_line = emit
        self._control = control
        self._keepsake = keepsake or Keepsake(None)
        self._began = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._pace = background.Pace()
        self._spaces: list[AddressSpace] = []
        self._host_pids: list[int] = []
        self._noting: threading.Thread | None = None
        self._recorder: threading.Thread | None = None
        self._hungry: set[AddressSpace] = set()
        """Those with faults to be served, or of which something is to be asked soon."""
        self._returned: deque[AddressSpace] = deque()
        """Those for which a thread that may wait could not serve one."""
        self._totals = Counters()
        """Of all processes that the pager let go of, and how many these are."""
        self._finished = 0
        self._survived = False
        self._pagemaps: dict[int, Pagemap] = {}
        self._sources: dict[int, PageSource] = {}
        self._remote: RemoteImages | None = None
        self._pending: dict[int, RangeMap] = {}
        self._layouts: dict[int, RangeMap] = {}
        self._wiped: dict[int, RangeMap] = {}
        self._by_pages: dict[int, AddressSpace] = {}
        self._met_criu = False
        """Whether a CRIU has come, which is to name the processes."""
        self._restored_at: float | None = None
        self._recording = True
        self._answered = False
        self._touched: list[Piece] = []
        self._learned: WorkingSet | None = None
        self._replay: background.Replay | None = None
        self._whole: Whole | None = None
        self._fill: background.Fill | None = None
        self._verifier: Verifier | None = None
        self._slow: queue.SimpleQueue[tuple[AddressSpace, int]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._commands = b""

    # --- the story --------------------------------------------------------------------------------

    def run(self) -> int:
        """Until the instance needs no pager any more: 0. Raises RelumeError, OSError."""
        self._board.arm(self._job.cgroup)
        server = lazy_socket.listen(self._job.work_dir)
        self._watch(server, lambda: self._accept(server))
        self._watch(self._wake_read, self._drain)
        if self._control:
            self._watch(self._control, self._command)
        self._watch(self._board.watch_holder(), self._holder_died)
        if self._job.remote is None:
            self._emit("listening")
            self._open_images()
        else:
            self._open_remote()
        self._read_for_criu()
        self._prepare_whole()
        self._prepare_replay()
        # Needed before CRIU is done: its restorer touches the memory it has just registered.
        for number in range(_DEMAND_THREADS):
            threading.Thread(target=self._serve_slow, name=f"demand-{number}", daemon=True).start()
        probed = tidied = time.monotonic()
        while not self._over():
            for key, _ in self._selector.select(_RETRY_SECONDS if self._hungry else _PROBE_SECONDS):
                key.data()
            while self._returned:
                self._hungry.add(self._returned.popleft())
            for space in list(self._hungry):
                self._serve(space)
            now = time.monotonic()
            if now - probed > _PROBE_SECONDS:
                probed = now
                self._probe()
            if now - tidied > _TIDY_SECONDS or not self._hungry:
                tidied = now
                self._close_complete()
        return self._end()

    def _open_remote(self) -> None:
        """Images that are not whole: CRIU waits until what it reads itself is here. Raises Untrusted, StoreError."""
        from relume.pager.remote import RemoteImages  # a local restore doesn't pay for it

        assert self._job.remote is not None
        self._remote = RemoteImages(self._job.remote)
        self._open_images()
        for pagemap in self._pagemaps.values():
            self._remote.bring_what_criu_reads(pagemap)
        self._emit("listening")

    def _open_images(self) -> None:
        """Reads where everything lies, before the first task asks. Raises ImageError, Untrusted."""
        if self._job.verify:
            self._verifier = Verifier(self._job.images, self._job.verify)
        for task in read_image(self._job.images / "pstree.img"):
            if not (self._job.images / f"pagemap-{task.pid}.img").exists():
                continue  # a zombie has no memory
            pagemap = read_pagemap(self._job.images, task.pid)
            self._pagemaps[task.pid] = pagemap
            if any(pagemap.lazy):
                self._sources[task.pid] = self._source(pagemap)
                self._pending[task.pid] = RangeMap(
                    Range(each.address, each.end, each.offset) for each in pagemap.lazy
                )
                self._layouts[task.pid] = RangeMap(
                    Range(each.offset, each.offset + each.length, each.address) for each in pagemap.lazy
                )
                self._wiped[task.pid] = RangeMap(
                    Range(start, end, start) for start, end in read_wiped_on_fork(self._job.images, task.pid)
                )

    def _source(self, pagemap: Pagemap) -> PageSource:
        if self._remote is not None:
            return self._remote.source(pagemap.pages)
        return FileSource(pagemap.pages, self._verifier.pages(pagemap.pages) if self._verifier else None)

    def _read_for_criu(self) -> None:
        """Asks the disk for what CRIU reads itself, all at once: it asks one after the other."""
        for path in self._job.images.glob("*.img"):
            if not path.name.startswith("pages-"):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)
        for pid, source in self._sources.items():
            for extent in self._pagemaps[pid].extents:
                if not extent.lazy:
                    source.prefetch(extent.offset, extent.length)

    def _prepare_whole(self) -> None:
        if self._job.whole:
            sources = {
                pid: (self._sources[pid], list(self._pending[pid]))
                for pid in self._job.whole
                if pid in self._sources
            }
            self._whole = Whole(sources, self._job.threads, self._pace, self._wake, self._fail)

    def _prepare_replay(self) -> None:
        if self._job.working_set is None:
            return
        images = self._image_sizes()
        self._learned, why = working_set.load(self._job.working_set, images)
        if self._learned is None:
            log.info("no working set: %s", why)
            return
        if not self._learned.worthwhile:
            log.info("working set not replayed: starts without it were faster, or are to be measured")
            return
        self._read_mapped_files(self._learned)
        blocks, kept_back = background.blocks_of(self._learned)
        self._replay = background.Replay(
            blocks, kept_back, self._job.threads, self._pace, self._replayed, self._fail
        )
        self._replay.prepare({self._pagemaps[pid].pages_id: source for pid, source in self._sources.items()})

    def _read_mapped_files(self, learned: WorkingSet) -> None:
        """Has the disk asked for what the app needs of files, unless the images are in memory: then these are too."""
        if self._job.root is None or self._job.working_set is None:
            return
        by_pages = {self._pagemaps[pid].pages_id: source for pid, source in self._sources.items()}
        some = learned.pieces[:: max(1, len(learned.pieces) // _SAMPLES)]
        if all(
            by_pages[each.pages_id].ready(each.offset, each.length)
            for each in some
            if each.pages_id in by_pages
        ):
            return
        root, spans = self._job.root, mapped_files.load(self._job.working_set.with_name(mapped_files.NAME))
        threading.Thread(
            target=lambda: mapped_files.read_ahead(root, spans), name="mapped-files", daemon=True
        ).start()

    def _accept(self, server: socket.socket) -> None:
        connection = lazy_socket.Connection(server)
        self._unwatch(server)
        server.close()
        self._met_criu = True
        self._watch(connection.socket, lambda: self._criu(connection))

    def _criu(self, connection: lazy_socket.Connection) -> None:
        match connection.receive():
            case lazy_socket.Task() as task:
                self._adopt(task)
            case lazy_socket.Finished():
                self._restored()
            case lazy_socket.Closed():
                self._unwatch(connection.socket)
                connection.socket.close()
                if self._restored_at is None:
                    raise PagerError(CRIU_ENDED, hint="CRIU's own log says why")

    def _adopt(self, task: lazy_socket.Task) -> None:
        if task.host_pid is not None:
            self._board.add(task.host_pid)
            self._host_pids.append(task.host_pid)
        pagemap = self._pagemaps.get(task.pid)
        if pagemap is None:
            raise PagerError(
                f"CRIU restores process {task.pid}, which is not in the images",
                hint="which images are these?",
            )
        source = self._sources.get(task.pid)
        if source is None:
            # Nothing of it is lazy, but its empty memory is registered all the same: it goes once CRIU is done.
            self._watch_space(_without_pages(task))
            return
        space = AddressSpace(
            name=str(task.pid),
            descriptor=task.descriptor,
            pages_id=pagemap.pages_id,
            pending=self._pending.pop(task.pid),
            layout=self._layouts.pop(task.pid),
            source=source,
            wiped=self._wiped[task.pid],
            on_copy=self._copied,
            restored=False,
        )
        self._watch_space(space)
        self._by_pages[space.pages_id] = space
        if self._whole and task.pid in self._job.whole:
            space.on_copy = None  # nothing to learn where everything comes
            self._whole.start(task.pid, space)
        if self._replay:
            space.expected = self._replay.planned
            self._replay.start(self._by_pages.get)

    def _restored(self) -> None:
        self._restored_at = time.monotonic()
        for space in self._spaces:
            space.restored = True
        if self._replay:
            self._replay.all_named = True
        self._emit("restored", lazy_bytes=sum(space.pending.total for space in self._spaces))
        if self._answered or not self._job.await_answer:
            self._first_answer()

    # --- faults -----------------------------------------------------------------------------------

    def _readable(self, space: AddressSpace) -> None:
        if space.dead:
            return
        self._pace.fault()
        self._hungry.add(space)
        for child in space.read():
            self._watch_space(child)
            self._hungry.add(child)  # what is doubtful in its parent is so in it
            if self._fill:
                self._fill.nudge()

    def _serve(self, space: AddressSpace) -> None:
        space.settle()
        for address in list(space.waiting):
            outcome = space.serve(address, wait=False)
            if outcome is Served.SLOW:
                space.asked.add(address)
                # Before it is handed away: whoever cannot serve it puts it back there.
                space.waiting.discard(address)
                self._slow.put((space, address))
            elif outcome is not Served.LATER:
                space.waiting.discard(address)
        if not space.waiting and not space.unsettled:
            self._hungry.discard(space)

    def _serve_slow(self) -> None:
        try:
            while True:
                space, address = self._slow.get()
                outcome = space.serve(address)
                if outcome is Served.LATER:
                    space.waiting.add(address)
                    self._returned.append(space)
                space.asked.discard(address)
                self._wake()
        except BaseException as error:
            self._fail(error)

    def _copied(self, pages_id: int, offset: int, length: int) -> None:
        if self._recording:
            self._touched.append(Piece(pages_id, offset, length))

    # --- what is learned --------------------------------------------------------------------------

    def _replayed(self, replay: background.Replay) -> None:
        self._emit(
            "replayed",
            bytes=replay.copied,
            copy_seconds=round(replay.seconds, 6),
            ahead=replay.ahead,
            blocks=len(replay.blocks),
            withheld=sum(piece.length for piece in replay.kept_back),
        )
        self._wake()

    def _first_answer(self) -> None:
        """The recording ends, the fill begins."""
        if not self._answered:
            self._answered = True
            self._emit("answered")
        if self._restored_at is None:
            return  # heard of it before CRIU's last word; _restored comes back to it
        if self._recording:
            self._stop_recording(time.monotonic() - self._restored_at)

    def _nobody_asks(self) -> None:
        """No answer within the limit: what an idle app touched is learned only where nothing better is known."""
        self._emit("unanswered")
        self._stop_recording(None)

    def _stop_recording(self, seconds: float | None) -> None:
        """``seconds`` is what the first answer took; None where there was none."""
        self._recording = False
        if self._job.record and (seconds is not None or self._learned is None):
            if self._job.root is not None:
                self._noting = threading.Thread(target=self._record_mapped_files, name="mapped-files")
                self._noting.start()
            counts = self._job.timed and not self._hashed_bytes()  # so far: the fill may hash more
            self._recorder = threading.Thread(
                target=self._record, args=(seconds if counts else None,), name="record"
            )
            self._recorder.start()
        if self._job.fill == "all":
            self._start_fill()

    def _record(self, seconds: float | None) -> None:
        """Writes what was learned; not in the way of faults, many scattered pieces take half a second.

        ``seconds`` is the time to the first answer, None where it tells nothing.
        """
        assert self._job.record is not None
        touched = tuple(self._touched)
        missed = sum(piece.length for piece in touched)
        learned = self._learned or WorkingSet(self._image_sizes(), ())
        if self._replay:
            replayed = tuple(piece for block in self._replay.blocks for piece in block)
            pieces = working_set.refine([*replayed, *self._replay.kept_back], self._replay.kept_back, touched)
        else:
            pieces = working_set.refine((), (), touched)  # learned anew, all of it by need
        run = None if seconds is None else Run(self._replay is not None, seconds, missed)
        updated = dataclasses.replace(learned.after(run), pieces=pieces)
        try:
            working_set.save(self._job.record, updated)
        except OSError as error:
            log.warning("%s: what was learned is lost: %s", self._job.record, error)
            return
        self._emit(
            "recorded", bytes=updated.total, pieces=len(pieces), missed=missed, path=str(self._job.record)
        )

    def _finish_record(self) -> None:
        """What was learned is written and told before the end."""
        if self._recorder is not None:
            self._recorder.join()

    def _record_mapped_files(self) -> None:
        """What the app needed of files, as far as its page tables tell; not in the way of its faults."""
        assert self._job.record is not None
        try:
            mapped_files.save(
                self._job.record.with_name(mapped_files.NAME), mapped_files.touched(self._host_pids)
            )
        except (OSError, MemoryError) as error:
            log.warning("what was learned of mapped files is lost: %s", error)

    def _start_fill(self) -> None:
        self._fill = background.Fill(self._job.cgroup, self._pace, self._wake, self._fail)
        self._fill.start(lambda: [space for space in list(self._spaces) if not space.dead])

    # --- the end ----------------------------------------------------------------------------------

    def _close_complete(self) -> None:
        """Lets go of memory that lacks nothing or is gone; from then on the kernel gives zeros, rightly."""
        if self._restored_at is None:
            return
        whole = self._whole.spaces if self._whole else []
        replaying = self._replay is not None and not self._replay.finished
        for space in list(self._spaces):
            if replaying and space not in whole:
                continue
            if space.dead or space.complete:
                self._readable(space)  # a fault or a fork that came since is ours yet
                if space.dead or space.complete:
                    self._let_go(space)
        if self._whole and not self._whole.told and not any(space in self._spaces for space in whole):
            self._whole.told = True
            self._emit("whole", bytes=self._whole.copied, copy_seconds=round(self._whole.seconds, 6))

    def _let_go(self, space: AddressSpace) -> None:
        self._survived |= not space.dead
        self._selector.unregister(space.descriptor)
        self._keepsake.take_back(space.descriptor)
        space.close()
        self._spaces.remove(space)
        self._hungry.discard(space)
        self._totals.add(space.counters)
        self._finished += 1

    def _over(self) -> bool:
        if self._restored_at is None or self._spaces:
            return False
        return not (self._job.record and self._recording and self._control)

    def _end(self) -> int:
        self._board.disarm()
        self._finish_record()
        self._emit(
            "filled" if self._survived or not self._finished else "gone",
            processes=self._finished,
            **dataclasses.asdict(self._totals),
            hashed_bytes=self._hashed_bytes(),
        )
        if self._noting is not None:
            self._noting.join(_NOTING_SECONDS)
        return 0

    def _probe(self) -> None:
        """What nobody tells: processes that ended or exec'd, the end of patience."""
        self._keepsake.tell()
        for space in self._spaces:
            if self._restored_at is not None and not space.dead:
                space.probe()
        if (
            self._recording
            and self._restored_at is not None
            and time.monotonic() - self._restored_at > self._job.record_limit_s
        ):
            self._nobody_asks()

    def _holder_died(self) -> None:
        raise PagerError("the holder was killed", hint="the instance was ended with it")

    # --- plumbing ---------------------------------------------------------------------------------

    def _hashed_bytes(self) -> int:
        return sum(source.hashed_bytes for source in self._sources.values() if isinstance(source, FileSource))

    def _image_sizes(self) -> dict[int, int]:
        return {each.pages_id: each.pages_bytes for each in self._pagemaps.values()}

    def _watch_space(self, space: AddressSpace) -> None:
        self._keepsake.give(space.descriptor)
        self._spaces.append(space)
        self._watch(space.descriptor, lambda: self._readable(space))

    def _watch(self, file: int | socket.socket, act: Callable[[], None]) -> None:
        self._selector.register(file, selectors.EVENT_READ, act)

    def _unwatch(self, file: int | socket.socket) -> None:
        self._selector.unregister(file)

    def _command(self) -> None:
        assert self._control is not None
        try:
            received = self._control.recv(65536)
        except ConnectionResetError:  # the keeper was killed with an event of ours unread
            received = b""
        if not received:
            # Either the instance is dead, and whoever ends it waits for us, or only the keeper is gone, and the
            # memory is needed all the same.
            self._unwatch(self._control)
            self._control = None
            if not self._met_criu:
                raise PagerError(CRIU_ENDED, hint="its keeper was killed before that")
            self._probe()
            return
        *lines, self._commands = (self._commands + received).split(b"\n")
        for line in lines:
            match json.loads(line).get("command"):
                case "first_answer":
                    self._first_answer()
                case "stop":
                    self._board.explain(STOPPED)
                    self._finish_record()
                    os._exit(0)

    def _emit(self, event: str, **facts: Any) -> None:
        if self._remote is not None:
            facts |= self._remote.facts
        self._emit_line({"event": event, "seconds": round(time.monotonic() - self._began, 6), **facts})

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass

    def _drain(self) -> None:
        os.read(self._wake_read, 4096)

    def _fail(self, error: BaseException) -> None:
        """Ends the process, from whatever thread: the holder kills the instance and says why."""
        log.error("%s", error, exc_info=not isinstance(error, RelumeError))
        self._board.explain(reason_of(error))
        self._board.abandon(70)


def reason_of(error: BaseException) -> str:
    """Why the pager ends, for the holder; marked where bytes were wrong."""
    if isinstance(error, RelumeError):
        return (UNTRUSTED if isinstance(error, Untrusted) else "") + error.message
    return f"{type(error).__name__}: {error}"


def _without_pages(task: lazy_socket.Task) -> AddressSpace:
    return AddressSpace(
        name=str(task.pid),
        descriptor=task.descriptor,
        pages_id=0,
        pending=RangeMap(),
        layout=RangeMap(),
        source=NoPages(),
        restored=False,
    )
