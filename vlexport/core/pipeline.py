"""Several components as one: the artifact that names them, and the session that runs them in order. No torch.

Stages and targets know neither: whatever opens an :class:`Artifact` goes through :func:`open_artifact`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlexport.core.artifact import Array, Artifact, DimRange, Session, Signature, Timing, fitted
from vlexport.core.wiring import wire

Opener = Callable[[Path, Artifact, int], Session]
_WEAKEST: tuple[Timing, ...] = ("none", "emulated", "real")


class Pipeline(Artifact):
    """The artifacts of several components, each in a folder of its name.

    Attributes:
        parts: Component → artifact.
        dims: Component → ranges of its dynamic dims.
        edges: ``("component.output", "component.input")`` pairs.
    """

    parts: dict[str, Artifact]
    dims: dict[str, dict[str, DimRange]]
    edges: tuple[tuple[str, str], ...]

    def needed_with(self, name: str) -> tuple[str, ...]:
        """Inputs of the components that edges connect with that of ``name``."""
        return wire(signatures(self.parts, self.dims), self.edges).needed(name)


class PipelineSession(Session):
    """Sessions of all components, run in the order of their edges.

    Inputs of a group of components that no edge connects with the others may be left out; so are its outputs then.
    """

    def __init__(self, pipeline: Pipeline, open_part: Callable[[str, Artifact], Session]) -> None:
        super().__init__(pipeline.inputs, pipeline.outputs)
        self._wiring = wire(signatures(pipeline.parts, pipeline.dims), pipeline.edges)
        with contextlib.ExitStack() as opened:
            self._sessions = {
                name: opened.enter_context(open_part(name, part)) for name, part in pipeline.parts.items()
            }
            self._closing = opened.pop_all()
        self.timing = min((each.timing for each in self._sessions.values()), key=_WEAKEST.index)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the components that ``inputs`` concern, all of them where every input is given."""
        known = [name for name in inputs if name in self._wiring.inputs]
        wanted = {each for name in known for each in self._wiring.needed(name)}
        specs = tuple(spec for spec in self.inputs if spec.name in wanted or not known)
        arrays = fitted(specs, inputs, known=[spec.name for spec in self.inputs])
        return self._wiring.run(arrays, {name: session.run for name, session in self._sessions.items()})

    def operator_times(self, inputs: Mapping[str, Array], *, runs: int) -> dict[str, tuple[int, float]]:
        """Of all components together, each on what the others give it."""
        given: dict[str, Mapping[str, Array]] = {}

        def recorded(name: str, values: Mapping[str, Array]) -> dict[str, Array]:
            given[name] = values
            return self._sessions[name].run(values)

        self._wiring.run(self.checked(inputs), {name: partial(recorded, name) for name in self._sessions})
        found: dict[str, tuple[int, float]] = {}
        for name, values in given.items():
            for operator, (count, ms) in self._sessions[name].operator_times(values, runs=runs).items():
                calls, spent = found.get(operator, (0, 0.0))
                found[operator] = (calls + count, spent + ms)
        return dict(sorted(found.items(), key=lambda each: -each[1][1]))

    def close(self) -> None:
        """Close all sessions."""
        self._closing.close()


def signatures(parts: Mapping[str, Artifact], dims: Mapping[str, dict[str, DimRange]]) -> dict[str, Signature]:
    """What each component takes and gives."""
    return {
        name: Signature(inputs=part.inputs, outputs=part.outputs, dims=dims.get(name, {}))
        for name, part in parts.items()
    }


def pipeline_of(
    parts: Mapping[str, Artifact], dims: Mapping[str, dict[str, DimRange]], edges: tuple[tuple[str, str], ...]
) -> Artifact:
    """One artifact for all components; the only one is itself.

    Raises:
        InputError: VLX1102 when they do not fit together.
    """
    whole = wire(signatures(parts, dims), edges).signature
    if len(parts) == 1:
        return next(iter(parts.values()))
    target = next(iter(parts.values())).target
    parts = dict(sorted(parts.items()))
    return Pipeline(
        target=target, path="", inputs=whole.inputs, outputs=whole.outputs, parts=parts, dims=dict(dims), edges=edges
    )


def artifact_from(values: Mapping[str, Any]) -> Artifact:
    """An artifact from plain values."""
    return (Pipeline if "parts" in values else Artifact).model_validate(values)


def open_artifact(opener: Opener, folder: Path, artifact: Artifact, threads: int) -> Session:
    """Open an artifact with what opens a single one.

    Args:
        opener: Of the target.
        folder: Where the artifact lies; components of a pipeline lie in folders below it.
        artifact: What to open.
        threads: For every component; 0 takes the recorded number.
    """
    if not isinstance(artifact, Pipeline):
        return opener(folder, artifact, threads)
    return PipelineSession(artifact, partial(_open_part, opener, folder, threads))


def _open_part(opener: Opener, folder: Path, threads: int, name: str, artifact: Artifact) -> Session:
    return opener(folder / name, artifact, threads)
