"""Real processes for the tests: servers and clients over loopback, what they print, and how they end.

A ``Chat`` is the world of one test: it has a state directory of its own, starts processes, and ends those (and no
others) when the test is over. Whenever a test waits for one process, the output of all is read and the input of
all is written, so that no pipe of the test itself holds anybody up. Nothing waits longer than ``DEADLINE``, and no
port is fixed: servers take any and say which.
"""
from __future__ import annotations

import fcntl
import math
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from re import Pattern

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, str(ROOT / "udpchat.py")]
# the program with a clock that stands still: what an event does not end, nothing ends
FROZEN_CLOCK = [sys.executable, "-c", f"""
import sys, time
time.monotonic = lambda: 1.0
sys.path[0] = {str(ROOT)!r}
import udpchat
sys.exit(udpchat.main())
"""]
# for a program that has little room for its files: Python itself would leave compiled modules there that are cut off
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}
# the program on a system that does not tell to which of its addresses a datagram came
NO_PKTINFO = [sys.executable, "-c", f"""
import sys
sys.path[0] = {str(ROOT)!r}
import loop, udpchat
loop.IP_PKTINFO = 0
sys.exit(udpchat.main())
"""]
DEADLINE = 60.0           # s; only for a test that hangs: what comes does so long before, on the slowest machine
READ_SIZE = 65536         # bytes
PIPE = subprocess.PIPE

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:       # as a shell leaves it to what runs in its background, and
    signal.signal(signal.SIGINT, signal.default_int_handler)    # nohup SIGHUP: the programs under test would inherit it
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# how to begin a network of one's own: as root, and as anybody
NEW_NETWORK = (["unshare", "--net"], ["unshare", "--map-root-user", "--net"])

WELCOME = "[Welcome, You are registered.]"
UPDATED = "[Client table updated.]"
SAVED = "[Messages received by the server and saved]"
OFFLINE = "[You are Offline. Bye.]"
NOT_RESPONDING = "[Server not responding]"
EXITING = "[Exiting]"
MAIL_NOTICE = "[You have messages]"
WHO = re.compile(r"(\S+) +(\S+:\d+) +(online|offline)")


def has_ipv6() -> bool:
    """Return whether this machine can be reached at ``::1``."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def received(nick: str) -> str:
    """Return the receipt for a message to ``nick``."""
    return f"[Message received by {nick}.]"


def no_ack(nick: str) -> str:
    """Return what is said when ``nick`` does not answer."""
    return f"[No ACK from {nick}, message sent to server.]"


def is_offline(nick: str) -> str:
    """Return what is said when ``nick`` is known to be away."""
    return f"[{nick} is offline, message sent to server.]"


def sends(nick: str, texts: Sequence[str]) -> str:
    """Return the commands that send ``texts`` to ``nick``."""
    return "".join(f"send {nick} {text}\n" for text in texts)


class Stream:
    """What has come from one descriptor; ``paused``: nobody reads it for the time being."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd
        self.data = bytearray()
        self.paused = False

    def read(self) -> None:
        """Read once; a terminal whose other side is closed has ended, too."""
        if self.fd is None:
            return
        try:
            data = os.read(self.fd, READ_SIZE)
        except OSError:
            data = b""
        self.data += data
        if not data:
            self.close()

    def close(self) -> None:
        """Read no more."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Process:
    """One process of a test. ``see`` moves on in its output; ``lines`` is all of it."""

    def __init__(self, chat: Chat, popen: subprocess.Popen[bytes], stdin: int | None, stdout: int | None,
                 stderr: int | None) -> None:
        self.chat = chat
        self.popen = popen
        self.out = Stream(stdout)
        self.err = Stream(stderr)
        self._stdin = stdin
        self._to_write = bytearray()
        self._end_of_input = False
        self._seen = 0              # bytes of the output that the test has looked at
        self._stopped = False

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self.popen.pid

    # input

    def feed(self, text: str | bytes) -> None:
        """Write to the stdin of the process as fast as it reads."""
        assert self._stdin is not None, "no pipe leads there"
        self._to_write += text.encode() if isinstance(text, str) else text
        self.write_some()

    def end_input(self) -> None:
        """Close the stdin of the process once everything is written."""
        self._end_of_input = True
        self.write_some()

    @property
    def waits_to_write(self) -> int | None:
        """The descriptor for which something waits to be written."""
        return self._stdin if self._to_write else None

    def write_some(self) -> None:
        """Write what can be written without waiting."""
        if self._stdin is None:
            return
        try:
            while self._to_write:
                del self._to_write[:os.write(self._stdin, self._to_write)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._end_of_input = True
        if self._end_of_input:
            os.close(self._stdin)
            self._stdin = None

    # output

    @property
    def lines(self) -> list[str]:
        """The whole lines on stdout so far."""
        return self.out.data.decode().split("\n")[:-1]

    @property
    def events(self) -> list[str]:
        """The lines without those that say that the table has changed: how often is a matter of chance."""
        return [line for line in self.lines if line != UPDATED]

    @property
    def errors(self) -> list[str]:
        """The whole lines on stderr so far."""
        return self.err.data.decode().split("\n")[:-1]

    def next_line(self) -> str:
        """Return the next line on stdout that was not seen yet."""
        self.chat.until(lambda: self.out.data.find(b"\n", self._seen) >= 0, f"a line of {self}")
        end = self.out.data.index(b"\n", self._seen)
        line = self.out.data[self._seen:end].decode()
        self._seen = end + 1
        return line

    def see(self, *lines: str) -> None:
        """Wait for these lines, in this order; others may come between."""
        for wanted in lines:
            while self.next_line() != wanted:
                pass

    def see_match(self, pattern: str | Pattern[str]) -> re.Match[str]:
        """Wait for a line that is ``pattern`` from its beginning to its end."""
        while True:
            found = re.fullmatch(pattern, self.next_line())
            if found is not None:
                return found

    def roster(self) -> dict[str, tuple[str, str]]:
        """Return what the client says to ``who``: nick -> (address, state). It must be online."""
        self.feed("who\nreg end-of-who\n")
        found: dict[str, tuple[str, str]] = {}
        while True:
            line = self.next_line()
            if line.startswith("[You can only register as "):
                return found
            match = WHO.fullmatch(line)
            if match is not None:
                found[match.group(1)] = (match.group(2), match.group(3))

    def wait_for(self, nick: str, state: str = "online") -> None:
        """Wait until the client's table has ``nick`` in that state."""
        self.chat.until(lambda: self.roster().get(nick, ("", ""))[1] == state, f"{nick} to be {state} for {self}")

    def sync(self) -> None:
        """Wait until the client has carried out all commands so far. (It must be able to: not while one waits.)"""
        self.feed("reg end-of-lines\n")      # a command that is understood and refused: it changes nothing
        self.see_match(r"\[You can only register as .*\.\]")

    # the end

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        self._stopped = number == signal.SIGSTOP or (self._stopped and number != signal.SIGCONT)
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End the process with SIGKILL, and wait for that."""
        self.popen.kill()
        self.popen.wait(DEADLINE)

    def wait(self) -> int:
        """Wait for the end of the process, and for all of its output; return the exit code."""
        self.chat.until(self._has_ended, f"the end of {self}")
        return self.popen.returncode

    def _has_ended(self) -> bool:
        open_ends = any(stream.fd is not None and not stream.paused for stream in (self.out, self.err))
        return not open_ends and self.popen.poll() is not None

    def finish(self) -> int:
        """Close stdin and wait for the end of the process; return the exit code."""
        self.end_input()
        return self.wait()

    def discard(self) -> None:
        """End the process at once, and close its descriptors."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._to_write.clear()
        self.end_input()
        self.out.close()
        self.err.close()

    def memory(self) -> int:
        """Return the bytes of memory that the process uses (Linux only)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found.group(1)) * 1024

    def __str__(self) -> str:
        arguments = self.popen.args
        assert isinstance(arguments, list)
        return " ".join(map(str, arguments[2:]))


class Chat:
    """The world of one test: a directory, a server (started when one is needed), clients, proxies."""

    def __init__(self, directory: Path, program: Sequence[str] = PROGRAM) -> None:
        self.directory = directory
        self.program = program      # the words that start it, where a call says no others
        self.state = directory / "state"
        self.store = directory / "store.db"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("UDPCHAT_")}
        self.environment |= {"XDG_STATE_HOME": str(self.state), "XDG_CONFIG_HOME": str(directory / "config"),
                             "HOME": str(directory)}
        self.processes: list[Process] = []
        self.proxies: list[Proxy] = []
        self._server: Process | None = None
        self._port = 0

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for proxy in self.proxies:
            proxy.close()
        for process in self.processes:
            process.discard()
        if kind is None:
            for process in self.processes:
                assert b"Traceback" not in process.err.data, process.err.data.decode()

    # starting

    def run(self, *arguments: str | bytes, stdin: int = PIPE, stdout: int = PIPE, stderr: int = PIPE,
            environment: dict[str, str] | None = None, command: Sequence[str] | None = None,
            terminal: int | None = None) -> Process:
        """Start the program. ``terminal``: a descriptor of the one that is to be its own."""
        def take_terminal() -> None:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGQUIT):      # as a shell does, whatever the tests were started from
                signal.signal(number, signal.SIG_DFL)
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        words = self.program if command is None else command
        popen = subprocess.Popen([*words, *arguments], stdin=stdin, stdout=stdout, stderr=stderr, bufsize=0,
                                 env=dict(self.environment, **(environment or {})), cwd=self.directory,
                                 preexec_fn=take_terminal if terminal is not None else None)
        ends: list[int | None] = []
        for end in (popen.stdin, popen.stdout, popen.stderr):
            ends.append(os.dup(end.fileno()) if end is not None else None)
            if end is not None:
                end.close()
        if ends[0] is not None:
            os.set_blocking(ends[0], False)     # our end is a description of its own: theirs still blocks
        process = Process(self, popen, *ends)
        self.processes.append(process)
        return process

    def run_on_terminal(self, *arguments: str) -> Process:
        """Start the program with a pseudo-terminal as stdin and stdout; stderr is a pipe."""
        master, slave = pty.openpty()
        try:
            process = self.run(*arguments, stdin=slave, stdout=slave, terminal=slave, environment={"TERM": "xterm"})
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        process.out.fd = master
        process._stdin = os.dup(master)
        return process

    def complete(self, *arguments: str | bytes, environment: dict[str, str] | None = None,
                 command: Sequence[str] | None = None) -> Process:
        """Run the program with nothing to read until it ends."""
        process = self.run(*arguments, stdin=subprocess.DEVNULL, environment=environment, command=command)
        process.wait()
        return process

    def server(self, *options: str, port: int = 0, host: str = "127.0.0.1", store: str | None = None,
               command: Sequence[str] | None = None) -> Process:
        """Start the server of this world (a new one after the old one has ended), and wait until it is ready."""
        server = self.run("server", str(port), "--host", host, "--store", store or str(self.store), *options,
                          command=command)
        self._port = int(server.see_match(r"\[Server listening on .*:(\d+)\]").group(1))
        self._server = server
        return server

    @property
    def port(self) -> int:
        """The server's port; starts one if there is none."""
        if self._server is None:
            self.server()
        return self._port

    def restart(self, *options: str) -> Process:
        """Start the server again, on its old port."""
        return self.server(*options, port=self._port)

    def start(self, nick: str, *options: str, host: str = "127.0.0.1", port: int | None = None, stdin: int = PIPE,
              stdout: int = PIPE, command: Sequence[str] | None = None) -> Process:
        """Start a client."""
        return self.run("client", nick, host, str(port or self.port), "0", *options, stdin=stdin, stdout=stdout,
                        command=command)

    def client(self, nick: str, *options: str, host: str = "127.0.0.1", port: int | None = None,
               stdin: int = PIPE, command: Sequence[str] | None = None) -> Process:
        """Start a client, and wait until it is registered."""
        client = self.start(nick, *options, host=host, port=port, stdin=stdin, command=command)
        client.see(WELCOME)
        return client

    def clients(self, *nicks: str) -> list[Process]:
        """Start clients, each of which knows those before it."""
        clients = [self.client(nick) for nick in nicks]
        for client in clients:
            client.see(UPDATED)
        return clients

    def absent(self, nick: str) -> None:
        """Make ``nick`` known and offline."""
        client = self.client(nick)
        client.finish()

    def proxy(self) -> Proxy:
        """Start a proxy in front of the server."""
        proxy = Proxy(self.port)
        self.proxies.append(proxy)
        return proxy

    # waiting

    def pump(self, seconds: float) -> None:
        """Read and write what can be read and written; wait for that time at most."""
        reading: dict[int, Stream] = {}
        writing: dict[int, Process] = {}
        for process in self.processes:
            for stream in (process.out, process.err):
                if stream.fd is not None and not stream.paused:
                    reading[stream.fd] = stream
            fd = process.waits_to_write
            if fd is not None:
                writing[fd] = process
        poll = select.poll()        # ``select`` cannot have more than 1,024 descriptors in a process
        for fd in reading:
            poll.register(fd, select.POLLIN)
        for fd in writing:
            poll.register(fd, select.POLLOUT)
        for fd, _ in poll.poll(math.ceil(seconds * 1000)):
            if fd in reading:
                reading[fd].read()
            elif fd in writing:
                writing[fd].write_some()

    def until(self, condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
        """Wait until ``condition`` holds. Fail, with all output, if that lasts too long."""
        end = time.monotonic() + deadline
        while not condition():
            if time.monotonic() >= end:
                raise AssertionError(f"waited in vain for {what}\n{self.report()}")
            self.pump(0.02)

    def rest(self, seconds: float) -> None:
        """Let time pass, for what must not happen in it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pump(max(0.0, end - time.monotonic()))

    def report(self) -> str:
        """Return what every process has printed, for a person."""
        parts = []
        for process in self.processes:
            parts.append(f"--- {process}: exit {process.popen.poll()}")
            for stream in (process.out, process.err):
                parts.append(bytes(stream.data[-2000:]).decode("utf-8", "replace"))
        return "\n".join(parts)


class Proxy:
    """Stands between clients and the server: loses, doubles or swallows datagrams as it is told.

    To the server every client is another socket of the proxy's, which lets nobody in but the server: so to each
    other, clients are as behind a router that does not forward.
    """

    def __init__(self, port: int, seed: int = 1) -> None:
        self.loss = 0.0             # part of the datagrams that is lost
        self.doubled = 0.0          # part of them that comes twice
        self.swallows = False       # nothing comes through
        self.largest = 0            # bytes of the largest datagram that a client sent
        self.seen: deque[bytes] = deque(maxlen=10_000)      # what it was to pass on, in both directions
        self._random = random.Random(seed)
        self._server = ("127.0.0.1", port)
        self._front = self._socket()
        self._backs: dict[tuple[str, int], socket.socket] = {}
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where clients find it."""
        return int(self._front.getsockname()[1])

    @staticmethod
    def _socket() -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind(("127.0.0.1", 0))
        found.setblocking(False)
        return found

    def _run(self) -> None:
        while True:
            clients = {back: address for address, back in self._backs.items()}
            ready = select.select([self._front, self._wake, *clients], [], [])[0]
            if self._wake in ready:
                return
            for sock in ready:
                try:
                    datagram, source = sock.recvfrom(READ_SIZE)
                except OSError:     # an answer to a datagram for somebody who is gone
                    continue
                if sock is self._front:
                    self.largest = max(self.largest, len(datagram))
                    back = self._backs.setdefault(source, self._backs.get(source) or self._socket())
                    self._pass_on(back, datagram, self._server)
                elif source == self._server:
                    self._pass_on(self._front, datagram, clients[sock])

    def _pass_on(self, sock: socket.socket, datagram: bytes, address: tuple[str, int]) -> None:
        self.seen.append(datagram)
        if self.swallows or self._random.random() < self.loss:
            return
        for _ in range(1 + (self._random.random() < self.doubled)):
            try:
                sock.sendto(datagram, address)
            except OSError:
                pass

    def close(self) -> None:
        """End it."""
        self._waker.send(b"x")
        self._thread.join()
        for sock in (self._front, self._wake, self._waker, *self._backs.values()):
            sock.close()


class NoNamespaces(Exception):
    """This system does not let us make networks of our own; the text says why."""


class Machine:
    """A machine in a network of the test's own: a network namespace (Linux only). It has no links at first.

    What runs with ``program`` or behind ``enter`` sees its interfaces and addresses, and no others.
    """

    def __init__(self, neighbour: Machine | None = None) -> None:
        """``neighbour``: a machine to which this one is going to be linked. Raise NoNamespaces."""
        self.enter: list[str] = []
        for tool in ("unshare", "nsenter", "ip"):
            if shutil.which(tool) is None:
                raise NoNamespaces(f"there is no {tool} here")
        for words in NEW_NETWORK if neighbour is None else ([*neighbour.enter, "unshare", "--net"],):
            self._holder = subprocess.Popen([*words, "sh", "-c", "echo; read line"], stdin=PIPE, stdout=PIPE,
                                            stderr=subprocess.DEVNULL)
            assert self._holder.stdout is not None
            if self._holder.stdout.read(1):
                break
            self.close()
        else:
            raise NoNamespaces("network namespaces are not permitted here")
        self.enter = ["nsenter", f"--target={self._holder.pid}", "--net"]
        if "--map-root-user" in words or (neighbour is not None and "--user" in neighbour.enter):
            self.enter += ["--user", "--preserve-credentials"]
        self.program = [*self.enter, *PROGRAM]
        self.ip("link set lo up")

    def ip(self, arguments: str) -> None:
        """Change addresses, links or routes, as ip(8) does."""
        done = subprocess.run([*self.enter, "ip", *arguments.split()], capture_output=True)
        assert done.returncode == 0, (arguments, done.stderr)

    def link(self, interface: str, other: Machine, others_interface: str = "eth0") -> None:
        """Lay a cable between two machines. There are no addresses at its ends yet. Raise NoNamespaces."""
        try:
            self.ip(f"link add {interface} type veth peer name {others_interface} netns {other._holder.pid}")
        except AssertionError as error:
            raise NoNamespaces(f"there are no virtual cables here: {error}") from None
        for machine, name in ((self, interface), (other, others_interface)):
            machine.ip(f"link set {name} addrgenmode none up")

    def address(self, interface: str, *addresses: str) -> None:
        """Give an interface addresses, as ADDRESS/BITS; they can be used at once."""
        for address in addresses:
            self.ip(f"addr add {address} dev {interface}" + (" nodad" if ":" in address else ""))

    def run(self, script: str, *arguments: str) -> str:
        """Run a script of Python there; return what it prints."""
        done = subprocess.run([*self.enter, sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End it. Its network is gone with the last program in it."""
        self._holder.communicate()


def shown_once(lines: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether ``wanted`` are among ``lines``, each once and in that order."""
    names: set[str] = set(wanted)
    return [line for line in lines if line in names] == list(wanted)
