"""What gates a change: that ``.ci/run`` and the workflow which calls it say what README and setup.cfg say."""
from __future__ import annotations

import configparser
import re
import subprocess

import pytest

from tests.processes import ROOT

WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
GATE = (ROOT / ".ci" / "run").read_text()
VERSION = r"3\.\d+"


def tried() -> list[str]:
    """Return the versions of Python with which the workflow runs, in its order."""
    row, = re.findall(r"(?m)^ +python: \[(.*)\]$", WORKFLOW)
    return re.findall(rf'"({VERSION})"', row)


def setup() -> configparser.ConfigParser:
    """Return setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_versions_of_python_that_setup_cfg_promises_are_tried() -> None:
    promised = re.findall(rf"(?m)^Programming Language :: Python :: ({VERSION})$", setup()["metadata"]["classifiers"])
    assert len(promised) > 3 and tried()[:len(promised)] == promised
    assert setup()["options"]["python_requires"] == f">={promised[0]}"


def test_each_system_that_setup_cfg_promises_is_tried() -> None:
    promised = re.findall(r"(?m)^Operating System :: .*?(\w+)$", setup()["metadata"]["classifiers"])
    systems, = re.findall(r"(?m)^ +os: \[(.*)\]$", WORKFLOW)
    names = {"Linux": "ubuntu-latest", "MacOS": "macos-latest"}
    assert {names[system] for system in promised} == set(systems.split(", "))


def test_the_workflow_does_what_is_done_by_hand() -> None:
    assert re.findall(r"\brun: (.*)", WORKFLOW) == ["bash .ci/run"]
    for action in re.findall(r"\buses: (.*)", WORKFLOW):
        assert re.fullmatch(r"actions/[\w-]+@v\d+", action)


def test_the_gate_begins_with_the_test_command_of_readme() -> None:
    pattern, = re.findall(r"(?m)^test_command=\$\(grep -m1 -- '(.*)' README\.md\)", GATE)
    found = re.findall(rf"(?m)^.*{pattern}", (ROOT / "README.md").read_text())
    assert found[0].startswith("python3 -m venv .venv && ")


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (tests\.\w+)", GATE))))
def test_the_modules_that_the_gate_runs_are_there(module: str) -> None:
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()


def test_the_gate_is_a_script_that_bash_can_read() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
