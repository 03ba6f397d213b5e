"""Writes the trained classifier as one file that ``vlexport build`` needs nothing else for.

Run from the repository's root::

    python samples/solar_cells/save.py -o model.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from data import LABELS, PREPROCESS
from model import IMAGE_SIZE, load_model

import vlexport


def main() -> int:
    parser = argparse.ArgumentParser(description="Save the solar cell classifier for vlexport build.")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.pt"), help="the file to write")
    args = parser.parse_args()

    example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    vlexport.save(load_model(), args.output, inputs={"image": example}, preprocess=PREPROCESS, labels=LABELS)
    print(f"wrote {args.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
