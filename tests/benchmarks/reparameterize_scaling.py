"""Seconds and peak memory of reparameterize on a MobileOne-like net of 1, 2 and 4 times the depth.

    python tests/benchmarks/reparameterize_scaling.py [--depth N]

Every block is four convolutions with batch norms, one 1×1 and one batch norm of its own, summed, depthwise and
then pointwise, as in MobileOne. Time is that of the processor in the pass alone, without gate; memory is the growth of
the peak resident set.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor, nn

from tests.harness import captured, randomize
from vlexport.passes.reparameterize import Reparameterize


class Rep(nn.Module):
    """A sum of branches."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(width))
            for k in (*[kernel] * 4, 1)
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        total = self.norm(x)
        for conv in self.convs:
            total = total + conv(x)
        return total.relu()


def measured(depth: int, width: int) -> tuple[int, int, float, float, float]:
    """Calls before and after, seconds, growth of the peak in MB, weights in MB."""
    torch.manual_seed(0)
    blocks = [Rep(width, kernel, groups) for _ in range(depth) for kernel, groups in ((3, width), (1, 1))]
    program = captured(randomize(nn.Sequential(*blocks)), torch.randn(1, width, 16, 16))
    before, size = len(program.calls()), program.size_bytes / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    Reparameterize().run(program)
    seconds = time.process_time() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return before, len(program.calls()), seconds, growth, size


def main() -> None:
    """Print one line a depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the shallowest net")
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured(1, given.width)
    first = 0.0
    for times in (1, 2, 4):
        before, after, seconds, growth, size = measured(given.depth * times, given.width)
        first = first or seconds
        print(
            f"{times}x: {before} calls become {after} in {seconds:.2f} s ({seconds / first:.2f} of 1x), "
            f"peak + {growth:.0f} MB for {size:.0f} MB of weights"
        )


if __name__ == "__main__":
    main()
