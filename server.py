"""The server: it knows who is online, keeps messages for those who are not, and delivers them.

Rules of this file
------------------
- No sockets and no clock: time, timers and randomness come through ``Loop``. The owner hands datagrams to ``receive``,
  ends each turn with ``settle``, and passes a way to send.
- Each class below has one subject. It is handed what it needs (the loop, the registry, a way to send, callbacks), and
  uses only what is public of the others. The registry decides about sessions, nicks and mail; it is asked by methods.
- What must survive a crash is on the disk before a client hears of it.
- A source address may be forged until somebody has answered from there. The server never sends more bytes to such an
  address than came from it.
- No client waits for another one, and none can fill the memory: every queue and every turn has a limit with a name.

The parts
---------
::

    Server          sessions, dispatch, trust, the order of a turn, counters, housekeeping
    SendQueue       the datagrams of this turn
    Gate            registration: address validation, claims, admission
    Prober          "are you there?": liveness, and moves to another address
    Keeper          messages to be kept: verdicts, acks and refusals
    Postman         stored mail on its way to its recipients
    Announcer       the table: answers to those who miss some of it, and broadcasts
    Pages           the table as datagrams, compressed for those who read that
    Rush            whether those who ask for the table shall wait, because it changes fast

How a datagram passes
---------------------
``Server.receive`` opens a record, decodes, and looks up the tag of each message. One that speaks for a session is
handed on with that session if it comes in its channel, from where the session is known to be; if it comes from
elsewhere, the ``Prober`` asks there. The handlers of others check for themselves. Most only note what is to be done:
the work is done once, at the end of the turn, however many datagrams have asked.

One turn
--------
``settle`` ends it, in this order:

1. read what those who encrypt have sent to register; forget the mail streams of sessions that have ended;
2. keep the messages of this turn, and commit them together with everything else that has changed: one transaction;
3. answer the saves with acks, or with refusals if the commit has failed;
4. send mail where there is some and the window of its stream allows it;
5. send all that: registrations, probes, pings and saves do not wait for pages of the table;
6. answer those who miss some of the table, a few in each turn;
7. broadcast what has changed in the table, in slices;
8. note the wall-clock time, if it was set.
"""
from __future__ import annotations

import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from operator import itemgetter

import protocol
from protocol import (MAX_NUMBER, NEVER, RECORD_MARK, SYNC_PAGES, Address, Any, Decoder, Info, Parcel, StoredLetter,
                      Table, addressed, encode, fits_into_mail, index_of, mail_runs, mail_sizes, numbers_of, packed,
                      table_map, texts_of_parts, widened)
from loop import Loop, RestartableTimer, jittered, log, new_id, show_address, wake_up
from registry import (BYE, DAY, DISK_FAILS, GRANTED, MAILBOX_FULL, MUST_ENCRYPT, NICK_LAPSE, NO_SUCH_NICK, OTHER_OWNER,
                      PROBE_HOLDER, PROBE_RECIPIENT, REPLACED, SILENCE, SPENT, TAKEN, UNKNOWN, Claim, ClaimVerdict,
                      Committer, Cookies, Hello, Hellos, Refusal, Registry, ReplyLimit, Session)
from secure import Channel, Forged, Keys, RateLimit, name_of_key
from stream import ReceiveStream, Run, SendStream


class Drop(Enum):
    """Why the server does nothing with what it got, or not yet, although it is valid. The values name counters."""

    NOT_FOR_SERVERS = "drop_not_for_servers"
    NO_COOKIE = "drop_no_cookie"
    WRONG_COOKIE = "drop_wrong_cookie"
    UNKNOWN_SESSION = "drop_unknown_session"
    OTHER_ADDRESS = "drop_other_address"
    OTHER_CHANNEL = "drop_other_channel"
    UNKNOWN_CHANNEL = "drop_unknown_channel"
    FORGED = "drop_forged"
    UNKNOWN_STREAM = "drop_unknown_stream"
    SAVE_LIMIT = "drop_save_limit"
    TOO_LARGE = "drop_too_large"
    CALL_LIMIT = "drop_call_limit"
    VISIT = "drop_visit"
    STORE_UNREADABLE = "drop_store_unreadable"


Drops = dict[Drop, int]     # how often each has happened since the start


# --- sending --------------------------------------------------------------------------------------------------

SendSeries = Callable[[Sequence[bytes], Address], None]     # of many datagrams for one address

STRANGER_REPLIES = 20_000   # replies a second to those who have no session, at most


class SendQueue:
    """The datagrams of this turn. They leave at its end, in the order in which they were put here."""

    def __init__(self, send: Callable[[bytes, Address], None]) -> None:
        self._send = send
        self._datagrams: list[tuple[bytes, Address]] = []

    def put(self, datagram: bytes, address: Address) -> None:
        """Send a datagram at the end of the turn."""
        self._datagrams.append((datagram, address))

    def put_for(self, session: Session, *maps: bytes) -> None:
        """Send maps to a client."""
        self._datagrams.append((session.told(*maps), session.address))

    def answer(self, session: Session, answer: bytes) -> None:
        """Send a map that needs no ``for``: what is in it shows that the server has made it."""
        self._datagrams.append((answer if session.channel is None else session.told(answer), session.address))

    def flush(self) -> None:
        """Send everything."""
        datagrams, self._datagrams = self._datagrams, []
        for datagram, address in datagrams:
            self._send(datagram, address)


# --- registration ---------------------------------------------------------------------------------------------

UNREAD_HELLOS = 16384     # that wait to be read: 10 MB
HELLOS_PER_TURN = 32      # that are read: 8 ms


class Gate:
    """Registration: who gets a session for which nick. The handshake::

        client                                  server
          reg, padded, without a cookie   -->
                                          <--   cookie: a proof of the address, nothing is remembered
          reg with that cookie, or hello  -->   claim: is the nick free, or theirs?
                                                  PROBE_HOLDER  the holder is probed where it was last:
                                                                  no answer  claim again
                                                                  an answer  refused: taken
                                                  GRANTED       a session is made
                                          <--   welcome, or refused (taken, owned, full)

    ``hello`` is a ``reg`` that encrypts: it and its answer, another ``hello``, are a handshake of Noise. Then a session
    is made only when the first record comes in the new channel (see ``Hellos``).

    Until the cookie has come back, the server keeps no state for the client: a flood from forged addresses cannot
    fill anything (RFC 9147 §5.1). A ``reg`` that brings no good cookie must be padded: its answer may not be larger.
    """

    def __init__(self, loop: Loop, registry: Registry, send_queue: SendQueue, limit: ReplyLimit, drops: Drops,
                 prober: Prober, boot: int, keys: Keys | None, must_encrypt: bool) -> None:
        """``keys``: None to speak in plain. ``must_encrypt``: whoever does not is refused."""
        self.refusals, self._must_encrypt = 0, must_encrypt
        self.hellos = Hellos(keys, registry.sessions.channels) if keys is not None else None
        self.cookies = Cookies(loop.random.getrandbits(256).to_bytes(32, "big"))
        self._unread: dict[Address, Info] = {}      # hellos that have come, oldest first
        self._timer = RestartableTimer(loop, wake_up)       # the end of its turn reads more of them
        self._loop, self._registry, self._send_queue = loop, registry, send_queue
        self._limit, self._drops, self._prober, self._boot = limit, drops, prober, boot

    def on_reg(self, info: Info, address: Address, channel: Channel | None = None) -> None:
        """Answer with a cookie, or go on with the claim of somebody who has brought one."""
        if not self._has_cookie(info, address):
            return
        claim = Claim(info["nick"], address, info.get("token"), info["id"], info)
        if self._must_encrypt:
            self.refuse(claim, MUST_ENCRYPT)
        else:
            self.consider(claim)

    def _has_cookie(self, info: Info, address: Address) -> bool:
        """Return whether a request has brought a good cookie; answer with one if not."""
        now = self._loop.now()
        if self.cookies.accepts(info.get("cookie"), now, address):
            return True
        self._drops[Drop.WRONG_COOKIE if "cookie" in info else Drop.NO_COOKIE] += 1
        if self._limit.allowance >= protocol.REG_SIZE:
            self._send_cookie(info, self.cookies.make(now, address), address)
        return False

    def _send_cookie(self, info: Info, cookie: bytes, address: Address) -> None:
        answer: Info = {"id": info["id"], "server": self._registry.server_id, "cookie": cookie}
        if self.hellos is not None and (info.get("secure") or "message" in info):
            answer["key"] = self.hellos.keys.pair.public
        self._limit.reply(encode("cookie", answer), address)

    def on_hello(self, info: Info, address: Address, channel: Channel | None = None) -> None:
        """Go on, in its turn, with the claim of somebody who encrypts.

        The cookie comes first, because a handshake costs much more. Whoever repeats one that is still to be read gets
        the same cookie again: thousands may come at once, and none of them shall believe that there is no server.
        """
        if self.hellos is None or not self._has_cookie(info, address):
            return
        known, unread = self.hellos.find(info["message"]), self._unread.get(address)
        if known is not None:
            if known.reply:
                self._send_queue.put(known.reply, address)
        elif unread is not None and unread["message"] == info["message"]:
            self._send_cookie(info, info["cookie"], address)        # "wait": its turn will come
        elif unread is not None or len(self._unread) < UNREAD_HELLOS:
            self._unread[address] = info

    def read_hellos(self) -> None:
        """Go on with those that have come, in order, as far as that is possible in one turn."""
        for address in list(itertools.islice(self._unread, HELLOS_PER_TURN)):
            info = self._unread.pop(address)
            assert self.hellos is not None
            hello = self.hellos.read(self._loop.now(), address, self._registry.server_id, info)
            if hello is None:
                self._drops[Drop.FORGED] += 1
            else:
                self.consider(Claim.of(hello))
        if self._unread:
            self._timer.set(self._loop.now())

    def consider(self, claim: Claim) -> None:
        """Register the client, or refuse that, or ask first whether the holder of the nick is there."""
        registry, sessions = self._registry, self._registry.sessions
        session = sessions.of(claim.nick)
        if session is not None and (session.address, session.request) == (claim.address, claim.request):
            if session.channel is None:
                self._welcome(session)      # the same request again: its answer was lost
            return
        if sessions.is_spent(claim.request):
            # A copy that was delayed by the network: the client who sent it has gone on since, and ignores this. Or the
            # welcome was lost, and another one has got the nick meanwhile: that client must begin again.
            self.refuse(claim, SPENT)
            return
        verdict = registry.claim(claim.nick, claim.address, claim.token, claim.key, claim.hello is not None)
        if verdict == GRANTED and claim.hello is not None:
            self._offer(claim, claim.hello)
        elif verdict == GRANTED:
            self._welcome(self._admit(claim, self._new_session()))
        elif verdict == PROBE_HOLDER:
            holder = registry.holder(claim.nick)
            assert holder is not None
            probe = self._prober.probe(claim.nick, holder, session)
            if claim.address in probe.claims or len(probe.claims) < CLAIMS_PER_PROBE:
                probe.claims[claim.address] = claim
        else:
            self.refuse(claim, verdict)

    def _new_session(self) -> bytes:
        return self._loop.random.getrandbits(128).to_bytes(protocol.SESSION_BYTES, "big")

    def _admit(self, claim: Claim, id_: bytes) -> Session:
        session = self._registry.admit(self._loop.now(), id_, claim.nick, claim.address, claim.token, claim.request,
                                       claim.key, claim.hello, claim.about.get("visit", False))
        session.note(claim.about)
        log.info("%s registered at %s", claim.nick, show_address(claim.address))
        self._prober.watch_silence()
        return session

    def _welcome(self, session: Session) -> None:
        self._send_queue.put(encode("welcome", {
            "id": session.request, "nick": session.nick, "boot": self._boot, "session": session.id,
            "version": session.version}), session.address)

    def _offer(self, claim: Claim, hello: Hello) -> None:
        """Answer with a channel: its first record makes the session."""
        self._answer(hello, "welcome", {
            "id": claim.request, "nick": claim.nick, "boot": self._boot, "session": self._new_session(),
            "version": self._registry.table.version})

    def _answer(self, hello: Hello, tag: str, info: Info) -> None:
        assert self.hellos is not None
        info["lasting"] = self._registry.mailbox.is_lasting
        self._send_queue.put(self.hellos.answer(hello, tag, info), hello.address)

    def confirm(self, hello: Hello) -> bool:
        """Make a session: a record has come in its channel. Return False if the nick has gone to somebody else."""
        assert self.hellos is not None and hello.channel is not None
        self.hellos.forget(hello)
        claim = Claim.of(hello)
        if self._registry.claim(claim.nick, claim.address, None, claim.key, is_sealed=True) != GRANTED:
            return False
        self._admit(claim, hello.session)
        return True

    def refuse(self, claim: Claim, verdict: ClaimVerdict) -> None:
        """Tell the client that it does not get the nick."""
        self.refusals += 1
        log.info("%s refused to %s: %s", claim.nick, show_address(claim.address), verdict.value)
        refused: Info = {"id": claim.request, "nick": claim.nick, "reason": verdict.value}
        spelling = self._registry.table.spelling_of(claim.nick)
        if spelling not in (None, claim.nick):
            refused["spelling"] = spelling      # their nick, perhaps: the proof of that is made for this spelling
        if claim.hello is not None:
            self._answer(claim.hello, "refused", refused)
        else:
            self._send_queue.put(encode("refused", refused), claim.address)


# --- probes ---------------------------------------------------------------------------------------------------

PROBE_TIMEOUT = 0.5       # s; a client that does not answer a probe in this time is offline
PROBE_INTERVAL = 0.1      # s between repetitions inside that time
CLAIMS_PER_PROBE = 64     # claims to one nick that wait for the same answer; others are repeated
PROBE_RECHECK = 0.001     # s until the next look at a probe whose deadline came in a turn that left something unread


class Probe:
    """One question "are you there?", and all who wait for its answer."""

    __slots__ = ("id", "nick", "address", "session", "deadline", "saves", "claims")

    def __init__(self, id_: int, nick: str, address: Address, session: Session | None, now: float) -> None:
        self.id, self.nick, self.address = id_, nick, address
        self.session = session      # None: the nick was online there before the server was restarted
        self.deadline = now + PROBE_TIMEOUT
        self.saves: dict[int, tuple[SaveStream, int]] = {}    # stream -> who waits, for which number
        self.claims: dict[Address, Claim] = {}

    def datagram(self) -> bytes:
        """Return the question as it is sent."""
        probe = encode("probe", {"id": self.id, "to": self.nick})
        return self.session.told(probe) if self.session is not None else probe


class Prober:
    """"Are you there?": liveness of clients, and their moves to another address.

    There is one probe for each pair of nick and address, however many wait for its answer. The life of one::

        probe -> ASKING ---- alive, from that address and with that session ----> answered
                 repeated     The client is there, perhaps at an address that is new (path validation).
                 each 0.1 s   Claims to its nick are refused, the senders of saves get ``exists``.
                   |
                   +-------- 0.5 s without an answer --------------------------> unanswered
                              The client is offline, if that is where it was believed to be.
                              Claims to its nick are considered again, saves are kept when they are repeated.

    To an address that nobody has proved (``probe_new_address``), a probe is sent only once, within the limit for
    replies. A probe ends unanswered only in a turn that read the socket empty: else the answer may be waiting there.

    ``heard`` is called with each session that was heard, ``unresponsive`` with each that does not respond, then
    ``answered`` or ``unanswered`` with the probe.
    """

    def __init__(self, loop: Loop, registry: Registry, send_queue: SendQueue, limit: ReplyLimit,
                 heard: Callable[[Session], None], unresponsive: Callable[[Session], None],
                 answered: Callable[[Probe], None], unanswered: Callable[[Probe], None]) -> None:
        self.probes: dict[int, Probe] = {}
        self.answers: dict[str, float] = {}     # nick -> when it last answered, longest ago first
        self._loop, self._registry, self._send_queue = loop, registry, send_queue
        self._limit = limit
        self._heard, self._unresponsive = heard, unresponsive
        self._answered, self._unanswered = answered, unanswered
        self._at: dict[tuple[str, Address], Probe] = {}
        self._silence_timer = RestartableTimer(loop, self._probe_silent)

    def probe(self, nick: str, address: Address, session: Session | None) -> Probe:
        """Return the probe of ``nick`` at ``address``, where it was before; begin one if there is none."""
        probe = self._at.get((nick, address))
        if probe is None:
            probe = Probe(new_id(self._loop), nick, address, session, self._loop.now())
            self._begin(probe)
            self._repeat(probe)
        return probe

    def probe_new_address(self, address: Address, session: Session) -> None:
        """Ask at an address from which somebody speaks for a session that is elsewhere: its client may have moved."""
        if (session.nick, address) not in self._at:
            probe = Probe(new_id(self._loop), session.nick, address, session, self._loop.now())
            datagram = probe.datagram()
            if not self._limit.allows(len(datagram)):
                return
            self._begin(probe)
            self._send_queue.put(datagram, address)
            self._loop.call_at(probe.deadline, functools.partial(self._repeat, probe))
        log.info("%s speaks from %s, a new address: probing it", session.nick, show_address(address))

    def _begin(self, probe: Probe) -> None:
        self.probes[probe.id] = self._at[probe.nick, probe.address] = probe

    def _end(self, probe: Probe) -> None:
        del self.probes[probe.id]
        del self._at[probe.nick, probe.address]

    def _repeat(self, probe: Probe) -> None:
        """Send a probe again and again until it is answered or its time is over."""
        if probe.id not in self.probes:
            return
        now = self._loop.now()
        if now >= probe.deadline and self._loop.drained:
            self._expire(probe)
            return
        if now < probe.deadline:
            self._send_queue.put(probe.datagram(), probe.address)
        # the last call is at the deadline; if the socket was not read empty then, there is one more in each turn
        when = min(now + jittered(self._loop, PROBE_INTERVAL), max(probe.deadline, now + PROBE_RECHECK))
        self._loop.call_at(when, functools.partial(self._repeat, probe))

    def _expire(self, probe: Probe) -> None:
        self._end(probe)
        session = probe.session
        # a probe at another address, where its client has not moved, says nothing of the session
        if session is not None and session.address == probe.address and self._registry.sessions.is_live(session):
            self._unresponsive(session)
        self._unanswered(probe)

    def on_alive(self, info: Info, address: Address, channel: Channel | None = None) -> None:
        """End the probe that this answers."""
        probe = self.probes.get(info["id"])
        if probe is None or (info["nick"], address) != (probe.nick, probe.address):
            self._on_late_alive(info, address, channel)
            return
        session = probe.session
        if session is not None and (info.get("session"), channel) != (session.id, session.channel):
            return
        self._end(probe)
        if session is not None and self._registry.sessions.get(session.id) is session:
            if session.address != address:
                log.info("%s moved to %s", session.nick, show_address(address))
                self._registry.place(session, address, self._loop.now())
            self._heard(session)
            self._note_answer(session.nick)
        self._answered(probe)

    def _on_late_alive(self, info: Info, address: Address, channel: Channel | None) -> None:
        """Count a late answer as a sign of life."""
        session = self._registry.sessions.get(info.get("session", b""))
        if session is not None and session.address == address and session.channel is channel:
            self._heard(session)

    def _note_answer(self, nick: str) -> None:
        self.answers.pop(nick, None)
        self.answers[nick] = self._loop.now()
        if len(self.answers) > self._registry.max_clients:
            del self.answers[next(iter(self.answers))]

    def has_just_answered(self, nick: str) -> bool:
        """Return whether ``nick`` has answered a moment ago, and need not be probed again."""
        return self._loop.now() - self.answers.get(nick, -NEVER) < PROBE_TIMEOUT

    def forget_old_answers(self) -> None:
        """Forget the answers that do not count any more."""
        self.answers = {nick: at for nick, at in self.answers.items() if self._loop.now() - at < PROBE_TIMEOUT}

    def watch_silence(self) -> None:
        """Probe clients of which nothing is heard from now on: call this when a session becomes live."""
        first = self._registry.sessions.longest_silent()
        if first is not None and not self._silence_timer.is_set:
            self._silence_timer.set(first.heard + SILENCE)

    def _probe_silent(self) -> None:
        now, sessions = self._loop.now(), self._registry.sessions
        for session in sessions.silent(now):
            self.probe(session.nick, session.address, session)
            sessions.put_last(session)
        first = sessions.longest_silent()
        if first is not None:
            self._silence_timer.set(max(first.heard + SILENCE, now + PROBE_TIMEOUT))


# --- messages to be kept --------------------------------------------------------------------------------------

MAX_SAVE_STREAMS = 8192   # streams whose receiving end is in memory; the store remembers the others
MAX_SAVED_EARLY = 16384   # numbers that came early, in all of them together: 48 MiB at most


class SaveStream:
    """The server's end of the stream of one sender's messages for one recipient."""

    __slots__ = ("session", "to", "stream", "relay", "kept", "last_count", "nacks")

    def __init__(self, session: Session, to: str, stream: ReceiveStream) -> None:
        self.session, self.to, self.stream = session, to, stream
        self.relay = False
        self.kept = 0           # numbers that wait for the commit
        self.last_count = 0     # numbers that the keeper has counted as waiting here
        self.nacks: list[Info] = []


class Keeper:
    """Messages to be kept, in the streams of ``save``. The way of one, from its datagram to the ack::

        on_save   put in order in its stream
        keep      the registry's verdict, once a turn for each stream:
                    UNKNOWN          refused
                    PROBE_RECIPIENT  forgotten, the recipient is probed. The ack moves nothing: the sender repeats it.
                                       an answer   the sender gets ``exists``, and tries the recipient again
                                       no answer   the recipient is offline: when repeated, the message is kept
                    KEEP             written to the mailbox as far as there is room. The rest is
                                       recipient online    forgotten: mail is on the way, there will be room
                                       recipient offline   refused: full
        commit    (the server's)
        answer    committed: acked, and the recipient's mail is sent; else refused: disk

    What came early waits in memory, within a limit. Beyond it, the streams that were not heard for the longest time
    forget what they hold: an ack has promised nothing for it, and its sender still has it.
    """

    def __init__(self, loop: Loop, registry: Registry, send_queue: SendQueue, drops: Drops, prober: Prober,
                 mail_waits: Callable[[Session], None]) -> None:
        self.streams: OrderedDict[tuple[str, int], SaveStream] = OrderedDict()
        self.to_answer: dict[tuple[str, int], SaveStream] = {}  # heard in this turn; answered at its end
        self.early = 0                                          # numbers that wait in ``streams`` ...
        self._with_early: dict[SaveStream, None] = {}           # ... in these; longest silent first
        self._loop, self._registry, self._send_queue = loop, registry, send_queue
        self._drops, self._prober, self._mail_waits = drops, prober, mail_waits

    def on_save(self, session: Session, info: Info) -> None:
        """Put messages in order; they are kept at the end of the turn."""
        key = (session.nick, info["stream"])
        if "envelope" in info and session.key is None:
            self._drops[Drop.OTHER_CHANNEL] += 1     # a letter is only proved by the channel in which it comes
            return
        if "envelope" in info and not fits_into_mail(session.nick, info["text"], info.get("more", ())):
            self._drops[Drop.TOO_LARGE] += 1           # a ``mail`` with it would be larger than any path must carry
            return
        if key not in self.to_answer and len(self.to_answer) >= MAX_SAVE_STREAMS:
            self._drops[Drop.SAVE_LIMIT] += 1
            return      # the sender will repeat it
        save = self.streams.get(key)
        if save is None:
            first = self._registry.next_number(*key)
            if first is None:
                self._drops[Drop.STORE_UNREADABLE] += 1
                return      # the sender will repeat it
            save = self.streams[key] = SaveStream(session, info["to"], ReceiveStream(info["stream"], first))
            self._forget_streams()
        elif save.to != info["to"]:
            self._drops[Drop.UNKNOWN_STREAM] += 1
            return
        self.streams.move_to_end(key)
        save.session, save.relay = session, info["relay"]
        seal: tuple[Any, ...] = ()
        texts, times = info["text"], info["at"]
        if "envelope" in info:
            seal, times = (session.key, info["envelope"], info["key"]), itertools.repeat(0.0)    # they are sealed, too
            texts = texts_of_parts([[texts, 0, numbers_of(texts)]])
        items = list(zip(texts, times, itertools.repeat(seal)))
        save.stream.on_data(info["n"], items, info.get("more", ()), info["base"])
        save.stream.advance(info["base"])
        self.to_answer[key] = save

    def keep(self) -> None:
        """Apply the registry's verdict to each stream heard in this turn; the commit writes what is kept."""
        for save in self.to_answer.values():
            verdict = self._registry.judge(save.to, save.relay)
            if verdict == PROBE_RECIPIENT:
                self._probe_recipient(save)
            elif verdict == UNKNOWN:
                self._refuse_rest(save, save.stream.next, NO_SUCH_NICK)
            else:
                for run in save.stream.take():
                    # a run without items is a skip; after one that did not fit, the later ones must not be kept either
                    if run.items and not self._keep_run(save, run):
                        break

    def answer(self, committed: bool) -> None:
        """Answer the streams that were heard in this turn, when the commit has succeeded or failed."""
        if self.to_answer:
            for save in self.to_answer.values():
                self._answer(save, committed)
            self.to_answer = {}
            self._forget_early()

    def send_exists(self, save: SaveStream, number: int) -> None:
        """Tell a sender by an ``exists`` that the recipient has answered, and where it is."""
        entry = self._registry.table.get(save.to)
        if entry is not None:
            self._send_queue.put_for(save.session, encode("exists", {
                "stream": save.stream.id, "n": number, "version": entry.version, "entry": entry.row(),
                "knocks": self._registry.sessions.knocks(save.to)}))

    def _probe_recipient(self, save: SaveStream) -> None:
        """Probe a recipient who is believed to be online; if it has just answered, send ``exists`` at once."""
        first, last = save.stream.next, save.stream.reached - 1
        save.stream.give_back(first)
        recipient = self._registry.sessions.of(save.to)
        if last < first or recipient is None:
            return
        if self._prober.has_just_answered(save.to):
            self.send_exists(save, first)
            return
        probe = self._prober.probe(save.to, recipient.address, recipient)
        if len(probe.saves) < MAX_SAVE_STREAMS:
            probe.saves[save.stream.id] = (save, first)

    def _keep_run(self, save: SaveStream, run: Run) -> bool:
        """Keep a run as far as it may be kept; return whether all of it was."""
        first, parts = run.first, [list(group) for _, group in itertools.groupby(run.items, itemgetter(2))]
        if run.more and len(parts) > 1:     # one text, of which only some is sealed: its sender repeats it
            save.stream.give_back(first)
            return False
        for texts, times, seals in (zip(*part) for part in parts):
            parcel = Parcel(first, texts, times if seals[0] else self._plausible(times), run.more, seals[0][:2])
            if not self._keep_part(save, parcel, seals[0][2:]):
                return False
            first += len(texts)
        return True

    def _keep_part(self, save: SaveStream, parcel: Parcel, sealed_for: tuple[bytes, ...]) -> bool:
        """Keep a parcel as far as the mailbox has room; return whether all of it had. ``sealed_for``: the key's name.

        What is sealed must be so for the owner of the nick: nobody else could read it. And what is not, but could be,
        waits until its sender has heard of the key.
        """
        owner, table = self._registry.key_of(save.to), self._registry.table
        if sealed_for and (not owner or sealed_for[0] != name_of_key(owner)):
            self._refuse_rest(save, parcel.n, OTHER_OWNER)
            return False
        if owner and save.session.key and not sealed_for:
            save.stream.give_back(parcel.n)
            self._send_queue.put_for(save.session, table_map(table.version, table.version, []))     # it asks for more
            return False
        fitting = self._registry.keep(save.to, save.session.nick, save.stream.id, parcel)
        save.kept += fitting
        if fitting == len(parcel.texts):
            return True
        if table.is_online(save.to):
            save.stream.give_back(parcel.n + fitting)
        else:
            self._refuse_rest(save, parcel.n + fitting, MAILBOX_FULL)
        return False

    def _plausible(self, times: Iterable[float]) -> list[float]:
        """Return when messages were sent, as their sender says; now, where that cannot be."""
        wall = self._loop.wall()
        return [at if 0 <= at <= wall + DAY else wall for at in times]     # not true for NaN

    def _refuse_rest(self, save: SaveStream, first: int, reason: Refusal) -> None:
        """Refuse what came without a gap from ``first`` on."""
        last = save.stream.reached - 1
        save.stream.give_back(first)
        if last >= first:
            save.nacks.append({"stream": save.stream.id, "first": first, "last": last, "reason": reason.value})

    def _answer(self, save: SaveStream, committed: bool) -> None:
        stream = save.stream
        # without a commit, and without anything to be kept, neither is done: the ack moves nothing
        if save.kept and not committed:
            self._refuse_rest(save, stream.next, DISK_FAILS)
        elif committed:
            stream.all_written()
            recipient = self._registry.sessions.of(save.to)
            if save.kept and recipient is not None:
                self._mail_waits(recipient)
        save.kept = 0
        self._count(save)
        nacks, save.nacks = save.nacks, []
        self._send_queue.put_for(save.session, encode("ack", stream.ack()), *(encode("nack", info) for info in nacks))

    def _count(self, save: SaveStream) -> None:
        """Count again what waits in a stream that was just heard, or emptied."""
        if self.streams.get((save.session.nick, save.stream.id)) is save:
            self.early += save.stream.buffered - save.last_count
            save.last_count = save.stream.buffered
            self._with_early.pop(save, None)
            if save.last_count:
                self._with_early[save] = None

    def _forget_early(self) -> None:
        """Forget what came early in the longest silent streams, beyond the limit."""
        while self.early > MAX_SAVED_EARLY:
            save = next(iter(self._with_early))
            save.stream.give_back(save.stream.next)
            self._count(save)

    def _forget_streams(self) -> None:
        """Forget the longest silent streams, beyond the limit: how far they were kept is in the store."""
        while len(self.streams) > MAX_SAVE_STREAMS:
            _, old = self.streams.popitem(last=False)
            self.early -= old.last_count
            self._with_early.pop(old, None)


# --- mail -----------------------------------------------------------------------------------------------------

MAIL_AHEAD = 4096         # numbers of one client's mail in memory
MAIL_BATCH = 512          # numbers that are loaded at once: their recipient works while the next ones are
MAIL_TOTAL = 16384        # numbers of everybody's mail in memory, beyond which each client's is loaded in small steps
MAIL_STEP = 64            # numbers: these
MAIL_RETRY = 1.0          # s until mail that could not be read from the store is tried again


class MailStream:
    """The server's end of the stream of one client's mail. Its numbers are those of the mail in the session."""

    __slots__ = ("session", "id", "stream", "timer", "last_count")

    def __init__(self, session: Session, id_: int, timer: RestartableTimer) -> None:
        self.session, self.id = session, id_
        header = protocol.FOR_SIZE + len(self.frame(MAX_NUMBER, MAX_NUMBER, [])) + protocol.ARRAY_GROWTH
        longest_run = protocol.MAIL_RUN_SIZE + (0 if session.channel is None else protocol.SEAL_RUN)
        self.stream = SendStream(id_, protocol.MAX_DATAGRAM - header - longest_run)
        self.timer = timer          # calls when something of it is due
        self.last_count = 0         # numbers that the postman has counted as in memory

    def frame(self, first: int, base: int, letters: Sequence[StoredLetter]) -> bytes:
        """Return a ``mail``, which names its recipient if others can read it."""
        info: Info = {"stream": self.id, "n": first, "base": base, "items": mail_runs(letters)}
        if self.session.channel is None:
            info["to"] = self.session.nick
        return encode("mail", info)


class Postman:
    """Stored mail on its way to its recipients: one stream of ``mail`` for each client that has some.

    A client gets mail when its session is live and it holds the table (before, it does not know the senders). The mail
    is loaded from the store in steps, never all of it. It is deleted there when the client has acked it.

    ``heard`` is called with the session of each ack.
    """

    def __init__(self, loop: Loop, registry: Registry, send_queue: SendQueue, drops: Drops,
                 heard: Callable[[Session], None]) -> None:
        self.streams: dict[bytes, MailStream] = {}      # by the id of the session
        self.loaded, self.registry = 0, registry        # numbers of mail in memory
        self._loop, self._send_queue, self._drops, self._heard = loop, send_queue, drops, heard
        self._by_stream: dict[int, MailStream] = {}
        self._due: dict[bytes, None] = {}               # ids of the sessions to be looked at in this turn

    def note(self, session: Session) -> None:
        """Look at the mail of a client at the end of the turn: something has happened to it."""
        self._due[session.id] = None

    def wake(self, session: Session) -> None:
        """Send what a client has not acked once more: it is back."""
        mail = self.streams.get(session.id)
        if mail is not None:
            mail.stream.resume()
        self.note(session)

    def note_version(self, session: Session, version: int) -> None:
        """Note that a client holds the table up to ``version``: it may be able to get mail from now on."""
        if self.registry.note_table(session, version):
            self.wake(session)

    def on_ack(self, info: Info, address: Address, channel: Channel | None = None) -> None:
        """Note what a client has shown of its mail."""
        mail = self._by_stream.get(info["stream"])
        if mail is None or mail.session.address != address or mail.session.channel is not channel:
            self._drops[Drop.UNKNOWN_STREAM] += 1
            return
        session = mail.session
        self._heard(session)
        if mail.stream.on_ack(self._loop.now(), info["next"], info["have"], info["room"]):
            self.registry.mail_acked(session, mail.stream.base)
        self.note(session)

    def close(self, ended: Iterable[Session]) -> None:
        """Forget the streams of sessions that have ended; what they held is still in the store."""
        for session in ended:
            mail = self.streams.pop(session.id, None)
            if mail is not None:
                mail.timer.cancel()
                self.loaded -= mail.last_count
                del self._by_stream[mail.stream.id]

    def deliver(self) -> None:
        """Send what is due to those to whose mail something has happened."""
        if self._due:
            for id_ in list(self._due):
                session = self.registry.sessions.get(id_)
                if session is not None:
                    self.send(session)
            self._due.clear()

    def send(self, session: Session) -> None:
        """Send what is due of a client's mail, and load more of it."""
        if not session.holds_table or not self.registry.sessions.is_live(session):
            return
        last = self.registry.mail_number(session)
        mail = self.streams.get(session.id)
        if mail is None:
            if not last:
                return
            mail = self._begin(session)
        stream = mail.stream
        most, step = (MAIL_AHEAD, MAIL_BATCH) if self.loaded < MAIL_TOTAL else (MAIL_STEP, MAIL_STEP // 2)
        loaded_to = stream.end
        if stream.pending <= most - step and stream.end <= last:
            self._load(mail, step)
        self.loaded += stream.pending - mail.last_count
        mail.last_count = stream.pending
        for packet in stream.poll(self._loop.now()):
            self._send_queue.put_for(session, mail.frame(packet.first, stream.base, packet.items))
        due = stream.due()
        if stream.end <= last and stream.pending <= most - step:    # more is loaded in the next turn, if it can be read
            due = min(due, self._loop.now() + (0.0 if stream.end > loaded_to else MAIL_RETRY))
        mail.timer.set(due)

    def _begin(self, session: Session) -> MailStream:
        timer = RestartableTimer(self._loop, functools.partial(self.send, session))
        mail = self.streams[session.id] = MailStream(session, new_id(self._loop), timer)
        self._by_stream[mail.stream.id] = mail
        return mail

    def _load(self, mail: MailStream, step: int) -> None:
        """Load up to ``step`` letters into the stream."""
        stream = mail.stream
        letters, is_damaged = self.registry.fetch(mail.session, stream.end, step)
        if is_damaged:
            log.error("mail for %s is damaged in the store", mail.session.nick)
        # Capacity leaves room for the header of a datagram's first run, and ``mail_sizes`` counts that header in the
        # letter, too. So the longest letter may exceed capacity by less than one header; it still fits into a datagram
        # of its own.
        sizes = [min(size, stream.capacity) for size in mail_sizes(letters)]
        more = [letter[3] for letter in letters]
        stream.queue(letters, sizes, list(itertools.compress(itertools.count(stream.end), more)))


# --- the table ------------------------------------------------------------------------------------------------

BROADCAST_GAP = 0.01      # s in which changes of the table are gathered
BROADCAST_SHARE = 10      # a broadcast takes at most this part of the server's time (1 / n), but ...
BROADCAST_WAIT = 2.0      # s; ... no change waits longer for the next one: clients would have a wrong table that long
BROADCAST_DATAGRAMS = 500     # of a broadcast that are sent in one turn
SYNC_SLICE = 16           # clients whose sync is answered in one turn: 0.6 MB ...
BUSY_SLICE = 2            # ... and in one that has left something unread: whoever registers must be heard in time
RUSH = 300                # changes of a large table in a second: while there are more, whoever asks for it waits, ...
RUSH_TIME = 10.0          # s; ... so long at most: most of what is sent in a rush is out of date when it is over
RUSH_TABLE = 1000         # entries; a smaller table is sent at once: it has a few pages
RUSH_INTERVAL = 0.25      # s in which changes are counted
KEYS_TOLD = 200           # changes; a client that encrypts and misses more is told the keys in them when it asks
CACHE_PAGES = 4096        # encoded pages of the table that are remembered: 5 MB
CACHE_AGE = 1000          # changes of the table, beside one for each entry, after which the cache is emptied
PAGE_SIZE = protocol.MAX_DATAGRAM - 104     # bytes of entries in one ``table``, beside its own fields and ``for``
PACKED_SIZE = protocol.MAX_DATAGRAM - protocol.FOR_SIZE     # bytes of a ``packed``, at most ...
PACKED_AIM = 0.97         # ... and the part of them that a page is to take
MOST_GAIN = 8.0           # times as many entries in a ``packed`` as in a ``table``, at most


class Pages:
    """The table as datagrams, for clients that read compressed ones (``is_packed``), or for others.

    ``is_untold``: without keys, which those who encrypt ask for (``want``). Each key has 32 bytes that nothing
    compresses: to a client that misses much, they would be two thirds of it, and it needs few of them.

    When many clients come at once, they need the same pages: those that are full are remembered, the last one until the
    table changes. Compressed ones are filled up to the same size, so that many of them are sent with one call.
    """

    def __init__(self, table: Table, is_packed: bool, is_untold: bool = False) -> None:
        self._table, self._is_packed, self._is_untold = table, is_packed, is_untold
        self._gain = 2.0        # how many times as many entries a page has if it is packed; learned from those before
        self._cache: dict[int, tuple[bytes, int, int]] = {}     # version -> the page after it, its version, and when
        self._emptied = 0       # version of the table when the cache was empty

    def after(self, since: int) -> tuple[bytes, int]:
        """Return the page that begins at the version ``since``, and the version that it reaches."""
        version = self._table.version
        if version - self._emptied > CACHE_AGE + len(self._table) or len(self._cache) > CACHE_PAGES:
            self._cache.clear()
            self._emptied = version
        data, reached, made = self._cache.get(since, (b"", 0, 0))
        if not data or (made != version and reached == made):      # the last page is not full
            data, reached = self._packed(since) if self._is_packed else self._plain(since)
            self._cache[since] = data, reached, version
        return data, reached

    def all_after(self, since: int) -> Iterator[bytes]:
        """Yield the pages of all that has changed after the version ``since``."""
        while since < self._table.version:
            data, since = self.after(since)
            yield data

    def _plain(self, since: int) -> tuple[bytes, int]:
        page = next(self._table.pages(since, PAGE_SIZE))
        return table_map(*page), page.version

    def _packed(self, since: int) -> tuple[bytes, int]:
        while True:
            page = next(self._table.pages(since, int(PAGE_SIZE * self._gain), self._is_untold))
            plain = table_map(*page)
            data = packed(plain)
            fill = len(data) / PACKED_SIZE
            if fill <= 1 or self._gain == 1:
                break
            self._gain = max(1.0, PACKED_AIM * self._gain / fill)
        if page.version == self._table.version:
            return min(data, plain, key=len), page.version
        if fill < PACKED_AIM:
            self._gain = min(PACKED_AIM * self._gain / fill, MOST_GAIN)
        return widened(data, PACKED_SIZE) if fill > 0.5 else data, page.version


def in_series(pages: Sequence[bytes]) -> Sequence[Sequence[bytes]]:
    """Return pages in groups of as many as answer one ``sync``."""
    return [pages[start:start + SYNC_PAGES] for start in range(0, len(pages), SYNC_PAGES)]


class Rush:
    """Whether so many register that the table is better sent to them a little later."""

    def __init__(self, now: float, version: int) -> None:
        self._since, self._version = now, version   # when the count began, and the version of the table then
        self._began: float | None = None

    def lasts(self, now: float, version: int, entries: int) -> bool:
        """Return whether those who ask for the table, which has that version and so many entries, shall wait."""
        seconds = now - self._since
        if seconds >= RUSH_INTERVAL:
            is_rush = entries >= RUSH_TABLE and version - self._version > RUSH * seconds
            self._since, self._version = now, version
            if not is_rush:
                self._began = None
            elif self._began is None:
                self._began = now
        return self._began is not None and now < self._began + RUSH_TIME


class Announcer:
    """The table, as it is sent to clients.

    *Answers*: a client that misses some of the table says up to which version it holds it. It gets a few pages from
    there, and asks again until it has everything. In a ``Rush`` it waits.

    *Broadcasts*: what has changed since the last one is encoded once, and sent to every live client in slices, one each
    turn, after everything else. A broadcast to 10,000 clients takes a while. So after one, the next waits for ten times
    as long as it took, and gathers what changes meanwhile.
    """

    def __init__(self, loop: Loop, registry: Registry, send: Callable[[bytes, Address], None],
                 send_series: SendSeries) -> None:
        """``send``, ``send_series``: at once. What this sends comes behind all that is in the queue of a turn."""
        self.announced_version = registry.table.version         # that of the last broadcast
        self.unsent: Iterator[tuple[Session, Sequence[bytes]]] | None = None    # the rest of a broadcast that goes on
        self._loop, self._registry, self._send, self._send_series = loop, registry, send, send_series
        self._to_sync: dict[bytes, int] = {}    # id of a session -> the version that its client holds
        self.newcomers: set[bytes] = set()      # of this turn: others shall hear of them before they hear of others
        self._rush = Rush(loop.now(), registry.table.version)
        self._sync_timer = RestartableTimer(loop, wake_up)      # the end of its turn answers more of them
        self._pages = {is_packed: Pages(registry.table, is_packed) for is_packed in (False, True)}
        self._untold_pages, self.keys_told = Pages(registry.table, True, is_untold=True), KEYS_TOLD
        self._broadcast_end = -NEVER
        self._broadcast_cost = 0.0              # s that the last one took
        self._broadcast_timer = RestartableTimer(loop, wake_up)     # wakes the loop; settle then sends the next slice

    def note_sync(self, session: Session, version: int) -> None:
        """Note that a client holds the table up to ``version``: what it misses is sent at the end of the turn."""
        self._to_sync[session.id] = version

    def answer(self) -> None:
        """Answer those who have asked: each once a turn, and a limited number in each turn."""
        newcomers, self.newcomers = self.newcomers, set()
        table = self._registry.table
        if self._rush.lasts(self._loop.now(), table.version, len(table)):
            self._sync_timer.set(self._loop.now() + RUSH_INTERVAL)
            return
        most = SYNC_SLICE if self._loop.drained else BUSY_SLICE
        for id_ in list(itertools.islice((id_ for id_ in self._to_sync if id_ not in newcomers), most)):
            version = self._to_sync.pop(id_)
            session = self._registry.sessions.get(id_)
            if session is not None:
                self._send_missing(session, version)
        if self._to_sync:
            self._sync_timer.set(self._loop.now())

    def _send_missing(self, session: Session, since: int) -> None:
        version, datagrams = self._registry.table.version, []
        pages = self._pages_for(session, version - since)
        if since >= version:
            datagrams.append(session.told(table_map(version, version, [])))     # nothing is missing: that is an answer
        while since < version and len(datagrams) < SYNC_PAGES:
            data, since = pages.after(since)
            datagrams.append(session.told(data))
        self._send_series(datagrams, session.address)

    def _pages_for(self, session: Session, missing: int) -> Pages:
        """Return the pages for a client that misses so many changes."""
        asks_for_keys = session.channel is not None and session.reads_packed and missing > self.keys_told
        return self._untold_pages if asks_for_keys else self._pages[session.reads_packed]

    def broadcast(self) -> None:
        """Send a slice of the broadcast that goes on, or begin one if the table has changed and it is time."""
        table = self._registry.table
        if self.unsent is None and table.version <= self.announced_version:
            return
        now = self._loop.now()
        if self.unsent is None:
            rest = min(BROADCAST_SHARE * self._broadcast_cost, BROADCAST_WAIT)
            due = self._broadcast_end + max(BROADCAST_GAP, rest)
            if due > now:
                self._broadcast_timer.set(due)
                return
            self.unsent = self._begin()
        began = self._loop.clock()
        is_over = self._send_slice(self.unsent)
        self._broadcast_cost += self._loop.clock() - began
        self._broadcast_end = now
        if is_over:
            self.unsent = None
        self._broadcast_timer.set(NEVER if is_over and table.version <= self.announced_version else now)

    def _begin(self) -> Iterator[tuple[Session, Sequence[bytes]]]:
        table, sessions = self._registry.table, self._registry.sessions.live_sessions()
        since, missing = self.announced_version, table.version - self.announced_version
        series = functools.lru_cache(lambda pages: in_series(list(pages.all_after(since))))
        self.announced_version = table.version
        self._broadcast_cost = 0.0
        return ((session, some) for session in sessions for some in series(self._pages_for(session, missing)))

    def _send_slice(self, unsent: Iterator[tuple[Session, Sequence[bytes]]]) -> bool:
        """Send the next datagrams of a broadcast; return whether it is over."""
        is_live = self._registry.sessions.is_live
        left = BROADCAST_DATAGRAMS if self._loop.drained else BUSY_SLICE * SYNC_PAGES
        for session, pages in unsent:
            left -= len(pages)
            if session.holds_table and is_live(session):    # a client that does not hold it will ask
                if len(pages) == 1:         # (calls are saved here: mostly there is one page for each of thousands)
                    data = pages[0]
                    datagram = addressed(session.id, data) if session.channel is None else session.told(data)
                    self._send(datagram, session.address)
                else:
                    self._send_series([session.told(data) for data in pages], session.address)
            if left <= 0:
                return False
        return True


# --- the server -----------------------------------------------------------------------------------------------

NOTICE_INTERVAL = 0.02    # s between slices of "I am back"
NOTICE_SLICE = 100        # datagrams in each: 5,000 a second; those who register wait for their turn
CALLS_PER_SECOND = 20     # to one client, at most
TO_OTHERS = frozenset({"save", "meet"})     # what is meant for another client
HOUSEKEEPING = 3600.0     # s between looks for nicks that have lapsed


class Server:
    """Puts the parts together; see the opening of this module.

    Hand it each datagram with ``receive``, and call ``settle`` at the end of each turn. It calls ``send`` there, with
    (datagram, address). ``nick_lapse``: days. ``stranger_replies``: a second, at most.
    """

    def __init__(self, loop: Loop, send: Callable[[bytes, Address], None], registry: Registry,
                 nick_lapse: float = NICK_LAPSE, stranger_replies: int = STRANGER_REPLIES,
                 keys: Keys | None = None, must_encrypt: bool = False, send_series: SendSeries | None = None) -> None:
        """``send_series``: sends many datagrams to one address, more cheaply than by as many calls of ``send``."""

        def send_each(datagrams: Sequence[bytes], address: Address) -> None:
            for datagram in datagrams:
                send(datagram, address)
        self.loop, self.registry, self.nick_lapse = loop, registry, nick_lapse
        self.decoder = Decoder()
        self.boot = new_id(loop)        # another one in each run of the server
        self.drops: Drops = dict.fromkeys(Drop, 0)
        self.send_queue = SendQueue(send)
        self.limit = ReplyLimit(loop, self.send_queue.put, stranger_replies)
        self.prober = Prober(loop, registry, self.send_queue, self.limit, self._heard, self._unresponsive,
                             self._answered, self._unanswered)
        self.gate = Gate(loop, registry, self.send_queue, self.limit, self.drops, self.prober, self.boot, keys,
                         must_encrypt)
        self.postman = Postman(loop, registry, self.send_queue, self.drops, self._heard)
        self.keeper = Keeper(loop, registry, self.send_queue, self.drops, self.prober, self.postman.note)
        self.committer = Committer(loop, registry.mailbox)
        self.announcer = Announcer(loop, registry, send, send_series or send_each)
        self.calls = RateLimit(CALLS_PER_SECOND)
        self._notices: deque[Address] = deque()     # where to say that the server is back
        self._from_sessions: dict[str, Callable[[Session, Info], None]] = {
            "ping": self._on_ping, "sync": self._on_sync, "want": self._on_want, "meet": self._on_meet,
            "save": self.keeper.on_save}
        registry.public_key = keys.pair.public if keys is not None else b""
        self._from_anybody: dict[str, Callable[[Info, Address, Channel | None], None]] = {
            "reg": self.gate.on_reg, "hello": self.gate.on_hello, "alive": self.prober.on_alive,
            "ack": self.postman.on_ack, "dereg": self._on_dereg}

    def start(self) -> None:
        """Tell the last known addresses that the server is there, and begin to look after the nicks."""
        self._notices.extend(self.registry.known_addresses())
        self.loop.call_at(self.loop.now(), self._send_notices)     # in a turn: what waits is sent at its end
        self._keep_house()

    def stop(self) -> bool:
        """Write and close the store; return whether that went well."""
        return self.committer.close()

    def receive(self, datagram: bytes, address: Address) -> None:
        """Handle a datagram from the network."""
        self.limit.allowance = len(datagram)
        channel: Channel | None = None
        index = index_of(datagram) if datagram[:1] == RECORD_MARK and self.gate.hellos is not None else None
        if index is not None:
            opened = self._opened(index, datagram, address)
            if opened is None:
                return
            channel, datagram = opened
        for tag, info in self.decoder.decode(datagram):
            if tag in self._from_sessions:
                session = self._session(info, address, channel)
                if session is not None and session.is_visit and tag in TO_OTHERS:
                    self.drops[Drop.VISIT] += 1     # nobody could answer
                elif session is not None:
                    self._from_sessions[tag](session, info)
            elif tag in self._from_anybody:
                self._from_anybody[tag](info, address, channel)
            else:
                self.drops[Drop.NOT_FOR_SERVERS] += 1

    def settle(self) -> None:
        """End a turn: commit, then send everything that was decided in it."""
        self.gate.read_hellos()
        self.postman.close(self.registry.sessions.pop_ended())
        self.keeper.keep()
        committed = self.committer.commit()
        self.keeper.answer(committed)
        self.postman.deliver()
        self.send_queue.flush()
        self.announcer.answer()
        self.announcer.broadcast()
        self.registry.mailbox.note_clock(self.loop.now(), self.loop.wall())

    def counters(self) -> dict[str, int]:
        """Return what there is now, and what was counted since the start."""
        return {**self.registry.counters(), "save_streams": len(self.keeper.streams),
                "mail_streams": len(self.postman.streams), "probes": len(self.prober.probes),
                "refusals": self.gate.refusals, "store_failures": self.committer.failures,
                "drop_invalid": self.decoder.dropped, "drop_no_reply": self.limit.refused,
                **{why.value: count for why, count in self.drops.items()}}

    def _opened(self, index: bytes, record: bytes, address: Address) -> tuple[Channel, bytes] | None:
        """Return the channel of a record, and what was sealed in it; answer with a hint if there is none."""
        channel, hello = self.registry.sessions.channels.get(index), None
        if channel is None and self.gate.hellos is not None:
            hello = self.gate.hellos.of_index(index)
            channel = hello.channel if hello is not None else None
        if channel is None:
            self.drops[Drop.UNKNOWN_CHANNEL] += 1
            self.limit.reply(self._pong(0, 0), address)     # of an earlier run of the server, perhaps
            return None
        try:
            text = channel.open(record)
        except Forged:
            self.drops[Drop.FORGED] += 1
            return None
        if hello is not None:
            if not self.gate.confirm(hello):        # its client believes that it has a session
                self._answer_replaced(hello.session, address, channel)
                return None
            self.announcer.newcomers.add(hello.session)
        return channel, text

    def _session(self, info: Info, address: Address, channel: Channel | None) -> Session | None:
        """Return the session that ``info`` speaks for, if it comes from where that is known to be; answer if not."""
        session = self.registry.sessions.get(info["session"])
        if session is None:
            self.drops[Drop.UNKNOWN_SESSION] += 1
            self._answer_unknown(info, address, channel)
            return None
        if session.channel is not channel:
            self.drops[Drop.OTHER_CHANNEL] += 1
            return None
        if session.address != address:
            self.drops[Drop.OTHER_ADDRESS] += 1
            self.prober.probe_new_address(address, session)
            return None
        self._heard(session)
        return session

    def _answer_unknown(self, info: Info, address: Address, channel: Channel | None) -> None:
        """Answer a request whose session is not known: it was replaced, it was evicted, or the server has restarted."""
        how = self.registry.sessions.how_ended(info["session"])
        if how == REPLACED:
            self._answer_replaced(info["session"], address, channel)
        else:
            # Boot 0 makes the client register again: with our own it would believe that its session is good.
            # BYE: a late copy of a ping, its client has left.
            self.limit.reply(self._pong(info.get("id", 0), self.boot if how == BYE else 0), address, channel)

    def _answer_replaced(self, session: bytes, address: Address, channel: Channel | None) -> None:
        """Tell a client that the nick of its session has gone to another one: it asks for it again."""
        refused = {"session": session, "nick": protocol.NO_NICK, "reason": REPLACED.value}
        self.limit.reply(encode("refused", refused), address, channel)

    def _heard(self, session: Session) -> None:
        """Note a sign of life, and send a client that comes back with it what it has missed."""
        if self.registry.heard(session, self.loop.now()):
            log.info("%s is back", session.nick)
            self.prober.watch_silence()
            self.postman.wake(session)

    def _unresponsive(self, session: Session) -> None:
        """Mark a client offline that does not answer a probe, and tell it so: if it lives, it pings, and is back."""
        log.info("%s does not answer a probe: offline", session.nick)
        self.registry.went_offline(session, self.loop.now())
        self.send_queue.put_for(session, self._pong(0, self.boot, session))

    def _answered(self, probe: Probe) -> None:
        """Refuse the claims, and send ``exists`` to the senders: the client is there."""
        for claim in probe.claims.values():
            self.gate.refuse(claim, TAKEN)
        for save, number in probe.saves.values():
            self.keeper.send_exists(save, number)

    def _unanswered(self, probe: Probe) -> None:
        """Go on with the claims: nobody is there. (Saves need nothing: their senders repeat them.)"""
        if probe.claims:
            self.registry.not_there(probe.nick, probe.address)
        for claim in probe.claims.values():     # the first one gets the nick, and is probed for the others
            self.gate.consider(claim)

    def _on_ping(self, session: Session, info: Info) -> None:
        self.send_queue.answer(session, self._pong(info["id"], self.boot, session))
        self.postman.note_version(session, info["version"])

    def _on_sync(self, session: Session, info: Info) -> None:
        if info.get("early", False):
            session.is_early = True
            self.registry.announce(session)
        self.postman.note_version(session, info["version"])
        self.announcer.note_sync(session, info["version"])

    def _on_want(self, session: Session, info: Info) -> None:
        """Say which key somebody has: see ``Pages``."""
        nick, table = info["nick"], self.registry.table
        entry = table.get(nick)
        key, is_bound = (entry.key, entry.is_bound) if entry is not None else (b"", False)
        self.send_queue.put_for(session, encode("key", {"nick": nick, "key": key, "bound": is_bound,
                                                        "version": table.version}))

    def _on_meet(self, session: Session, info: Info) -> None:
        """Tell a recipient where somebody is who does not get through to it: see ``Meetings`` of the client."""
        recipient = self.registry.sessions.of(info["to"])
        if recipient is None or not recipient.knocks or not self.registry.table.is_online(info["to"]):
            return
        if not self.calls.allows(self.loop.now(), recipient.id):
            self.drops[Drop.CALL_LIMIT] += 1
            return
        host, port = session.address
        call: Info = {"from": session.nick, "stream": info["stream"], "host": host, "port": port}
        if session.own is not None and protocol.is_private(session.own[0]) and host == recipient.address[0]:
            call["own"] = session.own
        self.send_queue.put_for(recipient, encode("call", call))

    def _on_dereg(self, info: Info, address: Address, channel: Channel | None) -> None:
        if self.registry.sessions.how_ended(info["session"]) == BYE:    # again: the first answer was lost
            self.limit.reply(encode("bye", {"session": info["session"]}), address, channel)
            return
        session = self._session(info, address, channel)
        if session is not None:
            log.info("%s deregistered", session.nick)
            self.registry.deregister(session, self.loop.now())
            self.send_queue.answer(session, encode("bye", {"session": session.id}))

    def _pong(self, id_: int, boot: int, session: Session | None = None) -> bytes:
        return encode("pong", {"id": id_, "boot": boot, "version": self.announcer.announced_version,
                               "mail": self.registry.mail_number(session) if session is not None else 0})

    def _send_notices(self) -> None:
        """Tell some of the clients that the server is back; those that run register again."""
        for _ in range(min(NOTICE_SLICE, len(self._notices))):
            self.send_queue.put(self._pong(0, self.boot), self._notices.popleft())
        if self._notices:
            self.loop.call_at(self.loop.now() + NOTICE_INTERVAL, self._send_notices)

    def _keep_house(self) -> None:
        now = self.loop.now()
        for known in self.registry.lapse(now, self.nick_lapse):
            log.warning("%s has lapsed: %d messages deleted", known.nick, known.messages)
        self.registry.note_time(now, self.loop.wall())
        self.prober.forget_old_answers()
        self.loop.call_at(now + HOUSEKEEPING, self._keep_house)
