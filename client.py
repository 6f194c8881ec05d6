"""The client: one user, online at one server, who chats with others.

Rules of this file
------------------
- Nothing impure but what it is handed (loop, sending, display) and the log: the tests run it in a simulated world.
- A part is handed what it needs, and reports to its owner, the ``Client``, what others must hear of.
- Nothing from the network is believed without a reason: see ``Dispatcher``.

The parts
---------
::

    ServerLink    registering, keepalive, outage and return, deregistering: one state
    Sending       messages out: the outbox, and when to poll it
    Receiving     messages in: the inbox, what is shown, acks
    PeerLinks     what comes straight from other clients, and may be believed
    Dispatcher    which datagrams count, and who takes what is in them
    Leaving       the order in which things end: sends, then what is to be written, then the registration

Others are elsewhere: ``TableSync`` in ``registry`` (the copy of the server's table); in ``terminal`` ``Shell`` (the
command language), ``Receipts`` (what became of each message), ``Display``; ``Meetings`` in ``conversation``.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum

from conversation import ACK_TIMEOUT, DIRECT, SILENT, Delivery, Inbox, Meetings, Observer, Outbox, Selection
from home import REGISTRATION_REFUSALS
from loop import Endpoint, Loop, Request, RestartableTimer, jittered, log, new_id, show_address, wake_up
from protocol import (NEVER, ONLINE, PROOF_BYTES, RECORD_MARK, SEALED, SERVER_ATTEMPTS, SERVER_INTERVAL, SESSION_SIZE,
                      Address, Decoder, Info, Map, encode, folded, index_of, opened_plain, padded)
from registry import (COMMAND_STATES, LINK_LEAVING, LINK_OFFLINE, LINK_ONLINE, LINK_REGISTERING, LINK_RETURNING,
                      LINK_SYNCING, REGISTERED_STATES, SYNC_INTERVAL, TRANSITIONS, LinkState, Patience, TableSync)
from secure import NO_REQUEST, Channel, Connection, Handshake, Peers, SealedMail, Send
from stream import Account
from terminal import ClientRow, Display, Presence, Receipts, SendCommand, Shell

# --- the link to the server -----------------------------------------------------------------------------------

PING_INTERVAL = 15.0            # s between pings
OUTAGE_PING_INTERVAL = 2.0      # s between pings, and questions for the table, while the server is silent
HASTY_INTERVAL = 0.1            # s between attempts to deregister when there is little time ...
LAST_INTERVAL = 0.04            # ... and when it is over: then what was not delivered is still to be written
PONG_INTERVAL = 1.0             # s; unasked pongs, which anybody can forge, cause one ping in that time
PINGS_REMEMBERED = 4 * SERVER_ATTEMPTS


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

    - OFFLINE: nothing is sent or accepted. REGISTERING: ``reg`` is sent for a cookie, then it, or ``hello``, for a
      session. As long as ``Patience`` lasts, it begins again after a refusal that may pass; silence is waited out by an
      endless one.
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

    def __init__(self, loop: Loop, send: Send, nick: str, endpoint: Endpoint, owner: Client,
                 table_version: Callable[[], int], handshake: Handshake, patience: Patience) -> None:
        """``table_version``: returns up to which version the server's table is here."""
        self.state = LINK_OFFLINE
        self.is_silent = False                  # the server does not answer
        self.was_heard = False                  # it has spoken in this turn
        self.is_early = False                   # be online before the mail that waits is acked
        self.session: bytes | None = None
        self.is_visit = handshake.is_visit
        self.nick = nick                        # under which we register, or are registered
        self.endpoint = endpoint                # where it is
        self.handshake, handshake.on_welcome, handshake.on_refused = handshake, self.on_welcome, self.on_refused
        self.connection = Connection(send, endpoint, handshake)
        self._has_hint = False                  # somebody says that the server does not know our channel
        self._loop, self._send, self._owner = loop, send, owner
        self._table_version, self.patience, self._boot = table_version, patience, 0
        self._pings: OrderedDict[int, tuple[float, int]] = OrderedDict()    # id -> when it was sent, and our version
        self._due_version = 0                   # of the table: before we have told that we hold it, there is no mail
        self._last_pong = -NEVER                # when an unasked one caused a ping
        self._registration = Request(loop, self._ask, self._reg_unanswered, SERVER_ATTEMPTS, SERVER_INTERVAL)
        self._begun = -NEVER        # when we have begun to register, last
        handshake.on_found = self._registration.renew
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
        self._begun = self._loop.now() + wait
        self.handshake.begin(new_id(self._loop), self.nick)
        self._registration.start(wait)

    def _ask(self) -> None:
        self.handshake.ask(self.endpoint.to_ask(self._registration.attempts, self.is_silent))

    def _stop_registering(self) -> None:
        self._registration.stop()
        self.handshake.id = NO_REQUEST

    def on_welcome(self, info: Info, address: Address, channel: Channel | None = None) -> None:
        """Begin a session."""
        if info["id"] != self.handshake.id or info["nick"] != self.nick:
            return
        self._stop_registering()
        self.connection.channel, self._has_hint = channel, False
        self.endpoint.found(address)
        self.patience.renew()
        self.heard(is_same=False)
        self.session = info["session"]
        self._pings.clear()         # a late answer to one of an earlier session says nothing of this one
        self._boot, self._due_version = info["boot"], info["version"]
        self._go(LINK_SYNCING if self.is_starting else LINK_RETURNING)
        self._plan_ping()
        self._owner.on_registered(info["session"], info["boot"], info["version"])

    def _reg_unanswered(self) -> None:
        """End a client that starts, unless it is patient; one that was online tries again."""
        if self.handshake.doubt is not None:    # only now: whoever forges one cookie cannot end a program
            self._owner.on_refused(self.handshake.doubt, self.nick)
        elif self.is_starting and not self.patience.is_endless:
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
        if reason == "replaced" or (self.state is LINK_LEAVING and "session" in info):
            self._session_is_gone()     # replaced by somebody else, or by a late copy of our own request: we shall see
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
        self.was_heard, self._has_hint, self.handshake.doubt = True, False, None
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
        attempts, is_running = self._ping_request.attempts, self._ping_request.is_running
        is_lost = self.has_joined and (self.is_silent or (self._has_hint and attempts > 1))     # who leaves is not
        if is_lost and is_running and not self._registration.is_running:
            if attempts == 1 or self.handshake.id == NO_REQUEST:
                self.handshake.begin(new_id(self._loop), self.nick)
                if self._has_hint:
                    log.info("the server does not know this session any more, as it seems: registering again")
            self.handshake.ask(self.endpoint.to_ask(attempts, self.is_silent))

    def send_ping(self) -> None:
        """Send one ping, if there is a session: its answer says how much mail there is."""
        if self.session is None or not (self.has_joined or self.state is LINK_LEAVING):
            self._ping_request.stop()
            return
        for address in self.endpoint.last_two() if self.is_silent else (self.endpoint.current,):
            info: Info = {"id": new_id(self._loop), "session": self.session, "version": self._table_version()}
            self._pings[info["id"]] = self._loop.now(), info["version"]
            if len(self._pings) > PINGS_REMEMBERED:
                self._pings.popitem(last=False)
            self.connection.send(padded("ping", info, SESSION_SIZE), address)

    def ask(self, tag: str, about: Info) -> bool:
        """Ask the server a question about the table; return False if there is no session for that."""
        if not self.has_joined or self.session is None:
            return False
        if self.is_early and tag == "sync":
            about = {**about, "early": True}
        self.connection.send(padded(tag, {"session": self.session, **about}, SESSION_SIZE))
        return True

    def _ping_unanswered(self) -> None:
        if self.handshake.doubt is not None:
            self._owner.on_refused(self.handshake.doubt, self.nick)
        elif self.is_starting and not self.patience.is_endless:
            self._owner.on_unanswered()
        else:
            self.announce_silence()
            self._ping_timer.set(self._loop.now() + jittered(self._loop, OUTAGE_PING_INTERVAL))

    def on_pong(self, info: Info, address: Address) -> None:
        """Accept the answer to a ping; one that was not asked for is only a reason to ask."""
        if not self.has_joined and self.state is not LINK_LEAVING:
            return
        ping = self._pings.pop(info["id"], None)
        if ping is None:
            if address in self.endpoint.last_two():
                self._has_hint = self.connection.channel is not None
                self._ping_soon()
            return
        if self.connection.channel is None or self.is_silent:
            # (In a channel, the server is heard from any address, and the one that we have asked is good.)
            self.endpoint.found(address)
        is_same = info["boot"] == self._boot
        self.heard(is_same)
        if not is_same:
            self._session_is_gone()
            return
        self._plan_ping()
        asked, told = ping
        if told < self._due_version <= self._table_version():
            self.ping_until_answered()      # the table has come since then
        self._owner.on_pong(asked, info["version"], info["mail"])

    def _ping_soon(self) -> None:
        """Ping if an unasked pong hints that the server has restarted: anybody can forge that hint."""
        now = self._loop.now()
        if self.state is LINK_LEAVING:
            if self.connection.channel is not None and self._deregistration.attempts > 1:
                self._session_is_gone()     # nobody has answered twice, so it seems to be true
            elif self._deregistration.is_running and now - self._last_pong > SERVER_INTERVAL / 2:
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
            # at once, but not again and again, whatever a server says that is broken, or somebody else's
            self._register(max(0.0, self._begun + SERVER_INTERVAL - self._loop.now()))

    def on_probe(self, info: Info, is_trusted: bool) -> None:
        """Answer the question whether we are here; ``is_trusted``: it has proved to come from the server."""
        if (is_trusted or self.connection.is_plain) and info["to"] == self.nick and self.session is not None and (
                self.has_joined or self.state is LINK_LEAVING):
            answer: Info = {"id": info["id"], "nick": self.nick}
            if is_trusted:
                answer["session"] = self.session
            self.connection.send(encode("alive", answer))

    def leave(self, interval: float = SERVER_INTERVAL) -> None:
        """Deregister; ``interval``: s between attempts."""
        self.stop_asking()
        self._go(LINK_LEAVING)
        self._deregistration.interval = interval
        self._deregistration.start()

    def _send_dereg(self) -> None:
        if self.session is not None:
            self.connection.send(padded("dereg", {"session": self.session}, SESSION_SIZE))

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
        self.session = self.connection.channel = None
        self._go(LINK_OFFLINE)


# --- messages out ---------------------------------------------------------------------------------------------

class Sending:
    """Messages out: queues them, and polls the conversations to which something happened or whose time has come."""

    def __init__(self, loop: Loop, send: Send, link: ServerLink, peers: Peers | None, mail: SealedMail | None,
                 table: TableSync, outbox: Outbox, receipts: Receipts) -> None:
        self.outbox, self._loop, self._send, self._mail = outbox, loop, send, mail
        self._link, self._peers, self._table, self._receipts = link, peers, table, receipts
        self._timer = RestartableTimer(loop, wake_up)     # the end of the turn polls
        if peers is not None:
            receipts.is_secure = lambda nick, number: (
                link.connection.channel is not None and number >= outbox.conversations[nick].exposed)

    def queue(self, command: SendCommand) -> bool:
        """Queue as many of the texts as there is room for, and remove them; return False if none could be queued now.

        Texts for somebody whose messages are stuck fail at once while the queue is full, so that a script goes on.
        """
        outbox, nick, now = self.outbox, command.nick, self._loop.now()
        if nick not in outbox.conversations:
            outbox.open(now, nick, self._table.place_of(nick), new_id(self._loop))
        room = outbox.room(now, nick)
        if room:
            texts = self._receipts.short_enough(command, command.take(room))
            if texts:
                stream, first = outbox.send(now, nick, texts, self._loop.wall())
                self._receipts.track(nick, stream, first, texts, command.ref)
            return True
        if outbox.is_stuck(now, nick):
            self._receipts.hand_back(command)
            command.texts = []
            return True
        return False

    def on_exists(self, info: Info) -> None:
        """Learn from the server that a recipient is there, and where."""
        _, host, port, _ = info["entry"]
        self.outbox.on_exists(self._loop.now(), info, self._table.reach(host, port))

    def settle(self) -> None:
        """Send what is due, and tell what has happened to messages."""
        outbox, link = self.outbox, self._link
        if link.was_heard:
            link.was_heard = False
            outbox.server_heard(self._loop.now())
        if link.state is LINK_OFFLINE or link.state is LINK_REGISTERING:    # no property: see ``Dispatcher.receive``
            return
        now = self._loop.now()
        if outbox.due() <= now:
            self._send_due(now)
        if outbox.with_events:
            self.tell_events()

    def _send_due(self, now: float) -> None:
        """Send what is due now."""
        outbox, link = self.outbox, self._link
        is_sealed = link.connection.channel is not None
        peers, mail = (self._peers, self._mail) if is_sealed else (None, None)
        guard = mail.refusal if mail is not None else None
        for conversation, datagrams in outbox.poll(now, self._loop.drained, guard):
            is_secret = conversation.frames.letters is not None     # what goes to the server
            for datagram, address in datagrams:
                if address is None:
                    link.connection.send(datagram)
                elif peers is None:
                    self._send(datagram, address)
                else:
                    is_retry = conversation.stream.path.backoff > 1.0
                    is_secret = peers.send(conversation.peer, datagram, address, is_retry)
            if datagrams and not is_secret:
                conversation.exposed = conversation.stream.top
            if peers is not None and conversation.route is not DIRECT:
                peers.withdraw(conversation.peer)   # no copy of what goes to the server may wait for a channel
        self._timer.set(outbox.due())

    def tell_events(self) -> None:
        """Tell what has happened to messages since the last time."""
        for nick, events in self.outbox.pop_events():
            for event in events:
                if event.kind is SILENT:
                    self._link.announce_silence()
                    self._receipts.tell_silence(nick)
                else:
                    self._receipts.tell(nick, event)


# --- messages in ----------------------------------------------------------------------------------------------

class Receiving:
    """Messages in: accepts them, shows them in order, and acknowledges what was written.

    While a stream waits for messages that may be in the mail, the server is asked how much mail there is.
    """

    def __init__(self, loop: Loop, send: Send, link: ServerLink, peers: Peers | None, mail: SealedMail | None,
                 inbox: Inbox, display: Display) -> None:
        self.inbox, self._peers, self._mail = inbox, peers, mail
        self.accepts = True                     # messages; not any more once the client is about to leave
        self._loop, self._send, self._link, self._display = loop, send, link, display
        self._is_online = False                 # the table shows us: mail that comes now was not kept, but relayed
        self._is_greeted = False                # "[You have messages]" was shown for this coming online
        self._hold_timer = RestartableTimer(loop, self._look_after_holds)
        self.before_showing: Callable[[], None] = lambda: None      # called in each turn before something is shown

    def start_over(self) -> None:
        """Expect another stream of mail, numbered from 1: a session has begun, or has ended."""
        self.inbox.forget_mail(self._loop.now())
        self._is_online = self._is_greeted = False

    def on_own_state(self, is_online: bool) -> None:
        """Note whether the table shows us online: if it does not, mail that comes is announced again."""
        if self._is_online and not is_online:
            self._is_greeted = False
        self._is_online = is_online

    def stop_asking(self) -> None:
        """Ask nobody about missing messages any more."""
        self._hold_timer.cancel()
        self.inbox.stop_asking()

    def on_chat(self, info: Info, address: Address) -> None:
        """Accept texts of a peer who is known to be at ``address``."""
        waits = self.inbox.on_chat(self._loop.now(), info, address, self.accepts)
        if self.inbox.holding:
            self._ask_about_mail(waits)

    def on_mail(self, info: Info) -> None:
        """Accept mail from the server."""
        if self.accepts:
            mail = self._mail if self._link.connection.channel is not None else None
            if mail is not None and mail.waits_for_keys(info):
                return      # it is not acked, so it comes again
            self.inbox.on_mail(self._loop.now(), info, mail.opened if mail is not None else opened_plain)

    def _ask_about_mail(self, at_once: bool = False) -> None:
        """Ask every 500 ms, while a stream is held, how much mail there is: what is missing may be in it.

        ``at_once``: also now, because another one is held.
        """
        is_time = not self._hold_timer.is_set and self._link.has_joined
        if is_time:
            self._hold_timer.set(self._loop.now() + jittered(self._loop, SERVER_INTERVAL))
        if (is_time or at_once) and self.inbox.is_asking:
            self._link.send_ping()

    def _look_after_holds(self) -> None:
        if self._loop.drained:
            self.inbox.expire(self._loop.now())
        if self.inbox.holding:
            self._ask_about_mail()

    @property
    def has_enough(self) -> bool:
        """Whether all is shown that was wanted: the client ends, and nothing more is accepted."""
        return self.inbox.selection is not None and not self.inbox.selection.left

    def show(self) -> bool:
        """Hand to the display what is ready, as long as it has room; return whether something is left."""
        display = self._display
        self.before_showing()
        for delivery in self.inbox.take(self._loop.now(), display.output.has_room):
            via = "direct"
            if delivery.times:
                via = "relay" if self._is_online else "mail"
                self._greet()
            if delivery.texts:
                is_secure = self._is_secure(delivery) if display.formatter.is_for_programs else None
                display.show_messages(delivery, via, delivery.written, is_secure)
            else:
                display.write(b"", delivery.written)    # nothing to show: called once all before it is written
        self.accepts = self.accepts and not self.has_enough
        if self.inbox.holding:
            self._ask_about_mail()
        return self.inbox.is_ready

    def _is_secure(self, delivery: Delivery) -> bool | None:
        """Return whether only its sender and we can read what came; None: nothing can be encrypted here."""
        if self._peers is None:
            return None
        if delivery.times:
            return delivery.proof == SEALED
        return self._link.connection.channel is not None and self._peers.can_decrypt(delivery.sender)

    def _greet(self) -> None:
        """Announce the mail that comes first after coming online."""
        if not self._is_greeted and not self._is_online:
            self._display.tell("mail")
        self._is_greeted = True

    def acknowledge(self) -> None:
        """Ack every stream that brought something, or of which something was written."""
        acks = self.inbox.acks()       # in every state: an ack that may not be sent now is dropped
        if self._link.state is not LINK_OFFLINE and self._link.state is not LINK_REGISTERING:
            peers = self._peers if self._link.connection.channel is not None else None
            for info, address, nick in acks:
                if address is None:
                    self._link.connection.send(encode("ack", info))
                elif peers is None:
                    self._send(encode("ack", info), address)
                else:
                    peers.answer(nick, encode("ack", info), address)


# --- other clients --------------------------------------------------------------------------------------------

MAX_NEWCOMERS = 16        # datagrams of those whom the table does not show yet
NEWCOMER_TIME = 0.5       # s until these are forgotten


class PeerLinks:
    """What comes straight from other clients, as far as it can be trusted.

    What comes in a channel is said by the one with whom we have it. In plain, chat counts if the table says that its
    sender is there, and an ack if the stream in it, a random number, went there (see ``Outbox``). But while our own
    session is encrypted, nothing in plain counts from those whom the table gives a key.
    """

    def __init__(self, loop: Loop, send: Send, link: ServerLink, peers: Peers | None, table: TableSync,
                 outbox: Outbox, receiving: Receiving, display: Display) -> None:
        self._newcomers: list[tuple[float, str, Info, Address]] = []     # until when, tag, fields, and from where
        self.allowance = 0                      # bytes of not-me that may still answer the datagram at hand
        self.meetings = Meetings(send, outbox, table, lambda: link.handshake.own, link.endpoint.last_two, loop.now)
        self._loop, self._send, self._link, self._peers, self._table = loop, send, link, peers, table
        self._outbox, self._receiving, self._display = outbox, receiving, display
        if peers is not None:
            peers.shown_of, peers.home_of, peers.is_at = table.key_of, table.home_of, self._is_at
            peers.on_plain, peers.is_known = self._on_plain, lambda nick: nick in table.table.entries
            peers.waits_for_key = table.waits_for_key

    def on_news(self, nicks: Sequence[str]) -> None:
        """Forget where these were: the table has changed. What came from where nobody was may count now."""
        for nick in nicks:
            self.meetings.forget(nick)
            if self._peers is not None:
                self._peers.on_news(nick)
        recent = [one for one in self._newcomers if self._loop.now() < one[0]]
        self._newcomers = []
        for until, tag, info, address in recent:
            if tag == "chat" and self._is_at(info["from"], address):
                self.on_chat(info, address)
            elif tag == "offer" and self._table.holds(address):
                self.on_offer(info, address)
            else:
                self._newcomers.append((until, tag, info, address))

    def _keep_for_table(self, tag: str, info: Info, address: Address) -> None:
        """Look at it again soon: it is from a newcomer, a client that has moved, or somebody who poses as another.

        Its sender would repeat it, but only after a while.
        """
        self._table.ask_soon()
        now = self._loop.now()
        if self._newcomers and now >= self._newcomers[0][0]:
            del self._newcomers[0]
        if len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers.append((now + NEWCOMER_TIME, tag, info, address))

    def _is_at(self, nick: str, address: Address) -> bool:
        return self._table.is_at(nick, address) or self.meetings.admits(nick, address)

    def _takes_plain(self, nick: str) -> bool:
        return self._peers is None or self._link.connection.channel is None or self._peers.takes_plain(nick)

    # keys and channels

    def _on_plain(self, nick: str) -> None:
        """Tell that what goes to somebody is not encrypted."""
        if self._link.handshake.tells_of_plain:
            self._link.handshake.tells_of_plain = self._display.names_messages     # a script without them hears it once
            self._display.tell("peer-insecure", to=nick)

    def on_offer(self, info: Info, address: Address) -> None:
        """Agree to a channel with somebody of the table."""
        is_known = self._table.holds(address) or self.meetings.holds(address)
        if self._peers is not None and self._link.connection.channel is not None:
            if not is_known:
                self._keep_for_table("offer", info, address)
            elif not self._peers.on_offer(info, address):
                self._table.ask_soon()

    def on_sealed(self, nick: str, maps: Sequence[Map], address: Address) -> None:
        """Accept what somebody says in a channel."""
        for tag, info in maps:
            if tag == "chat" and (info["from"], info["to"]) == (nick, self._outbox.me):
                if self._is_at(nick, address):
                    self.meetings.note_chat(nick, address)
                self._receiving.on_chat(info, address)
            elif tag == "ack":
                self._outbox.on_ack(self._loop.now(), info, nick)

    # what is in plain

    def on_ack(self, info: Info, address: Address) -> None:
        """Accept what a peer has received."""
        if self._link.connection.channel is None or self._may_answer(info):
            self._outbox.on_ack(self._loop.now(), info, address)

    def on_nack(self, info: Info, address: Address) -> None:
        """Accept that somebody else is at an address now."""
        if info["reason"] == "not-me" and self._may_answer(info):
            self._outbox.on_nack(self._loop.now(), info, address)

    def _may_answer(self, info: Info) -> bool:
        conversation = self._outbox.by_stream.get(info["stream"])
        return conversation is not None and self._takes_plain(conversation.peer)

    def on_chat(self, info: Info, address: Address) -> None:
        """Accept messages, if they are for us, and their sender is where they come from."""
        sender = info["from"]
        if info["to"] != self._outbox.me:   # who was at this address before
            self._refuse(info, address)
        elif not self._is_at(sender, address):
            self._keep_for_table("chat", info, address)
        elif self._takes_plain(sender):
            self.meetings.note_chat(sender, address)
            self._receiving.on_chat(info, address)

    def _refuse(self, info: Info, address: Address) -> None:
        nack = encode("nack", {"stream": info["stream"], "first": info["n"], "reason": "not-me",
                               "last": info["n"] + len(info["text"]) - 1})
        if len(nack) <= self.allowance:     # an answer is never larger than its question
            self.allowance -= len(nack)
            self._send(nack, address)


# --- leaving --------------------------------------------------------------------------------------------------

END_TIME = 1.5            # s after Ctrl-C until what is not closed counts as not delivered
LAST_TIME = 1.9           # s after Ctrl-C until the program ends, whatever is not written yet: two are promised


class Reason(Enum):
    """Why a client leaves."""

    DEREG = "dereg"                     # only goes offline; all others end the program
    QUIT = "quit"
    END_OF_INPUT = "end of stdin"
    SIGNAL = "signal"
    READER_GONE = "nobody reads stdout, or it cannot be written"
    ENOUGH = "what was waited for has come, or cannot come"


TIME_IS_OVER = 3                        # exit code: what a ``Selection`` waits for has not come in time


class Leaving:
    """The order in which a client goes offline (``dereg``) or ends (``quit``, end of stdin, a signal, no reader)::

        how it is seen          what happens                            until
        command or ending       no further command is carried out       every send is closed or stuck, or the deadline
        not receiving.accepts   messages are not accepted any more      stdout has everything, or the deadline
        link.state is LEAVING   the server is told                      ``bye``, or no answer
        is_over                 what was not delivered is reported      stdout and stderr have everything
        exit_code               the program ends

    After ``dereg`` the client is offline behind the third step, and goes on. A signal, or a reader that is gone, sets a
    deadline of 1.5 s. ``_end_now`` ends any stage at once.
    """

    def __init__(self, loop: Loop, link: ServerLink, table: TableSync, sending: Sending, receipts: Receipts,
                 receiving: Receiving, display: Display, shell: Shell, stay: bool, may_end: Callable[[], bool]) -> None:
        """``stay``: the end of stdin does not end the client; ``may_end``: returns whether it does so already."""
        self.command: Reason | None = None
        self.ending: Reason | None = None
        self.is_over = False                    # nothing is left but the writing
        self.exit_code: int | None = None       # None until the end
        self._result = 0                        # the exit code that it will be
        self._incomplete = 0                    # the same, if not all is shown that was waited for
        self._deadline = NEVER
        self._is_interrupted = self._is_reader_gone = False
        self._loop, self._link, self._table, self._sending = loop, link, table, sending
        self._receipts, self._receiving, self._display, self._shell = receipts, receiving, display, shell
        self._stay, self._may_end = stay, may_end

    @property
    def may_go_on(self) -> bool:
        """Whether nobody leaves."""
        return self.command is None and self.ending is None and not self.is_over

    def settle(self) -> None:
        """Take the next step, if there is one to take."""
        why = self._why() if self.ending is None else None
        if why is not None:
            self._end(why)
        if (self.command or self.ending) and not self.is_over and self._link.state is not LINK_LEAVING:
            self._go_on()

    def _why(self) -> Reason | None:
        """Return why the client ends from now on; None: it goes on."""
        if self._receiving.inbox.selection is not None and (self._receiving.has_enough or self._receipts.has_failed):
            return Reason.ENOUGH
        if self.command is Reason.QUIT:
            return Reason.QUIT
        if self._shell.has_ended and not self._stay and not self._shell.waiting and self._may_end():
            return Reason.END_OF_INPUT
        return None

    def _go_on(self) -> None:
        is_late = self._loop.now() >= self._deadline
        if not is_late and not self._sending.outbox.is_settled:
            return
        is_hasty = self.ending in (Reason.SIGNAL, Reason.READER_GONE)
        if not self._link.has_joined or (is_hasty and self._link.is_silent):
            self._conclude()    # there is nobody to tell
            return
        self._receiving.accepts = False
        is_written = not (self._display.output.pending or self._receiving.inbox.has_chat)
        if is_late or self._display.output.broken or is_written:
            self._table.stop()
            self._receiving.stop_asking()
            self._link.leave(LAST_INTERVAL if is_late else HASTY_INTERVAL if is_hasty else SERVER_INTERVAL)

    def finish(self) -> None:
        """End, once what is over is written, too."""
        if not self._display.pending:
            self._exit()

    def _exit(self) -> None:
        """Set the exit code: nothing is written any more."""
        selection = self._receiving.inbox.selection
        has_all = selection is not None and not selection.unwritten
        self.exit_code = self._result or (0 if has_all else self._incomplete)

    def _end(self, why: Reason, limit: float = NEVER) -> None:
        """Begin the orderly end, which lasts about ``limit`` seconds at most."""
        self.ending = why
        self._shell.close(forget=why is Reason.QUIT)    # what stands behind ``quit`` was not meant to be done
        if limit < NEVER:
            self._deadline = self._loop.now() + limit
            self._loop.call_at(self._deadline, wake_up)
            self._loop.call_at(self._deadline + LAST_TIME - END_TIME, self._end_now)
            if self._link.state is LINK_REGISTERING:
                self._conclude()        # there is nothing to wait for

    def _end_now(self) -> None:
        if not self.is_over:
            self._conclude()
        for _ in range(2):      # a full disk is an error only behind the part that it accepts
            self._display.flush()
        if self._display.output.broken and self.reader_is_gone():
            self._display.flush()
        self._exit()

    def interrupt(self) -> None:
        """End in order on Ctrl-C or SIGTERM; the second time, at once."""
        if self._is_interrupted:
            self._end_now()
            return
        self._is_interrupted = True
        self._note_incomplete(1)
        self._end(Reason.SIGNAL, END_TIME)      # also if only the writing is left

    def _note_incomplete(self, code: int) -> None:
        selection = self._receiving.inbox.selection
        is_unanswered = self._link.is_visit and bool(self._shell.waiting)       # ``udpchat who``
        self._incomplete = code if is_unanswered or (selection is not None and selection.unwritten) else 0

    def time_is_over(self) -> None:
        """End: what is not closed by now counts as not delivered."""
        if not self.ending or self._deadline == NEVER:
            self._link.lose_patience()
            if not self.is_over:
                self._note_incomplete(TIME_IS_OVER if self._link.has_joined else 1)
                self._display.remark(self._why_late())
            self._end(Reason.SIGNAL, 0.0)

    def _why_late(self) -> str:
        """Return a line for stderr that says who has not answered in time, "" if nothing waits for anybody."""
        silent = self._sending.outbox.awaited()
        if self._shell.waiting or (self._incomplete and not self._link.has_joined):
            silent = ["the server"]
        return f"udpchat: the time is over, and no answer from {', '.join(silent)}\n" if silent else ""

    def reader_is_gone(self) -> bool:
        """End, because nobody reads stdout or it cannot be written; return False if that was known."""
        if self._is_reader_gone:
            return False
        self._is_reader_gone = self._receipts.has_failed = True
        self._display.report_error()
        if self.is_over:
            self._result = 1        # it was the last line that could not be written
        else:
            self._end(Reason.READER_GONE, END_TIME)
        return True

    def unanswered(self) -> None:
        """End, because the server is silent: a failure, unless we deregister and no command has asked for that."""
        is_failure = self._link.state is not LINK_LEAVING or self.command is not None
        self._link.announce_silence(always=self._link.patience.end() or is_failure)
        self.give_up(int(is_failure))

    def give_up(self, code: int) -> None:
        """End the program over something, and say so."""
        self._report()
        self._display.tell("exiting")
        self._stop(code)

    def _conclude(self) -> None:
        """End the program as asked."""
        self._report()
        self._stop(0)

    def _stop(self, code: int) -> None:
        self._table.stop()
        self._receiving.stop_asking()
        self._link.close()
        has_failed = self._receipts.has_failed or self._shell.has_failed or self._receipts.undelivered > 0
        self._result = code or int(has_failed)
        self.is_over = True

    def _report(self) -> None:
        """Name every message that was not delivered: on stderr, as the line that would send it again."""
        self._sending.tell_events()
        self._receipts.hand_back_all(self._sending.outbox.undelivered())
        self._shell.hand_back_rest()
        self._receipts.tell_undelivered()


# --- datagrams ------------------------------------------------------------------------------------------------

HINTS = frozenset({"cookie", "hello", "pong"})  # may come in plain beside a channel: what they say is proved otherwise


class Dispatcher:
    """Hands each map that can be trusted to the part that it is for. ``receive`` says what can be trusted."""

    def __init__(self, link: ServerLink, server: Endpoint, peer_links: PeerLinks, peer_keys: Peers | None,
                 leaving: Leaving, from_server: dict[str, Callable[[Info], None]]) -> None:
        """``from_server``: who takes what the server says, by tag; the link takes what is about the session."""
        self.decoder = Decoder()
        self._link, self._server, self._leaving = link, server, leaving
        self._peer_links, self._peer_keys = peer_links, peer_keys
        self._from_server = {**from_server, "packed": self._on_packed}
        self._from_peers: dict[str, Callable[[Info, Address], None]] = {
            "chat": peer_links.on_chat, "ack": peer_links.on_ack, "nack": peer_links.on_nack,
            "knock": peer_links.meetings.on_knock}
        if peer_keys is not None:
            self._from_peers.update(offer=peer_links.on_offer, accept=peer_keys.on_accept)
        self._proving: dict[str, Callable[[Info, Address], None]] = {
            "cookie": link.handshake.on_cookie, "hello": link.handshake.on_hello, "welcome": link.on_welcome,
            "refused": link.on_refused, "pong": link.on_pong, "bye": link.on_bye}

    def receive(self, datagram: bytes, address: Address) -> None:
        """Accept a datagram, as far as it can be trusted.

        From the server's address, a map counts if a ``for`` with our session stands before it: nobody else can guess
        it. From elsewhere, chat counts if the table says that its sender is there, and an ack if the stream in it, a
        random number, went there (see ``Outbox``). What proves itself counts from anywhere. Where there is a channel,
        it is the record that counts, wherever it comes from, and nothing else of the server's but hints.
        """
        if self._leaving.is_over:
            return
        link, server, connection = self._link, self._server, self._link.connection
        if connection.channel is not None and datagram[:1] == RECORD_MARK:
            self._receive_record(connection.channel, datagram, address)
            return
        maps = self.decoder.decode(datagram)
        if address != server.current and address != server.other:
            self._peer_links.allowance = len(datagram)
            # False: chat is neither sent nor accepted. (No property of the link: it would cost a call per message.)
            may_send = link.state is not LINK_OFFLINE and link.state is not LINK_REGISTERING
            for tag, info in maps:
                handler = self._from_peers.get(tag)
                if handler is None:
                    self._prove(tag, info, address)
                elif may_send:
                    handler(info, address)
        else:
            self._receive_from_server(maps, address)

    def _receive_record(self, channel: Channel, record: bytes, address: Address) -> None:
        if index_of(record) == channel.index:
            text = self._link.connection.opened(record)
            if text is not None:
                self._receive_from_server(self.decoder.decode(text), address, is_sealed=True)
            return
        found = self._peer_keys.opened(record, address) if self._peer_keys is not None else None
        if found is not None:
            self._peer_links.on_sealed(found[0], self.decoder.decode(found[1]), address)

    def _prove(self, tag: str, info: Info, address: Address, is_sealed: bool = False) -> None:
        """Accept what only the server can say: we and it alone know the session, or the id, in it."""
        if tag in self._proving and (is_sealed or tag in HINTS or self._link.connection.is_plain):
            self._proving[tag](info, address)

    def _receive_from_server(self, maps: Sequence[Map], address: Address, is_sealed: bool = False) -> None:
        """``is_sealed``: this came in our channel. In plain, a ``for`` has to show that it is the server who speaks."""
        link, is_trusted = self._link, is_sealed
        if is_sealed and address in self._server.last_two():    # from elsewhere it is no sign that we are heard
            if link.is_silent:
                self._server.found(address)     # of the two that were asked, this is it
            link.heard()
        for tag, info in maps:
            if tag in self._from_server:
                if is_trusted:
                    self._from_server[tag](info)
            elif tag == "for":
                if not is_sealed:
                    is_trusted = link.session is not None and info["session"] == link.session[:PROOF_BYTES] and (
                        link.connection.is_plain)
                    if is_trusted:
                        link.heard()
            elif tag == "probe":
                link.on_probe(info, is_trusted)
            else:
                self._prove(tag, info, address, is_sealed)

    def _on_packed(self, info: Info) -> None:
        for tag, page in self.decoder.unpacked(info["data"]):
            if tag == "table":
                self._from_server["table"](page)


# --- the client -----------------------------------------------------------------------------------------------

class Client:
    """One user. Commands come in by ``shell``, datagrams by ``receive``, lines go to the display.

    ``settle`` ends each turn. ``wants_input`` says whether commands may be read.
    """

    def __init__(self, loop: Loop, send: Send, display: Display, nick: str, server: Endpoint,
                 handshake: Handshake | None = None, ack_timeout: float = ACK_TIMEOUT, stay: bool = False,
                 is_typed: bool = False, observer: Observer | None = None, patience: Patience | None = None,
                 selection: Selection | None = None) -> None:
        """``handshake``: by default that of an anonymous client. ``ack_timeout``: s. ``stay``: go on at stdin's end.

        ``is_typed``: stdin is a terminal. ``patience``: by default none; an endless one ends with ``time_is_over``.
        ``selection``: which messages are shown, by default all; the client ends when it has them.
        """
        patience = patience or Patience()
        self.nick = nick
        self.display = display
        self.outbox = Outbox(nick, ack_timeout=ack_timeout, is_patient=patience.is_endless)
        self.inbox = Inbox(selection)
        handshake = handshake or Handshake(send)
        self.link = ServerLink(loop, send, nick, server, self, lambda: self.table_sync.version,
                               handshake, patience)
        self.table_sync = TableSync(loop, self.link, self._on_table_changed, self._on_own_state)
        self.receipts = Receipts(loop, display, lambda to: self.outbox.conversations[to].route is DIRECT, observer)
        keys, must_encrypt = handshake.keys, handshake.must_encrypt
        peers = Peers(keys, send, loop.now, lambda: new_id(loop), must_encrypt, handshake.known) if keys else None
        mail = SealedMail(keys, peers, must_encrypt, handshake.has_proof) if keys and peers else None
        self.peer_keys = peers                  # and the channels with them
        self.sending = Sending(loop, send, self.link, peers, mail, self.table_sync, self.outbox, self.receipts)
        self.receiving = Receiving(loop, send, self.link, peers, mail, self.inbox, display)
        self.peer_links = PeerLinks(loop, send, self.link, peers, self.table_sync, self.outbox, self.receiving,
                                    display)
        self.presence = Presence(loop, display, lambda nick: self.table_sync.table.is_online(nick))
        self.shell = Shell(self, display, self.receipts, self.sending.queue, is_typed)
        self.leaving = Leaving(loop, self.link, self.table_sync, self.sending, self.receipts, self.receiving, display,
                               self.shell, stay, self.accepts_commands)
        self.check_table, self.await_key = self.table_sync.check, self.table_sync.await_key
        self.settle_sends = self.sending.settle
        if selection is not None:
            self.link.is_early = selection.is_early
            if selection.asks:
                selection.has_asked = lambda: bool(self.outbox.conversations)
        self._loop, self._server = loop, server
        self._may_read = False                  # stdin, as of the end of the last turn
        self._knows_table = False               # the user has heard that the table has come, since the last welcome
        self.on_joined: Callable[[], None] = lambda: None       # an observer: there is a session
        self._next_turn = RestartableTimer(loop, wake_up)
        self.dispatcher = Dispatcher(self.link, server, self.peer_links, peers, self.leaving, {
            "table": self.table_sync.on_table, "key": self.table_sync.on_key,
            "ack": lambda info: self.outbox.on_ack(loop.now(), info, None),
            "nack": lambda info: self.outbox.on_nack(loop.now(), info, None),
            "exists": self.sending.on_exists, "mail": self._on_mail, "call": self.peer_links.meetings.on_call})
        self.receive = self.dispatcher.receive

    def start(self) -> None:
        """Come online."""
        if self.display.asks and not self.display.formatter.hides("registered"):
            self.display.note(f"[Connecting to {show_address(self._server.current)} as {self.nick}.]")
        self.link.start()

    def _on_mail(self, info: Info) -> None:
        if info.get("to", self.nick) == self.nick and self.table_sync.is_of_this_boot:
            self.receiving.on_mail(info)

    # what the link and the table report

    def on_registered(self, session: bytes, boot: int, version: int) -> None:
        """Begin a session with a server whose table has that ``version``.

        The nick may be spelled in another way than we were given it, see ``on_refused``.
        """
        self.nick = self.outbox.me = self.display.formatter.nick = self.link.nick
        is_sealed = self.link.connection.channel is not None
        if self.peer_keys is not None and self.link.handshake.pin.key is not None:
            self.peer_keys.begin_session(self.nick, self.link.handshake.pin.key)
        self.outbox.register(self._loop.now(), Account(session, is_sealed))
        self.receiving.start_over()
        self._knows_table = False
        self.presence.on_session()
        self.display.tell("registered", nick=self.nick)
        if self.link.handshake.tells_of_plain and not is_sealed:
            self.link.handshake.tells_of_plain = False
            self.display.tell("insecure")
        self.on_joined()
        self.table_sync.begin_session(boot, version)
        if self.inbox.selection is not None and self.inbox.selection.asks:
            self.link.ping_until_answered()     # the answer says which mail is older than the question

    def on_session_lost(self) -> None:
        """Wait for another session: the server does not know this one."""
        self.table_sync.end_session()

    def on_server_silent(self, is_news: bool) -> None:
        """Tell of an outage, unless it is waited out; what waits for the server is stuck."""
        if self.link.patience.is_endless:
            log.info("the server does not respond: trying again")
        else:
            self.display.tell("silent")
        self.table_sync.stop_waiting()
        if is_news:
            self.outbox.note_server(is_silent=True)
            self.table_sync.interval = OUTAGE_PING_INTERVAL

    def on_server_back(self, is_same: bool) -> None:
        """Tell that an outage has passed; ``is_same``: the server still knows the session."""
        self.outbox.note_server(is_silent=False)
        self.table_sync.interval = SYNC_INTERVAL
        if is_same or self.display.formatter.is_for_programs:      # people see the welcome that comes next
            self.display.tell("back")

    def on_pong(self, asked: float, version: int, mail: int) -> None:
        """Note how far the table and the mail were when the server answered the ping that was sent at ``asked``."""
        self.inbox.answer(asked, mail)
        if self.inbox.selection is not None:
            self.inbox.selection.note_mail(mail)
        self.table_sync.on_version(version)

    def on_refused(self, reason: str, spelling: str) -> None:
        """End: the server does not want us. But a client that starts asks once for its nick as it is spelled there.

        The server may say what it likes: only what counts as the same nick is ours.
        """
        is_first = self.link.state is LINK_REGISTERING and self.link.nick == self.nick and not self.table_sync.boot
        if reason == "owned" and is_first and spelling != self.nick and folded(spelling) == folded(self.nick):
            log.info("%s is registered as %s", self.nick, spelling)
            self.link.nick = spelling
            self.link.start()
            return
        self.display.tell(REGISTRATION_REFUSALS.get(reason, "taken"), nick=self.nick)
        if reason == "key-changed":
            log.error("%s", self.link.handshake.pin.advice)
        elif reason == "owned":
            log.warning("take another nick (--nick NICK), or the identity that this one belongs to (--identity PATH)")
        elif reason == "encrypted":
            log.warning("that takes the extra secure (pip install 'udpchat[secure]'), and no --secure off")
        self.leaving.give_up(1)

    def on_unanswered(self) -> None:
        """End: there is no server, or it is gone."""
        self.leaving.unanswered()

    def on_left(self) -> None:
        """Be offline, and wait for ``reg``."""
        self.sending.tell_events()
        self.table_sync.stop()
        self.table_sync.interval = SYNC_INTERVAL
        self.receiving.stop_asking()
        self.receiving.start_over()
        self.outbox.note_server(is_silent=False)
        self.outbox.note_offline(True)
        self.presence.end()
        self.leaving.command = None
        self.display.tell("left", nick=self.nick)

    def _on_table_changed(self, nicks: Sequence[str]) -> None:
        """Follow those who came, went or moved."""
        self.presence.note(nick for nick in nicks if nick != self.nick)
        self.peer_links.on_news(nicks)
        for nick in nicks:
            if nick in self.outbox.conversations:
                self.outbox.locate(self._loop.now(), nick, self.table_sync.place_of(nick))

    def _on_own_state(self, is_online: bool, was_online: bool) -> None:
        """Follow what the table says of us; a ping brings us back online."""
        self.receiving.on_own_state(is_online)
        self.link.on_own_state(is_online)
        if not is_online and (was_online or self.table_sync.is_of_this_boot):
            self.link.ping_until_answered()

    # what the shell asks for

    @property
    def is_offline(self) -> bool:
        """Whether the client has deregistered."""
        return self.link.state is LINK_OFFLINE

    def accepts_commands(self) -> bool:
        """Return whether commands count: we were online for everybody to see, or are offline; and do not leave.

        They wait while it is found out whether a nick that seems to be unknown is, or what the key of one is.
        """
        selection, table = self.inbox.selection, self.table_sync
        return self.link.state in COMMAND_STATES and not (table.is_checking or table.awaited) and (
            self.leaving.may_go_on and (selection is None or selection.mail_from is not None))

    def takes_messages(self) -> bool:
        """Return whether another program of the same user may hand over a message now."""
        return self.link.state is LINK_ONLINE and not self.link.is_silent and self.leaving.may_go_on

    def dereg(self) -> None:
        """Go offline, once all sends before are settled."""
        self.leaving.command = Reason.DEREG

    def quit(self) -> None:
        """Go offline and end, once all sends before are settled."""
        self.leaving.command = Reason.QUIT

    def reg(self) -> None:
        """Come online again."""
        self.outbox.note_offline(False)
        self.receiving.accepts = True
        self.link.start()

    def clients(self) -> list[ClientRow]:
        """Return everybody who is known, in the order of the nicks."""
        entries = self.table_sync.table.entries
        return [(nick, f"{host}:{port}" if ":" not in host else show_address((host, port)), state, seen)
                for nick, host, port, state, _, _, _, seen in map(entries.__getitem__, sorted(entries))]

    def wall(self) -> float:
        """Return the wall-clock time, in s since 1970."""
        return self._loop.wall()

    def nicks_like(self, word: str, most: int) -> list[str]:
        """Return the nicks that begin like ``word``, those that are online first."""
        return self.table_sync.table.beginning_with(word, most)

    def spelling_of(self, nick: str) -> str | None:
        """Return how ``nick`` is registered, see ``Table``; None: there is no such client."""
        if nick in self.table_sync.table.entries:       # most are: this call is enough for them
            return nick
        return self.table_sync.table.spelling_of(nick)

    @property
    def wants_input(self) -> bool:
        """Whether stdin may be read now."""
        return self._may_read and not (self.leaving.ending or self.leaving.is_over)

    # the end of a turn

    def settle(self) -> None:
        """End a turn: carry out commands, send what windows allow, write stdout, acknowledge what was written.

        The conditions only save calls, in a turn that is measured: the parts do nothing where there is nothing to do.
        """
        if self.leaving.exit_code is not None:
            return
        shell, outbox, inbox, display = self.shell, self.outbox, self.inbox, self.display
        if shell.waiting:
            shell.run()
        self.sending.settle()
        if self.table_sync.has_news and display.output.has_room():
            self._tell_of_table()
        has_more = (bool(inbox.holding) or inbox.is_ready) and self.receiving.show()
        display.output.flush()
        if outbox.awaiting_recount:
            outbox.recount()
        if inbox.unacked:
            self.receiving.acknowledge()
        self.leaving.settle()
        self._finish_turn(has_more)
        if self.leaving.is_over:
            self.leaving.finish()

    def _tell_of_table(self) -> None:
        """Tell that the table has changed: people are told of each one, see ``Presence``."""
        self.table_sync.has_news = False
        if not self.display.asks or not self._knows_table:
            self.display.tell("table")
        self._knows_table = True
        if self.table_sync.is_of_this_boot and self.table_sync.is_whole:
            self.presence.begin(entry.nick for entry in self.table_sync.table.entries.values() if entry.state == ONLINE)

    def _finish_turn(self, has_more: bool) -> None:
        """Write what was added since the flush, and plan another turn if there is still something to do.

        There is if some of a backlog was written, so that there is room again, or if a limit has left commands or
        messages (``has_more``) for later.
        """
        shell, output, errors = self.shell, self.display.output, self.display.errors
        goes_on = False
        if output.pending or errors.pending or self.display.prompt is not None:
            goes_on = self._write_rest()
        if output.broken and self.leaving.reader_is_gone():
            goes_on = True
        if shell.waiting:
            self._may_read = False      # these come first
            goes_on = goes_on or (shell.may_run() and not self.outbox.is_full and not errors.pending)
        else:
            self._may_read = not shell.has_ended and shell.may_run() and not self.outbox.is_full
        if goes_on or (has_more and output.has_room()):
            self._next_turn.set(self._loop.now())

    def _write_rest(self) -> bool:
        """Write to both outputs, and draw the prompt; return whether anything could be written."""
        output, errors = self.display.output, self.display.errors
        lines, complaints = output.pending, errors.pending
        self.display.flush()
        asks_no_more = self.leaving.ending is not None or self.leaving.command is Reason.QUIT
        prompt = "" if self.link.is_starting else self.shell.prompt
        self.display.draw(self.receipts.notices, prompt, asks_no_more)
        return output.pending < lines or errors.pending < complaints
