"""What the project knows about CLIP: its blocks, its tasks, how a model is opened, written and scored."""

import logging
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import datasets
import open_clip
import torch
import yaml
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.config import Config, Model
from common.core.blocks import BlockFamily
from common.core.errors import InputError
from common.domain import Scored
from common.evaluation.answers import scored
from common.io.checkpoints import Checkpoint, write_text
from common.io.examples import Sample, load_sample, load_scored
from common.io.lora import open_checkpoint
from common.io.shards import write_stream
from common.io.stored_types import as_stored, output_type
from common.io.surroundings import copy_tokenizer
from common.merging.calibration import CalibrationTask, calibration_task_of
from Vision.clip_config import check_inputs as check_inputs  # a part of the domain
from Vision.clip_config import clip_file, config_text

NAME = "vision"
IMAGE_TOWER = "visual."
PERCENT = True  # tables print percent


@dataclass(frozen=True)
class Task:
    """An image classification data set and the words for its zero-shot head.

    hub, hub_config, split: as datasets.load_dataset takes them. templates: prompts, {c} is the class name.
    classes: names in label order. test_size: examples that published numbers were counted on.
    """

    templates: list[str]
    classes: list[str]
    hub: str = ""
    hub_config: str | None = None
    split: str = "test"
    train_split: str = "train"
    test_size: int | None = None


def architecture(model: Model) -> str:
    """The name by which open_clip knows the architecture; InputError if neither the config nor the base tells it."""
    if model.arch:
        return model.arch
    file = clip_file(model.path("base"))
    if file:
        return f"local-dir:{file.parent}"
    raise InputError(
        f"{model.path('base')} holds no open_clip_config.json; model.arch can name it, as in ViT-B-32-quickgelu"
    )


@cache
def skeleton(model: Model, device: str = "meta") -> nn.Module:
    """The CLIP model without its weights; on the meta device it takes no memory."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # open_clip warns that the weights are random
    try:
        with torch.device(device):
            clip = open_clip.create_model(architecture(model), load_weights=False, device=device).eval()
    except InputError:
        raise
    except Exception as error:  # whatever open_clip makes of a config
        file = clip_file(model.path("base"))
        where = f"model.arch {model.arch!r}" if model.arch or not file else str(file)
        raise InputError(f"open_clip cannot build {where}: {' '.join(str(error).split())}") from error
    finally:
        logging.root.setLevel(level)
    if not isinstance(clip.visual, VisionTransformer):
        raise InputError(
            f"the image tower of {architecture(model)} is open_clip's {type(clip.visual).__name__}; vision anchors the "
            "blocks of its VisionTransformer, visual.transformer.resblocks"
        )
    return clip


def token_shape(model: Model) -> tuple[int, int]:
    """Tokens and width that a block of the image tower sees."""
    tokens, width = skeleton(model).get_parameter("visual.positional_embedding").shape
    return tokens, width


def text_checkpoint(model: Model) -> Checkpoint:
    """The checkpoint that has the text tower: the base, or what model.text names."""
    wanted = [name for name in skeleton(model).state_dict() if not name.startswith(IMAGE_TOWER)]
    tried = []
    for which in ("base", "text"):
        if getattr(model, which):
            checkpoint = Checkpoint(model.path(which))
            missing = [name for name in wanted if name not in checkpoint.shapes]
            if not missing:
                return checkpoint
            tried.append(f"{checkpoint.path} lacks {missing[0]}")
    raise InputError(f"no text tower: {'; '.join(tried)}; model.text can name a checkpoint of the whole CLIP model")


def zero_shot_head(model: Model, task: str) -> Tensor:
    """The classifier of a task, (classes, embedding): the head file if there is one, else made from the text tower.

    Every class name fills all templates; the normalised text embeddings are averaged, normalised again and scaled by
    the logit scale (Radford et al. 2021).
    """
    classes = TASKS[task].classes
    if model.head and model.path("head", task).is_file():
        head = Checkpoint(model.path("head", task)).read(["weight"])["weight"]
        if len(head) != len(classes):
            raise InputError(f"{model.path('head', task)} has {len(head)} classes, the task {task} has {len(classes)}")
        return head
    text = text_checkpoint(model)
    clip = skeleton(model, "cpu")
    clip.load_state_dict(text.read(n for n in text.shapes if not n.startswith(IMAGE_TOWER)), strict=False)
    templates = [lambda c, t=t: t.replace("{c}", c) for t in TASKS[task].templates]
    tokenizer = open_clip.get_tokenizer(architecture(model))
    with torch.no_grad():
        directions = open_clip.build_zero_shot_classifier(clip, tokenizer, classes, templates)
        return directions.T * clip.logit_scale.exp()


def metric(task: str) -> str:
    """Name of the number that a task reports."""
    return "accuracy"


def labelled_images(config: Config, task: str) -> datasets.Dataset:
    """The test images of a task with columns image and label, from the local folder or the hub."""
    row = TASKS[task]
    records = load_scored(config.eval, task, row, ("image", "label"))
    names = getattr(records.features["label"], "names", None)
    if names is not None and len(names) != len(row.classes):
        raise InputError(
            f"the data of task {task} has {len(names)} classes; TASKS in Vision/domain.py has {len(row.classes)}"
        )
    return records


@torch.no_grad()
def score(config: Config, task: str, checkpoints: Mapping[str, Path], device: torch.device) -> dict[str, Scored]:
    """Top-1 accuracy in [0, 1] and number of test images, for several models in one pass over the images."""
    pixels = preprocessing(config.model)
    head = zero_shot_head(config.model, task).to(device)
    towers = {name: image_tower(config.model, path).to(device) for name, path in checkpoints.items()}
    right: dict[str, list[Tensor]] = {name: [] for name in towers}
    records = labelled_images(config, task)

    def collate(rows: list[dict]) -> tuple[Tensor, Tensor]:
        return pixels(rows), torch.tensor([row["label"] for row in rows])

    loader = torch.utils.data.DataLoader(
        records, config.eval.batch_size, collate_fn=collate, num_workers=config.eval.workers
    )
    for images, labels in tqdm(loader, desc=f"score {task}", leave=False):
        images, labels = images.to(device), labels.to(device)
        for name, tower in towers.items():
            logits = classified(tower(images), head)
            right[name].append((logits.argmax(-1) == labels).cpu())
    return {name: scored(torch.cat(hits).numpy()) for name, hits in right.items()}


def preprocessing(model: Model) -> Callable[[list[dict]], Tensor]:
    """From records with an image each to what the image tower sees of them."""
    preprocess = image_transform_v2(PreprocessCfg(**skeleton(model).visual.preprocess_cfg), is_train=False)
    return lambda rows: torch.stack([preprocess(row["image"].convert("RGB")) for row in rows])


def classified(features: Tensor, head: Tensor) -> Tensor:
    """The logits of image features under a zero-shot head."""
    return F.normalize(features, dim=-1) @ head.T


class Classifier(nn.Module):
    """An image tower without weights under a task's head; its tensors have the names of the checkpoint."""

    def __init__(self, visual: nn.Module, head: Tensor):
        super().__init__()
        self.visual, self.head = visual, head

    def forward(self, images: Tensor) -> Tensor:
        return classified(self.visual(images), self.head)


def calibration_task(config: Config, task: str, sample: Sample, device: torch.device) -> CalibrationTask:
    """The images of a task and its classifier, for merge methods that use data."""
    records, pixels = load_sample(config.eval, task, TASKS[task], ("image",), sample), preprocessing(config.model)
    classifier = Classifier(deepcopy(skeleton(config.model).visual), zero_shot_head(config.model, task).to(device))
    batches = torch.utils.data.DataLoader(
        records, sample.batch, collate_fn=lambda rows: {"images": pixels(rows)}, num_workers=config.eval.workers
    )
    return calibration_task_of(classifier, OPEN_CLIP, batches, len(records), device)


def image_tower(model: Model, path: Path) -> nn.Module:
    """The image tower with the weights of one checkpoint."""
    tower = deepcopy(skeleton(model).visual)
    weights = open_checkpoint(path, model.path("base")).read_under(IMAGE_TOWER)
    tower.load_state_dict(weights, assign=True)
    return tower


def check_export(model: Model) -> None:
    """InputError if a merged model could not be written because no text tower is at hand."""
    text_checkpoint(model)


def export(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a merged model that stock open_clip opens as local-dir:FOLDER, the text tower included."""
    names, text, base = skeleton(model).state_dict(), text_checkpoint(model), Checkpoint(model.path("base"))
    image = filter(lambda named: named[0] in names, tensors)
    rest = ((name, text.read([name])[name]) for name in names if not name.startswith(IMAGE_TOWER))
    dtype = output_type(base, {})
    surroundings = config_text(model, skeleton(model).visual.preprocess_cfg)
    stored = chain(as_stored(image, dtype, base), as_stored(rest, dtype, text))
    write_stream(folder / "open_clip_model.safetensors", stored, names)
    write_text(folder / "open_clip_config.json", surroundings)  # a weight that is refused leaves nothing
    if text.path.is_dir():
        copy_tokenizer(text.path, folder)


# null_gradients: the key part of the fused projection's bias (q, k, v).
# published_axes: open_clip 2.0.2, which made the released anchors, was sequence-first.
OPEN_CLIP = BlockFamily(
    blocks="visual.transformer.resblocks",
    scope=IMAGE_TOWER,
    null_gradients={"attn.in_proj_bias": (1, 3)},
    published_axes="TAD",
)


def family(model: Model) -> BlockFamily:
    """The blocks of open_clip's image tower."""
    if model.family not in ("auto", "open_clip"):
        raise InputError(f"unknown model.family {model.family!r}; vision has open_clip")
    return OPEN_CLIP


TASKS = {name: Task(**row) for name, row in yaml.safe_load((Path(__file__).parent / "tasks.yaml").read_text()).items()}
