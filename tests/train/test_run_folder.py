"""The run folder and the checkpoint file."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sdnet.train import environment
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.environment import describe_environment, package_version
from sdnet.train.errors import UserError
from sdnet.train.files import write_atomically
from sdnet.train.recipes import demo
from sdnet.train.run_folder import RunFolder

LINE = {"train_loss": 2.0, "val_loss": 2.5, "val_top1": 40.0, "val_top5": 90.0}


@pytest.fixture
def checkpoint() -> Checkpoint:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return Checkpoint(
        epoch=3,
        batch=2,
        step=11,
        best_top1=40.0,
        data="digest",
        model={"weight": weight.detach()},
        optimizer=optimizer.state_dict(),
        scaler={"scale": 65536.0},
        ranks=[{"loader": torch.zeros(3, dtype=torch.uint8)}, {"loader": torch.ones(3, dtype=torch.uint8)}],
    )


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path):
        path.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_text() == "old"


def test_recipe_is_kept(tmp_path):
    run = RunFolder(tmp_path / "new" / "run")
    run.create(demo())
    assert run.recipe() == demo()


def test_metrics_are_lines_of_json_and_the_curve_is_drawn(tmp_path):
    run = RunFolder(tmp_path)
    for epoch in (1, 2):
        run.add_metrics({"epoch": epoch, **LINE})
    assert [json.loads(line)["epoch"] for line in run.metrics_file.read_text().splitlines()] == [1, 2]
    with Image.open(run.curve_file) as curve:
        assert curve.format == "PNG"


def test_metrics_after_the_checkpoint_and_half_lines_are_forgotten(tmp_path):
    run = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        run.add_metrics({"epoch": epoch, **LINE})
    with run.metrics_file.open("a") as file:
        file.write('{"epoch": 4, "tra')
    run.keep_metrics(2)
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    assert len(run.metrics_file.read_text().splitlines()) == 2


def test_weights_are_safetensors_with_facts(tmp_path):
    RunFolder(tmp_path).save_weights("best", {"weight": torch.arange(4.0).view(2, 2).t()}, {"epoch": "3"})
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert file.metadata() == {"epoch": "3"}
        assert torch.equal(file.get_tensor("weight"), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_a_checkpoint_comes_back_without_executing_pickles(tmp_path, checkpoint):
    checkpoint.save(tmp_path / "last.pt")
    loaded = Checkpoint.load(tmp_path / "last.pt")  # weights_only=True
    assert (loaded.epoch, loaded.batch, loaded.step, loaded.scaler) == (3, 2, 11, {"scale": 65536.0})
    assert torch.equal(loaded.model["weight"], checkpoint.model["weight"])
    assert loaded.optimizer["state"][0]["momentum_buffer"].tolist() == [1, 1]
    assert loaded.ranks[1]["loader"].tolist() == [1, 1, 1]


def test_no_checkpoint_yet(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint yet: there is no last\.pt"):
        Checkpoint.load(tmp_path / "last.pt")


def test_a_checkpoint_belongs_to_its_data_and_processes(checkpoint):
    checkpoint.check("digest", 2)
    with pytest.raises(UserError, match="the files or classes of the training data have changed"):
        checkpoint.check("other", 2)
    with pytest.raises(UserError, match="resumed with 1 processes: it began with 2"):
        checkpoint.check("digest", 1)


def test_environment_names_versions_device_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = describe_environment(torch.device("cpu"))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["sdnet"] == package_version("sdnet")
    assert package_version("no-such-package") is None
    assert facts["device_type"] == "cpu"
    assert json.loads(json.dumps(facts)) == facts
    monkeypatch.setattr(environment, "git", lambda *_: None)  # as outside a checkout
    monkeypatch.setenv("SDNET_COMMIT", "0123abc")
    facts = describe_environment(torch.device("cpu"))
    assert (facts["commit"], facts["dirty"]) == ("0123abc", None)
