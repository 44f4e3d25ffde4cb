"""Whether models go with the base: by what their configs say, and by what an adapter says of the base it is for.

adapter_config.json names its base by a folder or a hub id. A folder that is there is looked into. A name alone proves
nothing, since models are renamed and moved, so another name is a warning.
"""

from collections.abc import Hashable, Mapping
from pathlib import Path

from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.io.adapters import CONFIG_FILE as ADAPTER_CONFIG
from common.io.adapters import is_adapter
from common.io.model_config import (
    ModelConfig,
    compare_configs,
    config_file,
    differences,
    read_config,
    resolve,
)


def compare_models(
    base: Path, config: ModelConfig, others: Mapping[str, Path], computing: frozenset[str] = frozenset()
) -> None:
    """Compare what is beside the weights of the base and of other models, before any tensor is looked at.

    Args:
        base: Path of the base.
        config: Its config.
        others: Path of each other model, under the name of its task.
        computing: Fields that count for this architecture though they do not for others.
    Raises: InputError if the config of one makes another function of its weights, or an adapter is for another model.
    """
    for path in others.values():
        if is_adapter(path):
            check_lineage(path, base, config, computing)
    compare_configs(config, others, computing)


def check_lineage(
    adapter: Path, base: Path, config: ModelConfig | None, computing: frozenset[str] = frozenset()
) -> None:
    """Look whether an adapter names the base, and warn if it names another or a revision of it.

    Args:
        adapter: Folder of the adapter.
        base: Path of the base.
        config: Its config, if it has one.
        computing: As of `compare_models`.
    Raises: InputError if the base that is named is there and is of another architecture or size.
    """
    settings = read_config(adapter / ADAPTER_CONFIG)
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(named, str) or not named:
        return
    where = Path(named).expanduser()
    if where.exists() and where.resolve() == base.resolve():
        return
    if config and where.is_dir():
        refuse_other_model(adapter, where, config, computing)
    known = names_of(base, config)
    if where.name.casefold() not in known:
        warn(
            f"{adapter / ADAPTER_CONFIG} names the base {named}, model.base is {base}: an adapter added to other "
            "weights than it was trained from is another expert"
        )
    elif isinstance(revision, str) and revision and revision.casefold() not in known:
        warn(f"{adapter / ADAPTER_CONFIG} names revision {revision} of {named}; whether {base} is that, no file says")


def refuse_other_model(adapter: Path, named: Path, config: ModelConfig, computing: frozenset[str]) -> None:
    """InputError if the config in the folder that an adapter names is of another model than the base's config."""
    file = config_file(named)
    if not file:
        return
    written = read_config(file)
    says = f"{adapter / ADAPTER_CONFIG} names the base {named}"
    if written.get("model_type") != config.model_type:
        raise InputError(
            f"{says}, of model type {written.get('model_type')!r}; that of {config.file} is {config.model_type!r}"
        )
    counted, _ = differences(config, resolve(written, str(file)), computing)
    if counted:
        said = [f"{field} is {one!r} there and {two!r}" for field, (one, two) in counted.items()]
        raise InputError(f"{says}, which is another model: {', '.join(in_short(said))} in {config.file}")


def names_of(base: Path, config: ModelConfig | None) -> set[str]:
    """What a base may be called, in lower case: its folder, its name in the hub's cache, what its config says."""
    folder = base if base.is_dir() else base.parent  # of any file: what it is called is all that is looked for
    parts = [*folder.parts, *folder.resolve().parts]
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    names = [folder.name, folder.resolve().name, base.stem, *cached]
    origin = config.written.get("_name_or_path") if config else None
    return {name.casefold() for name in (*names, Path(origin).name if isinstance(origin, str) else "") if name}


def warn_of_equals(base: Hashable, experts: Mapping[str, Hashable], mixed: bool) -> None:
    """Say which experts are one model with the base or with another expert, by what identifies each.

    mixed: whole models are, of which the base may be one.
    """
    seen = {} if mixed else {base: "the base"}
    for task, expert in experts.items():
        other = seen.setdefault(expert, f"the expert of {task}")
        if other != f"the expert of {task}":
            then = "its task vector is zero" if expert == base else "one task vector counts twice"
            warn(f"{other} and the expert of {task} are one model, so that {then}; is that meant?")
