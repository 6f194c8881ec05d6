"""The wire, and the table of clients that is copied over it.

Rules of this module
--------------------
- No sockets, no clock, no randomness. It holds the wire, the table of clients and its copies, and rows of mail. The
  client and the server use the same functions.
- It is the only module that imports msgpack. Encryption (``secure``) goes between ``encode`` and ``Decoder`` on one
  side and the socket on the other.
- Every field that comes from the network is checked here and nowhere else. Code that gets a decoded map relies on the
  types and bounds of ``SCHEMA``.
- Every module that a client loads at its start imports it. So it hands out ``Any``, ``NamedTuple`` and ``Protocol``,
  too: typing is slow to load.
- Bytes from the network never raise. What is not valid is dropped and counted.
- Sizes and numbers that both ends must agree on are defined here, and which nicks count as the same. Times are defined
  beside the timer that they govern; docs/protocol.md lists all of them, and a test compares it.

How it works
------------
A datagram is one or more msgpack maps, one directly behind the other. Each map has a tag and fields::

    {"tag": "chat", "info": {"from": "alice", "to": "bob", "stream": 77, "n": 5, "base": 4, "text": ["hi", "ho"]}}

``encode`` turns one such map into bytes, ``Decoder.decode`` turns a datagram into a list of (tag, info).

``REQUIRED`` and ``OPTIONAL`` list the fields of every tag, each with the check that its value must pass. A check is a
function that returns whether a value is valid, so the whole schema is data that can be read, compared with the
documentation and used to make test datagrams. ``CROSS_FIELD_CHECKS`` holds for some tags what single fields cannot
tell, such as "as many times as texts". ``SCHEMA`` is the same in the form that ``is_valid`` reads fastest. A map with
an unknown tag, or with a field that is missing or fails its check, is dropped alone; broken msgpack drops the rest of
its datagram. Fields that are not in the schema are ignored, so that later versions can add some.

docs/protocol.md says what the tags mean and who sends them when.

``Table`` is what ``table`` maps carry from the server to its clients: who is where, and in which version of the table
that has changed.
"""
from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import Enum
from itertools import repeat

import msgpack

TYPE_CHECKING = False           # a type checker takes it for True
if TYPE_CHECKING:
    from typing import Any as Any, NamedTuple as NamedTuple, Protocol as Protocol
else:
    # typing itself would be a twelfth of the time that ``udpchat send`` takes from its start to its exit
    class _NamedTupleType(type):
        def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, object]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, space)
            fields = list(space.get("__annotations__", ()))
            preset = [field for field in fields if field in space]
            assert preset == fields[len(fields) - len(preset):], f"{name}: a field without a default behind others"
            base = namedtuple(name, fields, defaults=[space.pop(field) for field in preset])
            return type(name, (base,), {"__slots__": (), **space})

    class NamedTuple(metaclass=_NamedTupleType):
        """A tuple with named fields: the annotated ones of a subclass, as in typing."""

    Any = Protocol = object

# a numeric host, without brackets, and a port. Behind a link-local host stands the number of its interface, fe80::1%2:
# the number is what the kernel tells; ``show_address`` shows the name
Address = tuple[str, int]
Info = dict[str, Any]           # the fields of one map
Map = tuple[str, Info]          # a tag and its fields
NEVER = float("inf")            # a time that does not come

# Protocol constants: two implementations that differ in one of these do not understand each other.

DEFAULT_PORT = 4119       # UDP; where a server is, unless it is said
MAX_DATAGRAM = 1200       # bytes of payload that a sender may use: any path carries them unfragmented (RFC 9000 §14)
MAX_NUMBER = 2 ** 63 - 1  # ids, versions and numbers of streams; SQLite's integers are signed 64 bit
MAX_ITEMS = 1024          # elements of one array: bounds what a hostile header can allocate
MAX_FIELDS = 32           # keys of one map
MAX_PIECE = 768           # bytes of UTF-8 in one number of a stream; a longer text is cut into pieces
MAX_TEXT = 65536          # bytes of UTF-8 in one message
MAX_TEXT_PIECES = -(-MAX_TEXT // (MAX_PIECE - 3))  # numbers; a cut can cost 3 bytes, it never splits a character
INITIAL_ROOM = 4096       # numbers of a stream that may be sent before the first ack; a receiver buffers at least these
MAX_EARLY = 4096          # numbers that a sender may be ahead of what is written, and that are buffered: 3 MiB of text
MAX_NICK = 32             # characters
MAX_NICK_BYTES = 96       # bytes of UTF-8
MAX_HOST = 64             # characters of a numeric address
MAX_RANGES = 32           # ranges in the ``have`` of one ack
SYNC_PAGES = 32           # datagrams that answer one ``sync``; after as many, the client asks for the next ones
SESSION_BYTES = 16        # 128 bits: nobody guesses one
PROOF_BYTES = 8           # of a session, in what the server sends: 64 bits, nobody guesses them while it lasts
TOKEN_BYTES = 32          # an HMAC-SHA256
KEY_BYTES = 32            # a public key of X25519; and a secret, and what two share
INDEX_BYTES = 4           # of a channel: chosen by the receiver of its records, which finds the channel by them
ENVELOPE_BYTES = 48       # of the letters of one stream: without it nobody opens them
KEY_NAME_BYTES = 8        # of the SHA-256 of a public key, which name it
COUNT_BYTES = 2           # at the beginning of a bundle: how many numbers of a stream are sealed in it
MIN_BUNDLE = 18           # bytes: the count, and a tag
MAX_HELLO = 512           # bytes of one message of a handshake of Noise
JOIN_SIZE = 320           # bytes a ``join`` is padded to: its size says nothing of the nick
GREET_SIZE = 160          # bytes a ``greet`` is padded to: the same of another client
NO_NICK = "-"             # stands where a nick is required, and is not to be said, or means nothing
REG_SIZE = 128            # bytes a ``reg`` without cookie is padded to, so that its answer is never larger
SESSION_SIZE = 184        # bytes a request with a session is padded to: a ``for`` and a ``probe`` are never larger

# Choices of this implementation: other values would work with the same peers.

SERVER_ATTEMPTS = 5       # requests without an answer after which a server counts as silent
SERVER_INTERVAL = 0.5     # s between them
MAX_RECEIVED = 65535      # bytes; the largest UDP datagram there is, whatever its sender should have used
MAX_UNPACKED = 65535      # bytes that a ``packed`` may become
MAX_MAPS = 64             # in one datagram: one of 1,200 bytes cannot hold as many
ARRAY_GROWTH = 4          # bytes; two array headers (texts, and their times) grow from 1 to 3 from 16 elements on
PACKED_LEVEL = 6          # of zlib: 9 gains nothing
PACKED_OVERHEAD = 26      # bytes of a ``packed`` before its data, if these are more than 255
UNPACK_BUFFER = 4096      # bytes; the unpacker fills it before it starts over: a small one stays in the cache


# --- checks ---------------------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def integer(low: int, high: int) -> Check:
    """Return a check for an integer in [low, high]; ``True`` and ``False`` do not pass."""
    return lambda value: type(value) is int and low <= value <= high


def binary(size: int) -> Check:
    """Return a check for exactly ``size`` bytes."""
    return lambda value: type(value) is bytes and len(value) == size


def binary_up_to(size: int) -> Check:
    """Return a check for 1 to ``size`` bytes."""
    return lambda value: type(value) is bytes and 0 < len(value) <= size


def boolean(value: Any) -> bool:
    """Return whether ``value`` is true or false; 0 and 1 do not pass."""
    return type(value) is bool


def row(*checks: Check) -> Check:
    """Return a check for a list with one element for each of ``checks``."""
    return lambda value: (type(value) is list and len(value) == len(checks)
                          and all(check(element) for check, element in zip(checks, value)))


def rows(check: Check, most: int = MAX_ITEMS) -> Check:
    """Return a check for a list of at most ``most`` elements, each of which passes ``check``."""
    return lambda value: type(value) is list and (not value or (len(value) <= most and all(map(check, value))))


def is_nick(nick: Any) -> bool:
    """Return whether ``nick`` is valid: 1-32 letters, digits, ``_ . -`` in NFC, at most 96 bytes."""
    return type(nick) is str and 0 < len(nick) <= MAX_NICK and _has_form_of_nick(nick)


@functools.lru_cache(maxsize=4096)  # only short strings get here: strangers choose them
def _has_form_of_nick(nick: str) -> bool:
    if nick.isascii():      # mostly, and a server looks at a hundred thousand when it starts
        return nick.replace("_", "x").replace(".", "x").replace("-", "x").isalnum()
    return (len(nick.encode("utf-8", "replace")) <= MAX_NICK_BYTES
            and all(c.isalpha() or c.isdecimal() or c in "_.-" for c in nick)
            and unicodedata.is_normalized("NFC", nick))


def is_host(host: str) -> bool:
    """Return whether ``host`` is a numeric IP address: nothing from the network is ever looked up."""
    return len(host) <= MAX_HOST and _has_form_of_host(host)


@functools.lru_cache(maxsize=4096)
def _has_form_of_host(host: str) -> bool:
    if ":" not in host:
        parts = host.split(".")
        return len(parts) == 4 and all(map(_is_octet, parts))
    import ipaddress        # here: most users never see an IPv6 address, and it would slow down every start
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return host.isascii() and host.isprintable()


def _is_octet(part: str) -> bool:
    return part.isascii() and part.isdecimal() and str(int(part)) == part and int(part) <= 255


def is_private(host: str) -> bool:
    """Return whether a numeric host means something only in its own network: RFC 1918, RFC 3927, RFC 4193.

    A link-local one of IPv6 is none here: it means nothing without the name of an interface.
    """
    if ":" in host:
        return host[:2].lower() in ("fc", "fd") and "%" not in host
    first, second = map(int, host.split(".")[:2])
    return first == 10 or (first, second) in ((192, 168), (169, 254)) or (first == 172 and 16 <= second < 32)


def are_neighbours(host: str, other: str) -> bool:
    """Return whether two numeric hosts seem to be in one network: in the same /24, or /64 for IPv6."""
    if ":" not in host or ":" not in other:
        return host.rpartition(".")[0] == other.rpartition(".")[0] != ""
    import ipaddress        # here: see ``is_host``
    return int(ipaddress.IPv6Address(host)) >> 64 == int(ipaddress.IPv6Address(other)) >> 64


def network_of(host: str) -> str:
    """Return what one user may have many addresses in: the /64 of an IPv6 host, or an IPv4 host itself."""
    if ":" not in host:
        return host
    import ipaddress        # here: most users never see an IPv6 address
    return str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(host)) >> 64 << 64))


def are_short(texts: Sequence[str], most: int) -> bool:
    """Return whether each text has at most ``most`` bytes of UTF-8, even if all its characters are of the widest."""
    longest = len(texts[0]) if len(texts) == 1 else len(max(texts, key=len))
    return longest * 4 <= most


def fits_piece(text: str) -> bool:
    """Return whether ``text`` fits into one number of a stream."""
    return len(text) <= MAX_PIECE and (len(text) * 4 <= MAX_PIECE or len(text.encode()) <= MAX_PIECE)


ONLY_TEXTS = {str}


def valid_texts(value: Any) -> bool:
    """Return whether ``value`` is the texts of a ``chat`` or ``save``: at least one, each fits into one number."""
    if type(value) is not list or not 0 < len(value) <= MAX_ITEMS:
        return False
    if len(value) == 1:
        return type(value[0]) is str and fits_piece(value[0])
    if set(map(type, value)) != ONLY_TEXTS:
        return False
    return are_short(value, MAX_PIECE) or all(map(fits_piece, value))


def numbers_of(bundle: bytes) -> int:
    """Return how many numbers of a stream are sealed in a bundle."""
    return int.from_bytes(bundle[:COUNT_BYTES], "little")


def valid_bundle(value: Any) -> bool:
    """Return whether ``value`` is of the size of texts that are sealed together: each of them has a byte at least."""
    return (type(value) is bytes and len(value) <= MAX_DATAGRAM
            and 0 < numbers_of(value) <= min(MAX_ITEMS, len(value) - MIN_BUNDLE))


def valid_parts(value: Any) -> bool:
    """Return whether ``value`` is parts of bundles, at least one: [bundle, numbers before the part, numbers in it]."""
    return type(value) is list and 0 < len(value) <= MAX_ITEMS and all(map(_is_part, value))


def _is_part(part: Any) -> bool:
    if type(part) is not list or len(part) != 3:
        return False
    bundle, start, count = part
    return valid_bundle(bundle) and COUNT(start) and NUMBER(count) and start + count <= numbers_of(bundle)


def numbers_in(run: Any) -> int:
    """Return how many numbers a run of a ``mail`` has."""
    return sum([part[2] for part in run[4]]) if len(run) > RUN_FIELDS else len(run[4])


def valid_mail_items(value: Any) -> bool:
    """Return whether ``value`` is the items of a ``mail``: runs of letters, [from, stream, n, at, texts, more] each.

    Where the texts are sealed, they are parts of bundles, and the sender's key and the envelope are behind that.
    """
    return (type(value) is list and 0 < len(value) <= MAX_ITEMS and all(map(_is_run, value))
            and sum(map(numbers_in, value)) <= MAX_ITEMS)


def _is_run(run: Any) -> bool:
    """Return whether ``run`` is texts with consecutive numbers in one stream that were sent at the same time."""
    if type(run) is not list or len(run) not in (RUN_FIELDS, RUN_FIELDS + 2):
        return False
    sender, stream, first, at, texts, more, *seal = run
    valid = valid_texts if not seal else valid_parts if KEY(seal[0]) and ENVELOPE(seal[1]) else NEVER_VALID
    if not (is_nick(sender) and COUNT(stream) and NUMBER(first) and type(at) is float and valid(texts)):
        return False
    count = numbers_in(run)
    return first <= MAX_NUMBER - count and NUMBERS(more) and (not more or _lie_within(more, first, count))


def _lie_within(numbers: Sequence[int], first: int, count: int) -> bool:
    """Return whether all of ``numbers`` are among the ``count`` that begin with ``first``."""
    return first <= min(numbers) and max(numbers) < first + count


# --- the schema -----------------------------------------------------------------------------------------------

NICK: Check = is_nick
HOST: Check = lambda value: type(value) is str and is_host(value)
REASON: Check = lambda value: type(value) is str and len(value) <= MAX_NICK
STATE: Check = lambda value: value in ("online", "offline", "gone")
TIME: Check = lambda value: type(value) is float
NUMBER = integer(1, MAX_NUMBER)
COUNT = integer(0, MAX_NUMBER)
PORT = integer(0, 65535)
SESSION = binary(SESSION_BYTES)
PROOF = binary(PROOF_BYTES)
TOKEN = binary(TOKEN_BYTES)
KEY = binary(KEY_BYTES)
KEY_OR_NONE: Check = lambda value: value == b"" or KEY(value)
INDEX = binary(INDEX_BYTES)
ENVELOPE = binary(ENVELOPE_BYTES)
NUMBERS = rows(NUMBER)
NEVER_VALID: Check = lambda value: False
TEXTS_OR_BUNDLE: Check = lambda value: valid_texts(value) or valid_bundle(value)
SPELLS = rows(row(TIME, NUMBER))
ENTRY = row(NICK, HOST, PORT, STATE)
ADDRESS = row(HOST, PORT)
RANGE: Check = lambda value: row(NUMBER, NUMBER)(value) and value[0] <= value[1]

REQUIRED: dict[str, dict[str, Check]] = {
    "reg": {"id": COUNT, "nick": NICK},
    "cookie": {"id": COUNT, "server": SESSION, "cookie": SESSION},
    "hello": {"id": COUNT, "message": binary_up_to(MAX_HELLO)},
    "join": {"nick": NICK, "index": INDEX},
    "welcome": {"id": COUNT, "nick": NICK, "boot": COUNT, "session": SESSION, "version": COUNT},
    "refused": {"nick": NICK, "reason": REASON},
    "for": {"session": PROOF},
    "table": {"version": COUNT, "set": rows(ENTRY)},
    "packed": {"data": binary_up_to(MAX_DATAGRAM)},
    "sync": {"session": SESSION, "version": COUNT},
    "want": {"session": SESSION, "nick": NICK},
    "key": {"nick": NICK, "key": KEY_OR_NONE, "bound": boolean, "version": COUNT},
    "chat": {"from": NICK, "to": NICK, "stream": COUNT, "n": NUMBER, "base": NUMBER, "text": valid_texts},
    "ack": {"stream": COUNT, "next": NUMBER, "have": rows(RANGE, MAX_RANGES), "room": COUNT},
    "nack": {"stream": COUNT, "first": NUMBER, "last": NUMBER, "reason": REASON},
    "save": {"session": SESSION, "to": NICK, "stream": COUNT, "n": NUMBER, "base": NUMBER, "text": TEXTS_OR_BUNDLE,
             "at": rows(TIME), "relay": boolean},
    "exists": {"stream": COUNT, "n": NUMBER, "version": COUNT, "entry": ENTRY},
    "mail": {"stream": COUNT, "n": NUMBER, "base": NUMBER, "items": valid_mail_items},
    "meet": {"session": SESSION, "to": NICK, "stream": COUNT},
    "offer": {"id": COUNT, "message": binary_up_to(MAX_HELLO)},
    "accept": {"id": COUNT, "message": binary_up_to(MAX_HELLO)},
    "greet": {"from": NICK, "index": INDEX},
    "call": {"from": NICK, "stream": COUNT, "host": HOST, "port": PORT},
    "knock": {"stream": COUNT},
    "probe": {"id": COUNT, "to": NICK},
    "alive": {"id": COUNT, "nick": NICK},
    "ping": {"id": COUNT, "session": SESSION, "version": COUNT},
    "pong": {"id": COUNT, "boot": COUNT, "version": COUNT, "mail": COUNT},
    "dereg": {"session": SESSION},
    "bye": {"session": SESSION},
}
OPTIONAL: dict[str, dict[str, Check]] = {
    "reg": {"token": TOKEN, "cookie": SESSION, "knocks": boolean, "own": ADDRESS, "secure": boolean, "packed": boolean,
            "visit": boolean},
    "cookie": {"key": KEY},
    "hello": {"cookie": SESSION},
    "join": {"proof": TOKEN, "knocks": boolean, "own": ADDRESS, "packed": boolean, "visit": boolean},
    "welcome": {"index": INDEX, "lasting": boolean},
    "refused": {"id": COUNT, "session": SESSION, "spelling": NICK, "lasting": boolean},
    "table": {"since": COUNT, "keys": rows(row(integer(0, MAX_ITEMS - 1), KEY_OR_NONE, boolean)),
              "untold": boolean, "at": rows(COUNT)},
    "chat": {"more": NUMBERS},
    "save": {"more": NUMBERS, "envelope": ENVELOPE, "key": binary(KEY_NAME_BYTES)},
    "sync": {"early": boolean},
    "mail": {"to": NICK},
    "exists": {"knocks": boolean},
    "call": {"own": ADDRESS},
    "alive": {"session": SESSION},
}


def since_of(info: Info) -> int:
    """Return the version that a ``table`` follows; the field is left out where that is the one before its own."""
    return int(info.get("since", info["version"] - 1))


def _numbered(info: Info, count: int) -> bool:
    """Return whether ``count`` items of a stream have a possible ``n``, ``base`` and ``more``."""
    first: int = info["n"]
    if not info["base"] <= first <= MAX_NUMBER - count or not count:
        return False
    more = info.get("more")
    return not more or _lie_within(more, first, count)


def _has_times_or_seal(info: Info) -> bool:
    """Return whether the texts of a ``save`` have a time each, or are sealed, and are said to be."""
    is_sealed = "envelope" in info
    times = 0 if is_sealed else len(info["text"])
    return ("key" in info) is (type(info["text"]) is bytes) is is_sealed and len(info["at"]) == times


def _numbers_saved(text: Any) -> int:
    """Return how many numbers the ``text`` of a ``save`` has."""
    return numbers_of(text) if type(text) is bytes else len(text)


CROSS_FIELD_CHECKS: dict[str, Check] = {
    "table": lambda info: 0 <= since_of(info) <= info["version"],
    "chat": lambda info: _numbered(info, len(info["text"])),
    "save": lambda info: _numbered(info, _numbers_saved(info["text"])) and _has_times_or_seal(info),
    "mail": lambda info: _numbered(info, sum(map(numbers_in, info["items"]))),
    "nack": lambda info: bool(info["first"] <= info["last"]),
}
SCHEMA = {tag: (list(fields.items()), list(OPTIONAL.get(tag, {}).items()), CROSS_FIELD_CHECKS.get(tag))
          for tag, fields in REQUIRED.items()}


def is_valid(tag: Any, info: Any) -> bool:
    """Return whether ``info`` has the fields that a map with ``tag`` must have, and valid values in all it may have."""
    fields = SCHEMA.get(tag) if type(tag) is str else None
    if fields is None or type(info) is not dict:
        return False
    required, optional, cross_check = fields
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
    return cross_check is None or cross_check(info)


# --- datagrams ------------------------------------------------------------------------------------------------

_pack: Callable[[Any], bytes] = msgpack.Packer().pack


def encode(tag: str, info: Info) -> bytes:
    """Return one map as bytes; several of them back to back are a datagram."""
    return _pack({"tag": tag, "info": info})


def padded(tag: str, info: Info, size: int) -> bytes:
    """Return one map as at least ``size`` bytes, by an extra field ``pad``."""
    plain = encode(tag, info)
    if len(plain) >= size:
        return plain
    missing = size - len(encode(tag, dict(info, pad=b"")))
    return encode(tag, dict(info, pad=bytes(max(0, missing))))


_FOR = encode("for", {"session": bytes(PROOF_BYTES)})[:-PROOF_BYTES]
FOR_SIZE = len(_FOR) + PROOF_BYTES      # bytes of the ``for`` that begins a datagram of the server


def addressed(session: bytes, *maps: bytes) -> bytes:
    """Return a datagram of the server for one client: a ``for``, then ``maps``, which may be shared by many clients."""
    return b"".join((_FOR, session[:PROOF_BYTES], *maps))


def table_map(since: int, version: int, entries: list[list[object]], keys: Sequence[list[object]] = (),
              is_untold: bool = False, seen: Sequence[int] = ()) -> bytes:
    """Return a ``table``: the entries that changed in (since, version]; for the others, see ``Page``."""
    info: Info = {"version": version, "set": entries}
    if keys:
        info["keys"] = keys
    if seen:
        info["at"] = seen
    if is_untold:
        info["untold"] = True
    return encode("table", info if since == version - 1 else {"since": since, **info})


def packed(maps: bytes) -> bytes:
    """Return maps compressed, as one map."""
    import zlib     # here: only large tables need it
    return encode("packed", {"data": zlib.compress(maps, PACKED_LEVEL)})


def widened(data: bytes, size: int) -> bytes:
    """Return a ``packed`` of at least 300 bytes as ``size`` bytes: zeros follow on what is compressed."""
    return encode("packed", {"data": data[PACKED_OVERHEAD:].ljust(size - PACKED_OVERHEAD, b"\0")})


def _unpacker_class() -> Any:
    """Return the reader of msgpack. Before 1.2 the one in C leaks memory with every broken datagram; the one in Python
    does not."""
    if msgpack.version >= (1, 2):
        return msgpack.Unpacker
    from msgpack.fallback import Unpacker
    return Unpacker


UNPACKER = _unpacker_class()


class Decoder:
    """Turns datagrams into maps, and counts what it drops.

    ``dropped``: the maps (or, where the framing itself is broken, rests of datagrams) that were not valid.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._may_unpack = True     # the datagram that was decoded last has had no ``packed`` yet
        self._unpacker = self._new_unpacker()

    @staticmethod
    def _new_unpacker() -> Any:
        return UNPACKER(read_size=UNPACK_BUFFER, max_buffer_size=2 * MAX_RECEIVED, max_array_len=MAX_ITEMS,
                        max_map_len=MAX_FIELDS)

    def decode(self, datagram: bytes) -> list[Map]:
        """Return the valid maps of a datagram, in order. It never raises, whatever the bytes are."""
        maps: list[Map] = []
        self._may_unpack = True
        unpacker = self._unpacker       # one for all datagrams: a new one for each would cost more than the decoding
        position = unpacker.tell()
        end = position + len(datagram)
        try:
            unpacker.feed(datagram)
            for _ in range(MAX_MAPS):
                if position >= end:
                    break
                value = unpacker.unpack()
                position = unpacker.tell()
                if type(value) is dict and is_valid(value.get("tag"), value.get("info")):
                    maps.append((value["tag"], value["info"]))
                else:
                    self.dropped += 1
            if position < end:
                raise ValueError("a datagram that its sender may send has fewer")
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException):    # broken, or only a part of it came
            self.dropped += 1
            self._unpacker = self._new_unpacker()       # the old one would read the next datagram as the rest of this
        return maps

    def unpacked(self, data: bytes) -> list[Map]:
        """Return the maps in the ``data`` of a ``packed``; of further ones in the same datagram, none.

        It never raises, and takes bounded memory, and bounded time for each datagram.
        """
        import zlib
        if not self._may_unpack:
            self.dropped += 1
            return []
        self._may_unpack = False
        try:
            stream = zlib.decompressobj()
            maps = stream.decompress(data, MAX_UNPACKED)
        except zlib.error:
            maps = b""
        if not maps or not stream.eof:      # it is broken, or there is more
            self.dropped += 1
            return []
        found = self.decode(maps)
        self._may_unpack = False
        return found


RECORD = 0xC1             # the first byte of a record; msgpack never uses it: programs without encryption drop it
RECORD_MARK = bytes((RECORD,))


INDEX_END = 2 + INDEX_BYTES


REPLAY_WINDOW = 1024      # counters up to the highest one, of which each that is missing may still come


class ReplayWindow:
    """Which counters have come (RFC 4303 §3.4.3). ``highest``: the highest of them, -1 before the first one."""

    def __init__(self) -> None:
        self.highest = -1
        self._seen = 0          # one bit for each counter, the lowest one for the highest counter

    def is_new(self, counter: int) -> bool:
        """Return whether ``counter`` has not come, and lies in the window or above it."""
        age = self.highest - counter
        return age < 0 or (age < REPLAY_WINDOW and not self._seen >> age & 1)

    def add(self, counter: int) -> None:
        """Remember a counter that is new."""
        ahead = counter - self.highest
        if ahead <= 0:
            self._seen |= 1 << -ahead
        else:
            kept = self._seen << ahead if ahead < REPLAY_WINDOW else 0     # never a shift by what may be 2 ** 48
            self._seen, self.highest = kept & ((1 << REPLAY_WINDOW) - 1) | 1, counter


TAG_SIZE = 16             # bytes by which a text grows when it is sealed


HEADER_SIZE = INDEX_END + 8
RECORD_EXTRA = HEADER_SIZE + TAG_SIZE   # bytes by which a text grows


def index_of(datagram: bytes) -> bytes | None:
    """Return the index in a record, None if the datagram is not one."""
    is_record = len(datagram) >= RECORD_EXTRA and datagram[0] == RECORD
    return datagram[2:INDEX_END] if is_record else None


# What handshakes of Noise are bound to. Of who is called, all spellings are the same; in letters each nick stands as it
# is registered: otherwise a letter could be shown again under each spelling.

def hello_prologue(server_id: bytes, request: int, cookie: bytes) -> bytes:
    """Return what a handshake between client and server is bound to."""
    return encode("udpchat hello 1", {"server": server_id, "id": request, "cookie": cookie})


def offer_prologue(server_key: bytes, called: str, id_: int) -> bytes:
    """Return what a handshake between two clients is bound to."""
    return encode("udpchat offer 1", {"server": server_key, "to": folded(called), "id": id_})


def letter_prologue(server_key: bytes, sender: str, recipient: str, stream: int) -> bytes:
    """Return what the letters of a stream are bound to."""
    return encode("udpchat mail 1", {"server": server_key, "from": sender, "to": recipient, "stream": stream})


# --- what may be shown ----------------------------------------------------------------------------------------

# what could forge a line or drive a terminal: C0 but the tab, DEL, C1, line separators, bidi controls; and surrogates
UNSAFE = "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def clean(text: str) -> str:
    """Return ``text`` with every control character as its escape: fit for one line of a terminal."""
    if text.isprintable():
        return text
    return re.sub(UNSAFE, lambda match: ("\\x%02x" if match[0] < "\u0100" else "\\u%04x") % ord(match[0]), text)


# --- nicks that count as the same -----------------------------------------------------------------------------

# letters that ``str.lower`` leaves apart: both forms of sigma, of which Σ becomes the final one only at the end of a
# word; and the Hangul fillers, which are letters that nobody sees
FOLDED = str.maketrans({"\u03c2": "\u03c3", "\u115f": None, "\u1160": None})


def folded(nick: str) -> str:
    """Return what is the same for all spellings of a nick: those that only differ in case, width or composition.

    That is the UsernameCaseMapped profile of RFC 8265: width mapping, toLowerCase, NFC. The profile excludes characters
    with another compatibility mapping (as of 𝐛𝐨𝐛, ﬁ, µ), and nicks may have them: NFKC makes them what they look like,
    and does the same as the profile with all others.
    """
    if nick.isascii():
        return nick.lower()
    lower = unicodedata.normalize("NFKC", nick).lower()
    return unicodedata.normalize("NFKC", lower.translate(FOLDED))


# The scripts of a character are told by the first word of its name: ``unicodedata`` has no other way. Of these words,
# some name a script that is written together with others (UTS 39 §5.1, augmented script sets: Japanese, Korean, Chinese
# with Bopomofo), some are another name for one, and MODIFIER LETTER APOSTROPHE and the like are of every script.
SCRIPTS: dict[str, frozenset[str]] = {
    "CJK": frozenset(("JAPANESE", "KOREAN", "BOPOMOFO")), "IDEOGRAPHIC": frozenset(("JAPANESE", "KOREAN", "BOPOMOFO")),
    "HIRAGANA": frozenset(("JAPANESE",)), "KATAKANA": frozenset(("JAPANESE",)), "HENTAIGANA": frozenset(("JAPANESE",)),
    "HANGUL": frozenset(("KOREAN",)), "BOPOMOFO": frozenset(("BOPOMOFO",)), "MODIFIER": frozenset(),
}
WITH_ASCII_DIGITS = frozenset(("LATIN", "GREEK", "CYRILLIC"))   # beside them, the zero of another script is an "o"


def mixes_scripts(nick: str) -> bool:
    """Return whether there are letters of different scripts in a nick: it may look like one that has only one of them.

    UTS 39, "single script": Latin, Greek and Cyrillic never mix; Han, Hiragana and Katakana do, and so do Han and
    Hangul, and Han and Bopomofo. Digits are of no script, but Latin, Greek and Cyrillic letters go with ASCII ones.
    """
    if nick.isascii():
        return False
    characters = set(unicodedata.normalize("NFKC", nick))
    words = {unicodedata.name(c, "UNNAMED").replace("-", " ").split(" ", 1)[0] for c in characters if c.isalpha()}
    scripts = [found for found in (SCRIPTS.get(word, frozenset((word,))) for word in words) if found]
    if not scripts:
        return False
    shared = frozenset.intersection(*scripts)
    has_other_digits = any(c.isdecimal() and not c.isascii() for c in characters)
    return not shared or (has_other_digits and shared <= WITH_ASCII_DIGITS)


class Spellings:
    """Nicks by what is the same for all spellings of each, see ``folded``."""

    def __init__(self, nicks: Iterable[str]) -> None:
        self._alike: dict[str, list[str]] = {}
        for nick in nicks:
            self.add(nick)

    def add(self, nick: str) -> None:
        """Add a nick that is not here yet."""
        self._alike.setdefault(folded(nick), []).append(nick)

    def remove(self, nick: str) -> None:
        """Remove a nick that is here."""
        key = folded(nick)
        self._alike[key].remove(nick)
        if not self._alike[key]:
            del self._alike[key]

    def of(self, nick: str) -> Sequence[str]:
        """Return the nicks here that count as the same as ``nick``, itself included, in the order of their coming."""
        return self._alike.get(folded(nick), ())

    def only(self, nick: str) -> str | None:
        """Return the only one of those, None if there are none or several; composed alike is the same spelling."""
        alike = self.of(nick)
        if len(alike) == 1:
            return alike[0]
        composed = unicodedata.normalize("NFC", nick)
        return composed if composed in alike else None


# --- the table of clients -------------------------------------------------------------------------------------

EntryRow = list[Any]        # one entry of the table as it travels: [nick, host, port, state]
KeyRow = list[Any]          # its key: [position of the entry, key, whether the nick is bound to it]


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
    key: bytes = b""        # by which others encrypt for this client, b"" if they cannot ...
    is_bound: bool = False  # ... and whether the nick is bound to it, not only the session
    seen: int = 0           # when it was last online, in s since 1970, as the server says; 0: it is, or nobody knows

    def row(self) -> EntryRow:
        """Return the entry as it travels: the interface of a link-local host means nothing on other machines."""
        return [self.nick, self.host.partition("%")[0], self.port, self.state]

    def says(self, other: Entry) -> bool:
        """Return whether this is the same, but for the version, and for the time."""
        return self[:4] == other[:4] and self[5:7] == other[5:7]


class Page(NamedTuple):
    """Every entry that changed in (since, version]; ``keys``: a ``KeyRow`` for each of those that have a key.

    ``is_untold``: the server says their keys when it is asked; ``keys`` has a row for each of those that have none.
    ``seen``: when those that are offline were last seen, if the server knows it: position, s since 1970, position, ...
    """

    since: int
    version: int
    rows: list[EntryRow]
    keys: Sequence[KeyRow] = ()
    is_untold: bool = False
    seen: Sequence[int] = ()


UNTOLD = b"?"             # in an ``Entry``, in place of a key: there is one, and the server says which if it is asked

ROW_OVERHEAD = 20         # bytes of one entry on the wire beside its nick and its host ...
KEY_OVERHEAD = 39         # ... and of its key ...
SEEN_OVERHEAD = 8         # ... and of the time at which it was seen
MAX_ENTRIES = 1_000_000   # of a mirror, whatever its server says; what is beyond is left out
MAX_TOMBSTONES = 100_000  # forgotten nicks that a table still names; the oldest go first


class Table:
    """The versioned dictionary of clients: nick -> ``Entry``.

    Every change gives one entry a new version, no two entries share one, and an entry remembers the version of its
    last change. So "what changed since version v" is one question with one kind of answer, whether v is the version
    before (a broadcast) or 0 (a snapshot).
    """

    def __init__(self, seen_of: Callable[[str], int] = lambda nick: 0) -> None:
        """``seen_of``: returns when a nick that is offline was last seen, see ``Entry``; asked for each page."""
        self.version = 0
        self._seen_of = seen_of
        self.entries: dict[str, Entry] = {}
        self._gone: dict[str, Entry] = {}
        self._log: list[Entry] = []     # by version; entries that changed again are stale
        self._spellings: Spellings | None = None
        self.is_full = False            # a mirror had no room for somebody

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

    def beginning_with(self, word: str, most: int) -> list[str]:
        """Return the nicks that begin like ``word``, in any spelling; the first ones: those online, then in order."""
        import heapq        # here: servers, and clients in pipes, never ask
        wanted = folded(word)
        online: list[str] = []
        others: list[str] = []
        for nick, entry in self.entries.items():
            if nick.lower().startswith(wanted) or nick.startswith(word) or (
                    not nick.isascii() and folded(nick).startswith(wanted)):
                (online if entry.state is ONLINE else others).append(nick)
        found = heapq.nsmallest(most, online)
        return found + heapq.nsmallest(most - len(found), others)

    def set(self, nick: str, host: str, port: int, state: State, key: bytes = b"", is_bound: bool = False) -> bool:
        """Change one entry; return whether that changed anything (and so used a new version)."""
        entry = Entry(nick, host, port, state, self.version + 1, key, is_bound)
        if self._says(entry):
            return False
        self.version += 1
        self._put(entry)
        return True

    def _says(self, entry: Entry) -> bool:
        """Return whether this is what the table says already, but for the version."""
        old = self.entries.get(entry.nick)
        if old is None:
            return entry.state == GONE
        return old.says(entry)

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

    def pages(self, since: int, size: int, is_untold: bool = False) -> Iterator[Page]:
        """Yield what changed after version ``since``, in pages of about ``size`` bytes on the wire.

        Even a snapshot names those who are gone: part of an earlier answer to the same question may have arrived.
        """
        start, used, last = since, 0, since
        rows: list[EntryRow] = []
        keys: list[KeyRow] = []
        seen: list[int] = []
        for index in range(bisect_right(self._log, since, key=lambda entry: entry.version), len(self._log)):
            entry = self._log[index]
            if not self._is_current(entry):
                continue
            has_key_row = bool(entry.key) is not is_untold
            seen_at = self._seen_of(entry.nick) if entry.state == OFFLINE else 0
            cost = len(entry.nick.encode()) + len(entry.host) + ROW_OVERHEAD
            if has_key_row:
                cost += KEY_OVERHEAD
            if seen_at:
                cost += SEEN_OVERHEAD
            if rows and used + cost > size:
                yield Page(start, last, rows, tuple(keys), is_untold, tuple(seen))
                start, rows, keys, seen, used = last, [], [], [], 0
            if has_key_row:
                keys.append([len(rows), entry.key, entry.is_bound])
            if seen_at:
                seen += len(rows), seen_at
            rows.append(entry.row())
            used += cost
            last = entry.version
        if self.version > since:
            yield Page(start, self.version, rows, tuple(keys), is_untold, tuple(seen))

    def apply(self, page: Page) -> list[str] | None:
        """Apply a page to a mirror; return the nicks that it changed, None where pages before it are missing."""
        if page.since > self.version:
            return None
        if page.version <= self.version:
            return []
        changed = []
        self.version = page.version
        keys = {position: (key, is_bound) for position, key, is_bound in page.keys}
        others = (UNTOLD, False) if page.is_untold else (b"", False)
        times = dict(zip(page.seen[::2], page.seen[1::2]))
        for position, (nick, host, port, name) in enumerate(page.rows):
            entry = Entry(nick, host, port, STATES[name], page.version, *keys.get(position, others),
                          times.get(position, 0))
            if self._says(entry):
                if entry.seen:
                    self.entries[nick] = entry
                continue
            if entry.state == GONE:
                self._remove(nick)
            elif len(self.entries) >= MAX_ENTRIES and nick not in self.entries:
                self.is_full = True
                continue
            else:
                self._replace(entry)
            changed.append(nick)
        return changed

    def learn(self, nick: str, key: bytes, is_bound: bool, version: int) -> bool:
        """Note in a mirror the key of an entry, as of ``version``; return False if that is known, or too old."""
        entry = self.entries.get(nick)
        if entry is None or entry.key != UNTOLD or version < entry.version:
            return False
        self.entries[nick] = entry._replace(key=key, is_bound=is_bound)
        return True


class Mirror:
    """A client's copy of the server's table.

    A server that was restarted has another ``boot`` and numbers its table from the beginning. The new table grows
    beside the old one, which stays in force until the new one is whole, and is dropped then.
    """

    def __init__(self) -> None:
        self.table = Table()        # in force
        self.boot = 0
        self._fresh: Table | None = None     # of a new boot, until it is whole
        self.target = 0             # the version to reach

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
        return self.version >= self.target

    def begin_session(self, boot: int, version: int) -> None:
        """Begin a session with a server whose table has that version."""
        if boot != self.boot:
            self.boot = boot
            self._fresh = Table()
        self.target = version

    def expect(self, version: int) -> bool:
        """Note how far the server is; return whether something is missing here."""
        self.target = max(self.target, version)
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
        old, self.table, self._fresh = self.table.entries, fresh, None
        changed = [nick for nick, entry in fresh.entries.items() if nick not in old or not old[nick].says(entry)]
        return changed + [nick for nick in old if nick not in fresh.entries]

    def mark_all_offline(self) -> list[str]:
        """Mark everybody offline: the table in force is too old. Return the nicks that were online until now."""
        return [entry.nick for entry in list(self.table.entries.values())
                if self.table.set(entry.nick, entry.host, entry.port, OFFLINE, entry.key, entry.is_bound)]


Outgoing = tuple[bytes, Address | None]     # a datagram, and where it goes; None: to the server


class Place(NamedTuple):
    """What a client's table says of a recipient; ``address`` is None if it cannot be sent to from here."""

    online: bool
    address: Address | None


# --- numbers of a stream --------------------------------------------------------------------------------------

def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges [first, end) of numbers as sorted ones that neither overlap nor touch; empty ones are left out."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return found


# --- texts ----------------------------------------------------------------------------------------------------

SealedText = tuple[bytes, int]      # a bundle, which only its recipient can read, and the place of a text in it
Text = str | SealedText             # one number of a stream

STRING_HEADER = 3         # bytes that msgpack puts before a string, at most
NUMBER_SIZE = 9           # bytes that it uses for a number, at most
TIME_SIZE = 9             # bytes that it uses for a float
TIME_RUN_SIZE = 13        # bytes that it uses for a float, and for how many texts it counts


def split_text(text: str) -> list[str]:
    """Return ``text`` as pieces of at most ``MAX_PIECE`` bytes of UTF-8 each, cut between characters."""
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


def pieces_of(texts: Iterable[str], first: int) -> tuple[list[str], set[int]]:
    """Return the pieces of texts, numbered from ``first`` on, and the numbers of those that the next one continues."""
    items: list[str] = []
    continued: set[int] = set()
    for text in texts:
        number = first + len(items)
        pieces = split_text(text)
        items.extend(pieces)
        continued.update(range(number, number + len(pieces) - 1))
    return items, continued


def join_pieces(first: int, items: Sequence[str], more: Collection[int]) -> list[str]:
    """Return the whole texts of consecutive numbers from ``first``; those in ``more`` are continued by the next one."""
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


def text_sizes(texts: Sequence[str], first: int, continued: Collection[int], more: int = 0) -> list[int]:
    """Return the most bytes that each of ``texts`` takes in a datagram; ``more``: those of its time.

    ``first`` is the number of the first one. Those whose number is in ``continued`` are named in ``more``, too.
    """
    extra = STRING_HEADER + more
    if len(texts) == 1 and not continued:
        return [len(texts[0].encode()) + extra]
    if "".join(texts).isascii():
        sizes = [len(text) + extra for text in texts]
    else:
        sizes = [len(text.encode()) + extra for text in texts]
    if continued:
        for index in range(len(sizes)):
            if first + index in continued:
                sizes[index] += NUMBER_SIZE
    return sizes


# --- mail -----------------------------------------------------------------------------------------------------


# How it is proved who has written a letter. The last three are doubts, by the names that programs read: it is not
# sealed although its sender encrypts, it is sealed with another key than the sender's, it cannot be opened.
UNSEALED, SEALED, STRANGELY_PLAIN, OTHER_KEY, BROKEN = "unsealed", "sealed", "plain", "key-changed", "damaged"
DOUBTS = frozenset((STRANGELY_PLAIN, OTHER_KEY, BROKEN))
CONTINUES = -1.0          # the time of a letter in a bundle that continues the one before

# One number of somebody's mail: what it has in common with others, mostly in one object, then its number in its stream.
StoredLetter = tuple[tuple[str, int, float, Any], int, Any, bool]   # ((sender, stream, at, seal), n, text, goes on)
WireLetter = tuple[tuple[str, int, str], int, str, float]           # ((sender, stream, proof), n, text, at)
Opened = Iterable[tuple[Iterable[float], Sequence[str], str]]       # a run in parts: times, texts, the proof of all

RUN_FIELDS = 6            # of a run in a ``mail``; two more if it is sealed
MAIL_RUN = 40             # bytes of a run of letters beside its texts and its sender ...
SEAL_RUN = KEY_BYTES + ENVELOPE_BYTES + 4   # ... and beside the key and the envelope of one that is sealed
MAIL_RUN_SIZE = MAIL_RUN + MAX_NICK_BYTES   # bytes of a run that goes on in the next datagram: it is named there again
PART_SIZE = 10            # bytes of a part of a bundle beside the bundle


def bundle_room(sender: str) -> int:
    """Return how many bytes a bundle may have, so that it fits into a ``mail`` of its own; one text in it may go on."""
    info = {"stream": MAX_NUMBER, "n": MAX_NUMBER, "base": MAX_NUMBER, "items": []}
    header = RECORD_EXTRA + len(encode("mail", info)) + MAIL_RUN + len(sender.encode()) + SEAL_RUN
    return MAX_DATAGRAM - header - PART_SIZE - NUMBER_SIZE


def fits_into_mail(sender: str, bundle: bytes, more: Sequence[int]) -> bool:
    """Return whether a bundle of somebody fits into a ``mail`` of its own; ``more``: see ``save``."""
    return len(bundle) + NUMBER_SIZE * max(0, len(more) - 1) <= bundle_room(sender)


def contents(texts: Sequence[str], times: Sequence[Sequence[Any]], more: Sequence[int]) -> bytes:
    """Return what is sealed in a bundle.

    ``times``: when the texts were sent, and how many at that time. ``more``: which numbers the next one continues, also
    the number before the first.
    """
    return _pack([texts, times, more])


# bytes of a bundle beside its texts, if all were sent at the same time, one of them goes on, and so does the one before
BUNDLE_EXTRA = MIN_BUNDLE + len(contents([], [[0.0, MAX_ITEMS]], [MAX_NUMBER, MAX_NUMBER])) + ARRAY_GROWTH


def contents_of(data: bytes, count: int) -> list[Any] | None:
    """Return texts, times and ``more`` of ``contents``; None if it is not that, of as many texts."""
    try:
        found = msgpack.unpackb(data, max_array_len=MAX_ITEMS)
    except (ValueError, RecursionError, msgpack.UnpackException):
        return None
    if type(found) is not list or len(found) != 3:
        return None
    texts, times, more = found
    if not (valid_texts(texts) and SPELLS(times) and NUMBERS(more)) or len(texts) != count:
        return None
    return found if sum([length for _, length in times]) == count else None


def parts_of(texts: Sequence[SealedText]) -> list[list[Any]]:
    """Return sealed texts of consecutive numbers as parts of bundles, see ``valid_parts``."""
    parts: list[list[Any]] = []
    index = 0
    while index < len(texts):
        bundle, start = texts[index]
        found = texts[index:index + numbers_of(bundle) - start]
        whole, length = list(zip(repeat(bundle), range(start, start + len(found)))), len(found)
        if [*found] != whole:
            length = next(n for n, pair in enumerate(zip(found, whole)) if pair[0] != pair[1])
        parts.append([bundle, start, length])
        index += length
    return parts


def texts_of_parts(parts: Sequence[Sequence[Any]]) -> list[SealedText]:
    """Return the sealed texts in parts of bundles."""
    return [(bundle, place) for bundle, start, length in parts for place in range(start, start + length)]


def letters_of(info: Info, opened: Callable[[Any], Opened]) -> tuple[list[WireLetter], list[int]]:
    """Return the letters of a ``mail``, and the numbers (of the mail) that the next one continues.

    ``opened``: returns what is in the letters of a run.
    """
    found: list[WireLetter] = []
    more: list[int] = []
    for run in info["items"]:
        sender, stream, n, _, _, continued = run[:RUN_FIELDS]
        more += [info["n"] + len(found) + number - n for number in continued]
        for times, texts, proof in opened(run):
            found += zip(repeat((sender, stream, proof)), range(n, n + len(texts)), texts, times)
            n += len(texts)
    return found, more


def opened_plain(run: Any) -> Opened:
    """Return what is in the letters of a run that is not sealed; nobody can prove anything of them."""
    return [(repeat(run[3]), run[4], UNSEALED)]


def proof_of(letters: Sequence[WireLetter], texts: int) -> str:
    """Return the proof of letters that are as many texts, or one; BROKEN where something was cut off, or put together.

    The server may not do that with letters that are sealed: it could not know what it makes its readers believe.
    """
    origin, first, _, _ = letters[0]
    proof = origin[2]
    times = [letter[3] for letter in letters] if proof in (SEALED, OTHER_KEY) else ()
    if texts == len(letters):   # of one sender, because they are one of ``runs_of_one_origin``
        return BROKEN if CONTINUES in times else proof
    is_of_one = all(letter[:2] == (origin, n) for n, letter in enumerate(letters, first))
    is_whole = not times or (times[0] != CONTINUES and set(times[1:]) == {CONTINUES})
    return proof if is_of_one and is_whole else BROKEN


def mail_runs(letters: Sequence[StoredLetter]) -> list[list[object]]:
    """Return letters as items of a ``mail``."""
    runs: list[list[object]] = []
    for run in runs_of_one_origin(letters):
        (sender, stream, at, seal), first, _, _ = run[0]
        texts = [letter[2] for letter in run]
        runs.append([sender, stream, first, at, parts_of(texts) if seal else texts,
                     [letter[1] for letter in run if letter[3]], *seal])
    return runs


def mail_sizes(letters: Sequence[StoredLetter]) -> list[int]:
    """Return the most bytes that each letter takes in a ``mail``, if the first one has those of a whole run more.

    0: it goes with the letter before it, whose bundle it is in.
    """
    sizes: list[int] = []
    for run in runs_of_one_origin(letters):
        start, (sender, _, _, seal) = len(sizes), run[0][0]
        if seal:
            for bundle, _, length in parts_of([letter[2] for letter in run]):
                continued = sum([letter[3] for letter in run[len(sizes) - start:][:length]])
                sizes += [PART_SIZE + len(bundle) + NUMBER_SIZE * continued, *[0] * (length - 1)]
            sizes[start] += SEAL_RUN
        else:
            sizes += [STRING_HEADER + (NUMBER_SIZE if more else 0) + (
                len(text) if text.isascii() else len(text.encode())) for _, _, text, more in run]
        sizes[start] += len(sender.encode()) + MAIL_RUN
    return sizes


def runs_of_one_origin(letters: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the letters in groups that have one origin, their first element, and consecutive numbers."""
    starts: list[int] = []
    origin, number = None, 0
    for index, letter in enumerate(letters):
        if (letter[0] is not origin and letter[0] != origin) or letter[1] != number:
            starts.append(index)
            origin, number = letter[0], letter[1]
        number += 1
    if len(starts) == 1:
        yield letters
    else:
        for start, end in zip(starts, [*starts[1:], len(letters)]):
            yield letters[start:end]


Seal = tuple[bytes, ...]    # of letters: the key of their sender and the envelope; (): they are not sealed


def _pieces_of_row(texts: Any, seal: Sequence[Any]) -> Any:
    """Return the texts of a column; raise ValueError or TypeError if they are damaged."""
    import json
    if seal:
        parts = msgpack.unpackb(texts)
        if not (KEY(seal[0]) and ENVELOPE(seal[1]) and valid_parts(parts)):
            raise ValueError("the bundles are damaged, or nobody can open them")
        return texts_of_parts(parts)
    pieces = json.loads(texts)
    if not pieces or set(map(type, pieces)) != {str}:
        raise ValueError("the texts are damaged")
    encoded = pieces if "".join(pieces).isascii() else map(str.encode, pieces)
    if max(map(len, encoded)) > MAX_PIECE:
        raise ValueError("a piece is too long")
    return pieces


class Parcel(NamedTuple):
    """Consecutive numbers of one stream, from ``n`` on, as they are kept: one row of a store.

    ``times``: when each was sent, 0.0 for sealed ones. ``more``: the numbers whose text the next one continues.
    """

    n: int
    texts: Sequence[Text]
    times: Sequence[float]
    more: Collection[int]
    seal: Seal = ()

    def part(self, start: int, end: int) -> Parcel:
        """Return the numbers at the positions [start, end) alone."""
        return Parcel(self.n + start, self.texts[start:end], self.times[start:end],
                      [number for number in self.more if self.n + start <= number < self.n + end], self.seal)

    def fitting(self, messages: int, size: int) -> int:
        """Return how many of the numbers fit where there is room for so many messages and bytes; no text is cut."""
        if len(self.texts) <= messages and len(self.texts) * MAX_DATAGRAM <= size:
            return len(self.texts)
        fitting = 0
        for index, taken in enumerate(self._sizes()):
            size -= taken
            if messages <= 0 or size < 0:
                break
            if self.n + index not in self.more:
                messages -= 1
                fitting = index + 1
        return fitting

    def _parts(self) -> list[list[Any]]:
        """Return the sealed texts as parts of bundles."""
        return parts_of(self.texts)     # type: ignore[arg-type]

    def _sizes(self) -> list[int]:
        """Return how many bytes each text takes; those of a bundle count for the first text that is in it."""
        if not self.seal:
            return [len(text.encode()) for text in self.texts]      # type: ignore[union-attr]
        return [size for bundle, _, length in self._parts() for size in (len(bundle), *repeat(0, length - 1))]

    @property
    def messages(self) -> int:
        """How many texts end in it."""
        return len(self.texts) - len(self.more)

    @property
    def size(self) -> int:
        """How many bytes the texts have."""
        if self.seal:
            return sum([len(bundle) for bundle, _, _ in self._parts()])
        joined = "".join(self.texts)    # type: ignore[arg-type]
        return len(joined) if joined.isascii() else len(joined.encode())

    def row(self, recipient: int, seq: int, sender: str, stream: int) -> tuple[Any, ...]:
        """Return the parcel as a row of the store. One time stands for all numbers that were sent at the same time."""
        import json     # here: only a server has parcels, and the start of a client is measured
        times = self.times[:1] if self.times.count(self.times[0]) == len(self.times) else self.times
        texts: str | bytes
        if self.seal:
            parts = self._parts()
            texts, size = _pack(parts), sum([len(bundle) for bundle, _, _ in parts])
        else:
            texts, size = json.dumps(self.texts, ensure_ascii=False), self.size
        return (recipient, seq, len(self.texts), sender, stream, self.n, texts, json.dumps(times),
                json.dumps(sorted(self.more)) if self.more else "", self.messages, size, *(self.seal or (None, None)))

    @classmethod
    def of_row(cls, numbers: int, n: int, texts: Any, times: str, more: str, key: Any, envelope: Any) -> Parcel:
        """Return the parcel of these columns of a row; raise ValueError or TypeError if they are damaged."""
        import json
        seal = () if key is None and envelope is None else (key, envelope)
        pieces = _pieces_of_row(texts, seal)
        sent, continued = json.loads(times), json.loads(more) if more else ()
        if type(n) is not int or n <= 0 or len(pieces) != numbers:
            raise ValueError("the numbers are damaged")
        if len(sent) not in (1, numbers) or set(map(type, sent)) != {float}:
            raise ValueError("the times are damaged")
        if continued and not set(continued) <= set(range(n, n + numbers)):
            raise ValueError("nobody knows which texts go together")
        return cls(n, pieces, sent if len(sent) == numbers else sent * numbers, continued, seal)
