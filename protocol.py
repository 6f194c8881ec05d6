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
import unicodedata
from itertools import repeat
from typing import (Any)
from collections.abc import Callable, Collection, Iterator, Sequence

import msgpack

Address = tuple[str, int]
Info = dict[str, Any]
Message = tuple[str, Info]

MAX_DATAGRAM = 1200       # bytes of payload that any path carries unfragmented (RFC 9000 §14)
UNPACK_BUFFER = 4096      # bytes; the unpacker fills it before it starts over: a small one stays in the cache
MAX_RECEIVED = 65535      # bytes; the largest UDP datagram there is
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
SYNC_PAGES = 32           # datagrams that answer one sync
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

REQUIRED: dict[str, dict[str, Check]] = {
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
OPTIONAL: dict[str, dict[str, Check]] = {
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


TOGETHER: dict[str, Check] = {  # what fields must be to each other
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


def table_map(since: int, version: int, rows_: list[list[object]]) -> bytes:
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

    def decode(self, datagram: bytes) -> list[Message]:
        """The valid messages of a datagram, in order. Never raises, whatever the bytes are."""
        messages: list[Message] = []
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

def split_text(text: str) -> list[str]:
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


def join_pieces(first: int, items: Sequence[str], more: Collection[int]) -> list[str]:
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


# --- mail -----------------------------------------------------------------------------------------------------

Letter = tuple[str, int, int, float, str]   # one number of a mail: sender, and stream, number, time and text of his


def letters_of(info: Info) -> tuple[list[Letter], list[int]]:
    """The letters of a ``mail``, and the numbers (of the mail) that the next one continues."""
    found: list[Letter] = []
    more: list[int] = []
    for sender, stream, first, at, texts, continued in info["items"]:
        more += [info["n"] + len(found) + number - first for number in continued]
        found += zip(repeat(sender), repeat(stream), range(first, first + len(texts)), repeat(at), texts)
    return found, more


MAIL_RUN = 40             # bytes of a run of letters beside its texts and its sender


def mail_runs(letters_: Sequence[Any]) -> list[list[object]]:
    """Letters, [sender, stream, n, at, text, whether the next continues it] each, as the items of a ``mail``."""
    runs: list[list[object]] = []
    for group in runs_of_one_stream(letters_):
        sender, stream, first = group[0][:3]
        start = 0
        for end in range(1, len(group) + 1):
            if end == len(group) or group[end][3] != group[start][3]:
                part = group[start:end]
                runs.append([sender, stream, first + start, part[0][3], [letter[4] for letter in part],
                             [letter[2] for letter in part if letter[5]]])
                start = end
    return runs


def mail_sizes(letters_: Sequence[Any]) -> list[int]:
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


def runs_of_one_stream(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Letters in groups that belong to one stream and have consecutive numbers in it."""
    start = 0
    for index in range(1, len(items) + 1):
        if index < len(items):
            item, before = items[index], items[index - 1]
            if item[2] == before[2] + 1 and item[1] == before[1] and item[0] == before[0]:
                continue
        yield items[start:index]
        start = index
