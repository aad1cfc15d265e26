"""The display, the log file, the trackers, and the host syncs of training."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sdnet
from sdnet.train.data.dali import open_pictures
from sdnet.train.data.watch import listening, tell
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.progress import Display, folded
from sdnet.train.recipes import demo
from sdnet.train.reports import layer_scalars
from sdnet.train.run_folder import RunFolder
from sdnet.train.trackers import check_trackers, run_id
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]

TIME = r"\d\d:\d\d:\d\d"
SMALL = replace(demo(), width=4, epochs=2, batch=4, image_size=32, eval_resize=36, lr=0.01)
# Everything that a step can do at once; 17 - 4 images: 3 steps an epoch.
FULL = replace(SMALL, model="sdnet18_all", ema=0.9, clip_norm=1.0, random_erasing=0.5, mixup=0.2, cutmix=1.0, holdout=4)
READS_ON_A_CPU_ONLY = {"arguments.py: check_values", "state.py: checked_lambda"}
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture(scope="module")
def data(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [9, 8], [3, 2])


def job(data: Path, run: Path, recipe: Any = SMALL, **settings: Any) -> Job:
    return Job(recipe, data, RunFolder(run), **{"threads": 1, "log_every": 2, **settings})


class HostSyncs:
    """Counts the reads of tensors by the host, within steps and within reports.

    A report and the end of an epoch are what `Trainer._report` and `Trainer._finish_epoch` do; a step is all else.
    """

    def __init__(self, trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
        self.where = "step"
        self.calls = {"_report": 0, "_finish_epoch": 0}
        self.reads: dict[str, list[str]] = {"step": [], "_report": [], "_finish_epoch": []}
        for name in READS:
            patch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))
        for name in ("_report", "_finish_epoch"):
            patch.setattr(trainer, name, self.within(name, getattr(trainer, name)))

    def counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code
            self.reads[self.where].append(f"{Path(caller.co_filename).name}: {caller.co_name}")
            return method(*arguments, **options)

        return read

    def within(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.where = name
            self.calls[name] += 1
            try:
                return method(*arguments)
            finally:
                self.where = "step"

        return call


@pytest.fixture(scope="module")
def full(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HostSyncs]:
    run = tmp_path_factory.mktemp("full") / "run"
    with pytest.MonkeyPatch.context() as patch:
        trainer = Trainer(job(data, run, FULL, checkpoint_minutes=0.0), open_pictures)
        syncs = HostSyncs(trainer, patch)
        while not trainer._finished():
            trainer._train_epoch()
            trainer._finish_epoch()
    trainer.lock.release()
    AcceleratorState._reset_state(reset_partial_state=True)
    return run, syncs


def test_a_step_waits_for_nothing_and_a_report_for_little(full: tuple[Path, HostSyncs]) -> None:
    _, syncs = full
    assert syncs.calls == {"_report": 3, "_finish_epoch": 2}
    assert set(syncs.reads["step"]) <= READS_ON_A_CPU_ONLY
    report = [caller for caller in syncs.reads["_report"] if caller not in READS_ON_A_CPU_ONLY]
    assert 0 < len(report) <= 4 * 3  # losses, first bad step, margins, and all that the layers tell


@pytest.fixture(scope="module")
def shown(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run, and what it printed."""
    run = tmp_path_factory.mktemp("shown") / "run"
    trainer = Trainer(job(data, run, replace(SMALL, ema=0.9)), open_pictures)
    trainer.display.console = Console(file=StringIO(), highlight=False, soft_wrap=True)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    file: Any = trainer.display.console.file
    return run, file.getvalue().splitlines()


def test_a_run_says_what_it_is_and_every_line_has_the_time_of_day(shown: tuple[Path, list[str]]) -> None:
    run, lines = shown
    assert all(re.search(rf"  {TIME}$", line) for line in lines)
    told = [re.sub(rf"  {TIME}$", "", line) for line in lines]
    assert told[0] == (
        "17 training images in 2 classes  4 steps of 4 an epoch, 1 image left out of each  5 validation images"
    )
    parameters = sum(value.numel() for value in sdnet.create_model("sdnet18", 2, width=4).parameters()) / 1e6
    assert told[1] == f"sdnet18  width 4  {parameters:.2f} million parameters  1 CSC layer, lambda 0.1"
    assert told[2].endswith("  1 process  fp32  contiguous")
    assert told[3].startswith("kernels of 1 CSC layer: ")
    assert [line.split("  ")[0] for line in told[4:]] == [
        *["step 2/8", "step 4/8", "epoch 1/2", "step 6/8", "step 8/8", "epoch 2/2"],
        f"Done: best top-1 {RunFolder(run).metrics()[0]['val_top1']:.2f}% (epoch 1), last "
        f"{RunFolder(run).metrics()[1]['val_top1']:.2f}% (epoch 2), last EMA "
        f"{RunFolder(run).metrics()[1]['ema_val_top1']:.2f}%; the run folder is {run}",
    ]


def test_the_log_file_holds_the_same_lines_with_the_date(shown: tuple[Path, list[str]]) -> None:
    run, lines = shown
    dated = (run / "train.log").read_text().splitlines()
    assert [re.sub(rf"  \d\d\d\d-\d\d-\d\d ({TIME})$", r"  \1", line) for line in dated] == lines


def test_reports_hold_what_the_layers_and_the_machine_do(shown: tuple[Path, list[str]]) -> None:
    events = EventAccumulator(str(shown[0] / "tensorboard")).Reload()
    names = ["loss", "lr", "images_per_second", "data_wait", "memory_gb", "gradient_norm", "step_margin"]
    names += ["sparsity/stem.conv", "relative_residual/stem.conv"]
    for name in names:
        values = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in values] == [2, 4, 6, 8], name
        assert all(value >= 0 for _, value in values), name
    assert all(0 < event.value < 1 for event in events.Scalars("train/sparsity/stem.conv"))
    assert all(event.value > 0 for event in events.Scalars("train/gradient_norm"))
    assert {"epoch/train_loss", "epoch/val_top1", "epoch/ema_val_top1"} <= set(events.Tags()["scalars"])


def test_the_layers_are_described_without_changing_the_model() -> None:
    torch.manual_seed(0)
    model = sdnet.create_model("sdnet18_all", 2, stem="cifar", image_size=8, width=4)
    model.stages[0].eval()
    images, norm = torch.randn(20, 3, 8, 8), torch.tensor(2.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    scalars = layer_scalars(model, images, norm)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected = sdnet.diagnose(model.eval(), images[:16])
    assert scalars == pytest.approx(
        {"gradient_norm": 2.5}
        | {f"sparsity/{name}": float(layer.sparsity.mean()) for name, layer in expected.items()}
        | {f"relative_residual/{name}": float(layer.relative_residual.mean()) for name, layer in expected.items()}
    )


def test_a_report_is_folded_between_its_parts() -> None:
    text = "epoch 1  loss 2.345  lr 0.1  79 images/s  waiting for data 0%  0.8 GB"
    for width in (20, 60, 100):
        lines = folded(text, width).split("\n")
        assert all(len(line) <= width for line in lines)
        assert "  ".join(lines) == text
    assert folded(text, 100) == text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_terminal_of_any_width_shows_the_whole_report_and_nothing_stays(width: int) -> None:
    display = Display(steps=200, done=0, active=True, clock=True)
    display.console = Console(file=StringIO(), width=width, force_terminal=True, highlight=False, soft_wrap=True)
    file: Any = display.console.file
    with display:
        display.show(100, "epoch 12  loss 2.345  lr 0.0001  12345 images/s  waiting for data 100%  139.0 GB")
        assert display._live is not None
        display._live.refresh()
        drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
        display.say("Done: all of it")
    assert all(len(line) <= width for line in drawn)
    together = "  ".join(line.strip() for line in drawn)
    assert "139.0 GB" in together
    assert "100/200" in together
    tail = file.getvalue()[file.getvalue().index("Done: all of it") :]
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tail).replace("\r", "").split("\n")[-1].strip() == ""
    assert "\x1b[2K" in tail  # the bar below the last line is erased


def test_a_long_task_is_told_now_and_then_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display(clock=True)
    display.console = Console(file=StringIO(), soft_wrap=True)
    clock = iter([100.0, 100.0, 105.0, 111.0, 111.0, 125.0, 125.0])
    monkeypatch.setattr("sdnet.train.progress.time.perf_counter", lambda: next(clock))
    with listening(display.tell):
        for done in (1, 2, 3, 4):
            tell("checking images", done * 1000, 4000)
    tell("checking images", 1, 1)  # nobody listens
    file: Any = display.console.file
    lines = [line.rsplit("  ", 1)[0] for line in file.getvalue().splitlines()]
    assert lines == ["checking images  3000/4000", "checking images  4000/4000"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("none", "tensorboard"), "tracker is none tensorboard; none stands alone."),
        (("tensorboard", "tensorboard"), "tracker is tensorboard tensorboard; each can be named once."),
        (("comet_ml",), "tracker is comet_ml, whose package is not installed: pip install comet_ml."),
    ],
)
def test_trackers_that_cannot_be_used_are_refused(names: tuple[Any, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_trackers(job(tmp_path, tmp_path / "run", tracker=names))
    assert str(caught.value) == sentence


def test_a_run_without_a_tracker_has_no_events(data: Path, tmp_path: Path) -> None:
    Trainer(job(data, tmp_path / "run", replace(SMALL, epochs=1), tracker=("none",)), open_pictures).train()
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(RunFolder(tmp_path / "run").metrics()) == 1


@pytest.mark.slow
def test_wandb_records_a_run_offline(data: Path, tmp_path: Path) -> None:
    """In a process of its own, because wandb changes its environment."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    program = Path(__file__).parents[2] / "train" / "imagenet.py"
    command = [sys.executable, program, "--data", data, "--out", run, "--tracker", "wandb", "tensorboard"]
    command += ["--recipe=demo", "--width=4", "--epochs=1", "--batch=4", "--image-size=32", "--eval-resize=36"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run([*command, "--log-every=2"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = job(data, run)
    (stored,) = (run / "wandb").glob(f"offline-run-*/run-{run_id(first)}.wandb")
    content = stored.read_bytes()
    for name in (b"train/gradient_norm", b"epoch/val_top1", b"weight_decay"):
        assert name in content
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
