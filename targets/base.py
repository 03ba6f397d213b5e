"""The contract of a target: probe, lower, open. ``lower`` never optimises.

A target module imports no torch, no exporter and no runtime when it is imported: the half that runs on a device opens
sessions through the same class.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlexport.core.artifact import Artifact, Frozen, Session
from vlexport.core.errors import CapabilityError, InternalError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.pipeline import open_artifact

if TYPE_CHECKING:
    from vlexport.ir.program import Program
    from vlexport.passes.base import Pass
    from vlexport.passes.level import Level


API_VERSION = 1
"""Version of this contract. It grows when a target written for an earlier one would no longer work; a plugin writes the
number that it was written for, and does not import this one."""


class Probe(Frozen):
    """What a target finds on this machine.

    Attributes:
        available: Whether artifacts can be run here.
        version: Version of the runtime, empty when it is not installed.
        providers: Execution providers or devices it offers.
        instruction_set: Of this machine's processor.
        reason: Why it is not available, and what to install.
    """

    available: bool
    version: str = ""
    providers: tuple[str, ...] = ()
    instruction_set: tuple[str, ...] = ()
    reason: str = ""


class Target(abc.ABC):
    """One runtime that artifacts are made for.

    Class attributes:
        id: Name on the command line.
        summary: One line for ``vlexport targets``.
        precisions: Precisions it really runs, the default first.
        precision_reason: Why the first one is the default.
        Options: Typed options of lowering and opening.
        session_entry: ``module:function`` that opens a session in a child process. It gets one artifact and its folder;
            a bundle of several components is opened by calling it once for each.
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    precision_reason: ClassVar[str]
    Options: ClassVar[type[Frozen]]
    session_entry: ClassVar[str]

    @abc.abstractmethod
    def probe(self) -> Probe:
        """What is installed here. Never raises."""

    @abc.abstractmethod
    def lower(
        self,
        program: Program,
        folder: Path,
        *,
        options: Frozen,
        threads: int,
        rewrite: Callable[[Any], Any] | None = None,
    ) -> Artifact:
        """Write the artifact for a Program into ``folder``.

        Args:
            program: As ``program_passes`` spelled it.
            folder: Made where it does not exist.
            options: Typed options of this target.
            threads: Recorded in the artifact; 0 leaves it to wherever it is opened.
            rewrite: Runs ``lowered_passes`` on the lowered graph before it is written; None when there are none.

        Raises:
            CapabilityError: VLX0503 when an operator cannot be expressed.
        """

    @abc.abstractmethod
    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """The plain path of a user without vlexport, from the same captured graph: the denominator of speed-ups."""

    def program_passes(self) -> Sequence[Pass[Program]]:
        """Passes that spell the Program as this target wants it, run last."""
        return ()

    def lowered_passes(self, options: Frozen) -> Sequence[Pass[Any]]:
        """Passes over what ``lower`` makes, run before it is written; they work at ``lowered_level``."""
        return ()

    def lowered_level(self) -> Level[Any]:
        """How graphs that ``lower`` makes are copied, checked and run.

        Raises:
            InternalError: VLX0901 for a target that has no lowered passes.
        """
        raise InternalError("VLX0901", f"{self.id} has no lowered passes")

    def compatibility(self, options: Frozen) -> dict[str, str]:
        """Facts that a device can be checked against before it opens the artifact."""
        return {}

    def tools(self) -> dict[str, str]:
        """Versions of what takes part in lowering."""
        return {}

    def choose_precision(self, wished: str | None) -> tuple[str, str]:
        """Precision and the reason for it.

        Raises:
            CapabilityError: VLX0502 when the wished one is not run by this target.
        """
        if wished is None:
            return self.precisions[0], self.precision_reason
        if wished not in self.precisions:
            raise CapabilityError(
                "VLX0502", f"{self.id} does not run {wished} in this version", where="--precision",
                hint=f"it runs: {', '.join(self.precisions)}",
            )  # fmt: skip
        return wished, "asked for"

    def require(self) -> Probe:
        """The probe, or an error when artifacts cannot be run here.

        Raises:
            CapabilityError: VLX0501.
        """
        found = self.probe()
        if not found.available:
            raise CapabilityError("VLX0501", f"{self.id} cannot run here: {found.reason}", hint=found.reason)
        return found

    def open(
        self, folder: Path, artifact: Artifact, *, threads: int = 0, timeout_s: float | None = None
    ) -> IsolatedSession:
        """A session in a child process, which is killed when an answer takes longer than ``timeout_s`` seconds."""
        self.require()
        return IsolatedSession(self.session_entry, folder, artifact, threads=threads, timeout_s=timeout_s)

    def open_here(self, folder: Path, artifact: Artifact, *, threads: int = 0) -> Session:
        """A session in this process, for the runtime API."""
        self.require()
        module, _, function = self.session_entry.partition(":")
        return open_artifact(getattr(importlib.import_module(module), function), folder, artifact, threads)

    def check_options(self, values: dict[str, Any]) -> Frozen:
        """Typed options from plain values."""
        return self.Options.model_validate(values)
