"""Streams on arguments alone: virtual time, a simulated link, and any sequence of acks and data.

What needs chance takes it from a seed (``Random``) or from hypothesis. No test looks at a clock.
"""
from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

import protocol
from protocol import MAX_EARLY, NEVER, is_valid, join_pieces, merged, split_text
from stream import (CLOCK_GRAIN, INITIAL_CONGESTION_WINDOW, LOST, MAX_CLAIMED_RANGES, MAX_CONGESTION_WINDOW,
                    MAX_TIMEOUT, MIN_TIMEOUT, SENT, UNSENT, Packet, Ranges, ReceiveStream, SendStream)
from tests.test_protocol import LETTERS


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
    """Return a stream with these texts queued; a number counts as its piece and 3 bytes more."""
    stream = SendStream(1, capacity)
    for text in texts:
        pieces = split_text(text)
        stream.queue(pieces, [len(piece.encode()) + 3 for piece in pieces],
                     range(stream.end, stream.end + len(pieces) - 1))
    return stream


def singles(count: int, size: int = 900) -> SendStream:
    """Return a stream of ``count`` numbers, each of which fills a datagram."""
    stream = SendStream(1, 900)
    stream.queue([str(number) for number in range(1, count + 1)], [size] * count)
    return stream


def numbers(packets: Sequence[Packet]) -> list[int]:
    return [number for packet in packets for number in range(packet.first, packet.end)]


def check_sender(stream: SendStream) -> None:
    """Check that every counter equals a recount."""
    sent, unsent = list(stream._sent), list(stream._unsent)
    assert stream.in_flight == sum(packet.state == SENT for packet in sent)
    assert stream._lost == sum(packet.state == LOST for packet in sent)
    assert all(packet.state == UNSENT for packet in unsent)
    assert numbers(sent + unsent) == list(range(stream.base, stream.end))
    assert stream.base <= stream.top <= stream.end and all(packet.end <= stream.top for packet in sent)
    assert stream.size >= 0 and (stream.size == 0) == (not stream.pending)
    assert stream.base - 1 not in stream.continued
    assert all(stream.base <= number < stream.end for number in stream.continued)
    assert 0 < stream.path.congestion_window <= MAX_CONGESTION_WINDOW
    assert 0 < stream.path.timeout(stream.timeout_cap) <= MAX_TIMEOUT


def check_poll(stream: SendStream, packets: list[Packet], now: float) -> None:
    """Check that the windows are respected, and that something is due, but not at once, while items are pending."""
    check_sender(stream)
    assert not packets or stream.in_flight <= min(int(stream.path.congestion_window), MAX_CONGESTION_WINDOW)
    assert sum(packet.end > stream.window_end for packet in stream._sent) <= 1, "only a probe goes beyond the window"
    assert numbers(packets) == sorted(set(numbers(packets)))
    assert now < stream.due() and (stream.due() < NEVER) == (stream.pending > 0)
    if stream.in_flight == 0:
        assert stream.timeout_at == NEVER


def check_receiver(stream: ReceiveStream) -> None:
    """Check that every counter equals a recount, that the buffer is bounded, and that the ack is valid."""
    assert stream.buffered == len(stream._pieces) + sum(len(run.items) for run in stream._runs) + sum(
        len(items) for items, _ in stream._early.values())
    assert bool(stream._runs) == (stream.taken < stream.ready)
    assert stream.buffered <= MAX_EARLY + protocol.MAX_ITEMS
    assert stream.next <= stream.taken <= stream.ready <= stream.reached
    assert len(stream.claimed.spans) <= MAX_CLAIMED_RANGES
    ack = stream.ack(grow=False)
    assert is_valid("ack", ack) and ack["next"] == stream.next
    assert ack["next"] + ack["room"] <= max(stream.window_end, stream.next)
    spans = [(stream.next - 1, stream.next - 1)] + [tuple(span) for span in ack["have"]]
    assert all(before[1] < after[0] for before, after in zip(spans, spans[1:])), "sorted and disjoint"


def carry(sender: SendStream, link: Link, back: Link, until: float = 600.0) -> tuple[list[str], int]:
    """Run a stream over two links until all is acked; return the texts shown and the numbers closed."""
    receiver, now, shown, closed = ReceiveStream(sender.id), 0.0, [], 0
    random = link.random
    continued = set(sender.continued)
    handed = 0
    while sender.pending:
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
        assert now < until or not sender.pending, "nothing moves"
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
    count = sender.pending
    shown, closed = carry(sender, Link(random, loss, repeat, jitter), Link(random, loss, repeat, jitter))
    assert shown == texts
    assert closed == count and sender.size == 0 and not sender.continued


@pytest.mark.parametrize("letter", LETTERS)
def test_the_longest_text_arrives_whole(letter: str) -> None:
    text = letter * (protocol.MAX_TEXT // len(letter.encode()))
    random = Random(letter)
    assert carry(stream_of([text, "after"]), Link(random, 0.1, 0.1, 0.01), Link(random, 0.1)) == (
        [text, "after"], len(split_text(text)) + 1)


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
        some = set(range(number, number + 3))
        assert (everything.touches(number, number + 3), everything.covers(number, number + 3)) == (
            bool(some & wanted), some <= wanted)
    assert everything.spans == merged((start, start + length) for start, length in added)
    everything.drop_below(30)
    assert {number for number in range(30, 80) if number in everything} == {n for n in wanted if n >= 30}


@pytest.mark.parametrize("last", [9, protocol.MAX_NUMBER])
def test_a_range_has_its_own_beginning_however_far_it_goes(last: int) -> None:
    ranges = Ranges(2)
    ranges.add(last, last + 1)
    assert last in ranges and ranges.end_of(last) == last + 1 and last - 1 not in ranges


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


@given(SENDER_STEPS)
def test_no_sequence_of_acks_confuses_a_sender(steps: list[Any]) -> None:
    stream, now, sizes = SendStream(1, 900), 0.0, [0]
    stream.window_end = 8     # a receiver with little room, so that its limits are met
    for step, *arguments in steps:
        base, top, before = stream.base, stream.top, stream.pending
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
        assert closed == stream.base - base == before - stream.pending
        assert stream.base <= top, "only what was sent is closed"
        assert all(sum(sizes[n] for n in packet.items) <= stream.capacity for packet in stream._unsent), "fits"
        assert list(stream.pending_items()) == list(range(stream.base, stream.end))


@given(st.lists(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 30)), max_size=60), min_size=1, max_size=4))
def test_what_has_no_size_of_its_own_stays_with_what_stands_before_it(calls: list[list[tuple[int, int]]]) -> None:
    """Groups of items, each of a size and so many items: no packet parts one."""
    stream, sizes = SendStream(1, 100), list[int]()
    for groups in calls:
        more = [size for first, count in groups for size in (first, *[0] * (count - 1))]
        stream.queue(range(len(sizes), len(sizes) + len(more)), more)
        sizes += more
    packets = list(stream._unsent)
    assert [item for packet in packets for item in packet.items] == list(range(len(sizes)))
    assert all(sizes[packet.items[0]] and len(packet.items) <= protocol.MAX_ITEMS for packet in packets)
    assert all(sum(sizes[item] for item in packet.items) == packet.size <= 100 for packet in packets)


def test_a_packet_with_as_many_items_as_it_may_have_ends_behind_a_whole_group() -> None:
    stream = SendStream(1, 100)
    stream.queue(range(1200), [size for _ in range(4) for size in (1, *[0] * 299)])
    assert [len(packet.items) for packet in stream._unsent] == [900, 300]
    stream.queue(range(1200, 2200), [1, *[0] * 999])
    assert [len(packet.items) for packet in stream._unsent] == [900, 300, 1000]


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
    assert stream.path.congestion_window == INITIAL_CONGESTION_WINDOW


def test_nothing_goes_beyond_the_edge_and_an_older_edge_is_ignored() -> None:
    stream = singles(100)
    stream.window_end = 6
    assert numbers(stream.poll(0.0)) == [1, 2, 3, 4, 5]
    stream.on_ack(0.01, 3, [], 5)
    assert numbers(stream.poll(0.01)) == [6, 7]
    stream.on_ack(0.02, 4, [], 0)
    assert stream.window_end == 8 and stream.poll(0.02) == []


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
    assert stream.path.timeout(stream.timeout_cap) == pytest.approx(min(wanted, MAX_TIMEOUT), rel=1e-4)


def test_each_timeout_doubles_the_next_one_up_to_the_cap() -> None:
    stream, now, gaps = singles(1), 0.0, []
    for _ in range(9):
        assert numbers(stream.poll(now)) == [1]
        assert stream.poll(stream.due() - 0.001) == []
        gaps.append(stream.due() - now)
        now = stream.due()
    assert gaps == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])
    assert stream.on_ack(now, 2, [], 4096) == 1
    assert stream.path.smoothed_rtt is None, "the ack of what was sent twice is no measurement (Karn)"
    assert stream.path.backoff == 100.0, "and so it says nothing of how long to wait"
    stream.queue(["x"], [1])
    assert numbers(stream.poll(now)) == [2]
    stream.on_ack(now + 0.3, 3, [], 4096)
    assert stream.path.backoff == 1.0 and stream.path.smoothed_rtt == pytest.approx(0.3)


@pytest.mark.parametrize("round_trip", [0.05, 0.12, 0.3, 0.8, 2.0])
def test_a_path_of_any_length_is_measured_and_hardly_anything_sent_twice(round_trip: float) -> None:
    stream, receiver = singles(2000), ReceiveStream(1)
    now, sent = 0.0, 0
    answers: list[tuple[float, protocol.Info]] = []
    while stream.pending and now < 200:
        for packet in stream.poll(now):
            sent += 1
            receiver.on_data(packet.first, packet.items)
            receiver.written(len(take(receiver)))
            answers.append((now + round_trip, receiver.ack()))
        now = min(stream.due(), answers[0][0] if answers else NEVER)
        while answers and answers[0][0] <= now:
            _, ack = answers.pop(0)
            stream.on_ack(now, ack["next"], ack["have"], ack["room"])
    assert not stream.pending and sent < 2100 and stream.path.smoothed_rtt == pytest.approx(round_trip)


def test_a_round_trip_is_measured_when_the_packet_arrived_and_not_again_when_next_passes_it() -> None:
    stream = singles(5)
    stream.poll(0.0)
    stream.on_ack(0.02, 1, [[2, 3]], 4096)      # 1 is lost on the way, 4 and 5 are late
    stream.poll(stream.due())
    stream.on_ack(0.3, 4, [], 4096)
    assert stream.path.smoothed_rtt == pytest.approx(0.02)


def test_an_ack_that_tells_again_what_a_lost_one_had_told_measures_nothing() -> None:
    stream = singles(9)
    stream.poll(0.0)                            # 5 is lost, and so is the ack that says 1 to 4 and 6 to 9
    assert numbers(stream.poll(stream.due())) == [1]
    stream.on_ack(0.4, 5, [[6, 9]], 4096)
    assert stream.path.smoothed_rtt is None, "6 to 9 did not take 0.4 s"
    assert numbers(stream.poll(0.4)) == [5]
    stream.on_ack(0.41, 10, [], 4096)
    stream.queue(["x"], [1])
    stream.poll(1.0)
    stream.on_ack(1.02, 11, [], 4096)
    assert stream.path.smoothed_rtt == pytest.approx(0.02)


def test_after_a_timeout_one_datagram_goes_out_and_the_window_starts_over() -> None:
    stream = singles(30)
    assert len(stream.poll(0.0)) == 10
    assert numbers(stream.poll(stream.due())) == [1]
    assert stream.path.congestion_window == 1.0 and stream.path.slow_start_threshold == 5.0


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
    assert stream._lost == 4 and stream.path.slow_start_threshold == 5.0 and stream.path.congestion_window < 10
    assert numbers(stream.poll(0.011)) == [1, 2, 3, 5]


def test_what_came_early_closes_nothing_and_is_not_sent_again() -> None:
    stream = singles(10)
    stream.poll(0.0)
    assert stream.on_ack(0.01, 1, [[2, 10]], 4096) == 0
    assert stream.pending == 10 and list(stream.pending_items())[0] == "1"
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
    """``keeps``: whether the receiver buffers the probe, or has no memory even for that."""
    stream, now, asked = singles(20), 0.01, []
    stream.window_end = 6
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
    assert stream.path.smoothed_rtt is None and stream.size == 26 * 900
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
    st.tuples(st.just("claim"), st.integers(1, 80), st.integers(1, 10)),
    st.tuples(st.just("give back"), st.integers(0, 10)),
    st.tuples(st.just("drop early")),
    st.tuples(st.just("ack"), st.booleans()),
), max_size=40)


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
        elif step == "claim":
            if stream.claim(*arguments):
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
            assert granted <= stream.window_end, "what was granted stays granted"
            granted = stream.window_end
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
            if stream.claim(starts[index], lengths[index]):
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
    assert stream.claim(3, 2)
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
    assert stream.claim(8, 1)
    take(stream)
    stream.written(0)
    stream.on_data(5, labels(5, 1))
    again = ReceiveStream(1, 9)
    again.restore(stream.snapshot())
    assert again.ack()["next"] == 4, "its sender has not said that it is done with 4"
    again.on_data(1, labels(1, 9))
    assert take(again) == labels(5, 3) + labels(9, 1)
    assert not again.claim(2, 1) and again.claim(4, 1), "4 was passed: it may come late, once"


def test_no_ack_says_that_what_mail_has_passed_over_is_written_before_its_sender_has_closed_it() -> None:
    stream = ReceiveStream(1)
    stream.advance(5, elsewhere=True)
    assert stream.claim(5, 1)
    take(stream)
    stream.all_written()
    for base, next_ in ((1, 1), (3, 3), (5, 6)):
        stream.on_data(base, labels(base, 1), (), base)
        assert stream.ack()["next"] == next_
    stream.on_data(6, labels(6, 1), (), 6)
    assert take(stream) == labels(6, 1)
    stream.written(1)
    assert stream.ack()["next"] == 7


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
    assert stream.ack(grow=False)["next"] + stream.ack(grow=False)["room"] == 1 + granted
    assert stream.ack()["room"] == granted
    stream.on_data(11 + granted - 1, ["last"])
    assert stream.buffered == 1
    stream.on_data(11 + granted, ["beyond"])
    assert stream.buffered == 1, "what is beyond the window is dropped"


def test_room_is_nothing_or_enough_for_the_longest_text() -> None:
    stream = ReceiveStream(1)
    stream.ack()
    for first in range(1, 4097, 512):
        stream.on_data(first, labels(first, 512))
    take(stream)
    stream.written(4096 - protocol.MAX_TEXT_PIECES)
    assert stream.ack(grow=False)["room"] == protocol.MAX_TEXT_PIECES
    stream.written(1)
    assert stream.ack(grow=False)["room"] == 0


def test_what_fills_the_gap_is_taken_however_much_came_early() -> None:
    stream = ReceiveStream(1)
    for first in [*range(2, 3074, 1024), *range(3, 3075, 1024)]:     # the same numbers in two packings
        stream.on_data(first, labels(first, 1024))
    stream.on_data(1, ["<1>"])
    assert take(stream)[0] == "<1>"


def test_early_items_are_counted_once_when_another_route_shows_one_between_them() -> None:
    stream = ReceiveStream(1)
    stream.claim(5, 1)
    stream.on_data(5, labels(5, 3))
    stream.on_data(4, labels(4, 6))
    stream.on_data(1, labels(1, 3))
    assert take(stream) == labels(1, 4) + labels(6, 4)
    assert stream.buffered == 0


def test_what_another_route_has_shown_stays_shown_when_what_was_taken_is_given_back() -> None:
    stream = ReceiveStream(1)
    assert stream.claim(2, 1)
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
