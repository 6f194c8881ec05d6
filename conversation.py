"""What one client sends and receives, over all routes.

Rules of this module
--------------------
- No sockets, no clock, no randomness, no output. Time comes in as ``now``, seconds of any origin that never go back;
  datagrams, events and texts to show come out as return values. Only ``Meetings`` sends, and asks the table, itself.
- It is a client's, and knows nothing of commands and lines. The owner passes on what the table says of a recipient,
  what the server says, and what was written to stdout.
- Every message gets exactly one closing event, RECEIVED, SAVED or REFUSED, or it is still pending at the end.
- The number of a message in its stream is the same on every route. The recipient shows each number once.
- A stream has one route at a time. A change of route takes everything pending along, lowest number first.
- Nothing that a peer sends makes memory grow without bound: every collection here has a limit.
- Sizes and numbers that both ends must agree on are in ``protocol``; times are beside the timer that they govern.

The life of one ``send``
------------------------
1. ``Outbox.send`` finds the ``Conversation`` with the recipient. It queues the text in its ``SendStream``, a long one
   in several pieces. If nothing was pending, it picks a route: DIRECT if the table says that the recipient is online.
2. ``Outbox.poll`` turns the packets that the stream allows into ``chat`` datagrams to the recipient's address.
3. The recipient acks when the text is written to its stdout. That closes the message: RECEIVED.
4. Without any ack for ``ACK_TIMEOUT``, or if somebody else answers at that address, the event is NO_ACK and the route
   becomes SAVE: the same numbers go to the server, as ``save``. If the table says that the recipient is offline, they
   go there at once (event RECIPIENT_OFFLINE).
5. The server has three answers. It keeps the messages and acks: SAVED. It refuses them (``nack``: unknown recipient,
   full mailbox, disk failure): REFUSED. Or it finds that the recipient is there, and says where (``exists``): the event
   is EXISTS, and the messages go DIRECT once more. If that fails, too, for example because datagrams pass in one
   direction only, the route becomes RELAY for 1 to 10 minutes: the server keeps the messages without asking the
   recipient first, and mails them at once.
6. A server that does not answer five attempts is silent: SILENT. The messages are *stuck*: they stay queued and go out
   when the server is heard again, but the program does not wait for them.

Order and deduplication over routes
-----------------------------------
The recipient has a ``ReceiveStream`` for each stream of each sender. Chat goes straight into it. Mail comes from the
server in a stream of its own; each letter in it names the sender, and the stream and the number that it had there.
Before a letter is shown, ``Inbox`` claims its number in the sender's stream: the claim fails if the number was shown
before, and otherwise makes the stream skip it. So both routes together show each number once, and in order.

Holding for mail
----------------
alice sends 1 to 5 to bob, the path between them breaks, and she saves the five at the server. Then the path works again
and 6 comes straight, with ``base`` 6: alice does not have 1 to 5 any more. bob must not show 6 before them, so he
*holds* the stream: he asks the server (``ping``) how much mail there is for him, and shows 6 when all of it is shown,
or after ``HOLD_TIME`` without an answer. Numbers that he has given up in this way are still shown if they come late.

Who is online before the mail that waits was looked at (``Selection.is_early``) holds each new stream as a whole in the
same way, although nothing is missing in it: what the same sender has said before may be in the mail. But that lasts no
longer than ``HOLD_TIME``: there may be more mail of others than fits into a window.
"""
from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice

from protocol import (DOUBTS, MAX_ITEMS, MAX_PIECE, NEVER, SERVER_ATTEMPTS, SERVER_INTERVAL, Address, Any, Info,
                      NamedTuple, Opened, Outgoing, Place, Protocol, are_neighbours, are_short, encode, folded,
                      is_private, join_pieces, letters_of, opened_plain, pieces_of, proof_of, runs_of_one_origin,
                      split_text)
from stream import (INITIAL_TIMEOUT, MAX_TIMEOUT, NOT_YET, Account, DuplicateFilter, Frames, Incoming, Reach,
                    ReceiveStream, Run, SendStream)


# --- conversations --------------------------------------------------------------------------------------------

ACK_TIMEOUT = 0.5         # s; the original's 500 ms: no ack at all in that time, and the messages go to the server
STALL_TIMEOUT = 30.0      # s without progress on one route, whatever the acks say: so that a script always ends
STUCK_TIMEOUT = 60.0      # s without progress on all routes together, however often the recipient moves
ADDRESSES_KEPT = 4        # of a recipient, from which an ack still counts


class Route(Enum):
    """The route of a conversation's messages."""

    DIRECT = "direct"       # straight to the recipient
    SAVE = "save"           # to the server, which probes the recipient first if it seems to be online
    RELAY = "relay"         # to the server, which keeps them without a probe, and mails them at once


class EventKind(Enum):
    """What can happen to messages. The first three close them."""

    RECEIVED = "received"   # the recipient has written them to stdout
    SAVED = "saved"         # the server has them on disk
    REFUSED = "refused"     # the server does not keep them, or we may not send them
    SILENT = "silent"       # the server does not answer: they are stuck
    NO_ACK = "no-ack"       # the recipient does not answer: they go to the server
    RECIPIENT_OFFLINE = "offline"   # the recipient is offline: they go to the server
    EXISTS = "exists"       # the server says that the recipient is there: they go straight once more

    def __init__(self, event_name: str) -> None:
        self.event_name = event_name    # the key in EVENT_FORMATS; as an attribute, because Enum.value takes two calls


# module constants, because the look-up of a member in its class is slow
DIRECT, SAVE, RELAY = Route.DIRECT, Route.SAVE, Route.RELAY
RECEIVED, SAVED, REFUSED = EventKind.RECEIVED, EventKind.SAVED, EventKind.REFUSED
SILENT, NO_ACK, EXISTS = EventKind.SILENT, EventKind.NO_ACK, EventKind.EXISTS
RECIPIENT_OFFLINE = EventKind.RECIPIENT_OFFLINE


class Event(NamedTuple):
    """What happened to some ``messages`` of a conversation.

    ``reason``: why they were refused. ``first``, ``end``: their numbers are in [first, end). ``relayed``: on the route
    RELAY.
    """

    kind: EventKind
    messages: int
    reason: str = ""
    first: int = 0
    end: int = 0
    relayed: bool = False


# returns why nothing may be sent (straight to the recipient, or to the server), "" if it may; has letters sealed
Guard = Callable[[Frames, bool], str]
NACK_REASONS = frozenset(("unknown", "full", "disk", "key"))    # of the server, all others count as "disk"


class Backlog:
    """How much is pending: numbers, and their bytes."""

    __slots__ = ("numbers", "size")

    def __init__(self) -> None:
        self.numbers = 0
        self.size = 0


class Conversation:
    """The life of one client's sends to one recipient.

    ``send`` queues texts; ``poll`` returns the datagrams that are due. ``events`` collects what happened, in order, for
    the owner to remove. The routes, and what changes them::

        DIRECT --no ack for 500 ms, "not-me", offline--> SAVE --"exists"--> DIRECT, once more --no ack--> RELAY
        DIRECT --no progress for 30 s--> RELAY --after 1 to 10 minutes, or at a new address--> DIRECT

    A closing event (RECEIVED, SAVED, REFUSED) counts whole messages. The other kinds come before it, each at most once
    for a message. ``stuck``: nothing moves, because the server is silent or has no room, or because there was no
    progress on any route for a minute.
    """

    def __init__(self, me: str, peer: str, id_: int, ack_timeout: float = ACK_TIMEOUT) -> None:
        self.peer, self.ack_timeout = peer, ack_timeout
        self.id = id_                               # of the stream
        self.frames = Frames(me, peer, id_)
        self.events: list[Event] = []
        self.route = DIRECT
        self.place: Place | None = None
        self.stuck = False
        self.addresses: deque[Address] = deque(maxlen=ADDRESSES_KEPT)   # where DIRECT went: acks count from there
        self.exposed = 0                            # below which number somebody else may have read what went out
        self.counted = Backlog()                    # what the outbox has counted as pending here, ...
        self.is_counted_as_stuck = False            # ... and in which of its backlogs
        self._address: Address | None = None        # where DIRECT goes now
        self._follows_table = False                 # this is the route that the table suggests, and it was not changed
        self._is_last_try = False                   # this is the second DIRECT, after EXISTS
        self.reach = Reach()
        # What ``_judge`` goes by: how long there is no answer, no progress on this route, and none on any
        self.silent_since = NEVER                   # when the first datagram went out that nobody answered, ...
        self._silence_limit = ack_timeout           # ... and after how many s the route is given up for that
        self._route_progress_at = NEVER             # messages were closed, the first was queued, or the route changed
        self._progress_at = NEVER                   # the same, but for changes of the route
        self._judge_at = -NEVER                     # when it may have something to decide; never too late
        self._server_is_silent = False              # there was no answer of the server, and the event SILENT was added
        self._awaits_key = False                    # nothing may be sent yet: ``locate`` says when
        self._announced: dict[EventKind, int] = {}      # below which number an event of that kind was added
        self.stream = SendStream(id_, self.frames.capacity(True), min(INITIAL_TIMEOUT, ack_timeout / 2))

    # what is pending

    @property
    def pending(self) -> int:
        """How many numbers are not closed yet."""
        return self.stream.pending

    def texts(self) -> list[str]:
        """Return the messages that are not closed yet, in order."""
        return join_pieces(self.stream.base, list(self.stream.pending_items()), self.stream.continued)

    # what the owner says

    def send(self, now: float, texts: Sequence[str], at: float) -> None:
        """Queue texts (each at most ``MAX_TEXT`` bytes), sent at the wall-clock time ``at``."""
        stream = self.stream
        if stream.end == stream.base:
            self._route_progress_at = self._progress_at = now
            self.silent_since = NEVER
            if not self._follows_table:
                self._pick_route(now)
        self.frames.times.add(stream.end, at, stream.base)
        items, continued = (texts, ()) if are_short(texts, MAX_PIECE) else pieces_of(texts, stream.end)
        stream.queue(items, self.frames.sizes(items, stream.end, continued, self.route is DIRECT), continued)
        if self.route is not DIRECT and self.place is not None and not self.place.online:
            self._announce(RECIPIENT_OFFLINE)

    def locate(self, now: float, place: Place | None) -> None:
        """Learn that the recipient's entry in the table has changed (None: there is none)."""
        self.place = place
        self._follows_table = False
        self.reach = Reach()
        if not self.pending:
            return
        if place is None or not place.online:
            if self.route is DIRECT:
                if place is not None:
                    self._announce(RECIPIENT_OFFLINE)
                self._go(now, SAVE)
        elif self.route is RELAY or (self.route is DIRECT and place.address != self._address):
            self._pick_route(now)

    def on_registered(self, now: float) -> None:
        """Learn that the owner is online again: what did not move meanwhile was not held up by the recipient."""
        self._route_progress_at = self._progress_at = self._judge_at = now
        self.stuck = self._server_is_silent

    def use(self, account: Account) -> None:
        """Send in the session of ``account`` from now on."""
        is_other = account.is_sealed is not self.frames.account.is_sealed
        self.frames.account, self.frames.letters = account, None
        if is_other:        # a datagram has room for more texts, or for fewer
            self._repack()

    def server_heard(self, now: float) -> None:
        """Learn that the server is there: if it was silent, what waits for it goes out again."""
        if self.route is DIRECT:
            return
        self.silent_since = NEVER
        if self._server_is_silent:
            self._server_is_silent = self.stuck = False
            self._route_progress_at = self._progress_at = self._judge_at = now
            self.stream.timeout_cap = SERVER_INTERVAL
            self.stream.resume()

    def on_ack(self, now: float, next_: int, have: Sequence[Sequence[int]], room: int, route: Route) -> None:
        """Process an ack that came straight from the recipient (DIRECT) or from the server (SAVE)."""
        stream = self.stream
        base = stream.base
        messages: int | None = None
        if stream.continued and base < next_ <= stream.top:
            messages = self._count(base, next_)     # now: the stream forgets which numbers are continued
        closed = stream.on_ack(now, next_, have, room)
        if (route is DIRECT) == (self.route is DIRECT):     # any answer on the route in use is a sign of life
            self.silent_since = NEVER
        if route is DIRECT and self.reach.met_at > -NEVER:
            self.reach.work()
        if closed:
            messages = closed if messages is None else messages     # without long texts, each number is a message
            # An ack from the other route closes messages, too: it was late, but it is true.
            if route is DIRECT:
                self._is_last_try = False
                event = Event(RECEIVED, messages, "", base, base + closed)
            else:
                event = Event(SAVED, messages, "", base, base + closed, self.route is RELAY)
            self._close(now, event)

    def on_nack(self, now: float, first: int, last: int, reason: str, route: Route) -> None:
        """Process a refusal; it counts only on the route in use, and for the lowest number that is pending."""
        if (route is DIRECT) != (self.route is DIRECT) or not first <= self.stream.base <= last:
            return
        if route is DIRECT:
            if reason == "not-me":
                self._give_up_direct(now)
            return
        if reason not in NACK_REASONS:
            reason = "disk"
        self.silent_since = NEVER
        base = self.stream.base
        messages = self._count(base, min(last + 1, self.stream.top))
        closed = self.stream.close(last + 1)
        if closed:
            self._close(now, Event(REFUSED, messages, reason, base, base + closed, self.route is RELAY))

    def on_exists(self, now: float, number: int, address: Address | None, knocks: bool = False) -> None:
        """Learn from the server that the recipient answers at ``address`` (None: it cannot be sent to from here).

        ``knocks``: it knocks if it is asked to, so that a second attempt at the same address is no use if it did not.
        """
        if self.route is not SAVE or not self.pending or number >= self.stream.top:
            return
        self._announce(EXISTS)
        was_tried = bool(self.addresses) and address == self.addresses[-1]
        if address is None or (knocks and was_tried and self.reach.is_hopeless(now)):
            self._relay(now)
        else:
            self._go(now, DIRECT, address)
            self._is_last_try = True

    def on_knock(self, now: float, address: Address) -> None:
        """Learn that the recipient has sent something straight from ``address``: perhaps it can be reached there.

        It counts once after each ``meet`` and each failure: datagrams may pass in that direction alone.
        """
        reach = self.reach
        if not reach.awaits_knock:
            return
        reach.awaits_knock, reach.closed_until = False, -NEVER
        reach.beside = address if self.place is not None and address != self.place.address else None
        if self.route is DIRECT and address == self._address:
            self.stream.resume()
        elif self.pending:
            self._go(now, DIRECT, address)
            self._follows_table = True

    # what time says

    def due(self) -> float:
        """Return when ``poll`` must be called even if nothing happens."""
        if not self.pending:
            return NEVER
        return self._judge_at if self._awaits_key else min(self.stream.due(), self._judge_at)

    def poll(self, now: float, drained: bool = True, guard: Guard | None = None) -> list[Outgoing]:
        """Return the datagrams to send now, and where to (None: the server).

        ``drained``: every socket was read empty. Otherwise the ack that ends a silence may be here, unread: a process
        that was stopped for a second must not conclude that everybody else was silent for a second.
        """
        stream = self.stream
        if stream.end == stream.base:
            return []
        if drained and now >= self._judge_at:
            self._judge(now)
            self._judge_at = self._next_judgement()
        if not self._may_send(now, guard):
            return []
        packets = stream.poll(now)
        if packets and self.silent_since == NEVER:
            self.silent_since = now
            self._judge_at = min(self._judge_at, now + self._silence_limit)
        if self.route is not DIRECT:
            return [(self.frames.save(packet, stream, self.route is RELAY), None) for packet in packets]
        datagrams: list[Outgoing] = [(self.frames.chat(packet, stream), self._address) for packet in packets]
        if packets and packets[0].tries > 1 and self.reach.met_at < self.silent_since < NEVER:
            self.reach.meet(now)
            datagrams.insert(0, (self.frames.meet(), None))
        return datagrams

    def _may_send(self, now: float, guard: Guard | None) -> bool:
        """Return whether what is pending may go out now; refuse it if it never may."""
        reason = guard(self.frames, self.route is DIRECT) if guard is not None else ""
        if self.route is not DIRECT and self.frames.is_sealing is not (self.frames.letters is not None):
            self._repack()      # sealed, the texts need another room
        self._awaits_key = reason == NOT_YET
        if reason and not self._awaits_key:
            self._refuse_all(now, reason)
        return not reason

    def _refuse_all(self, now: float, reason: str) -> None:
        """Close all that is pending, sent or not: it must not be sent. That it goes to the server is not true, then."""
        self.events = [event for event in self.events if event.kind not in (RECIPIENT_OFFLINE, NO_ACK)]
        base, messages = self.stream.base, self._count(self.stream.base, self.stream.end)
        closed = self.stream.close_all()
        if closed:
            self._close(now, Event(REFUSED, messages, reason, base, base + closed))

    def _judge(self, now: float) -> None:
        """Decide whether something has lasted too long; if so, change the route, or call the messages stuck.

        *Silent*: no answer at all. A recipient that has crashed is given up after 500 ms. *Stalled*: answers, but no
        progress. A recipient whose output is blocked answers like that, and it is normal for a while (backpressure), so
        it is allowed 30 s. The minute without progress on any route is for a recipient that registers again and again
        at another address and never receives anything: each change of route starts the 30 s again, but not the minute.
        """
        silent = now >= self.silent_since + self._silence_limit
        stalled = now >= self._route_progress_at + STALL_TIMEOUT
        if now >= self._progress_at + STUCK_TIMEOUT:
            self.stuck = True
        if self.route is DIRECT:
            if silent:
                self._give_up_direct(now)
            elif stalled:
                self._announce(NO_ACK)
                self._relay(now)
            return
        if silent and not self._server_is_silent:
            self._server_is_silent = self.stuck = True
            self.stream.timeout_cap = MAX_TIMEOUT
            self.events.append(Event(SILENT, self._count(self.stream.base, self.stream.end)))
        if stalled:
            self.stuck = True
            self.stream.timeout_cap = MAX_TIMEOUT
        if self.route is RELAY and now >= self.reach.closed_until > -NEVER:
            self.reach.closed_until = -NEVER
            self._pick_route(now)

    def _next_judgement(self) -> float:
        """Return when ``_judge`` has something to decide, if nothing happens until then."""
        when = NEVER
        if not self._server_is_silent:
            when = self.silent_since + self._silence_limit
        is_stalled = self.stuck and self.route is not DIRECT and self.stream.timeout_cap == MAX_TIMEOUT
        if not is_stalled:
            when = min(when, self._route_progress_at + STALL_TIMEOUT)
        if not self.stuck:
            when = min(when, self._progress_at + STUCK_TIMEOUT)
        if self.route is RELAY and self.reach.closed_until > -NEVER:
            when = min(when, self.reach.closed_until)
        return when

    def _give_up_direct(self, now: float) -> None:
        self._announce(NO_ACK)
        if self._is_last_try:
            self._relay(now)
        else:
            self._go(now, SAVE)

    # routes

    def next_route(self, now: float) -> Route:
        """Return the route of a message that is queued now."""
        return self.route if self.pending else self._suggested_route(now)

    def _suggested_route(self, now: float) -> Route:
        if self.place is None or not self.place.online:
            return SAVE
        if self.place.address is None or now < self.reach.closed_until:
            return RELAY
        return DIRECT

    def _pick_route(self, now: float) -> None:
        """Change to the route that the table suggests."""
        route = self._suggested_route(now)
        if route is DIRECT and self.place is not None:
            self._go(now, route, self.reach.beside or self.place.address)
            self._follows_table = True
        else:
            self._go(now, route)

    def _relay(self, now: float) -> None:
        self.reach.fail(now)
        self._go(now, RELAY)

    def _go(self, now: float, route: Route, address: Address | None = None) -> None:
        self._is_last_try = self._follows_table = False
        self._judge_at = now
        if route is not DIRECT or self.route is not DIRECT:
            self._route_progress_at = now       # not for a new address alone: see ``_judge``
        if route is not self.route or address != self._address:
            self.route, self._address = route, address
            if address is not None:
                self.addresses.append(address)
            self._repack()
        elif self._server_is_silent:
            self.stream.resume()        # the silence is forgotten below, so the server is tried at once
        self.stream.timeout_cap = MAX_TIMEOUT if route is DIRECT else SERVER_INTERVAL   # as often as any request
        self.silent_since = NEVER
        self._silence_limit = self.ack_timeout if route is DIRECT else SERVER_ATTEMPTS * SERVER_INTERVAL
        self._server_is_silent = False
        self.stuck = self.pending > 0 and now >= self._progress_at + STUCK_TIMEOUT

    def _repack(self) -> None:
        """Pack what is pending for the route in use, and send it there as if nothing had been sent."""
        frames, stream, is_direct = self.frames, self.stream, self.route is DIRECT
        frames.is_sealing = frames.letters is not None
        stream.reroute(frames.capacity(is_direct),
                       lambda items: frames.sizes(items, stream.base, stream.continued, is_direct))

    # events

    def _count(self, start: int, end: int) -> int:
        """Return how many messages end in [start, end)."""
        continued = self.stream.continued
        return end - start - (sum(start <= number < end for number in continued) if continued else 0)

    def _announce(self, kind: EventKind) -> None:
        """Add an event for the pending messages that had none of this kind."""
        first = max(self.stream.base, self._announced.get(kind, 1))
        messages = self._count(first, self.stream.end)
        if messages > 0:
            self.events.append(Event(kind, messages, "", first, self.stream.end))
        self._announced[kind] = self.stream.end

    def _close(self, now: float, event: Event) -> None:
        self.events.append(event)
        self._route_progress_at = self._progress_at = now
        if self.stuck:
            self.stuck, self._judge_at = False, now


# --- what goes out --------------------------------------------------------------------------------------------

POLLS_PER_TURN = 64       # conversations that are polled in one go: the others are due at once
QUEUE_LIMIT = 4096        # numbers that may be queued; beyond it the owner reads no more commands
QUEUE_SIZE = 4 * 2 ** 20  # bytes that may be queued
CONVERSATIONS_KEPT = 10_000     # of one client; beyond it, those go first in which nothing is pending


class Outbox:
    """All that one client sends: a conversation with each recipient, when each is due, and how much is pending.

    What waits while the server does not answer (``note_server``), or while the client is deregistered
    (``note_offline``), is stuck: it has a backlog of its own, so that it does not keep messages to others from being
    queued.
    """

    def __init__(self, me: str, ack_timeout: float = ACK_TIMEOUT, is_patient: bool = False) -> None:
        """``is_patient``: nothing counts as stuck, because the owner has a limit for everything together."""
        self.conversations: dict[str, Conversation] = {}    # by recipient
        self.with_events: dict[str, Conversation] = {}      # whose events, or numbers pending, are to be looked at
        self.awaiting_recount: dict[str, Conversation] = {}     # whose events were taken, for ``recount``
        self.me = me
        self._ack_timeout, self._is_patient = ack_timeout, is_patient
        self._account = Account()
        self._server_is_silent = False
        self._is_offline = False
        self.by_stream: dict[int, Conversation] = {}
        self._sending: dict[str, Conversation] = {}     # with messages that are not closed
        self._touched: dict[str, Conversation] = {}     # to be polled next
        self._due: dict[str, float] = {}                # when to look at a conversation, or earlier
        self._dues: list[tuple[float, str]] = []        # the same as a heap, with entries that do not count any more
        self._moving, self._stuck = Backlog(), Backlog()

    @property
    def is_settled(self) -> bool:
        """Whether every message is closed, or stuck."""
        return all(self._is_stuck(conversation, conversation.route) for conversation in self._sending.values())

    def awaited(self) -> list[str]:
        """Return who has to answer before every message is closed: nicks, and "the server"."""
        return list(dict.fromkeys(nick if conversation.route is DIRECT else "the server"
                                  for nick, conversation in self._sending.items() if conversation.pending))

    def undelivered(self) -> Iterator[tuple[str, str, int]]:
        """Yield the messages that are not closed: recipient, text, and the number of the first of its pieces."""
        for nick, conversation in self._sending.items():
            number = conversation.stream.base
            for text in conversation.texts():
                yield nick, text, number
                number += len(split_text(text))

    # how much is pending

    def _is_stuck(self, conversation: Conversation, route: Route) -> bool:
        return (conversation.stuck or self._is_offline
                or (self._server_is_silent and route is not DIRECT)) and not self._is_patient

    def is_stuck(self, now: float, nick: str) -> bool:
        """Return whether a message for ``nick`` (a conversation is open) does not move, if it is queued now."""
        conversation = self.conversations[nick]
        return self._is_stuck(conversation, conversation.next_route(now) if self._server_is_silent else DIRECT)

    def room(self, now: float, nick: str) -> int:
        """Return how many numbers for ``nick`` (a conversation is open) may be queued now; 0: none."""
        backlog = self._stuck if self.is_stuck(now, nick) else self._moving
        return max(0, QUEUE_LIMIT - backlog.numbers) if backlog.size < QUEUE_SIZE else 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be queued, except for those whose messages are stuck."""
        return self._moving.numbers >= QUEUE_LIMIT or self._moving.size >= QUEUE_SIZE

    def _count(self, conversation: Conversation) -> None:
        """Move what is pending in a conversation to the right backlog."""
        stream, counted = conversation.stream, conversation.counted
        backlog = self._stuck if conversation.is_counted_as_stuck else self._moving
        backlog.numbers -= counted.numbers
        backlog.size -= counted.size
        conversation.is_counted_as_stuck = self._is_stuck(conversation, conversation.route)
        counted.numbers, counted.size = stream.end - stream.base, stream.size
        backlog = self._stuck if conversation.is_counted_as_stuck else self._moving
        backlog.numbers += counted.numbers
        backlog.size += counted.size

    def _count_all(self) -> None:
        for conversation in self._sending.values():
            self._count(conversation)

    # what the owner says

    def note_server(self, is_silent: bool) -> None:
        """Note whether the server does not answer."""
        self._server_is_silent = is_silent
        self._count_all()

    def note_offline(self, is_offline: bool) -> None:
        """Note whether the client is deregistered."""
        self._is_offline = is_offline
        self._count_all()

    def register(self, now: float, account: Account) -> None:
        """Learn the session that the server has given: it goes into every ``save``."""
        self._account = account
        for conversation in self.conversations.values():
            conversation.use(account)
        for nick, conversation in self._sending.items():
            conversation.on_registered(now)
            self._touched[nick] = conversation

    def open(self, now: float, nick: str, place: Place | None, stream: int) -> None:
        """Begin a conversation with a recipient that has none; ``stream`` is a random id."""
        conversation = Conversation(self.me, nick, stream, self._ack_timeout)
        conversation.locate(now, place)
        conversation.use(self._account)
        self._forget_idle()
        self.conversations[nick] = conversation
        self.by_stream[stream] = conversation

    def send(self, now: float, nick: str, texts: Sequence[str], at: float) -> tuple[int, int]:
        """Queue texts for a recipient with whom a conversation is open; ``at``: the wall-clock time.

        Return the id of its stream, and the number that the first text has there.
        """
        conversation = self.conversations[nick]
        first = conversation.stream.end
        conversation.send(now, texts, at)
        self._sending[nick] = self._touched[nick] = conversation
        self._count(conversation)
        return conversation.id, first

    def _forget_idle(self) -> None:
        if len(self.conversations) >= CONVERSATIONS_KEPT:
            idle = next((nick for nick in self.conversations if nick not in self._sending), None)
            if idle is not None:
                del self.by_stream[self.conversations.pop(idle).id]
                # It may still stand here, after an ack that came twice. The next conversation with the same nick must
                # not be settled by it.
                for collection in (self.with_events, self.awaiting_recount, self._touched):
                    collection.pop(idle, None)

    def locate(self, now: float, nick: str, place: Place | None) -> None:
        """Learn that the table has changed for ``nick``."""
        conversation = self.conversations.get(nick)
        if conversation is not None:
            conversation.locate(now, place)
            self._touched[nick] = conversation

    def server_heard(self, now: float) -> None:
        """Learn that the server is there."""
        for nick, conversation in self._sending.items():
            if conversation.route is not DIRECT:
                conversation.server_heard(now)
                self._touched[nick] = conversation

    # what the network says, and who it is: an address, a nick whose channel it has come in, or None, the server

    def _addressed(self, info: Info, who: Address | str | None) -> Conversation | None:
        """Return the conversation that an answer is about, if it may be answered by ``who``."""
        conversation = self.by_stream.get(info["stream"])
        fits = conversation is not None and (who is None or who in conversation.addresses or who == conversation.peer)
        return conversation if fits else None

    def on_ack(self, now: float, info: Info, who: Address | str | None) -> None:
        """Process an ``ack``."""
        conversation = self._addressed(info, who)
        if conversation is not None:
            conversation.on_ack(now, info["next"], info["have"], info["room"], SAVE if who is None else DIRECT)
            if conversation.stream.end > conversation.stream.base:
                self._touched[conversation.peer] = conversation
            else:
                self.with_events[conversation.peer] = conversation      # there is nothing to send, so no need to poll

    def on_nack(self, now: float, info: Info, who: Address | str | None) -> None:
        """Process a ``nack``."""
        conversation = self._addressed(info, who)
        if conversation is not None:
            conversation.on_nack(now, info["first"], info["last"], info["reason"], SAVE if who is None else DIRECT)
            self._touched[conversation.peer] = conversation

    def on_exists(self, now: float, info: Info, reachable: Address | None) -> None:
        """Process an ``exists``; ``reachable``: the address in its entry, None if it cannot be sent to from here."""
        conversation = self._addressed(info, None)
        if conversation is not None and conversation.peer == info["entry"][0]:
            conversation.on_exists(now, info["n"], reachable, info.get("knocks", False))
            self._touched[conversation.peer] = conversation

    def on_knock(self, now: float, conversation: Conversation, address: Address) -> None:
        """Learn that a recipient has sent something straight from ``address``, where it may be."""
        conversation.on_knock(now, address)
        self._touched[conversation.peer] = conversation

    # what time says

    def due(self) -> float:
        """Return when ``poll`` must be called even if nothing happens."""
        if self._touched:
            return -NEVER
        return self._dues[0][0] if self._dues else NEVER

    def _schedule(self, nick: str, due: float) -> None:
        self._due[nick] = due
        heapq.heappush(self._dues, (due, nick))

    def _wake(self, now: float) -> None:
        while self._dues and self._dues[0][0] <= now:
            when, nick = heapq.heappop(self._dues)
            if self._due.get(nick) != when:
                continue
            del self._due[nick]
            conversation = self.conversations.get(nick)
            due = conversation.due() if conversation is not None else NEVER
            if conversation is not None and due <= now:
                self._touched[nick] = conversation
            elif due < NEVER:
                self._schedule(nick, due)

    def poll(self, now: float, drained: bool = True,
             guard: Guard | None = None) -> Iterator[tuple[Conversation, list[Outgoing]]]:
        """Yield the datagrams to send now, and where to (None: the server); see ``Conversation.poll``."""
        if self._dues and self._dues[0][0] <= now:
            self._wake(now)
        for nick in list(islice(self._touched, POLLS_PER_TURN)):
            conversation = self._touched.pop(nick)
            yield conversation, conversation.poll(now, drained, guard)
            due = conversation.due()
            if due < self._due.get(nick, NEVER):
                self._schedule(nick, due)
            if (conversation.events or conversation.is_counted_as_stuck
                    or self._is_stuck(conversation, conversation.route)):
                self.with_events[nick] = conversation

    def pop_events(self) -> list[tuple[str, list[Event]]]:
        """Return, and forget, what has happened to messages: recipients, and the events (or none) of each.

        This includes conversations that were not polled since. What these events close is pending until ``recount``, so
        that the owner can tell the user first: the next command must not overtake the line that made room for it.
        """
        with_events, self.with_events = self.with_events, {}
        if self._touched:
            with_events.update(self._touched)
        found = []
        for nick, conversation in with_events.items():
            found.append((nick, conversation.events))
            conversation.events = []
            self.awaiting_recount[nick] = conversation
        return found

    def recount(self) -> None:
        """Count again what is pending in the conversations whose events were taken."""
        conversations, self.awaiting_recount = self.awaiting_recount, {}
        for nick, conversation in conversations.items():
            self._count(conversation)
            if not conversation.counted.numbers:
                self._sending.pop(nick, None)


class Observer:
    """Sees what becomes of messages, before the user is told; for tests, which override what they need."""

    def on_event(self, nick: str, event: Event) -> None:
        """Something has happened to messages for ``nick``; its lines follow."""

    def on_unknown(self, nick: str, count: int) -> None:
        """``count`` texts were refused before they were queued: the recipient is not known."""

    def on_too_long(self, nick: str) -> None:
        """A text was refused before it was queued: it is too long."""


# --- two who are behind routers -------------------------------------------------------------------------------

class Whereabouts(Protocol):
    """What ``Meetings`` asks the client table."""

    def reach(self, host: str, port: int) -> Address | None: ...        # how we reach an address; None: we cannot
    def are_behind_one_router(self, nick: str) -> bool: ...             # we, and that one


CALLERS_KEPT = 64         # clients in our own network that have called; whoever called first is forgotten first


class Meetings:
    """How two clients reach each other whose routers let in only what they take for an answer::

        alice                   server                  bob
          chat ------------------------------------X        his router drops it
          meet ----------------->
                                  call ----------------->    alice is at this address
          <----------------------------------------- knock   his router now takes what she sends for the answer
          chat -------------------------------------------->

    alice's part is that of ``Reach``. Two in the same private network may not reach each other by way of their router:
    so ``call`` also tells alice's own address if the server sees both at the same one, and bob knocks there, too, if it
    is in the network of his own. Then he accepts her chat from there, and she his knock.
    """

    def __init__(self, send: Callable[[bytes, Address], None], outbox: Outbox, table: Whereabouts,
                 own_address: Callable[[], Address | None], servers: Callable[[], Sequence[Address]],
                 now: Callable[[], float]) -> None:
        """``own_address``: returns ours, if it is one of a private network; ``servers``: where the server may be."""
        self._send, self._outbox, self._table, self._now = send, outbox, table, now
        self._own_address, self._servers = own_address, servers
        self._beside: dict[str, Address] = {}       # where those are who have called from our own network

    def _is_beside_us(self, address: Address) -> bool:
        own = self._own_address()
        return (own is not None and address != own and address not in self._servers()
                and is_private(address[0]) and are_neighbours(own[0], address[0]))

    def on_call(self, info: Info) -> None:
        """Knock where somebody is who does not get through to us."""
        address, beside = self._table.reach(info["host"], info["port"]), info.get("own")
        addresses = [address] if address is not None and address not in self._servers() else []
        if beside is not None and self._is_beside_us((beside[0], beside[1])):
            self._beside[info["from"]] = beside[0], beside[1]
            if len(self._beside) > CALLERS_KEPT:
                del self._beside[next(iter(self._beside))]
            addresses.append((beside[0], beside[1]))
        for one in addresses:
            self._send(encode("knock", {"stream": info["stream"]}), one)

    def on_knock(self, info: Info, address: Address) -> None:
        """Send again at once to somebody who has knocked, from where the table says, or in our own network."""
        conversation = self._outbox.by_stream.get(info["stream"])
        if conversation is None or conversation.place is None or not conversation.place.online:
            return
        is_beside = self._is_beside_us(address) and self._table.are_behind_one_router(conversation.peer)
        if address == conversation.place.address or is_beside:
            self._outbox.on_knock(self._now(), conversation, address)

    def note_chat(self, nick: str, address: Address) -> None:
        """Note that somebody's chat came straight from ``address``, where they are: we reach them there, too."""
        conversation = self._outbox.conversations.get(nick)
        if conversation is not None and conversation.route is RELAY:
            self._outbox.on_knock(self._now(), conversation, address)

    def admits(self, nick: str, address: Address) -> bool:
        """Return whether ``nick`` has called from ``address``, in our own network."""
        return self._beside.get(nick) == address

    def holds(self, address: Address) -> bool:
        """Return whether anybody has called from ``address``, in our own network."""
        return address in self._beside.values()

    def forget(self, nick: str) -> None:
        """Forget where somebody was: the table has changed."""
        self._beside.pop(nick, None)


# --- what comes in --------------------------------------------------------------------------------------------

HOLD_TIME = 5.0           # s that a stream waits for the server to say whether missing messages are in the mail
STREAMS_PER_SENDER = 8    # that can go on at once, of each peer; the longest silent one is evicted first
STREAMS_IN_ALL = 2048     # the same of all peers together
PIECE_MEMORY = 4 * MAX_PIECE    # bytes that a piece may take in memory: Python uses 4 for a character
INBOX_LIMIT = 64 * 2 ** 20      # bytes of all streams together, counting ``PIECE_MEMORY`` for every number


class Delivery(NamedTuple):
    """Texts to show, in order, and the function to call with the number of them that are written.

    ``times``: when each was sent, for mail; empty for chat. ``stream``, ``first``: the sender's stream, and the number
    of the first text in it. A delivery without texts is a mark: its ``written`` is to be called, with 0, once
    everything that was delivered before is written.
    """

    sender: str
    texts: list[str]
    times: list[float]
    written: Callable[[int], None]
    stream: int = 0
    first: int = 0
    proof: str = ""             # of mail: how it is proved to be from its sender
    numbers: int = 1            # that each text takes


UNPROVEN_MARK = "?"         # before the sender, in no nick: the streams of what is not proved to be from there


def no_ack(texts: int) -> None:
    """Do nothing: what was written is behind something that must not be acked."""


OLD_STREAMS = 64            # of the one who is asked, in which something came before the question
Note = Callable[[str, int, int, int], None]     # sender, stream, first number, the one behind the last


class Selection:
    """What a client shows that wants some messages only: the next ``count``, of one ``sender``, or the answer of one.

    All others are neither shown nor acked, so whoever has them keeps them for the next run: the server, or the sender,
    who takes them there when he gets no ack, or sees us leave. An ack cannot leave out a number. So behind a message
    that is passed over, nothing of that stream is acked; what is shown all the same is noted (``note``), and
    ``Inbox.restore`` tells the next run. What is acked is noted as well: the ack may get lost while we leave.

    Only what comes behind the question may be its answer: no letter below ``mail_from``, nothing of ``_old``. What came
    straight before it may be kept by the server after it, and the other way round: then it is old on both ways::

        before the question is out (``ask`` alone)      all is old: ``_old`` says of which streams, and up to where;
                                                        ``mail_from`` follows what the server says of the mail
        open (``is_open``)                              what is wanted and not old is shown, the rest is passed over
        ``left`` is 0                                   all is passed over

    Once something was passed over, what follows in that stream is not acked: ``_passed``, for mail ``has_passed_mail``.
    """

    def __init__(self, count: int, sender: str | None = None, asks: bool = False, note: Note | None = None) -> None:
        """``sender``: None for anybody. ``note``: keeps on the disk what was shown; None: nothing is kept there."""
        self.left = count           # messages that are still to be handed out ...
        self.unwritten = count      # ... and to be written
        self.mail_from: int | None = None if asks else 1    # the number of the first letter that counts; None: unknown
        self.has_asked: Callable[[], bool] = lambda: True
        self.has_passed_mail = False
        self._is_told = False       # how long the present stream of mail was when the server was asked first
        self.asks, self._note = asks, note
        self._sender = None if sender is None else folded(sender)       # folded, a nick may be empty
        self._old: dict[tuple[str, int], int] = {}          # by sender and stream: below which number all is old
        self._passed: set[tuple[str, int]] = set()          # the streams of which something was passed over

    @property
    def is_open(self) -> bool:
        """Whether anything may be shown now."""
        return self.left > 0 and self.mail_from is not None

    @property
    def is_early(self) -> bool:
        """Whether the client must be online before the mail of others is acked: that stays unacked."""
        return self._sender is not None

    def begin_mail(self) -> None:
        """Expect another stream of mail, numbered from 1 again.

        What was old when the question went out is still at its head: nothing of it was acked.
        """
        self.has_passed_mail = self._is_told = False
        if self.asks and not self.has_asked():
            self.mail_from = None

    def note_mail(self, last: int) -> None:
        """Note that the server has letters up to number ``last``: what is there before the question is no answer."""
        if not self.asks:
            return
        if not self.has_asked():
            self.mail_from = max(self.mail_from or 1, last + 1)
        elif not self._is_told:     # it may have lost what it had before
            self.mail_from = min(self.mail_from or last + 1, last + 1)
        self._is_told = True

    def is_old(self, number: int) -> bool:
        """Return whether no letter up to ``number`` in the mail may be shown."""
        return self.mail_from is not None and number < self.mail_from

    def admits(self, info: Info) -> bool:
        """Return whether a ``chat`` may be accepted."""
        sender, stream = info["from"], info["stream"]
        if self._sender not in (None, folded(sender)):
            return False
        if not self.has_asked():
            self._note_old((sender, stream), info["n"] + len(info["text"]))
            return False
        return True

    def _note_old(self, key: tuple[str, int], end: int) -> None:
        """Note that everything below number ``end`` of a stream is older than the question, whichever way it comes."""
        if key in self._old or len(self._old) < OLD_STREAMS:
            self._old[key] = max(end, self._old.get(key, 1))

    def takes(self, number: int, letters: Sequence[Any]) -> bool:
        """Return whether a text is shown, which has that ``number`` in the mail; note if it is passed over.

        ``letters``: its pieces. If it is old, so is the copy of it that came straight, or comes yet.
        """
        (sender, stream, _), first = letters[0][:2]
        key = sender, stream
        is_wanted = self._sender is None or (folded(sender) == self._sender and proof_of(letters, 1) not in DOUBTS)
        is_new = self.mail_from is not None and number >= self.mail_from and first >= self._old.get(key, 1)
        if self.asks and is_wanted and not is_new:
            self._note_old(key, first + len(letters))
        can_note = self._note is not None or not (self.has_passed_mail or key in self._old)
        if self.left and is_wanted and is_new and can_note:
            return True
        self.has_passed_mail = True
        return False

    def cut(self, deliveries: Iterator[Delivery]) -> Iterator[Delivery]:
        """Yield what is shown of ``deliveries``."""
        for delivery in deliveries:
            key = delivery.sender, delivery.stream
            texts, times, first = delivery.texts, delivery.times, delivery.first
            if texts and not times and first < self._old.get(key, 1):
                self._passed.add(key)
                texts, first = texts[self._old[key] - first:], self._old[key]
            is_passed = key in self._passed and not times
            if not delivery.texts and not is_passed:
                yield delivery
            if not texts or (is_passed and self._note is None):
                continue
            texts = texts[:self.left]
            self.left -= len(texts)
            written = self._noting(delivery, first, no_ack if is_passed else delivery.written)
            yield delivery._replace(texts=texts, times=times[:len(texts)], first=first, written=written)
            if not self.left:
                return

    def _noting(self, delivery: Delivery, first: int, written: Callable[[int], None]) -> Callable[[int], None]:
        """Return what hears how many texts from ``first`` on are written, notes them, and then calls ``written``."""
        sender = UNPROVEN_MARK + delivery.sender if delivery.proof in DOUBTS else delivery.sender

        def on_written(texts: int) -> None:
            nonlocal first
            if texts and self._note is not None:
                self._note(sender, delivery.stream, first, first + texts * delivery.numbers)
            first += texts * delivery.numbers
            self.unwritten -= texts
            written(texts)
        return on_written


class Inbox:
    """All that comes in for one client, and the order in which it is shown.

    The owner passes on ``chat`` and ``mail``, takes deliveries while its output has room, and sends the ``acks``. While
    a stream is held and ``is_asking``, it asks the server how much mail there is, and passes on the ``answer``.

    ``on_release`` is an observer: it hears the sender of a held stream that goes on although the server has not
    answered, or its mail has not come, so that what comes next from that sender may be out of order.
    """

    def __init__(self, selection: Selection | None = None) -> None:
        """``selection``: what is wanted, if that is not all."""
        self.selection = selection
        self.buffered = 0           # numbers of all streams that wait here
        self.stream_count = 0       # of peers
        self.holding: dict[Incoming, None] = {}     # the streams that are held
        self.unacked: dict[Incoming, None] = {}     # the streams that owe an ack; each knows this dictionary
        self.duplicates = DuplicateFilter()         # of evicted streams
        self.on_release: Callable[[str], None] = lambda sender: None
        self._streams: dict[str, dict[int, Incoming]] = {}      # of each sender; longest silent first
        self._buffering: dict[Incoming, None] = {}              # those with numbers that wait; longest silent first
        self._readable: dict[Incoming, None] = {}               # those of peers with texts that can be handed out
        self._mail: Incoming | None = None

    @property
    def streams(self) -> Mapping[str, Mapping[int, Incoming]]:
        """The streams of each sender, by their ids; the sender who was silent longest comes first."""
        return self._streams

    def restore(self, shown: Sequence[tuple[str, int, int, int]]) -> None:
        """Learn what other runs have shown, see ``Selection``: sender, stream, and the numbers [first, end)."""
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for sender, id_, first, end in shown:
            if 0 < first < end:
                found.setdefault((sender, id_), []).append((first, end))
        for (sender, id_), spans in found.items():
            incoming = self._streams.get(sender, {}).get(id_)
            if incoming is not None:
                self._readable.pop(incoming, None)
                incoming.stream.note_shown(spans)
                self._arrived(incoming)
                continue
            stream, snapshot = ReceiveStream(id_), self.duplicates.pop(sender, id_)
            if snapshot is not None:
                stream.restore(snapshot)
            stream.note_shown(spans)
            stream.take()
            stream.all_written()
            self.duplicates.add(sender, id_, stream.snapshot())

    # what arrives

    def on_chat(self, now: float, info: Info, address: Address, accept: bool = True) -> bool:
        """Process a ``chat`` whose sender is proved. Without ``accept`` it is only acked, as far as it is known.

        Return whether a new stream is held as a whole from now on: the server is to be asked at once.
        """
        if self.selection is not None and not self.selection.admits(info):
            return False
        incoming = self._incoming(info["from"], info["stream"])
        incoming.address = address
        self.unacked[incoming] = None
        if accept:
            stream = incoming.stream
            stream.on_data(info["n"], info["text"], info.get("more", ()), info["base"])
            is_first = not incoming.has_chatted and self.selection is not None and self.selection.is_early
            incoming.has_chatted = True
            if is_first:
                incoming.is_held_whole = True
            self._arrived(incoming)
            if is_first or (stream.base > stream.ready and stream.missing):
                self._hold(now, incoming)
            return is_first
        return False

    def on_mail(self, now: float, info: Info, opened: Callable[[Any], Opened] = opened_plain) -> None:
        """Process a ``mail`` of the server; ``opened``: see ``letters_of``."""
        if self._mail is None or self._mail.stream.id != info["stream"]:
            if self._mail is not None:
                self.forget_mail(now)
            self._mail = Incoming(ReceiveStream(info["stream"]), self.unacked)
        items, more = letters_of(info, opened)
        stream = self._mail.stream
        stream.on_data(info["n"], items, more, info["base"])
        stream.advance(info["base"])
        self.unacked[self._mail] = None
        self._arrived(self._mail)

    def forget_mail(self, now: float) -> None:
        """Begin a session, and with it another stream of mail: what the server has said of its length is void."""
        for incoming in self.holding:
            incoming.held_since, incoming.awaited_mail = now, None
        if self.selection is not None:
            self.selection.begin_mail()
        if self._mail is not None:
            self._forget(self._mail)
            self._mail = None

    def _incoming(self, sender: str, stream: int) -> Incoming:
        """Return a stream of a sender, which becomes the one that was heard last."""
        streams = self._streams[sender] = self._streams.pop(sender, {})
        incoming = streams.pop(stream, None)
        if incoming is None:
            if len(streams) >= STREAMS_PER_SENDER:
                self._evict_idle(sender)
            elif self.stream_count >= STREAMS_IN_ALL:
                self._evict_idle(next(iter(self._streams)))
            self._streams[sender] = streams
            incoming = Incoming(ReceiveStream(stream), self.unacked)
            incoming.sender = sender
            snapshot = self.duplicates.pop(sender, stream)
            if snapshot is not None:
                incoming.stream.restore(snapshot)
            self.stream_count += 1
        streams[stream] = incoming
        return incoming

    def _evict_idle(self, sender: str) -> None:
        """Make space: evict the longest silent of a sender's streams, but none whose texts wait to be written."""
        streams = self._streams[sender]
        for number in list(islice(streams, STREAMS_PER_SENDER)):
            incoming = streams.pop(number)
            if not incoming.stream.is_idle:
                streams[number] = incoming
            else:
                self._forget(incoming)
                self.duplicates.add(sender, number, incoming.stream.snapshot())
                self.stream_count -= 1
                if len(streams) < STREAMS_PER_SENDER:
                    break
        else:
            self._streams[sender] = self._streams.pop(sender)   # the next time, another sender's are looked at
        if not streams:
            del self._streams[sender]

    def _forget(self, incoming: Incoming) -> None:
        for collection in (self._readable, self.unacked, self.holding, self._buffering):
            collection.pop(incoming, None)
        self.buffered -= incoming.last_count

    def _arrived(self, incoming: Incoming) -> None:
        if incoming.last_count:
            del self._buffering[incoming]
        self._count(incoming)
        stream = incoming.stream
        if stream.taken < stream.ready and incoming is not self._mail and not incoming.is_held_whole:
            self._readable[incoming] = None
        while self.buffered * PIECE_MEMORY > INBOX_LIMIT:
            self._give_back(next(iter(self._buffering)))

    def _give_back(self, incoming: Incoming) -> None:
        """Drop what waits of a stream, to make room for one that was heard later; its sender still has it."""
        incoming.stream.give_back(incoming.stream.taken)
        self._readable.pop(incoming, None)
        self._count(incoming)

    def _count(self, incoming: Incoming) -> None:
        buffered = incoming.stream.buffered
        self.buffered += buffered - incoming.last_count
        incoming.last_count = buffered
        if buffered:
            self._buffering[incoming] = None
        else:
            self._buffering.pop(incoming, None)

    def acks(self) -> list[tuple[Info, Address | None, str]]:
        """Return the ``ack`` of every stream that owes one, and where to and to whom (None: the server) it goes."""
        grow = self.buffered * PIECE_MEMORY < INBOX_LIMIT
        acks = []
        for incoming in self.unacked:
            if incoming.address is not None or incoming is self._mail:      # else it was only named in mail
                acks.append((incoming.stream.ack(grow), incoming.address, incoming.sender))
        self.unacked.clear()
        return acks

    # messages that are missing

    @property
    def is_asking(self) -> bool:
        """Whether a stream waits for the server to say how much mail there is."""
        return any(incoming.awaited_mail is None for incoming in self.holding)

    def _hold(self, now: float, incoming: Incoming) -> None:
        if incoming not in self.holding:
            incoming.held_since, incoming.held_base, incoming.awaited_mail = now, incoming.stream.base, None
            self.holding[incoming] = None

    def answer(self, asked: float, mail: int) -> None:
        """Process the server's answer to a question of the time ``asked``: the number of the last mail there is."""
        if self.selection is not None and self.selection.is_old(mail):
            mail = 0        # nothing there is wanted
        for incoming in self.holding:
            if incoming.awaited_mail is None and asked >= incoming.held_since:
                incoming.awaited_mail = mail

    def expire(self, now: float) -> None:
        """Release the streams whose question was not answered for ``HOLD_TIME``.

        An answer holds as long, too: if the mail has not come by then, the server is asked again. But a stream in which
        nothing is missing goes on.
        """
        for incoming in list(self.holding):
            if now >= incoming.held_since + HOLD_TIME:
                if incoming.awaited_mail is None or not incoming.stream.missing:
                    self.on_release(incoming.sender)
                    self._release(now, incoming)
                else:
                    incoming.held_since, incoming.awaited_mail = now, None

    def _release(self, now: float, incoming: Incoming) -> None:
        """Go on behind the missing numbers; hold again if more have become missing since."""
        del self.holding[incoming]
        incoming.is_held_whole = False
        incoming.stream.advance(incoming.held_base, elsewhere=True)
        self.unacked[incoming] = None
        self._arrived(incoming)
        if incoming.stream.missing:
            self._hold(now, incoming)

    def stop_asking(self) -> None:
        """Wait for no answer any more: the client leaves."""
        for incoming in self.holding:
            incoming.is_held_whole = False
        self.holding.clear()

    # what is shown

    @property
    def has_chat(self) -> bool:
        """Whether chat is ready to be shown."""
        return bool(self._readable) and (self.selection is None or self.selection.is_open)

    @property
    def is_ready(self) -> bool:
        """Whether anything is ready to be shown."""
        mail = self._mail
        if self.selection is not None and not self.selection.is_open:
            return False
        return bool(self._readable) or (mail is not None and mail.stream.taken < mail.stream.ready)

    def take(self, now: float, has_room: Callable[[], bool]) -> Iterator[Delivery]:
        """Hand out what is ready as long as ``has_room()``: chat first, and mail when no chat is left."""
        deliveries = self._take(now, has_room)
        if self.selection is None:
            return deliveries
        return self.selection.cut(deliveries) if self.selection.is_open else iter(())

    def _take(self, now: float, has_room: Callable[[], bool]) -> Iterator[Delivery]:
        while self._readable and has_room():
            yield from self._take_chat(next(iter(self._readable)))
        if self._mail is not None and not self._readable and has_room():
            yield from self._take_mail(self._mail)
        if self.holding:
            reached = self._mail.stream.taken if self._mail is not None else 1
            for incoming in list(self.holding):
                if incoming.awaited_mail is not None and reached > incoming.awaited_mail:
                    self._release(now, incoming)

    def _take_chat(self, incoming: Incoming) -> list[Delivery]:
        stream, deliveries = incoming.stream, []
        for run in stream.take(MAX_ITEMS):
            texts = ["".join(run.items)] if run.more else run.items
            numbers = run.numbers if run.more else 1
            deliveries.append(Delivery(incoming.sender, texts, [], incoming.written, stream.id, run.first, "", numbers))
        self._count(incoming)
        if stream.taken == stream.ready:
            self._readable.pop(incoming, None)
        return deliveries

    def _take_all_chat(self, incoming: Incoming) -> Iterator[Delivery]:
        while incoming.stream.taken < incoming.stream.ready:
            yield from self._take_chat(incoming)

    def _take_mail(self, mail: Incoming) -> Iterator[Delivery]:
        for run in mail.stream.take(MAX_ITEMS):
            if self.selection is not None:
                yield from self._select_letters(mail, run, self.selection)
            elif run.more:
                yield from self._take_letters(mail.written, run.items, ["".join(letter[2] for letter in run.items)])
            elif run.items:
                for letters in runs_of_one_origin(run.items):
                    yield from self._take_letters(mail.written, letters, [letter[2] for letter in letters])
            else:
                yield Delivery("", [], [], mail.written)
        self._count(mail)

    def _select_letters(self, mail: Incoming, run: Run, selection: Selection) -> Iterator[Delivery]:
        """Hand out the letters of a run that are wanted. What is passed over is left as if it had not come."""
        if not run.items and not selection.has_passed_mail:
            yield Delivery("", [], [], mail.written)
        for number, letters in [(run.first, run.items)] if run.more else [
                (number, [letter]) for number, letter in enumerate(run.items, run.first)]:
            if selection.takes(number, letters):
                written = no_ack if selection.has_passed_mail else mail.written
                yield from self._take_letters(written, letters, ["".join(letter[2] for letter in letters)])

    def _take_letters(self, written: Callable[[int], None], letters: Sequence[Any],
                      texts: list[str]) -> Iterator[Delivery]:
        """Hand out texts of consecutive numbers of one stream, except for those that another route has shown.

        Chat of the same stream is handed out before and after them. Before: all that is ready there has lower numbers.
        After: the claim may have closed the gap in front of chat that came early. If the claim fails, some of the
        letters may still be new (the route changed in the middle of the run), so each is tried alone.

        What is doubtful may have made-up numbers: it must not be in the way of what the sender has really said.
        """
        (sender, stream, _), number = letters[0][:2]
        proof = proof_of(letters, len(texts))
        incoming = self._incoming(UNPROVEN_MARK + sender if proof in DOUBTS else sender, stream)
        if number > incoming.stream.reached:    # if their sender has not closed the numbers below, no ack says so
            incoming.stream.advance(number, elsewhere=True)
        yield from self._take_all_chat(incoming)
        if incoming.stream.claim(number, len(letters)):
            times = [letter[3] for letter in letters[:len(texts)]]
            yield Delivery(sender, texts, times, written, stream, number, proof, len(letters) // len(texts))
        elif len(texts) == 1:
            yield Delivery("", [], [], lambda _: written(1))
        else:
            for letter, text in zip(letters, texts):
                yield from self._take_letters(written, [letter], [text])
        yield from self._take_all_chat(incoming)
