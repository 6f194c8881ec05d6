"""Who is who, and what waits for them.

Rules of this file
------------------
- No sockets, no clock, no timers, no printing. Monotonic time (``now``) and wall-clock time (``wall``), both in
  seconds, come in as arguments; so do random ids. The side effects are the SQLite file of the ``Mailbox``, and the
  file of one's own secret.
- It knows nothing of datagrams: it decides, its owner tells the clients.
- What must survive a crash is in the store before anybody hears of it: the owner calls ``commit`` first, and
  sends what was decided in that turn afterwards.

How it works
------------
``Table`` is the dictionary of clients. Every change gives one entry a new version, no two entries share one, and
an entry remembers the version of its last change. So "what changed since version v" is one question with one kind
of answer, whether v is the version before (a broadcast) or 0 (a snapshot). The server owns a table, every client
has a ``Mirror`` of it.

``Mailbox`` is the store: who is known, who owns which nick, the messages that wait, and how far each stream was
kept. The mail of one recipient is numbered 1, 2, 3 ... without gaps for good; it is deleted from the low end,
when the recipient has acked it. Everything that one turn of the loop changes is written in one transaction by
``commit``; if that fails, the messages of this turn count as never taken, and all else is tried again.

``Registry`` is what the server decides on these two: who gets a nick, when somebody goes online (not before the
mail that waited is acked) and offline, what happens to a message that should be kept.

A nick belongs to its first owner: whoever registers it with a token (see ``token_for``) owns it, and the store
keeps a hash of that token. Without a token it is nobody's, and its mail goes to whoever comes.
"""
from __future__ import annotations

import heapq
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple
from collections.abc import Collection, Iterator

if TYPE_CHECKING:
    import json
    import sqlite3

Address = tuple[str, int]
Row = list[object]

ONLINE, OFFLINE, GONE = "online", "offline", "gone"


# --- the table ------------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One client, as of the version of its last change."""

    nick: str
    host: str
    port: int
    state: str
    version: int

    def row(self) -> Row:
        """The entry as it travels."""
        return [self.nick, self.host, self.port, self.state]


class Page(NamedTuple):
    """Every entry that changed in (since, version]."""

    since: int
    version: int
    rows: list[Row]


ROW_OVERHEAD = 20         # bytes of one entry on the wire beside its nick and its host
MAX_TOMBSTONES = 100_000  # forgotten nicks that a table still tells of; the oldest go first


class Table:
    """The versioned dictionary of clients: nick -> ``Entry``."""

    def __init__(self) -> None:
        self.version = 0
        self.entries: dict[str, Entry] = {}
        self._gone: dict[str, Entry] = {}
        self._log: list[Entry] = []     # by version; entries that changed again are stale

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, nick: str) -> Entry | None:
        """The entry of ``nick``, None for an unknown one."""
        return self.entries.get(nick)

    def is_online(self, nick: str) -> bool:
        """Whether ``nick`` is known and online."""
        entry = self.entries.get(nick)
        return entry is not None and entry.state == ONLINE

    def set(self, nick: str, host: str, port: int, state: str) -> bool:
        """Changes one entry; gives whether that changed anything (and so took a new version)."""
        old = self.entries.get(nick)
        if old is None and state == GONE or old is not None and old[1:4] == (host, port, state):
            return False
        self.version += 1
        self._put(Entry(nick, host, port, state, self.version))
        return True

    def _put(self, entry: Entry) -> None:
        if entry.state == GONE:
            self.entries.pop(entry.nick, None)
            self._gone[entry.nick] = entry
            if len(self._gone) > MAX_TOMBSTONES:
                del self._gone[next(iter(self._gone))]
        else:
            self._gone.pop(entry.nick, None)
            self.entries[entry.nick] = entry
        self._log.append(entry)
        if len(self._log) > 2 * (len(self.entries) + len(self._gone)) + 64:
            self._log = [kept for kept in self._log if self._is_current(kept)]

    def _is_current(self, entry: Entry) -> bool:
        return self.entries.get(entry.nick) is entry or self._gone.get(entry.nick) is entry

    def _after(self, version: int) -> int:
        """Where in the log the changes after ``version`` begin."""
        low, high = 0, len(self._log)
        while low < high:
            middle = (low + high) // 2
            if self._log[middle].version <= version:
                low = middle + 1
            else:
                high = middle
        return low

    def pages(self, since: int, size: int) -> Iterator[Page]:
        """What changed after version ``since``, in pages of about ``size`` bytes on the wire; none if nothing did.

        Even a snapshot tells who is gone: part of an earlier answer to the same question may have arrived.
        """
        start, used, last = since, 0, since
        rows: list[Row] = []
        for index in range(self._after(since), len(self._log)):
            entry = self._log[index]
            if not self._is_current(entry):
                continue
            cost = len(entry.nick.encode()) + len(entry.host) + ROW_OVERHEAD
            if rows and used + cost > size:
                yield Page(start, last, rows)
                start, rows, used = last, [], 0
            rows.append(entry.row())
            used += cost
            last = entry.version
        if self.version > since:
            yield Page(start, self.version, rows)

    def apply(self, page: Page) -> list[str] | None:
        """Takes a page into a mirror; gives the nicks that it changed, or None where pages before it are missing."""
        if page.since > self.version:
            return None
        if page.version <= self.version:
            return []
        changed = []
        self.version = page.version
        for nick, host, port, state in page.rows:
            assert isinstance(nick, str) and isinstance(host, str) and isinstance(port, int) and isinstance(state, str)
            entry = Entry(nick, host, port, state, page.version)
            old = self.entries.get(nick)
            if old is None and state == GONE or old is not None and old[:4] == entry[:4]:
                continue
            if state == GONE:
                del self.entries[nick]
            else:
                self.entries[nick] = entry
            changed.append(nick)
        return changed


class Mirror:
    """A client's copy of the server's table.

    A server that was restarted has another ``boot`` and numbers its table anew: that one grows beside the old one,
    which stays in force until the new one is whole, and is then dropped with all that the new one does not name.
    """

    def __init__(self) -> None:
        self.table = Table()        # in force
        self.boot = 0
        self._fresh: Table | None = None     # of a new boot, until it is whole
        self._target = 0            # the version to reach

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the table in force is that of the server as it runs now."""
        return self._fresh is None

    @property
    def version(self) -> int:
        """Up to which version the server's table, as it runs now, is here."""
        return (self.table if self._fresh is None else self._fresh).version

    @property
    def is_whole(self) -> bool:
        """Whether that is as far as the server is known to be."""
        return self.version >= self._target

    def register(self, boot: int, version: int) -> None:
        """A session has begun, with a server whose table has that version."""
        if boot != self.boot:
            self.boot = boot
            self._fresh = Table()
        self._target = version

    def expect(self, version: int) -> bool:
        """Takes note of how far the server is; gives whether something is missing here."""
        self._target = max(self._target, version)
        return version > self.version

    def apply(self, page: Page) -> list[str] | None:
        """Takes a page; gives the nicks that it changed in the table in force, None if pages before it are missing."""
        if self._fresh is None:
            changed = self.table.apply(page)
        else:
            changed = self._fresh.apply(page)
            if changed is not None:
                changed = self._swap(self._fresh) if self.is_whole else []
        if changed is None:
            self.expect(page.version)
        return changed

    def _swap(self, fresh: Table) -> list[str]:
        """Puts the table of the new boot in force."""
        old, self.table, self._fresh = self.table, fresh, None
        return [nick for nick in {**old.entries, **fresh.entries}
                if (old.get(nick) or ())[:4] != (fresh.get(nick) or ())[:4]]

    def distrust(self) -> list[str]:
        """The table in force is too old to say who is online; gives the nicks that are offline now."""
        return [nick for nick, host, port, _, _ in list(self.table.entries.values())
                if self.table.set(nick, host, port, OFFLINE)]


# --- the store ------------------------------------------------------------------------------------------------

APPLICATION_ID = 0x55445043     # "UDPC" in the header of a SQLite file: this is a udpchat store
FORMAT = 1                      # the version of the tables below
MAX_KNOWN = 100_000             # nicks; beyond it one that is offline without mail goes, see ``_idle_nick``
MAX_STREAMS = 100_000           # streams whose progress the store remembers; the oldest go first
MAILBOX_LIMIT = 100_000         # messages that wait for one recipient
MAILBOX_SIZE = 64 * 2 ** 20     # bytes of text that wait for one recipient
MAX_PIECE_SIZE = 768            # bytes of text that one number can have
MAX_NICK_SIZE = 32              # characters
NICK_LAPSE = 90.0               # days offline after which a nick is nobody's any more
DAY = 86400.0                   # s

SQLITE_MAGIC = b"SQLite format 3\0"
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE nicks (id INTEGER PRIMARY KEY, nick TEXT NOT NULL UNIQUE, host TEXT NOT NULL, port INTEGER NOT NULL,
    online INTEGER NOT NULL, owner BLOB, seen REAL NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL);
CREATE TABLE mail (recipient INTEGER NOT NULL, seq INTEGER NOT NULL, numbers INTEGER NOT NULL, sender TEXT NOT NULL,
    stream INTEGER NOT NULL, n INTEGER NOT NULL, texts TEXT NOT NULL, times TEXT NOT NULL, more TEXT NOT NULL,
    messages INTEGER NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (recipient, seq)) WITHOUT ROWID;
CREATE TABLE streams (sender TEXT NOT NULL, stream INTEGER NOT NULL, next INTEGER NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (sender, stream)) WITHOUT ROWID;
"""
INSERT_MAIL = "INSERT INTO mail VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class StoreError(Exception):
    """The store cannot be used; the text says why, for a person."""


class Known:
    """What is known of one nick for good, and the state of its mailbox."""

    __slots__ = ("id", "nick", "host", "port", "online", "owner", "seen", "first", "last", "messages", "size")

    def __init__(self, id_: int, nick: str, host: str, port: int, online: bool, owner: bytes | None, seen: float,
                 first: int = 1, last: int = 0) -> None:
        self.id = id_
        self.nick = nick
        self.host = host
        self.port = port
        self.online = online        # when it was last written: after a crash, who may still run
        self.owner = owner          # SHA-256 of its token, None: nobody's
        self.seen = seen            # wall-clock time of its last sign of life
        self.first = first          # number of the first mail that is not acked
        self.last = last            # number of the last mail ever kept
        self.messages = 0           # that wait
        self.size = 0               # bytes of text that wait

    @property
    def waiting(self) -> int:
        """How many numbers of mail wait."""
        return self.last - self.first + 1


class Parcel(NamedTuple):
    """Consecutive numbers of one stream, from ``n`` on, as they are kept: one row of the store.

    ``times``: when each was sent. ``more``: the numbers whose text the next one continues.
    """

    n: int
    texts: list[str]
    times: list[float]
    more: Collection[int]

    def part(self, start: int, end: int) -> Parcel:
        """The numbers at the positions [start, end) alone."""
        return Parcel(self.n + start, self.texts[start:end], self.times[start:end],
                      [number for number in self.more if self.n + start <= number < self.n + end])

    @property
    def messages(self) -> int:
        """How many texts end in it."""
        return len(self.texts) - len(self.more)

    @property
    def size(self) -> int:
        """Bytes of UTF-8 of the texts."""
        joined = "".join(self.texts)
        return len(joined) if joined.isascii() else len(joined.encode())

    def row(self, recipient: int, seq: int, sender: str, stream: int, size: int) -> tuple[object, ...]:
        """The parcel as a row of the store."""
        times = self.times[:1] if self.times.count(self.times[0]) == len(self.times) else self.times
        return (recipient, seq, len(self.texts), sender, stream, self.n, json.dumps(self.texts, ensure_ascii=False),
                json.dumps(times), json.dumps(sorted(self.more)) if self.more else "", self.messages, size)

    @classmethod
    def of_row(cls, numbers: int, n: int, texts: str, times: str, more: str) -> Parcel:
        """The parcel of these columns of a row; raises ValueError if they are damaged."""
        whole, at, continued = json.loads(texts), json.loads(times), json.loads(more) if more else ()
        if not (type(n) is int and n > 0 and len(whole) == numbers and len(at) in (1, numbers)
                and set(map(type, whole)) == {str} and set(map(type, at)) == {float}
                and (not continued or set(continued) <= set(range(n, n + numbers)))):
            raise ValueError("the parcel is damaged")
        if not ("".join(whole).isascii() and len(max(whole, key=len)) <= MAX_PIECE_SIZE
                or max(len(text.encode()) for text in whole) <= MAX_PIECE_SIZE):
            raise ValueError("a piece is too long")
        return cls(n, whole, at if len(at) == numbers else at * numbers, continued)


Letter = list[Any]      # one number of somebody's mail: [sender, stream, n, at, text, more]
DAMAGED = "[Messages were damaged on the disk of the server.]"      # stands for those of a row that cannot be read


def import_modules() -> None:
    """Imports what only a store needs: a client has none, and its start is measured (tests/bench.py)."""
    global json, sqlite3
    import json
    import sqlite3


def check_file(path: str) -> None:
    """Raises StoreError if ``path`` holds anything but a store, or nothing. Does not touch it."""
    try:
        if not os.path.exists(path):
            return
        if not os.path.isfile(path):
            raise StoreError(f"{path} is not a udpchat store")      # a device or a FIFO: not even to be read
        if os.path.getsize(path) == 0:
            return
        with open(path, "rb") as file:
            header = file.read(100)
    except OSError as error:
        raise StoreError(f"cannot open the store {path}: {error.strerror}") from None
    if header[:16] != SQLITE_MAGIC or int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StoreError(f"{path} is not a udpchat store")
    if int.from_bytes(header[60:64], "big") != FORMAT:
        raise StoreError(f"{path} is a udpchat store of another version")


class Mailbox:
    """The store: known nicks and their mail, in a SQLite file (or in memory, for ``:memory:``).

    ``commit`` writes all that was changed since the last one, in one transaction (WAL, synchronous=FULL).
    """

    def __init__(self, path: str, server_id: bytes) -> None:
        """Opens or makes the store; ``server_id`` is a random id for a new one. Raises StoreError."""
        import_modules()
        if path != ":memory:":
            check_file(path)
        try:
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            self._db.text_factory = lambda data: data.decode("utf-8", "replace")    # what is damaged raises nothing
            self._prepare(server_id)
            self._load()
        except (sqlite3.Error, OSError, LookupError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, (sqlite3.OperationalError, OSError)) else f"it is damaged: {error}"
            if "locked" in reason:
                reason = "another server has it open"
            raise StoreError(f"cannot open the store {path}: {reason}") from None
        self.healthy = True
        self.damaged = 0            # rows that could not be read
        self._rows: list[tuple[object, ...]] = []               # mail to insert
        self._before: dict[str, tuple[int, int, int]] = {}      # last, messages, size before this turn
        self._streams: dict[tuple[str, int], int] = {}          # progress to write
        self._changed: set[str] = set()                         # nicks to write
        self._acked: set[str] = set()                           # nicks whose mail below ``first`` goes
        self._forgotten: dict[int, str] = {}                    # id -> nick of those to delete

    def _prepare(self, server_id: bytes) -> None:
        execute = self._db.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("BEGIN IMMEDIATE")
        if not execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            # in one transaction, and before there is a WAL: a crash leaves nothing that ``check_file`` refuses
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            execute(f"PRAGMA user_version = {FORMAT}")
            for statement in TABLES.split(";"):
                execute(statement)
            execute("INSERT INTO meta VALUES ('server', ?)", (server_id,))
        execute("COMMIT")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA fullfsync = ON")        # macOS: through the cache of the drive, too

    def _load(self) -> None:
        execute = self._db.execute
        self.server_id = bytes(execute("SELECT value FROM meta WHERE key = 'server'").fetchone()[0])
        self.known: dict[str, Known] = {}
        by_id: dict[int, Known] = {}
        for id_, nick, host, port, online, owner, seen, first, last in execute(
                "SELECT id, nick, host, port, online, owner, seen, first, last FROM nicks ORDER BY id"):
            known = Known(id_, nick, host, port, bool(online), owner, seen, first, last)
            self.known[nick] = by_id[id_] = known
        self._next_id = max(by_id, default=0) + 1
        for id_, messages, size in execute("SELECT recipient, sum(messages), sum(size) FROM mail GROUP BY recipient"):
            by_id[id_].messages, by_id[id_].size = messages, size

    # who is known

    def add(self, nick: str, host: str, port: int, owner: bytes | None, seen: float) -> Known:
        """Makes ``nick`` known."""
        known = Known(self._next_id, nick, host, port, False, owner, seen)
        self._next_id += 1
        self.known[nick] = known
        self._changed.add(nick)
        return known

    def changed(self, known: Known) -> None:
        """Takes note that the attributes of ``known`` are to be written."""
        self._changed.add(known.nick)

    def forget(self, known: Known) -> None:
        """Drops a nick with its owner, its mail and its streams."""
        del self.known[known.nick]
        self._forgotten[known.id] = known.nick
        self._changed.discard(known.nick)
        self._acked.discard(known.nick)
        self._before.pop(known.nick, None)
        self._rows = [row for row in self._rows if row[0] != known.id]

    # mail

    def stream_next(self, sender: str, stream: int) -> int:
        """The number after the last that was kept of a stream; 1 for one never seen, 0 if that cannot be read now."""
        if (sender, stream) in self._streams:
            return self._streams[sender, stream]
        try:
            found = self._db.execute("SELECT next FROM streams WHERE sender = ? AND stream = ?",
                                     (sender, stream)).fetchone()
        except sqlite3.Error:
            self.healthy = False
            return 0
        return int(found[0]) if found else 1

    def keep(self, known: Known, sender: str, stream: int, parcel: Parcel) -> None:
        """Puts whole texts into somebody's mailbox, from the next ``commit`` on."""
        if known.nick not in self._before:
            self._before[known.nick] = (known.last, known.messages, known.size)
        size = parcel.size
        self._rows.append(parcel.row(known.id, known.last + 1, sender, stream, size))
        known.last += len(parcel.texts)
        known.messages += parcel.messages
        known.size += size
        self._streams[sender, stream] = parcel.n + len(parcel.texts)
        self._changed.add(known.nick)

    def fetch(self, known: Known, seq: int, limit: int) -> list[Letter]:
        """The mail with the numbers ``seq``, ``seq`` + 1, ..., at most ``limit``, of what is committed."""
        letters: list[Letter] = []
        try:
            rows = self._db.execute(
                "SELECT seq, numbers, sender, stream, n, texts, times, more FROM mail WHERE recipient = ?1 AND seq >="
                " (SELECT max(seq) FROM mail WHERE recipient = ?1 AND seq <= ?2) ORDER BY seq", (known.id, seq))
            row = next(rows, None)
            while row is not None and len(letters) < limit:
                following = next(rows, None)
                start, numbers, *columns = row
                most = (known.last + 1 if following is None else following[0]) - start
                if following is not None or type(numbers) is not int or not 0 < numbers <= most:
                    numbers = most      # the next row tells for sure
                found = self._letters(known.nick, numbers, *columns)
                letters += found[seq - start:] if start < seq else found
                row = following
        except sqlite3.Error:
            self.healthy = False
        return letters[:limit]

    def _letters(self, recipient: str, numbers: int, sender: str, stream: int, n: int, *columns: str) -> list[Letter]:
        """The letters of a row. Of a damaged one, all are the same: it is shown once, and the numbers stay right."""
        known_sender = type(sender) is str and (
            sender in self.known or 0 < len(sender) <= MAX_NICK_SIZE and all(c.isalnum() or c in "_.-" for c in sender))
        known_stream = type(stream) is int and stream >= 0
        try:
            if not (known_sender and known_stream):
                raise ValueError("nobody knows whose it is")
            parcel = Parcel.of_row(numbers, n, *columns)
        except (ValueError, TypeError):
            self.damaged += 1
            return [[sender if known_sender else recipient, stream if known_stream else 0,
                     n if type(n) is int and n > 0 else 1, 0.0, DAMAGED, False]] * numbers
        more = parcel.more
        return [[sender, stream, number, at, text, number in more]
                for number, (text, at) in enumerate(zip(parcel.texts, parcel.times), n)]

    def acked(self, known: Known, first: int) -> None:
        """Takes note that the mail below number ``first`` was shown; the next ``commit`` deletes it."""
        if known.first < first <= known.last + 1:
            known.first = first
            self._acked.add(known.nick)

    # the transaction

    @property
    def urgent(self) -> bool:
        """Whether there is anything to commit before it is told; what was acked need not be deleted at once."""
        return bool(self._rows or self._streams or self._changed or self._forgotten)

    @property
    def pending(self) -> bool:
        """Whether there is anything to commit."""
        return self.urgent or bool(self._acked)

    def commit(self, wall: float) -> bool:
        """Writes everything since the last commit. If that fails, the mail of this turn is undone, and False given."""
        if not self.pending:
            return True
        try:
            self._db.execute("BEGIN IMMEDIATE")
            freed = self._write(wall)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            self._undo()
            self.healthy = False
            return False
        self.healthy = True
        for known, messages, size in freed:
            known.messages -= messages
            known.size -= size
        self._drop_mail_of_this_turn()
        self._changed.clear()
        self._acked.clear()
        self._forgotten.clear()
        return True

    def _write(self, wall: float) -> list[tuple[Known, int, int]]:
        """Executes all that is pending; gives whose mailbox got how many messages and bytes emptier by that."""
        run, many = self._db.execute, self._db.executemany
        for id_, nick in self._forgotten.items():
            run("DELETE FROM nicks WHERE id = ?", (id_,))
            run("DELETE FROM mail WHERE recipient = ?", (id_,))
            run("DELETE FROM streams WHERE sender = ?", (nick,))
        many(INSERT_MAIL, self._rows)
        many("INSERT INTO streams VALUES (?, ?, ?, ?) ON CONFLICT (sender, stream) DO UPDATE SET next = excluded.next,"
             " seen = excluded.seen", [(*key, next_, wall) for key, next_ in self._streams.items()])
        freed = []
        for nick in self._acked:
            freed.append((self.known[nick], *self._delete_mail(self.known[nick])))
        changed = [self.known[nick] for nick in self._changed | self._acked]
        many("INSERT INTO nicks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET host = excluded.host,"
             " port = excluded.port, online = excluded.online, owner = excluded.owner, seen = excluded.seen,"
             " first = excluded.first, last = excluded.last",
             [(k.id, k.nick, k.host, k.port, k.online, k.owner, k.seen, k.first, k.last) for k in changed])
        return freed

    def _delete_mail(self, known: Known) -> tuple[int, int]:
        """Deletes the mail below ``first``; gives how many messages and bytes that was."""
        run = self._db.execute
        whole = "WHERE recipient = ? AND seq < ? AND seq + numbers <= ?"
        below = (known.id, known.first, known.first)
        messages, size = run("SELECT total(messages), total(size) FROM mail " + whole, below).fetchone()
        run("DELETE FROM mail " + whole, below)
        for seq, sender, stream, *columns in run("SELECT seq, sender, stream, numbers, n, texts, times, more FROM mail"
                                                 " WHERE recipient = ? AND seq < ?", below[:2]).fetchall():
            run("DELETE FROM mail WHERE recipient = ? AND seq = ?", (known.id, seq))
            try:
                parcel = Parcel.of_row(*columns)
            except (ValueError, TypeError):
                continue        # damaged on the disk: nobody can read it any more
            rest = parcel.part(known.first - seq, len(parcel.texts))
            run(INSERT_MAIL, rest.row(known.id, known.first, sender, stream, rest.size))
            messages, size = messages + parcel.messages - rest.messages, size + parcel.size - rest.size
        return int(messages), int(size)

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
        self._before.clear()
        self._rows.clear()
        self._streams.clear()

    def prune_streams(self) -> None:
        """Forgets the progress of the longest silent streams beyond ``MAX_STREAMS``."""
        try:
            self._db.execute("DELETE FROM streams WHERE seen < (SELECT seen FROM streams ORDER BY seen DESC"
                             " LIMIT 1 OFFSET ?)", (MAX_STREAMS - 1,))
        except sqlite3.Error:
            self.healthy = False

    def close(self) -> None:
        """Closes the file; what is not committed is lost."""
        self._db.close()


# --- the registry ---------------------------------------------------------------------------------------------

MAX_CLIENTS = 10_000      # clients with a session
MAX_CLOSED = 10_000       # closed sessions that are remembered, to answer a repeated request
SILENCE = 45.0            # s without a sign of life after which a client is probed

GRANTED, TAKEN, OWNED, FULL, ASK = "granted", "taken", "owned", "full", "ask"
KEEP, PROBE, UNKNOWN = "keep", "probe", "unknown"
BYE, REPLACED, EVICTED = "bye", "replaced", "evicted"   # how a session ended


def hash_of(token: bytes) -> bytes:
    """What the store keeps of a token."""
    import hashlib
    return hashlib.sha256(token).digest()


def is_hash_of(owner: bytes, token: bytes) -> bool:
    """Whether ``owner`` is what is kept of ``token``; how long that takes does not tell how wrong it is."""
    import hmac
    return hmac.compare_digest(owner, hash_of(token))


class Session:
    """One registration of one client."""

    __slots__ = ("id", "nick", "address", "request", "heard", "known", "offset", "greeting", "version", "holds_table")

    def __init__(self, id_: bytes, known: Known, address: Address, request: int, now: float,
                 version: int) -> None:
        self.id = id_
        self.nick = known.nick
        self.address = address
        self.request = request              # the id of the ``reg`` that made it
        self.heard = now
        self.known = known
        self.offset = known.first - 1       # mail number of this session + offset = number in the mailbox
        self.greeting = known.last          # mail up to here comes before it is announced as online
        self.version = version              # of the table that it must hold before it gets mail
        self.holds_table = False


def _rank(known: Known) -> tuple[bool, float, str]:
    """How soon a nick is forgotten if there are too many: the lowest goes first."""
    return (False, known.seen, known.nick) if known.owner is None else (True, -known.id, known.nick)


class Registry:
    """What the server decides on who is who; see the opening of this module."""

    def __init__(self, mailbox: Mailbox, max_clients: int = MAX_CLIENTS, mailbox_limit: int = MAILBOX_LIMIT,
                 max_known: int = MAX_KNOWN) -> None:
        self.mailbox = mailbox
        self.max_clients = max_clients
        self.mailbox_limit = mailbox_limit
        self.max_known = max_known
        self._idle = [_rank(known) for known in mailbox.known.values()]     # a heap: all who are offline, and more
        heapq.heapify(self._idle)
        self.table = Table()
        self.sessions: dict[bytes, Session] = {}
        self.by_nick: dict[str, Session] = {}
        self.live: OrderedDict[bytes, Session] = OrderedDict()     # not called offline; longest silent first
        self._ended: list[Session] = []
        self.closed: OrderedDict[bytes, str] = OrderedDict()       # session -> how it ended
        self.spent: OrderedDict[int, None] = OrderedDict()         # the requests that had made those
        self._at: dict[Address, str] = {}                            # who is online there
        self.ghosts: dict[str, Address] = {}                         # online when the store was last closed
        for known in mailbox.known.values():
            self.table.set(known.nick, known.host, known.port, OFFLINE)
            if known.online:
                self.ghosts[known.nick] = (known.host, known.port)

    @property
    def online(self) -> int:
        """How many are online."""
        return len(self._at)

    # who gets a nick

    def claim(self, nick: str, address: Address, token: bytes | None) -> str:
        """Whether ``nick`` may be registered from ``address``: GRANTED, ASK (its holder, first), OWNED, FULL."""
        known = self.mailbox.known.get(nick)
        if known is not None and known.owner is not None:
            if token is None or not is_hash_of(known.owner, token):
                return OWNED
        if self.holder(nick) not in (None, address):
            return ASK
        if nick not in self.by_nick and len(self.sessions) >= self.max_clients and self._idle_session() is None:
            return FULL
        if known is None and len(self.mailbox.known) >= self.max_known and self._idle_nick() is None:
            return FULL
        return GRANTED

    def holder(self, nick: str) -> Address | None:
        """Where somebody may be running with ``nick``, None if nobody is."""
        return self.by_nick[nick].address if self._is_live(nick) else self.ghosts.get(nick)

    def _idle_session(self) -> Session | None:
        """The oldest session of somebody who is offline, if there is one."""
        if len(self.sessions) == len(self.live):
            return None
        return next(session for session in self.sessions.values() if session.id not in self.live)

    def _idle_nick(self) -> str | None:
        """The nick that makes room for another one: offline and without mail, there may be none.

        Of those that nobody owns, the one longest offline. If all have owners, the one that came last (none, if it has
        mail): else a stranger who registers one nick after the other could throw out whoever was here before, and
        take that nick.
        """
        while self._idle:
            known = self.mailbox.known.get(self._idle[0][-1])
            if known is not None and self._idle[0] == _rank(known) and not self._may_run(known):
                if not known.waiting:
                    return known.nick
                if known.owner is not None:
                    return None     # nor by giving mail to each of them
            heapq.heappop(self._idle)   # when it goes offline again, it comes again
        return None

    def not_there(self, nick: str, address: Address) -> None:
        """Nobody answers where ``nick`` was online when the store was last closed."""
        if self.ghosts.get(nick) == address:
            del self.ghosts[nick]
            self._note_idle(self.mailbox.known[nick])

    def _note_idle(self, known: Known) -> None:
        heapq.heappush(self._idle, _rank(known))
        if len(self._idle) > 2 * len(self.mailbox.known) + 64:
            self._idle = [_rank(each) for each in self.mailbox.known.values() if not self._is_live(each.nick)]
            heapq.heapify(self._idle)

    def _may_run(self, known: Known) -> bool:
        return self._is_live(known.nick) or known.nick in self.ghosts

    def admit(self, now: float, wall: float, id_: bytes, nick: str, address: Address, token: bytes | None,
              request: int) -> Session:
        """Registers ``nick`` after ``claim`` granted it (or its holder did not answer); gives its session.

        An older session of that nick is replaced; whoever else is online at that address goes offline.
        """
        old = self.by_nick.get(nick)
        if old is not None:
            self._close(old, wall, REPLACED)
        elif len(self.sessions) >= self.max_clients:
            idle = self._idle_session()
            if idle is not None:
                self._close(idle, wall, EVICTED)
        self.ghosts.pop(nick, None)
        known = self._know(wall, nick, address, token)
        session = Session(id_, known, address, request, now, 0)
        self.sessions[id_] = self.by_nick[nick] = self.live[id_] = session
        self._place(session, address, wall)
        session.version = self.table.version
        return session

    def _know(self, wall: float, nick: str, address: Address, token: bytes | None) -> Known:
        owner = hash_of(token) if token is not None else None
        known = self.mailbox.known.get(nick)
        if known is None:
            if len(self.mailbox.known) >= self.max_known:
                idle = self._idle_nick()
                if idle is not None:
                    self._drop(idle, wall)
            return self.mailbox.add(nick, *address, owner, wall)
        known.host, known.port = address
        known.owner, known.seen = owner, wall
        self.mailbox.changed(known)
        return known

    def _place(self, session: Session, address: Address, wall: float) -> None:
        """Puts a session at an address: online there if it was not called offline and no mail has to come first."""
        other = self._at.get(address)
        if other not in (None, session.nick):
            self.went_offline(self.by_nick[other], wall)
        session.address = address
        known = session.known
        known.host, known.port = address
        ready = session.id in self.live and known.first > session.greeting
        self._set_state(session, ONLINE if ready else OFFLINE)

    def _set_state(self, session: Session, state: str) -> None:
        nick, address, known = session.nick, session.address, session.known
        entry = self.table.get(nick)
        if entry is not None and self._at.get((entry.host, entry.port)) == nick:
            del self._at[entry.host, entry.port]
        if state == ONLINE:
            other = self._at.get(address)
            if other is not None:   # whoever spoke last is there
                self.went_offline(self.by_nick[other], self.by_nick[other].known.seen)
            self._at[address] = nick
        self.table.set(nick, *address, state)
        known.online = state == ONLINE
        self.mailbox.changed(known)

    # the life of a session

    def heard(self, session: Session, now: float) -> bool:
        """Takes note of a sign of life; True if it was called offline and comes back with this."""
        if session.id not in self.sessions:
            return False    # closed: it speaks for nobody any more
        session.heard = now
        if session.id in self.live:
            self.live.move_to_end(session.id)
            return False
        self.live[session.id] = session
        session.greeting = session.known.last
        self.announce(session)
        return True

    def announce(self, session: Session) -> None:
        """Puts a client online, once the mail that waited for it is acked."""
        if session.id in self.live and session.known.first > session.greeting \
                and not self.table.is_online(session.nick):
            self._set_state(session, ONLINE)

    def moved(self, session: Session, address: Address, wall: float) -> None:
        """A session has proved that it is at another address now."""
        self.mailbox.changed(session.known)
        self._place(session, address, wall)

    def went_offline(self, session: Session, wall: float) -> None:
        """A client does not answer: offline, but its session stays good, in case it lives."""
        session.known.seen = wall
        self.mailbox.changed(session.known)
        self.live.pop(session.id, None)
        self._note_idle(session.known)
        self._set_state(session, OFFLINE)

    def deregister(self, session: Session, wall: float) -> None:
        """A client leaves."""
        self._close(session, wall, BYE)

    def _close(self, session: Session, wall: float, how: str) -> None:
        self.went_offline(session, wall)
        del self.sessions[session.id]
        del self.by_nick[session.nick]
        self.closed[session.id] = how
        self._ended.append(session)
        self.spent[session.request] = None
        for remembered in (self.closed, self.spent):
            if len(remembered) > MAX_CLOSED:
                remembered.popitem(last=False)

    def take_ended(self) -> list[Session]:
        """The sessions that were closed since the last time."""
        ended, self._ended = self._ended, []
        return ended

    def silent(self, now: float) -> list[Session]:
        """Those of whom nothing was heard for ``SILENCE`` seconds, longest first."""
        found = []
        for session in self.live.values():
            if now < session.heard + SILENCE:
                break
            found.append(session)
        return found

    # what waits

    def judge(self, to: str, relay: bool) -> str:
        """What to do with messages for ``to``: KEEP them, PROBE the recipient first, or refuse them as UNKNOWN."""
        if to not in self.mailbox.known:
            return UNKNOWN
        if relay or not self.table.is_online(to):
            return KEEP
        return PROBE

    def fitting(self, to: str, parcel: Parcel) -> int:
        """How many numbers of ``parcel`` (whole texts) still fit into the mailbox of ``to``: whole texts again."""
        known = self.mailbox.known[to]
        messages, size = self.mailbox_limit - known.messages, MAILBOX_SIZE - known.size
        if len(parcel.texts) <= messages and len(parcel.texts) * MAX_PIECE_SIZE <= size:
            return len(parcel.texts)
        fitting = 0
        for index, text in enumerate(parcel.texts):
            size -= len(text.encode())
            if messages <= 0 or size < 0:
                break
            if parcel.n + index not in parcel.more:
                messages -= 1
                fitting = index + 1
        return fitting

    def mail_number(self, session: Session) -> int:
        """The number, in its session, of the last mail that waits or waited for a client."""
        return session.known.last - session.offset

    def mail_acked(self, session: Session, number: int) -> None:
        """The client has shown its mail below ``number``; once the greeting is through, it goes online."""
        if session.id in self.sessions:
            self.mailbox.acked(session.known, number + session.offset)
            self.announce(session)

    # coming and going of nicks

    def forget(self, nick: str) -> bool:
        """Drops a nick that is not in use, with its owner and its mail; False if there is none."""
        known = self.mailbox.known.get(nick)
        if known is None or nick in self.by_nick:
            return False
        self.ghosts.pop(nick, None)
        self.mailbox.forget(known)
        self.table.set(nick, known.host, known.port, GONE)
        return True

    def note_time(self, wall: float) -> None:
        """Takes note that those who are there are there now: told often, so that the store knows after a crash."""
        for session in self.live.values():
            session.known.seen = wall
            self.mailbox.changed(session.known)

    def lapse(self, wall: float, days: float) -> list[Known]:
        """Drops every nick that was offline for more than ``days`` (0: never); gives what was dropped."""
        if not days:
            return []
        idle = [known for known in self.mailbox.known.values()
                if known.seen < wall - days * DAY and not self._is_live(known.nick)]
        for known in idle:
            self._drop(known.nick, wall)
        return idle

    def _drop(self, nick: str, wall: float) -> None:
        """Forgets a nick that is offline; its client may have died without leaving."""
        session = self.by_nick.get(nick)
        if session is not None:
            self._close(session, wall, EVICTED)
        self.forget(nick)

    def _is_live(self, nick: str) -> bool:
        session = self.by_nick.get(nick)
        return session is not None and session.id in self.live
