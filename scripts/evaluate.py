"""Score the pretrained model, the experts and every merged model of a run; write results.json, a table and figures."""

from functools import partial

from common.command import run
from common.config import Config
from common.domain import Domain
from common.evaluation.cards import write_cards
from common.evaluation.scoring import score_run
from common.planning.dry_run import EVALUATE, describe


def evaluate(config: Config, domain: Domain) -> None:
    """Score the run, and put the scores into the cards of its models."""
    score_run(config, domain)
    write_cards(config, domain)


if __name__ == "__main__":
    run(evaluate, None, __doc__, partial(describe, checks=EVALUATE, anchored=False))
