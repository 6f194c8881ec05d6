"""``udpchat who``: whoever only asks who is there has no nick, and leaves nothing behind."""
from __future__ import annotations

import json
import signal
import subprocess

import pytest

import protocol
from home import Mailbox
from protocol import OFFLINE, Info, Parcel, encode, padded
from registry import GRANTED, Registry
from server import HOUSEKEEPING, PROBE_TIMEOUT
from tests.processes import PIPE, UPDATED, Chat
from tests.test_strangers import Desk, home, save

NICK = "visitor-0123456789abcdef"


def who(chat: Chat, *options: str) -> tuple[int, list[str], list[str]]:
    """Run ``udpchat who``; return its exit code, and the lines on stdout and on stderr."""
    process = chat.run("who", "--server", f"127.0.0.1:{chat.port}", *options, stdin=subprocess.DEVNULL)
    return process.wait(), process.lines, process.errors


# --- processes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("secure", ["auto", "off"])
def test_who_asks_who_is_there_stands_in_no_table_and_in_no_store(chat: Chat, secure: str) -> None:
    server = chat.server()
    chat.absent("eve")
    alice, bob = chat.clients("alice", "bob")
    for _ in range(3):
        code, lines, errors = who(chat, "--secure", secure)
        assert (code, errors) == (0, [])
        assert [(row.split()[0], row.split()[2]) for row in lines] == [
            ("alice", "online"), ("bob", "online"), ("eve", "offline")]
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert alice.lines.count(UPDATED) <= 2 and bob.lines.count(UPDATED) == 1, "each has heard of the other"
    assert all(one.finish() == 0 for one in (alice, bob))
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    box = Mailbox(str(chat.store), b"")
    assert set(box.known) == {"alice", "bob", "eve"}
    box.close()


def test_in_json_who_is_an_object_for_each(chat: Chat) -> None:
    chat.absent("eve")
    chat.client("alice")
    code, lines, errors = who(chat, "--json")
    alice, eve = map(json.loads, lines)
    assert (code, errors) == (0, []) and (alice["type"], alice["nick"], alice["state"]) == ("client", "alice", "online")
    assert eve["state"] == "offline" and "seen" in eve and "seen" not in alice


def test_who_of_an_empty_server_is_nothing(chat: Chat) -> None:
    assert who(chat) == (0, [], [])


def test_who_says_that_there_is_no_server_and_takes_neither_a_nick_nor_words(chat: Chat) -> None:
    silent = chat.run("who", "--server", "127.0.0.1:9", stdin=PIPE)
    assert silent.wait() == 1 and silent.errors == ["[Server not responding]"] and not silent.lines
    assert [who(chat, *words)[0] for words in (["--nick", "x"], ["bob"], ["--json", "bob"])] == [2, 2, 2]


# --- the server -----------------------------------------------------------------------------------------------

def visit(desk: Desk, nick: str = NICK, number: int = 7) -> bytes:
    """Come to read the table; return the session."""
    info: Info = {"id": number, "nick": nick, "cookie": desk.cookie(home(number)), "visit": True}
    answer = dict(desk.say(home(number), padded("reg", info, protocol.REG_SIZE)))
    session = bytes(answer["welcome"]["session"])
    desk.say(home(number), padded("ping", {"id": 1, "session": session, "version": answer["welcome"]["version"]},
                                  protocol.SESSION_SIZE))
    return session


def dereg(session: bytes) -> bytes:
    return padded("dereg", {"session": session}, protocol.SESSION_SIZE)


def test_a_visitor_gets_the_table_and_what_changes_in_it() -> None:
    desk = Desk()
    desk.register("alice", home(1))
    session = visit(desk)
    sync = padded("sync", {"session": session, "version": 0}, protocol.SESSION_SIZE)
    assert dict(desk.say(home(7), sync))["table"]["set"] == [["alice", *home(1), "online"]]
    before = len(desk.sent)
    desk.register("bob", home(2))
    desk.wait(1)
    assert any(to == home(7) and b"bob" in datagram for datagram, to in desk.sent[before:])


def test_a_visitor_is_nowhere_while_it_is_there_and_when_it_has_left_or_died() -> None:
    desk = Desk()
    desk.register("alice", home(1))
    left, died = visit(desk, NICK, 7), visit(desk, NICK.replace("0", "f"), 8)
    assert left and died
    desk.wait(2 * HOUSEKEEPING)
    assert desk.say(home(7), dereg(left)) == [("bye", {"session": left})]
    assert list(desk.registry.table.entries) == ["alice"] == list(desk.registry.mailbox.known)
    assert desk.registry.mailbox.commit(desk.loop.time)


def test_a_visitor_can_neither_send_nor_be_called() -> None:
    desk = Desk()
    alice = desk.register("alice", home(1))
    session = visit(desk)
    before = len(desk.sent)
    for datagram in (save(session, "alice", 5), encode("meet", {"session": session, "to": "alice", "stream": 5})):
        desk.say(home(7), datagram)
    desk.wait(2 * PROBE_TIMEOUT)
    assert desk.server.counters()["drop_visit"] == 2 and not [to for _, to in desk.sent[before:] if to == home(1)]
    assert dict(desk.say(home(1), save(alice, NICK, 9)))["nack"]["reason"] == "unknown"


def test_whoever_registers_the_nick_of_a_visitor_that_has_left_gets_it() -> None:
    desk = Desk()
    desk.say(home(7), dereg(visit(desk)))
    assert desk.register(NICK, home(3)) and desk.registry.table.is_online(NICK)


def test_a_visitor_at_the_address_of_somebody_else_has_it_now() -> None:
    registry = Registry(Mailbox(":memory:", b"s" * 16))
    registry.admit(1.0, b"a", "alice", home(1), None, 1)
    registry.admit(2.0, b"v", NICK, home(1), None, 2, is_visit=True)
    assert [(entry.nick, entry.state) for entry in registry.table.entries.values()] == [("alice", OFFLINE)]


def test_who_visits_again_and_again_from_one_address_does_not_fill_the_server() -> None:
    reg = Registry(Mailbox(":memory:", b"s" * 16), max_clients=3)
    for n in range(9):
        assert reg.claim(f"visitor{n}", ("192.0.2.1", 1), None) == GRANTED
        reg.admit(float(n), bytes([n]) * 16, f"visitor{n}", ("192.0.2.1", 1), None, n, is_visit=True)
    assert reg.claim("bob", ("192.0.2.2", 2), None) == GRANTED


def test_who_has_mail_and_registers_as_many_from_one_address_does_not_fill_the_server() -> None:
    reg = Registry(Mailbox(":memory:", b"s" * 16), max_clients=3)
    address = "192.0.2.1", 1
    for n in range(9):
        reg.deregister(reg.admit(0.0, bytes([n]) * 16, f"nick{n}", address, None, n), 0.0)
        assert reg.keep(f"nick{n}", "eve", n, Parcel(1, ["hello"], [0.0], ())) == 1
    assert reg.mailbox.commit(0.0)
    for n in range(9):
        assert reg.claim(f"nick{n}", address, None) == GRANTED
        reg.admit(1.0, bytes([n]) * 15 + b"x", f"nick{n}", address, None, 100 + n)
    assert reg.claim("bob", ("192.0.2.2", 2), None) == GRANTED
