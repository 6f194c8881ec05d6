#!/usr/bin/env python3
"""What happens: the event loop, the server and the client that run on it, and the command line.

Rules of this file
------------------
- One thread, one selector, one heap of timers. Nothing blocks but the selector's own wait (and SQLite's commit).
- ``Server`` and ``Client`` do not know each other, and touch nothing impure but what the loop hands them: ``now``,
  ``wall``, ``call_at``, ``random``, a function that sends a datagram, an ``Output``; beside that, they write to the
  log. So tests run the very same objects in a simulated world.
- Dispatch is a table from tag or command to method.

One turn of the loop
--------------------
    wait     until a descriptor is ready or the first timer is due
    read     every ready descriptor, bounded, so that no source starves another (of a socket, one datagram after a wait)
    run      every timer that is due
    settle   once, in this order: commit the store; send what windows allow; write stdout; send acks for what store
             and stdout have really taken

``now`` is taken once, after the wait, and holds until the turn has ended.

"Persist, then show, then acknowledge" is what makes an ack a promise. A timeout that would call somebody dead acts only
when the socket was read empty (``calm``), and the time in which this process itself did not run does not count.
"""
from __future__ import annotations

# The start of the program is measured (tests/bench.py): what takes long to import is imported where it is used, and
# the garbage collector does not look at what is imported, now and again, since all of it stays.
import gc
if gc.isenabled():
    gc.disable()
import signal
import sys
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # whoever is interrupted while it imports prints no traceback
import argparse
import errno
import os
import re
import select
import socket
import time
import unicodedata
from typing import Any, NoReturn
from collections.abc import Callable, Sequence

from protocol import MAX_NICK, SESSION_BYTES, Address, is_nick
from conversation import ACK_TIMEOUT
from stream import NEVER
from registry import MAILBOX_LIMIT, MAX_CLIENTS, MAX_KNOWN, NICK_LAPSE, Mailbox, Registry, StoreError
from loop import (LEVELS, MAX_WAIT, LogFile, Output, Reader, SelectorLoop, UdpSocket, Writer, clean, json_line, log,
                  read_some, show_address, unmapped)
from editor import History, Style, Terminal, wants_color
from home import load_secret, state_home
from terminal import FOR_PEOPLE, ROUTINE, STATUS, Board, Desk, JsonLines, Lines, Prompt
from client import STDIN_LIMIT, Client, Console
from server import DEFAULT_PORT, STRANGER_REPLIES, Server
gc.freeze()
gc.enable()

VERSION = "1.0.0"


# --- the command line -----------------------------------------------------------------------------------------

EXIT_FAILED, EXIT_USAGE = 1, 2
STDIN, STDOUT, STDERR = 0, 1, 2
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,     # asked to; and those that would otherwise end a
                  signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)   # client at once, and leave its terminal as it is


class Usage(Exception):
    """The arguments are wrong; the text says how, in one line."""


class Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal. (Without a width, argparse imports shutil, whatever is asked for.)"""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(STDOUT).columns)
        except (OSError, ValueError):
            columns = 0
        super().__init__(prog, width=(columns or 80) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises Usage."""
        raise Usage(message)


def whole_number(low: int, high: int, what: str) -> Callable[[str], int]:
    """An argument type: a whole number in [low, high]."""
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")
        return int(text)
    return parse


def add_log_options(parser: Parser) -> None:
    """The arguments that every mode has."""
    parser.add_argument("--log-level", default="warning", choices=LEVELS,
                        help="what is logged: this and what is more important (default: %(default)s)")
    parser.add_argument("--log-file", metavar="PATH", help="append the log to this file (default: it goes to stderr)")
    parser.add_argument("--log-format", default="text", choices=("text", "json"),
                        help="of each line of the log (default: %(default)s)")


def nick_argument(text: str) -> str:
    """An argument type: a nick."""
    nick = unicodedata.normalize("NFC", text)
    if not is_nick(nick):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nick: 1 to {MAX_NICK} letters, digits, _ . -")
    return nick


def nicks_argument(text: str) -> list[str]:
    """An argument type: nicks, with commas between them; each counts once."""
    return list(dict.fromkeys(nick_argument(part) for part in text.split(",")))


def build_parser(mode: str = "") -> Parser:
    """The command line of the program; only the arguments of ``mode`` are there, to start sooner."""
    parser = Parser(prog="udpchat", description="A chat over bare UDP that a shell script can trust.",
                    epilog="Short forms: -s PORT for server, -c NICK SERVER-HOST SERVER-PORT CLIENT-PORT for client.")
    parser.add_argument("--version", action="version", version=f"udpchat {VERSION}")
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser, required=True, prog="udpchat")
    for name, (purpose, add_options) in MODES.items():
        options = modes.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name == mode:
            add_options(options)
            add_log_options(options)
    return parser


def add_server_options(server: Parser) -> None:
    """The arguments of ``udpchat server``."""
    server.add_argument("port", nargs="?", type=whole_number(0, 65535, "a port"), default=DEFAULT_PORT, metavar="PORT",
                        help="default: %(default)s; 0: any")
    server.add_argument("--host", default="0.0.0.0", metavar="ADDR", help="the address to listen at (default: all)")
    server.add_argument("--store", metavar="PATH", help="SQLite file (default: in the user's state directory);"
                        " :memory: keeps nothing")
    server.add_argument("--max-clients", type=whole_number(1, 10 ** 6, "a number"), default=MAX_CLIENTS, metavar="N",
                        help="default: %(default)s")
    server.add_argument("--mailbox-limit", type=whole_number(0, 10 ** 8, "a number"), default=MAILBOX_LIMIT,
                        metavar="N", help="messages that wait for one recipient (default: %(default)s)")
    server.add_argument("--max-nicks", type=whole_number(1, 10 ** 7, "a number"), default=MAX_KNOWN, metavar="N",
                        help="known nicks; beyond, one that is offline is forgotten (default: %(default)s)")
    server.add_argument("--stranger-replies", type=whole_number(1, 10 ** 7, "a number"), default=STRANGER_REPLIES,
                        metavar="N", help="answers a second to those who are not registered (default: %(default)s)")
    server.add_argument("--nick-lapse", type=whole_number(0, 10 ** 5, "a number of days"), metavar="DAYS",
                        default=int(NICK_LAPSE),
                        help="offline after which a nick is free again (default: %(default)s; 0: never)")
    server.add_argument("--forget", type=nick_argument, metavar="NICK",
                        help="free a nick, with its mail, and end; while no server has the store open")


def add_client_options(client: Parser) -> None:
    """The arguments of ``udpchat client``."""
    client.add_argument("nick", nargs="?", metavar="NICK", help="default: UDPCHAT_NICK, or the login name")
    client.add_argument("server_host", nargs="?", metavar="SERVER-HOST",
                        help="default: UDPCHAT_SERVER (HOST[:PORT]), or 127.0.0.1")
    client.add_argument("server_port", nargs="?", type=whole_number(1, 65535, "a port"), metavar="SERVER-PORT",
                        help=f"default: {DEFAULT_PORT}")
    client.add_argument("client_port", nargs="?", type=whole_number(0, 65535, "a port"), default=0,
                        metavar="CLIENT-PORT", help="default: %(default)s, any")
    client.add_argument("--stay", action="store_true", help="go on receiving at the end of stdin, until a signal")
    client.add_argument("--time", action="store_true", default=None,
                        help="show the time of day before each line (default: on a terminal)")
    client.add_argument("--no-time", action="store_false", dest="time", help="do not")
    client.add_argument("--bell", action="store_true", help="on a terminal, ring with each message")
    client.set_defaults(server=None, timeout=None)
    add_chat_options(client)


def add_send_options(send: Parser) -> None:
    """The arguments of ``udpchat send``."""
    send.add_argument("nicks", type=nicks_argument, metavar="NICK[,NICK...]", help="to whom")
    send.add_argument("text", nargs="*", metavar="TEXT", default=[], help="the message (default: all of stdin)")
    send.add_argument("--server", metavar="HOST[:PORT]", help="default: UDPCHAT_SERVER, or 127.0.0.1")
    send.add_argument("--nick", metavar="NICK", help="one's own; default: UDPCHAT_NICK, or the login name")
    send.add_argument("--timeout", type=whole_number(1, 10 ** 6, "a number of seconds"), metavar="SECONDS",
                      help="after which what is not closed counts as not delivered (default: none)")
    send.set_defaults(server_host=None, client_port=0, stay=False, time=False, bell=False)
    add_chat_options(send)


def add_chat_options(parser: Parser) -> None:
    """The arguments of everybody who chats."""
    parser.add_argument("--json", action="store_true", help="events, and commands, as JSON objects, one a line")
    parser.add_argument("--quiet", action="store_true", help="show messages only, no status lines")
    parser.add_argument("--color", default="auto", choices=("auto", "always", "never"),
                        help="auto: on a terminal, unless NO_COLOR is set (default: %(default)s)")
    parser.add_argument("--ack-timeout", type=whole_number(1, 60000, "a number of milliseconds"), metavar="MS",
                        default=int(ACK_TIMEOUT * 1000),
                        help="after which a message goes to the server (default: %(default)s)")
    parser.add_argument("--identity", metavar="PATH", help="file with the secret that proves that a nick is yours"
                        " (default: in the user's state directory)")
    parser.add_argument("--anonymous", action="store_true", help="do not own the nick: it is free when you are offline")


MODES: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "server": ("keep the list of clients and the mail of those offline", add_server_options),
    "client": ("chat", add_client_options),
    "send": ("send one message, and end", add_send_options),
}
SHORT_FORMS = {"-s": "server", "-c": "client"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line as options; raises Usage."""
    words = list(arguments)
    if words and words[0] in SHORT_FORMS:
        words[0] = SHORT_FORMS[words[0]]
    options, rest = build_parser(words[0] if words else "").parse_known_args(words)
    if options.mode == "send":      # argparse finds no TEXT behind an option
        end = rest.index("--") if "--" in rest else len(rest)
        if not any(word.startswith("-") for word in rest[:end]):
            options.text, rest = options.text + rest[:end] + rest[end + 1:], []
    if rest:
        raise Usage(f"unrecognized arguments: {' '.join(rest)}")
    return options


def resolve(host: str, port: int, passive: bool = False) -> tuple[socket.AddressFamily, Address]:
    """The first address of ``host``; raises Usage if it has none."""
    try:
        name = host.encode() if host.isascii() else host    # for text, the socket module imports what IDNA needs
        found = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE if passive else 0)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)    # a server listens on IPv4 unless told otherwise
        family, _, _, _, address = found[0]
        return family, (str(address[0]), int(address[1]))
    except (OSError, UnicodeError, IndexError):
        raise Usage(f"cannot resolve {clean(host) or repr(host)}") from None


def bind(family: socket.AddressFamily, address: Address) -> socket.socket:
    """A UDP socket bound to ``address``. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def complain(text: str) -> None:
    """One line on stderr."""
    try:
        os.write(STDERR, f"udpchat: {clean(text)}\n".encode("utf-8", "replace"))
    except OSError:
        pass


def run_server(options: argparse.Namespace) -> int:
    """Runs a server until a signal; gives the exit code."""
    family, address = resolve(options.host, options.port, passive=True)
    try:
        sock = bind(family, address)
    except OSError as error:
        complain(f"cannot listen at {show_address(address)}: {error.strerror}")
        return EXIT_FAILED
    mailbox = open_store(options.store or default_store(sock.getsockname()[1]))
    if mailbox is None:
        return EXIT_FAILED
    loop = SelectorLoop()
    registry = Registry(mailbox, options.max_clients, options.mailbox_limit, options.max_nicks)
    port = UdpSocket(sock, loop)
    server = Server(loop, port.send, registry, options.nick_lapse, options.stranger_replies)
    began = time.monotonic()

    def settle() -> None:
        server.settle()
        log.flush()

    def summarize() -> None:
        log.count("summary", {"uptime": int(time.monotonic() - began), **server.counters(), **port.counters()})

    port.receive, loop.settle = server.receive, settle
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.on_signal(number, loop.stop)
    loop.on_signal(signal.SIGUSR1, summarize)
    loop.on_signal(signal.SIGHUP, log.reopen if options.log_file or not is_at_terminal() else loop.stop)
    server.start()
    where = unmapped(sock.getsockname())
    announce(f"[Server listening on {show_address(where)}]\n" + (how_to_join(where) if os.isatty(STDOUT) else ""))
    loop.run()
    loop.close()
    return 0 if server.stop() else EXIT_FAILED


def is_at_terminal() -> bool:
    """Whether somebody started this by hand, and wants it to end when the window is closed."""
    return any(os.isatty(fd) for fd in (STDIN, STDOUT, STDERR))


def how_to_join(where: Address) -> str:
    """What to type on another machine, in one line."""
    program = "python udpchat.py" if sys.argv[0].endswith(".py") else "udpchat"
    return f"[Join with: {program} client NICK {reachable(where[0])} {where[1]}]\n"


def reachable(host: str) -> str:
    """The address at which others reach a server that listens at ``host``: of all, the one that leads out."""
    if host not in ("0.0.0.0", "::"):
        return host
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):   # RFC 5737, RFC 3849
        if family == socket.AF_INET or host == "::":
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect((elsewhere, 9))    # sends nothing: it only looks for the way
                    return str(sock.getsockname()[0])
            except OSError:
                pass
    return "127.0.0.1"


def announce(line: str) -> None:
    """Writes a line to stdout, whatever that is."""
    try:
        os.write(STDOUT, line.encode())
    except OSError as error:
        complain(f"cannot write to stdout: {error.strerror}")


def default_store(port: int) -> str:
    """Where the store of the server at ``port`` is."""
    return os.path.join(state_home(), f"server-{port}.db")


def open_store(path: str) -> Mailbox | None:
    """The store at ``path``, in a directory that is made if it is ours; None if that was not possible, and says so."""
    try:
        if os.path.dirname(path) == state_home():
            os.makedirs(state_home(), mode=0o700, exist_ok=True)
        return Mailbox(path, os.urandom(SESSION_BYTES))
    except OSError as error:
        complain(f"cannot make {state_home()}: {error.strerror}")
    except StoreError as error:
        complain(str(error))
    return None


def forget(options: argparse.Namespace) -> int:
    """Frees a nick in a store that no server has open; gives the exit code."""
    path = options.store or default_store(options.port)
    if not os.path.exists(path):
        complain(f"there is no store {path}")
        return EXIT_FAILED
    mailbox = open_store(path)
    if mailbox is None:
        return EXIT_FAILED
    known = mailbox.known.get(options.forget)
    done = known is not None and Registry(mailbox).forget(options.forget) and mailbox.commit(time.time())
    mailbox.close()
    if not done or known is None:
        complain(f"{options.forget} is not known" if known is None else f"the store {path} cannot be written")
        return EXIT_FAILED
    log.warning("%s is forgotten, with %d messages", known.nick, known.messages)
    return 0


def secret_of(options: argparse.Namespace) -> bytes | None:
    """The user's secret, None for an anonymous client."""
    if options.anonymous:
        return None
    path = options.identity or os.path.join(state_home(), "identity")
    try:
        return load_secret(path)
    except OSError as error:
        if options.identity or error.errno == errno.EINVAL:     # a broken one: nobody should lose a nick unawares
            raise Usage(f"the identity {path}: {error.strerror}") from None
        log.warning("no identity (%s: %s): anonymous, the nick is nobody's", path, error.strerror)
        return None


def login_name() -> str:
    """The name of the user; raises Usage if that is no nick."""
    import getpass
    try:
        return nick_argument(getpass.getuser())
    except (argparse.ArgumentTypeError, KeyError, OSError, ImportError):
        raise Usage("your login name is not a nick: give one") from None


def own_nick(given: str | None) -> str:
    """The nick of this client: as given, as UDPCHAT_NICK says, or the login name; raises Usage if that is none."""
    wanted = given if given is not None else os.environ.get("UDPCHAT_NICK") or None
    try:
        return nick_argument(wanted) if wanted is not None else login_name()
    except argparse.ArgumentTypeError as error:
        raise Usage(str(error)) from None


def server_of(options: argparse.Namespace) -> tuple[str, int]:
    """Where the server is: as given, or as UDPCHAT_SERVER says (HOST[:PORT]), or here; raises Usage."""
    if options.server_host is not None:
        return options.server_host, DEFAULT_PORT if options.server_port is None else options.server_port
    return server_argument(options.server or os.environ.get("UDPCHAT_SERVER") or "127.0.0.1")


def server_argument(text: str) -> tuple[str, int]:
    """``HOST``, ``HOST:PORT``, ``[IPV6]:PORT`` or an IPv6 address; raises Usage."""
    parts = re.fullmatch(r"\[(.*)\](?::(.*))?|([^:]*)(?::([^:]*))?", text)
    if parts is None:
        return text, DEFAULT_PORT       # an IPv6 address
    host, port = parts.group(1) or parts.group(3) or "", parts.group(2) if parts.group(1) else parts.group(4)
    try:
        return host, whole_number(1, 65535, "a port")(port) if port is not None else DEFAULT_PORT
    except argparse.ArgumentTypeError as error:
        raise Usage(str(error)) from None


def lines_for(options: argparse.Namespace, nick: str, loop: SelectorLoop, is_terminal: bool, style: Style) -> Lines:
    """How events are told: as objects, as plain lines, or as lines for people."""
    hidden = STATUS if options.quiet else ROUTINE if options.mode == "send" else frozenset()
    if options.json:
        return JsonLines(nick, loop.wall, hidden)
    timed = options.time if options.time is not None else is_terminal and options.mode == "client"
    return Lines(style, loop.wall if timed else None, hidden if is_terminal else hidden | FOR_PEOPLE,
                 options.bell and is_terminal)


class NoText(Exception):
    """What is to be sent did not come whole; the text says why."""


def text_to_send(options: argparse.Namespace, end: float) -> str:
    """What ``udpchat send`` sends: its arguments, or all of stdin but the line feeds at its end.

    ``end``: when that must be there, by the monotonic clock. Raises NoText.
    """
    if options.text:
        return " ".join(options.text).encode("utf-8", "replace").decode()
    data = b""
    try:
        while len(data) <= STDIN_LIMIT:
            left = end - time.monotonic()
            if left <= 0:
                raise NoText("the text did not come in time")
            if select.select([STDIN], [], [], min(left, MAX_WAIT))[0]:
                more = read_some(STDIN)
                if more == b"":
                    break
                data += more or b""
    except OSError as error:
        raise NoText(f"cannot read stdin: {error.strerror}") from None
    return data.decode("utf-8", "replace").rstrip("\n")


def prompt_for(options: argparse.Namespace, is_terminal: bool, output: Output, style: Style,
               complete: Callable[[str], tuple[int, list[str]]]) -> Prompt | None:
    """What stands at the bottom of the terminal; None where there is none. ``is_terminal``: stdin is one, too."""
    is_dumb = os.environ.get("TERM") == "dumb"
    if options.mode == "send":
        is_shown = os.isatty(STDOUT) and not (is_dumb or options.json or options.quiet)
        return Board(output, Terminal(STDIN, STDOUT), style) if is_shown else None
    if not is_terminal:
        return None
    if is_dumb:
        return Prompt()
    return Desk(output, Terminal(STDIN, STDOUT), style, History(os.path.join(state_home(), "history")), complete)


def run_client(options: argparse.Namespace, error_writer: Writer, errors: Output) -> int:
    """Runs a client, or sends one message; gives the exit code."""
    nick = own_nick(options.nick)
    family, server = resolve(*server_of(options))
    end = time.monotonic() + (options.timeout or NEVER)
    try:
        text = text_to_send(options, end) if options.mode == "send" else ""
    except NoText as error:
        complain(f"nothing was sent: {error}")
        return EXIT_FAILED
    secret = secret_of(options)
    loop = SelectorLoop()
    try:
        sock = bind(family, ("::" if family == socket.AF_INET6 else "0.0.0.0", options.client_port))
    except OSError as error:
        complain(f"cannot use port {options.client_port}: {error.strerror}")
        return EXIT_FAILED
    port, reader, writer = UdpSocket(sock, loop), Reader(STDIN), Writer(STDOUT)
    output = Output(writer.put)
    is_terminal = reader.is_terminal and writer.is_terminal and not options.json
    style = Style(wants_color(options.color, is_terminal, os.environ))
    prompt = prompt_for(options, is_terminal, output, style, lambda before: client.complete(before))
    client = Client(loop, port.send, output, nick, unmapped(server), secret, options.ack_timeout / 1000, options.stay,
                    errors, lines_for(options, nick, loop, is_terminal, style), prompt)
    if prompt is not None and log.output is errors and os.fstat(STDOUT).st_rdev == os.fstat(STDERR).st_rdev:
        log.output = Output(client.show_log)
    port.receive = client.receive
    console = Console(loop, client, reader, writer, error_writer, prompt)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.on_signal(number, client.interrupt)
    if options.mode == "send":
        for recipient in options.nicks:
            client.put(recipient, text)
        client.feed(b"")
    if end < NEVER:
        loop.call_at(loop.now() + max(0.0, end - time.monotonic()), client.time_is_over)
    try:
        console.start()
        client.start()
        loop.run()
    finally:
        console.close()
        loop.close()
    return client.exit_code or 0


def set_up_log(options: argparse.Namespace) -> tuple[Writer, Output] | None:
    """Sets up the log; gives stderr, and what waits for it. None if the file cannot be opened, and says so."""
    writer = Writer(STDERR)
    output = Output(writer.put)
    log.level, log.output = LEVELS.index(options.log_level), output
    if options.log_format == "json":
        log.line = json_line
    if options.log_file is not None:
        try:
            log.write_to(LogFile(options.log_file))
        except OSError as error:
            complain(f"cannot open the log {options.log_file}: {error.strerror}")
            return None
    return writer, output


def keep_standard_descriptors() -> None:
    """Keeps sockets and files from taking the place of a standard stream that is closed."""
    while True:
        fd = os.open(os.devnull, os.O_RDONLY)
        if fd > STDERR:
            os.close(fd)
            return


def end_at_once_on_signals(sends: bool) -> None:
    """Until the loop takes signals: while modules are imported, a name is looked up, a file or a text is read.

    An exception would do, but where Python calls back by itself (in an import, say) it is printed and gets lost.
    """
    def end(*_: object) -> None:
        if sends:
            complain("nothing was sent: interrupted")
        os._exit(EXIT_FAILED if sends else 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    keep_standard_descriptors()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        complain("usage: udpchat server|client|send ... (see --help)")
        return EXIT_USAGE
    end_at_once_on_signals(sends=words[0] == "send")
    try:
        options = parse(words)
        errors = set_up_log(options)
        if errors is None:
            return EXIT_FAILED
        if options.mode != "server":
            return run_client(options, *errors)
        return run_server(options) if options.forget is None else forget(options)
    except Usage as error:
        complain(str(error))
        return EXIT_USAGE
    except OSError as error:        # what nobody has foreseen: too few descriptors, say
        complain(error.strerror or str(error))
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
