"""A folder of transformers' opens as it is: class by its config, weights by our readers, nothing fetched or run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors

import vlexport
from tests.pickle_mutator import Bomb
from vlexport.cli.main import main
from vlexport.core.config import BuildConfig
from vlexport.core.errors import CapabilityError, DataError, ModelFileError, UsageError
from vlexport.core.preprocess_configs import preprocess_from_transformers_config
from vlexport.frontends import compat
from vlexport.frontends.input_preprocess import preprocess_of
from vlexport.frontends.model_place import place_of
from vlexport.frontends.source import open_source
from vlexport.frontends.transformers_model import example_inputs

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LABELS = ("cat", "dog", "fox")
STEPS = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(scope="module")
def vit() -> Any:
    """A tiny classifier with random weights, none of them zero."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**SMALL, image_size=16, patch_size=8, id2label=dict(enumerate(LABELS)), num_labels=3)
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, vit: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "vit"
    vit.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STEPS), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "vit"))


def opened(model: str | Path, **options: Any) -> Any:
    return open_source(BuildConfig(model=str(model), **options))


def changed(folder: Path, **values: Any) -> Path:
    """``config.json`` with other values; None takes a key out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: each for key, each in {**config, **values}.items() if each is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def assert_computes(source: Any, vit: Any) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = vit(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(source.run({"pixel_values": pixels.numpy()})["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_bundle_is_built_when_the_folder_alone_is_named(
    folder: Path, vit: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["build", "vit", "--no-profile"]) == 0, capfd.readouterr().err
    made = vlexport.load("vit.bundle")
    assert_computes(made, vit)
    bundle = json.loads(Path("vit.bundle/bundle.json").read_text(encoding="utf-8"))
    main_component = bundle["components"]["main"]
    assert main_component["labels"] == list(LABELS)
    assert main_component["preprocess"]["pixel_values"]["mean"] == [0.5] * 3
    assert main_component["artifact"]["inputs"][0]["shape"] == ["batch", 3, 16, 16]


def test_source_is_the_same_when_weights_lie_elsewhere_or_in_other_files(
    folder: Path, vit: Any, tmp_path: Path
) -> None:
    source = opened(folder)
    assert_computes(source, vit)
    assert source.preprocess == {"pixel_values": preprocess_from_transformers_config(STEPS)}
    assert source.labels == LABELS
    weights = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(weights)
    apart = opened(weights, arch=f"transformers:{folder}")
    assert_computes(apart, vit)
    assert apart.source_hash == source.source_hash, "content decides, not where it lies"
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        opened(folder)
    assert caught.value.code == "VLX0104"


def test_shards_make_one_model_when_an_index_names_them(folder: Path, vit: Any) -> None:
    vit.save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_computes(opened(folder), vit)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text(encoding="utf-8"))
    first = next(iter(whole["weight_map"]))
    shard = whole["weight_map"][first]
    cases: list[tuple[str, str]] = [
        ("../vit/" + shard, "VLX0106"), ("/etc/passwd", "VLX0106"), ("a\\b", "VLX0106"), (".hidden", "VLX0106"),
        ("none.safetensors", "VLX0105"), (index.name, "VLX0105"),
    ]  # fmt: skip
    for name, code in cases:
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], first: name}}), encoding="utf-8")
        with pytest.raises(ModelFileError) as caught:
            opened(folder)
        assert caught.value.code == code, name
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "more": shard}}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="'more', which the shard does not hold"):
        opened(folder)


def test_safetensors_win_and_pickles_stay_inert_when_both_are_there(folder: Path, vit: Any) -> None:
    canary = folder / "canary"
    state = {name: each + 1 for name, each in vit.state_dict().items()}
    torch.save({**state, "evil": Bomb(canary)}, folder / "pytorch_model.bin")
    assert_computes(opened(folder), vit)
    (folder / "model.safetensors").unlink()
    source = opened(folder)
    assert any("asks for code, which was not run" in note for note in source.notes)
    assert not canary.exists()
    with pytest.raises(AssertionError):
        assert_computes(source, vit)


def test_code_of_the_folder_runs_only_with_consent(folder: Path, vit: Any) -> None:
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        f"Path({str(folder / 'canary')!r}).touch()\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own'\n"
        "class Own(ViTForImageClassification):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForImageClassification": "modeling_own.Own"}
    changed(folder, auto_map=own, model_type="own")
    with pytest.raises(ModelFileError) as caught:
        opened(folder)
    assert caught.value.code == "VLX0108"
    assert "--allow-code" in caught.value.hint
    assert not (folder / "canary").exists()
    assert_computes(opened(folder, allow_code=True), vit)
    assert (folder / "canary").exists()
    changed(folder, auto_map={"AutoModel": "other/repository--modeling_own.Own"})
    with pytest.raises(ModelFileError, match="names no model class of this folder"):
        opened(folder, allow_code=True)


@pytest.mark.parametrize(
    ("values", "code", "part"),
    [
        ({"model_type": "nothing_known"}, "VLX0110", "no model type 'nothing_known'"),
        ({"model_type": None}, "VLX0110", "no model type None"),
        ({"architectures": ["os"]}, "VLX0110", "no class 'os'"),
        ({"architectures": ["BertModel"]}, "VLX0110", "no class 'BertModel' for this config"),
        ({"architectures": ["AutoModel"]}, "VLX0110", "no class 'AutoModel'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "VLX0113", "by gptq"),
        ({"quantization_config": "int8"}, "VLX0113", "by some method"),
        ({"num_hidden_layers": 2}, "VLX0109", "missing"),
        ({"hidden_size": 24}, "VLX0109", "of another size: 'classifier.weight', 'vit.embeddings.cls_token'"),
        ({"hidden_size": "many"}, "VLX0110", "cannot make the model"),
    ],
)
def test_folder_is_refused_when_its_config_says(folder: Path, values: dict[str, Any], code: str, part: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        opened(changed(folder, **values))
    assert (caught.value.code, part in caught.value.message) == (code, True), caught.value.message
    assert caught.value.hint


class Seeing(torch.nn.Module):
    main_input_name = "pixel_values"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({"image_size": 8}, (1, 3, 8, 8)),
        ({"image_size": [8, 4], "num_channels": 1}, (1, 1, 8, 4)),
        ({"image_size": {"height": 8, "width": 4}}, (1, 3, 8, 4)),
        ({"image_size": 8, "num_frames": 2}, (1, 2, 3, 8, 8)),
        *(({"image_size": size}, None) for size in (-1, 0, 10**6, "8", [8], ["a", "b"], {"longest_edge": 8}, 2.5)),
        ({"image_size": 4096, "num_channels": 1024}, None),
        ({"image_size": 8, "num_frames": "x"}, None),
        ({"image_size": 8, "num_channels": "x"}, (1, 3, 8, 8)),
    ],
)
def test_example_image_is_of_the_config_or_must_be_given(values: dict[str, Any], shape: tuple[int, ...] | None) -> None:
    found = example_inputs(Seeing(), SimpleNamespace(**values), None)
    assert (None if found is None else tuple(found["pixel_values"].shape)) == shape


def test_folder_opens_when_its_config_has_no_quantization_under_that_key(folder: Path, vit: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}), encoding="utf-8")
    assert_computes(opened(folder), vit)


def test_nothing_is_fetched_when_a_config_asks_for_it(folder: Path, vit: Any) -> None:
    state = {**vit.state_dict(), "more.weight": torch.ones(1)}
    safetensors.save_file(state, folder / "model.safetensors")
    changed(folder, _attn_implementation="kernels-community/own-attention", use_kernels=True)
    source = opened(folder)
    assert_computes(source, vit)
    assert "ViTForImageClassification has no place for 1 of the weights: 'more.weight'" in source.notes


def test_hub_is_not_asked_when_a_config_names_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *names, **_: asked.append(names) or [])
    monkeypatch.setattr("socket.socket.connect", lambda *names, **_: asked.append(names))
    detr = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "use_timm_backbone": False}
    changed(folder, **detr, backbone="own/resnet", use_pretrained_backbone=True)
    with pytest.raises(ModelFileError) as caught:
        opened(folder)
    assert caught.value.code in ("VLX0109", "VLX0110")
    assert asked == []


def timm_folder(folder: Path, **values: Any) -> Path:
    """A model of timm's as transformers keeps it."""
    import timm

    net = timm.create_model("test_vit", num_classes=3, img_size=32)
    weights = {f"timm_model.{name}": value for name, value in net.state_dict().items()}
    folder.mkdir()
    safetensors.save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"], "num_classes": 3,
        "architecture": "test_vit", "model_args": {"img_size": 32}, "label_names": list(LABELS),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return changed(folder, **values)


def test_no_other_weights_are_opened_when_a_config_gives_timm_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat.declare_torchvision_operators()
    import timm.models._factory as factory

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("timm opened a checkpoint by its own reader, which in timm 1.0.20 runs pickles")

    monkeypatch.setattr(factory, "load_checkpoint", asked)
    torch.save({"x": Bomb(tmp_path / "ran")}, tmp_path / "evil.pth")
    arguments = {"img_size": 32, "checkpoint_path": str(tmp_path / "evil.pth")}
    folder = timm_folder(tmp_path / "net", model_args=arguments)
    with pytest.raises(UsageError) as caught:
        opened(folder)
    assert "--input pixel_values=1x3x224x224" in caught.value.hint
    source = opened(folder, input=("pixel_values=1x3x32x32",))
    assert [spec.name for spec in source.program.signature.inputs] == ["pixel_values"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["local-dir:/elsewhere", "hf-hub:own/net", "hf_hub:own/net"])
def test_folder_is_refused_when_timm_would_look_elsewhere(name: str, tmp_path: Path) -> None:
    for values in ({"architecture": name}, {"parts": [{"backbone": name}]}):
        with pytest.raises(ModelFileError, match="from elsewhere") as caught:
            opened(timm_folder(tmp_path / next(iter(values)), **values))
        assert caught.value.code == "VLX0110"


def test_folder_is_refused_when_a_part_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--arch-arg goes with a factory"):
        opened(folder, arch_arg=("depth=1",))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(CapabilityError) as unmet:
            opened(folder)
    assert (unmet.value.code, unmet.value.hint) == ("VLX0501", "pip install transformers")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError) as caught:
        opened(folder)
    assert (caught.value.code, "no weights" in caught.value.message) == ("VLX0115", True)
    (folder / "config.json").write_text("[1]", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError):
        opened(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError) as caught:
        opened(folder)
    assert caught.value.code == "VLX0102"


def test_preprocessing_is_said_to_be_missing_when_it_cannot_be_expressed(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({**STEPS, "do_pad": True}), encoding="utf-8")
    source = opened(folder)
    assert source.preprocess == {}
    assert any("'do_pad'" in note and "--preprocess" in note for note in source.notes)
    (folder / "preprocessor_config.json").write_text(json.dumps(STEPS), encoding="utf-8")
    spec, signature = f"transformers:{folder}", source.program.signature
    assert preprocess_of(spec, signature) == {"pixel_values": preprocess_from_transformers_config(STEPS)}
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="no preprocessor_config"):
        preprocess_of(spec, signature)


def test_towers_open_with_both_inputs_or_one_when_an_output_is_chosen(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    words = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 48}
    config = CLIPConfig(text_config=words, vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).eval().save_pretrained(tmp_path / "clip")
    whole = opened(tmp_path / "clip")
    shapes = {spec.name: spec.shape for spec in whole.program.signature.inputs}
    assert shapes == {"input_ids": ("batch", 8), "pixel_values": ("batch", 3, 16, 16)}
    assert "vision_model_output.pooler_output" in [spec.name for spec in whole.program.signature.outputs]
    image = opened(tmp_path / "clip", outputs=("image_embeds",))
    assert [spec.name for spec in image.program.signature.inputs] == ["pixel_values"]
    assert any("do not read input_ids" in note for note in image.notes)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    both = {"pixel_values": pixels, "input_ids": np.full((3, 8), 49)}
    np.testing.assert_allclose(image.run({"pixel_values": pixels})["image_embeds"], whole.run(both)["image_embeds"])


def hub(folder: Path, saved: Path, *, main_ref: bool) -> Path:
    """A hub's cache with one model, as its tools lay it out: snapshots of links to blobs."""
    repository = folder / "models--own--vit"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(saved.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    if main_ref:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION, encoding="ascii")
    return folder


def test_hub_name_opens_when_the_local_cache_has_it(
    tmp_path: Path, saved: Path, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub(tmp_path / "hub", saved, main_ref=True)))
    source = opened("own/vit")
    assert source.notes[0] == f"own/vit was taken from the local hub cache, revision {REVISION}"
    assert_computes(source, vit)
    (tmp_path / "hub/models--own--vit/refs/main").write_text("../../../../etc", encoding="ascii")
    with pytest.raises(ModelFileError) as caught:
        place_of("own/vit")
    assert caught.value.code == "VLX0114"


def test_only_revision_is_taken_when_the_cache_names_no_main_one(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub(tmp_path / "hub", saved, main_ref=False)))
    assert place_of("own/vit").path.name == REVISION
    (tmp_path / "hub/models--own--vit/snapshots" / ("f" * 40)).mkdir()
    with pytest.raises(ModelFileError):
        place_of("own/vit")


@pytest.mark.parametrize("name", ["own/vit", "facebook/dinov2-small", "a/b.c-d_e"])
def test_hub_name_is_answered_with_the_line_to_type_when_it_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["build", name]) == 1
    said = capfd.readouterr().err
    assert "VLX0114" in said
    assert f"hf download {name}" in said


@pytest.mark.parametrize("name", ["models/net.pt", "a/b/c", "./own", "weights.pth", "own/net.safetensors", "../own/x"])
def test_path_stays_a_path_when_it_is_no_hub_name(name: str) -> None:
    assert place_of(name).path == Path(name)
    with pytest.raises(ModelFileError) as caught:
        opened(name)
    assert caught.value.code == "VLX0101"
