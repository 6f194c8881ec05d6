"""The map of the program (docs/architecture.md) is true: its imports, its names, its tests are those of the code."""
from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
ROOMS = re.findall(r"(?m)^\| `(\w+)` \| [^|]+ \| ([\w, ]*)\|$", PAGE)


def imports_of(tree: ast.Module) -> set[str]:
    """Return the modules of the project that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found & set(MODULES)


def test_every_module_has_its_row() -> None:
    assert [room for room, _ in ROOMS] and {room for room, _ in ROOMS} == set(MODULES)


@pytest.mark.parametrize("room, imports", ROOMS, ids=lambda part: part)
def test_a_module_imports_what_the_page_says(room: str, imports: str) -> None:
    assert imports_of(MODULES[room]) == {name.strip() for name in imports.split(",")} - {""}


def test_imports_only_go_down() -> None:
    order = [room for room, _ in ROOMS]
    for room in order:
        assert all(order.index(below) > order.index(room) for below in imports_of(MODULES[room])), room


def test_only_the_wire_knows_msgpack() -> None:
    for room, tree in MODULES.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        others = names - set(sys.stdlib_module_names) - set(MODULES)
        assert others <= ({"msgpack"} if room == "protocol" else set()), room


def defined_names() -> set[str]:
    """Return every class, function and constant at the top of a module, and every ``Class.method``."""
    found: set[str] = set()
    for tree in MODULES.values():
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, ast.ClassDef):
                found.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return found


def test_every_class_and_function_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`([A-Z]\w*(?:\.\w+)?)`", PAGE))
    states = {"OFFLINE", "REGISTERING", "SYNCING", "ONLINE", "RETURNING", "LEAVING"}
    inherited = {"Client.settle", "Server.settle"}
    assert len(named) > 40 and inherited <= named
    assert named - states <= defined_names()


def test_every_test_that_the_page_names_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
