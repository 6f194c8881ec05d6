"""How the program is packed, and that it runs wherever it is started: installed, from a checkout, and as one file.

The source distribution and the wheel are built once, from a copy of the checkout, and the wheel is installed into an
environment of its own. Nothing comes from the network: setuptools, pip and msgpack are those that run the tests.
"""
from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.build_zipapp import archive
from tests.processes import PROGRAM, ROOT, WELCOME, Chat, received

MODULES = {path.name for path in ROOT.glob("*.py")}
FOLDERS = (".ci", ".github", "contrib", "docs")
FILES = [*ROOT.glob("*.md"), *ROOT.glob("tests/*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
SOURCES = {*MODULES, "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg",
           *(str(path.relative_to(ROOT)) for path in FILES if path.is_file())}
SHARED = {"share/man/man1/udpchat.1", "share/bash-completion/completions/udpchat", "share/zsh/site-functions/_udpchat",
          "share/fish/vendor_completions.d/udpchat.fish"}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
STRAY = "raise SystemExit('not a module of the program')\n"
NOT_OURS = {".venv/lib/stray.py", "build/lib/protocol.py"}     # the second: as an older version has left it


# --- building and installing ------------------------------------------------------------------------------------

def build(kind: str, source: Path, folder: Path) -> Path:
    """Build the ``sdist`` (source distribution) or the ``wheel`` of ``source`` in ``folder``. Return the file."""
    subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", str(folder)], cwd=source, check=True,
                   stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


class Environment:
    """A virtual environment in which what the program needs can be imported, but the program is not installed."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.commands = folder / "bin"
        self.modules = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        needed = [path for path in sys.path if path.endswith("-packages")]
        (self.modules / "needed.pth").write_text("".join(f"{path}\n" for path in needed))

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.commands / "python")

    def pip(self, *arguments: str) -> None:
        """Run pip for this environment, without the network."""
        subprocess.run([self.python, "-m", "pip", *arguments], check=True, stdout=subprocess.DEVNULL)

    def install(self, wheel: Path) -> None:
        """Install the program. (The tests' own environment has it, too: that is not looked at.)"""
        self.pip("install", "--no-index", "--no-deps", "--ignore-installed", str(wheel))

    def contents(self) -> tuple[set[str], set[str]]:
        """Return the names of what is installed: among the modules, and among the commands."""
        return ({path.name for path in self.modules.iterdir()}, {path.name for path in self.commands.iterdir()})


class Workshop:
    """What all tests of this file share: a copy of the checkout, what was built from it, and an installation."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "udpchat"
        self.sdist = folder / "sdist"
        self.wheel = folder / "wheel"
        self.environment = folder / "environment"
        self.zipapp = folder / "udpchat.pyz"
        self._done = folder / "done"

    def prepare(self) -> None:
        """Make it all, unless another process of this test run has."""
        if self._done.exists():
            return
        for name in (*SOURCES, *NOT_OURS):
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            if name in SOURCES:
                shutil.copy(ROOT / name, self.source / name)
            else:
                (self.source / name).write_text(STRAY)
        build("sdist", self.source, self.sdist)
        Environment(self.environment).install(build("wheel", self.source, self.wheel))
        self.zipapp.write_bytes(archive())
        self._done.touch()

    @property
    def script(self) -> str:
        """The installed command."""
        return str(self.environment / "bin" / "udpchat")

    @property
    def python(self) -> str:
        """The interpreter for which the program is installed."""
        return str(self.environment / "bin" / "python")

    @property
    def version(self) -> str:
        """The version in the metadata."""
        found = re.fullmatch(r"udpchat-(.*)-py3-none-any\.whl", next(self.wheel.iterdir()).name)
        assert found is not None
        return found.group(1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent      # the folder of all workers: the first that comes builds for the others
    shop = Workshop(folder / "workshop")
    with open(folder / "workshop.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shop.prepare()
    return shop


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_wheel_holds_the_modules_in_one_folder_the_manual_and_the_completions(workshop: Workshop) -> None:
    metadata, data = f"udpchat-{workshop.version}.dist-info/", f"udpchat-{workshop.version}.data/data/"
    names = names_in(next(workshop.wheel.iterdir()))
    assert {name for name in names if not name.startswith(metadata)} == {
        *(f"udpchat/{name}" for name in MODULES), *(data + name for name in SHARED)}


def test_source_distribution_is_enough_to_build_the_same_wheel(workshop: Workshop, tmp_path: Path) -> None:
    archive = next(workshop.sdist.iterdir())
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert SOURCES <= names and not NOT_OURS & names
    assert names_in(build("wheel", source, tmp_path / "wheel")) == names_in(next(workshop.wheel.iterdir()))


def test_installation_adds_a_folder_its_metadata_and_a_command_and_all_of_that_can_be_removed(
        workshop: Workshop, chat: Chat) -> None:
    environment = Environment(chat.directory / "environment")
    before = environment.contents()
    environment.install(next(workshop.wheel.iterdir()))
    modules, commands = environment.contents()
    assert modules - before[0] == {"udpchat", f"udpchat-{workshop.version}.dist-info"}
    assert commands - before[1] == {"udpchat"}
    shared = [environment.commands.parent / name for name in SHARED]
    assert all(path.is_file() for path in shared)
    assert chat.complete("--help", command=[str(environment.commands / "udpchat")]).wait() == 0
    environment.pip("uninstall", "-y", "udpchat")
    assert environment.contents() == before and not any(path.exists() for path in shared)


# --- running ----------------------------------------------------------------------------------------------------

WAYS = ("command", "module", "checkout", "one file")


def way_to_run(workshop: Workshop, way: str) -> list[str]:
    """Return the words that start the program: as it is installed (in two ways), from a checkout, or as one file."""
    return {"command": [workshop.script], "module": [workshop.python, "-m", "udpchat"], "checkout": PROGRAM,
            "one file": [workshop.python, str(workshop.zipapp)]}[way]


def put_strays(folder: Path) -> None:
    """Put modules with the names of ours into ``folder``, which end any program that imports them."""
    folder.mkdir(exist_ok=True)
    for name in MODULES - {"udpchat.py"}:
        (folder / name).write_text(STRAY)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_same_program_and_its_version_is_that_of_the_metadata(
        workshop: Workshop, chat: Chat, way: str) -> None:
    command = way_to_run(workshop, way)
    shown = chat.complete("--version", command=command)
    assert (shown.wait(), shown.lines) == (0, [f"udpchat {workshop.version}"])
    wrong = chat.complete(command=command)
    assert (wrong.wait(), wrong.lines) == (2, [])
    assert "usage: udpchat" in wrong.errors[0]


@pytest.mark.parametrize("way", WAYS)
def test_modules_of_the_same_names_elsewhere_do_not_matter(workshop: Workshop, chat: Chat, way: str) -> None:
    """They are in the current folder, and in one on PYTHONPATH."""
    put_strays(chat.directory)
    put_strays(chat.directory / "path")
    command, paths = way_to_run(workshop, way), {"PYTHONPATH": str(chat.directory / "path")}
    stray = chat.complete("-c", "import protocol", command=[workshop.python], environment=paths)
    assert stray.errors == ["not a module of the program"]
    server = chat.run("server", "0", "--host", "127.0.0.1", "--store", ":memory:", command=command, environment=paths)
    port = server.see_match(r"\[Server listening on .*:(\d+)\]").group(1)
    bob = chat.run("client", "bob", "127.0.0.1", port, command=command, environment=paths)
    bob.see(WELCOME)
    alice = chat.run("client", "alice", "127.0.0.1", port, command=command, environment=paths)
    alice.see(WELCOME)
    alice.feed("send bob hello\n")
    bob.see("alice: hello")
    alice.see(received("bob"))
    assert (alice.finish(), bob.finish()) == (0, 0)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize("way", WAYS)
def test_it_runs_where_python_looks_in_no_unsafe_folder(workshop: Workshop, chat: Chat, way: str) -> None:
    put_strays(chat.directory)
    paths = {"PYTHONPATH": str(chat.directory), "PYTHONSAFEPATH": "1"}
    assert chat.complete("--help", command=way_to_run(workshop, way), environment=paths).wait() == 0


@pytest.mark.parametrize("way", WAYS)
def test_another_folder_of_the_name_udpchat_does_not_matter(workshop: Workshop, chat: Chat, way: str) -> None:
    """As in the user's state directory: there is one, with the stores of servers in it."""
    put_strays(chat.directory / "udpchat")
    (chat.directory / "udpchat" / "__main__.py").unlink()
    paths = {"PYTHONPATH": str(chat.directory)}
    assert chat.complete("--help", command=way_to_run(workshop, way), environment=paths).wait() == 0


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_while_modules_are_imported_ends_it_without_a_traceback(
        workshop: Workshop, chat: Chat, way: str) -> None:
    (chat.directory / "argparse.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    alice = chat.run("client", "alice", command=way_to_run(workshop, way),
                     environment={"PYTHONPATH": str(chat.directory)})
    assert alice.wait() == -signal.SIGINT and not alice.err.data


def test_a_checkout_runs_as_a_module_and_as_a_folder(workshop: Workshop) -> None:
    """From its own folder, and, since that is named ``udpchat``, also from the folder in which it lies."""
    for folder, words in ((workshop.source, ["-m", "udpchat"]), (workshop.source.parent, ["-m", "udpchat"]),
                          (workshop.source, ["."]), (workshop.source.parent, ["udpchat"])):
        shown = subprocess.run([sys.executable, *words, "--version"], cwd=folder, check=True, stdout=subprocess.PIPE)
        assert shown.stdout.decode() == f"udpchat {workshop.version}\n"


def test_a_link_to_the_script_of_a_checkout_runs_its_modules(chat: Chat) -> None:
    put_strays(chat.directory)
    (chat.directory / "link").symlink_to(ROOT / "udpchat.py")
    assert chat.complete("--help", command=[sys.executable, str(chat.directory / "link")]).wait() == 0
