"""``udpchat send`` under the nick of a client that runs: that client sends, and ``send`` tells what becomes of it."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from loop import GREETING, MAX_GUESTS, LocalSocket, SelectorLoop
from protocol import MAX_TEXT
from tests.processes import (EXITING, NOT_RESPONDING, OFFLINE, ROOT, SAVED, UPDATED, WELCOME, Chat, Process, is_offline,
                             received)

LOST = "[1 message not delivered.]"


@pytest.fixture(autouse=True)
def short(chat: Chat) -> Iterator[None]:
    """Let the state directory have a path that is short enough for a socket, wherever the tests run."""
    folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    chat.state = folder
    chat.environment["XDG_STATE_HOME"] = str(folder)
    yield
    for process in chat.processes:
        process.discard()
    shutil.rmtree(folder)


def start(chat: Chat, mode: str, *arguments: str, nick: str = "carl", **environment: str) -> Process:
    """Start ``udpchat send``, ``recv`` or ``ask``."""
    environment = {"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": nick, **environment}
    return chat.run(mode, *arguments, stdin=subprocess.DEVNULL, environment=environment)


def run(chat: Chat, mode: str, *arguments: str, nick: str = "carl",
        **environment: str) -> tuple[int, list[str], list[str]]:
    process = start(chat, mode, *arguments, nick=nick, **environment)
    process.wait()
    return process.popen.returncode, process.lines, process.errors


def sockets(chat: Chat) -> list[Path]:
    return sorted((chat.state / "udpchat").glob("*.sock*"))


def client(chat: Chat, nick: str, *options: str) -> Process:
    """Start a client, and wait until it can be found."""
    before = len(sockets(chat))
    found = chat.client(nick, *options) if "--json" not in options else chat.start(nick, *options)
    chat.until(lambda: len(sockets(chat)) == before + 1, "a socket")
    if "--json" not in options:
        found.see(UPDATED)
    else:
        chat.until(lambda: b'"table"' in found.out.data, "the table")
    if "--json" not in options:
        found.sync()
    return found


# --- what is handed over --------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_job_sends_by_the_client_that_has_its_nick_and_gets_its_line(chat: Chat, options: Sequence[str]) -> None:
    chat.absent("dora")
    bob, carl = client(chat, "bob"), client(chat, "carl", *options)
    bob.wait_for("carl")
    before, other = len(bob.lines), len(carl.lines)
    assert run(chat, "send", "bob", "hello  there") == (0, [received("bob")], [])
    assert run(chat, "send", "dora", "later") == (0, [is_offline("dora"), SAVED], [])
    assert run(chat, "send", "--quiet", "BOB", "again") == (0, [], [])
    assert run(chat, "send", "nobody", "hello") == (1, ["[Unknown client nobody.]"], [])
    code, lines, _ = run(chat, "send", "bob", "as an object", "--json")
    event, = map(json.loads, lines)
    assert code == 0 and (event["type"], event["to"], event["via"]) == ("received", "bob", "direct")
    bob.sync()
    assert [line for line in bob.lines[before:] if line.startswith(("carl", "[Cl"))] == [
        "carl: hello  there", "carl: again", "carl: as an object"]
    assert not [line for line in carl.lines[other:] if line != UPDATED and '"table"' not in line]       # no noise
    assert carl.finish() == 0 and bob.finish() == 0


def test_on_a_terminal_a_job_shows_it_as_ever(chat: Chat) -> None:
    carl = client(chat, "carl")
    job = chat.run_on_terminal("send", "nobody", "x", "--nick", "carl", "--server", f"127.0.0.1:{chat.port}")
    assert job.wait() == 1 and bytes(job.out.data) == b"\x1b[31m[Unknown client nobody.]\x1b[39m\r\n"
    assert carl.finish() == 0


def test_a_message_may_go_to_several_and_each_gets_it_once(chat: Chat) -> None:
    chat.absent("dora")
    bob, carl = client(chat, "bob"), client(chat, "carl")
    code, lines, errors = run(chat, "send", "bob,dora,Bob,nobody", "hello")
    assert code == 1 and errors == ["[Saved for dora.]"]
    assert sorted(lines) == sorted([received("bob"), is_offline("dora"), SAVED, "[Unknown client nobody.]"])
    bob.sync()
    assert bob.lines.count("carl: hello") == 1
    assert carl.finish() == 0       # what a job could not send is no failure of the client


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_what_the_server_refuses_of_a_job_is_no_failure_of_the_client(chat: Chat, options: Sequence[str]) -> None:
    chat.server("--mailbox-limit", "1")
    chat.absent("dora")
    carl = client(chat, "carl", *options)
    assert run(chat, "send", "dora", "one") == (0, [is_offline("dora"), SAVED], [])
    full = "[Mailbox of dora is full, message not saved.]"
    assert run(chat, "send", "dora", "two") == (1, [is_offline("dora"), full], [])
    assert carl.finish() == 0


def test_own_messages_and_those_of_jobs_have_one_closing_line_each(chat: Chat) -> None:
    bob, carl = client(chat, "bob"), client(chat, "carl")
    jobs = [start(chat, "send", "bob", f"job {number} {'x' * 3000}") for number in range(4)]
    for number in range(2000):
        carl.feed(f"send bob own {number}\n")
    assert [job.wait() for job in jobs] == [0] * 4
    assert [job.lines for job in jobs] == [[received("bob")]] * 4
    assert carl.finish() == 0 and carl.lines.count(received("bob")) == 2000
    assert bob.finish() == 0
    assert [line for line in bob.lines if "own" in line] == [f"carl: own {number}" for number in range(2000)]
    assert sum(line.startswith("carl: job") for line in bob.lines) == 4


def test_a_text_that_is_too_long_is_refused(chat: Chat) -> None:
    carl = client(chat, "carl")
    process = chat.run("send", "carl", environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
    process.feed("\x01" * (5 * MAX_TEXT))
    assert process.finish() == 1
    assert process.lines == [f"[Message too long: {5 * MAX_TEXT} bytes, at most {MAX_TEXT}.]"]
    longest = chat.run("send", "carl", "--quiet",
                       environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
    longest.feed("\x01" * MAX_TEXT)
    assert longest.finish() == 0 and not longest.errors
    carl.see("carl: " + "\\x01" * MAX_TEXT)


def test_the_longest_text_may_go_to_many(chat: Chat) -> None:
    carl = client(chat, "carl")
    nicks = [f"nobody{number:026}" for number in range(200)]
    process = chat.run("send", ",".join(["carl", *nicks]),
                       environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
    process.feed("\x01" * MAX_TEXT)
    assert process.finish() == 1 and not process.errors
    assert sorted(process.lines) == sorted([received("carl"), *(f"[Unknown client {nick}.]" for nick in nicks)])
    carl.see("carl: " + "\\x01" * MAX_TEXT)


def test_recv_and_ask_are_refused_under_the_nick_of_a_client_that_runs(chat: Chat) -> None:
    carl = client(chat, "carl")
    why = ["udpchat: a client of yours runs as carl: what comes for carl is shown there"]
    assert run(chat, "recv") == (1, [], why)
    assert run(chat, "ask", "carl", "well?") == (1, [], why)
    assert carl.finish() == 0


# --- what is not ----------------------------------------------------------------------------------------------

def test_the_socket_is_its_users_alone_and_goes_with_the_client(chat: Chat) -> None:
    carl = client(chat, "carl")
    path, = sockets(chat)
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    assert carl.finish() == 0 and not sockets(chat)


def test_a_client_whose_server_is_elsewhere_now_is_found_by_that(tmp_path: Path) -> None:
    loop, said = SelectorLoop(), list[bytes]()
    local = LocalSocket(loop, 100, lambda: True, lambda guest, line: said.append(line))
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    for path in (*paths, paths[1]):
        local.open(path)
        assert [os.path.exists(each) for each in paths] == [each == path for each in paths]
    local.open("")
    assert not any(map(os.path.exists, paths))
    local.close()
    loop.close()


def test_the_socket_of_a_client_that_was_killed_is_in_nobodys_way(chat: Chat) -> None:
    chat.absent("bob")
    carl = client(chat, "carl")
    carl.kill()
    assert len(sockets(chat)) == 1
    assert run(chat, "send", "bob", "hello") == (0, [is_offline("bob"), SAVED], [])
    again = chat.client("carl")
    again.sync()
    assert run(chat, "send", "bob", "hello") == (0, [is_offline("bob"), SAVED], [])
    assert again.finish() == 0 and not sockets(chat)


def test_a_client_that_comes_back_is_found_though_another_one_has_had_its_place(chat: Chat) -> None:
    bob, carl = client(chat, "bob"), client(chat, "carl")
    bob.wait_for("carl")
    carl.feed("dereg carl\n")
    bob.wait_for("carl", "offline")
    other = chat.client("carl")
    bob.wait_for("carl")
    assert other.finish() == 0
    bob.wait_for("carl", "offline")
    carl.feed("reg carl\n")
    bob.wait_for("carl")
    chat.until(lambda: len(sockets(chat)) == 2, "a socket")
    assert run(chat, "send", "bob", "hello") == (0, [received("bob")], [])
    assert carl.finish() == bob.finish() == 0


def test_a_client_that_has_deregistered_or_does_not_answer_leaves_a_job_to_itself(chat: Chat) -> None:
    chat.absent("bob")
    carl = client(chat, "carl")
    carl.feed("dereg carl\n")
    carl.see(OFFLINE)
    assert run(chat, "send", "bob", "hello") == (0, [is_offline("bob"), SAVED], [])
    carl.feed("reg carl\n")
    carl.see(WELCOME)
    carl.signal(signal.SIGSTOP)
    assert run(chat, "send", "bob", "again", "--timeout", "10")[0] == 0     # the server finds that it does not answer
    carl.signal(signal.SIGCONT)


SLOW_TO_JOIN = [sys.executable, "-c", f"""
import sys
sys.path[0] = {str(ROOT)!r}
import udpchat
def join_later(options, client, *others, join=udpchat.join):
    client._loop.call_at(client._loop.now() + 1.5, lambda: join(options, client, *others))
udpchat.join = join_later
sys.exit(udpchat.main())
"""]


def test_a_client_that_can_be_found_only_later_gets_the_message_of_a_job_that_waits_for_its_nick(chat: Chat) -> None:
    chat.absent("bob")
    carl = chat.run("client", "carl", "127.0.0.1", str(chat.port), command=SLOW_TO_JOIN)
    carl.see(WELCOME)
    assert not sockets(chat)
    assert run(chat, "send", "bob", "--timeout", "60", "hello") == (0, [is_offline("bob"), SAVED], [])
    assert sockets(chat) and carl.finish() == 0


@pytest.mark.parametrize("other", [{"--identity": "another"}, {"--secure": "off"}, {"--nick": "dora"}], ids=str)
def test_a_client_of_another_owner_nick_or_secrecy_is_not_asked(chat: Chat, other: dict[str, str]) -> None:
    chat.absent("bob")
    carl = client(chat, "carl")
    words = [word if word != "another" else str(chat.directory / word) for pair in other.items() for word in pair]
    code, lines, _ = run(chat, "send", "bob", "hello", "--timeout", "1", *words)
    assert (code, lines[-1]) == ((0, SAVED) if "--nick" in other else (1, EXITING))
    assert carl.finish() == 0


def test_where_the_path_is_too_long_for_a_socket_a_job_waits_for_its_nick(chat: Chat) -> None:
    chat.environment["XDG_STATE_HOME"] = str(chat.directory / ("x" * 100))
    chat.absent("bob")
    carl = chat.client("carl")
    carl.sync()
    assert run(chat, "send", "bob", "hello", "--timeout", "1") == (
        1, ["[Nickname carl is taken.]", LOST, EXITING], ["send bob hello"])
    assert carl.finish() == 0 and not carl.errors


# --- what goes wrong midway -----------------------------------------------------------------------------------

def visit(chat: Chat) -> socket.socket:
    """Do what a job does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(sockets(chat)[0]))
    return sock


def test_half_a_message_is_none(chat: Chat) -> None:
    carl = client(chat, "carl")
    for said in (b'{"send": ["carl"], "text": "half", "size": 0}', b"", b"x" * 1000, b"{}\n", b"[1]\n", b'"x"\n',
                 b'{"send": [], "text": "x", "size": 0}\n', b'{"send": ["carl", 7], "text": "x", "size": 0}\n',
                 b'{"send": ["carl"], "text": 7, "size": 0}\n', b"x" * 600_000):
        with visit(chat) as sock:
            assert sock.recv(len(GREETING)) == GREETING
            try:
                sock.sendall(said)
            except OSError:
                assert len(said) > 100_000      # it was cut off
    carl.sync()
    assert run(chat, "send", "carl", "whole") == (0, [received("carl")], [])
    carl.sync()
    assert [line for line in carl.lines if line.startswith("carl: ")] == ["carl: whole"]
    assert carl.finish() == 0


def test_more_programs_than_are_let_in_go_their_own_way(chat: Chat) -> None:
    chat.absent("bob")
    carl = client(chat, "carl")
    guests = [visit(chat) for _ in range(MAX_GUESTS)]
    assert all(guest.recv(len(GREETING)) == GREETING for guest in guests)
    with visit(chat) as late:
        assert late.recv(1) == b""
    assert guests[0].recv(1) == b""         # it has said nothing for too long
    for guest in guests:
        guest.close()
    assert run(chat, "send", "bob", "hello") == (0, [is_offline("bob"), SAVED], [])
    assert carl.finish() == 0


def stuck(chat: Chat, *options: str) -> tuple[Process, Process]:
    """Return bob, who does not answer, and carl, whose messages wait for him."""
    bob, carl = client(chat, "bob"), client(chat, "carl", "--ack-timeout", "60000", "--log-level", "info", *options)
    bob.signal(signal.SIGSTOP)
    return bob, carl


def has_it(chat: Chat, carl: Process) -> None:
    """Wait until a message is in the hands of carl's client."""
    chat.until(lambda: b"another program says" in carl.err.data, "a message to be handed over")


HANDS = "udpchat: the message is in the hands of a client of yours, and "


def test_a_job_waits_no_longer_than_its_timeout_and_says_who_has_the_message(chat: Chat) -> None:
    bob, carl = stuck(chat)
    assert run(chat, "send", "bob", "hello", "--timeout", "1") == (
        1, [LOST], [HANDS + "the time is over", "send bob hello"])
    bob.signal(signal.SIGCONT)
    bob.see("carl: hello")
    assert carl.finish() == 0


def test_a_job_whose_client_is_killed_midway_fails(chat: Chat) -> None:
    bob, carl = stuck(chat)
    job = start(chat, "send", "bob", "hello")
    has_it(chat, carl)
    carl.kill()
    assert job.wait() == 1
    assert (job.lines, job.errors) == ([LOST], [HANDS + "it has ended", "send bob hello"])


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_job_whose_client_ends_in_order_gets_its_message_back(chat: Chat, options: Sequence[str]) -> None:
    bob, carl = stuck(chat, *options)
    job = start(chat, "send", "bob", "hello")
    has_it(chat, carl)
    carl.signal(signal.SIGTERM)
    assert carl.wait() == 0 and b"hello" not in carl.err.data + carl.out.data
    assert job.wait() == 1
    assert (job.lines, job.errors) == ([LOST], [HANDS + "it has not delivered it", "send bob hello"])


def test_a_signal_ends_a_job_and_its_client_goes_on(chat: Chat) -> None:
    bob, carl = stuck(chat)
    job = start(chat, "send", "bob", "hello")
    has_it(chat, carl)
    job.signal(signal.SIGTERM)
    assert job.wait() == 1
    assert (job.lines, job.errors) == ([LOST], [HANDS + "nobody waits for it any more", "send bob hello"])
    bob.signal(signal.SIGCONT)
    bob.see("carl: hello")
    carl.sync()


def test_a_job_without_a_timeout_does_not_wait_for_a_server_that_is_silent(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    carl = client(chat, "carl")
    server.signal(signal.SIGSTOP)
    job = start(chat, "send", "bob", "hello")
    assert job.wait() == 1
    assert job.lines[-3:] == [NOT_RESPONDING, LOST, EXITING] and job.errors[-1] == "send bob hello"
    server.signal(signal.SIGCONT)
    assert carl.finish() == 0


def test_a_program_of_another_user_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import loop
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert loop.is_own(ours)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert not loop.is_own(ours)
