"""A second client, written from docs/protocol.md alone, against the real server and the real client."""
from __future__ import annotations

import ast
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import second_client
from tests.processes import OFFLINE, SAVED, Chat, is_offline, received, sends, shown_once
from tests.second_client import SecondClient

FILE = Path(second_client.__file__)
LINES = 300
PATIENCE = 120.0        # s; for what takes many attempts
LONG = "".join(random.Random(1).choices("aß€𝄞z", k=2300))       # about 5000 bytes
WIDE = LONG[:300]       # about 650 bytes: in one piece


class Lossy:
    """A socket that loses a part of what it sends and of what it receives."""

    def __init__(self, real: socket.socket, loss: float, seed: int) -> None:
        self.real = real
        self.loss = loss
        self.random = random.Random(seed)
        self.largest = 0        # bytes of the largest datagram sent

    def fileno(self) -> int:
        """For select."""
        return self.real.fileno()

    def close(self) -> None:
        """Ends it."""
        self.real.close()

    def sendto(self, data: bytes, address: tuple[str, int]) -> int:
        """Sends, or loses."""
        self.largest = max(self.largest, len(data))
        return len(data) if self.random.random() < self.loss else self.real.sendto(data, address)

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        """Receives what is not lost."""
        while True:
            found = self.real.recvfrom(size)
            if self.random.random() >= self.loss:
                return found


class World(Chat):
    """A chat in which second clients take part, too; they live in the process of the test."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.seconds: list[SecondClient] = []
        self.lines: dict[SecondClient, list[str]] = {}

    def second(self, nick: str, loss: float = 0.0) -> SecondClient:
        """Starts a second client; it is online."""
        lines: list[str] = []
        client = SecondClient(nick, ("127.0.0.1", self.port), lines.append)
        if loss:
            setattr(client, "socket", Lossy(client.socket, loss, len(self.seconds)))
        self.seconds.append(client)
        self.lines[client] = lines
        self.wait(lambda: client.may_send, f"{nick} to be online")
        return client

    def wait(self, condition: Callable[[], bool], what: str, deadline: float = PATIENCE) -> None:
        """Waits until ``condition`` holds, while the second clients work."""
        def steps() -> bool:
            for _ in range(20):
                for client in self.seconds:
                    client.step(0.001)
                if condition():
                    return True
            return False

        try:
            self.until(steps, what, deadline)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{[(lines[-20:], vars(c)) for c, lines in self.lines.items()]}") from None

    def sees(self, client: SecondClient, nick: str, state: str) -> None:
        """Waits until ``nick`` is in that state in the table of a second client."""
        self.wait(lambda: client.table.get(nick, [None] * 4)[3] == state, f"{nick} to be {state}")

    def leaves(self, client: SecondClient) -> None:
        """Lets a second client go offline."""
        client.leave()
        self.wait(lambda: client.state == "offline", f"{client.nick} to be offline")
        assert self.lines[client][-1] == "[Offline]"


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with world:
        yield world
    for client in world.seconds:
        client.socket.close()


def without_time(lines: list[str]) -> list[str]:
    """The lines, as if mail had come directly."""
    return [re.sub(r"^(\S+): <[^>]*\d\d:\d\d:\d\d[^>]*> ", r"\1: ", line) for line in lines]


def test_it_holds_the_same_table_as_the_real_client(chat: World) -> None:
    x = chat.client("x")
    chat.absent("y")
    c = chat.second("c")
    x.wait_for("c")
    x.wait_for("y", "offline")
    chat.sees(c, "y", "offline")
    assert {nick: (f"{host}:{port}", state) for nick, host, port, state in c.table.values()} == x.roster()
    chat.client("z")        # a change
    x.wait_for("z")
    chat.sees(c, "z", "online")
    assert {nick: (f"{host}:{port}", state) for nick, host, port, state in c.table.values()} == x.roster()


def test_it_chats_both_ways_with_receipts(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    chat.sees(c, "x", "online")
    x.wait_for("c")
    assert c.send("x", "hello  x") and not c.send("nobody", "hello")
    chat.wait(lambda: "c: hello  x" in x.lines and received("x") in chat.lines[c], "the message and its receipt")
    x.feed("send c hello\tc\n")
    chat.wait(lambda: received("c") in x.lines, "the receipt")
    assert chat.lines[c][-1] == "x: hello\tc"


def test_200_texts_come_each_way_in_order(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    chat.sees(c, "x", "online")
    x.wait_for("c")
    texts = [f"text {i}" for i in range(200)]
    x.feed(sends("c", texts))
    assert all(c.send("x", text) for text in texts)
    chat.wait(lambda: x.lines.count(received("c")) == 200 and chat.lines[c].count(received("x")) == 200, "all receipts")
    chat.wait(lambda: "c: text 199" in x.lines, "the last text")
    assert shown_once(chat.lines[c], [f"x: {text}" for text in texts])
    assert shown_once(x.lines, [f"c: {text}" for text in texts])


def test_a_text_to_somebody_offline_is_kept_and_shown_when_they_are_back(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    x.feed("dereg x\n")
    x.see(OFFLINE)
    chat.sees(c, "x", "offline")
    assert c.send("x", "welcome back") and c.send("x", WIDE)
    chat.wait(lambda: chat.lines[c].count("[Message kept for x.]") == 2, "both to be kept")
    x.feed("reg x\n")
    chat.wait(lambda: {"c: welcome back", f"c: {WIDE}"} <= set(without_time(x.lines)), "both messages")
    chat.sees(c, "x", "online")
    assert c.send("x", "and now directly")
    chat.wait(lambda: received("x") in chat.lines[c] and "c: and now directly" in x.lines, "message and receipt")
    assert shown_once(without_time(x.lines), ["c: welcome back", f"c: {WIDE}", "c: and now directly"])


def test_a_text_to_somebody_who_does_not_answer_goes_to_the_server(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    chat.sees(c, "x", "online")
    x.kill()
    assert c.send("x", "are you there?")
    chat.wait(lambda: "[Message kept for x.]" in chat.lines[c], "the message to be kept")
    chat.sees(c, "x", "offline")        # the server has asked x
    again = chat.client("x")
    chat.wait(lambda: "c: are you there?" in without_time(again.lines), "the message")


def test_it_takes_the_mail_that_has_waited(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    x.wait_for("c")
    chat.leaves(c)
    x.wait_for("c", "offline")
    for text in ("one", LONG, "three"):
        x.feed(f"send c {text}\n")
        x.see(is_offline("c"), SAVED)
    new = chat.second("c")              # another run of the program
    x.wait_for("c")
    assert without_time(chat.lines[new])[-4:] == ["x: one", f"x: {LONG}", "x: three", "[Online]"]
    x.feed("send c four\n")             # the stream goes on at a number that this run has not seen
    chat.wait(lambda: received("c") in x.lines, "the receipt")
    assert chat.lines[new][-1] == "x: four"
    chat.leaves(new)
    new.register()                      # the mail was acked: it does not come again
    chat.wait(lambda: new.may_send, "c to be online again")
    assert shown_once(without_time(chat.lines[new]), ["x: one", f"x: {LONG}", "x: three", "x: four"])


def test_a_long_text_comes_whole_and_what_takes_several_numbers_is_not_sent(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    chat.sees(c, "x", "online")
    x.wait_for("c")
    x.feed(f"send c {LONG}\n")
    assert c.send("x", WIDE) and c.send("x", "b" * 768) and not c.send("x", "b" * 769)
    chat.wait(lambda: received("c") in x.lines and chat.lines[c].count(received("x")) == 2, "the receipts")
    assert f"x: {LONG}" in chat.lines[c] and shown_once(x.lines, [f"c: {WIDE}", "c: " + "b" * 768])


def test_it_deregisters_and_others_see_it_offline(chat: World) -> None:
    x, c = chat.client("x"), chat.second("c")
    x.wait_for("c")
    chat.leaves(c)
    x.wait_for("c", "offline")
    assert not c.send("x", "too late")


def test_two_of_them_with_a_lossy_network(chat: World) -> None:
    c, d = chat.second("c", 0.2), chat.second("d", 0.2)
    chat.sees(c, "d", "online")
    texts = [f"text {i}" for i in range(20)] + [WIDE]
    assert all(c.send("d", text) and d.send("c", text) for text in texts)
    for one, other in ((c, d), (d, c)):
        wanted = [f"{other.nick}: {text}" for text in texts]
        chat.wait(lambda: set(wanted) <= set(without_time(chat.lines[one])), f"all messages for {one.nick}")
        assert shown_once(without_time(chat.lines[one]), wanted)
        assert isinstance(one.socket, Lossy) and one.socket.largest <= 1200


def test_it_comes_back_after_a_restart_of_the_server(chat: World) -> None:
    server, x, c = chat.server(), chat.client("x"), chat.second("c")
    chat.sees(c, "x", "online")
    boot = c.boot
    server.kill()
    server.wait()
    chat.restart()
    chat.wait(lambda: c.boot != boot and c.table.get("x", [None] * 4)[3] == "online", "c and x to be back")
    x.wait_for("c")
    assert c.send("x", "still there?")
    chat.wait(lambda: "c: still there?" in without_time(x.lines), "the message")


def test_it_chats_with_itself(chat: World) -> None:
    c = chat.second("c")
    assert c.send("c", "to myself")
    chat.wait(lambda: "c: to myself" in chat.lines[c] and received("c") in chat.lines[c], "its own message")


def test_it_is_independent_and_small() -> None:
    source = FILE.read_text()
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            modules.add(node.module.partition(".")[0])
    assert modules <= {"msgpack", *sys.stdlib_module_names}
    assert len(source.splitlines()) <= LINES
