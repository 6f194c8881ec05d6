"""The wall clock jumps: it is wrong when a server starts, it is set while it runs, it is another one after a restart.

No message that was kept is deleted because of that, no nick is freed, and nobody is taken for who was away longer. Only
the time that is shown with a message is as wrong as the clock was.
"""
from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import home
from secure import hash_of
from home import Mailbox, StoreError
from protocol import Parcel, encode
from registry import DAY, FULL, GRANTED, Registry
from server import HOUSEKEEPING
from tests.processes import SAVED, WELCOME, Chat
from tests.test_strangers import Desk, home as home_of, save

SERVER, STREAM = b"s" * 16, 2 ** 62 + 1
NOW = 1_790_000_000.0     # s since 1970
YEAR = 365.25 * DAY
HOUR = 3600.0
A, B, C = ("192.0.2.1", 5000), ("192.0.2.2", 5000), ("192.0.2.3", 5000)


@pytest.fixture(name="path")
def path_of_a_store(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def copied(path: Path, folder: Path) -> Path:
    """Return what a crash at this moment leaves of a store."""
    folder.mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, folder)
    return folder / path.name


def keep(box: Mailbox, nick: str, now: float, stream: int = STREAM, sender: str = "alice") -> None:
    """Keep a message for ``nick``."""
    first = box.stream_next(sender, stream)
    assert first is not None
    box.keep(box.known[nick], sender, stream, Parcel(first, ["hello"], [NOW], []))
    assert box.commit(now)


def update(path: Path, change: str) -> None:
    """Change what lies in a store that nobody has open."""
    db = sqlite3.connect(path)
    db.execute(f"UPDATE {change}")
    db.commit()
    db.close()


def visit(reg: Registry, nick: str, now: float, token: bytes | None = None) -> None:
    """Come with a nick, and leave."""
    number = int(now * 1000) + len(nick)
    assert reg.claim(nick, A, token) == GRANTED
    reg.deregister(reg.admit(now, f"{nick}{number}".encode(), nick, A, token, number), now)
    assert reg.mailbox.commit(now)


# --- a server whose clock is wrong ----------------------------------------------------------------------------

def desk_at(path: Path, wall: float, nick_lapse: float = 90.0) -> Desk:
    """Return a server on a store that was there before, on a machine whose clock shows ``wall``."""
    desk = Desk(str(path), nick_lapse)
    desk.loop.wall_time = wall
    desk.wait(HOUSEKEEPING * 1.5)
    return desk


def last_seen(reg: Registry) -> dict[str, int]:
    """Return what the table says of when those who are offline were last seen."""
    return {page.rows[position][0]: at for page in reg.table.pages(0, 40)
            for position, at in zip(page.seen[::2], page.seen[1::2])}


def test_when_somebody_was_last_seen_is_known_over_all_runs_of_a_server(path: Path) -> None:
    reg = Registry(Mailbox(str(path), SERVER, 5.0))
    reg.note_time(5.0, NOW)
    visit(reg, "bob", 65.0)
    visit(reg, "eve", 65.0)
    reg.mailbox.close()
    reg = Registry(Mailbox(str(path), SERVER, 900.0))
    reg.note_time(900.0, NOW + 7 * DAY)
    reg.admit(960.0, b"carol", "carol", B, None, 1)
    visit(reg, "eve", 990.0)
    assert last_seen(reg) == {"bob": NOW + 60, "eve": NOW + 7 * DAY + 90}, "carol is there"
    reg.note_time(1000.0, NOW)      # the clock was wrong, and is set
    visit(reg, "dave", 1001.0)
    assert last_seen(reg) == {"bob": NOW + 60, "eve": NOW + 7 * DAY + 90, "dave": NOW + 1}
    reg.mailbox.close()


def test_whoever_comes_soon_after_the_clock_was_set_is_seen_at_the_right_time(path: Path) -> None:
    desk = Desk(str(path))
    for wall in (NOW - 50 * YEAR, NOW):     # a board without a battery starts, and is told the time
        desk.loop.wall_time = wall
        desk.wait(2.0)
    session = desk.register("bob", home_of(1))
    desk.wait(2.0)
    desk.say(home_of(1), encode("dereg", {"session": session}))
    assert abs(last_seen(desk.registry)["bob"] - desk.loop.wall()) <= 2
    assert desk.server.stop()
    reg = Registry(Mailbox(str(path), SERVER, 0.0))
    assert abs(last_seen(reg)["bob"] - desk.loop.wall()) <= 2
    reg.mailbox.close()


def test_a_clock_that_is_wrong_for_one_run_spoils_no_other(path: Path) -> None:
    for nick, wall in (("bob", NOW), ("", NOW + 9 * DAY), ("eve", NOW + DAY), ("dave", NOW + 2 * DAY)):
        reg = Registry(Mailbox(str(path), SERVER, 0.0))
        reg.note_time(0.0, wall)
        if nick:
            visit(reg, nick, 10.0)
        assert reg.mailbox.commit(0.0)      # without a visit, the next run begins at the same uptime
        reg.mailbox.close()
    assert last_seen(reg) == {"bob": NOW + 10, "eve": NOW + DAY + 10, "dave": NOW + 2 * DAY + 10}


def test_short_outages_do_not_add_up_in_when_somebody_was_last_seen(path: Path) -> None:
    for outage in range(5):
        reg = Registry(Mailbox(str(path), SERVER, 0.0))
        reg.note_time(0.0, NOW + outage * 60)       # 10 s of work, and 50 s without a server
        visit(reg, f"nick{outage}", 10.0)
        reg.mailbox.close()
    assert last_seen(reg) == {f"nick{outage}": NOW + outage * 60 + 10 for outage in range(5)}


def test_in_a_store_that_has_noted_no_clock_nobody_knows_when_somebody_was_seen(path: Path) -> None:
    reg = Registry(Mailbox(str(path), SERVER))
    visit(reg, "bob", 1.0)
    assert not last_seen(reg)
    reg.mailbox.close()


@pytest.mark.parametrize("damage", [
    "meta SET value = '[[1, 2], 3]' WHERE key = 'clock'", "meta SET value = x'ff00' WHERE key = 'clock'",
    "meta SET value = '[[1, NaN]]' WHERE key = 'clock'", "meta SET value = '[[5, 1], [4, 1]]' WHERE key = 'clock'",
    "nicks SET seen = 1e300", "nicks SET seen = -1e300"])
def test_times_that_are_damaged_on_the_disk_are_shown_to_nobody(path: Path, damage: str) -> None:
    reg = Registry(Mailbox(str(path), SERVER))
    reg.note_time(0.0, NOW)
    visit(reg, "bob", 1.0)
    assert last_seen(reg) == {"bob": NOW + 1}
    reg.mailbox.close()
    update(path, damage)
    reg = Registry(Mailbox(str(path), SERVER))
    assert not last_seen(reg)
    reg.mailbox.close()


def set_clock(desk: Desk, wall: float) -> None:
    desk.loop.wall_time = wall
    desk.wait(HOUSEKEEPING * 1.5)


@pytest.mark.parametrize("first, second, third", [
    (0, 1, 0), (1, 0, 0), (0, -1, 0), (-1, 0, 0), (0, 0, 1), (1, 1, 0), (-50, 0, 50), (50, -50, 0)])
def test_no_nick_and_no_mail_goes_because_of_a_clock(path: Path, first: int, second: int, third: int) -> None:
    desk = desk_at(path, NOW + first * YEAR)
    bob, alice = desk.register("bob", home_of(1), b"b" * 32), desk.register("alice", home_of(2))
    desk.say(home_of(1), encode("dereg", {"session": bob}))
    assert "ack" in dict(desk.say(home_of(2), save(alice, "bob", STREAM)))
    set_clock(desk, NOW + second * YEAR)
    assert desk.server.stop()
    desk = desk_at(path, NOW + third * YEAR)
    set_clock(desk, NOW)
    known = desk.registry.mailbox.known
    assert known["bob"].messages == 1 and known["bob"].owner == hash_of(b"b" * 32) and set(known) == {"alice", "bob"}
    assert dict(desk.ask_for("bob", home_of(3), b"e" * 32))["refused"]["reason"] == "owned"
    assert desk.server.stop()


def test_the_days_of_nick_lapse_are_those_in_which_a_server_ran(path: Path) -> None:
    desk = Desk(str(path), 1)
    session = desk.register("bob", home_of(1), b"b" * 32)
    desk.say(home_of(1), encode("dereg", {"session": session}))
    for hours, is_known in ((10, True), (10, True), (3, True), (2, False)):
        desk.wait(hours * HOUR)
        assert ("bob" in desk.registry.mailbox.known) == is_known, "each run adds to those before"
        assert desk.server.stop()
        desk = Desk(str(path), 1)
        desk.loop.wall_time += 1000 * YEAR
    assert "bob" not in desk.registry.mailbox.known
    assert desk.server.stop()


def test_who_is_there_all_the_time_is_not_away_however_long_that_is(path: Path) -> None:
    desk = Desk(str(path), 1)
    desk.register("bob", home_of(1), b"b" * 32)
    registry_, session = desk.registry, desk.registry.sessions.of("bob")
    assert session is not None
    for _ in range(48):
        desk.loop.time += HOUR
        registry_.heard(session, desk.loop.time)
        desk.turn()
    crashed = copied(path, path.parent / "crashed")
    assert desk.server.stop()
    for store in (path, crashed):
        desk = Desk(str(store), 1)
        desk.wait(22 * HOUR)
        assert "bob" in desk.registry.mailbox.known, "the hour before the crash is all that may be missing"
        assert desk.server.stop()


# --- uptime ---------------------------------------------------------------------------------------------------

def test_uptime_goes_on_where_it_was_whatever_the_monotonic_clock_of_the_next_run_says(path: Path) -> None:
    box = Mailbox(str(path), SERVER, 5_000_000.0)
    assert box.uptime(5_000_000.0) == 0.0
    box.tidy()
    assert box.commit(5_000_100.0)
    box.close()
    box = Mailbox(str(path), SERVER, 3.0)      # the machine was restarted
    assert box.uptime(3.0) == 100.0 and box.uptime(13.0) == 110.0
    box.close()


@pytest.mark.parametrize("written", ["nick", "stream"])
def test_uptime_never_goes_back_behind_anything_in_the_store(path: Path, written: str) -> None:
    box = Mailbox(str(path), SERVER)
    box.add("bob", *A, None, box.uptime(0.0))
    assert box.commit(0.0)
    if written == "nick":
        box.known["bob"].seen = box.uptime(1800.0)
        box.changed(box.known["bob"])
        assert box.commit(1800.0)
    else:
        keep(box, "bob", 1800.0)
    survivor = Mailbox(str(copied(path, path.parent / "crashed")), SERVER, 7.0)
    assert survivor.uptime(7.0) == 1800.0
    survivor.close()
    box.close()


def test_the_housekeeping_of_a_server_without_clients_writes_the_uptime(path: Path) -> None:
    desk = Desk(str(path))
    desk.wait(100 * HOUR + 1)
    survivor = Mailbox(str(copied(path, path.parent / "crashed")), SERVER)
    assert survivor.uptime(0.0) == 100 * HOUR
    survivor.close()
    assert desk.server.stop()


def test_an_uptime_that_is_damaged_is_a_reason_not_to_open_the_store(path: Path) -> None:
    Mailbox(str(path), SERVER).close()
    db = sqlite3.connect(path)
    db.execute("UPDATE meta SET value = 'x' WHERE key = 'uptime'")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="it is damaged"):
        Mailbox(str(path), SERVER)


@pytest.mark.parametrize("row", ["nicks SET seen = 1e300 WHERE nick = 'eve'", "streams SET seen = 1e300"])
def test_one_time_that_is_damaged_on_the_disk_does_not_make_everybody_long_offline(path: Path, row: str) -> None:
    reg = Registry(Mailbox(str(path), SERVER))
    for nick in ("bob", "eve"):
        visit(reg, nick, 1.0)
    keep(reg.mailbox, "bob", 2.0)
    reg.mailbox.close()
    update(path, row)
    reg = Registry(Mailbox(str(path), SERVER))
    assert reg.lapse(0.0, 90.0) == [] and reg.mailbox.uptime(0.0) <= 2.0
    reg.mailbox.close()


def test_the_streams_that_are_forgotten_are_those_longest_silent_over_restarts(
        path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "MAX_STREAMS", 2)
    for number, start in enumerate((9e6, 5.0, 7e7), 1):
        box = Mailbox(str(path), SERVER, start)
        if "bob" not in box.known:
            box.add("bob", *A, None, box.uptime(start))
        keep(box, "bob", start + number, number)
        box.close()
    box = Mailbox(str(path), SERVER, 1.0)
    box.tidy()
    assert box.commit(1.0)
    assert [box.stream_next("alice", number) for number in (1, 2, 3)] == [1, 2, 2]
    box.close()


def test_the_nick_that_makes_room_is_the_one_longest_offline_over_restarts(path: Path) -> None:
    for start, nick in ((9e6, "x"), (5.0, "y"), (7e7, "z"), (2.0, "x")):
        reg = Registry(Mailbox(str(path), SERVER, start), max_known=3)
        visit(reg, nick, start + 1)
        reg.mailbox.close()
    reg = Registry(Mailbox(str(path), SERVER, 3.0), max_known=3)
    visit(reg, "new", 3.0)
    assert set(reg.mailbox.known) == {"x", "z", "new"}
    reg.mailbox.close()


# --- stores of format 1 ---------------------------------------------------------------------------------------

SEEN = {"right": 1.79e9, "a year late": 1.79e9 - YEAR, "a year early": 1.79e9 + YEAR, "1970": 0.0, "2106": 2.0 ** 32,
        "before 1970": -1e6}


FORMAT_3 = home.TABLES.replace(" key BLOB, envelope BLOB,\n   ", "")       # the tables of old stores
WITHOUT_KEYS = FORMAT_3.replace(", key BLOB,\n    proof BLOB", "")         # as format 1 and 2 had them


def old_store(path: Path, latest: float, crashed: bool = False, form: int = 1, tables: str = WITHOUT_KEYS) -> None:
    """Make a store of an old format. a, b, c, d were seen in this order, a day between two; e was online at the end.

    ``latest``: when d was seen; e was longest ago. ``crashed``: the server has left its log behind.
    """
    db = sqlite3.connect(path, isolation_level=None)
    for statement in (f"PRAGMA application_id = {home.APPLICATION_ID}", f"PRAGMA user_version = {form}",
                      *tables.split(";"), "PRAGMA journal_mode = WAL"):
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('server', ?)", (SERVER,))
    if form > 1:
        db.execute("INSERT INTO meta VALUES ('uptime', ?)", (latest,))
    for number, nick in enumerate("cadbe", 1):
        days = "edcba".index(nick) if nick != "e" else 9
        seen = latest - days * DAY
        db.execute("INSERT INTO nicks (id, nick, host, port, online, owner, seen, first, last)"
                   " VALUES (?, ?, '192.0.2.1', 5000, ?, NULL, ?, 1, 0)", (number, nick, nick == "e", seen))
        db.execute("INSERT INTO streams VALUES (?, 1, 5, ?)", (nick, seen))
    db.execute("UPDATE nicks SET last = 1, owner = ? WHERE nick = 'a'", (hash_of(b"a" * 32),))
    db.execute("INSERT INTO mail VALUES (2, 1, 1, 'b', 1, 4, '[\"hello\"]', '[1.0]', '', 1, 5)")
    if crashed:
        for file in list(path.parent.glob(path.name + "*")):
            shutil.copy(file, file.with_name("copy-of-" + file.name))
    db.close()
    if crashed:
        for file in list(path.parent.glob("copy-of-*")):
            file.replace(file.with_name(file.name[len("copy-of-"):]))
        assert path.with_name(path.name + "-wal").stat().st_size


def rows(path: Path) -> tuple[int, list[tuple[str, float]]]:
    """Return format and ``seen`` of a store, as any program reads them."""
    db = sqlite3.connect(path)
    found = (db.execute("PRAGMA user_version").fetchone()[0],
             db.execute("SELECT nick, seen FROM nicks ORDER BY seen").fetchall())
    db.close()
    return found


@pytest.mark.parametrize("form, tables", [(1, WITHOUT_KEYS), (2, WITHOUT_KEYS), (3, FORMAT_3)])
def test_the_mail_of_an_old_store_is_there_in_plain_and_letters_lie_beside_it(
        path: Path, form: int, tables: str) -> None:
    old_store(path, 0.0, form=form, tables=tables)
    seal, letter = (b"k" * 32, b"e" * 48), (b"\1\0" + bytes(40), 0)
    for number in range(2):
        box = Mailbox(str(path), SERVER)
        known = box.known["a"]
        if not number:
            box.keep(known, "b", 1, Parcel(5, [letter], [0.0], (), seal))
            known.key = b"K" * 32
            box.changed(known)
            assert box.commit(0.0)
        assert box.fetch(known, 1, 9) == [
            (("b", 1, 1.0, ()), 4, "hello", False), (("b", 1, 0.0, seal), 5, letter, False)]
        box.close()
    assert rows(path)[0] == home.STORE_FORMAT


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("latest", SEEN.values(), ids=SEEN)
def test_nobody_in_an_old_store_has_fewer_days_left_whatever_its_clock_said(
        path: Path, latest: float, crashed: bool) -> None:
    old_store(path, latest, crashed)
    reg = Registry(Mailbox(str(path), SERVER, 77.0))
    assert reg.mailbox.uptime(77.0) == 0.0
    assert reg.lapse(77.0 + 90 * DAY - 1, 90.0) == []
    assert reg.mailbox.known["a"].owner == hash_of(b"a" * 32) and reg.mailbox.known["a"].messages == 1
    assert [letter[2] for letter in reg.mailbox.fetch(reg.mailbox.known["a"], 1, 9)] == ["hello"]
    assert {known.nick for known in reg.lapse(77.0 + 90 * DAY + 1, 90.0)} == set("abcde")
    reg.mailbox.close()
    assert rows(path)[0] == home.STORE_FORMAT


@pytest.mark.parametrize("latest", SEEN.values(), ids=SEEN)
def test_who_was_longest_offline_in_an_old_store_still_is(path: Path, latest: float) -> None:
    old_store(path, latest)
    reg = Registry(Mailbox(str(path), SERVER), max_known=5)
    order = []
    for number, new in enumerate(("new1", "new2", "new3")):
        before = set(reg.mailbox.known)
        visit(reg, new, 1.0 + number, b"token")
        order += sorted(before - set(reg.mailbox.known))
    assert order == ["b", "c", "d"], "a has mail, and e may still be running"
    assert reg.claim("new4", B, b"token") in (GRANTED, FULL)
    reg.mailbox.close()


def test_the_streams_of_an_old_store_keep_their_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "MAX_STREAMS", 3)
    old_store(path, NOW)
    box = Mailbox(str(path), SERVER)
    keep(box, "a", 1.0)
    box.tidy()
    assert box.commit(1.0)
    assert [box.stream_next(nick, 1) for nick in "eabcd"] == [1, 1, 1, 5, 5]
    assert box.stream_next("alice", STREAM) == 2
    box.close()


class Watched(sqlite3.Connection):
    """A connection that tells when a statement is done."""

    done: Callable[[], None]

    def execute(self, *args: Any) -> sqlite3.Cursor:
        """Execute a statement."""
        cursor = super().execute(*args)
        type(self).done()
        return cursor


def test_a_crash_while_an_old_store_is_converted_leaves_the_old_or_the_new_one(
        path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_store(path, NOW)
    before = rows(path)
    moments: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(Watched, "done", lambda: moments.append(copied(path, path.parent / f"step{len(moments)}")),
                      raising=False)
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
        Mailbox(str(path), SERVER).close()
    formats = []
    for copy in moments:
        in_the_file = int.from_bytes(copy.read_bytes()[60:64], "big")
        format_, seen = rows(copied(copy, copy.parent / "read"))
        if in_the_file == 1:
            assert (format_, seen) == before, "an older program opens what the file itself calls old"
        assert [nick for nick, _ in seen] == list("eabcd") if format_ == 1 else list("abc")
        formats.append(format_)
        reg = Registry(Mailbox(str(copy), SERVER))
        assert reg.lapse(90 * DAY - 1, 90.0) == [] and set(reg.mailbox.known) == set("abcde")
        reg.mailbox.close()
    assert formats == sorted(formats) and set(formats) == {1, home.STORE_FORMAT}


# --- real processes -------------------------------------------------------------------------------------------

# Python imports this before the program: the clock is wrong by what stands in a file, and by another amount when that
# is written anew
WRONG_CLOCK = """
import os, time
true = time.time
def wrong():
    with open(os.environ["CLOCK_ERROR"]) as file:
        return true() + float(file.read())
time.time = wrong
"""


class Clock:
    """The wall clock of all processes of a chat."""

    def __init__(self, chat: Chat) -> None:
        self._error = chat.directory / "clock"
        (chat.directory / "clocks").mkdir()
        (chat.directory / "clocks" / "sitecustomize.py").write_text(WRONG_CLOCK)
        path = [str(chat.directory / "clocks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        chat.environment.update(PYTHONPATH=os.pathsep.join(path), CLOCK_ERROR=str(self._error))
        self.set(0.0)

    def set(self, years: float) -> None:
        """Set the clock wrong by so many years."""
        draft = self._error.with_name("clock.new")
        draft.write_text(str(years * YEAR))
        draft.replace(self._error)      # at once: a process may be reading it


@pytest.mark.parametrize("before, after", [(0, 1), (0, -1), (-1, 0), (30, -30)])
def test_mail_and_nick_are_there_after_the_clock_was_set_and_the_server_restarted(
        chat: Chat, before: float, after: float) -> None:
    clock = Clock(chat)
    clock.set(before)
    server = chat.server("--nick-lapse", "1", "--log-level", "info")
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed("send bob one\n")
    alice.see(SAVED)
    clock.set(after)
    alice.feed("send bob two\n")
    alice.see(SAVED)
    server.signal(15)
    assert server.wait() == 0 and not any("lapsed" in line for line in server.errors)
    clock.set(after * 2)
    server = chat.restart("--nick-lapse", "1", "--log-level", "info")
    alice.see(WELCOME)
    alice.feed("send bob three\n")
    alice.see(SAVED)
    server.kill()
    clock.set(before)
    server = chat.restart("--nick-lapse", "1", "--log-level", "info")
    stranger = chat.run("client", "bob", "127.0.0.1", str(chat.port), "0", "--anonymous")
    assert stranger.wait() == 1 and "[Nickname bob belongs to someone else.]" in stranger.lines
    bob = chat.client("bob")
    for text in ("one", "two", "three"):
        assert bob.see_match("alice: <.*").group().endswith(f"> {text}")
    assert not any("lapsed" in line for line in server.errors)


def test_a_client_whose_clock_jumps_stays_online_and_its_messages_come_with_the_time_it_showed(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    clock = Clock(chat)
    alice = chat.client("alice")
    for years in (-10, 10, -40):
        clock.set(years)
        alice.feed(f"send bob {years}\n")
        alice.see(SAVED)
    assert alice.finish() == 0 and server.popen.poll() is None
    bob = chat.client("bob")
    for years in (-10, 10, -40):
        assert bob.see_match(r"alice: <\d{4}-.*").group().endswith(f"> {years}")
