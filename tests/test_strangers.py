"""What strangers, floods and failures cannot do: forgeries, amplification, exhaustion, stolen nicks, broken machines.

A stranger here is off the path: knows every nick and address, can write any source address on a datagram, the
server's too, but sees none that others send, and so knows no session, request, stream or cookie.

``Desk`` is a server on arguments alone, for what needs many datagrams; the rest happens in the simulated world, or,
where only a real disk, a real process or a real start tells, between processes.
"""
from __future__ import annotations

import errno
import functools
import gc
import hashlib
import multiprocessing
import os
import resource
import signal
import socket
import stat
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

import protocol
import registry
import udpchat
from client import MAX_NEWCOMERS, NEWCOMER_TIME, PING_INTERVAL, Client
from conversation import PIECE_MEMORY, STREAMS_PER_SENDER, Inbox, Outbox
from home import DAMAGED, Mailbox, load_secret
from loop import (DATAGRAMS_PER_TURN, OUTPUT_LIMIT, Endpoint, Output, SelectorLoop, Timer, TimerHeap, UdpSocket, Usage,
                  bind)
from protocol import (OFFLINE as IS_OFFLINE, ONLINE, SYNC_PAGES, Address, Decoder, Info, Table, addressed, clean,
                      encode, padded)
from registry import COOKIE_TIME, DAY, LINK_LEAVING, NICK_LAPSE, SYNC_INTERVAL, Registry
from secure import Handshake, Keys, token_for
from server import BROADCAST_WAIT, CLAIMS_PER_PROBE, PROBE_TIMEOUT, STRANGER_REPLIES, Server
from terminal import Display
from tests.corpus import mutants, record
from tests.processes import DEADLINE, NOT_RESPONDING, OFFLINE, SAVED, WELCOME, Chat, is_offline, received
from tests.simulate import EPOCH, SERVER, Ledger, Life, Node, World

STRANGER: Address = ("10.66.6.6", 666)
EVE: Address = ("10.66.6.6", 4444)
HOME = "10.0.1.1"
NOBODYS = b"?" * 16
READY = "[Client table updated.]"
NO_DISK = "[The server cannot save messages now, message for bob not saved.]"


def maps_of(datagram: bytes) -> list[tuple[str, Info]]:
    """Return what is in a datagram."""
    return Decoder().decode(datagram)


# --- a server alone -------------------------------------------------------------------------------------------

class DeskLoop:
    """A loop without descriptors: time passes when the test says so."""

    def __init__(self) -> None:
        self.random: Any = Random(1)
        self.drained = True
        self.time = 1000.0
        self.wall_time = EPOCH
        self.timers = TimerHeap()

    def now(self) -> float:
        """Return the time of this turn, in seconds."""
        return self.time

    clock = now

    def wall(self) -> float:
        """Return the seconds since 1970."""
        return self.wall_time

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once ``when`` has come."""
        return self.timers.call_at(when, callback)


class Desk:
    """A server on arguments alone; ``sent`` is what it has sent."""

    def __init__(self, store: str = ":memory:", nick_lapse: float = NICK_LAPSE, keys: Keys | None = None,
                 **options: int) -> None:
        self.loop = DeskLoop()
        self.sent: list[tuple[bytes, Address]] = []
        replies = options.pop("stranger_replies", STRANGER_REPLIES)
        self.registry = Registry(Mailbox(store, b"i" * 16, self.loop.now()), **options)
        self.send: Callable[[bytes, Address], None] = lambda datagram, address: self.sent.append((datagram, address))
        self.server = Server(self.loop, lambda datagram, address: self.send(datagram, address), self.registry,
                             nick_lapse, replies, keys)
        self.server.start()
        self.turn()

    def turn(self) -> list[tuple[bytes, Address]]:
        """End a turn; return what was sent in it."""
        before = len(self.sent)
        self.loop.timers.run(self.loop.time)
        self.server.settle()
        return self.sent[before:]

    def wait(self, seconds: float) -> None:
        """Let time pass, with every timer in its turn."""
        end = self.loop.time + seconds
        while self.loop.timers.next_time() <= end:
            self.loop.time = max(self.loop.time, self.loop.timers.next_time())
            self.turn()
        self.loop.time = end
        self.turn()

    def say(self, address: Address, *datagrams: bytes) -> list[tuple[str, Info]]:
        """Send datagrams in one turn; return what comes back to that address in it."""
        for datagram in datagrams:
            self.server.receive(datagram, address)
        return [found for datagram, to in self.turn() if to == address for found in maps_of(datagram)]

    def cookie(self, address: Address) -> bytes:
        """Return the cookie for an address."""
        (tag, info), = self.say(address, padded("reg", {"id": 1, "nick": "x"}, protocol.REG_SIZE))
        assert tag == "cookie"
        return bytes(info["cookie"])

    def ask_for(self, nick: str, address: Address, token: bytes | None = None) -> list[tuple[str, Info]]:
        """Ask for a nick from an address that is proved; return the answer."""
        info: Info = {"id": self.loop.random.getrandbits(63), "nick": nick, "cookie": self.cookie(address)}
        if token is not None:
            info["token"] = token
        return self.say(address, padded("reg", info, protocol.REG_SIZE))

    def register(self, nick: str, address: Address, token: bytes | None = None) -> bytes:
        """Register a client, which then has the table; return the session."""
        welcome = dict(self.ask_for(nick, address, token))["welcome"]
        session = bytes(welcome["session"])
        self.say(address, ping(session, welcome["version"]))
        return session

    def state(self) -> tuple[Any, ...]:
        """Return all that a stranger must not change."""
        found = self.registry
        return ([entry[:4] for entry in sorted(found.table.entries.values())],
                sorted((s.id, s.nick, s.address) for s in found.sessions.by_id.values()), sorted(found.sessions.live),
                sorted((k.nick, k.first, k.last, k.messages, k.owner) for k in found.mailbox.known.values()))

    def kept(self) -> dict[str, int]:
        """Return how much the server keeps of each kind."""
        prober, keeper, postman, found = self.server.prober, self.server.keeper, self.server.postman, self.registry
        return {"probes": len(prober.probes), "sessions": len(found.sessions), "closed": len(found.sessions.ended),
                "spent": len(found.sessions.spent), "known": len(found.mailbox.known), "saves": len(keeper.streams),
                "early": keeper.early, "mail": postman.loaded, "mails": len(postman.streams),
                "timers": len(self.loop.timers), "alive": len(prober.answers),
                "waiting": sum(len(probe.saves) for probe in prober.probes.values())}


def ping(session: bytes, version: int = 2 ** 62, id_: int = 5) -> bytes:
    """Return a ``ping``; by default of somebody who holds any table."""
    return padded("ping", {"id": id_, "session": session, "version": version}, protocol.SESSION_SIZE)


def save(session: bytes, to: str, stream: int, n: int = 1, base: int = 1, texts: int = 1, text: str = "hi") -> bytes:
    """Return a ``save``."""
    return encode("save", {"session": session, "to": to, "stream": stream, "n": n, "base": base,
                           "text": [text] * texts, "at": [EPOCH] * texts, "relay": False})


def home(number: int) -> Address:
    """Return an address of an honest client."""
    return HOME, 5000 + number


def stranger(number: int) -> Address:
    """Return an address that nobody has proved."""
    return f"10.66.{number // 60000}.6", 1 + number % 60000


# --- a chat ---------------------------------------------------------------------------------------------------

def start(*nicks: str, seed: int = 1) -> tuple[World, list[Life]]:
    """Return a world with a server and clients that are all online and know each other."""
    world = World(seed)
    world.start_server()
    lives = [world.client(nick) for nick in nicks]
    world.run_until(lambda: all(life.client.table_sync.table.is_online(nick) for nick in nicks for life in lives), 5)
    world.run(1)
    return world, lives


class Tap:
    """Counts what is sent: (host, tag) -> maps."""

    def __init__(self, world: World) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lost: Callable[[str, str, str], bool] = lambda source, target, tag: False
        world.network.filter = self._passes

    def _passes(self, source: str, target: str, maps: list[Any]) -> bool:
        self.counts.update((source, value["tag"]) for value in maps)
        return not any(self.lost(source, target, value["tag"]) for value in maps)

    def of(self, host: str) -> dict[str, int]:
        """Return what a host has sent."""
        return {tag: number for (source, tag), number in self.counts.items() if source == host}


def forge(world: World, source: Address, datagram: bytes, life: Life) -> None:
    """Send a datagram with a forged source to a client."""
    world.network.arrive("stranger", source, datagram, life.address)


def chat(sender: str, to: str, text: str, stream: int = 7, n: int = 1) -> bytes:
    """Return a ``chat``."""
    return encode("chat", {"from": sender, "to": to, "stream": stream, "n": n, "base": 1, "text": [text]})


def tables_agree(world: World) -> bool:
    """Return whether every client that runs has the table of the server."""
    assert world.server is not None
    table = contents(world.server.server.registry.table)
    return all(contents(life.client.table_sync.table) == table for life in world.running())


def contents(table: Table) -> dict[str, tuple[str, int, str]]:
    """Return what a table says, without versions."""
    return {nick: entry[1:4] for nick, entry in table.entries.items()}


# --- those who come just now ----------------------------------------------------------------------------------

def test_what_a_newcomer_says_need_not_be_repeated_if_the_table_comes_soon() -> None:
    world, (bob,) = start("bob")
    tap, tables = Tap(world), iter(range(100))
    tap.lost = lambda source, target, tag: (target, tag) == ("bob", "table") and not next(tables)
    carol = world.client("carol")
    carol.type("send bob first")
    world.run(5)
    assert bob.lines.count("carol: first") == 1 and carol.lines[-1] == received("bob")
    assert tap.of("carol")["chat"] == 1


def test_what_comes_from_where_nobody_is_takes_bounded_memory_and_is_never_shown() -> None:
    world, (bob,) = start("bob")
    for number in range(100):
        forge(world, (EVE[0], 1000 + number), chat("carol", "bob", "forged", number), bob)
    world.run(0.1)
    assert len(bob.client.peer_links._newcomers) == MAX_NEWCOMERS
    assert world.server is not None
    world.run(2 * NEWCOMER_TIME)
    world.server.server.registry.table.set("carol", EVE[0], 1000, ONLINE)
    world.run(20)       # by then a ping has shown that the table has changed
    assert bob.client.table_sync.table.is_online("carol") and not [line for line in bob.lines if "forged" in line]


# --- forgeries of the server ----------------------------------------------------------------------------------

FORGED = ("cookie", "welcome", "refused", "refused id", "refused session", "refused nick", "table", "ack", "nack",
          "exists", "mail", "probe", "pong", "bye", "chat", "call", "knock")


def forgery(random: Random, name: str, nick: str, guess: bool) -> bytes:
    """Return something that a stranger, who knows no random number, can say in the server's name to ``nick``."""
    number, secret = random.getrandbits(63), random.getrandbits(128).to_bytes(16, "big")
    other = "alice" if nick == "bob" else "bob"
    infos: dict[str, Info] = {
        "cookie": {"id": number, "server": secret, "cookie": secret},
        "welcome": {"id": number, "nick": nick, "boot": number, "session": secret, "version": 1},
        "refused": {"id": number, "session": secret, "nick": nick, "reason": "owned"},
        "refused id": {"id": number, "nick": nick, "reason": "taken"},
        "refused session": {"session": secret, "nick": nick, "reason": "replaced"},
        "refused nick": {"nick": nick, "reason": "taken"},
        "table": {"since": 0, "version": 2 ** 40, "set": [[other, *EVE, "online"], [nick, *EVE, "offline"]]},
        "ack": {"stream": number, "next": 1, "have": [], "room": 0},
        "nack": {"stream": number, "first": 1, "last": 100, "reason": "full"},
        "exists": {"stream": number, "n": 1, "version": 9, "entry": [other, *EVE, "online"]},
        "mail": {"to": nick, "stream": number, "n": 1, "base": 1,
                 "items": [[other, number, 1, EPOCH, ["forged"], []]]},
        "probe": {"id": number, "to": nick},
        "call": {"from": "alice", "stream": number, "host": "192.0.2.9", "port": 9},
        "knock": {"stream": number},
        "pong": {"id": number, "boot": number, "version": 2 ** 40, "mail": 99},
        "bye": {"session": secret},
        "chat": {"from": other, "to": nick, "stream": number, "n": 1, "base": 1, "text": ["forged"]},
    }
    datagram = encode(name.split(" ")[0], infos[name])
    assert maps_of(datagram), "it is not dropped for its form"
    return addressed(secret, datagram) if guess else datagram


def shower(world: World, life: Life, name: str, seconds: float) -> int:
    """Send a hundred forgeries a second in the server's name; return how many."""
    random, count = Random(7), int(seconds * 100)
    for number in range(count):
        datagram = forgery(random, name, life.nick, guess=number % 2 > 0)
        world.call_at(world.now + number / 100, functools.partial(forge, world, SERVER, datagram, life))
    return count


@pytest.mark.parametrize("name", FORGED)
def test_what_a_stranger_says_in_the_name_of_the_server_changes_nothing(name: str) -> None:
    world, (alice, bob) = start("alice", "bob")
    tap, lines = Tap(world), len(bob.lines)
    session, entries, seconds = bob.client.link.session, dict(bob.client.table_sync.table.entries), 10
    forged = shower(world, bob, name, seconds)
    world.run(seconds)
    assert bob.alive and bob.client.link.has_joined and bob.client.link.session == session
    assert bob.lines[lines:] == [] and bob.client.table_sync.table.entries == entries
    said = tap.of("bob")
    assert set(said) <= {"ping", "alive"}
    assert said.get("alive", 0) <= (forged if name == "probe" else 0)
    assert said.get("ping", 0) <= (seconds + 1 if name == "pong" else seconds // PING_INTERVAL + 1)
    alice.type("send bob hello")
    world.run(1)
    assert bob.lines[lines:] == ["alice: hello"] and alice.lines[-1] == received("bob")


def test_a_stranger_cannot_pass_for_another_address_of_the_server() -> None:
    world = World(1)
    alice = world.client("alice")
    world.run(0.2)
    for guess in (True, False):
        datagram = forgery(Random(7), "cookie", "alice", guess)
        forge(world, STRANGER, datagram, alice)
    world.start_server()
    world.run(1)
    assert alice.client.link.endpoint.current == SERVER and alice.client.link.has_joined


def test_a_forged_pong_makes_a_ping_and_a_forged_probe_an_answer_to_the_real_server() -> None:
    world, (alice, _) = start("alice", "bob")
    tap = Tap(world)
    forge(world, SERVER, encode("pong", {"id": 1, "boot": 1, "version": 1, "mail": 0}), alice)
    forge(world, SERVER, encode("probe", {"id": 1, "to": "alice"}), alice)
    forge(world, STRANGER, encode("probe", {"id": 1, "to": "alice"}), alice)
    world.run(2)
    assert tap.of("alice") == {"ping": 1, "alive": 1} and tap.of("server") == {"pong": 1}


@pytest.mark.parametrize("name", FORGED)
def test_a_client_that_registers_believes_only_answers_to_its_request(name: str) -> None:
    world = World(1)
    bob = world.client("bob")       # nobody answers: every datagram but ``reg`` of it would be a violation
    shower(world, bob, name, 1)
    world.run(1)
    assert bob.alive and bob.lines == [] and bob.client.link.session is None
    world.start_server()
    world.run(2)
    assert WELCOME in bob.lines and bob.client.table_sync.table.is_online("bob")


@pytest.mark.parametrize("name", FORGED)
def test_a_client_that_leaves_believes_only_the_answer_for_its_session(name: str) -> None:
    world, (alice, bob) = start("alice", "bob")
    tap = Tap(world)
    tap.lost = lambda source, target, tag: source == "server"
    bob.type("dereg bob")
    world.run(0.1)
    assert bob.client.link.state is LINK_LEAVING
    shower(world, bob, name, 1.5)
    world.run(1.5)
    assert bob.client.link.state is LINK_LEAVING and OFFLINE not in bob.lines
    tap.lost = lambda source, target, tag: False
    world.run(2)
    assert bob.lines[-1] == OFFLINE


@pytest.mark.parametrize("reason", ["taken", "owned", "full", "encrypted", "secure", "replaced", "another"])
def test_a_client_that_leaves_has_left_when_its_session_is_refused_for_whatever_reason(reason: str) -> None:
    world, (bob,) = start("bob")
    Tap(world).lost = lambda source, target, tag: source == "server"
    bob.type("dereg bob")
    world.run(0.1)
    assert bob.client.link.state is LINK_LEAVING
    forge(world, SERVER, encode("refused", {"session": bob.client.link.session, "nick": "bob", "reason": reason}), bob)
    world.run(0.1)
    assert bob.lines[-1] == OFFLINE


@pytest.mark.parametrize("name", FORGED)
def test_a_client_that_is_away_answers_nothing_and_shows_nothing(name: str) -> None:
    world, (bob,) = start("bob")
    bob.type("dereg bob")
    world.run(1)
    tap, lines = Tap(world), list(bob.lines)
    shower(world, bob, name, 3)
    world.run(3)
    assert bob.client.is_offline and bob.lines == lines and tap.of("bob") == {}


# --- forgeries of peers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["stranger", "carol", "server", "former"])
def test_chat_counts_only_from_where_the_table_has_its_sender(source: str) -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    former = alice.address
    if source == "former":
        alice.move(world.new_address("10.0.2.1"))
        alice.client.link.ping_until_answered()
        world.run(2)
    tap, lines = Tap(world), len(bob.lines)
    forge(world, {"stranger": EVE, "carol": carol.address, "server": SERVER, "former": former}[source],
          chat("alice", "bob", "forged"), bob)
    world.run(1)
    assert bob.lines[lines:] == [] and "ack" not in tap.of("bob") and "nack" not in tap.of("bob")
    alice.type("send bob hi")
    world.run(1)
    assert bob.lines[lines:] == ["alice: hi"]


def test_chat_of_somebody_unknown_or_offline_is_not_shown() -> None:
    world, (bob, carol) = start("bob", "carol")
    carol.type("dereg carol")
    world.run(1)
    lines = len(bob.lines)
    for sender in ("carol", "mallory"):
        forge(world, carol.address, chat(sender, "bob", "forged"), bob)
    world.run(1)
    assert bob.lines[lines:] == []


def held_up(world: World, alice: Life) -> tuple[Tap, int]:
    """Let alice send something to bob, who does not answer; return her stream."""
    tap = Tap(world)
    tap.lost = lambda source, target, tag: "alice" in (source, target) and tag in ("ack", "nack", "exists", "chat")
    alice.type("send bob hello")
    world.run(0.2)
    return tap, alice.client.outbox.conversations["bob"].stream.id


@pytest.mark.parametrize("kind", ["ack", "nack"])
@pytest.mark.parametrize("source", ["stranger", "carol", "server"])
def test_a_receipt_counts_only_from_where_the_message_went(kind: str, source: str) -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    _, stream = held_up(world, alice)
    lines = len(alice.lines)
    answer = {"ack": encode("ack", {"stream": stream, "next": 2, "have": [], "room": 4096}),
              "nack": encode("nack", {"stream": stream, "first": 1, "last": 1, "reason": "not-me"})}[kind]
    forge(world, {"stranger": EVE, "carol": carol.address, "server": SERVER}[source], answer, alice)
    world.run(0.1)
    assert alice.lines[lines:] == []
    forge(world, bob.address, answer, alice)
    alice.open["bob"].clear()       # the account knows of no such receipt
    alice.typed[-1].closing = ""
    with_no_account(world, 0.1)
    assert alice.lines[lines:] == [{"ack": received("bob"), "nack": "[No ACK from bob, message sent to server.]"}[kind]]


def with_no_account(world: World, seconds: float) -> None:
    """Let time pass in which what is shown is not what was typed."""
    nothing: Callable[..., None] = lambda *_: None
    with pytest.MonkeyPatch.context() as patch:
        for name in ("closed", "shown", "too_long", "handed_back", "check_life"):
            patch.setattr(Ledger, name, nothing)
        world.run(seconds)


# --- forgeries of clients -------------------------------------------------------------------------------------

def forged_requests(random: Random) -> dict[str, bytes]:
    """Return what somebody who knows no random number can say in the name of a client."""
    number, secret = random.getrandbits(63), random.getrandbits(128).to_bytes(16, "big")
    return {
        "reg": padded("reg", {"id": number, "nick": "bob"}, 1200),
        "reg with a cookie": padded("reg", {"id": number, "nick": "bob", "cookie": secret}, 1200),
        "reg with a token": padded("reg", {"id": number, "nick": "bob", "cookie": secret, "token": bytes(32)}, 1200),
        "reg of a new nick": padded("reg", {"id": number, "nick": "eve", "cookie": secret}, 1200),
        "dereg": padded("dereg", {"session": secret}, 1200), "ping": padded("ping", {
            "id": number, "session": secret, "version": 0}, 1200),
        "sync": padded("sync", {"session": secret, "version": 0}, 1200),
        "save": save(secret, "bob", number), "ack": encode("ack", {
            "stream": number, "next": 2, "have": [], "room": 0}),
        "alive": encode("alive", {"id": number, "nick": "bob", "session": secret}),
        "alive without session": encode("alive", {"id": number, "nick": "bob"}),
    }


@pytest.mark.parametrize("name", forged_requests(Random(1)))
def test_what_a_stranger_says_in_the_name_of_a_client_changes_nothing_at_the_server(name: str) -> None:
    desk = Desk()
    alice, bob = desk.register("alice", home(1), b"a" * 32), desk.register("bob", home(2), b"b" * 32)
    desk.say(home(1), encode("dereg", {"session": alice}))
    desk.say(home(2), save(bob, "alice", 9))
    before, random = desk.state(), Random(2)
    for source in (home(2), home(1), STRANGER, SERVER):
        for _ in range(20):
            desk.server.receive(forged_requests(random)[name], source)
        desk.wait(1)
    assert desk.state() == before
    assert desk.say(home(2), ping(bob))[0][0] == "pong"


def test_with_a_session_of_her_own_eve_speaks_for_nobody_else() -> None:
    desk = Desk()
    for number, nick in enumerate(("alice", "bob"), 1):
        desk.register(nick, home(number), nick[:1].encode() * 32)
    eve = desk.register("eve", EVE)
    before = desk.state()
    for request in (ping(eve), padded("dereg", {"session": eve}, 184), save(eve, "alice", 3, text="forged" * 20)):
        before_it = len(desk.sent)
        desk.say(home(2), request)      # forged source: asked there, where it is not eve who answers
        (tag, _), (probe, info) = maps_of(desk.sent[before_it][0])
        assert (tag, probe, info["to"], len(desk.sent)) == ("for", "probe", "eve", before_it + 1)
        desk.say(home(2), encode("alive", {"id": info["id"], "nick": "bob"}))
        desk.wait(1)
    assert desk.state() == before
    desk.say(home(1), encode("dereg", {"session": NOBODYS}))
    session = desk.registry.sessions.by_nick["alice"]
    desk.say(home(1), encode("dereg", {"session": session.id}))
    desk.say(EVE, encode("save", {"session": eve, "from": "bob", "to": "alice", "stream": 4, "n": 1, "base": 1,
                                  "text": ["forged"], "at": [EPOCH], "relay": False}))
    letters = desk.registry.mailbox.fetch(desk.registry.mailbox.known["alice"], 1, 10)
    assert [letter[0][0] for letter in letters] == ["eve"], "what she says, she says"


def test_mail_is_sent_to_nobody_but_its_owner_and_deleted_by_nobody_else() -> None:
    desk = Desk()
    alice, bob = desk.register("alice", home(1), b"a" * 32), desk.register("bob", home(2), b"b" * 32)
    desk.say(home(1), encode("dereg", {"session": alice}))
    desk.say(home(2), save(bob, "alice", 9, text="secret"))
    eve, before = desk.register("eve", EVE), len(desk.sent)
    for token in (None, b"e" * 32):
        answers = desk.ask_for("alice", EVE, token)
        assert [(tag, info["reason"]) for tag, info in answers] == [("refused", "owned")]
    for stream in range(1, 200):
        desk.say(EVE, encode("ack", {"stream": stream, "next": 2, "have": [], "room": 9}))
        desk.say(home(1), encode("ack", {"stream": stream, "next": 2, "have": [], "room": 9}))
    desk.say(EVE, ping(alice), ping(eve))
    desk.wait(2)
    assert not any(b"secret" in datagram for datagram, _ in desk.sent[before:])
    desk.register("alice", home(1), b"a" * 32)
    desk.wait(0.1)
    (to, mail), = {(to, info["stream"]) for datagram, to in desk.sent[before:] for tag, info in maps_of(datagram)
                   if tag == "mail"}
    assert to == home(1)
    desk.say(EVE, encode("ack", {"stream": mail, "next": 2, "have": [], "room": 9}))
    assert desk.registry.mailbox.known["alice"].waiting == 1, "an ack counts only from where the mail went"
    desk.say(home(1), encode("ack", {"stream": mail, "next": 2, "have": [], "room": 9}))
    assert desk.registry.mailbox.known["alice"].waiting == 0


def test_a_client_moves_only_when_it_answers_there_with_its_session() -> None:
    desk = Desk()
    bob = desk.register("bob", home(2))
    desk.say(home(3), ping(bob))
    (_, guess), (_, probe) = maps_of(desk.sent[-1][0])
    assert desk.registry.sessions.by_nick["bob"].address == home(2)
    for source, answer in ((home(3), {"nick": "bob"}), (home(3), {"nick": "bob", "session": NOBODYS}),
                           (home(4), {"nick": "bob", "session": bob}), (home(3), {"nick": "eve", "session": bob})):
        desk.say(source, encode("alive", {"id": probe["id"], **answer}))
        assert desk.registry.sessions.by_nick["bob"].address == home(2)
    desk.say(home(3), encode("alive", {"id": probe["id"], "nick": "bob", "session": bob}))
    assert desk.registry.sessions.by_nick["bob"].address == home(3)


# --- amplification --------------------------------------------------------------------------------------------

def balance_of(desk: Desk, unproven: Callable[[Address], bool]) -> Callable[[bytes, Address], None]:
    """Return a way to send to the desk that fails as soon as an unproven address has got more bytes than it sent."""
    account: Counter[Address] = Counter()
    sent = desk.send

    def give(datagram: bytes, address: Address) -> None:
        account[address] -= len(datagram)
        assert account[address] >= 0 or not unproven(address), f"{-account[address]} bytes too many to {address}"
        sent(datagram, address)

    def take(datagram: bytes, address: Address) -> None:
        account[address] += len(datagram)
        desk.server.receive(datagram, address)

    desk.send = give
    return take


SESSIONS = ("alice", "bob", "closed", "replaced", "evicted", "nobody's", "eve", "mallory")


@functools.cache
def _sessions() -> tuple[dict[str, bytes], bytes]:
    """Return the sessions that ``crowded`` has, and a cookie for another address: the same each time."""
    return crowded()[1:]


def crowded() -> tuple[Desk, dict[str, bytes], bytes]:
    """Return a desk at which there is a session of each kind."""
    desk = Desk(max_clients=6)
    sessions = {"closed": desk.register("alice", home(1))}
    desk.say(home(1), encode("dereg", {"session": sessions["closed"]}))
    sessions["alice"] = desk.register("alice", home(1))
    sessions["replaced"] = desk.register("bob", home(2))
    sessions["bob"] = desk.register("bob", home(2))
    sessions["evicted"] = desk.register("carol", home(3))
    desk.registry.went_offline(desk.registry.sessions.by_nick["carol"], EPOCH)
    for number in range(2):
        desk.register(f"dave{number}", home(4 + number))
    sessions["eve"], sessions["mallory"] = desk.register("eve", home(8)), desk.register("mallory", home(9))
    assert sessions["evicted"] in desk.registry.sessions.ended
    sessions["nobody's"] = NOBODYS
    return desk, sessions, desk.cookie(home(3))


def requests() -> st.SearchStrategy[bytes]:
    """Return a strategy for maps that anybody could send, valid or nearly so, with sessions of every kind."""
    ids = st.sampled_from([0, 5, 2 ** 31, 2 ** 63 - 1])
    session = st.sampled_from(SESSIONS).map(lambda name: _sessions()[0][name])
    nick = st.sampled_from(["alice", "bob", "dave0", "eve", "x", "n" * 32])
    cookie = st.sampled_from([NOBODYS, b"c" * 16]) | st.just(None).map(lambda _: _sessions()[1])
    maps = st.one_of(
        st.tuples(st.just("reg"), st.fixed_dictionaries({"id": ids, "nick": nick}, optional={
            "cookie": cookie, "token": st.just(b"t" * 32)})),
        st.tuples(st.just("dereg"), st.fixed_dictionaries({"session": session})),
        st.tuples(st.just("ping"), st.fixed_dictionaries({"id": ids, "session": session, "version": ids})),
        st.tuples(st.just("sync"), st.fixed_dictionaries({"session": session, "version": ids})),
        st.tuples(st.just("save"), st.fixed_dictionaries({
            "session": session, "to": nick, "stream": ids, "n": st.sampled_from([1, 2]), "base": st.just(1),
            "text": st.just([""]), "at": st.just([0.0]), "relay": st.booleans()})),
        st.tuples(st.just("ack"), st.fixed_dictionaries({"stream": ids, "next": st.just(1), "have": st.just([]),
                                                         "room": ids})),
        st.tuples(st.just("alive"), st.fixed_dictionaries({"id": ids, "nick": nick}, optional={"session": session})),
        st.tuples(st.sampled_from(sorted(protocol.SCHEMA)), st.dictionaries(
            st.sampled_from(["id", "session", "nick", "version", "stream", "to"]), ids | nick | session, max_size=4)))
    sizes = st.sampled_from([0, 0, 0, 128, 184, 1200])
    whole = st.tuples(maps, sizes).map(lambda made: padded(made[0][0], made[0][1], made[1]))
    return whole | whole.map(lambda data: data[:-1]) | st.binary(max_size=40)


@given(st.lists(st.tuples(st.lists(requests(), min_size=1, max_size=20), st.integers(0, 3)), min_size=1, max_size=5))
def test_the_server_never_sends_more_to_an_unproven_address_than_came_from_there(
        datagrams: list[tuple[list[bytes], int]]) -> None:
    desk, _, _ = crowded()
    take = balance_of(desk, lambda address: address[0] != HOME)
    for maps, source in datagrams:
        take(b"".join(maps), stranger(source))
        if source % 2:
            desk.wait(0.2)
    desk.wait(2)


@pytest.mark.parametrize("request_", [
    encode("reg", {"id": 0, "nick": "x"}), encode("dereg", {"session": NOBODYS}),
    encode("ping", {"id": 0, "session": NOBODYS, "version": 0}), encode("sync", {"session": NOBODYS, "version": 0})],
    ids=["reg", "dereg", "ping", "sync"])
def test_many_small_requests_in_one_datagram_are_not_each_answered_for_the_whole_of_it(request_: bytes) -> None:
    desk = Desk()
    take = balance_of(desk, lambda address: True)
    for repeated in range(1, 40):
        take(request_ * repeated, STRANGER)
        desk.turn()


def test_many_sessions_that_speak_from_an_unproven_address_are_asked_there_for_no_more_bytes_than_came() -> None:
    desk = Desk()
    sessions = [desk.register(f"eve{number}", home(number)) for number in range(40)]
    take = balance_of(desk, lambda address: address[0] != HOME)
    take(b"".join(encode("dereg", {"session": session}) for session in sessions), STRANGER)
    desk.wait(2)
    take(b"".join(encode("sync", {"session": session, "version": 0}) for session in sessions), STRANGER)
    desk.wait(2)
    take(padded("sync", {"session": sessions[0], "version": 0}, protocol.SESSION_SIZE), STRANGER)
    assert len(desk.turn()) == 1, "one who did move is asked"


def register(client: Client, sent: list[tuple[bytes, Address]]) -> None:
    """Start a client and give it a session; forget what it sent for that."""
    client.start()
    info = maps_of(sent[-1][0])[0][1]
    client.receive(encode("welcome", {"id": info["id"], "nick": client.nick, "boot": 1, "session": b"s" * 16,
                                      "version": 1}), SERVER)
    assert client.link.has_joined
    sent.clear()


@given(st.lists(st.tuples(st.sampled_from(["a", "n" * 32]), st.sampled_from([1, 2 ** 31, 2 ** 62]),
                          st.sampled_from([1, 300, 2 ** 40]), st.integers(1, 3)), min_size=1, max_size=30))
def test_a_client_never_says_more_bytes_that_it_is_somebody_else_than_it_was_told(
        maps: list[tuple[str, int, int, int]]) -> None:
    loop, sent = DeskLoop(), []
    client = Client(loop, lambda *datagram: sent.append(datagram), Display(Output(len)), "bob",
                    Endpoint(loop, [SERVER]))
    register(client, sent)
    datagram = b"".join(encode("chat", {"from": "x", "to": to, "stream": stream, "n": n, "base": 1,
                                        "text": [""] * texts}) for to, stream, n, texts in maps)
    client.receive(datagram, STRANGER)
    client.settle()
    assert {address for _, address in sent} <= {STRANGER}
    assert sum(len(answer) for answer, _ in sent) <= len(datagram)


def test_who_asks_for_somebody_else_is_told_so() -> None:
    loop, sent = DeskLoop(), []
    client = Client(loop, lambda *datagram: sent.append(datagram), Display(Output(len)), "bob",
                    Endpoint(loop, [SERVER]))
    register(client, sent)
    client.receive(chat("alice", "carol", "for carol"), STRANGER)
    assert [(maps_of(datagram)[0][0], address) for datagram, address in sent] == [("nack", STRANGER)]


def test_a_cookie_is_good_for_one_address_for_a_short_time_at_one_server() -> None:
    desk, other = Desk(), Desk()
    other.server.gate.cookies.secret = b"another".ljust(32)
    good = desk.cookie(EVE)
    for cookie, source in ((good, STRANGER), (good, (EVE[0], EVE[1] + 1)), (good, ("10.66.6.7", EVE[1])),
                           (other.cookie(EVE), EVE), (bytes(16), EVE), (NOBODYS, EVE), (good[::-1], EVE)):
        (tag, fresh), = desk.say(source, padded("reg", {"id": 2, "nick": "eve", "cookie": cookie}, 128))
        assert tag == "cookie" and fresh["cookie"] != cookie and not desk.registry.sessions
    desk.wait(2 * COOKIE_TIME)
    (tag, fresh), = desk.say(EVE, padded("reg", {"id": 2, "nick": "eve", "cookie": good}, 128))
    assert tag == "cookie" and fresh["cookie"] != good, "a stale one gets a new one"
    good = bytes(fresh["cookie"])
    desk.wait(COOKIE_TIME - 1)
    assert desk.say(EVE, padded("reg", {"id": 2, "nick": "eve", "cookie": good}, 128))[0][0] == "welcome"


def test_two_servers_make_different_cookies() -> None:
    servers = [Server(SelectorLoop(), lambda datagram, address: None, Registry(Mailbox(":memory:", b"i" * 16)))
               for _ in range(5)]
    secrets_ = {server.gate.cookies.secret for server in servers}
    assert len(secrets_) == 5 and all(len(secret) == 32 for secret in secrets_)


def test_a_request_for_a_cookie_that_is_shorter_than_the_answer_may_be_is_not_answered() -> None:
    desk = Desk()
    assert desk.say(STRANGER, padded("reg", {"id": 1, "nick": "x"}, protocol.REG_SIZE - 1)) == []
    assert desk.say(STRANGER, padded("reg", {"id": 1, "nick": "x"}, protocol.REG_SIZE))[0][0] == "cookie"


# --- exhaustion: the server -----------------------------------------------------------------------------------

def test_a_change_of_the_table_is_told_soon_however_long_it_took_to_tell_the_last() -> None:
    desk = Desk()
    desk.register("alice", home(1))
    desk.wait(1)

    def slowly(datagram: bytes, address: Address) -> None:
        desk.loop.time += 5.0 * any(tag == "table" for tag, _ in maps_of(datagram))
        desk.sent.append((datagram, address))
    desk.send = slowly
    desk.register("bob", home(2))
    desk.wait(1)
    before = len(desk.sent)
    desk.register("carol", home(3))
    desk.wait(BROADCAST_WAIT + 0.1)
    told = [info for datagram, to in desk.sent[before:] if to == home(1) for tag, info in maps_of(datagram)
            if tag == "table"]
    assert [row[0] for info in told for row in info["set"]] == ["carol"]


def noise(random: Random, sessions: list[bytes]) -> bytes:
    """Return one datagram of a flood."""
    session = random.choice(sessions + [random.getrandbits(128).to_bytes(16, "big")])
    number = random.getrandbits(63)
    return random.choice((
        lambda: padded("reg", {"id": number, "nick": f"nick{number}"}, 128),
        lambda: padded("reg", {"id": number, "nick": "alice", "cookie": NOBODYS}, 128),
        lambda: ping(session, 0), lambda: save(session, "alice", number, n=random.choice((1, 50))),
        lambda: padded("sync", {"session": session, "version": 0}, 184),
        lambda: padded("dereg", {"session": session}, 184) if session not in sessions else b"",
        lambda: random.getrandbits(800).to_bytes(100, "big")))()


def test_floods_from_forged_addresses_fill_nothing_and_honest_clients_are_served_in_the_same_turn() -> None:
    desk, random, most = Desk(stranger_replies=200), Random(3), 200
    alice, bob = desk.register("alice", home(1)), desk.register("bob", home(2))
    eve = [desk.register(f"eve{number}", (EVE[0], number + 1)) for number in range(5)]
    desk.say(home(1), encode("dereg", {"session": alice}))
    desk.wait(1)
    before = len(desk.sent)
    for turn in range(150):
        for _ in range(DATAGRAMS_PER_TURN - 2):
            desk.server.receive(noise(random, eve), stranger(random.randrange(60000)))
        answers = desk.say(home(2), ping(bob, id_=turn + 100), save(bob, "alice", 77, n=turn + 1))
        assert [info["id"] for tag, info in answers if tag == "pong"] == [turn + 100]
        assert [info["next"] for tag, info in answers if tag == "ack"] == [turn + 2], "kept at once"
        kept = desk.kept()
        assert kept["probes"] <= most and kept["timers"] <= 2 * most + 100
        assert kept["saves"] <= 1 and kept["early"] == 0 and kept["sessions"] == 6 and kept["known"] == 7
        desk.wait(0.02)
    answered = sum(to[0] != HOME for _, to in desk.sent[before:])
    assert most <= answered <= 5 * most, "in three or four seconds"
    desk.wait(3)
    assert desk.kept()["probes"] == 0 and desk.kept()["timers"] < 100


@pytest.mark.parametrize("kind", ["reg", "ping", "move"])
def test_strangers_get_no_more_answers_a_second_than_allowed(kind: str) -> None:
    desk = Desk(stranger_replies=50)
    desk.loop.time = 2000.0
    eve = desk.register("eve", home(1))
    desk.wait(1)
    request = {"reg": padded("reg", {"id": 1, "nick": "x"}, 128), "ping": ping(NOBODYS), "move": ping(eve)}[kind]
    for second in range(3):
        before = len(desk.sent)
        for turn in range(4):
            for number in range(100):
                desk.server.receive(request, stranger(1000 * second + 100 * turn + number))
            desk.wait(0.2)
        assert len(desk.sent) - before == 50
        desk.wait(0.2)


def test_the_option_says_how_many_answers_strangers_get(tmp_path: Path) -> None:
    with Chat(tmp_path) as chat_, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        chat_.server("--stranger-replies", "3")
        sock.settimeout(0.3)
        for _ in range(60):
            sock.sendto(ping(NOBODYS), ("127.0.0.1", chat_.port))
        answers = 0
        try:
            while sock.recv(65535):
                answers += 1
        except socket.timeout:
            pass
        assert 3 <= answers <= 9, "in one, two or three seconds"


def test_one_source_that_registers_without_end_fills_nothing_beyond_the_limits(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_ENDED", 30)
    desk = Desk(max_clients=20, max_known=40)
    bob = desk.register("bob", home(2))
    desk.register("alice", home(1))
    for number in range(200):
        desk.register(f"eve{number}", EVE if number % 2 else (EVE[0], number + 1))
        if number % 3 == 0:
            desk.registry.went_offline(desk.registry.sessions.by_nick[f"eve{number}"], EPOCH)
        elif len(desk.registry.sessions.live) > 15:
            session = next(iter(desk.registry.sessions.by_nick.values()))
            last = list(desk.registry.sessions.by_nick.values())[-1]
            desk.say(last.address, encode("dereg", {"session": last.id}))
            assert session.nick == "bob"
        kept = desk.kept()
        assert kept["sessions"] <= 20 and kept["known"] <= 40 and kept["closed"] <= 30 and kept["spent"] <= 30
        assert desk.say(home(2), ping(bob))[0][0] == "pong"
        desk.wait(0.1)
    assert kept["closed"] == 30 and kept["known"] == 40


def test_a_client_whose_session_ended_so_long_ago_that_nobody_remembers_it_is_made_to_register_again(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_ENDED", 1)
    desk = Desk()
    asleep = desk.register("alice", home(1))
    desk.registry.went_offline(desk.registry.sessions.by_nick["alice"], EPOCH)
    desk.register("alice", home(2))
    assert [tag for tag, _ in desk.say(home(1), ping(asleep))] == ["refused"]
    for number in (3, 4):
        desk.say(home(number), encode("dereg", {"session": desk.register(f"eve{number}", home(number))}))
    (tag, info), = desk.say(home(1), ping(asleep))
    assert (tag, info["id"], info["boot"]) == ("pong", 5, 0), "with the boot of its welcome it would think all is well"


def test_a_late_copy_of_a_ping_of_somebody_who_has_left_makes_nobody_register() -> None:
    desk = Desk()
    session = desk.register("alice", home(1))
    desk.say(home(1), encode("dereg", {"session": session}))
    (tag, info), = desk.say(home(1), ping(session))
    assert (tag, info["boot"]) == ("pong", desk.server.boot)


def test_numbers_that_nobody_completes_hold_up_no_other_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.MAX_SAVED_EARLY", 2000)
    desk = Desk()
    alice, bob, eve = (desk.register(nick, home(n)) for n, nick in enumerate(("alice", "bob", "eve")))
    desk.say(home(0), encode("dereg", {"session": alice}))
    for stream in range(1, 31):
        desk.say(home(2), save(eve, "alice", stream, n=2, texts=100, text=""))
    assert desk.kept()["early"] == 2000, "the longest silent streams have given way"
    for first in range(1, 1001, 100):
        answers = desk.say(home(1), *(save(bob, "alice", 77, n=n, texts=10) for n in range(first, first + 100, 10)))
        assert [info["next"] for tag, info in answers if tag == "ack"] == [first + 100], "ten datagrams in one turn"
    answers = desk.say(home(2), save(eve, "alice", 30))
    assert [info["next"] for tag, info in answers if tag == "ack"] == [102], "what came last is still there"


def test_saves_without_end_fill_nothing_beyond_the_limits_and_others_are_kept_at_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.MAX_SAVE_STREAMS", 50)
    monkeypatch.setattr("server.MAX_SAVED_EARLY", 2000)
    desk = Desk()
    alice, bob, eve = (desk.register(nick, home(n)) for n, nick in enumerate(("alice", "bob", "eve")))
    desk.say(home(0), encode("dereg", {"session": alice}))
    for turn in range(60):
        for number in range(40):        # early ones whose first never comes: in old streams, then in ever new ones
            stream = 1000 + (number if turn < 30 else turn * 40 + number)
            desk.server.receive(save(eve, "alice", stream, n=2 + 100 * (turn % 30), texts=100, text=""), home(2))
        answers = desk.say(home(1), save(bob, "alice", 77, n=turn + 1))
        assert [info["next"] for tag, info in answers if tag == "ack"] == [turn + 2]
        assert desk.kept()["saves"] <= 50 and desk.kept()["early"] <= 2000 + 40 * 100
        held = sum(save_.stream.buffered for save_ in desk.server.keeper.streams.values())
        assert held == desk.kept()["early"], "the account is true"
    assert desk.registry.mailbox.known["alice"].messages == 60


def test_saves_for_somebody_online_that_wait_for_the_probe_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.MAX_SAVE_STREAMS", 50)
    desk = Desk()
    desk.register("alice", home(1))
    eve = desk.register("eve", EVE)
    for turn in range(4):
        for number in range(200):
            desk.server.receive(save(eve, "alice", 1000 * turn + number), EVE)
        assert len(desk.server.keeper.to_answer) <= 50
        desk.turn()
        assert 0 < desk.kept()["waiting"] <= 50
    desk.wait(1)
    assert desk.kept()["waiting"] == 0


def test_what_a_turn_sends_is_bounded_however_many_snapshots_are_asked_for() -> None:
    desk = Desk()
    for number in range(3000):
        desk.registry.table.set(f"somebody{number}", HOME, number, IS_OFFLINE)
    bob, eve = desk.register("bob", home(1)), [desk.register(f"eve{number}", EVE) for number in range(300)]
    desk.wait(10)
    desk.wait(1)    # after which the rush is over
    asks = [padded("sync", {"session": session, "version": 0}, 100) for session in eve]
    desk.server.receive(padded("sync", {"session": bob, "version": 0}, 184), home(1))
    before = len(desk.sent)
    for _ in range(20):
        for start in range(0, 300, 50):
            desk.server.receive(b"".join(asks[start:start + 50]), EVE)
            desk.server.receive(asks[0] * 50, EVE)
    desk.turn()
    peak = len(desk.sent) - before
    assert peak <= (DATAGRAMS_PER_TURN + 1) * SYNC_PAGES + 1000
    assert sum(to == home(1) for _, to in desk.sent[before:]) >= SYNC_PAGES, "who asked is answered in this turn"
    desk.wait(1)
    before = len(desk.sent)
    desk.wait(0.3)
    assert len(desk.sent) - before < 10, "and what was asked for ends"


def test_who_answers_probes_is_not_remembered_for_ever() -> None:
    desk = Desk(max_clients=30)
    eve = desk.register("eve", EVE)
    for number in range(100):
        nick = f"bob{number}"
        session = desk.register(nick, home(number))
        desk.say(EVE, save(eve, nick, 1000 + number))
        probe = next(info for datagram, _ in reversed(desk.sent) for tag, info in maps_of(datagram) if tag == "probe")
        desk.say(home(number), encode("alive", {"id": probe["id"], "nick": nick, "session": session}))
        desk.say(home(number), encode("dereg", {"session": session}))
        desk.wait(0.6)
        assert desk.kept()["alive"] <= 30
    assert desk.kept()["probes"] == 0


def test_mail_in_memory_is_bounded_though_nobody_acks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAIL_AHEAD", 64), ("MAIL_TOTAL", 200), ("MAIL_STEP", 4)):
        monkeypatch.setattr("server." + name, value)
    desk = Desk()
    bob = desk.register("bob", home(0))
    for number in range(1, 21):
        session = desk.register(f"eve{number}", home(number))
        desk.say(home(number), encode("dereg", {"session": session}))
        desk.say(home(0), save(bob, f"eve{number}", number, texts=100))
        desk.register(f"eve{number}", home(number))
    desk.wait(1)
    held = [mail.stream.pending for mail in desk.server.postman.streams.values()]
    assert len(held) == 20 and sum(held) == desk.kept()["mail"] <= 200 + 64 + 20 * 4


def test_long_strings_of_strangers_are_not_remembered() -> None:
    decoder, before = Decoder(), tracemalloc_kept()
    for number in range(500):
        long = f"{number}" * 8000
        for tag, info in (("reg", {"id": 1, "nick": long}), ("chat", {"from": long, "to": long}),
                          ("table", {"since": 0, "version": 1, "set": [["a", long, 1, "online"]]})):
            decoder.decode(encode(tag, info))
    assert tracemalloc_kept() - before < 2 ** 20
    tracemalloc.stop()


def tracemalloc_kept() -> int:
    """Return the bytes that are in use."""
    tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_ten_thousand_clients_behind_one_host_can_register() -> None:
    desk = Desk()
    welcomed: set[Address] = set()
    cookies: dict[Address, bytes] = {}
    addresses = [(HOME, 1024 + number) for number in range(10_000)]
    for begin in range(0, len(addresses), DATAGRAMS_PER_TURN):
        for address in addresses[begin:begin + DATAGRAMS_PER_TURN]:
            desk.server.receive(padded("reg", {"id": address[1], "nick": f"n{address[1]}"}, 128), address)
        for datagram, to in desk.turn():
            for tag, info in maps_of(datagram) if len(datagram) < 200 else ():
                if tag == "cookie":
                    cookies[to] = info["cookie"]
        for address in addresses[begin:begin + DATAGRAMS_PER_TURN]:
            desk.server.receive(padded("reg", {"id": address[1], "nick": f"n{address[1]}",
                                               "cookie": cookies[address]}, 128), address)
        welcomed.update(to for datagram, to in desk.turn() if b"welcome" in datagram)
        desk.loop.time += 0.0005
        desk.sent.clear()
    assert welcomed == set(addresses) and len(desk.registry.sessions.live) == 10_000


# --- exhaustion: a client -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sender", ["alice", "bob", "mallory"])
def test_a_flood_of_chat_from_unknown_sources_makes_a_client_ask_for_its_table_and_keep_nothing(sender: str) -> None:
    world, (alice, bob) = start("alice", "bob")
    tap, lines, seconds = Tap(world), len(bob.lines), 5
    for number in range(2000):
        datagram = chat(sender, "bob", "forged", stream=number, n=1 + number % 7)
        world.call_at(world.now + number / 400, functools.partial(forge, world, stranger(number), datagram, bob))
    alice.type("send bob hello")
    world.run(seconds)
    assert bob.lines[lines:] == ["alice: hello"]
    assert tap.of("bob")["sync"] <= seconds / SYNC_INTERVAL + 2 and tap.of("bob").get("nack", 0) == 0
    assert [len(streams) for streams in bob.client.inbox.streams.values()] == [1] and bob.client.inbox.buffered == 0


def crowd(inbox: Inbox, senders: int, streams: int, datagrams: int, early: bool, texts: int = 20) -> Iterator[int]:
    """Send chat of that many peers in turn, of which nothing is shown; yield each time how much is buffered."""
    for datagram in range(datagrams):
        for sender in range(senders):
            for stream in range(streams):
                inbox.on_chat(1.0, {"from": f"eve{sender}", "to": "bob", "stream": stream, "base": 1,
                                    "n": 1 + early + datagram * texts, "text": ["x" * 700] * texts}, EVE)
                yield inbox.buffered


def test_the_end_of_stdin_is_not_put_off_by_what_the_last_command_wrote_to_stderr(
        monkeypatch: pytest.MonkeyPatch) -> None:
    _, (alice, _) = start("alice", "bob")
    client = alice.client
    monkeypatch.setattr(client.display.errors, "_put", len)
    monkeypatch.setattr(Outbox, "room", lambda self, now, nick: 0)
    monkeypatch.setattr(Outbox, "is_stuck", lambda self, now, nick: True)
    client.shell.feed(b"send bob " + b"x" * OUTPUT_LIMIT)
    client.shell.feed(b"")
    client.settle()
    due = alice.loop.timers.next_time()
    assert due <= alice.loop.now(), "nothing else would bring another turn: stderr has taken all"
    client.settle()
    assert client.leaving.ending


@pytest.mark.parametrize("early", [False, True])
def test_what_waits_to_be_shown_is_bounded_however_many_send(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.INBOX_LIMIT", 1000 * PIECE_MEMORY)
    inbox = Inbox()
    assert max(crowd(inbox, 10, 8, 40, early)) <= 1000
    held = sum(incoming.stream.buffered for streams in inbox.streams.values() for incoming in streams.values())
    assert 500 <= held == inbox.buffered


@pytest.mark.parametrize("early", [False, True])
def test_pieces_of_texts_that_are_never_whole_do_not_pile_up(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.INBOX_LIMIT", 300 * PIECE_MEMORY)
    inbox = Inbox()
    for sender in range(100):
        inbox.on_chat(1.0, {"from": f"eve{sender}", "to": "bob", "stream": 1, "base": 1, "n": 1 + early,
                            "text": ["x" * 700] * 20, "more": list(range(1 + early, 21 + early))}, EVE)
        assert inbox.buffered <= 300


def test_a_crowd_that_fills_the_memory_does_not_hold_up_who_sends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.INBOX_LIMIT", 1000 * PIECE_MEMORY)
    inbox, shown = Inbox(), []
    for number, _ in enumerate(crowd(inbox, 10, 8, 40, early=True)):
        if number % 10 == 0:
            inbox.on_chat(1.0, {"from": "alice", "to": "bob", "stream": 1, "base": 1, "n": 1 + number // 10,
                                "text": [str(number // 10)]}, home(1))
            for delivery in inbox.take(1.0, lambda: True):
                shown += delivery.texts
                delivery.written(len(delivery.texts))
    assert shown == [str(number) for number in range(320)]


def test_streams_that_only_skip_numbers_do_not_pile_up_while_the_reader_pauses(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.CHUNK_LIMIT", 30)
    world, (bob, mallory) = start("bob", "mallory")
    bob.screen.set_rate(0)
    bob.screen.filled = bob.screen.size
    mallory.type("send bob hi")
    for stream in range(1, 401):
        datagram = encode("chat", {"from": "mallory", "to": "bob", "stream": stream, "n": 9, "base": 5, "text": ["x"]})
        world.network.send(mallory, datagram, bob.address)
        world.run(0.1)
        assert len(bob.client.display.output._chunks) <= 50 and bob.client.inbox.stream_count <= 50
        assert len(bob.client.inbox.holding) <= 50


def test_a_server_that_answers_from_another_address_is_heard_also_after_it_was_silent() -> None:
    loop, sent = DeskLoop(), []
    given, found = ("192.0.2.1", 4119), ("192.0.2.2", 4119)
    alice = Client(loop, lambda *datagram: sent.append(datagram), Display(Output(len)), "alice",
                   Endpoint(loop, [given]))

    def last(tag: str) -> tuple[Info, Address]:
        return next((info, to) for datagram, to in reversed(sent) for name, info in maps_of(datagram) if name == tag)

    def wait(seconds: float) -> None:
        end = loop.time + seconds
        while loop.time < end:
            loop.time += 0.05
            loop.timers.run(loop.time)
            alice.settle()
    alice.start()
    alice.receive(encode("cookie", {"id": last("reg")[0]["id"], "server": b"s" * 16, "cookie": b"c" * 16}), found)
    info, to = last("reg")
    assert to == found and info["cookie"] == b"c" * 16
    alice.receive(encode("welcome", {"id": info["id"], "nick": "alice", "boot": 1, "session": b"x" * 16,
                                     "version": 1}), found)
    table = protocol.table_map(0, 1, [["alice", "192.0.2.9", 9, "online"]])
    alice.receive(addressed(b"x" * 16, table), found)
    wait(PING_INTERVAL * 1.5 + 6)
    assert alice.link.is_silent and {to for _, to in sent[-12:]} == {given, found}, "it is looked for at both"
    for address in (given, found):
        alice.link.announce_silence()
        alice.receive(addressed(b"x" * 16), address)
        wait(0.1)
        assert not alice.link.is_silent, "and heard from both"


def test_only_the_server_whose_cookie_comes_first_gets_the_proof_of_a_nick() -> None:
    loop, sent = DeskLoop(), []
    proof: Callable[[bytes, str], bytes] = lambda server, nick: server + server
    alice = Client(loop, lambda *datagram: sent.append(datagram), Display(Output(len)), "alice",
                   Endpoint(loop, [SERVER, EVE, STRANGER]), Handshake(lambda *datagram: sent.append(datagram), proof))
    alice.start()
    while len(sent) < 4:
        loop.time += 0.05
        loop.timers.run(loop.time)
    assert [to for _, to in sent] == [SERVER, SERVER, EVE, STRANGER]
    id_ = maps_of(sent[0][0])[0][1]["id"]
    del sent[:]
    for address in (EVE, SERVER, STRANGER, EVE):
        alice.receive(encode("cookie", {"id": id_, "server": bytes([address[1] % 256]) * 16, "cookie": b"c" * 16}),
                      address)
    loop.time += 1.3
    loop.timers.run(loop.time)
    assert len(sent) == 2 and {to for _, to in sent} == {EVE}
    welcome = {"id": id_, "nick": "alice", "boot": 1, "session": b"s" * 16, "version": 1}
    alice.receive(encode("welcome", {**welcome, "id": id_ + 1}), STRANGER)
    assert not alice.link.has_joined
    alice.receive(encode("welcome", welcome), EVE)
    assert alice.link.has_joined and alice.link.endpoint.current == alice.link.endpoint.other == EVE


def test_a_server_that_takes_back_the_nick_that_it_gave_ends_a_client_in_order() -> None:
    loop, sent = DeskLoop(), []
    send: Callable[[bytes, Address], None] = lambda *datagram: sent.append(datagram)
    alice = Client(loop, send, Display(Output(len)), "alice", Endpoint(loop, [SERVER]), Handshake(send))
    alice.start()
    id_ = maps_of(sent[0][0])[0][1]["id"]
    refused = {"session": b"x" * 16, "nick": "alice", "reason": "owned", "spelling": "Alice"}
    for tag, info in (("cookie", {"id": id_, "server": b"s" * 16, "cookie": b"c" * 16}),
                      ("welcome", {"id": id_, "nick": "alice", "boot": 0, "session": b"x" * 16, "version": 1}),
                      ("refused", refused)):
        assert protocol.is_valid(tag, info)
        alice.receive(encode(tag, info), SERVER)
    alice.settle()
    assert alice.leaving.exit_code == 1


@pytest.mark.parametrize("is_welcome", [True, False])
def test_a_server_that_ends_each_session_at_once_is_asked_twice_a_second(is_welcome: bool) -> None:
    loop, sent = DeskLoop(), []
    send: Callable[[bytes, Address], None] = lambda *datagram: sent.append(datagram)
    alice = Client(loop, send, Display(Output(len)), "alice", Endpoint(loop, [SERVER]), Handshake(send))
    alice.start()
    asked = 0
    for _ in range(100):
        heard, sent[:] = sent[:], []
        for datagram, _ in heard:
            for tag, info in maps_of(datagram):
                asked += tag == "reg"
                if tag == "reg" and is_welcome:
                    alice.receive(encode("welcome", {"id": info["id"], "nick": "alice", "boot": 0,
                                                     "session": b"x" * 16, "version": 1}), SERVER)
                    alice.receive(encode("refused", {"session": b"x" * 16, "nick": "alice", "reason": "replaced"}),
                                  SERVER)
                elif tag == "reg":
                    alice.receive(encode("refused", {"id": info["id"], "nick": "alice", "reason": "replaced"}), SERVER)
        loop.timers.run(loop.time)
        loop.time += 0.1
    assert 10 <= asked <= 21


def test_what_gave_way_to_others_comes_again_and_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.INBOX_LIMIT", 40 * PIECE_MEMORY)
    world, lives = start("alice", "bob", "carol", "dave")
    bob = lives[1]
    bob.screen.set_rate(0)
    for life in (lives[0], lives[2], lives[3]):
        for number in range(200):
            life.type(f"send bob {life.nick}-{number} " + "x" * 600)
    world.run(5)
    assert bob.client.inbox.buffered <= 40
    bob.screen.set_rate(float("inf"))
    world.run(60)
    assert all(message.closing == "received" for life in lives for message in life.typed)


def test_few_streams_of_each_sender_and_of_all_together_go_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.STREAMS_IN_ALL", 40)
    inbox = Inbox()
    for _ in crowd(inbox, 1, 50, 1, early=True):
        assert len(inbox.streams["eve0"]) <= STREAMS_PER_SENDER
    for _ in crowd(inbox, 60, 2, 1, early=False):
        assert sum(map(len, inbox.streams.values())) == inbox.stream_count <= 40
        for delivery in inbox.take(1.0, lambda: True):
            delivery.written(len(delivery.texts))
    assert list(inbox.streams) == [f"eve{number}" for number in range(40, 60)], "those last heard"
    assert len(inbox.acks()) == 40 and inbox.buffered == 0
    for _ in crowd(inbox, 60, 2, 1, early=False):
        assert not list(inbox.take(1.0, lambda: True)), "what gave way is not shown again"


def gaps(inbox: Inbox, sender: str, streams: int, many: int) -> None:
    """Send mail of that many streams, with gaps in each that chat may still fill."""
    for stream in range(streams):
        letters_ = [[sender, stream, number, 1e9, ["x"], []] for number in range(2, 2 + 2 * many, 2)]
        inbox.on_mail(1.0, {"to": "bob", "stream": 7, "n": 1 + stream * many, "base": 1 + stream * many,
                            "items": letters_})
        for delivery in inbox.take(1.0, lambda: True):
            delivery.written(len(delivery.texts))


def test_the_duplicate_filter_is_bounded_and_who_fills_most_of_it_loses_his_own(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.DUPLICATE_FILTER_LIMIT", 500)
    inbox = Inbox()
    for number in range(30):
        inbox.on_chat(1.0, {"from": "alice", "to": "bob", "stream": number, "base": 1, "n": 1, "text": ["once"]}, EVE)
        for delivery in inbox.take(1.0, lambda: True):
            delivery.written(1)
    gaps(inbox, "mallory", 200, 40)
    duplicates = inbox.duplicates
    assert duplicates.size <= 500 and duplicates.size == sum(
        1 + len(snapshot.claimed) + len(snapshot.given_up)
        for streams in duplicates.snapshots.values() for snapshot in streams.values())
    assert len(duplicates.snapshots["alice"]) == 30 - STREAMS_PER_SENDER and len(duplicates.snapshots["mallory"]) < 100
    for number in range(30):
        inbox.on_chat(1.0, {"from": "alice", "to": "bob", "stream": number, "base": 1, "n": 1, "text": ["once"]}, EVE)
        assert not list(inbox.take(1.0, lambda: True))


def letter(stream: int, text: str, number: int = 1) -> list[Any]:
    return ["alice", stream, number, 1e9, [text], []]


def texts_of(inbox: Inbox, mail: int, *letters: list[Any], first: int = 1, base: int = 1) -> list[str]:
    """Return what is shown, and written, of a mail."""
    inbox.on_mail(1.0, {"to": "bob", "stream": mail, "n": first, "base": base, "items": list(letters)})
    shown: list[str] = []
    for delivery in inbox.take(1.0, lambda: True):
        shown += delivery.texts
        delivery.written(len(delivery.texts))
    return shown


def test_mail_of_more_streams_than_a_sender_has_room_for_is_shown_once_however_often_it_comes() -> None:
    inbox = Inbox()
    letters = [letter(stream, str(stream)) for stream in range(1, 101)]
    assert texts_of(inbox, 7, *letters) == [str(stream) for stream in range(1, 101)]
    assert len(inbox.streams["alice"]) <= STREAMS_PER_SENDER
    assert texts_of(inbox, 8, *letters) == []
    assert inbox.acks()[-1][0]["next"] == 101
    assert texts_of(inbox, 9, letters[0], letter(1, "more", 2)) == ["more"]


@pytest.mark.parametrize("later", [[], [3002]])
def test_everything_that_the_mail_has_made_ready_is_shown_and_before_its_later_letters(later: list[int]) -> None:
    inbox = Inbox()
    for first in (2, 1002, 2002):
        inbox.on_chat(1.0, {"from": "alice", "to": "bob", "stream": 1, "base": 1, "n": first,
                            "text": [str(first + number) for number in range(1000)]}, home(1))
    shown = texts_of(inbox, 7, letter(1, "1"), *(letter(1, str(number), number) for number in later))
    assert shown == [str(number) for number in [*range(1, 3002), *later]] and not (inbox.holding or inbox.is_ready)


def test_a_crowd_does_not_make_a_client_forget_what_the_mail_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.STREAMS_IN_ALL", 20)
    inbox = Inbox()
    assert texts_of(inbox, 7, letter(1, "once")) == ["once"]
    for _ in crowd(inbox, 60, 2, 1, early=False):
        pass
    assert "alice" not in inbox.streams
    assert "once" not in texts_of(inbox, 8, letter(1, "once"))


def test_streams_whose_texts_wait_to_be_written_are_not_forgotten() -> None:
    inbox = Inbox()
    for _ in crowd(inbox, 1, 30, 1, early=False, texts=1):
        deliveries = list(inbox.take(1.0, lambda: True))
        assert len(deliveries) == 1
    acks = inbox.acks()
    assert len(acks) == 30 and all(ack["next"] == 1 for ack, _, _ in acks)
    for _ in crowd(inbox, 1, 30, 1, early=False, texts=1):
        assert not list(inbox.take(1.0, lambda: True)), "each once"


# --- whose nick it is -----------------------------------------------------------------------------------------

def anonymous(world: World, nick: str) -> Life:
    """Start a client without an identity."""
    return Life(world, nick, world.new_address(), None)


def test_a_nick_is_its_owners_with_the_token_alone_after_restarts_of_everybody() -> None:
    world, (bob,) = start("bob")
    assert world.server is not None
    for restart in range(3):
        others = [world.client("bob", secret=b"other" * 6 + b"xx"), anonymous(world, "bob")]
        world.run(3)
        for other in others:
            assert other.lines == ["[Nickname bob belongs to someone else.]", "[Exiting]"] and other.exit_code == 1
        if restart == 0:
            bob.end_input()
            world.run(2)
        world.server.crash()
        world.server = world.start_server()
    again = world.client("bob")
    world.run(2)
    assert again.lines[0] == WELCOME


def test_an_anonymous_nick_is_taken_while_its_holder_answers_and_free_when_that_is_offline_or_dead() -> None:
    world = World(1)
    world.start_server()
    first = anonymous(world, "bob")
    world.run(2)
    for other in (anonymous(world, "bob"), world.client("bob")):
        world.run(2)
        assert other.lines == ["[Nickname bob is taken.]", "[Exiting]"]
    first.type("dereg bob")
    world.run(1)
    second = anonymous(world, "bob")
    world.run(2)
    assert second.lines[0] == WELCOME
    second.crash()
    third = world.client("bob")
    world.run(2)
    assert third.lines[0] == WELCOME, "and is that one's own now"
    third.end_input()
    world.run(2)
    fourth = anonymous(world, "bob")
    world.run(2)
    assert fourth.lines[0] == "[Nickname bob belongs to someone else.]"


def test_of_two_processes_with_one_identity_the_running_one_keeps_the_nick_and_a_dead_one_is_replaced() -> None:
    world, (first,) = start("bob")
    second = world.client("bob")
    world.run(3)
    assert second.lines == ["[Nickname bob is taken.]", "[Exiting]"] and first.alive
    assert first.client.table_sync.table.is_online("bob")
    first.crash()
    third = world.client("bob")
    world.run(3)
    assert third.lines[0] == WELCOME and third.client.table_sync.table.is_online("bob")


def test_all_who_ask_for_a_nick_while_its_holder_is_probed_are_answered_and_one_gets_it_if_that_is_gone() -> None:
    for is_there in (True, False):
        desk = Desk()
        session = desk.register("bob", home(1), b"b" * 32)
        for number in range(2, 2 + CLAIMS_PER_PROBE + 1):
            assert ("welcome" not in dict(desk.ask_for("bob", home(number), b"b" * 32)))
        probe, = desk.server.prober.probes.values()
        assert len(probe.claims) == CLAIMS_PER_PROBE, "the last one is to ask again"
        before = len(desk.sent)
        if is_there:
            desk.say(home(1), encode("alive", {"id": probe.id, "nick": "bob", "session": session}))
        else:
            desk.wait(PROBE_TIMEOUT + 0.01)
            probe, = desk.server.prober.probes.values()
            assert probe.address == home(2) and len(probe.claims) == CLAIMS_PER_PROBE - 1, "the first one has it now"
            assert probe.session is not None
            desk.say(home(2), encode("alive", {"id": probe.id, "nick": "bob", "session": probe.session.id}))
        answers = {to: info["reason"] for datagram, to in desk.sent[before:] for tag, info in maps_of(datagram)
                   if tag == "refused"}
        assert answers == {home(number): "taken" for number in range(2 if is_there else 3, 2 + CLAIMS_PER_PROBE)}


def test_somebody_who_has_lost_a_nick_before_the_welcome_came_is_told_when_they_ask_again() -> None:
    desk = Desk()
    request = padded("reg", {"id": 7, "nick": "bob", "cookie": desk.cookie(home(1)), "token": b"b" * 32},
                     protocol.REG_SIZE)
    assert [tag for tag, _ in desk.say(home(1), request)] == ["welcome"], "which is lost"
    desk.ask_for("bob", home(2), b"b" * 32)
    desk.wait(PROBE_TIMEOUT + 0.01)
    assert desk.registry.holder("bob") == home(2)
    (tag, info), = desk.say(home(1), request)
    assert (tag, info["id"], info["reason"]) == ("refused", 7, "replaced")
    assert desk.ask_for("bob", home(1), b"b" * 32) == [], "another request is one like any other: the holder is probed"
    assert [probe.address for probe in desk.server.prober.probes.values()] == [home(2)]


def test_a_nick_whose_owner_stays_away_lapses() -> None:
    desk = Desk()
    session = desk.register("bob", home(1), b"b" * 32)
    desk.say(home(1), encode("dereg", {"session": session}))
    desk.wait(89 * DAY)
    assert dict(desk.ask_for("bob", EVE, b"e" * 32))["refused"]["reason"] == "owned"
    desk.wait(2 * DAY)
    assert "welcome" in dict(desk.ask_for("bob", EVE, b"e" * 32))


def test_the_store_holds_a_hash_and_no_token_and_no_server_can_use_the_token_of_another(tmp_path: Path) -> None:
    path, secret = tmp_path / "store.db", bytes(range(100, 132))
    token = token_for(secret, b"i" * 16, "bob")
    store = Registry(Mailbox(str(path), b"i" * 16))
    store.admit(0, b"s" * 16, "bob", EVE, token, 1)
    assert store.mailbox.commit(EPOCH)
    store.mailbox.close()
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert hashlib.sha256(token).digest() in data
    assert not any(kept in data for kept in (secret, token, secret.hex().encode(), token.hex().encode()))
    assert token != token_for(secret, b"j" * 16, "bob") and token != token_for(secret, b"i" * 16, "bot")


def test_a_nick_is_not_forgotten_while_a_server_runs(tmp_path: Path) -> None:
    with Chat(tmp_path) as chat_:
        chat_.server()
        ended = chat_.complete("server", "--forget", "bob", "--store", str(chat_.store))
        assert ended.popen.returncode == 1 and "another server has it open" in ended.errors[0]


def _load_at_once(path: str, gate: Any, found: Any) -> None:
    gate.wait(DEADLINE)
    found.put(load_secret(path))


def test_twenty_first_starts_at_once_agree_on_one_identity_that_is_the_users_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path, gate, found = tmp_path / "state" / "identity", context.Barrier(20), context.Queue()
    starts = [context.Process(target=_load_at_once, args=(str(path), gate, found)) for _ in range(20)]
    for process in starts:
        process.start()
    secrets_ = {found.get(timeout=DEADLINE) for _ in starts}
    for process in starts:
        process.join(DEADLINE)
    assert len(secrets_) == 1 and len(secrets_.pop()) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["identity"], "nothing is left beside it"


def test_what_a_start_that_was_killed_left_behind_does_not_hinder_the_next(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    (tmp_path / f"identity.{os.getpid()}").write_text("")
    assert len(load_secret(str(path))) == 32


@pytest.mark.parametrize("content", [b"", b"\xff\x00" * 50, b"abc", b"12" * 31, b"zz" * 32],
                         ids=["empty", "binary", "short", "too short", "not hex"])
@pytest.mark.parametrize("named", [True, False])
def test_a_broken_identity_is_an_error_and_is_not_replaced(tmp_path: Path, content: bytes, named: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "udpchat" / "identity"
    path.parent.mkdir()
    path.write_bytes(content)
    options = udpchat.parse(["client", "bob", *(["--identity", str(path)] if named else [])])
    with pytest.raises(Usage, match=f"{path}.*is not a udpchat identity"):
        udpchat.secret_of(options)
    assert path.read_bytes() == content


def test_without_a_place_for_an_identity_a_client_warns_and_is_anonymous(tmp_path: Path) -> None:
    with Chat(tmp_path) as chat_:
        chat_.state.write_text("a file where the directory should be")
        bob = chat_.client("bob")
        assert len(bob.errors) == 1 and "anonymous" in bob.errors[0] and "WARNING" in bob.errors[0]
        bob.finish()
        assert chat_.client("bob", "--anonymous").finish() == 0


# --- broken machines ------------------------------------------------------------------------------------------

def test_while_the_disk_is_full_senders_are_told_and_everything_else_goes_on() -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    bob.type("dereg bob")
    world.run(1)
    world.disk.failing = True
    alice.type("send bob one")
    alice.type("send carol chat goes on")
    world.run(2)
    assert alice.lines.count(NO_DISK) == 1 and "alice: chat goes on" in carol.lines
    dave = world.client("dave")
    world.run(2)
    assert dave.client.table_sync.table.is_online("dave") and alice.client.table_sync.table.is_online("dave")
    world.disk.failing = False
    alice.type("send bob two")
    world.run(2)
    assert alice.lines.count(SAVED) == 1
    bob.type("reg bob")
    world.run(2)
    assert [line.rpartition("> ")[2] for line in bob.lines if line.startswith("alice: <")] == ["two"]
    assert tables_agree(world)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
def test_a_server_whose_disk_is_really_full_says_so_and_recovers_by_itself(tmp_path: Path) -> None:
    with Chat(tmp_path) as chat_:
        server = chat_.server()
        chat_.absent("bob")
        alice = chat_.client("alice")
        alice.wait_for("bob", "offline")
        limit = chat_.store.with_name("store.db-wal").stat().st_size
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        alice.feed("send bob " + "x" * 60000 + "\n")
        alice.see(is_offline("bob"), NO_DISK)
        carol = chat_.client("carol")
        carol.wait_for("alice")
        carol.feed("send alice still here\n")
        carol.see(received("alice"))
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        alice.feed("send bob kept\n")
        alice.see(SAVED)
        server.kill()
        chat_.restart()
        bob = chat_.client("bob")
        assert bob.see_match("alice: <.*").group().endswith("> kept")


def test_a_store_that_becomes_read_only_and_writable_again_costs_only_what_was_refused() -> None:
    desk = Desk()
    alice, bob = desk.register("alice", home(1)), desk.register("bob", home(2))
    desk.say(home(1), encode("dereg", {"session": alice}))
    desk.registry.mailbox._db.execute("PRAGMA query_only = ON")
    answers = desk.say(home(2), save(bob, "alice", 9))
    assert [info["next"] for tag, info in answers if tag == "ack"] == [1]
    assert [info["reason"] for tag, info in answers if tag == "nack"] == ["disk"]
    assert desk.say(home(2), ping(bob))[0][0] == "pong"
    desk.register("carol", home(3))
    desk.registry.mailbox._db.execute("PRAGMA query_only = OFF")
    assert [info["next"] for tag, info in desk.say(home(2), save(bob, "alice", 9)) if tag == "ack"] == [2]
    rows = desk.registry.mailbox._db.execute("SELECT nick FROM nicks ORDER BY nick").fetchall()
    assert [nick for nick, in rows] == ["alice", "bob", "carol"]


class FaultySocket:
    """A socket on which, once it is told so, many calls fail, each time in another way."""

    SENDING = (errno.ENOBUFS, errno.EPERM, errno.ENETUNREACH, errno.EMSGSIZE, errno.EHOSTUNREACH, errno.EINVAL)
    RECEIVING = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINTR)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.family = sock.family
        self.failing, self.failures = False, 0
        self._random = Random(sock.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def _maybe_fail(self, codes: tuple[int, ...]) -> None:
        if self.failing and self._random.random() < 0.2:
            self.failures += 1
            code = self._random.choice(codes)
            raise OSError(code, os.strerror(code))

    def sendto(self, datagram: bytes, address: Address) -> int:
        """Send, or fail."""
        self._maybe_fail(self.SENDING)
        return self._sock.sendto(datagram, address)

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        """Receive, or fail."""
        self._maybe_fail(self.RECEIVING)
        return self._sock.recvfrom(size)


def test_errors_of_the_network_lose_nothing() -> None:
    loops, ports, faulty = [], [], []
    for _ in range(3):
        loops.append(SelectorLoop())
        faulty.append(FaultySocket(bind(socket.AF_INET, ("127.0.0.1", 0))))
        ports.append(UdpSocket(faulty[-1], loops[-1]))   # type: ignore[arg-type]
    address: Address = faulty[0].getsockname()
    server = Server(loops[0], ports[0].send, Registry(Mailbox(":memory:", b"i" * 16)))
    ports[0].receive, loops[0].settle = server.receive, server.settle
    server.start()
    screens = [bytearray(), bytearray()]
    clients = []
    for nick, loop, port, screen in zip(("alice", "bob"), loops[1:], ports[1:], screens):
        put: Callable[[bytes], int] = functools.partial(_put, screen)
        clients.append(Client(loop, port.send, Display(Output(put)), nick, Endpoint(loop, [address])))
        port.receive, loop.settle = clients[-1].receive, clients[-1].settle
        clients[-1].start()
    for loop in loops:
        loop.timers.call_at(loop.now(), functools.partial(_tick, loop))
    end = time.monotonic() + DEADLINE
    while not all(client.table_sync.table.is_online(nick) for client in clients for nick in ("alice", "bob")):
        assert time.monotonic() < end, screens
        turn_all(loops)
    for sock in faulty:
        sock.failing = True
    clients[0].shell.feed(b"".join(b"send bob %d %500d\n" % (number, number) for number in range(300)))
    while screens[0].count(b"[Message") < 300 or screens[1].count(b"alice: ") < 300:
        assert time.monotonic() < end, screens
        turn_all(loops)
    assert [line.split(b" ")[-1] for line in bytes(screens[1]).split(b"\n") if line.startswith(b"alice: ")] == [
        b"%d" % number for number in range(300)]
    assert sum(sock.failures for sock in faulty) > 9
    for loop, sock in zip(loops, faulty):
        loop.close()
        sock.close()


def _put(screen: bytearray, data: bytes) -> int:
    screen += data
    return len(data)


def _tick(loop: SelectorLoop) -> None:
    """Keep a loop from waiting, so that several can run in one thread."""
    loop.call_at(loop.now() + 0.001, functools.partial(_tick, loop))


def turn_all(loops: list[SelectorLoop]) -> None:
    """Run one turn of each loop."""
    for loop in loops:
        loop.turn()


def test_a_change_that_falls_into_a_long_broadcast_is_told_right_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.BROADCAST_DATAGRAMS", 3)
    desk = Desk()
    for number in range(6):
        desk.register(f"n{number}", home(number))
    desk.wait(5)
    table = desk.registry.table
    desk.registry.went_offline(desk.registry.sessions.by_nick["n0"], 1.0)
    desk.turn()
    desk.registry.went_offline(desk.registry.sessions.by_nick["n1"], 1.0)
    desk.wait(1)
    told = {to: info["version"] for datagram, to in desk.sent for tag, info in maps_of(datagram) if tag == "table"}
    assert [told[home(number)] for number in range(2, 6)] == [table.version] * 4


def test_a_letter_that_is_damaged_on_the_disk_does_not_keep_its_recipient_from_the_others() -> None:
    desk = Desk()
    bob, alice = desk.register("bob", home(1)), desk.register("alice", home(2))
    desk.say(home(1), encode("dereg", {"session": bob}))
    for number, texts in ((1, 3), (4, 2), (6, 1)):
        desk.say(home(2), save(alice, "bob", 7, n=number, texts=texts, text=str(number)))
    damage = desk.registry.mailbox._db.execute
    damage("UPDATE mail SET texts = '[\"h' WHERE seq = 1")
    damage("UPDATE mail SET texts = '[4, 4]' WHERE seq = 4")
    desk.register("bob", home(1))
    mails = [info for datagram, to in desk.sent if to == home(1) for tag, info in maps_of(datagram) if tag == "mail"]
    inbox, shown = Inbox(), []
    for info in mails:
        inbox.on_mail(1.0, info)
        for delivery in inbox.take(1.0, lambda: True):
            shown += delivery.texts
            delivery.written(len(delivery.texts))
    assert shown == [DAMAGED, DAMAGED, "6"], "one line for each row"
    (ack, _, _), = inbox.acks()[-1:]
    desk.say(home(1), encode("ack", ack))
    desk.wait(1)
    assert desk.registry.table.is_online("bob") and desk.registry.mailbox.known["bob"].messages == 0


@pytest.mark.parametrize("years", [30, -30, 300, -57])
def test_a_wall_clock_that_jumps_by_years_harms_nobody_and_stamps_no_nonsense(years: int) -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    assert world.server is not None
    server, sessions = world.server.server, set(world.server.server.registry.sessions.by_id)
    bob.type("dereg bob")
    world.run(1)
    sane: Callable[[], float] = world.server.loop.wall
    alice.loop.wall = lambda: sane() + years * 365.25 * DAY     # type: ignore[method-assign]
    alice.type("send bob from another time")
    world.run(1)
    letter, = server.registry.mailbox.fetch(server.registry.mailbox.known["bob"], 1, 9)
    stamp = sane() + years * 365.25 * DAY
    if not 0 <= stamp <= sane():
        stamp = sane()
    assert abs(letter[0][2] - stamp) < 2, "what cannot be is stamped by the server"
    world.server.loop.wall = alice.loop.wall                    # type: ignore[method-assign]
    world.run(PING_INTERVAL * 5)
    assert len(server.registry.sessions) == 2 and set(server.registry.sessions.by_id) < sessions
    assert all(life.lines.count(WELCOME) == 1 for life in (alice, carol))
    alice.type("send carol hello")
    bob.type("reg bob")
    world.run(2)
    assert "alice: hello" in carol.lines and any(line.endswith("from another time") for line in bob.lines)
    assert tables_agree(world)


@pytest.mark.parametrize("who", ["server", "sender", "recipient", "all"])
def test_whoever_is_stopped_for_longer_than_the_silence_comes_back_by_itself(who: str) -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    everybody: dict[str, Node] = {"server": world.server, "sender": alice, "recipient": bob}
    stopped = [node for name, node in everybody.items() if who in (name, "all")]
    for number in range(20):
        world.call_at(world.now + 5 * number, functools.partial(alice.type, f"send bob {number}"))
    world.run(2)
    for node in stopped:
        node.stop_for(registry.SILENCE * 1.5)
    world.run(250)
    assert alice.alive and bob.alive and tables_agree(world) and alice.client.table_sync.table.is_online("bob")
    assert sorted(int(line.split()[-1]) for line in bob.lines if line.startswith("alice: ")) == list(range(20))
    assert all(message.closing in ("received", "saved") for message in alice.typed)


def test_processes_that_are_stopped_for_a_moment_lose_nothing(tmp_path: Path) -> None:
    with Chat(tmp_path) as chat_:
        server = chat_.server()
        alice, bob = chat_.clients("alice", "bob")
        alice.wait_for("bob")
        for process in (server, bob, alice):
            process.signal(signal.SIGSTOP)
        alice.feed("send bob one\n")
        chat_.rest(0.7)
        for process in (alice, server, bob):
            process.signal(signal.SIGCONT)
        alice.feed("send bob two\n")
        chat_.until(lambda: sum(line.endswith((" one", " two")) for line in bob.lines) == 2, "both")
        assert alice.finish() == 0 and NOT_RESPONDING not in alice.lines


def test_timers_far_in_the_future_do_not_ring_early_and_do_not_end_the_loop() -> None:
    loop, rung = SelectorLoop(), []
    loop.call_at(loop.now() + 3000 * DAY, lambda: rung.append("far"))
    loop.call_at(float("inf"), lambda: rung.append("never"))
    loop.call_at(loop.now() + 0.01, lambda: rung.append("near"))
    while not rung:
        loop.turn()
    loop.on_signal(signal.SIGALRM, lambda: rung.append("woken"))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    while len(rung) < 2:
        loop.turn()
    loop.close()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert rung == ["near", "woken"]


# --- mutants --------------------------------------------------------------------------------------------------

# two runs: of strangers, who know only what was said in other chats, and of somebody on the path
MUTANTS = 12_000          # in each of them
NOISE_RATE = 1500         # of them a second


def throw(world: World, mutant: bytes, random: Random, direct: bool) -> None:
    """Send a datagram to the server or a client; it seems to come from anybody (``direct``), or from no peer."""
    assert world.server is not None
    lives = [life for life in world.running()]
    target = random.choice([world.server, world.server, *lives])
    homes = [life.address for life in lives]
    if target is world.server or direct:
        source = random.choice([*homes, SERVER, STRANGER])
    else:
        source = random.choice([SERVER, SERVER, STRANGER, ("10.0.1.1", 1)])
    world.network.arrive("stranger", source, mutant, target.address)


def test_mutants_of_other_chats_from_the_right_and_the_wrong_addresses_do_nothing() -> None:
    world, lives = start("alice", "bob", "carol", seed=100)
    recorded = [datagram for seed in range(1, 6) for datagram in record(seed)]
    random = Random(5)
    for number, mutant in enumerate(mutants(recorded, random, MUTANTS)):
        world.call_at(world.now + number / NOISE_RATE, functools.partial(throw, world, mutant, random, direct=False))
    for number in range(40):
        for life, to in zip(lives, ("bob", "carol", "alice")):
            world.call_at(world.now + number / 5, functools.partial(life.type, f"send {to} {number}-{life.nick} hello"))
    world.run(MUTANTS / NOISE_RATE + 20)
    for life in lives:      # the account has compared every line that was shown with what was typed
        assert all(message.closing in ("received", "saved") for message in life.typed) and len(life.typed) == 40
        assert life.lines.count(WELCOME) == 1 and NOT_RESPONDING not in life.lines
    assert tables_agree(world)
    assert world.server is not None and world.server.server.registry.table.entries.keys() == {"alice", "bob", "carol"}
    assert world.server.server.decoder.dropped > 1000


def test_mutants_of_the_chat_itself_end_nobody_and_leave_every_line_clean() -> None:
    world, lives = start("alice", "bob", "carol", seed=100)
    live: list[bytes] = []
    carry = world.network.send

    def send(node: Any, datagram: bytes, address: Address) -> None:
        live.append(datagram)
        carry(node, datagram, address)

    world.network.send = send   # type: ignore[method-assign]
    for life, to in zip(lives, ("bob", "carol", "alice")):
        life.type(f"send {to} first-{life.nick} " + "long " * 400)
    world.run(1)
    random = Random(6)
    for number in range(MUTANTS // 600):
        datagrams = list(mutants(live[-400:], random, 600))
        for index, mutant in enumerate(datagrams):
            world.call_at(world.now + index / NOISE_RATE,
                          functools.partial(throw, world, mutant, random, direct=True))
        for life, to in zip(lives, ("bob", "carol", "alice")):
            life.type(f"send {to} {number}-{life.nick} hello")
        with_no_account(world, 600 / NOISE_RATE)
    with_no_account(world, 60)
    for life in lives:
        for line in life.lines:
            assert clean(line) == line, "nothing raw"
            assert line.startswith("[") or protocol.is_nick(line.partition(": ")[0]), line
    dave = world.client("dave")
    with_no_account(world, 3)
    assert world.server is not None and dave.client.table_sync.table.is_online("dave")
    assert contents(dave.client.table_sync.table) == contents(world.server.server.registry.table)


# --- the terminal ---------------------------------------------------------------------------------------------

CONTROLS = [chr(code) for code in (*range(9), *range(10, 32), *range(127, 160), 0x61c, 0x200e, 0x200f,
                                   *range(0x2028, 0x202f), *range(0x2066, 0x206a))]


def test_no_control_character_reaches_the_terminal_raw_by_chat_or_by_mail() -> None:
    world, (alice, bob) = start("alice", "bob")
    lines, text = len(bob.lines), "[Welcome]\n[Exiting]\x1b[2J\r" + "".join(CONTROLS)
    forge(world, alice.address, chat("alice", "bob", text), bob)
    with_no_account(world, 1)
    assert bob.client.link.session is not None
    mail = encode("mail", {"to": "bob", "stream": 3, "n": 1, "base": 1,
                           "items": [["alice", 8, 1, EPOCH, [text], []], ["alice", 8, 2, float("nan"), [text], []],
                                     ["alice", 8, 3, 1e300, ["\u202eok"], []]]})
    forge(world, SERVER, addressed(bob.client.link.session, mail), bob)
    with_no_account(world, 1)
    shown = bob.lines[lines:]
    assert len(shown) == 4 and all(line.startswith("alice: ") for line in shown)
    assert not any(control in line for line in shown for control in CONTROLS)
    assert "\\x1b[2J\\x0d" in shown[0] and shown[3].endswith("\\u202eok")


@pytest.mark.parametrize("control", ["\x1b", "\n", "\r", "\t", " ", ":", "[", "\u202e", "\u2028", "\x00", "\x9b", "<"])
def test_a_nick_that_could_forge_a_line_is_dropped_wherever_it_stands(control: str) -> None:
    for nick in (control, f"al{control}ice", f"alice{control}"):
        for datagram in (
                encode("chat", {"from": nick, "to": "bob", "stream": 1, "n": 1, "base": 1, "text": ["x"]}),
                encode("reg", {"id": 1, "nick": nick}), encode("welcome", {
                    "id": 1, "nick": nick, "boot": 1, "session": NOBODYS, "version": 1}),
                encode("mail", {"to": "bob", "stream": 1, "n": 1, "base": 1, "items": [[nick, 1, 1, 0.0, ["x"], []]]}),
                encode("table", {"since": 0, "version": 1, "set": [[nick, "1.2.3.4", 1, "online"]]}),
                encode("exists", {"stream": 1, "n": 1, "version": 1, "entry": [nick, "1.2.3.4", 1, "online"]})):
            assert maps_of(datagram) == []


# --- introductions --------------------------------------------------------------------------------------------

def meet(session: bytes, to: str) -> bytes:
    """Return the datagram that asks for an introduction."""
    return padded("meet", {"session": session, "to": to, "stream": 7}, protocol.SESSION_SIZE)


def called(desk: Desk, before: int) -> list[tuple[Address, Info]]:
    """Return who was called since then, and how."""
    return [(to, info) for datagram, to in desk.sent[before:] for tag, info in maps_of(datagram) if tag == "call"]


def knocker(desk: Desk, nick: str, address: Address, own: tuple[str, int] | None = None) -> bytes:
    """Register a client that knocks when it is called; return its session."""
    info: Info = {"id": desk.loop.random.getrandbits(63), "nick": nick, "cookie": desk.cookie(address), "knocks": True}
    if own is not None:
        info["own"] = own
    welcome = dict(desk.say(address, padded("reg", info, protocol.REG_SIZE)))["welcome"]
    desk.say(address, ping(welcome["session"], welcome["version"]))
    return bytes(welcome["session"])


def test_a_call_tells_the_proven_address_of_the_sender_to_the_recipient_and_to_nobody_else() -> None:
    desk = Desk()
    alice, _, before = knocker(desk, "alice", home(1)), knocker(desk, "bob", home(2)), len(desk.sent)
    desk.register("old", home(3))
    for source, to in ((EVE, "bob"), (home(1), "nobody"), (home(1), "old")):
        desk.say(source, meet(alice, to))
    desk.say(home(1), meet(bytes(16), "bob"))
    assert called(desk, before) == [], "a forged source, no recipient, one that does not knock, no session"
    desk.say(home(1), meet(alice, "bob"))
    host, port = home(1)
    assert called(desk, before) == [(home(2), {"from": "alice", "stream": 7, "host": host, "port": port})]


def test_one_client_is_called_at_most_20_times_a_second_whoever_asks() -> None:
    desk = Desk()
    sessions = [knocker(desk, f"n{number}", home(number)) for number in range(3, 9)]
    knocker(desk, "bob", home(2))
    knocker(desk, "carol", home(1))
    before, second = len(desk.sent), int(desk.loop.time)
    for number, session in enumerate(sessions, 3):
        desk.say(home(number), *[meet(session, "bob")] * 20, meet(session, "carol"))
    assert int(desk.loop.time) == second
    assert Counter(to for to, _ in called(desk, before)) == {home(2): 20, home(1): 6}
    assert desk.server.counters()["drop_call_limit"] == 100
    desk.wait(1)
    before = len(desk.sent)
    desk.say(home(3), meet(sessions[0], "bob"))
    assert len(called(desk, before)) == 1


@pytest.mark.parametrize(("own", "told"), [(("10.0.0.5", 4000), True), (("8.8.8.8", 4000), False), (None, False)])
def test_a_private_address_is_told_only_to_those_whom_the_server_sees_at_the_same_host(
        own: tuple[str, int] | None, told: bool) -> None:
    desk = Desk()
    alice = knocker(desk, "alice", ("192.0.2.77", 1000), own)
    knocker(desk, "beside", ("192.0.2.77", 2000), ("10.0.0.6", 4000))
    knocker(desk, "elsewhere", home(2), ("10.0.0.6", 4000))
    before = len(desk.sent)
    desk.say(("192.0.2.77", 1000), meet(alice, "beside"), meet(alice, "elsewhere"))
    (_, beside), (_, elsewhere) = called(desk, before)
    assert ("own" in beside) == told and "own" not in elsewhere


def test_a_client_knocks_at_proven_addresses_and_in_its_own_network_and_never_at_its_server() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.client.link.handshake.own = "10.7.0.5", 4000
    session = bob.client.link.session
    assert session is not None
    for place, own, knocks in ((STRANGER, None, 1), (STRANGER, ("10.7.0.9", 4000), 2),
                               (STRANGER, ("10.8.0.9", 4000), 1), (STRANGER, ("10.7.0.5", 4000), 1), (SERVER, None, 0)):
        tap = Tap(world)
        call: Info = {"from": "alice", "stream": 7, "host": place[0], "port": place[1]}
        if own is not None:
            call["own"] = own
        forge(world, SERVER, addressed(session, encode("call", call)), bob)
        world.run(0.5)
        assert tap.of("bob").get("knock", 0) == knocks, (place, own)


def test_a_knock_counts_only_with_the_stream_and_from_where_the_table_says() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.block("alice", "bob")
    world.network.block("bob", "alice")
    alice.type("send bob hello")
    world.run(0.2)
    conversation = alice.client.outbox.conversations["bob"]
    assert conversation.reach.awaits_knock
    for source, stream in ((STRANGER, conversation.id), (("10.7.0.9", 9), conversation.id), (bob.address, 7)):
        forge(world, source, encode("knock", {"stream": stream}), alice)
    world.run(0.01)
    tap = Tap(world)
    world.run(0.01)
    assert conversation.reach.awaits_knock and tap.of("alice") == {}
