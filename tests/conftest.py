"""What all tests share: fixtures, how many processes run them, and how many random examples they try.

A fixture that is about a class of one test file stands in that file, with the class; all others stand here.

A test marked ``storm`` is long and random. ``python -m pytest`` leaves storms out; ``python -m pytest -m storm`` runs
them, and with them every test of hypothesis, with many more examples than by default.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.processes import Chat

WORKERS_PER_CORE = 3      # tests with real processes wait for two thirds of their time
MAX_WORKERS = 16          # beyond that, another one takes longer to start than it saves
EXAMPLES, STORM_EXAMPLES = 50, 500

# a machine that is busy with other tests is no fault of the code: no deadline; and every run tries the same examples
settings.register_profile("default", deadline=None, database=None, derandomize=True, max_examples=EXAMPLES)
settings.register_profile("storm", settings.get_profile("default"), max_examples=STORM_EXAMPLES)


def is_storm(config: pytest.Config) -> bool:
    """Return whether the command line asks for the storms."""
    return bool(config.option.markexpr == "storm")


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples hypothesis tries, before the test files are imported."""
    settings.load_profile("storm" if is_storm(config) else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Make the tests of hypothesis storms where storms are asked for; its state machines carry its marker."""
    if is_storm(config):
        for item in items:
            is_given = getattr(getattr(item, "function", None), "is_hypothesis_test", False)
            if is_given or item.get_closest_marker("hypothesis") is not None:
                item.add_marker("storm")


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return the number of processes that run tests: it follows the machine, and is 0 for tests that are named."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None                     # the way of pytest-xdist to say how many; it looks by itself
    if all("::" in argument for argument in config.args):
        return 0                        # a few tests have ended before other processes would have started
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(WORKERS_PER_CORE * cores, MAX_WORKERS)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the compiled modules of the programs under test, also where Python is told to keep none.

    Hundreds of processes are started, and to compile its modules takes each longer than all else that it does.
    """
    if not sys.dont_write_bytecode:
        yield
        return
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:     # its own directory is in the one of the whole run
        directory = directory.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(directory / "compiled"))
        yield


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    """Yield a world of real processes, and end them when the test is over."""
    with Chat(tmp_path) as world:
        yield world


@pytest.fixture
def open_pipe() -> Iterator[tuple[int, int]]:
    """Yield the two ends of a pipe that stays open, the one to read from first."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)
