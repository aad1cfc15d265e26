"""`python -m sdnet.bench look`: the files that it writes for a checkpoint and an image, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sdnet
from sdnet.bench import look
from sdnet.bench.__main__ import main
from sdnet.weights import save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network without shortcuts whose batch norms know its statistics."""
    torch.manual_seed(0)
    model = sdnet.create_model("sdnet18_all", 4, stem="cifar", width=4, image_size=16, shortcut=False, lam=0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(16, 3, 16, 16))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).resize((28, 20), Image.Resampling.BICUBIC).save(path)
    return path


def test_it_draws_everything_and_writes_the_numbers_also_into_a_document(
    checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "look"
    document = tmp_path / "page.md"
    document.write_text("# Before\n\n<!-- look -->\nold\n<!-- /look -->\n\nAfter.\n")
    arguments = ["--checkpoint", str(checkpoint), "--image", str(picture), "--out", str(out), "--n-steps", "10"]
    arguments += ["--document", str(document), "--note", "Noise."]
    assert main(["look", *arguments, "--optimum-steps", "40"]) == 0
    names = {"atoms.png", "codes.png", "inversions.png", "objective.png", "dictionary.png", "look.json"}
    assert {path.name for path in out.iterdir()} == names
    for path in out.glob("*.png"):
        with Image.open(path) as drawn:
            assert drawn.width == 7 * 300, "print resolution"
    facts = json.loads((out / "look.json").read_text())
    assert (facts["images"], len(facts["layers"])) == (1, 17)
    stem = facts["layers"]["stem.conv"]
    assert stem["kind"] == "approximate"
    assert 0 < stem["error"] < 1
    assert stem["psnr_matched"] > stem["psnr"] > 5
    assert 0 < stem["coherence_without_shifts"] <= stem["coherence"] <= 1
    assert stem["gap_of_the_forward"] > 0
    printed = capsys.readouterr().out
    assert printed.count("\n| `st") == 17
    assert "| `stem.conv` | approximate |" in printed

    text = document.read_text()
    assert text.startswith(
        "# Before\n\n<!-- look -->\nThe network is `sdnet18_all` without shortcuts of width 4: "
        "0.04 million parameters.\nNoise.\n\n| layer | inversion |"
    )
    assert text.count("\n| `st") == 17
    assert text.endswith(" dB.\n<!-- /look -->\n\nAfter.\n")
    for name in ("inversions.png", "objective.png"):
        assert f"](figures/look/{name})" in text
        assert (tmp_path / "figures" / "look" / name).read_bytes() == (out / name).read_bytes()


def test_numbers_of_a_network_without_codes_are_json(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a layer whose codes are all zero the input is zero too, and its reconstruction is exact."""
    model = sdnet.create_model("sdnet18_all", 2, stem="cifar", width=1, image_size=8, shortcut=False, lam=50)
    save_model(tmp_path / "dead.safetensors", model)
    monkeypatch.setattr(look, "save_figure", lambda *_: None)
    arguments = ["--checkpoint", str(tmp_path / "dead.safetensors"), "--image", str(picture), "--out", str(tmp_path)]
    assert main(["look", *arguments, "--n-steps", "1", "--optimum-steps", "1"]) == 0
    text = (tmp_path / "look.json").read_text()
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert facts["layers"]["stem.conv"]["layer_psnr"] > 0
    assert facts["layers"]["stages.0.0.conv1"]["layer_psnr"] is None


def test_pixels_of_16_bits_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow would cut them off at 255."""
    file = tmp_path / "deep.png"
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(file)
    assert main(["look", "--checkpoint", str(checkpoint), "--image", str(file), "--out", str(tmp_path / "look")]) == 2
    assert capsys.readouterr().err.startswith(f"--image is {file}, which has 16-bit or 32-bit gray values")


def test_pixels_are_normalised_as_in_the_training_not_by_the_stem(checkpoint: Path) -> None:
    """train/imagenet.py trains networks with either stem, and its mean of red is 0.485."""
    model = sdnet.load_model(checkpoint)
    for header, red in (({"program": "imagenet"}, 0.485), ({"program": "cifar"}, 0.4914), ({}, 0.4914)):
        assert look._norms(model, header)[0].flatten()[0] == pytest.approx(red)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"--checkpoint": "nowhere"}, "There is no weights file at 'nowhere'."),
        ({"--image": "pyproject.toml"}, "--image is pyproject.toml, which is not a picture."),
        ({"--image": "none.png"}, "--image is none.png, which cannot be read: No such file or directory."),
        ({"--note": "A note."}, "--note is for --document, which is not given."),
        ({"--document": "README.md"}, "--document is README.md; it must have one pair of marks <!-- look -->"),
        ({"--layer": "stem"}, "--layer is stem; it must be one of stem.conv, stages.0.0.conv1"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_sentence_and_write_nothing(
    changed: dict[str, str],
    sentence: str,
    checkpoint: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"--checkpoint": str(checkpoint), "--image": str(picture), "--out": str(tmp_path / "look"), **changed}
    assert main(["look", *(word for pair in options.items() for word in pair)]) == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert not (tmp_path / "look").exists()


@pytest.mark.parametrize(
    "command", [["look", "--checkpoint", "none", "--out", "none"], ["report"]], ids=["look", "report"]
)
def test_a_document_must_be_text(
    command: list[str], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ["--results", str(tmp_path)] if command == ["report"] else []
    assert main([*command, *results, "--document", str(picture)]) == 2
    assert capsys.readouterr().err == f"--document is {picture}, which is not UTF-8 text.\n"
