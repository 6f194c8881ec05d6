#!/usr/bin/env python3
"""UdpChat, a chat over bare UDP that a shell script can trust: the command line, and nothing else.

Rules of this file
------------------
- It reads arguments, the environment and the standard descriptors, makes the parts and hands them to each other. What
  they do is said in their own modules: ``server`` and ``client`` run on ``loop``; ``terminal`` and ``editor`` are what
  a person or a script sees; ``conversation``, ``stream`` and ``protocol`` are what travels, ``secure`` encrypts it;
  ``registry`` decides who is registered, ``home`` is what lies on the disk. See docs/architecture.md.
- A wrong argument is one line on stderr and exit 2 (``Usage``); what fails is one line and exit 1 (``Failure``).
- When it is run as a script, Python compiles it each time: what can lie in another module lies there.
"""
from __future__ import annotations

# The start of the program is measured (tests/bench.py): a mode imports its own modules when it begins, and only then.
# The garbage collector rests meanwhile: all that is imported stays, so there is nothing to collect.
import gc
if gc.isenabled():
    gc.disable()
import os
import signal
import sys
if __name__ == "__main__":
    if sys.version_info < (3, 10):      # as in __main__.py
        sys.exit("udpchat: Python 3.10 or newer is needed, this is %d.%d" % sys.version_info[:2])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports prints no traceback
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # with PYTHONSAFEPATH it is not there
import argparse
import errno
import functools
import re
import select
import socket
import stat
import time
import unicodedata
from collections.abc import Callable, Sequence

try:
    from protocol import DEFAULT_PORT, MAX_NICK, MAX_TEXT, SESSION_BYTES, is_nick
except ModuleNotFoundError as missing:
    if __name__ != "__main__" or missing.name != "msgpack":
        raise
    sys.exit("udpchat: the package msgpack is missing: pip install msgpack")
from home import (LEVELS, SECRET_BYTES, KnownKeys, LineFile, Pin, ShownMessages, check_store, config_home, fingerprint,
                  grouped, is_private, json_line, load_secret, make_private, read_settings, remember_nicks, socket_path,
                  state_home)
from loop import (BYTE_ORDER_MARK, MAX_WAIT, SERVER_DATAGRAMS, WILDCARDS, AnsweringSocket, Endpoint, Failure,
                  LocalSocket, LogFile, NameLookUp, Output, Reader, SelectorLoop, UdpSocket, Usage, Writer, bind,
                  call_at_the_end, client_socket, in_turns, is_number, keep_standard_descriptors, log,
                  look_up_patiently, reachable, read_some, resolve, show_address, unmapped, visit, without_line_ends)
from protocol import MAX_ENTRIES, NEVER, TYPE_CHECKING, Address, Any, clean, folded
if TYPE_CHECKING:
    from client import Client
    from typing import NoReturn
    from conversation import Selection
    from editor import Prompt, Style
    from home import Mailbox
    from secure import Handshake, Keys, Sodium
    from terminal import Display, Shell, TextFormatter
gc.freeze()
gc.enable()

VERSION = "1.1.0"


# --- the command line -----------------------------------------------------------------------------------------

EXIT_FAILED, EXIT_USAGE = 1, 2
NICK_PATIENCE = 10.0           # s for which all modes but ``client`` wait for a nick in use, without ``--timeout``
GREETING_TIME = 2.0            # s for which a client of one's own may take to answer; it may be stopped
ANSWER_TIMEOUT = 60            # s for which ``ask`` waits
GARBAGE_GAP = 20_000           # objects that are made between looks for garbage: hardly any of them lie in a circle
VISIT_TIME = 0.1               # s that a client which was not willing at first has to answer when it is asked again
STDIN_LIMIT = 4 * MAX_TEXT     # bytes that ``send`` keeps of its text: more than a message may have
STDIN_COUNTED = 2 ** 24        # bytes that it reads, to say how many there are
STDIN, STDOUT, STDERR = 0, 1, 2
SWITCH = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
CALLED_AS = {"udpchat.py": "python udpchat.py", "udpchat.pyz": "python3 udpchat.pyz",     # other names: "udpchat"
             "__main__.py": "python -m udpchat"}
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,     # asked to; and those that would otherwise end a
                  signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)   # client without giving its terminal back


class Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal. (Without a width, argparse imports shutil, whatever is asked for.)"""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(STDOUT).columns)
        except (OSError, ValueError):
            columns = 0
        super().__init__(prog, width=(columns or 80) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that says which arguments it has."""

    def __init__(self, **options: Any) -> None:
        self.arguments: list[argparse.Action] = []
        super().__init__(formatter_class=Formatter, **options)
        self.color = False      # of Python 3.14, which looks at stdout only, whatever the help is written to

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, see argparse."""
        self.arguments.append(super().add_argument(*names, **options))
        return self.arguments[-1]

    @property
    def long_options(self) -> dict[str, argparse.Action]:
        """The options by their long names, without the dashes."""
        return {name[2:]: action for action in self.arguments for name in action.option_strings
                if name.startswith("--")}

    def error(self, message: str) -> NoReturn:
        """Raise Usage."""
        raise Usage(message)

    def _print_message(self, message: str, file: object = None) -> None:
        """Write the help or the version, or end: Python itself would print a traceback at its exit."""
        try:
            if sys.stdout is None:      # it was closed
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            sys.stdout.write(message)
            sys.stdout.flush()
        except OSError as error:
            complain_of_stdout(error)
            os._exit(EXIT_FAILED)


def whole_number(low: int, high: int, what: str) -> Callable[[str], int]:
    """Return an argument type: a whole number in [low, high]."""
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")
        return int(text)
    return parse


def add_common_options(parser: Parser) -> None:
    """Add the arguments that every mode has."""
    parser.add_argument("--log-level", default="warning", choices=LEVELS,
                        help="lowest level of the diagnostics (default: %(default)s)")
    parser.add_argument("--log-file", metavar="PATH",
                        help="append the diagnostics to this file (default: they go to stderr)")
    parser.add_argument("--log-format", default="text", choices=("text", "json"),
                        help="format of the diagnostics (default: %(default)s)")
    parser.add_argument("--secure", default="auto", choices=("auto", "require", "off"),
                        help="encrypt: auto, with everybody who can; require, or do not speak; off, never"
                        " (default: %(default)s)")
    path = (config_path() or "none, there is no home directory").replace("%", "%%")
    parser.add_argument("--config", metavar="PATH", help=f"file with settings (default: {path})")


def nick_argument(text: str) -> str:
    """Return a nick: an argument type."""
    nick = unicodedata.normalize("NFC", text)
    if not is_nick(nick):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nick: 1 to {MAX_NICK} letters, digits, _ . -")
    return nick


def fingerprint_argument(text: str) -> str:
    """Return the digits of a fingerprint, in groups of five: an argument type."""
    digits = re.sub(r"\s", "", text)
    if not re.fullmatch("[0-9]{60}", digits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fingerprint: 60 digits")
    return grouped(digits)


def nicks_argument(text: str) -> list[str]:
    """Return nicks, which have commas between them, each once: an argument type."""
    parts = [part.strip(" \t") for part in text.split(",")]
    if len(parts) > 1 and "" in parts:
        raise argparse.ArgumentTypeError(f"in {text!r} a nick is missing beside a comma; write bob,carol for two")
    return list(dict.fromkeys(map(nick_argument, parts)))


def build_parser(mode: str = "") -> tuple[Parser, Parser]:
    """Return the parser of the command line, and that of ``mode``. Of other modes it knows nothing, to start sooner.

    Without a mode, or with what is none, it knows all of them by name.
    """
    parser = Parser(prog="udpchat", description="A chat over bare UDP that a shell script can trust.",
                    epilog="Short forms: -s PORT for server, -c NICK SERVER-HOST SERVER-PORT CLIENT-PORT for client."
                    " udpchat MODE --help says more of each mode.")
    parser.add_argument("-V", "--version", action="version", version=f"udpchat {VERSION}")
    modes = parser.add_subparsers(dest="mode", metavar="MODE", parser_class=Parser, required=True, prog="udpchat")
    of_mode = parser
    for name in [mode] if mode in MODES else MODES:
        purpose, add_options = MODES[name]
        options = modes.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name == mode:
            of_mode = options
            add_options(options)
            add_common_options(options)
    return parser, of_mode


def add_server_options(server: Parser) -> None:
    """Add the arguments of ``udpchat server``."""
    from registry import MAILBOX_LIMIT, MAX_CLIENTS, MAX_KNOWN, NICK_LAPSE
    from server import STRANGER_REPLIES
    server.add_argument("port", nargs="?", type=whole_number(0, 65535, "a port"), default=DEFAULT_PORT, metavar="PORT",
                        help="UDP port (default: %(default)s; 0: any that is free)")
    server.add_argument("--host", default="0.0.0.0", metavar="ADDR",
                        help="the address to listen at (default: all of IPv4; ::, all of IPv6, too)")
    server.add_argument("--store", metavar="PATH", help="SQLite file (default: in the user's state directory);"
                        " :memory: keeps nothing")
    server.add_argument("--max-clients", type=whole_number(1, 10 ** 6, "a number"), default=MAX_CLIENTS, metavar="N",
                        help="most clients at a time (default: %(default)s)")
    server.add_argument("--mailbox-limit", type=whole_number(0, 10 ** 8, "a number"), default=MAILBOX_LIMIT,
                        metavar="N", help="most messages kept for one recipient (default: %(default)s)")
    server.add_argument("--max-nicks", type=whole_number(1, MAX_ENTRIES, "a number"), default=MAX_KNOWN, metavar="N",
                        help="most nicks that are known; one more makes an offline nick be forgotten"
                        " (default: %(default)s)")
    server.add_argument("--stranger-replies", type=whole_number(1, 10 ** 7, "a number"), default=STRANGER_REPLIES,
                        metavar="N",
                        help="most replies a second to clients that are not registered (default: %(default)s)")
    server.add_argument("--nick-lapse", type=whole_number(0, 10 ** 5, "a number of days"), metavar="DAYS",
                        default=int(NICK_LAPSE),
                        help="days offline, counted while the server runs, after which a nick is free again (default:"
                             " %(default)s; 0: never)")
    server.add_argument("--forget", type=nick_argument, metavar="NICK",
                        help="free a nick, with its mail, and end; while no server has the store open")


def add_client_options(client: Parser) -> None:
    """Add the arguments of ``udpchat client``."""
    client.add_argument("own_nick", nargs="?", type=nick_argument, metavar="NICK",
                        help="your nick (default: UDPCHAT_NICK, or the login name)")
    client.add_argument("server_host", nargs="?", metavar="SERVER-HOST",
                        help="the server, HOST or HOST:PORT (default: UDPCHAT_SERVER, or 127.0.0.1)")
    client.add_argument("server_port", nargs="?", type=whole_number(1, 65535, "a port"), metavar="SERVER-PORT",
                        help=f"port of the server (default: {DEFAULT_PORT})")
    client.add_argument("client_port", nargs="?", type=whole_number(0, 65535, "a port"), default=0,
                        metavar="CLIENT-PORT", help="your own UDP port (default: any that is free)")
    client.add_argument("--stay", action="store_true", help="go on receiving at the end of stdin, until a signal")
    client.add_argument("--time", action="store_true", default=None,
                        help="show the time of day before each line (default: on a terminal)")
    client.add_argument("--no-time", action="store_false", dest="time", help="do not show the time")
    client.add_argument("--date", action="store_true", help="show the date and the time before each line")
    client.add_argument("--bell", action="store_true", help="on a terminal, ring with each message")
    client.set_defaults(timeout=None)
    add_quiet_option(client)
    add_chat_options(client)


def add_send_options(send: Parser) -> None:
    """Add the arguments of ``udpchat send``."""
    send.add_argument("nicks", type=nicks_argument, metavar="NICK[,NICK...]", help="to whom")
    send.add_argument("text", nargs="*", metavar="TEXT", default=[], help="the message (default: all of stdin)")
    add_timeout(send, "give up after this time, whatever is waited for: the server, a nick in use, the recipient; then"
                " what has no final answer counts as not delivered (default: none)")
    send.add_argument("--skip-empty", action="store_true", help="if stdin is empty, send nothing: that is no failure")
    send.set_defaults(stay=False)
    add_quiet_option(send)
    add_job_options(send)


def add_recv_options(recv: Parser) -> None:
    """Add the arguments of ``udpchat recv``."""
    recv.add_argument("--count", type=whole_number(1, 10 ** 9 - 1, "a number"), default=1, metavar="N",
                      help="exit after so many messages (default: %(default)s)")
    recv.add_argument("--from", dest="sender", type=nick_argument, metavar="NICK",
                      help="show only messages from NICK, leave the others for the next program (default: all)")
    add_timeout(recv, "give up after this time, with exit code 3 (default: wait for ever)")
    recv.set_defaults(stay=True, quiet=True)
    add_job_options(recv)


def add_ask_options(ask: Parser) -> None:
    """Add the arguments of ``udpchat ask``."""
    ask.add_argument("nicks", type=lambda text: [nick_argument(text)], metavar="NICK", help="whom to ask")
    ask.add_argument("text", nargs="*", metavar="TEXT", default=[], help="the question (default: all of stdin)")
    add_timeout(ask, "give up after this time without an answer: exit code 3 (default: %(default)s)", ANSWER_TIMEOUT)
    ask.set_defaults(stay=True, quiet=True)
    add_job_options(ask)


def add_who_options(who: Parser) -> None:
    """Add the arguments of ``udpchat who``."""
    who.set_defaults(stay=False, quiet=True, nick=None, identity=None, anonymous=True, ack_timeout=0, timeout=None)
    add_job_defaults(who)
    add_server_choice(who)
    add_form_options(who, "the answer as JSON objects, one a line")


def add_timeout(parser: Parser, purpose: str, default: int | None = None) -> None:
    """Add ``--timeout``."""
    parser.add_argument("-t", "--timeout", type=whole_number(1, 10 ** 6, "a number of seconds"), metavar="SECONDS",
                        help=purpose, default=default)


def add_job_options(parser: Parser) -> None:
    """Add what all modes that send or wait for messages share, but ``client``."""
    add_job_defaults(parser)
    add_chat_options(parser)


def add_job_defaults(parser: Parser) -> None:
    """Set what only ``client`` has options for."""
    parser.set_defaults(own_nick=None, server_host=None, server_port=None, client_port=0, time=False, date=False,
                        bell=False)


def add_quiet_option(parser: Parser) -> None:
    """Add ``--quiet``."""
    parser.add_argument("-q", "--quiet", action="store_true", help="show messages only, no status lines")


def add_server_choice(parser: Parser) -> None:
    """Add the arguments that say which server is meant."""
    parser.add_argument("--server", type=server_argument, metavar="HOST[:PORT]",
                        help="the server (default: UDPCHAT_SERVER, or 127.0.0.1)")
    parser.add_argument("--server-key", type=fingerprint_argument, metavar="DIGITS",
                        help="fingerprint of the server (default: UDPCHAT_SERVER_KEY, or that of the first contact)")


def add_form_options(parser: Parser, json: str) -> None:
    """Add the arguments that say how lines look; ``json``: what becomes an object."""
    parser.add_argument("--json", action="store_true", help=json)
    parser.add_argument("--color", default="auto", choices=("auto", "always", "never"),
                        help="auto: on a terminal, unless NO_COLOR is set (default: %(default)s)")


def add_chat_options(parser: Parser) -> None:
    """Add the arguments of all modes that send or receive messages."""
    from conversation import ACK_TIMEOUT
    add_server_choice(parser)
    parser.add_argument("-n", "--nick", type=nick_argument, metavar="NICK",
                        help="your nick (default: UDPCHAT_NICK, or the login name)")
    add_form_options(parser, "events, and commands, as JSON objects, one a line")
    parser.add_argument("--ack-timeout", type=whole_number(1, 60000, "a number of milliseconds"), metavar="MS",
                        default=int(ACK_TIMEOUT * 1000),
                        help="time without an answer after which a message goes to the server"
                        " (default: %(default)s)")
    parser.add_argument("--identity", metavar="PATH", help="file with the secret that proves that a nick is yours"
                        " (default: in the user's state directory)")
    parser.add_argument("--anonymous", action="store_true", help="do not own the nick: it is free when you are offline")


MODES: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "server": ("keep the list of clients and the mail of those offline", add_server_options),
    "client": ("chat", add_client_options),
    "send": ("send one message, and end", add_send_options),
    "recv": ("wait for messages, and end", add_recv_options),
    "ask": ("send a question, print the answer, and end", add_ask_options),
    "who": ("show everybody who is known, and end", add_who_options),
}
SENDING_MODES = ("send", "ask")
JOB_MODES = (*SENDING_MODES, "recv", "who")     # their exit code says whether the job is done
SHORT_FORMS = {"-s": "server", "-c": "client"}


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the command line with the mode in its long form, or a request for help, first. Raise Usage."""
    mode, *rest = arguments or [""]
    if mode == "help":
        mode, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    mode = SHORT_FORMS.get(mode, mode)
    if mode not in MODES and not mode.startswith("-"):
        raise Usage(f"there is no mode {mode!r}, only {', '.join(MODES)} (udpchat help says more)")
    return [mode, *rest]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line, and behind it the file with settings, as options. Raise Usage."""
    words = spelled_out(arguments)
    parser, of_mode = build_parser(words[0])
    options, rest = parsed(words, parser, of_mode)
    for one, other, what in (("own_nick", "nick", "NICK"), ("server_host", "server", "SERVER-HOST")):
        if getattr(options, one, None) is not None and getattr(options, other) is not None:
            raise Usage(f"either {what} or --{other}, not both")
    settings = settings_of(options.mode, of_mode, options.config)
    if settings:
        of_mode.set_defaults(**settings)
        options, rest = parsed(words, parser, of_mode)
    if rest:
        raise Usage(f"unrecognized arguments: {' '.join(rest)}")
    return options


def parsed(words: Sequence[str], parser: Parser, of_mode: Parser) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the words that nothing accepts.

    Arguments that may be left out may also stand behind options: argparse alone does not find them there.
    """
    options, rest = parser.parse_known_args(words)
    if not rest:
        return options, rest
    if options.mode not in SENDING_MODES:
        return of_mode.parse_known_intermixed_args(words[1:], argparse.Namespace(mode=options.mode))
    end = rest.index("--") if "--" in rest else len(rest)
    if not any(word.startswith("-") for word in rest[:end]):
        options.text, rest = options.text + rest[:end] + rest[end + 1:], []
    return options, rest


ENVIRONMENT = {"server": "UDPCHAT_SERVER", "server-key": "UDPCHAT_SERVER_KEY", "nick": "UDPCHAT_NICK",
               "color": "NO_COLOR"}     # they win over the file
NO_SETTINGS = frozenset({"help", "config", "forget"})       # options that mean one call


def config_path() -> str | None:
    """Return where the file with settings is looked for, None without a home."""
    config = config_home()
    return os.path.join(config, "config") if config is not None else None


def settings_of(mode: str, parser: Parser, given: str | None) -> dict[str, Any]:
    """Return what the file with settings says for ``mode``, by the names that ``parser`` has for it. Raise Usage.

    ``given``: the path of the file; None: it is where such files are, and need not be there.
    """
    path = given if given is not None else config_path()
    if path is None or (given is None and not os.path.exists(path)):
        return {}
    settings = {}
    try:
        known = parser.long_options
        for key, text, where in read_settings(path, mode, tuple(MODES)):
            action = known.get(key)
            if action is None or key in NO_SETTINGS:
                raise Usage(f"{where}: udpchat {mode} has no setting {key!r}")
            try:
                value = setting(action, text)
            except argparse.ArgumentTypeError as error:
                raise Usage(f"{where}: {key}: {error}") from None
            if not os.environ.get(ENVIRONMENT.get(key, "")):
                settings[action.dest] = value
    except ValueError as error:
        raise Usage(str(error)) from None
    except OSError as error:
        raise Usage(f"cannot read {path}: {error.strerror}") from None
    return settings


def setting(action: argparse.Action, text: str) -> Any:
    """Return the value that an option gets by ``text`` in the file with settings. Raise ArgumentTypeError."""
    if action.nargs == 0:       # an option without a value: on or off
        if text.lower() not in SWITCH:
            raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
        is_on = SWITCH[text.lower()]
        if action.const:
            return is_on
        return False if is_on else None     # ``no-time = no`` says nothing of the time
    if action.choices is not None and text not in action.choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(action.choices)}")
    if action.metavar == "PATH":
        return os.path.expanduser(text)
    return action.type(text) if callable(action.type) else text


def write_error(text: str) -> None:
    """Write to stderr, if there is one."""
    try:
        os.write(STDERR, text.encode("utf-8", "replace"))
    except OSError:
        pass


def complain(text: str) -> None:
    """Write one line to stderr."""
    write_error(f"udpchat: {clean(text)}\n")


def run_server(options: argparse.Namespace) -> int:
    """Run a server until a signal; return the exit code. Raise Usage and Failure."""
    from registry import Registry
    from server import Server
    family, address = resolve(options.host, options.port)
    try:
        sock = bind(family, address)
    except OSError as error:
        raise Failure(f"cannot listen at {show_address(address)}: {error.strerror}") from None
    loop = SelectorLoop()
    mailbox = open_store(options.store or default_store(sock.getsockname()[1]), loop.now())
    try:
        keys = keys_of_server(options, mailbox)
    except (Usage, Failure):
        mailbox.close()
        raise
    registry = Registry(mailbox, options.max_clients, options.mailbox_limit, options.max_nicks)
    where = unmapped(sock.getsockname())
    port = (AnsweringSocket if where[0] in WILDCARDS else UdpSocket)(sock, loop, SERVER_DATAGRAMS)
    server = Server(loop, port.send, registry, options.nick_lapse, options.stranger_replies, keys,
                    options.secure == "require", port.send_series)
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
    announce(f"[Server listening on {show_address(where)}]\n" + shown_fingerprint(keys)
             + (how_to_join(where) + "[Ctrl-C ends this server.]\n" if os.isatty(STDOUT) else ""))
    loop.run()
    loop.close()
    return 0 if server.stop() else EXIT_FAILED


def is_at_terminal() -> bool:
    """Return whether somebody started this by hand, and wants it to end when the window is closed."""
    return any(os.isatty(fd) for fd in (STDIN, STDOUT, STDERR))


def how_to_join(where: Address) -> str:
    """Return what to type on another machine, in one line: the program as it was called here."""
    program = CALLED_AS.get(os.path.basename(sys.argv[0]), "udpchat")
    return f"[Join with: {program} client NICK {reachable(where[0])} {where[1]}]\n"


def announce(lines: str) -> None:
    """Write lines to stdout, whatever that is; wait for a slow reader."""
    data = lines.encode()
    try:
        is_file = stat.S_ISREG(os.fstat(STDOUT).st_mode)
        put = LineFile(STDOUT).put if is_file else functools.partial(os.write, STDOUT)
        while data:
            data = data[put(data):]
    except OSError as error:
        complain_of_stdout(error)


def complain_of_stdout(error: OSError) -> None:
    """Say why stdout cannot be written, unless it only has no reader any more."""
    if not isinstance(error, ConnectionError):
        complain(f"cannot write to stdout: {error.strerror}")


def sodium_for(options: argparse.Namespace) -> Sodium | None:
    """Return what encrypts, None if nothing does. Raise Usage if something must."""
    if options.secure == "off":
        return None
    from secure import load_sodium
    sodium = load_sodium()
    if sodium is None and options.secure == "require":
        raise Usage("--secure require takes the extra secure: pip install 'udpchat[secure]'")
    return sodium


def keys_of_server(options: argparse.Namespace, mailbox: Mailbox) -> Keys | None:
    """Return what a server encrypts with, None to speak in plain. Raise Usage and Failure."""
    from home import StoreError
    try:
        sodium = sodium_for(options)
        if sodium is not None:
            from secure import Keys, KeyPair
            return Keys(sodium, KeyPair(sodium, mailbox.server_secret(os.urandom(SECRET_BYTES))), new_secret)
        if mailbox.has_keys and options.secure != "off":
            raise Failure("the store is that of a server that encrypts, which takes the extra secure:"
                          " pip install 'udpchat[secure]'")
        return None
    except StoreError as error:
        raise Failure(str(error)) from None


def keys_of_client(sodium: Sodium | None, secret: bytes | None) -> Keys | None:
    """Return what a client encrypts with, None to speak in plain; ``secret``: the user's, if any."""
    if sodium is None:
        return None
    from secure import Keys, KeyPair, static_secret
    return Keys(sodium, KeyPair(sodium, static_secret(secret) if secret is not None else new_secret()), new_secret)


def tells_of_plain(options: argparse.Namespace) -> bool:
    """Return whether the user hears that a connection is not encrypted."""
    return not (options.mode != "client" and options.quiet)


def given_key_of_server(options: argparse.Namespace) -> str:
    """Return the fingerprint that the user has given for the server, "" for none. Raise Usage."""
    return options.server_key or from_environment("UDPCHAT_SERVER_KEY", fingerprint_argument) or ""


def pin_of(options: argparse.Namespace, server: Address, warns: bool) -> tuple[Pin, KnownKeys]:
    """Return which key the server must have, and the keys that others have had. Raise Usage and Failure.

    Those that are new are remembered. ``warns``: the user has not heard yet that nothing can be.
    """
    digits, state = given_key_of_server(options), state_home()
    if state is None:
        if warns:
            log.warning("the key of the server is not remembered: there is no home directory")
        return Pin(None, digits), KnownKeys()
    host, port = server
    name, path = f"[{host}]:{port}" if ":" in host else f"{host.lower()}:{port}", os.path.join(state, "known")
    try:
        known = KnownKeys(path)
    except OSError as error:
        raise Failure(f"the keys of servers in {path}: {error.strerror}") from None

    def keep(key: bytes) -> None:
        try:
            known.add_server(name, key)
        except OSError as error:
            if warns:
                log.warning("the key of the server is not remembered: %s: %s", path, error.strerror)
    return Pin(known.server(name), digits, keep), known


def new_secret() -> bytes:
    """Return random bytes that nobody guesses."""
    return os.urandom(SECRET_BYTES)


def shown_fingerprint(keys: Keys | None) -> str:
    """Return the line by which people compare the key of a server that encrypts."""
    if keys is None:
        return ""
    return f"[Fingerprint {fingerprint(keys.pair.public)}]\n"


def default_store(port: int) -> str:
    """Return where the store of the server at ``port`` is. Raise Usage without a home."""
    state = state_home()
    if state is None:
        raise Usage("there is no home directory: say with --store where the store is")
    return os.path.join(state, f"server-{port}.db")


def open_store(path: str, now: float = 0.0) -> Mailbox:
    """Open or make the store at ``path``, and its directory if it is ours; ``now``: monotonic time. Raise Failure."""
    from home import Mailbox, StoreError
    state = state_home()
    try:
        if state is not None and os.path.dirname(path) == state:
            os.makedirs(state, mode=0o700, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot make {state}: {error.strerror}") from None
    try:
        if path != ":memory:":
            check_store(path)           # what is not ours is left as it is
            for file in (path, os.path.realpath(path) + "-wal"):
                if file == path or os.path.exists(file):
                    make_private(file)
        return Mailbox(path, os.urandom(SESSION_BYTES), now)
    except OSError as error:
        raise Failure(f"cannot open the store {path}: {error.strerror}") from None
    except StoreError as error:
        raise Failure(str(error)) from None


def forget(options: argparse.Namespace) -> int:
    """Free a nick in a store that no server has open; return the exit code. Raise Failure."""
    from registry import Registry
    path = options.store or default_store(options.port)
    if not os.path.exists(path):
        raise Failure(f"there is no store {path}")
    mailbox = open_store(path)
    registry = Registry(mailbox)
    known = mailbox.known.get(registry.table.spelling_of(options.forget) or "")
    done = known is not None and registry.forget(known.nick) and mailbox.commit(0.0)
    mailbox.close()
    if known is None:
        alike = " or ".join(registry.table.spellings.of(options.forget))
        raise Failure(f"{options.forget} is not known" + (f": is it {alike}?" if alike else ""))
    if not done:
        raise Failure(f"the store {path} cannot be written: {mailbox.failure}")
    log.warning("%s is forgotten, with %d messages", known.nick, known.messages)
    return 0


def secret_of(options: argparse.Namespace, encrypts: bool = False) -> bytes | None:
    """Return the user's secret, None for an anonymous client; ``encrypts``: the client does. Raise Usage."""
    if options.anonymous:
        return None
    state = state_home()
    outcome = "anonymous, the nick is nobody's" + (", and no key of a server is remembered" if encrypts else "")
    if options.identity is None and state is None:
        log.warning("no identity (there is no home directory): %s", outcome)
        return None
    path = options.identity or os.path.join(state or "", "identity")
    try:
        secret = load_secret(path)
        if not is_private(path):
            log.warning("the identity %s can be read by others, who can take your nicks: chmod 600 it", path)
        return secret
    except OSError as error:
        if options.identity or error.errno == errno.EINVAL:     # a broken one: nobody should lose a nick unawares
            raise Usage(f"the identity {path}: {error.strerror}") from None
        log.warning("no identity (%s: %s): %s", path, error.strerror, outcome)
        return None


def login_name() -> str:
    """Return the name of the user. Raise Usage if that is no nick."""
    import getpass
    try:
        return nick_argument(getpass.getuser())
    except (argparse.ArgumentTypeError, KeyError, OSError, ImportError):
        raise Usage("your login name is not a nick: give one") from None


def own_nick(options: argparse.Namespace) -> str:
    """Return our nick: as given, as UDPCHAT_NICK says, or the login name. Raise Usage if that is none.

    Whoever only asks who is there has no nick of his own: one that nobody else has, because nobody sees it.
    """
    if options.mode == "who":
        return f"visitor-{os.urandom(8).hex()}"
    given = options.own_nick if options.own_nick is not None else options.nick
    if given is not None:
        return str(given)
    return from_environment("UDPCHAT_NICK", nick_argument) or login_name()


def from_environment(name: str, meaning: Callable[[str], Any]) -> Any:
    """Return the ``meaning`` of a variable, None if it is not set. Raise Usage."""
    text = os.environ.get(name)
    try:
        return meaning(text) if text else None
    except argparse.ArgumentTypeError as error:
        raise Usage(f"{name}: {error}") from None


def server_of(options: argparse.Namespace) -> Address:
    """Return where the server is: as given, as UDPCHAT_SERVER says (HOST[:PORT]), or here. Raise Usage."""
    if options.server_host is not None and options.server_port is not None:
        return options.server_host.removeprefix("[").removesuffix("]"), options.server_port
    if options.server_host is None and options.server is not None:
        return options.server[0], options.server[1]
    if options.server_host is None:
        return from_environment("UDPCHAT_SERVER", server_argument) or server_argument("127.0.0.1")
    try:
        return server_argument(options.server_host)
    except argparse.ArgumentTypeError as error:
        raise Usage(f"SERVER-HOST: {error}") from None


def server_argument(text: str) -> Address:
    """Return host and port of ``HOST``, ``HOST:PORT``, ``[IPV6]:PORT`` or an IPv6 address: an argument type."""
    parts = re.fullmatch(r"\[(.*)\](?::(.*))?|([^:]*)(?::([^:]*))?", text)
    if parts is None:                   # an IPv6 address
        last = re.fullmatch(r"(.*):([0-9]{4,5})", text)
        if last is not None and int(last[2]) < 65536 and not (text.count(":") == 7 and "::" not in text):
            before = last[1] + ":" if last[1].endswith(":") else last[1]
            raise argparse.ArgumentTypeError(f"{text} may be an address, or an address and a port:"
                                             f" write [{text}] or [{before}]:{last[2]}")
        return text, DEFAULT_PORT
    if parts.group(1):
        host, port = parts.group(1), parts.group(2)
    else:
        host, port = parts.group(3) or "", parts.group(4)
    if re.fullmatch("[0-9]{0,5}", host):    # as a host, 4119 is 0.0.16.23: nobody means that
        raise argparse.ArgumentTypeError(f"{text!r} names no host: HOST, or HOST:PORT")
    return host, DEFAULT_PORT if port is None else whole_number(1, 65535, "a port")(port)


def formatter_for(options: argparse.Namespace, nick: str, wall: Callable[[], float], is_terminal: bool,
                  style: Style | None) -> TextFormatter:
    """Return how events are told: as objects, as plain lines, or as lines for people."""
    from home import FOR_PEOPLE, ROUTINE, STATUS
    from terminal import DATE_AND_TIME, TIME_OF_DAY, AnswerFormatter, JsonFormatter, ScreenFormatter, TextFormatter
    hidden: frozenset[str] = frozenset()
    if options.quiet:
        hidden = STATUS
    elif options.mode == "send":
        hidden = ROUTINE
    if options.json:
        return JsonFormatter(nick, wall, hidden)
    if options.mode == "ask":
        return AnswerFormatter(hidden=hidden)
    timed = options.time
    if timed is None:
        timed = options.date or (is_terminal and options.mode == "client")
    if not is_terminal:
        hidden |= FOR_PEOPLE
    stamp = DATE_AND_TIME if options.date else TIME_OF_DAY
    kind = ScreenFormatter if is_terminal and options.mode == "client" else TextFormatter
    return kind(style, wall if timed else None, hidden, options.bell and is_terminal, stamp)


def text_to_send(options: argparse.Namespace, end: float) -> tuple[str, int]:
    """Return what ``udpchat send`` or ``ask`` sends: its arguments, or all of stdin but the line ends at its end.

    Behind it the bytes of a text that is too long to be kept, else 0. Other modes: "" and 0. ``end``: when the text
    must be there, by the monotonic clock. Raise Failure.
    """
    if options.mode not in SENDING_MODES:
        return "", 0
    if options.text:        # an argument that is no UTF-8 comes as surrogates (PEP 383)
        return " ".join(options.text).encode("utf-8", "surrogateescape").decode("utf-8", "replace"), 0
    data, size, line_feeds = b"", 0, 0
    try:
        while size < STDIN_COUNTED:
            left = end - time.monotonic()
            if left <= 0:
                raise Failure("nothing was sent: the text did not come in time")
            if select.select([STDIN], [], [], min(left, MAX_WAIT))[0]:
                more = read_some(STDIN)
                if more == b"":
                    break
                if more:
                    data += more[:STDIN_LIMIT - len(data)]
                    size += len(more)
                    rest = more.rstrip(b"\n")
                    line_feeds = len(more) - len(rest) if rest else line_feeds + len(more)
    except OSError as error:
        raise Failure(f"nothing was sent: cannot read stdin: {error.strerror}") from None
    text = data.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace")
    return without_line_ends(text), size - line_feeds if size > STDIN_LIMIT else 0


def style_for(options: argparse.Namespace, is_terminal: bool) -> Style | None:
    """Return how texts are set off, None for scripts."""
    if not is_terminal and options.color != "always":
        return None
    from editor import Style, wants_color
    return Style(wants_color(options.color, is_terminal, os.environ))


def prompt_for(options: argparse.Namespace, is_terminal: bool, output: Output, style: Style | None,
               complete: Callable[[str], tuple[int, list[str]]]) -> Prompt | None:
    """Return what stands at the bottom of the terminal, if anything does. ``is_terminal``: stdin is one, too."""
    is_dumb = os.environ.get("TERM") == "dumb"
    if options.mode == "send":
        is_shown = os.isatty(STDOUT) and not (is_dumb or options.json or options.quiet)
    else:
        is_shown = is_terminal and options.mode == "client"
    if not is_shown:
        return None
    from editor import Editor, EditorScreen, History, Prompt, StatusRow, Style, Tty, wraps_again
    from terminal import BLOCK_PREFIX, COMMAND_MARK
    style = Style(False) if style is None else style
    tty = Tty(STDIN, STDOUT, wraps_again(os.environ), bool(os.environ.get("TMUX")))
    if options.mode == "send":
        return StatusRow(output.write, tty, style)
    if is_dumb:
        return Prompt(tty)
    state = state_home()
    history = History(os.path.join(state, "history") if state is not None else None)
    editor = Editor(history, complete, BLOCK_PREFIX, COMMAND_MARK)
    return EditorScreen(output.write, output.flush, tty, style, editor)


def run_client(options: argparse.Namespace, error_writer: Writer, errors: Output) -> int:
    """Run a client, or send or receive some messages; return the exit code. Raise Usage and Failure."""
    from client import Client
    from registry import Patience
    from terminal import HANDED_LIMIT, Console, Display
    end = time.monotonic() + (options.timeout or NEVER)
    nick, (host, server_port) = own_nick(options), server_of(options)
    addresses, is_named = in_turns(look_up_patiently(host, server_port, end)), not is_number(host)
    text, size = text_to_send(options, end)
    if is_nothing(options, text, size):
        return 0
    sodium = sodium_for(options)
    secret = secret_of(options, sodium is not None)
    own = functools.partial(own_socket, options, nick, secret)
    paths = [own(address) for address in addresses]
    sock = client_of_same_user(options, paths, nick, end)
    if sock is not None:
        return hand_over(options, nick, sock, text, size, end, errors)
    shown = shown_messages(options, nick)
    loop = SelectorLoop()
    udp = client_socket(addresses, is_named, options.client_port)
    port, reader, writer = UdpSocket(udp, loop), Reader(STDIN), Writer(STDOUT)
    output = Output(writer.put)
    is_terminal = reader.is_terminal and writer.is_terminal and not options.json
    style = style_for(options, is_terminal)
    # a lambda, because the client is made below
    prompt = prompt_for(options, is_terminal, output, style, lambda before: client.shell.complete(before))
    display = Display(output, errors, formatter_for(options, nick, loop.wall, is_terminal, style), prompt)
    display.names_saved = names_saved(options)
    look_up_again = NameLookUp(loop, host, server_port, udp.family)
    server = Endpoint(loop, addresses, look_up_again if is_named else None)
    handshake = handshake_for(options, port, secret, keys_of_client(sodium, secret), (host, server_port))
    patience = Patience(end < NEVER, nick_patience(options.mode, secret is not None))
    client = Client(loop, port.send, display, nick, server, handshake, options.ack_timeout / 1000, options.stay,
                    reader.is_terminal, patience=patience, selection=selection_for(options, shown))
    willing = list[socket.socket]()
    patience.on_wait = functools.partial(look_again, options, paths, client, loop, willing)
    local = LocalSocket(loop, HANDED_LIMIT, client.takes_messages, client.shell.hand_over)
    client.on_joined = lambda: join(options, client, shown, local, own(server.current))
    client.receiving.before_showing = functools.partial(restore_news, client, shown)
    show_log_above_prompt(display)
    port.receive = client.receive
    console = Console(loop, client, client.leaving, client.shell, display, reader, writer, error_writer)
    end_in_order_on_signals(loop, client.leaving.interrupt)
    feed_job(options, client.shell, text, size)
    call_at_the_end(loop, end, client.leaving.time_is_over)
    try:
        console.start()
        client.start()
        loop.run()
    finally:
        local.close()
        look_up_again.close()
        console.close()
        loop.close()
    if willing and not client.leaving.is_over:      # if it is, the text was named as not delivered in the same turn
        return hand_over(options, nick, willing[0], text, size, end, errors)
    if is_terminal:
        remember_nicks([nick for nick, *_ in client.clients()])
    return checked(client.leaving.exit_code or 0, output, writer)


def is_nothing(options: argparse.Namespace, text: str, size: int) -> bool:
    """Return whether there is no text on stdin, and nothing is to be sent then."""
    return options.mode == "send" and options.skip_empty and not (text or size or options.text)


def feed_job(options: argparse.Namespace, shell: Shell, text: str, size: int) -> None:
    """Let a client that reads no commands do what its command line says."""
    if options.mode in SENDING_MODES:
        shell.put(options.nicks, text, size)
    elif options.mode == "who":
        shell.feed(b"who\n")
    if options.mode != "client":
        shell.feed(b"")


def client_of_same_user(options: argparse.Namespace, paths: Sequence[str], nick: str,
                        end: float) -> socket.socket | None:
    """Return a connection to the client of the same user that has the nick; None: there is none. Raise Failure.

    ``paths``: where it may be. ``end``: when the time is over, by the monotonic clock.
    """
    if options.mode == "client":
        return None
    sock = visit(paths, max(0.1, min(GREETING_TIME, end - time.monotonic())))
    if sock is not None and options.mode != "send":
        sock.close()
        raise Failure(f"a client of yours runs as {nick}: what comes for {nick} is shown there")
    return sock


def look_again(options: argparse.Namespace, paths: Sequence[str], client: Client, loop: SelectorLoop,
               willing: list[socket.socket]) -> None:
    """Stop the loop if the client of the same user, which has the nick, is willing by now, and we have sent nothing."""
    may_go = options.mode == "send" and client.link.is_starting and client.leaving.may_go_on and not willing
    sock = visit(paths, VISIT_TIME) if may_go else None
    if sock is not None:
        willing.append(sock)
        loop.stop()


def own_socket(options: argparse.Namespace, nick: str, secret: bytes | None, server: Address) -> str:
    """Return where a client of the same user, with that nick at that server, can be found; "": nowhere.

    Only one that would do the same with a message is meant: which keys are in force, and whether plain is, counts, too.
    """
    state = state_home()
    if state is None or secret is None:
        return ""
    which = (show_address(server), folded(nick), options.secure, given_key_of_server(options))
    return socket_path(state, secret, *(part.encode() for part in which))


def hand_over(options: argparse.Namespace, nick: str, sock: socket.socket, text: str, size: int, end: float,
              errors: Output) -> int:
    """Hand a message to the client of the same user that has the nick; return the exit code."""
    from terminal import Display, HandOver
    loop, writer = SelectorLoop(), Writer(STDOUT)
    is_terminal = os.isatty(STDIN) and writer.is_terminal and not options.json
    formatter = formatter_for(options, nick, loop.wall, is_terminal, style_for(options, is_terminal))
    display = Display(Output(writer.put), errors, formatter)
    display.names_saved = names_saved(options)
    handed = HandOver(loop, sock, display, options.nicks, text, size, end < NEVER)
    end_in_order_on_signals(loop, lambda: handed.give_up("nobody waits for it any more"))
    call_at_the_end(loop, end, lambda: handed.give_up("the time is over"))
    loop.run()
    loop.close()
    return checked(handed.exit_code, display.output, writer)


def names_saved(options: argparse.Namespace) -> bool:
    """Return whether stderr says for whom the server has saved a message."""
    return options.mode == "send" and len(options.nicks) > 1 and not (options.json or options.quiet)


def shown_messages(options: argparse.Namespace, nick: str) -> ShownMessages | None:
    """Return where is noted what ``recv`` and ``ask`` have shown of the messages for a nick, None where nothing is."""
    state = state_home()
    if state is None or options.mode not in ("client", "recv", "ask"):
        return None
    return ShownMessages(os.path.join(state, f"shown-{folded(nick)}"))


def join(options: argparse.Namespace, client: Client, shown: ShownMessages | None, local: LocalSocket,
         path: str) -> None:
    """Do what follows when a client has the nick: nobody else shows messages for it, or sends under it, from now on.

    ``path``: where programs of the same user find it.
    """
    restore_shown(client, shown)
    if options.mode == "client":
        local.open(path)


def restore_shown(client: Client, shown: ShownMessages | None) -> None:
    """Tell a client which messages for its nick other programs have shown."""
    try:
        if shown is not None:
            client.inbox.restore(shown.load())
    except OSError as error:
        log.warning("what was shown before may come again: %s: %s", error.filename, error.strerror)


def restore_news(client: Client, shown: ShownMessages | None) -> None:
    """Tell a client what other programs have shown while it was stopped."""
    if shown is not None and shown.has_news():
        restore_shown(client, shown)


def selection_for(options: argparse.Namespace, shown: ShownMessages | None) -> Selection | None:
    """Return which messages are shown, None for all."""
    if options.mode not in ("recv", "ask"):
        return None
    from conversation import Selection
    note = functools.partial(note_shown, shown) if shown is not None else None
    if options.mode == "ask":
        return Selection(1, options.nicks[0], True, note)
    return Selection(options.count, options.sender, False, note)


def note_shown(shown: ShownMessages, sender: str, stream: int, first: int, end: int) -> None:
    """Note what was shown, see ``Selection``; say once if that fails."""
    try:
        shown.note(sender, stream, first, end)
    except OSError as error:
        if not shown.has_failed:
            log.warning("it is not noted what was shown, so it may come again: %s", error.strerror)
        shown.has_failed = True


def handshake_for(options: argparse.Namespace, port: UdpSocket, secret: bytes | None, keys: Keys | None,
                  server: Address) -> Handshake:
    """Return what registers a client at a server. Raise Usage and Failure."""
    from secure import Handshake
    pin, known = None, None
    if keys is not None:
        pin, known = pin_of(options, server, warns=secret is not None or options.anonymous)
    elif options.secure != "off" and given_key_of_server(options):
        raise Failure("a server whose key is given is not spoken to in plain, and what encrypts is not there"
                      " (pip install 'udpchat[secure]')")
    handshake = Handshake(port.send, proof_of(secret), port.own_address, keys, options.secure == "require", pin, known,
                          options.mode == "who")
    handshake.tells_of_plain &= tells_of_plain(options)
    return handshake


def proof_of(secret: bytes | None) -> Callable[[bytes, str], bytes] | None:
    """Return what makes the token for (server id, nick), None for an anonymous client."""
    from secure import token_for
    return functools.partial(token_for, secret) if secret is not None else None


def nick_patience(mode: str, has_proof: bool) -> float:
    """Return for how many s a nick that is in use is waited for: without a proof it may be a stranger's."""
    return NICK_PATIENCE if mode != "client" and has_proof else 0.0


def show_log_above_prompt(display: Display) -> None:
    """Keep the log from being written over the prompt, if both are on one terminal."""
    is_on_stderr = log.output is display.errors
    if display.prompt is not None and is_on_stderr and os.fstat(STDOUT).st_rdev == os.fstat(STDERR).st_rdev:
        log.output = Output(display.show_log)


def checked(exit_code: int, output: Output, writer: Writer) -> int:
    """Return an exit code, or another one if the file that is stdout has not kept what it was given; say so then."""
    try:
        if not output.broken:
            writer.check()
    except OSError as error:
        complain_of_stdout(error)
        return EXIT_FAILED
    return exit_code


def end_in_order_on_signals(loop: SelectorLoop, interrupt: Callable[[], None]) -> None:
    """Call ``interrupt`` in the loop for each signal that would end the program, but for those that are ignored."""
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.on_signal(number, interrupt)


def set_up_log(options: argparse.Namespace) -> tuple[Writer, Output]:
    """Set up the log; return stderr and its backlog. Raise Failure if the log file cannot be opened."""
    writer = Writer(STDERR)
    output = Output(writer.put_later if options.mode == "server" else writer.put)
    log.level, log.output = LEVELS.index(options.log_level), output
    if options.log_format == "json":
        log.line = json_line
    if options.log_file is not None:
        try:
            log.write_to(LogFile(options.log_file))
        except OSError as error:
            raise Failure(f"cannot open the log {options.log_file}: {error.strerror}") from None
    return writer, output


def end_at_once_on_signals(mode: str) -> None:
    """End at once on SIGINT and SIGTERM, until the loop handles signals.

    Meanwhile a name is looked up, a file or a text is read. An exception would not do: where Python calls back by
    itself (in an import, say) it is printed and gets lost.
    """
    def end(*_: object) -> None:
        if mode in SENDING_MODES:
            complain("nothing was sent: interrupted")
        os._exit(EXIT_FAILED if mode in JOB_MODES else 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
    if mode == "server":        # asked for too soon, the counters are not there yet, and the log is new
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if not is_at_terminal():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)


def import_mode(mode: str) -> None:
    """Import the modules of a mode, while the garbage collector rests."""
    gc.disable()
    if mode == "server":
        import server   # noqa: F401
    else:
        import client   # noqa: F401
        if not os.path.exists(__file__):
            # It is in an archive. Once that is replaced by another, Python finds no module in it: none is read later.
            import editor   # noqa: F401
    gc.freeze()
    gc.set_threshold(GARBAGE_GAP)
    gc.enable()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    keep_standard_descriptors()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        write_error(build_parser()[0].format_help())
        return EXIT_USAGE
    end_at_once_on_signals(words[0])
    try:
        options = parse(words)
        import_mode(options.mode)
        errors = set_up_log(options)
        if options.mode != "server":
            return run_client(options, *errors)
        return run_server(options) if options.forget is None else forget(options)
    except Usage as error:
        complain(str(error))
        return EXIT_USAGE
    except Failure as error:
        complain(str(error))
        return EXIT_FAILED
    except OSError as error:        # what nobody has foreseen: too few descriptors, say
        complain(error.strerror or str(error))
        return EXIT_FAILED


def run() -> NoReturn:
    """Run the program, and end it without the clean-up of Python; ``main`` leaves that to its caller.

    What must be written, or given back, is by then: the store, the terminal, sockets with names. To free object by
    object what the kernel frees at once would take 4 ms, a tenth of the time of ``udpchat send``. What reports behind
    the end of a program, such as a profiler, calls ``main``.
    """
    try:
        code = main()
    except SystemExit as end:       # argparse has shown the help, or the version
        code = int(end.code or 0)
    os._exit(code)


if __name__ == "__main__":
    run()
