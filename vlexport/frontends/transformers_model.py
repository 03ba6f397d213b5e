"""A transformers model from its folder: the config says which class, our own readers open the weights.

Nothing is fetched, and no code of the folder runs unless the user consents. What a config could fetch (kernels,
pretrained backbones) is taken out of it before transformers sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlexport.core.errors import CapabilityError, DataError, ModelFileError
from vlexport.core.preprocess import Preprocess
from vlexport.frontends import compat
from vlexport.frontends.architecture import WEIGHT_ARGUMENTS, Architecture
from vlexport.frontends.fit_weights import listed
from vlexport.frontends.transformers_folder import CONFIG_FILE, config_in, labels_in, preprocess_in

_FETCHING = frozenset(
    {"_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"}
    | {"experts_implementation", "kernel_config", "use_kernels", "use_pretrained_backbone", "name_or_path"}
    | {"_name_or_path", "transformers_weights", "fusion_config", *WEIGHT_ARGUMENTS}
)
"""Keys of a config that choose how or with what else a model is loaded; none says what it computes."""

_TIMM_NAMES = ("architecture", "backbone")

_DEFAULT_WORDS = 16
_MOST_WORDS = 2**31
_LARGEST_EDGE = 4096
_MOST_CHANNELS = 1024
_MOST_ELEMENTS = 2**28
"""Of an example image: a config may claim any size, and memory is taken for it."""


def transformers_identity(folder: Path) -> bytes:
    """What the folder says about the architecture, for a content hash."""
    return b"transformers\0" + hashlib.sha256((folder / CONFIG_FILE).read_bytes()).digest()


def transformers_model(
    folder: Path, weights: Mapping[str, Tensor], *, allow_code: bool
) -> tuple[Architecture, tuple[str, ...]]:
    """The model of a folder with these weights, and notes.

    Raises:
        ModelFileError: VLX0108 the folder brings code, VLX0109 the weights do not fit, VLX0110 the model cannot be
            made, VLX0113 it is quantized, VLX0115 the folder is not understood.
        CapabilityError: VLX0501 when transformers is not installed.
    """
    values = config_in(folder)
    quantized = values.get("quantization_config")
    if quantized is not None:
        method = str(quantized.get("quant_method", "some method")) if isinstance(quantized, dict) else "some method"
        raise ModelFileError(
            "VLX0113", f"the model is quantized already, by {method}", where=f"{folder}/{CONFIG_FILE}",
            hint="take the model from before quantization, and choose a precision with --precision",
        )  # fmt: skip
    if elsewhere := _elsewhere(values):
        raise ModelFileError(
            "VLX0110", f"the config takes a part from elsewhere: {elsewhere!r:.80}", where=f"{folder}/{CONFIG_FILE}",
            hint="name timm's model alone, without the hub or the folder that it came from",
        )  # fmt: skip
    transformers = _transformers()
    with _offline(transformers):
        config, kind = _classes(transformers, folder, _cleaned(values), values, allow_code=allow_code)
        module, notes = _loaded(kind, config, weights, folder)
    steps, said = _preprocess(folder)
    inputs = example_inputs(module, config, steps)
    return Architecture(module, inputs, steps, labels_in(values)), (*notes, *said)


def example_inputs(module: nn.Module, config: Any, steps: Preprocess | None) -> dict[str, Tensor] | None:
    """Seeded inputs by the names of ``forward``: an image of the config's size, words, or both; None when unknown."""
    taken = inspect.signature(module.forward).parameters
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    main = getattr(module, "main_input_name", "")
    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if "input_ids" in taken and (main == "input_ids" or both):
        text = getattr(config, "text_config", None) or config
        length = _count(getattr(text, "max_position_embeddings", None), _MOST_WORDS) or _DEFAULT_WORDS
        words = _count(getattr(text, "vocab_size", None), _MOST_WORDS) or 2
        shape = (1, min(length, _DEFAULT_WORDS))
        found["input_ids"] = torch.randint(0, max(words, 2), shape, generator=generator)
        if "attention_mask" in taken and not both:
            found["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    if "pixel_values" in taken and (main == "pixel_values" or both):
        image = _image_shape(config, steps)
        if image is None:
            return None
        found["pixel_values"] = torch.randn((1, *image), generator=generator)
    return {name: found[name] for name in taken if name in found} or None


def _image_shape(config: Any, steps: Preprocess | None) -> tuple[int, ...] | None:
    """Frames if it takes a video, channels, height, width; None where the config says none that can be meant."""
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    held = next((part for part in parts if getattr(part, "image_size", None)), None)
    size = getattr(held, "image_size", None)
    if size is None:
        size = list(steps.output_shape[1:]) if steps is not None else []
    if isinstance(size, dict):
        size = [size.get(name) for name in ("height", "width")]
    edges = [_count(edge, _LARGEST_EDGE) for edge in (size if isinstance(size, list | tuple) else (size, size))]
    stated = (_count(getattr(part, "num_channels", None), _MOST_CHANNELS) for part in parts)
    channels = next((count for count in stated if count is not None), 3)
    frames = getattr(held, "num_frames", None)
    shape = (*(() if frames is None else (_count(frames, _LARGEST_EDGE),)), channels, *edges)
    known = tuple(count for count in shape if count is not None)
    whole = len(edges) == 2 and len(known) == len(shape) and math.prod(known) <= _MOST_ELEMENTS
    return known if whole else None


def _count(value: object, most: int) -> int | None:
    """A number of a config as a size: None for what is no number, or none that can be meant."""
    return value if type(value) is int and 0 < value <= most else None


def _transformers() -> Any:
    compat.declare_torchvision_operators()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CapabilityError(
            "VLX0501", "transformers is not installed", where="--arch", hint="pip install transformers"
        ) from error


def _cleaned(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _cleaned(each) for key, each in values.items() if key not in _FETCHING}
    return [_cleaned(each) for each in values] if isinstance(values, list) else values


def _elsewhere(values: Any) -> str:
    """What timm would look up on a hub or in another folder (``hf-hub:…``, ``local-dir:…``); empty if nothing is."""
    if isinstance(values, list):
        return next(filter(None, map(_elsewhere, values)), "")
    if not isinstance(values, dict):
        return ""
    named = (values.get(key) for key in _TIMM_NAMES)
    here = next((name for name in named if isinstance(name, str) and ":" in name), "")
    return here or next(filter(None, map(_elsewhere, values.values())), "")


def _classes(
    transformers: Any, folder: Path, values: dict[str, Any], given: dict[str, Any], *, allow_code: bool
) -> tuple[Any, Any]:
    """The config object and the model's class, by transformers' own mapping from model types to classes."""
    where = f"{folder}/{CONFIG_FILE}"
    if given.get("auto_map"):
        if not allow_code:
            raise ModelFileError(
                "VLX0108", "the folder brings its own code (auto_map in config.json)", where=where,
                hint="--allow-code runs it, if you trust it; where transformers itself has the model, delete auto_map",
            )  # fmt: skip
        return _brought(transformers, folder, values, given["auto_map"])
    known = transformers.CONFIG_MAPPING
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ModelFileError(
            "VLX0110", f"transformers {transformers.__version__} has no model type {kind!r:.60}", where=where,
            hint="update transformers, or give the architecture with --arch",
        )  # fmt: skip
    config = _made(lambda: known[kind].from_dict(values), where)
    named = values.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not name:
        mapping = transformers.MODEL_MAPPING
        found = mapping.get(type(config), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or not issubclass(type(config), found.config_class or ()):  # type: ignore[union-attr]
        raise ModelFileError(
            "VLX0110", f"transformers {transformers.__version__} has no class {name or kind!r:.60} for this config",
            where=where, hint="update transformers, or give the architecture with --arch",
        )  # fmt: skip
    return config, found


def _brought(transformers: Any, folder: Path, values: dict[str, Any], auto_map: Any) -> tuple[Any, Any]:
    """Config and class from the folder's own code; the user consented to it."""
    where = f"{folder}/{CONFIG_FILE}"
    names = auto_map if isinstance(auto_map, dict) else {}
    references = {key: value for key, value in names.items() if isinstance(value, str)}
    model = next((references[key] for key in references if key.startswith("AutoModel")), None)
    if model is None or any("--" in value for value in references.values()):
        raise ModelFileError(
            "VLX0110", "auto_map names no model class of this folder", where=where,
            hint="code of another repository is not fetched: put it into the folder",
        )  # fmt: skip
    dynamic = importlib.import_module("transformers.dynamic_module_utils")

    def load() -> tuple[Any, Any]:
        def held(reference: str) -> Any:
            return dynamic.get_class_from_dynamic_module(reference, str(folder), local_files_only=True)

        kind = held(references["AutoConfig"]) if "AutoConfig" in references else None
        kind = kind or transformers.CONFIG_MAPPING[values["model_type"]]
        return kind.from_dict(values), held(model)

    found: tuple[Any, Any] = _made(load, where)
    return found


def _loaded(kind: Any, config: Any, weights: Mapping[str, Tensor], folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    for flag in ("use_cache", "output_attentions", "output_hidden_states"):
        if getattr(config, flag, False):
            setattr(config, flag, False)
    module, info = _made(
        lambda: kind.from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True, dtype=torch.float32,
            local_files_only=True, trust_remote_code=False, ignore_mismatched_sizes=True,
        ),
        str(folder),
    )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise ModelFileError(
            "VLX0109", f"the weights do not fit {kind.__name__}: {len(missing)} missing: {listed(missing)}",
            where=str(folder), hint="the folder's architectures and its weights belong to different models",
        )  # fmt: skip
    if wrong := sorted(str(name) for name, *_ in info["mismatched_keys"]):
        raise ModelFileError(
            "VLX0109", f"the weights do not fit {kind.__name__}: {len(wrong)} of another size: {listed(wrong)}",
            where=str(folder), hint="config.json and the weights belong to different models",
        )  # fmt: skip
    notes = []
    if beside := sorted(info["unexpected_keys"]):
        notes.append(f"{kind.__name__} has no place for {len(beside)} of the weights: {listed(beside)}")
    if any(each.is_floating_point() and each.dtype is not torch.float32 for each in weights.values()):
        notes.append("half- or double-precision weights were loaded as float32")
    return module.eval(), tuple(notes)


def _made(make: Any, where: str) -> Any:
    """Runs transformers' code on what the folder says."""
    try:
        return make()
    except Exception as error:  # transformers and its validators raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            "VLX0110", f"transformers cannot make the model: {type(error).__name__}: {reason}", where=where,
            hint="open the folder with transformers' from_pretrained to see the whole message",
        ) from error  # fmt: skip


def _preprocess(folder: Path) -> tuple[Preprocess | None, tuple[str, ...]]:
    try:
        return preprocess_in(folder), ()
    except DataError as error:
        return None, (f"{error.where}: {error.message}; no preprocessing is recorded, give --preprocess",)


@contextlib.contextmanager
def _offline(transformers: Any) -> Iterator[None]:
    """Without the hub, which a config may name, and without transformers' progress bars and advice."""
    log, hub = transformers.utils.logging, importlib.import_module("huggingface_hub.constants")
    bars, level, online = log.is_progress_bar_enabled(), log.get_verbosity(), hub.HF_HUB_OFFLINE
    log.disable_progress_bar()
    log.set_verbosity_error()
    hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = online  # type: ignore[attr-defined]
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
