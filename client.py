"""The client."""
from __future__ import annotations

import selectors
import signal
import sys
import unicodedata
from collections import OrderedDict, deque
from typing import (Any, NamedTuple)
from collections.abc import Callable, Sequence

from protocol import (MAX_TEXT, PROOF_BYTES, REG_SIZE, SESSION_SIZE, SYNC_PAGES, Address, Decoder, Info,
                      are_short, encode, padded, since_of, split_text)
from stream import NEVER, SendStream
from registry import ONLINE, Mirror, Page, Table
from loop import (OUTPUT_LIMIT, Loop, Output, Reader, RestartableTimer, SelectorLoop, Writer, clean, jittered, log,
                  new_id, show_address)
from conversation import (ACK_TIMEOUT, DIRECT, RECEIVED, REFUSED, SAVED, SERVER_ATTEMPTS, SERVER_INTERVAL, SILENT,
                          Event, Inbox, Outbox, Place)
from editor import Action
from terminal import Board, Commands, Desk, Lines, Prompt, Sends
from home import token_for


REQUEST_INTERVAL = SERVER_INTERVAL     # s between attempts of a request to the server
REQUEST_ATTEMPTS = SERVER_ATTEMPTS
PING_INTERVAL = 15.0      # s between pings
LOST_PING_INTERVAL = 2.0  # s between pings while the server is silent
SYNC_INTERVAL = 0.2       # s between questions for what is missing of the table
OLD_TABLE_TIME = 30.0     # s that the table of a server that restarted stays in force while the new one comes
ANSWER_LIMIT = 2 ** 20     # bytes of backlog for stdout at which no command is read: its writer may not read meanwhile
LINES_PER_TURN = 512      # of stdin that are carried out before the network gets its turn; sends to one nick are one
END_TIME = 1.5            # s after Ctrl-C until what is not closed counts as not delivered
LAST_TIME = 1.9           # s after Ctrl-C until the program ends, whatever is not written yet: two are promised
COOKIES_PER_ATTEMPT = 3        # cookies taken for one attempt to register
SHOWN_OF_LINE = 80        # characters of a line that nobody understands
STDIN_LIMIT = 4 * MAX_TEXT     # bytes that ``send`` reads; that is too long anyway
LAST_REQUEST_INTERVAL = 0.1     # s between attempts to deregister when there is no time left
WAIT_SHOWN = 1.0          # s that a message waits before a terminal shows that it does
WAITS_SHOWN = 3           # recipients named there, at most


JOINING, ACTIVE, LEAVING, AWAY, ENDED = "joining", "active", "leaving", "away", "ended"

CLOSINGS = (RECEIVED, SAVED, REFUSED)
REFUSALS = ("unknown", "full", "disk")      # that have a line of their own

HELP = """\
send NICK MESSAGE   send MESSAGE (the rest of the line) to NICK
talk NICK           send every line to NICK from now on; commands then begin with / (/who, /end ends it)
dereg NICK          go offline (NICK: your own)
reg NICK            come online again
who                 show everybody who is known
help                show this
quit                go offline and end
"""


class Sent(NamedTuple):
    """A message on its way: what an event says of which one it is."""

    number: int         # the first that it takes in its stream
    id: str
    ref: object         # what its sender calls it
    began: float        # s, when it was queued


class Request:
    """Something that the server is asked until it answers: five times, 500 ms apart."""

    def __init__(self, loop: Loop, ask: Callable[[], None], unanswered: Callable[[], None]) -> None:
        self._loop = loop
        self._ask = ask
        self._unanswered = unanswered
        self._interval = REQUEST_INTERVAL
        self._attempts = 0
        self._alarm = RestartableTimer(loop, self._again)

    @property
    def is_running(self) -> bool:
        """Whether an answer is awaited."""
        return self._alarm.is_set

    def start(self) -> None:
        """Asks for the first time."""
        self._attempts = 0
        self._again()

    def hurry(self, interval: float) -> None:
        """Asks more often, from the next start on."""
        self._interval = interval

    def stop(self) -> None:
        """The answer is here, or nobody wants it any more."""
        self._alarm.cancel()

    def _again(self) -> None:
        if self._attempts < REQUEST_ATTEMPTS:
            self._attempts += 1
            self._alarm.set(self._loop.now() + jittered(self._loop, self._interval))
            self._ask()
        elif self._loop.drained:
            self._unanswered()
        else:
            self._alarm.set(self._loop.now())


class Client:
    """One user: commands come in by ``feed``, datagrams by ``receive``, lines go to the output.

    ``settle`` ends each turn. ``hungry`` tells whether commands may be read, ``exit_code`` is None until the end.
    """

    def __init__(self, loop: Loop, send: Callable[[bytes, Address], None], output: Output, nick: str, server: Address,
                 secret: bytes | None = None, ack_timeout: float = ACK_TIMEOUT, stay: bool = False,
                 errors: Output | None = None, lines: Lines | None = None, prompt: Prompt | None = None) -> None:
        self.loop = loop
        self.output = output
        self.errors = errors if errors is not None else Output(len)
        self.lines = lines if lines is not None else Lines()
        self.nick = nick
        self.server = server                    # where it is asked,
        self._given_server = server             # where it was said to be, and so is asked for a session,
        self._other_server = server             # and where it is asked next, if it is silent
        self.exit_code: int | None = None
        self.hungry = False                     # whether stdin may be read now
        self.decoder = Decoder()
        self.state = JOINING
        self._send_now = send
        self._secret = secret
        self._stay = stay
        self._prompt = prompt                   # on a terminal
        self._write = output.write if prompt is None else self._write_above     # to stdout
        self._on_its_way: dict[str, deque[Sent]] = {}   # to whom what was sent, if anybody wants to know of which
        self._keeps_track = self.lines.is_for_programs or prompt is not None
        # what the server gave
        self._session: bytes | None = None
        self._server_id: bytes | None = None
        self._cookie: bytes | None = None
        self._cookies_left = 0
        self._reg_id = 0
        self._mirror = Mirror()
        self._pages = 0                         # that came since the last sync ...
        self._synced = -NEVER                   # ... and when that was
        self._confirmed = False                 # the server was told, in this session, that the table is here
        self._visible = False                   # online in one's own table
        self._greeted = False                   # "[You have messages]" was shown for this coming online
        self._heard = False                     # the server has spoken in this turn
        self._was_visible = False               # commands are carried out since then
        self._pings: OrderedDict[int, float] = OrderedDict()      # id -> when it was sent
        self._request = Request(loop, self._send_reg, self._reg_unanswered)
        self._dereg = Request(loop, self._send_dereg, self._dereg_unanswered)
        self._ping = Request(loop, self._send_ping, self._ping_unanswered)
        self._ping_alarm = RestartableTimer(loop, self._ping.start)
        self._sync_alarm = RestartableTimer(loop, self._send_sync)
        self._old_table_alarm = RestartableTimer(loop, self._distrust_table)
        self._hold_alarm = RestartableTimer(loop, self._look_after_holds)
        self._next_turn = RestartableTimer(loop, lambda: None)
        self._last_asked = -NEVER
        # what comes in
        self._inbox = Inbox()
        self._allowance = 0                     # bytes that may tell a stranger that this is somebody else
        self._table_news = False
        self._accepting = True                  # messages; no more once the program is about to leave
        # what goes out
        self._outbox = Outbox(nick, ack_timeout)
        self._outbox_alarm = RestartableTimer(loop, lambda: None)      # the end of the turn polls it
        # commands
        self._input = Commands(self.lines.is_for_programs)
        self._quit = ""                         # "dereg" or "quit", once that command waits for its turn
        self._ending = ""                       # "end", "quit", "signal", "reader"
        self._interrupted = False
        self._deadline = NEVER
        self._failed = False                    # some message was neither delivered nor kept
        self._undelivered = 0
        self.queued = self.closed = 0           # messages, in all
        self._result = 0
        self._wait_alarm = RestartableTimer(loop, lambda: None)        # the end of the turn shows who waits
        self._commands: dict[str, Callable[[str, Sequence[str]], None]] = {
            "talk": self._do_talk, "end": self._do_end, "dereg": self._do_dereg, "reg": self._do_reg,
            "who": self._do_who, "help": self._do_help, "quit": self._do_quit}
        self._from_peers: dict[str, Callable[[Info, Address], None]] = {
            "chat": self._on_chat, "ack": self._on_ack, "nack": self._on_nack, "cookie": self._on_cookie}
        self._from_server: dict[str, Callable[[Info], None]] = {
            "table": self._on_table, "ack": self._on_ack, "nack": self._on_nack, "exists": self._on_exists,
            "mail": self._on_mail, "refused": self._on_refused, "bye": self._on_bye}

    # lines

    def tell(self, event: str, /, times: int = 1, **fields: Any) -> None:
        """Shows a line for an event (that often)."""
        line = self.lines.event(event, **fields)
        if line:
            self._write(line.encode() * times)
        else:
            complaint = self.lines.complaint(event, **fields).encode() * times
            if complaint:
                (self.errors.write if self._prompt is None else self._write)(complaint)

    def show_log(self, data: bytes) -> int:
        """Shows lines of the log, which would go to the same terminal; gives how many bytes were taken."""
        if not self.output.has_room():
            return 0
        self._write(data)
        return len(data)

    def _write_above(self, data: bytes, written: Callable[[int], None] | None = None) -> None:
        """Appends to the output of a terminal, above the prompt."""
        if data and self._prompt is not None:
            self.output.write(self._prompt.erase())
        self.output.write(data, written)

    def _hand_back(self, nick: str, text: str, sent: Sent | None = None, ref: object = None) -> None:
        """Names a message that was not delivered, as the line that would send it again."""
        self._undelivered += 1
        ref = ref if sent is None else sent.ref
        self.errors.write(self.lines.undelivered(nick, text, ref).encode())
        self.tell("undelivered", to=nick, text=text, ref=ref, id=None if sent is None else sent.id)

    # registering

    def start(self) -> None:
        """Registers."""
        self._register()

    def _register(self) -> None:
        self.server = self._other_server = self._given_server
        self._reg_id = new_id(self.loop)
        self._cookie = None
        self._request.start()

    def _send_reg(self) -> None:
        self._cookies_left = COOKIES_PER_ATTEMPT
        self._emit_reg()

    def _emit_reg(self) -> None:
        info: Info = {"id": self._reg_id, "nick": self.nick}
        if self._cookie is not None and self._server_id is not None:
            info["cookie"] = self._cookie
            if self._secret is not None:
                info["token"] = token_for(self._secret, self._server_id, self.nick)
        self._send_now(padded("reg", info, REG_SIZE), self.server)

    def _on_cookie(self, info: Info, address: Address) -> None:
        """The server answers, maybe from another of its addresses (one that listens on all of them cannot choose).

        In this session it is asked there. Only who got the request knows its id.
        """
        if info["id"] == self._reg_id and self._request.is_running and self._cookies_left:
            self._cookies_left -= 1
            if address != self.server:
                log.info("the server answers from %s", show_address(address))
                self.server, self._other_server = address, self.server
            self._server_id, self._cookie = info["server"], info["cookie"]
            self._emit_reg()

    def _on_welcome(self, info: Info) -> None:
        if info["id"] != self._reg_id or not self._request.is_running or info["nick"] != self.nick:
            return
        self._request.stop()
        self._server_heard(same=False)
        self._session = info["session"]
        self._outbox.register(self.loop.now(), info["session"])
        self._inbox.forget_mail(self.loop.now())
        self._visible = self._greeted = self._confirmed = False
        self.state = ACTIVE
        self.tell("registered", nick=self.nick)
        self._mirror.register(info["boot"], info["version"])
        if not (self._mirror.is_of_this_boot or self._old_table_alarm.is_set):
            self._old_table_alarm.set(self.loop.now() + OLD_TABLE_TIME)
        self._plan_ping()
        if self._mirror.is_of_this_boot and self._mirror.is_whole:
            self._confirm_table()
            self._look_at_oneself()
        else:
            self._send_sync()

    def _reg_unanswered(self) -> None:
        """Five attempts without an answer end a program that starts, or that was told to come online."""
        starting = self._is_starting()
        self._server_silent(always=starting)
        if starting:
            self._give_up(1)
        else:
            self._register()

    def _is_starting(self) -> bool:
        """Whether the client has not been online since it was started, or told to come online."""
        return self.state == JOINING or self.state == ACTIVE and not self._was_visible

    def _on_refused(self, info: Info) -> None:
        if "session" in info:
            own = info["session"] == self._session and not self._request.is_running
        else:
            own = info.get("id") == self._reg_id and self._request.is_running
        if not own or self.state in (AWAY, ENDED):
            return
        reason = info["reason"]
        if reason == "replaced":    # by somebody else, or by a late copy of a request of one's own: that will be seen
            self._session_is_gone()
            return
        self._request.stop()
        if reason == "full" and not self._is_starting():
            self.loop.call_at(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL), self._try_again)
            return
        self.tell({"full": "server-full", "owned": "owned"}.get(reason, "taken"), nick=self.nick)
        self._give_up(1)

    def _try_again(self) -> None:
        """Registers, if that is still wanted: the server that restarted was full."""
        if self.state == ACTIVE and not self._request.is_running:
            self._register()

    # the server's life

    def _server_heard(self, same: bool = True) -> None:
        """Takes note that the server is there; ``same``: and still knows this session."""
        self._heard = True
        if self._outbox.server_unreachable:
            self._outbox.server_unreachable = False
            self._plan_ping()
            if same or self.lines.is_for_programs:      # people see the welcome
                self.tell("back")

    def _server_silent(self, always: bool = False) -> None:
        """Announces an outage, once; ``always``: again, because the program ends over it."""
        if not self._outbox.server_unreachable or always:
            self.tell("silent")
        if not self._outbox.server_unreachable:
            self._outbox.server_unreachable = True
            if self._session is not None:
                self._ping_alarm.set(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL))

    def _plan_ping(self) -> None:
        self._ping.stop()
        self._ping_alarm.set(self.loop.now() + jittered(self.loop, PING_INTERVAL))

    def _send_ping(self) -> None:
        if self.state == ACTIVE and self._session is not None:
            self._emit_ping(self._session)
        else:
            self._ping.stop()

    def _emit_ping(self, session: bytes) -> None:
        id_ = new_id(self.loop)
        self._pings[id_] = self.loop.now()
        while len(self._pings) > 4 * REQUEST_ATTEMPTS:
            self._pings.popitem(last=False)
        self._ask_server("ping", {"id": id_, "session": session, "version": self._mirror.version})

    def _ask_server(self, tag: str, info: Info) -> None:
        self._send_now(padded(tag, info, SESSION_SIZE), self.server)

    def _ping_unanswered(self) -> None:
        if self._is_starting():
            self._server_silent(always=True)
            self._give_up(1)
            return
        self._server_silent()
        self.server, self._other_server = self._other_server, self.server
        self._ping_alarm.set(self.loop.now() + jittered(self.loop, LOST_PING_INTERVAL))

    def _ping_now(self) -> None:
        if not self._ping.is_running:
            self._ping.start()

    def _on_pong(self, info: Info) -> None:
        if self.state not in (ACTIVE, LEAVING):
            return
        sent = self._pings.pop(info["id"], None)
        if sent is None:
            if not self._ping.is_running and self.state == ACTIVE and self.loop.now() - self._last_asked > 1.0:
                self._last_asked = self.loop.now()
                self._ping_alarm.set(self.loop.now() + self.loop.random.uniform(0, 1))
            elif self.state == LEAVING and self._dereg.is_running:
                self._leave_check()
            return
        same = info["boot"] == self._mirror.boot
        self._server_heard(same)
        if not same:
            self._session_is_gone()
            return
        self._plan_ping()
        self._inbox.answer(sent, info["mail"])
        if self._mirror.expect(info["version"]):
            self._want_sync()

    def _leave_check(self) -> None:
        """Somebody says that the server has restarted: a ping will tell whether there is anything left to leave."""
        if self.loop.now() - self._last_asked > REQUEST_INTERVAL / 2 and self._session is not None:
            self._last_asked = self.loop.now()
            self._emit_ping(self._session)

    def _session_is_gone(self) -> None:
        """The server does not know this session any more: registers again, or has nothing to leave."""
        self._ping.stop()
        self._ping_alarm.cancel()
        self._sync_alarm.cancel()
        if self.state == LEAVING:
            self._went_away()
        elif not self._request.is_running:
            log.info("the server does not know this session any more: registering again")
            self._register()

    # the table

    @property
    def table(self) -> Table:
        """Who is known, as far as this client knows."""
        return self._mirror.table

    def _send_sync(self) -> None:
        if self.state != ACTIVE or self._session is None:
            return
        self._pages = 0
        self._synced = self.loop.now()
        interval = LOST_PING_INTERVAL if self._outbox.server_unreachable else SYNC_INTERVAL
        self._sync_alarm.set(self._synced + jittered(self.loop, interval))
        self._ask_server("sync", {"session": self._session, "version": self._mirror.version})

    def _want_sync(self) -> None:
        """Asks for what is missing, at once unless that was done just now."""
        if not self._sync_alarm.is_set:
            self._sync_alarm.set(max(self.loop.now(), self._synced + SYNC_INTERVAL))

    def _on_table(self, info: Info) -> None:
        if self.state != ACTIVE:
            return
        changed = self._mirror.apply(Page(since_of(info), info["version"], info["set"]))
        if changed is None:
            self._want_sync()
            return
        self._pages += 1
        self._note_changes(changed)
        if self._mirror.is_whole:
            self._sync_alarm.cancel()
            self._old_table_alarm.cancel()
            self._confirm_table()
            if not self._visible:
                self._look_at_oneself()
        elif self._pages >= SYNC_PAGES:
            self._send_sync()
        else:
            self._sync_alarm.set(self.loop.now() + jittered(self.loop, SYNC_INTERVAL))

    def _confirm_table(self) -> None:
        """Tells the server and the user, once a session, that the table is here: changes and mail may come."""
        if not self._confirmed:
            self._confirmed = self._table_news = True
            self._ping_now()

    def _distrust_table(self) -> None:
        """The table is too old to say who is online, and there is no other: messages go to the server."""
        self._note_changes(self._mirror.distrust())

    def _note_changes(self, nicks: Sequence[str]) -> None:
        if not nicks:
            return
        self._table_news = True
        for nick in nicks:
            self._outbox.locate(self.loop.now(), nick, self._place(nick))
        if self.nick in nicks:
            self._look_at_oneself()

    def _look_at_oneself(self) -> None:
        visible = self.table.is_online(self.nick) and self._mirror.is_of_this_boot
        if self._visible and not visible:
            self._greeted = False
            self._ping_now()
        elif not visible and self._mirror.is_of_this_boot:
            self._ping_now()
        self._visible = visible
        self._was_visible = self._was_visible or visible

    def _place(self, nick: str) -> Place | None:
        entry = self.table.get(nick)
        if entry is None:
            return None
        return Place(entry.state == ONLINE, self._reach(entry.host, entry.port))

    def _reach(self, host: str, port: int) -> Address | None:
        """An address, if it is of the family of ours: others can be sent to by the server alone."""
        return (host, port) if (":" in host) == (":" in self.server[0]) else None

    # datagrams

    def receive(self, datagram: bytes, address: Address) -> None:
        """Takes a datagram from the network."""
        if self.state == ENDED:
            return
        messages = self.decoder.decode(datagram)
        if address != self.server and address != self._other_server:
            self._allowance = len(datagram)
            for tag, info in messages:
                handler = self._from_peers.get(tag)
                if handler is not None and (self.state in (ACTIVE, LEAVING) or tag == "cookie"):
                    handler(info, address)
            return
        trusted = False
        for tag, info in messages:
            if tag == "for":
                trusted = self._session is not None and info["session"] == self._session[:PROOF_BYTES]
                if trusted:
                    self._server_heard()
            elif tag == "cookie":
                self._on_cookie(info, address)
            elif tag == "welcome":
                self._on_welcome(info)
            elif tag == "pong":
                self._on_pong(info)
            elif tag == "probe":
                self._on_probe(info, trusted)
            elif tag in self._from_server and (trusted or tag in ("refused", "bye")):
                self._from_server[tag](info)

    def _on_ack(self, info: Info, address: Address | None = None) -> None:
        """Takes what a peer has received, or (without an address) what the server has kept."""
        self._outbox.on_ack(self.loop.now(), info, address)

    def _on_nack(self, info: Info, address: Address | None = None) -> None:
        """Takes what a peer, or (without an address) the server, refuses."""
        self._outbox.on_nack(self.loop.now(), info, address)

    def _on_probe(self, info: Info, trusted: bool) -> None:
        if info["to"] == self.nick and self.state in (ACTIVE, LEAVING) and self._session is not None:
            answer: Info = {"id": info["id"], "nick": self.nick}
            if trusted:
                answer["session"] = self._session
            self._send_now(encode("alive", answer), self.server)

    def _on_exists(self, info: Info) -> None:
        _, host, port, _ = info["entry"]
        self._outbox.on_exists(self.loop.now(), info, self._reach(host, port))

    # what comes in

    def _on_chat(self, info: Info, address: Address) -> None:
        sender = info["from"]
        if info["to"] != self.nick:
            nack = encode("nack", {"stream": info["stream"], "first": info["n"], "reason": "not-me",
                                   "last": info["n"] + len(info["text"]) - 1})
            if len(nack) <= self._allowance:
                self._allowance -= len(nack)
                self._send_now(nack, address)
            return
        entry = self._mirror.table.entries.get(sender)
        if entry is None or entry.state != ONLINE or (entry.host, entry.port) != address:
            self._want_sync()
            return
        self._inbox.on_chat(self.loop.now(), info, address, self._accepting)
        if self._inbox.holding:
            self._ask_about_mail()

    def _on_mail(self, info: Info) -> None:
        if info["to"] == self.nick and self._mirror.is_of_this_boot and self._accepting:
            self._inbox.on_mail(self.loop.now(), info)

    def _ask_about_mail(self) -> None:
        """Asks, now and again while a stream is held, how much mail there is: what is missing there may be in it."""
        if not self._hold_alarm.is_set and self.state == ACTIVE:
            self._hold_alarm.set(self.loop.now() + jittered(self.loop, REQUEST_INTERVAL))
            if self._inbox.is_asking:
                self._send_ping()

    def _look_after_holds(self) -> None:
        if self.loop.drained:
            self._inbox.expire(self.loop.now())
        if self._inbox.holding:
            self._ask_about_mail()

    # showing

    def _show(self) -> None:
        """Hands to the output what is ready, as long as it has room."""
        for delivery in self._inbox.take(self.loop.now(), self.output.has_room):
            via = "direct"
            if delivery.times:
                via = "relay" if self._visible else "mail"
                self._greet()
            shown = self.lines.messages(delivery, via) if delivery.texts else ""
            self._write(shown.encode(), delivery.written)
        if self._inbox.holding:
            self._ask_about_mail()

    def _greet(self) -> None:
        """Announces the mail that comes first after coming online."""
        if not self._greeted and not self._visible:
            self.tell("mail")
        self._greeted = True

    # commands

    def _takes_commands(self) -> bool:
        """Whether commands count: online for everybody to see (not only at the start), or away; not while leaving."""
        return (self.state == ACTIVE and self._was_visible or self.state == AWAY) and not (self._quit or self._ending)

    def _may_command(self) -> bool:
        """Whether one is carried out now: there is room for what it may say, too."""
        return (self._takes_commands() and self.output.pending < ANSWER_LIMIT and self.errors.pending < OUTPUT_LIMIT)

    def feed(self, data: bytes) -> None:
        """Takes what was read from stdin; b"" at its end."""
        if self._prompt is not None and b"\n" in data:
            self._prompt.answered()
        self._input.feed(data)

    def enter(self, lines: Sequence[str], pasted: bool = False) -> None:
        """Takes lines that somebody typed at a terminal, see ``Commands``."""
        if not self._ending:
            self._input.enter(lines, pasted)

    def put(self, nick: str, text: str) -> None:
        """Takes one text for one nick, as if it had come in by ``feed``."""
        self._input.put(Sends(nick, [text]))

    def _carry_out(self) -> None:
        """Carries out the commands that wait, in order, as far as that is possible now."""
        for _ in range(LINES_PER_TURN):
            if not self._input.waiting or not self._may_command():
                return
            command = self._input.take()
            if command.shown:
                self._write((clean(command.shown) + "\n").encode("utf-8", "replace"))
            if command.sends is not None:
                if not self._do_sends(command.sends):
                    return
            elif command.broken:
                self._failed = True
                self.tell("object", line=clean(command.broken[:SHOWN_OF_LINE]), ref=command.ref)
            elif command.words:
                self._do(*command.words)

    def _do(self, name: str, *words: str) -> None:
        if self.state == AWAY and name not in ("reg", "help", "quit", "end"):
            self.tell("away", usage=self._way_back())
        elif name == "send":
            self._tell_usage("send NICK MESSAGE")
        elif name not in self._commands or name == "end" and not self._input.talk:
            slash = self._input.slash
            self._failed = self._failed or bool(slash)      # it may have been meant as a text
            self.tell("command", name=clean(slash + name), help=slash + "help")
        else:
            self._commands[name](name, words)

    def _way_back(self) -> str:
        """What to say to come online."""
        return f"{self._input.slash}reg {self.nick}"

    def _tell_usage(self, usage: str) -> None:
        self.tell("usage", usage=self._input.slash + usage)

    def complete(self, before: str) -> tuple[int, list[str]]:
        """What the word at the end of ``before`` may become: where it begins, and the candidates, best first."""
        start = before.rfind(" ") + 1
        words, word = before[:start].split(), before[start:]
        slash = self._input.slash
        if not words:
            found = [slash + name for name in ("send", *sorted(self._commands)) if name != "end" or slash]
            return start, [name for name in found if slash + word and name.startswith(word)]
        if len(words) > 1 or words[0] not in [slash + name for name in ("send", "talk", "dereg", "reg")]:
            return start, []
        if words[0] in (slash + "dereg", slash + "reg"):
            return start, [self.nick] if self.nick.startswith(word) else []
        known = sorted((entry.state != ONLINE, nick) for nick, entry in self.table.entries.items() if nick != self.nick)
        return start, [nick for _, nick in known if nick.startswith(word)]

    def _wants(self, name: str, words: Sequence[str], usage: str = "") -> bool:
        """Whether a command has the words that its usage asks for; says so if not."""
        if len(words) == len(usage.split()):
            return True
        self._tell_usage(f"{name} {usage}".rstrip())
        return False

    def _do_talk(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            nick = unicodedata.normalize("NFC", words[0])
            if self.table.get(nick) is None:
                self._failed = True     # whoever talks on would talk to nobody
                self.tell("talk-unknown", nick=clean(nick))
            else:
                self._input.talk = nick

    def _do_end(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._input.talk = ""

    def _do_dereg(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            if unicodedata.normalize("NFC", words[0]) != self.nick:
                self.tell("dereg-other")
            else:
                self._quit = name

    def _do_reg(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words, "NICK"):
            if unicodedata.normalize("NFC", words[0]) != self.nick:
                self.tell("reg-other", nick=self.nick)
            elif self.state == AWAY:
                self.state = JOINING
                self._outbox.offline = False
                self._was_visible = False
                self._accepting = True
                self._register()
            else:
                self.tell("registered-already")

    def _do_who(self, name: str, words: Sequence[str]) -> None:
        if not self._wants(name, words):
            return
        self._write(self.lines.clients([(entry.nick, show_address((entry.host, entry.port)), entry.state)
                                        for entry in sorted(self.table.entries.values())]).encode())

    def _do_help(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._write(self.lines.help(HELP).encode())

    def _do_quit(self, name: str, words: Sequence[str]) -> None:
        if self._wants(name, words):
            self._quit = name

    def _do_sends(self, sends: Sends) -> bool:
        """Queues texts; False if they have to wait."""
        if self.state == AWAY:
            for text in sends.texts:
                self.tell("not-sent", usage=self._way_back(), to=sends.nick, text=text, ref=sends.ref)
            return True
        nick, outbox, now = sends.nick, self._outbox, self.loop.now()
        if nick not in self._mirror.table.entries:
            nick = unicodedata.normalize("NFC", nick)
            if nick not in self._mirror.table.entries:
                self._failed = True
                self._tell_unknown(nick, self._fitting(sends, sends.texts), sends.ref)
                return True
        if nick not in outbox.conversations:
            outbox.open(now, nick, self._place(nick), new_id(self.loop))
        room = outbox.room(now, nick)
        if room:
            texts = self._fitting(sends, sends.take(room))
            if texts:
                if self._keeps_track:
                    self._track(outbox.conversations[nick].stream, nick, texts, sends.ref)
                outbox.send(now, nick, texts, self.loop.wall())
                self.queued += len(texts)
        elif outbox.is_stuck(now, nick):
            for text in self._fitting(sends, sends.texts):
                self._hand_back(nick, text, None, sends.ref)
            return True
        if sends.texts:
            self._input.put_back(sends)
        return room > 0

    def _tell_unknown(self, nick: str, texts: list[str], ref: object) -> None:
        if not self.lines.is_for_programs:
            self.tell("unknown", len(texts), to=clean(nick))
            return
        for text in texts:
            self.tell("unknown", to=nick, text=text, ref=ref)

    def _track(self, stream: SendStream, nick: str, texts: list[str], ref: object) -> None:
        """Takes note of what is to be sent, to say later of which message an event is."""
        number = stream.end
        sent = self._on_its_way.setdefault(nick, deque())
        for text in texts:
            sent.append(Sent(number, f"{stream.id}:{number}", ref, self.loop.now()))
            number += len(split_text(text))

    def _fitting(self, sends: Sends, texts: list[str]) -> list[str]:
        """Those of ``texts``, out of ``sends``, that are not too long; says which are."""
        size = sends.size
        if not size and are_short(texts, MAX_TEXT):
            return texts
        return [text for text in texts if self._fits(max(size, len(text.encode())), sends)]

    def _fits(self, size: int, sends: Sends) -> bool:
        if size > MAX_TEXT:
            self._failed = True
            self.tell("too-long", size=size, most=MAX_TEXT, to=clean(sends.nick), ref=sends.ref)
        return size <= MAX_TEXT

    # settling

    def settle(self) -> None:
        """Ends a turn: carry out commands, send what windows allow, write stdout, ack what it took."""
        if self.exit_code is not None:
            return
        output, commands, outbox, inbox = self.output, self._input, self._outbox, self._inbox
        if commands.waiting:
            self._carry_out()
        if self._heard:
            self._heard = False
            outbox.server_heard(self.loop.now())
        if self.state in (ACTIVE, LEAVING):
            now = self.loop.now()
            if outbox.due() <= now:
                self._send_messages(now)
            if outbox.with_events:
                self._tell_events()
        if self._table_news and output.has_room():
            self._table_news = False
            self.tell("table")
        news = inbox.has_news
        if news:
            self._show()
        output.flush()
        if outbox.awaiting_recount:
            outbox.recount()
        if inbox.unacked:
            self._ack()
        if self._quit or self._ending or commands.ended and not self._stay:
            self._proceed()
        moved = (output.pending or self.errors.pending or self._prompt is not None) and self._write_rest()
        if output.broken and self._ending != "reader":
            self._reader_is_gone()
            moved = True
        able = not (commands.ended and not commands.waiting) and self._may_command() and not outbox.is_full
        self.hungry = able and not commands.waiting
        # what the limits of this turn left undone, and no event will recall; once the output has room again, that will
        if (moved or able and commands.waiting and not self.errors.pending
                or news and inbox.is_ready and output.has_room()):
            self._next_turn.set(self.loop.now())
        if self.state == ENDED and not output.pending + self.errors.pending:
            self.exit_code = self._result

    def _write_rest(self) -> bool:
        """Writes what has been added since, draws the prompt; gives whether room became free: what waits must know."""
        lines, errors = self.output.pending, self.errors.pending
        self.output.flush()
        self.errors.flush()
        if self._prompt is not None:
            self._draw(self._prompt)
        return self.output.pending < lines or self.errors.pending < errors

    def _ack(self) -> None:
        """Answers every stream that brought something, or of which something was written."""
        acks = self._inbox.acks()       # taken in any state: what is not answered now is not owed later
        if self.state in (ACTIVE, LEAVING):
            for info, address in acks:
                self._send_now(encode("ack", info), address if address is not None else self.server)

    def _send_messages(self, now: float) -> None:
        """Polls the conversations to which something happened or whose time has come."""
        for datagram, address in self._outbox.poll(now, self.loop.drained):
            self._send_now(datagram, address if address is not None else self.server)
        self._outbox_alarm.set(self._outbox.due())

    def _tell_events(self) -> None:
        for nick, events in self._outbox.take_events():
            for event in events:
                self._tell(nick, event)

    def _tell(self, nick: str, event: Event) -> None:
        if event.kind is SILENT:
            self._server_silent()
            return
        name = event.kind.value
        if event.kind in CLOSINGS:
            self.closed += event.messages
        if event.kind is REFUSED:
            self._failed = True
            name = event.reason if event.reason in REFUSALS else "disk"
        if not self._keeps_track:
            self.tell(name, event.messages, to=nick)
            return
        for sent in self._meant(nick, event):
            self.tell(name, to=nick, id=sent.id, ref=sent.ref, **self._outcome(event, sent))

    def _meant(self, nick: str, event: Event) -> list[Sent]:
        """The messages that an event is about; forgets those that it closes."""
        sent = self._on_its_way[nick]
        if event.kind not in CLOSINGS:
            return [message for message in sent if message.number >= event.first][:event.messages]
        found = [sent.popleft() for _ in range(event.messages)]
        if not sent:
            del self._on_its_way[nick]
        return found

    def _outcome(self, event: Event, sent: Sent) -> dict[str, Any]:
        """On which way a message went, and how many milliseconds it took, once it is closed."""
        if event.kind not in CLOSINGS:
            return {}
        return {"via": "direct" if event.kind == RECEIVED else "relay" if event.relayed else "mail",
                "ms": round((self.loop.now() - sent.began) * 1000, 3)}

    def _draw(self, prompt: Prompt) -> None:
        """On a terminal, once all lines are written: draws what waits, and asks for the next command."""
        if not (self.output.pending or prompt.asks and (self._ending or self._quit == "quit")):
            self.output.write(prompt.draw(self._waits(), self._input.prompt))
            self.output.flush()

    def _waits(self) -> list[str]:
        """A line for each recipient whose messages wait for longer than one thinks that they should."""
        now, late, next_ = self.loop.now(), [], NEVER
        for nick, sent in self._on_its_way.items():
            if now >= sent[0].began + WAIT_SHOWN:
                late.append(nick)
            else:
                next_ = min(next_, sent[0].began + WAIT_SHOWN)
        self._wait_alarm.set(next_)
        lines = [self._wait(nick, len(self._on_its_way[nick])) for nick in late[:WAITS_SHOWN]]
        others = len(late) - WAITS_SHOWN
        return lines + [f"[{others} more recipient{'s' * (others > 1)} to wait for.]"] * (others > 0)

    def _wait(self, nick: str, count: int) -> str:
        direct = self._outbox.conversations[nick].route == DIRECT
        waiting = f"{count} message{'s' * (count > 1)}"
        return f"[Waiting for {nick}: {waiting}.]" if direct else f"[Waiting for the server: {waiting} for {nick}.]"

    # leaving

    def _proceed(self) -> None:
        """Takes the next step towards what waits for the sends before it: ``dereg``, ``quit``, the end."""
        if self._quit == "quit" and not self._ending:
            self._end("quit")
        if self._input.ended and not (self._input.waiting or self._stay) and self._takes_commands():
            self._end("end")
        if self.state in (LEAVING, ENDED) or not (self._quit or self._ending):
            return
        over = self.loop.now() >= self._deadline
        if not over and not self._outbox.is_settled:
            return
        if self.state == ACTIVE:
            self._accepting = False
            if over or self.output.broken or not (self.output.pending or self._inbox.has_chat):
                self._leave()
        else:
            self._conclude()

    def _end(self, why: str, limit: float = NEVER) -> None:
        """Begins the orderly end, which takes at most about ``limit`` seconds."""
        self._ending = why
        self.hungry = False
        if why == "quit":
            self._input.clear()     # what stands behind ``quit`` is for nobody; else, it was meant to be done
        if limit < NEVER:
            self._deadline = self.loop.now() + limit
            self.loop.call_at(self._deadline, lambda: None)
            self.loop.call_at(self._deadline + LAST_TIME - END_TIME, self._end_now)

    def _end_now(self) -> None:
        if self.state != ENDED:
            self._conclude()
        self.output.flush()
        self.errors.flush()
        self.exit_code = self._result

    def interrupt(self) -> None:
        """Ctrl-C or SIGTERM: an orderly end; the second time, at once."""
        if self._interrupted:
            self._end_now()
            return
        self._interrupted = True
        self._end("signal", END_TIME)       # also if only the output is awaited still
        if self.state == JOINING:
            self._conclude()

    def time_is_over(self) -> None:
        """Ends: what is not closed by now counts as not delivered."""
        if not self._ending or self._deadline == NEVER:
            self._end("signal", 0.0)
            if self.state == JOINING:
                self._conclude()

    def reader_gone(self) -> None:
        """Nobody reads stdout any more."""
        self.output.give_up()

    def _reader_is_gone(self) -> None:
        self._failed = True
        if self.state != ENDED:
            self._end("reader", END_TIME)

    def _leave(self) -> None:
        self._stop_asking()
        self.state = LEAVING
        if self._ending in ("signal", "reader"):
            self._dereg.hurry(LAST_REQUEST_INTERVAL)
        self._dereg.start()

    def _stop_asking(self) -> None:
        for alarm in (self._ping_alarm, self._sync_alarm, self._old_table_alarm, self._hold_alarm):
            alarm.cancel()
        for request in (self._request, self._ping):
            request.stop()
        self._inbox.stop_asking()

    def _send_dereg(self) -> None:
        if self._session is not None:
            self._ask_server("dereg", {"session": self._session})

    def _dereg_unanswered(self) -> None:
        asked = self._quit in ("dereg", "quit")
        self._server_silent(always=asked)
        self._give_up(int(asked))

    def _on_bye(self, info: Info) -> None:
        if self.state == LEAVING and info["session"] == self._session:
            self._went_away()

    def _went_away(self) -> None:
        self._tell_events()
        self._stop_asking()
        self._dereg.stop()
        self._outbox.server_unreachable = False
        self._session = None
        self._inbox.forget_mail(self.loop.now())
        self._visible = False
        self.state = AWAY
        self._outbox.offline = True
        self._quit = ""
        self.tell("left", nick=self.nick)

    def _give_up(self, code: int) -> None:
        """Ends the program over something: says so."""
        self._report()
        self.tell("exiting")
        self._stop(code)

    def _conclude(self) -> None:
        """Ends the program as asked."""
        self._report()
        self._stop(0)

    def _stop(self, code: int) -> None:
        self._stop_asking()
        self._dereg.stop()
        self._outbox_alarm.cancel()
        self.hungry = False
        self.state = ENDED
        self._result = code or int(self._failed or self._undelivered > 0)

    def _report(self) -> None:
        """Names every message that was not delivered: on stderr, as the line that would send it again."""
        self._tell_events()
        for nick, text in self._outbox.undelivered():
            sent = self._on_its_way.get(nick)
            self._hand_back(nick, text, sent.popleft() if sent else None)
        self._on_its_way.clear()
        self._hand_back_lines()
        if self._undelivered:
            self.tell("one-undelivered" if self._undelivered == 1 else "more-undelivered", count=self._undelivered)

    def _hand_back_lines(self) -> None:
        """Names the messages of the lines that were read, but not carried out any more."""
        while self._input.waiting:
            command = self._input.take()
            if command.sends is not None:
                for text in self._fitting(command.sends, command.sends.texts):
                    self._hand_back(command.sends.nick, text, None, command.sends.ref)
            elif command.words and (command.words[0] == "talk" or command.words[0] == "end" and self._input.talk):
                self._commands[command.words[0]](command.words[0], command.words[1:])
            elif command.words and command.words[0] == "quit":
                self._input.clear()


class Console:
    """Connects a client to the standard streams: each is watched only while something is wanted of it."""

    def __init__(self, loop: SelectorLoop, client: Client, reader: Reader, writer: Writer, errors: Writer,
                 prompt: Prompt | None = None) -> None:
        self._loop = loop
        self._client = client
        self._reader = reader
        self._writer = writer
        self._errors = errors
        self._board = prompt if isinstance(prompt, Board) else None
        self._desk = prompt if isinstance(prompt, Desk) else None
        self._is_open = True                    # the terminal, as long as it has not hung up
        self._wanted = (False, False, False)    # of stdin, stdout and stderr

    def start(self) -> None:
        """From now on, every turn of the loop ends here."""
        self._loop.settle = self._settle
        if self._writer.is_pipe and sys.platform == "linux":    # no event but the error when the last reader is gone
            self._loop.watch(self._writer.fd, selectors.EVENT_READ, self._on_reader_gone)
        if self._board is not None:
            self._loop.on_signal(signal.SIGWINCH, self._board.resize)
            self._loop.on_signal(signal.SIGCONT, self._board.resume)
        if self._desk is not None:
            self._loop.on_signal(signal.SIGTSTP, self._desk.suspend)
            self._desk.open()

    def close(self) -> None:
        """Leaves the terminal as it was, whatever has happened."""
        if self._desk is not None:
            self._desk.close()

    def _settle(self) -> None:
        client = self._client
        client.settle()
        if client.exit_code is not None:
            self._loop.stop()
            return
        wanted = (client.hungry if self._desk is None else self._is_open,
                  client.output.pending > 0, client.errors.pending > 0)
        if wanted != self._wanted:
            self._watch(wanted)

    def _watch(self, wanted: tuple[bool, bool, bool]) -> None:
        fds = (self._reader.fd, self._writer.fd, self._errors.fd)
        events = (selectors.EVENT_READ, selectors.EVENT_WRITE, selectors.EVENT_WRITE)
        callbacks = (self._on_readable, self._on_writable, self._on_writable)
        for fd, event, callback, had, has in zip(fds, events, callbacks, self._wanted, wanted):
            if has != had:
                self._loop.watch(fd, event, callback if has else None)
        self._wanted = wanted

    def _on_readable(self) -> None:
        if self._desk is None and not self._client.hungry:
            return      # this very turn has brought its end: what is not read is not lost
        data = self._reader.read()
        if data and self._desk is not None:
            self._loop.take_signals()       # a read in the background stops the job: whatever continued it comes first
            for action in self._desk.type(data):
                self._act(action)
        elif data is not None:
            self._is_open = bool(data)
            self._client.feed(data)

    def _act(self, action: Action) -> None:
        if action.kind == "submit":
            self._client.enter(action.lines, action.pasted)
        elif action.kind == "interrupt":
            self._client.interrupt()
        else:
            self._client.feed(b"")

    def _on_writable(self) -> None:
        """Nothing to do here: the turn ends with a write."""

    def _on_reader_gone(self) -> None:
        self._loop.watch(self._writer.fd, selectors.EVENT_READ, None)
        self._client.reader_gone()
