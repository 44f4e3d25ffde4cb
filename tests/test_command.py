"""Commands: whose config they take, and what they say where something is wrong."""

import re
import signal
import subprocess
import sys

import pytest
import yaml

from common.command import unforeseen
from common.config import ROOT, as_dict
from common.run.progress import UnitBar
from helpers import command

# A bug that no check foresees, put into the reading of the base's header before the command runs as it is.
WITH_A_BUG = """
import runpy, sys
import common.opening as opening
def broken(path, names=str):
    raise KeyError("a.weight")
opening.Checkpoint = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("recipe", "config", "said"),
    [
        ("Vision/construct_fda.py", "nlu/toy", "the command of vision, the config is of domain nlu; .* in NLU/"),
        ("NLU/adapt.py", "vision/toy", "the command of nlu, the config is of domain vision; .* in Vision/"),
    ],
)
def test_a_recipe_refuses_a_config_of_another_domain(recipe, config, said, tmp_path):
    done = command(recipe, "--config", f"configs/{config}.yaml", "--dry-run", "--run.root", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"error: this is {said}\n", done.stderr)


def test_a_command_that_merges_says_where_the_model_is(pico_config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(pico_config).items() if k != "dry_run"}))
    for _ in range(2):  # made, and found to be there
        done = command("scripts/merge.py", "--config", file, "--start.method", "ta", "--run.score", "false")
        assert done.returncode == 0 and done.stdout == f"the merged model is in {pico_config.run.dir}/merged/ta\n"


def test_a_bug_is_one_sentence_and_the_traceback_is_there_for_who_asks(pico_config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in as_dict(pico_config).items() if k != "dry_run"}))
    for more in ([], ["--dry-run"]):
        done = command("-c", WITH_A_BUG, "scripts/merge.py", "--config", file, "--start.method", "ta", *more)
        said, how = done.stderr.splitlines()
        base = f"{pico_config.model.root}/base"
        assert done.returncode == 1 and said == f"error: stopped at opening base, {base} by KeyError: 'a.weight'"
        assert "FDA_DEBUG=1" in how
    done = command("-c", WITH_A_BUG, "scripts/merge.py", "--config", file, "--start.method", "ta", FDA_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'a.weight'" in done.stderr


def test_a_reader_that_has_had_enough_is_no_error():
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "scripts/reproduce.py", "toys", "--dry-run"], **settings) as done:
        done.stdout.close()  # as head does, before the command has begun to speak
        assert (done.stderr.read(), done.wait()) == ("", 128 + signal.SIGPIPE)


def test_a_bug_in_a_unit_of_work_names_the_unit():
    with pytest.raises(ZeroDivisionError) as raised, UnitBar("construct", 1) as bar, bar.unit("DTD, block 3"):
        print(1 // 0)
    assert unforeseen(raised.value) == (
        "stopped at construct, DTD, block 3 by ZeroDivisionError: integer division or modulo by zero"
    )


def test_a_message_of_several_lines_is_one_sentence():
    assert unforeseen(RuntimeError("a\n  b")) == "stopped by RuntimeError: a b"
    assert unforeseen(RuntimeError()) == "stopped by RuntimeError: it says no more"


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print("loaded:", *sorted(sys.modules))
"""


@pytest.mark.parametrize("script", ["scripts/merge", "scripts/compare", "Vision/construct_fda", "NLG/adapt"])
def test_help_loads_no_library_that_it_does_not_need(script):
    """Each of these takes from half a second to three; torch is there for the names of the merge methods."""
    done = command("-c", HELP, f"{script}.py")
    shown, _, loaded = done.stdout.rpartition("loaded: ")
    assert "--start.method" in shown and done.returncode == 0
    heavy = {"matplotlib", "datasets", "pandas", "sklearn", "scipy", "transformers", "open_clip", "triton"}
    assert heavy & set(loaded.split()) == set() and "torch" in loaded.split()
