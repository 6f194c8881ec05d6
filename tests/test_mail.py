"""What goes by way of the server, sealed for its recipient alone: on arguments, in the world, and as processes."""
from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st

import protocol
from conversation import Delivery, Inbox
from home import show_time
from protocol import (BROKEN, GONE, MAX_DATAGRAM, MAX_PIECE, MIN_BUNDLE, OFFLINE, ONLINE, OTHER_KEY, SEALED,
                      STRANGELY_PLAIN, UNSEALED, Info, Parcel, encode, letter_prologue, letters_of, numbers_in,
                      numbers_of, pieces_of, texts_of_parts)
from secure import LETTERS_OPEN, KeyPair, Letters, SealedMail, load_sodium, name_of_key
from server import Keeper
from stream import Account, Frames, Sealing, SendStream
from terminal import JsonFormatter, TextFormatter
from tests.processes import MAIL_NOTICE, SAVED, Chat
from tests.simulate import SERVER, Life, World
from tests.test_peers import HOMES, User, received_by, some_sodium, words_on
from tests.test_protocol_page import EXAMPLES
from tests.test_secrecy import Visitor, desk, encrypted
from tests.test_strangers import maps_of

pytestmark = pytest.mark.skipif(load_sodium() is None, reason="the extra secure is not installed")

STREAM = 7
Change = Callable[[Info], None]


class Writer(User):
    """A user who writes letters, and reads them."""

    def __init__(self, nick: str, table: dict[str, bytes], must_encrypt: bool = False, seed: int = 0,
                 has_own_key: bool = True) -> None:
        super().__init__(nick, table, must_encrypt, seed)
        self.mail = SealedMail(self.keys, self.peers, must_encrypt, has_own_key)

    def frames(self, to: str, stream: int = STREAM) -> Frames:
        """Return what makes datagrams for somebody; sealed, if that may be."""
        frames = Frames(self.nick, to, stream)
        frames.account = Account(is_sealed=True)
        self.refusal = self.mail.refusal(frames, False)
        return frames

    def saves(self, to: str, *texts: str, at: float = 5.0, stream: int = STREAM) -> list[Info]:
        """Return texts as they go to the server: the fields of each ``save``."""
        frames = self.frames(to, stream)
        frames.is_sealing = frames.letters is not None
        sending = SendStream(stream, frames.capacity(False))
        frames.times.add(1, at, 1)
        items, continued = pieces_of(texts, 1)
        sending.queue(items, frames.sizes(items, 1, continued, False), continued)
        datagrams = [frames.save(packet, sending, False) for packet in sending.poll(1.0)]
        assert max(map(len, datagrams)) <= MAX_DATAGRAM - 30
        return [info for datagram in datagrams for _, info in maps_of(datagram)]

    def runs(self, to: str, *texts: str, **options: Any) -> list[list[Any]]:
        """Return texts as the server hands them to their recipient."""
        return [[self.nick, info["stream"], info["n"], 0.0, [[info["text"], 0, numbers_of(info["text"])]],
                 info.get("more", []), self.keys.pair.public, info["envelope"]]
                for info in self.saves(to, *texts, **options)]

    def read(self, *runs: Sequence[Any]) -> list[tuple[float, str, str]]:
        """Return the letters of runs: time, text, proof."""
        return [(at, text, origin[2]) for run in runs
                for origin, _, text, at in letters_of({"n": 1, "items": [run]}, self.mail.opened)[0]]


def seal_x(letters: Sealing, n: int) -> bytes:
    """Return the text "x" with the number ``n`` sealed."""
    return letters.seal(n, [[1.0, 1]], ["x"], ())


def writers(*nicks: str, **options: bool) -> list[Writer]:
    table: dict[str, bytes] = {}
    found = [Writer(nick, table, **options) for nick in nicks]
    table.update({writer.nick: writer.keys.pair.public for writer in found})
    return found


def shown(*runs: Sequence[Any], reader: Writer) -> list[tuple[str, list[str], list[float], str]]:
    """Return what a reader is shown of runs: sender, texts, times, proof."""
    inbox, number = Inbox(), 1
    for run in runs:
        inbox.on_mail(0.0, {"stream": 1, "n": number, "base": 1, "items": [run]}, reader.mail.opened)
        number += numbers_in(run)
    return [(found.sender, found.texts, found.times, found.proof) for found in inbox.take(0.0, lambda: True)
            if found.texts]


# --- what is sealed, and what is made of it -------------------------------------------------------------------

def test_the_recipient_alone_reads_what_goes_to_the_server() -> None:
    alice, bob, eve = writers("alice", "bob", "eve")
    run, = alice.runs("bob", "one secret", "another", at=1234.5)
    assert b"secret" not in run[4][0][0]
    assert bob.read(run) == [(1234.5, "one secret", SEALED), (1234.5, "another", SEALED)]
    assert {proof for _, _, proof in eve.read(run)} == {BROKEN}
    assert shown(run, reader=bob) == [("alice", ["one secret", "another"], [1234.5, 1234.5], SEALED)]


def test_one_may_write_to_oneself() -> None:
    alice, = writers("alice")
    run, = alice.runs("alice", "note")
    assert alice.read(run) == [(5.0, "note", SEALED)]


def test_the_same_number_is_sealed_in_the_same_way_each_time_and_each_stream_apart() -> None:
    alice, _ = writers("alice", "bob")
    frames = alice.frames("bob")
    letters = frames.letters
    assert letters is not None and alice.mail.refusal(frames, False) == "" and frames.letters is letters
    assert seal_x(letters, 3) == seal_x(letters, 3) != seal_x(letters, 4)
    other = alice.frames("bob", stream=8).letters
    assert other is not None and other.envelope != letters.envelope
    assert seal_x(other, 3) != seal_x(letters, 3)


def test_what_follows_after_the_key_has_changed_is_sealed_for_the_new_one() -> None:
    alice, bob = writers("alice", "bob")
    frames = alice.frames("bob")
    old = frames.letters
    new = Writer("bob", bob.table, seed=1)
    alice.table["bob"] = new.keys.pair.public
    assert alice.mail.refusal(frames, False) == "key-changed"
    assert alice.peers.trust("bob") and alice.mail.refusal(frames, False) == "" and frames.letters is not old
    assert frames.letters is not None and frames.letters.name == name_of_key(new.keys.pair.public)


@pytest.mark.parametrize("must_encrypt", [False, True])
@pytest.mark.parametrize("entry", [None, (b"", False), (b"k" * 32, False), (bytes(32), True)],
                         ids=["unknown", "no key", "the key of a session", "no key of anybody"])
def test_nothing_is_sealed_but_for_the_owner_of_a_nick(entry: tuple[bytes, bool] | None, must_encrypt: bool) -> None:
    alice, = writers("alice", must_encrypt=must_encrypt)
    alice.peers.shown_of = lambda nick: entry
    assert alice.frames("bob").letters is None
    assert alice.refusal == ("not-secure" if must_encrypt else "")


def test_the_key_for_which_something_is_sealed_first_is_remembered() -> None:
    alice, bob = writers("alice", "bob")
    alice.frames("bob")
    alice.table["bob"] = Writer("bob", {}, seed=1).keys.pair.public
    assert alice.peers.refusal("bob") == "key-changed" and bob.peers.refusal("alice") == ""


def test_the_key_of_whose_letters_came_first_is_remembered() -> None:
    alice, bob = writers("alice", "bob")
    run, = alice.runs("bob", "hello")
    assert bob.read(run)[0][2] == SEALED
    bob.table["alice"] = Writer("alice", {}, seed=1).keys.pair.public
    assert bob.peers.refusal("alice") == "key-changed"


# --- what the server may do with it ---------------------------------------------------------------------------

@given(st.lists(st.text(max_size=900).filter(lambda text: text.isprintable()), min_size=1, max_size=12), st.data())
def test_the_server_may_part_and_join_datagrams_as_it_likes(texts: list[str], data: st.DataObject) -> None:
    alice, bob = writers("alice", "bob")
    letters = [((run[0], run[1], 0.0, tuple(run[6:])), n, text, n in run[5])
               for run in alice.runs("bob", *texts) for n, text in enumerate(texts_of_parts(run[4]), run[2])]
    parts, start = [], 0
    while start < len(letters):
        end = data.draw(st.integers(start + 1, len(letters)))
        parts += protocol.mail_runs(letters[start:end])
        start = end
    found = shown(*parts, reader=bob)
    assert [text for _, part, _, _ in found for text in part] == texts
    assert {proof for _, _, _, proof in found} == {SEALED} and {at for _, _, times, _ in found for at in times} == {5.0}


def changed(run: list[Any], **changes: Any) -> list[Any]:
    """Return a run with other contents."""
    names = ("sender", "stream", "n", "at", "texts", "more", "key", "envelope")
    return [changes.get(name, value) for name, value in zip(names, run)]


CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "another number": lambda run: changed(run, n=run[2] + 1),
    "another stream": lambda run: changed(run, stream=STREAM + 1),
    "another sender": lambda run: changed(run, sender="carol"),
    "another envelope": lambda run: changed(run, envelope=bytes(48)),
    "another key": lambda run: changed(run, key=b"k" * 32),
    "a key of nobody": lambda run: changed(run, key=bytes(32)),
    "continued": lambda run: changed(run, more=[run[2]]),
    "not continued": lambda run: changed(run, more=[]),
    "another place": lambda run: changed(run, texts=[[run[4][0][0], 1, 1]]),
    "a number before the first": lambda run: changed(run, n=1, texts=[[run[4][0][0], 1, 1]]),
    "a changed bundle": lambda run: changed(run, texts=[[run[4][0][0][:-1] + bytes((run[4][0][0][-1] ^ 1,)), 0, 1]]),
    "another count": lambda run: changed(run, texts=[[b"\3" + run[4][0][0][1:], 0, 1]]),
    "a short bundle": lambda run: changed(run, texts=[[run[4][0][0][:-1], 0, 1]]),
    "an empty bundle": lambda run: changed(run, texts=[[b"\1\0" + bytes(16), 0, 1]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_server_cannot_change_a_letter_unseen(change: Callable[[list[Any]], list[Any]]) -> None:
    alice, bob, _ = writers("alice", "bob", "carol")
    run, = alice.runs("bob", "hello", "again") if change is not CHANGES["not continued"] else alice.runs(
        "bob", "x" * (MAX_PIECE + 1))
    first = changed(run, texts=[[run[4][0][0], 0, 1]])
    assert [proof for _, _, proof in bob.read(change(first))] == [BROKEN]
    assert [proof for _, _, proof in bob.read(run)] == [SEALED, SEALED], "the right one still opens"


def test_the_server_cannot_cut_a_text_nor_make_one_of_two() -> None:
    alice, bob, carol = writers("alice", "bob", "carol")
    first, second, last = alice.runs("bob", "x" * MAX_PIECE + "y" * MAX_PIECE + "z" * MAX_PIECE)
    whole = shown(first, second, last, reader=bob)
    assert [(texts, proof) for _, texts, _, proof in whole] == [
        (["x" * MAX_PIECE + "y" * MAX_PIECE + "z" * MAX_PIECE], SEALED)]
    assert {found[3] for found in shown(second, last, reader=bob)} == {BROKEN}, "without its beginning"
    assert {found[3] for found in shown(last, reader=bob)} == {BROKEN}, "without all but its end"
    other, = carol.runs("bob", "mine")
    assert {found[3] for found in shown(first, changed(other, more=[]), reader=bob)} == {BROKEN}, "with another's end"
    plain = ["alice", STREAM, 2, 1.0, ["forged"], []]
    assert {found[3] for found in shown(first, plain, reader=bob)} == {BROKEN}, "with an end that is not sealed"
    one, = alice.runs("bob", "one", "two", stream=9)
    assert {found[3] for found in shown(changed(one, more=[1]), reader=bob)} == {BROKEN}, "with another text"
    long, = alice.runs("bob", "a" * (MAX_PIECE + 9), stream=10)
    assert [found[1:] for found in shown(long, reader=bob)] == [(["a" * (MAX_PIECE + 9)], [5.0], SEALED)]
    bundle = long[4][0][0]
    end, begin = changed(long, n=2, texts=[[bundle, 1, 1]], more=[]), changed(long, texts=[[bundle, 0, 1]])
    assert {found[3] for found in shown(end, reader=bob)} == {BROKEN}, "the end of one in a bundle"
    assert {found[3] for found in shown(begin, changed(other, more=[]), reader=bob)} == {BROKEN}, "the beginning"


def test_a_letter_that_was_made_up_is_not_in_the_way_of_what_its_sender_has_said() -> None:
    alice, bob = writers("alice", "bob")
    run, = alice.runs("bob", "hello")
    forged = changed(run, texts=[[b"\1\0" + bytes(40), 0, 1]])
    found = shown(forged, run, forged, reader=bob)
    assert [(texts, proof) for _, texts, _, proof in found] == [([""], BROKEN), (["hello"], SEALED)]


def test_the_letters_of_many_streams_take_bounded_memory() -> None:
    alice, bob = writers("alice", "bob")
    for number in range(2 * LETTERS_OPEN):
        run, = alice.runs("bob", "hello", stream=number)
        assert bob.read(run) == [(5.0, "hello", SEALED)]
        assert bob.read(changed(run, envelope=bytes((number % 256,)) * 48))[0][2] == BROKEN
    assert len(bob.mail._opening) == LETTERS_OPEN


def test_the_letter_of_the_page_on_the_protocol_is_right() -> None:
    example, = [dict(example.maps)["save"] for example in EXAMPLES if "envelope" in dict(example.maps).get("save", {})]
    sodium = some_sodium()
    server, alice, bob = (KeyPair(sodium, bytes(range(start, start + 32))) for start in (0, 96, 128))
    prologue = letter_prologue(server.public, "alice", "bob", example["stream"])
    letters = Letters.of(sodium, bob, alice.public, prologue, example["envelope"])
    texts = ["see you", "tomorrow"]
    assert letters.open(example["n"], example["text"]) == ([1700000000.5] * 2, texts, frozenset())
    sealing = Letters.to(sodium, alice, bob.public, prologue, bytes(range(224, 256)))
    assert (sealing.envelope, sealing.name) == (example["envelope"], example["key"])
    assert sealing.seal(example["n"], [[1700000000.5, 2]], texts, ()) == example["text"]


# --- what is doubtful -----------------------------------------------------------------------------------------

def test_what_is_sealed_with_another_key_than_the_one_that_is_known_is_shown_as_that() -> None:
    alice, bob = writers("alice", "bob")
    first, = alice.runs("bob", "before")
    assert bob.read(first)[0][2] == SEALED
    other = Writer("alice", bob.table, seed=1)
    run, = other.runs("bob", "hello")
    assert bob.read(run) == [(5.0, "hello", OTHER_KEY)], "pinned"
    assert bob.read(first)[0][2] == SEALED


def test_a_letter_with_the_key_of_an_earlier_owner_is_not_that_of_the_nick_as_it_is_now() -> None:
    alice, bob = writers("alice", "bob")
    run, = alice.runs("bob", "before")
    bob.table["alice"] = Writer("alice", {}, seed=1).keys.pair.public
    assert bob.read(run) == [(5.0, "before", OTHER_KEY)]


def test_a_nick_that_is_nobodys_is_known_by_no_key() -> None:
    alice, bob = writers("alice", "bob")
    run, = alice.runs("bob", "hello")
    bob.peers.shown_of = lambda nick: (alice.keys.pair.public, False)
    assert bob.read(run)[0][2] == SEALED
    bob.peers.shown_of = lambda nick: None
    assert bob.read(run)[0][2] == SEALED and bob.peers._pinned("alice") is None


@pytest.mark.parametrize("has_own_key, must_encrypt, key, proof", [
    (True, False, b"k" * 32, STRANGELY_PLAIN), (True, False, b"", UNSEALED), (False, False, b"k" * 32, UNSEALED),
    (True, True, b"", STRANGELY_PLAIN), (False, True, b"", STRANGELY_PLAIN)])
def test_what_could_have_been_sealed_and_is_not_is_doubtful(
        has_own_key: bool, must_encrypt: bool, key: bytes, proof: str) -> None:
    bob = Writer("bob", {"alice": key}, must_encrypt, has_own_key=has_own_key)
    plain = ["alice", STREAM, 1, 1.5, ["hello"], []]
    assert bob.read(plain) == [(1.5, "hello", proof)]


def test_what_is_not_proven_can_neither_drive_a_terminal_nor_pass_for_something_else() -> None:
    said = Delivery("alice", ["\x1b[31mred\nbob: forged"], [1.0], lambda texts: None, STREAM, 1, OTHER_KEY)
    assert TextFormatter().messages(said, "mail") == "[Not proven to be from alice: \\x1b[31mred\\x0abob: forged]\n"
    event = json.loads(JsonFormatter("bob", lambda: 1.5).messages(said, "mail", False))
    assert event["type"] == "unproven" and event["reason"] == "key-changed" and event["text"] == said.texts[0]
    broken = said._replace(proof=BROKEN)
    assert TextFormatter().messages(broken, "mail") == "[A message from alice is damaged.]\n"
    assert json.loads(JsonFormatter("bob", lambda: 1.5).messages(broken, "mail", False))["text"] == ""


def test_a_time_that_no_calendar_has_is_shown_as_the_last_one_that_can_be() -> None:
    said = Delivery("alice", ["hello"], [2.5e14], lambda texts: None, STREAM, 1, SEALED)
    event = json.loads(JsonFormatter("bob", lambda: 1.5).messages(said, "mail", True))
    assert event["sent"].startswith("9999-12-31T23:59:59")
    for at in (float("nan"), float("inf"), -float("inf"), -1e300):
        odd = said._replace(times=[at])
        assert TextFormatter().messages(odd, "mail").endswith("> hello\n")
        assert len(json.loads(JsonFormatter("bob", lambda: 1.5).messages(odd, "mail", True))["sent"]) == 24


# --- what the server keeps ------------------------------------------------------------------------------------

def told(visitor: Visitor, *maps: bytes) -> list[tuple[str, Info]]:
    """Send a record for each of ``maps`` in one turn; return what the server seals in its answers."""
    before = len(visitor.desk.sent)
    for one in maps:
        visitor.desk.server.receive(visitor.seal(one), visitor.address)
    visitor.desk.turn()
    return [found for datagram, to in visitor.desk.sent[before:] if to == visitor.address
            for found in maps_of(visitor.channel.open(datagram))]


def bundle_of(count: int) -> bytes:
    """Return a bundle that nobody opens."""
    return count.to_bytes(2, "little") + bytes(MIN_BUNDLE + count)


def sealed_save(sender: Visitor, recipient: Visitor, first: int = 1, count: int = 1, **changes: Any) -> bytes:
    """Return a bundle (which nobody opens) as it goes to the server."""
    return encode("save", {"session": sender.info["session"], "to": recipient.nick, "stream": STREAM, "n": first,
                           "base": 1, "text": bundle_of(count), "at": [], "relay": False,
                           "envelope": bytes(48), "key": name_of_key(recipient.keys.pair.public), **changes})


def plain_save(sender: Visitor, recipient: Visitor, first: int = 1, count: int = 1, **changes: Any) -> bytes:
    return encode("save", {"session": sender.info["session"], "to": recipient.nick, "stream": STREAM, "n": first,
                           "base": 1, "text": ["hi"] * count, "at": [1.5] * count, "relay": False, **changes})


def away(number: int = 2, **options: Any) -> tuple[Any, Visitor, Visitor]:
    """Return a server, alice, and bob, who has been there."""
    server = desk()
    alice = Visitor(server, "alice", 1).online()
    bob = Visitor(server, "bob", number, secret=b"b" * 32, **options).online()
    bob.say(protocol.padded("dereg", {"session": bob.info["session"]}, protocol.SESSION_SIZE))
    return server, alice, bob


def test_the_server_keeps_letters_with_the_key_of_their_sender() -> None:
    server, alice, bob = away()
    answers = dict(told(alice, sealed_save(alice, bob, count=3)))
    assert answers["ack"]["next"] == 4
    letters = server.registry.mailbox.fetch(server.registry.mailbox.known["bob"], 1, 9)
    assert [letter[0][-1] for letter in letters] == [(alice.keys.pair.public, bytes(48))] * 3
    again = Visitor(server, "bob", 2, secret=b"b" * 32)
    assert again.join() == "welcome"
    mail, = [info for tag, info in told(again, again.ping()) if tag == "mail"]
    assert "to" not in mail and mail["items"] == [
        ["alice", STREAM, 1, 0.0, [[bundle_of(3), 0, 3]], [], alice.keys.pair.public, bytes(48)]]


def test_a_bundle_of_which_some_is_shown_is_sent_again_with_the_rest_alone() -> None:
    server, alice, bob = away()
    told(alice, sealed_save(alice, bob, count=3), sealed_save(alice, bob, first=4, count=5))
    again = Visitor(server, "bob", 2, secret=b"b" * 32)
    assert again.join() == "welcome"
    mail, = [info for tag, info in told(again, again.ping()) if tag == "mail"]
    assert [run[4] for run in mail["items"]] == [[[bundle_of(3), 0, 3], [bundle_of(5), 0, 5]]]
    told(again, encode("ack", {"stream": mail["stream"], "next": 6, "have": [], "room": 100}))
    assert server.registry.mailbox.commit(1.0)      # what was acked is deleted
    known = server.registry.mailbox.known["bob"]
    assert (known.messages, known.size) == (3, len(bundle_of(5)))
    again.say(protocol.padded("dereg", {"session": again.info["session"]}, protocol.SESSION_SIZE))
    later = Visitor(server, "bob", 2, secret=b"b" * 32)
    assert later.join() == "welcome"
    mail, = [info for tag, info in told(later, later.ping()) if tag == "mail"]
    assert [(run[2], run[4]) for run in mail["items"]] == [(6, [[bundle_of(5), 2, 3]])]


def test_a_mailbox_keeps_of_a_bundle_what_it_has_room_for() -> None:
    five = Parcel(1, [(bundle_of(5), place) for place in range(5)], [0.0] * 5, [1], (b"k" * 32, b"e" * 48))
    size = len(bundle_of(5))
    assert [five.fitting(most, 10 ** 6) for most in range(5)] == [0, 2, 3, 4, 5]
    assert (five.fitting(9, size), five.fitting(9, size - 1)) == (5, 0)
    rest = five.part(2, 5)
    assert (rest.n, rest.size, rest.messages, rest.texts) == (3, size, 3, [(bundle_of(5), n) for n in (2, 3, 4)])
    assert (rest.fitting(9, size), rest.fitting(9, size - 1)) == (3, 0)
    two = Parcel(1, [*five.texts, *[(bundle_of(1), 0)]], [0.0] * 6, [1], five.seal)
    assert (two.fitting(9, size), two.fitting(9, size + len(bundle_of(1)))) == (5, 6)


@pytest.mark.parametrize("changes", [{"text": b"\1\0" + bytes(1198)},
                                     {"text": b"\0\4" + bytes(1040), "more": list(range(1, 1024))}])
def test_a_bundle_that_fits_into_no_mail_is_dropped_and_stops_nobodys_mail(changes: dict[str, Any]) -> None:
    server, alice, bob = away()
    assert not told(alice, sealed_save(alice, bob, **changes))
    assert server.server.counters()["drop_too_large"] == 1
    assert dict(told(alice, sealed_save(alice, bob)))["ack"]["next"] == 2


def test_letters_for_another_key_than_that_of_their_recipient_are_refused() -> None:
    server, alice, bob = away()
    for key in (b"k" * 8, name_of_key(b"")):
        answers = told(alice, sealed_save(alice, bob, count=2, key=key))
        assert ("nack", {"stream": STREAM, "first": 1, "last": 2, "reason": "key"}) in answers
    assert not server.registry.mailbox.known["bob"].waiting


def test_letters_for_somebody_without_a_key_are_refused() -> None:
    server, alice, bob = away(is_bound=False)
    answers = dict(told(alice, sealed_save(alice, bob)))
    assert answers["nack"]["reason"] == "key" and not server.registry.mailbox.known["bob"].waiting
    assert dict(told(alice, plain_save(alice, bob)))["ack"]["next"] == 2, "in plain they are not"


def test_what_could_be_sealed_is_not_kept_in_plain_and_its_sender_hears_of_the_key() -> None:
    server, alice, bob = away()
    version = server.registry.table.version
    answers = dict(told(alice, plain_save(alice, bob)))
    assert answers["ack"]["next"] == 1 and answers["ack"]["have"] == []
    assert answers["table"]["version"] == answers["table"]["since"] == version
    assert not server.registry.mailbox.known["bob"].waiting
    assert dict(told(alice, sealed_save(alice, bob)))["ack"]["next"] == 2


def test_letters_behind_what_is_not_sealed_wait_for_it() -> None:
    server, alice, bob = away()
    answers = told(alice, plain_save(alice, bob), sealed_save(alice, bob, first=2, count=2))
    assert [info["next"] for tag, info in answers if tag == "ack"] == [1]
    assert dict(told(alice, sealed_save(alice, bob, count=3)))["ack"]["next"] == 4


def test_a_text_of_which_only_some_is_sealed_waits_for_the_rest() -> None:
    server, alice, bob = away()
    answers = told(alice, sealed_save(alice, bob, more=[1]), plain_save(alice, bob, first=2))
    assert [info["next"] for tag, info in answers if tag == "ack"] == [1]
    assert dict(told(alice, sealed_save(alice, bob, count=2, more=[1])))["ack"]["next"] == 3
    letters = server.registry.mailbox.fetch(server.registry.mailbox.known["bob"], 1, 9)
    assert [letter[3] for letter in letters] == [True, False]


def test_letters_from_a_session_in_plain_are_dropped() -> None:
    server, _, bob = away()
    session = server.register("carol", HOMES["carol"])
    answers = server.say(HOMES["carol"], encode("save", {
        "session": session, "to": "bob", "stream": STREAM, "n": 1, "base": 1, "text": bundle_of(1), "at": [],
        "relay": False, "envelope": bytes(48), "key": name_of_key(bob.keys.pair.public)}))
    assert not answers and server.server.counters()["drop_other_channel"] == 1


def test_letters_that_are_damaged_on_the_disk_are_noticed() -> None:
    sealed = [(bundle_of(1), 0), *((bundle_of(4), place) for place in (1, 2))]
    parcel = Parcel(1, sealed, [0.0] * 3, [1], (b"k" * 32, b"e" * 48))
    row = parcel.row(1, 1, "alice", STREAM)
    columns: list[Any] = [row[2], row[5], *row[6:9], *row[11:]]
    assert Parcel.of_row(*columns) == parcel and parcel.size == len(bundle_of(1) + bundle_of(4))
    for place, value in ((2, b"\xc1"), (2, b""), (2, "text"), (2, columns[2][:-1]), (5, None), (5, b"k"), (6, None),
                         (6, "e" * 48), (0, 2), (1, 0), (3, "[]"), (4, "[7]")):
        with pytest.raises((ValueError, TypeError)):
            damaged: list[Any] = [value if at == place else column for at, column in enumerate(columns)]
            Parcel.of_row(*damaged)


# --- in the world ---------------------------------------------------------------------------------------------

def go_away(world: World, life: Life) -> None:
    life.type(f"dereg {life.nick}")
    world.run(2)


def texts_in(world: World) -> bytes:
    """Return all that lies on the disk of the server."""
    return b"".join(b"%r" % (row,) for row in world.disk.execute("SELECT * FROM mail").fetchall())


def test_mail_and_messages_by_way_of_the_server_are_sealed_and_arrive() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    go_away(world, bob)
    alice.type("send bob mail-secret")
    alice.type("send bob " + "long-secret" * 500)
    world.run(2)
    assert alice.lines.count(SAVED) == 2 and b"alice" in texts_in(world) and b"secret" not in texts_in(world)
    bob.type("reg bob")
    world.run(3)
    assert received_by(bob, "mail-secret") == 1 and received_by(bob, "long-secret" * 500) == 1
    assert "<" in next(line for line in bob.lines if line.endswith("mail-secret"))
    world.network.block(alice.host, bob.host)
    alice.type("send bob relayed-secret")
    world.run(8)
    assert received_by(bob, "relayed-secret") == 1
    assert not words_on(wire, b"alice", b"bob", b"secret")


@pytest.mark.parametrize("is_relayed", [False, True])
def test_no_datagram_with_letters_is_too_large(is_relayed: bool) -> None:
    nicks = "\U00010400" * 24, "\U00010401" * 24       # 96 bytes each
    world, wire, (alice, bob) = encrypted(*nicks)
    if is_relayed:
        world.network.block(alice.host, bob.host)
    else:
        go_away(world, bob)
    for length in (*range(700, 800, 3), 5000, 65536):
        alice.type(f"send {bob.nick} " + "x" * length)
    for length in range(300):
        alice.type(f"send {bob.nick} {length} " + "y" * (length % 61))      # they fill datagrams to the last byte
    world.run(20)
    bob.type(f"reg {bob.nick}")
    world.run(20)
    assert sum(line.endswith("xxx") for line in bob.lines) == 36 and sum("y" in line for line in bob.lines) >= 295
    sizes = [len(datagram) for datagram, source, to in wire.sent if SERVER in (source, to)]
    assert MAX_DATAGRAM - 80 < max(sizes) <= MAX_DATAGRAM


@pytest.mark.parametrize("years", [-1, 1, -50, 50])
def test_a_server_whose_clock_is_wrong_delivers_every_letter_with_its_time(years: int) -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    world.clock_errors["server"] = years * 365 * 86400.0
    go_away(world, bob)
    alice.type("send bob hello")
    world.run(2)
    bob.type("reg bob")
    world.run(3)
    line, = [line for line in bob.lines if line.endswith("hello")]
    assert line.split("<")[1].startswith(show_time(alice.loop.wall(), "%Y-%m-%d"))


def test_a_server_that_loses_letters_gets_no_receipt_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    go_away(world, bob)

    def keeps_only_the_last(self: Keeper, save: Any, parcel: Parcel, sealed_for: tuple[bytes, ...]) -> bool:
        last = len(parcel.texts) - 1
        self._registry.keep(save.to, save.session.nick, save.stream.id, parcel.part(last, last + 1))
        save.stream.give_back(parcel.n)
        return False
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "_keep_part", keeps_only_the_last)
        for number in range(1, 6):
            alice.type(f"send bob secret {number}")
        world.run(1)
        bob.type("reg bob")
        world.run(2)
    world.run(20)
    received = alice.lines.count("[Message received by bob.]") + alice.lines.count(SAVED)
    assert received_by(bob, "secret 5") == 1 and received <= sum("secret" in line for line in bob.lines)


@pytest.mark.parametrize("spelling", ["Alice", "ALICE", "\uff41lice"])
def test_a_letter_is_not_shown_again_under_another_spelling_of_its_sender(spelling: str) -> None:
    alice, bob = writers("alice", "bob")
    run, = alice.runs("bob", "pay 100 EUR")
    assert {proof for _, _, proof in bob.read(changed(run, sender=spelling))} == {BROKEN}
    assert bob.read(run)[0][2] == SEALED


def test_what_was_sent_before_a_key_is_trusted_is_refused_even_if_both_come_at_once() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    alice.client.table_sync.table.set("bob", *bob.address, ONLINE, b"k" * 32, True)
    alice.type("send bob for the old one")
    alice.type("trust bob")
    world.run(1)
    assert "[The key of bob has changed, message not sent.]" in alice.lines
    assert any(line.startswith("[The key of bob is trusted now.") for line in alice.lines)


def test_who_is_gone_is_unknown_and_has_no_changed_key() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    go_away(world, bob)
    alice.type("send bob after")
    assert alice.client.peer_keys is not None
    alice.client.table_sync.table.set("bob", *bob.address, GONE)
    assert alice.client.peer_keys.refusal("bob") == "unknown"


def test_it_is_said_once_that_mail_is_not_encrypted() -> None:
    world, wire, (alice,) = encrypted("alice")
    world.encrypts = False
    bob = world.client("bob")
    world.run(1)
    go_away(world, bob)
    alice.type("send bob one")
    alice.type("send bob two")
    world.run(2)
    assert alice.complaints.count("[Messages to bob are not encrypted.]") == 1 and alice.lines.count(SAVED) == 2


def test_nothing_is_saved_for_a_recipient_who_has_a_new_owner() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    bob.type("quit")
    world.run(2)
    assert world.server is not None
    server = world.server.server
    server.registry.forget("bob")
    other = world.client("bob", secret=b"other" * 7)
    world.run(2)
    other.type("quit")
    world.run(2)
    alice.type("send bob after")
    world.run(3)
    assert alice.lines[-1] == "[The key of bob has changed, message not sent.]" and SAVED not in alice.lines


def test_of_what_is_refused_at_once_nobody_reads_that_it_has_gone_to_the_server() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    go_away(world, bob)
    alice.client.table_sync.table.set("bob", *bob.address, OFFLINE, b"k" * 32, True)
    alice.type("send bob after")
    world.run(1)
    assert alice.lines[-1] == "[The key of bob has changed, message not sent.]"
    assert not [line for line in alice.lines if "message sent to server" in line]


def test_what_was_sealed_for_an_earlier_owner_of_whom_nobody_told_the_sender_is_refused() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    go_away(world, bob)
    assert world.server is not None
    world.server.server.registry.mailbox.known["bob"].key = b"k" * 32
    alice.type("send bob after")
    world.run(3)
    assert alice.lines[-1] == "[The key of bob has changed, message not sent.]" and SAVED not in alice.lines


def test_letters_of_a_sender_with_a_new_key_since_are_shown_as_not_proven() -> None:
    world, wire, (alice, bob) = encrypted("alice", "bob")
    alice.type("send bob before")
    world.run(1)
    go_away(world, bob)
    alice.type("quit")
    world.run(2)
    assert world.server is not None
    world.server.server.registry.forget("alice")
    other = world.client("alice", secret=b"other" * 7)
    world.run(2)
    other.type("send bob after")
    world.run(2)
    assert other.lines[-1] == SAVED
    bob.ledger = type(bob.ledger)()
    bob.type("reg bob")
    with pytest.raises(Exception, match="Not proven to be from alice"):
        world.run(3)


# --- as processes ---------------------------------------------------------------------------------------------

def test_no_text_lies_on_the_disk_of_the_server(chat: Chat) -> None:
    chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.wait_for("bob", "offline")
    alice.feed("send bob mail-secret\n")
    alice.see(SAVED)
    kept = b"".join(path.read_bytes() for path in chat.directory.glob("store.db*"))
    assert b"alice" in kept and b"mail-secret" not in kept
    bob = chat.client("bob")
    bob.see(MAIL_NOTICE)
    chat.until(lambda: any(line.endswith("> mail-secret") for line in bob.lines), "the mail")
    assert (alice.finish(), bob.finish()) == (0, 0)


def test_mail_that_was_kept_before_its_sender_had_a_key_is_shown_as_not_proven(chat: Chat) -> None:
    chat.server()
    chat.absent("bob")
    plain = chat.client("alice", "--secure", "off")
    plain.wait_for("bob", "offline")
    plain.feed("send bob in plain\n")
    plain.see(SAVED)
    assert plain.finish() == 0
    alice = chat.client("alice")
    bob = chat.start("bob", "--json")
    chat.until(lambda: any('"unproven"' in line for line in bob.lines), "the mail")
    event = next(event for event in map(json.loads, bob.lines) if event["type"] == "unproven")
    assert (event["from"], event["text"], event["reason"], event["secure"]) == ("alice", "in plain", "plain", False)
    assert (alice.finish(), bob.finish()) == (0, 0)
    again = chat.client("bob")
    assert again.finish() == 0 and not [line for line in again.lines if "in plain" in line], "it was acknowledged"


def test_letters_that_are_damaged_in_the_store_are_named_and_the_others_arrive(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.wait_for("bob", "offline")
    for text in ("one", "two", "three"):
        alice.feed(f"send bob {text}\n")
        alice.see(SAVED)
    assert alice.finish() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    database = sqlite3.connect(chat.store)
    texts = bytes(database.execute("SELECT texts FROM mail WHERE seq = 2").fetchone()[0])
    database.execute("UPDATE mail SET texts = ? WHERE seq = 2", (texts[:-1] + bytes((texts[-1] ^ 1,)),))
    database.commit()
    database.close()
    chat.server()
    bob = chat.client("bob")
    chat.until(lambda: any(line.endswith("> three") for line in bob.lines), "the mail")
    shown_lines = [line for line in bob.lines if line.startswith("alice:") or "damaged" in line]
    assert [line.rpartition(" ")[2] for line in shown_lines] == ["one", "damaged.]", "three"]
    assert shown_lines[1] == "[A message from alice is damaged.]"
    assert bob.finish() == 0
