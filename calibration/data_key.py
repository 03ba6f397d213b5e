"""DataKey: what identifies calibration samples, in constant memory. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlexport.core.dataset import Sample
from vlexport.core.errors import DataError

_BITS = 256


@dataclass
class DataKey:
    """Identity of a stream of samples.

    Content hashes are added up, so that the order of files on disk, which says nothing, plays no part; a sample that is
    there twice counts twice. Where order says something, hashes are chained.

    Attributes:
        in_order: Whether the order of samples plays a part.
        needed: Different samples are counted up to so many.
        samples: Samples added.
    """

    in_order: bool = False
    needed: int = 0
    samples: int = 0
    _state: int = 0
    _different: set[int] = field(default_factory=set)

    @property
    def different(self) -> int:
        """Samples that are no copy of another one, up to ``needed``."""
        return len(self._different)

    def add(self, sample: Sample) -> None:
        """Add one sample's content; its id and label do not count."""
        value = int(sample.content_hash(), 16)
        self.samples += 1
        if self.different < self.needed:
            self._different.add(value)
        if self.in_order:
            both = self._state.to_bytes(_BITS // 8, "big") + value.to_bytes(_BITS // 8, "big")
            value = int(hashlib.sha256(both).hexdigest(), 16)
            self._state = value
        else:
            self._state = (self._state + value) % (1 << _BITS)

    def digest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(f"{self.samples} {self._state:x}".encode()).hexdigest()

    def require_enough(self) -> None:
        """Refuse samples of which not as many differ as are needed: copies of one photo tell no more than that photo.

        Raises:
            DataError: VLX0214.
        """
        if self.different >= self.needed:
            return
        what, wanted = f"{self.samples} calibration samples", f"{self.needed} are needed"
        if self.different < self.samples:
            one = "all the same" if self.different == 1 else f"no more than {self.different} different ones"
            what, wanted = f"{what}, {one},", f"{self.needed} different ones are needed"
        raise DataError(
            "VLX0214", f"{what} are too few: {wanted}", where="--calib",
            hint="give more samples that look like those of later use, or a precision without calibration",
        )  # fmt: skip


def data_key(samples: Iterable[Sample], *, in_order: bool = False, needed: int = 0) -> DataKey:
    """The key of samples that are only read, not run."""
    key = DataKey(in_order, needed)
    for sample in samples:
        key.add(sample)
    return key
