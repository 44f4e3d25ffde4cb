"""The grid of the paper's tables in one process: anchors from every initialisation, FDA from every start, one table.

python scripts/compare.py --config configs/vision/toy.yaml --compare.starts [pretrained,ta] --compare.inits [weight]
"""

from dataclasses import replace

from common.command import run
from common.config import Config
from common.experiment import Domain
from common.pipeline import adapt, construct
from common.scoring import score_run


def compare(config: Config, domain: Domain) -> None:
    """Construct with each of compare.inits, adapt from each of compare.starts, then score everything once."""
    quiet = replace(config, run=replace(config.run, score=False))
    for init in config.compare.inits:
        grid = replace(quiet, anchors=replace(config.anchors, init=init))
        construct(grid, domain)
        for start in config.compare.starts:
            adapt(replace(grid, start=replace(config.start, method=start)), domain)
    score_run(config, domain)


if __name__ == "__main__":
    run(compare, __doc__)
