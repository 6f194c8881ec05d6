"""The table, the mailbox and the registry, on arguments alone; the one thing touched is a file in a temporary folder.

What needs chance takes it from a seed (``Random``) or from hypothesis. No test looks at a clock.
"""
from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, count, islice
from pathlib import Path
from random import Random
from typing import Any, cast

import msgpack
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import home
import protocol
import registry
from home import Known, Mailbox, StoreError
from protocol import GONE, MAX_PIECE, OFFLINE, ONLINE, Address, Mirror, Page, Parcel, State, StoredLetter, Table
from registry import (BYE, DAY, EVICTED, FULL, GRANTED, KEEP, MAILBOX_SIZE, OWNED, PROBE_HOLDER, PROBE_RECIPIENT,
                      REPLACED, SILENCE, UNKNOWN, Registry, Session, ShownKey)

WALL = 1_700_000_000.0
SERVER = b"s" * 16
A, B, C, D = ("192.0.2.1", 5000), ("192.0.2.2", 5000), ("2001:db8::3", 5000), ("192.0.2.4", 5000)
SENDER, STREAM = "alice", 2 ** 62 + 1
EVERYTHING = 10 ** 6


# --- the table ------------------------------------------------------------------------------------------------

def filled(size: int) -> Table:
    table = Table()
    for number in range(size):
        table.set(f"nick-{number}", f"192.0.2.{number % 250}", 1024 + number, ONLINE if number % 2 else OFFLINE)
    return table


def contents(table: Table) -> dict[str, tuple[str, int, str]]:
    return {nick: entry[1:4] for nick, entry in table.entries.items()}


def mirrored(pages: list[Page], mirror: Table | None = None) -> Table:
    mirror = Table() if mirror is None else mirror
    for page in pages:
        assert mirror.apply(page) is not None
    return mirror


def test_no_two_entries_share_a_version_and_each_has_that_of_its_last_change() -> None:
    random, table, last = Random(1), Table(), {}
    for _ in range(500):
        nick, before = random.choice("abcdefgh"), table.version
        if table.set(nick, "192.0.2.1", random.randrange(3), random.choice([ONLINE, OFFLINE, GONE])):
            assert table.version == before + 1
            last[nick] = table.version
        else:
            assert table.version == before
    assert all(entry.version == last[nick] for nick, entry in table.entries.items())
    assert len({entry.version for entry in table.entries.values()}) == len(table) > 1


def test_the_interface_of_a_link_local_address_stays_on_the_machine_to_which_it_belongs() -> None:
    table = Table()
    table.set("bob", "fe80::1%2", 5000, ONLINE)
    assert [page.rows for page in table.pages(0, 1000)] == [[["bob", "fe80::1", 5000, ONLINE]]]
    entry = table.get("bob")
    assert entry is not None and entry.host == "fe80::1%2"


@pytest.mark.parametrize("change", [("bob", "192.0.2.9", 5000, ONLINE), ("bob", "192.0.2.1", 5001, ONLINE),
                                    ("bob", "192.0.2.1", 5000, OFFLINE), ("bob", "192.0.2.1", 5000, GONE),
                                    ("eve", "192.0.2.1", 5000, ONLINE)])
def test_every_difference_is_a_change_and_its_repetition_is_none(change: tuple[str, str, int, State]) -> None:
    table = Table()
    table.set("bob", "192.0.2.1", 5000, ONLINE)
    assert table.set(*change)
    assert table.version == 2
    assert not table.set(*change)
    assert table.version == 2


def test_a_nick_that_is_not_there_cannot_go() -> None:
    table = Table()
    assert not table.set("bob", "192.0.2.1", 5000, GONE)
    assert (table.version, len(table)) == (0, 0)


def test_a_nick_that_has_gone_is_unknown_until_it_is_set_again() -> None:
    table = Table()
    table.set("bob", *A, ONLINE)
    assert table.is_online("bob")
    table.set("bob", *A, GONE)
    assert table.get("bob") is None and not table.is_online("bob") and len(table) == 0
    table.set("bob", *A, OFFLINE)
    entry = table.get("bob")
    assert entry is not None and entry.row() == ["bob", *A, OFFLINE] and entry.version == 3
    assert not table.is_online("bob")


def test_pages_join_without_a_gap_and_name_every_entry_once_in_the_order_of_change() -> None:
    table = filled(300)
    table.set("nick-7", "192.0.2.7", 1, OFFLINE)
    pages = list(table.pages(0, 1000))
    assert [page.since for page in pages] == [0] + [page.version for page in pages[:-1]]
    assert pages[-1].version == table.version
    nicks = [row[0] for page in pages for row in page.rows]
    assert nicks == [f"nick-{number}" for number in range(300) if number != 7] + ["nick-7"]
    for page in pages:
        versions = [table.entries[str(row[0])].version for row in page.rows]
        assert page.since < min(versions) and max(versions) <= page.version


@given(st.lists(st.tuples(st.text(min_size=1, max_size=32), st.sampled_from([A[0], C[0]]), st.integers(0, 65535)),
                max_size=60), st.integers(200, 1100))
def test_a_page_on_the_wire_is_no_longer_than_asked_for(entries: list[tuple[str, str, int]], size: int) -> None:
    table = Table()
    for nick, host, port in entries:
        table.set(nick, host, port, OFFLINE)
    for page in table.pages(0, size):
        assert len(msgpack.packb(page.rows)) <= size


def test_an_entry_that_is_longer_than_a_page_has_one_for_itself() -> None:
    pages = list(filled(3).pages(0, 1))
    assert [len(page.rows) for page in pages] == [1, 1, 1]


def test_pages_are_filled() -> None:
    pages = list(filled(1000).pages(0, 1000))
    assert all(len(msgpack.packb(page.rows)) > 700 for page in pages[:-1])


def test_a_delta_names_only_what_changed() -> None:
    table = filled(100)
    since = table.version
    table.set("nick-5", "192.0.2.5", 1, ONLINE)
    table.set("nick-6", "192.0.2.6", 1, GONE)
    assert list(table.pages(since, 1000)) == [Page(since, since + 2, [["nick-5", "192.0.2.5", 1, ONLINE],
                                                                      ["nick-6", "192.0.2.6", 1, GONE]])]


@pytest.mark.parametrize("ahead", [0, 1, 1000])
def test_who_has_everything_or_more_gets_no_page(ahead: int) -> None:
    table = filled(3)
    assert not list(table.pages(table.version + ahead, 1000))


def test_a_mirror_tells_what_a_page_changed() -> None:
    mirror = mirrored([Page(0, 2, [["bob", *A, ONLINE], ["eve", *B, OFFLINE]])])
    assert mirror.apply(Page(2, 5, [["bob", *A, ONLINE], ["eve", *B, GONE], ["dan", *C, ONLINE],
                                    ["zoe", *C, GONE]])) == ["eve", "dan"]
    assert contents(mirror) == {"bob": (*A, ONLINE), "dan": (*C, ONLINE)}
    assert mirror.version == 5


def test_a_page_after_a_gap_is_not_taken() -> None:
    mirror = mirrored([Page(0, 2, [["bob", *A, ONLINE]])])
    assert mirror.apply(Page(3, 4, [["bob", *A, GONE]])) is None
    assert (mirror.version, contents(mirror)) == (2, {"bob": (*A, ONLINE)})


def test_a_page_that_is_not_newer_changes_nothing() -> None:
    mirror = mirrored([Page(0, 3, [["bob", *A, ONLINE]])])
    assert mirror.apply(Page(0, 3, [["bob", *A, OFFLINE]])) == []
    assert mirror.apply(Page(0, 2, [["bob", *A, GONE]])) == []
    assert (mirror.version, contents(mirror)) == (3, {"bob": (*A, ONLINE)})


def test_a_page_that_overlaps_what_is_there_is_taken_whole() -> None:
    mirror = mirrored([Page(0, 3, [["bob", *A, ONLINE]])])
    assert mirror.apply(Page(1, 5, [["bob", *A, OFFLINE], ["eve", *B, ONLINE]])) == ["bob", "eve"]
    assert contents(mirror) == {"bob": (*A, OFFLINE), "eve": (*B, ONLINE)}


def test_a_snapshot_asked_for_twice_does_not_bring_back_who_went_meanwhile() -> None:
    table = filled(6)
    first = next(table.pages(0, 60))                # the rest of this answer was lost
    mirror = mirrored([first])
    gone = next(iter(mirror.entries))
    table.set(gone, "192.0.2.0", 1024, GONE)
    mirrored(list(table.pages(0, 60)), mirror)      # the answer to the same question, repeated
    assert contents(mirror) == contents(table)


class Mirroring(RuleBasedStateMachine):
    """A table, one mirror, and a network between them that loses, repeats and reorders whatever it likes."""

    SIZE = 60   # two or three entries in a page

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mirror = Table(), Table()
        self.questions, self.wire, self.told = [0], [], 0       # type: list[int], list[Page], int

    @rule(nick=st.sampled_from("abcde"), port=st.integers(1, 2), state=st.sampled_from([ONLINE, OFFLINE, GONE]))
    def change(self, nick: str, port: int, state: State) -> None:
        self.table.set(nick, "192.0.2.1", port, state)

    @rule()
    def broadcast(self) -> None:
        self.wire.extend(self.table.pages(self.told, self.SIZE))
        self.told = self.table.version

    @rule()
    def ask(self) -> None:
        self.questions.append(self.mirror.version)

    @rule(which=st.integers(0, 30))
    def answer(self, which: int) -> None:
        self.wire.extend(islice(self.table.pages(self.questions[which % len(self.questions)], self.SIZE), 2))

    @precondition(lambda self: self.wire)
    @rule(which=st.integers(0, 30), again=st.booleans())
    def deliver(self, which: int, again: bool) -> None:
        page, before = self.wire[which % len(self.wire)], self.mirror.version
        if not again:
            self.wire.remove(page)
        changed = self.mirror.apply(page)
        assert (changed is None) == (page.since > before)
        assert self.mirror.version == (before if changed is None else max(before, page.version))

    @rule()
    def catch_up(self) -> None:
        for _ in range(10):
            mirrored(list(islice(self.table.pages(self.mirror.version, self.SIZE), 2)), self.mirror)
        assert contents(self.mirror) == contents(self.table)

    @invariant()
    def the_mirror_is_right_in_all_it_claims_to_hold(self) -> None:
        for nick, entry in self.table.entries.items():
            if entry.version <= self.mirror.version:
                assert contents(self.mirror).get(nick) == entry[1:4]
        changed = [row[0] for page in self.table.pages(self.mirror.version, EVERYTHING) for row in page.rows]
        assert all(nick in self.table.entries or nick in changed for nick in self.mirror.entries)


@pytest.mark.hypothesis
def test_a_mirror_equals_the_table_whatever_the_network_does_to_the_pages() -> None:
    run_state_machine_as_test(Mirroring, settings=settings(stateful_step_count=30))


def test_nicks_are_found_by_their_beginning_in_any_spelling_those_online_first() -> None:
    table = Table()
    for nick, state in (("Bob", ONLINE), ("bert", OFFLINE), ("anna", ONLINE), ("\u00dcnal", ONLINE), ("bea", ONLINE)):
        table.set(nick, *A, state)
    assert table.beginning_with("B", 9) == ["Bob", "bea", "bert"]
    assert table.beginning_with("b", 2) == ["Bob", "bea"]
    assert table.beginning_with("u\u0308N", 9) == table.beginning_with("\u00fc", 9) == ["\u00dcnal"]
    assert table.beginning_with("", 9) == ["Bob", "anna", "bea", "\u00dcnal", "bert"]
    assert not table.beginning_with("x", 9)


def test_the_table_of_a_restarted_server_comes_into_force_when_it_is_whole() -> None:
    mirror, before, after = Mirror(), filled(4), filled(2)
    after.set("nick-1", "192.0.2.9", 9, ONLINE)
    after.set("new", "192.0.2.1", 9, ONLINE)
    mirror.begin_session(1, before.version)
    assert not mirror.is_whole and not mirror.is_of_this_boot
    for page in before.pages(0, EVERYTHING):
        assert mirror.apply(page) == [f"nick-{number}" for number in range(4)]
    assert mirror.is_whole and mirror.is_of_this_boot and contents(mirror.table) == contents(before)
    mirror.begin_session(1, before.version)
    assert mirror.is_whole and mirror.is_of_this_boot, "another session, the same server"
    mirror.begin_session(2, after.version)
    pages = list(after.pages(0, 1))
    assert len(pages) == len(after) and mirror.version == 0
    assert mirror.apply(pages[1]) is None, "the one before it is missing"
    for page in pages[:-1]:
        assert mirror.apply(page) == [] and not mirror.is_whole
    assert contents(mirror.table) == contents(before), "the old one stays in force"
    assert mirror.apply(pages[-1]) == ["nick-1", "new", "nick-2", "nick-3"], "those that are not as they were"
    assert mirror.is_of_this_boot and contents(mirror.table) == contents(after)


def test_a_mirror_knows_when_it_is_behind() -> None:
    mirror, table = Mirror(), filled(3)
    mirror.begin_session(1, table.version)
    assert mirror.expect(table.version)
    for page in table.pages(0, EVERYTHING):
        mirror.apply(page)
    assert not mirror.expect(table.version) and mirror.is_whole
    table.set("nick-0", "192.0.2.1", 1, OFFLINE)
    assert mirror.expect(table.version) and not mirror.is_whole
    table.set("nick-1", "192.0.2.1", 1, OFFLINE)
    assert mirror.apply(list(table.pages(table.version - 1, EVERYTHING))[0]) is None
    assert mirror.apply(list(table.pages(mirror.version, EVERYTHING))[0]) == ["nick-0", "nick-1"]
    assert mirror.is_whole


def test_a_table_that_is_not_to_be_trusted_has_everybody_offline() -> None:
    mirror, table = Mirror(), filled(4)
    mirror.begin_session(1, table.version)
    for page in table.pages(0, EVERYTHING):
        mirror.apply(page)
    mirror.begin_session(2, 9)
    assert mirror.mark_all_offline() == ["nick-1", "nick-3"], "those who were online"
    assert mirror.mark_all_offline() == []
    assert [entry.state for entry in mirror.table.entries.values()] == [OFFLINE] * 4


def test_the_log_of_changes_stays_short_and_still_serves_every_version() -> None:
    random, table = Random(2), Table()
    copies: list[Table] = []
    for step in range(3000):
        table.set(random.choice("abcdefgh"), "192.0.2.1", random.randrange(3), random.choice([ONLINE, OFFLINE, GONE]))
        assert len(table._log) <= 2 * 8 + 65
        if step % 100 == 0:
            copies.append(mirrored(list(table.pages(0, 60))))
    for copy in copies:
        assert contents(mirrored(list(table.pages(copy.version, 60)), copy)) == contents(table)


def test_of_those_who_went_only_the_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_TOMBSTONES", 3)
    table = filled(6)
    since = table.version
    for nick in list(table.entries)[:5]:
        table.set(nick, "192.0.2.1", 1, GONE)
    assert [row[0] for page in table.pages(since, 1000) for row in page.rows] == ["nick-2", "nick-3", "nick-4"]


# --- the store ------------------------------------------------------------------------------------------------

class Faulty:
    """A connection whose statements fail where they begin with one of ``fails``."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.fails: tuple[str, ...] = ()

    def _check(self, statement: str) -> None:
        if statement.startswith(self.fails):
            raise sqlite3.OperationalError("disk I/O error")

    def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
        self._check(statement)
        return self.db.execute(statement, *rest)

    def executemany(self, statement: str, *rest: Any) -> sqlite3.Cursor:
        if rest[0]:
            self._check(statement)
        return self.db.executemany(statement, *rest)

    def close(self) -> None:
        self.db.close()


def faulty(box: Mailbox) -> Faulty:
    fault = Faulty(box._db)
    box._db = cast(sqlite3.Connection, fault)
    return fault


def open_box(path: Path) -> Mailbox:
    return Mailbox(str(path), SERVER)


@pytest.fixture(name="path")
def path_of_a_store(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture(name="box")
def box_with_bob(path: Path) -> Iterator[Mailbox]:
    box = open_box(path)
    box.add("bob", *A, None, WALL)
    assert box.commit(WALL)
    yield box
    box.close()


def parcel_of(first: int, *texts: str) -> Parcel:
    """Return a number for every text; one that ends with "…" is continued by the next."""
    return Parcel(first, list(texts), [WALL + n for n in range(first, first + len(texts))],
                  [n for n, text in enumerate(texts, first) if text.endswith("…")])


def letters_of(sender: str, stream: int, parcel: Parcel) -> list[StoredLetter]:
    """Return a parcel as its recipient gets it."""
    return [((sender, stream, at, parcel.seal), n, text, n in parcel.more)
            for n, (text, at) in enumerate(zip(parcel.texts, parcel.times), parcel.n)]


def keep(box: Mailbox, nick: str, *texts: str, sender: str = SENDER, stream: int = STREAM) -> None:
    first = box.stream_next(sender, stream)
    assert first is not None
    box.keep(box.known[nick], sender, stream, parcel_of(first, *texts))


def mail(box: Mailbox, nick: str = "bob") -> list[tuple[int, str]]:
    """Return the mail of ``nick`` on the disk, with its numbers."""
    first = box._db.execute("SELECT min(seq) FROM mail WHERE recipient = ?", (box.known[nick].id,)).fetchone()[0] or 1
    return [(seq, letter[2]) for seq, letter in enumerate(box.fetch(box.known[nick], first, EVERYTHING), first)]


def counts(known: Known) -> tuple[int, int, int, int, int]:
    return known.first, known.last, known.waiting, known.messages, known.size


def test_mail_is_there_only_after_the_commit(box: Mailbox) -> None:
    keep(box, "bob", "one", "two")
    assert box.pending and mail(box) == []
    assert box.commit(WALL)
    assert not box.pending and mail(box) == [(1, "one"), (2, "two")]


def test_what_was_kept_comes_back_in_every_field_and_character(box: Mailbox, path: Path) -> None:
    texts = ["", "\0 and \N{GRINNING FACE}", "it goes on…", "' OR 1=1 --"]
    parcel = parcel_of(2 ** 40, *texts)
    box.keep(box.known["bob"], "älice", 2 ** 63 - 1, parcel)
    box.commit(WALL)
    box.close()
    box = open_box(path)
    assert box.fetch(box.known["bob"], 1, EVERYTHING) == letters_of("älice", 2 ** 63 - 1, parcel)
    box.close()


@pytest.mark.parametrize("times", [[WALL, WALL, WALL], [WALL, WALL + 0.1, WALL], [0.0, 1e9 / 3, WALL]])
def test_every_number_keeps_its_own_time(box: Mailbox, times: list[float]) -> None:
    box.keep(box.known["bob"], SENDER, STREAM, Parcel(1, ["one", "two", "three"], times, ()))
    box.commit(WALL)
    assert [letter[0][2] for letter in box.fetch(box.known["bob"], 1, EVERYTHING)] == times
    box.acked(box.known["bob"], 2)
    box.commit(WALL)
    assert [letter[0][2] for letter in box.fetch(box.known["bob"], 2, EVERYTHING)] == times[1:]


def test_fetch_begins_where_it_is_told_and_ends_at_its_limit(box: Mailbox) -> None:
    keep(box, "bob", "one", "two", "three", "four")
    box.commit(WALL)
    keep(box, "bob", "five", stream=7)
    box.commit(WALL)
    assert [letter[2] for letter in box.fetch(box.known["bob"], 2, 2)] == ["two", "three"]
    assert [letter[2] for letter in box.fetch(box.known["bob"], 4, 2)] == ["four", "five"]
    assert box.fetch(box.known["bob"], 6, 2) == []


def test_a_text_that_was_acked_is_deleted_though_others_were_kept_with_it(box: Mailbox) -> None:
    keep(box, "bob", "secret", "goes on…", "and ends", "last")
    box.commit(WALL)
    box.acked(box.known["bob"], 2)
    box.commit(WALL)
    assert mail(box) == [(2, "goes on…"), (3, "and ends"), (4, "last")]
    assert box.fetch(box.known["bob"], 2, 1) == [((SENDER, STREAM, WALL + 2, ()), 2, "goes on…", True)]
    box.acked(box.known["bob"], 4)
    box.commit(WALL)
    assert counts(box.known["bob"]) == (4, 4, 1, 1, 4)


def test_mail_is_counted_as_messages_as_bytes_and_as_numbers(box: Mailbox) -> None:
    keep(box, "bob", "long, very…", "long", "ü")
    assert counts(box.known["bob"]) == (1, 3, 3, 2, len("long, very…long".encode()) + 2)


def test_acked_mail_is_deleted_and_no_longer_counted_after_the_commit(box: Mailbox) -> None:
    keep(box, "bob", "one", "two", "three")
    box.commit(WALL)
    box.acked(box.known["bob"], 3)
    assert box.known["bob"].waiting == 1 and box.pending
    assert box.commit(WALL)
    assert mail(box) == [(3, "three")]
    assert counts(box.known["bob"]) == (3, 3, 1, 1, 5)


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 4, 1000])
def test_an_ack_of_what_was_acked_or_never_kept_is_ignored(box: Mailbox, number: int) -> None:
    keep(box, "bob", "one", "two")
    box.commit(WALL)
    box.acked(box.known["bob"], 2)
    box.commit(WALL)
    box.acked(box.known["bob"], number)
    assert not box.pending
    assert (counts(box.known["bob"]), mail(box)) == ((2, 2, 1, 1, 3), [(2, "two")])


def test_mail_is_numbered_without_gaps_through_acks_and_restarts(box: Mailbox, path: Path) -> None:
    for text in "abcd":
        keep(box, "bob", text)
        box.commit(WALL)
        box.acked(box.known["bob"], box.known["bob"].last + 1)
        box.commit(WALL)
        box.close()
        box = open_box(path)
        assert box.known["bob"].waiting == 0
    keep(box, "bob", "e")
    box.commit(WALL)
    assert mail(box) == [(5, "e")]
    box.close()


def test_how_far_each_stream_was_kept_survives_its_mail_and_a_restart(box: Mailbox, path: Path) -> None:
    assert box.stream_next(SENDER, STREAM) == 1
    keep(box, "bob", "one", "two")
    keep(box, "bob", "one", stream=5)
    assert box.stream_next(SENDER, STREAM) == 3
    box.commit(WALL)
    keep(box, "bob", "three")
    box.commit(WALL)
    box.acked(box.known["bob"], 5)
    box.commit(WALL)
    box.close()
    box = open_box(path)
    assert mail(box) == []
    assert [box.stream_next(*key) for key in ((SENDER, STREAM), (SENDER, 5), ("bob", STREAM))] == [4, 2, 1]
    box.close()


def test_all_that_is_known_of_a_nick_survives_a_restart(box: Mailbox, path: Path) -> None:
    eve = box.add("eve", *B, b"o" * 32, WALL + 1.5)
    box.commit(WALL)
    eve.host, eve.port, eve.online, eve.seen = *C, True, WALL + 2.5
    box.changed(eve)
    box.commit(WALL)
    box.close()
    box = open_box(path)
    assert list(box.known) == ["bob", "eve"]
    assert [(known.nick, known.host, known.port, known.online, known.owner, known.seen, known.first, known.last)
            for known in box.known.values()] == [("bob", *A, False, None, WALL, 1, 0),
                                                 ("eve", *C, True, b"o" * 32, WALL + 2.5, 1, 0)]
    box.close()


def test_a_store_keeps_the_id_it_was_made_with(box: Mailbox, path: Path) -> None:
    box.close()
    again = Mailbox(str(path), b"another id, now!")
    assert again.server_id == SERVER
    again.close()


def test_what_was_not_committed_is_lost_when_the_store_is_closed(box: Mailbox, path: Path) -> None:
    keep(box, "bob", "one")
    box.add("eve", *B, None, WALL)
    box.close()
    box = open_box(path)
    assert (list(box.known), mail(box), box.known["bob"].last, box.stream_next(SENDER, STREAM)) == (["bob"], [], 0, 1)
    box.close()


def test_a_commit_of_nothing_does_not_need_the_disk(box: Mailbox) -> None:
    faulty(box).fails = ("",)
    assert box.commit(WALL)


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO mail", "INSERT OR REPLACE INTO streams", "SELECT total",
                                       "DELETE", "INSERT INTO nicks", "COMMIT"])
def test_a_failed_commit_undoes_the_mail_of_its_turn_and_nothing_else(box: Mailbox, path: Path, statement: str) -> None:
    keep(box, "bob", "one", "two")
    box.commit(WALL)
    fault = faulty(box)
    fault.fails = (statement,)
    box.acked(box.known["bob"], 2)
    box.add("eve", *B, None, WALL)
    for text in "xy":
        keep(box, "bob", "lost…", text)
        keep(box, "eve", "lost", stream=5)
    assert not box.commit(WALL)
    assert counts(box.known["bob"]) == (2, 2, 1, 2, 6)      # the ack is not on the disk: "one" still takes room
    assert counts(box.known["eve"]) == (1, 0, 0, 0, 0)
    assert (mail(box), mail(box, "eve")) == ([(1, "one"), (2, "two")], [])
    assert [box.stream_next(SENDER, stream) for stream in (STREAM, 5)] == [3, 1]
    assert box.pending
    fault.fails = ()
    keep(box, "bob", "three")
    assert box.commit(WALL)
    for _ in range(2):
        assert (mail(box), mail(box, "eve")) == ([(2, "two"), (3, "three")], [])
        assert counts(box.known["bob"]) == (2, 3, 2, 2, 8)
        assert [box.stream_next(SENDER, stream) for stream in (STREAM, 5)] == [4, 1]
        box.close()
        box = open_box(path)
    box.close()


def test_a_disk_that_is_full_costs_only_the_mail_that_did_not_fit(box: Mailbox, path: Path) -> None:
    keep(box, "bob", "small")
    assert box.commit(WALL)
    pages = box._db.execute("PRAGMA page_count").fetchone()[0]
    box._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    keep(box, "bob", *["x" * 700] * 40)
    box.known["bob"].port = 77
    box.changed(box.known["bob"])
    box.acked(box.known["bob"], 2)
    assert not box.commit(WALL)
    assert (mail(box), counts(box.known["bob"])) == ([(1, "small")], (2, 1, 0, 1, 5))
    assert box.commit(WALL), "the ack and the new port need no room"
    assert (mail(box), counts(box.known["bob"])) == ([], (2, 1, 0, 0, 0))
    keep(box, "bob", *["y" * 700] * 40)
    assert not box.commit(WALL)
    box._db.execute("PRAGMA max_page_count = 1000000")
    keep(box, "bob", "fits")
    assert box.commit(WALL)
    box.close()
    box = open_box(path)
    assert (mail(box), box.known["bob"].port, box.stream_next(SENDER, STREAM)) == ([(2, "fits")], 77, 3)
    box.close()


def test_a_store_that_cannot_be_read_says_so_and_raises_nothing(box: Mailbox) -> None:
    keep(box, "bob", "one")
    box.commit(WALL)
    fault = faulty(box)
    for use in (lambda: box.stream_next(SENDER, 6), lambda: box.fetch(box.known["bob"], 1, 9)):
        fault.fails = ("SELECT",)
        assert not use()
        fault.fails = ()
        assert use()


class Shadow:
    """What the model holds of one nick."""

    def __init__(self) -> None:
        self.first, self.last = 1, 0
        self.kept: list[tuple[int, StoredLetter]] = []      # on the disk, with their numbers
        self.turn: list[tuple[int, StoredLetter]] = []      # since the last commit

    def copy(self) -> Shadow:
        copy = Shadow()
        copy.first, copy.last, copy.kept = self.first, self.last, list(self.kept)
        return copy


class Storing(RuleBasedStateMachine):
    """A mailbox on a disk that fails now and then, in a server that dies now and then, beside a model of it."""

    NICKS, SENDERS, WHICH = st.sampled_from(["bob", "eve"]), st.sampled_from(["alice", "bob"]), st.integers(0, 1)
    STREAMS = [("alice", 1), ("alice", 2), ("bob", 1), ("bob", 2)]
    TEXTS = st.lists(st.text(max_size=5), min_size=1, max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.box = open_box(self.folder / "store.db")
        self.fault = faulty(self.box)
        self.known: dict[str, Shadow] = {}
        self.on_disk: dict[str, Shadow] = {}
        self.streams: dict[tuple[str, int], int] = {}
        self.turn_streams: dict[tuple[str, int], int] = {}
        self.forgotten: set[str] = set()

    def teardown(self) -> None:
        self.box.close()
        shutil.rmtree(self.folder)

    @rule(nick=NICKS)
    def add(self, nick: str) -> None:
        if nick not in self.known:
            self.box.add(nick, *A, None, WALL)
            self.known[nick] = Shadow()

    def one(self, which: int) -> str:
        return sorted(self.known)[which % len(self.known)]

    @precondition(lambda self: self.known)
    @rule(which=WHICH, sender=SENDERS, stream=st.integers(1, 2), texts=TEXTS)
    def keep(self, which: int, sender: str, stream: int, texts: list[str]) -> None:
        nick = self.one(which)
        shadow = self.known[nick]
        texts[-1] = texts[-1].rstrip("…")
        parcel = parcel_of(self.next_of(sender, stream), *texts)
        self.box.keep(self.box.known[nick], sender, stream, parcel)
        for letter in letters_of(sender, stream, parcel):
            shadow.last += 1
            shadow.turn.append((shadow.last, letter))
        self.turn_streams[sender, stream] = parcel.n + len(texts)

    def next_of(self, sender: str, stream: int) -> int:
        return self.turn_streams.get((sender, stream), self.streams.get((sender, stream), 1))

    @precondition(lambda self: self.known)
    @rule(which=WHICH, step=st.integers(-1, 5))
    def ack(self, which: int, step: int) -> None:
        nick = self.one(which)
        shadow = self.known[nick]
        number = min(shadow.first + step, shadow.last - len(shadow.turn) + 1)
        self.box.acked(self.box.known[nick], number)
        shadow.first = max(shadow.first, number)

    @precondition(lambda self: self.known)
    @rule(which=WHICH)
    def forget(self, which: int) -> None:
        nick = self.one(which)
        self.box.forget(self.box.known[nick])
        del self.known[nick]
        self.forgotten.add(nick)

    @rule(fails=st.sampled_from(["", "", "BEGIN", "INSERT", "DELETE", "COMMIT"]))
    def commit(self, fails: str) -> None:
        pending = self.box.pending
        self.fault.fails = (fails,) if fails else ()
        committed = self.box.commit(WALL)
        self.fault.fails = ()
        if not fails:
            assert committed
        elif fails in ("BEGIN", "COMMIT"):
            assert committed != pending
        for shadow in self.known.values():
            if committed:
                shadow.kept = [kept for kept in shadow.kept + shadow.turn if kept[0] >= shadow.first]
            else:
                shadow.last -= len(shadow.turn)
            shadow.turn = []
        if committed:
            self.streams = {key: number for key, number in self.streams.items() if key[0] not in self.forgotten}
            self.streams.update(self.turn_streams)
            self.forgotten.clear()
            self.on_disk = {nick: shadow.copy() for nick, shadow in self.known.items()}
        self.turn_streams = {}

    @rule()
    def die(self) -> None:
        self.box.close()
        self.box = open_box(self.folder / "store.db")
        self.fault = faulty(self.box)
        self.known = {nick: shadow.copy() for nick, shadow in self.on_disk.items()}
        self.turn_streams = {}
        self.forgotten.clear()

    @invariant()
    def the_mailbox_is_what_the_model_says(self) -> None:
        assert set(self.box.known) == set(self.known)
        for nick, shadow in self.known.items():
            known, all_ = self.box.known[nick], shadow.kept + shadow.turn
            assert counts(known) == (shadow.first, shadow.last, shadow.last - shadow.first + 1,
                                     sum(not letter[3] for _, letter in all_),
                                     sum(len(letter[2].encode()) for _, letter in all_))
            assert self.box.fetch(known, known.first, EVERYTHING) == [
                letter for seq, letter in shadow.kept if seq >= known.first]
        for key in self.STREAMS:
            if key[0] not in self.forgotten:
                assert self.box.stream_next(*key) == self.next_of(*key)


@pytest.mark.hypothesis
def test_a_mailbox_holds_and_counts_exactly_what_was_committed_through_failures_and_restarts() -> None:
    run_state_machine_as_test(Storing, settings=settings(stateful_step_count=30))


# what is a store, and whose

def sqlite_file(path: Path, *statements: str) -> bytes:
    db = sqlite3.connect(path)
    for statement in ("CREATE TABLE meta (key, value)", *statements):
        db.execute(statement)
    db.commit()
    db.close()
    return path.read_bytes()


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("dear diary\n" * 100), "is not a udpchat store"),
    "one byte": (lambda path: path.write_bytes(b"S"), "is not a udpchat store"),
    "only the magic of SQLite": (lambda path: path.write_bytes(b"SQLite format 3\0"), "is not a udpchat store"),
    "another program's database": (lambda path: sqlite_file(path), "is not a udpchat store"),
    "a newer version": (lambda path: sqlite_file(
        path, f"PRAGMA application_id = {home.APPLICATION_ID}", f"PRAGMA user_version = {home.STORE_FORMAT + 1}"),
        "of another version"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_no_store_of_this_version_is_refused_and_left_alone(path: Path, what: str) -> None:
    make, reason = FOREIGN[what]
    make(path)
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(StoreError, match=reason):
        open_box(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, written)
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_store_is_refused_with_a_reason(box: Mailbox, path: Path) -> None:
    box.close()
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * (len(data) - 100))
    with pytest.raises(StoreError, match="cannot open the store"):
        open_box(path)


@pytest.mark.parametrize("name", [".", "missing/store.db"])
def test_what_cannot_be_opened_is_an_error_with_a_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot open the store .*: .|is not a udpchat store"):
        open_box(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_taken_as_a_new_store(path: Path) -> None:
    path.touch()
    box = open_box(path)
    assert (box.known, box.server_id) == ({}, SERVER)
    box.close()
    open_box(path).close()


def test_a_store_can_be_open_only_once(box: Mailbox, path: Path) -> None:
    with pytest.raises(StoreError, match="another server has it open"):
        open_box(path)
    keep(box, "bob", "one")
    assert box.commit(WALL)
    box.close()
    box = open_box(path)
    assert mail(box) == [(1, "one")]
    box.close()


def test_another_process_cannot_open_a_store_that_is_in_use(box: Mailbox, path: Path) -> None:
    script = "import sys, home\nhome.Mailbox(sys.argv[1], bytes(16)).close()"
    command = [sys.executable, "-c", script, str(path)]
    folder = Path(home.__file__).parent
    refused = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, check=False)
    assert refused.returncode == 1 and b"another server has it open" in refused.stderr
    box.close()
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0


def test_a_store_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    box = Mailbox(":memory:", SERVER)
    box.add("bob", *A, None, WALL)
    keep(box, "bob", "one")
    assert box.commit(WALL) and mail(box) == [(1, "one")]
    assert list(tmp_path.iterdir()) == []
    box.close()


# a crash at any moment

def copied(path: Path, folder: Path) -> Path:
    """Return what ``kill -9`` would leave of a store: its files as they are on the disk at this moment."""
    folder.mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, folder)
    return folder / path.name


class Watched(sqlite3.Connection):
    """A connection that tells when a statement is done."""

    done: Callable[[], None]

    def execute(self, *args: Any) -> sqlite3.Cursor:
        cursor = super().execute(*args)
        type(self).done()
        return cursor


def assert_usable(path: Path) -> None:
    for opened in range(3):
        box = open_box(path)
        if not opened:
            box.add("bob", *A, None, WALL)
        keep(box, "bob", "more")
        assert box.commit(WALL)
        assert len(mail(box)) == opened + 1
        box.close()


def test_a_crash_between_any_steps_of_its_making_leaves_a_store_that_can_be_opened(
        tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(Watched, "done", lambda: copies.append(copied(path, tmp_path / str(len(copies)))), raising=False)
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
        open_box(path).close()
    assert len(copies) > 10
    for copy in copies:
        assert_usable(copy)


def test_a_crash_while_its_making_is_written_leaves_a_store_that_can_be_opened(tmp_path: Path, path: Path) -> None:
    open_box(path).close()
    whole, journal = path.read_bytes(), tmp_path / "other.db-journal"
    db = sqlite3.connect(tmp_path / "other.db", isolation_level=None)
    db.execute("PRAGMA cache_size = 1")     # SQLite writes before the commit, and so the journal
    for statement in ("BEGIN", *home.TABLES.split(";")):
        db.execute(statement)
    before_the_commit = journal.read_bytes()
    db.close()
    assert before_the_commit
    for size in range(4096, len(whole) + 1, 1024):
        torn = tmp_path / str(size) / path.name
        torn.parent.mkdir()
        torn.write_bytes(whole[:size])
        torn.with_name(path.name + "-journal").write_bytes(before_the_commit)
        assert_usable(torn)


def test_a_store_holds_every_commit_whenever_its_server_is_killed(box: Mailbox, tmp_path: Path, path: Path) -> None:
    for number in range(1, 15):
        keep(box, "bob", f"{number} goes on…", "and ends")
        box.commit(WALL)
        if number % 4 == 0:
            box.acked(box.known["bob"], number)
            box.commit(WALL)
        held, before = mail(box), counts(box.known["bob"])
        keep(box, "bob", "not committed")
        survivor = open_box(copied(path, tmp_path / str(number)))
        assert (mail(survivor), counts(survivor.known["bob"])) == (held, before)
        assert survivor.stream_next(SENDER, STREAM) == 2 * number + 1
        survivor.close()
        faulty(box).fails = ("BEGIN",)
        box.commit(WALL)
        box._db = cast(Faulty, box._db).db


def test_a_store_whose_log_is_torn_holds_every_commit_before_the_tear(box: Mailbox, tmp_path: Path, path: Path) -> None:
    log = path.with_name(path.name + "-wal")
    ends = []
    for number in range(1, 11):
        keep(box, "bob", f"{number} goes on…", "x" * 700)
        box.commit(WALL)
        ends.append(log.stat().st_size)
    assert ends == sorted(set(ends)), "no commit may have been moved out of the log yet"
    random = Random(3)
    offsets = [end + step for end in ends for step in (-1, 0, 1)] + [random.randrange(ends[-1]) for _ in range(50)]
    whole = log.read_bytes()
    for index, offset in enumerate(offsets):
        copy = copied(path, tmp_path / str(index))
        garbage = random.randbytes(random.choice([0, 10, 5000])) if index % 2 else b""
        copy.with_name(log.name).write_bytes(whole[:offset] + garbage)
        survivor = open_box(copy)
        committed = sum(end <= offset for end in ends)
        if "bob" in survivor.known:
            assert mail(survivor) == mail(box)[:2 * committed]
            assert counts(survivor.known["bob"])[:4] == (1, 2 * committed, 2 * committed, committed)
        else:
            assert offset < ends[0]
        assert survivor.stream_next(SENDER, STREAM) == 2 * committed + 1
        survivor.add("new", *B, None, WALL)
        keep(survivor, "new", "it goes on")
        assert survivor.commit(WALL)
        survivor.close()


# forgetting

def test_a_forgotten_nick_takes_its_owner_its_mail_and_its_streams_along(box: Mailbox, path: Path) -> None:
    box.add("eve", *B, b"o" * 32, WALL)
    for nick, sender in (("eve", "bob"), ("bob", "eve")):
        keep(box, nick, "one", "two", sender=sender)
    box.commit(WALL)
    box.forget(box.known["eve"])
    assert list(box.known) == ["bob"]
    assert box.commit(WALL)
    for _ in range(2):
        assert (list(box.known), mail(box)) == (["bob"], [(1, "one"), (2, "two")])
        assert (box.stream_next("eve", STREAM), box.stream_next("bob", STREAM)) == (1, 3)
        box.close()
        box = open_box(path)
    eve = box.add("eve", *C, None, WALL)
    box.commit(WALL)
    assert (counts(eve), mail(box, "eve")) == ((1, 0, 0, 0, 0), [])
    box.close()


def test_mail_kept_in_the_turn_in_which_its_recipient_is_forgotten_goes_with_it(box: Mailbox, path: Path) -> None:
    box.add("eve", *B, None, WALL)
    keep(box, "eve", "lost")
    keep(box, "bob", "kept", stream=5)
    box.forget(box.known["eve"])
    assert box.commit(WALL)
    box.close()
    box = open_box(path)
    assert (list(box.known), mail(box)) == (["bob"], [(1, "kept")])
    assert box._db.execute("SELECT count(*) FROM mail").fetchone()[0] == 1
    box.close()


@pytest.mark.parametrize("fails", [(), ("COMMIT",)])
def test_whatever_was_pending_for_a_forgotten_nick_is_dropped(box: Mailbox, path: Path, fails: tuple[str, ...]) -> None:
    keep(box, "bob", "one", "two")
    box.commit(WALL)
    keep(box, "bob", "three")
    box.acked(box.known["bob"], 2)
    box.forget(box.known["bob"])
    fault = faulty(box)
    fault.fails = fails
    assert box.commit(WALL) == (not fails)
    fault.fails = ()
    assert box.commit(WALL)
    box.close()
    box = open_box(path)
    assert box.known == {} and not box._db.execute("SELECT * FROM mail").fetchall()
    box.close()


def test_a_nick_forgotten_twice_before_it_could_be_written_is_gone_for_good(box: Mailbox, path: Path) -> None:
    keep(box, "bob", "one")
    box.commit(WALL)
    fault = faulty(box)
    fault.fails = ("BEGIN",)
    box.forget(box.known["bob"])
    assert not box.commit(WALL)
    box.add("bob", *B, None, WALL)
    assert not box.commit(WALL)
    box.forget(box.known["bob"])
    fault.fails = ()
    assert box.commit(WALL)
    box.close()
    box = open_box(path)
    assert box.known == {}
    box.add("bob", *C, None, WALL)
    assert box.commit(WALL) and mail(box) == []
    box.close()


def tidied(box: Mailbox, now: float) -> Mailbox:
    box.tidy()
    assert box.commit(now)
    return box


def test_of_too_many_streams_those_longest_silent_are_pruned(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "MAX_STREAMS", 3)
    for number in (1, 2, 3, 4, 5, 2):
        keep(box, "bob", "text", stream=number)
        box.commit(now := 1000.0 + box.known["bob"].last)
    assert now == 1006.0
    for _ in range(2):
        tidied(box, now)
        assert [box.stream_next(SENDER, number) for number in range(1, 6)] == [1, 3, 1, 2, 2]


def test_as_many_streams_as_allowed_are_left_alone(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "MAX_STREAMS", 3)
    for number in (1, 2, 3):
        keep(box, "bob", "text", stream=number)
        box.commit(WALL + number)
    tidied(box, WALL + 4)
    assert [box.stream_next(SENDER, number) for number in (1, 2, 3)] == [2, 2, 2]


# --- the registry ---------------------------------------------------------------------------------------------

IDS = count(1)


def new_registry(max_clients: int = 10, mailbox_limit: int = 100, max_known: int = 100) -> Registry:
    return Registry(Mailbox(":memory:", SERVER), max_clients, mailbox_limit, max_known)


@pytest.fixture(name="reg")
def empty_registry() -> Registry:
    return new_registry()


def admit(reg: Registry, nick: str, address: Address, token: bytes | None = None, now: float = 0.0,
          key: ShownKey | None = None) -> Session:
    number = next(IDS)
    return reg.admit(now, number.to_bytes(16, "big"), nick, address, token, number, key)


def register(reg: Registry, nick: str, address: Address, token: bytes | None = None, now: float = 0.0,
             key: ShownKey | None = None) -> Session:
    assert reg.claim(nick, address, token, key) == GRANTED
    return admit(reg, nick, address, token, now, key)


def save(reg: Registry, nick: str, *texts: str, stream: int = STREAM) -> None:
    keep(reg.mailbox, nick, *texts, stream=stream)
    assert reg.mailbox.commit(WALL)


def state_of(reg: Registry, nick: str) -> tuple[str, int, str] | None:
    entry = reg.table.get(nick)
    return entry[1:4] if entry is not None else None


def restarted(reg: Registry) -> Registry:
    assert reg.mailbox.commit(WALL)
    return Registry(reg.mailbox, reg.max_clients, reg.mailbox_limit, reg.max_known)


# who gets a nick

def test_clients_of_the_same_link_local_address_on_two_links_are_two(reg: Registry) -> None:
    left, right = ("fe80::1%2", 5000), ("fe80::1%3", 5000)
    register(reg, "alice", left)
    register(reg, "bob", right)
    assert (state_of(reg, "alice"), state_of(reg, "bob")) == ((*left, ONLINE), (*right, ONLINE))
    assert restarted(reg).known_addresses() == [left, right]


def test_a_new_nick_is_granted_and_online_where_it_registered(reg: Registry) -> None:
    session = register(reg, "bob", A, now=7.0)
    assert state_of(reg, "bob") == (*A, ONLINE)
    assert (session.nick, session.address, session.heard, session.version) == ("bob", A, 7.0, reg.table.version)
    assert reg.holder("bob") == A and reg.holder("eve") is None


def test_a_nick_in_use_is_asked_for_at_its_holder_first(reg: Registry) -> None:
    register(reg, "bob", A)
    assert reg.claim("bob", B, None) == PROBE_HOLDER
    assert reg.claim("bob", A, None) == GRANTED
    assert reg.claim("eve", B, None) == GRANTED


def test_a_nick_whose_holder_went_offline_or_left_is_granted_elsewhere(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.went_offline(session, WALL)
    assert reg.holder("bob") is None and reg.claim("bob", B, None) == GRANTED
    reg.heard(session, 1.0)
    assert reg.claim("bob", B, None) == PROBE_HOLDER
    reg.deregister(session, WALL)
    assert reg.holder("bob") is None and reg.claim("bob", B, None) == GRANTED


def test_a_nick_registered_with_a_token_is_refused_without_it(reg: Registry) -> None:
    register(reg, "bob", A, b"token of bob")
    for address in (A, B):
        assert reg.claim("bob", address, None) == OWNED
        assert reg.claim("bob", address, b"another one") == OWNED
        assert reg.claim("bob", address, b"") == OWNED
    assert reg.claim("bob", B, b"token of bob") == PROBE_HOLDER
    reg = restarted(reg)
    assert reg.claim("bob", B, b"another one") == OWNED
    assert reg.claim("bob", A, b"token of bob") == GRANTED


def test_the_store_knows_only_the_hash_of_a_token(path: Path) -> None:
    reg = Registry(open_box(path))
    register(reg, "bob", A, b"token of bob")
    assert reg.mailbox.known["bob"].owner == hashlib.sha256(b"token of bob").digest()
    reg.mailbox.commit(WALL)
    reg.mailbox.close()
    assert b"token of bob" not in path.read_bytes()
    assert hashlib.sha256(b"token of bob").digest() in path.read_bytes()


def test_an_anonymous_nick_goes_with_its_mail_to_whoever_comes_and_is_owned_from_the_first_token_on(
        reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one")
    session = register(reg, "bob", B)
    assert reg.mail_number(session) == 1
    reg.deregister(session, WALL)
    reg.deregister(register(reg, "bob", C, b"token"), WALL)
    assert reg.claim("bob", A, None) == OWNED
    assert reg.claim("bob", A, b"token") == GRANTED


def test_after_a_restart_a_nick_that_was_online_may_still_be_held(path: Path) -> None:
    reg = Registry(open_box(path))
    register(reg, "bob", A)
    reg.deregister(register(reg, "eve", B), WALL)
    for _ in range(2):
        reg.mailbox.commit(WALL)
        reg.mailbox.close()
        reg = Registry(open_box(path))
        assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*A, OFFLINE), (*B, OFFLINE))
        assert (reg.holder("bob"), reg.holder("eve")) == (A, None)
        assert reg.claim("bob", B, None) == PROBE_HOLDER
        assert reg.claim("bob", A, None) == GRANTED
        assert reg.claim("eve", A, None) == GRANTED
    register(reg, "bob", A)
    assert reg.maybe_running == {} and reg.holder("bob") == A
    reg.mailbox.close()


def test_after_a_restart_no_two_entries_share_a_version(reg: Registry) -> None:
    for nick, address in (("bob", A), ("eve", B), ("zoe", C)):
        register(reg, nick, address)
    table = restarted(reg).table
    assert sorted(entry.version for entry in table.entries.values()) == [1, 2, 3]
    assert table.version == 3


def test_a_server_full_of_live_clients_admits_nobody_new() -> None:
    reg = new_registry(max_clients=2)
    register(reg, "bob", A)
    register(reg, "eve", B)
    assert reg.claim("zoe", C, None) == FULL
    assert reg.claim("bob", A, None) == GRANTED, "who is there already takes no new place"
    assert reg.claim("bob", C, None) == PROBE_HOLDER


def test_a_full_server_evicts_the_oldest_session_of_somebody_offline() -> None:
    reg = new_registry(max_clients=3)
    bob, eve, zoe = (register(reg, nick, address) for nick, address in (("bob", A), ("eve", B), ("zoe", C)))
    reg.went_offline(zoe, WALL)
    reg.went_offline(eve, WALL)
    register(reg, "dan", D)
    assert set(reg.sessions.by_nick) == {"bob", "zoe", "dan"}
    assert dict(reg.sessions.ended) == {eve.id: EVICTED}
    assert eve.id not in reg.sessions.by_id and state_of(reg, "eve") == (*B, OFFLINE)
    assert {bob.id, zoe.id} < set(reg.sessions.by_id)


def test_whoever_registers_again_replaces_the_own_session_and_evicts_nobody() -> None:
    reg = new_registry(max_clients=2)
    old = register(reg, "bob", A)
    reg.went_offline(register(reg, "eve", B), WALL)
    new = register(reg, "bob", A)
    assert dict(reg.sessions.ended) == {old.id: REPLACED}
    assert set(reg.sessions.by_nick) == {"bob", "eve"} and reg.sessions.by_nick["bob"] is new
    assert set(reg.sessions.live) == {new.id} and state_of(reg, "bob") == (*A, ONLINE)


def test_who_leaves_is_offline_and_remembered_as_having_left(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.deregister(session, WALL + 5)
    assert dict(reg.sessions.ended) == {session.id: BYE}
    assert (reg.sessions.by_id, reg.sessions.by_nick, dict(reg.sessions.live)) == ({}, {}, {})
    assert state_of(reg, "bob") == (*A, OFFLINE)
    assert reg.mailbox.known["bob"].seen == WALL + 5 and not reg.mailbox.known["bob"].online


def test_only_the_last_closed_sessions_and_their_requests_are_remembered(
        reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_ENDED", 3)
    ended = [register(reg, "bob", A) for _ in range(6)]
    assert list(reg.sessions.ended) == [session.id for session in ended[2:5]]
    assert list(reg.sessions.spent) == [session.request for session in ended[2:5]]


@pytest.mark.parametrize("signal", ["heard", "mail"])
def test_a_session_that_was_closed_has_nothing_to_say_any_more(signal: str) -> None:
    reg = new_registry(max_clients=1)
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one")
    bob = register(reg, "bob", A)
    reg.went_offline(bob, WALL)
    register(reg, "eve", B)
    assert reg.sessions.ended[bob.id] == EVICTED
    assert reg.forget("bob")
    version = reg.table.version
    if signal == "heard":
        assert not reg.heard(bob, 1.0)
    else:
        reg.mail_acked(bob, 2)
    assert (list(reg.sessions.live), reg.table.version) == ([reg.sessions.by_nick["eve"].id], version)
    assert state_of(reg, "bob") is None
    assert reg.mailbox.commit(WALL)


def test_a_server_that_knows_too_many_nicks_forgets_the_one_longest_offline_without_mail() -> None:
    reg = new_registry(max_known=4)
    for number, nick in enumerate(["mail", "old", "new", "live"]):
        reg.deregister(register(reg, nick, A), WALL + number)
    save(reg, "mail", "one")
    live = register(reg, "live", A)
    register(reg, "first", B)
    assert set(reg.mailbox.known) == set(reg.table.entries) == {"mail", "new", "live", "first"}
    register(reg, "second", C)
    assert set(reg.mailbox.known) == {"mail", "live", "first", "second"}
    assert reg.claim("third", D, None) == FULL
    assert reg.claim("mail", D, None) == GRANTED
    reg.deregister(live, WALL)
    assert reg.claim("third", D, None) == GRANTED


def test_a_client_that_must_make_room_was_last_seen_when_it_was_lost() -> None:
    reg = new_registry(max_clients=1)
    bob = register(reg, "bob", A, now=WALL)
    reg.went_offline(bob, WALL + 5)
    register(reg, "carol", B, now=WALL + 500)
    assert reg.sessions.of("bob") is None and reg.mailbox.known["bob"].seen == WALL + 5


def test_a_client_whose_address_goes_to_one_that_comes_back_was_last_seen_when_it_was_heard() -> None:
    reg = new_registry()
    bob = register(reg, "bob", A, now=WALL)
    reg.went_offline(bob, WALL + 5)
    carol = register(reg, "carol", A, now=WALL + 10)
    reg.heard(carol, WALL + 100)
    assert reg.heard(bob, WALL + 200) and not reg.sessions.is_live(carol)
    assert carol.known.seen == WALL + 100


def test_a_nick_that_somebody_has_visited_under_is_forgotten_like_others() -> None:
    reg = new_registry(max_known=1)
    reg.deregister(register(reg, "bob", A), WALL)
    visit = reg.admit(WALL + 1, b"v" * 16, "bob", B, None, 999, is_visit=True)
    assert reg.claim("carol", C, None) == FULL, "it is in use"
    reg.deregister(visit, WALL + 2)
    assert reg.claim("carol", C, None) == GRANTED


@pytest.mark.parametrize("damage", [
    "texts = 'garbage'", "texts = CAST(x'5b2261ff225d' AS TEXT)", "texts = '[1]'", "numbers = 5", "numbers = 1 << 40",
    "numbers = 0", "numbers = 'abc'", "stream = 'abc'", "stream = -1", "sender = x'ff00'",
    "sender = CAST(x'ff' AS TEXT)",
    "n = 'abc'", "n = 0", "more = '13'", "more = '[\"x\"]'", "times = '[\"x\"]'", "times = '[1e999]'", "times = '[]'",
    "texts = '[\"' || printf('%.2000c', 'x') || '\"]'", "texts = '[\"\\ud800\"]'",
    "size = 9e999", "size = -9e999", "messages = 'x'", "size = 9223372036854775807"])
def test_whatever_is_damaged_in_a_row_of_mail_the_others_are_there(damage: str) -> None:
    box = Mailbox(":memory:", SERVER)
    bob = box.add("bob", "192.0.2.1", 1, None, WALL)
    for number in range(3):
        box.keep(bob, "alice", STREAM, Parcel(1 + number, [f"m{number}"], [WALL], ()))
        assert box.commit(WALL)
    box._db.execute(f"UPDATE mail SET {damage} WHERE seq = 2")
    letters = box.fetch(bob, 1, 100)
    assert [letter[2] for letter in letters[::2]] == ["m0", "m2"] and len(letters) == 3
    runs = protocol.mail_runs(letters)
    assert protocol.is_valid("mail", {"to": "bob", "stream": 1, "n": 1, "base": 1, "items": runs})
    assert len(protocol.mail_sizes(letters)) == 3
    assert box.fetch(bob, 2, 1) == letters[1:2] and box.fetch(bob, 3, 1) == letters[2:]
    for acked in (2, 3, 4):
        box.acked(bob, acked)
        assert box.commit(WALL)


@pytest.mark.parametrize("damage", ["texts = 'garbage'", "numbers = 2", "numbers = 1 << 40", "n = 'abc'"])
@pytest.mark.parametrize("acked", [2, 3, 4])
def test_what_is_left_of_a_damaged_row_does_not_stop_the_mail_behind_it(damage: str, acked: int) -> None:
    box = Mailbox(":memory:", SERVER)
    bob = box.add("bob", "192.0.2.1", 1, None, WALL)
    box.keep(bob, "alice", STREAM, Parcel(1, ["m1", "m2", "m3", "m4"], [WALL] * 4, ()))
    box.commit(WALL)
    box.keep(bob, "alice", STREAM, Parcel(5, ["m5"], [WALL], ()))
    box.commit(WALL)
    box._db.execute(f"UPDATE mail SET {damage} WHERE seq = 1")
    before = box.fetch(bob, 1, 100)
    box.acked(bob, acked)
    assert box.commit(WALL)
    after = box.fetch(bob, acked, 100)
    assert [letter[2] for letter in after] == [letter[2] for letter in before[acked - 1:]] and len(before) == 5
    box.acked(bob, 6)
    assert box.commit(WALL) and (bob.messages, bob.size) == (0, 0)


@pytest.mark.parametrize("gone", [{1}, {3}, {5}, {1, 2}, {3, 4}, {4, 5}, {2, 4}, {1, 2, 3, 4, 5}])
def test_rows_of_mail_that_are_gone_are_named_and_the_others_arrive_each_once(path: Path, gone: set[int]) -> None:
    box = open_box(path)
    bob = box.add("bob", "192.0.2.1", 1, None, WALL)
    for number in range(1, 6):
        box.keep(bob, "alice", STREAM, Parcel(number, [f"m{number}"], [WALL], ()))
        assert box.commit(WALL)
    for number in gone:
        box._db.execute("DELETE FROM mail WHERE seq = ?", (number,))
    box.close()
    expected = [home.DAMAGED if number in gone else f"m{number}" for number in range(1, 6)]
    for acked in range(1, 6):
        box = open_box(path)
        bob = box.known["bob"]
        assert [letter[2] for letter in box.fetch(bob, acked, 100)] == expected[acked - 1:]
        assert [letter[2] for letter in box.fetch(bob, acked, 1)] == expected[acked - 1:acked]
        box.acked(bob, acked + 1)
        assert box.commit(WALL)
        box.close()


@pytest.mark.parametrize("place", ["1 << 40", "-1", "0", "1.5", "3.5", "'x'", "x''", "(-1 << 62)", "1e300"])
def test_a_row_of_mail_that_is_nowhere_costs_its_own_texts_alone(path: Path, place: str) -> None:
    box = open_box(path)
    bob = box.add("bob", "192.0.2.1", 1, None, WALL)
    for number in range(1, 5):
        box.keep(bob, "alice", STREAM, Parcel(number, [f"m{number}"], [WALL], ()))
        assert box.commit(WALL)
    box._db.execute(f"UPDATE mail SET seq = {place} WHERE seq = 3")
    box.close()
    for acked in range(1, 5):
        box = open_box(path)
        assert ["m1", "m2", home.DAMAGED, "m4"][acked - 1:] == [
            letter[2] for letter in box.fetch(box.known["bob"], acked, 4)][:5 - acked]
        box.acked(box.known["bob"], acked + 1)
        assert box.commit(WALL)
        box.close()


@pytest.mark.parametrize("name", ["texts", "times", "envelope", "stream", "next"])
def test_a_column_whose_name_is_damaged_is_a_reason_not_to_open_the_store(box: Mailbox, path: Path, name: str) -> None:
    box.close()
    data = path.read_bytes()
    place = data.index(f" {name} ".encode(), data.index(b"CREATE TABLE " + (b"streams" if name == "next" else b"mail")))
    path.write_bytes(data[:place + 1] + b"x" + data[place + 2:])
    with pytest.raises(StoreError, match="cannot open the store .*no such column"):
        open_box(path)


def test_pages_of_a_store_that_lead_elsewhere_end_nothing(path: Path) -> None:
    box = open_box(path)
    bobs = [box.add(nick, *A, None, WALL) for nick in ("bob1", "bob2", "bob3")]
    for number in range(1, 25):
        for bob in bobs:
            box.keep(bob, "alice", STREAM, Parcel(number, ["x" * 300] * 2, [WALL] * 2, ()))
        box.commit(WALL)
    box.close()
    data, size = path.read_bytes(), 4096
    pages = [data[start:start + size] for start in range(0, len(data), size)]
    for one, other in combinations(range(1, len(pages)), 2):
        swapped = list(pages)
        swapped[one], swapped[other] = pages[other], pages[one]
        path.write_bytes(b"".join(swapped))
        try:
            box = open_box(path)
        except StoreError:
            continue
        for known in box.known.values():
            for acked in range(known.first + 1, known.last + 2, 3):
                assert len(box.fetch(known, acked, 10)) <= 10
                box.acked(known, acked)
                box.commit(WALL)
        box.close()


@pytest.mark.parametrize("damage", [
    "host = 'x'", "host = x'ff'", "port = 65536", "port = -1", "port = 'x'", "nick = x'ff'", "nick = 'b b'",
    "nick = CAST(x'626fff' AS TEXT)", "first = 0", "first = 'x'", "last = 'x'", "last = 1 << 40", "owner = 1",
    "owner = x''", "key = 'x'", "proof = x'00'"])
def test_a_row_of_a_nick_that_cannot_be_is_a_reason_not_to_open_the_store(
        box: Mailbox, path: Path, damage: str) -> None:
    box._db.execute(f"UPDATE nicks SET {damage}")
    box.close()
    with pytest.raises(StoreError, match="it is damaged: what is known of"):
        open_box(path)


@pytest.mark.parametrize("damage", ["last = 0", "last = 1", "first = 3", "seen = 'x'", "seen = -1e300", "online = 'x'"])
def test_a_number_that_is_damaged_in_the_row_of_a_nick_costs_no_mail(box: Mailbox, path: Path, damage: str) -> None:
    for text in ("one", "two", "three"):
        keep(box, "bob", text)
        box.commit(WALL)
    box._db.execute(f"UPDATE nicks SET {damage}")
    box.close()
    box = open_box(path)
    assert [text for _, text in mail(box)][:3] == ["one", "two", "three"]
    assert not box.known["bob"].seen < 0.0, "a nick that was seen long ago lapses, with its mail"
    keep(box, "bob", "four")
    assert box.commit(WALL) and mail(box)[-1][1] == "four"
    box.close()


@pytest.mark.parametrize("damage", ["size = 'x'", "size = 1000", "messages = 0", "messages = 'x'"])
def test_no_count_goes_below_zero_whatever_is_damaged_in_a_row_of_which_some_was_acked(
        damage: str, tmp_path: Path) -> None:
    box = Mailbox(str(tmp_path / "store"), SERVER)
    box.keep(box.add("bob", "192.0.2.1", 1, None, WALL), "alice", STREAM, Parcel(1, ["m1", "m2", "m3"], [WALL] * 3, ()))
    box.commit(WALL)
    box._db.execute(f"UPDATE mail SET {damage}")
    box.close()
    box = Mailbox(str(tmp_path / "store"), SERVER)
    bob = box.known["bob"]
    for first in (2, 4):
        box.acked(bob, first)
        assert box.commit(WALL)
    assert (bob.messages, bob.size) == (0, 0)


@pytest.mark.parametrize("encrypts", [True, False])
@pytest.mark.parametrize("owned", [True, False])
def test_no_flood_of_nicks_takes_one_from_an_owner_who_was_here_before(owned: bool, encrypts: bool) -> None:
    reg = new_registry(max_known=20)
    for number, nick in enumerate(["alice", "bob", "carol"]):
        key = ShownKey(nick.encode().ljust(32), bytes(32)) if encrypts else None
        session = register(reg, nick, A, None if encrypts else nick.encode(), now=WALL + number, key=key)
        reg.deregister(session, WALL + number)
    for number in range(200):
        eve = f"eve{number}"
        assert reg.claim(eve, B, b"eve") == GRANTED
        reg.deregister(register(reg, eve, B, b"eve" if owned else None, now=WALL + 9 + number), WALL + 9 + number)
        assert len(reg.mailbox.known) <= 20 and {"alice", "bob", "carol"} <= set(reg.mailbox.known)
        if number == 100:
            reg = restarted(reg)
    if owned:
        for nick in list(reg.mailbox.known):
            if nick.startswith("eve"):
                save(reg, nick, "mail")
        assert reg.claim("another", B, b"eve") == FULL
    assert reg.claim("alice", B, b"eve") == OWNED


def test_a_nick_that_was_here_again_is_not_taken_for_the_longest_offline() -> None:
    reg = new_registry(max_known=3)
    for number, nick in enumerate(["x", "y", "z"]):
        reg.deregister(register(reg, nick, A, now=WALL + number), WALL + number)
    assert reg.claim("new", B, None) == GRANTED
    reg.deregister(register(reg, "x", A, now=WALL + 9), WALL + 9)
    register(reg, "new", B, now=WALL + 9)
    assert set(reg.mailbox.known) == {"x", "z", "new"}


def test_a_server_is_full_of_nicks_only_when_all_are_online_or_have_mail() -> None:
    reg = new_registry(max_known=4)
    for number, nick in enumerate(["w", "x", "y", "z"]):
        reg.deregister(register(reg, nick, A, now=WALL + number), WALL + number)
    for nick, address in (("w", A), ("x", B)):
        assert reg.claim("new", D, None) == GRANTED
        register(reg, nick, address)
    save(reg, "y", "one")
    assert reg.claim("new", D, None) == GRANTED
    save(reg, "z", "one")
    assert reg.claim("new", D, None) == FULL


def test_the_nick_of_a_client_that_died_without_leaving_makes_room_too() -> None:
    reg = new_registry(max_known=2)
    dead = register(reg, "dead", A)
    reg.went_offline(dead, WALL)
    register(reg, "live", B)
    register(reg, "new", C)
    assert set(reg.mailbox.known) == set(reg.sessions.by_nick) == {"live", "new"}
    assert dict(reg.sessions.ended) == {dead.id: EVICTED}


def test_whoever_registers_at_an_address_takes_it_from_who_was_there(reg: Registry) -> None:
    bob = register(reg, "bob", A)
    eve = register(reg, "eve", A)
    assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*A, OFFLINE), (*A, ONLINE))
    assert reg.holder("bob") is None and list(reg.sessions.live) == [eve.id]
    assert reg.sessions.by_id[bob.id] is bob, "it may be elsewhere, and comes back from there"
    reg.went_offline(eve, WALL)
    assert state_of(reg, "bob") == (*A, OFFLINE)


def test_an_address_has_one_nick_even_if_the_one_before_is_heard_there_again(reg: Registry) -> None:
    bob, eve = register(reg, "bob", A), register(reg, "eve", A)
    reg.heard(bob, 1.0)
    assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*A, ONLINE), (*A, OFFLINE))
    reg.heard(eve, 2.0)
    assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*A, OFFLINE), (*A, ONLINE))
    assert list(reg.sessions.live) == [eve.id]


def test_an_address_that_was_left_can_be_taken_without_harm_to_who_left_it(reg: Registry) -> None:
    bob = register(reg, "bob", A)
    reg.place(bob, B, WALL)
    register(reg, "eve", A)
    assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*B, ONLINE), (*A, ONLINE))


# mail first

def test_who_has_mail_is_announced_only_when_all_that_waited_at_the_registration_is_acked(reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one", "two")
    session = register(reg, "bob", B)
    assert state_of(reg, "bob") == (*B, OFFLINE)
    assert session.version == reg.table.version
    save(reg, "bob", "three")
    assert reg.mail_number(session) == 3
    reg.mail_acked(session, 2)
    assert state_of(reg, "bob") == (*B, OFFLINE)
    reg.mail_acked(session, 3)
    assert state_of(reg, "bob") == (*B, ONLINE), "what came meanwhile need not be acked"
    assert reg.mailbox.commit(WALL) and mail(reg.mailbox) == [(3, "three")]


def test_mail_is_numbered_from_one_in_every_session(reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one", "two", "three")
    first = register(reg, "bob", A)
    assert reg.mail_number(first) == 3
    reg.mail_acked(first, 3)
    assert reg.mailbox.commit(WALL)
    second = register(reg, "bob", A)
    assert (reg.mail_number(second), mail(reg.mailbox)) == (1, [(3, "three")])
    assert state_of(reg, "bob") == (*A, OFFLINE)
    reg.mail_acked(second, 2)
    assert state_of(reg, "bob") == (*A, ONLINE)
    assert reg.mailbox.commit(WALL) and mail(reg.mailbox) == []


def test_who_comes_back_from_being_offline_gets_the_mail_first(reg: Registry) -> None:
    session = register(reg, "bob", A)
    assert not reg.heard(session, 1.0)
    reg.went_offline(session, WALL + 9)
    assert state_of(reg, "bob") == (*A, OFFLINE) and reg.mailbox.known["bob"].seen == WALL + 9
    save(reg, "bob", "one")
    assert reg.heard(session, 2.0)
    assert state_of(reg, "bob") == (*A, OFFLINE)
    assert not reg.heard(session, 3.0)
    assert state_of(reg, "bob") == (*A, OFFLINE)
    reg.mail_acked(session, 2)
    assert state_of(reg, "bob") == (*A, ONLINE)


def test_who_comes_back_without_mail_is_online_at_once(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.went_offline(session, WALL)
    assert reg.heard(session, 2.0)
    assert state_of(reg, "bob") == (*A, ONLINE)
    version = reg.table.version
    reg.announce(session)
    assert reg.table.version == version


def test_an_ack_of_somebody_offline_announces_nobody(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.went_offline(session, WALL)
    reg.announce(session)
    save(reg, "bob", "one")
    reg.mail_acked(session, 2)
    assert state_of(reg, "bob") == (*A, OFFLINE)


def test_who_moves_is_online_there(reg: Registry) -> None:
    bob, eve = register(reg, "bob", A), register(reg, "eve", B)
    reg.place(bob, B, WALL)
    assert (state_of(reg, "bob"), state_of(reg, "eve")) == ((*B, ONLINE), (*B, OFFLINE))
    assert bob.address == B and reg.holder("bob") == B and eve.id not in reg.sessions.live
    again = restarted(reg)
    assert (state_of(again, "bob"), again.holder("bob")) == ((*B, OFFLINE), B)


def test_who_moves_before_the_mail_is_acked_stays_offline_there(reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one")
    session = register(reg, "bob", A)
    reg.place(session, B, WALL)
    assert state_of(reg, "bob") == (*B, OFFLINE)
    reg.mail_acked(session, 2)
    assert state_of(reg, "bob") == (*B, ONLINE)


def test_who_comes_back_from_another_address_gets_the_mail_first_too(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.went_offline(session, WALL)
    save(reg, "bob", "one")
    reg.place(session, B, WALL)
    assert state_of(reg, "bob") == (*B, OFFLINE)
    assert reg.heard(session, 1.0)
    assert state_of(reg, "bob") == (*B, OFFLINE)
    reg.mail_acked(session, 2)
    assert state_of(reg, "bob") == (*B, ONLINE)


def test_the_silent_are_named_longest_first_and_only_after_the_whole_time(reg: Registry) -> None:
    bob, eve, zoe = (register(reg, nick, address, now=now)
                     for nick, address, now in (("bob", A, 0.0), ("eve", B, 1.0), ("zoe", C, 2.0)))
    reg.heard(bob, 3.0)
    assert reg.sessions.silent(1.0 + SILENCE - 0.01) == []
    assert reg.sessions.silent(1.0 + SILENCE) == [eve]
    assert reg.sessions.silent(3.0 + SILENCE) == [eve, zoe, bob]
    reg.went_offline(eve, WALL)
    assert reg.sessions.silent(3.0 + SILENCE) == [zoe, bob]
    reg.heard(eve, 4.0)
    assert reg.sessions.silent(4.0 + SILENCE) == [zoe, bob, eve]


# what to do with messages

def test_messages_are_kept_for_who_is_offline_probed_for_who_is_online_and_refused_for_a_stranger(
        reg: Registry) -> None:
    session = register(reg, "bob", A)
    assert [reg.judge("bob", relay) for relay in (False, True)] == [PROBE_RECIPIENT, KEEP]
    reg.went_offline(session, WALL)
    assert [reg.judge("bob", relay) for relay in (False, True)] == [KEEP, KEEP]
    assert [reg.judge("eve", relay) for relay in (False, True)] == [UNKNOWN, UNKNOWN]


def test_messages_are_kept_while_the_mail_of_who_came_back_is_on_its_way(reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A), WALL)
    save(reg, "bob", "one")
    session = register(reg, "bob", A)
    assert reg.judge("bob", False) == KEEP
    reg.mail_acked(session, 2)
    assert reg.judge("bob", False) == PROBE_RECIPIENT


def fitting(reg: Registry, parcel: Parcel) -> int:
    """How many numbers of a parcel the mailbox of bob has room for."""
    known = reg.mailbox.known["bob"]
    return parcel.fitting(reg.mailbox_limit - known.messages, MAILBOX_SIZE - known.size)


def test_a_mailbox_takes_as_many_messages_as_its_limit_and_none_more() -> None:
    reg = new_registry(mailbox_limit=4)
    register(reg, "bob", A)
    save(reg, "bob", "one")
    five = parcel_of(1, *"abcde")
    assert [fitting(reg, five.part(0, size)) for size in range(6)] == [0, 1, 2, 3, 3, 3]
    save(reg, "bob", "a", "b", "c")
    assert fitting(reg, five) == 0
    reg.mailbox.acked(reg.mailbox.known["bob"], 3)
    assert fitting(reg, five) == 0, "there is room only when the disk has it"
    reg.mailbox.commit(WALL)
    assert fitting(reg, five) == 2


def test_a_text_of_several_pieces_counts_as_one_message_and_fits_whole_or_not_at_all() -> None:
    reg = new_registry(mailbox_limit=2)
    register(reg, "bob", A)
    assert fitting(reg, parcel_of(1, "x…", "y…", "z", "a…", "b", "c")) == 5
    save(reg, "bob", "x…", "y…", "z")
    assert fitting(reg, parcel_of(4, "a…", "b")) == 2
    assert fitting(reg, parcel_of(4, "a…", "b", "c")) == 2
    save(reg, "bob", "a…", "b")
    assert fitting(reg, parcel_of(6, "c")) == 0


@pytest.mark.parametrize("left, most", [(3 * MAX_PIECE, 3), (3 * MAX_PIECE - 1, 1), (MAX_PIECE, 1),
                                        (MAX_PIECE - 1, 0), (0, 0)])
def test_a_mailbox_takes_texts_up_to_its_last_byte(reg: Registry, left: int, most: int) -> None:
    register(reg, "bob", A)
    reg.mailbox.known["bob"].size = MAILBOX_SIZE - left
    texts = ["x" * MAX_PIECE, "y" * MAX_PIECE, "ü" * (MAX_PIECE // 2)]
    assert fitting(reg, Parcel(1, texts, [WALL] * 3, [2])) == most


@given(st.lists(st.lists(st.text("aü", max_size=20), min_size=1, max_size=3), max_size=8), st.integers(0, 8),
       st.integers(0, 100))
def test_what_fits_are_the_most_whole_texts_that_break_no_limit(texts: list[list[str]], limit: int, room: int) -> None:
    reg = new_registry(mailbox_limit=limit)
    register(reg, "bob", A)
    reg.mailbox.known["bob"].size = MAILBOX_SIZE - room
    numbers = count(1)
    parts = [(next(numbers), part, index < len(text)) for text in texts for index, part in enumerate(text, 1)]
    parcel = Parcel(1, [part for _, part, _ in parts], [WALL] * len(parts), [n for n, _, more in parts if more])
    best = max(size for size in range(len(texts) + 1) if size <= limit
               and sum(len(part.encode()) for text in texts[:size] for part in text) <= room)
    assert fitting(reg, parcel) == sum(map(len, texts[:best]))


# nicks that go

def test_a_forgotten_nick_is_gone_from_table_and_store_and_free_for_anybody(reg: Registry) -> None:
    reg.deregister(register(reg, "bob", A, b"token"), WALL)
    save(reg, "bob", "one")
    version = reg.table.version
    assert reg.forget("bob")
    assert [page.rows for page in reg.table.pages(version, 1000)] == [[["bob", *A, GONE]]]
    assert reg.mailbox.known == {} and reg.judge("bob", True) == UNKNOWN
    assert not reg.forget("bob")
    session = register(reg, "bob", B)
    assert (state_of(reg, "bob"), reg.mail_number(session)) == ((*B, ONLINE), 0)


def test_a_nick_in_use_is_not_forgotten(reg: Registry) -> None:
    register(reg, "bob", A)
    assert not reg.forget("bob")
    assert state_of(reg, "bob") == (*A, ONLINE)
    assert not reg.forget("nobody")


def test_a_nick_that_was_online_when_the_server_stopped_can_be_forgotten(reg: Registry) -> None:
    register(reg, "bob", A, b"token")
    reg = restarted(reg)
    assert reg.forget("bob")
    assert reg.holder("bob") is None and reg.claim("bob", B, None) == GRANTED


def test_a_nick_lapses_when_it_was_offline_for_more_than_the_days_given(reg: Registry) -> None:
    for number, nick in enumerate(["bob", "eve", "zoe"]):
        reg.deregister(register(reg, nick, A), WALL + number)
    register(reg, "live", B)
    save(reg, "bob", "one", "two")
    assert reg.lapse(WALL + 1000 * DAY, 0) == []
    assert reg.lapse(WALL + 90 * DAY, 90.0) == []
    dropped = reg.lapse(WALL + 90 * DAY + 1.5, 90.0)
    assert [(known.nick, known.messages) for known in dropped] == [("bob", 2), ("eve", 0)]
    assert set(reg.mailbox.known) == set(reg.table.entries) == {"zoe", "live"}


def test_a_nick_whose_client_died_without_leaving_lapses_too(reg: Registry) -> None:
    session = register(reg, "bob", A)
    reg.went_offline(session, WALL)
    assert reg.lapse(WALL + 90 * DAY, 90.0) == []
    assert reg.sessions.by_id == {session.id: session}
    assert [known.nick for known in reg.lapse(WALL + 90 * DAY + 1, 90.0)] == ["bob"]
    assert state_of(reg, "bob") is None and not reg.sessions.by_id and not reg.sessions.by_nick
    assert reg.sessions.ended[session.id] == EVICTED
    assert reg.mailbox.commit(WALL)


def test_the_time_offline_of_who_was_online_in_a_crash_begins_when_the_store_last_noted_them(reg: Registry) -> None:
    register(reg, "bob", A)
    reg.deregister(register(reg, "eve", B), WALL)
    reg.note_time(WALL + 80 * DAY, WALL)
    reg = restarted(restarted(reg))
    assert [known.nick for known in reg.lapse(WALL + 100 * DAY, 90.0)] == ["eve"]
    assert [known.nick for known in reg.lapse(WALL + 171 * DAY, 90.0)] == ["bob"]


class Deciding(RuleBasedStateMachine):
    """A registry under everything its owner may do to it, in any order."""

    NICKS, ADDRESSES, WHICH = st.sampled_from(["a", "b", "c", "d"]), st.sampled_from([A, B, C]), st.integers(0, 5)
    LIMIT = 3

    def __init__(self) -> None:
        super().__init__()
        self.box = Mailbox(":memory:", SERVER)
        self.reg = Registry(self.box, self.LIMIT, max_known=self.LIMIT)
        self.now = WALL
        self.greeting: dict[bytes, int] = {}    # session -> number of the last mail that comes first
        self.ended: list[Session] = []

    def teardown(self) -> None:
        self.box.close()

    def session(self, which: int) -> Session:
        sessions = list(self.reg.sessions.by_id.values())
        return sessions[which % len(sessions)]

    def hear(self, session: Session) -> None:
        self.now += 1
        if self.reg.heard(session, self.now):
            self.greeting[session.id] = session.known.last

    @rule(nick=NICKS, address=ADDRESSES)
    def register(self, nick: str, address: Address) -> None:
        before = dict(self.reg.sessions.by_id)
        verdict = self.reg.claim(nick, address, None)
        if verdict == PROBE_HOLDER:                      # nobody answers there
            holder = self.reg.sessions.by_nick.get(nick)
            if holder is not None and holder.id in self.reg.sessions.live:
                self.reg.went_offline(holder, self.now)
            self.reg.maybe_running.pop(nick, None)
            verdict = self.reg.claim(nick, address, None)
        if verdict == FULL:
            new = nick not in self.box.known
            assert len(self.reg.sessions.live) == self.LIMIT or new and len(self.box.known) == self.LIMIT and all(
                known.waiting or known.online for known in self.box.known.values())
            return
        assert verdict == GRANTED
        session = admit(self.reg, nick, address, None, self.now)
        self.greeting[session.id] = session.known.last
        self.ended.extend(old for id_, old in before.items() if id_ not in self.reg.sessions.by_id)
        assert (session.address, self.reg.holder(nick)) == (address, address)

    @precondition(lambda self: self.reg.sessions.by_id)
    @rule(which=WHICH)
    def speak(self, which: int) -> None:
        self.hear(self.session(which))

    @precondition(lambda self: self.ended)
    @rule(which=WHICH, number=st.integers(0, 5))
    def speak_after_the_end(self, which: int, number: int) -> None:
        session = self.ended[which % len(self.ended)]
        assert not self.reg.heard(session, self.now)
        self.reg.mail_acked(session, number)

    @precondition(lambda self: self.reg.sessions.live)
    @rule(which=WHICH)
    def die(self, which: int) -> None:
        session = self.session(which)
        if session.id in self.reg.sessions.live:
            self.reg.went_offline(session, self.now)

    @precondition(lambda self: self.reg.sessions.by_id)
    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        session = self.session(which)
        self.reg.deregister(session, self.now)
        self.ended.append(session)

    @precondition(lambda self: self.reg.sessions.by_id)
    @rule(which=WHICH, address=ADDRESSES)
    def move(self, which: int, address: Address) -> None:
        session = self.session(which)
        self.reg.place(session, address, self.now)
        self.hear(session)

    @rule(nick=NICKS, relay=st.booleans())
    def save(self, nick: str, relay: bool) -> None:
        if self.reg.judge(nick, relay) == KEEP:
            keep(self.box, nick, "text")
            assert self.box.commit(self.now)

    @precondition(lambda self: self.reg.sessions.by_id)
    @rule(which=WHICH, amount=st.integers(0, 3))
    def ack(self, which: int, amount: int) -> None:
        session = self.session(which)
        self.hear(session)
        number = session.known.first - session.offset + amount
        self.reg.mail_acked(session, min(number, self.reg.mail_number(session) + 1))

    @rule(days=st.integers(0, 60))
    def lapse(self, days: int) -> None:
        self.now += days * DAY
        before = dict(self.reg.sessions.by_id)
        self.reg.lapse(self.now, 90.0)
        self.ended.extend(old for id_, old in before.items() if id_ not in self.reg.sessions.by_id)

    @rule()
    def restart(self) -> None:
        assert self.box.commit(self.now)
        self.reg = Registry(self.box, self.LIMIT, max_known=self.LIMIT)
        self.greeting.clear()
        self.ended.clear()

    @invariant()
    def sessions_and_their_indexes_agree(self) -> None:
        sessions = self.reg.sessions
        assert {session.nick: session for session in sessions.by_id.values()} == sessions.by_nick
        assert len(sessions.by_nick) == len(sessions) <= self.LIMIT
        assert set(sessions.live) <= set(sessions.by_id) and not set(sessions.ended) & set(sessions.by_id)
        heard = [session.heard for session in sessions.live.values()]
        assert heard == sorted(heard)
        assert not set(self.reg.maybe_running) & set(sessions.by_nick)

    @invariant()
    def the_table_tells_of_everybody_known_and_of_nobody_twice(self) -> None:
        reg, table = self.reg, self.reg.table
        assert {nick: (known.host, known.port) for nick, known in self.box.known.items()} \
            == {nick: (entry.host, entry.port) for nick, entry in table.entries.items()}
        assert len({entry.version for entry in table.entries.values()}) == len(table)
        online = [entry for entry in table.entries.values() if entry.state == ONLINE]
        assert len({(entry.host, entry.port) for entry in online}) == len(online)
        for nick, known in self.box.known.items():
            assert known.online == (table.is_online(nick) or nick in reg.maybe_running)

    @invariant()
    def exactly_those_who_live_and_have_had_their_mail_are_online(self) -> None:
        for session in self.reg.sessions.by_id.values():
            entry = self.reg.table.entries[session.nick]
            assert (entry.host, entry.port) == session.address
            assert (entry.state == ONLINE) == (session.id in self.reg.sessions.live
                                               and session.known.first > self.greeting[session.id])
        for nick in self.reg.table.entries:
            assert nick in self.reg.sessions.by_nick or not self.reg.table.is_online(nick)

    @invariant()
    def the_store_can_always_be_written(self) -> None:
        assert self.box.commit(self.now)


@pytest.mark.hypothesis
def test_sessions_table_and_store_agree_whatever_happens() -> None:
    run_state_machine_as_test(Deciding, settings=settings(stateful_step_count=30))
