"""open_clip's config file beside the weights: which model it describes, and whether two files describe the same.

Other layouts of CLIP's weights, of Hugging Face and of timm, are told from their files and called what they are.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from common.config import Config, Model
from common.core.errors import InputError, in_short
from common.core.notices import warn
from common.domain import other_models
from common.io.adapters import is_adapter
from common.io.checkpoints import plain_names
from common.io.config_fields import flat, is_off
from common.io.lineage import check_lineage
from common.io.model_config import config_file, read_config
from common.io.model_files import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, folder_of
from Vision.hf_files import CLASSIFIERS, TWO_TOWERS, kind_of
from Vision.zero_shot import refuse_heads

# Fields that change no image's way through the tower: training, which weights to begin with, the text's tokenizer.
HARMLESS = frozenset((
    "patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained", "init_logit_scale",
    "init_logit_bias", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
))  # fmt: skip
# What the tensors of other layouts of these models begin with.
LAYOUTS = {
    "vision_model.": "Hugging Face's layout of a model",
    "text_model.": "Hugging Face's layout of a model",
    "vit.": "Hugging Face's layout of a model",
    "blocks.": "timm's layout of a ViT",
    "visual.trunk.": "an image tower of timm that is no ViT",
    "visual.layer1.": "a ResNet",
}
OTHER_TOWERS = ("visual.trunk.", "visual.layer1.")  # of open_clip, but no VisionTransformer


def clip_file(path: Path) -> Path | None:
    """The open_clip_config.json of the model at a path: in the folder, or beside the file that open_clip saves."""
    file = folder_of(path, OPEN_CLIP_FILES) / OPEN_CLIP_CONFIG
    return file if file.is_file() else None


def of_transformers(path: Path) -> bool:
    """Whether a model is a CLIP of transformers, whose tensors can be read under open_clip's names (layouts.py)."""
    return not is_adapter(path) and not clip_file(path) and kind_of(path) == "clip"


def resolve(fields: Mapping[str, Any], file: str) -> dict[str, Any]:
    """An open_clip config with all defaults: {"vision_cfg.head_width": 64}; InputError if open_clip cannot read it."""
    try:
        model = dict(fields["model_cfg"])
        towers = {
            "vision_cfg": asdict(CLIPVisionCfg(**model["vision_cfg"])),
            "text_cfg": asdict(CLIPTextCfg(**model["text_cfg"])),
        }
        preprocess = merge_preprocess_dict(PreprocessCfg(), dict(fields.get("preprocess_cfg") or {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is no config of open_clip, JSON with model_cfg and its towers ({error!r})") from error
    del preprocess["size"]  # open_clip takes the tower's image_size instead
    return {n: value for n, value in flat(model | towers | {"preprocess_cfg": preprocess}) if not is_off(n, value)}


def preprocess_of(model: Model) -> dict[str, Any]:
    """How model.arch prepares an image, without the size, as open_clip's preprocess_cfg has it.

    The config beside the base says it; a name alone does not, so it is what open_clip prepares for all pretrained
    weights of that name. Where these differ it is that of most of them, and a warning says so.
    """
    file = clip_file(model.path("base"))
    beside = read_config(file).get("preprocess_cfg") if file else None
    if isinstance(beside, dict) and beside:
        return {key: value for key, value in beside.items() if key != "size"}
    tags: dict[str, list[str]] = {}
    for tag in open_clip.list_pretrained_tags_by_model(model.arch):
        fields = merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(model.arch, tag))
        tags.setdefault(json.dumps({key: value for key, value in fields.items() if key != "size"}), []).append(tag)
    found = [json.loads(fields) for fields in sorted(tags, key=lambda fields: -len(tags[fields]))]
    for other in found[1:]:
        unlike = [f"{key} {value}, not {found[0][key]}" for key, value in other.items() if value != found[0][key]]
        warn(
            f"model.arch {model.arch} does not say how an image is prepared: of its pretrained weights "
            f"{', '.join(tags[json.dumps(other)])} had {'; '.join(unlike)} as most, which is taken; an "
            f"{OPEN_CLIP_CONFIG} beside the base would say it"
        )
    return found[0] if found else {}


def check_inputs(config: Config) -> None:
    """Compare the base's config with that of every other model, and refuse what is laid out as other libraries do.

    model.arch, where it is given, says what is built, so the base is compared with it as well.
    Raises: InputError if a file is of another layout, or says that its weights are another function than is built.
    """
    model = config.model
    text = {"model.text": model.path("text")} if model.text and model.path("text").exists() else {}
    others = other_models(config) | text
    mapped = [path for path in other_models(config).values() if of_transformers(path)]
    for path in (model.path("base"), *others.values()):
        if is_adapter(path):
            check_lineage(path, model.path("base"), None)
        elif path not in mapped:
            refuse_other_layouts(path, config_file(path))
    refuse_heads(model)
    named, file = open_clip.get_model_config(model.arch) if model.arch else None, clip_file(model.path("base"))
    if named:
        fields = {"model_cfg": named, "preprocess_cfg": preprocess_of(model)}
        ours, where = resolve(fields, "model.arch"), f"model.arch {model.arch}"
        others = {"model.base": model.path("base")} | others
    elif file:
        ours, where = resolve(read_config(file), str(file)), str(file)
    else:
        return
    compare(ours, where, others)


def compare(ours: Mapping[str, Any], where: str, others: Mapping[str, Path]) -> None:
    """InputError at the first model whose config makes another function of its weights; see `check_inputs`."""
    found: dict[str, list[str]] = {}
    for name, path in others.items():
        file = clip_file(path)
        theirs = resolve(read_config(file), str(file)) if file else ours
        differing = [field for field in {**ours, **theirs} if ours.get(field) != theirs.get(field)]
        counted = [field for field in differing if not HARMLESS & set(field.split("."))]
        if counted:
            said = in_short(f"{field} is {theirs.get(field)!r}, not {ours.get(field)!r}" for field in counted)
            raise InputError(
                f"{file}: {'; '.join(said)} as {where} has it: the merged model computes with the latter, for "
                "which these weights are not made; merge models of one base, or correct the config that is wrong"
            )
        for field in differing:
            found.setdefault(field, []).append(name)
    if found:
        said = ", ".join(f"{field} ({', '.join(names)})" for field, names in found.items())
        warn(f"{OPEN_CLIP_CONFIG} differs from the base's in what changes no weight's work; the base's is kept: {said}")


def refuse_other_layouts(path: Path, config: Path | None) -> None:
    """InputError naming what a model is whose tensors are laid out as another library than open_clip does."""
    names = plain_names(path)
    if any(name.startswith(("visual.transformer.resblocks.", "visual.trunk.blocks.")) for name in names):
        return
    said = read_config(config) if config else {}
    begun = [what for start, what in LAYOUTS.items() if any(name.startswith(start) for name in names)]
    if not begun and not said.get("model_type"):
        return
    classes = said.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else said.get("model_type")
    called = f" ({kind} in {config.name})" if config and kind else timm_name(path)
    layout = begun[0] if begun else "Hugging Face's layout of a model"
    own = any(name.startswith(OTHER_TOWERS) for name in names)
    served = f"take the same model as open_clip saves it, or of transformers {', '.join((*TWO_TOWERS, *CLASSIFIERS))}"
    then = "only such a tower, or a ViT of timm, can be merged" if own else served
    if said.get("model_type") in (*TWO_TOWERS, *CLASSIFIERS):
        then = "leave model.arch out, which names a model of open_clip, and it is merged in its own layout"
    raise InputError(
        f"{path} holds {layout}{called}; vision anchors the blocks of open_clip's VisionTransformer, whose tensors are "
        f"called visual.transformer.resblocks.…: {then}"
    )


def timm_name(path: Path) -> str:
    """The name of timm's model in the config beside it, in brackets; "" if it names none."""
    file = clip_file(path)
    model = read_config(file).get("model_cfg") if file else None
    tower = model.get("vision_cfg") if isinstance(model, dict) else None
    name = tower.get("timm_model_name") if isinstance(tower, dict) else None
    return f" ({name})" if name else ""


def config_text(model: Model, preprocess: Mapping[str, Any]) -> str:
    """The text of a merged model's open_clip_config.json: the base's own, or that of the architecture named.

    preprocess: what the named architecture does to an image.
    """
    file = clip_file(model.path("base"))
    if not model.arch and file:
        return file.read_text(encoding="utf-8")
    fields = {"model_cfg": open_clip.get_model_config(model.arch), "preprocess_cfg": dict(preprocess)}
    return json.dumps(fields, indent=2) + "\n"
