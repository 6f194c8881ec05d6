"""What goes between client and server is secret and authentic: on arguments, in the simulated world, as processes."""
from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from home import KnownKeys, Mailbox, Pin
from protocol import (JOIN_SIZE, MAX_DATAGRAM, NO_NICK, RECORD_MARK, REG_SIZE, SESSION_SIZE, Address,
                      Decoder, Info, addressed, encode, hello_prologue, padded, table_map)
from registry import (COOKIE_TIME, ENCRYPTED, FAILURES_PER_NETWORK, GRANTED, HELLO_FAILURES, HELLOS_PER_ADDRESS,
                      HELLOS_PER_NICK, HELLO_TIME, MAX_HELLOS, OWNED, Hellos, Registry, ShownKey)
from secure import (MAPS, Channel, HandshakeState, KeyPair, Keys, Sodium, bind_proof, hash_of,
                    load_sodium, name_of_key, static_secret, token_for)
from tests.processes import EXITING, ROOT, SAVED, WELCOME, Chat, Process, received
from tests.simulate import SERVER, Life, World
from tests.test_strangers import EVE, Desk, home, maps_of, ping

SODIUM = load_sodium()
pytestmark = pytest.mark.skipif(SODIUM is None, reason="the extra secure is not installed")
TELLS_NOBODY = 2 ** 62      # a version of the table that nobody reaches: nothing is sent but the answer to a ping


def keys_of(secret: bytes, seed: int = 0) -> Keys:
    """Return what the owner of ``secret`` encrypts with; its random bytes come from ``seed``."""
    assert SODIUM is not None
    rest = random.Random(f"{secret.hex()} {seed}")
    return Keys(SODIUM, KeyPair(SODIUM, secret), lambda: rest.randbytes(32))


SERVER_KEYS = keys_of(b"s" * 32)


class Visitor:
    """A client on arguments, at a server on arguments."""

    def __init__(self, desk: Desk, nick: str, number: int = 0, secret: bytes = b"a" * 32,
                 is_bound: bool = True) -> None:
        self.desk, self.nick, self.address, self.secret, self.is_bound = desk, nick, home(number), secret, is_bound
        self.keys = keys_of(static_secret(secret), desk.loop.random.getrandbits(32))
        self.request = desk.loop.random.getrandbits(63)
        self.server_key = SERVER_KEYS.pair.public
        self.info: Info = {}

    def ask(self) -> Info:
        """Ask for a cookie."""
        first = padded("reg", {"id": self.request, "nick": NO_NICK, "secure": True}, REG_SIZE)
        (tag, cookie), = self.desk.say(self.address, first)
        assert tag == "cookie"
        return cookie

    def hello(self, cookie: Info | None = None, **changes: Any) -> bytes:
        """Return a new first message of a handshake; ``changes`` go into what is sealed in it."""
        cookie = self.ask() if cookie is None else cookie
        prologue = hello_prologue(cookie["server"], self.request, cookie["cookie"])
        self.noise = HandshakeState(self.keys.sodium, "IK", True, prologue, self.keys.pair, self.server_key)
        self.index = self.keys.random()[:4]
        join: Info = {"nick": self.nick, "index": self.index}
        if self.is_bound:
            token = token_for(self.secret, cookie["server"], self.nick)
            join["proof"] = bind_proof(hash_of(token), self.server_key, self.keys.pair.public)
        message = self.noise.write(padded("join", {**join, **changes}, JOIN_SIZE), self.keys.random())
        return encode("hello", {"id": self.request, "cookie": cookie["cookie"], "message": message})

    def answer(self, datagram: bytes) -> tuple[str, Info] | None:
        """Send the message; return what the server has sealed in its answer, None if there is none."""
        answers = self.desk.say(self.address, datagram)
        if not answers:
            return None
        (tag, info), = answers
        assert tag == "hello"
        (tag, info), = maps_of(self.noise.read(info["message"]))
        if tag == "welcome":
            self.channel = Channel(self.noise.split(), self.index, info["index"])
            self.info = info
        return tag, info

    def join(self) -> str:
        """Go through the handshake; return "welcome", or why not."""
        found = self.answer(self.hello())
        assert found is not None
        return found[0] if found[0] == "welcome" else str(found[1]["reason"])

    def seal(self, *maps: bytes) -> bytes:
        """Return a record."""
        return self.channel.seal(MAPS, b"".join(maps))

    def say(self, *maps: bytes) -> list[str]:
        """Send a record; return the tags of what the server has sealed in its answers, without pages of the table."""
        before = len(self.desk.sent)
        self.desk.server.receive(self.seal(*maps), self.address)
        self.desk.turn()
        return self.opened(self.desk.sent[before:])

    def opened(self, sent: Sequence[tuple[bytes, Address]]) -> list[str]:
        """Return the tags of what is sealed for this client, in what the server has sent."""
        return [tag for datagram, to in sent if to == self.address and datagram[:1] == RECORD_MARK
                for tag, _ in Decoder().decode(self.channel.open(datagram)) if tag != "table"]

    def ping(self) -> bytes:
        """Return a ping of the session."""
        return ping(self.info["session"], TELLS_NOBODY)

    def online(self) -> Visitor:
        """Register, and use the channel."""
        assert self.join() == "welcome" and self.say(self.ping()) == ["pong"]
        return self


def desk(**options: Any) -> Desk:
    """Return a server on arguments that encrypts."""
    return Desk(keys=keys_of(b"s" * 32), **options)


def curves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for each secret that is calculated of two keys."""
    calls: list[int] = []
    shared = Sodium.shared

    def counted(sodium: Sodium, secret: bytes, public: bytes) -> bytes:
        calls.append(1)
        return shared(sodium, secret, public)
    monkeypatch.setattr(Sodium, "shared", counted)
    return calls


# --- the handshake, at the server -----------------------------------------------------------------------------

def test_a_first_request_names_nobody_and_its_answer_is_no_larger() -> None:
    server = desk()
    first = padded("reg", {"id": 7, "nick": NO_NICK, "secure": True}, REG_SIZE)
    server.server.receive(first, home(0))
    (cookie, _), = server.turn()
    assert len(first) == REG_SIZE >= len(cookie)
    assert dict(maps_of(cookie))["cookie"]["key"] == SERVER_KEYS.pair.public
    assert "key" not in dict(server.say(home(0), padded("reg", {"id": 7, "nick": "bob"}, REG_SIZE)))["cookie"]


def test_a_session_begins_with_the_first_record_in_its_channel() -> None:
    server = desk()
    alice = Visitor(server, "alice")
    assert alice.join() == "welcome" and not server.registry.sessions and "alice" not in server.registry.mailbox.known
    assert alice.say(alice.ping()) == ["pong"]
    assert server.registry.sessions.of("alice") is not None and not len(server.server.gate.hellos or ())
    assert server.registry.mailbox.known["alice"].key == alice.keys.pair.public


def test_whoever_holds_the_table_that_it_was_told_to_reach_hears_of_every_change_from_then_on() -> None:
    server = desk()
    Visitor(server, "bob", 1, secret=b"b" * 32).online()
    server.wait(0.2)
    alice = Visitor(server, "alice")
    assert alice.join() == "welcome"
    before = len(server.sent)
    alice.desk.server.receive(alice.seal(ping(alice.info["session"], alice.info["version"])), alice.address)
    server.wait(0.2)
    told = [datagram for datagram, to in server.sent[before:] if to == alice.address and datagram[:1] == RECORD_MARK]
    entries = [entry for datagram in told for tag, info in Decoder().decode(alice.channel.open(datagram))
               if tag == "table" for entry in info["set"]]
    assert "alice" in {entry[0] for entry in entries}, "its own entry is the first change"


def test_an_older_session_lives_until_the_new_one_is_used() -> None:
    server = desk()
    first = Visitor(server, "alice").online()
    second = Visitor(server, "alice")
    assert second.join() == "welcome" and first.say(first.ping()) == ["pong"]
    assert second.say(second.ping()) == ["pong"]
    assert first.say(first.ping()) == ["refused"], "it is told in its own channel that it was replaced"


def test_a_message_that_is_sent_again_gets_the_same_answer_and_makes_nothing_new() -> None:
    server = desk()
    alice = Visitor(server, "alice")
    hello = alice.hello()
    answers = []
    for _ in range(1000):
        server.server.receive(hello, alice.address)
        answers += server.turn()
    assert len(answers) == 1000 and len({datagram for datagram, _ in answers}) == 1
    assert server.server.gate.hellos is not None and len(server.server.gate.hellos) == 1
    assert not server.registry.sessions


def test_a_message_of_somebody_else_sent_again_does_not_end_their_session() -> None:
    server = desk()
    alice = Visitor(server, "alice")
    hello = alice.hello()
    alice.answer(hello)
    alice.say(alice.ping())
    before = server.state()
    for _ in range(20):
        server.say(alice.address, hello)
    server.wait(HELLO_TIME + 1)
    assert server.state() == before and alice.say(alice.ping()) == ["pong"]


def test_nothing_is_calculated_before_the_cookie_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    server = desk()
    alice = Visitor(server, "alice")
    hello = dict(maps_of(alice.hello()))["hello"]
    calls = curves(monkeypatch)
    for wrong in ({"cookie": bytes(16)}, {"cookie": hello["cookie"][::-1]}):
        assert [tag for tag, _ in server.say(alice.address, encode("hello", {**hello, **wrong}))] == ["cookie"]
    server.say(home(9), encode("hello", hello))     # it is good for another address
    without = {name: value for name, value in hello.items() if name != "cookie"}
    server.say(alice.address, encode("hello", without))
    assert not calls


def test_whoever_forges_handshakes_is_not_listened_to_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    server = desk()
    eve, alice = Visitor(server, "eve", 1), Visitor(server, "alice", 2)
    forged = dict(maps_of(eve.hello()))["hello"]
    good = alice.hello()
    calls = curves(monkeypatch)
    eve.address = EVE
    forged["cookie"] = eve.ask()["cookie"]
    for number in range(1000):
        message = number.to_bytes(32, "big") + forged["message"][32:]
        assert server.say(EVE, encode("hello", {**forged, "message": message})) == []
    assert len(calls) == FAILURES_PER_NETWORK
    assert server.server.counters()["drop_forged"] == 1000
    assert alice.answer(good) is not None, "others are served meanwhile"
    server.wait(1.0)
    assert eve.join() == "welcome"


def test_there_is_a_limit_to_all_that_forge_together(monkeypatch: pytest.MonkeyPatch) -> None:
    hellos, calls = Hellos(keys_of(b"s" * 32)), curves(monkeypatch)
    info = {"id": 1, "cookie": bytes(16), "message": b"\x09" + bytes(99)}
    for number in range(2 * HELLO_FAILURES):
        assert hellos.read(1.0, (f"192.0.{number // 250}.{number % 250}", 5), bytes(16), info) is None
    assert len(calls) == HELLO_FAILURES
    for number in range(20):
        assert hellos.read(2.0, (f"2001:db8::{number:x}", 5), bytes(16), info) is None
    assert len(calls) == HELLO_FAILURES + FAILURES_PER_NETWORK, "whoever has one IPv6 address has very many"


def test_handshakes_that_nobody_uses_are_forgotten() -> None:
    server = desk()
    alice = Visitor(server, "alice")
    assert alice.join() == "welcome"
    server.wait(HELLO_TIME + 0.1)
    Visitor(server, "bob", 1).join()        # the next one clears up
    assert server.server.gate.hellos is not None and len(server.server.gate.hellos) == 1
    assert alice.say(alice.ping()) == [] and not server.registry.sessions
    assert server.server.counters()["drop_unknown_channel"] == 1


def test_only_so_many_handshakes_wait_for_one_address_and_for_one_nick_there() -> None:
    server = desk()
    assert server.server.gate.hellos is not None
    visitors = [Visitor(server, f"n{number}") for number in range(HELLOS_PER_ADDRESS + 5)]
    assert {visitor.join() for visitor in visitors} == {"welcome"}
    assert len(server.server.gate.hellos) == HELLOS_PER_ADDRESS
    same = [Visitor(server, nick, 1) for nick in ("bob", "BOB", "bob", "bob")]
    assert {visitor.join() for visitor in same} == {"welcome"}
    assert len(server.server.gate.hellos) == HELLOS_PER_ADDRESS + HELLOS_PER_NICK
    assert HELLOS_PER_ADDRESS < MAX_HELLOS
    assert [bool(visitor.say(visitor.ping())) for visitor in same] == [False, False, True, True]


def test_no_two_channels_of_a_server_have_the_same_index() -> None:
    server = desk()
    hellos = server.server.gate.hellos
    assert hellos is not None
    numbers = iter(b"aaaab")
    hellos.keys.random = lambda: bytes([next(numbers, 0)]) * 32
    alice, bob = Visitor(server, "alice", 1), Visitor(server, "bob", 2, secret=b"b" * 32)
    alice.online()
    bob.online()
    assert len(server.registry.sessions.channels) == 2
    assert alice.say(alice.ping()) == bob.say(bob.ping()) == ["pong"]


@pytest.mark.parametrize("change", [{"nick": "a b"}, {"index": b"123"}, {"proof": b"short"}, {"own": ["::1"]}])
def test_what_is_sealed_in_a_message_is_checked_like_all_that_comes(change: Info) -> None:
    server = desk()
    alice = Visitor(server, "alice")
    assert alice.answer(alice.hello(**change)) is None and server.server.counters()["drop_forged"] == 1


def test_a_message_is_bound_to_its_cookie_its_request_and_its_server() -> None:
    server = desk()
    alice = Visitor(server, "alice")
    cookie = alice.ask()
    hello = dict(maps_of(alice.hello(cookie)))["hello"]
    assert server.say(alice.address, encode("hello", {**hello, "id": alice.request ^ 1})) == []
    assert alice.answer(alice.hello({**cookie, "server": b"another server!!"})) is None
    alice.server_key = keys_of(b"x" * 32).pair.public
    assert alice.answer(alice.hello(cookie)) is None
    server.wait(COOKIE_TIME)
    assert server.say(alice.address, encode("hello", {**hello, "cookie": alice.ask()["cookie"]})) == []
    assert not server.registry.sessions and not len(server.server.gate.hellos or ())


# --- who owns a nick ------------------------------------------------------------------------------------------

def registry() -> Registry:
    found = Registry(Mailbox(":memory:", b"i" * 16))
    found.public_key = SERVER_KEYS.pair.public
    return found


def shown(token: bytes, key: bytes, server_key: bytes = SERVER_KEYS.pair.public) -> ShownKey:
    """Return what the owner of a token shows who has a key."""
    return ShownKey(key, bind_proof(hash_of(token), server_key, key))


def take(reg: Registry, token: bytes | None, key: ShownKey | None = None) -> None:
    """Register alice, who may have that nick, and leave."""
    assert reg.claim("alice", home(1), token, key) == GRANTED
    reg.deregister(reg.admit(0.0, os.urandom(16), "alice", home(1), token, 1, key), 0.0)


ALICE, EVES = b"key of alice".ljust(32), b"key of eve".ljust(32)


def test_the_first_key_of_the_owner_is_bound_to_the_nick() -> None:
    reg = registry()
    take(reg, b"token")
    assert reg.claim("alice", home(1), None, shown(b"another", ALICE)) == OWNED
    take(reg, None, shown(b"token", ALICE))
    assert reg.claim("alice", home(2), None, shown(b"token", ALICE)) == GRANTED
    for token, key in ((b"another", None), (None, None), (None, shown(b"token", EVES))):
        assert reg.claim("alice", home(2), token, key) == OWNED, "the token alone does not suffice any more"
    assert reg.claim("alice", home(2), b"token", None) == ENCRYPTED


def test_who_comes_first_with_a_key_is_the_owner_and_is_known_by_the_token_too() -> None:
    reg = registry()
    take(reg, None, shown(b"token", ALICE))
    assert reg.mailbox.known["alice"].owner is None, "the server learns no token, and no hash of one"
    assert reg.claim("alice", home(2), b"token", None) == ENCRYPTED
    assert reg.claim("alice", home(2), b"another", None) == OWNED


def test_of_two_that_are_welcome_to_one_nick_the_second_to_speak_hears_that_it_has_gone() -> None:
    server = desk()
    first, second = Visitor(server, "alice", 1), Visitor(server, "alice", 2)
    assert [first.join(), second.join()] == ["welcome", "welcome"]
    assert [first.say(first.ping()), second.say(second.ping())] == [["pong"], ["refused"]]
    session = server.registry.sessions.of("alice")
    assert session is not None and session.address == first.address


def test_a_proof_that_a_rogue_server_has_seen_binds_nothing_elsewhere() -> None:
    reg = registry()
    take(reg, b"token")
    rogue = keys_of(b"r" * 32).pair.public
    seen = shown(b"token", ALICE, rogue)
    assert reg.claim("alice", home(1), None, seen) == OWNED
    assert reg.claim("alice", home(1), None, ShownKey(EVES, seen.proof)) == OWNED
    assert reg.claim("alice", home(1), seen.proof) == OWNED


def test_keys_are_in_the_store(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    box = Mailbox(path, b"i" * 16)
    assert not box.has_keys
    secret = box.server_secret(b"k" * 32)
    reg = Registry(box)
    reg.public_key = SERVER_KEYS.pair.public
    take(reg, None, shown(b"token", ALICE))
    assert box.commit(0.0)
    box.close()
    again = Mailbox(path, b"j" * 16)
    assert again.has_keys and again.server_secret(b"n" * 32) == secret == b"k" * 32
    assert again.known["alice"].key == ALICE
    again.close()


def test_an_anonymous_client_encrypts_and_owns_nothing() -> None:
    server = desk()
    alice = Visitor(server, "alice", is_bound=False).online()
    assert server.registry.mailbox.known["alice"].key is None
    alice.say(padded("dereg", {"session": alice.info["session"]}, SESSION_SIZE))
    assert Visitor(server, "alice", 1, secret=b"b" * 32).join() == "welcome"


def test_an_anonymous_session_is_not_given_to_whoever_speaks_from_its_address() -> None:
    server = desk()
    alice = Visitor(server, "alice", is_bound=False).online()
    other, before = Visitor(server, "alice", is_bound=False, secret=b"b" * 32), len(server.sent)
    assert [tag for tag, _ in server.ask_for("alice", alice.address)] != ["welcome"], "in plain"
    assert other.answer(other.hello()) is None, "by another channel: its holder is asked first"
    assert alice.opened(server.sent[before:]) == ["probe"]
    assert alice.say(alice.ping()) == ["pong"]


def test_after_a_restart_nobody_who_encrypts_is_asked_for_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    first = desk(store=path)
    Visitor(first, "alice", 1, is_bound=False).online()
    first.turn()
    first.server.stop()
    second = desk(store=path)
    other = Visitor(second, "alice", 2, is_bound=False, secret=b"b" * 32)
    assert other.join() == "welcome"
    assert not [datagram for datagram, _ in second.sent if b"alice" in datagram]


# --- a session and its channel --------------------------------------------------------------------------------

def test_a_session_counts_in_its_channel_alone() -> None:
    server = desk()
    alice, bob = Visitor(server, "alice", 1).online(), Visitor(server, "bob", 2, secret=b"b" * 32).online()
    session = alice.info["session"]
    speaking = [padded("ping", {"id": 5, "session": session, "version": 0}, SESSION_SIZE),
                padded("sync", {"session": session, "version": 0}, SESSION_SIZE),
                padded("dereg", {"session": session}, SESSION_SIZE),
                encode("save", {"session": session, "to": "bob", "stream": 7, "n": 1, "base": 1, "text": ["hi"],
                                "at": [1.5], "relay": False}),
                padded("meet", {"session": session, "to": "bob", "stream": 7}, SESSION_SIZE)]
    before = server.state()
    for request in speaking:
        assert server.say(alice.address, request) == [], "in plain"
        assert bob.say(request) == [], "in the channel of somebody else"
    assert server.state() == before
    assert server.server.counters()["drop_other_channel"] == 2 * len(speaking)
    assert alice.say(alice.ping()) == ["pong"]
    server.wait(40)     # nothing is heard of them since
    heard = {one.nick: one.heard for one in server.registry.sessions.by_id.values()}
    server.say(alice.address, encode("alive", {"id": 1, "nick": "alice", "session": session}))
    assert {one.nick: one.heard for one in server.registry.sessions.by_id.values()} == heard
    bob.say(encode("alive", {"id": 1, "nick": "alice", "session": session}))
    assert {one.nick: one.heard for one in server.registry.sessions.by_id.values()} == heard


def test_mail_is_acked_in_the_channel_alone() -> None:
    server = desk()
    alice, bob = Visitor(server, "alice", 1).online(), Visitor(server, "bob", 2, secret=b"b" * 32).online()
    bob.say(padded("dereg", {"session": bob.info["session"]}, SESSION_SIZE))
    alice.say(encode("save", {"session": alice.info["session"], "to": "bob", "stream": 7, "n": 1, "base": 1,
                              "text": b"\1\0" + bytes(17), "at": [], "relay": False, "envelope": bytes(48),
                              "key": name_of_key(bob.keys.pair.public)}))
    assert server.registry.mailbox.known["bob"].waiting == 1
    again = Visitor(server, "bob", 2, secret=b"b" * 32)
    assert again.join() == "welcome"
    assert "mail" in again.say(again.ping())
    stream, = server.server.postman.streams.values()
    ack = encode("ack", {"stream": stream.stream.id, "next": 2, "have": [], "room": 9})
    server.say(again.address, ack)
    alice.say(ack)
    assert server.registry.mailbox.known["bob"].waiting == 1
    again.say(ack)
    assert server.registry.mailbox.known["bob"].waiting == 0


def test_a_record_that_is_changed_repeated_or_unknown_does_nothing() -> None:
    server = desk()
    alice = Visitor(server, "alice").online()
    record = alice.seal(padded("dereg", {"session": alice.info["session"]}, SESSION_SIZE))
    before = server.state()
    for place in range(len(record)):
        changed = bytearray(record)
        changed[place] ^= 1
        server.server.receive(bytes(changed), alice.address)
    server.turn()
    assert server.state() == before
    good = alice.seal(alice.ping())
    server.server.receive(good, alice.address)
    assert len(server.turn()) == 1
    server.server.receive(good, alice.address)
    assert server.turn() == [] and server.state() == before


def test_the_answer_to_an_unknown_channel_is_a_hint_that_is_no_larger_than_its_question() -> None:
    server = desk()
    for size in (31, 40, 80, 1200):
        record = RECORD_MARK + b"\0" + b"none" + bytes(size - 6)
        server.server.receive(record, EVE)
        answers = server.turn()
        assert all(len(answer) <= size for answer, _ in answers)
    assert [(tag, info["boot"]) for tag, info in maps_of(answers[0][0])] == [("pong", 0)]


def test_a_client_that_moves_is_asked_in_its_channel() -> None:
    server = desk()
    alice = Visitor(server, "alice", 1).online()
    alice.address = home(7)
    assert alice.say(alice.ping()) == ["probe"]
    (probe, _), = [(datagram, to) for datagram, to in server.sent[-1:]]
    server.wait(0.05)
    probes = [probe for probe in server.server.prober.probes.values() if probe.nick == "alice"]
    answer = encode("alive", {"id": probes[0].id, "nick": "alice", "session": alice.info["session"]})
    server.say(alice.address, answer)
    session = server.registry.sessions.of("alice")
    assert session is not None and session.address == home(1), "in plain, nobody moves"
    alice.say(answer)
    assert session.address == home(7)


def test_whoever_left_is_told_so_again_in_their_channel() -> None:
    server = desk()
    alice = Visitor(server, "alice").online()
    dereg = padded("dereg", {"session": alice.info["session"]}, SESSION_SIZE)
    assert alice.say(dereg) == ["bye"] and alice.say(dereg) == ["bye"]


# --- in the simulated world -----------------------------------------------------------------------------------

class Wire:
    """Everything that is sent in a world, and somebody who reads it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sent: list[tuple[bytes, Address, Address]] = []       # datagram, from, to
        self.before: Callable[[bytes, Address, Address], None] = lambda datagram, source, to: None
        send = world.network.send

        def tapped(node: Any, datagram: bytes, address: Address) -> None:
            self.sent.append((datagram, node.address, address))
            self.before(datagram, node.address, address)
            send(node, datagram, address)
        world.network.send = tapped     # type: ignore[method-assign]

    def of_server(self) -> list[bytes]:
        """Return what went to the server and came from it."""
        return [datagram for datagram, source, to in self.sent if SERVER in (source, to)]

    def forge(self, datagram: bytes, source: Address, to: Address) -> None:
        """Let something arrive, as if it came from ``source``."""
        node = self.world.at.get(to)
        if node is not None:
            node.arrive(datagram, source)


def encrypted(*nicks: str, seed: int = 1, tells_keys: bool = True) -> tuple[World, Wire, list[Life]]:
    """Return a world where all encrypt, its wire, and clients that are online and know each other.

    ``tells_keys``: else the server tells no key before it is asked.
    """
    world = World(seed, encrypts=True)
    world.tells_keys = tells_keys
    wire = Wire(world)
    world.start_server()
    lives = [world.client(nick) for nick in nicks]
    world.run_until(lambda: all(is_ready(life, *nicks) for life in lives), 5)
    world.run(1)
    return world, wire, lives


def is_ready(life: Life, *nicks: str) -> bool:
    """Return whether a client is online, and sees the others there."""
    client = life.client
    return client.link.connection.channel is not None and all(client.table_sync.table.is_online(nick) for nick in nicks)


def welcomes(life: Life) -> int:
    """Return how often a client was registered."""
    return life.lines.count(WELCOME)


def test_nobody_on_the_way_to_the_server_reads_a_nick_or_a_text() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    world.network.block(alice.host, bob.host)
    world.network.block(bob.host, alice.host)
    alice.type("send bob a-secret by way of the server")
    world.run(5)
    assert "alice: a-secret by way of the server" in "\n".join(bob.lines) or any(
        line.endswith("a-secret by way of the server") for line in bob.lines)
    bob.type("dereg bob")
    world.run(2)
    alice.type("send bob another-secret as mail")
    world.run(2)
    bob.type("reg bob")
    world.run(2)
    assert any(line.endswith("another-secret as mail") for line in bob.lines)
    assert world.server is not None
    world.server.crash()
    world.run(1)
    world.start_server()
    world.run(20)
    assert welcomes(alice) == 2 and welcomes(bob) == 3
    seen = b"\n".join(wire.of_server())
    for word in (b"alice", b"bob", b"a-secret", b"another-secret"):
        assert word not in seen
    tags = {tag for datagram in wire.of_server() for tag, _ in Decoder().decode(datagram)}
    assert tags == {"reg", "cookie", "hello", "pong"}, "all else is in records"
    assert max(map(len, wire.of_server())) <= MAX_DATAGRAM


def test_everything_sent_again_later_changes_nothing() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    world.network.block(alice.host, bob.host)
    for number in range(20):
        alice.type(f"send bob m{number}")
        world.run(0.3)
    world.run(3)
    shown = list(bob.lines)
    assert world.server is not None
    sessions = set(world.server.server.registry.sessions.by_id)
    for datagram, source, to in list(wire.sent):
        for _ in range(2):
            wire.forge(datagram, source, to)
        world.run(0.01)
    world.run(3)
    assert bob.lines == shown and set(world.server.server.registry.sessions.by_id) == sessions
    assert (welcomes(alice), welcomes(bob)) == (1, 1)


def test_forged_answers_that_come_first_have_no_effect() -> None:
    """Somebody reads the wire, and answers each request before the server does, with what it cannot know in plain."""
    world = World(3, encrypts=True)
    wire = Wire(world)
    rogue = keys_of(b"r" * 32)

    def answer(datagram: bytes, source: Address, to: Address) -> None:
        if to != SERVER:
            return
        for tag, info in Decoder().decode(datagram):
            if tag == "hello":
                fields: Info = {"id": info["id"], "nick": "alice"}
                session = bytes(16)
                for forged in (encode("welcome", {**fields, "boot": 1, "session": session, "version": 0}),
                               encode("refused", {**fields, "reason": "owned"}),
                               encode("hello", {"id": info["id"], "message": bytes(150)}),
                               encode("hello", {"id": info["id"], "message": info["message"]}),
                               encode("bye", {"session": session}), encode("pong", {"id": 1, "boot": 0, "version": 9,
                                                                                    "mail": 0})):
                    wire.forge(forged, SERVER, source)
    wire.before = answer
    world.start_server()
    alice = world.client("alice")
    world.run(5)
    assert is_ready(alice, "alice") and welcomes(alice) == 1 and alice.alive
    assert rogue.pair.public != alice.client.link.handshake.pin.key


def test_a_forged_cookie_costs_a_moment_and_ends_no_program() -> None:
    world, wire, (alice,) = encrypted("alice", seed=4)
    assert world.server is not None
    rogue, genuine = keys_of(b"r" * 32), alice.client.link.handshake.pin.key

    def answer(datagram: bytes, source: Address, to: Address) -> None:
        for tag, info in Decoder().decode(datagram):
            if to == SERVER and tag == "reg" and random.Random(len(wire.sent)).random() < 0.5:
                cookie: Info = {"id": info["id"], "server": bytes(16), "cookie": bytes(16)}
                wire.forge(encode("cookie", {**cookie, "key": rogue.pair.public}), SERVER, source)
    world.server.crash()
    wire.before = answer
    world.run(1)
    world.start_server()
    world.run(60)
    assert alice.alive and is_ready(alice, "alice") and alice.client.link.handshake.pin.key == genuine


def test_a_client_is_back_soon_after_its_server_was_killed_and_never_in_plain() -> None:
    for seed in range(10):
        world, wire, (alice, bob) = encrypted("alice", "bob", seed=seed)
        assert world.server is not None
        world.server.crash()
        world.start_server()
        began = world.now
        world.run_until(lambda: welcomes(alice) == 2 and welcomes(bob) == 2, 5)
        assert world.now - began <= 2.0
        assert b"alice" not in b"".join(wire.of_server())


def test_who_leaves_a_server_that_has_restarted_does_not_wait_for_an_answer() -> None:
    for seed in range(10):
        world, wire, (alice,) = encrypted("alice", seed=seed)
        assert world.server is not None
        world.server.crash()
        world.start_server()
        alice.type("quit")
        world.run(1.2)
        assert alice.exit_code == 0 and "[Server not responding]" not in alice.lines
        assert alice.lines[-1] == "[You are Offline. Bye.]"


def test_who_leaves_is_not_misled_by_hints_while_the_server_answers() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    hint = encode("pong", {"id": 1, "boot": 0, "version": 0, "mail": 0})

    def mislead(datagram: bytes, source: Address, to: Address) -> None:
        if source == alice.address:
            wire.forge(hint, SERVER, source)
    wire.before = mislead
    alice.type("dereg alice")
    world.run(2)
    assert alice.lines[-1] == "[You are Offline. Bye.]" and not bob.client.table_sync.table.is_online("alice")


def test_another_server_in_the_place_of_the_known_one_ends_the_client() -> None:
    world, wire, (alice,) = encrypted("alice")
    assert world.server is not None
    world.server.crash()
    world.disk = type(world.disk)()
    world.start_server()
    world.run(60)
    assert alice.exit_code == 1 and alice.lines[-2:] == ["[The key of the server has changed.]", EXITING]
    world.encrypts = False
    bob = world.client("bob")
    world.run(2)
    assert welcomes(bob) == 1


def test_a_server_that_does_not_encrypt_any_more_ends_the_client_and_hears_nothing() -> None:
    world, wire, (alice,) = encrypted("alice")
    assert world.server is not None
    world.server.crash()
    world.encrypts = False
    world.start_server()
    alice.type("send alice a-secret")
    world.run(60)
    assert alice.exit_code == 1 and "[The server cannot encrypt.]" in alice.lines
    assert b"alice" not in b"".join(wire.of_server()) and b"a-secret" not in b"".join(wire.of_server())


def test_a_key_that_has_refused_is_remembered_as_one_that_has_welcomed() -> None:
    """Somebody strips the key from every cookie behind the first: the client must not go on in plain."""
    world = World(5, encrypts=True)
    wire = Wire(world)
    world.start_server()
    world.client("alice", secret=b"x" * 32)
    world.run(2)
    kept: list[bytes] = []
    eve = world.client("alice", name="eve", secret=b"y" * 32)
    eve.client.link.handshake.pin = Pin(keep=kept.append)
    world.run(2)
    assert eve.exit_code == 1 and "[Nickname alice belongs to someone else.]" in eve.lines
    assert world.server is not None and eve.client.link.handshake.pin.key is not None
    assert b"alice" not in b"".join(wire.of_server()) and not eve.client.link.handshake.is_plain


def test_a_forged_cookie_is_forgotten_when_the_server_is_heard_again() -> None:
    world, wire, (alice,) = encrypted("alice")
    assert world.server is not None
    handshake = alice.client.link.handshake
    world.server.stop_for(4.0)
    world.run(1)
    wire.forge(encode("pong", {"id": 0, "boot": 0, "version": 0, "mail": 0}), SERVER, alice.address)
    world.run_until(lambda: handshake.id >= 0, 10)
    wire.forge(encode("cookie", {"id": handshake.id, "server": bytes(16), "cookie": bytes(16)}), SERVER, alice.address)
    world.run(0.01)
    assert handshake.doubt == "insecure"
    alice.client.link.heard()       # as by the answer to a ping, before another handshake is through
    assert handshake.doubt is None
    world.run(10)
    assert alice.alive and is_ready(alice, "alice")


def test_hints_that_anybody_forges_cause_one_ping_a_second_at_most() -> None:
    world, wire, (alice,) = encrypted("alice")
    del wire.sent[:]
    for _ in range(200):
        wire.forge(encode("pong", {"id": 0, "boot": 0, "version": 0, "mail": 0}), SERVER, alice.address)
        world.run(0.05)
    own = [datagram for datagram, source, _ in wire.sent if source == alice.address]
    assert len(own) <= 12 and {datagram[:1] for datagram in own} == {RECORD_MARK}, "if it is answered, no handshake"
    assert welcomes(alice) == 1


def test_in_plain_nothing_of_the_server_counts_beside_a_channel_whatever_is_known_of_the_session() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    session = alice.client.link.session
    assert session is not None
    del wire.sent[:]
    entry = ["bob", "10.66.6.6", 5, "online"]
    version = alice.client.table_sync.version + 1
    for plain in (addressed(session, table_map(version - 1, version, [entry])),
                  encode("probe", {"id": 1, "to": "alice"}), encode("bye", {"session": session}),
                  addressed(session, encode("probe", {"id": 2, "to": "alice"})),
                  encode("refused", {"nick": "alice", "session": session, "reason": "replaced"})):
        wire.forge(plain, SERVER, alice.address)
        world.run(0.01)
    assert alice.client.table_sync.table.entries["bob"].host != "10.66.6.6"
    assert [sent for sent in wire.sent if sent[1] == alice.address] == [] and alice.alive


def test_no_datagram_is_too_large_for_the_longest_nicks_and_texts() -> None:
    nicks = "\U00010400" * 24, "\U00010401" * 24       # 96 bytes each
    world, wire, (alice, bob) = encrypted(*nicks)
    world.network.block(alice.host, bob.host)
    world.network.block(bob.host, alice.host)
    for length in (*range(700, 800, 3), 5000, 65536):
        alice.type(f"send {bob.nick} " + "x" * length)
    for length in range(600):
        alice.type(f"send {bob.nick} {length} " + "y" * (length % 61))      # they fill datagrams to the last byte
    world.run(20)
    bob.type(f"dereg {bob.nick}")
    world.run(2)
    for length in (*range(1100, 1200, 3), 65536):
        alice.type(f"send {bob.nick} " + "x" * length)
    world.run(20)
    bob.type(f"reg {bob.nick}")
    world.run(20)
    assert sum(line.endswith("xxx") for line in bob.lines) == 71
    assert MAX_DATAGRAM - 80 < max(map(len, wire.of_server())) <= MAX_DATAGRAM
    assert all(one.frames.account.is_sealed for one in alice.client.outbox.conversations.values())


def test_what_somebody_passes_on_from_elsewhere_is_no_sign_that_the_server_hears_us() -> None:
    world, wire, (alice,) = encrypted("alice")
    assert world.server is not None
    session = world.server.server.registry.sessions.of("alice")
    assert session is not None and session.channel is not None
    world.server.crash()
    world.run_until(lambda: alice.client.link.is_silent, 30)
    for source, is_silent in ((EVE, True), (SERVER, False)):
        wire.forge(session.channel.seal(MAPS, encode("probe", {"id": 1, "to": "x"})), source, alice.address)
        world.run(0.01)
        assert alice.client.link.is_silent is is_silent


def test_who_passes_one_answer_on_while_the_server_is_silent_is_not_taken_for_it_for_ever() -> None:
    world, wire, (alice,) = encrypted("alice")
    kept: list[bytes] = []

    def keep(datagram: bytes, source: Address, to: Address) -> None:
        if source == SERVER:
            kept.append(datagram)
    wire.before = keep
    world.network.block("server", alice.host)
    world.run_until(lambda: alice.client.link.is_silent and bool(kept), 60)
    world.run(3)
    wire.forge(kept[-1], EVE, alice.address)
    world.run(0.01)
    endpoint = alice.client.link.endpoint
    assert endpoint.current == EVE
    world.network.unblock("server", alice.host)
    world.run(60)
    assert endpoint.current == SERVER and not alice.client.link.is_silent
    assert alice.lines.count("[Server not responding]") <= 2


def test_nobody_who_passes_records_on_faster_than_the_network_gets_what_a_client_says() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    network = world.network
    network.block(alice.host, bob.host)

    def pass_on(datagram: bytes, source: Address, to: Address) -> None:
        if source == SERVER:
            wire.forge(datagram, EVE, to)
    wire.before = pass_on
    for number in range(10):
        alice.type(f"send bob m{number}")
        world.run(10)
    assert EVE not in {to for _, _, to in wire.sent}
    assert sum("m" in line and "alice:" in line for line in bob.lines) == 10


# --- as processes ---------------------------------------------------------------------------------------------

WITHOUT = "raise ImportError('not installed')\n"


def without_extra(chat: Chat) -> dict[str, str]:
    """Return an environment in which PyNaCl cannot be imported."""
    folder = chat.directory / "without" / "nacl"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(WITHOUT)
    return {"PYTHONPATH": str(folder.parent)}


@pytest.mark.parametrize("server_has", [True, False])
@pytest.mark.parametrize("client_has", [True, False])
@pytest.mark.parametrize("peer_has", [True, False])
def test_every_pairing_of_those_who_can_and_cannot_encrypt_chats(chat: Chat, server_has: bool, client_has: bool,
                                                                 peer_has: bool) -> None:
    lacking = without_extra(chat)

    def environment(has: bool) -> dict[str, str]:
        return {} if has else lacking
    server = chat.run("server", "0", "--host", "127.0.0.1", "--store", str(chat.store),
                      environment=environment(server_has))
    port = server.see_match(r"\[Server listening on .*:(\d+)\]").group(1)
    alice = chat.run("client", "alice", "127.0.0.1", port, environment=environment(client_has))
    bob = chat.run("client", "bob", "127.0.0.1", port, environment=environment(peer_has))
    for one in (alice, bob):
        one.see(WELCOME)
    alice.wait_for("bob")
    bob.wait_for("alice")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    alice.see(received("bob"))
    bob.feed("dereg bob\n")
    alice.wait_for("bob", "offline")
    alice.feed("send bob later\n")
    alice.see(SAVED)
    bob.feed("reg bob\n")
    chat.until(lambda: any(line.endswith(" later") for line in bob.lines), "the mail")
    assert (alice.finish(), bob.finish()) == (0, 0)
    for one, has in ((alice, client_has), (bob, peer_has)):
        told = one.err.data.count(b"[This connection is not encrypted.]")
        assert told == int(has and not server_has), "once a run, by whoever could"
    told = alice.err.data.count(b"[Messages to bob are not encrypted.]")
    assert told == int(server_has and client_has and not peer_has)


def test_what_requires_encryption_speaks_with_nobody_else(chat: Chat) -> None:
    server = chat.server("--secure", "off")
    assert chat.complete("send", "--server", f"127.0.0.1:{chat.port}", "--nick", "x", "--secure", "require", "bob",
                         "hi").wait() == 1
    alice = chat.start("alice", "--secure", "require")
    assert alice.wait() == 1 and alice.lines == ["[The server cannot encrypt.]", EXITING]
    server.kill()
    chat.restart("--secure", "require")
    bob = chat.start("bob", "--secure", "off")
    assert bob.wait() == 1 and bob.lines == ["[The server requires encryption.]", EXITING]
    carol = chat.client("carol", "--secure", "require")
    assert carol.finish() == 0


def test_without_the_extra_what_requires_it_says_so(chat: Chat) -> None:
    lacking = without_extra(chat)
    for mode in (["server", "0", "--store", ":memory:"], ["client", "alice"], ["send", "bob", "hi"]):
        ended = chat.complete(*mode, "--secure", "require", environment=lacking)
        assert ended.wait() == 2 and not ended.lines and len(ended.errors) == 1
        assert "pip install 'udpchat[secure]'" in ended.errors[0]


def test_without_the_extra_a_server_whose_key_is_given_is_not_spoken_to(chat: Chat) -> None:
    chat.server()
    chat.absent("bob")
    server, digits = f"127.0.0.1:{chat.port}", " ".join(["12345"] * 12)
    lacking = without_extra(chat)
    for options, environment in ((["--server-key", digits], {}), ([], {"UDPCHAT_SERVER_KEY": digits})):
        sent = chat.complete("send", "bob", "hello", "--server", server, "--nick", "zoe", *options,
                             environment={**lacking, **environment})
        assert sent.wait() == 1 and not sent.lines and "udpchat[secure]" in sent.errors[-1] and len(sent.errors) == 1
    sent = chat.complete("send", "bob", "hello", "--server", server, "--nick", "zoe", environment=lacking)
    assert sent.wait() == 0 and SAVED in sent.lines


def test_a_store_behind_a_link_can_be_read_by_its_owner_alone(chat: Chat) -> None:
    target = chat.directory / "target.db"
    chat.store.symlink_to(target)
    chat.server()
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_store_with_keys_is_not_opened_without_the_extra(chat: Chat) -> None:
    server = chat.server()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    again = chat.complete("server", str(chat.port), "--host", "127.0.0.1", "--store", str(chat.store),
                          environment=without_extra(chat))
    assert again.wait() == 1 and not again.lines and len(again.errors) == 1
    assert "udpchat[secure]" in again.errors[0]
    assert not chat.store.with_name(chat.store.name + "-wal").exists(), "it is closed: all is in one file"


def test_a_nick_that_was_encrypted_is_not_given_to_its_owner_in_plain_who_is_told_why(chat: Chat) -> None:
    chat.server()
    assert chat.client("alice").finish() == 0
    for options, environment in ((("--secure", "off"), {}), ((), without_extra(chat))):
        again = chat.run("client", "alice", "127.0.0.1", str(chat.port), *options, environment=environment)
        assert again.wait() == 1 and again.lines == ["[Nickname alice is used with encryption.]", EXITING]
        assert "udpchat[secure]" in again.errors[-1]
    eve = chat.start("alice", "--secure", "off", "--identity", str(chat.directory / "other"))
    assert eve.wait() == 1 and eve.lines == ["[Nickname alice belongs to someone else.]", EXITING]


def test_a_quiet_send_says_nothing_of_a_server_that_cannot_encrypt(chat: Chat) -> None:
    chat.server("--secure", "off")
    chat.absent("bob")
    for options, count in ((["--quiet"], 0), ([], 1)):
        sent = chat.complete("send", "--server", f"127.0.0.1:{chat.port}", "--nick", "x", *options, "bob", "hi")
        assert sent.wait() == 0 and sent.err.data.count(b"not encrypted") == count


def test_the_fingerprint_is_that_of_the_store(chat: Chat) -> None:
    server = chat.server()
    first = server.see_match(r"\[Fingerprint((?: \d{5}){12})\]").group(1)
    server.kill()
    again = chat.restart()
    assert again.see_match(r"\[Fingerprint((?: \d{5}){12})\]").group(1) == first


def test_a_server_that_is_killed_is_used_again_in_secret(chat: Chat) -> None:
    server = chat.server()
    alice, bob = chat.clients("alice", "bob")
    alice.wait_for("bob")
    server.kill()
    chat.restart()
    chat.until(lambda: alice.lines.count(WELCOME) == bob.lines.count(WELCOME) == 2, "both to be back")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert (alice.finish(), bob.finish()) == (0, 0)
    assert not re.search("not encrypted", chat.report())


def test_on_a_real_wire_to_the_server_no_nick_and_no_text_is_seen(chat: Chat) -> None:
    server = chat.server()
    proxies = chat.proxy(), chat.proxy()
    alice, bob = (chat.client(nick, port=proxy.port) for nick, proxy in zip(("alice", "bob"), proxies))
    alice.wait_for("bob")
    bob.wait_for("alice")
    alice.feed("send bob first-secret\n")      # no datagram gets straight from one to the other
    chat.until(lambda: any(line.endswith("first-secret") for line in bob.lines), "the message, by the server")
    server.kill()
    chat.restart()
    chat.until(lambda: alice.lines.count(WELCOME) == bob.lines.count(WELCOME) == 2, "both to be back")
    bob.feed("dereg bob\n")
    alice.wait_for("bob", "offline")
    alice.feed("send bob second-secret\n")
    chat.until(lambda: alice.lines.count(SAVED) == 2, "the mail to be kept")
    bob.feed("reg bob\n")
    chat.until(lambda: any(line.endswith("second-secret") for line in bob.lines), "the mail")
    assert (alice.finish(), bob.finish()) == (0, 0)
    seen = b"\n".join(datagram for proxy in proxies for datagram in proxy.seen)
    assert len(seen) > 2000
    for word in (b"alice", b"bob", b"first-secret", b"second-secret"):
        assert word not in seen


# --- the key of a server is remembered ------------------------------------------------------------------------

def fingerprint_of(server: Process) -> str:
    """Return what a server shows."""
    return server.see_match(r"\[Fingerprint ((?:\d{5} ?){12})\]").group(1)


def known(chat: Chat) -> Path:
    """Return the file with the keys of servers."""
    return Path(chat.environment["XDG_STATE_HOME"]) / "udpchat" / "known"


def refused(chat: Chat, *options: str, environment: dict[str, str] | None = None) -> Process:
    """Return a client that does not come online."""
    client = chat.run("client", "alice", "127.0.0.1", str(chat.port), *options, environment=environment)
    assert client.wait() == 1 and client.lines[-1] == EXITING
    return client


CHANGED, CANNOT = "[The key of the server has changed.]", "[The server cannot encrypt.]"


def test_the_key_of_the_first_contact_is_remembered_and_another_one_is_refused_until_the_user_accepts_it(
        chat: Chat) -> None:
    server = chat.server()
    first = fingerprint_of(server)
    assert chat.client("alice").finish() == 0
    assert known(chat).stat().st_mode & 0o777 == 0o600 and known(chat).read_text().count("\n") == 1
    server.kill()
    server = chat.restart()
    assert chat.client("alice").finish() == 0, "the same key in the next run"
    server.kill()
    server = chat.server(port=chat.port, store=str(chat.directory / "another"))
    second = fingerprint_of(server)
    client = refused(chat)
    assert client.lines == [CHANGED, EXITING]
    assert first in client.errors[0] and f"--server-key '{second}'" in client.errors[0] and len(client.errors) == 1
    assert refused(chat, "--server-key", first).lines == [CHANGED, EXITING]
    for options, environment in (((), {"UDPCHAT_SERVER_KEY": second}), ((), {}), (("--server-key", second.replace(
            " ", "")), {})):
        client = chat.run("client", "alice", "127.0.0.1", str(chat.port), *options, environment=environment)
        client.see(WELCOME)
        assert client.finish() == 0
    assert known(chat).read_text().count("\n") == 2, "each key is written once"


def test_a_key_that_the_user_has_given_counts_at_the_first_contact(chat: Chat) -> None:
    server = chat.server()
    own = fingerprint_of(server)
    wrong = own[:-1] + ("1" if own[-1] == "0" else "0")
    client = refused(chat, "--server-key", wrong)
    assert client.lines == [CHANGED, EXITING] and not known(chat).exists()
    assert wrong in client.errors[0] and own in client.errors[0]
    server.kill()
    chat.server("--secure", "off", port=chat.port)
    assert refused(chat, "--server-key", own).lines == [CANNOT, EXITING]
    for text in ("123", "1" * 59 + "x", ""):
        ended = chat.complete("client", "alice", "--server-key", text)
        assert ended.wait() == 2 and len(ended.errors) == 1


def test_a_server_that_was_seen_with_a_key_is_never_spoken_to_in_plain_again(chat: Chat) -> None:
    server = chat.server()
    assert chat.client("alice").finish() == 0
    server.kill()
    chat.server("--secure", "off", port=chat.port, store=str(chat.directory / "another"))
    assert refused(chat).lines == [CANNOT, EXITING]


def test_the_key_of_a_server_without_a_store_is_good_for_its_run_and_not_remembered(chat: Chat) -> None:
    for number in range(2):
        server = chat.server(store=":memory:", port=chat.port if number else 0)
        assert chat.client("alice").finish() == 0
        server.kill()
    assert not known(chat).exists()


def test_a_file_of_keys_that_cannot_be_read_ends_a_client_and_a_torn_line_does_not(chat: Chat) -> None:
    chat.server()
    known(chat).parent.mkdir(parents=True, exist_ok=True)
    known(chat).write_text("server 127.0.0.1:9 nonsense\n")
    client = chat.run("client", "alice", "127.0.0.1", str(chat.port))
    assert client.wait() == 1 and not client.lines
    assert len(client.errors) == 1 and client.errors[0].endswith("known: line 1 cannot be read")
    known(chat).unlink()
    known(chat).symlink_to("/dev/zero")
    client = chat.run("client", "alice", "127.0.0.1", str(chat.port))
    assert client.wait() == 1 and len(client.errors) == 1
    known(chat).unlink()
    known(chat).write_text("server 127.0.0.1:9 0123")
    assert chat.client("alice").finish() == 0
    assert chat.client("alice").finish() == 0
    torn, whole = known(chat).read_text().splitlines()
    assert torn == "server 127.0.0.1:9 0123 torn" and whole.startswith(f"server 127.0.0.1:{chat.port} ")


def test_where_nothing_can_be_remembered_that_is_said(chat: Chat) -> None:
    chat.server()
    known(chat).parent.mkdir(parents=True, exist_ok=True)
    known(chat).symlink_to(chat.directory / "missing" / "known")
    client = chat.client("alice", "--identity", str(chat.directory / "identity"))
    assert client.finish() == 0
    assert len(client.errors) == 1 and "the key of the server is not remembered" in client.errors[0]


def test_many_programs_note_keys_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state" / "known"
    script = ("import sys, home\nkeys = home.KnownKeys(sys.argv[1])\n"
              "for n in range(100): keys.add_server(f'{sys.argv[2]}-{n}:4119', bytes([n]) * 32)")
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name], cwd=ROOT) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = KnownKeys(str(path))
    assert all(found.server(f"{name}-{n}:4119") == bytes([n]) * 32 for name in "ab" for n in range(100))
    found.add_server("a-7:4119", b"x" * 32)
    assert KnownKeys(str(path)).server("a-7:4119") == b"x" * 32, "the last one counts"
