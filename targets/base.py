"""The contract of a target: probe, lower, open. ``lower`` never optimises.

A target module imports no torch, no exporter and no runtime when it is imported: the half that runs on a device opens
sessions through the same class.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlexport.core.artifact import ONLY_COMPONENT, Artifact, Frozen, Session, Timing
from vlexport.core.device_profiles import THIS, DeviceProfile, device_profiles
from vlexport.core.errors import CapabilityError, InternalError, VlexportError
from vlexport.core.isolate import IsolatedSession
from vlexport.core.pipeline import open_artifact
from vlexport.core.preprocess import Preprocess
from vlexport.core.scheme import QuantScheme

if TYPE_CHECKING:
    from torch.fx import Node

    from vlexport.core.bundle_schema import Change
    from vlexport.ir.program import Program
    from vlexport.passes.base import Pass
    from vlexport.passes.level import Level
    from vlexport.passes.quantization.decisions import Decisions, LayerDecision


API_VERSION = 1
"""Version of this contract. It grows when a target written for an earlier one would no longer work; a plugin writes the
number that it was written for, and does not import this one."""


ProductKind = Literal["fp32", "int8"]
"""What a plain product of two matrices computes in."""


@dataclass(frozen=True)
class PlainProduct:
    """One product of an input and a stored matrix: what a runtime's linears can reach at most.

    Attributes:
        kind: What it computes in.
        artifact: To be opened like any other.
        macs: Multiply-accumulates of a run.
    """

    kind: ProductKind
    artifact: Artifact
    macs: int


class Probe(Frozen):
    """What a target finds on this machine.

    Attributes:
        available: Whether artifacts can be run here.
        timing: What the sessions that :meth:`Target.open` gives here are good for: ``real``, ``emulated`` (right
            numbers, wrong speed) or ``none`` where nothing runs.
        version: Version of the runtime, empty when it is not installed.
        providers: Execution providers or devices it offers.
        instruction_set: Of this machine's processor.
        reason: Why it is not available, and what to install.
        emulator: Where the timing is emulated: what runs artifacts in place of the target's own runtime.
    """

    available: bool
    timing: Timing = "real"
    version: str = ""
    providers: tuple[str, ...] = ()
    instruction_set: tuple[str, ...] = ()
    reason: str = ""
    emulator: str = ""


@dataclass(frozen=True)
class Brief:
    """What lowering depends on beside the Program.

    Attributes:
        options: Typed options of the target.
        device: The machine that will run the artifact.
        precision: One of the target's precisions; the Program is typed accordingly already.
        threads: Recorded in the artifact; 0 leaves it to wherever it is opened.
        name: Of the component; names the artifact's files.
        labels: Class names of the first output, if known.
        preprocess: Input name → how an image becomes that input.
        rewrite: Runs ``lowered_passes`` on the lowered graph before it is written; None when there are none.
        fallback: The same Program in the target's ``fallback_precision``, to lie beside a quantized one; None for none.
    """

    options: Frozen
    device: DeviceProfile = field(default_factory=lambda: device_profiles()[THIS])
    precision: str = "fp32"
    threads: int = 0
    name: str = ONLY_COMPONENT
    labels: tuple[str, ...] = ()
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict)
    rewrite: Callable[[Any], Any] | None = None
    fallback: Program | None = None


class LoweredPass(Frozen):
    """A pass over what a target lowers to, and how a user asks for it.

    Attributes:
        name: Its id.
        value: ``module:class``, imported when it is used.
        option: The target's option that turns it on, true or false; None where :meth:`Target.settled` decides.
        searched: ``--autotune`` measures the artifact with it and without.
    """

    name: str
    value: str
    option: str
    searched: bool = False

    def kind(self) -> type[Pass[Any]]:
        """Its class."""
        module, _, attribute = self.value.partition(":")
        found: type[Pass[Any]] = getattr(importlib.import_module(module), attribute)
        return found


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
        fixed_batch: Whether the batch is narrowed to 1 where the user asks for nothing else; such a target also wants
            an upper bound for every dynamic dim.
        default_device: Device profile where none is asked for.
        lowered: Passes over what it lowers to, in the order they run.
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    precision_reason: ClassVar[str]
    Options: ClassVar[type[Frozen]]
    session_entry: ClassVar[str]
    fixed_batch: ClassVar[bool] = False
    default_device: ClassVar[str] = THIS
    lowered: ClassVar[tuple[LoweredPass, ...]] = ()

    def schemes(self) -> tuple[QuantScheme, ...]:
        """How it wants quantized models, the preferred way first; none where it takes them in no way."""
        return ()

    @abc.abstractmethod
    def probe(self) -> Probe:
        """What is installed here. Never raises."""

    def probe_for(self, brief: Brief) -> Probe:
        """As :meth:`probe`, for artifacts made by this brief: options may ask for more than the runtime."""
        return self.probe()

    def computes_in(self, brief: Brief) -> str:
        """The precision that results have, where options ask the runtime for less than the artifact's own."""
        return brief.precision

    def missing_tools(self, brief: Brief) -> str:
        """What lowering needs and this machine lacks, and how to install it; empty when nothing is missing."""
        return ""

    def problems(self, program: Program, brief: Brief) -> Sequence[VlexportError]:
        """What would keep the artifact of a Program from being made or from running, told before anything is built.

        Args:
            program: As ``program_passes`` spelled it.
            brief: As for :meth:`lower`.
        """
        return ()

    @abc.abstractmethod
    def lower(self, program: Program, folder: Path, brief: Brief) -> Artifact:
        """Write the artifact for a Program into ``folder``.

        Args:
            program: As ``program_passes`` spelled it.
            folder: Made where it does not exist.
            brief: Options, device, precision and names.

        Raises:
            CapabilityError: VLX0503 when an operator cannot be expressed.
        """

    @abc.abstractmethod
    def lower_naive(self, program: Program, folder: Path) -> Artifact:
        """The plain path of a user without vlexport, from the same captured graph: the denominator of speed-ups.

        Raises:
            CapabilityError: VLX0503 where it cannot express the graph.
        """

    def program_passes(self, brief: Brief) -> Sequence[Pass[Program]]:
        """Passes that spell the Program as this target wants it, run last."""
        return ()

    def emit_quant(
        self, program: Program, decisions: Decisions, nodes: Mapping[str, Node], layer: LayerDecision
    ) -> Change:
        """Spell one quantized call as this target wants it; see :mod:`vlexport.passes.quantize`.

        Args:
            program: Changed in place.
            decisions: All of them.
            nodes: Key → node, of the Program before any was spelled.
            layer: The call.

        Raises:
            CapabilityError: VLX0502 for a target that runs no integers.
        """
        raise CapabilityError(
            "VLX0502", f"{self.id} does not run integers in this version", where="--precision",
            hint=f"it runs: {', '.join(self.precisions)}",
        )  # fmt: skip

    def quantized_for(self, brief: Brief) -> DeviceProfile:
        """The device that a scheme has to fit: where an option says better than the profile what it is, so it does."""
        return brief.device

    def float_precision(self, precision: str) -> str:
        """What a quantized artifact computes in where it is not quantized."""
        return "fp32"

    def fallback_precision(self, brief: Brief) -> str:
        """The precision in which a quantized artifact carries its Program once more; empty for none."""
        return ""

    def quantized_passes(self, scheme: QuantScheme, *, min_sqnr_db: float) -> Sequence[Pass[Program]]:
        """Passes that end the spelling of a quantized Program once its floats are typed, and are gated with it.

        Args:
            scheme: What it was quantized by.
            min_sqnr_db: What approximate ones among them have to keep.
        """
        return ()

    def lowered_passes(self, options: Frozen) -> Sequence[Pass[Any]]:
        """Passes over what ``lower`` makes, run before it is written: those of ``lowered`` that the options turn on.

        They work at ``lowered_level``.
        """
        return [each.kind()() for each in self.lowered if getattr(options, each.option)]

    def lowered_level(self) -> Level[Any]:
        """How graphs that ``lower`` makes are copied, checked and run.

        Raises:
            InternalError: VLX0901 for a target that has no lowered passes.
        """
        raise InternalError("VLX0901", f"{self.id} has no lowered passes")

    def settled(self, options: Frozen, *, precision: str, device: DeviceProfile) -> Frozen:
        """The options with what they leave open decided, by what was measured on devices like the given one.

        Args:
            options: As given.
            precision: As chosen.
            device: Where the artifact will run.
        """
        return options

    def implied_options(self, model_name: str) -> Mapping[str, str]:
        """Option → value that follows from the model's name where the user gives none; the recipe records it."""
        return {}

    def tunables(self, options: Frozen) -> Mapping[str, tuple[str, ...]]:
        """Option → values worth trying beside the one of ``options``, for options that :meth:`retuned` can change.

        They leave what the artifact computes as it is, up to rounding, and every file of it untouched.
        """
        return {}

    def relowered(self, options: Frozen) -> Mapping[str, tuple[str, ...]]:
        """Option → values worth trying on this machine, for options that change the artifact itself.

        Searched passes of :attr:`lowered` are tried anyway.
        """
        return {}

    def retuned(self, artifact: Artifact, options: Frozen) -> Artifact:
        """The same files, opened as ``options`` say.

        Raises:
            InternalError: VLX0901 for a target that has no tunables.
        """
        raise InternalError("VLX0901", f"{self.id} has no options to open an artifact with")

    def compatibility(self, brief: Brief) -> dict[str, str]:
        """Facts that a device can be checked against before it opens the artifact."""
        return {}

    def plain_products(self, artifact: Artifact, precision: str, folder: Path) -> Sequence[PlainProduct]:
        """Products to measure an artifact's speed by, written into ``folder``; none where none would say anything.

        Args:
            artifact: Opened with these options, they run where it runs.
            precision: Of the artifact.
            folder: Exists and is empty.
        """
        return ()

    def usage(self, artifact: Artifact, folder: str) -> Sequence[str]:
        """One line that uses the artifact of the bundle in ``folder``; empty where ``vlexport.load`` does."""
        return ()

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

    def require_tools(self, brief: Brief) -> None:
        """Refuse to build where lowering cannot work; the machine that builds need not be one that runs.

        Raises:
            CapabilityError: VLX0501.
        """
        if missing := self.missing_tools(brief):
            what, _, install = missing.partition(": ")
            raise CapabilityError("VLX0501", f"{self.id} cannot be built here: {what}", hint=install or missing)

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
