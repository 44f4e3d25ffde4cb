"""Merged checkpoints as they are written, and adapted models put together. Where they lie is in layout.py."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from common.core.errors import InputError
from common.core.task_vectors import LazyTensor
from common.domain import Domain
from common.experiment import Experiment
from common.io.checkpoints import Checkpoint, read_header, write_text
from common.io.locks import locked
from common.io.model_files import CONFIG_FILE
from common.io.sentence_modules import compare_modules, write_modules
from common.io.surroundings import lend_surroundings
from common.io.tokens import write_with_more
from common.io.unstacked import unstacked
from common.io.written import set_options
from common.layout import ADAPTATION_FILE, CARD, PROVENANCE_FILE, SAME_REST, RunLayout, with_same_rest
from common.provenance import is_finished, read_provenance, written_files, written_weights
from common.run.run_log import commit, computed_on

UNFINISHED = ".unfinished"  # it lies in a folder while a model is written there, and after a kill
PIECES = ("blocks", "parts")
PASSING = (*(f"{pieces}/" for pieces in PIECES), PROVENANCE_FILE, CARD)  # what goes, and what is written anew


def require_free(folder: Path) -> None:
    """InputError if something lies where a model is to be written that is not of a model of ours, whole or interrupted:
    writing would replace it, and it may be one of the models that are merged."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if there.exists() and not there.is_dir():
        raise InputError(f"{there} is a file, where the folder {folder} is to be; move it away")
    if there != folder or any((folder / name).is_file() for name in (PROVENANCE_FILE, UNFINISHED)):
        return
    known = {*PIECES, ADAPTATION_FILE}
    strange = next((each for each in sorted(folder.iterdir()) if each.name not in known and each.name[0] != "."), None)
    if strange:
        raise InputError(
            f"{strange} lies where a merged model is to be written, and no run of this project left it there; move it "
            "away, or choose another run.name"
        )


def assemble(experiment: Experiment, domain: Domain, start: Checkpoint, provenance: Mapping[str, Any]) -> None:
    """Put the adapted blocks and the rest together, unless blocks are missing because they are made elsewhere."""
    layout, blocks = RunLayout(experiment.config), range(experiment.depth)
    with locked(folder := layout.adapted):
        if not is_finished(folder, provenance):  # by another process, which removed the blocks
            if missing := [i for i in blocks if not layout.block_file(i).is_file()]:
                print(f"{folder}: not put together yet, blocks {', '.join(map(str, missing))} are missing")
                return
            curves = {i: read_header(layout.block_file(i))["trace"] for i in blocks}
            write_text(folder / ADAPTATION_FILE, json.dumps({"traces": curves}) + "\n")
            finish(experiment, domain, adapted_tensors(experiment, start), folder, provenance)
        remove_pieces(folder)


def start_in_base(experiment: Experiment, domain: Domain, start: Checkpoint) -> None:
    """Write the start's blocks within the rest of the pretrained model: what adaptation began from where adapt.rest is
    pretrained, so that its gain can be told from that of the rest.
    """
    folder = with_same_rest(start.path)
    start = unstacked(start, experiment.family.pieces)
    inputs: dict[str, Any] = {"start": start.fingerprint(), "base": experiment.base.fingerprint()}
    inputs |= {"model": options} if (options := set_options(experiment.config)) else {}
    provenance = {"start": read_provenance(start.path)["start"], "label": SAME_REST, "inputs": inputs}
    with locked(folder):
        require_free(folder)
        if is_finished(folder, provenance):
            return
        tensors = start.lazy(experiment.base.names(experiment.family.scope))
        finish(experiment, domain, tensors | experiment.base.lazy(experiment.rest_names()), folder, provenance)


def remove_pieces(folder: Path) -> None:
    """Remove the blocks or parts that a model was put together from; they may be gone already."""
    for pieces in PIECES:
        shutil.rmtree(folder / pieces, ignore_errors=True)


def adapted_tensors(experiment: Experiment, start: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor of the adapted model: the fitted blocks, and the rest as adapt.rest says."""
    settings = experiment.config.adapt.for_start(experiment.config.start.method)
    tensors = (start if settings.rest == "start" else experiment.base).lazy(experiment.rest_names())
    for index, prefix in enumerate(experiment.prefixes):
        block = Checkpoint(RunLayout(experiment.config).block_file(index))
        tensors |= {prefix + name: tensor for name, tensor in block.lazy(block.names()).items()}
    if settings.blend == 1:
        return tensors
    return {n: LazyTensor(t.shape, (partial(blended, start, n, t, settings.blend),)) for n, t in tensors.items()}


def blended(start: Checkpoint, name: str, adapted: LazyTensor, blend: float) -> Tensor:
    """One tensor between the start's, at 0, and the adapted one, at 1."""
    (make,), theta = adapted.parts, start.read_one(name)
    return theta + blend * (make().to(theta) - theta)


def finish(
    experiment: Experiment,
    domain: Domain,
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    provenance: Mapping[str, Any],
) -> None:
    """Write a checkpoint and, when it is whole, its provenance."""
    write_text(mark := folder / UNFINISHED, "")
    try:
        write_model(experiment, domain, tensors, folder)
        birth = {"commit": commit(), "made_on": computed_on(experiment.device)}
        files = [name for name in written_files(folder) if not name.startswith(PASSING)]
        made = {**provenance, "weights": written_weights(folder), "files": files, **birth}
        write_text(folder / PROVENANCE_FILE, json.dumps(made, indent=2, sort_keys=True) + "\n")
    except InputError:
        if list(folder.iterdir()) == [mark]:  # what is refused leaves nothing
            mark.unlink()
            folder.rmdir()
        raise
    mark.unlink()


def write_model(experiment: Experiment, domain: Domain, tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    """Write a checkpoint that stock libraries open."""
    domain.export(experiment.config.model, tensors, folder)
    paths = {task: expert.path for task, expert in experiment.experts.items()}
    lend_surroundings(folder, paths)
    modules = compare_modules(experiment.base.path, paths, bool(experiment.family.vocabulary))
    # sentence-transformers opens what transformers does
    write_modules(modules if (folder / CONFIG_FILE).is_file() else None, folder)
    if experiment.matching.more:
        write_with_more(experiment.base.folder, folder, experiment.matching.more)
