"""Make a small ImageFolder tree from the photographs in scikit-image: `python -m sdnet.train.demo_data OUT`.

Each class is one photograph, and its images are square JPEG crops of random position and size. Training crops come from
the left two thirds of the photograph, validation crops from the right third: no pixel is in both.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdnet.train.cli import user_errors
from sdnet.train.data.names import printable
from sdnet.train.errors import UserError

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
MARKER = "demo.json"


def make_demo_data(out: Path, train: int = 64, val: int = 16, side: int = 96, seed: int = 0) -> bool:
    """Write `out`/{train,val}/<class>/NNN.jpg. The tree appears complete or not at all.

    Args:
        out: The folder to make.
        train: The number of training images of a class.
        val: The number of validation images of a class.
        side: Height and width of the images, in pixels.
        seed: The seed of the crops; equal arguments give equal files.

    Returns:
        False if the tree was there already, else True.

    Raises:
        UserError: `out` holds something else, or scikit-image is not installed.
    """
    if not out.name:
        raise UserError(f"OUT is {printable(out)}; it must be the path of a folder to make.")
    made_with = {"train": train, "val": val, "side": side, "seed": seed, "photographs": list(PHOTOGRAPHS)}
    marker = out / MARKER
    if marker.is_file() and _content_of(marker) == made_with:
        return False
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{printable(out)} holds something else: remove it, or choose another folder.")
    source = photographs_folder()
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    generator = np.random.default_rng(seed)
    for file in PHOTOGRAPHS:
        with Image.open(source / file) as opened:
            photograph = opened.convert("RGB")
        border = 2 * photograph.width // 3
        for split, count, left, right in (("train", train, 0, border), ("val", val, border, photograph.width)):
            folder = temporary / split / Path(file).stem
            folder.mkdir(parents=True)
            for number in range(count):
                crop = _random_crop(photograph.crop((left, 0, right, photograph.height)), side, generator)
                crop.save(folder / f"{number:03}.jpg", quality=90)
    (temporary / MARKER).write_text(json.dumps(made_with))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(out)
    return True


def _content_of(marker: Path) -> Any:
    """Return what a marker says, None for a damaged one."""
    try:
        return json.loads(marker.read_text())
    except ValueError:
        return None


def _random_crop(photograph: Image.Image, side: int, generator: np.random.Generator) -> Image.Image:
    """Return a square of 3/4 to all of the shorter side, anywhere in the photograph, scaled to `side`."""
    shorter = min(photograph.size)
    extent = int(generator.integers(3 * shorter // 4, shorter + 1))
    left = int(generator.integers(0, photograph.width - extent + 1))
    top = int(generator.integers(0, photograph.height - extent + 1))
    return photograph.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + extent, top + extent))


def photographs_folder() -> Path:
    """Return the folder of the photographs inside the scikit-image package.

    Raises:
        UserError: scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("The photographs come with scikit-image: pip install 'sdnet[demo]'.")
    return Path(spec.origin).parent / "data"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the tree, or print that it is there."""
    parser = argparse.ArgumentParser(description="Make a small ImageFolder tree of real photographs.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, with train/<class>/ and val/<class>/")
    out = parser.parse_args(argv).out
    with user_errors():
        made = make_demo_data(out)
    print(f"{'Made' if made else 'Already there:'} {printable(out)}, {len(PHOTOGRAPHS)} classes of photographs")


if __name__ == "__main__":
    main()
