"""MODEL as one or several Sources, and what they are together: names, preprocessing, labels, a way to run them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlexport.core.artifact import ONLY_COMPONENT, Array, DimRange, Signature
from vlexport.core.baked_values import baked
from vlexport.core.bundle_schema import canonical_json
from vlexport.core.config import BuildConfig, flags_of
from vlexport.core.errors import UsageError, VlexportError
from vlexport.core.preprocess import Preprocess
from vlexport.core.whole import by_public_name, whole_labels
from vlexport.core.wiring import Wiring, wire
from vlexport.frontends.components import COMPONENTS_FILE, find_components, read_components
from vlexport.frontends.source import Source, open_source
from vlexport.ir.narrow import narrowed

_OF_ONE_MODEL = (
    "arch", "arch_arg", "weights_key", "input", "outputs", "bake", "preprocess", "fold_preprocess", "allow_code",
)  # fmt: skip
"""Options that say how to open a single model."""


@dataclass(frozen=True)
class Sources:
    """The components of a model; ``main`` alone for most.

    Attributes:
        components: Name → Source, in the order in which they can be run.
        edges: ``("component.output", "component.input")`` pairs.
        wiring: How they fit together.
    """

    components: Mapping[str, Source]
    edges: tuple[tuple[str, str], ...]
    wiring: Wiring

    @property
    def only(self) -> Source | None:
        """The single one; None where there are several."""
        return next(iter(self.components.values())) if len(self.components) == 1 else None

    @property
    def signature(self) -> Signature:
        """Inputs, outputs and dims of the whole."""
        return self.only.program.signature if self.only is not None else self.wiring.signature

    @property
    def preprocess(self) -> dict[str, Preprocess]:
        """Input of the whole → how an image becomes that input."""
        return by_public_name(self.wiring, {name: each.preprocess for name, each in self.components.items()})

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the whole's first output, if known."""
        return whole_labels(self.wiring, {name: each.labels for name, each in self.components.items()})

    @property
    def source_hash(self) -> str:
        """The single one's, or the SHA-256 of all by name and of the edges."""
        if self.only is not None:
            return self.only.source_hash
        hashes = {name: each.source_hash for name, each in self.components.items()}
        return hashlib.sha256(canonical_json({"components": hashes, "edges": self.edges}).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(note for name, each in self.components.items() for note in self.said(name, each.notes))

    def said(self, name: str, notes: Iterable[str]) -> tuple[str, ...]:
        """Notes that say which of several components they are about."""
        return tuple(notes if self.only is not None else (f"{name}: {note}" for note in notes))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run in PyTorch on numpy arrays, by the whole's names."""
        return self.wiring.run(inputs, {name: each.run for name, each in self.components.items()})

    def inputs_of(self, inputs: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """What each component is given when the whole is run on ``inputs``."""
        if self.only is not None:
            return {name: dict(inputs) for name in self.components}
        seen: dict[str, dict[str, Array]] = {}

        def recorded(name: str, given: Mapping[str, Array]) -> dict[str, Array]:
            seen[name] = dict(given)
            return self.components[name].run(given)

        self.wiring.run(inputs, {name: partial(recorded, name) for name in self.components})
        return seen

    def narrowed(self, dims: Mapping[str, DimRange]) -> Sources:
        """The same with dims of the whole that take fewer sizes."""
        if not dims:
            return self
        made = dict(self.components)
        for name, each in self.components.items():
            if own := self.wiring.dims.own(name, dims):
                made[name] = replace(each, program=narrowed(each.program, own))
        return _sources(made, self.edges)

    def with_sources(self, components: Mapping[str, Source]) -> Sources:
        """The same components and edges with other Sources, of the same names and shapes."""
        return _sources(dict(components), self.edges)

    def with_outputs(self, names: Sequence[str]) -> Sources:
        """A single model with these outputs alone; the same where it has no others, or is several.

        Raises:
            UsageError: VLX0703 for an output that it does not have.
        """
        if self.only is None or list(names) == [spec.name for spec in self.signature.outputs]:
            return self
        return _sources({name: each.with_outputs(names) for name, each in self.components.items()}, self.edges)

    def with_baked(self, texts: Sequence[str]) -> Sources:
        """A single model with those of these inputs constant that it has; the same where it is several.

        Raises:
            UsageError: VLX0707 for a value that does not fit.
        """
        there = {spec.name for spec in self.signature.inputs}
        given = [each for each in map(baked, texts) if each.name in there]
        if self.only is None or not given:
            return self
        return _sources({name: each.with_baked(given) for name, each in self.components.items()}, self.edges)

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Errors inside say which of several components they are about."""
        with _named(name if self.only is None else ""):
            yield


def open_sources(config: BuildConfig) -> Sources:
    """Open MODEL as the config says: a model file, or several that ``components.toml`` names.

    Raises:
        ModelFileError: VLX01xx, VLX1101.
        InputError: VLX1102 when components do not fit together.
        CaptureError: VLX03xx.
        UsageError: VLX0703 for an option that does not fit.
    """
    file = find_components(Path(config.model))
    if file is None:
        return _sources({ONLY_COMPONENT: open_source(config)}, ())
    for option in _OF_ONE_MODEL:
        if getattr(config, option):
            flag = flags_of(option)[0]
            raise UsageError(
                "VLX0703", f"{flag} is about a single model, {COMPONENTS_FILE} names several", where=flag,
                hint="save each component with vlexport.save, with what belongs to it",
            )  # fmt: skip
    found, files = read_components(file)
    components = {}
    for name, model in sorted(files.items()):
        with _named(name):
            components[name] = open_source(config.model_copy(update={"model": str(model)}))
    return _sources(components, found.edges)


def _sources(components: Mapping[str, Source], edges: tuple[tuple[str, str], ...]) -> Sources:
    wiring = wire({name: each.program.signature for name, each in components.items()}, edges)
    return Sources({name: components[name] for name in wiring.order}, edges, wiring)


@contextlib.contextmanager
def _named(component: str) -> Iterator[None]:
    try:
        yield
    except VlexportError as error:
        if component:
            error.where = f"component {component}" + (f", {error.where}" if error.where else "")
        raise
