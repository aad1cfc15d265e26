"""The gradient of the dictionary as Triton computes it, against PyTorch's in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from sdnet.kernels.reference import Pair, codes_size
from sdnet.kernels.triton_path.correlation.weight_gradient import PAIRS, ScaledPair, launches_of, weight_correlation
from sdnet.kernels.triton_path.tiles import Tile

from .cases import DEVICE, Named

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Relative RMS error."""

POINTERS = Tile("pointers", 2, 2, 8, atoms=16, channels=16, warps=4, stages=1)
FEW = Tile("few", 4, 4, 2, atoms=16, channels=32, warps=4, stages=1)
DESCRIPTORS = Tile("descriptors", 32, 1, 1, atoms=16, channels=16, warps=4, stages=1)
ROWS = DESCRIPTORS._replace(taps=3)


@dataclass(frozen=True)
class CorrelationCase(Named):
    """Pairs to correlate, and how."""

    batch: int = 3
    channels: int = 5
    atoms: int = 7
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    size: Pair = (5, 6)
    pairs: int = 3
    layout: Literal["contiguous", "channels_last", "sliced", "mixed"] = "contiguous"
    tile: Tile | None = None
    splits: int | None = None

    def __str__(self) -> str:
        named = super().__str__()
        names = {"POINTERS": POINTERS, "FEW": FEW, "DESCRIPTORS": DESCRIPTORS, "ROWS": ROWS}
        for name, tile in names.items():
            named = named.replace(f"tile={tile}".replace(" ", ""), name)
        return named

    def tensors(self, dtype: torch.dtype) -> tuple[list[ScaledPair], Tensor]:
        """The pairs, scaled by a tensor, by -1, by the tensor again and so on, and the weight."""
        generator = torch.Generator().manual_seed(0)
        grid = codes_size(self.size, self.kernel_size, self.stride, self.padding)

        def random(channels: int, size: Pair, pair: int) -> Tensor:
            tensor = torch.randn(self.batch, channels, *size, generator=generator).to(DEVICE, dtype)
            if self.layout == "channels_last" or (self.layout == "mixed" and pair == 1):
                return tensor.contiguous(memory_format=torch.channels_last)
            if self.layout == "sliced":
                wide = tensor.new_full((self.batch, channels + 1, size[0], 2 * size[1]), torch.nan)
                wide[:, 1:, :, ::2] = tensor
                return wide[:, 1:, :, ::2]
            return tensor

        scale = torch.tensor(0.3, device=DEVICE)
        pairs = [
            (random(self.channels, self.size, n), random(self.atoms, grid, n), -1.0 if n % 2 else scale)
            for n in range(self.pairs)
        ]
        weight = torch.empty(self.atoms, self.channels, *self.kernel_size, device=DEVICE, dtype=dtype)
        return pairs, weight.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else weight


def expected(pairs: Sequence[ScaledPair], weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The sum of the correlations in fp64."""
    options: Any = {"stride": stride, "padding": padding}  # which are annotated as ints alone
    shape = list(weight.shape)
    return sum(
        (scale * conv2d_weight(r.double(), shape, m.double(), **options) for r, m, scale in pairs),
        start=torch.zeros(shape, dtype=torch.float64, device=weight.device),
    )


def error(actual: Tensor, wanted: Tensor) -> float:
    """The relative RMS error."""
    return float((actual.double() - wanted).norm() / wanted.norm())


CASES = [
    CorrelationCase(),
    CorrelationCase(layout="channels_last"),
    CorrelationCase(layout="sliced", stride=(2, 1)),
    CorrelationCase(layout="mixed"),
    CorrelationCase(pairs=1, splits=2),
    CorrelationCase(pairs=2, size=(7, 4), splits=3),
    CorrelationCase(pairs=5, layout="channels_last"),
    CorrelationCase(batch=1, kernel_size=(1, 1), padding=(0, 0), stride=(3, 3), size=(8, 7)),
    CorrelationCase(kernel_size=(5, 5), padding=(2, 2), stride=(2, 2), size=(9, 8), pairs=1),
    CorrelationCase(
        kernel_size=(7, 7), padding=(3, 3), stride=(2, 2), channels=3, size=(9, 11), pairs=1, layout="channels_last"
    ),
    CorrelationCase(kernel_size=(7, 7), padding=(3, 3), stride=(2, 2), channels=3, size=(10, 8), tile=FEW, splits=2),
    CorrelationCase(channels=3, tile=FEW, layout="channels_last"),
    CorrelationCase(kernel_size=(3, 1), padding=(2, 0), stride=(1, 2), size=(4, 9)),
    CorrelationCase(padding=(0, 0), stride=(3, 2)),
    CorrelationCase(
        channels=33, atoms=18, kernel_size=(3, 2), size=(4, 5), stride=(2, 2), layout="channels_last", pairs=2
    ),
    CorrelationCase(tile=POINTERS, layout="channels_last", size=(7, 9), stride=(2, 2), pairs=2, splits=3),
    CorrelationCase(batch=35, channels=24, atoms=16, size=(3, 2), layout="channels_last", tile=ROWS, splits=2),
    CorrelationCase(
        batch=33, channels=8, atoms=16, size=(5, 4), stride=(2, 2), layout="channels_last", tile=ROWS, pairs=2
    ),
    CorrelationCase(
        batch=40, channels=24, atoms=8, size=(6, 5), stride=(3, 2), layout="channels_last", tile=DESCRIPTORS, pairs=1
    ),
    CorrelationCase(
        batch=3,
        channels=8,
        atoms=8,
        kernel_size=(2, 5),
        padding=(0, 2),
        size=(3, 4),
        layout="channels_last",
        tile=DESCRIPTORS,
    ),
    # Taps that reach one pixel, and none.
    CorrelationCase(
        batch=3,
        channels=8,
        atoms=8,
        kernel_size=(5, 3),
        padding=(4, 1),
        size=(1, 1),
        stride=(1, 2),
        layout="channels_last",
        tile=DESCRIPTORS,
    ),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, torch.float32, id=f"{case}-fp32") for case in CASES]
    + [pytest.param(case, torch.float16, id=f"{case}-fp16") for case in CASES[1::2]],
)
def test_equals_pytorch_in_fp64(case: CorrelationCase, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and case.tile is not None and case.tile.form == "descriptors":
        if dtype == torch.float32:
            pytest.skip("descriptors are for 16-bit types; fp32 takes them under the interpreter alone")
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("descriptors are for sm_90 on")
    pairs, weight = case.tensors(dtype)
    actual = weight_correlation(pairs, weight, case.stride, case.padding, "ieee", case.tile, case.splits)
    assert actual.dtype == dtype
    assert actual.shape == weight.shape
    assert actual.stride() == weight.stride()
    assert error(actual, expected(pairs, weight, case.stride, case.padding)) <= TOLERANCE[dtype]


def test_result_in_another_type_than_the_operands() -> None:
    case = CorrelationCase()
    pairs, weight = case.tensors(torch.float16)
    actual = weight_correlation(pairs, weight.float(), case.stride, case.padding)
    assert actual.dtype == torch.float32
    # Products of fp16 are exact in fp32, so only the sums round.
    assert error(actual, expected(pairs, weight, case.stride, case.padding)) <= TOLERANCE[torch.float32]


def test_same_call_same_bits() -> None:
    case = CorrelationCase(splits=3)
    pairs, weight = case.tensors(torch.float32)
    first, second = (
        weight_correlation(pairs, weight, case.stride, case.padding, "ieee", splits=case.splits) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_empty_batch_gives_zeros() -> None:
    case = CorrelationCase(batch=0)
    pairs, weight = case.tensors(torch.float32)
    assert torch.equal(weight_correlation(pairs, weight, case.stride, case.padding), torch.zeros_like(weight))


def test_scale_of_zero_is_left_out() -> None:
    case = CorrelationCase()
    pairs, weight = case.tensors(torch.float32)
    without = weight_correlation([(r, m, 0.0 if s == -1.0 else s) for r, m, s in pairs], weight, (1, 1), (1, 1), "ieee")
    kept = [pair for pair in pairs if isinstance(pair[2], Tensor)]
    assert error(without, expected(kept, weight, (1, 1), (1, 1))) <= TOLERANCE[torch.float32]
    assert not weight_correlation([(r, m, 0.0) for r, m, _ in pairs], weight, (1, 1), (1, 1)).any()


def test_device_scale_of_zero() -> None:
    case = CorrelationCase()
    pairs, weight = case.tensors(torch.float32)
    zero = torch.zeros((), device=DEVICE)
    pairs = [(r, m, zero if isinstance(s, Tensor) else s) for r, m, s in pairs]
    actual = weight_correlation(pairs, weight, (1, 1), (1, 1), "ieee")
    assert error(actual, expected(pairs, weight, (1, 1), (1, 1))) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("spread", [2**30, 2**31], ids=["box beyond 2^31", "images beyond 2^31"])
def test_tensors_past_two_to_the_31_elements(spread: int) -> None:
    case = CorrelationCase(batch=3, pairs=1, channels=2, atoms=2, size=(3, 4))
    [(r, m, scale)], weight = case.tensors(torch.float16)
    # Images far apart in memory that the system hands out only where it is touched.
    storage = torch.empty(2 * spread + r[0].numel(), dtype=r.dtype, device=DEVICE)
    far = storage.as_strided(r.shape, (spread, *r.stride()[1:]))
    far.copy_(r)
    actual = weight_correlation([(far, m, scale)], weight, case.stride, case.padding)
    assert error(actual, expected([(r, m, scale)], weight, case.stride, case.padding)) <= TOLERANCE[torch.float16]


def test_launches_hold_few_pairs_and_lose_none() -> None:
    r, scale, other = torch.empty(0), torch.ones(()), torch.ones(())
    pairs: list[ScaledPair] = [(r, r, s) for s in (scale, -1.0, scale, 2.0, scale, -1.0, other, scale)]
    launches = list(launches_of(pairs))
    assert all(1 <= len(head) + len(tail) <= PAIRS for head, tail in launches)
    assert all(len({id(pair[2]) for pair in head}) <= 1 for head, _ in launches)
    assert all(len({pair[2] for pair in tail}) <= 1 for _, tail in launches)
    taken = [pair for head, tail in launches for pair in (*head, *tail)]
    assert sorted(map(id, taken)) == sorted(map(id, pairs))


def test_two_steps_are_one_launch() -> None:
    r, scale = torch.empty(0), torch.ones(())
    [(head, tail)] = launches_of([(r, r, scale), (r, r, -1.0), (r, r, scale)])
    assert (len(head), len(tail)) == (2, 1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        CorrelationCase(batch=70, channels=64, atoms=64, size=(14, 13)),
        CorrelationCase(batch=64, channels=128, atoms=256, size=(15, 14), stride=(2, 2)),
        CorrelationCase(batch=9, channels=64, atoms=128, size=(14, 14), pairs=5),
        CorrelationCase(
            batch=32, channels=3, atoms=64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), size=(31, 32)
        ),
    ],
    ids=str,
)
def test_on_a_gpu_no_worse_than_pytorch(case: CorrelationCase, layout: Any, dtype: torch.dtype) -> None:
    pairs, weight = replace(case, layout=layout).tensors(dtype)
    right = expected(pairs, weight, case.stride, case.padding)
    actual = weight_correlation(pairs, weight, case.stride, case.padding)
    options: Any = {"stride": case.stride, "padding": case.padding}
    theirs = torch.stack(
        [scale * conv2d_weight(r, list(weight.shape), m, **options).float() for r, m, scale in pairs]
    ).sum(dim=0)
    assert error(actual, right) <= 2 * error(theirs.to(dtype), right)
