"""The step sizes of all layers of a network in at most 25 launches, whatever the number of layers.

`sdnet.kernels.step_sizes` describes the method; its `update_dictionary` does the same by operators. With M = AA':

    project      W[k] <- W[k] / |W[k]|,   S[k, c] = sum of the taps of W[k, c]
    mean         sums of the power vector u over the pixels, and of its squares
    pattern      d <- S'S d / |d|, six launches
    start        q_0 = u, and what it leaves of the constant image of d
    extend       q_1
    multiply     M q_0 and M q_1, and their products with the directions
    combine      what q_0 and q_1 leave of M x
    extend       q_2
    multiply     M q_2
    remove       what q_0, q_1 and q_2 leave of M q_2
    extend       q_3
    multiply     M q_3
    finish       u, and the sums of u'M u and |M u|^2
    step         step_size

A multiplication is a launch of `analysis`, a = A'q, and one of `synthesis`, A a; a second one if some layers have few
channels.

The kernels are in `lanczos`. Everything stays on the device. The table that they read is made once for a set of
tensors, so a CUDA graph can hold the launches as long as these tensors live; call once before the capture, which must
not wait for the host.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.reference import codes_size
from sdnet.kernels.step_sizes import ATOM_FLOOR, DIRECTIONS, FLOOR, PATTERN_ROUNDS, SAFETY, DictionaryState
from sdnet.kernels.triton_path import lanczos
from sdnet.kernels.triton_path.launch import launch
from sdnet.kernels.triton_path.tiles import ceil_div

PIXELS, REDUCTION = 64, 32
WIDE, NARROW = 32, 16
"""Output channels of a program, and of one that makes the few channels of pictures."""
CHUNK = 512
"""Elements of a program of `start`, `combine`, `remove`, `extend` and `finish`."""
PROJECTED = 256
"""Elements of one step of `project`."""
ATOMS, CHANNELS = 32, 64
"""Atoms of a program of `pattern`, and channels of one of its steps and of a program of `mean`."""
SPAN, TILE = 1024, 64
"""Pixels of a program of `mean`, and of one of its steps."""


class LayerRow(NamedTuple):
    """A dictionary as the kernels see it: addresses and sizes."""

    weight: int
    power_vector: int
    step_size: int
    channels: int
    atoms: int
    size: tuple[int, int]
    codes: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    last: bool
    vector_last: bool

    @staticmethod
    def of(dictionary: DictionaryState) -> "LayerRow":
        """Describe a dictionary."""
        weight, power_vector, step_size, stride, padding = dictionary
        atoms, channels, kh, kw = weight.shape
        image_size = (power_vector.shape[2], power_vector.shape[3])
        codes = codes_size(image_size, (kh, kw), stride, padding)
        addresses = (weight.data_ptr(), power_vector.data_ptr(), step_size.data_ptr())
        last, vector_last = not weight.is_contiguous(), not power_vector.is_contiguous()
        return LayerRow(*addresses, channels, atoms, image_size, codes, (kh, kw), stride, padding, last, vector_last)

    @property
    def pixels(self) -> int:
        """Pixels of the image."""
        return self.size[0] * self.size[1]

    @property
    def codes_pixels(self) -> int:
        """Pixels of the codes."""
        return self.codes[0] * self.codes[1]

    @property
    def block(self) -> int:
        """Image channels of a program of `synthesis`."""
        return NARROW if self.channels <= NARROW else WIDE

    @property
    def parts(self) -> int:
        """Programs of `synthesis`, each of which writes partial sums."""
        return ceil_div(self.pixels, PIXELS) * ceil_div(self.channels, self.block)

    @property
    def chunks(self) -> int:
        """Programs of the kernels that take the image element by element."""
        return ceil_div(self.channels * self.pixels, CHUNK)

    @property
    def groups(self) -> int:
        """Programs of `pattern`."""
        return ceil_div(self.atoms, ATOMS)

    @property
    def spans(self) -> int:
        """Programs of `mean` for one block of channels."""
        return ceil_div(self.pixels, SPAN)

    @property
    def mean_programs(self) -> int:
        """Programs of `mean`."""
        return self.spans * ceil_div(self.channels, CHANNELS)

    @property
    def scratch(self) -> list[int]:
        """Elements of every tensor between the launches, in the order of the table's addresses."""
        image = self.channels * self.pixels
        return [
            *[self.atoms * self.codes_pixels] * 2,
            *[image] * (DIRECTIONS + 1 + DIRECTIONS),
            self.atoms * self.channels,
            self.spans * self.channels,
            self.mean_programs,
            *[self.groups * self.channels] * 2,
            *[4 * self.parts] * DIRECTIONS,
            8 * self.chunks,
            2 * self.chunks,
        ]

    def row(self, scratch: int) -> list[int]:
        """Return the layer's row of the table; its scratch lies at the address `scratch`."""
        addresses = [self.weight, self.power_vector, self.step_size]
        for length in self.scratch:
            addresses.append(scratch)
            scratch += 4 * length
        sizes = (*self.size, *self.codes, *self.kernel_size, *self.stride, *self.padding)
        formats = (int(self.last), int(self.vector_last))
        counts = (self.parts, self.chunks, self.groups, self.spans, self.mean_programs)
        return [*addresses, self.channels, self.atoms, *sizes, *formats, *counts]


class Plan(NamedTuple):
    """What the launches read. An owner has one row for each program: its layer and its index there."""

    table: Tensor
    project: Tensor
    mean: Tensor
    pattern: Tensor
    analysis: Tensor
    synthesis: dict[int, Tensor]
    chunks: Tensor
    scratch: Tensor


@lru_cache(maxsize=16)
def plan_of(layers: tuple[LayerRow, ...], device: torch.device) -> Plan:
    """Make the plan for these layers at these addresses; the one thing here that the host waits for, once."""
    scratch = torch.empty(sum(sum(layer.scratch) for layer in layers), dtype=torch.float32, device=device)
    free, rows = scratch.data_ptr(), []
    for layer in layers:
        rows.append(layer.row(free))
        free += 4 * sum(layer.scratch)

    def owners(counts: Sequence[int]) -> Tensor:
        pairs = [(layer, index) for layer, count in enumerate(counts) for index in range(count)]
        return torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)

    return Plan(
        table=torch.tensor(rows, dtype=torch.int64, device=device),
        project=owners([layer.atoms for layer in layers]),
        mean=owners([layer.mean_programs for layer in layers]),
        pattern=owners([layer.groups for layer in layers]),
        analysis=owners([ceil_div(layer.codes_pixels, PIXELS) * ceil_div(layer.atoms, WIDE) for layer in layers]),
        synthesis={
            block: owners([layer.parts * (layer.block == block) for layer in layers])
            for block in sorted({layer.block for layer in layers})
        },
        chunks=owners([layer.chunks for layer in layers]),
        scratch=scratch,
    )


def update_dictionaries(
    dictionaries: Sequence[DictionaryState], iterations: int = 1, precision: str | None = None
) -> None:
    """Do what `sdnet.kernels.dictionaries.update_dictionaries` does for fp32 dictionaries on one device.

    Weights and power vectors are contiguous or channels_last. Products run in tf32 where cuDNN may use it, unless
    `precision` is "ieee".
    """
    if precision is None:
        cudnn: Any = torch.backends.cudnn
        precision = "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    plan = plan_of(tuple(LayerRow.of(dictionary) for dictionary in dictionaries), dictionaries[0].weight.device)
    table = plan.table
    launch(lanczos.project_kernel, (len(plan.project),), (plan.project, table, ATOM_FLOOR, PROJECTED))
    chunks = plan.chunks
    for _ in range(iterations):
        _start(plan)
        _multiply(plan, 0, 2, precision)
        launch(lanczos.combine_kernel, (len(chunks),), (chunks, table, CHUNK))
        launch(lanczos.extend_kernel, (len(chunks),), (chunks, table, 2, CHUNK))
        _multiply(plan, 2, 1, precision)
        launch(lanczos.remove_kernel, (len(chunks),), (chunks, table, CHUNK))
        launch(lanczos.extend_kernel, (len(chunks),), (chunks, table, 3, CHUNK))
        _multiply(plan, 3, 1, precision)
        launch(lanczos.finish_kernel, (len(chunks),), (chunks, table, FLOOR, CHUNK))
        launch(lanczos.step_kernel, (len(table),), (table, FLOOR, SAFETY, CHUNK))
    for weight, power_vector, step_size, *_ in dictionaries:  # tells autograd of the changes, which it did not see
        torch.autograd.graph.increment_version([weight, power_vector, step_size])


def _start(plan: Plan) -> None:
    chunks, table = plan.chunks, plan.table
    launch(lanczos.mean_kernel, (len(plan.mean),), (plan.mean, table, CHANNELS, TILE, SPAN))
    for i in range(PATTERN_ROUNDS):
        arguments = (plan.pattern, table, i % 2, i == 0, ATOMS, CHANNELS)
        launch(lanczos.pattern_kernel, (len(plan.pattern),), arguments)
    launch(lanczos.start_kernel, (len(chunks),), (chunks, table, PATTERN_ROUNDS % 2, CHUNK, CHANNELS))
    launch(lanczos.extend_kernel, (len(chunks),), (chunks, table, 1, CHUNK))


def _multiply(plan: Plan, j: int, count: int, precision: str) -> None:
    """Multiply `count` directions from q_j on by M."""
    arguments = (plan.analysis, plan.table, j, PIXELS, WIDE, REDUCTION, precision)
    launch(lanczos.analysis_kernel, (len(plan.analysis), count), arguments)
    for block, owner in plan.synthesis.items():
        arguments = (owner, plan.table, j, PIXELS, block, REDUCTION, precision)
        launch(lanczos.synthesis_kernel, (len(owner), count), arguments)
