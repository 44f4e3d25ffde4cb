"""Blocks for scripts/benchmark.py: real sizes with random weights, and blocks of the toys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import Model
from common.core.blocks import Block, BlockFamily, BlockModule
from common.core.task_vectors import Params
from common.io.checkpoints import write_tensors
from common.io.yaml_files import read_yaml_file

TOY_BLOCK = 2


@dataclass(frozen=True)
class Case:
    """A block of some size. shape: (A, T, D) of its anchors. prefixes: of the names of all blocks in its checkpoint."""

    block: Block
    module: nn.Module
    shape: tuple[int, int, int]
    prefixes: list[str]
    family: BlockFamily


def vit(model: Model, anchors: int) -> Case:
    """A block of the image tower of a CLIP."""
    from Vision import domain

    skeleton, family = domain.skeleton(model), domain.family(model)
    return case(family, family.modules(skeleton), (anchors, *domain.token_shape(model)))


def encoder(config: Any, anchors: int) -> Case:
    """A layer of a text encoder that transformers knows."""
    from transformers import AutoModel

    from NLU.encoders import encoder as blocks_of

    with torch.device("meta"):
        skeleton = AutoModel.from_config(config, attn_implementation="eager").eval()
    family = blocks_of(skeleton, config.model_type)
    return case(family, family.modules(skeleton), (anchors, 5, config.hidden_size))


def llama_mlp(width: int, inner: int, anchors: int) -> Case:
    """The MLP of a layer of a Llama; one layer, since all are too many for a temporary folder."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from NLG.decoders import mlps

    config = LlamaConfig(hidden_size=width, intermediate_size=inner)
    with torch.device("meta"):
        mlp = LlamaMLP(config)
    family = BlockFamily(blocks="model.layers", parts=mlps)
    return case(family, [BlockModule("model.layers.0.mlp.", mlp)], (anchors, 1, config.hidden_size))


def roberta_base(anchors: int) -> Case:
    from transformers import RobertaConfig

    return encoder(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), anchors)


def case(family: BlockFamily, modules: list[BlockModule], shape: tuple[int, int, int]) -> Case:
    first = modules[0].module
    return Case(family.pure(first), first, shape, [prefix for prefix, _ in modules], family)


ARCHS: dict[str, tuple[Callable[[int], Case], int]] = {  # and the paper's number of anchors
    "ViT-B-32": (lambda anchors: vit(Model(arch="ViT-B-32-quickgelu"), anchors), 64),
    "roberta-base": (roberta_base, 64),
    "smollm-mlp": (partial(llama_mlp, 576, 1536), 8192),  # SmolLM's and SmolLM2's of 135 million weights
    "llama-mlp": (partial(llama_mlp, 5120, 13824), 8192),  # Llama-2-13B's
}


def random_block(module: nn.Module, generator: torch.Generator) -> Params:
    """Matrices of unit gain, vectors near one (weights of norms) or zero (biases)."""

    def tensor(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return noise * shape[-1] ** -0.5 if len(shape) > 1 else 0.1 * noise + float("weight" in name)

    return {name: tensor(name, p.shape) for name, p in module.named_parameters()}


def random_expert(theta_0: Params, generator: torch.Generator, relative: float = 0.01, rank: int = 16) -> Params:
    """The base moved by `relative` of each tensor's norm: half of it low-rank, half of it Gaussian."""

    def moved(p: Tensor) -> Tensor:
        tau = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            a, b = (torch.randn(size, rank, generator=generator) for size in p.shape)
            tau = tau / tau.norm() + a @ b.T / (a @ b.T).norm()
        return p + relative * p.norm() / tau.norm() * tau

    return {name: moved(p) for name, p in theta_0.items()}


def write_whole(file: Path, of: Case, theta: Params) -> None:
    """A checkpoint as large as all blocks of the model, each with the same weights."""
    write_tensors(file, {prefix + name: p.clone() for prefix in of.prefixes for name, p in theta.items()})


TOYS = {"vision": "vision/toy", "nlu": "nlu/toy", "minilm": "nlu/minilm"}  # and their configs


def toy(name: str, root: Path, anchors: int) -> tuple[Case, Path, list[Path], dict[str, float]]:
    """A block of a toy, the checkpoints of its base and experts, and the learning rate from the pretrained model."""
    settings = read_yaml_file(Path(f"configs/{TOYS[name]}.yaml"))
    paths = Model(**settings["model"] | {"root": str(root / name / "checkpoints")})
    if name == "vision":
        of = vit(paths, anchors)
    else:
        from transformers import AutoConfig

        of = encoder(AutoConfig.from_pretrained(paths.path("base")), anchors)
    experts = [paths.path("expert", task) for task in settings["tasks"]]
    return of, paths.path("base"), experts, {"pretrained": settings["adapt"]["by_start"]["pretrained"]["lr"]}
