"""The doors through which files of strangers come in: what a good file is, how it is changed, what opens it."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from tests import pickle_mutator
from tests.fuzz import mutate
from tests.fuzz.mutate import Mutator
from vlexport.core.artifact import TensorSpec
from vlexport.core.bundle import check_files, read_bundle
from vlexport.core.cache import Cache
from vlexport.core.config import config_from
from vlexport.core.errors import VlexportError
from vlexport.core.photo_samples import read_photo
from vlexport.core.preprocess import preprocess_from_spec
from vlexport.core.samples import open_data
from vlexport.frontends.archive import read_archive
from vlexport.frontends.checkpoint import read_weights
from vlexport.frontends.components import read_components
from vlexport.frontends.exported_file import open_exported_file
from vlexport.frontends.transformers_folder import config_in, labels_in, preprocess_in
from vlexport.stages.golden import read_golden

CANARY = "canary"
"""A file that the payloads among the seeds would make in the working directory."""
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
STEPS = preprocess_from_spec("resize=8,crop=8,scale=1/255")


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (CANARY, "w")


@dataclass(frozen=True)
class Door:
    """One way in.

    Attributes:
        name: In tables.
        file: Name of the file, in a folder of its own; beside it lies what the door needs.
        seeds: Good files, and payloads to splice in.
        mutators: What is done to them.
        opens: Reads the file; returns when it is accepted.
        native: Whether native code parses it, which may take the process down.
    """

    name: str
    file: str
    seeds: tuple[bytes, ...]
    mutators: tuple[Mutator, ...]
    opens: Callable[[Path], object]
    native: bool = False

    def mutated(self, seed: int, index: int) -> bytes:
        """The mutation of this number: the same wherever it is made."""
        chance = random.Random(f"{seed} {self.name} {index}")
        data = chance.choice(self.seeds)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data = chance.choice(self.mutators)(data, chance)
        return data


def doors_of(model: Path, bundle: Path) -> dict[str, Door]:
    """All doors, with seeds from a model file of ``vlexport.save`` and a bundle that was built from it."""
    archive, checkpoints = model.read_bytes(), _checkpoints()
    weights = safetensors_bytes({"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0, 2).half()})
    blind = (*mutate.BLIND,)
    zipped = mutate.edit_zip(mutate.edit_member)
    found = (
        Door("archive", "model.pt", (archive,), (*blind, zipped, zipped, zipped), _open_archive),
        Door("checkpoint", "weights.pt", checkpoints,
             (*blind, zipped, zipped, _pickled, _pickled, _pickled, mutate.splice_with(checkpoints)), read_weights),
        Door("exported", "model.pt2", (_exported(),), (*blind, zipped, zipped, zipped), _open_exported),
        Door("shards", "model.safetensors.index.json", (_INDEX,), (*blind, *(mutate.edit_json,) * 4), read_weights),
        Door("preprocessor", "preprocessor_config.json", (_PROCESSOR,), (*blind, *(mutate.edit_json,) * 4),
             _open_processor),
        Door("safetensors", "weights.safetensors", (weights,), (*blind, *(mutate.edit_safetensors,) * 4),
             read_weights),
        Door("onnx", "main.onnx", ((bundle / "artifact/main.onnx").read_bytes(),), blind, _open_onnx, native=True),
        Door("bundle", "bundle.json", ((bundle / "bundle.json").read_bytes(),),
             (*blind, *(mutate.edit_json,) * 4, _redigested), _open_bundle),
        Door("golden", "inputs.npz", ((bundle / "golden/main/inputs.npz").read_bytes(),), (*blind, zipped, zipped),
             _open_golden),
        Door("recipe", "recipe.toml", ((bundle / "recipe.toml").read_bytes(), _RECIPE),
             (*blind, *(mutate.edit_toml,) * 4), _open_recipe),
        Door("components", "components.toml", (_COMPONENTS,), (*blind, *(mutate.edit_toml,) * 4), read_components),
        Door("npz", "x.npz", _npz_seeds(), (*blind, zipped, zipped, zipped), _open_data),
        Door("jsonl", "x.jsonl", (_JSONL,), (*blind, *(mutate.edit_lines,) * 4), _open_data),
        Door("image", "x.png", _images(), (*blind, mutate.edit_png), _open_image),
        Door("cache", ".entry.json", (_entry(),), (*blind, *(mutate.edit_json,) * 3), _open_entry),
    )  # fmt: skip
    return {each.name: each for each in found}


_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}).encode()
_SHARD = safetensors_bytes({"a": torch.ones(2, 3), "b": torch.arange(4)})
_PROCESSOR = json.dumps(
    {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "resample": 2, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "id2label": {"0": "red", "1": "green"},
    }
).encode()  # fmt: skip
_RECIPE = b"""vlexport_recipe = 1
target = "onnxruntime"
precision = "fp32"
gate = ["drop<=0.5"]
dynamic = ["batch=1:4"]
preprocess = "resize=8,crop=8"
arch = "timm:resnet18"
threads = 1
seed = 0

[options]
"onnxruntime.opset" = "20"
"""
_COMPONENTS = b"""vlexport_components = 1
edges = [["encoder.features", "head.features"]]
[components.encoder]
model = "encoder.pt"
[components.head]
model = "head.pt"
"""
_JSONL = b'{"image": "a.png", "label": "red"}\n' + json.dumps({"image": [[[0.5] * 8] * 8] * 3, "label": 1}).encode()


def _checkpoints() -> tuple[bytes, ...]:
    content = {"model": {"a": torch.ones(2, 3), "b": torch.arange(4)}, "epoch": 3, "args": {"lr": 0.1}}
    made = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        made.append(file.getvalue())
    return (*made, pickle.dumps(Payload(), 2), pickle.dumps({"model": Payload()}, 4))


def _exported() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.ones(2, 4),)), file)
    return file.getvalue()


def _pickled(data: bytes, chance: random.Random) -> bytes:
    """A pickle's steps or bytes changed, payloads put in; of a zip, the pickle in it."""
    seed = chance.randrange(2**32)
    try:
        if not data.startswith(b"PK"):
            return next(pickle_mutator.mutated(data, count=1, seed=seed, canary=Path(CANARY)))
        members = pickle_mutator.members_of(data)
        (made,) = pickle_mutator.mutated(members["data.pkl"], count=1, seed=seed, canary=Path(CANARY))
        return pickle_mutator.zipped({**members, "data.pkl": made})
    except (ValueError, LookupError, OSError, RuntimeError, NotImplementedError, *mutate.UNPACKABLE):
        return mutate.blind(data, chance)


def _npz_seeds() -> tuple[bytes, ...]:
    made = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, image=np.zeros((2, 3, 8, 8), np.float32), label=np.array([0, 1]))
        made.append(file.getvalue())
    file = io.BytesIO()
    np.savez(file, image=np.array([Payload()], object), label=np.array([0]))
    return (*made, file.getvalue())


def _images() -> tuple[bytes, ...]:
    made = []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8))
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        picture.save(file, kind)
        made.append(file.getvalue())
    for mode in ("P", "I;16", "LA", "1"):
        file = io.BytesIO()
        Image.new(mode, (7, 5)).save(file, "PNG")
        made.append(file.getvalue())
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(file, "JPEG", exif=exif)
    return (*made, file.getvalue())


_KEY = {"what": "fuzz"}


def _entry() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        content = Path(place, "content")
        content.mkdir()
        (content / "a.bin").write_bytes(b"content")
        cache = Cache(Path(place, "cache"))
        cache.keep(_KEY, content, {"about": 1})
        return (cache.entries()[0][0] / ".entry.json").read_bytes()


def prepare(door: Door, folder: Path, bundle: Path) -> Path:
    """An empty folder gets what the door needs; returns the place of the file."""
    if door.name == "bundle":
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    elif door.name == "golden":
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        return folder / "golden/main/inputs.npz"
    elif door.name == "preprocessor":
        (folder / "config.json").symlink_to(folder / door.file)
    elif door.name == "shards":
        (folder / "one.safetensors").write_bytes(_SHARD)
    elif door.name == "jsonl":
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    elif door.name == "cache":
        content = folder / "content"
        content.mkdir()
        (content / "a.bin").write_bytes(b"content")
        cache = Cache(folder / "cache")
        cache.keep(_KEY, content, {"about": 1})
        return cache.entries()[0][0] / door.file
    return folder / door.file


def _open_archive(path: Path) -> object:
    return read_archive(path).exported_program()


def _open_exported(path: Path) -> object:
    return open_exported_file(path, allow_code=False).program


def _open_processor(path: Path) -> object:
    steps = preprocess_in(path.parent)
    return labels_in(config_in(path.parent)), steps.to_spec() if steps is not None else ""


def _open_onnx(path: Path) -> object:
    from vlexport.core.artifact import Artifact
    from vlexport.targets.onnx.session import open_session

    outputs = (TensorSpec(name="output", dtype="float32", shape=("batch", 3)),)
    artifact = Artifact(target="onnxruntime", path=path.name, inputs=(IMAGE,), outputs=outputs)
    with open_session(path.parent, artifact, 1):
        return None


def _redigested(data: bytes, chance: random.Random) -> bytes:
    """An edit whose digest fits, as an attacker makes it."""
    from vlexport.core.bundle_schema import Bundle, canonical_json, digest_of, plain_json

    try:
        bundle = Bundle.model_validate(json.loads(mutate.edit_json(data, chance)))
        bundle = bundle.model_copy(update={"digest": digest_of(bundle)})
        return (canonical_json(plain_json(bundle)) + "\n").encode()
    except (ValueError, RecursionError):
        return mutate.edit_json(data, chance)


def _open_bundle(path: Path) -> object:
    bundle = read_bundle(path.parent)
    check_files(path.parent, bundle)
    return bundle.signature()


def _open_golden(path: Path) -> object:
    folder = path.parents[2]
    return read_golden(folder, read_bundle(folder).main)


def _open_recipe(path: Path) -> object:
    return config_from({"model": "model.pt"}, recipe=path).recipe()


def _open_data(path: Path) -> object:
    data = open_data(str(path), inputs=(IMAGE,), preprocess={"image": STEPS}, labels=("red", "green", "blue"))
    return [each.content_hash() for each in data]


def _open_image(path: Path) -> object:
    return read_photo(path, path.name, STEPS)


def _open_entry(path: Path) -> object:
    cache = Cache(path.parents[1])
    into = path.parents[1].with_name("taken")
    shutil.rmtree(into, ignore_errors=True)
    about = cache.take(_KEY, into)
    if about is not None and (about != {"about": 1} or (into / "a.bin").read_bytes() != b"content"):
        raise AssertionError(f"a damaged entry was taken: {about}")
    return about


def accepted_or_refused(door: Door, path: Path) -> str:
    """``accepted``, or the code of the refusal; anything else is raised as it comes."""
    try:
        door.opens(path)
    except VlexportError as error:
        error.as_dict()
        return error.code
    return "accepted"
