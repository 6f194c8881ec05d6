"""Standard streams of every kind, readers that stall or go away, processes that are stopped or killed."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import termios
from pathlib import Path

import pytest

from client import Client
from loop import Endpoint, Output
from terminal import Display
from tests.processes import (DEADLINE, EXITING, MAIL_NOTICE, NO_BYTECODE, OFFLINE, PROGRAM, ROOT, SAVED, UPDATED,
                             WELCOME, Chat, Process, is_offline, no_ack, received, sends)
from tests.test_operation import StoppedLoop

STALL = 30.0              # s without progress after which messages go to the server
MEMORY = 10 * 2 ** 20     # bytes; more than all that may be queued anywhere, less than what is piped in
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc on this machine")


SHOWN = re.compile(r"alice: (?:<\d+-\d+-\d+ \d+:\d+:\d+> )?(.*)")


def texts_of(lines: list[str]) -> list[str]:
    """Return the messages of alice among ``lines``, whichever way they came."""
    return [match.group(1) for match in map(SHOWN.fullmatch, lines) if match is not None]


def numbered(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def real_text(lines: int) -> list[str]:
    """Return lines that people wrote: sources of the standard library that have no control characters."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", text) is None:
            found += text.split("\n")
        if len(found) >= lines:
            return found[:lines]
    raise AssertionError("there is too little text on this machine")


# --- a reader that stalls -------------------------------------------------------------------------------------

@pytest.mark.storm        # half a minute; in the simulated world the same is a matter of milliseconds
def test_messages_for_a_reader_that_stalls_for_good_go_to_the_server(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    bob.out.paused = True
    texts = [f"text {number} {'x' * 500}" for number in range(1000)]
    alice.feed(sends("bob", texts))
    chat.until(lambda: no_ack("bob") in alice.lines, "the messages to go to the server", STALL + DEADLINE)
    assert alice.finish() == 0
    direct, relayed = alice.lines.count(received("bob")), alice.lines.count(SAVED)
    assert direct + relayed == len(texts) and alice.lines.count(no_ack("bob")) >= relayed > 0
    bob.out.paused = False
    chat.until(lambda: len(texts_of(bob.lines)) == len(texts), "the messages to be shown")
    assert bob.finish() == 0
    assert texts_of(bob.lines) == texts


@needs_proc
def test_stalled_reader_makes_the_sender_wait_in_flat_memory_and_nothing_is_lost(chat: Chat) -> None:
    script, texts = chat.directory / "script", [f"{number} {'x' * 1500}" for number in range(12000)]
    script.write_text(sends("bob", texts))
    bob = chat.client("bob")
    bob.out.paused = True
    before = bob.memory()
    with script.open("rb") as file:
        alice = chat.client("alice", stdin=file.fileno())

    def has_stalled() -> bool:
        count = len(alice.out.data)
        chat.rest(1.0)
        return len(alice.out.data) == count
    chat.until(has_stalled, "the sender to wait")
    assert alice.lines.count(received("bob")) < len(texts) // 2
    assert alice.memory() - before < MEMORY and bob.memory() - before < MEMORY
    bob.out.paused = False
    assert alice.wait() == 0
    assert alice.events == [WELCOME] + [received("bob")] * len(texts) + [OFFLINE]
    assert bob.finish() == 0
    assert bob.events == [WELCOME] + [f"alice: {text}" for text in texts] + [OFFLINE]


def test_receipt_means_that_the_message_was_written(chat: Chat) -> None:
    """More than a pipe holds, to a reader that stalls: what is receipted can be read even after a SIGKILL."""
    bob, alice = chat.clients("bob", "alice")
    bob.out.paused = True
    texts = [f"text {number} {'x' * 200}" for number in range(3000)]
    alice.feed(sends("bob", texts))
    alice.see(received("bob"))
    chat.rest(1.0)
    bob.kill()
    receipts = alice.lines.count(received("bob"))
    bob.out.paused = False
    chat.until(lambda: bob.out.fd is None, "the end of the pipe")
    assert 0 < receipts <= len(texts_of(bob.lines))
    chat.until(lambda: alice.lines.count(SAVED) + alice.lines.count(received("bob")) == len(texts), "all to be closed")
    again = chat.client("bob")
    assert again.finish() == 0
    direct = alice.lines.count(received("bob"))
    assert texts_of(bob.lines)[:direct] + texts_of(again.lines) == texts


def full_pipe() -> tuple[int, int]:
    """Return the two ends of a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


@pytest.mark.parametrize("phase", ["joining", "registered", "failed"])
def test_signal_ends_a_client_whose_output_is_stalled(chat: Chat, phase: str) -> None:
    reader, writer = full_pipe()
    bob = chat.client("bob")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(DEADLINE)
        alice = chat.start("alice", port=None if phase == "registered" else silent.getsockname()[1], stdout=writer)
        if phase == "registered":
            bob.wait_for("alice")
        for _ in range({"joining": 1, "registered": 0, "failed": 5}[phase]):
            silent.recv(2000)
        chat.rest(1.0 if phase == "failed" else 0.0)
        alice.signal(signal.SIGTERM)
        alice.wait()
    os.close(reader)
    os.close(writer)
    if phase == "registered":
        bob.wait_for("alice", "offline")


def test_terminal_that_is_stopped_with_control_s_holds_the_sender_and_loses_nothing(chat: Chat) -> None:
    bob = chat.run_on_terminal("client", "bob", "127.0.0.1", str(chat.port), "--no-time", "--color=never")
    chat.until(lambda: b">>> " in bob.out.data, "the prompt")
    alice = chat.client("alice")
    bob.feed("\x13")
    chat.rest(0.2)
    alice.feed("send bob one\nsend bob two\n")
    chat.rest(1.0)
    assert no_ack("bob") not in alice.lines and received("bob") not in alice.lines
    bob.feed("\x11")
    alice.see(received("bob"), received("bob"))
    chat.until(lambda: b"alice: one\r\nalice: two\r\n" in bob.out.data, "both messages on the terminal")
    assert alice.finish() == 0


# --- standard input -------------------------------------------------------------------------------------------

def closed(redirection: str) -> list[str]:
    """Start the program with a standard stream that is closed."""
    return ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM]


@pytest.mark.parametrize("kind", ["pipe", "fifo", "file", "socket"])
def test_commands_are_read_from_any_kind_of_input(chat: Chat, kind: str) -> None:
    commands = b"send bob one\nsend bob two"
    path = chat.directory / "input"
    bob = chat.client("bob")
    if kind == "pipe":
        ours, theirs = os.pipe()[::-1]
    elif kind == "fifo":
        os.mkfifo(path)
        ours = os.open(path, os.O_RDWR)
        theirs = os.open(path, os.O_RDONLY)
    elif kind == "file":
        path.write_bytes(commands)
        ours, theirs = os.open(os.devnull, os.O_WRONLY), os.open(path, os.O_RDONLY)
    else:
        ours, theirs = (end.detach() for end in socket.socketpair())
    alice = chat.start("alice", stdin=theirs)
    os.close(theirs)
    os.write(ours, commands)
    os.close(ours)
    assert alice.wait() == 0
    assert alice.events == [WELCOME, received("bob"), received("bob"), OFFLINE]
    bob.see("alice: one", "alice: two")


def test_fifo_can_be_written_by_one_after_another_while_somebody_holds_it(chat: Chat) -> None:
    path = chat.directory / "input"
    os.mkfifo(path)
    bob = chat.client("bob")
    holder = os.open(path, os.O_RDWR)
    with open(path, "rb") as theirs:
        alice = chat.client("alice", stdin=theirs.fileno())
    for text in ("one", "two"):
        path.write_text(f"send bob {text}\n")
        bob.see(f"alice: {text}")
    os.close(holder)
    assert alice.wait() == 0


def test_input_from_nowhere_is_at_its_end(chat: Chat) -> None:
    for client in (chat.start("alice", stdin=subprocess.DEVNULL),
                   chat.run("client", "bob", "127.0.0.1", str(chat.port), command=closed("<&-"))):
        assert client.wait() == 0
        assert client.events == [WELCOME, OFFLINE] and not client.err.data


def test_input_from_nowhere_does_not_end_a_client_that_stays(chat: Chat) -> None:
    bob = chat.run("client", "bob", "127.0.0.1", str(chat.port), "--stay", command=closed("<&-"))
    bob.see(WELCOME)
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    assert alice.finish() == 0


# --- standard output ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_output_goes_to_any_kind_of_file(chat: Chat, kind: str) -> None:
    path = chat.directory / "output"
    if kind == "pipe":
        ours, theirs = os.pipe()
    elif kind == "file":
        theirs = os.open(path, os.O_WRONLY | os.O_CREAT)
        ours = os.open(path, os.O_RDONLY)
    else:
        ours, theirs = (end.detach() for end in socket.socketpair())
    alice = chat.start("alice", stdout=theirs)
    os.close(theirs)
    alice.feed(sends("alice", numbered(50)))
    assert alice.finish() == 0
    shown = bytearray()
    while True:
        data = os.read(ours, 65536)
        if not data:
            break
        shown += data
    os.close(ours)
    lines = shown.decode().split("\n")
    assert lines[0] == WELCOME and lines[-2:] == [OFFLINE, ""]
    assert texts_of(lines) == numbered(50) and lines.count(received("alice")) == 50


def test_output_is_appended_where_the_shell_appends(chat: Chat) -> None:
    path = chat.directory / "output"
    path.write_text("before\n")
    for _ in range(2):
        with path.open("ab") as file:
            assert chat.start("alice", stdout=file.fileno()).finish() == 0
    lines = [line for line in path.read_text().split("\n") if line != UPDATED]
    assert lines == ["before", WELCOME, OFFLINE, WELCOME, OFFLINE, ""]


def test_output_to_nowhere_is_written(chat: Chat) -> None:
    bob = chat.start("bob", stdout=subprocess.DEVNULL)
    alice = chat.client("alice")
    alice.wait_for("bob")
    alice.feed("send bob hello\n")
    alice.see(received("bob"))
    assert (alice.finish(), bob.finish()) == (0, 0)


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
NO_SPACE = "udpchat: cannot write to stdout: No space left on device"


@pytest.mark.parametrize("redirection,complaints", [
    (">&-", ["udpchat: cannot write to stdout: Bad file descriptor"]), (">&- 2>&-", []),
    pytest.param(">/dev/full", [NO_SPACE], marks=needs_full),
    pytest.param(">/dev/full 2>/dev/full", [], marks=needs_full)])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["lines", "JSON"])
def test_output_that_cannot_be_written_is_named_and_ends_the_client_with_1(
        chat: Chat, options: list[str], redirection: str, complaints: list[str]) -> None:
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), "--stay", *options, command=closed(redirection))
    assert alice.wait() == 1
    assert alice.errors == complaints
    assert chat.client("alice").finish() == 0


@needs_full
def test_send_whose_receipt_cannot_be_written_ends_with_1(chat: Chat) -> None:
    bob = chat.client("bob")
    arguments = ["send", "bob", "hello", "--server", f"127.0.0.1:{chat.port}", "--nick", "alice"]
    alice = chat.run(*arguments, command=closed(">/dev/full"))
    assert alice.wait() == 1 and alice.errors == [NO_SPACE]
    bob.see("alice: hello")
    assert chat.run(*arguments, "--quiet", command=closed(">/dev/full")).wait() == 0


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"),
                                   reason="only Linux changes the limits of another process")


def limit_files(process: Process, size: int) -> None:
    """Let no file of a process grow beyond ``size`` bytes, as on a full disk (-1: there is room again)."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def client_with_a_full_disk(chat: Chat, path: Path) -> Process:
    """Start alice, who writes to ``path``; only a part of another line has room there."""
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), command=closed(f">> {path}"),
                     environment=NO_BYTECODE)
    chat.until(lambda: path.exists() and UPDATED in path.read_text(), "the client to be online")
    limit_files(alice, path.stat().st_size + 3)
    return alice


@needs_prlimit
def test_last_line_that_cannot_be_written_makes_the_exit_code_1(chat: Chat) -> None:
    path = chat.directory / "output"
    alice = client_with_a_full_disk(chat, path)
    before = path.read_bytes()
    assert alice.finish() == 1
    assert alice.errors == ["udpchat: cannot write to stdout: File too large"] and path.read_bytes() == before


@needs_prlimit
def test_every_line_is_carried_out_or_handed_back_when_the_output_cannot_be_written(chat: Chat) -> None:
    bob = chat.client("bob")
    alice = client_with_a_full_disk(chat, chat.directory / "output")
    texts = numbered(5000)
    alice.feed(sends("bob", texts))
    chat.until(lambda: alice.popen.poll() is not None, "the end of the client")
    assert alice.wait() == 1
    assert bob.finish() == 0
    errors = [line for line in alice.errors if "is not remembered: File too large" not in line]     # another file
    assert errors[0] == "udpchat: cannot write to stdout: File too large"
    handed_back = [line.removeprefix("send bob ") for line in alice.errors if line.startswith("send bob ")]
    accounted = {*texts_of(bob.lines), *handed_back}
    assert accounted and accounted == set(texts[:len(accounted)]), "what was not read is not handed back"


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EPIPE])
def test_client_that_ends_at_once_notices_that_its_last_lines_cannot_be_written(reason: int) -> None:
    shown, errors = bytearray(), bytearray()

    def put(data: bytes) -> int:
        if shown:
            raise OSError(reason, os.strerror(reason))
        shown.extend(data[:4])
        return 4

    def put_error(data: bytes) -> int:
        errors.extend(data)
        return len(data)
    display = Display(Output(put), Output(put_error))
    loop = StoppedLoop(0.0)
    client = Client(loop, lambda *_: None, display, "alice", Endpoint(loop, [("127.0.0.1", 9)]))
    client.start()
    display.write(b"one\ntwo\n")
    for _ in range(2):
        client.leaving.interrupt()
    assert client.leaving.exit_code == 1
    assert errors.decode().splitlines() == ([NO_SPACE] if reason == errno.ENOSPC else [])


FAULTY_CLOSE = """\
import errno, os, sys
import udpchat

def copy(fd, work=os.dup):
    if fd == 1:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    return work(fd)

os.dup = copy
sys.exit(udpchat.main())
"""


def test_file_system_that_loses_what_was_written_says_so_at_the_end(chat: Chat) -> None:
    chat.server()
    with (chat.directory / "output").open("wb") as file:
        alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), stdout=file.fileno(),
                         command=[sys.executable, "-c", FAULTY_CLOSE], environment={"PYTHONPATH": str(ROOT)})
    assert alice.finish() == 1
    assert alice.errors == [f"udpchat: cannot write to stdout: {os.strerror(errno.EDQUOT)}"]


def test_terminal_that_hangs_up_is_a_reader_that_goes_away(chat: Chat) -> None:
    master, slave = os.openpty()
    alice = chat.start("alice", "--stay", stdin=subprocess.DEVNULL, stdout=slave)
    os.close(slave)
    assert os.read(master, 1)
    os.close(master)
    bob = chat.client("bob")
    bob.feed("send alice hello\n")
    assert alice.wait() == 1 and not alice.err.data
    bob.see(SAVED)


@needs_prlimit
def test_log_of_a_server_on_a_full_disk_goes_on_when_there_is_room_again(chat: Chat) -> None:
    path = chat.directory / "log"
    server = chat.run("server", "0", "--host", "127.0.0.1", "--store", ":memory:", "--log-level", "info",
                      command=closed(f"2>> {path}"), environment=NO_BYTECODE)
    port = int(server.see_match(r"\[Server listening on .*:(\d+)\]").group(1))
    limit_files(server, path.stat().st_size + 20)
    assert chat.client("alice", port=port).finish() == 0
    limit_files(server, -1)
    assert chat.client("bob", port=port).finish() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    lines = path.read_text().split("\n")
    assert lines.pop() == "" and all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in lines)
    assert [nick for line in lines for nick in re.findall(r"INFO (alice|bob) .*", line)][:1] == ["alice"]


# --- a disk that is full, and has room again ------------------------------------------------------------------

def messages_in(lines: list[str], form: str) -> list[str]:
    """Return the messages of alice in a file of bob's. Fail if a line cannot be read."""
    if form == "JSON":
        events = [json.loads(line) for line in lines]
        return [event["text"] for event in events if event["type"] == "message" and event["from"] == "alice"]
    for line in lines:
        assert SHOWN.fullmatch(line) or line in (WELCOME, UPDATED, MAIL_NOTICE, OFFLINE), line
    return texts_of(lines)


FORMS = pytest.mark.parametrize("form", ["lines", "JSON"])


def of_all_sizes(count: int) -> list[str]:
    return [f"text {number} {'x' * (number * 37 % 200)}" for number in range(count)]


@FORMS
@pytest.mark.parametrize("redirection", [">>", ">"])
def test_file_that_may_not_grow_gets_whole_messages_and_those_that_are_missing_later(chat: Chat, form: str,
                                                                                     redirection: str) -> None:
    texts, path = of_all_sizes(400), chat.directory / "output"
    options = ["client", "bob", "127.0.0.1", str(chat.port), *["--json"] * (form == "JSON")]
    shown: list[str] = []

    def start(limit: str, *more: str) -> Process:
        script = f'ulimit -f {limit}; exec "$@" {redirection} {path}'
        return chat.run(*options, *more, command=["sh", "-c", script, "sh", *PROGRAM], environment=NO_BYTECODE)

    def keep() -> None:
        lines = path.read_text().split("\n")
        assert lines.pop() == "", "the file ends with a line end"
        if redirection == ">":
            shown.extend(lines)
        else:
            shown[:] = lines
    bob, alice = start("16", "--stay"), chat.client("alice")
    alice.wait_for("bob")
    alice.feed(sends("bob", texts))
    for limit in ("32", "48"):
        assert bob.wait() == 1
        assert bob.errors == ["udpchat: cannot write to stdout: File too large"]
        keep()
        bob = start(limit, "--stay")
    assert bob.wait() == 1
    keep()
    assert alice.finish() == 0
    assert start("unlimited").finish() == 0
    keep()
    assert messages_in(shown, form) == texts


IN_A_SMALL_FILE_SYSTEM = """\
mount -t tmpfs -o size=256k none "$0" || exit 77
cd "$0" && head -c 232000 /dev/zero > ballast && printf 'a line that somebody left without an end' > output || exit 77
"$@" --stay >> output; echo "ended $?" >&2
"$@" >> output; echo "ended $?" >&2
rm ballast
"$@" >> output; echo "ended $?" >&2
cat output
"""


@FORMS
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no mount namespaces on this machine")
def test_full_file_system_gets_whole_messages_and_the_rest_when_there_is_room_again(chat: Chat, form: str) -> None:
    chat.absent("bob")
    texts, disk = of_all_sizes(400), chat.directory / "disk"
    alice = chat.client("alice")
    alice.feed(sends("bob", texts))
    assert alice.finish() == 0
    disk.mkdir()
    own = "-m" if os.geteuid() == 0 else "-rm"
    bob = chat.run("client", "bob", "127.0.0.1", str(chat.port), *["--json"] * (form == "JSON"),
                   stdin=subprocess.DEVNULL,
                   command=["unshare", own, "sh", "-c", IN_A_SMALL_FILE_SYSTEM, str(disk), *PROGRAM])
    code = bob.wait()
    if not bob.errors or not bob.errors[-1].startswith("ended"):
        pytest.skip(f"no file system may be mounted here (exit {code})")
    assert bob.errors == [NO_SPACE, "ended 1"] * 2 + ["ended 0"]
    assert bob.lines[0] == "a line that somebody left without an end" and bob.out.data.endswith(b"\n")
    assert messages_in(bob.lines[1:], form) == texts


def test_closed_error_output_changes_nothing(chat: Chat) -> None:
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), command=closed("2>&-"))
    alice.feed("send nobody hello\n")
    assert alice.finish() == 1
    assert alice.events == [WELCOME, "[Unknown client nobody.]", OFFLINE]


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "<&- >&- 2>&-",
                                         pytest.param(">/dev/full 2>/dev/full", marks=needs_full)])
def test_server_runs_with_closed_or_full_streams(chat: Chat, redirection: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = chat.run("server", str(port), "--host", "127.0.0.1", "--store", ":memory:", command=closed(redirection))
    alice = chat.client("alice", port=port)
    assert alice.finish() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_reader_that_goes_away_ends_the_client_with_1_and_nothing_is_lost(chat: Chat) -> None:
    reader, writer = os.pipe()
    bob = chat.start("bob", stdout=writer)
    os.close(writer)
    first = subprocess.run(["head", "-n", "1"], stdin=reader, stdout=subprocess.PIPE, timeout=DEADLINE, check=True)
    os.close(reader)
    assert first.stdout.decode() == WELCOME + "\n"
    alice = chat.client("alice")
    alice.feed("send bob hello\n")
    assert bob.wait() == 1
    alice.see(SAVED)
    assert alice.finish() == 0
    again = chat.client("bob")
    assert again.finish() == 0
    assert texts_of(again.lines) == ["hello"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a writer at once that its reader is gone")
def test_reader_that_goes_away_is_noticed_before_there_is_anything_to_write(chat: Chat) -> None:
    bob = chat.client("bob")
    bob.roster()
    bob.out.close()
    assert bob.wait() == 1


def test_reader_that_goes_away_early_ends_a_script_with_1(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.out.close()
    alice.feed("who\n" * 5000)
    assert alice.finish() == 1
    assert not alice.err.data


# --- what other processes share -------------------------------------------------------------------------------

def is_blocking(fd: int) -> bool:
    return not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("kind", ["pipes", "socket", "terminal"])
def test_descriptors_that_others_share_stay_blocking(chat: Chat, kind: str) -> None:
    if kind == "pipes":
        inner, outer = os.pipe(), os.pipe()
        theirs, ours = [inner[0], outer[1]], [inner[1], outer[0]]
    elif kind == "socket":
        a, b = (end.detach() for end in socket.socketpair())
        theirs, ours = [a, a], [b, b]
    else:
        master, slave = os.openpty()
        theirs, ours = [slave, slave], [master, master]
    bob = chat.client("bob")
    settings = termios.tcgetattr(theirs[0]) if kind == "terminal" else []
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), stdin=theirs[0], stdout=theirs[1],
                     stderr=theirs[1])
    os.write(ours[0], b"send bob hello\n")
    bob.see("alice: hello")
    assert all(map(is_blocking, theirs))
    os.write(ours[0], b"quit\n")
    assert alice.wait() == 0
    assert all(map(is_blocking, theirs))
    if kind == "terminal":
        assert termios.tcgetattr(theirs[0]) == settings
    assert OFFLINE.encode() in os.read(ours[1], 65536)
    for fd in {*theirs, *ours}:
        os.close(fd)


# --- a lot of text --------------------------------------------------------------------------------------------

def test_ten_thousand_lines_of_text_arrive_byte_for_byte(chat: Chat) -> None:
    texts = real_text(10000)
    bob, alice = chat.clients("bob", "alice")
    alice.feed(sends("bob", texts))
    assert alice.finish() == 0
    assert bob.finish() == 0
    shown = "".join(f"{line}\n" for line in bob.events[1:-1]).encode()
    assert shown == "".join(f"alice: {text}\n" for text in texts).encode()
    assert alice.events == [WELCOME] + [received("bob")] * len(texts) + [OFFLINE]


def test_everybody_sends_to_everybody_at_once(chat: Chat) -> None:
    nicks = ["x", "y", "z"]
    clients = chat.clients(*nicks)
    for client in clients:
        client.wait_for("z")
    for client in clients:
        client.feed("".join(f"send {nick} text {number}\n" for number in range(500) for nick in nicks))
    for client in clients:
        for nick in nicks:
            chat.until(lambda: client.lines.count(received(nick)) == 500, f"the receipts of {nick} for {client}")
    for client in clients:
        assert client.finish() == 0
        for nick in nicks:
            shown = [line for line in client.lines if line.startswith(f"{nick}: ")]
            assert shown == [f"{nick}: text {number}" for number in range(500)]


# --- processes that are killed --------------------------------------------------------------------------------

def test_mail_survives_when_the_server_is_killed_and_clients_come_back_by_themselves(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    carol, alice = chat.clients("carol", "alice")
    alice.feed("send bob hello\n")
    alice.see(SAVED)
    server.kill()
    chat.restart()
    for client in (carol, alice):
        client.see(WELCOME)
    alice.wait_for("carol")
    alice.feed("send carol hello\nsend bob again\n")
    carol.see("alice: hello")
    alice.see(SAVED)
    bob = chat.client("bob")
    assert [client.finish() for client in (alice, bob, carol)] == [0, 0, 0]
    assert texts_of(bob.lines) == ["hello", "again"]
    assert bob.lines.count(MAIL_NOTICE) == 1


def test_server_that_is_killed_while_it_keeps_messages_loses_and_doubles_none(chat: Chat) -> None:
    server = chat.server()
    chat.absent("bob")
    texts = numbered(10000)
    alice = chat.client("alice")
    alice.feed(sends("bob", texts))
    for _ in range(2):
        count = alice.lines.count(SAVED)
        chat.until(lambda: alice.lines.count(SAVED) > count, "some messages to be kept")
        server.kill()
        server = chat.restart()
    assert alice.finish() == 0
    assert alice.lines.count(SAVED) == len(texts)
    bob = chat.client("bob")
    assert bob.finish() == 0
    assert texts_of(bob.lines) == texts


def test_messages_for_a_client_that_was_killed_go_to_the_server(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.wait_for("bob")
    bob.kill()
    alice.feed("send bob hello\n")
    alice.see(no_ack("bob"), SAVED)
    alice.wait_for("bob", "offline")
    alice.feed("send bob again\n")
    alice.see(is_offline("bob"), SAVED)
    again = chat.client("bob")
    assert (alice.finish(), again.finish()) == (0, 0)
    assert again.events[:2] == [WELCOME, MAIL_NOTICE] and texts_of(again.lines) == ["hello", "again"]
    assert alice.lines.count(no_ack("bob")) == 1


def test_recipient_that_is_killed_while_it_shows_its_mail_gets_the_rest_later(chat: Chat) -> None:
    chat.absent("bob")
    texts = [f"text {number} {'x' * 100}" for number in range(5000)]
    alice = chat.client("alice")
    alice.feed(sends("bob", texts))
    assert alice.finish() == 0
    bob = chat.client("bob")
    bob.see(MAIL_NOTICE)
    bob.see_match("alice: .*")
    bob.out.paused = True
    chat.rest(0.5)
    bob.kill()
    bob.out.paused = False
    chat.until(lambda: bob.out.fd is None, "the end of the pipe")
    again = chat.client("bob")
    assert again.finish() == 0
    first, second = texts_of(bob.lines), texts_of(again.lines)
    assert 0 < len(first) < len(texts) and first == texts[:len(first)]
    assert second == texts[len(texts) - len(second):] and len(first) + len(second) >= len(texts)


# --- processes that are stopped -------------------------------------------------------------------------------

def test_recipient_that_is_stopped_shows_everything_once_when_it_goes_on(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    alice.wait_for("bob")
    bob.signal(signal.SIGSTOP)
    texts = numbered(300)
    alice.feed(sends("bob", texts))
    chat.until(lambda: alice.lines.count(SAVED) == len(texts), "everything to be kept")
    alice.wait_for("bob", "offline")
    bob.signal(signal.SIGCONT)
    alice.wait_for("bob", "online")
    alice.feed("send bob again\n")
    assert alice.finish() == 0
    assert alice.lines.count(no_ack("bob")) == len(texts)
    assert bob.finish() == 0
    assert texts_of(bob.lines) == texts + ["again"]
    assert MAIL_NOTICE not in bob.lines or bob.lines.count(MAIL_NOTICE) == 1


def test_sender_that_is_stopped_goes_on_as_if_no_time_had_passed(chat: Chat) -> None:
    bob, alice = chat.clients("bob", "alice")
    texts = numbered(20000)
    alice.feed(sends("bob", texts))
    alice.see(received("bob"))
    alice.signal(signal.SIGSTOP)
    chat.rest(1.5)
    alice.signal(signal.SIGCONT)
    assert alice.finish() == 0
    assert alice.events == [WELCOME] + [received("bob")] * len(texts) + [OFFLINE]
    assert bob.finish() == 0
    assert texts_of(bob.lines) == texts


def test_server_that_is_stopped_does_not_call_anybody_offline(chat: Chat) -> None:
    server = chat.server()
    bob, alice = chat.clients("bob", "alice")
    alice.wait_for("bob")
    server.signal(signal.SIGSTOP)
    chat.rest(1.5)
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    server.signal(signal.SIGCONT)
    alice.see(received("bob"))
    assert alice.roster()["bob"][1] == "online"
    assert (alice.finish(), bob.finish()) == (0, 0)


def test_client_whose_nick_was_given_away_while_it_was_stopped_ends_with_1(chat: Chat) -> None:
    old = chat.client("alice")
    old.sync()
    old.signal(signal.SIGSTOP)
    new = chat.client("alice")
    old.signal(signal.SIGCONT)
    old.feed("send alice hello\n")
    chat.until(lambda: EXITING in old.lines, "the end of the old one", 2 * DEADLINE)
    assert old.wait() == 1
    assert "[Nickname alice is taken.]" in old.lines
    assert new.finish() == 0
