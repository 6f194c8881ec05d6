"""Make the program one file that needs nothing but Python: ``python -m tests.build_zipapp [OUT]``.

OUT (``udpchat.pyz`` by default) is an archive like those of the standard library's ``zipapp``: Python runs it, and so
does a shell (``./udpchat.pyz``). In it are all modules of the program and the Python files of msgpack, with its
licence, from the environment that builds. msgpack's compiled part is left out: it is for one version of Python on one
kind of machine.

Python does not write the bytecode of modules into an archive, and compiling them at each start takes longer than all
the rest. So the bytecode for the Python that builds lies beside each module. Another version ignores it, and compiles.
Nothing is compressed: it starts sooner, and works with a Python that was built without zlib.

The same sources make the same archive, byte for byte (the bytecode from Python 3.11 on). That is why ``zipfile`` writes
it: ``zipapp`` would copy the times of the files.
"""
from __future__ import annotations

import io
import py_compile
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "udpchat.pyz"
SHEBANG = b"#!/usr/bin/env python3\n"
DAY = (1980, 1, 1, 0, 0, 0)     # the date of every file in it: the first that an archive can have
MODE = 0o644                    # and its permissions, where somebody unpacks it
LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def own_files() -> dict[str, bytes]:
    """Return the program's modules and its licence, by their names in the archive."""
    return {path.name: path.read_bytes() for path in (*ROOT.glob("*.py"), ROOT / "LICENSE")}


def msgpack_files() -> dict[str, bytes]:
    """Return msgpack's Python files and licence, by their names in the archive. End the program if one is missing."""
    try:
        files = distribution("msgpack").files or []
    except PackageNotFoundError:
        sys.exit("msgpack is not installed here")
    modules = [file for file in files if file.suffix == ".py"]
    licences = [file for file in files if file.name.startswith(LICENCES)]
    if "fallback.py" not in [file.name for file in modules]:
        sys.exit("msgpack has no Python files here; install it with pip")
    if not licences:
        sys.exit("msgpack has no licence file here, without which nobody may pass it on; install it with pip")
    return {file.as_posix(): Path(str(file.locate())).read_bytes() for file in (*modules, *licences)}


def compiled(name: str, source: bytes, folder: Path) -> bytes:
    """Return the bytecode of a module; Python uses it without a look at the source."""
    path, bytecode = folder / "module.py", folder / "module.pyc"
    path.write_bytes(source)
    py_compile.compile(str(path), str(bytecode), f"{OUT}/{name}", doraise=True, optimize=0,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    return bytecode.read_bytes()


def archive() -> bytes:
    """Return the whole file."""
    files = {**own_files(), **msgpack_files()}
    with tempfile.TemporaryDirectory() as folder:
        files.update({f"{name}c": compiled(name, source, Path(folder))
                      for name, source in files.items() if name.endswith(".py")})
    data = io.BytesIO()
    data.write(SHEBANG)
    with zipfile.ZipFile(data, "a") as file:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, DAY)
            entry.external_attr = MODE << 16
            file.writestr(entry, files[name])
    return data.getvalue()


def main(arguments: Sequence[str]) -> None:
    """Make the file, at the path that is the only argument."""
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        sys.exit("usage: python -m tests.build_zipapp [OUT]")
    path = Path(arguments[0] if arguments else OUT)
    path.write_bytes(archive())
    path.chmod(path.stat().st_mode | 0o111)


if __name__ == "__main__":
    main(sys.argv[1:])
