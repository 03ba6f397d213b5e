"""Integer products as processors make them: exact in 32 bits, or pairwise in 16 bits, which saturates.

``vpmaddubsw`` multiplies uint8 by int8, adds neighbours by twos in int16 with saturation; the sums of two are added up
in 32 bits. ``vpdpbusd`` adds four products in 32 bits. Source: Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 2, PMADDUBSW and VPDPBUSD.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def exact(activations: npt.NDArray[np.uint8], weights: npt.NDArray[np.int8]) -> Integers:
    """(M, K) uint8 times (N, K) int8, transposed, in 32 bits."""
    found: Integers = activations.astype(np.int64) @ weights.astype(np.int64).T
    return found


def pairwise(activations: npt.NDArray[np.uint8], weights: npt.NDArray[np.int8]) -> Integers:
    """The same with two products at a time added in int16; K is even."""
    products = activations.astype(np.int64)[:, None, :] * weights.astype(np.int64)[None, :, :]
    pairs = np.clip(products[..., ::2] + products[..., 1::2], -(1 << 15), (1 << 15) - 1)
    found: Integers = pairs.sum(-1)
    return found
