"""The line editor: what somebody types and sees. ``pyte`` is the terminal, and its screen is what is asserted."""
from __future__ import annotations

import fcntl
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from editor import (DEFAULT_SIZE, EDIT_LIMIT, HISTORY_FILE_LINES, HISTORY_LINES, HISTORY_LINE_LIMIT, NAME_COLORS,
                    PASTE_LIMIT, SEQUENCE_LIMIT, Action, ActionKind, Editor, History, Key, KeyDecoder, Screen, Style,
                    Tty, char_width, cut, text_width, wants_color)
from terminal import BLOCK_PREFIX, COMMAND_MARK

ROOT = Path(__file__).resolve().parent.parent
ACUTE = "\u0301"                 # a combining accent: no column of its own
FAMILY = "👩\u200d👧"            # two people, joined
EMOJI = {                        # emoji of several characters, of whose widths terminals have different opinions
    "family": "👨\u200d👩\u200d👧\u200d👦", "astronaut": "👩🏽\u200d🚀", "rainbow flag": "🏳\ufe0f\u200d🌈",
    "pirate flag": "🏴\u200d☠\ufe0f", "skin tone": "👍🏽", "flag": "🇩🇪", "keycap": "1\ufe0f\u20e3",
    "emoji selector": "❤\ufe0f",
}
BELL = Action(ActionKind.BELL)


def pasted(text: str) -> bytes:
    """Return what a terminal sends when ``text`` is pasted."""
    return b"\x1b[200~" + text.encode() + b"\x1b[201~"


# --- widths and colours ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("c, width", [
    ("a", 1), (" ", 1), ("é", 1), ("±", 1), ("界", 2), ("😀", 2), ("Ａ", 2), ("ｱ", 1), ("한", 2), (ACUTE, 0),
    ("\u200d", 0), ("\ufe0f", 0), ("\u200b", 0), ("\u20dd", 0), ("\u1161", 0), ("\xad", 1)])
def test_a_character_takes_no_one_or_two_columns(c: str, width: int) -> None:
    assert char_width(c) == width


def test_the_width_of_a_text_is_the_sum_of_those_of_its_characters() -> None:
    assert text_width("") == 0
    assert text_width("plain") == 5
    assert text_width("e" + ACUTE + "界!") == 4


def test_a_name_has_the_same_colour_in_every_process() -> None:
    assert Style(True).name("alice") == "\x1b[38;5;31malice\x1b[39m"
    assert Style(True).name("bob") == "\x1b[38;5;29mbob\x1b[39m"


def luminance(color: int) -> float:
    """Return the relative luminance (WCAG 2) of one of xterm's 256 colours, from its cube."""
    levels = 0, 95, 135, 175, 215, 255
    parts = [levels[(color - 16) // step % 6] / 255 for step in (36, 6, 1)]
    red, green, blue = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_colours_of_names_can_be_read_on_black_and_on_white() -> None:
    assert len(set(NAME_COLORS)) == 10
    for color in NAME_COLORS:
        assert (luminance(color) + 0.05) / 0.05 > 3 and 1.05 / (luminance(color) + 0.05) > 3


def test_a_style_can_be_nested_and_ends_where_its_text_ends() -> None:
    style = Style(True)
    assert style.dim("a " + style.error("b") + " c") == "\x1b[2ma \x1b[31mb\x1b[39m c\x1b[22m"
    assert style.error("") == ""


def test_without_colours_a_text_stays_as_it_is() -> None:
    style = Style(False)
    assert [style.name("bob"), style.dim("a"), style.error("b")] == ["bob", "a", "b"]


@pytest.mark.parametrize("when, is_terminal, environment, wanted", [
    ("always", False, {"NO_COLOR": "1", "TERM": "dumb"}, True), ("never", True, {"TERM": "xterm"}, False),
    ("auto", True, {"TERM": "xterm"}, True), ("auto", True, {}, True), ("auto", False, {"TERM": "xterm"}, False),
    ("auto", True, {"TERM": "dumb"}, False), ("auto", True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
    ("auto", True, {"TERM": "xterm", "NO_COLOR": ""}, True)])
def test_auto_uses_colours_on_terminals_that_have_them_unless_the_user_wants_none(
        when: str, is_terminal: bool, environment: dict[str, str], wanted: bool) -> None:
    assert wants_color(when, is_terminal, environment) is wanted


# --- keys -----------------------------------------------------------------------------------------------------

KEYS = {
    "left": (b"\x1b[D", b"\x1bOD", b"\x02"), "right": (b"\x1b[C", b"\x1bOC", b"\x06"),
    "up": (b"\x1b[A", b"\x1bOA", b"\x10"), "down": (b"\x1b[B", b"\x1bOB", b"\x0e"),
    "home": (b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"\x1b[7~", b"\x01"),
    "end": (b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"\x1b[8~", b"\x05"),
    "word-left": (b"\x1b[1;5D", b"\x1b[1;3D", b"\x1b[5D", b"\x1bOd", b"\x1bb"),
    "word-right": (b"\x1b[1;5C", b"\x1b[1;3C", b"\x1b[5C", b"\x1bOc", b"\x1bf"),
    "backspace": (b"\x7f", b"\x08"), "delete": (b"\x1b[3~",), "kill-end": (b"\x0b",), "kill-start": (b"\x15",),
    "kill-word": (b"\x17",), "kill-last-word": (b"\x1b\x7f", b"\x1b\x08"),
    "kill-next-word": (b"\x1bd", b"\x1b[3;5~"), "yank": (b"\x19",), "clear": (b"\x0c",), "tab": (b"\t",),
    "back-tab": (b"\x1b[Z",), "enter": (b"\r", b"\n", b"\x1bOM"), "interrupt": (b"\x03",),
    "end-of-input": (b"\x04",), "suspend": (b"\x1a",),
}
PRESS = {name: variants[0] for name, variants in KEYS.items()}


@pytest.mark.parametrize("name, data", [(name, data) for name, variants in KEYS.items() for data in variants])
def test_a_key_is_recognized_in_all_its_variants_wherever_it_is_cut(name: str, data: bytes) -> None:
    assert KeyDecoder().feed(b"a" + data + b"b") == [Key("text", "a"), Key(name), Key("text", "b")]
    keys = KeyDecoder()
    assert [key for number in range(len(data)) for key in keys.feed(data[number:number + 1])] == [Key(name)]


def test_a_run_of_printable_characters_is_one_key() -> None:
    assert KeyDecoder().feed("send bob grüße 界".encode() * 1000) == [Key("text", "send bob grüße 界" * 1000)]


def test_a_character_that_comes_in_pieces_is_whole() -> None:
    keys = KeyDecoder()
    assert [keys.feed(bytes([byte])) for byte in "é😀".encode()] == [
        [], [Key("text", "é")], [], [], [], [Key("text", "😀")]]


def test_bytes_that_are_not_utf_8_become_replacement_characters() -> None:
    assert KeyDecoder().feed(b"a\xffb\xc3(") == [Key("text", "a\ufffdb\ufffd(")]


@pytest.mark.parametrize("data", [
    b"\x1b[5~", b"\x1b[24;2~", b"\x1b[?1;2c", b"\x1b[I", b"\x1b[[A", b"\x1bOP", b"\x1bx", "\x1bé".encode(), b"\x00",
    b"\x0f", b"\x1b[201~", "\u0085".encode(), b"\x1b[<0;1;1M"])
def test_an_unknown_sequence_is_ignored_as_a_whole(data: bytes) -> None:
    keys = KeyDecoder()
    assert keys.feed(data) == []
    assert keys.feed(b"a") == [Key("text", "a")]


def test_an_escape_by_itself_does_not_swallow_a_control_key() -> None:
    assert KeyDecoder().feed(b"\x1b\x03") == [Key("interrupt")]
    assert KeyDecoder().feed(b"\x1b\x1b[A") == [Key("up")]
    assert KeyDecoder().feed(b"\x1b[1;\x03") == [Key("interrupt")]


def test_a_sequence_that_does_not_end_is_dropped() -> None:
    keys = KeyDecoder()
    assert keys.feed(b"\x1b[" + b"1" * SEQUENCE_LIMIT) == []
    assert keys.feed(b"23a") == [Key("text", "23a")]


def test_a_paste_is_one_key_wherever_it_is_cut() -> None:
    data = b"x" + pasted("line é 1\r\n\x1b[A\x03[20\x1b[201") + b"\r"
    wanted = [Key("text", "x"), Key("paste", "line é 1\r\n\x1b[A\x03[20\x1b[201"), Key("enter")]
    for cut_at in range(len(data) + 1):
        keys = KeyDecoder()
        assert keys.feed(data[:cut_at]) + keys.feed(data[cut_at:]) == wanted
    keys = KeyDecoder()
    assert [key for byte in data for key in keys.feed(bytes([byte]))] == wanted


def test_the_rest_of_a_paste_that_is_too_long_is_dropped_and_reported() -> None:
    keys = KeyDecoder()
    assert keys.feed(b"\x1b[200~" + b"a" * PASTE_LIMIT) == []
    assert keys.feed(b"b" * PASTE_LIMIT) == []
    assert keys.feed(b"\x1b[201~c") == [Key("paste", "a" * PASTE_LIMIT), Key("paste-too-long"), Key("text", "c")]
    assert keys.feed(pasted("d")) == [Key("paste", "d")]


# --- history --------------------------------------------------------------------------------------------------

@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history"


def all_lines(history: History) -> list[str]:
    """Return the lines, the newest first."""
    lines = [history.previous("")]
    while history.previous(lines[-1]) != lines[-1]:
        history.next()
        lines.append(history.previous(lines[-1]))
    history.stop_browsing()
    return [line for line in lines if line]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_browsing_goes_up_and_down_and_returns_to_what_was_half_typed() -> None:
    history = History(None)
    history.add("one", "two")
    assert history.previous("half") == "two"
    assert history.previous("two") == "one"
    assert history.previous("one, changed") == "one, changed"
    assert history.next() == "two"
    assert history.browsing
    assert history.next() == "half"
    assert not history.browsing
    assert history.next() == "half"


def test_an_empty_history_has_nothing_to_browse() -> None:
    assert History(None).previous("half") == "half"


def test_blank_repeated_and_huge_lines_are_not_kept() -> None:
    history = History(None)
    history.add("a", "a", "", "  ", "x" * (HISTORY_LINE_LIMIT + 1), "b", "a")
    assert all_lines(history) == ["a", "b", "a"]


def test_a_line_is_in_the_file_at_once_and_only_for_its_owner(path: Path) -> None:
    history = History(str(path))
    assert not path.parent.exists()
    history.add("grüße")
    assert path.read_text("utf-8") == "grüße\n"
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    history.add("two")
    assert all_lines(History(str(path))) == ["two", "grüße"]


def test_control_characters_do_not_get_into_the_file(path: Path) -> None:
    history = History(str(path))
    history.add("a\tb\x1b[2J\x9b\nc\ud800", "\x01")
    assert path.read_bytes() == b"a b[2Jc?\n"


def test_several_processes_share_a_file(path: Path) -> None:
    first, second = History(str(path)), History(str(path))
    first.add("one")
    second.add("two")
    first.add("three")
    assert all_lines(first) == ["three", "one"]
    assert all_lines(History(str(path))) == ["three", "two", "one"]


def test_a_file_that_is_too_long_is_shortened_when_it_is_loaded(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("".join(f"{number}\n" for number in range(HISTORY_LINES + 5)))
    os.chmod(path, 0o644)
    assert len(all_lines(History(str(path)))) == HISTORY_LINES
    assert path.read_text().split()[0] == "5"
    assert mode(path) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_only_the_end_of_a_file_that_is_far_too_large_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editor.HISTORY_READ", 10)
    path.parent.mkdir()
    path.write_text("first\nsecond\nthird\nlast\n")
    assert all_lines(History(str(path))) == ["last"]
    assert path.read_text() == "last\n"


def test_a_file_that_grows_too_long_is_shortened_and_keeps_the_lines_of_other_processes(path: Path) -> None:
    history, other = History(str(path)), History(str(path))
    history.add(*(f"mine {number}" for number in range(HISTORY_LINES)))
    history.add(*(f"more {number}" for number in range(HISTORY_FILE_LINES - HISTORY_LINES)))
    other.add("not mine")
    assert len(path.read_text().splitlines()) == HISTORY_FILE_LINES + 1
    history.add("the last")
    lines = path.read_text().splitlines()
    assert len(lines) == HISTORY_LINES
    assert lines[-2:] == ["not mine", "the last"]


def test_only_as_many_lines_as_are_kept_are_written_at_once(path: Path) -> None:
    History(str(path)).add(*map(str, range(HISTORY_LINES + 5)))
    assert path.read_text().split() == [str(number) for number in range(5, HISTORY_LINES + 5)]


def test_damaged_lines_in_a_file_are_skipped_and_a_new_line_does_not_join_a_torn_one(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"good\n\xff\xfe\n\x1b[2J\n\n" + b"x" * (HISTORY_LINE_LIMIT + 1) + b"\nalso good\ntorn")
    history = History(str(path))
    assert all_lines(history) == ["torn", "also good", "good"]
    history.add("new")
    history.add("newer")
    assert all_lines(History(str(path))) == ["newer", "new", "torn", "also good", "good"]


def test_a_file_is_not_shortened_because_of_damaged_lines(path: Path) -> None:
    path.parent.mkdir()
    data = b"good\n\xff\n" * (HISTORY_LINES // 2 - 1) + b"torn"
    path.write_bytes(data)
    History(str(path))
    assert path.read_bytes() == data


def test_a_link_to_the_file_stays_a_link(path: Path) -> None:
    path.parent.mkdir()
    target = path.parent / "elsewhere"
    target.write_text("\n".join(map(str, range(HISTORY_LINES + 1))) + "\n")
    path.symlink_to(target)
    History(str(path))
    assert path.is_symlink()
    assert len(target.read_text().split()) == HISTORY_LINES


def test_the_draft_of_a_killed_process_with_the_same_id_does_not_stop_the_history(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("".join(f"{number}\n" for number in range(HISTORY_FILE_LINES)))
    path.with_name(f"{path.name}.{os.getpid()}").touch()
    History(str(path)).add("new")
    assert path.read_text().endswith("\nnew\n") and len(path.read_text().split()) == HISTORY_LINES + 1


def test_without_a_usable_file_the_history_is_in_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    for unusable in (tmp_path, tmp_path / "fifo", tmp_path / "file" / "below", Path("/dev/null"),
                     Path("/proc/none/history")):
        history = History(str(unusable))
        history.add("one")
        assert all_lines(history) == ["one"]


def test_with_a_full_disk_the_history_goes_on_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(str(path))
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    history.add("one")
    monkeypatch.undo()
    history.add("two")
    assert all_lines(history) == ["two", "one"]
    assert path.read_text() == ""


def test_when_shortening_fails_the_file_is_unchanged_and_no_draft_stays_beside_it(
        path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: str, target: str) -> None:
        raise OSError
    path.parent.mkdir()
    path.write_text("\n".join(map(str, range(HISTORY_LINES + 1))) + "\n")
    monkeypatch.setattr(os, "replace", fails)
    assert len(all_lines(History(str(path)))) == HISTORY_LINES
    assert len(path.read_text().split()) == HISTORY_LINES + 1
    assert list(path.parent.iterdir()) == [path]


# --- editing --------------------------------------------------------------------------------------------------

NICKS = ["bob", "bert", "bob2"]


def complete(before: str) -> tuple[int, list[str]]:
    start = before.rfind(" ") + 1
    return start, [nick for nick in NICKS if nick.startswith(before[start:])]


def new_editor(path: str | None = None) -> Editor:
    return Editor(History(path), complete, BLOCK_PREFIX, COMMAND_MARK)


@pytest.fixture
def editor() -> Editor:
    return new_editor()


def submitted(*lines: str, as_pasted: bool = False) -> Action:
    return Action(ActionKind.SUBMIT, list(lines), as_pasted)


def press(editor: Editor, *keys: str) -> list[Action]:
    """Press keys that are given by name. Anything that is no name is typed as it is."""
    return editor.feed(b"".join(PRESS.get(key, key.encode()) for key in keys))


def with_cursor(editor: Editor) -> str:
    return editor.text[:editor.cursor] + "|" + editor.text[editor.cursor:]


@pytest.mark.parametrize("keys, wanted", [
    (["abc", "left", "x"], "abx|c"), (["abc", "home", "x"], "x|abc"), (["abc", "home", "end", "x"], "abcx|"),
    (["abc", "home", "right", "right", "x"], "abx|c"), (["abc", "right"], "abc|"), (["abc", "home", "left"], "|abc"),
    (["abc", "backspace"], "ab|"), (["abc", "home", "backspace"], "|abc"), (["abc", "left", "backspace"], "a|c"),
    (["abc", "home", "delete"], "|bc"), (["abc", "delete"], "abc|"), (["abc", "home", "end-of-input"], "|bc"),
    (["abc", "end-of-input"], "abc|"), (["abc", "interrupt"], "|"),
    (["one two-three  ", "word-left"], "one two-|three  "), (["one two-three", "word-left", "word-left"],
                                                             "one |two-three"),
    (["one two-three", "home", "word-right", "word-right"], "one two|-three"), (["one  ", "word-right"], "one  |"),
    (["one two-three  ", "kill-word"], "one |"), (["one two-three  ", "kill-last-word"], "one two-|"),
    (["one two-three", "home", "kill-next-word"], "| two-three"), (["one two", "word-left", "kill-start"], "|two"),
    (["one two", "word-left", "kill-end"], "one |"), (["one two", "kill-word", "yank", "yank"], "one twotwo|"),
    (["one", "kill-start", "kill-start", "yank"], "one|"), (["yank"], "|")])
def test_keys_edit_the_line(editor: Editor, keys: list[str], wanted: str) -> None:
    assert press(editor, *keys) == []
    assert with_cursor(editor) == wanted


def test_a_character_and_what_joins_it_are_moved_over_and_deleted_together(editor: Editor) -> None:
    press(editor, f"ae{ACUTE}\ufe0f{FAMILY}b", "left", "left")
    assert with_cursor(editor) == f"ae{ACUTE}\ufe0f|{FAMILY}b"
    press(editor, "backspace")
    assert with_cursor(editor) == f"a|{FAMILY}b"
    press(editor, "delete")
    assert with_cursor(editor) == "a|b"
    press(editor, "kill-start", ACUTE + "x", "left", "left", "right", "backspace")
    assert editor.text == "xb"


@pytest.mark.parametrize("unit", EMOJI.values(), ids=EMOJI)
def test_keys_pass_and_delete_an_emoji_of_several_characters_as_one(editor: Editor, unit: str) -> None:
    press(editor, f"a{unit}{unit}b", "left", "left")
    assert with_cursor(editor) == f"a{unit}|{unit}b"
    press(editor, "left", "right", "backspace")
    assert with_cursor(editor) == f"a|{unit}b"
    press(editor, "delete")
    assert with_cursor(editor) == "a|b"


def test_in_a_row_of_flags_the_letters_are_paired_from_its_beginning(editor: Editor) -> None:
    press(editor, "🇩🇪🇫🇷🇮🇹", "left", "backspace")
    assert with_cursor(editor) == "🇩🇪|🇮🇹"
    press(editor, "kill-start", "kill-end", "🇩" * EDIT_LIMIT, "left")
    assert editor.cursor == EDIT_LIMIT - 2


def test_a_word_is_not_cut_within_a_character(editor: Editor) -> None:
    press(editor, f"one cafe{ACUTE} two", "word-left", "word-left")
    assert with_cursor(editor) == f"one |cafe{ACUTE} two"
    press(editor, "word-right")
    assert with_cursor(editor) == f"one cafe{ACUTE}| two"


def test_enter_submits_the_line_and_begins_an_empty_one(editor: Editor) -> None:
    assert press(editor, "send bob hi", "home", "enter") == [submitted("send bob hi")]
    assert with_cursor(editor) == "|"
    assert editor.feed(b"who\rhelp\nhalf") == [submitted("who"), submitted("help")]
    assert editor.text == "half"


def test_keys_that_the_owner_has_to_act_on_come_as_actions_in_order(editor: Editor) -> None:
    assert press(editor, "end-of-input", "interrupt", "suspend", "clear") == [
        Action(ActionKind.END_OF_INPUT), Action(ActionKind.INTERRUPT), Action(ActionKind.SUSPEND),
        Action(ActionKind.CLEAR_SCREEN)]
    assert press(editor, "x", "suspend", "clear") == [
        Action(ActionKind.SUSPEND), Action(ActionKind.CLEAR_SCREEN)]
    assert editor.text == "x"


def test_up_and_down_browse_what_was_submitted(editor: Editor) -> None:
    press(editor, "one", "enter", "two", "enter", "half", "up")
    assert with_cursor(editor) == "two|"
    press(editor, "up", "up")
    assert editor.text == "one"
    press(editor, "down", "down")
    assert with_cursor(editor) == "half|"
    press(editor, "down", "!")
    assert with_cursor(editor) == "half!|"


def test_a_line_of_the_history_can_be_changed_and_submitted(editor: Editor) -> None:
    press(editor, "one", "enter", "up", "!")
    assert press(editor, "enter") == [submitted("one!")]
    press(editor, "up", "up")
    assert editor.text == "one"


def test_an_interrupt_ends_the_browsing(editor: Editor) -> None:
    press(editor, "one", "enter", "two", "enter", "half", "up", "up", "interrupt", "up")
    assert editor.text == "two"
    press(editor, "down")
    assert editor.text == ""


def test_each_tab_inserts_the_next_candidate(editor: Editor) -> None:
    press(editor, "send b x", "left", "left", "tab")
    assert with_cursor(editor) == "send bob | x"
    press(editor, "tab")
    assert with_cursor(editor) == "send bert | x"
    press(editor, "tab", "tab")
    assert with_cursor(editor) == "send bob | x"
    press(editor, "back-tab")
    assert with_cursor(editor) == "send bob2 | x"


def test_back_tab_begins_with_the_last_candidate(editor: Editor) -> None:
    press(editor, "b", "back-tab")
    assert editor.text == "bob2 "


def test_any_other_key_ends_the_completion(editor: Editor) -> None:
    press(editor, "bo", "tab", "b", "tab", "tab")
    assert editor.text == "bob bert "


def test_without_a_candidate_the_line_stays_and_the_bell_rings(editor: Editor) -> None:
    assert press(editor, "x", "tab") == [BELL]
    assert editor.text == "x"


def test_text_beyond_the_limit_is_not_inserted_and_the_bell_rings(editor: Editor) -> None:
    assert editor.feed(b"x" * (EDIT_LIMIT - 2)) == []
    assert editor.feed(pasted("abc")) == [BELL]
    assert editor.text[-3:] == "xab"
    assert press(editor, "x", "kill-word", "yank", "yank") == [BELL, BELL]
    assert press(editor, "backspace", "backspace", " ", "tab") == [BELL]
    assert len(editor.text) == EDIT_LIMIT - 1


def test_a_paste_that_was_cut_rings_the_bell(editor: Editor) -> None:
    assert BELL in editor.feed(pasted("a\r" * PASTE_LIMIT))


# --- pastes ---------------------------------------------------------------------------------------------------

def test_a_paste_is_not_submitted_before_enter(editor: Editor) -> None:
    press(editor, "ab", "left")
    assert editor.feed(pasted("1\r\n2\r3\n4\tx\x03\x1b[A\x7f\n")) == []
    assert with_cursor(editor) == "a1\n2\n3\n4\tx[A|b"


def test_enter_submits_each_line_of_a_paste(editor: Editor) -> None:
    editor.feed(pasted("who\r\rhelp\r"))
    assert press(editor, "enter") == [submitted("who", "", "help", as_pasted=True)]
    assert press(editor, "up") == [] and editor.text == "help"
    press(editor, "up")
    assert editor.text == "who"


# --- looking for a line ---------------------------------------------------------------------------------------

@pytest.fixture
def searching(editor: Editor) -> Editor:
    """An editor that has three lines in its history, a text, and a search."""
    for line in ("send bob Grüße", "who", "send carol hello"):
        editor.feed(line.encode() + b"\r")
    editor.feed(b"draft\x12")
    return editor


def state(editor: Editor) -> tuple[bool, str]:
    """Return whether somebody is looking for a line, and the text."""
    return editor.search is not None, editor.text


def test_a_search_finds_in_any_case_and_a_paste_is_looked_for_too(searching: Editor) -> None:
    searching.feed("GRÜ".encode())
    assert searching.text == "send bob Grüße" and searching.cursor == len("send bob ")
    searching.feed(b"\x07\x12" + pasted("CAROL"))
    assert searching.text == "send carol hello" and searching.cursor == len("send ")


@pytest.mark.parametrize("key", [b"\r", b"\x1b[F", b"\x1b[A"])
def test_what_is_in_no_line_is_shown_as_such_and_nothing_is_done_with_another(searching: Editor, key: bytes) -> None:
    assert [action.kind for action in searching.feed(b"helloo")] == [ActionKind.BELL]
    assert searching.search is not None and searching.search.prompt == "no line has 'helloo': "
    assert [action.kind for action in searching.feed(key)] == [ActionKind.BELL]
    assert state(searching) == (False, "draft")


def test_backspace_takes_back_whole_characters_until_the_text_of_before_is_there(searching: Editor) -> None:
    searching.feed("hello".encode() + "e\u0301".encode())
    searching.feed(b"\x7f")
    assert searching.search is not None and searching.search.wanted == "hello" and not searching.search.has_failed
    searching.feed(b"\x7f" * 5)
    assert (searching.search.wanted, searching.text) == ("", "draft")


@pytest.mark.parametrize("key", [b"\x07", b"\x03", b"\x04"])
def test_a_search_that_is_given_up_leaves_what_was_there(searching: Editor, key: bytes) -> None:
    searching.feed(b"hello")
    assert searching.feed(key) == [] and state(searching) == (False, "draft")


def test_from_a_line_that_was_found_one_browses_on(searching: Editor) -> None:
    searching.feed(b"who\x1b[A")
    assert searching.text == "send bob Grüße"
    searching.feed(b"\x1b[B" * 3)
    assert searching.text == "draft"


# --- line ends ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", [b"\x1b\r", b"\x1b\n", b"\x1b[13;3u", b"\x1b[27;3;13~"])
def test_alt_enter_writes_a_line_end_that_parts_no_lines(editor: Editor, key: bytes) -> None:
    editor.feed(b"send bob one" + key + b"twoo\x7f")
    assert editor.feed(b"\r") == [submitted("send bob one\ntwo")]
    editor.feed(b"\x1b[A")
    assert editor.feed(b"\r") == [submitted("send bob one\ntwo")], "it comes back out of the history as it was"


def test_alt_enter_in_a_block_stays_in_its_line(editor: Editor) -> None:
    editor.feed(b"send bob " + pasted("one\rtwo") + b"\x1b\rthree")
    assert editor.feed(b"\r") == [submitted("send bob one", "send bob two\nthree")]


def test_each_line_of_a_block_pasted_behind_a_send_goes_to_the_same_nick(editor: Editor) -> None:
    editor.feed(b"send bob look: " + pasted("one\n\n two\n") + b"!\r")
    press(editor, "up")
    assert editor.text == "send bob  two!"
    editor.feed(b"\x03send bob " + pasted("one\n\n two\n"))
    assert press(editor, "enter") == [submitted("send bob one", "send bob ", "send bob  two")]


def test_a_block_goes_to_the_nick_that_stands_there_when_it_is_submitted(editor: Editor) -> None:
    editor.feed(b"send bob " + pasted("one\ntwo"))
    press(editor, "home", "word-right", "right", "kill-next-word", "carol")
    assert press(editor, "enter")[0].lines == ["send carol one", "send carol two"]


def test_a_block_that_begins_with_a_send_itself_stays_as_it_is(editor: Editor) -> None:
    editor.feed(pasted("send bob one\nsend carol two"))
    assert press(editor, "enter") == [submitted("send bob one", "send carol two", as_pasted=True)]


def test_a_block_pasted_behind_a_send_with_a_slash_goes_to_the_same_nick_too(editor: Editor) -> None:
    editor.feed(b"/send bob " + pasted("one\ntwo\r"))
    assert press(editor, "enter") == [submitted("/send bob one", "/send bob two")]


def test_a_block_pasted_behind_anything_else_stays_as_it_is(editor: Editor) -> None:
    editor.feed(b"send " + pasted("bob one\ntwo"))
    assert press(editor, "enter") == [submitted("send bob one", "two", as_pasted=True)]


def test_a_block_is_the_same_after_a_look_at_the_history(editor: Editor) -> None:
    press(editor, "who", "enter")
    editor.feed(b"send bob " + pasted("one\ntwo"))
    press(editor, "up", "kill-start")
    editor.feed(pasted("three\nfour"))
    press(editor, "down")
    assert press(editor, "enter")[0].lines == ["send bob one", "send bob two"]


def test_a_killed_block_can_be_yanked_behind_a_send(editor: Editor) -> None:
    editor.feed(pasted("one\ntwo"))
    press(editor, "kill-start", "send bob ", "yank")
    assert press(editor, "enter")[0].lines == ["send bob one", "send bob two"]


def test_many_lines_are_submitted_and_kept_without_delay(path: Path) -> None:
    editor = new_editor(str(path))
    editor.feed(b"send bob " + pasted("a\nb\n" * (EDIT_LIMIT // 4)))
    assert len(press(editor, "enter")[0].lines) > EDIT_LIMIT // 2 - 10
    assert len(path.read_text().splitlines()) == HISTORY_LINES


# --- any bytes ------------------------------------------------------------------------------------------------

FRAGMENTS = st.one_of(
    st.sampled_from([data for variants in KEYS.values() for data in variants]),
    st.sampled_from([b"\x1b", b"\x1b[", b"\x1bO", b"\x1b[200~", b"\x1b[201~", b"\x1b[1;", b"\x1b[[",
                     b"send bob ", b"\n", "é界😀".encode(), ACUTE.encode(), b"\xc3", b"\xf0\x9f", b"\xff", b"\xc2\x9b"]),
    st.binary(max_size=6), st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace")))
INPUTS = st.lists(FRAGMENTS, max_size=25).map(b"".join)


def result(parts: Sequence[bytes]) -> tuple[list[Action], str, int]:
    """Return the actions (without the bell: how often it rings may depend on the cuts), the text and the cursor."""
    editor = new_editor()
    actions = [action for part in parts for action in editor.feed(part)]
    return [action for action in actions if action != BELL], editor.text, editor.cursor


@given(INPUTS, st.data())
def test_no_bytes_raise_and_it_makes_no_difference_where_they_are_cut(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    whole = result([data])
    assert 0 <= whole[2] <= len(whole[1])
    assert result([data[start:end] for start, end in zip([0] + cuts, cuts + [len(data)])]) == whole
    assert result([bytes([byte]) for byte in data]) == whole


class Line:
    """The simplest possible editor: a list of units, each a character with those that join it."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.cursor = 0
        self.killed: list[str] = []

    def press(self, key: str) -> None:
        """Do what ``key`` should do."""
        if key in UNITS:
            self.units.insert(self.cursor, key)
            self.cursor += 1
        elif key in ("left", "right", "home", "end"):
            self.cursor = self.target(key)
        elif key == "yank":
            self.units[self.cursor:self.cursor] = self.killed
            self.cursor += len(self.killed)
        else:
            start, end = sorted((self.cursor, self.target({
                "backspace": "left", "delete": "right", "kill-start": "home", "kill-end": "end"}.get(key, key))))
            if key.startswith("kill"):
                self.killed = self.units[start:end] or self.killed
            del self.units[start:end]
            self.cursor = start

    def target(self, key: str) -> int:
        """Return where a key moves to."""
        if key == "kill-word":
            before = "".join("x" if unit != " " else " " for unit in self.units[:self.cursor]).rstrip()
            return before.rfind(" ") + 1
        return {"left": max(0, self.cursor - 1), "right": min(len(self.units), self.cursor + 1),
                "home": 0, "end": len(self.units)}[key]


UNITS = ["a", "b", " ", "e" + ACUTE, "界", FAMILY]
EDITS = ["left", "right", "home", "end", "backspace", "delete", "kill-start", "kill-end", "kill-word", "yank"]


@given(st.lists(st.one_of(st.sampled_from(UNITS), st.sampled_from(EDITS)), max_size=60))
def test_editing_works_like_a_list_of_characters(keys: list[str]) -> None:
    editor, line = new_editor(), Line()
    for key in keys:
        press(editor, key)
        line.press(key)
        if len(line.units) > 200:
            break                # each pair of a yank and a kill may double it
        assert (editor.text, editor.cursor) == ("".join(line.units), len("".join(line.units[:line.cursor])))


# --- the screen -----------------------------------------------------------------------------------------------

class Xterm(pyte.Screen):
    """A terminal that resizes as xterm does: rows are cut, not wrapped again, and the row of the cursor stays."""

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Change the size."""
        lines, columns = lines or self.lines, columns or self.columns
        x, y = self.cursor.x, self.cursor.y
        over = max(0, y - lines + 1)
        self.cursor.y = 0
        if over:
            self.delete_lines(over)
        self.cursor.x, self.cursor.y = min(x, columns - 1), y - over
        for row in [row for row in self.buffer if row >= lines]:
            del self.buffer[row]
        for line in self.buffer.values():
            for column in [column for column in line if column >= columns]:
                del line[column]
        self.lines, self.columns = lines, columns

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        """Erase as usual. Behind a full row the cursor is still on its last character, so that is erased, too."""
        self.cursor.x = min(self.cursor.x, self.columns - 1)
        super().erase_in_line(how, private)


class Glass:
    """A terminal with a ``Screen`` that draws on it, and messages above the area."""

    def __init__(self, columns: int, rows: int, style: Style = Style(False)) -> None:
        self.xterm = Xterm(columns, rows)
        self.stream = pyte.ByteStream(self.xterm)
        self.screen = Screen(columns, rows, style)

    def write(self, data: bytes) -> None:
        """Show ``data``. (pyte stops at characters of width 0 that are no accents: they are left out.)"""
        text = data.decode()
        kept = "".join(c for c in text if char_width(c) or unicodedata.combining(c))
        self.stream.feed(kept.replace("\r\n", "\n").replace("\n", "\r\n").encode())

    def say(self, *lines: str) -> None:
        """Show messages; the area is erased before."""
        self.write(self.screen.erase() + "".join(line + "\n" for line in lines).encode())

    def draw(self, text: str, cursor: int | None = None, notices: Sequence[str] = (), prompt: str = "> ") -> bytes:
        """Draw the area, with the cursor at the end of the text if no other place is given."""
        data = self.screen.draw(notices, prompt, text, len(text) if cursor is None else cursor)
        self.write(data)
        return data

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size, and then tell the program."""
        self.xterm.resize(rows, columns)
        self.write(self.screen.resize(columns, rows))

    @property
    def rows(self) -> list[str]:
        """What the screen shows, without blanks at the end of rows and blank rows at the end."""
        rows = [unicodedata.normalize("NFC", row).rstrip() for row in self.xterm.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def cursor(self) -> tuple[int, int]:
        """The row and the column."""
        return self.xterm.cursor.y, self.xterm.cursor.x


@pytest.fixture
def glass() -> Glass:
    return Glass(10, 6)


def test_a_message_goes_above_what_is_being_typed(glass: Glass) -> None:
    glass.draw("hel")
    glass.say("bob: hi")
    glass.draw("hel")
    assert (glass.rows, glass.cursor) == (["bob: hi", "> hel"], (1, 5))
    glass.say("bob: a message that takes rows")
    glass.draw("hello", 1)
    assert glass.rows == ["bob: hi", "bob: a mes", "sage that", "takes rows", "> hello"]
    assert glass.cursor == (4, 3)


def test_messages_scroll_away_and_the_area_stays(glass: Glass) -> None:
    for number in range(20):
        glass.say(f"m{number}")
        glass.draw("abc")
    assert glass.rows == ["m15", "m16", "m17", "m18", "m19", "> abc"]


def test_notices_stand_above_the_prompt_and_are_cut_to_a_row(glass: Glass) -> None:
    glass.draw("a", notices=["short", "this is too long", "界界界界界界"])
    assert (glass.rows, glass.cursor) == (["short", "this is t…", "界界界界…", "> a"], (3, 3))
    glass.draw("a", notices=["exactly 10"])
    assert (glass.rows, glass.cursor) == (["exactly 10", "> a"], (1, 3))


def test_notices_are_dim_and_the_text_is_not() -> None:
    glass = Glass(10, 6, Style(True))
    assert b"\x1b[2mnote\x1b[22m\x1b[K\r\n> a" in glass.draw("a", notices=["note"])


def test_a_long_text_is_wrapped_and_the_cursor_is_in_its_place(glass: Glass) -> None:
    glass.draw("0123456789")
    assert (glass.rows, glass.cursor) == (["> 01234567", "89"], (1, 2))
    glass.draw("0123456789", 3)
    assert (glass.rows, glass.cursor) == (["> 01234567", "89"], (0, 5))
    glass.draw("0123456789", 8)
    assert glass.cursor == (1, 0)


def test_a_text_that_fills_its_row_has_the_cursor_on_the_next(glass: Glass) -> None:
    glass.draw("01234567")
    assert (glass.rows, glass.cursor) == (["> 01234567"], (1, 0))
    glass.draw("01234567", 7)
    assert (glass.rows, glass.cursor) == (["> 01234567"], (0, 9))
    glass.say("m")
    glass.draw("01234567")
    assert (glass.rows, glass.cursor) == (["m", "> 01234567"], (2, 0))


def test_a_text_that_gets_shorter_leaves_nothing_behind(glass: Glass) -> None:
    glass.say("m")
    glass.draw("x" * 18, notices=["note"])
    assert glass.rows == ["m", "note", "> xxxxxxxx", "xxxxxxxxxx"]
    glass.draw("x" * 8, 0)
    assert (glass.rows, glass.cursor) == (["m", "> xxxxxxxx"], (1, 2))
    glass.draw("")
    assert (glass.rows, glass.cursor) == (["m", ">"], (1, 2))


def test_a_wide_character_is_not_torn(glass: Glass) -> None:
    glass.draw("1234567界x")
    assert (glass.rows, glass.cursor) == (["> 1234567", "界x"], (1, 3))
    glass.draw("1234567界x", 7)
    assert glass.cursor == (1, 0)
    glass.draw("界界界界界", 2)
    assert (glass.rows, glass.cursor) == (["> 界界界界", "界"], (0, 6))


def test_an_accent_stays_with_its_character_at_the_end_of_a_row(glass: Glass) -> None:
    glass.draw("1234567e" + ACUTE + "x")
    assert (glass.rows, glass.cursor) == (["> 1234567é", "x"], (1, 1))
    glass.draw("1234567e" + ACUTE)
    assert (glass.rows, glass.cursor) == (["> 1234567é"], (1, 0))


def test_an_accent_without_a_character_does_not_change_the_row_above(glass: Glass) -> None:
    glass.say("0123456789")
    glass.draw(ACUTE + "ab", prompt="")
    assert (glass.rows, glass.cursor) == (["0123456789", "ab"], (1, 2))


def test_control_characters_are_shown_as_printable_ones(glass: Glass) -> None:
    glass.draw("a\nb\tc", prompt="")
    assert (glass.rows, glass.cursor) == (["a↵b c"], (0, 5))
    glass.draw("\x1b[2J\x7f\x85\x00", 1, prompt="")
    assert (glass.rows, glass.cursor) == (["^[[2J^?~E", "^@"], (0, 2))
    glass.draw("a\u202eb\u2028\ud800", prompt="")
    assert (glass.rows, glass.cursor) == (["ab↵?"], (0, 4))


def test_only_the_rows_around_the_cursor_are_shown_of_a_text_that_is_too_high(glass: Glass) -> None:
    text = "".join(str(number) * 10 for number in range(9))
    glass.say("m")
    glass.draw(text, prompt="", notices=["note"])
    assert (glass.rows, glass.cursor) == (["m"] + [str(number) * 10 for number in range(5, 9)], (5, 0))
    glass.draw(text, 0, prompt="", notices=["note"])
    assert (glass.rows, glass.cursor) == (["m"] + [str(number) * 10 for number in range(5)], (1, 0))
    glass.draw(text, 45, prompt="", notices=["note"])
    assert (glass.rows, glass.cursor) == (["m"] + [str(number) * 10 for number in range(2, 7)], (3, 5))


def test_the_first_notices_are_left_out_when_there_is_no_room(glass: Glass) -> None:
    glass.draw("x" * 20, notices=["one", "two", "three"])
    assert glass.rows == ["two", "three", "> xxxxxxxx", "xxxxxxxxxx", "xx"]


def test_nothing_is_drawn_when_nothing_has_changed(glass: Glass) -> None:
    assert glass.draw("abc") != b""
    assert glass.draw("abc") == b""
    assert glass.draw("abc", 1) != b""
    glass.say("m")
    assert glass.draw("abc", 1) != b""


def test_erasing_the_area_puts_the_cursor_where_it_began(glass: Glass) -> None:
    assert glass.screen.erase() == b""
    glass.say("m")
    glass.draw("x" * 15, 3, notices=["note"])
    glass.write(glass.screen.erase())
    assert (glass.rows, glass.cursor) == (["m"], (1, 0))
    assert glass.screen.erase() == b""


def test_a_cleared_screen_shows_only_the_area(glass: Glass) -> None:
    glass.say("m1", "m2")
    glass.draw("abc")
    glass.write(glass.screen.clear_screen())
    assert (glass.rows, glass.cursor) == ([], (0, 0))
    glass.draw("abc")
    assert (glass.rows, glass.cursor) == (["> abc"], (0, 5))


def test_a_forgotten_area_is_drawn_again_below(glass: Glass) -> None:
    glass.draw("abc")
    glass.screen.forget()
    glass.write(b"\nshell\n")
    glass.draw("abc")
    assert (glass.rows, glass.cursor) == (["> abc", "shell", "> abc"], (2, 5))


def test_a_narrower_window_leaves_nothing_stale(glass: Glass) -> None:
    glass.say("m1", "m2")
    glass.draw("x" * 15, notices=["note"])
    glass.resize(5, 6)
    assert (glass.rows, glass.cursor) == (["m1", "m2"], (2, 0))
    glass.draw("x" * 11)
    assert (glass.rows, glass.cursor) == (["m1", "m2", "> xxx", "xxxxx", "xxx"], (4, 3))


def test_a_wider_window_leaves_nothing_stale(glass: Glass) -> None:
    glass.say("m1")
    glass.draw("x" * 25, 12)
    glass.resize(30, 6)
    glass.draw("x" * 25, 12)
    assert (glass.rows, glass.cursor) == (["m1", "> " + "x" * 25], (1, 14))


def test_a_window_lower_than_the_area_shows_what_fits(glass: Glass) -> None:
    glass.say("m1")
    glass.draw("x" * 38)
    assert glass.rows == ["m1", "> xxxxxxxx"] + ["x" * 10] * 3
    glass.resize(10, 3)
    assert (glass.rows, glass.cursor) == ([], (0, 0))
    glass.draw("x" * 37 + "y")
    assert glass.rows == ["xxxxxxxxxy"]
    glass.resize(10, 6)
    glass.draw("x" * 37 + "y")
    assert glass.rows == ["> xxxxxxxx"] + ["x" * 10] * 2 + ["xxxxxxxxxy"]


@pytest.mark.parametrize("columns, rows", [(1, 1), (1, 5), (2, 1), (2, 2), (3, 1), (0, 0)])
def test_the_smallest_windows_are_enough(columns: int, rows: int) -> None:
    glass = Glass(max(columns, 1), max(rows, 1))
    glass.screen = Screen(columns, rows)
    for text in ("", "a", "界", "a界\x01", "abc" + ACUTE + "界" * 5):
        for cursor in range(len(text) + 1):
            glass.draw(text, cursor, notices=["note", "界"])
            assert glass.cursor[0] < max(rows, 1)
            glass.say("m")


def test_a_character_wider_than_the_window_is_shown_as_a_question_mark() -> None:
    glass = Glass(1, 6)
    glass.draw("a界b", prompt="")
    assert (glass.rows, glass.cursor) == (["a", "?", "b"], (3, 0))
    assert cut("界界", 2) == ("?…", 2)


def test_a_terminal_with_wider_characters_than_we_think_still_has_the_same_rows(glass: Glass) -> None:
    glass.say("m")
    data = glass.screen.draw([], "> ", "^" * 10, 10)
    glass.write(data.replace(b"^", "界".encode()))
    glass.say("m2")
    assert glass.rows == ["m", "m2"]
    glass.say("wrapped again")
    assert glass.rows == ["m", "m2", "wrapped ag", "ain"]


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("unit", EMOJI.values(), ids=EMOJI)
def test_behind_an_emoji_the_cursor_is_where_the_terminal_draws_it(unit: str, columns: int) -> None:
    glass = Glass(60, 6)
    drawn = "#" * columns                # what this terminal makes of the emoji
    text = f"a{unit} b{unit}c"
    places = [0, 1, 1 + len(unit), 2 + len(unit), 3 + len(unit), 3 + 2 * len(unit), 4 + 2 * len(unit)]
    for message in ("", "m"):
        for place in places + places[::-1]:
            glass.write(glass.screen.draw(["note"], "> ", text, place).replace(unit.encode(), drawn.encode()))
            assert glass.rows[-2:] == ["note", "> " + text.replace(unit, drawn)]
            assert glass.cursor == (len(glass.rows) - 1, 2 + len(text[:place].replace(unit, drawn)))
        glass.say(message)


def test_an_emoji_is_not_torn_at_the_end_of_a_row_and_no_row_gets_too_wide(glass: Glass) -> None:
    for unit, widest in (("👨\u200d👩\u200d👧", "######"), ("🇩🇪", "####"), ("❤\ufe0f", "##"), ("👍🏽", "####")):
        for shown in ("#", widest):
            count = (10 - 2) // len(widest)
            text = unit * count + "x" + unit * 2
            glass.write(glass.screen.erase())
            glass.write(glass.screen.draw([], "> ", text, len(text)).replace(unit.encode(), shown.encode()))
            room = 10 - 2 - count * len(widest)
            first = "> " + shown * count + "x" * (room > 0)
            assert glass.rows == [first, "x" * (room == 0) + shown * 2] or len(widest) == 6 and glass.rows[0] == first


def test_what_was_behind_an_emoji_is_gone_when_the_text_gets_shorter() -> None:
    glass, unit = Glass(30, 6), EMOJI["family"]
    for text, row in ((unit + "abcdef", "> ##abcdef"), (unit + "x", "> ##x"), (unit, "> ##"), ("", ">")):
        glass.write(glass.screen.draw([], "> ", text, len(text)).replace(unit.encode(), b"##"))
        assert glass.rows[0] == row


def test_a_character_that_was_typed_before_what_joins_it_is_drawn_with_it(glass: Glass) -> None:
    data = glass.screen.draw([], "> ", "👍🏽", 1)
    assert data.count("👍".encode()) == data.count("👍🏽".encode())


def test_typing_at_the_end_writes_each_row_once_and_moves_the_cursor_no_more(glass: Glass) -> None:
    glass.draw("ab")
    assert glass.draw("abc") == b"\x1b[?7l\r> abc\x1b[K\x1b[?7h"
    assert glass.draw("abd", 1) == b"\x1b[?7l\r> abd\x1b[K\r\x1b[3C\x1b[?7h"
    assert glass.draw("é界") == "\x1b[?7l\r\x1b[K> é界\x1b[?7h".encode()


REWRAPPED = [                    # columns, a text, the place of the cursor; new columns, rows above the cursor then
    (10, "0123456789" * 2 + "abc", 23, 5, 4), (10, "0123456789" * 2 + "abc", 23, 7, 3),
    (10, "0123456789" * 2 + "abc", 23, 30, 0), (10, "0123456789" * 2 + "abc", 20, 5, 4),
    (10, "0123456789" * 2 + "abc", 7, 5, 1), (10, "0123456789", 10, 5, 2), (20, "界" * 8 + "a", 9, 5, 3),
    (20, "ab" + "👨\u200d👩\u200d👧" * 3, 17, 4, 5), (10, "abc", 3, 1, 2),
]


@pytest.mark.parametrize("columns, text, cursor, narrower, above", REWRAPPED)
def test_where_a_terminal_wraps_its_rows_again_all_that_it_made_of_the_area_is_erased(
        columns: int, text: str, cursor: int, narrower: int, above: int) -> None:
    screen = Screen(columns, 24, wraps_again=True)
    screen.draw([], "", text, cursor)
    assert screen.resize(narrower, 24).startswith(b"\r\x1b[%dA\x1b[K" % above if above else b"\r\x1b[K")


def test_a_terminal_that_wraps_again_wraps_the_text_itself_and_ends_notices() -> None:
    screen = Screen(10, 24, wraps_again=True)
    assert screen.draw(["a long notice"], "> ", "0123456789", 0) == (
        "\r\x1b[Ja long n…\x1b[K\r\n> 0123456789\x1b[K\r\x1b[1A\x1b[2C".encode())
    screen.erase()
    assert screen.draw([], "", "1234567界x", 9) == "\r\x1b[J1234567界\x1b[K\x1b[10G x\x1b[K".encode()
    screen.resize(1, 24)
    assert screen.draw([], "", "é", 1).endswith("é\r\n".encode() + b"\x1b[K")


def test_where_a_backspace_leads_over_wrapped_rows_nothing_is_counted_but_notices() -> None:
    screen = Screen(10, 24, wraps_again=True, goes_back=True)
    screen.draw(["a notice"], "> ", "0123456789", 10)
    assert screen.resize(5, 24) == b"\b" * 20 + b"\r\x1b[2A\x1b[K\x1b[C\x1b[J\r"
    screen.draw([], "> ", "012", 3)      # the cursor is in an empty row, which no terminal joins to the one before
    assert screen.resize(9, 24) == b"\x1b[1A" + b"\b" * 10 + b"\r\x1b[K\x1b[C\x1b[J\r"


def test_a_size_for_later_counts_as_soon_as_anything_changes() -> None:
    screen = Screen(10, 24, wraps_again=True)
    screen.draw([], "> ", "01234567", 3)
    screen.resize_later(5, 24)
    assert screen.draw([], "> ", "01234567", 3) == b""
    assert screen.draw([], "> ", "0123456", 7) == (
        b"\r\x1b[1A\x1b[K\x1b[C\x1b[J\r\r\x1b[J> 0123456\x1b[K")
    screen.resize_later(3, 24)
    assert screen.erase() == b"\r\x1b[2A\x1b[K\x1b[C\x1b[J\r"
    assert screen.draw([], "> ", "01", 2) == b"\r\x1b[J> 01\x1b[K"


def test_the_line_being_typed_is_erased_before_the_screen_is_cleared(glass: Glass) -> None:
    glass.draw("x" * 15)
    assert glass.screen.clear_screen() == b"\r\x1b[1A\x1b[K\x1b[C\x1b[J\r\x1b[H\x1b[2J"
    assert glass.screen.clear_screen() == b"\x1b[H\x1b[2J"


def test_a_large_text_is_drawn_without_delay(glass: Glass) -> None:
    for text in ("x" * EDIT_LIMIT, "界" * (EDIT_LIMIT // 8)):
        glass.draw(text)
        assert glass.cursor[0] == 4


CELLS = {"a": "a", "b": "b", "-": "-", "\n": "↵", "\t": " ", "\x01": "^A", "界": "界", "e" + ACUTE: "é"}


def expected_area(columns: int, rows: int, notices: Sequence[str], text: list[str],
                  cursor: int) -> tuple[list[str], int, int]:
    """Return the rows of the area and the place of the cursor, laid out in the simplest way, unit by unit."""
    area, used, places = [""], 0, []
    for unit in text + [""]:
        width = 2 if unit in ("\x01", "界") else 1
        wraps = used + width > columns
        places.append((len(area), 0) if wraps else (len(area) - 1, used))
        if wraps and (unit or cursor == len(text)):
            area, used = area + [""], 0
        area[-1] += CELLS.get(unit, unit)
        used += width
    row, column = places[cursor]
    most = max(1, rows - 1)
    top = max(0, min(row - most // 2, len(area) - most))
    area = area[top:top + most]
    shown = list(notices)[max(0, len(notices) - (most - len(area))):]
    return [line.rstrip() for line in shown + area], len(shown) + row - top, column


class Expected:
    """What should be on the screen: the messages that have not scrolled off, and below them the area."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.messages: list[str] = []
        self.area: list[str] = []
        self.row = self.column = 0

    def scroll_to(self, row: int) -> None:
        """Scroll until ``row``, as counted before the scrolling, is the last one."""
        del self.messages[:max(0, row - self.rows + 1)]

    def say(self, message: str) -> None:
        self.erase()
        self.messages.append(message)
        self.scroll_to(len(self.messages))

    def erase(self) -> None:
        self.area, self.row, self.column = [], 0, 0

    def draw(self, area: list[str], row: int, column: int) -> None:
        self.area, self.row, self.column = area, row, column
        self.scroll_to(len(self.messages) + len(area) - 1)

    def resize(self, rows: int) -> None:
        self.rows = rows
        self.scroll_to(len(self.messages) + self.row)
        self.erase()

    @property
    def seen(self) -> list[str]:
        seen = self.messages + self.area
        while seen and not seen[-1]:
            seen = seen[:-1]
        return seen

    @property
    def cursor(self) -> tuple[int, int]:
        return len(self.messages) + self.row, self.column


TEXTS = st.lists(st.sampled_from(sorted(CELLS)), max_size=30)
STEPS = st.one_of(
    st.tuples(st.just("draw"), TEXTS, st.integers(0, 30), st.lists(st.sampled_from(["no", "te"]), max_size=3)),
    st.tuples(st.just("say")), st.tuples(st.just("erase")),
    st.tuples(st.just("resize"), st.integers(3, 12), st.integers(1, 8)))


@given(st.lists(STEPS, max_size=25))
def test_the_screen_shows_the_messages_in_order_and_below_them_exactly_the_area(steps: list[Any]) -> None:
    columns, glass, expected = 10, Glass(10, 6), Expected(6)
    for number, (kind, *arguments) in enumerate(steps):
        if kind == "draw":
            text, cursor, notices = arguments
            cursor = min(cursor, len(text))
            glass.draw("".join(text), len("".join(text[:cursor])), notices, prompt="")
            expected.draw(*expected_area(columns, expected.rows, notices, text, cursor))
        elif kind == "say":
            glass.say(f"m{number}")
            expected.say(f"m{number}")
        elif kind == "erase":
            glass.write(glass.screen.erase())
            expected.erase()
        else:
            columns, rows = arguments
            glass.resize(columns, rows)
            expected.resize(rows)
        assert glass.rows == expected.seen
        assert glass.cursor == expected.cursor


# --- the terminal's settings ----------------------------------------------------------------------------------

class Pty:
    """A pseudo-terminal: ``user`` is the end of the person who types and reads, ``side`` the end of the program."""

    def __init__(self) -> None:
        self.user, self.side = pty.openpty()

    def attributes(self) -> list[Any]:
        """Return the settings, as ``termios`` represents them."""
        return termios.tcgetattr(self.side)

    def hang_up(self) -> None:
        """Close the end of the user, as if the window was closed."""
        if self.user >= 0:
            os.close(self.user)
            self.user = -1


@pytest.fixture
def line() -> Iterator[Pty]:
    line = Pty()
    yield line
    line.hang_up()
    os.close(line.side)


def test_keys_come_as_bytes_and_are_not_shown(line: Pty) -> None:
    Tty(line.side, line.side).enter_raw_mode()
    os.write(line.user, b"a\r\x03\x04\x1a\x16")
    assert os.read(line.side, 100) == b"a\r\x03\x04\x1a\x16"
    os.write(line.side, b"x\n")
    assert os.read(line.user, 100) == b"x\r\n"


def test_the_terminal_gets_exactly_the_settings_back_that_it_had(line: Pty) -> None:
    before = line.attributes()
    before[3] &= ~termios.ECHOE
    before[6][termios.VMIN], before[6][termios.VTIME] = 7, 9
    termios.tcsetattr(line.side, termios.TCSANOW, before)
    before = line.attributes()
    ours = Tty(line.side, line.side)
    ours.leave_raw_mode()
    assert line.attributes() == before
    for _ in range(2):
        ours.enter_raw_mode()
        ours.enter_raw_mode()
        characters = line.attributes()[6]
        assert (characters[termios.VMIN], characters[termios.VTIME]) == (1, 0)
        ours.leave_raw_mode()
        ours.leave_raw_mode()
        assert line.attributes() == before


def test_no_other_setting_changes_so_that_ctrl_s_and_ctrl_q_still_work(line: Pty) -> None:
    before = line.attributes()
    Tty(line.side, line.side).enter_raw_mode()
    assert line.attributes()[0] == before[0] & ~termios.ICRNL
    assert line.attributes()[1] == before[1]
    assert line.attributes()[3] == before[3] & ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)


def test_a_terminal_that_has_hung_up_is_no_error(line: Pty) -> None:
    ours = Tty(line.side, line.side)
    ours.enter_raw_mode()
    line.hang_up()
    ours.leave_raw_mode()
    ours.enter_raw_mode()
    ours.leave_raw_mode()
    assert ours.size() == DEFAULT_SIZE
    assert not ours.is_background()


def test_a_descriptor_that_is_no_terminal_has_no_settings() -> None:
    read, write = os.pipe()
    ours = Tty(read, write)
    ours.enter_raw_mode()
    ours.leave_raw_mode()
    assert ours.size() == DEFAULT_SIZE
    assert not ours.is_background()
    os.close(read)
    os.close(write)
    ours.enter_raw_mode()
    assert ours.size() == DEFAULT_SIZE


@pytest.mark.parametrize("rows, columns, size", [(50, 132, (132, 50)), (0, 0, (80, 24)), (0, 40, (40, 24))])
def test_the_size_is_that_of_the_terminal_or_the_default_if_it_has_none(
        line: Pty, rows: int, columns: int, size: tuple[int, int]) -> None:
    fcntl.ioctl(line.side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    assert Tty(line.side, line.side).size() == size


IN_BACKGROUND = """
import fcntl, os, sys, termios
from editor import Tty
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
ours = Tty(0, 0)
assert not ours.is_background()
before = termios.tcgetattr(0)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    assert ours.is_background()
    ours.enter_raw_mode()
    assert termios.tcgetattr(0) != before
    ours.leave_raw_mode()
    assert termios.tcgetattr(0) == before
    os._exit(0)
_, status = os.waitpid(child, os.WUNTRACED)
sys.exit(0 if os.WIFEXITED(status) and not os.WEXITSTATUS(status) else 1)
"""


def test_a_process_in_the_background_is_not_stopped_by_its_terminal(line: Pty) -> None:
    done = subprocess.run([sys.executable, "-c", IN_BACKGROUND], stdin=line.side, cwd=ROOT, start_new_session=True,
                          timeout=60)
    assert done.returncode == 0
