#!/usr/bin/env python3
"""What happens: the event loop, the server and the client that run on it, and the command line.

Rules of this file
------------------
- One thread, one selector, one heap of timers. Nothing blocks but the selector's own wait (and SQLite's commit).
- ``Server`` and ``Client`` do not know each other, and touch nothing impure but what the loop hands them: ``now``,
  ``wall``, ``call_at``, ``random``, a function that sends a datagram, an ``Output``; beside that, they write to the
  log. So tests run the very same objects in a simulated world.
- Dispatch is a table from tag or command to method.

One turn of the loop
--------------------
    wait     until a descriptor is ready or the first timer is due
    read     every ready descriptor, bounded, so that no source starves another (of a socket, one datagram after a wait)
    run      every timer that is due
    settle   once, in this order: commit the store; send what windows allow; write stdout; send acks for what store
             and stdout have really taken

``now`` is taken once, after the wait, and holds until the turn has ended.

"Persist, then show, then acknowledge" is what makes an ack a promise. A timeout that would call somebody dead acts only
when the socket was read empty (``calm``), and the time in which this process itself did not run does not count.
"""
from __future__ import annotations

# The start of the program is measured (tests/bench.py): what takes long to import is imported where it is used, and
# the garbage collector does not look at what is imported, now and again, since all of it stays.
import gc
if gc.isenabled():
    gc.disable()
import signal
import sys
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # whoever is interrupted while it imports prints no traceback
import argparse
import errno
import functools
import heapq
import itertools
import os
import re
import select
import selectors
import socket
import time
import unicodedata
from collections import OrderedDict, deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

import protocol
from protocol import (MAX_RECEIVED, MAX_TEXT, NEVER, REFUSED, SILENT, Address, Decoder, Inbox, Info, Outbox, Place,
                      ReceiveStream, Run, SendStream, addressed, are_short, encode, mail_runs, mail_sizes, padded,
                      since_of, table_map)
from registry import (ASK, EVICTED, GRANTED, MAILBOX_LIMIT, MAX_CLIENTS, MAX_KNOWN, NICK_LAPSE, ONLINE, PROBE, REPLACED,
                      SILENCE, TAKEN, UNKNOWN, BYE, DAY, Mailbox, Mirror, Page, Parcel, Registry, Session, StoreError,
                      Table, load_secret, token_for)
from terminal import (ANSWER_LIMIT, FOR_PEOPLE, OUTPUT_LIMIT, ROUTINE, STATUS, TRANSIENT, Action, Board,
                      Commands, Desk, History, JsonLines, Lines, Output, Prompt, Reader, Sends, Style, Terminal, Writer,
                      clean, read_some, rfc3339, wants_color)
gc.freeze()
gc.enable()

VERSION = "1.0.0"


# --- the loop -------------------------------------------------------------------------------------------------

LOST_TIME = 0.1           # s; what a turn took beyond it, or a wait ended later, did not run: it is not counted
WAITED = 0.00002          # s; a selector that returns sooner had something to return at once
MAX_WAIT = 86400.0        # s; a loop with nothing to do turns once in that time: selectors refuse more than some weeks
MOST_EVENTS = 64          # descriptors that one wait tells of; the program watches far fewer
COMPACT_TIMERS = 64       # cancelled timers that may lie in the heap; beyond, they may be half of it


class Timer:
    """A call that is due at a time; ``cancel`` is enough to forget it."""

    __slots__ = ("when", "callback", "_heap")

    def __init__(self, when: float, callback: Callable[[], None], heap: "TimerHeap") -> None:
        self.when = when
        self.callback: Optional[Callable[[], None]] = callback
        self._heap = heap

    def cancel(self) -> None:
        """Makes sure that the callback is not called."""
        if self.callback is not None:
            self.callback = None
            self._heap.note_cancelled()


class TimerHeap:
    """Timers in the order of their times. Cancelled ones stay until they surface, or are too many."""

    def __init__(self) -> None:
        self._heap: List[Tuple[float, int, Timer]] = []
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
NOBODY: Dict[int, Tuple[int, Callable[[], None]]] = {}


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
        self._wait: Callable[[float, int], List[Tuple[int, int]]] = (
            self._select if self._epoll is None else self._epoll.poll)
        self._watched: Dict[int, Dict[int, Tuple[int, Callable[[], None]]]] = {}    # fd -> event -> what wakes whom
        self._always: Dict[int, Dict[int, Tuple[int, Callable[[], None]]]] = {}     # regular files: epoll refuses them
        self._timers = TimerHeap()
        self._lost = 0.0            # s of the clock that do not count
        self._now = self._woken = time.monotonic()      # when the last wait ended, as counted, and by the clock
        self._running = False
        self._waker, self._wake = socket.socketpair()
        for end in (self._waker, self._wake):
            end.setblocking(False)
        self.watch(self._waker.fileno(), selectors.EVENT_READ, self.take_signals)
        self._signals: Dict[int, Callable[[], None]] = {}

    def now(self) -> float:
        """Seconds that this process was able to run, as of this turn."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Calls ``callback`` in the turn in which ``now()`` has reached ``when``."""
        return self._timers.call_at(when, callback)

    def watch(self, fd: int, event: int, callback: Optional[Callable[[], None]]) -> None:
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

    def _select(self, timeout: float, most: int) -> List[Tuple[int, int]]:
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
        self._timer: Optional[Timer] = None
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


# --- descriptors ----------------------------------------------------------------------------------------------

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
        self.output: Optional[Output] = None
        self._file: Optional[LogFile] = None
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

    def _note(self, level: int, template: str, arguments: Tuple[object, ...],
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


def normal(address: Tuple[Any, ...]) -> Address:
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

    def counters(self) -> Dict[str, int]:
        """What came and went since the start."""
        return {"datagrams_in": self.datagrams_in, "bytes_in": self.bytes_in, "datagrams_out": self.datagrams_out,
                "bytes_out": self.bytes_out, "not_sent": self.not_sent}


def show_address(address: Address) -> str:
    """``HOST:PORT``, with brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- the server -----------------------------------------------------------------------------------------------

DEFAULT_PORT = 4119
PROBE_TIMEOUT = 0.5       # s; who does not answer a probe in this time is offline
PROBE_INTERVAL = 0.1      # s between repetitions inside that time
BROADCAST_GAP = 0.05      # s in which changes of the table are gathered
BROADCAST_SHARE = 10      # a broadcast takes at most this part of the server's time (1 / n), but ...
BROADCAST_WAIT = 2.0      # s; ... no change waits longer for the next one: its table would be wrong for so long
BROADCAST_DATAGRAMS = 500     # that tell clients of it in one turn
SYNC_PAGES = 32           # datagrams that answer one sync
SYNC_SLICE = 16           # clients whose sync is answered in one turn: 0.6 MB
CACHE_PAGES = 4096        # encoded pages of the table that are remembered: 5 MB
CACHE_AGE = 1000          # changes of the table, beside one for each entry, after which they are made anew
PAGE_SIZE = protocol.MAX_DATAGRAM - 96      # bytes of entries in one ``table``, beside its own fields and ``for``
COOKIE_TIME = 30.0        # s that a cookie's secret part lasts; a cookie is good for one to two of these
STRANGER_REPLIES = 20_000   # replies a second to those who have no session, at most
NOTICE_INTERVAL = 0.02    # s between slices of "I am back"
NOTICE_SLICE = 10         # datagrams in each: 500 a second
MAIL_AHEAD = 4096         # numbers of one client's mail in memory
MAIL_TOTAL = 16384        # numbers of everybody's mail in memory, beyond which each client's is loaded in small steps
MAIL_STEP = 64            # numbers: these
MAIL_RETRY = 1.0          # s until mail that could not be read from the store is tried again
MAX_SAVE_STREAMS = 8192   # streams whose receiving end is in memory; the store remembers the others
MAX_SAVED_EARLY = 16384   # numbers that came early, in all of them together: 48 MiB at most
DELETION_GAP = 0.2        # s in which what was acked may stay in the store: a commit for each ack would be slow
STORE_CALM = 1.0          # s without a failure after which the store counts as good again
HOUSEKEEPING = 3600.0     # s between looks for nicks that have lapsed
JITTER = 0.25             # part by which every repeated request varies, up and down


# why the server does nothing with what it got, or nothing yet, beside what is not valid at all: it is counted
NOT_FOR_SERVERS, NO_COOKIE, WRONG_COOKIE = "not_for_servers", "no_cookie", "wrong_cookie"
UNKNOWN_SESSION, OTHER_ADDRESS, UNKNOWN_STREAM = "unknown_session", "other_address", "unknown_stream"
NO_REPLY, SAVE_LIMIT, STORE_UNREADABLE = "no_reply", "save_limit", "store_unreadable"
DROPS = (NOT_FOR_SERVERS, NO_COOKIE, WRONG_COOKIE, UNKNOWN_SESSION, OTHER_ADDRESS, UNKNOWN_STREAM, NO_REPLY, SAVE_LIMIT,
         STORE_UNREADABLE)


def jittered(loop: Any, seconds: float) -> float:
    """``seconds``, 25 % more or less."""
    return float(seconds * loop.random.uniform(1 - JITTER, 1 + JITTER))


def new_id(loop: Any) -> int:
    """A random id of 63 bits."""
    return int(loop.random.getrandbits(63))


class Claim:
    """Somebody who wants a nick that somebody else may hold."""

    def __init__(self, address: Address, token: Optional[bytes], request: int) -> None:
        self.address = address
        self.token = token
        self.request = request


class Probe:
    """One question "are you there?", and all who wait for its answer."""

    def __init__(self, id_: int, nick: str, address: Address, session: Optional[Session], now: float) -> None:
        self.id = id_
        self.nick = nick
        self.address = address
        self.session = session
        self.deadline = now + PROBE_TIMEOUT
        self.saves: Dict[int, Tuple["SaveStream", int]] = {}    # stream -> who waits, for which number
        self.claim: Optional[Claim] = None


class SaveStream:
    """The server's end of the stream of one sender's messages for one recipient."""

    def __init__(self, session: Session, to: str, stream: ReceiveStream) -> None:
        self.session = session
        self.to = to
        self.stream = stream
        self.relay = False
        self.kept = 0       # texts that wait for the commit
        self.counted = 0    # numbers that the server has counted as waiting here
        self.nacks: List[Info] = []


class MailStream:
    """The server's end of the stream of one client's mail."""

    def __init__(self, server: "Server", session: Session, id_: int) -> None:
        frame = encode("mail", {"to": session.nick, "stream": id_, "n": protocol.MAX_NUMBER,
                                "base": protocol.MAX_NUMBER, "items": []})
        capacity = protocol.MAX_DATAGRAM - protocol.FOR_SIZE - len(frame) - 4 - protocol.MAIL_RUN_SIZE
        self.session = session
        self.stream = SendStream(id_, capacity)
        self.alarm = Alarm(server.loop, functools.partial(server.send_mail, session))
        self.loaded = session.offset    # the number in the mailbox of the last that is in the stream
        self.counted = 0                # numbers that the server has counted as in memory


class Server:
    """Keeps the table, probes who is doubted, keeps and delivers messages.

    ``receive`` takes datagrams, ``settle`` ends each turn; ``send`` is called with (datagram, address) there.
    """

    def __init__(self, loop: Any, send: Callable[[bytes, Address], None], registry: Registry,
                 nick_lapse: float = NICK_LAPSE, stranger_replies: int = STRANGER_REPLIES) -> None:
        self.loop = loop
        self.registry = registry
        self.decoder = Decoder()
        self.boot = new_id(loop)
        self.nick_lapse = nick_lapse
        self._send_now = send
        self._outbox: List[Tuple[bytes, Address]] = []
        self._secret = loop.random.getrandbits(256).to_bytes(32, "big")
        self._probes: Dict[int, Probe] = {}
        self._probing: Dict[Tuple[str, Address], Probe] = {}
        self._alive: Dict[str, float] = {}                      # when somebody last answered a probe for saves
        self._saves: "OrderedDict[Tuple[str, int], SaveStream]" = OrderedDict()
        self._saved_early = 0                                   # numbers that wait in them ...
        self._early: Dict[SaveStream, None] = {}                # ... in these; longest silent first
        self._dirty: Dict[Tuple[str, int], SaveStream] = {}     # to be kept and acked in this turn
        self._mails: Dict[bytes, MailStream] = {}
        self._mail_by_stream: Dict[int, MailStream] = {}
        self._mail_held = 0                                     # numbers of mail in memory
        self._to_mail: Dict[bytes, None] = {}
        self._page_cache: Dict[int, Tuple[bytes, int]] = {}     # version -> the page after it, the version it reaches
        self._cached_version = 0                                # of the table when the cache was empty
        self._to_sync: Dict[bytes, int] = {}                    # session -> the version that it holds
        self._sync_alarm = Alarm(loop, lambda: None)            # the end of the turn answers
        self._told = registry.table.version                     # version of the last broadcast
        self._broadcast_end = -NEVER
        self._broadcast_cost = 0.0
        self._telling: Optional[Iterator[Tuple[Session, bytes]]] = None     # who is still to be told what
        self._broadcast_alarm = Alarm(loop, lambda: None)      # the end of the turn tells
        self._silence_alarm = Alarm(loop, self._probe_silent)
        self._deletion_alarm = Alarm(loop, self._delete_acked)
        self._stranger_second = 0
        self._stranger_replies = 0
        self._most_replies = stranger_replies
        self._disk_failed = NEVER       # when the store could not be written last, until it can be again
        self._allowance = 0                                     # bytes that may answer the datagram at hand
        self._drops = dict.fromkeys(DROPS, 0)
        self._refusals = 0                                      # of nicks
        self._store_failures = 0
        self._handlers: Dict[str, Callable[[Info, Address], None]] = {
            "reg": self._on_reg, "ping": self._on_ping, "sync": self._on_sync, "save": self._on_save,
            "ack": self._on_ack, "alive": self._on_alive, "dereg": self._on_dereg}

    def start(self) -> None:
        """Tells the last known addresses that the server is there, and starts to look after the nicks."""
        self._notices: Deque[Address] = deque(
            (known.host, known.port) for known in self.registry.mailbox.known.values() if known.port)
        self.loop.call_at(self.loop.now(), self._send_notices)     # in a turn: what waits is sent at its end
        self._keep_house()

    def stop(self) -> bool:
        """Writes and closes the store; gives whether that went well."""
        committed = self._commit_all()
        self.registry.mailbox.close()
        return committed

    def receive(self, datagram: bytes, address: Address) -> None:
        """Takes a datagram from the network."""
        self._allowance = len(datagram)
        for tag, info in self.decoder.decode(datagram):
            handler = self._handlers.get(tag)
            if handler is not None:
                handler(info, address)
            else:
                self._drops[NOT_FOR_SERVERS] += 1

    def counters(self) -> Dict[str, int]:
        """What there is now, and what was counted since the start."""
        registry, known = self.registry, self.registry.mailbox.known
        return {"clients": len(registry.sessions), "online": registry.online, "nicks": len(known),
                "messages_kept": sum(one.messages for one in known.values()),
                "bytes_kept": sum(one.size for one in known.values()),
                "save_streams": len(self._saves), "mail_streams": len(self._mails), "probes": len(self._probes),
                "refusals": self._refusals, "store_failures": self._store_failures,
                "drop_invalid": self.decoder.dropped, **{f"drop_{why}": count for why, count in self._drops.items()}}

    # sending

    def _send(self, session: Session, *maps: bytes) -> None:
        self._outbox.append((addressed(session.id, *maps), session.address))

    def _may_reply(self, size: int) -> bool:
        """Whether ``size`` bytes may go where this datagram seems to come from, and counts them if so.

        That address may be forged: all answers to a datagram together are never more than it was, and there are not
        more than ``stranger_replies`` of them a second.
        """
        second = int(self.loop.now())
        if second != self._stranger_second:
            self._stranger_second, self._stranger_replies = second, 0
        if size > self._allowance or self._stranger_replies >= self._most_replies:
            self._drops[NO_REPLY] += 1
            return False
        self._allowance -= size
        self._stranger_replies += 1
        return True

    def _reply(self, address: Address, data: bytes) -> None:
        """Answers somebody whose address may be forged, if that is allowed."""
        if self._may_reply(len(data)):
            self._outbox.append((data, address))

    def _send_notices(self) -> None:
        for _ in range(min(NOTICE_SLICE, len(self._notices))):
            self._outbox.append((self._pong(0), self._notices.popleft()))
        if self._notices:
            self.loop.call_at(self.loop.now() + NOTICE_INTERVAL, self._send_notices)

    def _pong(self, id_: int, session: Optional[Session] = None, boot: Optional[int] = None) -> bytes:
        return encode("pong", {"id": id_, "boot": self.boot if boot is None else boot, "version": self._told,
                               "mail": self.registry.mail_number(session) if session is not None else 0})

    # sessions

    def _session(self, info: Info, address: Address) -> Optional[Session]:
        """The session that ``info`` speaks for, if it does so from where it is known to be; answers if not."""
        session = self.registry.sessions.get(info["session"])
        if session is None:
            self._drops[UNKNOWN_SESSION] += 1
            self._answer_unknown(info, address)
            return None
        if session.address != address:
            self._drops[OTHER_ADDRESS] += 1
            self._probe_move(session, address)
            return None
        self._heard(session)
        return session

    def _heard(self, session: Session) -> None:
        """Takes note of a sign of life, and of who comes back with it."""
        if self.registry.heard(session, self.loop.now()):
            log.info("%s is back", session.nick)
            self._watch_silence()
            self._wake_mail(session)

    def _answer_unknown(self, info: Info, address: Address) -> None:
        how = self.registry.closed.get(info["session"])
        if how == REPLACED:
            self._reply(address, encode("refused", {"session": info["session"], "nick": "-", "reason": how}))
        else:
            self._reply(address, self._pong(info.get("id", 0), boot=0 if how == EVICTED else None))

    def _probe_move(self, session: Session, address: Address) -> None:
        probe = self._probe(session.nick, address, session, proven=False)
        if probe is not None:
            log.info("%s speaks from %s: asking there", session.nick, show_address(address))

    def _on_reg(self, info: Info, address: Address) -> None:
        nick, request = info["nick"], info["id"]
        if not self._is_cookie(info.get("cookie"), address):
            self._drops[WRONG_COOKIE if "cookie" in info else NO_COOKIE] += 1
            if self._allowance >= protocol.REG_SIZE:
                self._reply(address, encode("cookie", {
                    "id": request, "server": self.registry.mailbox.server_id, "cookie": self._cookie(address, 0)}))
            return
        self._consider(nick, Claim(address, info.get("token"), request))

    def _consider(self, nick: str, claim: Claim) -> None:
        """Registers somebody who has proved an address, or refuses that, or asks first whether the holder is there."""
        session = self.registry.by_nick.get(nick)
        if session is not None and (session.address, session.request) == (claim.address, claim.request):
            self._welcome(session)
            return
        if claim.request in self.registry.spent:
            return      # a copy that was long on its way: whoever sent it has gone on since
        verdict = self.registry.claim(nick, claim.address, claim.token)
        holder = self.registry.holder(nick)
        if verdict == ASK and holder is not None:
            probe = self._probe(nick, holder, self.registry.by_nick.get(nick))
            if probe is not None and probe.claim is None:
                probe.claim = claim
        elif verdict == GRANTED:
            self._admit(nick, claim)
        else:
            self._refuse(nick, claim, verdict)

    def _cookie(self, address: Address, age: int) -> bytes:
        """A proof of address without state: HMAC over address and time (as in RFC 9147 §5.1, RFC 9000 §8.1.2)."""
        import hmac
        text = f"{show_address(address)} {int(self.loop.now() / COOKIE_TIME) - age}"
        return hmac.digest(self._secret, text.encode(), "sha256")[:protocol.SESSION_BYTES]

    def _is_cookie(self, cookie: Optional[bytes], address: Address) -> bool:
        import hmac
        return cookie is not None and any(hmac.compare_digest(cookie, self._cookie(address, age)) for age in (0, 1))

    def _admit(self, nick: str, claim: Claim) -> None:
        id_ = self.loop.random.getrandbits(128).to_bytes(protocol.SESSION_BYTES, "big")
        session = self.registry.admit(self.loop.now(), self.loop.wall(), id_, nick, claim.address, claim.token,
                                      claim.request)
        log.info("%s registered at %s", nick, show_address(claim.address))
        self._watch_silence()
        self._welcome(session)

    def _welcome(self, session: Session) -> None:
        self._outbox.append((encode("welcome", {
            "id": session.request, "nick": session.nick, "boot": self.boot, "session": session.id,
            "version": session.version}), session.address))

    def _refuse(self, nick: str, claim: Claim, reason: str) -> None:
        self._refusals += 1
        log.info("%s refused to %s: %s", nick, show_address(claim.address), reason)
        self._outbox.append((encode("refused", {"id": claim.request, "nick": nick, "reason": reason}), claim.address))

    def _on_dereg(self, info: Info, address: Address) -> None:
        if self.registry.closed.get(info["session"]) == BYE:
            self._reply(address, encode("bye", {"session": info["session"]}))
            return
        session = self._session(info, address)
        if session is not None:
            log.info("%s deregistered", session.nick)
            self.registry.deregister(session, self.loop.wall())
            self._outbox.append((encode("bye", {"session": session.id}), address))

    def _on_ping(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is not None:
            self._outbox.append((self._pong(info["id"], session), address))
            self._note_version(session, info["version"])

    def _note_version(self, session: Session, version: int) -> None:
        """A client holds the table up to ``version``: from its first on, it can take mail."""
        if not session.holds_table and version >= session.version:
            session.holds_table = True
            self._wake_mail(session)

    def _on_sync(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is None:
            return
        self._note_version(session, info["version"])
        self._to_sync[session.id] = info["version"]

    def _answer_syncs(self) -> None:
        """Tells those who asked what they miss of the table: each once a turn, and so many in each turn."""
        for id_ in list(self._to_sync)[:SYNC_SLICE]:
            version = self._to_sync.pop(id_)
            session = self.registry.sessions.get(id_)
            if session is not None:
                self._tell_missing(session, version)
        if self._to_sync:
            self._sync_alarm.set(self.loop.now())

    def _tell_missing(self, session: Session, since: int) -> None:
        version = self.registry.table.version
        if since >= version:
            self._send(session, self._table(Page(version, version, [])))    # nothing is missing: that is an answer
        for _ in range(SYNC_PAGES):
            if since >= version:
                break
            data, since = self._page_after(since)
            self._send(session, data)

    def _page_after(self, since: int) -> Tuple[bytes, int]:
        """The page of the table that begins at ``since``, encoded, and the version that it reaches.

        Full pages are remembered for the next who asks: what changed since then is in a later page.
        """
        version = self.registry.table.version
        if version - self._cached_version > CACHE_AGE + len(self.registry.table) or len(self._page_cache) > CACHE_PAGES:
            self._page_cache.clear()
            self._cached_version = version
        if since not in self._page_cache:
            start = since
            for count, page in enumerate(self.registry.table.pages(since, PAGE_SIZE), 1):
                self._page_cache[start] = self._table(page), page.version
                start = page.version
                if count == SYNC_PAGES:
                    break
        found = self._page_cache[since]
        if found[1] >= version:
            del self._page_cache[since]     # the last page is not full yet
        return found

    def _table(self, page: Page) -> bytes:
        return table_map(page.since, page.version, page.rows)

    # probes

    def _probe(self, nick: str, address: Address, session: Optional[Session],
               proven: bool = True) -> Optional[Probe]:
        """Asks whether ``nick`` is at ``address``; gives the question, None if it may not be sent.

        ``proven``: that somebody receives at that address is known.
        """
        probe = self._probing.get((nick, address))
        if probe is None:
            probe = Probe(new_id(self.loop), nick, address, session, self.loop.now())
            if not proven and not self._may_reply(len(self._probe_maps(probe))):
                return None
            self._probes[probe.id] = self._probing[nick, address] = probe
            self._ask(probe, once=not proven)
        return probe

    def _probe_maps(self, probe: Probe) -> bytes:
        maps = encode("probe", {"id": probe.id, "to": probe.nick})
        return addressed(probe.session.id, maps) if probe.session is not None else maps

    def _ask(self, probe: Probe, once: bool = False) -> None:
        """Repeats the question until it is answered or its time is over; to an unproven address, once."""
        if probe.id not in self._probes:
            return
        now = self.loop.now()
        if now >= probe.deadline and self.loop.calm:
            self._close_probe(probe)
            self._not_there(probe)
            return
        if now < probe.deadline:
            self._outbox.append((self._probe_maps(probe), probe.address))
        wait = PROBE_TIMEOUT if once else jittered(self.loop, PROBE_INTERVAL)
        self.loop.call_at(min(now + wait, max(probe.deadline, now + 0.001)), functools.partial(self._ask, probe))

    def _close_probe(self, probe: Probe) -> None:
        del self._probes[probe.id]
        del self._probing[probe.nick, probe.address]

    def _is_held_by(self, probe: Probe) -> bool:
        """Whether the probed address is still where the registry believes the nick to be."""
        return (probe.session is not None and self.registry.sessions.get(probe.session.id) is probe.session
                and probe.session.address == probe.address)

    def _not_there(self, probe: Probe) -> None:
        session = probe.session
        if session is not None and self._is_held_by(probe) and session.id in self.registry.live:
            log.info("%s does not answer: offline", probe.nick)
            self.registry.went_offline(session, self.loop.wall())
            self._send(session, self._pong(0, session))
        if probe.claim is not None:
            self.registry.not_there(probe.nick, probe.address)
            self._consider(probe.nick, probe.claim)

    def _on_alive(self, info: Info, address: Address) -> None:
        probe = self._probes.get(info["id"])
        if probe is None or (info["nick"], address) != (probe.nick, probe.address):
            self._on_late_alive(info, address)
            return
        session = probe.session
        if session is not None and info.get("session") != session.id:
            return
        self._close_probe(probe)
        if session is not None and self.registry.sessions.get(session.id) is session:
            if session.address != address:
                log.info("%s moved to %s", session.nick, show_address(address))
                self.registry.moved(session, address, self.loop.wall())
            self._heard(session)
            self._alive.pop(session.nick, None)
            self._alive[session.nick] = self.loop.now()
            if len(self._alive) > self.registry.max_clients:
                del self._alive[next(iter(self._alive))]
        if probe.claim is not None:
            self._refuse(probe.nick, probe.claim, TAKEN)
        for save, number in probe.saves.values():
            self._send_exists(save, number)

    def _on_late_alive(self, info: Info, address: Address) -> None:
        session = self.registry.sessions.get(info.get("session", b""))
        if session is not None and session.address == address:
            self._heard(session)

    def _watch_silence(self) -> None:
        first = next(iter(self.registry.live.values()), None)
        if first is not None and not self._silence_alarm.is_set:
            self._silence_alarm.set(first.heard + SILENCE)

    def _probe_silent(self) -> None:
        for session in self.registry.silent(self.loop.now()):
            self._probe(session.nick, session.address, session)
            self.registry.live.move_to_end(session.id)
        if self.registry.live:
            first = next(iter(self.registry.live.values()))
            self._silence_alarm.set(max(first.heard + SILENCE, self.loop.now() + PROBE_TIMEOUT))

    # keeping

    def _on_save(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is None:
            return
        key = (session.nick, info["stream"])
        if key not in self._dirty and len(self._dirty) >= MAX_SAVE_STREAMS:
            self._drops[SAVE_LIMIT] += 1
            return      # the sender will repeat it
        save = self._saves.get(key)
        if save is None:
            first = self.registry.mailbox.stream_next(*key)
            if not first:
                self._drops[STORE_UNREADABLE] += 1
                return      # the store cannot be read now; the sender will repeat it
            save = self._saves[key] = SaveStream(session, info["to"], ReceiveStream(info["stream"], first))
            self._forget_saves()
        elif save.to != info["to"]:
            self._drops[UNKNOWN_STREAM] += 1
            return
        self._saves.move_to_end(key)
        save.session, save.relay = session, info["relay"]
        save.stream.on_data(info["n"], list(zip(info["text"], info["at"])), info.get("more", ()), info["base"])
        save.stream.advance(info["base"])
        self._dirty[key] = save

    def _forget_saves(self) -> None:
        while len(self._saves) > MAX_SAVE_STREAMS:
            _, old = self._saves.popitem(last=False)
            self._saved_early -= old.counted
            self._early.pop(old, None)

    def _forget_early(self) -> None:
        """Forgets what came early in the longest silent streams, beyond the limit: their senders still hold it."""
        while self._saved_early > MAX_SAVED_EARLY:
            save = next(iter(self._early))
            save.stream.give_back(save.stream.next)
            self._count(save)

    def _count(self, save: SaveStream) -> None:
        """Counts anew what waits in a stream that was just heard, or emptied."""
        if self._saves.get((save.session.nick, save.stream.stream)) is save:
            self._saved_early += save.stream.buffered - save.counted
            save.counted = save.stream.buffered
            self._early.pop(save, None)
            if save.counted:
                self._early[save] = None

    def _keep(self, save: SaveStream) -> None:
        """Does with the messages of a stream what the registry says; what it keeps waits for the commit."""
        verdict = self.registry.judge(save.to, save.relay)
        if verdict == PROBE:
            self._doubt(save)
        elif verdict == UNKNOWN:
            self._refuse_rest(save, save.stream.next, UNKNOWN)
        else:
            for run in save.stream.take():
                if run.items and not self._keep_run(save, run):
                    break

    def _doubt(self, save: SaveStream) -> None:
        """Messages for somebody who is believed to be online: asks there, or tells that the answer has come."""
        first, last = save.stream.next, save.stream.reached - 1
        save.stream.give_back(first)
        recipient = self.registry.by_nick[save.to]
        if last < first:
            return
        if self.loop.now() - self._alive.get(save.to, -NEVER) < PROBE_TIMEOUT:
            self._send_exists(save, first)
            return
        probe = self._probe(save.to, recipient.address, recipient)
        if probe is not None and len(probe.saves) < MAX_SAVE_STREAMS:
            probe.saves[save.stream.stream] = (save, first)

    def _send_exists(self, save: SaveStream, number: int) -> None:
        entry = self.registry.table.get(save.to)
        if entry is not None:
            self._send(save.session, encode("exists", {"stream": save.stream.stream, "n": number,
                                                       "version": entry.version, "entry": entry.row()}))

    def _keep_run(self, save: SaveStream, run: Run) -> bool:
        """Keeps a run as far as the mailbox has room; False if the rest was refused."""
        texts, times = map(list, zip(*run.items))
        parcel = Parcel(run.first, texts, self._sane(times), run.more)
        fitting = self.registry.fitting(save.to, parcel)
        if fitting:
            kept = parcel if fitting == run.numbers else parcel.part(0, fitting)
            mailbox = self.registry.mailbox
            mailbox.keep(mailbox.known[save.to], save.session.nick, save.stream.stream, kept)
            save.kept += kept.messages
        if fitting == run.numbers:
            return True
        first = run.first + fitting
        if self.registry.table.is_online(save.to):
            save.stream.give_back(first)        # its mail is on the way: there will be room
        else:
            self._refuse_rest(save, first, "full")
        return False

    def _sane(self, times: List[float]) -> List[float]:
        """When messages were sent, as their sender says; now, where that cannot be."""
        wall = self.loop.wall()
        return [at if 0 <= at <= wall + DAY else wall for at in times]     # not true for NaN

    def _refuse_rest(self, save: SaveStream, first: int, reason: str) -> None:
        last = save.stream.reached - 1
        save.stream.give_back(first)
        if last >= first:
            save.nacks.append({"stream": save.stream.stream, "first": first, "last": last, "reason": reason})

    # settling

    def settle(self) -> None:
        """Ends a turn: commit, then everything that is to be sent."""
        for ended in self.registry.take_ended():
            self._drop_mail(ended)
        dirty, self._dirty = self._dirty, {}
        for save in dirty.values():
            self._keep(save)
        committed = self._commit()
        for save in dirty.values():
            self._answer_save(save, committed)
        self._forget_early()
        if self._to_mail:
            self._send_mails()
        if self._to_sync:
            self._answer_syncs()
        outbox, self._outbox = self._outbox, []
        for datagram, address in outbox:
            self._send_now(datagram, address)
        self._broadcast()

    def _commit(self) -> bool:
        """Writes what must be on the disk before it is told; what may be deleted waits for that, or for a while."""
        if self.registry.mailbox.urgent:
            return self._commit_all()
        if self.registry.mailbox.pending and not self._deletion_alarm.is_set:
            self._deletion_alarm.set(self.loop.now() + DELETION_GAP)
        return True

    def _delete_acked(self) -> None:
        self._commit_all()

    def _commit_all(self) -> bool:
        mailbox = self.registry.mailbox
        committed = mailbox.commit(self.loop.wall())
        now = self.loop.now()
        if not committed:
            self._store_failures += 1
            if self._disk_failed == NEVER:
                log.error("the store cannot be written: no mail is kept, no owner of a new nick is remembered")
            self._disk_failed = now
        elif now >= self._disk_failed + STORE_CALM:
            log.warning("the store can be written again")
            self._disk_failed = NEVER
        return committed

    def _answer_save(self, save: SaveStream, committed: bool) -> None:
        stream = save.stream
        if save.kept and not committed:
            self._refuse_rest(save, stream.next, "disk")
        elif committed:
            stream.all_written()
            recipient = self.registry.by_nick.get(save.to)
            if save.kept and recipient is not None:
                self._to_mail[recipient.id] = None
        save.kept = 0
        self._count(save)
        nacks, save.nacks = save.nacks, []
        self._send(save.session, encode("ack", stream.ack()), *(encode("nack", info) for info in nacks))

    # mail

    def _wake_mail(self, session: Session) -> None:
        mail = self._mails.get(session.id)
        if mail is not None:
            mail.stream.resume()
        self._to_mail[session.id] = None

    def _drop_mail(self, session: Session) -> None:
        mail = self._mails.pop(session.id, None)
        if mail is not None:
            mail.alarm.cancel()
            self._mail_held -= mail.counted
            del self._mail_by_stream[mail.stream.stream]

    def send_mail(self, session: Session) -> None:
        """Sends what is due of a client's mail, and loads more of it."""
        if session.id not in self.registry.live or not session.holds_table:
            return
        mail = self._mails.get(session.id)
        if mail is None:
            if not session.known.waiting:
                return
            mail = self._mails[session.id] = MailStream(self, session, new_id(self.loop))
            self._mail_by_stream[mail.stream.stream] = mail
        stream = mail.stream
        step = MAIL_AHEAD if self._mail_held < MAIL_TOTAL else MAIL_STEP
        if stream.held < step // 2 and mail.loaded < session.known.last:
            self._load_mail(mail, step)
        self._mail_held += stream.held - mail.counted
        mail.counted = stream.held
        for packet in stream.poll(self.loop.now()):
            self._send(session, encode("mail", {"to": session.nick, "stream": stream.stream, "n": packet.first,
                                                "base": stream.base, "items": mail_runs(packet.items)}))
        cannot_read = not stream.held and mail.loaded < session.known.last
        mail.alarm.set(self.loop.now() + MAIL_RETRY if cannot_read else stream.due())

    def _send_mails(self) -> None:
        """Sends what is due to those to whose mail something has happened."""
        for id_ in list(self._to_mail):
            session = self.registry.sessions.get(id_)
            if session is not None:
                self.send_mail(session)
        self._to_mail.clear()

    def _load_mail(self, mail: MailStream, step: int) -> None:
        mailbox = self.registry.mailbox
        damaged = mailbox.damaged
        letters = mailbox.fetch(mail.session.known, mail.loaded + 1, step)
        if mailbox.damaged > damaged:
            log.error("mail for %s is damaged in the store", mail.session.nick)
        # the longest letter between the longest nicks is more than that, but fits alone: its run is counted twice
        sizes = [min(size, mail.stream.capacity) for size in mail_sizes(letters)]
        continued = [number for number, letter in enumerate(letters, mail.stream.end) if letter[5]]
        mail.stream.queue(letters, sizes, continued)
        mail.loaded += len(letters)

    def _on_ack(self, info: Info, address: Address) -> None:
        mail = self._mail_by_stream.get(info["stream"])
        if mail is None or mail.session.address != address:
            self._drops[UNKNOWN_STREAM] += 1
            return
        session = mail.session
        self._heard(session)
        if mail.stream.on_ack(self.loop.now(), info["next"], info["have"], info["room"]):
            self.registry.mail_acked(session, mail.stream.base)
        self._to_mail[session.id] = None

    # the table

    def _broadcast(self) -> None:
        """Tells every client what changed, so many datagrams in each turn, after all else that was to be sent."""
        if self._telling is None and self.registry.table.version <= self._told:
            return
        now = self.loop.now()
        if self._telling is None:
            rest = min(BROADCAST_SHARE * self._broadcast_cost, BROADCAST_WAIT)
            due = self._broadcast_end + max(BROADCAST_GAP, rest)
            if due > now:
                self._broadcast_alarm.set(due)
                return
            self._begin_broadcast()
        assert self._telling is not None
        began = self.loop.clock()
        told = 0
        for session, page in itertools.islice(self._telling, BROADCAST_DATAGRAMS):
            told += 1
            if session.id in self.registry.live and session.holds_table:    # who does not will ask
                self._send_now(addressed(session.id, page), session.address)
        self._broadcast_cost += self.loop.clock() - began
        self._broadcast_end = now
        if told < BROADCAST_DATAGRAMS:
            self._telling = None
        more = self._telling is not None or self.registry.table.version > self._told
        self._broadcast_alarm.set(now if more else NEVER)

    def _begin_broadcast(self) -> None:
        pages = [self._table(page) for page in self.registry.table.pages(self._told, PAGE_SIZE)]
        self._told = self.registry.table.version
        self._broadcast_cost = 0.0
        self._telling = itertools.product(list(self.registry.live.values()), pages)

    # housekeeping

    def _keep_house(self) -> None:
        for known in self.registry.lapse(self.loop.wall(), self.nick_lapse):
            log.warning("%s has lapsed, with %d messages", known.nick, known.messages)
        self.registry.note_time(self.loop.wall())
        self.registry.mailbox.prune_streams()
        now = self.loop.now()
        self._alive = {nick: at for nick, at in self._alive.items() if now - at < PROBE_TIMEOUT}
        self.loop.call_at(now + HOUSEKEEPING, self._keep_house)


# --- the client -----------------------------------------------------------------------------------------------

REQUEST_INTERVAL = protocol.SERVER_INTERVAL     # s between attempts of a request to the server
REQUEST_ATTEMPTS = protocol.SERVER_ATTEMPTS
PING_INTERVAL = 15.0      # s between pings
LOST_PING_INTERVAL = 2.0  # s between pings while the server is silent
SYNC_INTERVAL = 0.2       # s between questions for what is missing of the table
OLD_TABLE_TIME = 30.0     # s that the table of a server that restarted stays in force while the new one comes
LINES_PER_TURN = 512      # of stdin that are carried out before the network gets its turn; sends to one nick are one
END_TIME = 1.5            # s after Ctrl-C until what is not closed counts as not delivered
LAST_TIME = 1.9           # s after Ctrl-C until the program ends, whatever is not written yet: two are promised
COOKIES_PER_ATTEMPT = 3        # cookies taken for one attempt to register
PROGRESS_INTERVAL = 0.5   # s between looks at how far a long pipe is
PROGRESS_LINES = 1000     # sends from which on it is long
SHOWN_OF_LINE = 80        # characters of a line that nobody understands
STDIN_LIMIT = 4 * MAX_TEXT     # bytes that ``send`` reads; that is too long anyway
LAST_REQUEST_INTERVAL = 0.1     # s between attempts to deregister when there is no time left
WAIT_SHOWN = 1.0          # s that a message waits before a terminal shows that it does
WAITS_SHOWN = 3           # recipients named there, at most


JOINING, ACTIVE, LEAVING, AWAY, ENDED = "joining", "active", "leaving", "away", "ended"

CLOSINGS = (protocol.RECEIVED, protocol.SAVED, REFUSED)
REFUSALS = ("unknown", "full", "disk")      # that have a line of their own

HELP = """\
send NICK MESSAGE   send MESSAGE (the rest of the line) to NICK
talk NICK           send every line to NICK from now on; commands then begin with / (/who, /end ends it)
dereg NICK          go offline (NICK: your own)
reg NICK            come online again
who                 show everybody who is known
help                show this
quit                go offline and end
"""


class Sent(NamedTuple):
    """A message on its way: what an event says of which one it is."""

    number: int         # the first that it takes in its stream
    id: str
    ref: object         # what its sender calls it
    began: float        # s, when it was queued


class Request:
    """Something that the server is asked until it answers: five times, 500 ms apart."""

    def __init__(self, loop: Any, ask: Callable[[], None], unanswered: Callable[[], None]) -> None:
        self._loop = loop
        self._ask = ask
        self._unanswered = unanswered
        self._interval = REQUEST_INTERVAL
        self._attempts = 0
        self._alarm = Alarm(loop, self._again)

    @property
    def is_running(self) -> bool:
        """Whether an answer is awaited."""
        return self._alarm.is_set

    def start(self) -> None:
        """Asks for the first time."""
        self._attempts = 0
        self._again()

    def hurry(self, interval: float) -> None:
        """Asks more often, from the next start on."""
        self._interval = interval

    def stop(self) -> None:
        """The answer is here, or nobody wants it any more."""
        self._alarm.cancel()

    def _again(self) -> None:
        if self._attempts < REQUEST_ATTEMPTS:
            self._attempts += 1
            self._alarm.set(self._loop.now() + jittered(self._loop, self._interval))
            self._ask()
        elif self._loop.calm:
            self._unanswered()
        else:
            self._alarm.set(self._loop.now())


class Client:
    """One user: commands come in by ``feed``, datagrams by ``receive``, lines go to the output.

    ``settle`` ends each turn. ``hungry`` tells whether commands may be read, ``exit_code`` is None until the end.
    """

    def __init__(self, loop: Any, send: Callable[[bytes, Address], None], output: Output, nick: str, server: Address,
                 secret: Optional[bytes] = None, ack_timeout: float = protocol.ACK_TIMEOUT, stay: bool = False,
                 mtu: int = protocol.MAX_DATAGRAM, errors: Optional[Output] = None,
                 lines: Optional[Lines] = None, prompt: Optional[Prompt] = None) -> None:
        self.loop = loop
        self.output = output
        self.errors = errors if errors is not None else Output(len)
        self.lines = lines if lines is not None else Lines()
        self.nick = nick
        self.server = server                    # where it is asked,
        self._given_server = server             # where it was said to be, and so is asked for a session,
        self._other_server = server             # and where it is asked next, if it is silent
        self.exit_code: Optional[int] = None
        self.hungry = False                     # whether stdin may be read now
        self.decoder = Decoder()
        self.state = JOINING
        self._send_now = send
        self._secret = secret
        self._stay = stay
        self._prompt = prompt                   # on a terminal
        self._write = output.write if prompt is None else self._write_above     # to stdout
        self._on_its_way: Dict[str, Deque[Sent]] = {}   # to whom what was sent, if anybody wants to know of which
        self._keeps_track = self.lines.is_for_programs or prompt is not None
        # what the server gave
        self._session: Optional[bytes] = None
        self._server_id: Optional[bytes] = None
        self._cookie: Optional[bytes] = None
        self._cookies_left = 0
        self._reg_id = 0
        self._mirror = Mirror()
        self._pages = 0                         # that came since the last sync ...
        self._synced = -NEVER                   # ... and when that was
        self._confirmed = False                 # the server was told, in this session, that the table is here
        self._visible = False                   # online in one's own table
        self._greeted = False                   # "[You have messages]" was shown for this coming online
        self._heard = False                     # the server has spoken in this turn
        self._was_visible = False               # commands are carried out since then
        self._pings: "OrderedDict[int, float]" = OrderedDict()      # id -> when it was sent
        self._request = Request(loop, self._send_reg, self._reg_unanswered)
        self._dereg = Request(loop, self._send_dereg, self._dereg_unanswered)
        self._ping = Request(loop, self._send_ping, self._ping_unanswered)
        self._ping_alarm = Alarm(loop, self._ping.start)
        self._sync_alarm = Alarm(loop, self._send_sync)
        self._old_table_alarm = Alarm(loop, self._distrust_table)
        self._hold_alarm = Alarm(loop, self._look_after_holds)
        self._next_turn = Alarm(loop, lambda: None)
        self._last_asked = -NEVER
        # what comes in
        self._inbox = Inbox()
        self._allowance = 0                     # bytes that may tell a stranger that this is somebody else
        self._table_news = False
        self._accepting = True                  # messages; no more once the program is about to leave
        # what goes out
        self._outbox = Outbox(nick, mtu, ack_timeout)
        self._outbox_alarm = Alarm(loop, lambda: None)      # the end of the turn polls it
        # commands
        self._input = Commands(self.lines.is_for_programs)
        self._quit = ""                         # "dereg" or "quit", once that command waits for its turn
        self._ending = ""                       # "end", "quit", "signal", "reader"
        self._interrupted = False
        self._deadline = NEVER
        self._failed = False                    # some message was neither delivered nor kept
        self._undelivered = 0
        self.queued = self.closed = 0           # messages, in all
        self._result = 0
        self._wait_alarm = Alarm(loop, lambda: None)        # the end of the turn shows who waits
        self._commands: Dict[str, Callable[[str, Sequence[str]], None]] = {
            "talk": self._do_talk, "end": self._do_end, "dereg": self._do_dereg, "reg": self._do_reg,
            "who": self._do_who, "help": self._do_help, "quit": self._do_quit}
        self._from_peers: Dict[str, Callable[[Info, Address], None]] = {
            "chat": self._on_chat, "ack": self._on_ack, "nack": self._on_nack, "cookie": self._on_cookie}
        self._from_server: Dict[str, Callable[[Info], None]] = {
            "table": self._on_table, "ack": self._on_ack, "nack": self._on_nack, "exists": self._on_exists,
            "mail": self._on_mail, "refused": self._on_refused, "bye": self._on_bye}

    # lines

    def tell(self, event: str, /, times: int = 1, **fields: Any) -> None:
        """Shows a line for an event (that often)."""
        line = self.lines.event(event, **fields)
        if line:
            self._write(line.encode() * times)
        else:
            complaint = self.lines.complaint(event, **fields).encode() * times
            if complaint:
                (self.errors.write if self._prompt is None else self._write)(complaint)

    def show_log(self, data: bytes) -> int:
        """Shows lines of the log, which would go to the same terminal; gives how many bytes were taken."""
        if not self.output.has_room():
            return 0
        self._write(data)
        return len(data)

    def _write_above(self, data: bytes, written: Optional[Callable[[int], None]] = None) -> None:
        """Appends to the output of a terminal, above the prompt."""
        if data and self._prompt is not None:
            self.output.write(self._prompt.erase())
        self.output.write(data, written)

    def _hand_back(self, nick: str, text: str, sent: Optional[Sent] = None, ref: object = None) -> None:
        """Names a message that was not delivered, as the line that would send it again."""
        self._undelivered += 1
        ref = ref if sent is None else sent.ref
        self.errors.write(self.lines.undelivered(nick, text, ref).encode())
        self.tell("undelivered", to=nick, text=text, ref=ref, id=None if sent is None else sent.id)

    # registering

    def start(self) -> None:
        """Registers."""
        self._register()

    def _register(self) -> None:
        self.server = self._other_server = self._given_server
        self._reg_id = new_id(self.loop)
        self._cookie = None
        self._request.start()

    def _send_reg(self) -> None:
        self._cookies_left = COOKIES_PER_ATTEMPT
        self._emit_reg()

    def _emit_reg(self) -> None:
        info: Info = {"id": self._reg_id, "nick": self.nick}
        if self._cookie is not None and self._server_id is not None:
            info["cookie"] = self._cookie
            if self._secret is not None:
                info["token"] = token_for(self._secret, self._server_id, self.nick)
        self._send_now(padded("reg", info, protocol.REG_SIZE), self.server)

    def _on_cookie(self, info: Info, address: Address) -> None:
        """The server answers, maybe from another of its addresses (one that listens on all of them cannot choose).

        In this session it is asked there. Only who got the request knows its id.
        """
        if info["id"] == self._reg_id and self._request.is_running and self._cookies_left:
            self._cookies_left -= 1
            if address != self.server:
                log.info("the server answers from %s", show_address(address))
                self.server, self._other_server = address, self.server
            self._server_id, self._cookie = info["server"], info["cookie"]
            self._emit_reg()

    def _on_welcome(self, info: Info) -> None:
        if info["id"] != self._reg_id or not self._request.is_running or info["nick"] != self.nick:
            return
        self._request.stop()
        self._server_heard(same=False)
        self._session = info["session"]
        self._outbox.register(self.loop.now(), info["session"])
        self._inbox.forget_mail(self.loop.now())
        self._visible = self._greeted = self._confirmed = False
        self.state = ACTIVE
        self.tell("registered", nick=self.nick)
        self._mirror.register(info["boot"], info["version"])
        if not (self._mirror.is_of_this_boot or self._old_table_alarm.is_set):
            self._old_table_alarm.set(self.loop.now() + OLD_TABLE_TIME)
        self._plan_ping()
        if self._mirror.is_of_this_boot and self._mirror.is_whole:
            self._confirm_table()
            self._look_at_oneself()
        else:
            self._send_sync()

    def _reg_unanswered(self) -> None:
        """Five attempts without an answer end a program that starts, or that was told to come online."""
        starting = self._is_starting()
        self._server_silent(always=starting)
        if starting:
            self._give_up(1)
        else:
            self._register()

    def _is_starting(self) -> bool:
        """Whether the client has not been online since it was started, or told to come online."""
        return self.state == JOINING or self.state == ACTIVE and not self._was_visible

    def _on_refused(self, info: Info) -> None:
        if "session" in info:
            own = info["session"] == self._session and not self._request.is_running
        else:
            own = info.get("id") == self._reg_id and self._request.is_running
        if not own or self.state in (AWAY, ENDED):
            return
        reason = info["reason"]
        if reason == "replaced":    # by somebody else, or by a late copy of a request of one's own: that will be seen
            self._session_is_gone()
            return
        self._request.stop()
        if reason == "full" and not self._is_starting():
            self.loop.call_at(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL), self._try_again)
            return
        self.tell({"full": "server-full", "owned": "owned"}.get(reason, "taken"), nick=self.nick)
        self._give_up(1)

    def _try_again(self) -> None:
        """Registers, if that is still wanted: the server that restarted was full."""
        if self.state == ACTIVE and not self._request.is_running:
            self._register()

    # the server's life

    def _server_heard(self, same: bool = True) -> None:
        """Takes note that the server is there; ``same``: and still knows this session."""
        self._heard = True
        if self._outbox.lost:
            self._outbox.lost = False
            self._plan_ping()
            if same or self.lines.is_for_programs:      # people see the welcome
                self.tell("back")

    def _server_silent(self, always: bool = False) -> None:
        """Announces an outage, once; ``always``: again, because the program ends over it."""
        if not self._outbox.lost or always:
            self.tell("silent")
        if not self._outbox.lost:
            self._outbox.lost = True
            if self._session is not None:
                self._ping_alarm.set(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL))

    def _plan_ping(self) -> None:
        self._ping.stop()
        self._ping_alarm.set(self.loop.now() + jittered(self.loop, PING_INTERVAL))

    def _send_ping(self) -> None:
        if self.state == ACTIVE and self._session is not None:
            self._emit_ping(self._session)
        else:
            self._ping.stop()

    def _emit_ping(self, session: bytes) -> None:
        id_ = new_id(self.loop)
        self._pings[id_] = self.loop.now()
        while len(self._pings) > 4 * REQUEST_ATTEMPTS:
            self._pings.popitem(last=False)
        self._ask_server("ping", {"id": id_, "session": session, "version": self._mirror.version})

    def _ask_server(self, tag: str, info: Info) -> None:
        self._send_now(padded(tag, info, protocol.SESSION_SIZE), self.server)

    def _ping_unanswered(self) -> None:
        if self._is_starting():
            self._server_silent(always=True)
            self._give_up(1)
            return
        self._server_silent()
        self.server, self._other_server = self._other_server, self.server
        self._ping_alarm.set(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL))

    def _ping_now(self) -> None:
        if not self._ping.is_running:
            self._ping.start()

    def _on_pong(self, info: Info) -> None:
        if self.state not in (ACTIVE, LEAVING):
            return
        sent = self._pings.pop(info["id"], None)
        if sent is None:
            if not self._ping.is_running and self.state == ACTIVE and self.loop.now() - self._last_asked > 1.0:
                self._last_asked = self.loop.now()
                self._ping_alarm.set(self.loop.now() + self.loop.random.uniform(0, 1))
            elif self.state == LEAVING and self._dereg.is_running:
                self._leave_check()
            return
        same = info["boot"] == self._mirror.boot
        self._server_heard(same)
        if not same:
            self._session_is_gone()
            return
        self._plan_ping()
        self._inbox.answer(sent, info["mail"])
        if self._mirror.expect(info["version"]):
            self._want_sync()

    def _leave_check(self) -> None:
        """Somebody says that the server has restarted: a ping will tell whether there is anything left to leave."""
        if self.loop.now() - self._last_asked > REQUEST_INTERVAL / 2 and self._session is not None:
            self._last_asked = self.loop.now()
            self._emit_ping(self._session)

    def _session_is_gone(self) -> None:
        """The server does not know this session any more: registers again, or has nothing to leave."""
        self._ping.stop()
        self._ping_alarm.cancel()
        self._sync_alarm.cancel()
        if self.state == LEAVING:
            self._went_away()
        elif not self._request.is_running:
            log.info("the server does not know this session any more: registering again")
            self._register()

    # the table

    @property
    def table(self) -> Table:
        """Who is known, as far as this client knows."""
        return self._mirror.table

    def _send_sync(self) -> None:
        if self.state != ACTIVE or self._session is None:
            return
        self._pages = 0
        self._synced = self.loop.now()
        interval = LOST_PING_INTERVAL if self._outbox.lost else SYNC_INTERVAL
        self._sync_alarm.set(self._synced + jittered(self.loop, interval))
        self._ask_server("sync", {"session": self._session, "version": self._mirror.version})

    def _want_sync(self) -> None:
        """Asks for what is missing, at once unless that was done just now."""
        if not self._sync_alarm.is_set:
            self._sync_alarm.set(max(self.loop.now(), self._synced + SYNC_INTERVAL))

    def _on_table(self, info: Info) -> None:
        if self.state != ACTIVE:
            return
        changed = self._mirror.apply(Page(since_of(info), info["version"], info["set"]))
        if changed is None:
            self._want_sync()
            return
        self._pages += 1
        self._note_changes(changed)
        if self._mirror.is_whole:
            self._sync_alarm.cancel()
            self._old_table_alarm.cancel()
            self._confirm_table()
            if not self._visible:
                self._look_at_oneself()
        elif self._pages >= SYNC_PAGES:
            self._send_sync()
        else:
            self._sync_alarm.set(self.loop.now() + jittered(self.loop, SYNC_INTERVAL))

    def _confirm_table(self) -> None:
        """Tells the server and the user, once a session, that the table is here: changes and mail may come."""
        if not self._confirmed:
            self._confirmed = self._table_news = True
            self._ping_now()

    def _distrust_table(self) -> None:
        """The table is too old to say who is online, and there is no other: messages go to the server."""
        self._note_changes(self._mirror.distrust())

    def _note_changes(self, nicks: Sequence[str]) -> None:
        if not nicks:
            return
        self._table_news = True
        for nick in nicks:
            self._outbox.locate(self.loop.now(), nick, self._place(nick))
        if self.nick in nicks:
            self._look_at_oneself()

    def _look_at_oneself(self) -> None:
        visible = self.table.is_online(self.nick) and self._mirror.is_of_this_boot
        if self._visible and not visible:
            self._greeted = False
            self._ping_now()
        elif not visible and self._mirror.is_of_this_boot:
            self._ping_now()
        self._visible = visible
        self._was_visible = self._was_visible or visible

    def _place(self, nick: str) -> Optional[Place]:
        entry = self.table.get(nick)
        if entry is None:
            return None
        return Place(entry.state == ONLINE, self._reach(entry.host, entry.port))

    def _reach(self, host: str, port: int) -> Optional[Address]:
        """An address, if it is of the family of ours: others can be sent to by the server alone."""
        return (host, port) if (":" in host) == (":" in self.server[0]) else None

    # datagrams

    def receive(self, datagram: bytes, address: Address) -> None:
        """Takes a datagram from the network."""
        if self.state == ENDED:
            return
        messages = self.decoder.decode(datagram)
        if address != self.server and address != self._other_server:
            self._allowance = len(datagram)
            for tag, info in messages:
                handler = self._from_peers.get(tag)
                if handler is not None and (self.state in (ACTIVE, LEAVING) or tag == "cookie"):
                    handler(info, address)
            return
        trusted = False
        for tag, info in messages:
            if tag == "for":
                trusted = self._session is not None and info["session"] == self._session[:protocol.PROOF_BYTES]
                if trusted:
                    self._server_heard()
            elif tag == "cookie":
                self._on_cookie(info, address)
            elif tag == "welcome":
                self._on_welcome(info)
            elif tag == "pong":
                self._on_pong(info)
            elif tag == "probe":
                self._on_probe(info, trusted)
            elif tag in self._from_server and (trusted or tag in ("refused", "bye")):
                self._from_server[tag](info)

    def _on_ack(self, info: Info, address: Optional[Address] = None) -> None:
        """Takes what a peer has received, or (without an address) what the server has kept."""
        self._outbox.on_ack(self.loop.now(), info, address)

    def _on_nack(self, info: Info, address: Optional[Address] = None) -> None:
        """Takes what a peer, or (without an address) the server, refuses."""
        self._outbox.on_nack(self.loop.now(), info, address)

    def _on_probe(self, info: Info, trusted: bool) -> None:
        if info["to"] == self.nick and self.state in (ACTIVE, LEAVING) and self._session is not None:
            answer: Info = {"id": info["id"], "nick": self.nick}
            if trusted:
                answer["session"] = self._session
            self._send_now(encode("alive", answer), self.server)

    def _on_exists(self, info: Info) -> None:
        _, host, port, _ = info["entry"]
        self._outbox.on_exists(self.loop.now(), info, self._reach(host, port))

    # what comes in

    def _on_chat(self, info: Info, address: Address) -> None:
        sender = info["from"]
        if info["to"] != self.nick:
            nack = encode("nack", {"stream": info["stream"], "first": info["n"], "reason": "not-me",
                                   "last": info["n"] + len(info["text"]) - 1})
            if len(nack) <= self._allowance:
                self._allowance -= len(nack)
                self._send_now(nack, address)
            return
        entry = self._mirror.table.entries.get(sender)
        if entry is None or entry.state != ONLINE or (entry.host, entry.port) != address:
            self._want_sync()
            return
        self._inbox.on_chat(self.loop.now(), info, address, self._accepting)
        if self._inbox.holding:
            self._ask_about_mail()

    def _on_mail(self, info: Info) -> None:
        if info["to"] == self.nick and self._mirror.is_of_this_boot and self._accepting:
            self._inbox.on_mail(self.loop.now(), info)

    def _ask_about_mail(self) -> None:
        """Asks, now and again while a stream is held, how much mail there is: what is missing there may be in it."""
        if not self._hold_alarm.is_set and self.state == ACTIVE:
            self._hold_alarm.set(self.loop.now() + jittered(self.loop, REQUEST_INTERVAL))
            if self._inbox.is_asking:
                self._send_ping()

    def _look_after_holds(self) -> None:
        if self.loop.calm:
            self._inbox.expire(self.loop.now())
        if self._inbox.holding:
            self._ask_about_mail()

    # showing

    def _show(self) -> None:
        """Hands to the output what is ready, as long as it has room."""
        for delivery in self._inbox.take(self.loop.now(), self.output.has_room):
            via = "direct"
            if delivery.times:
                via = "relay" if self._visible else "mail"
                self._greet()
            shown = self.lines.messages(delivery, via) if delivery.texts else ""
            self._write(shown.encode(), delivery.written)
        if self._inbox.holding:
            self._ask_about_mail()

    def _greet(self) -> None:
        """Announces the mail that comes first after coming online."""
        if not self._greeted and not self._visible:
            self.tell("mail")
        self._greeted = True

    # commands

    def _takes_commands(self) -> bool:
        """Whether commands count: online for everybody to see (not only at the start), or away; not while leaving."""
        return (self.state == ACTIVE and self._was_visible or self.state == AWAY) and not (self._quit or self._ending)

    def _may_command(self) -> bool:
        """Whether one is carried out now: there is room for what it may say, too."""
        return (self._takes_commands() and self.output.pending < ANSWER_LIMIT and self.errors.pending < OUTPUT_LIMIT)

    def feed(self, data: bytes) -> None:
        """Takes what was read from stdin; b"" at its end."""
        if self._prompt is not None and b"\n" in data:
            self._prompt.answered()
        self._input.feed(data)

    def enter(self, lines: Sequence[str], pasted: bool = False) -> None:
        """Takes lines that somebody typed at a terminal, see ``Commands``."""
        if not self._ending:
            self._input.enter(lines, pasted)

    def put(self, nick: str, text: str) -> None:
        """Takes one text for one nick, as if it had come in by ``feed``."""
        self._input.put(Sends(nick, [text]))

    def _carry_out(self) -> None:
        """Carries out the commands that wait, in order, as far as that is possible now."""
        for _ in range(LINES_PER_TURN):
            if not self._input.waiting or not self._may_command():
                return
            command = self._input.take()
            if command.shown:
                self._write((clean(command.shown) + "\n").encode("utf-8", "replace"))
            if command.sends is not None:
                if not self._do_sends(command.sends):
                    return
            elif command.broken:
                self._failed = True
                self.tell("object", line=clean(command.broken[:SHOWN_OF_LINE]), ref=command.ref)
            elif command.words:
                self._do(*command.words)

    def _do(self, name: str, *words: str) -> None:
        if self.state == AWAY and name not in ("reg", "help", "quit", "end"):
            self.tell("away", usage=self._way_back())
        elif name == "send":
            self._tell_usage("send NICK MESSAGE")
        elif name not in self._commands or name == "end" and not self._input.talk:
            slash = self._input.slash
            self._failed = self._failed or bool(slash)      # it may have been meant as a text
            self.tell("command", name=clean(slash + name), help=slash + "help")
        else:
            self._commands[name](name, words)

    def _way_back(self) -> str:
        """What to say to come online."""
        return f"{self._input.slash}reg {self.nick}"

    def _tell_usage(self, usage: str) -> None:
        self.tell("usage", usage=self._input.slash + usage)

    def complete(self, before: str) -> Tuple[int, List[str]]:
        """What the word at the end of ``before`` may become: where it begins, and the candidates, best first."""
        start = before.rfind(" ") + 1
        words, word = before[:start].split(), before[start:]
        slash = self._input.slash
        if not words:
            found = [slash + name for name in ("send", *sorted(self._commands)) if name != "end" or slash]
            return start, [name for name in found if slash + word and name.startswith(word)]
        if len(words) > 1 or words[0] not in [slash + name for name in ("send", "talk", "dereg", "reg")]:
            return start, []
        if words[0] in (slash + "dereg", slash + "reg"):
            return start, [self.nick] if self.nick.startswith(word) else []
        known = sorted((entry.state != ONLINE, nick) for nick, entry in self.table.entries.items() if nick != self.nick)
        return start, [nick for _, nick in known if nick.startswith(word)]

    def _wants(self, name: str, words: Sequence[str], usage: str = "") -> bool:
        """Whether a command has the words that its usage asks for; says so if not."""
        if len(words) == len(usage.split()):
            return True
        self._tell_usage(f"{name} {usage}".rstrip())
        return False

    def _do_talk(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            nick = unicodedata.normalize("NFC", words[0])
            if self.table.get(nick) is None:
                self._failed = True     # whoever talks on would talk to nobody
                self.tell("talk-unknown", nick=clean(nick))
            else:
                self._input.talk = nick

    def _do_end(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._input.talk = ""

    def _do_dereg(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            if unicodedata.normalize("NFC", words[0]) != self.nick:
                self.tell("dereg-other")
            else:
                self._quit = name

    def _do_reg(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            if unicodedata.normalize("NFC", words[0]) != self.nick:
                self.tell("reg-other", nick=self.nick)
            elif self.state == AWAY:
                self.state = JOINING
                self._outbox.away = False
                self._was_visible = False
                self._accepting = True
                self._register()
            else:
                self.tell("registered-already")

    def _do_who(self, name: str, words: Sequence[str]) -> None:
        if not self._wants(name, words):
            return
        self._write(self.lines.clients([(entry.nick, show_address((entry.host, entry.port)), entry.state)
                                        for entry in sorted(self.table.entries.values())]).encode())

    def _do_help(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._write(self.lines.help(HELP).encode())

    def _do_quit(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._quit = name

    def _do_sends(self, sends: Sends) -> bool:
        """Queues texts; False if they have to wait."""
        if self.state == AWAY:
            for text in sends.texts:
                self.tell("not-sent", usage=self._way_back(), to=sends.nick, text=text, ref=sends.ref)
            return True
        nick, outbox, now = sends.nick, self._outbox, self.loop.now()
        if nick not in self._mirror.table.entries:
            nick = unicodedata.normalize("NFC", nick)
            if nick not in self._mirror.table.entries:
                self._failed = True
                self._tell_unknown(nick, self._fitting(sends, sends.texts), sends.ref)
                return True
        if nick not in outbox.conversations:
            outbox.open(now, nick, self._place(nick), new_id(self.loop))
        room = outbox.room(now, nick)
        if room:
            texts = self._fitting(sends, sends.take(room))
            if texts:
                if self._keeps_track:
                    self._track(outbox.conversations[nick].stream, nick, texts, sends.ref)
                outbox.send(now, nick, texts, self.loop.wall())
                self.queued += len(texts)
        elif outbox.is_stuck(now, nick):
            for text in self._fitting(sends, sends.texts):
                self._hand_back(nick, text, None, sends.ref)
            return True
        if sends.texts:
            self._input.put_back(sends)
        return room > 0

    def _tell_unknown(self, nick: str, texts: List[str], ref: object) -> None:
        if not self.lines.is_for_programs:
            self.tell("unknown", len(texts), to=clean(nick))
            return
        for text in texts:
            self.tell("unknown", to=nick, text=text, ref=ref)

    def _track(self, stream: SendStream, nick: str, texts: List[str], ref: object) -> None:
        """Takes note of what is to be sent, to say later of which message an event is."""
        number = stream.end
        sent = self._on_its_way.setdefault(nick, deque())
        for text in texts:
            sent.append(Sent(number, f"{stream.stream}:{number}", ref, self.loop.now()))
            number += len(protocol.split_text(text))

    def _fitting(self, sends: Sends, texts: List[str]) -> List[str]:
        """Those of ``texts``, out of ``sends``, that are not too long; says which are."""
        size = sends.size
        if not size and are_short(texts, MAX_TEXT):
            return texts
        return [text for text in texts if self._fits(max(size, len(text.encode())), sends)]

    def _fits(self, size: int, sends: Sends) -> bool:
        if size > MAX_TEXT:
            self._failed = True
            self.tell("too-long", size=size, most=MAX_TEXT, to=clean(sends.nick), ref=sends.ref)
        return size <= MAX_TEXT

    # settling

    def settle(self) -> None:
        """Ends a turn: carry out commands, send what windows allow, write stdout, ack what it took."""
        if self.exit_code is not None:
            return
        output, commands, outbox, inbox = self.output, self._input, self._outbox, self._inbox
        if commands.waiting:
            self._carry_out()
        if self._heard:
            self._heard = False
            outbox.server_heard(self.loop.now())
        if self.state in (ACTIVE, LEAVING):
            now = self.loop.now()
            if outbox.due() <= now:
                self._send_messages(now)
            if outbox.eventful:
                self._tell_events()
        if self._table_news and output.has_room():
            self._table_news = False
            self.tell("table")
        news = inbox.has_news
        if news:
            self._show()
        output.flush()
        if outbox.told:
            outbox.count_told()
        if inbox.unacked:
            self._ack()
        if self._quit or self._ending or commands.ended and not self._stay:
            self._proceed()
        moved = (output.pending or self.errors.pending or self._prompt is not None) and self._write_rest()
        if output.broken and self._ending != "reader":
            self._reader_is_gone()
            moved = True
        able = not (commands.ended and not commands.waiting) and self._may_command() and not outbox.is_full
        self.hungry = able and not commands.waiting
        # what the limits of this turn left undone, and no event will recall; once the output has room again, that will
        if (moved or able and commands.waiting and not self.errors.pending
                or news and inbox.is_ready and output.has_room()):
            self._next_turn.set(self.loop.now())
        if self.state == ENDED and not output.pending + self.errors.pending:
            self.exit_code = self._result

    def _write_rest(self) -> bool:
        """Writes what has been added since, draws the prompt; gives whether room became free: what waits must know."""
        lines, errors = self.output.pending, self.errors.pending
        self.output.flush()
        self.errors.flush()
        if self._prompt is not None:
            self._draw(self._prompt)
        return self.output.pending < lines or self.errors.pending < errors

    def _ack(self) -> None:
        """Answers every stream that brought something, or of which something was written."""
        acks = self._inbox.acks()       # taken in any state: what is not answered now is not owed later
        if self.state in (ACTIVE, LEAVING):
            for info, address in acks:
                self._send_now(encode("ack", info), address if address is not None else self.server)

    def _send_messages(self, now: float) -> None:
        """Polls the conversations to which something happened or whose time has come."""
        for datagram, address in self._outbox.poll(now, self.loop.calm):
            self._send_now(datagram, address if address is not None else self.server)
        self._outbox_alarm.set(self._outbox.due())

    def _tell_events(self) -> None:
        for nick, events in self._outbox.take_events():
            for event in events:
                self._tell(nick, event)

    def _tell(self, nick: str, event: protocol.Event) -> None:
        name = event.kind
        if name == SILENT:
            self._server_silent()
            return
        if name in CLOSINGS:
            self.closed += event.messages
        if name == REFUSED:
            self._failed = True
            name = event.reason if event.reason in REFUSALS else "disk"
        if not self._keeps_track:
            self.tell(name, event.messages, to=nick)
            return
        for sent in self._meant(nick, event):
            self.tell(name, to=nick, id=sent.id, ref=sent.ref, **self._outcome(event, sent))

    def _meant(self, nick: str, event: protocol.Event) -> List[Sent]:
        """The messages that an event is about; forgets those that it closes."""
        sent = self._on_its_way[nick]
        if event.kind not in CLOSINGS:
            return [message for message in sent if message.number >= event.first][:event.messages]
        found = [sent.popleft() for _ in range(event.messages)]
        if not sent:
            del self._on_its_way[nick]
        return found

    def _outcome(self, event: protocol.Event, sent: Sent) -> Dict[str, Any]:
        """On which way a message went, and how many milliseconds it took, once it is closed."""
        if event.kind not in CLOSINGS:
            return {}
        return {"via": "direct" if event.kind == protocol.RECEIVED else "relay" if event.relayed else "mail",
                "ms": round((self.loop.now() - sent.began) * 1000, 3)}

    def _draw(self, prompt: Prompt) -> None:
        """On a terminal, once all lines are written: draws what waits, and asks for the next command."""
        if not (self.output.pending or prompt.asks and (self._ending or self._quit == "quit")):
            self.output.write(prompt.draw(self._waits(), self._input.prompt))
            self.output.flush()

    def _waits(self) -> List[str]:
        """A line for each recipient whose messages wait for longer than one thinks that they should."""
        now, late, next_ = self.loop.now(), [], NEVER
        for nick, sent in self._on_its_way.items():
            if now >= sent[0].began + WAIT_SHOWN:
                late.append(nick)
            else:
                next_ = min(next_, sent[0].began + WAIT_SHOWN)
        self._wait_alarm.set(next_)
        lines = [self._wait(nick, len(self._on_its_way[nick])) for nick in late[:WAITS_SHOWN]]
        others = len(late) - WAITS_SHOWN
        return lines + [f"[{others} more recipient{'s' * (others > 1)} to wait for.]"] * (others > 0)

    def _wait(self, nick: str, count: int) -> str:
        direct = self._outbox.conversations[nick].route == protocol.DIRECT
        waiting = f"{count} message{'s' * (count > 1)}"
        return f"[Waiting for {nick}: {waiting}.]" if direct else f"[Waiting for the server: {waiting} for {nick}.]"

    # leaving

    def _proceed(self) -> None:
        """Takes the next step towards what waits for the sends before it: ``dereg``, ``quit``, the end."""
        if self._quit == "quit" and not self._ending:
            self._end("quit")
        if self._input.ended and not (self._input.waiting or self._stay) and self._takes_commands():
            self._end("end")
        if self.state in (LEAVING, ENDED) or not (self._quit or self._ending):
            return
        over = self.loop.now() >= self._deadline
        if not over and not self._outbox.is_settled:
            return
        if self.state == ACTIVE:
            self._accepting = False
            if over or self.output.broken or not (self.output.pending or self._inbox.has_chat):
                self._leave()
        else:
            self._conclude()

    def _end(self, why: str, limit: float = NEVER) -> None:
        """Begins the orderly end, which takes at most about ``limit`` seconds."""
        self._ending = why
        self.hungry = False
        if why == "quit":
            self._input.clear()     # what stands behind ``quit`` is for nobody; else, it was meant to be done
        if limit < NEVER:
            self._deadline = self.loop.now() + limit
            self.loop.call_at(self._deadline, lambda: None)
            self.loop.call_at(self._deadline + LAST_TIME - END_TIME, self._end_now)

    def _end_now(self) -> None:
        if self.state != ENDED:
            self._conclude()
        self.output.flush()
        self.errors.flush()
        self.exit_code = self._result

    def interrupt(self) -> None:
        """Ctrl-C or SIGTERM: an orderly end; the second time, at once."""
        if self._interrupted:
            self._end_now()
            return
        self._interrupted = True
        self._end("signal", END_TIME)       # also if only the output is awaited still
        if self.state == JOINING:
            self._conclude()

    def time_is_over(self) -> None:
        """Ends: what is not closed by now counts as not delivered."""
        if not self._ending or self._deadline == NEVER:
            self._end("signal", 0.0)
            if self.state == JOINING:
                self._conclude()

    def reader_gone(self) -> None:
        """Nobody reads stdout any more."""
        self.output.give_up()

    def _reader_is_gone(self) -> None:
        self._failed = True
        if self.state != ENDED:
            self._end("reader", END_TIME)

    def _leave(self) -> None:
        self._stop_asking()
        self.state = LEAVING
        if self._ending in ("signal", "reader"):
            self._dereg.hurry(LAST_REQUEST_INTERVAL)
        self._dereg.start()

    def _stop_asking(self) -> None:
        for alarm in (self._ping_alarm, self._sync_alarm, self._old_table_alarm, self._hold_alarm):
            alarm.cancel()
        for request in (self._request, self._ping):
            request.stop()
        self._inbox.stop_asking()

    def _send_dereg(self) -> None:
        if self._session is not None:
            self._ask_server("dereg", {"session": self._session})

    def _dereg_unanswered(self) -> None:
        asked = self._quit in ("dereg", "quit")
        self._server_silent(always=asked)
        self._give_up(int(asked))

    def _on_bye(self, info: Info) -> None:
        if self.state == LEAVING and info["session"] == self._session:
            self._went_away()

    def _went_away(self) -> None:
        self._tell_events()
        self._stop_asking()
        self._dereg.stop()
        self._outbox.lost = False
        self._session = None
        self._inbox.forget_mail(self.loop.now())
        self._visible = False
        self.state = AWAY
        self._outbox.away = True
        self._quit = ""
        self.tell("left", nick=self.nick)

    def _give_up(self, code: int) -> None:
        """Ends the program over something: says so."""
        self._report()
        self.tell("exiting")
        self._stop(code)

    def _conclude(self) -> None:
        """Ends the program as asked."""
        self._report()
        self._stop(0)

    def _stop(self, code: int) -> None:
        self._stop_asking()
        self._dereg.stop()
        self._outbox_alarm.cancel()
        self.hungry = False
        self.state = ENDED
        self._result = code or int(self._failed or self._undelivered > 0)

    def _report(self) -> None:
        """Names every message that was not delivered: on stderr, as the line that would send it again."""
        self._tell_events()
        for nick, text in self._outbox.undelivered():
            sent = self._on_its_way.get(nick)
            self._hand_back(nick, text, sent.popleft() if sent else None)
        self._on_its_way.clear()
        self._hand_back_lines()
        if self._undelivered:
            self.tell("one-undelivered" if self._undelivered == 1 else "more-undelivered", count=self._undelivered)

    def _hand_back_lines(self) -> None:
        """Names the messages of the lines that were read, but not carried out any more."""
        while self._input.waiting:
            command = self._input.take()
            if command.sends is not None:
                for text in self._fitting(command.sends, command.sends.texts):
                    self._hand_back(command.sends.nick, text, None, command.sends.ref)
            elif command.words and (command.words[0] == "talk" or command.words[0] == "end" and self._input.talk):
                self._commands[command.words[0]](command.words[0], command.words[1:])
            elif command.words and command.words[0] == "quit":
                self._input.clear()


# --- the command line -----------------------------------------------------------------------------------------

EXIT_FAILED, EXIT_USAGE = 1, 2
STDIN, STDOUT, STDERR = 0, 1, 2
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,     # asked to; and those that would otherwise end a
                  signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)   # client at once, and leave its terminal as it is


def state_home() -> str:
    """The user's directory for state (XDG_STATE_HOME, or ~/.local/state), with ours in it."""
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "udpchat")


class Usage(Exception):
    """The arguments are wrong; the text says how, in one line."""


class Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal. (Without a width, argparse imports shutil, whatever is asked for.)"""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(STDOUT).columns)
        except (OSError, ValueError):
            columns = 0
        super().__init__(prog, width=(columns or 80) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises Usage."""
        raise Usage(message)


def whole_number(low: int, high: int, what: str) -> Callable[[str], int]:
    """An argument type: a whole number in [low, high]."""
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")
        return int(text)
    return parse


def add_log_options(parser: Parser) -> None:
    """The arguments that every mode has."""
    parser.add_argument("--log-level", default="warning", choices=LEVELS,
                        help="what is logged: this and what is more important (default: %(default)s)")
    parser.add_argument("--log-file", metavar="PATH", help="append the log to this file (default: it goes to stderr)")
    parser.add_argument("--log-format", default="text", choices=("text", "json"),
                        help="of each line of the log (default: %(default)s)")


def nick_argument(text: str) -> str:
    """An argument type: a nick."""
    nick = unicodedata.normalize("NFC", text)
    if not protocol.is_nick(nick):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nick: 1 to {protocol.MAX_NICK} letters, digits, _ . -")
    return nick


def nicks_argument(text: str) -> List[str]:
    """An argument type: nicks, with commas between them; each counts once."""
    return list(dict.fromkeys(nick_argument(part) for part in text.split(",")))


def build_parser(mode: str = "") -> Parser:
    """The command line of the program; only the arguments of ``mode`` are there, to start sooner."""
    parser = Parser(prog="udpchat", description="A chat over bare UDP that a shell script can trust.",
                    epilog="Short forms: -s PORT for server, -c NICK SERVER-HOST SERVER-PORT CLIENT-PORT for client.")
    parser.add_argument("--version", action="version", version=f"udpchat {VERSION}")
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser, required=True, prog="udpchat")
    for name, (purpose, add_options) in MODES.items():
        options = modes.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name == mode:
            add_options(options)
            add_log_options(options)
    return parser


def add_server_options(server: Parser) -> None:
    """The arguments of ``udpchat server``."""
    server.add_argument("port", nargs="?", type=whole_number(0, 65535, "a port"), default=DEFAULT_PORT, metavar="PORT",
                        help="default: %(default)s; 0: any")
    server.add_argument("--host", default="0.0.0.0", metavar="ADDR", help="the address to listen at (default: all)")
    server.add_argument("--store", metavar="PATH", help="SQLite file (default: in the user's state directory);"
                        " :memory: keeps nothing")
    server.add_argument("--max-clients", type=whole_number(1, 10 ** 6, "a number"), default=MAX_CLIENTS, metavar="N",
                        help="default: %(default)s")
    server.add_argument("--mailbox-limit", type=whole_number(0, 10 ** 8, "a number"), default=MAILBOX_LIMIT,
                        metavar="N", help="messages that wait for one recipient (default: %(default)s)")
    server.add_argument("--max-nicks", type=whole_number(1, 10 ** 7, "a number"), default=MAX_KNOWN, metavar="N",
                        help="known nicks; beyond, one that is offline is forgotten (default: %(default)s)")
    server.add_argument("--stranger-replies", type=whole_number(1, 10 ** 7, "a number"), default=STRANGER_REPLIES,
                        metavar="N", help="answers a second to those who are not registered (default: %(default)s)")
    server.add_argument("--nick-lapse", type=whole_number(0, 10 ** 5, "a number of days"), metavar="DAYS",
                        default=int(NICK_LAPSE),
                        help="offline after which a nick is free again (default: %(default)s; 0: never)")
    server.add_argument("--forget", type=nick_argument, metavar="NICK",
                        help="free a nick, with its mail, and end; while no server has the store open")


def add_client_options(client: Parser) -> None:
    """The arguments of ``udpchat client``."""
    client.add_argument("nick", nargs="?", metavar="NICK", help="default: UDPCHAT_NICK, or the login name")
    client.add_argument("server_host", nargs="?", metavar="SERVER-HOST",
                        help="default: UDPCHAT_SERVER (HOST[:PORT]), or 127.0.0.1")
    client.add_argument("server_port", nargs="?", type=whole_number(1, 65535, "a port"), metavar="SERVER-PORT",
                        help=f"default: {DEFAULT_PORT}")
    client.add_argument("client_port", nargs="?", type=whole_number(0, 65535, "a port"), default=0,
                        metavar="CLIENT-PORT", help="default: %(default)s, any")
    client.add_argument("--stay", action="store_true", help="go on receiving at the end of stdin, until a signal")
    client.add_argument("--time", action="store_true", default=None,
                        help="show the time of day before each line (default: on a terminal)")
    client.add_argument("--no-time", action="store_false", dest="time", help="do not")
    client.add_argument("--bell", action="store_true", help="on a terminal, ring with each message")
    client.set_defaults(server=None, timeout=None)
    add_chat_options(client)


def add_send_options(send: Parser) -> None:
    """The arguments of ``udpchat send``."""
    send.add_argument("nicks", type=nicks_argument, metavar="NICK[,NICK...]", help="to whom")
    send.add_argument("text", nargs="*", metavar="TEXT", default=[], help="the message (default: all of stdin)")
    send.add_argument("--server", metavar="HOST[:PORT]", help="default: UDPCHAT_SERVER, or 127.0.0.1")
    send.add_argument("--nick", metavar="NICK", help="one's own; default: UDPCHAT_NICK, or the login name")
    send.add_argument("--timeout", type=whole_number(1, 10 ** 6, "a number of seconds"), metavar="SECONDS",
                      help="after which what is not closed counts as not delivered (default: none)")
    send.set_defaults(server_host=None, client_port=0, stay=False, time=False, bell=False)
    add_chat_options(send)


def add_chat_options(parser: Parser) -> None:
    """The arguments of everybody who chats."""
    parser.add_argument("--json", action="store_true", help="events, and commands, as JSON objects, one a line")
    parser.add_argument("--quiet", action="store_true", help="show messages only, no status lines")
    parser.add_argument("--color", default="auto", choices=("auto", "always", "never"),
                        help="auto: on a terminal, unless NO_COLOR is set (default: %(default)s)")
    parser.add_argument("--ack-timeout", type=whole_number(1, 60000, "a number of milliseconds"), metavar="MS",
                        default=int(protocol.ACK_TIMEOUT * 1000),
                        help="after which a message goes to the server (default: %(default)s)")
    parser.add_argument("--mtu", type=whole_number(protocol.MAX_DATAGRAM, 65507, "a number of bytes"), metavar="N",
                        default=protocol.MAX_DATAGRAM, help="largest datagram to send (default: %(default)s)")
    parser.add_argument("--identity", metavar="PATH", help="file with the secret that proves that a nick is yours"
                        " (default: in the user's state directory)")
    parser.add_argument("--anonymous", action="store_true", help="do not own the nick: it is free when you are offline")


MODES: Dict[str, Tuple[str, Callable[[Parser], None]]] = {
    "server": ("keep the list of clients and the mail of those offline", add_server_options),
    "client": ("chat", add_client_options),
    "send": ("send one message, and end", add_send_options),
}
SHORT_FORMS = {"-s": "server", "-c": "client"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line as options; raises Usage."""
    words = list(arguments)
    if words and words[0] in SHORT_FORMS:
        words[0] = SHORT_FORMS[words[0]]
    options, rest = build_parser(words[0] if words else "").parse_known_args(words)
    if options.mode == "send":      # argparse finds no TEXT behind an option
        end = rest.index("--") if "--" in rest else len(rest)
        if not any(word.startswith("-") for word in rest[:end]):
            options.text, rest = options.text + rest[:end] + rest[end + 1:], []
    if rest:
        raise Usage(f"unrecognized arguments: {' '.join(rest)}")
    return options


def resolve(host: str, port: int, passive: bool = False) -> Tuple[socket.AddressFamily, Address]:
    """The first address of ``host``; raises Usage if it has none."""
    try:
        name = host.encode() if host.isascii() else host    # for text, the socket module imports what IDNA needs
        found = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE if passive else 0)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)    # a server listens on IPv4 unless told otherwise
        family, _, _, _, address = found[0]
        return family, (str(address[0]), int(address[1]))
    except (OSError, UnicodeError, IndexError):
        raise Usage(f"cannot resolve {clean(host) or repr(host)}") from None


def bind(family: socket.AddressFamily, address: Address) -> socket.socket:
    """A UDP socket bound to ``address``. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def complain(text: str) -> None:
    """One line on stderr."""
    try:
        os.write(STDERR, f"udpchat: {clean(text)}\n".encode("utf-8", "replace"))
    except OSError:
        pass


def run_server(options: argparse.Namespace) -> int:
    """Runs a server until a signal; gives the exit code."""
    family, address = resolve(options.host, options.port, passive=True)
    try:
        sock = bind(family, address)
    except OSError as error:
        complain(f"cannot listen at {show_address(address)}: {error.strerror}")
        return EXIT_FAILED
    mailbox = open_store(options.store or default_store(sock.getsockname()[1]))
    if mailbox is None:
        return EXIT_FAILED
    loop = Loop()
    registry = Registry(mailbox, options.max_clients, options.mailbox_limit, options.max_nicks)
    port = Port(sock, loop)
    server = Server(loop, port.send, registry, options.nick_lapse, options.stranger_replies)
    began = time.monotonic()

    def settle() -> None:
        server.settle()
        log.flush()

    def summarize() -> None:
        log.count("summary", {"uptime": int(time.monotonic() - began), **server.counters(), **port.counters()})

    port.receive, loop.settle = server.receive, settle
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.on_signal(number, loop.stop)
    loop.on_signal(signal.SIGUSR1, summarize)
    loop.on_signal(signal.SIGHUP, log.reopen if options.log_file or not is_at_terminal() else loop.stop)
    server.start()
    where = normal(sock.getsockname())
    announce(f"[Server listening on {show_address(where)}]\n" + (how_to_join(where) if os.isatty(STDOUT) else ""))
    loop.run()
    loop.close()
    return 0 if server.stop() else EXIT_FAILED


def is_at_terminal() -> bool:
    """Whether somebody started this by hand, and wants it to end when the window is closed."""
    return any(os.isatty(fd) for fd in (STDIN, STDOUT, STDERR))


def how_to_join(where: Address) -> str:
    """What to type on another machine, in one line."""
    program = "python udpchat.py" if sys.argv[0].endswith(".py") else "udpchat"
    return f"[Join with: {program} client NICK {reachable(where[0])} {where[1]}]\n"


def reachable(host: str) -> str:
    """The address at which others reach a server that listens at ``host``: of all, the one that leads out."""
    if host not in ("0.0.0.0", "::"):
        return host
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):   # RFC 5737, RFC 3849
        if family == socket.AF_INET or host == "::":
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect((elsewhere, 9))    # sends nothing: it only looks for the way
                    return str(sock.getsockname()[0])
            except OSError:
                pass
    return "127.0.0.1"


def announce(line: str) -> None:
    """Writes a line to stdout, whatever that is."""
    try:
        os.write(STDOUT, line.encode())
    except OSError as error:
        complain(f"cannot write to stdout: {error.strerror}")


def default_store(port: int) -> str:
    """Where the store of the server at ``port`` is."""
    return os.path.join(state_home(), f"server-{port}.db")


def open_store(path: str) -> Optional[Mailbox]:
    """The store at ``path``, in a directory that is made if it is ours; None if that was not possible, and says so."""
    try:
        if os.path.dirname(path) == state_home():
            os.makedirs(state_home(), mode=0o700, exist_ok=True)
        return Mailbox(path, os.urandom(protocol.SESSION_BYTES))
    except OSError as error:
        complain(f"cannot make {state_home()}: {error.strerror}")
    except StoreError as error:
        complain(str(error))
    return None


def forget(options: argparse.Namespace) -> int:
    """Frees a nick in a store that no server has open; gives the exit code."""
    path = options.store or default_store(options.port)
    if not os.path.exists(path):
        complain(f"there is no store {path}")
        return EXIT_FAILED
    mailbox = open_store(path)
    if mailbox is None:
        return EXIT_FAILED
    known = mailbox.known.get(options.forget)
    done = known is not None and Registry(mailbox).forget(options.forget) and mailbox.commit(time.time())
    mailbox.close()
    if not done or known is None:
        complain(f"{options.forget} is not known" if known is None else f"the store {path} cannot be written")
        return EXIT_FAILED
    log.warning("%s is forgotten, with %d messages", known.nick, known.messages)
    return 0


def secret_of(options: argparse.Namespace) -> Optional[bytes]:
    """The user's secret, None for an anonymous client."""
    if options.anonymous:
        return None
    path = options.identity or os.path.join(state_home(), "identity")
    try:
        return load_secret(path)
    except OSError as error:
        if options.identity or error.errno == errno.EINVAL:     # a broken one: nobody should lose a nick unawares
            raise Usage(f"the identity {path}: {error.strerror}") from None
        log.warning("no identity (%s: %s): anonymous, the nick is nobody's", path, error.strerror)
        return None


def login_name() -> str:
    """The name of the user; raises Usage if that is no nick."""
    import getpass
    try:
        return nick_argument(getpass.getuser())
    except (argparse.ArgumentTypeError, KeyError, OSError, ImportError):
        raise Usage("your login name is not a nick: give one") from None


def own_nick(given: Optional[str]) -> str:
    """The nick of this client: as given, as UDPCHAT_NICK says, or the login name; raises Usage if that is none."""
    wanted = given if given is not None else os.environ.get("UDPCHAT_NICK") or None
    try:
        return nick_argument(wanted) if wanted is not None else login_name()
    except argparse.ArgumentTypeError as error:
        raise Usage(str(error)) from None


def server_of(options: argparse.Namespace) -> Tuple[str, int]:
    """Where the server is: as given, or as UDPCHAT_SERVER says (HOST[:PORT]), or here; raises Usage."""
    if options.server_host is not None:
        return options.server_host, DEFAULT_PORT if options.server_port is None else options.server_port
    return server_argument(options.server or os.environ.get("UDPCHAT_SERVER") or "127.0.0.1")


def server_argument(text: str) -> Tuple[str, int]:
    """``HOST``, ``HOST:PORT``, ``[IPV6]:PORT`` or an IPv6 address; raises Usage."""
    parts = re.fullmatch(r"\[(.*)\](?::(.*))?|([^:]*)(?::([^:]*))?", text)
    if parts is None:
        return text, DEFAULT_PORT       # an IPv6 address
    host, port = parts.group(1) or parts.group(3) or "", parts.group(2) if parts.group(1) else parts.group(4)
    try:
        return host, whole_number(1, 65535, "a port")(port) if port is not None else DEFAULT_PORT
    except argparse.ArgumentTypeError as error:
        raise Usage(str(error)) from None


def lines_for(options: argparse.Namespace, nick: str, loop: Loop, is_terminal: bool, style: Style) -> Lines:
    """How events are told: as objects, as plain lines, or as lines for people."""
    hidden = STATUS if options.quiet else ROUTINE if options.mode == "send" else frozenset()
    if options.json:
        return JsonLines(nick, loop.wall, hidden)
    timed = options.time if options.time is not None else is_terminal and options.mode == "client"
    return Lines(style, loop.wall if timed else None, hidden if is_terminal else hidden | FOR_PEOPLE,
                 options.bell and is_terminal)


class NoText(Exception):
    """What is to be sent did not come whole; the text says why."""


def text_to_send(options: argparse.Namespace, end: float) -> str:
    """What ``udpchat send`` sends: its arguments, or all of stdin but the line feeds at its end.

    ``end``: when that must be there, by the monotonic clock. Raises NoText.
    """
    if options.text:
        return " ".join(options.text).encode("utf-8", "replace").decode()
    data = b""
    try:
        while len(data) <= STDIN_LIMIT:
            left = end - time.monotonic()
            if left <= 0:
                raise NoText("the text did not come in time")
            if select.select([STDIN], [], [], min(left, MAX_WAIT))[0]:
                more = read_some(STDIN)
                if more == b"":
                    break
                data += more or b""
    except OSError as error:
        raise NoText(f"cannot read stdin: {error.strerror}") from None
    return data.decode("utf-8", "replace").rstrip("\n")


def prompt_for(options: argparse.Namespace, is_terminal: bool, output: Output, style: Style,
               complete: Callable[[str], Tuple[int, List[str]]]) -> Optional[Prompt]:
    """What stands at the bottom of the terminal; None where there is none. ``is_terminal``: stdin is one, too."""
    is_dumb = os.environ.get("TERM") == "dumb"
    if options.mode == "send":
        is_shown = os.isatty(STDOUT) and not (is_dumb or options.json or options.quiet)
        return Board(output, Terminal(STDIN, STDOUT), style) if is_shown else None
    if not is_terminal:
        return None
    if is_dumb:
        return Prompt()
    return Desk(output, Terminal(STDIN, STDOUT), style, History(os.path.join(state_home(), "history")), complete)


def run_client(options: argparse.Namespace, error_writer: Writer, errors: Output) -> int:
    """Runs a client, or sends one message; gives the exit code."""
    nick = own_nick(options.nick)
    family, server = resolve(*server_of(options))
    end = time.monotonic() + (options.timeout or NEVER)
    try:
        text = text_to_send(options, end) if options.mode == "send" else ""
    except NoText as error:
        complain(f"nothing was sent: {error}")
        return EXIT_FAILED
    secret = secret_of(options)
    loop = Loop()
    try:
        sock = bind(family, ("::" if family == socket.AF_INET6 else "0.0.0.0", options.client_port))
    except OSError as error:
        complain(f"cannot use port {options.client_port}: {error.strerror}")
        return EXIT_FAILED
    port, reader, writer = Port(sock, loop), Reader(STDIN), Writer(STDOUT)
    output = Output(writer.put)
    is_terminal = reader.is_terminal and writer.is_terminal and not options.json
    style = Style(wants_color(options.color, is_terminal, os.environ))
    prompt = prompt_for(options, is_terminal, output, style, lambda before: client.complete(before))
    client = Client(loop, port.send, output, nick, normal(server), secret, options.ack_timeout / 1000, options.stay,
                    options.mtu, errors, lines_for(options, nick, loop, is_terminal, style), prompt)
    if prompt is not None and log.output is errors and os.fstat(STDOUT).st_rdev == os.fstat(STDERR).st_rdev:
        log.output = Output(client.show_log)
    port.receive = client.receive
    console = Console(loop, client, reader, writer, error_writer, prompt)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.on_signal(number, client.interrupt)
    if options.mode == "send":
        for recipient in options.nicks:
            client.put(recipient, text)
        client.feed(b"")
    if end < NEVER:
        loop.call_at(loop.now() + max(0.0, end - time.monotonic()), client.time_is_over)
    try:
        console.start()
        client.start()
        loop.run()
    finally:
        console.close()
        loop.close()
    return client.exit_code or 0


class Progress:
    """How far a long pipe is, in the last row of a terminal; it is taken off before anything else is written there."""

    def __init__(self, loop: Loop, client: "Client", terminal: Writer, others: Sequence[Output]) -> None:
        """``others``: all that goes to the same terminal."""
        self._loop = loop
        self._client = client
        self._terminal = terminal
        self._is_shown = False
        for output in others:
            output.before = self._take_off
        self._began = loop.now()
        self._alarm = Alarm(loop, self._show)
        self._alarm.set(self._began + PROGRESS_INTERVAL)

    def _show(self) -> None:
        client, now = self._client, self._loop.now()
        self._alarm.set(now + PROGRESS_INTERVAL)
        if client.queued > PROGRESS_LINES and not client.errors.pending:
            rate = client.closed / (now - self._began)
            self._is_shown = True
            self._put(f"\r{client.queued:,} sent, {client.closed:,} done, {rate:,.0f}/s\x1b[K")

    def _put(self, text: str) -> None:
        try:
            self._terminal.put(text.encode())
        except OSError:
            pass        # it has hung up

    def _take_off(self) -> None:
        if self._is_shown:
            self._is_shown = False
            self._put("\r\x1b[K")

    def close(self) -> None:
        """Takes it off for good."""
        self._alarm.cancel()
        self._take_off()


class Console:
    """Connects a client to the standard streams: each is watched only while something is wanted of it."""

    def __init__(self, loop: Loop, client: Client, reader: Reader, writer: Writer, errors: Writer,
                 prompt: Optional[Prompt] = None) -> None:
        self._loop = loop
        self._client = client
        self._reader = reader
        self._writer = writer
        self._errors = errors
        self._board = prompt if isinstance(prompt, Board) else None
        self._desk = prompt if isinstance(prompt, Desk) else None
        self._progress = None
        if errors.is_terminal and not reader.is_terminal:
            outputs = [client.errors, client.output] if writer.is_terminal else [client.errors]
            self._progress = Progress(loop, client, errors, outputs)
        self._is_open = True                    # the terminal, as long as it has not hung up
        self._wanted = (False, False, False)    # of stdin, stdout and stderr

    def start(self) -> None:
        """From now on, every turn of the loop ends here."""
        self._loop.settle = self._settle
        if self._writer.is_pipe and sys.platform == "linux":    # no event but the error when the last reader is gone
            self._loop.watch(self._writer.fd, selectors.EVENT_READ, self._on_reader_gone)
        if self._board is not None:
            self._loop.on_signal(signal.SIGWINCH, self._board.resize)
            self._loop.on_signal(signal.SIGCONT, self._board.resume)
        if self._desk is not None:
            self._loop.on_signal(signal.SIGTSTP, self._desk.suspend)
            self._desk.open()

    def close(self) -> None:
        """Leaves the terminal as it was, whatever has happened."""
        if self._desk is not None:
            self._desk.close()
        if self._progress is not None:
            self._progress.close()

    def _settle(self) -> None:
        client = self._client
        client.settle()
        if client.exit_code is not None:
            self._loop.stop()
            return
        wanted = (client.hungry if self._desk is None else self._is_open,
                  client.output.pending > 0, client.errors.pending > 0)
        if wanted != self._wanted:
            self._watch(wanted)

    def _watch(self, wanted: Tuple[bool, bool, bool]) -> None:
        fds = (self._reader.fd, self._writer.fd, self._errors.fd)
        events = (selectors.EVENT_READ, selectors.EVENT_WRITE, selectors.EVENT_WRITE)
        callbacks = (self._on_readable, self._on_writable, self._on_writable)
        for fd, event, callback, had, has in zip(fds, events, callbacks, self._wanted, wanted):
            if has != had:
                self._loop.watch(fd, event, callback if has else None)
        self._wanted = wanted

    def _on_readable(self) -> None:
        if self._desk is None and not self._client.hungry:
            return      # this very turn has brought its end: what is not read is not lost
        data = self._reader.read()
        if data and self._desk is not None:
            self._loop.take_signals()       # a read in the background stops the job: whatever continued it comes first
            for action in self._desk.type(data):
                self._act(action)
        elif data is not None:
            self._is_open = bool(data)
            self._client.feed(data)

    def _act(self, action: Action) -> None:
        if action.kind == "submit":
            self._client.enter(action.lines, action.pasted)
        elif action.kind == "interrupt":
            self._client.interrupt()
        else:
            self._client.feed(b"")

    def _on_writable(self) -> None:
        """Nothing to do here: the turn ends with a write."""

    def _on_reader_gone(self) -> None:
        self._loop.watch(self._writer.fd, selectors.EVENT_READ, None)
        self._client.reader_gone()


def set_up_log(options: argparse.Namespace) -> Optional[Tuple[Writer, Output]]:
    """Sets up the log; gives stderr, and what waits for it. None if the file cannot be opened, and says so."""
    writer = Writer(STDERR)
    output = Output(writer.put)
    log.level, log.output = LEVELS.index(options.log_level), output
    if options.log_format == "json":
        log.line = json_line
    if options.log_file is not None:
        try:
            log.write_to(LogFile(options.log_file))
        except OSError as error:
            complain(f"cannot open the log {options.log_file}: {error.strerror}")
            return None
    return writer, output


def keep_standard_descriptors() -> None:
    """Keeps sockets and files from taking the place of a standard stream that is closed."""
    while True:
        fd = os.open(os.devnull, os.O_RDONLY)
        if fd > STDERR:
            os.close(fd)
            return


def end_at_once_on_signals(sends: bool) -> None:
    """Until the loop takes signals: while modules are imported, a name is looked up, a file or a text is read.

    An exception would do, but where Python calls back by itself (in an import, say) it is printed and gets lost.
    """
    def end(*_: object) -> None:
        if sends:
            complain("nothing was sent: interrupted")
        os._exit(EXIT_FAILED if sends else 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The program; gives the exit code."""
    keep_standard_descriptors()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        complain("usage: udpchat server|client|send ... (see --help)")
        return EXIT_USAGE
    end_at_once_on_signals(sends=words[0] == "send")
    try:
        options = parse(words)
        errors = set_up_log(options)
        if errors is None:
            return EXIT_FAILED
        if options.mode != "server":
            return run_client(options, *errors)
        return run_server(options) if options.forget is None else forget(options)
    except Usage as error:
        complain(str(error))
        return EXIT_USAGE
    except OSError as error:        # what nobody has foreseen: too few descriptors, say
        complain(error.strerror or str(error))
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
