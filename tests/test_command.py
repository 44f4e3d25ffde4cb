"""Commands: whose config they take, and what they say where something is wrong."""

import re
import subprocess
import sys

import pytest

from common.config import ROOT


def command(*arguments, environment=None):
    """A command of the project as a user runs it, from its folder."""
    run = [sys.executable, *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("recipe", "config", "said"),
    [
        (
            "Vision/construct_fda.py",
            "nlu/toy",
            "this is the command of vision, the config is of domain nlu; .* in NLU/",
        ),
        ("NLU/adapt.py", "vision/toy", "this is the command of nlu, the config is of domain vision; .* in Vision/"),
    ],
)
def test_a_recipe_refuses_a_config_of_another_domain(recipe, config, said, tmp_path):
    done = command(recipe, "--config", f"configs/{config}.yaml", "--dry-run", "--run.root", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(f"error: {said}\n", done.stderr)
