"""What options of a model decide of what lies in a merged folder besides the checkpoints: a part of its provenance.

An option that is not set adds nothing, so that the provenance of models made before there was this record stays true.
"""

from collections.abc import Iterable
from typing import Any

from common.config import Config, Model
from common.io.bytes_of import beside_model, whole_model
from common.io.checkpoints import Checkpoint
from common.io.config_fields import computing_fields
from common.io.hashes import file_hash, identity
from common.io.model_config import config_file, read_config
from common.io.model_files import OPEN_CLIP_CONFIG, folder_of

WHERE_SET = ("arch", "heads")  # recorded where they are set alone
NAMED = ("text", "head_files")  # contents of files that other options name, recorded where these are set alone


def written_as(config: Config) -> dict[str, Any]:
    """The options that say how a merged model is written, as the config has them. Of a language model `arch` is one
    only where no config lies beside the base."""
    model = config.model
    always = {"vocabulary": model.vocabulary, "dtype": model.dtype, "tokenizers": model.tokenizers}
    found = always | {name: getattr(model, name) for name in WHERE_SET if getattr(model, name)}
    if config.domain == "nlg" and model.arch and config_file(model.path("base")):
        del found["arch"]
    return found


def set_options(config: Config) -> dict[str, Any]:
    """Those that are recorded where they are set alone, and the contents of what they name."""
    written = written_as(config)
    return {name: written[name] for name in WHERE_SET if name in written} | contents_of(config)


def contents_of(config: Config) -> dict[str, Any]:
    """What identifies the files that options name and that are copied into a merged folder: the text tower of another
    checkpoint, heads, which may be in files of their own, and tokenizers of experts that are not merged."""
    model = config.model
    text = {"text": Checkpoint(model.path("text")).fingerprint()} if model.text and model.path("text").exists() else {}
    unmerged = [task for task in model.tokenizers if task not in config.tasks]
    experts = {task: model.path("expert", task) for task in (*model.heads, *unmerged)}
    there = {task: path for task, path in experts.items() if path.exists()}  # else the export refuses it
    found = {
        "head_files": head_files(model, model.heads),
        "heads_of": {task: identity(whole_model(there[task])) for task in model.heads if task in there},
        "tokenizers_of": {task: identity(beside_model(there[task])) for task in unmerged if task in there},
    }
    return text | {name: files for name, files in found.items() if files}


def computed_as(model: Model) -> dict[str, Any]:
    """What says how the base's layers compute besides its weights: the architecture, where it is set, and what tells
    from others the fields of the config beside it on which that hangs. A name of a tool or a token changes nothing."""
    base = model.path("base")
    clip = folder_of(base) / OPEN_CLIP_CONFIG
    files = [file for file in (config_file(base), clip if clip.is_file() else None) if file]
    fields = {"computing_fields": identity([computing_fields(read_config(file)) for file in files])} if files else {}
    return ({"arch": model.arch} if model.arch else {}) | fields


def head_files(model: Model, tasks: Iterable[str]) -> dict[str, str]:
    """{task: hash} of those heads of tasks that model.head names a file of."""
    files = {task: model.path("head", task) for task in tasks} if model.head else {}
    return {task: file_hash(file) for task, file in files.items() if file.is_file()}
