"""A second client of UdpChat, written from docs/protocol.md alone ("§" names its sections): proof that it suffices.

It makes the simple choices that the page allows: one number is in flight to each recipient, early numbers are dropped,
no token is sent. It is made for tests on loopback: it checks no fields (§3), but drops a map that it cannot handle,
knows IPv4 and one address of the server, sends no long texts, escapes nothing, leaves out what matters after 30 s.
"""
from __future__ import annotations

import secrets
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack

Address = tuple[str, int]
NEVER = float("inf")
PAD = bytes(184)        # with it, each request is large enough (§7, §8)
FROM_SERVER = {"cookie", "welcome", "refused", "pong", "probe", "bye"}                              # §6
BEHIND_FOR = {"table", "ack", "nack", "exists", "mail"}
FROM_PEER = {"chat", "ack", "nack"}
ACTS_ON = {"registering": {"cookie", "welcome", "refused", "probe"} | FROM_PEER, "leaving": {"bye", "refused", "probe"},
           "in session": {"refused", "pong", "probe"} | FROM_PEER | BEHIND_FOR, "offline": set[str]()}


class Incoming:
    """A stream that comes in: a peer's chat, or the mail (§11). It is held while hold is above next (§12)."""

    def __init__(self) -> None:
        self.next, self.shown = 1, set[int]()
        self.pieces: list[str] = []         # of the text that begins at next
        self.hold, self.since = 0, 0.0

    def take(self, n: int, text: str, goes_on: bool) -> str | None:
        """Take the next number; return the text that it completes."""
        if n != self.next + len(self.pieces):
            return None
        self.pieces.append(text)
        return None if goes_on and len(self.pieces) < 86 else "".join(self.pieces)

    def move(self, to: int, *shown: int) -> None:
        """Note numbers that were shown. Move next to a number, and on over all that were."""
        self.shown.update(shown)
        while to in self.shown:
            to += 1
        if to != self.next:
            self.next, self.pieces = to, []


class Outgoing:
    """What is on its way to one recipient (§14)."""

    def __init__(self, nick: str) -> None:
        self.nick, self.stream, self.base, self.sent = nick, secrets.randbits(63), 1, 0
        self.texts: list[tuple[str, float]] = []    # from base on, each with its time
        self.addresses: list[Address] = []          # sent to; the last one is the present one

    def change(self, route: str, *address: Address, is_retry: bool = False) -> None:
        """Take another route, of which nothing is known yet. is_retry: it is the one try after exists."""
        self.route, self.is_retry, self.window_end = route, is_retry, self.base + 4096
        self.flight, self.due, self.timeout = 0, 0.0, 0.1       # the number on its way, when to repeat it
        self.silence = NEVER                                    # when the first datagram since the last ack was sent
        self.addresses = [*self.addresses, *address][-4:]


class SecondClient:
    """One client. It registers at once. Call step again and again, send texts, and leave. show writes a line."""

    def __init__(self, nick: str, server: Address, show: Callable[[str], None]) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.nick, self.server, self.session, self.boot = nick, server, b"", -1
        self.show = show
        self.table: dict[str, list[Any]] = {}       # in force (§10)
        self.draft = self.table                     # of the present boot, up to the version held
        self.held = self.target = 0
        self.has_table = self.may_send = False
        self.now, self.sync_due = time.monotonic(), 0.0
        self.incoming, self.outgoing = dict[tuple[str, int], Incoming](), dict[str, Outgoing]()
        self.register()

    def register(self) -> None:
        """Begin a registration (§7). The table and the streams stay."""
        self.state, self.attempts, self.due, self.id = "registering", 0, 0.0, secrets.randbits(63)
        self.cookie, self.pings = dict[str, bytes](), dict[int, float]()        # pings: when each was sent
        self.mail, self.mail_stream, self.asked, self.last_mail = Incoming(), -1, 0.0, 0    # asked: see "pong"

    def leave(self) -> None:
        """Ask the server to be offline (§9). What is not closed stays open."""
        self.state, self.attempts, self.due, self.may_send = "leaving", 0, 0.0, False

    def send(self, nick: str, text: str) -> bool:
        """Send a text of at most 768 bytes. Return whether that is possible."""
        if not self.may_send or self._entry(nick)[2] == "gone" or len(text.encode()) > 768:
            return False
        out = self.outgoing.setdefault(nick, Outgoing(nick))
        if not out.texts:
            self._choose_route(out)
        out.texts.append((text, time.time()))
        return True

    def step(self, seconds: float) -> None:
        """Wait for datagrams, and act on them and on the time."""
        select.select([self.socket], [], [], seconds)
        self.now = time.monotonic()
        with suppress(OSError):         # until there are no more
            for _ in range(100):
                self._take(*self.socket.recvfrom(65535))
        if self.state != "offline":
            self._tick()

    def _end(self, line: str) -> None:
        self.state, self.session, self.may_send = "offline", b"", False
        self.show(line)

    def _transmit(self, tag: str, info: dict[str, Any], address: Address | None = None) -> None:
        with suppress(OSError):
            self.socket.sendto(msgpack.packb({"tag": tag, "info": info}), address or self.server)

    def _later(self, seconds: float) -> float:
        return self.now + secrets.SystemRandom().uniform(0.75, 1.25) * seconds      # §7

    def _sync(self) -> None:
        if self.now >= self.sync_due:
            self.sync_due = self._later(0.27)
            self._transmit("sync", {"session": self.session, "version": self.held, "pad": PAD})

    def _entry(self, nick: str) -> tuple[str, int, str]:
        _, host, port, state = self.table.get(nick, ["", "", 0, "gone"])
        return host, port, state

    def _take(self, data: bytes, source: Address) -> None:
        unpacker = msgpack.Unpacker(max_array_len=1024, max_map_len=32)
        unpacker.feed(data)
        counts = FROM_SERVER if source == self.server else FROM_PEER
        with suppress(ValueError, msgpack.UnpackException):         # it cannot be decoded: the rest is dropped (§2)
            for i, found in enumerate(unpacker):
                with suppress(AttributeError, LookupError, TypeError, ValueError):      # a wrong field: one map is
                    tag, info = found["tag"], found["info"]
                    if (i, tag, source) == (0, "for", self.server) and info["session"] == self.session[:8]:
                        counts = FROM_SERVER | BEHIND_FOR
                    if tag in counts & ACTS_ON[self.state]:
                        self._act(tag, info, source, "mail" in counts)

    def _act(self, tag: str, info: dict[str, Any], source: Address, behind_for: bool) -> None:
        match tag, info:        # a map without a required field matches nothing
            case "cookie", {"id": self.id, "cookie": cookie}:
                self.cookie, self.due = {"cookie": cookie}, self.now    # the next attempt is due
            case "welcome", {"id": self.id, "nick": self.nick, "boot": boot, "session": session, "version": version}:
                self.state, self.session, self.target = "in session", session, version
                self.has_table, self.attempts, self.due = False, 0, self._later(15)
                if boot != self.boot:
                    self.boot, self.held, self.draft = boot, 0, {}
                for peer in self.incoming.values():
                    peer.since = self.now       # what they wait for has other numbers now
                self._apply(self.held, self.held, [])
            case "refused", {"id": self.id, "reason": reason} if self.state == "registering":
                self.register() if reason == "replaced" else self._end(f"[Refused: {reason}]")
            case ("refused" | "bye"), {"session": self.session} if self.state != "registering":
                self._end("[Offline]") if self.state == "leaving" else self.register()
            case "pong", {"id": ping, "boot": boot, "version": version, "mail": mail} if ping in self.pings:
                self.asked, self.last_mail, self.attempts = self.pings.pop(ping), mail, 0
                self.due = self._later(0.5 if self._entry(self.nick)[2] != "online" else 15)
                self.register() if boot != self.boot else self._apply(version, version, [])
            case "probe", {"id": probe, "to": self.nick} if self.session:
                proof = {"session": self.session} if behind_for else {}
                self._transmit("alive", {"id": probe, "nick": self.nick, **proof})
            case "table", {"version": version, "set": entries}:
                self._apply(info.get("since", version - 1), version, entries)
            case "chat", {"stream": stream} if self.session:
                self._chat(stream, info, source)
            case "mail", {"to": self.nick, "stream": stream} if self.table is self.draft:
                self._mail(stream, info["n"], info["base"], info["items"])
            case ("ack" | "nack" | "exists"), {"stream": stream}:
                for out in self.outgoing.values():
                    if out.stream == stream and out.texts and (behind_for or source in out.addresses):
                        self._answer(out, tag, info, behind_for)

    def _apply(self, since: int, version: int, entries: list[list[Any]]) -> None:       # changes of the table (§10)
        self.target = max(self.target, version)
        if since <= self.held < version:
            self.draft.update((entry[0], entry) for entry in entries)
            self.held = version
        if self.held < self.target:
            return
        self.table = self.draft
        is_online = self._entry(self.nick)[2] == "online"
        if not self.has_table or (entries and not is_online):
            self.has_table, self.due = True, self.now           # ping
        if is_online and not self.may_send:
            self.may_send = True
            self.show("[Online]")

    def _chat(self, stream: int, info: dict[str, Any], source: Address) -> None:        # §12
        sender, n, texts = info["from"], info["n"], info["text"]
        if self._entry(sender) != (*source, "online"):
            self._sync()
        elif info["to"] == self.nick:
            peer = self.incoming.setdefault((sender, stream), Incoming())
            for n, text in enumerate(texts, n):
                whole = peer.take(n, text, n in info.get("more", []))
                if whole is not None:
                    self.show(f"{sender}: {whole}")
                    peer.move(peer.next, *range(peer.next, n + 1))
            if info["base"] > peer.next >= peer.hold:
                peer.hold, peer.since, self.due = info["base"], self.now, self.now      # ping
            self._ack(stream, peer, source)

    def _mail(self, stream: int, n: int, base: int, runs: list[list[Any]]) -> None:     # §13
        if stream != self.mail_stream:
            self.mail, self.mail_stream = Incoming(), stream
        self.mail.move(max(self.mail.next, base))
        for sender, peer_stream, first, at, texts, more in runs:
            peer = self.incoming.setdefault((sender, peer_stream), Incoming())
            for number, text in enumerate(texts, first):
                begin = number - len(self.mail.pieces)
                whole = self.mail.take(n, text, number in more)
                if whole is not None and begin not in peer.shown:
                    self.show(f"{sender}: <{time.ctime(at)}> {whole}")
                    peer.move(peer.next, *range(begin, number + 1))
                if whole is not None:
                    self.mail.move(n + 1)
                n += 1
        self._ack(stream, self.mail, self.server)

    def _ack(self, stream: int, incoming: Incoming, address: Address) -> None:
        have = [[incoming.next, incoming.next + len(incoming.pieces) - 1]] if incoming.pieces else []
        self._transmit("ack", {"stream": stream, "next": incoming.next, "have": have, "room": 4096}, address)

    def _choose_route(self, out: Outgoing) -> None:
        host, port, state = self._entry(out.nick)
        out.change("direct", (host, port)) if state == "online" else out.change("save")

    def _answer(self, out: Outgoing, tag: str, info: dict[str, Any], by_server: bool) -> None:
        on_route, below = by_server == (out.route != "direct"), out.base
        what = "kept for" if by_server else "received by"
        match tag, info:
            case "ack", {"next": number, "room": room} if number <= out.sent + 1:
                below = number
                if on_route:
                    out.silence, out.window_end = NEVER, max(out.window_end, number + room)
            case "nack", {"first": first, "last": last, "reason": reason} if on_route and first <= out.base <= last:
                if by_server:
                    below, what = min(last, out.sent) + 1, f"refused ({reason}) for"
                elif reason == "not-me":
                    out.change("relay" if out.is_retry else "save")
            case "exists", {"n": n, "entry": [out.nick, host, port, _]} if out.route == "save" and n <= out.sent:
                out.change("direct", (host, port), is_retry=True)
        while out.base < below:
            out.base, _ = out.base + 1, out.texts.pop(0)
            self.show(f"[Message {what} {out.nick}.]")

    def _drive(self, out: Outgoing) -> None:        # send, repeat, change the route (§11, §14)
        if out.route == "direct" and self.now - out.silence >= 0.5:
            out.change("relay" if out.is_retry else "save")
        elif out.route == "direct" and not out.is_retry and self._entry(out.nick) != (*out.addresses[-1], "online"):
            self._choose_route(out)
        n, (text, at) = out.base, out.texts[0]
        if (out.route != "direct" and self.state != "in session") or (n == out.flight and self.now < out.due):
            return
        longest = 5.0 if out.route == "direct" or n >= out.window_end else 0.5      # a closed window is only probed
        out.timeout = 0.1 if n != out.flight else min(2 * out.timeout, longest)
        out.sent, out.flight, out.due = max(out.sent, n), n, self.now + out.timeout
        out.silence = min(out.silence, self.now)
        info = {"to": out.nick, "stream": out.stream, "n": n, "base": n, "text": [text]}
        if out.route == "direct":
            self._transmit("chat", {"from": self.nick, **info}, out.addresses[-1])
        else:
            self._transmit("save", {"session": self.session, "at": [at], "relay": out.route == "relay", **info})

    def _tick(self) -> None:
        if self.now >= self.due:
            self._request()
        if self.state == "in session" and self.held < self.target:
            self._sync()
        for peer in self.incoming.values():         # go on: the mail was shown, or it is late
            is_shown = self.asked >= peer.since and self.mail.next > self.last_mail
            if peer.hold > peer.next and (is_shown or self.now - peer.since >= 5):
                peer.move(peer.hold)
        for out in self.outgoing.values():
            if out.texts and self.may_send:
                self._drive(out)

    def _request(self) -> None:         # five attempts (§7, §8, §9)
        if self.attempts == 5:
            self.attempts, self.due = 0, self._later(2)
            if self.state == "leaving" or not self.session:
                self._end("[Offline]")
            return
        self.attempts, self.due = self.attempts + 1, self._later(0.5)
        if self.state == "registering":
            self._transmit("reg", {"id": self.id, "nick": self.nick, "pad": PAD, **self.cookie})
        elif self.state == "leaving":
            self._transmit("dereg", {"session": self.session, "pad": PAD})
        else:
            self.pings[ping := secrets.randbits(63)] = self.now
            self._transmit("ping", {"id": ping, "session": self.session, "version": self.held, "pad": PAD})
