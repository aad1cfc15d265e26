"""The evaluation of one trained network: its accuracy, the table of rules, and attacks."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sdnet.bench.reproduce.scales import Cell, Scale
from sdnet.bench.robustness.attack_runs import AttackRuns
from sdnet.bench.robustness.checkpoints import load_run
from sdnet.bench.robustness.measure import correct, digest_of, pixel_model
from sdnet.bench.robustness.pictures import CLEAN, Sets, open_sets
from sdnet.bench.robustness.rule_table import RuleTable
from sdnet.bench.robustness.stored import StoredResults, pack
from sdnet.robustness.model import RobustModel
from sdnet.robustness.rules import Rule
from sdnet.train.outcome import outcome
from sdnet.train.run_folder import RunFolder

WEIGHTS = "last"
"""The weights that are evaluated: choosing an epoch would need a reason."""


class Evaluation:
    """Evaluate the last weights of one run; every value is stored as it comes.

    Args:
        cell: the network.
        scale: how much is evaluated.
        data: the pictures it was trained on.
        run_folder: its run folder.
        device: the device of the evaluation.
    """

    def __init__(self, cell: Cell, scale: Scale, data: Path, run_folder: Path, device: torch.device) -> None:
        self.cell, self.scale, self.run = cell, scale, RunFolder(run_folder)
        self.sets: Sets = open_sets(data, scale.holdout, scale.table.test, scale.table.held, device)
        every = open_sets(data, scale.holdout, 0, 1, device)
        self.every = every.test
        self.model, self.recipe = load_run(run_folder, WEIGHTS, len(every.classes), device)
        self.folder = run_folder / "evaluation"
        weights = {"weights": digest_of(run_folder / f"{WEIGHTS}.safetensors")}
        self.accuracy = StoredResults(self.folder / "accuracy.json", weights | {"pictures": every.digest})
        pictures = weights | {"pictures": self.sets.digest}
        self.table = StoredResults(self.folder / "rules.json", pictures | asdict(scale.table))
        self.attacks = {
            row: StoredResults(self.folder / f"attacks_{row}.json", pictures | asdict(scale.attacks))
            for row in (["training", "b"] if cell.model != "resnet18" else ["training"])
            if cell.attacks
        }
        self.accuracy.get("right", self.right)

    def right(self) -> str:
        """Return which of all test pictures are classified rightly, packed."""
        pixels = self.every.corrupted(CLEAN)
        return pack(correct(pixel_model(self.model), pixels, self.every.labels).tolist())

    def measure(self) -> Iterator[None]:
        """Measure what is not stored yet, and stop after each part: the table, PGD, and AutoAttack."""
        table = RuleTable(self.model, self.sets, self.scale.table, self.table, self.say)
        if self.cell.table:
            table.measure()
            yield
        attacks = [self.attack(row, table.rule_b() if row == "b" else None) for row in self.attacks]
        for part in (AttackRuns.measure_pgd, AttackRuns.measure_autoattack):
            for attack in attacks:
                part(attack)
                yield

    def attack(self, row: str, rule: Rule | None) -> AttackRuns:
        """Return the attacks on the network with one rule."""
        pixels, labels = self.sets.test.corrupted(CLEAN), self.sets.test.labels
        robust = pixel_model(RobustModel(self.model, rule))
        return AttackRuns(
            robust, pixels, labels, self.scale.attacks, self.attacks[row], lambda line: self.say(f"{row}: {line}")
        )

    def say(self, line: str) -> None:
        """Print a line of progress."""
        print(f"{self.cell.name}: {line}", flush=True)

    def training(self) -> dict[str, Any]:
        """Return what the training reached: accuracies at the last and at the best epochs, and its length."""
        lines = self.run.metrics()
        found = outcome(lines)
        images = (10 * self.scale.per_class[0] if self.scale.per_class else 50_000) - self.scale.holdout
        seconds = sum(images / line["images_per_second"] for line in lines if line.get("images_per_second"))
        return {
            "last": found["last"]["val_top1"],
            "best_on_holdout": found["best"]["val_top1"],
            "best_on_test": found["best_on_validation"]["val_top1"],
            "epochs": [line["epoch"] for line in lines][-1],
            "train_minutes": round(seconds / 60, 1),
            "largest_step_margin": max((line.get("step_margin", 0.0) for line in lines), default=0.0),
        }
