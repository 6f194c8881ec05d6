"""The pages against the program: screens are real ones, recipes run as they stand there, no option is left out."""
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
from home import EVENT_FORMATS
from tests.cast import PICTURE, cast, picture, text_of
from tests.pages import PAGES, block, blocks, prose, section
from tests.processes import ROOT, SAVED, Chat, Process, is_offline

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FOR_USERS = ("README.md", "terminal.md", "scripting.md", "server.md", "security.md")
OF_OTHERS = {"--seed", "--seeds", "--start", "--trace", "--now", "--strict"}    # of the simulation, systemctl, mypy
CLOSED_PORT = 9           # of the discard protocol: nobody answers there


CRONTAB = blocks("scripting.md", "One message")[0]
REPORT = block("scripting.md", "A job that tells two people how it ended", "sh")
LOG = block("scripting.md", "Follow a log", "sh")
COLLECT, FILTER = blocks("scripting.md", "Collect messages", "sh")
WAIT = block("scripting.md", "Wait for one message", "sh")
FETCH = block("scripting.md", "Fetch mail and end", "sh")
ONLINE = block("scripting.md", "Who is online", "sh")
SEND_FILE, TAKE_FILE = blocks("scripting.md", "Send a file", "sh")


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
    assert PICTURE.read_text() == picture(alice)
    assert block("README.md", "Two minutes, three terminals") == text_of(carol)


def test_readme_can_be_read_in_five_minutes() -> None:
    assert PAGES["README.md"].count("\n") <= 150
    assert len(section("README.md", "Limits").strip().splitlines()) == 5
    assert len(re.findall(r"(?m)^- ", section("README.md", "Security"))) == 5


def test_what_readme_shows_of_scripts_is_what_the_page_for_scripts_says() -> None:
    assert block("README.md", "From a script") == CRONTAB
    assert block("README.md", "From a script", "sh") == LOG
    assert block("README.md", "From a script", "python") == block("scripting.md", "A bot", "python")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_and_headings_that_are_there(page: str) -> None:
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else folder / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", prose(file.name))
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


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
    assert "--timeout 60" in REPORT
    job = shell.run(REPORT.replace("--timeout 60", "--timeout 3"), port=CLOSED_PORT)     # it waits so long for each
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


def test_one_message_is_waited_for(shell: Shell) -> None:
    job = shell.run(WAIT)
    alice = shell.chat.client("alice")
    alice.wait_for("waiter")
    alice.feed("send waiter it is done\nsend waiter this as well\n")
    assert job.wait() == 0
    assert job.lines == ["alice: it is done"]


def test_mail_is_fetched_and_the_client_ends(shell: Shell) -> None:
    shell.chat.absent("alice")
    assert shell.run("udpchat send --quiet alice for later", UDPCHAT_NICK="bob").wait() == 0
    job = shell.run(FETCH)
    assert job.wait() == 0
    mail, = job.lines
    assert re.fullmatch(r"bob: <[\d: -]+> for later", mail)


def test_a_script_learns_who_is_online(shell: Shell) -> None:
    shell.chat.absent("carol")
    shell.chat.clients("alice", "bob")
    job = shell.run(ONLINE)
    assert job.wait() == 0
    assert job.lines == ["alice", "bob"]


@pytest.mark.parametrize("was_away", [False, True], ids=["online", "away"])
def test_a_file_is_sent_and_taken(shell: Shell, was_away: bool) -> None:
    directory = shell.chat.directory
    photo = os.urandom(200_000)
    (directory / "photo.jpg").write_bytes(photo)
    (directory / "bobs").mkdir()
    take = f"cd bobs; {TAKE_FILE}"
    if was_away:
        shell.chat.absent("bob")
    else:
        taker = shell.run(take)
        shell.chat.client("carol").wait_for("bob")
    assert shell.run(SEND_FILE).wait() == 0
    if was_away:
        taker = shell.run(take)
    assert taker.wait() == 0
    assert (directory / "bobs" / "photo.jpg").read_bytes() == photo


def test_a_job_has_a_nick_beside_ones_own(shell: Shell) -> None:
    own, = re.findall(r"(?m)^UDPCHAT_NICK=(alice-.+)$", "".join(blocks("scripting.md", "One message")))
    alice = shell.chat.client("alice")
    bob = shell.chat.client("bob")
    assert shell.run("udpchat send --quiet bob done", UDPCHAT_NICK=own).wait() == 0
    bob.see(f"{own}: done")
    assert alice.popen.poll() is None


# --- options --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", sorted(udpchat.MODES))
def test_every_option_is_named_in_the_pages(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        udpchat.parse([mode, "--help"])
    options = set(OPTION.findall(capsys.readouterr().out)) - {"--help"}
    assert len(options) > 5
    assert sorted(options - set(OPTION.findall("".join(PAGES[page] for page in FOR_USERS)))) == []


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"CHANGELOG.md"}))    # it names those of the past, too
def test_a_page_names_no_option_that_is_not_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"--version", "--help"}
    for mode in udpchat.MODES:
        with pytest.raises(SystemExit):
            udpchat.parse([mode, "--help"])
        known |= set(OPTION.findall(capsys.readouterr().out))
    assert sorted(set(OPTION.findall(prose(page))) - known - OF_OTHERS) == []


def test_every_line_of_the_program_is_in_the_page_for_scripts() -> None:
    lines = {form.line for form in EVENT_FORMATS.values() if form.line}
    assert len(lines) > 20
    page = PAGES["scripting.md"]
    for line in lines:
        assert re.search(r"`" + re.sub(r"\\\{\w+\\\}", "[^`]+", re.escape(line)) + "`", page), line
