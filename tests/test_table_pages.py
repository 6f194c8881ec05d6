"""The table as datagrams: pages that are compressed, or not, and remembered for all who ask."""
from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

import protocol
from protocol import OFFLINE, ONLINE, Decoder, Info, Page, Table, padded
from server import RUSH, RUSH_INTERVAL, RUSH_TABLE, RUSH_TIME, Pages, Rush
from tests.test_strangers import Desk


def table_with(hosts: Callable[[int], str], keys: bool, count: int = 3000) -> Table:
    """Return a table with many clients."""
    table, random = Table(), Random(1)
    for number in range(count):
        table.set(f"nick{random.getrandbits(20)}", hosts(number), random.randrange(1024, 65536), ONLINE,
                  random.randbytes(32) if keys else b"", keys)
    return table


def copy_of(table: Table, pages: Pages) -> tuple[Table, int]:
    """Return what a client makes of the pages, and how many those are."""
    copy, count = Table(), 0
    while copy.version < table.version:
        datagram, reached = pages.after(copy.version)
        assert len(datagram) <= protocol.MAX_DATAGRAM - protocol.FOR_SIZE
        (tag, info), = Decoder().decode(datagram)
        if tag == "packed":
            (tag, info), = Decoder().unpacked(info["data"])
        changed = copy.apply(Page(protocol.since_of(info), info["version"], info["set"], info.get("keys", ())))
        assert tag == "table" and changed is not None and copy.version == reached
        count += 1
    return copy, count


@pytest.mark.parametrize("hosts", [lambda number: "127.0.0.1", lambda number: f"10.{number % 199}.{number // 199}.7",
                                   lambda number: f"2001:db8::{number * 7919 % 65536:x}:{number:x}"])
@pytest.mark.parametrize("keys", [False, True])
def test_packed_pages_hold_the_same_and_are_fewer(hosts: Callable[[int], str], keys: bool) -> None:
    table = table_with(hosts, keys)
    (plain, many), (packed, few) = copy_of(table, Pages(table, False)), copy_of(table, Pages(table, True))
    assert [entry[:4] + entry[5:] for entry in plain.entries.values()] == [
        entry[:4] + entry[5:] for entry in packed.entries.values()] and len(packed) == len(table)
    assert few < 0.75 * many if keys else few < 0.55 * many


def test_a_mirror_learns_when_somebody_was_last_seen_also_if_nothing_else_has_changed() -> None:
    seen = {"bob": 100, "eve": 0}
    table, mirror = Table(lambda nick: seen[nick]), Table()
    for nick in seen:
        table.set(nick, "192.0.2.1", 1, OFFLINE)

    def update() -> dict[str, int]:
        for page in table.pages(mirror.version, 40):
            mirror.apply(page)
        return {nick: entry.seen for nick, entry in mirror.entries.items()}
    assert update() == {"bob": 100, "eve": 0}
    table.set("bob", "192.0.2.1", 1, ONLINE)
    table.set("bob", "192.0.2.1", 1, OFFLINE)       # before the mirror has heard of that
    seen["bob"] = 200
    assert update() == {"bob": 200, "eve": 0}
    table.set("bob", "192.0.2.1", 1, ONLINE)
    assert update() == {"bob": 0, "eve": 0}


def test_a_page_is_made_once_for_all_who_ask_and_the_last_one_anew_when_the_table_has_changed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []

    def packed(maps: bytes) -> bytes:
        made.append(maps)
        return protocol.packed(maps)
    monkeypatch.setattr("server.packed", packed)
    table = table_with(lambda number: "127.0.0.1", False)
    pages = Pages(table, True)
    _, count = copy_of(table, pages)
    assert count <= len(made) < 1.5 * count
    made.clear()
    copy_of(table, pages)
    assert not made
    table.set("newcomer", "127.0.0.1", 1, ONLINE)
    copy, _ = copy_of(table, pages)
    assert len(made) == 1 and copy.is_online("newcomer")


def test_pages_of_a_table_that_has_changed_much_are_forgotten() -> None:
    table = table_with(lambda number: "127.0.0.1", False, 500)
    pages = Pages(table, True)
    for number in range(20):
        for port in range(500):
            table.set(f"nick{port}", "127.0.0.1", 1024 + number, ONLINE)
        copy, _ = copy_of(table, pages)
        assert len(copy) == len(table)
    assert len(pages._cache) < 200


def test_only_those_who_have_said_that_they_read_packed_pages_get_some() -> None:
    desk = Desk()
    for number in range(200):
        desk.registry.table.set(f"nick{number}", "192.0.2.1", 1024 + number, ONLINE)
    abilities: tuple[Info, Info] = ({}, {"packed": True})
    for number, about in enumerate(abilities):
        address = ("192.0.2.9", 5000 + number)
        answers = desk.say(address, padded("reg", {"id": number, "nick": f"n{number}", "cookie": desk.cookie(address),
                                                   **about}, protocol.REG_SIZE))
        session = dict(answers)["welcome"]["session"]
        pages = desk.say(address, padded("sync", {"session": session, "version": 0}, protocol.SESSION_SIZE))
        tags = [tag for tag, _ in pages if tag != "for"]
        assert tags.count("packed") == (len(tags) if about else 0) and len(tags) == (2 if about else 7)


def rush(changes: Callable[[float], int], until: float, entries: int = RUSH_TABLE) -> list[float]:
    """Return when those who ask for a table wait; ``changes``: returns its version at a time."""
    found, waits, now = Rush(0.0, changes(0.0)), [], 0.0
    while now < until:
        now += 0.125
        if found.lasts(now, changes(now), entries):
            waits.append(now)
    return waits


def test_while_thousands_register_those_who_ask_for_the_table_wait() -> None:
    waits = rush(lambda now: int(min(now, 2.0) * 2 * RUSH), 6)
    assert waits[0] <= 2 * RUSH_INTERVAL and 2 <= waits[-1] < 2 + 2 * RUSH_INTERVAL


def test_a_rush_that_does_not_end_keeps_nobody_waiting_for_long() -> None:
    waits = rush(lambda now: int(now * 2 * RUSH), 30)
    assert RUSH_TIME - 2 * RUSH_INTERVAL <= waits[-1] <= RUSH_TIME + 2 * RUSH_INTERVAL


def test_nobody_waits_where_the_table_changes_slowly() -> None:
    assert rush(lambda now: int(now * 0.9 * RUSH), 30) == []


def test_nobody_waits_for_a_small_table() -> None:
    assert rush(lambda now: int(now * 9 * RUSH), 30, RUSH_TABLE - 1) == []
