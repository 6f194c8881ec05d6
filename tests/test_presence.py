"""Who comes and goes, and which day it is, as people and programs are told: on arguments."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from conversation import Delivery
from terminal import PRESENCE_DELAY, RETURN_TIME, Presence, ScreenFormatter
from tests.test_strangers import DeskLoop


class Screen:
    """A display that notes what it is told."""

    def __init__(self, is_for_programs: bool = False) -> None:
        self.asks, self.told = not is_for_programs, list[str]()
        self.formatter: Any = self
        self.is_for_programs = is_for_programs

    def tell(self, event: str, nick: str) -> None:
        """Note an event."""
        self.told.append(f"{event} {nick}")


class Room:
    """A presence, the table that it follows, and what is told."""

    def __init__(self, *nicks: str, is_for_programs: bool = False) -> None:
        self.loop, self.screen, self.online = DeskLoop(), Screen(is_for_programs), set(nicks)
        screen: Any = self.screen
        self.presence = Presence(self.loop, screen, self.online.__contains__)
        self.presence.on_session()
        self.presence.begin(nicks)

    def turn(self, *nicks: str) -> None:
        """Who was online goes, and who was not comes."""
        for nick in nicks:
            self.online ^= {nick}
        self.presence.note(nicks)

    def wait(self, seconds: float) -> list[str]:
        """Let time pass; return what is told in it."""
        before, end = len(self.screen.told), self.loop.time + seconds
        while self.loop.timers.next_time() <= end:
            self.loop.time = max(self.loop.time, self.loop.timers.next_time())
            self.loop.timers.run(self.loop.time)
        self.loop.time = end
        return self.screen.told[before:]


def test_who_comes_and_goes_is_told_to_people_a_little_later_and_in_one_line() -> None:
    room = Room("alice", "bob")
    room.turn("bob", "carol", "dave")
    assert room.wait(PRESENCE_DELAY - 0.1) == []
    assert room.wait(0.2) == ["client-offline bob", "client-onlines carol and dave"]


@pytest.mark.parametrize("nick", ["bob", "carol"])
def test_a_short_visit_or_absence_is_not_told(nick: str) -> None:
    room = Room("bob")
    room.turn(nick)
    assert room.wait(PRESENCE_DELAY - 0.1) == []
    room.turn(nick)
    assert room.wait(60) == []


def test_after_a_restart_of_the_server_those_who_come_back_a_little_later_are_no_news() -> None:
    room = Room("bob", "carol", "dave")
    room.presence.on_session()
    room.turn("bob", "carol", "dave")
    assert room.wait(PRESENCE_DELAY + 1) == []
    room.turn("bob")
    assert room.wait(RETURN_TIME - 5) == []
    room.turn("carol")
    assert room.wait(5) == ["client-offline dave"]
    room.turn("bob")
    assert room.wait(PRESENCE_DELAY + 0.1) == ["client-offline bob"], "that was later"


def test_programs_are_told_at_once() -> None:
    room = Room("bob", is_for_programs=True)
    room.turn("bob", "carol")
    assert room.screen.told == ["client-offline bob", "client-online carol"]


def test_nothing_is_told_between_two_stays() -> None:
    room = Room("bob")
    room.presence.end()
    room.turn("bob", "carol")
    assert room.wait(60) == []


# --- days -----------------------------------------------------------------------------------------------------

HELLO = Delivery("bob", ["hello"], [], lambda texts: None, 1, 1)
MIDNIGHT = time.mktime((2026, 11, 28, 0, 0, 0, 0, 0, -1))


@pytest.mark.parametrize("line", [lambda lines: lines.event("registered", nick="bob"),
                                  lambda lines: lines.note("[To say something: ...]"),
                                  lambda lines: lines.clients([("bob", "192.0.2.1:1", "online", 0)]),
                                  lambda lines: lines.messages(HELLO, "direct")])
def test_the_first_line_of_a_new_day_comes_behind_its_date_whatever_it_is(line: Callable[[ScreenFormatter], str]
                                                                          ) -> None:
    clock = [MIDNIGHT - 1]
    lines = ScreenFormatter(wall=lambda: clock[0])
    assert "---" not in line(lines)
    clock[0] = MIDNIGHT
    assert line(lines).startswith("--- 2026-11-28 ---\n") and "---" not in line(lines)
