"""What a launch or a recipe cannot do is refused in one sentence, before any work, and leaves nothing behind."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.train.build import MPI_AND_SLURM, launched_processes
from sdnet.train.cli import user_errors
from sdnet.train.data.dali import open_pictures
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.recipes import Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]

SMALL = replace(demo(), width=4, epochs=2, batch=4, image_size=32, eval_resize=36, lr=0.01)


@pytest.fixture(scope="module")
def data(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [8, 7, 6], [3, 2, 2])


def trainer(data: Path, run: Path, recipe: Recipe = SMALL) -> Trainer:
    return Trainer(Job(recipe, data, RunFolder(run), threads=1, log_every=2), open_pictures)


def test_fp16_needs_a_gpu(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="Mixed precision fp16 needs a GPU; this run has cpu"):
        trainer(data, tmp_path / "run", replace(SMALL, mixed_precision="fp16"))


def test_the_launcher_and_the_recipe_must_agree(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="launched with mixed precision bf16 but the recipe says no: pass --mixed"):
        trainer(data, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="launched with 4 accumulation steps: pass --accumulate 4 instead"):
        trainer(data, tmp_path / "run")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_divides_the_network_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=r"^accelerate was launched with .*, which this trainer does not take: [^\n]*$"):
        trainer(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 4, "accumulate": 3}, "batch is 4, which does not divide among 1 processes x 3 accumulated batches."),
        ({"shortcut": False}, "shortcut=False is for "),
        ({"impl": "triton"}, "the argument impl is 'triton', but x is on cpu: "),
        (
            {"accumulate": 4, "image_size": 8, "eval_resize": 8},
            "A batch of one process has one image and the last stage is 1 x 1 at image_size 8: batch norm needs more",
        ),
    ],
    ids=str,
)
def test_what_only_this_launch_decides_is_said_before_the_data_are_opened(
    tmp_path: Path, changes: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if changes.get("impl") == "triton" and torch.cuda.is_available():
        pytest.skip("the Triton kernels run on this machine")
    with pytest.raises(UserError) as caught:
        trainer(tmp_path / "no data", tmp_path / "run", replace(SMALL, **changes))
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_training_set_smaller_than_a_batch_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^The training set is smaller than one batch of 32\.$"):
        trainer(data, tmp_path / "run", replace(SMALL, batch=32))
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_the_model_lacks_is_named_before_the_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^freeze is 'stemm'; it must name a part of the model, such as stem, "):
        trainer(tmp_path / "no data", tmp_path / "run", replace(SMALL, freeze=("stemm",)))


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),  # srun starts torchrun once on each node
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "40000"}, 1),
    ],
    ids=str,
)
def test_the_launcher_tells_how_many_processes_it_started(
    environment: dict[str, str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", *MPI_AND_SLURM, "SLURM_PTY_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == processes


def test_processes_that_do_not_form_a_group_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"^2 processes were launched, but this one is in a group of 1: they would"):
        trainer(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_and_a_missing_module_of_ours_is_a_fault() -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        import_module("no_such_package.part")
    assert (
        caught.value.code
        == "error: The package no_such_package is missing; pip install 'sdnet[train]' installs what training needs."
    )
    with pytest.raises(ModuleNotFoundError), user_errors():
        import_module("sdnet.train.no_such_module")
