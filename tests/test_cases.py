"""The two cases of the original exercise, line by line, with real processes."""
from __future__ import annotations

import re
import signal
import time
from itertools import permutations

from tests.processes import (EXITING, MAIL_NOTICE, NOT_RESPONDING, OFFLINE, SAVED, UPDATED, WELCOME, Chat, is_offline,
                             received)

MAIL = r"(\w): <(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)> (.*)"


def after(lines: list[str], line: str) -> list[str]:
    """Return what comes behind the last ``line``."""
    return lines[len(lines) - lines[::-1].index(line):]


def test_case_1_three_clients_chat_and_one_that_goes_offline_gets_its_messages_later(chat: Chat) -> None:
    nicks = ["x", "y", "z"]
    clients = {}
    for nick in nicks:
        clients[nick] = chat.client(nick)
        for other in clients.values():      # everyone, the new one included, learns of it
            other.see(UPDATED)
            other.wait_for(nick)
    x, y, z = clients.values()

    for sender, recipient in permutations(nicks, 2):
        clients[sender].feed(f"send {recipient} from {sender} to {recipient}\n")
        clients[sender].see(received(recipient))
        clients[recipient].see(f"{sender}: from {sender} to {recipient}")

    x.feed("dereg x\n")
    x.see(OFFLINE)
    for other in (y, z):
        other.see(UPDATED)
        other.wait_for("x", "offline")

    before = time.strftime("%Y-%m-%d %H:%M:%S")
    for other, text in ((y, "where are you?"), (z, "come  back")):
        other.feed(f"send x {text}\n")
        other.see(is_offline("x"), SAVED)
    assert x.lines[-1] == OFFLINE

    x.feed("reg x\n")
    x.see(WELCOME)
    for other in (y, z):
        other.see(UPDATED)
        other.wait_for("x", "online")
    chat.until(lambda: len([line for line in x.lines if re.fullmatch(MAIL, line)]) == 2, "both messages")
    again = [line for line in after(x.lines, OFFLINE) if line != UPDATED]
    assert UPDATED in after(x.lines, OFFLINE)
    assert again[:2] == [WELCOME, MAIL_NOTICE] and len(again) == 4
    for line, sender, text in zip(again[2:], "yz", ("where are you?", "come  back")):
        match = re.fullmatch(MAIL, line)
        assert match is not None and (match.group(1), match.group(3)) == (sender, text)
        assert before <= match.group(2) <= time.strftime("%Y-%m-%d %H:%M:%S")

    x.feed("send y here again\n")
    x.see(received("y"))
    y.see("x: here again")
    assert [client.finish() for client in clients.values()] == [0, 0, 0]
    assert not any(client.err.data for client in clients.values())


def test_case_2_without_a_server_nothing_is_promised_and_the_client_says_so(chat: Chat) -> None:
    server = chat.server()
    x, y = chat.clients("x", "y")
    x.wait_for("y")
    y.feed("dereg y\n")
    y.see(OFFLINE)
    x.wait_for("y", "offline")
    server.signal(signal.SIGINT)
    assert server.wait() == 0

    seen = len(x.lines)
    x.feed("send y are you there?\n")
    x.see(is_offline("y"), NOT_RESPONDING)
    x.feed("dereg x\n")
    assert x.wait() == 1
    assert x.lines[seen:] == [is_offline("y"), NOT_RESPONDING, NOT_RESPONDING, "[1 message not delivered.]", EXITING]
    assert x.errors == ["send y are you there?"]
    assert y.finish() == 0
    assert y.lines[-1] == OFFLINE
