"""Recipes, the rate that follows from them, and the command line over them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.kernels.coding import Coding
from sdnet.train.cli import parse_job, user_errors
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Job
from sdnet.train.recipes import RECIPES, Recipe, demo, imagenet_sdnet18, imagenet_sdnet18_all
from sdnet.train.run_folder import RunFolder
from sdnet.train.schedule import learning_rate


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*options: str) -> Job:
    return parse_job(RECIPES, "imagenet_sdnet18", ["--data", "pictures", *options])


def refusal(*options: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*options)
    return str(caught.value)


def test_imagenet_has_the_official_settings() -> None:
    recipe = imagenet_sdnet18()
    assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, False, 1e-4)
    assert (recipe.epochs, recipe.schedule, recipe.milestones, recipe.gamma) == (100, "step", (30, 60, 90), 0.1)
    assert (recipe.batch, recipe.image_size, recipe.eval_resize) == (512, 224, 256)
    assert (recipe.lam, recipe.coding) == (0.1, Coding(n_steps=2, mu=0.0, nonnegative=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_name_and_is_read_back_from_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_models_differ_only_in_name_and_model() -> None:
    assert imagenet_sdnet18_all() == replace(imagenet_sdnet18(), name="imagenet_sdnet18_all", model="sdnet18_all")


def test_the_batch_divides_among_processes_and_accumulation() -> None:
    recipe = replace(imagenet_sdnet18(), accumulate=4)
    assert recipe.local_batch(8) == 16
    with pytest.raises(UserError, match="batch is 512, which does not divide among 3 processes x 4 accumulated"):
        recipe.local_batch(3)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs is 0; it must be an int of at least 1."),
    ({"epochs": 2.5}, "epochs is 2.5; it must be an int of at least 1."),
    ({"batch": True}, "batch is True; it must be an int of at least 1."),
    ({"shortcut": "no"}, "shortcut is 'no'; it must be True or False."),
    ({"lam": -0.1}, "lam is -0.1; it must be a finite number of at least 0."),
    ({"lam": "small"}, "lam is 'small'; it must be a finite number of at least 0."),
    ({"lr": float("nan")}, "lr is nan; it must be a finite number of at least 0."),
    ({"eval_resize": 100}, "eval_resize is 100, less than image_size, 224."),
    ({"name": 3}, "name is 3; it must be a str."),
    ({"name": "../elsewhere"}, "name is '../elsewhere'; it must be the name of a folder, without a slash."),
    ({"stem": "mnist"}, "stem is 'mnist'; it must be one of imagenet, cifar."),
    ({"impl": "cuda"}, "impl is 'cuda'; it must be one of auto, torch, reference, triton."),
    ({"momentum": 1.0}, "momentum is 1; it must be less than 1."),
    ({"momentum": 1.5}, "momentum is 1.5; it must be at most 1."),
    ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum above 0; momentum is 0."),
    ({"label_smoothing": 2.0}, "label_smoothing is 2.0; it must be at most 1."),
    ({"mixup": -0.1}, "mixup is -0.1; it must be a finite number of at least 0."),
    ({"mixup": 1e300}, "mixup is 1e+300; it must be at most 1000."),
    ({"cutmix": float("inf")}, "cutmix is inf; it must be a finite number of at least 0."),
    ({"gamma": 5.0}, "gamma is 5.0; it must be at most 1."),
    ({"milestones": 30}, "milestones is 30; it must be a list."),
    ({"milestones": (30, -3)}, "milestones is -3; it must be an int of at least 1."),
    ({"milestones": (60, 30)}, "milestones is 60 30; the epochs must rise."),
    ({"warmup_epochs": 101.0}, "warmup_epochs is 101.0, more than epochs, 100."),
    ({"schedule": "cosine", "lr_min": 0.2}, "lr_min is 0.2, more than lr, 0.1."),
    ({"schedule": "onecycle", "lr_min": 0.2}, "lr_min is 0.2, more than lr, 0.1."),
    ({"ema": 1.0}, "ema is 1; it must be less than 1."),
    ({"beta2": 1.0}, "beta2 is 1; it must be less than 1."),
    ({"optimizer": "adam"}, "optimizer is 'adam'; it must be one of sgd, adamw."),
    ({"optimizer": "adamw", "nesterov": True}, "nesterov is for sgd; optimizer is adamw."),
    ({"clip_norm": -1.0}, "clip_norm is -1.0; it must be a finite number of at least 0."),
    ({"random_erasing": 1.5}, "random_erasing is 1.5; it must be at most 1."),
    ({"holdout": -1}, "holdout is -1; it must be an int of at least 0."),
    ({"width": 0}, "width is 0; it must be an int of at least 1."),
    ({"eval_every": 0}, "eval_every is 0; it must be an int of at least 1."),
    ({"compile_mode": "max-autotune"}, "compile_mode max-autotune needs compile."),
    (
        {"early_stop": 3, "eval_every": 2},
        "early_stop is 3; it must be a multiple of eval_every, 2: only evaluated epochs can be better.",
    ),
    ({"seed": 2**63}, f"seed is {2**63}; it must be at most {2**63 - 1}."),
]


@pytest.mark.parametrize(("changes", "sentence"), CHANGES, ids=[str(changes) for changes, _ in CHANGES])
def test_a_setting_that_is_not_allowed_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(imagenet_sdnet18(), **changes)
    assert str(caught.value) == sentence


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model is 'sdnet19'; it must be one of resnet18, .*sdnet34_all\b.*\.$"):
        replace(imagenet_sdnet18(), model="sdnet19")


def test_options_of_the_coding_are_changed_and_checked_like_other_settings() -> None:
    recipe = demo().with_settings({"n_steps": 3, "solver": "ista", "lam": 0.2})
    assert recipe == replace(demo(), lam=0.2, coding=Coding(n_steps=3, solver="ista"))
    with pytest.raises(UserError, match="n_steps is 0"):
        demo().with_settings({"n_steps": 0})


def test_official_rate_drops_at_epochs_30_60_and_90() -> None:
    recipe = imagenet_sdnet18()
    rates = {epoch: learning_rate(recipe, epoch * 10, 10) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)}
    expected = {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 99: 0.0001}
    assert rates == pytest.approx(expected)
    assert learning_rate(recipe, 299, 10) == pytest.approx(0.1)


def test_cosine_rate_rises_linearly_then_agrees_with_torch() -> None:
    recipe = replace(demo(), lr=0.4, epochs=5, warmup_epochs=1.0)
    assert [learning_rate(recipe, step, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    for step in range(4, 20):
        assert learning_rate(recipe, step, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_onecycle_rises_and_falls_in_straight_lines() -> None:
    recipe = replace(demo(), lr=0.4, epochs=5, warmup_epochs=1.0, schedule="onecycle", lr_min=0.08)
    rates = [learning_rate(recipe, step, 4) for step in (0, 3, 4, 8, 12, 16, 20)]
    assert rates == pytest.approx([0.1, 0.4, 0.4, 0.32, 0.24, 0.16, 0.08])


def test_every_field_can_be_overridden() -> None:
    options = ("--epochs", "3", "--lam=0.2", "--no-shortcut", "--milestones", "1", "2", "--n-steps", "4")
    job = parse("--recipe", "demo", *options)
    changes = {"epochs": 3, "lam": 0.2, "shortcut": False, "milestones": (1, 2), "coding": Coding(n_steps=4)}
    assert job.recipe == replace(demo(), **changes)
    assert (job.data, job.run.path, job.resume) == (Path("pictures"), Path("runs/demo"), False)


def test_every_setting_has_a_flag() -> None:
    """Each flag sets its own field: all settings are changed at once, each to another value."""
    wanted: dict[str, Any] = {"name": "mine", "model": "sdnet18_all", "stem": "cifar", "impl": "torch"}
    wanted |= {"solver": "ista", "data_term": "norm", "extras": "rand", "schedule": "step", "milestones": (2, 5)}
    wanted |= {"mixed_precision": "bf16", "input_dtype": "bf16", "momentum": 0.5, "optimizer": "sgd"}
    wanted |= {"init_from": "runs/other", "freeze": ("stem", "linear")}
    wanted |= {"learn_lam": "atom", "compile_mode": "max-autotune", "eval_every": 2, "early_stop": 6}
    for number, (name, value) in enumerate(demo().to_json().items(), 1):
        if isinstance(value, bool):
            wanted[name] = not value
        elif isinstance(value, int):
            wanted.setdefault(name, value + number)
        elif isinstance(value, float):
            wanted.setdefault(name, number / 128)
    options: list[str] = []
    for name, value in wanted.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    assert parse("--recipe", "demo", *options).recipe.to_json() == wanted


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--milestones=4", "--gamma=0.5"], ["milestones", "gamma"]),  # the demo has a cosine schedule
        (["--schedule=step", "--lr-min=0.01"], ["lr_min"]),
        (["--beta2=0.9"], ["beta2"]),
        (["--beta2=0.9", "--optimizer=adamw"], []),
        (["--schedule=step", "--milestones=4", "--gamma=0.5"], []),
        (["--lr-min=0.01"], []),
    ],
)
def test_an_option_without_effect_is_noted(options: list[str], names: list[str]) -> None:
    notes = parse("--recipe=demo", *options).notes
    assert [note.split(" is ")[0] for note in notes] == names
    assert all("which has no effect: " in note for note in notes)


def test_settings_of_the_job_have_their_flags() -> None:
    options = ("--verify=full", "--bad-files=skip", "--val-labels=labels.txt", "--threads=3", "--prefetch=4")
    job = parse("--recipe=demo", "--log-every=5", "--hw-decoder-load=0.5", *options)
    assert job == replace(
        Job(demo(), Path("pictures"), job.run),
        log_every=5,
        verify="full",
        bad_files="skip",
        val_labels=Path("labels.txt"),
        threads=3,
        prefetch=4,
        hw_decoder_load=0.5,
    )
    defaults = parse("--recipe=demo")
    assert defaults == Job(demo(), Path("pictures"), defaults.run)


def test_help_names_recipes_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    text = " ".join(shown.replace("│", " ").split())
    assert all(f" {name} " in text for name in RECIPES)
    assert "--weight-decay FLOAT" in text
    assert "(default: 30 60 90)" in text
    assert all(f" {group} options " in text for group in ("run", "data", "model", "coding", "images", "optimisation"))


@pytest.mark.parametrize(
    "option", ["--lrr=3", "--lr=abc", "--schedule=linear", "--recipe=resnet", "--epochs=2.5", "--bad-files=keep"]
)
def test_an_option_that_cannot_be_parsed_ends_with_status_2(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(option)
    assert caught.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(demo())
    parse("--out", str(tmp_path))  # it ended before its first checkpoint: nothing is lost
    RunFolder(tmp_path).checkpoint_file.touch()
    assert refusal("--out", str(tmp_path)) == (
        f"{tmp_path} holds a run: go on with --resume {tmp_path} or choose another --out."
    )


def test_resume_takes_the_stored_recipe(tmp_path: Path) -> None:
    stored = replace(demo(), lam=0.3, milestones=(4,))
    RunFolder(tmp_path).create(stored)
    job = parse("--resume", str(tmp_path), "--lam", "0.3")
    assert job.recipe == stored
    assert job.resume


def test_resume_with_another_recipe_names_the_fields(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(demo())
    sentence = refusal("--resume", str(tmp_path), "--lam", "0.2", "--batch", "16")
    assert sentence == f"{tmp_path} cannot be resumed with another recipe; lam: 0.2, not 0.1; batch: 16, not 32."
    assert "model: sdnet18_all, not sdnet18" in refusal("--resume", str(tmp_path), "--recipe", "imagenet_sdnet18_all")


def test_resume_without_a_run(tmp_path: Path) -> None:
    assert refusal("--resume", str(tmp_path)) == f"{tmp_path} holds no run to resume: there is no recipe.json."


def test_a_recipe_of_an_older_version_takes_the_defaults_and_says_so(tmp_path: Path) -> None:
    """recipe.json is one flat object; one that was stored with fewer settings still resumes."""
    run = RunFolder(tmp_path)
    run.create(demo())
    values = json.loads(run.recipe_file.read_text())
    assert values["lam"] == 0.1
    assert values["n_steps"] == 2
    del values["label_smoothing"], values["solver"]
    run.recipe_file.write_text(json.dumps(values))
    job = parse("--resume", str(tmp_path))
    assert job.recipe == demo()
    assert job.notes == (
        f"{run.recipe_file} is from an older version of sdnet; the defaults are used for label_smoothing 0.0, "
        "solver fista.",
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is damaged: Expecting value: line 1 column 1 (char 0)."),
        ('{"lam": 0.', "is damaged: Expecting"),
        ("[" * 100_000, "is damaged: maximum recursion depth exceeded"),
        ("[1, 2]", "is damaged: it should hold a JSON object."),
        (b"\xff\xfe\x00", "is damaged: it is not UTF-8 text."),
        ('{"gone": 1}', "cannot be used: this version of sdnet has no setting gone."),
        ('{"lam": "small"}', "cannot be used: lam is 'small'; it must be a finite number of at least 0."),
        ('{"epochs": 1e3}', "cannot be used: epochs is 1000.0; it must be an int of at least 1."),
        ('{"milestones": "30"}', "cannot be used: milestones is '30'; it must be a list."),
        ('{"n_steps": 0}', "cannot be used: n_steps is 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_or_foreign_recipe_is_named(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    file = RunFolder(tmp_path).recipe_file
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused = refusal("--resume", str(tmp_path))
    assert str(file) in refused
    assert sentence in refused


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("metrics.jsonl", "garbage\n", "Line 1 of {file} is damaged; remove this line to go on."),
        ("metrics.jsonl", '{"epoch": 1}\n', "Line 1 of {file} is damaged; remove this line to go on."),
        ("environment.json", "", "{file} is damaged: Expecting value: line 1 column 1 (char 0)."),
        ("environment.json", "{}", "{file} is damaged: it should hold a JSON list."),
    ],
)
def test_another_damaged_file_of_the_run_is_named(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    RunFolder(tmp_path).create(demo())
    (tmp_path / name).write_text(text)
    assert refusal("--resume", str(tmp_path)) == sentence.format(file=tmp_path / name)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--log-every=0", "log_every is 0; it must be an int of at least 1."),
        ("--threads=-1", "threads is -1; it must be an int of at least 0."),
        ("--hw-decoder-load=2", "hw_decoder_load is 2.0; it must be at most 1."),
    ],
)
def test_a_setting_of_the_job_out_of_range_is_refused(option: str, sentence: str) -> None:
    assert refusal(option) == sentence


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--data", "", "--out", "run"], "--data"),
        (["--data", "pictures", "--out="], "--out"),
        (["--data", "pictures", "--resume", ""], "--resume"),
    ],
)
def test_an_empty_path_is_not_the_working_folder(words: list[str], option: str) -> None:
    with pytest.raises(UserError, match=f"^{option} is empty; it must be a path, such as [.] for the working folder.$"):
        parse_job(RECIPES, "imagenet_sdnet18", words)


def test_out_and_resume_exclude_each_other(tmp_path: Path) -> None:
    sentence = refusal("--out", str(tmp_path), "--resume", str(tmp_path))
    assert sentence == "--out and --resume exclude each other: a resumed run stays in its folder."


def test_a_run_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "run"):
        assert refusal("--out", str(out)) == f"The run folder {out} cannot be made: {file} is not a folder."
    assert refusal("--out", "/proc/run").startswith("The run folder /proc/run cannot be written: ")
    not_utf8 = (b"run\xe9").decode(errors="surrogateescape")
    assert refusal("--out", not_utf8) == (
        "The run folder run\\udce9 has a name that is not UTF-8, which TensorBoard needs."
    )
    parse("--out", str(tmp_path / "deep" / "run"))
    assert list(tmp_path.iterdir()) == [file]  # the check leaves nothing behind


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("lr is -1."), "error: lr is -1."),
        (DataError("The picture a.jpg broke."), "error: The picture a.jpg broke."),
        (KeyboardInterrupt(), 130),
        (OSError(36, "File name too long", "x\ny"), "error: x\\ny: File name too long."),
        (OSError(28, "No space left on device"), "error: No space left on device."),
    ],
    ids=["wrong input", "broken picture", "ctrl-c", "file name", "full disk"],
)
def test_a_program_ends_with_a_sentence_and_a_status(
    error: BaseException, code: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.code == code
    monkeypatch.setenv("RANK", "1")  # the first process says what all have met; a broken picture only one
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.code == (1 if type(error) is UserError else code)
