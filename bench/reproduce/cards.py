"""Cards of results: one JSON file for each trained network, with everything that its numbers depend on."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

from sdnet.bench.robustness.pictures import PIXEL_MEAN, PIXEL_STD
from sdnet.files import write_text
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError
from sdnet.weights import save_model

if TYPE_CHECKING:
    from sdnet.bench.reproduce.evaluation import Evaluation

CARDS = "cards"
WEIGHTS = "weights"
"""The folders of the cards and of the weights in that of the ledger."""

SCHEMA = 1
Card = Mapping[str, Any]

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 % by degrees of freedom."""


def write_card(folder: Path, evaluation: "Evaluation", device: torch.device, note: str) -> Path:
    """Write the card of an evaluation, with what is measured until now, and return its file."""
    cell, scale = evaluation.cell, evaluation.scale
    trained = [
        {name: start.get(name) for name in ("device", "threads", "cores", "packages", "commit", "dirty", "date")}
        for start in evaluation.run.environments()
    ]
    card = {
        "schema": SCHEMA,
        "scale": scale.name,
        "network": cell.kind,
        "seed": cell.seed,
        "note": note,
        "recipe": evaluation.recipe.to_json(),
        "training": evaluation.training(),
        "trained": trained,
        "evaluated": describe_environment(device),
        "test_pictures": len(evaluation.every),
        "right": evaluation.accuracy.values["right"],
        "table": {"conditions": evaluation.table.conditions, "values": evaluation.table.values},
        "attacks": {
            row: {"conditions": results.conditions, "values": results.values}
            for row, results in evaluation.attacks.items()
        },
    }
    path = folder / f"{scale.name}_{cell.name}.json"
    write_text(path, json.dumps(card, indent=1, allow_nan=False) + "\n")
    return path


def write_weights(folder: Path, evaluation: "Evaluation", note: str) -> Path:
    """Write the weights of an evaluation as <scale>_<network>/model.safetensors, and return the file.

    The header says the network, the classes, how pixels are normalised, the accuracy, the seed and `note`.
    """
    cell, scale, sets = evaluation.cell, evaluation.scale, evaluation.sets
    facts = {
        "test_top1": f"{evaluation.training()['last']:.2f}",
        "mean": json.dumps(PIXEL_MEAN),
        "std": json.dumps(PIXEL_STD),
        "scale": scale.name,
        "seed": str(cell.seed),
        "note": note,
    }
    file = folder / f"{scale.name}_{cell.kind}" / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_model(file, evaluation.model, sets.classes, facts)
    return file


def read_cards(folder: Path) -> list[Card]:
    """Return the cards of a folder, sorted by their files; none if there is no such folder.

    Raises:
        UserError: a file is no card of this version.
    """
    cards = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            if card["schema"] != SCHEMA:
                raise ValueError(f"schema {card['schema']}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no card that this version reads: {error}.") from error
        cards.append(card)
    return cards


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean of paired differences and half the width of its 95 % interval, by Student's t.

    Args:
        differences: one for each seed, 2 to 10.

    Raises:
        ValueError: there are fewer than 2 or more than 10.
    """
    count = len(differences)
    if count - 1 not in T_975:
        raise ValueError(f"differences holds {count} values; an interval needs 2 to 10.")
    return mean(differences), T_975[count - 1] * stdev(differences) / math.sqrt(count)
