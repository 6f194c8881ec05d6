"""The server."""
from __future__ import annotations

import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

import protocol
from protocol import SYNC_PAGES, Address, Decoder, Info, addressed, encode, mail_runs, mail_sizes, table_map
from stream import NEVER, ReceiveStream, Run, SendStream
from registry import (ASK, BYE, DAY, EVICTED, GRANTED, NICK_LAPSE, PROBE, REPLACED, SILENCE, TAKEN, UNKNOWN, Page,
                      Parcel, Registry, Session)
from loop import Loop, RestartableTimer, jittered, log, new_id, show_address


DEFAULT_PORT = 4119
PROBE_TIMEOUT = 0.5       # s; who does not answer a probe in this time is offline
PROBE_INTERVAL = 0.1      # s between repetitions inside that time
BROADCAST_GAP = 0.05      # s in which changes of the table are gathered
BROADCAST_SHARE = 10      # a broadcast takes at most this part of the server's time (1 / n), but ...
BROADCAST_WAIT = 2.0      # s; ... no change waits longer for the next one: its table would be wrong for so long
BROADCAST_DATAGRAMS = 500     # that tell clients of it in one turn
SYNC_SLICE = 16           # clients whose sync is answered in one turn: 0.6 MB
CACHE_PAGES = 4096        # encoded pages of the table that are remembered: 5 MB
CACHE_AGE = 1000          # changes of the table, beside one for each entry, after which they are made anew
PAGE_SIZE = protocol.MAX_DATAGRAM - 96      # bytes of entries in one ``table``, beside its own fields and ``for``
COOKIE_TIME = 30.0        # s that a cookie's secret part lasts; a cookie is good for one to two of these
STRANGER_REPLIES = 20_000   # replies a second to those who have no session, at most
NOTICE_INTERVAL = 0.02    # s between slices of "I am back"
NOTICE_SLICE = 10         # datagrams in each: 500 a second
MAIL_AHEAD = 4096         # numbers of one client's mail in memory
MAIL_TOTAL = 16384        # numbers of everybody's mail in memory, beyond which each client's is loaded in small steps
MAIL_STEP = 64            # numbers: these
MAIL_RETRY = 1.0          # s until mail that could not be read from the store is tried again
MAX_SAVE_STREAMS = 8192   # streams whose receiving end is in memory; the store remembers the others
MAX_SAVED_EARLY = 16384   # numbers that came early, in all of them together: 48 MiB at most
DELETION_GAP = 0.2        # s in which what was acked may stay in the store: a commit for each ack would be slow
STORE_CALM = 1.0          # s without a failure after which the store counts as good again
HOUSEKEEPING = 3600.0     # s between looks for nicks that have lapsed


# why the server does nothing with what it got, or nothing yet, beside what is not valid at all: it is counted
NOT_FOR_SERVERS, NO_COOKIE, WRONG_COOKIE = "not_for_servers", "no_cookie", "wrong_cookie"
UNKNOWN_SESSION, OTHER_ADDRESS, UNKNOWN_STREAM = "unknown_session", "other_address", "unknown_stream"
NO_REPLY, SAVE_LIMIT, STORE_UNREADABLE = "no_reply", "save_limit", "store_unreadable"
DROPS = (NOT_FOR_SERVERS, NO_COOKIE, WRONG_COOKIE, UNKNOWN_SESSION, OTHER_ADDRESS, UNKNOWN_STREAM, NO_REPLY, SAVE_LIMIT,
         STORE_UNREADABLE)


class Claim:
    """Somebody who wants a nick that somebody else may hold."""

    def __init__(self, address: Address, token: bytes | None, request: int) -> None:
        self.address = address
        self.token = token
        self.request = request


class Probe:
    """One question "are you there?", and all who wait for its answer."""

    def __init__(self, id_: int, nick: str, address: Address, session: Session | None, now: float) -> None:
        self.id = id_
        self.nick = nick
        self.address = address
        self.session = session
        self.deadline = now + PROBE_TIMEOUT
        self.saves: dict[int, tuple[SaveStream, int]] = {}    # stream -> who waits, for which number
        self.claim: Claim | None = None


class SaveStream:
    """The server's end of the stream of one sender's messages for one recipient."""

    def __init__(self, session: Session, to: str, stream: ReceiveStream) -> None:
        self.session = session
        self.to = to
        self.stream = stream
        self.relay = False
        self.kept = 0       # texts that wait for the commit
        self.counted = 0    # numbers that the server has counted as waiting here
        self.nacks: list[Info] = []


class MailStream:
    """The server's end of the stream of one client's mail."""

    def __init__(self, server: Server, session: Session, id_: int) -> None:
        frame = encode("mail", {"to": session.nick, "stream": id_, "n": protocol.MAX_NUMBER,
                                "base": protocol.MAX_NUMBER, "items": []})
        capacity = protocol.MAX_DATAGRAM - protocol.FOR_SIZE - len(frame) - 4 - protocol.MAIL_RUN_SIZE
        self.session = session
        self.stream = SendStream(id_, capacity)
        self.alarm = RestartableTimer(server.loop, functools.partial(server.send_mail, session))
        self.loaded = session.offset    # the number in the mailbox of the last that is in the stream
        self.counted = 0                # numbers that the server has counted as in memory


class Server:
    """Keeps the table, probes who is doubted, keeps and delivers messages.

    ``receive`` takes datagrams, ``settle`` ends each turn; ``send`` is called with (datagram, address) there.
    """

    def __init__(self, loop: Loop, send: Callable[[bytes, Address], None], registry: Registry,
                 nick_lapse: float = NICK_LAPSE, stranger_replies: int = STRANGER_REPLIES) -> None:
        self.loop = loop
        self.registry = registry
        self.decoder = Decoder()
        self.boot = new_id(loop)
        self.nick_lapse = nick_lapse
        self._send_now = send
        self._outbox: list[tuple[bytes, Address]] = []
        self._secret = loop.random.getrandbits(256).to_bytes(32, "big")
        self._probes: dict[int, Probe] = {}
        self._probing: dict[tuple[str, Address], Probe] = {}
        self._alive: dict[str, float] = {}                      # when somebody last answered a probe for saves
        self._saves: OrderedDict[tuple[str, int], SaveStream] = OrderedDict()
        self._saved_early = 0                                   # numbers that wait in them ...
        self._early: dict[SaveStream, None] = {}                # ... in these; longest silent first
        self._dirty: dict[tuple[str, int], SaveStream] = {}     # to be kept and acked in this turn
        self._mails: dict[bytes, MailStream] = {}
        self._mail_by_stream: dict[int, MailStream] = {}
        self._mail_held = 0                                     # numbers of mail in memory
        self._to_mail: dict[bytes, None] = {}
        self._page_cache: dict[int, tuple[bytes, int]] = {}     # version -> the page after it, the version it reaches
        self._cached_version = 0                                # of the table when the cache was empty
        self._to_sync: dict[bytes, int] = {}                    # session -> the version that it holds
        self._sync_alarm = RestartableTimer(loop, lambda: None)            # the end of the turn answers
        self._told = registry.table.version                     # version of the last broadcast
        self._broadcast_end = -NEVER
        self._broadcast_cost = 0.0
        self._telling: Iterator[tuple[Session, bytes]] | None = None     # who is still to be told what
        self._broadcast_alarm = RestartableTimer(loop, lambda: None)      # the end of the turn tells
        self._silence_alarm = RestartableTimer(loop, self._probe_silent)
        self._deletion_alarm = RestartableTimer(loop, self._delete_acked)
        self._stranger_second = 0
        self._stranger_replies = 0
        self._most_replies = stranger_replies
        self._disk_failed = NEVER       # when the store could not be written last, until it can be again
        self._allowance = 0                                     # bytes that may answer the datagram at hand
        self._drops = dict.fromkeys(DROPS, 0)
        self._refusals = 0                                      # of nicks
        self._store_failures = 0
        self._handlers: dict[str, Callable[[Info, Address], None]] = {
            "reg": self._on_reg, "ping": self._on_ping, "sync": self._on_sync, "save": self._on_save,
            "ack": self._on_ack, "alive": self._on_alive, "dereg": self._on_dereg}

    def start(self) -> None:
        """Tells the last known addresses that the server is there, and starts to look after the nicks."""
        self._notices: deque[Address] = deque(
            (known.host, known.port) for known in self.registry.mailbox.known.values() if known.port)
        self.loop.call_at(self.loop.now(), self._send_notices)     # in a turn: what waits is sent at its end
        self._keep_house()

    def stop(self) -> bool:
        """Writes and closes the store; gives whether that went well."""
        committed = self._commit_all()
        self.registry.mailbox.close()
        return committed

    def receive(self, datagram: bytes, address: Address) -> None:
        """Takes a datagram from the network."""
        self._allowance = len(datagram)
        for tag, info in self.decoder.decode(datagram):
            handler = self._handlers.get(tag)
            if handler is not None:
                handler(info, address)
            else:
                self._drops[NOT_FOR_SERVERS] += 1

    def counters(self) -> dict[str, int]:
        """What there is now, and what was counted since the start."""
        registry, known = self.registry, self.registry.mailbox.known
        return {"clients": len(registry.sessions), "online": registry.online, "nicks": len(known),
                "messages_kept": sum(one.messages for one in known.values()),
                "bytes_kept": sum(one.size for one in known.values()),
                "save_streams": len(self._saves), "mail_streams": len(self._mails), "probes": len(self._probes),
                "refusals": self._refusals, "store_failures": self._store_failures,
                "drop_invalid": self.decoder.dropped, **{f"drop_{why}": count for why, count in self._drops.items()}}

    # sending

    def _send(self, session: Session, *maps: bytes) -> None:
        self._outbox.append((addressed(session.id, *maps), session.address))

    def _may_reply(self, size: int) -> bool:
        """Whether ``size`` bytes may go where this datagram seems to come from, and counts them if so.

        That address may be forged: all answers to a datagram together are never more than it was, and there are not
        more than ``stranger_replies`` of them a second.
        """
        second = int(self.loop.now())
        if second != self._stranger_second:
            self._stranger_second, self._stranger_replies = second, 0
        if size > self._allowance or self._stranger_replies >= self._most_replies:
            self._drops[NO_REPLY] += 1
            return False
        self._allowance -= size
        self._stranger_replies += 1
        return True

    def _reply(self, address: Address, data: bytes) -> None:
        """Answers somebody whose address may be forged, if that is allowed."""
        if self._may_reply(len(data)):
            self._outbox.append((data, address))

    def _send_notices(self) -> None:
        for _ in range(min(NOTICE_SLICE, len(self._notices))):
            self._outbox.append((self._pong(0), self._notices.popleft()))
        if self._notices:
            self.loop.call_at(self.loop.now() + NOTICE_INTERVAL, self._send_notices)

    def _pong(self, id_: int, session: Session | None = None, boot: int | None = None) -> bytes:
        return encode("pong", {"id": id_, "boot": self.boot if boot is None else boot, "version": self._told,
                               "mail": self.registry.mail_number(session) if session is not None else 0})

    # sessions

    def _session(self, info: Info, address: Address) -> Session | None:
        """The session that ``info`` speaks for, if it does so from where it is known to be; answers if not."""
        session = self.registry.sessions.get(info["session"])
        if session is None:
            self._drops[UNKNOWN_SESSION] += 1
            self._answer_unknown(info, address)
            return None
        if session.address != address:
            self._drops[OTHER_ADDRESS] += 1
            self._probe_move(session, address)
            return None
        self._heard(session)
        return session

    def _heard(self, session: Session) -> None:
        """Takes note of a sign of life, and of who comes back with it."""
        if self.registry.heard(session, self.loop.now()):
            log.info("%s is back", session.nick)
            self._watch_silence()
            self._wake_mail(session)

    def _answer_unknown(self, info: Info, address: Address) -> None:
        how = self.registry.closed.get(info["session"])
        if how == REPLACED:
            self._reply(address, encode("refused", {"session": info["session"], "nick": "-", "reason": how}))
        else:
            self._reply(address, self._pong(info.get("id", 0), boot=0 if how == EVICTED else None))

    def _probe_move(self, session: Session, address: Address) -> None:
        probe = self._probe(session.nick, address, session, proven=False)
        if probe is not None:
            log.info("%s speaks from %s: asking there", session.nick, show_address(address))

    def _on_reg(self, info: Info, address: Address) -> None:
        nick, request = info["nick"], info["id"]
        if not self._is_cookie(info.get("cookie"), address):
            self._drops[WRONG_COOKIE if "cookie" in info else NO_COOKIE] += 1
            if self._allowance >= protocol.REG_SIZE:
                self._reply(address, encode("cookie", {
                    "id": request, "server": self.registry.mailbox.server_id, "cookie": self._cookie(address, 0)}))
            return
        self._consider(nick, Claim(address, info.get("token"), request))

    def _consider(self, nick: str, claim: Claim) -> None:
        """Registers somebody who has proved an address, or refuses that, or asks first whether the holder is there."""
        session = self.registry.by_nick.get(nick)
        if session is not None and (session.address, session.request) == (claim.address, claim.request):
            self._welcome(session)
            return
        if claim.request in self.registry.spent:
            return      # a copy that was long on its way: whoever sent it has gone on since
        verdict = self.registry.claim(nick, claim.address, claim.token)
        holder = self.registry.holder(nick)
        if verdict == ASK and holder is not None:
            probe = self._probe(nick, holder, self.registry.by_nick.get(nick))
            if probe is not None and probe.claim is None:
                probe.claim = claim
        elif verdict == GRANTED:
            self._admit(nick, claim)
        else:
            self._refuse(nick, claim, verdict)

    def _cookie(self, address: Address, age: int) -> bytes:
        """A proof of address without state: HMAC over address and time (as in RFC 9147 §5.1, RFC 9000 §8.1.2)."""
        import hmac
        text = f"{show_address(address)} {int(self.loop.now() / COOKIE_TIME) - age}"
        return hmac.digest(self._secret, text.encode(), "sha256")[:protocol.SESSION_BYTES]

    def _is_cookie(self, cookie: bytes | None, address: Address) -> bool:
        import hmac
        return cookie is not None and any(hmac.compare_digest(cookie, self._cookie(address, age)) for age in (0, 1))

    def _admit(self, nick: str, claim: Claim) -> None:
        id_ = self.loop.random.getrandbits(128).to_bytes(protocol.SESSION_BYTES, "big")
        session = self.registry.admit(self.loop.now(), self.loop.wall(), id_, nick, claim.address, claim.token,
                                      claim.request)
        log.info("%s registered at %s", nick, show_address(claim.address))
        self._watch_silence()
        self._welcome(session)

    def _welcome(self, session: Session) -> None:
        self._outbox.append((encode("welcome", {
            "id": session.request, "nick": session.nick, "boot": self.boot, "session": session.id,
            "version": session.version}), session.address))

    def _refuse(self, nick: str, claim: Claim, reason: str) -> None:
        self._refusals += 1
        log.info("%s refused to %s: %s", nick, show_address(claim.address), reason)
        self._outbox.append((encode("refused", {"id": claim.request, "nick": nick, "reason": reason}), claim.address))

    def _on_dereg(self, info: Info, address: Address) -> None:
        if self.registry.closed.get(info["session"]) == BYE:
            self._reply(address, encode("bye", {"session": info["session"]}))
            return
        session = self._session(info, address)
        if session is not None:
            log.info("%s deregistered", session.nick)
            self.registry.deregister(session, self.loop.wall())
            self._outbox.append((encode("bye", {"session": session.id}), address))

    def _on_ping(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is not None:
            self._outbox.append((self._pong(info["id"], session), address))
            self._note_version(session, info["version"])

    def _note_version(self, session: Session, version: int) -> None:
        """A client holds the table up to ``version``: from its first on, it can take mail."""
        if not session.holds_table and version >= session.version:
            session.holds_table = True
            self._wake_mail(session)

    def _on_sync(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is None:
            return
        self._note_version(session, info["version"])
        self._to_sync[session.id] = info["version"]

    def _answer_syncs(self) -> None:
        """Tells those who asked what they miss of the table: each once a turn, and so many in each turn."""
        for id_ in list(self._to_sync)[:SYNC_SLICE]:
            version = self._to_sync.pop(id_)
            session = self.registry.sessions.get(id_)
            if session is not None:
                self._tell_missing(session, version)
        if self._to_sync:
            self._sync_alarm.set(self.loop.now())

    def _tell_missing(self, session: Session, since: int) -> None:
        version = self.registry.table.version
        if since >= version:
            self._send(session, self._table(Page(version, version, [])))    # nothing is missing: that is an answer
        for _ in range(SYNC_PAGES):
            if since >= version:
                break
            data, since = self._page_after(since)
            self._send(session, data)

    def _page_after(self, since: int) -> tuple[bytes, int]:
        """The page of the table that begins at ``since``, encoded, and the version that it reaches.

        Full pages are remembered for the next who asks: what changed since then is in a later page.
        """
        version = self.registry.table.version
        if version - self._cached_version > CACHE_AGE + len(self.registry.table) or len(self._page_cache) > CACHE_PAGES:
            self._page_cache.clear()
            self._cached_version = version
        if since not in self._page_cache:
            start = since
            for count, page in enumerate(self.registry.table.pages(since, PAGE_SIZE), 1):
                self._page_cache[start] = self._table(page), page.version
                start = page.version
                if count == SYNC_PAGES:
                    break
        found = self._page_cache[since]
        if found[1] >= version:
            del self._page_cache[since]     # the last page is not full yet
        return found

    def _table(self, page: Page) -> bytes:
        return table_map(page.since, page.version, page.rows)

    # probes

    def _probe(self, nick: str, address: Address, session: Session | None,
               proven: bool = True) -> Probe | None:
        """Asks whether ``nick`` is at ``address``; gives the question, None if it may not be sent.

        ``proven``: that somebody receives at that address is known.
        """
        probe = self._probing.get((nick, address))
        if probe is None:
            probe = Probe(new_id(self.loop), nick, address, session, self.loop.now())
            if not proven and not self._may_reply(len(self._probe_maps(probe))):
                return None
            self._probes[probe.id] = self._probing[nick, address] = probe
            self._ask(probe, once=not proven)
        return probe

    def _probe_maps(self, probe: Probe) -> bytes:
        maps = encode("probe", {"id": probe.id, "to": probe.nick})
        return addressed(probe.session.id, maps) if probe.session is not None else maps

    def _ask(self, probe: Probe, once: bool = False) -> None:
        """Repeats the question until it is answered or its time is over; to an unproven address, once."""
        if probe.id not in self._probes:
            return
        now = self.loop.now()
        if now >= probe.deadline and self.loop.drained:
            self._close_probe(probe)
            self._not_there(probe)
            return
        if now < probe.deadline:
            self._outbox.append((self._probe_maps(probe), probe.address))
        wait = PROBE_TIMEOUT if once else jittered(self.loop, PROBE_INTERVAL)
        self.loop.call_at(min(now + wait, max(probe.deadline, now + 0.001)), functools.partial(self._ask, probe))

    def _close_probe(self, probe: Probe) -> None:
        del self._probes[probe.id]
        del self._probing[probe.nick, probe.address]

    def _is_held_by(self, probe: Probe) -> bool:
        """Whether the probed address is still where the registry believes the nick to be."""
        return (probe.session is not None and self.registry.sessions.get(probe.session.id) is probe.session
                and probe.session.address == probe.address)

    def _not_there(self, probe: Probe) -> None:
        session = probe.session
        if session is not None and self._is_held_by(probe) and session.id in self.registry.live:
            log.info("%s does not answer: offline", probe.nick)
            self.registry.went_offline(session, self.loop.wall())
            self._send(session, self._pong(0, session))
        if probe.claim is not None:
            self.registry.not_there(probe.nick, probe.address)
            self._consider(probe.nick, probe.claim)

    def _on_alive(self, info: Info, address: Address) -> None:
        probe = self._probes.get(info["id"])
        if probe is None or (info["nick"], address) != (probe.nick, probe.address):
            self._on_late_alive(info, address)
            return
        session = probe.session
        if session is not None and info.get("session") != session.id:
            return
        self._close_probe(probe)
        if session is not None and self.registry.sessions.get(session.id) is session:
            if session.address != address:
                log.info("%s moved to %s", session.nick, show_address(address))
                self.registry.moved(session, address, self.loop.wall())
            self._heard(session)
            self._alive.pop(session.nick, None)
            self._alive[session.nick] = self.loop.now()
            if len(self._alive) > self.registry.max_clients:
                del self._alive[next(iter(self._alive))]
        if probe.claim is not None:
            self._refuse(probe.nick, probe.claim, TAKEN)
        for save, number in probe.saves.values():
            self._send_exists(save, number)

    def _on_late_alive(self, info: Info, address: Address) -> None:
        session = self.registry.sessions.get(info.get("session", b""))
        if session is not None and session.address == address:
            self._heard(session)

    def _watch_silence(self) -> None:
        first = next(iter(self.registry.live.values()), None)
        if first is not None and not self._silence_alarm.is_set:
            self._silence_alarm.set(first.heard + SILENCE)

    def _probe_silent(self) -> None:
        for session in self.registry.silent(self.loop.now()):
            self._probe(session.nick, session.address, session)
            self.registry.live.move_to_end(session.id)
        if self.registry.live:
            first = next(iter(self.registry.live.values()))
            self._silence_alarm.set(max(first.heard + SILENCE, self.loop.now() + PROBE_TIMEOUT))

    # keeping

    def _on_save(self, info: Info, address: Address) -> None:
        session = self._session(info, address)
        if session is None:
            return
        key = (session.nick, info["stream"])
        if key not in self._dirty and len(self._dirty) >= MAX_SAVE_STREAMS:
            self._drops[SAVE_LIMIT] += 1
            return      # the sender will repeat it
        save = self._saves.get(key)
        if save is None:
            first = self.registry.mailbox.stream_next(*key)
            if not first:
                self._drops[STORE_UNREADABLE] += 1
                return      # the store cannot be read now; the sender will repeat it
            save = self._saves[key] = SaveStream(session, info["to"], ReceiveStream(info["stream"], first))
            self._forget_saves()
        elif save.to != info["to"]:
            self._drops[UNKNOWN_STREAM] += 1
            return
        self._saves.move_to_end(key)
        save.session, save.relay = session, info["relay"]
        save.stream.on_data(info["n"], list(zip(info["text"], info["at"])), info.get("more", ()), info["base"])
        save.stream.advance(info["base"])
        self._dirty[key] = save

    def _forget_saves(self) -> None:
        while len(self._saves) > MAX_SAVE_STREAMS:
            _, old = self._saves.popitem(last=False)
            self._saved_early -= old.counted
            self._early.pop(old, None)

    def _forget_early(self) -> None:
        """Forgets what came early in the longest silent streams, beyond the limit: their senders still hold it."""
        while self._saved_early > MAX_SAVED_EARLY:
            save = next(iter(self._early))
            save.stream.give_back(save.stream.next)
            self._count(save)

    def _count(self, save: SaveStream) -> None:
        """Counts anew what waits in a stream that was just heard, or emptied."""
        if self._saves.get((save.session.nick, save.stream.id)) is save:
            self._saved_early += save.stream.buffered - save.counted
            save.counted = save.stream.buffered
            self._early.pop(save, None)
            if save.counted:
                self._early[save] = None

    def _keep(self, save: SaveStream) -> None:
        """Does with the messages of a stream what the registry says; what it keeps waits for the commit."""
        verdict = self.registry.judge(save.to, save.relay)
        if verdict == PROBE:
            self._doubt(save)
        elif verdict == UNKNOWN:
            self._refuse_rest(save, save.stream.next, UNKNOWN)
        else:
            for run in save.stream.take():
                if run.items and not self._keep_run(save, run):
                    break

    def _doubt(self, save: SaveStream) -> None:
        """Messages for somebody who is believed to be online: asks there, or tells that the answer has come."""
        first, last = save.stream.next, save.stream.reached - 1
        save.stream.give_back(first)
        recipient = self.registry.by_nick[save.to]
        if last < first:
            return
        if self.loop.now() - self._alive.get(save.to, -NEVER) < PROBE_TIMEOUT:
            self._send_exists(save, first)
            return
        probe = self._probe(save.to, recipient.address, recipient)
        if probe is not None and len(probe.saves) < MAX_SAVE_STREAMS:
            probe.saves[save.stream.id] = (save, first)

    def _send_exists(self, save: SaveStream, number: int) -> None:
        entry = self.registry.table.get(save.to)
        if entry is not None:
            self._send(save.session, encode("exists", {"stream": save.stream.id, "n": number,
                                                       "version": entry.version, "entry": entry.row()}))

    def _keep_run(self, save: SaveStream, run: Run) -> bool:
        """Keeps a run as far as the mailbox has room; False if the rest was refused."""
        texts, times = map(list, zip(*run.items))
        parcel = Parcel(run.first, texts, self._sane(times), run.more)
        fitting = self.registry.fitting(save.to, parcel)
        if fitting:
            kept = parcel if fitting == run.numbers else parcel.part(0, fitting)
            mailbox = self.registry.mailbox
            mailbox.keep(mailbox.known[save.to], save.session.nick, save.stream.id, kept)
            save.kept += kept.messages
        if fitting == run.numbers:
            return True
        first = run.first + fitting
        if self.registry.table.is_online(save.to):
            save.stream.give_back(first)        # its mail is on the way: there will be room
        else:
            self._refuse_rest(save, first, "full")
        return False

    def _sane(self, times: list[float]) -> list[float]:
        """When messages were sent, as their sender says; now, where that cannot be."""
        wall = self.loop.wall()
        return [at if 0 <= at <= wall + DAY else wall for at in times]     # not true for NaN

    def _refuse_rest(self, save: SaveStream, first: int, reason: str) -> None:
        last = save.stream.reached - 1
        save.stream.give_back(first)
        if last >= first:
            save.nacks.append({"stream": save.stream.id, "first": first, "last": last, "reason": reason})

    # settling

    def settle(self) -> None:
        """Ends a turn: commit, then everything that is to be sent."""
        for ended in self.registry.take_ended():
            self._drop_mail(ended)
        dirty, self._dirty = self._dirty, {}
        for save in dirty.values():
            self._keep(save)
        committed = self._commit()
        for save in dirty.values():
            self._answer_save(save, committed)
        self._forget_early()
        if self._to_mail:
            self._send_mails()
        if self._to_sync:
            self._answer_syncs()
        outbox, self._outbox = self._outbox, []
        for datagram, address in outbox:
            self._send_now(datagram, address)
        self._broadcast()

    def _commit(self) -> bool:
        """Writes what must be on the disk before it is told; what may be deleted waits for that, or for a while."""
        if self.registry.mailbox.urgent:
            return self._commit_all()
        if self.registry.mailbox.pending and not self._deletion_alarm.is_set:
            self._deletion_alarm.set(self.loop.now() + DELETION_GAP)
        return True

    def _delete_acked(self) -> None:
        self._commit_all()

    def _commit_all(self) -> bool:
        mailbox = self.registry.mailbox
        committed = mailbox.commit(self.loop.wall())
        now = self.loop.now()
        if not committed:
            self._store_failures += 1
            if self._disk_failed == NEVER:
                log.error("the store cannot be written: no mail is kept, no owner of a new nick is remembered")
            self._disk_failed = now
        elif now >= self._disk_failed + STORE_CALM:
            log.warning("the store can be written again")
            self._disk_failed = NEVER
        return committed

    def _answer_save(self, save: SaveStream, committed: bool) -> None:
        stream = save.stream
        if save.kept and not committed:
            self._refuse_rest(save, stream.next, "disk")
        elif committed:
            stream.all_written()
            recipient = self.registry.by_nick.get(save.to)
            if save.kept and recipient is not None:
                self._to_mail[recipient.id] = None
        save.kept = 0
        self._count(save)
        nacks, save.nacks = save.nacks, []
        self._send(save.session, encode("ack", stream.ack()), *(encode("nack", info) for info in nacks))

    # mail

    def _wake_mail(self, session: Session) -> None:
        mail = self._mails.get(session.id)
        if mail is not None:
            mail.stream.resume()
        self._to_mail[session.id] = None

    def _drop_mail(self, session: Session) -> None:
        mail = self._mails.pop(session.id, None)
        if mail is not None:
            mail.alarm.cancel()
            self._mail_held -= mail.counted
            del self._mail_by_stream[mail.stream.id]

    def send_mail(self, session: Session) -> None:
        """Sends what is due of a client's mail, and loads more of it."""
        if session.id not in self.registry.live or not session.holds_table:
            return
        mail = self._mails.get(session.id)
        if mail is None:
            if not session.known.waiting:
                return
            mail = self._mails[session.id] = MailStream(self, session, new_id(self.loop))
            self._mail_by_stream[mail.stream.id] = mail
        stream = mail.stream
        step = MAIL_AHEAD if self._mail_held < MAIL_TOTAL else MAIL_STEP
        if stream.pending < step // 2 and mail.loaded < session.known.last:
            self._load_mail(mail, step)
        self._mail_held += stream.pending - mail.counted
        mail.counted = stream.pending
        for packet in stream.poll(self.loop.now()):
            self._send(session, encode("mail", {"to": session.nick, "stream": stream.id, "n": packet.first,
                                                "base": stream.base, "items": mail_runs(packet.items)}))
        cannot_read = not stream.pending and mail.loaded < session.known.last
        mail.alarm.set(self.loop.now() + MAIL_RETRY if cannot_read else stream.due())

    def _send_mails(self) -> None:
        """Sends what is due to those to whose mail something has happened."""
        for id_ in list(self._to_mail):
            session = self.registry.sessions.get(id_)
            if session is not None:
                self.send_mail(session)
        self._to_mail.clear()

    def _load_mail(self, mail: MailStream, step: int) -> None:
        mailbox = self.registry.mailbox
        damaged = mailbox.damaged
        letters = mailbox.fetch(mail.session.known, mail.loaded + 1, step)
        if mailbox.damaged > damaged:
            log.error("mail for %s is damaged in the store", mail.session.nick)
        # the longest letter between the longest nicks is more than that, but fits alone: its run is counted twice
        sizes = [min(size, mail.stream.capacity) for size in mail_sizes(letters)]
        continued = [number for number, letter in enumerate(letters, mail.stream.end) if letter[5]]
        mail.stream.queue(letters, sizes, continued)
        mail.loaded += len(letters)

    def _on_ack(self, info: Info, address: Address) -> None:
        mail = self._mail_by_stream.get(info["stream"])
        if mail is None or mail.session.address != address:
            self._drops[UNKNOWN_STREAM] += 1
            return
        session = mail.session
        self._heard(session)
        if mail.stream.on_ack(self.loop.now(), info["next"], info["have"], info["room"]):
            self.registry.mail_acked(session, mail.stream.base)
        self._to_mail[session.id] = None

    # the table

    def _broadcast(self) -> None:
        """Tells every client what changed, so many datagrams in each turn, after all else that was to be sent."""
        if self._telling is None and self.registry.table.version <= self._told:
            return
        now = self.loop.now()
        if self._telling is None:
            rest = min(BROADCAST_SHARE * self._broadcast_cost, BROADCAST_WAIT)
            due = self._broadcast_end + max(BROADCAST_GAP, rest)
            if due > now:
                self._broadcast_alarm.set(due)
                return
            self._begin_broadcast()
        assert self._telling is not None
        began = self.loop.clock()
        told = 0
        for session, page in itertools.islice(self._telling, BROADCAST_DATAGRAMS):
            told += 1
            if session.id in self.registry.live and session.holds_table:    # who does not will ask
                self._send_now(addressed(session.id, page), session.address)
        self._broadcast_cost += self.loop.clock() - began
        self._broadcast_end = now
        if told < BROADCAST_DATAGRAMS:
            self._telling = None
        more = self._telling is not None or self.registry.table.version > self._told
        self._broadcast_alarm.set(now if more else NEVER)

    def _begin_broadcast(self) -> None:
        pages = [self._table(page) for page in self.registry.table.pages(self._told, PAGE_SIZE)]
        self._told = self.registry.table.version
        self._broadcast_cost = 0.0
        self._telling = itertools.product(list(self.registry.live.values()), pages)

    # housekeeping

    def _keep_house(self) -> None:
        for known in self.registry.lapse(self.loop.wall(), self.nick_lapse):
            log.warning("%s has lapsed, with %d messages", known.nick, known.messages)
        self.registry.note_time(self.loop.wall())
        self.registry.mailbox.prune_streams()
        now = self.loop.now()
        self._alive = {nick: at for nick, at in self._alive.items() if now - at < PROBE_TIMEOUT}
        self.loop.call_at(now + HOUSEKEEPING, self._keep_house)
