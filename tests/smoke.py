"""Try the program as it was built or installed: ``python -m tests.smoke COMMAND [WORD ...]``.

    python -m tests.smoke /opt/udpchat/bin/udpchat
    python -m tests.smoke python3 udpchat.pyz

A server with a store, two clients on pipes, a message each way, ``send``, mail across a restart of the server, a client
at a terminal, and the exit codes of all: what is missing from a package shows. It takes some seconds, needs
the standard library alone, and ends with 0, or with 1 and what was seen.
"""
from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.processes import SAVED, WELCOME, Chat, received

HOST = "127.0.0.1"
CONTROL_D = "\x04"


def smoke(chat: Chat) -> None:
    """Try the program of a world. Raise AssertionError."""
    version = chat.complete("--version")
    assert version.wait() == 0 and re.fullmatch(r"udpchat \d+\.\d+\.\d+", version.lines[0]), chat.report()
    assert chat.complete().wait() == 2, chat.report()
    server = chat.server()
    a_message_each_way(chat)
    what_send_says(chat)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, chat.report()
    chat.restart()
    mail_is_there(chat)
    a_client_at_a_terminal(chat)


def a_message_each_way(chat: Chat) -> None:
    """Have alice and bob talk; bob leaves first, and alice leaves a message for him."""
    alice, bob = chat.clients("alice", "bob")
    alice.wait_for("bob")
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    alice.see(received("bob"))
    bob.feed("send alice h\u00e9llo\n")
    alice.see("bob: h\u00e9llo")
    bob.see(received("alice"))
    assert bob.finish() == 0, chat.report()
    alice.feed("send bob later\n")
    alice.see(SAVED)
    assert alice.finish() == 0, chat.report()


def what_send_says(chat: Chat) -> None:
    """Have a script send to bob, who is away, and to somebody whom nobody knows."""
    for recipient, code in (("bob", 0), ("nobody", 1)):
        sent = chat.complete("send", "--server", f"{HOST}:{chat.port}", "--nick", "job", recipient, "from", "a", "job")
        assert sent.wait() == code, chat.report()


def mail_is_there(chat: Chat) -> None:
    """Have bob come back."""
    bob = chat.client("bob")
    assert bob.finish() == 0, chat.report()
    mail = [re.sub(r" <[^>]*>", "", line) for line in bob.events if not line.startswith("[")]
    assert mail == ["alice: later", "job: from a job"], chat.report()


def a_client_at_a_terminal(chat: Chat) -> None:
    """Start a client there, and leave it with Ctrl-D."""
    client = chat.run_on_terminal("client", "alice", HOST, str(chat.port))
    chat.until(lambda: WELCOME.encode() in client.out.data, "a welcome on the terminal")
    client.feed(CONTROL_D)
    assert client.wait() == 0, chat.report()


def main(command: Sequence[str]) -> None:
    """Try the program that these words start. Paths in them may be relative: the program runs in another folder."""
    if not command:
        sys.exit("usage: python -m tests.smoke COMMAND [WORD ...]")
    words = [os.path.abspath(word) if os.path.exists(word) else word for word in command]
    with tempfile.TemporaryDirectory() as folder, Chat(Path(folder), words) as chat:
        smoke(chat)
    print(f"{' '.join(command)}: works")


if __name__ == "__main__":
    main(sys.argv[1:])
