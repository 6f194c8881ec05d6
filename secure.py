"""The handshake of a registration, and its proofs: of an address by a cookie, of a nick by a token.

Rules of this file
------------------
- No socket, no clock, no randomness of its own: times, random ids and secrets come in as arguments.
- A client and a server that differ in what is made here do not understand each other: see docs/protocol.md.

How it works
------------
::

    client                                  server
      reg                             -->
                                      <--   cookie: only who receives at that address can repeat it
      reg with the cookie, and with   -->   the address is proved, and so is the nick
      a token, made for this server

A nick belongs to the first user who registered it. The proof is a token, made of the user's secret for one server and
one nick: a server that learns it can use it nowhere else. The server keeps only a hash of it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol import REG_SIZE, SESSION_BYTES, Address, Info, padded


# --- whose a nick is ------------------------------------------------------------------------------------------

def token_for(secret: bytes, server_id: bytes, nick: str) -> bytes:
    """Return the proof that ``nick`` is ours, good at one server only: HMAC-SHA256 (RFC 2104)."""
    import hmac     # here: only registrations need it, and a start is measured
    return hmac.digest(secret, server_id + nick.encode(), "sha256")


def hash_of(token: bytes) -> bytes:
    """Return what the store keeps of a token."""
    import hashlib      # here: only registrations need it, and a start is measured
    return hashlib.sha256(token).digest()


def is_hash_of(owner: bytes, token: bytes) -> bool:
    """Return whether ``owner`` is what is kept of ``token``, in a time that does not show how wrong a guess is."""
    import hmac
    return hmac.compare_digest(owner, hash_of(token))


# --- the client's side ----------------------------------------------------------------------------------------

COOKIES_PER_ATTEMPT = 3   # cookies accepted for one attempt to register
NO_REQUEST = -1           # an id that no request has


class Handshake:
    """A request to register. It goes to all addresses of the server, until the first cookie decides on one of them.

    Only that one gets the proof of the nick. Answers count from any address: only who was asked knows ``id``.
    """

    def __init__(self, send: Callable[[bytes, Address], None], proof: Callable[[bytes, str], bytes] | None) -> None:
        """``proof``: returns the token for (server id, nick); None: the nick will be nobody's."""
        self.id = NO_REQUEST
        self.has_cookie = False
        self._send, self._proof, self._nick = send, proof, ""
        self._cookie = (("", 0), b"", b"")      # from where, the id of the server, and the cookie itself
        self._cookies_left = 0

    def begin(self, id_: int, nick: str) -> None:
        """Make a new request, for ``nick``; ``id_`` is a new random number."""
        self.id, self.has_cookie, self._nick = id_, False, nick

    def ask(self, addresses: Sequence[Address], cookies_left: int = COOKIES_PER_ATTEMPT) -> None:
        """Send the request: to ``addresses``, or to where the cookie came from."""
        info: Info = {"id": self.id, "nick": self._nick}
        self._cookies_left = cookies_left
        if self.has_cookie:
            address, server, info["cookie"] = self._cookie
            addresses = (address,)
            if self._proof is not None:
                info["token"] = self._proof(server, self._nick)
        for address in addresses:
            self._send(padded("reg", info, REG_SIZE), address)

    def on_cookie(self, info: Info, address: Address) -> None:
        """Prove our address."""
        if info["id"] == self.id and self._cookies_left and not (self.has_cookie and address != self._cookie[0]):
            self.has_cookie, self._cookie = True, (address, info["server"], info["cookie"])
            self.ask((), self._cookies_left - 1)


REFUSAL_INTERVALS = {"taken": 0.5, "full": 2.0}     # s between attempts, after refusals that may pass


class Patience:
    """For how long a registration that was refused is asked for again.

    ``is_endless``: until its owner calls ``end``. Otherwise ``limit`` says how long a nick of ours that is in use is
    waited for, in s since the first refusal.
    """

    def __init__(self, is_endless: bool = False, limit: float = 0.0) -> None:
        self.is_endless, self.limit = is_endless, limit
        self.renew()

    def renew(self) -> None:
        """Count from the next refusal on: the request was granted."""
        self.reason: str | None = None      # of the refusal that is waited out
        self._until = float("inf")

    def end(self) -> bool:
        """Be endless no more; return whether it was."""
        was_endless, self.is_endless = self.is_endless, False
        return was_endless

    def wait_after(self, now: float, reason: str, is_starting: bool, jitter: float) -> float:
        """Return the seconds until the request is made again after a refusal, 0.0 if that is final.

        ``is_starting``: nobody knows us yet. After a restart of a server its clients wait for a place for as long as
        it takes. ``jitter``: by which the interval is multiplied. The last attempt is made when the time is over.
        """
        limits = {"taken": self.limit, "full": 0.0 if is_starting else float("inf")}
        self._until = min(self._until, now + limits.get(reason, 0.0))
        wait = REFUSAL_INTERVALS.get(reason, 0.0) * jitter
        if not self.is_endless:
            wait = max(0.0, min(wait, self._until - now))
        self.reason = reason if wait else None
        return wait


# --- the server's side ----------------------------------------------------------------------------------------

COOKIE_TIME = 30.0        # s; the time slot in a cookie: it is valid in its own slot and the next one, 30 to 60 s


class Cookies:
    """Proofs of address for which a server remembers nothing: HMAC over address and time (RFC 9147 §5.1).

    RFC 9000 §8.1.2 calls such a proof an address validation token.
    """

    def __init__(self, secret: bytes) -> None:
        """``secret`` signs the cookies; nobody else knows it."""
        self.secret = secret

    def make(self, now: float, address: Address, age: int = 0) -> bytes:
        """Return the cookie for ``address`` of this time slot, or of that ``age`` slots ago."""
        import hmac     # here: only registrations need it, and a start is measured
        text = f"{address} {int(now / COOKIE_TIME) - age}"
        return hmac.digest(self.secret, text.encode(), "sha256")[:SESSION_BYTES]

    def accepts(self, cookie: bytes | None, now: float, address: Address) -> bool:
        """Return whether ``cookie`` was made for ``address``, and not too long ago."""
        import hmac
        return cookie is not None and any(hmac.compare_digest(cookie, self.make(now, address, age)) for age in (0, 1))
