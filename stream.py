"""Reliable, ordered, flow-controlled streams over datagrams.

A stream carries items (texts, or letters of mail) from one sender to one receiver. The sender numbers them 1, 2, 3 ...
The number is the identity of an item: it stays the same however often the item is sent and whichever route it takes,
and it is what duplicates are recognized by. ``chat`` (client to client), ``save`` (client to server) and ``mail``
(server to client) are streams: one mechanism for everything that must not be lost, shown twice or reordered.

Rules of this module
--------------------
- No sockets, no clock, no randomness. Time comes in as ``now``, seconds of any origin that never go back; packets to
  send and acks to send come out as return values.
- No role. No stream knows whether its items are chat, saves or mail, or who sends them. ``Reach``, ``Frames`` and
  ``Incoming`` do: they are what ``conversation`` notes beside a stream.
- An ack is a promise: ``next`` moves only when the owner says that items are *written* (to stdout, to disk), not when
  they arrive.
- The sender keeps every item until ``next`` has passed it. Selective acknowledgements only hold back retransmission.
- A long text is one thing, although it takes several consecutive numbers: ``next`` and ``base`` never stand inside it,
  and it is delivered, acked and refused whole.
- Every buffer has a limit. What exceeds it is dropped: the sender still has it.
- Sizes and numbers that both ends must agree on are in ``protocol``; times are beside the timer that they govern.

How it works
------------
``SendStream`` packs consecutive items into packets, one packet for one datagram, and keeps a *window* of them in
flight. Two windows bound it. The *send window* is the receiver's: each ack says how many numbers beyond ``next`` it has
room for, which is its *receive window*, and what does not fit waits here (backpressure). The *congestion window* is the
path's: how many datagrams may be in flight before the next ack. ``Path`` estimates it, and the retransmission timeout,
from what comes back. It follows RFC 6298 (timeout), RFC 9002 (loss by packet threshold) and RFC 5681 (slow start,
multiplicative decrease), counted in datagrams, with one change: a loss reduces the window to what the path was seen to
carry (TCP Westwood+), at most by half, because a radio link loses datagrams although no queue is full.

An ack carries ``next``, the cumulative acknowledgement; ``have``, the selective ones (SACK): ranges that are buffered
or not written yet; and ``room``, the receive window. A receiver may drop what it has selectively acknowledged (*SACK
reneging*, RFC 2018 §8), because it is short of memory or was started again. So the sender forgets all SACKs at a
timeout, and when it sees a ``next`` below what was acknowledged before.

When the receive window is closed, nothing is in flight and no ack is due: if the ack that opens it again gets lost,
both sides wait for ever. Therefore the sender repeats its lowest packet after 0.5, 1, 2, then every 5 s. This is the
*zero-window probe* of TCP's persist timer; every datagram is answered by an ack, whatever the window is.

``ReceiveStream`` puts items into order and hands each out once (deduplication). What comes behind a gap is buffered
until the gap is filled: that is the price of order, *head-of-line blocking*, and it never reaches beyond one stream. A
gap may be filled by another route: ``claim`` marks numbers as delivered by it, ``advance`` gives up numbers that the
sender does not have any more. ``snapshot`` and ``restore`` keep what is needed for deduplication after the stream
itself was evicted.
"""
from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import Enum
from itertools import accumulate, takewhile
from operator import itemgetter

from protocol import (ARRAY_GROWTH, BUNDLE_EXTRA, ENVELOPE_BYTES, INITIAL_ROOM, KEY_NAME_BYTES, MAX_DATAGRAM, MAX_EARLY,
                      MAX_ITEMS, MAX_NUMBER, MAX_RANGES, MAX_TEXT_PIECES, NEVER, RECORD_EXTRA, SESSION_BYTES,
                      SESSION_SIZE, TIME_RUN_SIZE, TIME_SIZE, Address, Any, Info, NamedTuple, Protocol, bundle_room,
                      encode, merged, padded, text_sizes)


# --- ranges ---------------------------------------------------------------------------------------------------

class Ranges:
    """A set of numbers as sorted, disjoint, half-open ranges; beyond ``most`` ranges, the lowest are dropped."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.spans: list[tuple[int, int]] = []

    def __contains__(self, number: int) -> bool:
        return self.end_of(number) > number

    def touches(self, start: int, end: int) -> bool:
        """Return whether any number of [start, end) is in the set."""
        index = bisect_left(self.spans, (end,)) - 1
        return index >= 0 and start < self.spans[index][1]

    def add(self, start: int, end: int) -> None:
        """Add [start, end)."""
        low = bisect_left(self.spans, start, key=itemgetter(1))
        high = bisect_right(self.spans, end, key=itemgetter(0))
        if low < high:      # these overlap it, or touch it
            start, end = min(start, self.spans[low][0]), max(end, self.spans[high - 1][1])
        self.spans[low:high] = [(start, end)]
        del self.spans[:-self.most]

    def end_of(self, number: int) -> int:
        """Return where the range that contains ``number`` ends; ``number`` itself if none does."""
        index = bisect_left(self.spans, (number + 1,)) - 1
        return max(number, self.spans[index][1]) if index >= 0 else number

    def covers(self, start: int, end: int) -> bool:
        """Return whether every number of [start, end) is in the set."""
        return end <= self.end_of(start)

    def remove(self, start: int, end: int) -> None:
        """Remove [start, end)."""
        left = []
        for low, high in self.spans:
            if low < start:
                left.append((low, min(high, start)))
            if end < high:
                left.append((max(low, end), high))
        self.spans = left[-self.most:]

    def drop_below(self, number: int) -> None:
        """Remove the ranges that lie wholly below ``number``."""
        del self.spans[:bisect_right(self.spans, number, key=itemgetter(1))]


# --- the path -------------------------------------------------------------------------------------------------

INITIAL_TIMEOUT = 0.1     # s; before a round trip was measured: several transmissions must fit into 500 ms
MIN_TIMEOUT = 0.05        # s; a receiver that is busy (a commit, a full pipe) is no loss
MAX_TIMEOUT = 5.0         # s; the back-off ends here
BACKOFF_CAP_AFTER_ACK = 4.0     # factor; see ``Path.relax_backoff``
CLOCK_GRAIN = 0.001       # s; G of RFC 6298
INITIAL_CONGESTION_WINDOW = 10      # datagrams (RFC 6928)
MIN_CONGESTION_WINDOW = 2           # datagrams (RFC 9002 §7.2)
MAX_CONGESTION_WINDOW = 256         # datagrams in flight
RATE_GAIN = 0.125         # weight of the newest round trip in the estimate of the rate


class Path:
    """What is known of the path to a receiver: round trip, retransmission timeout, congestion window."""

    def __init__(self, initial_timeout: float) -> None:
        self.smoothed_rtt: float | None = None      # s; SRTT of RFC 6298
        self.min_rtt = NEVER                        # s
        self.backoff = 1.0                          # factor on the timeout
        self.congestion_window: float = INITIAL_CONGESTION_WINDOW       # datagrams
        self.slow_start_threshold: float = MAX_CONGESTION_WINDOW        # datagrams; ssthresh of RFC 5681
        self.congestion_limited = False     # whether this window ended the last poll, not a lack of items or of room
        self._rtt_variation = 0.0           # s; RTTVAR of RFC 6298
        self._timeout = initial_timeout     # s; without the back-off
        self._rate = 0.0                    # datagrams that arrive in a second, smoothed over round trips
        self._round_began = -NEVER          # when the round trip began that is counted now
        self._arrived = 0                   # datagrams since then

    def timeout(self, longest: float) -> float:
        """Return the retransmission timeout in seconds; back-off does not make it longer than ``longest``."""
        if self.backoff == 1.0:
            return self._timeout
        return min(self._timeout * self.backoff, max(self._timeout, longest))

    def on_arrival(self, now: float, packets: int, sample: float) -> None:
        """Learn that ``packets`` have arrived, and the round trip of the newest (``NEVER`` if it measures none)."""
        if 0 <= sample < NEVER:
            self._measure(sample)
        self._arrived += packets
        passed = now - self._round_began
        if self.smoothed_rtt is not None and passed >= self.smoothed_rtt and passed >= CLOCK_GRAIN:
            # once for each round trip: the estimate of the rate of TCP Westwood+ (Mascolo et al., 2001)
            rate = self._arrived / passed
            self._rate += (rate - self._rate) * (RATE_GAIN if self._rate else 1.0)
            self._round_began, self._arrived = now, 0
        if self.congestion_limited:     # a window that was not used proves nothing (RFC 9002 §7.8)
            slow_start = self.congestion_window < self.slow_start_threshold
            growth = packets if slow_start else packets / self.congestion_window    # RFC 5681 §3.1
            self.congestion_window = min(self.congestion_window + growth, MAX_CONGESTION_WINDOW)

    def _measure(self, sample: float) -> None:
        """Update the timeout by RFC 6298 §2, with other bounds."""
        if sample < self.min_rtt:
            self.min_rtt = sample
        if self.smoothed_rtt is None:
            self.smoothed_rtt, self._rtt_variation = sample, sample / 2
        else:
            self._rtt_variation += (abs(sample - self.smoothed_rtt) - self._rtt_variation) / 4
            self.smoothed_rtt += (sample - self.smoothed_rtt) / 8
        timeout = self.smoothed_rtt + max(4 * self._rtt_variation, CLOCK_GRAIN)
        self._timeout = MIN_TIMEOUT if timeout < MIN_TIMEOUT else min(timeout, MAX_TIMEOUT)

    def relax_backoff(self, measured: bool) -> None:
        """Learn that an ack has come: end the back-off if it ``measured`` the path, else shorten it.

        What was sent twice measures nothing (Karn). So on a path that is slower than the first timeout the back-off
        must stay until a packet is acked before it is repeated: without it, everything would be sent twice for ever.
        Where the path was measured before, the timeout is about right, and a long back-off would only waste time.
        """
        if measured:
            self.backoff = 1.0
        elif self.smoothed_rtt is not None:
            self.backoff = min(self.backoff, BACKOFF_CAP_AFTER_ACK)

    def on_loss(self) -> None:
        """Shrink the window: something was lost that later packets overtook (RFC 9002 §7.3.2)."""
        self.slow_start_threshold = self.congestion_window = self._carried()

    def on_timeout(self) -> None:
        """Back off, and start again with one datagram (RFC 5681 §3.1, RFC 6298 §5.5)."""
        if self.backoff == 1.0:
            self.slow_start_threshold = self._carried()
        self.congestion_window = 1.0
        self.backoff = min(self.backoff * 2, MAX_TIMEOUT / MIN_TIMEOUT)

    def _carried(self) -> float:
        """Return the window that fills the path but not its queue; at least half of the one that met a loss."""
        fills = min(self.congestion_window, self._rate * self.min_rtt) if self._rate else 0.0
        return max(self.congestion_window / 2, fills, MIN_CONGESTION_WINDOW)


RELAY_TIME = 60.0         # s during which somebody who cannot be reached directly is not tried again, twice as long ...
MAX_RELAY_TIME = 600.0    # ... after each further time, up to this
KNOCK_TIMEOUT = 0.3       # s; a recipient that was asked to knock, and can, has done so by then


class Reach:
    """What is known of the direct path to a recipient, and of the attempts to open it.

    A router, or a firewall, lets in only what it takes for an answer. So two who are behind such must both send first:
    when the recipient does not answer, the server is asked to introduce us (``meet``), and the recipient *knocks* from
    behind its own router, which takes what we send from then on for the answer. Once for each silence.
    """

    def __init__(self) -> None:
        self.beside: Address | None = None      # where it is in our own network, if it has knocked from there
        self.closed_until = -NEVER              # the path did not work: it is not tried before that
        self.met_at = -NEVER                    # when the server was asked to introduce us, in this silence or the last
        self.awaits_knock = False               # none has come since then
        self._failures = 0                      # since the path worked last

    def fail(self, now: float) -> None:
        """Note that the path does not work: it is tried again later, and each time later."""
        self.closed_until = now + min(RELAY_TIME * 2 ** self._failures, MAX_RELAY_TIME)
        self._failures = min(self._failures + 1, 16)
        self.beside, self.awaits_knock = None, True

    def work(self) -> None:
        """Note that the path works."""
        self.closed_until = self.met_at = -NEVER
        self.awaits_knock, self._failures = False, 0

    def meet(self, now: float) -> None:
        """Note that the server is asked to introduce us."""
        self.met_at, self.awaits_knock = now, True

    def is_hopeless(self, now: float) -> bool:
        """Return whether the recipient was asked to knock long enough ago, and nothing has come."""
        return self.awaits_knock and -NEVER < self.met_at <= now - KNOCK_TIMEOUT


# --- sending --------------------------------------------------------------------------------------------------

PACKET_THRESHOLD = 3      # datagrams sent later and acked first make a loss (RFC 9002 §6.1.1)
ZERO_WINDOW_PROBES = (0.5, 1.0, 2.0, 5.0)   # s until the next probe of a closed window; the last one repeats


class PacketState(Enum):
    """What the sender knows of a packet::

        state     where it is                  becomes  when
        UNSENT    waits in ``_unsent``         SENT     ``poll`` sends it
        SENT      in flight                    SACKED   an ack selectively acknowledges it
                                               LOST     three packets sent later have arrived, or at a timeout
                                               UNSENT   it was a probe, and the window is still closed
        SACKED    buffered by the receiver     LOST     at a timeout or a probe: the receiver may have dropped it
                                               SENT     an ack shows that the receiver was started again
        LOST      has to be repeated           SENT     ``poll`` repeats it
                                               SACKED   an ack selectively acknowledges it after all

    In each state, a packet is forgotten when the cumulative acknowledgement or a refusal has passed it.
    """

    UNSENT = "unsent"
    SENT = "sent"
    SACKED = "sacked"
    LOST = "lost"


# module constants, because the look-up of a member in its class is slow
UNSENT, SENT, SACKED, LOST = PacketState.UNSENT, PacketState.SENT, PacketState.SACKED, PacketState.LOST


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


class SendStream:
    """The sender's half of a stream: numbers items, packs them, sends them until they are acked.

    The owner queues items with their sizes, passes on acks, calls ``poll(now)`` whenever something changed or ``due()``
    has come, and turns the packets that it returns into datagrams.

    ``base <= top <= end``: numbers below ``base`` are acked, those below ``top`` were sent at least once, those below
    ``end`` are queued. Nothing from ``window_end`` on is sent, except as a probe.
    """

    def __init__(self, id_: int, capacity: int, initial_timeout: float = INITIAL_TIMEOUT) -> None:
        self.id = id_
        self.capacity = capacity    # bytes of items in one datagram
        self.base = 1               # the lowest number that is not acked
        self.end = 1                # the number of the next item that is queued
        self.top = 1                # the number after the highest that was ever sent
        self.window_end = 1 + INITIAL_ROOM      # the number after the highest that the receiver has room for
        self.size = 0               # bytes of the items that are not acked
        self.timeout_cap = MAX_TIMEOUT          # s; the back-off ends here
        self.continued: set[int] = set()        # the numbers of a text that the next one continues
        self._sent: deque[Packet] = deque()
        self._unsent: deque[Packet] = deque()
        self._initial_timeout = initial_timeout
        self._begin()

    def _begin(self) -> None:
        """Begin on a path of which nothing is known."""
        self.path = Path(self._initial_timeout)     # to the receiver; another one after each change of route
        self.in_flight = 0          # packets that are SENT
        self.timeout_at = NEVER     # when all that is in flight counts as lost
        self.probe_at = NEVER       # when a closed window is probed
        self._probes = 0            # since ``next`` moved
        self._transmissions = 0     # so far
        self._acked_order = 0       # the newest transmission that has certainly arrived, to detect losses
        self._newest_acked = 0      # the newest transmission that any ack has reported, to measure round trips,
        self._sample = NEVER        # s; and its round trip, if the ack at hand is the first to report it
        self._recovery = 0          # losses of transmissions up to this one were answered by a smaller window already
        self._lost = 0              # packets that are LOST

    @property
    def pending(self) -> int:
        """How many numbers are not acked yet."""
        return self.end - self.base

    def queue(self, items: Sequence[Any], sizes: Sequence[int], continued: Collection[int] = ()) -> None:
        """Append items; ``sizes`` are their encoded bytes, ``continued`` the numbers that the next one continues.

        Every size must be at most ``capacity``. An item of size 0 is in one packet with the item before it.
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
        """Pack items from ``number`` on into as few packets as possible; return their bytes."""
        totals = list(accumulate(sizes))
        done = start = 0
        if self._unsent and self._unsent[-1].end == number:     # fill the last packet first
            tail = self._unsent[-1]
            start = self._whole(bisect_right(totals, self.capacity - tail.size), MAX_ITEMS - len(tail.items), sizes)
            if start > 0:
                tail.items.extend(items[:start])
                tail.end += start
                tail.size += totals[start - 1]
                done = totals[start - 1]
        while start < len(items):
            end = self._whole(bisect_right(totals, done + self.capacity, start), start + MAX_ITEMS, sizes)
            assert end > start, "an item larger than a datagram"
            self._unsent.append(Packet(number + start, list(items[start:end]), totals[end - 1] - done))
            done, start = totals[end - 1], end
        return totals[-1] if totals else 0

    @staticmethod
    def _whole(end: int, most: int, sizes: Sequence[int]) -> int:
        """Return where a packet ends that would end at ``end``, but at ``most`` at the latest: behind a whole group."""
        if end <= most:
            return end      # the next item did not fit, so it has a size
        while most > 0 and not sizes[most]:
            most -= 1
        return most

    def pending_items(self) -> Iterator[Any]:
        """Yield the items that are not acked yet, lowest first."""
        for packets in (self._sent, self._unsent):
            for packet in packets:
                yield from packet.items

    def reroute(self, capacity: int, sizes: Callable[[list[Any]], list[int]]) -> None:
        """Move everything pending to another path: nothing counts as sent there, and nothing is known of it."""
        items = list(self.pending_items())
        self._sent.clear()
        self._unsent.clear()
        self.capacity = capacity
        self._begin()
        self.window_end = self.base + INITIAL_ROOM
        self.size = self._pack(self.base, items, sizes(items))

    def resume(self) -> None:
        """Send what is pending again at once: the receiver is back."""
        self._mark_all_lost()
        self.path.backoff = 1.0
        self.timeout_at = self.probe_at = NEVER
        self._probes = 0

    # what is due

    def due(self) -> float:
        """Return when ``poll`` must be called even if nothing happens; ``NEVER`` if nothing is pending."""
        return min(self.timeout_at, self.probe_at)

    def poll(self, now: float) -> list[Packet]:
        """Return the packets to send now, lowest first."""
        probing = False
        if now >= self.timeout_at:
            self._on_timeout()
        elif now >= self.probe_at:
            # The receiver may have opened its window in an ack that got lost; its answer to one packet will tell. Or it
            # has all that was sent, unwritten, so that nothing is in flight: then the lowest packet is repeated.
            probing = True
            self._probes += 1
            self._mark_all_lost()
            self.path.congestion_window = 1.0
        packets: list[Packet] = []
        path, unsent = self.path, self._unsent
        window = int(path.congestion_window)
        while self.in_flight < window:
            # What is lost goes first, lowest first: until it arrives, the receiver can write nothing that is behind it.
            if self._lost:
                packet = self._next_lost()
            elif unsent and (unsent[0].end <= self.window_end or (probing and not self._sent)):
                packet = unsent.popleft()
                self._sent.append(packet)
                if packet.end > self.top:
                    self.top = packet.end
            else:
                path.congestion_limited = False
                break
            self._transmissions += 1
            packet.state, packet.sent, packet.order = SENT, now, self._transmissions
            packet.tries += 1
            self.in_flight += 1
            packets.append(packet)
        else:
            path.congestion_limited = True
        # Something must always be due while anything is pending, or the stream would stop for ever: the timeout while
        # packets are in flight, else the next probe (the window is closed, or the receiver has everything unwritten).
        if self.in_flight:
            self.probe_at = NEVER
            if self.timeout_at == NEVER:
                self.timeout_at = now + path.timeout(self.timeout_cap)
        else:
            self.timeout_at = NEVER
            self._plan_window_probe(now)
        return packets

    def _next_lost(self) -> Packet:
        self._lost -= 1
        return next(packet for packet in self._sent if packet.state is LOST)

    def _plan_window_probe(self, now: float) -> None:
        if self.end == self.base:
            self.probe_at = NEVER
        elif self.probe_at == NEVER or now >= self.probe_at:
            self.probe_at = now + ZERO_WINDOW_PROBES[min(self._probes, len(ZERO_WINDOW_PROBES) - 1)]

    def _on_timeout(self) -> None:
        self._mark_all_lost()
        self.path.on_timeout()
        self.timeout_at = NEVER
        self._recovery = self._transmissions

    def _mark_all_lost(self) -> None:
        """Plan to send everything again, also what is SACKED: the receiver may have dropped it (RFC 2018 §8)."""
        for packet in self._sent:
            packet.state = LOST
        self._lost = len(self._sent)
        self.in_flight = 0

    def _forget_sacks(self) -> None:
        """Count what is SACKED as in flight again: the timeout will repeat it unless it is acked once more."""
        for packet in self._sent:
            if packet.state is SACKED:
                packet.state = SENT
                self.in_flight += 1

    # what came back

    def on_ack(self, now: float, next_: int, have: Sequence[Sequence[int]], room: int) -> int:
        """Process an ack; return how many numbers it closed (0 also for one that cannot be true).

        ``have`` are inclusive ranges. A ``next_`` inside a text counts as the beginning of that text.
        """
        if next_ > self.top:
            return 0
        while next_ - 1 in self.continued:
            next_ -= 1
        # The end of the window never goes back: a smaller one is that of an older ack, which was overtaken by a later
        # one. The receiver buffers what it has granted once.
        if self.window_end < next_ + room:
            self.window_end = min(next_ + room, MAX_NUMBER)
        if next_ < self.base:
            # A late copy of an older ack, or the receiver was started again and what it had buffered is gone. In the
            # second case the SACKs are not true any more, and no other ack would ever say so.
            self._forget_sacks()
            return 0
        closed = next_ - self.base
        self._sample = NEVER
        newly = self._drop_below(next_, now)
        if have and self._sent:
            newly += self._mark_sacked(have, now)
            self._detect_losses()
        if newly:
            self.path.on_arrival(now, newly, self._sample)
        if newly or closed:
            if self.path.backoff != 1.0:
                self.path.relax_backoff(self._sample < NEVER)
            self.timeout_at = NEVER     # ``poll`` sets it again, counted from now (RFC 6298 §5.3)
        if closed:
            self._probes = 0
            self.probe_at = NEVER
        if self._sent and self._sent[-1].end > self.window_end:
            self._withdraw_window_probe()
        return closed

    def _withdraw_window_probe(self) -> None:
        """Count the packet of a probe as not sent: the answer is here, and the window is still closed.

        Otherwise the packet would time out, and be repeated by the retransmission timeout instead of the next probe.
        """
        packet = self._sent[-1]
        if packet.state is SENT:
            self._sent.pop()
            packet.state = UNSENT
            self._unsent.appendleft(packet)
            self.in_flight -= 1
            self.timeout_at = NEVER

    def close(self, end: int) -> int:
        """Give up what is pending below ``end`` (its receiver refused it); return how many numbers that are."""
        end = min(end, self.top)
        while end - 1 in self.continued:
            end -= 1
        closed = max(0, end - self.base)
        if closed:
            self._drop_below(end, NEVER)
            self.timeout_at = self.probe_at = NEVER
        return closed

    def close_all(self) -> int:
        """Give up all that is pending, sent or not: it must not be sent; return how many numbers that are."""
        self.top = self.end
        return self.close(self.end)

    def _drop_below(self, number: int, now: float) -> int:
        """Forget the items below ``number``; return how many packets arrived by that."""
        packets = 0
        for queue in (self._sent, self._unsent):
            while queue and queue[0].end <= number:
                packet = queue.popleft()
                self.size -= packet.size
                packets += self._note_arrival(packet, now)
            if queue and queue[0].first < number:
                packet = queue[0]
                # its size stays: what is left may be as large, and more is packed behind it
                packet.items = packet.items[number - packet.first:]
                packet.first = number
                break
        if self.continued and number > self.base:
            self.continued = {other for other in self.continued if other >= number}
        self.base = number
        if self.end == number:
            self.size = 0
        return packets

    def _note_arrival(self, packet: Packet, now: float) -> int:
        """Note that a packet has arrived; return 1 if that is news, else 0.

        Of all transmissions that have arrived, only the newest measures the round trip: an older one may have been
        acked before, by an ack that got lost (RFC 9002 §5.1). A packet that was sent twice never does (Karn, RFC 6298
        §3).
        """
        if packet.state is SENT:
            self.in_flight -= 1
        elif packet.state is LOST:
            self._lost -= 1
        else:
            return 0
        if packet.order > self._acked_order and (   # not an ack of the try before (RFC 8985 §6.2)
                packet.tries == 1 or now - packet.sent >= self.path.min_rtt):
            self._acked_order = packet.order
        if packet.order > self._newest_acked:
            self._newest_acked = packet.order
            self._sample = now - packet.sent if packet.tries == 1 else NEVER
        return 1

    def _mark_sacked(self, have: Sequence[Sequence[int]], now: float) -> int:
        """Note which packets are wholly in ``have``; return how many arrived by that."""
        newly = 0
        spans = sorted((first, last) for first, last in have)
        starts = [span[0] for span in spans]
        for packet in self._sent:
            index = bisect_right(starts, packet.first) - 1
            if index >= 0 and packet.end - 1 <= spans[index][1] and packet.state is not SACKED:
                newly += self._note_arrival(packet, now)
                packet.state = SACKED
        return newly

    def _detect_losses(self) -> None:
        """Mark as lost what was sent three transmissions before something that has arrived (RFC 9002 §6.1.1)."""
        fresh = False
        for packet in self._sent:
            if packet.state is SENT and packet.order <= self._acked_order - PACKET_THRESHOLD:
                packet.state = LOST
                self._lost += 1
                self.in_flight -= 1
                fresh = fresh or packet.order > self._recovery
        if fresh:       # losses of one round trip have one cause, and reduce the window once
            self.path.on_loss()
            self._recovery = self._transmissions


TIME_RUNS_KEPT = 8192     # runs of sending times of a stream, more than a client queues; then the old ones are dropped


class SendTimes:
    """When each number of a stream was sent (wall clock), as runs of numbers with the same time."""

    def __init__(self) -> None:
        self._starts: list[int] = []        # the first number of each run
        self._times: list[float] = []

    def add(self, number: int, at: float, base: int) -> None:
        """Note that numbers from ``number`` on are sent at ``at``; those below ``base`` are closed."""
        if number == base:      # all are: else each of thousands of recipients would keep its old runs
            self._starts.clear()
            self._times.clear()
        self._starts.append(number)
        self._times.append(at)
        if len(self._starts) > TIME_RUNS_KEPT:
            closed = max(0, bisect_right(self._starts, base) - 1)
            del self._starts[:closed], self._times[:closed]

    def of(self, packet: Packet) -> list[list[Any]]:
        """Return when the items of a packet were sent: [time, how many] for each time."""
        starts, number, runs = self._starts, packet.first, list[list[Any]]()
        index = bisect_right(starts, number)
        while number < packet.end:
            end = min(starts[index], packet.end) if index < len(starts) else packet.end
            runs.append([self._times[index - 1], end - number])
            number, index = end, index + 1
        return runs

    def changes(self, first: int, end: int) -> list[int]:
        """Return the numbers in [first, end) that were sent at another time than the one before."""
        return self._starts[bisect_left(self._starts, first):bisect_left(self._starts, end)]


NOT_YET = "not-yet"       # what a guard says of messages that may be sent only later


class Account:
    """The owner's session at the server, and whether everything is encrypted there."""

    def __init__(self, session: bytes = bytes(SESSION_BYTES), is_sealed: bool = False) -> None:
        self.session, self.is_sealed = session, is_sealed


class Sealing(Protocol):
    """What seals the texts of one stream in bundles, which the server cannot read."""

    key: bytes          # that opens them, ...
    name: bytes         # ... and what it is called
    envelope: bytes

    def seal(self, first: int, times: Sequence[Sequence[Any]], texts: Sequence[str],
             continued: Collection[int]) -> bytes: ...


class Frames:
    """How packets of texts become datagrams: ``chat`` to their recipient, or ``save`` to the server.

    Packets are packed again after a loss or a change of route, so nothing here may belong to the datagram. What belongs
    to a text is a list by number, like ``more`` and ``at``, and counts in ``sizes``. Each field must be in the samples
    of ``capacity``, with its largest value. Sealed texts take less, because one time counts for many: ``is_sealing``
    says which of the two the packets are made for.
    """

    def __init__(self, me: str, peer: str, stream: int) -> None:
        self.me, self.peer, self.id = me, peer, stream
        self.account = Account()            # the owner's, at the server
        self.letters: Sealing | None = None     # seals what goes to the server; None: it goes as it is
        self.is_sealing = False             # packets for the server have room for what ``letters`` makes of them
        self.times = SendTimes()

    def capacity(self, is_direct: bool) -> int:
        """Return how many bytes the items may take in a datagram, beside the largest header.

        The number in ``more`` stands for any: ``sizes`` counts those behind the first.
        """
        sample = self._info(MAX_NUMBER, [], MAX_NUMBER, [MAX_NUMBER])
        if self.is_sealing and not is_direct:
            sample.update(envelope=bytes(ENVELOPE_BYTES), key=bytes(KEY_NAME_BYTES))
        header = self._chat(sample) if is_direct else self._save(sample, [], False)
        room = MAX_DATAGRAM - (RECORD_EXTRA if self.account.is_sealed else 0) - len(header) - ARRAY_GROWTH
        return min(room, bundle_room(self.me)) - BUNDLE_EXTRA if self.is_sealing and not is_direct else room

    def sizes(self, items: Sequence[str], first: int, continued: Collection[int], is_direct: bool) -> list[int]:
        """Return the most bytes that each of the items takes, which are numbered from ``first`` on."""
        if is_direct or not self.is_sealing:
            return text_sizes(items, first, continued, 0 if is_direct else TIME_SIZE)
        sizes = text_sizes(items, first, continued)
        for number in self.times.changes(first, first + len(items)):
            sizes[number - first] += TIME_RUN_SIZE
        return sizes

    def chat(self, packet: Packet, stream: SendStream) -> bytes:
        """Return a packet as it goes to the recipient."""
        return self._chat(self._info(packet.first, packet.items, stream.base, self._more(packet, stream)))

    def save(self, packet: Packet, stream: SendStream, is_relay: bool) -> bytes:
        """Return a packet as it goes to the server; ``is_relay``: see ``Route``."""
        info = self._info(packet.first, packet.items, stream.base, self._more(packet, stream))
        times = self.times.of(packet)
        if self.letters is None:
            return self._save(info, [at for at, count in times for _ in range(count)], is_relay)
        info.update(envelope=self.letters.envelope, key=self.letters.name,
                    text=self.letters.seal(packet.first, times, packet.items, stream.continued))
        return self._save(info, [], is_relay)

    def meet(self) -> bytes:
        """Return the question to the server to introduce us to the recipient."""
        return padded("meet", {"session": self.account.session, "to": self.peer, "stream": self.id}, SESSION_SIZE)

    @staticmethod
    def _more(packet: Packet, stream: SendStream) -> Sequence[int]:
        if not stream.continued:
            return ()
        return [number for number in range(packet.first, packet.end) if number in stream.continued]

    def _info(self, first: int, items: list[Any], base: int, more: Sequence[int]) -> Info:
        info: Info = {"to": self.peer, "stream": self.id, "n": first, "base": base, "text": items}
        if more:
            info["more"] = more
        return info

    def _chat(self, info: Info) -> bytes:
        info["from"] = self.me
        return encode("chat", info)

    def _save(self, info: Info, times: list[float], is_relay: bool) -> bytes:
        info.update(session=self.account.session, at=times, relay=is_relay)     # the session says who sends
        return encode("save", info)


# --- receiving ------------------------------------------------------------------------------------------------

MAX_CLAIMED_RANGES = 64   # ranges of numbers that another route has delivered, or none yet, remembered for one stream

RUN_JOINED = 128          # texts of a run, from which on what follows is another one

NONE_CONTINUED: frozenset[int] = frozenset()


class Run(NamedTuple):
    """Consecutive numbers that a stream hands out: whole texts, or a skip (no items) over what another route has.

    ``more`` are the numbers of a long text, which is a run of its own, but for the last one.
    """

    first: int
    items: list[Any]
    more: frozenset[int]
    numbers: int


class Snapshot(NamedTuple):
    """What must be remembered of a stream that is evicted, so that nothing of it is delivered twice."""

    next: int                               # everything below is delivered, or given up
    claimed: tuple[tuple[int, int], ...]    # ranges above it that another route has delivered
    given_up: tuple[tuple[int, int], ...]   # ranges below it that were never delivered


NOTHING_DELIVERED = Snapshot(1, (), ())


class ReceiveStream:
    """The receiver's half of a stream: puts items into order and hands each out once.

    Five marks divide the numbers. Data moves ``ready`` and ``reached``, ``take`` moves ``taken``, ``written`` moves
    ``next``, ``ack`` moves ``window_end``::

                 next          taken             ready             reached          window_end
        written,  | handed out, | whole texts,    | pieces of a     | a gap, then      | not promised
        acked     | not written | not handed out  | text, not whole | what came early  | to the sender

    The owner calls ``written`` when some of what it was handed is written, in its order.
    """

    def __init__(self, id_: int, first: int = 1) -> None:
        self.id = id_
        self.next = first
        self.taken = first
        self.ready = first
        self.window_end = first     # the number after the highest that the sender was ever allowed
        self.base = 1               # the highest base heard
        self.claimed = Ranges(MAX_CLAIMED_RANGES)       # delivered by another route
        self.given_up = Ranges(MAX_CLAIMED_RANGES)      # skipped without being delivered: another route may bring them
        self.buffered = 0           # numbers in memory: early, not whole, or not handed out
        self._runs: deque[Run] = deque()    # what ``take`` will hand out
        self._pieces: list[Any] = []        # of the text that begins at ``ready``
        self._early: dict[int, tuple[list[Any], frozenset[int]]] = {}   # first number -> items, continued numbers
        self._handed: deque[list[int]] = deque()    # not written: [texts, numbers of each]; 0 texts: a skip

    @property
    def reached(self) -> int:
        """The number after the last one that came without a gap."""
        return self.ready + len(self._pieces)

    @property
    def missing(self) -> bool:
        """Whether the sender has closed numbers that did not come on this route."""
        return self.base > self.reached

    def on_data(self, first: int, items: list[Any], more: Sequence[int] = (), base: int = 1) -> None:
        """Process what a datagram brought; drop what is known already or beyond the limit."""
        if base > self.base:
            self.base = base
        end = first + len(items)
        if first == self.ready and end <= self.next + MAX_EARLY and not (
                self._pieces or self._early or self.claimed.spans):
            # mostly: exactly what comes next, and nothing that it has to be merged with
            self._append(items, frozenset(more) if more else NONE_CONTINUED)
            return
        reached = self.reached
        # The limit counts from ``base``, too: a stream that is new here may have begun long ago, and what lies between
        # ``next`` and ``base`` will never come on this route.
        if end <= reached or end > max(self.next, self.base) + MAX_EARLY:
            return
        if not self._has_memory_for(first, len(items)):
            return
        if self._keep(first, items, frozenset(more)) and (first <= reached or self.claimed.spans):
            self._merge()

    def _has_memory_for(self, first: int, count: int) -> bool:
        """Return whether items may be buffered; for what fills the gap, drop what came early behind it."""
        if self.buffered + count > MAX_EARLY + MAX_ITEMS and first <= self.reached:
            self.drop_early()
        return self.buffered + count <= MAX_EARLY + MAX_ITEMS

    def _keep(self, first: int, items: list[Any], more: frozenset[int]) -> bool:
        """Put items among the early ones, unless as many from ``first`` on are there already."""
        known = len(self._early[first][0]) if first in self._early else 0
        if known >= len(items):
            return False
        self._early[first] = (items, more)
        self.buffered += len(items) - known
        return True

    def _append(self, items: list[Any], more: frozenset[int]) -> None:
        """Append items that follow what was reached to what can be handed out, text by text if some are long."""
        self.buffered += len(items)
        if not more and not self._pieces:
            self._add_run(Run(self.ready, items, NONE_CONTINUED, len(items)))
            return
        for number, item in enumerate(items, self.reached):
            self._pieces.append(item)
            if number not in more or len(self._pieces) >= MAX_TEXT_PIECES:   # longer than any sender may send
                text, self._pieces = self._pieces, []
                self._add_run(Run(self.ready, text, frozenset(range(self.ready, number)), len(text)))

    def _add_run(self, run: Run) -> None:
        """Let ``take`` hand out a run: together with the one before, if both are short texts."""
        self.ready += run.numbers
        last = self._runs[-1] if self._runs else run
        if last is run or not (last.items and run.items) or last.more or run.more or len(last.items) >= RUN_JOINED:
            self._runs.append(run)
        else:
            self._runs[-1] = Run(last.first, last.items + run.items, NONE_CONTINUED, last.numbers + run.numbers)

    def _skip(self, to: int) -> None:
        """Pass over the numbers from ``ready`` to ``to``; pieces of a text that lie there are not needed any more."""
        self.buffered -= len(self._pieces)
        self._pieces = []
        self._add_run(Run(self.ready, [], NONE_CONTINUED, to - self.ready))

    def _merge(self) -> None:
        """Move what has become consecutive from the early items to the ready ones.

        Early items may overlap each other and what was reached: after a change of route the sender packs the same
        numbers into other datagrams. Numbers that another route has claimed may lie between them, so a claimed range
        that is skipped can connect the next early items, and these can reach the next claimed range: repeat until
        nothing moves.
        """
        moved = True
        while moved:
            moved = False
            end_of_claimed = self.claimed.end_of(self.ready)
            if end_of_claimed > self.ready:
                self._skip(end_of_claimed)
            for first in sorted(self._early):
                if first > self.reached:
                    break
                items, more = self._early.pop(first)
                self.buffered -= len(items)
                if first + len(items) > self.reached:
                    moved = True
                    self._append_unclaimed(items[self.reached - first:], more)
        self.claimed.drop_below(self.next)      # not below ``ready``: ``give_back`` may return to ``next``

    def _append_unclaimed(self, items: list[Any], more: frozenset[int]) -> None:
        """Append items that follow what was reached, up to the first one that another route has delivered."""
        reached, fresh = self.reached, len(items)
        if self.claimed.spans:
            fresh = next((i for i in range(len(items)) if reached + i in self.claimed), len(items))
        if fresh:
            self._append(items[:fresh], more)
        else:
            self._skip(self.claimed.end_of(reached))    # the whole text was claimed: its pieces here do not matter
        if fresh < len(items):
            self._keep(reached + fresh, items[fresh:], more)

    def advance(self, to: int, elsewhere: bool = False) -> None:
        """Give up waiting for the numbers below ``to``: the sender does not have them any more.

        ``elsewhere``: another route may still bring them, see ``claim``.
        """
        if to > self.reached:
            if elsewhere:
                self.given_up.add(self.ready, to)
                for start, end in takewhile(lambda span: span[0] < to, self.claimed.spans):
                    self.given_up.remove(start, end)
            self._skip(to)
            self._merge()

    def claim(self, first: int, count: int) -> bool:
        """Return whether none of these numbers was delivered yet; if so, mark them as delivered by another route.

        The same text comes twice when its ack was lost on the direct route and its sender saved it at the server: once
        as chat, once as mail. The route that claims it first shows it, and the other one skips it. The ``count``
        numbers from ``first`` must be whole texts. The caller must have taken what is ready here before, and must take
        again behind it, so that the skip counts as written after the texts before it and not earlier.
        """
        if first < self.ready and self.given_up.covers(first, first + count):
            self.given_up.remove(first, first + count)      # late, and out of order, but not lost
            return True
        if first < self.ready or self.claimed.touches(first, first + count):
            return False
        if first == self.ready and not (self._pieces or self._early or self.claimed.spans):
            self._skip(first + count)
        else:
            self.claimed.add(first, first + count)
            self._merge()
        return True

    def note_shown(self, spans: Sequence[tuple[int, int]]) -> None:
        """Learn that another program has shown these numbers: ranges [first, end) of whole texts.

        What was not handed out yet is dropped, because it may be among them: its sender still has it.
        """
        self.give_back(self.taken)
        for first, end in spans if self.given_up.spans else ():
            self.given_up.remove(first, end)
        self.claimed.spans = merged([*self.claimed.spans, *((max(first, self.ready), end) for first, end in spans)])
        self.claimed.most = max(MAX_CLAIMED_RANGES, len(self.claimed.spans))
        self._merge()

    def take(self, numbers: int = MAX_EARLY) -> list[Run]:
        """Hand out runs until they contain at least ``numbers`` numbers, or nothing is ready."""
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
        """Note that ``texts`` more of the texts handed out are written; 0: that the next skip has passed.

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
        """Note that all that was handed out is written."""
        self._handed.clear()
        self.next = self.taken

    @property
    def is_idle(self) -> bool:
        """Whether nothing is handed out that is not written yet."""
        return self.next == self.taken

    def snapshot(self) -> Snapshot:
        """Return what must be remembered of an idle stream; what was not handed out is dropped."""
        self.give_back(self.taken)
        return Snapshot(self.taken, tuple(self.claimed.spans), tuple(self.given_up.spans))

    def restore(self, snapshot: Snapshot) -> None:
        """Continue, in a new object, where the stream was at the ``snapshot``."""
        self.next = self.taken = self.ready = self.window_end = snapshot.next
        self.claimed.spans, self.given_up.spans = list(snapshot.claimed), list(snapshot.given_up)
        self.claimed.most = max(MAX_CLAIMED_RANGES, len(snapshot.claimed))      # an earlier run may have noted more

    def give_back(self, first: int) -> None:
        """Undo ``take`` from the text that begins at ``first`` on, and drop everything that is buffered behind it.

        For what the owner cannot keep now: the recipient of a save may be online and has to be probed first, the disk
        fails, the mailbox is full, memory is short. The sender still has the items: it repeats them, or gives them up
        when they are refused. What another route has claimed stays claimed.
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
        """Drop what came early, to free memory; the sender still has it (SACK reneging)."""
        self.buffered -= sum(len(items) for items, _ in self._early.values())
        self._early.clear()

    def ack(self, grow: bool = True) -> Info:
        """Return the ``ack`` to send now; ``grow``: whether there is memory for more than was promised before."""
        if grow and self.window_end < self.next + MAX_EARLY:
            self.window_end = self.next + MAX_EARLY
        next_ = self._proven()
        window = self.window_end - next_
        return {"stream": self.id, "next": next_, "room": window if window >= MAX_TEXT_PIECES else 0,
                "have": self._have() if self._early or self.ready > self.next or self._pieces else []}

    def _proven(self) -> int:
        """Return ``next``, but no more than what is written, or what the sender itself has closed.

        What was given up because mail says so may still be the sender's: whoever carries the mail may have lost it.
        """
        for start, end in self.given_up.spans:
            if end > self.base:
                return min(self.next, max(start, self.base))
        return self.next

    def _have(self) -> list[list[int]]:
        """Return what came and is not written: inclusive ranges, the lowest ones."""
        early = [(first, first + len(items)) for first, (items, _) in self._early.items()]
        return [[first, end - 1] for first, end in merged([(self.next, self.reached), *early])[:MAX_RANGES]]


class Incoming:
    """One stream of a peer, or of the client's own mail, and whether it is held until mail is shown.

    A held stream waits for two things, one after the other::

        not held --numbers are missing, or it is new and held as a whole-->
                             held, ``awaited_mail`` None: for the server's answer
                 --answer--> held, ``awaited_mail`` set: until the mail up to that number is shown
                 --shown, or HOLD_TIME without an answer or with nothing missing-->
                             not held: what is missing is given up

    Which streams are held as a whole is said in ``conversation``.
    """

    def __init__(self, stream: ReceiveStream, unacked: dict[Incoming, None]) -> None:
        self.stream = stream
        self.address: Address | None = None     # where acks go; None: to the server
        self.sender = ""
        self.last_count = 0                     # numbers buffered, when the inbox counted them
        self.held_since = NEVER                 # when numbers were found missing, or the server was asked again
        self.held_base = 0                      # the missing numbers are below this one
        self.awaited_mail: int | None = None
        self.has_chatted = False                # something has come straight from its sender
        self.is_held_whole = False              # nothing is shown now, not even what is in front of a gap
        self._unacked = unacked                 # the inbox's: this stream is in it while an ack is owed

    def written(self, texts: int) -> None:
        """Note that ``texts`` more of the texts handed out are written, see ``ReceiveStream``."""
        before = self.stream.next
        self.stream.written(texts)
        if self.stream.next != before:
            self._unacked[self] = None


DUPLICATE_FILTER_LIMIT = 65_536     # streams and ranges of numbers remembered of evicted streams: about 20 MB


class DuplicateFilter:
    """The numbers already shown of streams that were evicted: they may come again, by mail or because an ack got lost.

    Beyond its limit, the sender who fills most of it loses the oldest: no sender can make it forget what others sent.
    """

    def __init__(self) -> None:
        self.snapshots: dict[str, dict[int, Snapshot]] = {}     # sender -> stream -> what was shown, oldest first
        self.size = 0                       # of all snapshots: streams and ranges
        self._sizes: dict[str, int] = {}    # of those of each sender

    @staticmethod
    def _cost(snapshot: Snapshot) -> int:
        return 1 + len(snapshot.claimed) + len(snapshot.given_up)

    def add(self, sender: str, stream: int, snapshot: Snapshot) -> None:
        """Remember a stream that is evicted, unless nothing of it was shown."""
        if snapshot == NOTHING_DELIVERED:
            return
        self.snapshots.setdefault(sender, {})[stream] = snapshot
        cost = self._cost(snapshot)
        self._sizes[sender] = self._sizes.get(sender, 0) + cost
        self.size += cost
        while self.size > DUPLICATE_FILTER_LIMIT:
            has_most = self._sizes.get(sender, 0) * 2 > DUPLICATE_FILTER_LIMIT
            loser = sender if has_most else max(self._sizes, key=self._sizes.__getitem__)
            self.pop(loser, next(iter(self.snapshots[loser])))

    def pop(self, sender: str, stream: int) -> Snapshot | None:
        """Return, and forget, what was shown of a stream; None if nothing is remembered of it."""
        snapshot = self.snapshots[sender].pop(stream, None) if sender in self.snapshots else None
        if snapshot is not None:
            cost = self._cost(snapshot)
            self.size -= cost
            self._sizes[sender] -= cost
            if not self.snapshots[sender]:
                del self.snapshots[sender], self._sizes[sender]
        return snapshot
