"""Make a toy: real models and data, small enough for two cores. `python scripts/make_toy.py vision --out toy/vision`"""

import argparse
import importlib
from pathlib import Path

TOYS = ["vision", "nlu", "nlg", "minilm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("toy", choices=TOYS)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints/ and data/")
    parser.add_argument("--train", action="store_true", help="train anew and replace the packed file in scripts/toy/")
    args = parser.parse_args()
    importlib.import_module(f"toy.{args.toy}").make(args.out, args.train)


if __name__ == "__main__":
    main()
