"""Keys that are told only to those who ask, and registering while thousands do: on arguments, and in the world."""
from __future__ import annotations

from typing import Any

import pytest

import protocol
from protocol import OFFLINE, ONLINE, UNTOLD, Decoder, Info, Page, Table, encode, padded
from registry import KEY_INTERVAL
from secure import BUSY_SIGNS, load_sodium
from server import HELLOS_PER_TURN, KEYS_TOLD, Pages
from tests.processes import SAVED
from tests.simulate import Life, World
from tests.test_secrecy import Visitor, Wire, desk, encrypted, is_ready, keys_of
from tests.test_strangers import home, maps_of

pytestmark = pytest.mark.skipif(load_sodium() is None, reason="the extra secure is not installed")

KEY, OTHER = b"k" * 32, b"o" * 32
PLACE = "192.0.2.1", 5001


# --- the table ------------------------------------------------------------------------------------------------

def mirror_of(*entries: tuple[str, bytes, bool]) -> Table:
    """Return what a client makes of the page of a table that does not tell these keys."""
    table, mirror = Table(), Table()
    for nick, key, is_bound in entries:
        table.set(nick, *PLACE, ONLINE, key, is_bound)
    pages = list(table.pages(0, 1000, is_untold=True))
    for page in pages:
        assert KEY not in [row[1] for row in page.keys]
        mirror.apply(page)
    return mirror


def test_a_page_that_tells_no_keys_says_who_has_one() -> None:
    mirror = mirror_of(("alice", KEY, True), ("bob", b"", False), ("carol", OTHER, False))
    assert [mirror.entries[nick].key for nick in ("alice", "bob", "carol")] == [UNTOLD, b"", UNTOLD]


def test_a_key_is_learned_once_and_stays_until_the_table_says_something_else() -> None:
    mirror = mirror_of(("alice", KEY, True))
    assert mirror.learn("alice", KEY, True, 1) and not mirror.learn("alice", OTHER, True, 1)
    assert (mirror.entries["alice"].key, mirror.entries["alice"].is_bound) == (KEY, True)
    assert not mirror.learn("nobody", KEY, True, 1)
    assert mirror.apply(Page(1, 2, [["alice", *PLACE, OFFLINE]], (), True)) == ["alice"]
    assert mirror.entries["alice"].key == UNTOLD, "it may be another one now"


def test_a_key_that_is_older_than_what_the_table_says_is_not_learned() -> None:
    mirror = mirror_of(("alice", KEY, True))
    mirror.apply(Page(1, 9, [["alice", *PLACE, OFFLINE]], (), True))
    assert not mirror.learn("alice", OTHER, True, 8) and mirror.learn("alice", KEY, True, 9)


def test_a_mirror_has_no_more_entries_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_ENTRIES", 3)
    mirror = mirror_of(*((f"nick{number}", KEY, True) for number in range(5)))
    assert list(mirror.entries) == ["nick0", "nick1", "nick2"] and mirror.is_full and mirror.version == 5
    assert mirror.apply(Page(5, 6, [["nick1", *PLACE, OFFLINE], ["nick2", *PLACE, "gone"], ["new", *PLACE, ONLINE]]))
    assert list(mirror.entries) == ["nick0", "nick1", "new"]


def test_pages_without_keys_are_much_fewer() -> None:
    table = Table()
    for number in range(3000):
        table.set(f"nick{number}", "127.0.0.1", number + 1, ONLINE, number.to_bytes(4, "big") * 8, True)
    told, untold = (len(list(Pages(table, True, is_untold).all_after(0))) for is_untold in (False, True))
    assert untold < 0.6 * told


# --- the server -----------------------------------------------------------------------------------------------

def pages_for(visitor: Visitor, since: int) -> list[Info]:
    """Return the pages that answer a ``sync``."""
    sync = padded("sync", {"session": visitor.info["session"], "version": since}, protocol.SESSION_SIZE)
    before = len(visitor.desk.sent)
    visitor.desk.server.receive(visitor.seal(sync), visitor.address)
    visitor.desk.wait(0.1)
    pages = []
    for datagram, to in visitor.desk.sent[before:]:
        if to == visitor.address:
            for tag, info in Decoder().decode(visitor.channel.open(datagram)):
                maps = Decoder().unpacked(info["data"]) if tag == "packed" else [(tag, info)]
                pages += [page for name, page in maps if name == "table" and protocol.since_of(page) >= since]
    return pages


def crowded() -> Any:
    """Return a desk with a large table, in which all have keys."""
    server = desk()
    for number in range(KEYS_TOLD + 50):
        server.registry.table.set(f"nick{number}", *PLACE, OFFLINE, number.to_bytes(4, "big") * 8, True)
    return server


def reader(server: Any, **about: Any) -> Visitor:
    """Return a visitor who is online, and reads compressed pages if ``about`` says so."""
    visitor = Visitor(server, "alice")
    assert visitor.answer(visitor.hello(**about)) is not None
    visitor.say(visitor.ping())
    return visitor


def test_whoever_misses_much_of_the_table_is_told_the_keys_of_the_last_entries_alone() -> None:
    server = crowded()
    alice = reader(server, packed=True)
    pages = pages_for(alice, 0)
    assert pages[0].get("untold") and not pages[0].get("keys")
    assert not pages[-1].get("untold") and pages[-1]["keys"]
    assert not any(page.get("untold") for page in pages_for(alice, server.registry.table.version - KEYS_TOLD))


def test_whoever_does_not_read_compressed_pages_is_told_every_key() -> None:
    alice = reader(crowded())
    assert not any(page.get("untold") for page in pages_for(alice, 0))


@pytest.mark.parametrize(("nick", "key"), [("nick7", (7).to_bytes(4, "big") * 8), ("nobody", b"")])
def test_a_key_is_told_to_whoever_asks(nick: str, key: bytes) -> None:
    server = crowded()
    alice = reader(server, packed=True)
    before = len(server.sent)
    server.server.receive(alice.seal(encode("want", {"session": alice.info["session"], "nick": nick})), alice.address)
    server.turn()
    (answer, to), = server.sent[before:]
    (tag, info), = Decoder().decode(alice.channel.open(answer))
    assert (tag, to, info["nick"], info["key"], info["bound"]) == ("key", alice.address, nick, key, bool(key))
    assert info["version"] == server.registry.table.version


def test_many_who_register_at_once_wait_for_their_turn_and_hear_that_the_server_is_there() -> None:
    server = desk()
    hellos = []
    for number in range(2 * HELLOS_PER_TURN):
        visitor = Visitor(server, f"nick{number}", number % 200, secret=bytes([number]) * 32)
        visitor.address = home(number)
        hellos.append((visitor, visitor.hello()))
    for visitor, hello in hellos:
        server.server.receive(hello, visitor.address)
    (last, hello), first = hellos[-1], hellos[0][0]
    server.server.receive(hello, last.address)
    answers = {to: maps_of(datagram)[0] for datagram, to in server.turn()}
    assert answers[first.address][0] == "hello" and len(answers) == HELLOS_PER_TURN + 1
    tag, cookie = answers[last.address]
    assert (tag, cookie["cookie"]) == ("cookie", maps_of(hello)[0][1]["cookie"])
    assert len({to for _, to in server.turn()}) == HELLOS_PER_TURN, "in the next turn, at once"


# --- the client that registers --------------------------------------------------------------------------------

def test_a_server_that_says_that_it_is_busy_is_waited_for_but_not_for_ever() -> None:
    world = World(1, encrypts=True)
    Wire(world)
    server = world.start_server()
    server.server.gate.read_hellos = lambda: None      # type: ignore[method-assign]
    began = world.now
    alice = world.client("alice")
    world.run_until(lambda: alice.lines[-1:] == ["[Exiting]"], 60)
    assert alice.lines == ["[Server not responding]", "[Exiting]"]
    assert BUSY_SIGNS * 0.75 <= world.now - began <= (BUSY_SIGNS + 6) * 1.25


def test_a_cookie_is_a_sign_of_life_and_a_server_that_answers_late_is_waited_for() -> None:
    world = World(1, encrypts=True)
    Wire(world)
    server = world.start_server()
    gate, read = server.server.gate, server.server.gate.read_hellos
    gate.read_hellos = lambda: None if world.now < 6 else read()       # type: ignore[method-assign]
    alice = world.client("alice")
    world.run_until(lambda: is_ready(alice, "alice"), 10)
    assert world.now > 6 and "[Server not responding]" not in alice.lines


# --- in the simulated world -----------------------------------------------------------------------------------

def strangers(*nicks: str) -> tuple[World, Wire, list[Life]]:
    """Return a world whose server tells no key before it is asked, its wire, and clients that know each other."""
    return encrypted(*nicks, tells_keys=False)


def shows(life: Life, text: str) -> bool:
    """Return whether a client shows a text of alice."""
    return any(line.startswith("alice: ") and line.endswith(text) for line in life.lines)


def key_in(life: Life, nick: str) -> bytes:
    """Return what stands in the table of a client as somebody's key."""
    return life.client.table_sync.table.entries[nick].key


def not_answering(world: World, seconds: float) -> list[float]:
    """Let the server answer no question for a key for that time; return when it was asked."""
    assert world.server is not None
    asked: list[float] = []
    answers, end = world.server.server._from_sessions["want"], world.now + seconds

    def late(session: Any, info: Info) -> None:
        asked.append(world.now)
        if world.now >= end:
            answers(session, info)
    world.server.server._from_sessions["want"] = late
    return asked


def test_what_goes_to_somebody_whose_key_was_not_told_waits_for_it_and_is_encrypted() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    assert key_in(alice, "bob") == UNTOLD
    alice.type("send bob secret words")
    world.run(1)
    assert shows(bob, "secret words") and alice.lines[-1] == "[Message received by bob.]"
    assert key_in(alice, "bob") not in (UNTOLD, b"") and key_in(bob, "alice") not in (UNTOLD, b"")
    assert not any(b"secret words" in datagram for datagram, _, _ in wire.sent)


def test_a_key_is_asked_for_until_it_comes_and_nothing_goes_out_before() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    asked = not_answering(world, 3.0)
    alice.type("send bob late words")
    world.run(2.9)
    assert not shows(bob, "late words") and not alice.client.outbox.is_settled
    gaps = [later - earlier for earlier, later in zip(asked, asked[1:])]
    assert len(gaps) >= 4 and all(0.7 * KEY_INTERVAL < gap < 1.3 * KEY_INTERVAL for gap in gaps)
    world.run(2)
    assert shows(bob, "late words")
    assert not any(b"late words" in datagram for datagram, _, _ in wire.sent)


def test_mail_for_and_from_somebody_whose_key_was_not_told_is_sealed_and_proven() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    bob.type("dereg bob")
    world.run(2)
    alice.type("send bob sealed words")
    world.run(2)
    assert alice.lines[-1] == SAVED
    assert world.server is not None
    world.server.crash()
    world.start_server()
    world.run(20)
    bob.client.table_sync.table.entries["alice"] = bob.client.table_sync.table.entries["alice"]._replace(key=UNTOLD)
    bob.type("reg bob")
    world.run(5)
    assert shows(bob, "sealed words") and not any("Not proven" in line for line in bob.lines)
    assert not any(b"sealed words" in datagram for datagram, _, _ in wire.sent)


def test_mail_is_not_shown_before_the_key_of_its_sender_is_known() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    bob.type("dereg bob")
    world.run(2)
    alice.type("send bob sealed words")
    world.run(2)
    not_answering(world, 4.0)
    bob.type("reg bob")
    world.run(3)
    assert key_in(bob, "alice") == UNTOLD and not shows(bob, "sealed words")
    world.run(4)
    assert shows(bob, "sealed words") and not any("Not proven" in line for line in bob.lines)


@pytest.mark.parametrize("command", ["verify bob", "fingerprint bob"])
def test_a_command_about_a_key_waits_for_it(command: str) -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    not_answering(world, 1.0)
    before = len(alice.lines)
    alice.type(command)
    alice.type("fingerprint")
    world.run(0.9)
    assert alice.lines[before:] == []
    world.run(2)
    first, own = alice.lines[before:]
    assert "bob" in first and "no key" not in first and own.startswith("[Fingerprint of alice")


def test_a_command_about_a_key_does_not_wait_for_a_server_that_is_silent() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    assert world.server is not None
    world.server.crash()
    world.run(20)
    before = len(alice.lines)
    alice.type("verify bob")
    world.run(0.1)
    assert len(alice.lines) == before + 1


def test_another_key_than_the_one_that_is_pinned_is_noticed_when_it_is_told() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    alice.type("send bob first words")
    world.run(1)
    assert world.server is not None
    table = world.server.server.registry.table
    entry = table.entries["bob"]
    table.set("bob", entry.host, entry.port, entry.state, keys_of(b"e" * 32).pair.public, True)
    world.run(3)
    mirror = alice.client.table_sync.table.entries
    mirror["bob"] = mirror["bob"]._replace(key=UNTOLD)
    alice.type("send bob second words")
    world.run(2)
    assert alice.lines[-1] == "[The key of bob has changed, message not sent.]"
    assert not shows(bob, "second words")


def test_a_conversation_that_waits_for_a_key_does_not_keep_the_program_busy() -> None:
    world, wire, (alice, bob) = strangers("alice", "bob")
    not_answering(world, 20.0)
    alice.type("send bob words")
    world.run(1)
    turns: list[float] = []
    settle = alice.client.settle

    def counted() -> None:
        turns.append(world.now)
        settle()
    alice.client.settle = counted       # type: ignore[method-assign]
    world.run(2)
    assert alice.client.outbox.conversations["bob"].pending == 1 and len(turns) < 60
