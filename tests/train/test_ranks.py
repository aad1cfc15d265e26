"""Two real processes over gloo, launched by torchrun, on a CPU."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

HERE = Path(__file__).parent
PROGRAM = HERE.parents[1] / "train" / "imagenet.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS = ("--recipe=demo", "--epochs=2", "--batch=8", "--image-size=32", "--eval-resize=36")
SETTINGS += ("--threads=1", "--log-every=1")


def launch(processes: int, *command: str | Path) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *torchrun, *map(str, command)]


def run(processes: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launch(processes, *command), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def frozen_run(folder: Path, processes: int, accumulate: int) -> list[dict[str, Tensor]]:
    """The state of every rank after three steps of a batch of 8 in all."""
    done = run(processes, HERE / "frozen_ranks.py", folder, str(accumulate))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """One rank, one batch a step."""
    return frozen_run(tmp_path_factory.mktemp("whole"), 1, 1)[0]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Two ranks with half the batch each."""
    return frozen_run(tmp_path_factory.mktemp("halves"), 2, 1)


def assert_same_steps(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp32 rounding: three steps move weights by about 1e-3, sums taken in another order differ by about 1e-8."""
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
def test_two_ranks_with_half_the_batch_take_the_steps_of_one_with_the_whole(
    whole: dict[str, Tensor], halves: list[dict[str, Tensor]]
) -> None:
    assert_same_steps(halves[0], whole)


def test_step_sizes_vectors_and_weights_are_equal_on_both_ranks(halves: list[dict[str, Tensor]]) -> None:
    names = [name for name in halves[0] if name.endswith((".step_size", ".power_vector"))]
    assert names
    for name, value in halves[0].items():
        assert torch.equal(value, halves[1][name]), name


@pytest.mark.slow
def test_accumulation_takes_the_steps_of_the_whole_batch(whole: dict[str, Tensor], tmp_path: Path) -> None:
    assert_same_steps(frozen_run(tmp_path, 1, 2)[0], whole)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("images_per_second", "data_wait")} for line in lines]


@pytest.mark.slow
def test_two_ranks_train_on_pictures_and_resume_exactly_after_sigterm(make_tree: MakeTree, tmp_path: Path) -> None:
    """17 and 7 pictures: both counts are uneven, so the program itself checks that each val picture counted once."""
    data = make_tree([10, 7], [4, 3])
    done = run(2, PROGRAM, "--data", data, "--out", tmp_path / "whole", *SETTINGS)
    assert done.returncode == 0, done.stderr
    starts = json.loads((tmp_path / "whole" / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [2]
    expected = metrics(tmp_path / "whole")
    assert [line["epoch"] for line in expected] == [1, 2]
    assert all(round(line["val_top1"] * 7 / 100, 6).is_integer() for line in expected)

    command = launch(2, PROGRAM, "--data", data, "--out", tmp_path / "halves", *SETTINGS)
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as first:
        assert first.stdout
        first.stdout.readline()  # it has taken a step
        first.send_signal(signal.SIGTERM)
        told = first.stdout.read()
    assert "go on with --resume" in told
    assert first.returncode != 0
    assert len(metrics(tmp_path / "halves")) < 2

    done = run(2, PROGRAM, "--data", data, "--resume", tmp_path / "halves")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "halves") == expected


def test_an_error_is_said_once(tmp_path: Path) -> None:
    done = run(2, PROGRAM, "--data", tmp_path / "absent", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count(f"error: The data folder {tmp_path / 'absent'} does not exist.") == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_know_each_other_are_refused(make_tree: MakeTree, tmp_path: Path) -> None:
    """As under `mpirun -n 2 python train/imagenet.py`, but without what a group needs: an address to meet at."""
    data = make_tree([4, 4], [2, 2])
    alone = {name: value for name, value in ENVIRONMENT.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, PROGRAM, "--data", data, "--out", tmp_path / "run", *SETTINGS]
    done = subprocess.run(
        command, env=alone | {"OMPI_COMM_WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
