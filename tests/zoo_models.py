"""The zoo: models of different families, captured and passed through the whole pipeline under the numeric gate.

``python tests/zoo_models.py [--record docs/measured/zoo.json] [NAME …]`` prints one line a model and exits with 1 when
the gate raised a false alarm or a node lost its module path. Weights are random; batch-norm statistics, biases and
every parameter that a constructor leaves at zero are randomised, so that no mistake hides behind a zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from vlexport.core.devices import this_machine
from vlexport.core.errors import CaptureError
from vlexport.frontends.architecture import factory_from_text
from vlexport.frontends.capture import capture
from vlexport.ir import provenance
from vlexport.ir.cost import cost
from vlexport.passes import CATALOGUE, pass_class
from vlexport.passes.gate import NumericGate
from vlexport.passes.pipeline import run_pipeline
from vlexport.passes.probes import make_probes

SHORT = ("resnet18", "deit_tiny_patch16_224", "mobilenetv3_small_100")
"""What `make test` runs."""
MODELS = (
    *SHORT, "beit_base_patch16_224", "cait_xxs24_224", "coatnet_0_rw_224", "convnext_atto", "crossvit_tiny_240",
    "cspresnet50", "davit_tiny", "deit_small_patch16_224", "densenet121", "dla34", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientnet_lite0", "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8",
    "focalnet_tiny_srf", "ghostnet_100", "gmlp_s16_224", "hiera_tiny_224", "hrnet_w18_small", "inception_v3",
    "levit_128s", "maxvit_tiny_rw_224", "mixer_s32_224", "mnasnet_small", "mobileone_s0", "mobilevit_xxs",
    "nextvit_small", "poolformer_s12", "pvt_v2_b0", "regnety_002", "repvgg_a0", "repvit_m1_0", "resmlp_12_224",
    "sequencer2d_s", "skresnet18", "swin_tiny_patch4_window7_224", "tf_efficientnetv2_b0", "tnt_s_patch16_224",
    "twins_pcpvt_small", "vgg11_bn", "visformer_tiny", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was found for one model.

    Attributes:
        captured: ``dynamic``, ``fixed`` (with the reason in ``note``) or ``refused``.
        alarm: What the gate or the runner said, empty when nothing.
        lost_paths: Calls whose module path is no module of the model.
        changes: Pass → number of changes.
        gate: Pass → ``proof worst``.
        opaque: Operators that the dialect does not know.
    """

    model: str
    captured: str
    note: str = ""
    alarm: str = ""
    lost_paths: int = 0
    calls: int = 0
    gmacs: float = 0.0
    seconds: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)
    gate: dict[str, str] = field(default_factory=dict)
    opaque: tuple[str, ...] = ()


def randomise(model: nn.Module, seed: int) -> None:
    """Random batch-norm statistics and biases; parameters that are all zero or all equal get values too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not bool(parameter.any()):
                parameter.normal_(0, 0.02, generator=generator)
            elif parameter.ndim == 1 and bool((parameter == parameter[0]).all()):
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def examine(name: str, seed: int = 0) -> Row:
    """Capture a model and run every pass of the catalogue under the gate."""
    torch.manual_seed(seed)
    made = factory_from_text(f"timm:{name}")
    model = made.module.eval()
    randomise(model, seed)
    paths = {path for path, _ in model.named_modules()}
    started = time.perf_counter()
    try:
        captured = capture(model, made.inputs)
    except CaptureError as error:
        return Row(name, "refused", note=f"{error.code}: {error.message} ({error.where})")
    program = captured.program
    note = "; ".join(captured.notes)
    kind = "dynamic" if program.signature.dims else "fixed"
    try:
        gate = NumericGate(program, make_probes(program, calibration=None, seed=seed))
        after, records = run_pipeline(program, [pass_class(each)() for each in CATALOGUE], gate=gate)
    except Exception as error:
        return Row(name, kind, note=note, alarm=f"{error} ({getattr(error, 'where', '')})")
    found = cost(after)
    return Row(
        name,
        kind,
        note=note,
        lost_paths=sum(provenance.module_path(node) not in paths for node in after.calls()),
        calls=len(after.calls()),
        gmacs=round(found.macs / 1e9, 3),
        seconds=round(time.perf_counter() - started, 1),
        changes={r.name: sum(c.count for c in r.changes) for r in records},
        gate={r.name: f"{r.gate.proof} {r.gate.worst:.0e}" for r in records},
        opaque=found.opaque,
    )


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--record", type=Path, help="write the rows to this JSON file")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        row = examine(name)
        rows.append(row)
        said = row.alarm or row.note or "ok"
        print(
            f"{row.model:30} {row.captured:8} {row.calls:5} calls {row.gmacs:7.3f} GMACs {row.seconds:6.1f} s  {said}",
            flush=True,
        )
    bad = [r.model for r in rows if r.alarm or r.lost_paths]
    dynamic = sum(row.captured == "dynamic" for row in rows)
    print(f"{len(rows)} models, {dynamic} with a dynamic batch, alarms: {', '.join(bad) or 'none'}")
    if given.record is not None:
        whole = {
            "command": "python tests/zoo_models.py",
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "machine": this_machine().model_dump(mode="json"),
            "models": [asdict(row) for row in rows],
        }
        given.record.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
