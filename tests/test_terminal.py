"""Commands that come in as lines: those that are too long."""
from __future__ import annotations

import json

import pytest

from loop import READ_SIZE
from terminal import CommandReader


@pytest.mark.parametrize("cut", [1000, 50_000, 60_000, READ_SIZE])
@pytest.mark.parametrize("reads_json, line, size", [
    (True, json.dumps({"bob": "send", "text": "x" * 430_000, "ref": 7}), 0),
    (True, "send bob " + "x" * 430_000, 430_000), (False, "send bob " + "x" * 70_000, 70_000)])
def test_a_line_that_is_too_long_means_the_same_however_it_is_cut(reads_json: bool, line: str, size: int,
                                                                  cut: int) -> None:
    commands = CommandReader(reads_json)
    data = f"send bob before\n{line}\nsend bob behind\n".encode()
    for start in range(0, len(data), cut):
        commands.feed(data[start:start + cut])
    found = []
    while commands.waiting:
        found.append(commands.next_command())
    texts = [found[0], found[-1]]
    assert [command.send.texts for command in texts if command.send] == [["before"], ["behind"]]
    long, = found[1:-1]
    assert long.send.size == size if long.send else long.invalid and not size


@pytest.mark.parametrize("line, words", [
    ("/", [""]), ("/ \t ", [""]), ("/\u00a0", ["\u00a0"]), ("/who\u00a0", ["who\u00a0"]), ("/\v", ["\v"]),
    ("/ who\tall ", ["who", "all"]), ("", [])])
def test_only_blanks_and_tabs_part_words_and_a_slash_alone_is_a_command(line: str, words: list[str]) -> None:
    commands = CommandReader()
    commands.talk = "bob"
    commands.feed(f"{line}\n".encode())
    command = commands.next_command()
    assert list(command.words) == words and command.send is None
    commands.talk = ""
    commands.feed(f"{line[1:]}\n".encode())
    assert list(commands.next_command().words) == [word for word in words if word]


@pytest.mark.parametrize("line", [
    '{"send": "bob", "ref": "a", "text": "' + "x" * 400_000 + '"}',
    '{"send": "bob", "text": 5' + "0" * 400_000 + "}",
    "{" * 400_000, '{"ref": "' + "x" * 400_000, '{"x": "' + "y" * 400_000 + '", "ref": 12}'])
def test_an_object_that_is_too_long_means_nothing(line: str) -> None:
    commands = CommandReader(True)
    commands.feed(line.encode())
    commands.feed(b"\n")
    command = commands.next_command()
    assert command.invalid and command.send is None and command.ref is None
