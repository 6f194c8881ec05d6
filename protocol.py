"""What is said: the wire format, and the state machines that make sure it arrives.

Rules of this file
------------------
- No sockets, no clock, no printing, no randomness. Time comes in as an argument (seconds, a float of any
  origin that never goes back); what to send and what happened comes out as a return value.
- The wire and the streams do not know their role: a server and a client use the same ones. ``Conversation``,
  ``Outbox`` and ``Inbox`` are a client's.
- Every field that comes from the network is checked in one place, ``SCHEMA``. Behind it, types and bounds hold.
- Every limit has a name and a unit, next to the code that it governs.

The wire
--------
A datagram is one or more msgpack maps back to back, ``{"tag": str, "info": map}``. ``encode`` turns one map
into bytes, ``Decoder.decode`` turns a datagram into maps and drops (and counts) what is not valid. Nothing else in
the program touches msgpack, so a layer of encryption would go right there. Extra fields are ignored: the
protocol can grow.

Streams
-------
``chat`` (client to client), ``save`` (client to server) and ``mail`` (server to client) are one mechanism. The
sender numbers its items 1, 2, 3 ... and packs as many as fit into one datagram. ``SendStream`` keeps every item
until the receiver's ``ack`` has passed it; ``ReceiveStream`` puts items into order, hands each out once, and moves
its ``next`` only when its owner says that they are *written* (to stdout, to disk). So an ack is a promise.

- ``next`` is cumulative: everything below it is done for good. ``have`` (ranges that came early) only holds back
  retransmission: it closes nothing, and is forgotten on a timeout.
- ``base`` is the lowest number that the sender still holds. What is below it was closed on another route.
- ``next + room`` is how far the sender may go. It only grows; an older, smaller one is ignored.
- A text longer than ``MAX_PIECE`` takes several consecutive numbers; ``more`` names those that the next one
  continues. A text is one thing: ``next`` and ``base`` never stand inside it.

``Path`` is what is known of the way: loss recovery and congestion control follow RFC 6298 (retransmission timeout),
RFC 9002 (packet threshold) and RFC 5681 (slow start, multiplicative decrease), counted in datagrams. A loss reduces
the window to what the path was seen to carry (TCP Westwood+), at most by half: random loss on a radio link is not
taken for a full queue.

``Conversation`` is the life of one client's sends to one recipient: which route they take (straight to the
recipient, or to the server), when that changes, and the events that close each of them. ``Outbox`` holds all of them,
``Inbox`` all that comes in for one client, and the order in which it is shown; ``Memories`` is what it knows of the
streams that it has put aside, so that nothing is shown twice.
"""
from __future__ import annotations

import functools
import heapq
import unicodedata
from bisect import bisect_right
from collections import deque
from itertools import accumulate, islice, repeat
from typing import (Any, Callable, Collection, Deque, Dict, FrozenSet, Iterator, List, NamedTuple, Optional,
                    Sequence, Set, Tuple)

import msgpack

Address = Tuple[str, int]
Info = Dict[str, Any]
Message = Tuple[str, Info]

MAX_DATAGRAM = 1200       # bytes of payload that any path carries unfragmented (RFC 9000 §14)
UNPACK_BUFFER = 4096      # bytes; the unpacker fills it before it starts over: a small one stays in the cache
MAX_RECEIVED = 65535      # bytes; the largest UDP datagram there is, a peer may use a larger --mtu
MAX_NUMBER = 2 ** 63 - 1  # ids, versions and stream numbers; SQLite's integers are signed 64 bit
MAX_ITEMS = 1024          # elements of one array on the wire: bounds what a hostile header can allocate
MAX_FIELDS = 32           # keys of one map on the wire
MAX_PIECE = 768           # bytes of UTF-8 in one number
PIECE_MEMORY = 4 * MAX_PIECE    # bytes that they may take here: a text is kept as wide as its widest character
MAX_TEXT = 65536          # bytes of UTF-8 in one message
MAX_TEXT_PIECES = -(-MAX_TEXT // (MAX_PIECE - 3))  # numbers; a cut can cost 3 bytes, it never splits a character
MAX_NICK = 32             # characters
MAX_NICK_BYTES = 96       # bytes of UTF-8
MAX_HOST = 64             # characters of a numeric address
MAX_RANGES = 32           # ranges in the ``have`` of one ack
SESSION_BYTES = 16        # 128 bits: nobody guesses one
PROOF_BYTES = 8           # of a session, in what the server sends: 64 bits, nobody guesses them while it lasts
TOKEN_BYTES = 32          # an HMAC-SHA256
REG_SIZE = 128            # bytes a ``reg`` without cookie is padded to, so that its answer is never larger
SESSION_SIZE = 184        # bytes a request with a session is padded to: a ``for`` and a ``probe`` are never larger


# --- fields ---------------------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def integer(low: int, high: int) -> Check:
    """A check for an integer in [low, high]; a bool is none."""
    return lambda value: type(value) is int and low <= value <= high


def binary(size: int) -> Check:
    """A check for exactly ``size`` bytes."""
    return lambda value: type(value) is bytes and len(value) == size


def boolean(value: Any) -> bool:
    """A check for true or false, and nothing that merely counts as such."""
    return type(value) is bool


def is_nick(nick: Any) -> bool:
    """Whether ``nick`` is one: 1-32 letters, digits, ``_ . -`` in NFC, at most 96 bytes."""
    return type(nick) is str and 0 < len(nick) <= MAX_NICK and _has_form_of_nick(nick)


@functools.lru_cache(maxsize=4096)  # of short strings only: strangers choose them
def _has_form_of_nick(nick: str) -> bool:
    return (len(nick.encode("utf-8", "replace")) <= MAX_NICK_BYTES
            and all(c.isalpha() or c.isdecimal() or c in "_.-" for c in nick)
            and unicodedata.is_normalized("NFC", nick))


def is_host(host: str) -> bool:
    """Whether ``host`` is a numeric IP address (nothing from the network is ever looked up)."""
    return len(host) <= MAX_HOST and _has_form_of_host(host)


@functools.lru_cache(maxsize=4096)
def _has_form_of_host(host: str) -> bool:
    if ":" not in host:
        parts = host.split(".")
        return len(parts) == 4 and all(map(_is_octet, parts))
    import ipaddress        # here: most never see an IPv6 address, and the start of the program is measured
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return host.isascii() and host.isprintable()


def _is_octet(part: str) -> bool:
    return part.isascii() and part.isdecimal() and str(int(part)) == part and int(part) <= 255


def are_short(texts: Sequence[str], most: int) -> bool:
    """Whether each text takes at most ``most`` bytes of UTF-8, whatever its characters are."""
    return (len(texts[0]) if len(texts) == 1 else len(max(texts, key=len))) * 4 <= most


def fits_piece(text: str) -> bool:
    """Whether ``text`` fits into one number of a stream."""
    return len(text) <= MAX_PIECE and (len(text) * 4 <= MAX_PIECE or len(text.encode()) <= MAX_PIECE)


NICK: Check = is_nick
HOST: Check = lambda value: type(value) is str and is_host(value)
REASON: Check = lambda value: type(value) is str and len(value) <= MAX_NICK
STATE: Check = lambda value: value in ("online", "offline", "gone")
NUMBER = integer(1, MAX_NUMBER)
COUNT = integer(0, MAX_NUMBER)
PORT = integer(0, 65535)
SESSION = binary(SESSION_BYTES)
PROOF = binary(PROOF_BYTES)
TOKEN = binary(TOKEN_BYTES)


ONLY_TEXTS = {str}


def pieces(value: Any) -> bool:
    """A check for the texts of a ``chat`` or ``save``: at least one, each short enough for one number."""
    if type(value) is not list or not 0 < len(value) <= MAX_ITEMS:
        return False
    if len(value) == 1:
        return type(value[0]) is str and fits_piece(value[0])
    if set(map(type, value)) != ONLY_TEXTS:
        return False
    return are_short(value, MAX_PIECE) or all(map(fits_piece, value))


def row(*checks: Check) -> Check:
    """A check for a list with one element for each of ``checks``."""
    return lambda value: (type(value) is list and len(value) == len(checks)
                          and all(check(element) for check, element in zip(checks, value)))


def rows(check: Check, most: int = MAX_ITEMS) -> Check:
    """A check for a list of at most ``most`` elements, each of which passes ``check``."""
    return lambda value: type(value) is list and (not value or len(value) <= most and all(map(check, value)))


def letters(value: Any) -> bool:
    """A check for the items of a ``mail``: runs of letters, [from, stream, n, at, texts, more] each."""
    return (type(value) is list and 0 < len(value) <= MAX_ITEMS and all(map(_is_run, value))
            and sum([len(run[4]) for run in value]) <= MAX_ITEMS)


def _is_run(run: Any) -> bool:
    """Whether ``run`` are texts of consecutive numbers of one stream that were sent at the same time."""
    if type(run) is not list or len(run) != 6:
        return False
    nick, stream, first, at, texts, more = run
    return (is_nick(nick) and COUNT(stream) and NUMBER(first) and type(at) is float and pieces(texts)
            and first <= MAX_NUMBER - len(texts) and NUMBERS(more)
            and (not more or first <= min(more) and max(more) < first + len(texts)))


TIME: Check = lambda value: type(value) is float
NUMBERS = rows(NUMBER)
ENTRY = row(NICK, HOST, PORT, STATE)
RANGE: Check = lambda value: row(NUMBER, NUMBER)(value) and value[0] <= value[1]

REQUIRED: Dict[str, Dict[str, Check]] = {
    "reg": {"id": COUNT, "nick": NICK},
    "cookie": {"id": COUNT, "server": SESSION, "cookie": SESSION},
    "welcome": {"id": COUNT, "nick": NICK, "boot": COUNT, "session": SESSION, "version": COUNT},
    "refused": {"nick": NICK, "reason": REASON},
    "for": {"session": PROOF},
    "table": {"version": COUNT, "set": rows(ENTRY)},
    "sync": {"session": SESSION, "version": COUNT},
    "chat": {"from": NICK, "to": NICK, "stream": COUNT, "n": NUMBER, "base": NUMBER, "text": pieces},
    "ack": {"stream": COUNT, "next": NUMBER, "have": rows(RANGE, MAX_RANGES), "room": COUNT},
    "nack": {"stream": COUNT, "first": NUMBER, "last": NUMBER, "reason": REASON},
    "save": {"session": SESSION, "to": NICK, "stream": COUNT, "n": NUMBER, "base": NUMBER, "text": pieces,
             "at": rows(TIME), "relay": boolean},
    "exists": {"stream": COUNT, "n": NUMBER, "version": COUNT, "entry": ENTRY},
    "mail": {"to": NICK, "stream": COUNT, "n": NUMBER, "base": NUMBER, "items": letters},
    "probe": {"id": COUNT, "to": NICK},
    "alive": {"id": COUNT, "nick": NICK},
    "ping": {"id": COUNT, "session": SESSION, "version": COUNT},
    "pong": {"id": COUNT, "boot": COUNT, "version": COUNT, "mail": COUNT},
    "dereg": {"session": SESSION},
    "bye": {"session": SESSION},
}
OPTIONAL: Dict[str, Dict[str, Check]] = {
    "reg": {"token": TOKEN, "cookie": SESSION},
    "refused": {"id": COUNT, "session": SESSION},
    "table": {"since": COUNT},
    "chat": {"more": NUMBERS},
    "save": {"more": NUMBERS},
    "alive": {"session": SESSION},
}


def _numbered(info: Info, count: int) -> bool:
    first: int = info["n"]
    if not info["base"] <= first <= MAX_NUMBER - count or not count:
        return False
    more = info.get("more")
    return not more or first <= min(more) and max(more) < first + count


def since_of(info: Info) -> int:
    """The version that a ``table`` follows; it is left out where that is the one before its own."""
    return int(info.get("since", info["version"] - 1))


TOGETHER: Dict[str, Check] = {  # what fields must be to each other
    "table": lambda info: 0 <= since_of(info) <= info["version"],
    "chat": lambda info: _numbered(info, len(info["text"])),
    "save": lambda info: _numbered(info, len(info["text"])) and len(info["at"]) == len(info["text"]),
    "mail": lambda info: _numbered(info, sum([len(run[4]) for run in info["items"]])),
    "nack": lambda info: bool(info["first"] <= info["last"]),
}
SCHEMA = {tag: (list(fields.items()), list(OPTIONAL.get(tag, {}).items()), TOGETHER.get(tag))
          for tag, fields in REQUIRED.items()}


def is_valid(tag: Any, info: Any) -> bool:
    """Whether ``info`` is what a map with ``tag`` must carry (see ``SCHEMA``)."""
    fields = SCHEMA.get(tag) if type(tag) is str else None
    if fields is None or type(info) is not dict:
        return False
    required, optional, together = fields
    try:
        for name, check in required:
            if not check(info[name]):
                return False
    except KeyError:
        return False
    if len(info) > len(required):
        for name, check in optional:
            if name in info and not check(info[name]):
                return False
    return together is None or together(info)


# --- datagrams ------------------------------------------------------------------------------------------------

_pack: Callable[[Any], bytes] = msgpack.Packer().pack


def encode(tag: str, info: Info) -> bytes:
    """One map as bytes; several of them back to back are a datagram."""
    return _pack({"tag": tag, "info": info})


def padded(tag: str, info: Info, size: int) -> bytes:
    """One map as at least ``size`` bytes, by an extra field ``pad``."""
    plain = encode(tag, info)
    if len(plain) >= size:
        return plain
    missing = size - len(encode(tag, dict(info, pad=b"")))
    return encode(tag, dict(info, pad=bytes(max(0, missing))))


_FOR = encode("for", {"session": bytes(PROOF_BYTES)})[:-PROOF_BYTES]
FOR_SIZE = len(_FOR) + PROOF_BYTES      # bytes of the ``for`` that begins a datagram of the server


def addressed(session: bytes, *maps: bytes) -> bytes:
    """A datagram of the server for one client: it begins with a ``for``, the maps behind it can be shared bytes."""
    return b"".join((_FOR, session[:PROOF_BYTES], *maps))


def table_map(since: int, version: int, rows_: List[List[object]]) -> bytes:
    """A ``table``: what changed in (since, version]."""
    info: Info = {"version": version, "set": rows_}
    return encode("table", info if since == version - 1 else {"since": since, **info})


def _unpacker_class() -> Any:
    """The reader of msgpack. That of the last release for Python 3.9 leaks memory with every broken datagram, but its
    other half, in Python, does not."""
    if msgpack.version >= (1, 2):
        return msgpack.Unpacker
    from msgpack.fallback import Unpacker
    return Unpacker


UNPACKER = _unpacker_class()


class Decoder:
    """Turns datagrams into messages, and counts what it drops.

    ``dropped``: the maps (or, where the framing itself is broken, rests of datagrams) that were not valid.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._unpacker = self._new_unpacker()

    @staticmethod
    def _new_unpacker() -> Any:
        return UNPACKER(read_size=UNPACK_BUFFER, max_buffer_size=2 * MAX_RECEIVED, max_array_len=MAX_ITEMS,
                        max_map_len=MAX_FIELDS)

    def decode(self, datagram: bytes) -> List[Message]:
        """The valid messages of a datagram, in order. Never raises, whatever the bytes are."""
        messages: List[Message] = []
        unpacker = self._unpacker
        position = unpacker.tell()
        end = position + len(datagram)
        try:
            unpacker.feed(datagram)
            while position < end:
                value = unpacker.unpack()
                position = unpacker.tell()
                if type(value) is dict and is_valid(value.get("tag"), value.get("info")):
                    messages.append((value["tag"], value["info"]))
                else:
                    self.dropped += 1
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException):    # broken, or only a part of it came
            self.dropped += 1
            self._unpacker = self._new_unpacker()
        return messages


# --- texts ----------------------------------------------------------------------------------------------------

def split_text(text: str) -> List[str]:
    """``text`` as pieces of at most ``MAX_PIECE`` bytes of UTF-8 each, cut between characters."""
    if fits_piece(text):
        return [text]
    data, cuts, start = text.encode(), [], 0
    while start < len(data):
        end = min(start + MAX_PIECE, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        cuts.append(data[start:end].decode())
        start = end
    return cuts


def join_pieces(first: int, items: Sequence[str], more: Collection[int]) -> List[str]:
    """The whole texts of consecutive numbers from ``first``, of which those in ``more`` are continued by the next."""
    if not more:
        return list(items)
    texts, parts = [], []
    for number, piece in enumerate(items, first):
        parts.append(piece)
        if number not in more:
            texts.append("".join(parts))
            parts = []
    if parts:
        texts.append("".join(parts))
    return texts


class Ranges:
    """A set of numbers as sorted, disjoint, half-open ranges; at most ``most``, the lowest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.spans: List[Tuple[int, int]] = []

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

    def __init__(self, first: int, items: List[Any], size: int) -> None:
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
        self.smoothed: Optional[float] = None   # s; SRTT of RFC 6298
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
        self.continued: Set[int] = set()
        self._sent: Deque[Packet] = deque()
        self._unsent: Deque[Packet] = deque()
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

    def reroute(self, capacity: int, sizes: Callable[[List[Any]], List[int]]) -> None:
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

    def poll(self, now: float) -> List[Packet]:
        """The packets to send now, lowest first."""
        asking = False
        if now >= self.timer:
            self._timed_out()
        elif now >= self.ask:
            self._asked += 1
            asking = True
            self._call_all_lost()
            self.path.window = 1.0
        packets: List[Packet] = []
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

NONE: FrozenSet[int] = frozenset()


class Run(NamedTuple):
    """``numbers`` consecutive numbers that a stream hands out: whole texts only, or no items (a skip)."""

    first: int
    items: List[Any]
    more: FrozenSet[int]
    numbers: int


Memory = Tuple[int, Tuple[Tuple[int, int], ...], Tuple[Tuple[int, int], ...]]


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
        self._runs: Deque[Run] = deque()
        self._pieces: List[Any] = []        # of the text that begins at ``ready``
        self._early: Dict[int, Tuple[List[Any], FrozenSet[int]]] = {}
        self._handed: Deque[List[int]] = deque()    # [texts, numbers of each]; 0 texts: a skip

    @property
    def reached(self) -> int:
        """The number after the last one that came without a gap."""
        return self.ready + len(self._pieces)

    @property
    def missing(self) -> bool:
        """Whether the sender has closed numbers that did not come on this route."""
        return self.base > self.reached

    def on_data(self, first: int, items: List[Any], more: Sequence[int] = (), base: int = 1) -> None:
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

    def _keep(self, first: int, items: List[Any], more: FrozenSet[int]) -> bool:
        """Puts items among the early ones, unless as many from ``first`` on are there already."""
        known = len(self._early[first][0]) if first in self._early else 0
        if known >= len(items):
            return False
        self._early[first] = (items, more)
        self.buffered += len(items) - known
        return True

    def _append(self, items: List[Any], more: FrozenSet[int]) -> None:
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

    def _take_in(self, items: List[Any], more: FrozenSet[int]) -> None:
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

    def take(self, numbers: int = MAX_EARLY) -> List[Run]:
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
        kept: Deque[List[int]] = deque()
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

    def _have(self) -> List[List[int]]:
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
    address: Optional[Address]


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

    def __init__(self, me: str, peer: str, stream: int, mtu: int = MAX_DATAGRAM,
                 ack_timeout: float = ACK_TIMEOUT) -> None:
        self.me = me
        self.peer = peer
        self.mtu = mtu
        self.ack_timeout = ack_timeout
        self.session = bytes(SESSION_BYTES)     # the owner's, at the server
        self.events: List[Event] = []
        self.route = DIRECT
        self.place: Optional[Place] = None
        self.stuck = False
        self.addresses: Deque[Address] = deque(maxlen=ADDRESSES_KEPT)   # where DIRECT went: answers count from there
        self._address: Optional[Address] = None     # where it goes now
        self._last_try = False                      # DIRECT is the retry after EXISTS
        self._relay_until = -NEVER
        self._patience = ack_timeout                # s of silence on this route that mean something
        self._silent_since = NEVER                  # when the first datagram went out that nobody answered
        self._progressed = NEVER                    # when the stream last made progress, or began
        self._moved = NEVER                         # the same, or when it changed its route
        self._deadline = -NEVER                     # when ``_judge`` has something to decide; never too late
        self._follows_table = False                 # DIRECT was picked from the place that the table still gives
        self._announced_silent = False
        self._said: Dict[str, int] = {}             # up to which number an event was told
        self._times: Tuple[List[int], List[float]] = ([], [])    # from which number on, which sending time
        self.counted = (False, 0, 0)                # as the outbox has: whether stuck, numbers, bytes
        self._id = stream
        self.stream = SendStream(stream, self._capacity(DIRECT), min(INITIAL_TIMEOUT, ack_timeout / 2))

    # sizes

    def _capacity(self, route: str) -> int:
        """Bytes that the items may take in a datagram of this route: what is left beside the largest header."""
        return self.mtu - len(self._frame(route, MAX_NUMBER, MAX_NUMBER, [], [MAX_NUMBER], [])) - 4

    def _sizes(self, texts: Sequence[str], first: int, continued: Collection[int]) -> List[int]:
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

    def _frame(self, route: str, first: int, base: int, texts: List[str], more: Sequence[int],
               times: Sequence[float]) -> bytes:
        info: Info = {"to": self.peer, "stream": self._id, "n": first, "base": base, "text": texts}
        if more:
            info["more"] = more
        if route == DIRECT:
            info["from"] = self.me
            return encode("chat", info)
        info.update(session=self.session, at=times, relay=route == RELAY)       # the session says from whom
        return encode("save", info)

    def _more(self, packet: Packet) -> List[int]:
        """The numbers of a packet that the next one continues."""
        return [number for number in range(packet.first, packet.end) if number in self.stream.continued]

    def _times_of(self, packet: Packet) -> List[float]:
        """When each text of a packet was sent."""
        starts, values = self._times
        return [values[bisect_right(starts, number) - 1] for number in range(packet.first, packet.end)]

    # what the owner says

    @property
    def held(self) -> int:
        """How many numbers are not closed yet."""
        return self.stream.held

    @property
    def messages(self) -> int:
        """How many messages are not closed yet."""
        return self._count(self.stream.base, self.stream.end)

    def texts(self) -> List[str]:
        """The messages that are not closed yet, in order."""
        return join_pieces(self.stream.base, list(self.stream.items()), self.stream.continued)

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
        items: List[str] = []
        continued: Set[int] = set()
        for text in texts:
            number = self.stream.end + len(items)
            cut = split_text(text)
            items.extend(cut)
            continued.update(range(number, number + len(cut) - 1))
        self.stream.queue(items, self._sizes(items, self.stream.end, continued), continued)

    def locate(self, now: float, place: Optional[Place]) -> None:
        """Takes what the table says of the recipient, whenever its entry was changed (None: it is not known)."""
        self.place = place
        self._follows_table = False
        self._relay_until = -NEVER
        if not self.held:
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
            self.stream.longest = SERVER_INTERVAL
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

    def on_exists(self, now: float, number: int, address: Optional[Address]) -> None:
        """The server says that the recipient answers at ``address`` (None: one that cannot be reached from here)."""
        if self.route != SAVE or not self.held or number >= self.stream.top:
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
        return min(self.stream.due(), self._deadline) if self.held else NEVER

    def poll(self, now: float, calm: bool = True) -> List[Tuple[bytes, Optional[Address]]]:
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
            self.stream.longest = MAX_TIMEOUT
            self.events.append(Event(SILENT, self.messages))
        if stalled:
            self.stuck = True
            self.stream.longest = MAX_TIMEOUT
        if self.route == RELAY and now >= self._relay_until > -NEVER:
            self._relay_until = -NEVER
            self._pick_route(now)

    def _is_patient(self) -> bool:
        """Whether all that stalls is known to: the server is asked seldom, and what waits is stuck."""
        return self.stuck and self.route != DIRECT and self.stream.longest == MAX_TIMEOUT

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
        return self.route if self.held else self._suggested_route(now)

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

    def _go(self, now: float, route: str, address: Optional[Address] = None) -> None:
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
        self.stream.longest = MAX_TIMEOUT if route == DIRECT else SERVER_INTERVAL   # as often as any request
        self._silent_since = NEVER
        self._patience = self.ack_timeout if route == DIRECT else SERVER_ATTEMPTS * SERVER_INTERVAL
        self._announced_silent = False
        self.stuck = now >= self._progressed + STUCK_TIMEOUT

    def _held_sizes(self, items: List[Any]) -> List[int]:
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

    def __init__(self, me: str, mtu: int = MAX_DATAGRAM, ack_timeout: float = ACK_TIMEOUT) -> None:
        self._lost = False
        self._away = False
        self._me = me
        self._mtu = mtu
        self._ack_timeout = ack_timeout
        self._session = bytes(SESSION_BYTES)
        self.conversations: Dict[str, Conversation] = {}
        self.eventful: Dict[str, Conversation] = {}     # with events to take, or whose messages are to be counted anew
        self.told: Dict[str, Conversation] = {}         # whose events were taken, for ``count_told``
        self._by_stream: Dict[int, Conversation] = {}
        self._sending: Dict[str, Conversation] = {}     # with messages that are not closed
        self._touched: Dict[str, Conversation] = {}     # to be polled next
        self._due: Dict[str, float] = {}                # when to look at a conversation, or earlier
        self._dues: List[Tuple[float, str]] = []        # the same as a heap, with entries that do not count any more
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

    def undelivered(self) -> Iterator[Tuple[str, str]]:
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

    def open(self, now: float, nick: str, place: Optional[Place], stream: int) -> None:
        """Begins a conversation with somebody not written to before; ``stream`` is a random id."""
        conversation = Conversation(self._me, nick, stream, self._mtu, self._ack_timeout)
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
                del self._by_stream[self.conversations.pop(idle).stream.stream]
                for among in (self.eventful, self.told, self._touched):     # an ack came twice: the nick is another's
                    among.pop(idle, None)

    def locate(self, now: float, nick: str, place: Optional[Place]) -> None:
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

    def _addressed(self, info: Info, address: Optional[Address]) -> Optional[Conversation]:
        """The conversation that an answer from ``address`` is about, if it may come from there."""
        conversation = self._by_stream.get(info["stream"])
        if conversation is None or address is not None and address not in conversation.addresses:
            return None
        return conversation

    def on_ack(self, now: float, info: Info, address: Optional[Address]) -> None:
        """Takes an ``ack``."""
        conversation = self._addressed(info, address)
        if conversation is not None:
            conversation.on_ack(now, info["next"], info["have"], info["room"], SAVE if address is None else DIRECT)
            if conversation.stream.end > conversation.stream.base:
                self._touched[conversation.peer] = conversation
            else:
                self.eventful[conversation.peer] = conversation     # there is nothing to send, only to tell

    def on_nack(self, now: float, info: Info, address: Optional[Address]) -> None:
        """Takes a ``nack``."""
        conversation = self._addressed(info, address)
        if conversation is not None:
            conversation.on_nack(now, info["first"], info["last"], info["reason"],
                                 SAVE if address is None else DIRECT)
            self._touched[conversation.peer] = conversation

    def on_exists(self, now: float, info: Info, reachable: Optional[Address]) -> None:
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

    def poll(self, now: float, calm: bool = True) -> Iterator[Tuple[bytes, Optional[Address]]]:
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

    def take_events(self) -> List[Tuple[str, List[Event]]]:
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
    texts: List[str]
    times: List[float]
    written: Callable[[int], None]
    stream: int = 0
    first: int = 0


class Incoming:
    """One stream of a peer, or of the own mail, and whether it waits for news of the mail."""

    def __init__(self, stream: ReceiveStream, unacked: Dict[Incoming, None]) -> None:
        self.stream = stream
        self.address: Optional[Address] = None      # where acks go; None: to the server
        self.sender = ""
        self.counted = 0            # numbers that the inbox has counted
        self.held_since = NEVER     # when numbers were found missing, or the server was last asked about them
        self.held_base = 0          # below which they are
        self.mail: Optional[int] = None     # the mail that must be shown before they are given up
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
        self._of: Dict[str, Dict[int, Memory]] = {}     # sender -> stream -> what was shown, oldest first
        self._sizes: Dict[str, int] = {}                # of each sender

    @staticmethod
    def _cost(memory: Memory) -> int:
        return 1 + len(memory[1]) + len(memory[2])

    def add(self, sender: str, stream: int, memory: Memory) -> None:
        """Takes a stream that was forgotten; nothing was shown of it if it stands at number 1."""
        if memory == (1, (), ()):
            return
        self._of.setdefault(sender, {})[stream] = memory
        cost = self._cost(memory)
        self._sizes[sender] = self._sizes.get(sender, 0) + cost
        self.size += cost
        while self.size > MEMORIES:
            has_most = self._sizes.get(sender, 0) * 2 > MEMORIES
            loser = sender if has_most else max(self._sizes, key=self._sizes.__getitem__)
            self.pop(loser, next(iter(self._of[loser])))

    def pop(self, sender: str, stream: int) -> Optional[Memory]:
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
        self.holding: Dict[Incoming, None] = {}     # the streams that wait for mail, or for news of it
        self.unacked: Dict[Incoming, None] = {}     # those for which ``acks`` has an answer; all of them know this one
        self._streams: Dict[str, Dict[int, Incoming]] = {}      # of each sender; longest silent first
        self._memories = Memories()                             # of those streams that gave way
        self._kept = 0                                          # streams in _streams
        self._buffering: Dict[Incoming, None] = {}              # those that hold numbers; longest silent first
        self._mail: Optional[Incoming] = None
        self._readable: Dict[Incoming, None] = {}

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
        if self._mail is None or self._mail.stream.stream != info["stream"]:
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
                incoming.stream.recall(memory)
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
                self._memories.add(sender, number, incoming.stream.remember())
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

    def acks(self) -> List[Tuple[Info, Optional[Address]]]:
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

    def _take_chat(self, incoming: Incoming) -> List[Delivery]:
        stream, deliveries = incoming.stream, []
        for run in stream.take(MAX_ITEMS):
            texts = ["".join(run.items)] if run.more else run.items
            deliveries.append(Delivery(incoming.sender, texts, [], incoming.written, stream.stream, run.first))
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
                for letters in _of_one_stream(run.items):
                    yield from self._take_letters(mail, letters, [item[4] for item in letters])
            else:
                yield Delivery("", [], [], mail.written)
        self._count(mail)

    def _take_letters(self, mail: Incoming, items: Sequence[Any], texts: List[str]) -> Iterator[Delivery]:
        """Texts of consecutive numbers of one stream, but for those that were shown on another way."""
        sender, stream, number = items[0][:3]
        incoming = self._incoming(sender, stream, number)
        if number > incoming.stream.reached:    # their sender has closed what is below them: what waits of it is late
            incoming.stream.advance(number, elsewhere=True)
        yield from self._take_all_chat(incoming)
        if incoming.stream.show(number, len(items)):
            times = [item[3] for item in items[:len(texts)]]
            yield Delivery(sender, texts, times, mail.written, stream, number)
        elif len(texts) == 1:
            yield Delivery("", [], [], lambda _: mail.written(1))
        else:
            for item, text in zip(items, texts):
                yield from self._take_letters(mail, [item], [text])
        yield from self._take_all_chat(incoming)


Letter = Tuple[str, int, int, float, str]   # one number of a mail: sender, and stream, number, time and text of his


def letters_of(info: Info) -> Tuple[List[Letter], List[int]]:
    """The letters of a ``mail``, and the numbers (of the mail) that the next one continues."""
    found: List[Letter] = []
    more: List[int] = []
    for sender, stream, first, at, texts, continued in info["items"]:
        more += [info["n"] + len(found) + number - first for number in continued]
        found += zip(repeat(sender), repeat(stream), range(first, first + len(texts)), repeat(at), texts)
    return found, more


MAIL_RUN = 40             # bytes of a run of letters beside its texts and its sender


def mail_runs(letters_: Sequence[Any]) -> List[List[object]]:
    """Letters, [sender, stream, n, at, text, whether the next continues it] each, as the items of a ``mail``."""
    runs: List[List[object]] = []
    for group in _of_one_stream(letters_):
        sender, stream, first = group[0][:3]
        start = 0
        for end in range(1, len(group) + 1):
            if end == len(group) or group[end][3] != group[start][3]:
                part = group[start:end]
                runs.append([sender, stream, first + start, part[0][3], [letter[4] for letter in part],
                             [letter[2] for letter in part if letter[5]]])
                start = end
    return runs


def mail_sizes(letters_: Sequence[Any]) -> List[int]:
    """The most bytes that each letter takes in a ``mail``, if there are ``MAIL_RUN_SIZE`` bytes more for the first."""
    sizes, before = [], None
    for sender, stream, number, at, text, more in letters_:
        size = len(text.encode()) + 3 + 9 * more
        if before != (sender, stream, number - 1, at):
            size += len(sender.encode()) + MAIL_RUN
        sizes.append(size)
        before = sender, stream, number, at
    return sizes


MAIL_RUN_SIZE = MAIL_RUN + MAX_NICK_BYTES   # bytes of a run that goes on in the next datagram: it is named there again


def _of_one_stream(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Letters in groups that belong to one stream and have consecutive numbers in it."""
    start = 0
    for index in range(1, len(items) + 1):
        if index < len(items):
            item, before = items[index], items[index - 1]
            if item[2] == before[2] + 1 and item[1] == before[1] and item[0] == before[0]:
                continue
        yield items[start:index]
        start = index
