"""Commands in, events out: what a client reads from stdin and writes to stdout, on a terminal or not.

Rules of this file
------------------
- It does not carry out commands (the client does). It decides how an event is shown, and, for ``Presence``, when.
- Nothing blocks, and only ``Console`` touches the world. However bytes are cut, nothing raises, and all means the same.
- It knows nothing of datagrams and sessions, and of streams only that (stream, number) names a message.
- Starts are measured: what only JSON needs is imported, and a pattern compiled (``re`` caches it), when it is used.

How it works
------------
::

    stdin ──> Console ──> Shell ──> CommandReader      bytes become commands: plain lines, lines of a talk, JSON
                            └─────> the client         a command becomes a call: send, dereg, reg, quit, clients

    an event ──> Display ──> TextFormatter or JsonFormatter ──> stdout, or stderr for complaints
                    └──────> Prompt                             what stands below the last line of a terminal

On a terminal, lines go above what is typed: the prompt is erased, whole lines are written, the prompt is drawn again.
"""
from __future__ import annotations

import functools
import math
import re
import selectors
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum

from conversation import RECEIVED, REFUSED, SAVED, Delivery, Event, Observer
from home import BROKEN_LINE, EVENT_FORMATS, FOR_PEOPLE, SCREEN_LINES, UNPROVEN_LINE, as_json, rfc3339, show_time
from loop import (BYTE_ORDER_MARK, OUTPUT_LIMIT, Guest, Loop, Output, Reader, RestartableTimer, SelectorLoop, Writer,
                  receive_some, send_some, wake_up)
from protocol import (BROKEN, DOUBTS, MAX_TEXT, NEVER, TYPE_CHECKING, Any, NamedTuple, Protocol, are_short, clean,
                      folded, split_text)
if TYPE_CHECKING:       # a start is measured, and only a terminal needs the editor
    import socket
    from editor import Action, EditorScreen, Prompt, StatusRow, Style


# --- commands in ----------------------------------------------------------------------------------------------

LINE_LIMIT = MAX_TEXT + 1024            # bytes of a line that are kept; the rest is only counted
JSON_LIMIT = 6 * MAX_TEXT + 4096        # bytes of one that may be a JSON object: every character may be escaped
HANDED_LIMIT = JSON_LIMIT + 2 ** 20     # bytes of a message that is handed over: an argument may name many nicks
SURROGATES = "[\ud800-\udfff]"          # that JSON can name, and UTF-8 cannot encode
SPACED_SEND = r"[ \t]*send[ \t]+([^ \t]+)[ \t](.*)"      # one blank or tab behind NICK; the rest is MESSAGE, as it is
REF_LIMIT = 256                         # characters of a ``ref``
COMMAND_MARK = "/"                      # what a command begins with during a talk
# behind it, each line that is pasted at a terminal is a text for the same nicks
BLOCK_PREFIX = r"[ \t]{0,8}/?(?:send|msg)[ \t]{1,8}\S{1,512}[ \t]"


class Completion(Enum):
    """Which nicks may complete the word behind a command."""

    PEERS = "peers"
    SELF = "self"


class CommandSpec(NamedTuple):
    """What there is to know of a command, beside the method of ``Shell`` that carries it out.

    ``help``: its line in the list of commands, "" for none. ``json``: the types of its value in a JSON object (bool: it
    must be true), none if it cannot be given in that way. ``typed``: its usage, and its line, where they are others at
    a terminal.
    """

    usage: str
    help: str = ""
    works_offline: bool = False
    only_in_talk: bool = False
    completes: Completion | None = None
    json: tuple[type, ...] = ()
    typed: tuple[str, str] = ("", "")

    def told_to(self, display: Display) -> tuple[str, str]:
        """Return its usage, and its line, as they are there."""
        usage, line = self.typed if display.asks else ("", "")
        return usage or self.usage, line or self.help


COMMANDS: dict[str, CommandSpec] = {
    "send": CommandSpec("send NICK MESSAGE", "send MESSAGE (the rest of the line) to NICK",
                        completes=Completion.PEERS,
                        typed=("", "send MESSAGE (the rest of the line) to NICK or NICK,NICK; msg does the same")),
    "talk": CommandSpec("talk NICK", "send every line to NICK from now on; commands then begin with /; /end ends it",
                        completes=Completion.PEERS,
                        typed=("", "send every line to NICK or NICK,NICK; commands then begin with /; /end ends it")),
    "dereg": CommandSpec("dereg NICK", "go offline (NICK: your own)", completes=Completion.SELF, json=(str,),
                         typed=("dereg [NICK]", "go offline")),
    "reg": CommandSpec("reg NICK", "come online again", works_offline=True, completes=Completion.SELF, json=(str,),
                       typed=("reg [NICK]", "")),
    "who": CommandSpec("who", "show everybody who is known", json=(bool,),
                       typed=("who [all]", "show who is known (all: also those long away)")),
    "fingerprint": CommandSpec("fingerprint [NICK]", "show the digits of your key, or those to compare with NICK",
                               completes=Completion.PEERS, json=(bool, str)),
    "verify": CommandSpec("verify NICK", "note that you have compared the digits with NICK", completes=Completion.PEERS,
                          json=(str,)),
    "trust": CommandSpec("trust NICK", "accept that NICK has another key now", completes=Completion.PEERS, json=(str,)),
    "help": CommandSpec("help", "show this", works_offline=True, json=(bool,),
                        typed=("", "show this; ? does the same")),
    "quit": CommandSpec("quit", "go offline and end", works_offline=True, json=(bool,),
                        typed=("", "go offline and end; exit does the same")),
    "end": CommandSpec("end", works_offline=True, only_in_talk=True),
}
ABOUT_PEERS = frozenset(name for name, spec in COMMANDS.items() if spec.completes is Completion.PEERS)
COMPLETIONS = 1000  # nicks that are offered for the beginning of one, at most
HELP_INDENT = 20    # columns before what a command does


class Handed:
    """A message that another program has handed over, to one or more nicks: what becomes of it is told there."""

    def __init__(self, write: Callable[[bytes], None], end: Callable[[], None], recipients: int) -> None:
        self._write, self._end, self._open = write, end, recipients
        self._served: dict[str, SendCommand] = {}

    def is_first_for(self, nick: str, send: SendCommand) -> bool:
        """Return whether ``nick`` gets it by ``send``, and not by another one under another spelling."""
        is_first = self._served.setdefault(nick, send) is send
        if not is_first:
            self._close_one()
        return is_first

    def tell(self, name: str, is_closing: bool, /, **fields: Any) -> None:
        """Tell what has happened to it, for one recipient."""
        self._write((as_json({"event": name, **fields}) + "\n").encode())
        if is_closing:
            self._close_one()

    def _close_one(self) -> None:
        self._open -= 1
        if not self._open:
            self._write(b'{"event": "end"}\n')
            self._end()


def nicks_in(word: str) -> list[str]:
    """Return the nicks in a word, which have commas between them; with an empty one among them, all of it is one."""
    nicks = word.split(",")
    return nicks if all(nicks) else [word]


class SendCommand:
    """Texts for one nick.

    ``ref``: the name that the sender gave to them; ``size``: the bytes that a text had before it was cut off, or 0.
    """

    __slots__ = ("nick", "texts", "ref", "size")

    def __init__(self, nick: str, texts: list[str], ref: object = None, size: int = 0) -> None:
        self.nick, self.texts, self.ref, self.size = nick, texts, ref, size

    def take(self, most: int) -> list[str]:
        """Remove and return the first ``most`` texts."""
        taken, self.texts = self.texts[:most], self.texts[most:]
        return taken


class Command(NamedTuple):
    """Something to do: texts to send, or else the words of a command, or neither: ignore it.

    ``echo``: the line, where the terminal does not show what is typed by itself. ``invalid``: an object that means
    nothing, and the ``ref`` in it; ``has_no_text``: it would be a ``send``.
    """

    send: SendCommand | None = None
    words: Sequence[str] = ()
    echo: str = ""
    invalid: str = ""
    ref: object = None
    has_no_text: bool = False


class LongLine(str):
    """A line that was cut off because it is too long; ``size``: the bytes that it had."""

    size = 0


class TypedLine(str):
    """A line from a terminal that does not show what is typed by itself."""


class Block(str):
    """Lines that all begin with the same ``send NICK ``, which is the string: most reads of a pipe are that."""

    texts: list[str]


def group_sends(text: str) -> list[str]:
    """Return several lines as a list, or as one ``Block`` if all begin with the same ``send NICK ``.

    A pipe delivers thousands of lines at once. ``str.count`` and ``str.split`` run at the speed of C.
    """
    end = text.find(" ", 5) + 1
    if end > 6 and text.startswith("send "):
        start = text[:end]
        if "\n" not in start and "\t" not in start and text.count("\n" + start) == text.count("\n"):
            block = Block(start)
            block.texts = text[end:].split("\n" + start)
            return [block]
    return text.split("\n")


ALIASES = {"exit": "quit", "?": "help", "msg": "send"}      # what other chats call these: at a terminal, both do


class CommandReader:
    """Turns stdin into commands: bytes or lines go in, commands come out, in order.

    During a ``talk`` every line is a text for that nick; commands then begin with a slash, and a text that begins with
    one has two. At a terminal (``is_typed``) commands may always begin with one, and have other names, too. With
    ``reads_json``, a line may also be a JSON object. A line ends with LF or CRLF, and a byte order mark at the start is
    no part of the first one: editors of other systems leave both.
    """

    def __init__(self, reads_json: bool = False, is_typed: bool = False) -> None:
        self.talk = ""              # the nicks that lines go to, with commas between them, or none
        self._is_typed = is_typed
        self.ended = False          # nothing more will come
        self.waiting: deque[str | SendCommand | Command] = deque()      # of which ``next_command`` makes commands
        self._reads_json = reads_json
        self._limit = JSON_LIMIT if reads_json else LINE_LIMIT
        self._buffer = b""
        self._skipped = 0           # bytes beyond the limit, of a line that has not ended, ...
        self._last_skipped = b""    # ... and the last of them
        self._is_at_start = True    # of stdin: what has come so far may be a part of a byte order mark

    @property
    def prompt(self) -> str:
        """What asks for the next line."""
        return f"to {self.talk}> " if self.talk else ">>> "

    @property
    def slash(self) -> str:
        """What a command begins with."""
        return COMMAND_MARK if self.talk else ""

    # in

    def feed(self, data: bytes) -> None:
        """Accept what was read from stdin; b"" at its end."""
        if self._is_at_start:
            start = self._buffer + data
            if data and start != BYTE_ORDER_MARK and BYTE_ORDER_MARK.startswith(start):
                self._buffer = start        # it may become a mark; at the end of stdin, it is the last line
                return
            self._is_at_start = False
            if data:
                self._buffer, data = b"", start.removeprefix(BYTE_ORDER_MARK)
                if not data:
                    return
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            self._add_lines(self._buffer + head, is_whole=True)
            self._buffer, self._skipped = tail, 0
        elif data:
            self._buffer += data
        else:
            self.ended = True
            if self._buffer or self._skipped:
                self._add_lines(self._buffer, is_whole=False)
            self._buffer, self._skipped = b"", 0
        if len(self._buffer) > self._limit:
            self._skipped += len(self._buffer) - self._limit
            self._last_skipped = self._buffer[-1:]
            self._buffer = self._buffer[:self._limit]

    def _add_lines(self, data: bytes, is_whole: bool) -> None:
        """Note lines, without the last line feed; ``is_whole``: there was one."""
        if is_whole and self._skipped and data[len(self._buffer):].partition(b"\n")[0] == b"":
            if self._last_skipped == b"\r":
                self._skipped -= 1      # the line feed comes in a read of its own
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
            if is_whole and data.endswith(b"\r"):
                data = data[:-1]
        starts_long = len(data) > self._limit and data.find(b"\n", 0, self._limit + 1) < 0
        if self._skipped or starts_long:
            first, newline, data = data.partition(b"\n")      # only the first can be so long: it began in other reads
            line = LongLine(first[:self._limit].decode("utf-8", "replace"))
            line.size = len(first) + self._skipped
            self._skipped = 0
            self.waiting.append(line)
            if not newline:
                return
        text = data.decode("utf-8", "replace")
        if "\n" in text:
            self.waiting.extend(group_sends(text))
        else:
            self.waiting.append(text)

    def enter(self, lines: Sequence[str], pasted: bool = False) -> None:
        """Accept lines that were typed; ``pasted``: all but the first were, and a slash in them means nothing."""
        for count, line in enumerate(lines):
            escape = "/" if count and pasted and self.talk and line.startswith("/") else ""
            self.waiting.append(TypedLine(escape + line))

    def put(self, send: SendCommand) -> None:
        """Accept texts to send."""
        self.waiting.append(send)

    @property
    def unfinished(self) -> str:
        """The beginning of a line whose end was not read yet; "": there is none."""
        return self._buffer.decode("utf-8", "replace")

    def finish(self, rest: bytes, is_last: bool) -> None:
        """Accept the rest of a line; ``is_last``: stdin ends with it."""
        if rest:
            self.feed(rest)
        if is_last:
            self.feed(b"")

    def forget(self) -> None:
        """Forget what was read and is not carried out yet."""
        self.waiting.clear()
        self._buffer, self._skipped = b"", 0

    # out

    def next_command(self) -> Command:
        """Remove and return the next command."""
        line = self.waiting.popleft()
        if isinstance(line, Command):
            return line
        if isinstance(line, SendCommand):
            return Command(line)
        if isinstance(line, TypedLine):
            return self._meaning(str(line))._replace(echo=self.prompt + line.replace("\n", "↵"))
        return self._meaning(line)

    def _as_typed(self, line: str) -> str:
        """Return a line as one that would mean the same in a pipe."""
        text = line if self.talk else line.lstrip(" \t")
        has_mark = text.startswith(COMMAND_MARK) and not text.startswith(2 * COMMAND_MARK)
        if isinstance(line, (LongLine, Block)) or (self.talk and not has_mark):
            return line
        command = text.removeprefix(COMMAND_MARK) if has_mark else text
        name = command[:re.search(r"[ \t]|$", command).start()]     # type: ignore[union-attr]
        return self.slash + ALIASES.get(name, name) + command[len(name):]

    def _meaning(self, line: str) -> Command:
        if self._is_typed:
            line = self._as_typed(line)
        if self._reads_json and line.lstrip().startswith("{"):
            return json_command(line)
        if self.talk:
            return self._meaning_in_talk(line)
        words = line.split(" ", 2)
        if words[0] == "send" and len(words) == 3 and words[1] and "\t" not in words[1]:
            _, nick, text = words
            if isinstance(line, Block):
                return Command(SendCommand(nick, line.texts))
            return Command(SendCommand(nick, [text], None, _size_before_cut(line, text)))
        return spaced_command(line, line)

    def _meaning_in_talk(self, line: str) -> Command:
        if isinstance(line, Block):
            first, *others = [line + text for text in line.texts]
            self.waiting.extendleft(reversed(others))
            return self._meaning_in_talk(first)
        if line.startswith("/") and not line.startswith("//"):
            command = spaced_command(line, line[1:])
            return command if command.send is not None or command.words else Command(words=[""])     # a slash alone
        if not line:
            return Command()
        text = line[1:] if line.startswith("//") else line
        return Command(SendCommand(self.talk, [text], None, _size_before_cut(line, text)))


def spaced_command(line: str, command: str) -> Command:
    """Return what ``command``, all or the end of ``line``, asks for, however its words are spaced."""
    found = re.fullmatch(SPACED_SEND, command, re.DOTALL)
    if found is None:
        return Command(words=[word for word in re.split("[ \t]+", command) if word])
    return Command(SendCommand(found[1], [found[2]], None, _size_before_cut(line, found[2])))


def _size_before_cut(line: str, text: str) -> int:
    """Return the bytes that the text at the end of a line had before it was cut off; 0 if it was not."""
    return line.size - len(line[:len(line) - len(text)].encode()) if isinstance(line, LongLine) else 0


def _is_ref(ref: object) -> bool:
    """Return whether an event can name a message by ``ref``, and it is small: it is kept as long as the message."""
    if isinstance(ref, str):
        return len(ref) <= REF_LIMIT
    return ref is None or (isinstance(ref, (int, float)) and -math.inf < ref < math.inf)     # JSON has no NaN


def json_command(line: str) -> Command:
    """Return what a JSON object asks for."""
    import json
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return Command(invalid=line)
    if type(found) is not dict:
        return Command(invalid=line)
    nick, text, ref = found.get("send"), found.get("text"), found.get("ref")
    if type(nick) is str and type(text) is str and nick and _is_ref(ref):
        nick, text = re.sub(SURROGATES, "\ufffd", nick), re.sub(SURROGATES, "\ufffd", text)
        return Command(SendCommand(nick, [text], ref))
    for name, spec in COMMANDS.items():
        if str in spec.json and type(found.get(name)) is str:
            return Command(words=[name, re.sub(SURROGATES, "\ufffd", found[name])])
        if bool in spec.json and found.get(name) is True:
            return Command(words=[name])
    has_no_text = type(nick) is str and nick != "" and "text" not in found
    return Command(invalid=line, ref=ref if _is_ref(ref) else None, has_no_text=has_no_text)


# --- events out -----------------------------------------------------------------------------------------------


FIELDS = ("to", "text", "id", "via", "ms", "ref", "nick", "count", "size", "fingerprint",
          "secure")     # of an event, in JSON


TIME_OF_DAY, DATE_AND_TIME = "%H:%M:%S", "%Y-%m-%d %H:%M:%S"     # what may stand before a line
DAY_LINE = "--- %Y-%m-%d ---"      # stands before the first line of a new day


class TextFormatter:
    """Events as lines for people, and for scripts that read what people read.

    ``hidden``: the events that are not told. ``wall``: returns the time that stands before each line, in seconds since
    1970; None for no time. ``bell``: ring with each message. ``stamp``: the form of the time.
    """

    _lines: Mapping[str, str] = {}  # of events that are told otherwise than ``EVENT_FORMATS`` says
    is_for_programs = False     # they want to know which message an event is about, and may give commands as JSON
    nick = ""                   # our own

    def __init__(self, style: Style | None = None, wall: Callable[[], float] | None = None,
                 hidden: Collection[str] = FOR_PEOPLE, bell: bool = False, stamp: str = TIME_OF_DAY) -> None:
        self._error: Callable[[str], str] = str if style is None else style.error
        self._dim: Callable[[str], str] = str if style is None else style.dim
        self._name: Callable[[str], str] = str if style is None else style.name
        self._wall, self._hidden, self._stamp = wall, hidden, stamp
        self._bell = "\a" if bell else ""
        is_styled = style is not None and style.enabled
        self._is_plain = wall is None and not (is_styled or bell)       # nothing is added to a line

    def event(self, name: str, /, **fields: Any) -> str:
        """Return what has happened; an empty string where that is not told."""
        form = EVENT_FORMATS[name]
        if name in self._hidden or not form.line:
            return ""
        line = self._lines.get(name, form.line).format(**fields)
        if self._is_plain:
            return line + "\n"
        styled = self._error(line) if form.is_failure else self._dim(line)
        return f"{self._clock()}{styled}\n"

    def note(self, line: str) -> str:
        """Return a line that is no event."""
        return f"{self._clock()}{self._dim(line)}\n"

    def complaint(self, name: str, /, **fields: Any) -> str:
        """Return what has gone wrong, where ``event`` tells nothing: for stderr, as a line for people."""
        form = EVENT_FORMATS[name]
        return clean(form.line.format(**fields)) + "\n" if form.is_failure and form.line else ""

    def hides(self, name: str) -> bool:
        """Return whether an event is not told."""
        return name in self._hidden

    def _clock(self) -> str:
        return "" if self._wall is None else self._dim(show_time(int(self._wall()), self._stamp)) + " "

    def messages(self, received: Delivery, via: str, is_secure: bool | None = None) -> str:
        """Return what somebody has sent; ``via``: the route that it came by; ``is_secure``: see ``Display``."""
        if received.proof in DOUBTS:
            form = BROKEN_LINE if received.proof == BROKEN else UNPROVEN_LINE
            lines = [self._error(form.format(sender=received.sender, text=clean(text))) for text in received.texts]
            return "".join([f"{self._bell}{self._clock()}{line}\n" for line in lines])
        texts = received.texts
        if not "".join(texts).isprintable():
            texts = [clean(text) for text in texts]
        sender = received.sender
        start = f"{sender}: " if self._is_plain else f"{self._bell}{self._clock()}{self._name(sender)}: "
        if received.times and received.times.count(received.times[0]) == len(texts):
            start += f"<{show_time(received.times[0])}> "
        elif received.times:
            return "".join([f"{start}<{show_time(at)}> {text}\n" for text, at in zip(texts, received.times)])
        return f"{start}{texts[0]}\n" if len(texts) == 1 else start + ("\n" + start).join(texts) + "\n"

    def clients(self, entries: Sequence[ClientRow], verified: Sequence[str] = ()) -> str:
        """Return the known clients as aligned lines; ``verified``: whose keys are."""
        from editor import text_width
        widths = [text_width(nick) for nick, *_ in entries]
        wide, far = max(widths, default=0), max((len(address) for _, address, *_ in entries), default=0)
        compared = frozenset(verified)
        return "".join([f"{self._name(nick)}{' ' * (wide - width)}  {address:{far}}  {state}"
                        f"{', verified' if nick in compared else ''}\n"
                        for width, (nick, address, state, _) in zip(widths, entries)])

    def help(self, text: str) -> str:
        """Return the list of commands."""
        return text

    def undelivered(self, nick: str, text: str, ref: object) -> str:
        """Return the command that would send a message again."""
        return f"send {nick} {text}\n" if "\n" not in text else as_json({"send": nick, "text": text}) + "\n"


ClientRow = tuple[str, str, str, int]      # nick, address, state; when it was last seen, see ``Entry``
LONG_AWAY = 30 * 86400.0  # s; whoever was away for longer is only shown if the user asks for all


def rows_for_people(rows: Iterable[ClientRow], me: str, since: float) -> list[ClientRow]:
    """Return rows as people look for them: who is online, then the others, with when they were last seen.

    Those of whom it is known that they were not there ``since`` that wall-clock time are left out.
    """
    shown = [(nick, address, f"{state}, you" if nick == me else
              f"{state} since {show_time(seen, DATE_AND_TIME)}" if seen else state, seen)
             for nick, address, state, seen in rows if not 0 < seen < since]
    return sorted(shown, key=lambda row: not row[2].startswith("online"))


MOST_ROWS = 100           # lines as which one text is shown at a terminal; further line ends are escaped


class ScreenFormatter(TextFormatter):
    """Events and messages for somebody at a terminal: a text has as many lines as its sender has typed.

    Each of them begins with the sender's nick, so none passes for a line of somebody else. (A line that is wider than
    the terminal goes on in its next row: the terminal does that.) A new day is announced before its first line.
    """

    _lines = SCREEN_LINES

    def __init__(self, style: Style | None = None, wall: Callable[[], float] | None = None,
                 hidden: Collection[str] = FOR_PEOPLE, bell: bool = False, stamp: str = TIME_OF_DAY) -> None:
        super().__init__(style, wall, hidden, bell, stamp)
        self._day = self._today()

    def _today(self) -> str:
        return "" if self._wall is None or self._stamp != TIME_OF_DAY else show_time(int(self._wall()), DAY_LINE)

    def _with_day(self, lines: str) -> str:
        """Return lines, and before them the day, if it has changed since the last ones."""
        before, self._day = self._day, self._today() if lines else self._day
        return lines if self._day == before else self._dim(self._day) + "\n" + lines

    def event(self, name: str, /, **fields: Any) -> str:
        """Return what has happened; an empty string where that is not told."""
        return self._with_day(super().event(name, **fields))

    def note(self, line: str) -> str:
        """Return a line that is no event."""
        return self._with_day(super().note(line))

    def clients(self, entries: Sequence[ClientRow], verified: Sequence[str] = ()) -> str:
        """Return the known clients as aligned lines; ``verified``: whose keys are."""
        return self._with_day(super().clients(entries, verified))

    def messages(self, received: Delivery, via: str, is_secure: bool | None = None) -> str:
        """Return what somebody has sent."""
        if received.proof in DOUBTS or "\n" not in "".join(received.texts):
            return self._with_day(super().messages(received, via, is_secure))
        return self._with_day("".join([
            self._rows(received._replace(texts=[text], times=received.times[number:number + 1]), via)
            for number, text in enumerate(received.texts)]))

    def _rows(self, received: Delivery, via: str) -> str:
        first, *others = received.texts[0].replace("\r\n", "\n").split("\n", MOST_ROWS - 1)
        start = f"{self._name(received.sender)}| "
        return super().messages(received._replace(texts=[first]), via) + "".join(
            [f"{start}{clean(line)}\n" for line in others])


class AnswerFormatter(TextFormatter):
    """Messages as their bare texts, of one sender: what ``udpchat ask`` prints."""

    def messages(self, received: Delivery, via: str, is_secure: bool | None = None) -> str:
        """Return what somebody has sent."""
        return "".join([clean(text) + "\n" for text in received.texts])


class JsonFormatter(TextFormatter):
    """Events as JSON objects, one a line, for programs. ``wall`` returns the seconds since 1970."""

    is_for_programs = True

    def __init__(self, nick: str, wall: Callable[[], float], hidden: Collection[str] = ()) -> None:
        super().__init__(hidden=hidden)
        self.nick = nick
        self._now = wall

    def _object(self, type_: str, **fields: object) -> str:
        found = {"type": type_, "time": rfc3339(self._now()), **fields}
        return as_json({name: value for name, value in found.items() if value is not None}) + "\n"

    def event(self, name: str, /, **fields: Any) -> str:
        """Return what has happened; an empty string where that is not told."""
        if name in self._hidden:
            return ""
        form = EVENT_FORMATS[name]
        told = {field: fields[field] for field in FIELDS if field in fields}
        if form.type == "error":
            told["text"] = form.line.format(**fields)
        return self._object(form.type, reason=form.reason, **told)

    def messages(self, received: Delivery, via: str, is_secure: bool | None = None) -> str:
        """Return what somebody has sent, an object each; ``via``: the route that it came by."""
        sent: Sequence[str | None] = [rfc3339(at) for at in received.times] or [None] * len(received.texts)
        doubt = received.proof if received.proof in DOUBTS else None
        return "".join([
            self._object("unproven" if doubt else "message", **{"from": received.sender}, to=self.nick, reason=doubt,
                         text="" if doubt == BROKEN else text, id=f"{received.stream}:{number}", via=via, sent=at,
                         secure=is_secure)
            for number, (text, at) in enumerate(zip(received.texts, sent), received.first)])

    def clients(self, entries: Sequence[ClientRow], verified: Sequence[str] = ()) -> str:
        """Return the known clients, an object each."""
        return "".join([self._object("client", nick=nick, address=address, state=state,
                                     seen=rfc3339(seen) if seen else None, verified=True if nick in verified else None)
                        for nick, address, state, seen in entries])

    def help(self, text: str) -> str:
        """Return the list of commands."""
        return self._object("help", text=text)

    def undelivered(self, nick: str, text: str, ref: object) -> str:
        """Return the command that would send a message again."""
        again = {"send": nick, "text": text, "ref": ref}
        return as_json({name: value for name, value in again.items() if value is not None}) + "\n"


# --- the display ----------------------------------------------------------------------------------------------

class Display:
    """Where the events of a client go: to stdout, complaints to stderr; on a terminal, above the prompt.

    ``output`` and ``errors`` are the backlogs of stdout and stderr, ``formatter`` says how events are told, ``prompt``
    is None where there is no terminal. ``names_saved``: say for whom the server has saved a message, too.
    """

    names_saved = False
    last_sender = ""        # whose message was shown last

    def __init__(self, output: Output, errors: Output | None = None, formatter: TextFormatter | None = None,
                 prompt: Prompt | None = None) -> None:
        self.output = output
        self.errors = errors if errors is not None else Output(len)
        self.formatter = formatter if formatter is not None else TextFormatter()
        self.prompt = prompt
        self.write = output.write if prompt is None else self._write_above     # to stdout

    @property
    def asks(self) -> bool:
        """Whether somebody at a terminal is asked for commands."""
        return self.prompt is not None and self.prompt.asks

    @property
    def names_messages(self) -> bool:
        """Whether it matters which message an event is about: to programs, and to people who see what waits."""
        return self.formatter.is_for_programs or self.prompt is not None

    @property
    def pending(self) -> int:
        """The bytes that wait for stdout and stderr."""
        return self.output.pending + self.errors.pending

    def tell(self, event: str, /, times: int = 1, **fields: Any) -> None:
        """Show the line of an event, ``times`` times."""
        line = self.formatter.event(event, **fields)
        if line:
            self.write(line.encode() * times)
        else:
            self.remark(self.formatter.complaint(event, **fields) * times)
        if event == "saved" and self.names_saved:
            self.remark(f"[Saved for {fields['to']}.]\n")

    def note(self, line: str) -> None:
        """Write what only somebody at a terminal has to know."""
        self.write(self.formatter.note(line).encode())

    def remark(self, lines: str) -> None:
        """Write to stderr; on a terminal, above the prompt."""
        if lines:
            (self.errors.write if self.prompt is None else self.write)(lines.encode())

    def show_messages(self, received: Delivery, via: str, written: Callable[[int], None],
                      is_secure: bool | None = None) -> None:
        """Show texts of others; ``written`` hears how many of them are written, each time that some are.

        ``is_secure``: whether nobody but their sender and we could read them; None: nothing can be encrypted here.
        """
        self.last_sender = self.last_sender if received.proof in DOUBTS else received.sender
        self.write(self.formatter.messages(received, via, is_secure).encode(), written)

    def show_log(self, data: bytes) -> int:
        """Show lines of the log, which would go to the same terminal; return how many bytes were taken."""
        if not self.output.has_room():
            return 0
        self.write(data)
        return len(data)

    def _write_above(self, data: bytes, written: Callable[[int], None] | None = None) -> None:
        if data and self.prompt is not None:
            self.output.write(self.prompt.erase())
        self.output.write(data, written)

    def flush(self) -> None:
        """Write what can be written now, to both."""
        self.output.flush()
        self.errors.flush()

    def report_error(self) -> None:
        """Say why stdout cannot be written, unless it only has no reader any more."""
        if self.output.error:
            self.errors.write(f"udpchat: cannot write to stdout: {self.output.error}\n".encode())

    def draw(self, notices: Callable[[], Sequence[str]], prompt: str, is_ending: bool) -> None:
        """On a terminal, once all lines are written: draw the notices, and ask for the next command."""
        row = self.prompt
        if row is None or self.output.pending or (row.asks and is_ending):
            return
        self.output.write(row.draw(notices(), prompt))
        self.output.flush()


# --- who comes and goes ---------------------------------------------------------------------------------------

PRESENCE_DELAY = 2.0      # s; whoever is there, or away, for a shorter time is not announced to people
RETURN_TIME = 20.0        # s after our own return in which others may be on their way: who is away then is told later
NAMES_TOLD = 3            # in one line, at most


class Presence:
    """Who comes and goes: told to people, a little later, and to programs, at once.

    The others of the first whole table are no news. If the server has restarted, all come back, but not all at once.
    """

    def __init__(self, loop: Loop, display: Display, is_online: Callable[[str], bool]) -> None:
        """``is_online``: returns what the table says now."""
        self._loop, self._display, self._is_online = loop, display, is_online
        self._told: set[str] | None = None      # who is online, as the user knows; None: nothing was told yet
        self._news: dict[str, float] = {}       # of whom something else is true, and from when on it is told
        self._returned = -NEVER                 # when we had another session last, after one in which it was told
        self._timer = RestartableTimer(loop, self._tell_people)

    def begin(self, nicks: Iterable[str]) -> None:
        """Take those who are online as known: a session has begun, and its table is whole."""
        if self._told is None:
            self._told = set(nicks)

    def on_session(self) -> None:
        """Note that we have a session, perhaps after another one."""
        if self._told is not None:
            self._returned = self._loop.now()

    def end(self) -> None:
        """Tell nothing until another session has begun."""
        self._told = None
        self._news.clear()

    def note(self, nicks: Iterable[str]) -> None:
        """Note that the table says something new of these."""
        for nick in nicks:
            is_online = self._is_online(nick)
            if self._told is None or (nick in self._told) is is_online:
                self._news.pop(nick, None)
            elif self._display.asks:
                due = self._loop.now() + PRESENCE_DELAY
                self._news.setdefault(nick, due if is_online else max(due, self._returned + RETURN_TIME))
            elif self._display.formatter.is_for_programs:
                self._turn(nick)
                self._display.tell("client-online" if is_online else "client-offline", nick=nick)
        self._timer.set(min(self._news.values(), default=NEVER))

    def _turn(self, nick: str) -> bool:
        """Note that the user knows; return whether the nick is online now."""
        assert self._told is not None
        self._told ^= {nick}
        return nick in self._told

    def _tell_people(self) -> None:
        now = self._loop.now()
        due = [nick for nick, when in self._news.items() if when <= now]
        for nick in due:
            del self._news[nick]
        came: list[str] = []
        went: list[str] = []
        for nick in due:
            (came if self._turn(nick) else went).append(nick)
        for event, nicks in (("client-offline", went), ("client-online", came)):
            if nicks:
                self._display.tell(event if len(nicks) == 1 else event + "s", nick=_names(sorted(nicks)))
        self._timer.set(min(self._news.values(), default=NEVER))


def _names(nicks: Sequence[str]) -> str:
    """Return names for a sentence, a few of them."""
    shown = list(nicks[:NAMES_TOLD])
    if len(nicks) > NAMES_TOLD:
        shown.append(f"{len(nicks) - NAMES_TOLD} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


# --- receipts -------------------------------------------------------------------------------------------------

CLOSINGS = (RECEIVED, SAVED, REFUSED)
OWN_REFUSALS = ("not-secure", "key-changed")        # our own: the message does not go out at all
REFUSALS = ("unknown", "full", "disk", "key", *OWN_REFUSALS)        # that have a line of their own
WAIT_SHOWN = 1.0          # s that a message waits before a terminal shows that it does
WAITS_SHOWN = 3           # recipients named there, at most


class SentMessage(NamedTuple):
    """A message on its way: what an event says of the one that it is about."""

    number: int         # the first that it takes in its stream
    id: str
    ref: object         # what its sender calls it
    began: float        # s, when it was queued


class Receipts:
    """What became of each message, told to the user; and what is handed back at the end.

    A conversation reports its events in numbers of messages. Only where it matters which message an event is about (on
    a terminal, and to programs) each message is remembered until it is closed.
    """

    def __init__(self, loop: Loop, display: Display, goes_direct: Callable[[str], bool],
                 observer: Observer | None) -> None:
        """``goes_direct``: returns whether the messages for a nick go straight there at present."""
        self.has_failed = False         # some message was neither delivered nor kept
        self.undelivered = 0            # messages handed back
        self.is_secure: Callable[[str, int], bool | None] = lambda nick, number: None   # see ``Display``
        self._loop, self._display, self._goes_direct, self._observer = loop, display, goes_direct, observer
        self._names_messages = display.names_messages
        self._on_their_way: dict[str, deque[SentMessage]] = {}
        self._handed: dict[str, deque[SentMessage]] = {}        # the same, of other programs, where ours do not matter
        self._wait_timer = RestartableTimer(loop, wake_up)        # the end of the turn shows who waits

    # before a message is queued

    def short_enough(self, command: SendCommand, texts: list[str]) -> list[str]:
        """Return those of ``texts``, out of ``command``, that are not too long; tell which are."""
        size = command.size
        if not size and are_short(texts, MAX_TEXT):
            return texts
        return [text for text in texts if self._fits(max(size, len(text.encode())), command)]

    def _fits(self, size: int, command: SendCommand) -> bool:
        if size > MAX_TEXT:
            self.has_failed = self.has_failed or not isinstance(command.ref, Handed)
            if self._observer is not None:
                self._observer.on_too_long(command.nick)
            self._tell_one("too-long", command.ref, True, size=size, most=MAX_TEXT, to=clean(command.nick))
        return size <= MAX_TEXT

    def tell_unknown(self, send: SendCommand) -> None:
        """Close texts for somebody who is not known."""
        texts = self.short_enough(send, send.texts)
        if isinstance(send.ref, Handed):
            for _ in texts:
                send.ref.tell("unknown", True, to=clean(send.nick))
            return
        self.has_failed = True
        if self._observer is not None:
            self._observer.on_unknown(send.nick, len(texts))
        if not self._display.formatter.is_for_programs:
            self._display.tell("unknown", len(texts), to=clean(send.nick))
            return
        for text in texts:
            self._display.tell("unknown", to=send.nick, text=text, ref=send.ref)

    def track(self, nick: str, stream: int, number: int, texts: list[str], ref: object) -> None:
        """Remember texts that are about to be queued, from ``number`` on in that stream, if it matters."""
        if not (self._names_messages or isinstance(ref, Handed)):
            return
        sent = (self._on_their_way if self._names_messages else self._handed).setdefault(nick, deque())
        for text in texts:
            sent.append(SentMessage(number, f"{stream}:{number}", ref, self._loop.now()))
            number += len(split_text(text))

    # what becomes of it

    def tell(self, nick: str, event: Event) -> None:
        """Tell what has happened to messages for ``nick``."""
        if self._observer is not None:
            self._observer.on_event(nick, event)
        name = event.kind.event_name
        if event.kind is REFUSED:
            name = event.reason if event.reason in REFUSALS else "disk"
        meant, others = self._meant(nick, event), 0     # others: those that are only counted
        if not self._names_messages:
            others = event.messages - len(meant)
            self._display.tell(name, others, to=nick)
        for sent in meant:
            self._tell_one(name, sent.ref, event.kind in CLOSINGS, to=nick, id=sent.id,
                           **self._outcome(nick, event, sent))
        if event.kind is REFUSED and (others or not all(isinstance(sent.ref, Handed) for sent in meant)):
            self.has_failed = True

    def _tell_one(self, name: str, ref: object, is_closing: bool, **fields: Any) -> None:
        """Tell what has happened to one message, to whoever has sent it."""
        if isinstance(ref, Handed):
            ref.tell(name, is_closing, **fields)
        else:
            self._display.tell(name, ref=ref, **fields)

    def tell_silence(self, nick: str) -> None:
        """Tell other programs whose messages for ``nick`` wait that the server does not respond."""
        for sent in (self._on_their_way if self._names_messages else self._handed).get(nick, ()):
            if isinstance(sent.ref, Handed):
                sent.ref.tell("silent", False)

    def _meant(self, nick: str, event: Event) -> list[SentMessage]:
        """Return the messages that we remember and an event is about; forget those that it closes."""
        book = self._on_their_way if self._names_messages else self._handed
        sent = book.get(nick)
        if sent is None:
            return []
        if event.kind not in CLOSINGS:
            return [message for message in sent if event.first <= message.number < event.end]
        found = []
        while sent and sent[0].number < event.end:
            found.append(sent.popleft())
        if not sent:
            del book[nick]
        return found

    def _outcome(self, nick: str, event: Event, sent: SentMessage) -> dict[str, Any]:
        """Return by which route a message went, and how many milliseconds it took, once it is closed."""
        if event.kind not in CLOSINGS:
            return {}
        if event.kind is RECEIVED or event.reason in OWN_REFUSALS:
            via = "direct"
        else:
            via = "relay" if event.relayed else "mail"
        outcome = {"via": via, "ms": round((self._loop.now() - sent.began) * 1000, 3)}
        is_secure = self.is_secure(nick, sent.number) if event.kind is not REFUSED else None
        return outcome if is_secure is None else {**outcome, "secure": is_secure}

    # what takes long

    def notices(self) -> list[str]:
        """Return a line for each recipient whose messages wait for longer than one would expect."""
        now, late, next_ = self._loop.now(), [], NEVER
        for nick, sent in self._on_their_way.items():
            if now >= sent[0].began + WAIT_SHOWN:
                late.append(nick)
            else:
                next_ = min(next_, sent[0].began + WAIT_SHOWN)
        self._wait_timer.set(next_)
        lines = [self._notice(nick, self._goes_direct(nick)) for nick in late[:WAITS_SHOWN]]
        others = len(late) - WAITS_SHOWN
        if others > 0:
            lines.append(f"[{_count(others, 'more recipient')} to wait for.]")
        return lines

    def _notice(self, nick: str, is_direct: bool) -> str:
        waiting = _count(len(self._on_their_way[nick]), "message")
        return f"[Waiting for {nick}: {waiting}.]" if is_direct else f"[Waiting for the server: {waiting} for {nick}.]"

    # the end

    def hand_back(self, send: SendCommand) -> None:
        """Name messages that were never queued, as the lines that would send them again."""
        for text in self.short_enough(send, send.texts):
            self._hand_back(send.nick, text, send.ref, None)

    def hand_back_all(self, undelivered: Iterator[tuple[str, str, int]]) -> None:
        """Name the messages, (recipient, text, number) each, that were queued and are not closed."""
        for nick, text, number in undelivered:
            sent = self._on_their_way.get(nick) or self._handed.get(nick)
            if sent and sent[0].number == number:
                message = sent.popleft()
                self._hand_back(nick, text, message.ref, message.id)
            else:
                self._hand_back(nick, text, None, None)
        self._on_their_way.clear()

    def _hand_back(self, nick: str, text: str, ref: object, id_: str | None) -> None:
        if isinstance(ref, Handed):
            ref.tell("undelivered", True, to=nick, id=id_)
            return
        self.undelivered += 1
        self._display.errors.write(self._display.formatter.undelivered(nick, text, ref).encode())
        self._display.tell("undelivered", to=nick, text=text, ref=ref, id=id_)

    def tell_undelivered(self) -> None:
        """Tell how many messages were handed back."""
        if self.undelivered:
            name = "one-undelivered" if self.undelivered == 1 else "more-undelivered"
            self._display.tell(name, count=self.undelivered)


def _count(number: int, what: str) -> str:
    """Return ``1 message``, ``2 messages``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- the shell ------------------------------------------------------------------------------------------------

ANSWER_LIMIT = 2 ** 20    # bytes of backlog for stdout at which no command is read: its writer may not read meanwhile
LINES_PER_TURN = 512      # commands carried out before the network gets its turn; sends to one nick are one
SHOWN_OF_LINE = 80        # characters of a line that nobody understands


class PeerKeys(Protocol):
    """What the shell asks of the keys of others. Digits are "" where there is no key."""

    def digits(self, nick: str) -> str: ...                 # for people to compare; of "": those of one's own key
    def verify(self, nick: str) -> str: ...                 # return the event that says why not, "" if it is done
    def trust(self, nick: str) -> str: ...                  # return the digits, as above
    def is_verified(self, nick: str) -> bool: ...


class ChatClient(Protocol):
    """What the shell asks of the client."""

    nick: str

    @property
    def peer_keys(self) -> PeerKeys | None: ...             # None: nothing can be encrypted

    @property
    def is_offline(self) -> bool: ...                       # it has deregistered
    def accepts_commands(self) -> bool: ...                   # now
    def dereg(self) -> None: ...                            # go offline, once all sends before are settled
    def reg(self) -> None: ...                              # come online
    def quit(self) -> None: ...                             # go offline, and end
    def clients(self) -> list[ClientRow]: ...               # in the order of the nicks
    def wall(self) -> float: ...                            # s since 1970
    def nicks_like(self, word: str, most: int) -> list[str]: ...    # that begin so, best first
    def spelling_of(self, nick: str) -> str | None: ...     # as it is registered; None: there is no such client
    @property
    def check_table(self) -> Callable[[], None]: ...        # ask whether somebody is missing, before the next command
    @property
    def await_key(self) -> Callable[[str], bool]: ...       # is the next command to wait until somebody's key is here?
    @property
    def settle_sends(self) -> Callable[[], None]: ...       # send, or refuse, what was queued


class Commands:
    """What the commands say and do that need no more than the client: all but ``send``, ``talk`` and ``end``."""

    def __init__(self, client: ChatClient, display: Display, reader: CommandReader,
                 tell_usage: Callable[[str], None]) -> None:
        """``tell_usage``: tells how the command with a name is given."""
        self._client, self._display, self._reader, self._tell_usage = client, display, reader, tell_usage
        self.methods: dict[str, Callable[..., None]] = {
            "dereg": self._dereg, "reg": self._reg, "who": self._who, "help": self._help, "quit": client.quit,
            "fingerprint": self._fingerprint, "verify": self._verify, "trust": self._trust}

    def _is_own_nick(self, word: str) -> bool:
        return self._client.nick in (word, self._client.spelling_of(word))

    def _dereg(self, word: str) -> None:
        if self._is_own_nick(word):
            self._client.dereg()
        else:
            self._display.tell("dereg-other")

    def _reg(self, word: str) -> None:
        if not self._is_own_nick(word):
            self._display.tell("reg-other", nick=self._client.nick)
        elif self._client.is_offline:
            self._client.reg()
        else:
            self._display.tell("registered-already")

    def _who(self, which: str = "") -> None:
        if which not in ("", "all"):
            self._tell_usage("who")
            return
        rows = self._client.clients()
        known = len(rows)
        if self._display.asks:
            rows = rows_for_people(rows, self._client.nick, since=0 if which else self._client.wall() - LONG_AWAY)
        keys = self._client.peer_keys if self._display.names_messages else None
        verified = [nick for nick, *_ in rows if keys.is_verified(nick)] if keys is not None else []
        self._display.write(self._display.formatter.clients(rows, verified).encode())
        if len(rows) < known:
            self._display.note(f"[Away for a month: {known - len(rows)} more, try {self._reader.slash}who all.]")

    def _fingerprint(self, word: str = "") -> None:
        keys, me = self._client.peer_keys, self._client.nick
        nick = self._client.spelling_of(word) if word else me
        digits = keys.digits(nick if word else "") if keys is not None and nick is not None else ""
        if nick is None or not digits:
            self._tell_of_keys("no-key" if nick is not None else "talk-unknown", nick or word)
        elif word:
            self._display.tell("fingerprint-with", nick=me, to=nick, fingerprint=digits)
        else:
            self._display.tell("fingerprint", nick=me, fingerprint=digits)

    def _verify(self, word: str) -> None:
        keys, nick = self._client.peer_keys, self._client.spelling_of(word)
        problem = keys.verify(nick) if keys is not None and nick is not None else "no-key"
        self._tell_of_keys(("talk-unknown" if nick is None else problem) or "verified", nick or word)

    def _trust(self, word: str) -> None:
        keys, nick = self._client.peer_keys, self._client.spelling_of(word)
        self._client.settle_sends()     # what was sent before is refused, as it was said
        digits = keys.trust(nick) if keys is not None and nick is not None else ""
        self._tell_of_keys("talk-unknown" if nick is None else "trusted" if digits else "no-key", nick or word, digits)

    def _tell_of_keys(self, event: str, nick: str, digits: str = "") -> None:
        if event in ("verified", "trusted"):
            self._display.tell(event, to=nick, fingerprint=digits or None)
        else:
            self._display.tell(event, nick=clean(nick), help=f"{self._reader.slash}trust {nick}")

    def _help(self) -> None:
        import textwrap     # here: few ask for help, and a start is measured
        prompt = self._display.prompt
        columns = max(prompt.tty.size()[0], 2 * HELP_INDENT) if prompt is not None else LINE_LIMIT
        told = [spec.told_to(self._display) for spec in COMMANDS.values() if spec.help]
        lines = [textwrap.fill(f"{self._reader.slash + usage:{HELP_INDENT}}{line}", columns,
                               subsequent_indent=" " * HELP_INDENT) for usage, line in told]
        self._display.write(self._display.formatter.help("\n".join([*lines, ""])).encode())


class Shell:
    """The command language: takes in lines, and carries them out in order, by calling the client and ``Commands``.

    ``has_failed``: a line was no command, and nobody has seen that: it may have been meant as a message.
    """

    def __init__(self, client: ChatClient, display: Display, receipts: Receipts,
                 queue: Callable[[SendCommand], bool], is_typed: bool) -> None:
        """``queue``: queues as many texts for a known nick as there is room for, and removes them from the command;
        returns False if none could be queued now. ``is_typed``: somebody types at a terminal, and sees what is wrong.
        """
        self.has_failed = False
        self.rest_of_line: Callable[[], tuple[bytes, bool]] = lambda: (b"", False)     # see ``Reader``
        self._is_typed = is_typed
        self.has_ended = False      # nothing more will come from stdin
        self._client, self._display, self._receipts, self._queue = client, display, receipts, queue
        self._is_closed = False
        self._checked: Sequence[str] = []   # nicks, of which one is not in the table, as the server has been asked
        self._reader = CommandReader(display.formatter.is_for_programs, is_typed)
        self.waiting = self._reader.waiting     # what was read and not carried out
        commands = Commands(client, display, self._reader, self._tell_usage)
        self._methods: dict[str, Callable[..., None]] = {       # of the commands in ``COMMANDS``, but for ``send``
            **commands.methods, "talk": self._do_talk, "end": self._do_end}

    # in

    @property
    def prompt(self) -> str:
        """What asks for the next command."""
        return self._reader.prompt

    def feed(self, data: bytes) -> None:
        """Accept what was read from stdin; b"" at its end."""
        if self._display.prompt is not None and b"\n" in data:
            self._display.prompt.answered()
        self._reader.feed(data)
        self.has_ended = self._reader.ended

    def enter(self, lines: Sequence[str], pasted: bool = False) -> None:
        """Accept lines that were typed at a terminal, see ``CommandReader``; none once the client is about to end."""
        if not self._is_closed:
            self._reader.enter(lines, pasted)

    def put(self, nicks: Sequence[str], text: str, size: int) -> None:
        """Accept one text for each of ``nicks``, as if it had come in by ``feed``; ``size``: see ``SendCommand``.

        Two of them may turn out to be spellings of one nick: it gets the text once.
        """
        queue, served = self._queue, set[str]()

        def queue_once(send: SendCommand) -> bool:
            if send.nick in served:
                send.texts = []
            elif not queue(send):
                return False
            served.add(send.nick)
            return True

        self._queue = queue_once
        for nick in nicks:
            self._reader.put(SendCommand(nick, [text], None, size))

    def hand_over(self, guest: Guest, line: bytes) -> None:
        """Accept a message of another program: what a ``HandOver`` says."""
        import json
        try:
            found = json.loads(line)
            nicks, text, size = found["send"], found["text"], found["size"]
        except (ValueError, RecursionError, KeyError, TypeError):
            nicks, text, size = [], "", 0
        is_valid = type(nicks) is list and all(type(nick) is str for nick in nicks) and nicks
        if not is_valid or type(text) is not str or type(size) is not int:
            guest.close()
            return
        handed = Handed(guest.write, guest.end, len(nicks))
        for nick in nicks:
            self._reader.put(SendCommand(nick, [re.sub(SURROGATES, "\ufffd", text)], handed, size))

    def close(self, forget: bool) -> None:
        """Accept no typed lines any more, and ``forget`` the commands that wait: the client is about to end."""
        self._is_closed = True
        if forget:
            self._reader.forget()

    # carrying out

    def may_run(self) -> bool:
        """Return whether a command may be carried out now: there is room for what it may say, too."""
        display = self._display
        return (self._client.accepts_commands()
                and display.output.pending < ANSWER_LIMIT and display.errors.pending < OUTPUT_LIMIT)

    def run(self) -> None:
        """Carry out the commands that wait, in order, as far as that is possible now."""
        for _ in range(LINES_PER_TURN):
            if not self.waiting or not self.may_run():
                return
            command = self._reader.next_command()
            if command.echo:
                self._display.write((clean(command.echo) + "\n").encode("utf-8", "replace"))
            nicks = self._nicks_of(command)
            if command.send is not None and len(nicks) > 1:
                self.waiting.extendleft(reversed(self._one_by_one(command.send)))
                continue
            if self._asks_first(nicks, is_about=command.send is None):
                self.waiting.appendleft(command._replace(echo=""))
                continue        # if the server is asked, no command may run
            if command.send is not None:
                if not self._do_send(command.send):
                    return
            elif command.invalid:
                self._note_failure()
                event = "no-text" if command.has_no_text else "object"
                self._display.tell(event, line=clean(command.invalid[:SHOWN_OF_LINE]), ref=command.ref)
            elif command.words:
                self._do(*command.words)

    def _one_by_one(self, send: SendCommand) -> list[SendCommand]:
        """Return the same texts for each of several nicks; two spellings of one nick get them once."""
        nicks = dict.fromkeys(self._client.spelling_of(nick) or nick for nick in nicks_in(send.nick))
        return [SendCommand(nick, list(send.texts), send.ref, send.size) for nick in nicks]

    @staticmethod
    def _nicks_of(command: Command) -> list[str]:
        """Return the nicks of others that a command names."""
        if command.send is not None:
            return nicks_in(command.send.nick) if command.send.nick else []
        if command.words and command.words[0] in ABOUT_PEERS and len(command.words) > 1:
            return nicks_in(" ".join(command.words[1:]))
        return []

    def _asks_first(self, nicks: Sequence[str], is_about: bool) -> bool:
        """Ask the server about somebody whom a command names, if that is needed; return whether something was asked.

        Whoever is not in our table may be a newcomer. And of somebody who is, the key may not have been told; that
        matters to a command that ``is_about`` them.
        """
        if not nicks or self._client.is_offline:
            self._checked = []
            return False
        known = [self._client.spelling_of(nick) for nick in nicks]
        self._checked = nicks if None in known and nicks != self._checked else []
        if self._checked:
            self._client.check_table()
        return bool(self._checked) or (is_about and any(
            [nick is not None and self._client.await_key(nick) for nick in known]))

    def _do_send(self, send: SendCommand) -> bool:
        """Send texts; return False if some must wait."""
        if self._client.is_offline:
            self._refuse_offline(send)
            return True
        nick = self._client.spelling_of(send.nick)
        if nick is None:
            self._receipts.tell_unknown(send)
            return True
        send.nick = nick
        if isinstance(send.ref, Handed) and not send.ref.is_first_for(nick, send):
            return True
        is_done = self._queue(send)
        if send.texts:
            self._reader.waiting.appendleft(send)
        return is_done

    def _refuse_offline(self, send: SendCommand) -> None:
        if isinstance(send.ref, Handed):
            self._receipts.hand_back(send)
            return
        for text in send.texts:
            self._display.tell("send-while-offline", usage=self._way_back(), to=send.nick, text=text, ref=send.ref)

    def _do(self, name: str, *words: str) -> None:
        spec, slash = COMMANDS.get(name), self._reader.slash
        if self._client.is_offline and (spec is None or not spec.works_offline):
            self._display.tell("command-while-offline", usage=self._way_back())
        elif spec is None or (spec.only_in_talk and not slash):
            self._note_failure()
            self._display.tell("command", name=clean(slash + name), help=slash + "help")
            self._hint(name)
        else:
            self._carry_out(name, words)

    def _carry_out(self, name: str, words: Sequence[str]) -> None:
        """Do what a command says if it has the words that its usage asks for; tell the usage if not."""
        if self._is_typed and not words and COMMANDS[name].completes is Completion.SELF:
            words = (self._client.nick,)
        usage, _ = COMMANDS[name].told_to(self._display)
        most = len(usage.split()) - 1
        is_complete = most - usage.count("[") <= len(words) <= most
        if name == "send" or not is_complete:       # a ``send`` that is complete is no word here
            self._tell_usage(name)
        else:
            self._methods[name](*words)

    def _tell_usage(self, name: str) -> None:
        """Tell how a command is given."""
        self._note_failure()
        self._display.tell("usage", usage=self._reader.slash + COMMANDS[name].told_to(self._display)[0])

    def _hint(self, word: str) -> None:
        """Tell somebody at a terminal what may have been meant."""
        if self._display.asks and not self._reader.slash:
            nick = self._client.spelling_of(word) or "NICK"
            self._display.note(f"[To say something: talk {nick}, or send {nick} MESSAGE.]")

    def _note_failure(self) -> None:
        """Note that a line was no command."""
        self.has_failed = self.has_failed or not self._is_typed

    def reading_failed(self, reason: str) -> None:
        """Report that stdin cannot be read any more: what should have come is missing."""
        self.has_failed = True
        self._display.errors.write(f"udpchat: cannot read stdin: {reason}\n".encode())

    def _way_back(self) -> str:
        """Return what to say to come online."""
        return f"{self._reader.slash}reg {self._client.nick}"

    def _do_talk(self, word: str) -> None:
        nicks = {name: self._client.spelling_of(name) for name in nicks_in(word)}
        unknown = [name for name, nick in nicks.items() if nick is None]
        if unknown:
            self._note_failure()        # the lines that follow would go to nobody
            for name in unknown:
                self._display.tell("talk-unknown", nick=clean(name))
        else:
            self._reader.talk = ",".join(dict.fromkeys(filter(None, nicks.values())))

    def _do_end(self) -> None:
        self._reader.talk = ""

    def hand_back_rest(self) -> None:
        """Report the texts of the lines that were read, but are not carried out any more, as not delivered.

        A line of which only the beginning was read is read to its end, so that whoever reads stdin behind us finds
        whole lines.
        """
        if self._reader.unfinished and not self._is_typed:
            self._reader.finish(*self.rest_of_line())
        while self.waiting:
            command = self._reader.next_command()
            if command.send is not None:
                several = len(nicks_in(command.send.nick)) > 1
                for send in self._one_by_one(command.send) if several else (command.send,):
                    self._receipts.hand_back(send)
            elif command.words:
                name, *words = command.words
                if name == "talk" or (name == "end" and self._reader.talk):
                    self._carry_out(name, words)            # it says to whom the lines behind it were to go
                elif name == "quit":
                    self._reader.forget()                           # what stands behind it was not meant to be done
        if self._reader.unfinished and not self._is_typed:          # the rest of it is not there yet
            self.has_failed = True
            self._display.remark(f"udpchat: read only in part: {clean(self._reader.unfinished)}\n")

    # completion

    def complete(self, before: str) -> tuple[int, list[str]]:
        """Return where the word at the end of ``before`` begins, and what it may become, best first."""
        start = before.rfind(" ") + 1
        words, word = before[:start].split(), before[start:]
        slash, me = self._reader.slash, self._client.nick
        if not before and self._display.last_sender:
            return 0, [f"{slash}send {self._display.last_sender}"]
        if not words:
            return start, command_names(word, slash)
        name = words[0].removeprefix(COMMAND_MARK)
        spec = COMMANDS.get(ALIASES.get(name, name)) if words[0].startswith(slash) else None
        if len(words) > 1 or spec is None or spec.completes is None:
            return start, []
        if spec.completes is Completion.SELF:
            return start, [me] if me.startswith(word) or folded(me).startswith(folded(word)) else []
        before_it = word[:word.rfind(",") + 1]
        taken = {me, *before_it.split(",")}
        found = self._client.nicks_like(word[len(before_it):], COMPLETIONS)
        return start + len(before_it), [nick for nick in found if nick not in taken]


def command_names(word: str, slash: str) -> list[str]:
    """Return the commands that begin like a word; ``slash``: what they must begin with."""
    mark = COMMAND_MARK if word.startswith(COMMAND_MARK) else slash
    names = [name for name in COMMANDS if slash or not COMMANDS[name].only_in_talk]
    found = [mark + name for name in sorted(names, key=lambda name: (name != "send", name))]
    return [name for name in found if mark + word and name.startswith(word)]


# --- the console ----------------------------------------------------------------------------------------------

class RunningClient(Protocol):
    """What the console asks of the client."""

    @property
    def wants_input(self) -> bool: ...                      # stdin may be read
    def settle(self) -> None: ...                           # end a turn


class LeavingClient(Protocol):
    """What the console asks of the part of the client that knows the end."""
    exit_code: int | None                                   # None until the end
    def interrupt(self) -> None: ...                        # leave in order; the second time, at once


class Console:
    """Connects a client to the standard streams. Each is watched only while something is wanted of it."""

    def __init__(self, loop: SelectorLoop, client: RunningClient, leaving: LeavingClient, shell: Shell,
                 display: Display, reader: Reader, writer: Writer, errors: Writer) -> None:
        self._loop, self._client, self._leaving, self._shell = loop, client, leaving, shell
        self._display, self._reader, self._writer, self._errors = display, reader, writer, errors
        shell.rest_of_line = reader.rest_of_line
        self._status: StatusRow | None = None
        self._editor: EditorScreen | None = None
        if display.prompt is not None:
            import editor
            self._status = display.prompt if isinstance(display.prompt, editor.StatusRow) else None
            self._editor = display.prompt if isinstance(display.prompt, editor.EditorScreen) else None
        self._is_open = True                    # the terminal, as long as it has not hung up
        self._watched = (False, False, False)   # stdin, stdout and stderr

    def start(self) -> None:
        """End every turn of the loop here from now on."""
        self._loop.settle = self._settle
        if self._writer.is_pipe and sys.platform == "linux":
            # only an error is reported there, once the last reader has gone: no write is needed to notice that
            self._loop.watch(self._writer.fd, selectors.EVENT_READ, self._on_reader_gone)
        if self._status is not None:
            status, timer = self._status, RestartableTimer(self._loop, self._status.resize)
            self._loop.on_signal(signal.SIGWINCH, lambda: timer.set(self._loop.now() + status.resized()))
            self._loop.on_signal(signal.SIGCONT, status.resume)
        if self._editor is not None:
            self._loop.on_signal(signal.SIGTSTP, self._editor.suspend)
            self._editor.open()

    def close(self) -> None:
        """Leave the terminal as it was, whatever has happened."""
        if self._editor is not None:
            self._editor.close()

    def _settle(self) -> None:
        client, display = self._client, self._display
        client.settle()
        if self._leaving.exit_code is not None:
            self._loop.stop()
            return
        wanted = (client.wants_input if self._editor is None else self._is_open,
                  display.output.pending > 0, display.errors.pending > 0)
        if wanted != self._watched:
            self._watch(wanted)

    def _watch(self, wanted: tuple[bool, bool, bool]) -> None:
        fds = (self._reader.fd, self._writer.fd, self._errors.fd)
        events = (selectors.EVENT_READ, selectors.EVENT_WRITE, selectors.EVENT_WRITE)
        callbacks = (self._on_readable, self._on_writable, self._on_writable)
        for fd, event, callback, had, has in zip(fds, events, callbacks, self._watched, wanted):
            if has != had:
                self._loop.watch(fd, event, callback if has else None)
        self._watched = wanted

    def _on_readable(self) -> None:
        if self._editor is None and not self._client.wants_input:
            return      # this very turn has ended the client: what is not read is not lost
        data = self._reader.read()
        if data and self._editor is not None:
            self._loop.handle_signals()     # a read in the background stops the job: whatever continued it comes first
            for action in self._editor.type(data):
                self._act(action)
        elif data is not None:
            self._is_open = bool(data)
            if self._reader.error:
                self._shell.reading_failed(self._reader.error)
            self._shell.feed(data)

    def _act(self, action: Action) -> None:
        from editor import ActionKind
        if action.kind is ActionKind.SUBMIT:
            self._shell.enter(action.lines, action.pasted)
        elif action.kind is ActionKind.INTERRUPT:
            self._leaving.interrupt()
        else:
            self._shell.feed(b"")

    def _on_writable(self) -> None:
        """Do nothing: the turn ends with a write."""

    def _on_reader_gone(self) -> None:
        self._loop.watch(self._writer.fd, selectors.EVENT_READ, None)
        self._display.output.give_up()


# --- a message in other hands ---------------------------------------------------------------------------------

FLUSH_INTERVAL = 0.05     # s between attempts to write what stdout or stderr do not take at once


class HandOver:
    """Hands one message to the client of the same user that has the nick, and tells what becomes of it there.

    From the moment when the message was sent it is in the hands of that client: it is never sent by another way.
    """

    def __init__(self, loop: SelectorLoop, sock: socket.socket, display: Display, nicks: Sequence[str], text: str,
                 size: int, is_patient: bool) -> None:
        """``sock``: to the client, which is willing. ``is_patient``: a server that does not respond is waited for."""
        import json
        self.receipts = Receipts(loop, display, lambda nick: False, None)
        self._loop, self._sock, self._display, self._is_patient = loop, sock, display, is_patient
        self._text = text
        self._open = {folded(nick): nick for nick in nicks}     # whose messages are not closed
        self._line, self._is_over = b"", False
        self._flush_timer = RestartableTimer(loop, wake_up)
        if max(size, len(text.encode())) > MAX_TEXT:
            size, text = max(size, len(text.encode())), ""      # it is only refused
        request = {"send": list(nicks), "text": text, "size": size}
        self._request = Output(functools.partial(send_some, sock))
        self._request.write((json.dumps(request, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        sock.setblocking(False)
        loop.watch(sock.fileno(), selectors.EVENT_READ, self._on_readable)
        loop.watch(sock.fileno(), selectors.EVENT_WRITE, self._on_writable)
        loop.settle = self._settle

    @property
    def exit_code(self) -> int:
        """What the program ends with."""
        failed = self.receipts.has_failed or self.receipts.undelivered or self._display.output.broken
        return int(bool(failed))

    def _on_writable(self) -> None:
        self._request.flush()
        if not self._request.pending:       # all is sent, or nobody reads it: then the end comes by reading
            self._loop.watch(self._sock.fileno(), selectors.EVENT_WRITE, None)

    def _on_readable(self) -> None:
        data = receive_some(self._sock)
        if data is None:
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._on_event(line)
        if not data:
            self.give_up("it has ended")
        elif len(self._line) > JSON_LIMIT:
            self.give_up("it says what nobody understands")

    def _on_event(self, line: bytes) -> None:
        import json
        try:
            fields = json.loads(line)
            name = fields.pop("event")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return
        to = fields.get("to")
        if name == "end":
            self._finish()
        elif name == "silent":
            if not self._is_patient:
                self._display.tell("silent")
                self.give_up("it waits for the server")
                self._display.tell("exiting")
        elif name == "undelivered":
            self.give_up("it has not delivered it", [to] if type(to) is str else [])
        elif name in HANDED_EVENTS and type(to) is str:
            form = EVENT_FORMATS[name]
            self.receipts.has_failed = self.receipts.has_failed or form.is_failure
            told = {field: fields[field] for field in (*FIELDS, "most") if field in fields}
            if name == "unknown":
                told["text"] = self._text
            self._display.tell(name, **{"size": 0, "most": MAX_TEXT, **told})
            if form.is_failure or form.type in ("received", "saved"):
                self._open.pop(folded(to), None)

    def give_up(self, why: str, nicks: Sequence[str] = ()) -> None:
        """Hand back what is for ``nicks``; by default all that is open, and end: nobody hears what becomes of it."""
        if self._is_over:
            return
        self._display.remark(f"udpchat: the message is in the hands of a client of yours, and {clean(why)}\n")
        for nick in [self._open.pop(folded(nick), None) for nick in list(nicks or self._open)]:
            if nick is not None:
                self.receipts.hand_back(SendCommand(nick, [self._text]))
        if not nicks:
            self._finish()

    def _finish(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._loop.watch(self._sock.fileno(), selectors.EVENT_READ, None)
            self._loop.watch(self._sock.fileno(), selectors.EVENT_WRITE, None)
            self._sock.close()
            self.receipts.tell_undelivered()

    def _settle(self) -> None:
        display = self._display
        display.flush()
        if display.output.broken:
            display.report_error()
            self._finish()
            display.errors.flush()
        if self._is_over and not display.pending:
            self._loop.stop()
        elif display.pending and not self._flush_timer.is_set:
            self._flush_timer.set(self._loop.now() + FLUSH_INTERVAL)


HANDED_EVENTS = frozenset(("received", "saved", "no-ack", "offline", "exists", "too-long", *REFUSALS))
