"""How many rows for tokens models have, in each tensor that has any."""

from collections.abc import Mapping, Sequence

from common.core.errors import InputError
from common.io.checkpoints import Checkpoint


def are_comparable(axes: Mapping[str, int], base: Checkpoint, model: Checkpoint) -> bool:
    """Whether those of the tensors that a model has are of as many axes as the base's, that of the tokens among
    them."""
    shapes = {name: (model.shapes[name], base.shapes[name]) for name in axes if name in model.shapes}
    return all(axes[name] < len(one) == len(other) for name, (one, other) in shapes.items())


def row_counts(axes: Mapping[str, int], model: Checkpoint) -> dict[str, int]:
    """How many rows a model has in each of the tensors that it has."""
    return {name: model.shapes[name][axis] for name, axis in axes.items() if name in model.shapes}


def row_count(axes: Mapping[str, int], model: Checkpoint) -> int:
    """The most rows that a model has in one of the tensors; 0 if it has none."""
    return max(row_counts(axes, model).values(), default=0)


def require_kept_sizes(axes: Mapping[str, int], base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """InputError naming the first model with another number of rows than the base in a tensor that keeps its own."""
    expected = row_counts(axes, base)
    for model in models:
        for name, rows in row_counts(axes, model).items():
            if rows != expected[name]:
                raise InputError(
                    f"{model.path}: {name} has {rows} rows, in {base.path} it has {expected[name]}, fewer or more than "
                    "the embedding, so none can tell which row is which token; take its added tokens away with "
                    "resize_token_embeddings, or leave it out"
                )


def require_equal_sizes(base: Checkpoint, sizes: Mapping[Checkpoint, int]) -> None:
    """InputError naming the first model whose number of rows is not the base's."""
    for model, rows in sizes.items():
        if rows != sizes[base]:
            raise InputError(
                f"{model.path} has {rows} tokens, {base.path} has {sizes[base]}; model.vocabulary may be pad (missing "
                "rows become the mean of the others), union (each token of any model gets a row) or base (tokens that "
                "the base lacks are cut off)"
            )
