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


def by_weights(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the scores of an evaluation by the file of the weights that reached them."""
    averaged = {name.removeprefix("ema_"): value for name, value in scores.items() if name.startswith("ema_")}
    live = {name: value for name, value in scores.items() if not name.startswith("ema_")}
    return {"last": live} | ({"last_ema": averaged} if averaged else {})


def describe_scores(scores: Mapping[str, float]) -> list[str]:
    """Return the scores of an evaluation as words; nothing for an epoch without one."""
    words = []
    for prefix in ("", "ema_"):
        for kind in ("val", "holdout"):
            loss, top1, top5 = (scores.get(f"{prefix}{kind}_{name}") for name in ("loss", "top1", "top5"))
            if loss is not None:
                title = {"": "", "ema_": "EMA "}[prefix] + {"val": "", "holdout": "held-out "}[kind]
                words += [f"{title}{'val ' if kind == 'val' else ''}loss {loss:.3f}", f"{title}top-1 {top1:.2f}%"]
                words += [f"{title}top-5 {top5:.2f}%"] if kind == "val" and not prefix else []
    return words


def describe_outcome(lines: Sequence[Line]) -> str:
    """Return the validation accuracies of `outcome` as words."""
    found = outcome(lines)
    if not found:
        return "the run was not evaluated"

    def words(name: str, remark: str = "") -> str:
        return f"{found[name]['val_top1']:.2f}% (epoch {found[name]['epoch']}{remark})"

    text = f"best top-1 {words('best')}"
    if "holdout_top1" in found["best"]:
        chosen = words("best", ", chosen on held-out images")
        text = f"best top-1 {chosen}, best on validation {words('best_on_validation')}"
    text += f", last {words('last')}"
    averaged = found["last"].get("ema_val_top1")
    return text if averaged is None else f"{text}, last EMA {averaged:.2f}%"
