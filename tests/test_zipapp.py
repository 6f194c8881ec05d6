"""The program as one file: what is in it, and that it runs where there is Python and nothing else."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import files
from pathlib import Path

import pytest

from tests.build_zipapp import ROOT, SHEBANG
from tests.processes import Chat
from tests.smoke import smoke

BUILD = [sys.executable, "-m", "tests.build_zipapp"]
MODULES = {path.name for path in ROOT.glob("*.py")}
OLDER_PYTHON = "import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path(sys.argv[1], run_name='__main__')"
MAGIC = importlib.util.MAGIC_NUMBER
UNCHECKED_HASH = bytes((1, 0, 0, 0))    # the flags behind the magic number (PEP 552)
STRAY = "raise SystemExit('not a module of the program')\n"


def build(path: Path, **environment: str) -> Path:
    """Make the file at ``path``; return it."""
    subprocess.run([*BUILD, str(path)], cwd=ROOT, env={**os.environ, **environment}, check=True)
    return path


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("zipapp") / "udpchat.pyz")


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """Return an interpreter for which nothing is installed, not even pip."""
    venv.create(tmp_path / "bare", symlinks=True)
    return str(tmp_path / "bare" / "bin" / "python")


# --- what is in it ----------------------------------------------------------------------------------------------

def test_it_holds_our_modules_and_the_python_part_of_msgpack_with_bytecode_and_licences(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as file:
        assert file.testzip() is None
        names = set(file.namelist())
        licence, = [name for name in names if name.startswith("msgpack-")]
        assert b"Apache License, Version 2.0" in file.read(licence)
        assert file.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
    packed = {entry.as_posix() for entry in files("msgpack") or [] if entry.suffix == ".py"}
    assert len(packed) > 3
    modules = MODULES | packed
    assert names == {*modules, *(f"{name}c" for name in modules), licence, "LICENSE"}


def test_its_bytecode_is_used_without_a_look_at_the_sources(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as file:
        for name in file.namelist():
            assert not name.endswith(".pyc") or file.read(name).startswith(MAGIC + UNCHECKED_HASH), name


@pytest.mark.skipif(sys.version_info < (3, 11), reason="bytecode depends on PYTHONHASHSEED before Python 3.11")
def test_the_same_sources_make_the_same_file(pyz: Path, tmp_path: Path) -> None:
    for seed in "1", "2":
        assert build(tmp_path / "again.pyz", PYTHONHASHSEED=seed).read_bytes() == pyz.read_bytes()


def test_only_one_path_is_accepted(tmp_path: Path) -> None:
    for words in (["--help"], ["one.pyz", "two.pyz"]):
        shown = subprocess.run([*BUILD, *words], cwd=ROOT, stderr=subprocess.PIPE)
        assert (shown.returncode, shown.stderr) == (1, b"usage: python -m tests.build_zipapp [OUT]\n")


# --- running ----------------------------------------------------------------------------------------------------

def test_it_runs_where_there_is_python_and_nothing_else(pyz: Path, bare: str, tmp_path: Path) -> None:
    for isolated in ([], ["-I", "-S"]):
        alone = subprocess.run([bare, *isolated, "-c", "import msgpack"], stderr=subprocess.PIPE)
        assert b"No module named 'msgpack'" in alone.stderr
        folder = tmp_path / f"world{len(isolated)}"
        folder.mkdir()
        with Chat(folder, [bare, *isolated, str(pyz)]) as chat:
            smoke(chat)


def test_it_is_a_command_by_itself(pyz: Path, chat: Chat) -> None:
    assert pyz.read_bytes().startswith(SHEBANG)
    (chat.directory / "udpchat").symlink_to(pyz)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert chat.complete("--version", command=["./udpchat"], environment={"PATH": path}).wait() == 0


def test_another_version_of_python_runs_it_from_the_sources(pyz: Path, chat: Chat) -> None:
    other = chat.directory / "udpchat.pyz"
    with zipfile.ZipFile(pyz) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(MAGIC, b"\0\0\r\n", 1))
    chat.program = [sys.executable, str(other)]
    client = chat.client("alice")
    assert client.finish() == 0


def test_a_python_that_is_too_old_is_told_so(pyz: Path) -> None:
    for path in pyz, ROOT, ROOT / "udpchat.py":
        shown = subprocess.run([sys.executable, "-c", OLDER_PYTHON, str(path)], stderr=subprocess.PIPE)
        assert shown.returncode == 1
        assert shown.stderr == b"udpchat: Python 3.10 or newer is needed, this is 3.9\n"


def test_another_msgpack_does_not_matter(pyz: Path, chat: Chat) -> None:
    (chat.directory / "msgpack.py").write_text(STRAY)
    paths = {"PYTHONPATH": str(chat.directory)}
    assert chat.complete("--help", command=[sys.executable, str(pyz)], environment=paths).wait() == 0


def test_what_runs_goes_on_when_the_file_is_replaced(pyz: Path, chat: Chat) -> None:
    copy = chat.directory / "udpchat.pyz"
    copy.write_bytes(pyz.read_bytes())
    chat.program = [sys.executable, str(copy)]
    server, alice = chat.server(), chat.client("alice")
    copy.write_bytes(b"another version\n")
    assert set(alice.roster()) == {"alice"}
    bob = chat.run("client", "bob", "127.0.0.1", str(chat.port), command=[sys.executable, str(pyz)])
    alice.wait_for("bob")
    bob.feed("send alice hello\n")
    alice.see("bob: hello")
    assert (bob.finish(), alice.finish()) == (0, 0)
    server.popen.terminate()
    assert server.wait() == 0


# --- the smoke test itself --------------------------------------------------------------------------------------

def test_the_smoke_test_fails_for_a_program_that_does_not_work() -> None:
    shown = subprocess.run([sys.executable, "-m", "tests.smoke", "false"], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    assert shown.returncode == 1 and not shown.stdout
