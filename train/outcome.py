"""What a run reached: the scores of its best and of its last weights."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""


def best_line(lines: Sequence[Line]) -> Line:
    """Return the line of the best epoch: by the held-out images where the run has some, else by the validation set."""
    deciding = "holdout_top1" if any("holdout_top1" in line for line in lines) else "val_top1"
    return max((line for line in lines if deciding in line), key=lambda line: line[deciding])


def outcome(lines: Sequence[Line]) -> dict[str, Line]:
    """Return the lines that a report of a run needs; an empty dictionary before the first evaluation.

    Args:
        lines: The lines of metrics.jsonl.

    Returns:
        `best`, the epoch whose weights are in best.safetensors; `best_on_validation`, the one with the highest
        validation top-1, which is the same unless the best is chosen on held-out images; and `last`, the last one that
        was evaluated.
    """
    evaluated = [line for line in lines if "val_top1" in line]
    if not evaluated:
        return {}
    on_validation = max(evaluated, key=lambda line: line["val_top1"])
    return {"best": best_line(evaluated), "best_on_validation": on_validation, "last": evaluated[-1]}


def describe_outcome(lines: Sequence[Line]) -> str:
    """Return the validation accuracies of `outcome` as words."""
    found = outcome(lines)
    if not found:
        return "the run was not evaluated"

    def words(name: str, remark: str = "") -> str:
        return f"{found[name]['val_top1']:.2f}% (epoch {found[name]['epoch']}{remark})"

    if "holdout_top1" not in found["best"]:
        return f"best top-1 {words('best')}, last {words('last')}"
    chosen = words("best", ", chosen on held-out images")
    return f"best top-1 {chosen}, best on validation {words('best_on_validation')}, last {words('last')}"
