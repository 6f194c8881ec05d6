"""What goes in and out of the standard streams: what is typed and asked for, what is said, and how it is drawn.

Rules of this file
------------------
- Nothing waits. Bytes come in, bytes to write go out. Only ``Reader``, ``Writer``, ``Terminal`` (its settings),
  ``History`` (its file) and ``Desk`` (which stops this job, as Ctrl-Z does) touch the world.
- It does not decide anything: what a command means is the client's affair, and so is when an event is told.
- Whatever bytes come, however they are cut: nothing raises, and the cuts change nothing.
- Nothing that is drawn moves the cursor on its own: control characters are drawn as two printable ones.
- It is imported whenever the program starts, which is to be quick: what only a terminal needs is imported late, and
  a pattern is compiled when it is first used (``re`` remembers it).

What is asked for and said
--------------------------
``Commands`` turns stdin into commands: plain lines, lines of a talk with somebody, or JSON objects. ``SAYINGS`` names
every event and how it is told; ``Lines`` tells them to people and to scripts that read what people read, ``JsonLines``
to programs.

From keys to lines
------------------
``Keys`` turns bytes into keys. A run of printable characters is one key, and so is a bracketed paste; what is
unfinished (a character, an escape sequence, a paste) waits for the next bytes. There is no timer: an Escape by itself
goes with whatever is typed next, as in readline. ``Editor`` turns keys into a changed line and into actions for
its owner, above all ``submit``. A paste never submits: the newlines in it stay in the text until Enter, and then each
of its lines is one line for the owner.

What is drawn
-------------
The *area* is the lowest part of what is on the screen: notices, below them the prompt and the text. Everything above
it belongs to the owner, who takes it off (``erase``), writes whole lines, and puts it back (``draw``), in one write.
The area is laid out here, in *hard* rows: each ends with a newline, and while they are written the terminal's own
wrapping is off. So a terminal that knows other widths than we do, or that flows lines anew when its window changes,
still has as many rows as we count. All movements are relative to the row in which the area begins. ``Desk`` puts
all of that together: somebody at a terminal.
"""
from __future__ import annotations

import functools
import math
import os
import re
import signal
import time
from collections import deque
from typing import (Any, NamedTuple)
from collections.abc import Callable, Collection, Iterator, Sequence

from conversation import Delivery
from editor import PASTE_OFF, PASTE_ON, Action, Complete, Editor, History, Screen, Style, Terminal, text_width
from loop import UNSAFE, Output, clean, rfc3339
from protocol import MAX_TEXT


# --- what is asked for ----------------------------------------------------------------------------------------

LINE_LIMIT = MAX_TEXT + 1024            # bytes of a line that are kept; the rest is only counted
JSON_LIMIT = 6 * MAX_TEXT + 4096        # bytes of one that may be a JSON object: every character may be escaped
SURROGATES = "[\ud800-\udfff]"          # that JSON can name, and UTF-8 cannot
REF_LIMIT = 256                         # characters of what a sender calls a message
TAIL_SIZE = 4096                        # bytes of the end of a line that was cut off: a ``ref`` may stand there


class Sends:
    """Texts for one nick; ``ref``: what their sender calls them; ``size``: the bytes of a text that was cut off."""

    __slots__ = ("nick", "texts", "ref", "size")

    def __init__(self, nick: str, texts: list[str], ref: object = None, size: int = 0) -> None:
        self.nick = nick
        self.texts = texts
        self.ref = ref
        self.size = size

    def take(self, most: int) -> list[str]:
        """The first ``most`` of the texts, which are here no more."""
        taken, self.texts = self.texts[:most], self.texts[most:]
        return taken


class Command(NamedTuple):
    """Something to do: texts to send, or else the words of a command.

    ``shown``: the line, where the terminal does not show what is typed by itself. ``broken``: one that means nothing,
    and the ``ref`` in it.
    """

    sends: Sends | None = None
    words: Sequence[str] = ()
    shown: str = ""
    broken: str = ""
    ref: object = None


class LongLine(str):
    """A line that was cut off because it is too long; ``size`` are the bytes that it had, ``tail`` the last ones."""

    size = 0
    tail = ""


class Typed(str):
    """A line from a terminal that does not show what is typed by itself."""


class Block(str):
    """Lines that all begin with the same ``send NICK ``, which is the string: a read of a pipe mostly is that."""

    texts: list[str]


def group_sends(text: str) -> list[str]:
    """Several lines as a list, or as one ``Block`` if all begin with the same ``send NICK ``. At the speed of C."""
    end = text.find(" ", 5) + 1
    if end > 6 and text.startswith("send "):
        start = text[:end]
        if "\n" not in start and text.count("\n" + start) == text.count("\n"):
            block = Block(start)
            block.texts = text[end:].split("\n" + start)
            return [block]
    return text.split("\n")


class Commands:
    """What is asked for on stdin: bytes or lines go in, commands come out, in order.

    While one ``talk``s to somebody, every line is a text for that nick; commands then begin with a slash, and a text
    that begins with one has two. With ``reads_json``, a line may also be a JSON object.
    """

    def __init__(self, reads_json: bool = False) -> None:
        self.talk = ""
        self.ended = False          # nothing more will come
        self.waiting: deque[str | Sends] = deque()    # lines and texts of which ``take`` makes commands
        self._reads_json = reads_json
        self._limit = JSON_LIMIT if reads_json else LINE_LIMIT
        self._buffer = b""
        self._skipped = 0           # bytes of a line that is too long, ...
        self._tail = b""            # ... and the last of them

    @property
    def prompt(self) -> str:
        """What asks for the next line."""
        return f"{self.talk}>>> "

    @property
    def slash(self) -> str:
        """What a command begins with."""
        return "/" if self.talk else ""

    # in

    def feed(self, data: bytes) -> None:
        """Takes what was read; b"" at the end."""
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            self._take_lines(self._buffer + head)
            self._buffer, self._skipped = tail, 0
        elif data:
            self._buffer += data
        else:
            self.ended = True
            if self._buffer or self._skipped:
                self._take_lines(self._buffer)
            self._buffer, self._skipped = b"", 0
        if len(self._buffer) > self._limit:
            self._skipped += len(self._buffer) - self._limit
            self._tail = (self._tail + self._buffer[self._limit:])[-TAIL_SIZE:]
            self._buffer = self._buffer[:self._limit]

    def _take_lines(self, data: bytes) -> None:
        if self._skipped or len(data) > self._limit and data.find(b"\n", 0, self._limit + 1) < 0:
            first, newline, data = data.partition(b"\n")      # only the first can be so long: it began in other reads
            line = LongLine(first[:self._limit].decode("utf-8", "replace"))
            line.size = len(first) + self._skipped
            line.tail = (self._tail + first[self._limit:])[-TAIL_SIZE:].decode("utf-8", "replace")
            self._skipped, self._tail = 0, b""
            self.waiting.append(line)
            if not newline:
                return
        text = data.decode("utf-8", "replace")
        if "\n" in text:
            self.waiting.extend(group_sends(text))
        else:
            self.waiting.append(text)

    def enter(self, lines: Sequence[str], pasted: bool = False) -> None:
        """Takes lines that were typed; ``pasted``: all but the first come from where a slash means nothing."""
        for count, line in enumerate(lines):
            escape = "/" if count and pasted and self.talk and line.startswith("/") else ""
            self.waiting.append(Typed(escape + line))

    def put(self, sends: Sends) -> None:
        """Takes texts to send."""
        self.waiting.append(sends)

    def clear(self) -> None:
        """Forgets what waits."""
        self.waiting.clear()

    # out

    def put_back(self, sends: Sends) -> None:
        """These come first again."""
        self.waiting.appendleft(sends)

    def take(self) -> Command:
        """The next command."""
        line = self.waiting.popleft()
        if isinstance(line, Sends):
            return Command(line)
        if isinstance(line, Typed):
            return self._meaning(str(line))._replace(shown=self.prompt + line)
        return self._meaning(line)

    def _meaning(self, line: str) -> Command:
        if self._reads_json and line.lstrip().startswith("{"):
            return command_of(line)
        if self.talk:
            return self._meaning_in_talk(line)
        words = line.split(" ", 2)
        if words[0] == "send" and len(words) == 3 and words[1]:
            _, nick, text = words
            if isinstance(line, Block):
                return Command(Sends(nick, line.texts))
            return Command(Sends(nick, [text], None, _size(line, text)))
        return Command(words=line.split())

    def _meaning_in_talk(self, line: str) -> Command:
        if isinstance(line, Block):
            first, *others = [line + text for text in line.texts]
            self.waiting.extendleft(reversed(others))
            return self._meaning_in_talk(first)
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            nick, blank, text = rest.partition(" ")
            if name == "send" and nick and blank:
                return Command(Sends(nick, [text], None, _size(line, text)))
            return Command(words=line[1:].split())
        if not line:
            return Command()
        text = line[1:] if line.startswith("//") else line
        return Command(Sends(self.talk, [text], None, _size(line, text)))


def _size(line: str, text: str) -> int:
    """The bytes of the text at the end of a line that was cut off; 0 for one that was not."""
    return line.size - len(line[:len(line) - len(text)].encode()) if isinstance(line, LongLine) else 0


def _is_ref(ref: object) -> bool:
    """Whether an event can name a message by ``ref``, and it is small: they are kept as long as the messages wait."""
    if isinstance(ref, str):
        return len(ref) <= REF_LIMIT
    return ref is None or isinstance(ref, (int, float)) and -math.inf < ref < math.inf     # nor NaN: JSON has none


def command_of(line: str) -> Command:
    """What a JSON object asks for."""
    import json
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return _long_send(line) if isinstance(line, LongLine) else Command(broken=line)
    if type(found) is dict:
        nick, text, ref = found.get("send"), found.get("text"), found.get("ref")
        if type(nick) is str and type(text) is str and nick and _is_ref(ref):
            nick, text = re.sub(SURROGATES, "\ufffd", nick), re.sub(SURROGATES, "\ufffd", text)
            return Command(Sends(nick, [text], ref))
        for name in ("dereg", "reg"):
            if type(found.get(name)) is str:
                return Command(words=[name, re.sub(SURROGATES, "\ufffd", found[name])])
        for name in ("who", "help", "quit"):
            if found.get(name) is True:
                return Command(words=[name])
        return Command(broken=line, ref=ref if _is_ref(ref) else None)
    return Command(broken=line)


def _long_send(line: LongLine) -> Command:
    """What an object asks for whose end was cut off: if it has the head of a text to send, that is too long."""
    nick, ref = _member("send", line), _member("ref", line)
    if type(nick) is str and nick and _is_ref(ref) and re.search(r'"text"\s*:\s*"', line):
        return Command(Sends(re.sub(SURROGATES, "\ufffd", nick), [""], ref, line.size))
    return Command(broken=line, ref=ref if _is_ref(ref) else None)


def _member(name: str, line: LongLine) -> object:
    """A string or number of a JSON object, at its beginning or end; inside of its strings every quote is escaped."""
    import json
    string = rf'"(?:[^"\\]|\\u[0-9a-fA-F]{{4}}|\\.){{0,{2 * REF_LIMIT}}}"'
    pattern = rf'"{name}"\s*:\s*({string}|-?[0-9][0-9.eE+-]{{0,99}}|true|false)\s*[,}}]'
    for part in (line, line.tail):
        match = re.search(pattern, part)
        if match is not None:
            try:
                return json.loads(match[1])
            except ValueError:
                return None
    return None


# --- what is said ---------------------------------------------------------------------------------------------


NEWS, BAD = "news", "bad"       # what an event is to its reader


class Saying(NamedTuple):
    """How an event is told: ``line`` to people (with fields in it), ``type`` and ``reason`` to programs."""

    line: str
    tone: str
    type: str
    reason: str | None = None


SAYINGS: dict[str, Saying] = {
    "registered": Saying("[Welcome, You are registered.]", NEWS, "registered"),
    "table": Saying("[Client table updated.]", NEWS, "table"),
    "mail": Saying("[You have messages]", NEWS, "mail"),
    "received": Saying("[Message received by {to}.]", NEWS, "received"),
    "saved": Saying("[Messages received by the server and saved]", NEWS, "saved"),
    "no-ack": Saying("[No ACK from {to}, message sent to server.]", NEWS, "no-ack"),
    "offline": Saying("[{to} is offline, message sent to server.]", NEWS, "offline"),
    "exists": Saying("[Client {to} exists!!]", NEWS, "exists"),
    "unknown": Saying("[Unknown client {to}.]", BAD, "failed", "unknown"),
    "too-long": Saying("[Message too long: {size} bytes, at most {most}.]", BAD, "failed", "too-long"),
    "full": Saying("[Mailbox of {to} is full, message not saved.]", BAD, "failed", "full"),
    "disk": Saying("[The server cannot save messages now, message for {to} not saved.]", BAD, "failed", "disk"),
    "not-sent": Saying("[You are offline. Use: {usage}]", BAD, "failed", "offline"),
    "undelivered": Saying("", BAD, "failed", "not-delivered"),
    "one-undelivered": Saying("[1 message not delivered.]", BAD, "undelivered"),
    "more-undelivered": Saying("[{count} messages not delivered.]", BAD, "undelivered"),
    "left": Saying("[You are Offline. Bye.]", NEWS, "left"),
    "silent": Saying("[Server not responding]", BAD, "server-silent"),
    "back": Saying("[Server is responding again]", NEWS, "server-back"),
    "exiting": Saying("[Exiting]", NEWS, "exiting"),
    "server-full": Saying("[The server is full.]", BAD, "refused", "full"),
    "taken": Saying("[Nickname {nick} is taken.]", BAD, "refused", "taken"),
    "owned": Saying("[Nickname {nick} belongs to someone else.]", BAD, "refused", "owned"),
    "talk-unknown": Saying("[Unknown client {nick}.]", BAD, "error", "unknown-client"),
    "usage": Saying("[Usage: {usage}]", BAD, "error", "usage"),
    "command": Saying("[Unknown command {name}, try {help}.]", BAD, "error", "unknown-command"),
    "object": Saying("[Not a command: {line}]", BAD, "error", "not-a-command"),
    "away": Saying("[You are offline. Use: {usage}]", BAD, "error", "offline"),
    "dereg-other": Saying("[You can only deregister yourself.]", BAD, "error", "not-yours"),
    "reg-other": Saying("[You can only register as {nick}.]", BAD, "error", "not-yours"),
    "registered-already": Saying("[You are registered already.]", NEWS, "error", "registered-already"),
}
STATUS = frozenset(SAYINGS)                                     # all but what others say
ROUTINE = frozenset({"registered", "table", "left", "back"})    # what who sends one message need not know
FOR_PEOPLE = frozenset({"back"})                                # what scripts that read plain lines were not promised
FIELDS = ("to", "text", "id", "via", "ms", "ref", "nick", "count", "size")      # of an event, that programs get


@functools.lru_cache(maxsize=1024)
def show_time(at: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A wall-clock time in local time, for people."""
    try:
        return time.strftime(form, time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def as_json(value: dict[str, Any]) -> str:
    """One line of JSON (RFC 8259): UTF-8 as it is, but what could drive a terminal is escaped."""
    import json
    return re.sub(UNSAFE, lambda match: "\\u%04x" % ord(match[0]), json.dumps(value, ensure_ascii=False))


class Lines:
    """Events as lines for people, and for scripts that read what people read.

    ``hidden``: the events that are not told. ``wall``: gives the time that stands before each line, in seconds since
    1970; None for no time. ``bell``: rings with each message.
    """

    is_for_programs = False     # who want to know of which messages an event is, and who say JSON themselves

    def __init__(self, style: Style = Style(False), wall: Callable[[], float] | None = None,
                 hidden: Collection[str] = FOR_PEOPLE, bell: bool = False) -> None:
        self._style = style
        self._wall = wall
        self._hidden = hidden
        self._bell = "\a" if bell else ""
        self._is_plain = wall is None and not (style.enabled or bell)   # nothing is added to a line

    def event(self, name: str, /, **fields: Any) -> str:
        """What has happened; an empty string where that is not told."""
        saying = SAYINGS[name]
        if name in self._hidden or not saying.line:
            return ""
        line = saying.line.format(**fields)
        if self._is_plain:
            return line + "\n"
        return f"{self._clock()}{self._style.error(line) if saying.tone == BAD else self._style.dim(line)}\n"

    def complaint(self, name: str, /, **fields: Any) -> str:
        """What has gone wrong, where ``event`` tells nothing: for stderr, as a line for people."""
        saying = SAYINGS[name]
        return clean(saying.line.format(**fields)) + "\n" if saying.tone == BAD and saying.line else ""

    def _clock(self) -> str:
        return "" if self._wall is None else self._style.dim(show_time(int(self._wall()), "%H:%M:%S")) + " "

    def messages(self, delivery: Delivery, via: str) -> str:
        """What somebody has sent; ``via``: on which way it came."""
        texts = delivery.texts
        if not "".join(texts).isprintable():
            texts = [clean(text) for text in texts]
        sender = delivery.sender
        start = f"{sender}: " if self._is_plain else f"{self._bell}{self._clock()}{self._style.nick(sender)}: "
        if delivery.times:
            return "".join([f"{start}<{show_time(at)}> {text}\n" for text, at in zip(texts, delivery.times)])
        return f"{start}{texts[0]}\n" if len(texts) == 1 else start + ("\n" + start).join(texts) + "\n"

    def clients(self, entries: Sequence[tuple[str, str, str]]) -> str:
        """Who is known: nick, address and state."""
        wide = max((text_width(nick) for nick, _, _ in entries), default=0)
        far = max((len(address) for _, address, _ in entries), default=0)
        return "".join([f"{self._style.nick(nick)}{' ' * (wide - text_width(nick))}  {address:{far}}  {state}\n"
                        for nick, address, state in entries])

    def help(self, text: str) -> str:
        """What can be asked for."""
        return text

    def undelivered(self, nick: str, text: str, ref: object) -> str:
        """The command that would send a message again."""
        return f"send {nick} {text}\n" if "\n" not in text else as_json({"send": nick, "text": text}) + "\n"


class JsonLines(Lines):
    """Events as JSON objects, one a line, for programs. ``wall`` gives the seconds since 1970."""

    is_for_programs = True

    def __init__(self, nick: str, wall: Callable[[], float], hidden: Collection[str] = ()) -> None:
        super().__init__(hidden=hidden)
        self._nick = nick
        self._now = wall

    def _object(self, type_: str, **fields: object) -> str:
        found = {"type": type_, "time": rfc3339(self._now()), **fields}
        return as_json({name: value for name, value in found.items() if value is not None}) + "\n"

    def event(self, name: str, /, **fields: Any) -> str:
        """What has happened; an empty string where that is not told."""
        if name in self._hidden:
            return ""
        saying = SAYINGS[name]
        told = {field: fields[field] for field in FIELDS if field in fields}
        if saying.type == "error":
            told["text"] = saying.line.format(**fields)
        return self._object(saying.type, reason=saying.reason, **told)

    def messages(self, delivery: Delivery, via: str) -> str:
        """What somebody has sent, an object each; ``via``: on which way it came."""
        sent: Sequence[str | None] = [rfc3339(at) for at in delivery.times] or [None] * len(delivery.texts)
        return "".join([
            self._object("message", **{"from": delivery.sender}, to=self._nick, text=text,
                         id=f"{delivery.stream}:{number}", via=via, sent=at)
            for number, (text, at) in enumerate(zip(delivery.texts, sent), delivery.first)])

    def clients(self, entries: Sequence[tuple[str, str, str]]) -> str:
        """Who is known, an object each."""
        return "".join([self._object("client", nick=nick, address=address, state=state)
                        for nick, address, state in entries])

    def help(self, text: str) -> str:
        """What can be asked for."""
        return self._object("help", text=text)

    def undelivered(self, nick: str, text: str, ref: object) -> str:
        """The command that would send a message again."""
        again = {"send": nick, "text": text, "ref": ref}
        return as_json({name: value for name, value in again.items() if value is not None}) + "\n"


class Prompt:
    """What stands at the bottom of a terminal on which nothing can be drawn: it does its own editing.

    ``erase`` makes room for a line, ``draw`` shows the prompt below the last one. ``asks``: somebody is to answer it.
    """

    asks = True

    def __init__(self) -> None:
        self._is_shown = False

    def erase(self) -> bytes:
        """What to write before a line."""
        shown, self._is_shown = self._is_shown, False
        return b"\n" if shown else b""

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """What to write behind the last line."""
        shown, self._is_shown = self._is_shown, True
        return b"" if shown else prompt.encode()

    def answered(self) -> None:
        """Somebody has typed a line: the terminal has gone to the next one."""
        self._is_shown = False


class Board(Prompt):
    """A terminal on which somebody looks on: what is waited for stands at the bottom of the screen."""

    asks = False

    def __init__(self, output: Output, terminal: Terminal, style: Style) -> None:
        super().__init__()
        self._output = output
        self._terminal = terminal
        self._screen = Screen(*terminal.size(), style)

    def erase(self) -> bytes:
        """Makes room for a line."""
        return self._screen.erase()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Shows the notices, if there are any."""
        return self._screen.draw(notices, "", "", 0) if notices else self._screen.erase()

    def resize(self) -> None:
        """The window has another size now."""
        self._output.write(self._screen.resize(*self._terminal.size()))

    def resume(self) -> None:
        """Continued: whoever had the terminal meanwhile has left the cursor below what was shown."""
        self._output.write(self._screen.begin_anew())


class Desk(Board):
    """Somebody at a terminal: what is typed stays at the bottom of the screen, whatever is said above it."""

    asks = True

    def __init__(self, output: Output, terminal: Terminal, style: Style, history: History,
                 complete: Complete) -> None:
        super().__init__(output, terminal, style)
        self._editor = Editor(history, complete)
        self._is_ours = False       # the terminal

    def open(self) -> None:
        """The terminal is ours, from now on or from when the shell has it no more."""
        if self._terminal.is_background():
            return
        self._is_ours = True
        self._terminal.leave()
        self._terminal.enter()
        self.resize()
        self._output.write(PASTE_ON)

    def close(self) -> None:
        """Gives the terminal back as it was, with the cursor below what was said."""
        if self._is_ours:
            self._is_ours = False
            self._output.write(self._screen.erase() + PASTE_OFF)
            self._output.flush()
            self._terminal.leave()

    def draw(self, notices: Sequence[str], prompt: str) -> bytes:
        """Shows what is typed, and above it the notices."""
        if not self._is_ours:
            self.open()
        return self._screen.draw(notices, prompt, self._editor.text, self._editor.cursor) if self._is_ours else b""

    def type(self, data: bytes) -> Iterator[Action]:
        """Takes what was typed; gives what is left to do about it."""
        for action in self._editor.feed(data):
            if action.kind == "suspend":
                self.suspend()
            elif action.kind == "clear":
                self._output.write(self._screen.clear_screen())
            elif action.kind == "bell":
                self._output.write(b"\a")
            else:
                yield action

    def suspend(self) -> None:
        """Stops this job, as Ctrl-Z does, and goes on when it is continued."""
        self.close()
        handlers = [(number, signal.signal(number, signal.SIG_DFL)) for number in (signal.SIGTSTP, signal.SIGCONT)]
        os.kill(0, signal.SIGTSTP)
        for number, handler in handlers:
            signal.signal(number, handler)
        self.resume()

    def resume(self) -> None:
        """Continued: whoever had the terminal meanwhile has left it in another state."""
        self._is_ours = False
        cleared = self._screen.begin_anew()
        self.open()
        if self._is_ours:
            self._output.write(cleared)
