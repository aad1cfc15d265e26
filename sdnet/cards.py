"""The model card of a network: its text, and the metadata that the Hugging Face Hub reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdnet.configuration import configuration
from sdnet.models import SDNet

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

SCORES = {
    "val_top1": ("top-1", "validation"),
    "val_top5": ("top-5", "validation"),
    "test_top1": ("top-1", "test"),
}
"""Entries of the header of a weights file that are accuracies in %: the name of the score, and the split."""

PAPER = "https://arxiv.org/abs/2210.12945"
CITATION = r"""@inproceedings{dai2022revisiting,
  title     = {Revisiting Sparse Convolutional Model for Visual Recognition},
  author    = {Dai, Xili and Li, Mingyang and Zhai, Pengyuan and Tong, Shengbang and Gao, Xingjian and
               Huang, Shao-Lun and Zhu, Zhihui and You, Chong and Ma, Yi},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022}
}"""


def scores_of(facts: Mapping[str, str]) -> dict[str, float]:
    """Return the accuracies in the header of a weights file."""
    scores = {}
    for key in SCORES.keys() & facts.keys():
        try:
            value = float(facts[key])
        except ValueError:
            continue
        if math.isfinite(value):
            scores[key] = value
    return scores


def read_json(file: Path) -> Any:
    """Return the content of a JSON file of a run, None if there is no such file.

    Raises:
        ValueError: it cannot be read.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' cannot be read as JSON: {error}.") from error


def recipe_of(run: Path) -> dict[str, Any]:
    """Return the recipe of a run folder, empty if it has none.

    Raises:
        ValueError: its file cannot be read.
    """
    recipe = read_json(run / "recipe.json") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"'{run / 'recipe.json'}' is malformed; it must hold a JSON object.")
    return recipe


def starts_of(run: Path) -> list[dict[str, Any]]:
    """Return what a run folder says about each start of the run, nothing if it does not.

    Raises:
        ValueError: its file cannot be read.
    """
    starts = read_json(run / "environment.json") or []
    whole = isinstance(starts, list) and all(
        isinstance(start, dict)
        and isinstance(start.get("packages", {}), dict)
        and isinstance(start.get("command", []), list)
        for start in starts
    )
    if not whole:
        raise ValueError(f"'{run / 'environment.json'}' is malformed; it must hold a list of JSON objects.")
    return starts


def dataset_of(run: Path | None, dataset: str | None, num_classes: int) -> str:
    """Return the name of the data that scores belong to."""
    recipe = recipe_of(run) if run else {}
    return dataset or f"data of {num_classes} classes, recipe {recipe.get('name', 'unknown')}"


def metadata(
    model: SDNet, *, run: Path | None, dataset: str | None, scores: Mapping[str, float], license: str, **_: Any
) -> "ModelCardData":
    """Return the metadata of a model card; each score is an `EvalResult`, which the hub shows."""
    from huggingface_hub import EvalResult, ModelCardData

    name = dataset_of(run, dataset, model.num_classes)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-classification",
            dataset_name=name,
            dataset_split=SCORES[key][1],
            metric_type="accuracy",
            metric_name=f"{SCORES[key][0]} accuracy in %",
            metric_value=scores[key],
        )
        for key in SCORES
        if key in scores
    ]
    return ModelCardData(
        library_name="sdnet",
        license=license,
        pipeline_tag="image-classification" if model.num_classes else "image-feature-extraction",
        tags=["sparse-coding", "dictionary-learning", "model_hub_mixin"],
        model_name=model.config["name"] if results else None,
        eval_results=results or None,
    )


def card_text(
    model: SDNet,
    *,
    run: Path | None,
    dataset: str | None,
    note: str | None,
    scores: Mapping[str, float],
    **_: Any,
) -> str:
    """Return the text of a model card: options, scores, how it was trained, and what to cite."""
    config = configuration(model)
    name = config["name"]
    lines = [f"# {name}", "", f"A network with convolutional sparse-coding layers ([paper]({PAPER})).", ""]
    lines += ["```python", "import sdnet", "", 'model = sdnet.SDNet.from_pretrained("<repository or folder>")', "```"]
    lines += ["", "## Options", "", "| option | value |", "|:--|:--|"]
    lines += [f"| `{key}` | {json.dumps(value)} |" for key, value in config.items()]
    if scores:
        lines += ["", "## Accuracy", "", "| data | split | accuracy | % |", "|:--|:--|:--|--:|"]
        data = dataset_of(run, dataset, model.num_classes)
        lines += [
            f"| {data} | {SCORES[key][1]} | {SCORES[key][0]} | {scores[key]:.2f} |" for key in SCORES if key in scores
        ]
    jpeg = jpeg_note(run) if run else None
    if jpeg or note:
        lines += ["", *filter(None, (jpeg, note))]
    lines += training_lines(run) if run else []
    lines += ["", "## Citation", "", "```bibtex", CITATION, "```", ""]
    return "\n".join(lines)


def training_lines(run: Path) -> list[str]:
    """Return the section on the training: device, versions, commit and recipe of a run folder.

    Command lines are left out, because they hold paths of the machine.
    """
    lines = ["", "## Training", ""]
    for start in starts_of(run):
        packages = ", ".join(f"{name} {number}" for name, number in start.get("packages", {}).items() if number)
        commit = f"{start.get('commit') or 'unknown'}{', with changes' if start.get('dirty') else ''}"
        device = start.get("device", "an unknown device")
        lines += [
            f"- {start.get('date', 'unknown date')}, {start.get('processes', 1)} process(es) on {device} "
            f"({'GPU' if start.get('device_type') == 'cuda' else 'CPU'}); commit {commit}; {packages}"
        ]
    return [*lines, "", "```json", json.dumps(recipe_of(run), indent=1), "```"]


def jpeg_note(run: Path) -> str | None:
    """Return a sentence if the run read CIFAR, which is published uncompressed, from JPEG files."""
    for start in starts_of(run):
        command = [str(word) for word in start.get("command", [])]
        if "--data" not in command[:-1] or not any("cifar" in word for word in command[:1]):
            continue
        folder = Path(command[command.index("--data") + 1])
        classes = [place for place in (folder / "train").glob("*") if place.is_dir()][:1]
        if any(file.suffix.lower() in (".jpg", ".jpeg") for place in classes for file in place.iterdir()):
            return (
                "The images were read from JPEG files. CIFAR is published uncompressed, so these accuracies are not "
                "comparable with those on the published files."
            )
    return None
