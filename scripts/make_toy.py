"""Make a toy: real models and data, small enough for two cores. `python scripts/make_toy.py vision --out toy/vision`"""

import argparse
import importlib
from pathlib import Path

TOYS = ["vision", "nlu", "nlg", "minilm", "smollm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("toy", choices=TOYS)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints/ and data/")
    parser.add_argument("--train", action="store_true", help="train anew and replace the packed file in scripts/toy/")
    parser.add_argument("--rate", type=float, help="vision: experts fine-tuned anew at this rate, beside the same base")
    args = parser.parse_args()
    if args.rate and args.toy != "vision":
        parser.error("--rate is for the vision toy")
    toy = importlib.import_module(f"toy.{args.toy}")
    if args.rate:
        toy.make_at_rate(args.out, args.rate)
    else:
        toy.make(args.out, args.train)


if __name__ == "__main__":
    main()
