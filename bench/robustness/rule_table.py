"""The table of rules: accuracy under every noise and severity, for every way to choose lambda.

| row           | lambda of the first layer                                                   |
|---------------|-----------------------------------------------------------------------------|
| training      | the training lambda                                                         |
| a             | the line over the residual, fitted on corrupted held-out pictures           |
| b             | max(training lambda, k sigma), k calibrated on held-out pictures            |
| c             | ACSC's loss over the batch, without labels                                  |
| oracle        | for every noise and severity the best one on held-out pictures; it knows both |
| BN            | the training lambda; batch norm by the statistics of the batch              |
| b + BN        | rule b; batch norm by the statistics of the batch                           |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sdnet.bench.robustness.measure import (
    BATCH,
    correct,
    correct_with_lambda,
    cost_of,
    first_layer_facts,
    percent,
    pixel_model,
)
from sdnet.bench.robustness.pictures import CLEAN, PIXEL_MEAN, PIXEL_STD, SEED, Group, Sets, name_of
from sdnet.bench.robustness.stored import StoredResults
from sdnet.robustness.corruptions import NOISES
from sdnet.robustness.fitting import best_of, calibrate_noise_rule
from sdnet.robustness.model import RobustModel, first_layer
from sdnet.robustness.rules import NoiseRule, ResidualRule, Rule, UnlabelledRule, line_through
from sdnet.step_size import csc_layers

OFFICIAL_LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 15))
"""The grid of the official robust inference, 0.1 to 1.4."""


@dataclass(frozen=True)
class TableOptions:
    """How much is measured.

    Attributes:
        test: test pictures, 0 for all.
        held: held-out pictures on which lambda is chosen.
        severities: the severities of CIFAR-10-C.
        lambdas: the grid of lambda for rule a and the oracle.
        alone: test pictures that are evaluated one at a time with batch statistics.
        alone_severities: their severities.
    """

    test: int = 0
    held: int = 2000
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    lambdas: tuple[float, ...] = OFFICIAL_LAMBDAS
    alone: int = 1000
    alone_severities: tuple[int, ...] = (3, 5)

    def groups(self, severities: Sequence[int]) -> list[Group]:
        """Return the clean pictures and every noise at every severity."""
        return [CLEAN, *((noise, severity) for noise in NOISES for severity in severities)]


class RuleTable:
    """Measure the table for one network; every value is stored as it comes.

    Args:
        model: the network, in evaluation mode.
        sets: the pictures.
        options: how much is measured.
        results: where the values are stored.
        say: called with a line of progress.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Sets,
        options: TableOptions,
        results: StoredResults,
        say: Callable[[str], object] = print,
    ) -> None:
        self.model, self.sets, self.options, self.results, self.say = model, sets, options, results, say
        self.sparse = bool(csc_layers(model))

    def measure(self) -> None:
        """Measure what is not stored yet."""
        rows = self.rows()
        for group in self.options.groups(self.options.severities):
            pixels = self.sets.test.corrupted(group)
            for row in rows:
                self.cell(row, group, pixels, self.sets.test.labels)
            self.say(f"{name_of(group)}: " + "  ".join(f"{row} {self.results.values[key(row, group)]}" for row in rows))
        self.measure_alone()
        if self.sparse:
            x = pixel_model(self.model).normalise(self.sets.test.corrupted(CLEAN)[:BATCH])
            rules = {"a": self.rule_a(), "b": self.rule_b(), "c": UnlabelledRule()}
            self.results.get("cost at batch 200", lambda: cost_of(self.model, rules, x, repeats=5))
            self.results.get("cost at batch 1", lambda: cost_of(self.model, rules, x[:1]))

    def rows(self) -> list[str]:
        """Return the rows of the table that this network has."""
        return ["training", "a", "b", "c", "oracle", "BN", "b + BN"] if self.sparse else ["training", "BN"]

    def cell(self, row: str, group: Group, pixels: Tensor, labels: Tensor) -> None:
        """Measure the accuracy of a row under a noise, and the mean lambda that its rule chose."""
        robust, name = self.robust(row, group), key(row, group)
        if row not in ("a", "b", "c"):
            batch = BATCH if "BN" in row else None
            self.results.get(name, lambda: percent(correct(pixel_model(robust), pixels, labels, batch)))
        elif name not in self.results.values:
            right, lam = correct_with_lambda(robust, pixels, labels)
            self.results.get(f"mean lambda, {name}", lambda: lam)
            self.results.get(name, lambda: percent(right))

    def measure_alone(self) -> None:
        """Measure rows at batch 1; rows that treat every picture by itself give the same at any batch."""
        part = self.sets.test.first(self.options.alone)
        for group in self.options.groups(self.options.alone_severities):
            pixels = self.sets.test.corrupted(group)[: len(part)]
            for row in [row for row in self.rows() if row not in ("c", "oracle")]:
                batch = 1 if "BN" in row else None
                model = pixel_model(self.robust(row, group))
                name = f"batch 1, {key(row, group)}"
                self.results.get(name, lambda m=model, b=batch, p=pixels: percent(correct(m, p, part.labels, batch=b)))
            self.say(f"batch 1, {name_of(group)} done")

    def robust(self, row: str, group: Group) -> RobustModel:
        """Return the network of a row of the table, in evaluation mode."""
        rules: dict[str, Callable[[], Rule | float]] = {
            "a": self.rule_a,
            "b": self.rule_b,
            "b + BN": self.rule_b,
            "c": UnlabelledRule,
            "oracle": lambda: self.oracle(group),
        }
        rule = rules[row]() if row in rules else None
        return RobustModel(self.model, rule, batch_statistics="BN" in row).eval()

    def rule_a(self) -> ResidualRule:
        """Return the line over the residual, fitted on all groups of the held-out pictures."""
        groups = self.options.groups(self.options.severities)
        slope, intercept = line_through(
            [self.held_facts(group)["residual"] for group in groups], [self.oracle(group) for group in groups]
        )
        self.results.get("rule a", lambda: {"slope": slope, "intercept": intercept})
        return ResidualRule(slope, intercept, most=max(self.options.lambdas))

    def rule_b(self) -> NoiseRule:
        """Return the rule by the estimate of noise, with its factor calibrated on the held-out pictures."""
        held = self.sets.held

        def calibrate() -> float:
            options = {"mean": PIXEL_MEAN, "std": PIXEL_STD, "generator": SEED}
            return calibrate_noise_rule(self.model, held.images, held.labels, **options).k

        return NoiseRule(self.results.get("rule b", calibrate))

    def oracle(self, group: Group) -> float:
        """Return the lambda with the highest accuracy on the held-out pictures under one noise and severity."""
        scores = self.held_scores(group)
        return best_of(self.options.lambdas, scores)

    def held_scores(self, group: Group) -> list[float]:
        """Return the accuracy on the held-out pictures for every lambda of the grid."""

        def compute() -> list[float]:
            pixels = self.sets.held.corrupted(group)
            models = [pixel_model(RobustModel(self.model, lam)) for lam in self.options.lambdas]
            self.say(f"lambda on held-out pictures, {name_of(group)}")
            return [percent(correct(model, pixels, self.sets.held.labels)) for model in models]

        return self.results.get(f"held-out, {name_of(group)}", compute)

    def held_facts(self, group: Group) -> dict[str, float]:
        """Return residual and sparsity of the first layer at the training lambda on the held-out pictures."""

        def compute() -> dict[str, float]:
            normalise = pixel_model(self.model).normalise
            return first_layer_facts(first_layer(self.model), self.sets.held.corrupted(group), normalise)

        return self.results.get(f"held-out facts, {name_of(group)}", compute)


def key(row: str, group: Group) -> str:
    """Return the name of a value of the table."""
    return f"{row}, {name_of(group)}"
