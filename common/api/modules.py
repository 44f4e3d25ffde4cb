"""Models in memory as checkpoints and back, and which domain a model is of."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as classes

from common.config import Model
from common.core.errors import InputError
from common.core.places import for_task, path_of
from common.domain import FOLDERS, Domain
from common.io.checkpoints import write_tensors
from common.io.model_config import config_file, read_config
from common.io.model_files import GENERATION_FILE, OPEN_CLIP_CONFIG, OPEN_CLIP_FILES

ModelLike = nn.Module | str | Path
"""A model of transformers or open_clip in memory, or where one is, as model.base of a config says it."""

OF_OPEN_CLIP = (CLIP, CustomTextCLIP, CoCa)
HELD = {  # by the name of a class that wraps a model: where the model in it is
    "PeftModel": "merge_and_unload()",
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "SentenceTransformer": "[0].auto_model",
}
OWN = ("base", "expert", "experts", "root")  # fields of the section model that are arguments here


def model_section(base: ModelLike, experts: Mapping[str, ModelLike], options: Model, folder: Path) -> Model:
    """The section `model` of a config, with every module written to a folder of its own below `folder`.

    Raises: InputError on an option that is an argument here.
    """
    for name in OWN:
        if getattr(options, name) != getattr(Model(), name):
            raise InputError(f"model.{name} is set, but base and experts are arguments of the function")
    if isinstance(base, OF_OPEN_CLIP) and not options.arch:
        raise InputError(
            "base: a model of open_clip does not say its architecture; model=Model(arch=...) names it, as in "
            "ViT-B-32-quickgelu, or base can be the folder that it was loaded from"
        )
    places = {task: written(expert, place_of(folder, i, task)) for i, (task, expert) in enumerate(experts.items())}
    return replace(options, base=written(base, folder / "base"), experts=places)


def written(model: ModelLike, folder: Path) -> str:
    """Where a model is; one in memory is saved in `folder`, in the types of its weights."""
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, PreTrainedModel):
        save_module(model, folder)
    else:
        write_tensors(folder / OPEN_CLIP_FILES[0], model.state_dict())
    return str(folder)


def save_module(model: PreTrainedModel, folder: Path) -> None:
    """Save a module with its generation config as it is: transformers opens files with values that it refuses to save.

    Raises: InputError if transformers cannot save the module all the same.
    """
    own = getattr(model, "generation_config", None)
    try:
        if own is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{folder}: transformers cannot save this {type(model).__name__}: {said}") from error
    finally:
        if own is not None:
            model.generation_config = own
    if own is not None and (folder / GENERATION_FILE).is_file():
        own.to_json_file(folder / GENERATION_FILE)


@contextmanager
def named_as_given(base: ModelLike, experts: Mapping[str, ModelLike], folder: Path) -> Iterator[None]:
    """In this block an InputError names a module by its argument, and not by the place below `folder` that it is saved
    in, which its owner never saw."""
    try:
        yield
    except InputError as error:
        given = [
            (f"experts[{task!r}]", each, place_of(folder, i, task)) for i, (task, each) in enumerate(experts.items())
        ]
        said = str(error)
        for name, model, place in (*given, ("base", base, folder / "base")):
            if isinstance(model, nn.Module):
                said = re.sub(rf"{re.escape(str(place))}(?![\w.-])", lambda _, name=name: name, said)
        raise InputError(said) from error


def place_of(folder: Path, number: int, task: str) -> Path:
    """Where the expert of a task is saved below a folder."""
    return folder / str(number) / (for_task("{slug}", task) or "expert")


def require_experts(experts: object) -> None:
    """InputError unless there is an expert, each has the name of its task, and is a model or a place."""
    if not isinstance(experts, Mapping):
        raise InputError(f"experts is a {type(experts).__name__}; {{task: module or path}} is needed")
    if not experts:
        raise InputError("experts is empty; {task: module or path} of at least one task is needed")
    for task, expert in experts.items():
        if not isinstance(task, str) or not task:
            raise InputError(
                f"experts has the task {task!r}; a text is needed that names it, as in {str(task) or 'math'!r}"
            )
        require_model(expert, f"experts[{task!r}]")


def require_model(model: object, what: str) -> None:
    """InputError on what is neither a model in memory nor the path of one, with the next step for known wrappers."""
    if not isinstance(model, (str, Path, PreTrainedModel, *OF_OPEN_CLIP)):
        held = next((HELD[each.__name__] for each in type(model).__mro__ if each.__name__ in HELD), "")
        raise InputError(
            f"{what} is a {type(model).__name__}; a model of transformers or open_clip is needed, or the path of one"
            + (f": its {held}, say" if held else "")
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{what} has an adapter besides its weights, which save_pretrained saves without them: give the folder "
            "that it saves, or what merge_and_unload() of peft's PeftModel returns"
        )
    if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{what} has weights on the meta device, which holds none; load them first")


def domain_of(base: ModelLike) -> str:
    """The domain of a base: vision, nlu or nlg; InputError if it cannot be told."""
    if isinstance(base, OF_OPEN_CLIP):
        return "vision"
    if isinstance(base, PreTrainedModel):
        fields, where = base.config.to_dict() | {"architectures": [type(base).__name__]}, type(base).__name__
    else:
        path = path_of(str(base))
        if (path / OPEN_CLIP_CONFIG).is_file():
            return "vision"
        file = config_file(path)
        fields, where = read_config(file) if file else {}, str(file or path)
    kind, named = str(fields.get("model_type")).removesuffix("_vision_model"), (fields.get("architectures") or [""])[0]
    language = classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    masked = classes.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind in classes.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "vision"
    if any(named in names.values() or (kind in names and kind not in masked) for names in language):
        return "nlg"
    if kind in masked or kind in classes.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return "nlu"
    if kind in classes.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "vision"
    raise InputError(f"{where} does not tell what kind of model it is; domain= says so: {', '.join(FOLDERS)}")


@torch.no_grad()
def check_computes_as(module: Any, what: str, model: Model, domain: Domain) -> None:
    """InputError if an open_clip module does not answer an image as the architecture of the base with its weights does.

    The activation, for one, shows in no tensor: ViT-B-32 and ViT-B-32-quickgelu have the same names and shapes.
    """
    twin: Any = deepcopy(domain.skeleton(model)).eval()
    tower: Any = deepcopy(module.visual).cpu().float().eval()
    size = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        twin.visual.load_state_dict(tower.state_dict(), assign=True)
        expected, twin.visual = twin.encode_image(image), tower
        same = torch.allclose(twin.encode_image(image), expected, atol=1e-4, rtol=1e-4)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{what} is not of the architecture {model.arch or model.base}: {said}") from error
    if not same:
        raise InputError(
            f"{what} answers an image otherwise than the architecture {model.arch or model.base} with its weights, "
            "which differs in the activation or the number of heads, say: model.arch can name another"
        )


def like_base(base: nn.Module, folder: Path) -> nn.Module:
    """A module like the base, on its device and in its mode, with the weights of the checkpoint in a folder.

    What the checkpoint of a text encoder leaves out, the base's head, is the base's own.
    """
    if isinstance(base, PreTrainedModel):
        attention = base.config._attn_implementation
        loaded: Any = type(base).from_pretrained(
            folder, output_loading_info=True, dtype="auto", attn_implementation=attention, local_files_only=True
        )
        made, info = loaded
        own, kept = made.state_dict(), base.state_dict()
        with torch.no_grad():
            for name in info["missing_keys"]:
                if name in kept:
                    own[name].copy_(kept[name])
                else:
                    switch_off(made, base, name)
        return made.to(base.device).train(base.training)
    made = deepcopy(base)
    made.load_state_dict(load_file(folder / OPEN_CLIP_FILES[0]))
    return made


def switch_off(made: nn.Module, base: nn.Module, name: str) -> None:
    """Take the part with a tensor off a module where the base has None: its pooler, with add_pooling_layer=False."""
    parent, of_base = made, base
    for part in name.split(".")[:-1]:
        if getattr(of_base, part, None) is None:
            setattr(parent, part, None)
            return
        parent, of_base = getattr(parent, part), getattr(of_base, part)
