"""The session in README, as it really looks on a terminal.

``python -m tests.cast`` draws the picture (docs/session.svg) anew, and prints the block of text.

A server and the clients of alice, bob and carol are real processes, the clients on pseudo-terminals; ``pyte`` draws
what alice sees, and then what carol finds. What differs from run to run is replaced by examples of the same width: the
times by ``DAY`` and ``TIME``, the ports by ``PORTS``, in the order in which they are seen. The cursor is drawn as a
block.
"""
from __future__ import annotations

import re
import tempfile
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tests.processes import ROOT, SAVED, UPDATED, WELCOME, Chat, is_offline, received
from tests.test_screen import PATIENT, Window

PICTURE = ROOT / "docs" / "session.svg"
COLUMNS, ROWS = 72, 18
DAY, TIME = "2026-11-22", "09:41:07"
PORTS = ("43961", "51120", "38214")     # of alice, bob and carol


class Row(NamedTuple):
    """One row of a screen: its text, and how each character of it is drawn (``color``, or ``bold color``)."""

    text: str
    styles: list[str]


def rows_of(window: Window) -> list[Row]:
    """Return what is on the screen, with the times and ports of every run."""
    texts = stable(window.picture)
    return [Row(text, [style + " bold" if bold else style for style, bold in window.styles(y)])
            for y, text in enumerate(texts)]


def text_of(rows: list[Row]) -> str:
    """Return the rows as a block of text."""
    return "".join(f"{row.text}\n" for row in rows)


# --- the picture ----------------------------------------------------------------------------------------------

CELL, LINE = 8.4, 20                # width and height of one character, in pixels
MARGIN, BAR = 16, 34                # around the text; above it, where the name of the window stands
BACKGROUND, FOREGROUND = "#1e2127", "#d7dae0"
COLORS = {"default": FOREGROUND, "dim": "#7f848e", "red": "#e06c75", "green": "#98c379", "brown": "#d19a66",
          "yellow": "#e5c07b", "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2"}


def picture(rows: list[Row]) -> str:
    """Return a screen as an SVG: each run of characters that look the same is one ``tspan``."""
    width, height = 2 * MARGIN + COLUMNS * CELL, BAR + MARGIN + LINE * len(rows)
    drawn = []
    for y, row in enumerate(rows):
        runs = groupby(zip(row.text, row.styles + ["default"] * len(row.text)), key=lambda cell: cell[1])
        spans = "".join(f'<tspan {attributes(style)}>{escape("".join(char for char, _ in cells))}</tspan>'
                        for style, cells in runs)
        drawn.append(f'<text x="{MARGIN}" y="{BAR + LINE * y + 15}" xml:space="preserve">{spans}</text>')
    dots = "".join(f'<circle cx="{MARGIN + 6 + 18 * n}" cy="16" r="5.5" fill="{color}"/>'
                   for n, color in enumerate(("#e06c75", "#e5c07b", "#98c379")))
    title = f'<text x="{width / 2:.0f}" y="21" text-anchor="middle" fill="{COLORS["dim"]}">udpchat client alice</text>'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>', dots, title, *drawn, "</svg>", ""])


def attributes(style: str) -> str:
    """Return how a ``tspan`` is drawn."""
    color, _, bold = style.partition(" ")
    return f'fill="{COLORS.get(color, "#" + color)}"' + (' font-weight="bold"' if bold else "")


# --- the session ----------------------------------------------------------------------------------------------

def stable(rows: list[str]) -> list[str]:
    """Return ``rows`` with the times and ports of every run."""
    ports: dict[str, str] = {}

    def port(match: re.Match[str]) -> str:
        return ":" + ports.setdefault(match[1], PORTS[len(ports)])
    rows = [re.sub(r"^\d\d:\d\d:\d\d(?= )", TIME, row) for row in rows]
    rows = [re.sub(r"(?<=Connecting to 127\.0\.0\.1):\d+", ":4119", row) for row in rows]
    stamp = r"(?:(?<=<)|(?<=since ))\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?=>|$)"
    rows = [re.sub(stamp, f"{DAY} {TIME}", row) for row in rows]
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

    def alice_talks(self) -> list[Row]:
        """Return what alice has on her screen after some talk."""
        self._chat.absent("carol")
        alice = self.open("alice")
        bob = self.open("bob")
        self.shows(alice, "[bob is online.]")
        alice.type("talk bob\rhello, I am new here\r")
        self.shows(alice, received("bob"))
        bob.type("send alice welcome! carol keeps our notes\r")
        self.shows(alice, "bob: welcome! carol keeps our notes")
        alice.type("/send carol where are the notes?\r")
        self.shows(alice, is_offline("carol"), f"{SAVED} (carol)")
        alice.type("/who\r")
        alice.shows_row("carol .* offline since .*")
        half = "she is away: I have asked her wh"
        alice.type(half)
        alice.shows_row(f"to bob> {half}")
        bob.type("send alice (she will read it on Monday)\r")
        self.shows(alice, "bob: (she will read it on Monday)")
        alice.shows_row(f"to bob> {half}")
        return rows_of(alice)

    def carol_comes_back(self) -> list[Row]:
        """Return what carol has on her screen then."""
        carol = self.open("carol")
        carol.shows_row(">>>")
        return rows_of(carol)


def cast() -> tuple[list[Row], list[Row]]:
    """Return what alice and carol see: the picture, and the block of text."""
    with tempfile.TemporaryDirectory() as directory, Chat(Path(directory)) as chat:
        session = Cast(chat)
        try:
            return session.alice_talks(), session.carol_comes_back()
        finally:
            session.close()


if __name__ == "__main__":
    seen_by_alice, seen_by_carol = cast()
    PICTURE.write_text(picture(seen_by_alice))
    print(text_of(seen_by_carol), end="")
