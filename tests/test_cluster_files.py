"""What starts a Ray cluster: the launcher's file is one that Ray accepts, the SLURM script calls what it should."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from common.config import ROOT

FOLDER = ROOT / "scripts" / "cluster"
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0")" in
    scontrol) printf 'node1\\nnode2\\nnode3\\n' ;;
    python) [ "$1" = -c ] && echo 0123 || true ;;
esac
"""


def test_the_launcher_file_is_one_that_ray_accepts():
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    config = yaml.safe_load((FOLDER / "ray.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"wrokers": 2}, schema)


@pytest.fixture
def slurm(tmp_path):
    """slurm(nodes, *arguments) runs the script where SLURM, Ray and Python only note how they are called."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol", "python"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    calls = tmp_path / "calls"

    def run(nodes, *arguments):
        told = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_ID": 7, "CALLS": calls}
        told |= {"SLURM_JOB_NUM_NODES": nodes, "SLURM_CPUS_ON_NODE": 16, "FDA_RAY_WAIT": 0.2}
        told |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
        done = subprocess.run(["sh", FOLDER / "slurm.sh", *arguments], env=environment, capture_output=True, text=True)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_the_slurm_script_starts_all_nodes_and_then_the_command(slurm):
    done, calls = slurm(3, "Vision/construct_fda.py", "--config", "my.yaml")
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call.startswith("srun")] == [
        "srun --nodes=1 --ntasks=1 --nodelist=node1 ray start --head --port=20007 --num-cpus=16 --block",
        "srun --nodes=2 --ntasks=2 --exclude=node1 ray start --address=node1:20007 --num-cpus=16 --block",
    ]
    command = "python Vision/construct_fda.py --config my.yaml --run.engine ray --run.address node1:20007"
    assert calls[-1] == command


def test_the_slurm_script_on_one_node_starts_a_head_alone(slurm):
    done, calls = slurm(1, "scripts/compare.py")
    assert done.returncode == 0 and len([call for call in calls if call.startswith("srun")]) == 1


def test_the_slurm_script_says_what_it_lacks(slurm):
    done, calls = slurm(1)
    assert done.returncode == 2 and "which command?" in done.stderr and not calls
