"""The sessions in README, as they really look on a terminal: ``python -m tests.cast`` prints its two blocks.

A server and the clients of alice, bob and carol are real processes, the clients on pseudo-terminals; ``pyte`` draws
what alice sees, and then what carol finds. What differs from run to run is replaced by examples of the same width: the
times by ``DAY`` and ``TIME``, the ports by ``PORTS``, in the order in which they are seen. The cursor is drawn as a
block.
"""
from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.processes import SAVED, UPDATED, WELCOME, Chat, is_offline, received
from tests.test_screen import PATIENT, Window

COLUMNS, ROWS = 72, 18
DAY, TIME = "2026-11-22", "09:41:07"
PORTS = ("43961", "51120", "38214")     # of alice, bob and carol


def stable(rows: list[str]) -> list[str]:
    """Return ``rows`` with the times and ports of every run."""
    ports: dict[str, str] = {}

    def port(match: re.Match[str]) -> str:
        return ":" + ports.setdefault(match[1], PORTS[len(ports)])
    rows = [re.sub(r"^\d\d:\d\d:\d\d(?= )", TIME, row) for row in rows]
    rows = [re.sub(r"(?<=: <)\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?=> )", f"{DAY} {TIME}", row) for row in rows]
    return [re.sub(r"(?<=127\.0\.0\.1):(\d{5})\b", port, row) for row in rows]


class Cast:
    """The windows; ``close`` closes them all."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._windows: list[Window] = []

    def close(self) -> None:
        """Close the windows."""
        for window in self._windows:
            window.close()

    def open(self, nick: str) -> Window:
        """Start a client on a terminal, and wait until it is online."""
        arguments = "client", nick, "127.0.0.1", str(self._chat.port), *PATIENT
        window = Window(self._chat, *arguments, columns=COLUMNS, rows=ROWS)
        self._windows.append(window)
        self.shows(window, WELCOME, UPDATED)
        return window

    @staticmethod
    def shows(window: Window, *lines: str) -> None:
        """Wait until all ``lines`` are on the screen, behind the time of day."""
        for line in lines:
            window.shows_row(r"\d\d:\d\d:\d\d " + re.escape(line))

    def alice_talks(self) -> list[str]:
        """Return what alice has on her screen after some talk."""
        self._chat.absent("carol")
        alice = self.open("alice")
        bob = self.open("bob")
        self._chat.until(lambda: sum(UPDATED in row for row in alice.rows) == 2, "the news of bob")
        alice.type("talk bob\rhello, I am new here\r")
        self.shows(alice, received("bob"))
        bob.type("send alice welcome! carol keeps our notes\r")
        self.shows(alice, "bob: welcome! carol keeps our notes")
        alice.type("/send carol where are the notes?\r")
        self.shows(alice, is_offline("carol"), SAVED)
        alice.type("/who\r")
        alice.shows_row("carol .* offline")
        half = "she is away: I have asked her wh"
        alice.type(half)
        alice.shows_row(f"bob>>> {half}")
        bob.type("send alice (she will read it on Monday)\r")
        self.shows(alice, "bob: (she will read it on Monday)")
        alice.shows_row(f"bob>>> {half}")
        return alice.picture

    def carol_comes_back(self) -> list[str]:
        """Return what carol has on her screen then."""
        carol = self.open("carol")
        self._chat.until(lambda: sum(UPDATED in row for row in carol.rows) == 2, "the news that she is online")
        carol.shows_row(">>>")
        return carol.picture


def cast() -> list[str]:
    """Return the blocks in README, in their order."""
    with tempfile.TemporaryDirectory() as directory, Chat(Path(directory)) as chat:
        session = Cast(chat)
        try:
            screens = [session.alice_talks(), session.carol_comes_back()]
        finally:
            session.close()
    return ["\n".join(stable(screen)) + "\n" for screen in screens]


if __name__ == "__main__":
    print("\n".join(cast()), end="")
