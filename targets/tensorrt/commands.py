"""The command lines that compile and run an artifact on a device, as the bundle carries them. No torch.

Source of the flags: trtexec's and tensorrt_rtx's own help, and NVIDIA's guide for moving trtexec lines from TensorRT 10
to 11.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from vlexport.core.artifact import Signature
from vlexport.core.device_profiles import DeviceProfile
from vlexport.targets.tensorrt.options import TensorRTOptions
from vlexport.targets.tensorrt.profile import profile_of, unbounded_dims

_ALWAYS_TYPED = 11
"""The first TensorRT whose networks are strongly typed without asking; it takes the flag and ignores it."""


def device_commands(
    name: str,
    onnx_file: str,
    signature: Signature,
    options: TensorRTOptions,
    device: DeviceProfile,
    *,
    engine: str,
    fallback: str = "",
) -> str:
    """Text for a file beside the artifact.

    Args:
        name: Of the component.
        onnx_file: The graph's file.
        signature: Gives shapes.
        options: Of the target.
        device: Which of the two runtimes reads it; both where the profile does not say.
        engine: The engine that lies beside the graph already, or empty.
        fallback: File of the same graph in fp16, to be measured as well; or empty.
    """
    rtx, full = "tensorrt-rtx" in device.facts, "tensorrt" in device.facts
    lines = ["# To be run in this folder, on the device."]
    if unbounded := unbounded_dims(signature):
        lines.append(
            f"# No largest size is recorded for {', '.join(unbounded)}: raise --maxShapes to what you will run."
        )
    if fallback:
        lines.append(f"# {onnx_file} is quantized, {fallback} is the same in fp16: measure both, keep the faster one.")
    graphs = [(name, onnx_file, engine), *([(Path(fallback).stem, fallback, "")] if fallback else [])]
    if full or not rtx:
        version = device.facts["tensorrt"].value if full else ""
        lines += [
            f"# TensorRT {version or '10 and later'}",
            *(_line(_trtexec(stem, file, signature, options, version)) for stem, file, _ in graphs),
        ]
    if rtx or not full:
        runs = [line for each in graphs for line in _tensorrt_rtx(each[0], each[1], signature, options, each[2])]
        lines += ["# TensorRT for RTX", *map(_line, runs)]
    return "\n".join(lines) + "\n"


def _trtexec(name: str, onnx_file: str, signature: Signature, options: TensorRTOptions, version: str) -> list[str]:
    line = ["trtexec", f"--onnx={onnx_file}", f"--saveEngine={name}.plan"]
    if not version or int(version.partition(".")[0]) < _ALWAYS_TYPED:
        line.append("--stronglyTyped")
    if not options.tf32:
        line.append("--noTF32")
    if options.optimization_level is not None:
        line.append(f"--builderOptimizationLevel={options.optimization_level}")
    line += [*_weights(options), *_shapes(signature)]
    if options.timing_cache:
        line.append(f"--timingCacheFile={name}.timing.cache")
    return line


def _tensorrt_rtx(
    name: str, onnx_file: str, signature: Signature, options: TensorRTOptions, engine: str
) -> list[list[str]]:
    lines = []
    if not engine:
        lines.append(
            ["tensorrt_rtx", f"--onnx={onnx_file}", f"--saveEngine={name}.engine", *_weights(options),
             *_shapes(signature)]
        )  # fmt: skip
    if options.strip_weights:  # has to be refitted before it runs
        return lines
    run = ["tensorrt_rtx", f"--loadEngine={engine or f'{name}.engine'}"]
    best = ",".join(_shape(each.name, each.opt) for each in profile_of(signature))
    if best:
        run.append(f"--shapes={best}")
    if options.timing_cache:
        run.append(f"--runtimeCacheFile={name}.runtime.cache")
    return [*lines, run]


def _weights(options: TensorRTOptions) -> list[str]:
    found = ["--refit"] if options.refittable else []
    return [*found, "--stripWeights", "--skipInference"] if options.strip_weights else found


def _shapes(signature: Signature) -> list[str]:
    profile = profile_of(signature)
    if not profile:
        return []
    kinds = {
        "min": [_shape(each.name, each.min) for each in profile],
        "opt": [_shape(each.name, each.opt) for each in profile],
        "max": [_shape(each.name, each.max) for each in profile],
    }
    return [f"--{kind}Shapes={','.join(shapes)}" for kind, shapes in kinds.items()]


def _shape(name: str, sizes: tuple[int, ...]) -> str:
    """``name:1x3x224x224``; a name of other signs stands in single quotes, as trtexec's help asks."""
    plain = re.fullmatch(r"[A-Za-z0-9_.]+", name) is not None
    quoted = f"'{name}'"
    return f"{name if plain else quoted}:{'x'.join(map(str, sizes))}"


def _line(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))
