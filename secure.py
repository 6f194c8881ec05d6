"""Between a client and its server: the handshake, and the link that it makes, which lasts until the client leaves.

Rules of this file
------------------
- No socket, no clock, no randomness of its own: they come through the loop, or as arguments.
- A client and a server that differ in what is made here do not understand each other: see docs/protocol.md.

How it works
------------
::

    client                                  server
      reg                             -->
                                      <--   cookie: only who receives at that address can repeat it
      reg with the cookie, and with   -->   the address is proved, and so is the nick
      a token, made for this server
                                      <--   welcome: a session, which every further request names

    Handshake    the request to register, up to the proofs
    Patience     for how long a refusal is waited out
    ServerLink   registering, keepalive, outage and return, deregistering: one state
    Cookies      the server's side of the proof of an address
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from loop import NEVER, Endpoint, Loop, Request, RestartableTimer, jittered, log, new_id, show_address
from protocol import (REG_SIZE, SERVER_ATTEMPTS, SERVER_INTERVAL, SESSION_BYTES, SESSION_SIZE, Address, Info, encode,
                      is_private, padded)

Send = Callable[[bytes, Address], None]     # sends a datagram


# --- the handshake --------------------------------------------------------------------------------------------

COOKIES_PER_ATTEMPT = 3   # cookies accepted for one attempt to register
NO_REQUEST = -1           # an id that no request has


class Handshake:
    """A request to register. It goes to all addresses of the server, until the first cookie decides on one of them.

    Only that one gets the proof of the nick. Answers count from any address: only who was asked knows ``id``.
    """

    def __init__(self, send: Send, proof: Callable[[bytes, str], bytes] | None,
                 own_address: Callable[[Address], Address | None] = lambda server: None) -> None:
        """``proof``: returns the token for (server id, nick); None: the nick will be nobody's.

        ``own_address``: returns from which address this machine sends to a server; None: it is not known.
        """
        self.id = NO_REQUEST
        self.own: Address | None = None         # our address, if it is one of a private network
        self._own_address = own_address
        self.has_cookie = False
        self._send, self._proof, self._nick = send, proof, ""
        self._cookie = (("", 0), b"", b"")      # from where, the id of the server, and the cookie itself
        self._cookies_left = 0

    def begin(self, id_: int, nick: str) -> None:
        """Make a new request, for ``nick``; ``id_`` is a new random number."""
        self.id, self.has_cookie, self._nick = id_, False, nick

    def ask(self, addresses: Sequence[Address], cookies_left: int = COOKIES_PER_ATTEMPT) -> None:
        """Send the request: to ``addresses``, or to where the cookie came from."""
        info: Info = {"id": self.id, "nick": self._nick}
        self._cookies_left = cookies_left
        if self.has_cookie:
            address, server, info["cookie"] = self._cookie
            addresses, info["knocks"] = (address,), True
            own = self._own_address(address)
            self.own = own if own is not None and is_private(own[0]) else None
            if self.own is not None:
                info["own"] = self.own
            if self._proof is not None:
                info["token"] = self._proof(server, self._nick)
        for address in addresses:
            self._send(padded("reg", info, REG_SIZE), address)

    def on_cookie(self, info: Info, address: Address) -> None:
        """Prove our address."""
        if info["id"] == self.id and self._cookies_left and not (self.has_cookie and address != self._cookie[0]):
            self.has_cookie, self._cookie = True, (address, info["server"], info["cookie"])
            self.ask((), self._cookies_left - 1)


REFUSAL_INTERVALS = {"taken": 0.5, "full": 2.0}     # s between attempts, after refusals that may pass


class Patience:
    """For how long a registration that was refused is asked for again.

    ``is_endless``: until its owner calls ``end``. Otherwise ``limit`` says how long a nick of ours that is in use is
    waited for, in s since the first refusal.
    """

    def __init__(self, is_endless: bool = False, limit: float = 0.0) -> None:
        self.is_endless, self.limit = is_endless, limit
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
        return wait


# --- the link -------------------------------------------------------------------------------------------------

PING_INTERVAL = 15.0            # s between pings
OUTAGE_PING_INTERVAL = 2.0      # s between pings, and questions for the table, while the server is silent
HASTY_INTERVAL = 0.1            # s between attempts to deregister when there is no time left
PONG_INTERVAL = 1.0             # s; unasked pongs, which anybody can forge, cause one ping in that time
PINGS_REMEMBERED = 4 * SERVER_ATTEMPTS


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


class LinkOwner(Protocol):
    """What a ``ServerLink`` reports to its owner."""

    def on_registered(self, session: bytes, boot: int, version: int) -> None: ...   # version: of the server's table
    def on_session_lost(self) -> None: ...                  # the server does not know it; a new one is asked for
    def on_server_silent(self, is_news: bool) -> None: ...
    def on_server_back(self, is_same: bool) -> None: ...    # is_same: it still knows the session
    # the answer to a ping sent at ``asked``: the version of the server's table, the number of the last mail
    def on_pong(self, asked: float, version: int, mail: int) -> None: ...
    def on_refused(self, reason: str, spelling: str) -> None: ...   # spelling: in which the nick is registered
    def on_unanswered(self) -> None: ...                    # no answer to a start or to a dereg: the client ends
    def on_left(self) -> None: ...


class ServerLink:
    """What lies between a client and its server: handshake, keepalive, outage and return, deregistering.

    States, and what leads from one to another::

        OFFLINE ──start──> REGISTERING ──welcome──> SYNCING ──the table shows us online──> ONLINE
           ^                    │                      │                                   │  ^
           │<──refused, silent──┘                      │         called offline, or session│  │the table shows
           │                                           │         unknown: server restarted v  │us online again
           │                                           │                                 RETURNING
           │                                           └──────────> LEAVING <──────────────┘ (also from ONLINE)
           └───────────────────bye, or session unknown─────────────────┘

    - OFFLINE: nothing is sent or accepted. REGISTERING: only ``reg`` is sent, for a cookie, then for a session. As long
      as ``Patience`` lasts, it begins again after a refusal that may pass; silence is waited out by an endless one.
    - SYNCING: there is a session; the table comes, then the mail that waited. No command is carried out before the
      table shows us online, so that a script never races its own start. Silence ends a client here that is not patient.
    - ONLINE: everything works. A ping every 15 s keeps the session and the NAT's mapping alive.
    - RETURNING: the server has called us offline, or has restarted and does not know the session. A new one is asked
      for as long as it takes; the user's commands and the chat with peers go on meanwhile.
    - LEAVING: ``dereg`` is sent until ``bye`` comes. In every state, ``close`` leads to OFFLINE at once.

    An outage (``is_silent``) is no state: it may begin and pass in all but OFFLINE.

    The server may move, or answer from another address than was asked (see ``Endpoint``). While it is silent, ``reg``,
    which holds no secret, goes to all its addresses; what holds the session goes only where it was found.
    """

    def __init__(self, loop: Loop, send: Send, nick: str, endpoint: Endpoint, owner: LinkOwner,
                 table_version: Callable[[], int], proof: Callable[[bytes, str], bytes] | None,
                 patience: Patience, own_address: Callable[[Address], Address | None]) -> None:
        """``table_version``: returns up to which version the server's table is here.

        ``proof``: returns the token for (server id, nick), which shows that the nick is ours; None: anonymous.
        ``own_address``: see ``Handshake``.
        """
        self.state = LINK_OFFLINE
        self.is_silent = False                  # the server does not answer
        self.was_heard = False                  # it has spoken in this turn
        self.session: bytes | None = None
        self.nick = nick                        # under which we register, or are registered
        self.endpoint = endpoint                # where it is
        self.handshake = Handshake(send, proof, own_address)
        self._loop, self._send, self._owner = loop, send, owner
        self._table_version, self.patience = table_version, patience
        self._boot = 0
        self._pings: OrderedDict[int, float] = OrderedDict()      # id -> when it was sent
        self._last_pong = -NEVER                # when an unasked one caused a ping
        self._registration = Request(loop, self._ask, self._reg_unanswered, SERVER_ATTEMPTS, SERVER_INTERVAL)
        self._deregistration = Request(loop, self._send_dereg, owner.on_unanswered, SERVER_ATTEMPTS, SERVER_INTERVAL)
        self._ping_request = Request(loop, self._ping_and_ask, self._ping_unanswered, SERVER_ATTEMPTS, SERVER_INTERVAL)
        self._ping_timer = RestartableTimer(loop, self._ping_request.start)

    def _go(self, state: LinkState) -> None:
        """Change the state: the only place where that happens."""
        if state is not self.state:
            assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
            self.state = state

    @property
    def is_starting(self) -> bool:
        """Whether the client was not online yet since it was started, or told to come online."""
        return self.state in (LINK_REGISTERING, LINK_SYNCING)

    @property
    def has_joined(self) -> bool:
        """Whether others may know us: there is a session, or a new one is asked for after an earlier one."""
        return self.state in REGISTERED_STATES

    # registering

    def start(self) -> None:
        """Come online."""
        self._go(LINK_REGISTERING)
        self._register()

    def _register(self, wait: float = 0.0) -> None:
        self.handshake.begin(new_id(self._loop), self.nick)
        self._registration.start(wait)

    def _ask(self) -> None:
        self.handshake.ask(self.endpoint.to_ask(self._registration.attempts, self.is_silent))

    def _stop_registering(self) -> None:
        self._registration.stop()
        self.handshake.id = NO_REQUEST

    def on_welcome(self, info: Info, address: Address) -> None:
        """Begin a session."""
        if info["id"] != self.handshake.id or info["nick"] != self.nick:
            return
        self._stop_registering()
        self.endpoint.found(address)
        self.patience.renew()
        self.heard(is_same=False)
        self.session = info["session"]
        self._pings.clear()         # a late answer to one of an earlier session says nothing of this one
        self._boot = info["boot"]
        self._go(LINK_SYNCING if self.is_starting else LINK_RETURNING)
        self._plan_ping()
        self._owner.on_registered(info["session"], info["boot"], info["version"])

    def _reg_unanswered(self) -> None:
        """End a client that starts, unless it is patient; one that was online tries again."""
        if self.is_starting and not self.patience.is_endless:
            self._owner.on_unanswered()
        else:
            self.patience.reason = None
            self.announce_silence()
            self._register()

    def on_refused(self, info: Info, address: Address) -> None:
        """React to a refusal of our registration, or of our session."""
        is_ours = info.get("id") == self.handshake.id
        if "session" in info:
            is_ours = info["session"] == self.session and not self._registration.is_running
        if not is_ours or self.state is LINK_OFFLINE:
            return
        reason, may_go_on = info["reason"], not ("session" in info or self._registration.is_running)
        self._stop_registering()
        if reason == "replaced":    # by somebody else, or by a late copy of our own request: we shall see
            self._session_is_gone()
            return
        if reason != self.patience.reason:
            log.info("the server at %s refuses %s: %s", show_address(address), self.nick, reason)
        if may_go_on:       # our session may live, and be what holds the nick: the next round asks again
            return
        wait = self.patience.wait_after(self._loop.now(), reason, self.is_starting, jittered(self._loop, 1.0))
        if wait:
            self._register(wait)
        else:
            self._owner.on_refused(reason, info.get("spelling", self.nick))

    def lose_patience(self) -> None:
        """End over the silence or the refusal that is waited out, if there is one."""
        self.patience.end()
        if self.is_starting or self.has_joined:
            if self.patience.reason is not None:
                self._owner.on_refused(self.patience.reason, self.nick)
            elif self.is_silent:
                self._owner.on_unanswered()

    def on_own_state(self, is_online: bool) -> None:
        """Note whether the table shows us online."""
        if is_online and self.has_joined and not self._registration.is_running:
            self._go(LINK_ONLINE)
        elif not is_online and self.state is LINK_ONLINE:
            self._go(LINK_RETURNING)

    # keepalive

    def heard(self, is_same: bool = True) -> None:
        """Note a sign of life of the server; ``is_same``: it still knows this session."""
        self.was_heard = True
        if self.is_silent:
            self.is_silent = False
            if not self._registration.is_running and not self.handshake.has_cookie:
                self.handshake.id = NO_REQUEST      # the session goes on
            self._plan_ping()
            self._owner.on_server_back(is_same)

    def announce_silence(self, always: bool = False) -> None:
        """Announce an outage, once; ``always``: again, because the client ends over it."""
        is_news = not self.is_silent
        self.is_silent = True
        if is_news or always:
            self._owner.on_server_silent(is_news)
        if is_news and self.session is not None:
            self._ping_timer.set(self._loop.now() + jittered(self._loop, OUTAGE_PING_INTERVAL))

    def _plan_ping(self) -> None:
        self._ping_request.stop()
        self._ping_timer.set(self._loop.now() + jittered(self._loop, PING_INTERVAL))

    def ping_until_answered(self) -> None:
        """Ping until an answer comes, from now on."""
        if not self._ping_request.is_running:
            self._ping_request.start()

    def _ping_and_ask(self) -> None:
        self.send_ping()
        if self.is_silent and self._ping_request.is_running and not self._registration.is_running:
            if self._ping_request.attempts == 1 or self.handshake.id == NO_REQUEST:
                self.handshake.begin(new_id(self._loop), self.nick)
            self.handshake.ask(self.endpoint.to_ask(self._ping_request.attempts, is_lost=True))

    def send_ping(self) -> None:
        """Send one ping, if there is a session: its answer says how much mail there is."""
        if self.session is None or not (self.has_joined or self.state is LINK_LEAVING):
            self._ping_request.stop()
            return
        for address in self.endpoint.last_two() if self.is_silent else (self.endpoint.current,):
            info: Info = {"id": new_id(self._loop), "session": self.session, "version": self._table_version()}
            self._pings[info["id"]] = self._loop.now()
            if len(self._pings) > PINGS_REMEMBERED:
                self._pings.popitem(last=False)
            self._send(padded("ping", info, SESSION_SIZE), address)

    def sync(self, version: int) -> bool:
        """Ask for the changes of the table behind ``version``; return False if there is no session for that."""
        if not self.has_joined or self.session is None:
            return False
        self._send(padded("sync", {"session": self.session, "version": version}, SESSION_SIZE), self.endpoint.current)
        return True

    def _ping_unanswered(self) -> None:
        if self.is_starting and not self.patience.is_endless:
            self._owner.on_unanswered()
            return
        self.announce_silence()
        self._ping_timer.set(self._loop.now() + jittered(self._loop, OUTAGE_PING_INTERVAL))

    def on_pong(self, info: Info, address: Address) -> None:
        """Accept the answer to a ping; one that was not asked for is only a reason to ask."""
        if not self.has_joined and self.state is not LINK_LEAVING:
            return
        asked = self._pings.pop(info["id"], None)
        if asked is None:
            if address in self.endpoint.last_two():
                self._ping_soon()
            return
        self.endpoint.found(address)
        is_same = info["boot"] == self._boot
        self.heard(is_same)
        if not is_same:
            self._session_is_gone()
            return
        self._plan_ping()
        self._owner.on_pong(asked, info["version"], info["mail"])

    def _ping_soon(self) -> None:
        """Ping if an unasked pong hints that the server has restarted: anybody can forge that hint."""
        now = self._loop.now()
        if self.state is LINK_LEAVING:
            if self._deregistration.is_running and now - self._last_pong > SERVER_INTERVAL / 2:
                self._last_pong = now
                self.send_ping()
        elif not self._ping_request.is_running and now - self._last_pong > PONG_INTERVAL:
            self._last_pong = now
            self._ping_timer.set(now + self._loop.random.uniform(0, 1))     # not all clients in the same instant

    def _session_is_gone(self) -> None:
        """Register again, or be offline if we are leaving anyway."""
        self._ping_request.stop()
        self._ping_timer.cancel()
        if self.state is LINK_LEAVING:
            self._owner.on_left()
            self.close()
            return
        self._owner.on_session_lost()
        if self.state is LINK_ONLINE:
            self._go(LINK_RETURNING)
        if not self._registration.is_running:
            log.info("the server does not know this session any more: registering again")
            self._register()

    def on_probe(self, info: Info, is_trusted: bool) -> None:
        """Answer the question whether we are here; ``is_trusted``: it has proved to come from the server."""
        if info["to"] == self.nick and self.session is not None and (self.has_joined or self.state is LINK_LEAVING):
            answer: Info = {"id": info["id"], "nick": self.nick}
            if is_trusted:
                answer["session"] = self.session
            self._send(encode("alive", answer), self.endpoint.current)

    def leave(self, is_hasty: bool = False) -> None:
        """Deregister; ``is_hasty``: there is little time."""
        self.stop_asking()
        self._go(LINK_LEAVING)
        if is_hasty:
            self._deregistration.interval = HASTY_INTERVAL
        self._deregistration.start()

    def _send_dereg(self) -> None:
        if self.session is not None:
            self._send(padded("dereg", {"session": self.session}, SESSION_SIZE), self.endpoint.current)

    def on_bye(self, info: Info, address: Address) -> None:
        """Accept the answer to a deregistration."""
        if self.state is LINK_LEAVING and info["session"] == self.session:
            self._owner.on_left()
            self.close()

    def stop_asking(self) -> None:
        """Neither register nor ping any more."""
        self._ping_timer.cancel()
        self._stop_registering()
        self._ping_request.stop()

    def close(self) -> None:
        """Be offline, whatever was going on."""
        self.stop_asking()
        self._deregistration.stop()
        self.is_silent = False
        self.session = None
        self._go(LINK_OFFLINE)


# --- the server's side ----------------------------------------------------------------------------------------

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
        import hmac     # here: only registrations need it, and a start is measured
        text = f"{address} {int(now / COOKIE_TIME) - age}"
        return hmac.digest(self.secret, text.encode(), "sha256")[:SESSION_BYTES]

    def accepts(self, cookie: bytes | None, now: float, address: Address) -> bool:
        """Return whether ``cookie`` was made for ``address``, and not too long ago."""
        import hmac
        return cookie is not None and any(hmac.compare_digest(cookie, self.make(now, address, age)) for age in (0, 1))


CALLS_PER_SECOND = 20     # to one client, at most


class CallLimit:
    """How many calls go to one client: somebody who asks for many must not make it do more than anybody else can."""

    def __init__(self) -> None:
        self._second = 0                        # the one that is counted, and ...
        self._calls: dict[bytes, int] = {}      # ... the calls in it, by session

    def allows(self, now: float, session: bytes) -> bool:
        """Count a call, and return whether it may be sent."""
        if int(now) != self._second:
            self._second, self._calls = int(now), {}
        self._calls[session] = self._calls.get(session, 0) + 1
        return self._calls[session] <= CALLS_PER_SECOND
