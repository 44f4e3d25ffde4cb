"""Power cuts: a command killed at random moments and started again ends with the bytes of one left alone."""

import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from common.config import ROOT, as_dict

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["construct_fda", "adapt"])
def test_five_kills_change_no_byte(pico_config, tmp_path, stage):
    settings = {k: v for k, v in as_dict(pico_config).items() if k != "dry_run"}
    settings["anchors"] |= {"steps": 300}
    settings["adapt"] |= {"epochs": 200}
    settings["run"]["score"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def command(name, what=stage):
        recipe = [sys.executable, str(ROOT / "Vision" / f"{what}.py"), "--config", str(tmp_path / "config.yaml")]
        return [*recipe, "--run.name", name]

    for name in ("alone", "killed"):
        if stage == "adapt":
            subprocess.run(command(name, "construct_fda"), check=True, capture_output=True)
    began = time.monotonic()
    subprocess.run(command("alone"), check=True, capture_output=True)
    takes = time.monotonic() - began
    kills, moments = 0, random.Random()
    while kills < 5:
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1) * takes)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:  # it got through before the blow: begin anew
            subprocess.run(["rm", "-r", str(tmp_path / "killed" / "merged")], check=False)
            if stage == "construct_fda":
                subprocess.run(["rm", "-r", str(tmp_path / "killed")], check=False)
    subprocess.run(command("killed"), check=True, capture_output=True)
    for folder in ("anchors", "merged"):
        alone, killed = (
            {
                f.relative_to(tmp_path / n / folder): f.read_bytes()
                for f in (tmp_path / n / folder).rglob("*.safetensors")
            }
            for n in ("alone", "killed")
        )
        assert alone == killed
