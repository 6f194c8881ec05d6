"""The wire, on arguments alone: every field and its bounds, and hostile bytes."""
from __future__ import annotations

import ipaddress
import tracemalloc
import zlib
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given, strategies as st

import protocol
from protocol import PROOF_BYTES, Decoder, Info, Map, encode, is_host, is_valid, join_pieces, padded, split_text

LETTERS = ["x", "é", "日", "𝒜"]        # characters of one to four bytes
ID, STREAM = 7, 2 ** 62 + 1
SESSION, TOKEN = b"s" * 16, b"t" * 32
ENTRY = ["bob", "192.0.2.1", 5000, "online"]
EXAMPLES: dict[str, Info] = {   # one of each tag, with every optional field
    "reg": {"id": ID, "nick": "bob", "token": TOKEN, "cookie": SESSION, "knocks": True,
            "own": ["10.0.0.5", 40001], "secure": True, "packed": True, "visit": True},
    "cookie": {"id": ID, "server": SESSION, "cookie": SESSION, "key": TOKEN},
    "hello": {"id": ID, "cookie": SESSION, "message": SESSION},
    "offer": {"id": ID, "message": SESSION},
    "accept": {"id": ID, "message": SESSION},
    "greet": {"from": "alice", "index": SESSION[:4]},
    "join": {"nick": "bob", "index": SESSION[:4], "proof": TOKEN, "knocks": True, "own": ["10.0.0.5", 40001],
             "packed": True, "visit": True},
    "welcome": {"id": ID, "nick": "bob", "boot": 3, "session": SESSION, "version": 9, "index": SESSION[:4],
                "lasting": False},
    "refused": {"nick": "Bob", "reason": "owned", "id": ID, "session": SESSION, "spelling": "bob",
                "lasting": False},
    "for": {"session": SESSION[:PROOF_BYTES]},
    "table": {"since": 3, "version": 9, "set": [ENTRY, ["eve", "2001:db8::1", 0, "gone"]], "keys": [[0, TOKEN, True]],
              "untold": False, "at": [0, 1790000000]},
    "packed": {"data": zlib.compress(b"")},
    "sync": {"session": SESSION, "version": 9, "early": True},
    "want": {"session": SESSION, "nick": "bob"},
    "key": {"nick": "bob", "key": TOKEN, "bound": True, "version": 9},
    "chat": {"from": "alice", "to": "bob", "stream": STREAM, "n": 5, "base": 4, "text": ["hi", ""], "more": [6]},
    "ack": {"stream": STREAM, "next": 5, "have": [[6, 6], [8, 9]], "room": 90},
    "nack": {"stream": STREAM, "first": 5, "last": 6, "reason": "full"},
    "save": {"session": SESSION, "to": "bob", "stream": STREAM, "n": 5, "base": 4, "text": ["hi", ""],
             "at": [1.5, 2.5], "relay": False, "more": [5]},
    "exists": {"stream": STREAM, "n": 5, "version": 9, "entry": ENTRY, "knocks": True},
    "mail": {"to": "bob", "stream": STREAM, "n": 5, "base": 5, "items": [["alice", STREAM, 1, 1.5, ["hi"], []]]},
    "meet": {"session": SESSION, "to": "bob", "stream": STREAM},
    "call": {"from": "alice", "stream": STREAM, "host": "192.0.2.1", "port": 40001, "own": ["10.0.0.5", 40001]},
    "knock": {"stream": STREAM},
    "probe": {"id": ID, "to": "bob"},
    "alive": {"id": ID, "nick": "bob", "session": SESSION},
    "ping": {"id": ID, "session": SESSION, "version": 9},
    "pong": {"id": ID, "boot": 3, "version": 9, "mail": 0},
    "dereg": {"session": SESSION},
    "bye": {"session": SESSION},
}
BUNDLE, ENVELOPE = b"\2\0" + b"x" * 26, b"e" * 48       # of two texts
PART = [BUNDLE, 0, 2]
SEALED_SAVE = {**EXAMPLES["save"], "text": BUNDLE, "at": [], "envelope": ENVELOPE, "key": b"k" * 8}
FIELDS = [(tag, field) for tag, info in EXAMPLES.items() for field in info]
REQUIRED_FIELDS = [(tag, field) for tag, fields in protocol.REQUIRED.items() for field in fields]
OF_EVERY_TYPE: list[Any] = [None, True, 7, 1.5, "bob", SESSION, [], {}]
GOOD = encode("probe", {"id": ID, "to": "bob"})
GOOD_MESSAGES: list[Map] = [("probe", {"id": ID, "to": "bob"})]
WHOLE = [encode(tag, info) for tag, info in EXAMPLES.items()]


def decode(datagram: bytes) -> list[Map]:
    return Decoder().decode(datagram)


def accepts(tag: str, info: Info) -> bool:
    return decode(encode(tag, info)) == [(tag, info)]


def swallow(datagram: bytes) -> list[Map]:
    """Decode hostile bytes. Check that the maps are valid, and that the decoder works as before."""
    decoder = Decoder()
    messages = decoder.decode(datagram)
    assert all(is_valid(tag, info) for tag, info in messages)
    assert messages or decoder.dropped or not datagram
    dropped = decoder.dropped
    assert decoder.decode(GOOD) == GOOD_MESSAGES
    assert decoder.dropped == dropped
    return messages


def test_behind_so_many_maps_a_datagram_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    for value in (GOOD, b"\0"):
        assert len(decoder.decode(value * protocol.MAX_MAPS)) == (protocol.MAX_MAPS if value == GOOD else 0)
        before = decoder.dropped
        assert len(decoder.decode(value * 60_000 if value != GOOD else GOOD * 1000)) == len(
            decoder.decode(value * (protocol.MAX_MAPS + 1)))
        assert decoder.dropped <= before + 2 * (protocol.MAX_MAPS + 1)
        assert decoder.decode(GOOD) == GOOD_MESSAGES


def test_of_the_packed_maps_in_one_datagram_the_first_alone_counts() -> None:
    decoder, bomb = Decoder(), protocol.packed(GOOD)
    for _ in range(2):
        (first, second) = decoder.decode(bomb * 2)
        assert decoder.unpacked(first[1]["data"]) == GOOD_MESSAGES
        assert decoder.unpacked(second[1]["data"]) == []


def without(info: Info, field: str) -> Info:
    return {name: value for name, value in info.items() if name != field}


def test_the_examples_name_every_tag_and_field() -> None:
    known = {(tag, name) for table in (protocol.REQUIRED, protocol.OPTIONAL)
             for tag, fields in table.items() for name in fields}
    assert {*FIELDS, *(("save", name) for name in SEALED_SAVE)} == known


@pytest.mark.parametrize("tag", EXAMPLES)
def test_a_map_comes_back_as_it_was_sent(tag: str) -> None:
    assert accepts(tag, EXAMPLES[tag])


def test_the_maps_of_one_datagram_come_back_in_order() -> None:
    assert decode(b"".join(WHOLE)) == list(EXAMPLES.items())


@pytest.mark.parametrize("tag, field", REQUIRED_FIELDS)
def test_a_map_without_a_required_field_is_dropped(tag: str, field: str) -> None:
    assert not accepts(tag, without(EXAMPLES[tag], field))


@pytest.mark.parametrize("tag, field", sorted(set(FIELDS) - set(REQUIRED_FIELDS)))
def test_an_optional_field_can_be_left_out(tag: str, field: str) -> None:
    assert accepts(tag, without(EXAMPLES[tag], field))


@pytest.mark.parametrize("tag, field", FIELDS)
def test_a_field_of_another_type_is_dropped(tag: str, field: str) -> None:
    right = type(EXAMPLES[tag][field])
    for value in OF_EVERY_TYPE:
        if type(value) is not right:
            assert not accepts(tag, {**EXAMPLES[tag], field: value}), value


NUMBERS = [(tag, field, low) for tag, field, low in (
    ("reg", "id", 0), ("welcome", "boot", 0), ("welcome", "version", 0), ("sync", "version", 0), ("chat", "stream", 0),
    ("ack", "next", 1), ("ack", "room", 0), ("exists", "n", 1), ("pong", "mail", 0), ("refused", "id", 0))]


@pytest.mark.parametrize("tag, field, low", NUMBERS)
def test_an_integer_ends_where_sqlite_ends(tag: str, field: str, low: int) -> None:
    for value in (low, 2 ** 63 - 1):
        assert accepts(tag, {**EXAMPLES[tag], field: value})
    for value in (low - 1, -2 ** 63, 2 ** 63, 2 ** 64 - 1):
        assert not accepts(tag, {**EXAMPLES[tag], field: value})


@pytest.mark.parametrize("tag, change, good", [
    ("cookie", {"cookie": b"c" * 15}, False),
    ("cookie", {"server": b"c" * 17}, False),
    ("reg", {"token": b"t" * 31}, False),
    ("refused", {"reason": "r" * 32}, True),
    ("refused", {"reason": "r" * 33}, False),
    ("table", {"since": 9}, True),
    ("table", {"since": 10}, False),
    ("table", {"since": None}, False),
    ("table", {"set": []}, True),
    ("table", {"set": [["bob", "192.0.2.1", 65535, "offline"]]}, True),
    ("table", {"set": [["bob", "192.0.2.1", 65536, "offline"]]}, False),
    ("table", {"set": [["bob", "192.0.2.1", -1, "offline"]]}, False),
    ("table", {"set": [["bob", "example.org", 1, "offline"]]}, False),
    ("table", {"set": [["bob", "fe80::1%\x1b[2J", 1, "offline"]]}, False),
    ("table", {"set": [["bob", "192.0.2.1", 1, "away"]]}, False),
    ("table", {"set": [["bob", "192.0.2.1", 1]]}, False),
    ("table", {"set": [["bob", "192.0.2.1", 1, "online", 0]]}, False),
    ("chat", {"text": [], "more": []}, False),
    ("chat", {"text": ["x" * 768], "more": []}, True),
    ("chat", {"text": ["x" * 769], "more": []}, False),
    ("chat", {"text": ["é" * 384], "more": []}, True),
    ("chat", {"text": ["é" * 385], "more": []}, False),
    ("chat", {"text": ["x"] * 1024, "more": []}, True),
    ("chat", {"text": ["x", 1], "more": []}, False),
    ("chat", {"more": [5, 6]}, True),
    ("chat", {"more": [4]}, False),
    ("chat", {"more": [7]}, False),
    ("chat", {"base": 5}, True),
    ("chat", {"base": 6}, False),
    ("chat", {"n": 2 ** 63 - 3, "more": []}, True),
    ("chat", {"n": 2 ** 63 - 2, "more": []}, False),
    ("save", {"at": [1.0]}, False),
    ("save", {"at": [1.0, 2]}, False),
    ("save", {"at": [1.0, float("inf")]}, True),
    ("save", SEALED_SAVE, True),
    ("save", {**SEALED_SAVE, "at": [1.0, 2.0]}, False),
    ("save", {**SEALED_SAVE, "text": ["hi", "ho"]}, False),
    ("save", {**SEALED_SAVE, "text": [BUNDLE]}, False),
    ("save", {**SEALED_SAVE, "text": BUNDLE[:19]}, False),
    ("save", {**SEALED_SAVE, "text": BUNDLE[:20]}, True),
    ("save", {**SEALED_SAVE, "text": BUNDLE.ljust(1200, b"x")}, True),
    ("save", {**SEALED_SAVE, "text": BUNDLE.ljust(1201, b"x")}, False),
    ("save", {**SEALED_SAVE, "text": b"\0\4" + bytes(1040)}, True),
    ("save", {**SEALED_SAVE, "text": b"\1\4" + bytes(1100)}, False),
    ("save", {**SEALED_SAVE, "text": b"\0\4" + bytes(1039)}, False),
    ("save", {**SEALED_SAVE, "text": b"\0\0" + BUNDLE}, False),
    ("save", {**SEALED_SAVE, "n": 2 ** 63 - 3, "more": []}, True),
    ("save", {**SEALED_SAVE, "n": 2 ** 63 - 2, "more": []}, False),
    ("save", {**SEALED_SAVE, "more": [7]}, False),
    ("save", {**SEALED_SAVE, "envelope": ENVELOPE[1:]}, False),
    ("save", {**SEALED_SAVE, "key": b"k" * 7}, False),
    ("save", {"key": b"k" * 8}, False),
    ("save", {"envelope": ENVELOPE}, False),
    ("save", {"text": BUNDLE}, False),
    ("save", {"envelope": ENVELOPE, "text": BUNDLE, "at": []}, False),
    ("chat", {"text": BUNDLE}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [PART], [], TOKEN, ENVELOPE]]}, True),
    ("mail", {"items": [["alice", STREAM, 4, 0.0, [PART], [5], TOKEN, ENVELOPE]]}, True),
    ("mail", {"items": [["alice", STREAM, 4, 0.0, [PART], [6], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, ["hi"], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [BUNDLE], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [PART], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [PART], [], TOKEN]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [PART], [], ENVELOPE, TOKEN]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [PART], [], TOKEN, ENVELOPE, 1]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[BUNDLE, 1, 1]], [], TOKEN, ENVELOPE]]}, True),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[BUNDLE, 1, 2]], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[BUNDLE, 0, 0]], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[BUNDLE, -1, 1]], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[BUNDLE, 0, 2, 0]], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 2 ** 63 - 2, 0.0, [PART], [], TOKEN, ENVELOPE]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[b"\0\4" + bytes(1040), 0, 1024]], [], TOKEN, ENVELOPE]]}, True),
    ("mail", {"items": [["alice", STREAM, 1, 0.0, [[b"\0\4" + bytes(1040), 0, 1024]], [], TOKEN, ENVELOPE],
                        ["alice", STREAM, 1, 0.0, [PART], [], TOKEN, ENVELOPE]]}, False),
    ("ack", {"have": [[1, 1]] * 32}, True),
    ("ack", {"have": [[1, 1]] * 33}, False),
    ("ack", {"have": [[2, 1]]}, False),
    ("ack", {"have": [[0, 1]]}, False),
    ("ack", {"have": [[1]]}, False),
    ("nack", {"last": 5}, True),
    ("nack", {"last": 4}, False),
    ("exists", {"entry": ENTRY[:3]}, False),
    ("mail", {"items": []}, False),
    ("mail", {"items": [["alice", STREAM, 0, 1.5, ["hi"], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 1.5, ["x" * 769], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 1.5, [], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 1, ["hi"], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 1.5, ["hi"], [False]]]}, False),
    ("mail", {"items": [["alice", STREAM, 4, 1.5, ["hi", "ho"], [5]]]}, True),
    ("mail", {"items": [["alice", STREAM, 4, 1.5, ["hi", "ho"], [6]]]}, False),
    ("mail", {"items": [["alice", STREAM, 4, 1.5, ["hi", "ho"], [3]]]}, False),
    ("mail", {"items": [["alice", STREAM, 2 ** 63 - 2, 1.5, ["hi"], []]]}, True),
    ("mail", {"items": [["alice", STREAM, 2 ** 63 - 2, 1.5, ["hi", "ho"], []]]}, False),
    ("mail", {"items": [["alice", STREAM, 1, 1.5, ["hi"], []]] * 1024}, True),
    ("mail", {"items": [["alice", STREAM, 1, 1.5, ["hi"] * 2, []]] * 513}, False),
    ("mail", {"n": 2 ** 63 - 2, "items": [["alice", STREAM, 1, 1.5, ["hi"] * 2, []]]}, False),
])
def test_a_map_is_taken_up_to_its_bounds_and_dropped_beyond(tag: str, change: Info, good: bool) -> None:
    assert accepts(tag, {**EXAMPLES[tag], **change}) == good


@pytest.mark.parametrize("most", ["array", "map"])
def test_an_array_or_map_beyond_its_limit_is_dropped(most: str) -> None:
    extra: Any = [0] * 1025 if most == "array" else {str(i): i for i in range(33)}
    assert swallow(encode("bye", {"session": SESSION, "extra": extra})) == []


@pytest.mark.parametrize("tag", EXAMPLES)
def test_an_extra_field_is_ignored(tag: str) -> None:
    datagram = msgpack.packb({"tag": tag, "info": {**EXAMPLES[tag], "future": [1, {"a": None}]}, "future": 1})
    (found, info), = decode(datagram)
    assert found == tag and without(info, "future") == EXAMPLES[tag]


@pytest.mark.parametrize("nick, good", [
    ("a", True), ("Zoë_9.x-y", True), ("日本語", True), ("x" * 32, True), ("日" * 32, True), ("٣", True),
    ("", False), ("x" * 33, False), ("𝒜" * 25, False), ("a b", False), ("a\n", False), ("a\x1b", False), ("a/b", False),
    ("e\u0301", False), ("½", False), ("\u202e", False), ("\ufeff", False), ("²", False), ("\u212b", False),
])
def test_a_nick_is_letters_digits_and_three_signs_in_one_normal_form(nick: str, good: bool) -> None:
    assert accepts("probe", {"id": ID, "to": nick}) == good


@given(st.text(max_size=3))
def test_a_nick_never_carries_what_a_terminal_or_a_path_would_obey(nick: str) -> None:
    if protocol.is_nick(nick):
        assert nick.isprintable() and len(nick.encode()) <= 96 and not set(nick) & set(" /\\'\"$`%@:;")


@given(st.sampled_from(["a", "é", "日"]), st.integers(1, 32), st.sampled_from([0, 2 ** 63 - 1]))
def test_a_padded_map_is_never_smaller_than_asked(letter: str, count: int, id_: int) -> None:
    info = {"id": id_, "nick": letter * count}
    datagram = padded("reg", info, protocol.REG_SIZE)
    assert protocol.REG_SIZE <= len(datagram) <= max(protocol.REG_SIZE + 8, len(encode("reg", info)))
    (_, found), = decode(datagram)
    assert without(found, "pad") == info


@pytest.mark.parametrize("size", [184, 255, 256, 300, 1200])
def test_padding_meets_larger_sizes_as_well(size: int) -> None:
    assert size <= len(padded("dereg", {"session": SESSION}, size)) <= size + 2


OCTETS = ["0", "1", "10", "127", "255", "256", "999", "1000", "00", "01", "-1", "+1", " 1", "1_0", "1/8", "", "a"]
OCTETS += ["\u0663", "\u00b2", "1" * 60]


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return len(host) <= 64 and host.isascii() and host.isprintable()


@given(st.lists(st.sampled_from(OCTETS), max_size=6).map(".".join) | st.text("0129.:af%/ \n", max_size=16)
       | st.ip_addresses().map(str))
def test_a_host_is_what_the_standard_library_takes_for_an_address(host: str) -> None:
    assert is_host(host) == is_address(host)


# hostile bytes

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 63, 2 ** 64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=40) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.sampled_from([float("nan"), 2 ** 64 - 1, -1, "bob", SESSION, ENTRY]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5) | st.integers() .filter(lambda i: abs(i) < 2 ** 63) | st.binary(max_size=3),
                      inner, max_size=4), max_leaves=8)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(datagram: bytes) -> None:
    swallow(datagram)


@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_datagram_with_wrong_bytes_never_raises(datagram: bytes, changes: list[tuple[int, int]]) -> None:
    spoiled = bytearray(datagram)
    for position, value in changes:
        spoiled[position % len(spoiled)] = value
    swallow(bytes(spoiled))


@given(st.sampled_from(FIELDS), ANYTHING)
def test_a_field_with_anything_in_it_never_raises(tag_and_field: tuple[str, str], value: Any) -> None:
    tag, field = tag_and_field
    swallow(msgpack.packb({"tag": tag, "info": {**EXAMPLES[tag], field: value}}))


@given(ANYTHING, ANYTHING)
def test_a_datagram_of_anything_is_dropped(tag: Any, info: Any) -> None:
    assert swallow(msgpack.packb(tag)) == []
    assert swallow(msgpack.packb({"tag": tag, "info": info})) == []


@pytest.mark.parametrize("tag", EXAMPLES)
def test_a_datagram_cut_short_anywhere_is_dropped_once_and_leaves_the_next_one_alone(tag: str) -> None:
    whole = encode(tag, EXAMPLES[tag])
    for cut in range(1, len(whole)):
        decoder = Decoder()
        assert decoder.decode(whole[:cut]) == []
        assert decoder.dropped == 1
        assert decoder.decode(GOOD) == GOOD_MESSAGES, cut
        assert decoder.dropped == 1


@pytest.mark.parametrize("garbage", [
    b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\x91" * 60000, b"\x81\xa1a" * 20000, b"\xdc\x04\x00" * 20000, b"\xa2\xff\xfe",
    b"\xa3\xed\xa0\x80", b"\x81\x01\x02", b"\x81\x90\x02", b"\x81\xc0\x02", b"\xc7\x00\xff", b"\xd7\xff" + b"\xff" * 8,
    b"\xc7\x0c\xff" + b"\xff" * 12, b"\x82\xa3tag",
], ids=lambda garbage: repr(garbage[:8]))
def test_broken_framing_costs_the_rest_of_its_datagram_and_one_count(garbage: bytes) -> None:
    decoder = Decoder()
    assert decoder.decode(GOOD + garbage) == GOOD_MESSAGES
    assert decoder.dropped == 1
    assert decoder.decode(GOOD) == GOOD_MESSAGES


@pytest.mark.parametrize("garbage", [
    b"\xc0", b"\xff", b"\x90", b"\x80", b"\xd6\xff\x00\x00\x00\x00", b"\xd4\x05\x00", encode("hack", {}),
    msgpack.packb({"tag": "bye"}), msgpack.packb({"tag": ["bye"], "info": {}}), msgpack.packb(2 ** 64 - 1),
    msgpack.packb({"tag": "bye", "info": [["session", SESSION]]}),
], ids=lambda garbage: repr(garbage[:8]))
def test_an_invalid_map_is_dropped_and_counted_and_its_neighbours_are_not(garbage: bytes) -> None:
    decoder = Decoder()
    assert decoder.decode(garbage + GOOD + garbage + GOOD) == GOOD_MESSAGES * 2
    assert decoder.dropped == 2


def test_of_a_key_that_comes_twice_only_one_value_is_believed_and_that_one_is_checked() -> None:
    twice = b"\x82\xa3tag\xa3bye\xa4info\x82\xa7session\xc4\x10" + SESSION + b"\xa7session\x01"
    assert swallow(twice) == []


def test_times_that_are_no_numbers_are_decoded_for_their_reader_to_judge() -> None:
    (_, info), = swallow(encode("save", {**EXAMPLES["save"], "at": [float("nan"), float("-inf")]}))
    assert info["at"][0] != info["at"][0] and info["at"][1] == float("-inf")


@pytest.mark.parametrize("header", [b"\xdd\x00\x00\x04\x00", b"\xdc\x04\x00", b"\xde\x00\x20", b"\xdd\x07\xff\xff\xff",
                                    b"\xdb\x7f\xff\xff\xff", b"\x91", b"\x81\xa0"], ids=repr)
def test_headers_that_promise_a_lot_take_little_memory(header: bytes) -> None:
    datagram = (header * protocol.MAX_RECEIVED)[:protocol.MAX_RECEIVED]
    decoder = Decoder()
    tracemalloc.start()
    try:
        for _ in range(3):
            decoder.decode(datagram)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2 ** 20 and kept < 2 ** 20


# what is compressed

def test_what_was_packed_comes_back() -> None:
    (_, info), = decode(protocol.packed(b"".join(WHOLE)))
    assert Decoder().unpacked(info["data"]) == list(EXAMPLES.items())


@pytest.mark.parametrize("data", [
    b"", b"x", zlib.compress(b""), zlib.compress(GOOD)[:-1], zlib.compress(GOOD)[:-4] + b"1234",
    zlib.compress(GOOD * 4000), zlib.compress(bytes(10_000_000), 9)[:1200], zlib.compress(b"\xc1")])
def test_what_is_compressed_and_broken_or_becomes_too_much_is_dropped(data: bytes) -> None:
    decoder = Decoder()
    assert decoder.unpacked(data) == [] and decoder.dropped == 1
    assert decoder.decode(GOOD) == GOOD_MESSAGES


@given(st.binary(max_size=1200))
def test_no_bytes_that_seem_to_be_compressed_raise_anything(data: bytes) -> None:
    Decoder().unpacked(data)
    Decoder().unpacked(zlib.compress(data))


def test_what_would_become_very_much_takes_little_memory() -> None:
    data = zlib.compress(bytes(1_000_000), 9)
    tracemalloc.start()
    try:
        Decoder().unpacked(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 ** 18


# texts and mail

@given(st.lists(st.tuples(st.sampled_from(LETTERS), st.integers(0, 800)), max_size=8))
def test_a_long_text_is_cut_between_characters_and_never_too_small(parts: list[tuple[str, int]]) -> None:
    text = "".join(letter * count for letter, count in parts)
    pieces = split_text(text)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= protocol.MAX_PIECE for piece in pieces)
    assert all(len(piece.encode()) >= protocol.MAX_PIECE - 3 for piece in pieces[:-1])
    assert join_pieces(5, pieces + ["next"], range(5, 4 + len(pieces))) == [text, "next"]


LETTERS_KEPT = st.lists(st.tuples(st.sampled_from(["bob", "a" * 32, "é" * 32]), st.sampled_from([1, 2 ** 62]),
                                  st.integers(1, 9), st.sampled_from([1.5, 2.5]),
                                  st.text(max_size=20).filter(lambda text: text.isprintable()), st.booleans()),
                        min_size=1, max_size=30)


@given(LETTERS_KEPT, st.integers(1, 30))
def test_letters_come_back_as_they_were_sent_and_take_no_more_bytes_than_was_counted(
        plain: list[tuple[str, int, int, float, str, bool]], start: int) -> None:
    kept = [((sender, stream, at, ()), n, text, more) for sender, stream, n, at, text, more in plain]
    start = min(start, len(kept)) - 1           # where the datagram begins: within a run, maybe
    sizes, sent = protocol.mail_sizes(kept)[start:], kept[start:]
    info = {"to": "bob", "stream": 7, "n": 5, "base": 5, "items": protocol.mail_runs(sent)}
    datagram = encode("mail", info)
    (_, found), = decode(datagram)
    letters, more = protocol.letters_of(found, protocol.opened_plain)
    assert letters == [((sender, stream, protocol.UNSEALED), n, text, at)
                       for (sender, stream, at, _), n, text, _ in sent]
    assert more == [number for number, letter in enumerate(sent, 5) if letter[3]]
    empty = len(encode("mail", {**info, "items": []}))
    assert len(datagram) <= empty + 4 + protocol.MAIL_RUN_SIZE + sum(sizes)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 9), st.integers(0, 60), st.booleans()),
                min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_parts_of_bundles_come_back_and_take_no_more_bytes_than_was_counted(
        bundles: list[tuple[int, int, int, int, bool]], number: int, data: st.DataObject) -> None:
    kept: list[protocol.StoredLetter] = []
    number += 2 ** 62
    for count, start, length, size, is_continued in bundles:
        bundle = count.to_bytes(2, "little") + bytes(protocol.MIN_BUNDLE - 2 + count + size)
        for place in range(min(start, count - 1), min(start + length, count)):
            number += 1
            kept.append((("bob", 7, 0.0, (b"k" * 32, b"e" * 48)), number, (bundle, place), is_continued))
    sizes = protocol.mail_sizes(kept)
    begin = data.draw(st.sampled_from([index for index, size in enumerate(sizes) if size]))
    end = data.draw(st.sampled_from([index for index, size in enumerate([*sizes, 1]) if size and index > begin]))
    info = {"to": "bob", "stream": 7, "n": 5, "base": 5, "items": protocol.mail_runs(kept[begin:end])}
    datagram = encode("mail", info)
    (_, found), = decode(datagram)
    run, = found["items"]
    assert protocol.texts_of_parts(run[4]) == [letter[2] for letter in kept[begin:end]]
    assert (run[2], run[5]) == (kept[begin][1], [letter[1] for letter in kept[begin:end] if letter[3]])
    empty = len(encode("mail", {**info, "items": []}))
    assert len(datagram) <= empty + 4 + protocol.MAIL_RUN + len("bob") + protocol.SEAL_RUN + sum(sizes[begin:end])


@pytest.mark.parametrize("nick", ["b", "a" * 32, "\U00010400" * 24])
def test_a_bundle_that_has_its_room_fits_into_a_mail_of_its_own(nick: str) -> None:
    bundle = b"\0\4".ljust(protocol.bundle_room(nick), b"x")
    most = protocol.MAX_NUMBER
    kept = [((nick, most, 0.0, (b"k" * 32, b"e" * 48)), most - 2000 + n, (bundle, n), n == 1023) for n in range(1024)]
    datagram = encode("mail", {"stream": most, "n": most - 1024, "base": most - 1024,
                               "items": protocol.mail_runs(kept)})
    assert protocol.MAX_DATAGRAM - 20 <= len(datagram) + protocol.RECORD_EXTRA <= protocol.MAX_DATAGRAM


@pytest.mark.parametrize(("host", "private"), [
    ("10.0.0.1", True), ("172.16.0.1", True), ("172.31.255.255", True), ("172.32.0.1", False), ("192.168.1.1", True),
    ("169.254.3.4", True), ("11.0.0.1", False), ("127.0.0.1", False), ("8.8.8.8", False), ("fd00::1", True),
    ("FC00::1", True), ("2001:db8::1", False), ("::1", False), ("fe80::1", False), ("fd00::1%eth0", False)])
def test_an_address_is_private_if_it_means_something_in_its_own_network_only(host: str, private: bool) -> None:
    assert protocol.is_private(host) == private


@pytest.mark.parametrize(("host", "other", "near"), [
    ("10.0.0.1", "10.0.0.200", True), ("10.0.0.1", "10.0.1.1", False), ("fd00::1", "fd00::ffff", True),
    ("fd00::1", "fd00:0:0:1::1", False), ("fd00::1", "10.0.0.1", False), ("10.0.0.1", "fd00::1", False)])
def test_two_addresses_are_neighbours_in_the_same_24_or_64(host: str, other: str, near: bool) -> None:
    assert protocol.are_neighbours(host, other) == near


class Point(protocol.NamedTuple):
    """Where something is."""

    x: int
    y: int = 7

    def far(self) -> int:
        """Return how far it is."""
        return self.x + self.y


class SamePoint(NamedTuple):
    """Where something is."""

    x: int
    y: int = 7


def test_our_named_tuple_is_as_that_of_typing() -> None:
    """It is our own because typing is slow to load."""
    ours, theirs = Point(1), SamePoint(1)
    assert [ours, ours._fields, ours._asdict(), ours._replace(y=2), "Same" + repr(ours)] == [
        theirs, theirs._fields, theirs._asdict(), theirs._replace(y=2), repr(theirs)]
    assert (ours.far(), Point.__doc__, Point.__module__) == (8, "Where something is.", __name__)
    for wrong in (lambda: Point(), lambda: setattr(ours, "x", 3), lambda: setattr(ours, "z", 3)):   # type: ignore
        with pytest.raises((TypeError, AttributeError)):
            wrong()


def test_what_a_table_may_have_the_decoder_reads() -> None:
    for elements, is_read in ((protocol.MAX_ITEMS, True), (protocol.MAX_ITEMS + 2, False)):
        info: Info = {"version": 9, "set": [], "at": [0] * elements}
        assert is_valid("table", info) == bool(Decoder().decode(encode("table", info))) == is_read
