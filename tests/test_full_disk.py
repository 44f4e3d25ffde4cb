"""A disk that is full or read-only: exit 2 and one sentence that names the file; with room the same bytes as ever.

The disks are file systems in memory, which only root may mount.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from commands import Place, call
from common.config import Config
from helpers import change, files_of
from pico_nlg import pico_config as nlg_config
from pico_vision import pico_config

KIB = 2**10
TOLD = ("run.json", "report.html")  # what happened
ROOMY = 64 * 2**20
STAGES = {
    "vision": ["Vision/construct_fda.py", "scripts/merge.py", "Vision/adapt.py"],
    "nlg": ["NLG/construct_fda.py", "scripts/merge.py", "NLG/adapt.py"],
}


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk of so many bytes at tmp_path/disk, or gives the mounted one another size."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def sized(size: int, options: str = "") -> Path:
        how = f"{'remount,' if mounted else ''}size={size}{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"no file system in memory can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.append(size)
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def experiment(domain: str, inputs: Path, out: Path) -> Config:
    made = pico_config(inputs, out) if domain == "vision" else nlg_config(inputs, out)
    return change(change(made, "run", score=False), "start", method="ta")


def refusal(said: str, folder: Path) -> None:
    """One sentence that names a file on the disk, and nothing half written beside it."""
    sentence = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentence) == 1 and str(folder) in sentence[0] and said.endswith(f"{sentence[0]}\n"), said
    assert not list(folder.rglob("*.tmp")), said


@pytest.mark.parametrize("domain", STAGES)
def test_a_full_disk_loses_nothing(domain, request, disk, tmp_path):
    """It fills up at ever later places; in the end every file is that of a run on a disk with room."""
    inputs = request.getfixturevalue("pico_inputs" if domain == "vision" else "nlg_inputs")
    alone = experiment(domain, inputs, tmp_path / "alone")
    folder = disk(16 * KIB)
    config = experiment(domain, inputs, folder)
    refused = 0
    for script in STAGES[domain]:
        assert call(Place(tmp_path, "", script, alone))[0] == 0
        place, size = Place(tmp_path, "", script, config), shutil.disk_usage(folder).used + 8 * KIB
        while size < ROOMY:
            disk(size)
            code, said = call(place)
            if code == 0:
                break
            assert code == 2, said
            refusal(said, folder)
            refused += 1
            size = max(int(size * 1.3), shutil.disk_usage(folder).used + 4 * KIB)
    assert refused > len(STAGES[domain])
    whole, again = (
        {name: held for name, held in files_of(c.run.dir).items() if name not in TOLD} for c in (alone, config)
    )
    assert whole == again


@pytest.mark.parametrize("domain", STAGES)
def test_a_read_only_disk_is_refused_by_name(domain, request, disk, tmp_path):
    inputs = request.getfixturevalue("pico_inputs" if domain == "vision" else "nlg_inputs")
    folder = disk(ROOMY)
    config = experiment(domain, inputs, folder)
    for script in STAGES[domain]:
        disk(ROOMY, ",ro")
        before = files_of(folder)
        code, said = call(Place(tmp_path, "", script, config))
        assert code == 2, said
        refusal(said, folder)
        disk(ROOMY, ",rw")
        assert files_of(folder) == before
        assert call(Place(tmp_path, "", script, config))[0] == 0
