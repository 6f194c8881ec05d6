"""Conversations and the outbox on arguments alone: virtual time, and receivers that answer or are silent.

What needs chance takes it from a seed (``Random``) or from hypothesis. No test looks at a clock.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given, strategies as st

import protocol
from conversation import (CALLERS_KEPT, DIRECT, EXISTS, NO_ACK, POLLS_PER_TURN, QUEUE_LIMIT, RECEIVED,
                          RECIPIENT_OFFLINE, REFUSED, RELAY, SAVE, SAVED, SILENT, STUCK_TIMEOUT, Conversation, Event,
                          EventKind, Meetings, Outbox, Route)
from protocol import (MAX_DATAGRAM, NEVER, SERVER_ATTEMPTS, Address, Map, Place, bundle_room, contents, join_pieces,
                      pieces_of)
from stream import INITIAL_TIMEOUT, Account, Frames, ReceiveStream
from tests.test_protocol import LETTERS, SESSION, STREAM, decode
from tests.test_stream import RANGE, check_sender, some_texts, take

BOB: Address = ("192.0.2.1", 5000)
ELSEWHERE: Address = ("192.0.2.2", 6000)
BOB_ONLINE, BOB_OFFLINE = Place(True, BOB), Place(False, BOB)
Sent = list[tuple[Map, Address | None]]


class World:
    """A conversation, its clock, and receivers that answer for the recipient and for the server."""

    def __init__(self, place: Place | None = BOB_ONLINE) -> None:
        self.now = 1000.0
        self.conversation = Conversation("alice", "bob", STREAM)
        self.conversation.use(Account(SESSION))
        self.conversation.locate(self.now, place)
        self.receivers: dict[Route, ReceiveStream] = {}
        self.met: list[float] = []          # when the server was asked to introduce us

    def send(self, *texts: str, at: float = 1.0) -> None:
        self.conversation.send(self.now, texts, at)

    def poll(self, drained: bool = True) -> Sent:
        sent: Sent = []
        for datagram, address in self.conversation.poll(self.now, drained):
            assert len(datagram) <= protocol.MAX_DATAGRAM
            message, = decode(datagram)
            if message[0] == "meet":
                assert (message[1]["to"], message[1]["stream"], address) == ("bob", STREAM, None)
                self.met.append(self.now)
                continue
            assert message[0] == ("chat" if self.conversation.route == DIRECT else "save")
            assert message[1].get("relay", False) == (self.conversation.route == RELAY)
            assert (address is None) == (message[0] == "save")
            sent.append((message, address))
        assert not drained or self.conversation.due() > self.now, "a poll leaves nothing due"
        return sent

    def run(self, seconds: float) -> Sent:
        """Let time pass, poll by poll."""
        end, sent = self.now + seconds, self.poll()
        while self.conversation.due() <= end:
            self.now = max(self.now, self.conversation.due())
            sent += self.poll()
        self.now = end
        return sent

    def ack(self, next_: int, route: Route, room: int = 4096) -> None:
        self.conversation.on_ack(self.now, next_, [], room, route)

    def answer(self, sent: Sent) -> None:
        """Answer as receivers do that accept everything."""
        for (tag, info), _ in sent:
            route = DIRECT if tag == "chat" else SAVE
            receiver = self.receivers.setdefault(route, ReceiveStream(STREAM))
            receiver.on_data(info["n"], info["text"], info.get("more", ()), info["base"])
            receiver.advance(info["base"])
            receiver.written(len(take(receiver)))
            ack = receiver.ack()
            self.conversation.on_ack(self.now, ack["next"], ack["have"], ack["room"], route)

    def events(self) -> list[Event]:
        events = [event._replace(first=0, end=0) for event in self.conversation.events]
        self.conversation.events.clear()
        return events


def texts_of(sent: Sent) -> list[str]:
    """Return the texts in what was sent, each once, in the order of their numbers."""
    found = {info["n"] + index: text for (_, info), _ in sent for index, text in enumerate(info["text"])}
    more = {number for (_, info), _ in sent for number in info.get("more", ())}
    assert sorted(found) == list(range(min(found), max(found) + 1))
    return join_pieces(min(found), [found[number] for number in sorted(found)], more)


def addresses(sent: Sent) -> set[Address | None]:
    return {address for _, address in sent}


def saving() -> World:
    """Return a world in which one message was not answered by the recipient and went to the server."""
    world = World()
    world.send("hello")
    world.run(0.5)
    assert world.events() == [Event(NO_ACK, 1)]
    return world


def test_every_datagram_leaves_room_for_encryption() -> None:
    rooms = {}
    for is_sealed in (False, True):
        for place in (BOB_ONLINE, BOB_OFFLINE):
            conversation = Conversation("alice", "bob", STREAM)
            conversation.use(Account(SESSION, is_sealed))
            conversation.locate(1.0, place)
            conversation.send(1.0, ["hello"], 1.0)
            rooms[place, is_sealed] = conversation.stream.capacity
    for place in (BOB_ONLINE, BOB_OFFLINE):
        assert rooms[place, True] == rooms[place, False] - 30


class Seal:
    """What seals nothing, but is as long as what does; it notes what would be sealed with each nonce."""

    key, name, envelope = bytes(32), bytes(8), bytes(48)

    def __init__(self) -> None:
        self.sealed: dict[tuple[int, int], bytes] = {}

    def seal(self, first: int, times: Sequence[Sequence[Any]], texts: Sequence[str],
             continued: Collection[int]) -> bytes:
        found = contents(texts, times, [n for n in range(first - 1, first + len(texts)) if n in continued])
        assert self.sealed.setdefault((len(texts), first), found) == found, "one nonce, one content"
        return len(texts).to_bytes(2, "little") + bytes(16) + found


@given(st.lists(st.tuples(st.lists(st.text("xé", max_size=70), min_size=1, max_size=40), st.floats(0, 2e9),
                          st.sampled_from([1, 9, 40]), st.booleans(), st.integers(0, 9)), min_size=1, max_size=9),
       st.sampled_from(["b", "a" * 32, "\U00010400" * 24]))
def test_what_is_sealed_for_the_server_fits_into_a_datagram_and_into_a_mail(
        calls: list[tuple[list[str], float, int, bool, int]], nick: str) -> None:
    conversation, seal, texts = Conversation(nick, nick, STREAM), Seal(), dict[int, str]()
    is_sealing = [False]

    def guard(frames: Frames, is_direct: bool) -> str:
        frames.letters = seal if is_sealing[0] else None
        return ""

    conversation.use(Account(SESSION, True))
    conversation.locate(1.0, BOB_OFFLINE)
    said, now = list[str](), 1.0
    for words, at, times, is_sealing[0], acked in calls:
        said += [text * times for text in words]
        conversation.send(now, said[-len(words):], at)
        now += 10.0     # what was not acked goes out again
        for datagram, _ in conversation.poll(now, True, guard) if acked % 2 else ():
            assert len(datagram) <= MAX_DATAGRAM - 30
            info, = [info for _, info in decode(datagram)]
            found = info["text"]
            if "envelope" in info:
                assert len(found) <= bundle_room(nick)
                found = msgpack.unpackb(found[18:])[0]
            texts.update(enumerate(found, info["n"]))
        conversation.on_ack(now, conversation.stream.base + acked, [], 4096, SAVE)
    pieces, _ = pieces_of(said, 1)
    assert all(pieces[number - 1] == text for number, text in texts.items())


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
    world.conversation.frames.me = world.conversation.frames.peer = "日" * 32
    stream = world.conversation.stream
    stream.base = stream.end = stream.top = 2 ** 62     # numbers take the most bytes
    while texts:
        world.send(*texts[:200])
        received += texts[:200]
        del texts[:200]
    sent: Sent = []
    while world.conversation.pending:
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
    world.poll(drained=False)
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
    assert world.events() == [] and world.conversation.route == DIRECT and len(world.conversation.texts()) == 1


def test_for_somebody_offline_the_server_is_asked_at_once_and_each_message_says_so_once() -> None:
    world = World(BOB_OFFLINE)
    world.send("a")
    world.send("b", "c")
    assert world.events() == [Event(RECIPIENT_OFFLINE, 1), Event(RECIPIENT_OFFLINE, 2)]
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
    assert world.events() == [Event(RECIPIENT_OFFLINE, 1)] and texts_of(world.poll()) == ["a"]


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


def test_when_a_text_was_sent_is_forgotten_once_all_is_closed() -> None:
    times = World().conversation.frames.times
    for number in range(1, 5):
        times.add(number, number / 2, base=max(1, number - 2))
    assert times.changes(1, 10) == [1, 2, 3, 4], "some are pending"
    times.add(5, 2.5, base=5)
    assert times.changes(1, 10) == [5]


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
    assert world.events() == [] and len(world.conversation.texts()) == 1
    world.conversation.server_heard(world.now)
    assert not world.conversation.stuck
    world.answer(world.poll())
    assert world.events() == [Event(SAVED, 1)] and not world.conversation.pending


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
def test_a_late_ack_from_the_other_route_counts(route: Route, kind: EventKind) -> None:
    world = saving()
    if route == SAVE:
        world.poll()
        world.conversation.on_exists(world.now, 1, BOB)
        world.events()
    world.ack(2, route)
    assert world.events() == [Event(kind, 1)] and len(world.conversation.texts()) == 0


def test_a_late_ack_before_the_new_route_was_used_does_not_make_its_datagrams_too_large() -> None:
    world = World()
    world.send(*["a"] * 10, "x" * 690)
    world.poll()
    world.conversation.locate(world.now, None)
    world.ack(11, DIRECT)
    world.send("y" * 690)
    assert texts_of(world.poll()) == ["x" * 690, "y" * 690]


def test_a_refusal_that_comes_when_nothing_is_pending_makes_nothing_stuck() -> None:
    world = World()
    world.send("a")
    world.poll()
    world.ack(2, DIRECT)
    world.run(STUCK_TIMEOUT + 1)
    world.conversation.on_nack(world.now, 2, 2, "not-me", DIRECT)
    assert not world.conversation.stuck and not world.conversation.pending


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
    """Check what must always hold: each message is either closed or pending, and the counters say how many."""
    closing = (RECEIVED, SAVED, REFUSED)
    closed = sum(event.messages for event in events if event.kind in closing)
    conversation = world.conversation
    assert all(event.messages > 0 for event in events)
    assert conversation.texts() == messages[closed:]
    assert (conversation.stream.size == 0) == (not conversation.pending)
    assert not (conversation.stuck and not conversation.pending)
    check_sender(conversation.stream)


@given(CONVERSATION_STEPS)
def test_each_message_closes_exactly_once_whatever_happens_in_between(steps: list[Any]) -> None:
    world, messages, events = World(), [], []
    told = {NO_ACK: 0, RECIPIENT_OFFLINE: 0, EXISTS: 0}    # of how many of the messages
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
    assert not conversation.pending and conversation.due() == NEVER
    check_conversation(world, messages, events + world.events())


def test_an_event_tells_from_which_number_on_its_messages_are() -> None:
    world = World()
    world.send("a", "b", "x" * 2000, "c")
    world.poll()
    world.conversation.on_ack(0.0, 3, [], 4096, DIRECT)
    world.conversation.on_nack(0.1, 3, 9, "not-me", DIRECT)
    world.send("d")
    world.conversation.on_ack(0.2, 6, [], 4096, SAVE)
    assert world.conversation.events == [Event(RECEIVED, 2, "", 1, 3), Event(NO_ACK, 2, "", 3, 7),
                                         Event(SAVED, 1, "", 3, 6)]


class Neighbours:
    """A table in which everybody can be reached, and is behind the same router."""

    def reach(self, host: str, port: int) -> Address | None:
        return host, port

    def are_behind_one_router(self, nick: str) -> bool:
        return True


def test_those_who_call_in_our_own_network_are_remembered_up_to_a_limit() -> None:
    knocked: list[Address] = []
    meetings = Meetings(lambda datagram, address: knocked.append(address), Outbox("me"), Neighbours(),
                        lambda: ("192.168.1.2", 5), lambda: (), lambda: 0.0)
    for number in range(2 * CALLERS_KEPT):
        meetings.on_call({"from": f"n{number}", "stream": 7, "host": "192.0.2.1", "port": 5,
                          "own": ["192.168.1.3", number + 1]})
    assert knocked[-2:] == [("192.0.2.1", 5), ("192.168.1.3", 2 * CALLERS_KEPT)]
    assert len(meetings._beside) == CALLERS_KEPT
    assert meetings.admits(f"n{CALLERS_KEPT}", ("192.168.1.3", CALLERS_KEPT + 1))
    assert not meetings.admits("n0", ("192.168.1.3", 1))


# --- outboxes -------------------------------------------------------------------------------------------------

def outbox_with(nicks: Sequence[str], online: bool = True) -> Outbox:
    """Return an outbox in which one message waits for each of ``nicks``."""
    outbox = Outbox("alice")
    for number, nick in enumerate(nicks, 1):
        outbox.open(0.0, nick, Place(online, ("127.0.0.1", number)), number)
        outbox.send(0.0, nick, ["hello"], 0.0)
    return outbox


def ack_of(stream: int, next_: int) -> dict[str, Any]:
    return {"stream": stream, "next": next_, "have": [], "room": 4096}


# --- two behind routers ---------------------------------------------------------------------------------------

def test_the_server_is_asked_to_introduce_us_once_in_each_silence_and_never_on_an_open_path() -> None:
    world = World()
    for number in range(3):
        world.send(f"answered {number}")
        world.answer(world.poll())
    assert world.met == []
    world.send("not answered")
    began = world.now
    world.run(0.45)
    assert len(world.met) == 1 and world.met[0] - began <= INITIAL_TIMEOUT
    world.ack(5, DIRECT)
    world.send("again not answered")
    world.run(0.45)
    assert len(world.met) == 2


def test_after_a_knock_what_is_pending_is_sent_again_at_once_and_a_second_knock_does_nothing() -> None:
    world = World()
    world.send("hello")
    world.run(0.12)
    world.events()
    world.now += 0.01
    assert world.poll() == []
    world.conversation.on_knock(world.now, BOB)
    assert texts_of(world.poll()) == ["hello"]
    world.conversation.on_knock(world.now, BOB)
    assert world.poll() == []


def test_a_knock_that_nobody_asked_for_does_nothing() -> None:
    world = World()
    world.send("hello")
    world.poll()
    world.now += 0.01
    world.conversation.on_knock(world.now, BOB)
    world.conversation.on_knock(world.now, ELSEWHERE)
    assert world.poll() == [] and world.conversation.reach.beside is None


def test_without_a_knock_the_same_address_is_not_tried_twice_and_another_one_is() -> None:
    for address, knocks, knocked, route in ((BOB, True, False, RELAY), (BOB, True, True, DIRECT),
                                            (BOB, False, False, DIRECT), (ELSEWHERE, True, False, DIRECT)):
        world = World()
        world.send("hello")
        world.run(0.3)
        if knocked:
            world.conversation.on_knock(world.now, BOB)
        world.run(0.3)
        assert world.conversation.route == SAVE
        world.conversation.on_exists(world.now, 1, address, knocks)
        assert world.conversation.route == route, (address, knocks, knocked)


def test_a_path_that_fails_again_and_again_is_tried_ever_more_rarely_until_it_works() -> None:
    world, tried = World(), []
    world.send("hello")
    for _ in range(7):
        world.run(0.6)
        world.conversation.on_exists(world.now, 1, BOB, True)
        assert world.conversation.route == RELAY
        relayed = world.now
        while world.conversation.route == RELAY:
            world.run(1)
            world.ack(1, SAVE)
        tried.append(round(world.now - relayed, -1))
    assert tried == [60, 120, 240, 480, 600, 600, 600]
    world.ack(2, DIRECT)
    world.send("and now")
    world.run(0.6)
    world.conversation.on_exists(world.now, 2, BOB, True)
    assert world.now + 59 < world.conversation.reach.closed_until < world.now + 61


def test_what_comes_straight_from_a_recipient_ends_its_relay_at_once_but_only_once_after_each_failure() -> None:
    world = World()
    world.send("hello")
    world.run(0.6)
    world.conversation.on_exists(world.now, 1, BOB, True)
    assert world.conversation.route == RELAY
    world.conversation.on_knock(world.now, BOB)
    assert world.conversation.route == DIRECT and addresses(world.poll()) == {BOB}


def test_a_recipient_in_our_own_network_is_reached_there_until_that_fails() -> None:
    world = World()
    world.send("hello")
    world.run(0.2)
    world.conversation.on_knock(world.now, ELSEWHERE)
    assert addresses(world.poll()) == {ELSEWHERE}
    world.ack(2, DIRECT)
    world.send("and again")
    assert addresses(world.poll()) == {ELSEWHERE}
    world.run(0.6)
    world.conversation.on_exists(world.now, 2, BOB, True)
    assert addresses(world.poll()) == {BOB}, "an address that was not tried"


def polled(outbox: Outbox, now: float) -> list[Address | None]:
    """Return where an outbox sends to."""
    return [address for _, datagrams in outbox.poll(now) for _, address in datagrams]


def test_an_outbox_sends_to_whom_something_happened_and_to_whom_it_is_time() -> None:
    outbox = outbox_with(["bob", "carol"])
    assert polled(outbox, 0.0) == [("127.0.0.1", 1), ("127.0.0.1", 2)]
    assert polled(outbox, 0.01) == []
    assert outbox.due() == INITIAL_TIMEOUT
    repeated = [address for address in polled(outbox, outbox.due()) if address is not None]
    assert repeated == [("127.0.0.1", 1), ("127.0.0.1", 2)]


def test_an_outbox_looks_after_so_many_in_one_go_and_after_the_others_at_once() -> None:
    outbox = outbox_with([f"n{number}" for number in range(3 * POLLS_PER_TURN // 2)])
    assert len(polled(outbox, 0.0)) == POLLS_PER_TURN
    assert outbox.due() <= 0.0
    assert len(polled(outbox, 0.0)) == POLLS_PER_TURN // 2
    assert outbox.due() > 0.0


def test_an_outbox_takes_an_ack_only_from_where_the_stream_goes_or_from_the_server() -> None:
    outbox = outbox_with(["bob", "carol"])
    polled(outbox, 0.0)
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 2))
    outbox.on_ack(0.1, ack_of(3, 2), ("127.0.0.1", 1))
    assert outbox.pop_events() == []
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.on_ack(0.1, ack_of(2, 2), None)
    assert outbox.pop_events() == [
        ("bob", [Event(RECEIVED, 1, "", 1, 2)]), ("carol", [Event(SAVED, 1, "", 1, 2)])]
    outbox.recount()
    assert not list(outbox.undelivered()) and outbox.is_settled


def test_what_waits_for_a_silent_server_leaves_room_for_those_who_are_there() -> None:
    outbox = outbox_with(["bob"], online=False)
    outbox.send(0.0, "bob", ["x"] * QUEUE_LIMIT, 0.0)
    outbox.open(0.0, "carol", Place(True, ("127.0.0.1", 2)), 8)
    outbox.open(0.0, "dave", Place(False, None), 9)
    assert outbox.is_full and [outbox.room(0.0, nick) for nick in ("bob", "carol", "dave")] == [0, 0, 0]
    assert not outbox.is_stuck(0.0, "bob")
    outbox.note_server(is_silent=True)
    for nick in ("bob", "dave"):
        assert outbox.is_stuck(0.0, nick) and outbox.room(0.0, nick) == 0, "a send to them fails at once"
    assert not outbox.is_full and outbox.room(0.0, "carol") == QUEUE_LIMIT
    assert len(list(outbox.undelivered())) == 1 + QUEUE_LIMIT


def test_an_outbox_forgets_who_has_nothing_waiting_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.CONVERSATIONS_KEPT", 2)
    outbox = outbox_with(["bob", "carol"])
    polled(outbox, 0.0)
    outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.pop_events()
    outbox.recount()
    outbox.open(0.1, "dave", Place(True, ("127.0.0.1", 3)), 3)
    outbox.send(0.1, "dave", ["hello"], 0.0)
    assert set(outbox.conversations) == {"carol", "dave"}
    outbox.open(0.2, "bob", Place(True, ("127.0.0.1", 1)), 4)
    outbox.send(0.2, "bob", ["again"], 0.0)
    assert ("127.0.0.1", 1) in polled(outbox, 0.2)
    assert ("127.0.0.1", 1) in polled(outbox, 0.2 + INITIAL_TIMEOUT), "it is repeated in time"


def test_an_ack_that_comes_twice_does_not_settle_what_is_sent_to_whoever_was_forgotten_meanwhile(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.CONVERSATIONS_KEPT", 2)
    outbox = outbox_with(["bob", "carol"])
    for _ in range(2):
        polled(outbox, 0.0)
        outbox.pop_events()
        outbox.recount()
        outbox.on_ack(0.1, ack_of(1, 2), ("127.0.0.1", 1))
    outbox.open(0.1, "dave", Place(True, ("127.0.0.1", 3)), 3)      # bob gives way, and in the same turn ...
    outbox.send(0.1, "dave", ["hello"], 0.0)
    outbox.open(0.1, "bob", Place(True, ("127.0.0.1", 1)), 4)
    outbox.send(0.1, "bob", ["again"], 0.0)
    polled(outbox, 0.1)
    assert outbox.pop_events() == []
    outbox.recount()
    assert ("bob", "again", 1) in outbox.undelivered()


def test_messages_that_change_their_route_while_the_server_is_silent_count_as_stuck_at_once() -> None:
    outbox, now = Outbox("alice"), 0.0
    outbox.open(now, "bob", Place(True, ("192.0.2.1", 9)), 7)
    outbox.send(now, "bob", ["text"] * QUEUE_LIMIT, now)
    kinds: list[EventKind] = []

    def poll() -> None:
        polled(outbox, now)
        kinds.extend(event.kind for _, events in outbox.pop_events() for event in events)
        outbox.recount()
    poll()
    now = 0.6
    poll()
    outbox.on_exists(now, {"stream": 7, "n": 1, "version": 1, "entry": ["bob", "192.0.2.1", 9, "online"]},
                     ("192.0.2.1", 9))
    poll()
    outbox.note_server(is_silent=True)
    assert outbox.is_full and not outbox.is_stuck(now, "bob"), "they go straight to bob"
    now = 1.3
    poll()
    assert kinds == [NO_ACK, EXISTS], "it was said already that they go to the server"
    assert outbox.is_stuck(now, "bob") and not outbox.is_full
