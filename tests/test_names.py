"""Names: every address of one is tried, and one is looked up again while its server is silent.

First the rules alone, then the process that looks a name up, then clients as a user starts them. What names mean is
said by a hosts file of the test's own, in a mount namespace; where that is not permitted, those tests are skipped.
"""
from __future__ import annotations

import functools
import os
import re
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import loop as loop_module
import udpchat
from protocol import Address
from loop import (ATTEMPTS, LOOK_UP_INTERVAL, MAX_ADDRESSES, MAX_LOOK_UP_INTERVAL, Endpoint, Failure, LookUpFailure,
                  NameLookUp, Random, Scheduler, SelectorLoop, Usage, client_socket, in_turns)
from tests.processes import (DEADLINE, EXITING, NOT_RESPONDING, PROGRAM, ROOT, WELCOME, Chat, Process, has_ipv6,
                             received)

ONE, TWO, THREE = ("192.0.2.1", 4119), ("192.0.2.2", 4119), ("2001:db8::3", 4119)
FAR = ("198.51.100.9", 4119)


# --- which addresses, and when --------------------------------------------------------------------------------

class Clock(Scheduler):
    """A loop whose time is set by hand."""

    def __init__(self) -> None:
        super().__init__(1000.0)
        self.random: Random = random.Random(1)
        self.clock = self.wall = self.now

    def pass_time(self, seconds: float) -> None:
        self._now += seconds


class Names:
    """A look-up that is finished by hand."""

    def __init__(self) -> None:
        self.asked: list[Callable[[Sequence[Address]], None]] = []

    def __call__(self, done: Callable[[Sequence[Address]], None]) -> None:
        self.asked.append(done)

    def answer(self, *addresses: Address) -> None:
        self.asked[-1](addresses)


def test_the_families_take_turns_ipv4_first_each_address_once_and_not_too_many() -> None:
    six = [(f"2001:db8::{number}", 1) for number in range(20)]
    assert in_turns([*six[:2], ONE, ONE, TWO]) == [ONE, six[0], TWO, six[1]]
    assert in_turns([*six, ONE]) == [ONE, *six[:MAX_ADDRESSES - 1]]
    assert in_turns([]) == []


def test_the_first_address_is_asked_alone_then_all_and_the_one_that_answered_comes_first() -> None:
    server = Endpoint(Clock(), [ONE, TWO, THREE])
    assert [list(server.to_ask(attempt, is_lost=False)) for attempt in (1, 2, 5)] == [[ONE]] + 2 * [[ONE, TWO, THREE]]
    assert server.current == server.other == ONE
    server.found(THREE)
    assert server.current == server.other == THREE, "where it was never found it does not count as the server"
    assert list(server.to_ask(1, is_lost=False)) == [THREE]
    assert list(server.to_ask(2, is_lost=False)) == [THREE, ONE, TWO]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_address_of_a_peer_that_is_lost_is_asked_once_in_a_round(count: int) -> None:
    addresses = [(f"192.0.2.{number}", 1) for number in range(count)]
    server = Endpoint(Clock(), addresses)
    asked = [address for attempt in range(1, ATTEMPTS + 1) for address in server.to_ask(attempt, is_lost=True)]
    assert sorted(asked) == addresses


def test_a_peer_that_answers_from_elsewhere_is_asked_there_and_remembered_where_it_was_asked() -> None:
    server = Endpoint(Clock(), [ONE])
    server.found(FAR)
    assert (server.current, server.other) == (FAR, ONE) and server.addresses == [FAR, ONE]
    server.found(TWO)
    assert (server.current, server.other) == (TWO, FAR) and server.addresses == [TWO, ONE]


def test_a_name_is_looked_up_while_its_peer_does_not_answer_and_only_then() -> None:
    clock, names = Clock(), Names()
    server = Endpoint(clock, [ONE], names)
    server.to_ask(2, is_lost=False)
    assert not names.asked, "it was looked up just now"
    clock.pass_time(LOOK_UP_INTERVAL)
    server.to_ask(1, is_lost=False)
    assert not names.asked, "the first attempt may be answered"
    server.to_ask(2, is_lost=False)
    server.to_ask(3, is_lost=False)
    server.to_ask(1, is_lost=True)
    assert len(names.asked) == 1, "one at a time"


def test_look_ups_become_rare_and_are_frequent_again_after_the_peer_was_found() -> None:
    clock, names = Clock(), Names()
    asked: list[float] = []
    server = Endpoint(clock, [ONE], names)

    def be_lost(seconds: int) -> None:
        for _ in range(seconds):
            clock.pass_time(1.0)
            server.to_ask(1, is_lost=True)
            if len(names.asked) > len(asked):
                asked.append(clock.now())
                names.answer()
    be_lost(600)
    gaps = [later - earlier for earlier, later in zip(asked, asked[1:])]
    assert min(gaps) >= 0.75 * LOOK_UP_INTERVAL and max(gaps) <= 1.25 * MAX_LOOK_UP_INTERVAL + 1
    assert gaps[0] < 1.25 * LOOK_UP_INTERVAL + 1 and min(gaps[5:]) >= 0.75 * MAX_LOOK_UP_INTERVAL
    server.found(ONE)
    del asked[:-1]
    be_lost(60)
    assert asked[2] - asked[1] <= 1.25 * LOOK_UP_INTERVAL + 1


def test_new_addresses_replace_those_of_the_name_but_not_where_the_peer_was_found() -> None:
    clock, names = Clock(), Names()
    server = Endpoint(clock, [ONE, TWO], names)
    server.found(ONE)
    clock.pass_time(60)
    server.to_ask(1, is_lost=True)
    names.answer(THREE, FAR)
    assert server.addresses == [ONE, FAR, THREE] and server.current == ONE
    clock.pass_time(60)
    server.to_ask(1, is_lost=True)
    names.answer()
    assert server.addresses == [ONE, FAR, THREE], "a look-up that fails changes nothing"
    server.found(FAR)
    assert server.addresses == [FAR, THREE]


def test_one_that_was_never_found_is_asked_only_where_its_name_leads_now() -> None:
    clock, names = Clock(), Names()
    server = Endpoint(clock, [ONE], names)
    clock.pass_time(60)
    server.to_ask(2, is_lost=False)
    names.answer(TWO)
    assert server.addresses == [TWO] and server.current == server.other == TWO


def test_numbers_are_never_looked_up() -> None:
    clock = Clock()
    server = Endpoint(clock, [ONE])
    clock.pass_time(3600)
    assert list(server.to_ask(1, is_lost=True)) == [ONE]


# --- the process that looks up --------------------------------------------------------------------------------

HANGS = "import time; time.sleep(1000)"


@pytest.fixture(name="loop")
def real_loop() -> Iterator[SelectorLoop]:
    loop = SelectorLoop()
    yield loop
    loop.close()


def descriptors() -> set[str]:
    """Return the descriptors of this process (Linux only; elsewhere none)."""
    return set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()


def turn_until(loop: SelectorLoop, condition: Callable[[], bool]) -> None:
    """Let the loop turn until something is so."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        loop.call_at(loop.now() + 0.05, lambda: None)
        loop.turn()


def look_up(loop: SelectorLoop, host: str, family: int = socket.AF_INET6) -> list[Address]:
    """Return what is found, once the process is gone."""
    found: list[Sequence[Address]] = []
    names = NameLookUp(loop, host, 4119, family)
    names(found.append)
    turn_until(loop, lambda: bool(found) and names._process is None)
    assert len(found) == 1
    return list(found[0])


def test_a_name_is_looked_up_in_a_process_that_leaves_nothing_behind(loop: SelectorLoop) -> None:
    look_up(loop, "localhost")
    before = descriptors()
    assert ("127.0.0.1", 4119) in look_up(loop, "localhost", socket.AF_INET)
    assert look_up(loop, "::1") == [("::1", 4119)]
    assert look_up(loop, "::1", socket.AF_INET) == []
    assert look_up(loop, "no..such..name") == look_up(loop, "with\0nul") == []
    assert descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_look_up_that_hangs_is_killed_while_the_loop_goes_on(loop: SelectorLoop,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.LOOK_UP_PROGRAM", HANGS)
    monkeypatch.setattr("loop.LOOK_UP_TIME", 0.5)
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(loop.now())
        loop.call_at(loop.now() + 0.02, tick)
    tick()
    assert look_up(loop, "localhost") == []
    assert len(ticks) > 5 and ticks[-1] - ticks[0] >= 0.5


def test_a_look_up_that_prints_without_end_is_killed(loop: SelectorLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.LOOK_UP_PROGRAM", "while True: print('192.0.2.1')")
    assert set(look_up(loop, "localhost")) <= {("192.0.2.1", 4119), *(("192.0.2.1"[:cut], 4119) for cut in range(1, 9))}


def test_a_look_up_ends_with_its_client_and_holds_none_of_its_pipes(loop: SelectorLoop,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.LOOK_UP_PROGRAM", HANGS)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)        # as one that a shell has handed to us
    found: list[Sequence[Address]] = []
    names = NameLookUp(loop, "localhost", 4119)
    names(found.append)
    process = names._process
    assert process is not None
    os.close(writer)
    assert os.read(reader, 1) == b"", "the process does not hold it"
    os.close(reader)
    names.close()
    turn_until(loop, lambda: names._process is None)
    assert process.returncode == -signal.SIGKILL and found == []


def test_where_no_process_can_be_started_nothing_is_found(loop: SelectorLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert look_up(loop, "localhost") == []
    monkeypatch.setattr(sys, "executable", "")
    assert look_up(loop, "localhost") == []


# --- what is a name, and what an address ----------------------------------------------------------------------

@pytest.mark.parametrize("text, where", [
    ("example.org", ("example.org", 4119)), ("example.org:5203", ("example.org", 5203)), ("::1", ("::1", 4119)),
    ("[::1:5203]", ("::1:5203", 4119)), ("[::1]:5203", ("::1", 5203)), ("2001:db8::abcd", ("2001:db8::abcd", 4119)),
    ("2001:db8::123", ("2001:db8::123", 4119)), ("fe80::1%eth0", ("fe80::1%eth0", 4119)),
    ("[fe80::1%eth0]:4119", ("fe80::1%eth0", 4119)), ("fe80::5203%eth0", ("fe80::5203%eth0", 4119)),
    ("2001:db8:1:2:3:4:5:5203", ("2001:db8:1:2:3:4:5:5203", 4119)), ("::ffff:192.0.2.1", ("::ffff:192.0.2.1", 4119)),
])
def test_a_server_may_be_written_in_these_ways(text: str, where: tuple[str, int]) -> None:
    assert udpchat.server_argument(text) == where


@pytest.mark.parametrize("text", ["", ":4119", "4119", "4119:4119", "[]:4119"])
@pytest.mark.parametrize("words", [["client", "bob"], ["send", "bob", "hi", "--server"]])
def test_a_port_without_a_host_is_one_clear_line(words: list[str], text: str) -> None:
    with pytest.raises(Usage, match=rf"(SERVER-HOST|--server): '{re.escape(text)}' names no host: HOST"):
        udpchat.server_of(udpchat.parse([*words, text]))


@pytest.mark.parametrize("text, advice", [
    ("::1:5203", "write [::1:5203] or [::1]:5203"), ("2001:db8::1:41190", "write [2001:db8::1:41190] or"),
    ("fe80::1%eth0:4119", "write [fe80::1%eth0:4119] or [fe80::1%eth0]:4119"),
    ("::5203", "write [::5203] or [::]:5203"),
    ("2001:db8:1:2:3:4:5:6:4119", "or [2001:db8:1:2:3:4:5:6]:4119"),
])
@pytest.mark.parametrize("way", ["environment", "--server", "SERVER-HOST"])
def test_an_address_that_may_end_with_a_port_is_refused_and_the_brackets_are_shown(chat: Chat, text: str, advice: str,
                                                                                   way: str) -> None:
    arguments = {"environment": ["send", "bob", "hi"], "--server": ["send", "bob", "hi", "--server", text],
                 "SERVER-HOST": ["client", "alice", text]}[way]
    started = chat.complete(*arguments, environment={"UDPCHAT_SERVER": text} if way == "environment" else {})
    assert started.popen.returncode == 2 and len(started.errors) == 1 and not started.out.data
    assert f": {text} may be an address, or an address and a port: " in started.errors[0]
    assert started.errors[0].split(": ")[1].removeprefix("argument ") in ("UDPCHAT_SERVER", "--server", "SERVER-HOST")
    assert advice in started.errors[0]


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_an_address_before_a_port_of_its_own_is_what_it_is_with_brackets_or_without(chat: Chat) -> None:
    chat.server(host="::1")
    for nick, host in (("alice", "0:0:0:0:0:0:0:0001"), ("bob", "[::1]"), ("carol", "0::0001")):
        chat.client(nick, host=host)


def fails_with(error: OSError | UnicodeError) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error
    return fail


@pytest.mark.parametrize("error, is_known", [
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), True), (UnicodeError("label too long"), True),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), False),
    (socket.gaierror(socket.EAI_FAIL, "Non-recoverable failure"), False), (OSError(24, "Too many open files"), False),
])
def test_a_name_that_does_not_exist_is_told_from_one_that_cannot_be_looked_up(
        monkeypatch: pytest.MonkeyPatch, error: OSError | UnicodeError, is_known: bool) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", fails_with(error))
    with pytest.raises(Usage) as raised:
        loop_module.look_up("example.org", 4119)
    assert isinstance(raised.value, LookUpFailure) is not is_known
    assert "cannot resolve example.org" in str(raised.value)


def test_a_name_may_lead_to_both_families_and_a_number_to_its_own() -> None:
    for addresses, is_named, family in (([ONE], False, socket.AF_INET), ([ONE, THREE], True, socket.AF_INET6),
                                        ([ONE], True, socket.AF_INET6), ([THREE], False, socket.AF_INET6)):
        if family == socket.AF_INET or has_ipv6():
            with client_socket(addresses, is_named, 0) as sock:
                assert sock.family == family


def test_without_ipv6_a_name_is_reached_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = loop_module.bind

    def bind_ipv4(family: socket.AddressFamily, address: Address) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return bind(family, address)
    monkeypatch.setattr(loop_module, "bind", bind_ipv4)
    with client_socket([ONE, THREE], True, 0) as sock:
        assert sock.family == socket.AF_INET
    with pytest.raises(Failure):
        client_socket([THREE], True, 0)


# --- as a user sees it ----------------------------------------------------------------------------------------

# runs a command where a file stands for /etc/hosts
WITH_HOSTS = ["unshare", "-r", "-m", "sh", "-c", 'mount --bind "$1" /etc/hosts && shift && exec "$@"', "sh"]
NAME = "chat.example"


@functools.cache
def may_choose_hosts() -> bool:
    """Return whether a test may say what names mean."""
    try:
        command = [*WITH_HOSTS, "/etc/hosts", "getent", "hosts", "localhost"]
        return subprocess.run(command, capture_output=True, timeout=DEADLINE).returncode == 0
    except OSError:
        return False


class NamedChat:
    """A world whose clients find the server by a name that the test gives addresses."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.hosts = chat.directory / "hosts"

    def lead_to(self, *hosts: str) -> None:
        """Give the name these addresses from now on."""
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{host} {NAME}\n" for host in hosts))

    def client(self, nick: str, *options: str, program: Sequence[str] = PROGRAM) -> Process:
        """Start a client."""
        return self.chat.run("client", nick, NAME, str(self.chat.port), "0", "--log-level", "info", *options,
                             command=[*WITH_HOSTS, str(self.hosts), *program])


@pytest.fixture
def named(chat: Chat) -> NamedChat:
    if not may_choose_hosts():
        pytest.skip("a hosts file of its own, in a mount namespace, is not permitted here")
    return NamedChat(chat)


@pytest.mark.parametrize("addresses", [
    ["127.0.0.1"], ["127.0.0.9", "127.0.0.1"], ["127.0.0.9", "127.0.0.8", "127.0.0.7", "127.0.0.1"],
    ["::1", "127.0.0.1"], ["2001:db8::9", "127.0.0.1"], ["2001:db8::9", "127.0.0.9", "127.0.0.1"]], ids=repr)
def test_a_client_finds_the_one_address_of_a_name_that_answers(named: NamedChat, addresses: list[str]) -> None:
    named.chat.server()
    named.lead_to(*addresses)
    alice, bob = named.client("alice"), named.chat.client("bob")
    alice.see(WELCOME)
    alice.wait_for("bob")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    bob.wait_for("alice")
    bob.feed("send alice hi\n")
    alice.see(received("bob"), "bob: hi")
    assert alice.finish() == bob.finish() == 0


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_a_client_finds_a_server_at_the_ipv6_address_of_a_name_that_has_both(named: NamedChat) -> None:
    named.chat.server(host="::1")
    named.lead_to("127.0.0.1", "::1")
    alice = named.client("alice")
    alice.see(WELCOME)
    assert alice.roster()["alice"][0].startswith("[::1]:")
    assert alice.finish() == 0


def test_a_client_of_a_name_whose_addresses_are_all_dead_ends_as_one_of_a_dead_address(named: NamedChat) -> None:
    named.chat.server().kill()
    named.lead_to("127.0.0.9", "127.0.0.8", "::1")
    began = time.monotonic()
    alice = named.client("alice")
    assert alice.wait() == 1 and alice.events == [NOT_RESPONDING, EXITING]
    assert time.monotonic() - began >= 5 * 0.5 * 0.75


def moves(named: NamedChat, clients: Sequence[Process], host: str) -> None:
    """Stop the server, start it at ``host`` on the same store, lead the name there, and wait for the clients."""
    server = named.chat._server
    assert server is not None
    seen = [client.lines.count(WELCOME) for client in clients]
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    named.chat.server(host=host, port=named.chat.port)
    named.lead_to(host)
    for client, before in zip(clients, seen):
        named.chat.until(lambda: client.lines.count(WELCOME) > before, "the client to be welcome again", 3 * DEADLINE)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, 127.0.0.2 is nobody's address")
def test_clients_follow_a_name_that_moves_and_nothing_is_lost(named: NamedChat) -> None:
    chat = named.chat
    chat.server(host="127.0.0.2")
    named.lead_to("127.0.0.2")
    alice, bob, carol = (named.client(nick) for nick in ("alice", "bob", "carol"))
    for client in (alice, bob, carol):
        client.see(WELCOME)
    for nick in ("bob", "carol"):
        alice.wait_for(nick)
    alice.feed("send carol 1\n")
    carol.see("alice: 1")
    assert carol.finish() == 0
    alice.wait_for("carol", "offline")
    alice.feed("send carol 2\n")
    alice.see("[Messages received by the server and saved]")
    moves(named, [alice, bob], "127.0.0.3")
    alice.feed("send bob there\nsend carol 3\n")
    bob.see("alice: there")
    alice.see("[Messages received by the server and saved]")
    again = named.client("carol")
    again.see(WELCOME, "[You have messages]")
    assert [again.see_match(r"alice: <.*> (\d)").group(1) for _ in range(2)] == ["2", "3"]
    for client in (alice, bob):
        assert client.lines.count(NOT_RESPONDING) <= 1 and "leads to 127.0.0.3" in "".join(client.errors)
    assert [client.finish() for client in (alice, bob, again)] == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, 127.0.0.2 is nobody's address")
def test_while_a_look_up_hangs_the_chat_goes_on_and_the_process_is_ended_with_the_client(named: NamedChat) -> None:
    chat = named.chat
    hanging = chat.directory / "hanging"
    hangs = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; import loop, udpchat;"
             f' loop.LOOK_UP_PROGRAM += "import os, time; time.sleep(1000 * os.path.exists({str(hanging)!r}))";'
             f" sys.exit(udpchat.main())"]
    server = chat.server(host="127.0.0.2")
    named.lead_to("127.0.0.2")
    alice = named.client("alice", program=hangs)
    bob = named.client("bob")
    for client in (alice, bob):
        client.see(WELCOME)
    alice.wait_for("bob")
    bob.wait_for("alice")
    hanging.touch()
    server.kill()
    children = Path(f"/proc/{alice.pid}/task/{alice.pid}/children")

    def looks_up() -> bool:
        return any(b"time.sleep(1000" in Path(f"/proc/{child}/cmdline").read_bytes()
                   for child in children.read_text().split() if Path(f"/proc/{child}").exists())
    if not children.exists():
        pytest.skip("this system does not tell the children of a process")
    chat.until(looks_up, "a look-up", 3 * DEADLINE)
    for number in range(20):
        bob.feed(f"send alice ping {number}\n")
        alice.see(f"bob: ping {number}")
        alice.feed(f"send bob pong {number}\n")
        bob.see(f"alice: pong {number}")
    assert looks_up(), "it hung all the time"
    alice.signal(signal.SIGINT)
    assert alice.wait() == 0
    assert not children.exists()
