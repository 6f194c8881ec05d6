"""A whole chat in one thread: real servers and clients on a virtual clock, network, disk and terminal.

Everything comes from one seed, so a run that fails can be replayed to the letter:

    python -m tests.simulate --seed 123 --trace     prints one run line by line
    python -m tests.simulate --seeds 1000 --jobs 4  does many runs, and prints a summary

How it works
------------
``World`` is a scheduler of events in virtual time. A ``Node`` is a process. It owns a ``SimLoop`` (what the program
gets instead of ``loop.SelectorLoop``) and an inbox, and runs the same turns: datagrams, timers, settle.
``ServerNode`` runs a ``Server`` on a ``Disk`` that outlives it; ``Life`` runs a ``Client`` with a standard input that
somebody types into and a ``Screen`` that may be slow, stalled or gone, or what ``udpchat recv`` or ``ask`` makes of it.
``Network`` loses, delays, repeats and garbles.

``Ledger`` knows every text that was typed and where it was seen, and checks what must always hold: each text is
unique, so the account is exact. ``Storm`` is one random run: users who chat, and faults, of kinds and at rates that
the seed picks; then everything heals, everybody comes back, and the account is closed. In some, a few users mostly run
``recv`` and ``ask``, one after the other, and what must hold is true of all their lives together.
"""
from __future__ import annotations

import argparse
import functools
import heapq
import json
import multiprocessing
import os
import random
import re
import sqlite3
import sys
import time
import traceback
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import msgpack

import protocol
from client import TIME_IS_OVER, Client
from conversation import RECEIVED, REFUSED, SAVED, Event, Observer
from home import ERROR, EVENT_FORMATS, INFO, UNPROVEN_LINE, Known, Mailbox, ShownMessages
from loop import DATAGRAMS_PER_TURN, LOOK_UP_TIME, MAX_WAIT, Endpoint, Output, Random, Scheduler, log
from protocol import NEVER, RECORD_MARK, Address, Parcel, State, clean, encode, folded
from registry import DAY, LINK_OFFLINE, LINK_REGISTERING, Patience, Registry
from secure import Handshake, KeyPair, Keys, Sodium, load_sodium, static_secret, token_for
from server import Server
from terminal import Display, JsonFormatter, TextFormatter
from udpchat import NICK_PATIENCE, feed_job, formatter_for, nick_patience, parse, selection_for, text_to_send

START = 1000.0            # s; where the virtual clock begins
EPOCH = 1.79e9            # s since 1970 when the virtual clock stands at 0
TURN = 0.0001             # s of virtual time that one turn takes
INBOX = 2000              # datagrams that the socket of a node holds
MAX_TURNS = 3000          # turns of one node in one virtual second; more is a busy loop
MAX_TIMERS = 600          # in one heap
MAX_PENDING = 2 ** 21     # bytes that wait for one stdout
MAX_RATE = 6000           # datagrams of one node in one virtual second
IDLE_TIME = 30.0          # s without traffic at the end of a run, in which ...
IDLE_RATE = 12            # ... a client may send that many datagrams, and the server that many for each client
PIPE_SLOT = 512           # bytes that a pipe must have free to count as writable
HEALING_TIME = 20.0       # s that it takes until nothing is felt of the last fault
RENUMBER_TIME = 5.0       # s less than that, at most, until a client has noticed that its server has moved
SERVER: Address = ("10.0.0.1", 4119)
ELSEWHERE: Address = ("10.0.0.2", 4119)     # where the server may move

CHAT_LINE = re.compile(r"([^\s:\[]+): (<\d{4}-\d\d-\d\d \d\d:\d\d:\d\d> )?(.*)", re.DOTALL)
SPEECHES = ("plain", "plain", "json", "plain", "talk", "plain", "json")     # of those who chat in a storm
CLOSINGS = ("received", "saved", "refused", "unknown", "too long", "not delivered")


class Violation(Exception):
    """Something that must always hold does not."""


class Crash(BaseException):
    """The process ends here and now: nothing in the program may catch this."""


# --- the account ----------------------------------------------------------------------------------------------

class Message:
    """One ``send`` that somebody typed."""

    __slots__ = ("life", "to", "serial", "text", "end", "away", "closing", "saved_at", "seen_by")

    def __init__(self, life: Life, to: str, serial: int, text: str, end: int, away: bool) -> None:
        self.life = life
        self.to = to
        self.serial = serial
        self.text = text
        self.end = end                  # bytes of stdin until its line is complete
        self.away = away                # typed behind a ``dereg``: the program only says that it is offline
        self.closing = ""
        self.saved_at = NEVER           # when its sender heard that the server has it
        self.seen_by: list[Life] = []

    def __repr__(self) -> str:
        return f"{self.text.split(' ')[0]} ({self.life.name} to {self.to})"


class Ledger:
    """Every text that was typed, what became of it, and where it was seen."""

    def __init__(self) -> None:
        self.messages: dict[str, Message] = {}      # by the first word of its text, which is unique
        self.newest: dict[tuple[str, Life], Message] = {}       # that a nick was shown of the messages of a life

    def typed(self, life: Life, to: str, text: str, end: int, away: bool) -> None:
        """Note that somebody typed ``send to text``."""
        message = Message(life, to, len(self.messages), text, end, away)
        self.messages[text.split(" ")[0]] = message
        life.typed.append(message)
        if not away:
            life.open.setdefault(to, deque()).append(message)

    # what clients say

    def closed(self, life: Life, to: str, kind: str, count: int, behind: int = 0) -> None:
        """Close the next ``count`` sends of ``life`` to ``to``, after the first ``behind`` that are still open."""
        for _ in range(count):
            waiting = life.open.get(to, deque())
            if len(waiting) <= behind:
                raise Violation(f"{life.name} says {kind} for {to}, but nothing is open")
            message = waiting[behind]
            del waiting[behind]
            self.close(message, kind)

    def close(self, message: Message, kind: str) -> None:
        """Note that a send got its closing line."""
        if message.closing:
            raise Violation(f"{message!r} is closed as {message.closing} and as {kind}")
        if message.life.fed < message.end:
            raise Violation(f"{message!r} is closed as {kind} before it was read")
        message.closing = kind
        if kind == "saved":
            message.saved_at = message.life.world.now
        if kind == "received" and not message.seen_by:
            raise Violation(f"{message!r} counts as received, but was not shown")

    def too_long(self, life: Life) -> None:
        """Close the next text of ``life`` that is too long."""
        for message in sorted(life.typed, key=lambda message: message.away):    # (away: handed back)
            if not message.closing and len(message.text.encode()) > protocol.MAX_TEXT:
                if not message.away:
                    life.open[message.to].remove(message)
                self.close(message, "too long")
                return
        raise Violation(f"{life.name} says that a message is too long, but none is")

    def handed_back(self, life: Life, line: str) -> None:
        """Close the message of a ``send`` line on stderr: it was not delivered."""
        if line.endswith("not encrypted.]") or line.startswith("udpchat: the time is over, and no answer from "):
            return
        if life.speech == "json":
            found = json.loads(line)
            command, to, text = "send", found["send"], found["text"]
        else:
            command, to, text = line.split(" ", 2)
        message = self.messages.get(text.split(" ")[0])
        if command != "send" or message is None or message.life is not life or message.to != to \
                or message.text != text:
            raise Violation(f"{life.name} hands back what was never typed: {line[:80]}")
        if not message.away:
            life.open[to].remove(message)
        self.close(message, "not delivered")

    # what screens show

    def shown(self, life: Life, sender: str, text: str) -> None:
        """Note that a line with a message was written to the stdout of ``life``."""
        message = self.messages.get(text.split(" ")[0])
        if message is None or clean(message.text) != text or message.life.nick != sender or message.to != life.nick:
            raise Violation(f"{life.name} shows what was never sent: {sender}: {text[:80]}")
        if message.away or message.closing in ("unknown", "too long"):
            raise Violation(f"{life.name} shows {message!r}, which was not to be sent")
        for other in message.seen_by:
            if other is life or (other.options is not None and message not in other.unnoted):
                raise Violation(f"{life.name} shows {message!r} after {other.name}")
        if life.options is not None:
            self.check_wanted(life, message)
        message.seen_by.append(life)
        life.shown.append(message)
        life.unnoted.append(message)
        if message.closing == "refused":
            return      # a late copy of it was kept: whether it is shown, and when, was not promised
        if len(message.seen_by) == 1:
            self.check_order(life, message)
        last = life.last_shown.get(message.life)
        if last is not None and last.serial > message.serial and message.life.nick not in life.released:
            raise Violation(f"{life.name} shows {message!r} after {last!r}")
        life.last_shown[message.life] = message

    def check_order(self, life: Life, message: Message) -> None:
        """Raise Violation if an earlier life of the same nick was shown what the same sender has said later.

        ``ask`` may be shown an answer before what is older than the question.
        """
        newest = self.newest.get((life.nick, message.life))
        if newest is not None and newest.serial > message.serial and message.life.nick not in (
                life.released | newest.seen_by[0].released):
            raise Violation(f"{life.name} shows {message!r}, but {newest.seen_by[0].name} has shown {newest!r}")
        if not life.asked:
            self.newest[life.nick, message.life] = message

    @staticmethod
    def check_wanted(life: Life, message: Message) -> None:
        """Raise Violation unless ``recv`` or ``ask`` may show a message now."""
        if len(life.shown) == life.most:
            raise Violation(f"{life.name} shows {message!r}, but wanted only {life.most}")
        if life.wanted_sender and folded(message.life.nick) != life.wanted_sender:
            raise Violation(f"{life.name} shows {message!r}, but wanted those of {life.wanted_sender}")
        if life.typed and message.saved_at < life.registered_at:
            raise Violation(f"{life.name} takes {message!r} for the answer, which is older than the question")

    # the end

    def check_life(self, life: Life) -> None:
        """Raise Violation unless all is well with a life that has ended in order."""
        for message in life.typed:
            if message.end <= life.fed and message.end <= life.quit_at and not message.closing and not message.away:
                raise Violation(f"{life.name} has ended, but {message!r} has no closing line")
        self.check_outcomes(life)
        if life.options is not None:
            self.check_wait(life)
            return
        failed = [m for m in life.typed if m.closing and m.closing not in ("received", "saved")]
        exited = life.lines[-1:] == ["[Exiting]"]
        unanswered = exited and "[Server not responding]" in life.lines     # 1 only if a command asked for it
        mistyped = any(line.startswith(("[Unknown command ", "[Usage: ")) for line in life.lines)   # maybe a text
        unseen = life.speech == "talk" and life.is_cut_off                  # whether that line would have come
        if not (unanswered or unseen or life.screen.gone) and (
                (life.exit_code == 0) != (not failed and not exited and not mistyped)):
            raise Violation(f"{life.name} ended with {life.exit_code}; failed: {failed[:3]}, exiting: {exited}")
        if life.screen.gone or life.is_cut_off:
            return
        self.check_lines(life)

    @staticmethod
    def check_wait(life: Life) -> None:
        """Raise Violation unless the exit code of ``recv`` or ``ask`` says how it has ended."""
        has_failed = any(message.closing not in ("received", "saved") for message in life.typed)
        expected = 1
        if len(life.shown) == life.most and not has_failed:
            expected = 0
        elif life.is_late and not (has_failed or life.was_interrupted):
            expected = TIME_IS_OVER
        if life.exit_code != expected and not life.screen.gone:
            raise Violation(f"{life.name} ended with {life.exit_code}, not {expected}: {life.shown[-3:]}")

    @staticmethod
    def check_lines(life: Life) -> None:
        """Raise Violation unless a life has shown as many lines of each kind as it had to."""
        said, closings = Counter(life.lines), Counter((m.to, m.closing) for m in life.typed if m.closing)
        for to in {m.to: None for m in life.typed}:
            for kind, line in (("received", f"[Message received by {to}.]"), ("unknown", f"[Unknown client {to}.]")):
                count = closings[to, kind] + (closings[to, "refused"] if kind == "unknown" else 0)
                if not closings[to, kind] <= said[line] <= count:
                    raise Violation(f"{life.name} shows {line} {said[line]} times, not {closings[to, kind]}")
            sends = sum(message.to == to for message in life.typed)
            for line in (f"[No ACK from {to}, message sent to server.]", f"[{to} is offline, message sent to server.]",
                         f"[Client {to} exists!!]"):
                if said[line] > sends:
                    raise Violation(f"{life.name} shows {line} {said[line]} times for {sends} messages")
        saved = sum(count for (_, kind), count in closings.items() if kind == "saved")
        if said["[Messages received by the server and saved]"] != saved:
            raise Violation(f"{life.name} shows 'saved' {said['[Messages received by the server and saved]']} times,"
                            f" not {saved}")
        lost = sum(count for (_, kind), count in closings.items() if kind == "not delivered")
        line = "[1 message not delivered.]" if lost == 1 else f"[{lost} messages not delivered.]"
        if lost and said[line] != 1:
            raise Violation(f"{life.name} does not say that {lost} messages were not delivered")

    def check_outcomes(self, life: Life) -> None:
        """Raise Violation unless each closing object was about the message that its ``ref`` named."""
        for message in life.typed:
            said = life.outcomes.get(message.serial, message.closing).replace("-", " ")
            refused = message.closing == "refused" and said in ("unknown", "full", "disk")
            if not message.away and said != message.closing and not refused:
                raise Violation(f"{life.name} says {said} of {message!r}, which is closed as {message.closing}")

    def check_saved(self) -> None:
        """Raise Violation unless everything that was saved has been shown by the end."""
        for message in self.messages.values():
            if message.closing == "saved" and not message.seen_by:
                raise Violation(f"{message!r} was saved, but never shown")


# --- a process ------------------------------------------------------------------------------------------------

class SimLoop(Scheduler):
    """What the program gets instead of ``loop.SelectorLoop``: the same scheduler, on a virtual clock."""

    def __init__(self, world: World, seed: int, host: str) -> None:
        super().__init__(world.now)
        self.random: Random = random.Random(seed)
        self._world, self._host = world, host

    def clock(self) -> float:
        """Return the same as ``now``: inside a turn, no time passes."""
        return self.now()

    def wall(self) -> float:
        """Return the seconds since 1970, as the clock of this host says."""
        return EPOCH + self._world.now + self._world.clock_errors.get(self._host, 0.0)


class Router:
    """What stands before a client: it lets in only what comes from where the client has sent to lately.

    ``memory``: s for which it remembers that. ``is_symmetric``: it uses another port for each destination.
    """

    def __init__(self, memory: float = NEVER, is_symmetric: bool = False) -> None:
        self.memory, self.is_symmetric = memory, is_symmetric
        self._sent: dict[Address, float] = {}           # where to, and when last
        self._ports: dict[Address, Address] = {}        # as what each destination sees the client

    def sends(self, node: Node, target: Address) -> Address:
        """Note that a client sends to ``target``; return as what it is seen there."""
        self._sent[target] = node.world.now
        if not self.is_symmetric or target in node.world.names:
            return node.address
        if target not in self._ports:
            self._ports[target] = node.world.new_address()
            node.world.at[self._ports[target]] = node
        return self._ports[target]

    def lets_in(self, source: Address, address: Address, now: float) -> bool:
        """Return whether a datagram from ``source`` to ``address``, as which the client is seen, reaches it."""
        return now - self._sent.get(source, -NEVER) < self.memory and self._ports.get(source, address) == address


class Node:
    """A process: an address, an inbox, and turns."""

    def __init__(self, world: World, name: str, host: str, address: Address) -> None:
        self.world = world
        self.name = name
        self.host = host                    # what partitions know it by: it outlives the process
        self.address = address
        self.alive = True
        self.router: Router | None = None
        self.loop = SimLoop(world, world.random.getrandbits(64), host)
        self.inbox: deque[tuple[bytes, Address]] = deque()
        self.stopped_until = 0.0
        self.fuse = -1                      # steps until this process crashes; below 0: it does not
        self.sent = 0                       # datagrams
        self._turn_at = NEVER
        self._ended = world.now             # when the last turn did
        self._second = self._turns = self._sent_before = 0
        world.at[address] = self

    def step(self) -> None:
        """Crash if it is time: this is called before and after a commit, a write, a datagram."""
        if self.fuse >= 0:
            self.fuse -= 1
            if self.fuse < 0:
                raise Crash

    def send(self, datagram: bytes, address: Address) -> None:
        """Send a datagram of the program."""
        self.step()
        self.sent += 1
        if len(datagram) > protocol.MAX_DATAGRAM:
            raise Violation(f"{self.name} sends {len(datagram)} bytes")
        self.world.network.send(self, datagram, address)

    def move(self, address: Address) -> None:
        """Be seen at another address from now on: the NAT has forgotten this process."""
        if self.world.at.get(self.address) is self:
            del self.world.at[self.address]
        self.world.trace("%s moves to %s:%d", self.name, *address)
        self.address = address
        self.world.at[address] = self

    def stop_for(self, seconds: float) -> None:
        """Stop, as by SIGSTOP, and go on after that time, as by SIGCONT."""
        self.world.trace("%s is stopped for %.2f s", self.name, seconds)
        self.stopped_until = max(self.stopped_until, self.world.now + seconds)
        self.wake(self.stopped_until)

    def crash(self) -> None:
        """Crash, as by ``kill -9``."""
        if self.alive:
            self.world.trace("%s is killed", self.name)
            self.world.crashes += 1
            self.die()

    def die(self) -> None:
        """End the process."""
        self.alive = False
        if self.world.at.get(self.address) is self:
            del self.world.at[self.address]
        self.inbox.clear()

    # turns

    def wake(self, when: float) -> None:
        """Make sure that a turn begins at ``when`` at the latest."""
        when = max(when, self.stopped_until, self._ended + TURN, self.world.now)
        if when < self._turn_at:
            self._turn_at = when
            self.world.call_at(when, self._maybe_turn)

    def arrive(self, datagram: bytes, source: Address) -> None:
        """Put a datagram into the inbox of the socket."""
        if len(self.inbox) < INBOX:
            self.inbox.append((datagram, source))
            self.wake(self.world.now)

    def _maybe_turn(self) -> None:
        if not self.alive or self.world.now < self._turn_at:
            return
        self._turn_at = NEVER
        if self.world.now < self.stopped_until:
            self.wake(self.stopped_until)
            return
        try:
            self._turn()
        except Crash:
            self.crash()

    def _turn(self) -> None:
        now, loop = self.world.now, self.loop
        self._check_rate(int(now))
        loop.end_wait(now)
        self.read()
        for _ in range(min(len(self.inbox), DATAGRAMS_PER_TURN)):
            datagram, source = self.inbox.popleft()
            self.receive(datagram, source)
        loop.drained = not self.inbox
        loop.run_timers()
        self._ended = now
        self.settle()
        if not self.alive:
            return
        timeout = loop.begin_wait(now)
        if self.inbox:
            self.wake(now)
        elif timeout < MAX_WAIT:
            self.wake(now + timeout)
        if len(loop.timers) > MAX_TIMERS:
            raise Violation(f"{self.name} has {len(loop.timers)} timers")

    def _check_rate(self, second: int) -> None:
        if second != self._second:
            self._second, self._turns, self._sent_before = second, 0, self.sent
        self._turns += 1
        if self._turns > MAX_TURNS:
            raise Violation(f"{self.name} turns {self._turns} times within a second")
        if self.sent - self._sent_before > MAX_RATE:
            raise Violation(f"{self.name} sends {self.sent - self._sent_before} datagrams within a second")

    # what a kind of node does

    def read(self) -> None:
        """Read what there is besides datagrams."""

    def receive(self, datagram: bytes, source: Address) -> None:
        """Hand a datagram to the program."""
        raise NotImplementedError

    def settle(self) -> None:
        """End the turn."""
        raise NotImplementedError


# --- the server -----------------------------------------------------------------------------------------------

class Disk:
    """A SQLite connection that outlives the process; what was not committed when that crashed is gone."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.failing = False
        self.reading = True         # also while it fails
        self.step: Callable[[], None] = lambda: None

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute a statement as a connection does; a commit may fail, or the process crash before or after it."""
        if statement != "COMMIT":
            if self.failing and not self.reading and statement != "ROLLBACK":
                raise sqlite3.OperationalError("disk I/O error")
            return self.database.execute(statement, parameters)
        self.step()
        if self.failing:
            raise sqlite3.OperationalError("disk I/O error")
        cursor = self.database.execute(statement)
        self.step()
        return cursor

    def executemany(self, statement: str, parameters: Any) -> sqlite3.Cursor:
        """Execute a statement many times, as a connection does."""
        return self.database.executemany(statement, parameters)

    def close(self) -> None:
        """Do nothing: the file stays."""

    def open(self, server_id: bytes, now: float) -> Mailbox:
        """Return the store on this disk, as a process that starts finds it."""
        if self.database.in_transaction:
            self.database.execute("ROLLBACK")
        with mock.patch("sqlite3.connect", return_value=self):
            return Mailbox(":memory:", server_id, now)


class ServerNode(Node):
    """A process that runs a server, on the disk of the world."""

    def __init__(self, world: World, address: Address) -> None:
        world.boots += 1
        super().__init__(world, f"server#{world.boots}", "server", address)
        disk = world.disk
        disk.step, disk.failing = self.step, False
        mailbox = disk.open(world.random.getrandbits(128).to_bytes(16, "big"), self.loop.now())
        self._greetings: dict[bytes, int] = {}      # of each session: the last mail that waited when it began
        registry, keys = Registry(mailbox, mailbox_limit=world.mailbox), None
        if world.encrypts:
            keys = world.keys(mailbox.server_secret(world.new_secret()))
            self._watch_mail(registry)
        self.server = Server(self.loop, self.send, registry, keys=keys)
        if not world.tells_keys:
            self.server.announcer.keys_told = 0
        world.trace("%s starts", self.name)
        self.server.start()
        self.wake(world.now)

    @staticmethod
    def _watch_mail(registry: Registry) -> None:
        """Raise Violation when something is kept in plain that its sender could have sealed."""
        keep = registry.mailbox.keep

        def watched(known: Known, sender: str, stream: int, parcel: Parcel) -> None:
            session = registry.sessions.of(sender)
            if known.key and session is not None and session.key and not parcel.seal:
                raise Violation(f"{sender} has mail in plain for {known.nick}")
            keep(known, sender, stream, parcel)
        registry.mailbox.keep = watched     # type: ignore[method-assign]

    def receive(self, datagram: bytes, source: Address) -> None:
        """Hand a datagram to the server."""
        self.server.receive(datagram, source)

    def settle(self) -> None:
        """End the turn. Raise Violation if a client is announced before it has shown the mail that waited."""
        registry = self.server.registry
        for session in registry.sessions.by_id.values():
            self._greetings.setdefault(session.id, session.known.last)
        self.server.settle()
        for session in registry.sessions.by_id.values():
            has_waited = session.is_early or self._greetings[session.id] < session.known.first
            if registry.table.is_online(session.nick) and not has_waited:
                raise Violation(f"{session.nick} is online, but has not shown the mail that waited")


# --- the client -----------------------------------------------------------------------------------------------

class Notes(ShownMessages):
    """The file ``shown`` of a user, which outlives the processes."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, int, int]] = []

    def load(self) -> list[tuple[str, int, int, int]]:
        """Return everything that was noted."""
        return list(self._rows)

    def note(self, sender: str, stream: int, first: int, end: int) -> None:
        """Note some numbers of a stream."""
        self._rows.append((sender, stream, first, end))


class Screen:
    """The reader of a client's stdout: fast, slow (bytes a second), stalled, or gone."""

    def __init__(self, life: Life) -> None:
        self.rate = NEVER
        self.gone = False
        self.is_pipe = False    # so that its writer hears at once that it is gone, not with the next write
        self.size = 4096        # bytes that the pipe holds while the reader is slow
        self.filled = 0.0
        self._since = 0.0
        self._rest = b""
        self._life = life

    def set_rate(self, rate: float) -> None:
        """Read at ``rate`` bytes a second from now on."""
        self._drain()
        self.rate = rate
        self._life.wake(self._life.world.now)

    def _drain(self) -> None:
        now = self._life.world.now
        self.filled = max(0.0, self.filled - self.rate * (now - self._since)) if self.rate < NEVER else 0.0
        self._since = now

    @property
    def writable_at(self) -> float:
        """When something can be written; NEVER if the reader does not read."""
        self._drain()
        if self.gone or self.filled + PIPE_SLOT <= self.size:
            return self._since
        return self._since + max(TURN, (self.filled + PIPE_SLOT - self.size) / self.rate) if self.rate else NEVER

    def put(self, data: bytes) -> int:
        """Write as much as there is room for; return how many bytes that were."""
        self._life.step()
        if self.gone:
            raise BrokenPipeError(32, "Broken pipe")
        taken = len(data)
        if self.rate < NEVER:
            self._drain()
            taken = min(taken, int(self.size - self.filled)) if self.filled + PIPE_SLOT <= self.size else 0
            self.filled += taken
        *lines, self._rest = (self._rest + data[:taken]).split(b"\n")
        for line in lines:
            self._life.on_line(line.decode())
        if taken:
            self._life.step()
        return taken


class Watch(Observer):
    """Tells the ledger what a client is about to say of its messages."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def on_event(self, nick: str, event: Event) -> None:
        """Note that something has happened to messages for ``nick``."""
        if event.kind in (RECEIVED, SAVED, REFUSED):
            self._life.ledger.closed(self._life, nick, event.kind.value, event.messages)

    def on_unknown(self, nick: str, count: int) -> None:
        """Note that texts were refused: nobody knows the recipient."""
        if nick in self._life.open:
            self._life.ledger.closed(self._life, nick, "unknown", count, self._queued_for(nick))

    def on_too_long(self, nick: str) -> None:
        """Note that a text was refused."""
        self._life.ledger.too_long(self._life)

    def _queued_for(self, nick: str) -> int:
        """Return how many messages for ``nick`` are queued, or closed but not shown: from when it was known."""
        conversation = self._life.client.outbox.conversations.get(nick)
        if conversation is None:
            return 0
        return len(conversation.texts()) + sum(event.messages for event in conversation.events
                                               if event.kind in (RECEIVED, SAVED, REFUSED))


class Life(Node):
    """A process that runs a client, with a standard input that somebody types into."""

    def __init__(self, world: World, nick: str, address: Address, secret: bytes | None, stay: bool = False,
                 name: str = "", speech: str = "plain", timeout: float = NEVER, nick_patience: float = 0.0,
                 options: argparse.Namespace | None = None) -> None:
        """``options``: of ``recv`` or ``ask``; None: it shows all that comes."""
        self.nick: str = nick
        self.options = options
        self.is_late = False                # its time is over, and the server has heard of it and is not silent
        self.most = getattr(options, "count", 1)                # messages that ``recv`` or ``ask`` may show, and ...
        self.wanted_sender = folded(self.asked or getattr(options, "sender", None) or "")     # ... of whom; "": of all
        self.shown: list[Message] = []
        self.unnoted: list[Message] = []    # those that were shown in this turn: a kill may come before they are noted
        self.registered_at = NEVER          # when it had a session, for the last time before it has asked
        self.speech = speech                # "json": objects, to and fro; "talk": commands begin with a slash
        self.outcomes: dict[int, str] = {}  # what the closing object of a message said, by its ``ref``
        before = [life for life in world.lives if life.nick == nick]
        super().__init__(world, name or f"{nick}#{len(before) + 1}", nick, address)
        self.ledger = world.ledger
        self.lines: list[str] = []          # on stdout, complete
        self.complaints: list[str] = []     # on stderr
        self.exit_code: int | None = None
        self.typed: list[Message] = []
        self.open: dict[str, deque[Message]] = {}
        self.fed = 0                        # bytes of stdin that the program has read
        self.quit_at = 2 ** 62              # what was typed behind this is for nobody
        self.is_away = False                # a ``dereg`` was typed, and no ``reg`` since
        self.last_shown: dict[Life, Message] = {}
        self.released: set[str] = set()     # whose messages may be out of order: the server did not answer
        self.screen = Screen(self)
        self._written_at = 0                # bytes ever typed
        self._stdin = bytearray()
        self._eof = self._eof_read = False
        self._signals = 0
        self.was_interrupted = False
        self._errors = b""
        self._offline = True                # by what it said
        world.trace("%s starts at %s:%d", self.name, *address)
        world.lives.append(self)
        self.router = world.new_router()
        formatter: TextFormatter | None = JsonFormatter(nick, self.loop.wall) if speech == "json" else None
        selection = None
        if options is not None:
            formatter = formatter_for(options, nick, self.loop.wall, False, None)
            selection = selection_for(options, world.notes[nick])
        self.display = Display(Output(self.screen.put), Output(self._put_error), formatter)
        proof = functools.partial(token_for, secret) if secret is not None else None
        own = static_secret(secret) if secret is not None else b""
        keys = world.keys(own or world.new_secret()) if world.encrypts else None
        endpoint = Endpoint(self.loop, world.names, world.look_up)
        self.client = Client(self.loop, self.send, self.display, nick, endpoint, Handshake(self.send, proof, keys=keys),
                             stay=stay, observer=Watch(self), patience=Patience(timeout < NEVER, nick_patience),
                             selection=selection)
        self.client.inbox.on_release, self.client.on_joined = self.note_release, self._note_session
        self.client.shell.rest_of_line = self._rest_of_line
        if timeout < NEVER:
            self.loop.call_at(self.loop.now() + timeout, self._end_time)
        if options is not None:
            self._begin_job(options)
        self.client.start()
        if speech == "talk":
            self._put_in(f"talk {nick}")
        self.wake(world.now)

    @property
    def asked(self) -> str:
        """Whom ``ask`` asks, "" where nobody is asked."""
        return self.options.nicks[0] if self.options is not None and self.options.mode == "ask" else ""

    def _begin_job(self, options: argparse.Namespace) -> None:
        text, size = text_to_send(options, NEVER) if self.asked else ("", 0)
        if self.asked:
            self.ledger.typed(self, self.asked, text, 0, False)
        feed_job(options, self.client.shell, text, size)
        self._eof = self._eof_read = True

    def _end_time(self) -> None:
        self.is_late = self.registered_at < NEVER and not self.client.link.is_silent
        self.client.leaving.time_is_over()

    def _note_session(self) -> None:
        self.client.inbox.restore(self.world.notes[self.nick].load())     # as ``join`` does in the program
        if not self.client.outbox.conversations:
            self.registered_at = self.world.now

    def __hash__(self) -> int:
        return id(self)

    # the user

    def type(self, line: str) -> None:
        """Type a line; a ``send`` goes on the account."""
        if self._eof:
            return
        self.world.trace("%s < %s", self.name, line[:100])
        words = line.split(" ", 2)
        self._put_in(self._spoken(line, words))
        if words[0] == "send" and len(words) == 3:
            self.ledger.typed(self, words[1], words[2], self._written_at, self.is_away)
        elif words == ["dereg", self.nick]:
            self.is_away = True
        elif words == ["reg", self.nick]:
            self.is_away = False
        elif words == ["quit"]:
            self.quit_at = min(self.quit_at, self._written_at)
        self.wake(self.world.now)

    def _put_in(self, line: str) -> None:
        data = line.encode() + b"\n"
        self._stdin += data
        self._written_at += len(data)

    def _spoken(self, line: str, words: list[str]) -> str:
        """Return a line as it is typed in the speech of this life."""
        if self.speech == "json" and words[0] == "send" and len(words) == 3:
            return json.dumps({"send": words[1], "text": words[2], "ref": len(self.ledger.messages)})
        if self.speech == "talk":
            if words[0] == "send" and len(words) == 3 and words[1] == self.nick:
                return words[2].replace("/", "//", 1) if words[2].startswith("/") else words[2]
            return "/" + line if line else line
        return line

    def end_input(self) -> None:
        """End stdin, as by Ctrl-D."""
        self.world.trace("%s < (end)", self.name)
        self._eof = True
        self.wake(self.world.now)

    def interrupt(self) -> None:
        """Send a signal, as by ``kill`` or Ctrl-C."""
        self.world.trace("%s gets a signal", self.name)
        self._signals += 1
        self.wake(self.world.now)

    @property
    def has_typed_ahead(self) -> bool:
        """Whether something typed was not read yet."""
        return bool(self._stdin)

    @property
    def is_cut_off(self) -> bool:
        """Whether it had to end, at its deadline after a signal, before its reader had read everything."""
        return self.was_interrupted and self.display.output.pending > 0

    # the program

    def read(self) -> None:
        """Pass on signals, the end of the reader, and stdin if it is wanted."""
        client = self.client
        if self.screen.gone and self.screen.is_pipe and not self.display.output.broken:
            client.display.output.give_up()
        for _ in range(self._signals):
            self._signals -= 1
            self.was_interrupted = True
            client.leaving.interrupt()
        if not client.wants_input:
            return
        if self._stdin:
            size = min(len(self._stdin), self.world.random.choice((7, 200, 65536, 65536)))
            data = bytes(self._stdin[:size])
            del self._stdin[:size]
            self.fed += size
            client.shell.feed(data)
        elif self._eof and not self._eof_read:
            self._eof_read = True
            client.shell.feed(b"")

    def read_all(self) -> None:
        """Hand on all that was typed, and its end, although the client does not read yet."""
        self.fed += len(self._stdin)
        self.client.shell.feed(bytes(self._stdin))
        self.client.shell.feed(b"")
        self._stdin.clear()
        self._eof = self._eof_read = True

    def _rest_of_line(self) -> tuple[bytes, bool]:
        """See ``Reader``."""
        end = self._stdin.find(b"\n") + 1 or len(self._stdin)
        rest = bytes(self._stdin[:end])
        del self._stdin[:end]
        self.fed += len(rest)
        self._eof_read = self._eof and not rest.endswith(b"\n")
        return rest, self._eof_read

    def receive(self, datagram: bytes, source: Address) -> None:
        """Hand a datagram to the client."""
        self.client.receive(datagram, source)

    def settle(self) -> None:
        """End the turn, as ``terminal.Console`` does."""
        client = self.client
        client.settle()
        self.unnoted.clear()
        if self.display.output.pending > MAX_PENDING:
            raise Violation(f"{self.name} has {self.display.output.pending} bytes for stdout")
        if client.leaving.exit_code is not None:
            self._exit(client.leaving.exit_code)
            return
        if (self._stdin or (self._eof and not self._eof_read)) and client.wants_input:
            self.wake(self.world.now)
        if self.display.output.pending:
            writable = self.screen.writable_at
            if writable < NEVER:
                self.wake(writable)

    def _exit(self, code: int) -> None:
        self.world.trace("%s exits with %d", self.name, code)
        self.exit_code = code
        self.die()
        self.ledger.check_life(self)

    def send(self, datagram: bytes, address: Address) -> None:
        """Send a datagram of the client. Raise Violation if it is none that its state allows."""
        state = self.client.link.state
        if state in (LINK_OFFLINE, LINK_REGISTERING):
            tags = [value["tag"] for value in unpack(datagram)]
            if state is LINK_OFFLINE or tags not in (["reg"], ["hello"]):
                raise Violation(f"{self.name} is {state} and sends {tags}")
        super().send(datagram, address)

    def on_line(self, line: str) -> None:
        """Look at a line that was written to stdout."""
        self.world.trace("%s > %s", self.name, line[:100])
        if self.speech == "json":
            line = self._understood(json.loads(line))
        elif self.asked:
            line = f"{self.asked}: {line}"
        self._on_event(line)
        found = CHAT_LINE.fullmatch(line)
        if found is not None:
            if self._offline and self.options is None:
                raise Violation(f"{self.name} is offline and shows {line[:80]}")
            self.ledger.shown(self, found.group(1), found.group(3))

    def _on_event(self, line: str) -> None:
        self.lines.append(line)
        if line == "[You are Offline. Bye.]":
            self._offline = True
        elif line.startswith("[Welcome"):
            self._offline = False
        elif line == "[Server not responding]" and self.world.healthy_since < self.world.now - HEALING_TIME:
            raise Violation(f"{self.name} calls the server silent, though nothing is broken")
        elif line.startswith("[Not proven to be from ") or line.endswith(" is damaged.]"):
            raise Violation(f"{self.name} doubts what somebody has really said: {line[:80]}")
        elif "is taken.]" in line or "belongs to someone else.]" in line:
            self.world.refusals.append((self.name, line))

    def _understood(self, found: dict[str, Any]) -> str:
        """Return an object as the line that others get for it."""
        if found["type"] == "message":
            return f"{found['from']}: {clean(found['text'])}"
        if found["type"] == "unproven":
            return UNPROVEN_LINE.format(sender=found["from"], text=clean(found["text"]))
        names = [name for name, form in EVENT_FORMATS.items()
                 if (form.type, form.reason) == (found["type"], found.get("reason"))]
        if not names:
            return str(found["type"])
        if found["type"] in ("received", "saved", "failed"):
            self._note_outcome(found)
        name = names[0]
        if found["type"] == "undelivered" and found.get("count", 1) != 1:
            name = names[1]
        others = {"most": protocol.MAX_TEXT, "usage": "", "name": "", "help": ""}
        return EVENT_FORMATS[name].line.format(**{**others, **found})

    def _note_outcome(self, found: dict[str, Any]) -> None:
        if found["ref"] in self.outcomes:
            raise Violation(f"{self.name} closes {found['ref']} as {self.outcomes[found['ref']]}, and again: {found}")
        self.outcomes[found["ref"]] = found.get("reason", found["type"])

    def _put_error(self, data: bytes) -> int:
        *lines, self._errors = (self._errors + data).split(b"\n")
        for line in lines:
            self.world.trace("%s ! %s", self.name, line.decode()[:100])
            self.complaints.append(line.decode())
            if self.options is not None and line.startswith(b"["):
                self._on_event(line.decode())       # what a client says on stdout
            else:
                self.ledger.handed_back(self, line.decode())
        return len(data)

    def note_release(self, sender: str) -> None:
        """Note that the messages of ``sender`` may be shown out of order from here on."""
        self.world.trace("%s goes on without the missing messages of %s", self.name, sender)
        self.released.add(sender)
        if self.world.healthy_since < self.world.now - HEALING_TIME:
            raise Violation(f"{self.name} could not ask the server, though nothing is broken")


# --- the network ----------------------------------------------------------------------------------------------

class Weather(NamedTuple):
    """How bad the network is."""

    loss: float = 0.0           # part of the datagrams that never arrive
    repeat: float = 0.0         # part that arrives twice
    garble: float = 0.0         # part that arrives cut off, or with a tail
    delay: float = 0.001        # s
    jitter: float = 0.0         # s; the most that a datagram needs beyond ``delay``
    late: float = 0.0           # part that comes much later ...
    lateness: float = 0.0       # ... by up to that many seconds


OPEN_TAGS = ("offer", "accept", "knock", "nack", "reg", "hello")      # what is said in plain with encryption, too


class Network:
    """Carries datagrams from node to node, as well as the weather and the partitions allow."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.weather = Weather()
        self.blocked: Counter[tuple[str, str]] = Counter()      # (from, to): hosts
        self.filter: Callable[[str, str, list[Any]], bool] | None = None     # False: this datagram is lost
        self.datagrams = 0
        self.digest = 0
        self.captured: deque[tuple[bytes, str]] = deque(maxlen=50)      # what peers said lately, and to whom
        self.overheard: deque[tuple[bytes, Address, Address]] = deque(maxlen=200)   # by whom the wire is read: from, to
        self.balance: Counter[Address] = Counter()      # bytes that strangers sent, less what they got

    def send(self, node: Node, datagram: bytes, address: Address) -> None:
        """Send a datagram from where ``node`` is seen now."""
        world, weather, chance = self.world, self.weather, self.world.random.random
        source = node.router.sends(node, address) if node.router is not None else node.address
        self.datagrams += 1
        self.digest = zlib.crc32(datagram, self.digest)
        if node is world.server and address in self.balance:
            self.balance[address] -= len(datagram)
            if self.balance[address] < 0:
                raise Violation(f"the server sends more to {address} than it got from there")
        if (weather.loss and chance() < weather.loss) or not self._passes(node, datagram, address):
            world.trace("%s -x %s:%d %s", node.name, *address, Shown(datagram))
            return
        world.trace("%s -> %s:%d %s", node.name, *address, Shown(datagram))
        for _ in range(2 if weather.repeat and chance() < weather.repeat else 1):
            delay = weather.delay + weather.jitter * chance()
            if weather.late and chance() < weather.late:
                delay += weather.lateness * chance()
            data = datagram
            if weather.garble and chance() < weather.garble:
                data = self._garbled(datagram)
            world.call_at(world.now + delay, functools.partial(self.arrive, node.host, source, data, address))
        if node is not world.server and not world.is_server(address):
            self.captured.append((datagram, node.host))
            if world.encrypts and datagram[:1] != RECORD_MARK and any(
                    value["tag"] not in OPEN_TAGS for value in unpack(datagram)):
                raise Violation(f"{node.name} says to another client in plain: {Shown(datagram)}")
        if world.encrypts:
            self.overheard.append((datagram, source, address))

    def _passes(self, node: Node, datagram: bytes, address: Address) -> bool:
        if self.filter is None:
            return True
        target = self.world.at.get(address)
        return self.filter(node.host, target.host if target is not None else "", unpack(datagram))

    def _garbled(self, datagram: bytes) -> bytes:
        if self.world.random.random() < 0.5:
            return datagram[:self.world.random.randrange(len(datagram))]
        return datagram + self.world.random.getrandbits(64).to_bytes(8, "big")

    def arrive(self, host: str, source: Address, datagram: bytes, address: Address) -> None:
        """Let a datagram arrive from ``host``, if there is a way; ``source``: what stands in it."""
        node = self.world.at.get(address)
        if node is None:
            self.world.trace("nobody is at %s:%d: %s", *address, Shown(datagram))
        elif self.blocked and self.blocked[host, node.host]:
            self.world.trace("no way from %s to %s: %s", host, node.host, Shown(datagram))
        elif node.router is not None and not node.router.lets_in(source, address, self.world.now):
            self.world.trace("a router keeps out what comes from %s:%d: %s", *source, Shown(datagram))
        else:
            node.arrive(datagram, source)

    def forge(self, source: Address, datagram: bytes, node: Node) -> None:
        """Send something to a node, as a stranger."""
        self.world.trace("stranger -> %s %s", node.name, Shown(datagram))
        if node is self.world.server:
            self.balance[source] += len(datagram)
        self.arrive("stranger", source, datagram, node.address)

    def block(self, source: str, target: str, seconds: float = NEVER) -> None:
        """Let nothing pass from one host to the other for that time."""
        self.world.trace("no way from %s to %s for %.1f s", source, target, seconds)
        self.blocked[source, target] += 1
        if seconds < NEVER:
            self.world.call_at(self.world.now + seconds, functools.partial(self.unblock, source, target))

    def unblock(self, source: str, target: str) -> None:
        """Undo one ``block``."""
        if self.blocked[source, target] <= 1:
            del self.blocked[source, target]
        else:
            self.blocked[source, target] -= 1


def unpack(datagram: bytes) -> list[Any]:
    """Return the maps of a datagram, as far as they can be read."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(datagram)
    try:
        return [value for value in unpacker if isinstance(value, dict) and "tag" in value]
    except Exception:       # whatever a garbled one holds
        return []


class Shown:
    """A datagram, described when a trace is printed."""

    def __init__(self, datagram: bytes) -> None:
        self._datagram = datagram

    def __str__(self) -> str:
        return " + ".join(f"{value['tag']}({self._fields(value['info'])})" for value in unpack(self._datagram)
                          if isinstance(value.get("info"), dict)) or (
            f"{len(self._datagram)} bytes of {'a record' if self._datagram[:1] == RECORD_MARK else 'nothing'}")

    @staticmethod
    def _fields(info: dict[str, Any]) -> str:
        return " ".join(f"{key}={Shown._short(value)}" for key, value in info.items() if key != "pad")

    @staticmethod
    def _short(value: Any) -> str:
        if isinstance(value, bytes):
            return value.hex()[:6]
        if isinstance(value, int) and value > 10 ** 9:
            return f"..{value % 10000:04}"
        if isinstance(value, list):
            shown = [Shown._short(element) for element in value[:4]]
            if len(value) > 4:
                shown.append("..")
            return "[" + ",".join(shown) + "]"
        return str(value)[:24]


# --- the world ------------------------------------------------------------------------------------------------

def own_secret(nick: str) -> bytes:
    """Return the secret of the user who owns ``nick``."""
    return zlib.crc32(nick.encode()).to_bytes(4, "big") * 8


SODIUM = load_sodium()


class Watched(Sodium):
    """What encrypts in a world. It notes what was sealed with which key and nonce."""

    def __init__(self, sodium: Sodium, sealed: dict[tuple[bytes, bytes], tuple[bytes, bytes]]) -> None:
        self.__dict__.update(vars(sodium))
        self._sealed = sealed

    def seal(self, key: bytes, nonce: bytes, data: bytes, text: bytes) -> bytes:
        """Seal. Raise Violation if anything else was sealed with that key and nonce: who sees both could forge."""
        if self._sealed.setdefault((key, nonce), (data, text)) != (data, text):
            raise Violation("two texts are sealed with one key and nonce")
        return super().seal(key, nonce, data, text)


class World:
    """Virtual time, and everything that happens in it."""

    def __init__(self, seed: int, tracing: bool = False, mailbox: int = 100_000, encrypts: bool = False) -> None:
        self.random = random.Random(seed)
        self.encrypts = encrypts            # everybody does
        self._sealed: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}       # by key and nonce
        self.now = START
        self.tracing = tracing
        self.mailbox = mailbox              # messages that the server keeps for one recipient
        self.at: dict[Address, Node] = {}
        self.lives: list[Life] = []
        self.ledger = Ledger()
        self.network = Network(self)
        self.disk = Disk()
        self.notes: defaultdict[str, Notes] = defaultdict(Notes)        # of each nick
        self.boots = self.crashes = 0
        self.tells_keys = True      # the server, in large tables, too
        self.clock_errors: dict[str, float] = {}    # host -> s by which its wall clock is wrong
        self.healthy_since = NEVER          # nothing is broken any more from here on
        self.refusals: list[tuple[str, str]] = []
        self.server: ServerNode | None = None
        self.new_router: Callable[[], Router | None] = lambda: None         # what stands before the next client
        self.names = [SERVER]               # the addresses that the server's name has
        self.look_ups = 0
        self.look_up_time = 0.05            # s; NEVER: a look-up is given up after ``LOOK_UP_TIME``
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._ports = 5000

    def new_secret(self) -> bytes:
        """Return 32 random bytes."""
        return self.random.getrandbits(256).to_bytes(32, "big")

    def keys(self, secret: bytes) -> Keys:
        """Return what a program encrypts with, as the owner of ``secret``. Whatever is sealed is looked at."""
        assert SODIUM is not None
        sodium = Watched(SODIUM, self._sealed)
        return Keys(sodium, KeyPair(sodium, secret), self.new_secret)

    def trace(self, text: str, *values: object) -> None:
        """Print what happens, if that is wanted."""
        if self.tracing:
            print(f"{self.now - START:9.4f}  {text % values}")

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` at ``when``."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, callback))

    def run(self, seconds: float) -> None:
        """Let that much time pass."""
        end = self.now + seconds
        events = self._events
        while events and events[0][0] <= end:
            when, _, callback = heapq.heappop(events)
            self.now = max(self.now, when)
            callback()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit: float = 120.0) -> None:
        """Let time pass until ``condition`` holds. Raise Violation if that lasts longer than ``limit`` seconds."""
        end = self.now + limit
        while not condition():
            if not self._events or self._events[0][0] > end:
                raise Violation(f"it did not happen within {limit} s")
            when, _, callback = heapq.heappop(self._events)
            self.now = max(self.now, when)
            callback()

    def start_server(self) -> ServerNode:
        """Start a server on the disk of this world, at the first address of its name."""
        assert self.server is None or not self.server.alive
        self.server = ServerNode(self, self.names[0])
        return self.server

    def is_server(self, address: Address) -> bool:
        """Return whether the server is at ``address``."""
        return self.server is not None and self.at.get(address) is self.server

    def look_up(self, done: Callable[[Sequence[Address]], None]) -> None:
        """Look the server's name up: what every client is handed."""
        self.look_ups += 1
        if self.look_up_time < LOOK_UP_TIME:
            self.call_at(self.now + self.look_up_time, lambda: done(self.names))
        else:
            self.call_at(self.now + LOOK_UP_TIME, lambda: done(()))

    def new_address(self, host: str = "10.0.1.1") -> Address:
        """Return an address where nobody was yet."""
        self._ports += 1
        return host, self._ports

    def client(self, nick: str, address: Address | None = None, stay: bool = False,
               secret: bytes | None = None, name: str = "", speech: str = "plain") -> Life:
        """Start a client; its secret is the nick's own unless another one is given."""
        return Life(self, nick, address or self.new_address(), secret if secret is not None else own_secret(nick),
                    stay, name, speech)

    def job(self, nick: str, line: str, timeout: float = NEVER) -> Life:
        """Start what ``udpchat send`` is: a client that carries out one line, and ends. ``timeout``: s."""
        life = Life(self, nick, self.new_address(), own_secret(nick), timeout=timeout,
                    nick_patience=NICK_PATIENCE)
        life.type(line)
        life.read_all()
        return life

    def waiter(self, nick: str, *words: str) -> Life:
        """Start ``udpchat recv`` or ``ask``, a client that waits for some messages; ``words``: mode and arguments.

        It always has an address where nobody was: there is no argument for its port.
        """
        options = parse([*words[:1], "--config", os.devnull, *words[1:]])
        return Life(self, nick, self.new_address(), own_secret(nick), options.stay, options=options,
                    speech="json" if options.json else "plain", timeout=options.timeout or NEVER,
                    nick_patience=nick_patience(options.mode, True))

    def running(self) -> Iterator[Life]:
        """Return the clients that run, in the order of their start."""
        return (life for life in self.lives if life.alive)

    def life_of(self, nick: str) -> Life | None:
        """Return the client that runs with ``nick``."""
        return next((life for life in self.running() if life.nick == nick), None)


# --- a storm --------------------------------------------------------------------------------------------------

NICKS = ("alice", "bob", "carol", "dave", "zoë")
STREAM_LIVES = 6          # lives of a nick in one run: a recipient remembers 8 streams of a sender
HEAL_TIME = 130.0         # s from the last fault to the closing of the account


class Storm:
    """One random run: users and faults for a while, then quiet, then the account."""

    def __init__(self, seed: int, tracing: bool = False, has_routers: bool = False) -> None:
        """``has_routers``: most clients are behind one."""
        self.seed = seed
        self.random = random.Random(f"storm {seed}")
        pick = self.random
        self.world = World(seed, tracing, mailbox=pick.choice((100_000, 100_000, 100_000, 12)),
                           encrypts=bool(seed % 2) and SODIUM is not None)
        self.world.tells_keys = seed % 4 != 1
        if has_routers:
            routers = random.Random(f"routers {seed}")
            self.world.new_router = lambda: routers.choice(
                (None, Router(), Router(), Router(30.0), Router(120.0, is_symmetric=True)))
        self.nicks = NICKS[:pick.choice((2, 2, 3, 3, 4, 5))]
        self.length = pick.uniform(10, 60)
        self.lives: Counter[str] = Counter()
        self.ports: dict[str, list[Address]] = {nick: [] for nick in self.nicks}
        self._serial = 0
        self._meddler = random.Random(f"meddler {seed}")
        self._clocks = random.Random(f"clocks {seed}")     # apart: nothing else may depend on what a clock says
        self._jobs = random.Random(f"jobs {seed}")
        waiters = self._jobs.randrange(1, len(self.nicks)) if self._jobs.random() < 0.4 else 0
        self.waiters = self._jobs.sample(self.nicks, waiters)       # who mostly run ``recv`` and ``ask``, no clients
        self._faults: dict[str, Callable[[], None]] = {
            "server": self._crash_server, "kill": self._kill_client, "stop": self._stop_node, "cut": self._cut,
            "move": self._move, "stall": self._stall, "disk": self._break_disk, "weather": self._change_weather,
            "stranger": self._stranger, "signal": self._signal, "reader": self._reader_goes}
        self._rare = {"reader": 60.0, "signal": 30.0, "disk": 20.0}
        self._habits: dict[str, Callable[[Life], None]] = {
            "burst": self._burst, "dereg": self._dereg, "quit": self._quit, "chatter": self._chatter}

    # what happens

    def plan(self) -> None:
        """Decide when which fault happens, and when each user does what."""
        pick, world = self.random, self.world
        world.start_server()
        self._change_weather()
        for kind, fault in self._faults.items():
            if pick.random() < 0.45:
                self._repeat(fault, pick.uniform(2, 25) + self._rare.get(kind, 0.0))
        for nick in self.nicks:
            self._start(nick)
            talk = pick.choice((0.2, 1.0, 3.0))
            self._repeat(functools.partial(self._act, nick, self._say_something), talk)
            for kind, habit in self._habits.items():
                if pick.random() < 0.35:
                    self._repeat(functools.partial(self._act, nick, habit), pick.uniform(4, 30))
            if nick in self.waiters:
                self._repeat(functools.partial(self._act, nick, self._quit), pick.uniform(3, 8))
        when = random.Random(f"renumber {self.seed}").uniform(0, 3 * self.length)   # so in every third storm
        if when < self.length - RENUMBER_TIME:
            world.call_at(START + when, self._renumber)

        for _ in range(self._clocks.choice((0, 0, 1, 5))):
            world.call_at(START + self._clocks.uniform(0, self.length), self._set_clock)

    def _repeat(self, action: Callable[[], None], interval: float) -> None:
        """Plan an action at random times of the storm, on average every ``interval`` seconds."""
        when = self.random.expovariate(1 / interval)
        while when < self.length:
            self.world.call_at(START + when, action)
            when += self.random.expovariate(1 / interval)

    def _start(self, nick: str) -> None:
        """Start a client for somebody who has none, at a new address, or where one was before."""
        if self.world.life_of(nick) is not None:
            return
        pick, address = self.random, None
        old = self.ports[nick] if pick.random() < 0.8 else self.ports[pick.choice(self.nicks)]
        if old and pick.random() < 0.4:
            address = pick.choice(old)
            if address in self.world.at:
                address = None
        world = self.world
        if nick in self.waiters and world.healthy_since == NEVER and self._jobs.random() < 0.8:
            life = world.waiter(nick, *self._job(nick))
        else:
            life = world.client(nick, address, speech=SPEECHES[(self.seed + len(world.lives)) % len(SPEECHES)])
            self.lives[nick] += 1
        self.ports[nick].append(life.address)

    def _job(self, nick: str) -> list[str]:
        """Return the command line of a ``recv`` or an ``ask`` of somebody."""
        pick = self._jobs
        other = pick.choice([other for other in self.nicks if other != nick])
        form = pick.choice(([], [], ["--json"]))
        timeout = ["--timeout", str(pick.choice((1, 3, 6, 15)))]
        if pick.random() < 0.3:
            return ["ask", *form, *timeout, other, self._text()]
        sender = pick.choice(([], ["--from", other], ["--from", other.upper()]))
        limit = pick.choice(([], timeout, timeout))
        return ["recv", "--count", str(pick.choice((1, 1, 2, 3, 10))), *form, *sender, *limit]

    def _start_later(self, nick: str) -> None:
        if self.lives[nick] < STREAM_LIVES:
            wait = self.random.choice((0.0, 0.3, 2.0, 10.0)) * self.random.uniform(0.5, 1.5)
            self.world.call_at(self.world.now + wait, functools.partial(self._start, nick))

    # users

    def _act(self, nick: str, habit: Callable[[Life], None]) -> None:
        life = self.world.life_of(nick)
        if life is None:
            self._start_later(nick)
        elif not life.is_away or self.random.random() < 0.3:
            habit(life)

    def _text(self) -> str:
        """Return a text that nobody has sent before."""
        pick = self.random
        self._serial += 1
        dice = pick.random()
        text = f"m{self._serial}"
        if dice < 0.03:
            text += " " + "xä€"[pick.randrange(3)] * int(pick.choice((700, 800, 2500, 9000)) * pick.uniform(0.5, 1))
        elif dice < 0.035:
            text += " " + "y" * pick.choice((60_000, 65_536, 70_000))
        elif dice < 0.08:
            text += pick.choice(("  two blanks ", " \x1b[31m\x07", " \u202egnp", " tab\there", " <not> [a line.]"))
        elif dice < 0.3:
            text += " " + "z" * pick.randrange(200)
        return text

    def _recipient(self, life: Life) -> str:
        dice = self.random.random()
        if dice < 0.03:
            return "nobody"
        return life.nick if dice < 0.06 else self.random.choice(self.nicks)

    def _say_something(self, life: Life) -> None:
        life.type(f"send {self._recipient(life)} {self._text()}")

    def _burst(self, life: Life) -> None:
        to = self._recipient(life)
        for _ in range(self.random.choice((5, 20, 20, 150))):
            life.type(f"send {to} {self._text()}")
            if self.random.random() < 0.1:
                to = self._recipient(life)

    def _chatter(self, life: Life) -> None:
        life.type(self.random.choice(("who", "help", "", "nonsense", "send", "dereg nobody", "reg nobody")))

    def _dereg(self, life: Life) -> None:
        if not life.is_away:
            life.type(f"dereg {life.nick}")
            self.world.call_at(self.world.now + self.random.choice((0.0, 1.0, 8.0)), functools.partial(self._reg, life))

    def _reg(self, life: Life) -> None:
        if life.alive and life.is_away:
            life.type(f"reg {life.nick}")

    def _quit(self, life: Life) -> None:
        if self.random.random() < 0.5:
            life.type("quit")
        else:
            life.end_input()

    # faults

    def _crash_server(self) -> None:
        """Crash at once, or at one of the next steps: between a commit and the datagrams about it, for example."""
        server = self.world.server
        assert server is not None
        if not server.alive:
            return
        if self.random.random() < 0.3:
            server.crash()
        else:
            server.fuse = self.random.choice((0, 1, 2, 5, 20))
        wait = self.random.choice((0.0, 0.5, 2.0, 8.0, 20.0)) * self.random.uniform(0.5, 1.5)
        self._restart_when_dead(wait)

    def _restart_when_dead(self, wait: float) -> None:
        world = self.world
        if world.server is not None and world.server.alive:
            world.call_at(world.now + 0.2, functools.partial(self._restart_when_dead, wait))
        else:
            world.call_at(world.now + wait, self._restart_server)

    def _restart_server(self) -> None:
        if self.world.server is None or not self.world.server.alive:
            self.world.start_server()

    def _some_client(self) -> Life | None:
        running = list(self.world.running())
        return self.random.choice(running) if running else None

    def _kill_client(self) -> None:
        life = self._some_client()
        if life is None:
            return
        if self.random.random() < 0.4:
            life.crash()
        else:
            life.fuse = self.random.choice((0, 1, 2, 5, 20))
        self._start_later(life.nick)

    def _stop_node(self) -> None:
        node: Node | None = self.world.server if self.random.random() < 0.4 else self._some_client()
        if node is not None and node.alive:
            node.stop_for(self.random.choice((0.05, 0.3, 1.0, 6.0, 20.0)) * self.random.uniform(0.5, 1.5))

    def _cut(self) -> None:
        pick = self.random
        hosts = [*self.nicks, "server"]
        one = pick.choice(hosts)
        others = [host for host in hosts if host != one] if pick.random() < 0.4 else [pick.choice(hosts)]
        ways = pick.choice(("to", "from", "both", "both"))
        seconds = pick.choice((0.5, 3.0, 10.0, 50.0)) * pick.uniform(0.5, 1.5)
        for other in others:
            if ways != "from":
                self.world.network.block(one, other, seconds)
            if ways != "to":
                self.world.network.block(other, one, seconds)

    def _move(self) -> None:
        life = self._some_client()
        if life is not None:
            life.move(self.world.new_address("10.0.2.1"))
            self.ports[life.nick].append(life.address)

    def _renumber(self) -> None:
        """Give the server another address, and its name, too: from now on, or once it starts again."""
        world, server = self.world, self.world.server
        world.names = [ELSEWHERE]
        assert server is not None
        if server.alive and self.seed % 2:
            server.move(ELSEWHERE)
        else:
            server.crash()
            self._restart_when_dead(1.0)

    def _stall(self) -> None:
        life = self._some_client()
        if life is None:
            return
        life.screen.set_rate(self.random.choice((0.0, 0.0, 200.0, 3000.0)))
        seconds = self.random.choice((0.3, 3.0, 10.0, 45.0))
        self.world.call_at(self.world.now + seconds, functools.partial(life.screen.set_rate, NEVER))

    def _break_disk(self) -> None:
        disk = self.world.disk
        disk.failing, disk.reading = True, self.random.random() < 0.7
        self.world.trace("the disk fails")
        self.world.call_at(self.world.now + self.random.choice((0.1, 2.0)), functools.partial(self._mend_disk, disk))

    def _mend_disk(self, disk: Disk) -> None:
        disk.failing = False
        self.world.trace("the disk works")

    def _change_weather(self) -> None:
        pick = self.random
        delay = pick.choice((0.0002, 0.001, 0.01, 0.06, 0.3))
        self.world.network.weather = Weather(
            loss=pick.choice((0, 0, 0, 0.02, 0.1, 0.3, 0.5)), repeat=pick.choice((0, 0, 0.02, 0.3)),
            garble=pick.choice((0, 0, 0, 0.05)), delay=delay, jitter=delay * pick.choice((0, 0.5, 2)),
            late=pick.choice((0, 0, 0.02, 0.1)), lateness=pick.choice((0.2, 1.0, 6.0)))
        self.world.trace("%s", self.world.network.weather)

    def _set_clock(self) -> None:
        """Set the wall clock of the server or of a client's host: right, or wrong by up to a hundred years."""
        pick = self._clocks
        host = pick.choice(("server", "server", *(life.host for life in self.world.running())))
        error = pick.choice((0.0, pick.uniform(-100.0, 100.0), pick.uniform(-1.0, 1.0), 1.0, -1.0)) * 365.25 * DAY
        self.world.clock_errors[host] = error
        self.world.trace("the clock of %s is wrong by %.0f s", host, error)

    def _signal(self) -> None:
        life = self._some_client()
        if life is not None:
            life.interrupt()

    def _reader_goes(self) -> None:
        life = self._some_client()
        if life is not None:
            life.screen.gone = True
            life.screen.is_pipe = self.random.random() < 0.5
            life.wake(self.world.now)

    def _stranger(self) -> None:
        """Send what a stranger can send: from an address of its own, with nicks guessed, but no random number."""
        pick, world = self.random, self.world
        nodes: list[Node] = list(world.running())
        if world.server is not None and world.server.alive:
            nodes.append(world.server)
        source = ("10.66.6.6", pick.randrange(1, 65536))
        for _ in range(pick.choice((1, 10))):
            if nodes:
                world.network.forge(source, self._forgery(), pick.choice(nodes))
        captured = [(data, host) for data, host in world.network.captured if host not in ("server", "stranger")]
        if captured and nodes:
            world.network.forge(source, pick.choice(captured)[0], pick.choice(nodes))

        if world.network.overheard and nodes:
            for _ in range(10):
                self._meddle(nodes)

    def _meddle(self, nodes: Sequence[Node]) -> None:
        """Send what somebody can send who reads the wire: from any address, to anybody."""
        pick, network = self._meddler, self.world.network
        running = list(self.world.running())
        if running and pick.random() < 0.1:
            liar, other = pick.choice(running), pick.choice(running)
            forged = encode("chat", {"from": liar.nick, "to": other.nick, "stream": pick.getrandbits(63), "n": 1,
                                     "base": 1, "text": ["forged"]})
            network.arrive("stranger", liar.address, forged, other.address)
        datagram, source, to = pick.choice(network.overheard)
        if pick.random() < 0.5:
            place = pick.randrange(len(datagram))
            datagram = datagram[:place] + bytes((datagram[place] ^ 1 << pick.randrange(8),)) + datagram[place + 1:]
        node = pick.choice(nodes) if pick.random() < 0.3 else self.world.at.get(to)
        if node is not None and pick.random() < 0.7:
            network.arrive("stranger", source, datagram, node.address)
        elif node is not None:
            network.forge(("10.66.6.7", pick.randrange(1, 65536)), datagram, node)

    def _forgery(self) -> bytes:
        pick = self.random
        sender, to, number = pick.choice(self.nicks), pick.choice(self.nicks), pick.getrandbits(63)
        session = pick.getrandbits(128).to_bytes(16, "big")
        return pick.choice((
            lambda: pick.getrandbits(800).to_bytes(100, "big"),
            lambda: encode("chat", {"from": sender, "to": to, "stream": number, "n": 1, "base": 1, "text": ["forged"]}),
            lambda: encode("ack", {"stream": number, "next": 1000, "have": [], "room": 0}),
            lambda: encode("mail", {"to": to, "stream": number, "n": 1, "base": 1,
                                    "items": [[sender, number, 1, 0.0, ["forged"], []]]}),
            lambda: encode("pong", {"id": number, "boot": number, "version": 99, "mail": 99}),
            lambda: encode("refused", {"nick": to, "reason": "replaced", "session": session}),
            lambda: protocol.padded("ping", {"id": number, "session": session, "version": 0}, 184),
            lambda: protocol.padded("reg", {"id": number, "nick": sender}, 128),
            lambda: encode("dereg", {"session": session}),
            lambda: encode("probe", {"id": number, "to": to}),
        ))()

    # the end

    def heal(self) -> None:
        """End all faults, let everybody run and be online, and wait."""
        world = self.world
        world.trace("--- everything heals")
        world.network.weather = Weather()
        world.network.blocked.clear()
        world.disk.failing = False
        world.healthy_since = world.now
        for node in (*world.running(), *([world.server] if world.server is not None else [])):
            node.stopped_until, node.fuse = 0.0, -1
            node.wake(world.now)
        for life in world.running():
            if life.options is not None:
                life.interrupt()
            life.screen.is_pipe = True      # a client that has not noticed yet that nobody reads does so now
            life.screen.set_rate(NEVER)
        end = world.now + HEAL_TIME - IDLE_TIME
        while world.now < end:
            self._bring_back()
            world.run(2.0)

    def _bring_back(self) -> None:
        world = self.world
        world.network.blocked.clear()
        if world.server is None or not world.server.alive:
            world.start_server()
        for nick in self.nicks:
            life = world.life_of(nick)
            if life is None:
                self._start(nick)
            elif life.is_away and life.client.is_offline and not life.has_typed_ahead:
                self._reg(life)

    def check_quiet(self) -> None:
        """Raise Violation unless nothing is open, all have the table and all mail, and only idle traffic is left."""
        world = self.world
        assert world.server is not None
        sent = {node: node.sent for node in (world.server, *world.running())}
        world.run(IDLE_TIME)
        for node, before in sent.items():
            most = IDLE_RATE * (len(self.nicks) if node is world.server else 1)
            if node.sent - before > most:
                raise Violation(f"{node.name} sent {node.sent - before} datagrams in {IDLE_TIME} idle seconds")
        self._check_server(world.server.server)
        entries = world.server.server.registry.table.entries.values()
        table = [(*entry[:4], entry.key, entry.is_bound) for entry in sorted(entries)]
        for nick in self.nicks:
            life = world.life_of(nick)
            if life is None:
                raise Violation(f"{nick} does not run")
            self._check_client(life, table)
        self._check_everybody_reaches_everybody()
        if world.refusals:
            raise Violation("{} was told: {}".format(*world.refusals[0]))

    def _check_everybody_reaches_everybody(self) -> None:
        """Send from each to each; raise Violation unless all of it is received, or behind routers kept at least."""
        lives = list(self.world.running())
        closed = [conversation.reach.closed_until - life.loop.now() for life in lives
                  for conversation in life.client.outbox.conversations.values()]
        self.world.run(max(0.0, 0.0, *closed))      # a path that has failed is tried again later, each time later
        for life in lives:
            for other in lives:
                self._serial += 1
                life.type(f"send {other.nick} m{self._serial}")
        has_router = any(life.router is not None for life in lives)
        self.world.run(3.0 if has_router else 1.0)      # a path that cannot be opened is tried before
        for life in lives:
            for message in life.typed[-len(lives):]:
                if message.closing != "received" and not (has_router and message.closing == "saved"):
                    raise Violation(f"{message!r} is {message.closing or 'open'}, though nothing is broken")

    def _check_server(self, server: Server) -> None:
        for known in server.registry.mailbox.known.values():
            if known.waiting or known.messages or known.size:
                raise Violation(f"{known.nick} has {known.waiting} numbers, {known.messages} messages, {known.size}"
                                " bytes of mail left")
        left = self.world.disk.database.execute("SELECT count(*) FROM mail").fetchone()[0]
        if left:
            raise Violation(f"{left} rows of mail are left on the disk")
        if server.prober.probes or server.keeper.to_answer or server.announcer.unsent is not None:
            raise Violation("the server is busy, though nothing happens")

    @staticmethod
    def _check_client(life: Life, table: list[tuple[str, str, int, State, bytes, bool]]) -> None:
        client = life.client
        if not client.link.has_joined:
            raise Violation(f"{life.name} is {client.link.state}")
        mine = [(*entry[:4], entry.key, entry.is_bound) for entry in sorted(client.table_sync.table.entries.values())]
        told = {entry[0]: entry for entry in table}
        if [told.get(entry[0]) if entry[4] == protocol.UNTOLD else entry for entry in mine] != table:
            raise Violation(f"{life.name} has the table {mine}, the server {table}")
        if not client.table_sync.table.is_online(life.nick):
            raise Violation(f"{life.name} is not online: {table}")
        still = [message for message in life.typed if not message.closing and not message.away]
        if still or life.has_typed_ahead:
            raise Violation(f"{life.name} has open messages: {still[:3]}, stdin {life.has_typed_ahead}")
        inbox, waits = client.inbox, next(client.outbox.undelivered(), None)
        if waits is not None or inbox.is_ready or inbox.is_asking or life.display.output.pending:
            raise Violation(f"{life.name} is busy, though nothing happens")

    def leave(self) -> None:
        """Let everybody leave."""
        for life in list(self.world.running()):
            life.end_input()
        self.world.run(5.0)
        for life in self.world.running():
            raise Violation(f"{life.name} does not end")
        self.world.ledger.check_saved()

    def run(self) -> None:
        """Do the whole run. Raise Violation, or what the program raises."""
        self.plan()
        self.world.run(self.length)
        self.heal()
        self.check_quiet()
        self.leave()


# --- many seeds -----------------------------------------------------------------------------------------------

class Result(NamedTuple):
    """How one seed went; ``failure`` is empty where all is well."""

    seed: int
    failure: str
    messages: int
    datagrams: int
    crashes: int
    digest: int


def run_seed(seed: int, tracing: bool = False, has_routers: bool = False) -> Result:
    """Do one run, and return how it went; ``has_routers``: see ``Storm``."""
    level, log.level = log.level, INFO if tracing else ERROR + 1
    storm = Storm(seed, tracing, has_routers)
    failure = ""
    try:
        storm.run()
    except Violation as violation:
        failure = f"{violation} (at {storm.world.now - START:.4f} s)"
    except Exception as error:
        failure = f"{type(error).__name__}: {error} (at {storm.world.now - START:.4f} s)\n{traceback.format_exc()}"
    finally:
        log.level = level
        storm.world.disk.database.close()
    world = storm.world
    return Result(seed, failure, len(world.ledger.messages), world.network.datagrams, world.crashes,
                  world.network.digest)


def show(data: bytes) -> int:
    """Print whole lines of the log, between all else that is printed; return how many bytes that were."""
    print(data.decode(), end="")
    return len(data)


def replay(seed: int) -> str:
    """Return the command that replays a seed and prints it line by line."""
    return f"python -m tests.simulate --seed {seed} --trace"


def run_seeds(seeds: Sequence[int], jobs: int = 1, run: Callable[[int], Result] = run_seed) -> Iterator[Result]:
    """Do many runs, ``jobs`` at a time."""
    if jobs == 1:
        yield from map(run, seeds)
        return
    with multiprocessing.Pool(jobs) as pool:
        yield from pool.imap(run, seeds, chunksize=5)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description="A chat in a simulated world.")
    parser.add_argument("--seed", type=int, metavar="N", help="run one seed")
    parser.add_argument("--trace", action="store_true", help="print what happens in it")
    parser.add_argument("--routers", action="store_true", help="most clients are behind routers")
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="run many (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first of them (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    options = parser.parse_args()
    if options.trace:
        log.line = lambda at, level, message, counters: f"           ({message})"
        log.output = Output(show)
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    seeds = [options.seed] if options.seed is not None else range(options.start, options.start + options.seeds)
    run = functools.partial(run_seed, tracing=options.trace, has_routers=options.routers)
    results = [run(options.seed)] if options.seed is not None else run_seeds(seeds, options.jobs, run)
    for result in results:
        totals.update(messages=result.messages, datagrams=result.datagrams, crashes=result.crashes,
                      failures=bool(result.failure))
        if result.failure:
            print(f"seed {result.seed}: {result.failure}\n    {replay(result.seed)}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(seeds)} seeds, {totals['messages']} messages, {totals['datagrams']} datagrams, {totals['crashes']}"
          f" crashes, {totals['failures']} failures; {len(seeds) / seconds:.1f} seeds a second")
    return int(totals["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
