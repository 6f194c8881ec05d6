"""The file of a store is removed, renamed, replaced or locked away while a server has it open.

What is acked as saved is in the file that the next server finds. So nothing is acked while that is another file.
"""
from __future__ import annotations

import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import udpchat
from home import Mailbox, StoreFile
from loop import Failure
from protocol import Parcel
from tests.processes import ROOT, SAVED, Chat, Process, received

SERVER, STREAM = b"s" * 16, 2 ** 62 + 1
A = ("192.0.2.1", 5000)
NO_DISK = "[The server cannot save messages now, message for bob not saved.]"


@pytest.fixture(name="path")
def path_of_a_store(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    return tmp_path / "here" / "store.db"


@pytest.fixture(name="box")
def box_with_bob(path: Path) -> Iterator[Mailbox]:
    """Yield a store with a message for bob."""
    box = Mailbox(str(path), SERVER)
    box.add("bob", *A, None, 0.0)
    assert keep(box, "before")
    yield box
    box.close()


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def keep(box: Mailbox, text: str) -> bool:
    """Keep a message for bob; return whether it is on the disk."""
    first = box.stream_next("alice", STREAM)
    assert first is not None
    box.keep(box.known["bob"], "alice", STREAM, Parcel(first, [text], [1.0], []))
    return box.commit(0.0)


def texts(box: Mailbox) -> list[str]:
    return [letter[2] for letter in box.fetch(box.known["bob"], 1, 99)]


def found_by_the_next(path: Path) -> list[str]:
    """Return what a server that starts now finds for bob."""
    box = Mailbox(str(path), SERVER)
    found = texts(box)
    box.close()
    return found


def copied(path: Path, folder: Path) -> Path:
    """Return what a crash at this moment leaves of a store."""
    folder.mkdir()
    for file in path.parent.glob(path.name + "*"):
        shutil.copy(file, folder)
    return folder / path.name


# how it goes: (what happens, what undoes it, what the reason says)

def move_all(path: Path, there: Path) -> None:
    for file in list(path.parent.glob(path.name + "*")):
        file.rename(there / file.name)


def move_back(path: Path, there: Path) -> None:
    move_all(there / path.name, path.parent)


def replace_by_copy(path: Path, there: Path) -> None:
    """Put a copy into the place of the store, as ``rsync`` and editors do."""
    move_all(path, there)
    shutil.copy(there / path.name, path)
    shutil.copy(log_of(there / path.name), log_of(path))


def put_link(path: Path, there: Path) -> None:
    """Move the store, but not its log, and leave a link to it."""
    path.rename(there / path.name)
    path.symlink_to(there / path.name)


def take_link(path: Path, there: Path) -> None:
    (there / path.name).replace(path)


def move_directory(path: Path, there: Path) -> None:
    path.parent.rename(there / "directory")


def move_directory_back(path: Path, there: Path) -> None:
    (there / "directory").rename(path.parent)


def mount_over(path: Path, there: Path) -> None:
    """Put another directory into the place of the one that holds the store, as a container does with a volume."""
    move_directory(path, there)
    path.parent.mkdir()
    path.write_bytes(b"")


def end_mount(path: Path, there: Path) -> None:
    shutil.rmtree(path.parent)
    move_directory_back(path, there)


Event = Callable[[Path, Path], object]
EVENTS: dict[str, tuple[Event, Event, str]] = {
    "moved away": (move_all, move_back, "it was removed or renamed"),
    "replaced by a copy": (replace_by_copy, move_back, "it was replaced by another file"),
    "moved behind a link": (put_link, take_link, "it was replaced by another file"),
    "with its directory": (move_directory, move_directory_back, "it was removed or renamed"),
    "under another directory": (mount_over, end_mount, "it was replaced by another file"),
}


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_is_saved_while_the_store_is_not_in_its_place_and_all_is_when_it_is_back(
        box: Mailbox, path: Path, tmp_path: Path, event: str) -> None:
    happen, undo, reason = EVENTS[event]
    happen(path, tmp_path / "there")
    for _ in range(3):
        assert not keep(box, "lost") and texts(box) == ["before"]
        assert box.failure == f"{path}: {reason}"
    undo(path, tmp_path / "there")
    assert keep(box, "after") and texts(box) == ["before", "after"]
    assert found_by_the_next(copied(path, tmp_path / "crashed")) == ["before", "after"]
    box.close()
    assert found_by_the_next(path) == ["before", "after"]


def test_a_store_that_was_removed_is_never_written_again(box: Mailbox, path: Path) -> None:
    for file in list(path.parent.iterdir()):
        file.unlink()
    assert not keep(box, "lost") and "removed" in box.failure
    box.close()
    assert not list(path.parent.iterdir())


def test_a_log_that_was_removed_costs_one_refusal_and_nothing_that_was_saved(
        box: Mailbox, path: Path, tmp_path: Path) -> None:
    log_of(path).unlink()
    assert not keep(box, "refused")
    assert box.failure == f"{log_of(path)}: it was removed or renamed"
    assert found_by_the_next(copied(path, tmp_path / "at once")) == ["before"], "it is in the store itself now"
    assert keep(box, "after")
    assert found_by_the_next(copied(path, tmp_path / "later")) == ["before", "after"]


def test_an_old_log_that_comes_back_undoes_nothing(box: Mailbox, path: Path, tmp_path: Path) -> None:
    log_of(path).rename(tmp_path / "old")
    assert not keep(box, "refused") and keep(box, "after")
    (tmp_path / "old").replace(log_of(path))
    assert not keep(box, "refused") and box.failure == f"{log_of(path)}: it was replaced by another file"
    assert found_by_the_next(copied(path, tmp_path / "crashed")) == ["before", "after"]
    box.close()
    gc.collect()
    assert found_by_the_next(copied(path, tmp_path / "closed")) == ["before", "after"]


def test_a_backup_that_was_put_into_the_place_of_a_store_is_whole_after_the_server_has_ended(
        box: Mailbox, path: Path, tmp_path: Path) -> None:
    backup = copied(path, tmp_path / "backup")
    assert keep(box, "after the backup")
    contents = {file.name: file.read_bytes() for file in backup.parent.iterdir()}
    for file in backup.parent.iterdir():
        file.rename(path.with_name(file.name))
    assert not keep(box, "lost")
    box.close()
    del box
    gc.collect()
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == contents
    assert found_by_the_next(path) == ["before"]


def test_the_log_of_a_store_does_not_get_into_a_backup_that_came_without_one(
        box: Mailbox, path: Path, tmp_path: Path) -> None:
    assert keep(box, "more")
    backup = Mailbox(str(copied(path, tmp_path / "backup")), SERVER)
    backup.close()
    assert keep(box, "after the backup")
    data = (tmp_path / "backup" / path.name).read_bytes()
    (tmp_path / "backup" / path.name).replace(path)
    assert not keep(box, "lost")
    assert found_by_the_next(copied(path, tmp_path / "killed")) == ["before", "more"]
    box.close()
    assert path.read_bytes() == data
    assert found_by_the_next(path) == ["before", "more"]


def test_the_log_stays_for_a_store_that_was_carried_away_and_comes_back_as_a_copy(
        box: Mailbox, path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "on another disk")
    path.unlink()
    assert not keep(box, "lost")
    box.close()
    shutil.copy(tmp_path / "on another disk", path)
    assert found_by_the_next(path) == ["before"], "it was only in the log until now"


def test_a_store_behind_a_link_is_kept_and_a_link_that_leads_elsewhere_is_noticed(path: Path, tmp_path: Path) -> None:
    Mailbox(str(path), SERVER).close()
    other = tmp_path / "there" / "other.db"
    Mailbox(str(other), SERVER).close()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "directory").symlink_to(path.parent)
    for name in (tmp_path / "link", tmp_path / "directory" / path.name):
        box = Mailbox(str(name), SERVER)
        if "bob" not in box.known:
            box.add("bob", *A, None, 0.0)
        assert keep(box, name.name)
        assert log_of(path).exists(), "SQLite has its log beside the file, not beside the link"
        box.close()
    box = Mailbox(str(tmp_path / "link"), SERVER)
    (tmp_path / "new").symlink_to(other)
    (tmp_path / "new").replace(tmp_path / "link")
    assert not keep(box, "lost") and box.failure == f"{tmp_path / 'link'}: it was replaced by another file"
    box.close()
    assert found_by_the_next(path) == ["link", path.name]


def test_checkpoints_and_restarts_are_not_taken_for_other_files(path: Path) -> None:
    for run in range(3):
        box = Mailbox(str(path), SERVER)
        if not run:
            box.add("bob", *A, None, 0.0)
        for number in range(60):
            assert keep(box, "x" * 700)
            if number % 20 == 19:
                box._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        box.close()


def test_a_store_in_memory_has_no_file_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    box = Mailbox(":memory:", SERVER)
    box.add("bob", *A, None, 0.0)
    (tmp_path / ":memory:").touch()
    assert keep(box, "text") and texts(box) == ["text"]
    box.close()


def test_a_store_that_cannot_be_looked_at_is_not_written(box: Mailbox, path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: object, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert not keep(box, "lost")
    assert box.failure == f"{path}: Permission denied"
    assert keep(box, "after")


def test_the_nick_that_is_forgotten_in_a_store_that_goes_meanwhile_is_an_error(
        box: Mailbox, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box.close()
    check = StoreFile.check

    def check_late(self: StoreFile) -> None:
        path.rename(tmp_path / "elsewhere")
        check(self)
    monkeypatch.setattr(StoreFile, "check", check_late)
    options = udpchat.parse(["server", "--store", str(path), "--forget", "bob"])
    with pytest.raises(Failure, match=f"{path}: it was removed or renamed"):
        udpchat.forget(options)
    (tmp_path / "elsewhere").rename(path)
    assert found_by_the_next(path) == ["before"]


# --- real processes -------------------------------------------------------------------------------------------

def start(chat: Chat) -> tuple[Process, Process]:
    """Return a server and alice, who has a message saved for bob."""
    chat.store.parent.mkdir(exist_ok=True)
    server = chat.server()
    chat.absent("bob")
    alice = chat.client("alice")
    alice.feed("send bob before\n")
    alice.see(SAVED)
    return server, alice


def assert_mail(chat: Chat, *wanted: str) -> None:
    """Check that bob gets these messages, and no others."""
    bob = chat.client("bob")
    for text in wanted:
        assert bob.see_match("alice: <.*").group().endswith(f"> {text}")
    assert bob.finish() == 0
    assert sum(line.startswith("alice: <") for line in bob.lines) == len(wanted)


@pytest.fixture(name="apart")
def chat_with_a_directory_for_the_store(chat: Chat) -> Chat:
    chat.store = chat.directory / "data" / "store.db"
    return chat


def test_a_sender_is_told_while_the_store_is_away_and_everything_else_goes_on(apart: Chat) -> None:
    server, alice = start(apart)
    there = apart.directory / "there"
    there.mkdir()
    move_all(apart.store, there)
    for _ in range(3):
        alice.feed("send bob lost\n")
        alice.see(NO_DISK)
    carol = apart.client("carol")
    carol.wait_for("alice")
    carol.feed("send alice still here\n")
    carol.see(received("alice"))
    assert not apart.store.exists()
    move_back(apart.store, there)
    alice.feed("send bob after\n")
    alice.see(SAVED)
    assert alice.finish() == 1, "three messages were not kept"
    assert carol.finish() == 0
    server.kill()
    errors = [line for line in server.errors if " ERROR " in line]
    assert len(errors) == 1 and f"({apart.store}: it was removed or renamed)" in errors[0]
    server = apart.restart()
    assert_mail(apart, "before", "after")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize("what", ["store", "all", "directory"])
def test_a_server_whose_store_was_removed_ends_with_1_and_says_why(apart: Chat, what: str) -> None:
    server, alice = start(apart)
    if what == "store":
        apart.store.unlink()
    else:
        for file in list(apart.store.parent.iterdir()):
            file.unlink()
    if what == "directory":
        apart.store.parent.rmdir()
    server.signal(signal.SIGTERM)
    assert server.wait() == 1
    error, = [line for line in server.errors if " ERROR " in line]
    assert f"{apart.store}: it was removed or renamed" in error
    assert not apart.store.exists()
    alice.kill()


def test_a_second_server_on_a_new_store_keeps_its_log_when_the_first_one_ends(apart: Chat) -> None:
    first, alice = start(apart)
    there = apart.directory / "there"
    there.mkdir()
    move_all(apart.store, there)
    second = apart.server()
    apart.absent("bob")
    dave = apart.client("dave")
    dave.feed("send bob on the second\n")
    dave.see(SAVED)
    first.signal(signal.SIGTERM)
    assert first.wait() == 1
    assert log_of(apart.store).exists()
    dave.feed("send bob and more\n")
    dave.see(SAVED)
    second.kill()
    apart.restart()
    bob = apart.client("bob")
    for text in ("on the second", "and more"):
        assert bob.see_match("dave: <.*").group().endswith(f"> {text}")
    alice.kill()


def test_a_directory_that_becomes_read_only_costs_nothing(apart: Chat) -> None:
    server, alice = start(apart)
    apart.store.parent.chmod(0o500)
    try:
        alice.feed("send bob after\n")
        alice.see(SAVED)
        assert alice.finish() == 0
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        apart.store.parent.chmod(0o700)
    apart.restart()
    assert_mail(apart, "before", "after")


def test_a_process_that_ends_leaves_the_log_of_another_store_alone(path: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from registry import Mailbox
box = Mailbox({str(path)!r}, b"s" * 16)
for name in ({str(path)!r}, {str(log_of(path))!r}):
    os.rename(name, name + ".old")
    open(name, "w").write("another")
box.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.read_text() == log_of(path).read_text() == "another"
    moved = tmp_path / "there" / "store.db"
    path.with_name("store.db.old").rename(moved)
    path.with_name("store.db-wal.old").rename(log_of(moved))
    assert sqlite3.connect(moved).execute("SELECT count(*) FROM meta").fetchone() == (2,)
