"""Nicks that look alike: which count as the same, who gets them, and how a user may spell them.

First the rules on arguments alone, then the table and the registry, the simulated world, and real processes.
"""
from __future__ import annotations

import json
import os
import socket
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from home import Mailbox
from protocol import GONE, OFFLINE, ONLINE, Decoder, Mirror, Spellings, Table, encode, folded, is_nick, mixes_scripts
from registry import DAY, FULL, GRANTED, OWNED, PROBE_HOLDER, Registry, SaveVerdict
from tests.processes import (EXITING, MAIL_NOTICE, NOT_RESPONDING, OFFLINE as BYE_LINE, SAVED, WELCOME, Chat, Process,
                             is_offline, received)
from tests.second_client import SecondClient
from tests.simulate import Weather, World
from tests.test_strangers import EVE, Desk, home

NOW = 1000.0      # s that the server has run
A, B = ("192.0.2.1", 5000), ("192.0.2.2", 5000)
WIDE_BOB, STRANGE_BOB, BOLD_BOB = "\uff22\uff2f\uff22", "b\u043eb", "\U0001d41b\U0001d428\U0001d41b"


# --- which count as the same ----------------------------------------------------------------------------------

@pytest.mark.parametrize("one, other", [
    ("bob", "BOB"), ("bob", "Bob"), ("x_.-9", "X_.-9"), ("zoë", "ZOË"), ("боб", "БОБ"), ("straße", "STRAẞE"),
    ("bob", WIDE_BOB), ("bob7", "bob\uff17"), ("\uff76\uff9e\uff70\uff84\uff9e", "ガード"),
    ("ΟΔΟΣ", "οδος"), ("οδοσ", "οδος"), ("ΟΔΟΣ.x", "οδος.X"),
    ("bob", BOLD_BOB), ("bob", "ᵇᵒᵇ"), ("ﬁn", "FIN"), ("\u00b5", "\u039c"), ("a", "ª"), ("ǅ", "Ǆ"),   # not in RFC 8265
    ("한", "한\u3164"), ("한", "\uffa0한"), ("가", "\u1100\u3164\u1161")])       # with fillers that nobody sees
def test_nicks_that_differ_in_case_width_or_composition_are_the_same(one: str, other: str) -> None:
    assert is_nick(one) and is_nick(other)
    assert folded(one) == folded(other)
    assert list(Spellings([one]).of(other)) == [one] and Spellings([other]).only(one) == other


@pytest.mark.parametrize("one, other", [
    ("bob", "b0b"), ("bob", "bobo"), ("a.b", "a-b"), ("a", "ä"), ("straße", "strasse"), ("i", "ı"), ("i", "İ"),
    ("a", "\u0430"), ("ガ", "カ"), ("あ", "ア"), ("7", "٧")])
def test_nicks_that_differ_in_anything_else_are_others(one: str, other: str) -> None:
    assert is_nick(one) and is_nick(other)
    assert folded(one) != folded(other)


LETTERS = st.characters(whitelist_categories=("Lu", "Ll", "Lt", "Lm", "Lo", "Nd"), whitelist_characters="_.-")
TRICKY = st.sampled_from("bB\uff22бБΣσςİiı\uff76\uff9eカ\u3164\u1100\u1161\u00b5")
NICKS = (st.text(LETTERS | TRICKY, min_size=1, max_size=32) | st.text(TRICKY, min_size=1, max_size=4)).map(
    lambda text: unicodedata.normalize("NFC", text)).filter(is_nick)


@given(NICKS)
def test_what_is_folded_stays_as_it_is(nick: str) -> None:
    assert folded(folded(nick)) == folded(nick)


@given(NICKS)
def test_every_spelling_of_a_nick_finds_it(nick: str) -> None:
    spellings = [unicodedata.normalize(form, nick) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    spellings += ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in nick), nick.lower()]
    if nick.upper().lower() == nick.lower():        # not ß, and the like
        spellings.append(nick.upper())
    for spelling in spellings:
        assert Spellings([nick]).only(spelling) == nick


@given(NICKS, NICKS)
def test_two_nicks_are_the_same_for_each_other_or_not_at_all(one: str, other: str) -> None:
    assert (list(Spellings([one]).of(other)) == [one]) == (list(Spellings([other]).of(one)) == [other])


# --- scripts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nick", [
    "bob", "b0b_.-", "zoë", "боб", "οδός", "боб7", "_", "7", "٧", "م٧", "日本語", "山田のノート", "佐々木", "ラーメン",
    "\uff97\uff70\uff92\uff9d", "한漢字", "ㄅ一", "kaʼbimi", WIDE_BOB, BOLD_BOB, "กำ", "\u00b5ε", "bob\uff17", "éª"])
def test_letters_of_one_script_go_together(nick: str) -> None:
    assert is_nick(nick) and not mixes_scripts(nick)


@pytest.mark.parametrize("nick", [
    STRANGE_BOB, "\u0440aypal", "\u03b1lice", "\u0430\u03b1", "日x", "ラx", "\uff97x", "한x", "한の", "ㄅの", "ㄅ한",
    "bob\u3164", "\u00b5m", "𝐛\u043e𝐛", "b০b", "б٥б", "աa"])
def test_letters_of_different_scripts_do_not(nick: str) -> None:
    assert is_nick(nick) and mixes_scripts(nick)


@given(NICKS)
def test_whatever_a_nick_is_both_rules_say_something(nick: str) -> None:
    assert mixes_scripts(nick) in (True, False)
    if nick.isascii():
        assert not mixes_scripts(nick)


# --- the table ------------------------------------------------------------------------------------------------

def test_a_table_finds_the_exact_nick_or_else_the_only_one_that_counts_as_the_same() -> None:
    table = Table()
    table.set("bob", *A, ONLINE)
    assert [table.spelling_of(nick) for nick in ("bob", "BOB", WIDE_BOB)] == ["bob"] * 3
    assert [table.spelling_of(nick) for nick in ("bo", STRANGE_BOB)] == [None] * 2
    table.set("Bob", *B, OFFLINE)
    assert [table.spelling_of(nick) for nick in ("bob", "Bob", "BOB")] == ["bob", "Bob", None]
    table.set("bob", *A, GONE)
    assert [table.spelling_of(nick) for nick in ("bob", "Bob", "BOB")] == ["Bob"] * 3
    table.set("Bob", *A, GONE)
    assert table.spelling_of("BOB") is None


def test_of_two_old_nicks_the_one_that_is_only_composed_in_another_way_is_exact() -> None:
    table = Table()
    table.set("zoë", *A, ONLINE)
    table.set("ZOË", *A, ONLINE)
    assert [table.spelling_of(nick) for nick in ("zoe\u0308", "ZOE\u0308", "Zoë")] == ["zoë", "ZOË", None]


def test_whatever_changes_a_table_and_its_mirror_find_the_same_nicks() -> None:
    random, table, mirror = Random(3), Table(), Mirror()
    nicks = ["bob", "Bob", "BOB", WIDE_BOB, "zoë", "ZOË", "eve", STRANGE_BOB]
    mirror.begin_session(1, 0)
    for turn in range(500):
        since = table.version
        for nick in random.sample(nicks, 2):
            table.set(nick, *A, random.choice([ONLINE, OFFLINE, GONE, GONE]))
        for page in table.pages(0 if turn % 50 == 0 else since, 40):
            mirror.apply(page)
        if turn == 250:
            mirror.begin_session(2, table.version)
            for page in table.pages(0, 40):
                mirror.apply(page)
        for nick in [*nicks, "x"]:
            alike = [known for known in table.entries if folded(known) == folded(nick)]
            wanted = nick if nick in alike else alike[0] if len(alike) == 1 else None
            assert table.spelling_of(nick) == mirror.table.spelling_of(nick) == wanted
            assert sorted(table.spellings.of(nick)) == sorted(mirror.table.spellings.of(nick)) == sorted(alike)
    for nick in list(table.entries):
        table.set(nick, *A, GONE)
    assert not table.spellings._alike, "nothing is left of nicks that are gone"


# --- who gets them --------------------------------------------------------------------------------------------

def new_registry(*nicks: str, max_known: int = 100) -> Registry:
    """Return a registry in whose store these nicks are, as an older server may have left them."""
    mailbox = Mailbox(":memory:", b"s" * 16)
    for number, nick in enumerate(nicks):
        mailbox.add(nick, *A, None, NOW + number)
    return Registry(mailbox, max_known=max_known)


def admit(reg: Registry, nick: str, token: bytes | None = None) -> Any:
    """Register a nick that is granted."""
    assert reg.claim(nick, A, token) == GRANTED
    return reg.admit(NOW, os.urandom(16), nick, A, token, int.from_bytes(os.urandom(7), "big"))


def test_another_spelling_of_a_known_nick_is_refused_to_everybody() -> None:
    reg = new_registry()
    session = admit(reg, "bob", b"token")
    for nick in ("Bob", WIDE_BOB, BOLD_BOB):
        assert {reg.claim(nick, address, token) for address in (A, B) for token in (None, b"token")} == {OWNED}
    assert reg.claim("bob", B, b"token") == PROBE_HOLDER
    reg.deregister(session, NOW)
    assert (reg.claim("BOB", A, b"token"), reg.claim("bob", A, b"token")) == (OWNED, GRANTED)


def test_a_new_nick_that_mixes_scripts_is_refused_and_one_that_is_known_is_not() -> None:
    reg = new_registry("\u0430lice")
    assert reg.claim(STRANGE_BOB, A, None) == OWNED
    assert reg.claim("\u0430lice", A, None) == GRANTED
    assert reg.forget("\u0430lice")
    assert reg.claim("\u0430lice", A, None) == OWNED


def test_a_store_with_nicks_that_look_alike_goes_on_with_them_and_takes_no_more() -> None:
    reg = new_registry("bob", "Bob")
    assert [reg.claim(nick, A, None) for nick in ("bob", "Bob", "BOB")] == [GRANTED, GRANTED, OWNED]
    assert reg.forget("bob")
    assert (reg.claim("bob", A, None), reg.claim("Bob", A, None)) == (OWNED, GRANTED)
    assert reg.forget("Bob")
    assert reg.claim("BOB", A, None) == GRANTED


def test_a_nick_that_was_forgotten_has_lapsed_or_gave_way_is_free_in_every_spelling() -> None:
    reg = new_registry("bob", max_known=1)
    assert reg.claim("BOB", A, None) == OWNED
    assert [known.nick for known in reg.lapse(NOW + 91 * DAY, 90.0)] == ["bob"]
    admit(reg, "BOB")
    assert reg.claim("bob", A, None) == OWNED
    reg = new_registry("bob", max_known=1)
    assert reg.claim("BOB", A, None) == OWNED
    admit(reg, "eve")
    assert set(reg.mailbox.known) == {"eve"}
    reg.deregister(reg.sessions.by_nick["eve"], NOW)
    admit(reg, "BOB")
    assert set(reg.mailbox.known) == set(reg.table.entries) == {"BOB"}
    reg.deregister(reg.sessions.by_nick["BOB"], NOW)
    assert reg.forget("BOB") and reg.claim("bob", A, None) == GRANTED


def test_a_server_without_room_refuses_what_looks_alike_for_that_reason_first() -> None:
    reg = new_registry("bob", max_known=1)
    admit(reg, "bob")
    assert (reg.claim("eve", B, None), reg.claim("BOB", B, None)) == (FULL, OWNED)


def test_a_message_for_another_spelling_is_for_nobody_on_the_wire() -> None:
    assert new_registry("bob").judge("BOB", relay=True) is SaveVerdict.UNKNOWN


def test_a_refusal_names_the_registered_spelling_if_it_is_another_and_the_only_one() -> None:
    desk = Desk()
    desk.register("bob", home(1), b"b" * 32)

    def spelling(nick: str) -> object:
        info = dict(desk.ask_for(nick, EVE, b"e" * 32))["refused"]
        assert (info["nick"], info["reason"]) == (nick, "owned")
        return info.get("spelling")

    assert [spelling(nick) for nick in ("bob", "BOB", WIDE_BOB, STRANGE_BOB)] == [None, "bob", "bob", None]
    desk.registry.mailbox.add("Bob", *home(2), None, NOW)      # as an older server may have left it
    desk.registry.table.set("Bob", *home(2), OFFLINE)
    assert [spelling(nick) for nick in ("bob", "BOB")] == [None, None]


# --- the simulated world --------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(10))
def test_an_owner_gets_the_registered_spelling_though_the_network_loses_and_repeats(seed: int) -> None:
    world = World(seed)
    world.start_server()
    secret = b"b" * 32
    world.client("bob", secret=secret).end_input()
    world.run(5)
    world.network.weather = Weather(loss=0.2, repeat=0.3, late=0.2, lateness=1.0)
    life = world.client("BOB", secret=secret, stay=True)
    world.run(20)
    if not life.alive:                      # it was unlucky five times
        assert life.lines == [NOT_RESPONDING, EXITING]
        return
    world.network.weather = Weather()
    world.run(20)
    assert world.server is not None and set(world.server.server.registry.table.entries) == {"bob"}
    assert life.client.nick == "bob" and life.client.table_sync.table.is_online("bob")


# --- real processes -------------------------------------------------------------------------------------------

def other(chat: Chat) -> tuple[str, str]:
    """Return the option that makes a client somebody else."""
    return "--identity", str(chat.directory / "other")


def objects(process: Process) -> list[dict[str, Any]]:
    """Return what a client with ``--json`` has said."""
    return [json.loads(line) for line in process.lines]


def old_store(chat: Chat, *nicks: str) -> None:
    """Make a store with these nicks, as an older server may have left them."""
    mailbox = Mailbox(str(chat.store), os.urandom(16))
    for nick in nicks:
        mailbox.add(nick, "127.0.0.1", 9, None, NOW)
    assert mailbox.commit(NOW)
    mailbox.close()


def test_the_owner_who_comes_with_another_spelling_is_registered_as_before(chat: Chat) -> None:
    chat.absent("bob")
    bob, alice = chat.clients("BOB", "alice")
    bob.wait_for("alice")
    assert set(alice.roster()) == set(bob.roster()) == {"alice", "bob"}
    alice.feed("send bob one\n")
    bob.see("alice: one")
    bob.feed("send alice two\n")
    alice.see("bob: two")
    bob.see(received("alice"))
    bob.feed("send BoB three\n")
    bob.see("bob: three", received("bob"))
    bob.feed("dereg Bob\nwho\nreg eve\nreg BOB\n")
    bob.see(BYE_LINE, "[You are offline. Use: reg bob]", "[You can only register as bob.]", WELCOME)
    assert bob.finish() == 0


def test_objects_name_the_registered_spelling_of_oneself_and_of_others(chat: Chat) -> None:
    chat.absent("bob")
    bob, alice = chat.start("Bob", "--json"), chat.client("alice")
    alice.wait_for("bob")
    alice.feed("send BOB hello\n")
    alice.see(received("bob"))
    bob.feed('{"send": "ALICE", "text": "hello", "ref": 7}\n{"send": "ALICES", "text": "x", "ref": 8}\n')
    alice.see("bob: hello")
    assert bob.finish() == 1
    found = {(told["type"], told.get("nick"), told.get("to"), told.get("ref")) for told in objects(bob)}
    assert {("registered", "bob", None, None), ("message", None, "bob", None), ("received", None, "alice", 7),
            ("failed", None, "ALICES", 8), ("left", "bob", None, None)} <= found


@pytest.mark.parametrize("nick", ["Bob", WIDE_BOB, BOLD_BOB, STRANGE_BOB])
def test_what_looks_like_a_nick_of_somebody_else_is_refused(chat: Chat, nick: str) -> None:
    bob = chat.client("bob")
    for options in (other(chat), ("--anonymous",)):
        refused = chat.start(nick, *options)
        assert refused.wait() == 1
        assert refused.lines == [f"[Nickname {nick} belongs to someone else.]", EXITING]
    assert set(bob.roster()) == {"bob"}


def test_a_nick_that_mixes_scripts_is_refused_though_nobody_is_there(chat: Chat) -> None:
    refused = chat.start(STRANGE_BOB, "--json")
    assert refused.wait() == 1
    assert [(told["type"], told.get("reason"), told.get("nick")) for told in objects(refused)] == [
        ("refused", "owned", STRANGE_BOB), ("exiting", None, None)]


def test_a_nick_in_use_is_taken_in_every_spelling(chat: Chat) -> None:
    chat.client("bob")
    second = chat.start("BOB")
    assert second.wait() == 1
    assert second.lines == ["[Nickname BOB is taken.]", EXITING]


def test_a_nick_of_nobody_goes_with_its_mail_to_whoever_comes_with_any_spelling(chat: Chat) -> None:
    chat.client("bob", "--anonymous").finish()
    assert chat.complete("send", "BOB", "hello", "--server", f"127.0.0.1:{chat.port}", "--nick", "alice").lines == [
        is_offline("bob"), SAVED]
    bob = chat.start("Bob", "--anonymous", "--json")
    bob.see_match(r'.*"text": "hello".*')
    assert bob.finish() == 0
    assert ("message", "bob") in [(told["type"], told.get("to")) for told in objects(bob)]


def test_commands_find_a_nick_in_every_spelling_and_lines_name_the_registered_one(chat: Chat) -> None:
    chat.absent("carol")
    bob, alice = chat.clients("bob", "alice")
    alice.feed(f"send {WIDE_BOB} one\nsend CAROL two\ntalk BOB\nthree\n/end\nsend BOBO x\ntalk BOBO\n")
    bob.see("alice: one", "alice: three")
    assert alice.finish() == 1
    for line in (received("bob"), is_offline("carol"), "[Unknown client BOBO.]"):
        assert alice.lines.count(line) == (1 if line == is_offline("carol") else 2)


def test_what_is_handed_back_names_the_registered_spelling(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.wait_for("bob", "offline")
    server.kill()
    alice.feed("send BOB hello\n")
    assert alice.finish() == 1
    assert "send bob hello" in alice.errors


@pytest.mark.parametrize("nicks", ["bob,BOB", f"BOB,bob,{WIDE_BOB}"])
def test_a_message_for_two_spellings_of_one_nick_is_sent_once(chat: Chat, nicks: str) -> None:
    bob = chat.client("bob")
    sender = chat.complete("send", nicks, "hello", "--server", f"127.0.0.1:{chat.port}", "--nick", "alice")
    assert sender.wait() == 0 and sender.lines == [received("bob")]
    assert bob.finish() == 0 and bob.lines.count("alice: hello") == 1


def test_at_a_terminal_a_nick_is_completed_and_prompted_for_as_it_is_registered(chat: Chat) -> None:
    bob = chat.client("bob")
    alice = chat.run_on_terminal("client", "alice", "127.0.0.1", str(chat.port), "0")
    chat.until(lambda: b"updated" in alice.out.data, "alice to be online")
    alice.feed("send BO\thello\r")
    bob.see("alice: hello")
    alice.feed("talk BOB\r")
    chat.until(lambda: b"to bob> " in alice.out.data, "the prompt of a talk")
    alice.feed("/dereg ALI\t\r")
    chat.until(lambda: b"Offline. Bye." in alice.out.data, "alice to be offline")


def test_nicks_that_look_alike_in_an_old_store_keep_working_and_no_other_comes(chat: Chat) -> None:
    old_store(chat, "bob", "Bob", "\u0430lice")
    small, big = chat.client("bob"), chat.client("Bob", *other(chat))
    small.wait_for("Bob")
    small.feed("send Bob one\nsend BOB two\ntalk BOB\n")
    big.see("bob: one")
    small.see("[Unknown client BOB.]", "[Unknown client BOB.]")
    small.feed("dereg Bob\ndereg BOB\ndereg bob\n")
    small.see("[You can only deregister yourself.]", "[You can only deregister yourself.]", BYE_LINE)
    refused = chat.start("BOB")
    assert refused.wait() == 1 and refused.lines[0] == "[Nickname BOB belongs to someone else.]"
    assert chat.client("\u0430lice").finish() == 0
    sender = chat.complete("send", "bob,Bob", "both", "--server", f"127.0.0.1:{chat.port}", "--nick", "eve",
                           "--secure", "off", environment={"XDG_STATE_HOME": str(chat.directory / "eve")})
    assert sorted(sender.lines) == sorted([is_offline("bob"), SAVED, received("Bob")])
    sender = chat.complete("send", "bob,Bob", "both", "--server", f"127.0.0.1:{chat.port}", "--nick", "mallory",
                           environment={"XDG_STATE_HOME": str(chat.directory / "mallory")})
    other_key = "[The key of Bob has changed, message not sent.]"
    assert sorted(sender.lines) == sorted([is_offline("bob"), SAVED, other_key]), "its first key counts for all"
    small.feed("reg bob\n")
    small.see(MAIL_NOTICE)


def test_a_nick_is_forgotten_in_every_spelling_if_there_is_only_one(chat: Chat) -> None:
    old_store(chat, "bob", "Bob", "eve")
    several = chat.complete("server", "--store", str(chat.store), "--forget", "BOB")
    assert several.wait() == 1 and several.errors == ["udpchat: BOB is not known: is it bob or Bob?"]
    for nick, forgotten in (("Bob", "Bob"), ("BOB", "bob"), ("EVE", "eve")):
        done = chat.complete("server", "--store", str(chat.store), "--forget", nick)
        assert done.wait() == 0 and f"{forgotten} is forgotten" in done.errors[0]
    nobody = chat.complete("server", "--store", str(chat.store), "--forget", "BOB")
    assert nobody.wait() == 1 and nobody.errors == ["udpchat: BOB is not known"]
    assert chat.client("BOB").finish() == 0
    assert chat.start("bob", *other(chat)).wait() == 1


def test_a_client_that_knows_no_spellings_is_refused_and_works_with_its_own(chat: Chat) -> None:
    """Such as one that is older than this server."""
    chat.client("bob", "--anonymous").finish()
    lines: list[str] = []
    for nick in ("BOB", "bob"):
        client = SecondClient(nick, ("127.0.0.1", chat.port), lines.append)

        def is_answered(client: SecondClient = client) -> bool:
            client.step(0.01)
            return bool(lines)

        chat.until(is_answered, f"an answer to {nick}")
        client.socket.close()
        assert lines == [{"BOB": "[Refused: owned]", "bob": "[Online]"}[nick]]
        lines.clear()


# --- a server that lies ---------------------------------------------------------------------------------------

class LyingServer:
    """Refuses everybody, and says each time that the nick is registered as the next of ``spellings``."""

    def __init__(self, *spellings: str) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        self.spellings = list(spellings)
        self.asked: list[str] = []      # for which nicks, with a cookie

    def work(self) -> None:
        """Answer what has come."""
        try:
            datagram, source = self.socket.recvfrom(65535)
        except BlockingIOError:
            return
        for _, info in Decoder().decode(datagram):
            answer = encode("cookie", {"id": info["id"], "server": b"s" * 16, "cookie": b"c" * 16})
            if "cookie" in info:
                self.asked.append(info["nick"])
                answer = encode("refused", {"id": info["id"], "nick": info["nick"], "reason": "owned",
                                            "spelling": self.spellings[min(len(self.asked), len(self.spellings)) - 1]})
            self.socket.sendto(answer, source)


@pytest.mark.parametrize("spellings, asked", [
    (["eve"], ["bob"]), ([STRANGE_BOB], ["bob"]), (["bob"], ["bob"]),
    (["BOB"], ["bob", "BOB"]), (["BOB", "Bob", "bOB"], ["bob", "BOB"]), (["Bob", "bob"], ["bob", "Bob"])])
def test_a_client_asks_once_more_and_only_for_what_counts_as_its_nick(chat: Chat, spellings: list[str],
                                                                      asked: list[str]) -> None:
    server = LyingServer(*spellings)
    client = chat.start("bob", port=server.port)

    def has_ended() -> bool:
        server.work()
        return client.popen.poll() is not None

    chat.until(has_ended, "the end of the client")
    server.socket.close()
    assert client.wait() == 1
    assert client.lines == ["[Nickname bob belongs to someone else.]", EXITING]
    assert server.asked == asked


def test_a_client_that_was_online_keeps_its_spelling(chat: Chat, tmp_path: Path) -> None:
    """Others know it as it is: it ends, if a server that has started anew has its nick in another spelling."""
    server = chat.server("--secure", "off")      # in plain: another store means another key
    chat.absent("alice")
    bob = chat.client("bob")
    bob.wait_for("alice", "offline")
    server.kill()
    mailbox = Mailbox(str(tmp_path / "new.db"), os.urandom(16))
    mailbox.add("BOB", "127.0.0.1", 9, None, NOW)
    assert mailbox.commit(NOW)
    mailbox.close()
    chat.server("--secure", "off", port=chat.port, store=str(tmp_path / "new.db"))
    bob.feed("send alice hello\n")      # the server knows no such session: bob need not wait for the next ping
    assert bob.wait() == 1
    assert bob.lines[-3:] == ["[Nickname bob belongs to someone else.]", "[1 message not delivered.]", EXITING]
