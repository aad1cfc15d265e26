"""The demo: its pictures, and the whole road through `accelerate launch` with fewer steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdnet.train.data.folder import read_image_folder
from sdnet.train.demo_data import PHOTOGRAPHS, main, make_demo_data, photographs_folder
from sdnet.train.errors import UserError

ROOT = Path(__file__).parents[2]


def test_pictures_are_jpegs_in_an_image_folder(tmp_path: Path) -> None:
    assert make_demo_data(tmp_path / "demo", train=3, val=2)
    train, val = read_image_folder(tmp_path / "demo")
    assert len(train.classes) == len(PHOTOGRAPHS)
    assert (len(train), len(val)) == (3 * len(PHOTOGRAPHS), 2 * len(PHOTOGRAPHS))
    with Image.open(train.root / train.files[0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 96))


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_demo_data(tmp_path / name, train=2, val=1)
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.jpg"))
    assert len(files) == 3 * len(PHOTOGRAPHS)
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_an_existing_tree_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_demo_data(tmp_path / "demo", train=1, val=1)
    assert not make_demo_data(tmp_path / "demo", train=1, val=1)
    with pytest.raises(UserError, match="holds something else: remove it, or choose another folder"):
        make_demo_data(tmp_path / "demo", train=2, val=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match=r"error: .* holds something else"):
        main([str(tmp_path / "other")])


def test_what_cannot_become_the_tree_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^OUT is \.; it must be the path of a folder to make\.$"):
        make_demo_data(Path())
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "demo.json").write_bytes(b"\xff{")
    for name in ("link", "damaged"):
        with pytest.raises(UserError, match=f"{name} holds something else: remove it, or choose another folder"):
            make_demo_data(tmp_path / name)


def test_an_unfinished_tree_is_rebuilt(tmp_path: Path) -> None:
    (tmp_path / ".demo.tmp" / "train" / "astronaut").mkdir(parents=True)
    assert make_demo_data(tmp_path / "demo", train=1, val=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("file", PHOTOGRAPHS)
def test_photographs_are_real(file: str) -> None:
    with Image.open(photographs_folder() / file) as picture:
        assert min(picture.width // 3, picture.height) >= 96
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_the_demo_trains_end_to_end(tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", train=16, val=4)
    run = tmp_path / "run"
    command = "launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train/imagenet.py"
    settings = ["--recipe", "demo", "--data", str(tmp_path / "data"), "--out", str(run), "--epochs", "2"]
    accelerate = Path(sys.executable).with_name("accelerate")
    done = subprocess.run(
        [str(accelerate), *command.split(), *settings],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a demo has nothing to warn of"
    assert f"the run folder is {run}" in done.stdout
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert second["train_loss"] < first["train_loss"]
    assert {"best.safetensors", "last.safetensors", "last.pt", "curve.png"} <= {file.name for file in run.iterdir()}
