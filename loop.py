"""The event loop, and what it watches."""
from __future__ import annotations

import errno
import heapq
import math
import os
import re
import select
import selectors
import signal
import socket
import stat
import sys
import time
from collections import deque
from typing import (Any)
from collections.abc import Callable, Mapping

# --- texts ----------------------------------------------------------------------------------------------------

# what could forge a line or drive a terminal: C0 but the tab, DEL, C1, line separators, bidi controls; and surrogates
UNSAFE = "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def clean(text: str) -> str:
    """``text`` with every control character as its escape: fit for one line of a terminal."""
    if text.isprintable():
        return text
    return re.sub(UNSAFE, lambda match: ("\\x%02x" if match[0] < "\u0100" else "\\u%04x") % ord(match[0]), text)


def rfc3339(at: float) -> str:
    """A wall-clock time in UTC, to the millisecond (RFC 3339 §5.6)."""
    try:
        seconds, thousandths = divmod(math.floor(at * 1000), 1000)
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{thousandths:03d}Z"
    except (OverflowError, ValueError, OSError):
        return "1970-01-01T00:00:00.000Z"


# --- timers and the loop --------------------------------------------------------------------------------------

Address = tuple[str, int]
NEVER = float("inf")       # a time that does not come

LOST_TIME = 0.1           # s; what a turn took beyond it, or a wait ended later, did not run: it is not counted
WAITED = 0.00002          # s; a selector that returns sooner had something to return at once
MAX_WAIT = 86400.0        # s; a loop with nothing to do turns once in that time: selectors refuse more than some weeks
MOST_EVENTS = 64          # descriptors that one wait tells of; the program watches far fewer
COMPACT_TIMERS = 64       # cancelled timers that may lie in the heap; beyond, they may be half of it


class Timer:
    """A call that is due at a time; ``cancel`` is enough to forget it."""

    __slots__ = ("when", "callback", "_heap")

    def __init__(self, when: float, callback: Callable[[], None], heap: TimerHeap) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback
        self._heap = heap

    def cancel(self) -> None:
        """Makes sure that the callback is not called."""
        if self.callback is not None:
            self.callback = None
            self._heap.note_cancelled()


class TimerHeap:
    """Timers in the order of their times. Cancelled ones stay until they surface, or are too many."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Schedules ``callback`` for ``when``; timers of the same time run in the order of their making."""
        timer = Timer(when, callback, self)
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, timer))
        return timer

    def note_cancelled(self) -> None:
        """Takes note of one more cancelled timer, and removes all of them if they pile up."""
        self._cancelled += 1
        if self._cancelled > COMPACT_TIMERS and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_time(self) -> float:
        """When the first timer is due; ``NEVER`` if there is none."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0][0] if self._heap else NEVER

    def run(self, now: float) -> None:
        """Calls every timer that is due; those that they add run in the next turn."""
        last = self._count
        while self.next_time() <= now and self._heap[0][1] <= last:
            timer = heapq.heappop(self._heap)[2]
            callback, timer.callback = timer.callback, None
            assert callback is not None
            callback()


class SystemRandom:
    """Random numbers that nobody can foresee. (The standard ones take longer to import than the selectors.)"""

    def getrandbits(self, bits: int) -> int:
        """A number of so many bits."""
        return int.from_bytes(os.urandom(-(-bits // 8)), "big") >> -bits % 8

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high]."""
        return low + (high - low) * self.getrandbits(53) / 2 ** 53


# event -> the bits, of a selector or of epoll, that wake whoever waits for it: all but those of the other event, so an
# error wakes both
WAKES = {selectors.EVENT_READ: ~(selectors.EVENT_WRITE | getattr(select, "EPOLLOUT", 0)),
         selectors.EVENT_WRITE: ~selectors.EVENT_READ}
NOBODY: dict[int, tuple[int, Callable[[], None]]] = {}


class Loop:
    """One selector and one heap of timers. The owner sets ``settle``, called at the end of every turn."""

    def __init__(self) -> None:
        self.random = SystemRandom()
        self.wall = time.time       # gives the seconds since 1970
        self.clock = time.monotonic     # gives the seconds as of this very moment: for measuring inside a turn
        self.calm = True            # every descriptor that was ready was read empty
        self.reads_one = False      # most likely there is only one datagram, and no timer wants to know of all
        self.settle: Callable[[], None] = lambda: None
        self._selector = selectors.DefaultSelector()
        self._epoll = epoll_of(self._selector)
        self._wait: Callable[[float, int], list[tuple[int, int]]] = (
            self._select if self._epoll is None else self._epoll.poll)
        self._watched: dict[int, dict[int, tuple[int, Callable[[], None]]]] = {}    # fd -> event -> what wakes whom
        self._always: dict[int, dict[int, tuple[int, Callable[[], None]]]] = {}     # regular files: epoll refuses them
        self._timers = TimerHeap()
        self._lost = 0.0            # s of the clock that do not count
        self._now = self._woken = time.monotonic()      # when the last wait ended, as counted, and by the clock
        self._running = False
        self._waker, self._wake = socket.socketpair()
        for end in (self._waker, self._wake):
            end.setblocking(False)
        self.watch(self._waker.fileno(), selectors.EVENT_READ, self.take_signals)
        self._signals: dict[int, Callable[[], None]] = {}

    def now(self) -> float:
        """Seconds that this process was able to run, as of this turn."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Calls ``callback`` in the turn in which ``now()`` has reached ``when``."""
        return self._timers.call_at(when, callback)

    def watch(self, fd: int, event: int, callback: Callable[[], None] | None) -> None:
        """Calls ``callback`` whenever ``fd`` is ready for ``event`` (a selectors.EVENT_*); None: no more."""
        watchers = dict(self._watched.get(fd, NOBODY))      # a copy: a turn may be going through the old one
        had = bool(watchers)
        if callback is not None:
            watchers[event] = (WAKES[event], callback)
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
        """Calls ``callback`` in the loop, not in the handler, when the signal comes."""
        self._signals[number] = callback
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(number, lambda *_: None)

    def take_signals(self) -> None:
        """Calls back for the signals that have come until now."""
        try:
            numbers = self._waker.recv(64)
        except BlockingIOError:
            return
        for number in numbers:
            if number in self._signals:
                self._signals[number]()

    def stop(self) -> None:
        """Makes ``run`` return after this turn."""
        self._running = False

    def run(self) -> None:
        """Turns until ``stop``."""
        self._running = True
        while self._running:
            self._turn()

    def _turn(self) -> None:
        before = time.monotonic()
        took = before - self._woken
        if took > LOST_TIME:        # the turn before this one: it counts as LOST_TIME
            self._lost += took - LOST_TIME
        first = self._timers.next_time()
        timeout = first - (before - self._lost)
        if timeout < 0.0 or self._always:
            timeout = 0.0
        elif timeout > MAX_WAIT:
            timeout = MAX_WAIT
        events = self._wait(timeout, MOST_EVENTS)
        self._woken = woken = time.monotonic()
        if woken - before > timeout + LOST_TIME:
            self._lost += woken - before - timeout
        self._now = now = woken - self._lost
        self.reads_one = woken - before > WAITED and first > now
        self.calm = True
        for fd, ready in events:
            for wakes, callback in self._watched.get(fd, NOBODY).values():
                if ready & wakes:
                    callback()
        if self._always:
            for watchers in list(self._always.values()):
                for _, callback in watchers.values():
                    callback()
        if first <= now:
            self._timers.run(now)
        self.settle()

    def _select(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """Waits for at most ``timeout`` seconds; gives at most ``most`` descriptors that are ready, and what for."""
        return [(key.fd, event) for key, event in self._selector.select(timeout)[:most]]

    def close(self) -> None:
        """Gives the descriptors back."""
        signal.set_wakeup_fd(-1)
        if self._epoll is not None:
            self._epoll.close()
        self._selector.close()
        self._waker.close()
        self._wake.close()


def epoll_of(selector: selectors.BaseSelector) -> Any:
    """The epoll of a selector, to wait without the objects that ``select`` makes of events; None if it has none.

    It is another descriptor of the same epoll: both are to be closed.
    """
    if sys.platform == "linux" and type(selector) is selectors.EpollSelector:   # a subclass may wait in its own way
        return select.epoll.fromfd(os.dup(selector.fileno()))
    return None


class Alarm:
    """A timer that is set anew often: it is only moved forward when it must ring earlier than before."""

    def __init__(self, loop: Any, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._timer: Timer | None = None
        self._when = NEVER

    def set(self, when: float) -> None:
        """Rings at ``when`` (``NEVER``: not at all), not at the time set before."""
        self._when = when
        if when == NEVER:
            self.cancel()
        elif self._timer is None or when < self._timer.when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(when, self._ring)

    def cancel(self) -> None:
        """Does not ring."""
        self._when = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def is_set(self) -> bool:
        """Whether it will ring."""
        return self._timer is not None

    def _ring(self) -> None:
        self._timer = None
        when, self._when = self._when, NEVER
        if when > self._loop.now():
            self.set(when)
        else:
            self._callback()


JITTER = 0.25             # part by which every repeated request varies, up and down


def jittered(loop: Any, seconds: float) -> float:
    """``seconds``, 25 % more or less."""
    return float(seconds * loop.random.uniform(1 - JITTER, 1 + JITTER))


def new_id(loop: Any) -> int:
    """A random id of 63 bits."""
    return int(loop.random.getrandbits(63))


# --- byte streams ---------------------------------------------------------------------------------------------

READ_SIZE = 65536         # bytes read from stdin in one turn
WRITE_SIZE = 65536        # bytes offered to stdout at once
OUTPUT_LIMIT = 65536      # bytes that wait for stdout before no more messages are shown
CHUNK_LIMIT = 4096        # the same in calls of ``write``: empty ones wait, too
ANSWER_LIMIT = 2 ** 20    # bytes that wait for it before no command is read: who writes one may not read meanwhile
TRANSIENT = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


def reopen(fd: int, flags: int) -> int:
    """A non-blocking descriptor of one's own for an inherited one, or that one itself where there is no such thing.

    O_NONBLOCK belongs to the open file description, which other processes share: it must not be set on theirs.
    Opening /proc/self/fd anew (Linux) or the terminal by its name gives a description of one's own.
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
    """At most ``READ_SIZE`` bytes, b"" at the end, None where there is nothing now. Raises OSError."""
    try:
        return os.read(fd, READ_SIZE)
    except OSError as error:
        if error.errno in TRANSIENT:
            return None
        raise


class Reader:
    """Standard input, of any kind: ``read`` gives what is there, b"" at the end, None where there is nothing now."""

    def __init__(self, fd: int) -> None:
        self.fd = fd        # to be watched: a FIFO whose writers have left does not tell that to who opens it anew
        try:
            self._own = reopen(fd, os.O_RDONLY)
        except OSError:     # closed
            self.fd = self._own = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.is_terminal = os.isatty(fd)

    def read(self) -> bytes | None:
        """At most ``READ_SIZE`` bytes."""
        try:
            return read_some(self._own)
        except OSError:
            return b""


class Writer:
    """A standard stream to write to, of any kind: ``put`` takes what goes without blocking."""

    def __init__(self, fd: int) -> None:
        try:
            self.fd = reopen(fd, os.O_WRONLY)
            mode = os.fstat(self.fd).st_mode
        except OSError:     # closed
            self.fd, mode = fd, 0
        self.is_terminal = os.isatty(self.fd)
        self.is_pipe = stat.S_ISFIFO(mode)
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self._may_block = self.fd == fd and (self.is_pipe or self.is_terminal)

    def put(self, data: bytes) -> int:
        """Writes; gives how many bytes were taken, 0 if none can be now. Raises OSError if the reader is gone."""
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            if not self._may_block:
                return os.write(self.fd, data)
            if select.select([], [self.fd], [], 0)[1]:
                return os.write(self.fd, data[:select.PIPE_BUF])    # a writable pipe takes so much
            return 0
        except OSError as error:
            if error.errno in TRANSIENT:
                return 0
            raise


class Output:
    """What waits to be written to one stream, in order, and who is told when it is.

    ``put`` takes bytes and gives how many were taken. ``broken`` tells that the reader is gone.
    """

    def __init__(self, put: Callable[[bytes], int]) -> None:
        self._put = put
        self._chunks: deque[tuple[bytes, Callable[[int], None] | None]] = deque()
        self.before: Callable[[], None] | None = None    # called before anything is written
        self.pending = 0        # bytes
        self.broken = False

    def write(self, data: bytes, written: Callable[[int], None] | None = None) -> None:
        """Appends ``data``; ``written`` is told how many of its lines are written, each time that some are.

        For empty data, it is told (0) when all that was appended before is written; if there is nobody to tell, nothing
        is appended.
        """
        if not self.broken and (data or written is not None):
            self._chunks.append((data, written))
            self.pending += len(data)

    def has_room(self) -> bool:
        """Whether messages may be written: not too much waits."""
        return self.pending < OUTPUT_LIMIT and len(self._chunks) < CHUNK_LIMIT

    def give_up(self) -> None:
        """Takes nothing any more: nobody reads it."""
        self.broken = True
        self._chunks.clear()
        self.pending = 0

    def flush(self) -> None:
        """Writes what can be written now, and tells whoever waits for it."""
        chunks = self._chunks
        while chunks and not self.broken:
            data = chunks[0][0] if len(chunks) == 1 else self._batch()
            taken = 0
            if data:
                if self.before is not None:
                    self.before()
                try:
                    taken = self._put(data)
                except OSError:
                    self.give_up()
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
        """The first chunk was written up to ``taken``: tells of its lines, keeps the rest."""
        data, written = self._chunks[0]
        self._chunks[0] = data[taken:], written
        lines = data.count(b"\n", 0, taken)
        if written is not None and lines:
            written(lines)


# --- the log and the socket -----------------------------------------------------------------------------------

MAX_RECEIVED = 65535      # bytes; the largest UDP datagram there is
DATAGRAMS_PER_TURN = 128  # read from the socket before timers and acks get their turn
SOCKET_BUFFER = 4 * 2 ** 20     # bytes asked from the kernel, for bursts


LEVELS = ("debug", "info", "warning", "error")
DEBUG, INFO, WARNING, ERROR = range(len(LEVELS))
NO_COUNTERS: Mapping[str, int] = {}


def text_line(at: float, level: int, message: str, counters: Mapping[str, int]) -> str:
    """A record of the log for people, in local time."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    counts = "".join(f" {name}={count}" for name, count in counters.items())
    return clean(f"{stamp},{int(at % 1 * 1000):03d} {LEVELS[level].upper()} {message}{':' if counts else ''}{counts}")


def json_line(at: float, level: int, message: str, counters: Mapping[str, int]) -> str:
    """A record of the log for programs."""
    import json
    return json.dumps({"time": rfc3339(at), "level": LEVELS[level], "message": message, **counters})


class LogFile:
    """A file that the log is appended to. What a full disk does not take waits, and is tried again."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._path = os.path.abspath(path)
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(self._path, flags, 0o666)

    def put(self, data: bytes) -> int:
        """Writes; gives how many bytes were taken."""
        try:
            return os.write(self._fd, data)
        except OSError:
            return 0

    def reopen(self) -> None:
        """Opens the file of that name, which may be another by now. Raises OSError: then the old one stays."""
        fd = self._open()
        os.close(self._fd)
        self._fd = fd


class Log:
    """Diagnostics: one line for each record of a level that is on, to an output that never blocks.

    While nobody reads that output, what exceeds its limit is lost; the next record that gets through tells how many.
    """

    def __init__(self) -> None:
        self.level = WARNING        # the lowest that is on
        self.line: Callable[[float, int, str, Mapping[str, int]], str] = text_line
        self.output: Output | None = None
        self._file: LogFile | None = None
        self._lost = 0

    def write_to(self, file: LogFile) -> None:
        """From now on, what is logged goes to a file."""
        self._file, self.output = file, Output(file.put)

    def reopen(self) -> None:
        """Opens the file anew, if there is one: it has been renamed."""
        self.flush()
        try:
            if self._file is not None:
                self._file.reopen()
        except OSError as error:
            self.error("cannot open the log anew: %s", error.strerror)

    def flush(self) -> None:
        """Writes what waits, as far as that goes now."""
        if self.output is not None and self.output.pending:
            self.output.flush()

    def count(self, what: str, counters: Mapping[str, int]) -> None:
        """Tells how often what happened, whatever the level is."""
        self._note(INFO, what, (), counters)

    def debug(self, template: str, *arguments: object) -> None:
        """What happens to single datagrams."""
        if self.level <= DEBUG:
            self._note(DEBUG, template, arguments)

    def info(self, template: str, *arguments: object) -> None:
        """What happens."""
        if self.level <= INFO:
            self._note(INFO, template, arguments)

    def warning(self, template: str, *arguments: object) -> None:
        """What somebody should know of."""
        if self.level <= WARNING:
            self._note(WARNING, template, arguments)

    def error(self, template: str, *arguments: object) -> None:
        """What somebody should do something about."""
        if self.level <= ERROR:
            self._note(ERROR, template, arguments)

    def _note(self, level: int, template: str, arguments: tuple[object, ...],
              counters: Mapping[str, int] = NO_COUNTERS) -> None:
        if self.output is None:
            return
        if self.output.pending >= OUTPUT_LIMIT:
            self._lost += 1
            return
        if self._lost:
            self._write(WARNING, f"{self._lost} records lost", {})
            self._lost = 0
        self._write(level, template % arguments if arguments else template, counters)
        self.output.flush()

    def _write(self, level: int, message: str, counters: Mapping[str, int]) -> None:
        assert self.output is not None
        self.output.write((self.line(time.time(), level, message, counters) + "\n").encode("utf-8", "backslashreplace"))


log = Log()


def normal(address: tuple[Any, ...]) -> Address:
    """An address of the socket as (host, port); an IPv4-mapped one as IPv4."""
    host = address[0]
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    return host, address[1]


class Port:
    """A UDP socket: gives datagrams to ``receive``, takes them with ``send``. No error of it ends the program."""

    def __init__(self, sock: socket.socket, loop: Loop) -> None:
        self._sock = sock
        self._loop = loop
        self._mapped = sock.family == socket.AF_INET6
        self.datagrams_in = self.bytes_in = self.datagrams_out = self.bytes_out = self.not_sent = 0
        self.receive: Callable[[bytes, Address], None] = lambda datagram, address: None
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        loop.watch(sock.fileno(), selectors.EVENT_READ, self._on_readable)

    def _on_readable(self) -> None:
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                datagram, address = self._sock.recvfrom(MAX_RECEIVED)
            except OSError as error:
                if error.errno in TRANSIENT:
                    return
                log.debug("receiving: %s", error)     # ECONNREFUSED and the like: about a datagram sent before
                continue
            self.datagrams_in += 1
            self.bytes_in += len(datagram)
            self.receive(datagram, normal(address) if self._mapped else address)
            if self._loop.reads_one:
                break       # to look for more would cost as much; if there is more, the next turn begins at once
        self._loop.calm = False

    def send(self, datagram: bytes, address: Address) -> None:
        """Sends; what cannot be sent is lost, like a datagram on the way: whoever sent it will repeat it."""
        try:
            if self._mapped and ":" not in address[0]:
                self._sock.sendto(datagram, ("::ffff:" + address[0], address[1]))
            else:
                self._sock.sendto(datagram, address)
            self.datagrams_out += 1
            self.bytes_out += len(datagram)
        except OSError as error:
            self.not_sent += 1
            log.debug("sending to %s: %s", show_address(address), error)

    def counters(self) -> dict[str, int]:
        """What came and went since the start."""
        return {"datagrams_in": self.datagrams_in, "bytes_in": self.bytes_in, "datagrams_out": self.datagrams_out,
                "bytes_out": self.bytes_out, "not_sent": self.not_sent}


def show_address(address: Address) -> str:
    """``HOST:PORT``, with brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
