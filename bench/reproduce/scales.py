"""The scales of the reproduction: which networks are trained, how, and how much is evaluated."""

from dataclasses import dataclass
from typing import Literal

from sdnet.bench.robustness.attack_runs import AttackOptions
from sdnet.bench.robustness.rule_table import TableOptions

ScaleName = Literal["tiny", "small", "full"]


@dataclass(frozen=True)
class Cell:
    """One network that is trained.

    Attributes:
        model: a name of `sdnet.list_models()`.
        seed: the seed of weights, order and augmentation.
        shortcut: whether the blocks have residual connections.
        table: whether the table of rules is measured.
        attacks: whether it is attacked.
        weights: whether its weights are written beside the cards.
    """

    model: str
    seed: int
    shortcut: bool = True
    table: bool = False
    attacks: bool = False
    weights: bool = False

    @property
    def kind(self) -> str:
        """The network without its seed, such as "sdnet18_all_noshortcut"."""
        return self.model + ("" if self.shortcut else "_noshortcut")

    @property
    def name(self) -> str:
        """The name of the run folder, such as "sdnet18-seed0"."""
        return f"{self.kind}-seed{self.seed}"


CELLS = (
    Cell("sdnet18", 0, table=True, attacks=True, weights=True),
    Cell("resnet18", 0, table=True, attacks=True),
    Cell("sdnet18_all", 0, shortcut=False, table=True, weights=True),
    Cell("resnet18", 1),
    Cell("sdnet18", 1),
    Cell("sdnet18_all", 0, table=True),
    Cell("resnet18", 2),
    Cell("sdnet18", 2),
)
"""In the order in which they are trained."""


@dataclass(frozen=True)
class Scale:
    """How large the experiment is.

    Attributes:
        name: its name.
        width: the base width of the networks.
        epochs: passes over the training set.
        holdout: training pictures that are held out, to choose the best weights and to fit the rules.
        per_class: training and test pictures of each class; None for all.
        table: how much of the table of rules is measured.
        attacks: how much is attacked.
        cells: the networks.
    """

    name: ScaleName
    width: int
    epochs: int
    holdout: int
    per_class: tuple[int, int] | None
    table: TableOptions
    attacks: AttackOptions
    cells: tuple[Cell, ...] = CELLS


SCALES: dict[str, Scale] = {
    "tiny": Scale(
        "tiny",
        width=16,
        epochs=5,
        holdout=2000,
        per_class=(1200, 200),
        table=TableOptions(
            test=1000,
            held=500,
            severities=(1, 3, 5),
            lambdas=(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.4),
            alone=200,
        ),
        attacks=AttackOptions(pictures=100, restarts=1, autoattack=10, queries=300),
    ),
    "small": Scale(
        "small", width=16, epochs=15, holdout=5000, per_class=None, table=TableOptions(), attacks=AttackOptions()
    ),
    "full": Scale(
        "full",
        width=64,
        epochs=220,
        holdout=5000,
        per_class=None,
        table=TableOptions(),
        attacks=AttackOptions(
            pictures=1000, autoattack=1000, autoattack_linf=(0.5, 1, 2, 8), autoattack_l2=(0.1, 0.25, 0.5)
        ),
    ),
}
