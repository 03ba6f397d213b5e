"""vlexport itself, from this checkout: ``vlexport build`` with the flags of the recipe, and its bundle's session."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from child import Run, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))


def build(recipe: str, source: Path, output: Path) -> None:
    """``{source}`` in the flags stands for the folder with the model and its calibration samples."""
    from vlexport.cli.main import main

    os.environ["VLEXPORT_CACHE"] = "off"  # the build's seconds are wanted
    flags = [flag.replace("{source}", str(source)) for flag in recipe.split()]
    always = ["--target", "onnxruntime", "-o", str(output / "bundle"), "--no-profile"]
    code = main(["build", str(source / "model.pt"), *always, *flags])
    if code:
        sys.exit(code)


def open_session(recipe: str, folder: Path, threads: int) -> Run:
    from vlexport.core.bundle import ARTIFACT_FOLDER, read_bundle
    from vlexport.core.pipeline import open_artifact
    from vlexport.targets import open_target

    bundle = read_bundle(folder / "bundle")
    module, _, function = open_target(bundle.target).session_entry.partition(":")
    opener = getattr(importlib.import_module(module), function)
    session = open_artifact(opener, folder / "bundle" / ARTIFACT_FOLDER, bundle.main.artifact, threads)
    first = session.outputs[0].name
    return lambda sample: session.run(sample)[first]


if __name__ == "__main__":
    serve(build, open_session, ("onnxruntime", "torch"))
