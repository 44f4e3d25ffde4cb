"""From the command line to a stage: parse, then describe or run; say in one sentence what is wrong."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

from common.config import Config, parse
from common.errors import InputError
from common.experiment import Domain
from common.plan import describe

FOLDERS = {"vision": "Vision", "nlu": "NLU", "nlg": "NLG"}


def run(stage: Callable[[Config, Domain], Any], description: str | None) -> None:
    """Run one stage for the config on the command line, in the domain it names; with --dry-run say what it would do.

    Ends the process with status 2 on an InputError, and with 130 when interrupted.
    """
    try:
        config = parse(description or "")
        # By name: nothing in common depends on a domain.
        domain = cast(Domain, import_module(f"{FOLDERS[config.domain]}.domain"))
        if config.dry_run:
            print(describe(config, domain))
        else:
            stage(config, domain)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
