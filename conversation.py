"""What one client sends and receives, over all routes."""
from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from itertools import islice
from typing import (Any, NamedTuple)
from collections.abc import Callable, Collection, Iterator, Sequence

from protocol import (MAX_DATAGRAM, MAX_ITEMS, MAX_NUMBER, MAX_PIECE, PIECE_MEMORY, SESSION_BYTES, Address, Info,
                      are_short, encode, join_pieces, letters_of, runs_of_one_stream, split_text)
from stream import INITIAL_TIMEOUT, MAX_TIMEOUT, NEVER, NOTHING_DELIVERED, Packet, ReceiveStream, SendStream, Snapshot


# --- conversations --------------------------------------------------------------------------------------------

ACK_TIMEOUT = 0.5         # s; the original's 500 ms: no ack at all in that time, and the messages go to the server
SERVER_ATTEMPTS = 5       # times the server is asked before it counts as silent
SERVER_INTERVAL = 0.5     # s between them
STALL_TIMEOUT = 30.0      # s without progress on one route, whatever the acks say: so that a script always ends
STUCK_TIMEOUT = 60.0      # s without progress on all routes together, however often the recipient moves
RELAY_TIME = 60.0         # s during which somebody who cannot be reached directly is not tried again
ADDRESSES_KEPT = 4        # of a recipient, from which an ack still counts
TIMES_KEPT = 8192         # runs of sending times; more sends than a client queues

DIRECT, SAVE, RELAY = "direct", "save", "relay"     # the routes
RECEIVED, SAVED, REFUSED, SILENT = "received", "saved", "refused", "silent"
NO_ACK, OFFLINE, EXISTS = "no-ack", "offline", "exists"


class Event(NamedTuple):
    """What happened to so many ``messages`` of a conversation; ``reason`` says why they were refused.

    ``first``: the number from which on they are; ``relayed``: on the route RELAY.
    """

    kind: str
    messages: int
    reason: str = ""
    first: int = 0
    relayed: bool = False


class Place(NamedTuple):
    """What a client's table says of a recipient; ``address`` is None where it cannot send to."""

    online: bool
    address: Address | None


class Conversation:
    """The life of one client's sends to one recipient.

    ``send`` queues texts; ``poll`` gives the datagrams that are due, as (bytes, address), where the address None
    means the server. ``events`` collects what happened, in order, for the owner to take away. A stream has one
    route at a time; a change of route takes everything held along, lowest first, in order:

        DIRECT --no ack for 500 ms, "not-me", offline--> SAVE --"exists"--> DIRECT, once more --no ack--> RELAY
        DIRECT --no progress for 30 s--> RELAY --a minute, or a new address--> DIRECT

    Each closing event (RECEIVED, SAVED, REFUSED) counts whole messages; the others come before it, each at
    most once for a message. ``stuck`` tells that nothing moves: the server is silent, or has no room, or a minute
    has brought nothing on any route.
    """

    def __init__(self, me: str, peer: str, stream: int, ack_timeout: float = ACK_TIMEOUT) -> None:
        self.me = me
        self.peer = peer
        self.ack_timeout = ack_timeout
        self.session = bytes(SESSION_BYTES)     # the owner's, at the server
        self.events: list[Event] = []
        self.route = DIRECT
        self.place: Place | None = None
        self.stuck = False
        self.addresses: deque[Address] = deque(maxlen=ADDRESSES_KEPT)   # where DIRECT went: answers count from there
        self._address: Address | None = None     # where it goes now
        self._last_try = False                      # DIRECT is the retry after EXISTS
        self._relay_until = -NEVER
        self._patience = ack_timeout                # s of silence on this route that mean something
        self._silent_since = NEVER                  # when the first datagram went out that nobody answered
        self._progressed = NEVER                    # when the stream last made progress, or began
        self._moved = NEVER                         # the same, or when it changed its route
        self._deadline = -NEVER                     # when ``_judge`` has something to decide; never too late
        self._follows_table = False                 # DIRECT was picked from the place that the table still gives
        self._announced_silent = False
        self._said: dict[str, int] = {}             # up to which number an event was told
        self._times: tuple[list[int], list[float]] = ([], [])    # from which number on, which sending time
        self.counted = (False, 0, 0)                # as the outbox has: whether stuck, numbers, bytes
        self._id = stream
        self.stream = SendStream(stream, self._capacity(DIRECT), min(INITIAL_TIMEOUT, ack_timeout / 2))

    # sizes

    def _capacity(self, route: str) -> int:
        """Bytes that the items may take in a datagram of this route: what is left beside the largest header."""
        return MAX_DATAGRAM - len(self._frame(route, MAX_NUMBER, MAX_NUMBER, [], [MAX_NUMBER], [])) - 4

    def _sizes(self, texts: Sequence[str], first: int, continued: Collection[int]) -> list[int]:
        """Encoded bytes of each text: 3 for its header, 9 for its time, and 9 where ``more`` names it."""
        extra = 3 if self.route == DIRECT else 12
        if len(texts) == 1 and not continued:
            return [len(texts[0].encode()) + extra]
        if "".join(texts).isascii():
            sizes = [len(text) + extra for text in texts]
        else:
            sizes = [len(text.encode()) + extra for text in texts]
        if continued:
            sizes = [size + 9 * (number in continued) for number, size in enumerate(sizes, first)]
        return sizes

    def _frame(self, route: str, first: int, base: int, texts: list[str], more: Sequence[int],
               times: Sequence[float]) -> bytes:
        info: Info = {"to": self.peer, "stream": self._id, "n": first, "base": base, "text": texts}
        if more:
            info["more"] = more
        if route == DIRECT:
            info["from"] = self.me
            return encode("chat", info)
        info.update(session=self.session, at=times, relay=route == RELAY)       # the session says from whom
        return encode("save", info)

    def _more(self, packet: Packet) -> list[int]:
        """The numbers of a packet that the next one continues."""
        return [number for number in range(packet.first, packet.end) if number in self.stream.continued]

    def _times_of(self, packet: Packet) -> list[float]:
        """When each text of a packet was sent."""
        starts, values = self._times
        return [values[bisect_right(starts, number) - 1] for number in range(packet.first, packet.end)]

    # what the owner says

    @property
    def pending(self) -> int:
        """How many numbers are not closed yet."""
        return self.stream.pending

    @property
    def messages(self) -> int:
        """How many messages are not closed yet."""
        return self._count(self.stream.base, self.stream.end)

    def texts(self) -> list[str]:
        """The messages that are not closed yet, in order."""
        return join_pieces(self.stream.base, list(self.stream.pending_items()), self.stream.continued)

    def send(self, now: float, texts: Sequence[str], at: float) -> None:
        """Queues texts (each at most ``MAX_TEXT`` bytes), sent at the wall-clock time ``at``."""
        stream = self.stream
        if stream.end == stream.base:
            self._moved = self._progressed = now
            self._silent_since = NEVER
            if not self._follows_table:
                self._pick_route(now)
        starts, times = self._times
        starts.append(stream.end)
        times.append(at)
        if len(starts) > TIMES_KEPT:
            self._forget_times()
        if are_short(texts, MAX_PIECE):
            stream.queue(texts, self._sizes(texts, 0, ()))
        else:
            self._queue_long(texts)
        if self.route != DIRECT and self.place is not None and not self.place.online:
            self._say(OFFLINE)

    def _forget_times(self) -> None:
        starts, times = self._times
        keep = max(0, bisect_right(starts, self.stream.base) - 1)
        self._times = (starts[keep:], times[keep:])

    def _queue_long(self, texts: Sequence[str]) -> None:
        items: list[str] = []
        continued: set[int] = set()
        for text in texts:
            number = self.stream.end + len(items)
            cut = split_text(text)
            items.extend(cut)
            continued.update(range(number, number + len(cut) - 1))
        self.stream.queue(items, self._sizes(items, self.stream.end, continued), continued)

    def locate(self, now: float, place: Place | None) -> None:
        """Takes what the table says of the recipient, whenever its entry was changed (None: it is not known)."""
        self.place = place
        self._follows_table = False
        self._relay_until = -NEVER
        if not self.pending:
            return
        if place is None or not place.online:
            if self.route == DIRECT:
                if place is not None:
                    self._say(OFFLINE)
                self._go(now, SAVE)
        elif self.route == RELAY or self.route == DIRECT and place.address != self._address:
            self._pick_route(now)

    def begin_anew(self, now: float) -> None:
        """The owner is online again: what did not move meanwhile was not held up by the recipient."""
        self._moved = self._progressed = self._deadline = now
        self.stuck = self._announced_silent

    def server_heard(self, now: float) -> None:
        """The server gave a sign of life: if it was silent, whatever waits for it goes out again."""
        if self.route == DIRECT:
            return
        self._silent_since = NEVER
        if self._announced_silent:
            self._announced_silent = self.stuck = False
            self._moved = self._progressed = self._deadline = now
            self.stream.timeout_cap = SERVER_INTERVAL
            self.stream.resume()

    def on_ack(self, now: float, next_: int, have: Sequence[Sequence[int]], room: int, route: str) -> None:
        """Takes an ack that came straight from the recipient (DIRECT) or from the server (SAVE)."""
        stream = self.stream
        base = stream.base
        count = self._count(base, next_) if stream.continued and base < next_ <= stream.top else 0
        closed = stream.on_ack(now, next_, have, room)
        if (route == DIRECT) == (self.route == DIRECT):
            self._silent_since = NEVER
        if closed:
            self._last_try = self._last_try and route != DIRECT
            relayed = route != DIRECT and self.route == RELAY
            kind = RECEIVED if route == DIRECT else SAVED
            self._close(now, Event(kind, count or closed, "", base, relayed))   # each number is one but in long texts

    def on_nack(self, now: float, first: int, last: int, reason: str, route: str) -> None:
        """Takes a refusal; it counts only for what is still held on that route."""
        if (route == DIRECT) != (self.route == DIRECT) or not first <= self.stream.base <= last:
            return
        if route == DIRECT:
            if reason == "not-me":
                self._give_up_direct(now)
            return
        self._silent_since = NEVER
        base = self.stream.base
        count = self._count(base, min(last + 1, self.stream.top))
        if self.stream.close(last + 1):
            self._close(now, Event(REFUSED, count, reason, base, self.route == RELAY))

    def on_exists(self, now: float, number: int, address: Address | None) -> None:
        """The server says that the recipient answers at ``address`` (None: one that cannot be reached from here)."""
        if self.route != SAVE or not self.pending or number >= self.stream.top:
            return
        self._say(EXISTS)
        if address is None:
            self._relay(now)
        else:
            self._go(now, DIRECT, address)
            self._last_try = True

    # what time says

    def due(self) -> float:
        """When ``poll`` must be called even if nothing happens."""
        return min(self.stream.due(), self._deadline) if self.pending else NEVER

    def poll(self, now: float, calm: bool = True) -> list[tuple[bytes, Address | None]]:
        """The datagrams to send now. ``calm``: all that has arrived was read, so silence is silence."""
        stream = self.stream
        if stream.end == stream.base:
            return []
        if calm and now >= self._deadline:
            self._judge(now)
            self._deadline = self._next_deadline()
        packets, route = stream.poll(now), self.route
        if packets and self._silent_since == NEVER:
            self._silent_since = now
            self._deadline = min(self._deadline, now + self._patience)
        address = self._address if route == DIRECT else None
        frames = []
        for packet in packets:
            more = self._more(packet) if stream.continued else ()
            times = self._times_of(packet) if route != DIRECT else ()
            frames.append((self._frame(route, packet.first, stream.base, packet.items, more, times), address))
        return frames

    def _judge(self, now: float) -> None:
        """Decides whether silence has lasted long enough to change the route, or to call the messages stuck."""
        silent = now >= self._silent_since + self._patience
        stalled = now >= self._moved + STALL_TIMEOUT
        if now >= self._progressed + STUCK_TIMEOUT:
            self.stuck = True
        if self.route == DIRECT:
            if silent:
                self._give_up_direct(now)
            elif stalled:
                self._say(NO_ACK)
                self._relay(now)
            return
        if silent and not self._announced_silent:
            self._announced_silent = self.stuck = True
            self.stream.timeout_cap = MAX_TIMEOUT
            self.events.append(Event(SILENT, self.messages))
        if stalled:
            self.stuck = True
            self.stream.timeout_cap = MAX_TIMEOUT
        if self.route == RELAY and now >= self._relay_until > -NEVER:
            self._relay_until = -NEVER
            self._pick_route(now)

    def _is_patient(self) -> bool:
        """Whether all that stalls is known to: the server is asked seldom, and what waits is stuck."""
        return self.stuck and self.route != DIRECT and self.stream.timeout_cap == MAX_TIMEOUT

    def _next_deadline(self) -> float:
        """When ``_judge`` has something to decide, if nothing happens until then."""
        return min(NEVER if self._announced_silent else self._silent_since + self._patience,
                   NEVER if self._is_patient() else self._moved + STALL_TIMEOUT,
                   NEVER if self.stuck else self._progressed + STUCK_TIMEOUT,
                   self._relay_until if self.route == RELAY and self._relay_until > -NEVER else NEVER)

    def _give_up_direct(self, now: float) -> None:
        self._say(NO_ACK)
        if self._last_try:
            self._relay(now)
        else:
            self._go(now, SAVE)

    # routes

    def next_route(self, now: float) -> str:
        """The route of a message that is queued now."""
        return self.route if self.pending else self._suggested_route(now)

    def _suggested_route(self, now: float) -> str:
        if self.place is None or not self.place.online:
            return SAVE
        return RELAY if self.place.address is None or now < self._relay_until else DIRECT

    def _pick_route(self, now: float) -> None:
        """Chooses the way that the table suggests."""
        route = self._suggested_route(now)
        if route == DIRECT and self.place is not None:
            self._go(now, route, self.place.address)
            self._follows_table = True
        else:
            self._go(now, route)

    def _relay(self, now: float) -> None:
        self._relay_until = now + RELAY_TIME
        self._go(now, RELAY)

    def _go(self, now: float, route: str, address: Address | None = None) -> None:
        self._last_try = self._follows_table = False
        self._deadline = now
        if not route == self.route == DIRECT:
            self._moved = now       # who only moves does not put off the server
        if route != self.route or address != self._address:
            self.route, self._address = route, address
            if address is not None:
                self.addresses.append(address)
            self.stream.reroute(self._capacity(route), self._held_sizes)
        elif self._announced_silent:
            self.stream.resume()        # the silence is forgotten, so the server is asked at once
        self.stream.timeout_cap = MAX_TIMEOUT if route == DIRECT else SERVER_INTERVAL   # as often as any request
        self._silent_since = NEVER
        self._patience = self.ack_timeout if route == DIRECT else SERVER_ATTEMPTS * SERVER_INTERVAL
        self._announced_silent = False
        self.stuck = now >= self._progressed + STUCK_TIMEOUT

    def _held_sizes(self, items: list[Any]) -> list[int]:
        return self._sizes(items, self.stream.base, self.stream.continued)

    # events

    def _count(self, start: int, end: int) -> int:
        """How many messages end in [start, end)."""
        continued = self.stream.continued
        return end - start - (sum(start <= number < end for number in continued) if continued else 0)

    def _say(self, kind: str) -> None:
        first = max(self.stream.base, self._said.get(kind, 1))
        count = self._count(first, self.stream.end)
        if count > 0:
            self.events.append(Event(kind, count, "", first))
        self._said[kind] = self.stream.end

    def _close(self, now: float, event: Event) -> None:
        self.events.append(event)
        self._moved = self._progressed = now
        if self.stuck:
            self.stuck, self._deadline = False, now


# --- what goes out --------------------------------------------------------------------------------------------

POLLS_PER_TURN = 64       # conversations that are looked at in one go: what is left is due at once
QUEUE_LIMIT = 4096        # numbers queued to send; then the owner takes no more
QUEUE_SIZE = 4 * 2 ** 20  # bytes queued to send
CONVERSATIONS_KEPT = 10_000     # of one client; beyond, those go first in which nothing waits


class Outbox:
    """All that one client sends: a conversation with each recipient, when each is due, and how much waits.

    What waits for a server that is silent (``lost``), or while the client is offline (``away``), is stuck: it is
    counted for itself, and does not keep the rest waiting.
    """

    def __init__(self, me: str, ack_timeout: float = ACK_TIMEOUT) -> None:
        self._lost = False
        self._away = False
        self._me = me
        self._ack_timeout = ack_timeout
        self._session = bytes(SESSION_BYTES)
        self.conversations: dict[str, Conversation] = {}
        self.eventful: dict[str, Conversation] = {}     # with events to take, or whose messages are to be counted anew
        self.told: dict[str, Conversation] = {}         # whose events were taken, for ``count_told``
        self._by_stream: dict[int, Conversation] = {}
        self._sending: dict[str, Conversation] = {}     # with messages that are not closed
        self._touched: dict[str, Conversation] = {}     # to be polled next
        self._due: dict[str, float] = {}                # when to look at a conversation, or earlier
        self._dues: list[tuple[float, str]] = []        # the same as a heap, with entries that do not count any more
        self._numbers = [0, 0]                          # that wait: what moves, and what is stuck
        self._bytes = [0, 0]                            # of these

    @property
    def lost(self) -> bool:
        """Whether the server is silent."""
        return self._lost

    @lost.setter
    def lost(self, lost: bool) -> None:
        self._lost = lost
        self._count_all()

    @property
    def away(self) -> bool:
        """Whether the client is offline."""
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        self._away = away
        self._count_all()

    @property
    def is_settled(self) -> bool:
        """Whether every message is closed, or stuck."""
        return all(self._is_stuck(conversation, conversation.route) for conversation in self._sending.values())

    def undelivered(self) -> Iterator[tuple[str, str]]:
        """The messages that are not closed: recipient and text."""
        for nick, conversation in self._sending.items():
            for text in conversation.texts():
                yield nick, text

    # how much waits

    def _is_stuck(self, conversation: Conversation, route: str) -> bool:
        return conversation.stuck or self._away or self._lost and route != DIRECT

    def is_stuck(self, now: float, nick: str) -> bool:
        """Whether a message for ``nick`` (a conversation is open) does not move, if it is queued now."""
        conversation = self.conversations[nick]
        return self._is_stuck(conversation, conversation.next_route(now) if self._lost else DIRECT)

    def room(self, now: float, nick: str) -> int:
        """How many numbers for ``nick`` (a conversation is open) may be queued now; 0: none."""
        stuck = self.is_stuck(now, nick)
        room = QUEUE_LIMIT - self._numbers[stuck]
        return room if room > 0 and self._bytes[stuck] < QUEUE_SIZE else 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be queued, but for those whose messages are stuck."""
        return self._numbers[0] >= QUEUE_LIMIT or self._bytes[0] >= QUEUE_SIZE

    def _count(self, conversation: Conversation) -> None:
        """Counts anew what waits in a conversation."""
        stream, (was_stuck, numbers, size) = conversation.stream, conversation.counted
        stuck = self._is_stuck(conversation, conversation.route)
        conversation.counted = (stuck, stream.end - stream.base, stream.size)
        if stuck != was_stuck:
            self._numbers[was_stuck] -= numbers
            self._bytes[was_stuck] -= size
            numbers = size = 0
        self._numbers[stuck] += stream.end - stream.base - numbers
        self._bytes[stuck] += stream.size - size

    def _count_all(self) -> None:
        for conversation in self._sending.values():
            self._count(conversation)

    # what the owner says

    def register(self, now: float, session: bytes) -> None:
        """The server has given a session: it goes into every ``save``, and what waited has all its time again."""
        self._session = session
        for conversation in self.conversations.values():
            conversation.session = session
        for nick, conversation in self._sending.items():
            conversation.begin_anew(now)
            self._touched[nick] = conversation

    def open(self, now: float, nick: str, place: Place | None, stream: int) -> None:
        """Begins a conversation with somebody not written to before; ``stream`` is a random id."""
        conversation = Conversation(self._me, nick, stream, self._ack_timeout)
        conversation.locate(now, place)
        conversation.session = self._session
        self._forget_idle()
        self.conversations[nick] = conversation
        self._by_stream[stream] = conversation

    def send(self, now: float, nick: str, texts: Sequence[str], at: float) -> None:
        """Queues texts for somebody with whom a conversation is open; ``at``: the wall-clock time."""
        conversation = self.conversations[nick]
        conversation.send(now, texts, at)
        self._sending[nick] = self._touched[nick] = conversation
        self._count(conversation)

    def _forget_idle(self) -> None:
        if len(self.conversations) >= CONVERSATIONS_KEPT:
            idle = next((nick for nick in self.conversations if nick not in self._sending), None)
            if idle is not None:
                del self._by_stream[self.conversations.pop(idle).stream.id]
                for among in (self.eventful, self.told, self._touched):     # an ack came twice: the nick is another's
                    among.pop(idle, None)

    def locate(self, now: float, nick: str, place: Place | None) -> None:
        """The table has changed for ``nick``."""
        conversation = self.conversations.get(nick)
        if conversation is not None:
            conversation.locate(now, place)
            self._touched[nick] = conversation

    def server_heard(self, now: float) -> None:
        """The server gave a sign of life."""
        for nick, conversation in self._sending.items():
            if conversation.route != DIRECT:
                conversation.server_heard(now)
                self._touched[nick] = conversation

    # what the network says; address None: the server, in this session

    def _addressed(self, info: Info, address: Address | None) -> Conversation | None:
        """The conversation that an answer from ``address`` is about, if it may come from there."""
        conversation = self._by_stream.get(info["stream"])
        if conversation is None or address is not None and address not in conversation.addresses:
            return None
        return conversation

    def on_ack(self, now: float, info: Info, address: Address | None) -> None:
        """Takes an ``ack``."""
        conversation = self._addressed(info, address)
        if conversation is not None:
            conversation.on_ack(now, info["next"], info["have"], info["room"], SAVE if address is None else DIRECT)
            if conversation.stream.end > conversation.stream.base:
                self._touched[conversation.peer] = conversation
            else:
                self.eventful[conversation.peer] = conversation     # there is nothing to send, only to tell

    def on_nack(self, now: float, info: Info, address: Address | None) -> None:
        """Takes a ``nack``."""
        conversation = self._addressed(info, address)
        if conversation is not None:
            conversation.on_nack(now, info["first"], info["last"], info["reason"],
                                 SAVE if address is None else DIRECT)
            self._touched[conversation.peer] = conversation

    def on_exists(self, now: float, info: Info, reachable: Address | None) -> None:
        """Takes an ``exists``; ``reachable``: the address in its entry, None if it cannot be sent to."""
        conversation = self._addressed(info, None)
        if conversation is not None and conversation.peer == info["entry"][0]:
            conversation.on_exists(now, info["n"], reachable)
            self._touched[conversation.peer] = conversation

    # what time says

    def due(self) -> float:
        """When ``poll`` must be called even if nothing happens."""
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

    def poll(self, now: float, calm: bool = True) -> Iterator[tuple[bytes, Address | None]]:
        """The datagrams to send now, and where to (None: the server), of those to which something happened."""
        if self._dues and self._dues[0][0] <= now:
            self._wake(now)
        for nick in list(islice(self._touched, POLLS_PER_TURN)):
            conversation = self._touched.pop(nick)
            yield from conversation.poll(now, calm)
            due = conversation.due()
            if due < self._due.get(nick, NEVER):
                self._schedule(nick, due)
            if conversation.events or conversation.counted[0] or self._is_stuck(conversation, conversation.route):
                self.eventful[nick] = conversation

    def take_events(self) -> list[tuple[str, list[Event]]]:
        """What has happened to messages since the last time: recipients, and the events (or none) of each.

        Also of those that were not polled since. What is closed by these events counts as waiting until ``count_told``:
        whoever reads them is told first.
        """
        eventful, self.eventful = self.eventful, {}
        if self._touched:
            eventful.update(self._touched)
        found = []
        for nick, conversation in eventful.items():
            found.append((nick, conversation.events))
            conversation.events = []
            self.told[nick] = conversation
        return found

    def count_told(self) -> None:
        """Counts anew what waits for those whose events were taken."""
        told, self.told = self.told, {}
        for nick, conversation in told.items():
            self._count(conversation)
            if not conversation.counted[1]:
                self._sending.pop(nick, None)


# --- what comes in --------------------------------------------------------------------------------------------

HOLD_TIME = 5.0           # s that a stream waits for the server to say whether missing messages are in the mail
STREAMS_PER_SENDER = 8    # that can go on at once, of each peer; the longest silent gives way first
STREAMS_IN_ALL = 2048     # the same of all peers together
MEMORIES = 65_536         # streams and ranges of numbers that were shown, of those that gave way: about 20 MB
INBOX_LIMIT = 64 * 2 ** 20      # bytes of all streams together, counting ``PIECE_MEMORY`` for every number


class Delivery(NamedTuple):
    """Texts to show, in order, and whom to tell how many of them are written.

    ``times``: when each was sent, for mail; empty for chat. ``stream``, ``first``: of the sender, and the number of the
    first text in it. Without texts, ``written`` is to be told (0) once all that was delivered before is written.
    """

    sender: str
    texts: list[str]
    times: list[float]
    written: Callable[[int], None]
    stream: int = 0
    first: int = 0


class Incoming:
    """One stream of a peer, or of the own mail, and whether it waits for news of the mail."""

    def __init__(self, stream: ReceiveStream, unacked: dict[Incoming, None]) -> None:
        self.stream = stream
        self.address: Address | None = None      # where acks go; None: to the server
        self.sender = ""
        self.counted = 0            # numbers that the inbox has counted
        self.held_since = NEVER     # when numbers were found missing, or the server was last asked about them
        self.held_base = 0          # below which they are
        self.mail: int | None = None     # the mail that must be shown before they are given up
        self._unacked = unacked             # of the inbox: stands there as long as there is something to ack

    def written(self, texts: int) -> None:
        """Takes note of what is written of the texts that were handed out, see ``ReceiveStream``."""
        before = self.stream.next
        self.stream.written(texts)
        if self.stream.next != before:
            self._unacked[self] = None


class Memories:
    """What was shown of streams that gave way: they may come again, by mail, or because an ack was lost.

    At most ``MEMORIES`` streams and ranges. Beyond, the sender who has most of them loses the oldest: nobody can make a
    client forget what others have sent.
    """

    def __init__(self) -> None:
        self.size = 0
        self._of: dict[str, dict[int, Snapshot]] = {}     # sender -> stream -> what was shown, oldest first
        self._sizes: dict[str, int] = {}                # of each sender

    @staticmethod
    def _cost(memory: Snapshot) -> int:
        return 1 + len(memory.claimed) + len(memory.given_up)

    def add(self, sender: str, stream: int, memory: Snapshot) -> None:
        """Takes a stream that was forgotten; nothing was shown of it if it stands at number 1."""
        if memory == NOTHING_DELIVERED:
            return
        self._of.setdefault(sender, {})[stream] = memory
        cost = self._cost(memory)
        self._sizes[sender] = self._sizes.get(sender, 0) + cost
        self.size += cost
        while self.size > MEMORIES:
            has_most = self._sizes.get(sender, 0) * 2 > MEMORIES
            loser = sender if has_most else max(self._sizes, key=self._sizes.__getitem__)
            self.pop(loser, next(iter(self._of[loser])))

    def pop(self, sender: str, stream: int) -> Snapshot | None:
        """Gives, and forgets, what was shown of a stream; None if nothing is known of it."""
        memory = self._of[sender].pop(stream, None) if sender in self._of else None
        if memory is not None:
            cost = self._cost(memory)
            self.size -= cost
            self._sizes[sender] -= cost
            if not self._of[sender]:
                del self._of[sender], self._sizes[sender]
        return memory


class Inbox:
    """All that comes in for one client, and the order in which it is shown.

    Chat comes in streams of its senders, mail in one stream of the server, and each letter of it carries the stream
    and the number that its sender gave it: so a message that comes on two routes is shown once. A chat stream
    that would skip numbers holds (``is_asking``) until the server has said how much mail there is (``answer``) and
    that mail is shown, or has not answered for ``HOLD_TIME``.
    """

    def __init__(self) -> None:
        self.buffered = 0           # numbers of all streams that wait here
        self.holding: dict[Incoming, None] = {}     # the streams that wait for mail, or for news of it
        self.unacked: dict[Incoming, None] = {}     # those for which ``acks`` has an answer; all of them know this one
        self._streams: dict[str, dict[int, Incoming]] = {}      # of each sender; longest silent first
        self._memories = Memories()                             # of those streams that gave way
        self._kept = 0                                          # streams in _streams
        self._buffering: dict[Incoming, None] = {}              # those that hold numbers; longest silent first
        self._mail: Incoming | None = None
        self._readable: dict[Incoming, None] = {}

    # what arrives

    def on_chat(self, now: float, info: Info, address: Address, accept: bool = True) -> None:
        """Takes a ``chat`` whose sender is proved. Without ``accept`` it is only acked as far as it is known."""
        incoming = self._incoming(info["from"], info["stream"], 1)
        incoming.address = address
        self.unacked[incoming] = None
        if accept:
            stream = incoming.stream
            stream.on_data(info["n"], info["text"], info.get("more", ()), info["base"])
            self._arrived(incoming)
            if stream.base > stream.ready and stream.missing:
                self._hold(now, incoming)

    def on_mail(self, now: float, info: Info) -> None:
        """Takes a ``mail`` of the server."""
        if self._mail is None or self._mail.stream.id != info["stream"]:
            self.forget_mail(now)
            self._mail = Incoming(ReceiveStream(info["stream"]), self.unacked)
        items, more = letters_of(info)
        stream = self._mail.stream
        stream.on_data(info["n"], items, more, info["base"])
        stream.advance(info["base"])
        self.unacked[self._mail] = None
        self._arrived(self._mail)

    def forget_mail(self, now: float) -> None:
        """A new session begins, and with it another stream of mail, counted anew."""
        for incoming in self.holding:
            incoming.held_since, incoming.mail = now, None
        if self._mail is not None:
            self._forget(self._mail)
            self._mail = None

    def _incoming(self, sender: str, stream: int, first: int) -> Incoming:
        streams = self._streams[sender] = self._streams.pop(sender, {})
        incoming = streams.pop(stream, None)
        if incoming is None:
            if len(streams) >= STREAMS_PER_SENDER:
                self._forget_idle(sender)
            elif self._kept >= STREAMS_IN_ALL:
                self._forget_idle(next(iter(self._streams)))
            self._streams[sender] = streams
            incoming = Incoming(ReceiveStream(stream, first), self.unacked)
            incoming.sender = sender
            memory = self._memories.pop(sender, stream)
            if memory is not None:
                incoming.stream.restore(memory)
            self._kept += 1
        streams[stream] = incoming
        return incoming

    def _forget_idle(self, sender: str) -> None:
        """Makes room: forgets the longest silent of a sender's streams, but none that waits to be written."""
        streams = self._streams[sender]
        for number in list(islice(streams, STREAMS_PER_SENDER)):
            incoming = streams.pop(number)
            if not incoming.stream.is_idle:
                streams[number] = incoming
            else:
                self._forget(incoming)
                self._memories.add(sender, number, incoming.stream.snapshot())
                self._kept -= 1
                if len(streams) < STREAMS_PER_SENDER:
                    break
        else:
            self._streams[sender] = self._streams.pop(sender)   # another one's are looked at next
        if not streams:
            del self._streams[sender]

    def _forget(self, incoming: Incoming) -> None:
        for among in (self._readable, self.unacked, self.holding, self._buffering):
            among.pop(incoming, None)
        self.buffered -= incoming.counted

    def _arrived(self, incoming: Incoming) -> None:
        if incoming.counted:
            del self._buffering[incoming]
        self._count(incoming)
        stream = incoming.stream
        if stream.taken < stream.ready and incoming is not self._mail:
            self._readable[incoming] = None
        while self.buffered * PIECE_MEMORY > INBOX_LIMIT:
            self._give_back(next(iter(self._buffering)))

    def _give_back(self, incoming: Incoming) -> None:
        """Forgets what waits of a stream, to make room for one that was heard later; its sender still holds it."""
        incoming.stream.give_back(incoming.stream.taken)
        self._readable.pop(incoming, None)
        self._count(incoming)

    def _count(self, incoming: Incoming) -> None:
        buffered = incoming.stream.buffered
        self.buffered += buffered - incoming.counted
        incoming.counted = buffered
        if buffered:
            self._buffering[incoming] = None
        else:
            self._buffering.pop(incoming, None)

    def acks(self) -> list[tuple[Info, Address | None]]:
        """The ``ack`` of every stream that brought something or of which something was written; None: the server."""
        more = self.buffered * PIECE_MEMORY < INBOX_LIMIT
        acks = []
        for incoming in self.unacked:
            if incoming.address is not None or incoming is self._mail:      # nobody waits for another ack
                acks.append((incoming.stream.ack(more), incoming.address))
        self.unacked.clear()
        return acks

    # messages that are missing

    @property
    def is_asking(self) -> bool:
        """Whether a stream waits for the server to say how much mail there is."""
        return bool(self.holding) and any(incoming.mail is None for incoming in self.holding)

    def _hold(self, now: float, incoming: Incoming) -> None:
        if incoming not in self.holding:
            incoming.held_since, incoming.held_base, incoming.mail = now, incoming.stream.base, None
            self.holding[incoming] = None

    def answer(self, asked: float, mail: int) -> None:
        """Takes the server's answer to a question of the time ``asked``: the number of the last mail there is."""
        for incoming in self.holding:
            if incoming.mail is None and asked >= incoming.held_since:
                incoming.mail = mail

    def expire(self, now: float) -> None:
        """Goes on with the streams whose question was not answered for ``HOLD_TIME``.

        An answer holds for so long, too: if its mail has not come by then, the server is asked again.
        """
        for incoming in list(self.holding):
            if now >= incoming.held_since + HOLD_TIME:
                if incoming.mail is None:
                    self._release(now, incoming)
                else:
                    incoming.held_since, incoming.mail = now, None

    def _release(self, now: float, incoming: Incoming) -> None:
        """Goes on behind the missing numbers; asks again if more have become missing since."""
        del self.holding[incoming]
        incoming.stream.advance(incoming.held_base, elsewhere=True)
        self.unacked[incoming] = None
        self._arrived(incoming)
        if incoming.stream.missing:
            self._hold(now, incoming)

    def stop_asking(self) -> None:
        """Nobody will answer: the client leaves."""
        self.holding.clear()

    # what is shown

    @property
    def has_chat(self) -> bool:
        """Whether chat is ready to be shown."""
        return bool(self._readable)

    @property
    def has_news(self) -> bool:
        """Whether ``take`` has anything to do."""
        return bool(self.holding) or self.is_ready

    @property
    def is_ready(self) -> bool:
        """Whether anything is ready to be shown."""
        mail = self._mail
        return bool(self._readable) or mail is not None and mail.stream.taken < mail.stream.ready

    def take(self, now: float, has_room: Callable[[], bool]) -> Iterator[Delivery]:
        """Hands out what is ready as long as ``has_room()``: chat first, and mail once that is through."""
        while self._readable and has_room():
            yield from self._take_chat(next(iter(self._readable)))
        if self._mail is not None and not self._readable and has_room():
            yield from self._take_mail(self._mail)
        if self.holding:
            reached = self._mail.stream.taken if self._mail is not None else 1
            for incoming in list(self.holding):
                if incoming.mail is not None and reached > incoming.mail:
                    self._release(now, incoming)

    def _take_chat(self, incoming: Incoming) -> list[Delivery]:
        stream, deliveries = incoming.stream, []
        for run in stream.take(MAX_ITEMS):
            texts = ["".join(run.items)] if run.more else run.items
            deliveries.append(Delivery(incoming.sender, texts, [], incoming.written, stream.id, run.first))
        self._count(incoming)
        if stream.taken == stream.ready:
            self._readable.pop(incoming, None)
        return deliveries

    def _take_all_chat(self, incoming: Incoming) -> Iterator[Delivery]:
        while incoming.stream.taken < incoming.stream.ready:
            yield from self._take_chat(incoming)

    def _take_mail(self, mail: Incoming) -> Iterator[Delivery]:
        for run in mail.stream.take(MAX_ITEMS):
            if run.more:
                yield from self._take_letters(mail, run.items, ["".join(item[4] for item in run.items)])
            elif run.items:
                for letters in runs_of_one_stream(run.items):
                    yield from self._take_letters(mail, letters, [item[4] for item in letters])
            else:
                yield Delivery("", [], [], mail.written)
        self._count(mail)

    def _take_letters(self, mail: Incoming, items: Sequence[Any], texts: list[str]) -> Iterator[Delivery]:
        """Texts of consecutive numbers of one stream, but for those that were shown on another way."""
        sender, stream, number = items[0][:3]
        incoming = self._incoming(sender, stream, number)
        if number > incoming.stream.reached:    # their sender has closed what is below them: what waits of it is late
            incoming.stream.advance(number, elsewhere=True)
        yield from self._take_all_chat(incoming)
        if incoming.stream.claim(number, len(items)):
            times = [item[3] for item in items[:len(texts)]]
            yield Delivery(sender, texts, times, mail.written, stream, number)
        elif len(texts) == 1:
            yield Delivery("", [], [], lambda _: mail.written(1))
        else:
            for item, text in zip(items, texts):
                yield from self._take_letters(mail, [item], [text])
        yield from self._take_all_chat(incoming)
