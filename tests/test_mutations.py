"""The simulation can fail: it finds each of these faults that are put into the program.

A fault is a small function that changes the program, and ``FAULTS`` has with each a seed whose storm finds it. Where a
change of the program or of the simulated world makes a seed miss its fault, the test names the first that finds it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client import ServerLink
from conversation import Delivery, Inbox, Note, Selection
from loop import Output
from protocol import SESSION_SIZE, Address, Table, encode, padded
from registry import Committer, Registry, Session, TableSync
from secure import CipherState, KeyPair, Letters, Peers, SealedMail, Sodium
from server import Postman, Server
from stream import ReceiveStream, SendStream
from terminal import Shell
from tests.simulate import run_seed

SEEDS = 300               # that are tried for a fault whose own seed does not find it any more

Patch = Callable[[pytest.MonkeyPatch], None]


def acks_before_it_writes(patch: pytest.MonkeyPatch) -> None:
    """Count what is handed to stdout as written."""
    def take(self: Inbox, now: float, has_room: Callable[[], bool]) -> Iterator[Delivery]:
        for delivery in original(self, now, has_room):
            delivery.written(len(delivery.texts))
            yield delivery._replace(written=lambda texts: None)
    original = Inbox.take
    patch.setattr(Inbox, "take", take)


def acks_before_it_commits(patch: pytest.MonkeyPatch) -> None:
    """Say that messages are saved, and save them a little later."""
    def commit(self: Committer) -> bool:
        if self.mailbox.pending:
            self.loop.call_at(self.loop.now() + 0.05, lambda: [original(self)].clear())
        return True
    original = Committer.commit
    patch.setattr(Committer, "commit", commit)


def takes_a_failed_commit_for_done(patch: pytest.MonkeyPatch) -> None:
    """Do not look at whether the commit failed."""
    original = Committer.commit
    patch.setattr(Committer, "commit", lambda self: original(self) or True)


def counts_a_partial_write_as_whole(patch: pytest.MonkeyPatch) -> None:
    """Count a line as written as soon as its first bytes are."""
    def split(self: Output, taken: int) -> None:
        data, written = self._chunks[0]
        self._chunks[0] = data[taken:], None
        if written is not None:
            written(data.count(b"\n"))
    patch.setattr(Output, "_split", split)


def deletes_mail_when_it_is_sent(patch: pytest.MonkeyPatch) -> None:
    """Do not wait until the recipient has acked its mail."""
    def send(self: Postman, session: Session) -> None:
        original(self, session)
        mail = self.streams.get(session.id)
        if mail is not None and self.registry.sessions.get(session.id) is session:
            self.registry.mail_acked(session, mail.stream.top)
    original = Postman.send
    patch.setattr(Postman, "send", send)


def shows_what_came_on_another_route(patch: pytest.MonkeyPatch) -> None:
    """Do not compare mail with what came straight."""
    patch.setattr(ReceiveStream, "claim", lambda self, first, count: True)


def announces_before_the_mail_is_shown(patch: pytest.MonkeyPatch) -> None:
    """Call a client online as soon as it is registered."""
    patch.setattr(Session, "has_had_its_mail", property(lambda self: True))


def does_not_wait_for_missing_messages(patch: pytest.MonkeyPatch) -> None:
    """Show what comes straight, though what was sent before it is in the mail."""
    def on_data(self: ReceiveStream, *data: Any) -> None:
        original(self, *data)
        self.advance(self.base)
    original = ReceiveStream.on_data
    patch.setattr(ReceiveStream, "on_data", on_data)


def forgets_its_base(patch: pytest.MonkeyPatch) -> None:
    """Do not say to the recipient which numbers the sender does not have any more."""
    patch.setattr("stream.encode", lambda tag, info: encode(tag, {**info, "base": 1}))


def accepts_chat_from_any_address(patch: pytest.MonkeyPatch) -> None:
    """Believe every sender, wherever the chat comes from."""
    patch.setattr(TableSync, "is_at", lambda self, nick, address: True)


def does_not_repeat_what_is_lost(patch: pytest.MonkeyPatch) -> None:
    """Send everything once."""
    def on_timeout(self: SendStream) -> None:
        self.timeout_at = float("inf")
    patch.setattr(SendStream, "_on_timeout", on_timeout)


def gives_two_changes_one_version(patch: pytest.MonkeyPatch) -> None:
    """Do not count every fifth change of the table."""
    def set_entry(self: Table, *entry: Any) -> bool:
        changed = original(self, *entry)
        if changed and self.version % 5 == 0:
            self.version -= 1
        return changed
    original = Table.set
    patch.setattr(Table, "set", set_entry)


def acks_inside_a_text(patch: pytest.MonkeyPatch) -> None:
    """Cut a long text at the number that was acked."""
    def on_ack(self: SendStream, *ack: Any) -> int:
        self.continued = set()
        return original(self, *ack)
    original = SendStream.on_ack
    patch.setattr(SendStream, "on_ack", on_ack)


def goes_on_talking_while_away(patch: pytest.MonkeyPatch) -> None:
    """Go on pinging after deregistering."""
    def close(self: ServerLink) -> None:
        session = self.session
        original(self)
        if session is not None:
            self._send(padded("ping", {"id": 1, "session": session, "version": 0}, SESSION_SIZE), self.endpoint.current)
    original = ServerLink.close
    patch.setattr(ServerLink, "close", close)


def drops_what_was_read_and_not_sent(patch: pytest.MonkeyPatch) -> None:
    """End without a word about the commands that were read already."""
    patch.setattr(Shell, "hand_back_rest", lambda self: None)


def trusts_the_wall_clock(patch: pytest.MonkeyPatch) -> None:
    """Count the days that somebody is away by the wall clock."""
    def start(self: Server) -> None:
        patch.setattr(self.registry.mailbox, "uptime", lambda now: self.loop.wall())
        original(self)
    original = Server.start
    patch.setattr(Server, "start", start)


def uses_a_nonce_twice(patch: pytest.MonkeyPatch) -> None:
    """Seal a record now and then under the number of the one before."""
    def encrypt(self: CipherState, data: bytes, text: bytes) -> bytes:
        if self.n % 20 == 19:
            self.n -= 1
        return original(self, data, text)
    original = CipherState.encrypt
    patch.setattr(CipherState, "encrypt", encrypt)


def takes_what_somebody_who_encrypts_says_in_plain(patch: pytest.MonkeyPatch) -> None:
    """Believe what comes in plain from the address of a peer whose key is known."""
    patch.setattr(Peers, "takes_plain", lambda self, nick: True)


def speaks_in_plain_while_there_is_no_channel(patch: pytest.MonkeyPatch) -> None:
    """Do not wait for a channel."""
    def send(self: Peers, nick: str, datagram: bytes, address: Address, is_unanswered: bool = False) -> None:
        original(self, nick, datagram, address, is_unanswered)
        peer = self._peers[nick]
        if peer.channel is None:
            self._send(datagram, address)
    original = Peers.send
    patch.setattr(Peers, "send", send)


def seals_all_streams_with_one_secret(patch: pytest.MonkeyPatch) -> None:
    """Use one ephemeral key for all streams, so that those for one recipient share the key of their letters."""
    seal = Letters.to

    def to(sodium: Sodium, static: KeyPair, recipient: bytes, prologue: bytes, secret: bytes) -> Letters:
        return seal(sodium, static, recipient, prologue, b"e" * 32)
    patch.setattr(Letters, "to", to)


def gives_the_server_texts_that_it_can_read(patch: pytest.MonkeyPatch) -> None:
    """Seal nothing, and keep it all the same."""
    patch.setattr(SealedMail, "refusal", lambda self, frames, is_direct: "")
    patch.setattr(Registry, "key_of", lambda self, nick: b"")


def takes_a_piece_for_a_whole_text(patch: pytest.MonkeyPatch) -> None:
    """Give each piece of a text the time of the text."""
    patch.setattr("secure.CONTINUES", 5.0)


def acks_what_recv_has_passed_over(patch: pytest.MonkeyPatch) -> None:
    """Ack mail behind what was not shown."""
    patch.setattr(Selection, "has_passed_mail", property(lambda self: False, lambda self, value: None), raising=False)


def shows_one_more_than_was_wanted(patch: pytest.MonkeyPatch) -> None:
    """End ``recv`` one message too late."""
    def cut(self: Selection, deliveries: Iterator[Delivery]) -> Iterator[Delivery]:
        self.left += 1
        yield from original(self, deliveries)
        self.left = max(0, self.left - 1)
    original = Selection.cut
    patch.setattr(Selection, "cut", cut)


def takes_everybody_for_the_one_who_was_named(patch: pytest.MonkeyPatch) -> None:
    """Show what others say, too."""
    def init(self: Selection, count: int, sender: str | None = None, asks: bool = False,
             note: Note | None = None) -> None:
        original(self, count, None, asks, note)
    original = Selection.__init__
    patch.setattr(Selection, "__init__", init)


def takes_old_mail_for_the_answer(patch: pytest.MonkeyPatch) -> None:
    """Do not ask the server what is older than the question."""
    def note_mail(self: Selection, last: int) -> None:
        self.mail_from = 1
    patch.setattr(Selection, "note_mail", note_mail)


def forgets_what_recv_has_shown(patch: pytest.MonkeyPatch) -> None:
    """Do not read what earlier runs have noted."""
    patch.setattr(Inbox, "restore", lambda self, shown: None)


# each fault, and a seed that finds it
FAULTS: dict[Patch, int] = {
    acks_before_it_writes: 9,
    acks_before_it_commits: 39,
    takes_a_failed_commit_for_done: 39,
    counts_a_partial_write_as_whole: 0,
    deletes_mail_when_it_is_sent: 10,
    shows_what_came_on_another_route: 2,
    announces_before_the_mail_is_shown: 1,
    does_not_wait_for_missing_messages: 3,
    forgets_its_base: 3,
    accepts_chat_from_any_address: 26,
    does_not_repeat_what_is_lost: 1,
    gives_two_changes_one_version: 1,
    acks_inside_a_text: 0,
    goes_on_talking_while_away: 0,
    drops_what_was_read_and_not_sent: 4,
    trusts_the_wall_clock: 36,
    uses_a_nonce_twice: 1,
    takes_what_somebody_who_encrypts_says_in_plain: 1,
    speaks_in_plain_while_there_is_no_channel: 1,
    seals_all_streams_with_one_secret: 3,
    gives_the_server_texts_that_it_can_read: 1,
    takes_a_piece_for_a_whole_text: 3,
    acks_what_recv_has_passed_over: 2,
    shows_one_more_than_was_wanted: 1,
    takes_everybody_for_the_one_who_was_named: 1,
    takes_old_mail_for_the_answer: 1,
    forgets_what_recv_has_shown: 10,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_program_that(fault: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    failure = run_seed(FAULTS[fault]).failure
    assert failure, f"seed {FAULTS[fault]} does not find it any more, but seed {first_seed()} does"
    assert "Traceback" not in failure, failure


def first_seed() -> int | None:
    """Return the first seed whose storm finds the fault that is in the program now."""
    return next((seed for seed in range(SEEDS) if run_seed(seed).failure), None)
