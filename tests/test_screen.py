"""The client at a terminal: what somebody who types there sees, by real processes on pseudo-terminals.

A ``Window`` is such a terminal; ``pyte`` draws what it shows. A test says what is in its last rows, with a ``▮``
where the cursor is.
"""
from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyte
import pytest

from home import Mailbox
from editor import NAME_COLORS, PASTE_OFF, PASTE_ON, wraps_again
from tests.processes import (FROZEN_CLOCK, NOT_RESPONDING, OFFLINE, PIPE, PROGRAM, ROOT, SAVED, UPDATED, WELCOME, Chat,
                             Process, is_offline, received, sends)
from tests.test_editor import EMOJI, Xterm
from terminal import LONG_AWAY, MOST_ROWS

CURSOR = "▮"
HINT = "[To say something: talk NICK, or send NICK MESSAGE.]"
SAVED_FOR_BOB = f"{SAVED} (bob)"
# whatever terminal the tests themselves run in
WRAPS_NOT_AGAIN = dict.fromkeys(("ALACRITTY_WINDOW_ID", "KONSOLE_VERSION", "TERM_PROGRAM", "TMUX", "VTE_VERSION",
                                 "WEZTERM_PANE", "WT_SESSION"), "")
PLAIN = ("--no-time", "--color", "never")
SGR = re.compile(rb"\x1b\[[0-9;:]*m")
PATIENT = ("--ack-timeout", "60000")    # ms; so long nothing goes to the server

UP, DOWN, RIGHT, LEFT = "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D"
HOME, END, KILL_START, KILL_END, KILL_WORD, YANK = "\x01", "\x05", "\x15", "\x0b", "\x17", "\x19"
CONTROL_C, CONTROL_D, CONTROL_L, CONTROL_Z, BACKSPACE, DELETE = "\x03", "\x04", "\x0c", "\x1a", "\x7f", "\x1b[3~"


def pasted(text: str) -> str:
    """Return ``text`` as a terminal brackets it."""
    return f"\x1b[200~{text}\x1b[201~"


class Glass(Xterm):
    """A terminal's screen, that keeps what goes off it, counts bells, and shows what is dim as blinking."""

    def __init__(self, columns: int, rows: int) -> None:
        self.gone: list[str] = []
        self.bells = 0
        super().__init__(columns, rows)

    def index(self) -> None:
        """Scroll, if the cursor is in the last row."""
        if self.cursor.y == self.lines - 1:
            self.gone.append(self.display[0].rstrip())
        super().index()

    def bell(self, *_: object) -> None:
        """Ring."""
        self.bells += 1

    def select_graphic_rendition(self, *codes: int, **options: Any) -> None:
        """Leave out what pyte does not know: dim."""
        if codes == (2,):
            codes = (5,)
        elif codes == (22,):
            codes = (22, 25)
        super().select_graphic_rendition(*codes, **options)


class Window:
    """A terminal on which a process runs (that leads a session of its own)."""

    def __init__(self, chat: Chat, *arguments: str, columns: int = 60, rows: int = 24, shows_errors: bool = False,
                 command: Sequence[str] = PROGRAM, **environment: str) -> None:
        self.chat = chat
        self.glass = Glass(columns, rows)
        self._stream = pyte.ByteStream(self.glass)
        self._shown = 0
        master, slave = pty.openpty()
        self._master = os.dup(master)       # the process closes the other one
        self._set_size(columns, rows)
        self.settings = termios.tcgetattr(slave)
        try:
            self.process = chat.run(*arguments, stdin=slave, stdout=slave, stderr=slave if shows_errors else PIPE,
                                    command=command, terminal=slave,
                                    environment={"TERM": "xterm", "NO_COLOR": "", **WRAPS_NOT_AGAIN, **environment})
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        self.process.out.fd = master
        self.process._stdin = os.dup(master)

    def close(self) -> None:
        """Close the window's own descriptor."""
        os.close(self._master)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size; a signal reports it to the process."""
        self._look()
        self.glass.resize(rows, columns)
        self._set_size(columns, rows)

    @property
    def data(self) -> bytes:
        """All that the process has written."""
        return bytes(self.process.out.data)

    @property
    def has_its_settings(self) -> bool:
        """Whether the terminal is set as it was before the process began."""
        return termios.tcgetattr(self._master) == self.settings

    @property
    def is_raw(self) -> bool:
        """Whether keys come one by one."""
        return not termios.tcgetattr(self._master)[3] & termios.ICANON

    @property
    def pastes_are_bracketed(self) -> bool:
        """Whether the terminal was told to bracket pastes."""
        return self.data.rfind(PASTE_ON) > self.data.rfind(PASTE_OFF)

    def type(self, text: str) -> None:
        """Type bytes."""
        self.process.feed(text)

    def _look(self) -> None:
        new = self.process.out.data[self._shown:]
        self._shown += len(new)
        self._stream.feed(bytes(new))

    def _row(self, y: int) -> str:
        line, text = self.glass.buffer[y], ""
        for x in range(self.glass.columns):
            text += (CURSOR if (x, y) == (self.glass.cursor.x, self.glass.cursor.y) else "") + line[x].data
        if (self.glass.columns, y) == (self.glass.cursor.x, self.glass.cursor.y):
            text += CURSOR
        return text.rstrip()

    @property
    def picture(self) -> list[str]:
        """The rows that are seen, without blank ones at the end."""
        self._look()
        rows = [self._row(y) for y in range(self.glass.lines)]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def styles(self, y: int) -> list[tuple[str, bool]]:
        """Return the colour of each character in a row of the picture (``dim``, too), and whether it is bold.

        The cursor, which the picture shows as a character of its own, has the colour of what is typed.
        """
        line, styles = self.glass.buffer[y], []
        for x in range(self.glass.columns):
            if (x, y) == (self.glass.cursor.x, self.glass.cursor.y):
                styles.append(("default", False))
            if line[x].data:        # a wide character has an empty cell behind it
                styles.append(("dim" if line[x].blink else line[x].fg, line[x].bold))
        return styles

    @property
    def rows(self) -> list[str]:
        """The rows that were ever seen, from the first one on, without the cursor."""
        picture = [row.replace(CURSOR, "").rstrip() for row in self.picture]
        return self.glass.gone + picture

    def shows(self, *wanted: str) -> None:
        """Wait until ``wanted`` are the last rows."""
        def is_there() -> bool:
            return self.picture[-len(wanted):] == list(wanted)
        try:
            self.chat.until(is_there, "the screen")
        except AssertionError:
            assert self.picture == list(wanted)
            raise

    def shows_row(self, pattern: str) -> str:
        """Wait until some row is ``pattern``; return it."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = [row for row in self.rows if re.fullmatch(pattern, row)]
            return bool(found)
        self.chat.until(is_there, f"a row {pattern}")
        return found[-1]

    def cells(self, text: str) -> list[pyte.screens.Char]:
        """Return how the last row that has ``text`` in it draws it."""
        self._look()
        y = max(y for y in range(self.glass.lines) if text in self._row(y).replace(CURSOR, ""))
        start = self._row(y).replace(CURSOR, "").index(text)
        return [self.glass.buffer[y][x] for x in range(start, start + len(text))]

    def ends(self, code: int = 0) -> None:
        """Wait for the end of the process. Check that the terminal is as it was before."""
        assert self.process.wait() == code
        assert self.has_its_settings, "the terminal has its settings again"
        assert not self.pastes_are_bracketed


Open = Callable[..., Window]


@pytest.fixture
def open_window(chat: Chat) -> Iterator[Open]:
    """Yield a function that opens a window in which alice chats, and waits for the prompt."""
    windows: list[Window] = []

    def open_(*options: str, nick: str = "alice", ready: bool = True, arguments: Sequence[str] = (),
              **keywords: Any) -> Window:
        windows.append(Window(chat, *(arguments or ("client", nick, "127.0.0.1", str(chat.port))), *(options or PLAIN),
                              **keywords))
        if ready:
            windows[-1].shows(WELCOME, UPDATED, f">>> {CURSOR}")
        return windows[-1]

    yield open_
    for window in windows:
        window.close()


def meet(alice: Window, bob: Process) -> None:
    """Wait until both know each other."""
    bob.wait_for("alice")
    alice.chat.until(lambda: alice.rows.count(UPDATED) > 0, "a table")


# --- what comes while somebody types --------------------------------------------------------------------------

def test_a_message_goes_above_what_is_being_typed(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window()
    meet(alice, bob)
    alice.type("send bob hello" + LEFT * 2)
    alice.shows(f">>> send bob hel{CURSOR}lo")
    bob.feed("send alice hi there\n")
    alice.shows(UPDATED, "bob: hi there", f">>> send bob hel{CURSOR}lo")
    alice.type("p me, Ha\r")
    bob.see("alice: help me, Halo")
    alice.shows("bob: hi there", ">>> send bob help me, Halo", received("bob"), f">>> {CURSOR}")


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}], ids=["xterm", "dumb"])
def test_the_help_is_wrapped_at_words_for_the_width_that_there_is(
        chat: Chat, open_window: Open, environment: dict[str, str]) -> None:
    chat.server()
    alice = open_window(columns=48, ready=False, **environment)
    alice.shows(UPDATED, f">>> {CURSOR}")   # a terminal that echoes by itself would mix what is typed with the prompt
    alice.type("help\r")
    alice.shows("send NICK MESSAGE   send MESSAGE (the rest of",
                "                    the line) to NICK or",
                "                    NICK,NICK; msg does the same",
                "talk NICK           send every line to NICK or",
                "                    NICK,NICK; commands then",
                "                    begin with /; /end ends it",
                "dereg [NICK]        go offline",
                "reg [NICK]          come online again",
                "who [all]           show who is known (all: also",
                "                    those long away)",
                "fingerprint [NICK]  show the digits of your key,",
                "                    or those to compare with",
                "                    NICK",
                "verify NICK         note that you have compared",
                "                    the digits with NICK",
                "trust NICK          accept that NICK has another",
                "                    key now",
                "help                show this; ? does the same",
                "quit                go offline and end; exit",
                "                    does the same",
                f">>> {CURSOR}")


WRAPPED = [
    ("abcdefghijklmnopqrstuvwxyz" * 3, 0, 26),
    ("abcdefghijklmnopqrstuvwxyz" * 3, 40, 26),
    ("x" * 16, 0, 20),                  # full to the last column
    ("x" * 36, 4, 20),
    ("日本語" * 10, 0, 25),              # no room for half a character
    ("日本語" * 10, 7, 24),
    ("e\u0301" * 50, 0, 20),
    ("e\u0301日" * 14, 12, 21),
    ("x" * 77, 77, 20),
]


@pytest.mark.parametrize("text, left, columns", WRAPPED)
def test_a_text_of_several_rows_stays_whole_when_messages_come(chat: Chat, open_window: Open, text: str, left: int,
                                                               columns: int) -> None:
    bob = chat.client("bob")
    alice = open_window(columns=columns, ready=False)
    alice.shows(f">>> {CURSOR}")
    bob.wait_for("alice")
    alice.type(text + LEFT * left)
    rows = wrapped(">>> " + text, columns, left)
    alice.shows(*rows)
    for number in range(3):
        bob.feed(f"send alice {number}\n")
        alice.shows(*[f"bob: {shown}" for shown in range(number + 1)], *rows)
    assert sum(">>>" in row for row in alice.rows) == 1


def wrapped(text: str, columns: int, left: int) -> list[str]:
    """Return the rows of ``text``, with the cursor that many characters before its end."""
    units = re.findall("[^\u0301]\u0301?", text)
    units = [unit.replace("e\u0301", "é") for unit in units] + [""]
    rows, width = [""], 0
    for number, unit in enumerate(units):
        takes = 2 if unit >= "\u1100" else 1
        if width + takes > columns:
            rows.append("")
            width = 0
        if number == len(units) - 1 - left:
            rows[-1] += CURSOR
        rows[-1] += unit
        width += takes
    return [row.rstrip() for row in rows if row]


def test_a_burst_of_messages_comes_whole_and_in_order_while_somebody_types(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(columns=30)
    meet(alice, bob)
    text = "this text is typed while five hundred messages come in"
    bob.feed(sends("alice", [f"message {number}" for number in range(500)]))
    for c in text:
        alice.type(c)
        chat.pump(0.001)
    alice.shows("bob: message 499", *wrapped(">>> " + text, 30, 0))
    rows = alice.rows[alice.rows.index("bob: message 0"):]
    assert rows[:500] == [f"bob: message {number}" for number in range(500)]
    assert sum(">>>" in row for row in alice.rows) == 1


RESIZED = [
    ("narrower", [(20, 24)]),
    ("wider", [(55, 24)]),
    ("narrower, then wider", [(17, 24), (60, 24)]),
    ("again and again", [(12, 24), (31, 20), (30, 10), (29, 24), (80, 30)]),
    ("lower", [(40, 8)]),
    ("higher", [(40, 40)]),
]


@pytest.mark.parametrize("sizes", [sizes for _, sizes in RESIZED], ids=[name for name, _ in RESIZED])
def test_a_wrapped_text_fits_a_window_that_gets_another_size(chat: Chat, open_window: Open,
                                                             sizes: list[tuple[int, int]]) -> None:
    bob = chat.client("bob")
    alice = open_window(columns=40)
    meet(alice, bob)
    bob.feed("send alice before\n")
    text = "the quick brown fox jumps over the lazy dog, and nobody sees it but the dog: it is asleep"
    alice.type(text + LEFT * 30)
    alice.shows("bob: before", *wrapped(">>> " + text, 40, 30))
    for columns, rows in sizes:
        alice.resize(columns, rows)
        alice.shows("bob: before", *wrapped(">>> " + text, columns, 30))
    bob.feed("send alice after\n")
    alice.shows("bob: before", "bob: after", *wrapped(">>> " + text, sizes[-1][0], 30))
    assert sum(row.startswith(">>>") for row in alice.rows) == 1
    alice.type(END + "!")
    alice.shows("bob: after", *wrapped(f">>> {text}!", sizes[-1][0], 0))


def test_a_text_that_is_higher_than_the_window_is_shown_around_the_cursor(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(columns=10, rows=4, ready=False)
    alice.shows(f">>> {CURSOR}")
    bob.wait_for("alice")
    alice.type("0123456789" * 10)
    alice.shows("6789012345", "6789012345", f"6789{CURSOR}")
    bob.feed("send alice hi\n")
    alice.shows("bob: hi", "6789012345", "6789012345", f"6789{CURSOR}")
    alice.type(HOME)
    alice.shows("bob: hi", f">>> {CURSOR}012345", "6789012345", "6789012345")


# --- a terminal that wraps its rows again ---------------------------------------------------------------------

NAMES = [                        # of a terminal, and whether it wraps its rows again
    ({"TERM": "tmux-256color", "TMUX": "/tmp/x,1,0"}, True), ({"TERM": "screen", "TMUX": "/tmp/x,1,0"}, True),
    ({"TERM": "screen", "TMUX": "/tmp/x,1,0", "STY": "1.x"}, False), ({"TERM": "screen", "STY": "1.x"}, False),
    ({"TERM": "xterm"}, False), ({"TERM": "xterm-256color", "VTE_VERSION": "7000"}, True),
    ({"TERM": "xterm-256color", "VTE_VERSION": "7000", "XTERM_VERSION": "XTerm(390)"}, False),
    ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True), ({"TERM": "xterm", "TERM_PROGRAM": "x"}, False),
    ({"TERM": "xterm-kitty"}, True), ({"TERM": "foot"}, True), ({"TERM": "linux"}, False), ({}, False),
]


@pytest.mark.parametrize("environment, wraps", NAMES)
def test_whether_a_terminal_wraps_its_rows_again_is_told_by_its_name(environment: dict[str, str], wraps: bool) -> None:
    assert wraps_again(environment) is wraps


class Tmux:
    """A real tmux, of one window, in which alice chats; it has a server of its own."""

    def __init__(self, chat: Chat, *options: str, columns: int = 60, rows: int = 24) -> None:
        self.chat = chat
        settings = chat.directory / "tmux.conf"
        settings.write_text("set -g status off\nset -g default-terminal screen\nset -g escape-time 0\n")
        self._command = ["tmux", "-u", "-S", str(chat.directory / "tmux"), "-f", str(settings)]
        command = [*PROGRAM, "client", "alice", "127.0.0.1", str(chat.port), *PLAIN, *options]
        self._run("new-session", "-d", "-x", str(columns), "-y", str(rows), *command)
        self.until(lambda: self.lines[-2:] == [UPDATED, ">>>"], "the prompt")

    def _run(self, *arguments: str) -> str:
        environment = {name: value for name, value in self.chat.environment.items() if name not in ("TMUX", "STY")}
        return subprocess.run([*self._command, *arguments], env=environment, capture_output=True, text=True).stdout

    def close(self) -> None:
        """End its server, and all that runs in it."""
        self._run("kill-server")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition`` holds."""
        try:
            self.chat.until(condition, what)
        except AssertionError:
            raise AssertionError("\n".join([what, repr(self.cursor), *self.lines])) from None

    def type(self, text: str) -> None:
        """Type bytes."""
        self._run("send-keys", "-l", text)

    def resize(self, columns: int) -> None:
        """Give the window another width."""
        self._run("resize-window", "-x", str(columns))

    @property
    def lines(self) -> list[str]:
        """The lines from the first one on, each of which may be wrapped into several rows."""
        return [line.rstrip() for line in self._run("capture-pane", "-p", "-J", "-S", "-").rstrip().split("\n")]

    @property
    def rows(self) -> list[str]:
        """The rows that are seen."""
        return self._run("capture-pane", "-p").split("\n")

    @property
    def cursor(self) -> tuple[int, int]:
        """The row and the column."""
        row, column = self._run("display-message", "-p", "#{cursor_y} #{cursor_x}").split()
        return int(row), int(column)

    def columns_of(self, text: str) -> int:
        """Return how many columns this tmux gives to ``text``: a shell prints it."""
        self._run("new-window", "-d", "-n", "ruler", "printf %s '" + text + "'; exec sleep 1000")
        found: list[str] = []

        def is_printed() -> bool:
            found[:] = self._run("display-message", "-p", "-t", "ruler", "#{cursor_x}").split()
            return found not in ([], ["0"])
        self.until(is_printed, "a printed text")
        self._run("kill-window", "-t", "ruler")
        return int(found[0])


@pytest.fixture
def open_tmux(chat: Chat) -> Iterator[Callable[..., Tmux]]:
    """Yield a function that opens a tmux in which alice chats, and waits for the prompt."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    opened: list[Tmux] = []

    def open_(*options: str, **keywords: Any) -> Tmux:
        opened.append(Tmux(chat, *options, **keywords))
        return opened[-1]

    yield open_
    for tmux in opened:
        tmux.close()


def test_behind_emoji_the_cursor_is_where_tmux_draws_it(chat: Chat, open_tmux: Callable[..., Tmux]) -> None:
    bob = chat.client("bob")
    alice = open_tmux()
    bob.wait_for("alice")
    for unit in EMOJI.values():
        text = f"a{unit}b{unit} c"
        alice.type(text)
        parts = [text, text[:-1], text[:-2], f"a{unit}b", f"a{unit}", "a", ""]
        for number, part in enumerate(parts):
            wanted = alice.columns_of(">>> " + part)
            alice.until(lambda wanted=wanted: alice.cursor[1] == wanted, f"a cursor behind {part!r}")  # type: ignore
            if number == 4:
                bob.feed("send alice hi\n")
                alice.until(lambda: alice.lines[-2] == "bob: hi", "the message")
                alice.until(lambda wanted=wanted: alice.cursor[1] == wanted, f"behind {part!r}")  # type: ignore
            alice.type(LEFT)
        alice.type(RIGHT + DELETE + "x")
        wanted = alice.columns_of(">>> ax")
        alice.until(lambda: alice.cursor[1] == wanted, "a cursor behind what was typed instead")
        assert alice.rows[alice.cursor[0]].startswith(">>> axb")
        alice.type(CONTROL_C)
        alice.until(lambda: alice.lines[-1] == ">>>", "an empty line")


HALF_TYPED = {                   # a text, how many keys to the left the cursor is, and in which column of a wide window
    "ascii": ("send bob the quick brown fox jumps over the lazy dog, and nobody sees it but the dog: it sleeps", 0, 99),
    "inside": ("send bob the quick brown fox jumps over the lazy dog, and nobody sees it but the dog: it is", 60, 35),
    "short": ("half a line", 0, 15),
    "wide": ("日本語" * 20, 0, 124),
    "emoji": ("send bob " + "👨\u200d👩\u200d👧 and 🇩🇪 " * 5, 3, 59),
}


@pytest.mark.parametrize("text, left, column", HALF_TYPED.values(), ids=HALF_TYPED)
def test_thirty_sizes_of_a_terminal_that_wraps_again_leave_one_copy_of_what_is_being_typed(
        chat: Chat, open_tmux: Callable[..., Tmux], text: str, left: int, column: int) -> None:
    bob = chat.client("bob")
    alice = open_tmux(columns=80)
    bob.wait_for("alice")
    messages = [f"bob: message {number}, with some more words to make it longer" for number in range(30)]
    bob.feed("".join(f"send alice {message[5:]}\n" for message in messages))
    alice.until(lambda: messages[-1] in alice.lines, "the messages")
    alice.type(text + LEFT * left)
    alice.until(lambda: "".join(alice.lines[len(messages) + 3:]).replace(" ", "") == (">>>" + text).replace(" ", ""),
                "the text")
    for number in range(30):
        alice.resize(24 + (number * 37) % 70)
        alice.chat.rest(0.05 if number % 10 else 1.0)
    alice.chat.rest(1.0)
    alice.resize(200)
    alice.until(lambda: len(alice.lines) == len(messages) + 4, "one line")
    assert alice.lines[1:-1] == [WELCOME, UPDATED, *messages]
    alice.until(lambda: alice.lines[-1].replace(" ", "") == (">>>" + text).replace(" ", ""), "exactly what was typed")
    alice.until(lambda: alice.cursor[1] == column, "the cursor")
    bob.feed("send alice the last\n")
    alice.until(lambda: alice.lines[len(messages) + 3] == "bob: the last", "the message")
    assert alice.lines[3:-1] == messages + ["bob: the last"]


def test_a_cleared_screen_leaves_no_copy_of_what_is_being_typed_above_it(open_tmux: Callable[..., Tmux]) -> None:
    alice = open_tmux(columns=40)
    text = "this takes more than one row, and the cursor is in the third, is it not?"
    alice.type(text)
    alice.until(lambda: alice.lines[-1] == ">>> " + text, "the text")
    alice.type(CONTROL_L)
    alice.until(lambda: alice.cursor[0] == 1, "an empty screen")
    assert sum(">>>" in line for line in alice.lines) == 1


# --- editing --------------------------------------------------------------------------------------------------

EDITED = [
    ("send bob hllo" + LEFT * 3 + "e", f"send bob he{CURSOR}llo"),
    ("helllo" + LEFT * 2 + BACKSPACE, f"hel{CURSOR}lo"),
    ("hello" + LEFT * 3 + RIGHT + DELETE, f"hel{CURSOR}o"),
    ("bob hi" + HOME + "send ", f"send {CURSOR}bob hi"),
    ("bob" + HOME + "send " + END + " hi", f"send bob hi{CURSOR}"),
    ("hello there" + LEFT * 5 + KILL_START, f"{CURSOR}there"),
    ("hello there" + LEFT * 6 + KILL_END, f"hello{CURSOR}"),
    ("send bob hello" + KILL_WORD * 2, f"send {CURSOR}"),
    ("one two" + KILL_WORD + HOME + YANK + " ", f"two {CURSOR}one"),
    ("日本語" + LEFT + BACKSPACE, f"日{CURSOR}語"),
    ("ne\u0301e" + LEFT + BACKSPACE, f"n{CURSOR}e"),
    ("grüße 😀", f"grüße 😀{CURSOR}"),
    ("a\x1b[15~\x1b[<0;1;1Mb", f"ab{CURSOR}"),
]


def test_keys_edit_the_line(open_window: Open) -> None:
    alice = open_window()
    for keys, line in EDITED:
        alice.type(keys)
        alice.shows(UPDATED, f">>> {line}".rstrip())
        alice.type(CONTROL_C)
        alice.shows(UPDATED, f">>> {CURSOR}")


def test_control_l_clears_the_screen_but_not_the_line(open_window: Open) -> None:
    alice = open_window()
    alice.type("hello" + LEFT + CONTROL_L)
    alice.chat.until(lambda: alice.picture == [f">>> hell{CURSOR}o"], "an empty screen")


def test_lines_are_remembered_when_the_program_runs_again(chat: Chat, open_window: Open) -> None:
    alice = open_window()
    alice.type("first\r")
    alice.shows(">>> first", "[Unknown command first, try help.]", HINT, f">>> {CURSOR}")
    alice.type("second\rquit\r")
    alice.ends()
    history = chat.state / "udpchat" / "history"
    assert history.read_text() == "first\nsecond\nquit\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    alice = open_window()
    alice.type("half a line" + UP)
    alice.shows(UPDATED, f">>> quit{CURSOR}")
    alice.type(UP * 2)
    alice.shows(UPDATED, f">>> first{CURSOR}")
    alice.type(DOWN)
    alice.shows(UPDATED, f">>> second{CURSOR}")
    alice.type(DOWN * 2)
    alice.shows(UPDATED, f">>> half a line{CURSOR}")


def test_tab_completes_commands_and_nicks_and_those_online_first(chat: Chat, open_window: Open) -> None:
    chat.absent("bea")
    bob = chat.client("bob")
    alice = open_window()
    meet(alice, bob)
    alice.type("s\t")
    alice.shows(f">>> send {CURSOR}")
    alice.type("b\t")
    alice.shows(f">>> send bob {CURSOR}")
    alice.type("\t")
    alice.shows(f">>> send bea {CURSOR}")
    alice.type("\t")
    alice.shows(f">>> send bob {CURSOR}")
    alice.type("hello\r")
    bob.see("alice: hello")
    for typed, completed in (("/msg bo", "/msg bob"), ("send bob,be", "send bob,bea"), ("/wh", "/who"),
                             ("talk bea,", "talk bea,bob"), ("dereg ", "dereg alice")):
        alice.type(KILL_START + typed + "\t")
        alice.shows(f">>> {completed} {CURSOR}")
    alice.type(KILL_START + "x\t")
    alice.chat.until(lambda: alice.picture[-1] == f">>> x{CURSOR}" and alice.glass.bells == 1, "a bell")


def test_a_paste_does_nothing_until_enter(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window()
    meet(alice, bob)
    alice.chat.until(lambda: alice.pastes_are_bracketed, "bracketed paste")
    alice.type(pasted("send bob one\r\nsend bob two\r\n"))
    alice.shows(f">>> send bob one↵send bob two{CURSOR}")
    chat.rest(0.2)
    assert not any(line.startswith("alice:") for line in bob.lines)
    alice.shows(f">>> send bob one↵send bob two{CURSOR}")
    alice.type("\r")
    bob.see("alice: one", "alice: two")
    alice.shows(received("bob"), f">>> {CURSOR}")
    alice.shows_row(">>> send bob two")


def test_a_block_that_is_pasted_behind_send_goes_there_line_by_line(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window()
    meet(alice, bob)
    alice.type("send bob " + pasted("def f():\n\n    quit\n  dereg alice\n\x1b[Aend"))
    alice.shows(f">>> send bob def f():↵↵    quit↵  dereg alice↵[Aend{CURSOR}")
    alice.type("\r")
    bob.see("alice: def f():", "alice: ", "alice:     quit", "alice:   dereg alice", "alice: [Aend")
    alice.shows(received("bob"), f">>> {CURSOR}")


# --- Ctrl-C and Ctrl-D ----------------------------------------------------------------------------------------

def test_control_c_takes_back_a_line_and_then_ends_in_order(open_window: Open) -> None:
    alice = open_window()
    alice.type("send bob something that I would not say" + CONTROL_C)
    alice.shows(UPDATED, f">>> {CURSOR}")
    alice.type(CONTROL_C)
    alice.ends()
    assert alice.picture[-2:] == [OFFLINE, CURSOR]


def test_control_d_ends_on_an_empty_line_only(open_window: Open) -> None:
    alice = open_window()
    alice.type("hello" + HOME + CONTROL_D)
    alice.shows(UPDATED, f">>> {CURSOR}ello")
    alice.type(CONTROL_C + CONTROL_D)
    alice.ends()
    assert [row for row in alice.rows if row][1:] == [WELCOME, UPDATED, OFFLINE]


def test_a_second_control_c_does_not_wait(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN, *PATIENT, command=FROZEN_CLOCK)     # the first would never end it
    meet(alice, bob)
    bob.signal(signal.SIGSTOP)
    alice.type("send bob hello\r")
    alice.shows(">>> send bob hello", f">>> {CURSOR}")
    alice.type(CONTROL_C + CONTROL_C)
    alice.ends(1)
    assert alice.process.errors == ["send bob hello"]


def test_control_d_waits_for_what_was_sent_and_control_c_for_nothing_more(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN, *PATIENT)
    meet(alice, bob)
    bob.signal(signal.SIGSTOP)
    alice.type("send bob hello\r")
    alice.shows(">>> send bob hello", f">>> {CURSOR}")
    alice.type(CONTROL_D)
    chat.rest(0.3)
    assert alice.process.popen.poll() is None
    alice.type(CONTROL_C + CONTROL_C)
    alice.ends(1)


def test_what_was_not_delivered_stands_below_on_lines_of_its_own(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN, *PATIENT, shows_errors=True)
    meet(alice, bob)
    bob.signal(signal.SIGSTOP)
    alice.type("send bob one\rsend bob two\r")
    alice.shows("[Waiting for bob: 2 messages.]", f">>> {CURSOR}")
    alice.type(CONTROL_C)
    alice.ends(1)
    assert [row for row in alice.rows if row][3:] == [">>> send bob one", ">>> send bob two",
                                                      OFFLINE, "[2 messages not delivered.]", "send bob one",
                                                      "send bob two"]


def test_the_log_goes_above_what_is_being_typed(chat: Chat, open_window: Open) -> None:
    chat.absent("bob")
    alice = open_window(*PLAIN, "--log-level", "info", columns=120, shows_errors=True)
    alice.type("send bob hello\r")
    alice.shows(is_offline("bob"), SAVED_FOR_BOB, f">>> {CURSOR}")
    chat.processes[0].kill()
    chat.restart()
    alice.type("half" + LEFT)
    alice.shows_row(".* INFO the server does not know this session any more.*: registering again")
    alice.shows(f">>> hal{CURSOR}f")
    assert [row for row in alice.rows if "half" in row] == [">>> half"]


def test_control_c_ends_a_client_that_never_found_its_server(chat: Chat, open_window: Open) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        alice = open_window(arguments=("client", "alice", "127.0.0.1", str(nobody.getsockname()[1])), ready=False,
                            command=FROZEN_CLOCK)       # it would never give the server up
        alice.chat.until(lambda: alice.is_raw, "the line editor")
        alice.type("hello")
        alice.shows(f"hello{CURSOR}")
        alice.type(CONTROL_C + CONTROL_C)
        alice.ends()
        assert [row for row in alice.rows if row] == [f"[Connecting to 127.0.0.1:{nobody.getsockname()[1]} as alice.]"]


# --- the terminal's own settings ------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_ends_in_order_and_leaves_the_terminal_as_it_was(open_window: Open, number: int) -> None:
    alice = open_window()
    assert alice.is_raw and alice.pastes_are_bracketed and not alice.has_its_settings
    alice.type("half a line")
    alice.shows(f">>> half a line{CURSOR}")
    alice.process.signal(number)
    alice.ends()
    assert [row for row in alice.rows if row][1:] == [WELCOME, UPDATED, OFFLINE]
    assert alice.picture[-1] == CURSOR


FAILS = """\
import sys
import client, udpchat

def settle(self, work=client.Client.settle):
    work(self)
    if self.table_sync.table.entries:
        raise RuntimeError

client.Client.settle = settle
try:
    udpchat.main()
except RuntimeError:
    sys.exit(7)
"""


def test_a_fault_of_the_program_leaves_the_terminal_as_it_was(open_window: Open) -> None:
    alice = open_window(command=[sys.executable, "-c", FAILS], PYTHONPATH=str(ROOT), ready=False)
    alice.ends(7)
    assert PASTE_ON in alice.data


SHELL = """\
import os, signal, sys, termios
mine = termios.tcgetattr(0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
wishes = {signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, wishes)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wishes)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while True:
    status = os.waitpid(job, os.WUNTRACED)[1]
    os.tcsetpgrp(0, os.getpgrp())
    settings = "its settings" if termios.tcgetattr(0) == mine else "other settings"
    if not os.WIFSTOPPED(status):
        print(f"ended with {os.waitstatus_to_exitcode(status)}, {settings}", file=sys.stderr)
        break
    print(f"stopped, {settings}", file=sys.stderr, flush=True)
    print("$ typed to the shell", flush=True)
    if signal.sigwait(wishes) == signal.SIGUSR1:
        os.tcsetpgrp(0, job)
    os.kill(-job, signal.SIGCONT)
"""
FG, BG = signal.SIGUSR1, signal.SIGUSR2


def open_shell(open_window: Open, **keywords: Any) -> Window:
    """Return a window with a shell that has started the client as its job; the signals FG and BG continue it."""
    alice = open_window(command=[sys.executable, "-c", SHELL, PROGRAM[1]], ready=False, **keywords)
    alice.shows(WELCOME, UPDATED, f">>> {CURSOR}")
    return alice


def see_error(window: Window, *lines: str) -> None:
    window.chat.until(lambda: window.process.errors == list(lines), f"{lines} on stderr")


def test_control_z_stops_the_job_and_the_line_is_there_again_when_it_goes_on(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_shell(open_window)
    meet(alice, bob)
    alice.type("send bob hello")
    alice.shows(UPDATED, f">>> send bob hello{CURSOR}")
    alice.type(CONTROL_Z)
    see_error(alice, "stopped, its settings")
    assert not alice.pastes_are_bracketed
    alice.shows(UPDATED, "$ typed to the shell", CURSOR)
    alice.process.signal(FG)
    alice.shows(UPDATED, "$ typed to the shell", f">>> send bob hello{CURSOR}")
    assert alice.is_raw and alice.pastes_are_bracketed
    alice.type(" again\r")
    bob.see("alice: hello again")
    alice.shows("$ typed to the shell", ">>> send bob hello again", received("bob"), f">>> {CURSOR}")
    alice.type("quit\r")
    see_error(alice, "stopped, its settings", "ended with 0, its settings")
    alice.ends()


def test_a_wrapped_line_is_there_once_after_control_z(open_window: Open) -> None:
    alice = open_shell(open_window, columns=30)
    text = "this takes more than one row, and the cursor is in the second"
    alice.type(text + LEFT * 10 + CONTROL_Z)
    see_error(alice, "stopped, its settings")
    alice.shows(UPDATED, "$ typed to the shell", CURSOR)
    alice.process.signal(FG)
    rows = wrapped(">>> " + text, 30, 10)
    alice.shows(UPDATED, "$ typed to the shell", *rows)
    alice.chat.rest(0.1)
    alice.type(END + "!")
    alice.shows(UPDATED, "$ typed to the shell", *wrapped(f">>> {text}!", 30, 0))
    alice.type(CONTROL_Z)
    see_error(alice, *["stopped, its settings"] * 2)
    alice.process.signal(FG)
    alice.shows(UPDATED, *["$ typed to the shell"] * 2, *wrapped(f">>> {text}!", 30, 0))


def test_a_wrapped_line_fits_a_window_that_got_another_size_while_the_job_was_stopped(open_window: Open) -> None:
    alice = open_shell(open_window, columns=30)
    text = "this takes more than one row, and the cursor is in the second"
    alice.type(text + LEFT * 10 + CONTROL_Z)
    see_error(alice, "stopped, its settings")
    alice.resize(50, 24)
    alice.process.signal(FG)
    alice.shows(UPDATED, "$ typed to the shell", *wrapped(">>> " + text, 50, 10))


def test_messages_that_came_while_it_was_stopped_are_shown_when_it_goes_on(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob", *PATIENT)
    alice = open_shell(open_window)
    meet(alice, bob)
    alice.type("half" + CONTROL_Z)
    see_error(alice, "stopped, its settings")
    bob.feed("send alice one\nsend alice two\n")
    bob.sync()
    alice.process.signal(FG)
    alice.shows("$ typed to the shell", "bob: one", "bob: two", f">>> half{CURSOR}")


def test_a_client_that_is_frozen_and_goes_on_shows_what_came_on_lines_of_its_own(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob", *PATIENT)
    alice = open_window()
    meet(alice, bob)
    alice.type("half")
    alice.shows(f">>> half{CURSOR}")
    alice.process.signal(signal.SIGSTOP)
    bob.feed("send alice one\nsend alice two\n")
    bob.sync()
    alice.process.signal(signal.SIGCONT)
    alice.shows(UPDATED, "bob: one", "bob: two", f">>> half{CURSOR}")


def test_a_job_that_is_stopped_from_outside_gives_the_terminal_back(open_window: Open) -> None:
    alice = open_shell(open_window)
    alice.type("half")
    alice.shows(f">>> half{CURSOR}")
    client = int(re.findall(r"(\d+)", Path(f"/proc/{alice.process.pid}/task/{alice.process.pid}/children")
                            .read_text())[0]) if sys.platform == "linux" else 0
    if not client:
        pytest.skip("finds its job as Linux tells it")
    os.kill(client, signal.SIGTSTP)
    see_error(alice, "stopped, its settings")
    alice.process.signal(FG)
    alice.shows("$ typed to the shell", f">>> half{CURSOR}")
    alice.type(CONTROL_C)
    alice.shows("$ typed to the shell", f">>> {CURSOR}")


def test_a_job_in_the_background_leaves_the_terminal_to_the_shell(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_shell(open_window)
    meet(alice, bob)
    alice.type("half" + CONTROL_Z)
    see_error(alice, "stopped, its settings")
    alice.process.signal(BG)
    bob.feed("send alice in the background\n")
    bob.see(received("alice"))
    alice.shows("$ typed to the shell", "bob: in the background", CURSOR)
    assert alice.has_its_settings, "it is the shell's"
    assert not alice.pastes_are_bracketed
    alice.type("x\r")                # whoever reads in the background is stopped
    see_error(alice, *["stopped, its settings"] * 2)
    alice.process.signal(FG)
    alice.shows("[Unknown command halfx, try help.]", HINT, f">>> {CURSOR}")
    alice.chat.until(lambda: alice.is_raw and alice.pastes_are_bracketed, "the line editor")
    alice.type("hre" + LEFT * 2 + "e\r")
    alice.shows(">>> here", "[Unknown command here, try help.]", HINT, f">>> {CURSOR}")
    alice.type("quit\r")
    see_error(alice, *["stopped, its settings"] * 2, "ended with 0, its settings")


# --- times, colours, bells ------------------------------------------------------------------------------------

CLOCK = r"\d\d:\d\d:\d\d "


def test_each_line_has_its_time_unless_nobody_wants_it(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window("--color", "never", ready=False)
    alice.shows_row(CLOCK + re.escape(WELCOME))
    bob.wait_for("alice")
    bob.feed("send alice hello\n")
    alice.shows_row(CLOCK + "bob: hello")
    alice.type("who\r")
    alice.shows_row("alice  127.0.0.1:.*")
    alice.shows_row(">>> who")
    alice.shows_row(r"bob +127.0.0.1:.*")
    alice.shows(f">>> {CURSOR}")
    assert all(re.match(CLOCK, row) for row in alice.rows if row[:1] != ">" and "127.0.0.1:" not in row)


def test_a_script_gets_times_if_it_asks_for_them(chat: Chat) -> None:
    alice = chat.start("alice", "--time")
    alice.feed("send alice hello\n")
    assert alice.finish() == 0
    assert all(re.match(CLOCK, line) for line in alice.lines)
    shown = [line for line in re.sub(CLOCK, "", "\n".join(alice.lines)).split("\n") if line != UPDATED]
    assert shown == [WELCOME, "alice: hello", received("alice"), OFFLINE]


def test_nicks_have_colours_that_stay_and_what_is_not_a_message_has_none(chat: Chat, open_window: Open) -> None:
    bob, carol = chat.clients("bob", "carol")
    alice = open_window("--no-time", ready=True)
    meet(alice, bob)
    carol.wait_for("alice")
    bob.feed("send alice hello\n")
    alice.shows("bob: hello", f">>> {CURSOR}")
    carol.feed("send alice hello\n")
    alice.shows("carol: hello", f">>> {CURSOR}")
    alice.type("send nobody hello\rwho\r")
    alice.shows_row(r"bob    127.0.0.1:\d+ +online")
    alice.shows(f">>> {CURSOR}")
    mine, theirs, others = alice.cells("alice"), alice.cells("bob:"), alice.cells("carol:")
    assert {len({cell.fg for cell in cells[:3]}) for cells in (mine, theirs, others)} == {1}
    assert theirs[0].fg == alice.cells("bob ")[0].fg != others[0].fg == alice.cells("carol ")[0].fg
    assert theirs[-1].fg == others[-1].fg == "default" and not theirs[0].blink
    assert {cell.fg for cell in alice.cells("hello")} == {"default"}
    assert {(cell.fg, cell.blink) for cell in alice.cells("[Unknown client nobody.]")} == {("red", False)}
    assert {(cell.fg, cell.blink) for cell in alice.cells(WELCOME)} == {("default", True)}
    assert {(cell.fg, cell.blink) for cell in alice.cells(">>> who")} == {("default", False)}
    shown = set(re.findall(rb"\x1b\[38;5;(\d+)m", alice.data))
    assert shown <= {str(color).encode() for color in NAME_COLORS}


@pytest.mark.parametrize("options, environment", [
    (("--no-time",), {"NO_COLOR": "1"}), (("--no-time", "--color=never"), {}), (PLAIN, {"COLORTERM": "truecolor"})])
def test_nothing_is_coloured_for_who_wants_no_colours(chat: Chat, open_window: Open, options: tuple[str, ...],
                                                      environment: dict[str, str]) -> None:
    bob = chat.client("bob")
    alice = open_window(*options, **environment)
    meet(alice, bob)
    bob.feed("send alice hello\n")
    alice.shows("bob: hello", f">>> {CURSOR}")
    alice.type("send nobody hello\r")
    alice.shows("[Unknown client nobody.]", f">>> {CURSOR}")
    alice.type("quit\r")
    alice.ends(1)
    assert not SGR.search(alice.data)


def test_a_script_gets_colours_if_it_asks_for_them(chat: Chat) -> None:
    assert SGR.search(chat.complete("client", "alice", "127.0.0.1", str(chat.port), "--color", "always").out.data)
    assert not SGR.search(chat.complete("client", "alice", "127.0.0.1", str(chat.port)).out.data)


def test_a_dumb_terminal_gets_a_prompt_and_no_escape_at_all(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window("--no-time", TERM="dumb", ready=False)
    alice.shows_row(re.escape(UPDATED))
    alice.shows(f">>> {CURSOR}")
    assert alice.has_its_settings, "it edits its lines itself"
    meet(alice, bob)
    alice.type("send bob hello\r")
    alice.shows(received("bob"), f">>> {CURSOR}")
    bob.feed("send alice hi\n")
    alice.shows(received("bob"), ">>>", "bob: hi", f">>> {CURSOR}")
    assert "" not in alice.rows, "a line that was typed leaves no blank one"
    alice.type(CONTROL_D)
    alice.ends()
    assert b"\x1b" not in alice.data and b"\a" not in alice.data
    assert alice.picture[-2:] == [OFFLINE, CURSOR]


def test_the_bell_rings_for_messages_and_for_nothing_else(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice, quiet = open_window(*PLAIN, "--bell"), open_window(nick="quiet")
    meet(alice, bob)
    bob.wait_for("quiet")
    alice.type("send bob hello\r")
    alice.shows(received("bob"), f">>> {CURSOR}")
    alice.type("send nobody hello\rdance\r")
    alice.shows("[Unknown command dance, try help.]", HINT, f">>> {CURSOR}")
    assert alice.glass.bells == 0
    bob.feed("send alice one\nsend alice two\nsend quiet hello\n")
    alice.shows("bob: one", "bob: two", f">>> {CURSOR}")
    quiet.shows("bob: hello", f">>> {CURSOR}")
    assert (alice.glass.bells, quiet.glass.bells) == (2, 0)


def test_who_wants_it_quiet_sees_messages_and_above_the_line_what_went_wrong(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window("--quiet", *PLAIN, ready=False)
    bob.wait_for("alice")
    bob.feed("send alice hello\n")
    alice.shows("bob: hello", f">>> {CURSOR}")
    alice.type("send bob hi\r")
    alice.shows(">>> send bob hi", f">>> {CURSOR}")
    alice.type("send nobody hi\rhalf")
    bob.see("alice: hi")
    alice.shows("bob: hello", ">>> send bob hi", ">>> send nobody hi", "[Unknown client nobody.]", f">>> half{CURSOR}")


# --- talk -----------------------------------------------------------------------------------------------------

def test_talk_sends_every_line_to_one_nick_until_it_ends(chat: Chat, open_window: Open) -> None:
    bob, carol = chat.clients("bob", "carol")
    alice = open_window()
    meet(alice, bob)
    carol.wait_for("alice")
    alice.type("talk bob\r")
    alice.shows(">>> talk bob", f"to bob> {CURSOR}")
    alice.type("quit\r")
    bob.see("alice: quit")
    alice.shows("to bob> quit", received("bob"), f"to bob> {CURSOR}")
    alice.type("/send carol hi\r")
    carol.see("alice: hi")
    alice.shows("to bob> /send carol hi", received("carol"), f"to bob> {CURSOR}")
    alice.type("//text\r")
    bob.see("alice: /text")
    alice.shows("to bob> //text", received("bob"), f"to bob> {CURSOR}")
    alice.type("/foo\r")
    alice.shows("to bob> /foo", "[Unknown command /foo, try /help.]", f"to bob> {CURSOR}")
    alice.type("/s\tca\t")
    alice.shows(f"to bob> /send carol {CURSOR}")
    alice.type(CONTROL_C + "\r/who\r")
    alice.shows_row(r"carol +127.0.0.1:\d+ +online")
    alice.shows(f"to bob> {CURSOR}")
    alice.type("/talk nobody\r")
    alice.shows("[Unknown client nobody.]", f"to bob> {CURSOR}")
    alice.type("/end\r")
    alice.shows("to bob> /end", f">>> {CURSOR}")
    alice.type("send carol bye\r")
    carol.see("alice: bye")
    alice.shows(">>> send carol bye", received("carol"), f">>> {CURSOR}")
    alice.type("talk nobody\r")
    alice.shows(">>> talk nobody", "[Unknown client nobody.]", f">>> {CURSOR}")
    assert [line for line in bob.lines if line.startswith("alice:")] == ["alice: quit", "alice: /text"]


def test_a_block_that_is_pasted_while_one_talks_goes_there_as_it_is(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window()
    meet(alice, bob)
    alice.type("talk bob\r")
    alice.shows(f"to bob> {CURSOR}")
    alice.type(pasted("see\n/etc/passwd\n/quit\nquit") + "\r")
    bob.see("alice: see", "alice: /etc/passwd", "alice: /quit", "alice: quit")


def test_a_script_can_talk_too(chat: Chat) -> None:
    bob, carol = chat.clients("bob", "carol")
    alice = chat.client("alice")
    alice.feed("talk bob\nhello\nsend carol no\n\n//slash\n/send carol yes\n/foo\n/talk nobody\n/end\nsend carol end\n")
    assert alice.finish() == 1, "one nick was unknown"
    dora = chat.client("dora")
    dora.feed("talk bob\n/etc/hosts\n")
    assert dora.finish() == 1, "what may have been meant as a text went to nobody"
    carol.see("alice: yes", "alice: end")
    assert [line for line in bob.events if line[:1] == "a"] == ["alice: hello", "alice: send carol no", "alice: /slash"]
    assert [line for line in alice.events if "Unknown" in line] == ["[Unknown command /foo, try /help.]",
                                                                    "[Unknown client nobody.]"]


# --- waiting --------------------------------------------------------------------------------------------------

def test_who_waits_for_somebody_sees_for_whom(chat: Chat, open_window: Open) -> None:
    bob, carol = chat.clients("bob", "carol")
    alice = open_window(*PLAIN, *PATIENT)
    meet(alice, bob)
    bob.signal(signal.SIGSTOP)
    alice.type("send bob hello\r")
    alice.shows(">>> send bob hello", "[Waiting for bob: 1 message.]", f">>> {CURSOR}")
    alice.type("send bob again\r")
    alice.shows(">>> send bob again", "[Waiting for bob: 2 messages.]", f">>> {CURSOR}")
    alice.type("send carol hello\rhalf")
    alice.shows(">>> send carol hello", received("carol"), "[Waiting for bob: 2 messages.]", f">>> half{CURSOR}")
    carol.feed("send alice hi\n")
    alice.shows("carol: hi", "[Waiting for bob: 2 messages.]", f">>> half{CURSOR}")
    bob.signal(signal.SIGCONT)
    alice.shows("carol: hi", received("bob"), received("bob"), f">>> half{CURSOR}")
    assert not any("Waiting" in row for row in alice.rows)


def test_who_waits_for_the_server_sees_that(chat: Chat, open_window: Open) -> None:
    chat.absent("bob")
    server = chat.processes[0]
    alice = open_window()
    server.signal(signal.SIGSTOP)
    alice.type("send bob hello\r")
    alice.shows(is_offline("bob"), "[Waiting for the server: 1 message for bob.]", f">>> {CURSOR}")
    server.signal(signal.SIGCONT)
    alice.shows(is_offline("bob"), SAVED_FOR_BOB, f">>> {CURSOR}")
    assert not any("Waiting" in row for row in alice.rows)


def send_to_stopped_bob(chat: Chat, open_window: Open) -> tuple[Process, Window]:
    """Return a bob who is stopped, and the window in which a message for him waits."""
    bob = chat.client("bob")
    bob.signal(signal.SIGSTOP)
    server = f"127.0.0.1:{chat.port}"
    carl = open_window(*PATIENT, arguments=("send", "bob", "hello", "--server", server, "--nick", "carl"), ready=False)
    carl.shows("[Waiting for bob: 1 message.]", CURSOR)
    return bob, carl


def test_who_sends_one_message_sees_for_whom_it_waits(chat: Chat, open_window: Open) -> None:
    bob, carl = send_to_stopped_bob(chat, open_window)
    bob.signal(signal.SIGCONT)
    carl.shows(received("bob"), CURSOR)
    carl.ends()


def test_what_a_send_waits_for_fits_into_the_window_when_that_gets_another_size(chat: Chat,
                                                                                open_window: Open) -> None:
    bob, carl = send_to_stopped_bob(chat, open_window)
    carl.resize(20, 24)
    carl.shows("[Waiting for bob: 1", CURSOR)
    carl.resize(60, 24)
    carl.shows("[Waiting for bob: 1 message.]", CURSOR)
    bob.signal(signal.SIGCONT)
    carl.shows(received("bob"), CURSOR)
    carl.ends()


def test_what_a_send_waits_for_is_shown_again_when_it_goes_on_after_a_stop(chat: Chat, open_window: Open) -> None:
    bob, carl = send_to_stopped_bob(chat, open_window)
    carl.process.signal(signal.SIGSTOP)
    os.write(carl.process._stdin or 0, b"fg\r")          # echoed by the terminal, as what a shell would write
    carl.shows("[Waiting for bob: 1 message.]", "fg", CURSOR)
    carl.process.signal(signal.SIGCONT)
    carl.shows("[Waiting for bob: 1 message.]", "fg", "[Waiting for bob: 1 message.]", CURSOR)
    bob.signal(signal.SIGCONT)
    carl.shows("[Waiting for bob: 1 message.]", "fg", received("bob"), CURSOR)
    carl.ends()


def test_a_short_wait_is_not_shown(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN, command=FROZEN_CLOCK)       # so it is short, however busy the machine is
    meet(alice, bob)
    alice.type("send bob hello\r")
    alice.shows(received("bob"), f">>> {CURSOR}")
    assert b"Waiting" not in alice.data


# --- the server comes and goes --------------------------------------------------------------------------------

def test_a_server_that_restarts_is_one_line_when_it_goes_and_one_when_it_is_back(chat: Chat, open_window: Open) -> None:
    chat.absent("bob")
    alice = open_window()
    chat.processes[0].kill()
    alice.type("send bob hello\r")
    alice.shows(is_offline("bob"), NOT_RESPONDING, "[Waiting for the server: 1 message for bob.]", f">>> {CURSOR}")
    chat.restart()
    alice.shows_row(re.escape(SAVED_FOR_BOB))
    alice.shows(f">>> {CURSOR}")
    alice.chat.rest(0.3)
    assert [row for row in alice.picture if row != UPDATED][1:] == [
        WELCOME, ">>> send bob hello", is_offline("bob"), NOT_RESPONDING, WELCOME, SAVED_FOR_BOB, f">>> {CURSOR}"]


def test_a_server_that_stops_for_a_while_is_one_line_then_and_one_when_it_goes_on(chat: Chat,
                                                                                  open_window: Open) -> None:
    chat.absent("bob")
    alice = open_window()
    chat.processes[0].signal(signal.SIGSTOP)
    alice.type("send bob hello\r")
    alice.shows(is_offline("bob"), NOT_RESPONDING, "[Waiting for the server: 1 message for bob.]", f">>> {CURSOR}")
    chat.processes[0].signal(signal.SIGCONT)
    alice.shows_row(re.escape(SAVED_FOR_BOB))
    alice.shows(f">>> {CURSOR}")
    alice.chat.rest(0.3)
    assert alice.picture[1:] == [WELCOME, UPDATED, ">>> send bob hello", is_offline("bob"), NOT_RESPONDING,
                                 "[Server is responding again]", SAVED_FOR_BOB, f">>> {CURSOR}"]


# --- what people expect ---------------------------------------------------------------------------------------

def test_other_names_of_commands_and_a_slash_before_them_mean_what_people_expect(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN)
    meet(alice, bob)
    alice.type("/msg bob  two blanks\r")
    alice.shows(">>> /msg bob  two blanks", received("bob"), f">>> {CURSOR}")
    bob.see("alice:  two blanks")
    alice.type("?\r")
    alice.shows_row("quit +go offline and end; exit does the same")
    alice.type("/dereg\r")
    alice.shows(OFFLINE, f">>> {CURSOR}")
    alice.type("reg\r")
    alice.shows(WELCOME, UPDATED, f">>> {CURSOR}")
    alice.type("talk bob\r")
    alice.shows(f"to bob> {CURSOR}")
    alice.type("exit\r")
    alice.shows("to bob> exit", received("bob"), f"to bob> {CURSOR}")
    alice.type("/exit\r")
    alice.ends()


def test_what_is_pasted_behind_msg_goes_to_that_nick_and_is_no_command(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN)
    alice.type("  msg bob \x1b[200~one\rwho\rquit\x1b[201~\r")
    for text in ("one", "who", "quit"):
        bob.see(f"alice: {text}")
    alice.shows(received("bob"), received("bob"), f">>> {CURSOR}")


def test_a_command_may_have_blanks_and_a_slash_before_it_whatever_it_is_called(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN)
    alice.type(" /msg bob hello\r")
    bob.see("alice: hello")
    alice.type("send bob, carol hello\r")       # nobody is called so: nothing goes to bob
    alice.shows_row(re.escape("[Unknown client bob,.]"))
    alice.type("  /exit\r")
    assert alice.process.wait() == 1, "one message was for nobody"
    assert [line for line in bob.lines if "alice" in line] == ["alice: hello"]


def test_control_r_finds_what_was_typed_before(chat: Chat, open_window: Open) -> None:
    alice = open_window(*PLAIN)
    for line in ("first one", "second one", "third"):
        alice.type(f"/{line}\r")
    alice.shows_row(re.escape("[Unknown command third, try help.]"))
    alice.type("draft\x12on")
    alice.shows(f"search 'on': /sec{CURSOR}ond one")
    alice.type("\x12")
    alice.shows(f"search 'on': /first {CURSOR}one")
    alice.type("\x12x")
    alice.shows(f"no line has 'onx': /first {CURSOR}one")
    alice.type(BACKSPACE * 3)
    alice.shows(f"search '': draft{CURSOR}")
    alice.type("THIRD")
    alice.shows(f"search 'THIRD': /{CURSOR}third")
    alice.type("\x07")
    alice.shows(f">>> draft{CURSOR}")
    alice.type("\x12second" + END + "!\r")
    alice.shows(">>> /second one!", "[Unknown command second, try help.]", HINT, f">>> {CURSOR}")
    alice.type(f"\x12third{CONTROL_C}")
    alice.shows(HINT, f">>> {CURSOR}")


def test_tab_on_an_empty_line_begins_an_answer_to_whoever_has_written_last(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN)
    meet(alice, bob)
    alice.type("\t")
    bob.feed("send alice are you there?\n")
    alice.shows("bob: are you there?", f">>> {CURSOR}")
    alice.type("\tyes\r")
    alice.shows(">>> send bob yes", received("bob"), f">>> {CURSOR}")


def test_a_word_that_is_no_command_is_answered_with_what_may_have_been_meant(chat: Chat, open_window: Open) -> None:
    bob = chat.client("bob")
    alice = open_window(*PLAIN)
    meet(alice, bob)
    alice.type("bob\r")
    alice.shows("[Unknown command bob, try help.]", "[To say something: talk bob, or send bob MESSAGE.]",
                f">>> {CURSOR}")


def test_one_line_goes_to_several_and_each_has_its_receipt(chat: Chat, open_window: Open) -> None:
    bob, carol = chat.clients("bob", "carol")
    alice = open_window(*PLAIN)
    meet(alice, bob)
    meet(alice, carol)
    alice.type("send bob,carol,BOB hello\r")
    bob.see("alice: hello")
    carol.see("alice: hello")
    alice.type("talk carol,bob\r")
    alice.shows(f"to carol,bob> {CURSOR}")
    alice.type("both of you\r")
    for other in (bob, carol):
        other.see("alice: both of you")
    alice.chat.until(lambda: alice.rows.count(received("bob")) == alice.rows.count(received("carol")) == 2, "receipts")
    assert bob.lines.count("alice: hello") == 1
    alice.type("/talk bob,nobody\r")
    alice.shows("[Unknown client nobody.]", f"to carol,bob> {CURSOR}")


def test_lines_of_one_text_stand_below_each_other_and_none_can_be_forged(chat: Chat, open_window: Open) -> None:
    alice = open_window(*PLAIN)
    bob = chat.run("client", "bob", "127.0.0.1", str(chat.port), "0", "--json")
    alice.shows_row(r"\[bob is online\.\]")
    bob.feed('{"send": "alice", "text": "one\\n[Exiting]\\r\\n\\u001b[31mcarol: two"}\n')
    alice.shows("bob: one", "bob| [Exiting]", "bob| \\x1b[31mcarol: two", f">>> {CURSOR}")
    bob.feed(json.dumps({"send": "alice", "text": "\n" * 200}) + "\n")
    alice.shows_row(r"bob\| (\\x0a){2}.*")
    assert alice.rows.count("bob|") == MOST_ROWS - 2


def test_alt_enter_writes_a_message_of_several_lines(chat: Chat, open_window: Open) -> None:
    alice = open_window(*PLAIN)
    bob = chat.start("bob", "--json")
    alice.shows_row(re.escape("[bob is online.]"))
    alice.type("send bob one\x1b\rtwo")
    alice.shows(f">>> send bob one↵two{CURSOR}")
    alice.type("\r")
    alice.shows(">>> send bob one↵two", received("bob"), f">>> {CURSOR}")
    assert json.loads(bob.see_match(r'.*"type": "message".*').group())["text"] == "one\ntwo"


def test_who_comes_and_goes_is_named_but_short_visits_are_not(chat: Chat, open_window: Open) -> None:
    alice = open_window(*PLAIN)
    bob, carol = chat.clients("bob", "carol")
    alice.shows_row(r"\[(bob and carol are|carol is) online\.\]")
    chat.run("send", "alice", "short visit", "--nick", "eve", "--server", f"127.0.0.1:{chat.port}").finish()
    alice.shows("eve: short visit", f">>> {CURSOR}")
    carol.feed("quit\n")
    carol.finish()
    alice.shows("eve: short visit", "[carol is offline.]", f">>> {CURSOR}")
    alice.type("who\r")
    alice.shows_row(r"carol +\S+ +offline since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
    names = [row.split()[0] for row in alice.picture if re.match(r"(alice|bob|carol|eve) +127", row)]
    assert names == ["alice", "bob", "carol", "eve"] and any(row.endswith("online, you") for row in alice.picture)
    assert alice.rows.count(UPDATED) == 1


def test_who_has_been_away_for_a_month_is_shown_to_those_who_ask_for_all(chat: Chat, open_window: Open) -> None:
    box = Mailbox(str(chat.store), b"s" * 16)
    box.note_clock(0.0, time.time() - LONG_AWAY - 1)
    box.add("gone", "127.0.0.1", 1, None, box.uptime(1.0))
    box.tidy()
    assert box.commit(1.0)
    box.close()
    chat.server()
    alice = open_window(*PLAIN)
    alice.type("who\r")
    alice.shows_row(r"\[Away for a month: 1 more, try who all\.\]")
    assert not any(row.startswith("gone") for row in alice.picture)
    alice.type("who all\r")
    alice.shows_row(r"gone +127.0.0.1:1 +offline since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


def test_while_it_connects_a_client_says_where_to_and_has_no_prompt(chat: Chat, open_window: Open) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        alice = open_window(arguments=("client", "alice", "127.0.0.1", str(port)), ready=False)
        alice.shows(f"[Connecting to 127.0.0.1:{port} as alice.]", CURSOR)


def test_a_server_at_a_terminal_says_how_it_ends(chat: Chat, open_window: Open) -> None:
    server = open_window("--store", ":memory:", arguments=("server", "0", "--host", "127.0.0.1"), ready=False)
    server.shows_row(r"\[Ctrl-C ends this server\.\]")
    server.type(CONTROL_C)
    server.ends()
