"""The launchers' environment: what is installed when, told by a `python` that writes down how it was called."""

import json
import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from common.config import ROOT

PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$VIRTUAL_ENV"; else echo "$@" >> "$VIRTUAL_ENV/calls"; fi
"""


@pytest.fixture
def sourced(tmp_path):
    """A call sources environment.sh in a copy of what it reads, and returns how pip was called."""
    environment, copy = tmp_path / "env", tmp_path / "copy"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(PYTHON)
    (environment / "bin" / "python").chmod(0o755)
    (copy / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/environment.sh", "scripts/constraints.txt"):
        shutil.copy(ROOT / name, copy / name)

    def call(**variables):
        (environment / "calls").write_text("")
        path = f"{environment / 'bin'}:{os.environ['PATH']}"
        env = {"PATH": path, "VIRTUAL_ENV": str(environment), **variables}
        command = ["sh", "-eu", "-c", ". scripts/environment.sh"]
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr, (environment / "calls").read_text()

    call.copy = copy
    return call


def test_tested_versions_are_installed_once(sourced):
    _, _, first = sourced()
    assert "pip install" in first and "--constraint scripts/constraints.txt" in first and "--upgrade" not in first
    assert sourced() == (0, "", "")


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_what_changed_is_installed_again(sourced, name):
    sourced()
    with (sourced.copy / name).open("a") as file:
        file.write("# more\n")
    assert "pip install" in sourced()[2]


def test_newest_versions_are_asked_for(sourced):
    sourced()
    _, _, newest = sourced(FDA_LATEST="1")
    assert "--upgrade --upgrade-strategy eager" in newest and "constraint" not in newest
    assert sourced(FDA_LATEST="1")[2] == ""
    assert "--constraint" in sourced()[2], "back to the tested versions"


def test_other_values_of_the_switch_are_refused(sourced):
    status, said, calls = sourced(FDA_LATEST="yes")
    assert status == 2 and "FDA_LATEST is 'yes'" in said and not calls


def test_constraints_pin_what_the_project_names_and_no_gpu_build():
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "scripts/constraints.txt").read_text(), re.MULTILINE)
    lines = [line for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) == len(lines) == len(set(pins)), "one NAME==VERSION a line"
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named, developers = (
        [re.match(r"[\w-]+", each)[0] for each in listed]
        for listed in (project["dependencies"], project["optional-dependencies"]["dev"])
    )
    assert "torch" in named and "pytest" in developers
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in [*named, *developers]} <= pinned
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_same_checks_before_a_commit_and_before_the_tests():
    script = (ROOT / "scripts/test.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = re.findall(r"^python -m (ruff check|ruff format --check|pyright)", script, re.M)
    assert [hook["entry"].removeprefix("python -m ") for hook in hooks] == checks
    assert len(checks) == 3 and script.index("pyright") < script.index("pytest -q -n auto")


def test_workflow_runs_the_one_script():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert "sh scripts/test.sh" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]


def test_problems_are_reported_with_run_json():
    fields = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text())["body"]
    assert "run.json" in [field["attributes"]["label"] for field in fields]
    assert "run.json" not in json.dumps([f for f in fields if f["id"] != "run"])
