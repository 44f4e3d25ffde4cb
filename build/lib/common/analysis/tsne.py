"""Anchors and real features in the plane (paper appendix D): t-SNE of token vectors, and how far they mix.

Ours, as the paper says no more than "t-SNE": points are tokens, drawn at random from the real inputs of the block in
the expert, from the anchors before their first step and from those at the last; each is scaled to length 1, since
norms alone would tell them apart. `mixing`, in the full space, is the share of real tokens among an anchor token's 10
nearest neighbours: near 0.5 where anchors cannot be told from real tokens, near 0 where they lie apart.
"""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F

from common.analysis.material import Material, Numbers
from common.core.seeding import seeded
from common.evaluation.figures import COLOURS, GREY

INPUTS = 64  # of each task
TOKENS = 250  # of each group
NEIGHBOURS, PERPLEXITY = 10, 30
GROUPS = {"real": GREY, "anchors at first": COLOURS[5], "anchors at last": COLOURS[0]}


def drawn(x_RD: Tensor, generator: torch.Generator) -> Tensor:
    """At most TOKENS rows of x_RD, drawn without replacement, scaled to length 1, on the CPU."""
    chosen = torch.randperm(len(x_RD), generator=generator)[:TOKENS]
    return F.normalize(x_RD.cpu()[chosen].double(), dim=-1)


def mixing(anchors_RD: Tensor, real_SD: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """The share of real rows among the nearest neighbours of each row of anchors, itself left out; S / (R + S − 1) on
    average if both are drawn alike.
    """
    both = torch.cat([anchors_RD, real_SD])
    distances = torch.cdist(anchors_RD, both)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(min(neighbours, len(both) - 1), largest=False).indices
    return float((nearest >= len(anchors_RD)).double().mean())


def embedded(points_ND: Tensor, seed: int) -> list[list[float]]:
    """Coordinates (N, 2) of t-SNE, on one thread so that sums are taken in one order."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        perplexity = min(PERPLEXITY, (len(points_ND) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points_ND.numpy()).tolist()


def measure(material: Material) -> Numbers:
    """Coordinates of each group, and how far the anchors mix with real tokens at first and at last."""
    panels, seed = [], material.config.run.seed
    for task in material.tasks:
        for index, real_RD in material.real_inputs(task, INPUTS):
            for init in material.inits:
                path = list(material.path(init, task, index).values())
                sources = dict(zip(GROUPS, (real_RD, path[0].flatten(0, 1), path[-1].flatten(0, 1)), strict=True))
                groups = {name: drawn(x, seeded(seed, "tsne", init, task, index, name)) for name, x in sources.items()}
                real, *anchors = groups.values()
                places = iter(embedded(torch.cat([real, *anchors]), seed))
                at = {name: [next(places) for _ in points] for name, points in groups.items()}
                mixed = {name: mixing(groups[name], real) for name in list(GROUPS)[1:]}
                panels.append({"title": material.title(task, index, init), "points": at, "mixing": mixed})
    return {"inputs": INPUTS, "neighbours": NEIGHBOURS, "panels": panels}


def draw(axes: Axes, panel: Mapping[str, Any], numbers: Numbers) -> None:
    """A dot for each token."""
    for (group, points), colour, marker in zip(panel["points"].items(), GROUPS.values(), "o^s", strict=True):
        axes.scatter(*zip(*points, strict=True), s=7, c=colour, marker=marker, alpha=0.7, linewidths=0, label=group)
    axes.set_xticks([])
    axes.set_yticks([])
    mixed = panel["mixing"].values()
    axes.set_xlabel("mixing " + " → ".join(f"{share:.2f}" for share in mixed), fontsize=8)
