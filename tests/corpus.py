"""Datagrams that were really sent, and what becomes of them in hostile hands.

``record`` runs a small chat in the simulated world and gives every datagram of it. ``mutants`` gives as many
variations of such datagrams as asked for: flipped bits, cuts, splices, tags and fields of other types, huge
numbers. Both take everything from a seed.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgpack

from protocol import SCHEMA, Address
from tests.simulate import Node, Weather, World, unpack

TAGS = sorted(SCHEMA)
HUGE = (2 ** 31, 2 ** 32, 2 ** 53, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1, -1, -2 ** 63)
OTHERS: list[Any] = [None, True, 0, 1, 7, 1.5, float("nan"), float("inf"), "", "bob", "x" * 900, b"", b"s" * 16,
                     b"t" * 32, [], [[]], {}, {"a": {}}, [1, 2], ["a"], "\x1b[2J", "\n"]


def record(seed: int, nicks: Sequence[str] = ("alice", "bob", "carol")) -> list[bytes]:
    """Return every datagram of a run in which something of each kind is said."""
    world, recorded = World(seed), []
    world.network.weather = Weather(loss=0.1, delay=0.005, jitter=0.01)
    carry = world.network.send

    def send(node: Node, datagram: bytes, address: Address) -> None:
        recorded.append(datagram)
        carry(node, datagram, address)

    world.network.send = send   # type: ignore[method-assign]
    world.start_server()
    first, second, third = lives = [world.client(nick) for nick in nicks]
    world.run(3)
    for number in range(30):
        for life in lives:
            to = world.random.choice(nicks)
            life.type(f"send {to} {number}-{life.nick} " + "long " * world.random.choice((0, 3, 400)))
    world.run(3)
    third.type(f"dereg {third.nick}")
    world.run(1)
    first.type(f"send {third.nick} while-away of you")
    world.run(1)
    third.type(f"reg {third.nick}")
    world.run(2)
    second.crash()
    first.type(f"send {second.nick} after-your-death of you")
    world.run(2)
    world.network.block(first.nick, third.nick, 5)
    first.type(f"send {third.nick} around-the-gap to you")
    world.run(3)
    assert world.server is not None
    world.server.crash()
    world.start_server()
    world.run(20)
    for life in (first, third):
        life.end_input()
    world.run(3)
    return recorded


def mutants(datagrams: Sequence[bytes], random: Random, count: int) -> Iterator[bytes]:
    """Yield ``count`` variations of ``datagrams``."""
    ways: list[Callable[[bytes], bytes]] = [
        functools.partial(way, random) for way in (_flipped, _cut, _grown, _retagged, _retyped, _retyped, _enlarged)]
    ways.append(lambda datagram: _spliced(random, datagram, random.choice(datagrams)))
    ways.append(lambda datagram: (datagram + random.choice(datagrams))[:65535])
    for _ in range(count):
        datagram = random.choice(datagrams)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            datagram = random.choice(ways)(datagram)
        yield datagram


def _flipped(random: Random, datagram: bytes) -> bytes:
    data = bytearray(datagram)
    for _ in range(random.choice((1, 1, 4))):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(random: Random, datagram: bytes) -> bytes:
    return datagram[:random.randrange(len(datagram) + 1)]


def _grown(random: Random, datagram: bytes) -> bytes:
    return datagram + random.getrandbits(64).to_bytes(8, "big")


def _spliced(random: Random, one: bytes, other: bytes) -> bytes:
    return one[:random.randrange(len(one) + 1)] + other[random.randrange(len(other) + 1):]


def _retagged(random: Random, datagram: bytes) -> bytes:
    maps = unpack(datagram)
    for value in maps:
        if random.random() < 0.7:
            value["tag"] = random.choice(TAGS)
    return b"".join(map(msgpack.packb, maps)) if maps else datagram


def _retyped(random: Random, datagram: bytes) -> bytes:
    return _with_leaf(random, datagram, lambda: random.choice(OTHERS))


def _enlarged(random: Random, datagram: bytes) -> bytes:
    return _with_leaf(random, datagram, lambda: random.choice(HUGE))


def _with_leaf(random: Random, datagram: bytes, another: Callable[[], Any]) -> bytes:
    """Return the datagram with one value of one of its maps replaced."""
    maps = [value for value in unpack(datagram) if isinstance(value.get("info"), dict) and value["info"]]
    if not maps:
        return datagram
    place: Any = random.choice(maps)["info"]
    while True:
        key = random.choice(sorted(place, key=str)) if isinstance(place, dict) else random.randrange(len(place))
        if not (isinstance(place[key], (list, dict)) and place[key] and random.random() < 0.7):
            break
        place = place[key]
    place[key] = another()
    try:
        return b"".join(map(msgpack.packb, maps))
    except (ValueError, OverflowError):
        return datagram
