"""A line editor for a terminal: keys, history, the line being edited, and the screen.

This module knows nothing of chat. What a line means, and what stands above the
prompt, is decided by the owner of the editor, see ``terminal``.

Rules
-----
- No sockets, no clock, no reads and writes of the terminal: bytes come in, and bytes to write go out. Only ``History``
  (its file), ``Tty`` (the settings of the terminal) and ``EditorScreen`` (Ctrl-Z stops the job) touch the world.
- Any bytes may come in, in pieces of any size. Nothing raises, and it makes no difference where the pieces were cut.
- Nothing that is drawn moves the cursor unexpectedly: a control character is drawn as two printable ones.
- It is imported only where there is a terminal, or color, or a table of clients. Patterns are compiled at their first
  use (``re`` caches them).

From keys to lines
------------------
``KeyDecoder`` turns bytes into keys. A run of printable characters is one key, and so is a bracketed paste. What is
unfinished (a character, an escape sequence, a paste) waits for the next bytes. There is no timer, so a lone Escape is
combined with the next key, as in readline.

``Editor`` turns keys into a changed line, and into actions for its owner. The most important one is ``SUBMIT``. A
paste never submits: its newlines stay in the text until somebody presses Enter, and then each of its lines is one line
for the owner. Alt-Enter writes a ``LINE_BREAK``, which parts no lines: it becomes a line end in the one that it is in.

What is drawn
-------------
The *area* is the lowest part of the screen: the notices, and below them the prompt and the text being edited.
Everything above it belongs to the owner. To write there, the owner erases the area (``Screen.erase``), writes whole
lines, and draws the area again (``Screen.draw``), all in one write, so that nothing flickers.

``Layout`` breaks the area into rows. All cursor movements are relative to the row in which the area begins, because
nobody knows where on the screen that is, and no movement depends on the width of a character on which terminals
disagree. Behind such characters the terminal itself puts the cursor: what is before it is written once more.

When a window gets another width, some terminals (xterm) cut or pad their rows: there each row ends with a newline, and
the terminal's own wrapping is off while we write. Others wrap their rows again, maybe before we hear of it: there all
rows of the text are one line that the terminal has wrapped. ``EditorScreen`` puts all of this together.
"""
from __future__ import annotations

import codecs
import enum
import functools
import os
import re
import signal
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from home import RecentLines

EDIT_LIMIT = 128 * 1024          # characters in the line being edited
PASTE_LIMIT = 1024 * 1024        # characters of one paste; the rest is dropped
SEQUENCE_LIMIT = 32              # characters of parameters in an escape sequence; a longer one is dropped
HISTORY_LINES = 1000             # lines that are kept, in memory and when the file is shortened
HISTORY_FILE_LINES = 2000        # lines; an append that makes the file longer than this shortens it
HISTORY_LINE_LIMIT = 64 * 1024   # characters; a longer line is not kept
HISTORY_READ = 4 * 1024 * 1024   # bytes; of a larger file only the end is read
RESIZE_PAUSE = 0.6               # s without a further one: tmux wraps again up to 0.25 s before it tells us
DEFAULT_SIZE = (80, 24)          # columns and rows of a terminal that does not tell its size

LINE_BREAK = "\u2028"            # in the line being edited: a line end in its text (Unicode's LINE SEPARATOR)

PASTE_ON = b"\x1b[?2004h"        # tells the terminal to put PASTE_BEGIN and PASTE_END around what is pasted
PASTE_OFF = b"\x1b[?2004l"

_CONTROL = "\x00-\x1f\x7f-\x9f"  # the control characters (C0, DEL, C1), for use inside of [...] in a pattern


# --- widths ---------------------------------------------------------------------------------------------------

ZERO_WIDTH_JOINER = "\u200d"
SOFT_HYPHEN = "\u00ad"           # Unicode calls it a format character, but terminals show it
EMOJI_SELECTOR = "\ufe0f"        # many terminals make the narrow character before it a wide one
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_FLAG_LETTERS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))     # two of them are the flag of a country


def char_width(c: str) -> int:
    """Return the columns of a printable character: 0 if it joins the one before it, 2 if it is wide, else 1."""
    return 1 if c.isascii() else _looked_up_width(c)


@functools.lru_cache(maxsize=4096)
def _looked_up_width(c: str) -> int:
    joins = unicodedata.category(c) in ("Mn", "Me", "Cf") and c != SOFT_HYPHEN
    if joins or unicodedata.combining(c):
        return 0
    if "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7ff":
        return 0                 # Hangul vowels and finals: they join the initial consonant, which is wide
    return 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1


def text_width(text: str) -> int:
    """Return the columns of a printable text."""
    return len(text) if text.isascii() else sum(map(char_width, text))


# --- colours --------------------------------------------------------------------------------------------------

# Of xterm's 256 colours. Each has a contrast of at least 3:1 to a black and to a white background (WCAG 2).
NAME_COLORS = (131, 166, 136, 64, 29, 31, 33, 62, 134, 162)


def wants_color(when: str, is_terminal: bool, environment: Mapping[str, str]) -> bool:
    """Return whether to use colours; ``when`` is the user's choice: always, never, or auto.

    auto: on a terminal that can show them, unless the user wants none in any program (https://no-color.org).
    """
    if when != "auto":
        return when == "always"
    return is_terminal and environment.get("TERM") != "dumb" and not environment.get("NO_COLOR")


class Style:
    """Colours for texts, or none if not ``enabled``. Styles can be nested: each turns off only what it turned on."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def _styled(self, on: str, text: str, off: str) -> str:
        return f"\x1b[{on}m{text}\x1b[{off}m" if self.enabled and text else text

    def name(self, name: str) -> str:
        """Return ``name`` in its own colour, which is the same in every process."""
        if not self.enabled:
            return name
        import zlib
        color = NAME_COLORS[zlib.crc32(name.encode("utf-8", "replace")) % len(NAME_COLORS)]
        return self._styled(f"38;5;{color}", name, "39")

    def error(self, text: str) -> str:
        """Return ``text`` in red."""
        return self._styled("31", text, "39")

    def dim(self, text: str) -> str:
        """Return ``text`` with less brightness."""
        return self._styled("2", text, "22")


# --- keys -----------------------------------------------------------------------------------------------------

class Key(NamedTuple):
    """A key that was pressed, by its name in the tables below.

    Two keys carry a ``text``: ``text``, a run of printable characters, and ``paste``, which may contain anything.
    """

    name: str
    text: str = ""


CONTROL_KEYS = {
    "\x01": "home", "\x02": "left", "\x03": "interrupt", "\x04": "end-of-input", "\x05": "end", "\x06": "right",
    "\x07": "abort", "\x08": "backspace", "\t": "tab", "\n": "enter", "\x0b": "kill-end", "\x0c": "clear",
    "\r": "enter", "\x0e": "down", "\x10": "up", "\x12": "search", "\x15": "kill-start", "\x17": "kill-word",
    "\x19": "yank", "\x1a": "suspend", "\x7f": "backspace",
}
PASTE_BEGIN, PASTE_END = "[200~", "\x1b[201~"
SEQUENCES = {                    # what follows the Escape
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "[H": "home", "[F": "end",
    "OA": "up", "OB": "down", "OC": "right", "OD": "left", "OH": "home", "OF": "end", "OM": "enter",
    "[1~": "home", "[4~": "end", "[7~": "home", "[8~": "end", "[3~": "delete", "[Z": "back-tab",
    "b": "word-left", "f": "word-right", "d": "kill-next-word", "\x7f": "kill-last-word", "\x08": "kill-last-word",
    "[5D": "word-left", "[5C": "word-right", "Od": "word-left", "Oc": "word-right",     # rxvt and similar ones
    "\r": "line-break", "\n": "line-break", "[13;3u": "line-break", "[27;3;13~": "line-break",     # Alt-Enter
    "[3;3~": "kill-next-word", "[3;5~": "kill-next-word", PASTE_BEGIN: "paste",
}
for _modifier in "3", "5", "7":  # Alt, Ctrl, both
    SEQUENCES[f"[1;{_modifier}D"] = "word-left"
    SEQUENCES[f"[1;{_modifier}C"] = "word-right"

_PRINTABLE = f"[^{_CONTROL}]+"
# An escape sequence (ECMA-48) up to its last character; "[[" is how Linux begins those of F1 to F5.
_PARAMETERS = rf"\x1b(?:\[\[?[ -?]{{0,{SEQUENCE_LIMIT}}}|O[0-9;]{{0,{SEQUENCE_LIMIT}}})"
_SEQUENCE = rf"{_PARAMETERS}[@-Z\\-~]|\x1b(?:[^{_CONTROL}\[O]|[\x08\n\r\x7f])"      # the second kind: Alt and a key
_BEGINNING = rf"{_PARAMETERS}|\x1b"


class KeyDecoder:
    """Turns bytes from a terminal into keys.

    A read may end anywhere: inside a UTF-8 character, an escape sequence, or the mark that ends a paste. What is
    unfinished waits for the next ``feed``. Other programs wait some milliseconds and then take a lone Escape as a key.
    We have no use for that key, and over a slow link such a timer breaks arrow keys apart.

    Unknown sequences are dropped as a whole, so that no remains of them get into the text. The key ``paste-too-long``
    says that a paste had more than ``PASTE_LIMIT`` characters.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unfinished = ""                # the beginning of a sequence or of PASTE_END
        self._paste: str | None = None       # what has come of a paste; one character more shows that it is too long

    def feed(self, data: bytes) -> list[Key]:
        """Return the keys that ``data`` completes."""
        text = self._unfinished + self._decoder.decode(data)
        self._unfinished = ""
        keys: list[Key] = []
        position = 0
        while position < len(text):
            if self._paste is None:
                position = self._read_key(text, position, keys)
            else:
                position = self._read_paste(self._paste, text, position, keys)
        return keys

    def _read_key(self, text: str, position: int, keys: list[Key]) -> int:
        """Append the key at ``position`` to ``keys``. Return the position of the next one."""
        run = re.compile(_PRINTABLE).match(text, position)
        if run is not None:
            keys.append(Key("text", run.group()))
            return run.end()
        if text[position] == "\x1b":
            return self._read_sequence(text, position, keys)
        name = CONTROL_KEYS.get(text[position])
        if name is not None:
            keys.append(Key(name))
        return position + 1

    def _read_sequence(self, text: str, position: int, keys: list[Key]) -> int:
        whole = re.compile(_SEQUENCE).match(text, position)
        if whole is None:
            return self._skip_beginning(text, position)
        name = SEQUENCES.get(whole.group()[1:])
        if name == "paste":
            self._paste = ""
        elif name is not None:
            keys.append(Key(name))
        return whole.end()

    def _skip_beginning(self, text: str, position: int) -> int:
        """Pass over a sequence that is not whole; return the position behind it.

        Either the text ends here, and the rest of the sequence is still to come. Or a character follows that cannot
        be part of a sequence: then the sequence is dropped, but not that character. Escape and Ctrl-C is a Ctrl-C.
        """
        beginning = re.compile(_BEGINNING).match(text, position)
        assert beginning is not None         # it matches every Escape
        if beginning.end() == len(text):
            self._unfinished = text[position:]
        return beginning.end()

    def _read_paste(self, paste: str, text: str, position: int, keys: list[Key]) -> int:
        """Add the text from ``position`` on to ``paste``, up to PASTE_END. Return the position behind that.

        Escape sequences and control characters mean nothing inside a paste: nobody pressed them as keys.
        """
        mark = text.find(PASTE_END, position)
        end = mark if mark >= 0 else len(text) - _partial_mark(text, PASTE_END, position)
        paste = (paste + text[position:end])[:PASTE_LIMIT + 1]
        if mark < 0:
            self._paste, self._unfinished = paste, text[end:]
            return len(text)
        self._paste = None
        keys.append(Key("paste", paste[:PASTE_LIMIT]))
        if len(paste) > PASTE_LIMIT:
            keys.append(Key("paste-too-long"))
        return end + len(PASTE_END)


def _partial_mark(text: str, mark: str, start: int) -> int:
    """Return how many characters at the end of ``text``, from ``start`` on, may be the beginning of ``mark``."""
    for count in range(min(len(mark) - 1, len(text) - start), 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0


# --- history --------------------------------------------------------------------------------------------------

class History:
    """The lines that were entered, oldest first: in memory and, if there is a ``path``, in a ``RecentLines``.

    After the first failed access to the file, the history is in memory only.
    """

    def __init__(self, path: str | None) -> None:
        self._lines: list[str] = []
        self._draft = ""             # what was typed when the browsing began
        self._file = None
        if path is not None:
            self._file = RecentLines(path, HISTORY_LINES, HISTORY_FILE_LINES, HISTORY_READ, _is_kept)
            try:
                self._lines = self._file.load()
                self._file.tidy()
            except OSError:
                self._file = None
        self._position = len(self._lines)    # of the line that is shown; behind the last one: nobody is browsing

    @property
    def browsing(self) -> bool:
        """Whether an older line is shown."""
        return self._position < len(self._lines)

    def previous(self, current: str) -> str:
        """Return the line before the one that is shown, or ``current``, the text being edited, if there is none."""
        if not self.browsing:
            self._draft = current
        if self._position == 0:
            return current
        self._position -= 1
        return self._lines[self._position]

    def next(self) -> str:
        """Return the line after the one that is shown; after the last one, what was typed before the browsing."""
        self._position = min(self._position + 1, len(self._lines))
        return self._lines[self._position] if self.browsing else self._draft

    def find(self, wanted: str, end: int) -> int | None:
        """Return the place of the newest line before the place ``end`` that has a text in it, in any case, or None."""
        places, text = reversed(range(min(end, len(self._lines)))), wanted.lower()
        return next((place for place in places if text in self._lines[place].lower()), None)

    def line(self, place: int) -> str:
        """Return the line at a place that was found."""
        return self._lines[place]

    def browse(self, place: int, current: str) -> None:
        """Go on browsing from a place that was found; ``current``: the text that was edited before."""
        if place < len(self._lines):
            if not self.browsing:
                self._draft = current
            self._position = place

    def stop_browsing(self) -> None:
        """Begin again at the end: what is typed next is a new line."""
        self._position = len(self._lines)
        self._draft = ""

    def add(self, *lines: str) -> None:
        """Keep lines, except blank and very long ones, and those that equal the line before them.

        Control characters are left out, tabs become blanks.
        """
        old_count = len(self._lines)
        for line in lines:
            kept = re.sub(f"[{_CONTROL}]+", "", line.replace("\t", " "))
            if kept.strip() and len(kept) <= HISTORY_LINE_LIMIT and self._lines[-1:] != [kept]:
                self._lines.append(kept)
        added = self._lines[old_count:][-HISTORY_LINES:]
        del self._lines[:-HISTORY_LINES]
        self.stop_browsing()
        if added and self._file is not None:
            try:
                self._file.append(added)
            except OSError:
                self._file = None


def _is_kept(line: str) -> bool:
    return bool(line.strip()) and len(line) <= HISTORY_LINE_LIMIT and not re.search(f"[{_CONTROL}]", line)


# --- places in a text -----------------------------------------------------------------------------------------
#
# A *unit* is what people see as one character. Keys pass and delete whole units, for half of one would be an accent
# that joins something else. It is a character with those of width 0 (accents, variation selectors) and skin tones
# behind it, several with zero width joiners between them, as in the emoji of a family, or the two letters of a flag.
# Unicode's grapheme clusters (UAX #29) are more exact, but need tables that Python does not have.

def _joins(text: str, start: int, index: int) -> bool:
    """Return whether the character at ``index`` belongs to the unit from ``start`` on, as all between them do."""
    if text[index - 1] == ZERO_WIDTH_JOINER or char_width(text[index]) == 0 or text[index] in _SKIN_TONES:
        return True
    return index == start + 1 and text[start] in _FLAG_LETTERS and text[index] in _FLAG_LETTERS


def _end_of_unit(text: str, start: int) -> int:
    """Return where the unit that begins at ``start`` ends."""
    index = start + 1
    while index < len(text) and _joins(text, start, index):
        index += 1
    return index


def _unit_start(text: str, index: int) -> int:
    """Return ``index``, or if it is inside a unit, where that begins."""
    start = index
    while 0 < start < len(text) and _joins(text, start - 1, start):
        start -= 1               # in a row of flags, to its first letter: only from there on they can be told apart
    while start < index and (end := _end_of_unit(text, start)) <= index:
        start = end
    return start


def _unit_end(text: str, index: int) -> int:
    """Return ``index``, or if it is inside a unit, where that ends."""
    start = _unit_start(text, index)
    return index if start == index else _end_of_unit(text, start)


def previous_unit(text: str, cursor: int) -> int:
    """Return where the unit before ``cursor`` begins."""
    return _unit_start(text, max(cursor - 1, 0))


def next_unit(text: str, cursor: int) -> int:
    """Return where the unit at ``cursor`` ends."""
    return _unit_end(text, min(cursor + 1, len(text)))


def _is_in_word(c: str) -> bool:
    return c.isalnum() or char_width(c) == 0


def word_start(text: str, cursor: int, belongs: Callable[[str], bool] = _is_in_word) -> int:
    """Return where the word before ``cursor`` begins: a run of letters and digits, or of what ``belongs`` to it."""
    while cursor > 0 and not belongs(text[cursor - 1]):
        cursor -= 1
    while cursor > 0 and belongs(text[cursor - 1]):
        cursor -= 1
    return _unit_start(text, cursor)


def word_end(text: str, cursor: int) -> int:
    """Return where the word at or after ``cursor`` ends."""
    while cursor < len(text) and not _is_in_word(text[cursor]):
        cursor += 1
    while cursor < len(text) and _is_in_word(text[cursor]):
        cursor += 1
    return _unit_end(text, cursor)


# Keys that move the cursor to a place, delete up to a place, or kill up to it: delete, and keep that for ``yank``.
MOVES: dict[str, Callable[[str, int], int]] = {
    "left": previous_unit, "right": next_unit, "word-left": word_start, "word-right": word_end,
    "home": lambda text, cursor: 0, "end": lambda text, cursor: len(text),
}
DELETIONS = {"backspace": previous_unit, "delete": next_unit}
KILLS: dict[str, Callable[[str, int], int]] = {
    "kill-start": MOVES["home"], "kill-end": MOVES["end"], "kill-last-word": word_start, "kill-next-word": word_end,
    "kill-word": lambda text, cursor: word_start(text, cursor, lambda c: not c.isspace()),
}


# --- the line being edited ------------------------------------------------------------------------------------

class ActionKind(enum.Enum):
    """What the owner of an editor has to do."""

    SUBMIT = "submit"                    # Enter: process the lines
    INTERRUPT = "interrupt"              # Ctrl-C on an empty line
    END_OF_INPUT = "end-of-input"        # Ctrl-D on an empty line
    SUSPEND = "suspend"                  # Ctrl-Z
    CLEAR_SCREEN = "clear-screen"        # Ctrl-L
    BELL = "bell"                        # a key had no effect (no candidate), or only a part of it (no room)


class Action(NamedTuple):
    """Something that the owner of an editor has to do.

    ``lines`` are the lines of a SUBMIT; each may have line ends in it, which were typed. ``pasted``: those after the
    first are exactly as they were pasted, with nothing put before them.
    """

    kind: ActionKind
    lines: Sequence[str] = ()
    pasted: bool = False


# Accepts the text before the cursor. Returns where the word at its end begins, and the words that can replace it, the
# best one first.
Complete = Callable[[str], tuple[int, list[str]]]


class _Completion(NamedTuple):
    """A word in the text, from ``start`` to ``end``, that each Tab replaces by the next one of the ``candidates``."""

    start: int
    end: int
    candidates: list[str]
    chosen: int                          # the index of the candidate in the text, modulo their number


NEWEST = 2 ** 31          # a place in the history behind all lines
GIVE_UP = frozenset({"abort", "interrupt", "end-of-input"})     # keys that end a search, and restore what was before it


class Search:
    """Looking for a line that was entered before: Ctrl-R begins it, or goes to an older one that fits, too.

    What is typed is looked for, in any case; Backspace takes back a character of it; Ctrl-G, Ctrl-C and Ctrl-D give up.
    Every other key ends it, and does what it does to the line that was found. Where none was, it only gives up.
    """

    def __init__(self, text: str, cursor: int) -> None:
        """``text``, ``cursor``: what is restored when it is given up."""
        self.wanted = ""
        self.place = NEWEST         # in the history, of the line that is shown
        self.has_failed = False     # no line has what is wanted: the one that is shown was found before
        self.before = text, cursor

    @property
    def prompt(self) -> str:
        """What stands before the line that was found."""
        return f"no line has '{self.wanted}': " if self.has_failed else f"search '{self.wanted}': "


class Editor:
    """The line being edited: its ``text``, and the ``cursor``, which is an index into the text.

    Tab replaces the word before the cursor by the first candidate that ``complete`` returns, each further Tab by the
    next one.

    A *block* is a paste of several lines. If it was pasted behind something that the regular expression
    ``block_prefix`` matches, this beginning of the first line is repeated before each of the other lines. It should
    match few characters only, because a block can have tens of thousands of lines.

    Other blocks are submitted as they are. The owner may treat their lines as mere text. So those that begin with
    ``command_mark`` are not kept in the history: on its own, such a line would be a command.
    """

    def __init__(self, history: History, complete: Complete, block_prefix: str, command_mark: str) -> None:
        self.text = ""
        self.cursor = 0
        self._history = history
        self._complete = complete
        self._block_prefix = block_prefix
        self._command_mark = command_mark
        self._decoder = KeyDecoder()
        self._killed = ""                    # what ``yank`` inserts
        self._completion: _Completion | None = None
        self.search: Search | None = None    # that goes on
        self._block_has_prefix = False       # the block in the text was pasted behind a ``block_prefix``
        self._draft_has_prefix = False       # the same for the text that waits while older lines are shown
        self._commands: dict[str, Callable[[], Action | None]] = {
            "up": self._show_older,
            "down": self._show_newer,
            "yank": lambda: self._insert(self._killed),
            "search": self._begin_search,
            "abort": lambda: None,
            "tab": lambda: self._complete_word(1),
            "back-tab": lambda: self._complete_word(-1),
            "line-break": lambda: self._insert(LINE_BREAK),
            "enter": self._submit,
            "interrupt": self._interrupt,
            "end-of-input": self._end_of_input,
            "suspend": lambda: Action(ActionKind.SUSPEND),
            "clear": lambda: Action(ActionKind.CLEAR_SCREEN),
            "paste-too-long": lambda: Action(ActionKind.BELL),
        }

    def feed(self, data: bytes) -> list[Action]:
        """Accept bytes that were typed. Return what the owner has to do, in this order."""
        actions = []
        for key in self._decoder.feed(data):
            if key.name not in ("tab", "back-tab"):
                self._completion = None
            action = self._press(key)
            if action is not None:
                actions.append(action)
        return actions

    def _press(self, key: Key) -> Action | None:
        name = key.name
        if self.search is not None:
            if name in ("text", "search", "backspace") or (name == "paste" and "\n" not in _clean_paste(key.text)):
                return self._go_on(self.search, name, _clean_paste(key.text))
            if name in GIVE_UP or self.search.has_failed:
                return self._give_up(self.search)
            self._history.browse(self.search.place, self.search.before[0])
            self.search = None
        if name == "text":
            return self._insert(key.text)
        if name == "paste":
            return self._insert(_clean_paste(key.text))
        if name in MOVES:
            self.cursor = MOVES[name](self.text, self.cursor)
        elif name in DELETIONS:
            self._delete_to(DELETIONS[name](self.text, self.cursor))
        elif name in KILLS:
            self._kill_to(KILLS[name](self.text, self.cursor))
        else:
            return self._commands[name]()
        return None

    def _replace(self, start: int, end: int, piece: str) -> None:
        self.text = self.text[:start] + piece + self.text[end:]
        self.cursor = start + len(piece)

    def _insert(self, text: str) -> Action | None:
        piece = text[:EDIT_LIMIT - len(self.text)]
        if "\n" in piece and "\n" not in self.text:
            # The text becomes a block now. What was typed before it decides how it is submitted. Later nobody can
            # tell any more: a pasted block may itself begin with a prefix, which is then only for its first line.
            self._block_has_prefix = re.match(self._block_prefix, self.text[:self.cursor]) is not None
        self._replace(self.cursor, self.cursor, piece)
        return Action(ActionKind.BELL) if len(piece) < len(text) else None

    def _delete_to(self, place: int) -> None:
        self._replace(min(place, self.cursor), max(place, self.cursor), "")

    def _kill_to(self, place: int) -> None:
        killed = self.text[min(place, self.cursor):max(place, self.cursor)]
        if killed:
            self._killed = killed
        self._delete_to(place)

    def _show(self, text: str) -> None:
        self.text = text
        self.cursor = len(text)

    def _show_older(self) -> None:
        if not self._history.browsing:
            self._draft_has_prefix = self._block_has_prefix
        self._show(self._history.previous(self.text))

    def _show_newer(self) -> None:
        if self._history.browsing:
            self._show(self._history.next())
            self._block_has_prefix = self._draft_has_prefix

    def _begin_search(self) -> None:
        self.search = Search(self.text, self.cursor)

    def _go_on(self, search: Search, name: str, text: str) -> Action | None:
        """Look for something else, or for an older line."""
        wanted, end = search.wanted + text, search.place + 1
        if name == "backspace":
            wanted, end = wanted[:previous_unit(wanted, len(wanted))], NEWEST
        elif name == "search":
            end = search.place
        place = self._history.find(wanted, end) if wanted else None
        if name == "search" and place is None:
            return Action(ActionKind.BELL)
        search.wanted, search.has_failed = wanted, place is None and wanted != ""
        if place is not None:
            search.place = place
            self._show(self._history.line(place))
            self.cursor = min(max(0, self.text.lower().find(wanted.lower())), len(self.text))
        elif not wanted:
            search.place = NEWEST
            self.text, self.cursor = search.before
        return Action(ActionKind.BELL) if search.has_failed else None

    def _give_up(self, search: Search) -> Action | None:
        self.search = None
        self.text, self.cursor = search.before
        return Action(ActionKind.BELL) if search.has_failed else None

    def _complete_word(self, step: int) -> Action | None:
        if self._completion is None:
            start, candidates = self._complete(self.text[:self.cursor])
            end = self.cursor
            chosen = 0 if step > 0 else -1
        else:
            start, end, candidates, chosen = self._completion
            chosen += step
        if not candidates:
            return Action(ActionKind.BELL)
        word = candidates[chosen % len(candidates)] + " "
        if len(self.text) - (end - start) + len(word) > EDIT_LIMIT:
            return Action(ActionKind.BELL)
        self._replace(start, end, word)
        self._completion = _Completion(start, self.cursor, candidates, chosen)
        return None

    def _submit(self) -> Action:
        lines = self.text.split("\n")
        # The prefix is looked for again: the user may have changed it (to another name, say) after the paste.
        prefix = re.match(self._block_prefix, lines[0]) if self._block_has_prefix else None
        if prefix is not None:
            lines[1:] = [prefix.group() + line for line in lines[1:]]
        pasted = len(lines) > 1 and prefix is None
        kept = lines
        if pasted:
            kept = lines[:1] + [line for line in lines[1:] if not line.startswith(self._command_mark)]
        self._history.add(*kept)
        self._clear()
        return Action(ActionKind.SUBMIT, [line.replace(LINE_BREAK, "\n") for line in lines], pasted)

    def _clear(self) -> None:
        self._show("")
        self._block_has_prefix = False
        self._history.stop_browsing()

    def _interrupt(self) -> Action | None:
        was_empty = not self.text
        self._clear()
        return Action(ActionKind.INTERRUPT) if was_empty else None

    def _end_of_input(self) -> Action | None:
        if not self.text:
            return Action(ActionKind.END_OF_INPUT)
        self._delete_to(next_unit(self.text, self.cursor))
        return None


def _clean_paste(paste: str) -> str:
    """Return the text of a paste: newlines at the ends of lines, and no other control characters but tabs.

    A terminal sends a pasted newline as CR, as if it was the Enter key. The last newline is left out: a line that was
    copied as a whole has one, and behind it there is no further, empty line to submit.
    """
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]+", "", re.sub("\r\n?", "\n", paste))
    return text[:-1] if text.endswith("\n") else text


# --- the screen -----------------------------------------------------------------------------------------------

_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_ROW, _ERASE_BELOW = "\x1b[K", "\x1b[J"       # from the cursor on
_ERASE_AREA = f"{_ERASE_ROW}\x1b[C{_ERASE_BELOW}\r"   # in two steps: tmux keeps a screen that is erased as a whole
_CLEAR = "\x1b[H\x1b[2J"
_UP, _RIGHT, _NEWLINE = "A", "C", "\r\n"
_PLAIN = "[ -~]+(?![^ -~])"      # what follows may join the last one
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_DRAWN_AS = {"\t": (" ", 1), **dict.fromkeys("\n\u2028\u2029", ("↵", 1)), **dict.fromkeys(_DIRECTIONS, ("", 0))}


@functools.lru_cache(maxsize=4096)
def _drawn_as(c: str) -> tuple[str, int]:
    """Return what is drawn for a character, and its width. Marks that turn the direction of a row are not drawn."""
    if c in _DRAWN_AS:
        return _DRAWN_AS[c]
    if c < " " or c == "\x7f":
        return "^" + chr(ord(c) ^ 0x40), 2
    if "\x80" <= c <= "\x9f":
        return "~" + chr(ord(c) - 0x40), 2
    return c, 2 if c in _FLAG_LETTERS else char_width(c)


class Layout:
    """Text in ``rows`` of at most ``columns``, even if each unit is drawn as wide as any terminal does; ``widths``."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self.widths = [0]

    def add(self, text: str) -> None:
        """Append ``text``."""
        plain, position = re.compile(_PLAIN), 0
        while position < len(text):
            room = self.columns - self.widths[-1] or self.columns
            run = plain.match(text, position, position + room + 1)
            if run is not None:
                end = min(run.end(), position + room)
                self._add_one(text[position:end], end - position)
            else:
                end = _end_of_unit(text, position)
                for drawn, width in self._pieces(text[position:end]):
                    self._add_one(drawn, width)
            position = end

    def place(self, unit: str) -> tuple[int, str]:
        """Return the row where ``unit`` would begin, or the end of the text if it is empty, and what is before it."""
        width = max(1, self._pieces(unit)[0][1]) if unit else 1
        if self._is_full_for(width):
            return len(self.rows), ""
        return len(self.rows) - 1, self.rows[-1]

    def _pieces(self, unit: str) -> list[tuple[str, int]]:
        """Return what is drawn for a unit, and the columns, in one piece if there is room for it in a row."""
        pieces = [_drawn_as(c) for c in unit]
        width = sum(width for _, width in pieces) + unit.count(EMOJI_SELECTOR)
        return pieces if width > self.columns else [("".join(drawn for drawn, _ in pieces), width)]

    def new_row(self) -> None:
        """Begin a row."""
        self.rows.append("")
        self.widths.append(0)

    def _is_full_for(self, width: int) -> bool:
        return self.widths[-1] + min(width, self.columns) > self.columns

    def _add_one(self, drawn: str, width: int) -> None:
        if width == 0 and self.widths[-1] == 0:
            return                       # an accent with nothing to join: a terminal may join it to the row above
        if width > self.columns:
            drawn, width = "?", 1
        if self._is_full_for(width):
            self.new_row()
        self.rows[-1] += drawn
        self.widths[-1] += width


def cut(text: str, columns: int) -> tuple[str, int]:
    """Return ``text`` in one row, with an ellipsis where it is cut, and the width of the row."""
    layout = Layout(columns)
    layout.add(text)
    if len(layout.rows) > 1 and columns > 1:
        layout = Layout(columns - 1)
        layout.add(text)
        return layout.rows[0] + "…", layout.widths[0] + 1
    return layout.rows[0], layout.widths[0]


def _move(direction: str, count: int) -> str:
    return f"\x1b[{count}{direction}" if count > 0 else ""


def _wrapped(text: str, columns: int) -> tuple[int, int]:
    """Return how many rows most terminals would wrap ``text`` into, and the columns used in the last one."""
    rows, used = 1, 0
    for before, c in zip(" " + text, text):
        width = 0 if before == ZERO_WIDTH_JOINER else char_width(c)
        if used + width > columns:
            rows, used = rows + 1, 0
        used += width
    return rows, used


class Area(NamedTuple):
    """The area at the bottom of the screen, and where in it the cursor is."""

    rows: list[str]
    ends: list[str]                      # what is written behind each
    notices: int                         # the number of rows that are notices
    cursor_row: int
    before_cursor: str                   # what is drawn before it in its row

    def to_first_row(self) -> str:
        """Return what moves the cursor to where the area begins."""
        return "\r" + _move(_UP, self.cursor_row)

    def to_text(self, columns: int) -> str:
        """Return what moves the cursor back to where the text begins, in a terminal whose backspace goes that far."""
        below = self.cursor_row - self.notices
        is_next = below > 0 and self.ends[self.cursor_row - 1] == _NEWLINE     # in the empty row behind a full one
        return _move(_UP, int(is_next)) + "\b" * ((below + 1) * columns)

    def wrapped_again(self, before: int, now: int) -> Area:
        """Return the area as a terminal that got ``now`` columns makes it, as far as its ``cursor_row`` tells."""
        above, line = 0, ""
        for row, end in zip(self.rows[:self.cursor_row], self.ends):
            if end == _NEWLINE:
                above, line = above + _wrapped(line + row, now)[0], ""
            else:
                line += row + " " * (before - _wrapped(row, before)[1])
        row = self.rows[self.cursor_row]
        line += row[:_end_of_unit(row, len(self.before_cursor))]     # what the cursor is on is in the same row
        return self._replace(cursor_row=above + _wrapped(line, now)[0] - 1)


class Screen:
    """Draws the area at the bottom of a terminal of ``columns`` and ``rows``. The others: see ``Tty``.

    The area has at most one row less than the terminal, so that the last message stays in sight. If there is not
    enough room, the first notices are left out. Of a text that is still too high, the rows around the cursor are drawn.
    """

    def __init__(self, columns: int, rows: int, style: Style = Style(False), wraps_again: bool = False,
                 goes_back: bool = False) -> None:
        self._columns = max(1, columns)
        self._max_rows = max(1, rows - 1)
        self._style = style
        self._wraps_again, self._goes_back = wraps_again, goes_back
        self._drawn: Area | None = None  # as it is on the screen
        self._drawn_from: object = None  # the arguments of ``draw`` that led to it
        self._next_size: tuple[int, int] | None = None      # that the terminal has, and the area not yet

    def draw(self, notices: Sequence[str], prompt: str, text: str, cursor: int) -> bytes:
        """Return what draws the area; b"" if nothing has changed.

        It is drawn over the area that is on the screen, or else from the row of the cursor on.
        """
        arguments = tuple(notices), prompt, text, cursor
        if self._drawn is not None and arguments == self._drawn_from:
            return b""
        erased = self.resize(*self._next_size) if self._next_size is not None else b""
        area = self._lay_out(notices, prompt, text, cursor)
        if area == self._drawn:
            return b""
        data = erased + self._encode(area)
        self._drawn, self._drawn_from = area, arguments
        return data

    def erase(self) -> bytes:
        """Return what erases the area and puts the cursor where it began; b"" if there is no area."""
        if self._next_size is not None:
            return self.resize(*self._next_size)
        if self._drawn is None:
            return b""
        erased = self._drawn.to_first_row() + _ERASE_AREA
        self.forget()
        return erased.encode()

    def resize_later(self, columns: int, rows: int) -> None:
        """Set a new size of the terminal as soon as there is anything else to draw or to erase, or at ``resize``."""
        self._next_size = columns, rows

    def resize(self, columns: int, rows: int) -> bytes:
        """Set a new size of the terminal. Return what erases the area, which is to be drawn again."""
        back, drawn, self._next_size = "", self._drawn, None
        if self._wraps_again and drawn is not None:
            if self._goes_back and drawn.cursor_row >= drawn.notices:
                back = drawn.to_text(self._columns)
                drawn = drawn._replace(cursor_row=drawn.notices, before_cursor="")
            self._drawn = drawn.wrapped_again(self._columns, max(1, columns))
        self._columns = max(1, columns)
        erased = back.encode() + self.erase()
        self._max_rows = max(1, rows - 1)
        return erased

    def clear_screen(self) -> bytes:
        """Return what erases the whole screen and puts the cursor into its first row."""
        return self.erase() + _CLEAR.encode()

    def erase_cursor_row(self) -> bytes:
        """Return what erases the row of the cursor and all below: another program has moved the cursor meanwhile."""
        self.forget()
        return ("\r" + _ERASE_BELOW).encode()

    def forget(self) -> None:
        """Note that the area is not on the screen any more, or no longer where we think."""
        self._drawn = self._drawn_from = None

    @property
    def _joins_rows(self) -> bool:
        return self._wraps_again and self._columns > 1

    def _lay_out(self, notices: Sequence[str], prompt: str, text: str, cursor: int) -> Area:
        text = prompt + text
        cursor = _unit_end(text, len(prompt) + cursor)      # what was just typed may have joined what follows
        # Who joins rows needs to know where they end: one column stays free of what may be narrower than we think.
        layout = Layout(self._columns - (self._joins_rows and not text.isascii()))
        layout.add(text[:cursor])
        row, before = layout.place(text[cursor:_end_of_unit(text, cursor)])
        layout.add(text[cursor:])
        if row == len(layout.rows):
            layout.new_row()             # the text fills its last row: the cursor is at the start of the next one
        top = max(0, min(row - self._max_rows // 2, len(layout.rows) - self._max_rows))
        edited = layout.rows[top:top + self._max_rows]
        room = self._max_rows - len(edited)
        shown = [cut(notice, self._columns - self._joins_rows)[0] for notice in notices[max(0, len(notices) - room):]]
        ends = [_NEWLINE] * len(shown) + [self._end(row, after) for row, after in zip(edited, edited[1:])] + [""]
        return Area(shown + edited, ends, len(shown), len(shown) + row - top, before)

    def _end(self, row: str, after: str) -> str:
        """Return what leads to the row ``after``. A terminal joins rows again if it went on by itself: one was full."""
        if not (self._joins_rows and after):
            return _NEWLINE
        return "" if self._is_full(row) else f"\x1b[{self._columns}G "

    def _row(self, text: str, is_notice: bool) -> str:
        """Return what draws a row, and erases what was there before."""
        drawn = self._style.dim(text) if is_notice else text
        if not (self._joins_rows or text.isascii()):
            return _ERASE_ROW + drawn    # only the terminal knows whether it is full
        # Behind a full row the cursor still stands on its last character, which would be erased with the rest.
        return drawn if self._is_full(text) else drawn + _ERASE_ROW

    def _is_full(self, row: str) -> bool:
        return len(row) == self._columns and row.isascii()

    def _encode(self, area: Area) -> bytes:
        """Return what draws ``area`` and puts the cursor into its place.

        The terminal's wrapping is off while the rows are written: a row that the terminal finds wider than we do loses
        some columns, but it stays one row. Behind the text the cursor is where the terminal has put it. Elsewhere its
        column is counted only in ASCII.
        """
        rows = [self._row(text, number < area.notices) for number, text in enumerate(area.rows)]
        rows_below = len(rows) - 1 - area.cursor_row
        if self._drawn is None:
            start = "\r" + _ERASE_BELOW
        else:
            start = self._drawn.to_first_row()
            if len(rows) < len(self._drawn.rows):
                rows[-1] += _NEWLINE + _ERASE_BELOW       # in a row that is on the screen already: nothing scrolls
                rows_below += 1
        to_cursor, before = "", area.before_cursor
        if rows_below or before != area.rows[-1]:
            to_cursor = "\r" + _move(_UP, rows_below) + (_move(_RIGHT, len(before)) if before.isascii() else before)
        drawn = start + "".join(row + end for row, end in zip(rows, area.ends)) + to_cursor
        return (drawn if self._wraps_again else _WRAP_OFF + drawn + _WRAP_ON).encode("utf-8", "replace")


# --- the terminal's settings ----------------------------------------------------------------------------------

def wraps_again(environment: Mapping[str, str]) -> bool:
    """Return whether the terminal is known to wrap its rows again when its width changes.

    No terminal can be asked, so what it leaves in the environment has to do. In doubt the answer is no: then a part of
    a half-typed line may stay on the screen, but no message is erased. GNU screen (STY) does not wrap, nor does xterm.
    """
    def has(*names: str) -> bool:
        return any(environment.get(name) for name in names)

    term = environment.get("TERM", "")
    if term.startswith(("screen", "tmux")):
        return has("TMUX") and not has("STY")
    if term.startswith(("alacritty", "contour", "foot", "ghostty", "rxvt-unicode", "wezterm", "xterm-ghostty",
                        "xterm-kitty")):
        return True
    if not term.startswith("xterm") or has("INSIDE_EMACS", "STY", "TMUX", "XTERM_VERSION"):
        return False
    return has("ALACRITTY_WINDOW_ID", "KONSOLE_VERSION", "VTE_VERSION", "WEZTERM_PANE", "WT_SESSION") or (
        environment.get("TERM_PROGRAM") in ("Apple_Terminal", "WezTerm", "ghostty", "iTerm.app", "vscode"))


class Tty:
    """The terminal as a device: its settings while somebody edits a line on it, its size, and whose job it is.

    Nothing here raises, blocks, or stops the process. A terminal that has hung up, and a descriptor that is no
    terminal, have no settings: then nothing happens.

    A shell gives the terminal to one job at a time. One in the background (started with ``&``, or continued by ``bg``)
    must not edit there: it would draw over what the foreground job shows. So ask ``is_background`` first. But the shell
    can still take the terminal away before the settings are changed, and that must not stop the process: see ``_set``.
    """

    def __init__(self, fd_in: int, fd_out: int, wraps_again: bool = False, goes_back: bool = False) -> None:
        """``wraps_again``: the terminal does that with its rows when its width changes. ``goes_back``: a backspace
        leads from a row to the one before, if the terminal has wrapped that (tmux)."""
        self.wraps_again, self.goes_back = wraps_again, goes_back
        self._fd_in = fd_in
        self._fd_out = fd_out
        self._saved: list[Any] | None = None         # the settings to give back, see ``termios.tcgetattr``

    def enter_raw_mode(self) -> None:
        """Make each key come as bytes, at once, without being shown.

        Ctrl-C and Ctrl-Z are bytes, too, and no signals. Ctrl-S and Ctrl-Q still stop and continue the output.
        """
        import termios
        if self._saved is not None:
            return
        try:
            saved = termios.tcgetattr(self._fd_in)
        except (termios.error, OSError):
            return
        self._saved = saved
        iflag, oflag, cflag, lflag, ispeed, ospeed, characters = saved
        characters = list(characters)
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        lflag &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
        self._set([iflag & ~termios.ICRNL, oflag, cflag, lflag, ispeed, ospeed, characters])

    def leave_raw_mode(self) -> None:
        """Give the terminal the settings that it had before."""
        if self._saved is not None:
            self._set(self._saved)
            self._saved = None

    def _set(self, attributes: list[Any]) -> None:
        """Change the settings at once, also in the background.

        At once, because to wait until all output is drained takes forever on a terminal that Ctrl-S has stopped. The
        kernel stops a background process that changes settings, by SIGTTOU; if the signal is blocked, it does not.
        """
        import termios
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            termios.tcsetattr(self._fd_in, termios.TCSANOW, attributes)
        except (termios.error, OSError):
            pass                         # the terminal has hung up, and its settings are gone with it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def is_background(self) -> bool:
        """Return whether the terminal belongs to another job at the moment."""
        try:
            foreground = os.tcgetpgrp(self._fd_in)
        except OSError:
            return False                 # not the controlling terminal of this session: no shell gives it to jobs
        return foreground not in (0, os.getpgrp())   # 0: the foreground job is in another PID namespace

    def size(self) -> tuple[int, int]:
        """Return the columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._fd_out)
        except OSError:
            return DEFAULT_SIZE
        return columns or DEFAULT_SIZE[0], rows or DEFAULT_SIZE[1]


# --- the bottom of the terminal -------------------------------------------------------------------------------

class Prompt:
    """What stands at the bottom of a terminal on which nothing can be drawn: the terminal itself edits the line.

    ``erase`` makes room for a line, ``draw`` shows the prompt below the last one. ``asks``: it waits for an answer.
    """

    asks = True

    def __init__(self, tty: Tty) -> None:
        self.tty = tty
        self._is_shown = False

    def erase(self) -> bytes:
        """Return what to write before a line."""
        shown, self._is_shown = self._is_shown, False
        return b"\n" if shown else b""

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what to write behind the last line."""
        shown, self._is_shown = self._is_shown, self._is_shown or bool(prompt)
        return b"" if shown else prompt.encode()

    def answered(self) -> None:
        """Note that a line was typed: the terminal has gone to the next one."""
        self._is_shown = False


class StatusRow(Prompt):
    """A terminal on which nothing is typed: what is waited for stands at the bottom of the screen."""

    asks = False

    def __init__(self, write: Callable[[bytes], None], tty: Tty, style: Style) -> None:
        super().__init__(tty)
        self._write = write
        self._screen = Screen(*tty.size(), style, tty.wraps_again, tty.goes_back)

    def erase(self) -> bytes:
        """Return what to write before a line."""
        return self._screen.erase()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what shows the notices, if there are any."""
        return self._screen.draw(notices, "", "", 0) if notices else self._screen.erase()

    def resized(self) -> float:
        """Note that the window has a new size. Return when to ``resize``, in seconds from now."""
        self._screen.resize_later(*self.tty.size())
        return RESIZE_PAUSE if self.tty.wraps_again else 0.0

    def resize(self) -> None:
        """Follow the window to its new size."""
        self._write(self._screen.resize(*self.tty.size()))

    def resume(self) -> None:
        """Go on after a stop: the job that had the terminal meanwhile has left the cursor below what was shown."""
        self._write(self._screen.erase_cursor_row())


class EditorScreen(StatusRow):
    """Somebody at a terminal: the line being typed stays at the bottom of the screen, whatever is said above it."""

    asks = True

    def __init__(self, write: Callable[[bytes], None], flush: Callable[[], None], tty: Tty, style: Style,
                 editor: Editor) -> None:
        super().__init__(write, tty, style)
        self._flush = flush
        self._editor = editor
        self._is_ours = False       # the terminal

    def open(self) -> None:
        """Take the terminal, unless this job is in the background: then each ``draw`` tries again."""
        if self.tty.is_background():
            return
        self._is_ours = True
        self.tty.leave_raw_mode()
        self.tty.enter_raw_mode()
        self.resize()
        self._write(PASTE_ON)

    def close(self) -> None:
        """Give the terminal back as it was, with the cursor below what was said."""
        if self._is_ours:
            self._is_ours = False
            self._write(self._screen.resize(*self.tty.size()) + PASTE_OFF)
            self._flush()
            self.tty.leave_raw_mode()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what shows the line being typed, and the notices above it; b"" while another job has the terminal."""
        if not self._is_ours:
            self.open()
            if not self._is_ours:
                return b""
        search = self._editor.search
        shown = prompt if search is None else search.prompt
        return self._screen.draw(notices, shown, self._editor.text, self._editor.cursor)

    def type(self, data: bytes) -> Iterator[Action]:
        """Accept what was typed; yield what is left to do about it."""
        for action in self._editor.feed(data):
            if action.kind is ActionKind.SUSPEND:
                self.suspend()
            elif action.kind is ActionKind.CLEAR_SCREEN:
                self._write(self._screen.clear_screen())
            elif action.kind is ActionKind.BELL:
                self._write(b"\a")
            else:
                yield action

    def suspend(self) -> None:
        """Stop this job, as Ctrl-Z does; return when it is continued.

        The signals get their default handlers meanwhile: ours for SIGTSTP would come here again instead of stopping.
        """
        self.close()
        handlers = [(number, signal.signal(number, signal.SIG_DFL)) for number in (signal.SIGTSTP, signal.SIGCONT)]
        os.kill(0, signal.SIGTSTP)      # to the whole job: to what it is piped with, too
        for number, handler in handlers:
            signal.signal(number, handler)
        self.resume()

    def resume(self) -> None:
        """Go on after a stop, in which another job may have had the terminal and changed its settings.

        If it is still another job's (after ``bg``), only the area is forgotten.
        """
        self._is_ours = False
        cleared = self._screen.erase_cursor_row()
        self.open()
        if self._is_ours:
            self._write(cleared)
