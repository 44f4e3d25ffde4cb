"""Merge by start.method alone (average, ta, tsv, wudi, ...), write a stock checkpoint, score it.

python scripts/merge.py --config FILE --start.method ta
python scripts/merge.py --mergekit recipe.yaml --run.name NAME [--domain nlg]   a recipe of mergekit

A recipe's result is not scored, and has a page with --run.report auto alone.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from common.command import leave, run
from common.config import Config, Run
from common.core.errors import InputError
from common.pipeline import merge_alone
from common.planning.dry_run import MERGE, describe


def from_recipe(argv: list[str]) -> Config:
    """The config that a recipe and the options beside it make."""
    from mergekit_recipe import config_of  # beside this file, and needed for this alone

    options = argparse.ArgumentParser(prog="merge.py", description=__doc__, allow_abbrev=False)
    options.add_argument("--mergekit", type=Path, required=True)
    options.add_argument("--domain", choices=["vision", "nlu", "nlg"], default="nlg")
    options.add_argument("--run.name", dest="name", required=True)
    options.add_argument("--run.root", dest="root", default="runs")
    options.add_argument("--run.report", dest="report", choices=["auto", "full", "no"], default="no")
    options.add_argument("--dry-run", action="store_true")
    said = options.parse_args(argv)
    where = Run(name=said.name, root=said.root, report=said.report, score=False)
    config = config_of(said.mergekit, said.domain, where)
    return config if not said.dry_run else Config(**{**vars(config), "dry_run": True})


if __name__ == "__main__":
    read = None
    if any(word == "--mergekit" or word.startswith("--mergekit=") for word in sys.argv[1:]):
        try:
            read = from_recipe(sys.argv[1:])
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    run(merge_alone, None, __doc__, partial(describe, checks=MERGE, anchored=False), config=read)
    leave(0)
