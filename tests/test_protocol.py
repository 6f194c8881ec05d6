"""The wire, the streams and the conversations, on arguments alone: virtual time, a simulated link, hostile bytes.

What needs chance takes it from a seed (``Random``) or from hypothesis. No test looks at a clock.
"""
from __future__ import annotations

import heapq
import ipaddress
import tracemalloc
from itertools import accumulate
from random import Random
from typing import Any
from collections.abc import Iterator, Sequence

import msgpack
import pytest
from hypothesis import given, settings, strategies as st

import protocol
from conversation import (DIRECT, EXISTS, NO_ACK, OFFLINE, POLLS_PER_TURN, QUEUE_LIMIT, RECEIVED, REFUSED, RELAY, SAVE,
                          SAVED, SERVER_ATTEMPTS, SILENT, Conversation, Event, Outbox, Place)
from protocol import (PROOF_BYTES, Address, Decoder, Info, Message, encode, is_host, is_valid, join_pieces, padded,
                      split_text)
from stream import (CLOCK_GRAIN, INITIAL_TIMEOUT, INITIAL_WINDOW, LOST, MAX_EARLY, MAX_SHOWN_RANGES, MAX_TIMEOUT,
                    MAX_WINDOW, MIN_TIMEOUT, NEVER, SENT, UNSENT, Packet, Ranges, ReceiveStream, SendStream)

settings.register_profile("arguments", deadline=None, database=None, derandomize=True, max_examples=150)
settings.load_profile("arguments")

# --- the wire -------------------------------------------------------------------------------------------------

ID, STREAM = 7, 2 ** 62 + 1
SESSION, TOKEN = b"s" * 16, b"t" * 32
ENTRY = ["bob", "192.0.2.1", 5000, "online"]
EXAMPLES: dict[str, Info] = {   # one of each tag, with every optional field
    "reg": {"id": ID, "nick": "bob", "token": TOKEN, "cookie": SESSION},
    "cookie": {"id": ID, "server": SESSION, "cookie": SESSION},
    "welcome": {"id": ID, "nick": "bob", "boot": 3, "session": SESSION, "version": 9},
    "refused": {"nick": "bob", "reason": "taken", "id": ID, "session": SESSION},
    "for": {"session": SESSION[:PROOF_BYTES]},
    "table": {"since": 3, "version": 9, "set": [ENTRY, ["eve", "2001:db8::1", 0, "gone"]]},
    "sync": {"session": SESSION, "version": 9},
    "chat": {"from": "alice", "to": "bob", "stream": STREAM, "n": 5, "base": 4, "text": ["hi", ""], "more": [6]},
    "ack": {"stream": STREAM, "next": 5, "have": [[6, 6], [8, 9]], "room": 90},
    "nack": {"stream": STREAM, "first": 5, "last": 6, "reason": "full"},
    "save": {"session": SESSION, "to": "bob", "stream": STREAM, "n": 5, "base": 4, "text": ["hi", ""],
             "at": [1.5, 2.5], "relay": False, "more": [5]},
    "exists": {"stream": STREAM, "n": 5, "version": 9, "entry": ENTRY},
    "mail": {"to": "bob", "stream": STREAM, "n": 5, "base": 5, "items": [["alice", STREAM, 1, 1.5, ["hi"], []]]},
    "probe": {"id": ID, "to": "bob"},
    "alive": {"id": ID, "nick": "bob", "session": SESSION},
    "ping": {"id": ID, "session": SESSION, "version": 9},
    "pong": {"id": ID, "boot": 3, "version": 9, "mail": 0},
    "dereg": {"session": SESSION},
    "bye": {"session": SESSION},
}
FIELDS = [(tag, field) for tag, info in EXAMPLES.items() for field in info]
REQUIRED_FIELDS = [(tag, field) for tag, fields in protocol.REQUIRED.items() for field in fields]
OF_EVERY_TYPE: list[Any] = [None, True, 7, 1.5, "bob", SESSION, [], {}]
GOOD = encode("probe", {"id": ID, "to": "bob"})
GOOD_MESSAGES: list[Message] = [("probe", {"id": ID, "to": "bob"})]
WHOLE = [encode(tag, info) for tag, info in EXAMPLES.items()]


def decode(datagram: bytes) -> list[Message]:
    return Decoder().decode(datagram)


def accepts(tag: str, info: Info) -> bool:
    return decode(encode(tag, info)) == [(tag, info)]


def swallow(datagram: bytes) -> list[Message]:
    """Decodes hostile bytes: whatever comes out is valid, and the decoder is as good as new afterwards."""
    decoder = Decoder()
    messages = decoder.decode(datagram)
    assert all(is_valid(tag, info) for tag, info in messages)
    assert messages or decoder.dropped or not datagram
    dropped = decoder.dropped
    assert decoder.decode(GOOD) == GOOD_MESSAGES
    assert decoder.dropped == dropped
    return messages


def without(info: Info, field: str) -> Info:
    return {name: value for name, value in info.items() if name != field}


def test_the_examples_name_every_tag_and_field() -> None:
    known = {(tag, name) for table in (protocol.REQUIRED, protocol.OPTIONAL)
             for tag, fields in table.items() for name in fields}
    assert set(FIELDS) == known


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


# --- streams --------------------------------------------------------------------------------------------------

LETTERS = ["x", "é", "日", "𝒜"]


class Link:
    """A path in virtual time that loses, repeats and reorders."""

    def __init__(self, random: Random, loss: float = 0.0, repeat: float = 0.0, jitter: float = 0.0,
                 delay: float = 0.01) -> None:
        self.random, self.loss, self.repeat, self.jitter, self.delay = random, loss, repeat, jitter, delay
        self.queue: list[tuple[float, int, Any]] = []
        self.count = 0

    def put(self, now: float, what: Any) -> None:
        for _ in range(1 + (self.random.random() < self.repeat)):
            if self.random.random() >= self.loss:
                self.count += 1
                arrival = now + self.delay + self.jitter * self.random.random()
                heapq.heappush(self.queue, (arrival, self.count, what))

    def due(self) -> float:
        return self.queue[0][0] if self.queue else NEVER

    def get(self, now: float) -> Iterator[Any]:
        while self.queue and self.queue[0][0] <= now:
            yield heapq.heappop(self.queue)[2]


def stream_of(texts: Sequence[str], capacity: int = 900) -> SendStream:
    """A stream with these texts queued; a number takes as many bytes as its piece and 3 more."""
    stream = SendStream(1, capacity)
    for text in texts:
        pieces = split_text(text)
        stream.queue(pieces, [len(piece.encode()) + 3 for piece in pieces],
                     range(stream.end, stream.end + len(pieces) - 1))
    return stream


def singles(count: int, size: int = 900) -> SendStream:
    """A stream of ``count`` numbers, each of which fills a datagram."""
    stream = SendStream(1, 900)
    stream.queue([str(number) for number in range(1, count + 1)], [size] * count)
    return stream


def numbers(packets: Sequence[Packet]) -> list[int]:
    return [number for packet in packets for number in range(packet.first, packet.end)]


def check_sender(stream: SendStream) -> None:
    """Every counter equals a recount."""
    sent, unsent = list(stream._sent), list(stream._unsent)
    assert stream.in_flight == sum(packet.state == SENT for packet in sent)
    assert stream._lost == sum(packet.state == LOST for packet in sent)
    assert all(packet.state == UNSENT for packet in unsent)
    assert numbers(sent + unsent) == list(range(stream.base, stream.end))
    assert stream.base <= stream.top <= stream.end and all(packet.end <= stream.top for packet in sent)
    assert stream.size >= 0 and (stream.size == 0) == (not stream.held)
    assert stream.base - 1 not in stream.continued
    assert all(stream.base <= number < stream.end for number in stream.continued)
    assert 0 < stream.path.window <= MAX_WINDOW
    assert 0 < stream.path.timeout(stream.longest) <= MAX_TIMEOUT


def check_poll(stream: SendStream, packets: list[Packet], now: float) -> None:
    """What was sent respects the windows; something is due, but not at once, as long as something is held."""
    check_sender(stream)
    assert not packets or stream.in_flight <= min(int(stream.path.window), MAX_WINDOW)
    assert sum(packet.end > stream.edge for packet in stream._sent) <= 1, "only a question goes beyond the edge"
    assert numbers(packets) == sorted(set(numbers(packets)))
    assert now < stream.due() and (stream.due() < NEVER) == (stream.held > 0)
    if stream.in_flight == 0:
        assert stream.timer == NEVER


def check_receiver(stream: ReceiveStream) -> None:
    """Every counter equals a recount, what is buffered is bounded, and the ack is one that passes the check."""
    assert stream.buffered == len(stream._pieces) + sum(len(run.items) for run in stream._runs) + sum(
        len(items) for items, _ in stream._early.values())
    assert bool(stream._runs) == (stream.taken < stream.ready)
    assert stream.buffered <= MAX_EARLY + protocol.MAX_ITEMS
    assert stream.next <= stream.taken <= stream.ready <= stream.reached
    assert len(stream.shown.spans) <= MAX_SHOWN_RANGES
    ack = stream.ack(more=False)
    assert is_valid("ack", ack) and ack["next"] == stream.next
    assert ack["next"] + ack["room"] <= max(stream.edge, stream.next)
    spans = [(stream.next - 1, stream.next - 1)] + [tuple(span) for span in ack["have"]]
    assert all(before[1] < after[0] for before, after in zip(spans, spans[1:])), "sorted and disjoint"


def carry(sender: SendStream, link: Link, back: Link, until: float = 600.0) -> tuple[list[str], int]:
    """Runs a stream over two links until all is acked; returns the texts shown and the numbers closed."""
    receiver, now, shown, closed = ReceiveStream(sender.stream), 0.0, [], 0
    random = link.random
    continued = set(sender.continued)
    handed = 0
    while sender.held:
        for packet_first, items in link.get(now):
            more = [number for number in range(packet_first, packet_first + len(items)) if number in continued]
            receiver.on_data(packet_first, items, more)
            for run in receiver.take(random.randrange(1, 50)):
                texts = join_pieces(run.first, run.items, run.more)
                shown.extend(texts)
                handed += len(texts)
            written = random.randrange(handed + 1)      # a slow terminal
            receiver.written(written)
            handed -= written
            check_receiver(receiver)
            back.put(now, receiver.ack())
        for ack in back.get(now):
            closed += sender.on_ack(now, ack["next"], ack["have"], ack["room"])
        packets = sender.poll(now)
        check_poll(sender, packets, now)
        for packet in packets:
            link.put(now, (packet.first, list(packet.items)))
        now = max(now, min(sender.due(), link.due(), back.due()))
        assert now < until or not sender.held, "nothing moves"
    return shown, closed


def some_texts(random: Random, count: int) -> list[str]:
    return [f"{index} " + random.choice(LETTERS) * random.choice([0, 3, 40, 300, 2000]) for index in range(count)]


@pytest.mark.parametrize("loss, repeat, jitter", [
    (0, 0, 0), (0.1, 0, 0), (0, 0.3, 0.05), (0.2, 0.2, 0.05), (0.5, 0.1, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_everything_arrives_once_and_in_order_over_a_bad_link(loss: float, repeat: float, jitter: float,
                                                              seed: int) -> None:
    random = Random(seed)
    texts = some_texts(random, 120)
    sender = stream_of(texts)
    count = sender.held
    shown, closed = carry(sender, Link(random, loss, repeat, jitter), Link(random, loss, repeat, jitter))
    assert shown == texts
    assert closed == count and sender.size == 0 and not sender.continued


@pytest.mark.parametrize("letter", LETTERS)
def test_the_longest_text_arrives_whole(letter: str) -> None:
    text = letter * (protocol.MAX_TEXT // len(letter.encode()))
    random = Random(letter)
    assert carry(stream_of([text, "after"]), Link(random, 0.1, 0.1, 0.01), Link(random, 0.1)) == (
        [text, "after"], len(split_text(text)) + 1)


@given(st.lists(st.tuples(st.sampled_from(LETTERS), st.integers(0, 800)), max_size=8))
def test_a_long_text_is_cut_between_characters_and_never_too_small(parts: list[tuple[str, int]]) -> None:
    text = "".join(letter * count for letter, count in parts)
    pieces = split_text(text)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= protocol.MAX_PIECE for piece in pieces)
    assert all(len(piece.encode()) >= protocol.MAX_PIECE - 3 for piece in pieces[:-1])
    assert join_pieces(5, pieces + ["next"], range(5, 4 + len(pieces))) == [text, "next"]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 10)), max_size=30), st.integers(1, 8))
def test_ranges_hold_what_was_added_and_forget_the_lowest_first(added: list[tuple[int, int]], most: int) -> None:
    ranges, everything = Ranges(most), Ranges(1000)
    for start, length in added:
        ranges.add(start, start + length)
        everything.add(start, start + length)
        assert len(ranges.spans) <= most
    wanted = {number for start, length in added for number in range(start, start + length)}
    assert {number for number in range(80) if number in everything} == wanted
    assert all(number in wanted for number in range(80) if number in ranges)
    for number in range(80):
        after = next(n for n in range(number, 100) if n not in wanted)
        assert everything.end_of(number) == after
    everything.drop_below(30)
    assert {number for number in range(30, 80) if number in everything} == {n for n in wanted if n >= 30}


# the sender

RANGE = st.tuples(st.integers(1, 60), st.integers(0, 10)).map(lambda pair: [pair[0], sum(pair)])
SENDER_STEPS = st.lists(st.one_of(
    st.tuples(st.just("queue"), st.lists(st.integers(1, 900), min_size=1, max_size=12), st.booleans()),
    st.tuples(st.just("ack"), st.integers(1, 60), st.lists(RANGE, max_size=6), st.sampled_from([0, 1, 2 ** 63 - 1])),
    st.tuples(st.just("true ack"), st.integers(0, 5), st.lists(RANGE, max_size=3), st.integers(0, 90)),
    st.tuples(st.just("poll"), st.sampled_from([0.0, 0.001, 0.03, 0.2, 1.0, 6.0])),
    st.tuples(st.just("close"), st.integers(1, 60)),
    st.tuples(st.just("reroute"), st.integers(900, 2000)),
    st.tuples(st.just("resume")),
), max_size=40)


@settings(max_examples=400)
@given(SENDER_STEPS)
def test_no_sequence_of_acks_confuses_a_sender(steps: list[Any]) -> None:
    stream, now, sizes = SendStream(1, 900), 0.0, [0]
    stream.edge = 8     # a receiver with little room, so that its limits are met
    for step, *arguments in steps:
        base, top, before = stream.base, stream.top, stream.held
        closed = 0
        if step == "queue":
            first, count = stream.end, len(arguments[0])
            stream.queue(range(first, first + count), arguments[0], range(first, first + (count - 1) * arguments[1]))
            sizes += arguments[0]
            before += count
        elif step == "ack":
            closed = stream.on_ack(now, *arguments)
        elif step == "true ack":
            closed = stream.on_ack(now, min(base + arguments[0], top), *arguments[1:])
        elif step == "poll":
            now += arguments[0]
            check_poll(stream, stream.poll(now), now)
        elif step == "close":
            closed = stream.close(arguments[0])
        elif step == "reroute":
            stream.reroute(arguments[0], lambda held: [sizes[number] for number in held])
        else:
            stream.resume()
        check_sender(stream)
        assert closed == stream.base - base == before - stream.held
        assert stream.base <= top, "only what was sent is closed"
        assert all(sum(sizes[n] for n in packet.items) <= stream.capacity for packet in stream._unsent), "fits"
        assert list(stream.items()) == list(range(stream.base, stream.end))


def test_the_ack_of_a_number_never_sent_is_not_believed() -> None:
    stream = singles(20)
    stream.poll(0.0)
    assert stream.on_ack(0.1, 12, [], 4096) == 0 and stream.base == 1
    assert stream.on_ack(0.1, 11, [], 4096) == 10 and stream.base == 11


def test_an_ack_inside_a_text_counts_as_its_beginning() -> None:
    stream = stream_of(["a", "x" * 3000, "z"])      # 1, 2-5, 6
    stream.poll(0.0)
    assert stream.on_ack(0.1, 4, [], 4096) == 1 and stream.base == 2
    assert stream.on_ack(0.1, 6, [], 4096) == 4 and stream.base == 6


def test_a_refusal_inside_a_text_closes_nothing_of_it() -> None:
    stream = stream_of(["a", "x" * 3000, "z"])
    stream.poll(0.0)
    assert stream.close(4) == 1 and stream.base == 2


def test_a_packet_acked_in_part_on_the_old_route_does_not_make_the_next_one_too_large() -> None:
    stream = stream_of(["a"] * 50 + ["x" * 690])
    stream.poll(0.0)
    stream.reroute(900, lambda held: [len(item) + 3 for item in held])
    stream.on_ack(0.1, 51, [], 4096)
    stream.queue(["y" * 690], [693])
    assert all(sum(len(item) + 3 for item in packet.items) <= 900 for packet in stream.poll(0.1))


def test_the_window_starts_at_ten_doubles_each_round_trip_and_ends_at_its_maximum() -> None:
    stream, now, flights = singles(4000), 0.0, []
    for _ in range(8):
        flights.append(len(stream.poll(now)))
        now += 0.02
        stream.on_ack(now, stream.top, [], 4096)
    assert flights == [10, 20, 40, 80, 160, 256, 256, 256]


def test_a_window_that_was_not_used_does_not_grow() -> None:
    stream = SendStream(1, 900)
    for number in range(1, 30):
        stream.queue(["x"], [900])
        stream.poll(float(number))
        stream.on_ack(number + 0.01, number + 1, [], 4096)
    assert stream.path.window == INITIAL_WINDOW


def test_nothing_goes_beyond_the_edge_and_an_older_edge_is_ignored() -> None:
    stream = singles(100)
    stream.edge = 6
    assert numbers(stream.poll(0.0)) == [1, 2, 3, 4, 5]
    stream.on_ack(0.01, 3, [], 5)
    assert numbers(stream.poll(0.01)) == [6, 7]
    stream.on_ack(0.02, 4, [], 0)
    assert stream.edge == 8 and stream.poll(0.02) == []


def round_trips(stream: SendStream, samples: Sequence[float]) -> None:
    now = 0.0
    for number, sample in enumerate(samples, stream.end):
        stream.queue(["x"], [900])
        stream.poll(now)
        stream.on_ack(now + sample, number + 1, [], 4096)
        now += 10.0


@given(st.lists(st.floats(0.001, 0.9), min_size=1, max_size=20))
def test_the_timeout_follows_rfc_6298(samples: list[float]) -> None:
    stream = SendStream(1, 900, initial_timeout=5.0)
    round_trips(stream, samples)
    smoothed, variation = samples[0], samples[0] / 2
    for sample in samples[1:]:
        variation = 0.75 * variation + 0.25 * abs(smoothed - sample)
        smoothed = 0.875 * smoothed + 0.125 * sample
    wanted = max(smoothed + max(CLOCK_GRAIN, 4 * variation), MIN_TIMEOUT)
    assert stream.path.timeout(stream.longest) == pytest.approx(min(wanted, MAX_TIMEOUT), rel=1e-4)


def test_each_timeout_doubles_the_next_one_up_to_the_cap() -> None:
    stream, now, gaps = singles(1), 0.0, []
    for _ in range(9):
        assert numbers(stream.poll(now)) == [1]
        assert stream.poll(stream.due() - 0.001) == []
        gaps.append(stream.due() - now)
        now = stream.due()
    assert gaps == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])
    assert stream.on_ack(now, 2, [], 4096) == 1
    assert stream.path.smoothed is None, "the ack of what was sent twice is no measurement (Karn)"
    assert stream.path.backoff == 100.0, "and so it says nothing of how long to wait"
    stream.queue(["x"], [1])
    assert numbers(stream.poll(now)) == [2]
    stream.on_ack(now + 0.3, 3, [], 4096)
    assert stream.path.backoff == 1.0 and stream.path.smoothed == pytest.approx(0.3)


@pytest.mark.parametrize("round_trip", [0.05, 0.12, 0.3, 0.8, 2.0])
def test_a_path_of_any_length_is_measured_and_hardly_anything_sent_twice(round_trip: float) -> None:
    stream, receiver = singles(2000), ReceiveStream(1)
    now, sent = 0.0, 0
    answers: list[tuple[float, protocol.Info]] = []
    while stream.held and now < 200:
        for packet in stream.poll(now):
            sent += 1
            receiver.on_data(packet.first, packet.items)
            receiver.written(len(take(receiver)))
            answers.append((now + round_trip, receiver.ack()))
        now = min(stream.due(), answers[0][0] if answers else NEVER)
        while answers and answers[0][0] <= now:
            _, ack = answers.pop(0)
            stream.on_ack(now, ack["next"], ack["have"], ack["room"])
    assert not stream.held and sent < 2100 and stream.path.smoothed == pytest.approx(round_trip)


def test_a_round_trip_is_measured_when_the_packet_arrived_and_not_again_when_next_passes_it() -> None:
    stream = singles(5)
    stream.poll(0.0)
    stream.on_ack(0.02, 1, [[2, 3]], 4096)      # 1 is lost on the way, 4 and 5 are late
    stream.poll(stream.due())
    stream.on_ack(0.3, 4, [], 4096)
    assert stream.path.smoothed == pytest.approx(0.02)


def test_an_ack_that_tells_again_what_a_lost_one_had_told_measures_nothing() -> None:
    stream = singles(9)
    stream.poll(0.0)                            # 5 is lost, and so is the ack that says 1 to 4 and 6 to 9
    assert numbers(stream.poll(stream.due())) == [1]
    stream.on_ack(0.4, 5, [[6, 9]], 4096)
    assert stream.path.smoothed is None, "6 to 9 did not take 0.4 s"
    assert numbers(stream.poll(0.4)) == [5]
    stream.on_ack(0.41, 10, [], 4096)
    stream.queue(["x"], [1])
    stream.poll(1.0)
    stream.on_ack(1.02, 11, [], 4096)
    assert stream.path.smoothed == pytest.approx(0.02)


def test_after_a_timeout_one_datagram_goes_out_and_the_window_starts_over() -> None:
    stream = singles(30)
    assert len(stream.poll(0.0)) == 10
    assert numbers(stream.poll(stream.due())) == [1]
    assert stream.path.window == 1.0 and stream.path.threshold == 5.0


def test_a_gap_is_filled_after_three_later_packets_have_arrived_without_waiting() -> None:
    stream = singles(5)
    stream.poll(0.0)
    stream.on_ack(0.01, 1, [[2, 3]], 4096)
    assert stream.poll(0.01) == []
    stream.on_ack(0.011, 1, [[2, 4]], 4096)
    assert numbers(stream.poll(0.011)) == [1]


def test_losses_of_one_round_trip_halve_the_window_once() -> None:
    stream = singles(10)
    stream.poll(0.0)
    stream.on_ack(0.01, 1, [[4, 4]], 4096)
    stream.on_ack(0.011, 1, [[4, 4], [6, 10]], 4096)
    assert stream._lost == 4 and stream.path.threshold == 5.0 and stream.path.window < 10
    assert numbers(stream.poll(0.011)) == [1, 2, 3, 5]


def test_what_came_early_closes_nothing_and_is_not_sent_again() -> None:
    stream = singles(10)
    stream.poll(0.0)
    assert stream.on_ack(0.01, 1, [[2, 10]], 4096) == 0
    assert stream.held == 10 and list(stream.items())[0] == "1"
    assert numbers(stream.poll(0.01)) == [1]


def test_what_came_early_is_forgotten_on_a_timeout() -> None:
    stream = singles(3)
    stream.poll(0.0)
    stream.on_ack(0.01, 1, [[2, 3]], 4096)
    stream.poll(stream.due())
    assert numbers(stream._sent) == [1, 2, 3] and stream._lost == 2 and stream.in_flight == 1
    stream.on_ack(0.2, 2, [], 4096)
    assert numbers(stream.poll(0.2)) == [2, 3]


def test_what_came_early_is_doubted_when_the_receiver_is_behind_the_base() -> None:
    stream = singles(5)
    stream.poll(0.0)
    stream.on_ack(0.01, 3, [[4, 5]], 4096)
    assert stream.in_flight == 1
    assert stream.on_ack(0.02, 1, [], 4096) == 0
    assert stream.in_flight == 3


@pytest.mark.parametrize("keeps", [True, False])
def test_a_receiver_without_room_is_asked_again_ever_more_rarely(keeps: bool) -> None:
    """``keeps``: whether the receiver holds the question as an early one, or has no memory even for that."""
    stream, now, asked = singles(20), 0.01, []
    stream.edge = 6
    stream.poll(0.0)
    stream.on_ack(0.01, 6, [], 0)
    assert stream.poll(0.01) == []
    for _ in range(6):
        gap = stream.due() - now
        now = stream.due()
        packets = stream.poll(now)
        assert numbers(packets) == [6], "one question, and nothing more"
        asked.append(gap)
        stream.on_ack(now, 6, [[6, 6]] if keeps else [], 0)
        assert stream.poll(now) == []
    assert asked == pytest.approx([0.5, 1.0, 2.0, 5.0, 5.0, 5.0])
    assert stream.on_ack(now, 7, [], 1) == 1
    assert numbers(stream.poll(now)) == [7], "once there is room, nobody waits"
    stream.on_ack(now, 8, [], 0)
    assert stream.poll(now) == [] and stream.due() == pytest.approx(now + 0.5), "after progress it begins anew"


def test_a_receiver_that_holds_everything_unwritten_is_asked_with_the_lowest() -> None:
    stream = singles(5)
    stream.poll(0.0)
    stream.on_ack(0.01, 1, [[1, 5]], 0)
    assert stream.poll(0.01) == [] and stream.due() == pytest.approx(0.51)
    assert numbers(stream.poll(0.51)) == [1]


def test_a_resumed_stream_sends_at_once() -> None:
    stream, now = singles(3), 0.0
    for _ in range(6):
        stream.poll(now)
        now = stream.due()
    stream.resume()
    assert numbers(stream.poll(now - 0.5)) == [1] and stream.path.backoff == 1.0


def test_another_route_takes_everything_along_and_knows_nothing_of_the_path() -> None:
    stream = singles(30)
    round_trips(stream, [])
    stream.poll(0.0)
    stream.on_ack(0.3, 5, [[7, 8]], 4096)
    stream.poll(0.3)
    stream.reroute(1000, lambda held: [900] * len(held))
    check_sender(stream)
    assert stream.path.smoothed is None and stream.size == 26 * 900
    assert numbers(stream.poll(0.4)) == list(range(5, 15))


# the receiver

def take(stream: ReceiveStream, most: int = MAX_EARLY) -> list[str]:
    return [text for run in stream.take(most) for text in join_pieces(run.first, run.items, run.more)]


def labels(first: int, count: int) -> list[str]:
    return [f"<{number}>" for number in range(first, first + count)]


RECEIVER_STEPS = st.lists(st.one_of(
    st.tuples(st.just("data"), st.integers(1, 60), st.integers(1, 20), st.sets(st.integers(1, 80)), st.integers(1, 70)),
    st.tuples(st.just("next"), st.integers(0, 3), st.integers(1, 20), st.sampled_from(["none", "all"]), st.just(1)),
    st.tuples(st.just("take"), st.integers(1, 30)),
    st.tuples(st.just("written"), st.integers(0, 10)),
    st.tuples(st.just("advance")),
    st.tuples(st.just("show"), st.integers(1, 80), st.integers(1, 10)),
    st.tuples(st.just("give back"), st.integers(0, 10)),
    st.tuples(st.just("drop early")),
    st.tuples(st.just("ack"), st.booleans()),
), max_size=40)


@settings(max_examples=400)
@given(RECEIVER_STEPS)
def test_no_sequence_of_data_confuses_a_receiver(steps: list[Any]) -> None:
    stream, handed, granted = ReceiveStream(1), 1, 1
    beginnings: list[int] = []      # of the texts handed out and not written
    brought: set[int] = set()
    seen: set[int] = set()          # handed out here
    elsewhere: set[int] = set()     # shown by another route
    for step, *arguments in steps:
        if step in ("data", "next"):
            first, count, more, base = arguments
            first = first if step == "data" else max(1, stream.reached - first)
            if more in ("none", "all"):
                more = range(first, first + count) if more == "all" else ()
            stream.on_data(first, labels(first, count), [n for n in more if first <= n < first + count], base)
            brought.update(range(first, first + count))
        elif step == "take":
            for run in stream.take(arguments[0]):
                assert run.first == handed, "each number once, and in order"
                assert run.items in ([], labels(run.first, run.numbers))
                fresh = range(run.first, run.first + len(run.items))
                assert elsewhere.isdisjoint(fresh), "not again what another route has shown"
                seen.update(fresh)
                texts = join_pieces(run.first, run.items, run.more)
                ends = accumulate((text.count("<") for text in texts), initial=run.first)
                beginnings.extend(list(ends)[:len(texts)])
                handed += run.numbers
            assert stream.taken == handed
        elif step == "written":
            before = stream.next
            stream.written(arguments[0])
            beginnings = beginnings[arguments[0]:]
            assert before <= stream.next <= (beginnings + [handed])[0], "not beyond what is written"
        elif step == "advance":
            stream.advance(stream.base, elsewhere=True)
            brought.update(range(1, stream.base))
            assert not stream.missing
        elif step == "show":
            if stream.show(*arguments):
                fresh = range(arguments[0], sum(arguments))
                assert elsewhere.isdisjoint(fresh) and seen.isdisjoint(fresh), "what was passed may come, once"
                elsewhere.update(fresh)
                brought.update(fresh)
        elif step == "give back" and beginnings:
            handed = beginnings[min(arguments[0], len(beginnings) - 1)]
            beginnings = [first for first in beginnings if first < handed]
            seen = {number for number in seen if number < handed}
            stream.give_back(handed)
            assert stream.taken == stream.ready == handed
        elif step == "drop early":
            stream.drop_early()
        elif step == "ack":
            ack = stream.ack(*arguments)
            assert granted <= stream.edge, "what was granted stays granted"
            granted = stream.edge
            assert ack["room"] in (0, granted - ack["next"])
            assert ack["room"] == 0 or ack["room"] >= protocol.MAX_TEXT_PIECES
        check_receiver(stream)
        assert all(number in brought for first, last in stream.ack(False)["have"] for number in range(first, last + 1))


HONEST_STEPS = st.lists(st.one_of(
    st.tuples(st.just("data"), st.integers(0, 80), st.integers(1, 15), st.integers(0, 30)),
    st.tuples(st.just("mail"), st.integers(0, 30)),
    st.tuples(st.just("write"), st.integers(0, 10)),
    st.tuples(st.just("drop early"), st.just(0)),
), max_size=40)


@settings(max_examples=300)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), HONEST_STEPS)
def test_whole_texts_are_shown_once_whatever_the_packing_and_whichever_route_is_first(lengths: list[int],
                                                                                      steps: list[Any]) -> None:
    starts = list(accumulate(lengths, initial=1))
    last, stream = starts.pop() - 1, ReceiveStream(1)
    texts = ["".join(labels(start, length)) for start, length in zip(starts, lengths)]
    more = set(range(1, last + 1)) - {start + length - 1 for start, length in zip(starts, lengths)}
    shown: list[str] = []
    direct: list[str] = []
    handed: list[tuple[int, int]] = []      # what waits to be written: texts, 0 for a skip, and the number behind

    def bring(first: int, count: int) -> None:
        count = min(count, last + 1 - first)
        stream.on_data(first, labels(first, count), [n for n in range(first, first + count) if n in more])

    def show_all() -> None:
        for run in stream.take():
            found = join_pieces(run.first, run.items, run.more)
            shown.extend(found)
            direct.extend(found)
            handed.extend((1, run.first + len("".join(found[:i + 1]).split("<")) - 1) for i in range(len(found)))
            if not found:
                handed.append((0, run.first + run.numbers))

    def write(most: int) -> None:
        for text, end in handed[:most]:
            stream.written(text)
            assert stream.next == end, "by no more than what was written"
        del handed[:most]

    for step, *arguments in steps + [("data", first, 7, 0) for first in range(0, last, 7)]:
        if step == "data":
            bring(arguments[0] % last + 1, arguments[1])
            show_all()
        elif step == "mail":
            index = arguments[0] % len(texts)
            if stream.show(starts[index], lengths[index]):
                shown.append(texts[index])
            assert texts[index] in shown or texts[index] not in direct
            show_all()
        elif step == "write":
            write(arguments[0])
            assert stream.next in starts + [last + 1], "never inside a text"
        else:
            stream.drop_early()
        check_receiver(stream)
    for first in range(1, last + 1, 10):
        bring(first, 10)
        show_all()
    write(len(handed))
    assert sorted(shown) == sorted(texts)
    assert direct == [text for text in texts if text in set(direct)]
    assert stream.next == last + 1 and stream.buffered == 0


def test_next_moves_by_what_is_written_and_only_over_whole_texts() -> None:
    stream = ReceiveStream(1)
    stream.on_data(1, ["a", "b", "c1", "c2"], [3, 4])
    assert take(stream) == ["a", "b"] and stream.next == 1
    stream.written(1)
    assert stream.ack()["next"] == 2
    stream.on_data(5, ["c3", "d"])
    assert take(stream) == ["c1c2c3", "d"] and stream.next == 2
    for next_ in (3, 6, 7):
        stream.written(1)
        assert stream.next == next_


def test_what_another_route_shows_passes_by_itself_and_not_with_the_texts_before_it() -> None:
    stream = ReceiveStream(1)
    stream.on_data(1, labels(1, 2))
    assert take(stream) == labels(1, 2)
    assert stream.show(3, 2)
    assert take(stream) == []
    stream.written(2)
    assert stream.next == 3, "the other route has not written it"
    stream.written(0)
    assert stream.next == 5 and stream.is_idle


def test_a_stream_that_was_forgotten_and_remembered_shows_nothing_again() -> None:
    stream = ReceiveStream(1)
    stream.on_data(1, labels(1, 3))
    take(stream)
    stream.written(3)
    stream.advance(5, elsewhere=True)
    assert stream.show(8, 1)
    take(stream)
    stream.written(0)
    stream.on_data(5, labels(5, 1))
    again = ReceiveStream(1, 9)
    again.recall(stream.remember())
    assert again.ack()["next"] == 5
    again.on_data(1, labels(1, 9))
    assert take(again) == labels(5, 3) + labels(9, 1)
    assert not again.show(2, 1) and again.show(4, 1), "4 was passed: it may come late, once"


def test_an_ack_names_what_came_early_lowest_first_and_in_32_ranges_at_most() -> None:
    stream = ReceiveStream(1)
    for number in range(100, 2, -2):
        stream.on_data(number, [str(number)])
    assert stream.ack()["have"] == [[number, number] for number in range(4, 68, 2)]
    stream.on_data(1, ["1", "2", "3"])
    assert stream.ack()["have"][:2] == [[1, 4], [6, 6]], "what waits to be written is no reason to send it again"
    take(stream)
    stream.written(2)
    assert stream.ack()["next"] == 3 and stream.ack()["have"][:2] == [[3, 4], [6, 6]]


def test_room_that_was_granted_is_kept_when_memory_is_short() -> None:
    stream = ReceiveStream(1)
    granted = stream.ack()["room"]
    stream.on_data(1, labels(1, 10))
    take(stream)
    stream.written(10)
    assert stream.ack(more=False)["next"] + stream.ack(more=False)["room"] == 1 + granted
    assert stream.ack()["room"] == granted
    stream.on_data(11 + granted - 1, ["last"])
    assert stream.buffered == 1
    stream.on_data(11 + granted, ["beyond"])
    assert stream.buffered == 1, "what is beyond the edge is left aside"


def test_room_is_nothing_or_enough_for_the_longest_text() -> None:
    stream = ReceiveStream(1)
    stream.ack()
    for first in range(1, 4097, 512):
        stream.on_data(first, labels(first, 512))
    take(stream)
    stream.written(4096 - protocol.MAX_TEXT_PIECES)
    assert stream.ack(more=False)["room"] == protocol.MAX_TEXT_PIECES
    stream.written(1)
    assert stream.ack(more=False)["room"] == 0


def test_what_fills_the_gap_is_taken_however_much_came_early() -> None:
    stream = ReceiveStream(1)
    for first in [*range(2, 3074, 1024), *range(3, 3075, 1024)]:     # the same numbers in two packings
        stream.on_data(first, labels(first, 1024))
    stream.on_data(1, ["<1>"])
    assert take(stream)[0] == "<1>"


def test_early_items_are_counted_once_when_another_route_shows_one_between_them() -> None:
    stream = ReceiveStream(1)
    stream.show(5, 1)
    stream.on_data(5, labels(5, 3))
    stream.on_data(4, labels(4, 6))
    stream.on_data(1, labels(1, 3))
    assert take(stream) == labels(1, 4) + labels(6, 4)
    assert stream.buffered == 0


def test_what_another_route_has_shown_stays_shown_when_what_was_taken_is_given_back() -> None:
    stream = ReceiveStream(1)
    assert stream.show(2, 1)
    stream.on_data(1, labels(1, 3))
    assert take(stream) == ["<1>", "<3>"]
    stream.give_back(1)
    stream.on_data(1, labels(1, 3))
    assert take(stream) == ["<1>", "<3>"]


def test_what_is_given_back_can_come_again_and_what_was_written_before_it_cannot() -> None:
    stream = ReceiveStream(1)
    stream.on_data(1, labels(1, 6), [3])        # 1, 2, 3-4, 5, 6
    assert len(take(stream)) == 5
    stream.written(1)
    stream.on_data(9, ["<9>"])
    stream.give_back(3)
    assert stream.buffered == 0, "what waits behind it is forgotten"
    assert (stream.next, stream.taken, stream.ready) == (2, 3, 3)
    stream.on_data(1, labels(1, 6), [3])
    assert take(stream) == ["<3><4>", "<5>", "<6>"]
    stream.written(4)
    assert stream.next == 7


def test_a_receiver_moves_to_the_base_only_when_told_to() -> None:
    stream = ReceiveStream(1)
    stream.on_data(5, ["<5>"], base=5)
    assert stream.missing and take(stream) == [] and stream.ack()["next"] == 1
    stream.advance(5)
    assert not stream.missing and take(stream) == ["<5>"]
    stream.written(1)
    assert stream.next == 6


def test_the_highest_numbers_there_are_still_give_an_ack_that_passes_the_check() -> None:
    stream = ReceiveStream(1)
    stream.on_data(protocol.MAX_NUMBER - 2, ["x", "y"], base=protocol.MAX_NUMBER - 2)
    stream.advance(stream.base)
    assert is_valid("ack", stream.ack()) and take(stream) == ["x", "y"]
    stream.written(2)
    assert is_valid("ack", stream.ack()) and stream.next == protocol.MAX_NUMBER


def test_a_text_longer_than_any_sender_may_send_is_cut_so_that_memory_stays_bounded() -> None:
    stream = ReceiveStream(1)
    for first in range(1, 1001, 100):
        stream.on_data(first, labels(first, 100), range(first, first + 100))
        take(stream)
    assert len(stream._pieces) < protocol.MAX_TEXT_PIECES


# --- conversations --------------------------------------------------------------------------------------------

BOB: Address = ("192.0.2.1", 5000)
ELSEWHERE: Address = ("192.0.2.2", 6000)
BOB_ONLINE, BOB_OFFLINE = Place(True, BOB), Place(False, BOB)
Sent = list[tuple[Message, Address | None]]


class World:
    """A conversation, its clock, and receivers that answer for the recipient and for the server."""

    def __init__(self, place: Place | None = BOB_ONLINE) -> None:
        self.now = 1000.0
        self.conversation = Conversation("alice", "bob", STREAM)
        self.conversation.session = SESSION
        self.conversation.locate(self.now, place)
        self.receivers: dict[str, ReceiveStream] = {}

    def send(self, *texts: str, at: float = 1.0) -> None:
        self.conversation.send(self.now, texts, at)

    def poll(self, calm: bool = True) -> Sent:
        sent: Sent = []
        for datagram, address in self.conversation.poll(self.now, calm):
            assert len(datagram) <= protocol.MAX_DATAGRAM
            message, = decode(datagram)
            assert message[0] == ("chat" if self.conversation.route == DIRECT else "save")
            assert message[1].get("relay", False) == (self.conversation.route == RELAY)
            assert (address is None) == (message[0] == "save")
            sent.append((message, address))
        assert not calm or self.conversation.due() > self.now, "a poll leaves nothing due"
        return sent

    def run(self, seconds: float) -> Sent:
        """Lets time pass, poll by poll."""
        end, sent = self.now + seconds, self.poll()
        while self.conversation.due() <= end:
            self.now = max(self.now, self.conversation.due())
            sent += self.poll()
        self.now = end
        return sent

    def ack(self, next_: int, route: str, room: int = 4096) -> None:
        self.conversation.on_ack(self.now, next_, [], room, route)

    def answer(self, sent: Sent) -> None:
        """What receivers say who take everything."""
        for (tag, info), _ in sent:
            route = DIRECT if tag == "chat" else SAVE
            receiver = self.receivers.setdefault(route, ReceiveStream(STREAM))
            receiver.on_data(info["n"], info["text"], info.get("more", ()), info["base"])
            receiver.advance(info["base"])
            receiver.written(len(take(receiver)))
            ack = receiver.ack()
            self.conversation.on_ack(self.now, ack["next"], ack["have"], ack["room"], route)

    def events(self) -> list[Event]:
        events = [event._replace(first=0) for event in self.conversation.events]
        self.conversation.events.clear()
        return events


def texts_of(sent: Sent) -> list[str]:
    """The texts that are named, once each, by their numbers."""
    found = {info["n"] + index: text for (_, info), _ in sent for index, text in enumerate(info["text"])}
    more = {number for (_, info), _ in sent for number in info.get("more", ())}
    assert sorted(found) == list(range(min(found), max(found) + 1))
    return join_pieces(min(found), [found[number] for number in sorted(found)], more)


def addresses(sent: Sent) -> set[Address | None]:
    return {address for _, address in sent}


def saving() -> World:
    """A world in which one message was not answered by the recipient and went to the server."""
    world = World()
    world.send("hello")
    world.run(0.5)
    assert world.events() == [Event(NO_ACK, 1)]
    return world


def test_a_server_that_answers_but_takes_nothing_is_asked_seldom_once_the_message_is_stuck() -> None:
    world, sent = World(), [0, 0, 0]        # datagrams in each half minute: straight, by the server, when it is stuck
    start = world.now
    world.send("hello")
    while world.now < start + 85:
        for (tag, _), _ in world.poll():
            sent[int((world.now - start) / 30)] += 1
            world.now += 0.005
            world.conversation.server_heard(world.now)
            world.ack(1, DIRECT if tag == "chat" else SAVE)
        world.now += 0.03
    assert world.conversation.stuck and [event.kind for event in world.events()] == [NO_ACK]
    assert sent[1] > 50 and sent[2] <= 6, "as often as any request as long as it may help, then every 5 s"


@pytest.mark.parametrize("place", [BOB_ONLINE, None])
def test_no_datagram_is_larger_than_allowed_and_all_arrives_as_it_was_sent(place: Place | None) -> None:
    random = Random(1200)
    texts = some_texts(random, 150) + [""] * 2000 + ["𝒜" * 16384, "x" * 65536]
    world, received = World(place), []
    world.conversation.me = world.conversation.peer = "日" * 32
    stream = world.conversation.stream
    stream.base = stream.end = stream.top = 2 ** 62     # numbers take the most bytes
    while texts:
        world.send(*texts[:200])
        received += texts[:200]
        del texts[:200]
    sent: Sent = []
    while world.conversation.held:
        turn = world.run(0.001)
        sent += turn
        world.answer(turn)
    assert texts_of(sent) == received
    closing = RECEIVED if place else SAVED
    assert sum(event.messages for event in world.events() if event.kind == closing) == len(received)


def test_a_text_goes_straight_to_the_recipient_and_its_ack_is_the_receipt() -> None:
    world = World()
    world.send("hello")
    (message, address), = world.poll()
    assert message == ("chat", {"from": "alice", "to": "bob", "stream": STREAM, "n": 1, "base": 1, "text": ["hello"]})
    assert address == BOB and world.events() == []
    world.ack(2, DIRECT)
    assert world.events() == [Event(RECEIVED, 1)]
    assert world.run(100) == [] and world.conversation.due() == NEVER


def test_one_ack_for_several_texts_counts_messages_and_not_numbers() -> None:
    world = World()
    world.send("a", "x" * 2000, "b")
    world.poll()
    world.ack(3, DIRECT)
    world.ack(6, DIRECT)
    assert world.events() == [Event(RECEIVED, 1), Event(RECEIVED, 2)]


def test_without_an_ack_for_500_ms_everything_held_goes_to_the_server_in_order() -> None:
    world, texts = World(), ["a", "é" * 3000] + [f"{number}" for number in range(300)]
    world.send(*texts)
    sent = world.run(0.499)
    assert addresses(sent) == {BOB} and world.events() == []
    assert sum(info["n"] == 1 for (_, info), _ in sent) >= 3, "sent again within that time"
    world.now += 0.001
    saved = world.poll()
    assert world.events() == [Event(NO_ACK, len(texts))]
    while texts_of(saved) != texts:
        assert addresses(saved) == {None} and len(saved) < 1000
        world.answer(saved)
        saved += world.run(0.01)
    world.answer(saved)
    events = world.events()
    assert {event.kind for event in events} == {SAVED}
    assert sum(event.messages for event in events) == len(texts)


def test_silence_is_no_silence_while_something_that_has_arrived_is_unread() -> None:
    world = World()
    world.send("hello")
    world.poll()
    world.now += 5.0
    world.poll(calm=False)
    assert world.events() == [] and world.conversation.route == DIRECT
    world.ack(1, DIRECT)
    world.poll()
    assert world.conversation.route == DIRECT


def test_an_ack_that_moves_nothing_is_a_sign_of_life() -> None:
    world = World()
    world.send("hello")
    for _ in range(50):
        world.run(0.4)
        world.ack(1, DIRECT)
    assert world.conversation.route == DIRECT and world.events() == []


def test_somebody_else_at_the_address_sends_the_messages_to_the_server_at_once() -> None:
    world = World()
    world.send("a", "b")
    world.poll()
    world.conversation.on_nack(world.now, 1, 2, "not-me", DIRECT)
    assert world.events() == [Event(NO_ACK, 2)]
    assert texts_of(world.poll()) == ["a", "b"] and world.conversation.route == SAVE


def test_a_refusal_that_is_not_for_what_is_held_on_this_route_changes_nothing() -> None:
    world = World()
    world.send("a", "b")
    world.poll()
    world.ack(2, DIRECT)
    world.events()
    world.conversation.on_nack(world.now, 1, 1, "not-me", DIRECT)
    world.conversation.on_nack(world.now, 3, 9, "not-me", DIRECT)
    world.conversation.on_nack(world.now, 2, 2, "full", SAVE)
    world.conversation.on_nack(world.now, 2, 2, "full", DIRECT)
    assert world.events() == [] and world.conversation.route == DIRECT and world.conversation.messages == 1


def test_for_somebody_offline_the_server_is_asked_at_once_and_each_message_says_so_once() -> None:
    world = World(BOB_OFFLINE)
    world.send("a")
    world.send("b", "c")
    assert world.events() == [Event(OFFLINE, 1), Event(OFFLINE, 2)]
    sent = world.poll()
    assert addresses(sent) == {None} and texts_of(sent) == ["a", "b", "c"]
    world.conversation.locate(world.now, BOB_OFFLINE)
    world.run(2.0)
    world.ack(4, SAVE)
    assert world.events() == [Event(SAVED, 3)]


def test_somebody_who_goes_offline_takes_what_is_held_to_the_server() -> None:
    world = World()
    world.send("a")
    world.poll()
    world.conversation.locate(world.now, BOB_OFFLINE)
    assert world.events() == [Event(OFFLINE, 1)] and texts_of(world.poll()) == ["a"]


def test_somebody_who_moves_is_followed() -> None:
    world = World()
    world.send("a")
    world.poll()
    world.conversation.locate(world.now, Place(True, ELSEWHERE))
    assert addresses(world.poll()) == {ELSEWHERE} and world.events() == []


def test_somebody_without_an_address_to_send_to_is_reached_by_relay() -> None:
    world = World(Place(True, None))
    world.send("a")
    world.poll()
    assert world.conversation.route == RELAY and world.events() == []


def test_a_saved_text_keeps_the_time_at_which_it_was_sent() -> None:
    world = World(None)
    world.send("a", "b", at=1.5)
    world.send("x" * 1000, at=2.5)
    times = {info["n"] + index: at for (_, info), _ in world.poll() for index, at in enumerate(info["at"])}
    assert times == {1: 1.5, 2: 1.5, 3: 2.5, 4: 2.5}


def test_somebody_who_exists_is_tried_once_more_and_then_relayed_to_for_a_minute() -> None:
    world = saving()
    world.conversation.on_exists(world.now, 1, ELSEWHERE)
    assert world.events() == [Event(EXISTS, 1)]
    assert addresses(world.run(0.49)) == {ELSEWHERE}
    assert addresses(world.run(0.02)[-1:]) == {None} and world.conversation.route == RELAY
    world.ack(2, SAVE)
    assert world.events() == [Event(SAVED, 1, relayed=True)], "nothing is said twice"
    world.now += 59.0
    world.send("b")
    assert addresses(world.poll()) == {None} and world.conversation.route == RELAY
    world.ack(3, SAVE)
    world.now += 1.0
    world.send("c")
    assert addresses(world.poll()) == {BOB}


def test_a_relay_ends_as_soon_as_the_entry_changes() -> None:
    world = saving()
    world.conversation.on_exists(world.now, 1, None)
    assert world.conversation.route == RELAY and world.events() == [Event(EXISTS, 1)]
    world.poll()
    world.conversation.locate(world.now, Place(True, ELSEWHERE))
    assert addresses(world.poll()) == {ELSEWHERE}


def test_what_is_held_after_a_minute_of_relay_is_tried_directly_again() -> None:
    world = saving()
    world.conversation.on_exists(world.now, 1, None)
    for _ in range(120):
        world.run(0.49)
        world.ack(1, SAVE)
    assert world.conversation.route == RELAY
    world.run(1.3)
    assert world.conversation.route == DIRECT


def test_a_retry_that_works_is_a_receipt() -> None:
    world = saving()
    world.conversation.on_exists(world.now, 1, BOB)
    world.answer(world.poll())
    assert world.events() == [Event(EXISTS, 1), Event(RECEIVED, 1)]


@pytest.mark.parametrize("number", [2, 9])
def test_that_somebody_exists_is_not_believed_for_a_number_never_sent(number: int) -> None:
    world = saving()
    world.conversation.on_exists(world.now, number, BOB)
    assert world.events() == [] and world.conversation.route == SAVE


def test_a_silent_server_is_said_once_and_leaves_the_messages_stuck_until_it_is_heard() -> None:
    world = saving()
    sent = world.run(2.49)
    assert 1 + len(sent) >= SERVER_ATTEMPTS and world.events() == [] and not world.conversation.stuck
    world.run(0.02)
    assert world.events() == [Event(SILENT, 1)] and world.conversation.stuck
    world.run(100)
    assert world.events() == [] and world.conversation.messages == 1
    world.conversation.server_heard(world.now)
    assert not world.conversation.stuck
    world.answer(world.poll())
    assert world.events() == [Event(SAVED, 1)] and not world.conversation.held


def test_when_the_silence_of_the_server_is_forgotten_it_is_asked_at_once() -> None:
    world = World(Place(True, None))
    world.send("hello")
    world.run(4.0)
    assert world.events() == [Event(SILENT, 1)]
    world.conversation.locate(world.now, Place(True, None))
    assert not world.conversation.stuck and len(world.poll()) == 1


def test_a_server_that_falls_silent_again_is_said_again() -> None:
    world = saving()
    world.run(3.0)
    world.conversation.server_heard(world.now)
    world.run(3.0)
    assert world.events() == [Event(SILENT, 1)] * 2


def test_the_server_being_heard_changes_nothing_for_what_is_sent_directly() -> None:
    world = World()
    world.send("a")
    for _ in range(6):
        world.run(0.09)
        world.conversation.server_heard(world.now)
    assert world.events() == [Event(NO_ACK, 1)]


def test_a_recipient_that_answers_but_takes_nothing_for_30_s_is_relayed_to() -> None:
    world = World()
    world.send("a", "b")
    for second in range(30):
        assert world.conversation.route == DIRECT, second
        for _ in range(4):
            world.run(0.25)
            world.ack(1, DIRECT, room=0)
    world.poll()
    assert world.events() == [Event(NO_ACK, 2)] and world.conversation.route == RELAY


def test_a_server_that_answers_but_takes_nothing_for_30_s_leaves_the_messages_stuck_and_held() -> None:
    world = saving()
    for _ in range(119):
        world.run(0.25)
        world.ack(1, SAVE, room=0)
    assert not world.conversation.stuck
    world.run(0.5)
    assert world.conversation.stuck and world.conversation.texts() == ["hello"] and world.events() == []
    world.ack(2, SAVE)
    assert not world.conversation.stuck and world.events() == [Event(SAVED, 1)]


@pytest.mark.parametrize("seconds", [3, 20, 29, 45])
def test_a_recipient_that_moves_again_and_again_but_takes_nothing_holds_nobody_up(seconds: int) -> None:
    world, stuck, relayed = World(), NEVER, NEVER
    world.send("hello")
    for second in range(1, 200):
        for _ in range(4):
            world.run(0.25)
            world.ack(1, DIRECT if world.conversation.route == DIRECT else SAVE, room=0)
        if world.conversation.route == RELAY:
            relayed = min(relayed, second)
        if second % seconds == 0:
            world.conversation.locate(world.now, Place(True, ("127.0.0.1", 1000 + second)))
        if world.conversation.stuck:
            stuck = min(stuck, second)
        assert world.conversation.stuck == (stuck < NEVER), "it stays so, whichever way is tried"
    assert 30 <= relayed <= 32 and stuck <= 62
    assert world.events() == [Event(NO_ACK, 1)] and world.conversation.texts() == ["hello"]
    world.ack(2, DIRECT)
    assert not world.conversation.stuck and world.events() == [Event(RECEIVED, 1)]


def test_progress_starts_the_30_s_anew() -> None:
    world = World()
    world.send(*map(str, range(10)))
    for next_ in range(2, 12):
        for _ in range(100):
            world.run(0.25)
            world.ack(next_ - 1, DIRECT)
        world.ack(next_, DIRECT)
    assert world.events() == [Event(RECEIVED, 1)] * 10


@pytest.mark.parametrize("reason", ["full", "unknown", "disk"])
def test_a_refusal_of_the_server_closes_exactly_what_it_names(reason: str) -> None:
    world = World(None)
    world.send("a", "x" * 2000, "b")        # 1, 2-4, 5
    world.poll()
    world.conversation.on_nack(world.now, 1, 4, reason, SAVE)
    assert world.events() == [Event(REFUSED, 2, reason)] and world.conversation.texts() == ["b"]
    world.conversation.on_nack(world.now, 1, 4, reason, SAVE)
    assert world.events() == []
    world.ack(6, SAVE)
    assert world.events() == [Event(SAVED, 1)]


@pytest.mark.parametrize("route, kind", [(DIRECT, RECEIVED), (SAVE, SAVED)])
def test_a_late_ack_from_the_other_route_counts(route: str, kind: str) -> None:
    world = saving()
    if route == SAVE:
        world.poll()
        world.conversation.on_exists(world.now, 1, BOB)
        world.events()
    world.ack(2, route)
    assert world.events() == [Event(kind, 1)] and world.conversation.messages == 0


def test_a_late_ack_before_the_new_route_was_used_does_not_make_its_datagrams_too_large() -> None:
    world = World()
    world.send(*["a"] * 10, "x" * 690)
    world.poll()
    world.conversation.locate(world.now, None)
    world.ack(11, DIRECT)
    world.send("y" * 690)
    assert texts_of(world.poll()) == ["x" * 690, "y" * 690]


TEXT = st.builds(str.__mul__, st.sampled_from(LETTERS), st.sampled_from([0, 1, 5, 200, 700, 2500]))
ROUTE = st.sampled_from([DIRECT, SAVE])
CONVERSATION_STEPS = st.lists(st.one_of(
    st.tuples(st.just("send"), st.lists(TEXT, min_size=1, max_size=4)),
    st.tuples(st.just("locate"), st.sampled_from([None, BOB_ONLINE, BOB_OFFLINE, Place(True, ELSEWHERE),
                                                  Place(True, None)])),
    st.tuples(st.just("ack"), st.integers(-3, 8), st.lists(RANGE, max_size=3), st.sampled_from([0, 90, 4096]), ROUTE),
    st.tuples(st.just("nack"), st.integers(-2, 2), st.integers(0, 5), st.sampled_from(["not-me", "full"]), ROUTE),
    st.tuples(st.just("exists"), st.integers(0, 3), st.sampled_from([None, BOB, ELSEWHERE])),
    st.tuples(st.just("heard")),
    st.tuples(st.just("poll"), st.booleans()),
    st.tuples(st.just("time"), st.sampled_from([0.01, 0.1, 0.6, 3.0, 31.0, 61.0])),
    st.tuples(st.just("answer")),
), max_size=40)


def check_conversation(world: World, messages: list[str], events: list[Event]) -> None:
    """Whatever happened: each message is either closed or held, and the counters tell how many."""
    closing = (RECEIVED, SAVED, REFUSED)
    closed = sum(event.messages for event in events if event.kind in closing)
    conversation = world.conversation
    assert all(event.messages > 0 for event in events)
    assert conversation.messages == len(messages) - closed and conversation.texts() == messages[closed:]
    assert (conversation.stream.size == 0) == (not conversation.held)
    assert not (conversation.stuck and not conversation.held)
    check_sender(conversation.stream)


@settings(max_examples=300)
@given(CONVERSATION_STEPS)
def test_each_message_closes_exactly_once_whatever_happens_in_between(steps: list[Any]) -> None:
    world, messages, events = World(), [], []
    told = {NO_ACK: 0, OFFLINE: 0, EXISTS: 0}    # of how many of the messages
    conversation = world.conversation
    for step, *arguments in steps:
        base = conversation.stream.base
        if step == "send":
            world.send(*arguments[0])
            messages += arguments[0]
        elif step == "locate":
            conversation.locate(world.now, arguments[0])
        elif step == "ack":
            conversation.on_ack(world.now, max(1, base + arguments[0]), *arguments[1:])
        elif step == "nack":
            first = max(1, base + arguments[0])
            conversation.on_nack(world.now, first, first + arguments[1], *arguments[2:])
        elif step == "exists":
            conversation.on_exists(world.now, base + arguments[0], arguments[1])
        elif step == "heard":
            conversation.server_heard(world.now)
        elif step == "poll":
            world.poll(arguments[0])
        elif step == "time":
            world.run(arguments[0])
        else:
            world.answer(world.poll())
        fresh = world.events()
        for kind, count, *_ in fresh:
            if kind in told:
                assert count <= len(messages) - told[kind], "at most once for a message"
                told[kind] = len(messages)
        events += fresh
        check_conversation(world, messages, events)
    for _ in range(400):
        conversation.server_heard(world.now)
        world.answer(world.run(0.01))
    assert not conversation.held and conversation.due() == NEVER
    check_conversation(world, messages, events + world.events())


def test_an_event_tells_from_which_number_on_its_messages_are() -> None:
    world = World()
    world.send("a", "b", "x" * 2000, "c")
    world.poll()
    world.conversation.on_ack(0.0, 3, [], 4096, DIRECT)
    world.conversation.on_nack(0.1, 3, 9, "not-me", DIRECT)
    world.send("d")
    world.conversation.on_ack(0.2, 6, [], 4096, SAVE)
    assert world.conversation.events == [Event(RECEIVED, 2, "", 1), Event(NO_ACK, 2, "", 3),
                                         Event(SAVED, 1, "", 3)]


LETTERS_KEPT = st.lists(st.tuples(st.sampled_from(["bob", "a" * 32, "é" * 32]), st.sampled_from([1, 2 ** 62]),
                                  st.integers(1, 9), st.sampled_from([1.5, 2.5]),
                                  st.text(max_size=20).filter(lambda text: text.isprintable()), st.booleans()),
                        min_size=1, max_size=30)


@given(LETTERS_KEPT, st.integers(1, 30))
def test_letters_come_back_as_they_were_sent_and_take_no_more_bytes_than_was_counted(
        kept: list[tuple[str, int, int, float, str, bool]], start: int) -> None:
    start = min(start, len(kept)) - 1           # where the datagram begins: within a run, maybe
    sizes, sent = protocol.mail_sizes(kept)[start:], kept[start:]
    info = {"to": "bob", "stream": 7, "n": 5, "base": 5, "items": protocol.mail_runs(sent)}
    datagram = encode("mail", info)
    (_, found), = decode(datagram)
    letters, more = protocol.letters_of(found)
    assert letters == [letter[:5] for letter in sent]
    assert more == [number for number, letter in enumerate(sent, 5) if letter[5]]
    empty = len(encode("mail", {**info, "items": []}))
    assert len(datagram) <= empty + 4 + protocol.MAIL_RUN_SIZE + sum(sizes)


# --- outboxes -------------------------------------------------------------------------------------------------

def outbox_with(nicks: Sequence[str], online: bool = True) -> Outbox:
    """An outbox in which one message waits for each of ``nicks``."""
    outbox = Outbox("alice")
    for number, nick in enumerate(nicks, 1):
        outbox.open(0.0, nick, Place(online, ("127.0.0.1", number)), number)
        outbox.send(0.0, nick, ["hello"], 0.0)
    return outbox


def ack_of(stream: int, next_: int) -> dict[str, Any]:
    return {"stream": stream, "next": next_, "have": [], "room": 4096}


def test_an_outbox_sends_to_whom_something_happened_and_to_whom_it_is_time() -> None:
    outbox = outbox_with(["bob", "carol"])
    assert [address for _, address in outbox.poll(0.0)] == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert list(outbox.poll(0.01)) == []
    assert outbox.due() == INITIAL_TIMEOUT
    assert len(list(outbox.poll(outbox.due()))) == 2, "both are repeated"


def test_an_outbox_looks_after_so_many_in_one_go_and_after_the_others_at_once() -> None:
    outbox = outbox_with([f"n{number}" for number in range(3 * POLLS_PER_TURN // 2)])
    assert len(list(outbox.poll(0.0))) == POLLS_PER_TURN
    assert outbox.due() <= 0.0
    assert len(list(outbox.poll(0.0))) == POLLS_PER_TURN // 2
    assert outbox.due() > 0.0


def test_an_outbox_takes_an_ack_only_from_where_the_stream_goes_or_from_the_server() -> None:
    outbox = outbox_with(["bob", "carol"])
    list(outbox.poll(0.0))
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 2))
    outbox.on_ack(0.1, ack_of(3, 2), ("127.0.0.1", 1))
    assert outbox.take_events() == []
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.on_ack(0.1, ack_of(2, 2), None)
    assert outbox.take_events() == [("bob", [Event(RECEIVED, 1, "", 1)]), ("carol", [Event(SAVED, 1, "", 1)])]
    outbox.count_told()
    assert not list(outbox.undelivered()) and outbox.is_settled


def test_what_waits_for_a_silent_server_leaves_room_for_those_who_are_there() -> None:
    outbox = outbox_with(["bob"], online=False)
    outbox.send(0.0, "bob", ["x"] * QUEUE_LIMIT, 0.0)
    outbox.open(0.0, "carol", Place(True, ("127.0.0.1", 2)), 8)
    outbox.open(0.0, "dave", Place(False, None), 9)
    assert outbox.is_full and [outbox.room(0.0, nick) for nick in ("bob", "carol", "dave")] == [0, 0, 0]
    assert not outbox.is_stuck(0.0, "bob")
    outbox.lost = True
    for nick in ("bob", "dave"):
        assert outbox.is_stuck(0.0, nick) and outbox.room(0.0, nick) == 0, "a send to them fails at once"
    assert not outbox.is_full and outbox.room(0.0, "carol") == QUEUE_LIMIT
    assert len(list(outbox.undelivered())) == 1 + QUEUE_LIMIT


def test_an_outbox_forgets_who_has_nothing_waiting_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.CONVERSATIONS_KEPT", 2)
    outbox = outbox_with(["bob", "carol"])
    list(outbox.poll(0.0))
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.take_events()
    outbox.count_told()
    outbox.open(0.1, "dave", Place(True, ("127.0.0.1", 3)), 3)
    outbox.send(0.1, "dave", ["hello"], 0.0)
    assert set(outbox.conversations) == {"carol", "dave"}
    outbox.open(0.2, "bob", Place(True, ("127.0.0.1", 1)), 4)
    outbox.send(0.2, "bob", ["again"], 0.0)
    assert ("127.0.0.1", 1) in [address for _, address in outbox.poll(0.2)]
    assert ("127.0.0.1", 1) in [address for _, address in outbox.poll(0.2 + INITIAL_TIMEOUT)], "it is repeated in time"


def test_an_ack_that_comes_twice_does_not_settle_what_is_sent_to_whoever_was_forgotten_meanwhile(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.CONVERSATIONS_KEPT", 2)
    outbox = outbox_with(["bob", "carol"])
    for _ in range(2):
        list(outbox.poll(0.0))
        outbox.take_events()
        outbox.count_told()
        outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.open(0.1, "dave", Place(True, ("127.0.0.1", 3)), 3)      # bob gives way, and in the same turn ...
    outbox.send(0.1, "dave", ["hello"], 0.0)
    outbox.open(0.1, "bob", Place(True, ("127.0.0.1", 1)), 4)
    outbox.send(0.1, "bob", ["again"], 0.0)
    list(outbox.poll(0.1))
    assert outbox.take_events() == []
    outbox.count_told()
    assert ("bob", "again") in outbox.undelivered()


def test_messages_that_change_their_route_while_the_server_is_silent_count_as_stuck_at_once() -> None:
    outbox, now = Outbox("alice"), 0.0
    outbox.open(now, "bob", Place(True, ("192.0.2.1", 9)), 7)
    outbox.send(now, "bob", ["text"] * QUEUE_LIMIT, now)
    kinds: list[str] = []

    def poll() -> None:
        list(outbox.poll(now))
        kinds.extend(event.kind for _, events in outbox.take_events() for event in events)
        outbox.count_told()
    poll()
    now = 0.6
    poll()
    outbox.on_exists(now, {"stream": 7, "n": 1, "version": 1, "entry": ["bob", "192.0.2.1", 9, "online"]},
                     ("192.0.2.1", 9))
    poll()
    outbox.lost = True
    assert outbox.is_full and not outbox.is_stuck(now, "bob"), "they go straight to bob"
    now = 1.3
    poll()
    assert kinds == ["no-ack", "exists"], "it was said already that they go to the server"
    assert outbox.is_stuck(now, "bob") and not outbox.is_full
