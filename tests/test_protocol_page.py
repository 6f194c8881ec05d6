"""The page that describes the wire, docs/protocol.md, against the code: its tables, its bounds, its examples.

What is read of the page is marked there, with comments that GitHub does not show:

- ``<!-- The test reads this table: NAME`` stands before each table that is compared, ``<!-- end -->`` behind it. The
  first columns are read, the last one is for people.
- A block ``hex TAG`` is a datagram. The block ``map`` behind it shows the maps in it, as JSON with h'...' for bytes.

If a constant is renamed or moved in the code, change its name in ``OBEYED`` or ``CHOSEN`` below.
"""
from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from protocol import MAX_DATAGRAM, PROOF_BYTES, REG_SIZE, SCHEMA, SESSION_SIZE, Decoder, Map, contents_of, encode

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")

Check = Callable[[Any], bool]
CHECKS: dict[tuple[str, str], Check] = {}       # (tag, field) -> what the code says of a value
PRESENCE: dict[tuple[str, str], str] = {}
for _tag, (_required, _optional, _) in SCHEMA.items():
    for _fields, _presence in ((_required, "required"), (_optional, "optional")):
        for _name, _check in _fields:
            CHECKS[_tag, _name] = _check
            PRESENCE[_tag, _name] = _presence


# --- what the page says ---------------------------------------------------------------------------------------

def table(columns: str) -> list[list[str]]:
    """Return the rows of the table that is marked with ``columns``, without its header and without backticks."""
    marked = PAGE.split(f"<!-- The test reads this table: {columns}")
    assert len(marked) == 2, f"{len(marked) - 1} tables are marked with {columns!r}"
    lines = marked[1].split("-->", 1)[1].split("<!-- end -->")[0].strip().split("\n")
    assert all(line.startswith("|") and line.endswith("|") for line in lines), "nothing but a table"
    return [[cell.strip().replace("`", "") for cell in line[1:-1].split("|")] for line in lines[2:]]


def number(text: str) -> float:
    """Return a number that the page writes as 1200, 0.5 or 2^63-1."""
    power = re.fullmatch(r"(\d+)\^(\d+)-1", text)
    if power is not None:
        base, exponent = int(power[1]), int(power[2])
        return int(base ** exponent) - 1
    return float(text) if "." in text else int(text)


class Example(NamedTuple):
    """A datagram of the page, and the maps that it is said to hold."""

    tag: str
    datagram: bytes
    maps: list[Map]


def parsed(text: str) -> list[Map]:
    """Return the maps of a block ``map``."""
    text = re.sub(r"h'([0-9a-f\s]*)'", lambda match: json.dumps({"hex": "".join(match[1].split())}), text)
    decoder = json.JSONDecoder(object_hook=lambda found: bytes.fromhex(found["hex"]) if "hex" in found else found)
    maps = []
    while text:
        found, end = decoder.raw_decode(text)
        assert set(found) == {"tag", "info"}
        maps.append((found["tag"], found["info"]))
        text = text[end:].lstrip()
    return maps


def examples() -> list[Example]:
    """Return the examples of the page, in their order."""
    found = re.findall(r"^```hex (\w+)\n(.*?)^```\n+```map\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == len(re.findall("^```(?:hex|map)", PAGE, re.MULTILINE)) / 2, "every hex has its map"
    return [Example(tag, bytes.fromhex(data), parsed(maps)) for tag, data, maps in found]


FIELDS = table("tag, field, type, presence")
TYPES = {name: (kind, low, high) for name, kind, low, high, *_ in table("type, kind, low, high")}
ARRAYS = {name: [tuple(element.split(": ")) for element in elements.split(", ")]
          for name, elements, *_ in table("type, elements")}
CONDITIONS = [(tag, condition) for tag, condition in table("tag, condition")]
EXAMPLES = examples()


# --- tags and fields ------------------------------------------------------------------------------------------

def test_the_page_knows_every_tag_and_no_other() -> None:
    assert sorted(row[0] for row in table("tag.")) == sorted(SCHEMA)


def test_the_page_knows_every_field_and_whether_it_is_required() -> None:
    said = {(tag, field): presence for tag, field, _, presence, _ in FIELDS}
    assert len(said) == len(FIELDS), "no field stands there twice"
    assert said == PRESENCE


# --- types and bounds -----------------------------------------------------------------------------------------

SAMPLES: dict[str, Any] = {     # a valid value of each type that has no bounds
    "bool": True, "float": 1795333447.25, "host": "192.0.2.1", "state": "online", "range": [3, 4],
    "entry": ["bob", "192.0.2.20", 40002, "online"], "address": ["192.0.2.20", 40002], "keyed": [0, bytes(32), True],
    "run": ["bob", 7, 1, 1795333447.25, ["hello"], [1]], "spell": [1795333447.25, 1],
    "contents": [["hello"], [[1795333447.25, 1]], [1]]}
WRONG: dict[str, list[Any]] = {     # msgpack type -> values that are invalid wherever another type belongs
    "int": [1, 2 ** 62], "float": [1.5], "bool": [True, False], "str": ["bob"], "bin": [b"bob", bytes(16)],
    "nil": [None], "list": [[], [1], ["bob"]], "map": [{}]}
KIND_OF = {"bool": "bool", "float": "float", "range": "list", "entry": "list", "address": "list", "keyed": "list",
           "run": "list", "spell": "list", "contents": "list"}
FORMS = {"host": "fe80::1%"}    # how a string must begin
BOUND_TO_OTHERS = {("range", "first"), ("range", "last"), ("run", "n"), ("run", "more"),
                   ("contents", "texts"), ("contents", "at")}    # not only by their types
FEW = 3     # elements of a list, where any number will do


def kind_of(type_: str) -> str:
    """Return the msgpack type of a type of the page."""
    kind = TYPES[type_][0] if type_ in TYPES else KIND_OF[type_]
    return "str" if kind == "utf8" else kind.split(" ")[0]


def of_size(type_: str, size: int) -> Any:
    """Return a value of a type: the integer ``size``, or a value of that length."""
    kind = TYPES[type_][0]
    if kind == "int":
        return size
    if kind == "bin":
        return bytes(size)
    if kind in ("str", "utf8"):
        return FORMS.get(type_, "").ljust(size, "n")
    return [sample(kind[len("list of "):]) for _ in range(size)]


def sample(type_: str) -> Any:
    """Return some valid value of a type."""
    if type_ in SAMPLES:
        return SAMPLES[type_]
    kind, low, high = TYPES[type_]
    return of_size(type_, FEW if kind.startswith("list") else int(number(high)))


def wrong(type_: str) -> list[Any]:
    """Return values of every other msgpack type."""
    return [value for kind, values in WRONG.items() if kind != kind_of(type_) for value in values]


def bounds(type_: str) -> tuple[list[Any], list[Any]]:
    """Return values of a type that are just valid, and values that just are not, as the page has it."""
    good, bad = [sample(type_)], wrong(type_)
    if type_ in ARRAYS:
        for position, (name, element) in enumerate(ARRAYS[type_]):
            valid, invalid = bounds(element)
            if (type_, name) not in BOUND_TO_OTHERS:
                good += [changed(SAMPLES[type_], position, value) for value in valid]
            bad += [changed(SAMPLES[type_], position, value) for value in invalid]
        bad += [SAMPLES[type_][:-1], SAMPLES[type_] + [1]]
    kind, low, high = TYPES.get(type_, (type_, "", ""))
    if low:
        good.append(of_size(type_, int(number(low))))
        if number(low) > 0 or kind == "int":
            bad.append(of_size(type_, int(number(low)) - 1))
    if high:
        good.append(of_size(type_, int(number(high))))
        bad.append(of_size(type_, int(number(high)) + 1))
    if kind.startswith("list of "):
        element = kind[len("list of "):]
        good += [[value] for value in bounds(element)[0]]
        bad += [[sample(element), value] for value in bounds(element)[1]]
    more_good, more_bad = SPECIAL.get(type_, ([], []))
    return good + more_good, bad + more_bad


def changed(array: list[Any], position: int, value: Any) -> list[Any]:
    """Return the same array with one element replaced."""
    return array[:position] + [value] + array[position + 1:]


SPECIAL: dict[str, tuple[list[Any], list[Any]]] = {     # what the column "rule" says
    "nick": (["Ünal", "x_.-9", "日" * 32, "𐐀" * 24, "ǅ", "ʰ", "ا", "٣"],
             ["𐐀" * 25, "a b", "a!", "a\n", "u\u0308nal", "\u0301", "Ⅷ", "½", "²"]),
    "host": (["0.0.0.0", "255.255.255.255", "::", "2001:db8::30", "2001:db8::30%eth0"],
             ["01.2.3.4", "1.2.3", "1.2.3.256", "localhost", "[::1]", "fe80::1%\n", ""]),
    "state": (["online", "offline", "gone"], ["", "Online", "away"]),
    "text": (["", "é" * 384, "日" * 256], ["é" * 385, "日" * 256 + "x"]),
    "public key": ([b""], [b"k", bytes(31)]),
    "float": ([0.0, -1.5, float("inf")], []),
    "range": ([[4, 4]], [[4, 3], [0, 1]]),
    "runs": ([[["bob", 7, 1, 0.0, ["x"] * 512, []]] * 2], [[["bob", 7, 1, 0.0, ["x"] * 513, []]] * 2]),
}


def test_every_type_is_described_and_used() -> None:
    used = {row[2] for row in FIELDS}
    used |= {element for elements in ARRAYS.values() for _, element in elements}
    used |= {kind[len("list of "):] for kind, _, _ in TYPES.values() if kind.startswith("list of ")}
    assert used | {"contents"} == set(TYPES) | set(ARRAYS) | {"float", "bool"}


def test_what_is_sealed_in_a_bundle_is_what_the_page_says() -> None:
    good, bad = bounds("contents")
    for value in good:
        assert contents_of(msgpack.packb(value), len(value[0])) == value, f"valid on the page: {value!r:.80}"
    for value in bad:
        assert contents_of(msgpack.packb(value), 1) is None, f"invalid on the page: {value!r:.80}"


@pytest.mark.parametrize(("tag", "field", "type_"), [row[:3] for row in FIELDS], ids=lambda part: part)
def test_the_bounds_of_a_field_are_those_that_the_page_says(tag: str, field: str, type_: str) -> None:
    check = CHECKS[tag, field]
    good, bad = bounds(type_)
    for value in good:
        assert check(value), f"valid on the page: {value!r:.80}"
    for value in bad:
        assert not check(value), f"invalid on the page: {value!r:.80}"


# --- what fields must be to each other ------------------------------------------------------------------------

MOST = 2 ** 63 - 1
CHAT: dict[str, Any] = {"from": "alice", "to": "bob", "stream": 7, "n": 5, "base": 5, "text": ["a", "b"]}
SAVE: dict[str, Any] = {"session": bytes(16), "to": "bob", "stream": 7, "n": 5, "base": 5, "text": ["a", "b"],
                        "at": [1.5, 1.5], "relay": False}
SEALED = {**SAVE, "text": b"\2\0" + bytes(18), "at": [], "envelope": bytes(48), "key": bytes(8)}
MAIL: dict[str, Any] = {"to": "bob", "stream": 7, "n": 5, "base": 5, "items": []}
ACK: dict[str, Any] = {"stream": 7, "next": 1, "have": [], "room": 0}


def run(first: int, texts: int, *more: int) -> list[Any]:
    """Return a run of a ``mail``."""
    return ["alice", 9, first, 1.5, ["x"] * texts, list(more)]


# (tag, condition) -> maps that just fulfil it, and maps that just do not
CASES: dict[tuple[str, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    ("table", "0 <= since <= version"): (
        [{"version": 3, "set": [], "since": 3}, {"version": 3, "set": [], "since": 0}, {"version": 1, "set": []}],
        [{"version": 3, "set": [], "since": 4}, {"version": 0, "set": []}]),
    ("chat", "base <= n"): ([CHAT, {**CHAT, "base": 1}], [{**CHAT, "base": 6}]),
    ("chat", "n <= 2^63-1 - count"): ([{**CHAT, "n": MOST - 2}], [{**CHAT, "n": MOST - 1}]),
    ("chat", "n <= each of more < n + count"): (
        [{**CHAT, "more": [5, 6]}, {**CHAT, "more": []}], [{**CHAT, "more": [4]}, {**CHAT, "more": [5, 7]}]),
    ("save", "base <= n"): ([SAVE, {**SAVE, "base": 1}], [{**SAVE, "base": 6}]),
    ("save", "n <= 2^63-1 - count"): ([{**SAVE, "n": MOST - 2}], [{**SAVE, "n": MOST - 1}]),
    ("save", "n <= each of more < n + count"): (
        [{**SAVE, "more": [5, 6]}, {**SAVE, "more": []}], [{**SAVE, "more": [4]}, {**SAVE, "more": [5, 7]}]),
    ("save", "length of at = length of text, without envelope"): (
        [SAVE], [{**SAVE, "at": [1.5]}, {**SAVE, "at": [1.5] * 3}, {**SAVE, "at": []}]),
    ("save", "with envelope, and only then: key, a bundle, no at"): (
        [SEALED, {**SEALED, "text": b"\0\4" + bytes(1198)}],
        [{**SEALED, "at": [1.5, 1.5]}, {**SEALED, "text": ["a", "b"]}, {**SAVE, "key": bytes(8)},
         {**SAVE, "text": SEALED["text"]}, {**SAVE, "envelope": bytes(48)}, {**SEALED, "text": b"\2\0" + bytes(17)},
         {**SEALED, "text": b"\0\4" + bytes(1199)}, {**SEALED, "text": bytes(20)},
         {**SEALED, "text": b"\1\4" + bytes(1100)}, {**SEALED, "n": MOST - 1}, {**SEALED, "more": [7]}]),
    ("mail", "base <= n"): (
        [{**MAIL, "items": [run(1, 1)]}], [{**MAIL, "items": [run(1, 1)], "base": 6}]),
    ("mail", "n <= 2^63-1 - count"): (
        [{**MAIL, "items": [run(1, 2), run(8, 1)], "n": MOST - 3}],
        [{**MAIL, "items": [run(1, 2), run(8, 1)], "n": MOST - 2}]),
    ("mail", "in each run: n <= 2^63-1 - its texts"): (
        [{**MAIL, "items": [run(1, 1), run(MOST - 2, 2)]}], [{**MAIL, "items": [run(1, 1), run(MOST - 1, 2)]}]),
    ("mail", "in each run: n <= each of more < n + its texts"): (
        [{**MAIL, "items": [run(1, 1), run(3, 2, 3, 4)]}],
        [{**MAIL, "items": [run(1, 1), run(3, 2, 2)]}, {**MAIL, "items": [run(1, 1), run(3, 2, 5)]}]),
    ("mail", "count <= 1024"): (
        [{**MAIL, "items": [run(1, 1000), run(1, 24)]}], [{**MAIL, "items": [run(1, 1000), run(1, 25)]}]),
    ("nack", "first <= last"): (
        [{"stream": 7, "first": 2, "last": 2, "reason": ""}], [{"stream": 7, "first": 3, "last": 2, "reason": ""}]),
    ("ack", "in each range: first <= last"): (
        [{**ACK, "have": [[2, 3], [5, 5]]}], [{**ACK, "have": [[2, 3], [5, 4]]}]),
}


def test_the_conditions_of_the_page_are_all_tried() -> None:
    assert CONDITIONS == list(CASES)
    assert {tag for tag, (*_, together) in SCHEMA.items() if together is not None} <= {tag for tag, _ in CONDITIONS}


@pytest.mark.parametrize(("tag", "condition"), CASES)
def test_what_fields_must_be_to_each_other_is_what_the_page_says(tag: str, condition: str) -> None:
    good, bad = CASES[tag, condition]
    for info in good:
        assert Decoder().decode(encode(tag, info)) == [(tag, info)]
    for info in bad:
        assert Decoder().decode(encode(tag, info)) == []


# --- examples -------------------------------------------------------------------------------------------------

def test_what_is_compressed_in_the_example_is_what_the_page_says() -> None:
    example, = [example for example in EXAMPLES if example.tag == "packed"]
    said = re.search(r"The same as `(\{.*?\})`:", PAGE, re.DOTALL)
    assert said is not None
    assert Decoder().unpacked(example.maps[-1][1]["data"]) == parsed(said[1])


def test_every_tag_has_an_example() -> None:
    assert {example.tag for example in EXAMPLES} == set(SCHEMA)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.tag)
def test_an_example_is_the_datagram_of_its_maps(example: Example) -> None:
    decoder = Decoder()
    assert decoder.decode(example.datagram) == example.maps and not decoder.dropped
    assert len(example.datagram) <= MAX_DATAGRAM
    assert example.maps[-1][0] == example.tag


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.tag)
def test_an_example_obeys_the_rules_of_the_page(example: Example) -> None:
    """Sizes of requests, the ``for`` in front, no field that the page does not know, but for the pad."""
    sizes = {"reg": REG_SIZE, "ping": SESSION_SIZE, "sync": SESSION_SIZE, "want": SESSION_SIZE, "dereg": SESSION_SIZE}
    assert len(example.datagram) == sizes.get(example.tag, len(example.datagram))
    tags = [tag for tag, _ in example.maps]
    assert tags.count("for") == (tags[0] == "for")
    behind_for = {row[0] for row in table("tag.") if row[2] == "yes"} - {"ack", "nack"}     # peers send those, too
    assert not behind_for & set(tags) or tags[0] == "for"
    for tag, info in example.maps:
        assert set(info) - {"pad"} <= {field for named, field in CHECKS if named == tag}
        if tag == "for":
            assert len(info["session"]) == PROOF_BYTES


# --- constants ------------------------------------------------------------------------------------------------

OBEYED = {      # a constant of the page -> its name in the code
    "largest datagram sent": "protocol.MAX_DATAGRAM",
    "largest datagram received": "protocol.MAX_RECEIVED",
    "largest integer": "protocol.MAX_NUMBER",
    "elements of an array": "protocol.MAX_ITEMS",
    "keys of a map": "protocol.MAX_FIELDS",
    "text of one number": "protocol.MAX_PIECE",
    "longest text": "protocol.MAX_TEXT",
    "pieces of one text": "protocol.MAX_TEXT_PIECES",
    "nick": "protocol.MAX_NICK",
    "nick in UTF-8": "protocol.MAX_NICK_BYTES",
    "host": "protocol.MAX_HOST",
    "ranges in an ack": "protocol.MAX_RANGES",
    "session": "protocol.SESSION_BYTES",
    "proof in for": "protocol.PROOF_BYTES",
    "token": "protocol.TOKEN_BYTES",
    "secret": "home.SECRET_BYTES",
    "reg without cookie": "protocol.REG_SIZE",
    "join": "protocol.JOIN_SIZE",
    "greet": "protocol.GREET_SIZE",
    "ping, sync, want, dereg": "protocol.SESSION_SIZE",
    "pages for one sync": "protocol.SYNC_PAGES",
    "life of a cookie": "registry.COOKIE_TIME",
    "answer to a probe": "server.PROBE_TIMEOUT",
    "calls to one client": "server.CALLS_PER_SECOND",
    "silence": "registry.SILENCE",
    "least time between two sync": "registry.SYNC_INTERVAL",
    "first window": "protocol.INITIAL_ROOM",
    "largest room": "protocol.MAX_EARLY",
    "at in the future": "registry.DAY",
    "unused handshake": "registry.HELLO_TIME",
    "replay window": "protocol.REPLAY_WINDOW",
    "jitter of repeated requests": "loop.JITTER",
}
CHOSEN = {
    "ack timeout": "conversation.ACK_TIMEOUT",
    "attempts of a request": "protocol.SERVER_ATTEMPTS",
    "interval between them": "protocol.SERVER_INTERVAL",
    "keepalive": "client.PING_INTERVAL",
    "ping of a silent server": "client.OUTAGE_PING_INTERVAL",
    "progress on one route": "conversation.STALL_TIMEOUT",
    "progress on all routes together": "conversation.STUCK_TIMEOUT",
    "relay": "stream.RELAY_TIME",
    "longest relay": "stream.MAX_RELAY_TIME",
    "patience with a knock": "stream.KNOCK_TIMEOUT",
    "hold": "conversation.HOLD_TIME",
    "longest time between two sync": "registry.MAX_SYNC_INTERVAL",
    "old table": "registry.OLD_TABLE_TIME",
    "first retransmission timeout": "stream.INITIAL_TIMEOUT",
    "least retransmission timeout": "stream.MIN_TIMEOUT",
    "largest retransmission timeout": "stream.MAX_TIMEOUT",
    "first congestion window": "stream.INITIAL_CONGESTION_WINDOW",
    "largest congestion window": "stream.MAX_CONGESTION_WINDOW",
    "reordering": "stream.PACKET_THRESHOLD",
    "streams of one sender": "conversation.STREAMS_PER_SENDER",
    "repeated offer": "secure.OFFER_INTERVAL",
    "life of an offer": "secure.OFFER_TIME",
    "offers of one address": "secure.OFFERS_READ",
    "cookies for one attempt": "secure.COOKIES_PER_ATTEMPT",
    "signs that a server is busy": "secure.BUSY_SIGNS",
    "repeated want": "registry.KEY_INTERVAL",
    "shortest probe interval": "server.PROBE_INTERVAL",
    "broadcast gap": "server.BROADCAST_GAP",
}


@pytest.mark.parametrize(("columns", "names"), [("must: constant, value", OBEYED), ("may: constant, value", CHOSEN)])
def test_every_constant_of_the_page_is_compared(columns: str, names: dict[str, str]) -> None:
    assert [row[0] for row in table(columns)] == list(names)


CONSTANTS = [(row[0], row[1]) for row in table("must: constant, value") + table("may: constant, value")]


@pytest.mark.parametrize(("name", "value"), CONSTANTS, ids=lambda part: part)
def test_a_constant_has_the_value_that_the_page_says(name: str, value: str) -> None:
    module, attribute = {**OBEYED, **CHOSEN}[name].split(".")
    assert getattr(importlib.import_module(module), attribute) == number(value)
