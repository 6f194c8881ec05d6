"""``udpchat recv`` and ``udpchat ask``: they show what they were asked for, and leave all else for the next one."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from conversation import HOLD_TIME, STREAMS_PER_SENDER, Delivery, Inbox, Note, Selection
from home import ShownMessages
from tests.processes import SAVED, Chat, Process, received, sends
from tests.simulate import Life, World

TIME_IS_OVER = 3


def start(chat: Chat, mode: str, *arguments: str, nick: str = "carl") -> Process:
    """Start ``udpchat recv`` or ``ask``."""
    environment = {"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": nick}
    return chat.run(mode, *arguments, stdin=subprocess.DEVNULL, environment=environment)


def run(chat: Chat, mode: str, *arguments: str, nick: str = "carl") -> tuple[int, list[str], list[str]]:
    """Run it until it ends; return the exit code, and the lines on stdout, without times, and on stderr."""
    process = start(chat, mode, *arguments, nick=nick)
    process.wait()
    return process.popen.returncode, texts(process), process.errors


def texts(process: Process) -> list[str]:
    return [re.sub(r": <\d{4}-\d\d-\d\d \d\d:\d\d:\d\d> ", ": ", line) for line in process.lines]


def leave_mail(chat: Chat, sender: str, lines: Sequence[str], to: str = "carl") -> None:
    """Leave mail for somebody who is away."""
    client = chat.client(sender)
    client.feed(sends(to, lines))
    assert client.finish() == 0 and client.lines.count(SAVED) == len(lines)


def all_mail(chat: Chat, nick: str = "carl") -> list[str]:
    """Return what a client gets that comes next."""
    client = chat.start(nick, "--quiet")
    assert client.finish() == 0
    return texts(client)


# --- recv -----------------------------------------------------------------------------------------------------

def test_recv_shows_one_message_and_the_next_recv_the_next(chat: Chat) -> None:
    chat.absent("carl")
    leave_mail(chat, "bob", ["one", "two", "three", "four"])
    assert run(chat, "recv") == (0, ["bob: one"], [])
    assert run(chat, "recv", "--count", "2") == (0, ["bob: two", "bob: three"], [])
    assert all_mail(chat) == ["bob: four"]


def test_recv_gets_what_comes_straight_and_the_rest_waits_at_the_server(chat: Chat) -> None:
    bob = chat.client("bob")
    waiting = start(chat, "recv", "--count", "2")
    bob.wait_for("carl")
    bob.feed(sends("carl", [f"number {number}" for number in range(50)]))
    assert waiting.wait() == 0 and waiting.lines == ["bob: number 0", "bob: number 1"]
    assert bob.finish() == 0
    closings = [line for line in bob.lines if line in (SAVED, received("carl"))]
    assert closings == [received("carl")] * 2 + [SAVED] * 48
    assert run(chat, "recv", "--count", "3")[1] == [f"bob: number {number}" for number in (2, 3, 4)]
    assert all_mail(chat) == [f"bob: number {number}" for number in range(5, 50)]


def test_recv_without_a_message_ends_with_3_when_its_time_is_over(chat: Chat) -> None:
    assert run(chat, "recv", "--timeout", "1") == (TIME_IS_OVER, [], [])
    leave_mail(chat, "bob", ["only one"])
    assert run(chat, "recv", "--timeout", "1", "--count", "2") == (TIME_IS_OVER, ["bob: only one"], [])
    assert all_mail(chat) == []


def test_recv_of_one_sender_leaves_what_others_have_sent_before_and_between(chat: Chat) -> None:
    chat.absent("carl")
    leave_mail(chat, "dora", ["first"])
    leave_mail(chat, "bob", ["one"])
    leave_mail(chat, "dora", ["second"])
    leave_mail(chat, "bob", ["two", "x" * 5000, "three"])
    assert run(chat, "recv", "--from", "bob") == (0, ["bob: one"], [])
    assert run(chat, "recv", "--from", "BOB", "--count", "2") == (0, ["bob: two", "bob: " + "x" * 5000], [])
    assert run(chat, "recv", "--from", "dora") == (0, ["dora: first"], [])
    assert run(chat, "recv", "--from", "nobody", "--timeout", "1") == (TIME_IS_OVER, [], [])
    assert all_mail(chat) == ["dora: second", "bob: three"]
    assert all_mail(chat) == []


def test_recv_of_one_sender_hears_it_though_mail_of_others_waits(chat: Chat) -> None:
    chat.absent("carl")
    leave_mail(chat, "dora", ["before"])
    bob, dora = chat.clients("bob", "dora")
    waiting = start(chat, "recv", "--from", "bob")
    bob.wait_for("carl")
    dora.wait_for("carl")
    dora.feed("send carl meanwhile\n")
    dora.see(SAVED)
    assert not waiting.lines
    bob.feed("send carl straight\n")
    bob.see(received("carl"))
    assert waiting.wait() == 0 and waiting.lines == ["bob: straight"]
    assert bob.finish() == dora.finish() == 0
    assert all_mail(chat) == ["dora: before", "dora: meanwhile"]


@pytest.mark.parametrize("several", [2, 3])
def test_recvs_that_start_together_take_turns_and_none_shows_what_another_has_shown(chat: Chat, several: int) -> None:
    chat.absent("carl")
    leave_mail(chat, "dora", ["in front"])      # so nothing behind it can be acked
    leave_mail(chat, "bob", [f"number {number}" for number in range(several)])
    jobs = [start(chat, "recv", "--from", "bob", "--timeout", "60") for _ in range(several)]
    assert [job.wait() for job in jobs] == [0] * several
    assert sorted(line for job in jobs for line in texts(job)) == [f"bob: number {n}" for n in range(several)]
    assert all_mail(chat) == ["dora: in front"]


def test_a_client_that_comes_back_does_not_show_what_recv_has_shown_meanwhile(chat: Chat) -> None:
    bob, carl = chat.clients("bob", "carl")
    bob.feed("send carl zero\n")
    carl.see("bob: zero")
    carl.feed("dereg carl\n")
    bob.wait_for("carl", "offline")
    leave_mail(chat, "dora", ["in front"])      # so nothing behind it can be acked
    bob.feed("send carl one\nsend carl two\n")
    bob.see(SAVED, SAVED)
    assert run(chat, "recv", "--from", "bob") == (0, ["bob: one"], [])
    carl.feed("reg carl\n")
    assert carl.finish() == bob.finish() == 0
    assert [line for line in texts(carl) if ": " in line] == ["bob: zero", "dora: in front", "bob: two"]


def test_a_client_that_was_stopped_does_not_show_what_recv_has_shown_meanwhile(chat: Chat) -> None:
    bob, carl = chat.client("bob"), chat.client("carl", "--stay")
    bob.wait_for("carl")
    bob.feed("send carl zero\n")
    carl.see("bob: zero")
    bob.see(received("carl"))       # it has not only shown it, but said so
    carl.signal(signal.SIGSTOP)
    bob.feed("send carl one\nsend carl two\n")
    bob.see(SAVED, SAVED)               # and copies lie in the socket of carl
    assert run(chat, "recv", "--count", "1") == (0, ["bob: one"], [])
    carl.signal(signal.SIGCONT)
    carl.see("bob: two")
    carl.signal(signal.SIGTERM)
    carl.wait()
    assert [line for line in carl.lines if ": " in line] == ["bob: zero", "bob: two"]


def test_a_program_that_was_stopped_learns_that_another_has_noted_something_but_not_of_its_own_notes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    one, other = ShownMessages(str(tmp_path / "shown")), ShownMessages(str(tmp_path / "shown"))
    assert one.load() == []
    one.note("bob", 7, 1, 2)
    clock += 5.0
    assert not one.has_news()
    other.note("bob", 7, 2, 3)
    assert not one.has_news(), "it was not stopped"
    clock += 5.0
    assert one.has_news()
    assert one.load()[-1][3] == 3
    clock += 5.0
    assert not one.has_news()
    other.note("bob", 7, 3, 4)
    one.note("bob", 7, 4, 5)
    clock += 5.0
    assert one.has_news(), "its own note does not hide those of others"


def test_what_was_shown_is_noted_for_each_nick_apart(chat: Chat) -> None:
    for nick in ("carl", "carol"):
        chat.absent(nick)
        leave_mail(chat, "bob", [f"for {nick}"], to=nick)
        assert run(chat, "recv", nick=nick) == (0, [f"bob: for {nick}"], [])
    assert {path.name for path in (chat.state / "udpchat").glob("shown*")} == {"shown-carl", "shown-carol"}


def test_what_cannot_be_noted_is_said_once(chat: Chat) -> None:
    chat.absent("carl")
    for number in range(3):
        leave_mail(chat, f"bob{number}", ["one", "two"])
    (chat.state / "udpchat" / "shown-carl").mkdir()
    code, lines, errors = run(chat, "recv", "--count", "6")
    assert code == 0 and lines == [f"bob{number}: {text}" for number in range(3) for text in ("one", "two")]
    assert len([line for line in errors if "it is not noted what was shown" in line]) == 1


def test_recv_may_show_objects(chat: Chat) -> None:
    chat.absent("carl")
    leave_mail(chat, "bob", ["one", "two"])
    code, lines, errors = run(chat, "recv", "--json")
    event, = map(json.loads, lines)
    assert (code, errors, event["type"], event["text"]) == (0, [], "message", "one")


def test_recv_that_cannot_register_fails_and_says_why(chat: Chat) -> None:
    server = chat.server()
    server.kill()
    code, lines, errors = run(chat, "recv", "--timeout", "1")
    assert (code, lines, errors) == (1, [], ["udpchat: the time is over, and no answer from the server"])
    assert run(chat, "recv")[0] == 1


@pytest.mark.parametrize("mode", ["recv", "who", "ask", "send"])
def test_a_job_that_is_interrupted_while_it_starts_fails(chat: Chat, mode: str) -> None:
    chat.absent("bob")
    for milliseconds in range(20, 150, 15):
        job = start(chat, mode, *(["bob", "hello"] if mode in ("ask", "send") else []))
        time.sleep(milliseconds / 1000)
        job.signal(signal.SIGTERM)
        assert job.wait() in (1, -signal.SIGTERM) or job.lines, milliseconds


def test_recv_that_is_interrupted_fails(chat: Chat) -> None:
    bob = chat.client("bob")
    waiting = start(chat, "recv")
    bob.wait_for("carl")
    waiting.signal(signal.SIGTERM)
    assert waiting.wait() == 1 and not waiting.lines


def test_many_recvs_in_a_row_show_each_message_once_while_others_go_on_sending(chat: Chat) -> None:
    chat.absent("carl")
    bob, dora = chat.clients("bob", "dora")
    shown: list[str] = []
    for number in range(6):
        bob.feed(sends("carl", [f"{number}.{part}" for part in range(5)]))
        dora.feed(sends("carl", [f"{number}.{part}" for part in range(5)]))
        code, lines, _ = run(chat, "recv", "--count", "4", *(["--from", "bob"] if number % 2 else []))
        assert code == 0 and len(lines) == 4
        shown += lines
    assert bob.finish() == dora.finish() == 0
    shown += all_mail(chat)
    wanted = [f"{number}.{part}" for number in range(6) for part in range(5)]
    for nick in "bob", "dora":
        assert sorted(line for line in shown if line.startswith(nick)) == sorted(f"{nick}: {text}" for text in wanted)


# --- ask ------------------------------------------------------------------------------------------------------

def test_ask_prints_the_first_answer_and_leaves_what_comes_behind_it(chat: Chat) -> None:
    bob = chat.client("bob")
    asking = start(chat, "ask", "bob", "what", "time?")
    bob.see("carl: what time?")
    bob.feed("send carl half past\nsend carl or later\n")
    assert asking.wait() == 0 and asking.lines == ["half past"] and not asking.errors
    assert bob.finish() == 0
    assert all_mail(chat) == ["bob: or later"]


def test_ask_does_not_take_what_was_sent_before_for_the_answer(chat: Chat) -> None:
    chat.absent("carl")
    leave_mail(chat, "dora", ["for later"])
    leave_mail(chat, "bob", ["yesterday"])
    bob, dora = chat.clients("bob", "dora")
    bob.feed("send carl today\n")
    bob.see(SAVED)
    asking = start(chat, "ask", "bob", "well?")
    bob.see("carl: well?")
    dora.wait_for("carl")
    dora.feed("send carl not asked\n")
    dora.see(SAVED)
    bob.feed("send carl now\n")
    assert asking.wait() == 0 and asking.lines == ["now"]
    assert bob.finish() == dora.finish() == 0
    assert all_mail(chat) == ["dora: for later", "bob: yesterday", "bob: today", "dora: not asked"]


def test_ask_gets_its_answer_whatever_mail_waits_and_whichever_way_it_comes(chat: Chat) -> None:
    """The first mail of a session must not make it forget where the mail ended when it asked."""
    chat.absent("carl")
    leave_mail(chat, "dora", ["for later"])
    bob, dora = chat.clients("bob", "dora")
    for number in range(3):
        asking = start(chat, "ask", "bob", f"well {number}?", "--timeout", "30")
        bob.see(f"carl: well {number}?")
        asking.signal(signal.SIGSTOP)
        dora.feed(f"send carl {number}\n")
        dora.see(SAVED)             # so he is offline: an answer goes straight to the server
        bob.wait_for("carl", "offline")
        bob.feed(f"send carl answer {number}\n")
        bob.see(SAVED)
        asking.signal(signal.SIGCONT)
        assert asking.wait() == 0 and asking.lines == [f"answer {number}"]
    assert bob.finish() == dora.finish() == 0
    assert all_mail(chat) == ["dora: for later", "dora: 0", "dora: 1", "dora: 2"]


def test_ask_gets_an_answer_that_a_server_kept_which_was_started_anew(chat: Chat) -> None:
    server = chat.server()
    chat.absent("carl")
    leave_mail(chat, "dora", ["for later"])
    leave_mail(chat, "bob", ["yesterday"])
    bob = chat.client("bob")
    asking = start(chat, "ask", "bob", "well?", "--timeout", "30")
    bob.see("carl: well?")
    asking.signal(signal.SIGSTOP)
    server.kill()
    chat.restart()
    bob.wait_for("carl", "offline")
    bob.feed("send carl now\n")
    bob.see(SAVED)
    asking.signal(signal.SIGCONT)
    assert asking.wait() == 0 and asking.lines == ["now"]
    assert bob.finish() == 0
    assert all_mail(chat) == ["dora: for later", "bob: yesterday"]


def test_ask_without_an_answer_ends_with_3_and_a_later_answer_is_for_the_next_one(chat: Chat) -> None:
    bob = chat.client("bob")
    assert run(chat, "ask", "bob", "well?", "--timeout", "1") == (TIME_IS_OVER, [], [])
    bob.see("carl: well?")
    bob.feed("send carl late\n")
    bob.see(SAVED)
    assert run(chat, "recv", "--from", "bob") == (0, ["bob: late"], [])


def test_ask_somebody_unknown_or_a_server_that_is_gone_fails(chat: Chat) -> None:
    server = chat.server()
    assert run(chat, "ask", "nobody", "well?") == (1, [], ["[Unknown client nobody.]"])
    server.kill()
    assert run(chat, "ask", "bob", "well?", "--timeout", "1") == (
        1, [], ["udpchat: the time is over, and no answer from the server", "send bob well?",
                "[1 message not delivered.]"])


@pytest.mark.parametrize("arguments", [["recv", "--count", "0"], ["recv", "--from", "two words"], ["recv", "bob"],
                                       ["ask"], ["ask", "bob,dora", "well?"], ["recv", "--quiet"]], ids=repr)
def test_recv_and_ask_with_wrong_arguments_are_one_line_on_stderr(chat: Chat, arguments: list[str]) -> None:
    process = chat.complete(*arguments, "--nick", "carl")
    assert process.popen.returncode == 2 and not process.lines and len(process.errors) == 1


# --- in the simulated world -----------------------------------------------------------------------------------

def waiting(*words: str) -> tuple[World, Life, Life]:
    """Return a world with bob, and carl who runs ``udpchat recv`` or ``ask``."""
    world = World(1)
    world.start_server()
    bob, carl = world.client("bob"), world.waiter("carl", *words)
    world.run(1)
    return world, bob, carl


@pytest.mark.parametrize("is_interrupted, code", [(False, TIME_IS_OVER), (True, 1)])
def test_recv_whose_reader_stalls_has_not_got_what_is_not_written(is_interrupted: bool, code: int) -> None:
    world, bob, carl = waiting("recv", "--timeout", "5")
    carl.screen.set_rate(0.0)
    bob.type("send carl " + "x" * 60_000)       # more than a pipe holds
    world.run(2)
    if is_interrupted:
        carl.interrupt()
    world.run(8)
    assert carl.exit_code == code and not carl.lines
    bob.end_input()
    world.run(1)
    assert bob.exit_code == 0 and bob.lines.count(SAVED) == 1


def test_an_answer_that_comes_while_ask_ends_counts() -> None:
    world, bob, carl = waiting("recv")
    carl.interrupt()
    world.run(1)
    world.network.block("bob", "carl", 0.4)     # so carl does not hear that his question is received
    asking = world.waiter("carl", "ask", "bob", "well?")
    world.run_until(lambda: "carl: well?" in bob.lines, 2)
    asking.interrupt()
    bob.type("send carl now")
    world.run(3)
    assert asking.exit_code == 0 and asking.shown and bob.lines.count(received("carl")) == 1


def test_recv_whose_server_is_silent_when_the_time_is_over_fails_and_says_why() -> None:
    world, _, carl = waiting("recv", "--timeout", "30")
    assert world.server is not None
    world.server.crash()
    world.run(40)
    assert carl.exit_code == 1 and carl.complaints == ["[Server not responding]"]


# --- the parts ------------------------------------------------------------------------------------------------

def test_what_was_shown_is_read_again_whatever_else_is_in_the_file(tmp_path: object) -> None:
    path = f"{tmp_path}/below/shown"
    assert ShownMessages(path).load() == []
    ShownMessages(path).note("bob", 7, 1, 3)
    with open(path, "a", encoding="utf-8") as file:
        file.write("torn 1\nbob 7 x 9\n")
    ShownMessages(path).note("?bob", 8, 2, 3)
    assert ShownMessages(path).load() == [("bob", 7, 1, 3), ("?bob", 8, 2, 3)]


def test_where_there_can_be_no_directory_nothing_is_noted_and_that_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = ShownMessages(str(tmp_path / "file" / "shown"))
    shown.note("bob", 7, 1, 3)
    assert shown.load() == []


def test_what_was_shown_is_known_however_much_was_noted_since(tmp_path: Path) -> None:
    shown = ShownMessages(str(tmp_path / "shown"))
    shown.note("bob", 7, 3, 5)
    for number in range(1, 25_000):
        shown.note("alice", 9, number, number + 1)
    shown.note("bob", 7, 4, 6)
    assert ShownMessages(str(tmp_path / "shown")).load() == [("alice", 9, 1, 25_000), ("bob", 7, 3, 6)]
    assert (tmp_path / "shown").stat().st_size < 2 ** 20


def test_a_note_behind_one_that_was_not_written_whole_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, write = ShownMessages(str(tmp_path / "shown")), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:len(data) // 2]))
        with pytest.raises(OSError):
            shown.note("bob", 7, 1, 2)
    shown.note("bob", 7, 2, 3)
    assert ShownMessages(str(tmp_path / "shown")).load() == [("bob", 7, 2, 3)]


def taken(inbox: Inbox, now: float, answered: int) -> list[Delivery]:
    """Return what is handed out once the server has said how many letters it has."""
    inbox.answer(now, answered)
    list(inbox.take(now, lambda: True))     # here it is seen that nothing is to be waited for
    return list(inbox.take(now, lambda: True))


def mail_of(first: int, *letters: tuple[str, int, str]) -> dict[str, object]:
    """Return a ``mail`` with one-letter runs: sender, stream, text."""
    return {"stream": 99, "n": first, "base": 1,
            "items": [[sender, stream, 1, 1.5, [text], []] for sender, stream, text in letters]}


def chat_of(sender: str, stream: int, first: int, *said: str) -> dict[str, object]:
    return {"from": sender, "to": "carl", "stream": stream, "n": first, "base": 1, "text": list(said)}


def test_an_inbox_acks_what_was_selected_and_nothing_behind_it() -> None:
    noted: list[tuple[str, int, int, int]] = []
    inbox = Inbox(Selection(2, note=lambda *what: noted.append(what)))
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "one", "two", "three"), ("h", 1))
    delivery, = inbox.take(0.0, lambda: True)
    assert delivery.texts == ["one", "two"] and not inbox.is_ready and not inbox.has_chat
    delivery.written(1)
    delivery.written(1)
    (ack, _, _), = inbox.acks()
    assert ack["next"] == 3 and noted == [("bob", 7, 1, 2), ("bob", 7, 2, 3)]
    later = Inbox()
    later.restore(noted)
    later.on_chat(0.0, chat_of("bob", 7, 1, "one", "two", "three"), ("h", 1))
    assert [text for delivery in later.take(0.0, lambda: True) for text in delivery.texts] == ["three"]


@pytest.mark.parametrize("several", [65, 1000])
def test_however_much_was_passed_over_between_what_was_shown_nothing_is_shown_again(several: int) -> None:
    inbox = Inbox()
    inbox.restore([("bob", 7, number, number + 1) for number in range(2, 2 * several, 2)][::-1])
    said = [str(number) for number in range(1, 2 * several)]
    for first in range(0, len(said), 100):
        inbox.on_chat(0.0, chat_of("bob", 7, first + 1, *said[first:first + 100]), ("h", 1))
    assert [text for delivery in inbox.take(0.0, lambda: True) for text in delivery.texts] == said[::2]


@pytest.mark.parametrize("is_evicted", [False, True])
def test_what_another_program_has_shown_is_added_to_what_this_one_has_shown(is_evicted: bool) -> None:
    inbox = Inbox()
    inbox.on_chat(0.0, chat_of("bob", 7, 1, *"123"), ("h", 1))
    assert [delivery.written(3) for delivery in inbox.take(0.0, lambda: True)]
    if is_evicted:
        for stream in range(100, 101 + STREAMS_PER_SENDER):
            inbox.on_chat(0.0, chat_of("bob", stream, 1, "x"), ("h", 1))
    assert (7 in inbox.streams["bob"]) is not is_evicted
    inbox.restore([("bob", 7, 2, 3), ("bob", 7, 5, 6)])
    inbox.on_chat(0.0, chat_of("bob", 7, 1, *"123456"), ("h", 1))
    shown = [text for delivery in inbox.take(0.0, lambda: True) if delivery.stream == 7 for text in delivery.texts]
    assert shown == ["4", "6"]


def test_ranges_that_were_noted_outlive_what_comes_by_mail() -> None:
    inbox = Inbox()
    inbox.restore([("bob", 7, number, number + 1) for number in range(2, 400, 2)])
    inbox.on_mail(0.0, mail_of(1, ("bob", 7, "1")))
    assert [delivery.texts for delivery in inbox.take(0.0, lambda: True) if delivery.texts] == [["1"]]
    inbox.on_chat(0.0, chat_of("bob", 7, 1, *map(str, range(1, 400))), ("h", 1))
    assert [text for delivery in inbox.take(0.0, lambda: True) for text in delivery.texts] == [
        str(number) for number in range(3, 400, 2)]


def test_what_was_noted_twice_or_overlaps_counts_once() -> None:
    inbox = Inbox()
    inbox.restore([("bob", 7, 3, 5), ("bob", 7, 2, 4), ("bob", 7, 3, 4), ("bob", 7, 5, 6), ("bob", 7, 9, 9)])
    inbox.on_chat(0.0, chat_of("bob", 7, 1, *"123456"), ("h", 1))
    assert [text for delivery in inbox.take(0.0, lambda: True) for text in delivery.texts] == ["1", "6"]


def test_a_sender_who_is_not_wanted_gets_no_ack_and_what_came_before_the_question_is_no_answer() -> None:
    has_asked: list[bool] = []
    selection = Selection(1, "bob", asks=True, note=lambda *what: None)
    selection.has_asked = lambda: bool(has_asked)
    inbox = Inbox(selection)
    selection.mail_from = 1
    inbox.on_chat(0.0, chat_of("dora", 6, 1, "no"), ("h", 1))
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "before"), ("h", 1))
    assert not inbox.acks() and not inbox.is_ready
    has_asked.append(True)
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "before", "answer"), ("h", 1))
    delivery, = taken(inbox, 0.0, answered=0)
    delivery.written(1)
    assert delivery.texts == ["answer"] and delivery.first == 2
    (ack, _, _), = inbox.acks()
    assert ack["next"] == 1


@pytest.mark.parametrize("note", [None, lambda *what: None])
def test_what_came_straight_before_the_question_is_left_in_the_mail_if_the_server_keeps_it_behind(note: Note) -> None:
    has_asked: list[bool] = []
    selection = Selection(1, "bob", asks=True, note=note)
    selection.has_asked = lambda: bool(has_asked)
    selection.note_mail(0)
    inbox = Inbox(selection)
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "before"), ("h", 1))
    has_asked.append(True)
    inbox.on_chat(0.1, chat_of("bob", 7, 1, "before"), ("h", 1))        # a late copy
    inbox.on_mail(0.2, mail_of(1, ("bob", 7, "before")))
    inbox.answer(0.2, 1)
    for delivery in [*inbox.take(0.2, lambda: True), *inbox.take(0.2, lambda: True)]:
        assert not delivery.texts
        delivery.written(0)
    assert [ack["next"] for ack, *_ in inbox.acks()] == [1, 1]


def test_what_is_old_in_the_mail_is_no_answer_when_a_late_copy_of_it_comes_straight() -> None:
    inbox = Inbox(Selection(1, "bob", asks=True, note=lambda *what: None))
    assert inbox.selection is not None
    inbox.selection.note_mail(1)        # the question is out
    inbox.on_mail(0.0, mail_of(1, ("bob", 7, "before")))
    assert not taken(inbox, 0.0, answered=1)
    inbox.on_chat(0.1, chat_of("bob", 7, 1, "before", "answer"), ("h", 1))
    delivery, = taken(inbox, 0.1, answered=1)
    assert delivery.texts == ["answer"]


def test_a_question_to_somebody_whose_folded_nick_is_empty_is_not_answered_by_others() -> None:
    inbox = Inbox(Selection(1, "\u3164", asks=True))
    assert inbox.selection is not None
    inbox.selection.note_mail(0)
    inbox.on_chat(0.0, chat_of("eve", 7, 1, "yes"), ("h", 1))
    inbox.on_mail(0.1, mail_of(1, ("eve", 8, "yes")))
    assert not [delivery for delivery in inbox.take(0.1, lambda: True) if delivery.texts]


def test_what_waited_at_the_server_is_shown_before_what_a_new_program_of_the_same_sender_says() -> None:
    inbox = Inbox(Selection(9, "bob", note=lambda *what: None))
    assert inbox.on_chat(0.0, chat_of("bob", 7, 1, "newer"), ("h", 1)) and inbox.is_asking
    assert not inbox.on_chat(0.1, chat_of("bob", 7, 1, "newer"), ("h", 1))      # once is enough
    inbox.answer(0.0, 2)
    assert not list(inbox.take(0.2, lambda: True)) and not inbox.is_ready
    inbox.on_mail(0.3, mail_of(1, ("dora", 5, "not wanted"), ("bob", 6, "older")))
    shown = list(inbox.take(0.3, lambda: True)) + list(inbox.take(0.3, lambda: True))
    assert [delivery.texts for delivery in shown if delivery.texts] == [["older"], ["newer"]]


@pytest.mark.parametrize("answered", [None, 5000])
def test_what_comes_straight_does_not_wait_for_ever_for_mail_that_does_not_come(answered: int | None) -> None:
    inbox = Inbox(Selection(9, "bob", note=lambda *what: None))
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "straight"), ("h", 1))
    if answered is not None:
        inbox.answer(0.0, answered)
    inbox.expire(HOLD_TIME - 0.1)
    assert not list(inbox.take(HOLD_TIME - 0.1, lambda: True))
    inbox.expire(HOLD_TIME)
    assert [delivery.texts for delivery in inbox.take(HOLD_TIME, lambda: True)] == [["straight"]]


def test_the_question_decides_which_letters_may_be_its_answer_in_later_sessions_too() -> None:
    has_asked: list[bool] = []
    selection = Selection(1, "bob", asks=True, note=lambda *what: None)
    selection.has_asked = lambda: bool(has_asked)
    inbox = Inbox(selection)
    inbox.forget_mail(0.0)              # a session begins
    assert not selection.is_open
    selection.note_mail(1)
    old, answer = ("bob", 6, "yesterday"), ("bob", 7, "now")
    inbox.on_mail(0.0, mail_of(1, old))
    assert selection.is_open and not [delivery for delivery in inbox.take(0.0, lambda: True) if delivery.texts]
    has_asked.append(True)
    inbox.forget_mail(1.0)              # another one begins, when the answer is there already
    selection.note_mail(2)
    inbox.on_mail(1.0, {**mail_of(1, old, answer), "stream": 100})
    assert [delivery.texts for delivery in inbox.take(1.0, lambda: True) if delivery.texts] == [["now"]]


def test_a_server_that_has_lost_its_mail_is_believed() -> None:
    selection = Selection(1, "bob", asks=True)
    selection.note_mail(7)
    selection.begin_mail()      # the question is out
    selection.note_mail(0)
    assert selection.mail_from == 1


def test_what_the_server_keeps_before_the_question_is_no_answer_and_a_late_pong_changes_nothing() -> None:
    has_asked: list[bool] = []
    selection = Selection(1, "bob", asks=True)
    selection.has_asked = lambda: bool(has_asked)
    for last in (1, 3, 2):
        selection.note_mail(last)
    assert selection.mail_from == 4
    has_asked.append(True)
    selection.note_mail(1)
    selection.note_mail(5)
    assert selection.mail_from == 4


def test_an_answer_does_not_wait_for_mail_that_is_older_than_the_question() -> None:
    inbox = Inbox(Selection(1, "bob", asks=True, note=lambda *what: None))
    assert inbox.selection is not None
    inbox.selection.note_mail(6000)
    inbox.on_chat(0.0, chat_of("bob", 7, 1, "answer"), ("h", 1))
    delivery, = taken(inbox, 0.0, answered=6000)
    assert delivery.texts == ["answer"]


def test_a_stream_in_which_something_is_missing_waits_longer_for_the_mail() -> None:
    inbox = Inbox(Selection(9, "bob", note=lambda *what: None))
    inbox.on_chat(0.0, {**chat_of("bob", 7, 3, "three"), "base": 3}, ("h", 1))
    inbox.answer(0.0, 2)
    inbox.expire(HOLD_TIME)
    assert not list(inbox.take(HOLD_TIME, lambda: True))
    inbox.answer(HOLD_TIME, 2)
    inbox.on_mail(6.0, {**mail_of(1), "items": [["bob", 7, 1, 1.5, ["one", "two"], []]]})
    shown = list(inbox.take(6.0, lambda: True)) + list(inbox.take(6.0, lambda: True))
    assert [text for delivery in shown for text in delivery.texts] == ["one", "two", "three"]
