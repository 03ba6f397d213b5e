"""numpy: tiny networks as a list of steps, run with numpy. No torch when imported: sessions open where there is none.

Its numbers are right and its speed means nothing, so its sessions say that their timing is emulated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from vlexport.core.artifact import Artifact, Frozen
from vlexport.targets.base import Brief, Probe, Target

if TYPE_CHECKING:
    from vlexport.ir.program import Program

API_VERSION = 1
"""The version of vlexport's interface that this was written for. A number: what is imported would always fit."""


class NumpyOptions(Frozen):
    """Options of the numpy target.

    Attributes:
        max_steps: The longest list of steps that is written; longer programs are refused.
    """

    max_steps: int = Field(default=1000, ge=1)


class NumpyTarget(Target):
    """A list of steps for numpy."""

    id: ClassVar[str] = "numpy"
    summary: ClassVar[str] = "list of steps for numpy, for tiny networks (a sample of a plugin)"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    precision_reason: ClassVar[str] = "it computes in the dtypes of the program"
    Options: ClassVar[type[Frozen]] = NumpyOptions
    session_entry: ClassVar[str] = "vlexport_toy.session:open_session"

    def probe(self) -> Probe:
        """numpy is always there."""
        return Probe(available=True, timing="emulated", version=np.__version__, providers=("numpy",))

    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write ``main.json`` (the steps) and ``tensors.npz`` beside it."""
        from vlexport_toy.lower import write_steps

        assert isinstance(brief.options, NumpyOptions)
        path = write_steps(program, folder, max_steps=brief.options.max_steps)
        return Artifact(
            target=self.id, path=path, inputs=program.signature.inputs, outputs=program.signature.outputs
        )  # fmt: skip

    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """There is no other way to run a program with numpy: the same steps, of the program as it was captured."""
        return self.lower(program, folder, Brief(NumpyOptions()))

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """The version of the format decides which session can open it."""
        from vlexport_toy.steps import FORMAT

        return {"steps_format": str(FORMAT)}

    def tools(self) -> dict[str, str]:
        """numpy runs the golden check."""
        return {"numpy": np.__version__}
