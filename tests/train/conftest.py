"""Real pictures for the loaders and the trainer: crops of the photographs inside scikit-image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from sdnet.train.demo_data import PHOTOGRAPHS, photographs_folder

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]
MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


@pytest.fixture(scope="session")
def write_tree() -> WriteTree:
    """Makes an ImageFolder tree: `write_tree(root, [3, 2], [1, 1])` has two classes of 3 and 2 training pictures.

    A picture is a crop of a photograph as a JPEG of about 48 x 40 pixels; no two are alike.
    """

    def write(root: Path, train: Sequence[int], val: Sequence[int]) -> Path:
        for split, counts in (("train", train), ("val", val)):
            for label, count in enumerate(counts):
                folder = root / split / f"class {label:02}"
                folder.mkdir(parents=True)
                with Image.open(photographs_folder() / PHOTOGRAPHS[label % len(PHOTOGRAPHS)]) as photograph:
                    for number in range(count):
                        width, height = 48 + number % 5, 40 + number % 7
                        left, top = 3 * number + label, 2 * number + (100 if split == "val" else 0)
                        crop = photograph.convert("RGB").crop((left, top, left + width, top + height))
                        crop.save(folder / f"{number:03}.jpg", quality=95)
        return root

    return write


@pytest.fixture
def make_tree(write_tree: WriteTree, tmp_path: Path) -> MakeTree:
    """`write_tree` into the test's own folder."""
    return lambda train, val: write_tree(tmp_path / "pictures", train, val)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in singletons, which even a refused run makes: none outlives its test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
