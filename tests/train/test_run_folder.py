"""The run folder and the checkpoint file."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sdnet.files import write_atomically
from sdnet.train import environment
from sdnet.train.checkpoint import Checkpoint, RandomState, TrainState, restore
from sdnet.train.data.names import printable
from sdnet.train.environment import describe_environment, package_version
from sdnet.train.errors import UserError
from sdnet.train.metrics import LossMeter
from sdnet.train.progress import Display, one_line
from sdnet.train.recipes import demo
from sdnet.train.run_folder import RunFolder

LINE = {"train_loss": 2.0, "val_loss": 2.5, "val_top1": 40.0, "val_top5": 90.0}


@pytest.fixture
def checkpoint() -> Checkpoint:
    """The state of two ranks after a step of SGD."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    state = TrainState(epoch=3, batch=2, step=11, best_top1=40.0)
    shared = {"state": state.state_dict(), "model": {"weight": weight.detach()}, "optimizer": optimizer.state_dict()}
    ranks = [{"loader": {"position": torch.full((3,), rank, dtype=torch.uint8)}} for rank in range(2)]
    return Checkpoint("digest", shared, ranks)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_recipe_is_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new" / "run")
    run.create(demo())
    assert run.recipe() == demo()


def test_metrics_are_lines_of_json_and_the_curve_is_drawn(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for epoch in (1, 2):
        run.add_metrics({"epoch": epoch, **LINE})
    assert [json.loads(line)["epoch"] for line in run.metrics_file.read_text().splitlines()] == [1, 2]
    with Image.open(run.curve_file) as curve:
        assert curve.format == "PNG"


def test_metrics_after_the_checkpoint_and_half_lines_are_forgotten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        run.add_metrics({"epoch": epoch, **LINE})
    with run.metrics_file.open("a") as file:
        file.write('{"epoch": 4, "tra')
    run.keep_metrics(2)
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    assert len(run.metrics_file.read_text().splitlines()) == 2
    assert run.missing_metrics(2) == ()


def test_lost_metrics_of_finished_epochs_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_metrics({"epoch": 2, **LINE})
    sentence = f"{run.metrics_file} lacks the finished epochs 1, 3; the curve leaves them out."
    assert run.missing_metrics(3) == (sentence,)


def test_weights_are_safetensors_with_facts(tmp_path: Path) -> None:
    RunFolder(tmp_path).save_weights("best", {"weight": torch.arange(4.0).view(2, 2).t()}, {"epoch": "3"})
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert file.metadata() == {"epoch": "3"}
        assert torch.equal(file.get_tensor("weight"), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_a_checkpoint_comes_back_without_executing_pickles(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint.save(tmp_path / "last.pt")
    loaded = Checkpoint.load(tmp_path / "last.pt")  # weights_only=True
    assert (loaded.data, loaded.shared["state"]) == ("digest", checkpoint.shared["state"])
    assert torch.equal(loaded.shared["model"]["weight"], checkpoint.shared["model"]["weight"])
    assert loaded.shared["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1, 1]
    assert loaded.ranks[1]["loader"]["position"].tolist() == [1, 1, 1]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoint yet: there is no last\.pt"):
        Checkpoint.load(tmp_path / "last.pt")


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"not a checkpoint",
        lambda content: flipped(content, content.index(torch.full((2,), 0.9).numpy().tobytes())),  # the weight
        lambda content: flipped(content, content.index(b"best_top1")),
    ],
    ids=["empty", "100 bytes", "half", "without its last byte", "text", "a flipped weight", "a flipped name"],
)
def test_a_damaged_checkpoint_is_named(
    tmp_path: Path, checkpoint: Checkpoint, damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "last.pt"
    checkpoint.save(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError) as caught:
        Checkpoint.load(file)
    assert str(caught.value).startswith(f"The checkpoint {file} ")
    assert "\n" not in str(caught.value)


class Executed:
    """Unpickling this object would call `Path.touch`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_foreign_file_is_named_and_not_executed(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    for foreign in ({"weight": torch.ones(2)}, [1, 2], torch.ones(2), {"data": "", "shared": {}, "ranks": 3}):
        torch.save(foreign, file)
        with pytest.raises(UserError, match=f"^{file} is no checkpoint of this version of sdnet: "):
            Checkpoint.load(file)
    torch.save(Executed(tmp_path / "executed"), file)
    with pytest.raises(UserError, match=f"^The checkpoint {file} cannot be read: "):
        Checkpoint.load(file)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_belongs_to_its_data_and_processes(checkpoint: Checkpoint) -> None:
    checkpoint.check_data("digest")
    checkpoint.check_processes(2)
    with pytest.raises(UserError, match="the files or classes of the training data have changed"):
        checkpoint.check_data("other")
    with pytest.raises(UserError, match="resumed with 1 process: it began with 2"):
        checkpoint.check_processes(1)


def test_parts_are_restored_and_what_does_not_fit_is_named(checkpoint: Checkpoint) -> None:
    state, model, file = TrainState(), torch.nn.Linear(1, 1), Path("last.pt")
    assert restore({"state": state}, {"state": checkpoint.shared["state"]}, file) == ()
    assert state == TrainState(epoch=3, batch=2, step=11, best_top1=40.0)
    with pytest.raises(UserError, match=r"^The checkpoint last\.pt holds parts that this run does not have: ema\.$"):
        restore({"state": state}, {"ema": {}}, file)
    with pytest.raises(UserError, match=r"^The model in the checkpoint last\.pt does not fit: .*Missing key.*\.$"):
        restore({"model": model}, {"model": checkpoint.shared["model"]}, file)
    with pytest.raises(UserError, match=r"^The state in the checkpoint last\.pt does not fit: 'epoch'\.$"):
        restore({"state": state}, {"state": {}}, file)


def test_a_part_that_an_older_checkpoint_lacks_starts_afresh_and_is_named(checkpoint: Checkpoint) -> None:
    state, meter = TrainState(), LossMeter(torch.device("cpu"))
    notes = restore({"state": state, "meter": meter}, {"state": checkpoint.shared["state"]}, Path("last.pt"))
    (note,) = notes
    assert note.startswith("last.pt does not hold meter, which starts afresh: ")
    assert state.step == 11


def test_random_numbers_continue_where_their_state_was_taken() -> None:
    generators = RandomState(torch.device("cpu"))
    stored = generators.state_dict()
    drawn = torch.rand(3)
    assert not torch.equal(torch.rand(3), drawn)
    generators.load_state_dict(stored)
    assert torch.equal(torch.rand(3), drawn)


def test_files_left_out_are_one_line_each(tmp_path: Path) -> None:
    """A name may hold a line break, a tab, a backslash, or bytes that are not UTF-8; each stays readable."""
    names = [b"caf\xe9.txt".decode(errors="surrogateescape"), "two\nlines\tand a\\.jpg", "été.jpg"]
    run = RunFolder(tmp_path)
    run.note_left_out([(printable(name), "is\nbroken") for name in names])
    assert (tmp_path / "left_out.tsv").read_text(encoding="utf-8") == (
        "caf\\xe9.txt\tis\\nbroken\ntwo\\nlines\\tand a\\\\.jpg\tis\\nbroken\nété.jpg\tis\\nbroken\n"
    )
    run.note_left_out([])
    assert not (tmp_path / "left_out.tsv").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_every_text_can_be_printed_on_one_line(encoding: str) -> None:
    name = b"caf\xe9 \n \x1b[31m \xc3\xa9.jpg".decode(errors="surrogateescape")
    text = one_line(name, encoding)
    assert text.encode(encoding)
    assert text.isprintable()
    assert text.startswith(r"caf\udce9 \n \x1b[31m ")
    assert text == one_line(text, encoding)


def test_the_display_prints_names_that_are_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    with Display(steps=1, done=0, active=True) as display:
        display.say(b"not used: caf\xe9.txt".decode(errors="surrogateescape"))
    sys.stdout.flush()
    assert written.getvalue() == b"not used: caf\\udce9.txt\n"


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
