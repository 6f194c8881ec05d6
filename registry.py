"""Client table, nick ownership and stored mail.

Rules of this file
------------------
- No sockets, no clock, no timers, no printing. Monotonic time (``now``, in seconds) comes in as an argument; so do
  random ids. The only side effects are on the SQLite file of the ``Mailbox``.
- No decision depends on the wall clock, which may be wrong by years and jump: what lasts for longer than one run of
  the server is measured by ``Mailbox.uptime``. Only the times of messages are wall-clock times.
- It knows nothing of datagrams: it decides, its owner informs the clients.
- What must survive a crash is in the store before anybody hears of it: the owner calls ``commit`` first, and
  sends what was decided in that turn afterwards.

How it works
------------
``Table`` is the dictionary of clients. Every change gives one entry a new version, no two entries share one, and
an entry remembers the version of its last change. So "what changed since version v" is one question with one kind
of answer, whether v is the version before (a broadcast) or 0 (a snapshot). The server owns a table, every client
has a ``Mirror`` of it.

``Mailbox`` is the store: the nicks that are known, their owners, the messages that wait, and how far each stream was
kept. The mail of one recipient is numbered 1, 2, 3 ... without gaps for good; it is deleted from the low end, when
the recipient has acked it. Everything that one turn of the loop changes is written in one transaction by ``commit``.
If that fails, the messages of this turn count as never accepted, and everything else is tried again.

``Sessions`` holds the registrations of clients: those that exist, and those that ended lately. ``Registry`` is what the
server decides on these three: who gets a nick, when somebody goes online (not before the mail that waited is acked) and
offline, what happens to a message that should be kept.

A nick belongs to its first owner: a client that registers it with a token (see ``secure.token_for``) owns it, and the
store keeps a hash of that token. A nick that was registered without a token belongs to nobody, and its mail goes to the
next client that registers it. Nicks that only differ in case, width or composition are one nick: the spelling that was
registered first counts, another one is refused, and so is a new nick that mixes scripts. A nick that the store has from
the time before that rule keeps working.
"""
from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from home import StoreFile, hash_of, is_hash_of
from protocol import MAX_PIECE, Spellings, is_nick, mixes_scripts

if TYPE_CHECKING:
    import json
    import sqlite3

Address = tuple[str, int]
EntryRow = list[Any]        # one entry of the table as it travels: [nick, host, port, state]


# --- the table ------------------------------------------------------------------------------------------------

class State(str, Enum):
    """What the table says of a nick. It is a string, too, because it travels in a ``table`` and an ``exists``."""

    ONLINE = "online"
    OFFLINE = "offline"
    GONE = "gone"       # forgotten: the entry is a tombstone, for those who still have the nick in their table

    __str__ = str.__str__       # format() and f-strings show the value in every version of Python, not State.ONLINE


ONLINE, OFFLINE, GONE = State.ONLINE, State.OFFLINE, State.GONE
STATES: dict[str, State] = {state.value: state for state in State}


class Entry(NamedTuple):
    """One client, as of the version of its last change."""

    nick: str
    host: str
    port: int
    state: State
    version: int

    def row(self) -> EntryRow:
        """Return the entry as it travels: the interface of a link-local host means nothing on other machines."""
        return [self.nick, self.host.partition("%")[0], self.port, self.state]


class Page(NamedTuple):
    """Every entry that changed in (since, version]."""

    since: int
    version: int
    rows: list[EntryRow]


ROW_OVERHEAD = 20         # bytes of one entry on the wire beside its nick and its host
MAX_TOMBSTONES = 100_000  # forgotten nicks that a table still names; the oldest go first


class Table:
    """The versioned dictionary of clients: nick -> ``Entry``."""

    def __init__(self) -> None:
        self.version = 0
        self.entries: dict[str, Entry] = {}
        self._gone: dict[str, Entry] = {}
        self._log: list[Entry] = []     # by version; entries that changed again are stale
        self._spellings: Spellings | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, nick: str) -> Entry | None:
        """Return the entry of ``nick``, None for an unknown one."""
        return self.entries.get(nick)

    def is_online(self, nick: str) -> bool:
        """Return whether ``nick`` is known and online."""
        entry = self.entries.get(nick)
        return entry is not None and entry.state == ONLINE

    @property
    def spellings(self) -> Spellings:
        """The nicks here, by what is the same for all spellings of each; made when somebody first asks for it."""
        if self._spellings is None:
            self._spellings = Spellings(self.entries)
        return self._spellings

    def spelling_of(self, nick: str) -> str | None:
        """Return the nick here that is spelled like ``nick``, else the only one that counts as the same, else None."""
        return nick if nick in self.entries else self.spellings.only(nick)

    def set(self, nick: str, host: str, port: int, state: State) -> bool:
        """Change one entry; return whether that changed anything (and so used a new version)."""
        if self._says(nick, host, port, state):
            return False
        self.version += 1
        self._put(Entry(nick, host, port, state, self.version))
        return True

    def _says(self, nick: str, host: str, port: int, state: State) -> bool:
        """Return whether this is what the table says already."""
        old = self.entries.get(nick)
        if old is None:
            return state == GONE
        return (old.host, old.port, old.state) == (host, port, state)

    def _put(self, entry: Entry) -> None:
        if entry.state == GONE:
            self._remove(entry.nick)
            self._gone[entry.nick] = entry
            if len(self._gone) > MAX_TOMBSTONES:
                del self._gone[next(iter(self._gone))]
        else:
            self._gone.pop(entry.nick, None)
            self._replace(entry)
        self._log.append(entry)
        if len(self._log) > 2 * (len(self.entries) + len(self._gone)) + 64:
            self._log = [kept for kept in self._log if self._is_current(kept)]

    def _replace(self, entry: Entry) -> None:
        if self._spellings is not None and entry.nick not in self.entries:
            self._spellings.add(entry.nick)
        self.entries[entry.nick] = entry

    def _remove(self, nick: str) -> None:
        del self.entries[nick]
        if self._spellings is not None:
            self._spellings.remove(nick)

    def _is_current(self, entry: Entry) -> bool:
        return self.entries.get(entry.nick) is entry or self._gone.get(entry.nick) is entry

    def pages(self, since: int, size: int) -> Iterator[Page]:
        """Yield what changed after version ``since``, in pages of about ``size`` bytes on the wire.

        Even a snapshot names those who are gone: part of an earlier answer to the same question may have arrived.
        """
        start, used, last = since, 0, since
        rows: list[EntryRow] = []
        for index in range(bisect_right(self._log, since, key=lambda entry: entry.version), len(self._log)):
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
        """Apply a page to a mirror; return the nicks that it changed, None where pages before it are missing."""
        if page.since > self.version:
            return None
        if page.version <= self.version:
            return []
        changed = []
        self.version = page.version
        for nick, host, port, name in page.rows:
            state = STATES[name]
            if self._says(nick, host, port, state):
                continue
            if state == GONE:
                self._remove(nick)
            else:
                self._replace(Entry(nick, host, port, state, page.version))
            changed.append(nick)
        return changed


class Mirror:
    """A client's copy of the server's table.

    A server that was restarted has another ``boot`` and numbers its table from the beginning. The new table grows
    beside the old one, which stays in force until the new one is whole, and is dropped then.
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
        """Up to which version the table of the server, as it runs now, is here."""
        return (self.table if self._fresh is None else self._fresh).version

    @property
    def is_whole(self) -> bool:
        """Whether that is as far as the server is known to be."""
        return self.version >= self._target

    def begin_session(self, boot: int, version: int) -> None:
        """Begin a session with a server whose table has that version."""
        if boot != self.boot:
            self.boot = boot
            self._fresh = Table()
        self._target = version

    def expect(self, version: int) -> bool:
        """Note how far the server is; return whether something is missing here."""
        self._target = max(self._target, version)
        return version > self.version

    def apply(self, page: Page) -> list[str] | None:
        """Apply a page; return the nicks that it changed in the table in force, None if pages before it are missing."""
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
        """Put the table of the new boot in force; return the nicks of which it says something else."""
        old, self.table, self._fresh = self.table, fresh, None
        before, after = ({nick: entry.row() for nick, entry in table.entries.items()} for table in (old, fresh))
        return [nick for nick in {**before, **after} if before.get(nick) != after.get(nick)]

    def mark_all_offline(self) -> list[str]:
        """Mark everybody offline: the table in force is too old. Return the nicks that were online until now."""
        return [nick for nick, host, port, _, _ in list(self.table.entries.values())
                if self.table.set(nick, host, port, OFFLINE)]


# --- the store ------------------------------------------------------------------------------------------------

MAX_KNOWN = 100_000             # nicks; beyond it one that is offline without mail is forgotten, see ``IdleNicks``
MAX_STREAMS = 100_000           # streams whose progress the store remembers; the oldest go first
MAILBOX_LIMIT = 100_000         # messages that wait for one recipient
MAILBOX_SIZE = 64 * 2 ** 20     # bytes of text that wait for one recipient
NICK_LAPSE = 90.0               # days offline after which a nick is forgotten; only time in which the server ran counts
DAY = 86400.0                   # s
UPTIME_GAP = 2 * 3600.0         # s; the uptime is noted in the store more often than that: each hour, see ``tidy``

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
        self.host, self.port = host, port
        self.online = bool(online)  # when it was last written: after a crash, its client may still run
        self.owner = owner          # SHA-256 of the token of its owner; None: it belongs to nobody
        self.seen = seen            # ``Mailbox.uptime`` at its last sign of life
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
        """Return the numbers at the positions [start, end) alone."""
        return Parcel(self.n + start, self.texts[start:end], self.times[start:end],
                      [number for number in self.more if self.n + start <= number < self.n + end])

    @property
    def messages(self) -> int:
        """How many texts end in it."""
        return len(self.texts) - len(self.more)

    @property
    def size(self) -> int:
        """How many bytes the texts have in UTF-8."""
        joined = "".join(self.texts)
        return len(joined) if joined.isascii() else len(joined.encode())

    def row(self, recipient: int, seq: int, sender: str, stream: int, size: int) -> tuple[object, ...]:
        """Return the parcel as a row of the store. One time stands for all numbers that were sent at the same time."""
        times = self.times[:1] if self.times.count(self.times[0]) == len(self.times) else self.times
        return (recipient, seq, len(self.texts), sender, stream, self.n, json.dumps(self.texts, ensure_ascii=False),
                json.dumps(times), json.dumps(sorted(self.more)) if self.more else "", self.messages, size)

    @classmethod
    def of_row(cls, numbers: int, n: int, texts: str, times: str, more: str) -> Parcel:
        """Return the parcel of these columns of a row; raise ValueError or TypeError if they are damaged."""
        pieces, sent, continued = json.loads(texts), json.loads(times), json.loads(more) if more else ()
        if type(n) is not int or n <= 0 or len(pieces) != numbers or set(map(type, pieces)) != {str}:
            raise ValueError("the texts are damaged")
        if len(sent) not in (1, numbers) or set(map(type, sent)) != {float}:
            raise ValueError("the times are damaged")
        if continued and not set(continued) <= set(range(n, n + numbers)):
            raise ValueError("nobody knows which texts go together")
        encoded = pieces if "".join(pieces).isascii() else map(str.encode, pieces)
        if max(map(len, encoded)) > MAX_PIECE:
            raise ValueError("a piece is too long")
        return cls(n, pieces, sent if len(sent) == numbers else sent * numbers, continued)


StoredLetter = list[Any]    # one number of somebody's mail: [sender, stream, n, at, text, is it continued by the next]
DAMAGED = "[Messages were damaged on the disk of the server.]"      # stands for those of a row that cannot be read


class Mailbox:
    """The store: known nicks and their mail, in a SQLite file (or in memory, for ``:memory:``).

    ``commit`` writes everything that was changed since the last one, in one transaction, and only while the file is
    still where it was opened (see ``StoreFile``). Reading sees only what is committed.
    """

    def __init__(self, path: str, server_id: bytes, now: float = 0.0) -> None:
        """Open or make the store; ``server_id`` is a random id for a new one. Raise StoreError if that fails."""
        global json, sqlite3    # only a store needs them: a client has none, and its start is measured (tests/bench.py)
        import json
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
        self.damaged = 0            # rows that could not be read
        self.failure = ""           # why the last commit that failed did
        self._is_untidy = False     # see ``tidy``
        self._rows: list[tuple[object, ...]] = []               # mail to insert
        self._before: dict[str, tuple[int, int, int]] = {}      # last, messages, size before this turn
        self._streams: dict[tuple[str, int], int] = {}          # progress to write
        self._changed: set[str] = set()                         # nicks to write
        self._acked: set[str] = set()                           # nicks whose mail below ``first`` is to be deleted
        self._forgotten: dict[int, str] = {}                    # id -> nick of those to delete

    def _load(self) -> None:
        execute = self._db.execute
        self.server_id = bytes(execute("SELECT value FROM meta WHERE key = 'server'").fetchone()[0])
        self.known: dict[str, Known] = {}
        by_id: dict[int, Known] = {}
        for row in execute("SELECT id, nick, host, port, online, owner, seen, first, last FROM nicks ORDER BY id"):
            known = Known(*row)
            self.known[known.nick] = by_id[known.id] = known
        self._next_id = max(by_id, default=0) + 1
        for id_, messages, size in execute("SELECT recipient, sum(messages), sum(size) FROM mail GROUP BY recipient"):
            by_id[id_].messages, by_id[id_].size = messages, size

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
        size = parcel.size
        self._rows.append(parcel.row(known.id, known.last + 1, sender, stream, size))
        known.last += len(parcel.texts)
        known.messages += parcel.messages
        known.size += size
        self._streams[sender, stream] = parcel.n + len(parcel.texts)
        self._changed.add(known.nick)

    def fetch(self, known: Known, seq: int, limit: int) -> list[StoredLetter]:
        """Return the committed mail from number ``seq`` on, at most ``limit`` letters; none if it is unreadable now."""
        letters: list[StoredLetter] = []
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
                    numbers = most      # the beginning of the next row is right, whatever is damaged in this one
                found = self._letters(known.nick, numbers, *columns)
                letters += found[seq - start:] if start < seq else found
                row = following
        except sqlite3.Error:
            pass        # what was read until now is right
        return letters[:limit]

    def _letters(self, recipient: str, numbers: int, sender: str, stream: int, n: int,
                 *columns: str) -> list[StoredLetter]:
        """Return the letters of a row; for a damaged one, the same letter for each number: it is shown only once."""
        is_sender_whole = is_nick(sender)
        is_stream_whole = type(stream) is int and stream >= 0
        try:
            if not is_sender_whole or not is_stream_whole:
                raise ValueError("nobody knows whose it is")
            parcel = Parcel.of_row(numbers, n, *columns)
        except (ValueError, TypeError):
            self.damaged += 1
            return [[sender if is_sender_whole else recipient, stream if is_stream_whole else 0,
                     n if type(n) is int and n > 0 else 1, 0.0, DAMAGED, False]] * numbers
        more = parcel.more
        return [[sender, stream, number, at, text, number in more]
                for number, (text, at) in enumerate(zip(parcel.texts, parcel.times), n)]

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
        many("INSERT INTO nicks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET host = excluded.host,"
             " port = excluded.port, online = excluded.online, owner = excluded.owner, seen = excluded.seen,"
             " first = excluded.first, last = excluded.last",
             [(k.id, k.nick, k.host, k.port, k.online, k.owner, k.seen, k.first, k.last) for k in changed])
        if self._is_untidy:
            run("UPDATE meta SET value = ? WHERE key = 'uptime'", (uptime,))
            run("DELETE FROM streams WHERE seen < (SELECT seen FROM streams ORDER BY seen DESC LIMIT 1 OFFSET ?)",
                (MAX_STREAMS - 1,))
        return freed

    def _delete_mail(self, known: Known) -> tuple[int, int]:
        """Delete the mail below ``first``; return how many messages and bytes that was."""
        run = self._db.execute
        whole = "WHERE recipient = ? AND seq < ? AND seq + numbers <= ?"
        below = (known.id, known.first, known.first)
        messages, size = run("SELECT total(messages), total(size) FROM mail " + whole, below).fetchone()
        run("DELETE FROM mail " + whole, below)
        # the row that ``first`` splits: its rest is written again, so that what was acked is not on the disk any more
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
        for dropped in (self._before, self._rows, self._streams):
            dropped.clear()

    def close(self) -> None:
        """Close the file; what is not committed is lost."""
        self._file.close()


# --- sessions -------------------------------------------------------------------------------------------------

MAX_CLIENTS = 10_000      # clients with a session
MAX_ENDED = 10_000        # sessions that have ended and are remembered, to answer a repeated request
SILENCE = 45.0            # s without a sign of life after which a client is probed


class End(Enum):
    """How a session ended."""

    BYE = "bye"                 # its client deregistered
    REPLACED = "replaced"       # its nick was registered again
    EVICTED = "evicted"         # its client did not respond, and another one needed the place; or its nick has lapsed


BYE, REPLACED, EVICTED = End.BYE, End.REPLACED, End.EVICTED


class Session:
    """One registration of one client."""

    __slots__ = ("id", "nick", "address", "request", "heard", "known", "offset", "greeting", "version", "holds_table",
                 "knocks", "own")

    def __init__(self, id_: bytes, known: Known, address: Address, request: int, now: float) -> None:
        self.id = id_
        self.known, self.nick = known, known.nick
        self.address = address
        self.request = request              # the id of the ``reg`` that made it
        self.heard = now
        self.offset = known.first - 1       # mail number of this session + offset = number in the mailbox
        self.greeting = known.last          # mail up to here comes before it is announced as online
        self.version = 0                    # of the table that it must hold before it gets mail
        self.holds_table = False
        self.knocks = False                 # its client knows ``call``
        self.own: Address | None = None     # of the client in its own network, as it says

    @property
    def has_had_its_mail(self) -> bool:
        """Whether all mail that waited for it when it came is acked."""
        return self.known.first > self.greeting


class Sessions:
    """All sessions, which of them are live, and how those that exist no more have ended. The life of one::

                   mark_unresponsive
        add ---> LIVE -----------> UNRESPONSIVE
                  |   <-----------      |
                  |       hear          |
                  +-------- end --------+---> ended: BYE, REPLACED or EVICTED

    UNRESPONSIVE: its client did not answer a probe. The session stays good, because the client may only be cut off:
    with its next sign of life it is live again. A live session need not be online in the table: its mail comes first.
    """

    def __init__(self) -> None:
        self.by_id: dict[bytes, Session] = {}
        self.by_nick: dict[str, Session] = {}
        self.live: OrderedDict[bytes, Session] = OrderedDict()      # longest silent first
        self.ended: OrderedDict[bytes, End] = OrderedDict()
        self.spent: OrderedDict[int, None] = OrderedDict()          # the requests that had made those
        self._just_ended: list[Session] = []

    def __len__(self) -> int:
        return len(self.by_id)

    def get(self, id_: bytes) -> Session | None:
        """Return the session with that id, None if there is none or it has ended."""
        return self.by_id.get(id_)

    def of(self, nick: str) -> Session | None:
        """Return the session of ``nick``, None if it has none."""
        return self.by_nick.get(nick)

    def is_live(self, session: Session) -> bool:
        """Return whether a session has not ended, and its client is believed to be there."""
        return session.id in self.live

    def live_sessions(self) -> list[Session]:
        """Return those that are live, longest silent first."""
        return list(self.live.values())

    def longest_silent(self) -> Session | None:
        """Return the live session of which nothing was heard for the longest time, None if none is live."""
        return next(iter(self.live.values()), None)

    def silent(self, now: float) -> list[Session]:
        """Return the live sessions of which nothing was heard for ``SILENCE`` seconds, longest silent first."""
        return list(takewhile(lambda session: now >= session.heard + SILENCE, self.live.values()))

    def oldest_unresponsive(self) -> Session | None:
        """Return the oldest session that is not live, None if all are."""
        if len(self.by_id) == len(self.live):
            return None
        return next(session for session in self.by_id.values() if session.id not in self.live)

    def add(self, session: Session) -> None:
        """Begin a session; its nick must have none."""
        self.by_id[session.id] = self.by_nick[session.nick] = self.live[session.id] = session

    def hear(self, session: Session, now: float) -> bool:
        """Note a sign of life; return whether the session was unresponsive and is live again."""
        if session.id not in self.by_id:
            return False    # it has ended: it speaks for nobody any more
        session.heard = now
        if session.id in self.live:
            self.live.move_to_end(session.id)
            return False
        self.live[session.id] = session
        return True

    def put_last(self, session: Session) -> None:
        """Put a live session behind all others: its client is being probed, and is not looked at again before them."""
        self.live.move_to_end(session.id)

    def mark_unresponsive(self, session: Session) -> None:
        """Note that the client of a session does not respond."""
        self.live.pop(session.id, None)

    def end(self, session: Session, how: End) -> None:
        """End a session that is not live any more."""
        del self.by_id[session.id]
        del self.by_nick[session.nick]
        self.ended[session.id] = how
        self._just_ended.append(session)
        self.spent[session.request] = None
        for remembered in (self.ended, self.spent):
            if len(remembered) > MAX_ENDED:
                remembered.popitem(last=False)

    def pop_ended(self) -> list[Session]:
        """Return the sessions that ended since the last call."""
        ended, self._just_ended = self._just_ended, []
        return ended

    def how_ended(self, id_: bytes) -> End | None:
        """Return how the session with that id ended, None if that is not known."""
        return self.ended.get(id_)

    def is_spent(self, request: int) -> bool:
        """Return whether a ``reg`` with that id made a session that has ended."""
        return request in self.spent


# --- the registry ---------------------------------------------------------------------------------------------

class ClaimVerdict(Enum):
    """What becomes of a request for a nick. The values of the refusals travel in a ``refused``."""

    GRANTED = "granted"
    PROBE_HOLDER = "probe holder"   # ask whether its holder is there: no answer grants the nick, an answer refuses it
    TAKEN = "taken"         # its holder has answered
    OWNED = "owned"         # it has an owner, and this is not their token; or it looks like another one
    FULL = "full"           # there are too many clients, or too many nicks
    SPENT = "replaced"      # that request had a session, which is over


class SaveVerdict(Enum):
    """What becomes of messages that somebody wants to be kept."""

    KEEP = "keep"
    PROBE_RECIPIENT = "probe recipient"     # first, because it is believed to be online
    UNKNOWN = "unknown"     # refused: there is no such nick


GRANTED, PROBE_HOLDER, TAKEN = ClaimVerdict.GRANTED, ClaimVerdict.PROBE_HOLDER, ClaimVerdict.TAKEN
OWNED, FULL, SPENT = ClaimVerdict.OWNED, ClaimVerdict.FULL, ClaimVerdict.SPENT
KEEP, PROBE_RECIPIENT, UNKNOWN = SaveVerdict.KEEP, SaveVerdict.PROBE_RECIPIENT, SaveVerdict.UNKNOWN


class IdleNicks:
    """Which nick is forgotten if there are too many: one that is not in use and has no mail.

    Of those without an owner, it is the one longest offline. If all have owners, it is the one that came last (and
    none, if that has mail). Otherwise a stranger who registers one nick after the other could drive out those who were
    here before, and take their nicks.
    """

    def __init__(self, known: dict[str, Known], is_in_use: Callable[[Known], bool]) -> None:
        self._known, self._is_in_use = known, is_in_use
        self._heap = sorted(map(self._rank, known.values()))    # outdated ranks stay in it until they surface

    @staticmethod
    def _rank(known: Known) -> tuple[bool, float, str]:
        """Return how soon a nick is forgotten: the lowest goes first."""
        return (False, known.seen, known.nick) if known.owner is None else (True, -known.id, known.nick)

    def add(self, known: Known) -> None:
        """Note that a nick is not in use any more."""
        heapq.heappush(self._heap, self._rank(known))
        if len(self._heap) > 2 * len(self._known) + 64:
            self._heap = sorted([self._rank(each) for each in self._known.values() if not self._is_in_use(each)])

    def first(self) -> str | None:
        """Return the nick to forget, None if there is none."""
        while self._heap:
            known = self._known.get(self._heap[0][-1])
            if known is not None and self._heap[0] == self._rank(known) and not self._is_in_use(known):
                if not known.waiting:
                    return known.nick
                if known.owner is not None:
                    return None     # nor can a stranger reach the next owner by sending mail to this one
            heapq.heappop(self._heap)   # if it was in use, it is added again when it is not any more
        return None


class Registry:
    """What the server decides on table, store and sessions; see the opening of this module."""

    def __init__(self, mailbox: Mailbox, max_clients: int = MAX_CLIENTS, mailbox_limit: int = MAILBOX_LIMIT,
                 max_known: int = MAX_KNOWN) -> None:
        self.mailbox, self.server_id = mailbox, mailbox.server_id
        self.table = Table()
        self.sessions = Sessions()
        self.max_clients, self.mailbox_limit, self.max_known = max_clients, mailbox_limit, max_known
        self.maybe_running: dict[str, Address] = {}     # online when the server last stopped
        self._at: dict[Address, Session] = {}           # who is online there
        self._idle = IdleNicks(mailbox.known, lambda known: self.holder(known.nick) is not None)
        for known in mailbox.known.values():
            self.table.set(known.nick, known.host, known.port, OFFLINE)
            if known.online:
                self.maybe_running[known.nick] = (known.host, known.port)

    def counters(self) -> dict[str, int]:
        """Return what there is now."""
        known = self.mailbox.known
        return {"clients": len(self.sessions), "online": len(self._at), "nicks": len(known),
                "messages_kept": sum(one.messages for one in known.values()),
                "bytes_kept": sum(one.size for one in known.values())}

    def known_addresses(self) -> list[Address]:
        """Return where each nick was last."""
        return [(known.host, known.port) for known in self.mailbox.known.values() if known.port]

    # who gets a nick

    def claim(self, nick: str, address: Address, token: bytes | None) -> ClaimVerdict:
        """Return whether ``nick`` may be registered from ``address``: GRANTED, PROBE_HOLDER, OWNED or FULL."""
        known = self.mailbox.known.get(nick)
        if known is not None and known.owner is not None:
            if token is None or not is_hash_of(known.owner, token):
                return OWNED
        if known is None and (self.table.spellings.of(nick) or mixes_scripts(nick)):
            return OWNED
        if self.holder(nick) not in (None, address):
            return PROBE_HOLDER
        sessions = self.sessions
        if sessions.of(nick) is None and len(sessions) >= self.max_clients and sessions.oldest_unresponsive() is None:
            return FULL
        if known is None and len(self.mailbox.known) >= self.max_known and self._idle.first() is None:
            return FULL
        return GRANTED

    def holder(self, nick: str) -> Address | None:
        """Return where somebody may be running with ``nick``, None if nobody is."""
        session = self.sessions.of(nick)
        if session is not None and self.sessions.is_live(session):
            return session.address
        return self.maybe_running.get(nick)

    def knocks(self, nick: str) -> bool:
        """Return whether the client of ``nick`` knocks if it is called."""
        session = self.sessions.of(nick)
        return session is not None and session.knocks

    def not_there(self, nick: str, address: Address) -> None:
        """Note that nobody answers at ``address``, in case ``nick`` was online there when the server last stopped."""
        if self.maybe_running.get(nick) == address:
            del self.maybe_running[nick]
            self._idle.add(self.mailbox.known[nick])

    def admit(self, now: float, id_: bytes, nick: str, address: Address, token: bytes | None, request: int) -> Session:
        """Register ``nick`` after ``claim`` granted it; return its session. An older one of that nick is replaced."""
        old = self.sessions.of(nick)
        if old is not None:
            self._end(old, now, REPLACED)
        elif len(self.sessions) >= self.max_clients:
            unresponsive = self.sessions.oldest_unresponsive()
            if unresponsive is not None:
                self._end(unresponsive, now, EVICTED)
        self.maybe_running.pop(nick, None)
        known = self._know(now, nick, address, token)
        session = Session(id_, known, address, request, now)
        self.sessions.add(session)
        self.place(session, address, now)
        session.version = self.table.version
        return session

    def _know(self, now: float, nick: str, address: Address, token: bytes | None) -> Known:
        """Return the record of a nick, made or updated; if there are too many, forget an idle one first."""
        owner = hash_of(token) if token is not None else None
        known = self.mailbox.known.get(nick)
        if known is None:
            idle = self._idle.first() if len(self.mailbox.known) >= self.max_known else None
            if idle is not None:
                self._drop(idle, now)
            return self.mailbox.add(nick, *address, owner, self.mailbox.uptime(now))
        known.host, known.port = address
        known.owner, known.seen = owner, self.mailbox.uptime(now)
        self.mailbox.changed(known)
        return known

    def place(self, session: Session, address: Address, now: float) -> None:
        """Put a session at an address that it has proved: online there if it is live and no mail has to come first."""
        other = self._at.get(address)
        if other is not None and other is not session:      # even before we are announced: it has lost the address
            self.went_offline(other, now)
        session.address = address
        session.known.host, session.known.port = address
        is_ready = self.sessions.is_live(session) and session.has_had_its_mail
        self._set_state(session, ONLINE if is_ready else OFFLINE)

    def _set_state(self, session: Session, state: State) -> None:
        nick, address, known = session.nick, session.address, session.known
        entry = self.table.get(nick)
        if entry is not None and self._at.get((entry.host, entry.port)) is session:
            del self._at[entry.host, entry.port]
        if state == ONLINE:
            other = self._at.get(address)
            # needed again: an unresponsive client may come back to an address that another one has taken meanwhile
            if other is not None:
                self._lose(other)
            self._at[address] = session
        self.table.set(nick, *address, state)
        known.online = state == ONLINE
        self.mailbox.changed(known)

    # the life of a session

    def heard(self, session: Session, now: float) -> bool:
        """Note a sign of life; return whether its client did not respond before and comes back with this."""
        if not self.sessions.hear(session, now):
            return False
        session.greeting = session.known.last
        self.announce(session)
        return True

    def announce(self, session: Session) -> None:
        """Put a client online, once the mail that waited for it is acked."""
        if (self.sessions.is_live(session) and session.has_had_its_mail
                and not self.table.is_online(session.nick)):
            self._set_state(session, ONLINE)

    def went_offline(self, session: Session, now: float) -> None:
        """Note that a client does not answer: it is offline, but its session stays good, in case it lives."""
        session.known.seen = self.mailbox.uptime(now)
        self._lose(session)

    def _lose(self, session: Session) -> None:
        self.sessions.mark_unresponsive(session)
        self._idle.add(session.known)
        self._set_state(session, OFFLINE)

    def deregister(self, session: Session, now: float) -> None:
        """Note that a client leaves."""
        self._end(session, now, BYE)

    def _end(self, session: Session, now: float, how: End) -> None:
        self.went_offline(session, now)
        self.sessions.end(session, how)

    # what waits

    def judge(self, to: str, relay: bool) -> SaveVerdict:
        """Return what to do with messages for ``to``. ``relay``: their sender cannot reach a recipient who is there."""
        if to not in self.mailbox.known:
            return UNKNOWN
        if relay or not self.table.is_online(to):
            return KEEP
        return PROBE_RECIPIENT

    def fitting(self, to: str, parcel: Parcel) -> int:
        """Return how many numbers of ``parcel`` still fit into the mailbox of ``to``; no text is cut."""
        known = self.mailbox.known[to]
        messages, size = self.mailbox_limit - known.messages, MAILBOX_SIZE - known.size
        if len(parcel.texts) <= messages and len(parcel.texts) * MAX_PIECE <= size:
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

    def keep(self, to: str, sender: str, stream: int, parcel: Parcel) -> int:
        """Put as much of ``parcel`` into the mailbox of ``to`` as fits; return how many numbers that is."""
        fitting = self.fitting(to, parcel)
        if fitting:
            part = parcel if fitting == len(parcel.texts) else parcel.part(0, fitting)
            self.mailbox.keep(self.mailbox.known[to], sender, stream, part)
        return fitting

    def next_number(self, sender: str, stream: int) -> int | None:
        """Return the number after the last that was kept of a stream, 1 for a new one. None: it cannot be read now."""
        return self.mailbox.stream_next(sender, stream)

    def note_table(self, session: Session, version: int) -> bool:
        """Note that a client holds the table up to ``version``; return whether it can get mail from now on."""
        if session.holds_table or version < session.version:
            return False
        session.holds_table = True
        return True

    def mail_number(self, session: Session) -> int:
        """Return the number, in its session, of the last mail that waits or waited for a client."""
        return session.known.last - session.offset

    def fetch(self, session: Session, number: int, limit: int) -> tuple[list[StoredLetter], bool]:
        """Return a client's mail from ``number`` of its session on, up to ``limit`` letters; and if any is damaged."""
        damaged = self.mailbox.damaged
        letters = self.mailbox.fetch(session.known, number + session.offset, limit)
        return letters, self.mailbox.damaged > damaged

    def mail_acked(self, session: Session, number: int) -> None:
        """Note that a client has shown its mail below ``number``. When all that waited is shown, it goes online."""
        if self.sessions.get(session.id) is not None:
            self.mailbox.acked(session.known, number + session.offset)
            self.announce(session)

    # coming and going of nicks

    def forget(self, nick: str) -> bool:
        """Forget a nick that has no session, with its owner and its mail; return whether there was such a nick."""
        known = self.mailbox.known.get(nick)
        if known is None or self.sessions.of(nick) is not None:
            return False
        self.maybe_running.pop(nick, None)
        self.mailbox.forget(known)
        self.table.set(nick, known.host, known.port, GONE)
        return True

    def note_time(self, now: float) -> None:
        """Note that those who are live are there now: repeated, so that the store knows it after a crash."""
        for session in self.sessions.live_sessions():
            session.known.seen = self.mailbox.uptime(now)
            self.mailbox.changed(session.known)
        self.mailbox.tidy()

    def lapse(self, now: float, days: float) -> list[Known]:
        """Forget every nick that was offline for more than ``days`` (0: never); return those nicks."""
        if not days:
            return []
        live = {session.nick for session in self.sessions.live_sessions()}
        since = self.mailbox.uptime(now) - days * DAY
        idle = [known for known in self.mailbox.known.values() if known.seen < since and known.nick not in live]
        for known in idle:
            self._drop(known.nick, now)
        return idle

    def _drop(self, nick: str, now: float) -> None:
        """Forget a nick that is offline; its client may have died without leaving."""
        session = self.sessions.of(nick)
        if session is not None:
            self._end(session, now, EVICTED)
        self.forget(nick)
