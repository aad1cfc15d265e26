"""The candidates of a key, and which of them a verdict takes."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

from sdnet.kernels.qualify.verdicts import GAIN, PLAIN, TORCH, UPDATE, Trial, Verdict
from sdnet.kernels.triton_path import tiles
from sdnet.kernels.triton_path.candidates import PROCESSORS, candidates
from sdnet.kernels.triton_path.paths import Entry, PathName
from sdnet.kernels.triton_path.tiles import Shape

BASELINES = (TORCH, PLAIN)
"""The paths whose products are all cuDNN's: what every other candidate has to beat."""


class Candidate(NamedTuple):
    """A way to compute a call, by name.

    Attributes:
        name: the name, as reports show it.
        path: as in `verdicts.Trial`.
    """

    name: str
    path: str

    @property
    def is_ours(self) -> bool:
        """Whether every product is made by a kernel of this package, which gives the same bits each time."""
        return self.path.startswith(('["fused"', '["padded"'))


def candidates_of(shape: Shape, all_tiles: bool, processors: int = PROCESSORS, may_pad: bool = True) -> list[Candidate]:
    """Return the candidates for a layer: the baselines, the rules' tiles on every path, then other tiles.

    Args:
        shape: the layer.
        all_tiles: whether other tiles than the rules' are included.
        processors: multiprocessors of the GPU.
        may_pad: whether channels of zeros may be added to the images, which those of several dictionaries cannot take.
    """
    found = [Candidate(path, path) for path in BASELINES]
    found.append(Candidate("cudnn with Triton's correlation", Entry("cudnn", tiles.by_rule(shape)).encoded()))
    shapes: dict[PathName, Shape] = {"fused": shape}
    if may_pad and shape.channels_last and shape.padded != shape:
        shapes["padded"] = shape.padded
    found += [Candidate(path, Entry(path, tiles.by_rule(each)).encoded()) for path, each in shapes.items()]
    for path, each in shapes.items() if all_tiles else ():
        for other in candidates(each, processors)[1:]:
            named = zip(("A'", "A", "correlation"), other, tiles.by_rule(each), strict=True)
            changed = ", ".join(f"{name} {tile}" for name, tile, usual in named if tile != usual)
            found.append(Candidate(f"{path}, {changed}", Entry(path, other).encoded()))
    return found


def cost(trial: Trial) -> float:
    """Return the milliseconds by which trials are ordered: the geometric mean with launches and replayed."""
    assert trial.launched_ms is not None
    return sqrt(trial.launched_ms * (trial.launched_ms if trial.replayed_ms is None else trial.replayed_ms))


def ratio(trial: Trial, baseline: Trial) -> float:
    """Return the time of a trial as a share of a baseline's: the larger one of the shares launched and replayed."""
    assert trial.launched_ms is not None
    assert baseline.launched_ms is not None
    shares = [trial.launched_ms / baseline.launched_ms]
    if trial.replayed_ms is not None and baseline.replayed_ms is not None:
        shares.append(trial.replayed_ms / baseline.replayed_ms)
    return max(shares)


def judge(trials: Sequence[Trial], batch: int) -> Verdict:
    """Return the verdict: the quickest candidate that is right, if it beats the best baseline by `GAIN`.

    It must do so with launches as well as replayed, so that it is no loss whether the host or the GPU is the limit.
    """
    trials = tuple(trials)
    timed = [trial for trial in trials if not trial.fault and trial.launched_ms is not None]
    baselines = [trial for trial in timed if trial.path in BASELINES]
    if not baselines:
        reason = "; ".join(str(trial) for trial in trials if trial.path in BASELINES) or "no baseline was timed"
        return Verdict(TORCH, f"PyTorch computes it, because nothing could be compared with it ({reason})", batch,
                       trials=trials)  # fmt: skip
    best = min(baselines, key=cost)
    better = [trial for trial in timed if trial.path not in BASELINES and ratio(trial, best) <= 1 - GAIN]
    if better:
        taken = min(better, key=cost)
        reason = f"{taken.name} was right and {1 / ratio(taken, best):.2f} times as fast as {best.name}"
        return Verdict(taken.path, reason, batch, trials=trials)
    rest = [trial for trial in trials if trial.path not in BASELINES]
    wrong = sum(bool(trial.fault) for trial in rest)
    refused = f", and {wrong} of {len(rest)} candidates were refused" if wrong else ""
    return Verdict(best.path, f"{best.name} is taken, as no candidate was right and {GAIN:.0%} faster{refused}", batch,
                   trials=trials)  # fmt: skip


def judge_update(trials: Sequence[Trial]) -> Verdict:
    """Return the verdict for an update of dictionaries, of the trials of PyTorch and of Triton."""
    trials = tuple(trials)
    named = {trial.path: trial for trial in trials}
    ours, theirs = named[UPDATE], named[TORCH]
    if ours.fault or theirs.fault or ours.launched_ms is None or theirs.launched_ms is None:
        reason = "; ".join(str(trial) for trial in trials)
        return Verdict(TORCH, f"PyTorch updates the dictionaries ({reason})", trials=trials)
    if ratio(ours, theirs) <= 1 - GAIN:
        reason = f"the Triton update was right and {1 / ratio(ours, theirs):.2f} times as fast as PyTorch's"
        return Verdict(UPDATE, reason, trials=trials)
    return Verdict(TORCH, f"PyTorch updates the dictionaries, as Triton was not {GAIN:.0%} faster", trials=trials)
