"""Reliable, ordered, flow-controlled streams."""
from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import (Any, NamedTuple)
from collections.abc import Callable, Collection, Iterator, Sequence

from protocol import MAX_ITEMS, MAX_NUMBER, MAX_RANGES, MAX_TEXT_PIECES, Info


# --- ranges ---------------------------------------------------------------------------------------------------

class Ranges:
    """A set of numbers as sorted, disjoint, half-open ranges; at most ``most``, the lowest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.spans: list[tuple[int, int]] = []

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self.spans, (number, MAX_NUMBER)) - 1
        return index >= 0 and self.spans[index][0] <= number < self.spans[index][1]

    def touches(self, start: int, end: int) -> bool:
        """Whether any number of [start, end) is in the set."""
        return any(span[0] < end and start < span[1] for span in self.spans)

    def add(self, start: int, end: int) -> None:
        """Adds [start, end)."""
        apart = []
        for span in self.spans:
            if span[1] < start or end < span[0]:
                apart.append(span)
            else:
                start, end = min(start, span[0]), max(end, span[1])
        apart.append((start, end))
        self.spans = sorted(apart)[-self.most:]

    def end_of(self, number: int) -> int:
        """Where the range that holds ``number`` ends; ``number`` itself if none does."""
        for start, end in self.spans:
            if start <= number < end:
                return end
        return number

    def covers(self, start: int, end: int) -> bool:
        """Whether every number of [start, end) is in the set."""
        return any(span[0] <= start and end <= span[1] for span in self.spans)

    def remove(self, start: int, end: int) -> None:
        """Takes [start, end) out."""
        parts = (part for low, high in self.spans for part in ((low, min(high, start)), (max(low, end), high)))
        self.spans = [part for part in parts if part[0] < part[1]][-self.most:]

    def drop_below(self, number: int) -> None:
        """Forgets the ranges that lie wholly below ``number``."""
        if self.spans and self.spans[0][1] <= number:
            self.spans = [span for span in self.spans if span[1] > number]


# --- sending --------------------------------------------------------------------------------------------------

INITIAL_TIMEOUT = 0.1     # s; before a round trip was measured: several transmissions must fit into 500 ms
MIN_TIMEOUT = 0.05        # s; a receiver's turn (a commit, a full pipe) is no loss
MAX_TIMEOUT = 5.0         # s; the back-off ends here
CALM_BACKOFF = 4.0        # to which it returns with an ack that measures nothing, on a path that was measured before
CLOCK_GRAIN = 0.001       # s; G of RFC 6298
INITIAL_WINDOW = 10       # datagrams (RFC 6928)
MIN_WINDOW = 2            # datagrams (RFC 9002 §7.2)
MAX_WINDOW = 256          # datagrams in flight
RATE_GAIN = 0.125         # weight of the newest round trip in the rate estimate
PACKET_THRESHOLD = 3      # datagrams sent later and acked first make a loss (RFC 9002 §6.1.1)
INITIAL_ROOM = 4096       # numbers that may be sent before the receiver has said how many it takes
ASK_AGAIN = (0.5, 1.0, 2.0, 5.0)  # s between questions to a receiver that has no room; the last one repeats
NEVER = float("inf")

UNSENT, SENT, HELD, LOST = range(4)  # what is known of a packet


class Packet:
    """Consecutive items of a stream that travel in one datagram."""

    __slots__ = ("first", "end", "items", "size", "state", "sent", "order", "tries")

    def __init__(self, first: int, items: list[Any], size: int) -> None:
        self.first = first
        self.end = first + len(items)   # the number after the last one
        self.items = items
        self.size = size        # bytes of the encoded items
        self.state = UNSENT
        self.sent = 0.0         # time of the last transmission
        self.order = 0          # which transmission of the stream that was
        self.tries = 0


class Path:
    """What is known of the path to a receiver: its round trip, so the retransmission timeout; its congestion window."""

    def __init__(self, initial_timeout: float) -> None:
        self.smoothed: float | None = None   # s; SRTT of RFC 6298
        self._variation = 0.0                   # s; RTTVAR
        self.fastest = NEVER                    # s; the shortest round trip seen
        self.backoff = 1.0
        self.window: float = INITIAL_WINDOW     # datagrams
        self.threshold: float = MAX_WINDOW      # ssthresh of RFC 5681
        self.window_limited = False             # whether the window ended the last poll, not a lack of data or room
        self._timeout = initial_timeout         # s; without the back-off
        self._rate = 0.0            # datagrams that arrive in a second, smoothed over round trips
        self._round = -NEVER        # when the round trip began that is counted now
        self._arrived = 0           # datagrams since

    def timeout(self, longest: float) -> float:
        """The retransmission timeout, in seconds; back-off makes it no longer than ``longest``."""
        if self.backoff == 1.0:
            return self._timeout
        return min(self._timeout * self.backoff, max(self._timeout, longest))

    def on_arrival(self, now: float, packets: int, sample: float) -> None:
        """``packets`` have arrived; ``sample``: the round trip of the newest, ``NEVER`` if it measures none."""
        if 0 <= sample < NEVER:
            self._measure(sample)
        self._arrived += packets
        passed = now - self._round
        if self.smoothed is not None and passed >= self.smoothed and passed >= CLOCK_GRAIN:
            # once for each round trip: the rate estimate of TCP Westwood+ (Mascolo et al., 2001)
            rate = self._arrived / passed
            self._rate += (rate - self._rate) * (RATE_GAIN if self._rate else 1.0)
            self._round, self._arrived = now, 0
        if self.window_limited:     # slow start, then one a round trip (RFC 5681 §3.1)
            grown = self.window + (packets if self.window < self.threshold else packets / self.window)
            self.window = min(grown, MAX_WINDOW)

    def _measure(self, sample: float) -> None:
        """RFC 6298 §2, with a shorter first and least timeout."""
        if sample < self.fastest:
            self.fastest = sample
        if self.smoothed is None:
            self.smoothed, self._variation = sample, sample / 2
        else:
            self._variation += (abs(sample - self.smoothed) - self._variation) / 4
            self.smoothed += (sample - self.smoothed) / 8
        timeout = self.smoothed + max(4 * self._variation, CLOCK_GRAIN)
        self._timeout = MIN_TIMEOUT if timeout < MIN_TIMEOUT else min(timeout, MAX_TIMEOUT)

    def relax_backoff(self, measured: bool) -> None:
        """An ack has come: ends the back-off if it measured the path, else shortens it."""
        if measured:
            self.backoff = 1.0
        elif self.smoothed is not None:     # else a path slower than the first timeout is never measured
            self.backoff = min(self.backoff, CALM_BACKOFF)

    def on_loss(self) -> None:
        """Shrinks the window: something was lost that others overtook (RFC 9002 §7.3.2)."""
        self.threshold = self.window = self._carried()

    def on_timeout(self) -> None:
        """Backs off, and starts over with one datagram (RFC 5681 §3.1, RFC 6298 §5.5)."""
        if self.backoff == 1.0:
            self.threshold = self._carried()
        self.window = 1.0
        self.backoff = min(self.backoff * 2, MAX_TIMEOUT / MIN_TIMEOUT)

    def _carried(self) -> float:
        """The window that fills the path without filling its queue, at least half of the one that met a loss."""
        fills = min(self.window, self._rate * self.fastest) if self._rate else 0.0
        return max(self.window / 2, fills, MIN_WINDOW)


class SendStream:
    """The sender's half of a stream: numbers items, packs them, sends them until they are acked.

    The owner queues items with their sizes, hands in acks, calls ``poll(now)`` whenever something changed or
    ``due()`` has come, and turns the packets that it returns into datagrams.
    """

    def __init__(self, stream: int, capacity: int, initial_timeout: float = INITIAL_TIMEOUT) -> None:
        self.stream = stream
        self.capacity = capacity    # bytes of items in one datagram
        self.base = 1               # the lowest number still held
        self.end = 1                # the next number to give
        self.top = 1                # the number after the highest that was ever sent
        self.edge = 1 + INITIAL_ROOM
        self.size = 0              # of the items held
        self.longest = MAX_TIMEOUT  # s; to which the back-off goes
        self.continued: set[int] = set()
        self._sent: deque[Packet] = deque()
        self._unsent: deque[Packet] = deque()
        self._initial_timeout = initial_timeout
        self._begin()

    def _begin(self) -> None:
        """Begins on a path of which nothing is known."""
        self.path = Path(self._initial_timeout)     # to the receiver; another one with each route
        self.in_flight = 0
        self.timer = NEVER          # when the oldest packet in flight counts as lost
        self.ask = NEVER            # when to ask a receiver that has no room
        self._asked = 0
        self._order = 0
        self._acked_order = 0
        self._newest = 0            # the order of the newest transmission that an ack ever told of,
        self._sample = NEVER        # s; and its round trip, if the ack at hand is the one and it was the only try
        self._recovery = 0          # transmissions up to here belong to a loss that was already answered
        self._lost = 0

    @property
    def held(self) -> int:
        """How many numbers are not acked yet."""
        return self.end - self.base

    def queue(self, items: Sequence[Any], sizes: Sequence[int], continued: Collection[int] = ()) -> None:
        """Appends items; ``sizes`` are their encoded bytes, ``continued`` the numbers that the next continues.

        Every size must be at most ``capacity``.
        """
        if continued:
            self.continued.update(continued)
        if len(items) == 1 and not self._unsent:
            self._unsent.append(Packet(self.end, list(items), sizes[0]))
            self.size += sizes[0]
        else:
            self.size += self._pack(self.end, items, sizes)
        self.end += len(items)

    def _pack(self, number: int, items: Sequence[Any], sizes: Sequence[int]) -> int:
        totals = list(accumulate(sizes))
        done = start = 0
        if self._unsent and self._unsent[-1].end == number:
            tail = self._unsent[-1]
            start = min(bisect_right(totals, self.capacity - tail.size), MAX_ITEMS - len(tail.items))
            if start > 0:
                tail.items.extend(items[:start])
                tail.end += start
                tail.size += totals[start - 1]
                done = totals[start - 1]
        start = max(start, 0)
        while start < len(items):
            end = min(bisect_right(totals, done + self.capacity, start), start + MAX_ITEMS)
            assert end > start, "an item larger than a datagram"
            self._unsent.append(Packet(number + start, list(items[start:end]), totals[end - 1] - done))
            done, start = totals[end - 1], end
        return totals[-1] if totals else 0

    def items(self) -> Iterator[Any]:
        """The items still held, lowest first."""
        for packets in (self._sent, self._unsent):
            for packet in packets:
                yield from packet.items

    def reroute(self, capacity: int, sizes: Callable[[list[Any]], list[int]]) -> None:
        """Takes everything held to another path: nothing counts as sent there, nothing is known of it."""
        held = list(self.items())
        self._sent.clear()
        self._unsent.clear()
        self.capacity = capacity
        self._begin()
        self.edge = self.base + INITIAL_ROOM
        self.size = self._pack(self.base, held, sizes(held))

    def resume(self) -> None:
        """Sends what is held again at once: the receiver is back."""
        self._call_all_lost()
        self.path.backoff = 1.0
        self.timer = self.ask = NEVER
        self._asked = 0

    # what is due

    def due(self) -> float:
        """When ``poll`` must be called even if nothing happens; ``NEVER`` if nothing is held."""
        return min(self.timer, self.ask)

    def poll(self, now: float) -> list[Packet]:
        """The packets to send now, lowest first."""
        asking = False
        if now >= self.timer:
            self._timed_out()
        elif now >= self.ask:
            self._asked += 1
            asking = True
            self._call_all_lost()
            self.path.window = 1.0
        packets: list[Packet] = []
        path, unsent = self.path, self._unsent
        window = int(path.window)
        while self.in_flight < window:
            if self._lost:
                packet = self._next_lost()
            elif unsent and (unsent[0].end <= self.edge or asking and not self._sent):
                packet = unsent.popleft()
                self._sent.append(packet)
                if packet.end > self.top:
                    self.top = packet.end
            else:
                path.window_limited = False
                break
            self._order += 1
            packet.state, packet.sent, packet.order = SENT, now, self._order
            packet.tries += 1
            self.in_flight += 1
            packets.append(packet)
        else:
            path.window_limited = True
        if self.in_flight:
            self.ask = NEVER
            if self.timer == NEVER:
                self.timer = now + path.timeout(self.longest)
        else:
            self.timer = NEVER
            self._plan_question(now)
        return packets

    def _next_lost(self) -> Packet:
        self._lost -= 1
        return next(packet for packet in self._sent if packet.state == LOST)

    def _plan_question(self, now: float) -> None:
        """Sees to it that a receiver that has no room for what is held is asked again."""
        if self.end == self.base:
            self.ask = NEVER
        elif self.ask == NEVER or now >= self.ask:
            self.ask = now + ASK_AGAIN[min(self._asked, len(ASK_AGAIN) - 1)]

    def _timed_out(self) -> None:
        self._call_all_lost()
        self.path.on_timeout()
        self.timer = NEVER
        self._recovery = self._order

    def _call_all_lost(self) -> None:
        for packet in self._sent:
            packet.state = LOST
        self._lost = len(self._sent)
        self.in_flight = 0

    def _doubt_held(self) -> None:
        for packet in self._sent:
            if packet.state == HELD:
                packet.state = SENT
                self.in_flight += 1

    # what came back

    def on_ack(self, now: float, next_: int, have: Sequence[Sequence[int]], room: int) -> int:
        """Takes an ack; returns how many numbers it closed (0 also for one that cannot be true).

        ``have`` are inclusive ranges. ``next_`` inside a text counts as its beginning.
        """
        if next_ > self.top:
            return 0
        while next_ - 1 in self.continued:
            next_ -= 1
        if self.edge < next_ + room:
            self.edge = min(next_ + room, MAX_NUMBER)
        if next_ < self.base:       # late, or from a receiver that has lost its memory
            self._doubt_held()
            return 0
        closed = next_ - self.base
        self._sample = NEVER
        newly = self._drop_below(next_, now)
        if have and self._sent:
            newly += self._mark_held(have, now)
            self._detect_loss()
        if newly:
            self.path.on_arrival(now, newly, self._sample)
        if newly or closed:
            if self.path.backoff != 1.0:
                self.path.relax_backoff(self._sample < NEVER)
            self.timer = NEVER      # poll starts it anew: RFC 6298 §5.3
        if closed:
            self._asked = 0
            self.ask = NEVER
        if self._sent and self._sent[-1].end > self.edge and self._sent[-1].state == SENT:
            self._withdraw_question()
        return closed

    def _withdraw_question(self) -> None:
        """The receiver has answered that it has no room: what it was asked with was not sent, as it were."""
        packet = self._sent.pop()
        packet.state = UNSENT
        self._unsent.appendleft(packet)
        self.in_flight -= 1
        self.timer = NEVER

    def close(self, end: int) -> int:
        """Gives up what is held below ``end`` (its receiver refused it); returns how many numbers."""
        end = min(end, self.top)
        while end - 1 in self.continued:
            end -= 1
        closed = max(0, end - self.base)
        if closed:
            self._drop_below(end, NEVER)
            self.timer = self.ask = NEVER
        return closed

    def _drop_below(self, number: int, now: float) -> int:
        packets = 0
        for queue in (self._sent, self._unsent):
            while queue and queue[0].end <= number:
                packet = queue.popleft()
                self.size -= packet.size
                packets += self._settle(packet, now)
            if queue and queue[0].first < number:
                packet = queue[0]
                # its size stays: what is left may be as large, and more is packed behind it
                packet.items = packet.items[number - packet.first:]
                packet.first = number
                break
        if self.continued and number > self.base:
            self.continued = {held for held in self.continued if held >= number}
        self.base = number
        if self.end == number:
            self.size = 0
        return packets

    def _settle(self, packet: Packet, now: float) -> int:
        """Takes note that a packet has arrived; 1 if that is news.

        Only the newest of all transmissions that have arrived measures the round trip: an older one may have been
        told of by an ack that got lost (RFC 9002 §5.1); and one that was sent twice never does (Karn, RFC 6298 §3).
        """
        if packet.state == SENT:
            self.in_flight -= 1
        elif packet.state == LOST:
            self._lost -= 1
        else:
            return 0
        if packet.order > self._acked_order and (   # not the ack of an earlier try (RFC 8985 §6.2)
                packet.tries == 1 or now - packet.sent >= self.path.fastest):
            self._acked_order = packet.order
        if packet.order > self._newest:
            self._newest = packet.order
            self._sample = now - packet.sent if packet.tries == 1 else NEVER
        return 1

    def _mark_held(self, have: Sequence[Sequence[int]], now: float) -> int:
        newly = 0
        spans = sorted((first, last) for first, last in have)
        starts = [span[0] for span in spans]
        for packet in self._sent:
            index = bisect_right(starts, packet.first) - 1
            if index >= 0 and packet.end - 1 <= spans[index][1] and packet.state != HELD:
                newly += self._settle(packet, now)
                packet.state = HELD
        return newly

    def _detect_loss(self) -> None:
        """RFC 9002 §6.1.1: what was sent three transmissions before something that arrived is lost."""
        fresh = False
        for packet in self._sent:
            if packet.state == SENT and packet.order <= self._acked_order - PACKET_THRESHOLD:
                packet.state = LOST
                self._lost += 1
                self.in_flight -= 1
                fresh = fresh or packet.order > self._recovery
        if fresh:
            self.path.on_loss()
            self._recovery = self._order


# --- receiving ------------------------------------------------------------------------------------------------

MAX_EARLY = 4096          # numbers that a sender may be ahead of what is written, and that wait here: 3 MiB of text
MAX_SHOWN_RANGES = 64     # ranges of numbers that came by another route, or on none yet, remembered for one stream

NONE: frozenset[int] = frozenset()


class Run(NamedTuple):
    """``numbers`` consecutive numbers that a stream hands out: whole texts only, or no items (a skip)."""

    first: int
    items: list[Any]
    more: frozenset[int]
    numbers: int


Memory = tuple[int, tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


class ReceiveStream:
    """The receiver's half of a stream: puts items into order and hands each out once.

    ``next <= taken <= ready``: below ``next`` is written for good, below ``taken`` is handed out by ``take``,
    below ``ready`` are whole texts that can be handed out. From ``ready`` on lie the pieces of a text that is not
    whole yet, and behind a gap what came early. The owner calls ``written`` when some of what it was handed is
    written, in its order.
    """

    def __init__(self, stream: int, first: int = 1) -> None:
        self.stream = stream
        self.next = first
        self.taken = first
        self.ready = first
        self.edge = first           # the number after the highest that the sender was ever allowed
        self.base = 1               # the highest base heard
        self.shown = Ranges(MAX_SHOWN_RANGES)
        self.given_up = Ranges(MAX_SHOWN_RANGES)    # passed without being shown: another route may still bring them
        self.buffered = 0           # numbers held here, because they are early, not whole, or nobody took them
        self._runs: deque[Run] = deque()
        self._pieces: list[Any] = []        # of the text that begins at ``ready``
        self._early: dict[int, tuple[list[Any], frozenset[int]]] = {}
        self._handed: deque[list[int]] = deque()    # [texts, numbers of each]; 0 texts: a skip

    @property
    def reached(self) -> int:
        """The number after the last one that came without a gap."""
        return self.ready + len(self._pieces)

    @property
    def missing(self) -> bool:
        """Whether the sender has closed numbers that did not come on this route."""
        return self.base > self.reached

    def on_data(self, first: int, items: list[Any], more: Sequence[int] = (), base: int = 1) -> None:
        """Takes what a datagram brought; what is known already or beyond the limit is left aside."""
        if base > self.base:
            self.base = base
        end = first + len(items)
        if first == self.ready and end <= self.next + MAX_EARLY and not (
                self._pieces or self._early or self.shown.spans):
            self._append(items, frozenset(more) if more else NONE)      # mostly: it is what comes next
            return
        reached = self.reached
        if end <= reached or end > max(self.next, self.base) + MAX_EARLY:
            return
        if self.buffered + len(items) > MAX_EARLY + MAX_ITEMS:
            if first > reached:
                return
            self.drop_early()       # what fills the gap is worth more than what came behind it
            if self.buffered + len(items) > MAX_EARLY + MAX_ITEMS:
                return
        if self._keep(first, items, frozenset(more)) and (first <= reached or self.shown.spans):
            self._merge()

    def _keep(self, first: int, items: list[Any], more: frozenset[int]) -> bool:
        """Puts items among the early ones, unless as many from ``first`` on are there already."""
        known = len(self._early[first][0]) if first in self._early else 0
        if known >= len(items):
            return False
        self._early[first] = (items, more)
        self.buffered += len(items) - known
        return True

    def _append(self, items: list[Any], more: frozenset[int]) -> None:
        """Puts items that follow what was reached at the end of what can be handed out."""
        self.buffered += len(items)
        if not more and not self._pieces:
            self._add_run(Run(self.ready, items, NONE, len(items)))
            return
        for number, item in enumerate(items, self.reached):
            self._pieces.append(item)
            if number not in more or len(self._pieces) >= MAX_TEXT_PIECES:   # longer than any sender may send
                text, self._pieces = self._pieces, []
                self._add_run(Run(self.ready, text, frozenset(range(self.ready, number)), len(text)))

    def _add_run(self, run: Run) -> None:
        self._runs.append(run)
        self.ready += run.numbers

    def _skip(self, to: int) -> None:
        self.buffered -= len(self._pieces)
        self._pieces = []
        self._add_run(Run(self.ready, [], NONE, to - self.ready))

    def _merge(self) -> None:
        """Moves what has become consecutive from the early ones to the ready ones."""
        moved = True
        while moved:
            moved = False
            shown = self.shown.end_of(self.ready)
            if shown > self.ready:
                self._skip(shown)
            for first in sorted(self._early):
                if first > self.reached:
                    break
                items, more = self._early.pop(first)
                self.buffered -= len(items)
                if first + len(items) > self.reached:
                    moved = True
                    self._take_in(items[self.reached - first:], more)
        self.shown.drop_below(self.next)     # not ``ready``: ``give_back`` may return

    def _take_in(self, items: list[Any], more: frozenset[int]) -> None:
        """Appends items that follow what was reached, as far as no other route has shown them."""
        reached, fresh = self.reached, len(items)
        if self.shown.spans:
            fresh = next((i for i in range(len(items)) if reached + i in self.shown), len(items))
        if fresh:
            self._append(items[:fresh], more)
        else:
            self._skip(self.shown.end_of(reached))      # the text was shown whole: its pieces here do not matter
        if fresh < len(items):
            self._keep(reached + fresh, items[fresh:], more)

    def advance(self, to: int, elsewhere: bool = False) -> None:
        """Gives up waiting for the numbers below ``to``: the sender does not hold them any more.

        ``elsewhere``: another route may still bring them, see ``show``.
        """
        if to > self.reached:
            if elsewhere:
                self.given_up.add(self.ready, to)
                for start, end in self.shown.spans:
                    self.given_up.remove(start, end)
            self._skip(to)
            self._merge()

    def show(self, first: int, count: int) -> bool:
        """Asks, for another route, whether the whole texts of ``count`` numbers from ``first`` are all to be shown.

        If so, they are that route's from now on, and this stream skips those numbers. Whoever asks must have taken
        what is ready here before, and must take again behind it, so that the skip is not written before the texts.
        """
        if first < self.ready and self.given_up.covers(first, first + count):
            self.given_up.remove(first, first + count)      # late, and out of order, but not lost
            return True
        if first < self.ready or self.shown.touches(first, first + count):
            return False
        if first == self.ready and not (self._pieces or self._early or self.shown.spans):
            self._skip(first + count)
        else:
            self.shown.add(first, first + count)
            self._merge()
        return True

    def take(self, numbers: int = MAX_EARLY) -> list[Run]:
        """Hands out runs until they hold ``numbers`` numbers or more, or nothing is ready."""
        runs = []
        while self._runs and numbers > 0:
            run = self._runs.popleft()
            count = len(run.items)
            self.buffered -= count
            self.taken += run.numbers
            numbers -= count
            if run.more:
                self._handed.append([1, run.numbers])
            elif run.items:
                self._handed.append([run.numbers, 1])
            else:
                self._handed.append([0, run.numbers])
            runs.append(run)
        return runs

    def written(self, texts: int) -> None:
        """Takes note that ``texts`` more of the texts handed out are written; 0: that the skip that is next has passed.

        A skip stands for what another route shows: it does not pass along with the texts before it.
        """
        handed = self._handed
        while handed:
            count, numbers = handed[0]
            if count > texts:
                if texts:
                    self.next += texts * numbers
                    handed[0][0] -= texts
                return
            self.next += (count or 1) * numbers
            texts -= count
            handed.popleft()
            if not texts:
                return

    def all_written(self) -> None:
        """Takes note that all that was handed out is written."""
        self._handed.clear()
        self.next = self.taken

    @property
    def is_idle(self) -> bool:
        """Whether nothing is handed out that is not written yet."""
        return self.next == self.taken

    def remember(self) -> Memory:
        """What must be known of an idle stream so that nothing is shown twice; what was not taken is forgotten."""
        self.give_back(self.taken)
        return self.taken, tuple(self.shown.spans), tuple(self.given_up.spans)

    def recall(self, memory: Memory) -> None:
        """Goes on, new, where a stream of the same number stood when it was to ``remember``."""
        self.next = self.taken = self.ready = self.edge = memory[0]
        self.shown.spans, self.given_up.spans = list(memory[1]), list(memory[2])

    def give_back(self, first: int) -> None:
        """Undoes taking from the text that begins at ``first`` on, and forgets all that waits behind it.

        For what could not be kept: the sender still holds it, and will send it again or give it up.
        """
        kept: deque[list[int]] = deque()
        position = self.next
        for texts, numbers in self._handed:
            count = min(texts, (first - position) // numbers) if texts else int(position + numbers <= first)
            if count:
                kept.append([count if texts else 0, numbers])
                position += count * numbers
            if count < max(texts, 1):
                break
        self._handed = kept
        self.taken = self.ready = position
        self.given_up.remove(position, MAX_NUMBER)
        self._runs.clear()
        self._pieces = []
        self._early.clear()
        self.buffered = 0

    def drop_early(self) -> None:
        """Forgets what came early, to free memory; the sender still holds it."""
        self.buffered -= sum(len(items) for items, _ in self._early.values())
        self._early.clear()

    def ack(self, more: bool = True) -> Info:
        """The ``ack`` to send now; ``more``: whether the owner has memory for more than it promised before."""
        if more and self.edge < self.next + MAX_EARLY:
            self.edge = self.next + MAX_EARLY
        room = self.edge - self.next
        return {"stream": self.stream, "next": self.next, "room": room if room >= MAX_TEXT_PIECES else 0,
                "have": self._have() if self._early or self.ready > self.next or self._pieces else []}

    def _have(self) -> list[list[int]]:
        """What came and is not written: inclusive ranges, the lowest ones."""
        reached = self.reached
        spans = [[self.next, reached - 1]] if reached > self.next else []
        for first in sorted(self._early):
            last = first + len(self._early[first][0]) - 1
            if spans and first <= spans[-1][1] + 1:
                spans[-1][1] = max(last, spans[-1][1])
            else:
                spans.append([first, last])
        return spans[:MAX_RANGES]
