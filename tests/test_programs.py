"""What programs get: JSON events and commands, ``--quiet``, ``udpchat send``, the bots of the manual; real processes.

``Program`` runs a client with ``--json``: each of its events must be as docs/events.schema.json says.
"""
from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from protocol import MAX_TEXT
from home import EVENT_FORMATS, ROUTINE
from loop import without_line_ends
from terminal import JsonFormatter
from tests.pages import block, blocks, section
from tests.processes import (EXITING, NO_BYTECODE, NOT_RESPONDING, OFFLINE, PROGRAM, ROOT, SAVED, UPDATED, WELCOME,
                             Chat, Process, is_offline, has_ipv6, received, sends)

PATIENT = ("--ack-timeout", "60000")    # ms; so long nothing goes to the server
Event = dict[str, Any]


SCHEMA = json.loads((ROOT / "docs" / "events.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def events_of(process: Process) -> list[Event]:
    """Return the events of a program so far. Fail if one is not valid."""
    found = [json.loads(line, parse_constant=no_constant) for line in process.lines]
    for event in found:
        VALIDATOR.validate(event)
    return found


def kind(event: Event) -> tuple[str, str | None]:
    """Return what an event is, and why."""
    return event["type"], event.get("reason")


class Program:
    """A client that speaks JSON."""

    def __init__(self, chat: Chat, nick: str, *options: str, port: int | None = None, ready: bool = True) -> None:
        self.chat = chat
        self.process = chat.start(nick, "--json", *options, port=port)
        if ready:
            self.see("table")

    def tell(self, **command: Any) -> None:
        """Write a command."""
        self.process.feed(json.dumps(command) + "\n")

    def send(self, nick: str, text: str, ref: Any = None) -> None:
        """Send a text; its ``ref`` comes back."""
        self.tell(send=nick, text=text, **({} if ref is None else {"ref": ref}))

    @property
    def events(self) -> list[Event]:
        """Its events so far; all are valid."""
        return events_of(self.process)

    def see(self, type_: str, **fields: Any) -> Event:
        """Wait for an event with these fields; return the first one."""
        found: list[Event] = []

        def is_there() -> bool:
            found[:] = [event for event in self.events
                        if event["type"] == type_ and fields.items() <= event.items()]
            return bool(found)
        self.chat.until(is_there, f"{type_} {fields}")
        return found[0]

    def knows(self, nick: str, state: str = "online") -> None:
        """Wait until the client knows ``nick`` in that state."""
        def does() -> bool:
            count = len([event for event in self.events if event["type"] == "help"])
            self.process.feed('{"who": true}\n{"help": true}\n')
            self.chat.until(lambda: len([event for event in self.events if event["type"] == "help"]) > count, "help")
            known = {event["nick"]: event["state"] for event in self.events if event["type"] == "client"}
            return known.get(nick) == state
        self.chat.until(does, f"{nick} to be {state}")

    def closings(self, ref: Any) -> list[Event]:
        """Return the events that end the send with that ``ref``."""
        return [event for event in self.events
                if event.get("ref") == ref and event["type"] in ("received", "saved", "failed")]

    def finish(self) -> int:
        """Close stdin and wait for the end; return the exit code."""
        return self.process.finish()


def without_time(event: Event) -> Event:
    return {name: value for name, value in event.items() if name != "time"}


# --- every event ----------------------------------------------------------------------------------------------

Kinds = set[tuple[str, str | None]]
ALL: Kinds = {(form.type, form.reason) for form in EVENT_FORMATS.values()} | {
    ("message", None), ("client", None), ("help", None)}


def test_the_schema_is_one_and_lets_nothing_in_that_is_not_in_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["additionalProperties"] is False
    assert all(set(case["propertyNames"]["enum"]) <= set(SCHEMA["properties"]) for case in SCHEMA["oneOf"])
    left = {"type": "left", "time": "2026-11-22T08:41:07.250Z", "nick": "alice"}
    assert VALIDATOR.is_valid(left)
    assert not VALIDATOR.is_valid({**left, "text": "more"}) and not VALIDATOR.is_valid({**left, "nick": 1})
    assert not VALIDATOR.is_valid({**left, "type": "gone"}) and not VALIDATOR.is_valid({"type": "table"})


def test_the_schema_and_the_table_of_the_page_have_every_event() -> None:
    lines = section("scripting.md", "The events").split("\n")
    table = "\n".join(line for line in lines if line.startswith("|"))
    for type_, reason in ALL:
        assert f"`{type_}`" in table and (reason is None or f"`{reason}`" in table)
    cases = json.dumps(SCHEMA["oneOf"])
    assert all(f'"{name}"' in cases for pair in ALL for name in pair if name is not None)


def messages(chat: Chat) -> list[Event]:
    """Send directly, by the server, and as mail; return all that the programs say meanwhile."""
    bob = Program(chat, "bob")
    alice = Program(chat, "alice")
    alice.knows("bob")
    alice.send("bob", "hello", 1)
    alice.see("received", ref=1)
    bob.tell(dereg="bob")
    bob.see("left")
    bob.send("alice", "from afar", 9)
    bob.tell(dereg="alice")
    alice.knows("bob", "offline")
    alice.send("bob", "later", 2)
    alice.see("saved", ref=2, via="mail")
    bob.tell(reg="bob")
    bob.see("message", text="later", via="mail")
    bob.tell(reg="bob")
    bob.tell(reg="alice")
    alice.tell(dereg="bob")
    alice.process.feed("send bob\ndance\n{1}\ntalk nobody\n")
    alice.send("nobody", "hello", 3)
    alice.send("bob", "x" * (MAX_TEXT + 1), 4)
    alice.see("failed", reason="too-long", ref=4)
    assert (alice.finish(), bob.finish()) == (1, 0)
    return alice.events + bob.events


def relays(chat: Chat) -> list[Event]:
    """Return what two say that are behind routers which let only the server in."""
    bob = Program(chat, "bob", port=chat.proxy().port)
    alice = Program(chat, "alice", port=chat.proxy().port)
    alice.knows("bob")
    alice.send("bob", "hello", 1)
    sent = alice.see("saved", ref=1, via="relay")
    assert bob.see("message", via="relay")["id"] == sent["id"] == alice.see("exists", ref=1)["id"]
    return alice.events + bob.events


def silence(chat: Chat) -> list[Event]:
    """Let the server stop and go on, and end it; return what alice says."""
    chat.absent("bob")
    alice = Program(chat, "alice")
    chat.processes[0].signal(signal.SIGSTOP)
    alice.send("bob", "one", "first")
    alice.see("server-silent")
    chat.processes[0].signal(signal.SIGCONT)
    alice.see("server-back")
    alice.see("saved", ref="first")
    chat.processes[0].kill()
    alice.send("bob", "two\nlines", "second")
    alice.see("offline", ref="second")
    alice.tell(quit=True)
    assert alice.process.wait() == 1
    assert [json.loads(line) for line in alice.process.errors] == [{"send": "bob", "text": "two\nlines",
                                                                    "ref": "second"}]
    assert [kind(event) for event in alice.events[-4:]] == [
        ("server-silent", None), ("failed", "not-delivered"), ("undelivered", None), ("exiting", None)]
    return alice.events


def limits(chat: Chat) -> list[Event]:
    """Return what clients say to a server that accepts two of them, and keeps one message."""
    chat.server("--max-clients", "2", "--mailbox-limit", "1")
    chat.absent("bob")
    alice = Program(chat, "alice", "--anonymous")
    alice.knows("bob", "offline")
    alice.send("bob", "one", 1)
    alice.send("bob", "two", 2)
    alice.see("failed", reason="full", ref=2)
    carol = Program(chat, "carol")
    again, more = Program(chat, "alice", "--anonymous", ready=False), Program(chat, "dave", ready=False)
    assert (again.process.wait(), more.process.wait()) == (1, 1)
    carol.finish()
    thief = Program(chat, "carol", "--identity", str(chat.directory / "other"), ready=False)
    assert thief.process.wait() == 1
    return alice.events + again.events + more.events + thief.events


def encryption(chat: Chat) -> list[Event]:
    """Return what clients say to servers that encrypt, that do not, and that do not any more."""
    events: list[Event] = []

    def refused(nick: str, option: str) -> None:
        client = Program(chat, nick, "--secure", option, ready=False)
        assert client.process.wait() == 1
        events.extend(client.events)

    server = chat.server("--secure", "off")
    alice = Program(chat, "alice")
    alice.see("insecure")
    refused("bob", "require")
    assert alice.finish() == 0
    server.kill()
    server = chat.restart()
    assert Program(chat, "alice").finish() == 0
    refused("alice", "off")
    server.kill()
    server = chat.restart("--secure", "require")
    refused("zoe", "off")
    carol = Program(chat, "carol")
    server.kill()
    server = chat.restart()
    plain = Program(chat, "dave", "--secure", "off")
    tolerant, strict = Program(chat, "frank"), Program(chat, "erin", "--secure", "require")
    for client in (tolerant, strict):
        client.send("dave", "hello")
    tolerant.see("insecure", to="dave")
    strict.see("failed", reason="not-secure", to="dave")
    assert (plain.finish(), tolerant.finish(), strict.finish()) == (0, 0, 1)
    events += plain.events + tolerant.events + strict.events
    server.kill()
    chat.server(port=chat.port, store=str(chat.directory / "another"))
    carol.tell(dereg="alice")
    carol.send("alice", "hello")
    assert carol.process.wait() == 1
    return events + alice.events + carol.events


def keys_of_others(chat: Chat) -> list[Event]:
    """Return what a client says of the keys of others, of which one changes."""
    server = chat.server()
    bob, alice = Program(chat, "bob"), Program(chat, "alice")
    dave = Program(chat, "dave", "--secure", "off")
    for nick in ("bob", "dave"):
        alice.knows(nick)
    alice.tell(fingerprint=True)
    alice.tell(fingerprint="bob")
    alice.tell(verify="bob")
    alice.see("verified", to="bob")
    alice.tell(who=True)
    alice.see("client", nick="bob", verified=True)
    alice.tell(trust="dave")
    alice.see("error", reason="no-key")
    assert dave.finish() == 0
    alice.see("client-offline", nick="dave")
    alice.tell(who=True)
    assert "seen" in alice.see("client", nick="dave", state="offline")
    for one in (alice, bob):
        assert one.finish() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert chat.complete("server", "--store", str(chat.store), "--forget", "bob").wait() == 0
    chat.restart()
    bob, again = Program(chat, "bob", "--identity", str(chat.directory / "other")), Program(chat, "alice")
    again.knows("bob")
    again.send("bob", "not this")
    again.see("failed", reason="key-changed", to="bob", via="direct")
    again.tell(verify="bob")
    again.see("error", reason="key-changed")
    again.tell(trust="bob")
    digits = again.see("trusted", to="bob")["fingerprint"]
    bob.knows("alice")
    bob.tell(fingerprint="alice")
    assert bob.see("fingerprint", to="alice")["fingerprint"] == digits
    again.send("bob", "but this")
    bob.see("message", text="but this")
    assert (again.finish(), bob.finish()) == (1, 0)
    return alice.events + again.events + bob.events


def comings(chat: Chat) -> list[Event]:
    """Return what a client says of somebody who comes and goes; those who were there before are no news."""
    erin = Program(chat, "erin")
    alice = Program(chat, "alice")
    bob = Program(chat, "bob")
    alice.see("client-online", nick="bob")
    assert bob.finish() == 0
    alice.see("client-offline", nick="bob")
    assert alice.finish() == erin.finish() == 0
    assert [event["nick"] for event in alice.events if event["type"].startswith("client-")] == ["bob", "bob"]
    return alice.events


def by_itself(_: Chat) -> list[Event]:
    """Return the event of a disk that fails, which only the simulated world has."""
    line = JsonFormatter("alice", lambda: 1.5).event("disk", to="bob", id="1:2", ref=None, via="mail", ms=0.5)
    event: Event = json.loads(line)
    assert event == {"type": "failed", "reason": "disk", "time": "1970-01-01T00:00:01.500Z", "to": "bob", "id": "1:2",
                     "via": "mail", "ms": 0.5}
    VALIDATOR.validate(event)
    return [event]


PRODUCED: dict[Any, Kinds] = {
    messages: {("message", None), ("received", None), ("saved", None), ("offline", None), ("registered", None),
               ("left", None), ("table", None), ("mail", None), ("client", None), ("help", None), ("failed", "unknown"),
               ("failed", "too-long"), ("failed", "offline"), ("error", "usage"), ("error", "unknown-command"),
               ("error", "not-a-command"), ("error", "offline"), ("error", "not-yours"),
               ("error", "registered-already"), ("error", "unknown-client")},
    relays: {("no-ack", None), ("exists", None)},
    silence: {("server-silent", None), ("server-back", None), ("failed", "not-delivered"), ("undelivered", None),
              ("exiting", None)},
    limits: {("failed", "full"), ("refused", "full"), ("refused", "taken"), ("refused", "owned")},
    encryption: {("insecure", None), ("refused", "not-secure"), ("refused", "encrypted"), ("refused", "secure"),
                 ("refused", "key-changed"), ("failed", "not-secure")},
    keys_of_others: {("fingerprint", None), ("verified", None), ("trusted", None), ("error", "no-key"),
                     ("error", "key-changed"), ("failed", "key-changed")},
    comings: {("client-online", None), ("client-offline", None)},
    by_itself: {("failed", "disk")},
}


@pytest.mark.parametrize("story", PRODUCED)
def test_every_event_is_as_the_readme_says(chat: Chat, story: Any) -> None:
    seen = {kind(event) for event in story(chat)}
    assert PRODUCED[story] <= seen <= ALL


def test_no_event_is_left_out() -> None:
    assert set().union(*PRODUCED.values()) == ALL


# --- commands -------------------------------------------------------------------------------------------------

TEXTS = ["two\nlines\r\nand\n", 'quotes " and \\ and \'', "".join(map(chr, range(0x20))) + "\x7f\x80\x9f", "😀 e\u0301",
         "", " blanks  ", "\u2028\u2029\u202e\ufeff", "{\"send\": \"bob\"}", "/end", "日本語" * 5000, "\U0010ffff"]


def test_every_text_comes_as_it_went(chat: Chat) -> None:
    bob, alice = Program(chat, "bob"), Program(chat, "alice")
    alice.knows("bob")
    for ref, text in enumerate(TEXTS):
        alice.process.feed(json.dumps({"send": "bob", "text": text, "ref": ref}, ensure_ascii=ref % 2 == 0) + "\n")
    assert alice.finish() == 0
    assert [event["text"] for event in bob.events if event["type"] == "message"] == TEXTS
    raw = bytes(bob.process.out.data + alice.process.out.data)
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", raw), "what could drive a terminal is escaped"


def test_an_id_and_a_ref_tell_which_message_an_event_is_about(chat: Chat) -> None:
    began = time.monotonic()
    bob, alice = Program(chat, "bob"), Program(chat, "alice")
    alice.knows("bob")
    refs = [0, 1, -5, 2.5, "text", "", "😀\n", "\ud800", True, 10 ** 30]
    for number, ref in enumerate(refs):
        alice.send("bob", "long " * 2000 + str(number), ref)
    alice.send("bob", "none")
    assert alice.finish() == 0
    sent = [event for event in alice.events if event["type"] == "received"]
    came = [event for event in bob.events if event["type"] == "message"]
    assert [event.get("ref") for event in sent] == refs + [None] and "ref" not in sent[-1]
    assert [event["id"] for event in sent] == [event["id"] for event in came]
    assert len({event["id"] for event in sent}) == len(refs) + 1
    took = 1000 * (time.monotonic() - began)
    assert all(event["to"] == "bob" and 0 < event["ms"] <= took for event in sent)
    assert {(event["from"], event["to"], event["via"]) for event in came} == {("alice", "bob", "direct")}


WRONG = ['{', '{}', '{"send": "bob"}', '{"text": "hello"}', '{"send": "bob", "text": 7}',
         '{"send": 7, "text": "hello"}', '{"send": "", "text": "hello"}', '{"send": "bob", "text": null}',
         '{"who": false}', '{"who": 1}', '{"quit": "yes"}', '{"dereg": true}', '{"dance": true}',
         '{"send": "bob", "text": "hello"} more', '{"send": "bob", "text": "\x01"}',
         '{"send": "bob", "text": "hello", "ref": [1]}', '{"send": "bob", "text": "hello", "ref": {}}',
         '{"send": "bob", "text": "hello", "ref": NaN}', '{"send": "bob", "text": "hello", "ref": 1e999}',
         '{"send": "bob", "text": "hello", "ref": "%s"}' % ("x" * 257),
         '{"send": "bob", "text": "hello", "ref": %s}' % ("[" * 985 + "]" * 985),
         '{"a": ' * 2000, '{"ref": ' + "1" * 5000 + '}', '{' + " " * 500_000 + '}']


def test_an_object_that_is_no_command_is_an_error_and_the_rest_goes_on(chat: Chat) -> None:
    bob, alice = Program(chat, "bob"), Program(chat, "alice")
    alice.knows("bob")
    before = len(alice.events)
    for line in WRONG:
        alice.process.feed(line + "\n")
    alice.send("bob", "last", "last")
    assert alice.finish() == 1
    told = [kind(event) for event in alice.events[before:] if event["type"] == "error"]
    assert told == [("error", "not-a-command")] * len(WRONG)
    assert alice.closings("last")[0]["type"] == "received"
    assert [event["text"] for event in bob.events if event["type"] == "message"] == ["last"]


def test_an_object_may_be_indented_and_a_wrong_one_is_named_by_its_ref(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed('  {"send": "alice", "text": "hello", "ref": 1}\n{"send": "alice", "text": 5, "ref": 2}\n')
    assert alice.see("received")["ref"] == 1
    assert alice.see("error", reason="not-a-command")["ref"] == 2


def test_an_object_without_a_text_is_told_so(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed('{"send": "bob", "ref": 3}\n{"send": "bob", "text": 3, "ref": 4}\n')
    first = alice.see("error", reason="not-a-command")
    assert first["ref"] == 3 and first["text"] == '[Not a command, text is missing: {"send": "bob", "ref": 3}]'
    assert alice.see("error", ref=4)["text"] == '[Not a command: {"send": "bob", "text": 3, "ref": 4}]'


def test_the_date_may_stand_before_each_line_of_a_file(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.start("alice", "--date")
    alice.feed("send alice hello\n")
    assert alice.finish() == 0
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(stamp, line) for line in alice.lines)
    assert any(re.fullmatch(stamp + "alice: hello", line) for line in alice.lines)
    timed, plain = chat.start("alice", "--time"), chat.start("dora", "--no-time", "--date")
    assert (timed.finish(), plain.finish()) == (0, 0)
    assert re.match(r"\d\d:\d\d:\d\d \[Welcome", timed.lines[0]) and plain.lines[0] == WELCOME


def test_who_talks_to_nobody_is_told_by_an_error(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed("talk nobody\n")
    assert alice.see("error", reason="unknown-client")["nick"] == "nobody"
    assert alice.finish() == 1


def test_a_server_that_was_restarted_is_back(chat: Chat) -> None:
    chat.absent("bob")
    alice = Program(chat, "alice")
    chat.processes[0].kill()
    alice.send("bob", "hello")
    alice.see("server-silent")
    chat.restart()
    alice.see("saved")
    kinds = [event["type"] for event in alice.events]
    assert kinds.count("server-back") == 1 and kinds.index("server-silent") < kinds.index("server-back")


@pytest.mark.parametrize("nick", ["no body", " bob", "bob ", "b\nob", "nobody", "\ud800", "x" * 100, "\x1b[2J"])
def test_a_send_to_nobody_fails_and_says_so(chat: Chat, nick: str) -> None:
    alice = Program(chat, "alice")
    alice.send(nick, "hello\nthere", 1)
    assert alice.finish() == 1
    failed, = alice.closings(1)
    assert (failed["reason"], failed["text"]) == ("unknown", "hello\nthere")
    assert all(event["type"] != "error" for event in alice.events)


def test_half_a_surrogate_becomes_a_replacement_character(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed('{"send": "alice", "text": "a\\ud800b\\udc00\\ud83d\\ude00"}\n')
    assert alice.finish() == 0
    assert alice.see("message")["text"] == "a\ufffdb\ufffd😀"


def test_the_longest_text_may_be_escaped_whole(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed('{"send": "alice", "text": "' + "\\u0041" * MAX_TEXT + '", "ref": 1}\n')
    alice.send("alice", "A" * MAX_TEXT + "A", 2)
    alice.send("alice", "é" * (MAX_TEXT // 2) + "A", 3)
    assert alice.finish() == 1
    assert alice.see("message")["text"] == "A" * MAX_TEXT
    assert [(event["type"], event.get("size")) for ref in (1, 2, 3) for event in alice.closings(ref)] == [
        ("received", None), ("failed", MAX_TEXT + 1), ("failed", MAX_TEXT + 1)]


def test_plain_commands_and_objects_may_be_mixed(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.process.feed('send alice plain\n{"send": "alice", "text": "object"}\nwho\n{"who": true}\nsend alice {}\n')
    assert alice.finish() == 0
    assert [event["text"] for event in alice.events if event["type"] == "message"] == ["plain", "object", "{}"]
    assert len([event for event in alice.events if event["type"] == "client"]) == 2


def test_an_object_is_a_line_like_others_without_json(chat: Chat) -> None:
    alice = chat.client("alice")
    alice.feed('{"who": true}\n')
    alice.see('[Unknown command {"who":, try help.]')


def test_a_command_while_offline_names_the_send(chat: Chat) -> None:
    alice = Program(chat, "alice")
    alice.tell(dereg="alice")
    alice.send("alice", "hello", 5)
    assert alice.see("failed", reason="offline")["ref"] == 5


# --- quiet ----------------------------------------------------------------------------------------------------

def test_quiet_shows_messages_and_what_was_asked_for_only(chat: Chat) -> None:
    alice = chat.start("alice", "--quiet")
    alice.feed("send alice hello\nsend nobody hello\ndance\nwho\n")
    assert alice.finish() == 1
    assert alice.lines[0].startswith("alice  127.0.0.1:") or alice.lines[0] == "alice: hello"
    assert len(alice.lines) == 2 and "alice: hello" in alice.lines
    assert alice.errors == ["[Unknown client nobody.]", "[Unknown command dance, try help.]"]


def test_quiet_shows_only_objects_that_are_messages(chat: Chat) -> None:
    alice = chat.start("alice", "--quiet", "--json")
    alice.feed("send alice hello\nsend nobody hello\n{}\n")
    assert alice.finish() == 1
    assert [event["type"] for event in events_of(alice)] == ["message"]
    assert alice.errors == ["[Unknown client nobody.]", "[Not a command: {}]"]


# --- one message ----------------------------------------------------------------------------------------------

def run_send(chat: Chat, *arguments: str, stdin: str | bytes = "", **environment: str) -> Process:
    """Run ``udpchat send`` as carl until it ends."""
    defaults = {"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"}
    process = chat.run("send", *arguments, environment={**defaults, **environment})
    process.feed(stdin)
    process.finish()
    return process


def no_answer(whose: str) -> str:
    return f"udpchat: the time is over, and no answer from {whose}"


def result(process: Process) -> tuple[int, list[str], list[str]]:
    return process.popen.returncode, process.lines, process.errors


def test_send_says_what_became_of_the_message_and_nothing_else(chat: Chat) -> None:
    bob = chat.client("bob")
    assert result(run_send(chat, "bob", "hello", " there")) == (0, [received("bob")], [])
    bob.see("carl: hello  there")
    assert result(run_send(chat, "bob", "--quiet", "more")) == (0, [], [])
    assert result(run_send(chat, "--quiet", "bob", "and", "--ack-timeout", "500", "more")) == (0, [], [])
    assert result(run_send(chat, "bob", "--quiet", "--", "-x")) == (0, [], [])
    assert result(run_send(chat, "bob", "--quiet", "--", "x", "--")) == (0, [], [])
    bob.see("carl: more", "carl: and more", "carl: -x")
    assert result(run_send(chat, "nobody", "--quiet", "more")) == (1, [], ["[Unknown client nobody.]"])


def test_send_sends_all_of_stdin_as_one_message(chat: Chat) -> None:
    bob = Program(chat, "bob")
    assert result(run_send(chat, "bob", stdin=b"two\n lines \xff\n\n")) == (0, [received("bob")], [])
    assert bob.see("message")["text"] == "two\n lines \ufffd"
    assert result(run_send(chat, "bob")) == (0, [received("bob")], [])
    bob.see("message", text="")
    code, lines, errors = result(run_send(chat, "bob", stdin="x" * (MAX_TEXT + 1)))
    assert (code, lines) == (1, [f"[Message too long: {MAX_TEXT + 1} bytes, at most {MAX_TEXT}.]"])
    assert result(run_send(chat, "bob", "text", stdin="more\n")) == (0, [received("bob")], [])
    bob.see("message", text="text")


def test_send_waits_for_its_text_also_where_stdin_does_not_block(chat: Chat) -> None:
    bob = chat.client("bob")
    ours, its = socket.socketpair()
    with ours, its:
        its.setblocking(False)
        sent = chat.run("send", "bob", stdin=its.fileno(),
                        environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
        for part in (b"in two ", b"parts\n"):
            chat.rest(0.3)
            ours.sendall(part)
        ours.shutdown(socket.SHUT_WR)
        assert sent.wait() == 0
    bob.see("carl: in two parts")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_send_that_is_interrupted_before_it_has_its_text_fails_and_says_so(chat: Chat, open_pipe: tuple[int, int],
                                                                           number: int) -> None:
    read_end, write_end = open_pipe
    sent = chat.run("send", "bob", "--nick", "carl", stdin=read_end)
    os.write(write_end, b"half a text")
    chat.until(lambda: fcntl.ioctl(read_end, termios.FIONREAD, bytes(4)) == bytes(4), "the text to be read")
    sent.signal(number)
    assert sent.wait() == 1
    assert (sent.lines, sent.errors) == ([], ["udpchat: nothing was sent: interrupted"])


def test_send_waits_for_its_text_no_longer_than_its_timeout(chat: Chat, open_pipe: tuple[int, int]) -> None:
    sent = chat.run("send", "bob", "--nick", "carl", "--timeout", "1", stdin=open_pipe[0])
    assert sent.wait() == 1
    assert (sent.lines, sent.errors) == ([], ["udpchat: nothing was sent: the text did not come in time"])


def test_send_that_cannot_read_its_text_fails_and_says_so(chat: Chat) -> None:
    unreadable = os.open(os.devnull, os.O_WRONLY)
    try:
        sent = chat.run("send", "bob", "--nick", "carl", stdin=unreadable)
        assert sent.wait() == 1
        assert (sent.lines, len(sent.errors)) == ([], 1) and "cannot read stdin" in sent.errors[0]
    finally:
        os.close(unreadable)


def test_send_may_go_to_several_each_of_them_once(chat: Chat) -> None:
    bob, dora = chat.clients("bob", "dora")
    chat.absent("erin")
    sent = run_send(chat, "bob,dora,bob,erin", "hello")
    assert sent.popen.returncode == 0
    assert sorted(sent.lines) == sorted([received("bob"), received("dora"), is_offline("erin"), SAVED])
    for process in (bob, dora):
        process.see("carl: hello")
        assert process.lines.count("carl: hello") == 1


def test_blanks_may_stand_beside_the_commas_between_recipients(chat: Chat) -> None:
    bob, dora = chat.clients("bob", "dora")
    sent = run_send(chat, " bob, dora\t", "hello")
    assert sent.popen.returncode == 0 and sorted(sent.lines) == [received("bob"), received("dora")]
    bob.see("carl: hello")
    dora.see("carl: hello")


def test_send_to_several_says_on_stderr_for_whom_the_server_has_saved(chat: Chat) -> None:
    for nick in ("bob", "dora"):
        chat.absent(nick)
    sent = run_send(chat, "bob,dora", "hello")
    assert sent.popen.returncode == 0 and sent.lines.count(SAVED) == 2
    assert sorted(sent.errors) == ["[Saved for bob.]", "[Saved for dora.]"]
    assert result(run_send(chat, "bob,dora", "hello", "--quiet")) == (0, [], [])
    assert not run_send(chat, "bob,dora", "hello", "--json").errors


def test_send_skips_an_empty_text_from_stdin_if_it_is_told_to(chat: Chat) -> None:
    bob = chat.client("bob")
    for nothing in (b"", b"\n", b"\xef\xbb\xbf\r\n"):
        assert result(run_send(chat, "bob", "--skip-empty", stdin=nothing)) == (0, [], [])
    assert result(run_send(chat, "bob", "--skip-empty", stdin="something\n")) == (0, [received("bob")], [])
    assert result(run_send(chat, "bob", "", "--skip-empty")) == (0, [received("bob")], [])
    bob.sync()
    assert [line for line in bob.lines if line.startswith("carl: ")] == ["carl: something", "carl: "]


def test_whoever_is_refused_somebody_elses_nick_is_told_how_to_get_in(chat: Chat) -> None:
    chat.absent("bob")
    sent = run_send(chat, "bob", "hello", "--nick", "bob", "--identity", str(chat.directory / "another"))
    assert sent.popen.returncode == 1
    assert sent.lines == ["[Nickname bob belongs to someone else.]", ONE_LOST, EXITING]
    hint, again = sent.errors
    assert "--nick" in hint and "--identity" in hint and again == "send bob hello"


def test_send_to_nobody_fails_and_to_the_others_it_goes(chat: Chat) -> None:
    bob = chat.client("bob")
    sent = run_send(chat, "nobody,bob", "hello")
    assert result(sent) == (1, ["[Unknown client nobody.]", received("bob")], [])
    bob.see("carl: hello")


def test_send_to_who_is_away_is_kept(chat: Chat) -> None:
    chat.absent("bob")
    assert result(run_send(chat, "bob", "hello")) == (0, [is_offline("bob"), SAVED], [])
    bob = chat.client("bob")
    assert bob.see_match(r"carl: <.*> hello")


@pytest.mark.parametrize("timeout, least", [((), 2.0), (("--timeout", "1"), 0.9)])
def test_send_fails_when_the_server_is_silent(chat: Chat, timeout: Sequence[str], least: float) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        began = time.monotonic()
        sent = run_send(chat, "bob", "hello", *timeout, UDPCHAT_SERVER=f"127.0.0.1:{nobody.getsockname()[1]}")
        took = time.monotonic() - began
    assert took > least
    said = ["[1 message not delivered.]"] if timeout else [NOT_RESPONDING, "[1 message not delivered.]", EXITING]
    why = [no_answer("the server")] if timeout else []
    assert result(sent) == (1, said, [*why, "send bob hello"])


@pytest.mark.parametrize("who", ["bob", "server"])
def test_send_waits_no_longer_than_its_timeout(chat: Chat, who: str) -> None:
    server, bob = chat.server(), chat.client("bob")
    stopped = server if who == "server" else bob
    if who == "server":                  # so that something waits for it
        bob.finish()
        sent = chat.run("send", "bob", "--timeout", "2", "two\nlines",
                        environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
        server.signal(signal.SIGSTOP)
    else:
        bob.signal(signal.SIGSTOP)
        sent = chat.run("send", "bob", "--timeout", "1", *PATIENT, "two\nlines",
                        environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
    assert sent.wait() == 1
    stopped.signal(signal.SIGCONT)
    assert "[1 message not delivered.]" in sent.lines
    assert sent.errors[0] == no_answer("bob" if who == "bob" else "the server")
    assert [json.loads(line) for line in sent.errors[1:]] == [{"send": "bob", "text": "two\nlines"}]


def test_a_text_without_an_end_is_refused_before_it_ends(chat: Chat) -> None:
    chat.absent("bob")
    endless = subprocess.Popen(["yes", "never"], stdout=subprocess.PIPE)
    assert endless.stdout is not None
    sent = chat.run("send", "bob", stdin=endless.stdout.fileno(),
                    environment={"UDPCHAT_SERVER": f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"})
    endless.stdout.close()
    assert sent.wait() == 1 and re.fullmatch(r"\[Message too long: \d{8} bytes, at most 65536\.\]", sent.lines[0])
    assert endless.wait() == -signal.SIGPIPE


# --- what ``udpchat send`` waits for --------------------------------------------------------------------------

CARL_TAKEN, ONE_LOST = "[Nickname carl is taken.]", "[1 message not delivered.]"
# a resolver that has no answer at first, and finds the servers of "later" at 127.0.0.1 when the file ``found`` is there
NOT_NOW = "cannot resolve later now: Temporary failure in name resolution"
PATCHY_NAMES = [sys.executable, "-c", f'''
import os, socket, sys
sys.path[0] = {str(ROOT)!r}
import loop, udpchat
loop.LOOK_UP_PROGRAM = f"""
import os, sys
os.chdir({{os.getcwd()!r}})
if sys.argv[1] == "never":
    print("error {{socket.EAI_NONAME}} Name or service not known")
elif os.path.exists("found"):
    print("127.0.0.1")
else:
    open("asked", "w").close()
    print("error {{socket.EAI_AGAIN}} Temporary failure in name resolution")
"""
sys.exit(udpchat.main())
''']


def job(chat: Chat, *arguments: str, server: str = "", command: Sequence[str] = PROGRAM) -> Process:
    """Start ``udpchat send`` as carl."""
    environment = {"UDPCHAT_SERVER": server or f"127.0.0.1:{chat.port}", "UDPCHAT_NICK": "carl"}
    return chat.run("send", *arguments, stdin=subprocess.DEVNULL, environment=environment, command=command)


def result_of(process: Process) -> tuple[int, list[str], list[str]]:
    process.wait()
    return result(process)


def wait_for_log(chat: Chat, process: Process, text: str) -> None:
    chat.until(lambda: text.encode() in process.err.data, f"{text!r} in the log")


@pytest.mark.parametrize("jobs", [5, 10])
def test_jobs_that_start_at_the_same_minute_with_one_nick_all_deliver(chat: Chat, jobs: int) -> None:
    bob = chat.client("bob")
    sent = [job(chat, "bob", f"number {number}") for number in range(jobs)]
    assert [process.wait() for process in sent] == [0] * jobs
    assert [process.lines for process in sent] == [[received("bob")]] * jobs
    assert not any(process.errors for process in sent)
    assert bob.finish() == 0
    assert sorted(line for line in bob.lines if line.startswith("carl: ")) == sorted(
        f"carl: number {number}" for number in range(jobs))


def test_jobs_with_a_nick_that_nobody_had_before_all_deliver(chat: Chat) -> None:
    chat.absent("bob")
    sent = [job(chat, "bob", "hello", "--identity", str(chat.directory / "new")) for _ in range(4)]
    assert [process.wait() for process in sent] == [0] * 4
    assert [process.lines for process in sent] == [[is_offline("bob"), SAVED]] * 4


def without_sockets(chat: Chat) -> None:
    """Give the state directory a path that is too long for a socket: jobs must register."""
    chat.state = chat.directory / ("x" * 100)
    chat.environment["XDG_STATE_HOME"] = str(chat.state)


@pytest.mark.parametrize("timeout", [(), ("--timeout", "60")])
def test_a_job_whose_nick_is_in_use_gets_in_when_that_client_has_left(chat: Chat, timeout: Sequence[str]) -> None:
    without_sockets(chat)
    chat.absent("bob")
    carl = chat.client("carl")
    sent = job(chat, "bob", "hello", "--log-level", "info", *timeout)
    wait_for_log(chat, sent, "refuses carl: taken")
    chat.rest(1)
    assert not sent.lines and sent.popen.poll() is None
    assert carl.finish() == 0
    assert sent.wait() == 0 and sent.lines == [is_offline("bob"), SAVED]


def test_a_job_whose_nick_stays_in_use_gives_up_when_its_time_is_over(chat: Chat) -> None:
    without_sockets(chat)
    carl = chat.client("carl")
    began = time.monotonic()
    sent, told = job(chat, "carl", "hello", "--timeout", "3"), job(chat, "carl", "hello", "--timeout", "3", "--json")
    quiet = job(chat, "carl", "hello", "--timeout", "3", "--quiet")
    assert (sent.wait(), told.wait(), quiet.wait()) == (1, 1, 1)
    assert time.monotonic() - began >= 3
    assert result(sent)[1:] == ([CARL_TAKEN, ONE_LOST, EXITING], ["send carl hello"])
    assert [kind(event) for event in events_of(told)] == [
        ("refused", "taken"), ("failed", "not-delivered"), ("undelivered", None), ("exiting", None)]
    assert result(quiet)[1:] == ([], [CARL_TAKEN, "send carl hello", ONE_LOST])
    assert carl.finish() == 0


def test_a_job_without_a_time_limit_waits_ten_seconds_for_its_nick_and_an_anonymous_one_does_not(chat: Chat) -> None:
    without_sockets(chat)
    carl, eve = chat.client("carl"), chat.client("eve", "--anonymous")
    began = time.monotonic()
    sent = job(chat, "carl", "hello")
    hasty = job(chat, "carl", "hello", "--anonymous", "--nick", "eve")
    assert result_of(hasty) == (1, ["[Nickname eve is taken.]", ONE_LOST, EXITING], ["send carl hello"])
    assert sent.wait() == 1 and sent.lines == [CARL_TAKEN, ONE_LOST, EXITING]
    assert time.monotonic() - began >= 9.5
    assert (carl.finish(), eve.finish()) == (0, 0)


def test_a_job_waits_for_a_server_that_is_not_up_yet(chat: Chat) -> None:
    chat.absent("bob")
    chat.processes[0].signal(signal.SIGTERM)
    chat.processes[0].wait()
    sent, hasty = job(chat, "bob", "hello", "--timeout", "60"), job(chat, "bob", "hello")
    assert hasty.wait() == 1 and hasty.lines == [NOT_RESPONDING, ONE_LOST, EXITING]
    assert not sent.lines and sent.popen.poll() is None
    chat.restart()
    assert sent.wait() == 0 and sent.lines == [is_offline("bob"), SAVED]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_job_outlives_a_restart_of_the_server_and_says_nothing_of_it(chat: Chat, options: Sequence[str]) -> None:
    server = chat.server("--log-level", "info")
    bob = chat.client("bob")
    bob.signal(signal.SIGSTOP)
    sent = job(chat, "bob", "hello", "--timeout", "600", "--log-level", "info", *options)
    wait_for_log(chat, server, "carl registered")
    server.kill()
    server.wait()
    wait_for_log(chat, sent, "the server does not respond: trying again")
    chat.restart()
    bob.signal(signal.SIGCONT)
    assert sent.wait() == 0
    if options:
        assert not {"server-silent", "server-back"} & {event["type"] for event in events_of(sent)}
    else:
        assert NOT_RESPONDING not in sent.lines
    chat.until(lambda: any(line.endswith(" hello") for line in bob.lines), "the message, or the mail")
    assert bob.finish() == 0
    assert sum(line.endswith(" hello") for line in bob.lines) == 1


def test_a_job_gives_up_a_silent_server_when_its_time_is_over(chat: Chat) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        began = time.monotonic()
        sent = job(chat, "bob", "hello", "--timeout", "5", server=f"127.0.0.1:{nobody.getsockname()[1]}")
        assert sent.wait() == 1
        assert time.monotonic() - began >= 4.9
    assert result(sent)[1:] == ([NOT_RESPONDING, ONE_LOST, EXITING], ["send bob hello"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["nick", "silence"])
def test_a_signal_ends_a_job_that_waits_and_its_message_is_handed_back(chat: Chat, number: int, what: str) -> None:
    without_sockets(chat)
    chat.absent("carl")
    if what == "nick":
        chat.client("carl")
    else:
        chat.processes[0].kill()
    sent = job(chat, "bob", "hello", "--timeout", "600", "--log-level", "info")
    wait_for_log(chat, sent, "refuses carl: taken" if what == "nick" else "the server does not respond")
    sent.signal(number)
    assert sent.wait() == 1
    assert sent.lines == [ONE_LOST] and "send bob hello" in sent.errors


def test_a_job_waits_for_a_name_that_cannot_be_looked_up_just_now(chat: Chat) -> None:
    chat.absent("bob")
    server = f"later:{chat.port}"
    sent, hasty = (job(chat, "bob", "hello", *timeout, server=server, command=PATCHY_NAMES)
                   for timeout in (("--timeout", "60"), ()))
    assert result_of(hasty) == (2, [], [f"udpchat: {NOT_NOW}"])
    chat.until((chat.directory / "asked").exists, "a look-up")
    assert sent.popen.poll() is None
    (chat.directory / "found").touch()
    assert result_of(sent) == (0, [is_offline("bob"), SAVED], [])


HANGING_NAMES = [sys.executable, "-c", f"""
import sys
sys.path[0] = {str(ROOT)!r}
import loop, udpchat
loop.LOOK_UP_PROGRAM = "import time; open({{!r}}, 'w').close(); time.sleep(90)".format(sys.argv.pop())
sys.exit(udpchat.main())
"""]


def test_a_name_that_is_looked_up_for_ever_keeps_nobody_from_ending(chat: Chat) -> None:
    begun = chat.directory / "begun"
    late = job(chat, "bob", "hello", "--timeout", "1", str(begun), server="slow", command=HANGING_NAMES)
    assert result_of(late) == (1, [], ["udpchat: nothing was sent: cannot resolve slow now: no answer"])
    begun.unlink()
    interrupted = job(chat, "bob", "hello", "--timeout", "600", str(begun), server="slow", command=HANGING_NAMES)
    chat.until(begun.exists, "a look-up")
    interrupted.signal(signal.SIGTERM)
    assert result_of(interrupted) == (1, [], ["udpchat: nothing was sent: interrupted"])


def test_a_job_gives_up_a_name_that_does_not_exist_at_once_and_one_without_an_answer_in_time(chat: Chat) -> None:
    never = job(chat, "bob", "hello", "--timeout", "600", server="never", command=PATCHY_NAMES)
    assert result_of(never) == (2, [], ["udpchat: cannot resolve never"])
    later = job(chat, "bob", "hello", "--timeout", "2", server="later", command=PATCHY_NAMES)
    assert result_of(later) == (1, [], [f"udpchat: nothing was sent: {NOT_NOW}"])
    interrupted = job(chat, "bob", "hello", "--timeout", "600", server="later", command=PATCHY_NAMES)
    (chat.directory / "asked").unlink()
    chat.until((chat.directory / "asked").exists, "a look-up")
    interrupted.signal(signal.SIGINT)
    assert result_of(interrupted) == (1, [], ["udpchat: nothing was sent: interrupted"])


def test_arguments_win_over_the_environment(chat: Chat) -> None:
    bob = chat.client("bob")
    sent = run_send(chat, "bob", "hello", "--nick", "dora", "--server", f"localhost:{chat.port}",
                    UDPCHAT_SERVER="192.0.2.1:9")
    assert result(sent) == (0, [received("bob")], [])
    bob.see("dora: hello")
    erin = chat.run("client", "erin", "127.0.0.1", str(chat.port),
                    environment={"UDPCHAT_NICK": "carl", "UDPCHAT_SERVER": "192.0.2.1:9"})
    erin.see(WELCOME)
    bob.wait_for("erin")


def test_a_client_finds_its_nick_and_its_server_in_the_environment(chat: Chat) -> None:
    bob = chat.client("bob")
    environment = {"UDPCHAT_NICK": "carl", "UDPCHAT_SERVER": f"127.0.0.1:{chat.port}"}
    chat.run("client", environment=environment).see(WELCOME)
    bob.wait_for("carl")
    assert result(run_send(chat, "bob", "hello", UDPCHAT_NICK="", LOGNAME="dora")) == (0, [received("bob")], [])
    bob.see("dora: hello")


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_a_server_may_be_named_by_its_ipv6_address(chat: Chat) -> None:
    chat.server(host="::1")
    bob = chat.client("bob", host="::1")
    assert result(run_send(chat, "bob", "one", UDPCHAT_SERVER=f"[::1]:{chat.port}")) == (0, [received("bob")], [])
    assert result(run_send(chat, "bob", "two", "--server", f"[::1]:{chat.port}")) == (0, [received("bob")], [])
    bob.see("carl: one", "carl: two")


WRONG_SENDS: list[tuple[list[str], dict[str, str]]] = [
    ([], {}), (["two words", "hello"], {}), (["bob,", "hello"], {}), ([",", "hello"], {}), (["a/b", "hello"], {}),
    (["bob", "hello", "--server", "127.0.0.1:0"], {}), (["bob", "hello", "--server", "127.0.0.1:x"], {}),
    (["bob", "hello", "--server", "127.0.0.1:"], {}), (["bob", "hello", "--server", "[::1"], {}),
    (["bob", "hello", "--server", "no..host"], {}), (["bob", "hello", "--server", "[::1]:99999"], {}),
    (["bob", "hello", "--timeout", "0"], {}), (["bob", "hello", "--timeout", "soon"], {}),
    (["bob", "hello", "--nick", "two words"], {}), (["bob", "hello", "--stay"], {}), (["bob", "hello", "--bogus"], {}),
    (["bob", "hello"], {"UDPCHAT_NICK": "two words"}), (["bob", "hello"], {"UDPCHAT_SERVER": "127.0.0.1:x"}),
]


@pytest.mark.parametrize("arguments, environment", WRONG_SENDS, ids=repr)
def test_send_with_wrong_arguments_is_one_line_on_stderr(chat: Chat, arguments: list[str],
                                                         environment: dict[str, str]) -> None:
    sent = chat.complete("send", *arguments, environment={"UDPCHAT_NICK": "carl", **environment})
    assert sent.popen.returncode == 2 and not sent.out.data
    assert len(sent.errors) == 1 and sent.err.data.endswith(b"\n")


def test_send_can_say_it_in_json(chat: Chat) -> None:
    bob = Program(chat, "bob")
    sent = run_send(chat, "bob", "--json", stdin="two\nlines\n")
    event, = events_of(sent)
    assert sent.popen.returncode == 0 and event["type"] == "received"
    assert bob.see("message", text="two\nlines")["id"] == event["id"]
    assert not {"registered", "table", "left"} & {EVENT_FORMATS[name].type for name in set(EVENT_FORMATS) - ROUTINE}


# --- what stays as it was -------------------------------------------------------------------------------------

def test_without_options_a_script_reads_what_it_always_read(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.start("alice")
    alice.feed("send alice hello\nsend bob hello\nsend nobody hello\ntwo words\nsend bob\ndereg bob\nreg alice\n")
    assert alice.finish() == 1
    lines = alice.events
    assert lines[0] == WELCOME and lines[-1] == OFFLINE
    assert sorted(lines[1:-1]) == sorted([
        "alice: hello", received("alice"), is_offline("bob"), SAVED, "[Unknown client nobody.]",
        "[Unknown command two, try help.]", "[Usage: send NICK MESSAGE]", "[You can only deregister yourself.]",
        "[You are registered already.]"])
    assert b"\x1b" not in alice.out.data and not alice.err.data


def test_scripts_are_not_told_that_the_server_is_back(chat: Chat) -> None:
    chat.absent("bob")
    alice = chat.client("alice")
    alice.sync()
    chat.processes[0].signal(signal.SIGSTOP)
    alice.feed("send bob hello\n")
    alice.see(NOT_RESPONDING)
    chat.processes[0].signal(signal.SIGCONT)
    alice.see(SAVED)
    assert [line for line in alice.lines if line != UPDATED][2:] == [is_offline("bob"), NOT_RESPONDING, SAVED]


# --- the bots of the manual -----------------------------------------------------------------------------------

def install(chat: Chat) -> dict[str, str]:
    """Return the environment of somebody who has installed the program."""
    program = chat.directory / "bin" / "udpchat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{chat.environment['PATH']}", "UDPCHAT_SERVER": f"127.0.0.1:{chat.port}"}


def start_echo(chat: Chat) -> Process:
    code = block("scripting.md", "A bot", "python")
    assert len(code.strip().split("\n")) <= 10
    return chat.run("-c", code, command=[sys.executable], environment=install(chat))


def test_the_echo_of_the_manual_says_it_again_and_leaves_in_order(chat: Chat) -> None:
    bot = start_echo(chat)
    alice = Program(chat, "alice")
    alice.knows("echo")
    for text in ("hello", "two\nlines", "\x1b[2J 😀"):
        alice.send("echo", text)
        assert alice.see("message", text=text)["from"] == "echo"
    bot.kill()
    alice.knows("echo", "offline")


def test_the_echo_of_the_manual_withstands_a_flood(chat: Chat) -> None:
    start_echo(chat)
    alice = chat.client("alice")
    alice.wait_for("echo")
    texts = [f"{number:0100}" for number in range(10_000)]
    alice.feed(sends("echo", texts))
    chat.until(lambda: alice.out.data.count(b"echo: ") == len(texts), "all to come back")
    assert [line[6:] for line in alice.lines if line.startswith("echo: ")] == texts


def test_the_clock_of_the_manual_tells_the_time_also_to_those_who_asked_while_it_was_away(chat: Chat) -> None:
    chat.absent("clock")
    alice = chat.client("alice")
    alice.feed("send clock what else?\nsend clock time?\n")
    alice.see(SAVED, SAVED)
    bot = chat.run("-c", block("scripting.md", "A bot", "sh"), command=["sh"], environment=install(chat))
    alice.see_match(r"clock: (<.*> )?it is \d\d:\d\d")
    alice.wait_for("clock")
    alice.feed("send clock time?\nsend clock what else?\nsend clock time?\n")
    for _ in range(2):
        alice.see_match(r"clock: it is \d\d:\d\d")
    bot.feed("")
    (chat.directory / "answers").write_text("quit\n")
    assert bot.wait() == 0


@pytest.mark.parametrize("restart", ["at once", "when there is room again"])
def test_the_collector_of_the_manual_keeps_every_message_on_a_full_disk(chat: Chat, restart: str) -> None:
    """What it writes is what the other script of the page reads, whatever the disk has accepted in between."""
    collect, take_out = blocks("scripting.md", "Collect messages", "sh")
    environment, inbox = {**install(chat), **NO_BYTECODE}, chat.directory / "inbox.jsonl"

    def collector(limit: str) -> Process:
        """Start it on a disk that has room for a file of so many blocks."""
        return chat.run("-c", f"ulimit -f {limit}\nexec {collect.strip()}", command=["sh"], environment=environment)
    texts = [f"text {number} {'x' * (number * 37 % 200)} ä" for number in range(300)]
    bot, bob = collector("16"), chat.client("bob")
    bob.wait_for("archive")
    bob.feed(sends("archive", texts))
    assert bot.wait() == 1
    assert bot.errors == ["udpchat: cannot write to stdout: File too large"]
    for _ in range(3 if restart == "at once" else 0):
        bot = collector("16")
        assert bot.wait() == 1 and len(bot.errors) == 1
    assert bob.finish() == 0
    bot = collector("unlimited")
    chat.until(lambda: texts[-1] in inbox.read_text(), "all to be collected")
    bot.signal(signal.SIGTERM)
    assert bot.wait() == 0
    assert chat.run("-c", take_out, command=["sh"]).wait() == 0
    shown = (chat.directory / "bob.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == texts


@pytest.mark.parametrize("text, expected", [
    ("", ""), ("\n", ""), ("a\n", "a"), ("a\r\n\n\r\n", "a"), ("a\r", "a\r"), ("a\r\r\n", "a\r"),
    ("\n" * 70_000 + "a", "\n" * 70_000 + "a"), ("a" + "\r\n" * 70_000, "a")], ids=lambda text: repr(text[:8]))
def test_the_line_ends_at_the_end_of_a_text_are_left_out_however_many_there_are(text: str, expected: str) -> None:
    assert without_line_ends(text) == expected
