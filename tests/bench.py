"""Measure the program: real processes over loopback, each figure beside a yardstick taken in the same run.

    python tests/bench.py [NAME ...]        (or python -m tests.bench)

It is no part of the tests: it prints one table (figure, yardstick, ratio, target, whether that is met), always exits
with 0, and takes less than four minutes. On a busy machine only the ratios say much: so figure and yardstick
are measured in turn, and processor time is counted instead of the clock's where that is possible.

- piped      ``cat lines | client alice > receipts``, ``client bob > out``, every line checked, from the moment when
             both sides are ready to the end of alice. The yardstick is the plain loop: two Python processes, one
             msgpack map with one text per datagram, a credit every 64 of them.
- latency    a line into alice's stdin until its receipt is on her stdout, all processes on one core. The yardstick,
             in turn with it: a bare blocking loop, pipe -> UDP -> process that decodes and echoes -> pipe. Once
             round by round, so that each finds the other's data in the caches of the core: that is judged. Once in
             blocks of a hundred: that shows how much faster the bare loop is when it has the caches for itself.
- keep       lines piped to somebody who is offline, kept in a store on disk. The yardstick: SQLite alone, with a row
             for each line, the same settings, and 4096 of them in a transaction. The median of three rounds.
- deliver    the same lines when that somebody is back, from the welcome to the last one. The yardsticks: how fast they
             were kept, and SQLite alone.
- memory     the peak of each process while lines are piped through. The yardstick: Python with the same modules.
- start      from the call to the end of ``--help``, and to the first welcome of a client, of the installed program; and
             of ``python udpchat.py``, a script, which Python compiles at each start.
- crowd      many clients register at once; until all hold the whole table.
- restart    the server of as many clients is killed, and started again: until all are back, and hold its table.
- idle       10,000 clients are registered and do nothing but ping: the server's processor time and memory.
             The yardstick, in turn with it: a bare loop that wakes up as often, decodes and answers.
- table      bytes and processor time of the server for each change of the table and each client that is told. What
             the change itself costs (measured with one client), and the pings meanwhile, are taken off. The yardstick,
             by whose ratio it is judged whether that is constant: a bare ``sendto`` to as many sockets.
- timers     one client sends to 1,000 recipients that have stopped answering, another pair chats: the longest turn of
             the loop (from the selector's return to its next call) of server and client, the latency of the pair.
- loss       one stream, then two, through a simulated link on a virtual clock: 10 Mbit/s, 20 ms and 2 % random loss
             each way, a queue of 64 KiB.
- zipapp     the program as one file (tests/build_zipapp.py), where msgpack is not compiled: its start, lines through a
             pipe, and one message. The yardstick, in turn with it: the installed program.

Many clients are a ``Swarm``: one process with a socket for each, that registers, fetches the table, pings and answers
probes like a client, but of the table remembers only up to which version it holds it (three members keep all of it,
to check). Pages that many members get are decoded once.
"""
from __future__ import annotations

import contextlib
import functools
import heapq
import os
import random
import re
import resource
import select
import selectors
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import protocol    # noqa: E402
import udpchat    # noqa: E402
from loop import SelectorLoop    # noqa: E402
from conversation import DIRECT, QUEUE_LIMIT, Conversation    # noqa: E402
from protocol import FOR_SIZE, ONLINE, RECORD_MARK, Decoder, Info, Page, Place, Table    # noqa: E402
from protocol import addressed, encode, letters_of, opened_plain, padded, since_of    # noqa: E402
from registry import LARGE_TABLE, RUSH_WAIT    # noqa: E402
from secure import MAPS, Channel, Handshake, KeyPair, Keys, load_sodium    # noqa: E402
from stream import ReceiveStream    # noqa: E402
from home import show_time    # noqa: E402
from tests.build_zipapp import archive    # noqa: E402
from tests.processes import PROGRAM, SAVED, UPDATED, WELCOME, Chat, Process, received    # noqa: E402

HOST = "127.0.0.1"
ALL_TIME = 215.0          # s; what is not measured by then is not measured
PATIENCE = 60.0           # s; nothing is waited for longer, but a crowd
NEVER = float("inf")


class Row(NamedTuple):
    """One line of the result."""

    name: str
    figure: str
    yardstick: str
    ratio: str
    target: str
    met: bool


class TimeIsOver(Exception):
    """All measures together have taken too long."""


class Time:
    """How much of the time for everything is left."""

    def __init__(self) -> None:
        self._end = time.monotonic() + ALL_TIME

    def left(self, most: float) -> float:
        """Return the seconds that are left, at most ``most``; raise TimeIsOver if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeIsOver("the time for everything is over")
        return min(most, left)


TIME = Time()


# --- processes ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def world(program: Sequence[str] = PROGRAM) -> Iterator[Chat]:
    """A directory with processes of its own, started by the words ``program``; all are gone afterwards.

    Its clients speak in plain, so that no figure depends on whether PyNaCl is installed.
    """
    with tempfile.TemporaryDirectory(prefix="udpchat-bench-") as name, Chat(Path(name), program) as chat:
        # like an installed program: what is imported was compiled before
        chat.environment.update(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(chat.directory / "compiled"))
        choose(chat, "off", "client")
        yield chat


def choose(chat: Chat, secure: str, *modes: str) -> None:
    """Let programs of these modes that start from now on encrypt, or not; ``secure``: off, or require."""
    path = Path(chat.environment["XDG_CONFIG_HOME"]) / "udpchat" / "config"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"[{mode}]\nsecure = {secure}\n" for mode in modes))


def role(name: str, *arguments: str) -> list[str]:
    """The command that runs this file as one of the processes in ``ROLES``."""
    return [sys.executable, str(Path(__file__).resolve()), name, *arguments]


def run_to_file(chat: Chat, path: Path, *arguments: str, stdin: int = subprocess.DEVNULL,
                command: Sequence[str] | None = None) -> Process:
    """Start the program with its output in a file."""
    with path.open("wb") as file:
        return chat.run(*arguments, stdin=stdin, stdout=file.fileno(), command=command)


def run_with_pipe(chat: Chat, path: Path, *arguments: str, command: Sequence[str] | None = None,
                  ) -> tuple[Process, int]:
    """Start the program with its output in a file; return it, and the descriptor that leads to its stdin."""
    read_end, write_end = os.pipe()
    try:
        return run_to_file(chat, path, *arguments, stdin=read_end, command=command), write_end
    finally:
        os.close(read_end)


def as_client(chat: Chat, nick: str, *options: str, port: int = 0) -> list[str]:
    """The arguments of a client of this world; ``port``: of a server that was not started in the usual way."""
    return ["client", nick, HOST, str(port or chat.port), "0", *options]


def wait_for(chat: Chat, path: Path, text: str) -> None:
    """Wait until a file contains ``text``."""
    chat.until(lambda: text.encode() in path.read_bytes(), f"{text!r} in {path.name}", TIME.left(PATIENCE))


def pour(descriptor: int, *files: Path) -> subprocess.Popen[bytes]:
    """``cat`` of some files into a pipe, whose only end it holds."""
    try:
        return subprocess.Popen(["cat", *map(str, files)], stdin=subprocess.DEVNULL, stdout=descriptor)
    finally:
        os.close(descriptor)


def wait_for_end(process: Process) -> None:
    """Wait for the end of a process; it must be a good one."""
    if hasattr(os, "pidfd_open") and process.popen.poll() is None:
        # ``Popen.wait`` looks every 50 ms: too seldom to measure by
        fd = os.pidfd_open(process.pid)
        select.select([fd], [], [], TIME.left(PATIENCE))
        os.close(fd)
    code = process.popen.wait(TIME.left(PATIENCE))
    assert code == 0, f"{process} ended with {code}"


def processor_time(process: Process) -> float:
    """Seconds of processor time that a process has used (Linux only)."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9


def memory(process: Process, what: str = "VmHWM") -> float:
    """MB that a process holds at its peak, or now (VmRSS); 0 for one that has ended (Linux only)."""
    try:
        found = re.search(what + r":\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found.group(1)) * 1024 / 1e6 if found is not None else 0.0


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which ``part`` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


# --- the plain loop -------------------------------------------------------------------------------------------

CREDIT = 64               # datagrams that the plain loop has on their way: so that none is lost
TEXT_SIZE = 50            # bytes of a line
PLAIN_LINES = 50_000      # through the plain loop; its rate does not depend on it


def plain_send(arguments: list[str]) -> None:
    """The sender of the plain loop: a line, a map, a datagram."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((HOST, int(arguments[0])))
    print("ready", flush=True)
    pack = msgpack.Packer().pack
    for count, line in enumerate(sys.stdin.buffer, 1):
        sock.send(pack({"tag": "chat", "info": {"from": "alice", "to": "bob", "text": line[:-1].decode()}}))
        if count % CREDIT == 0:
            sock.recv(CREDIT)
    sock.send(pack({"tag": "end", "info": {}}))
    sock.recv(CREDIT)


def plain_receive(arguments: list[str]) -> None:
    """The receiver of the plain loop: a datagram, a map, a line in a file."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, 0))
    print(sock.getsockname()[1], flush=True)
    count = 0
    with open(arguments[0], "wb") as out:
        while True:
            datagram, address = sock.recvfrom(2048)
            message = msgpack.unpackb(datagram)
            if message["tag"] == "end":
                break
            out.write(f"{message['info']['from']}: {message['info']['text']}\n".encode())
            count += 1
            if count % CREDIT == 0:
                sock.sendto(b"go on", address)
    sock.sendto(b"all written", address)


def texts(count: int) -> list[str]:
    """So many different texts of ``TEXT_SIZE`` bytes."""
    filler = "the quick brown fox jumps over the lazy dog, twice"
    return [f"{number:08d} {filler}"[:TEXT_SIZE] for number in range(count)]


def write_lines(path: Path, lines: Sequence[str], start: str = "") -> Path:
    """Write a file of lines, each with ``start`` before it."""
    path.write_text("".join(f"{start}{line}\n" for line in lines))
    return path


def plain_loop() -> float:
    """Lines a second through the plain loop."""
    lines = texts(PLAIN_LINES)
    with world() as chat:
        out = chat.directory / "out"
        receiver = chat.run(command=role("--plain-receive", str(out)))
        sender, pipe = run_with_pipe(chat, chat.directory / "ready",
                                     command=role("--plain-send", receiver.next_line()))
        wait_for(chat, chat.directory / "ready", "ready")
        began = time.monotonic()
        pour(pipe, write_lines(chat.directory / "lines", lines)).wait(PATIENCE)
        wait_for_end(sender)
        seconds = time.monotonic() - began
        wait_for_end(receiver)
        assert out.read_text() == "".join(f"alice: {line}\n" for line in lines), "the plain loop has lost something"
    return PLAIN_LINES / seconds


# --- piped, keep, deliver, memory -----------------------------------------------------------------------------

PIPED_LINES = 400_000
PIPED_ROUNDS = 3          # of figure and yardstick in turn; the median ratio counts
KEPT_LINES = 200_000
MAIL_ROUNDS = 3           # of keeping and delivering them, and of the store alone
MEMORY_LINES = 2_000_000
MEMORY_FILES = 10         # that all of them are read from: one, so often
SAMPLE = 0.02             # s between looks at the memory of a process


def check_shown(path: Path, wanted: Sequence[str], start: str = "alice: ") -> None:
    """Every wanted line is there, once, in order, byte for byte; all others are ours."""
    lines = path.read_text().splitlines()
    shown = [line for line in lines if not line.startswith("[")]
    assert shown == [start + text for text in wanted], f"{len(shown)} lines are shown, {len(wanted)} expected"


def check_receipts(path: Path, receipt: str, count: int) -> None:
    """Check that there is a receipt for each line."""
    found = path.read_text().splitlines().count(receipt)
    assert found == count, f"{found} receipts for {count} lines"


def through_chat(lines: Sequence[str], program: Sequence[str] = PROGRAM,
                 prepare: Callable[[Chat], None] = lambda chat: None) -> float:
    """Lines a second from alice's stdin to bob's stdout."""
    with world(program) as chat:
        prepare(chat)
        out, receipts = chat.directory / "out", chat.directory / "receipts"
        source = write_lines(chat.directory / "lines", lines, "send bob ")
        run_to_file(chat, out, *as_client(chat, "bob", "--stay"))
        wait_for(chat, out, UPDATED)
        alice, pipe = run_with_pipe(chat, receipts, *as_client(chat, "alice"))
        wait_for(chat, receipts, UPDATED)
        began = time.monotonic()
        cat = pour(pipe, source)
        wait_for_end(alice)
        seconds = time.monotonic() - began
        cat.wait(PATIENCE)
        check_shown(out, lines)
        check_receipts(receipts, received("bob"), len(lines))
    return len(lines) / seconds


def measure_piped(names: set[str]) -> Iterator[Row]:
    """The throughput of a pipe."""
    lines = texts(PIPED_LINES)
    pairs = [(through_chat(lines), plain_loop()) for _ in range(PIPED_ROUNDS)]
    ratio = statistics.median(chat / plain for chat, plain in pairs)
    figure, yardstick = (statistics.median(rates) for rates in zip(*pairs))
    yield Row("piped", f"{figure:,.0f} lines/s", f"{yardstick:,.0f} lines/s: the plain loop", f"{ratio:.1f}",
              ">= 4 times (7 if it can be)", ratio >= 4)


def bare_store(lines: Sequence[str]) -> float:
    """Rows a second into a table like that of the mail, by SQLite alone."""
    with tempfile.TemporaryDirectory(prefix="udpchat-bench-") as name:
        database = sqlite3.connect(os.path.join(name, "bare.db"), isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE mail (recipient INTEGER, seq INTEGER, sender TEXT, stream INTEGER, n INTEGER,"
                         " at REAL, text TEXT, more INTEGER, size INTEGER, PRIMARY KEY (recipient, seq)) WITHOUT ROWID")
        began = time.monotonic()
        for start in range(0, len(lines), 4096):
            database.execute("BEGIN")
            database.executemany("INSERT INTO mail VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [
                (1, n, "alice", 2 ** 62, n, 1.5, text, 0, TEXT_SIZE)
                for n, text in enumerate(lines[start:start + 4096], start)])
            database.execute("COMMIT")
        seconds = time.monotonic() - began
        database.close()
    return len(lines) / seconds


def keep_lines(chat: Chat, lines: Sequence[str]) -> float:
    """Lines a second from alice's stdin into the mailbox of bob."""
    receipts = chat.directory / "receipts"
    source = write_lines(chat.directory / "lines", lines, "send bob ")
    alice, pipe = run_with_pipe(chat, receipts, *as_client(chat, "alice"))
    wait_for(chat, receipts, UPDATED)
    began = time.monotonic()
    cat = pour(pipe, source)
    wait_for_end(alice)
    seconds = time.monotonic() - began
    cat.wait(PATIENCE)
    check_receipts(receipts, SAVED, len(lines))
    return len(lines) / seconds


def deliver_lines(chat: Chat, lines: Sequence[str]) -> float:
    """Lines a second out of the mailbox of bob, who comes back."""
    out = chat.directory / "out"
    run_to_file(chat, out, *as_client(chat, "bob", "--stay"))
    while WELCOME.encode() not in out.read_bytes()[:1000]:
        TIME.left(0.0)
        time.sleep(0.001)
    began = time.monotonic()
    size = len(lines) * len(f"alice: <{show_time(0.0)}> {lines[0]}\n")
    end = began + TIME.left(PATIENCE)
    while out.stat().st_size < size and time.monotonic() < end:
        time.sleep(0.001)
    seconds = time.monotonic() - began
    chat.until(lambda: out.read_bytes().count(b"\nalice: ") >= len(lines), "all mail")
    plain = re.sub(r"(?m)^alice: <[^>]*> ", "alice: ", out.read_text())
    out.write_text(plain)
    check_shown(out, lines)
    return len(lines) / seconds


def measure_mail(names: set[str]) -> Iterator[Row]:
    """How fast messages are kept and delivered: the median of a few rounds, each beside the store alone."""
    rounds = [mail_round(texts(KEPT_LINES)) for _ in range(MAIL_ROUNDS)]
    kept, delivered, bare, before, grown = (statistics.median(column) for column in zip(*rounds))
    shares = [statistics.median(share) for share in zip(*[(k / b, d / k, d / b) for k, d, b, _, _ in rounds])]
    for name, figure, yardstick, share in (
            ("keep", kept, f"{bare:,.0f} rows/s: SQLite alone", shares[0]),
            ("deliver", delivered, f"{kept:,.0f} lines/s: keep", shares[1]),
            ("deliver", delivered, f"{bare:,.0f} rows/s: SQLite alone", shares[2])):
        yield Row(name, f"{figure:,.0f} lines/s", yardstick, f"{share:.2f}", ">= 0.8 of it", share >= 0.8)
    yield Row("deliver", f"server + {grown:.1f} MB", f"{before:.1f} MB before", f"{1 + grown / before:.2f}",
              "flat: + 8 MB at most", grown <= 8)


def mail_round(lines: Sequence[str]) -> tuple[float, float, float, float, float]:
    """Lines kept and delivered, and rows of SQLite alone, in a second; MB of the server before, and more behind it."""
    options = ("--mailbox-limit", str(len(lines) + 1))
    with world() as chat:
        server = chat.server(*options)
        chat.absent("bob")
        kept, bare = keep_lines(chat, lines), bare_store(lines)
        server.signal(signal.SIGTERM)
        server.wait()
        server = chat.server(*options)
        before = memory(server)
        delivered = deliver_lines(chat, lines)
        return kept, delivered, bare, before, memory(server) - before


def measure_memory(names: set[str]) -> Iterator[Row]:
    """The peak of each process while lines are piped through."""
    lines = texts(MEMORY_LINES // MEMORY_FILES)
    modules = "import argparse, hmac, logging, msgpack, random, selectors, socket, sqlite3, subprocess, sys"
    with world() as chat:
        bare = chat.run("-c", modules + "; print(1, flush=True); sys.stdin.read()", command=[sys.executable])
        bare.next_line()
        least = memory(bare)
        receipts, out = chat.directory / "receipts", chat.directory / "out"
        source = write_lines(chat.directory / "lines", lines, "send bob ")
        server = chat.server()
        bob = run_to_file(chat, out, *as_client(chat, "bob", "--stay"))
        wait_for(chat, out, UPDATED)
        alice, pipe = run_with_pipe(chat, receipts, *as_client(chat, "alice"))
        wait_for(chat, receipts, UPDATED)
        cat = pour(pipe, *[source] * MEMORY_FILES)
        peak = 0.0
        end = time.monotonic() + TIME.left(PATIENCE)
        while alice.popen.poll() is None and time.monotonic() < end:
            peak = max(peak, memory(alice))
            time.sleep(SAMPLE)
        cat.kill()
        cat.wait()
        count = out.read_bytes().count(b"\nalice: ")
        peaks = [peak, memory(bob), memory(server)]
        yield Row("memory", "alice {:.1f}, bob {:.1f}, server {:.1f} MB".format(*peaks),
                  f"{least:.1f} MB: Python and its modules", f"{max(peaks) / least:.2f}",
                  f"<= 40 MB each ({count:,} lines)", max(peaks) <= 40 and count == MEMORY_LINES)


# --- latency --------------------------------------------------------------------------------------------------

ROUNDS = 2_000
BLOCKS = (1, 100)         # rounds of the program, then as many of the yardstick, and so on


def bare_echo(arguments: list[str]) -> None:
    """Decode every datagram, and send what was in it back."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, 0))
    print(sock.getsockname()[1], flush=True)
    while True:
        datagram, address = sock.recvfrom(2048)
        sock.sendto(msgpack.packb(msgpack.unpackb(datagram)), address)


def bare_loop(arguments: list[str]) -> None:
    """Send every line, and write what comes back for it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((HOST, int(arguments[0])))
    while True:
        line = os.read(0, 4096)
        if not line:
            return
        sock.send(msgpack.packb({"tag": "chat", "info": {"text": line.decode()}}))
        answer = msgpack.unpackb(sock.recv(2048))
        os.write(1, answer["info"]["text"].encode())


def start_bare_loop(chat: Chat) -> Process:
    """Start both sides of the bare loop; return the one that a line goes into, and comes out of."""
    echo = chat.run(command=role("--echo"))
    return chat.run(command=role("--bare", echo.next_line()))


def one_round(process: Process, line: str, answer: str) -> float:
    """Seconds from a line until the line that answers it."""
    fd = process.out.fd
    assert fd is not None
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    wanted, seen = answer.encode(), b""
    began = time.monotonic()
    process.feed(line)
    while wanted not in seen:
        assert poll.poll(5000), f"{process} does not answer"
        data = os.read(fd, 65536)
        assert data, f"{process} has ended"
        seen += data
    return time.monotonic() - began


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """On one core, with all processes that are started meanwhile, where that is possible."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def beside_bare_loop(alice: Process, bare: Process, block: int) -> tuple[list[float], list[float]]:
    """Microseconds from a line to its receipt, and those of the bare loop, ``block`` rounds of each by turns."""
    chats: list[float] = []
    bares: list[float] = []
    line = texts(1)[0]
    for _ in range(ROUNDS // block):
        chats += [one_round(alice, f"send bob {line}\n", received("bob")) * 1e6 for _ in range(block)]
        bares += [one_round(bare, f"{line}\n", line) * 1e6 for _ in range(block)]
    return chats, bares


def measure_latency(names: set[str]) -> Iterator[Row]:
    """What one message takes."""
    with world() as chat, one_core():
        alice, bare = alice_and_bob(chat), start_bare_loop(chat)
        found = {block: beside_bare_loop(alice, bare, block) for block in BLOCKS}
    for block, (chats, bares) in found.items():
        bare_half, bare_most = percentile(bares, 0.5), percentile(bares, 0.99)
        for part, limit in ((0.5, 2.5), (0.99, 6.0)):
            figure, is_judged = percentile(chats, part), block == 1
            yield Row("latency", f"p{part * 100:.0f} {figure:,.0f} us, " + ("in turn" if is_judged else "in blocks"),
                      f"p50 {bare_half:,.0f} us: the bare loop (its p99: {bare_most:,.0f})",
                      f"{figure / bare_half:.1f}", f"<= {limit} times its p50" if is_judged else "none",
                      not is_judged or figure <= limit * bare_half)


# --- start ----------------------------------------------------------------------------------------------------

STARTS = 15
INSTALLED = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from udpchat import run;"
             " sys.exit(run())"]      # what pip makes of an entry point


def round_trip(chat: Chat) -> float:
    """Seconds of a round trip to a process that echoes, the median."""
    echo = chat.run(command=role("--echo"))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(5)
        sock.connect((HOST, int(echo.next_line())))
        trips = []
        for _ in range(200):
            began = time.monotonic()
            sock.send(encode("bye", {}))
            sock.recv(2048)
            trips.append(time.monotonic() - began)
    echo.kill()
    return statistics.median(trips)


def ended(chat: Chat, *arguments: str, command: Sequence[str]) -> float:
    """Seconds from the start of a process to its end."""
    began = time.monotonic()
    popen = subprocess.Popen([*command, *arguments], env=chat.environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
    assert popen.wait() == 0        # with a limit, it would look only after 1, 3, 7, 15, 31 ms and so on
    return time.monotonic() - began


def shown_help(chat: Chat) -> float:
    """Seconds that ``--help`` takes."""
    return ended(chat, "--help", command=chat.program)


def welcomed(chat: Chat) -> float:
    """Seconds from the start of a client to its welcome."""
    began = time.monotonic()
    client = chat.run("client", "carol", HOST, str(chat.port), stdin=subprocess.DEVNULL)
    assert client.out.fd is not None
    seen = b""
    while WELCOME.encode() not in seen:
        data = os.read(client.out.fd, 4096)
        assert data, "no welcome"
        seen += data
    seconds = time.monotonic() - began
    client.wait()
    return seconds


def measure_start(names: set[str]) -> Iterator[Row]:
    """How long the program takes to be there."""
    with world(INSTALLED) as chat:
        modules = [sys.executable, "-c", "import msgpack, argparse, selectors, socket"]
        chat.absent("alice")        # what is imported is compiled from now on
        trip = round_trip(chat)
        shown_help(chat)
        chat.client("bob", "--stay", stdin=subprocess.DEVNULL)
        to_bob = "send", "--server", f"{HOST}:{chat.port}", "bob", "hello"
        times = [(ended(chat, command=modules), shown_help(chat), welcomed(chat),
                  ended(chat, "--help", command=PROGRAM), ended(chat, *to_bob, command=chat.program))
                 for _ in range(STARTS)]
    bare, shown, welcome, script, sent = (statistics.median(column) for column in zip(*times))
    yard = f"{bare * 1e3:.0f} ms: the imports"
    yield Row("start", f"--help {shown * 1e3:.0f} ms", yard, f"{shown / bare:.2f}", "<= 1.5 times",
              shown <= 1.5 * bare)
    limit = 1.5 * bare + 3 * trip
    yield Row("start", f"welcome {welcome * 1e3:.0f} ms", f"{yard}; {trip * 1e6:.0f} us: a round trip",
              f"{welcome / bare:.2f}", f"<= {limit * 1e3:.0f} ms: 1.5 times + 3 round trips", welcome <= limit)
    limit = 1.6 * bare + 5 * trip
    yield Row("start", f"send {sent * 1e3:.0f} ms", f"{yard}; {trip * 1e6:.0f} us: a round trip",
              f"{sent / bare:.2f}", f"<= {limit * 1e3:.0f} ms: 1.6 times + 5 round trips", sent <= limit)
    yield Row("start", f"--help of the script {script * 1e3:.0f} ms", yard, f"{script / bare:.2f}", "<= 1.5 times",
              script <= 1.5 * bare)


# --- one file -------------------------------------------------------------------------------------------------

ZIPAPP_LINES = 100_000
ZIPAPP_ROUNDS = 3         # of lines through a pipe
ZIPAPP_MESSAGES = 500


def one_message(senders: Sequence[Process], count: int) -> list[float]:
    """Seconds from a line for bob to its receipt, of each sender in turn; the medians."""
    line = f"send bob {texts(1)[0]}\n"
    rounds = [[one_round(sender, line, received("bob")) for sender in senders] for _ in range(count)]
    return [statistics.median(column) for column in zip(*rounds)]


def alice_and_bob(chat: Chat) -> Process:
    """Start both; return alice, who knows bob."""
    out = chat.directory / "out"
    run_to_file(chat, out, *as_client(chat, "bob", "--stay"))
    wait_for(chat, out, UPDATED)
    alice = chat.client("alice")
    alice.see(UPDATED)
    return alice


def measure_zipapp(names: set[str]) -> Iterator[Row]:
    """What it costs to run the program as one file."""
    lines = texts(ZIPAPP_LINES)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="udpchat-bench-")))
        (folder / "udpchat.pyz").write_bytes(archive())
        programs = INSTALLED, [sys.executable, str(folder / "udpchat.pyz")]
        rates = [[through_chat(lines, program) for program in programs] for _ in range(ZIPAPP_ROUNDS)]
        stack.enter_context(one_core())
        worlds = [stack.enter_context(world(program)) for program in programs]
        took = one_message([alice_and_bob(chat) for chat in worlds], ZIPAPP_MESSAGES)
        starts = [[measure(chat) for chat in worlds for measure in (shown_help, welcomed)] for _ in range(STARTS)]
    plain_rate, rate = (statistics.median(column) for column in zip(*rates))
    plain_help, plain_welcome, shown, welcome = (statistics.median(column) * 1e3 for column in zip(*starts))
    for figure, yardstick, ratio in (
            (f"--help {shown:.0f} ms", f"{plain_help:.0f} ms", shown / plain_help),
            (f"welcome {welcome:.0f} ms", f"{plain_welcome:.0f} ms", welcome / plain_welcome),
            (f"{rate:,.0f} lines/s", f"{plain_rate:,.0f} lines/s", rate / plain_rate),
            (f"p50 {took[1] * 1e6:,.0f} us", f"{took[0] * 1e6:,.0f} us", took[1] / took[0])):
        yield Row("zipapp", figure, f"{yardstick}: installed", f"{ratio:.2f}", "none", True)


# --- the swarm ------------------------------------------------------------------------------------------------

REQUEST = 0.5             # s between attempts of a request, and ...
ATTEMPTS = 5              # ... how many: as a client does
SYNC, MAX_SYNC = 0.2, 2.0     # s until what is missing of the table is asked for again, and that time at most
PING = 15.0               # s between pings
LOST_PING = 2.0           # s between pings to a server that is silent
READS = 64                # datagrams of one member in one turn
MIRRORS = 3               # members that keep the whole table
SLICE = 50                # members that join together when they come in turn
CHECK = 0.02              # s between looks at a condition
SWARM_BUFFER = 4 * 2 ** 20      # bytes asked from the kernel for each socket, as a client does

PAGE_STARTS = tuple(encode(tag, {}).split(tag.encode())[0] + tag.encode() for tag in ("table", "packed"))


def page_of(info: Info) -> Page:
    """What a ``table`` says."""
    return Page(since_of(info), info["version"], info["set"])


@functools.lru_cache(maxsize=8192)
def read_page(data: bytes) -> Page | None:
    """A ``table`` map as a page, None if it is not valid; one that many members get is decoded once."""
    decoder = Decoder()
    for tag, info in decoder.decode(data):
        if tag == "packed":
            (_, info), = decoder.unpacked(info["data"])
        return page_of(info)
    return None


class Member:
    """One client of a swarm."""

    __slots__ = ("nick", "sock", "request", "attempts", "server_id", "cookie", "session", "leaving", "version",
                 "target", "pages", "synced", "wait", "boot", "ping", "due", "queued", "mirror", "mail")

    def __init__(self, nick: str) -> None:
        self.nick = nick
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SWARM_BUFFER)
        self.sock.bind((HOST, 0))
        self.request = 0
        self.attempts = 0
        self.cookie: bytes | None = None
        self.session: bytes | None = None
        self.leaving = False
        self.version = 0            # up to which the table is held
        self.target = 0             # up to which it should be
        self.pages = 0              # since the last sync ...
        self.synced = -NEVER        # ... and when that was
        self.wait = 0.0             # s until it is repeated if nothing comes
        self.boot = 0               # of the server, in this session
        self.ping = 0               # id of the last one
        self.due = NEVER            # when to ask the server for something
        self.queued = NEVER         # when to look at that
        self.mirror: Table | None = None
        self.mail: ReceiveStream | None = None


class Swarm:
    """Many clients in one process. ``until`` runs them."""

    def __init__(self, port: int, count: int) -> None:
        self.server = (HOST, port)
        self.refused = 0
        self.unwelcome = 0          # attempts to register that were given up, as a client would
        self.unanswered = 0         # pings to which five attempts did not get an answer
        self.shown = 0              # letters
        self.table_bytes = 0        # of all datagrams with a page
        self._random = random.Random(1)
        self._now = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Member]] = []
        self._serial = 0
        self._decoder = Decoder()
        self._handlers: dict[str, Callable[[Member, Info], None]] = {
            "cookie": self._on_cookie, "welcome": self._on_welcome, "refused": self._on_refused,
            "pong": self._on_pong, "probe": self._on_probe, "mail": self._on_mail, "bye": self._on_bye,
            "table": lambda member, info: self._on_page(member, page_of(info))}
        self.members = [Member(f"m{number:05d}") for number in range(count)]
        for member in self.members:
            self._selector.register(member.sock, selectors.EVENT_READ, member)
        for member in self.members[:MIRRORS]:
            member.mirror = Table()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for member in self.members:
            member.sock.close()

    # running

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Run until ``condition()`` holds or ``seconds`` are over; return whether it holds."""
        self._now = time.monotonic()
        end, check = self._now + TIME.left(seconds), self._now
        while True:
            if self._now >= check:
                if condition():
                    return True
                check = self._now + CHECK
            if self._now >= end:
                return False
            self._turn(min(check, end))

    def _turn(self, until: float) -> None:
        first = self._timers[0][0] if self._timers else NEVER
        for key, _ in self._selector.select(max(0.0, min(until, first) - time.monotonic())):
            self._read(key.data)
        self._now = time.monotonic()
        while self._timers and self._timers[0][0] <= self._now:
            when, _, member = heapq.heappop(self._timers)
            if when != member.queued:
                continue
            member.queued = NEVER
            if member.due <= self._now:
                self._read(member)      # a turn of thousands is long: what has come meanwhile comes first
            if member.due > self._now:
                self._set(member, member.due)
            else:
                self._ask(member)

    def _set(self, member: Member, when: float) -> None:
        member.due = when
        if when < member.queued:
            member.queued = when
            self._serial += 1
            heapq.heappush(self._timers, (when, self._serial, member))

    def _in(self, seconds: float) -> float:
        return self._now + seconds * self._random.uniform(0.75, 1.25)

    def _send(self, member: Member, data: bytes) -> None:
        try:
            member.sock.sendto(data, self.server)
        except OSError:
            pass        # lost, and so repeated

    def _read(self, member: Member) -> None:
        receive = member.sock.recv
        for _ in range(READS):
            try:
                datagram = receive(2048)
            except BlockingIOError:
                return
            except OSError:
                continue
            self._take(member, datagram)

    def _take(self, member: Member, datagram: bytes) -> None:
        if datagram.startswith(PAGE_STARTS, FOR_SIZE):
            self.table_bytes += len(datagram)
            if member.session is not None and datagram.startswith(addressed(member.session)):
                page = read_page(datagram[FOR_SIZE:])
                if page is not None:
                    self._on_page(member, page)
            return
        trusted = False
        for tag, info in self._decoder.decode(datagram):
            if tag == "for":
                trusted = member.session is not None and member.session.startswith(info["session"])
            elif tag in self._handlers and (trusted or tag not in ("table", "mail")):
                self._handlers[tag](member, info)

    # what members do

    def join(self, members: Sequence[Member]) -> None:
        """They register, all at once."""
        self._now = time.monotonic()
        for member in members:
            member.leaving = False
            self._register(member)

    def join_in_turn(self) -> None:
        """They register, a few at a time, until all hold the whole table."""
        for start in range(0, len(self.members), SLICE):
            members = self.members[start:start + SLICE]
            self.join(members)
            done = self.until(lambda: all(member.session is not None and member.version >= member.target
                                          for member in members), PATIENCE / 4)
            assert done, f"{start} members are registered, and no more"
        assert self.until(lambda: self.all_hold(len(self.members)), PATIENCE), "not all hold the table"

    def leave(self, member: Member) -> None:
        """It deregisters."""
        self._now = time.monotonic()
        member.leaving = True
        self._ask(member)

    def stop_answering(self) -> None:
        """All are silent from now on; their sockets stay open."""
        for member in self.members:
            self._selector.unregister(member.sock)
            member.due = member.queued = NEVER
        self._timers.clear()

    def _register(self, member: Member) -> None:
        member.request = self._random.getrandbits(63)
        member.cookie = member.session = None
        member.attempts = 0
        self._ask(member)

    def _ask(self, member: Member) -> None:
        """Ask for whatever the member needs next."""
        session = member.session
        if session is None:
            if member.attempts >= ATTEMPTS:
                self.unwelcome += 1
                self._register(member)
                return
            member.attempts += 1
            self._send_reg(member)
            self._set(member, self._in(REQUEST))
        elif member.leaving:
            self._send(member, padded("dereg", {"session": session}, protocol.SESSION_SIZE))
            self._set(member, self._in(REQUEST))
        elif member.version < member.target:
            patience = RUSH_WAIT if member.target >= LARGE_TABLE else 2 * SYNC
            if not member.pages and patience <= member.wait < MAX_SYNC:
                self._ping(member)      # nothing has come at all
            member.pages, member.synced = 0, self._now
            self._send(member, padded("sync", {"session": session, "version": member.version}, protocol.SESSION_SIZE))
            member.wait = max(SYNC, min(2 * member.wait, MAX_SYNC))
            self._set(member, self._in(member.wait))
        else:
            member.attempts += 1
            self.unanswered += member.attempts == ATTEMPTS + 1
            self._ping(member, is_new=member.attempts == 1)     # a late answer to an earlier one is one, too
            self._set(member, self._in(REQUEST if member.attempts <= ATTEMPTS else LOST_PING))

    def _ping(self, member: Member, is_new: bool = True) -> None:
        if is_new:
            member.ping = self._random.getrandbits(63)
        self._send(member, padded("ping", {"id": member.ping, "session": member.session, "version": member.version},
                                  protocol.SESSION_SIZE))

    def _send_reg(self, member: Member) -> None:
        info: Info = {"id": member.request, "nick": member.nick, "packed": True}
        if member.cookie is not None:
            info["cookie"] = member.cookie
        self._send(member, padded("reg", info, protocol.REG_SIZE))

    def _on_cookie(self, member: Member, info: Info) -> None:
        if info["id"] == member.request and member.session is None:
            if member.cookie is None:
                member.attempts = 1         # the server is there
            member.cookie = info["cookie"]
            self._send_reg(member)

    def _on_welcome(self, member: Member, info: Info) -> None:
        if info["id"] == member.request and member.session is None:
            member.session, member.target, member.attempts = info["session"], info["version"], 0
            if info["boot"] != member.boot:
                member.boot, member.version = info["boot"], 0
                member.mirror = Table() if member.mirror is not None else None
            self._ask(member)

    def _on_refused(self, member: Member, info: Info) -> None:
        self.refused += 1

    def _on_bye(self, member: Member, info: Info) -> None:
        if info["session"] == member.session:
            member.session = None
            member.due = NEVER
            self._set(member, NEVER)

    def _on_page(self, member: Member, page: Page) -> None:
        if member.leaving:
            return
        if page.since > member.version:
            member.target = max(member.target, page.version)
            self._set(member, min(member.due, max(self._now, member.synced + SYNC)))
        elif page.version > member.version:
            was_behind = member.version < member.target
            member.version, member.wait = page.version, 0.0
            member.pages += 1
            if member.mirror is not None:
                member.mirror.apply(page)
            if member.version < member.target:
                if member.pages >= protocol.SYNC_PAGES:
                    self._ask(member)
            elif was_behind:
                member.attempts = 0
                self._ask(member)       # a ping: the server learns that the table is here

    def _on_pong(self, member: Member, info: Info) -> None:
        if member.session is None or member.leaving:
            return
        if info["id"] != member.ping:       # the server may have restarted
            self._set(member, min(member.due, self._now + self._random.random()))
            return
        if info["boot"] != member.boot:
            self._register(member)
            return
        member.attempts = 0
        if member.version < member.target:      # the table is asked for already
            member.target = max(member.target, info["version"])
            return
        self._set(member, self._in(PING))
        if info["version"] > member.version:
            member.target = info["version"]
            self._set(member, max(self._now, member.synced + SYNC))

    def _on_probe(self, member: Member, info: Info) -> None:
        if info["to"] == member.nick and member.session is not None and not member.leaving:
            self._send(member, encode("alive", {"id": info["id"], "nick": member.nick, "session": member.session}))

    def _on_mail(self, member: Member, info: Info) -> None:
        if member.mail is None or member.mail.id != info["stream"]:
            member.mail = ReceiveStream(info["stream"])
        member.mail.on_data(info["n"], *letters_of(info, opened_plain), info["base"])
        member.mail.advance(info["base"])
        for run in member.mail.take():
            self.shown += 1 if run.more else len(run.items)
            member.mail.written(1 if run.more else len(run.items))
        self._send(member, encode("ack", member.mail.ack()))

    # looking at it

    def all_hold(self, version: int) -> bool:
        """Whether all are registered and hold the same table, of that version or a later one."""
        first = self.members[0].version
        return first >= version and all(member.session is not None and member.version == first
                                        for member in self.members)

    def told(self, version: int) -> bool:
        """Whether all that are registered hold that version or a later one."""
        return all(member.version >= version for member in self.members if member.session is not None)

    def wrong(self) -> int:
        """How many entries in the whole tables are not what they should be, at most."""
        found = 0
        for member in self.members[:MIRRORS]:
            assert member.mirror is not None
            entries = member.mirror.entries
            count = 0
            for other in self.members:
                entry = entries.get(other.nick)
                place = (ONLINE, other.sock.getsockname()[1])
                count += entry is None or (entry.state, entry.port) != place
            found = max(found, count)
        return found


class SecretSwarm(Swarm):
    """A swarm whose members encrypt."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__(port, count)
        sodium = load_sodium()
        assert sodium is not None
        self._channels: dict[Member, Channel] = {}
        self._handshakes: dict[Member, Handshake] = {}
        for member in self.members:
            keys = Keys(sodium, KeyPair(sodium, os.urandom(32)), lambda: os.urandom(32))
            handshake = Handshake(functools.partial(self._say, member), keys=keys)
            handshake.on_welcome = functools.partial(self._begin, member)
            handshake.on_found = functools.partial(self._on_found, member)
            self._handshakes[member] = handshake

    def _on_found(self, member: Member, is_busy: bool) -> None:
        member.attempts = 1
        if is_busy:
            self._set(member, self._in(2 * REQUEST))

    def _say(self, member: Member, data: bytes, server: protocol.Address) -> None:
        super()._send(member, data)

    def _begin(self, member: Member, info: Info, server: protocol.Address, channel: Channel) -> None:
        self._channels[member] = channel
        self._on_welcome(member, info)

    def _send(self, member: Member, data: bytes) -> None:
        super()._send(member, self._channels[member].seal(MAPS, data))

    def _send_reg(self, member: Member) -> None:
        handshake = self._handshakes[member]
        if handshake.id != member.request:
            handshake.begin(member.request, member.nick)
        handshake.ask((self.server,))

    def _take(self, member: Member, datagram: bytes) -> None:
        if datagram[:1] == RECORD_MARK:
            text = self._channels[member].open(datagram)
            if text.startswith(PAGE_STARTS):
                self.table_bytes += len(datagram)
                page = read_page(text)
                if page is not None:
                    self._on_page(member, page)
                return
            for tag, info in self._decoder.decode(text):
                if tag in self._handlers:
                    self._handlers[tag](member, info)
            return
        for tag, info in self._decoder.decode(datagram):
            if tag == "cookie":
                self._handshakes[member].on_cookie(info, self.server)
            elif tag == "hello":
                self._handshakes[member].on_hello(info, self.server)
            elif tag == "pong" and member.session is not None:
                member.attempts += 1        # the server does not know the channel, as it seems
                if member.attempts > 2:
                    self._register(member)
                else:
                    self._set(member, min(member.due, self._now + self._random.random()))


def raise_limit() -> int:
    """Allow as many descriptors as may be; return how many members a swarm may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted - 200


# --- crowd, idle, table ---------------------------------------------------------------------------------------

SMALL_CROWD, LARGE_CROWD = 2_000, 10_000
CROWD_LIMITS = {SMALL_CROWD: 5.0, LARGE_CROWD: 15.0}    # s
RESTART_LIMIT = 20.0      # s
CROWD_PATIENCE = 10.0     # s beyond that until a crowd is given up
SETTLE = 2.0              # s of rest before something is measured
IDLE_TIME = 20.0          # s
IDLE_ROUNDS = 4           # parts of it
BARE_TIME = 0.7           # s in which a bare loop is woken up as often, behind each of them
CHANGES = {1: 120, 100: 120, 1_000: 30, 10_000: 8}      # clients -> changes of the table that are sent to them


TABLE_SIZE = 95           # bytes of a datagram that tells one change
BARE_SENDS = 10_000


class Cost(NamedTuple):
    """What the changes of a table cost the server."""

    seconds: float      # of processor time for one change
    sent: float         # bytes to each client for one change
    bare: float         # seconds of processor time that a bare ``sendto`` to one of the clients takes


def measure_crowd(swarm: Swarm, server: Process, count: int) -> Row:
    """All register at once; until each holds the table with all of them."""
    limit = CROWD_LIMITS.get(count, max(CROWD_LIMITS.values()))
    began, used = time.monotonic(), processor_time(server)
    swarm.join(swarm.members)
    done = swarm.until(lambda: swarm.all_hold(count), limit + CROWD_PATIENCE)
    seconds, used = time.monotonic() - began, processor_time(server) - used
    holding = sum(member.version >= count for member in swarm.members)
    if done:
        swarm.until(lambda: False, SETTLE)
    faults = (swarm.refused, swarm.unwelcome, swarm.wrong() if done else 0)
    figure = f"{count:,}: {seconds:.1f} s" if done else f"{count:,}: {holding:,} after {seconds:.0f} s"
    return Row("crowd", figure + "; {} refused, {} without answer, {} wrong".format(*faults),
               f"{used:.1f} s of the server's core", f"{seconds / max(used, 1e-9):.1f}", f"<= {limit:.0f} s, no fault",
               done and seconds <= limit and not any(faults))


def measure_restart(swarm: Swarm, chat: Chat, server: Process, count: int) -> Row:
    """The server is killed and started again; until all are back, and hold the table in which they are."""
    swarm.refused = swarm.unwelcome = 0
    server.kill()
    began = time.monotonic()
    server = chat.restart()
    done = swarm.until(lambda: swarm.all_hold(2 * count), RESTART_LIMIT + CROWD_PATIENCE)
    seconds, used = time.monotonic() - began, processor_time(server)
    faults = (swarm.refused, swarm.unwelcome, swarm.wrong() if done else count)
    return Row("restart", f"{count:,}: {seconds:.1f} s" + "; {} refused, {} without answer, {} wrong".format(*faults),
               f"{used:.1f} s of the server's core", f"{seconds / max(used, 1e-9):.1f}",
               f"<= {RESTART_LIMIT:.0f} s, no fault", done and seconds <= RESTART_LIMIT and not any(faults))


def bare_pings(echo: Process, port: int, rate: float) -> float:
    """Seconds of processor time for one of ``rate`` datagrams a second that a bare loop wakes up for and answers."""
    ping, count = encode("ping", {"session": bytes(protocol.SESSION_BYTES)}), int(rate * BARE_TIME)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        used = processor_time(echo)
        for _ in range(count):
            sock.sendto(ping, (HOST, port))
            time.sleep(1 / rate)
        return (processor_time(echo) - used) / count


def measure_idle(swarm: Swarm, chat: Chat, server: Process) -> tuple[Row, float]:
    """Measure clients that only ping; return the row, and the part of a core that the server needs for them."""
    echo, count, bares = chat.run(command=role("--echo")), len(swarm.members), list[float]()
    port = int(echo.next_line())
    swarm.until(lambda: False, SETTLE)
    began, used = time.monotonic(), processor_time(server)
    for _ in range(IDLE_ROUNDS):        # with the bare loop by turns; what was due meanwhile is sent behind it
        swarm.until(lambda: False, IDLE_TIME / IDLE_ROUNDS)
        bares.append(bare_pings(echo, port, count / PING))
    swarm.until(lambda: False, BARE_TIME)
    seconds, used, bare = time.monotonic() - began, processor_time(server) - used, statistics.median(bares)
    share, held = used / seconds, memory(server, "VmRSS")
    ping = used / seconds / count * PING
    return Row("idle", f"{count:,}: {ping * 1e6:.0f} us a ping, {share:.1%} of a core; {held:.0f} MB",
               f"{bare * 1e6:.0f} us: a bare loop", f"{ping / bare:.1f}", "<= 3 times, <= 80 MB",
               ping <= 3 * bare and held <= 80), share


def measure_changes(swarm: Swarm, server: Process, count: int, share: float) -> Cost:
    """One member leaves and comes back, each change told for itself; ``share``: the part of a core that pings take."""
    changer = swarm.members[-1]
    version = max(member.version for member in swarm.members)
    swarm.table_bytes = 0
    began, used = time.monotonic(), processor_time(server)
    for change in range(count):
        version += 1
        if change % 2:
            swarm.join([changer])
        else:
            swarm.leave(changer)
        done = swarm.until(lambda: swarm.told(version) and (changer.session is None) == (change % 2 == 0), PATIENCE)
        assert done, "a change was not told to all"
    used = processor_time(server) - used - share * (time.monotonic() - began)
    return Cost(used / count, swarm.table_bytes / count / (len(swarm.members) - 0.5), bare_sends(swarm.members))


def small_table(count: int) -> Cost:
    """The cost of changes for a server with ``count`` clients, and one that changes."""
    with world() as chat:
        server = chat.server()
        with Swarm(chat.port, count + 1) as swarm:
            swarm.join_in_turn()
            swarm.until(lambda: False, SETTLE / 2)
            used = processor_time(server)
            swarm.until(lambda: False, SETTLE)
            return measure_changes(swarm, server, CHANGES[count], (processor_time(server) - used) / SETTLE)


def bare_sends(members: Sequence[Member]) -> float:
    """Seconds of processor time for one datagram of that size to one of these, who drop it."""
    data, addresses = bytes(TABLE_SIZE), [member.sock.getsockname() for member in members]
    rounds_ = max(1, BARE_SENDS // len(addresses))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        began = time.thread_time()
        for _ in range(rounds_):
            for address in addresses:
                sock.sendto(data, address)
        return (time.thread_time() - began) / (rounds_ * len(addresses))


def table_rows(costs: dict[int, Cost]) -> Iterator[Row]:
    """What the table costs, from the costs with each number of clients."""
    own = costs.pop(1).seconds
    counts = ", ".join(f"{count:,}" for count in costs)
    sizes = [cost.sent for cost in costs.values()]
    yield Row("table", " / ".join(f"{size:.0f}" for size in sizes) + " bytes", f"with {counts} clients", "-",
              "<= 100 bytes, constant", max(sizes) <= 100 and max(sizes) <= 1.2 * min(sizes))
    times = [(cost.seconds - own) / count for count, cost in costs.items()]
    ratios = [seconds / cost.bare for seconds, cost in zip(times, costs.values())]
    bare = " / ".join(f"{cost.bare * 1e6:.1f}" for cost in costs.values())
    yield Row("table", " / ".join(f"{seconds * 1e6:.1f}" for seconds in times) + " us",
              f"{bare} us: a bare sendto to each", " / ".join(f"{ratio:.1f}" for ratio in ratios),
              "<= 2.5 times, constant", max(ratios) <= min(2.5, 1.5 * min(ratios)))


def measure_many(names: set[str]) -> Iterator[Row]:
    """Everything for which many clients are registered: ``crowd``, ``idle``, ``table``, ``restart``."""
    large = min(LARGE_CROWD, raise_limit())
    if "crowd" in names:
        with world() as chat:
            server = chat.server()
            with Swarm(chat.port, SMALL_CROWD) as swarm:
                yield measure_crowd(swarm, server, SMALL_CROWD)
    costs = {count: small_table(count) for count in CHANGES if count < large} if "table" in names else {}
    with world() as chat:
        server = chat.server()
        with Swarm(chat.port, large) as swarm:
            yield measure_crowd(swarm, server, large)
            whole = swarm.all_hold(large)
            share = 0.0
            if whole and names & {"idle", "table"}:
                row, share = measure_idle(swarm, chat, server)
                yield row
            if whole and costs:
                costs[large - 1] = measure_changes(swarm, server, CHANGES[LARGE_CROWD], share)
            if whole and "restart" in names:
                yield measure_restart(swarm, chat, server, large)
    if not whole and "idle" in names:
        yield Row("idle", "not measured: the crowd was not complete", "-", "-", "<= 5 %, <= 80 MB", False)
    if costs:
        yield from table_rows(costs)


# --- encryption -----------------------------------------------------------------------------------------------

SECRET_LINES = 100_000
SECRET_ROUNDS = 3         # of lines kept and delivered, plain and encrypted by turns
SECRET_STARTS = 15        # the same of starts of a client


def speaks_plain(chat: Chat, is_plain: bool) -> None:
    """Let all programs that start from now on encrypt, or not."""
    choose(chat, "off" if is_plain else "require", "client", "server")


def mail_pair(is_plain: bool, lines: Sequence[str]) -> tuple[float, float]:
    """Lines a second that are kept, and that are delivered."""
    with world() as chat:
        speaks_plain(chat, is_plain)
        chat.server("--mailbox-limit", str(len(lines) + 1))
        chat.absent("bob")
        return keep_lines(chat, lines), deliver_lines(chat, lines)


def piped_pair() -> tuple[float, float, float]:
    """Lines a second through a pipe, plain and encrypted, and of the plain loop."""
    lines = texts(PIPED_LINES)
    plain, secret = (through_chat(lines, prepare=functools.partial(speaks_plain, is_plain=is_plain))
                     for is_plain in (True, False))
    return plain, secret, plain_loop()


def latency_pairs() -> Iterator[tuple[float, float]]:
    """Seconds from a line to its receipt, plain and encrypted, all processes on one core."""
    line = texts(1)[0]
    with world() as plain, world() as secret, one_core():
        for chat, is_plain in ((plain, True), (secret, False)):
            speaks_plain(chat, is_plain)
        senders = alice_and_bob(plain), alice_and_bob(secret)
        for _ in range(ROUNDS):
            before, after = (one_round(alice, f"send bob {line}\n", received("bob")) for alice in senders)
            yield before, after


def start_pairs() -> Iterator[tuple[float, float]]:
    """Seconds from the start of a client to its welcome, plain and encrypted."""
    with world() as plain, world() as secret:
        for chat, is_plain in ((plain, True), (secret, False)):
            speaks_plain(chat, is_plain)
            chat.absent("carol")
        for _ in range(SECRET_STARTS):
            yield welcomed(plain), welcomed(secret)


def measure_secret(names: set[str]) -> Iterator[Row]:
    """What encryption costs: the same encrypted and plain, by turns."""
    plain, secret = (statistics.median(column) for column in zip(*start_pairs()))
    yield Row("secret", f"welcome {secret * 1e3:.1f} ms", f"{plain * 1e3:.1f} ms: plain", f"{secret / plain:.2f}",
              "+ 5 ms at most", secret <= plain + 0.005)
    pairs = [piped_pair() for _ in range(SECRET_ROUNDS)]
    plain, secret, loop = (statistics.median(column) for column in zip(*pairs))
    yield Row("secret", f"piped {secret:,.0f} lines/s", f"{plain:,.0f} lines/s: plain", f"{secret / plain:.2f}",
              ">= 0.8 of plain", secret >= 0.8 * plain)
    yield Row("secret", f"piped {secret:,.0f} lines/s", f"{loop:,.0f} lines/s: the plain loop", f"{secret / loop:.1f}",
              ">= 4 times", secret >= 4 * loop)
    plain, secret = (percentile(column, 0.5) * 1e6 for column in zip(*latency_pairs()))
    yield Row("secret", f"p50 {secret:,.0f} us", f"p50 {plain:,.0f} us: plain", f"{secret / plain:.2f}",
              "<= 1.2 of plain", secret <= 1.2 * plain)
    with world() as chat, one_core():
        speaks_plain(chat, False)
        secret, loop = (percentile(column, 0.5)
                        for column in beside_bare_loop(alice_and_bob(chat), start_bare_loop(chat), 1))
    yield Row("secret", f"p50 {secret:,.0f} us", f"p50 {loop:,.0f} us: the bare loop", f"{secret / loop:.1f}",
              "<= 3.0 times its p50: 1.2 of 2.5", secret <= 3.0 * loop)
    yield from secret_mail()
    yield from secret_crowds()


def secret_mail() -> Iterator[Row]:
    """Lines that are kept and delivered, plain and encrypted, beside SQLite alone."""
    lines = texts(SECRET_LINES)
    rounds = [(*mail_pair(True, lines), *mail_pair(False, lines), bare_store(lines)) for _ in range(SECRET_ROUNDS)]
    *plain, kept, delivered, bare = (statistics.median(column) for column in zip(*rounds))
    for name, figure, before in (("keep", kept, plain[0]), ("deliver", delivered, plain[1])):
        yield Row("secret", f"{name} {figure:,.0f} lines/s", f"{before:,.0f} lines/s: plain", f"{figure / before:.2f}",
                  ">= 0.55 of plain", figure >= 0.55 * before)
        yield Row("secret", f"{name} {figure:,.0f} lines/s", f"{bare:,.0f} rows/s: SQLite alone",
                  f"{figure / bare:.2f}", ">= 0.8 of it", figure >= 0.8 * bare)
    yield Row("secret", f"deliver {delivered:,.0f} lines/s", f"{kept:,.0f} lines/s: keep", f"{delivered / kept:.2f}",
              ">= 0.8 of it", delivered >= 0.8 * kept)


def secret_crowds() -> Iterator[Row]:
    """Many who encrypt: they register at once, and come back after a restart of the server."""
    for count in (SMALL_CROWD, min(LARGE_CROWD, raise_limit())):
        with world() as chat:
            speaks_plain(chat, False)
            server = chat.server()
            with SecretSwarm(chat.port, count) as swarm:
                yield measure_crowd(swarm, server, count)._replace(name="secret")
                if count > SMALL_CROWD and swarm.all_hold(count):
                    yield measure_restart(swarm, chat, server, count)._replace(name="secret")


# --- timers ---------------------------------------------------------------------------------------------------

DEAD = 1_000
PENDING = 10_000
QUIET_ROUNDS = 500        # of the pair, before anything happens
PAUSE = 0.002             # s between rounds of the pair
TURN_LIMIT = 0.05         # s


def watched(arguments: list[str]) -> None:
    """Run the program; write the longest turn of its loop (seconds by the clock, and of the processor) to a file."""
    longest = [0.0, 0.0]
    woken: list[tuple[float, float]] = []

    class Watched(SelectorLoop):
        """What lies between two waits is a turn."""

        def begin_wait(self, clock: float, at_once: bool = False) -> float:
            if woken:
                began, used = woken.pop()
                longest[0] = max(longest[0], time.monotonic() - began)
                longest[1] = max(longest[1], time.thread_time() - used)
            return super().begin_wait(clock, at_once)

        def end_wait(self, clock: float) -> None:
            super().end_wait(clock)
            woken.append((time.monotonic(), time.thread_time()))

    setattr(udpchat, "SelectorLoop", Watched)
    code = udpchat.main(arguments[1:])
    Path(arguments[0]).write_text(" ".join(map(str, longest)))
    sys.exit(code)


def rounds(process: Process, go_on: Callable[[int], bool]) -> list[float]:
    """Milliseconds of each round of a pair, as long as ``go_on(how many there were)``."""
    found: list[float] = []
    end = time.monotonic() + TIME.left(PATIENCE)
    while go_on(len(found)) and time.monotonic() < end:
        found.append(one_round(process, "send dave hello\n", received("dave")) * 1e3)
        time.sleep(PAUSE)
    return found


def watched_server(chat: Chat) -> tuple[Process, int]:
    """Start a server whose turns are timed; return it and its port."""
    server = chat.run("server", "0", "--host", HOST, "--store", str(chat.store),
                      command=role("--watched", str(chat.directory / "server-turns")))
    return server, int(server.see_match(r"\[Server listening on .*:(\d+)\]").group(1))


def measure_timers(names: set[str]) -> Iterator[Row]:
    """Whether those who do not answer hold up the others."""
    raise_limit()
    with world() as chat:
        server, port = watched_server(chat)
        dave = chat.directory / "dave"
        run_to_file(chat, dave, *as_client(chat, "dave", "--stay", port=port))
        wait_for(chat, dave, UPDATED)
        carol = chat.client("carol", port=port)
        carol.see(UPDATED)
        quiet, busy, seconds = storm(chat, carol, port)
        server.signal(signal.SIGTERM)
        server.wait()
        turns = {who: [float(part) for part in (chat.directory / f"{who}-turns").read_text().split()]
                 for who in ("server", "client")}
    for who, (clock, used) in turns.items():
        yield Row("timers", f"{who}'s longest turn {clock * 1e3:.0f} ms", f"{used * 1e3:.0f} ms of processor time",
                  f"{clock / used:.1f}", f"<= {TURN_LIMIT * 1e3:.0f} ms", clock <= TURN_LIMIT)
    p99, before = percentile(busy, 0.99), percentile(quiet, 0.99)
    yield Row("timers", f"others' p99 {p99:.1f} ms (p50 {percentile(busy, 0.5):.1f}, {seconds:.1f} s)",
              f"p99 {before:.1f} ms before", f"{p99 / before:.1f}", "<= 10 ms", p99 <= 10)


def storm(chat: Chat, carol: Process, port: int) -> tuple[list[float], list[float], float]:
    """The rounds of carol and dave before and while alice sends to the dead, and how many seconds that takes."""
    receipts, lines = chat.directory / "receipts", chat.directory / "lines"
    alice, pipe = run_with_pipe(chat, receipts, *as_client(chat, "alice", port=port),
                                command=role("--watched", str(chat.directory / "client-turns")))
    wait_for(chat, receipts, UPDATED)
    with Swarm(port, DEAD) as swarm:
        swarm.join_in_turn()
        swarm.until(lambda: False, SETTLE)
        swarm.stop_answering()
        quiet = rounds(carol, lambda count: count < QUIET_ROUNDS)
        nicks = [swarm.members[number % DEAD].nick for number in range(PENDING)]
        lines.write_text("".join(f"send {nick} message {number}\n" for number, nick in enumerate(nicks)))
        began = time.monotonic()
        cat = pour(pipe, lines)
        busy = rounds(carol, lambda _: alice.popen.poll() is None)
        seconds = time.monotonic() - began
        cat.kill()
        cat.wait()
    wait_for_end(alice)
    check_receipts(receipts, SAVED, PENDING)
    return quiet, busy, seconds


# --- loss -----------------------------------------------------------------------------------------------------

RATE = 10e6 / 8           # bytes a second
DELAY = 0.02              # s each way
LOSS = 0.02               # part of the datagrams, each way
LINK_QUEUE = 65536        # bytes before the link that wait; beyond, they are dropped
HEADERS = 28              # bytes of IP and UDP
SIMULATED = 40.0          # s
SEEDS = 3
PEER = ("192.0.2.1", 9)


class Link:
    """A virtual clock, and a link that everybody shares."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._free = 0.0        # when all that was sent is through
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` at a time."""
        self._serial += 1
        heapq.heappush(self._calls, (when, self._serial, callback))

    def send(self, size: int, arrived: Callable[[], None]) -> None:
        """Send that many bytes across."""
        waiting = max(0.0, self._free - self.now) * RATE
        if waiting + size > LINK_QUEUE:
            return
        self._free = max(self.now, self._free) + size / RATE
        if self.random.random() >= LOSS:
            self.call_at(self._free + DELAY, arrived)

    def answer(self, arrived: Callable[[], None]) -> None:
        """Send a small datagram back, where nothing queues."""
        if self.random.random() >= LOSS:
            self.call_at(self.now + DELAY, arrived)

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._calls and self._calls[0][0] <= until:
            self.now, _, callback = heapq.heappop(self._calls)
            callback()
        self.now = until


class Flow:
    """One sender that always has something to send, and its receiver."""

    def __init__(self, link: Link, id_: int) -> None:
        self.delivered = 0          # bytes of text
        self._link = link
        self._texts = texts(1000)
        self._conversation = Conversation("alice", "bob", id_)
        self._conversation.locate(0.0, Place(True, PEER))
        self._receiver = ReceiveStream(id_)
        self._decoder = Decoder()
        self._wake = NEVER

    def poll(self) -> None:
        """Send what is due, and come back when more is."""
        now, conversation = self._link.now, self._conversation
        if conversation.pending < QUEUE_LIMIT:
            conversation.send(now, self._texts, now)
        for datagram, address in conversation.poll(now):
            if address is not None:         # else it is for the server, which is not here
                self._link.send(len(datagram) + HEADERS, functools.partial(self._arrived, datagram))
        conversation.events.clear()
        due = conversation.due()
        if due < self._wake or self._wake <= now:
            self._wake = due
            self._link.call_at(due, self._woken)

    def _woken(self) -> None:
        if self._link.now >= self._wake:
            self._wake = NEVER
            self.poll()

    def _arrived(self, datagram: bytes) -> None:
        for _, info in self._decoder.decode(datagram):
            self._receiver.on_data(info["n"], info["text"], info.get("more", ()), info["base"])
        for run in self._receiver.take():
            self.delivered += sum(map(len, run.items))
            self._receiver.written(len(run.items))
        self._link.answer(functools.partial(self._acked, self._receiver.ack()))

    def _acked(self, info: Info) -> None:
        self._conversation.on_ack(self._link.now, info["next"], info["have"], info["room"], DIRECT)
        self.poll()


def simulate(flows: int, seed: int) -> list[float]:
    """Bytes of text a second that each of that many senders gets through."""
    TIME.left(0.0)
    link = Link(seed)
    senders = [Flow(link, number + 1) for number in range(flows)]
    for number, sender in enumerate(senders):
        link.call_at(float(number), sender.poll)
    link.run(SIMULATED / 10)
    before = [sender.delivered for sender in senders]
    link.run(SIMULATED)
    return [(sender.delivered - start) / (SIMULATED * 0.9) for sender, start in zip(senders, before)]


def measure_loss(names: set[str]) -> Iterator[Row]:
    """What a link that loses lets through, and how two share it."""
    goodput = statistics.mean(simulate(1, seed)[0] for seed in range(SEEDS))
    yield Row("loss", f"{goodput / 1e3:,.0f} kB/s of text", f"{RATE / 1e3:,.0f} kB/s: the link",
              f"{goodput / RATE:.0%}", ">= 60 %", goodput >= 0.6 * RATE)
    pairs = [simulate(2, seed) for seed in range(SEEDS)]
    least = min(min(pair) / sum(pair) for pair in pairs)
    both = statistics.mean(map(sum, pairs))
    yield Row("loss", f"two share it {least:.0%} : {1 - least:.0%}", f"{both / 1e3:,.0f} kB/s together",
              f"{both / RATE:.0%}", "40 : 60 or better", least >= 0.4)


# --- the table ------------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[set[str]], Iterator[Row]]] = {
    "piped": measure_piped, "latency": measure_latency, "start": measure_start, "keep": measure_mail,
    "deliver": measure_mail, "memory": measure_memory, "loss": measure_loss, "timers": measure_timers,
    "crowd": measure_many, "idle": measure_many, "table": measure_many, "restart": measure_many,
    "secret": measure_secret,
    "zipapp": measure_zipapp}
ROLES: dict[str, Callable[[list[str]], None]] = {
    "--plain-send": plain_send, "--plain-receive": plain_receive, "--echo": bare_echo, "--bare": bare_loop,
    "--watched": watched}
TITLES = ("name", "figure", "yardstick", "ratio", "target", "met")


def measured(measure: Callable[[set[str]], Iterator[Row]], names: set[str]) -> Iterator[Row]:
    """The rows of one measure that were asked for; one that says so if it failed."""
    try:
        TIME.left(0.0)
        for row in measure(names):
            if row.name in names:
                yield row
    except Exception as error:
        if not isinstance(error, TimeIsOver):
            traceback.print_exc()
        mine = [name for name, other in MEASURES.items() if other is measure and name in names]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        yield Row(", ".join(mine), f"failed: {reason[:60]}", "-", "-", "-", False)


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    lines: list[Sequence[str]] = [TITLES, *((*row[:5], "yes" if row.met else "NO") for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def main(arguments: Sequence[str]) -> int:
    """Measure what was asked for, or all; return 0."""
    unknown = [name for name in arguments if name not in MEASURES]
    if unknown:
        print(f"no such measure: {', '.join(unknown)}; there are {', '.join(MEASURES)}")
        return 0
    names = set(arguments) or set(MEASURES)
    rows: list[Row] = []
    for measure in dict.fromkeys(MEASURES[name] for name in MEASURES if name in names):
        began = time.monotonic()
        rows.extend(measured(measure, names))
        print(f"{measure.__name__}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    show(rows)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](sys.argv[2:])
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
