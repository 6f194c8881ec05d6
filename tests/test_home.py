"""What lies in the user's directories: who can read it, and what happens where there is no home or no hard link."""
from __future__ import annotations

import errno
import os
import pwd
import signal
import stat
from pathlib import Path

import pytest

import home
from tests.processes import SAVED, UPDATED, WELCOME, Chat, received
from tests.test_programs import run_send

NO_HOME = {"HOME": "no/home", "XDG_STATE_HOME": "nor/this"}     # relative ones do not count


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_state_is_in_the_home_unless_xdg_state_home_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert home.state_home() == "/var/state/udpchat"
    for ignored in ("", "relative", "~/state"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert home.state_home() == "/home/alice/.local/state/udpchat"


def test_without_home_variable_and_passwd_entry_there_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert home.state_home() is None
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert home.state_home() == "/var/state/udpchat"


def test_server_without_a_home_asks_for_a_store(chat: Chat) -> None:
    server = chat.run("server", "0", environment=NO_HOME)
    assert server.finish() == 2
    assert server.errors == ["udpchat: there is no home directory: say with --store where the store is"]


def test_client_without_a_home_is_anonymous_and_says_so_and_makes_no_directory(chat: Chat) -> None:
    chat.server(store=":memory:")
    before = sorted(path.name for path in chat.directory.iterdir())
    alice = chat.run("client", "alice", "127.0.0.1", str(chat.port), environment=NO_HOME)
    assert alice.finish() == 0
    assert alice.lines[:2] == [WELCOME, UPDATED]
    assert [line.partition("WARNING ")[2] for line in alice.errors] == [
        "no identity (there is no home directory): anonymous, the nick is nobody's, and no key of a server is"
        " remembered"]
    assert sorted(path.name for path in chat.directory.iterdir()) == before


@pytest.mark.parametrize("existing", [None, 0o644, 0o666])
def test_store_and_its_log_can_be_read_by_nobody_else(chat: Chat, existing: int | None) -> None:
    if existing is not None:
        before = chat.server()
        before.signal(signal.SIGTERM)
        assert before.wait() == 0
        chat.store.chmod(existing)
        wal = chat.store.with_name(chat.store.name + "-wal")
        wal.touch()
        wal.chmod(existing)
    process = chat.run("server", "0", "--host", "127.0.0.1", "--store", str(chat.store))
    process.see_match(r"\[Server listening on .*\]")
    files = sorted(chat.directory.glob(chat.store.name + "*"))
    assert len(files) == 2 and {mode(path) for path in files} == {0o600}


def test_identity_that_others_can_read_is_used_with_a_warning(chat: Chat) -> None:
    chat.server(store=":memory:")
    assert chat.client("alice").finish() == 0
    identity = chat.state / "udpchat" / "identity"
    assert mode(identity) == 0o600
    identity.chmod(0o640)
    alice = chat.client("alice")
    assert alice.finish() == 0
    assert len(alice.errors) == 1 and alice.errors[0].endswith("can be read by others, who can take your nicks:"
                                                               " chmod 600 it")


def no_links(source: str, target: str) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_an_identity_is_made_where_the_file_system_has_no_hard_links(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "state" / "identity"
    secret = home.load_secret(str(path))
    assert len(secret) == 32 and home.load_secret(str(path)) == secret
    assert mode(path) == 0o600 and sorted(os.listdir(path.parent)) == ["identity"]


def test_of_two_processes_that_make_an_identity_without_hard_links_one_takes_that_of_the_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_overtaken(path: str) -> None:
        monkeypatch.setattr(os, "mkdir", mkdir)
        home.load_secret(str(tmp_path / "identity"))
        mkdir(path)
    mkdir = os.mkdir
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "mkdir", is_overtaken)
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: None)
    secret = home.load_secret(str(tmp_path / "identity"))
    assert home.load_secret(str(tmp_path / "identity")) == secret
    assert os.listdir(tmp_path) == ["identity"]


def test_a_lock_that_a_killed_process_left_does_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(home, "LOCK_ATTEMPTS", 2)
    (tmp_path / "identity.lock").mkdir()
    assert len(home.load_secret(str(tmp_path / "identity"))) == 32
    assert os.listdir(tmp_path) == ["identity"]


def test_text_for_send_that_is_far_too_long_is_refused_with_its_size(chat: Chat) -> None:
    chat.absent("bob")
    carl = run_send(chat, "bob", stdin="x" * 3_000_000 + "\n")
    assert carl.popen.returncode == 1
    assert "[Message too long: 3000000 bytes, at most 65536.]" in carl.lines


def test_text_for_send_is_read_like_a_line(chat: Chat) -> None:
    bob = chat.client("bob")
    assert run_send(chat, "bob", stdin=b"\xef\xbb\xbffrom an editor\r\n").popen.returncode == 0
    environment = {"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"}
    carl = chat.run("send", "bob", b"caf\xe9", environment=environment)
    assert carl.finish() == 0 and received("bob") in carl.lines and SAVED not in carl.lines
    assert bob.finish() == 0
    assert [line for line in bob.lines if line.startswith("carl: ")] == ["carl: from an editor", "carl: caf\ufffd"]
