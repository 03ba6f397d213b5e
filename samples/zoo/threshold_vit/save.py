"""Writes ``model.pt``: the threshold ViT at batch 1, with its selections as they are.

::

    python samples/zoo/threshold_vit/save.py -o model.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model import CLASSES, load_model

import vlexport


def main() -> int:
    parser = argparse.ArgumentParser(description="Save the threshold ViT.")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.pt"), help="where to write it")
    args = parser.parse_args()
    model = load_model()
    labels = [str(digit) for digit in range(CLASSES)]
    vlexport.save(model, args.output, inputs=model.example_inputs, labels=labels, dynamic=False)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
