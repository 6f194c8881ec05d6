"""What lies on the disk: settings, identity, keys, typed lines, the store of a server; and the lines that are written.

Rules of this file
------------------
- It decides nothing: ``registry`` says who is known, and what is kept in the store.
- A file that cannot be used is an OSError, a store that cannot is a StoreError; the command line reports it.
- No decision depends on the wall clock, which may be wrong by years and jump: what lasts for longer than one run of
  the server is measured by ``Mailbox.uptime``. Only the times of messages are wall-clock times.
- A file that is made here appears whole or not at all, and only its owner can read it.
- A line is written whole or not at all, and nothing in it can drive a terminal.

The store
---------
``StoreFile`` is the SQLite file; ``Mailbox`` is what it holds: the nicks that are known, their owners, the messages
that wait, and how far each stream was kept. The mail of one recipient is numbered 1, 2, 3 ... without gaps for good; it
is deleted from the low end, when the recipient has acked it. Everything that one turn of the loop changes is written
in one transaction by ``commit``. If that fails, the messages of this turn count as never accepted, and everything else
is tried again.
"""
from __future__ import annotations

import errno
import functools
import math
import os
import re
import stat
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat

from protocol import (ENVELOPE_BYTES, KEY_BYTES, MAX_ITEMS, MIN_BUNDLE, PORT, TYPE_CHECKING, UNSAFE, Any, Parcel,
                      StoredLetter, clean, is_host, is_nick, merged)

if TYPE_CHECKING:
    import sqlite3


def home_directory() -> str | None:
    """Return the user's home, None for a user without one: a container may run us under a number that has no name."""
    home = os.environ.get("HOME")
    if not home:
        import pwd      # here: a user without HOME is rare, and the start of the program is measured
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return home if os.path.isabs(home) else None


def state_home() -> str | None:
    """Return our directory in the user's directory for state (XDG_STATE_HOME, or ~/.local/state), None without a home.

    A relative XDG_STATE_HOME is ignored, as the XDG Base Directory Specification says.
    """
    return _directory("XDG_STATE_HOME", ".local", "state")


def config_home() -> str | None:
    """Return our directory in the user's one for settings (XDG_CONFIG_HOME, or ~/.config), None without a home."""
    return _directory("XDG_CONFIG_HOME", ".config")


def _directory(variable: str, *default: str) -> str | None:
    above, home = os.environ.get(variable, ""), home_directory()
    if not os.path.isabs(above):
        if home is None:
            return None
        above = os.path.join(home, *default)
    return os.path.join(above, "udpchat")


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 (FIPS 180-4) of ``data``: 32 bytes."""
    digest: bytes = _sha256_function()(data).digest()
    return digest


@functools.cache
def _sha256_function() -> Any:
    # hashlib loads OpenSSL: a twelfth of the time that ``udpchat send`` takes. So the lean module that it falls back to
    # comes first, as in the module random. From Python 3.12 on it is called _sha2
    for name in ("_sha2", "_sha256"):
        try:
            return __import__(name).sha256
        except (ImportError, AttributeError):
            pass
    import hashlib
    return hashlib.sha256


def socket_path(state: str, *which: bytes) -> str:
    """Return where a client is to be found by other programs of its user; ``which``: what both must have in common."""
    digest = sha256(b"".join(sha256(part) for part in (b"udpchat socket 1", *which)))
    return os.path.join(state, f"{digest.hex()[:16]}.sock")


CONFIG_SIZE = 65536       # bytes that a file with settings may have


def read_settings(path: str, section: str, sections: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the settings of a section of an INI file: key, value, and where it stands, as ``PATH:LINE``.

    ``sections``: all that the file may have. Raise OSError if it cannot be read, ValueError if something is wrong in
    it, with one line that says what and where.
    """
    import configparser     # here: most users have no such file, and the start of the program is measured
    with open(path, "rb") as file:
        data = file.read(CONFIG_SIZE + 1)
    if len(data) > CONFIG_SIZE:
        raise ValueError(f"{path} is longer than {CONFIG_SIZE} bytes")
    text = data.decode("utf-8-sig", "replace")
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    try:
        parser.read_string(text)
    except configparser.MissingSectionHeaderError as error:
        raise ValueError(f"{path}:{error.lineno}: a setting belongs below a [section]") from None
    except configparser.ParsingError as error:
        raise ValueError(f"{path}:{error.errors[0][0]}: neither a [section] nor key = value") from None
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        raise ValueError(f"{path}:{error.lineno}: this was said before") from None
    lines = _lines_of_settings(text)
    for name in parser.sections():
        if name not in sections:
            raise ValueError(f"{path}:{lines.get((name, ''), 1)}: there is no section [{name}], only "
                             + ", ".join(f"[{one}]" for one in sections))
    if section not in parser:
        return []
    return [(key, value, f"{path}:{lines.get((section, key), 1)}") for key, value in parser[section].items()]


def _lines_of_settings(text: str) -> dict[tuple[str, str], int]:
    """Return the number of the line of each section, (name, ""), and of each key in one."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            section = line[1:].partition("]")[0]
            found.setdefault((section, ""), number)
        elif "=" in line:
            found.setdefault((section, line.partition("=")[0].strip().lower()), number)
    return found


def make_private(path: str) -> None:
    """Make sure that ``path``, which may not exist yet, is a file that its owner alone can read. Raise OSError.

    A regular file that belongs to somebody else stays as it is.
    """
    try:
        os.close(os.open(os.path.realpath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))   # of a link: its target
    except FileExistsError:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return      # a link to a file that is still to be made
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
            os.chmod(path, stat.S_IMODE(status.st_mode) & 0o700)


def is_private(path: str) -> bool:
    """Return whether nobody but its owner may read the file ``path``. Raise OSError."""
    return not stat.S_IMODE(os.stat(path).st_mode) & 0o077


class RecentLines:
    """A file of lines, the newest last, that is shortened to ``keep`` lines when it has more than ``limit``.

    Lines are appended at once, so they survive a kill. Several processes may share the file: each one reads the lines
    of the others when it starts. While one process shortens the file, a line that another one appends at that moment
    may be lost. Of a file with more than ``read_size`` bytes only the end is read.

    Lines that are torn, or that ``is_valid`` refuses, are skipped; they disappear when the file is shortened.
    """

    def __init__(self, path: str, keep: int, limit: int, read_size: int, is_valid: Callable[[str], bool],
                 merged: Callable[[list[str]], list[str]] = list) -> None:
        """``merged``: returns lines that say the same as those in the file; there may be fewer."""
        self._merged = merged
        self._path, self._keep, self._limit = path, keep, limit
        self._read_size, self._is_valid = read_size, is_valid
        self._count = 0              # of lines in the file, as far as this process knows
        self._is_long = False        # it had more lines than are kept when it was loaded
        self._is_torn = False        # it ends without a newline: the process that wrote the last line did not finish it

    def load(self) -> list[str]:
        """Return the last lines, at most ``keep``; none if there is no file yet. Raise OSError."""
        try:
            data, is_whole = self._read_end()
        except (FileNotFoundError, NotADirectoryError):
            return []                # the first line creates it, where that is possible
        self._is_torn = bool(data) and not data.endswith(b"\n")
        self._count = data.count(b"\n") + self._is_torn
        self._is_long = self._count > self._keep or not is_whole
        return self._valid_lines(data, is_whole)

    def status(self) -> tuple[int, ...]:
        """Return what is another once somebody has written to the file."""
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def tidy(self) -> None:
        """Shorten the file if there was more in it than is kept when it was loaded. Raise OSError."""
        if self._is_long:
            self._shorten()

    def append(self, lines: Sequence[str]) -> None:
        """Append lines, none of which has a newline in it. Raise OSError."""
        data = _encoded(lines)
        if self._is_torn:
            data = b"\n" + data
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            descriptor = os.open(self._path, flags, 0o600)
        try:
            self._is_torn = os.write(descriptor, data) < len(data)
            if self._is_torn:
                raise OSError(errno.ENOSPC, "not written whole", self._path)
        finally:
            os.close(descriptor)
        self._count += len(lines)
        if self._count > self._limit:
            self._shorten()

    def _shorten(self) -> None:
        """Leave only the last lines in the file. It is read again, for other processes may have added some."""
        lines = self._valid_lines(*self._read_end())
        target = os.path.realpath(self._path)
        # A random name, not one with the process id: all containers that share this directory may have the same id.
        draft = f"{target}.{os.urandom(8).hex()}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(_encoded(lines))
            os.replace(draft, target)
        except OSError:
            os.unlink(draft)
            raise
        self._count = len(lines)
        self._is_torn = False

    def _read_end(self) -> tuple[bytes, bool]:
        """Return the last ``read_size`` bytes, and whether they are all of it.

        Raise OSError also if it is not a regular file. It is opened with O_NONBLOCK, because opening a FIFO would wait.
        """
        with open(self._path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", self._path)
            start = max(0, status.st_size - self._read_size)
            file.seek(start)
            return file.read(self._read_size), start == 0

    def _valid_lines(self, data: bytes, is_whole: bool) -> list[str]:
        """Return the last valid lines in the bytes of the file; its first line may be cut if they are not all of it."""
        lines = []
        for row in data.split(b"\n")[0 if is_whole else 1:]:
            try:
                line = row.decode()
            except UnicodeDecodeError:
                continue
            if self._is_valid(line):
                lines.append(line)
        return self._merged(lines)[-self._keep:]


SHOWN_KEPT, SHOWN_LIMIT, SHOWN_SIZE = 16384, 20480, 2 ** 22     # lines, lines, bytes


NEWS_GAP = 0.5            # s; nobody loses the nick to another program within that time


class ShownMessages:
    """The messages for a nick that ``udpchat recv`` and ``ask`` have shown, in a file; a line for some of a stream::

        SENDER STREAM FIRST END       the numbers from FIRST on, below END

    They may come again, because an ack cannot leave out a message that was passed over, or was lost at the end.
    """

    def __init__(self, path: str) -> None:
        self._file = RecentLines(path, SHOWN_KEPT, SHOWN_LIMIT, SHOWN_SIZE,
                                 lambda line: bool(re.fullmatch(r"\S+ \d{1,19} \d{1,19} \d{1,19}", line)), self._merged)
        self.has_failed = False     # to note something, and the user was told
        self._known: tuple[int, ...] = ()       # how the file was when it was read or written
        self._asked = time.monotonic()          # when somebody has asked for news

    @staticmethod
    def _merged(lines: list[str]) -> list[str]:
        """Return lines in which what belongs together is one; the stream that was noted last is at the end."""
        found: dict[str, list[tuple[int, int]]] = {}
        for line in lines:
            name, first, end = line.rsplit(" ", 2)
            found[name] = spans = found.pop(name, [])
            spans.append((int(first), int(end)))
        return [f"{name} {first} {end}" for name, spans in found.items() for first, end in merged(spans)]

    def load(self) -> list[tuple[str, int, int, int]]:
        """Return sender, stream, and the first number and the one behind the last of each line. Raise OSError."""
        self._known = self._file.status()
        rows = [line.split(" ") for line in self._file.load()]
        return [(sender, int(stream), int(first), int(end)) for sender, stream, first, end in rows]

    def note(self, sender: str, stream: int, first: int, end: int) -> None:
        """Note some numbers of a stream, unless there is no state directory and can be none. Raise OSError."""
        has_read_all = self._file.status() == self._known
        try:
            self._file.append([f"{sender} {stream} {first} {end}"])
        except NotADirectoryError:
            return
        if has_read_all:        # else what another program has noted is news still
            self._known = self._file.status()

    def has_news(self) -> bool:
        """Return whether another program has noted something meanwhile: it had the nick while this one was stopped.

        To be asked before each message is shown. For that, this program must have been stopped for a while, during
        which it did not ask: only then the file is looked at.
        """
        asked, self._asked = self._asked, time.monotonic()
        return self._asked - asked > NEWS_GAP and self._file.status() != self._known


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


REMEMBERED_NICKS = 1000   # of the last table that was seen


def remember_nicks(nicks: Sequence[str]) -> None:
    """Write the nicks of the table to a file, from which shells complete them. If that fails, there are none."""
    state = state_home()
    if state is None:
        return
    path = os.path.join(state, "nicks")
    draft = f"{path}.{os.urandom(8).hex()}"
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write("".join(f"{nick}\n" for nick in nicks[:REMEMBERED_NICKS]))
        os.replace(draft, path)
    except OSError:
        try:
            remove_quietly(draft)
        except OSError:
            pass


# --- lines ----------------------------------------------------------------------------------------------------

LEVELS = ("debug", "info", "warning", "error")
DEBUG, INFO, WARNING, ERROR = range(len(LEVELS))


LATEST_DATE = 253402300799.0    # s since 1970 of the end of the year 9999: RFC 3339 has no later one


@functools.lru_cache(maxsize=1024)
def show_time(at: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Return a wall-clock time in local time, for people."""
    try:
        return time.strftime(form, time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def rfc3339(at: float) -> str:
    """Return a wall-clock time in UTC, to the millisecond (RFC 3339 §5.6)."""
    try:
        seconds, thousandths = divmod(math.floor(min(at, LATEST_DATE) * 1000), 1000)
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{thousandths:03d}Z"
    except (OverflowError, ValueError, OSError):
        return "1970-01-01T00:00:00.000Z"


def as_json(value: dict[str, Any]) -> str:
    """Return one line of JSON (RFC 8259): UTF-8 as it is, but what could drive a terminal is escaped."""
    import json
    return re.sub(UNSAFE, lambda match: "\\u%04x" % ord(match[0]), json.dumps(value, ensure_ascii=False))


def text_line(at: float, level: int, message: str, counters: Mapping[str, int]) -> str:
    """Return a record of the log for people, in local time."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    counts = "".join(f" {name}={count}" for name, count in counters.items())
    return clean(f"{stamp},{int(at % 1 * 1000):03d} {LEVELS[level].upper()} {message}{':' if counts else ''}{counts}")


def json_line(at: float, level: int, message: str, counters: Mapping[str, int]) -> str:
    """Return a record of the log for programs."""
    import json
    return json.dumps({"time": rfc3339(at), "level": LEVELS[level], "message": message, **counters})


def read_back(fd: int, size: int, at: int) -> bytes:
    """Return ``size`` bytes at ``at`` of the regular file that ``fd`` writes, b"" where they cannot be read."""
    import fcntl        # here: only files need it
    path: str | bytes = f"/proc/self/fd/{fd}"       # opened again: a shell opens files for writing only
    try:
        if hasattr(fcntl, "F_GETPATH"):     # macOS
            path = fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
        own = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:    # another file may have the name by now
            return os.pread(own, size, at) if os.path.samestat(os.fstat(own), os.fstat(fd)) else b""
        finally:
            os.close(own)
    except OSError:
        return b""


class LineFile:
    """A regular file that gets whole lines, though a full disk accepts only a part of what is written.

    The part of a line is cut off again, but nothing that others may have written: it must be the end of the file, and
    be read back. Where that fails it stays, and the next line begins behind a line end, as behind any such line.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._has_begun = False     # the last write has ended a line

    def put(self, lines: bytes) -> int:
        """Write whole lines; return how many bytes of them were taken. Raise OSError if that is not even one line."""
        data = lines if self._has_begun or self._is_at_line_start() else b"\n" + lines
        added, done = len(data) - len(lines), 0
        self._has_begun = True
        try:
            while done < len(data):     # behind a part, the next write says what is wrong
                taken = os.write(self._fd, data[done:])
                if not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += taken
            return len(lines)
        except OSError:
            self._has_begun = False
            end = data.rfind(b"\n", 0, done) + 1
            if end <= added:
                self._take_back(data[:done])
                raise
            self._take_back(data[end:done])
            return end - added

    def _is_at_line_start(self) -> bool:
        """Return whether the next write begins a line, False where that cannot be seen."""
        import fcntl        # here: only files need it
        if fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_APPEND:
            at = os.fstat(self._fd).st_size
        else:
            at = os.lseek(self._fd, 0, os.SEEK_CUR)
        return at == 0 or read_back(self._fd, 1, at - 1) == b"\n"

    def _take_back(self, part: bytes) -> None:
        """Cut ``part`` off, the last that was written, if it is still the end of the file."""
        try:
            end = os.lseek(self._fd, 0, os.SEEK_CUR)        # of that write, also where the file is appended to
            start = end - len(part)
            if part and end == os.fstat(self._fd).st_size and read_back(self._fd, len(part), start) == part:
                os.ftruncate(self._fd, start)
                os.lseek(self._fd, start, os.SEEK_SET)
        except OSError:
            pass        # it stays: see above


# --- the lines of clients -------------------------------------------------------------------------------------

NEWS, FAILURE = False, True     # what an event is to its reader


class EventFormat:
    """How an event is told: ``line`` to people (with fields in it), ``type`` and ``reason`` to programs."""

    def __init__(self, line: str, is_failure: bool, type_: str, reason: str | None = None) -> None:
        self.line, self.is_failure, self.type, self.reason = line, is_failure, type_, reason


NOT_SAVED = "[The server cannot save messages now, message for {to} not saved.]"
EVENT_FORMATS: dict[str, EventFormat] = {
    "registered": EventFormat("[Welcome, You are registered.]", NEWS, "registered"),
    "table": EventFormat("[Client table updated.]", NEWS, "table"),
    "client-online": EventFormat("[{nick} is online.]", NEWS, "client-online"),
    "client-onlines": EventFormat("[{nick} are online.]", NEWS, "client-online"),
    "client-offline": EventFormat("[{nick} is offline.]", NEWS, "client-offline"),
    "client-offlines": EventFormat("[{nick} are offline.]", NEWS, "client-offline"),
    "mail": EventFormat("[You have messages]", NEWS, "mail"),
    "received": EventFormat("[Message received by {to}.]", NEWS, "received"),
    "saved": EventFormat("[Messages received by the server and saved]", NEWS, "saved"),
    "no-ack": EventFormat("[No ACK from {to}, message sent to server.]", NEWS, "no-ack"),
    "offline": EventFormat("[{to} is offline, message sent to server.]", NEWS, "offline"),
    "exists": EventFormat("[Client {to} exists!!]", NEWS, "exists"),
    "unknown": EventFormat("[Unknown client {to}.]", FAILURE, "failed", "unknown"),
    "too-long": EventFormat("[Message too long: {size} bytes, at most {most}.]", FAILURE, "failed", "too-long"),
    "full": EventFormat("[Mailbox of {to} is full, message not saved.]", FAILURE, "failed", "full"),
    "disk": EventFormat(NOT_SAVED, FAILURE, "failed", "disk"),
    "send-while-offline": EventFormat("[You are offline. Use: {usage}]", FAILURE, "failed", "offline"),
    "undelivered": EventFormat("", FAILURE, "failed", "not-delivered"),
    "one-undelivered": EventFormat("[1 message not delivered.]", FAILURE, "undelivered"),
    "more-undelivered": EventFormat("[{count} messages not delivered.]", FAILURE, "undelivered"),
    "left": EventFormat("[You are Offline. Bye.]", NEWS, "left"),
    "silent": EventFormat("[Server not responding]", FAILURE, "server-silent"),
    "back": EventFormat("[Server is responding again]", NEWS, "server-back"),
    "exiting": EventFormat("[Exiting]", NEWS, "exiting"),
    "server-full": EventFormat("[The server is full.]", FAILURE, "refused", "full"),
    "taken": EventFormat("[Nickname {nick} is taken.]", FAILURE, "refused", "taken"),
    "owned": EventFormat("[Nickname {nick} belongs to someone else.]", FAILURE, "refused", "owned"),
    "owner-encrypts": EventFormat("[Nickname {nick} is used with encryption.]", FAILURE, "refused", "encrypted"),
    "must-encrypt": EventFormat("[The server requires encryption.]", FAILURE, "refused", "secure"),
    "server-insecure": EventFormat("[The server cannot encrypt.]", FAILURE, "refused", "not-secure"),
    "insecure": EventFormat("[This connection is not encrypted.]", FAILURE, "insecure"),
    "peer-insecure": EventFormat("[Messages to {to} are not encrypted.]", FAILURE, "insecure"),
    "not-secure": EventFormat("[{to} cannot decrypt, message not sent.]", FAILURE, "failed", "not-secure"),
    "key-changed": EventFormat("[The key of {to} has changed, message not sent.]", FAILURE, "failed", "key-changed"),
    "key": EventFormat("[The key of {to} has changed, message not sent.]", FAILURE, "failed", "key-changed"),
    "fingerprint": EventFormat("[Fingerprint of {nick} {fingerprint}]", NEWS, "fingerprint"),
    "fingerprint-with": EventFormat("[Fingerprint of {nick} and {to} {fingerprint}]", NEWS, "fingerprint"),
    "verified": EventFormat("[The key of {to} is verified.]", NEWS, "verified"),
    "trusted": EventFormat("[The key of {to} is trusted now. {fingerprint}]", NEWS, "trusted"),
    "no-key": EventFormat("[No key of {nick} is known.]", FAILURE, "error", "no-key"),
    "not-the-key": EventFormat("[The key of {nick} has changed, try {help}.]", FAILURE, "error", "key-changed"),
    "server-key-changed": EventFormat("[The key of the server has changed.]", FAILURE, "refused", "key-changed"),
    "talk-unknown": EventFormat("[Unknown client {nick}.]", FAILURE, "error", "unknown-client"),
    "usage": EventFormat("[Usage: {usage}]", FAILURE, "error", "usage"),
    "command": EventFormat("[Unknown command {name}, try {help}.]", FAILURE, "error", "unknown-command"),
    "object": EventFormat("[Not a command: {line}]", FAILURE, "error", "not-a-command"),
    "no-text": EventFormat("[Not a command, text is missing: {line}]", FAILURE, "error", "not-a-command"),
    "command-while-offline": EventFormat("[You are offline. Use: {usage}]", FAILURE, "error", "offline"),
    "dereg-other": EventFormat("[You can only deregister yourself.]", FAILURE, "error", "not-yours"),
    "reg-other": EventFormat("[You can only register as {nick}.]", FAILURE, "error", "not-yours"),
    "registered-already": EventFormat("[You are registered already.]", NEWS, "error", "registered-already"),
}
UNPROVEN_LINE, BROKEN_LINE = "[Not proven to be from {sender}: {text}]", "[A message from {sender} is damaged.]"
# reasons of refusals, and what is told of them: all others as "taken"
REGISTRATION_REFUSALS = {"full": "server-full", "owned": "owned", "encrypted": "owner-encrypts",
                         "secure": "must-encrypt", "insecure": "server-insecure", "key-changed": "server-key-changed"}
STATUS = frozenset(EVENT_FORMATS)                               # everything but the messages of others
# of no interest to a script that sends one message
ROUTINE = frozenset({"registered", "table", "left", "back", "client-online", "client-offline"})
FOR_PEOPLE = frozenset({"back", "insecure", "peer-insecure"})   # not promised to scripts that read plain lines
SCREEN_LINES = {        # what is told otherwise at a terminal, where nobody compares lines
    "saved": "[Messages received by the server and saved] ({to})",
    "exists": "[The server has reached {to}: sending once more.]",
}


# --- the store of a server ------------------------------------------------------------------------------------

SQLITE_MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x55445043     # "UDPC" in the header of a SQLite file: this is a udpchat store
STORE_FORMAT = 4                # the version of the tables below
OLD_FORMATS = (1, 2, 3)         # of stores that are converted when they are opened. 1: ``seen`` was a wall-clock time
SERVER_KEY = "key"              # in ``meta``: the secret of the server's key, once it has encrypted
CLOCK = "clock"                 # in ``meta``: a JSON list, see ``Mailbox.note_clock``
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE nicks (id INTEGER PRIMARY KEY, nick TEXT NOT NULL UNIQUE, host TEXT NOT NULL, port INTEGER NOT NULL,
    online INTEGER NOT NULL, owner BLOB, seen REAL NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, key BLOB,
    proof BLOB);
CREATE TABLE mail (recipient INTEGER NOT NULL, seq INTEGER NOT NULL, numbers INTEGER NOT NULL, sender TEXT NOT NULL,
    stream INTEGER NOT NULL, n INTEGER NOT NULL, texts BLOB NOT NULL, times TEXT NOT NULL, more TEXT NOT NULL,
    messages INTEGER NOT NULL, size INTEGER NOT NULL, key BLOB, envelope BLOB,
    PRIMARY KEY (recipient, seq)) WITHOUT ROWID;
CREATE TABLE streams (sender TEXT NOT NULL, stream INTEGER NOT NULL, next INTEGER NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (sender, stream)) WITHOUT ROWID;
"""


def identity_of(path: str, follow: bool = True) -> tuple[int, int]:
    """Return what tells a file from all others, whatever its name: device and inode. Raise OSError.

    ``follow``: if ``path`` is a symbolic link, return that of the file that it leads to.
    """
    status = os.stat(path, follow_symlinks=follow)
    return status.st_dev, status.st_ino


def check_store(path: str) -> None:
    """Raise OSError if ``path`` holds anything but a store, or nothing. The file is not changed."""
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a udpchat store")    # a device or a FIFO: not even to be read
    if os.path.getsize(path) == 0:
        return
    with open(path, "rb") as file:
        header = file.read(100)
    if header[:16] != SQLITE_MAGIC or int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise OSError(errno.EINVAL, "it is not a udpchat store")
    if int.from_bytes(header[60:64], "big") not in (STORE_FORMAT, *OLD_FORMATS):
        raise OSError(errno.EINVAL, "it is a udpchat store of another version")


class StoreFile:
    """The SQLite file of a store while it is open: made, or converted from an older format, and watched.

    The write-ahead log (WAL) and ``synchronous=FULL`` make sure that a commit is on the disk when it returns. But the
    file and its log can be removed, renamed, or replaced by a backup while they are open. Writing to them goes on
    without an error then, for nobody: the next server looks for them by their names. Call ``check`` before a commit.
    """

    def __init__(self, path: str, server_id: bytes) -> None:
        """Open or make the store; ``server_id`` is a random id for a new one. Raise OSError and sqlite3.Error."""
        import sqlite3      # here: only a store needs it, and the start of a client is measured
        if path != ":memory:":
            check_store(path)
        self.db = sqlite3.connect(path, timeout=0, isolation_level=None)
        self.db.text_factory = lambda data: data.decode("utf-8", "replace")     # what is damaged raises nothing
        self._prepare(server_id)
        real = os.path.realpath(path)       # SQLite puts the log there, if there are symbolic links
        self._log = real + "-wal"
        self._names = (path, real, self._log) if path != ":memory:" else ()
        self._watch()

    def _prepare(self, server_id: bytes) -> None:
        execute = self.db.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        if execute("PRAGMA user_version").fetchone()[0] != STORE_FORMAT:
            execute("PRAGMA journal_mode = DELETE")     # no WAL yet: ``check_store`` looks at the file alone
        execute("BEGIN IMMEDIATE")
        if not execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            # in one transaction: a crash leaves nothing that ``check_store`` refuses
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            for statement in TABLES.split(";"):
                execute(statement)
            execute("INSERT INTO meta VALUES ('server', ?), ('uptime', 0.0)", (server_id,))
            execute(f"PRAGMA user_version = {STORE_FORMAT}")
        elif execute("PRAGMA user_version").fetchone()[0] != STORE_FORMAT:
            old = execute("PRAGMA user_version").fetchone()[0]
            if old == 1:
                self._convert_times()
            for table, column in (("mail", "key"), ("mail", "envelope"), ("nicks", "key"), ("nicks", "proof")):
                if table == "mail" or old < 3:
                    execute(f"ALTER TABLE {table} ADD COLUMN {column} BLOB")
            execute(f"PRAGMA user_version = {STORE_FORMAT}")
        execute("COMMIT")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA fullfsync = ON")        # macOS: through the cache of the drive, too

    def _convert_times(self) -> None:
        """Convert the wall-clock times of format 1. Any of them may be wrong by years, so only their order is kept.

        All become the moment at which the uptime begins: the latest 0, the others less than a second before it.
        """
        for table in ("nicks", "streams"):
            latest = self.db.execute(f"SELECT max(seen) FROM {table}").fetchone()
            self.db.execute(f"UPDATE {table} SET seen = (seen - ?) / 1e12", latest)
        self.db.execute("UPDATE nicks SET seen = 0.0 WHERE online")
        self.db.execute("INSERT INTO meta VALUES ('uptime', 0.0)")

    def _watch(self) -> None:
        """Note which files have the names of this store now. Raise OSError."""
        self.db.execute("SELECT 1 FROM meta").fetchone()    # at the latest now SQLite opens the log
        self._files = {name: (os.path.islink(name), identity_of(name)) for name in self._names}

    def check(self) -> None:
        """Raise OSError, with the name, if the store or its log is not the file any more that is open here."""
        for name, (is_link, identity) in self._files.items():
            try:
                # a link that has come into the place of the file is not the file: the log is looked for elsewhere then
                if identity_of(name, is_link) == identity:
                    continue
                error = OSError(errno.ESTALE, "it was replaced by another file", name)
            except FileNotFoundError:
                error = OSError(errno.ENOENT, "it was removed or renamed", name)
            if name == self._log or error.errno == errno.ESTALE:
                self._empty_log()
            if name == self._log and error.errno == errno.ENOENT:
                self._begin_log()
            raise error

    def _empty_log(self) -> None:
        """Move what was committed from the log to the store, both of which are still open whatever has their names.

        A log that lies beside another file than its own is a danger: the next server would write it into that. And one
        that was taken away, and comes back, would undo what is written from now on.
        """
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _begin_log(self) -> None:
        """Begin another log in the place of one that is gone, so that the next commit can be written again."""
        self.db.execute("PRAGMA journal_mode = DELETE")
        self.db.execute("PRAGMA journal_mode = WAL")
        self._watch()

    def close(self) -> None:
        """Close the store; leave the log of another store, which is in the place of ours now, where it is."""
        import sqlite3
        try:
            self.check()
            is_ours = True
        except (OSError, sqlite3.Error):
            is_ours = self._is_log_ours()
        if is_ours:
            self.db.close()
        else:
            # SQLite removes the log by its name when it closes. A connection with one reference too many is never
            # closed.
            import ctypes
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.db))

    def _is_log_ours(self) -> bool:
        """Return whether the log may be removed: it is ours, or there is none."""
        try:
            return identity_of(self._log, False) == self._files[self._log][1]
        except OSError as error:
            return error.errno == errno.ENOENT


# --- what is in a store -----------------------------------------------------------------------------------------

MAX_STREAMS = 100_000           # streams whose progress the store remembers; the oldest go first
MAX_CLOCK = 1000                # changes of the wall clock that are known; most are starts of the server
CLOCK_STEP = 1.0                # s that the wall clock may be ahead, or behind, before that is noted
CLOCK_GAP = 1.0                 # s between two such notes, at least
MOST_LOST = 2 ** 20             # numbers of mail for one recipient whose rows may be gone; with more, all is wrong
UPTIME_GAP = 2 * 3600.0         # s; the uptime is noted in the store more often than that: each hour, see ``tidy``

INSERT_MAIL = "INSERT INTO mail VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
CONTENT = "numbers, n, texts, times, more, key, envelope"   # the columns of a row that are a ``Parcel``
SIZE_COLUMN = 10                # of a row of mail
TOTALS = ", ".join([f"total(CASE WHEN typeof({column}) = 'integer' THEN {column} END)"      # else it is damaged
                    for column in ("messages", "size")])

NOWHERE = "typeof(seq) != 'integer' OR seq < 1"     # rows of mail that are damaged so that they have no place


class StoreError(Exception):
    """The store cannot be used; the text says why, for a person."""


def _is_key(value: Any) -> bool:
    """Return whether a column is a key, or something of that size, or empty."""
    return value is None or (type(value) is bytes and len(value) == KEY_BYTES)


class Known:
    """What is known of one nick for good, and the state of its mailbox."""

    __slots__ = ("id", "nick", "host", "port", "online", "owner", "seen", "first", "last", "key", "proof", "messages",
                 "size")

    def __init__(self, id_: int, nick: str, host: str, port: int, online: bool, owner: bytes | None, seen: float,
                 first: int = 1, last: int = 0, key: bytes | None = None, proof: bytes | None = None) -> None:
        self.id = id_
        self.nick = nick
        self.host, self.port = host, port
        self.online = bool(online)  # when it was last written: after a crash, its client may still run
        self.owner = owner          # SHA-256 of the token of its owner; None: none was shown
        self.key = key              # the public key of its owner, who has encrypted; None: none was shown
        self.proof = proof          # the ``bind_proof`` that came with the key
        self.seen = seen            # ``Mailbox.uptime`` at its last sign of life
        self.first = first          # number of the first mail that is not acked
        self.last = last            # number of the last mail ever kept
        self.messages = 0           # that wait
        self.size = 0               # bytes of text that wait

    @property
    def is_owned(self) -> bool:
        """Whether somebody has shown a token, or a key, for the nick."""
        return self.owner is not None or self.key is not None

    @property
    def is_whole(self) -> bool:
        """Whether this can be what was written. Clients drop a whole datagram in which one nick has a wrong entry."""
        return (is_nick(self.nick) and type(self.host) is str and is_host(self.host) and PORT(self.port)
                and type(self.first) is int and type(self.last) is int and 0 < self.first <= self.last + 1
                and _is_key(self.owner) and _is_key(self.key) and _is_key(self.proof))

    @property
    def waiting(self) -> int:
        """How many numbers of mail wait."""
        return self.last - self.first + 1


def _clock_of(text: Any) -> list[tuple[float, float]]:
    """Return what ``Mailbox.note_clock`` has noted, nothing of it if it is damaged: it is only shown."""
    import json
    try:
        noted = [(float(uptime), float(wall)) for uptime, wall in json.loads(text)]
    except (ValueError, TypeError, OverflowError):
        return []
    uptimes = [uptime for uptime, _ in noted]
    return noted if uptimes == sorted(uptimes) and all(map(math.isfinite, chain.from_iterable(noted))) else []


NO_SEAL = bytes(KEY_BYTES), bytes(ENVELOPE_BYTES)     # of bundles that are damaged: their recipient cannot open them
NO_BUNDLE = b"\1\0".ljust(MIN_BUNDLE + 1, b"\0")
DAMAGED = "[Messages were damaged on the disk of the server.]"      # stands for those of a row that cannot be read


def _parcel_of_row(room: int, numbers: Any, n: int, *columns: Any) -> Parcel:
    """Return the parcel of a row; raise ValueError or TypeError if it is damaged.

    ``room``: how many numbers there are from its first one to that of the next row.
    """
    try:
        return Parcel.of_row(room, n, *columns)
    except (ValueError, TypeError):
        if type(numbers) is not int or not 0 < numbers < room:
            raise
        return Parcel.of_row(numbers, n, *columns)      # whole, but a row behind it is gone


def _stand_ins(count: int, sender: str, stream: int = 0, n: int = 1, is_sealed: bool = False) -> list[StoredLetter]:
    """Return what stands for letters that are damaged or gone: the same for each number, so it is shown only once."""
    text, seal = ((NO_BUNDLE, 0), NO_SEAL) if is_sealed else (DAMAGED, ())
    return [((sender, stream, 0.0, seal), n, text, False)] * count


def _letters_in(parcel: Parcel, sender: str, stream: int) -> list[StoredLetter]:
    """Return the letters of a whole row."""
    times, numbers = parcel.times, range(parcel.n, parcel.n + len(parcel.texts))
    more = map(parcel.more.__contains__, numbers) if parcel.more else repeat(False)
    origins: Iterable[Any] = (repeat((sender, stream, times[0], parcel.seal)) if len(set(times)) == 1 else
                              [(sender, stream, at, parcel.seal) for at in times])
    return list(zip(origins, numbers, parcel.texts, more))


class Mailbox:
    """The store: known nicks and their mail, in a SQLite file (or in memory, for ``:memory:``).

    ``commit`` writes everything that was changed since the last one, in one transaction, and only while the file is
    still where it was opened (see ``StoreFile``). Reading sees only what is committed.
    """

    def __init__(self, path: str, server_id: bytes, now: float = 0.0) -> None:
        """Open or make the store; ``server_id`` is a random id for a new one. Raise StoreError if that fails."""
        global sqlite3      # only a store needs it: a client has none, and its start is measured (tests/bench.py)
        import sqlite3
        try:
            self._file = StoreFile(path, server_id)
            self._db = self._file.db
            self._load()
            self._base = self._last_uptime() - now      # the uptime when ``now`` was 0
        except OSError as error:
            raise StoreError(f"cannot open the store {path}: {error.strerror}") from None
        except (sqlite3.Error, LookupError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, sqlite3.OperationalError) else f"it is damaged: {error}"
            if "locked" in reason:
                reason = "another server has it open"
            raise StoreError(f"cannot open the store {path}: {reason}") from None
        self.is_lasting = path != ":memory:"
        self.damaged = 0            # rows that could not be read
        self.failure = ""           # why the last commit that failed did
        self._is_untidy = False     # see ``tidy``
        self._rows: list[tuple[Any, ...]] = []                  # mail to insert
        self._before: dict[str, tuple[int, int, int]] = {}      # last, messages, size before this turn
        self._streams: dict[tuple[str, int], int] = {}          # progress to write
        self._changed: set[str] = set()                         # nicks to write
        self._acked: set[str] = set()                           # nicks whose mail below ``first`` is to be deleted
        self._forgotten: dict[int, str] = {}                    # id -> nick of those to delete

    def _load(self) -> None:
        execute = self._db.execute
        execute(f"SELECT sender, stream, {CONTENT} FROM mail LIMIT 0")      # the names of columns may be damaged, too
        execute("SELECT sender, stream, next, seen FROM streams LIMIT 0")
        self.server_id = bytes(execute("SELECT value FROM meta WHERE key = 'server'").fetchone()[0])
        self.known: dict[str, Known] = {}
        by_id: dict[int, Known] = {}
        for row in execute("SELECT id, nick, host, port, online, owner, seen, first, last, key, proof FROM nicks"
                           " ORDER BY id"):
            known = Known(*row)
            if not known.is_whole:
                raise ValueError(f"what is known of {known.nick!r} cannot be")
            self.known[known.nick] = by_id[known.id] = known
        self._next_id = max(by_id, default=0) + 1
        noted = execute("SELECT value FROM meta WHERE key = ?", (CLOCK,)).fetchone()
        self._clock = _clock_of(noted[0]) if noted is not None else []
        ends: dict[int, int] = {}
        if execute(f"SELECT 1 FROM mail WHERE {NOWHERE} LIMIT 1").fetchone():
            execute(f"DELETE FROM mail WHERE {NOWHERE}")        # nobody can know whose numbers these were
        for id_, first, last, *totals in execute(f"SELECT recipient, min(seq), max(seq), {TOTALS} FROM mail"
                                                 " GROUP BY recipient"):
            known, ends[id_] = by_id[id_], last
            known.messages, known.size = map(int, totals)
            known.first = min(known.first, first)       # what is acked has no row
            if known.last < last < known.last + MOST_LOST:
                known.last = last + MAX_ITEMS - 1       # at most: its rows are not to be written over
        for known in self.known.values():
            if known.last - max(known.first, ends.get(known.id, 0)) > MOST_LOST:
                raise ValueError(f"what is known of {known.nick!r} cannot be")
            if type(known.seen) is not float or known.seen < -1.0:      # see ``StoreFile._convert_times``
                known.seen = math.inf       # nobody knows it: the nick is not to lapse with its mail

    def server_secret(self, new: bytes) -> bytes:
        """Return the secret of the server's key; ``new``: 32 random bytes, which become it in a store that has none.

        Raise StoreError if it cannot be written.
        """
        try:
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (SERVER_KEY, new))
            secret = bytes(self._db.execute("SELECT value FROM meta WHERE key = ?", (SERVER_KEY,)).fetchone()[0])
        except (sqlite3.Error, TypeError) as error:
            raise StoreError(f"the key of the server cannot be kept: {error}") from None
        if len(secret) != SECRET_BYTES:
            raise StoreError("the key of the server is damaged")
        return secret

    @property
    def has_keys(self) -> bool:
        """Whether a server has encrypted with this store."""
        return self._db.execute("SELECT 1 FROM meta WHERE key = ?", (SERVER_KEY,)).fetchone() is not None

    # time

    def _last_uptime(self) -> float:
        """Return the latest uptime in the store: what is written from now on is later.

        What cannot be is left out. One number that is damaged on the disk must not make everybody else long offline.
        """
        execute = self._db.execute
        noted = float(execute("SELECT value FROM meta WHERE key = 'uptime'").fetchone()[0])
        written = execute("SELECT max(seen) FROM (SELECT seen FROM nicks UNION ALL SELECT seen FROM streams)"
                          " WHERE seen <= ?", (noted + UPTIME_GAP,)).fetchone()[0]
        return noted if written is None else max(noted, float(written))

    def uptime(self, now: float) -> float:
        """Return for how many seconds a server has run with this store, in all runs; a crash loses an hour at most."""
        return self._base + now

    def note_clock(self, now: float, wall: float) -> None:
        """Note which wall-clock time it is now, if that does not follow from what was noted before.

        So it can be said to people when somebody was last seen, although that is kept as an uptime.
        """
        uptime = self.uptime(now)
        noted_at, noted = self._clock[-1] if self._clock else (-math.inf, 0.0)
        if abs(noted + uptime - noted_at - wall) <= CLOCK_STEP or 0.0 < uptime - noted_at < CLOCK_GAP:
            return
        if noted_at == uptime:      # nobody was seen since then
            self._clock.pop()
        self._clock = [*self._clock[-MAX_CLOCK + 1:], (uptime, wall)]
        self.tidy()

    def wall_at(self, uptime: float) -> int:
        """Return which wall-clock time it was at an uptime, in whole seconds since 1970; 0: nobody knows."""
        index = bisect_left(self._clock, (uptime,)) - 1     # one run begins with the uptime at which another has ended
        if index < 0 and self._clock and self._clock[0][0] == uptime:
            index = 0
        wall = self._clock[index][1] + uptime - self._clock[index][0] if index >= 0 else 0.0
        return int(wall) if 0 <= wall <= LATEST_DATE else 0       # it is not if it is damaged

    def tidy(self) -> None:
        """Let the next commit write the uptime, and forget the longest silent streams beyond ``MAX_STREAMS``."""
        self._is_untidy = True

    # who is known

    def add(self, nick: str, host: str, port: int, owner: bytes | None, seen: float) -> Known:
        """Make ``nick`` known."""
        known = Known(self._next_id, nick, host, port, False, owner, seen)
        self._next_id += 1
        self.known[nick] = known
        self._changed.add(nick)
        return known

    def changed(self, known: Known) -> None:
        """Note that the attributes of ``known`` are to be written."""
        self._changed.add(known.nick)

    def forget(self, known: Known) -> None:
        """Delete a nick with its owner, its mail and its streams."""
        del self.known[known.nick]
        self._forgotten[known.id] = known.nick
        self._changed.discard(known.nick)
        self._acked.discard(known.nick)
        self._before.pop(known.nick, None)
        self._rows = [row for row in self._rows if row[0] != known.id]

    # mail

    def stream_next(self, sender: str, stream: int) -> int | None:
        """Return the number after the last that was kept of a stream, 1 for a new one. None: it cannot be read now."""
        if (sender, stream) in self._streams:
            return self._streams[sender, stream]
        try:
            found = self._db.execute("SELECT next FROM streams WHERE sender = ? AND stream = ?",
                                     (sender, stream)).fetchone()
        except sqlite3.Error:
            return None
        return int(found[0]) if found else 1

    def keep(self, known: Known, sender: str, stream: int, parcel: Parcel) -> None:
        """Put whole texts into somebody's mailbox, from the next ``commit`` on."""
        if known.nick not in self._before:
            self._before[known.nick] = (known.last, known.messages, known.size)
        self._rows.append(parcel.row(known.id, known.last + 1, sender, stream))
        size = self._rows[-1][SIZE_COLUMN]
        known.last += len(parcel.texts)
        known.messages += parcel.messages
        known.size += size
        self._streams[sender, stream] = parcel.n + len(parcel.texts)
        self._changed.add(known.nick)

    def fetch(self, known: Known, seq: int, limit: int) -> list[StoredLetter]:
        """Return the committed mail from number ``seq`` on: ``limit`` letters, and the rest of the last one's bundle.

        There is less if there is no more, and none if it is unreadable now.
        """
        letters: list[StoredLetter] = []
        last = self._before[known.nick][0] if known.nick in self._before else known.last    # what is committed
        try:
            rows = self._db.execute(
                f"SELECT seq, sender, stream, {CONTENT} FROM mail WHERE recipient = :id AND seq >= (SELECT"
                " coalesce(max(seq), 0) FROM mail WHERE recipient = :id AND seq <= :seq) AND seq <= :last ORDER BY seq",
                {"id": known.id, "seq": seq, "last": last})
            following = next(rows, None)
            gap = (last + 1 if following is None else following[0]) - max(seq, known.first)
            letters += self._lost(known.nick, min(gap, limit))
            while following is not None and len(letters) < limit:
                row, following = following, next(rows, None)
                start, *columns = row   # the beginning of the next row is right, whatever is damaged in this one
                room = (last + 1 if following is None else following[0]) - start
                found = self._letters(known.nick, min(room, max(seq - start, 0) + limit + MAX_ITEMS), *columns)
                letters += found[seq - start:] if start < seq else found
        except sqlite3.Error:
            pass        # what was read until now is right
        end = limit
        while end < len(letters) and letters[end][0][3] and letters[end][2][0] is letters[end - 1][2][0]:
            end += 1        # a bundle that is loaded in parts is sent as often
        return letters[:end]

    def _lost(self, recipient: str, numbers: int) -> list[StoredLetter]:
        """Return what stands for so many numbers of which there is no row: their recipient waits for them."""
        if numbers <= 0:
            return []
        self.damaged += 1
        return _stand_ins(numbers, recipient)

    def _letters(self, recipient: str, room: int, sender: Any, stream: Any, numbers: Any, n: Any,
                 *columns: Any) -> list[StoredLetter]:
        """Return the letters of a row, and what stands for those missing until the next row, ``room`` numbers ahead."""
        is_sender_whole = is_nick(sender)
        is_stream_whole = type(stream) is int and stream >= 0
        try:
            if not is_sender_whole or not is_stream_whole:
                raise ValueError("nobody knows whose it is")
            letters = _letters_in(_parcel_of_row(room, numbers, n, *columns), sender, stream)
        except (ValueError, TypeError):
            self.damaged += 1
            return _stand_ins(room, sender if is_sender_whole else recipient, stream if is_stream_whole else 0,
                              n if type(n) is int and n > 0 else 1, is_sender_whole and columns[-2:] != (None, None))
        letters += self._lost(recipient, room - len(letters))
        return letters

    def acked(self, known: Known, first: int) -> None:
        """Note that the mail below number ``first`` was shown; the next ``commit`` deletes it."""
        if known.first < first <= known.last + 1:
            known.first = first
            self._acked.add(known.nick)

    # the transaction

    @property
    def urgent(self) -> bool:
        """Whether there is anything to commit before a client hears of it; mail that was acked can be deleted later."""
        return bool(self._rows or self._streams or self._changed or self._forgotten or self._is_untidy)

    @property
    def pending(self) -> bool:
        """Whether there is anything to commit."""
        return self.urgent or bool(self._acked)

    def commit(self, now: float) -> bool:
        """Write everything since the last commit; return whether that went well. If not, undo the mail of this turn."""
        if not self.pending:
            return True
        try:
            self._file.check()
            self._db.execute("BEGIN IMMEDIATE")
            freed = self._write(self.uptime(now))
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self.failure = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._undo()
            return False
        for known, messages, size in freed:
            known.messages -= messages
            known.size -= size
        self._drop_mail_of_this_turn()
        for written in (self._changed, self._acked, self._forgotten):
            written.clear()
        self._is_untidy = False
        return True

    def _write(self, uptime: float) -> list[tuple[Known, int, int]]:
        """Write everything pending; return from whose mailbox how many messages and bytes were deleted."""
        import json
        run, many = self._db.execute, self._db.executemany
        for id_, nick in self._forgotten.items():
            run("DELETE FROM nicks WHERE id = ?", (id_,))
            run("DELETE FROM mail WHERE recipient = ?", (id_,))
            run("DELETE FROM streams WHERE sender = ?", (nick,))
        many(INSERT_MAIL, self._rows)
        many("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?)",
             [(*key, next_, uptime) for key, next_ in self._streams.items()])
        freed = []
        for nick in self._acked:
            freed.append((self.known[nick], *self._delete_mail(self.known[nick])))
        changed = [self.known[nick] for nick in self._changed | self._acked]
        many("INSERT INTO nicks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
             " host = excluded.host, port = excluded.port, online = excluded.online, owner = excluded.owner,"
             " seen = excluded.seen, first = excluded.first, last = excluded.last, key = excluded.key,"
             " proof = excluded.proof",
             [(k.id, k.nick, k.host, k.port, k.online, k.owner, k.seen, k.first, k.last, k.key, k.proof)
              for k in changed])
        if self._is_untidy:
            run("UPDATE meta SET value = ? WHERE key = 'uptime'", (uptime,))
            run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (CLOCK, json.dumps(self._clock)))
            run("DELETE FROM streams WHERE seen < (SELECT seen FROM streams ORDER BY seen DESC LIMIT 1 OFFSET ?)",
                (MAX_STREAMS - 1,))
        return freed

    def _delete_mail(self, known: Known) -> tuple[int, int]:
        """Delete the mail below ``first``; return how many messages and bytes that was."""
        run, first, start = self._db.execute, known.first, None
        if first <= known.last:     # the row that ``first`` is in: it ends where the next begins, see ``fetch``
            start = run("SELECT max(seq) FROM mail WHERE recipient = ? AND seq <= ?", (known.id, first)).fetchone()[0]
        below = known.id, first if start is None else start
        whole, row_at = "recipient = ? AND seq < ?", "recipient = ? AND seq = ?"
        messages, size = map(int, run(f"SELECT {TOTALS} FROM mail WHERE {whole}", below).fetchone())
        run(f"DELETE FROM mail WHERE {whole}", below)
        if start is None or start == first:
            return messages, size
        # the row that ``first`` splits: its rest is written again, so that what was acked is not on the disk any more,
        # but in a bundle with texts that were not
        end = run("SELECT min(seq) FROM mail WHERE recipient = ? AND seq > ?", below).fetchone()[0] or known.last + 1
        found = run(f"SELECT sender, stream, {CONTENT} FROM mail WHERE {row_at}", below).fetchone()
        if found is None:       # pages of the file lead elsewhere
            return messages, size
        sender, stream, *columns = found
        try:
            parcel = _parcel_of_row(end - start, *columns)
        except (ValueError, TypeError):     # damaged on the disk: what is left still stands for its numbers
            run(f"UPDATE mail SET seq = ?, numbers = ? WHERE {row_at}", (first, end - first, *below))
            return messages, size
        counted = map(int, run(f"SELECT {TOTALS} FROM mail WHERE {row_at}", below).fetchone())      # as in ``_load``
        messages, size = map(sum, zip((messages, size), counted))
        run(f"DELETE FROM mail WHERE {row_at}", below)
        if first - start >= len(parcel.texts):      # what follows is gone
            return messages, size
        rest = parcel.part(first - start, len(parcel.texts))
        row = rest.row(known.id, first, sender, stream)
        run(INSERT_MAIL, row)
        return messages - rest.messages, size - row[SIZE_COLUMN]

    def _undo(self) -> None:
        try:
            self._db.execute("ROLLBACK")
        except sqlite3.Error:
            pass    # SQLite has rolled back by itself
        for nick, (last, messages, size) in self._before.items():
            known = self.known[nick]
            known.last, known.messages, known.size = last, messages, size
        self._drop_mail_of_this_turn()

    def _drop_mail_of_this_turn(self) -> None:
        for dropped in (self._before, self._rows, self._streams):
            dropped.clear()

    def close(self) -> None:
        """Close the file; what is not committed is lost."""
        self._file.close()


# --- the keys of others ---------------------------------------------------------------------------------------

KNOWN_LIMIT = 2 ** 24     # characters: 100,000 keys
KNOWN_LINE_SIZE = 1024    # bytes that a line has at most
# a folded nick may have blanks in it, as that of U+FDFA has, or be empty
KNOWN_LINE = r"server (\S+) ([0-9a-f]{64})|peer ([0-9a-f]{64}) (.*) ([0-9a-f]{64}) (seen|verified)|.* torn|"


class KnownKeys:
    """The keys that others had at first contact, in the file ``known``. A line for each server, and for each client::

        server HOST:PORT KEY
        peer SERVER-KEY NICK KEY seen        or ``verified``: the user has compared it

    Lines are only appended, each by one write, so that several programs may do that at once. The last one for a name
    counts. If a crash or a full disk has torn the last line, the next write marks it as such. Any other line that
    cannot be read may be one that matters: then the file is not used.
    """

    def __init__(self, path: str = "") -> None:
        """Read the file, if there is one; "": nothing is remembered longer than this object. Raise OSError."""
        self._path = path
        self._servers: dict[str, bytes] = {}
        self._peers: dict[tuple[bytes, str], tuple[bytes, bool]] = {}
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(KNOWN_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            text = ""
        if len(text) > KNOWN_LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        *lines, rest = text.split("\n")
        for number, line in enumerate((*lines, rest), 1):
            found = re.fullmatch(KNOWN_LINE, line)
            if found is not None and found[1]:
                self._servers[found[1]] = bytes.fromhex(found[2])
            elif found is not None and found[3]:
                self._peers[bytes.fromhex(found[3]), found[4]] = bytes.fromhex(found[5]), found[6] == "verified"
            elif found is None and number <= len(lines):
                raise OSError(errno.EINVAL, f"line {number} cannot be read")

    def server(self, name: str) -> bytes | None:
        """Return the key of the server with a name, None if it is not known."""
        return self._servers.get(name)

    def add_server(self, name: str, key: bytes) -> None:
        """Note the key of a server, on the disk. Raise OSError."""
        self._servers[name] = key
        self._append(f"server {name} {key.hex()}")

    def peer(self, server: bytes, nick: str) -> tuple[bytes, bool] | None:
        """Return the key of a nick, folded, at the server with a key, and whether it is verified; None: not known."""
        return self._peers.get((server, nick))

    def add_peer(self, server: bytes, nick: str, key: bytes, is_verified: bool) -> None:
        """Note the key of a client, on the disk. Raise OSError; then it is known as long as this object."""
        self._peers[server, nick] = key, is_verified
        self._append(f"peer {server.hex()} {nick} {key.hex()} {'verified' if is_verified else 'seen'}")

    def _append(self, line: str) -> None:
        if not self._path:
            return
        os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size > KNOWN_LIMIT - KNOWN_LINE_SIZE:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            rest = os.pread(descriptor, KNOWN_LINE_SIZE, max(0, size - KNOWN_LINE_SIZE)).rpartition(b"\n")[2]
            end = "" if not rest else "\n" if re.fullmatch(KNOWN_LINE, rest.decode("utf-8", "replace")) else " torn\n"
            data = f"{end}{line}\n".encode()
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(*keys: bytes) -> str:
    """Return 60 digits for people to compare: of one public key, or of those of two users, in whatever order."""
    number = int.from_bytes(sha256(b"udpchat fingerprint 1" + b"".join(sorted(keys))), "big")
    return grouped(f"{number % 10 ** 60:060}")


def grouped(digits: str) -> str:
    """Return the digits of a fingerprint in groups of five."""
    return " ".join(digits[start:start + 5] for start in range(0, 60, 5))


class Pin:
    """Which key the server must have: that of an earlier contact, or the one whose fingerprint the user has given.

    Without either it is the first one that answers a handshake, and that one from then on.
    """

    def __init__(self, key: bytes | None = None, digits: str = "",
                 keep: Callable[[bytes], None] = lambda key: None) -> None:
        """``digits``: see ``fingerprint``; "": any. ``keep``: called with a key at first contact, to be remembered."""
        self.key = key if not digits or (key is not None and fingerprint(key) == digits) else None
        self.digits = digits
        self.refused = b""      # another key, which was shown last
        self._keep = keep

    def admits(self, key: bytes) -> bool:
        """Return whether this may be the server's key."""
        if self.key is not None:
            return key == self.key
        return not self.digits or fingerprint(key) == self.digits

    def accept(self, key: bytes, is_lasting: bool) -> None:
        """Note the key with which a handshake has succeeded; ``is_lasting``: the server has it in its next run, too."""
        if self.key is None:
            self.key = key
            if is_lasting:
                self._keep(key)

    @property
    def advice(self) -> str:
        """How to go on if the key that was refused is the right one."""
        expected, shown = fingerprint(self.key) if self.key is not None else self.digits, fingerprint(self.refused)
        return (f"the fingerprint of the server was {expected}, and is {shown} now; if that is right, start with"
                f" --server-key '{shown}'")


# --- the user's identity --------------------------------------------------------------------------------------

LOCK_ATTEMPTS = 40        # 50 ms apart: to make an identity takes much less. One that was killed leaves the lock behind
SECRET_BYTES = 32         # of randomness: nobody guesses it


def load_secret(path: str) -> bytes:
    """Return the secret in the file ``path``; make the file (0600) if there is none. Raise OSError."""
    try:
        with open(path, "rb") as file:
            secret = bytes.fromhex(file.read(1024).decode("ascii", "replace").strip())
        if len(secret) != SECRET_BYTES:
            raise ValueError
        return secret
    except ValueError:
        raise OSError(errno.EINVAL, "is not a udpchat identity") from None
    except FileNotFoundError:
        pass
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    draft = f"{path}.{os.urandom(8).hex()}"    # not the process's number: a container gives the same to each
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(os.urandom(SECRET_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        publish(draft, path)
    finally:
        remove_quietly(draft)
    return load_secret(path)


def remove_quietly(path: str) -> None:
    """Remove a file, or an empty directory, if it is still there. Raise OSError."""
    try:
        if os.path.isdir(path):
            os.rmdir(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def publish(draft: str, path: str) -> None:
    """Give a whole file the name ``path``, unless there is one: another process was faster, and its secret is ours.

    A hard link does that in one step. Where the file system has none (exFAT, many shared folders), a directory is the
    lock under which the file is renamed. Raise OSError.
    """
    try:
        os.link(draft, path)
        return
    except FileExistsError:
        return
    except OSError:
        lock = path + ".lock"
    for _ in range(LOCK_ATTEMPTS):
        try:
            os.mkdir(lock)
            break
        except FileExistsError:
            time.sleep(0.05)
    try:
        if not os.path.exists(path):
            os.rename(draft, path)
    finally:
        remove_quietly(lock)        # two that waited in vain for a lock, left by a killed process, both come here
