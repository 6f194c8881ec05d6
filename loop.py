"""The event loop: one selector, one heap of timers, the UDP socket, byte streams in and out, names, and the log.

Rules of this file
------------------
- One thread. Nothing blocks but the selector's own wait. Whatever is written without blocking may be taken in part.
- Everything impure that a server or a client needs comes through ``Loop``: time, timers, randomness. So the tests can
  run the same server and client on a loop of their own, in virtual time.
- It knows nothing of chat, of messages, or of who is on the other side.
- No error of a socket or of a log file ends the program.

One turn of the loop
--------------------
::

    wait     until a descriptor is ready or the first timer is due
    read     every ready descriptor, with a limit for each, so that no source starves another
    run      every timer that is due
    settle   once: the owner carries out what the turn has brought

``now`` is read once, after the wait, and holds until the turn has ended. ``Scheduler`` is the part of a turn that is
pure: it turns readings of a clock into ``now``, and runs timers. The real loop and the simulated one share it.

Time that does not count
------------------------
A process that was suspended (SIGSTOP, a closed lid) or held up by a slow disk has heard nobody meanwhile. When it goes
on, its timeouts would fire before it has read the answers that wait in its socket. So ``now`` leaves that time out, and
a timeout that would call somebody dead also asks whether the socket was read empty (``drained``).
"""
from __future__ import annotations

import errno
import functools
import heapq
import os
import select
import selectors
import signal
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

from home import DEBUG, ERROR, INFO, WARNING, LineFile, text_line
from protocol import MAX_RECEIVED, NEVER, TYPE_CHECKING, Address, Any, Protocol, clean

if TYPE_CHECKING:
    import subprocess


# --- timers ---------------------------------------------------------------------------------------------------

COMPACT_TIMERS = 64       # cancelled timers that may lie in the heap; beyond, they may be half of it


class Timer:
    """A call that is due at a time; ``cancel`` is enough to forget it."""

    __slots__ = ("when", "callback", "_heap")

    def __init__(self, when: float, callback: Callable[[], None], heap: TimerHeap) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback
        self._heap = heap

    def cancel(self) -> None:
        """Make sure that the callback is not called."""
        if self.callback is not None:
            self.callback = None
            self._heap.note_cancelled()


class TimerHeap:
    """Timers in the order of their times. Cancelled ones stay until they surface, or until there are too many."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Schedule ``callback`` for ``when``; timers of the same time run in the order in which they were made."""
        timer = Timer(when, callback, self)
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, timer))
        return timer

    def note_cancelled(self) -> None:
        """Count one more cancelled timer; remove all of them if they pile up."""
        self._cancelled += 1
        if self._cancelled > COMPACT_TIMERS and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_time(self) -> float:
        """Return when the first timer is due; ``NEVER`` if there is none."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0][0] if self._heap else NEVER

    def run(self, now: float) -> None:
        """Call every timer that is due. Timers that they add run in the next turn, so that a turn always ends."""
        last = self._count
        while self.next_time() <= now and self._heap[0][1] <= last:
            timer = heapq.heappop(self._heap)[2]
            callback, timer.callback = timer.callback, None
            assert callback is not None
            callback()


# --- the loop -------------------------------------------------------------------------------------------------

MAX_TURN_TIME = 0.1       # s; what a turn takes, or a wait ends late, beyond that does not count: see above
WAITED = 0.00002          # s; a selector that returns sooner did not have to wait
MAX_WAIT = 86400.0        # s; a loop with nothing to do turns once in that time: selectors refuse more than some weeks


class Random(Protocol):
    """The random numbers that a loop hands out."""

    def getrandbits(self, bits: int, /) -> int:
        """Return a number of ``bits`` bits."""
        ...

    def uniform(self, low: float, high: float, /) -> float:
        """Return a number in [low, high]."""
        ...


class Loop(Protocol):
    """What a server or a client may ask of the loop that it runs on."""

    drained: bool       # the UDP socket was read empty in this turn: nobody's answer is waiting there unread
    random: Random

    def now(self) -> float:
        """Return the monotonic time of this turn, minus the time in which the process was suspended; seconds."""
        ...

    def clock(self) -> float:
        """Return the monotonic time of this very moment, in seconds: for measuring inside a turn."""
        ...

    def wall(self) -> float:
        """Return the seconds since 1970."""
        ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call ``callback`` in the turn in which ``now()`` has reached ``when``."""
        ...


class Scheduler:
    """The pure part of a turn: readings of a clock come in, ``now`` and calls of due timers come out.

    ``begin_wait`` ends a turn and returns how long to wait, ``end_wait`` begins the next one. Both get the reading of a
    clock that never goes back, in seconds.
    """

    def __init__(self, clock: float) -> None:
        self.drained = True
        self.timers = TimerHeap()
        self._now = clock
        self._suspended = 0.0       # s of the clock that do not count
        self._wait_began = clock
        self._wait_ended = clock
        self._timeout = 0.0         # s that the wait was to last at most
        self._due = NEVER           # when the first timer was due, as the wait began

    def now(self) -> float:
        """Return the monotonic time of this turn, minus the time in which the process was suspended; seconds."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` in the turn in which ``now()`` has reached ``when``."""
        return self.timers.call_at(when, callback)

    def begin_wait(self, clock: float, at_once: bool = False) -> float:
        """End a turn; return the seconds until the first timer is due, 0 if one is already, or if ``at_once``."""
        took = clock - self._wait_ended
        if took > MAX_TURN_TIME:
            self._suspended += took - MAX_TURN_TIME
        self._due = due = self.timers.next_time()
        timeout = 0.0 if at_once else due - (clock - self._suspended)
        if timeout < 0.0:
            timeout = 0.0
        elif timeout > MAX_WAIT:
            timeout = MAX_WAIT
        self._wait_began, self._timeout = clock, timeout
        return timeout

    def end_wait(self, clock: float) -> None:
        """Begin a turn."""
        late = clock - self._wait_began - self._timeout
        if late > MAX_TURN_TIME:
            self._suspended += late
        self._wait_ended = clock
        self._now = clock - self._suspended
        self.drained = True

    def run_timers(self) -> None:
        """Call every timer that is due, if the first that was set when the wait began is; else the next turn does."""
        if self._due <= self._now:
            self.timers.run(self._now)


class SystemRandom:
    """Random numbers that nobody can foresee. (The ``random`` module takes longer to import than the selectors.)"""

    def getrandbits(self, bits: int, /) -> int:
        """Return a number of ``bits`` bits."""
        return int.from_bytes(os.urandom(-(-bits // 8)), "big") >> -bits % 8

    def uniform(self, low: float, high: float, /) -> float:
        """Return a number in [low, high]."""
        return low + (high - low) * self.getrandbits(53) / 2 ** 53


Watchers = dict[int, Callable[[], None]]        # selectors.EVENT_* -> who is called
NOBODY: Watchers = {}


def new_selector() -> selectors.BaseSelector:
    """Return the selector of this system; on macOS select(2): kqueue says nothing of the end of a file or a FIFO."""
    return selectors.SelectSelector() if sys.platform == "darwin" else selectors.DefaultSelector()


class SelectorLoop(Scheduler):
    """The real loop: one selector, one heap of timers. The owner sets ``settle``, called at the end of every turn."""

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        super().__init__(time.monotonic())
        self.random: Random = SystemRandom()
        self.wall = time.time           # returns the seconds since 1970
        self.clock = time.monotonic     # returns the monotonic time of this very moment
        self.reads_one = False          # see ``UdpSocket``
        self.settle: Callable[[], None] = lambda: None
        self._selector = selector or new_selector()
        self._watched: dict[int, Watchers] = {}     # by descriptor
        self._always: dict[int, Watchers] = {}      # regular files: epoll refuses them, and they are always ready
        self._running = False
        self._signal_reader, self._signal_writer = socket.socketpair()
        for end in (self._signal_reader, self._signal_writer):
            end.setblocking(False)
        self.watch(self._signal_reader.fileno(), selectors.EVENT_READ, self.handle_signals)
        self._signals: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, event: int, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever ``fd`` is ready for ``event`` (a selectors.EVENT_*); None: not any more."""
        watchers = dict(self._watched.get(fd, NOBODY))      # a copy: a turn may be going through the old one
        had = bool(watchers)
        if callback is not None:
            watchers[event] = callback
        elif event in watchers:
            del watchers[event]
        self._always.pop(fd, None)
        mask = sum(watchers)
        try:
            if mask and had:
                self._selector.modify(fd, mask)
            elif mask:
                self._selector.register(fd, mask)
            elif had:
                self._selector.unregister(fd)
        except (PermissionError, KeyError):     # one that the selector refuses, or refused before: it never blocks
            if watchers:
                self._always[fd] = watchers
        if watchers:
            self._watched[fd] = watchers
        else:
            self._watched.pop(fd, None)

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` in the loop, not in the handler, when the signal arrives."""
        self._signals[number] = callback
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(number, lambda *_: None)

    def handle_signals(self) -> None:
        """Call back for the signals that have arrived until now."""
        try:
            numbers = self._signal_reader.recv(64)
        except BlockingIOError:
            return
        for number in numbers:
            if number in self._signals:
                self._signals[number]()

    def stop(self) -> None:
        """Make ``run`` return after this turn."""
        self._running = False

    def run(self) -> None:
        """Run turns until ``stop``."""
        self._running = True
        while self._running:
            self.turn()

    def turn(self) -> None:
        """Run one turn: wait, read, run the timers, settle."""
        began = time.monotonic()
        timeout = self.begin_wait(began, at_once=bool(self._always))
        events = self._selector.select(timeout)
        ended = time.monotonic()
        self.end_wait(ended)
        self.reads_one = ended - began > WAITED and self._due > self._now
        for key, mask in events:
            for event, callback in self._watched.get(key.fd, NOBODY).items():
                if mask & event:
                    callback()
        if self._always:
            for watchers in list(self._always.values()):
                for callback in watchers.values():
                    callback()
        self.run_timers()
        self.settle()

    def close(self) -> None:
        """Close the descriptors of the loop."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._signal_reader.close()
        self._signal_writer.close()


class RestartableTimer:
    """A timer that is restarted often. The heap gets a new entry only if it must fire earlier than the one before."""

    def __init__(self, loop: Loop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._timer: Timer | None = None
        self._when = NEVER

    def set(self, when: float) -> None:
        """Fire at ``when`` (``NEVER``: not at all) instead of at the time that was set before."""
        self._when = when
        if when == NEVER:
            self.cancel()
        elif self._timer is None or when < self._timer.when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(when, self._fire)

    def cancel(self) -> None:
        """Do not fire."""
        self._when = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def is_set(self) -> bool:
        """Whether it is going to fire."""
        return self._timer is not None

    def _fire(self) -> None:
        self._timer = None
        when, self._when = self._when, NEVER
        if when > self._loop.now():
            self.set(when)
        else:
            self._callback()


def wake_up() -> None:
    """Do nothing: a timer with this callback makes the loop turn, and ``settle`` does the rest."""


class Request:
    """A question that is repeated until it is answered, ``attempts`` times, about ``interval`` seconds apart."""

    def __init__(self, loop: Loop, ask: Callable[[], None], unanswered: Callable[[], None], attempts: int,
                 interval: float) -> None:
        self.interval = interval
        self._loop = loop
        self._ask = ask
        self._unanswered = unanswered
        self._max_attempts = attempts
        self.attempts = 0       # so far
        self._timer = RestartableTimer(loop, self._again)

    @property
    def is_running(self) -> bool:
        """Whether an answer is awaited."""
        return self._timer.is_set

    def start(self, wait: float = 0.0) -> None:
        """Ask for the first time, in ``wait`` seconds; until then an answer counts as awaited, too."""
        self.attempts = 0
        if wait:
            self._timer.set(self._loop.now() + wait)
        else:
            self._again()

    def renew(self, is_busy: bool) -> None:
        """Count the attempts from the last one on: there was a sign of life. ``is_busy``: the next one has time."""
        self.attempts = min(self.attempts, 1)
        if is_busy and self.is_running:
            self._timer.set(self._loop.now() + jittered(self._loop, 2 * self.interval))

    def stop(self) -> None:
        """Stop asking: the answer is here, or nobody wants it any more."""
        self._timer.cancel()

    def _again(self) -> None:
        if self.attempts < self._max_attempts:
            self.attempts += 1
            self._timer.set(self._loop.now() + jittered(self._loop, self.interval))
            self._ask()
        elif self._loop.drained:
            self._unanswered()
        else:       # the answer may be in the socket still
            self._timer.set(self._loop.now())


JITTER = 0.25             # part by which every repeated request varies, up and down: nobody stays in step with others


def jittered(loop: Loop, seconds: float) -> float:
    """Return ``seconds``, up to 25 % more or less."""
    return seconds * loop.random.uniform(1 - JITTER, 1 + JITTER)


def new_id(loop: Loop) -> int:
    """Return a random id of 63 bits: SQLite's integers are signed."""
    return loop.random.getrandbits(63)


# --- byte streams ---------------------------------------------------------------------------------------------

READ_SIZE = 65536         # bytes read from stdin in one turn
WRITE_SIZE = 65536        # bytes offered to stdout at once
OUTPUT_LIMIT = 65536      # bytes of backlog at which no more messages are shown
CHUNK_LIMIT = 4096        # calls of ``write`` in the backlog at which no more are shown: empty ones wait, too
BYTE_ORDER_MARK = b"\xef\xbb\xbf"    # U+FEFF in UTF-8: some editors begin a file with it
TRANSIENT = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)
BUFFER_FULL = (*TRANSIENT, errno.ENOBUFS)          # of a socket: in another way, it would not be sent either


def reopen(fd: int, flags: int) -> int:
    """Return a non-blocking descriptor of our own for an inherited one, or ``fd`` where there is no such thing.

    O_NONBLOCK belongs to the open file description, which other processes share: it must not be set on theirs.
    Opening /proc/self/fd again (Linux), or the terminal by its name, makes a description of our own.
    """
    mode = os.fstat(fd).st_mode
    path = f"/proc/self/fd/{fd}"
    try:
        if stat.S_ISCHR(mode) and os.isatty(fd):
            path = os.ttyname(fd)
        elif not stat.S_ISFIFO(mode) or not os.path.exists(path):
            return fd
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return fd


def read_some(fd: int) -> bytes | None:
    """Return at most ``READ_SIZE`` bytes, b"" at the end, None if there is nothing now. Raise OSError."""
    try:
        return os.read(fd, READ_SIZE)
    except OSError as error:
        if error.errno in TRANSIENT:
            return None
        raise


class Reader:
    """Standard input of any kind, read without blocking."""

    def __init__(self, fd: int) -> None:
        self.fd = fd        # the one to watch: a reopened FIFO does not report that its writers have left
        try:
            self._own = reopen(fd, os.O_RDONLY)
        except OSError:     # closed
            self.fd = self._own = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.is_terminal = os.isatty(fd)
        self.error = ""     # why it cannot be read any more, after ``read`` has returned b"" for that

    def read(self) -> bytes | None:
        """Return at most ``READ_SIZE`` bytes, b"" at the end, None if there is nothing now."""
        try:
            return read_some(self._own)
        except OSError as error:
            self.error = error.strerror or str(error)
            return b""

    def rest_of_line(self) -> tuple[bytes, bool]:
        """Return what is there now up to the end of a line, and whether it is the last; no byte behind it is read."""
        rest = bytearray()
        try:
            while len(rest) < 2 * READ_SIZE and not rest.endswith(b"\n") and select.select([self._own], [], [], 0)[0]:
                byte = os.read(self._own, 1)
                if not byte:
                    return bytes(rest), True
                rest += byte
        except OSError:
            pass        # what cannot be read any more is not there
        return bytes(rest), False


class Writer:
    """A standard stream of any kind, written to without blocking; a regular file gets whole lines."""

    def __init__(self, fd: int) -> None:
        try:
            self.fd = reopen(fd, os.O_WRONLY)
            mode = os.fstat(self.fd).st_mode
        except OSError:     # closed
            self.fd, mode = fd, 0
        self.is_terminal = os.isatty(self.fd)
        self.is_pipe = stat.S_ISFIFO(mode)
        self._may_block = self.fd == fd and (self.is_pipe or self.is_terminal)
        self._is_file = stat.S_ISREG(mode)
        self._put: Callable[[bytes], int] | None = LineFile(fd).put if self._is_file else None
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=os.dup(fd))
            self._put = lambda data: sock.send(data, socket.MSG_DONTWAIT)

    def put(self, data: bytes) -> int:
        """Write; return how many bytes were taken, 0 if none can be now. Raise OSError.

        That is a ConnectionError if the reader is gone.
        """
        try:
            if self._put is not None:
                return self._put(data)
            if not self._may_block:
                return os.write(self.fd, data)
            if select.select([], [self.fd], [], 0)[1]:
                return os.write(self.fd, data[:select.PIPE_BUF])    # a pipe that is writable has room for that much
            return 0
        except OSError as error:
            if error.errno in TRANSIENT:
                return 0
            if error.errno == errno.EIO and self.is_terminal:       # it has hung up
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None
            raise

    def put_later(self, data: bytes) -> int:
        """Write like ``put``, but return 0 where that fails, so that it is tried again."""
        try:
            return self.put(data)
        except OSError:
            return 0

    def check(self) -> None:
        """Raise OSError if a file system has lost what it had accepted: NFS, for one, says so only at a close."""
        if self._is_file:
            os.close(os.dup(self.fd))


class Output:
    """The backlog of one stream, in order, and who is called when some of it is written.

    ``put`` gets bytes and returns how many it took. ``broken``: nothing can be written any more; ``error`` says why,
    and is empty if the reader is gone.
    """

    def __init__(self, put: Callable[[bytes], int]) -> None:
        self._put = put
        self._chunks: deque[tuple[bytes, Callable[[int], None] | None]] = deque()
        self.pending = 0        # bytes
        self.broken = False
        self.error = ""

    def write(self, data: bytes, written: Callable[[int], None] | None = None) -> None:
        """Append ``data``; call ``written`` with the number of further lines each time some are written.

        For empty data, ``written`` is called with 0 once all that was appended before is written. Empty data without
        ``written`` is ignored.
        """
        if not self.broken and (data or written is not None):
            self._chunks.append((data, written))
            self.pending += len(data)

    def has_room(self) -> bool:
        """Return whether messages may be written: the backlog is not too long."""
        return self.pending < OUTPUT_LIMIT and len(self._chunks) < CHUNK_LIMIT

    def give_up(self, error: str = "") -> None:
        """Drop the backlog and everything that comes later: nobody reads it, or it cannot be written."""
        self.broken, self.error = True, error
        self._chunks.clear()
        self.pending = 0

    def flush(self) -> None:
        """Write what can be written now, and call back for each chunk."""
        chunks = self._chunks
        while chunks and not self.broken:
            data = chunks[0][0] if len(chunks) == 1 else self._batch()
            taken = 0
            if data:
                try:
                    taken = self._put(data)
                except OSError as error:
                    self.give_up("" if isinstance(error, ConnectionError) else error.strerror or str(error))
                    return
                self.pending -= taken
            complete = taken == len(data)
            while chunks and len(chunks[0][0]) <= taken:
                chunk, written = chunks.popleft()
                taken -= len(chunk)
                if written is not None:
                    written(chunk.count(b"\n"))
            if taken:
                self._split(taken)
            if not complete:
                return

    def _batch(self) -> bytes:
        batch, size = [], 0
        for data, _ in self._chunks:
            batch.append(data)
            size += len(data)
            if size >= WRITE_SIZE:
                break
        return b"".join(batch)

    def _split(self, taken: int) -> None:
        """Keep what is left of the first chunk, of which ``taken`` bytes were written; call back for its lines."""
        data, written = self._chunks[0]
        self._chunks[0] = data[taken:], written
        lines = data.count(b"\n", 0, taken)
        if written is not None and lines:
            written(lines)


def keep_standard_descriptors() -> None:
    """Keep sockets and files from taking the place of a standard stream that is closed."""
    while True:
        fd = os.open(os.devnull, os.O_RDONLY)
        if fd > 2:
            os.close(fd)
            return


def without_line_ends(text: str) -> str:
    """Return ``text`` without the line ends, LF or CR LF, at its end."""
    end = len(text)
    while text.endswith("\n", 0, end):
        end -= 2 if text.endswith("\r\n", 0, end) else 1
    return text[:end]


# --- one's own programs ---------------------------------------------------------------------------------------

MAX_GUESTS = 16           # connections at a time
GUEST_TIME = 5.0          # s that a line may take to come
BACKLOG_LIMIT = 262144    # bytes that wait for one who does not read; then he is cut off


def is_own(sock: socket.socket) -> bool:
    """Return whether the process at the other end of a UNIX socket is the same user's, as far as the system tells."""
    try:
        if hasattr(socket, "SO_PEERCRED"):      # struct ucred of unix(7): pid, uid, gid
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        elif sys.platform == "darwin":          # LOCAL_PEERCRED of <sys/un.h>, struct xucred: version, uid, ...
            found = sock.getsockopt(0, 1, 76)
        else:
            return True
        return int.from_bytes(found[4:8], sys.byteorder) == os.geteuid()
    except OSError:
        return False


def send_some(sock: socket.socket, data: bytes) -> int:
    """Send; return how many bytes were taken, 0 if none can be now. Raise OSError."""
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def receive_some(sock: socket.socket) -> bytes | None:
    """Return at most ``READ_SIZE`` bytes, b"" at the end, or where it is broken, None if there is nothing now."""
    try:
        return read_some(sock.fileno())
    except OSError:
        return b""


class Guest:
    """A connection to a ``LocalSocket``: one line comes in, any number may go out."""

    def __init__(self, loop: SelectorLoop, sock: socket.socket, limit: int, on_line: Callable[[Guest, bytes], None],
                 on_closed: Callable[[Guest], None]) -> None:
        self._loop, self._sock, self._limit, self._on_line, self._on_closed = loop, sock, limit, on_line, on_closed
        self._line, self._has_line = b"", False
        self._is_open, self._is_ending = True, False
        self._output = Output(functools.partial(send_some, sock))
        loop.watch(sock.fileno(), selectors.EVENT_READ, self._on_readable)
        self._timer = loop.call_at(loop.now() + GUEST_TIME, self.close)

    def _on_readable(self) -> None:
        data = receive_some(self._sock)
        if data == b"":
            self.close()        # what is not a whole line was never said; and nobody waits for an answer any more
        elif data and not self._has_line:
            line, end, _ = (self._line + data).partition(b"\n")
            self._line = line
            if len(line) > self._limit:
                self.close()
            elif end:
                self._has_line, self._line = True, b""
                self._timer.cancel()
                log.info("another program says %d bytes", len(line))
                self._on_line(self, line)

    def write(self, data: bytes) -> None:
        """Send, without blocking; ignored once the other side has gone."""
        if self._is_open:
            self._output.write(data)
            self._flush()

    def _flush(self) -> None:
        self._output.flush()
        if self._output.broken or self._output.pending > BACKLOG_LIMIT or (
                self._is_ending and not self._output.pending):
            self.close()
        else:
            self._loop.watch(self._sock.fileno(), selectors.EVENT_WRITE, self._flush if self._output.pending else None)

    def end(self) -> None:
        """Close it once all is sent."""
        self._is_ending = True
        if self._is_open:
            self._flush()

    def close(self) -> None:
        """Close it now."""
        if self._is_open:
            self._is_open = False
            self._timer.cancel()
            for event in (selectors.EVENT_READ, selectors.EVENT_WRITE):
                self._loop.watch(self._sock.fileno(), event, None)
            self._sock.close()
            self._on_closed(self)


class LocalSocket:
    """A UNIX socket at which other programs of the same user, and nobody else, can say a line.

    Whatever has its name is replaced: mostly it was left by a process that has died. Where there can be none (the path
    is too long, the file system has no sockets), there is none.
    """

    def __init__(self, loop: SelectorLoop, limit: int, is_willing: Callable[[], bool],
                 on_line: Callable[[Guest, bytes], None]) -> None:
        """``limit``: bytes of a line. ``is_willing``: returns whether one may come now; only then is it greeted."""
        self._loop, self._limit, self._is_willing, self._on_line = loop, limit, is_willing, on_line
        self._sock: socket.socket | None = None
        self._path = ""
        self._status: os.stat_result | None = None      # of the socket that we have made
        self._guests: dict[Guest, None] = {}

    def open(self, path: str) -> None:
        """Listen at ``path`` alone from now on; "": nowhere."""
        if path == self._path and self._has_name():
            return
        self._stop_listening()
        if not path:
            return
        draft = f"{path}.{os.urandom(2).hex()}"     # as short as that: all of it must fit into a sockaddr_un
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            sock.bind(draft)
            os.chmod(draft, 0o600)
            sock.listen(MAX_GUESTS)
            self._status = os.stat(draft)
            os.replace(draft, path)
        except OSError as error:
            log.debug("no socket for other programs at %s: %s", path, error)
            sock.close()
            try:
                os.unlink(draft)
            except OSError:
                pass
            return
        sock.setblocking(False)
        self._sock, self._path = sock, path
        self._loop.watch(sock.fileno(), selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        assert self._sock is not None
        try:
            sock = self._sock.accept()[0]
        except OSError:
            return
        if len(self._guests) >= MAX_GUESTS or not is_own(sock) or not self._is_willing():
            sock.close()
            return
        sock.setblocking(False)
        guest = Guest(self._loop, sock, self._limit, self._on_line, lambda gone: self._guests.pop(gone, None))
        self._guests[guest] = None
        guest.write(GREETING)

    def close(self) -> None:
        """Listen no more; remove the socket, unless another process has replaced it."""
        for guest in list(self._guests):
            guest.close()
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._sock is None:
            return
        self._loop.watch(self._sock.fileno(), selectors.EVENT_READ, None)
        self._sock.close()
        try:
            if self._has_name():
                os.unlink(self._path)
        except OSError:
            pass
        self._sock, self._path = None, ""

    def _has_name(self) -> bool:
        """Return whether the name still leads to this socket: another process may have replaced it, or removed it."""
        try:
            return self._status is not None and os.path.samestat(os.stat(self._path), self._status)
        except OSError:
            return not self._path


GREETING = b"ready\n"          # a program that reads it may say a line; without it, nothing was said


def visit(paths: Sequence[str], seconds: float) -> socket.socket | None:
    """Return a connection to the first ``LocalSocket`` at one of ``paths`` that is willing; None: there is none.

    ``seconds``: for which each step is waited for: a process may be stopped.
    """
    for path in paths:
        if not os.path.exists(path):
            continue
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(path)
            if is_own(sock) and sock.recv(len(GREETING)) == GREETING:
                return sock
        except OSError:     # nobody listens any more, or not now
            pass
        sock.close()
    return None


# --- the log --------------------------------------------------------------------------------------------------

NO_COUNTERS: Mapping[str, int] = {}


class LogFile:
    """A file that the log is appended to. What a full disk refuses stays in the backlog, and is tried again."""

    def __init__(self, path: str) -> None:
        """Open or make the file. Raise OSError."""
        self._path = os.path.abspath(path)
        self._fd, self._put = self._open()

    def _open(self) -> tuple[int, Callable[[bytes], int]]:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o666)
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        return fd, LineFile(fd).put if is_file else lambda data: os.write(fd, data)

    def put(self, data: bytes) -> int:
        """Write; return how many bytes were taken."""
        try:
            return self._put(data)
        except OSError:
            return 0

    def reopen(self) -> None:
        """Open the file of that name again: it may be another one by now. Raise OSError; the old one then stays."""
        old, (self._fd, self._put) = self._fd, self._open()
        os.close(old)


class Log:
    """Diagnostics: one line for each record of a level that is on.

    Logging never blocks: beyond 64 KiB of backlog, records are dropped and counted; the next record that gets through
    is preceded by one that says how many.
    """

    def __init__(self) -> None:
        self.level = WARNING        # the lowest that is on
        self.line: Callable[[float, int, str, Mapping[str, int]], str] = text_line
        self.output: Output | None = None
        self._file: LogFile | None = None
        self._dropped = 0

    def write_to(self, file: LogFile) -> None:
        """Log to a file from now on."""
        self._file, self.output = file, Output(file.put)

    def reopen(self) -> None:
        """Open the log file again, if there is one: it has been renamed."""
        self.flush()
        try:
            if self._file is not None:
                self._file.reopen()
        except OSError as error:
            self.error("cannot reopen the log: %s", error.strerror)

    def flush(self) -> None:
        """Write the backlog, as far as that is possible now."""
        if self.output is not None and self.output.pending:
            self.output.flush()

    def count(self, what: str, counters: Mapping[str, int]) -> None:
        """Log counters, whatever the level is."""
        self._note(INFO, what, (), counters)

    def debug(self, template: str, *arguments: object) -> None:
        """Log what happens to single datagrams."""
        if self.level <= DEBUG:
            self._note(DEBUG, template, arguments)

    def info(self, template: str, *arguments: object) -> None:
        """Log what happens."""
        if self.level <= INFO:
            self._note(INFO, template, arguments)

    def warning(self, template: str, *arguments: object) -> None:
        """Log what somebody should know of."""
        if self.level <= WARNING:
            self._note(WARNING, template, arguments)

    def error(self, template: str, *arguments: object) -> None:
        """Log what somebody should do something about."""
        if self.level <= ERROR:
            self._note(ERROR, template, arguments)

    def _note(self, level: int, template: str, arguments: tuple[object, ...],
              counters: Mapping[str, int] = NO_COUNTERS) -> None:
        if self.output is None:
            return
        if self.output.pending >= OUTPUT_LIMIT:
            self._dropped += 1
            return
        if self._dropped:
            self._write(WARNING, f"{self._dropped} records lost", {})
            self._dropped = 0
        self._write(level, template % arguments if arguments else template, counters)
        self.output.flush()

    def _write(self, level: int, message: str, counters: Mapping[str, int]) -> None:
        assert self.output is not None
        self.output.write((self.line(time.time(), level, message, counters) + "\n").encode("utf-8", "backslashreplace"))


log = Log()


# --- the UDP socket -------------------------------------------------------------------------------------------

DATAGRAMS_PER_TURN = 128        # read from the socket before timers and acks get their turn, by a client ...
SERVER_DATAGRAMS = 512          # ... and by a server: what it has not read when thousands come at once gets lost, ...
READ_TIME = 0.01                # ... and comes again. But it reads no more after so many seconds
SOCKET_BUFFER = 4 * 2 ** 20     # bytes asked from the kernel, for bursts
UDP_SEGMENT = 103 if sys.platform == "linux" else 0     # of udp(7); the socket module does not have it


def is_link_local(host: str) -> bool:
    """Return whether ``host`` is in fe80::/10: it means something only together with an interface (RFC 4007 §6)."""
    return host[:3] in ("fe8", "fe9", "fea", "feb") and ":" not in host[:4]


def seen_from(server: Address, address: Address) -> Address | None:
    """Return how a client of ``server`` reaches ``address``; None if it cannot: another family, or another link."""
    host, port = address
    if (":" in host) != (":" in server[0]) or "%" in host:     # an interface of another machine
        return None
    if is_link_local(host):
        return (host + server[0][server[0].index("%"):], port) if "%" in server[0] else None
    return address


def unmapped(address: tuple[Any, ...]) -> Address:
    """Return what a socket or a look-up calls an address as (host, port).

    An IPv4-mapped host (RFC 4291 §2.5.5.2) becomes IPv4. A link-local one keeps its interface, as its scope id.
    """
    host = address[0]
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    elif len(address) > 3 and address[3] and is_link_local(host):
        host = f"{host}%{address[3]}"
    return host, address[1]


def for_ipv6_socket(address: Address) -> tuple[Any, ...]:
    """Return ``address`` as an IPv6 socket accepts it: the opposite of ``unmapped``."""
    host, port = address
    if ":" not in host:
        return "::ffff:" + host, port
    host, _, scope = host.partition("%")
    return (host, port, 0, int(scope)) if scope else address


def show_address(address: Address) -> str:
    """Return ``HOST:PORT``, with brackets around an IPv6 host, and the name of the interface if the host has one."""
    host, port = address
    if "%" in host:
        host, _, scope = host.partition("%")
        try:
            host += "%" + socket.if_indextoname(int(scope))
        except OSError:     # it is gone
            host += "%" + scope
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def can_cut(sock: socket.socket) -> bool:
    """Return whether the system cuts what a UDP socket is given into datagrams (Linux 4.18 and later)."""
    try:
        return bool(UDP_SEGMENT) and sock.getsockopt(socket.IPPROTO_UDP, UDP_SEGMENT) == 0
    except OSError:
        return False


class UdpSocket:
    """The UDP socket: calls ``receive`` for each datagram, sends with ``send``. No error of it ends the program."""

    def __init__(self, sock: socket.socket, loop: SelectorLoop, per_turn: int = DATAGRAMS_PER_TURN) -> None:
        """``per_turn``: how many datagrams are read before others get their turn, at most."""
        self._sock, self._loop, self._per_turn = sock, loop, per_turn
        self._is_ipv6 = self._unmaps = sock.family == socket.AF_INET6
        self._receive_from: Callable[[int], tuple[bytes, Any]] = sock.recvfrom
        self.datagrams_in = self.bytes_in = self.datagrams_out = self.bytes_out = self.not_sent = 0
        self.receive: Callable[[bytes, Address], None] = lambda datagram, address: None
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            except OSError as error:    # macOS refuses what is too much, Linux gives less
                log.debug("no socket buffer of %d bytes: %s", SOCKET_BUFFER, error)
        self._cuts = can_cut(sock)
        loop.watch(sock.fileno(), selectors.EVENT_READ, self._on_readable)

    def _on_readable(self) -> None:
        end = NEVER
        for number in range(self._per_turn):
            try:
                datagram, address = self._receive_from(MAX_RECEIVED)
            except OSError as error:
                if error.errno in TRANSIENT:
                    return
                log.debug("receiving: %s", error)     # ECONNREFUSED and the like: about a datagram sent before
                continue
            self.datagrams_in += 1
            self.bytes_in += len(datagram)
            self.receive(datagram, unmapped(address) if self._unmaps else address)
            if self._loop.reads_one:
                # Mostly there is no second one, and the read that finds that out costs as much as one that finds a
                # datagram: a line takes 7 % longer to its receipt. If there is more, the next turn begins at once.
                break
            if number % 8 == 7:
                if self._loop.clock() > end:
                    break
                end = min(end, self._loop.clock() + READ_TIME)
        self._loop.drained = False

    def send(self, datagram: bytes, address: Address) -> None:
        """Send; what cannot be sent is lost, like a datagram on its way: the sender's stream repeats it."""
        try:
            if self._is_ipv6 and ("%" in address[0] or ":" not in address[0]):
                self._sock.sendto(datagram, for_ipv6_socket(address))
            else:
                self._sock.sendto(datagram, address)
            self.datagrams_out += 1
            self.bytes_out += len(datagram)
        except OSError as error:
            self._note_not_sent(address, error)

    def send_series(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Send datagrams, as ``send`` does each; with one call if the system can cut what it is given into them.

        For that, all must have the same size; the last one may be shorter.
        """
        size = len(datagrams[0])
        is_even = len(datagrams) > 1 and set(map(len, datagrams[:-1])) == {size} and len(datagrams[-1]) <= size
        if not (is_even and self._cuts and self._send_joined(datagrams, size, address)):
            for datagram in datagrams:
                self.send(datagram, address)

    def _send_joined(self, datagrams: Sequence[bytes], size: int, address: Address) -> bool:
        """Send datagrams of that size with one call; return False if the system does not want that."""
        cut = socket.IPPROTO_UDP, UDP_SEGMENT, size.to_bytes(2, sys.byteorder)
        return self._send_message(datagrams, [*self._source(address), cut], address)

    def _send_message(self, datagrams: Sequence[bytes], control: list[tuple[int, int, bytes]],
                      address: Address) -> bool:
        """Send datagrams with one call; return False if the system does not want that."""
        where = for_ipv6_socket(address) if self._is_ipv6 else address
        try:
            self.bytes_out += self._sock.sendmsg(datagrams, control, 0, where)
            self.datagrams_out += len(datagrams)
        except OSError as error:
            if error.errno not in BUFFER_FULL:      # they are too large for a link on the way, say
                return False
            self._note_not_sent(address, error)
        return True

    def _source(self, peer: Address) -> list[tuple[int, int, bytes]]:
        """Return the control messages that choose the address from which a datagram for ``peer`` is sent."""
        return []

    def _note_not_sent(self, address: Address, error: OSError) -> None:
        self.not_sent += 1
        log.debug("sending to %s: %s", show_address(address), error)

    def own_address(self, peer: Address) -> Address | None:
        """Return from which address the system sends to ``peer``, as it is now; None if it does not say."""
        try:
            with socket.socket(socket.AF_INET6 if ":" in peer[0] else socket.AF_INET, socket.SOCK_DGRAM) as asked:
                asked.connect(for_ipv6_socket(peer) if "%" in peer[0] else peer)        # UDP: nothing is sent
                return asked.getsockname()[0], self._sock.getsockname()[1]
        except OSError:
            return None

    def counters(self) -> dict[str, int]:
        """Return what came and went since the start."""
        return {"datagrams_in": self.datagrams_in, "bytes_in": self.bytes_in, "datagrams_out": self.datagrams_out,
                "bytes_out": self.bytes_out, "not_sent": self.not_sent}


# --- answers from the address that was asked ------------------------------------------------------------------

MAX_ASKED = 65536               # peers of which a server remembers at which of its addresses they ask
WILDCARDS = ("0.0.0.0", "::")   # a socket bound to one of them receives at every address of the machine
IP_PKTINFO = {"linux": 8, "darwin": 26}.get(sys.platform, 0)       # the socket module has it from Python 3.12 on
PKTINFO_SPACE = socket.CMSG_SPACE(20)   # bytes of the larger of the two structures below
Asked = tuple[bytes, list[tuple[int, int, bytes]]]  # what came with a datagram, and what goes with the answers to it


@functools.lru_cache(maxsize=256)   # about as many as the machine has addresses; shared by all who ask there
def asked_at(info: bytes) -> Asked:
    """Return ``info``, and the control messages that make the address in it the source of a datagram.

    ``info`` came with a datagram: struct in_pktinfo of ip(7), (interface, local address, destination), or in6_pktinfo
    of RFC 3542 §6, (destination, interface). The interface goes back only with a link-local one: else, routes decide.
    """
    if len(info) == 12:         # the local address differs from the destination if that is a broadcast address, ...
        ipv4 = info[4:8] if any(info[4:8]) else info[8:]    # ... and is left out by macOS
    elif info.startswith(b"\0" * 10 + b"\xff" * 2):    # IPv4-mapped
        ipv4 = info[12:16]
    elif len(info) < 20 or info[0] == 0xFF:     # a multicast address is nobody's source: the kernel chooses
        return info, []
    else:
        interface = info[16:] if info[0] == 0xFE and info[1] & 0xC0 == 0x80 else bytes(4)
        return info, [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info[:16] + interface)]
    return info, [(socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + ipv4 + bytes(4))]


class AnsweringSocket(UdpSocket):
    """The UDP socket of a server that listens at all addresses: it answers each peer from the one that was asked.

    The kernel chooses by the route to the peer, and another one when routes or addresses change: a client would hear
    from an address that it does not know. So it is remembered to which address the last datagram of a peer came, for
    ``MAX_ASKED`` peers. For others, where that address is gone, and on systems that do not tell, the kernel chooses.
    """

    def __init__(self, sock: socket.socket, loop: SelectorLoop, per_turn: int = DATAGRAMS_PER_TURN) -> None:
        super().__init__(sock, loop, per_turn)
        self._asked: dict[Address, Asked] = {}      # by peer; the oldest first
        if IP_PKTINFO:
            ipv6, ipv4 = (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO), (socket.IPPROTO_IP, IP_PKTINFO)
            try:
                sock.setsockopt(*(ipv6 if self._is_ipv6 else ipv4), 1)
                self._receive_from, self._unmaps = self._receive_and_remember, False
            except OSError:
                pass

    def _receive_and_remember(self, size: int) -> tuple[bytes, Address]:
        datagram, control, _, address = self._sock.recvmsg(size, PKTINFO_SPACE)
        if self._is_ipv6:
            address = unmapped(address)
        if control:
            asked = self._asked.get(address)
            if asked is None or asked[0] != control[0][2]:
                if asked is None and len(self._asked) >= MAX_ASKED:
                    del self._asked[next(iter(self._asked))]
                self._asked[address] = asked_at(control[0][2])
        return datagram, address

    def _source(self, peer: Address) -> list[tuple[int, int, bytes]]:
        asked = self._asked.get(peer)
        return asked[1] if asked is not None else []

    def send(self, datagram: bytes, address: Address) -> None:
        """Send as ``UdpSocket`` does, from the address where that peer has asked."""
        asked = self._asked.get(address)
        if asked is None or not self._send_message((datagram,), asked[1], address):
            super().send(datagram, address)     # not asked anywhere, or that address is gone (RFC 8981), say


# --- names ----------------------------------------------------------------------------------------------------

MAX_ADDRESSES = 8             # of one name that are asked
ATTEMPTS = 5                  # in which each address of a peer that is lost is asked once
LOOK_UP_INTERVAL = 4.0        # s between the first look-ups while a peer is lost; each further one takes twice that ...
MAX_LOOK_UP_INTERVAL = 20.0   # ... up to this: a name that has moved is noticed in that time
LookUp = Callable[[Callable[[Sequence[Address]], None]], None]      # calls back with what was found; nothing: it failed


def in_turns(addresses: Iterable[Address]) -> list[Address]:
    """Return the order in which to try the addresses of a name: IPv4 and IPv6 by turns (RFC 8305 §4), each once.

    IPv4 comes first: a server listens there unless it is told otherwise. At most ``MAX_ADDRESSES`` are returned.
    """
    each = list(dict.fromkeys(addresses))
    pairs = zip_longest((one for one in each if ":" not in one[0]), (one for one in each if ":" in one[0]))
    return [one for pair in pairs for one in pair if one is not None][:MAX_ADDRESSES]


class Endpoint:
    """Where a peer is whose name we were given: which addresses it may have, and which of them to ask when.

    - ``current``: where it was found last. ``other``: where it was found before, or what was asked when it answered
      from elsewhere. Until it is found, both are the first of ``addresses``.
    - ``addresses``: ``current``, then those of its name. While it answers, nobody asks at the others.
    - Whoever begins asks the first address alone, which mostly is enough, then all of them. A peer that was there
      before and is lost may be away for long: each address is asked once in ``ATTEMPTS``.
    - The name is looked up again only while the peer does not answer, one look-up at a time, at growing intervals. What
      is found replaces the old addresses of the name. A failure changes nothing.
    """

    def __init__(self, loop: Loop, addresses: Sequence[Address], look_up: LookUp | None = None) -> None:
        """``addresses``: at least one, just looked up. ``look_up``: None if they were given as numbers, and stay."""
        self.addresses = list(addresses)
        self.current = self.other = self.addresses[0]
        self._loop, self._look_up = loop, look_up
        self._named = self.addresses
        self._was_found = self._is_looking = False
        self._interval = LOOK_UP_INTERVAL
        self._next = loop.now() + LOOK_UP_INTERVAL      # no look-up before that

    def to_ask(self, attempt: int, is_lost: bool) -> Sequence[Address]:
        """Return where to ask in an attempt, counted from 1. All but the first say that there was no answer yet."""
        if is_lost or attempt > 1:
            self._search()
        if is_lost:
            return self.addresses[attempt - 1::ATTEMPTS]
        return self.addresses[:1] if attempt == 1 else self.addresses

    def last_two(self) -> Sequence[Address]:
        """Return ``current`` and ``other``, once if they are the same."""
        return (self.current,) if self.current == self.other else (self.current, self.other)

    def found(self, address: Address) -> None:
        """Note that the peer has answered from ``address``."""
        self._interval = LOOK_UP_INTERVAL
        if address != self.current:
            log.info("the server answers from %s", show_address(address))
            was_asked = self._was_found or address not in self.addresses
            self.current, self.other = address, self.current if was_asked else address
        self._was_found = True
        self._merge()

    def _merge(self) -> None:
        if not self._was_found:
            self.current = self.other = self._named[0]
        self.addresses = list(dict.fromkeys([self.current, *self._named]))

    def _search(self) -> None:
        now = self._loop.now()
        if self._look_up is not None and not self._is_looking and now >= self._next:
            self._is_looking = True
            self._next = now + jittered(self._loop, self._interval)
            self._interval = min(2 * self._interval, MAX_LOOK_UP_INTERVAL)
            self._look_up(self._on_looked_up)

    def _on_looked_up(self, addresses: Sequence[Address]) -> None:
        self._is_looking = False
        new = [address for address in addresses if address not in self.addresses]
        if addresses:
            self._named = in_turns(addresses)
            self._merge()
        if new:
            log.info("the name leads to %s now", ", ".join(map(show_address, new)))


LOOK_UP_TIME = 20.0           # s that one look-up may take: a name server that is dead takes 5 s by itself
LOOK_UP_OUTPUT = 16384        # bytes that it may print
REAP_INTERVAL = 0.1           # s between looks whether a process has ended whose output has
# getaddrinfo may block for many seconds, and cannot be interrupted. The alarm is for a child whose parent was killed.
LOOK_UP_PROGRAM = """
import signal, socket, sys
signal.alarm(25)
try:
    found = socket.getaddrinfo(sys.argv[1], None, int(sys.argv[2]), socket.SOCK_DGRAM)
except (OSError, UnicodeError) as error:
    sys.exit(print("error", getattr(error, "errno", 0), getattr(error, "strerror", "")))
for entry in found[:64]:
    print(*entry[4][::3])
"""


class NameLookUp:
    """Looks up a name in a process of its own, so that the loop goes on meanwhile: a ``LookUp``.

    The process has none of our descriptors. It is killed after 20 s, and when this is closed. There is one at a time.
    """

    def __init__(self, loop: SelectorLoop, host: str, port: int, family: int = socket.AF_INET6) -> None:
        """``family``: of our socket. One of IPv6 reaches both."""
        self._loop, self._port = loop, port
        self._arguments = host, str(int(socket.AF_UNSPEC if family == socket.AF_INET6 else family))
        self._process: subprocess.Popen[bytes] | None = None    # until it has ended, and was waited for
        self._output = b""
        self.failure = 0, "no answer"       # why there was no address: errno, and in words
        self._done: Callable[[Sequence[Address]], None] = lambda addresses: None
        self._timer = RestartableTimer(loop, self._on_timeout)

    def __call__(self, done: Callable[[Sequence[Address]], None]) -> None:
        """Begin a look-up; call ``done`` with the addresses, with none if there are none, or it fails."""
        import subprocess       # here: it is rarely needed, and a start is measured
        self.failure = 0, "no answer"
        if self._process is not None:       # killed, and not gone: it hangs in the kernel
            done(())
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LOOK_UP_PROGRAM, *self._arguments], bufsize=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")
        except (OSError, ValueError) as error:      # ValueError: a NUL in the name
            log.info("cannot look up the name: %s", error)
            self.failure = (error.errno or 0, str(error)) if isinstance(error, OSError) else (0, "")
            done(())
            return
        assert self._process.stdout is not None
        self._output, self._done = b"", done
        self._loop.watch(self._process.stdout.fileno(), selectors.EVENT_READ, self._on_readable)
        self._timer.set(self._loop.now() + LOOK_UP_TIME)

    def _on_readable(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        data = read_some(self._process.stdout.fileno())
        self._output += data or b""
        if data == b"" or len(self._output) > LOOK_UP_OUTPUT:
            self._stop()
            self._done(self._addresses())

    def _addresses(self) -> list[Address]:
        """Return what was printed: a host in each line, and behind a link-local one its scope."""
        lines = [line.split() for line in self._output[:LOOK_UP_OUTPUT].decode("ascii", "replace").splitlines()]
        if lines and lines[0][:1] == ["error"]:
            self.failure = int(lines[0][1]), " ".join(lines[0][2:])
            return []
        return [unmapped((line[0], self._port, 0, int(line[-1]) if len(line) > 1 else 0)) for line in lines]

    def _on_timeout(self) -> None:
        log.info("the name was not looked up within %d s", LOOK_UP_TIME)
        self._stop()
        self._done(())

    def _stop(self) -> None:
        """Read no more, and make sure that the process ends."""
        assert self._process is not None and self._process.stdout is not None
        self._timer.cancel()
        self._loop.watch(self._process.stdout.fileno(), selectors.EVENT_READ, None)
        self._process.stdout.close()
        self._process.kill()
        self._reap()

    def _reap(self) -> None:
        """Wait for the end of the process, without blocking."""
        if self._process is not None and self._process.poll() is None:
            self._loop.call_at(self._loop.now() + REAP_INTERVAL, self._reap)
        else:
            self._process = None

    def close(self) -> None:
        """End a look-up that is going on; nobody is called back."""
        if self._timer.is_set:
            self._stop()
        if self._process is not None:
            import subprocess
            try:
                self._process.wait(REAP_INTERVAL)
            except subprocess.TimeoutExpired:
                pass        # it hangs in the kernel


# --- sockets for the first time ---------------------------------------------------------------------------------

LOOK_UP_PAUSE = 1.0            # s between look-ups of a name that cannot be looked up just now


class Usage(Exception):
    """The arguments are wrong; the text says how, in one line. Exit 2."""


class LookUpFailure(Usage):
    """A name cannot be looked up just now: whether there is such a name is not known."""


class Failure(Exception):
    """The program cannot do what it was asked; the text says why, in one line. Exit 1."""


NO_SUCH_NAME = [getattr(socket, name, None) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY", "EAI_SERVICE")]


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Return the addresses of ``host``. Raise Usage if it has none, LookUpFailure if that is not known now."""
    try:
        name = host.encode() if host.isascii() else host    # for text, the socket module imports what IDNA needs
        found = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM, flags=flags)
    except ValueError:      # it cannot be encoded, or there is a NUL in it
        raise no_address(host) from None
    except OSError as error:
        is_known = isinstance(error, socket.gaierror) and error.errno in NO_SUCH_NAME
        raise no_address(host, "" if is_known else error.strerror or str(error)) from None
    return usable(host, [unmapped(entry[4]) for entry in found])


def no_address(host: str, failure: str = "") -> Usage:
    """Return the error for a host of which no address is known; ``failure``: why not now, "" if there is none."""
    shown = clean(host) or repr(host)
    if failure:
        return LookUpFailure(f"cannot resolve {shown} now: {failure}")
    return Usage(f"cannot resolve {shown}" + (": no such address, or no such interface" if "%" in host else ""))


def usable(host: str, addresses: Sequence[Address]) -> list[Address]:
    """Return those of the addresses of ``host`` that say all that it takes to send there. Raise Usage."""
    found = [address for address in addresses if has_interface(address[0])]
    if not found:
        shown = clean(host) or repr(host)
        raise no_address(host) if "%" in host else Usage(
            f"{shown} is on every link: name the interface, as in {shown}%eth0")
    return found


def call_at_the_end(loop: SelectorLoop, end: float, callback: Callable[[], None]) -> None:
    """Call back at ``end``, by the monotonic clock."""
    if end < NEVER:
        loop.call_at(loop.now() + max(0.0, end - time.monotonic()), callback)


def look_up_apart(host: str, port: int, end: float) -> list[Address]:
    """Do what ``look_up`` does in another process: signals, and the ``end`` of the time, do not wait for the system."""
    loop, found = SelectorLoop(), list[Address]()
    look, has_ended = NameLookUp(loop, host, port), []

    def done(addresses: Sequence[Address]) -> None:
        found.extend(addresses)
        has_ended.append(True)
        loop.stop()
    call_at_the_end(loop, end, loop.stop)
    look(done)
    is_begun = not has_ended
    if is_begun:
        loop.run()
    look.close()
    loop.close()
    if found or not is_begun:       # no process could be started: the system is asked here
        return usable(host, found) if found else look_up(host, port)
    number, words = look.failure
    raise no_address(host, "" if number in NO_SUCH_NAME or not words else words)


def has_interface(host: str) -> bool:
    """Return whether the interface of a link-local ``host`` is named and exists; True for all other hosts."""
    if not is_link_local(host):
        return True
    try:
        return bool(socket.if_indextoname(int(host.partition("%")[2])))
    except (OSError, ValueError):
        return False


def look_up_patiently(host: str, port: int, end: float) -> list[Address]:
    """Return the same as ``look_up``; try until ``end``, by the monotonic clock, while it fails only for now."""
    if is_number(host):
        return look_up(host, port)
    failure = None
    while failure is None or time.monotonic() < end:
        try:
            return look_up_apart(host, port, end)
        except LookUpFailure as error:
            if end == NEVER:
                raise
            failure = failure or error      # the first: a later attempt may have had no time for an answer
            time.sleep(max(0.0, min(end - time.monotonic(), LOOK_UP_PAUSE)))
    raise Failure(f"nothing was sent: {failure}")


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Address]:
    """Return the first address at which a server may listen, and its family. Raise Usage if it has none."""
    found = look_up(host, port, socket.AI_PASSIVE)
    found.sort(key=lambda address: ":" in address[0])   # IPv4 first: a server listens there unless told otherwise
    return socket.AF_INET6 if ":" in found[0][0] else socket.AF_INET, found[0]


def bind(family: socket.AddressFamily, address: Address) -> socket.socket:
    """Return a UDP socket bound to ``address``. Raise OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(for_ipv6_socket(address) if family == socket.AF_INET6 else address)
    except OSError:
        sock.close()
        raise
    return sock


def reachable(host: str) -> str:
    """Return the address at which others reach a server that listens at ``host``: of all, the one that leads out."""
    if host not in WILDCARDS:       # the interface of a link-local one has a name of its own on each machine
        name, percent, _ = host.partition("%")
        return f"{name}%INTERFACE" if percent else host
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):   # RFC 5737, RFC 3849
        if family == socket.AF_INET or host == "::":
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect((elsewhere, 9))    # sends nothing: it only looks for the way
                    return str(sock.getsockname()[0])
            except OSError:
                pass
    return "127.0.0.1"


def is_number(host: str) -> bool:
    """Return whether ``host`` is an address, not a name that may lead elsewhere later."""
    try:
        look_up(host, 0, socket.AI_NUMERICHOST)
        return True
    except Usage:
        return False


def client_socket(addresses: Sequence[Address], is_named: bool, port: int) -> socket.socket:
    """Return a socket that reaches these addresses, and, by a name, whatever it may lead to later. Raise Failure.

    One of IPv6 reaches both families (RFC 3493 §5.3); where there is none, one of IPv4 must do.
    """
    try:
        if is_named or ":" in addresses[0][0]:
            try:
                return bind(socket.AF_INET6, ("::", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE or all(":" in host for host, _ in addresses):
                    raise
        return bind(socket.AF_INET, ("0.0.0.0", port))
    except OSError as error:
        raise Failure(f"cannot use port {port}: {error.strerror}") from None
