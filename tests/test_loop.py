"""The loop, its timers and its outputs: a clock that is set by hand, and writes that take what they like."""
from __future__ import annotations

import errno
import functools
import os
import re
import resource
import selectors
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from home import ERROR, INFO, LineFile
from loop import (COMPACT_TIMERS, MAX_TURN_TIME, OUTPUT_LIMIT, READ_TIME, Log, LogFile, Output, RestartableTimer,
                  SelectorLoop, TimerHeap, UdpSocket, Writer)


class Paper:
    """An output that accepts that many bytes, and keeps them."""

    def __init__(self, blank: int = 10 ** 6) -> None:
        self.blank = blank
        self.data = bytearray()

    def put(self, data: bytes) -> int:
        size = min(self.blank, len(data))
        self.data += data[:size]
        self.blank -= size
        return size


def a_log() -> Log:
    log = Log()
    log.level = INFO
    return log


class Hands:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.time = 100.0


@pytest.fixture(name="hands")
def clock_set_by_hand(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr("loop.time.monotonic", lambda: hands.time)
    return hands


class IdleSelector(selectors.SelectSelector):
    """A selector that never waits, and never finds anything."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if stat.S_ISREG(os.fstat(fileobj).st_mode):
            raise PermissionError("as epoll does")
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


@pytest.fixture(name="selector")
def selector_that_never_waits() -> IdleSelector:
    return IdleSelector()


@pytest.fixture(name="loop")
def loop_that_never_waits(hands: Hands, selector: IdleSelector) -> Iterator[SelectorLoop]:
    loop = SelectorLoop(selector)
    yield loop
    loop.close()


def test_timers_run_in_the_order_of_their_times_and_cancelled_ones_not_at_all() -> None:
    heap, rung = TimerHeap(), []
    for when in (3.0, 1.0, 2.0):
        heap.call_at(when, lambda when=when: rung.append(when))     # type: ignore[misc]
    heap.call_at(1.5, lambda: rung.append(1.5)).cancel()
    heap.run(2.5)
    assert rung == [1.0, 2.0] and heap.next_time() == 3.0


def test_a_regular_file_is_always_ready_for_all_that_it_is_watched_for(loop: SelectorLoop, tmp_path: Path) -> None:
    calls: list[str] = []
    with open(tmp_path / "file", "w+b") as file:
        loop.watch(file.fileno(), selectors.EVENT_READ, lambda: calls.append("read"))
        loop.turn()
        loop.watch(file.fileno(), selectors.EVENT_WRITE, lambda: calls.append("write"))
        loop.turn()
        loop.watch(file.fileno(), selectors.EVENT_READ, None)
        loop.turn()
        loop.watch(file.fileno(), selectors.EVENT_WRITE, None)
        loop.call_at(loop.now(), lambda: None)
        loop.turn()
    assert calls == ["read", "read", "write", "write"]


class Pair:
    """A loop that watches one end of a pair of sockets; ``calls``: who was called."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.loop = SelectorLoop(selector)
        self.ours, self.theirs = socket.socketpair()
        self.calls: list[str] = []

    def watch(self, *events: int) -> None:
        for event in events:
            name = "read" if event == selectors.EVENT_READ else "write"
            self.loop.watch(self.ours.fileno(), event, functools.partial(self.calls.append, name))

    def turn(self) -> list[str]:
        """Return what is called in one turn, which does not wait."""
        del self.calls[:]
        self.loop.call_at(self.loop.now(), lambda: None)
        self.loop.turn()
        return self.calls


@pytest.fixture(name="pair", params=[selectors.SelectSelector, selectors.DefaultSelector],
                ids=["the plainest selector", "the best selector"])
def loop_that_watches_a_socket(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param())
    with pair.ours, pair.theirs:
        yield pair
        pair.loop.close()


def test_whoever_reads_is_called_when_there_is_something_to_read(pair: Pair) -> None:
    pair.watch(selectors.EVENT_READ)
    assert pair.turn() == []
    pair.theirs.send(b"x")
    assert pair.turn() == ["read"]
    pair.ours.recv(1)
    assert pair.turn() == []


def test_whoever_writes_is_called_when_there_is_room(pair: Pair) -> None:
    pair.watch(selectors.EVENT_READ, selectors.EVENT_WRITE)
    assert pair.turn() == ["write"]
    pair.ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            pair.ours.send(bytes(65536))
    assert pair.turn() == []


def test_a_broken_descriptor_wakes_whoever_reads_and_whoever_writes(pair: Pair) -> None:
    pair.watch(selectors.EVENT_READ, selectors.EVENT_WRITE)
    pair.theirs.close()
    assert pair.turn() == ["read", "write"]


def test_who_does_not_watch_any_more_is_not_called(pair: Pair) -> None:
    pair.watch(selectors.EVENT_READ, selectors.EVENT_WRITE)
    pair.theirs.send(b"x")
    pair.loop.watch(pair.ours.fileno(), selectors.EVENT_WRITE, None)
    assert pair.turn() == ["read"]
    pair.loop.watch(pair.ours.fileno(), selectors.EVENT_READ, None)
    assert pair.turn() == []


def test_whoever_stops_watching_one_descriptor_in_the_turn_of_another_is_not_missed(pair: Pair) -> None:
    with pair.ours.dup() as other:
        pair.theirs.send(b"x")
        for ours, theirs in ((pair.ours, other), (other, pair.ours)):
            pair.loop.watch(ours.fileno(), selectors.EVENT_READ, functools.partial(
                pair.loop.watch, theirs.fileno(), selectors.EVENT_READ, None))
        assert pair.turn() == [], "the first one has ended the watch of the other"


def test_cancelled_timers_do_not_pile_up() -> None:
    heap = TimerHeap()
    heap.call_at(1.0, lambda: None)
    for _ in range(10_000):
        heap.call_at(2.0, lambda: None).cancel()
    assert len(heap) <= COMPACT_TIMERS + 2


def test_a_timer_that_is_set_later_and_later_fires_once_at_its_last_time(loop: SelectorLoop, hands: Hands) -> None:
    fired: list[float] = []
    timer = RestartableTimer(loop, lambda: fired.append(loop.now()))
    for _ in range(50):
        timer.set(loop.now() + 1.0)
        hands.time += 0.05
        loop.turn()
    due = loop.now() + 1.0 - 0.05
    while len(fired) < 1 and hands.time < 200:
        hands.time += 0.05
        loop.turn()
    assert len(fired) == 1 and fired[0] >= due - 1e-6


def test_a_timer_fires_though_every_turn_takes_long(loop: SelectorLoop, hands: Hands) -> None:
    fired: list[int] = []
    loop.call_at(loop.now() + 0.5, lambda: fired.append(1))

    def take_long() -> None:
        hands.time += 1.5 * MAX_TURN_TIME
    loop.settle = take_long
    for _ in range(10):
        loop.turn()
    assert fired == [1]


def test_the_time_in_which_a_process_was_stopped_counts_for_almost_nothing(loop: SelectorLoop, hands: Hands) -> None:
    before = loop.now()

    def be_stopped() -> None:
        hands.time += 60.0
    loop.settle = be_stopped
    loop.turn()
    assert loop.now() <= before + MAX_TURN_TIME + 1e-6
    loop.settle = lambda: None
    hands.time += 0.01
    loop.turn()
    assert loop.now() <= before + 2 * MAX_TURN_TIME


@pytest.fixture(name="read")
def what_a_loop_reads_that_waits(loop: SelectorLoop, hands: Hands, selector: IdleSelector,
                                 monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Return which of three datagrams are read, when the selector has waited a second, or for a timer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM) as theirs:
        ours.bind(("127.0.0.1", 0))
        port, read = UdpSocket(ours, loop), []
        port.receive = lambda datagram, _: read.append(datagram)

        def wait(timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
            hands.time += min(timeout, 1.0)
            return [(selector.get_key(ours.fileno()), selectors.EVENT_READ)]
        monkeypatch.setattr(selector, "select", wait)
        for number in range(3):
            theirs.sendto(b"%d" % number, ours.getsockname())
        yield read


def test_a_turn_that_waited_reads_one_datagram_and_does_not_call_that_all(loop: SelectorLoop,
                                                                          read: list[bytes]) -> None:
    loop.turn()
    assert read == [b"0"] and not loop.drained
    loop.call_at(loop.now(), lambda: None)      # the next turn does not wait
    loop.turn()
    assert read == [b"0", b"1", b"2"] and loop.drained


def test_a_turn_reads_no_more_once_it_has_read_for_a_while(loop: SelectorLoop, hands: Hands, selector: IdleSelector,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM) as theirs:
        ours.bind(("127.0.0.1", 0))
        port, read = UdpSocket(ours, loop, 200), []
        monkeypatch.setattr(selector, "select",
                            lambda timeout: [(selector.get_key(ours.fileno()), selectors.EVENT_READ)])

        def slow(datagram: bytes, address: object) -> None:
            read.append(datagram)
            hands.time += READ_TIME / 50
        port.receive = slow
        for number in range(300):
            theirs.sendto(b"%d" % number, ours.getsockname())
        loop.call_at(loop.now(), lambda: None)
        loop.turn()
        assert len(read) == 64 and not loop.drained
        port.receive = lambda datagram, address: read.append(datagram)
        loop.call_at(loop.now(), lambda: None)
        loop.turn()
        assert len(read) == 264, "no longer for its time, but as many as in any turn"


def test_a_turn_with_a_timer_that_is_due_reads_all_that_there_is(loop: SelectorLoop, read: list[bytes]) -> None:
    calm = []
    loop.call_at(loop.now() + 0.5, lambda: calm.append(loop.drained))
    loop.turn()
    assert read == [b"0", b"1", b"2"] and calm == [True]


def test_an_output_tells_of_each_line_when_its_last_byte_is_written() -> None:
    taken = bytearray()
    told: list[int] = []
    allowed = [7]

    def put(data: bytes) -> int:
        size = min(allowed[0], len(data))
        taken.extend(data[:size])
        allowed[0] -= size
        return size
    output = Output(put)
    output.write(b"one\ntwo\nthree\n", told.append)
    output.write(b"", lambda lines: told.append(-1))
    output.flush()
    assert (bytes(taken), told, output.pending) == (b"one\ntwo", [1], 7)
    allowed[0] = 100
    output.flush()
    assert (bytes(taken), told, output.pending) == (b"one\ntwo\nthree\n", [1, 2, -1], 0)


def test_an_output_whose_reader_is_gone_takes_nothing_more() -> None:
    def put(data: bytes) -> int:
        raise BrokenPipeError(32, "Broken pipe")
    output = Output(put)
    told: list[int] = []
    output.write(b"lost\n", told.append)
    output.flush()
    output.write(b"more\n", told.append)
    assert output.broken and not output.pending and not told and output.error == ""


def test_an_output_that_cannot_be_written_knows_why() -> None:
    def put(data: bytes) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    output = Output(put)
    told: list[int] = []
    output.write(b"lost\n", told.append)
    output.flush()
    assert output.broken and not output.pending and not told and output.error == "Disk quota exceeded"


# --- files on a full disk -------------------------------------------------------------------------------------

APPENDING = pytest.mark.parametrize("flags", [0, os.O_APPEND], ids=["written", "appended to"])


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as on a full disk: a write accepts a part, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class OpenFile:
    """A file that is open for writing only, as a shell leaves it to a program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        self.lines = LineFile(-1)

    def open(self, flags: int = 0, content: bytes = b"", at: int | None = None) -> LineFile:
        """Open it with that content, to be written ``at`` a byte (by default behind the last one)."""
        self.path.write_bytes(content)
        self.fd = os.open(self.path, os.O_WRONLY | flags)
        os.lseek(self.fd, len(content) if at is None else at, os.SEEK_SET)
        self.lines = LineFile(self.fd)
        return self.lines

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture(name="file")
def file_that_is_written(tmp_path: Path) -> Iterator[OpenFile]:
    file = OpenFile(tmp_path / "file")
    yield file
    if file.fd >= 0:
        os.close(file.fd)


@APPENDING
def test_a_full_disk_gets_whole_lines_and_the_rest_when_there_is_room_again(file: OpenFile, flags: int) -> None:
    lines = file.open(flags)
    with room_for(10):
        assert lines.put(b"one\ntwo\nthree\n") == len(b"one\ntwo\n") and file.content == b"one\ntwo\n"
        with pytest.raises(OSError, match="File too large"):
            lines.put(b"three\n")
        assert file.content == b"one\ntwo\n"
    assert lines.put(b"three\n") == len(b"three\n") and file.content == b"one\ntwo\nthree\n"


@APPENDING
def test_a_line_is_taken_back_with_the_line_end_before_it(file: OpenFile, flags: int) -> None:
    lines = file.open(flags, b"torn")
    for size in range(4, 8):
        with room_for(size), pytest.raises(OSError, match="File too large"):
            lines.put(b"one\n")
        assert file.content == b"torn"
    lines.put(b"one\n")
    assert file.content == b"torn\none\n"


@APPENDING
@pytest.mark.parametrize("content,at,before", [
    (b"", 0, b""), (b"whole\n", 6, b""), (b"torn", 4, b"\n"), (b"a\nb\n", 2, b""), (b"a\nb\n", 3, b"\n"),
    (b"whole\n", 8, b"\n")], ids=["an empty file", "behind a line", "behind a torn line", "over a line",
                                  "inside a line", "behind the end"])
def test_a_line_begins_where_the_one_before_it_has_ended(file: OpenFile, flags: int, content: bytes, at: int,
                                                         before: bytes) -> None:
    lines = file.open(flags, content, at)
    if flags:
        before, at = b"\n" if content == b"torn" else b"", len(content)
    lines.put(b"one\n")
    lines.put(b"two\n")
    shown = before + b"one\ntwo\n"
    assert file.content == content[:at].ljust(at, b"\0") + shown + content[at + len(shown):]


@APPENDING
def test_where_a_file_cannot_be_read_a_line_end_comes_first_and_nothing_is_taken_back(
        file: OpenFile, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("home.read_back", lambda *_: b"")
    lines = file.open(flags, b"whole\n")
    with room_for(9), pytest.raises(OSError, match="File too large"):
        lines.put(b"one\n")
    lines.put(b"one\n")
    assert file.content == b"whole\n\non\none\n"
    os.close(file.fd)
    file.open(flags).put(b"one\n")
    assert file.content == b"one\n", "an empty file has nothing to be seen"


def when_full(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have somebody else ``act`` as soon as a write fails; then there is room again."""
    write = os.write

    def fail(fd: int, data: bytes) -> int:
        try:
            return write(fd, data)
        except OSError:
            monkeypatch.setattr("loop.os.write", write)
            resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
            act()
            raise
    monkeypatch.setattr("loop.os.write", fail)


@pytest.mark.parametrize("theirs", [b"theirs\n", b"theirs"], ids=["a line", "a part of a line"])
def test_what_others_append_to_a_file_is_never_cut_off(file: OpenFile, monkeypatch: pytest.MonkeyPatch,
                                                       theirs: bytes) -> None:
    def append() -> None:
        with file.path.open("ab") as other:
            other.write(theirs)
    lines = file.open(os.O_APPEND)
    when_full(monkeypatch, append)
    with room_for(6):
        assert lines.put(b"one\ntwo\n") == len(b"one\n")
    lines.put(b"two\n")
    assert file.content == b"one\ntwtheirs\ntwo\n"


def test_what_others_write_with_our_own_descriptor_is_never_cut_off(file: OpenFile,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of one shell, as in ``(a & b) > file``: each writes where the other has ended."""
    lines = file.open()
    when_full(monkeypatch, lambda: os.write(file.fd, b"theirs\n"))
    with room_for(2), pytest.raises(OSError, match="File too large"):
        lines.put(b"one\n")
    lines.put(b"one\n")
    assert file.content == b"ontheirs\none\n"


@pytest.mark.parametrize("flags,content", [(0, b"\0\0\0\0\0\0\ntwo\n"), (os.O_APPEND, b"two\n")],
                         ids=["written", "appended to"])
def test_a_file_may_be_emptied_while_it_is_written(file: OpenFile, monkeypatch: pytest.MonkeyPatch, flags: int,
                                                   content: bytes) -> None:
    lines = file.open(flags)
    when_full(monkeypatch, lambda: os.truncate(file.path, 0))
    with room_for(6):
        assert lines.put(b"one\ntwo\n") == len(b"one\n")
    lines.put(b"two\n")
    assert file.content == content


def test_a_file_that_accepts_nothing_without_an_error_is_a_full_disk(file: OpenFile,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    lines = file.open()
    monkeypatch.setattr("loop.os.write", lambda fd, data: 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        lines.put(b"one\n")


def test_a_message_that_is_only_in_part_in_a_file_does_not_count_as_written(file: OpenFile) -> None:
    file.open()
    told: list[int] = []
    output = Output(Writer(file.fd).put)
    with room_for(9):
        output.write(b"one\ntwo\n", told.append)
        output.write(b"three\n", told.append)      # all of it would fit but its end
        output.flush()
        assert sum(told) == 2 and not output.broken
        output.flush()
    assert sum(told) == 2 and output.error == os.strerror(errno.EFBIG)
    assert file.content == b"one\ntwo\n"


def test_a_record_of_the_log_is_never_a_part_of_a_line_on_a_full_disk(tmp_path: Path) -> None:
    path, logs = tmp_path / "log", []
    for start in range(3):
        logs.append(a_log())
        logs[-1].write_to(LogFile(str(path)))
        with room_for(start * 200 + 150):
            for number in range(4):
                logs[-1].info("start %d record %d %s", start, number, "x" * 10)
    lines = path.read_text().split("\n")
    assert lines.pop() == "" and 3 <= len(lines) < 12
    assert all(re.fullmatch(r"\S+ \S+ INFO start \d record \d x{10}", line) for line in lines)
    logs[-1].flush()
    assert path.read_text().split("\n")[-2].endswith("start 2 record 3 xxxxxxxxxx")


def test_a_log_on_a_standard_stream_goes_on_when_there_is_room_again(file: OpenFile) -> None:
    file.open(os.O_APPEND)
    log = a_log()
    log.output = Output(Writer(file.fd).put_later)
    with room_for(60):
        for number in range(3):
            log.info("record %d", number)
    log.flush()
    assert [line.split("INFO ")[1] for line in file.content.decode().splitlines()] == [
        "record 0", "record 1", "record 2"]


def test_a_log_that_nobody_reads_blocks_nothing_and_does_not_grow() -> None:
    nobody, log = Paper(blank=0), a_log()
    log.output = Output(nobody.put)
    for _ in range(1000):
        log.info("x" * 1000)
    assert log.output.pending < OUTPUT_LIMIT + 2000 and not nobody.data


def test_a_log_tells_how_many_records_were_lost_once_it_is_read_again() -> None:
    paper, log = Paper(blank=0), a_log()
    log.output = Output(paper.put)
    for number in range(1000):
        log.info("record %d %s", number, "x" * 1000)
    paper.blank = 10 ** 7
    log.output.flush()
    log.info("read again")
    log.info("and again")
    lines = [line.split(" ", 3)[3] for line in bytes(paper.data).decode().splitlines()]
    kept = len(lines) - 3
    assert lines[kept:] == [f"{1000 - kept} records lost", "read again", "and again"]
    assert [line.split()[1] for line in lines[:kept]] == [str(number) for number in range(kept)]


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    paper, log = Paper(), a_log()
    log.output = Output(paper.put)
    log.info("%s at %s", "x\x1b[2J\n", "a\u2028b\udcff")
    log.info("100 % sure")
    assert b"\x1b" not in paper.data and paper.data.count(b"\n") == 2
    shown = bytes(paper.data).decode().splitlines()
    assert [line[24:] for line in shown] == ["INFO x\\x1b[2J\\x0a at a\\u2028b\\udcff", "INFO 100 % sure"]


def test_a_record_begins_with_local_time_to_the_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    paper, log = Paper(), a_log()
    log.output = Output(paper.put)
    at = time.mktime((2026, 11, 22, 9, 41, 7, 0, 0, -1)) + 0.0625
    monkeypatch.setattr("loop.time.time", lambda: at)
    log.error("the store cannot be written")
    assert bytes(paper.data) == b"2026-11-22 09:41:07,062 ERROR the store cannot be written\n"


def test_a_level_that_is_off_costs_no_formatting() -> None:
    class Dear:
        def __str__(self) -> str:
            raise AssertionError("was formatted")
    paper, log = Paper(), a_log()
    log.output, log.level = Output(paper.put), ERROR
    for method in (log.debug, log.info, log.warning):
        method("%s", Dear())
    log.error("shown")
    assert re.fullmatch(r"[0-9-]+ [0-9:,]+ ERROR shown\n", bytes(paper.data).decode())


def test_a_log_without_output_says_nothing() -> None:
    a_log().error("nobody hears")
