"""How a client meets its server and other clients: addresses, nicks and keys are proved; and the encryption.

Rules of this file
------------------
- No socket, no clock, no randomness of its own: they come as arguments.
- PyNaCl is imported by ``load_sodium`` alone. Encrypted bytes that do not verify raise ``Forged``, and change nothing.
- Two programs that differ in what is made here do not understand each other: see docs/protocol.md.
- What costs much is done only for those whose address is proved, and by clients for addresses of the table, a limited
  number of times a second. Who somebody is, is believed only after that.

How it works
------------
Where one side cannot encrypt, and where both can::

    client                          server          client                          server
      reg                     -->                     reg, without a nick     -->
                              <--   cookie                                    <--   cookie, and the server's key
      reg: cookie, nick and   -->                     hello: cookie, and      -->
      token                                           message 1 of Noise IK
                              <--   welcome                                   <--   hello: message 2, a welcome in it
      all in plain                                    all in records: the first one makes the session

Only who receives at an address can repeat the cookie that went there, so it proves the address. The token proves the
nick in plain, and is good for this server alone; in message 1, the client's key and a proof made of the token do.

First come the parties: ``Handshake`` and ``Connection`` at the client (the server's side is in ``registry``), ``Peers``
between two clients. Then the encryption: ``Sodium``, ``HandshakeState`` (Noise), ``Channel`` (records), ``Letters``
(what waits at the server, which cannot read it), and ``SealedMail``, which makes and reads those of a client.
"""
from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from itertools import repeat

from home import KnownKeys, Pin, fingerprint, sha256
from loop import Endpoint, log
from stream import NOT_YET, Frames
from protocol import (BROKEN, CONTINUES, COUNT_BYTES, GREET_SIZE, HEADER_SIZE, INDEX_BYTES, INDEX_END, JOIN_SIZE,
                      KEY_BYTES, KEY_NAME_BYTES, MAX_NUMBER, NEVER, NO_NICK, OTHER_KEY, RECORD, REG_SIZE, SEALED,
                      STRANGELY_PLAIN, TAG_SIZE, UNSEALED, Address, Any, Decoder, Info, Opened, ReplayWindow, contents,
                      contents_of, encode, folded, hello_prologue, index_of, is_private, letter_prologue, numbers_of,
                      offer_prologue, padded)

Send = Callable[[bytes, Address], None]     # sends a datagram


# --- the handshake --------------------------------------------------------------------------------------------

COOKIES_PER_ATTEMPT = 3   # cookies accepted for one attempt to register
BUSY_SIGNS = 10           # of one request: cookies that say "wait", and count
NO_REQUEST = -1           # an id that no request has


class Handshake:
    """A request to register. It goes to all addresses of the server, until the first cookie decides on one of them.

    Only that one gets the proof of the nick. Answers count from any address: only who was asked knows ``id``.

    With ``keys``, the cookie of a server that encrypts has its key. Then the request goes on as a handshake of Noise,
    and only what is in that counts as its answer. Once it has come, this program speaks to the owner of that key alone:
    a cookie that names another key, or none, anybody on the way may have made.
    """

    def __init__(self, send: Send, proof: Callable[[bytes, str], bytes] | None = None,
                 own_address: Callable[[Address], Address | None] = lambda server: None,
                 keys: Keys | None = None, must_encrypt: bool = False, pin: Pin | None = None,
                 known: KnownKeys | None = None, is_visit: bool = False) -> None:
        """``proof``: returns the token for (server id, nick); None: the nick will be nobody's.

        ``is_visit``: the program only reads the table of clients, and shall not stand in it.

        ``own_address``: returns from which address this machine sends to a server; None: it is not known.
        ``must_encrypt``: with a server that cannot, nothing but the question is spoken. ``pin``: of this server.
        ``known``: the keys that other clients have had; it is for ``Peers``.
        """
        self.pin, self.known = pin or Pin(), known
        self.is_visit = is_visit
        self.tells_of_plain = keys is not None  # the user is still to hear that nothing is encrypted
        self.doubt: str | None = None           # what the cookies say that must not be: "insecure", "key-changed"
        self.keys, self.must_encrypt, self.has_proof = keys, must_encrypt, proof is not None
        self._noise: HandshakeState | None = None       # once this request is one of Noise; None behind its answer
        self.on_welcome: Callable[[Info, Address, Channel], None] = lambda info, address, channel: None
        self.on_refused: Callable[[Info, Address], None] = lambda info, address: None
        self.on_found: Callable[[bool], None] = lambda is_busy: None    # hears that there is a server
        self._hello = b""                       # its first message, as it is sent
        self._index = self._key_asked = b""     # what is in it: how records are to call our channel; and for which key
        self.id = NO_REQUEST
        self.own: Address | None = None         # our address, if it is one of a private network
        self._own_address = own_address
        self.has_cookie = False
        self._send, self._proof, self._nick = send, proof, ""
        self._cookie = (("", 0), b"", b"")      # from where, the id of the server, and the cookie itself
        self._cookies_left = self._signs_left = 0

    def begin(self, id_: int, nick: str) -> None:
        """Make a new request, for ``nick``; ``id_`` is a new random number."""
        self.id, self.has_cookie, self._nick = id_, False, nick
        self._noise, self._hello, self.doubt, self._signs_left = None, b"", None, BUSY_SIGNS

    @property
    def is_plain(self) -> bool:
        """Whether an answer in plain may count."""
        return not (self.pin.key or self.pin.digits or self._hello or self.must_encrypt)

    def ask(self, addresses: Sequence[Address], cookies_left: int = COOKIES_PER_ATTEMPT) -> None:
        """Send the request: to ``addresses``, or to where the cookie came from."""
        self._cookies_left = cookies_left
        if not self.has_cookie:
            info: Info = {"id": self.id, "nick": self._nick}
            if self.keys is not None:
                info.update(nick=NO_NICK, secure=True)
            for address in addresses:
                self._send(padded("reg", info, REG_SIZE), address)
        elif self._hello:
            self._send(self._hello, self._cookie[0])
        elif self.is_plain:
            address, server, cookie = self._cookie
            info = {"id": self.id, "nick": self._nick, "cookie": cookie, **self._about_us(address)}
            if self._proof is not None:
                info["token"] = self._proof(server, self._nick)
            self._send(padded("reg", info, REG_SIZE), address)

    def _about_us(self, server: Address) -> Info:
        """Return what a server hears of this program beside its nick."""
        own = self._own_address(server)
        self.own = own if own is not None and is_private(own[0]) else None
        about: Info = {"visit": True, "packed": True} if self.is_visit else {"knocks": True, "packed": True}
        return about if self.own is None else {**about, "own": self.own}

    def on_cookie(self, info: Info, address: Address) -> None:
        """Prove our address. The same cookie again says that the server is busy, and will answer."""
        if info["id"] == self.id and self._cookies_left and not (self.has_cookie and address != self._cookie[0]):
            cookie = address, info["server"], info["cookie"]
            if self.has_cookie and cookie == self._cookie:
                self._signs_left -= 1
                if self._signs_left >= 0:
                    self.on_found(True)
                return
            if self.keys is not None:
                self._begin_noise(self.keys, info, address)
            if not self.has_cookie:
                self.on_found(False)
            self.has_cookie, self._cookie = True, cookie
            self.ask((), self._cookies_left - 1)

    def _begin_noise(self, keys: Keys, info: Info, address: Address) -> None:
        """Make the first message for the server whose cookie this is, once: it is repeated byte for byte."""
        shown = info.get("key")
        self.doubt = None
        if shown is None and not self.is_plain:
            self.doubt = "insecure"
        elif shown is not None and not self.pin.admits(shown):
            self.doubt, self.pin.refused = "key-changed", shown
        key = self.pin.key or (shown if self.doubt is None else None)
        if key is None:
            return
        join: Info = {"nick": self._nick, "index": keys.new_index(), **self._about_us(address)}
        if self._proof is not None:
            token = self._proof(info["server"], self._nick)
            join["proof"] = bind_proof(hash_of(token), key, keys.pair.public)
        prologue = hello_prologue(info["server"], self.id, info["cookie"])
        noise = HandshakeState(keys.sodium, "IK", True, prologue, keys.pair, key)
        try:
            message = noise.write(padded("join", join, JOIN_SIZE), keys.random())
        except Forged:      # this key was made up: no secret belongs to it
            return
        self._noise, self._index, self._key_asked = noise, join["index"], key
        self._hello = encode("hello", {"id": self.id, "cookie": info["cookie"], "message": message})

    def on_hello(self, info: Info, address: Address) -> None:
        """Accept the answer of a server that encrypts, and hand it on: to ``on_welcome``, or to ``on_refused``."""
        noise = self._noise
        if noise is None or info["id"] != self.id:
            return
        try:
            maps = Decoder().decode(noise.read(info["message"]))
        except Forged:
            return
        self._noise, self.doubt = None, None
        for tag, answer in maps:
            self.pin.accept(self._key_asked, answer.get("lasting", True))   # whatever it answers, it has the key
            if tag == "welcome" and "index" in answer:
                self.on_welcome(answer, address, Channel(noise.split(), self._index, answer["index"]))
            elif tag == "refused":
                self.on_refused(answer, address)


class Connection:
    """The way between a client and its server: in plain, or in the channel of the session."""

    def __init__(self, send: Send, endpoint: Endpoint, handshake: Handshake) -> None:
        self.endpoint = endpoint                # where the server is
        self.handshake = handshake
        self.channel: Channel | None = None     # None: the session is in plain, or there is none
        self._send = send

    @property
    def is_plain(self) -> bool:
        """Whether what comes in plain may count."""
        return self.channel is None and self.handshake.is_plain

    def send(self, datagram: bytes, address: Address | None = None) -> None:
        """Send to the server; ``address``: to another than where it is."""
        if self.channel is not None:
            datagram = self.channel.seal(MAPS, datagram)
        self._send(datagram, address or self.endpoint.current)

    def opened(self, record: bytes) -> bytes | None:
        """Return what the server has sealed in a record, None if this is none of its."""
        try:
            return self.channel.open(record) if self.channel is not None else None
        except Forged:
            return None


# --- limits ---------------------------------------------------------------------------------------------------

class RateLimit:
    """How often something may happen in a second: for each key, and for all of them together."""

    def __init__(self, most: int, total: float = NEVER) -> None:
        self._most, self._total = most, total
        self._second, self._sum = 0, 0          # the one that is counted, and what has happened in it, ...
        self._counts: dict[bytes | str, int] = {}       # ... by key

    def is_reached(self, now: float, key: bytes | str) -> bool:
        """Return whether no more may happen in this second."""
        if int(now) != self._second:
            self._second, self._sum, self._counts = int(now), 0, {}
        return self._sum >= self._total or self._counts.get(key, 0) >= self._most

    def allows(self, now: float, key: bytes | str) -> bool:
        """Count something, and return whether it may happen."""
        if self.is_reached(now, key):
            return False
        self._counts[key] = self._counts.get(key, 0) + 1
        self._sum += 1
        return True


FAILURES = 200            # a second, in all: each costs as much as twenty datagrams


# --- between clients ------------------------------------------------------------------------------------------

OFFER_INTERVAL = 0.1      # s between two offers to one client
OFFER_TIME = 5.0          # s; for so long an offer is repeated byte for byte
WAITING = 32              # datagrams for one client that wait for a channel; others are lost, and will be repeated
UNUSED_CHANNELS = 2       # with one client, in which nothing has come yet; beyond it the oldest are forgotten
USED_CHANNELS = 4         # the same, of those in which something has come
OFFERS_READ = 10          # a second, from one address: each costs as much as fifty datagrams
PEERS_KEPT = 10_000       # clients of whom something is known; beyond it the first one of whom it was is forgotten


class Offer:
    """A handshake that we have begun: message 1 as it is sent, and what reads the answer."""

    def __init__(self, id_: int, noise: HandshakeState, index: bytes, message: bytes, made: float) -> None:
        self.id, self.noise, self.index, self.made = id_, noise, index, made
        self.datagram = encode("offer", {"id": id_, "message": message})
        self.sent = -NEVER      # when, last ...
        self.address = ("", 0)  # ... and where to


class Peer:
    """The channels with another client, and what waits for one."""

    def __init__(self, nick: str) -> None:
        self.nick = nick
        self.key = b""                  # by which the channels were made
        self.is_told = False            # the user knows that nothing is encrypted here
        self.offer: Offer | None = None
        self.waiting: list[tuple[bytes, Address]] = []
        self.early: tuple[Info, Address] | None = None  # an offer that came before we knew its key, and from where
        self.channel: Channel | None = None     # the one to send in: of those below, the latest to come into use
        self.channels: list[Channel] = []       # oldest first
        self.replies: dict[bytes, bytes] = {}   # to the last messages that were accepted
        self.address: Address | None = None     # where the newest record of ``channel`` came from: answers go there ...
        self.allowance = 0                      # ... with as many bytes as have come from there


class Peers:
    """The channels of a client with others, while its session is encrypted.

    The client table says by which key another one is encrypted for, or that it cannot be. What is to be sent to
    somebody waits for a channel: a handshake of Noise IK, bound to the server's key and to the nick of who is called::

        alice                        bob
          offer: message 1    -->      is she at this address, and is this her key?
                              <--    accept: message 2
          records             -->      now he, too, sends in this channel

    Either side may begin, also both at once. Then they receive in both channels, and each sends in the one that it has
    last learned to be known to the other side. Who speaks follows from the channel, wherever a record comes from.
    """

    def __init__(self, keys: Keys, send: Send, now: Callable[[], float], new_id: Callable[[], int],
                 must_encrypt: bool = False, known: KnownKeys | None = None) -> None:
        """``must_encrypt``: whoever cannot is not spoken to. ``known``: the keys that others have had before."""
        self.me, self.server_key = "", b""      # our nick, and the key of our server
        self.shown_of: Callable[[str], tuple[bytes, bool] | None] = lambda nick: None   # see ``TableSync.key_of``
        self.home_of: Callable[[str], Address | None] = lambda nick: None   # where it is, as the table says
        self.is_at: Callable[[str, Address], bool] = lambda nick, address: False    # whether somebody may be there
        self.waits_for_key: Callable[[str], bool] = lambda nick: False  # the server is asked for it: see ``TableSync``
        self.is_known: Callable[[str], bool] = lambda nick: True    # whether there is such a nick
        self.on_plain: Callable[[str], None] = lambda nick: None    # hears whose messages cannot be encrypted
        self._keys, self._send, self._now, self._new_id = keys, send, now, new_id
        self._must_encrypt, self._known = must_encrypt, known or KnownKeys()
        self._peers: dict[str, Peer] = {}
        self._offers: dict[int, Peer] = {}      # by the id of the offer
        self._by_index: dict[bytes, tuple[Peer, Channel]] = {}
        self._reads, self._failures = RateLimit(OFFERS_READ), RateLimit(FAILURES)

    def begin_session(self, me: str, server_key: bytes) -> None:
        """Be known as ``me`` at the server with that key."""
        self.me, self.server_key = me, server_key

    def _peer(self, nick: str) -> Peer:
        peer = self._peers.get(nick)
        if peer is None:
            if len(self._peers) >= PEERS_KEPT:
                self._close(self._peers.pop(next(iter(self._peers))))
            peer = self._peers[nick] = Peer(nick)
        return peer

    def _close(self, peer: Peer) -> None:
        """Forget all channels with somebody, and those that are to be."""
        for channel in peer.channels:
            del self._by_index[channel.index]
        if peer.offer is not None:
            del self._offers[peer.offer.id]
        peer.channel = peer.offer = peer.address = None
        peer.channels, peer.replies = [], {}

    def on_news(self, nick: str) -> None:
        """Learn that the table says something new of somebody: with another key, it is another client than before."""
        peer = self._peers.get(nick)
        if peer is not None:
            reason = self.refusal(nick)
            if reason == NOT_YET:       # it may be the same
                return
            if self.key_of(nick) != peer.key:
                self._close(peer)
            waiting, peer.waiting, early, peer.early = peer.waiting, [], peer.early, None
            if not reason:      # what is refused counts as not sent: it must not go out later
                for datagram, address in waiting:
                    self.send(nick, datagram, address)
            if early is not None:
                self.on_offer(*early)

    # which key

    def _pinned(self, nick: str) -> tuple[bytes, bool] | None:
        """Return the key that somebody must have, and whether it is verified; None if it may be any.

        The first contact stands under the folded nick, so it counts for every spelling. What the user has verified or
        trusted later stands under the spelling itself, and wins: nicks of an old store that count as the same may have
        different owners.
        """
        return self._known.peer(self.server_key, nick) or self._known.peer(self.server_key, folded(nick))

    def _pin(self, nick: str, key: bytes, is_verified: bool = False) -> None:
        name = folded(nick) if self._pinned(nick) is None else nick
        try:
            self._known.add_peer(self.server_key, name, key, is_verified)
        except OSError as error:
            log.warning("the key of %s is not remembered: %s", nick, error.strerror)

    def key_of(self, nick: str) -> bytes | None:
        """Return by which key somebody is encrypted for; b"": that cannot be. None: not known, or not as it must be."""
        shown = self.shown_of(nick)
        return shown[0] if shown is not None and not self.refusal(nick) else None

    def refusal(self, nick: str) -> str:
        """Return why nothing may be sent to somebody: "key-changed", "unknown" or "not-secure"; "": it may be.

        ``NOT_YET``: its key is still to come.
        """
        shown, pinned = self.shown_of(nick), self._pinned(nick)
        if shown is None and self.waits_for_key(nick):
            return NOT_YET
        if pinned is not None:
            return "" if shown == (pinned[0], True) else "key-changed" if self.is_known(nick) else "unknown"
        return "not-secure" if self._must_encrypt and not (shown and shown[0]) else ""

    def bound_key_of(self, nick: str) -> bytes:
        """Return the key that the table binds somebody to, b"" if there is none."""
        key, is_bound = self.shown_of(nick) or (b"", False)
        return key if is_bound else b""

    def expected_key(self, nick: str) -> bytes:
        """Return by which key somebody is to be known: that of before, else the bound one of now; b"": none."""
        pinned = self._pinned(nick)
        return pinned[0] if pinned is not None else self.bound_key_of(nick)

    def remember(self, nick: str, key: bytes) -> None:
        """Note the key by which somebody is known from now on, if it is the one that the table binds the nick to."""
        if self._pinned(nick) is None and self.bound_key_of(nick) == key:
            self._pin(nick, key)

    def digits(self, nick: str) -> str:
        """Return the digits that both sides compare, those of our own key for ""; "" if there is no key to compare."""
        if not nick:
            return fingerprint(self._keys.pair.public)
        (key, _), pinned = self.shown_of(nick) or (b"", False), self._pinned(nick)
        if not key and pinned is not None:
            key = pinned[0]
        return fingerprint(self._keys.pair.public, key) if key else ""

    def verify(self, nick: str) -> str:
        """Note that the user has compared a key; return why that is not possible: an event, or ""."""
        key = self.bound_key_of(nick)
        if not key or self.refusal(nick):
            return "not-the-key" if self._pinned(nick) is not None else "no-key"
        self._pin(nick, key, is_verified=True)
        return ""

    def is_verified(self, nick: str) -> bool:
        """Return whether the user has compared the key that somebody has."""
        pinned = self._pinned(nick)
        if pinned is None or not pinned[1]:
            return False
        return self.shown_of(nick) == (pinned[0], True) or self.waits_for_key(nick)

    def trust(self, nick: str) -> str:
        """Accept the key that somebody has now; return the digits to compare, "" if there is none to accept."""
        key = self.bound_key_of(nick)
        if not key:
            return ""
        if self._pinned(nick) is None or self.refusal(nick):
            self._pin(nick, key)
        self.on_news(nick)
        return self.digits(nick)

    def can_decrypt(self, nick: str) -> bool:
        """Return whether what goes to somebody is encrypted."""
        return bool(self.key_of(nick)) or self.waits_for_key(nick)

    def takes_plain(self, nick: str) -> bool:
        """Return whether what somebody says in plain counts."""
        return self.key_of(nick) == b""

    # what goes out

    def send(self, nick: str, datagram: bytes, address: Address, is_unanswered: bool = False) -> bool:
        """Send to somebody, as soon as that may be; return whether nobody else can read it.

        ``is_unanswered``: this is not the first time. Perhaps it has been started anew, and does not know our channel.
        """
        peer = self._peer(nick)
        if peer.channel is not None:
            self._send(peer.channel.seal(MAPS, datagram), address)
            if not is_unanswered:
                return True
        key = self.key_of(nick)
        if key == b"":
            self.tell_of_plain(nick)
            self._send(datagram, address)
            return False
        if len(peer.waiting) < WAITING:
            peer.waiting.append((datagram, address))
        if key:
            self._offer(peer, key, address)
        return bool(key)

    def withdraw(self, nick: str) -> None:
        """Send nothing more of what waits for a channel with somebody: it goes another way."""
        if nick in self._peers:
            self._peers[nick].waiting.clear()

    def answer(self, nick: str, datagram: bytes, address: Address) -> None:
        """Send what answers somebody: to where the newest record came from; in plain, to ``address``.

        If the table knows nobody there, no more bytes than have come, and the same to where it says that somebody is.
        """
        peer = self._peer(nick)
        if peer.channel is not None and peer.address is not None:
            record, home = peer.channel.seal(MAPS, datagram), self.home_of(nick)
            if peer.address == home or self.is_at(nick, peer.address):
                self._send(record, peer.address)
                return
            if len(record) <= peer.allowance:
                peer.allowance -= len(record)
                self._send(record, peer.address)
            if home is not None:        # where it is, if it is not there that somebody only passes its records on
                self._send(record, home)
        elif self.takes_plain(nick):
            self._send(datagram, address)

    def tell_of_plain(self, nick: str) -> None:
        """Tell the user, once, that what goes to somebody is not encrypted."""
        peer = self._peer(nick)
        if not peer.is_told:
            peer.is_told = True
            self.on_plain(nick)

    # handshakes

    def _offer(self, peer: Peer, key: bytes, address: Address) -> None:
        """Send message 1: the same again, if the last one is not too old."""
        now, offer = self._now(), peer.offer
        if offer is None or now > offer.made + OFFER_TIME:
            offer = self._new_offer(peer, key, now)
        if offer is not None and (now >= offer.sent + OFFER_INTERVAL or address != offer.address):
            offer.sent, offer.address = now, address
            self._send(offer.datagram, address)

    def _new_offer(self, peer: Peer, key: bytes, now: float) -> Offer | None:
        if peer.offer is not None:
            del self._offers[peer.offer.id]
            del peer.waiting[:-1]       # they have waited too long: they are repeated, or have gone another way
        peer.key = key
        id_, index = self._new_id(), self._keys.new_index(self._by_index)
        prologue = offer_prologue(self.server_key, peer.nick, id_)
        noise = HandshakeState(self._keys.sodium, "IK", True, prologue, self._keys.pair, key)
        try:
            message = noise.write(padded("greet", {"from": self.me, "index": index}, GREET_SIZE), self._keys.random())
        except Forged:      # this key was made up
            peer.offer = None
            return None
        peer.offer = Offer(id_, noise, index, message, now)
        self._offers[id_] = peer
        return peer.offer

    def on_offer(self, info: Info, address: Address) -> bool:
        """Answer somebody who wants a channel; return False if the table does not agree with the offer."""
        now = self._now()
        if self._failures.is_reached(now, "") or not self._reads.allows(now, f"{address}"):
            return True
        prologue = offer_prologue(self.server_key, self.me, info["id"])
        noise = HandshakeState(self._keys.sodium, "IK", False, prologue, self._keys.pair)
        greet = read_map(noise, info["message"], "greet")
        if greet is None:
            self._failures.allows(now, "")
            return True
        key = noise.received["s"]
        if not self.is_at(greet["from"], address) or self.key_of(greet["from"]) != key:
            self._failures.allows(now, "")
            if self.waits_for_key(greet["from"]):
                self._peer(greet["from"]).early = info, address
            return False
        peer = self._peer(greet["from"])
        peer.key = key
        if info["message"] not in peer.replies:
            self._agree(peer, info, noise, greet["index"])
        self._send(peer.replies[info["message"]], address)
        return True

    def _agree(self, peer: Peer, info: Info, noise: HandshakeState, their_index: bytes) -> None:
        """Make message 2, which is the answer whenever message 1 comes, and the channel."""
        index = self._keys.new_index(self._by_index)
        message = noise.write(padded("greet", {"from": self.me, "index": index}, GREET_SIZE), self._keys.random())
        self._add(peer, Channel(noise.split(), index, their_index))
        if len(peer.replies) == UNUSED_CHANNELS:
            del peer.replies[next(iter(peer.replies))]
        peer.replies[info["message"]] = encode("accept", {"id": info["id"], "message": message})

    def on_accept(self, info: Info, address: Address) -> None:
        """Use the channel that somebody else has agreed to."""
        peer = self._offers.get(info["id"])
        if peer is None or peer.offer is None:
            return
        offer = peer.offer
        greet = read_map(offer.noise, info["message"], "greet")
        if greet is None:
            return
        peer.offer = None
        del self._offers[offer.id]
        channel = Channel(offer.noise.split(), offer.index, greet["index"])
        self._add(peer, channel)
        self._use(peer, channel)

    def _add(self, peer: Peer, channel: Channel) -> None:
        """Receive in one more channel, too; make room for it."""
        peer.channels.append(channel)
        self._by_index[channel.index] = peer, channel
        unused = [one for one in peer.channels if one is not peer.channel and one.window.highest < 0]
        used = [one for one in peer.channels if one is not peer.channel and one.window.highest >= 0]
        for old in (*unused[:-UNUSED_CHANNELS], *used[:1 - USED_CHANNELS]):
            peer.channels.remove(old)
            del self._by_index[old.index]

    def _use(self, peer: Peer, channel: Channel) -> None:
        """Send in a channel from now on, and what has waited first: the other side has it."""
        peer.channel, peer.address, peer.allowance = channel, None, 0
        self.remember(peer.nick, peer.key)
        waiting, peer.waiting = peer.waiting, []
        for datagram, address in waiting:
            self._send(channel.seal(MAPS, datagram), address)

    # what comes in

    def opened(self, record: bytes, address: Address) -> tuple[str, bytes] | None:
        """Return who has sealed a record, and what; None if nobody has."""
        found = self._by_index.get(record[2:INDEX_END])
        if found is None:
            return None
        peer, channel = found
        highest = channel.window.highest
        try:
            text = channel.open(record)
        except Forged:
            return None
        if highest < 0 and channel is not peer.channel:
            self._use(peer, channel)
        if channel is peer.channel and channel.window.highest > highest:
            if address != peer.address:
                peer.address, peer.allowance = address, 0
            peer.allowance += len(record)
            peer.waiting.clear()        # of what was sent in this channel, too, because it seemed to be unknown there
        return peer.nick, text


# --- encryption: libsodium and keys -----------------------------------------------------------------------------

NONCE_SIZE = 12           # bytes
MAX_SEALED = 65535        # bytes of a sealed text, and of a message of a handshake (Noise §3)
ZEROS = bytes(KEY_BYTES)
ZEROS_TAG = bytes.fromhex("4eb972c9a8fb3a1b382bb4d36f5ffad1")  # what comes of sealing nothing with zeros

Aead = Callable[[bytes, bytes, bytes, bytes], "bytes | None"]   # of key, nonce, associated data, text; None: it failed


class Forged(Exception):
    """What came was not made by the owner of the expected key, or it was changed, or it has come before."""


class Sodium:
    """X25519 (RFC 7748) and ChaCha20-Poly1305 (RFC 8439) of libsodium, see ``load_sodium``.

    Every length is checked before libsodium is called: C would read on behind the end of what is too short.
    """

    def __init__(self, base: Callable[[bytes], bytes], multiply: Callable[[bytes, bytes], bytes | None],
                 encrypt: Aead, decrypt: Aead) -> None:
        """``base``, ``multiply``: X25519 of a secret, and the base point or a given one; None: it failed."""
        self._base, self._multiply, self._encrypt, self._decrypt = base, multiply, encrypt, decrypt

    def public(self, secret: bytes) -> bytes:
        """Return the public key of ``secret``. Raise ValueError if that has a wrong length."""
        if len(secret) != KEY_BYTES:
            raise ValueError("a secret has 32 bytes")
        return self._base(secret)

    def shared(self, secret: bytes, public: bytes) -> bytes:
        """Return what the owners of two keys share. Raise Forged if it is zero with every secret (RFC 7748 §6.1)."""
        if len(secret) != KEY_BYTES or len(public) != KEY_BYTES:
            raise ValueError("a key has 32 bytes")
        shared = self._multiply(secret, public)
        if shared is None or shared == ZEROS:
            raise Forged("this is no public key")
        return shared

    def seal(self, key: bytes, nonce: bytes, data: bytes, text: bytes) -> bytes:
        """Return ``text`` encrypted, and behind it the tag, which authenticates ``data``, too. Raise ValueError.

        A key and a nonce must never be used for two texts, or with two ``data``: whoever sees both could forge.
        """
        if len(key) != KEY_BYTES or len(nonce) != NONCE_SIZE or max(len(text) + TAG_SIZE, len(data)) > MAX_SEALED:
            raise ValueError("a key has 32 bytes, a nonce 12, a sealed text at most 65,535")
        sealed = self._encrypt(key, nonce, data, text)
        assert sealed is not None
        return sealed

    def open(self, key: bytes, nonce: bytes, data: bytes, sealed: bytes) -> bytes:
        """Return the text that was sealed. Raise Forged if the tag does not verify, ValueError for a wrong length."""
        if len(key) != KEY_BYTES or len(nonce) != NONCE_SIZE or len(data) > MAX_SEALED:
            raise ValueError("a key has 32 bytes, a nonce 12")
        text = self._decrypt(key, nonce, data, sealed) if TAG_SIZE <= len(sealed) <= MAX_SEALED else None
        if text is None:
            raise Forged("the tag does not verify")
        return text


def load_sodium() -> Sodium | None:
    """Return libsodium, None where the extra ``secure`` is not installed. Call this once: PyNaCl is imported here."""
    for load in (compiled_sodium, public_sodium):
        try:
            sodium = load()
            if (sodium.public(ZEROS) == sodium.shared(ZEROS, b"\x09" + ZEROS[1:])      # 9: the base point
                    and sodium.seal(ZEROS, ZEROS[:NONCE_SIZE], b"", b"") == ZEROS_TAG
                    and sodium.open(ZEROS, ZEROS[:NONCE_SIZE], b"", ZEROS_TAG) == b""):
                return sodium
        except (ImportError, AttributeError, TypeError, Forged):
            pass            # there is none, or the compiled module of this version is not as we know it
    return None


def compiled_sodium() -> Sodium:
    """Return libsodium by the compiled module of PyNaCl, which is not public, but several times as fast as what is."""
    from importlib import import_module     # the type checker does without PyNaCl
    module = import_module("nacl._sodium")
    lib, null, buffer = module.lib, module.ffi.NULL, module.ffi.new("unsigned char[]", MAX_SEALED)
    if lib.sodium_init() < 0:
        raise ImportError("libsodium cannot be initialized")
    result = module.ffi.buffer(buffer)      # one buffer, as there is one thread
    base, multiply = lib.crypto_scalarmult_base, lib.crypto_scalarmult
    encrypt, decrypt = lib.crypto_aead_chacha20poly1305_ietf_encrypt, lib.crypto_aead_chacha20poly1305_ietf_decrypt

    def seal(key: bytes, nonce: bytes, data: bytes, text: bytes) -> bytes:
        encrypt(buffer, null, text, len(text), data, len(data), null, nonce, key)
        return result[:len(text) + TAG_SIZE]    # type: ignore[no-any-return]

    def unseal(key: bytes, nonce: bytes, data: bytes, sealed: bytes) -> bytes | None:
        failed = decrypt(buffer, null, null, sealed, len(sealed), data, len(data), nonce, key)
        return None if failed else result[:len(sealed) - TAG_SIZE]

    return Sodium(lambda secret: ZEROS if base(buffer, secret) else result[:KEY_BYTES],
                  lambda secret, public: None if multiply(buffer, secret, public) else result[:KEY_BYTES],
                  seal, unseal)


def public_sodium() -> Sodium:
    """Return libsodium by the public functions of PyNaCl."""
    from importlib import import_module
    bindings, failure = import_module("nacl.bindings"), import_module("nacl.exceptions").CryptoError
    encrypt = bindings.crypto_aead_chacha20poly1305_ietf_encrypt
    decrypt = bindings.crypto_aead_chacha20poly1305_ietf_decrypt

    def attempt(function: Callable[..., bytes], *arguments: bytes) -> bytes | None:
        try:
            return function(*arguments)
        except failure:
            return None

    return Sodium(bindings.crypto_scalarmult_base,
                  lambda secret, public: attempt(bindings.crypto_scalarmult, secret, public),
                  lambda key, nonce, data, text: attempt(encrypt, text, data, nonce, key),
                  lambda key, nonce, data, sealed: attempt(decrypt, sealed, data, nonce, key))


INNER_PAD, OUTER_PAD = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5c))     # of HMAC (RFC 2104 §2)


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """Return the HMAC-SHA256 (RFC 2104) of ``data``."""
    block = (key if len(key) <= 64 else sha256(key)).ljust(64, b"\0")
    return sha256(block.translate(OUTER_PAD) + sha256(block.translate(INNER_PAD) + data))


def name_of_key(key: bytes) -> bytes:
    """Return by which bytes a letter says for which public key it is sealed."""
    return sha256(key)[:KEY_NAME_BYTES]


def token_for(secret: bytes, server_id: bytes, nick: str) -> bytes:
    """Return the proof that ``nick`` is ours, good at one server only: HMAC-SHA256 (RFC 2104)."""
    return hmac_sha256(secret, server_id + nick.encode())


def hash_of(token: bytes) -> bytes:
    """Return what the store keeps of a token."""
    return sha256(token)


def is_hash_of(owner: bytes, token: bytes) -> bool:
    """Return whether ``owner`` is what is kept of ``token``, in a time that does not show how wrong a guess is."""
    import hmac
    return hmac.compare_digest(owner, hash_of(token))


def static_secret(identity: bytes) -> bytes:
    """Return the secret of a user's key, from the secret in the identity file.

    No token is made of these bytes: a nick, which stands there behind 16 bytes, has no blank and no zero byte.
    """
    return hmac_sha256(identity, b"udpchat static key 1\0")


def bind_proof(owner: bytes, server_key: bytes, client_key: bytes) -> bytes:
    """Return the proof that the owner of a nick has a public key. ``owner``: what is kept of the nick's token.

    The server may keep that, too, so the token itself is not sent. A server that claims to be another one learns
    nothing of use there: the proof is good for these two keys only.
    """
    return hmac_sha256(owner, b"udpchat bind 1" + server_key + client_key)


def is_bind_proof(proof: bytes, owner: bytes, server_key: bytes, client_key: bytes) -> bool:
    """Return whether ``proof`` is right, in a time that does not show how wrong it is."""
    import hmac
    return hmac.compare_digest(proof, bind_proof(owner, server_key, client_key))


class KeyPair:
    """A secret of 32 random bytes, and the public key that belongs to it."""

    def __init__(self, sodium: Sodium, secret: bytes) -> None:
        self.secret, self.public = secret, sodium.public(secret)


class Keys:
    """What a program needs to encrypt."""

    def __init__(self, sodium: Sodium, pair: KeyPair, random: Callable[[], bytes]) -> None:
        """``pair``: its own static key. ``random``: returns 32 random bytes, others each time."""
        self.sodium, self.pair, self.random = sodium, pair, random

    def new_index(self, *taken: Container[bytes]) -> bytes:
        """Return how records to us are to call a channel: random, and not in any of ``taken``."""
        while True:
            index = self.random()[:INDEX_BYTES]
            if not any(index in indices for indices in taken):
                return index


# --- encryption: handshakes of Noise ----------------------------------------------------------------------------

class CipherState:
    """A key, None before there is one, and ``n``, which the next text is sealed or opened with (Noise §5.1, §11.4)."""

    def __init__(self, sodium: Sodium, key: bytes | None = None, n: int = 0) -> None:
        self.sodium, self.key, self.n = sodium, key, n

    def encrypt(self, data: bytes, text: bytes) -> bytes:
        """Return ``text`` sealed with ``data``, under a number that is never used again, whatever happens."""
        if self.key is None:
            return text
        n, self.n = self.n, self.n + 1
        return self.sodium.seal(self.key, bytes(4) + n.to_bytes(8, "little"), data, text)

    def decrypt(self, data: bytes, sealed: bytes) -> bytes:
        """Return the text that was sealed under the next number. Raise Forged; the number is then still the next."""
        if self.key is None:
            return sealed
        text = self.sodium.open(self.key, bytes(4) + self.n.to_bytes(8, "little"), data, sealed)
        self.n += 1
        return text


class SymmetricState:
    """What both sides agree on so far (Noise §5.2): ``h``, a hash of all that was sent; ``ck``, the chaining key."""

    def __init__(self, ck: bytes, h: bytes, cipher: CipherState) -> None:
        self.ck, self.h, self.cipher = ck, h, cipher

    def copy(self) -> SymmetricState:
        """Return another one with the same content."""
        return SymmetricState(self.ck, self.h, CipherState(self.cipher.sodium, self.cipher.key, self.cipher.n))

    def mix_hash(self, data: bytes) -> None:
        """Make the hash depend on ``data``."""
        self.h = sha256(self.h + data)

    def mix_key(self, shared: bytes) -> None:
        """Make a new key that depends on ``shared`` and on all before it."""
        self.ck, key = self._two_keys(shared)
        self.cipher = CipherState(self.cipher.sodium, key)

    def _two_keys(self, material: bytes) -> tuple[bytes, bytes]:
        key = hmac_sha256(self.ck, material)        # HKDF (RFC 5869) with two outputs, Noise §4.3
        first = hmac_sha256(key, b"\1")
        return first, hmac_sha256(key, first + b"\2")

    def encrypt_and_hash(self, text: bytes) -> bytes:
        """Return ``text`` sealed, and hash that."""
        sealed = self.cipher.encrypt(self.h, text)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        """Return the text that was sealed, and hash what was sent. Raise Forged."""
        text = self.cipher.decrypt(self.h, sealed)
        self.mix_hash(sealed)
        return text

    def split(self) -> tuple[CipherState, CipherState]:
        """Return what seals texts from the initiator to the responder, and what seals those back."""
        there, back = self._two_keys(b"")
        return CipherState(self.cipher.sodium, there), CipherState(self.cipher.sodium, back)


# whether the responder knows the static key of the initiator before (the initiator knows that of the responder); and
# what messages are made of: "e", "s" are public keys, the others secrets of two keys, the initiator's first (Noise §7)
PATTERNS: dict[str, tuple[bool, tuple[tuple[str, ...], ...]]] = {
    "IK": (False, (("e", "es", "s", "ss"), ("e", "ee", "se"))),
    "K": (True, (("e", "es", "ss"),)),
}


class HandshakeState:
    """One side of Noise_IK or Noise_K with 25519_ChaChaPoly_SHA256 (Noise specification, revision 34, §5.3)::

        IK    initiator                            responder, whose static key the initiator knows
                e, es, s, ss, payload         -->
                                              <--  e, ee, se, payload
        K     initiator                            responder; both know the static key of the other
                e, es, ss, payload            -->

    ``step``: how many messages were written or read. When all were, ``split`` returns the keys, and ``symmetric.h`` is
    the same on both sides, and in no other handshake. ``received``: the public keys of the other side; "s" is static.
    """

    def __init__(self, sodium: Sodium, pattern: str, is_initiator: bool, prologue: bytes, static: KeyPair,
                 remote: bytes = b"") -> None:
        """``prologue``: what both sides must agree on. ``remote``: the other's static key. Raise ValueError."""
        is_known, self._messages = PATTERNS[pattern]
        keys = (static.public, remote) if is_initiator else (remote, static.public)
        if len(remote) != (KEY_BYTES if is_initiator or is_known else 0):
            raise ValueError("a key has 32 bytes, and is given where, and only where, the pattern has it")
        self.step, self.is_initiator, self._static = 0, is_initiator, static
        self._ephemeral: KeyPair | None = None
        self.received = {"s": remote}
        name = f"Noise_{pattern}_25519_ChaChaPoly_SHA256".encode().ljust(KEY_BYTES, b"\0")
        self.symmetric = SymmetricState(name, name, CipherState(sodium))
        self.symmetric.mix_hash(prologue)
        for key in keys if is_known else keys[1:]:
            self.symmetric.mix_hash(key)

    def _tokens(self, is_initiators: bool) -> tuple[str, ...]:
        """Return what the next message is made of, () if it is the other side's to write, or there is none."""
        is_turn = self.step < len(self._messages) and (self.step % 2 == 0) is is_initiators
        return self._messages[self.step] if is_turn else ()

    def write(self, payload: bytes, secret: bytes) -> bytes:
        """Return our next message. ``secret``: 32 random bytes, new ones for every message.

        Raise ValueError if it is not our turn or too long, Forged if the other side has no key: nothing has changed.
        """
        symmetric, parts, ephemeral = self.symmetric.copy(), [], KeyPair(self.symmetric.cipher.sodium, secret)
        for token in self._tokens(self.is_initiator):
            if token == "e":
                parts.append(ephemeral.public)
                symmetric.mix_hash(ephemeral.public)
            elif token == "s":
                parts.append(symmetric.encrypt_and_hash(self._static.public))
            else:
                symmetric.mix_key(self._shared(token, ephemeral, self.received))
        message = b"".join((*parts, symmetric.encrypt_and_hash(payload)))
        if not parts or len(message) > MAX_SEALED:
            raise ValueError("it is the other side's turn, or the message is too long")
        self.symmetric, self._ephemeral, self.step = symmetric, ephemeral, self.step + 1
        return message

    def read(self, message: bytes) -> bytes:
        """Return the payload of the other side's next message.

        Raise Forged, and nothing else, if it is not that. Nothing has changed then: the right one may still come.
        """
        tokens = self._tokens(not self.is_initiator)
        if not tokens or len(message) > MAX_SEALED:
            raise Forged("no such message is expected")
        symmetric, received, rest = self.symmetric.copy(), dict(self.received), message
        for token in tokens:
            if len(token) == 2:
                symmetric.mix_key(self._shared(token, self._ephemeral, received))
                continue
            size = KEY_BYTES + TAG_SIZE if token == "s" else KEY_BYTES
            part, rest = rest[:size], rest[size:]
            if len(part) < size:
                raise Forged("this message is too short")
            if token == "s":
                received["s"] = symmetric.decrypt_and_hash(part)
            else:
                received["e"] = part
                symmetric.mix_hash(part)
        payload = symmetric.decrypt_and_hash(rest)
        self.symmetric, self.received, self.step = symmetric, received, self.step + 1
        return payload

    def _shared(self, token: str, ephemeral: KeyPair | None, received: dict[str, bytes]) -> bytes:
        ours, theirs = (token[0], token[1]) if self.is_initiator else (token[1], token[0])
        pair = self._static if ours == "s" else ephemeral
        assert pair is not None
        return self.symmetric.cipher.sodium.shared(pair.secret, received[theirs])

    def split(self) -> tuple[CipherState, CipherState]:
        """Return what seals and what opens. Behind K only the initiator may seal: its key is shared, not its own."""
        assert self.step == len(self._messages)
        there, back = self.symmetric.split()
        return (there, back) if self.is_initiator else (back, there)


def read_map(noise: HandshakeState, message: bytes, tag: str) -> Info | None:
    """Return the fields of the one map in a message, None if it is not genuine, or holds anything else."""
    try:
        maps = Decoder().decode(noise.read(message))
    except Forged:
        return None
    return maps[0][1] if len(maps) == 1 and maps[0][0] == tag else None


# --- encryption: records and letters ----------------------------------------------------------------------------

MAPS = 0                  # the kind of a record that holds what is a datagram otherwise
COUNTER_LIMIT = 2 ** 48   # records in one direction of a channel: 89 years, at 100,000 a second


class ChannelEnded(Exception):
    """A channel has sealed as many records as it may."""


class Channel:
    """What both sides have after a handshake: each record is a datagram of its own, which may get lost or overtaken::

        0xC1 | kind | index of the receiver (4) | counter (8, least significant byte first) | sealed text

    All before the text is authenticated with it; the nonce is the counter. ``window.highest`` is -1 until a record has
    come: before that, the other side may not have the keys, or may never have been there.
    """

    def __init__(self, ciphers: tuple[CipherState, CipherState], index: bytes, their_index: bytes) -> None:
        """``ciphers``: from ``HandshakeState.split``, for nobody else. ``index``: in records to us."""
        if len(index) != INDEX_BYTES or len(their_index) != INDEX_BYTES:
            raise ValueError("an index has 4 bytes")
        self._sending, self._receiving = ciphers
        self.index, self.their_index, self.window = index, their_index, ReplayWindow()

    def seal(self, kind: int, text: bytes) -> bytes:
        """Return a record; its ``kind``, from 0 to 255, can be read by everybody. Raise ChannelEnded."""
        if self._sending.n >= COUNTER_LIMIT:
            raise ChannelEnded("this channel has sealed as many records as it may, it takes another handshake")
        header = bytes((RECORD, kind)) + self.their_index + self._sending.n.to_bytes(8, "little")
        return header + self._sending.encrypt(header, text)

    def open(self, record: bytes) -> bytes:
        """Return the text of a record; its second byte is its kind. Raise Forged, and nothing else.

        The window moves only when the tag has verified: one forged record could shut out all genuine ones.
        """
        counter = int.from_bytes(record[INDEX_END:HEADER_SIZE], "little")
        if index_of(record) != self.index or counter >= COUNTER_LIMIT or not self.window.is_new(counter):
            raise Forged("this is no record of this channel, or it has come before, or it is too old")
        self._receiving.n = counter
        text = self._receiving.decrypt(record[:HEADER_SIZE], record[HEADER_SIZE:])
        self.window.add(counter)
        return text


COUNT_AND_NUMBER = struct.Struct("<IQ")     # the nonce of a bundle


class Letters:
    """Seals and opens the texts of one stream that wait at the server, with a key made by Noise_K for this stream.

    A bundle is texts of consecutive numbers. What is sealed in it are the texts, when they were sent, and which numbers
    the next one continues, also the number before the first. So whoever cannot read bundles can take them apart, and
    repeat parts of them in other company, but not cut texts or make one of several unseen. The nonce is how many texts
    there are, and the number of the first one: what is sealed for the same numbers must always be the same.
    """

    def __init__(self, cipher: CipherState, other: bytes, envelope: bytes) -> None:
        """``other``: the public key of the other side. ``envelope``: without it, nobody opens the letters."""
        assert cipher.key is not None
        self._sodium, self._key = cipher.sodium, cipher.key
        self.key, self.name, self.envelope = other, name_of_key(other), envelope

    @classmethod
    def to(cls, sodium: Sodium, static: KeyPair, recipient: bytes, prologue: bytes, secret: bytes) -> Letters:
        """Return what seals letters for the owner of a public key.

        ``secret``: 32 random bytes, new ones for every stream. Raise Forged if ``recipient`` is no public key.
        """
        handshake = HandshakeState(sodium, "K", True, prologue, static, recipient)
        envelope = handshake.write(b"", secret)
        return cls(handshake.split()[0], recipient, envelope)

    @classmethod
    def of(cls, sodium: Sodium, static: KeyPair, sender: bytes, prologue: bytes, envelope: bytes) -> Letters:
        """Return what opens the letters of the owner of a public key. Raise Forged if they are not."""
        handshake = HandshakeState(sodium, "K", False, prologue, static, sender)
        if handshake.read(envelope):
            raise Forged("an envelope is empty")
        return cls(handshake.split()[1], sender, envelope)

    def seal(self, first: int, times: Sequence[Sequence[Any]], texts: Sequence[str],
             continued: Collection[int]) -> bytes:
        """Return a bundle of texts, numbered from ``first`` on.

        ``times``: when they were sent, in s since 1970, and how many at that time. ``continued``: of the whole stream.
        """
        more = [n for n in range(first - 1, first + len(texts)) if n in continued] if continued else ()
        nonce = COUNT_AND_NUMBER.pack(len(texts), first)
        return nonce[:COUNT_BYTES] + self._sodium.seal(self._key, nonce, b"", contents(texts, times, more))

    def open(self, first: int, bundle: bytes) -> tuple[list[float], list[str], frozenset[int]]:
        """Return the texts of a bundle, numbered from ``first`` on: when each was sent, each text, what goes on.

        That is the numbers that the next one continues; the time of what continues another one is ``CONTINUES``.
        Raise Forged, and nothing else, if it cannot be opened.
        """
        count = numbers_of(bundle)
        if not 0 < first <= MAX_NUMBER:
            raise Forged("there is no such number")
        opened = self._sodium.open(self._key, COUNT_AND_NUMBER.pack(count, first), b"", bundle[COUNT_BYTES:])
        found = contents_of(opened, count)
        if found is None:
            raise Forged("this is no bundle")       # its sender has sealed something else
        texts, spells, more = found
        times = [at for at, length in spells for _ in range(length)]
        goes_on = frozenset(more)       # its sender may have named many
        if goes_on:
            times = [CONTINUES if n - 1 in goes_on else at for n, at in enumerate(times, first)]
        return times, texts, goes_on


LETTERS_OPEN = 256        # streams whose keys are remembered: each costs as much as fifty datagrams


class SealedMail:
    """What a client says by way of its server while its session is encrypted: sealed for the recipient alone.

    What comes is opened, and compared with what is known of its sender. What is not proved to be from there is shown
    all the same, but as such: nothing is lost, and nothing stops the mail behind it.
    """

    def __init__(self, keys: Keys, peers: Peers, must_encrypt: bool, has_own_key: bool) -> None:
        """``has_own_key``: our nick is bound to our key, so others seal what they send us."""
        self._keys, self._peers, self._must_encrypt, self._has_own_key = keys, peers, must_encrypt, has_own_key
        self._opening: dict[tuple[str, int, bytes, bytes], Letters] = {}

    def refusal(self, frames: Frames, is_direct: bool) -> str:
        """Return why nothing may be sent to somebody, "" if it may; have what goes to the server sealed."""
        reason = self._peers.refusal(frames.peer)
        if reason or is_direct:
            return reason
        key, letters = self._peers.bound_key_of(frames.peer), frames.letters
        if letters is None or letters.key != key:
            prologue = letter_prologue(self._peers.server_key, self._peers.me, frames.peer, frames.id)
            try:
                letters = Letters.to(self._keys.sodium, self._keys.pair, key, prologue, self._keys.random())
                self._peers.remember(frames.peer, key)
            except (Forged, ValueError):    # there is no key, or it was made up
                letters = None
            frames.letters = letters
        if letters is None and not self._must_encrypt:
            self._peers.tell_of_plain(frames.peer)
        return "not-secure" if letters is None and self._must_encrypt else ""

    def waits_for_keys(self, info: Info) -> bool:
        """Return whether the key of a sender in a ``mail`` is still to come: it can be judged only then."""
        return any([self._peers.waits_for_key(run[0]) for run in info["items"]])    # each of them is asked for

    def opened(self, run: Any) -> Opened:
        """Return what is in the letters of a run, see ``letters_of``."""
        sender, stream, first, at, texts, more, *seal = run
        expected = self._peers.expected_key(sender)
        if not seal:
            is_strange = self._must_encrypt or (expected and self._has_own_key)
            return [(repeat(at), texts, STRANGELY_PLAIN if is_strange else UNSEALED)]
        proof = SEALED if seal[0] == (expected or seal[0]) else OTHER_KEY
        parts: list[tuple[Iterable[float], Sequence[str], str]] = []
        goes_on, letters = frozenset(more), self._letters(sender, stream, *seal)
        for bundle, start, count in texts:
            try:
                parts.append((*self._part(letters, first, bundle, start, count, goes_on), proof))
            except Forged:
                parts.append((repeat(0.0), [""] * count, BROKEN))
            first += count
        return parts

    @staticmethod
    def _part(letters: Letters | None, first: int, bundle: bytes, start: int, count: int,
              more: Collection[int]) -> tuple[list[float], list[str]]:
        """Return the times and texts of a part of a bundle, numbered from ``first`` on. Raise Forged.

        ``more``: the numbers of which the server says that the next one continues them.
        """
        if letters is None:
            raise Forged("nobody can open them")
        times, texts, continued = letters.open(first - start, bundle)
        if (more or continued) and any([(n in more) is not (n in continued) for n in range(first, first + count)]):
            raise Forged("the server has put texts together, or parted one")
        return times[start:start + count], texts[start:start + count]

    def _letters(self, sender: str, stream: int, key: bytes, envelope: bytes) -> Letters | None:
        """Return what opens the bundles of a stream, None if nothing does."""
        name, peers = (sender, stream, key, envelope), self._peers
        if name not in self._opening:
            prologue = letter_prologue(peers.server_key, sender, peers.me, stream)
            try:
                self._opening[name] = Letters.of(self._keys.sodium, self._keys.pair, key, prologue, envelope)
            except Forged:
                return None
            peers.remember(sender, key)
            if len(self._opening) > LETTERS_OPEN:
                del self._opening[next(iter(self._opening))]
        return self._opening[name]
