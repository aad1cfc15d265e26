"""What a layer runs with: what the environment asks for, else what was measured on this GPU, else a rule.

`python -m sdnet.bench paths` measures, and leaves a table for each GPU in the folder `measured`.
"""

import json
import os
from functools import cache
from pathlib import Path as File
from typing import Literal, NamedTuple

from sdnet.kernels.triton_path.tiles import FEW, Shape, Tile, Tiles, by_rule

Steps = Literal["fused", "cudnn"]

ENVIRONMENT_VARIABLE = "SDNET_TRITON_PATH"

MEASURED = File(__file__).with_name("measured")
"""Where the measured tables lie."""

FUSED_CHANNELS = 128
"""The most channels for which fused steps without descriptors are the rule."""


class Entry(NamedTuple):
    """What was measured for a layer: the quicker steps, and the quickest tiles of the fused ones."""

    steps: Steps
    tiles: Tiles


class Path(NamedTuple):
    """Whether the steps of a layer run as fused convolutions, or as cuDNN's with pointwise kernels; and why."""

    fused: bool
    reason: str


def path_of(shape: Shape, gpu: str | None) -> Path:
    """SDNET_TRITON_PATH, else the table measured on this GPU, else a rule that no GPU has confirmed.

    The rule: descriptors leave the products with padding out, which makes up for cuDNN's better products where there
    are few pixels, as the saved passes over memory do where there are many. Without them a fused step saves more than
    it loses up to 128 channels, and with a few image channels, where cuDNN is weak; beyond, and for fp32 without tf32,
    cuDNN's products win. In 16 bits the taps of contiguous NCHW images start at odd addresses, which neither wide nor
    asynchronous loads can take.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced is not None:
        if forced not in ("fused", "cudnn"):
            raise ValueError(f"{ENVIRONMENT_VARIABLE} is {forced!r}; it must be fused or cudnn.")
        return Path(forced == "fused", f"{ENVIRONMENT_VARIABLE} asks for {forced} steps")
    if entry := entry_of(shape, gpu):
        return Path(entry.steps == "fused", f"{entry.steps} steps were the quicker ones when measured on {gpu}")
    if shape.itemsize == 4 and shape.precision == "ieee":
        return Path(False, "cudnn steps, by rule, for fp32 without tf32")
    if shape.channels <= FEW:
        return Path(True, f"fused steps, by rule, for up to {FEW} image channels")
    if shape.described_images:
        return Path(True, "fused steps, by rule, for 16-bit channels_last tensors in large batches")
    if not shape.channels_last:
        return Path(False, "cudnn steps, by rule, for tensors that are not channels_last")
    if max(shape.channels, shape.atoms) > FUSED_CHANNELS:
        return Path(False, f"cudnn steps, by rule, for more than {FUSED_CHANNELS} channels")
    return Path(True, f"fused steps, by rule, for up to {FUSED_CHANNELS} channels")


def key_of(shape: Shape) -> str:
    """The layer's entry in a table, of any batch; fp32 by what it is multiplied in."""
    (height, width), (kernel_h, kernel_w) = shape.size, shape.kernel_size
    layer = f"{shape.channels}->{shape.atoms} {kernel_h}x{kernel_w}/{shape.stride[0]}x{shape.stride[1]}"
    kind = "16-bit" if shape.itemsize == 2 else shape.precision
    memory = "channels_last" if shape.channels_last else "contiguous"
    return f"{layer} @ {height}x{width} {kind} {memory}"


def file_of(gpu: str, folder: File) -> File:
    """The table of a GPU of this name."""
    return folder / f"{gpu.replace(' ', '_')}.json"


@cache
def table(gpu: str, folder: File) -> dict[str, Entry]:
    """What was measured on a GPU of this name, by layer; empty without a measurement."""
    file = file_of(gpu, folder)
    if not file.is_file():
        return {}
    return {
        key: Entry(steps, Tiles(Tile(**analysis), Tile(**synthesis)))
        for key, (steps, analysis, synthesis) in json.loads(file.read_text()).items()
    }


def entry_of(shape: Shape, gpu: str | None) -> Entry | None:
    """What was measured for a layer on a GPU of this name."""
    return table(gpu, MEASURED).get(key_of(shape)) if gpu else None


def tiles_of(shape: Shape, gpu: str | None) -> Tiles:
    """The measured tiles where they fit the batch at hand, else the rules'."""
    chosen, entry = by_rule(shape), entry_of(shape, gpu)
    if entry is None:
        return chosen
    return Tiles(*(new if new.fits(shape) else old for new, old in zip(entry.tiles, chosen, strict=True)))
