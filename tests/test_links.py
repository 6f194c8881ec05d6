"""Machines with several addresses and links: real processes in networks of the test's own, and the socket alone.

Which of its addresses a server answers from, and link-local addresses, which mean something on one link only.
"""
from __future__ import annotations

import errno
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

import loop
from client import ServerLink
from loop import AnsweringSocket, Endpoint, SelectorLoop, UdpSocket, for_ipv6_socket, show_address, unmapped
from protocol import ONLINE, Address
from registry import TableSync
from tests.processes import (DEADLINE, EXITING, NO_PKTINFO, NOT_RESPONDING, ROOT, UPDATED, WELCOME, Chat,
                             Machine, NoNamespaces, Process, has_ipv6, received)

Maker = Callable[..., Machine]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, 127.0.0.2 is nobody's address")
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
LOOPBACK = socket.if_nametoindex("lo" if sys.platform == "linux" else "lo0")

# a strict client: a connected socket hears nothing but what comes from the address that it asks
ASK = f"""
import socket, sys
sys.path[0] = {str(ROOT)!r}
from protocol import REG_SIZE, padded
for host in sys.argv[2:]:
    family, _, _, _, address = socket.getaddrinfo(host, int(sys.argv[1]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.settimeout(0.3)
        for _ in range(50):
            sock.send(padded("reg", dict(id=7, nick="eve"), REG_SIZE))
            try:
                assert b"cookie" in sock.recv(2000)
                break
            except TimeoutError:
                pass
        else:
            sys.exit("no answer from " + host)
"""


@pytest.fixture
def machine() -> Iterator[Maker]:
    """Yield a function that makes machines. Skip the test where that is not permitted."""
    machines: list[Machine] = []

    def make(neighbour: Machine | None = None, interface: str = "eth0") -> Machine:
        """Return a new machine, linked to ``neighbour`` by its eth0 and the neighbour's ``interface``."""
        try:
            machines.append(Machine(neighbour))
            if neighbour is not None:
                neighbour.link(interface, machines[-1])
        except NoNamespaces as error:
            pytest.skip(str(error))
        return machines[-1]

    yield make
    for made in machines:
        made.close()


# which address the server answers from


@linux_only
@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_a_server_on_all_addresses_answers_from_the_one_that_was_asked(chat: Chat, host: str) -> None:
    chat.server(host=host)
    asked = ["127.0.0.1", "127.0.0.2", "127.0.0.3"] + ["::1"] * (host == "::")
    done = chat.complete(str(chat.port), *asked, command=[sys.executable, "-c", ASK])
    assert done.popen.returncode == 0, done.errors


@linux_only
def test_a_client_that_asks_at_another_address_is_answered_from_there() -> None:
    selector_loop = SelectorLoop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, socket.socket(socket.AF_INET,
                                                                                 socket.SOCK_DGRAM) as peer:
        ours.bind(("0.0.0.0", 0))
        port = AnsweringSocket(ours, selector_loop)
        for host in ("127.0.0.2", "127.0.0.3", "127.0.0.2"):
            asked = host, ours.getsockname()[1]
            assert echo(port, selector_loop, peer, asked) == (b"are you there?", asked)
    selector_loop.close()


@linux_only
def test_on_a_system_that_does_not_tell_what_was_asked_the_server_answers_as_the_kernel_chooses(chat: Chat) -> None:
    chat.server(host="0.0.0.0", command=NO_PKTINFO)
    alice = chat.client("alice", "--log-level", "info", host="127.0.0.2")
    chat.until(lambda: "answers from 127.0.0.1" in "".join(alice.errors), "the log to say where the server is")
    assert alice.finish() == 0


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_a_server_with_two_addresses_on_a_link_answers_from_each_as_it_is_asked(chat: Chat, machine: Maker,
                                                                                host: str) -> None:
    ours = machine()
    theirs = machine(ours)
    asked = ["10.0.0.1", "10.0.0.2", "10.1.0.1"]
    ours.address("eth0", "10.0.0.1/24", "10.0.0.2/24", "10.1.0.1/24")
    theirs.address("eth0", "10.0.0.9/24")
    theirs.ip("route add 10.1.0.0/24 dev eth0")     # a leg of the server from which no route leads to the client
    if host == "::":
        asked += ["fd00::1", "fd00::2", "fe80::1%eth0"]
        ours.address("eth0", "fd00::1/64", "fd00::2/64", "fe80::1/64")
        theirs.address("eth0", "fd00::9/64", "fe80::9/64")
    chat.server(host=host, command=ours.program)
    assert theirs.run(ASK, str(chat.port), *asked) == ""
    alice = chat.client("alice", "--log-level", "info", host="10.0.0.2", command=theirs.program)
    bob = chat.client("bob", "--log-level", "info", host=asked[-1], command=theirs.program)
    assert alice.finish() == bob.finish() == 0
    assert not alice.errors and not bob.errors      # the log does not speak of another address


def test_a_server_goes_on_answering_from_the_address_that_was_asked_when_the_kernel_prefers_another(
        chat: Chat, machine: Maker) -> None:
    ours = machine()
    theirs = machine(ours)
    ours.address("eth0", "10.0.0.1/24", "10.0.0.2/24")
    theirs.address("eth0", "10.0.0.9/24")
    chat.server(host="0.0.0.0", command=ours.program)
    alice = chat.client("alice", host="10.0.0.1", command=theirs.program)
    alice.wait_for("alice")
    ours.ip("route replace 10.0.0.0/24 dev eth0 src 10.0.0.2")
    bob = chat.client("bob", "--log-level", "info", host="10.0.0.1", command=theirs.program)
    alice.see(UPDATED)                              # she is told of him, though she has asked nothing meanwhile
    assert alice.finish() == bob.finish() == 0
    assert alice.lines.count(WELCOME) == 1 and NOT_RESPONDING not in alice.lines and not bob.errors


class Socket(socket.socket):
    """A UDP socket of a machine that has lost an address: nothing can be sent from there."""

    reason = errno.EINVAL

    def sendmsg(self, *arguments: object) -> int:
        """Fail as the kernel does."""
        raise OSError(self.reason, "no such address")


def echo(port: UdpSocket, selector_loop: SelectorLoop, peer: socket.socket, where: Address) -> tuple[bytes, Address]:
    """Let a peer send something to a port, which sends it back; return what arrives, and from where, if anything."""
    seen: list[bytes] = []

    def answer(datagram: bytes, address: Address) -> None:
        seen.append(datagram)
        port.send(datagram, address)

    port.receive = answer
    peer.sendto(b"are you there?", where)
    while not seen:
        selector_loop.turn()
    if port.not_sent:
        return b"", ("", 0)
    assert select.select([peer], [], [], DEADLINE)[0]
    return peer.recvfrom(100)


@pytest.mark.parametrize("reason, is_answered", [
    (errno.EINVAL, True), (errno.EADDRNOTAVAIL, True), (errno.ENODEV, True), (errno.ENETUNREACH, True),
    (errno.EAGAIN, False), (errno.ENOBUFS, False)])
def test_when_the_address_that_was_asked_is_gone_the_kernel_chooses_at_once(monkeypatch: pytest.MonkeyPatch,
                                                                            reason: int, is_answered: bool) -> None:
    monkeypatch.setattr(Socket, "reason", reason)
    selector_loop = SelectorLoop()
    with Socket(socket.AF_INET, socket.SOCK_DGRAM) as ours, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        ours.bind(("0.0.0.0", 0))
        port = AnsweringSocket(ours, selector_loop)
        answer, _ = echo(port, selector_loop, peer, ("127.0.0.1", ours.getsockname()[1]))
        assert (answer == b"are you there?") is is_answered
        assert (port.datagrams_out, port.not_sent) == ((1, 0) if is_answered else (0, 1))
    selector_loop.close()


def test_a_server_remembers_of_so_many_peers_only_where_they_have_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_ASKED", 3)
    selector_loop = SelectorLoop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.bind(("0.0.0.0", 0))
        port = AnsweringSocket(ours, selector_loop)
        where = "127.0.0.1", ours.getsockname()[1]
        peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
        assert [echo(port, selector_loop, peer, where) for peer in peers * 2] == [(b"are you there?", where)] * 10
        assert list(port._asked) == [("127.0.0.1", peer.getsockname()[1]) for peer in peers[2:]]
        for peer in peers:
            peer.close()
    selector_loop.close()


@pytest.mark.parametrize("family, host", [
    (socket.AF_INET, "127.0.0.1"), pytest.param(socket.AF_INET6, "::1", marks=needs_ipv6)])
def test_a_socket_on_all_addresses_can_send_to_those_who_have_asked_nothing(family: int, host: str) -> None:
    selector_loop = SelectorLoop()
    with socket.socket(family, socket.SOCK_DGRAM) as ours, socket.socket(family, socket.SOCK_DGRAM) as peer:
        ours.bind(("" if family == socket.AF_INET else "::", 0))
        peer.bind((host, 0))
        port = AnsweringSocket(ours, selector_loop)
        port.send(b"here I am", (host, peer.getsockname()[1]))
        assert peer.recv(100) == b"here I am" and port.not_sent == 0
    selector_loop.close()


def test_a_link_local_address_is_answered_from_on_its_own_link_and_any_other_by_the_routes() -> None:
    for host, interface in (("fe80::1", 2), ("febf::1", 2), ("2001:db8::1", 0), ("fec0::1", 0), ("::1", 0)):
        packed = socket.inet_pton(socket.AF_INET6, host)
        assert loop.asked_at(packed + bytes([2, 0, 0, 0]))[1] == [
            (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, packed + bytes([interface, 0, 0, 0]))]


def test_no_broadcast_or_multicast_address_is_answered_from() -> None:
    broadcast = bytes([0, 0, 0, 2, 10, 0, 0, 1, 10, 0, 0, 255])     # ip(7): interface, local address, destination
    assert loop.asked_at(broadcast)[1] == [
        (socket.IPPROTO_IP, loop.IP_PKTINFO, bytes([0] * 4 + [10, 0, 0, 1] + [0] * 4))]
    left_out = bytes([0, 0, 0, 2, 0, 0, 0, 0, 10, 0, 0, 1])      # as macOS does with the local address
    assert loop.asked_at(left_out)[1] == [
        (socket.IPPROTO_IP, loop.IP_PKTINFO, bytes([0] * 4 + [10, 0, 0, 1] + [0] * 4))]
    multicast = socket.inet_pton(socket.AF_INET6, "ff02::1") + bytes([2, 0, 0, 0])
    assert loop.asked_at(multicast)[1] == loop.asked_at(b"")[1] == []


# many datagrams with one call


SERIES = [b"a" * 900, b"b" * 900, b"c" * 900, b"d" * 7]


def receive_series(kind: type[UdpSocket], ours: socket.socket, datagrams: Sequence[bytes]) -> tuple[
        UdpSocket, list[tuple[bytes, Address]]]:
    """Let a peer ask at 127.0.0.1, and send it datagrams; return what it receives, and from where."""
    selector_loop = SelectorLoop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        ours.bind(("0.0.0.0", 0))
        peer.bind(("127.0.0.1", 0))
        port = kind(ours, selector_loop)
        echo(port, selector_loop, peer, ("127.0.0.1", ours.getsockname()[1]))
        port.datagrams_out = port.bytes_out = 0
        port.send_series(datagrams, peer.getsockname())
        received = []
        while select.select([peer], [], [], 0.2)[0]:
            received.append(peer.recvfrom(2000))
    selector_loop.close()
    return port, received


@pytest.mark.parametrize("kind", [UdpSocket, AnsweringSocket])
@pytest.mark.parametrize("datagrams", [SERIES, SERIES[:3], SERIES[:1], SERIES[::-1], [b"1", b"22", b"1"]])
def test_a_series_of_datagrams_arrives_as_it_is_from_where_the_peer_has_asked(
        kind: type[UdpSocket], datagrams: list[bytes]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        port, received = receive_series(kind, ours, datagrams)
        where = "127.0.0.1", ours.getsockname()[1]
    assert received == [(datagram, where) for datagram in datagrams]
    assert (port.datagrams_out, port.bytes_out) == (len(datagrams), sum(map(len, datagrams)))


@pytest.mark.parametrize("reason, is_sent", [
    (errno.EINVAL, True), (errno.EIO, True), (errno.EMSGSIZE, True), (errno.EAGAIN, False), (errno.ENOBUFS, False)])
def test_what_the_system_does_not_send_with_one_call_is_sent_with_many_unless_it_has_no_room(
        monkeypatch: pytest.MonkeyPatch, reason: int, is_sent: bool) -> None:
    monkeypatch.setattr(loop, "can_cut", lambda sock: True)
    monkeypatch.setattr(Socket, "reason", reason)
    with Socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        _, received = receive_series(UdpSocket, ours, SERIES)
    assert [datagram for datagram, _ in received] == (SERIES if is_sent else [])


def test_a_system_that_does_not_cut_gets_each_datagram_with_a_call_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "UDP_SEGMENT", 0)
    with Socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        assert not loop.can_cut(ours)
        _, received = receive_series(UdpSocket, ours, SERIES)
    assert [datagram for datagram, _ in received] == SERIES


# link-local addresses


@pytest.mark.parametrize("told, address", [
    (("::1", 5, 0, 0), ("::1", 5)), (("::ffff:192.0.2.1", 5, 0, 0), ("192.0.2.1", 5)),
    (("192.0.2.1", 5), ("192.0.2.1", 5)), (("fe80::1", 5, 0, 2), ("fe80::1%2", 5)),
    (("febf::1", 5, 0, 2), ("febf::1%2", 5)), (("fe80::1", 5, 0, 0), ("fe80::1", 5)),
    (("2001:db8::1", 5, 0, 2), ("2001:db8::1", 5)), (("fe8::1", 5, 0, 2), ("fe8::1", 5)),
    (("fec0::1", 5, 0, 2), ("fec0::1", 5))])
def test_only_a_link_local_address_carries_its_interface(told: tuple[object, ...], address: Address) -> None:
    assert unmapped(told) == address


@pytest.mark.parametrize("told", [("::1", 5), ("::ffff:192.0.2.1", 5), ("fe80::1", 5, 0, 2), ("fe80::1", 5)])
def test_an_ipv6_socket_gets_an_address_back_as_it_has_told_it(told: tuple[object, ...]) -> None:
    assert for_ipv6_socket(unmapped(told)) == told


@pytest.mark.parametrize("server, host, reached", [
    ("192.0.2.1", "192.0.2.2", "192.0.2.2"), ("192.0.2.1", "2001:db8::2", None), ("192.0.2.1", "fe80::2", None),
    ("2001:db8::1", "2001:db8::2", "2001:db8::2"), ("2001:db8::1", "192.0.2.2", None), ("2001:db8::1", "fe80::2", None),
    ("fe80::1%2", "fe80::2", "fe80::2%2"), ("fe80::1%2", "2001:db8::2", "2001:db8::2"),
    ("fe80::1%2", "192.0.2.2", None), ("fe80::1%2", "fe80::2%3", None)])
def test_a_client_reaches_link_local_peers_on_the_link_of_its_server(server: str, host: str,
                                                                     reached: str | None) -> None:
    selector_loop = SelectorLoop()
    link = cast(ServerLink, SimpleNamespace(endpoint=Endpoint(selector_loop, [(server, 4119)])))
    table = TableSync(selector_loop, link, lambda nicks: None, lambda is_online, was_online: None)
    table.table.set("bob", host, 5000, ONLINE)
    address = table.reach(host, 5000)
    assert address == ((reached, 5000) if reached is not None else None)
    if reached is not None:
        assert table.is_at("bob", (reached, 5000)) and not table.is_at("bob", (reached, 5001))
    assert not table.is_at("bob", ("fe80::2%4", 5000))      # the same on another of our links
    selector_loop.close()


def test_an_interface_is_shown_by_its_name_as_long_as_it_has_one() -> None:
    name = socket.if_indextoname(LOOPBACK)
    assert show_address((f"fe80::1%{LOOPBACK}", 5)) == f"[fe80::1%{name}]:5"
    assert show_address(("fe80::1%987654", 5)) == "[fe80::1%987654]:5"


@needs_ipv6
def test_sending_over_an_interface_that_is_gone_fails_quietly() -> None:
    selector_loop = SelectorLoop()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ours:
        port = AnsweringSocket(ours, selector_loop)
        port.send(b"anybody?", ("fe80::1", 5))      # as older versions have written it into the store
        sent = port.datagrams_out                   # that depends on the system
        port.send(b"anybody?", ("fe80::1%987654", 5))
        assert (port.datagrams_out, port.not_sent) == (sent, 2 - sent)
    selector_loop.close()


@needs_ipv6
@pytest.mark.parametrize("host, line", [
    ("fe80::1%nope", "udpchat: cannot resolve fe80::1%nope: no such address, or no such interface"),
    ("fe80::1%987654", "udpchat: cannot resolve fe80::1%987654: no such address, or no such interface"),
    ("fe80::1", "udpchat: fe80::1 is on every link: name the interface, as in fe80::1%eth0")])
def test_a_link_local_address_without_an_interface_that_exists_is_one_clear_line(chat: Chat, host: str,
                                                                                 line: str) -> None:
    for words in (["server", "0", "--host", host, "--store", ":memory:"], ["client", "alice", host, "4119"],
                  ["send", "bob", "hello", "--nick", "alice", "--server", host]):
        done = chat.complete(*words)
        assert (done.popen.returncode, done.errors, done.lines) == (2, [line], [])


@needs_ipv6
def test_server_and_clients_on_one_link_need_no_other_addresses(chat: Chat, machine: Maker) -> None:
    ours = machine()
    theirs = machine(ours)
    decoy = machine(theirs, "eth1")
    ours.address("eth0", "fe80::1/64")
    theirs.address("eth0", "fe80::9/64")
    theirs.address("eth1", "fe80::9/64")            # the same on its second link, where somebody else is fe80::1, too
    decoy.address("eth0", "fe80::1/64")
    server = chat.server(host="fe80::1%eth0", command=ours.program)
    assert server.lines[0] == f"[Server listening on [fe80::1%eth0]:{chat.port}]"
    alice = chat.client("alice", host="fe80::1%eth0", command=theirs.program)
    bob = chat.client("bob", host="fe80::1%eth0", command=ours.program)
    alice.wait_for("bob")
    assert alice.roster()["bob"][0].startswith("[fe80::1]:")       # no interface of another machine
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    alice.see(received("bob"))
    bob.feed("send alice welcome\n")
    alice.see("bob: welcome")
    bob.see(received("alice"))
    assert alice.finish() == bob.finish() == 0
    assert not any("No ACK" in line for line in alice.lines + bob.lines)
    wrong = chat.start("alice", host="fe80::1%eth1", command=theirs.program)
    wrong.see(NOT_RESPONDING, EXITING)
    assert wrong.wait() == 1


@needs_ipv6
def test_a_link_local_server_can_be_named_in_the_environment_and_by_an_option(chat: Chat, machine: Maker) -> None:
    ours = machine()
    theirs = machine(ours)
    ours.address("eth0", "fe80::1/64")
    theirs.address("eth0", "fe80::9/64")
    chat.server(host="::", command=ours.program)
    where = f"[fe80::1%eth0]:{chat.port}"
    bob = chat.run("client", "bob", environment={"UDPCHAT_SERVER": where}, command=theirs.program)
    bob.see(WELCOME)
    alice = chat.complete("send", "bob", "hello", "--nick", "alice", "--server", where, command=theirs.program)
    assert alice.popen.returncode == 0 and alice.lines == [received("bob")]
    bob.see("alice: hello")
    assert bob.finish() == 0


@needs_ipv6
@pytest.mark.parametrize("hosts", [("fe80::a", "fe80::b"), ("fe80::a", "fe80::a")])
def test_clients_on_two_links_chat_by_way_of_the_server(chat: Chat, machine: Maker, hosts: tuple[str, str]) -> None:
    ours = machine()
    left, right = machine(ours, "left"), machine(ours, "right")
    for name, there, host in zip(("left", "right"), (left, right), hosts, strict=True):
        ours.address(name, "fe80::1/64")
        there.address("eth0", f"{host}/64")
    chat.server(host="::", command=ours.program)
    words = "fe80::1%eth0", str(chat.port), "5000"
    alice = chat.run("client", "alice", *words, command=left.program)
    alice.see(WELCOME)
    bob = chat.run("client", "bob", *words, command=right.program)
    bob.see(WELCOME)
    alice.wait_for("bob")
    alice.feed("send bob hello\nsend bob again\n")
    bob.see_match("alice: .*hello")
    bob.see_match("alice: .*again")
    bob.feed("send alice welcome\n")
    alice.see_match("bob: .*welcome")
    assert alice.roster()["bob"][1] == bob.roster()["alice"][1] == "online"
    assert alice.finish() == bob.finish() == 0


@needs_ipv6
def test_a_server_whose_link_is_gone_after_a_restart_goes_on_with_the_others(chat: Chat, machine: Maker) -> None:
    ours = machine()
    left, right = machine(ours, "left"), machine(ours, "right")
    for name, there in (("left", left), ("right", right)):
        ours.address(name, "fe80::1/64")
        there.address("eth0", "fe80::9/64")
    server = chat.server(host="::", command=ours.program)
    alice = chat.client("alice", host="fe80::1%eth0", command=left.program)
    bob = chat.client("bob", host="fe80::1%eth0", command=right.program)
    bob.wait_for("alice")
    server.kill()
    ours.ip("link delete left")
    server = chat.server(host="::", port=chat.port, command=ours.program)
    bob.see(WELCOME)                                # it is told that the server is back
    bob.feed("send alice hello\n")
    bob.see("[Messages received by the server and saved]")
    alice.kill()
    assert bob.finish() == 0
    server.signal(15)
    assert server.wait() == 0 and not server.errors


# behind routers

MASQUERADE = """
table ip nat {{
    chain after {{ type nat hook postrouting priority srcnat; oifname eth0 {how}; }}
}}
table ip filter {{
    chain input {{ type filter hook input priority filter; iifname eth0 udp dport 1-65535 drop; }}
    chain forward {{ type filter hook forward priority filter; iifname eth0 ct state new drop; }}
}}
"""
ONE_PORT, MANY_PORTS = "masquerade", "masquerade fully-random"


def forward(machine: Machine) -> None:
    """Make a machine a router."""
    machine.run("open('/proc/sys/net/ipv4/ip_forward', 'w').write('1')")


def home(machine: Maker, internet: Machine, number: int, how: str, people: int = 1) -> list[Machine]:
    """Return the machines of people behind a router, as most have one at home, that is linked to the internet."""
    router = machine(internet, f"home{number}")
    internet.address(f"home{number}", f"203.0.113.{4 * number + 1}/30")
    router.address("eth0", f"203.0.113.{4 * number + 2}/30")
    router.ip(f"route add default via 203.0.113.{4 * number + 1}")
    router.ip("link add lan type bridge")
    router.ip("link set lan up")
    router.address("lan", f"10.{number}.0.1/24")
    forward(router)
    try:
        subprocess.run([*router.enter, "nft", "-f", "-"], input=MASQUERADE.format(how=how), text=True, check=True,
                       capture_output=True)
    except OSError as error:
        pytest.skip(f"nftables cannot be used here: {error}")
    except subprocess.CalledProcessError as error:
        assert "syntax error" not in error.stderr, error.stderr
        pytest.skip(f"nftables cannot be used here: {error.stderr}")
    found = []
    for person in range(people):
        found.append(machine(router, f"port{person}"))
        router.ip(f"link set port{person} master lan")
        found[-1].address("eth0", f"10.{number}.0.{person + 2}/24")
        found[-1].ip(f"route add default via 10.{number}.0.1")
    return found


@pytest.fixture
def internet(machine: Maker) -> Machine:
    """Return the machine that everybody is linked to, on which the server runs."""
    found = machine()
    forward(found)
    return found


def chat_at(chat: Chat, internet: Machine, one: Machine, other: Machine) -> list[Process]:
    """Start a server, and alice and bob at these machines; return both when they know each other."""
    chat.server(host="0.0.0.0", command=internet.program)
    alice, bob = (chat.client(nick, host="203.0.113.5", command=place.program)
                  for nick, place in (("alice", one), ("bob", other)))
    alice.wait_for("bob")
    bob.wait_for("alice")
    return [alice, bob]


def test_two_behind_their_routers_at_home_chat_directly_from_the_first_message_on(
        chat: Chat, machine: Maker, internet: Machine) -> None:
    (one,), (other,) = home(machine, internet, 1, ONE_PORT), home(machine, internet, 2, ONE_PORT)
    alice, bob = chat_at(chat, internet, one, other)
    for number in range(3):
        alice.feed(f"send bob {number}\n")
        bob.see(f"alice: {number}")
        alice.see(received("bob"))
        bob.feed(f"send alice {number}\n")
        alice.see(f"bob: {number}")
        bob.see(received("alice"))
    assert alice.finish() == bob.finish() == 0


def test_two_behind_one_router_that_does_not_lead_back_chat_directly(
        chat: Chat, machine: Maker, internet: Machine) -> None:
    one, other = home(machine, internet, 1, ONE_PORT, people=2)
    alice, bob = chat_at(chat, internet, one, other)
    for number in range(3):
        alice.feed(f"send bob {number}\n")
        bob.see(f"alice: {number}")
        alice.see(received("bob"))
    assert alice.finish() == bob.finish() == 0


def test_behind_routers_that_cannot_be_opened_everything_arrives_by_way_of_the_server(
        chat: Chat, machine: Maker, internet: Machine) -> None:
    (one,), (other,) = home(machine, internet, 1, MANY_PORTS), home(machine, internet, 2, MANY_PORTS)
    alice, bob = chat_at(chat, internet, one, other)
    for number in range(3):
        alice.feed(f"send bob {number}\n")
        bob.see_match(rf"alice: <.*> {number}")
        alice.see("[Messages received by the server and saved]")
    assert alice.lines.count("[No ACK from bob, message sent to server.]") == 1
    assert alice.finish() == bob.finish() == 0
