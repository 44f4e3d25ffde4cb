"""Push a merged model of a run to the Hugging Face hub with its card, or the anchors as a data set.

python scripts/publish.py --config FILE --what merged/fda-wudi-weight --to org/name [--private] [--message TEXT]
python scripts/publish.py --config FILE --what anchors/weight         --to org/name

Anchors are pushed in the layout in which the paper's are released: --anchors.source hf://datasets/org/name/weight takes
them. The token is that of `hf auth login`; HF_ENDPOINT names another hub. --dry-run says what would be pushed.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from common.command import run
from common.config import Config
from common.core.errors import InputError
from common.domain import Domain
from common.evaluation.cards import anchor_card, write_cards
from common.io.anchor_files import axes_as_published, load_anchors
from common.io.checkpoints import write_text
from common.io.hub_files import pushed
from common.layout import PROVENANCE_FILE, RunLayout
from common.opening import open_experiment
from common.planning.dry_run import Plan, describe
from common.provenance import anchor_settings


def publish(what: str, to: str, private: bool, message: str, config: Config, domain: Domain) -> None:
    """Push what is named, and print where it is."""
    folder = whole(what, config)
    if what.startswith("merged/"):
        write_cards(config, domain)
        print(pushed(folder, to, "model", private, message or f"Merged model {folder.name}"))
        return
    of_init = replace(config, anchors=replace(config.anchors, init=folder.name))
    with tempfile.TemporaryDirectory() as place:
        count = as_released(of_init, domain, folder, Path(place) / folder.name)
        write_text(Path(place) / "README.md", anchor_card(of_init, folder.name, count))
        print(pushed(Path(place), to, "dataset", private, message or f"Anchors {folder.name}"))


def whole(what: str, config: Config) -> Path:
    """The folder of a run that is named; InputError, with what there is, if it is not there or not whole."""
    kind, _, name = what.partition("/")
    folders = sorted(config.run.dir.glob("anchors/*")) + [
        file.parent for file in sorted(config.run.dir.glob(f"merged/*/{PROVENANCE_FILE}"))
    ]
    there = [str(folder.relative_to(config.run.dir)) for folder in folders]
    if kind not in ("anchors", "merged") or not name or what not in there:
        raise InputError(f"--what {what}: {config.run.dir} has {', '.join(there) or 'nothing'} whole")
    return config.run.dir / what


def as_released(config: Config, domain: Domain, folder: Path, out: Path) -> int:
    """Write the anchors of every task and block as .npy files, in the family's published axes; how many there are.
    InputError if some were made with other settings than the config's, which their card has."""
    experiment, count = open_experiment(config, domain), 0
    for task in config.tasks:
        for index in range(experiment.depth):
            file = folder / task / RunLayout(config).anchor_file(task, index).name
            if not file.is_file():
                raise InputError(f"there are no anchors at {file}; construct_fda.py with the same config makes them")
            x_ATD = load_anchors(file, anchor_settings(experiment, task, index))
            target = out / task / f"dual_anchors_layer_{index + 1}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, axes_as_published(x_ATD, experiment.family.published_axes).numpy())
            count += 1
    return count


def plan(what: str, to: str, config: Config, domain: Domain) -> Plan:
    """What would be pushed."""
    folder = whole(what, config)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    planned = describe(config, domain)
    return Plan(
        f"{planned.text}\n\nPush\n  {len(files)} files of {folder}, {size / 2**20:.1f} MiB, to {to}", planned.refusals
    )


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--what")
    own.add_argument("--to")
    own.add_argument("--private", action="store_true")
    own.add_argument("--message", default="")
    said, others = own.parse_known_args()
    if not {"-h", "--help"} & set(sys.argv) and not (said.what and said.to):
        print("error: publish.py needs --what merged/NAME or anchors/NAME, and --to org/name", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = others
    stage = partial(publish, said.what, said.to, said.private, said.message)
    run(stage, None, __doc__, partial(plan, said.what, said.to))
