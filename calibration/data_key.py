"""DataKey: what identifies calibration samples, in constant memory. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from vlexport.core.dataset import Sample

_BITS = 256


@dataclass
class DataKey:
    """Identity of a stream of samples.

    Content hashes are added up, so that the order of files on disk, which says nothing, plays no part; a sample that is
    there twice counts twice. Where order says something, hashes are chained.

    Attributes:
        in_order: Whether the order of samples plays a part.
        samples: Samples added.
    """

    in_order: bool = False
    samples: int = 0
    _state: int = 0

    def add(self, sample: Sample) -> None:
        """Add one sample's content; its id and label do not count."""
        value = int(sample.content_hash(), 16)
        self.samples += 1
        if self.in_order:
            both = self._state.to_bytes(_BITS // 8, "big") + value.to_bytes(_BITS // 8, "big")
            value = int(hashlib.sha256(both).hexdigest(), 16)
            self._state = value
        else:
            self._state = (self._state + value) % (1 << _BITS)

    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(f"{self.samples} {self._state:x}".encode()).hexdigest()


def data_key(samples: Iterable[Sample], *, in_order: bool = False) -> DataKey:
    """The key of samples that are only read, not run."""
    key = DataKey(in_order)
    for sample in samples:
        key.add(sample)
    return key
