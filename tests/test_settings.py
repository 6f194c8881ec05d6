"""The command line and the file with settings: what a user may leave out, and what a mistake is answered with."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import udpchat
from loop import Usage
from tests.processes import ROOT, WELCOME, Chat, Process, received


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory in which the file with settings is looked for, in an environment that says nothing else."""
    for name in ("UDPCHAT_SERVER", "UDPCHAT_NICK", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = tmp_path / "config" / "udpchat"
    found.mkdir(parents=True)
    return found


def settings(home: Path, text: str) -> Path:
    """Write the file with settings."""
    path = home / "config"
    path.write_text(text)
    return path


def complaint(*arguments: str) -> str:
    """Return what is said of arguments that are wrong."""
    with pytest.raises(Usage) as caught:
        udpchat.parse(arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the file with settings -----------------------------------------------------------------------------------

def test_the_file_says_what_the_command_line_leaves_out(home: Path) -> None:
    settings(home, "[client]\nnick = alice\nserver = chat.example.org:5000\nquiet = yes\nack-timeout = 700\n"
                   "identity = ~/keys/mine\n\n[send]\nnick = alice-cron\ntimeout = 60\n"
                   "[server]\nstore = /var/lib/udpchat.db\nmax-clients = 5\n")
    client = udpchat.parse(["client"])
    assert (client.nick, client.server, client.quiet) == ("alice", ("chat.example.org", 5000), True)
    assert (client.ack_timeout, client.identity, client.json) == (700, f"{home.parent.parent}/keys/mine", False)
    send = udpchat.parse(["send", "bob", "hello"])
    assert (send.nick, send.timeout, send.server, send.nicks, send.text) == ("alice-cron", 60, None, ["bob"], ["hello"])
    server = udpchat.parse(["server"])
    assert (server.store, server.max_clients, server.port) == ("/var/lib/udpchat.db", 5, 4119)


@pytest.mark.parametrize("word", ["bob,", ",bob", "bob,,carol", ","])
def test_a_comma_without_a_nick_beside_it_is_named(home: Path, word: str) -> None:
    assert "a nick is missing beside a comma" in complaint("send", word, "hi")


def test_options_may_stand_anywhere_among_the_arguments(home: Path) -> None:
    words = ["bob", "localhost", "7", "8"]
    for place in range(len(words) + 1):
        for option in (["--json"], ["--ack-timeout", "900"], ["--json", "--stay"]):
            options = udpchat.parse(["client", *words[:place], *option, *words[place:]])
            assert [options.own_nick, options.server_host, options.server_port, options.client_port] == [
                "bob", "localhost", 7, 8]
            assert options.json is ("--json" in option) and options.mode == "client"
    assert "unrecognized arguments: 9" in complaint("client", *words, "--json", "9")


def test_arguments_win_over_the_environment_and_that_over_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings(home, "[client]\nnick = file\nserver = from.the.file\ncolor = always\n")

    def found(*arguments: str) -> tuple[str, str]:
        options = udpchat.parse(["client", *arguments])
        return udpchat.own_nick(options), udpchat.server_of(options)[0]
    assert found() == ("file", "from.the.file")
    monkeypatch.setenv("UDPCHAT_NICK", "environment")
    monkeypatch.setenv("UDPCHAT_SERVER", "from.the.environment")
    assert found() == ("environment", "from.the.environment")
    assert found("-n", "argument", "--server", "an.argument") == ("argument", "an.argument")
    assert found("argument", "an.argument") == ("argument", "an.argument")
    assert udpchat.parse(["client"]).color == "always"
    monkeypatch.setenv("NO_COLOR", "1")
    assert udpchat.parse(["client"]).color == "auto"
    assert udpchat.parse(["client", "--color", "always"]).color == "always"


def test_another_file_can_be_named_and_no_file_is_fine(home: Path, tmp_path: Path) -> None:
    assert udpchat.parse(["client"]).nick is None
    settings(home, "[client]\nnick = alice\n")
    other = tmp_path / "other"
    other.write_text("[client]\nnick = bob\n")
    assert udpchat.parse(["client", "--config", str(other)]).nick == "bob"
    assert udpchat.parse(["client", "--config", os.devnull]).nick is None
    assert complaint("client", "--config", str(tmp_path / "missing")).startswith("cannot read ")


def test_switches_are_yes_or_no(home: Path) -> None:
    for word, wanted in (("yes", True), ("On", True), ("1", True), ("no", False), ("off", False)):
        settings(home, f"[client]\nstay = {word}\n")
        assert udpchat.parse(["client"]).stay is wanted
    for line, time in (("no-time = yes", False), ("time = no", False), ("time = yes", True), ("no-time = no", None)):
        settings(home, f"[client]\n{line}\n")
        assert udpchat.parse(["client"]).time is time


def test_the_file_may_come_from_any_editor(home: Path) -> None:
    (home / "config").write_bytes("\ufeff# mine\r\n[client]\r\n  nick = zo\u00eb\r\n; the rest\r\n".encode())
    assert udpchat.parse(["client"]).nick == "zo\u00eb"


@pytest.mark.parametrize("text, line, about", [
    ("[client]\nnick = alice\ncolour = never\n", 3, "colour"),
    ("[client]\nack_timeout = 5\n", 2, "ack_timeout"),
    ("[client]\n\nnick = two words\n", 3, "two words"),
    ("[client]\nack-timeout = soon\n", 2, "soon"),
    ("[client]\ncolor = blue\n", 2, "blue"),
    ("[client]\nquiet = perhaps\n", 2, "perhaps"),
    ("[client]\nserver = host:99999\n", 2, "99999"),
    ("[client]\nnick =\n", 2, "nick"),
    ("[client]\nconfig = /etc/other\n", 2, "config"),
    ("[clients]\nnick = alice\n", 1, "[clients]"),
    ("[send]\n[server]\n[DEFAULT]\nnick = alice\n", 3, "[DEFAULT]"),
    ("nick = alice\n", 1, "section"),
    ("[client]\nnick alice\n", 2, "key = value"),
    ("[client]\nnick = alice\nnick = bob\n", 3, "before"),
    ("[client]\n[client]\n", 2, "before"),
])
def test_a_mistake_in_the_file_is_one_line_with_its_place(home: Path, text: str, line: int, about: str) -> None:
    path = settings(home, text)
    said = complaint("client")
    assert said.startswith(f"{path}:{line}: ") and about in said


def test_a_file_that_cannot_be_read_or_is_too_long_is_one_line(home: Path) -> None:
    path = settings(home, "[client]\n" + "#" * 70000)
    assert complaint("client").startswith(f"{path} is longer than ")
    path.unlink()
    path.mkdir()
    assert complaint("client") == f"cannot read {path}: Is a directory"


def test_the_file_of_a_user_without_a_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "no/home")
    monkeypatch.setenv("XDG_CONFIG_HOME", "nor/this")
    assert udpchat.config_path() is None
    assert udpchat.parse(["client"]).nick is None


def test_a_mistake_in_the_file_ends_the_program_with_2(chat: Chat) -> None:
    folder = chat.directory / "config" / "udpchat"
    folder.mkdir(parents=True)
    (folder / "config").write_text("[client]\nnick = two words\n")
    client = chat.complete("client")
    assert client.wait() == 2 and len(client.errors) == 1 and "config:2: nick: " in client.errors[0]
    assert str(folder / "config") in re.sub(r"\s", "", chat.complete("client", "--help").out.data.decode())


# --- the command line -----------------------------------------------------------------------------------------

def test_a_client_finds_its_server_in_one_word(chat: Chat) -> None:
    bob = chat.run("client", "bob", f"localhost:{chat.port}")
    bob.see(WELCOME)
    alice = chat.run("client", "-q", "--nick", "alice", "--server", f"127.0.0.1:{chat.port}")
    bob.wait_for("alice")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert (alice.finish(), bob.finish()) == (0, 0)
    sent = chat.complete("send", "-n", "carol", "-t", "30", "--server", f"127.0.0.1:{chat.port}", "bob", "late")
    assert sent.wait() == 0 and received("bob") not in sent.lines


@pytest.mark.parametrize("arguments", [["alice", "-n", "bob"], ["alice", "host", "--server", "host"]], ids=repr)
def test_what_is_said_twice_is_refused(home: Path, arguments: list[str]) -> None:
    assert "not both" in complaint("client", *arguments)


@pytest.mark.parametrize("name, value", [("UDPCHAT_SERVER", "h:99999"), ("UDPCHAT_NICK", "two words")])
def test_a_complaint_about_the_environment_names_the_variable(chat: Chat, name: str, value: str) -> None:
    client = chat.complete("client", environment={name: value})
    assert client.wait() == 2
    assert len(client.errors) == 1 and client.errors[0].startswith(f"udpchat: {name}: ")


def test_without_arguments_the_modes_are_shown_on_stderr(chat: Chat) -> None:
    shown = chat.complete()
    assert shown.wait() == 2 and not shown.out.data
    assert all(mode in shown.err.data.decode() for mode in udpchat.MODES)


@pytest.mark.parametrize("words, about", [(["help"], "MODE"), (["help", "send"], "--timeout"), (["-V"], "udpchat 1.")])
def test_help_and_the_version_are_on_stdout(chat: Chat, words: list[str], about: str) -> None:
    shown = chat.complete(*words)
    assert shown.wait() == 0 and not shown.err.data
    assert about in shown.out.data.decode()


def test_a_mode_that_is_none_is_answered_with_those_there_are(home: Path) -> None:
    said = complaint("gil")
    assert "'gil'" in said and all(mode in said for mode in udpchat.MODES)


def test_where_msgpack_is_missing_one_line_says_so() -> None:
    program = [sys.executable, "-S", str(ROOT / "udpchat.py"), "server"]       # -S: no site-packages
    ended = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == "udpchat: the package msgpack is missing: pip install msgpack\n"


def test_a_server_takes_its_settings_from_the_file(chat: Chat) -> None:
    path = chat.directory / "settings"
    path.write_text(f"[server]\nhost = 127.0.0.1\nstore = {chat.store}\n")
    server: Process = chat.run("server", "0", "--config", str(path))
    server.see_match(r"\[Server listening on 127\.0\.0\.1:\d+\]")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0 and chat.store.exists()
