"""reparameterize: what collapses to one operator, what stays and says why, and that values stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.harness import captured, check_pass, near_misses, randomize, worst_error
from vlexport.ir import dialect
from vlexport.passes.reparameterize import Reparameterize


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """The sum of what its modules make of one value, and of the value itself."""

    def __init__(self, *branches: nn.Module, identity: bool = False) -> None:
        super().__init__()
        self.branches, self.identity = nn.ModuleList(branches), identity

    def forward(self, x: Tensor) -> Tensor:
        total = x if self.identity else self.branches[0](x)
        for branch in self.branches[0 if self.identity else 1 :]:
            total = total + branch(x)
        return total


class Joined(nn.Module):
    """What its modules make of one value, side by side."""

    def __init__(self, *branches: nn.Module, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.behind = nn.ModuleList(branches), behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.behind(torch.cat([branch(x) for branch in self.branches], 1))
        return made


class Halves(nn.Module):
    """Every branch gets its part of the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.branches), 1)
        return torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], 1)


class Doubled(nn.Module):
    """Its input twice, side by side, and nothing else reads it."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.behind(torch.cat([x, x], 1))
        return made


class LayerScale(nn.Module):
    """A residual branch with a scale for every channel."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.gamma = body, nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.body(x) - x * 0.5)


class LoRA(nn.Module):
    """A linear with a branch of low rank."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base, self.scale = nn.Linear(width, width), 0.5
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x) + self.up(self.down(x)) * self.scale
        return made


class Products(nn.Module):
    """Matrices that are multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a) @ self.b + 1.5


def conv(ins: int, outs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(ins, outs, kernel, **options)  # type: ignore[arg-type]


def normed(ins: int, outs: int, kernel: int = 3, **options: object) -> nn.Module:
    return nn.Sequential(conv(ins, outs, kernel, bias=False, **options), nn.BatchNorm2d(outs))


PICTURE = (1, 4, 8, 8)
COLLAPSES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "RepVGG": (Branches(normed(4, 4), normed(4, 4, 1), nn.BatchNorm2d(4)), PICTURE),
    "RepVGG with stride": (Branches(normed(4, 6, stride=2), normed(4, 6, 1, stride=2)), PICTURE),
    "RepVGG with groups": (Branches(normed(4, 4, groups=2), normed(4, 4, 1, groups=2), nn.BatchNorm2d(4)), PICTURE),
    "MobileOne, depthwise": (
        Branches(*(normed(4, 4, groups=4) for _ in range(3)), normed(4, 4, 1, groups=4), nn.BatchNorm2d(4)), PICTURE,
    ),
    "unequal kernels": (Branches(conv(4, 4, 7), conv(4, 4, 5), conv(4, 4, 1)), (1, 4, 9, 9)),
    "unequal kernels along one axis": (
        Branches(
            conv(4, 4), nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        ), PICTURE,
    ),
    "dilation in a larger kernel": (Branches(conv(4, 4, 5), conv(4, 4, 3, dilation=2, padding=2)), PICTURE),
    "dilation and a centre": (Branches(conv(4, 4, 3, dilation=2, padding=2), conv(4, 4, 1), identity=True), PICTURE),
    "coarser groups": (Branches(conv(4, 4, groups=2), conv(4, 4, groups=4), conv(4, 4, 1, groups=2)), PICTURE),
    "common groups": (Branches(conv(12, 12, groups=4), conv(12, 12, groups=6), conv(12, 12, groups=2)), (1, 12, 6, 6)),
    "identity": (Branches(conv(4, 4, groups=4), identity=True), PICTURE),
    "1×1, then 3×3 without padding": (nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)), PICTURE),
    "1×1 without bias, then 3×3": (nn.Sequential(conv(4, 8, 1, bias=False), conv(8, 4)), PICTURE),
    "3×3, then 1×1": (nn.Sequential(conv(4, 8, stride=2), nn.BatchNorm2d(8), conv(8, 4, 1)), PICTURE),
    "strided 1×1, then strided 1×1": (nn.Sequential(conv(4, 8, 1, stride=2), conv(8, 2, 1, stride=2)), PICTURE),
    "strided 1×1, then 3×3": (nn.Sequential(conv(4, 8, 1, stride=2, bias=False), conv(8, 4)), PICTURE),
    "depthwise, then depthwise 1×1": (nn.Sequential(conv(4, 4, groups=4), conv(4, 4, 1, groups=4)), PICTURE),
    "scale, then 3×3": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), PICTURE),
    "a small kernel behind a large one": (nn.Sequential(nn.Conv2d(4, 8, 2), nn.Conv2d(8, 1, 2)), PICTURE),
    "a branch of two": (
        Branches(conv(4, 4), nn.Sequential(conv(4, 4, 1, bias=False), conv(4, 4)), nn.BatchNorm2d(4)), PICTURE,
    ),
    "a branch with a pool": (
        Branches(conv(4, 4), nn.Sequential(conv(4, 4, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))),
        PICTURE,
    ),
    "a branch that is dear alone": (
        Branches(conv(4, 4), nn.Sequential(conv(4, 4, 1, bias=False), conv(4, 4, groups=4))), PICTURE,
    ),
    "layer scale": (LayerScale(normed(4, 4, groups=4), 4), PICTURE),
    "joined": (Joined(conv(4, 2), conv(4, 3), conv(4, 1)), PICTURE),
    "joined, then 1×1": (Joined(conv(4, 2), conv(4, 3), behind=conv(5, 4, 1)), PICTURE),
    "joined identity": (Joined(conv(4, 2, 1), nn.Sequential(conv(4, 4, 1)), behind=nn.BatchNorm2d(6)), PICTURE),
    "the input twice": (Doubled(conv(8, 4)), PICTURE),
    "halves": (Halves(conv(2, 2), conv(2, 2)), PICTURE),
    "halves of groups": (Halves(normed(4, 4, groups=2), conv(4, 4, groups=2)), (1, 8, 6, 6)),
    "1d": (
        Branches(nn.Conv1d(4, 4, 3, padding=1), nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), identity=True),
        (1, 4, 9),
    ),
    "3d": (Branches(nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2)), (1, 2, 4, 4, 4)),
    "same": (Branches(conv(4, 4, 3, padding="same"), conv(4, 4, 1, padding="same")), PICTURE),
    "same with an even kernel": (Branches(conv(4, 4, 4, padding="same"), conv(4, 4, 2, padding="same")), PICTURE),
    "transposed, then 1×1": (nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), conv(4, 4, 1)), PICTURE),
    "1×1, then transposed": (
        nn.Sequential(conv(4, 8, 1, bias=False), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2)), PICTURE,
    ),
    "two transposed": (
        Branches(nn.ConvTranspose2d(4, 4, 2, 2), nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4))),
        PICTURE,
    ),
    "linear, linear": (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), (2, 5, 6)),
    "LoRA": (LoRA(8, 2), (2, 5, 8)),
    "matrices": (Products(), (2, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLAPSES)
def test_one_operator_is_left_when_all_is_affine(case: str) -> None:
    model, shape = COLLAPSES[case]
    checked = check_pass(Reparameterize(), randomize(model), image(*shape), prefixes=3)
    assert len(checked.after.calls()) == 1, [n.format_node() for n in checked.after.calls()]
    assert checked.near_misses == ()


def block(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


class Used(nn.Module):
    """The value between the two convolutions is returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(4, 4), conv(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(y), y


class ReluInside(nn.Module):
    """One branch is not affine."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(4, 4), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + F.relu(self.two(x))


class Cropped(nn.Module):
    """The two branches have as many results for this size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(4, 4, 2, stride=2, padding=0), conv(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Strides(nn.Module):
    """A wide step on a wide value, a narrow one on a narrow value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(4, 4, 2, stride=2, padding=0), nn.Conv2d(4, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Computed(nn.Module):
    """Weights that the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = conv(4, 4, 1), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.gate.tanh()))


BORDER = "a bias stands before zero padding, so it is not constant at the border"
STAYS: dict[str, tuple[nn.Module, tuple[int, ...], list[tuple[str, str]]]] = {
    "a bias before padding": (block(conv(4, 8, 1), conv(8, 4)), PICTURE, [("conv2d", BORDER)]),
    "a norm before padding": (block(nn.BatchNorm2d(4), conv(4, 4)), PICTURE, [
        ("conv2d", BORDER), ("batch_norm", f"one of its readers cannot take it: {BORDER}"),
    ]),
    "padding between two kernels": (
        block(conv(4, 8, bias=False), conv(8, 1)), PICTURE,
        [("conv2d", "zero padding stands between the two kernels, so the border is no convolution")],
    ),
    "a relu inside": (ReluInside(), PICTURE, [("add", "a relu stands between")]),
    "unequal strides": (Strides(), PICTURE, [("add", "the branches have unequal strides, 2×2 and 1×1")]),
    "used elsewhere": (Used(), PICTURE, [("conv2d", "the conv2d's output is used by 1 other(s)")]),
    "dearer": (
        block(conv(4, 8, 1, bias=False), conv(8, 8, groups=8)), PICTURE,
        [("conv2d", "as one operator it would cost 18,432 MACs, as it stands 6,656")],
    ),
    "a pool that divides by what lies inside": (
        Branches(conv(4, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)), PICTURE,
        [("add", "the pool divides by what lies inside (count_include_pad is off)")],
    ),
    "computed weights": (Computed(), PICTURE, []),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_operators_stay_and_say_why_when(case: str) -> None:
    model, shape, reasons = STAYS[case]
    program = captured(randomize(model), image(*shape))
    assert near_misses(Reparameterize(), program) == reasons
    check_pass(Reparameterize(), program, expect_changes=0)


class Mixed(nn.Module):
    """A training-time block with a skip, a squeeze of its own and a head that a transposed convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.rep = Branches(normed(4, 4), normed(4, 4, 1), nn.BatchNorm2d(4))
        self.mix = LayerScale(Branches(normed(4, 4, groups=4), nn.BatchNorm2d(4)), 4)
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 2, 2, 2), nn.BatchNorm2d(2))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mix(F.relu(self.rep(x)))
        return self.up(F.relu(x)), self.norm(x)


def test_text_is_golden_when_blocks_stand_in_a_row() -> None:
    torch.manual_seed(0)
    checked = check_pass(Reparameterize(), randomize(Mixed()), image(*PICTURE), golden="reparameterize")
    record = next(change for change in checked.changes if "rep" in change.where[0])
    assert record.what == "7 operators merged into conv2d, weights 208 → 148, MACs 10,240 → 9,216"
    assert (record.saved_nodes, record.saved_macs) == (6, 1024)
    assert "rep.branches.0.0" in record.where
    assert "rep.branches.2" in record.where


class Quantized(nn.Module):
    """Two convolutions with a quantized value, or a quantized weight, between them."""

    def __init__(self, *, of: str) -> None:
        super().__init__()
        self.first, self.second, self.of = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 1), of
        self.norm = nn.BatchNorm2d(5)
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("point", torch.tensor(3, dtype=torch.int8))

    def there_and_back(self, x: Tensor) -> Tensor:
        steps = torch.ops.vlexport.quantize(x, self.scale, self.point)
        made: Tensor = torch.ops.vlexport.dequantize(steps, self.scale, self.point)
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.of == "weight":
            made: Tensor = F.conv2d(self.first(x), self.there_and_back(self.second.weight))
            return torch.relu(self.norm(made))
        return torch.relu(self.second(self.there_and_back(self.first(x))))


@pytest.mark.parametrize(
    ("of", "reasons"),
    [
        ("value", []),
        ("weight", [("batch_norm", "the convolution's weight or bias is computed, not stored")]),
    ],
)
def test_convolutions_stay_apart_when_something_is_quantized_between_them(
    of: str, reasons: list[tuple[str, str]]
) -> None:
    torch.manual_seed(0)
    program = captured(Quantized(of=of), image(1, 3, 6, 6))
    assert near_misses(Reparameterize(), program) == reasons
    assert len(program.calls("vlexport.quantize.default")) == 1


def strided(*, kernel: int) -> nn.Module:
    """A strided kernel plus a pointwise one: the padding that does for both depends on how long the axes are."""
    torch.manual_seed(0)
    return randomize(
        Branches(
            nn.Sequential(nn.Conv2d(3, 4, kernel, stride=2, padding=kernel // 2, bias=False), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(3, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4)),
        )
    )


HEIGHT_AND_WIDTH = {"x": {2: ("height", 4, 64), 3: ("width", 4, 64)}}


@pytest.mark.parametrize("size", [(6, 9), (7, 8)])
def test_branches_merge_when_height_and_width_are_dynamic(size: tuple[int, int]) -> None:
    program = captured(strided(kernel=3), {"x": image(2, 3, *size)}, dynamic=HEIGHT_AND_WIDTH)
    assert {"height", "width"} <= set(program.signature.dims)
    checked = check_pass(Reparameterize(), program)
    assert [dialect.plain_name(node) for node in checked.after.calls()] == ["conv2d"]
    for height, width in ((5, 8), (8, 5), (11, 12), (16, 16)):
        x = image(2, 3, height, width)
        assert worst_error(checked.after.run(x), program.run(x)) <= 1e-5
