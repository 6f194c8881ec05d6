"""What an operator of a server uses: its log and its rotation, its counters, the line that says how to join."""
from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import udpchat
from home import ERROR, Mailbox, json_line
from loop import Random, Scheduler, SystemRandom, reachable
from protocol import BUNDLE_EXTRA, STRING_HEADER, encode, padded
from registry import Registry
from server import Drop, Server
from tests.pages import section
from tests.processes import DEADLINE, NO_PKTINFO, ROOT, SAVED, WELCOME, Chat, Process, received

TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) (.*)")
JSON_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TERMINAL_LINE = re.compile(rb"\[Join with: (.*) client NICK (\S+) (\d+)\]\r\n")


class StoppedLoop(Scheduler):
    """A loop in which nothing happens."""

    random: Random = SystemRandom()

    def clock(self) -> float:
        return self.now()

    def wall(self) -> float:
        return self.now()


def messages(path: Path) -> list[str]:
    """Return the records in a log, without time and level."""
    found = [TEXT_LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(found)
    return [match.group(2) for match in found if match is not None]


def wait_for_log(chat: Chat, path: Path, text: str) -> None:
    chat.until(lambda: path.exists() and text in path.read_text(), f"{text!r} in {path.name}")


def summary(chat: Chat, server: Process, path: Path) -> dict[str, int]:
    """Return what SIGUSR1 makes the server write into its log."""
    before = path.read_text().count(" summary: ")
    server.signal(signal.SIGUSR1)
    chat.until(lambda: path.read_text().count(" summary: ") > before, "a summary")
    last = messages(path)[-1]
    assert last.startswith("summary: ")
    return {name: int(count) for name, count in (pair.split("=") for pair in last.split()[1:])}


# --- the log --------------------------------------------------------------------------------------------------

def test_log_goes_to_a_file_if_asked_and_stderr_stays_empty(chat: Chat) -> None:
    log = chat.directory / "server.log"
    server = chat.server("--log-level", "info", "--log-file", str(log))
    chat.absent("bob")
    wait_for_log(chat, log, "bob deregistered")
    assert [text.split()[:2] for text in messages(log)] == [["bob", "registered"], ["bob", "deregistered"]]
    assert not server.err.data and len(server.lines) == 2


def test_log_file_is_appended_to(chat: Chat) -> None:
    log = chat.directory / "server.log"
    log.write_text("what was there\n")
    chat.server("--log-level", "info", "--log-file", str(log))
    chat.absent("bob")
    wait_for_log(chat, log, "bob deregistered")
    assert log.read_text().startswith("what was there\n")


@pytest.mark.parametrize("level, wanted", [("info", True), ("warning", False), ("error", False)])
def test_level_says_what_is_logged(chat: Chat, level: str, wanted: bool) -> None:
    log = chat.directory / "server.log"
    server = chat.server("--log-level", level, "--log-file", str(log))
    chat.absent("bob")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert ("bob registered" in log.read_text()) is wanted
    assert wanted or not log.read_text()


def test_log_file_that_cannot_be_opened_is_one_line_and_exit_1(chat: Chat) -> None:
    for path in (chat.directory / "missing" / "log", chat.directory):
        server = chat.complete("server", "0", "--store", ":memory:", "--log-file", str(path))
        assert server.wait() == 1 and not server.out.data
        assert len(server.errors) == 1 and str(path) in server.errors[0]


def test_sighup_opens_the_log_anew_for_whoever_rotates_it(chat: Chat) -> None:
    log, old = chat.directory / "server.log", chat.directory / "server.log.1"
    server = chat.server("--log-level", "info", "--log-file", str(log))
    chat.absent("bob")
    wait_for_log(chat, log, "bob deregistered")
    log.rename(old)
    chat.absent("carol")
    wait_for_log(chat, old, "carol deregistered")
    server.signal(signal.SIGHUP)
    chat.until(log.exists, "a new log")
    chat.absent("dave")
    wait_for_log(chat, log, "dave deregistered")
    assert "dave" not in old.read_text() and server.popen.poll() is None


def test_log_that_cannot_be_opened_anew_stays_where_it_is(chat: Chat) -> None:
    directory = chat.directory / "logs"
    directory.mkdir()
    log, moved = directory / "server.log", chat.directory / "moved"
    server = chat.server("--log-file", str(log))
    directory.rename(moved)
    server.signal(signal.SIGHUP)
    wait_for_log(chat, moved / "server.log", "ERROR cannot reopen the log")
    chat.absent("bob")


def test_without_a_log_file_sighup_changes_nothing_in_the_background(chat: Chat) -> None:
    server = chat.server()
    server.signal(signal.SIGHUP)
    chat.absent("bob")
    assert server.popen.poll() is None and not server.err.data


def test_server_at_a_terminal_ends_when_that_is_closed(chat: Chat) -> None:
    server = chat.run_on_terminal("server", "0", "--host", "127.0.0.1", "--store", ":memory:")
    server.see_match(r"\[Server listening on .*\]\r")
    server.signal(signal.SIGHUP)
    assert server.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_full_disk_neither_ends_nor_blocks_the_server(chat: Chat) -> None:
    server = chat.server("--log-level", "debug", "--log-file", "/dev/full")
    for _ in range(5):
        server.signal(signal.SIGUSR1)
    bob = chat.client("bob")
    alice = chat.client("alice")
    alice.wait_for("bob")
    alice.feed("send bob hello\n")
    alice.see(received("bob"))
    assert (alice.finish(), bob.finish()) == (0, 0)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0 and not server.err.data


def test_json_log_is_one_object_a_line(chat: Chat) -> None:
    began = datetime.now(timezone.utc)
    log = chat.directory / "log.json"
    server = chat.server("--log-level", "info", "--log-file", str(log), "--log-format", "json")
    chat.absent("b\u00f6b")
    wait_for_log(chat, log, "deregistered")
    server.signal(signal.SIGUSR1)
    wait_for_log(chat, log, "summary")
    records: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["level"], record["message"].split(" ")[0]) for record in records] == [
        ("info", "b\u00f6b"), ("info", "b\u00f6b"), ("info", "summary")]
    assert all(JSON_TIME.fullmatch(record["time"]) for record in records)
    at = datetime.strptime(records[0]["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert began < at + timedelta(milliseconds=1) and at <= datetime.now(timezone.utc), "milliseconds are cut off"
    assert set(records[0]) == {"time", "level", "message"}
    assert records[2]["nicks"] == 1 and records[2]["clients"] == 0


def test_json_log_shows_control_characters_as_escapes() -> None:
    text = "x\x1b[2J\n\u2028\udcff"
    line = json_line(0.0625, ERROR, text, {})
    assert line.isascii() and line.isprintable()
    assert json.loads(line) == {"time": "1970-01-01T00:00:00.062Z", "level": "error", "message": text}


def test_client_takes_the_same_options(chat: Chat) -> None:
    log = chat.directory / "client.log"
    environment = {"XDG_STATE_HOME": "/dev/null/nowhere"}
    client = chat.run("client", "bob", "127.0.0.1", str(chat.port), "--log-file", str(log), "--log-format", "json",
                      environment=environment)
    assert client.finish() == 0 and not client.err.data
    [record] = [json.loads(line) for line in log.read_text().splitlines()]
    assert record["level"] == "warning" and "no identity" in record["message"]


@pytest.mark.parametrize("options", [["--log-format", "xml"], ["--log-level", "loud"], ["--log-file"]], ids=repr)
@pytest.mark.parametrize("mode", [["server", "0"], ["client", "alice"]], ids=repr)
def test_wrong_log_options_are_wrong_arguments(chat: Chat, mode: list[str], options: list[str]) -> None:
    ended = chat.complete(*mode, *options)
    assert ended.wait() == 2 and len(ended.errors) == 1


# --- the counters ---------------------------------------------------------------------------------------------

def test_sigusr1_tells_what_there_is_whatever_the_level(chat: Chat) -> None:
    began = time.monotonic()
    log = chat.directory / "server.log"
    server = chat.server("--log-level", "error", "--log-file", str(log))
    first = summary(chat, server, log)
    assert first["clients"] == first["online"] == first["nicks"] == first["messages_kept"] == 0
    chat.absent("carol")
    alice = chat.client("alice")
    bob = chat.client("bob")
    alice.wait_for("bob")
    alice.feed("send carol one\nsend carol t\u00e4o\n")
    alice.see(SAVED, SAVED)
    now = summary(chat, server, log)
    assert (now["clients"], now["online"], now["nicks"]) == (2, 2, 3)
    sealed = len("onet\u00e4o".encode()) + 2 * (STRING_HEADER + BUNDLE_EXTRA)
    assert now["messages_kept"] == 2 and sealed - 100 < now["bytes_kept"] <= sealed
    assert (now["save_streams"], now["mail_streams"], now["probes"]) == (1, 0, 0)
    assert now["datagrams_in"] > first["datagrams_in"] and now["bytes_in"] >= 128 * 3
    assert now["datagrams_out"] > 3 and now["bytes_out"] > now["datagrams_out"]
    assert now["drop_no_cookie"] == 3 and now["drop_wrong_cookie"] == now["drop_invalid"] == 0
    assert not any(now[name] for name in ("refusals", "store_failures", "not_sent"))
    assert 0 <= now["uptime"] <= time.monotonic() - began
    assert len(messages(log)) == 2
    assert (alice.finish(), bob.finish()) == (0, 0)
    after = summary(chat, server, log)
    assert (after["clients"], after["online"], after["nicks"], after["messages_kept"]) == (0, 0, 3, 2)


def test_drops_are_counted_by_their_reason(chat: Chat) -> None:
    log = chat.directory / "server.log"
    server = chat.server("--log-file", str(log))
    session = bytes(16)
    request = {"id": 1, "nick": "bob", "cookie": session}
    datagrams = {
        "drop_invalid": b"\xc1 nonsense",       # too short for a record
        "drop_not_for_servers": encode("bye", {"session": session}),
        "drop_no_cookie": encode("reg", {"id": 1, "nick": "bob"}),
        "drop_wrong_cookie": encode("reg", request),
        "drop_unknown_session": padded("dereg", {"session": session}, 184),
        "drop_unknown_stream": encode("ack", {"stream": 5, "next": 1, "have": [], "room": 0}),
        "drop_unknown_channel": b"\xc1" + bytes(60),
    }
    before = summary(chat, server, log)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", chat.port))
        for count, datagram in enumerate(datagrams.values(), 1):
            for _ in range(count):
                sock.send(datagram)
    sent = sum(range(1, len(datagrams) + 1))
    now = before
    while now["datagrams_in"] < before["datagrams_in"] + sent:
        now = summary(chat, server, log)
    assert {name: now[name] - before[name] for name in datagrams} == {
        name: count for count, name in enumerate(datagrams, 1)}
    size = sum(count * len(datagram) for count, datagram in enumerate(datagrams.values(), 1))
    assert now["bytes_in"] - before["bytes_in"] == size and now["clients"] == 0


def test_refused_nicks_are_counted(chat: Chat) -> None:
    log = chat.directory / "server.log"
    server = chat.server("--log-file", str(log))
    chat.client("bob")
    assert chat.complete("client", "bob", "127.0.0.1", str(chat.port), "--anonymous").wait() == 1
    assert summary(chat, server, log)["refusals"] == 1


def test_every_counter_of_the_server_is_a_number_and_named_once() -> None:
    server = Server(StoppedLoop(0.0), lambda datagram, address: None, Registry(Mailbox(":memory:", bytes(16))))
    counters = server.counters()
    assert all(type(count) is int and count == 0 for count in counters.values())
    assert all(re.fullmatch("[a-z_]+", name) for name in counters)
    assert {why.value for why in Drop} <= set(counters)


# --- start and end --------------------------------------------------------------------------------------------

def join_line(chat: Chat, *options: str) -> re.Match[bytes]:
    """Return the second line of a server that was started on a terminal."""
    server = chat.run_on_terminal("server", "0", "--store", ":memory:", *options)
    server.see_match(r"\[Server listening on .*\]\r")
    server.next_line()
    found = TERMINAL_LINE.search(server.out.data)
    assert found is not None, server.out.data
    return found


def test_on_a_terminal_the_server_says_how_to_join(chat: Chat) -> None:
    found = join_line(chat, "--host", "127.0.0.1")
    assert found.groups()[:2] == (b"python udpchat.py", b"127.0.0.1")
    client = chat.client("bob", host="127.0.0.1", port=int(found.group(3)))
    assert client.finish() == 0


def test_the_address_to_join_at_is_one_of_this_machine(chat: Chat) -> None:
    host = join_line(chat).group(2).decode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))


def test_without_a_way_out_the_address_is_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*arguments: int) -> None:
        raise OSError(101, "Network is unreachable")
    monkeypatch.setattr("loop.socket.socket", no_socket)
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.1.2.3", "fe80::1%2")] == [
        "127.0.0.1", "127.0.0.1", "10.1.2.3", "fe80::1%INTERFACE"]


@pytest.mark.parametrize("called, program", [
    ("udpchat.py", "python udpchat.py"), ("/opt/chat/udpchat.py", "python udpchat.py"),
    ("/opt/chat/udpchat.pyz", "python3 udpchat.pyz"), ("/opt/chat/__main__.py", "python -m udpchat"),
    ("/usr/bin/udpchat", "udpchat"), ("-c", "udpchat")])
def test_the_program_to_join_with_is_the_one_that_was_called(monkeypatch: pytest.MonkeyPatch, called: str,
                                                             program: str) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert udpchat.how_to_join(("10.1.2.3", 4119)) == f"[Join with: {program} client NICK 10.1.2.3 4119]\n"


def test_on_a_pipe_the_server_says_where_it_is_and_its_fingerprint_at_once(chat: Chat) -> None:
    for options in ((), ("--secure", "off")):
        server = chat.server(*options, port=chat.port if options else 0)
        shown = [rf"\[Server listening on 127\.0\.0\.1:{chat.port}\]\n"]
        if not options:
            shown.append(r"\[Fingerprint( \d{5}){12}\]\n")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert re.fullmatch("".join(shown), server.out.data.decode())


def test_server_on_all_addresses_is_reached_at_each_of_them(chat: Chat) -> None:
    chat.server(host="0.0.0.0")
    alice = chat.client("alice", host="0.0.0.0")        # it answers from 127.0.0.1
    bob = chat.client("bob")
    alice.wait_for("bob")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert alice.finish() == bob.finish() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, 127.0.0.2 is nobody's address")
def test_client_finds_a_server_again_that_comes_back_at_the_address_it_was_given(chat: Chat) -> None:
    server = chat.server(host="0.0.0.0", command=NO_PKTINFO)
    alice = chat.client("alice", "--log-level", "info", host="127.0.0.2")
    chat.until(lambda: "answers from 127.0.0.1" in "".join(alice.errors), "the log to say where the server is")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    chat.server(host="127.0.0.2", port=chat.port)
    chat.until(lambda: alice.lines.count(WELCOME) == 2, "alice to be welcome again", 3 * DEADLINE)
    assert alice.finish() == 0


@pytest.mark.parametrize("mode", ["server", "client", "send"])
@pytest.mark.parametrize("most", range(6, 12))
def test_too_few_descriptors_are_one_clear_line(chat: Chat, mode: str, most: int) -> None:
    words = {"server": ["server", "0", "--host", "127.0.0.1", "--store", str(chat.directory / "few.db")],
             "client": ["client", "alice", "127.0.0.1", str(chat.port)],
             "send": ["send", "bob", "hello", "--nick", "alice", "--server", f"127.0.0.1:{chat.port}"]}[mode]
    script = f"ulimit -n {most}; exec \"$0\" \"$@\""
    process = chat.run(*words, command=["sh", "-c", script, sys.executable, str(ROOT / "udpchat.py")])
    process.end_input()
    chat.until(lambda: bool(process.lines) or process.popen.poll() is not None, "a first line or the end")
    if mode == "server":                # the others end by themselves
        process.signal(signal.SIGTERM)
    process.wait()
    assert "Traceback" not in process.err.data.decode() and len(process.errors) <= 1


def test_ctrl_c_while_its_modules_are_imported_gives_no_traceback(chat: Chat) -> None:
    (chat.directory / "msgpack.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    alice = chat.run("client", "alice", command=[sys.executable, str(ROOT / "udpchat.py")],
                     environment={"PYTHONPATH": str(chat.directory)})
    assert alice.wait() == -signal.SIGINT and not alice.err.data


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_server_that_is_asked_for_its_log_while_it_starts_goes_on(chat: Chat, number: signal.Signals) -> None:
    slow = [sys.executable, "-c", f"""
import os, sys
sys.path[0] = {str(ROOT)!r}
import udpchat
def open_slowly(path, now=0.0, open_store=udpchat.open_store):
    os.kill(os.getpid(), {int(number)})
    return open_store(path, now)
udpchat.open_store = open_slowly
sys.exit(udpchat.main())
"""]
    store = str(chat.directory / "store.db")
    server = chat.run("server", "0", "--store", store, command=slow, stdin=subprocess.DEVNULL)
    server.see_match(r"\[Server listening on .*\]")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_ctrl_c_while_it_starts_gives_no_traceback(chat: Chat) -> None:
    """A signal at any moment from when the arguments are looked at; before, Python itself is what starts."""
    script = ("import signal, sys, udpchat\n"
              "delay, parse = float(sys.argv.pop()), udpchat.parse\n"
              "def timed(words):\n"
              "    signal.setitimer(signal.ITIMER_REAL, delay)\n"
              "    return parse(words)\n"
              "udpchat.parse = timed\n"
              "signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))\n"
              "sys.exit(udpchat.main())\n")
    command, paths = [sys.executable, "-c", script], {"PYTHONPATH": str(ROOT)}
    for step in range(12):
        server = chat.run("server", "0", "--store", str(chat.directory / f"{step}.db"), str((step + 1) / 1000),
                          command=command, environment=paths)
        assert server.wait() == 0 and not server.err.data, server.err.data


# --- what the manual says of it -------------------------------------------------------------------------------

def test_store_of_a_stopped_server_is_one_file_that_can_be_copied(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed("send bob for later\n")
    alice.see(SAVED)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert [path.name for path in chat.directory.glob(chat.store.name + "*")] == [chat.store.name]
    copy = chat.directory / "copy.db"
    copy.write_bytes(chat.store.read_bytes())
    chat.server(store=str(copy))
    chat.client("bob").see_match("alice: <.*> for later")


def test_every_counter_is_in_the_manual() -> None:
    server = Server(StoppedLoop(0.0), lambda datagram, address: None, Registry(Mailbox(":memory:", bytes(16))))
    told = set(re.findall("`([a-z_]+)`", section("server.md", "Counters")))
    assert {"uptime", "datagrams_in", "bytes_in", "datagrams_out", "bytes_out", "not_sent"} <= told
    assert set(server.counters()) <= told


# --- the files for systemd and logrotate ------------------------------------------------------------------------

HARDENING = ["NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes",
             "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", "CapabilityBoundingSet=",
             "SystemCallFilter=@system-service", "MemoryDenyWriteExecute=yes", "LockPersonality=yes", "DynamicUser=yes"]
UNITS = ("udpchat.service", "udpchat-inbox.service")


def lines_of(name: str) -> list[str]:
    """Return the lines of a file in contrib."""
    return (ROOT / "contrib" / name).read_text().splitlines()


def program_of(unit: str) -> list[str]:
    """Return the arguments with which a unit starts the program."""
    [start] = [line for line in lines_of(unit) if line.startswith("ExecStart=")]
    return start.split(" ")[1:]


@pytest.mark.parametrize("unit", UNITS)
def test_unit_files_are_hardened(unit: str) -> None:
    assert [line for line in HARDENING if line not in lines_of(unit)] == []


def test_unit_file_of_the_server_keeps_its_store_where_it_may_write() -> None:
    words = program_of("udpchat.service")
    assert words[words.index("--store") + 1] == "%S/udpchat/server.db"
    assert words[words.index("--log-file") + 1] == "%L/udpchat/server.log"
    assert {"Restart=on-failure", "StateDirectory=udpchat", "LogsDirectory=udpchat",
            "ExecReload=kill -HUP $MAINPID"} <= set(lines_of("udpchat.service"))


@pytest.mark.parametrize("unit", UNITS)
def test_unit_files_start_the_program_with_options_that_it_has(chat: Chat, unit: str) -> None:
    mode, *words = program_of(unit)
    shown = chat.complete(mode, "--help").out.data.decode()
    assert all(word in shown for word in words if word.startswith("--"))


def test_unit_of_the_inbox_appends_what_is_sent_to_it_and_remembers_whose_keys_it_has_seen(chat: Chat) -> None:
    words = [word.replace("%S", str(chat.directory)) for word in program_of("udpchat-inbox.service")]
    settings = [line.split("=", 2)[1:] for line in lines_of("udpchat-inbox.service") if line.startswith("Environment=")]
    environment = {name: value.replace("%S", str(chat.directory)) for name, value in settings}
    assert {"StandardInput=null", "StandardOutput=append:%S/udpchat-inbox/inbox.jsonl"} <= set(
        lines_of("udpchat-inbox.service"))
    inbox = chat.run(*words, stdin=subprocess.DEVNULL, environment={
        "XDG_STATE_HOME": "", "HOME": os.devnull, **environment, "UDPCHAT_SERVER": f"127.0.0.1:{chat.port}"})
    alice = chat.client("alice")
    alice.wait_for("inbox")
    alice.feed("send inbox hello\n")
    alice.see(received("inbox"))
    assert [json.loads(line)["text"] for line in inbox.lines] == ["hello"]
    inbox.signal(signal.SIGTERM)
    assert inbox.wait() == 0 and not inbox.errors


@pytest.mark.parametrize("name", UNITS)
def test_unit_files_are_such_for_systemd(tmp_path: Path, name: str) -> None:
    try:
        subprocess.run(["systemd-analyze", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no systemd-analyze on this machine")
    unit = tmp_path / name
    text = (ROOT / "contrib" / name).read_text()
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text))
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert checked.returncode == 0 and str(unit) not in checked.stderr, checked.stderr


def test_log_of_the_unit_is_rotated_and_the_server_told() -> None:
    lines = [line.strip() for line in lines_of("udpchat.logrotate")]
    assert "/var/log/udpchat/*.log {" in lines and "systemctl reload udpchat" in lines
