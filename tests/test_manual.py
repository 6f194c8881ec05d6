"""README against the program: its screens are real ones, its recipes run as they stand there, no option is left out."""
from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

import pytest

import udpchat
from tests.cast import cast
from tests.processes import ROOT, SAVED, Chat, Process, is_offline

README = (ROOT / "README.md").read_text()
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
CLOSED_PORT = 9           # of the discard protocol: nobody answers there


def section(title: str) -> str:
    """Return what stands under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str = "") -> list[str]:
    """Return the fenced blocks of a section that are in ``language``."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


REPORT, LOG, COLLECT, FILTER = blocks("For scripts", "sh")
CRONTAB, = blocks("For scripts")


def executable(path: Path, script: str) -> None:
    """Make a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Shell:
    """A directory in which blocks of README run, with the program as ``udpchat`` in PATH."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.path = chat.directory / "bin"
        self.path.mkdir()
        self._pid = chat.directory / "udpchat.pid"      # of the last one that was started
        executable(self.path / "udpchat",
                   f'echo $$ > "{self._pid}"; exec "{sys.executable}" "{ROOT / "udpchat.py"}" "$@"')

    def run(self, script: str, port: int = 0, **environment: str) -> Process:
        """Run a script in bash; the environment says where the server is."""
        changed = {"PATH": f"{self.path}:{os.environ['PATH']}", "UDPCHAT_NICK": "job",
                   "UDPCHAT_SERVER": f"127.0.0.1:{port or self.chat.port}", **environment}
        stdin = os.open(os.devnull, os.O_RDONLY)
        try:
            return self.chat.run("-c", script, stdin=stdin, command=["bash"], environment=changed)
        finally:
            os.close(stdin)

    def stop(self) -> None:
        """End the program that was started last, as a service manager does."""
        os.kill(int(self._pid.read_text()), signal.SIGTERM)

    def mail(self, nick: str) -> list[str]:
        """Return what waits for ``nick``: the senders and the texts."""
        client = self.chat.client(nick)
        assert client.finish() == 0
        found = [re.fullmatch(r"(\S+): <[\d: -]+> (.*)", line) for line in client.lines]
        return [f"{match[1]}: {match[2]}" for match in found if match is not None]


@pytest.fixture
def shell(chat: Chat) -> Shell:
    return Shell(chat)


# --- what is shown --------------------------------------------------------------------------------------------

def test_the_screens_in_readme_are_what_the_program_draws() -> None:
    alice, carol = cast()
    shown_to_alice, shown_to_carol = blocks("Two minutes, three terminals")
    assert alice == shown_to_alice
    assert carol == shown_to_carol


# --- recipes --------------------------------------------------------------------------------------------------

def crontab(text: str) -> tuple[dict[str, str], str]:
    """Return the environment, and the command of the only entry."""
    *settings, entry = text.splitlines()
    environment = dict(line.split("=", 1) for line in settings)
    command = entry.split(None, 5)[5]
    assert "%" not in command, "cron takes that for a line end"
    return environment, command


def test_the_crontab_tells_alice(shell: Shell) -> None:
    shell.chat.absent("alice")
    environment, command = crontab(CRONTAB)
    assert set(environment) == {"UDPCHAT_SERVER", "UDPCHAT_NICK"}
    job = shell.run(command, UDPCHAT_NICK=environment["UDPCHAT_NICK"])
    assert job.wait() == 0
    assert not job.lines and not job.err.data
    mail, = shell.mail("alice")
    assert re.fullmatch(r"nightly: .* /", mail)


def test_the_crontab_says_that_alice_was_not_told(shell: Shell) -> None:
    job = shell.run(crontab(CRONTAB)[1])        # the server knows no alice
    job.wait()
    assert job.lines == ["alice was not told"]


@pytest.mark.parametrize("script, told", [
    ("exit 0", "backup done"),
    ("echo first; echo \"disk 'full' \\$HOME *\" >&2; exit 3", "backup failed: disk 'full' $HOME *"),
], ids=["done", "failed"])
def test_a_job_tells_two_people_how_it_ended(shell: Shell, script: str, told: str) -> None:
    executable(shell.chat.directory / "backup", script)
    for nick in "alice", "bob":
        shell.chat.absent(nick)
    job = shell.run(REPORT)
    assert job.wait() == 0
    assert not job.lines and not job.err.data
    assert shell.mail("alice") == shell.mail("bob") == [f"job: {told}"]


def test_a_job_succeeds_if_one_of_two_people_is_told(shell: Shell) -> None:
    executable(shell.chat.directory / "backup", "exit 0")
    shell.chat.absent("bob")
    job = shell.run(REPORT)
    assert job.wait() == 0
    assert job.errors == ["[Unknown client alice.]", "alice was not told"]
    assert shell.mail("bob") == ["job: backup done"]


def test_a_job_fails_if_nobody_is_told(shell: Shell) -> None:
    executable(shell.chat.directory / "backup", "exit 0")
    job = shell.run(REPORT, port=CLOSED_PORT)
    assert job.wait() == 1
    assert [line for line in job.errors if "told" in line] == ["alice was not told", "bob was not told"]


def test_a_log_goes_line_by_line_to_bob(shell: Shell) -> None:
    directory, bob = shell.chat.directory, shell.chat.client("bob")
    log, pid = directory / "app.log", directory / "tail.pid"
    log.write_text("this was there before\n")
    executable(shell.path / "tail", f'echo $$ > "{pid}"; PATH="$OLD_PATH"; exec tail "$@"')
    job = shell.run(LOG, OLD_PATH=os.environ["PATH"])
    bob.wait_for("app-log")
    shell.chat.until(lambda: pid.exists() and pid.read_text().endswith("\n"), "tail")
    tail = int(pid.read_text())
    lines = ["  indented 'quoted' \"twice\" \\n $HOME *", "/quit", "send carol no", "", "-- the end --"]
    try:
        start_of_tail(shell, log, bob)
        with log.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        bob.see(*[f"app-log: {line}" for line in lines])
        log.rename(directory / "app.log.1")
        log.write_text("in a new file\n")
        bob.see("app-log: in a new file")
    finally:
        os.kill(tail, signal.SIGTERM)
    assert job.wait() == 0
    assert bob.events[-1] == "app-log: in a new file"
    assert "this was there before" not in "\n".join(bob.lines)


def start_of_tail(shell: Shell, log: Path, bob: Process) -> None:
    """Add lines until one comes through: from now on, tail reads."""
    def has_come() -> bool:
        with log.open("a") as file:
            file.write("is there anybody?\n")
        return "app-log: is there anybody?" in bob.lines
    shell.chat.until(has_come, "tail to read")


def test_a_collector_has_in_its_file_what_was_received_and_bobs_part_can_be_taken_out(shell: Shell) -> None:
    chat = shell.chat
    texts = ["hello", "two\nlines", "it's \"quoted\" \\ 100%", "ünïcödé"]
    bob, carol = chat.start("bob", "--json"), chat.client("carol")
    job = shell.run(COLLECT)
    carol.wait_for("archive")
    chat.until(lambda: knows_archive(bob), "bob to know archive")
    for text in texts:
        bob.feed(json.dumps({"send": "archive", "text": text}) + "\n")
    carol.feed("send archive not from bob\n")
    assert bob.finish() == carol.finish() == 0
    assert sum('"received"' in line for line in bob.lines) == len(texts)
    written = (chat.directory / "inbox.jsonl").read_text().splitlines()     # as soon as it was acknowledged
    assert sorted(json.loads(line)["text"] for line in written) == sorted([*texts, "not from bob"])
    shell.stop()
    assert job.wait() == 0
    late = shell.run("udpchat send archive while you were away", UDPCHAT_NICK="bob")
    late.wait()
    assert late.lines == [is_offline("archive"), SAVED]
    job = shell.run(COLLECT)
    inbox = chat.directory / "inbox.jsonl"
    chat.until(lambda: "while you were away" in inbox.read_text(), "mail")
    shell.stop()
    assert job.wait() == 0
    assert shell.run(FILTER).wait() == 0
    found = re.sub(r"^\d{4}-\d\d-\d\dT[\d:.]{12}Z ", "", (chat.directory / "bob.txt").read_text(), flags=re.MULTILINE)
    assert found == "".join(text + "\n" for text in [*texts, "while you were away"])


def knows_archive(client: Process) -> bool:
    """Return whether the answer to ``who`` has it, in one of the objects that came so far."""
    client.feed("who\n")
    client.chat.pump(0.02)
    return any(json.loads(line).get("nick") == "archive" for line in client.lines)


# --- options --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", sorted(udpchat.MODES))
def test_every_option_is_named_in_readme(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        udpchat.parse([mode, "--help"])
    options = set(OPTION.findall(capsys.readouterr().out)) - {"--help"}
    assert len(options) > 5
    assert sorted(options - set(OPTION.findall(README))) == []


def test_readme_names_no_option_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"--version"}
    for mode in udpchat.MODES:
        with pytest.raises(SystemExit):
            udpchat.parse([mode, "--help"])
        known |= set(OPTION.findall(capsys.readouterr().out))
    prose = re.sub(r"^```\w*\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    others = {"--seeds", "--now"}       # of the simulation and of systemctl
    assert sorted(set(OPTION.findall(prose)) - known - others) == []
