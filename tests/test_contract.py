"""Every promise of the program that can be seen from outside, kept by real processes: one test for each row."""
from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import sqlite3
import stat
import sys
import time
from pathlib import Path

import pyte
import pytest

from tests.processes import (DEADLINE, EXITING, FROZEN_CLOCK, MAIL_NOTICE, NOT_RESPONDING, OFFLINE, PROGRAM, ROOT,
                             SAVED, UPDATED, WELCOME, WHO, Chat, Process, has_ipv6, is_offline, no_ack, received, sends,
                             shown_once)

MAX_TEXT = 65536          # bytes of one message


# --- the command line -----------------------------------------------------------------------------------------

def assert_one_complaint(process: Process, code: int) -> None:
    assert process.popen.returncode == code
    assert process.out.data == b""
    assert len(process.errors) == 1 and process.err.data.endswith(b"\n"), process.err.data
    assert process.errors[0].strip()
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f]", process.errors[0])


WRONG_ARGUMENTS: list[list[str | bytes]] = [
    ["--"],
    ["talk"],
    ["--bogus"],
    ["-s", "x"],
    ["-s", "65536"],
    ["-s", "-1"],
    ["-c", "alice", "127.0.0.1", "4119", "4120", "4121"],
    ["-c", "alice", "127.0.0.1", "4119", "65536"],
    ["server", "port"],
    ["server", ""],
    ["server", "70000"],
    ["server", "0x10"],
    ["server", "\uff14\uff11"],
    ["server", "0", "0"],
    ["server", "0", "--bogus"],
    ["server", "0", "--host"],
    ["server", "0", "--host", "no..host"],
    ["server", "0", "--store"],
    ["server", "0", "--max-clients", "0"],
    ["server", "0", "--mailbox-limit", "many"],
    ["server", "0", "--log-level", "loud"],
    ["server", "0", "--forget", "two words"],
    ["client", ""],
    ["client", "two words"],
    ["client", "a/b"],
    ["client", "two\nlines"],
    ["client", "x" * 33],
    ["client", b"\xff"],
    ["client", "alice", "no..host"],
    ["client", "alice", "host.invalid"],
    ["client", "alice", "two\nlines"],
    ["client", "alice", "127.0.0.1", "port"],
    ["client", "alice", "127.0.0.1", "65536"],
    ["client", "alice", "127.0.0.1", "4119", "port"],
    ["client", "alice", "127.0.0.1", "4119", "-5"],
    ["client", "alice", "127.0.0.1", "4119", "0", "more"],
    ["client", "alice", "127.0.0.1", "4119", "0", "two\nlines"],
    ["client", "alice", "127.0.0.1", "4119", "0", "\x1b[2J"],
    ["client", "alice", "--ack-timeout", "0"],
    ["client", "alice", "--ack-timeout", "soon"],
    ["client", "alice", "--log-level"],
    ["client", "alice", "--identity", "/dev/null/two\nlines"],
]


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=repr)
def test_wrong_arguments_are_one_line_on_stderr_and_exit_2(chat: Chat, arguments: list[str | bytes]) -> None:
    assert_one_complaint(chat.complete(*arguments), 2)


def test_no_arguments_give_the_usage(chat: Chat) -> None:
    assert "usage" in chat.complete().errors[0]


def test_client_alone_takes_the_login_name(chat: Chat) -> None:
    names = {name: "not a nick" for name in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    client = chat.complete("client", environment=names)
    assert_one_complaint(client, 2)
    assert "login name" in client.errors[0]


def test_version_is_on_stdout(chat: Chat) -> None:
    shown = chat.complete("--version")
    assert shown.wait() == 0
    assert re.fullmatch(rb"udpchat \d+\.\d+\.\d+\n", shown.out.data) and not shown.err.data


@pytest.mark.parametrize("mode, words", [
    ([], ["server", "client", "-s PORT", "-c NICK", "--version"]),
    (["server"], ["PORT", "4119", "--host", "--store", ":memory:", "--max-clients", "--mailbox-limit", "--log-level"]),
    (["client"], ["NICK", "SERVER-HOST", "SERVER-PORT", "CLIENT-PORT", "127.0.0.1", "4119", "--ack-timeout", "--stay",
                  "--identity", "--anonymous", "--log-level"]),
    (["-s", "0"], ["PORT", "--store"]),
], ids=repr)
def test_help_names_every_argument_and_its_default(chat: Chat, mode: list[str], words: list[str]) -> None:
    shown = chat.complete(*mode, "--help")
    assert shown.wait() == 0 and not shown.err.data
    text = shown.out.data.decode()
    assert [word for word in words if word not in text] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["send", "--help"]])
def test_what_cannot_be_written_of_the_help_is_one_line_on_stderr_and_exit_1(chat: Chat, arguments: list[str]) -> None:
    buffered = {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "wb") as full:
        process = chat.run(*arguments, stdout=full.fileno(), environment=buffered)
    assert process.wait() == 1
    assert process.errors == ["udpchat: cannot write to stdout: No space left on device"]
    reader, writer = os.pipe()
    os.close(reader)
    process = chat.run(*arguments, stdout=writer, environment=buffered)
    os.close(writer)
    assert process.wait() == 1 and not process.err.data


@pytest.mark.parametrize("before", ["", "whole\n", "torn"])
def test_first_line_of_the_server_is_a_line_of_its_own_in_a_file(chat: Chat, before: str) -> None:
    path = chat.directory / "output"
    path.write_text(before)
    with path.open("ab") as file:
        server = chat.run("server", "0", "--host", "127.0.0.1", "--store", ":memory:", stdout=file.fileno())
    chat.until(lambda: path.read_text().endswith("]\n"), "the server to be ready")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    *others, line, _ = path.read_text().splitlines()
    assert others == before.splitlines() and line.startswith("[Server listening on 127.0.0.1:")


def test_short_forms_are_the_same_modes(chat: Chat) -> None:
    server = chat.run("-s", "0", "--store", ":memory:")
    port = server.see_match(r"\[Server listening on 0\.0\.0\.0:(\d+)\]").group(1)
    bob = chat.run("-c", "bob", "127.0.0.1", port, "0")
    bob.see(WELCOME)
    alice = chat.run("-c", "alice", "localhost", port, "0", "--ack-timeout", "700")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert (alice.finish(), bob.finish()) == (0, 0)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_client_takes_the_port_that_it_is_given_and_fails_if_that_is_in_use(chat: Chat) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        port = str(sock.getsockname()[1])
        refused = chat.complete("client", "alice", "127.0.0.1", str(chat.port), port)
        assert_one_complaint(refused, 1)
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), port)
    assert alice.roster() == {"alice": (f"127.0.0.1:{port}", "online")}


def test_server_fails_if_its_address_is_in_use(chat: Chat) -> None:
    server = chat.server()
    second = chat.complete("server", str(chat.port), "--host", "127.0.0.1", "--store", ":memory:")
    assert_one_complaint(second, 1)
    assert chat.client("alice").finish() == 0
    assert server.popen.poll() is None


# --- options of the server ------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_ends_with_0_on_a_signal_and_says_where_it_is_and_its_fingerprint(chat: Chat, number: int) -> None:
    server = chat.server()
    chat.absent("bob")
    server.signal(number)
    assert server.wait() == 0
    where, fingerprint = server.lines
    assert where == f"[Server listening on 127.0.0.1:{chat.port}]" and not server.err.data
    assert re.fullmatch(r"\[Fingerprint( \d{5}){12}\]", fingerprint)


def test_server_logs_what_it_does_if_asked(chat: Chat) -> None:
    server = chat.server("--log-level", "info")
    chat.absent("bob")
    chat.until(lambda: b"bob registered" in server.err.data, "the log of a registration")
    assert len(server.lines) == 2


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_ipv6_address_works_on_both_sides(chat: Chat) -> None:
    server = chat.server(host="::1")
    assert server.lines[0] == f"[Server listening on [::1]:{chat.port}]"
    bob = chat.client("bob", host="::1")
    alice = chat.client("alice", host="::1")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert alice.roster()["bob"][0].startswith("[::1]:")
    assert (alice.finish(), bob.finish()) == (0, 0)
    assert received("bob") in alice.lines


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_clients_of_different_families_reach_each_other_through_the_server(chat: Chat) -> None:
    chat.server(host="::")
    bob = chat.client("bob", host="::1")
    alice = chat.client("alice", host="127.0.0.1")
    alice.feed("send bob hello\n")
    alice.see(SAVED)
    bob.see_match(r"alice: <[^>]*> hello")
    assert alice.finish() == 0
    assert MAIL_NOTICE not in bob.lines


def test_store_is_by_default_in_the_state_directory(chat: Chat) -> None:
    server = chat.run("server", "0", "--host", "127.0.0.1")
    port = server.see_match(r"\[Server listening on 127\.0\.0\.1:(\d+)\]").group(1)
    assert [path.name for path in (chat.state / "udpchat").glob("*.db")] == [f"server-{port}.db"]
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_store_is_in_the_home_directory_without_a_state_directory(chat: Chat) -> None:
    server = chat.run("server", "0", "--host", "127.0.0.1", environment={"XDG_STATE_HOME": ""})
    port = server.see_match(r"\[Server listening on 127\.0\.0\.1:(\d+)\]").group(1)
    assert (chat.directory / f".local/state/udpchat/server-{port}.db").exists()


def test_store_keeps_mail_over_a_restart_and_memory_keeps_nothing(chat: Chat) -> None:
    for store, closing, code in ((str(chat.store), SAVED, 0), (":memory:", "[Unknown client bob.]", 1)):
        server = chat.server(store=store)
        chat.absent("bob")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        chat.server(store=store)
        alice = chat.client("alice")
        alice.feed("send bob hello\n")
        assert alice.finish() == code
        assert closing in alice.lines
    assert not list(chat.directory.glob("*memory*"))


def test_server_is_full_with_as_many_clients_as_allowed(chat: Chat) -> None:
    chat.server("--max-clients", "2")
    bob, _ = chat.clients("bob", "carol")
    alice = chat.start("alice")
    assert alice.wait() == 1
    assert alice.lines == ["[The server is full.]", EXITING]
    assert bob.finish() == 0
    assert chat.client("alice").finish() == 0


def test_mailbox_takes_as_many_messages_as_allowed(chat: Chat) -> None:
    chat.server("--mailbox-limit", "2")
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed(sends("bob", ["one", "two", "three"]))
    assert alice.finish() == 1
    full = "[Mailbox of bob is full, message not saved.]"
    assert shown_once(alice.lines, [full])
    assert [line for line in alice.events if line in (SAVED, full)] == [SAVED, SAVED, full]
    bob = chat.client("bob")
    assert bob.finish() == 0
    assert [line[-3:] for line in bob.lines if line.startswith("alice: ")] == ["one", "two"]


def digest(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("kind", ["text", "other database", "other application", "newer format", "short"])
def test_store_that_is_not_ours_is_left_untouched(chat: Chat, kind: str) -> None:
    directory = chat.directory / "stores"
    directory.mkdir()
    path = directory / "store"
    if kind in ("text", "short"):
        path.write_text("my diary\n" * (1000 if kind == "text" else 1))
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE mine (value)")
            if kind != "other database":
                ours = 0x55445043 if kind == "newer format" else 7
                database.execute(f"PRAGMA application_id = {ours}")
                database.execute("PRAGMA user_version = 99")
        database.close()
    before = digest([path])
    for options in ([], ["--forget", "bob"]):
        refused = chat.complete("server", "0", "--host", "127.0.0.1", "--store", str(path), *options)
        assert_one_complaint(refused, 1)
        assert str(path) in refused.errors[0]
    assert digest(list(directory.iterdir())) == before


def test_store_that_cannot_be_opened_is_one_line_and_exit_1(chat: Chat) -> None:
    fifo = chat.directory / "fifo"
    os.mkfifo(fifo)
    missing = [chat.directory / "missing" / "store.db", chat.directory / "two\nlines" / "store.db"]
    for path in (Path(os.devnull), fifo, chat.directory, *missing):
        assert_one_complaint(chat.complete("server", "0", "--host", "127.0.0.1", "--store", str(path)), 1)


def test_store_is_not_opened_twice(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    for options in ([], ["--forget", "bob"]):
        second = chat.complete("server", "0", "--host", "127.0.0.1", "--store", str(chat.store), *options)
        assert_one_complaint(second, 1)
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    assert alice.finish() == 0
    assert server.popen.poll() is None and SAVED in alice.lines


def test_forget_frees_a_nick_with_its_mail(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    assert alice.finish() == 0
    server.signal(signal.SIGTERM)
    server.wait()
    forget = ["server", "0", "--store", str(chat.store), "--forget"]
    done = chat.complete(*forget, "bob")
    assert done.popen.returncode == 0 and not done.out.data
    assert_one_complaint(chat.complete(*forget, "bob"), 1)
    chat.server()
    bob = chat.client("bob", "--identity", str(chat.directory / "another"))
    assert bob.finish() == 0
    assert bob.events == [WELCOME, OFFLINE]


# --- options of the client ------------------------------------------------------------------------------------

def test_ack_timeout_says_how_long_a_client_waits_for_the_recipient(chat: Chat) -> None:
    bob = chat.client("bob")
    patient = chat.client("patient", "--ack-timeout", "30000")
    hasty = chat.client("hasty", "--ack-timeout", "100")
    bob.signal(signal.SIGSTOP)
    for sender in (patient, hasty):
        sender.feed("send bob hello\n")
    hasty.see(no_ack("bob"), SAVED)
    patient.wait_for("bob", "offline")
    bob.signal(signal.SIGCONT)
    for sender in (patient, hasty):
        assert sender.finish() == 0
    assert no_ack("bob") not in patient.lines
    bob.finish()
    assert len([line for line in bob.lines if line.endswith("hello")]) == 2


def test_no_datagram_of_a_client_is_larger_than_1200_bytes(chat: Chat) -> None:
    chat.absent("bob")
    proxy = chat.proxy()
    alice = chat.client("alice", port=proxy.port)
    alice.feed(sends("bob", ["x" * 50] * 1000))
    assert alice.finish() == 0
    assert 1000 < proxy.largest <= 1200


def test_client_that_stays_receives_after_the_end_of_stdin_until_a_signal(chat: Chat) -> None:
    bob = chat.client("bob", "--stay")
    bob.end_input()
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert alice.finish() == 0
    assert bob.popen.poll() is None
    bob.signal(signal.SIGTERM)
    assert bob.wait() == 0
    assert bob.lines[-1] == OFFLINE


def test_nick_belongs_to_the_identity_that_took_it(chat: Chat) -> None:
    other = ("--identity", str(chat.directory / "other"))
    chat.client("alice").finish()
    for options in (other, ("--anonymous",)):
        refused = chat.start("alice", *options)
        assert refused.wait() == 1
        assert refused.lines == ["[Nickname alice belongs to someone else.]", EXITING]
    assert chat.client("alice").finish() == 0
    assert stat.S_IMODE((chat.directory / "other").stat().st_mode) == 0o600
    again = chat.client("carol", *other)
    assert again.finish() == 0


def test_anonymous_client_does_not_own_its_nick(chat: Chat) -> None:
    chat.client("alice", "--anonymous").finish()
    assert not (chat.state / "udpchat" / "identity").exists()
    alice = chat.client("alice", "--identity", str(chat.directory / "other"))
    assert alice.finish() == 0


def test_nick_in_use_is_taken(chat: Chat) -> None:
    alice = chat.client("alice")
    second = chat.start("alice")
    assert second.wait() == 1
    assert second.lines == ["[Nickname alice is taken.]", EXITING]
    assert alice.finish() == 0


def test_nick_in_use_is_taken_for_one_who_comes_back_from_dereg_too(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("dereg alice\n")
    alice.see(OFFLINE)
    chat.client("alice")
    alice.feed("reg alice\n")
    assert alice.wait() == 1
    assert alice.lines[-2:] == ["[Nickname alice is taken.]", EXITING]


def test_nick_of_a_client_that_was_killed_is_free_at_once(chat: Chat) -> None:
    chat.client("alice").kill()
    assert chat.client("alice").finish() == 0


def test_nick_is_the_same_in_every_spelling_of_unicode(chat: Chat) -> None:
    bob = chat.client("zoe\u0308")
    alice = chat.client("alice")
    alice.feed("send zo\u00eb one\nsend zoe\u0308 two\n")
    bob.see("alice: one", "alice: two")
    bob.feed("dereg zo\u00eb\n")
    bob.see(OFFLINE)


# --- commands -------------------------------------------------------------------------------------------------

def test_message_is_shown_by_its_recipient_and_receipted_to_its_sender(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed("send bob hello\n")
    alice.see(received("bob"))
    bob.see("alice: hello")
    assert (alice.finish(), bob.finish()) == (0, 0)
    assert alice.events == [WELCOME, received("bob"), OFFLINE]
    assert bob.events == [WELCOME, "alice: hello", OFFLINE]
    assert not alice.err.data and not bob.err.data


def test_message_is_kept_as_it_is_with_its_blanks(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    texts = ["", " ", "  two before", "two after  ", "a  b", "\ttab\t", "send bob x", "\u00e9\u4e2d\U0001f600", "[x]"]
    alice.feed(sends("bob", texts))
    assert alice.finish() == 0
    assert alice.events == [WELCOME] + [received("bob")] * len(texts) + [OFFLINE]
    bob.finish()
    assert bob.events == [WELCOME] + [f"alice: {text}" for text in texts] + [OFFLINE]


def test_client_can_send_to_itself(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("send alice hello\n")
    assert alice.finish() == 0
    assert shown_once(alice.lines, ["alice: hello"]) and shown_once(alice.lines, [received("alice")])


def test_invalid_utf8_becomes_the_replacement_character(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed(b"send bob \xff \xc3( \xe4\xb8\n")
    bob.see("alice: \ufffd \ufffd( \ufffd")
    assert alice.finish() == 0


def test_last_line_counts_without_its_newline(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed("send bob one\nsend bob two")
    assert alice.finish() == 0
    bob.see("alice: one", "alice: two")


def test_control_characters_are_shown_as_their_escapes(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed("send bob \x1b[2J\x07\x00\r\x7f\x9b\u2028\u2029\u202e\u2066\u200f\u061c\x85 a\tb\\x1b\n")
    bob.see(r"alice: \x1b[2J\x07\x00\x0d\x7f\x9b\u2028\u2029\u202e\u2066\u200f\u061c\x85" + " a\tb\\x1b")
    alice.feed("send b\x1bob hello\n\x1b[2J\n")
    alice.see(r"[Unknown client b\x1bob.]", r"[Unknown command \x1b[2J, try help.]")
    assert alice.finish() == 1


def test_control_characters_in_the_mail_are_shown_as_their_escapes(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed("send bob \x1b[2J\rcarol: hello\n")
    assert alice.finish() == 0
    bob = chat.client("bob")
    bob.see_match(r"alice: <[^>]*> \\x1b\[2J\\x0dcarol: hello")


def test_long_message_is_one_message(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    longest = "x" + "\u4e2d" * (MAX_TEXT // 3)
    assert len(longest.encode()) == MAX_TEXT
    alice.feed(sends("bob", ["before", longest, "after"]))
    bob.see("alice: before", f"alice: {longest}", "alice: after")
    assert alice.finish() == 0
    assert alice.events == [WELCOME] + [received("bob")] * 3 + [OFFLINE]


@pytest.mark.parametrize("size", [MAX_TEXT + 1, 3 * MAX_TEXT])
def test_message_that_is_too_long_is_refused_with_its_size(chat: Chat, size: int) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed(sends("bob", ["before", "x" * size, "after"]))
    assert alice.finish() == 1
    too_long = f"[Message too long: {size} bytes, at most {MAX_TEXT}.]"
    assert sorted(alice.events[1:-1]) == sorted([too_long] + [received("bob")] * 2)
    bob.finish()
    assert bob.events == [WELCOME, "alice: before", "alice: after", OFFLINE]


def test_message_that_is_too_long_is_refused_as_the_last_line_too(chat: Chat) -> None:
    _, alice = chat.clients("bob", "alice")
    alice.feed(f"send bob {'x' * 200000}")
    assert alice.finish() == 1
    assert alice.events == [WELCOME, f"[Message too long: 200000 bytes, at most {MAX_TEXT}.]", OFFLINE]


def test_unknown_recipient_is_said_and_fails(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("send carol hello\n")
    alice.see("[Unknown client carol.]")
    assert alice.finish() == 1
    assert alice.events == [WELCOME, "[Unknown client carol.]", OFFLINE]


def test_empty_lines_are_ignored(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("\n\n   \n\t\n")
    assert alice.finish() == 0
    assert alice.events == [WELCOME, OFFLINE] and not alice.err.data


@pytest.mark.parametrize("line, answer", [
    ("send", "[Usage: send NICK MESSAGE]"),
    ("send bob", "[Usage: send NICK MESSAGE]"),
    ("send ", "[Usage: send NICK MESSAGE]"),
    ("dereg", "[Usage: dereg NICK]"),
    ("dereg alice now", "[Usage: dereg NICK]"),
    ("reg", "[Usage: reg NICK]"),
    ("reg alice bob", "[Usage: reg NICK]"),
    ("who bob", "[Usage: who]"),
    ("help me", "[Usage: help]"),
    ("quit now", "[Usage: quit]"),
    ("dance", "[Unknown command dance, try help.]"),
    ("SEND bob hello", "[Unknown command SEND, try help.]"),
    ("sendbob hello", "[Unknown command sendbob, try help.]"),
    ("talk nobody", "[Unknown client nobody.]"),
])
def test_line_that_is_no_command_is_answered_and_makes_the_exit_code_1(chat: Chat, line: str, answer: str) -> None:
    chat.server(store=":memory:")
    alice = chat.client("alice")
    alice.feed(line + "\n")
    assert alice.finish() == 1, "it may have been meant as a message"
    assert alice.events == [WELCOME, answer, OFFLINE]


@pytest.mark.parametrize("line, answer", [
    ("dereg bob", "[You can only deregister yourself.]"),
    ("reg bob", "[You can only register as alice.]"),
    ("reg alice", "[You are registered already.]"),
])
def test_command_that_is_refused_is_answered_and_changes_nothing(chat: Chat, line: str, answer: str) -> None:
    chat.server(store=":memory:")
    alice = chat.client("alice")
    alice.feed(line + "\n")
    assert alice.finish() == 0
    assert alice.events == [WELCOME, answer, OFFLINE]


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbfsend bob hello\n", b"send bob hello\r\n", b"\xef\xbb\xbf\r\n\r\nsend bob hello\r\n",
    b"send  bob hello\n", b" \t send\tbob\thello\r\n", b"talk bob\r\n\r\nhello\r\n", b"talk bob\n/ \tsend  bob hello\n",
])
def test_first_lines_and_line_ends_of_other_systems_are_no_part_of_a_text(chat: Chat, data: bytes) -> None:
    chat.server(store=":memory:")
    alice, bob = chat.clients("alice", "bob")
    alice.feed(data)
    assert alice.finish() == 0
    assert bob.finish() == 0
    assert [line for line in bob.events if line.startswith("alice: ")] == ["alice: hello"]


def test_message_is_all_that_follows_one_blank_behind_the_nick(chat: Chat) -> None:
    chat.server(store=":memory:")
    alice, bob = chat.clients("alice", "bob")
    alice.feed("send bob  two blanks \nsend bob\t\ttabs\t\nsend bob \ntalk bob\n  as it is\n")
    assert alice.finish() == 0
    assert bob.finish() == 0
    texts = [line.removeprefix("alice: ") for line in bob.events if line.startswith("alice: ")]
    assert texts == [" two blanks ", "\ttabs\t", "", "  as it is"]


FAULTY_STDIN = """\
import errno, os, sys
import loop, udpchat

def read(fd, work=loop.read_some, reads=[]):
    data = work(fd)
    reads.extend([data] * bool(data))
    if len(reads) > 1:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return data

loop.read_some = read
sys.exit(udpchat.main())
"""


def test_stdin_that_cannot_be_read_any_more_is_one_line_and_exit_1(chat: Chat) -> None:
    chat.server(store=":memory:")
    bob = chat.client("bob")
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), command=[sys.executable, "-c", FAULTY_STDIN],
                     environment={"PYTHONPATH": str(ROOT)})
    alice.feed("send bob hello\n")
    alice.see(received("bob"))
    alice.feed("send bob this is on a disk that has gone\n")
    assert alice.wait() == 1
    assert alice.errors == ["udpchat: cannot read stdin: Input/output error"]
    assert bob.finish() == 0 and "alice: hello" in bob.events


def test_while_deregistered_only_reg_help_and_quit_work(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    hint = "[You are offline. Use: reg alice]"
    alice.feed("dereg alice\n")
    alice.see(OFFLINE)
    for line in ("send bob hello", "send bob", "who", "dereg alice", "dereg bob", "who bob", "dance"):
        alice.feed(line + "\n")
        assert alice.next_line() == hint, line
    alice.feed("reg bob\nreg\nhelp\n")
    alice.see("[You can only register as alice.]", "[Usage: reg NICK]")
    assert alice.next_line().startswith("send NICK MESSAGE")
    alice.feed("quit\n")
    assert alice.wait() == 1, "reg without a nick is no command; the others were refused, and do not count"
    assert OFFLINE not in alice.lines[alice.lines.index(OFFLINE) + 1:]
    bob.finish()
    assert bob.events == [WELCOME, OFFLINE]


def test_dereg_and_reg_go_offline_and_online_again(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed("dereg alice\n")
    alice.see(OFFLINE)
    bob.wait_for("alice", "offline")
    alice.feed("reg alice\nsend bob again\n")
    alice.see(WELCOME, received("bob"))
    bob.see("alice: again")
    bob.wait_for("alice", "online")
    assert alice.finish() == 0


def test_help_names_every_command(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("help\n")
    assert alice.finish() == 0
    words = [line.split()[0] for line in alice.events[1:-1]]      # one line each: nothing is wrapped for a script
    assert words == ["send", "talk", "dereg", "reg", "who", "fingerprint", "verify", "trust", "help", "quit"]


def test_who_shows_everybody_in_columns_in_the_order_of_the_names(chat: Chat) -> None:
    for nick in ("zoe", "Zed", "a-long-nick.of_thirty-two_letter", "bob"):
        chat.absent(nick) if nick != "bob" else chat.client(nick)
    alice = chat.client("alice")
    alice.feed("who\n")
    assert alice.finish() == 0
    lines = [line for line in alice.lines if not line.startswith("[")]
    found = [WHO.fullmatch(line) for line in lines]
    rows = [match.groups() for match in found if match is not None]
    assert [(row[0], row[2]) for row in rows] == [
        ("Zed", "offline"), ("a-long-nick.of_thirty-two_letter", "offline"), ("alice", "online"), ("bob", "online"),
        ("zoe", "offline")]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", row[1]) for row in rows)
    assert len({line.index("127.0.0.1:") for line in lines}) == 1
    assert len({line.rindex(" ") for line in lines}) == 1
    assert lines[1].startswith("a-long-nick.of_thirty-two_letter  127.0.0.1:")


def test_quit_deregisters_and_ends(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.feed("quit\nsend bob hello\n")
    assert alice.wait() == 0
    assert alice.events == [WELCOME, OFFLINE]
    bob.wait_for("alice", "offline")


@pytest.mark.parametrize("last", ["quit", "dereg alice"])
def test_commands_are_carried_out_in_order_and_leaving_waits_for_every_send(chat: Chat, last: str) -> None:
    bob = chat.client("bob")
    texts = [f"text {number}" for number in range(3000)]
    alice = chat.start("alice")
    alice.feed("who\n" + sends("bob", texts) + f"help\n{last}\n")
    assert alice.finish() == 0
    events = alice.events
    assert [line.split()[0] for line in events[1:3]] == ["alice", "bob"]
    assert events[3:-1].count(received("bob")) == len(texts)
    assert events[-1] == OFFLINE
    bob.finish()
    assert bob.events == [WELCOME] + [f"alice: {text}" for text in texts] + [OFFLINE]


def test_script_never_races_its_own_start(chat: Chat) -> None:
    alice = chat.start("alice")
    alice.feed("who\nsend alice hello\nquit\n")
    assert alice.wait() == 0
    assert re.fullmatch(r"alice  127\.0\.0\.1:\d+  online", alice.events[1])
    assert received("alice") in alice.lines


# --- messages for those who are away --------------------------------------------------------------------------

MAIL = r"alice: <(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)> "


def test_message_for_somebody_offline_is_kept_and_shown_with_its_time(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.client("alice")
    before = int(time.time())
    alice.feed("send bob hello\nsend bob \nsend bob  x \n")
    assert alice.finish() == 0
    after = time.time()
    assert alice.events == [WELCOME] + [is_offline("bob")] * 3 + [SAVED] * 3 + [OFFLINE]
    bob = chat.run("client", "bob", "127.0.0.1", str(chat.port), environment={"TZ": "XYZ-5:30"})
    assert bob.finish() == 0
    shown = [re.fullmatch(MAIL + text, line) for text, line in zip(["hello", "", " x "], bob.events[2:5])]
    assert [bob.events[index] for index in (0, 1, -1)] == [WELCOME, MAIL_NOTICE, OFFLINE] and len(bob.events) == 6
    for match in shown:
        assert match is not None
        moment = time.strptime(match.group(1) + " UTC", "%Y-%m-%d %H:%M:%S %Z")
        assert before <= int(time.mktime(moment)) - time.timezone - (5 * 60 + 30) * 60 <= after


def test_mail_is_shown_once_and_is_announced_only_if_there_is_any(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed(sends("bob", ["one", "two"]))
    assert alice.finish() == 0
    first, second = chat.client("bob"), None
    assert first.finish() == 0
    second = chat.client("bob")
    assert second.finish() == 0
    assert first.lines.count(MAIL_NOTICE) == 1 and len([x for x in first.lines if x.startswith("alice: <")]) == 2
    assert second.events == [WELCOME, OFFLINE]


def test_mail_has_been_shown_when_a_client_without_input_ends(chat: Chat) -> None:
    chat.absent("bob")
    texts = [f"text {number}" for number in range(2000)]
    alice = chat.client("alice")
    alice.feed(sends("bob", texts))
    assert alice.finish() == 0
    bob = chat.start("bob")
    assert bob.finish() == 0
    shown = [line.split("> ", 1)[1] for line in bob.lines if line.startswith("alice: <")]
    assert shown == texts
    assert bob.events[:2] == [WELCOME, MAIL_NOTICE] and bob.events[-1] == OFFLINE


def test_recipient_that_cannot_be_reached_directly_is_said_to_exist_and_gets_it_by_relay(chat: Chat) -> None:
    proxy = chat.proxy()
    bob = chat.client("bob", port=proxy.port)
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    alice.see(SAVED)
    bob.see_match(MAIL + "hello")
    alice.feed("send bob again\n")
    alice.see(SAVED)
    bob.see_match(MAIL + "again")
    assert alice.events[:5] == [WELCOME, no_ack("bob"), "[Client bob exists!!]", SAVED, SAVED]
    assert (alice.finish(), bob.finish()) == (0, 0)
    assert MAIL_NOTICE not in bob.lines


def test_every_send_has_one_closing_line_in_order_whatever_way_it_takes(chat: Chat) -> None:
    chat.absent("carol")
    bob, alice = chat.clients("bob", "alice")
    alice.feed("send bob 1\nsend carol 2\nsend nobody 3\nsend bob 4\nsend carol 5\n")
    alice.feed(f"send bob {'x' * 70000}\nsend bob \n")
    assert alice.finish() == 1
    count = {line: alice.lines.count(line) for line in set(alice.events)}
    assert count == {WELCOME: 1, OFFLINE: 1, received("bob"): 3, is_offline("carol"): 2, SAVED: 2,
                     "[Unknown client nobody.]": 1, f"[Message too long: 70000 bytes, at most {MAX_TEXT}.]": 1}
    bob.finish()
    assert bob.events == [WELCOME, "alice: 1", "alice: 4", "alice: ", OFFLINE]


def test_nothing_is_lost_or_doubled_on_a_bad_way_to_the_server(chat: Chat) -> None:
    chat.absent("bob")
    proxy = chat.proxy()
    alice, texts = chat.client("alice", port=proxy.port), [f"text {number}" for number in range(500)]
    proxy.loss, proxy.doubled = 0.2, 0.3
    alice.feed(sends("bob", texts))
    chat.until(lambda: alice.lines.count(SAVED) == len(texts), "everything to be kept")
    proxy.loss = 0.0
    assert alice.finish() == 0
    bob = chat.start("bob", port=proxy.port)
    proxy.loss = 0.2
    chat.until(lambda: len(bob.lines) > len(texts) + 1, "everything to be shown")
    proxy.loss = 0.0
    assert bob.finish() == 0
    assert [line.split("> ", 1)[1] for line in bob.lines if line.startswith("alice: <")] == texts


# --- a server that is silent ----------------------------------------------------------------------------------

def test_client_without_a_server_says_so_and_fails(chat: Chat) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        alice = chat.start("alice", port=silent.getsockname()[1])
        assert alice.wait() == 1
        silent.settimeout(DEADLINE)
        assert len([silent.recv(2000) for _ in range(5)]) == 5
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(2000)
    assert alice.lines == [NOT_RESPONDING, EXITING]


def test_undelivered_messages_are_counted_and_named_as_the_lines_that_would_repeat_them(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.sync()
    server.kill()
    alice.feed("send bob  two  blanks \nsend bob \nsend bob \u00e9\n")
    assert alice.finish() == 1
    assert alice.events[2:5] == [is_offline("bob")] * 3
    assert alice.events[5:] == [NOT_RESPONDING, "[3 messages not delivered.]", EXITING]
    assert alice.errors == ["send bob  two  blanks ", "send bob ", "send bob \u00e9"]


def test_script_goes_on_behind_messages_that_are_stuck(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    carol, alice = chat.clients("carol", "alice")
    carol.wait_for("alice")
    server.kill()
    texts = [f"text {number}" for number in range(10000)]
    alice.feed(sends("bob", texts) + "send carol hello\n")
    carol.see("alice: hello")
    alice.see(received("carol"))
    assert alice.finish() == 1
    assert alice.lines[-2:] == ["[10000 messages not delivered.]", EXITING]
    assert sorted(alice.errors) == sorted(f"send bob {text}" for text in texts)


def test_long_mail_between_the_longest_nicks_is_delivered(chat: Chat) -> None:
    sender, recipient = "字" * 32, "文" * 32
    chat.absent(recipient)
    alice = chat.client(sender)
    alice.wait_for(recipient, "offline")
    texts = ["x" * 768, "y" * 768, "z" * 5000, "end"]
    alice.feed(sends(recipient, texts))
    assert alice.finish() == 0
    bob = chat.client(recipient)
    for text in texts:
        bob.see_match(re.escape(sender) + f": <.*> {text}")


def test_lines_that_were_not_carried_out_are_handed_back_for_whom_they_were_meant(chat: Chat) -> None:
    bob, carol = chat.clients("bob", "carol")
    bob.signal(signal.SIGSTOP)
    texts = [f"text {number}" for number in range(4200)]        # more than are queued, but all of it is one read
    script = chat.directory / "script"
    script.write_text("".join(line + "\n" for line in (
        "talk bob", *texts, "/who", "/end", "send carol one", "talk carol", "two", "/quit", "three")))
    with script.open("rb") as file:
        alice = chat.client("alice", "--ack-timeout", "60000", stdin=file.fileno())
        chat.until(lambda: os.lseek(file.fileno(), 0, os.SEEK_CUR) == script.stat().st_size, "the script to be read")
        alice.signal(signal.SIGINT)
        assert alice.wait() == 1
    assert alice.errors == [f"send bob {text}" for text in texts] + ["send carol one", "send carol two"]
    assert alice.lines[-1] == "[4202 messages not delivered.]"


def test_messages_wait_for_a_server_that_was_away_and_the_outage_is_said_once(chat: Chat) -> None:
    chat.absent("bob")
    proxy = chat.proxy()
    alice = chat.client("alice", port=proxy.port)
    alice.sync()
    proxy.swallows = True
    alice.feed("send bob one\n")
    alice.see(NOT_RESPONDING)
    alice.feed("send bob two\n")
    chat.rest(3.0)
    proxy.swallows = False
    alice.see(SAVED, SAVED)
    assert alice.finish() == 0
    assert alice.lines.count(NOT_RESPONDING) == 1


@pytest.mark.parametrize("command, code", [("quit\n", 1), ("dereg alice\n", 1), ("", 0)])
def test_unanswered_deregistration_fails_only_for_a_command(chat: Chat, command: str, code: int) -> None:
    server = chat.server()
    alice = chat.client("alice")
    alice.sync()
    server.kill()
    alice.feed(command)
    if not command:
        alice.end_input()
    assert alice.wait() == code
    assert alice.lines[-2:] == [NOT_RESPONDING, EXITING]


# --- signals --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_an_orderly_end(chat: Chat, number: int) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.sync()
    alice.signal(number)
    assert alice.wait() == 0
    assert alice.lines[-1] == OFFLINE
    bob.wait_for("alice", "offline")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_client_without_a_server_and_names_what_was_not_delivered(chat: Chat, number: int) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.sync()
    server.kill()
    alice.feed("send bob hello\n")
    alice.see(is_offline("bob"))
    alice.signal(number)
    assert alice.wait() == 1
    assert "[1 message not delivered.]" in alice.lines
    assert alice.errors == ["send bob hello"]


@pytest.mark.parametrize("is_noticed", [False, True])
def test_signal_ends_a_client_without_a_server_and_names_all_of_many_messages(chat: Chat, is_noticed: bool) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.sync()
    server.kill()
    texts = [f"m{number} " + "x" * 700 for number in range(3000)]
    alice.feed("".join(f"send bob {text}\n" for text in texts))
    if is_noticed:
        alice.see(NOT_RESPONDING)
    else:
        alice.see(is_offline("bob"))
    alice.signal(signal.SIGTERM)
    assert alice.wait() == 1
    accounted = [line.removeprefix("send bob ") for line in alice.errors]
    assert accounted and accounted == texts[:len(accounted)], "what was not read is not handed back"
    assert f"[{len(accounted)} messages not delivered.]" in alice.lines


def test_signal_leaves_whole_lines_on_stdin_and_names_all_that_was_read(chat: Chat, tmp_path: Path) -> None:
    server = chat.server()
    chat.absent("bob")
    lines = [f"send bob m{number} " + "x" * 700 for number in range(3000)]      # it is read in blocks
    (tmp_path / "lines").write_text("".join(line + "\n" for line in lines))
    with open(tmp_path / "lines", encoding="utf-8") as source:
        alice = chat.start("alice", stdin=source.fileno())
        alice.see(is_offline("bob"))
        server.kill()
        alice.signal(signal.SIGTERM)
        assert alice.wait() == 1 and alice.errors
        rest = source.read().splitlines()
    closed = len(lines) - len(alice.errors) - len(rest)
    assert alice.errors + rest == lines[closed:] and alice.lines.count(SAVED) <= closed


def test_signal_names_the_beginning_of_a_line_whose_end_is_not_there_yet(chat: Chat) -> None:
    bob = chat.client("bob")
    alice = chat.client("alice")
    alice.feed("send bob one\nsend bob second mess")
    alice.see(received("bob"))
    alice.signal(signal.SIGTERM)
    assert alice.wait() == 1 and alice.errors == ["udpchat: read only in part: send bob second mess"]
    bob.see("alice: one")


@pytest.mark.parametrize("command", ["send ghost hello", "talk ghost", "verify ghost"])
def test_commands_with_unknown_nicks_do_not_wait_for_a_server_that_is_gone(chat: Chat, command: str) -> None:
    server = chat.server()
    bob, alice = chat.clients("bob", "alice")
    alice.wait_for("bob")
    bob.wait_for("alice")
    server.kill()
    alice.feed(f"{command}\n{command}\n")
    alice.see("[Unknown client ghost.]", "[Unknown client ghost.]")
    alice.feed(f"{command}\nsend bob hello\nquit\n")
    bob.see("alice: hello")
    assert alice.wait() == 1


def test_signal_ends_an_idle_client_without_a_server_with_0(chat: Chat) -> None:
    server = chat.server()
    alice = chat.client("alice")
    alice.sync()
    server.kill()
    alice.signal(signal.SIGTERM)
    assert alice.wait() == 0


def test_signal_ends_a_client_that_is_not_registered_yet(chat: Chat) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        alice = chat.start("alice", port=silent.getsockname()[1])
        silent.settimeout(DEADLINE)
        silent.recv(2000)
        alice.signal(signal.SIGINT)
        assert alice.wait() == 0
    assert not alice.err.data


def test_signal_ends_a_client_that_has_not_come_to_the_network_yet(chat: Chat) -> None:
    identity = chat.directory / "identity"
    os.mkfifo(identity)
    alice = chat.start("alice", "--identity", str(identity))
    writers: list[int] = []

    def is_reading() -> bool:
        try:
            writers.append(os.open(identity, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:     # nobody has opened it to read
            return False
        return True
    chat.until(is_reading, "the identity to be read")
    alice.signal(signal.SIGINT)
    chat.rest(1)
    alice.signal(signal.SIGINT)     # the first may have come just before the read: then Python sees it only after that
    assert alice.wait() == 0
    assert not alice.err.data
    os.close(writers[0])


def test_signal_ends_a_client_that_has_deregistered(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed("dereg alice\n")
    alice.see(OFFLINE)
    alice.signal(signal.SIGTERM)
    assert alice.wait() == 0


def test_second_signal_ends_at_once_and_names_what_was_not_delivered(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), command=FROZEN_CLOCK)  # one signal never ends it
    alice.see(WELCOME)
    alice.sync()
    server.kill()
    alice.feed("send bob hello\n")
    alice.see(is_offline("bob"))
    alice.signal(signal.SIGINT)
    chat.rest(0.3)
    assert alice.popen.poll() is None
    alice.signal(signal.SIGTERM)        # another number: two of the same that come together count as one
    assert alice.wait() == 1
    assert alice.lines[-1] == "[1 message not delivered.]"
    assert alice.errors == ["send bob hello"]


# --- terminals ------------------------------------------------------------------------------------------------

PLAIN = ("--no-time", "--color", "never")


def screen(process: Process) -> tuple[list[str], tuple[int, int]]:
    """Return what a terminal of 80 columns shows, and where the cursor is (line, column)."""
    terminal = pyte.Screen(80, 40)
    pyte.ByteStream(terminal).feed(bytes(process.out.data))
    lines = list(terminal.display)
    return [line.rstrip() for line in lines], (terminal.cursor.y, terminal.cursor.x)


def shows(process: Process, *wanted: str) -> None:
    """Wait until the terminal shows ``wanted`` as its last lines, the last one with the cursor behind it."""
    def is_there() -> bool:
        lines, (row, column) = screen(process)
        last = wanted[-1]
        return (lines[row + 1 - len(wanted):row + 1] == [line.rstrip() for line in wanted] and column == len(last)
                and not any(lines[row + 1:]))
    process.chat.until(is_there, f"{wanted} on the terminal")


def test_terminal_has_a_prompt_and_lines_go_above_it(chat: Chat) -> None:
    bob = chat.client("bob")
    alice = chat.run_on_terminal("client", "alice", "127.0.0.1", str(chat.port), *PLAIN)
    shows(alice, WELCOME, UPDATED, ">>> ")
    alice.feed("send bob hello\n")
    shows(alice, ">>> send bob hello", received("bob"), ">>> ")
    bob.wait_for("alice")
    bob.feed("send alice hi there\n")
    shows(alice, received("bob"), "bob: hi there", ">>> ")
    alice.feed("\n")
    shows(alice, "bob: hi there", ">>>", ">>> ")
    alice.feed("dance\n")
    shows(alice, ">>> dance", "[Unknown command dance, try help.]",
          "[To say something: talk NICK, or send NICK MESSAGE.]", ">>> ")
    assert not re.search(rb"\x1b\[[0-9;]*m", alice.out.data), "no colour was asked for"


def test_terminal_says_its_last_line_on_a_line_of_its_own(chat: Chat) -> None:
    alice = chat.run_on_terminal("client", "alice", "127.0.0.1", str(chat.port), *PLAIN)
    shows(alice, UPDATED, ">>> ")
    alice.feed("quit\n")
    assert alice.wait() == 0
    lines = [line for line in screen(alice)[0] if line]
    assert lines == [f"[Connecting to 127.0.0.1:{chat.port} as alice.]", WELCOME, UPDATED, ">>> quit", OFFLINE]


def test_control_d_on_a_terminal_ends_in_order(chat: Chat) -> None:
    alice = chat.run_on_terminal("client", "alice", "127.0.0.1", str(chat.port), *PLAIN)
    shows(alice, UPDATED, ">>> ")
    alice.feed("\x04")
    assert alice.wait() == 0
    assert [line for line in screen(alice)[0] if line][-1].endswith(OFFLINE)


def test_control_c_on_a_terminal_ends_in_order(chat: Chat) -> None:
    alice = chat.run_on_terminal("client", "alice", "127.0.0.1", str(chat.port), *PLAIN)
    shows(alice, UPDATED, ">>> ")
    alice.feed("\x03")
    assert alice.wait() == 0
    assert [line for line in screen(alice)[0] if line][-1].endswith(OFFLINE)
    assert not alice.err.data


def test_no_prompt_and_no_escape_unless_stdin_and_stdout_are_terminals(chat: Chat) -> None:
    master, slave = os.openpty()
    try:
        typing = chat.start("typing", stdin=slave)
        typing.see(WELCOME)
        os.write(master, b"send typing hello\nquit\n")
        assert typing.wait() == 0
        reading = chat.start("reading", stdout=slave)
        reading.feed("send reading hello\n")
        assert reading.finish() == 0
        shown = typing.out.data + os.read(master, 65536)
    finally:
        os.close(master)
        os.close(slave)
    assert b"typing: hello\n" in shown and b"reading: hello\r\n" in shown
    assert b">>>" not in shown and b"\x1b" not in shown


# --- stdout ---------------------------------------------------------------------------------------------------

def test_every_event_is_one_line_that_comes_at_once(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    for number in range(3):
        alice.feed(f"send bob {number}\n")
        alice.see(received("bob"))          # flushed, though the client runs on
        bob.see(f"alice: {number}")
    assert alice.finish() == 0
    assert alice.out.data.endswith(f"{OFFLINE}\n".encode())


def test_table_change_is_one_line(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.sync()
    before = alice.lines.count(UPDATED)
    chat.client("bob")
    alice.see(UPDATED)
    alice.wait_for("bob")
    assert alice.lines.count(UPDATED) == before + 1


def test_program_can_be_started_from_any_directory_by_its_own_name(chat: Chat) -> None:
    assert PROGRAM[1] == str(ROOT / "udpchat.py") and (ROOT / "udpchat.py").read_text().startswith("#!")
    assert chat.complete("--version").wait() == 0
