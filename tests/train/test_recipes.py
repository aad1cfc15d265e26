"""Recipes, the rate that follows from them, and the command line over them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdnet.train.cli import parse_job
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.recipes import RECIPES, Recipe, demo, imagenet_sdnet18, imagenet_sdnet18_all
from sdnet.train.run_folder import RunFolder
from sdnet.train.schedule import learning_rate


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(*options: str) -> Job:
    return parse_job(RECIPES, "imagenet_sdnet18", ["--data", "pictures", *options])


def refusal(*options: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*options)
    return str(caught.value)


def test_imagenet_has_the_official_settings():
    recipe = imagenet_sdnet18()
    assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, False, 1e-4)
    assert (recipe.epochs, recipe.schedule, recipe.milestones, recipe.gamma) == (100, "step", (30, 60, 90), 0.1)
    assert (recipe.batch, recipe.image_size, recipe.eval_resize) == (512, 224, 256)
    assert (recipe.lam, recipe.mu, recipe.n_steps, recipe.nonnegative) == (0.1, 0.0, 2, True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_its_name_and_survives_json(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_models_differ_only_in_name_and_model():
    assert imagenet_sdnet18_all() == replace(imagenet_sdnet18(), name="imagenet_sdnet18_all", model="sdnet18_all")


def test_the_batch_divides_among_processes_and_accumulation():
    recipe = replace(imagenet_sdnet18(), accumulate=4)
    assert recipe.local_batch(8) == 16
    with pytest.raises(UserError, match="batch is 512, which does not divide among 3 processes x 4 accumulated"):
        recipe.local_batch(3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a finite number of at least 1."),
        ({"lam": -0.1}, "lam is -0.1; it must be a finite number of at least 0."),
        ({"mu": -1.0}, "mu is -1.0; it must be a finite number of at least 0."),
        ({"n_steps": 0}, "n_steps is 0; it must be a finite number of at least 1."),
        ({"lr": float("nan")}, "lr is nan; it must be a finite number of at least 0."),
        ({"eval_resize": 100}, "eval_resize is 100, less than image_size, 224."),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, sentence):
    with pytest.raises(UserError) as caught:
        replace(imagenet_sdnet18(), **changes)
    assert str(caught.value) == sentence


def test_official_rate_drops_at_epochs_30_60_and_90():
    recipe = imagenet_sdnet18()
    rates = {epoch: learning_rate(recipe, epoch * 10, 10) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)}
    expected = {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 99: 0.0001}
    assert rates == pytest.approx(expected)
    assert learning_rate(recipe, 299, 10) == pytest.approx(0.1)


def test_cosine_rate_rises_linearly_then_agrees_with_torch():
    recipe = replace(demo(), lr=0.4, epochs=5, warmup_epochs=1.0)
    assert [learning_rate(recipe, step, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    for step in range(4, 20):
        assert learning_rate(recipe, step, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_every_field_can_be_overridden():
    job = parse("--recipe", "demo", "--epochs", "3", "--lam", "0.2", "--no-shortcut", "--milestones", "1", "2")
    assert job.recipe == replace(demo(), epochs=3, lam=0.2, shortcut=False, milestones=(1, 2))
    assert (job.data, job.run.path, job.resume) == (Path("pictures"), Path("runs/demo"), False)


def test_help_names_recipes_and_settings(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in RECIPES)
    assert "--weight-decay FLOAT" in text
    assert "[30 60 90]" in text


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    RunFolder(tmp_path).create(demo())
    parse("--out", str(tmp_path))  # it ended before its first checkpoint: nothing is lost
    RunFolder(tmp_path).checkpoint_file.touch()
    assert refusal("--out", str(tmp_path)) == (
        f"{tmp_path} holds a run: go on with --resume {tmp_path} or choose another --out."
    )


def test_resume_takes_the_stored_recipe(tmp_path):
    stored = replace(demo(), lam=0.3, milestones=(4,))
    RunFolder(tmp_path).create(stored)
    job = parse("--resume", str(tmp_path), "--lam", "0.3")
    assert job.recipe == stored
    assert job.resume


def test_resume_with_another_recipe_names_the_fields(tmp_path):
    RunFolder(tmp_path).create(demo())
    sentence = refusal("--resume", str(tmp_path), "--lam", "0.2", "--batch", "16")
    assert sentence == f"{tmp_path} cannot be resumed with another recipe; lam: 0.2, not 0.1; batch: 16, not 32."
    assert "model: sdnet18_all, not sdnet18" in refusal("--resume", str(tmp_path), "--recipe", "imagenet_sdnet18_all")


def test_resume_without_a_run(tmp_path):
    assert refusal("--resume", str(tmp_path)) == f"{tmp_path} holds no run to resume: there is no recipe.json."


def test_a_recipe_of_another_version_is_refused():
    values = demo().to_json() | {"gone": 1}
    del values["lam"]
    with pytest.raises(UserError, match="stored by another version of sdnet: gone, lam came or went"):
        Recipe.from_json(values)


def test_log_every_must_be_positive():
    assert refusal("--log-every", "0") == "log_every is 0; it must be at least 1."
