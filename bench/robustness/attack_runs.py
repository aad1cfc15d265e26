"""Attacks on one model of pixels: PGD over bounds, AutoAttack, and checks that masked gradients would fail.

A model with masked gradients looks robust because attacks find no direction, not because there is no adversary. It
fails these checks: more steps leave no fewer pictures right, an unbounded attack leaves none right, the gradient-free
Square attack finds no picture that the white-box attacks missed, and gradients are not zero. Expectation over
transformations is for random defences: here a forward is deterministic, which is checked too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdnet.bench.robustness.measure import correct, percent
from sdnet.bench.robustness.pictures import SEED
from sdnet.bench.robustness.stored import StoredResults, pack, unpack
from sdnet.robustness.attacks import Norm, pgd
from sdnet.train.errors import UserError

Bound = tuple[Norm, float]
"""A norm and the largest distance in pixels of [0, 1]."""

WHITE_BOX_ATTACKS = ("apgd-ce", "apgd-t", "fab-t")
STEP_FACTORS = (0.5, 1.0, 2.5, 5.0)
"""The lengths of a step that are tried, in units of eps / steps."""


@dataclass(frozen=True)
class AttackOptions:
    """How much is attacked.

    Attributes:
        pictures: test pictures that PGD attacks.
        linf: bounds in L-infinity, in 1/255.
        l2: bounds in L2.
        steps: gradient steps of PGD.
        restarts: restarts of PGD.
        autoattack: test pictures that AutoAttack attacks.
        autoattack_linf: its bounds in L-infinity, in 1/255.
        autoattack_l2: its bounds in L2.
        queries: forwards of Square for each picture; 5000 in the standard version.
        batch: pictures of one forward.
    """

    pictures: int = 500
    linf: tuple[float, ...] = (0.5, 1, 2, 8)
    l2: tuple[float, ...] = (0.1, 0.25, 0.5)
    steps: int = 20
    restarts: int = 2
    autoattack: int = 200
    autoattack_linf: tuple[float, ...] = (1, 2)
    autoattack_l2: tuple[float, ...] = (0.25,)
    queries: int = 5000
    batch: int = 50

    def bounds(self) -> list[Bound]:
        """Return the bounds of PGD in pixels."""
        return [*(("linf", eps / 255) for eps in self.linf), *(("l2", eps) for eps in self.l2)]

    def autoattack_bounds(self) -> list[Bound]:
        """Return the bounds of AutoAttack in pixels."""
        return [*(("linf", eps / 255) for eps in self.autoattack_linf), *(("l2", eps) for eps in self.autoattack_l2)]


def bound_name(bound: Bound) -> str:
    """Return a bound in words: "Linf 2/255", "L2 0.25"."""
    norm, eps = bound
    return f"Linf {round(255 * eps, 3):g}/255" if norm == "linf" else f"L2 {eps:g}"


class AttackRuns:
    """Attack one model of pixels; every value is stored as it comes.

    Args:
        model: a model of pixels, in evaluation mode, whose gradients reach the pixels.
        pixels: test pictures in [0, 1].
        labels: their classes.
        options: how much is attacked.
        results: where the values are stored.
        say: called with a line of progress.
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        options: AttackOptions,
        results: StoredResults,
        say: Callable[[str], object] = print,
    ) -> None:
        self.model, self.options, self.results, self.say = model.requires_grad_(False), options, results, say
        self.pixels, self.labels = pixels[: options.pictures], labels[: options.pictures]

    def measure(self) -> None:
        """Measure what is not stored yet."""
        self.measure_pgd()
        self.measure_autoattack()

    def measure_pgd(self) -> None:
        """Measure what is not stored yet of PGD and of the checks."""
        self.results.get("clean", lambda: percent(correct(self.model, self.pixels, self.labels)))
        for bound in self.options.bounds():
            self.said(f"PGD-{self.options.steps}, {bound_name(bound)}", lambda b=bound: self.pgd(b))
        self.said(
            "PGD-7, step 2/255, Linf 8/255", lambda: self.pgd(("linf", 8 / 255), steps=7, step=2 / 255, restarts=1)
        )
        self.checks()

    def measure_autoattack(self) -> None:
        """Measure what is not stored yet of AutoAttack, which takes longest."""
        for bound in self.options.autoattack_bounds():
            self.autoattack(bound)

    def said(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a stored value, and say it."""
        value = self.results.get(name, compute)
        self.say(f"{name}: {value}")
        return value

    def pgd(self, bound: Bound, steps: int | None = None, step: float | None = None, restarts: int = 0) -> float:
        """Return the accuracy under PGD, in percent."""
        norm, eps = bound
        right: list[Tensor] = []
        for at in range(0, len(self.pixels), self.options.batch):
            images, labels = (part[at : at + self.options.batch] for part in (self.pixels, self.labels))
            found = pgd(
                self.model,
                images,
                labels,
                eps,
                norm=norm,
                steps=steps or self.options.steps,
                step_size=step,
                restarts=restarts or self.options.restarts,
                generator=SEED + at,
            )
            right.append(correct(self.model, found, labels))
        return percent(torch.cat(right))

    def checks(self) -> None:
        """Measure what masked gradients would fail: see the head of this file."""
        bound: Bound = ("linf", 1 / 255)
        for steps in (1, 5, 20, 50):
            self.said(
                f"check: {steps} steps, {bound_name(bound)}", lambda s=steps: self.pgd(bound, steps=s, restarts=1)
            )
        for factor in STEP_FACTORS:
            step = factor * bound[1] / self.options.steps
            self.said(f"check: step {factor:g} eps / steps", lambda s=step: self.pgd(bound, step=s, restarts=1))
        self.said("check: unbounded", lambda: self.pgd(("linf", 1.0), steps=50, step=0.02, restarts=1))
        self.said("check: pictures with a gradient of zero, %", self.zero_gradients)
        self.said("check: two forwards are equal", self.deterministic)

    def zero_gradients(self) -> float:
        """Return the share of pictures, in percent, whose cross-entropy has a gradient of exactly zero."""
        count = 0
        for at in range(0, len(self.pixels), self.options.batch):
            part = self.pixels[at : at + self.options.batch].clone().requires_grad_()
            loss = F.cross_entropy(self.model(part), self.labels[at : at + self.options.batch], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, part)
            count += int((gradient.flatten(1).abs().amax(1) == 0).sum())
        return round(100 * count / len(self.pixels), 4)

    @torch.no_grad()
    def deterministic(self) -> bool:
        """Return whether two forwards of the same pictures give the same logits."""
        part = self.pixels[: self.options.batch]
        return bool(self.model(part).equal(self.model(part)))

    def autoattack(self, bound: Bound) -> None:
        """Run the four attacks of the standard AutoAttack, each on the pictures that are still classified rightly.

        At the first bound Square runs on all that are right without an attack, because its accuracy alone is one of
        the checks, and counts for both.
        """
        if not (count := min(self.options.autoattack, len(self.pixels))):
            return
        pixels, labels = self.pixels[:count], self.labels[:count]
        name = f"AutoAttack, {bound_name(bound)}"

        def stored(what: str, compute: Callable[[], Tensor]) -> Tensor:
            packed = self.results.get(f"{name}: {what}", lambda: pack(compute().tolist()))
            flags = torch.tensor(unpack(packed, count), device=pixels.device)
            self.say(f"{name}: {what}: {int(flags.sum())} of {count} pictures are right")
            return flags

        clean = right = stored("clean", lambda: correct(self.model, pixels, labels))
        for attack in WHITE_BOX_ATTACKS:
            right = stored(f"after {attack}", lambda a=attack, r=right: self.after(a, bound, pixels, labels, r))
        if alone := bound == self.options.autoattack_bounds()[0]:
            square = stored("after square alone", lambda: self.after("square", bound, pixels, labels, clean))
        else:
            square = stored("after square", lambda: self.after("square", bound, pixels, labels, right))
        self.results.get(name, lambda: percent(right & square))
        if alone:
            self.results.get(f"{name}, square alone", lambda: percent(square))

    def after(self, attack: str, bound: Bound, pixels: Tensor, labels: Tensor, right: Tensor) -> Tensor:
        """Return which pictures are still classified rightly after one attack on those of `right`, [N] bool."""
        left = right.clone()
        for indices in right.nonzero().flatten().split(self.options.batch):
            if len(indices):
                found = run_attack(self.model, attack, bound, pixels[indices], labels[indices], self.options.queries)
                left[indices] = correct(self.model, found, labels[indices])
        return left


def autoattack_class() -> Any:
    """Return the class `AutoAttack` of pyautoattack.

    Raises:
        UserError: pyautoattack is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise UserError("AutoAttack needs pyautoattack: pip install 'sdnet[robust]'.") from error
    return AutoAttack


def check_autoattack(classes: int) -> None:
    """Raise a UserError if a network has too few classes for the targeted loss of AutoAttack."""
    if classes < 4:
        raise UserError(f"AutoAttack needs 4 classes at least; the network has {classes}: pass --autoattack 0.")


def found_by_square(values: Mapping[str, Any], count: int) -> dict[str, float]:
    """Return for every bound the share of pictures, in percent, that Square finds an adversary of and no other attack.

    The white-box attacks have left these pictures right, so they have missed an adversary that exists.

    Args:
        values: the values that `AttackRuns` has stored.
        count: how many pictures AutoAttack has attacked.
    """
    found: dict[str, float] = {}
    for name, flags in values.items():
        bound, _, after = name.removeprefix("AutoAttack, ").partition(": ")
        if after not in ("after square", "after square alone"):
            continue
        white_box = unpack(values[f"AutoAttack, {bound}: after {WHITE_BOX_ATTACKS[-1]}"], count)
        missed = sum(left and not right for left, right in zip(white_box, unpack(flags, count), strict=True))
        found[f"check: pictures that only Square finds, {bound}, %"] = round(100 * missed / count, 4)
    return found


def run_attack(model: nn.Module, attack: str, bound: Bound, pixels: Tensor, labels: Tensor, queries: int) -> Tensor:
    """Return what one attack of the standard AutoAttack finds, as `pyautoattack` runs it.

    Raises:
        UserError: `pyautoattack` is not installed, or there are fewer than 4 classes.
    """
    norm, eps = bound
    attacker: Any = autoattack_class()(
        model, norm="Linf" if norm == "linf" else "L2", eps=eps, seed=SEED, version="standard", device=pixels.device
    )
    attacker.attacks_to_run, attacker.square.n_queries = [attack], queries
    check_autoattack(classes := model(pixels[:1]).shape[1])
    attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = min(9, classes - 1)
    found, _ = attacker.run_standard_evaluation(pixels, labels, batch_size=len(pixels))
    return found
