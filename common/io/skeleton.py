"""What a transformers model without weights tells: where its layers are, and how its checkpoints name the tensors."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from common.core.blocks import BlockFamily, Piece, Pieces

MASKS = ("bias", "masked_bias")  # how old GPT-2, GPT-Neo and GPT-BigCode call the causal masks of an attention


def path_of(skeleton: nn.Module, module: nn.Module) -> str:
    """Where a module is within a model."""
    return next(name for name, part in skeleton.named_modules() if part is module)


def layers_of(module: nn.Module) -> str:
    """The path of the repeated layers: of all lists of modules that lie in no other, the one with the most weights;
    "" if there is none."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")


def decoder_of(skeleton: PreTrainedModel) -> nn.Module:
    """What has the layers of a language model: its decoder as transformers finds it, and where that has none, as in
    ModernBERT, whose head is called so, its body."""
    found = skeleton.get_decoder()
    return found if layers_of(found) else skeleton.base_model


def first_input(block: nn.Module, tower: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(T, D) of what reaches a block of an image tower on the meta device, of an image of a size."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, named: dict) -> None:
        seen.append((*args, *named.values())[0])

    with block.register_forward_pre_hook(see, with_kwargs=True):
        tower(torch.empty(1, 3, *size, device="meta"))
    _, tokens, width = seen[0].shape
    return tokens, width


def stored_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the checkpoint that save_pretrained writes of a model. A name can be another than the model's
    own, and a mixture's experts are apart in one and stacked in the other."""
    stored = revert_weight_conversion(skeleton, dict(skeleton.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def absent_names(skeleton: PreTrainedModel, family: BlockFamily) -> Iterator[str]:
    """The tensors of anchored modules that a checkpoint of the model has neither by themselves nor as pieces that the
    family knows, such as what is stored as a part of a longer tensor."""
    stored = stored_shapes(skeleton).items()
    kept = {piece.name for n, shape in stored for piece in list(family.pieces(n, shape)) or [Piece(n)]}
    for prefix, module in family.modules(skeleton):
        yield from (prefix + name for name, _ in module.named_parameters() if prefix + name not in kept)


def stored_name(skeleton: PreTrainedModel, name: str) -> str:
    """How a checkpoint names a tensor of the model that is stored as it is, such as the head."""
    return next(iter(revert_weight_conversion(skeleton, {name: torch.empty(1, device="meta")})))


_AXES: WeakKeyDictionary[PreTrainedModel, dict[str, int]] = WeakKeyDictionary()
SIZES = ("vocab_size", "vocab_size_per_layer_input")  # fields of a config that count the tokens of a tokenizer


def token_axes(skeleton: PreTrainedModel) -> dict[str, int]:
    """{name in a checkpoint: axis} of all tensors with a row for every token, the embedding first: what has another
    size along that axis in a model of twice the vocabulary. Of one skeleton it is found once."""
    if skeleton in _AXES:
        return dict(_AXES[skeleton])
    config = deepcopy(skeleton.config)
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for field in SIZES:
            if hasattr(part, field):
                setattr(part, field, 2 * getattr(part, field))
    with torch.device("meta"):
        larger = type(skeleton)(config).state_dict()
    embedding = f"{path_of(skeleton, skeleton.get_input_embeddings())}.weight"
    axes: dict[str, int] = {}
    for name, tensor in sorted(skeleton.state_dict().items(), key=lambda item: item[0] != embedding):
        sizes = zip(tensor.shape, larger[name].shape, strict=True)
        longer = [axis for axis, (size, more) in enumerate(sizes) if size != more]
        axes |= {stored_name(skeleton, name): axis for axis in longer}
    _AXES[skeleton] = axes
    return dict(axes)


def counts_from_padding(skeleton: PreTrainedModel) -> bool:
    """Whether a model numbers positions from that of the padding token on, as RoBERTa, M2M100 and XGLM do: what knows
    that token and has no row for every token is a table of positions."""
    parts = ((path, part) for path, part in skeleton.named_modules() if not any(True for _ in part.children()))
    knowing = [path for path, part in parts if getattr(part, "padding_idx", None) is not None]
    axes = token_axes(skeleton) if knowing else {}
    return any(stored_name(skeleton, f"{path}.weight") not in axes for path in knowing)


def computing(skeleton: PreTrainedModel) -> frozenset[str]:
    """Fields of a config that count for this model though they do not for others."""
    return frozenset({"pad_token_id"} if counts_from_padding(skeleton) else ())


def stored_parts(skeleton: PreTrainedModel) -> dict[str, list[str]]:
    """{name of a stored tensor: the model's own tensors that it holds}: one under another name, or several, the rows of
    one behind those of the other."""
    own = [name for name, _ in skeleton.named_parameters()]
    stored = revert_weight_conversion(skeleton, {name: torch.tensor([number]) for number, name in enumerate(own)})
    return {name: [own[number] for number in numbers.tolist()] for name, numbers in stored.items()}


def turned_weights(skeleton: nn.Module) -> frozenset[str]:
    """Names of the matrices that a model has as (inputs, outputs), as GPT-2 does, where a linear map has the other."""
    return frozenset(f"{path}.weight" for path, part in skeleton.named_modules() if isinstance(part, Conv1D))


def renamed_pieces(parts: Mapping[str, Sequence[str]]) -> Pieces:
    """The pieces of stored tensors as `stored_parts` gives them: equal shares of the rows."""

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        own = parts.get(name, [name])
        if own == [name]:
            return
        rows = shape[0] // len(own) if shape else 0
        for number, part in enumerate(own):
            yield Piece(part, rows=slice(number * rows, (number + 1) * rows) if len(own) > 1 else None)

    return pieces


def stored_path(skeleton: PreTrainedModel, path: str) -> str:
    """How the names of the tensors of a list of layers begin in a checkpoint, without the layer's number."""
    layer = skeleton.get_submodule(f"{path}.0")
    own: dict[str, Tensor] = {f"{path}.0.{name}": p for name, p in layer.named_parameters() if p.ndim < 3}
    names = [name.split(".") for name in revert_weight_conversion(skeleton, own)]
    begin = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
    return ".".join(begin[: len(begin) - 1 - begin[::-1].index("0")])


def renamed_within(skeleton: PreTrainedModel, path: str, blocks: str) -> dict[str, str]:
    """{stored name: that with the layer's own name for what is within it} of the tensors of a list of layers of which
    each is one stored tensor; `blocks` is the stored path of the list."""
    own = [name for name, p in skeleton.named_parameters() if name.startswith(f"{path}.") and p.ndim < 3]
    numbers = revert_weight_conversion(skeleton, {name: torch.tensor([number]) for number, name in enumerate(own)})
    shapes, found = stored_shapes(skeleton), {}
    for stored, number in numbers.items():
        name = own[number[0]]
        if len(number) == 1 and shapes.get(stored) == tuple(skeleton.get_parameter(name).shape):
            found[stored] = blocks + name.removeprefix(path)
    return found


def beginnings(skeleton: PreTrainedModel) -> tuple[str, ...]:
    """How names in a checkpoint begin that lie in the model's body, and not in a head."""
    body = skeleton.base_model_prefix + "."
    inner: dict[str, Tensor] = {n: p for n, p in skeleton.named_parameters() if n.startswith(body)}
    names = [name.split(".") for name in revert_weight_conversion(skeleton, inner)]
    heads = revert_weight_conversion(skeleton, {n: p for n, p in skeleton.named_parameters() if n not in inner})
    shared = {parts[0] for parts in names} & {name.split(".")[0] for name in heads}
    return tuple(sorted({".".join(parts[: 1 + (parts[0] in shared)]) + "." for parts in names}))


def canonical_names(skeleton: PreTrainedModel) -> Callable[[str], str | None]:
    """From the name of a stored tensor to that in a checkpoint as save_pretrained writes it today.

    One saved without any head lacks the prefix of its body; some have the model's own names, which the class renames.
    None for what is no weight though old files keep it: what the class says it ignores, buffers that it makes itself
    and does not save, and causal masks that lie in an attention, which has no parameter of that name.
    """
    known, own = frozenset(stored_shapes(skeleton)), dict(skeleton.named_parameters(remove_duplicate=False))
    prefix = f"{skeleton.base_model_prefix}."
    made, is_left_aside = unsaved_buffers(skeleton), left_aside(skeleton)
    modules = modules_of(skeleton, known)
    children = {name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)}
    bare = (path for path, part in skeleton.named_modules() if not list(part.parameters(recurse=False)))
    holders = {path for path in bare if list(skeleton.get_submodule(path).children())}

    def name_of(stored: str) -> str | None:
        bare = not stored.startswith(prefix) and stored.split(".")[0] in children
        name = prefix + stored if bare else stored
        if name in known:
            return name
        if name in own:
            stored_as = [(n, t.shape) for n, t in revert_weight_conversion(skeleton, {name: own[name]}).items()]
            return stored_as[0][0] if [shape for _, shape in stored_as] == [own[name].shape] else name  # a stack
        module, _, last = name.rpartition(".")
        is_mask = last in MASKS and module in holders
        is_made = name in made or prefix + stored in made
        is_buffer = is_made or (is_left_aside(name) and module in modules)
        return None if is_mask or is_buffer or name.endswith("rotary_emb.inv_freq") else name

    return name_of


def not_by_rows(skeleton: PreTrainedModel) -> str:
    """The first tensor of a model that its checkpoint has neither as it is nor, as `renamed_pieces` takes it, as an
    equal share of the rows of a longer one: experts in a stack, say, or rows in another order; "" if there is none."""
    shapes, own = stored_shapes(skeleton), dict(skeleton.named_parameters())
    renamed = [name for name in own if name not in shapes]
    if stack := next((name for name in renamed if own[name].ndim > 2), ""):
        return stack
    if not renamed:
        return ""
    begin, rows = 0, dict[str, Tensor]()
    for name, p in own.items():  # every row is told by a number
        rows[name] = torch.arange(begin, begin + (len(p) if p.ndim else 1)).view(-1, *[1] * (p.ndim - 1))
        begin += len(rows[name])
    stored, parts = revert_weight_conversion(skeleton, dict(rows)), stored_parts(skeleton)
    for name, of_name in parts.items():
        alike = len({len(rows[part]) for part in of_name}) == 1 and shapes[name][1:] == own[of_name[0]].shape[1:]
        if not alike or not torch.equal(stored[name], torch.cat([rows[part] for part in of_name])):
            return of_name[0]
    return next(iter(own.keys() - {part for of_name in parts.values() for part in of_name}), "")


def names_in_body(skeleton: PreTrainedModel) -> Callable[[str], str | None]:
    """From a name in a file of a bare model, or of one with a head, or from the module's own to that in a file of the
    bare model; None for what lies in no part of it, a head. Its pooler is a part, whether or not it has one."""
    prefix, known = f"{skeleton.base_model_prefix}.", stored_parts(skeleton)
    stored_of = {own[0]: name for name, own in known.items() if len(own) == 1}
    parts = {name.split(".")[0] for names in (known, *known.values()) for name in names} | {"pooler"}

    def name_of(stored: str) -> str | None:
        name = stored if stored in known else stored.removeprefix(prefix)  # a body may be called so in the model itself
        return stored_of.get(name, name) if name.split(".")[0] in parts else None

    return name_of


def unsaved_buffers(skeleton: nn.Module) -> frozenset[str]:
    """Names of the buffers that a model makes itself and does not save."""
    parts = skeleton.named_modules()
    return frozenset(f"{path}.{name}" for path, part in parts for name in part._non_persistent_buffers_set)


def left_aside(skeleton: PreTrainedModel) -> Callable[[str], bool]:
    """Whether the class of a model says that it does not load a tensor of a name which is none of its own: neither a
    parameter nor a buffer of numbers that it saves, as MVP does the bias of its logits, which it names all the same."""
    patterns = "|".join(skeleton._keys_to_ignore_on_load_unexpected or ())
    own = {name for name, tensor in skeleton.state_dict().items() if tensor.is_floating_point()}
    return lambda name: bool(patterns) and name not in own and bool(re.search(patterns, name))


def modules_of(skeleton: PreTrainedModel, stored: Iterable[str]) -> frozenset[str]:
    """The paths of all modules, by the names of the model and by those that are stored."""
    of_stored = {name.rsplit(".", dots)[0] for name in stored for dots in range(1, name.count(".") + 1)}
    return frozenset(of_stored | {path for path, _ in skeleton.named_modules()})


def unread_names(skeleton: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint is a weight of a module that the class of the model does not have and leaves
    aside: layers that predict several tokens at once, say."""
    known = frozenset(stored_shapes(skeleton))
    is_left_aside, modules = left_aside(skeleton), modules_of(skeleton, known)
    return lambda name: name not in known and is_left_aside(name) and name.rpartition(".")[0] not in modules
