"""Who may register, who is registered, copies of the client table, and what is decided on stored mail.

Rules of this file
------------------
- No sockets, no clock, no printing. Monotonic time (``now``, in seconds) comes in as an argument; so do random ids.
  ``TableSync`` and ``Committer``, which do something later, and ``ReplyLimit``, which sends, have the ``Loop``.
- No decision depends on the wall clock: see ``home``.
- Of datagrams it knows only those of a handshake (``Hellos``): it decides, its owner informs the clients.
- What must survive a crash is in the store before anybody hears of it: the owner calls ``commit`` first, and
  sends what was decided in that turn afterwards.

How it works
------------
The server owns a ``Table``, every client a ``Mirror`` of it (see ``protocol``), which ``TableSync`` keeps complete.

``Cookies`` prove the address of whoever registers, and ``ReplyLimit`` keeps answers small until that is done. At the
client, ``Patience`` says for how long a registration that was refused is asked for again. ``Hellos`` are those of
clients that encrypt, as long as they are not done.

``Sessions`` holds the registrations of clients: those that exist, and those that ended lately. ``Registry`` is what the
server decides on table, sessions and store: who gets a nick, when somebody goes online (not before the mail that waited
is acked) and offline, what happens to a message that should be kept. ``Committer`` has the store written.

A nick belongs to its first owner: a client that registers it with a token (see ``secure.token_for``) owns it, and the
store keeps a hash of that token. A nick that was registered without a token belongs to nobody, and its mail goes to the
next client that registers it. Nicks that only differ in case, width or composition are one nick: the spelling that was
registered first counts, another one is refused, and so is a new nick that mixes scripts. A nick that the store has from
the time before that rule keeps working.
"""
from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Sequence
from enum import Enum
from itertools import takewhile

from home import Known, Mailbox
from loop import Endpoint, Loop, RestartableTimer, jittered, log, seen_from
from protocol import (GONE, NEVER, OFFLINE, ONLINE, SESSION_BYTES, SYNC_PAGES, UNTOLD, Address, Info, Mirror, Page,
                      Parcel, Place, Protocol, State, StoredLetter, Table, addressed, encode, folded, hello_prologue,
                      mixes_scripts, network_of, since_of)
from secure import (MAPS, Channel, HandshakeState, Keys, RateLimit, Send, hash_of, hmac_sha256, is_bind_proof,
                    is_hash_of, read_map)


# --- copies of the table --------------------------------------------------------------------------------------

SYNC_INTERVAL = 0.2       # s until what is missing of the table is asked for again; twice as long each further time ...
MAX_SYNC_INTERVAL = 2.0   # ... up to this: a server to which thousands come at once remembers who has asked
KEY_INTERVAL = 0.5        # s until the keys of others are asked for again
KEYS_ASKED = 64           # at once
LARGE_TABLE = 1000        # versions; a server with a table so large may let us wait for it, if many come at once, ...
RUSH_WAIT = 8 * SYNC_INTERVAL   # s; ... so only after a wait so long it is asked whether it is there at all
OLD_TABLE_TIME = 30.0     # s that the table of a server that restarted stays in force while the new one comes


class TableSource(Protocol):
    """What a ``TableSync`` needs of the client's link to its server."""

    nick: str
    endpoint: Endpoint
    is_silent: bool
    is_visit: bool

    @property
    def has_joined(self) -> bool: ...
    def ask(self, tag: str, about: Info) -> bool: ...       # a question for the server; False: there is no session
    def ping_until_answered(self) -> None: ...


class TableSync(Mirror):
    """A client's copy of the server's table, kept complete.

    A page that does not follow on what is here, or a pong with a higher version, shows that something is missing: then
    the server is asked until nothing is, ever more slowly. After a restart of the server the old table stays in force
    until the new one is whole, for 30 s at most; then everybody in it counts as offline, and messages go to the server.
    """

    def __init__(self, loop: Loop, link: TableSource, on_changed: Callable[[Sequence[str]], None],
                 on_own_state: Callable[[bool, bool], None]) -> None:
        """``on_changed`` hears whose entries have changed, ``on_own_state`` whether we are online, and were before."""
        super().__init__()
        self.has_news = False                   # that the user has not heard of
        self.is_checking = False                # the server is asked whether somebody is missing
        self.interval = SYNC_INTERVAL           # s between questions; longer while the server is silent
        self._loop, self._link, self._on_changed = loop, link, on_changed
        self._on_own_state = on_own_state
        self._shows_us = False                  # online, in the table of the server as it runs now
        self._is_confirmed = False              # in this session, the table was whole
        self._pages = 0                         # that came since the last question, ...
        self._asked = -NEVER                    # ... when that was, ...
        self._wait = 0.0                        # ... and the time after which it is repeated if none come
        self._is_warned = False                 # the log says that the table is too large
        self._wanted: dict[str, None] = {}      # whose keys are asked for
        self.awaited = ""                       # the one for whose key a command waits
        self._places: set[Address] = set()      # where anybody is online, ...
        self._places_of = self.table, -1        # ... as of that version
        self._sync_timer = RestartableTimer(loop, self._repeat)
        self._old_table_timer = RestartableTimer(loop, self._on_old_table_expired)
        self._key_timer = RestartableTimer(loop, self._ask_for_keys)

    def reach(self, host: str, port: int) -> Address | None:
        """Return where we reach an address of the table; None if we cannot: then the server relays."""
        return seen_from(self._link.endpoint.current, (host, port))

    def place_of(self, nick: str) -> Place | None:
        """Return where ``nick`` can be reached; None: nobody knows that nick."""
        entry = self.table.entries.get(nick)
        return Place(entry.state == ONLINE, self.reach(entry.host, entry.port)) if entry is not None else None

    def home_of(self, nick: str) -> Address | None:
        """Return where ``nick`` is online; None: nowhere that we reach."""
        place = self.place_of(nick)
        return place.address if place is not None and place.online else None

    def key_of(self, nick: str) -> tuple[bytes, bool] | None:
        """Return by which key ``nick`` is encrypted for, and whether it is bound to that; None: nobody knows.

        b"": it cannot be encrypted for, in its present session.
        """
        entry = self.table.entries.get(nick)
        if entry is None or entry.key == UNTOLD or not (entry.key or entry.state == ONLINE):
            return None
        return entry.key, entry.is_bound

    def waits_for_key(self, nick: str) -> bool:
        """Return whether ``nick`` has a key that the server has not told: then it is asked, until it says which."""
        entry = self.table.entries.get(nick)
        if entry is None or entry.key != UNTOLD:
            return False
        if nick not in self._wanted:
            self._wanted[nick] = None
            if len(self._wanted) <= KEYS_ASKED:
                self._link.ask("want", {"nick": nick})
            if not self._key_timer.is_set:
                self._key_timer.set(self._loop.now() + jittered(self._loop, KEY_INTERVAL))
        return True

    def await_key(self, nick: str) -> bool:
        """Have the next command wait for the key of ``nick``, if it is to come; return whether it waits."""
        self.awaited = nick if not self._link.is_silent and self.waits_for_key(nick) else ""
        return bool(self.awaited)

    def stop_waiting(self) -> None:
        """Let no command wait: nobody would answer."""
        self.is_checking, self.awaited = False, ""

    def _ask_for_keys(self) -> None:
        """Ask again for the keys that are wanted; for a part of them, if they are many."""
        entries = self.table.entries
        self._wanted = {nick: None for nick in self._wanted if nick in entries and entries[nick].key == UNTOLD}
        for nick in list(self._wanted)[:KEYS_ASKED]:
            self._wanted[nick] = self._wanted.pop(nick)     # behind the others
            self._link.ask("want", {"nick": nick})
        if self.awaited not in self._wanted:
            self.awaited = ""
        if self._wanted:
            self._key_timer.set(self._loop.now() + jittered(self._loop, max(KEY_INTERVAL, self.interval)))

    def on_key(self, info: Info) -> None:
        """Learn the key of somebody, which was asked for."""
        if self.is_of_this_boot and self.table.learn(info["nick"], info["key"], info["bound"], info["version"]):
            self._wanted.pop(info["nick"], None)
            self.awaited = self.awaited if self.awaited in self._wanted else ""
            self._on_changed([info["nick"]])

    def is_at(self, nick: str, address: Address) -> bool:
        """Return whether ``nick`` is online at ``address``."""
        entry = self.table.entries.get(nick)
        return entry is not None and entry.state == ONLINE and (
            (entry.host, entry.port) == address
            or ("%" in address[0] and self.reach(entry.host, entry.port) == address))

    def holds(self, address: Address) -> bool:
        """Return whether anybody is online at ``address``."""
        if self._places_of != (self.table, self.table.version):
            self._places_of = self.table, self.table.version
            self._places = {(entry.host, entry.port) for entry in self.table.entries.values() if entry.state == ONLINE}
        return (address[0].partition("%")[0], address[1]) in self._places

    def are_behind_one_router(self, nick: str) -> bool:
        """Return whether the server sees ``nick`` at the same host as us."""
        entry, own = self.table.entries.get(nick), self.table.entries.get(self._link.nick)
        return entry is not None and own is not None and entry.host == own.host

    def begin_session(self, boot: int, version: int) -> None:
        """Catch up with a server, as it runs since ``boot``, whose table has that version."""
        self._shows_us = self._is_confirmed = False
        self._wait = 0.0
        super().begin_session(boot, version)
        self._key_timer.set(self._loop.now() if self._wanted else NEVER)
        if not (self.is_of_this_boot or self._old_table_timer.is_set):
            self._old_table_timer.set(self._loop.now() + OLD_TABLE_TIME)
        if self.is_of_this_boot and self.is_whole:
            self.is_checking = False
            self._confirm()
            self._refresh_own_state()
        else:
            self._ask()

    def end_session(self) -> None:
        """Stop asking for the table: there is no session."""
        self.stop_waiting()
        self._sync_timer.cancel()
        self._key_timer.cancel()

    def stop(self) -> None:
        """Neither ask nor wait any more: the client leaves."""
        self.stop_waiting()
        self._sync_timer.cancel()
        self._key_timer.cancel()
        self._old_table_timer.cancel()

    def _ask(self) -> bool:
        """Ask for what is missing; return False if there is no session for that."""
        if not self._link.ask("sync", {"version": self.version}):
            return False
        self._pages = 0
        self._asked = self._loop.now()
        self._wait = max(self.interval, min(2 * self._wait, MAX_SYNC_INTERVAL))
        self._sync_timer.set(self._asked + jittered(self._loop, self._wait))
        return True

    def _repeat(self) -> None:
        """Ask again. If nothing has come at all, find out whether the server is there; later the keepalive does it."""
        patience = RUSH_WAIT if self.target >= LARGE_TABLE else 2 * SYNC_INTERVAL
        if not self._pages and patience <= self._wait < MAX_SYNC_INTERVAL:
            self._link.ping_until_answered()
        self._ask()

    def ask_soon(self) -> None:
        """Ask for what is missing, at once unless that was done just now."""
        if not self._sync_timer.is_set:
            self._sync_timer.set(max(self._loop.now(), self._asked + SYNC_INTERVAL))

    def check(self) -> None:
        """Ask whether anything is missing here, although nothing seems to be: what was sent may have got lost.

        Where nobody would answer, nothing is asked.
        """
        self.is_checking = not self._link.is_silent and self._ask()
        if self.is_checking:
            self._link.ping_until_answered()

    def on_version(self, version: int) -> None:
        """Note how far the server is; ask if something is missing here."""
        if self.expect(version):
            self.ask_soon()

    def on_table(self, info: Info) -> None:
        """Accept a page of the table."""
        if not self._link.has_joined:
            return
        since, version = since_of(info), info["version"]
        changed = self.apply(Page(since, version, info["set"], info.get("keys", ()), info.get("untold", False),
                                  info.get("at", ())))
        if changed is None:
            self.ask_soon()
            return
        self._pages, self._wait = self._pages + 1, 0.0
        if self.table.is_full and not self._is_warned:
            self._is_warned = True
            log.error("the server names more than a million clients: this program knows only the first ones")
        self._note_changes(changed)
        if self.is_whole:
            self._sync_timer.cancel()
            self._old_table_timer.cancel()
            self._confirm()
            if not self._shows_us:
                self._refresh_own_state()
            self.is_checking = self.is_checking and not since == version == self.version    # which says: no more
            if self.is_checking:
                self.ask_soon()     # not at once: the network may repeat pages
        elif self._pages >= SYNC_PAGES:
            self._ask()
        else:
            self._sync_timer.set(self._loop.now() + jittered(self._loop, SYNC_INTERVAL))

    def _confirm(self) -> None:
        """Tell the server and the user, once a session, that the table is here."""
        if not self._is_confirmed:
            self._is_confirmed = self.has_news = True
            self._link.ping_until_answered()       # the version is in the ping

    def _on_old_table_expired(self) -> None:
        """Count everybody as offline: the old table's time is over, and there is no new one yet."""
        self._note_changes(self.mark_all_offline())

    def _note_changes(self, nicks: Sequence[str]) -> None:
        if not nicks:
            return
        self.has_news = True
        self._on_changed(nicks)
        if self._link.nick in nicks:
            self._refresh_own_state()

    def _refresh_own_state(self) -> None:
        was_online = self._shows_us
        self._shows_us = self.is_of_this_boot and (self._link.is_visit or self.table.is_online(self._link.nick))
        self._on_own_state(self._shows_us, was_online)


# --- registering ----------------------------------------------------------------------------------------------

class LinkState(Enum):
    """Where a client stands with its server, see ``ServerLink``."""

    OFFLINE = "offline"
    REGISTERING = "registering"
    SYNCING = "syncing"
    ONLINE = "online"
    RETURNING = "returning"
    LEAVING = "leaving"


# under names of their own: reading a member off its class is slow in Python 3.11
LINK_OFFLINE, LINK_REGISTERING, LINK_SYNCING = LinkState.OFFLINE, LinkState.REGISTERING, LinkState.SYNCING
LINK_ONLINE, LINK_RETURNING, LINK_LEAVING = LinkState.ONLINE, LinkState.RETURNING, LinkState.LEAVING

REGISTERED_STATES = (LINK_ONLINE, LINK_RETURNING, LINK_SYNCING)
COMMAND_STATES = (LINK_ONLINE, LINK_RETURNING, LINK_OFFLINE)    # in which commands are carried out

TRANSITIONS: dict[LinkState, tuple[LinkState, ...]] = {
    LINK_OFFLINE: (LINK_REGISTERING,), LINK_REGISTERING: (LINK_SYNCING, LINK_OFFLINE),
    LINK_SYNCING: (LINK_ONLINE, LINK_LEAVING, LINK_OFFLINE), LINK_ONLINE: (LINK_RETURNING, LINK_LEAVING, LINK_OFFLINE),
    LINK_RETURNING: (LINK_ONLINE, LINK_LEAVING, LINK_OFFLINE), LINK_LEAVING: (LINK_OFFLINE,),
}


REFUSAL_INTERVALS = {"taken": 0.5, "full": 2.0}     # s between attempts, after refusals that may pass


class Patience:
    """For how long a registration that was refused is asked for again.

    ``is_endless``: until its owner calls ``end``. Otherwise ``limit`` says how long a nick of ours that is in use is
    waited for, in s since the first refusal.
    """

    def __init__(self, is_endless: bool = False, limit: float = 0.0) -> None:
        self.is_endless, self.limit = is_endless, limit
        self.on_wait: Callable[[], None] = lambda: None     # an observer: a refusal is waited out
        self.renew()

    def renew(self) -> None:
        """Count from the next refusal on: the request was granted."""
        self.reason: str | None = None      # of the refusal that is waited out
        self._until = NEVER

    def end(self) -> bool:
        """Be endless no more; return whether it was."""
        was_endless, self.is_endless = self.is_endless, False
        return was_endless

    def wait_after(self, now: float, reason: str, is_starting: bool, jitter: float) -> float:
        """Return the seconds until the request is made again after a refusal, 0.0 if that is final.

        ``is_starting``: nobody knows us yet. After a restart of a server its clients wait for a place for as long as
        it takes. ``jitter``: by which the interval is multiplied. The last attempt is made when the time is over.
        """
        limits = {"taken": self.limit, "full": 0.0 if is_starting else NEVER}
        self._until = min(self._until, now + limits.get(reason, 0.0))
        wait = REFUSAL_INTERVALS.get(reason, 0.0) * jitter
        if not self.is_endless:
            wait = max(0.0, min(wait, self._until - now))
        self.reason = reason if wait else None
        if wait:
            self.on_wait()
        return wait


COOKIE_TIME = 30.0        # s; the time slot in a cookie: it is valid in its own slot and the next one, 30 to 60 s


class Cookies:
    """Proofs of address for which a server remembers nothing: HMAC over address and time (RFC 9147 §5.1).

    RFC 9000 §8.1.2 calls such a proof an address validation token.
    """

    def __init__(self, secret: bytes) -> None:
        """``secret`` signs the cookies; nobody else knows it."""
        self.secret = secret

    def make(self, now: float, address: Address, age: int = 0) -> bytes:
        """Return the cookie for ``address`` of this time slot, or of that ``age`` slots ago."""
        text = f"{address} {int(now / COOKIE_TIME) - age}"
        return hmac_sha256(self.secret, text.encode())[:SESSION_BYTES]

    def accepts(self, cookie: bytes | None, now: float, address: Address) -> bool:
        """Return whether ``cookie`` was made for ``address``, and not too long ago."""
        import hmac     # here: only registrations need it, and a start is measured
        return cookie is not None and any(hmac.compare_digest(cookie, self.make(now, address, age)) for age in (0, 1))


class ReplyLimit:
    """The amplification limit, for answers to an address that may be forged.

    All answers to a datagram together are never larger than it was: it is no use to forge the address of a victim, and
    to let the server do the flooding. And there are not more than ``most`` answers a second.
    """

    def __init__(self, loop: Loop, send: Send, most: int) -> None:
        self.allowance = 0          # bytes that may still answer the datagram at hand
        self.refused = 0            # answers that were not sent
        self._loop, self._send, self._most = loop, send, most
        self._second = 0            # the one that is counted, and ...
        self._replies = 0           # ... the answers in it

    def allows(self, size: int) -> bool:
        """Count ``size`` bytes that are to be sent; return False, and count nothing, if they may not be."""
        second = int(self._loop.now())
        if second != self._second:
            self._second, self._replies = second, 0
        if size > self.allowance or self._replies >= self._most:
            self.refused += 1
            return False
        self.allowance -= size
        self._replies += 1
        return True

    def reply(self, datagram: bytes, address: Address, channel: Channel | None = None) -> None:
        """Answer the datagram at hand, in the channel in which it came, if that is allowed."""
        if channel is not None:
            datagram = channel.seal(MAPS, datagram)
        if self.allows(len(datagram)):
            self._send(datagram, address)


HELLO_TIME = 5.0          # s; a handshake whose channel is not used by then is forgotten
HELLOS_PER_NICK = 2       # handshakes that are not done, at most; beyond it the oldest are forgotten
HELLOS_PER_ADDRESS = 64   # the same, from one address ...
MAX_HELLOS = 16384        # ... and in all: 50 MB
FAILURES_PER_NETWORK = 5  # handshakes a second that fail; nobody there is listened to for the rest of that second
HELLO_FAILURES = 2000     # the same in all, a tenth of the server's time: a few hosts must not keep everybody out


class Hello:
    """The server's side of a handshake that is not done: it is when the first record has come in its channel."""

    __slots__ = ("message", "address", "request", "deadline", "noise", "join", "reply", "session", "version",
                 "channel")

    def __init__(self, message: bytes, address: Address, request: int, deadline: float, noise: HandshakeState,
                 join: Info) -> None:
        self.message, self.address, self.request, self.deadline = message, address, request, deadline
        self.noise = noise
        self.join = join                # what the client has said in its message
        self.reply = b""                # our answer, repeated when the message is ...
        self.session = b""              # ... the id of the session in it, b"" if it is a refusal, ...
        self.version = 0                # ... and the version of the table that the client was told to reach
        self.channel: Channel | None = None

    @property
    def key(self) -> bytes:
        """The public key of the client."""
        return self.noise.received["s"]


class Hellos:
    """Handshakes of a server that are not done. A message that comes again gets the same answer again.

    There is a session only once a record has come: so a message of somebody else, recorded and sent again, cannot end
    the session that it once made. Whoever is here has proved to receive at an address.
    """

    def __init__(self, keys: Keys, taken: Container[bytes] = ()) -> None:
        """``taken``: indices that other channels have."""
        self.keys, self._taken = keys, taken
        self._hellos: dict[bytes, Hello] = {}       # by message, oldest first
        self._at: dict[Address, list[Hello]] = {}   # by address, oldest first
        self._by_index: dict[bytes, Hello] = {}     # those that are answered with a channel
        self._failures = RateLimit(FAILURES_PER_NETWORK, HELLO_FAILURES)

    def __len__(self) -> int:
        return len(self._hellos)

    def find(self, message: bytes) -> Hello | None:
        """Return the handshake that this message has begun."""
        return self._hellos.get(message)

    def of_index(self, index: bytes) -> Hello | None:
        """Return the handshake whose channel a record calls by ``index``."""
        return self._by_index.get(index)

    def read(self, now: float, address: Address, server_id: bytes, info: Info) -> Hello | None:
        """Begin a handshake with a ``hello``; return None if it is not genuine, or too many others were not."""
        message, prologue = info["message"], hello_prologue(server_id, info["id"], info["cookie"])
        network = network_of(address[0])
        if self._failures.is_reached(now, network):
            return None
        noise = HandshakeState(self.keys.sodium, "IK", False, prologue, self.keys.pair)
        join = read_map(noise, message, "join")
        if join is None:
            self._failures.allows(now, network)
            return None
        hello = Hello(message, address, info["id"], now + HELLO_TIME, noise, join)
        self._make_room(now, address, hello.join["nick"])
        self._hellos[message] = hello
        self._at.setdefault(address, []).append(hello)
        return hello

    def _make_room(self, now: float, address: Address, nick: str) -> None:
        """Forget those whose time is over, and what one more from ``address`` for ``nick`` would be too many."""
        while self._hellos:
            oldest = next(iter(self._hellos.values()))
            if oldest.deadline > now and len(self._hellos) < MAX_HELLOS:
                break
            self.forget(oldest)
        others = self._at.get(address, [])
        alike = [one for one in others if folded(one.join["nick"]) == folded(nick)]
        for found, most in ((alike, HELLOS_PER_NICK), (list(others), HELLOS_PER_ADDRESS)):
            for one in found[:max(0, len(found) + 1 - most)]:
                self.forget(one)

    def answer(self, hello: Hello, tag: str, info: Info) -> bytes:
        """Return our message with a ``welcome`` or a ``refused``, and keep it. A welcome comes with a channel."""
        index = self.keys.new_index(self._by_index, self._taken)
        if tag == "welcome":
            info = {**info, "index": index}
            hello.session, hello.version = info["session"], info["version"]
        message = hello.noise.write(encode(tag, info), self.keys.random())
        hello.reply = encode("hello", {"id": hello.request, "message": message})
        if tag == "welcome" and self.find(hello.message) is hello:
            hello.channel = Channel(hello.noise.split(), index, hello.join["index"])
            self._by_index[index] = hello
        return hello.reply

    def forget(self, hello: Hello) -> None:
        """Remove a handshake: it is done, or nobody has used its channel."""
        if self._hellos.pop(hello.message, None) is None:
            return
        self._at[hello.address].remove(hello)
        if not self._at[hello.address]:
            del self._at[hello.address]
        if hello.channel is not None:
            self._by_index.pop(hello.channel.index, None)


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
                 "knocks", "reads_packed", "is_early", "is_visit", "own", "channel", "key")

    def __init__(self, id_: bytes, known: Known, address: Address, request: int, now: float,
                 is_visit: bool = False) -> None:
        self.id = id_
        self.is_visit = is_visit            # its client only reads the table, which does not name it
        self.known, self.nick = known, known.nick
        self.address = address
        self.request = request              # the id of the ``reg`` that made it
        self.heard = now
        self.offset = known.first - 1       # mail number of this session + offset = number in the mailbox
        self.greeting = known.last          # mail up to here comes before it is announced as online
        self.version = 0                    # of the table that it must hold before it gets mail
        self.holds_table = False
        self.knocks = self.reads_packed = False     # its client knows ``call``, and ``packed``
        self.is_early = False               # it is to be announced before it has acked the mail that waits
        self.own: Address | None = None     # of the client in its own network, as it says
        self.channel: Channel | None = None     # in which all of the session goes, None: in plain ...
        self.key: bytes | None = None           # ... and the public key of the client who has made it

    def note(self, about: Info) -> None:
        """Note what a client has said of itself when it registered."""
        self.knocks, self.reads_packed = about.get("knocks", False), about.get("packed", False)
        self.own = about.get("own")

    def told(self, *maps: bytes) -> bytes:
        """Return maps as a datagram that shows that it is the server who says this: sealed, or behind a ``for``."""
        return addressed(self.id, *maps) if self.channel is None else self.channel.seal(MAPS, b"".join(maps))

    @property
    def has_had_its_mail(self) -> bool:
        """Whether all mail that waited for it when it came is acked, or it does not want to wait for that."""
        return self.is_early or self.known.first > self.greeting


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
        self.channels: dict[bytes, Channel] = {}        # by index; those of ended sessions, too, to answer in them ...
        self._ended_channels: deque[bytes] = deque()    # ... which are these
        self._just_ended: list[Session] = []

    def __len__(self) -> int:
        return len(self.by_id)

    def get(self, id_: bytes) -> Session | None:
        """Return the session with that id, None if there is none or it has ended."""
        return self.by_id.get(id_)

    def of(self, nick: str) -> Session | None:
        """Return the session of ``nick``, None if it has none."""
        return self.by_nick.get(nick)

    def knocks(self, nick: str) -> bool:
        """Return whether the client of ``nick`` knocks if it is called."""
        session = self.by_nick.get(nick)
        return session is not None and session.knocks

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

    def add(self, session: Session, hello: Hello | None = None) -> None:
        """Begin a session; its nick must have none. ``hello``: the handshake in whose channel all of it goes."""
        self.by_id[session.id] = self.by_nick[session.nick] = self.live[session.id] = session
        if hello is not None and hello.channel is not None:
            session.channel = self.channels[hello.channel.index] = hello.channel
            session.key = hello.key

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
        if session.channel is not None:
            self._ended_channels.append(session.channel.index)
            if len(self._ended_channels) > MAX_ENDED:
                del self.channels[self._ended_channels.popleft()]

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

MAX_KNOWN = 100_000             # nicks; beyond it one that is offline without mail is forgotten, see ``IdleNicks``
MAILBOX_LIMIT = 100_000         # messages that wait for one recipient
MAILBOX_SIZE = 64 * 2 ** 20     # bytes of text that wait for one recipient
NO_ID = 0                       # of a nick that is not in the store
NICK_LAPSE = 90.0               # days offline after which a nick is forgotten; only time in which the server ran counts
DAY = 86400.0                   # s


class ClaimVerdict(Enum):
    """What becomes of a request for a nick. The values of the refusals travel in a ``refused``."""

    GRANTED = "granted"
    PROBE_HOLDER = "probe holder"   # ask whether its holder is there: no answer grants the nick, an answer refuses it
    TAKEN = "taken"         # its holder has answered
    OWNED = "owned"         # it has an owner, who has shown something else; or it looks like another one
    ENCRYPTED = "encrypted"     # this is its owner, who has encrypted before, and does not now
    MUST_ENCRYPT = "secure"     # the server speaks with nobody who does not encrypt
    FULL = "full"           # there are too many clients, or too many nicks
    SPENT = "replaced"      # that request had a session, which is over


# These are no NamedTuples: each of those costs every start of a client a tenth of a millisecond.

class ShownKey:
    """The key of a client that encrypts, which is to own its nick. That it has the secret is shown by its channel."""

    __slots__ = ("public", "proof")

    def __init__(self, public: bytes, proof: bytes) -> None:
        """``proof``: see ``bind_proof``."""
        self.public, self.proof = public, proof


class Claim:
    """A request for a nick, from an address that is proved."""

    __slots__ = ("nick", "address", "token", "request", "about", "hello", "key")

    def __init__(self, nick: str, address: Address, token: bytes | None, request: int, about: Info,
                 hello: Hello | None = None, key: ShownKey | None = None) -> None:
        self.nick, self.address, self.token = nick, address, token
        self.request = request      # the id of the ``reg``
        self.about = about          # what else the client has said of itself, see ``Session.note``
        self.hello = hello          # the handshake of a client that encrypts ...
        self.key = key              # ... and what is to own the nick, None: nobody

    @classmethod
    def of(cls, hello: Hello) -> Claim:
        """Return what a client claims in its handshake."""
        join = hello.join
        key = ShownKey(hello.key, join["proof"]) if "proof" in join else None
        return cls(join["nick"], hello.address, None, hello.request, join, hello, key)


class SaveVerdict(Enum):
    """What becomes of messages that somebody wants to be kept."""

    KEEP = "keep"
    PROBE_RECIPIENT = "probe recipient"     # first, because it is believed to be online
    UNKNOWN = "unknown"     # refused: there is no such nick


class Refusal(Enum):
    """Why messages are not kept. The values travel in a ``nack``."""

    NO_SUCH_NICK = "unknown"
    MAILBOX_FULL = "full"
    DISK_FAILS = "disk"
    OTHER_OWNER = "key"     # they are sealed for another key than the recipient has


GRANTED, PROBE_HOLDER, TAKEN = ClaimVerdict.GRANTED, ClaimVerdict.PROBE_HOLDER, ClaimVerdict.TAKEN
OWNED, FULL, SPENT = ClaimVerdict.OWNED, ClaimVerdict.FULL, ClaimVerdict.SPENT
NO_SUCH_NICK, MAILBOX_FULL, DISK_FAILS = Refusal.NO_SUCH_NICK, Refusal.MAILBOX_FULL, Refusal.DISK_FAILS
OTHER_OWNER = Refusal.OTHER_OWNER
ENCRYPTED, MUST_ENCRYPT = ClaimVerdict.ENCRYPTED, ClaimVerdict.MUST_ENCRYPT
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
        return (True, -known.id, known.nick) if known.is_owned else (False, known.seen, known.nick)

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
                if known.is_owned:
                    return None     # nor can a stranger reach the next owner by sending mail to this one
            heapq.heappop(self._heap)   # if it was in use, it is added again when it is not any more
        return None


def owns(known: Known, token: bytes | None, key: ShownKey | None, server_key: bytes) -> bool:
    """Return whether somebody may have a nick: by its key, by its token, or because it is nobody's."""
    if known.key is not None:
        return key is not None and key.public == known.key
    if known.owner is None:
        return True
    if key is not None:
        return is_bind_proof(key.proof, known.owner, server_key, key.public)
    return token is not None and is_hash_of(known.owner, token)


def has_encrypted(known: Known, token: bytes | None, server_key: bytes) -> bool:
    """Return whether a token, shown without a key, is that of the owner of the nick's key."""
    if token is None or known.key is None or known.proof is None:
        return False
    return is_bind_proof(known.proof, hash_of(token), server_key, known.key)


class Registry:
    """What the server decides on table, store and sessions; see the opening of this module."""

    def __init__(self, mailbox: Mailbox, max_clients: int = MAX_CLIENTS, mailbox_limit: int = MAILBOX_LIMIT,
                 max_known: int = MAX_KNOWN) -> None:
        self.mailbox, self.server_id = mailbox, mailbox.server_id
        self.table = Table(self._seen_at)
        self.sessions = Sessions()
        self.max_clients, self.mailbox_limit, self.max_known = max_clients, mailbox_limit, max_known
        self.public_key = b""       # of the server, b"" if it does not encrypt
        self.maybe_running: dict[str, Address] = {}     # online when the server last stopped
        self._at: dict[Address, Session] = {}           # who is online there ...
        self._latest: dict[Address, Session] = {}       # ... and who has registered there last, online or not
        self._idle = IdleNicks(mailbox.known, lambda known: self.holder(known.nick) is not None)
        for known in mailbox.known.values():
            self.table.set(known.nick, known.host, known.port, OFFLINE, known.key or b"", known.key is not None)
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

    def _seen_at(self, nick: str) -> int:
        known = self.mailbox.known.get(nick)
        return self.mailbox.wall_at(known.seen) if known is not None else 0

    # who gets a nick

    def claim(self, nick: str, address: Address, token: bytes | None, key: ShownKey | None = None,
              is_sealed: bool = False) -> ClaimVerdict:
        """Return whether ``nick`` may be registered from ``address``: GRANTED, PROBE_HOLDER, OWNED, ENCRYPTED, FULL.

        ``is_sealed``: the client encrypts.
        """
        known = self.mailbox.known.get(nick)
        if known is not None and not owns(known, token, key, self.public_key):
            return ENCRYPTED if has_encrypted(known, token, self.public_key) else OWNED
        if known is None and (self.table.spellings.of(nick) or mixes_scripts(nick)):
            return OWNED
        if self._is_in_use_elsewhere(nick, address, key, is_sealed):
            return PROBE_HOLDER
        sessions = self.sessions
        if sessions.of(nick) is None and len(sessions) >= self.max_clients and sessions.oldest_unresponsive() is None:
            return FULL
        if known is None and len(self.mailbox.known) >= self.max_known and self._idle.first() is None:
            return FULL
        return GRANTED

    def _is_in_use_elsewhere(self, nick: str, address: Address, key: ShownKey | None, is_sealed: bool) -> bool:
        """Return whether somebody else may be running with ``nick``.

        Who encrypts is known by the key of the nick, if it has one, not by the address: others can speak from there.
        Who was online when the server stopped can only be asked in plain: for those who do not encrypt.
        """
        session, holder = self.sessions.of(nick), self.holder(nick)
        if session is None or not self.sessions.is_live(session):
            return not is_sealed and holder not in (None, address)
        if session.channel is not None and (key is None or session.known.key != key.public):
            return True
        return holder != address

    def holder(self, nick: str) -> Address | None:
        """Return where somebody may be running with ``nick``, None if nobody is."""
        session = self.sessions.of(nick)
        if session is not None and self.sessions.is_live(session):
            return session.address
        known = self.mailbox.known.get(nick)
        if known is not None and known.key is not None:
            return None     # its channel has ended, so it cannot be asked; and only its owner has the key
        return self.maybe_running.get(nick)

    def not_there(self, nick: str, address: Address) -> None:
        """Note that nobody answers at ``address``, in case ``nick`` was online there when the server last stopped."""
        if self.maybe_running.get(nick) == address:
            del self.maybe_running[nick]
            self._idle.add(self.mailbox.known[nick])

    def admit(self, now: float, id_: bytes, nick: str, address: Address, token: bytes | None, request: int,
              key: ShownKey | None = None, hello: Hello | None = None, is_visit: bool = False) -> Session:
        """Register ``nick`` after ``claim`` granted it; return its session. An older one of that nick is replaced.

        ``hello``: the handshake in whose channel all of it goes. ``is_visit``: nobody is told, and nothing is kept.
        """
        old = self.sessions.of(nick)
        if old is not None:
            self._end(old, now, REPLACED)
        elif len(self.sessions) >= self.max_clients:
            unresponsive = self.sessions.oldest_unresponsive()
            if unresponsive is not None:
                self._end(unresponsive, now, EVICTED)
        self.maybe_running.pop(nick, None)
        if is_visit:
            known = Known(NO_ID, nick, *address, False, None, self.mailbox.uptime(now))
        else:
            known = self._know(now, nick, address, token, key)
        session = Session(id_, known, address, request, now, is_visit)
        self.sessions.add(session, hello)
        self.place(session, address, now)
        session.version = hello.version if hello is not None else self.table.version
        return session

    def _know(self, now: float, nick: str, address: Address, token: bytes | None, key: ShownKey | None) -> Known:
        """Return the record of a nick, made or updated; if there are too many, forget an idle one first."""
        known = self.mailbox.known.get(nick)
        if known is None:
            idle = self._idle.first() if len(self.mailbox.known) >= self.max_known else None
            if idle is not None:
                self._drop(idle, now)
            known = self.mailbox.add(nick, *address, None, self.mailbox.uptime(now))
        if token is not None:
            known.owner = hash_of(token)
        if key is not None:
            known.key, known.proof = key.public, key.proof
        known.host, known.port = address
        known.seen = self.mailbox.uptime(now)
        self.mailbox.changed(known)
        return known

    def place(self, session: Session, address: Address, now: float) -> None:
        """Put a session at an address that it has proved: online there if it is live and no mail has to come first."""
        for other in dict.fromkeys((self._at.get(address), self._latest.get(address))):
            if other is not None and other is not session:      # even before we are announced: it has lost the address
                self.went_offline(other, now)
        self._leave(session)
        self._latest[address] = session
        session.address = address
        session.known.host, session.known.port = address
        is_ready = self.sessions.is_live(session) and session.has_had_its_mail
        self._set_state(session, ONLINE if is_ready else OFFLINE)

    def _set_state(self, session: Session, state: State) -> None:
        if session.is_visit:
            return
        nick, address, known = session.nick, session.address, session.known
        entry = self.table.get(nick)
        if entry is not None and self._at.get((entry.host, entry.port)) is session:
            del self._at[entry.host, entry.port]
        if state == ONLINE:
            other = self._at.get(address)
            # needed again: an unresponsive client may come back to an address that another one has taken meanwhile
            if other is not None:
                self.went_offline(other, other.heard)
            self._at[address] = session
        key = (session.key if state == ONLINE else known.key) or b""
        self.table.set(nick, *address, state, key, key == known.key)
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
        if self.sessions.is_live(session):      # else it was last there when it was lost
            session.known.seen = self.mailbox.uptime(now)
        self.sessions.mark_unresponsive(session)
        known = self.mailbox.known.get(session.nick)    # also behind a visit: the nick was in use meanwhile
        if known is not None:
            self._idle.add(known)
        self._set_state(session, OFFLINE)

    def deregister(self, session: Session, now: float) -> None:
        """Note that a client leaves."""
        self._end(session, now, BYE)

    def _end(self, session: Session, now: float, how: End) -> None:
        self.went_offline(session, now)
        self._leave(session)
        self.sessions.end(session, how)

    def _leave(self, session: Session) -> None:
        if self._latest.get(session.address) is session:
            del self._latest[session.address]

    # what waits

    def judge(self, to: str, relay: bool) -> SaveVerdict:
        """Return what to do with messages for ``to``. ``relay``: their sender cannot reach a recipient who is there."""
        if to not in self.mailbox.known:
            return UNKNOWN
        if relay or not self.table.is_online(to):
            return KEEP
        return PROBE_RECIPIENT

    def keep(self, to: str, sender: str, stream: int, parcel: Parcel) -> int:
        """Put as much of ``parcel`` into the mailbox of ``to`` as fits; return how many numbers that is."""
        known = self.mailbox.known[to]
        fitting = parcel.fitting(self.mailbox_limit - known.messages, MAILBOX_SIZE - known.size)
        if fitting:
            part = parcel if fitting == len(parcel.texts) else parcel.part(0, fitting)
            self.mailbox.keep(known, sender, stream, part)
        return fitting

    def key_of(self, nick: str) -> bytes:
        """Return the key that owns a nick, b"" if none does."""
        known = self.mailbox.known.get(nick)
        return known.key or b"" if known is not None else b""

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
        """Return a client's mail from ``number`` of its session on, see ``Mailbox.fetch``; and if any is damaged."""
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

    def note_time(self, now: float, wall: float) -> None:
        """Note that those who are live are there now, at that wall-clock time: repeated, so that the store knows it."""
        self.mailbox.note_clock(now, wall)
        for session in self.sessions.live_sessions():
            if not session.is_visit:
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


# --- writing the store ----------------------------------------------------------------------------------------

DELETION_GAP = 0.2        # s in which what was acked may stay in the store: a commit for each ack would be slow
STORE_RECOVERY_TIME = 1.0  # s without a failure after which the store counts as good again


class Committer:
    """When the store is written, and whether it can be.

    What must be on the disk before a client hears of it is written at the end of its turn, in one transaction.
    Mail that was acked need not be deleted at once: after a crash it is sent once more, and a client that still runs
    does not show it twice. The log names the first commit that fails, and the first that succeeds a while after the
    last failure; not each of them.
    """

    def __init__(self, loop: Loop, mailbox: Mailbox) -> None:
        self.failures = 0
        self.loop = loop
        self.mailbox = mailbox
        self._failed = NEVER        # when a commit failed last; ``NEVER``: the store counts as good
        self._deletion_timer = RestartableTimer(loop, self._delete_acked)

    def commit(self) -> bool:
        """Write what must be on the disk before a client hears of it; return whether that went well."""
        if self.mailbox.urgent:
            return self.commit_all()
        if self.mailbox.pending and not self._deletion_timer.is_set:
            self._deletion_timer.set(self.loop.now() + DELETION_GAP)
        return True

    def commit_all(self) -> bool:
        """Write everything that has changed; return whether that went well."""
        now = self.loop.now()
        committed = self.mailbox.commit(now)
        if not committed:
            self.failures += 1
            if self._failed == NEVER:
                log.error("the store cannot be written (%s): no mail is kept, no owner of a new nick is remembered",
                          self.mailbox.failure)
            self._failed = now
        elif now >= self._failed + STORE_RECOVERY_TIME:
            log.warning("the store can be written again")
            self._failed = NEVER
        return committed

    def close(self) -> bool:
        """Write everything and close the store; return whether that went well, and log it if not."""
        self.mailbox.tidy()     # so that there is something to write, which shows whether the store is still there
        self._failed = NEVER
        committed = self.commit_all()
        self.mailbox.close()
        return committed

    def _delete_acked(self) -> None:
        self.commit_all()
