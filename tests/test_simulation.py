"""What must always hold, whatever the network, the peers and the server do: in the simulated world of ``simulate``.

First stories that are told step by step, then many random ones.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import protocol
import registry
from client import PINGS_REMEMBERED, PING_INTERVAL
from protocol import NEVER, Address, encode
from registry import LINK_LEAVING, OLD_TABLE_TIME, SYNC_INTERVAL
from secure import NO_REQUEST, Handshake, token_for
from tests.simulate import (ELSEWHERE, SERVER, Disk, Life, Node, Router, ServerNode, Weather, World, own_secret, replay,
                            run_seed)
from udpchat import NICK_PATIENCE

SEEDS = 300
CHUNK, STORM_CHUNK = 5, 20    # seeds in one test


def is_ready(life: Life) -> bool:
    """Return whether a client reads commands."""
    return life.client.link.has_joined and life.client.table_sync.table.is_online(life.nick)


def start(*nicks: str, stay: bool = False, mailbox: int = 100_000) -> tuple[World, list[Life]]:
    """Return a world with a server and clients that are all online and know each other."""
    world = World(1, mailbox=mailbox)
    world.start_server()
    lives = [world.client(nick, stay=stay) for nick in nicks]
    world.run_until(lambda: all(life.client.table_sync.table.is_online(nick) for nick in nicks for life in lives), 5)
    world.run(1)
    return world, lives


def start_with_mail() -> tuple[World, Life, Life]:
    """Return a world with alice, and with bob, who is offline: "hello" waits for him."""
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    alice.type("send bob hello")
    world.run(1)
    return world, alice, bob


def losing(*tags: str, source: str = "", target: str = "") -> Callable[[str, str, list[Any]], bool]:
    """Return a filter for the network that loses every datagram with one of ``tags`` between these hosts."""
    def passes(from_: str, to: str, maps: list[Any]) -> bool:
        hit = from_ == (source or from_) and to == (target or to)
        return not (hit and any(value["tag"] in tags for value in maps))
    return passes


def count(life: Life, line: str) -> int:
    """Return how often a client has shown a line."""
    return life.lines.count(line)


def ends(life: Life, text: str) -> int:
    """Return how many lines of a client end with ``text``."""
    return sum(line.endswith(text) for line in life.lines)


def tags_of(datagram: bytes) -> list[str]:
    """Return what is in a datagram."""
    return [tag for tag, _ in protocol.Decoder().decode(datagram)]


# --- one message ----------------------------------------------------------------------------------------------

def test_a_message_is_shown_and_receipted() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.type("send bob hello")
    world.run(1)
    assert count(bob, "alice: hello") == 1 and alice.lines[-1] == "[Message received by bob.]"


def test_a_message_whose_receipt_was_lost_is_shown_once() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.filter = losing("ack", source="bob")
    alice.type("send bob hello")
    world.run(0.3)
    assert count(bob, "alice: hello") == 1 and not count(alice, "[Message received by bob.]")
    world.network.filter = None
    world.run(5)
    assert count(bob, "alice: hello") == 1 and count(alice, "[Message received by bob.]") == 1


def test_a_message_whose_receipts_are_all_lost_is_shown_once_though_it_also_comes_by_mail() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.block("bob", "alice")
    alice.type("send bob hello")
    world.run(10)
    assert ends(bob, "hello") == 1
    assert alice.lines[-3:] == ["[No ACK from bob, message sent to server.]", "[Client bob exists!!]",
                                "[Messages received by the server and saved]"]


def test_a_recipient_behind_a_one_way_path_gets_its_messages_by_relay() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.block("alice", "bob")
    alice.type("send bob first")
    world.run(5)
    assert ends(bob, "> first") == 1 and not count(bob, "[You have messages]")
    sent = alice.sent
    alice.type("send bob second")
    world.run(0.4)
    assert ends(bob, "> second") == 1, "for a minute it is not tried directly again"
    assert alice.sent - sent <= 2
    assert count(alice, "[Messages received by the server and saved]") == 2


def test_mail_comes_before_the_client_is_announced() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    for number in range(3):
        alice.type(f"send bob m{number}")
    world.run(1)
    world.network.filter = losing("ack", source="bob")
    bob.type("reg bob")
    world.run(2)
    assert [line[-2:] for line in bob.lines[-3:]] == ["m0", "m1", "m2"] and "[You have messages]" in bob.lines
    assert not alice.client.table_sync.table.is_online("bob"), "its mail is not acked yet"
    world.network.filter = None
    world.run(5)
    assert alice.client.table_sync.table.is_online("bob") and count(bob, "[You have messages]") == 1


def test_mail_is_acked_as_mail_and_not_to_senders_that_did_not_send_it() -> None:
    world, _, bob = start_with_mail()
    mails: set[int] = set()
    acks: set[int] = set()

    def listen(source: str, target: str, maps: list[Any]) -> bool:
        for value in maps:
            if value["tag"] in ("mail", "ack"):
                (mails if value["tag"] == "mail" else acks).add(value["info"]["stream"])
        return True
    world.network.filter = listen
    bob.type("reg bob")
    world.run(3)
    assert ends(bob, "> hello") == 1 and acks == mails and len(mails) == 1


def test_messages_kept_by_the_server_come_before_later_ones_that_come_straight() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.block("alice", "bob")
    world.network.block("bob", "alice")
    world.network.filter = losing("mail")
    alice.type("send bob m1")
    world.run(5)
    assert count(alice, "[Messages received by the server and saved]") == 1
    world.network.blocked.clear()
    bob.move(world.new_address())
    world.run(20)
    alice.type("send bob m2")
    world.run(2)
    assert not ends(bob, "m1") and not ends(bob, "m2"), "it waits for what is missing"
    world.network.filter = None
    world.run(10)
    assert [line.split(" ")[-1] for line in bob.lines if line.startswith("alice: ")] == ["m1", "m2"]


def test_what_was_passed_over_for_want_of_an_answer_is_shown_when_the_mail_comes() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.type("send bob m0")
    world.run(1)
    world.network.block("alice", "bob")
    world.network.filter = losing("mail")
    alice.type("send bob m1")
    world.run(5)
    assert count(alice, "[Messages received by the server and saved]") == 1
    world.network.blocked.clear()
    bob_entry = alice.client.table_sync.table.get("bob")
    assert bob_entry is not None
    world.run(70)
    world.network.block("bob", "server")
    alice.type("send bob m2")
    world.run(8)
    assert [line.split(" ")[-1] for line in bob.lines if line.startswith("alice: ")] == ["m0", "m2"]
    world.network.blocked.clear()
    world.network.filter = None
    world.run(30)
    assert [line.split(" ")[-1] for line in bob.lines if line.startswith("alice: ")] == ["m0", "m2", "m1"]


def test_a_server_that_dies_after_it_has_announced_mail_does_not_hold_up_what_comes_straight() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.filter = losing("chat", "mail", target="bob")
    alice.type("send bob first")
    world.run(70)
    world.network.filter = losing("mail", target="bob")
    alice.type("send bob second")
    world.run(0.03)
    assert world.server is not None
    world.server.crash()
    world.run(14)
    assert count(bob, "alice: second") == 1 and count(alice, "[Message received by bob.]") == 1
    world.network.filter = None
    world.start_server()
    world.run(40)
    assert ends(bob, "> first") == 1, "late, but not lost"


def test_a_recipient_that_is_gone_is_found_out_and_its_mail_kept_for_its_next_life() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.crash()
    alice.type("send bob hello")
    world.run(3)
    assert alice.lines[-3:] == ["[No ACK from bob, message sent to server.]", "[Client table updated.]",
                                "[Messages received by the server and saved]"]
    again = world.client("bob")
    world.run(3)
    assert ends(again, "> hello") == 1 and count(again, "[You have messages]") == 1


def test_unknown_and_too_long_messages_are_refused_at_once_and_make_the_exit_code_1() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.type("send nobody hello")
    alice.type("send bob " + "x" * (protocol.MAX_TEXT + 1))
    alice.type("send bob " + "y" * protocol.MAX_TEXT)
    alice.end_input()
    world.run(5)
    assert count(alice, "[Unknown client nobody.]") == 1
    assert count(alice, f"[Message too long: {protocol.MAX_TEXT + 1} bytes, at most {protocol.MAX_TEXT}.]") == 1
    assert count(alice, "[Message received by bob.]") == 1 and alice.exit_code == 1


def test_a_full_mailbox_refuses_and_says_so() -> None:
    world, (alice, bob) = start("alice", "bob", mailbox=3)
    bob.type("dereg bob")
    world.run(1)
    for number in range(5):
        alice.type(f"send bob m{number}")
    world.run(2)
    assert count(alice, "[Messages received by the server and saved]") == 3
    assert count(alice, "[Mailbox of bob is full, message not saved.]") == 2
    bob.type("reg bob")
    world.run(3)
    assert [line[-2:] for line in bob.lines if line.startswith("alice: ")] == ["m0", "m1", "m2"]


def test_while_the_disk_fails_nothing_counts_as_saved() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    world.disk.failing = True
    alice.type("send bob lost")
    world.run(2)
    assert alice.lines[-1] == "[The server cannot save messages now, message for bob not saved.]"
    world.disk.failing = False
    alice.type("send bob kept")
    world.run(2)
    bob.type("reg bob")
    world.run(3)
    assert ends(bob, "kept") == 1 and ends(bob, "lost") == 0


def test_mail_that_cannot_be_read_from_the_disk_comes_when_it_can() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    alice.type("send bob hello")
    world.run(1)
    bob.type("reg bob")
    world.disk.failing, world.disk.reading = True, False
    world.run(5)
    assert not ends(bob, "> hello")
    world.disk.failing = False
    world.run(3)
    assert ends(bob, "> hello") == 1 and alice.client.table_sync.table.is_online("bob")


# --- slow and gone readers ------------------------------------------------------------------------------------

def test_a_stalled_reader_makes_the_sender_wait_then_relay_and_loses_nothing() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.screen.set_rate(0)
    for number in range(400):
        alice.type(f"send bob m{number} " + "x" * 500)
    world.run(20)
    received = count(alice, "[Message received by bob.]")
    assert 0 < received < 400 and not count(alice, "[No ACK from bob, message sent to server.]"), "it waits"
    world.run(40)
    assert count(alice, "[No ACK from bob, message sent to server.]") == 400 - received
    assert count(alice, "[Messages received by the server and saved]") == 400 - received
    alice.end_input()
    world.run(2)
    assert alice.exit_code == 0
    bob.screen.set_rate(float("inf"))
    world.run(20)
    shown = [line for line in bob.lines if line.startswith("alice: ")]
    assert len(shown) == 400 and [line.split(" ")[-2] for line in shown] == [f"m{number}" for number in range(400)]


def test_a_slow_reader_gets_everything_in_order_and_the_sender_goes_at_its_pace() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.screen.set_rate(5000)
    for number in range(300):
        alice.type(f"send bob m{number} " + "x" * 500)
    alice.end_input()
    world.run(20)
    assert alice.exit_code is None
    world.run(40)
    assert alice.exit_code == 0 and count(alice, "[Message received by bob.]") == 300
    assert sum(line.startswith("alice: ") for line in bob.lines) == 300


def test_a_client_whose_reader_goes_away_leaves_and_ends_with_1() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.screen.gone = True
    alice.type("send bob hello")
    world.run(4)
    assert bob.exit_code == 1 and count(alice, "[Messages received by the server and saved]") == 1
    again = world.client("bob")
    world.run(3)
    assert ends(again, "> hello") == 1, "nobody has read it yet"


# --- the server comes and goes --------------------------------------------------------------------------------

def test_a_server_restarted_at_once_knows_nobody_online_and_everyone_comes_back_within_one_ping_interval() -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    assert world.server is not None
    world.server.crash()
    table = world.start_server().server.registry.table
    assert [entry.state for entry in table.entries.values()] == ["offline"] * 3
    world.run(PING_INTERVAL)
    assert [entry.state for entry in table.entries.values()] == ["online"] * 3
    for life in (alice, bob, carol):
        assert [entry[:4] for entry in sorted(life.client.table_sync.table.entries.values())] \
            == [entry[:4] for entry in sorted(table.entries.values())]
        assert count(life, "[Welcome, You are registered.]") == 2 and life.alive


def test_clients_chat_while_the_server_is_away() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    world.server.crash()
    world.run(60)
    alice.type("send bob hello")
    world.run(1)
    assert count(bob, "alice: hello") == 1 and count(alice, "[Message received by bob.]") == 1
    assert count(alice, "[Server not responding]") == 1, "once for each outage"


def test_an_outage_makes_no_storm_however_long_it_lasts() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    assert world.server is not None
    world.server.crash()
    alice.type("send bob hello")
    world.run(30)
    before = alice.sent
    world.run(600)
    assert alice.sent - before <= 2 * 600, "at most two datagrams a second"
    assert count(alice, "[Server not responding]") == 1
    world.start_server()
    world.run(10)
    assert count(alice, "[Messages received by the server and saved]") == 1


def test_a_server_without_anybody_to_serve_does_nothing() -> None:
    world, (alice, bob) = start("alice", "bob")
    for life in (alice, bob):
        life.crash()
    world.run(120)
    assert world.server is not None
    before = world.server.sent
    world.run(1000)
    assert world.server.sent == before


def test_a_client_that_dies_is_found_out_even_if_everybody_was_lost_before() -> None:
    world, (alice, bob) = start("alice", "bob")
    for nick in ("alice", "bob"):
        world.network.block(nick, "server")
    world.run(120)
    world.network.blocked.clear()
    world.run_until(lambda: is_ready(alice) and is_ready(bob), 60)
    bob.crash()
    world.run_until(lambda: not alice.client.table_sync.table.is_online("bob"), 120)
    assert not alice.client.table_sync.table.is_online("bob")


def test_a_client_whose_server_dies_before_it_could_come_online_says_so_and_ends() -> None:
    world = World(1)
    server = world.start_server()
    world.network.filter = losing("table")
    alice = world.client("alice")
    alice.end_input()
    world.run(1)
    assert alice.lines == ["[Welcome, You are registered.]"]
    server.crash()
    world.run(30)
    assert alice.lines[1:] == ["[Server not responding]", "[Exiting]"] and alice.exit_code == 1


@pytest.mark.parametrize("steps", range(6))
def test_a_message_that_was_saved_survives_a_crash_at_any_step_and_is_shown_once(steps: int) -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    assert world.server is not None
    world.server.fuse = steps
    alice.type("send bob hello")
    world.run(4)
    if world.server.alive:
        world.server.crash()
    world.start_server()
    world.run(20)
    bob.type("reg bob")
    world.run(20)
    assert ends(bob, "hello") == 1 and count(alice, "[Messages received by the server and saved]") == 1


def test_mail_of_many_processes_is_shown_once_though_the_server_dies_while_its_reader_pauses() -> None:
    world, (bob,) = start("bob")
    bob.type("dereg bob")
    world.run(1)
    for number in range(30):
        alice = world.client("alice")
        alice.type(f"send bob m{number} " + "x" * 9000)
        alice.end_input()
        world.run(2)
        assert alice.exit_code == 0
    bob.screen.set_rate(0)
    bob.type("reg bob")
    world.run(3)
    for _ in range(3):
        assert world.server is not None
        world.server.crash()
        mailbox = world.start_server().server.registry.mailbox
        world.run(20)
    assert mailbox.known["bob"].messages == 30, "none of them was acked"
    bob.screen.set_rate(float("inf"))
    world.run(5)
    shown = [line.split(" ")[-2] for line in bob.lines if line.startswith("alice: ")]
    assert shown == [f"m{number}" for number in range(30)]
    assert mailbox.known["bob"].messages == 0


def test_a_message_whose_ack_was_lost_is_shown_once_however_many_of_its_nick_came_since() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.filter = losing("ack", source="bob", target="alice")
    alice.type("send bob first")
    world.run(0.05)
    assert count(bob, "alice: first") == 1
    alice.stop_for(120)
    world.run(1)
    world.network.filter = None
    alice.inbox.clear()
    world.run(50)
    for number in range(12):
        other = world.client("alice")
        other.type(f"send bob m{number}")
        other.end_input()
        world.run_until(lambda: not other.alive)
        assert other.exit_code == 0 and ends(bob, f" m{number}") == 1
    world.run(150)
    assert alice.alive and ends(bob, "first") == 1


@pytest.mark.parametrize("steps", range(8))
def test_mail_survives_crashes_of_its_recipient_and_of_the_server_while_it_is_delivered(steps: int) -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    for number in range(50):
        alice.type(f"send bob m{number}")
    world.run(2)
    bob.crash()
    for _ in range(3):
        again = world.client("bob")
        again.fuse = 4 + steps
        world.run(1)
        assert world.server is not None
        world.server.fuse = steps
        world.run(5)
        world.server.fuse = -1
        if not world.server.alive:
            world.start_server()
        again.crash()
    final = world.client("bob")
    world.run(30)
    seen = [line.split(" ")[-1] for life in world.lives for line in life.lines if line.startswith("alice: ")]
    assert set(seen) == {f"m{number}" for number in range(50)} and final.client.table_sync.table.is_online("bob")


def test_a_table_that_does_not_come_makes_nobody_unknown() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    world.server.crash()
    world.network.filter = losing("table")
    world.start_server()
    world.run(60)
    alice.type("send bob hello")
    world.run(5)
    assert not count(alice, "[Unknown client bob.]")
    world.network.filter = None
    world.run(30)
    assert ends(bob, "hello") == 1


# --- a server that moves --------------------------------------------------------------------------------------

DEAD = [("10.0.9.1", 4119), ("2001:db8::9", 4119), ("10.0.9.2", 4119)]
RETURN_TIME = 40.0        # s that are promised from a move of the server until its clients are back


def is_back(life: Life) -> bool:
    """Return whether a client is online where the server is now."""
    server = life.world.server
    return server is not None and life.client.link.endpoint.current == server.address and is_ready(life) and (
        not life.client.link.is_silent and server.server.registry.table.is_online(life.nick))


def moved(case: str, world: World) -> None:
    """Let the server be elsewhere, and lead its name there."""
    assert world.server is not None
    if case == "at another address":
        world.server.move(ELSEWHERE)
        world.names = [ELSEWHERE]
    else:
        world.server.crash()
        world.names = [ELSEWHERE]
        if case == "on another host, with a new store":
            world.disk = Disk()
        world.start_server()


@pytest.mark.parametrize("clients", ["stay", "move, too", "are seen elsewhere, but still reached where they were"])
@pytest.mark.parametrize("case", ["at another address", "on another host", "on another host, with a new store"])
def test_clients_find_a_server_that_has_moved_and_lose_nothing(case: str, clients: str) -> None:
    world, (alice, bob, carol) = start("alice", "bob", "carol")
    carol.type("dereg carol")
    world.run(1)
    if case != "on another host, with a new store":
        alice.type("send carol before")
        world.run(1)
    moved(case, world)
    if clients != "stay":
        for number, life in enumerate((alice, bob)):
            before = life.address
            life.move(("10.0.2.1", 6000 + number))
            if clients != "move, too":
                world.at[before] = life
    world.run_until(lambda: is_back(alice) and is_back(bob), RETURN_TIME)
    carol.type("reg carol")
    world.run_until(lambda: is_ready(carol), 10)
    world.run(2)
    alice.type("send bob hello")
    bob.type("send carol behind")
    world.run(5)
    assert count(bob, "alice: hello") == 1 and count(carol, "bob: behind") == 1
    assert ends(carol, "> before") == int(case != "on another host, with a new store")
    for life in (alice, bob):
        assert life.alive and count(life, "[Server not responding]") == 1, "once for each outage"


def test_peers_chat_while_their_server_moves() -> None:
    world, (alice, bob) = start("alice", "bob")
    moved("at another address", world)
    for second in range(45):
        alice.type(f"send bob {second}")
        world.run(1)
        assert count(bob, f"alice: {second}") == 1
    assert is_back(alice) and is_back(bob)
    assert not any("No ACK" in line or "saved" in line for line in alice.lines)


def test_a_client_whose_server_answers_from_another_address_goes_on_with_its_session() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    sessions = [life.client.link.session for life in (alice, bob)]
    world.server.move(ELSEWHERE)
    world.at[SERVER] = world.server             # it is asked where it was, and answers from elsewhere
    world.run_until(lambda: is_back(alice) and is_back(bob), RETURN_TIME)
    del world.at[SERVER]
    bob.type("dereg bob")
    world.run(5)
    alice.type("send bob later")
    world.run(2)
    assert [alice.client.link.session, bob.client.link.session] == [sessions[0], None]
    assert not count(alice, "[Server not responding]") and count(alice, "[bob is offline, message sent to server.]")


def test_a_client_is_back_at_once_when_the_network_swallowed_what_its_server_said() -> None:
    world, (alice, bob) = start("alice", "bob")
    session = alice.client.link.session
    world.network.block("server", "alice", 60)
    world.run(59)
    alice.type("send bob hello")
    world.run(0.5)
    assert count(bob, "alice: hello") == 1 and alice.client.link.is_silent
    world.run(10)
    assert is_back(alice) and alice.client.link.session == session, "it was there all the time"
    assert count(alice, "[Server not responding]") == 1


def test_a_session_that_goes_on_is_not_replaced_by_one_that_was_asked_for_meanwhile() -> None:
    for delay in (0.001, 0.05, 0.2, 0.4):
        world, (alice,) = start("alice")
        session = alice.client.link.session
        world.network.weather = Weather(delay=delay)
        world.network.block("alice", "server", 40)
        world.run(60)
        assert is_back(alice) and alice.client.link.session == session and count(alice, "[Server not responding]") == 1


@pytest.mark.parametrize("case", ["reg", "the server has restarted"])
def test_a_client_registers_again_if_an_earlier_request_that_came_late_has_taken_its_place(case: str) -> None:
    world, (alice,) = start("alice")
    if case == "reg":
        alice.type("dereg alice")
        world.run(2)
        alice.type("reg alice")
    elif world.server is not None:
        world.server.crash()
        world.start_server()
    handshake = alice.client.link.handshake
    world.run_until(lambda: handshake.id != NO_REQUEST and handshake.has_cookie, 40)
    world.network.block("server", "alice", 0.3)         # the welcome is lost
    node = world.server
    assert node is not None
    gate, registry = node.server.gate, node.server.registry
    world.run_until(lambda: registry.sessions.of("alice") is not None, 1)
    granted = registry.sessions.of("alice")
    late = Handshake(lambda datagram, _: node.receive(datagram, alice.address), partial(token_for, own_secret("alice")))
    late.begin(1, "alice")
    late.ask([SERVER])
    late.on_cookie({"id": 1, "server": registry.server_id, "cookie": gate.cookies.make(node.loop.now(), alice.address)},
                   SERVER)
    assert registry.sessions.of("alice") is not granted
    world.run(10)
    assert alice.alive and is_back(alice)


@pytest.mark.parametrize("reason", ["taken", "owned", "full"])
def test_a_client_that_is_refused_while_its_server_is_silent_goes_on(reason: str) -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.block("server", "alice")
    world.run(25)
    assert alice.client.link.is_silent
    for _ in range(5):
        world.run_until(lambda: alice.client.link.handshake.id >= 0, 10)
        refusal = {"id": alice.client.link.handshake.id, "nick": "alice", "reason": reason}
        alice.client.receive(encode("refused", refusal), ELSEWHERE)
    assert alice.alive and not alice.client.leaving.is_over
    alice.type("send bob hello")
    world.run(1)
    assert count(bob, "alice: hello") == 1
    world.network.unblock("server", "alice")
    world.run(10)
    assert is_back(alice) and count(alice, "[Server not responding]") == 1


def test_mail_comes_at_once_although_an_older_answer_overtakes_the_table() -> None:
    world, _, _ = start_with_mail()
    held: list[bytes] = []

    def hold_first_pong(source: str, target: str, maps: list[Any]) -> bool:
        pongs = [encode("pong", value["info"]) for value in maps if value["tag"] == "pong"]
        if target != "bob" or not pongs or held:
            return True
        held.extend(pongs)
        world.call_at(world.now + 0.2, lambda: world.network.arrive("server", SERVER, held[0], again.address))
        return False
    world.network.filter = hold_first_pong
    again = world.client("bob")
    again.client.on_joined = lambda: again.client.link.ping_until_answered()     # as ``ask`` does
    world.run(3)
    assert held and ends(again, "hello") == 1


def test_a_silent_server_is_asked_rarely_at_all_of_its_addresses_for_as_long_as_it_takes() -> None:
    world = World(1)
    world.names = [SERVER, *DEAD, *((f"10.0.9.{number}", 4119) for number in range(10, 14))]
    world.start_server()
    alice = world.client("alice")
    world.run(5)
    assert is_ready(alice) and world.server is not None
    world.server.crash()
    asked: Counter[str] = Counter()

    def note(source: str, target: str, maps: list[Any]) -> bool:
        asked.update(value["tag"] for value in maps)
        return True
    world.network.filter = note
    world.run(60)
    asked.clear()
    world.look_ups, sent = 0, alice.sent
    world.run(3600)
    assert alice.sent - sent <= 3 * 3600 and asked["reg"] / len(world.names) >= 3600 / 10
    assert 3600 / 30 <= world.look_ups <= 3600 / 15, "its name is looked up now and then"
    assert count(alice, "[Server not responding]") == 1 and len(alice.loop.timers) < 20
    assert len(alice.client.link._pings) <= PINGS_REMEMBERED
    world.start_server()
    world.run(10)
    assert is_back(alice)


def test_a_name_is_looked_up_only_while_its_server_is_silent() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.run(3600)
    assert world.look_ups == 0
    world.network.block("server", "alice", 10)
    world.run(3600)
    assert 1 <= world.look_ups <= 4 and is_back(alice)


def test_what_is_looked_up_while_the_server_is_away_is_asked_even_if_look_ups_failed_before() -> None:
    world, (alice,) = start("alice")
    world.look_up_time = float("inf")
    moved("on another host", world)
    world.run(300)
    assert alice.client.link.is_silent and world.look_ups > 5
    world.look_up_time = 0.05
    world.run_until(lambda: is_back(alice), RETURN_TIME)


@pytest.mark.parametrize("place", range(4))
def test_a_client_that_starts_tries_all_addresses_of_a_name_in_the_time_that_one_takes(place: int) -> None:
    world = World(1)
    world.names = [*DEAD[:place], SERVER, *DEAD[place:]]
    world.boots = 0
    world.server = ServerNode(world, SERVER)
    alice = world.client("alice")
    world.run(2.5)
    assert is_ready(alice) and not count(alice, "[Server not responding]")
    nowhere = World(1)
    nowhere.names = DEAD
    bob = nowhere.client("bob")
    nowhere.run(5 * 0.5 * 1.25 + 0.1)
    assert bob.exit_code == 1 and bob.lines == ["[Server not responding]", "[Exiting]"]
    assert bob.sent == 1 + 4 * len(DEAD)


def test_what_holds_the_session_goes_only_to_where_the_server_was_found() -> None:
    world = World(1)
    world.names = [DEAD[0], SERVER, *DEAD[1:]]
    world.server = ServerNode(world, SERVER)
    said: dict[str, set[str]] = {}
    send = world.network.send

    def note(node: Node, datagram: bytes, address: Address) -> None:
        for tag in tags_of(datagram):
            said.setdefault(address[0], set()).add(tag)
        send(node, datagram, address)
    world.network.send = note       # type: ignore[method-assign]
    world.client("alice")
    world.run(5)
    world.server.crash()
    world.run(300)
    for host, _ in DEAD:
        assert said[host] == {"reg"}
    assert "ping" in said[SERVER[0]]


# --- who is who -----------------------------------------------------------------------------------------------

def test_a_client_that_moved_is_found_again() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.move(world.new_address("10.0.2.1"))
    alice.type("send bob hello")
    world.run(PING_INTERVAL * 1.3 + 3)
    assert ends(bob, "hello") == 1
    entry = alice.client.table_sync.table.get("bob")
    assert entry is not None and (entry.host, entry.port) == bob.address and entry.state == "online"
    alice.type("send bob again")
    world.run(1)
    assert count(bob, "alice: again") == 1


def test_the_table_of_a_dead_server_does_not_stay_in_force_because_of_dereg_and_reg() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    world.server.crash()
    world.start_server()
    world.network.filter = losing("table", target="alice")
    world.run_until(lambda: count(alice, "[Welcome, You are registered.]") == 2, 40)
    alice.type("dereg alice")
    world.run_until(lambda: alice.client.is_offline, 40)
    alice.type("reg alice")
    bob.crash()
    world.run(OLD_TABLE_TIME + 2)
    entry = alice.client.table_sync.table.get("bob")
    assert entry is not None and entry.state == "offline"


@pytest.mark.parametrize("command", ["dereg bob", "quit"])
def test_a_client_can_leave_from_an_address_to_which_it_has_just_moved(command: str) -> None:
    world, (bob,) = start("bob")
    bob.move(world.new_address("10.0.2.1"))
    bob.type(command)
    world.run(2)
    assert bob.lines[-1] == "[You are Offline. Bye.]" and bob.exit_code == (0 if command == "quit" else None)
    assert world.server is not None and not world.server.server.registry.sessions


def test_a_second_client_with_the_same_nick_is_refused_while_the_first_runs() -> None:
    world, (alice, bob) = start("alice", "bob")
    other = world.client("alice")
    world.run(3)
    assert other.lines == ["[Nickname alice is taken.]", "[Exiting]"] and other.exit_code == 1
    bob.type("send alice hello")
    world.run(1)
    assert count(alice, "bob: hello") == 1


def test_a_client_that_was_replaced_while_it_was_stopped_ends_when_it_goes_on() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.stop_for(30)
    other = world.client("alice")
    world.run(5)
    assert is_ready(other)
    world.run(60)
    assert alice.lines[-2:] == ["[Nickname alice is taken.]", "[Exiting]"] and alice.exit_code == 1
    bob.type("send alice hello")
    world.run(1)
    assert count(other, "bob: hello") == 1


# --- jobs: what `udpchat send` is ---------------------------------------------------------------------------------

TAKEN, FULL, SILENT = "[Nickname alice is taken.]", "[The server is full.]", "[Server not responding]"
LOST = ["[1 message not delivered.]", "[Exiting]"]
JOB_DONE = ["[bob is offline, message sent to server.]", "[Messages received by the server and saved]"]


def start_without(nick: str, *nicks: str) -> tuple[World, list[Life]]:
    """Return what ``start`` does; ``nick`` is known, and offline."""
    world, (absent, *lives) = start(nick, *nicks)
    absent.end_input()
    world.run(2)
    assert absent.exit_code == 0
    return world, lives


def said(life: Life) -> list[str]:
    """Return what a job has said, but what ``udpchat send`` does not show."""
    return [line for line in life.lines if line not in (
        "[Welcome, You are registered.]", "[Client table updated.]", "[You are Offline. Bye.]")]


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("jobs", [5, 10])
def test_jobs_that_start_at_the_same_instant_with_one_nick_all_deliver_and_none_throws_out_another(
        jobs: int, loss: float) -> None:
    for seed in range(10):
        world = World(seed)
        world.start_server()
        bob = world.client("bob")
        world.run(3)
        world.network.weather = Weather(loss=loss)
        lives = [world.job("alice", f"send bob number-{number}") for number in range(jobs)]
        world.run_until(lambda: not any(life.alive for life in lives), 20)
        assert [life.exit_code for life in lives] == [0] * jobs
        # some may have gone by the server, and show the time when they were sent
        assert sorted(line.rpartition(" ")[2] for line in bob.lines if line.startswith("alice: ")) == sorted(
            f"number-{number}" for number in range(jobs))
        if not loss:
            assert all(count(life, "[Welcome, You are registered.]") == 1 for life in lives), "nobody was replaced"


def test_a_job_whose_nick_runs_for_ever_gives_up_after_ten_seconds_and_hands_its_message_back() -> None:
    world, (alice, bob) = start("alice", "bob")
    began = world.now
    job = world.job("alice", "send bob hello")
    world.run(NICK_PATIENCE - 0.1)
    assert job.lines == [] and job.alive
    assert NICK_PATIENCE <= job.sent <= 2 * NICK_PATIENCE / (0.5 * 0.75), "it asks at a moderate pace"
    world.run_until(lambda: not job.alive, 1)
    assert world.now - began < NICK_PATIENCE + 0.1
    assert (job.exit_code, job.lines, job.complaints) == (1, [TAKEN, *LOST], ["send bob hello"])
    assert alice.alive and not ends(alice, "taken.]")


@pytest.mark.parametrize("timeout", [NEVER, 30.0])
def test_a_job_gets_in_as_soon_as_the_holder_of_its_nick_has_left(timeout: float) -> None:
    world, (alice, bob) = start("alice", "bob")
    job = world.job("alice", "send bob hello", timeout)
    world.run(3)
    alice.end_input()
    world.run_until(lambda: alice.exit_code == 0, 2)
    world.run(1.5)
    assert job.exit_code == 0 and said(job) == ["[Message received by bob.]"] and count(bob, "alice: hello") == 1


def test_with_a_time_limit_a_job_waits_for_its_nick_until_that_is_over_and_not_beyond() -> None:
    world, (alice, bob) = start("alice", "bob")
    job = world.job("alice", "send bob hello", 25)
    world.run(24.9)
    assert job.lines == [] and job.alive
    world.run(0.2)
    assert (job.exit_code, job.lines, job.complaints) == (1, [TAKEN, *LOST], ["send bob hello"])


def test_a_nick_that_is_another_ones_is_not_waited_for() -> None:
    world, (bob,) = start("bob")
    thief = Life(world, "bob", world.new_address(), bytes(32), timeout=60, nick_patience=NICK_PATIENCE)
    world.run(1)
    assert thief.lines == ["[Nickname bob belongs to someone else.]", "[Exiting]"] and thief.exit_code == 1


def test_a_job_that_was_replaced_while_it_was_stopped_waits_for_its_nick_again_and_delivers_once() -> None:
    world, (bob,) = start_without("alice", "bob")
    world.network.filter = losing("chat", "save", source="alice")
    first = world.job("alice", "send bob one", 90)
    world.run(2)
    assert is_ready(first)
    first.stop_for(3)
    second = world.job("alice", "send bob two", 90)
    world.run(2)
    assert is_ready(second)
    world.run(2 * PING_INTERVAL)
    assert first.alive and not ends(first, "taken.]")
    world.network.filter = None
    world.run_until(lambda: not first.alive and not second.alive, 30)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert (count(first, "[Welcome, You are registered.]"), count(second, "[Welcome, You are registered.]")) == (2, 1)
    assert sorted(line for line in bob.lines if line.startswith("alice: ")) == ["alice: one", "alice: two"]


@pytest.mark.parametrize("late", [1.0, 4.0, 20.0])
def test_with_a_time_limit_a_job_waits_for_a_server_that_is_not_up_yet_and_says_nothing_of_it(late: float) -> None:
    world, _ = start_without("bob")
    assert world.server is not None
    world.server.crash()
    job = world.job("alice", "send bob hello", 30)
    world.run(late)
    assert job.alive and job.lines == []
    world.start_server()
    world.run(3)
    assert job.exit_code == 0 and said(job) == JOB_DONE


def test_with_a_time_limit_a_job_gives_up_a_silent_server_when_that_is_over() -> None:
    world = World(1)
    job = world.job("alice", "send bob hello", 12)
    world.run(11.9)
    assert job.alive and job.lines == []
    world.run(0.2)
    assert (job.exit_code, len(job.complaints)) == (1, 1)
    assert job.lines == [SILENT, *LOST]


def test_without_a_time_limit_a_job_gives_up_a_silent_server_as_soon_as_a_client_does() -> None:
    world = World(1)
    job, client = world.job("alice", "send bob hello"), world.client("carol")
    world.run(2.5 * 1.25)
    assert job.lines == [SILENT, *LOST] and client.lines == [SILENT, "[Exiting]"]


@pytest.mark.parametrize("is_large, limit", [(False, 4.0), (True, 7.0)])
def test_a_server_that_falls_silent_before_the_table_is_given_up_soon(is_large: bool, limit: float,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a large table may let its clients wait for it, when many come at once."""
    monkeypatch.setattr(registry, "LARGE_TABLE", 0 if is_large else 1000)
    world = World(1)
    world.start_server()
    world.network.filter = losing("table", "packed", "pong")
    job, client = world.job("alice", "send bob hello"), world.client("carol")
    world.run(limit)
    assert said(job) == [SILENT, *LOST]
    assert client.lines == ["[Welcome, You are registered.]", SILENT, "[Exiting]"]


@pytest.mark.parametrize("lost", ["cookie", "welcome", "table", "ack"])
@pytest.mark.parametrize("outage", [1.0, 8.0, 100.0])
def test_with_a_time_limit_a_job_outlives_a_restart_of_the_server_at_any_of_its_steps(lost: str, outage: float) -> None:
    world, _ = start_without("bob")
    assert world.server is not None
    world.network.filter = losing(lost, source="server")
    job = world.job("alice", "send bob hello", 300)
    world.run(1)
    world.server.crash()
    world.run(outage)
    assert job.alive and SILENT not in job.lines
    world.network.filter = None
    world.start_server()
    world.run_until(lambda: not job.alive, 30)
    assert job.exit_code == 0 and said(job) == JOB_DONE
    assert len(world.ledger.messages) == 1


def test_with_a_time_limit_a_job_says_at_its_end_that_the_server_has_gone_while_it_was_online() -> None:
    world, _ = start_without("bob")
    assert world.server is not None
    world.network.filter = losing("ack", source="server")
    job = world.job("alice", "send bob hello", 20)
    world.run(1)
    world.server.crash()
    world.run(18.9)
    assert job.alive and said(job) == JOB_DONE[:1]
    world.run(0.2)
    assert said(job) == [JOB_DONE[0], SILENT, *LOST] and job.exit_code == 1


@pytest.mark.parametrize("gets_in", [True, False])
def test_at_its_end_a_job_names_what_it_waits_for_then_and_not_what_it_has_waited_for_before(gets_in: bool) -> None:
    world, (bob, alice) = start("bob", "alice")
    assert world.server is not None
    bob.end_input()
    world.network.filter = losing("ack", source="server")
    job = world.job("alice", "send bob hello", 20)
    world.run(3)
    if gets_in:
        alice.end_input()
        world.run(3)
        assert is_ready(job)
    world.server.crash()
    world.run(20)
    assert job.lines[-3:] == [SILENT, *LOST] and TAKEN not in job.lines


def test_a_job_whose_message_gets_through_while_the_server_is_gone_succeeds_and_names_the_silence_at_its_end() -> None:
    world, (bob,) = start_without("alice", "bob")
    assert world.server is not None
    bob.screen.set_rate(0)
    world.job("carol", "send bob more-than-a-pipe-holds " + "x" * 60000)
    world.run(2)
    job = world.job("alice", "send bob hello " + "y" * 10000, 200)
    world.run(2)
    world.server.crash()
    world.run(24)
    assert job.client.link.is_silent and said(job) == []
    bob.screen.set_rate(1e6)
    world.run_until(lambda: not job.alive, 30)
    assert said(job) == ["[Message received by bob.]", SILENT, "[Exiting]"] and job.exit_code == 0


@pytest.mark.parametrize("is_mended", [True, False])
def test_with_a_time_limit_a_job_waits_for_a_place_on_a_full_server(is_mended: bool) -> None:
    world, (bob,) = start("bob")
    assert world.server is not None
    world.server.server.registry.max_clients = 1
    hasty, job = world.job("alice", "send bob early"), world.job("alice", "send bob hello", 20)
    world.run(10)
    assert hasty.lines == [FULL, *LOST] and job.lines == []
    if is_mended:
        world.server.server.registry.max_clients = 2
    world.run(10.5)
    assert said(job) == (["[Message received by bob.]"] if is_mended else [FULL, *LOST])
    assert job.exit_code == (0 if is_mended else 1)


def test_with_a_time_limit_a_job_waits_also_for_a_recipient_who_takes_nothing_for_minutes() -> None:
    world, (bob,) = start("bob", mailbox=1)
    bob.screen.set_rate(0)
    for number in range(2):     # one for the pipe that nobody reads, and one for the mailbox
        world.job("carol", f"send bob {number} " + "x" * 60000)
        world.run(40)
    hasty, job = world.job("dave", "send bob early", NEVER), world.job("alice", "send bob hello", 400)
    world.run(200)
    assert job.alive and hasty.exit_code == 1 and hasty.complaints == ["send bob early"]
    bob.screen.set_rate(1e6)
    world.run_until(lambda: not job.alive, 60)
    assert job.exit_code == 0 and ends(bob, " hello") == 1


@pytest.mark.parametrize("what", ["silence", "nick", "outage"])
def test_a_signal_ends_a_job_within_two_seconds_whatever_it_waits_for(what: str) -> None:
    world, lives = start("bob", "alice") if what == "nick" else start_without("bob")
    assert world.server is not None
    if what == "silence":
        world.server.crash()
    elif what == "outage":
        world.network.filter = losing("ack", source="server")
    job = world.job("alice", "send bob hello", 60)
    world.run(2)
    if what == "outage":
        world.server.crash()
        world.run(5)
    job.interrupt()
    world.run(2)
    assert job.exit_code == 1 and job.complaints == ["send bob hello"]
    assert "[1 message not delivered.]" in job.lines


def test_a_nick_belongs_to_its_first_owner_also_while_nobody_runs_with_it() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.end_input()
    world.run(2)
    thief = world.client("alice", secret=bytes(32))
    world.run(3)
    assert thief.lines == ["[Nickname alice belongs to someone else.]", "[Exiting]"] and thief.exit_code == 1


def test_a_late_copy_of_an_old_registration_does_not_throw_its_sender_out() -> None:
    world, (alice, bob) = start("alice", "bob")
    copies: list[bytes] = []

    def keep(source: str, target: str, maps: list[Any]) -> bool:
        copies.extend(encode(value["tag"], value["info"]) for value in maps
                      if value["tag"] == "reg" and "cookie" in value["info"])
        return True
    world.network.filter = keep
    for line in ("dereg alice", "reg alice", "dereg alice", "reg alice"):
        alice.type(line)
        world.run(2)
    assert len(copies) == 2 and world.server is not None
    world.server.arrive(copies[0], alice.address)
    world.run(PING_INTERVAL * 2)
    assert alice.alive and count(alice, "[Welcome, You are registered.]") == 3


def test_a_stranger_makes_nobody_show_anything_or_ask_without_end() -> None:
    world, (alice, bob) = start("alice", "bob")
    lines, sent = len(bob.lines), bob.sent
    for number in range(1000):
        world.call_at(world.now + number * 0.01, lambda: bob.arrive(encode("chat", {
            "from": "alice", "to": "bob", "stream": 7, "n": 1, "base": 1, "text": ["forged"]}), ("10.66.6.6", 666)))
    world.run(10)
    assert len(bob.lines) == lines
    assert bob.sent - sent <= 10 / SYNC_INTERVAL + 5, "it asks for the table, but not each time"
    sent = bob.sent
    world.run(10)
    assert bob.sent - sent <= 5


def test_the_server_answers_strangers_with_no_more_than_it_got() -> None:
    world, _ = start("alice")
    assert world.server is not None
    server, got, session = world.server, [0], bytes(16)
    for datagram in (encode("ping", {"id": 1, "session": session, "version": 0}), encode("dereg", {"session": session}),
                     encode("sync", {"session": session, "version": 0}), encode("reg", {"id": 1, "nick": "x"}),
                     protocol.padded("reg", {"id": 1, "nick": "alice"}, protocol.REG_SIZE)):
        world.network.forge(("10.66.6.6", 1), datagram, server)
        got[0] += len(datagram)
    world.run(5)
    assert 0 <= world.network.balance["10.66.6.6", 1] <= got[0]


# --- coming and leaving ---------------------------------------------------------------------------------------

def test_a_client_that_leaves_does_not_register_again_though_the_server_comes_back() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    bob.crash()
    world.server.crash()
    alice.type("send bob hello")
    alice.type("quit")
    newcomer = encode("chat", {"from": "carol", "to": "alice", "stream": 7, "n": 1, "base": 1, "text": ["hello"]})
    for _ in range(200):        # whoever is not in the table makes a client ask for it
        world.network.forge(("10.66.6.6", 1), newcomer, alice)
        world.run(0.05)
        if alice.client.link.state is LINK_LEAVING and not world.server.alive:
            world.network.filter = losing("pong", "bye", source="server")
            world.start_server()
    assert alice.exit_code == 1 and count(alice, "[Welcome, You are registered.]") == 1


def test_a_script_that_is_piped_in_is_delivered_in_order_and_ends_with_0() -> None:
    world, (alice, bob) = start("alice", "bob")
    world.network.weather = Weather(loss=0.2, repeat=0.1, delay=0.02, jitter=0.05)
    for number in range(500):
        alice.type(f"send bob m{number}")
    alice.end_input()
    world.run(60)
    assert alice.exit_code == 0
    shown = [line.split(" ")[-1] for line in bob.lines if line.startswith("alice: ")]
    assert shown == [f"m{number}" for number in range(500)]


def test_with_stay_a_client_goes_on_receiving_after_the_end_of_stdin() -> None:
    world, (alice, bob) = start("alice", "bob", stay=True)
    bob.end_input()
    world.run(5)
    alice.type("send bob hello")
    world.run(1)
    assert bob.alive and count(bob, "alice: hello") == 1
    bob.interrupt()
    world.run(1)
    assert bob.exit_code == 0 and bob.lines[-1] == "[You are Offline. Bye.]"


def test_dereg_with_a_silent_server_ends_with_exit_1_and_names_what_was_not_delivered() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(2)
    assert world.server is not None
    world.server.crash()
    alice.type("send bob hello")
    alice.type("dereg alice")
    world.run(15)
    assert alice.lines[-5:] == ["[bob is offline, message sent to server.]", "[Server not responding]",
                                "[Server not responding]", "[1 message not delivered.]", "[Exiting]"]
    assert alice.exit_code == 1 and alice.complaints == ["send bob hello"]


def test_the_end_of_stdin_with_a_silent_server_ends_with_0_if_nothing_is_left() -> None:
    world, (alice, bob) = start("alice", "bob")
    assert world.server is not None
    world.server.crash()
    alice.type("send bob hello")
    alice.end_input()
    world.run(10)
    assert alice.exit_code == 0 and count(alice, "[Message received by bob.]") == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_lines_that_come_together_with_a_signal_are_not_read(signals: int) -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.stop_for(3)
    for _ in range(signals):
        alice.interrupt()
    alice.type("send bob hello")
    world.run(5)
    assert not alice.alive and alice.fed == 0 and alice.exit_code == 0
    assert ends(bob, "hello") == 0 and not alice.complaints


def test_a_signal_ends_a_client_within_two_seconds_and_names_everything_that_was_read() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(2)
    assert world.server is not None
    world.server.crash()
    for line in ("send bob m1", "send bob m2", "dereg alice", "send bob m3"):
        alice.type(line)
    world.run(1)
    alice.interrupt()
    world.run(2.01)
    assert alice.exit_code == 1 and "[3 messages not delivered.]" in alice.lines
    assert alice.complaints == ["send bob m1", "send bob m2", "send bob m3"]


@pytest.mark.parametrize("case", ["the server answers", "the server is silent", "it is not registered yet",
                                  "it has deregistered"])
def test_a_signal_ends_an_idle_client_within_two_seconds_with_0(case: str) -> None:
    if case == "it is not registered yet":
        alice = World(1).client("alice")
        alice.world.run(1)
    else:
        world, (alice,) = start("alice")
        if case == "it has deregistered":
            alice.type("dereg alice")
            world.run(1)
        elif case == "the server is silent":
            assert world.server is not None
            world.server.crash()
    alice.interrupt()
    alice.world.run(2.01)
    assert alice.exit_code == 0 and not alice.complaints


@pytest.mark.parametrize("phase", ["joining", "registered", "failed"])
def test_a_signal_ends_a_client_whose_output_is_stalled_within_two_seconds(
        phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    monkeypatch.setattr(world.ledger, "check_life", lambda life: None)      # it would want lines that nobody reads
    if phase == "registered":
        world.start_server()
    alice = world.client("alice")
    alice.screen.set_rate(0)
    alice.screen.filled = alice.screen.size
    world.run({"joining": 0.1, "registered": 1, "failed": 5}[phase])
    assert alice.alive and not alice.lines and bool(alice.display.output.pending) == (phase != "joining")
    alice.interrupt()
    world.run(2.01)
    assert alice.exit_code == int(phase == "failed")


def test_a_second_signal_ends_a_client_at_once_and_names_what_was_not_delivered() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(2)
    assert world.server is not None
    world.server.crash()
    alice.type("send bob hello")
    world.run(0.1)
    alice.interrupt()
    world.run(0.3)
    assert alice.alive
    alice.interrupt()
    world.run(0.01)
    assert alice.exit_code == 1 and alice.lines[-1] == "[1 message not delivered.]"
    assert alice.complaints == ["send bob hello"]


def test_a_client_whose_time_is_over_ends_though_its_recipient_does_not_answer() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.stop_for(60)
    alice.type("send bob hello")
    alice.end_input()
    world.run(0.1)
    assert alice.alive
    alice.client.leaving.time_is_over()
    world.run(0.6)
    assert alice.exit_code == 1 and "[1 message not delivered.]" in alice.lines
    assert alice.complaints == ["udpchat: the time is over, and no answer from bob", "send bob hello"]


def test_a_deregistered_client_is_silent_and_its_unsent_messages_go_out_when_it_is_back() -> None:
    world, (alice, bob) = start("alice", "bob")
    for life in (alice, bob):
        world.network.block(life.nick, "bob" if life is alice else "alice")
    world.network.filter = losing("save")
    alice.type("send bob hello")
    alice.type("dereg alice")
    world.run(10)
    assert alice.client.is_offline
    world.network.filter = None
    world.network.blocked.clear()
    bob.type("send alice hi")
    sent = alice.sent
    world.run(60)
    assert alice.sent == sent and not ends(bob, "hello") and not ends(alice, "hi")
    alice.type("reg alice")
    world.run(10)
    assert ends(bob, "hello") == 1 and ends(alice, "hi") == 1


def test_a_script_that_comes_back_after_long_delivers_what_waited_before_it_ends() -> None:
    world, (alice, bob) = start("alice", "bob", mailbox=1)
    world.network.block("alice", "bob")
    bob.screen.set_rate(0)
    for number in range(3):
        alice.type(f"send bob m{number} " + "x" * 60_000)
    alice.type("dereg alice")
    world.run(120)
    assert alice.client.is_offline and not count(alice, "[Mailbox of bob is full, message not saved.]")
    bob.screen.set_rate(float("inf"))
    alice.type("reg alice")
    alice.end_input()
    world.run(20)
    assert alice.exit_code == 0 and sum(line.startswith("alice: ") for line in bob.lines) == 3


def test_a_client_that_comes_online_again_is_told_of_its_table() -> None:
    world, (alice, bob) = start("alice", "bob")
    for _ in range(3):
        before = len(alice.lines)
        alice.type("dereg alice")
        alice.type("reg alice")
        world.run(2)
        assert alice.lines[before:] == ["[You are Offline. Bye.]", "[Welcome, You are registered.]",
                                        "[Client table updated.]"]


def test_a_deregistered_client_with_unsent_messages_can_end() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.type("dereg bob")
    world.run(1)
    world.network.filter = losing("save")
    alice.type("send bob hello")
    alice.type("dereg alice")
    world.run(10)
    assert alice.client.is_offline
    alice.end_input()
    world.run(3)
    assert alice.exit_code == 1 and alice.complaints == ["send bob hello"]


def test_time_in_which_a_client_was_stopped_makes_nobody_seem_silent() -> None:
    world, (alice, bob) = start("alice", "bob")
    alice.type("send bob hello")
    world.run(0.0015)
    alice.stop_for(30)
    world.run(40)
    assert alice.lines[-1] == "[Message received by bob.]"
    assert not count(alice, "[No ACK from bob, message sent to server.]")


def test_a_client_that_was_stopped_for_long_comes_back_by_itself() -> None:
    world, (alice, bob) = start("alice", "bob")
    bob.stop_for(100)
    world.run(70)
    assert not alice.client.table_sync.table.is_online("bob")
    alice.type("send bob hello")
    world.run(60)
    assert ends(bob, "hello") == 1 and alice.client.table_sync.table.is_online("bob")


# --- random worlds --------------------------------------------------------------------------------------------

def seeds(sample: int, count: int) -> list[Any]:
    """Return all seeds below ``count``, some for each test; those from ``sample`` on are storms."""
    sampled = [range(first, first + CHUNK) for first in range(0, sample, CHUNK)]
    storms = [range(first, min(first + STORM_CHUNK, count)) for first in range(sample, count, STORM_CHUNK)]
    return [*sampled, *(pytest.param(some, marks=pytest.mark.storm) for some in storms)]


def name_of(some: range) -> str:
    """Return how the seeds of a test are written in its name."""
    return f"{some.start}-{some.stop - 1}"


@pytest.mark.parametrize("some", seeds(20, SEEDS), ids=name_of)
def test_what_must_always_hold_holds_in_random_worlds(some: range) -> None:
    for seed in some:
        result = run_seed(seed)
        assert not result.failure, f"{result.failure}\nreplay: {replay(seed)}"


@pytest.mark.parametrize("some", seeds(5, 60), ids=name_of)
def test_it_holds_also_where_few_streams_can_go_on_at_once(some: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversation.STREAMS_PER_SENDER", 1)
    monkeypatch.setattr("conversation.STREAMS_IN_ALL", 6)
    for seed in some:
        assert not run_seed(seed).failure


@pytest.mark.parametrize("some", seeds(20, SEEDS), ids=name_of)
def test_it_holds_also_where_most_are_behind_routers(some: range) -> None:
    for seed in some:
        result = run_seed(seed, has_routers=True)
        assert not result.failure, f"{result.failure}\nreplay: {replay(seed)} --routers"


def behind(*routers: Router | None) -> tuple[World, list[Life]]:
    """Return a world with alice, bob and so on behind these routers, who know each other, 20 ms from everybody."""
    world = World(1)
    world.network.weather = Weather(delay=0.02)
    world.start_server()
    lives = []
    for nick, router in zip(("alice", "bob", "carol"), routers):
        world.new_router = lambda: router
        lives.append(world.client(nick))
    world.run(3)
    return world, lives


def took(world: World, sender: Life, recipient: Life, text: str) -> float:
    """Send a text; return how many seconds it takes until it is shown."""
    began = world.now
    sender.type(f"send {recipient.nick} {text}")
    world.run_until(lambda: any(line.endswith(f" {text}") for line in recipient.lines), 5)
    return world.now - began


def test_two_behind_routers_chat_directly_from_the_first_message_on() -> None:
    world, (alice, bob) = behind(Router(), Router())
    assert took(world, alice, bob, "first") <= 0.25
    world.run(1)
    for sender, recipient, text in ((alice, bob, "second"), (bob, alice, "back"), (alice, bob, "third")):
        assert took(world, sender, recipient, text) <= 0.025
    world.run(1)
    assert count(alice, "[Message received by bob.]") == 3 and not ends(alice, "saved]")


def test_a_path_that_is_open_costs_no_datagram_more() -> None:
    counts = []
    for router in (None, Router()):
        world, (alice, bob) = behind(router, None)
        before = world.network.datagrams
        took(world, alice, bob, "hello")
        counts.append(world.network.datagrams - before)
    assert counts[0] == counts[1]


def test_routers_that_forget_cost_a_round_by_the_server_each_time() -> None:
    world, (alice, bob) = behind(Router(30.0), Router(30.0))
    for number in range(4):
        assert took(world, alice, bob, f"number-{number}") <= 0.25
        world.run(40)
    assert count(alice, "[Message received by bob.]") == 4


def test_where_no_router_can_be_opened_messages_are_relayed_after_one_try() -> None:
    for routers in ((Router(is_symmetric=True), Router()), (Router(is_symmetric=True), Router(is_symmetric=True))):
        world, (alice, bob) = behind(*routers)
        assert took(world, alice, bob, "first") <= 0.9
        world.run(1)
        assert took(world, alice, bob, "second") <= 0.2
        world.run(1)
        assert ends(alice, "saved]") == 2 and count(alice, "[No ACK from bob, message sent to server.]") == 1


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    code = "from tests.simulate import run_seed; print([run_seed(seed).digest for seed in (3, 4)])"
    digests = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": hashes}).stdout for hashes in ("1", "2")}
    assert digests == {f"{[run_seed(seed).digest for seed in (3, 4)]}\n"}


def test_the_server_of_the_simulation_is_where_clients_expect_it() -> None:
    world, _ = start("alice")
    assert world.server is not None and world.server.address == SERVER
