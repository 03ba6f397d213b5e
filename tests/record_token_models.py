"""Record what the authors' code computes, for ``tests/token_models.py`` to be compared with.

Run by hand, with the folder that holds checkouts of the authors' repositories at the commits of :data:`UPSTREAM`, each
in a folder of the repository's name::

    python -m tests.record_token_models FOLDER

Nothing of theirs is copied: weights and images are drawn by ``tests.token_models`` (recorded by hash), the outputs are
written to ``tests/golden/token_models.npz``, and what made them to ``tests/golden/token_models.json``. Older module
paths of timm are pointed at the installed ones.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.token_models import drawn, images, side_of
from vlexport.frontends.compat import declare_torchvision_operators

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("diffuse", "concentrated", "ties")
BATCH = 8
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
UPSTREAM = {
    "evit": "youweiliang/evit 5ca95a7cf4a8637193284895c5bc0dd9dc365982 (Apache-2.0)",
    "evit_fused": "youweiliang/evit 5ca95a7cf4a8637193284895c5bc0dd9dc365982 (Apache-2.0)",
    "dynamic_vit": "raoyongming/DynamicViT 1322e626d1e9eca18cc150569908fb4af29e15f7 (MIT)",
    "tome": "facebookresearch/ToMe af95e4b1befa172dadccd8c81e223b10090f9579 (CC-BY-NC-4.0; outputs only)",
    "mctf": "mlvlab/MCTF 2004da0cad3231fa74cbd60b6042b0bd133aacde (MIT)",
    "self_slimmed": "Sense-X/SiT f5778084c45c93f2121685989fa35f930f7e8c54 (Apache-2.0)",
}


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return whole.hexdigest()[:16]


def _modules(folder: Path, *names: str) -> list[Any]:
    """Modules of a checkout, none of another's left over under the same name."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("models", "utils", "helpers", "evit", "tome")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))


def _old_timm() -> None:
    """Names that these repositories import, and that left timm or torch or were never installed."""
    declare_torchvision_operators()
    import timm.layers
    import timm.models._builder
    import timm.models._manipulate
    import timm.models._registry

    alias = types.ModuleType("timm.models.helpers")
    for module in (timm.models._builder, timm.models._manipulate):
        alias.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
    six = types.ModuleType("torch._six")
    six.__dict__["inf"] = float("inf")
    profile = types.ModuleType("torchprofile")
    profile.__dict__["profile_macs"] = None
    board = types.ModuleType("tensorboardX")
    board.__dict__["SummaryWriter"] = None
    sys.modules.update({
        "timm.models.helpers": alias, "timm.models.layers": timm.layers, "timm.models.registry": timm.models._registry,
        "torch._six": six, "torchprofile": profile, "tensorboardX": board,
    })  # fmt: skip


def _evit(root: Path, *, fuse: bool) -> nn.Module:
    (code,) = _modules(root / "evit", "evit")
    return code.EViT(**SIZES, keep_rate=(1, 0.7, 0.7, 1), fuse_token=fuse)


def _dynamic_vit(root: Path) -> nn.Module:
    (code,) = _modules(root / "DynamicViT", "models.dyvit")
    sizes = {**SIZES, "img_size": 28, "patch_size": 2}
    return code.VisionTransformerDiffPruning(**sizes, pruning_loc=[1, 2], token_ratio=[0.7, 0.49])


def _tome(root: Path) -> nn.Module:
    import timm.models.vision_transformer as timm_vit

    _, code = _modules(root / "ToMe", "tome.merge", "tome.patch.timm")
    model = timm_vit.VisionTransformer(**SIZES)
    code.apply_patch(model)
    model.r = 8
    for block in model.blocks:
        block.drop_path = nn.Identity()
    return model


def _mctf(root: Path) -> nn.Module:
    (code,) = _modules(root / "MCTF", "models.deit")
    sizes = {("input_size" if k == "img_size" else k): v for k, v in SIZES.items()}
    model = code.VisionTransformer(
        **sizes, use_mctf=True, activate_layer=[1, 2, 3], task_type=[1, 0, 0],
        mctf_type=[12, 0, 0, 1, 1, 1, 20, 40, 1, 1], norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    return _Called(model, r_eval=12)


def _self_slimmed(root: Path) -> nn.Module:
    (code,) = _modules(root / "SiT", "models.lvvit")
    model = code.LVViT(
        **SIZES, p_emb="naive", skip_lam=2.0, stage_blocks=[1, 1, 2], keeping_ratio=0.5, distillation_type="hard"
    )
    return _Called(model)


class _Called(nn.Module):
    """A model called with more than the image, giving its logits alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, image: Tensor) -> Tensor:
        found = self.model(image, **self.options)
        return found[0] if isinstance(found, tuple) else found


MAKERS: Mapping[str, Callable[[Path], nn.Module]] = {
    "evit": lambda root: _evit(root, fuse=False),
    "evit_fused": lambda root: _evit(root, fuse=True),
    "dynamic_vit": _dynamic_vit,
    "tome": _tome,
    "mctf": _mctf,
    "self_slimmed": _self_slimmed,
}


def main(root: Path) -> None:
    """Record all models on all kinds of weights."""
    _old_timm()
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {"batch": BATCH, "torch": torch.__version__, "models": {}}
    for name, make in MAKERS.items():
        model = make(root).eval()
        inner = model.model if isinstance(model, _Called) else model
        facts["models"][name] = {"upstream": UPSTREAM[name], "weights": {}}
        for kind in KINDS:
            used = {k: tuple(v.shape) for k, v in inner.state_dict().items() if not k.startswith(("aux_head", "rtsm"))}
            weights = drawn(used, kind)
            missing, unexpected = inner.load_state_dict(weights, strict=False)
            assert not unexpected, unexpected
            assert all(m.startswith(("aux_head", "rtsm")) for m in missing), missing
            with torch.inference_mode():
                arrays[f"{name}/{kind}"] = model(images(kind, BATCH, *side_of(name))).numpy()
            facts["models"][name]["weights"][kind] = weights_hash(weights)
    np.savez_compressed(GOLDEN / "token_models.npz", **arrays)  # type: ignore[arg-type]
    (GOLDEN / "token_models.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
