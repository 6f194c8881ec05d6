"""The manual page and the completions: they are what the parser says, and the programs that read them accept them."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import udpchat
from home import remember_nicks
from tests.build_manual import FOLDER, files
from tests.processes import Chat
from tests.test_screen import CONTROL_D, Open, Window, open_window    # noqa: F401

BASH = """
source {path}
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_udpchat
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def needs(program: str) -> None:
    """Skip the test where a program is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on this machine")


def completed(state: Path, *words: str) -> list[str]:
    """Return what bash makes of the last word."""
    needs("bash")
    line = " ".join(f"'{word}'" for word in words)
    script = BASH.format(path=FOLDER / "completion" / "udpchat", words=line)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True,
                          env={**os.environ, "XDG_STATE_HOME": str(state)})
    assert not done.stderr
    return [word for word in done.stdout.split("\n") if word]


@pytest.mark.parametrize("path", sorted(files()), ids=lambda path: str(path.name))
def test_the_files_are_as_the_parser_makes_them(path: Path) -> None:
    assert path.read_text() == files()[path], "python -m tests.build_manual makes it again"


def test_the_manual_page_names_every_option() -> None:
    page = (FOLDER / "udpchat.1").read_text().replace("\\-", "-")
    for mode in udpchat.MODES:
        names = udpchat.build_parser(mode)[1].long_options
        assert len(names) > 5 and all(f"--{name}" in page for name in names)
    assert os.path.expanduser("~") + "/.config" not in page


def test_the_manual_page_is_one(tmp_path: Path) -> None:
    needs("mandoc")
    checked = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(FOLDER / "udpchat.1")],
                             capture_output=True, text=True)
    assert checked.stdout + checked.stderr == ""


def test_bash_completes_modes_options_and_values(tmp_path: Path) -> None:
    assert completed(tmp_path, "udpchat", "s") == ["server", "send"]
    assert completed(tmp_path, "udpchat", "send", "--ti") == ["--timeout"]
    assert completed(tmp_path, "udpchat", "client", "--color", "a") == ["auto", "always"]
    assert "--store" in completed(tmp_path, "udpchat", "server", "-")
    (tmp_path / "some.log").touch()
    assert completed(tmp_path, "udpchat", "server", "--log-file", f"{tmp_path}/so") == [f"{tmp_path}/some.log"]


def test_bash_completes_the_nicks_that_were_seen_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(tmp_path, "udpchat", "send", "b") == []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember_nicks(["alice", "bob", "bo\u00efken"])
    assert completed(tmp_path, "udpchat", "send", "b") == ["bob", "bo\u00efken"]
    assert completed(tmp_path, "udpchat", "send", "bob,a") == ["bob,alice"]
    assert completed(tmp_path, "udpchat", "ask", "al") == ["alice"]
    assert completed(tmp_path, "udpchat", "recv", "--fr") == ["--from"]


@pytest.mark.parametrize("shell, name", [("bash", "udpchat"), ("zsh", "_udpchat"), ("fish", "udpchat.fish")])
def test_shells_can_read_their_completion(shell: str, name: str) -> None:
    needs(shell)
    subprocess.run([shell, "-n", str(FOLDER / "completion" / name)], check=True)


def test_fish_completes(tmp_path: Path) -> None:
    needs("fish")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    (tmp_path / "udpchat").mkdir()
    (tmp_path / "udpchat" / "nicks").write_text("alice\nbob\n")

    def found(line: str) -> list[str]:
        script = f"source {FOLDER / 'completion' / 'udpchat.fish'}; complete -C '{line}'"
        done = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True, env=environment)
        return [entry.split("\t")[0] for entry in done.stdout.splitlines()]
    assert found("udpchat se") == ["send", "server"]
    assert "--timeout" in found("udpchat send --t")
    assert found("udpchat send al") == ["alice"]


def test_a_client_on_a_terminal_remembers_the_nicks_when_it_ends(open_window: Open, chat: Chat) -> None:  # noqa: F811
    chat.absent("bob")
    alice: Window = open_window()
    alice.type(CONTROL_D)
    alice.ends()
    assert (chat.state / "udpchat" / "nicks").read_text() == "alice\nbob\n"
    assert not [path for path in (chat.state / "udpchat").iterdir() if path.name.startswith("nicks.")]
