"""Draw scripts/method.png, the README's figure: both boxes at work on a block of two weights.

python scripts/draw_method.py
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from common.core.seeding import seeded
from common.fda.adaptation import FitSettings, fit_block, own_weights
from common.fda.anchors import initial_anchors
from common.fda.construction import SearchSettings, optimise_anchors
from common.fda.matching import MatchingProblem, squared_distance

COLOURS = ("#0072B2", "#D55E00")
TAU = (torch.tensor([[2.0, 0.4]]), torch.tensor([[0.5, 1.8]]))  # the two task vectors; θ₀ is the origin
THETA_0 = {"weight": torch.zeros(1, 2)}
MOMENTS = (0, 2, 5, 400)  # construction steps whose gradient is drawn


def block(params, x_ATD):
    """One linear map from two inputs to one output."""
    return x_ATD @ params["weight"].T


def gradient(theta_t, x_ATD):
    """Unit vector along −∂Dist/∂θ at θ₀."""
    w = THETA_0["weight"].clone().requires_grad_()
    (g,) = torch.autograd.grad(squared_distance(block({"weight": w}, x_ATD), block(theta_t, x_ATD)), w)
    return -g[0] / g.norm()


def arrow(axes, tip, colour, **style):
    axes.annotate(
        "", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0} | style
    )


def draw(path: Path) -> None:
    """Three panels: anchors in input space, the gradients they induce, and the merged weights trained on them."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.9), layout="constrained")
    tasks = [{"weight": tau} for tau in TAU]  # θ₀ is 0
    anchors = [draw_construction(left, middle, task, theta_t) for task, theta_t in enumerate(tasks)]
    x = torch.cat(anchors)
    draw_adaptation(right, x, torch.cat([block(*each) for each in zip(tasks, anchors, strict=True)]))
    titles = (
        "input space: anchors before (○) and after (●)",
        "their gradients turn to the task vectors",
        "box 2: weights trained on all anchors",
    )
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in (middle, right):
        show_models(axes)
    reach = 1.1 * x.abs().max().item()
    left.set_xlim(-reach, reach)
    left.set_ylim(-reach, reach)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(path, dpi=130)


def draw_construction(left, middle, task, theta_t):
    """Box 1 for one task: its anchors before and after, and the gradient that they induce on the way; the anchors."""
    colour, (tau,) = COLOURS[task], theta_t["weight"]
    start = initial_anchors("gauss", (24, 1, 2), theta_t=theta_t, scale=0.1, generator=seeded(3, task))
    problem = MatchingProblem(block, THETA_0, theta_t, tau=theta_t)
    for k, steps in enumerate(MOMENTS):
        x = optimise_anchors(problem, start, SearchSettings(steps, lr=1e-2, distance="mse")).x
        arrow(middle, 1.25 * gradient(theta_t, x), colour, alpha=(k + 1) / len(MOMENTS), lw=1.2)
    left.plot(*start[:, 0].T, "o", mfc="none", mec=colour, ms=4, alpha=0.45)
    left.plot(*x[:, 0].T, "o", color=colour, ms=4, label=f"task {task + 1}")
    left.axline((0, 0), tuple(tau.tolist()), color=colour, lw=0.8, ls=":")
    return x


def draw_adaptation(axes, x, y):
    """Box 2: the loss over all anchors, the way of the weights from θ₀ to its minimum, and task arithmetic."""
    grid = torch.stack(torch.meshgrid(torch.linspace(-0.5, 3, 120), torch.linspace(-0.5, 3, 120), indexing="xy"), -1)
    loss = torch.tensor([[squared_distance(block({"weight": w[None]}, x), y) for w in row] for row in grid])
    axes.contour(*grid.permute(2, 0, 1), loss.sqrt(), levels=14, colors="#bbbbbb", linewidths=0.6)
    way = torch.cat([fitted(x, y, epochs) for epochs in range(0, 200, 4)])
    axes.plot(*way.T, color="#222222", lw=1.6)
    axes.plot(*way[-1], "o", color="#222222", ms=7)
    axes.annotate("merged", way[-1], (-50, 8), textcoords="offset points")
    (arithmetic,) = 0.3 * sum(TAU)
    axes.plot(*arithmetic, "s", color="#666666", ms=6)
    axes.annotate("task arithmetic, 0.3", arithmetic, (-14, -16), textcoords="offset points", color="#666666")


def fitted(x, y, epochs):
    """The merged weights after so many epochs from θ₀."""
    settings = FitSettings("mse", lr=0.03, epochs=epochs, batch_size=48)
    return fit_block(block, own_weights(THETA_0), x, y, settings, generator=seeded(0))[0]["weight"]


def show_models(axes):
    """θ₀ and the experts in weight space."""
    for task, (tau, colour) in enumerate(zip(TAU, COLOURS, strict=True)):
        axes.plot(*tau[0], "*", color=colour, ms=13, zorder=3)
        axes.annotate(f"θ{'₁₂'[task]}", tau[0], (6, 6), textcoords="offset points", color=colour)
    axes.plot(0, 0, "o", color="#222222", ms=5)
    axes.annotate("θ₀", (0, 0), (-14, -12), textcoords="offset points")
    axes.set_xlim(-0.5, 3)
    axes.set_ylim(-0.5, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("method.png"), help="default: %(default)s")
    draw(parser.parse_args().out)
