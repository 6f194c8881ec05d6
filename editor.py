"""Keys, history, the line that is edited, and the screen."""
from __future__ import annotations

import codecs
import errno
import functools
import os
import re
import signal
import stat
import unicodedata
from typing import (Any, NamedTuple)
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

EDIT_LIMIT = 128 * 1024          # characters in the line that is edited
PASTE_LIMIT = 1024 * 1024        # characters of one paste that are looked at; the rest is dropped
SEQUENCE_LIMIT = 32              # characters of parameters in an escape sequence; with more it is none
HISTORY_LINES = 1000             # lines that are kept, in memory and when the file is rewritten
HISTORY_FILE_LINES = 2000        # lines in the file from which on it is rewritten
HISTORY_LINE_LIMIT = 64 * 1024   # characters; a longer line is not kept
HISTORY_READ = 4 * 1024 * 1024   # bytes at the end of the file that are read
DEFAULT_SIZE = (80, 24)          # columns and rows of a terminal that does not say

PASTE_ON = b"\x1b[?2004h"        # from now on the terminal brackets what is pasted
PASTE_OFF = b"\x1b[?2004l"


# --- widths ---------------------------------------------------------------------------------------------------

ZERO_WIDTH_JOINER = "\u200d"
SOFT_HYPHEN = "\u00ad"           # a format character, but terminals show it


def char_width(c: str) -> int:
    """How many columns a printable character takes: 0 if it joins the one before it, 2 if it is wide, else 1."""
    return 1 if c.isascii() else _looked_up_width(c)


@functools.lru_cache(maxsize=4096)
def _looked_up_width(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf") and c != SOFT_HYPHEN or unicodedata.combining(c):
        return 0
    if "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7ff":
        return 0                 # the vowels and finals of Hangul in pieces: they join the initial, which is wide
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def text_width(text: str) -> int:
    """How many columns a printable text takes."""
    return len(text) if text.isascii() else sum(map(char_width, text))


# --- colours --------------------------------------------------------------------------------------------------

NICK_COLORS = (131, 166, 136, 64, 29, 31, 33, 62, 134, 162)  # of 256; each has a contrast of 3 to black and white


def wants_color(when: str, is_terminal: bool, environment: Mapping[str, str]) -> bool:
    """Whether to colour, if asked for ``when``: always, never, or auto.

    auto: on a terminal that can, unless the user wants none anywhere (https://no-color.org).
    """
    if when != "auto":
        return when == "always"
    return is_terminal and environment.get("TERM") != "dumb" and not environment.get("NO_COLOR")


class Style:
    """How texts are set off from others; if not ``enabled`` they are not. Styles may be nested in each other."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def _styled(self, on: str, text: str, off: str) -> str:
        return f"\x1b[{on}m{text}\x1b[{off}m" if self.enabled and text else text

    def nick(self, nick: str) -> str:
        """``nick`` in its colour, which is the same in every process."""
        if not self.enabled:
            return nick
        import zlib
        color = NICK_COLORS[zlib.crc32(nick.encode("utf-8", "replace")) % len(NICK_COLORS)]
        return self._styled(f"38;5;{color}", nick, "39")

    def error(self, text: str) -> str:
        """``text`` in red."""
        return self._styled("31", text, "39")

    def dim(self, text: str) -> str:
        """``text`` less bright than others."""
        return self._styled("2", text, "22")


# --- keys -----------------------------------------------------------------------------------------------------

class Key(NamedTuple):
    """What was pressed (``text``: a run of printable characters, and ``paste``: anything, carry their ``text``)."""

    name: str
    text: str = ""


CONTROL_KEYS = {
    "\x01": "home", "\x02": "left", "\x03": "interrupt", "\x04": "end-of-input", "\x05": "end", "\x06": "right",
    "\x08": "backspace", "\t": "tab", "\n": "enter", "\x0b": "kill-end", "\x0c": "clear", "\r": "enter",
    "\x0e": "down", "\x10": "up", "\x15": "kill-start", "\x17": "kill-word", "\x19": "yank", "\x1a": "suspend",
    "\x7f": "backspace",
}
PASTE_BEGIN, PASTE_END = "[200~", "\x1b[201~"
SEQUENCES = {                    # what follows the Escape
    "[A": "up", "[B": "down", "[C": "right", "[D": "left", "[H": "home", "[F": "end",
    "OA": "up", "OB": "down", "OC": "right", "OD": "left", "OH": "home", "OF": "end", "OM": "enter",
    "[1~": "home", "[4~": "end", "[7~": "home", "[8~": "end", "[3~": "delete", "[Z": "back-tab",
    "b": "word-left", "f": "word-right", "d": "kill-next-word", "\x7f": "kill-last-word", "\x08": "kill-last-word",
    "[5D": "word-left", "[5C": "word-right", "Od": "word-left", "Oc": "word-right",     # rxvt and its kin
    "[3;3~": "kill-next-word", "[3;5~": "kill-next-word", PASTE_BEGIN: "paste",
}
for _modifier in "3", "5", "7":  # Alt, Ctrl, both
    SEQUENCES[f"[1;{_modifier}D"] = "word-left"
    SEQUENCES[f"[1;{_modifier}C"] = "word-right"

_C0_DEL_C1 = "\x00-\x1f\x7f-\x9f"
_PRINTABLE = f"[^{_C0_DEL_C1}]+"
_PARAMETERS = rf"\x1b(?:\[\[?[ -?]{{0,{SEQUENCE_LIMIT}}}|O[0-9;]{{0,{SEQUENCE_LIMIT}}})"    # "[[": Linux's F1 to F5
_SEQUENCE = rf"{_PARAMETERS}[@-Z\\-~]|\x1b(?:[^{_C0_DEL_C1}\[O]|[\x08\x7f])"      # control, or Alt and a key
_BEGINNING = rf"{_PARAMETERS}|\x1b"


class Keys:
    """Turns bytes from a terminal into keys. What is unfinished is kept for the next ``feed``.

    A key ``lost`` says that a paste was longer than ``PASTE_LIMIT``. Sequences that mean nothing are dropped.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""                             # the beginning of a sequence
        self._paste: list[str] | None = None     # what came of a paste that has not ended
        self._room = 0                              # characters that the paste may still have
        self._lost = False

    def feed(self, data: bytes) -> list[Key]:
        """The keys that ``data`` completes."""
        text, self._rest = self._rest + self._decoder.decode(data), ""
        keys: list[Key] = []
        position = 0
        while position < len(text):
            position = (self._key if self._paste is None else self._pasted)(text, position, keys)
        return keys

    def _key(self, text: str, position: int, keys: list[Key]) -> int:
        """Adds the key at ``position`` to ``keys``; gives where the next one is."""
        run = re.compile(_PRINTABLE).match(text, position)
        if run is not None:
            keys.append(Key("text", run.group()))
            return run.end()
        if text[position] == "\x1b":
            return self._sequence(text, position, keys)
        name = CONTROL_KEYS.get(text[position])
        if name is not None:
            keys.append(Key(name))
        return position + 1

    def _sequence(self, text: str, position: int, keys: list[Key]) -> int:
        whole = re.compile(_SEQUENCE).match(text, position)
        if whole is None:
            beginning = re.compile(_BEGINNING).match(text, position)
            end = beginning.end() if beginning is not None else position + 1
            if end == len(text):
                self._rest = text[position:]
            return end
        name = SEQUENCES.get(whole.group()[1:])
        if name == "paste":
            self._paste, self._room, self._lost = [], PASTE_LIMIT, False
        elif name is not None:
            keys.append(Key(name))
        return whole.end()

    def _pasted(self, text: str, position: int, keys: list[Key]) -> int:
        assert self._paste is not None
        end = text.find(PASTE_END, position)
        if end < 0:
            end = len(text) - _overlap(text, PASTE_END, position)
            self._rest = text[end:]
            self._take(text[position:end])
            return len(text)
        self._take(text[position:end])
        keys.append(Key("paste", "".join(self._paste)))
        if self._lost:
            keys.append(Key("lost"))
        self._paste = None
        return end + len(PASTE_END)

    def _take(self, part: str) -> None:
        assert self._paste is not None
        self._paste.append(part[:self._room])
        self._lost = self._lost or len(part) > self._room
        self._room -= len(self._paste[-1])


def _overlap(text: str, mark: str, start: int) -> int:
    """How many characters at the end of ``text``, not before ``start``, are the beginning of ``mark``."""
    longest = min(len(mark) - 1, len(text) - start)
    return next((count for count in range(longest, 0, -1) if text.endswith(mark[:count])), 0)


# --- history --------------------------------------------------------------------------------------------------

class History:
    """The lines that were entered, in memory and (if there is a ``path``) in a file, oldest first.

    The file is appended to at once, so it survives a kill, and several processes may share it; they see each other's
    lines when they start. A line that is added in the very moment in which another process rewrites the file may be
    missing from it. Whatever goes wrong with the file: from then on the history is in memory only.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lines: list[str] = []
        self._position = 0           # of the line that the walk shows; behind the last: there is no walk
        self._draft = ""             # what was typed when the walk began
        self._in_file = 0            # lines; as far as this process knows
        self._torn = False           # the file ends within a line
        self._guarded(self._load)

    @property
    def walking(self) -> bool:
        """Whether an older line is shown."""
        return self._position < len(self._lines)

    def previous(self, current: str) -> str:
        """The line before the one that is shown; ``current``, which was typed or is shown, if there is none."""
        if not self.walking:
            self._draft = current
        if not self._position:
            return current
        self._position -= 1
        return self._lines[self._position]

    def next(self) -> str:
        """The line behind the one that is shown; behind the last one, what was typed when the walk began."""
        self._position = min(self._position + 1, len(self._lines))
        return self._lines[self._position] if self.walking else self._draft

    def end_walk(self) -> None:
        """What is typed next is a new line."""
        self._position, self._draft = len(self._lines), ""

    def add(self, *lines: str) -> None:
        """Keeps lines, but no blank or very long ones, and none that is the same as the one before it.

        Control characters are left out, tabs become blanks.
        """
        count = len(self._lines)
        for line in lines:
            kept = re.sub(f"[{_C0_DEL_C1}]+", "", line.replace("\t", " "))
            if kept.strip() and len(kept) <= HISTORY_LINE_LIMIT and self._lines[-1:] != [kept]:
                self._lines.append(kept)
        added = self._lines[count:][-HISTORY_LINES:]
        del self._lines[:-HISTORY_LINES]
        self.end_walk()
        if added:
            self._guarded(lambda path: self._append(path, added))

    def _guarded(self, work: Callable[[str], None]) -> None:
        """Does something with the file, if there is one; none from the first failure on."""
        try:
            if self._path is not None:
                work(self._path)
        except OSError:
            self._path = None

    def _load(self, path: str) -> None:
        try:
            self._lines, whole = self._read(path)
        except FileNotFoundError:
            return
        self.end_walk()
        if not whole or self._in_file > HISTORY_LINES:
            self._rewrite(path)

    def _read(self, path: str) -> tuple[list[str], bool]:
        """The last valid lines in the file, and whether all of it was read. Only a regular file is one."""
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            start = max(0, status.st_size - HISTORY_READ)
            file.seek(start)
            rows = file.read(HISTORY_READ).split(b"\n")
        self._torn = rows[-1] != b""
        self._in_file = len(rows) - (not self._torn)
        return list(_valid_lines(rows[1:] if start else rows))[-HISTORY_LINES:], not start

    def _rewrite(self, path: str) -> None:
        """Leaves the last lines in the file: those that other processes have added meanwhile, too."""
        lines, _ = self._read(path)
        target = os.path.realpath(path)
        draft = f"{target}.{os.urandom(8).hex()}"   # not the process's number: a container gives the same to each
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(_encoded(lines))
            os.replace(draft, target)
        except OSError:
            os.unlink(draft)
            raise
        self._in_file, self._torn = len(lines), False

    def _append(self, path: str, lines: list[str]) -> None:
        data = b"\n" * self._torn + _encoded(lines)
        descriptor = _open_to_append(path)
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, "not written whole", path)
        finally:
            os.close(descriptor)
        self._torn = False
        self._in_file += len(lines)
        if self._in_file > HISTORY_FILE_LINES:
            self._rewrite(path)


def _valid_lines(rows: Iterable[bytes]) -> Iterable[str]:
    for row in rows:
        try:
            line = row.decode()
        except UnicodeDecodeError:
            continue
        if line.strip() and len(line) <= HISTORY_LINE_LIMIT and not re.search(f"[{_C0_DEL_C1}]", line):
            yield line


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


def _open_to_append(path: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return os.open(path, flags, 0o600)


# --- the line that is edited ----------------------------------------------------------------------------------

class Action(NamedTuple):
    """Something for the editor's owner to do.

    - ``submit``: take ``lines``. ``pasted``: those behind the first are as they were pasted; nothing that was typed
      stands before them.
    - ``interrupt``, ``end``: Ctrl-C, Ctrl-D on an empty line.
    - ``suspend``, ``clear``: Ctrl-Z, Ctrl-L.
    - ``bell``: what was typed could not be done (no candidate), or not wholly (no room).
    """

    kind: str
    lines: list[str]
    pasted: bool = False


Complete = Callable[[str], tuple[int, list[str]]]

SEND = r"/?send {1,8}\S{1,64} "         # bounded, for it is repeated before each line of a paste
_LINE_END = "\r\n?"
_NOT_IN_TEXT = "[\x00-\x08\x0b-\x1f\x7f-\x9f]+"


def previous_unit(text: str, cursor: int) -> int:
    """Where the character before ``cursor`` begins; those of width 0 belong to the one before them."""
    return _unit_start(text, max(cursor - 1, 0))


def next_unit(text: str, cursor: int) -> int:
    """Where the character at ``cursor`` ends."""
    return _unit_end(text, min(cursor + 1, len(text)))


def _is_inside_unit(text: str, index: int) -> bool:
    return 0 < index < len(text) and (char_width(text[index]) == 0 or text[index - 1] == ZERO_WIDTH_JOINER)


def _unit_start(text: str, index: int) -> int:
    while _is_inside_unit(text, index):
        index -= 1
    return index


def _unit_end(text: str, index: int) -> int:
    while _is_inside_unit(text, index):
        index += 1
    return index


def _is_of_word(c: str) -> bool:
    return c.isalnum() or char_width(c) == 0


def _is_of_argument(c: str) -> bool:
    return not c.isspace()


def _skip_left(text: str, cursor: int, belongs: Callable[[str], bool]) -> int:
    """Where the word before ``cursor`` begins; a word is a run of characters that belong to one."""
    while cursor > 0 and not belongs(text[cursor - 1]):
        cursor -= 1
    while cursor > 0 and belongs(text[cursor - 1]):
        cursor -= 1
    return _unit_start(text, cursor)


def _skip_right(text: str, cursor: int, belongs: Callable[[str], bool]) -> int:
    """Where the word at or behind ``cursor`` ends."""
    while cursor < len(text) and not belongs(text[cursor]):
        cursor += 1
    while cursor < len(text) and belongs(text[cursor]):
        cursor += 1
    return _unit_end(text, cursor)


class Editor:
    """The line that is typed: ``text``, and where in it the ``cursor`` is (an index).

    ``complete`` takes the text before the cursor and gives where the word at its end begins, and what it may become,
    best first. Tab puts the first of these there, and on repetition the next ones.
    """

    def __init__(self, history: History, complete: Complete) -> None:
        self.text = ""
        self.cursor = 0
        self._history = history
        self._complete = complete
        self._keys = Keys()
        self._killed = ""                # what yank inserts
        self._cycle: tuple[int, int, list[str], int] | None = None   # start and end of the word, candidates, which
        self._behind_send = False        # the block in the text was pasted behind a ``send NICK``
        self._draft_behind_send = False  # the same of the text that was left for the history
        self._handlers: dict[str, Callable[[Key], Action | None]] = {
            "text": lambda key: self._insert(key.text),
            "paste": lambda key: self._insert(_cleaned(key.text)),
            "lost": lambda key: Action("bell", []),
            "left": lambda key: self._move(previous_unit(self.text, self.cursor)),
            "right": lambda key: self._move(next_unit(self.text, self.cursor)),
            "home": lambda key: self._move(0),
            "end": lambda key: self._move(len(self.text)),
            "word-left": lambda key: self._move(_skip_left(self.text, self.cursor, _is_of_word)),
            "word-right": lambda key: self._move(_skip_right(self.text, self.cursor, _is_of_word)),
            "up": lambda key: self._older(),
            "down": lambda key: self._newer(),
            "backspace": lambda key: self._delete(previous_unit(self.text, self.cursor)),
            "delete": lambda key: self._delete(next_unit(self.text, self.cursor)),
            "kill-end": lambda key: self._kill(len(self.text)),
            "kill-start": lambda key: self._kill(0),
            "kill-word": lambda key: self._kill(_skip_left(self.text, self.cursor, _is_of_argument)),
            "kill-last-word": lambda key: self._kill(_skip_left(self.text, self.cursor, _is_of_word)),
            "kill-next-word": lambda key: self._kill(_skip_right(self.text, self.cursor, _is_of_word)),
            "yank": lambda key: self._insert(self._killed),
            "tab": lambda key: self._cycle_on(1),
            "back-tab": lambda key: self._cycle_on(-1),
            "enter": lambda key: self._submit(),
            "interrupt": lambda key: self._interrupt(),
            "end-of-input": lambda key: self._end_of_input(),
            "suspend": lambda key: Action("suspend", []),
            "clear": lambda key: Action("clear", []),
        }

    def feed(self, data: bytes) -> list[Action]:
        """Takes what was typed; gives what the owner has to do, in this order."""
        actions = []
        for key in self._keys.feed(data):
            if key.name not in ("tab", "back-tab"):
                self._cycle = None
            action = self._handlers[key.name](key)
            if action is not None:
                actions.append(action)
        return actions

    def _replace(self, start: int, end: int, piece: str) -> None:
        self.text = self.text[:start] + piece + self.text[end:]
        self.cursor = start + len(piece)

    def _insert(self, text: str) -> Action | None:
        piece = text[:EDIT_LIMIT - len(self.text)]
        if "\n" in piece and "\n" not in self.text:
            self._behind_send = re.match(SEND, self.text[:self.cursor]) is not None
        self._replace(self.cursor, self.cursor, piece)
        return Action("bell", []) if len(piece) < len(text) else None

    def _move(self, cursor: int) -> None:
        self.cursor = cursor

    def _delete(self, to: int) -> None:
        self._replace(min(to, self.cursor), max(to, self.cursor), "")

    def _kill(self, to: int) -> None:
        self._killed = self.text[min(to, self.cursor):max(to, self.cursor)] or self._killed
        self._delete(to)

    def _show(self, text: str) -> None:
        self.text, self.cursor = text, len(text)

    def _older(self) -> None:
        if not self._history.walking:
            self._draft_behind_send = self._behind_send
        self._show(self._history.previous(self.text))

    def _newer(self) -> None:
        if self._history.walking:
            self._show(self._history.next())
            self._behind_send = self._draft_behind_send

    def _cycle_on(self, step: int) -> Action | None:
        if self._cycle is None:
            start, candidates = self._complete(self.text[:self.cursor])
            end, which = self.cursor, min(step, 0)
        else:
            start, end, candidates, which = self._cycle
            which += step
        word = candidates[which % len(candidates)] + " " if candidates else ""
        if not word or len(self.text) - (end - start) + len(word) > EDIT_LIMIT:
            return Action("bell", [])
        self._replace(start, end, word)
        self._cycle = start, self.cursor, candidates, which
        return None

    def _submit(self) -> Action:
        lines = self.text.split("\n")
        start = re.match(SEND, lines[0]) if self._behind_send else None
        if start is not None:
            lines[1:] = [start.group() + line for line in lines[1:]]
        pasted = len(lines) > 1 and start is None
        # a pasted line with a slash may have been a text: in the history it would be a command
        self._history.add(*[line for count, line in enumerate(lines)
                            if not (pasted and count and line.startswith("/"))])
        self._start_anew()
        return Action("submit", lines, pasted)

    def _start_anew(self) -> None:
        self._show("")
        self._behind_send = False
        self._history.end_walk()

    def _interrupt(self) -> Action | None:
        was_empty = not self.text
        self._start_anew()
        return Action("interrupt", []) if was_empty else None

    def _end_of_input(self) -> Action | None:
        if not self.text:
            return Action("end", [])
        self._delete(next_unit(self.text, self.cursor))
        return None


def _cleaned(paste: str) -> str:
    """A paste as text: lines end with a newline, but the last one; of the other control characters, only tabs."""
    text = re.sub(_NOT_IN_TEXT, "", re.sub(_LINE_END, "\n", paste))
    return text[:-1] if text.endswith("\n") else text


# --- the screen -----------------------------------------------------------------------------------------------

_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_ROW, _ERASE_BELOW = "\x1b[K", "\x1b[J"       # from the cursor on: on a full row, its last character, too
_CLEAR = "\x1b[H\x1b[2J"
_CHUNK = "[ -~]+|[^ -~]"
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SHOWN = {"\n": ("↵", 1), "\u2028": ("↵", 1), "\u2029": ("↵", 1), "\t": (" ", 1)}


@functools.lru_cache(maxsize=4096)
def _shown(c: str) -> tuple[str, int]:
    """What is drawn for a character, and its width. Marks that turn the direction of a row are not drawn."""
    if c in _SHOWN:
        return _SHOWN[c]
    if c < " " or c == "\x7f":
        return "^" + chr(ord(c) ^ 0x40), 2
    if "\x80" <= c <= "\x9f":
        return "~" + chr(ord(c) - 0x40), 2
    return ("", 0) if c in _DIRECTIONS else (c, char_width(c))


class Rows:
    """Text in rows of at most ``columns`` columns: ``rows``, and the ``widths`` of each."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self.widths = [0]

    def add(self, text: str) -> None:
        """Goes on with ``text``."""
        for chunk in re.findall(_CHUNK, text):
            if " " <= chunk[0] <= "~":
                self._add_plain(chunk)
            else:
                self._add_one(*_shown(chunk))

    def place(self, c: str) -> tuple[int, int]:
        """The row and the column where ``c`` would begin, or the end of the text if that is empty."""
        width = max(1, _shown(c)[1]) if c else 1
        if self._is_full_for(width):
            return len(self.rows), 0
        return len(self.rows) - 1, self.widths[-1]

    def _is_full_for(self, width: int) -> bool:
        return self.widths[-1] + min(width, self.columns) > self.columns

    def _put(self, shown: str, width: int) -> None:
        self.rows[-1] += shown
        self.widths[-1] += width

    def new_row(self) -> None:
        """Begins a row."""
        self.rows.append("")
        self.widths.append(0)

    def _add_plain(self, chunk: str) -> None:
        start = 0
        while start < len(chunk):
            if self._is_full_for(1):
                self.new_row()
            piece = chunk[start:start + self.columns - self.widths[-1]]
            self._put(piece, len(piece))
            start += len(piece)

    def _add_one(self, shown: str, width: int) -> None:
        if not width and not self.widths[-1]:
            return                       # nothing that it could join: a terminal may join it to the row above
        if width > self.columns:
            shown, width = "?", 1
        if self._is_full_for(width):
            self.new_row()
        self._put(shown, width)


def cut(text: str, columns: int) -> tuple[str, int]:
    """``text`` in one row, with an ellipsis where it is cut, and the row's width."""
    rows = Rows(columns)
    rows.add(text)
    if len(rows.rows) > 1 and columns > 1:
        rows = Rows(columns - 1)
        rows.add(text)
        return rows.rows[0] + "…", rows.widths[0] + 1
    return rows.rows[0], rows.widths[0]


def _up(count: int) -> str:
    return f"\x1b[{count}A" if count > 0 else ""


def _right(count: int) -> str:
    return f"\x1b[{count}C" if count > 0 else ""


Row = tuple[str, int]                    # what is drawn, and its width in columns


class Screen:
    """Draws the area at the bottom of a terminal with so many columns and rows.

    The area has at most one row less than the terminal. If it is too small, notices give way (the first ones first);
    of a text that is still too high, the rows around the cursor are drawn.
    """

    def __init__(self, columns: int, rows: int, style: Style = Style(False)) -> None:
        self._columns = max(1, columns)
        self._most = max(1, rows - 1)
        self._style = style
        self._drawn: list[Row] = []      # the area as it is on the screen; none: it is not there
        self._at = 0, 0                  # row and column of the cursor in it
        self._of: object = None          # what was drawn

    def draw(self, notices: Sequence[str], prompt: str, text: str, cursor: int) -> bytes:
        """The area, over itself if it is drawn, else from the row where the cursor is; b"" if nothing has changed."""
        of = tuple(notices), prompt, text, cursor
        if self._drawn and of == self._of:
            return b""
        area, at = self._area(*of)
        if self._drawn and (area, at) == (self._drawn, self._at):
            return b""
        drawn = self._bytes(area, at)
        self._drawn, self._at, self._of = area, at, of
        return drawn

    def erase(self) -> bytes:
        """Takes the area off, with the cursor at the beginning of the row where it began; b"" if it is not drawn."""
        erased = self._to_start() + _ERASE_BELOW if self._drawn else ""
        self.forget()
        return erased.encode()

    def resize(self, columns: int, rows: int) -> bytes:
        """The terminal has another size now: takes the area off.

        Exact where a terminal cuts rows, or scrolls, as it gets smaller: the cursor stays in its row, and does not
        go above the first one. A terminal that flows rows anew may keep some of the area, but no message is erased.
        """
        erased = self.erase()
        self._columns = max(1, columns)
        self._most = max(1, rows - 1)
        return erased

    def clear_screen(self) -> bytes:
        """Takes everything off, with the cursor in the first row."""
        self.forget()
        return _CLEAR.encode()

    def begin_anew(self) -> bytes:
        """The cursor is in some row, in which part of the area may still be: takes that off."""
        self.forget()
        return ("\r" + _ERASE_BELOW).encode()

    def forget(self) -> None:
        """The area is not drawn (any more), wherever the cursor may be."""
        self._drawn, self._at, self._of = [], (0, 0), None

    def _area(self, notices: Sequence[str], prompt: str, text: str, cursor: int) -> tuple[list[Row], tuple[int, int]]:
        """The rows of the area, and row and column of the cursor in it."""
        layout = Rows(self._columns)
        layout.add(prompt + text[:cursor])
        row, column = layout.place(text[cursor:cursor + 1])
        layout.add(text[cursor:])
        if row == len(layout.rows):
            layout.new_row()
        top = max(0, min(row - self._most // 2, len(layout.rows) - self._most))
        edited = list(zip(layout.rows, layout.widths))[top:top + self._most]
        room = self._most - len(edited)
        shown = [cut(notice, self._columns) for notice in notices[-room:]] if room else []
        return ([(self._style.dim(notice), width) for notice, width in shown] + edited,
                (len(shown) + row - top, column))

    def _bytes(self, area: list[Row], at: tuple[int, int]) -> bytes:
        """Draws ``area`` and puts the cursor there."""
        start = self._to_start() if self._drawn else "\r" + _ERASE_BELOW
        rows = [row if width == self._columns else row + _ERASE_ROW for row, width in area]
        below = len(area) - 1 - at[0]
        if len(area) < len(self._drawn):
            rows.append(_ERASE_BELOW)    # in a row that is there: this scrolls nothing
            below += 1
        parts = _WRAP_OFF, start, "\r\n".join(rows), "\r", _up(below), _right(at[1]), _WRAP_ON
        return "".join(parts).encode("utf-8", "replace")

    def _to_start(self) -> str:
        return "\r" + _up(self._at[0])


# --- the terminal ---------------------------------------------------------------------------------------------

class Terminal:
    """The settings of a terminal, as long as somebody edits a line on it. Nothing here raises, blocks, or stops.

    A terminal that has hung up, and a descriptor that is none, have no settings: then nothing happens.
    """

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self._fd_in = fd_in
        self._fd_out = fd_out
        self._saved: list[Any] | None = None

    def enter(self) -> None:
        """From now on every key comes as bytes, at once, and is not shown. Ctrl-S and Ctrl-Q stay as they are."""
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

    def leave(self) -> None:
        """Gives the terminal back with the settings that it had."""
        if self._saved is not None:
            self._set(self._saved)
            self._saved = None

    def _set(self, attributes: list[Any]) -> None:
        """Sets them at once (a drain waits, on a terminal that Ctrl-S has stopped); in the background, too."""
        import termios
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            termios.tcsetattr(self._fd_in, termios.TCSANOW, attributes)
        except (termios.error, OSError):
            pass                         # it has hung up, and takes its settings with it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def is_background(self) -> bool:
        """Whether it is another job's now: the shell has this process in the background."""
        try:
            return os.tcgetpgrp(self._fd_in) not in (0, os.getpgrp())   # 0: of another PID namespace
        except OSError:
            return False                 # not the terminal of this session: no shell shares it out

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._fd_out)
        except OSError:
            return DEFAULT_SIZE
        return columns or DEFAULT_SIZE[0], rows or DEFAULT_SIZE[1]


# --- prompts --------------------------------------------------------------------------------------------------

class Prompt:
    """What stands at the bottom of a terminal on which nothing can be drawn: the terminal itself edits the line.

    ``erase`` makes room for a line, ``draw`` shows the prompt below the last one. ``asks``: it waits for an answer.
    """

    asks = True

    def __init__(self) -> None:
        self._is_shown = False

    def erase(self) -> bytes:
        """Return what to write before a line."""
        shown, self._is_shown = self._is_shown, False
        return b"\n" if shown else b""

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what to write behind the last line."""
        shown, self._is_shown = self._is_shown, True
        return b"" if shown else prompt.encode()

    def answered(self) -> None:
        """Note that a line was typed: the terminal has gone to the next one."""
        self._is_shown = False


class StatusRow(Prompt):
    """A terminal on which nothing is typed: what is waited for stands at the bottom of the screen."""

    asks = False

    def __init__(self, write: Callable[[bytes], None], terminal: Terminal, style: Style) -> None:
        super().__init__()
        self._write = write
        self._terminal = terminal
        self._screen = Screen(*terminal.size(), style)

    def erase(self) -> bytes:
        """Return what to write before a line."""
        return self._screen.erase()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what shows the notices, if there are any."""
        return self._screen.draw(notices, "", "", 0) if notices else self._screen.erase()

    def resize(self) -> None:
        """Follow the window to its new size."""
        self._write(self._screen.resize(*self._terminal.size()))

    def resume(self) -> None:
        """Go on after a stop: the job that had the terminal meanwhile has left the cursor below what was shown."""
        self._write(self._screen.begin_anew())


class EditorScreen(StatusRow):
    """Somebody at a terminal: the line being typed stays at the bottom of the screen, whatever is said above it."""

    asks = True

    def __init__(self, write: Callable[[bytes], None], flush: Callable[[], None], terminal: Terminal, style: Style,
                 history: History, complete: Complete) -> None:
        super().__init__(write, terminal, style)
        self._flush = flush
        self._editor = Editor(history, complete)
        self._is_ours = False       # the terminal

    def open(self) -> None:
        """Take the terminal, unless this job is in the background: then ``draw`` tries again."""
        if self._terminal.is_background():
            return
        self._is_ours = True
        self._terminal.leave()
        self._terminal.enter()
        self.resize()
        self._write(PASTE_ON)

    def close(self) -> None:
        """Give the terminal back as it was, with the cursor below what was said."""
        if self._is_ours:
            self._is_ours = False
            self._write(self._screen.erase() + PASTE_OFF)
            self._flush()
            self._terminal.leave()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Return what shows the line being typed, and the notices above it."""
        if not self._is_ours:
            self.open()
        return self._screen.draw(notices, prompt, self._editor.text, self._editor.cursor) if self._is_ours else b""

    def type(self, data: bytes) -> Iterator[Action]:
        """Accept what was typed; yield what is left to do about it."""
        for action in self._editor.feed(data):
            if action.kind == "suspend":
                self.suspend()
            elif action.kind == "clear":
                self._write(self._screen.clear_screen())
            elif action.kind == "bell":
                self._write(b"\a")
            else:
                yield action

    def suspend(self) -> None:
        """Stop this job, as Ctrl-Z does; return when it is continued."""
        self.close()
        handlers = [(number, signal.signal(number, signal.SIG_DFL)) for number in (signal.SIGTSTP, signal.SIGCONT)]
        os.kill(0, signal.SIGTSTP)
        for number, handler in handlers:
            signal.signal(number, handler)
        self.resume()

    def resume(self) -> None:
        """Go on after a stop: the job that had the terminal meanwhile has left it in another state."""
        self._is_ours = False
        cleared = self._screen.begin_anew()
        self.open()
        if self._is_ours:
            self._write(cleared)
