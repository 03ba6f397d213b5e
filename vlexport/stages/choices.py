"""What a config chooses, checked before any work is done: gates, options, passes, precision, places.

build stops at the first problem here, plan collects them all.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor

from vlexport.core.artifact import Frozen, Session
from vlexport.core.config import BuildConfig
from vlexport.core.device_profiles import DeviceProfile, device_profile
from vlexport.core.errors import CapabilityError, InternalError, UsageError, nearest
from vlexport.core.samples import Dataset, open_data
from vlexport.core.scheme import QUANTIZED
from vlexport.core.tokens import AUTO, TokensRequest, flag_of, tokens_from_text
from vlexport.core.user_metric import metric_names
from vlexport.core.verdict import Gate, gate_from_text
from vlexport.core.wrong_value import wrong_value
from vlexport.frontends.sources import Sources
from vlexport.ir.program import Program
from vlexport.passes import CATALOGUE as PASSES
from vlexport.passes import ON_REQUEST, offered_passes, pass_class
from vlexport.passes.base import STAGES, Pass, SampledPass
from vlexport.passes.pipeline import check_order
from vlexport.stages.validate import TIMED
from vlexport.targets import offered_targets
from vlexport.targets.base import Target

if TYPE_CHECKING:
    from vlexport.passes.quantize import QuantizeOptions
    from vlexport.passes.smooth_activations import SmoothActivationsOptions

HALF_PRECISIONS = ("fp16", "bf16")
"""Precisions that a pass types the Program to."""
INTEGER_PRECISIONS = QUANTIZED
"""Precisions for which values are rounded to 8 bits."""
PRECISION_PASSES = {
    "cast-floats": HALF_PRECISIONS, "smooth-activations": INTEGER_PRECISIONS, "equalize-ranges": INTEGER_PRECISIONS,
    "quantize": INTEGER_PRECISIONS, "fold-casts": INTEGER_PRECISIONS,
}  # fmt: skip
"""Passes that run with a precision → with which."""


def precision_of(config: BuildConfig, target: Target) -> tuple[str, str]:
    """Precision and the reason for it.

    Raises:
        CapabilityError: VLX0502.
    """
    return target.choose_precision(None if config.precision == "auto" else config.precision)


def unjudged(config: BuildConfig) -> BuildConfig:
    """A config without what judges a build, for who looks at a model and measures nothing."""
    return config.model_copy(update={"gate": (), "max_drop": None, "metric": ()})


def gates_of(config: BuildConfig) -> tuple[Gate, ...]:
    """All gates of a config, ``--max-drop`` among them; those that need data are refused without it.

    Raises:
        UsageError: VLX0702, VLX0804.
    """
    texts = [*config.gate, *([f"drop<={config.max_drop:g}"] if config.max_drop is not None else [])]
    own = metric_names(config.metric)
    gates = tuple(gate_from_text(text, extra=own) for text in texts)
    if own and config.data is None:
        raise UsageError("VLX0804", "--metric needs samples", where="--metric", hint="add --data DATA")
    for gate in gates:
        if gate.metric == "regress":
            raise UsageError(
                "VLX0804",
                f"gate {gate} needs full rounds, a build makes quick ones",
                where="--gate",
                hint="give it to `vlexport profile BUNDLE --against naive --reference MODEL`",
            )
        needs_data = gate.metric not in (*TIMED, "size_mb")
        if (needs_data and config.data is None) or (gate.metric in TIMED and not config.profile):
            flag = "--data DATA" if needs_data else "--profile"
            raise UsageError(
                "VLX0804",
                f"gate {gate} needs a measurement that this build does not make",
                where="--gate",
                hint=f"add {flag}",
            )
    return gates


def passes_of(config: BuildConfig, *, samples: Iterable[tuple[Tensor, ...]] = ()) -> list[Pass[Program]]:
    """Every pass of the catalogue, that of ``--tokens``, and those asked for by name, each at the end of its stage.

    Args:
        config: Their options.
        samples: What the pass of ``--tokens`` measures on, one tensor per input each.

    Raises:
        UsageError: VLX0703 for an unknown pass or option, VLX0405 when one asks for what no earlier pass establishes.
        CapabilityError: VLX1001, VLX1002, VLX1003 for a plugin that cannot be used.
    """
    made: list[Pass[Program]] = []
    for name in dict.fromkeys((*PASSES, *config.passes)):
        if name in ON_REQUEST:
            how = f"it runs with {_flag_of(name)}"
            raise UsageError("VLX0703", f"--pass {name}: {how}", where="--pass", hint="leave that --pass out")
        kind = pass_class(name)
        made.append(kind(_typed(kind.Options, config.scoped_options(name), name)))
    if config.tokens not in (None, AUTO):
        made.append(_tokens_pass(config, tokens_from_text(config.tokens), samples))
    made.sort(key=lambda each: STAGES.index(each.stage))  # stable: plugins stand behind ours of the same stage
    if config.passes:
        try:
            check_order(made)
        except InternalError as error:
            raise UsageError(error.code, error.message, where="--pass", hint="leave that --pass out") from error
    return made


def _tokens_pass(
    config: BuildConfig, request: TokensRequest, samples: Iterable[tuple[Tensor, ...]]
) -> SampledPass[Program]:
    """The pass of ``--tokens``, with the options given there and by ``--set``."""
    kind = pass_class(request.pass_name)
    if not issubclass(kind, SampledPass):
        raise InternalError("VLX0901", f"pass {request.pass_name} takes no samples")
    values = {**config.scoped_options(request.pass_name), **request.values}
    return kind(_typed(kind.Options, values, request.pass_name, flag=f"--tokens {request.method}"), samples=samples)


def _flag_of(name: str) -> str:
    """The flag that lets a pass run that only runs on request."""
    precisions = PRECISION_PASSES.get(name)
    return flag_of(name) if precisions is None else f"--precision {' or '.join(precisions)}"


def precision_passes_of(
    config: BuildConfig, precision: str, samples: Sequence[tuple[Tensor, ...]]
) -> list[Pass[Program]]:
    """Passes that type a Program for a target's precision.

    Args:
        config: Their options.
        precision: As chosen for the target.
        samples: What they measure on, one tensor per input each.

    Raises:
        UsageError: VLX0703 for an option that contradicts the precision.
    """
    if precision not in HALF_PRECISIONS:
        return []
    from vlexport.passes.cast_floats import CastFloats, CastFloatsOptions

    values = {"dtype": precision, **config.scoped_options(CastFloats.name)}
    if values["dtype"] != precision:
        raise UsageError(
            "VLX0703", f"--set {CastFloats.name}.dtype={values['dtype']} contradicts --precision {precision}",
            where="--set", hint="leave that --set out",
        )  # fmt: skip
    return [CastFloats(_typed(CastFloatsOptions, values, CastFloats.name), samples=samples)]


def quantize_options_of(config: BuildConfig) -> QuantizeOptions:
    """Options of quantize.

    Raises:
        UsageError: VLX0703.
    """
    from vlexport.passes.quantize import Quantize, QuantizeOptions

    found = _typed(QuantizeOptions, config.scoped_options(Quantize.name), Quantize.name)
    assert isinstance(found, QuantizeOptions)
    return found


def smooth_options_of(config: BuildConfig) -> SmoothActivationsOptions:
    """Options of smooth-activations.

    Raises:
        UsageError: VLX0703.
    """
    from vlexport.passes.smooth_activations import SmoothActivations, SmoothActivationsOptions

    found = _typed(SmoothActivationsOptions, config.scoped_options(SmoothActivations.name), SmoothActivations.name)
    assert isinstance(found, SmoothActivationsOptions)
    return found


def options_of(config: BuildConfig, target: Target) -> Frozen:
    """The target's options; every ``--set`` must name a target that exists, or a pass that runs.

    Raises:
        UsageError: VLX0703.
    """
    options = _typed(target.Options, config.scoped_options(target.id), target.id)
    scopes = _scopes(config, target, options)
    asleep = {name: f"add --pass {name}" for name in offered_passes()}
    asleep |= {name: f"add {_flag_of(name).partition(' or ')[0]}" for name in ON_REQUEST}
    asleep |= {each.name: f"add --set {target.id}.{each.option}=true" for each in target.lowered}
    for key in config.options:
        scope = key.partition(".")[0]
        if scope not in scopes:
            raise UsageError(
                "VLX0703",
                f"--set {key}: pass '{scope}' is not run"
                if scope in asleep
                else f"--set {key}: no pass or target '{scope}'{nearest(scope, [*scopes, *asleep])}",
                where="--set",
                hint=asleep.get(scope, f"known: {', '.join(scopes)}"),
            )
    return options


def settled_of(config: BuildConfig, target: Target, precision: str) -> Frozen:
    """The target's options, with what they leave open decided for the device and precision.

    Raises:
        UsageError: VLX0703.
    """
    return target.settled(options_of(config, target), precision=precision, device=profile_of(config, target))


def scopes_of(config: BuildConfig, target: Target) -> list[str]:
    """What a ``--set`` can be about in a build for this target: passes that run, and every target.

    Raises:
        UsageError: VLX0703 for an option of the target's own that it does not have.
    """
    return _scopes(config, target, _typed(target.Options, config.scoped_options(target.id), target.id))


def _scopes(config: BuildConfig, target: Target, options: Frozen) -> list[str]:
    wished = target.precisions[0] if config.precision in (None, "auto") else config.precision
    offered = target.precisions if config.precision == "auto" else (wished,)
    wanted = {*offered, *(target.float_precision(each) for each in offered if each in INTEGER_PRECISIONS)}
    requested = [name for name, precisions in PRECISION_PASSES.items() if wanted & {*precisions}]
    if config.tokens == AUTO:
        requested.append("reduce-tokens")
    elif config.tokens is not None:
        requested.append(tokens_from_text(config.tokens).pass_name)
    running = [each.name for each in target.lowered if getattr(options, each.option)]
    return [*PASSES, *requested, *config.passes, *offered_targets(), *running]


def lowered_passes_of(config: BuildConfig, target: Target, options: Frozen) -> list[Pass[Any]]:
    """The target's lowered passes that its options turn on, with their own options.

    Raises:
        UsageError: VLX0703 for an option that they do not have.
    """
    made: list[Pass[Any]] = []
    for each in target.lowered_passes(options):
        given = config.scoped_options(each.name)
        made.append(type(each)(_typed(type(each).Options, given, each.name)) if given else each)
    return made


def tools_of(config: BuildConfig, target: Target, lowered: Sequence[Pass[Any]] = ()) -> dict[str, str]:
    """Versions of what takes part in a build: tools of target and lowered passes, packages of the plugins it uses."""
    claims = [offered_passes()[name] for name in config.passes] + [offered_targets()[target.id]]
    plugins = {offer.distribution: offer.version for each in claims for offer in each if not offer.built_in}
    return {**versions_of(lowered), **target.tools(), **plugins}


def versions_of(passes: Sequence[Pass[Any]]) -> dict[str, str]:
    """Name → version of the outside packages that passes use; what is not installed is the pass's own error to tell."""
    found = {}
    for name in sorted({tool for each in passes for tool in each.tools}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).split("+")[0]
    return found


def why_untimed(session: Session, gates: Sequence[Gate]) -> str:
    """Why latency is not measured on a session, or an empty string.

    Raises:
        CapabilityError: VLX0803 when a gate needs it.
    """
    if session.timing == "real":
        return ""
    why = f"latency is not measured: the target's timing is {session.timing}"
    for gate in gates:
        if gate.metric in TIMED:
            raise CapabilityError("VLX0803", f"gate {gate}: {why}", where="--gate", hint="leave that --gate out")
    return why


def _typed(kind: type[Frozen], values: Mapping[str, str], scope: str, *, flag: str = "") -> Frozen:
    """Options of a pass or target; ``flag`` is where they come from, if not from ``--set``."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = next(iter(map(str, first["loc"])), "")
        wrong = "; or ".join(wrong_value(each) for each in error.errors() if each["loc"][:1] == first["loc"][:1])
        near = nearest(name, kind.model_fields) if name and name not in kind.model_fields else ""
        place = ": ".join(filter(None, (flag, name))) if flag else "--set " + ".".join(filter(None, (scope, name)))
        raise UsageError(
            "VLX0703",
            f"{place}: {wrong}{near}",
            where=flag.partition(" ")[0] or "--set",
            hint=f"options of {scope}: {', '.join(kind.model_fields) or 'none'}",
        ) from error


def profile_of(config: BuildConfig, target: Target) -> DeviceProfile:
    """The device profile that ``--for`` names, or the target's own.

    Raises:
        UsageError: VLX0703.
    """
    return device_profile(config.device_profile or target.default_device, target=target.id)


def open_dataset(data: str | None, sources: Sources, *, skip_bad: bool = False) -> Dataset | None:
    """DATA for a model, or None where none was given; ``skip_bad`` leaves out what cannot be read or holds NaN.

    Raises:
        DataError: VLX02xx.
    """
    if data is None:
        return None
    return open_data(
        data, inputs=sources.signature.inputs, preprocess=sources.preprocess, labels=sources.labels or None,
        skip_bad=skip_bad,
    )  # fmt: skip
