"""How clients encrypt for each other: ``Peers`` on arguments alone, the simulated world, and real processes."""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import secure
from home import KnownKeys
from protocol import (GREET_SIZE, MAX_DATAGRAM, MAX_HELLO, ONLINE, REPLAY_WINDOW, Address, Decoder, encode, folded,
                      is_nick, padded)
from secure import (OFFER_INTERVAL, OFFER_TIME, OFFERS_READ, UNUSED_CHANNELS, USED_CHANNELS, WAITING, HandshakeState,
                    KeyPair, Keys, Peers, Sodium, load_sodium)
from tests.processes import PROGRAM, WELCOME, Chat, Process, received
from tests.simulate import SERVER, Life, Router, Weather, World
from tests.test_secrecy import Wire, encrypted

SODIUM = load_sodium()
pytestmark = pytest.mark.skipif(SODIUM is None, reason="the extra secure is not installed")

SERVER_KEY = b"k" * 32
HOMES = {"alice": ("192.0.2.1", 5001), "bob": ("192.0.2.2", 5002), "carol": ("192.0.2.3", 5003)}
ELSEWHERE = ("198.51.100.9", 9)
HELLO = encode("chat", {"from": "alice", "to": "bob", "stream": 7, "n": 1, "base": 1, "text": ["hello"]})
Sent = tuple[bytes, Address]


class User:
    """One client's ``Peers``: what it sends is in ``sent``."""

    def __init__(self, nick: str, table: dict[str, bytes], must_encrypt: bool = False, seed: int = 0) -> None:
        """``table``: the key of each nick, as the client table says it; b"": that one speaks in plain."""
        pick = random.Random(f"{nick} {seed}")
        sodium = some_sodium()
        self.nick, self.now, self.table = nick, 100.0, table
        self.keys = Keys(sodium, KeyPair(sodium, pick.randbytes(32)), lambda: pick.randbytes(32))
        self.sent: list[Sent] = []
        self.told: list[str] = []
        numbers = itertools.count(pick.getrandbits(40))
        self.peers = Peers(self.keys, lambda datagram, address: self.sent.append((datagram, address)),
                           lambda: self.now, lambda: next(numbers), must_encrypt)
        self.peers.me, self.peers.server_key = nick, SERVER_KEY
        self.peers.shown_of = lambda nick: (table[nick], True) if nick in table else None
        self.peers.is_at = lambda nick, address: HOMES.get(nick) == address
        self.peers.on_plain = self.told.append

    def take(self) -> list[Sent]:
        """Return what was sent since the last time."""
        sent, self.sent = self.sent, []
        return sent

    def get(self, datagram: bytes, address: Address) -> list[tuple[str, bytes]]:
        """Let a datagram come; return who has sealed what, if it was a record."""
        if datagram[:1] == b"\xc1":
            found = self.peers.opened(datagram, address)
            return [found] if found is not None else []
        for tag, info in Decoder().decode(datagram):
            if tag == "offer":
                self.peers.on_offer(info, address)
            elif tag == "accept":
                self.peers.on_accept(info, address)
        return []


def some_sodium() -> Sodium:
    assert SODIUM is not None
    return SODIUM


def users(*nicks: str, **options: bool) -> list[User]:
    table: dict[str, bytes] = {}
    found = [User(nick, table, **options) for nick in nicks]
    table.update({user.nick: user.keys.pair.public for user in found})
    return found


def carry(*everybody: User, rounds: int = 8) -> list[tuple[str, str, bytes]]:
    """Carry datagrams between users until nothing is left: return (to, from, what)."""
    got = []
    for _ in range(rounds):
        for user in everybody:
            for datagram, address in user.take():
                for other in everybody:
                    if HOMES[other.nick] == address:
                        got += [(other.nick, *found) for found in other.get(datagram, HOMES[user.nick])]
    return got


def channel_between(alice: User, bob: User) -> None:
    """Let both send in one channel."""
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", HELLO)]
    bob.peers.send("alice", b"back", HOMES["alice"])
    assert carry(alice, bob) == [("alice", "bob", b"back")]


def tags(sent: list[Sent]) -> list[str]:
    """Return what was sent in plain, and "record" for what was not."""
    return [tag for datagram, _ in sent for tag in (
        ["record"] if datagram[:1] == b"\xc1" else [tag for tag, _ in Decoder().decode(datagram)])]


# --- who is spoken to how -------------------------------------------------------------------------------------

def test_what_is_to_be_sent_waits_for_the_key_and_for_the_channel() -> None:
    alice, bob = users("alice", "bob")
    key = alice.table.pop("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert not alice.sent and not alice.peers.takes_plain("bob"), "not before it is known how bob is spoken to"
    alice.table["bob"] = key
    alice.peers.on_news("bob")
    assert tags(alice.sent) == ["offer"]
    (offer, _), = alice.take()
    bob.get(offer, HOMES["alice"])
    assert tags(bob.sent) == ["accept"]
    (accept, _), = bob.take()
    alice.get(accept, HOMES["bob"])
    (record, address), = alice.take()
    assert bob.get(record, HOMES["alice"]) == [("alice", HELLO)] and address == HOMES["bob"]
    assert b"hello" not in record and b"alice" not in offer + accept + record


def test_an_answer_is_never_larger_than_the_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure.offer_prologue", lambda server, to, id_: b"")   # whoever is called
    longest = "\U00020000" * 24     # 96 bytes
    alice, bob = users("alice", "bob")
    for user in (alice, bob):
        user.peers.me = longest
    alice.peers.send("bob", HELLO, HOMES["bob"])
    (offer, _), = alice.take()
    bob.peers.is_at = lambda nick, address: True
    bob.table[longest] = alice.keys.pair.public
    bob.peers.me = "bob"        # who is called; the longest nick is in the answer, too
    alice_says, = Decoder().decode(offer)
    bob.peers.me = longest
    bob.peers.on_offer(alice_says[1], HOMES["alice"])
    (accept, _), = bob.take()
    assert len(accept) <= len(offer) <= MAX_HELLO
    assert len(padded("greet", {"from": longest, "index": b"1234"}, GREET_SIZE)) == GREET_SIZE


def test_somebody_without_a_key_is_spoken_to_in_plain_and_that_is_said_once() -> None:
    alice, = users("alice")
    alice.table["bob"] = b""
    alice.peers.send("bob", HELLO, HOMES["bob"])
    alice.peers.send("bob", b"again", HOMES["bob"])
    assert alice.take() == [(HELLO, HOMES["bob"]), (b"again", HOMES["bob"])] and alice.told == ["bob"]
    assert alice.peers.takes_plain("bob")


def test_nothing_goes_in_plain_and_nothing_plain_counts_if_that_must_not_be() -> None:
    alice, = users("alice", must_encrypt=True)
    alice.table["bob"] = b""
    for _ in range(2):
        alice.peers.send("bob", HELLO, HOMES["bob"])
        alice.peers.answer("bob", b"ack", HOMES["bob"])
    assert not alice.take() and not alice.peers.takes_plain("bob")
    assert alice.peers.refusal("bob") == "not-secure" and alice.peers.refusal("nobody") == "not-secure"


def test_nothing_plain_is_taken_from_somebody_whose_key_is_known() -> None:
    alice, _ = users("alice", "bob")
    assert not alice.peers.takes_plain("bob")
    assert not alice.peers.takes_plain("bob")


def test_who_was_without_a_key_may_have_one_later() -> None:
    alice, bob = users("alice", "bob")
    alice.table["bob"] = b""
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert alice.take() == [(HELLO, HOMES["bob"])]
    alice.table["bob"] = bob.keys.pair.public
    alice.peers.on_news("bob")
    assert not alice.peers.takes_plain("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", HELLO)]


def test_a_key_that_has_changed_ends_every_channel_with_the_old_one() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    alice.table["bob"] = User("bob", {}, seed=1).keys.pair.public
    alice.peers.on_news("bob")
    bob.peers.send("alice", b"I was bob", HOMES["alice"])
    assert ("alice", "bob", b"I was bob") not in carry(alice, bob)
    alice.take()
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert "record" not in tags(alice.sent)


def test_a_nick_that_is_nobodys_loses_its_channels_when_its_client_goes() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    key = alice.table.pop("bob")
    alice.peers.on_news("bob")
    bob.peers.send("alice", b"still here?", HOMES["alice"])
    assert carry(alice, bob) == []
    alice.table["bob"] = key
    alice.peers.on_news("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert tags(alice.sent) == ["offer"]


def test_news_that_say_nothing_of_the_key_leave_the_channels_alone() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    alice.peers.on_news("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert tags(alice.sent) == ["record"] and carry(alice, bob) == [("bob", "alice", HELLO)]


def test_a_key_that_nobody_can_have_is_not_called() -> None:
    alice, = users("alice")
    alice.table["bob"] = bytes(32)
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert not alice.sent


# --- keys that are remembered ---------------------------------------------------------------------------------

def with_other_keys(alice: User, bob: User) -> User:
    """Return another bob, with another key, after alice has met the first one."""
    channel_between(alice, bob)
    assert (alice.peers.refusal("bob"), bool(alice.peers.key_of("bob"))) == ("", True)
    other = User("bob", alice.table, seed=1)
    alice.table["bob"] = other.keys.pair.public
    alice.peers.on_news("bob")
    return other


def test_another_key_than_that_of_the_first_contact_is_refused_until_the_user_trusts_it() -> None:
    alice, bob = users("alice", "bob")
    other = with_other_keys(alice, bob)
    assert alice.peers.refusal("bob") == "key-changed" and alice.peers.key_of("bob") is None
    other.peers.send("alice", b"I am bob", HOMES["alice"])
    assert carry(alice, other) == [] and not alice.peers.takes_plain("bob")
    other.take()
    digits = alice.peers.trust("bob")
    assert digits == other.peers.digits("alice") != bob.peers.digits("alice")
    assert (alice.peers.refusal("bob"), bool(alice.peers.key_of("bob"))) == ("", True)
    channel_between(alice, User("bob", alice.table, seed=1))


def test_what_was_refused_is_not_sent_when_the_key_is_trusted_later() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    alice.peers.on_news("bob")
    key = alice.table.pop("bob")
    alice.peers.on_news("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    other = User("bob", alice.table, seed=1)
    alice.table["bob"] = other.keys.pair.public
    alice.peers.on_news("bob")
    assert alice.peers.trust("bob") and carry(alice, other) == [] and key != alice.table["bob"]


@pytest.mark.parametrize("shown", [None, (b"", False), "unbound"])
def test_whose_key_is_remembered_is_spoken_to_by_that_key_alone(shown: tuple[bytes, bool] | str | None) -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    answer = (bob.keys.pair.public, False) if shown == "unbound" else shown
    alice.peers.shown_of = lambda nick: answer      # type: ignore[assignment,return-value]
    alice.peers.on_news("bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert alice.peers.refusal("bob") == "key-changed" and not alice.take() and not alice.peers.takes_plain("bob")
    assert alice.peers.verify("bob") == "not-the-key" and not alice.peers.trust("bob")


def test_a_key_of_a_session_alone_is_not_remembered() -> None:
    alice, bob = users("alice", "bob")
    alice.peers.shown_of = lambda nick: (alice.table[nick], False)
    channel_between(alice, bob)
    alice.table["bob"] = User("bob", {}, seed=1).keys.pair.public
    alice.peers.on_news("bob")
    assert (alice.peers.refusal("bob"), bool(alice.peers.key_of("bob"))) == ("", True)
    assert alice.peers.verify("bob") == "no-key"


def test_both_see_the_same_digits_and_nobody_else_does() -> None:
    alice, bob, carol = users("alice", "bob", "carol")
    assert alice.peers.digits("bob") == bob.peers.digits("alice")
    others = {alice.peers.digits("carol"), bob.peers.digits("carol"), alice.peers.digits(""), bob.peers.digits("")}
    assert len(others | {alice.peers.digits("bob")}) == 5 and carol.peers.digits("nobody") == ""


def test_a_key_is_verified_until_it_changes() -> None:
    alice, bob = users("alice", "bob")
    assert not alice.peers.is_verified("bob") and alice.peers.verify("bob") == ""
    assert alice.peers.is_verified("BOB".lower()) and alice.peers.verify("nobody") == "no-key"
    other = with_other_keys(alice, bob)
    assert not alice.peers.is_verified("bob") and alice.peers.trust("bob") == other.peers.digits("alice")
    assert not alice.peers.is_verified("bob"), "the user has not compared this one"


def test_another_spelling_is_no_other_nick_but_may_be_trusted_apart() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    alice.table["Bob"] = User("Bob", {}, seed=1).keys.pair.public
    assert alice.peers.refusal("Bob") == "key-changed" and not alice.peers.refusal("bob")
    assert alice.peers.trust("Bob") and not alice.peers.refusal("Bob") and not alice.peers.refusal("bob")
    assert alice.peers.refusal("BOB") == "key-changed"


def test_keys_are_remembered_for_each_server_and_nick_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "state" / "known"
    known = KnownKeys(str(file))
    known.add_server("h:1", b"s" * 32)
    known.add_peer(b"s" * 32, "bob", b"1" * 32, False)
    known.add_peer(b"t" * 32, "bob", b"2" * 32, True)
    known.add_peer(b"s" * 32, "bob", b"3" * 32, True)
    again = KnownKeys(str(file))
    assert again.server("h:1") == b"s" * 32 and again.peer(b"s" * 32, "alice") is None
    assert again.peer(b"s" * 32, "bob") == (b"3" * 32, True) and again.peer(b"t" * 32, "bob") == (b"2" * 32, True)
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("nick", ["\ufdfa", "\u037a", "\u3164"])
def test_no_nick_that_somebody_may_register_makes_the_file_of_keys_unreadable(nick: str, tmp_path: Path) -> None:
    assert is_nick(nick) and folded(nick).split(" ") != [nick]
    path = str(tmp_path / "known")
    known = KnownKeys(path)
    known.add_peer(SERVER_KEY, folded(nick), b"k" * 32, False)
    known.add_peer(SERVER_KEY, "bob", b"b" * 32, True)
    again = KnownKeys(path)
    assert again.peer(SERVER_KEY, folded(nick)) == (b"k" * 32, False)
    assert again.peer(SERVER_KEY, "bob") == (b"b" * 32, True)


def test_no_more_keys_are_noted_than_a_later_start_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("home.KNOWN_LIMIT", 3000)
    path = str(tmp_path / "known")
    known = KnownKeys(path)
    for number in range(100):
        with contextlib.suppress(OSError):
            known.add_peer(SERVER_KEY, f"nick{number}", b"k" * 32, False)
    assert known.peer(SERVER_KEY, "nick99") == (b"k" * 32, False), "it counts as long as the program runs"
    again = KnownKeys(path)
    assert again.peer(SERVER_KEY, "nick0") and not again.peer(SERVER_KEY, "nick99")


def test_a_line_of_which_only_a_part_could_be_written_is_marked_by_the_next_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, others = KnownKeys(str(tmp_path / "known")), KnownKeys(str(tmp_path / "known"))
    known.add_peer(b"s" * 32, "bob", b"1" * 32, False)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:40]))
    with pytest.raises(OSError):
        known.add_peer(b"s" * 32, "carol", b"2" * 32, False)
    monkeypatch.undo()
    others.add_peer(b"s" * 32, "dave", b"3" * 32, False)
    known.add_peer(b"s" * 32, "erin", b"4" * 32, False)
    again = KnownKeys(str(tmp_path / "known"))
    keys = [again.peer(b"s" * 32, nick) for nick in ("bob", "carol", "dave", "erin")]
    assert keys == [(b"1" * 32, False), None, (b"3" * 32, False), (b"4" * 32, False)]


# --- handshakes -----------------------------------------------------------------------------------------------

def test_an_offer_is_repeated_byte_for_byte_until_it_is_old() -> None:
    alice, _ = users("alice", "bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    offers = alice.take()
    for _ in range(round(OFFER_TIME * 50)):
        alice.now += 0.02
        alice.peers.send("bob", HELLO, HOMES["bob"])
    offers += alice.take()
    assert len(set(offers)) == 1 and 0.8 * OFFER_TIME <= len(offers) * OFFER_INTERVAL <= OFFER_TIME + OFFER_INTERVAL
    alice.now += OFFER_TIME
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert alice.take()[0] not in offers


def test_the_same_offer_gets_the_same_answer() -> None:
    alice, bob = users("alice", "bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    (offer, _), = alice.take()
    answers = set()
    for _ in range(50):
        bob.get(offer, HOMES["alice"])
        bob.now += 1
        answers.update(bob.take())
    assert len(answers) == 1


def test_an_offer_that_is_replayed_makes_nobody_send_in_another_channel() -> None:
    alice, bob = users("alice", "bob")
    offers = []
    for _ in range(30):
        alice.peers.send("bob", HELLO, HOMES["bob"], is_unanswered=True)
        offers += [datagram for datagram, _ in alice.sent if tags([(datagram, ELSEWHERE)]) == ["offer"]]
        carry(alice, bob)
        alice.now += OFFER_INTERVAL
        bob.now += 1
    bob.peers.send("alice", b"before", HOMES["alice"])
    (before, _), = bob.take()
    for _ in range(35):
        for offer in offers:
            bob.get(offer, HOMES["alice"])
            bob.now += 1 / OFFERS_READ
    bob.take()
    bob.peers.send("alice", b"after", HOMES["alice"])
    (after, _), = bob.take()
    assert before[2:6] == after[2:6], "the same channel"
    assert alice.get(after, HOMES["bob"]) == [("bob", b"after")]
    assert len(offers) > 20 and channels(bob) <= UNUSED_CHANNELS + USED_CHANNELS


def channels(user: User) -> int:
    return len(user.peers._by_index)


def test_an_offer_counts_only_from_where_its_sender_is() -> None:
    alice, bob = users("alice", "bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    (offer, _), = alice.take()
    bob.get(offer, ELSEWHERE)
    assert not bob.sent


def test_nobody_is_called_by_a_nick_whose_key_is_another() -> None:
    alice, bob, carol = users("alice", "bob", "carol")
    carol.peers.me = "alice"
    carol.peers.send("bob", b"I am alice", HOMES["bob"])
    (offer, _), = carol.take()
    for _ in range(2):
        bob.get(offer, HOMES["alice"])
        assert not bob.sent
        bob.now += 1
    channel_between(alice, bob)


@pytest.mark.parametrize("change", [
    lambda bob: setattr(bob.peers, "server_key", b"r" * 32), lambda bob: setattr(bob.peers, "me", "robert")])
def test_an_offer_is_for_one_nick_at_one_server(change: Callable[[User], None]) -> None:
    alice, bob = users("alice", "bob")
    change(bob)
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == []


def test_spellings_of_a_nick_are_one() -> None:
    alice, bob = users("alice", "bob")
    bob.peers.me = "BOB"
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", HELLO)]


def test_both_may_begin_at_once() -> None:
    alice, bob = users("alice", "bob")
    alice.peers.send("bob", b"to bob", HOMES["bob"])
    bob.peers.send("alice", b"to alice", HOMES["alice"])
    assert sorted(carry(alice, bob)) == [("alice", "bob", b"to alice"), ("bob", "alice", b"to bob")]
    for number in range(5):
        text = b"%d" % number
        alice.peers.send("bob", text, HOMES["bob"])
        bob.peers.send("alice", text, HOMES["alice"])
        assert sorted(carry(alice, bob)) == [("alice", "bob", text), ("bob", "alice", text)]


@pytest.mark.parametrize("lost", ["offer", "accept", "record"])
@pytest.mark.parametrize("side", ["alice", "bob"])
def test_both_may_begin_at_once_though_one_side_loses_what_it_says(lost: str, side: str) -> None:
    alice, bob = users("alice", "bob")
    alice.peers.send("bob", b"to bob", HOMES["bob"])
    bob.peers.send("alice", b"to alice", HOMES["alice"])
    got: set[tuple[str, bytes]] = set()
    for _ in range(6):
        for user, other in ((alice, bob), (bob, alice)):
            user.now += OFFER_INTERVAL
            user.peers.send(other.nick, f"to {other.nick}".encode(), HOMES[other.nick], is_unanswered=True)
            for datagram, _ in user.take():
                if tags([(datagram, ELSEWHERE)]) == [lost] and user.nick == side:
                    continue
                got.update((other.nick, text) for _, text in other.get(datagram, HOMES[user.nick]))
    expected = {("alice", b"to alice"), ("bob", b"to bob")}
    assert got >= (expected if lost != "record" else {one for one in expected if one[0] == side})


def test_somebody_who_was_started_anew_is_heard_and_hears() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    bob = User("bob", bob.table)        # the same owner
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [], "he does not know the channel"
    alice.peers.send("bob", HELLO, HOMES["bob"], is_unanswered=True)
    assert ("bob", "alice", HELLO) in carry(alice, bob)
    bob.peers.send("alice", b"back", HOMES["alice"])
    assert carry(alice, bob) == [("alice", "bob", b"back")]


def test_a_client_that_was_started_anew_calls_and_gets_answers_in_the_new_channel() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    bob = User("bob", bob.table)
    bob.peers.send("alice", b"here again", HOMES["alice"])
    assert carry(alice, bob) == [("alice", "bob", b"here again")]
    alice.peers.answer("bob", b"ack", HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", b"ack")]


def test_one_owner_may_have_two_nicks() -> None:
    alice, bob = users("alice", "bob")
    carol = User("carol", alice.table)
    carol.keys.pair = bob.keys.pair
    carol.peers._keys = carol.keys
    alice.table["carol"] = bob.keys.pair.public
    alice.peers.send("bob", b"to bob", HOMES["bob"])
    alice.peers.send("carol", b"to carol", HOMES["carol"])
    assert sorted(carry(alice, bob, carol)) == [("bob", "alice", b"to bob"), ("carol", "alice", b"to carol")]
    bob.peers.send("alice", b"I am bob", HOMES["alice"])
    carol.peers.send("alice", b"I am carol", HOMES["alice"])
    assert sorted(carry(alice, bob, carol)) == [("alice", "bob", b"I am bob"), ("alice", "carol", b"I am carol")]


def test_one_may_speak_to_oneself() -> None:
    alice, = users("alice")
    alice.peers.send("alice", HELLO, HOMES["alice"])
    assert carry(alice) == [("alice", "alice", HELLO)]
    alice.peers.answer("alice", b"ack", HOMES["alice"])
    assert carry(alice) == [("alice", "alice", b"ack")]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_message_of_a_handshake_changes_nothing(data: st.DataObject) -> None:
    alice, bob = users("alice", "bob")
    alice.peers.send("bob", HELLO, HOMES["bob"])
    (offer, _), = alice.take()
    (_, info), = Decoder().decode(offer)
    bob.get(encode("offer", {**info, "message": mutant(data, info["message"])}), HOMES["alice"])
    assert not bob.sent
    bob.now += 1
    bob.get(offer, HOMES["alice"])
    (accept, _), = bob.take()
    (_, info), = Decoder().decode(accept)
    alice.get(encode("accept", {**info, "message": mutant(data, info["message"])}), HOMES["bob"])
    assert not alice.sent
    alice.get(accept, HOMES["bob"])
    (record, _), = alice.take()
    assert bob.get(record, HOMES["alice"]) == [("alice", HELLO)]


def mutant(data: st.DataObject, message: bytes) -> bytes:
    """Return a message with one bit flipped, or cut, or with more behind it."""
    place = data.draw(st.integers(0, len(message) - 1))
    return data.draw(st.sampled_from((
        message[:place] + bytes((message[place] ^ 1 << data.draw(st.integers(0, 7)),)) + message[place + 1:],
        message[:place] or b"x", message + b"\0")))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(("as it is", "flipped", "cut"))), max_size=60))
def test_records_count_once_in_whatever_order_and_shape_they_come(arrivals: list[tuple[int, str]]) -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    for number in range(31):
        alice.peers.send("bob", b"%d" % number, HOMES["bob"])
    records = [record for record, _ in alice.take()]
    got = []
    for number, how in (*arrivals, *((number, "as it is") for number in range(31))):
        record = records[number]
        if how == "flipped":
            record = record[:-1] + bytes((record[-1] ^ 1,))
        got += bob.get(record[:-5] if how == "cut" else record, HOMES["alice"])
    assert sorted(got) == sorted(("alice", b"%d" % number) for number in range(31)) and REPLAY_WINDOW > 31


# --- limits ---------------------------------------------------------------------------------------------------

def test_what_waits_is_bounded() -> None:
    alice, bob = users("alice", "bob")
    for number in range(10 * WAITING):
        alice.peers.send("bob", b"%d" % number, HOMES["bob"])
    assert [text for _, _, text in carry(alice, bob)] == [b"%d" % number for number in range(WAITING)]


def test_offers_that_are_forged_cost_little_and_do_not_keep_others_out() -> None:
    alice, bob = users("alice", "bob")
    reads = 0

    def counted(self: HandshakeState, message: bytes) -> bytes:
        nonlocal reads
        reads += 1
        return original(self, message)

    original = HandshakeState.read
    HandshakeState.read = counted       # type: ignore[method-assign]
    try:
        for number in range(2000):
            bob.peers.on_offer({"id": number, "message": b"x" * 250}, ("198.51.100.1", 1 + number % 3))
    finally:
        HandshakeState.read = original  # type: ignore[method-assign]
    assert reads == 3 * OFFERS_READ
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", HELLO)]


def test_of_too_many_others_the_first_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "PEERS_KEPT", 3)
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    for nick in ("carol", "dave", "erin"):
        alice.peers.send(nick, HELLO, ELSEWHERE)
    alice.take()
    assert not channels(alice) and len(alice.peers._peers) == 3
    alice.now += 1
    alice.peers.send("bob", HELLO, HOMES["bob"])
    assert carry(alice, bob) == [("bob", "alice", HELLO)]


# --- where answers go -----------------------------------------------------------------------------------------

def test_answers_follow_somebody_whose_address_changes_but_not_an_older_record() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    for text in (b"late" * 50, b"new" * 50):
        alice.peers.send("bob", text, HOMES["bob"])
    (late, _), (new, _) = alice.take()
    assert bob.get(new, ELSEWHERE) and bob.get(late, HOMES["alice"])
    bob.peers.answer("alice", b"ack", HOMES["alice"])
    (_, address), = bob.take()
    assert address == ELSEWHERE


def test_no_more_bytes_are_answered_than_came_from_where_nobody_is_known_to_be() -> None:
    alice, bob = users("alice", "bob")
    channel_between(alice, bob)
    alice.peers.send("bob", b"x" * 100, HOMES["bob"])
    (record, _), = alice.take()
    assert bob.get(record, ELSEWHERE) and not bob.get(record, ELSEWHERE)
    for _ in range(20):
        bob.peers.answer("alice", b"y" * 20, HOMES["alice"])
    sent = bob.take()
    assert 0 < sum(len(datagram) for datagram, _ in sent) <= len(record)


def test_a_record_of_one_channel_does_not_speak_for_another() -> None:
    alice, bob, carol = users("alice", "bob", "carol")
    channel_between(alice, bob)
    carol.peers.send("bob", b"from carol", HOMES["bob"])
    assert carry(alice, bob, carol) == [("bob", "carol", b"from carol")]
    carol.peers.send("bob", HELLO, HOMES["bob"])
    (record, _), = carol.take()
    assert bob.get(record, HOMES["alice"]) == [("carol", HELLO)], "whatever address it comes from"


# --- in the simulated world -----------------------------------------------------------------------------------

EVE = ("203.0.113.9", 666)


def words_on(wire: Wire, *words: bytes) -> set[bytes]:
    """Return which of ``words`` anybody can read who reads the wire."""
    return {word for word in words for datagram, _, _ in wire.sent if word in datagram}


def kinds_on(wire: Wire) -> set[str]:
    """Return what clients have said to each other that is not in a record."""
    return {tag for datagram, source, to in wire.sent if SERVER not in (source, to)
            for tag, _ in Decoder().decode(datagram)}


def received_by(life: Life, text: str) -> int:
    """Return how often a text was shown."""
    return sum(line.endswith(text) for line in life.lines)


def test_nobody_on_the_way_between_clients_reads_a_nick_or_a_text() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob a-secret")
    bob.type("send alice b-secret")
    world.run(2)
    assert "alice: a-secret" in bob.lines and "bob: b-secret" in alice.lines
    assert alice.lines[-1] == bob.lines[-1] or alice.lines.count("[Message received by bob.]") == 1
    assert kinds_on(wire) == {"offer", "accept"}
    assert not words_on(wire, b"alice", b"bob", b"secret")


def test_two_behind_routers_meet_in_secret() -> None:
    world = World(1, encrypts=True)
    world.new_router = Router
    wire = Wire(world)
    world.start_server()
    alice, bob = world.client("alice"), world.client("bob")
    world.run(3)
    alice.type("send bob a-secret")
    world.run(3)
    bob.type("send alice b-secret")
    world.run(3)
    assert received_by(bob, "a-secret") == received_by(alice, "b-secret") == 1
    assert "[Message received by bob.]" in alice.lines and "knock" in kinds_on(wire)
    assert not words_on(wire, b"alice", b"bob", b"secret")


def test_clients_chat_in_secret_while_their_server_is_away_though_they_never_have_before() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    assert world.server is not None
    world.server.crash()
    alice.type("send bob a-secret")
    world.run(0.4)
    assert "alice: a-secret" in bob.lines and "[Message received by bob.]" in alice.lines
    assert not words_on(wire, b"alice", b"bob", b"secret")


def test_what_has_waited_for_a_channel_and_went_to_the_server_is_not_sent_again_when_there_is_one() -> None:
    world, _, (alice, bob) = encrypted("alice", "bob")
    bob.crash()
    alice.type("send bob once")
    world.run(5)
    second = world.client("bob")        # elsewhere
    world.run(2)
    second.end_input()
    world.run(2)
    third = world.client("bob", bob.address)
    world.run(1)
    alice.type("send bob again")
    world.run(2)
    assert received_by(second, "once") == received_by(third, "again") == 1 and not received_by(third, "once")


def test_a_first_message_takes_one_round_trip_more_and_no_other() -> None:
    world, _, (alice, bob) = encrypted("alice", "bob")
    world.network.weather = Weather(delay=0.02)
    for text, seconds in (("first", 0.08), ("second", 0.04)):
        began = world.now
        alice.type(f"send bob {text}")
        receipts = alice.lines.count("[Message received by bob.]") + 1
        world.run_until(lambda: alice.lines.count("[Message received by bob.]") == receipts)
        assert world.now - began == pytest.approx(seconds, abs=0.01)


def test_chat_in_plain_from_the_address_of_somebody_who_encrypts_is_not_shown() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    forged = encode("chat", {"from": "alice", "to": "bob", "stream": 1, "n": 1, "base": 1, "text": ["forged"]})
    for _ in range(2):
        wire.forge(forged, alice.address, bob.address)
        world.run(1)
        alice.type("send bob hello")
        world.run(1)
    assert received_by(bob, "forged") == 0 and received_by(bob, "hello") == 2


def test_a_receipt_in_plain_from_somebody_who_encrypts_is_none() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    world.network.block(alice.host, bob.host)
    alice.type("send bob hello")
    world.run(0.3)
    stream = alice.client.outbox.conversations["bob"].id
    ack, nack = {"next": 2, "have": [], "room": 9}, {"first": 1, "last": 1, "reason": "not-me"}
    for tag, info in (("ack", ack), ("nack", nack)):
        wire.forge(encode(tag, {"stream": stream, **info}), bob.address, alice.address)
        world.run(0.05)
        assert "[Message received by bob.]" not in alice.lines and "[No ACK" not in "".join(alice.lines)
    world.run(5)
    assert received_by(bob, "hello") == 1


def test_somebody_with_a_channel_speaks_for_nobody_else() -> None:
    world, _, (alice, bob, eve) = encrypted("alice", "bob", "eve")
    eve.type("send bob from eve")
    world.network.block(alice.host, bob.host)
    alice.type("send bob hello")
    world.run(0.3)
    stream = alice.client.outbox.conversations["bob"].id
    eve.type("send alice from eve")
    world.run(0.1)
    chat = encode("chat", {"from": "alice", "to": "bob", "stream": 1, "n": 1, "base": 1, "text": ["forged"]})
    ack = encode("ack", {"stream": stream, "next": 2, "have": [], "room": 9})
    for nick, life, said in (("bob", bob, chat), ("alice", alice, ack)):
        channel = eve.client.sending._peers._peers[nick].channel        # type: ignore[union-attr]
        assert channel is not None
        world.network.arrive(eve.host, eve.address, channel.seal(0, said), life.address)
        world.run(0.05)
    assert received_by(bob, "forged") == 0 and "[Message received by bob.]" not in alice.lines
    assert received_by(bob, "from eve") == received_by(alice, "from eve") == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_peer_that_was_killed_is_back_in_two_seconds_and_never_in_plain(seed: int) -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob", seed=seed)
    alice.type("send bob before")
    world.run(1)
    bob.crash()
    bob = world.client("bob", address=bob.address, name="bob again")
    began = world.now
    alice.type("send bob after-it")
    world.run_until(lambda: received_by(bob, "after-it") == 1, 5)
    assert world.now - began <= 2.0
    bob.type("send alice back")
    world.run(3)
    assert received_by(alice, "back") == 1 and received_by(bob, "after-it") == 1
    assert not words_on(wire, b"alice", b"bob", b"before", b"after-it", b"back")


def test_an_anonymous_nick_has_another_key_in_the_next_session() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    carol = Life(world, "carol", world.new_address(), None)
    world.run(1)
    alice.type("send carol to the first")
    world.run(1)
    key = alice.client.table_sync.key_of("carol")
    carol.crash()
    again = Life(world, "carol", carol.address, None, name="carol again")
    world.run(3)
    alice.type("send carol to the second")
    world.run(3)
    assert received_by(carol, "to the first") == received_by(again, "to the second") == 1
    assert key is not None and key[0] and alice.client.table_sync.key_of("carol") not in (None, (b"", False), key)
    assert kinds_on(wire) == {"offer", "accept"} and received_by(again, "to the first") == 0


def test_who_passes_records_on_from_elsewhere_gets_no_messages() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")

    def pass_on(datagram: bytes, source: Address, to: Address) -> None:
        if SERVER not in (source, to):
            wire.forge(datagram, EVE, to)
    wire.before = pass_on
    for number in range(10):
        alice.type(f"send bob m{number}")
        bob.type(f"send alice n{number}")
        world.run(1)
    assert all(f"alice: m{number}" in bob.lines and f"bob: n{number}" in alice.lines for number in range(10))
    to_eve = [datagram for datagram, _, to in wire.sent if to == EVE]
    passed_on = [datagram for datagram, source, to in wire.sent if SERVER not in (source, to) and to != EVE]
    assert sum(map(len, to_eve)) <= sum(map(len, passed_on))
    assert max(map(len, to_eve), default=0) < 200, "nothing but acks, and answers to offers"


@pytest.mark.parametrize("blocked", [("alice", "bob"), ("bob", "alice"), None])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_both_begin_at_once_and_nothing_is_lost(blocked: tuple[str, str] | None, loss: float) -> None:
    for seed in range(5):
        world, wire, (alice, bob) = encrypted("alice", "bob", seed=seed)
        world.network.weather = Weather(loss=loss, delay=0.03, jitter=0.03)
        hosts = {"alice": alice.host, "bob": bob.host}
        if blocked is not None:
            world.network.block(hosts[blocked[0]], hosts[blocked[1]])
        for number in range(5):
            alice.type(f"send bob m{number}")
            bob.type(f"send alice n{number}")
            world.run(0.2)
        world.run(30)
        for number in range(5):
            assert received_by(bob, f" m{number}") == received_by(alice, f" n{number}") == 1
        assert kinds_on(wire) <= {"offer", "accept", "knock"}


def test_everything_between_clients_sent_again_later_changes_nothing() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    for number in range(10):
        alice.type(f"send bob m{number}")
        bob.type(f"send alice n{number}")
        world.run(0.3)
    shown = list(alice.lines), list(bob.lines)
    for datagram, source, to in list(wire.sent):
        if SERVER not in (source, to):
            wire.forge(datagram, source, to)
            world.run(0.01)
    world.run(3)
    assert (alice.lines, bob.lines) == shown
    alice.type("send bob and on")
    world.run(0.3)
    assert "alice: and on" in bob.lines


def test_a_flood_of_forged_offers_keeps_nobody_from_chatting() -> None:
    world, wire, (alice, bob, carol) = encrypted("alice", "bob", "carol")
    for number in range(3000):
        forged = encode("offer", {"id": number, "message": world.random.randbytes(250)})
        wire.forge(forged, (carol.address, alice.address, EVE)[number % 3], bob.address)
        if number % 100 == 0:
            world.run(0.01)
    alice.type("send bob hello")
    world.run(5)
    assert received_by(bob, "hello") == 1 and kinds_on(wire) <= {"offer", "accept", "knock"}
    assert len(bob.client.sending._peers._by_index) <= 3        # type: ignore[union-attr]


def test_no_datagram_between_clients_is_too_large() -> None:
    nicks = "\U00010400" * 24, "\U00010401" * 24       # 96 bytes each
    world, wire, (alice, bob) = encrypted(*nicks)
    for length in (*range(700, 800, 3), 5000, 65536):
        alice.type(f"send {bob.nick} " + "x" * length)
    for length in range(600):
        alice.type(f"send {bob.nick} {length} " + "y" * (length % 61))      # they fill datagrams to the last byte
    world.run(20)
    assert sum(line.endswith("xxx") for line in bob.lines) == 36
    sizes = [len(datagram) for datagram, source, to in wire.sent if SERVER not in (source, to)]
    assert MAX_DATAGRAM - 60 < max(sizes) <= MAX_DATAGRAM


def test_nobody_knows_of_a_key_by_which_others_cannot_be_encrypted_for() -> None:
    """A client that was in plain and one that encrypts, in one table."""
    world, wire, (alice,) = encrypted("alice")
    world.encrypts = False
    bob = world.client("bob")
    world.run(1)
    alice.type("send bob hello")
    bob.type("send alice back")
    world.run(2)
    assert "alice: hello" in bob.lines and "bob: back" in alice.lines
    assert "[Message received by bob.]" in alice.lines and "[Message received by alice.]" in bob.lines
    assert alice.client.table_sync.key_of("bob") == (b"", False) and alice.client.table_sync.key_of("alice")
    assert "chat" in kinds_on(wire)


# --- as processes ---------------------------------------------------------------------------------------------

def test_on_a_real_wire_between_clients_no_nick_and_no_text_is_seen(chat: Chat) -> None:
    """By ``strace``, if it is there: what the programs hand to the system, and get from it."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed")
    chat.server()
    bob = chat.client("bob")
    traced = chat.directory / "trace"
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port),
                     command=[tracer, "-f", "-xx", "-s", "2000", "-e", "trace=sendto,sendmsg,recvfrom,recvmsg", "-o",
                              str(traced), *PROGRAM])
    alice.see(WELCOME)
    alice.wait_for("bob")
    bob.wait_for("alice")
    alice.feed("send bob first-secret\n")
    bob.see("alice: first-secret")
    bob.feed("send alice second-secret\n")
    alice.see("bob: second-secret")
    assert (alice.finish(), bob.finish()) == (0, 0)
    seen = traced.read_text().replace("\\x", "")
    assert len(seen) > 2000
    for word in (b"alice", b"bob", b"first-secret", b"second-secret"):
        assert word.hex() not in seen


def test_a_client_that_is_killed_is_reached_in_secret_at_the_same_port(chat: Chat) -> None:
    chat.server()
    alice, bob = chat.clients("alice", "bob")
    alice.wait_for("bob")
    alice.feed("send bob before\n")
    bob.see("alice: before")
    port = alice.roster()["bob"][0].rpartition(":")[2]
    bob.kill()
    again = chat.run("client", "bob", "127.0.0.1", str(chat.port), port)
    again.see(WELCOME)
    alice.feed("send bob after\n")
    chat.until(lambda: any(line.endswith("after") for line in again.lines), "the message")
    again.feed("send alice back\n")
    alice.see("bob: back")
    assert (alice.finish(), again.finish()) == (0, 0)
    assert b"not encrypted" not in alice.err.data + again.err.data


def test_what_requires_encryption_sends_nothing_to_somebody_in_plain(chat: Chat) -> None:
    chat.server()
    bob = chat.client("bob", "--secure", "off")
    alice = chat.client("alice", "--secure", "require")
    alice.wait_for("bob")
    alice.feed("send bob hello\nsend bob again\n")
    chat.until(lambda: alice.lines.count("[bob cannot decrypt, message not sent.]") == 2, "the refusals")
    bob.feed("send alice hello\n")
    bob.see("[No ACK from alice, message sent to server.]")
    assert (alice.finish(), bob.finish()) == (1, 0)
    assert not [line for line in bob.lines if line.startswith("alice:")] and "bob: hello" not in alice.lines


def test_all_that_waits_for_somebody_whose_key_has_changed_is_refused_at_once() -> None:
    world, _, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    alice.client.table_sync.table.set("bob", *bob.address, ONLINE, b"k" * 32, True)
    alice.client.peer_keys.on_news("bob")       # type: ignore[union-attr]
    for number in range(2000):
        alice.type(f"send bob m{number} " + "x" * 50)
    world.run(0.1)
    assert alice.lines.count("[The key of bob has changed, message not sent.]") == 2000
    alice.type("quit")
    world.run(1)
    assert alice.exit_code == 1 and bob.lines.count("alice: before") == 1 and received_by(bob, "x") == 0


def test_a_program_hears_whether_others_could_read_a_message(chat: Chat) -> None:
    chat.server()
    bob, dave = chat.start("bob", "--json"), chat.start("dave", "--secure", "off", "--json")
    alice = chat.start("alice", "--json", "--ack-timeout", "200")

    def knows_all() -> bool:
        alice.feed('{"who": true}\n')
        last = {event["nick"]: event["state"] for event in map(json.loads, alice.lines) if event["type"] == "client"}
        return last.get("bob") == last.get("dave") == "online"
    chat.until(knows_all, "the table")

    def secure_of(process: Process, type_: str, **fields: str) -> bool | None:
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            events = map(json.loads, process.lines)
            found[:] = [event for event in events if event["type"] == type_ and fields.items() <= event.items()]
            return bool(found)
        chat.until(is_there, f"{type_} {fields}")
        return found[-1].get("secure")
    alice.feed('{"send": "bob", "text": "straight", "ref": "1"}\n{"send": "dave", "text": "plain", "ref": "2"}\n')
    assert secure_of(alice, "received", ref="1") is secure_of(bob, "message", text="straight") is True
    assert secure_of(alice, "received", ref="2") is False and secure_of(dave, "message", text="plain") is None

    def changes() -> int:
        return sum('"type": "table"' in line for line in alice.lines)
    before = changes()
    bob.feed('{"dereg": "bob"}\n')
    chat.until(lambda: changes() == before + 1, "bob to be offline")
    alice.feed('{"send": "bob", "text": "by the server", "ref": "3"}\n')
    assert secure_of(alice, "saved", ref="3") is True
    bob.feed('{"reg": "bob"}\n')
    assert secure_of(bob, "message", text="by the server") is True
    chat.until(lambda: changes() == before + 2, "bob to be online")
    alice.feed('{"send": "bob", "text": "straight again", "ref": "4"}\n')
    assert secure_of(alice, "received", ref="4") is secure_of(bob, "message", text="straight again") is True


def test_that_messages_are_not_encrypted_is_said_once_and_on_a_quiet_send_not_at_all(chat: Chat) -> None:
    chat.server()
    bob, carol = (chat.client(nick, "--secure", "off") for nick in ("bob", "carol"))
    alice = chat.client("alice")
    alice.wait_for("bob")
    alice.wait_for("carol")
    alice.feed("send bob hello\nsend bob again\nsend carol hello\n")
    for other in (bob, carol):
        other.see("alice: hello")
    alice.see(received("carol"))
    assert alice.finish() == 0
    assert alice.errors == ["[Messages to bob are not encrypted.]"], "once a run"
    for options, count in ((["--quiet"], 0), ([], 1)):
        sent = chat.complete("send", "--server", f"127.0.0.1:{chat.port}", "--nick", "x", *options, "bob", "hi")
        assert sent.wait() == 0 and sent.err.data.count(b"not encrypted") == count
